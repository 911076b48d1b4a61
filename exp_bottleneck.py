"""Bottlenecks: the paper's other two ways to widen at the same number of weights (Figure 3)

    python exp_bottleneck.py --kind linear --base-width 8 --width 18       3 x 3 convolutions factorised to a low rank
    python exp_bottleneck.py --kind nonlinear --base-width 8 --width 18    narrow inside each block, wide between blocks
    python exp_bottleneck.py --sweep fig3 --jobs 2                         both families and the sparse one beside them
    python exp_bottleneck.py --plot fig3

Measured on CIFAR-10, base 8 (2 seeds, 10,000 images, 15 epochs, cosine), widths 8, 12, 18: linear 55.8, 57.5, 54.0 %,
non-linear 65.6 (plain), 64.6, 63.8 %, sparse 65.6, 66.6, 68.9 %.

Linear: each 3 x 3 convolution d_i -> d_o becomes a 3 x 3 one d_i -> d_b and a 1 x 1 one d_b -> d_o with nothing
between, a factorisation of rank d_b of the (9 d_i) x d_o matrix. The narrowest member has d_b = min(d_i, d_o), and
where d_o <= d_i it can compute what the plain network can; wider ones keep its number of weights by one common
fraction, d_b = max(1, round(f min(d_i, d_o))). Non-linear: the middle of each block has max(1, round(f d)) of its d
channels, f such that the plain network's number of weights stays. The protocol is that of exp_resnet_cifar.py, which
also trains the sparse and the plain networks: their runs are shared.
"""

import sys
from dataclasses import dataclass, replace

import command
import exp_resnet_cifar as resnet
import figures
import nn
import train
from exp_resnet_cifar import (
    CLASSES,
    axes_over_width,
    families,
    layer_sizes,
    lines,
    network,
    plot_line,
    title,
    weights_of,
)
from figures import over_seeds, subject
from train import setting

BASES, WIDTHS = (8, 12, 18), (8, 12, 18, 32, 40, 64)


@dataclass(frozen=True)
class Settings(resnet.Settings):
    """The paper's protocol unless changed."""

    width: int = setting(18, "channels of the first stage; the others have 2, 4 and 8 times as many", least=1)
    base_width: int = setting(8, "the family keeps the number of weights that it has at this width", least=1)
    bases: str = setting(",".join(map(str, BASES)), "base widths of a sweep", place=True)
    widths: str = setting(",".join(map(str, WIDTHS)), "widths of a sweep", place=True)
    kind: str = setting("sparse", "linear or nonlinear bottlenecks; sparse: a network of exp_resnet_cifar.py",
                        choices=("linear", "nonlinear", "sparse"))

    def check(self):
        super().check()
        if self.kind != "sparse" and (self.io_only or self.how != "largest-first"):
            raise train.UsageError(f"--io-only and --how are about masks, which {self.kind} bottlenecks have none of")
        if self.kind != "sparse":
            fraction(self)


# ---------------------------------------------------------------------------------------------- networks


def share(f, channels):
    """max(1, round(f channels)), halves rounded up"""
    return max(1, int(f * channels + 0.5))


def rank(f, channels_in, channels):
    """d_b of a factorised convolution"""
    return share(f, min(channels_in, channels))


def sizes(s, f):
    """Weights of each layer of the network with this fraction; linear: of both factors together."""
    if s.kind == "linear":
        return layer_sizes(s.width, CLASSES[s.data], size=lambda i, o: (9 * i + o) * rank(f, i, o))
    return layer_sizes(s.width, CLASSES[s.data], middle=lambda channels: share(f, channels))


def count(s, f):
    return sum(sizes(s, f))


def budget(s):
    """Weights of the narrowest member of the family: with full rank, or the plain network."""
    return count(replace(s, width=s.base_width), 1.0)


def fraction(s):
    """The f in (0, 1] whose network has the number of weights nearest to the budget; the larger f of two as near.

    Raises UsageError if one channel in each bottleneck is too much already.
    """
    want = budget(s)
    if s.width == s.base_width:
        return 1.0
    least = count(s, 0.0)
    if least > want:
        raise train.UsageError(f"{s.kind} bottlenecks of width {s.width} cannot keep the {want:,} weights of base "
                               f"{s.base_width}: with one channel in each they have {least:,}")
    # The count changes only where f channels + 1/2 is whole for the channels of some layer: bisect over these places.
    dims = {3, *(s.width << stage for stage in range(4))} if s.kind == "linear" else {s.width << i for i in range(4)}
    steps = sorted({0.0, 1.0, *((k - 0.5) / d + 1e-9 for d in dims for k in range(1, d + 1))})
    low, high = 0, len(steps) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(s, steps[middle]) <= want else (low, middle)
    return min(steps[high], steps[low], key=lambda f: abs(count(s, f) - want))


def factorised(f):
    """What makes a 3 x 3 convolution of rank d_b instead of a plain one."""

    def conv(channels_in, channels, stride=1):
        middle = rank(f, channels_in, channels)
        return nn.Sequential(nn.Conv2d(channels_in, middle, 3, stride, padding=1), nn.Conv2d(middle, channels, 1))

    return conv


def build(s, dataset):
    """The network with its weights drawn from the seed."""
    if s.kind == "sparse":
        return resnet.build(s, dataset)
    f = fraction(s)
    if s.kind == "linear":
        model = resnet.ResNet18(s.width, dataset.classes, conv=factorised(f))
    else:
        model = resnet.ResNet18(s.width, dataset.classes, middle=lambda channels: share(f, channels))
    nn.initialize(model, s.seed)
    return model


# ---------------------------------------------------------------------------------------------- figure


def fig3_runs(s):
    """For each base the plain network and, at all widths that can keep their weights, the three families."""
    runs = []
    for base, widths in families(s):
        runs += [replace(network(s, base, w), kind="sparse") for w in widths]
        runs += [replace(network(s, base, w), kind="linear") for w in widths]
        runs += [replace(network(s, base, w), kind="nonlinear") for w in widths if w > base]
    return over_seeds(s, [run for run in runs if run.kind == "sparse" or count(run, 0.0) <= budget(run)], 3)


def too_wide(s):
    """What the families leave out, with the numbers."""
    for base, widths in families(s):
        for kind in ("linear", "nonlinear"):
            for run in (replace(network(s, base, w), kind=kind) for w in widths):
                if count(run, 0.0) > budget(run):
                    yield (f"{kind} bottlenecks of width {run.width} are too wide for base {base}: with one channel in "
                           f"each they have {count(run, 0.0):,} weights, the base {budget(run):,}")


def fig3_draw(points, metric):
    """A panel for each kind of bottleneck: accuracy over width, the plain network dashed, the sparse family dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 5.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    by_kind = {kind: lines([p for p in points if p.settings.kind == kind])
               for kind in ("sparse", "linear", "nonlinear")}
    summary = []
    for ax, kind in zip(panels, ("linear", "nonlinear")):
        for i, base in enumerate(sorted({p.settings.base_width for p in points if p.finished})):
            sparse = by_kind["sparse"].get(base, [])
            plain = [p for p in sparse if p.settings.width == base]
            line = by_kind[kind].get(base, [])
            line = line if kind == "linear" else plain + line  # the narrowest non-linear one is the plain network
            entries = [(line, "o-", f"base {base}, {kind}: ", 1.0), (sparse, "x:", f"base {base}, sparse: ", 0.7)]
            for these, style, label, alpha in entries:
                if not these:
                    continue
                sentence = plot_line(ax, these, metric, style, label + weights_of(these), color=f"C{i}", alpha=alpha)
                if style == "o-" or kind == "linear":
                    summary.append(sentence)
            if plain:
                value = 100 * plain[0].mean(f"{metric}_test_acc")
                ax.axhline(value, color=f"C{i}", linestyle="--", linewidth=1,
                           label=f"base {base}, plain: {weights_of(plain)}")
        axes_over_width(ax, {p.settings.width for p in points if p.finished})
        ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))  # below: it would hide lines
        ax.set_title({"linear": "linear bottlenecks", "nonlinear": "non-linear bottlenecks"}[kind], fontsize=10)
    panels[0].set_ylabel(f"{metric} test accuracy, %")
    figure.suptitle(f"Figure 3. ResNet-18, {subject(points)}\n{title(points, metric)}", fontsize=9)
    return figure, summary


EXPERIMENT = train.Experiment(
    name=resnet.EXPERIMENT.name,  # so that the sparse and plain networks are the runs of exp_resnet_cifar.py
    script="exp_bottleneck.py",
    description=__doc__,
    settings=Settings,
    load=resnet.load,
    build=build,
    optimizer=resnet.EXPERIMENT.optimizer,
    schedule=resnet.schedule,
    figures={"fig3": figures.Figure("accuracy over width of linear and non-linear bottlenecks, and of sparse networks",
                                    fig3_runs, fig3_draw, notes=lambda s: list(too_wide(s)))},
    figures_ignore=resnet.FIGURES_IGNORE,
    quick=dict(epochs=3, limit=1000, held_out=500, seeds=1, jobs=2, base_width=8, bases="8", widths="12"),
    quick_help="3 epochs of 1,000 images, tested on 500 others; without --width the figure fig3 at widths 8 and 12",
    quick_figure="fig3",
    test_batch=resnet.EXPERIMENT.test_batch,
)

if __name__ == "__main__":
    sys.exit(command.main(EXPERIMENT))
