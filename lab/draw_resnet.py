"""What exp_resnet_cifar.py, exp_bottleneck.py and exp_resnet_imagenet.py draw."""

import numpy as np

from lab.figures import (
    TITLES,
    accuracy_over_width,
    axes_over_width,
    describe,
    difference,
    families,
    gains,
    learning_rates,
    one_rate_and_tuned,
    panels,
    plot_lines,
    shares,
    sparse_and_dense,
    subject,
    title,
    told_shares,
    weights_of,
    widths_of,
)
from lab.settings import UsageError


BARS = "\nbars: 95 % intervals"


def heading(figure, points):
    return f"{figure}. ResNet-18, {subject(points)}"


def fig1(points, metric):
    """Sparse networks at a base's weights beside dense networks of the same width."""
    return accuracy_over_width(points, sparse_and_dense(points), metric, heading("Figure 1", points))


def by_base(points):
    """A line for each base."""
    return [(line, f"C{i}o-", f"base {base}: {weights_of(line)}")
            for i, (base, line) in enumerate(families(points).items())]


def fig6(points, metric):
    return accuracy_over_width(points, by_base(points), metric, heading("Figure 6", points))


def fig6_lr(points, metric):
    return learning_rates(points, metric, heading("Figure 6", points), "FIG6_LR", ("width",))


def fig6_tuned(points, metric):
    return one_rate_and_tuned(points, metric, heading("Figure 6", points))


def fig14(points, metric):
    return accuracy_over_width(points, by_base(points), metric, heading("Figure 14", points), quantity="train_acc")


def fig12(points, metric):
    """Figure 6 over the connectivity, from the narrowest network on."""
    figure, ax = panels()
    summary = plot_lines(ax, by_base(points), f"{metric}_test_acc", x=lambda p: p.mean("connectivity"))
    least = min(p.mean("connectivity") for p in points if p.finished)
    ticks = [tick for tick in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001) if tick > least / 1.5]
    ax.set(xscale="log", xlabel="connectivity (kept weights / all weights of the width)")
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.grid(alpha=0.3)
    describe(ax, f"{metric} test accuracy, %", f"{heading('Figure 12', points)}\n{title(points, metric)}")
    return figure, summary


def fig7(points, metric):
    """(sparse - base) / (dense - base) over width: the part of the dense improvement that width alone gives."""
    figure, ax = panels()
    found, summary = shares(points, f"{metric}_test_acc")
    every = [(width, *part) for of_width in found.values() for width, part in of_width.items()]
    if not every:
        raise UsageError("; ".join(summary) or "fig7 needs, for some width above a base, the runs of that width "
                         "sparse and dense and of the base; --sweep fig7 trains them")
    widths, parts, halves = zip(*every)
    for i, (base, line) in enumerate(families(points).items()):
        if not found[base]:
            continue
        ax.errorbar(list(found[base]), *zip(*found[base].values()), fmt=f"C{i}o-", capsize=3,
                    label=f"base {base}: {weights_of(line)}")
        best = max(line, key=lambda p: p.mean(f"{metric}_train_acc")).settings.width
        if best in found[base]:
            ax.plot(best, found[base][best][0], f"C{i}*", markersize=15)
        summary.append(f"base {base}: {told_shares(found[base])}; training accuracy is largest at width {best}")
    ax.axhline(1, color="gray", linewidth=1)
    ax.set_ylim(min(0, *parts) - 0.15, max(1, *parts) + 0.15)  # bars may be far longer
    axes_over_width(ax, set(widths))
    describe(ax, "part of the dense improvement", f"{heading('Figure 7', points)}; stars: largest training accuracy\n"
             f"{title(points, metric, bars=False)}{BARS if np.isfinite(halves).any() else ''}")
    return figure, summary


def fig9(points, metric):
    """Masks of whole kernels beside masks of single weights; both start at the dense network of the base."""
    single = families([p for p in points if not p.settings.io_only])
    whole = families([p for p in points if p.settings.io_only])
    lines = []
    for i, base in enumerate(sorted({*single, *whole})):
        line = single.get(base, [])
        other = [p for p in line if p.settings.width == base] + whole.get(base, [])
        for these, style, kind in ((line, "o-", "single weights"), (other, "s--", "whole kernels")):
            if these:
                lines.append((these, f"C{i}{style}", f"base {base}, masks of {kind}, {weights_of(these)}"))
    figure, summary = accuracy_over_width(points, lines, metric, heading("Figure 9", points), about=("io_only",))
    for base, line in whole.items():
        for p in line:
            for q in single.get(base, []):
                if p.settings.width == q.settings.width:
                    summary.append(f"base {base}, width {p.settings.width}: whole kernels "
                                   f"{difference(p, q, f'{metric}_test_acc')} points from single weights")
    return figure, summary


def fig10(points, metric, computed):
    """Kept weights and connectivity of every layer, for the widths of the narrowest base."""
    figure, (left, right) = panels(2, (11, 4.4))
    first, io_only = points[0].settings, points[-1].settings.io_only
    summary = []
    for i, network in enumerate(computed):
        kept, sizes, width = np.array(network["kept"]), np.array(network["sizes"]), network["width"]
        label = f"width {width}" + (" (dense)" if kept.sum() == sizes.sum() else "")
        left.plot(kept, f"C{i}o-", markersize=3, label=label)
        right.plot(kept / sizes, f"C{i}o-", markersize=3, label=label)
        summary.append(f"width {width}: {kept.sum():,} of {sizes.sum():,} weights, at most {kept.max():,} a layer; "
                       f"{(kept < sizes).sum()} of {len(sizes)} layers are cut")
    names = [name.removesuffix(".0") for name in computed[0]["layers"]]
    for ax, label in ((left, "kept weights"), (right, "connectivity (kept / all)")):
        ax.set(yscale="log", ylabel=label)
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.suptitle(f"Figure 10. ResNet-18, {TITLES[first.data]}: weights by layer at {sum(computed[0]['kept']):,} "
                    f"weights (base {first.base_width}), {first.how}" + (", whole kernels" if io_only else ""),
                    fontsize=10)
    return figure, summary


# ---------------------------------------------------------------------------------------------- bottlenecks, ImageNet


def fig3(points, metric):
    """A panel for each kind of bottleneck: accuracy over width, the plain network dashed, the sparse family dotted."""
    figure, axes = panels(2, (13.5, 5.4), sharey=True)
    by_kind = {kind: families([p for p in points if p.settings.kind == kind])
               for kind in ("sparse", "linear", "nonlinear")}
    quantity, summary = f"{metric}_test_acc", []
    for ax, kind in zip(axes, ("linear", "nonlinear")):
        lines, sparse_lines, plain = [], [], {}
        for i, base in enumerate(sorted({base for found in by_kind.values() for base in found})):
            sparse, line = by_kind["sparse"].get(base, []), by_kind[kind].get(base, [])
            plain[base] = [p for p in sparse if p.settings.width == base]
            line = plain[base] + line if kind == "nonlinear" else line  # the plain network is the narrowest of these
            if line:
                lines.append((line, f"C{i}o-", f"base {base}, {kind}: {weights_of(line)}"))
            if sparse:
                sparse_lines.append((sparse, f"C{i}x:", f"base {base}, sparse: {weights_of(sparse)}"))
        summary += plot_lines(ax, lines, quantity)
        of_sparse = plot_lines(ax, sparse_lines, quantity)  # the same in both panels
        for i, (base, these) in enumerate(plain.items()):
            if these:
                if kind == "linear":
                    summary += gains(by_kind[kind].get(base, []), quantity, these[0],
                                     f"the plain network of width {base}, of linear bottlenecks")
                ax.axhline(100 * these[0].mean(quantity), color=f"C{i}", linestyle="--", linewidth=1,
                           label=f"base {base}, plain: {weights_of(these)}")
        axes_over_width(ax, widths_of(points))
        ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))  # below: it would hide lines
        ax.set_title({"linear": "linear bottlenecks", "nonlinear": "non-linear bottlenecks"}[kind], fontsize=10)
    axes[0].set_ylabel(f"{metric} test accuracy, %")
    figure.suptitle(f"{heading('Figure 3', points)}\n{title(points, metric)}", fontsize=9)
    return figure, summary + of_sparse


def table1(points, metric, sparse, dense):
    """Figure 13: sparse and dense networks over width, here and in the paper, {width: per cent} each."""
    figure, (left, right) = panels(2, (11, 4.4), sharey=points[0].settings.papers)
    summary = plot_lines(left, sparse_and_dense(points), f"{metric}_test_acc")
    axes_over_width(left, widths_of(points))
    left.set_title("here", fontsize=10)
    left.set_ylabel(f"{metric} test accuracy, %")
    for values, style, label in ((sparse, "C0o-", "sparse: 11.7 million weights"), (dense, "C7s--", "dense")):
        right.plot(list(values), list(values.values()), style, label=label)
        summary.append(f"the paper, {label}: " + ", ".join(f"{v:.2f} % at {w}" for w, v in values.items()))
    axes_over_width(right, dense)
    right.set_title("the paper's Table 1: ImageNet, 150 epochs", fontsize=10)
    for ax in (left, right):
        ax.legend(fontsize=8)
    figure.suptitle(f"{heading('Table 1 and Figure 13', points)}\n{title(points, metric)}", fontsize=9)
    return figure, summary


def fig7_beside_table1(points, metric, sparse, dense):
    """Figure 7, and the same from the paper's Table 1."""
    figure, summary = fig7(points, metric)
    base, *widths = dense
    parts = {w: (sparse[w] - dense[base]) / (dense[w] - dense[base]) for w in widths}
    label = f"the paper's Table 1, base {base}"
    summary.append(f"{label}: " + ", ".join(f"{100 * v:.0f} % at {w}" for w, v in parts.items()))
    if points[0].settings.papers:
        ax, = figure.axes
        ax.plot(list(parts), list(parts.values()), "C7x--", label=label)
        ax.set_ylim(min(ax.get_ylim()[0], *parts.values()), max(ax.get_ylim()[1], max(parts.values()) + 0.15))
        ax.legend(fontsize=8)
    return figure, summary
