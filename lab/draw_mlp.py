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
    shares,
    sparse_and_dense,
    starved,
    subject,
    title,
    told_shares,
)
from lab.intervals import contrast
from lab.run import percent

UNIT = "hidden units"
FIGURE_8 = ("limit", "held_out", "batch", "lr", "base_width", "last", "bias", "ntk", "pixelwise")  # what it is about


def width(points, metric):
    heading = f"{subject(points)}: wider at a fixed number of weights"
    figure, summary = accuracy_over_width(points, sparse_and_dense(points), metric, heading, unit=UNIT)
    found, remarks = shares(points, f"{metric}_test_acc")
    return figure, summary + remarks + [f"share of the dense improvement, base {base}: {told_shares(of_width)}"
                                        for base, of_width in found.items() if of_width]


def width_lr(points, metric):
    return learning_rates(points, metric, subject(points), "WIDTH_LR", ("width",))


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
            summary += dense_last(points, activation, f"{metric}_test_acc")
        ax.set_title(name + (f" (the paper's best: {stated[activation]})" if ours else ""), fontsize=10)
        ax.set_xticks(range(len(widths)), widths)
        ax.set_yticks(range(len(connectivities)), connectivities)
        ax.set_xlabel("width")
    axes[0].set_ylabel("connectivity of the last layer")
    figure.colorbar(image, ax=axes, label="test accuracy, %", extend="min")
    words = title(points, metric, about=("last", "activation"), bars=False)
    figure.suptitle(f"Figure 5. {subject(points)}, {s.budget:,} weights: {words}", fontsize=10)
    return figure, summary


def dense_last(points, activation, quantity):
    """A line of text: what a sparser last layer does, on average over the widths at which a dense one takes no more
    than half of all weights.
    """
    those = [p for p in points if p.settings.activation == activation and p.finished]
    accuracy = {(p.settings.width, p.settings.last): p.mean(quantity) for p in those}
    widths = [p.settings.width for p in those if p.settings.last == 1 and 2 * p.settings.kept[1] <= p.settings.budget]
    told = []
    for last in sorted({p.settings.last for p in those} - {1.0}):
        change = [accuracy[width, last] - accuracy[width, 1.0] for width in widths if (width, last) in accuracy]
        if len(change) > 1:
            value, half = contrast((100, change))
            told.append(f"{value:+.2f} ± {half:.2f} at {last:g} ({len(change)} widths)")
    return ["  points above a dense last layer where that takes at most half of the weights, with 95 % intervals over "
            "widths: " + ", ".join(told)] if told else []


def fig8_lr(points, metric):
    return learning_rates(points, metric, f"Figure 8a. {subject(points)}", "FIG8_LR", ("dense", "width"), FIGURE_8)


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
