"""Speed on a CPU, measured in one call so that only ratios matter (gpu.py: on a GPU).

    python bench/cpu.py mlp                a training step of the MLP beside PyTorch's (2.13, CPU)
    python bench/cpu.py resnet             a training step of ResNet-18 beside PyTorch's; --layers: layer by layer
    python bench/cpu.py sparse [BASE ...]  ResNet-18 with the weights of width BASE (8) beside all, and PyTorch's
    python bench/cpu.py kernel             the sparse kernel, and the infinite one beside neural-tangents (JAX)
    python bench/cpu.py loader [FOLDER]    training crops of photographs a second, by threads; of FOLDER's JPEGs
    python bench/cpu.py allreduce          ResNet-18 on two ranks: the time to average gradients, scaling efficiency
    python bench/cpu.py imagenet           a training step at 224 x 224, and the arithmetic of Table 1

Each implementation runs in a process of its own. `mlp` gives each 1 and 2 threads, alternates rounds between all and
takes the best time of each; `resnet` gives each all cores. NEURAL_TANGENTS=PYTHON names the Python of an environment
that has neural-tangents.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # pytorch_models.py is the tests'
WIDTHS = (5, 80, 320, 640)
BUDGET, BATCH, EXAMPLES, STEPS, ROUNDS = 3970, 100, 60_000, 300, 5


def ours(width):
    """The training step of exp_mlp_mnist.py: gather a batch, forward, backward, update."""
    import numpy as np

    import datasets
    import nn
    from datasets.dataset import Arrays

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, 1, 28, 28), np.uint8)
    labels = rng.integers(0, 10, EXAMPLES)
    half = Arrays(images, labels)
    dataset = datasets.Dataset("random", 10, half, half)
    batches = dataset.train_batches(BATCH, seed=0, epoch=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
    nn.sparsify(model, BUDGET, seed=0)
    optimizer = nn.SGD(model.parameters(), lr=0.1)

    return lambda: train_step(model, optimizer, *next(batches))


def train_step(model, optimizer, x, labels, average=lambda model: None):
    import nn

    loss, _ = nn.classify(model(nn.Tensor(x)), labels)
    loss.backward()
    average(model)
    optimizer.step()
    optimizer.zero_grad()


def pytorch(width):
    """The same step as its users write it, with gradients masked before the update."""
    import torch
    from pytorch_models import mlp
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    images, labels = torch.randn(EXAMPLES, 784), torch.randint(0, 10, (EXAMPLES,))
    model = mlp(width)
    first, last = model[0].weight, model[2].weight
    level = min(BUDGET - min(last.numel(), BUDGET // 2), first.numel())
    masks = []
    for w, kept in ((first, level), (last, min(BUDGET - level, last.numel()))):
        mask = torch.zeros(w.numel())
        mask[torch.randperm(w.numel())[:kept]] = 1
        masks.append((w, mask.view_as(w)))
    with torch.no_grad():
        for w, mask in masks:
            w *= mask
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = iter(torch.randperm(EXAMPLES).split(BATCH))

    def step():
        index = next(order)
        optimizer.zero_grad()
        cross_entropy(model(images[index]), labels[index]).backward()
        for w, mask in masks:
            w.grad *= mask
        optimizer.step()

    return step


def worker(name, width):
    """Answer every line on standard input with the microseconds of one step, the mean over STEPS of them."""
    step = {"ours": ours, "pytorch": pytorch}[name]
    for _ in sys.stdin:
        run = step(width)
        for _ in range(50):
            run()
        start = time.perf_counter()
        for _ in range(STEPS):
            run()
        print((time.perf_counter() - start) / STEPS * 1e6, flush=True)


def start(name, width, threads):
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads))
    return subprocess.Popen([sys.executable, __file__, "worker", name, str(width)], env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def mlp():
    print(f"MLP, {BUDGET:,} weights, batch {BATCH}: microseconds a step, best of {ROUNDS} rounds of {STEPS}")
    print(f"{'width':>5} {'ours':>7} {'(threads)':>9} {'PyTorch':>8} {'(threads)':>9} {'ratio':>6}")
    for width in WIDTHS:
        workers = {(name, threads): start(name, width, threads)
                   for name in ("ours", "pytorch") for threads in (1, 2)}
        best = {key: float("inf") for key in workers}
        for _ in range(ROUNDS):
            for key, process in workers.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                best[key] = min(best[key], float(process.stdout.readline()))
        for process in workers.values():
            process.stdin.close()
            process.wait()
        us, threads = min((best["ours", t], t) for t in (1, 2))
        their_us, their_threads = min((best["pytorch", t], t) for t in (1, 2))
        print(f"{width:5} {us:7.0f} {threads:9} {their_us:8.0f} {their_threads:9} {us / their_us:6.2f}")


# ---------------------------------------------------------------------------------------------- ResNet-18

RESNET_WIDTHS, RESNET_BATCH, RESNET_ROUNDS = (8, 18, 32, 64), 128, 4
IMPLEMENTATIONS = ("ours", "NCHW", "channels_last")  # the last two are PyTorch's memory formats


def resnet_ours(width, base):
    """The training step of exp_resnet_cifar.py on one batch, with the weights of width `base`."""
    import exp_resnet_cifar

    settings = exp_resnet_cifar.Settings(width=width, base_width=base)
    return training_step(exp_resnet_cifar.build(settings, classes=10), RESNET_BATCH, 32)


def training_step(model, batch, side):
    """A function that trains this network for one step on a random batch of images."""
    import numpy as np

    import nn

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((batch, 3, side, side), np.float32), rng.integers(0, 10, batch)
    optimizer = nn.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return lambda *average: train_step(model, optimizer, x, y, *average)


def resnet_pytorch(width, memory_format):
    import torch
    from pytorch_models import resnet18
    from torch.nn.functional import cross_entropy

    model = resnet18(width).to(memory_format=memory_format)
    x = torch.randn(RESNET_BATCH, 3, 32, 32).to(memory_format=memory_format)
    y = torch.randint(0, 10, (RESNET_BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step():
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def resnet_step(name, width):
    """The function that does a training step; name: of IMPLEMENTATIONS, or a base width in digits."""
    if name == "ours" or name.isdecimal():
        return resnet_ours(width, width if name == "ours" else int(name))
    import torch

    return resnet_pytorch(width, torch.contiguous_format if name == "NCHW" else torch.channels_last)


def layer_steps(name, width):
    """{layer: the function that computes its output and all gradients}, for each kind of convolution in ResNet-18."""
    layers = {"stem": (3, width, 32, 3, 1)}
    for stage in range(4):
        channels, side = width << stage, 32 >> stage
        if stage:
            layers[f"{channels // 2}->{channels}, {2 * side}/2"] = channels // 2, channels, 2 * side, 3, 2
            layers[f"{channels // 2}->{channels}, {2 * side}/2, 1x1"] = channels // 2, channels, 2 * side, 1, 2
        layers[f"{channels}->{channels}, {side}"] = channels, channels, side, 3, 1
    return {layer: layer_step(name, *sizes) for layer, sizes in layers.items()}


def layer_step(name, channels_in, channels, side, k, stride):
    shape_in = RESNET_BATCH, channels_in, side, side
    shape_out = RESNET_BATCH, channels, side // stride, side // stride
    inner = channels_in > 3  # the network's own input needs no gradient
    if name == "ours":
        import numpy as np

        from engines import convolution, host

        x, g = host.empty(shape_in, np.float32), host.empty(shape_out, np.float32)
        x[...], g[...] = 1, 1
        w = np.ones((channels, channels_in, k, k), np.float32)

        def step():
            convolution.forward(x, w, stride, k // 2)
            convolution.weight_gradient(g, x, w.shape, stride, k // 2)
            if inner:
                convolution.input_gradient(g, w, x.shape, stride, k // 2)

        return step
    import torch

    memory_format = torch.contiguous_format if name == "NCHW" else torch.channels_last
    x = torch.ones(shape_in).to(memory_format=memory_format).requires_grad_(inner)
    w = torch.ones(channels, channels_in, k, k).to(memory_format=memory_format).requires_grad_()
    g = torch.ones(shape_out).to(memory_format=memory_format)
    return lambda: torch.nn.functional.conv2d(x, w, stride=stride, padding=k // 2).backward(g)


def best_of(step, seconds):
    """The least time of a call within about this many seconds, after one call to warm up."""
    step()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return min(times)


def resnet_worker(name, width, layers):
    """Answer every line on standard input with the least seconds of a step and the peak memory in MB, or with the
    seconds of every layer.
    """
    import resource

    steps = layer_steps(name, width) if layers else {"step": resnet_step(name, width)}
    for _ in sys.stdin:
        found = {key: best_of(step, 0.3 if layers else 3) for key, step in steps.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        print(json.dumps([found, peak]), flush=True)


def timed(names, width, layers="", rounds=RESNET_ROUNDS):
    """({(name, layer): least seconds}, {name: peak MB}) of these implementations, each a process, in turn; a process
    begins with its first round and ends with its last.
    """
    import importlib.util
    if importlib.util.find_spec("torch") is None:
        sys.exit("PyTorch is not here to compare with: pip install torch==2.13.0")
    workers, seconds, peak = {}, {}, {}
    for left in reversed(range(rounds)):
        for name in names:
            if name not in workers:
                words = [sys.executable, __file__, "resnet-worker", name, str(width), layers]
                workers[name] = subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            process = workers[name]
            process.stdin.write("go\n")
            process.stdin.flush()
            found, peak[name] = json.loads(process.stdout.readline())
            for key, value in found.items():
                seconds[name, key] = min(value, seconds.get((name, key), value))
            if not left:
                process.stdin.close()
                process.wait()
    return seconds, peak


def resnet(layers):
    what = "all gradients of each convolution" if layers else "a training step"
    print(f"ResNet-18, batch {RESNET_BATCH}, {os.cpu_count()} cores: {what}, best of {RESNET_ROUNDS} rounds")
    print("milliseconds: ours, PyTorch NCHW, channels_last, ratio to the better"
          + ("" if layers else "; peak memory of the process in MB: ours, that format's, ratio"))
    for width in RESNET_WIDTHS:
        seconds, peak = timed(IMPLEMENTATIONS, width, layers)
        for key in [key for name, key in seconds if name == "ours"]:
            ours, *theirs = (1000 * seconds[name, key] for name in IMPLEMENTATIONS)
            line = f"{ours:8.1f} {theirs[0]:8.1f} {theirs[1]:8.1f} {ours / min(theirs):6.2f}"
            better = IMPLEMENTATIONS[1 + theirs.index(min(theirs))]
            print(f"width {width:3} {key if layers else '':22} {line}"
                  + ("" if layers else f"  {peak['ours']:7.0f} {peak[better]:7.0f} {peak['ours'] / peak[better]:6.2f}"),
                  flush=True)


SPARSE_WIDTHS = 8, 18, 32, 64, 128, 256


def sparse(bases):
    """How the cost grows with the width where the weights do not; a picture of it goes to results/."""
    import exp_resnet_cifar
    from engines.sparse import numba_loops

    how = f"batch {RESNET_BATCH}, {os.cpu_count()} cores, {'with' if numba_loops() else 'without'} Numba"
    print(f"ResNet-18, {how}: milliseconds a training step, dense and with the weights of width "
          f"{' and '.join(map(str, bases))}; PyTorch's is dense, in the faster of two memory formats")
    rows = []
    for width in SPARSE_WIDTHS:
        bases_now = [str(base) for base in bases if base < width]
        names, rounds = (*bases_now, *IMPLEMENTATIONS), 2 if width < 256 else 1
        seconds, peak = timed(names, width, rounds=rounds)
        theirs = min(IMPLEMENTATIONS[1:], key=lambda name: seconds[name, "step"])
        row = {"width": width, "dense": seconds["ours", "step"], "PyTorch": seconds[theirs, "step"]}
        print(f"width {width:3}: dense {1000 * row['dense']:7.0f} (of PyTorch's {1000 * row['PyTorch']:7.0f}: "
              f"{row['dense'] / row['PyTorch']:.2f}; {peak['ours']:.0f} MB, of {peak[theirs]:.0f}: "
              f"{peak['ours'] / peak[theirs]:.2f})", flush=True)
        for name in bases_now:
            row[name] = seconds[name, "step"]
            model = exp_resnet_cifar.build(exp_resnet_cifar.Settings(width=width, base_width=int(name)), classes=10)
            flop, whole = (RESNET_BATCH * operations(model, 32, kept) for kept in (True, False))
            print(f"  weights of width {name:>2}: {1000 * row[name]:7.0f} (of PyTorch's: "
                  f"{row[name] / row['PyTorch']:.2f}; {peak[name]:.0f} MB: {peak[name] / peak[theirs]:.2f}); "
                  f"{flop / 1e9:.1f} GFLOP of kept weights, {flop / row[name] / 1e9:.0f} GFLOP/s, "
                  f"{flop / row[name] / (whole / row['dense']):.0%} of what the dense step reaches", flush=True)
        rows.append(row)
    draw_sparse(rows, bases, how)


def draw_sparse(rows, bases, how):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for name, label in (("PyTorch", "PyTorch, all weights"), ("dense", "ours, all weights"),
                        *((str(base), f"ours, the weights of width {base}") for base in bases)):
        shown = [row for row in rows if name in row]
        axes.plot([row["width"] for row in shown], [row[name] for row in shown], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="width", ylabel="seconds a training step",
             title=f"ResNet-18, 32 x 32 images, {how}")
    axes.set_xticks(SPARSE_WIDTHS, map(str, SPARSE_WIDTHS))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(ROOT / "results" / "bench_sparse.png", dpi=150)


# ---------------------------------------------------------------------------------------------- kernel


def best(work, rounds):
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def standardized_images(count, rng, d=784):
    """Rows like MNIST with each pixel standardised: constant pixels, a background that all share, rare large values."""
    import numpy as np

    rate = rng.beta(0.3, 1, d)
    rate[:100] = 0
    ink = (rng.random((count, d)) < rate) * rng.uniform(0.2, 1, (count, d))
    deviation = np.sqrt(np.maximum(rate * 0.41 - (rate * 0.6) ** 2, 1e-3))
    return np.where(rate > 0, (ink - 0.6 * rate) / deviation, 0)


def kernel_worker(name):
    """Print the seconds of one job."""
    import numpy as np

    rng = np.random.default_rng(0)
    if name.startswith("neural-tangents"):
        import jax
        from neural_tangents import stax

        X = rng.standard_normal((10_000, 784), np.float32)
        Y = X.copy() if name.endswith("X, Y") else None
        kernel_fn = jax.jit(stax.serial(stax.Dense(1), stax.Relu())[2], static_argnames="get")
        print(best(lambda: kernel_fn(X, Y, get="nngp").block_until_ready(), 3))
        return
    import kernels

    if name.startswith("exact"):
        X, Y = standardized_images(60, rng).reshape(2, 30, 784)
        print(best(lambda: kernels.sparse_moments(X, Y, float(name.split()[1])), 3))
    elif name == "series":
        X, Y = standardized_images(2048, rng), standardized_images(10_000, rng)
        print(best(lambda: kernels.series_moments(X, Y, 0.1), 2))
    else:
        X = rng.standard_normal((10_000, 784), np.float32)
        Y = None if name == "infinite X" else X.copy()
        print(best(lambda: kernels.infinite_kernel(X, Y), 3))


def kernel_seconds(name, one_core=False, python=sys.executable):
    """The seconds that a job took in a process of its own; None if it could not be run."""
    env = dict(os.environ, **({"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"} if one_core else {}))
    pin = (lambda: os.sched_setaffinity(0, {0})) if one_core and hasattr(os, "sched_setaffinity") else None
    done = subprocess.run([python, __file__, "kernel-worker", name], env=env, text=True, capture_output=True,
                          preexec_fn=pin)
    return float(done.stdout) if done.returncode == 0 else None


def kernel():
    for density in (8 / 635, 0.1):
        seconds = kernel_seconds(f"exact {density}", one_core=True)
        print(f"exact to 1e-6, d = 784, density {density:.4f}, one core: {30 / seconds:.0f} pairs a second")
    print(f"series, 2,048 x 10,000 pairs, d = 784: {kernel_seconds('series'):.1f} s")
    for pair, text in (("X", "X with itself"), ("X, Y", "X with Y")):
        ours = kernel_seconds(f"infinite {pair}")
        theirs = kernel_seconds(f"neural-tangents {pair}", python=os.environ.get("NEURAL_TANGENTS", sys.executable))
        ratio = f"{ours / theirs:.2f} of neural-tangents' {theirs:.2f} s" if theirs else "neural-tangents is not here"
        print(f"infinite kernel, 10,000 x 10,000 in float32, {text}: {ours:.2f} s, {ratio}")


# ---------------------------------------------------------------------------------------------- photographs


def loader(folder=None):
    """Training crops of 224 x 224 a second; without a folder, of drawn JPEGs of ImageNet's most common size."""
    import numpy as np
    from PIL import Image

    from datasets import photographs, trees

    with tempfile.TemporaryDirectory() as tree:
        for half in ("train", "val"):
            Path(tree, half, "class").mkdir(parents=True)
        rng = np.random.default_rng(0)
        sources = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in trees.SUFFIXES) if folder else []
        for i, source in enumerate(sources or range(100)):
            for half in ("train", "val"):
                path = Path(tree, half, "class", f"{i:04}.jpg")
                if folder:
                    path.symlink_to(source.resolve())
                elif half == "train":
                    coarse = rng.integers(0, 256, (47, 63, 3), np.uint8)
                    image = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.float32)
                    image += rng.normal(0, 10, image.shape)
                    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)
                else:
                    path.symlink_to(Path(tree, "train", "class", path.name))
        count = len(list(Path(tree, "train", "class").iterdir()))
        print(f"{count} photographs{f' of {folder}' if folder else ', drawn'}, {os.cpu_count()} cores")

        def pillow(path):
            with Image.open(path) as image:
                box = photographs.random_box(rng.random(22).tolist(), *image.size)
                image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR, box)

        paths = list(Path(tree, "train", "class").iterdir())
        alone = count / best(lambda: [pillow(path) for path in paths], 6)
        print(f"Pillow alone, 1 thread: {alone:6.0f} decoded, cropped and resized a second")
        for threads in (1, 2, 4):
            dataset = photographs.of_tree("bench", tree, 224, threads)
            rates = []
            for epoch in range(6):
                begin = time.perf_counter()
                for _ in dataset.train_batches(32, seed=0, epoch=epoch):
                    pass
                rates.append(count / (time.perf_counter() - begin))
            cores = min(threads, os.cpu_count())
            print(f"{threads} threads: {max(rates):6.0f} training crops a second, {max(rates) / cores:6.0f} a core",
                  flush=True)


IMAGENET_BATCH, IMAGENET_WIDTHS, IMAGENET_EPOCHS, IMAGENET_IMAGES = 16, (64, 90, 128, 181, 256), 150, 1_281_167
ASSUMED = 75e12, 300e12  # products and sums a second of one H100 in mixed precision: 8 and 30 % of its peak


def operations(model, side, kept=False):
    """Products and sums of a training step for one image: forward, and as many for each of the two gradients; kept: of
    the kept weights alone.
    """
    import numpy as np

    import nn

    total, forward = [], nn.engine.conv

    def counted(x, w, *how):
        y = forward(x, w, *how)
        total.append((np.count_nonzero(w) if kept else w.size) * y.shape[2] * y.shape[3])
        return y

    nn.engine.conv = counted
    try:
        model.eval()(nn.Tensor(np.zeros((1, 3, side, side), np.float32)))
    finally:
        nn.engine.conv = forward
        model.train()
    return 6 * (sum(total) + (model.classifier.weight.count if kept else model.classifier.weight.size))


def imagenet():
    import exp_resnet_imagenet

    print(f"ResNet-18 at 224 x 224, {os.cpu_count()} cores, dense, batch {IMAGENET_BATCH}; hours for {IMAGENET_EPOCHS} "
          f"epochs of ImageNet if one H100 did {' or '.join(f'{a / 1e12:.0f}' for a in ASSUMED)} TFLOP/s")
    print(f"{'width':>5} {'GFLOP an image':>14} {'step, s':>8} {'images/s':>8} {'GFLOP/s':>8} {'one H100, hours':>22}"
          f"{'eight':>16}")
    for width in IMAGENET_WIDTHS:
        model, measured = exp_resnet_imagenet.ResNet18(width, 1000), ""
        flop = operations(model, 224)
        if width <= 128:  # wider ones need more memory than a small machine has
            step = training_step(model, IMAGENET_BATCH, 224)
            step()
            seconds = best(step, 3)
            measured = (f"{seconds:8.2f} {IMAGENET_BATCH / seconds:8.1f} "
                        f"{IMAGENET_BATCH * flop / seconds / 1e9:8.0f}")
        hours = [flop * IMAGENET_IMAGES * IMAGENET_EPOCHS / speed / 3600 for speed in ASSUMED]
        print(f"{width:5} {flop / 1e9:14.1f} {measured or 26 * ' '} {hours[0]:13.0f} to {hours[1]:5.0f} "
              f"{hours[0] / 8:7.1f} to {hours[1] / 8:5.1f}", flush=True)


# ---------------------------------------------------------------------------------------------- ranks


def allreduce_worker(width):
    """On rank 0: print the seconds of a step on this rank's part of the batch, and of averaging alone."""
    import exp_resnet_cifar
    import nn
    from lab import processes

    ranks = processes.world()
    model = exp_resnet_cifar.ResNet18(width)
    nn.initialize(model, seed=0)
    step = training_step(model, RESNET_BATCH // ranks.size, 32)

    def average(model):
        ranks.average(model, 1 / ranks.size)

    step(average)
    timed = []
    for work in (lambda: step(average), lambda: average(model)):
        rounds = []
        for _ in range(5):
            ranks.broadcast(None)
            begin = time.perf_counter()
            work()
            rounds.append(time.perf_counter() - begin)
        timed.append(min(rounds))
    if ranks.rank == 0:
        print(json.dumps(timed))


def allreduce():
    mpirun = shutil.which("mpirun", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    env = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    print(f"ResNet-18 on 32 x 32, batch {RESNET_BATCH} in all, a thread each; milliseconds a step on one and two ranks")
    print("width   one rank  two ranks  efficiency   averaging alone")
    for width in RESNET_WIDTHS:
        best = {}
        for ranks in (1, 2, 1, 2):
            done = subprocess.run([mpirun, "-n", str(ranks), sys.executable, __file__, "allreduce-worker", str(width)],
                                  env=env, text=True, capture_output=True, check=True)
            best[ranks] = [min(pair) for pair in zip(json.loads(done.stdout), best.get(ranks, [math.inf] * 2))]
        (one, _), (two, averaging) = ([1000 * t for t in best[ranks]] for ranks in (1, 2))
        print(f"{width:5} {one:10.0f} {two:10.0f} {one / two / 2:11.2f} {averaging:10.1f} ({averaging / two:.1%})",
              flush=True)


if __name__ == "__main__":
    if sys.argv[1:] in (["mlp"], ["kernel"], ["allreduce"], ["imagenet"]):
        {"mlp": mlp, "kernel": kernel, "allreduce": allreduce, "imagenet": imagenet}[sys.argv[1]]()
    elif sys.argv[1:2] == ["loader"] and len(sys.argv) <= 3:
        loader(*sys.argv[2:])
    elif sys.argv[1:2] == ["sparse"] and all(word.isdecimal() for word in sys.argv[2:]):
        sparse(list(map(int, sys.argv[2:])) or [8])
    elif sys.argv[1:] in (["resnet"], ["resnet", "--layers"]):
        resnet("--layers" if len(sys.argv) == 3 else "")
    elif len(sys.argv) == 5 and sys.argv[1] == "resnet-worker":
        resnet_worker(sys.argv[2], int(sys.argv[3]), bool(sys.argv[4]))
    elif len(sys.argv) == 3 and sys.argv[1] == "allreduce-worker":
        allreduce_worker(int(sys.argv[2]))
    elif len(sys.argv) == 3 and sys.argv[1] == "kernel-worker":
        kernel_worker(sys.argv[2])
    elif len(sys.argv) == 4 and sys.argv[1] == "worker":
        worker(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(__doc__)
