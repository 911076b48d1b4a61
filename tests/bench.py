"""Speed beside PyTorch's, measured in one call so that only ratios matter:  python tests/bench.py mlp

Each implementation runs in a process of its own with 1 and with 2 threads; rounds alternate between them and the
best time of each counts. PyTorch (2.13, CPU) is needed here and nowhere else.
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

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, 1, 28, 28), np.uint8)
    labels = rng.integers(0, 10, EXAMPLES)
    dataset = data.Dataset("random", 10, images, labels, images, labels, np.float32([1]), np.float32([0]))
    batches = dataset.train_batches(BATCH, seed=0, epoch=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
    nn.sparsify(model, BUDGET, seed=0)
    optimizer = nn.SGD(model.parameters(), lr=0.1)

    def step():
        x, y = next(batches)
        nn.cross_entropy(model(nn.Tensor(x)), y).backward()
        optimizer.step()
        optimizer.zero_grad()

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


if __name__ == "__main__":
    if sys.argv[1:] == ["mlp"]:
        mlp()
    elif len(sys.argv) == 4 and sys.argv[1] == "worker":
        worker(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(__doc__)
