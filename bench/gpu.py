"""Speed on a GPU beside PyTorch's: `python bench/gpu.py [--all] [--layers]`.

Ours is a whole step: a batch put together on the GPU from a data set that lies there, with crops and flips, then
forward, backward and update as one CUDA graph; "tuned": with cuDNN's plans chosen by time. PyTorch is given the same
batch each time: "eager" channels_last with autocast, cudnn.benchmark and fused SGD, "compiled" network and loss
through torch.compile in mode max-autotune. Each is a process of its own that prepares a case, then answers rounds in
turn with the others. One that fails says why below the row. Ours is deterministic, PyTorch is not.

Tuning and compiling take long: without --all the latter is done for some cases, and both as long as SECONDS last.
PYTORCH=PYTHON names the Python of an environment with another PyTorch.
"""

import contextlib
import gc
import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEAKS = {  # dense TFLOP/s by what the GPU's name holds, the first that fits; the data sheets
    "H100 PCIe": dict(bf16=756, tf32=378, fp32=51), "H100 NVL": dict(bf16=835, tf32=418, fp32=60),
    "H100": dict(bf16=989, tf32=495, fp32=67), "H200": dict(bf16=989, tf32=495, fp32=67),
    "A100": dict(bf16=312, tf32=156, fp32=19.5),
}
WORKERS = {"ours": "ours", "tuned": "ours, tuned", "no graph": "ours, no graph", "eager": "PyTorch eager",
           "compiled": "PyTorch compiled"}
ROUNDS, ROUND_SECONDS, WARM = 3, 0.3, 5  # WARM: steps before the first that is timed
PATIENCE = 150  # seconds for an answer
# Unless --all, seconds in all for preparing networks, and after the start until when any of it may begin
SECONDS, UNTIL = {"tuned": 150, "compiled": 130}, 300
REPEATS = 20  # calls of a function in the graph that times it


class Failure(Exception):
    """Why a worker has no number; one line."""


# ---------------------------------------------------------------------------------------------- cases


def cifar(width, batch, precision="bf16", base=None, **more):
    """ResNet-18 as in exp_resnet_cifar.py; base: the width whose weights it keeps, None: all."""
    return dict(net="resnet", width=width, batch=batch, precision=precision, base=base, side=32, classes=10,
                images=50_000 // batch * batch, seconds=ROUND_SECONDS) | more


def mlp(width, batch=100, **more):
    """One hidden layer as in exp_mlp_mnist.py, with the weights of width 5"""
    return dict(net="mlp", width=width, batch=batch, precision="tf32", base=5, side=28, classes=10,
                images=60_000, seconds=ROUND_SECONDS) | more


def cases(simulated):
    """(ResNet's cases, the masked one, the one without a graph, those of --layers, the MLP's)"""
    if simulated:
        tiny = dict(images=48, seconds=0)
        photographs = cifar(2, 4, side=64, classes=12, **tiny)
        return ([cifar(2, 4, **tiny), cifar(3, 4, "tf32", **tiny), photographs], cifar(4, 4, base=2, **tiny),
                cifar(2, 4, **tiny), [cifar(2, 4, **tiny), photographs], [mlp(20, 10, images=80, seconds=0)])
    networks = [cifar(width, 128) for width in (64, 256, 8, 128)]
    photographs = cifar(64, 256, side=224, classes=1000, images=2048)
    networks.append(photographs)
    networks += [cifar(width, 512) for width in (64, 256, 8, 128)]
    networks += [cifar(width, 128, "tf32") for width in (64, 256, 8, 128)]
    return (networks, cifar(64, 128, base=8), cifar(8, 128), [cifar(64, 128), cifar(256, 128), photographs],
            [mlp(width) for width in (5, 80, 640)])


def title(case):
    if case["net"] == "mlp":
        return f"MLP    width {case['width']:3} batch {case['batch']:3}"
    kind = "CIFAR" if case["side"] == 32 else f"{case['side']} px"
    return f"{kind:6} width {case['width']:3} batch {case['batch']:3} {case['precision']}"


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


# ---------------------------------------------------------------------------------------------- workers: ours
# A worker's prepare(case) returns (run, memory): run(n) does n steps and waits for them, memory() is the most bytes of
# the GPU that it held. about() says what it runs on.


class Ours:
    def __init__(self, name, simulated):
        self.options = dict(tune=name == "tuned", capture=name != "no graph")
        sys.path.insert(0, str(ROOT))
        if simulated:
            sys.path.insert(0, str(ROOT / "tests"))
            import simulated_gpu

            simulated_gpu.install()
        import nn

        nn.use_device("gpu", **self.options)

    def about(self):
        import cudnn
        import cupy

        import nn

        return dict(gpu=nn.engine.versions()["gpu"], versions=f"CuPy {cupy.__version__}, cuDNN "
                    f"{cudnn.backend_version()} (frontend {cudnn.__version__}), CUDA "
                    f"{cupy.cuda.runtime.runtimeGetVersion()}")

    def forget(self):
        """Give the memory of the case before back."""
        import cupy

        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()

    def training(self, case):
        """(a generator of the batches of epoch after epoch, the step, model, optimiser), on data of random bytes"""
        import numpy as np

        import datasets
        import nn

        nn.use_device("gpu", precision=case["precision"], **self.options)
        rng, channels = np.random.default_rng(0), 1 if case["net"] == "mlp" else 3
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

        self.forget()  # what only the beginning needed
        epochs = (dataset.train_batches(case["batch"], 0, epoch) for epoch in itertools.count())
        return itertools.chain.from_iterable(epochs), step, model, optimizer

    def prepare(self, case):
        import numpy as np

        import nn

        batches, step, _, _ = self.training(case)
        sums = None

        def run(count):
            nonlocal sums
            for x, labels in itertools.islice(batches, count):
                sums = step(x, labels)
            nn.engine.synchronize()

        def memory():
            if not np.isfinite(nn.to_host(sums)).all():
                raise Failure("the loss is not finite")
            return nn.engine.memory() - case["images"] * (1 if case["net"] == "mlp" else 3) * case["side"]**2

        return run, memory

    def layers(self, case):
        """[name, what, calls, microseconds a call, operations, bytes] of each of the engine's functions in a step, from
        graphs that hold nothing else; and the microseconds of a step, a graph as well.
        """
        import cupy

        import nn
        from engines.gpu_convolution import milliseconds

        batches, step, model, optimizer = self.training(case)
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
        found = {}
        for name, function, args in calls:
            what, operations = described(name, args)
            if (name, what) not in found:
                graph = nn.engine.compiled(lambda: [function(*args) for _ in range(REPEATS)])
                for _ in range(3):
                    graph()
                us = milliseconds(graph) * 1000 / REPEATS
                arrays = {id(a): a.nbytes for a in flat((args, function(*args))) if isinstance(a, cupy.ndarray)}
                if name == "sgd":  # reads weight, velocity and gradient, writes two of them
                    arrays = {0: sum(5 * p.data.nbytes for p in model.parameters())}
                found[name, what] = [name, what, 0, us, operations, sum(arrays.values())]
                del graph
            found[name, what][2] += 1
        return list(found.values()), whole


PARTS = ("fill", "weights", "conv", "conv_input_gradient", "conv_weight_gradient", "batch_norm", "batch_norm_gradients",
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
        (N, C, H, W), (O, _, k, _), (stride, padding) = x, w, args[-2:]
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
    return sizes(shape if name == "weights" else shape[1:]), 0


# ---------------------------------------------------------------------------------------------- workers: PyTorch


class PyTorch:
    def __init__(self, name, simulated):
        import torch

        if not simulated and not torch.cuda.is_available():
            raise Failure(f"PyTorch {torch.__version__} sees no GPU")
        self.compiled, self.simulated, self.device = name == "compiled", simulated, "cpu" if simulated else "cuda"
        torch.manual_seed(0)
        if simulated:
            torch.set_num_threads(1)  # for small arrays several are slower
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # pytorch_models.py is the tests'

    def about(self):
        import torch

        return dict(versions=f"PyTorch {torch.__version__}, its cuDNN {torch.backends.cudnn.version()}")

    def forget(self):
        import torch

        gc.collect()
        if self.compiled:
            torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def synchronize(self):
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def training(self, case):
        """(step, a function that returns the loss)"""
        import torch
        from pytorch_models import mlp, resnet18
        from torch.nn.functional import cross_entropy

        width, batch, side, classes = (case[key] for key in ("width", "batch", "side", "classes"))
        y = torch.randint(0, classes, (batch,), device=self.device)
        if case["net"] == "mlp":
            torch.set_float32_matmul_precision("highest")
            model, x = mlp(width).to(self.device), torch.randn(batch, side**2, device=self.device)
            options = dict(lr=0.1)
        else:
            torch.set_float32_matmul_precision("high")  # TF32, where autocast does not say otherwise
            model = resnet18(width, classes, side).to(self.device, memory_format=torch.channels_last)
            x = torch.randn(batch, 3, side, side, device=self.device).contiguous(memory_format=torch.channels_last)
            options = dict(lr=0.01, momentum=0.9, weight_decay=5e-4)
        params = list(model.parameters())
        optimizer = torch.optim.SGD(params, fused=True, **options)
        pairs = [(p, mask) for p, mask in zip(params, self.masks(case)) if mask is not None]
        masked, masks = [p for p, _ in pairs], [mask for _, mask in pairs]
        with torch.no_grad():
            for p, mask in pairs:
                p *= mask
        last = [None]

        def loss_of(x, y):
            with torch.autocast(self.device, torch.bfloat16, enabled=case["precision"] == "bf16"):
                return cross_entropy(model(x), y)

        if self.compiled:
            options = dict(backend="aot_eager") if self.simulated else dict(mode="max-autotune")
            loss_of = torch.compile(loss_of, dynamic=False, **options)  # aot_eager needs no compiler

        def step():
            optimizer.zero_grad(set_to_none=True)
            if self.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            last[0] = loss_of(x, y)
            last[0].backward()
            if masks:  # one launch for all of them
                torch._foreach_mul_([p.grad for p in masked], masks)
            optimizer.step()

        return step, lambda: last[0].item()

    def masks(self, case):
        """What multiplies the gradient of each parameter, None for those that are dense: the masks of our network."""
        if not case["base"]:
            return itertools.repeat(None)
        import torch

        return [None if p.mask is None else torch.tensor(p.mask, dtype=torch.float32, device=self.device)
                .contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
                for p in network(case).parameters()]

    def prepare(self, case):
        import torch

        step, loss = self.training(case)

        def run(count):
            for _ in range(count):
                step()
            self.synchronize()

        def memory():
            if not math.isfinite(loss()):
                raise Failure("the loss is not finite")
            return torch.cuda.max_memory_reserved() if self.device == "cuda" else 0

        run(WARM)
        if self.device == "cuda":  # what cuDNN and the compiler tried out does not count
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return run, memory


# ---------------------------------------------------------------------------------------------- workers: questions


def answer(worker, question, state):
    """What a worker says to a question: {"about"}, {"prepare": case or None}, {"go"} or {"layers": case}."""
    if "about" in question:
        return worker.about()
    if "layers" in question:
        rows, step = worker.layers(question["layers"])
        return dict(rows=rows, step=step)
    if "prepare" in question:
        state.clear()
        worker.forget()
        if case := question["prepare"]:
            run, memory = worker.prepare(case)
            run(WARM)
            memory()
            begin = time.perf_counter()
            run(3)
            one = (time.perf_counter() - begin) / 3
            count = max(3, min(2000, int(case["seconds"] / one)))
            state.update(run=run, memory=memory, count=count)
        return {}
    begin = time.perf_counter()
    state["run"](state["count"])
    return dict(seconds=(time.perf_counter() - begin) / state["count"], memory=state["memory"]())


def one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if isinstance(error, (Failure, ImportError)) else f"{type(error).__name__}: {text}"


def serve(name, simulated):
    """Answer each question on standard input, a line of JSON, with one. What else is printed goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    state, wrong = {}, None
    try:
        worker = (PyTorch if name in ("eager", "compiled") else Ours)(name, simulated)
    except Exception as error:
        wrong = str(error) if isinstance(error, RuntimeError) else one_line(error)
    for line in sys.stdin:
        try:
            reply = dict(hopeless=wrong) if wrong else answer(worker, json.loads(line), state)
        except Exception as error:
            reply = dict(error=one_line(error))
        print(json.dumps(reply), file=replies, flush=True)


# ---------------------------------------------------------------------------------------------- the parent


class Workers:
    """The processes; started when they are asked first, and again after they broke down."""

    def __init__(self, simulated, everything):
        self.simulated, self.running, self.hopeless = simulated, {}, {}
        self.patience = 1200 if everything else PATIENCE
        self.left = {} if everything or simulated else dict(SECONDS)  # for preparing networks, and none after `until`
        self.until = time.monotonic() + UNTIL

    def start(self, name):
        if name not in self.running:
            python = os.environ.get("PYTORCH", sys.executable) if name in ("eager", "compiled") else sys.executable
            command = [python, __file__, "worker", name, "--simulated" if self.simulated else ""]
            errors = tempfile.TemporaryFile("w+")
            process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                       start_new_session=True)
            self.running[name] = process, errors
        return self.running[name]

    def stop(self, name):
        """End a worker and the processes that it started."""
        process, errors = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        errors.seek(0)
        return [line.strip() for line in errors.read().splitlines() if line.strip()]

    def ask(self, name, seconds=None, **question):
        """The worker's answer; Failure without one in time, or if it is an error."""
        if name in self.hopeless:
            raise Failure(self.hopeless[name])
        process, _ = self.start(name)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        seconds = min(seconds or math.inf, self.patience)
        if not select.select([process.stdout], [], [], seconds)[0]:
            self.stop(name)
            raise Failure(f"no answer in {seconds:.0f} s; --all waits longer")
        line = process.stdout.readline()
        if not line:
            said = self.stop(name)
            raise Failure(f"ended: {said[-1] if said else f'exit code {process.returncode}'}")
        reply = json.loads(line)
        if "hopeless" in reply:
            self.hopeless[name] = reply["hopeless"]
            raise Failure(reply["hopeless"])
        if "error" in reply:
            self.stop(name)  # after some errors of a GPU nothing works any more
            raise Failure(reply["error"])
        return reply

    def prepare(self, name, case):
        limited = name in self.left
        left = min(self.left[name], self.until - time.monotonic()) if limited else math.inf
        if left < 5:
            raise Failure("no time is left for it; --all takes more")
        begin = time.monotonic()
        try:
            self.ask(name, left, prepare=case)
        finally:
            if limited:
                self.left[name] -= time.monotonic() - begin

    def measure(self, case, names):
        """{worker: (least seconds of a step, most bytes), or the Failure} of a case"""
        found = {}
        for name in names:
            try:
                self.prepare(name, case)
                found[name] = math.inf, 0
            except Failure as failure:
                found[name] = failure
        for _ in range(ROUNDS):
            for name in [name for name in names if isinstance(found[name], tuple)]:
                try:
                    reply = self.ask(name, go=1)
                    seconds, most = found[name]
                    found[name] = min(seconds, reply["seconds"]), max(most, reply["memory"])
                except Failure as failure:
                    found[name] = failure
        for name in [name for name in names if name in self.running]:  # what others need now
            with contextlib.suppress(Failure):
                self.ask(name, prepare=None)
        return found

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for name in list(self.running):
            self.stop(name)


def number(found, name, scale=1, digits=2, index=0):
    """A cell of a table: the seconds (index 0) or bytes (1) of a worker times scale; - if it was not asked."""
    value = found.get(name)
    return "-" if value is None else "failed" if isinstance(value, Failure) else f"{value[index] * scale:.{digits}f}"


def ratio(found, mine, theirs):
    pair = found.get(mine), found.get(theirs)
    return f"{pair[0][0] / pair[1][0]:.2f}" if all(isinstance(p, tuple) for p in pair) else "-"


def row(name, cells, widths):
    print(name + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)), flush=True)


def reasons(found):
    for name, value in found.items():
        if isinstance(value, Failure):
            print(f"    {WORKERS[name]}: {value}", flush=True)


def peak_of(device):
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), {})


def header(workers, about):
    device, driver = about["gpu"], "unknown"
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                               capture_output=True)
        driver = asked.stdout.split()[0] if asked.returncode == 0 and asked.stdout else driver
    peak = ", ".join(f"{value:g} in {name}" for name, value in peak_of(device).items())
    print(f"{device}, dense peak {f'{peak} TFLOP/s' if peak else 'unknown'}, driver {driver}")
    try:
        theirs = workers.ask("eager", about=1)["versions"]
    except Failure as failure:
        theirs = f"no PyTorch: {failure}"
    print(f"{about['versions']}; {theirs}", flush=True)


RESNET_WIDTHS = 8, 8, 8, 9, 7, 7, 7, 7, 7, 7, 8, 7, 7, 9
MLP_WIDTHS = 9, 9, 9, 7, 7


def resnet_row(workers, case, names, device):
    found = workers.measure(case, names)
    peak = peak_of(device).get(case["precision"])
    if peak:
        from cpu import operations

        count = case["batch"] * operations(network(case), case["side"])
    parts = []
    for name in ("ours", "tuned"):
        measured = peak and isinstance(found.get(name), tuple)
        parts.append(f"{count / found[name][0] / peak / 1e12:.1%}" if measured else "-")
    four = "ours", "tuned", "eager", "compiled"
    row(f"{title(case) + (' masked' if case['base'] else ''):38}",
        [*(number(found, name, 1e3) for name in four),
         *(ratio(found, mine, theirs) for theirs in ("eager", "compiled") for mine in ("ours", "tuned")), *parts,
         *(number(found, name, 2**-20, 0, index=1) for name in four)], RESNET_WIDTHS)
    reasons(found)


def resnets(workers, networks, masked, everything, device):
    print(f"\nResNet-18, a training step: milliseconds, the least of {ROUNDS} rounds; ratios to PyTorch eager and "
          "compiled;\npart of the GPU's peak; most memory of the GPU in MB, without data sets")
    row(f"{'':38}", ["ours", "tuned", "eager", "compiled", "o/eag", "t/eag", "o/com", "t/com", "peak o", "peak t",
                     "MB ours", "tuned", "eager", "compiled"], RESNET_WIDTHS)
    for case in networks:
        compiles = everything or workers.simulated or case["width"] in (64, 256) and case["precision"] == "bf16"
        resnet_row(workers, case, ["ours", "tuned", "eager", *(["compiled"] if compiles else [])], device)
    # in PyTorch gradients are multiplied by masks before the update
    resnet_row(workers, masked, ["ours", "tuned", "eager"], device)


def graphs(workers, case):
    found = workers.measure(case, ["ours", "no graph"])
    print(f"\n{title(case)}: a step as one CUDA graph {number(found, 'ours', 1e3)} ms, launched from Python "
          f"{number(found, 'no graph', 1e3)} ms, {ratio(found, 'no graph', 'ours')} times as long")
    reasons(found)


def mlps(workers, networks):
    print("\nMLP of Figure 5, masked: microseconds a step, each network by itself")
    row(f"{'':38}", ["ours", "eager", "compiled", "o/eag", "o/com"], MLP_WIDTHS)
    for case in networks:
        found = workers.measure(case, ["ours", "eager", "compiled"])
        row(f"{title(case):38}", [*(number(found, name, 1e6, 1) for name in ("ours", "eager", "compiled")),
                                  *(ratio(found, "ours", theirs) for theirs in ("eager", "compiled"))], MLP_WIDTHS)
        reasons(found)


def layers(workers, case):
    found = {}
    print(f"\n{title(case)}: microseconds on the GPU of the engine's functions, each call in a graph of its own; "
          "TFLOP/s of\nconvolutions, else GB/s if every array met memory once")
    for name in ("ours", "tuned"):
        try:
            found[name] = workers.ask(name, layers=case)
        except Failure as failure:
            print(f"    {WORKERS[name]}: {failure}", flush=True)
    if not found:
        return
    times = {name: {tuple(r[:2]): r for r in reply["rows"]} for name, reply in found.items()}
    widths = 7, 9, 9, 9, 9, 10
    row(f"{'':58}", ["calls", "ours", "tuned", "o/s", "t/s", "ours, all"], widths)
    totals = {}
    first = next(iter(times.values()))
    for key in sorted(first, key=lambda key: (PARTS.index(key[0]), list(first).index(key))):
        cells = []
        for name in ("ours", "tuned"):
            r = times.get(name, {}).get(key)
            rate = "-" if r is None else f"{r[4] / r[3] / 1e6:.0f} T" if r[4] else f"{r[5] / r[3] / 1e3:.0f} G"
            cells.append(("-" if r is None else f"{r[3]:.1f}", rate))
            if r:
                totals[key[0], name] = totals.get((key[0], name), 0) + r[2] * r[3]
        calls = first[key][2]
        row(f"{key[0]:21}{key[1]:37}", [f"{calls}", cells[0][0], cells[1][0], cells[0][1], cells[1][1],
                                        f"{calls * first[key][3]:.0f}"], widths)
    print(f"by function: {'':45}{'ours':>7}{'tuned':>9}")
    for name in dict.fromkeys(name for name, _ in totals):
        row(f"{name:58}", [f"{totals[name, who]:.0f}" if (name, who) in totals else "-" for who in ("ours", "tuned")],
            (7, 9))
    for what, value in (("together", lambda who: sum(v for (_, by), v in totals.items() if by == who)),
                        ("a whole step", lambda who: found[who]["step"])):
        row(f"{what:58}", [f"{value(who):.0f}" if who in found else "-" for who in ("ours", "tuned")], (7, 9))


def main(words):
    """What the command line asks for; returns the exit code."""
    known = {"--all", "--layers", "--simulated"}
    if set(words) - known:
        print(f"bench/gpu.py takes {' and '.join(sorted(known - {'--simulated'}))}, not {' '.join(words)}",
              file=sys.stderr)
        return 2
    everything, simulated = "--all" in words, "--simulated" in words
    sys.path.insert(0, str(ROOT))
    networks, masked, ungraphed, layered, perceptrons = cases(simulated)
    with Workers(simulated, everything) as workers:
        try:
            about = workers.ask("ours", about=1)
        except Failure as failure:
            print(f"bench/gpu.py: {failure}", file=sys.stderr)
            return 2
        for name in WORKERS if "--layers" not in words else ("tuned",):
            workers.start(name)
        header(workers, about)
        if "--layers" in words:
            workers.patience *= 2  # all of a network is timed, one by one
            for case in layered:
                layers(workers, case)
        else:
            resnets(workers, networks, masked, everything, about["gpu"])
            graphs(workers, ungraphed)
            mlps(workers, perceptrons)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        serve(sys.argv[2], bool(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
