"""The GPU part of bench.py: `python tests/bench.py gpu [--all] [--layers]`.

Ours is a whole step: a batch put together on the card from a data set that lies there, with crops and flips, forward,
backward, update, as one CUDA graph (loop.GraphSteps); "tuned": with cuDNN's plans chosen by time. PyTorch is given the
same batch each time: "eager" channels_last with autocast, cudnn.benchmark and fused SGD, "compiled" network and loss
through torch.compile in mode max-autotune. Each is a process of its own that prepares a case, then answers rounds in
turn with the others. One that fails says why below the row. Ours is deterministic, PyTorch is not.

Figure 5's networks: ours all of a width as one (together.py), PyTorch's one at a time, and "stacked" all as one through
torch.func.vmap, compiled with CUDA graphs (reduce-overhead).

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

from bench import ROOT, resnet_operations

PEAKS = {  # dense TFLOP/s by what the card's name holds, the first that fits; the data sheets
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
STACKED_SECONDS, STACKED_UNTIL = {"compiled": 60}, 420  # the same for the networks of Figure 5
REPEATS = 20  # calls of a function in the graph that times it


class Failure(Exception):
    """Why a worker has no number; one line."""


# ---------------------------------------------------------------------------------------------- cases


def cifar(width, batch, precision="bf16", base=None, **more):
    """ResNet-18 as in exp_resnet_cifar.py; base: the width whose weights it keeps, None: all."""
    return dict(net="resnet", width=width, batch=batch, precision=precision, base=base, side=32, classes=10,
                images=50_000 // batch * batch, seconds=ROUND_SECONDS) | more


def cases(simulated):
    """({title: ResNet's cases}, the masked one, the one without a graph, those of --layers, widths of the MLP)"""
    if simulated:
        tiny = dict(images=48, seconds=0)
        photographs = cifar(2, 4, side=64, classes=12, **tiny)
        return ([cifar(2, 4, **tiny), cifar(3, 4, "tf32", **tiny), photographs], cifar(4, 4, base=2, **tiny),
                cifar(2, 4, **tiny), [cifar(2, 4, **tiny), photographs], (5, 20))
    networks = [cifar(width, 128) for width in (64, 256, 8, 128)]
    photographs = cifar(64, 256, side=224, classes=1000, images=2048)
    networks.append(photographs)
    networks += [cifar(width, 512) for width in (64, 256, 8, 128)]
    networks += [cifar(width, 128, "tf32") for width in (64, 256, 8, 128)]
    return networks, cifar(64, 128, base=8), cifar(8, 128), [cifar(64, 128), cifar(256, 128), photographs], None


def title(case):
    kind = "CIFAR" if case["side"] == 32 else f"{case['side']} px"
    return f"{kind:6} width {case['width']:3} batch {case['batch']:3} {case['precision']}"


# ---------------------------------------------------------------------------------------------- workers: ours
# A worker's prepare(case) returns (run, memory): run(n) does n steps and waits for them, memory() is the most bytes of
# the card that it held. about() says what it runs on.


def endless(steps, progress):
    """The steps of epoch after epoch."""
    while True:
        yield from steps.train(progress)
        progress.epoch += 1
        progress.step = progress.seen = 0


class Ours:
    def __init__(self, name, simulated):
        self.tune, self.graph, self.simulated = name == "tuned", name != "no graph", simulated
        sys.path.insert(0, str(ROOT))
        if simulated:
            import simulated_gpu

            simulated_gpu.install()
        import nn

        nn.use_device("gpu", tune=self.tune)

    def about(self):
        import cudnn
        import cupy

        import nn

        return dict(gpu=nn.gpu.versions()["gpu"], versions=f"CuPy {cupy.__version__}, cuDNN {cudnn.backend_version()} "
                    f"(frontend {cudnn.__version__}), CUDA {cupy.cuda.runtime.runtimeGetVersion()}")

    def forget(self):
        """Give the memory of the case before back."""
        import cupy

        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()

    def steps(self, case):
        """(GraphSteps, its progress) of a network and data of random bytes"""
        import numpy as np

        import data
        import exp_resnet_cifar
        import exp_resnet_imagenet
        import loop
        import nn
        import train

        nn.use_device("gpu", precision=case["precision"], tune=self.tune)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (case["images"], 3, case["side"], case["side"]), np.uint8)
        labels = rng.integers(0, case["classes"], len(images))
        dataset = data.normalized("random", case["classes"], (images, labels), (images[:1], labels[:1]), 0.5, 0.25)
        dataset = dataset.augmented(4, True).to_device()
        experiment = exp_resnet_cifar if case["side"] == 32 else exp_resnet_imagenet
        # a learning rate at which random labels do no harm: numbers that are not finite would be faster
        settings = experiment.Settings(width=case["width"], batch=case["batch"], lr=0.01, graph=self.graph)
        model = experiment.ResNet18(case["width"], case["classes"])
        if case["base"]:
            nn.sparsify(model, sum(exp_resnet_cifar.layer_sizes(case["base"], case["classes"])), seed=0)
        optimizer = experiment.EXPERIMENT.optimizer(settings, model.parameters())
        self.forget()  # what only the beginning needed
        return loop.GraphSteps(settings, dataset, model, optimizer, case["batch"]), train.Progress()

    def stacked_steps(self, case):
        """The same of the networks of Figure 5 of a width, as one"""
        import numpy as np

        import data
        import exp_mlp_mnist
        import loop
        import nn
        import together
        import train

        nn.use_device("gpu", tune=self.tune)
        runs = stack_of(case)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (case["images"], 1, 28, 28), np.uint8)
        labels = rng.integers(0, 10, len(images))
        dataset = data.normalized("random", 10, (images, labels), (images[:1], labels[:1]), 0.1307, 0.3081).to_device()
        models = [exp_mlp_mnist.build(run, dataset) for run in runs]
        whole = together.stack(models, exp_mlp_mnist.build(runs[0], dataset))
        optimizer = exp_mlp_mnist.EXPERIMENT.optimizer(runs[0], whole.parameters())
        optimizer.lr = np.array([run.lr for run in runs])
        steps = loop.GraphSteps(runs[0], dataset, whole, optimizer, 1000, members=runs)
        return steps, together.Progresses([train.Progress() for _ in runs])

    def prepare(self, case):
        import cupy
        import numpy as np

        import nn

        steps, progress = (self.stacked_steps if case["net"] == "mlp" else self.steps)(case)
        going = endless(steps, progress)

        def run(count):
            for _ in itertools.islice(going, count):
                pass
            nn.gpu.stream.synchronize()

        def memory():
            steps.read(progress)
            if not np.isfinite(progress.loss_sum).all():
                raise Failure("the loss is not finite")
            pools = steps.pool, cupy.get_default_memory_pool()
            return sum(pool.total_bytes() for pool in pools) - steps.dataset.train_images.nbytes

        return run, memory

    def layers(self, case):
        """[name, what, calls, microseconds a call, operations, bytes] of each of the engine's functions in a step, from
        graphs that hold nothing else; and the microseconds of a step, a graph as well.
        """
        import cupy

        import loop
        import nn
        from gpu import milliseconds

        steps, progress = self.steps(case)
        going = endless(steps, progress)
        for _ in range(WARM):
            next(going)
        step = milliseconds(lambda: next(going), 20) * 1000
        going.close()
        feed, calls = steps.feeds[True], []

        def recording(name, function):
            def call(*args):
                calls.append((name, function, args))
                return function(*args)

            return call

        def first_batch(size, batch=feed.batch):
            feed.cursor.fill(0)  # else the data would end
            return batch(size)

        feed.begin(*steps.shuffled(0))
        feed.batch = recording("batch", first_batch)
        for name in PARTS:
            setattr(nn.gpu, name, recording(name, getattr(nn.gpu, name)))
        loop.train_step(steps.model, steps.optimizer, *feed.batch(case["batch"]))
        for name in PARTS:
            delattr(nn.gpu, name)
        for p in steps.model.parameters():
            p.grad = nn.stored(nn.xp.ones_like(p.data) * 1e-6)  # SGD is to move them again
        found = {}
        for name, function, args in calls:
            what, operations = described(name, args)
            if (name, what) not in found:
                replay = nn.gpu.replay(lambda: [function(*args) for _ in range(REPEATS)], nn.gpu.pool())
                for _ in range(3):
                    replay()
                us = milliseconds(replay) * 1000 / REPEATS
                arrays = {id(a): a.nbytes for a in flat((args, function(*args))) if isinstance(a, cupy.ndarray)}
                if name == "sgd":  # reads weight, velocity and gradient, writes two of them
                    arrays = {0: sum(5 * p.data.nbytes for p in steps.model.parameters())}
                found[name, what] = [name, what, 0, us, operations, sum(arrays.values())]
                del replay
            found[name, what][2] += 1
        return list(found.values()), step


PARTS = ("weights", "forward", "input_gradient", "weight_gradient", "batch_norm", "batch_norm_backward", "add",
         "max_pool", "max_pool_gradient", "mean_pool", "mean_pool_gradient", "product", "cross_entropy", "sgd")


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

    if name in ("forward", "input_gradient", "weight_gradient"):
        first, second, third = args[:3]
        x, w = {"forward": lambda: (first.shape, second.shape), "input_gradient": lambda: (third, second.shape),
                "weight_gradient": lambda: (second.shape, third)}[name]()
        (N, C, H, W), (O, _, k, _), (stride, padding) = x, w, args[-2:]
        h = (H + 2 * padding - k) // stride + 1
        stride = f" / {stride}" if stride > 1 else ""
        return f"{C} -> {O}, {H} x {W}, {k} x {k}{stride}", 2 * N * O * C * k * k * h * h
    if name == "batch":
        return f"of {args[0]}", 0
    if name == "sgd":
        return f"{len(args[0])} parameters", 0
    if name == "product":
        return f"{sizes(args[0].shape)} by {sizes(args[1].shape)}", 0
    if name == "batch_norm":
        x, add, relu = args[0], *args[8:10]
        return sizes(x.shape[1:]) + (", add" if add is not None else "") + (", ReLU" if relu else ""), 0
    if name == "batch_norm_backward":
        x, out, separate = args[1], args[2], args[6]
        return sizes(x.shape[1:]) + (", add" if separate else "") + (", ReLU" if out is not None else ""), 0
    shape = next(a.shape for a in args if hasattr(a, "shape"))
    return sizes(shape if name == "weights" else shape[1:]), 0


def stack_of(case):
    """The Settings of Figure 5's networks of a width."""
    from dataclasses import replace

    import exp_mlp_mnist

    settings = replace(exp_mlp_mnist.Settings(), batch=case["batch"])
    return [run for run in exp_mlp_mnist.fig5_runs(settings)
            if run.width == case["width"] and run.activation == "relu"]


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
        sys.path.insert(0, str(ROOT))

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

    def compile(self, function, mode):
        import torch

        options = dict(backend="aot_eager") if self.simulated else dict(mode=mode)  # the former takes no compiler
        return torch.compile(function, dynamic=False, **options)

    def resnet(self, case):
        """(step, a function that returns the loss)"""
        import torch
        from pytorch_models import resnet18
        from torch.nn.functional import cross_entropy

        torch.set_float32_matmul_precision("high")  # TF32, where autocast does not say otherwise
        width, batch, side, classes = (case[key] for key in ("width", "batch", "side", "classes"))
        model = resnet18(width, classes, side).to(self.device, memory_format=torch.channels_last)
        x = torch.randn(batch, 3, side, side, device=self.device).contiguous(memory_format=torch.channels_last)
        y = torch.randint(0, classes, (batch,), device=self.device)
        params = list(model.parameters())
        optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
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
            loss_of = self.compile(loss_of, "max-autotune")

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

        import exp_resnet_cifar
        import nn

        model = exp_resnet_cifar.ResNet18(case["width"], case["classes"])
        nn.sparsify(model, sum(exp_resnet_cifar.layer_sizes(case["base"], case["classes"])), seed=0)
        return [None if p.mask is None else torch.tensor(p.mask, dtype=torch.float32, device=self.device)
                .contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
                for p in model.parameters()]

    def mlps(self, case):
        """The same for networks of Figure 5: eager the first of them, compiled all as one through vmap."""
        import torch
        import torch._dynamo
        from pytorch_models import mlp
        from torch.func import grad, vmap
        from torch.nn.functional import cross_entropy, linear

        import exp_mlp_mnist

        torch.set_float32_matmul_precision("highest")
        runs = stack_of(case)
        models = [exp_mlp_mnist.build(run, None) for run in (runs if self.compiled else runs[:1])]
        K, N = len(models), case["batch"]

        def stacked(arrays):
            return torch.stack([torch.tensor(a, dtype=torch.float32) for a in arrays]).to(self.device)

        layers = list(zip(*(model.parameters() for model in models)))  # each of the four, of all networks
        values = [stacked([p.data for p in ps]) for ps in layers]
        masks = [stacked([p.mask if p.mask is not None else p.data * 0 + 1 for p in ps])
                 if any(p.mask is not None for p in ps) else None for ps in layers]
        x, y = torch.randn(K, N, 784, device=self.device), torch.randint(0, 10, (K, N), device=self.device)
        if not self.compiled:
            model = mlp(case["width"]).to(self.device)
            params = list(model.parameters())
            with torch.no_grad():
                for p, value in zip(params, values):
                    p.copy_(value[0])
            pairs = [(p, mask[0]) for p, mask in zip(params, masks) if mask is not None]
            optimizer = torch.optim.SGD(params, lr=runs[0].lr, fused=True)
            x, y = x[0], y[0]

            def step():
                optimizer.zero_grad(set_to_none=True)
                cross_entropy(model(x), y).backward()
                if pairs:
                    torch._foreach_mul_([p.grad for p, _ in pairs], [mask for _, mask in pairs])
                optimizer.step()

            return step, lambda: cross_entropy(model(x), y).item()

        def loss(params, x, y):
            w1, b1, w2, b2 = params
            return cross_entropy(linear(torch.relu(linear(x, w1, b1)), w2, b2), y)

        def update(params, x, y):
            for p, g, mask in zip(params, vmap(grad(loss))(params, x, y), masks):
                p.sub_(runs[0].lr * (g if mask is None else g * mask))

        if case["compile"]:
            for p in (*values, x, y):
                torch._dynamo.mark_static_address(p)  # else what is changed in place is in no CUDA graph
            update = self.compile(update, "reduce-overhead")

        def step():
            if case["compile"]:
                torch.compiler.cudagraph_mark_step_begin()
            update(values, x, y)

        return torch.no_grad()(step), lambda: vmap(loss)(values, x, y).max().item()

    def prepare(self, case):
        import torch

        step, loss = (self.mlps if case["net"] == "mlp" else self.resnet)(case)

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
            count = case.get("steps") or max(3, min(2000, int(case["seconds"] / one)))
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
        self.began, self.unlimited = time.monotonic(), everything or simulated
        self.patience = 1200 if everything else PATIENCE
        self.limit(SECONDS, UNTIL)

    def limit(self, seconds, until):
        """Spend no more than these seconds on preparing networks, {worker: seconds}, and none after `until`."""
        self.left = {} if self.unlimited else dict(seconds)
        self.until = self.began + until

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
            self.stop(name)  # after some errors of a card nothing works any more
            raise Failure(reply["error"])
        return reply

    def prepare(self, name, case):
        limited = name in self.left and case.get("compile", True)
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


def peak_of(card):
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", card)), {})


def header(workers, about):
    card, driver = about["gpu"], "unknown"
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                               capture_output=True)
        driver = asked.stdout.split()[0] if asked.returncode == 0 and asked.stdout else driver
    peak = ", ".join(f"{value:g} in {name}" for name, value in peak_of(card).items())
    print(f"{card}, dense peak {f'{peak} TFLOP/s' if peak else 'unknown'}, driver {driver}")
    try:
        theirs = workers.ask("eager", about=1)["versions"]
    except Failure as failure:
        theirs = f"no PyTorch: {failure}"
    print(f"{about['versions']}; {theirs}", flush=True)


RESNET_WIDTHS = 8, 8, 8, 9, 7, 7, 7, 7, 7, 7, 8, 7, 7, 9
MLP_WIDTHS = 9, 9, 9, 9, 9, 11


def resnet_row(workers, case, names, card):
    found = workers.measure(case, names)
    peak = peak_of(card).get(case["precision"])
    operations = case["batch"] * resnet_operations(case["width"], case["side"], case["classes"])
    parts = []
    for name in ("ours", "tuned"):
        measured = peak and isinstance(found.get(name), tuple)
        parts.append(f"{operations / found[name][0] / peak / 1e12:.1%}" if measured else "-")
    four = "ours", "tuned", "eager", "compiled"
    row(f"{title(case) + (' masked' if case['base'] else ''):38}",
        [*(number(found, name, 1e3) for name in four),
         *(ratio(found, mine, theirs) for theirs in ("eager", "compiled") for mine in ("ours", "tuned")), *parts,
         *(number(found, name, 2**-20, 0, index=1) for name in four)], RESNET_WIDTHS)
    reasons(found)


def resnets(workers, networks, masked, everything, card):
    print(f"\nResNet-18, a training step: milliseconds, the least of {ROUNDS} rounds; ratios to PyTorch eager and "
          "compiled;\npart of the card's peak; most memory of the card in MB, without data sets")
    row(f"{'':38}", ["ours", "tuned", "eager", "compiled", "o/eag", "t/eag", "o/com", "t/com", "peak o", "peak t",
                     "MB ours", "tuned", "eager", "compiled"], RESNET_WIDTHS)
    for case in networks:
        compiles = everything or workers.simulated or case["width"] in (64, 256) and case["precision"] == "bf16"
        resnet_row(workers, case, ["ours", "tuned", "eager", *(["compiled"] if compiles else [])], card)
    # in PyTorch gradients are multiplied by masks before the update
    resnet_row(workers, masked, ["ours", "tuned", "eager"], card)


def graphs(workers, case):
    found = workers.measure(case, ["ours", "no graph"])
    print(f"\n{title(case)}: a step as one CUDA graph {number(found, 'ours', 1e3)} ms, launched from Python "
          f"{number(found, 'no graph', 1e3)} ms, {ratio(found, 'no graph', 'ours')} times as long")
    reasons(found)


def mlps(workers, widths):
    import exp_mlp_mnist

    simulated = workers.simulated
    workers.limit(STACKED_SECONDS, STACKED_UNTIL)
    print("\nFigure 5's networks: microseconds a network and step; ours and stacked all of a width as one, stacked: "
          "PyTorch's\nvmap, compiled; eager one at a time")
    row(f"{'':10}", ["networks", "ours", "stacked", "eager", "o/eag", "o/stacked"], MLP_WIDTHS)
    for width in widths or exp_mlp_mnist.FIG5_WIDTHS:
        case = dict(net="mlp", width=width, batch=10 if simulated else 100, images=80 if simulated else 60_000,
                    steps=8 if simulated else 600, compile=True)  # a round: an epoch
        count, found = len(stack_of(case)), workers.measure(case, ["ours", "compiled", "eager"])
        wrong = found["compiled"]
        if isinstance(wrong, Failure):
            found |= workers.measure(case | {"compile": False}, ["compiled"])
        each = {name: (value[0] / (1 if name == "eager" else count), 0) if isinstance(value, tuple) else value
                for name, value in found.items()}
        row(f"width {width:3} ", [f"{count}", *(number(each, name, 1e6) for name in ("ours", "compiled", "eager")),
                                  ratio(each, "ours", "eager"), ratio(each, "ours", "compiled")], MLP_WIDTHS)
        if isinstance(wrong, Failure):
            print(f"    stacked is not compiled here: {wrong}")
        reasons(found)


def layers(workers, case):
    found = {}
    print(f"\n{title(case)}: microseconds on the card of the engine's functions, each call in a graph of its own; "
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
    for key in sorted(first, key=lambda key: (["batch", *PARTS].index(key[0]), list(first).index(key))):
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
    """What `bench.py gpu` does with the words behind it; returns the exit code."""
    known = {"--all", "--layers", "--simulated"}
    if set(words) - known:
        print(f"bench.py gpu takes {' and '.join(sorted(known - {'--simulated'}))}, not {' '.join(words)}",
              file=sys.stderr)
        return 2
    everything, simulated = "--all" in words, "--simulated" in words
    sys.path.insert(0, str(ROOT))
    networks, masked, ungraphed, layered, widths = cases(simulated)
    with Workers(simulated, everything) as workers:
        try:
            about = workers.ask("ours", about=1)
        except Failure as failure:
            print(f"bench.py gpu: {failure}", file=sys.stderr)
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
            mlps(workers, widths)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    serve(sys.argv[2], bool(sys.argv[3]))
