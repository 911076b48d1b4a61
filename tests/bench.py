"""Speed, measured in one call so that only ratios matter.

    python tests/bench.py mlp       a training step of the MLP beside PyTorch's (2.13, CPU)
    python tests/bench.py kernel    the sparse kernel's methods; the infinite kernel beside neural-tangents' (JAX, CPU)

Each implementation runs in a process of its own. `mlp` gives each 1 and 2 threads, alternates rounds between all and
takes the best time of each. NEURAL_TANGENTS=PYTHON names the Python of an environment that has neural-tangents.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (5, 80, 320, 640)
BUDGET, BATCH, EXAMPLES, STEPS, ROUNDS = 3970, 100, 60_000, 300, 5


def ours(width):
    """The training step of exp_mlp_mnist.py: gather a batch, forward, backward, update."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import data
    import nn
    import train

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, 1, 28, 28), np.uint8)
    labels = rng.integers(0, 10, EXAMPLES)
    dataset = data.Dataset("random", 10, images, labels, images, labels, np.float32([1]), np.float32([0]))
    batches = dataset.train_batches(BATCH, seed=0, epoch=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
    nn.sparsify(model, BUDGET, seed=0)
    optimizer = nn.SGD(model.parameters(), lr=0.1)

    def step():
        train.train_step(model, optimizer, *next(batches))

    return step


def pytorch(width):
    """The same step as its users write it, with gradients masked before the update."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    images, labels = torch.randn(EXAMPLES, 784), torch.randint(0, 10, (EXAMPLES,))
    model = torch.nn.Sequential(torch.nn.Linear(784, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
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
    sys.path.insert(0, str(ROOT))
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


if __name__ == "__main__":
    if sys.argv[1:] in (["mlp"], ["kernel"]):
        {"mlp": mlp, "kernel": kernel}[sys.argv[1]]()
    elif len(sys.argv) == 3 and sys.argv[1] == "kernel-worker":
        kernel_worker(sys.argv[2])
    elif len(sys.argv) == 4 and sys.argv[1] == "worker":
        worker(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(__doc__)
