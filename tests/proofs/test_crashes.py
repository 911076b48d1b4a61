"""Runs that are killed, stopped, refused by the disk or started twice: they end as one that nothing happened to.

Most of this is done by processes forked from one that has no threads, so that a start takes a hundredth of a second.
Run with the name of one of the jobs below, this file is that process; what it prints are the counts of what it did.
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


def as_a_shell(status):
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def code_of(process):
    """The exit code as a shell tells it."""
    return as_a_shell(os.waitpid(process, 0)[1])


def codes_of(processes):
    """Their exit codes, each asked for as soon as there is one: a process that nobody asks for seems to live."""
    left, codes = set(processes), []
    while left:
        process, status = os.wait()
        left.remove(process)
        codes.append(as_a_shell(status))
    return sorted(codes)


def start(words, see=None, training=False, experiment=TINY):
    """The command, in a forked process."""
    lab.run.LOOK_EVERY = -1  # after every step, so that every step may save
    if see:
        watch(see)
        if training:
            watch_training(see)
    return command.main(experiment, words)


def ended(words, errors=os.devnull):
    """Run the command to its end, undisturbed."""
    assert code_of(fork(lambda: start(words), errors)) == 0, Path(errors).read_text() if errors != os.devnull else ""


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
        code = start(often(out / "uncut", **settings), lambda *event: seen.append(event), training)
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
            process = fork(lambda: start(words, at(point, die)))
        else:
            process = fork(lambda: start(words))
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


def job_every_moment(out):
    """One kill at every moment at which a save can be cut."""
    uncut, seen = uncut_run(out, epochs=1)
    for point in range(1, len(seen) + 1):
        assert code_of(fork(lambda: start(often(out / "cut", epochs=1), at(point, die)))) == 137
        ended(often(out / "cut", epochs=1))
        assert_same(out / "cut", uncut)
        shutil.rmtree(out / "cut")
    return {"kills": len(seen)}


def job_trace(out):
    """What is done to the disk, in order."""
    return uncut_run(out, epochs=1)[1]


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
            return {"kills": kills}


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
                return {"kills": kills}
    finally:
        os.kill(serving, signal.SIGKILL)
        os.waitpid(serving, 0)


# ---------------------------------------------------------------------------------------------- jobs: stops


def job_steps(out, each):
    """Stop after every single step, a hundred times; at each so-manieth go on to the end from a copy made there."""
    words, seen, stop = dict(epochs=25), [], [False]

    def step_seen(optimizer, x, labels):
        seen.append((optimizer.lr, x.tobytes(), labels.tobytes()))
        if stop[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    def perform(folder):
        train = replace(TINY, train=lambda run: tiny.train(run, step_seen=step_seen))
        finished(run_of(folder, train, **words))

    perform(out / "uncut")
    uncut, all_steps, copies = remains(out / "uncut"), seen[:], 0
    assert len(all_steps) == 100 and len(set(all_steps)) == 100
    seen.clear()
    for done in range(1, 101):
        stop[0] = True
        try:
            perform(out / "cut")
        except SystemExit as end:
            assert end.code == 143
        assert seen == all_steps[:done]
        if done % int(each) == 0:
            stop[0] = False
            before = seen[:]
            shutil.copytree(out / "cut", out / "copy")
            perform(out / "copy")
            assert seen == all_steps
            assert_same(out / "copy", uncut)
            shutil.rmtree(out / "copy")
            seen[:] = before
            copies += 1
    stop[0] = False
    perform(out / "cut")
    assert_same(out / "cut", uncut)
    return {"stops": done, "copies": copies}


def job_signals(out, each):
    """SIGTERM, SIGINT and SIGINT again during the save that it led to, at each so-manieth moment of a run."""
    stops = 0
    ended(flags(out / "uncut"))
    uncut = remains(out / "uncut")
    moments = []

    def listed():
        start(flags(out / "listed"), lambda *event: moments.append(event), training=True)
        (out / "moments").write_text(json.dumps(moments))
        return 0

    assert code_of(fork(listed)) == 0
    moments = [tuple(event) for event in json.loads((out / "moments").read_text())]
    first = moments.index(("before open", ".run.lock"))  # from there on; before, it would end at once
    evaluation = next(i for i, (what, _) in enumerate(moments, 1) if what == "before evaluation")
    for point in sorted({*range(first + 1, len(moments) + 1, int(each)), evaluation, evaluation + 1}):
        for sent, again in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)):
            def work():
                count, steps, batches = itertools.count(1), [0], [0]

                def see(what, name):
                    n = next(count)
                    steps[0] += what == "before step" and n > point
                    batches[0] += what == "before evaluation" and n > point
                    assert steps[0] <= 1 and batches[0] <= 1, "more than a step was begun after the signal"
                    if n == point or again and n > point and "step" not in what and "evaluation" not in what:
                        os.kill(os.getpid(), sent)

                return start(flags(out / "cut"), see, training=True)

            code = code_of(fork(work, out / "errors"))
            said = (out / "errors").read_text()
            assert code == 128 + sent and "Traceback" not in said, (point, moments[point - 1], sent, code, said)
            run = run_of(out / "cut")
            if "goes on from here" in said:
                assert (run.folder / "checkpoint.npz").exists()
                stops += 1
            if run.folder.exists():
                assert not list(run.folder.glob(".*.tmp")), list(run.folder.iterdir())
            ended(flags(out / "cut"))
            assert_same(out / "cut", uncut)
            shutil.rmtree(out / "cut")
    return {"stops": stops}


# ---------------------------------------------------------------------------------------------- jobs: faults

FAULTS = errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.EPERM, errno.EDQUOT


def refused(out, words, see, uncut):
    """The command with `see` ends with one sentence; then it goes on to the same end. Returns the sentence."""
    code = code_of(fork(lambda: start(words, see, training=True), out / "errors"))
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

    def concerns(what, name):
        return not what.startswith("after") and "step" not in what and "evaluation" not in what and ".lock" not in name

    for point, event in enumerate(seen, 1):
        if point % int(each) or not concerns(*event):
            continue
        what, name = event
        number = next(numbers)

        def fail(what, name):
            if concerns(what, name):
                raise OSError(number, os.strerror(number))

        for kind, always in (("once", False), ("for good", True)):
            said, left = refused(out, words, at(point, fail, always), uncut)
            assert os.strerror(number) in said and (str(out) in said or what in ("before mkdir", "before create",
                                                                                "before unlink")), (what, name, said)
            assert always or what == "before unlink" or not any(".tmp" in name for name in left), (what, name, left)
            done[kind] += 1
    folder = run_of(out / "cut", epochs=1).folder
    last = max(i for i, (what, name) in enumerate(seen, 1) if what == "before open" and ".lock" not in name)
    for point, (what, name) in enumerate(seen[:last], 1):
        if point % int(each) and what != "before step":
            continue
        if not what.startswith("after") and "mkdir" not in what and ".lock" not in name:
            said, left = refused(out, words, at(point, lambda *event: shutil.rmtree(folder, ignore_errors=True)), uncut)
            assert "No such file or directory" in said and str(folder) in said and not left, (what, name, said, left)
            done["removed"] += 1
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

    assert codes_of([fork(lambda i=i: work(i)) for i in range(processes)]) == [0] * processes
    holders = [len(list(out.glob(f"round{i}.*"))) for i in range(int(rounds))]
    assert holders == [1] * int(rounds), holders
    return {"rounds": int(rounds)}


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
    with held(out / "file") as mine:
        assert mine
    assert set(os.listdir(out)) - {p.name for p in out.glob("errors*")} == {"tally", ".file.lock"}
    return {"holds": tally.stat().st_size, "killed": killed}


def counted(out):
    """From now on each run that is trained to its end leaves a line."""
    real = lab.Run.finish

    def finish(self, **options):
        with open(out / "trained", "a") as file:
            file.write(f"{self.settings.seed}\n")
        return real(self, **options)

    lab.Run.finish = finish


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
        return start(often(out / "twice"))

    for i in range(int(starts)):
        codes.append(codes_of([fork(work, out / f"errors{i}.{j}") for j in range(2)]))
        said = "".join((out / f"errors{i}.{j}").read_text() for j in range(2))
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
    ended(often(out / "uncut", sweep="many"))
    uncut = remains(out / "uncut")
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

    codes = codes_of([fork(work, out / f"errors{i}") for i in range(processes)])
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


def test_a_run_killed_at_random_moments_ends_as_one_never_cut(tmp_path):
    assert drive("kills", tmp_path, 100, 100, 0) | {"ends": 0} == {"in saves": 100, "at times": 100, "ends": 0}


def test_a_run_killed_at_any_moment_of_a_save_ends_as_one_never_cut(tmp_path):
    assert drive("every_moment", tmp_path)["kills"] > 150


def test_the_previous_checkpoint_stays_until_the_next_one_is_on_the_disk(tmp_path):
    """The order of calls: content, flush, name, flush of the folder, for one file after the other; the result last."""
    calls = [tuple(call) for call in drive("trace", tmp_path)]
    names = [name for what, name in calls if what == "after replace"]
    assert names == ["config.json", *["checkpoint.npz", "log.csv"] * 5, "log.csv", "result.json"]
    calls = calls[calls.index(("after open", ".run.lock")) + 1 :]
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
    assert not calls


def test_a_data_set_whose_drawing_was_killed_is_drawn_again(tmp_path):
    assert drive("cache", tmp_path)["kills"] >= 8


def test_a_killed_download_begins_anew(tmp_path):
    assert drive("download", tmp_path)["kills"] >= 8


# ---------------------------------------------------------------------------------------------- stops and faults


def test_each_of_a_hundred_steps_can_be_the_last_before_a_stop(tmp_path):
    """The continued run sees the same examples in the same order at the same learning rates."""
    assert drive("steps", tmp_path, 1) == {"stops": 100, "copies": 100}


def test_sigterm_and_ctrl_c_stop_within_a_step_or_an_evaluation(tmp_path):
    assert drive("signals", tmp_path, 1)["stops"] >= 90


def test_a_disk_that_refuses_ends_a_run_with_one_sentence_and_nothing_is_lost(tmp_path):
    assert min(drive("faults", tmp_path, 1).values()) > 50


# ---------------------------------------------------------------------------------------------- folders elsewhere


def half_done(out, **settings):
    """A run stopped in its second epoch."""
    steps = itertools.count(1)

    def step_seen(*batch):
        if next(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    run = run_of(out, replace(TINY, train=lambda run: tiny.train(run, step_seen=step_seen)), **settings)
    with pytest.raises(SystemExit):
        finished(run)
    return run


@pytest.mark.parametrize("how", [shutil.copytree, os.rename])
def test_a_folder_that_was_moved_or_copied_goes_on(tmp_path, how):
    finished(run_of(tmp_path / "uncut"))
    half_done(tmp_path / "here")
    how(tmp_path / "here", tmp_path / "there")
    (run_of(tmp_path / "there").folder / ".failed.json.12.tmp").touch()  # a writer was killed
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


@pytest.mark.parametrize("processes", [2, 8])
def test_of_those_who_want_a_lock_at_the_same_moment_one_gets_it(tmp_path, processes):
    assert drive("claims", tmp_path, processes, 150) == {"rounds": 150}


def test_locks_let_one_in_at_a_time(tmp_path):
    assert drive("hammer", tmp_path, 8, 1000)["holds"] >= 1000


@pytest.mark.parametrize("locks", ["with", "without"])
def test_a_run_started_twice_at_once_is_trained_once(tmp_path, locks):
    assert drive("double_starts", tmp_path, 100, locks)["starts"] == 100


@pytest.mark.parametrize("locks", ["with", "without"])
def test_eight_processes_on_a_sweep_do_every_run_once(tmp_path, locks):
    assert drive("sweep", tmp_path, 8, locks) == {"runs": 12}


if __name__ == "__main__":
    import filelock  # noqa: F401  # once, not in every process

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without
    lab.run.versions()  # asked for once, not by every process
    os.fsync = lambda file: None  # only a loss of power shows whether it is done; that it is asked for is looked at
    print(json.dumps(globals()[f"job_{sys.argv[1]}"](Path(sys.argv[2]), *sys.argv[3:])))
