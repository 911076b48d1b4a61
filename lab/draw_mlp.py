"""What exp_mlp_mnist.py draws: accuracy over width, Figure 5, Figure 8."""

import math

import numpy as np

from lab.figures import (
    accuracy_over_width,
    axes_over_width,
    learning_rates,
    off_the_scale,
    one_rate_and_tuned,
    panels,
    sparse_and_dense,
    starved,
    subject,
    title,
    tuned,
)
from lab.run import percent

UNIT = "hidden units"
FIGURE_8 = ("limit", "held_out", "batch", "lr", "base_width", "last", "bias", "ntk", "pixelwise")  # what it is about


def width(points, metric):
    heading = f"{subject(points)}: wider at a fixed number of weights"
    return accuracy_over_width(points, sparse_and_dense(points), metric, heading, unit=UNIT)


def width_lr(points, metric):
    return learning_rates(points, metric, "WIDTH_LR", ("width",))


def width_tuned(points, metric):
    return one_rate_and_tuned(points, metric, f"{subject(points)}: wider at a fixed number of weights", unit=UNIT)


def fig8(points, metric):
    heading = f"Figure 8a. {subject(points)}: NTK parameterisation, tuned learning rates"
    return accuracy_over_width(points, sparse_and_dense(points), metric, heading, about=FIGURE_8, unit=UNIT)


def fig5(points, metric):
    """Heat maps over width and last-layer connectivity, the best cell starred, impossible cells empty."""
    figure, axes = panels(2, (11, 4.6), sharey=True)
    values = {(p.settings.activation, p.settings.width, p.settings.last): 100 * p.mean(f"{metric}_test_acc")
              for p in points}
    widths, connectivities = sorted({key[1] for key in values}), sorted({key[2] for key in values})
    high = np.nanmax(list(values.values()))
    low = max(np.nanmin(list(values.values())), high - 12)  # a few starved cells would take all the colours
    s, summary = points[0].settings, []
    stated = {"relu": "96.3 % at width 80 or 160", "linear": "92.7 % at width 40"}
    ours = (s.data, s.base_width) == ("mnist", 5)  # as in the paper
    for ax, activation in zip(axes, ("relu", "linear")):
        grid = np.array([[values.get((activation, w, c), np.nan) for w in widths] for c in connectivities])
        image = ax.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                ax.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                        color="black" if value > (low + high) / 2 else "white")
            elif (activation, widths[column], connectivities[row]) in values:
                ax.text(column, row, "missing", ha="center", va="center", fontsize=7, color="gray")
        name = {"relu": "ReLU", "linear": "linear"}[activation]
        if np.isfinite(grid).any():
            row, column = np.unravel_index(np.nanargmax(grid), grid.shape)
            ax.plot(column + 0.36, row + 0.3, "*", color="red", markersize=8, markeredgewidth=0)
            summary.append(f"{name}: best {grid[row, column]:.2f} % at width {widths[column]} and last-layer "
                           f"connectivity {connectivities[row]}"
                           + (f"; the paper: {stated[activation]}" if ours else ""))
        ax.set_title(name + (f" (the paper's best: {stated[activation]})" if ours else ""), fontsize=10)
        ax.set_xticks(range(len(widths)), widths)
        ax.set_yticks(range(len(connectivities)), connectivities)
        ax.set_xlabel("width")
    axes[0].set_ylabel("connectivity of the last layer")
    figure.colorbar(image, ax=axes, label="test accuracy, %", extend="min")
    words = title(points, metric, about=("last", "activation"), bars=False)
    figure.suptitle(f"Figure 5. {subject(points)}, {s.budget:,} weights: {words}", fontsize=10)
    return figure, summary


def fig8_lr(points, metric):
    return learning_rates(points, metric, "FIG8_LR", ("dense", "width"), FIGURE_8)


def fig8b(points, metric, computed):
    """Kernel distance and test error over width on two axes, with their minima."""
    from scipy.stats import spearmanr

    figure, left = panels(size=(8, 5))
    right = left.twinx()
    widths, exact = np.array(computed["widths"]), np.array(computed["exact"])[:, 0]
    summary = []
    for name, label, style in (("exact", "exact (Theorem 1)", "C0-"), ("series", "series", "C2--"),
                               ("measured", f"measured, {computed['networks']} networks", "C1o"),
                               ("formula", "the paper's Eq. 4", "C3:")):
        values = np.array(computed[name])  # (widths,), or with their errors (widths, 2)
        mean, error = (values[:, 0], values[:, 1]) if values.ndim == 2 else (values, None)
        left.errorbar(widths, mean, error, fmt=style, capsize=2, label=f"{label}: least at {widths[mean.argmin()]}",
                      markersize=4)
        summary.append(f"kernel distance, {label}: least at width {widths[mean.argmin()]} "
                       f"({mean.min():.3g}; exact there {exact[mean.argmin()]:.3g})")
    done = sorted((p for p in points if p.finished), key=lambda p: p.settings.width)
    trained = np.array([p.settings.width for p in done])
    errors = np.array([100 - 100 * p.mean(f"{metric}_test_acc") for p in done])
    deviations = np.array([100 * p.std(f"{metric}_test_acc") for p in done])
    learned = ~starved(-errors)
    right.errorbar(trained[learned], errors[learned], deviations[learned], fmt="ks-", capsize=3,
                   label=f"test error: least at {trained[errors.argmin()]}")
    off_the_scale(right, trained[~learned], errors[~learned], color="k", edge=1)
    least = 100 - 100 * computed["gp_test_acc"]
    right.axhline(least, color="gray", linestyle="-.", label=f"infinite width (Gaussian process): {least:.2f} %")
    at_trained = exact[[list(widths).index(n) for n in trained]]
    rank, rank_learned = (spearmanr(at_trained[use], errors[use]).statistic if use.sum() > 2 else math.nan
                          for use in (errors >= 0, learned))
    summary += [f"test error of the trained networks: least at width {trained[errors.argmin()]} ({errors.min():.2f} %)",
                f"rank correlation of exact kernel distance and test error over {len(trained)} widths: {rank:.2f}; "
                f"over the {learned.sum()} that learn: {rank_learned:.2f}",
                f"Gaussian process with the infinite-width kernel: test accuracy {percent(computed['gp_test_acc'])}"]
    for value, colour in ((widths[exact.argmin()], "C0"), (trained[errors.argmin()], "k")):
        left.axvline(value, color=colour, alpha=0.3, linewidth=4)
    axes_over_width(left, {p.settings.width for p in points}, UNIT)
    left.grid(False)
    left.set(yscale="log", ylim=(exact.min() / 2, exact[0] * 20),
             ylabel="mean squared distance of the kernel from infinite width")
    left.minorticks_off()
    right.set(ylabel=f"test error, % ({metric} epoch)", ylim=(least - 2, least + 14))
    handles = [h for ax in (left, right) for h in zip(*ax.get_legend_handles_labels())]
    left.legend(*zip(*handles), fontsize=8, loc="upper center")
    figure.suptitle(f"Figure 8b. {subject(points)}, {points[0].settings.budget:,} weights; rank correlation "
                    f"{rank:.2f} ({rank_learned:.2f} of the {learned.sum()} that learn)\n"
                    f"{title(points, metric, about=FIGURE_8, bars=False)}, bars: deviation over seeds\nkernel: "
                    f"{computed['pairs']:,} pairs, bars: standard error over pairs (theory), deviation over networks "
                    "(measured)", fontsize=9)
    return figure, summary


# ---------------------------------------------------------------------------------------------- the best width


def best_of(widths, errors, rng, resamples=10_000):
    """(the width of least mean error, (low, high), [widths not distinguishable from it]) from the errors of several
    seeds at each width, a list of arrays.

    low, high: hold 95 % of the best widths when the seeds of each width are drawn again with replacement. Not
    distinguishable: the difference of means has a p value above 5 % in Welch's t test.
    """
    from scipy.stats import ttest_ind

    means = np.array([rng.choice(e, (resamples, len(e))).mean(1) for e in errors])  # (widths, resamples)
    best = int(np.argmin([e.mean() for e in errors]))
    found, outside = np.sort(np.take(widths, means.argmin(0))), int(0.025 * resamples)
    alike = [n for n, e in zip(widths, errors)
             if e is errors[best] or not ttest_ind(e, errors[best], equal_var=False).pvalue < 0.05]
    return widths[best], (int(found[outside]), int(found[-1 - outside])), alike


def in_hindsight(values):
    """The constant that is nearest to all of these on a logarithmic scale, by the mean distance"""
    return math.exp(np.median(np.log(values)))


def optimum(points, metric, computed):
    """Predicted over measured best width, above error over width for each number of weights."""
    from scipy.stats import spearmanr

    sides = sorted({b["side"] for b in computed["budgets"]}, reverse=True)
    figure, axes = panels([["exact"] * len(sides) + ["formula"] * len(sides), sum(([side] * 2 for side in sides), [])], (11, 9),
                          height_ratios=(1.2, 1))
    found = []  # (what was computed for a budget, the best width, its interval)
    summary, rng = [], np.random.default_rng(0)
    bases = sorted({b["base_width"] for b in computed["budgets"]})
    for b in computed["budgets"]:
        line = sorted((p for p in points if (p.settings.side, p.settings.base_width) == (b["side"], b["base_width"])),
                      key=lambda p: p.settings.width)
        if not all(p.finished for p in line):
            continue
        errors = [100 - 100 * np.array(p.values(f"{metric}_test_acc")) for p in line]
        means, color = np.array([e.mean() for e in errors]), f"C{bases.index(b['base_width'])}"
        best, interval, alike = best_of(b["widths"], errors, rng)
        found.append((b, best, interval))
        weights = line[0].settings.budget
        rank = spearmanr(b["distances"], means).statistic
        summary.append(f"{b['side']} x {b['side']}, {weights:,} weights: best width {best} ({means.min():.2f} % error; 95 % "
                       f"interval {interval[0]} to {interval[1]}, not distinguishable {alike[0]} to {alike[-1]}); "
                       f"predicted {b['exact']} ({b['interval'][0]} to {b['interval'][1]}), by the series "
                       f"{b['series']}, by Eq. 4 {b['formula']}; rank correlation of distance and error over "
                       f"{len(means)} widths {rank:.2f}")
        ax = axes[b["side"]]
        ax.plot(b["widths"], means, f"{color}o-", markersize=3, label=f"{weights:,}")
        ax.plot(b["exact"], np.interp(np.log(b["exact"]), np.log(b["widths"]), means), f"{color}*", markersize=13,
                markeredgecolor="k")
        for name in ("exact", "formula"):
            predicted = b[name]
            axes[name].errorbar(best, predicted, xerr=np.abs(np.subtract(interval, best))[:, None],
                                yerr=np.abs(np.subtract(b["interval"], predicted))[:, None] if name == "exact" else None,
                                fmt=f"{color}{'os^'[sides.index(b['side'])]}", capsize=2)
    measured = np.array([best for _, best, _ in found])
    ratio = in_hindsight([best / b["base_width"] for b, best, _ in found])
    guesses = {"exact theory": [b["exact"] for b, *_ in found], "the series": [b["series"] for b, *_ in found],
               "Eq. 4": [b["formula"] for b, *_ in found],
               f"a fixed connectivity (in hindsight, {100 / ratio:.2g} %)": [b["base_width"] * ratio for b, *_ in found],
               f"a fixed width (in hindsight, {in_hindsight(measured):.0f})": [in_hindsight(measured)] * len(found)}
    words = {}
    for name, guess in guesses.items():
        off = np.log2(np.array(guess) / measured)
        rank = spearmanr(guess, measured).statistic if len(set(guess)) > 1 < len(measured) else math.nan
        words[name] = f"off by a factor of {2 ** abs(off).mean():.2f}, rank correlation {rank:.2f}"
        summary.append(f"best width by {name}: {words[name]}; mean error of log2 width {abs(off).mean():.2f}, of these "
                       f"{off.mean():+.2f} in one direction")
    ticks = [2**k for k in range(1, 12, 2)]
    low, high = 0.7 * min(map(min, (b["widths"] for b, *_ in found))), 1.4 * max(max(b["widths"]) for b, *_ in found)
    for name, label in (("exact", "exact theory"), ("formula", "Eq. 4")):
        axes[name].plot([low, high], [low, high], "k:", linewidth=1)
        axes[name].set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="best width, measured",
                       ylabel=f"best width, by the {label}" if name == "exact" else f"best width, by {label}")
        axes[name].set_title(f"{label}: {words[label]}", fontsize=9)
        axes[name].set_xticks(ticks, ticks)
        axes[name].set_yticks(ticks, ticks)
        axes[name].minorticks_off()
        axes[name].grid(alpha=0.3)
    for side, marker in zip(sides, "os^"):
        axes["exact"].plot([], [], f"k{marker}", label=f"{side} x {side} pixels")
        axes_over_width(axes[side], [n for n in ticks if n <= max(b["widths"][-1] for b in computed["budgets"]
                                                                 if b["side"] == side)], UNIT)
        axes[side].set_title(f"{side} x {side} pixels; stars: predicted", fontsize=9)
        axes[side].legend(title="weights", fontsize=7)
    axes[sides[0]].set_ylabel(f"{metric} test error, %")
    axes["exact"].legend(fontsize=8)
    figure.suptitle(f"{subject(points)}: does the kernel tell the best width?\n"
                    f"{title(points, metric, about=(*FIGURE_8, 'side'), bars=False)}, bars: 95 % intervals", fontsize=10)
    return figure, summary


def optimum_lr(points, metric):
    """The chosen learning rate over width, a line for each number of weights."""
    chosen = tuned(points, metric, ("side", "base_width", "width"))
    sides, bases = (sorted({getattr(p.settings, name) for p in points}) for name in ("side", "base_width"))
    figure, axes = panels(len(sides), (11, 4.4), sharey=True)
    lines = {}
    for (side, base, width), rate in sorted(chosen.items()):
        lines.setdefault((side, base), {})[width] = rate
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
    words = title(points, metric, "held-out", about=(*FIGURE_8, "side"), bars=False)
    figure.suptitle(f"{subject(points)}: chosen learning rates\n{words}", fontsize=10)
    rows = [f"    {key}: ({', '.join(map(str, line.values()))})," for key, line in lines.items()]
    return figure, ["OPTIMUM_LR = {", *rows, "}"]
