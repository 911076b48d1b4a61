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
channels, f such that the number of weights is the nearest to the plain network's. The stem counts as a convolution, so
its rank is at most 3, and 1 from width 12 on at base 8. Protocol, sparse and plain networks are those of
exp_resnet_cifar.py: their runs are shared.
"""

import functools
import sys
from dataclasses import dataclass, replace

import exp_resnet_cifar as resnet
import lab
import nn
from exp_resnet_cifar import CLASSES, ResNet18, at, families, fit, load
from lab import draw_resnet as draw
from lab import setting

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings(resnet.Settings):
    """The paper's protocol unless changed."""

    width: int = setting(18, "channels of the first stage; the others have 2, 4 and 8 times as many", least=1)
    base_width: int = setting(8, "the family keeps the number of weights that it has at this width", least=1)
    bases: str = setting("8,12,18", "base widths of a sweep", place=True)
    widths: str = setting("8,12,18,32,40,64", "widths of a sweep", place=True)
    kind: str = setting("sparse", "linear or nonlinear bottlenecks; sparse: a network of exp_resnet_cifar.py",
                        choices=("linear", "nonlinear", "sparse"))

    def check(self):
        super().check()
        if self.kind != "sparse":
            if self.io_only or self.how != "largest-first":
                raise lab.UsageError(f"--io-only and --how are about masks, which {self.kind} bottlenecks have none of")
            fraction(self)


# ---------------------------------------------------------------------------------------------- networks


def share(f, channels):
    """max(1, round(f channels)), halves rounded up"""
    return max(1, int(f * channels + 0.5))


def factorised(f):
    """What makes a 3 x 3 convolution of rank d_b instead of a plain one."""

    def conv(channels_in, channels, stride=1):
        rank = share(f, min(channels_in, channels))
        return nn.Sequential(nn.Conv2d(channels_in, rank, 3, stride, padding=1), nn.Conv2d(rank, channels, 1))

    return conv


def network(kind, width, f, classes):
    """The bottleneck network of this fraction."""
    if kind == "linear":
        return ResNet18(width, classes, conv=factorised(f))
    return ResNet18(width, classes, middle=lambda channels: share(f, channels))


@functools.cache
def count(kind, width, f, classes):
    """Weights of the network of this fraction."""
    with nn.skip_init():
        return nn.weight_count(network(kind, width, f, classes))


def bounds(s):
    """(budget: weights of the family's narrowest member, weights with one channel in each bottleneck)"""
    classes = CLASSES[s.data]
    return count(s.kind, s.base_width, 1.0, classes), count(s.kind, s.width, 0.0, classes)


def fraction(s):
    """The f in (0, 1] whose network has the number of weights nearest to the budget; the larger f of two as near.

    Raises UsageError if one channel in each bottleneck is too much already.
    """
    budget, least = bounds(s)
    if s.width == s.base_width:
        return 1.0
    if least > budget:
        raise lab.UsageError(f"{s.kind} bottlenecks of width {s.width} cannot keep the {budget:,} weights of base "
                             f"{s.base_width}: with one channel in each they have {least:,}")

    def error(f):
        return count(s.kind, s.width, f, CLASSES[s.data]) - budget

    # The count changes only where f channels + 1/2 is whole for the channels of some layer: bisect over these places.
    dims = {s.width << stage for stage in range(4)} | ({3} if s.kind == "linear" else set())
    steps = sorted({0.0, 1.0, *((k - 0.5) / d + 1e-9 for d in dims for k in range(1, d + 1))})
    low, high = 0, len(steps) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error(steps[middle]) <= 0 else (low, middle)
    return min(steps[high], steps[low], key=lambda f: abs(error(f)))


def build(s, classes):
    """The network with its weights drawn from the seed."""
    if s.kind == "sparse":
        return resnet.build(s, classes)
    model = network(s.kind, s.width, fraction(s), classes)
    nn.initialize(model, s.seed)
    return model


def train(run):
    dataset = load(run.settings)
    fit(run, dataset, build(run.settings, dataset.classes))


# ---------------------------------------------------------------------------------------------- figure


def members(s):
    """The sparse family of each base and its bottlenecks; the narrowest non-linear one is the plain network."""
    return [replace(at(s, base, w), kind=kind) for base, widths in families(s)
            for kind in ("sparse", "linear", "nonlinear") for w in widths if kind != "nonlinear" or w > base]


def too_wide(s):
    """Whether a bottleneck cannot keep the weights of its base."""
    budget, least = bounds(s) if s.kind != "sparse" else (0, 0)
    return least > budget


def fig3_runs(s):
    return lab.over_seeds(s, [run for run in members(s) if not too_wide(run)], 3)


def notes(s):
    """What the families leave out, with the numbers."""
    for run in filter(too_wide, members(s)):
        budget, least = bounds(run)
        yield (f"{run.kind} bottlenecks of width {run.width} are too wide for base {run.base_width}: with one channel "
               f"in each they have {least:,} weights, the base {budget:,}")


EXPERIMENT = lab.Experiment(
    resnet.EXPERIMENT.name,  # so that the sparse and plain networks are the runs of exp_resnet_cifar.py
    __file__, __doc__, Settings, load, train,
    {"fig3": lab.Figure("accuracy over width of linear and non-linear bottlenecks, and of sparse networks", fig3_runs,
                        draw.fig3, notes=notes)},
    quick=dict(epochs=3, limit=1000, held_out=500, seeds=1, jobs=2, base_width=8, bases="8", widths="12"),
    quick_help="3 epochs of 1,000 images, tested on 500 others; without --width the figure fig3 at widths 8 and 12",
    quick_figure="fig3",
    figures_choose=resnet.EXPERIMENT.figures_choose,
)

if __name__ == "__main__":
    sys.exit(lab.main(EXPERIMENT))
