"""ResNet-18 on ImageNet: wider at the same number of weights (Table 1, Figures 1, 7, 13)

    python exp_resnet_imagenet.py --prepare                       once: the copy with smallest side 256
    python exp_resnet_imagenet.py --data imagenet-256 --width 128            the weights of width 64 in width 128
    mpirun -n 8 python exp_resnet_imagenet.py --data imagenet-256 --width 128             every batch on 8 processes
    mpirun -n 9 python exp_resnet_imagenet.py --data imagenet-256 --sweep table1          one network a process
    python exp_resnet_imagenet.py --plot table1                   Table 1 and Figure 13 from what is done

ImageNet lies in data/imagenet: train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG with the devkit beside it.
Protocol (Section 3 of the paper): SGD, momentum 0.9, weight decay 1e-4, learning rate 0.1 with a cosine over 150
epochs, batch 256; random crops of 0.2 to 1 of the area and flips; tested on the centre 224 x 224 of the smallest side
256. --data synthetic generates photographs, for which smaller crops (--size 64) do.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import command
import exp_resnet_cifar as resnet
import figures
import nn
import photos
import train
from exp_resnet_cifar import axes_over_width, departures, layer_sizes, plot_sparse_and_dense, title
from figures import over_seeds, subject
from train import setting

WIDTHS = (64, 90, 128, 181, 256)
DENSE = dict(zip(WIDTHS, (68.03, 69.11, 70.22, 70.91, 71.89)))  # the paper's Table 1, per cent
SPARSE = dict(zip(WIDTHS, (68.03, 69.56, 70.02, 70.66, 70.53)))


@dataclass(frozen=True)
class Settings(resnet.Network):
    """The paper's protocol unless changed."""

    data: str = setting("imagenet", "data set", choices=photos.NAMES)
    batch: int = setting(256, "examples a step, of all processes together", least=2)
    epochs: int = setting(150, "passes over the training set", least=1)
    schedule: str = setting("cosine", "of the learning rate: cosine (to 0 at the end), steps (times 0.1 at 1/6, 2/5 "
                            "and 2/3 of the epochs) or constant", choices=("cosine", "steps", "constant"))
    weight_decay: float = setting(1e-4, "of SGD", least=0)
    size: int = setting(224, "height and width of the crops that the network sees", least=32)
    classes: int = setting(10, "of the synthetic photographs", least=1)
    images: int = setting(200, "synthetic photographs of each class to train on", least=1)
    bases: str = setting("64", "base widths of a sweep", place=True)
    widths: str = setting(",".join(map(str, WIDTHS)), "widths of a sweep", place=True)
    threads: int = setting(0, "that decode photographs, in each process (0: as many as it has cores)", least=0,
                           place=True)
    unreadable: float = setting(0.01, "share of the files that may be unreadable", least=0, place=True)

    def check(self):
        super().check()
        if self.data != "synthetic" and (self.classes, self.images) != (Settings.classes, Settings.images):
            raise train.UsageError("--classes and --images are about --data synthetic; --limit takes fewer photographs")

    @property
    def papers(self):
        """Whether this is what the paper trained."""
        return self.data.startswith("imagenet") and not (
            departures(self, ()) or self.limit or self.held_out or self.epochs != Settings.epochs
            or self.schedule != Settings.schedule)


# ---------------------------------------------------------------------------------------------- data and model


def load(s):
    if s.data == "synthetic":
        tree = photos.synthetic(s.data_dir, s.classes, s.images, threads=s.threads)
        dataset = photos.of_tree(s.data, tree, s.size, s.threads, s.unreadable)
    else:
        dataset = photos.load(s.data, s.data_dir, s.size, s.threads, s.unreadable)
    return s.part_of(dataset)


def prepare(s):
    """Write the resized copy of ImageNet that --data imagenet-256 reads."""
    source, target = Path(s.data_dir, "imagenet"), Path(s.data_dir, "imagenet-256")
    done = photos.prepare(source, target, threads=s.threads, tolerated=s.unreadable)
    print(f"{target} is complete: {done['resized']:,} photographs resized, {done['copied']:,} copied because they are "
          f"small, {done['kept']:,} were there; {done['bad']:,} cannot be read and are left out")


class ResNet18(resnet.ResNet18):
    """ResNet-18 for photographs: a 7 x 7 convolution and a 3 x 3 maximum, both of stride 2, before the four stages."""

    def __init__(self, width, num_classes=1000):
        super().__init__(width, num_classes)
        self.conv = nn.Conv2d(3, width, 7, 2, padding=3)

    def stem(self, x):
        return nn.max_pool2d(super().stem(x), 3, 2, padding=1)


def budget(s, classes):
    """Weights that the network keeps."""
    _, *others = layer_sizes(s.base_width, classes)
    return 7 * 7 * 3 * s.base_width + sum(others)


def build(s, dataset):
    """The network with its masks and weights drawn from the seed."""
    model = ResNet18(s.width, dataset.classes)
    nn.sparsify(model, budget(s, dataset.classes), s.seed, how=s.how, io_only=s.io_only)
    return model


# ---------------------------------------------------------------------------------------------- figures


def table1_runs(s):
    return over_seeds(s, resnet.sparse_and_dense(s), 1)


def paper(s):
    """What Table 1 says of these settings."""
    values = {s.width: DENSE, 64: SPARSE}.get(s.base_width, {})  # the dense network of a width is its own base
    return f"{values[s.width]:.2f} %" if s.papers and s.width in values else None


def table1_draw(points, metric):
    """Figure 13: sparse and dense networks over width, here and in the paper."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=points[0].settings.papers)
    summary = plot_sparse_and_dense(left, points, metric)
    left.set_title("here", fontsize=10)
    left.set_ylabel(f"{metric} test accuracy, %")
    for values, style, label in ((SPARSE, "C0o-", "sparse: 11.7 million weights"), (DENSE, "C7s--", "dense")):
        right.plot(list(values), list(values.values()), style, label=label)
        summary.append(f"the paper, {label}: " + ", ".join(f"{v:.2f} % at {w}" for w, v in values.items()))
    axes_over_width(right, WIDTHS)
    right.set_title("the paper's Table 1: ImageNet, 150 epochs", fontsize=10)
    for ax in (left, right):
        ax.legend(fontsize=8)
    figure.suptitle(f"Table 1 and Figure 13. ResNet-18, {subject(points)}\n{title(points, metric)}", fontsize=9)
    return figure, summary


def fig7_draw(points, metric):
    """The part of the dense improvement that width alone gives, and the same from the paper's Table 1."""
    figure, summary = resnet.fig7_draw(points, metric)
    parts = {w: (SPARSE[w] - DENSE[64]) / (DENSE[w] - DENSE[64]) for w in WIDTHS[1:]}
    summary.append("the paper's Table 1, base 64: " + ", ".join(f"{100 * v:.0f} % at {w}" for w, v in parts.items()))
    if points[0].settings.papers:
        ax, = figure.axes
        ax.plot(list(parts), list(parts.values()), "x--", color="C7", label="the paper's Table 1, base 64")
        ax.legend(fontsize=8)
    return figure, summary


EXPERIMENT = train.Experiment(
    name="resnet_imagenet",
    script="exp_resnet_imagenet.py",
    description=__doc__,
    settings=Settings,
    load=load,
    build=build,
    optimizer=resnet.EXPERIMENT.optimizer,
    schedule=resnet.schedule,
    figures={
        "table1": figures.Figure("Table 1 and Figure 13: sparse and dense accuracy over width", table1_runs,
                                 table1_draw, paper),
        "fig1": figures.Figure("sparse and dense accuracy over width", table1_runs, resnet.fig1_draw, paper),
        "fig7": figures.Figure("part of the dense improvement that width alone gives", table1_runs, fig7_draw, paper),
    },
    figures_ignore=resnet.FIGURES_IGNORE,
    quick=dict(data="synthetic", size=64, images=100, batch=32, epochs=6, seeds=1, jobs=2, lr=0.01, base_width=8,
               bases="8", widths="8,16"),
    quick_help="6 epochs of 1,000 generated photographs, too few to learn much; without --width the figure table1 at "
               "widths 8 and 16",
    quick_figure="table1",
    test_batch=64,
    actions={"prepare": ("write DATA_DIR/imagenet-256, the copy of ImageNet with smallest side 256, and end", prepare)},
)

if __name__ == "__main__":
    sys.exit(command.main(EXPERIMENT))
