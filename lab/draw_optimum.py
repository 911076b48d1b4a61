"""What exp_mlp_mnist.py draws of the best width: that which the kernel predicts beside that which was measured."""

import math

import numpy as np

from lab.draw_mlp import FIGURE_8, UNIT
from lab.figures import axes_over_width, mosaic, panels, subject, title, tuned
from lab.intervals import best_of
from lab.run import percent
from lab.settings import UsageError

ABOUT = (*FIGURE_8, "side")
TICKS, ERRORS = [2**k for k in range(1, 12)], (5, 10, 15, 20, 30, 50, 90)
PREDICTIONS = {"exact": "exact theory", "formula": "Eq. 4", "series": "the series"}


def in_hindsight(values):
    """The constant that is nearest to all of these on a logarithmic scale, by the mean distance"""
    return math.exp(np.median(np.log(values)))


def comparison(points, metric, budgets):
    """[(what was computed for a number of weights, mean errors over its widths in per cent, best width, interval,
    widths not distinguishable from it)] of the numbers of weights whose runs are all done, and lines that sum it up.
    """
    from scipy.stats import spearmanr

    found, summary, rng = [], [], np.random.default_rng(0)
    for b in budgets:
        line = {p.settings.width: p for p in points
                if (p.settings.side, p.settings.base_width) == (b["side"], b["base_width"])}
        if any(line[n].missing or not line[n].finished for n in b["widths"]):
            continue
        errors = [100 - 100 * np.array(line[n].values(f"{metric}_test_acc")) for n in b["widths"]]
        means, (best, interval, alike) = np.array([e.mean() for e in errors]), best_of(b["widths"], errors, rng)
        found.append((b, means, best, interval, alike))
        summary.append(f"{b['side']} x {b['side']}, {b['weights']:,} weights: best width {best} "
                       f"({means.min():.2f} % error), by resampling seeds {interval[0]} to {interval[1]}, not "
                       f"distinguishable {alike[0]} to {alike[-1]}; predicted {b['exact']} ({b['interval'][0]} to "
                       f"{b['interval'][1]}), by the series {b['series']}, by Eq. 4 {b['formula']}; rank correlation "
                       f"of distance and error over {len(means)} widths "
                       f"{spearmanr(b['distances'], means).statistic:.2f}")
    if not found:
        raise UsageError("of no number of weights are all runs done; --list optimum names those that are missing")
    measured = np.array([best for _, _, best, *_ in found])
    ratio, width = in_hindsight([best / b["base_width"] for b, _, best, *_ in found]), in_hindsight(measured)
    each = in_hindsight([b["weights"] / best for b, _, best, *_ in found])
    guesses = {label: [b[name] for b, *_ in found] for name, label in PREDICTIONS.items()} | {
        f"a fixed connectivity (in hindsight {100 / ratio:.2g} %)": [b["base_width"] * ratio for b, *_ in found],
        f"a fixed width (in hindsight {width:.0f})": [width] * len(found),
        f"a fixed number of weights a unit (in hindsight {each:.0f})": [b["weights"] / each for b, *_ in found]}
    summary += [judged(label, guess, found) for label, guess in guesses.items()]
    if len({b["side"] for b, *_ in found}) > 1 < len({b["base_width"] for b, *_ in found}):
        known = {"measured": measured} | {PREDICTIONS[name]: [b[name] for b, *_ in found] for name in PREDICTIONS}
        powers = {label: powers_of_weights_and_pixels(found, widths) for label, widths in known.items()}
        summary.append("the best width grows as weights to the power a and pixels to the power b, by least squares: "
                       + ", ".join(f"{label} {a:.2f} and {b:.2f}" for label, (a, b) in powers.items()))
    return found, summary


def powers_of_weights_and_pixels(found, widths):
    """(a, b) of the least squares fit log width = a log weights + b log pixels + c."""
    of = np.array([[math.log(b["weights"]), 2 * math.log(b["side"]), 1] for b, *_ in found])
    return np.linalg.lstsq(of, np.log(widths), rcond=None)[0][:2]


def judged(label, guesses, found):
    """A line of text: how near these widths are to the best ones of `found`, see comparison. Where the narrowest
    network is wider or the widest narrower there is none to judge.
    """
    from scipy.stats import spearmanr

    cases = [(guess, *case) for guess, case in zip(guesses, found)
             if case[0]["widths"][0] <= guess <= case[0]["widths"][-1]]
    if not cases:
        return f"best width by {label}: there is no such network"
    guesses, measured = (np.array([case[i] for case in cases]) for i in (0, 3))
    off, varied = np.log2(guesses / measured), len(set(guesses)) > 1
    rank = spearmanr(guesses, measured).statistic if varied else math.nan
    lost = [np.interp(np.log(guess), np.log(b["widths"]), means) - means.min() for guess, b, means, *_ in cases]
    alike = sum(widths[0] <= guess <= widths[-1] for guess, *_, widths in cases)
    missing = f" (no such network in {len(found) - len(cases)} cases)" if len(cases) < len(found) else ""
    return (f"best width by {label}{missing}: mean error of log2 width {abs(off).mean():.2f} (a factor of "
            f"{2 ** abs(off).mean():.2f}; of it {off.mean():+.2f} in one direction), rank correlation {rank:.2f}, "
            f"among those not distinguishable {alike} of {len(cases)} times, {np.mean(lost):.2f} points of error "
            "above the least")


def optimum(points, metric, computed):
    """Predicted over measured best width, above error over width for each number of weights."""
    found, summary = comparison(points, metric, computed["budgets"])
    summary += [f"regression with the infinite-width kernel, {side} x {side}: test accuracy {percent(r['gp_test_acc'])}"
                for side, r in computed.get("regression", {}).items()]
    sides, bases = (sorted({b[name] for b in computed["budgets"]}) for name in ("side", "base_width"))
    sides = sides[::-1]
    rows = [["exact"] * len(sides) + ["formula"] * len(sides), [side for side in sides for _ in range(2)]]
    figure, axes = mosaic(rows, (11, 9), height_ratios=(1.2, 1))
    for b, means, best, _, alike in found:
        color, ax = f"C{bases.index(b['base_width'])}", axes[b["side"]]
        ax.plot(b["widths"], means, f"{color}o-", markersize=3, label=f"{b['weights']:,}")
        ax.plot(b["exact"], np.interp(np.log(b["exact"]), np.log(b["widths"]), means), f"{color}*", markersize=13,
                markeredgecolor="k")
        for name in ("exact", "formula"):
            low, high = b["interval"] if name == "exact" else (b[name], b[name])
            axes[name].errorbar(best, b[name], yerr=[[b[name] - min(low, b[name])], [max(high, b[name]) - b[name]]],
                                xerr=[[best - alike[0]], [alike[-1] - best]], capsize=2,
                                fmt=f"{color}{'os^'[sides.index(b['side'])]}")
    ends = (0.6 * min(min(best, a[0], b["exact"], b["formula"]) for b, _, best, _, a in found),
            1.6 * max(max(best, a[-1], b["exact"], b["formula"]) for b, _, best, _, a in found))
    for name in ("exact", "formula"):
        ax, label = axes[name], PREDICTIONS[name]
        ax.plot(ends, ends, "k:", linewidth=1, label="predicted = measured")
        ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="best width, measured",
               ylabel=f"best width, by {label}")
        ticks = [n for n in TICKS if ends[0] <= n <= ends[1]]
        ax.set_xticks(ticks, ticks)
        ax.set_yticks(ticks, ticks)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    for side, marker in zip(sides, "os^"):
        ax = axes[side]
        axes["exact"].plot([], [], f"k{marker}", label=f"{side} x {side} pixels")
        axes_over_width(ax, [n for n in TICKS[::2] if n <= ax.get_xlim()[1]], UNIT)
        ax.set_title(f"{side} x {side} pixels; stars: by exact theory", fontsize=9)
        ax.set_yscale("log")
        ticks = [error for error in ERRORS if ax.get_ylim()[0] <= error <= ax.get_ylim()[1]]
        ax.set_yticks(ticks, ticks)
        ax.minorticks_off()
        if ax.lines:
            ax.legend(title="weights", fontsize=7)
    axes[sides[0]].set_ylabel(f"{metric} test error, %")
    for base in bases:
        axes["formula"].plot([], [], f"C{bases.index(base)}o", label=f"weights of a dense width {base}")
    for name in ("exact", "formula"):
        axes[name].legend(fontsize=8)
    figure.suptitle(f"{subject(points)}: the best width, as the Gaussian-process kernel predicts it and as measured\n"
                    f"{title(points, metric, about=ABOUT, bars=False)}\nbars: widths not "
                    f"distinguishable from the best, 95 % of resampled pairs of images ({computed['pairs']})",
                    fontsize=10)
    return figure, summary


def optimum_lr(points, metric):
    """The chosen learning rate over width, a line for each number of weights."""
    lines = {}
    for (side, base, width), rate in sorted(tuned(points, metric, ("side", "base_width", "width")).items()):
        lines.setdefault((side, base), {})[width] = rate
    sides, bases, rates = (sorted({getattr(p.settings, name) for p in points}) for name in ("side", "base_width", "lr"))
    figure, axes = panels(len(sides), (11, 4.4), sharey=True)
    for ax, side in zip(axes, reversed(sides)):
        for i, base in enumerate(bases):
            line = lines.get((side, base), {})
            ax.plot(list(line), list(line.values()), f"C{i}o-", label=f"weights of width {base}")
        ax.set_xscale("log")
        ax.set_yscale("log", base=2)
        ax.set(title=f"{side} x {side} pixels", xlabel=f"width ({UNIT})")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("learning rate")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{subject(points)}: chosen learning rates\n"
                    f"{title(points, metric, 'held-out', about=ABOUT, bars=False)}", fontsize=10)
    chosen = [rate for line in lines.values() for rate in line.values()]
    ends = [f"{chosen.count(end)} of {len(chosen)} networks take the {what} rate, {end:g}"
            for what, end in (("least", rates[0]), ("greatest", rates[-1]))]
    return figure, ["OPTIMUM_LR = {", *(f"    {key}: {line}," for key, line in lines.items()), "}", *ends]
