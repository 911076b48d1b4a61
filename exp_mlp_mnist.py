"""One hidden layer on MNIST: is a wider network better if it keeps the same number of weights? (Figures 5 and 8)

    python exp_mlp_mnist.py --width 80                      width 80 with as many weights as a dense network of width 5
    python exp_mlp_mnist.py --sweep width --jobs 2          accuracy over width at 3,970 weights, dense beside sparse
    python exp_mlp_mnist.py --sweep fig5 --jobs 2           Figure 5: width and last-layer connectivity, 3,970 weights
    python exp_mlp_mnist.py --sweep fig8_lr                 learning rates for Figure 8, on held-out images
    python exp_mlp_mnist.py --sweep fig8                    Figure 8a: dense and sparse networks, 6,352 weights
    python exp_mlp_mnist.py --plot fig8b                    Figure 8b: the kernel's distance from infinite width
    python exp_mlp_mnist.py --sweep optimum --jobs 2        the best width, predicted by the kernel and measured
    python exp_mlp_mnist.py --best-width 6352 --pixelwise   what the kernel predicts for a layer of 6,352 weights
    python exp_mlp_mnist.py --plot fig5                     a figure and its table from what is done

Measured: 90.2 % at width 5, 95.9 % at width 80 (3,970 weights, 300 epochs, 5 seeds; the paper: about 90, best 96.3).
In Figure 8 the test error is least at width 128, the exact distance of the Gaussian-process kernel near 250.
"""

import itertools
import sys
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

import datasets
import kernels
import lab
import nn
from lab import draw_mlp as draw
from lab import draw_optimum
from lab import setting

# ---------------------------------------------------------------------------------------------- settings

SIDE, CLASSES = 28, 10  # of every data set here: 28 x 28 pixels, ten digits


@dataclass(frozen=True)
class Settings(lab.Settings):
    """The protocol of Figure 5 unless changed: SGD, batch 100, learning rate 0.1, 300 epochs, biases."""

    data: str = setting("mnist", "data set", choices=("mnist", "synthetic"))
    width: int = setting(80, "hidden units", least=1)
    base_width: int = setting(5, "the network keeps as many weights as a dense one of this width", least=1)
    dense: bool = setting(False, "keep all weights of this width instead")
    last: float | None = setting(None, "connectivity of the last layer, 0 to 1 (None: as --how says)", least=0)
    how: str = setting("largest-first", "how the removed weights are divided among the layers",
                       choices=("largest-first", "proportional"))
    activation: str = setting("relu", "activation of the hidden layer", choices=("relu", "linear"))
    bias: bool = setting(True, "biases, not counted as weights")
    ntk: bool = setting(False, "NTK parameterisation, as in Figure 8")
    pixelwise: bool = setting(False, "standardise each pixel with the training images in use")
    side: int = setting(SIDE, f"pixels along a side of the images, averaged to fewer than {SIDE}", least=1)

    ALWAYS_NAMED = ("width", "seed")

    @property
    def inputs(self):
        return self.side**2

    @property
    def budget(self):
        """Weights that the network keeps."""
        return (self.inputs + CLASSES) * (self.width if self.dense else self.base_width)

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
        return self.kept is None or 1 <= self.kept[0] <= self.inputs * self.width and self.kept[1] >= 1

    def check(self):
        super().check()
        if SIDE % self.side:
            raise lab.UsageError(f"--side is a whole fraction of {SIDE}, such as 14 or 7, not {self.side}")
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
                                 f"{self.budget:,} weights to a first layer of {self.inputs * self.width:,}")


# ---------------------------------------------------------------------------------------------- network


def load(s):
    dataset = datasets.load(s.data, s.data_dir).part(s.held_out, s.limit)
    if s.side != SIDE:
        dataset = dataset.averaged(s.side)
    return dataset.standardized_by_pixel() if s.pixelwise else dataset


def build(s):
    """MLP with one hidden layer, its masks and weights drawn from the seed."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(s.inputs, s.width, bias=s.bias, ntk=s.ntk),
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
WIDTH_RATES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
WIDTH_LR = {  # width: the best for 3,970 weights on held-out images, copied from what --plot width_lr prints
    5: 0.1, 10: 0.2, 20: 0.2, 40: 0.2, 80: 0.4, 160: 0.2, 320: 0.4,
}
KERNEL_WIDTHS = (8, 16, 32, 48, 64, 90, 128, 160, 216, 270, 328, 400, 512, 580, 620, 635)
KERNEL_PAIRS, KERNEL_SEEDS = 1000, 10
RESAMPLES, BEST_WIDTH_PAIRS = 200, 32


def width_runs(s):
    """Accuracy over width at the base's number of weights, and of dense networks of the same widths."""
    widths = [w for w in WIDTHS if s.base_width < w <= 320]
    sparse = [replace(s, width=w, dense=False) for w in (s.base_width, *widths)]
    return lab.over_seeds(s, sparse + [replace(s, width=w, dense=True) for w in widths], 5)


def width_lr_runs(s):
    """Every learning rate at every width of `width` that is sparse, tested on training images not trained on."""
    s = replace(s, held_out=10_000)
    return lab.over_seeds(s, [replace(s, width=w, lr=lr) for w in WIDTHS if w <= 320 for lr in WIDTH_RATES], 2)


def width_tuned_runs(s):
    """The same widths with the learning rate of all and with that chosen for each."""
    return lab.over_seeds(s, [replace(s, width=w, lr=lr) for w, lr in lab.rates(s, "width", WIDTH_LR)], 5)


def fig5_runs(s):
    cells = [replace(s, width=w, last=c, activation=a) for a in ("relu", "linear") for w in WIDTHS for c in LAST]
    return lab.over_seeds(s, [cell for cell in cells if cell.possible()], 1)


def fig5_paper(s):
    return "about 90 %" if (s.data, s.activation, s.width, s.base_width) == ("mnist", "relu", 5, 5) else None


def fig8_at(s, width, dense, lr=None, base=8):
    """One network of Figure 8: no biases, NTK parameterisation, 2,048 training images, batch 256, last layer dense.

    The width `base` that fixes the number of weights is dense and sparse at once.
    """
    dense = dense or width == base
    return replace(s, width=width, base_width=base, dense=dense, last=None if dense else 1.0, bias=False, ntk=True,
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


def kernel_pairs(s, count):
    """(dataset, x, y, (|x|^2 |y|^2 / d^2 before scaling)) of `count` pairs of different test images x, y (count, d), as
    a network with these settings sees them, and each scaled to |x|^2 = d, as Eq. 4 has it.
    """
    dataset = load(s)
    images = as_inputs(dataset, dataset.test_images)
    images = images[(images != 0).any(axis=1)]
    if len(images) < 2:
        raise lab.UsageError(f"the kernel is compared on pairs of test images that are not all zero, and with these "
                             f"settings there {'is one' if len(images) else 'are none'}")
    rng = nn.generator(s.seed, "kernel pairs")
    x, y = images[[rng.choice(len(images), 2, replace=False) for _ in range(count)]].transpose(1, 0, 2)
    raw = ((x * x).sum(1) * (y * y).sum(1)) / s.inputs**2  # (count,): the distance grows by this without the scaling
    return dataset, *(z * (s.inputs / (z * z).sum(1, keepdims=True)) ** 0.5 for z in (x, y)), raw


def as_inputs(dataset, images):
    """Images (N, 1, H, W) of bytes as a network of this data set sees them, (N, H W) in float64"""
    return (images * dataset.scale.astype(np.float64) + dataset.shift).reshape(len(images), -1)


def first_density(s):
    """Of the first layer of a network whose last one is dense"""
    return (s.budget - CLASSES * s.width) / (s.inputs * s.width)


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
    dataset, x, y, raw = kernel_pairs(fig8_at(s, 8, True), KERNEL_PAIRS)
    d = s.inputs
    infinite = kernels.relu_moment(d, d, (x * y).sum(1), order=1) / d  # (pairs,)

    def density(width):
        return first_density(fig8_at(s, width, False, lr=1.0))

    def measured(width):
        """Distances of networks before training: those of Figure 8, and those that keep each weight independently."""
        of_figure_8, independent = [], []
        for seed in range(s.seed, s.seed + KERNEL_SEEDS):
            u = nn.to_host(build(replace(fig8_at(s, width, False, lr=1.0), seed=seed))[1].weight.data)
            theta = (np.maximum(x @ u.T, 0) * np.maximum(y @ u.T, 0)).sum(1) / (width * d)
            of_figure_8.append(np.mean((theta - infinite) ** 2))
            theta = kernels.measured_kernel(x, y, width, density(width), nn.generator(seed, "kernel", width)).diagonal()
            independent.append(np.mean((theta - infinite) ** 2))
        return [[float(np.mean(d)), float(np.std(d, ddof=1))] for d in (of_figure_8, independent)]

    def mean_and_error(values):
        return [float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)]

    names = ("exact", "bias", "variance", "series", "raw", "measured", "measured independent")
    result = {"digest": dataset.digest[:16], "pairs": KERNEL_PAIRS, "networks": KERNEL_SEEDS, "widths": KERNEL_WIDTHS,
              "densities": [density(n) for n in KERNEL_WIDTHS],
              "formula": [float(kernels.kernel_distance_formula(n, density(n), d)) for n in KERNEL_WIDTHS],
              **{name: [] for name in names}}
    for n in tqdm(KERNEL_WIDTHS, desc="kernel distance", disable=None, leave=False):
        bias, variance = kernels.kernel_distance(x, y, n, density(n), split=True, rtol=1e-5)
        series = kernels.kernel_distance(x, y, n, density(n), method="series")
        theory = [mean_and_error(v) for v in (bias + variance, bias, variance, series, raw * (bias + variance))]
        for name, value in zip(names, theory + measured(n)):
            result[name].append(value)
    return result | regression(s, dataset)


def regression(s, dataset):
    """What regression with the infinite-width kernel on the training images reaches, its noise chosen on a fifth."""
    train_x, test_x = (as_inputs(dataset, images) for images in (dataset.train_images, dataset.test_images))
    prediction = kernels.gp_predict(kernels.infinite_kernel(train_x), dataset.train_labels,
                                    kernels.infinite_kernel(test_x, train_x), rng=nn.generator(s.seed, "gp"))
    return {"gp_test_acc": float(np.mean(prediction.labels == dataset.test_labels)),
            "gp_noise": prediction.noise, "gp_held_out_acc": prediction.held_out_accuracy}


# ---------------------------------------------------------------------------------------------- the best width


OPTIMUM_SIDES, OPTIMUM_BASES, OPTIMUM_WIDTHS, OPTIMUM_PAIRS = (28, 14, 7), (2, 4, 8, 16, 32), 10, 200
OPTIMUM_RATES = tuple(2.0**k for k in range(2, 12))
OPTIMUM_LR = {  # (side, base): {width: the best on held-out images}, copied from what --plot optimum_lr prints
    (28, 2): {2: 16.0, 3: 32.0, 5: 4.0, 8: 64.0, 13: 128.0, 22: 256.0, 35: 512.0, 56: 512.0, 90: 1024.0, 144: 1024.0},
    (28, 4): {4: 16.0, 6: 16.0, 10: 8.0, 17: 128.0, 27: 256.0, 43: 512.0, 69: 512.0, 111: 1024.0, 179: 2048.0,
        288: 2048.0},
    (28, 8): {8: 32.0, 13: 128.0, 21: 128.0, 33: 256.0, 54: 256.0, 86: 512.0, 139: 1024.0, 223: 1024.0, 359: 512.0,
        577: 2048.0},
    (28, 16): {16: 128.0, 26: 64.0, 41: 256.0, 67: 256.0, 107: 512.0, 172: 512.0, 277: 1024.0, 446: 2048.0,
        717: 256.0, 1154: 512.0},
    (28, 32): {32: 128.0, 51: 256.0, 83: 256.0, 133: 128.0, 214: 512.0, 345: 512.0, 555: 512.0, 892: 1024.0,
        1435: 256.0, 2309: 128.0},
    (14, 2): {2: 8.0, 3: 8.0, 4: 16.0, 5: 32.0, 7: 16.0, 10: 128.0, 14: 128.0, 19: 64.0, 27: 256.0, 37: 256.0},
    (14, 4): {4: 32.0, 6: 32.0, 8: 16.0, 11: 64.0, 15: 64.0, 20: 32.0, 28: 256.0, 39: 128.0, 54: 512.0, 74: 256.0},
    (14, 8): {8: 32.0, 11: 16.0, 15: 128.0, 21: 64.0, 29: 32.0, 41: 256.0, 56: 256.0, 78: 512.0, 108: 256.0,
        149: 1024.0},
    (14, 16): {16: 64.0, 22: 128.0, 31: 64.0, 42: 256.0, 59: 256.0, 81: 512.0, 113: 512.0, 156: 512.0, 216: 512.0,
        299: 1024.0},
    (14, 32): {32: 32.0, 44: 128.0, 61: 128.0, 85: 128.0, 118: 256.0, 163: 128.0, 226: 512.0, 312: 1024.0, 433: 512.0,
        599: 64.0},
    (7, 2): {2: 8.0, 3: 16.0, 4: 16.0, 5: 16.0, 6: 16.0, 7: 32.0, 8: 32.0, 9: 64.0, 10: 64.0},
    (7, 4): {4: 16.0, 5: 8.0, 6: 32.0, 7: 32.0, 8: 64.0, 10: 32.0, 12: 64.0, 15: 128.0, 17: 64.0, 21: 128.0},
    (7, 8): {8: 8.0, 10: 32.0, 12: 64.0, 14: 32.0, 17: 32.0, 20: 8.0, 24: 64.0, 29: 64.0, 35: 128.0, 42: 128.0},
    (7, 16): {16: 8.0, 19: 16.0, 23: 64.0, 28: 64.0, 34: 128.0, 40: 128.0, 49: 32.0, 59: 128.0, 71: 256.0, 85: 256.0},
    (7, 32): {32: 32.0, 39: 8.0, 46: 64.0, 56: 128.0, 67: 64.0, 81: 128.0, 98: 128.0, 118: 64.0, 142: 128.0,
        171: 256.0},
}
OPTIMUM_LOWERED = {  # (side, base, width): half of the chosen rate, at which some of the ten seeds diverged
    (28, 4, 179): 1024.0, (28, 16, 16): 64.0, (14, 16, 81): 256.0,
}


def optimum_widths(side, base):
    """Ten widths in geometric progression, or as many as there are, from the dense network of width `base` to the one
    whose first layer has one weight a unit where the last one takes ten.
    """
    widest = (side**2 + CLASSES) * base // (CLASSES + 1)
    for count in itertools.count(OPTIMUM_WIDTHS):
        widths = sorted({round(n) for n in np.geomspace(base, widest, count)})
        if len(widths) >= min(OPTIMUM_WIDTHS, widest - base + 1):
            return widths


OPTIMUM_NETWORKS = [(side, base, n) for side, base in itertools.product(OPTIMUM_SIDES, OPTIMUM_BASES)
                    for n in optimum_widths(side, base)]


def optimum_runs(s):
    """Over width at each of five numbers of weights and three sizes of images, otherwise as in Figure 8."""
    rates = {(*key, n): lr for key, line in OPTIMUM_LR.items() for n, lr in line.items()} | OPTIMUM_LOWERED
    return lab.over_seeds(s, [fig8_at(replace(s, side=side), n, False, rates[side, base, n], base)
                              for side, base, n in OPTIMUM_NETWORKS], 10)


def optimum_lr_runs(s):
    """Every learning rate for every network of `optimum`, tested on training images that are not trained on."""
    s = replace(s, held_out=5000)
    return lab.over_seeds(s, [fig8_at(replace(s, side=side), n, False, lr, base)
                              for side, base, n in OPTIMUM_NETWORKS for lr in OPTIMUM_RATES], 2)


def optimum_compute(s):
    """For each budget: the width at which the kernel of its networks is nearest to the infinite-width one, by the exact
    theory, with the interval from resampling pairs of images, by the series and by Eq. 4; and the exact distances at
    the widths that are trained. For each size of images, what regression with the infinite-width kernel reaches.
    """
    budgets = []
    pairs = {side: kernel_pairs(fig8_at(replace(s, side=side), 8, True), OPTIMUM_PAIRS) for side in OPTIMUM_SIDES}
    for side, base in tqdm(list(itertools.product(OPTIMUM_SIDES, OPTIMUM_BASES)), "kernel distance", disable=None,
                           leave=False):
        at, (dataset, x, y, _) = replace(s, side=side), pairs[side]
        widths = optimum_widths(side, base)
        networks = {n: fig8_at(at, n, False, 1.0, base) for n in range(widths[0], widths[-1] + 1)}
        density = {n: first_density(network) for n, network in networks.items()}

        def kept(width):
            return networks[width].budget - CLASSES * width

        ends, rng = (widths[0], widths[-1]), nn.generator(s.seed, "kernel resamples")
        exact, _, interval = kernels.optimal_width(x, y, kept, "exact", ends, RESAMPLES, rng, rtol=1e-4)
        formula = {n: kernels.kernel_distance_formula(n, p, at.inputs) for n, p in density.items()}
        budgets.append({"side": side, "base_width": base, "weights": networks[base].budget, "widths": widths,
                        "densities": [density[n] for n in widths],
                        "distances": [float(kernels.kernel_distance(x, y, n, density[n], rtol=1e-4).mean())
                                      for n in widths],
                        "exact": exact, "interval": interval, "formula": min(formula, key=formula.get),
                        "series": kernels.optimal_width(x, y, kept, "series", ends)[0]})
    return {"digest": dataset.digest[:16], "pairs": OPTIMUM_PAIRS, "budgets": budgets,
            "regression": {side: regression(s, dataset) for side, (dataset, *_) in pairs.items()}}


def best_width(s, weights):
    """Print the width at which the kernel of a first layer of so many weights is nearest to infinite width, on images
    as these settings normalise them, and the distances around it.
    """
    if not 1 <= weights <= 10**9:
        raise lab.UsageError(f"--best-width takes a number of weights from 1 to 1,000,000,000, not {weights}")
    _, x, y, _ = kernel_pairs(s, BEST_WIDTH_PAIRS)
    rng = nn.generator(s.seed, "kernel resamples")
    best, least, (low, high) = kernels.optimal_width(x, y, weights, resamples=RESAMPLES, rng=rng, rtol=1e-3)
    dense = -(-weights // s.inputs)
    end = {dense: "; the narrowest there is", weights: "; the widest there is, one weight a unit"}.get(best, "")
    end += "; with --pixelwise it is another" if end and not s.pixelwise else ""
    print(f"width {best} (95 % interval {low} to {high}, from resampling {len(x)} pairs of test images{end})\n"
          "there the Gaussian-process kernel is nearest to infinite width, by mean squared distance:\n"
          "   width  density   distance   of the least")
    for n in sorted({max(dense, min(weights, round(best * 2.0 ** (k / 2)))) for k in range(-4, 5)}):
        density = min(1.0, weights / (s.inputs * n))
        distance = least if n == best else kernels.kernel_distance(x, y, n, density, rtol=1e-3).mean()
        print(f"{n:8,} {density:8.2g} {distance:10.3g} {distance / least:14.2f}")


# ---------------------------------------------------------------------------------------------- figures

FIGURES = {
    "width": lab.Figure("accuracy over width at a fixed number of weights", width_runs, draw.width),
    "width_lr": lab.Figure("learning rates for width_tuned, chosen on held-out training images", width_lr_runs,
                           draw.width_lr),
    "width_tuned": lab.Figure("accuracy over width, the learning rate chosen for each width", width_tuned_runs,
                              draw.width_tuned),
    "fig5": lab.Figure("accuracy over width and last-layer connectivity at the base's number of weights", fig5_runs,
                       draw.fig5, fig5_paper),
    "fig8": lab.Figure("dense and sparse accuracy over width at 6,352 weights, NTK parameterisation", fig8_runs,
                       draw.fig8),
    "fig8b": lab.Figure("kernel distance at initialisation and test error over width at 6,352 weights", fig8b_runs,
                        draw.fig8b, compute=fig8b_compute),
    "optimum": lab.Figure("the best width as the Gaussian-process kernel predicts it and as measured, 15 times",
                          optimum_runs, draw_optimum.optimum, compute=optimum_compute),
    "optimum_lr": lab.Figure("learning rates for optimum, chosen on held-out training images", optimum_lr_runs,
                             draw_optimum.optimum_lr),
    "fig8_lr": lab.Figure("learning rates for fig8, chosen on held-out training images", fig8_lr_runs, draw.fig8_lr),
}

EXPERIMENT = lab.Experiment(
    "mlp_mnist", __file__, __doc__, Settings, load, train, FIGURES,
    quick=dict(epochs=30, seeds=1, jobs=2),
    quick_help="30 epochs; without --width the figure `width`, trained and drawn",
    quick_figure="width",
    figures_choose=dict.fromkeys(("width", "dense"), "widths of their own"),
    actions={"best-width": ("say at which width the Gaussian-process kernel of a first layer of N weights is nearest "
                            "to infinite width, for images as --data, --limit, --pixelwise and --side make them", "N",
                            best_width)},
)

if __name__ == "__main__":
    sys.exit(lab.main(EXPERIMENT))
