"""Are wider ResNets better at the same number of weights? (Figures 1, 6, 7, 9, 10, 11, 12, 14)

    python exp_resnet_cifar.py --width 128             as many weights as a dense network of width 64, in width 128
    python exp_resnet_cifar.py --sweep fig6 --jobs 2   Figures 6, 11, 12, 14: every base and width
    python exp_resnet_cifar.py --sweep fig6 --bases 8 --widths 8,12,18,32 --epochs 12 --schedule cosine      a small one
    python exp_resnet_cifar.py --plot fig6             a figure and its table from what is done
    python exp_resnet_cifar.py --plot fig10            kept weights by layer: needs no training

Measured on CIFAR-10, 175,192 weights: 80.5 % at width 8, 82.1 at 12, 83.0 at 18, 83.4 at 32 (12 epochs, cosine, 2 or
3 seeds). Protocol (Section 3 of the paper): SGD, momentum 0.9, weight decay 5e-4, learning rate 0.1, multiplied by 0.1
at epochs 50, 120 and 200 of 300 (moved in proportion with --epochs), batch 128, random crops with padding 4 and flips,
3 seeds.
"""

import math
import sys
from dataclasses import dataclass, replace

import datasets
import lab
import nn
from lab import draw_resnet as draw
from lab import setting

# ---------------------------------------------------------------------------------------------- settings

EPOCHS, MILESTONES = 300, (50, 120, 200)
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "synthetic": 10}


@dataclass(frozen=True)
class Network(lab.Settings):
    """A ResNet-18 with as many weights as a dense one of the base width, and how it is trained; for CIFAR and ImageNet.

    Data, epochs, learning rate, batch, seed and where files lie are in lab.Settings. place: not part of a run's name.
    """

    width: int = setting(64, "channels of the first stage; the others have 2, 4 and 8 times as many", least=1)
    base_width: int = setting(64, "the network keeps as many weights as a dense one of this width", least=1)
    dense: bool = setting(False, "keep all weights of this width instead")
    how: str = setting("largest-first", "how the removed weights are divided among the layers",
                       choices=("largest-first", "proportional"))
    io_only: bool = setting(False, "remove whole convolution kernels, never part of one (Figure 9)")
    schedule: str = setting("steps", "of the learning rate: steps (multiplied by 0.1 at 1/6, 2/5 and 2/3 of the "
                            "epochs), cosine (to 0 at the end) or constant", choices=("steps", "cosine", "constant"))
    momentum: float = setting(0.9, "of SGD", least=0)
    weight_decay: float = setting(5e-4, "of SGD", least=0)
    precision: str = setting("auto", "on a GPU fp32 without tensor cores, tf32 (auto), or images in bf16; a CPU has "
                             "float32 alone", choices=("auto", "fp32", "tf32", "bf16"))
    deterministic: bool = setting(True, "on a GPU, the same bits each time; else cuDNN may add up in any order",
                                  place=True)
    tune: bool = setting(False, "on a GPU, time cuDNN's plans for each convolution and take the fastest: the choice, "
                         "and so rounding, may differ from start to start", place=True)
    bases: str = setting("8,12,18,40,64", "base widths of a sweep", place=True)
    widths: str = setting("8,12,18,32,40,64,90,128", "widths of a sweep", place=True)

    ALWAYS_NAMED = ("width", "base_width", "seed")
    ENGINE = ("precision", "deterministic", "tune")

    def __post_init__(self):
        if self.dense:  # one name for one network: the dense one of a width is its own base
            object.__setattr__(self, "base_width", self.width)
            object.__setattr__(self, "dense", False)

    @property
    def cost(self):
        return self.epochs, self.width, self.base_width

    def check(self):
        super().check()
        if self.base_width > self.width:
            raise lab.UsageError(f"width {self.width} cannot keep the weights of the wider base {self.base_width}; "
                                 "choose a --width of at least the --base-width, or --dense")
        lab.numbers("bases", self.bases), lab.numbers("widths", self.widths)


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


def load(s):
    """The data set, its training images to be cropped and flipped at random."""
    synthetic = dict(side=32, channels=3) if s.data == "synthetic" else {}
    return datasets.load(s.data, s.data_dir, **synthetic).part(s.held_out, s.limit).augmented(s.padding, s.flips)


# ---------------------------------------------------------------------------------------------- network


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
    width, 2 width, 4 width and 8 width channels, the mean over each image, a linear classifier.

    It is built dense; nn.sparsify masks it. The bottlenecks of Figure 3 replace conv, which makes the
    3 x 3 convolutions, or middle, the channels inside a block of so many channels.
    """

    def __init__(self, width, classes=10, conv=conv3x3, middle=lambda channels: channels):
        self.conv = conv(3, width)
        self.bn = nn.BatchNorm2d(width)
        self.blocks, channels_in = [], width
        for stage in range(4):
            channels = width * 2**stage
            for stride in (1 if stage == 0 else 2, 1):
                self.blocks.append(BasicBlock(channels_in, channels, stride, middle(channels), conv))
                channels_in = channels
        self.classifier = nn.Linear(channels_in, classes)

    def stem(self, x):
        return self.bn(self.conv(x), relu=True)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(nn.global_avg_pool(x))


def build(s, classes, network=ResNet18):
    """The network of this width, with as many weights as the dense one of the base width, drawn from the seed."""
    with nn.skip_init():  # sparsify draws the weights
        model, base = network(s.width, classes), network(s.base_width, classes)
    nn.sparsify(model, nn.weight_count(base), s.seed, how=s.how, io_only=s.io_only)
    return model


# ---------------------------------------------------------------------------------------------- training


def train(run):
    dataset = load(run.settings)
    fit(run, dataset, build(run.settings, dataset.classes))


def fit(run, dataset, model, test_batch=128):
    """Train from the run's last checkpoint, or from the beginning, to the end."""
    s = run.settings
    optimizer = nn.SGD(model.parameters(), s.lr, s.momentum, s.weight_decay)
    rate = schedule(s)

    @nn.compiled  # on a GPU it becomes one CUDA graph
    def step(x, labels):
        sums = 0
        if len(labels):  # of several processes, one may get no example of a small last batch
            loss, sums = nn.classify(model(nn.Tensor(x)), labels)
            loss.backward()
        run.average(model)  # over processes, if mpirun started several
        optimizer.step()
        optimizer.zero_grad()
        return sums  # of the loss and of correct answers

    @nn.compiled
    def test(x, labels):
        with nn.no_grad():
            return nn.classify(model(nn.Tensor(x)), labels)[1]

    for epoch in run.epochs(model, optimizer, dataset):  # from the last checkpoint on, recorded and saved
        optimizer.lr = rate(epoch)
        model.train()
        for x, labels in run.training_batches():
            run.count(step(x, labels))  # into the epoch's training loss and accuracy; below, into the test's
        model.eval()
        for x, labels in run.test_batches(test_batch):
            run.count(test(x, labels))


def schedule(s):
    """The learning rate of an epoch; the paper's milestones move with the number of epochs, an epoch apart at least."""
    milestones = [max(i, round(m * s.epochs / EPOCHS)) for i, m in enumerate(MILESTONES, start=1)]
    return {"steps": nn.MultiStepLR(s.lr, milestones),
            "cosine": nn.CosineLR(s.lr, s.epochs), "constant": nn.ConstantLR(s.lr)}[s.schedule]


# ---------------------------------------------------------------------------------------------- figures


def at(s, base, width):
    """The settings of this width at the weights of this base; dense, without masks, where they are the same."""
    return replace(s, base_width=base, width=width, io_only=s.io_only and width > base)


def families(s):
    """[(base, widths)] of a sweep, each base among its widths."""
    bases, widths = lab.numbers("bases", s.bases), lab.numbers("widths", s.widths)
    if max(widths) < min(bases):
        raise lab.UsageError(f"none of the --widths {s.widths} is as wide as a base of --bases {s.bases}")
    return [(base, sorted({base, *(w for w in widths if w > base)})) for base in bases]


def sparse(s):
    return [at(s, base, w) for base, widths in families(s) for w in widths]


def sparse_and_dense(s):
    """The sparse families, and the dense networks of all their widths."""
    return list(dict.fromkeys(sparse(s) + [at(s, w, w) for _, widths in families(s) for w in widths]))


def fig6_runs(s):
    return lab.over_seeds(s, sparse(s), 3)


FIG6_RATES = (0.05, 0.1, 0.2)
FIG6_LR = {  # width: the best for 175,192 weights on held-out images, copied from what --plot fig6_lr prints
    8: 0.2, 18: 0.1, 32: 0.1,  # 18 and 32 were not tried: they keep the rate of all, which favours width 8
}


def fig6_lr_runs(s):
    """Three learning rates at three widths of the first base, tested on training images that are not trained on."""
    base, s = families(s)[0][0], replace(s, held_out=5000)
    return lab.over_seeds(s, [at(replace(s, lr=lr), base, w) for w in (8, 18, 32) for lr in FIG6_RATES], 1)


def fig6_tuned_runs(s):
    """The same widths with the learning rate of all and with that chosen for each."""
    base = families(s)[0][0]
    return lab.over_seeds(s, [at(replace(s, lr=lr), base, w) for w, lr in lab.rates(s, "fig6", FIG6_LR)], 3)


def fig7_runs(s):
    return lab.over_seeds(s, sparse_and_dense(s), 3)


def fig9_runs(s):
    single, whole = sparse(replace(s, io_only=False)), sparse(replace(s, io_only=True))
    return lab.over_seeds(s, single + [run for run in whole if run.io_only], 3)


def fig10_runs(s):
    base, widths = families(s)[0]
    return [at(s, base, w) for w in widths]


def fig10_compute(s):
    """[{"width", "layers": [name of each], "sizes": [...], "kept": [...]}] of each width."""
    found, classes = [], CLASSES[s.data]
    with nn.skip_init():  # they are only counted
        for run in fig10_runs(s):
            names, layers = zip(*nn.layers(ResNet18(run.width, classes)))
            sizes = [layer.weight.size for layer in layers]
            kept = nn.allocate(sizes, nn.weight_count(ResNet18(run.base_width, classes)), run.how)
            if run.io_only:
                kept = nn.whole_units(kept, [math.prod(layer.weight.shape[2:]) for layer in layers])
            found.append({"width": run.width, "layers": names, "sizes": sizes, "kept": kept})
    return found


STATED = {  # (data set, base, width): test accuracy of an independent run of the paper's released code
    ("cifar100", 18, 18): 70.13, ("cifar100", 18, 64): 74.27, ("svhn", 8, 8): 95.87, ("svhn", 8, 18): 96.22,
    ("svhn", 8, 64): 95.93, ("svhn", 18, 18): 96.42,
}


def paper(s):
    value = STATED.get((s.data, s.base_width, s.width))
    return f"{value:.2f} % *" if value and not lab.departures(s) else None


def notes(s):
    """What the table's asterisk means."""
    return ["*: an independent run of the paper's released code"] if s.data in {name for name, *_ in STATED} else []


FIGURES = {
    "fig1": lab.Figure("sparse and dense accuracy over width", fig7_runs, draw.fig1, paper, notes=notes),
    "fig6": lab.Figure("accuracy over width at each base's number of weights (with Figure 11's error bars)",
                       fig6_runs, draw.fig6, paper, notes=notes),
    "fig6_lr": lab.Figure("learning rates for fig6_tuned, chosen on held-out training images", fig6_lr_runs,
                          draw.fig6_lr),
    "fig6_tuned": lab.Figure("Figure 6 at the first base, the learning rate chosen for each width", fig6_tuned_runs,
                             draw.fig6_tuned),
    "fig7": lab.Figure("part of the dense improvement that width alone gives", fig7_runs, draw.fig7, paper,
                       notes=notes),
    "fig9": lab.Figure("masks of whole convolution kernels beside masks of single weights", fig9_runs, draw.fig9, paper,
                       notes=notes),
    "fig10": lab.Figure("kept weights by layer", fig10_runs, draw.fig10, compute=fig10_compute, trained=False),
    "fig12": lab.Figure("Figure 6 over connectivity", fig6_runs, draw.fig12, paper, notes=notes),
    "fig14": lab.Figure("training accuracy of Figure 6 (the mean over an epoch's augmented batches)", fig6_runs,
                        draw.fig14, quantity="train_acc"),
}

EXPERIMENT = lab.Experiment(
    "resnet_cifar", __file__, __doc__, Settings, load, train, FIGURES,
    quick=dict(epochs=6, limit=2000, held_out=1000, seeds=1, jobs=2, base_width=8, bases="8", widths="8,18"),
    quick_help="6 epochs of 2,000 images, tested on 1,000 others; without --width the figure fig6 at two widths",
    quick_figure="fig6",
    figures_choose=dict.fromkeys(("width", "base_width", "dense"), "--bases and --widths"),
)

if __name__ == "__main__":
    sys.exit(lab.main(EXPERIMENT))
