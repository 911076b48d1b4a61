"""One hidden layer on MNIST: is a wider network better if it keeps the same number of weights? (Figures 5 and 8)

    python exp_mlp_mnist.py --width 80                      one network of width 80 with the weights of width 5
    python exp_mlp_mnist.py --sweep width --jobs 2          accuracy over width at 3,970 weights, dense beside sparse
    python exp_mlp_mnist.py --sweep fig5 --jobs 2           Figure 5: width and last-layer connectivity, 3,970 weights
    python exp_mlp_mnist.py --sweep fig8_lr, then fig8      Figure 8a: learning rates, then dense and sparse, 6,352
    python exp_mlp_mnist.py --plot fig8b                    Figure 8b: the kernel's distance from infinite width
    python exp_mlp_mnist.py --plot fig5                     a figure and its table from what is done

Measured: 90.2 % at width 5, 95.9 % at width 80 (3,970 weights, 100 epochs, 3 seeds; the paper: about 90, best 96.3).
In Figure 8 the test error is least at width 128, the exact kernel distance at 216, with rank correlation 0.86.
"""

import math
import sys
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

import command
import data
import figures
import kernels
import nn
import train
from figures import over_seeds, shown, subject
from train import percent, setting

INPUTS, CLASSES = 784, 10  # of every data set here: 28 x 28 pixels, ten digits


@dataclass(frozen=True)
class Settings(train.Settings):
    """The protocol of Figure 5 unless changed: SGD, batch 100, learning rate 0.1, 300 epochs, biases."""

    data: str = setting("mnist", "data set", choices=("mnist", "synthetic"))
    width: int = setting(80, "hidden units", least=1)
    base_width: int = setting(5, "the network keeps as many weights as a dense one of this width", least=1)
    dense: bool = setting(False, "keep all weights of this width instead")
    last: float | None = setting(None, "connectivity of the last layer, 0 to 1 (default: as --how says)", least=0)
    how: str = setting("largest-first", "which layers lose weights", choices=("largest-first", "proportional"))
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
            raise train.UsageError(f"width {self.width} cannot keep the weights of the wider base {self.base_width}; "
                                   "choose a --width of at least the --base-width, or --dense")
        if self.last is not None and self.last > 1:
            raise train.UsageError(f"--last is a fraction of at most 1, not {self.last}")
        if self.last is not None and self.how != "largest-first":
            raise train.UsageError(f"--last fixes what each layer keeps, so --how {self.how} has nothing to decide")
        if self.kept and self.kept[1] < 1:
            raise train.UsageError(f"--last {self.last} at width {self.width} keeps none of the last layer's "
                                   f"{CLASSES * self.width:,} weights")
        if not self.possible():
            raise train.UsageError(f"--last {self.last} at width {self.width} leaves {self.kept[0]:,} of "
                                   f"{self.budget:,} weights to a first layer of {INPUTS * self.width:,}")


# ---------------------------------------------------------------------------------------------- data and model


def load(s):
    dataset = data.load(s.data, s.data_dir)
    dataset = s.part_of(dataset)
    return dataset.standardized_by_pixel() if s.pixelwise else dataset


def build(s, dataset):
    """MLP with one hidden layer, its masks and weights drawn from the seed."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(INPUTS, s.width, bias=s.bias, ntk=s.ntk),
        *([nn.ReLU()] if s.activation == "relu" else []),
        nn.Linear(s.width, CLASSES, bias=s.bias, ntk=s.ntk),
    )
    nn.sparsify(model, s.budget, s.seed, how=s.how, kept=s.kept)
    return model


# ---------------------------------------------------------------------------------------------- figures

FIG5_WIDTHS = (5, 10, 20, 40, 80, 160, 320, 640)
FIG5_LAST = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FIG8_WIDTHS = (8, 32, 128, 216, 328, 512, 635)
FIG8_RATES = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
FIG8_LR = {  # (dense, width): chosen by fig8_lr
    (True, 8): 32.0, (True, 32): 128.0, (True, 128): 256.0, (True, 216): 256.0, (True, 328): 256.0, (True, 512): 256.0,
    (True, 635): 256.0, (False, 32): 64.0, (False, 128): 1024.0, (False, 216): 512.0, (False, 328): 2048.0,
    (False, 512): 1024.0, (False, 635): 1024.0,
}


def fig5_runs(s):
    cells = [replace(s, width=w, last=c, activation=a)
             for a in ("relu", "linear") for w in FIG5_WIDTHS for c in FIG5_LAST]
    return over_seeds(s, [cell for cell in cells if cell.possible()], 1)


def fig5_paper(s):
    return "about 90 %" if (s.data, s.activation, s.width, s.base_width) == ("mnist", "relu", 5, 5) else None


def fig5_draw(points, metric):
    """Heat maps over width and last-layer connectivity, the best cell starred, impossible cells empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    values = {(p.settings.activation, p.settings.width, p.settings.last): 100 * p.mean(f"{metric}_test_acc")
              for p in points}
    low, high = np.nanmin(list(values.values())), np.nanmax(list(values.values()))
    low = max(low, high - 12)  # a few starved cells would take all the colours
    summary = []
    stated = {"relu": "96.3 % at width 80 or 160", "linear": "92.7 % at width 40"}
    ours = (points[0].settings.data, points[0].settings.base_width) == ("mnist", 5)  # as in the paper
    for ax, activation in zip(axes, ("relu", "linear")):
        grid = np.array([[values.get((activation, w, c), np.nan) for w in FIG5_WIDTHS] for c in FIG5_LAST])
        image = ax.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
        for (row, column), value in np.ndenumerate(grid):
            if (activation, FIG5_WIDTHS[column], FIG5_LAST[row]) in values and not np.isfinite(value):
                ax.text(column, row, "missing", ha="center", va="center", fontsize=7, color="gray")
            if np.isfinite(value):
                ax.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                        color="black" if value > (low + high) / 2 else "white")
        name = {"relu": "ReLU", "linear": "linear"}[activation]
        if np.isfinite(grid).any():
            row, column = np.unravel_index(np.nanargmax(grid), grid.shape)
            ax.plot(column + 0.36, row + 0.3, "*", color="red", markersize=8, markeredgewidth=0)
            summary.append(f"{name}: best {grid[row, column]:.2f} % at width {FIG5_WIDTHS[column]} and last-layer "
                           f"connectivity {FIG5_LAST[row]}" + (f"; the paper: {stated[activation]}" if ours else ""))
        ax.set_title(name + (f" (the paper's best: {stated[activation]})" if ours else ""), fontsize=10)
        ax.set_xticks(range(len(FIG5_WIDTHS)), FIG5_WIDTHS)
        ax.set_yticks(range(len(FIG5_LAST)), FIG5_LAST)
        ax.set_xlabel("width")
    axes[0].set_ylabel("connectivity of the last layer")
    figure.colorbar(image, ax=axes, label="test accuracy, %", extend="min")
    figure.suptitle(f"{subject(points)}, {points[0].settings.budget:,} weights: {shown(points, metric)}")
    return figure, summary


def width_runs(s):
    """Accuracy over width at the base's number of weights, and of dense networks of the same widths."""
    widths = [w for w in FIG5_WIDTHS if s.base_width < w <= 320]
    sparse = [replace(s, width=w, dense=False) for w in (s.base_width, *widths)]
    return over_seeds(s, sparse + [replace(s, width=w, dense=True) for w in widths], 3)


def fig8_at(s, width, dense, lr=None):
    """One network of Figure 8: no biases, NTK parameterisation, 2,048 training images, batch 256, last layer dense.

    The width 8 that fixes the number of weights is dense and sparse at once.
    """
    dense = dense or width == 8
    return replace(s, width=width, base_width=8, dense=dense, last=None if dense else 1.0, bias=False, ntk=True,
                   pixelwise=True, limit=2048, batch=256, lr=FIG8_LR[dense, width] if lr is None else lr)


def fig8_networks():
    return [(w, dense) for dense in (True, False) for w in FIG8_WIDTHS if dense or w > 8]


def fig8_runs(s):
    missing = [w for w, dense in fig8_networks() if (dense, w) not in FIG8_LR]
    if missing:
        raise train.UsageError(f"no tuned learning rate for widths {missing}")
    return over_seeds(s, [fig8_at(s, w, dense) for w, dense in fig8_networks()], 10)


def fig8_lr_runs(s):
    """Every learning rate for every network of Figure 8, tested on training images that are not trained on."""
    runs = [fig8_at(replace(s, held_out=5000), w, dense, lr) for w, dense in fig8_networks() for lr in FIG8_RATES]
    return over_seeds(s, runs, 2)


def tuned(points, metric="best"):
    """{(dense, width): the learning rate of the highest mean accuracy on held-out images, with no seed diverged}"""
    best = {}
    for p in (p for p in points if len(p.finished) == len(p.results)):
        key, accuracy = (p.settings.dense, p.settings.width), p.mean(f"{metric}_test_acc")
        if math.isfinite(accuracy) and accuracy > best.get(key, (-1, None))[0]:
            best[key] = accuracy, p.settings.lr
    return {key: lr for key, (_, lr) in best.items()}


def lines_draw(points, metric, title):
    """Accuracy over width, dense and sparse, with standard deviations over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    base = points[0].settings.base_width
    budget = (INPUTS + CLASSES) * base
    done = [p for p in points if p.finished]
    summary = []
    for dense, label, style in ((False, f"sparse: {budget:,} weights at every width", "o-"),
                                (True, "dense: all weights of its width", "s--")):
        line = sorted((p for p in done if p.settings.dense == dense or p.settings.width == base),
                      key=lambda p: p.settings.width)
        if not line:
            continue
        widths = [p.settings.width for p in line]
        means = [100 * p.mean(f"{metric}_test_acc") for p in line]
        ax.errorbar(widths, means, [100 * p.std(f"{metric}_test_acc") for p in line], fmt=style, capsize=3,
                    label=label, color="C0" if not dense else "C7")
        top = int(np.argmax(means))
        summary.append(f"{label}: best {means[top]:.2f} % at width {widths[top]}, "
                       f"{means[0]:.2f} % at width {widths[0]}")
    ax.set_xscale("log")
    widths = sorted({p.settings.width for p in done})
    ax.set_xticks(widths, widths, fontsize=8)
    top = max(100 * p.mean(f"{metric}_test_acc") for p in done)
    for p in done:  # one starved network must not flatten the picture of the others
        value = 100 * p.mean(f"{metric}_test_acc")
        if value < top - 15:
            ax.set_ylim(top - 11, top + 1)
            ax.annotate(f"{value:.0f} %", (p.settings.width, top - 10.9), (0, 14), textcoords="offset points",
                        ha="center", color="C0", arrowprops=dict(arrowstyle="->", color="C0"))
    ax.minorticks_off()
    ax.set(xlabel="width (hidden units)", ylabel=f"{metric} test accuracy, %")
    ax.grid(alpha=0.3)
    ax.legend()
    bars = "; bars: standard deviation over seeds" if any(len(p.finished) > 1 for p in points) else ""
    ax.set_title(f"{title}\n{shown(points, metric)}{bars}", fontsize=10)
    return figure, summary


def width_draw(points, metric):
    return lines_draw(points, metric, f"{subject(points)}: wider at a fixed number of weights")


def fig8_draw(points, metric):
    return lines_draw(points, metric, f"Figure 8a. {subject(points)}: NTK parameterisation, tuned learning rates")


def fig8_lr_draw(points, metric):
    """Accuracy on held-out images over the learning rate, a line a network, the chosen rate marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    chosen = tuned(points, metric)
    top = max((p.mean(f"{metric}_test_acc") for p in points if p.finished), default=1)
    for ax, dense in zip(axes, (True, False)):
        for i, width in enumerate(FIG8_WIDTHS):
            line = [p for p in points if (p.settings.dense, p.settings.width) == (dense, width) and p.results]
            if (dense, width) not in chosen:
                continue
            means = [100 * p.mean(f"{metric}_test_acc") for p in line]
            rates = [p.settings.lr for p in line]
            below = f", below: {np.nanmax(means):.0f} %" if np.nanmax(means) < 100 * top - 9 else ""
            ax.plot(rates, means, "o-", color=f"C{i}", label=f"width {width}{below}")
            rate = chosen[dense, width]
            ax.plot(rate, means[rates.index(rate)], "*", color=f"C{i}", markersize=14)
        ax.set_xscale("log", base=2)
        ax.set_xticks(FIG8_RATES, [f"{r:g}" for r in FIG8_RATES])
        ax.set(title="dense" if dense else "sparse, 6,352 weights", xlabel="learning rate",
               ylim=(100 * top - 9, 100 * top + 1))
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8, loc="lower center", ncols=2)
    axes[0].set_ylabel("accuracy on held-out training images, %")
    figure.suptitle(f"{subject(points)}: {shown(points, metric).replace('test', 'held-out')}; stars: chosen")
    return figure, [f"FIG8_LR = {chosen}"]


KERNEL_WIDTHS = (8, 16, 32, 48, 64, 90, 128, 160, 216, 270, 328, 400, 512, 580, 620, 635)
KERNEL_PAIRS, KERNEL_SEEDS = 1000, 10


def fig8b_runs(s):
    """The sparse networks of Figure 8."""
    return [run for run in fig8_runs(s) if not run.dense or run.width == 8]


def measured_distances(s, width, density, x, y, infinite):
    """Mean squared distances from the infinite kernel over pairs x, y (pairs, INPUTS), of networks before training:
    [mean, deviation] over the networks of Figure 8, and over networks that keep each weight independently, as the
    theory has it.
    """
    trained, independent = [], []
    for seed in range(s.seed, s.seed + KERNEL_SEEDS):
        u = nn.to_host(build(replace(fig8_at(s, width, False, lr=1.0), seed=seed), None)[1].weight.data)
        theta = (np.maximum(x @ u.T, 0) * np.maximum(y @ u.T, 0)).sum(1) / (width * INPUTS)
        trained.append(np.mean((theta - infinite) ** 2))
        theta = kernels.measured_kernel(x, y, width, density, nn.generator(seed, "kernel", width)).diagonal()
        independent.append(np.mean((theta - infinite) ** 2))
    return [[float(np.mean(d)), float(np.std(d, ddof=1))] for d in (trained, independent)]


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

    def density(width):
        return min(1.0, fig8_at(s, width, False, lr=1.0).kept[0] / (INPUTS * width)) if width > 8 else 1.0

    def mean_and_error(values):
        return [float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)]

    names = ("exact", "bias", "variance", "series", "raw", "measured", "measured independent")
    result = {"pairs": KERNEL_PAIRS, "networks": KERNEL_SEEDS, "widths": KERNEL_WIDTHS,
              "densities": [density(n) for n in KERNEL_WIDTHS],
              "formula": [float(kernels.kernel_distance_formula(n, density(n), INPUTS)) for n in KERNEL_WIDTHS],
              **{name: [] for name in names}}
    infinite = kernels.relu_moment(INPUTS, INPUTS, (x * y).sum(1), order=1) / INPUTS  # (pairs,)
    for n in tqdm(KERNEL_WIDTHS, desc="kernel distance", disable=None, leave=False):
        bias, variance = kernels.kernel_distance(x, y, n, density(n), split=True, rtol=1e-5)
        series = kernels.kernel_distance(x, y, n, density(n), method="series")
        for name, values in zip(names, (bias + variance, bias, variance, series, raw * (bias + variance))):
            result[name].append(mean_and_error(values))
        trained, independent = measured_distances(s, n, density(n), x, y, infinite)
        result["measured"].append(trained)
        result["measured independent"].append(independent)
    prediction = kernels.gp_predict(kernels.infinite_kernel(train_x), dataset.train_labels,
                                    kernels.infinite_kernel(test_x, train_x), rng=nn.generator(s.seed, "gp"))
    result |= {"gp_test_acc": float(np.mean(prediction.labels == dataset.test_labels)), "gp_noise": prediction.noise,
               "gp_held_out_acc": prediction.held_out_accuracy}
    return result


def fig8b_draw(points, metric, computed):
    """Kernel distance and test error over width on two axes, with their minima."""
    from matplotlib.figure import Figure
    from scipy.stats import spearmanr

    figure = Figure(figsize=(8, 5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    widths = np.array(computed["widths"])
    summary = []
    exact = np.array(computed["exact"])[:, 0]
    for name, label, style in (("exact", "exact (Theorem 1)", "C0-"), ("series", "series", "C2--"),
                               ("measured", f"measured, {computed['networks']} networks", "C1o"),
                               ("formula", "the paper's Eq. 4", "C3:")):
        values = np.array(computed[name])
        mean, error = (values[:, 0], values[:, 1]) if values.ndim == 2 else (values, None)
        left.errorbar(widths, mean, error, fmt=style, capsize=2, label=f"{label}: least at {widths[mean.argmin()]}",
                      markersize=4)
        summary.append(f"kernel distance, {label}: least at width {widths[mean.argmin()]} "
                       f"({mean.min():.3g}; exact there {exact[mean.argmin()]:.3g})")
    done = sorted((p for p in points if p.finished), key=lambda p: p.settings.width)
    trained = np.array([p.settings.width for p in done])
    errors = np.array([100 - 100 * p.mean(f"{metric}_test_acc") for p in done])
    right.errorbar(trained, errors, [100 * p.std(f"{metric}_test_acc") for p in done], fmt="ks-", capsize=3,
                   label=f"test error: least at {trained[errors.argmin()]}")
    right.axhline(100 - 100 * computed["gp_test_acc"], color="gray", linestyle="-.",
                  label=f"infinite width (Gaussian process): {100 - 100 * computed['gp_test_acc']:.2f} %")
    at_trained = [exact[list(widths).index(n)] for n in trained]
    learned = errors < 50  # at the last width next to nothing is learned, with or without a kernel
    rank, rank_learned = (spearmanr(np.array(at_trained)[use], errors[use]).statistic if use.sum() > 2 else math.nan
                          for use in (errors >= 0, learned))
    summary += [f"test error of the trained networks: least at width {trained[errors.argmin()]} ({errors.min():.2f} %)",
                f"rank correlation of exact kernel distance and test error over {len(trained)} widths: {rank:.2f}; "
                f"over the {learned.sum()} whose error is below 50 %: {rank_learned:.2f}",
                f"Gaussian process with the infinite-width kernel: test accuracy {percent(computed['gp_test_acc'])}"]
    for value, colour in ((widths[exact.argmin()], "C0"), (trained[errors.argmin()], "k")):
        left.axvline(value, color=colour, alpha=0.3, linewidth=4)
    left.set(xscale="log", yscale="log", xlabel="width (hidden units)", ylim=(exact.min() / 2, exact[0] * 20),
             ylabel="mean squared distance of the kernel from infinite width")
    left.set_xticks(FIG8_WIDTHS, FIG8_WIDTHS, fontsize=8)
    left.minorticks_off()
    least = 100 - 100 * computed["gp_test_acc"]
    right.set(ylabel=f"test error, % ({metric} epoch)", ylim=(least - 2, least + 14))
    for n, error in zip(trained, errors):  # one starved network must not flatten the picture of the others
        if error > least + 14:
            right.annotate(f"{error:.0f} %", (n, least + 13.9), (-70, -6), textcoords="offset points", ha="right",
                           arrowprops=dict(arrowstyle="->"))
    handles = [h for ax in (left, right) for h in zip(*ax.get_legend_handles_labels())]
    left.legend(*zip(*handles), fontsize=8, loc="upper center")
    figure.suptitle(f"Figure 8b. {subject(points)}, {points[0].settings.budget:,} weights; rank correlation "
                    f"{rank:.2f} ({rank_learned:.2f} without the last width)\n"
                    f"{shown(points, metric)}, bars: deviation over seeds; kernel: {computed['pairs']:,} pairs,\n"
                    "bars: standard error over pairs (theory), deviation over networks (measured)", fontsize=9)
    return figure, summary


EXPERIMENT = train.Experiment(
    name="mlp_mnist",
    script="exp_mlp_mnist.py",
    description=__doc__,
    settings=Settings,
    load=load,
    build=build,
    optimizer=lambda s, params: nn.SGD(params, s.lr),
    schedule=lambda s: nn.ConstantLR(s.lr),
    together=("seed", "base_width", "dense", "last", "how", "lr"),
    figures={
        "width": figures.Figure("accuracy over width at a fixed number of weights", width_runs, width_draw),
        "fig5": figures.Figure("accuracy over width and last-layer connectivity at the base's number of weights",
                               fig5_runs, fig5_draw, fig5_paper),
        "fig8": figures.Figure("dense and sparse accuracy over width at 6,352 weights, NTK parameterisation", fig8_runs,
                               fig8_draw),
        "fig8b": figures.Figure("kernel distance at initialisation and test error over width at 6,352 weights",
                                fig8b_runs, fig8b_draw, compute=fig8b_compute),
        "fig8_lr": figures.Figure("learning rates for fig8, chosen on held-out training images", fig8_lr_runs,
                                  fig8_lr_draw),
    },
    figures_ignore=dict.fromkeys(("width", "dense"), "widths of their own"),
    quick=dict(epochs=30, seeds=1, jobs=2),
    quick_help="30 epochs; without --width the figure `width`, trained and drawn",
    quick_figure="width",
)

if __name__ == "__main__":
    sys.exit(command.main(EXPERIMENT))
