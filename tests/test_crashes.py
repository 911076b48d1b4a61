"""Runs that are killed, stopped, refused by the disk or started twice: they end as one that nothing happened to.

Most of this is done by processes forked from one that has no threads, so that a start takes a hundredth of a second.
Run with the name of one of the jobs below, this file is that process; what it prints are the counts of what it did.
"""

import contextlib
import csv
import errno
import http.server
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command  # noqa: E402
import data  # noqa: E402
import figures  # noqa: E402
import files  # noqa: E402
import loop  # noqa: E402
import nn  # noqa: E402
import train  # noqa: E402

ENV = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
forking = pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/fd").exists(), reason="no Linux")

# ---------------------------------------------------------------------------------------------- a run of 12 steps


@dataclass(frozen=True)
class Settings(train.Settings):
    epochs: int = train.setting(3, "")
    batch: int = train.setting(10, "")
    width: int = train.setting(12, "")


def load(s):
    rng = np.random.default_rng(5)
    images, labels = rng.integers(0, 256, (65, 1, 6, 6), np.uint8), rng.integers(0, 10, 65)
    dataset = data.normalized("tiny", 10, (images[:35], labels[:35]), (images[35:], labels[35:]), 0.5, 0.3)
    return dataset.augmented(1, True)


def build(s, dataset):
    """Masks, running estimates and, with the optimizer below, momentum: all that a continuation has to have."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, s.width), Estimate(), nn.ReLU(), nn.Linear(s.width, 10))
    nn.sparsify(model, 300, s.seed)
    return model


class Estimate(nn.Module):
    """Subtracts a running mean of what passes, so that a wrong one shows in the accuracy."""

    def __init__(self):
        self.running = np.zeros(1, np.float32)

    def forward(self, x):
        if self.training:
            self.running[...] = 0.9 * self.running + 0.1 * x.data.mean()
        return x - nn.Tensor(self.running.copy())


TINY = train.Experiment(
    name="tiny", script="tiny.py", description=__doc__, settings=Settings, load=load, build=build,
    optimizer=lambda s, params: nn.SGD(params, s.lr, momentum=0.9, weight_decay=1e-3),
    schedule=lambda s: nn.MultiStepLR(s.lr, range(s.epochs), 0.9),  # another rate in each epoch
    figures={"many": figures.Figure("", lambda s: [replace(s, seed=i) for i in range(12)], None)},
    quick={}, quick_help="", quick_figure="", test_batch=10)


def flags(out, **settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in (dict(out=out) | settings).items()]


def often(out, **settings):
    """The words of a run that saves after every step."""
    return flags(out, save_every=0, **settings)


def run_of(out, **settings):
    return train.Run(TINY, replace(Settings(out=str(out)), **settings))


def remains(out):
    """All that runs leave in a folder as {path: content}, byte by byte, times aside."""
    found = {}
    for path in sorted(p for p in Path(out).rglob("*") if p.is_file() and p.name != "lock"):
        content = path.read_bytes()
        if path.name == "checkpoint.npz":
            arrays = files.load_arrays(content)
            arrays["progress.history"] = arrays["progress.history"][:, :-1]
            content = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}
        elif path.name == "log.csv":
            content = [row[:-1] for row in csv.reader(content.decode().splitlines())]
            assert [row[0] for row in content[1:]] == [str(i + 1) for i in range(len(content) - 1)], content
        elif path.name == "result.json":
            content = re.sub(rb'"seconds": [^,]*,', b"", content, count=1)
        found[str(path.relative_to(out))] = content
    return found


def assert_same(out, uncut):
    have = remains(out)
    assert have.keys() == uncut.keys(), (sorted(have), sorted(uncut))
    wrong = [name for name in have if have[name] != uncut[name]]
    assert not wrong, wrong


# ---------------------------------------------------------------------------------------------- what a process does


def watch(see):
    """From now on see("before fsync", "log.csv") and the like is called before and after each call by which a file is
    written, and amid each write, when half of its bytes are on their way.
    """
    def around(module, name, named):
        real = getattr(module, name)

        def call(*args, **options):
            see(f"before {name}", named(args))
            value = real(*args, **options)
            see(f"after {name}", named(args))
            return value

        setattr(module, name, call)

    class File:
        def __init__(self, path, mode):
            self.name = Path(path).name
            see("before create", self.name)
            self.real = open(path, mode)
            see("after create", self.name)

        def write(self, content):
            content = bytes(content)
            see("before write", self.name)
            self.real.write(content[: len(content) // 2])
            self.real.flush()
            see("amid write", self.name)
            self.real.write(content[len(content) // 2 :])
            see("after write", self.name)

        def flush(self):
            see("before flush", self.name)
            self.real.flush()
            see("after flush", self.name)

        def close(self):
            self.real.close()
            see("at close", self.name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.close()

        def __getattr__(self, name):
            return getattr(self.real, name)

    for name in ("replace", "unlink", "mkdir", "open"):
        around(os, name, lambda args: Path(args[-1] if len(args) == 2 and isinstance(args[1], (str, Path)) else args[0]
                                           ).name)
    around(os, "fsync", lambda args: Path(os.readlink(f"/proc/self/fd/{args[0]}")).name)
    for module in (files, data):
        module.open = lambda path, mode="r": File(path, mode) if mode[0] in "wxa" else open(path, mode)


def watch_training(see):
    """The same for steps and batches of an evaluation."""
    real_step, real_batches = loop.train_step, data.Dataset.test_batches

    def step(*args):
        see("before step", "")
        value = real_step(*args)
        see("after step", "")
        return value

    def batches(*args, **options):
        for batch in real_batches(*args, **options):
            see("before evaluation", "")
            yield batch
        see("after evaluation", "")

    loop.train_step, data.Dataset.test_batches = step, batches


def fork(work, errors=os.devnull):
    """A process that does work() and ends with what it returns; all it writes to its two outputs goes to a file."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        output = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def code_of(process):
    """The exit code as a shell tells it."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code if code >= 0 else 128 - code


def tiny(words, see=None, training=False):
    """The command, in a forked process."""
    train.LOOK_EVERY = -1  # after every step, so that every step may save
    if see:
        watch(see)
        if training:
            watch_training(see)
    return command.main(TINY, words)


def ended(words, errors=os.devnull):
    """Run the command to its end, undisturbed."""
    assert code_of(fork(lambda: tiny(words), errors)) == 0, Path(errors).read_text() if errors != os.devnull else ""


def at(number, act, always=False):
    """What to see with: act() the number-th time, or from then on."""
    count = itertools.count(1)

    def see(what, name):
        n = next(count)
        if n == number or always and n > number:
            act(what, name)

    return see


def die(what, name):
    os.kill(os.getpid(), signal.SIGKILL)


def uncut_run(out, training=False, **settings):
    """What an undisturbed run leaves, and all that was seen during it."""
    listing = out / "seen.json"

    def work():
        seen = []
        code = tiny(often(out / "uncut", **settings), lambda *event: seen.append(event), training)
        listing.write_text(json.dumps(seen))
        return code

    assert code_of(fork(work)) == 0
    seen = json.loads(listing.read_text())
    listing.unlink()
    return remains(out / "uncut"), seen


# ---------------------------------------------------------------------------------------------- jobs: kills


def job_kills(out, in_saves, at_times, seed):
    """Kill so often in each way; whenever a run comes to its end all the same, compare it and begin a new one."""
    random.seed(int(seed))
    uncut, seen = uncut_run(out)
    begin = time.monotonic()
    ended(often(out / "timed"))
    duration = time.monotonic() - begin
    kills = {"in saves": 0, "at times": 0}
    wanted = {"in saves": int(in_saves), "at times": int(at_times)}
    ends, words = 0, often(out / "cut")
    while kills != wanted:
        kind = random.choice([k for k in kills if kills[k] < wanted[k]])
        if kind == "in saves":
            point = random.randint(1, len(seen))
            process = fork(lambda: tiny(words, at(point, die)))
        else:
            process = fork(lambda: tiny(words))
            time.sleep(random.uniform(0, duration))
            os.kill(process, signal.SIGKILL)
        code = code_of(process)
        assert code in (0, 137), code
        kills[kind] += code == 137
        if code == 0 or run_of(out / "cut").done():
            ended(words)
            assert_same(out / "cut", uncut)
            shutil.rmtree(out / "cut")
            ends += 1
    ended(words)
    assert_same(out / "cut", uncut)
    return kills | {"ends": ends + 1}


def job_every_moment(out, each):
    """One kill at every moment at which a save can be cut, or at each so-manieth."""
    uncut, seen = uncut_run(out, epochs=1)
    points = range(1, len(seen) + 1, int(each))
    for point in points:
        assert code_of(fork(lambda: tiny(often(out / "cut", epochs=1), at(point, die)))) == 137
        ended(often(out / "cut", epochs=1))
        assert_same(out / "cut", uncut)
        shutil.rmtree(out / "cut")
    return {"kills": len(points)}


def job_trace(out):
    """What is done to the disk, in order."""
    return uncut_run(out, epochs=1)[1]


def job_cache(out):
    """A data set that is drawn and kept: killed at every moment of that, it is whole and alone there the next time."""
    def draw():
        dataset = data.synthetic(out / "data", side=8, train=8, test=4)
        return 0 if (dataset.train_images.tobytes(), dataset.test_labels.tobytes()) == whole else 1

    uncut = data.synthetic(out / "uncut", side=8, train=8, test=4)
    whole = uncut.train_images.tobytes(), uncut.test_labels.tobytes()
    names = os.listdir(out / "uncut")
    for kills in itertools.count():
        code = code_of(fork(lambda: [watch(at(kills + 1, die)), draw()][1]))
        assert code_of(fork(draw)) == 0
        assert os.listdir(out / "data") == names
        shutil.rmtree(out / "data")
        if code == 0:
            return {"kills": kills}


class Handler(http.server.BaseHTTPRequestHandler):
    content = np.random.default_rng(0).bytes(400_000)

    def do_GET(self):
        first = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") : -1])
        if first >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(self.content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side was killed
            self.wfile.write(self.content[first:])


def job_download(out):
    """A download killed at every moment, with and without what an earlier one left."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}/file"
    serving = fork(server.serve_forever)
    path, kills = out / "data" / "file", 0

    def fetch():
        data.download([url], path, lambda p: p.read_bytes() == Handler.content)
        return 0

    try:
        for point in itertools.count(1):
            code = code_of(fork(lambda: [watch(at(point, die)), fetch()][1], out / "errors"))
            assert code in (0, 137), (out / "errors").read_text()
            kills += code == 137
            assert not path.exists() or path.read_bytes() == Handler.content
            if not path.exists():
                kills += code_of(fork(lambda: [watch(at(random.randint(1, 9), die)), fetch()][1])) == 137
            assert path.exists() or code_of(fork(fetch)) == 0
            assert path.read_bytes() == Handler.content and os.listdir(path.parent) == ["file"]
            shutil.rmtree(path.parent)
            if code == 0:
                return {"kills": kills}
    finally:
        os.kill(serving, signal.SIGKILL)
        os.waitpid(serving, 0)


# ---------------------------------------------------------------------------------------------- jobs: stops


def job_steps(out, each):
    """Stop after every single step, a hundred times; at each so-manieth go on to the end from a copy made there."""
    words, seen, real = dict(epochs=25), [], loop.train_step
    stop = [False]

    def step(model, optimizer, x, labels, *rest):
        seen.append((optimizer.lr, x.tobytes(), labels.tobytes()))
        if stop[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, optimizer, x, labels, *rest)

    loop.train_step = step
    run_of(out / "uncut", **words).folder.mkdir(parents=True)
    run_of(out / "uncut", **words).train(bar=False)
    uncut, all_steps = remains(out / "uncut"), seen[:]
    assert len(all_steps) == 100 and len(set(all_steps)) == 100
    seen.clear()
    cut, copies = run_of(out / "cut", **words), 0
    cut.folder.mkdir(parents=True)
    for done in range(1, 101):
        stop[0] = True
        try:
            run_of(out / "cut", **words).train(bar=False)
        except SystemExit as end:
            assert end.code == 143
        assert seen == all_steps[:done]
        if done % int(each) == 0:
            stop[0] = False
            before = seen[:]
            shutil.copytree(out / "cut", out / "copy")
            run_of(out / "copy", **words).train(bar=False)
            assert seen == all_steps
            assert_same(out / "copy", uncut)
            shutil.rmtree(out / "copy")
            seen[:] = before
            copies += 1
    stop[0] = False
    run_of(out / "cut", **words).train(bar=False)
    assert_same(out / "cut", uncut)
    return {"stops": done, "copies": copies}


def job_signals(out, each):
    """SIGTERM, SIGINT and SIGINT again during the save that it led to, at each so-manieth moment of a run."""
    stops = 0
    ended(flags(out / "uncut"))
    uncut = remains(out / "uncut")
    moments = []

    def listed():
        tiny(flags(out / "listed"), lambda *event: moments.append(event), training=True)
        (out / "moments").write_text(json.dumps(moments))
        return 0

    assert code_of(fork(listed)) == 0
    moments = [what for what, _ in json.loads((out / "moments").read_text())]
    evaluation = moments.index("before evaluation") + 1
    for point in sorted({*range(1, len(moments) + 1, int(each)), evaluation, evaluation + 1}):
        for sent, again in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)):
            def work():
                count, steps, batches = itertools.count(1), [0], [0]

                def see(what, name):
                    n = next(count)
                    steps[0] += what == "before step" and n > point
                    batches[0] += what == "before evaluation" and n > point
                    assert steps[0] <= 1 and not batches[0], "more than a step was begun after the signal"
                    if n == point or again and n > point and "step" not in what and "evaluation" not in what:
                        os.kill(os.getpid(), sent)

                return tiny(flags(out / "cut"), see, training=True)

            code = code_of(fork(work, out / "errors"))
            said = (out / "errors").read_text()
            assert code == 128 + sent and "Traceback" not in said, (point, sent, code, said)
            run = run_of(out / "cut")
            if "goes on from here" in said:
                assert (run.folder / "checkpoint.npz").exists()
                stops += 1
            if run.folder.exists():
                assert not list(run.folder.glob(".*")), list(run.folder.iterdir())
            ended(flags(out / "cut"))
            assert_same(out / "cut", uncut)
            shutil.rmtree(out / "cut")
    return {"stops": stops}


# ---------------------------------------------------------------------------------------------- jobs: faults

FAULTS = errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.EPERM, errno.EDQUOT


def refused(out, words, see, uncut):
    """The command with `see` ends with one sentence; then it goes on to the same end. Returns the sentence."""
    code = code_of(fork(lambda: tiny(words, see, training=True), out / "errors"))
    said = (out / "errors").read_text()
    assert code in (1, 2) and len(said.splitlines()) == 1 and said.startswith("tiny.py: "), (code, said)
    left = {name for name in remains(out / "cut")}
    ended(words)
    assert_same(out / "cut", uncut)
    shutil.rmtree(out / "cut")
    return said, left


def job_faults(out, each):
    """Each call that writes is refused, or half a write is, once or from then on; and the folder is removed."""
    uncut, seen = uncut_run(out, training=True, epochs=1)
    words, done = often(out / "cut", epochs=1), {"once": 0, "for good": 0, "removed": 0}
    numbers = itertools.cycle(FAULTS)
    for point, (what, name) in enumerate(seen, 1):
        if point % int(each) or what.startswith("after") or "step" in what or "evaluation" in what or name == "lock":
            continue
        number = next(numbers)

        def fail(what, name):
            if not what.startswith("after") and "step" not in what and "evaluation" not in what and name != "lock":
                raise OSError(number, os.strerror(number))

        for kind, always in (("once", False), ("for good", True)):
            said, left = refused(out, words, at(point, fail, always), uncut)
            assert os.strerror(number) in said and (str(out) in said or what in ("before mkdir", "before create",
                                                                                "before unlink")), (what, name, said)
            assert always or what == "before unlink" or not any(".tmp" in name for name in left), (what, name, left)
            done[kind] += 1
    folder = run_of(out / "cut", epochs=1).folder
    last = max(i for i, (what, _) in enumerate(seen, 1) if what == "before open")  # the folder, to flush it
    for point, (what, name) in enumerate(seen[:last], 1):
        if point % int(each) and what != "before step":
            continue
        if not what.startswith("after") and "mkdir" not in what and name != "lock":
            said, left = refused(out, words, at(point, lambda *event: shutil.rmtree(folder, ignore_errors=True)), uncut)
            assert "No such file or directory" in said and str(folder) in said and not left, (what, name, said, left)
            done["removed"] += 1
    return done


# ---------------------------------------------------------------------------------------------- jobs: many at once


def no_locks():
    """From now on the file system has none."""
    def lock_file(file):
        raise OSError(random.choice((errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)), "no locks")

    files.lock_file = lock_file


def job_claims(out, processes, rounds):
    """All processes claim one folder at the same moment: in every round exactly one gets it."""
    fork_context = multiprocessing.get_context("fork")
    barrier, processes = fork_context.Barrier(int(processes)), int(processes)
    out.mkdir(exist_ok=True)

    def work(number):
        for i in range(int(rounds)):
            barrier.wait(120)
            with files.claim(out) as mine:
                if mine:
                    (out / f"round{i}.{number}").touch()
                barrier.wait(120)
            barrier.wait(120)
        return 0

    assert [code_of(p) for p in [fork(lambda i=i: work(i)) for i in range(processes)]] == [0] * processes
    holders = [len(list(out.glob(f"round{i}.*"))) for i in range(int(rounds))]
    assert holders == [1] * int(rounds), holders
    assert not list(out.glob("claim.*"))
    return {"rounds": int(rounds)}


def job_hammer(out, processes, holds):
    """Processes claim, hold and leave a folder as fast as they can, some are killed: never are two inside."""
    out.mkdir(exist_ok=True)
    inside, tally = out / "inside", out / "tally"
    tally.touch()

    def work(seed):
        random.seed(seed)
        while tally.stat().st_size < int(holds):
            with files.claim(out) as mine:
                if not mine:
                    continue
                inside.mkdir()  # fails if another one is inside
                time.sleep(random.uniform(0, 0.002))
                inside.rmdir()
                with open(tally, "ab") as file:
                    file.write(b".")
                if random.random() < 0.05:
                    os.kill(os.getpid(), signal.SIGKILL)
        return 0

    running, killed = {fork(lambda i=i: work(i), out / f"errors{i}") for i in range(int(processes))}, 0
    while running:
        process, status = os.wait()
        running.remove(process)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), [p.read_text() for p in out.glob("errors*")]
        if code:
            killed += 1
            running.add(fork(lambda: work(100 + killed), out / f"errors{100 + killed}"))
    assert not inside.exists()
    with files.claim(out) as mine:
        assert mine
    assert not list(out.glob("claim.*"))
    return {"holds": tally.stat().st_size, "killed": killed}


def counted(out):
    """From now on each run that is trained to its end leaves a line."""
    real = train.Run.write_result

    def write_result(self, *args, **options):
        with open(out / "trained", "a") as file:
            file.write(f"{self.settings.seed}\n")
        return real(self, *args, **options)

    train.Run.write_result = write_result


def job_double_starts(out, starts, locks):
    """Two processes begin one run at the same moment: it is trained once, and the other one does no harm."""
    ended(flags(out / "uncut"))
    uncut, codes = remains(out / "uncut"), []
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def work():
        counted(out)
        if locks == "without":
            no_locks()
        barrier.wait(60)
        return tiny(often(out / "twice"))

    for i in range(int(starts)):
        both = [fork(work, out / f"errors{i}") for i in range(2)]
        codes.append(sorted(map(code_of, both)))
        said = "".join((out / f"errors{i}").read_text() for i in range(2))
        assert codes[-1] in ([0, 0], [0, 2]), (codes[-1], said)
        assert codes[-1] == [0, 0] or said.count("another process is training") == 1
        assert_same(out / "twice", uncut)
        shutil.rmtree(out / "twice")
    trained = (out / "trained").read_text().split()
    assert len(trained) == int(starts)
    return {"starts": len(codes), "refused": sum(code[1] == 2 for code in codes)}


def job_sweep(out, processes, locks):
    """Several processes on one sweep of 12 runs. Whoever trains seeds 2 and 7 first is killed amid that; seed 11 always
    fails. The killed ones' runs are done by the others, the failure is met once; a sweep without it finishes.
    """
    processes = int(processes)
    words = often(out / "runs", sweep="many")
    if locks == "without":
        words[1] = "--save-every=30"
    ended(often(out / "uncut", sweep="many"))
    uncut = remains(out / "uncut")
    barrier, real_step = multiprocessing.get_context("fork").Barrier(processes), loop.train_step
    if locks == "without":
        no_locks()

    def build(s, dataset):
        if s.seed == 11:
            with open(out / "failures", "a") as file:
                file.write("x")
            raise ZeroDivisionError("seed 11")
        if s.seed in (2, 7) and not (out / f"killed{s.seed}").exists():
            (out / f"killed{s.seed}").touch()
            count = itertools.count(1)
            loop.train_step = lambda *args: die("", "") if next(count) == 5 else real_step(*args)
        return TINY.build(s, dataset)

    def work():
        counted(out)
        train.time.sleep, sleep = lambda seconds: sleep(0.05), train.time.sleep
        real_done, first = train.Run.done, [True]

        def done(self):
            if first:
                first.clear()
                barrier.wait(60)  # all have begun the sweep
            return real_done(self)

        train.Run.done = done
        return command.main(replace(TINY, build=build), words)

    working = [fork(work, out / f"errors{i}") for i in range(processes)]
    codes = sorted(map(code_of, working))
    said = "".join((out / f"errors{i}").read_text() for i in range(processes))
    assert codes == [1] * (processes - 2) + [137] * 2, (codes, said)
    assert sorted((out / "trained").read_text().split(), key=int) == [str(i) for i in range(11)]
    assert (out / "failures").read_text() == "x" and said.count("ZeroDivisionError: seed 11") == 1, said
    assert "failed: ZeroDivisionError: seed 11" in run_of(out / "runs", seed=11).status()
    left = {name for name in remains(out / "runs") if "seed=11" in name}
    assert {Path(name).name for name in left} == {"failed.json"}, left
    ended(words)
    assert_same(out / "runs", uncut)
    return {"runs": 12}


# ---------------------------------------------------------------------------------------------- kills


def drive(job, out, *words):
    process = subprocess.Popen([sys.executable, __file__, job, str(out), *map(str, words)], env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        printed, errors = process.communicate(timeout=400)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has forked goes with it
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed[-5000:] + errors[-5000:]
    return json.loads(printed)


@forking
@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_never_cut(tmp_path, kills):
    assert drive("kills", tmp_path, kills, kills, 0) | {"ends": 0} == {"in saves": kills, "at times": kills, "ends": 0}


@forking
@pytest.mark.parametrize("each", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_of_a_save_ends_as_one_never_cut(tmp_path, each):
    assert drive("every_moment", tmp_path, each)["kills"] * each > 150


@forking
def test_the_previous_checkpoint_stays_until_the_next_one_is_on_the_disk(tmp_path):
    """The order of calls: content, flush, name, flush of the folder, for one file after the other; the result last."""
    calls = [tuple(call) for call in drive("trace", tmp_path)]
    names = [name for what, name in calls if what == "after replace"]
    assert names == ["config.json", *["checkpoint.npz", "log.csv"] * 5, "log.csv", "result.json"]
    calls = calls[calls.index(("after create", "lock")) + 1 :]
    folder = run_of(tmp_path, epochs=1).folder.name
    for name in names:
        hidden = calls[0][1]
        assert hidden.startswith(f".{name}.") and hidden.endswith(".tmp")
        expected = [("create", hidden), ("write", hidden), ("flush", hidden), ("fsync", hidden), ("replace", name),
                    ("open", folder), ("fsync", folder)]
        mine = [call for call in calls if call[1] in (hidden, name, folder)]
        mine = mine[: mine.index(("after fsync", folder)) + 1]
        assert [call for call in mine if call[0] not in ("amid write", "at close")] == [
            (f"{when} {what}", file) for what, file in expected for when in ("before", "after")]
        assert calls[: len(mine)] == mine  # nothing else is touched meanwhile
        calls = calls[len(mine) :]
        if name == "log.csv" and calls[0] == ("before unlink", "failed.json"):
            calls = calls[1:]
    assert calls == [("at close", "lock")]


@forking
def test_a_data_set_whose_drawing_was_killed_is_drawn_again(tmp_path):
    assert drive("cache", tmp_path)["kills"] >= 8


@forking
def test_a_killed_download_goes_on(tmp_path):
    assert drive("download", tmp_path)["kills"] > 20


# ---------------------------------------------------------------------------------------------- stops


@forking
@pytest.mark.parametrize("each", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_each_of_a_hundred_steps_can_be_the_last_before_a_stop(tmp_path, each):
    """The continued run sees the same examples in the same order at the same learning rates."""
    assert drive("steps", tmp_path, each) == {"stops": 100, "copies": 100 // each}


@forking
@pytest.mark.parametrize("each", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_sigterm_and_ctrl_c_stop_within_a_step_or_an_evaluation(tmp_path, each):
    assert drive("signals", tmp_path, each)["stops"] * each >= 90


# ---------------------------------------------------------------------------------------------- faults


@forking
@pytest.mark.parametrize("each", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_refuses_ends_a_run_with_one_sentence_and_nothing_is_lost(tmp_path, each):
    assert min(drive("faults", tmp_path, each).values()) * each > 50


@forking
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_flush_folders_will_do(tmp_path, monkeypatch, number):
    real = os.fsync

    def fsync(opened):
        if os.path.isdir(f"/proc/self/fd/{opened}"):
            raise OSError(number, "not for folders")
        real(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_a_living_one_writes_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, process, then = files.this_process().rsplit(".", 2)
    parent = f"{os.getppid()}.{files.born(os.getppid())}"
    left = [f".file.{host}.{ended.pid}.5.tmp", f".file.{host}.{process}.5.tmp", ".file.far.away.7.5.tmp", ".file.x.tmp"]
    kept = [f".file.{host}.{parent}.tmp", ".file.far.away.8.5.tmp", ".other.1.1.tmp"]
    for name in left + kept:
        (tmp_path / name).touch()
    for name in left[2:]:
        os.utime(tmp_path / name, (0, 0))
    files.write_whole(tmp_path / "file", "new")
    assert sorted(os.listdir(tmp_path)) == sorted(["file", *kept])
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


# ---------------------------------------------------------------------------------------------- folders elsewhere


def half_done(out, **settings):
    """A run stopped in its second epoch."""
    run, real, steps = run_of(out, **settings), loop.train_step, itertools.count(1)

    def step(*args):
        if next(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit), run.lock():
        patch.setattr(loop, "train_step", step)
        run.train(bar=False)
    return run


def finished(run):
    with run.lock():
        run.train(bar=False)
    return run


@pytest.mark.parametrize("how", [shutil.copytree, os.rename])
def test_a_folder_that_was_moved_or_copied_goes_on(tmp_path, how):
    finished(run_of(tmp_path / "uncut"))
    half_done(tmp_path / "here")
    how(tmp_path / "here", tmp_path / "there")
    (run_of(tmp_path / "there").folder / ".failed.json.far.away.1.2.tmp").touch()  # a writer was killed on another host
    finished(run_of(tmp_path / "there"))
    assert_same(tmp_path / "there", remains(tmp_path / "uncut"))


@pytest.mark.parametrize("state", [half_done, lambda out: finished(run_of(out))])
def test_a_folder_under_the_name_of_another_run_is_refused(tmp_path, capsys, state):
    run, other = state(tmp_path), run_of(tmp_path, lr=0.25, seed=3)
    run.folder.rename(other.folder)
    before = remains(tmp_path)
    capsys.readouterr()
    assert command.main(TINY, flags(tmp_path, lr=0.25, seed=3)) == 2
    said = capsys.readouterr().err
    assert "belongs to a run with other settings: seed 0 instead of 3, lr 0.1 instead of 0.25" in said
    assert f"{other.folder}" in said and len(said.splitlines()) == 1 and remains(tmp_path) == before


# ---------------------------------------------------------------------------------------------- many at once


@forking
@pytest.mark.parametrize("processes, rounds", [(2, 30), (8, 30), pytest.param(2, 500, marks=pytest.mark.slow),
                                               pytest.param(8, 500, marks=pytest.mark.slow)])
def test_of_claims_made_at_the_same_moment_one_is_granted(tmp_path, processes, rounds):
    assert drive("claims", tmp_path, processes, rounds) == {"rounds": rounds}


@forking
@pytest.mark.parametrize("holds", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_claims_let_one_in_at_a_time(tmp_path, holds):
    assert drive("hammer", tmp_path, 8, holds)["holds"] >= holds


@forking
@pytest.mark.parametrize("locks", ["with", "without"])
@pytest.mark.parametrize("starts", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_started_twice_at_once_is_trained_once(tmp_path, starts, locks):
    assert drive("double_starts", tmp_path, starts, locks)["starts"] == starts


@forking
@pytest.mark.parametrize("locks", ["with", "without"])
def test_eight_processes_on_a_sweep_do_every_run_once(tmp_path, locks):
    assert drive("sweep", tmp_path, 8, locks) == {"runs": 12}


def claimed(folder):
    with files.claim(folder) as mine:
        return mine


@forking
def test_claims_of_the_living_count_and_those_of_the_dead_do_not(tmp_path, monkeypatch):
    ended = subprocess.Popen(["sleep", "100"])
    birth = files.born(ended.pid)
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has taken its exit code yet
    host, process, then = files.this_process().rsplit(".", 2)
    parent = f"{os.getppid()}.{files.born(os.getppid())}"

    def alone_with(name, age=0.0, content="granted"):
        path = tmp_path / f"claim.{name}"
        path.write_text(content)
        os.utime(path, (time.time() - age,) * 2)
        mine = claimed(tmp_path)
        assert path.exists() != mine and len(list(tmp_path.iterdir())) == path.exists()
        path.unlink(missing_ok=True)
        return mine

    monkeypatch.setattr(files, "PATIENCE", 0.1)
    for content in ("", "granted"):
        assert alone_with(f"{host}.{ended.pid}.{birth}", content=content)
        assert alone_with(f"{host}.{process}.5", content=content)  # another process has its number
        assert not alone_with(f"{host}.{parent}", content=content)
        assert not alone_with(f"{host}.{parent}", age=1e6, content=content)  # known to live, if without a sign
        for far in ("a.host.far.away", "zebra"):  # before and after this one
            assert not alone_with(f"{far}.7.5", age=files.STALE_AFTER - 30, content=content)
            assert alone_with(f"{far}.7.5", age=files.STALE_AFTER + 30, content=content)
    assert alone_with(f"{host}.x.y") and alone_with(f"{host}.{10**30}.5") and alone_with("nonsense", age=1e6)
    real = time.time
    monkeypatch.setattr(files.time, "time", lambda: real() + 1e6)  # the clock of this host does not matter
    path = tmp_path / "claim.zebra.7.5"
    path.write_text("granted")
    assert not claimed(tmp_path)
    path.unlink()
    with files.claim(tmp_path) as mine:
        assert mine and not claimed(tmp_path)  # nor do two threads of one process get it
    assert not list(tmp_path.iterdir())
    ended.wait()
    assert alone_with(f"{host}.{ended.pid}.{birth}")  # gone for good


def test_a_claim_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SIGN_EVERY", 0.01)
    with files.claim(tmp_path):
        path, = tmp_path.iterdir()
        os.utime(path, (0, 0))
        end = time.monotonic() + 30
        while path.stat().st_mtime < 1:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK])
def test_a_lock_of_another_process_is_one_whatever_the_system_calls_it(tmp_path, monkeypatch, number):
    def lock_file(file):
        raise OSError(number, "locked")

    monkeypatch.setattr(files, "lock_file", lock_file)
    with files.hold(tmp_path) as mine:
        assert not mine


@pytest.mark.parametrize("codes, code, says", [
    ([0, 0], 0, ""), ([0, 1], 1, ""),
    ([0, -9], 0, "a process of the sweep was ended by signal 9; the others went on with its run\n"),
    ([-9, 1], 1, "a process of the sweep was ended by signal 9; the others went on with its run\n"),
    ([-15, -9], 143, "a process of the sweep was ended by signal 15\na process of the sweep was ended by signal 9\n")])
def test_what_a_sweep_in_processes_says_of_those_that_die(tmp_path, capfd, codes, code, says):
    """Each worker takes its number from a file and ends itself as the list says."""
    script = tmp_path / "worker.py"
    script.write_text(f"""
import os, sys
for i, code in enumerate({codes}):
    try:
        open(sys.argv[1] + f"/{{i}}", "x")
    except FileExistsError:
        continue
    os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
""")
    assert train.sweep_in_processes(len(codes), str(script), [str(tmp_path)]) == code
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(says.splitlines())  # any worker may take any number


def test_failures_are_recorded_until_the_run_succeeds(tmp_path, capsys):
    faulty = [True]

    def build_or_fail(s, dataset):
        if s.seed == 1 and faulty:
            raise MemoryError("too large")
        return build(s, dataset)

    runs = [train.Run(replace(TINY, build=build_or_fail), Settings(out=str(tmp_path), seed=i)) for i in range(3)]
    assert train.sweep(runs, bar=False) == 1
    assert [run.status().split(":")[0] for run in runs] == ["done", "failed", "done"]
    assert train.sweep(runs, bar=False) == 1  # the next sweep tries again
    assert capsys.readouterr().err.count("MemoryError: too large") == 2
    faulty.clear()
    assert train.sweep(runs, bar=False) == 0
    assert [run.status().split(":")[0] for run in runs] == ["done"] * 3 and not list(tmp_path.rglob("failed.json"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without
    train.versions()  # asked for once, not by every process
    os.fsync = lambda file: None  # only a loss of power shows whether it is done; that it is asked for is looked at
    print(json.dumps(globals()[f"job_{sys.argv[1]}"](Path(sys.argv[2]), *sys.argv[3:])))
