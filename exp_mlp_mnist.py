"""One hidden layer on MNIST: is a wider network better if it keeps the same number of weights? (Figures 5 and 8)

    python exp_mlp_mnist.py --width 80                      width 80 with as many weights as a dense network of width 5
    python exp_mlp_mnist.py --sweep width --jobs 2          accuracy over width at 3,970 weights, dense beside sparse
    python exp_mlp_mnist.py --sweep fig5 --jobs 2           Figure 5: width and last-layer connectivity, 3,970 weights
    python exp_mlp_mnist.py --sweep fig8_lr                 learning rates for Figure 8, on held-out images
    python exp_mlp_mnist.py --sweep fig8                    Figure 8a: dense and sparse networks, 6,352 weights
    python exp_mlp_mnist.py --plot fig8b                    Figure 8b: the kernel's distance from infinite width
    python exp_mlp_mnist.py --plot fig5                     a figure and its table from what is done

Measured: 90.2 % at width 5, 95.9 % at width 80 (3,970 weights, 100 epochs, 3 seeds; the paper: about 90, best 96.3).
In Figure 8 the test error is least at width 128, the exact kernel distance at 216, with rank correlation 0.86.
"""

import sys
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

import datasets
import kernels
import lab
import nn
from lab import draw_mlp as draw
from lab import setting

# ---------------------------------------------------------------------------------------------- settings

INPUTS, CLASSES = 784, 10  # of every data set here: 28 x 28 pixels, ten digits


@dataclass(frozen=True)
class Settings(lab.Settings):
    """The protocol of Figure 5 unless changed: SGD, batch 100, learning rate 0.1, 300 epochs, biases."""

    data: str = setting("mnist", "data set", choices=("mnist", "synthetic"))
    width: int = setting(80, "hidden units", least=1)
    base_width: int = setting(5, "the network keeps as many weights as a dense one of this width", least=1)
    dense: bool = setting(False, "keep all weights of this width instead")
    last: float | None = setting(None, "connectivity of the last layer, 0 to 1 (default: as --how says)", least=0)
    how: str = setting("largest-first", "how the removed weights are divided among the layers",
                       choices=("largest-first", "proportional"))
    activation: str = setting("relu", "of the hidden layer", choices=("relu", "linear"))
    bias: bool = setting(True, "biases, not counted as weights")
    ntk: bool = setting(False, "NTK parameterisation, as in Figure 8")
    pixelwise: bool = setting(False, "standardise each pixel with the training images in use")

    ALWAYS_NAMED = ("width", "seed")

    @property
    def budget(self):
        """Weights that the network keeps."""
        return (INPUTS + CLASSES) * (self.width if self.dense else self.base_width)

    @property
    def cost(self):
        return self.epochs, self.width, self.budget

    @property
    def kept(self):
        """Weights kept by the first and last layer if --last fixes them, else None."""
        if self.last is None:
            return None
        last = round(self.last * CLASSES * self.width)
        return [self.budget - last, last]

    def possible(self):
        """Whether --last leaves the first layer between one weight and all of them."""
        return self.kept is None or 1 <= self.kept[0] <= INPUTS * self.width and self.kept[1] >= 1

    def check(self):
        super().check()
        if self.base_width > self.width and not self.dense:
            raise lab.UsageError(f"width {self.width} cannot keep the weights of the wider base {self.base_width}; "
                                 "choose a --width of at least the --base-width, or --dense")
        if self.last is not None and self.last > 1:
            raise lab.UsageError(f"--last is a fraction of at most 1, not {self.last}")
        if self.last is not None and self.how != "largest-first":
            raise lab.UsageError(f"--last fixes what each layer keeps, so --how {self.how} has nothing to decide")
        if self.kept and self.kept[1] < 1:
            raise lab.UsageError(f"--last {self.last} at width {self.width} keeps none of the last layer's "
                                 f"{CLASSES * self.width:,} weights")
        if not self.possible():
            raise lab.UsageError(f"--last {self.last} at width {self.width} leaves {self.kept[0]:,} of "
                                 f"{self.budget:,} weights to a first layer of {INPUTS * self.width:,}")


# ---------------------------------------------------------------------------------------------- network


def load(s):
    dataset = datasets.load(s.data, s.data_dir).part(s.held_out, s.limit)
    return dataset.standardized_by_pixel() if s.pixelwise else dataset


def build(s):
    """MLP with one hidden layer, its masks and weights drawn from the seed."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(INPUTS, s.width, bias=s.bias, ntk=s.ntk),
        *([nn.ReLU()] if s.activation == "relu" else []),
        nn.Linear(s.width, CLASSES, bias=s.bias, ntk=s.ntk),
    )
    nn.sparsify(model, s.budget, s.seed, how=s.how, kept=s.kept)
    return model


# ---------------------------------------------------------------------------------------------- training


def train(run):
    """Train one network from its last checkpoint, or from the beginning, to the end."""
    s = run.settings
    dataset, model = load(s), build(s)
    optimizer = nn.SGD(model.parameters(), s.lr)

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
        for x, labels in run.training_batches():
            run.count(step(x, labels))  # into the epoch's training loss and accuracy; below, into the test's
        for x, labels in run.test_batches(1000):
            run.count(test(x, labels))


# ---------------------------------------------------------------------------------------------- figures

WIDTHS = (5, 10, 20, 40, 80, 160, 320, 640)
LAST = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FIG8_WIDTHS = (8, 32, 128, 216, 328, 512, 635)  # at 635 the last layer takes all weights but two
FIG8_RATES = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
FIG8_LR = {  # (dense, width): the best on held-out images, copied from what --plot fig8_lr prints
    (True, 8): 32.0, (True, 32): 128.0, (True, 128): 256.0, (True, 216): 256.0, (True, 328): 256.0, (True, 512): 256.0,
    (True, 635): 256.0, (False, 32): 64.0, (False, 128): 1024.0, (False, 216): 512.0, (False, 328): 2048.0,
    (False, 512): 1024.0, (False, 635): 1024.0,
}
KERNEL_WIDTHS = (8, 16, 32, 48, 64, 90, 128, 160, 216, 270, 328, 400, 512, 580, 620, 635)
KERNEL_PAIRS, KERNEL_SEEDS = 1000, 10


def width_runs(s):
    """Accuracy over width at the base's number of weights, and of dense networks of the same widths."""
    widths = [w for w in WIDTHS if s.base_width < w <= 320]
    sparse = [replace(s, width=w, dense=False) for w in (s.base_width, *widths)]
    return lab.over_seeds(s, sparse + [replace(s, width=w, dense=True) for w in widths], 3)


def fig5_runs(s):
    cells = [replace(s, width=w, last=c, activation=a) for a in ("relu", "linear") for w in WIDTHS for c in LAST]
    return lab.over_seeds(s, [cell for cell in cells if cell.possible()], 1)


def fig5_paper(s):
    return "about 90 %" if (s.data, s.activation, s.width, s.base_width) == ("mnist", "relu", 5, 5) else None


def fig8_at(s, width, dense, lr=None):
    """One network of Figure 8: no biases, NTK parameterisation, 2,048 training images, batch 256, last layer dense.

    The width 8 that fixes the number of weights is dense and sparse at once.
    """
    dense = dense or width == 8
    return replace(s, width=width, base_width=8, dense=dense, last=None if dense else 1.0, bias=False, ntk=True,
                   pixelwise=True, limit=2048, batch=256, lr=FIG8_LR[dense, width] if lr is None else lr)


FIG8_NETWORKS = [(w, dense) for dense in (True, False) for w in FIG8_WIDTHS if dense or w > 8]


def fig8_runs(s):
    return lab.over_seeds(s, [fig8_at(s, w, dense) for w, dense in FIG8_NETWORKS], 10)


def fig8_lr_runs(s):
    """Every learning rate for every network of Figure 8, tested on training images that are not trained on."""
    s = replace(s, held_out=5000)
    return lab.over_seeds(s, [fig8_at(s, w, dense, lr) for w, dense in FIG8_NETWORKS for lr in FIG8_RATES], 2)


def fig8b_runs(s):
    """The sparse networks of Figure 8."""
    return [run for run in fig8_runs(s) if not run.dense or run.width == 8]


def fig8b_compute(s):
    """How far the kernel of the sparse networks of Figure 8 is from the infinite-width one, over their width.

    The kernel is that of the first layer, whose mask keeps an exact number of its weights since the last layer is
    dense: 6,352 - 10 n of 784 n. The theory keeps each weight with this probability, p = (6,352 - 10 n) / 784 n, and so
    do the networks of "measured independent"; those of Figure 8, "measured", keep exactly that many, which makes
    their kernel vary a little less where weights are few.
    Distances are means over pairs of different test images, pixels standardised as in training, and each image scaled
    to |x|^2 = d, as Eq. 4 has it: without that a few images with ink where the training images have none, up to 3,400
    times as large, would make up the mean (it is recorded as well, under "raw"). With each its standard error over
    pairs; with the measured ones, means over networks, their standard deviation over networks.
    """
    dataset = load(fig8_at(s, 8, True))

    def inputs(images):
        return (images * dataset.scale.astype(np.float64) + dataset.shift).reshape(len(images), INPUTS)

    train_x, test_x = inputs(dataset.train_images), inputs(dataset.test_images)
    rng = nn.generator(s.seed, "kernel pairs")
    x, y = test_x[[rng.choice(len(test_x), 2, replace=False) for _ in range(KERNEL_PAIRS)]].transpose(1, 0, 2)
    raw = ((x * x).sum(1) * (y * y).sum(1)) / INPUTS**2  # (pairs,): the distance grows by this without the scaling
    x, y = (z * (INPUTS / (z * z).sum(1, keepdims=True)) ** 0.5 for z in (x, y))
    infinite = kernels.relu_moment(INPUTS, INPUTS, (x * y).sum(1), order=1) / INPUTS  # (pairs,)

    def density(width):
        return min(1.0, fig8_at(s, width, False, lr=1.0).kept[0] / (INPUTS * width)) if width > 8 else 1.0

    def measured(width):
        """Distances of networks before training: those of Figure 8, and those that keep each weight independently."""
        of_figure_8, independent = [], []
        for seed in range(s.seed, s.seed + KERNEL_SEEDS):
            u = nn.to_host(build(replace(fig8_at(s, width, False, lr=1.0), seed=seed))[1].weight.data)
            theta = (np.maximum(x @ u.T, 0) * np.maximum(y @ u.T, 0)).sum(1) / (width * INPUTS)
            of_figure_8.append(np.mean((theta - infinite) ** 2))
            theta = kernels.measured_kernel(x, y, width, density(width), nn.generator(seed, "kernel", width)).diagonal()
            independent.append(np.mean((theta - infinite) ** 2))
        return [[float(np.mean(d)), float(np.std(d, ddof=1))] for d in (of_figure_8, independent)]

    def mean_and_error(values):
        return [float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)]

    names = ("exact", "bias", "variance", "series", "raw", "measured", "measured independent")
    result = {"digest": dataset.digest[:16], "pairs": KERNEL_PAIRS, "networks": KERNEL_SEEDS, "widths": KERNEL_WIDTHS,
              "densities": [density(n) for n in KERNEL_WIDTHS],
              "formula": [float(kernels.kernel_distance_formula(n, density(n), INPUTS)) for n in KERNEL_WIDTHS],
              **{name: [] for name in names}}
    for n in tqdm(KERNEL_WIDTHS, desc="kernel distance", disable=None, leave=False):
        bias, variance = kernels.kernel_distance(x, y, n, density(n), split=True, rtol=1e-5)
        series = kernels.kernel_distance(x, y, n, density(n), method="series")
        theory = [mean_and_error(v) for v in (bias + variance, bias, variance, series, raw * (bias + variance))]
        for name, value in zip(names, theory + measured(n)):
            result[name].append(value)
    prediction = kernels.gp_predict(kernels.infinite_kernel(train_x), dataset.train_labels,
                                    kernels.infinite_kernel(test_x, train_x), rng=nn.generator(s.seed, "gp"))
    return result | {"gp_test_acc": float(np.mean(prediction.labels == dataset.test_labels)),
                     "gp_noise": prediction.noise, "gp_held_out_acc": prediction.held_out_accuracy}


FIGURES = {
    "width": lab.Figure("accuracy over width at a fixed number of weights", width_runs, draw.width),
    "fig5": lab.Figure("accuracy over width and last-layer connectivity at the base's number of weights", fig5_runs,
                       draw.fig5, fig5_paper),
    "fig8": lab.Figure("dense and sparse accuracy over width at 6,352 weights, NTK parameterisation", fig8_runs,
                       draw.fig8),
    "fig8b": lab.Figure("kernel distance at initialisation and test error over width at 6,352 weights", fig8b_runs,
                        draw.fig8b, compute=fig8b_compute),
    "fig8_lr": lab.Figure("learning rates for fig8, chosen on held-out training images", fig8_lr_runs, draw.fig8_lr),
}

EXPERIMENT = lab.Experiment(
    "mlp_mnist", __file__, __doc__, Settings, load, train, FIGURES,
    quick=dict(epochs=30, seeds=1, jobs=2),
    quick_help="30 epochs; without --width the figure `width`, trained and drawn",
    quick_figure="width",
    figures_choose=dict.fromkeys(("width", "dense"), "widths of their own"),
)

if __name__ == "__main__":
    sys.exit(lab.main(EXPERIMENT))
