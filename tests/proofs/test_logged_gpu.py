"""Whole runs with CuPy's own wheel and cuDNN's plans, on a driver that logs every call: tests/logged_gpu.py.

Started with the name of a job, this file is the process that computes.
"""

import collections
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import logged_gpu  # noqa: E402
import tiny  # noqa: E402

import exp_bottleneck as bottleneck  # noqa: E402
import exp_mlp_mnist as mlp  # noqa: E402
import exp_resnet_cifar as resnet  # noqa: E402
import exp_resnet_imagenet as imagenet  # noqa: E402
import lab  # noqa: E402
import nn  # noqa: E402

pytestmark = pytest.mark.skipif(bool(logged_gpu.missing()), reason=logged_gpu.missing())

# Nodes of the graphs of a training step and of a test step, each of cuDNN's executions counted as one: paid for in
# every step. More is a decision. They are the same in all precisions.
NODES = {"mlp": (14, 4), "resnet": (149, 63), "linear": (201, 80), "nonlinear": (149, 63), "photographs": (152, 64)}
# What a step and the batch after it may do beside its graph, once all is captured, and how often at most.
BESIDE = {"batch": 1, "cupy_add__float64_float64_float64": 2}
LAST = 5  # epochs of a run; by then each batch has been seen three times
UPLOADS = {"photographs": 4}  # pixels, labels, scale and shift; other images lie on the GPU
BETWEEN = "batch", "to_images"  # done before a step, or in the first one after a start
AN_EPOCH = 4  # copies and fills more where an epoch begins or ends: its order and draws, sums, the learning rate
WORK = "launch", "node", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch"  # what is done in a stream's order

# ---------------------------------------------------------------------------------------------- what a process does

NARROW = "--width=8", "--base-width=4"
NETWORKS = {  # a name: script and settings
    "resnet": (resnet, *NARROW), "linear": (bottleneck, *NARROW, "--kind=linear"),
    "nonlinear": (bottleneck, *NARROW, "--kind=nonlinear"),
    "photographs": (imagenet, *NARROW, "--size=32", "--classes=2", "--images=10"),
}
RUNS = {"mlp": (mlp, "--width=20")} | {
    f"{name} {precision}": (*words, f"--precision={precision}")
    for name, words in NETWORKS.items() for precision in ("fp32", "tf32", "bf16")}


def around(name):
    """Replace a method of lab.Run by this function, which gets the run, the method and its arguments."""
    def decorate(function):
        method = getattr(lab.Run, name)
        setattr(lab.Run, name, lambda self, *args, **options: function(self, method, *args, **options))
    return decorate


def mark_stream():
    import cupy

    logged_gpu.mark(f"current {cupy.cuda.get_current_stream().ptr}")


def watch():
    """Let the log tell what a run is at."""
    @around("perform")
    def perform(self, method, bar=True):
        logged_gpu.mark(f"run {self.settings.seed} {nn.engine.stream.ptr}")
        try:
            return method(self, bar=False)
        finally:
            mark_stream()
            nn.to_host(nn.engine.parameter(nn.xp.zeros((2, 3, 3, 3), "f")))  # weights in NHWC
            mark_stream()
            logged_gpu.mark("between")  # what comes is of no run: perhaps the next engine begins

    @around("epochs")
    def epochs(self, method, *args):
        for epoch in method(self, *args):
            logged_gpu.mark(f"epoch {epoch + 1}")
            yield epoch

    @around("training_batches")
    def training_batches(self, method):
        for x, labels in method(self):
            logged_gpu.mark(f"train {len(labels)}")
            yield x, labels

    @around("test_batches")
    def test_batches(self, method, size):
        for x, labels in method(self, size):
            logged_gpu.mark(f"test {len(labels)}")
            yield x, labels

    @around("save_checkpoint")
    def save_checkpoint(self, method):
        logged_gpu.mark("save")
        method(self)
        logged_gpu.mark("saved")


def stop_after(steps):
    """SIGTERM to this process when so many batches were counted"""
    @around("count")
    def count(self, method, sums):
        nonlocal steps
        steps -= 1
        method(self, sums)
        if steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def small(name, folder):
    """(the experiment of this name on a few images, its command line): 3 steps an epoch, the last a smaller one"""
    script, *words = RUNS[name]
    mlp.load = lambda s: tiny.images(20, 12, 28)
    for module in (resnet, bottleneck):
        module.load = lambda s: tiny.images(20, 12, 32, 3).augmented(4, True)
    twice = lab.Figure("", lambda s: [replace(s, seed=seed) for seed in (0, 1)], None)
    experiment = replace(script.EXPERIMENT, load=script.load, figures={"twice": twice}, figures_choose={})
    return experiment, [*words, "--data=synthetic", f"--data-dir={folder}/data", f"--out={folder}/runs",
                        "--device=gpu", f"--epochs={LAST}", "--batch=8"]


def job_runs(name, folder):
    """Two runs with one engine; one without graphs; one that is saved after each step, stopped and continued."""
    logged_gpu.install(Path(folder, "log"))
    watch()
    lab.run.LOOK_EVERY = math.inf  # nothing depends on time
    experiment, words = small(name, folder)
    assert lab.main(experiment, [*words, "--sweep=twice"]) == 0
    assert lab.main(experiment, [*words, "--seed=2", "--no-graph"]) == 0
    lab.run.LOOK_EVERY = -1
    stop_after(5)
    with pytest.raises(SystemExit):
        lab.main(experiment, [*words, "--seed=3", "--save-every=0"])
    assert lab.main(experiment, [*words, "--seed=3", "--save-every=0"]) == 0


def job_tune(name, folder):
    logged_gpu.install(Path(folder, "log"))
    watch()
    experiment, words = small(name, folder)
    assert lab.main(experiment, [*words, "--tune"]) == 0


def job_ranks(name, folder):
    from mpi4py import MPI

    logged_gpu.install(Path(folder, f"log{MPI.COMM_WORLD.rank}"))
    watch()
    lab.run.LOOK_EVERY = math.inf
    # what no kernel has computed is not the same on all ranks: it is downloaded, but not compared
    lab.processes.Ranks.check_same = lambda self, when, what, *arrays: [nn.to_host(array) for array in arrays]
    experiment, words = small(name, folder)
    assert lab.main(experiment, words) == 0


def job_refusals(folder):
    """Print how each of these calls ends, as JSON."""
    logged_gpu.install(Path(folder, "log"))
    import cupy

    runtime, stream = cupy.cuda.runtime, cupy.cuda.Stream(non_blocking=True)
    x, kernel = cupy.zeros(8), cupy.RawKernel('extern "C" __global__ void f() {}', "f")

    def captured(work):
        def run():
            with stream:
                stream.begin_capture()
                try:
                    work()
                finally:
                    stream.end_capture()
        return run

    calls = {
        "too many blocks": lambda: kernel((1, 65536), (32,), ()),
        "too many threads": lambda: kernel((1,), (1025,), ()), "a launch": lambda: kernel((1,), (1024,), ()),
        "freed twice": lambda: [runtime.free(p) for p in [runtime.malloc(8)] * 2],
        "copied too much": lambda: runtime.memcpyAsync(x.data.ptr, x.data.ptr, x.data.mem.size + 1, 3, 0),
        "waits in a capture": captured(stream.synchronize), "downloads in a capture": captured(x.get),
        "a capture": captured(lambda: kernel((1,), (32,), ())),
        "a capture of the null stream": cupy.cuda.Stream.null.begin_capture,
        "device 1": cupy.cuda.Device(1).use}
    ends = {}
    for name, call in calls.items():
        try:
            call()
            ends[name] = ""
        except Exception as error:
            ends[name] = str(error)
    print(json.dumps(ends))


# ---------------------------------------------------------------------------------------------- what the log says


class Step(list):
    """The events of a part of a run, from one mark to the next. run: its seed; stream: its engine's; what: the mark"""

    def __init__(self, before, mark):
        what, *numbers = mark.words
        self.run, self.stream, self.epoch, self.what = before.run, before.stream, before.epoch, what
        if what == "run":
            self.run, self.stream, self.epoch = *map(int, numbers), 0
        if what == "epoch":
            self.epoch = int(numbers[0])

    run = stream = epoch = None

    def named(self, *names):
        return [event for event in self if event.call in names]


def steps(events):
    """The parts of a log, without what was there before the first run"""
    found = []
    for event in events:
        if event.call == "mark":
            found.append(Step(found[-1] if found else Step, event))
        if found:
            found[-1].append(event)
    return found


def graphs(events):
    """{number of a capture: what is in it, its end last}"""
    found, open_at = {}, None
    for i, event in enumerate(events):
        if event.call == "begin":
            open_at = i
        if event.call == "end":
            found[event.words[0]] = events[open_at + 1 : i + 1]
    return found


def done(part, captured):
    """What is done in the order of a stream, graphs replaced by what is in them, as (call, words)."""
    found = []
    for event in part:
        if event.call in WORK and not event.captured:
            inside = captured[event.words[0]] if event.call == "cudaGraphLaunch" else [event]
            found += [(e.call, e.words) for e in inside if e.call in WORK]
    return found


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """started(job, *words, ranks=1): the folder of a job that is done, and what it printed; each is run once."""
    cache, kernels = {}, tmp_path_factory.mktemp("kernels")
    env = os.environ | {"CUPY_CACHE_DIR": str(kernels), "OPENBLAS_NUM_THREADS": "1"}

    def start(job, *words, ranks=1):
        if (job, *words) not in cache:
            folder = tmp_path_factory.mktemp(job)
            line = [sys.executable, __file__, job, *words, str(folder)]
            launcher = [mpirun(), "-n", str(ranks)] if ranks > 1 else []
            process = subprocess.run([*launcher, *line], env=env | {"LOGGED_GPU_DEVICES": str(ranks)}, text=True,
                                     capture_output=True, timeout=300)
            assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
            cache[job, *words] = folder, process.stdout
        return cache[job, *words]

    return start


@pytest.fixture
def log(started, request):
    """All events of the runs of this name"""
    return logged_gpu.events(started("runs", request.param)[0] / "log")


each_run = pytest.mark.parametrize("log", RUNS, indirect=True)


def mpirun():
    beside = str(Path(sys.executable).parent)  # where pip puts the mpirun of a wheel
    return shutil.which("mpirun", path=os.pathsep.join((beside, os.environ.get("PATH", ""))))


# ---------------------------------------------------------------------------------------------- tests


def test_what_is_refused(started):
    ends = json.loads(started("refusals")[1].splitlines()[-1])
    assert {name for name, error in ends.items() if not error} == {"a launch", "a capture"}, ends
    assert "CaptureInvalidated" in ends["waits in a capture"] and "is capturing" in ends["downloads in a capture"]


@each_run
def test_all_is_in_the_order_of_the_engines_stream(log):
    """It is the current one when a run has ended, also after a download of weights in NHWC. Nothing is refused."""
    assert not [event for event in log if event.call == "refused"]
    for step in steps(log):
        if step.what == "current":
            assert int(step[0].words[1]) == step.stream, f"run {step.run} leaves another stream: {step[0]}"
        if step.what == "between":
            continue
        wrong = [event for event in step if event.call in WORK and event.stream != step.stream]
        assert not wrong, f"run {step.run}, {step.what}: {wrong[:5]}"


@each_run
def test_captures(log):
    """hold work on one stream alone; meanwhile there is no wait, no compiling and no memory from outside the pool."""
    for number, inside in graphs(log).items():
        *work, end = inside
        assert end.words[2] == "whole" and int(end.words[1]) == len(work) > 0, f"capture {number}: {end}"
        assert {event.call for event in work} <= {"launch", "node", "cudaMemcpyAsync", "cudaMemsetAsync"}, inside
        assert {event.stream for event in work} == {end.stream}
        assert all(e.words[0] in ("device>device", "value>device") for e in work if e.call.startswith("cudaMem")), work


@each_run
def test_graphs_hold_what_runs_without_them(log):
    """A run without graphs does the same in the same order, and so does a second run of the process with graphs."""
    captured, whole = graphs(log), {run: [] for run in (0, 1, 2)}
    for step in steps(log):
        if step.run in whole and step.what in ("epoch", "train", "test"):
            whole[step.run].append((step.epoch, *step[0].words, done(step, captured)))
    for run in (1, 2):
        for here, there in zip(whole[0], whole[run], strict=True):
            assert here == there, f"run {run}, epoch {here[0]}, {here[1:3]}: {difference(here[3], there[3])}"
    launches = [[event.words[1] for step in steps(log) if step.run == run and step.epoch == LAST
                 for event in step.named("cudaGraphLaunch")] for run in (0, 1, 2)]
    assert launches[0] == launches[1] and len(launches[0]) >= 4 and not launches[2]


def difference(here, there):
    """Where two lists first differ"""
    pairs = enumerate(zip(here, there))
    i = next((i for i, (a, b) in pairs if a != b), min(len(here), len(there)))
    return f"{len(here)} and {len(there)} calls, from number {i} on {here[i : i + 2]} and {there[i : i + 2]}"


@each_run
def test_a_run_that_is_stopped_and_continued(log):
    """saved after each step: its steps are those of a whole run, but for copies of weights where it begins again"""
    captured, whole = graphs(log), {0: [], 3: []}
    for step in steps(log):
        if step.run in whole and step.what in ("train", "test"):
            kernels = [words for call, words in done(step, captured)
                       if call in ("launch", "node") and words[0] not in BETWEEN]
            whole[step.run].append((step.epoch, *step[0].words, kernels))
    for here, there in zip(whole[0], whole[3], strict=True):
        assert here == there, f"epoch {here[0]}, {here[1:3]}: {difference(here[3], there[3])}"


@each_run
def test_nothing_is_allocated_or_compiled_any_more(log, request):
    """in the last epoch, when each batch has been seen three times; beside the graphs there is little."""
    uploads = UPLOADS.get(request.node.callspec.params["log"].split()[0], 0)
    for step in steps(log):
        if step.run not in (0, 1) or step.epoch != LAST or step.what not in ("epoch", "train", "test"):
            continue
        calls = collections.Counter(event.call for event in step)
        assert not {name for name in calls if name.startswith(("cuModule", "cuLibrary", "begin"))}, calls
        assert not {"cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost"} & set(calls), calls
        assert calls["cudaGraphLaunch"] == (step.what != "epoch"), calls
        launched = collections.Counter(event.name for event in step.named("launch", "node"))
        assert not launched - collections.Counter(BESIDE), f"{step.what}: {launched}"
        moved = step.named("cudaMemcpyAsync", "cudaMemsetAsync")
        assert len(moved) <= uploads + AN_EPOCH, moved


def test_nodes(started):
    """The table above is what is captured."""
    found = []
    for name in RUNS:
        log = logged_gpu.events(started("runs", name)[0] / "log")
        kinds, captured = collections.defaultdict(set), graphs(log)
        for step in steps(log):
            for event in step.named("cudaGraphLaunch"):
                kinds[step.what].add(int(event.words[1]))
                names = collections.Counter(e.name for e in captured[event.words[0]][:-1])
            if step.what in ("train", "test") and step.named("end") and step.run == 0 and step[0].words[1] != "4":
                print(f"{name}, {step.what}, {sum(names.values())} nodes: "
                      + ", ".join(f"{count} {kernel}" for kernel, count in names.most_common()))
        assert all(len(nodes) == 1 for nodes in kinds.values()), f"{name}: {kinds}"  # also of the smaller batch
        found.append((name.split()[0], (*kinds["train"], *kinds["test"])))
    assert set(found) == set(NODES.items()), set(found)


def test_tuning(started):
    """Plans are timed while steps run for the first time, and never in a capture."""
    log = logged_gpu.events(started("tune", "resnet bf16")[0] / "log")
    assert not [event for event in log if event.call == "refused"]
    times = [event for event in log if event.call == "cudaEventSynchronize"]
    assert len(times) > 300 and not any(event.captured for event in times)
    nodes = {step.what: int(event.words[1]) for step in steps(log) for event in step.named("end")}
    assert (nodes["train"], nodes["test"]) == NODES["resnet"]


@pytest.mark.skipif(not mpirun() or not importlib.util.find_spec("mpi4py"), reason="no mpirun or no mpi4py")
@pytest.mark.parametrize("name", ["resnet tf32", "resnet bf16"])
def test_ranks(started, name):
    """Two ranks, each on a GPU of its own, do the same in the same order, and sum up on the engine's stream."""
    folder, _ = started("ranks", name, ranks=2)
    logs = [logged_gpu.events(folder / f"log{rank}") for rank in (0, 1)]
    work = [[(step.epoch, step[0].words, done(step, {})) for step in steps(log) if step.what in ("train", "test")]
            for log in logs]
    for here, there in zip(*work, strict=True):
        assert here == there, f"epoch {here[0]}, {here[1]}: {difference(here[2], there[2])}"
    for rank, log in enumerate(logs):
        assert not [event for event in log if event.call in ("refused", "begin")]
        assert [event.words for event in log if event.call == "cudaSetDevice"][-1] == (str(rank),)
        sums = [event for event in log if event.call == "node" and event.name == "all_reduce"]
        assert len(sums) >= 12 and {event.stream for event in sums} == {steps(log)[0].stream}


if __name__ == "__main__":
    globals()[f"job_{sys.argv[1]}"](*sys.argv[2:])
