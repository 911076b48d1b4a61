"""ResNet-18 on CIFAR-10, CIFAR-100 and SVHN: wider at the same number of weights (Figures 1, 6, 7, 9 to 12, 14)

    python exp_resnet_cifar.py --width 128                          the weights of width 64 spread over width 128
    python exp_resnet_cifar.py --sweep fig6 --jobs 2                Figures 6, 11, 12, 14: every base and width
    python exp_resnet_cifar.py --sweep fig6 --bases 8 --widths 8,12,18,32 --epochs 15 --limit 10000    a small version
    python exp_resnet_cifar.py --plot fig6                          a figure and its table from what is done
    python exp_resnet_cifar.py --plot fig10                         kept weights by layer: needs no training

Measured on CIFAR-10, 175,192 weights: 65.6 % at width 8, 66.6 at 12, 68.9 at 18, 68.2 at 32 (2 seeds, 10,000 images,
15 epochs, cosine). Protocol (Section 3 of the paper): SGD, momentum 0.9, weight decay 5e-4, learning rate 0.1 times 0.1
at epochs 50, 120 and 200 of 300 (moved in proportion with --epochs), batch 128, random crops with padding 4 and flips,
3 seeds.
"""

import math
import sys
from dataclasses import dataclass, fields, replace

import numpy as np

import command
import data
import figures
import nn
import train
from figures import over_seeds, shown, subject
from train import setting

EPOCHS, MILESTONES = 300, (50, 120, 200)
BASES, WIDTHS = (8, 12, 18, 40, 64), (8, 12, 18, 32, 40, 64, 90, 128)
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "synthetic": 10}


@dataclass(frozen=True)
class Network(train.Settings):
    """A ResNet-18 of any width at the weights of a base, and its optimiser."""

    width: int = setting(64, "channels of the first stage; the others have 2, 4 and 8 times as many", least=1)
    base_width: int = setting(64, "the network keeps as many weights as a dense one of this width", least=1)
    dense: bool = setting(False, "keep all weights of this width instead")
    how: str = setting("largest-first", "which layers lose weights", choices=("largest-first", "proportional"))
    io_only: bool = setting(False, "remove whole kernels, never part of one (Figure 9)")
    schedule: str = setting("steps", "of the learning rate: steps (times 0.1 at 1/6, 2/5 and 2/3 of the epochs), "
                            "cosine (to 0 at the end) or constant", choices=("steps", "cosine", "constant"))
    momentum: float = setting(0.9, "of SGD", least=0)
    weight_decay: float = setting(5e-4, "of SGD", least=0)
    precision: str = setting("tf32", "on a GPU fp32 without tensor cores, tf32, or images in bf16 or fp16; a CPU has "
                             "float32 alone",
                             choices=("fp32", "tf32", "bf16", "fp16"))
    deterministic: bool = setting(True, "on a GPU, the same bits each time; else cuDNN may add up in any order",
                                  place=True)
    tune: bool = setting(False, "on a GPU, time cuDNN's plans for each convolution and take the fastest: the choice, "
                         "and so rounding, may differ from start to start", place=True)
    bases: str = setting(",".join(map(str, BASES)), "base widths of a sweep", place=True)
    widths: str = setting(",".join(map(str, WIDTHS)), "widths of a sweep", place=True)

    ALWAYS_NAMED = ("width", "base_width", "seed")
    ENGINE = ("precision", "deterministic", "tune")

    def __post_init__(self):
        if self.dense:  # one name for one network: the dense one of a width is its own base
            object.__setattr__(self, "base_width", self.width)
            object.__setattr__(self, "dense", False)

    def check(self):
        super().check()
        if self.base_width > self.width:
            raise train.UsageError(f"width {self.width} cannot keep the weights of the wider base {self.base_width}; "
                                   "choose a --width of at least the --base-width, or --dense")
        for name in ("bases", "widths"):
            numbers(name, getattr(self, name))


@dataclass(frozen=True)
class Settings(Network):
    """The paper's protocol unless changed."""

    data: str = setting("cifar10", "data set", choices=tuple(CLASSES))
    batch: int = setting(128, "examples a step", least=2)
    padding: int = setting(4, "black pixels on each side of the images that random crops are taken from", least=0)
    flip: str = setting("auto", "mirror training images at random; auto: unless they are digits",
                        choices=("auto", "yes", "no"))

    @property
    def flips(self):
        return self.flip == "yes" or self.flip == "auto" and self.data.startswith("cifar")


def numbers(name, text):
    """"8,12" -> (8, 12)"""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise train.UsageError(f"--{name} is a list of widths such as 8,12,18, not {text!r}")
    return tuple(sorted({int(word) for word in words}))


# ---------------------------------------------------------------------------------------------- data and model


def load(s):
    if s.data == "synthetic":
        dataset = data.synthetic(s.data_dir, side=32, channels=3)
    else:
        dataset = data.load(s.data, s.data_dir)
    return s.part_of(dataset).augmented(s.padding, s.flips)


def conv3x3(channels_in, channels, stride=1):
    return nn.Conv2d(channels_in, channels, 3, stride, padding=1)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); the shortcut is a 1 x 1 convolution where shapes change.

    middle: channels between the two convolutions; conv: what makes them.
    """

    def __init__(self, channels_in, channels, stride, middle, conv):
        self.conv1 = conv(channels_in, middle, stride)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv(middle, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = []
        if stride != 1 or channels_in != channels:
            self.shortcut = [nn.Conv2d(channels_in, channels, 1, stride), nn.BatchNorm2d(channels)]

    def forward(self, x):
        y = self.bn1(self.conv1(x), relu=True)
        for module in self.shortcut:
            x = module(x)
        return self.bn2(self.conv2(y), add=x, relu=True)


class ResNet18(nn.Module):
    """ResNet-18 for images of 32 x 32 (He et al. 2016): a 3 x 3 convolution, four stages of two basic blocks with
    width, 2, 4 and 8 width channels, the mean over each image, a linear classifier.

    Its parameters come in forward order. All weights are there: sparsify takes them away. The bottlenecks of Figure 3
    replace conv, which makes the 3 x 3 convolutions, or middle, the channels inside a block of so many channels.
    """

    def __init__(self, width, num_classes=10, conv=conv3x3, middle=lambda channels: channels):
        self.conv = conv(3, width)
        self.bn = nn.BatchNorm2d(width)
        self.blocks, channels_in = [], width
        for stage in range(4):
            channels = width << stage
            for stride in (1 if stage == 0 else 2, 1):
                self.blocks.append(BasicBlock(channels_in, channels, stride, middle(channels), conv))
                channels_in = channels
        self.classifier = nn.Linear(channels_in, num_classes)

    def stem(self, x):
        return self.bn(self.conv(x), relu=True)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(nn.global_avg_pool(x))


def layer_sizes(width, num_classes, size=lambda channels_in, channels: 9 * channels_in * channels,
                middle=lambda channels: channels):
    """Weights of each counted layer of ResNet18(width, num_classes), in the order of nn.layers.

    size: weights of a 3 x 3 convolution, or of what takes its place; middle: as in ResNet18.
    """
    sizes, channels_in = [size(3, width)], width
    for stage in range(4):
        channels = width << stage
        for first in (True, False):
            sizes += [size(channels_in, middle(channels)), size(middle(channels), channels)]
            sizes += [channels_in * channels] if first and stage else []
            channels_in = channels
    return [*sizes, channels_in * num_classes]


def budget(s):
    """Weights that the network keeps."""
    return sum(layer_sizes(s.base_width, CLASSES[s.data]))


def build(s, dataset):
    """ResNet-18 with its masks and weights drawn from the seed."""
    model = ResNet18(s.width, dataset.classes)
    nn.sparsify(model, budget(s), s.seed, how=s.how, io_only=s.io_only)
    return model


def schedule(s):
    """The learning rate of an epoch; the paper's milestones move with the number of epochs, an epoch apart at least."""
    milestones = [max(i, round(m * s.epochs / EPOCHS)) for i, m in enumerate(MILESTONES, start=1)]
    return {"steps": nn.MultiStepLR(s.lr, milestones),
            "cosine": nn.CosineLR(s.lr, s.epochs), "constant": nn.ConstantLR(s.lr)}[s.schedule]


# ---------------------------------------------------------------------------------------------- figures


def network(s, base, width):
    """The settings of width `width` at the weights of width `base`; dense, without masks, where they are the same."""
    return replace(s, base_width=base, width=width, io_only=s.io_only and width > base)


def families(s):
    """[(base, widths)] of a sweep"""
    bases, widths = numbers("bases", s.bases), numbers("widths", s.widths)
    if max(widths) < min(bases):
        raise train.UsageError(f"none of the --widths {s.widths} is as wide as a base of --bases {s.bases}")
    return [(base, sorted({base, *(w for w in widths if w > base)})) for base in bases]


def fig6_runs(s):
    return over_seeds(s, [network(s, base, w) for base, widths in families(s) for w in widths], 3)


def sparse_and_dense(s):
    """The sparse families and the dense networks of all their widths."""
    runs = [network(s, base, w) for base, widths in families(s) for w in widths]
    runs += [network(s, w, w) for _, widths in families(s) for w in widths]
    return list(dict.fromkeys(runs))


def fig7_runs(s):
    return over_seeds(s, sparse_and_dense(s), 3)


def fig9_runs(s):
    return over_seeds(s, [replace(network(s, base, w), io_only=io_only and w > base)
                          for io_only in (False, True) for base, widths in families(s) for w in widths
                          if w > base or not io_only], 3)


def fig10_runs(s):
    base, widths = families(s)[0]
    return [network(s, base, w) for w in widths]


STATED = {  # by an independent run of the paper's released code: (data set, base, width)
    ("cifar100", 18, 18): 70.13, ("cifar100", 18, 64): 74.27, ("svhn", 8, 8): 95.87, ("svhn", 8, 18): 96.22,
    ("svhn", 8, 64): 95.93, ("svhn", 18, 18): 96.42,
}


def paper(s):
    value = STATED.get((s.data, s.base_width, s.width))
    return f"{value:.2f} % *" if value and not departures(s, ()) and not s.limit and s.epochs == EPOCHS else None


def stated_by(s):
    """What the table's asterisk means."""
    return ["*: an independent run of the paper's released code"] if s.data in {name for name, *_ in STATED} else []


def departures(s, shown):
    """The settings that differ from the paper's protocol, without those that figures are about or show otherwise."""
    known = {"data", "seed", "width", "base_width", "kind", "epochs", "limit", "held_out", "schedule", *shown}
    return [f"{f.name.replace('_', ' ')} {getattr(s, f.name)}" for f in fields(s)
            if not f.metadata["place"] and f.name not in known and getattr(s, f.name) != f.default]


def title(points, metric, what="test", about=(), bars=True):
    """The lines of a figure's title below the first: what its numbers are and how far its runs are from the paper's.

    about: settings that the figure is about. bars: whether it shows the deviation over seeds, if there are several.
    """
    s, protocol = points[-1].settings, type(points[-1].settings)  # whose defaults are the paper's
    scale = f" (the paper: {protocol.epochs})" if s.epochs != protocol.epochs else ""
    scale += f", {s.schedule} learning rate" if s.schedule != protocol.schedule else ""
    scale += "".join(f", {words}" for words in departures(s, about))
    bars = bars and any(len(p.finished) > 1 for p in points)
    return shown(points, metric, what, scale) + ("\nbars: standard deviation over seeds" if bars else "")


def lines(points):
    """{base: its points that are done, by width}"""
    found = {}
    for p in sorted(points, key=lambda p: (p.settings.base_width, p.settings.width)):
        if p.finished:
            found.setdefault(p.settings.base_width, []).append(p)
    return found


def panel():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    return figure, figure.subplots()


def describe(ax, ylabel, heading):
    ax.set_ylabel(ylabel)
    ax.legend(fontsize=8)
    ax.set_title(heading, fontsize=9)


def plot_line(ax, line, metric, fmt, label, **style):
    """Test accuracy of points over their width, with deviations over seeds; returns "label: 65.55 % at 8, ..."."""
    widths, y = [p.settings.width for p in line], [100 * p.mean(f"{metric}_test_acc") for p in line]
    ax.errorbar(widths, y, [100 * p.std(f"{metric}_test_acc") for p in line], fmt=fmt, capsize=3, label=label, **style)
    return f"{label}: " + ", ".join(f"{value:.2f} % at {width}" for value, width in zip(y, widths))


def weights_of(line):
    """"175,192 weights", or from the fewest to the most"""
    weights = {p.finished[0]["weights"] for p in line}
    return " to ".join(f"{n:,}" for n in sorted({min(weights), max(weights)})) + " weights"


def axes_over_width(ax, widths):
    ax.set_xscale("log")
    ax.set_xticks(sorted(widths), sorted(widths), fontsize=8)
    ax.minorticks_off()
    ax.set_xlabel("width (channels of the first stage)")
    ax.grid(alpha=0.3)


def family_draw(points, metric, quantity="test_acc", over="width", name="Figure 6"):
    """A line for each base: accuracy over width or connectivity, with standard deviations over seeds."""
    figure, ax = panel()
    summary, what = [], {"test_acc": "test", "train_acc": "training"}[quantity]
    for i, (base, line) in enumerate(lines(points).items()):
        x = [p.settings.width if over == "width" else np.mean(p.values("connectivity")) for p in line]
        y = [100 * p.mean(f"{metric}_{quantity}") for p in line]
        error = [100 * p.std(f"{metric}_{quantity}") for p in line]
        label = f"base {base}: {weights_of(line)}"
        ax.errorbar(x, y, error, fmt="o-", capsize=3, color=f"C{i}", label=label)
        top = int(np.argmax(y))
        summary.append(f"{label}: {y[0]:.2f} % at width {line[0].settings.width}, best {y[top]:.2f} % "
                       f"at width {line[top].settings.width}")
    if over == "width":
        axes_over_width(ax, {p.settings.width for p in points if p.finished})
    else:
        ax.set(xscale="log", xlabel="connectivity (kept weights / all weights of the width)")
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
    describe(ax, f"{metric} {what} accuracy, %", f"{name}. ResNet-18, {subject(points)}\n{title(points, metric, what)}")
    return figure, summary


def fig12_draw(points, metric):
    return family_draw(points, metric, over="connectivity", name="Figure 12")


def fig14_draw(points, metric):
    return family_draw(points, metric, quantity="train_acc", name="Figure 14")


def plot_sparse_and_dense(ax, points, metric):
    """A line for each base's sparse networks, one for all dense ones; returns the sentence of each."""
    found = lines(points)
    dense = [p for line in found.values() for p in line if p.settings.width == p.settings.base_width]
    sparse = [line for line in found.values() if any(p.settings.width > p.settings.base_width for p in line)]
    summary = [plot_line(ax, line, metric, f"C{i}o-", f"sparse: {weights_of(line)} at every width")
               for i, line in enumerate(sparse)]
    if dense:
        summary.append(plot_line(ax, dense, metric, "C7s--", "dense: all weights of its width"))
    axes_over_width(ax, {p.settings.width for p in points if p.finished})
    return summary


def fig1_draw(points, metric):
    """Sparse networks at a base's weights beside dense networks of the same width."""
    figure, ax = panel()
    summary = plot_sparse_and_dense(ax, points, metric)
    describe(ax, f"{metric} test accuracy, %", f"Figure 1. ResNet-18, {subject(points)}\n{title(points, metric)}")
    return figure, summary


def fig7_draw(points, metric):
    """(sparse - base) / (dense - base) over width: the part of the dense improvement that width alone gives."""
    figure, ax = panel()
    found, summary, widths = lines(points), [], set()
    accuracy = {(base, p.settings.width): p.mean(f"{metric}_test_acc") for base, line in found.items() for p in line}
    for i, (base, line) in enumerate(found.items()):
        parts = {}
        for w in (p.settings.width for p in line if p.settings.width > base):
            gain = accuracy.get((w, w), math.nan) - accuracy.get((base, base), math.nan)
            if gain > 0.001:
                parts[w] = (accuracy[base, w] - accuracy[base, base]) / gain
            elif math.isfinite(gain):
                summary.append(f"base {base}: at width {w} the dense network gains {100 * gain:.2f} points, "
                               "too little to have parts")
        if not parts:
            continue
        ax.plot(list(parts), list(parts.values()), "o-", color=f"C{i}", label=f"base {base}: {weights_of(line)}")
        best = max(line, key=lambda p: p.mean(f"{metric}_train_acc")).settings.width
        if best in parts:
            ax.plot(best, parts[best], "*", color=f"C{i}", markersize=15)
        widths |= set(parts)
        summary.append(f"base {base}: " + ", ".join(f"{100 * v:.0f} % at {w}" for w, v in parts.items())
                       + f"; training accuracy is largest at width {best}")
    if not widths:
        raise train.UsageError("; ".join(summary) or "fig7 needs, for some width above a base, the runs of that width "
                               "sparse and dense and of the base; --sweep fig7 trains them")
    ax.axhline(1, color="gray", linewidth=1)
    axes_over_width(ax, widths)
    describe(ax, "part of the dense improvement",
             f"Figure 7. ResNet-18, {subject(points)}; stars: largest training accuracy\n"
             f"{title(points, metric, bars=False)}")
    return figure, summary


def fig9_draw(points, metric):
    """Masks of whole kernels beside masks of single weights."""
    figure, ax = panel()
    free = lines([p for p in points if not p.settings.io_only])
    whole = lines([p for p in points if p.settings.io_only])
    summary = []
    for i, base in enumerate(sorted({*free, *whole})):
        line = free.get(base, [])
        start = [p for p in line if p.settings.width == base]  # dense: the same with either mask
        rest = start + whole.get(base, [])
        for kind, style, these in (("single weights", "o-", line), ("whole kernels", "s--", rest)):
            if these:
                label = f"base {base}, masks of {kind}, {weights_of(these)}"
                summary.append(plot_line(ax, these, metric, style, label, color=f"C{i}"))
    axes_over_width(ax, {p.settings.width for p in points if p.finished})
    describe(ax, f"{metric} test accuracy, %",
             f"Figure 9. ResNet-18, {subject(points)}\n{title(points, metric, about=('io_only',))}")
    return figure, summary


def fig10_draw(points, metric):
    """Kept weights and connectivity of every layer, for the widths of the narrowest base."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = points[0].settings
    layers = nn.layers(ResNet18(1, CLASSES[first.data]))
    names = [name.removesuffix(".0") for name, _ in layers]
    kernels = [math.prod(layer.weight.shape[2:]) for _, layer in layers]
    summary = []
    for i, p in enumerate(points):
        sizes = layer_sizes(p.settings.width, CLASSES[first.data])
        kept = nn.allocate(sizes, budget(p.settings), first.how)
        kept = nn.whole_units(kept, kernels) if p.settings.io_only else kept
        label = f"width {p.settings.width}" + (" (dense)" if sum(sizes) == sum(kept) else "")
        left.plot(kept, "o-", color=f"C{i}", markersize=3, label=label)
        right.plot(np.divide(kept, sizes), "o-", color=f"C{i}", markersize=3, label=label)
        summary.append(f"width {p.settings.width}: {sum(kept):,} of {sum(sizes):,} weights, "
                       f"at most {max(kept):,} a layer; {np.less(kept, sizes).sum()} of {len(sizes)} layers are cut")
    for ax, label in ((left, "kept weights"), (right, "connectivity (kept / all)")):
        ax.set(yscale="log", ylabel=label)
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.suptitle(f"Figure 10. ResNet-18, {figures.TITLES[first.data]}: weights by layer at {budget(first):,} "
                    f"weights (base {first.base_width}), {first.how}"
                    + (", whole kernels" if points[-1].settings.io_only else ""), fontsize=10)
    return figure, summary


FIGURES_IGNORE = dict.fromkeys(("width", "base_width", "dense"), "--bases and --widths")

EXPERIMENT = train.Experiment(
    name="resnet_cifar",
    script="exp_resnet_cifar.py",
    description=__doc__,
    settings=Settings,
    load=load,
    build=build,
    optimizer=lambda s, params: nn.SGD(params, s.lr, s.momentum, s.weight_decay),
    schedule=schedule,
    figures={
        "fig1": figures.Figure("sparse and dense accuracy over width", fig7_runs, fig1_draw, paper, notes=stated_by),
        "fig6": figures.Figure("accuracy over width at each base's number of weights (with Figure 11's error bars)",
                               fig6_runs, family_draw, paper, notes=stated_by),
        "fig7": figures.Figure("part of the dense improvement that width alone gives", fig7_runs, fig7_draw, paper,
                               notes=stated_by),
        "fig9": figures.Figure("masks of whole kernels beside masks of single weights", fig9_runs, fig9_draw, paper,
                               notes=stated_by),
        "fig10": figures.Figure("kept weights by layer", fig10_runs, fig10_draw, trained=False),
        "fig12": figures.Figure("Figure 6 over connectivity", fig6_runs, fig12_draw, paper, notes=stated_by),
        "fig14": figures.Figure("training accuracy of Figure 6 (the mean over an epoch's augmented batches)", fig6_runs,
                                fig14_draw, quantity="train_acc"),
    },
    figures_ignore=FIGURES_IGNORE,
    quick=dict(epochs=6, limit=2000, held_out=1000, seeds=1, jobs=2, base_width=8, bases="8", widths="8,18"),
    quick_help="6 epochs of 2,000 images, tested on 1,000 others; without --width the figure fig6 at two widths",
    quick_figure="fig6",
    test_batch=128,  # as many as in training unless --batch says otherwise: memory is used again
)

if __name__ == "__main__":
    sys.exit(command.main(EXPERIMENT))
