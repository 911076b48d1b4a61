"""Runs that are killed, stopped, refused by the disk or started twice: they end as one that nothing happened to.

Most of this is done by processes forked from one that has no threads, so that a start takes a hundredth of a second.
Run with the name of one of the jobs below, this file is that process; the last it prints is how often it did that.
"""

import contextlib
import errno
import fcntl
import http.server
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import tiny  # noqa: E402
from tiny import TINY, assert_same, finished, flags, remains, run_of  # noqa: E402

import datasets  # noqa: E402
import lab  # noqa: E402
import lab.run  # noqa: E402
import lab.sweep  # noqa: E402
import nn  # noqa: E402
from datasets import download, drawn  # noqa: E402
from lab import command, files  # noqa: E402

ENV = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/fd").exists(), reason="no Linux")


def often(out, **settings):
    """The words of a run that saves after every step."""
    return flags(out, save_every=0, **settings)


# ---------------------------------------------------------------------------------------------- what a process does


def watch(see):
    """From now on see("before fsync", "log.csv") and the like is called before and after each call by which a file is
    written, and amid each write, when half of its bytes are on their way.
    """
    def seen(what, name, call, *args, **options):
        see(f"before {what}", name)
        value = call(*args, **options)
        see(f"after {what}", name)
        return value

    def around(what, named):
        real = getattr(os, what)
        setattr(os, what, lambda *args, **options: seen(what, named(args).name, real, *args, **options))

    class File:
        def __init__(self, path, mode):
            self.name = Path(path).name
            self.real = seen("create", self.name, open, path, mode)

        def write(self, content):
            def write():
                self.real.write(bytes(content)[: len(content) // 2])
                self.real.flush()
                see("amid write", self.name)
                self.real.write(bytes(content)[len(content) // 2 :])

            seen("write", self.name, write)

        def flush(self):
            seen("flush", self.name, self.real.flush)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.real.close()
            see("at close", self.name)

        def __getattr__(self, name):
            return getattr(self.real, name)

    for what in ("unlink", "mkdir", "open"):
        around(what, lambda args: Path(args[0]))
    around("replace", lambda args: Path(args[1]))
    around("fsync", lambda args: Path(os.readlink(f"/proc/self/fd/{args[0]}")))
    for module in (files, download):
        module.open = lambda path, mode="r": File(path, mode) if mode[0] in "wxa" else open(path, mode)


def watch_training(see):
    """The same for updates of the network and batches of an evaluation."""
    real_step, real_batches = nn.SGD.step, datasets.Dataset.test_batches

    def step(self):
        see("before step", "")
        real_step(self)
        see("after step", "")

    def batches(*args, **options):
        for batch in real_batches(*args, **options):
            see("before evaluation", "")
            yield batch
        see("after evaluation", "")

    nn.SGD.step, datasets.Dataset.test_batches = step, batches


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


def codes_of(*processes):
    """Their exit codes as a shell tells them, each asked for as soon as there is one: a process that nobody asks for
    seems to live.
    """
    left, codes = set(processes), []
    while left:
        process, status = os.wait()
        if process in left:
            left.remove(process)
            code = os.waitstatus_to_exitcode(status)
            codes.append(code if code >= 0 else 128 - code)
    return sorted(codes)


def code_of(process):
    return codes_of(process)[0]


def start(words, see=None, training=False, experiment=TINY):
    """The command, in a forked process."""
    lab.run.LOOK_EVERY = -1  # after every step, so that every step may save
    if see:
        watch(see)
        if training:
            watch_training(see)
    return command.main(experiment, words)


def ended(words):
    """Run the command to its end, undisturbed."""
    assert code_of(fork(lambda: start(words))) == 0, words


def goes_on(out, words, uncut):
    """The command again ends as the uncut one did; then all it left is removed."""
    ended(words)
    assert_same(out / "cut", uncut)
    shutil.rmtree(out / "cut")


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


def uncut_run(out, words, training=False):
    """What an undisturbed run leaves, and all that was seen during it."""
    seen = []

    def work():
        code = start([f"--out={out / 'uncut'}", *words[1:]], lambda *event: seen.append(event), training)
        (out / "seen").write_text(json.dumps(seen))
        return code

    assert code_of(fork(work)) == 0
    return remains(out / "uncut"), [tuple(event) for event in json.loads((out / "seen").read_text())]


# ---------------------------------------------------------------------------------------------- jobs: kills


def job_kills(out, count):
    """Kill so often, in turn amid a save and at any time; a run that comes to its end all the same is compared."""
    random.seed(0)
    words, kills = often(out / "cut"), 0
    uncut, seen = uncut_run(out, words)
    begin = time.monotonic()
    ended(often(out / "timed"))
    duration = time.monotonic() - begin
    while kills < int(count):
        if kills % 2:
            point = random.randint(1, len(seen))
            process = fork(lambda: start(words, at(point, die)))
        else:
            process = fork(lambda: start(words))
            time.sleep(random.uniform(0, duration))
            os.kill(process, signal.SIGKILL)
        code = code_of(process)
        assert code in (0, 137), code
        kills += code == 137
        if code == 0 or run_of(out / "cut").done():
            goes_on(out, words, uncut)
    goes_on(out, words, uncut)
    return kills


def job_every_moment(out):
    """One kill at every moment at which a save can be cut."""
    words = often(out / "cut", epochs=1)
    uncut, seen = uncut_run(out, words)
    for point in range(1, len(seen) + 1):
        assert code_of(fork(lambda: start(words, at(point, die)))) == 137
        goes_on(out, words, uncut)
    return len(seen)


def job_trace(out):
    """What is done to the disk: content, flush, name, flush of the folder, for one file after the other; the result
    last. So the previous checkpoint stays until the next one is on the disk.
    """
    calls = uncut_run(out, often(out, epochs=1))[1]
    names = [name for what, name in calls if what == "after replace"]
    assert names == ["config.json", *["checkpoint.npz", "log.csv"] * 5, "log.csv", "result.json"]
    calls = calls[calls.index(("after open", ".run.lock")) + 1 :]
    folder = run_of(out, epochs=1).folder.name
    calls = [call for call in calls if call[0] not in ("amid write", "at close") and call[1] != "failed.json"]
    for name in names:
        hidden = calls[0][1]
        assert hidden.startswith(f".{name}.") and hidden.endswith(".tmp")
        expected = [("create", hidden), ("write", hidden), ("flush", hidden), ("fsync", hidden), ("replace", name),
                    ("open", folder), ("fsync", folder)]
        assert calls[:14] == [(f"{when} {what}", file) for what, file in expected for when in ("before", "after")]
        calls = calls[14:]
    assert not calls
    return len(names)


def job_cache(out):
    """A data set that is drawn and kept: killed at every moment of that, it is whole and alone there the next time."""
    def draw():
        dataset = drawn.digits(out / "data", side=8, train=8, test=4)
        return 0 if (dataset.train_images.tobytes(), dataset.test_labels.tobytes()) == whole else 1

    uncut = drawn.digits(out / "uncut", side=8, train=8, test=4)
    whole = uncut.train_images.tobytes(), uncut.test_labels.tobytes()
    names = sorted(os.listdir(out / "uncut"))
    for kills in itertools.count():
        code = code_of(fork(lambda: [watch(at(kills + 1, die)), draw()][1]))
        assert code_of(fork(draw)) == 0
        assert set(os.listdir(out / "data")) <= set(names)
        shutil.rmtree(out / "data")
        if code == 0:
            return kills


class Handler(http.server.BaseHTTPRequestHandler):
    content = np.random.default_rng(0).bytes(400_000)

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side was killed
            self.wfile.write(self.content)


def job_download(out):
    """A download killed at every moment."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    mirror = f"http://127.0.0.1:{server.server_port}/"
    serving = fork(server.serve_forever)

    def verify(path):
        if path.read_bytes() != Handler.content:
            raise datasets.DataError("not that")

    def fetch():
        return 0 if download.find_or_download(out, ["data"], ["file"], [mirror], verify) == out / "data" / "file" else 1

    try:
        for kills in itertools.count():
            code = code_of(fork(lambda: [watch(at(kills + 1, die)), fetch()][1], out / "errors"))
            assert code in (0, 137), (out / "errors").read_text()
            path = out / "data" / "file"
            assert not path.exists() or path.read_bytes() == Handler.content
            assert code_of(fork(fetch)) == 0 and path.read_bytes() == Handler.content
            assert set(os.listdir(path.parent)) <= {"file", ".file.lock"}
            shutil.rmtree(path.parent)
            if code == 0:
                return kills
    finally:
        os.kill(serving, signal.SIGKILL)
        os.waitpid(serving, 0)


# ---------------------------------------------------------------------------------------------- jobs: stops


def job_steps(out):
    """Stop after every single step, a hundred times, and from each go on to the end in a copy made there: the same
    examples in the same order at the same learning rates.
    """
    seen, stop = [], [False]

    def step_seen(optimizer, x, labels):
        seen.append((optimizer.lr, x.tobytes(), labels.tobytes()))
        if stop[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    def perform(folder, stopping=False):
        stop[0] = stopping
        try:
            finished(run_of(folder, replace(TINY, train=lambda run: tiny.train(run, step_seen=step_seen)), epochs=25))
        except SystemExit as end:
            assert stopping and end.code == 143

    perform(out / "uncut")
    uncut, all_steps = remains(out / "uncut"), seen[:]
    assert len(set(all_steps)) == len(all_steps) == 100
    for done in range(1, 101):
        seen[:] = all_steps[: done - 1]
        perform(out / "cut", stopping=True)
        assert seen == all_steps[:done]
        shutil.copytree(out / "cut", out / "copy")
        perform(out / "copy")
        assert seen == all_steps
        assert_same(out / "copy", uncut)
        shutil.rmtree(out / "copy")
    return done


def job_signals(out):
    """SIGTERM, SIGINT and SIGINT again during the save that it led to, at each moment of a run."""
    stops, words = 0, flags(out / "cut")
    uncut, moments = uncut_run(out, words, training=True)
    first = moments.index(("before open", ".run.lock"))  # from there on; before, it would end at once
    for point in range(first + 1, len(moments) + 1):
        for sent, again in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)):
            def work():
                count, begun = itertools.count(1), []

                def see(what, name):
                    n = next(count)
                    if n > point and what in ("before step", "before evaluation"):
                        begun.append(what)
                    assert len(set(begun)) == len(begun), "more than a step was begun after the signal"
                    if n == point or again and n > point and "step" not in what and "evaluation" not in what:
                        os.kill(os.getpid(), sent)

                return start(words, see, training=True)

            code = code_of(fork(work, out / "errors"))
            said, folder = (out / "errors").read_text(), run_of(out / "cut").folder
            assert code == 128 + sent and "Traceback" not in said, (point, moments[point - 1], sent, code, said)
            if "goes on from here" in said:
                assert (folder / "checkpoint.npz").exists()
                stops += 1
            assert not list(folder.glob(".*.tmp"))
            goes_on(out, words, uncut)
    return stops


# ---------------------------------------------------------------------------------------------- jobs: faults

FAULTS = errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.EPERM, errno.EDQUOT


def refused(out, words, see, uncut):
    """The command with `see` ends with one sentence; then it goes on to the same end. (the sentence, files it left)"""
    code = code_of(fork(lambda: start(words, see, training=True), out / "errors"))
    said = (out / "errors").read_text()
    assert code in (1, 2) and len(said.splitlines()) == 1 and said.startswith("tiny.py: "), (code, said)
    left = list(remains(out / "cut"))
    goes_on(out, words, uncut)
    return said, left


def concerns(what, name):
    """Whether it is a call that writes, or half a write."""
    return not what.startswith("after") and "step" not in what and "evaluation" not in what and ".lock" not in name


def job_faults(out):
    """Each call that writes is refused, or half a write is, once or from then on; and the folder is removed."""
    words, numbers, done = often(out / "cut", epochs=1), itertools.cycle(FAULTS), 0
    uncut, seen = uncut_run(out, words, training=True)
    folder = run_of(out / "cut", epochs=1).folder
    last = max(i for i, (what, name) in enumerate(seen, 1) if what == "before open" and ".lock" not in name)
    for point, (what, name) in enumerate(seen, 1):
        if concerns(what, name):
            number = next(numbers)

            def fail(what, name):
                if concerns(what, name):
                    raise OSError(number, os.strerror(number))

            for always in (False, True):
                said, left = refused(out, words, at(point, fail, always), uncut)
                assert os.strerror(number) in said, (what, name, said)
                assert str(out) in said or what in ("before mkdir", "before create", "before unlink"), (what, said)
                assert always or what == "before unlink" or not any(".tmp" in name for name in left), (what, left)
                done += 1
        if point <= last and not what.startswith("after") and "mkdir" not in what and ".lock" not in name:
            said, left = refused(out, words, at(point, lambda *event: shutil.rmtree(folder, ignore_errors=True)), uncut)
            assert "No such file or directory" in said and str(folder) in said and not left, (what, name, said, left)
            done += 1
    return done


# ---------------------------------------------------------------------------------------------- jobs: many at once


def no_locks():
    """From now on the file system has none."""
    def flock(opened, how):
        raise OSError(random.choice((errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)), "no locks")

    fcntl.flock = flock


def held(path):
    return files.locked(path, wait=False)


def job_claims(out, processes, rounds):
    """All processes want one lock at the same moment: in every round exactly one gets it."""
    no_locks()
    barrier, processes = multiprocessing.get_context("fork").Barrier(int(processes)), int(processes)

    def work(number):
        for i in range(int(rounds)):
            barrier.wait(120)
            with held(out / "file") as mine:
                if mine:
                    (out / f"round{i}.{number}").touch()
                barrier.wait(120)
            barrier.wait(120)
        return 0

    assert codes_of(*[fork(lambda i=i: work(i)) for i in range(processes)]) == [0] * processes
    holders = [len(list(out.glob(f"round{i}.*"))) for i in range(int(rounds))]
    assert holders == [1] * int(rounds), holders
    return int(rounds)


def job_hammer(out, processes, holds):
    """Processes take, hold and leave a lock as fast as they can, some are killed: never are two inside."""
    no_locks()
    inside, tally = out / "inside", out / "tally"
    tally.touch()

    def work(seed):
        random.seed(seed)
        while tally.stat().st_size < int(holds):
            with held(out / "file") as mine:
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

    running = {fork(lambda i=i: work(i), out / f"errors{i}") for i in range(int(processes))}
    for i in itertools.count(100):  # who was killed is replaced
        process, status = os.wait()
        running.remove(process)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), [p.read_text() for p in out.glob("errors*")]
        if status:
            running.add(fork(lambda: work(i), out / f"errors{i}"))
        if not running:
            break
    assert not inside.exists()
    with held(out / "file") as mine:
        assert mine
    assert set(os.listdir(out)) - {p.name for p in out.glob("errors*")} == {"tally", ".file.lock"}
    return tally.stat().st_size


def counted(out):
    """From now on each run that is trained to its end leaves a line."""
    real = lab.Run.finish

    def finish(self, diverged):
        with open(out / "trained", "a") as file:
            file.write(f"{self.settings.seed}\n")
        return real(self, diverged)

    lab.Run.finish = finish


def job_double_starts(out, starts, locks):
    """Two processes begin one run at the same moment: it is trained once, and the other one does no harm."""
    words, barrier = often(out / "cut"), multiprocessing.get_context("fork").Barrier(2)
    uncut, _ = uncut_run(out, words)

    def work():
        counted(out)
        if locks == "without":
            no_locks()
        barrier.wait(60)
        return start(words)

    for i in range(int(starts)):
        codes = codes_of(*[fork(work, out / f"errors{j}") for j in range(2)])
        said = "".join((out / f"errors{j}").read_text() for j in range(2))
        assert codes in ([0, 0], [0, 2]), (codes, said)
        assert codes == [0, 0] or said.count("another process is training") == 1
        goes_on(out, words, uncut)
    assert len((out / "trained").read_text().split()) == int(starts)
    return int(starts)


def job_sweep(out, processes, locks):
    """Several processes on one sweep of 12 runs. Whoever trains seeds 2 and 7 first is killed amid that; seed 11 always
    fails. The killed ones' runs are done by the others, the failure is met once; a sweep without it finishes.
    """
    processes = int(processes)
    words = often(out / "cut", sweep="many")
    uncut, _ = uncut_run(out, words)
    barrier = multiprocessing.get_context("fork").Barrier(processes)
    if locks == "without":
        words[1] = "--save-every=30"
        no_locks()

    def train(run):
        s, steps = run.settings, itertools.count(1)
        if s.seed == 11:
            with open(out / "failures", "a") as file:
                file.write("x")
            raise ZeroDivisionError("seed 11")
        kill = s.seed in (2, 7) and not (out / f"killed{s.seed}").exists()
        if kill:
            (out / f"killed{s.seed}").touch()
        tiny.train(run, step_seen=lambda *batch: die("", "") if kill and next(steps) == 5 else None)

    def work():
        counted(out)
        lab.sweep.time.sleep, sleep = lambda seconds: sleep(0.05), time.sleep
        real_done, first = lab.Run.done, [True]

        def done(self):
            if first:
                first.clear()
                barrier.wait(60)  # all have begun the sweep
            return real_done(self)

        lab.Run.done = done
        return command.main(replace(TINY, train=train), words)

    codes = codes_of(*[fork(work, out / f"errors{i}") for i in range(processes)])
    said = "".join((out / f"errors{i}").read_text() for i in range(processes))
    assert codes == [1] * (processes - 2) + [137] * 2, (codes, said)
    assert sorted((out / "trained").read_text().split(), key=int) == [str(i) for i in range(11)]
    assert (out / "failures").read_text() == "x" and said.count("ZeroDivisionError: seed 11") == 1, said
    assert "failed: ZeroDivisionError: seed 11" in run_of(out / "cut", seed=11).status()
    assert [Path(name).name for name in remains(out / "cut") if "seed=11" in name] == ["failed.json"]
    goes_on(out, words, uncut)
    return 12


# ---------------------------------------------------------------------------------------------- what is proved

PROOFS = {  # job, its words, what it counts at least; with and without: file locks
    "killed at random moments": ("kills", (200,), 200),
    "killed at each moment of a save": ("every_moment", (), 201),
    "one file after the other is put on the disk": ("trace", (), 13),
    "killed during a download": ("download", (), 49),
    "killed during the drawing of a data set": ("cache", (), 20),
    "stopped after each of a hundred steps": ("steps", (), 100),
    "SIGTERM and Ctrl-C stop within a step or an evaluation": ("signals", (), 153),
    "the disk refuses": ("faults", (), 374),
    "of 2 who want a lock at once one gets it": ("claims", (2, 150), 150),
    "of 8 who want a lock at once one gets it": ("claims", (8, 150), 150),
    "a lock lets in one at a time, some killed": ("hammer", (8, 1000), 1000),
    "started twice with": ("double_starts", (100, "with"), 100),
    "started twice without": ("double_starts", (100, "without"), 100),
    "eight on a sweep with": ("sweep", (8, "with"), 12),
    "eight on a sweep without": ("sweep", (8, "without"), 12),
}


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.lower().replace(" ", "_"))
def test_nothing_is_lost(tmp_path, proof):
    job, words, least = PROOFS[proof]
    process = subprocess.Popen([sys.executable, __file__, job, str(tmp_path), *map(str, words)], env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        printed, errors = process.communicate(timeout=400)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has forked goes with it
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed[-5000:] + errors[-5000:]
    assert int(printed.split()[-1]) >= least, printed[-5000:]


if __name__ == "__main__":
    import filelock  # noqa: F401  # once, not in every process

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without
    lab.run.versions()  # asked for once, not by every process
    os.fsync = lambda file: None  # only a loss of power shows whether it is done; that it is asked for is looked at
    print(globals()[f"job_{sys.argv[1]}"](Path(sys.argv[2]), *sys.argv[3:]))
