"""ResNet-18 on ImageNet: wider at the same number of weights (Table 1, Figures 1, 7, 13)

    python exp_resnet_imagenet.py --prepare                                     once: a copy of smallest side 256
    python exp_resnet_imagenet.py --data imagenet-256 --width 128               as many weights as width 64 has
    mpirun -n 8 python exp_resnet_imagenet.py --data imagenet-256 --width 128   every batch on 8 processes
    mpirun -n 9 python exp_resnet_imagenet.py --data imagenet-256 --sweep table1    one network a process
    python exp_resnet_imagenet.py --plot table1                                 Table 1 and Figure 13

ImageNet lies in data/imagenet: train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG and beside it
ILSVRC2012_devkit_t12.tar.gz or Kaggle's LOC_val_solution.csv.
Protocol (Section 3 of the paper): SGD, momentum 0.9, weight decay 1e-4, learning rate 0.1 with a cosine over 150
epochs, batch 256; random crops of 0.2 to 1 of the area and flips; tested on the centre 224 x 224 of the smallest side
256. --data synthetic generates photographs, for which smaller crops (--size 64) are enough.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import exp_resnet_cifar as resnet
import lab
import nn
from lab import draw_resnet as draw
from lab import setting

# ---------------------------------------------------------------------------------------------- settings

WIDTHS = (64, 90, 128, 181, 256)
DENSE = dict(zip(WIDTHS, (68.03, 69.11, 70.22, 70.91, 71.89)))  # the paper's Table 1, per cent
SPARSE = dict(zip(WIDTHS, (68.03, 69.56, 70.02, 70.66, 70.53)))


@dataclass(frozen=True)
class Settings(resnet.Network):
    """The paper's protocol unless changed."""

    data: str = setting("imagenet", "data set", choices=("imagenet", "imagenet-256", "synthetic"))
    batch: int = setting(256, "examples a step, of all processes together", least=2)
    epochs: int = setting(150, "passes over the training set", least=1)
    schedule: str = setting("cosine", "of the learning rate: cosine (to 0 at the end), steps (multiplied by 0.1 at "
                            "1/6, 2/5 and 2/3 of the epochs) or constant", choices=("cosine", "steps", "constant"))
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
            raise lab.UsageError("--classes and --images are about --data synthetic; --limit takes fewer photographs")

    @property
    def papers(self):
        """Whether this is what the paper trained."""
        return self.data.startswith("imagenet") and not lab.departures(self)


def load(s):
    options = dict(size=s.size, threads=s.threads, unreadable=s.unreadable)
    if s.data == "synthetic":
        dataset = datasets.load("photographs", s.data_dir, classes=s.classes, images=s.images, **options)
    else:
        dataset = datasets.load(s.data, s.data_dir, **options)
    return dataset.part(s.held_out, s.limit)


def prepare(s):
    """Write the resized copy of ImageNet that --data imagenet-256 reads."""
    source, target = Path(s.data_dir, "imagenet"), Path(s.data_dir, "imagenet-256")
    done = datasets.photographs.prepare(source, target, threads=s.threads, unreadable=s.unreadable)
    print(f"{target} is complete: {done['resized']:,} photographs resized, {done['copied']:,} copied because they are "
          f"small, {done['kept']:,} were there; {done['bad']:,} cannot be read and are left out")


# ---------------------------------------------------------------------------------------------- network, training


class ResNet18(resnet.ResNet18):
    """ResNet-18 for photographs: a 7 x 7 convolution and a 3 x 3 maximum, both of stride 2, before the four stages."""

    def __init__(self, width, classes=1000):
        super().__init__(width, classes)
        self.conv = nn.Conv2d(3, width, 7, 2, padding=3)

    def stem(self, x):
        return nn.max_pool2d(super().stem(x), 3, 2, padding=1)


def train(run):
    dataset = load(run.settings)
    resnet.fit(run, dataset, resnet.build(run.settings, dataset.classes, ResNet18), test_batch=64)


# ---------------------------------------------------------------------------------------------- figures


def table1_runs(s):
    return lab.over_seeds(s, resnet.sparse_and_dense(s), 1)


def paper(s):
    """What Table 1 says of these settings."""
    values = DENSE if s.width == s.base_width else SPARSE if s.base_width == 64 else {}
    return f"{values[s.width]:.2f} %" if s.papers and s.width in values else None


EXPERIMENT = lab.Experiment(
    "resnet_imagenet", __file__, __doc__, Settings, load, train,
    {
        "table1": lab.Figure("Table 1 and Figure 13: sparse and dense accuracy over width", table1_runs,
                             functools.partial(draw.table1, sparse=SPARSE, dense=DENSE), paper),
        "fig1": lab.Figure("sparse and dense accuracy over width", table1_runs, draw.fig1, paper),
        "fig7": lab.Figure("part of the dense improvement that width alone gives", table1_runs,
                           functools.partial(draw.fig7_beside_table1, sparse=SPARSE, dense=DENSE), paper),
    },
    quick=dict(data="synthetic", size=64, images=100, batch=32, epochs=6, seeds=1, jobs=2, lr=0.01, base_width=8,
               bases="8", widths="8,16"),
    quick_help="6 epochs of 1,000 generated photographs, too few to learn much; without --width the figure table1 at "
               "widths 8 and 16",
    quick_figure="table1",
    figures_choose=resnet.EXPERIMENT.figures_choose,
    actions={"prepare": ("write DATA_DIR/imagenet-256, the copy of ImageNet with smallest side 256, and end", None,
                         prepare)},
)

if __name__ == "__main__":
    sys.exit(lab.main(EXPERIMENT))
