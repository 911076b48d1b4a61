"""The first minutes on a GPU: `python bench/first_minutes.py [NUMBER ...]`; it takes about ten.

Each check is a process of its own, so that none spoils the next, and says "ok", or "FAILED" with what was seen, what it
means and what to do. NUMBER: of the checks to make, by default all. The exit code is 1 if one failed. --simulated: on
a GPU that is simulated on the CPU, with tiny networks; that shows what the script does, and nothing of a real card.
"""

import contextlib
import io
import itertools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import test_engines_gpu as tests  # noqa: E402
import tiny  # noqa: E402
from gpu import about, ask, cifar, finite, one_line, ours, title, use_gpu  # noqa: E402

import exp_resnet_cifar as resnet  # noqa: E402
import lab  # noqa: E402
import nn  # noqa: E402

PATIENCE = 180  # seconds for a process; five times that for a check, which may start others
OK, FAILED, SKIPPED = 0, 1, 3  # exit codes of a check
TOOLS = "memcheck", "racecheck", "synccheck"


class Fault(Exception):
    """What was seen that must not be"""


class Skip(Exception):
    """Why a check is not made"""


# ---------------------------------------------------------------------------------------------- single operations


def properties(simulated):
    return use_gpu(simulated).cuda.runtime.getDeviceProperties(0)


def precisions(simulated):
    """Those that this GPU has"""
    return ["fp32", "tf32", "bf16"] if properties(simulated).get("major", 8) >= 8 else ["fp32", "tf32"]


def here(simulated):
    able, driver = precisions(simulated), "unknown"
    from engines.gpu_convolution import cudnn

    cudnn()  # which says what is missing
    found, (free, total) = about("ours", simulated), nn.xp.cuda.runtime.memGetInfo()
    if shutil.which("nvidia-smi") and not simulated:
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                                capture_output=True).stdout.strip() or driver
    capability = ".".join(str(properties(simulated).get(name, "?")) for name in ("major", "minor"))
    yield f"{found['gpu']}, compute capability {capability}, driver {driver}"
    yield f"{found['versions']}, NumPy {np.__version__}, Python {platform.python_version()}"
    yield f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of its memory are free"
    if free < 0.9 * total:
        yield "If other programs hold the rest, the times of the last check may be wrong."
    if "bf16" not in able:
        yield "bf16 is left out of the checks: it needs compute capability 8.0."


def current_stream(simulated):
    xp = use_gpu(simulated)
    for when in ("at first", "after a download of a weight in NHWC"):
        if xp.cuda.get_current_stream() != nn.engine.stream:
            raise Fault(f"{when} the current stream is another than the engine's")
        nn.to_host(nn.engine.parameter(xp.ones((4, 3, 3, 3), np.float32)))
    yield "at first, and after a download of a weight in NHWC"


def operations(N, C, H):
    """{name: (function of a generator that makes arrays, what an engine computes with them)}"""
    shapes, found = [(100, 8 * C), (10, 8 * C), (10,), (100, 10)], {}
    for name, shape, O, k, stride in [("3 x 3, stride 2", (N, C, H, H), 2 * C, 3, 2), ("3 x 3", (N, C, H, H), C, 3, 1),
                                      ("1 x 1, stride 2", (N, C, H, H), 2 * C, 1, 2), ("stem", (N, 3, H, H), C, 3, 1),
                                      ("stem 7 x 7, stride 2", (N, 3, 2 * H, 2 * H), C, 7, 2)]:
        moves = dict(stride=stride, padding=k // 2)
        found[f"convolution {name}"] = (partial(tests.problem, shape=shape, O=O, k=k, **moves),
                                        partial(tests.convolved, **moves))
    return found | {"BatchNorm": (partial(tests.statistics, shape=(N, C, H, H)), tests.batch_norm),
                    "linear layer": (partial(tests.normal, shapes=shapes), tests.linear),
                    "cross entropy": (partial(tests.answers, N=128, K=10), tests.cross_entropy)}


def beside(wrong, bound):
    return f"{wrong:.1e} {'<' if wrong < bound else '>'} {bound:.1e}"


def largest_error(name, make, work, precision):
    """(error, bound, name) of the result that is nearest to its bound, or farthest beyond it"""
    arrays, wanted = zip(*(tests.rounded(a, nn.engine) for a in make(np.random.default_rng(0))))
    got, found = work(nn.engine, *arrays), []
    want = work(tests.CPU, *wanted, **({"open_where": got} if name == "BatchNorm" else {}))
    for what, array in got.items():
        kind = "bfloat16" if array.dtype.name == "bfloat16" else "float32"
        bound = tests.TOLERANCE[precision if name.startswith("convolution") else kind]
        numbers = np.isfinite(tests.host(array)).all()
        found.append((tests.error(array, np.asarray(want[what])) if numbers else np.inf, bound, what))
    return max(found, key=lambda row: row[0] / row[1])


def single_operations(simulated):
    chosen, able, faults = operations(4, 16, 8) if simulated else operations(8, 64, 16), precisions(simulated), []
    rows = {name: "" for name in chosen}
    for precision in able:
        use_gpu(simulated, precision=precision)
        for name, (make, work) in chosen.items():
            try:
                wrong, bound, what = largest_error(name, make, work, precision)
                rows[name] += f"  {beside(wrong, bound):18}"
                if not wrong < bound:
                    faults.append(f"{name} in {precision}: {what} is off by {wrong:.1e} of its largest entry")
            except Exception as error:
                rows[name] += f"  {'failed':18}"
                faults.append(f"{name} in {precision}: {one_line(error)}")
    yield f"{'largest error over largest entry':34}" + "".join(f"  {precision:18}" for precision in able).rstrip()
    yield from (f"{name:34}{cells.rstrip()}" for name, cells in rows.items())
    if faults:
        raise Fault("\n".join(faults))


def network_gradient(simulated):
    nn.use_device("cpu")
    wanted, faults = [tests.gradients(seed) for seed in tests.SEEDS], []
    for precision in precisions(simulated):
        use_gpu(simulated, precision=precision)
        (wrong, of_loss), (bound, _, bound_of_loss) = tests.gradient_errors(wanted), tests.GRADIENTS[precision]
        yield f"{precision}: error of the gradient, as one vector, {beside(wrong, bound)}; of the loss " \
              f"{beside(of_loss, bound_of_loss)}"
        faults += [] if wrong < bound and of_loss < bound_of_loss else [precision]
    if faults:
        raise Fault(f"beyond the bound in {', '.join(faults)}")


# ---------------------------------------------------------------------------------------------- steps


def three_steps(simulated):
    """What the sanitizer's tools look at: uncaptured steps at width 3"""
    if not simulated:
        use_gpu(simulated).cuda.set_allocator(None)  # each array its own, so that what is beside it is seen
    for precision in precisions(simulated)[1:]:
        batches, step, _ = ours(cifar(3, 4, precision, 2, images=16), simulated)
        for x, labels in itertools.islice(batches, 3):
            finite(nn.to_host(step.function(x, labels))[0])


def sanitizer(simulated):
    """The path of compute-sanitizer, None without"""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", *Path(np.__file__).parents[1].glob("nvidia/*/bin")]
    return None if simulated else shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, places)))


def sanitized(simulated):
    code, said = process(simulated, "three-steps")
    if code:
        raise Fault("three uncaptured steps fail by themselves:\n" + "\n".join(said.splitlines()[-3:]))
    yield "three uncaptured steps at width 3: done"
    path, faults = sanitizer(simulated), []
    if not path:
        raise Skip("There is no compute-sanitizer. It comes with the CUDA toolkit and as a Python package,\nfor CUDA "
                   "13.0 `pip install nvidia-cuda-sanitizer-api==13.0.*`; then `python bench/first_minutes.py 5`.")
    source = (ROOT / "engines" / "gpu.cu").read_text()
    kernels = re.findall(r"__global__ .*?void (?:__launch_bounds__\(\d+\) )?(\w+)\(", source)
    for tool in TOOLS:
        code, said = process(simulated, "three-steps", before=[path, "--tool", tool, "--report-api-errors", "no"])
        summary = re.search(r"\w+ SUMMARY: .*", said)
        yield f"{tool}: {summary[0] if summary else f'no summary, exit code {code}'}"
        if code or not summary or not re.search(r"SUMMARY: 0 |\(0 errors", summary[0]):
            named = [name for name in kernels if re.search(rf"^=====.*\bat {name}\b", said, re.M)]
            faults += [f"{tool} names {', '.join(named) or 'none'} of our kernels:"]
            faults += [line for line in said.splitlines() if line.strip(" =")][:6]
    if faults:
        raise Fault("\n".join(faults))


def trained(simulated, captured=True, checkpoints=False):
    """(weights, masks and velocities on the host before 50 steps of a sparse ResNet-18, the same after)"""
    case = cifar(3, 4, "tf32", 2, images=16) if simulated else cifar(64, precision="tf32", base=16, images=1280)
    batches, step, optimizer = ours(case, simulated)

    def state():
        found = [(p.data, p.mask) for p in optimizer.params]
        host = {f"weight {i}": nn.to_host(w) for i, (w, _) in enumerate(found)}
        return host | {f"mask {i}": nn.to_host(m) for i, (_, m) in enumerate(found) if m is not None} \
            | optimizer.state_dict()

    before = state()
    for x, labels in itertools.islice(batches, 8 if simulated else 50):
        sums = (step if captured else step.function)(x, labels)
        if checkpoints:
            state()
    if not captured:  # and what is captured has to be the same
        finite(nn.to_host(sums)[0])
    return before, state()


def same(one, other, what):
    """A line that says so; Fault unless two states are the same to the bit."""
    wrong = [n for n in one | other if n not in one or n not in other or not tests.same_bits(one[n], other[n])]
    if wrong:
        raise Fault(f"{what}: {len(wrong)} of {len(one)} arrays differ, {', '.join(wrong[:5])} ...")
    return f"{what}: {len(one)} arrays have the same bits"


def captured_steps(simulated):
    (start, captured), (_, plain) = trained(simulated), trained(simulated, captured=False)
    yield same(plain, captured, "captured and uncaptured")
    weights, masks = ([name for name in plain if name.startswith(kind)] for kind in ("weight ", "mask "))
    if still := [name for name in weights if tests.same_bits(start[name], captured[name])]:
        raise Fault(f"not moved in all the steps: {', '.join(still)}")
    if wrong := [m for m in masks if captured[m.replace("mask", "weight")][~captured[m]].any()]:
        raise Fault(f"weights are not zero where they are masked: {', '.join(wrong)}")
    yield f"{len(weights)} arrays of weights moved, {len(masks)} are zero where they are masked"
    if nn.to_host(nn.engine.counters).any():
        raise Fault("counters of blocks are not zero after the steps: is_last of engines/gpu.cu is wrong")
    x, g = (nn.engine.images(nn.xp.asarray(np.random.default_rng(n).standard_normal((32, 64, 16, 16)).astype("f")))
            for n in (0, 1))
    one, zero = nn.xp.ones(64, np.float32), nn.xp.zeros(64, np.float32)

    def sums():  # which the last of many blocks adds up, whichever it is
        _, saved = nn.engine.batch_norm(x, one, zero, zero.copy(), one.copy(), True, 0.1, 1e-5, None, False)
        _, dweight, dbias, _ = nn.engine.batch_norm_gradients(g, x, None, one, saved, True, False)
        return [nn.to_host(array).tobytes() for array in (saved, dweight, dbias)]

    first, count = sums(), 3 if simulated else 1000
    if wrong := [n for n in range(count) if sums() != first]:
        raise Fault(f"sums over blocks differ in {len(wrong)} of {count} repetitions")
    yield f"sums over blocks have the same bits in {count} repetitions"


def checkpoints(simulated):
    (_, plain), (_, saved) = trained(simulated), trained(simulated, checkpoints=True)
    yield same(plain, saved, "with a checkpoint after each step and without")


# ---------------------------------------------------------------------------------------------- runs


def train(simulated, folder, stop=0, images=(500, 200, 32, 3), **settings):
    """A run of exp_resnet_cifar.py on noise by its command line; stop: SIGTERM after so many steps.

    images: numbers to train and to test on, side and channels. Fault if it fails.
    """
    use_gpu(simulated)
    words = tiny.flags(folder, data="synthetic", save_every=1e9, **settings)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said, \
            contextlib.redirect_stderr(said):
        patch.setattr(resnet, "load", lambda s: tiny.images(*images).augmented(2, True))
        if stop:
            tests.stopped_after(patch, stop)
        code = lab.main(resnet.EXPERIMENT, words)
    if code:
        raise Fault(f"a run ended with exit code {code}:\n{said.getvalue().strip()}")


def settings_of(simulated):
    """Of the runs that are compared to the bit; the last batch of an epoch is a smaller one"""
    sizes = dict(width=64, base_width=16, batch=64)
    if simulated:
        sizes = dict(width=3, base_width=2, batch=8, images=(20, 12, 16, 3))
    return dict(device="gpu", precision="tf32", epochs=3, lr=0.01) | sizes


def same_runs(simulated):
    with tempfile.TemporaryDirectory() as folder:
        one, again, alone, cut = (str(Path(folder, name)) for name in ("one", "again", "alone", "cut"))
        for out in (one, again):
            train(simulated, out, **settings_of(simulated))
        for out, stop, expected in ((alone, 0, 0), (cut, 5 if simulated else 13, 128 + signal.SIGTERM), (cut, 0, 0)):
            code, said = process(simulated, "run", out, str(stop))
            if code != expected:
                raise Fault(f"a run of its own process ended with exit code {code}, not {expected}:\n{said.strip()}")
        left = []
        for out in (one, again, alone, cut):
            files = {Path(path).name: content for path, content in tiny.remains(out).items()}
            left.append({name: np.array(entry[2]) for name, entry in files["checkpoint.npz"].items()}
                        | {"log.csv": np.array(files["log.csv"])})
        for state, what in zip(left[1:], ("a second run of one process", "a run in a process of its own",
                                          "a run that was stopped and resumed")):
            yield same(left[0], state, what)


def same_as_cpu(simulated):
    logs, sizes = {}, dict(images=(20, 12, 16, 3), width=3, base_width=2, batch=20, epochs=4, lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        for device, more in (("cpu", {}), ("gpu", dict(precision="fp32"))):
            train(simulated, str(Path(folder, device)), device=device, **more, **sizes)
            (path,) = Path(folder, device).rglob("log.csv")
            logs[device] = np.loadtxt(path, delimiter=",", skiprows=1)[:, [2, 4]]  # losses in training and test
    wrong, bound = np.abs(logs["gpu"] / logs["cpu"] - 1).max(), 1e-4
    yield f"losses of {len(logs['cpu'])} epochs in training and test: largest error {beside(wrong, bound)}"
    if not wrong < bound:
        raise Fault(f"GPU: {logs['gpu'].ravel().round(4).tolist()}, CPU: {logs['cpu'].ravel().round(4).tolist()}")


def speed(simulated):
    count = 2 if simulated else 20
    for precision in reversed(precisions(simulated)[1:]):
        case = cifar(3, 4, precision, images=16, seconds=0) if simulated else cifar(64, precision=precision)
        whole = ask("ours", case, simulated)  # in a process of its own
        from engines.gpu_convolution import milliseconds

        batches, step, _ = ours(case, simulated)
        for x, labels in itertools.islice(batches, 5):
            sums = step(x, labels)
        ms = milliseconds(lambda: [step(x, labels) for _ in range(count)]) / count
        finite(nn.to_host(sums)[0])
        yield (f"{title(case)}: {ms:.2f} ms a step as a graph, {whole['seconds'] * 1e3:.2f} ms with batches and "
               f"launches, {whole['memory'] / 2**20:.0f} MB")
    yield "On paper an H100 needs about 2 ms at width 64 and batch 128 in bf16."


# ---------------------------------------------------------------------------------------------- the list

CHECKS = [
    ("what is here", here,
     "The GPU, its driver or a package cannot be used, so nothing else is tried. `nvidia-smi` must list the GPU, and "
     "the packages must be those of requirements-gpu.txt or, for CUDA 12, of requirements-gpu-cuda12.txt."),
    ("the current stream is the engine's", current_stream,
     "Kernels and copies are not in one order, and captures stay empty: no later number counts. The stream that "
     "engines/gpu.py enters must stay on top of CuPy's stack."),
    ("single operations against the CPU", single_operations,
     "A kernel or one of cuDNN's plans is wrong, or less precise than thought. Up to ten times the bound in "
     "convolutions alone speaks for another algorithm (Winograd in fp32, cut off instead of rounded in tf32); more, or "
     "in other operations, for a defect in engines/gpu.cu."),
    ("a network's gradient against the CPU", network_gradient,
     "If the check before is ok, it is how operations follow each other: their order on the stream, memory that is "
     "used again too early, a layout; see check 5. If the loss agrees and the gradient in fp32 is off by 0.01 alone, "
     "rounding has opened other ReLUs, which is no defect."),
    ("no kernel leaves its memory; threads of a block do not race", sanitized,
     "compute-sanitizer saw an invalid access, a race or a barrier that not all threads reach. If one of our kernels "
     "is named, it is to be corrected in engines/gpu.cu; what is reported of cuDNN's alone may be a false alarm."),
    ("captured steps do what uncaptured ones do", captured_steps,
     "A CUDA graph misses work, holds an address that is used again, or is empty. Train with --no-graph until it is "
     "found; captures are made in Compiled of engines/gpu.py. If sums over blocks differ, blocks race with each other, "
     "which compute-sanitizer does not see: is_last of engines/gpu.cu."),
    ("checkpoints change nothing", checkpoints,
     "Downloads change the current stream, or memory that a graph works on. Compiled and to_host of engines/gpu.py are "
     "where to look."),
    ("runs repeat to the bit, also after a stop", same_runs,
     "Something adds up in a random order, or a state is kept beyond a run or missing in a checkpoint. Results would "
     "still be usable, but not repeatable."),
    ("a run on the CPU has the same losses", same_as_cpu,
     "If the checks before are ok, look at what they leave out: the optimiser, batches and their random crops, running "
     "estimates in the test."),
    ("a first look at speed", speed,
     "A step failed, or its loss is not finite, at the size of real runs. If memory is short, see what else holds it."),
]
NEXT = "Next: `pytest --device gpu`, then `python bench/gpu.py`, then first real runs: `python exp_resnet_cifar.py`."


def examine(number, simulated):
    """Make a check in this process and print what it says; returns its exit code."""
    try:
        for line in CHECKS[number - 1][1](simulated):
            print(line, flush=True)
        return OK
    except Skip as skip:
        print(skip)
        return SKIPPED
    except Fault as fault:
        print(fault)
    except Exception as error:
        print(one_line(error))
        for frame in traceback.extract_tb(error.__traceback__)[-4:]:
            print(f"    {Path(frame.filename).name}:{frame.lineno} {frame.name}: {frame.line}")
    return FAILED


def process(simulated, *words, before=()):
    """(exit code, output) of this script in a process of its own"""
    command = [*before, sys.executable, "-X", "faulthandler", __file__, *words, *["--simulated"] * simulated]
    check, said, end = words[0] == "check", "", ""
    patience = PATIENCE * (5 if check else 1)
    child = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
                             start_new_session=check)
    try:
        said, _ = child.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        end = f"no answer in {patience} s: it hangs"
        child.send_signal(signal.SIGABRT)  # faulthandler says where
        with contextlib.suppress(subprocess.TimeoutExpired):
            said, _ = child.communicate(timeout=10)
    finally:
        with contextlib.suppress(ProcessLookupError):  # a check with the processes that it started
            os.killpg(child.pid, signal.SIGKILL) if check else child.kill()
    code = FAILED if child.returncode is None else child.returncode
    return code, said + (end or (f"it died of {signal.Signals(-code).name}" if code < 0 else ""))


def in_a_process(number, simulated):
    return process(simulated, "check", str(number))


def main(words, perform=in_a_process):
    """The checks of the command line; perform(number, simulated) makes one: (exit code, output). The exit code."""
    simulated, numbers = "--simulated" in words, [word for word in words if word != "--simulated"]
    if not all(word.isdecimal() and 1 <= int(word) <= len(CHECKS) for word in numbers):
        print(f"bench/first_minutes.py takes numbers from 1 to {len(CHECKS)}, not {' '.join(numbers)}", file=sys.stderr)
        return 2
    began, found = time.monotonic(), {"ok": [], "skipped": [], "FAILED": []}
    print("Checks of the project's GPU code on this machine; all of them take about ten minutes.")
    for number in map(int, numbers or range(1, len(CHECKS) + 1)):
        name, _, meaning = CHECKS[number - 1]
        print(f"{number:2}. {name} ... ", end="", flush=True)
        before = time.monotonic()
        code, said = perform(number, simulated)
        verdict = {OK: "ok", SKIPPED: "skipped"}.get(code, "FAILED")
        found[verdict].append(str(number))
        print(f"{verdict} ({time.monotonic() - before:.1f} s)")
        print(textwrap.indent(said.strip("\n"), " " * 6))
        if verdict == "FAILED":
            print(textwrap.fill(meaning, 114, initial_indent="   -> ", subsequent_indent=" " * 6), flush=True)
            if number == 1:
                break
    parts = [f"{verdict}: {', '.join(which)}" for verdict, which in found.items() if which]
    print(f"\n{'; '.join(parts)}. {time.monotonic() - began:.0f} s in all.")
    if failed := found["FAILED"]:
        print(f"Again: `python bench/first_minutes.py {' '.join(failed)}`. Please report all of this.")
        return FAILED
    print(NEXT)
    return OK


def serve(word, *rest):
    """One of the processes that this script starts; returns its exit code."""
    simulated = "--simulated" in rest
    if word == "check":
        return examine(int(rest[0]), simulated)
    if word == "three-steps":
        return three_steps(simulated)
    return train(simulated, rest[0], int(rest[1]), **settings_of(simulated))


if __name__ == "__main__":
    serving = sys.argv[1:2] and sys.argv[1] in ("check", "three-steps", "run")
    sys.exit(serve(*sys.argv[1:]) if serving else main(sys.argv[1:]))
