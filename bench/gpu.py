"""Speed on a GPU beside PyTorch's: `python bench/gpu.py [--all] [--layers]`.

Ours is a whole step: a batch put together on the GPU from a data set that lies there, with crops and flips, then
forward, backward and update as one CUDA graph; "tuned": with cuDNN's plans chosen by time. PyTorch is given the same
batch each time: "eager" channels_last with autocast, cudnn.benchmark and fused SGD, "compiled" network and loss
through torch.compile in mode max-autotune. Each measurement is a process of its own, and the least of ROUNDS. One that
fails says why below the row. Ours is deterministic, PyTorch is not.

--all: further widths, batches and precisions; it takes long, most of it to tune and to compile. --layers: instead, each
function of our engine by itself. PYTORCH=PYTHON names the Python of an environment with another PyTorch.
"""

import contextlib
import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # pytorch_models.py is the tests'
PEAKS = {  # dense TFLOP/s by what the GPU's name holds, the first that fits; the data sheets
    "H100 PCIe": dict(bf16=756, tf32=378, fp32=51), "H100 NVL": dict(bf16=835, tf32=418, fp32=60),
    "H100": dict(bf16=989, tf32=495, fp32=67), "H200": dict(bf16=989, tf32=495, fp32=67),
    "A100": dict(bf16=312, tf32=156, fp32=19.5),
}
WORKERS = {"ours": "ours", "tuned": "ours, tuned", "eager": "PyTorch eager", "compiled": "PyTorch compiled"}
ROUNDS, ROUND_SECONDS, WARM = 3, 0.3, 5  # WARM: steps before the first that is timed
PATIENCE = 600  # seconds for a measurement
REPEATS = 20  # calls of a function in the graph that times it


class Failure(Exception):
    """Why there is no number; one line."""


# ---------------------------------------------------------------------------------------------- cases


def cifar(width, batch=128, precision="bf16", base=None, **more):
    """ResNet-18 as in exp_resnet_cifar.py; base: the width whose weights it keeps, None: all."""
    return dict(net="resnet", width=width, batch=batch, precision=precision, base=base, side=32, channels=3, classes=10,
                images=50_000 // batch * batch, seconds=ROUND_SECONDS) | more


def mlp(width, batch=100, **more):
    """One hidden layer as in exp_mlp_mnist.py, with the weights of width 5"""
    return dict(net="mlp", width=width, batch=batch, precision="tf32", base=5, side=28, channels=1, classes=10,
                images=60_000, seconds=ROUND_SECONDS) | more


def cases(everything, simulated):
    """(ResNet's cases, those of --layers, the MLP's)"""
    if simulated:
        tiny = dict(images=48, seconds=0)
        photographs = cifar(2, 4, side=64, classes=12, **tiny)
        return ([cifar(2, 4, **tiny), cifar(3, 4, "tf32", **tiny), photographs, cifar(4, 4, base=2, **tiny)],
                [cifar(2, 4, **tiny), photographs], [mlp(20, 10, images=80, seconds=0)])
    photographs = cifar(64, 256, side=224, classes=1000, images=2048)
    networks = [cifar(64), cifar(256), photographs, cifar(64, base=8)]
    if everything:
        networks += [cifar(8), cifar(128)]
        networks += [cifar(width, 512) for width in (64, 256, 8, 128)]
        networks += [cifar(width, precision="tf32") for width in (64, 256, 8, 128)]
    return networks, [cifar(64), cifar(256), photographs], [mlp(width) for width in (5, 80, 640)]


def title(case):
    if case["net"] == "mlp":
        return f"MLP    width {case['width']:3} batch {case['batch']:3}"
    kind = "CIFAR" if case["side"] == 32 else f"{case['side']} px"
    masked = " masked" if case["base"] else ""
    return f"{kind:6} width {case['width']:3} batch {case['batch']:3} {case['precision']}{masked}"


def network(case):
    """Ours, where nn computes"""
    import exp_mlp_mnist
    import exp_resnet_cifar
    import exp_resnet_imagenet
    import nn

    if case["net"] == "mlp":
        return exp_mlp_mnist.build(exp_mlp_mnist.Settings(width=case["width"]))
    kind = (exp_resnet_cifar if case["side"] == 32 else exp_resnet_imagenet).ResNet18
    model = kind(case["width"], case["classes"])
    if case["base"]:
        nn.sparsify(model, nn.weight_count(kind(case["base"], case["classes"])), seed=0)
    return model


def finite(loss):
    if not math.isfinite(loss):
        raise Failure("the loss is not finite")


# ---------------------------------------------------------------------------------------------- ours


def use_gpu(simulated, **options):
    if simulated:
        import simulated_gpu

        simulated_gpu.install()
    import nn

    nn.use_device("gpu", **options)
    return nn.xp


def ours(case, simulated, tune=False):
    """(a generator of the batches of epoch after epoch, the step, the optimiser), on data of random bytes"""
    import numpy as np

    import datasets
    import nn

    xp = use_gpu(simulated, precision=case["precision"], tune=tune)
    rng, channels = np.random.default_rng(0), case["channels"]
    images = rng.integers(0, 256, (case["images"], channels, case["side"], case["side"]), np.uint8)
    labels, factor = rng.integers(0, case["classes"], len(images)), np.full((channels, 1, 1), 0.25)
    train = datasets.dataset.Arrays(images, labels).standardized(2 * factor, factor)
    dataset = datasets.Dataset("random", case["classes"], train, train)
    model, options = network(case), dict(lr=0.1)
    if case["net"] == "resnet":  # at a rate where random labels do no harm: what is not finite would be faster
        dataset, options = dataset.augmented(4, True), dict(lr=0.01, momentum=0.9, weight_decay=5e-4)
    optimizer = nn.SGD(model.parameters(), **options)

    @nn.compiled
    def step(x, labels):
        loss, sums = nn.classify(model(nn.Tensor(x)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return sums

    xp.get_default_memory_pool().free_all_blocks()  # what only the beginning needed
    epochs = (dataset.train_batches(case["batch"], 0, epoch) for epoch in itertools.count())
    return itertools.chain.from_iterable(epochs), step, optimizer


def measured_ours(case, simulated, tune):
    import nn

    batches, step, _ = ours(case, simulated, tune)
    sums = None

    def run(count):
        nonlocal sums
        for x, labels in itertools.islice(batches, count):
            sums = step(x, labels)
        nn.engine.synchronize()

    seconds = least_seconds(run, case["seconds"])
    finite(nn.to_host(sums)[0])
    return dict(seconds=seconds, memory=nn.engine.memory() - case["images"] * case["channels"] * case["side"]**2)


def least_seconds(run, seconds):
    """Of one of the steps that run(count) does: of ROUNDS, each of at least so many seconds."""
    def each(count):
        begin = time.perf_counter()
        run(count)
        return (time.perf_counter() - begin) / count

    run(WARM)
    count = max(3, min(2000, int(seconds / each(3))))
    return min(each(count) for _ in range(ROUNDS))


# ---------------------------------------------------------------------------------------------- ours, by function

PARTS = ("fill", "conv", "conv_input_gradient", "conv_weight_gradient", "batch_norm", "batch_norm_gradients",
         "add", "max_pool", "max_pool_gradient", "mean_pool", "mean_pool_gradient", "product", "cross_entropy", "sgd")


def flat(tree):
    for x in tree if isinstance(tree, (tuple, list)) else (tree,):
        if isinstance(x, (tuple, list)):
            yield from flat(x)
        else:
            yield x


def described(name, args):
    """(what the engine's function of this name works on, its products and sums if it is a convolution)"""
    def sizes(shape):
        return " x ".join(map(str, shape))

    if name.startswith("conv"):
        first, second, third = args[:3]
        x, w = {"conv": lambda: (first.shape, second.shape), "conv_input_gradient": lambda: (third, second.shape),
                "conv_weight_gradient": lambda: (second.shape, third)}[name]()
        (N, C, H, W), (O, _, k, _), (stride, padding) = x, w, args[-3:-1]
        h = (H + 2 * padding - k) // stride + 1
        stride = f" / {stride}" if stride > 1 else ""
        return f"{C} -> {O}, {H} x {W}, {k} x {k}{stride}", 2 * N * O * C * k * k * h * h
    if name == "fill":  # a batch
        return f"of {len(args[0])}", 0
    if name == "sgd":
        return f"{len(args[0])} parameters", 0
    if name == "product":
        return f"{sizes(args[0].shape)} by {sizes(args[1].shape)}", 0
    if name == "batch_norm":
        x, add, relu = args[0], *args[8:10]
        return sizes(x.shape[1:]) + (", add" if add is not None else "") + (", ReLU" if relu else ""), 0
    if name == "batch_norm_gradients":
        x, out, separate = args[1], args[2], args[6]
        return sizes(x.shape[1:]) + (", add" if separate else "") + (", ReLU" if out is not None else ""), 0
    shape = next(a.shape for a in args if hasattr(a, "shape"))
    return sizes(shape[1:]), 0


def layers(case, simulated):
    """Print the time of each of the engine's functions in a step, from graphs that hold nothing else."""
    import nn

    batches, step, optimizer = ours(case, simulated)
    from engines.gpu_convolution import milliseconds  # there is a CuPy only now, if it is a simulated one

    for _ in range(WARM):
        step(*next(batches))
    whole = milliseconds(lambda: step(*next(batches)), 20) * 1000
    calls = []

    def recording(name, function):
        def call(*args):
            calls.append((name, function, args))
            return function(*args)

        return call

    for name in PARTS:
        setattr(nn.engine, name, recording(name, getattr(nn.engine, name)))
    step.function(*next(batches))  # as it is, not as a graph
    for name in PARTS:
        delattr(nn.engine, name)
    found = {}  # (function, what it works on): [calls, microseconds of one, its rate]
    for name, function, args in calls:
        what, operations = described(name, args)
        if (name, what) not in found:
            graph = nn.engine.compiled(lambda: [function(*args) for _ in range(REPEATS)])
            for _ in range(3):
                graph()
            us = milliseconds(graph) * 1000 / REPEATS
            arrays = {id(a): a.nbytes for a in flat((args, function(*args))) if isinstance(a, nn.xp.ndarray)}
            if name == "sgd":  # reads weight, velocity and gradient, writes two of them
                arrays = {0: sum(5 * p.data.nbytes for p in optimizer.params)}
            rate = f"{operations / us / 1e6:.0f} T" if operations else f"{sum(arrays.values()) / us / 1e3:.0f} G"
            found[name, what] = [0, us, rate]
            del graph
        found[name, what][0] += 1
    print(f"\n{title(case)}: microseconds on the GPU of the engine's functions, each call in a graph of its own; "
          "TFLOP/s of\nconvolutions, else GB/s if every array met memory once")
    widths, totals = (7, 9, 9, 9), dict.fromkeys(PARTS, 0)
    row(f"{'':58}", ["calls", "each", "rate", "all"], widths)
    for (name, what), (count, us, rate) in sorted(found.items(), key=lambda item: PARTS.index(item[0][0])):
        row(f"{name:21}{what:37}", [f"{count}", f"{us:.1f}", rate, f"{count * us:.0f}"], widths)
        totals[name] += count * us
    print("by function:")
    for name, us in (totals | {"together": sum(totals.values()), "a whole step": whole}).items():
        if us:
            row(f"{name:58}", [f"{us:.0f}"], widths)


# ---------------------------------------------------------------------------------------------- PyTorch


def measured_pytorch(case, simulated, compiled):
    import torch
    from pytorch_models import mlp, resnet18
    from torch.nn.functional import cross_entropy

    if not simulated and not torch.cuda.is_available():
        raise Failure(f"PyTorch {torch.__version__} sees no GPU")
    device = "cpu" if simulated else "cuda"
    torch.manual_seed(0)
    if simulated:
        torch.set_num_threads(1)  # for small arrays several are slower
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    width, batch, side, classes = (case[key] for key in ("width", "batch", "side", "classes"))
    y = torch.randint(0, classes, (batch,), device=device)
    if case["net"] == "mlp":
        torch.set_float32_matmul_precision("highest")
        model, x = mlp(width).to(device), torch.randn(batch, side**2, device=device)
        options = dict(lr=0.1)
    else:
        torch.set_float32_matmul_precision("high")  # TF32, where autocast does not say otherwise
        # PyTorch 2.13 crashes in channels_last on a CPU with AVX2 alone, where channels are few
        order = torch.contiguous_format if simulated else torch.channels_last
        model = resnet18(width, classes, side).to(device, memory_format=order)
        x = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=order)
        options = dict(lr=0.01, momentum=0.9, weight_decay=5e-4)
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, fused=True, **options)
    masked, masks = [], []  # the masks of our network; gradients are multiplied by them before the update
    for p, own in zip(params, network(case).parameters() if case["base"] else ()):
        if own.mask is not None:
            masked.append(p)
            masks.append(torch.empty_like(p).copy_(torch.tensor(own.mask)))
    with torch.no_grad():
        for p, mask in zip(masked, masks):
            p *= mask

    def loss_of(x, y):
        with torch.autocast(device, torch.bfloat16, enabled=case["precision"] == "bf16"):
            return cross_entropy(model(x), y)

    if compiled:
        options = dict(backend="aot_eager") if simulated else dict(mode="max-autotune")  # the former needs no compiler
        loss_of = torch.compile(loss_of, dynamic=False, **options)
    loss = None

    def run(count):
        nonlocal loss
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            loss = loss_of(x, y)
            loss.backward()
            if masks:  # one launch for all of them
                torch._foreach_mul_([p.grad for p in masked], masks)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    run(WARM)
    if device == "cuda":  # what cuDNN and the compiler tried out does not count
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = least_seconds(run, case["seconds"])
    finite(loss.item())
    return dict(seconds=seconds, memory=torch.cuda.max_memory_reserved() if device == "cuda" else 0)


# ---------------------------------------------------------------------------------------------- processes


def about(name, simulated):
    """{"gpu", "versions"} of what one of WORKERS runs on"""
    if name == "eager":
        import torch

        return dict(versions=f"PyTorch {torch.__version__}, its cuDNN {torch.backends.cudnn.version()}")
    xp = use_gpu(simulated)
    import nn
    from engines.gpu_convolution import cudnn

    cudnn = cudnn()  # which finds the libraries that it needs
    return dict(gpu=nn.engine.versions()["gpu"], versions=f"CuPy {xp.__version__}, cuDNN {cudnn.backend_version()} "
                f"(frontend {cudnn.__version__}), CUDA {xp.cuda.runtime.runtimeGetVersion()}")


def answer(name, case, simulated):
    if case is None:
        return about(name, simulated)
    if name in ("ours", "tuned"):
        return measured_ours(case, simulated, name == "tuned")
    return measured_pytorch(case, simulated, name == "compiled")


def one_line(error):
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, (Failure, ImportError, RuntimeError)) else f"{type(error).__name__}: {line}"


def serve(question):
    """In a process of its own: print the answer, a line of JSON, or on standard error why there is none."""
    try:
        print("\n" + json.dumps(answer(**json.loads(question))))
    except Exception as error:
        sys.exit(one_line(error))


def ask(name, case, simulated):
    """answer() from a process of its own; Failure if there is none."""
    python = os.environ.get("PYTORCH", sys.executable) if name in ("eager", "compiled") else sys.executable
    question = json.dumps(dict(name=name, case=case, simulated=simulated))
    process = subprocess.Popen([python, __file__, "worker", question], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        said, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Failure(f"no answer in {PATIENCE} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):  # and the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        raise Failure(lines[-1] if lines else f"exit code {process.returncode}")
    return json.loads(said.splitlines()[-1])


# ---------------------------------------------------------------------------------------------- tables


def row(name, cells, widths):
    print(name + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)), flush=True)


def peak_of(device):
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), {})


def header(simulated):
    """Print what this runs on; returns the GPU's name."""
    mine, driver = ask("ours", None, simulated), "unknown"
    try:
        theirs = ask("eager", None, simulated)["versions"]
    except Failure as failure:
        theirs = f"no PyTorch: {failure}"
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                               capture_output=True)
        driver = asked.stdout.split()[0] if asked.returncode == 0 and asked.stdout else driver
    peak = ", ".join(f"{value:g} in {name}" for name, value in peak_of(mine["gpu"]).items())
    print(f"{mine['gpu']}, dense peak {f'{peak} TFLOP/s' if peak else 'unknown'}, driver {driver}")
    print(f"{mine['versions']}; {theirs}", flush=True)
    return mine["gpu"]


def table(networks, unit, device, simulated):
    """Print a row of times, ratios, parts of the peak and memory for each case; unit: seconds."""
    widths = 9, 9, 9, 9, 7, 7, 7, 7, 8, 8, 8, 8, 8, 9
    row(f"{'':38}", [*WORKERS, "o/eag", "t/eag", "o/com", "t/com", "peak o", "peak t", "MB ours", "tuned", "eager",
                     "compiled"], widths)
    for case in networks:
        found, failures = {}, {}
        for name in WORKERS:
            try:
                found[name] = ask(name, case, simulated)
            except Failure as failure:
                failures[name] = failure
        seconds = {name: reply["seconds"] for name, reply in found.items()}
        peak = peak_of(device).get(case["precision"]) if case["net"] == "resnet" else None
        if peak:
            from cpu import operations

            peak = peak * 1e12 / (case["batch"] * operations(network(case), case["side"]))  # steps a second
        cells = [f"{seconds[name] / unit:.2f}" if name in found else "failed" for name in WORKERS]
        cells += [f"{seconds[mine] / seconds[theirs]:.2f}" if mine in found and theirs in found else "-"
                  for theirs in ("eager", "compiled") for mine in ("ours", "tuned")]
        cells += [f"{1 / seconds[name] / peak:.1%}" if peak and name in found else "-" for name in ("ours", "tuned")]
        cells += [f"{found[name]['memory'] / 2**20:.0f}" if name in found else "-" for name in WORKERS]
        row(f"{title(case):38}", cells, widths)
        for name, failure in failures.items():
            print(f"    {WORKERS[name]}: {failure}", flush=True)


def main(words):
    """What the command line asks for; returns the exit code."""
    if set(words) - {"--all", "--layers", "--simulated"}:
        print(f"bench/gpu.py takes --all and --layers, not {' '.join(words)}", file=sys.stderr)
        return 2
    simulated = "--simulated" in words
    networks, layered, perceptrons = cases("--all" in words, simulated)
    try:
        device = header(simulated)
    except Failure as failure:
        print(f"bench/gpu.py: {failure}", file=sys.stderr)
        return 2
    if "--layers" in words:
        for case in layered:
            layers(case, simulated)
        return 0
    print(f"\nResNet-18, a training step: milliseconds, the least of {ROUNDS} rounds; ratios to PyTorch eager and "
          "compiled;\npart of the GPU's peak; most memory of the GPU in MB, without data sets")
    table(networks, 1e-3, device, simulated)
    print("\nMLP of Figure 5, masked: microseconds a step, each network by itself")
    table(perceptrons, 1e-6, device, simulated)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        serve(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
