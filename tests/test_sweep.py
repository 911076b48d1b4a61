"""Sweeps: shared by processes of any kind, and what happens to a run that fails, is held, or is told to stop."""

import gc
import io
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import TINY, finished, flags, run_of

import exp_mlp_mnist as mlp
import exp_resnet_cifar as resnet
import lab
from lab import command, figures
from lab.sweep import sweep, sweep_in_processes

ROOT = Path(__file__).resolve().parent.parent
ENV = dict(os.environ, OPENBLAS_NUM_THREADS="1")


def test_two_sweeps_at_once_train_every_run_once(tmp_path):
    words = ["--data=synthetic", "--limit=300", "--epochs=2", "--seeds=1", f"--data-dir={tmp_path}",
             f"--out={tmp_path}", "--sweep=width"]
    command_line = [sys.executable, str(ROOT / "exp_mlp_mnist.py"), *words]
    starts = [subprocess.Popen(command_line + jobs, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
              for jobs in ([], ["--jobs", "2"])]
    outputs = [p.communicate(timeout=120) for p in starts]
    assert [p.returncode for p in starts] == [0, 0], outputs
    names = re.findall(r"\[\d+/13\] (\S+): test", outputs[0][0] + outputs[1][0])
    settings, _ = command.parse(mlp.EXPERIMENT, words)
    runs = [lab.Run(mlp.EXPERIMENT, s) for s in mlp.width_runs(settings)]
    assert sorted(names) == sorted(run.settings.run_name() for run in runs) and len(set(names)) == 13
    assert all(run.done() for run in runs)


def test_a_sweep_holds_the_data_and_the_network_of_one_run(tmp_path, monkeypatch):
    """Whether its runs reach the end or fail."""
    seen, epochs = [], lab.Run.epochs

    def watched(self, *things):
        gc.collect()
        assert not any(thing() for thing in seen)
        seen.extend(weakref.ref(thing) for thing in things)
        return epochs(self, *things)

    def train(run):
        tiny.train(run)
        assert run.settings.seed != 1

    monkeypatch.setattr(lab.Run, "epochs", watched)
    runs = [lab.Run(replace(TINY, train=train), run_of(tmp_path, seed=i).settings) for i in range(3)]
    assert sweep(runs) == 1 and len(seen) == 9


def test_a_run_that_is_being_trained_is_refused(tmp_path, capsys):
    run = run_of(tmp_path)
    with run.lock() as mine:
        assert mine and command.main(TINY, flags(tmp_path)) == 2
        assert capsys.readouterr().err == f"tiny.py: another process is training {run.folder}\n"
    assert command.main(TINY, flags(tmp_path)) == 0


def test_a_run_that_others_hold_is_waited_for(tmp_path, monkeypatch):
    runs, slept, held = [run_of(tmp_path, seed=i) for i in range(3)], [], run_of(tmp_path, seed=1)
    with held.lock():
        def sleep(seconds):
            slept.append([run.done() for run in runs])
            if len(slept) == 2:
                held.perform(bar=False)

        monkeypatch.setattr("lab.sweep.time.sleep", sleep)
        monkeypatch.setattr(runs[1], "perform", lambda bar: pytest.fail("trained twice"))
        assert sweep(runs, bar=False) == 0
    assert slept == [[True, False, True]] * 2 and runs[1].done()


def test_a_run_that_was_finished_while_we_waited_for_its_lock_is_not_trained_again(tmp_path, monkeypatch):
    run = finished(run_of(tmp_path))
    answers = [False]  # not done when looked at, done by the time the lock is ours
    monkeypatch.setattr(run, "done", lambda: answers.pop() if answers else True)
    monkeypatch.setattr(run, "perform", lambda bar: pytest.fail("trained twice"))
    assert sweep([run], bar=False) == 0 and not answers


@pytest.fixture
def terminal():
    """As if there were one, whose end is told by SIGHUP; nohup, which may have started the tests, hides it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("step, sent", [(1, signal.SIGTERM), (12, signal.SIGTERM), (5, signal.SIGHUP)])
def test_a_sweep_that_is_told_to_stop_begins_no_other_run(tmp_path, terminal, step, sent):
    """Its run is saved; after the last step, it is done."""
    seen = []

    def step_seen(*batch):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), sent)

    def train(run):
        tiny.train(run, step_seen=step_seen)

    runs = [run_of(tmp_path, replace(TINY, train=train), seed=i) for i in range(2)]
    with pytest.raises(SystemExit) as stop:
        sweep(runs, bar=False)
    assert stop.value.code == 128 + sent and not runs[1].folder.exists() and len(seen) == step
    assert (runs[0].folder / "checkpoint.npz").exists() and not runs[0].done()
    assert sweep(runs, bar=False) == 0
    finished(run_of(tmp_path / "uncut"))
    tiny.assert_same(runs[0].folder, tiny.remains(run_of(tmp_path / "uncut").folder))


def test_nohup_hides_the_end_of_the_terminal(tmp_path, terminal):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end = lambda *batch: os.kill(os.getpid(), signal.SIGHUP)  # noqa: E731
    assert finished(run_of(tmp_path, replace(TINY, train=lambda run: tiny.train(run, step_seen=end)))).done()


def test_a_stop_during_an_evaluation_saves_the_epoch_before_it(tmp_path, monkeypatch):
    real, seen = lab.Run.count, []

    def count(self, sums):
        real(self, sums)
        seen.append(1)
        if len(seen) == 6:  # after 4 steps
            os.kill(os.getpid(), signal.SIGTERM)

    run = run_of(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(lab.Run, "count", count)
        finished(run)
    assert len(seen) == 6 and (run.progress.epoch, run.progress.step) == (0, 4)
    uncut = finished(run_of(tmp_path / "uncut"))
    tiny.assert_same(finished(run).folder, tiny.remains(uncut.folder))


def test_a_stop_after_the_last_evaluation_leaves_a_run_that_is_done(tmp_path, monkeypatch):
    real = lab.Run.write_log
    monkeypatch.setattr(lab.Run, "write_log", lambda self: [real(self), os.kill(os.getpid(), signal.SIGINT)])
    runs = [run_of(tmp_path, seed=i) for i in range(2)]
    with pytest.raises(SystemExit) as stop:
        sweep(runs, bar=False)
    assert stop.value.code == 130 and [run.done() for run in runs] == [True, False]


def test_failures_are_recorded_until_the_run_succeeds(tmp_path, capsys, monkeypatch):
    faulty = [True]
    monkeypatch.setattr("lab.sweep.time.sleep", lambda seconds: pytest.fail("waited to try again"))

    def build(s):
        if s.seed == 1 and faulty:
            raise MemoryError("too large")
        return tiny.build(s)

    runs = [run_of(tmp_path, replace(TINY, train=lambda run: tiny.train(run, build)), seed=i) for i in range(4)]
    runs[2].folder.mkdir(parents=True)
    (runs[2].folder / "checkpoint.npz").write_bytes(b"nonsense")
    assert sweep(runs, bar=False) == 2
    assert [run.status().split(":")[0] for run in runs] == ["done", "failed", "failed", "done"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "seed=1: MemoryError: too large" and "checkpoint.npz cannot be continued" in told[1]
    assert runs[1].status() == "failed: MemoryError: too large"
    assert sweep(runs[:2], bar=False) == 1  # the next sweep tries again
    faulty.clear()
    (runs[2].folder / "checkpoint.npz").unlink()
    assert sweep(runs, bar=False) == 0
    assert [run.status().split(":")[0] for run in runs] == ["done"] * 4 and not list(tmp_path.rglob("failed.json"))


def test_a_failure_of_another_process_of_the_sweep_is_not_tried_again(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    run.folder.mkdir(parents=True)
    real = run.lock
    monkeypatch.setattr(run, "lock", lambda: [run.record_failure(ValueError("x")), real()][1])  # while we waited for it
    monkeypatch.setattr(run, "perform", lambda bar: pytest.fail("tried again"))
    assert sweep([run], bar=False) == 1


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
assert os.environ["SWEEP_WORKER"] and os.environ["OPENBLAS_NUM_THREADS"] and "PMI_SIZE" not in os.environ
for i, code in enumerate({codes}):
    try:
        open(sys.argv[1] + f"/{{i}}", "x")
    except FileExistsError:
        continue
    os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PMI_SIZE", "1")
        assert sweep_in_processes(len(codes), str(script), [str(tmp_path)]) == code
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(says.splitlines())  # any worker may take any number


@pytest.mark.parametrize("script, words, first, last", [
    (mlp, "--list fig5 --seeds 2", ["width=640,seed=0,"], "width=5,seed=1,last=1.0,activation=linear"),
    (mlp, "--list width --seeds 1", ["width=320,seed=0,dense=True"], "width=5,seed=0"),
    (resnet, "--list fig1 --bases 8,18 --widths 8,18,64", ["width=64,base_width=64,", "width=64,base_width=64,",
                                                           "width=64,base_width=64,", "width=64,base_width=18,"],
     "width=8,base_width=8,seed=2")])
def test_a_sweep_begins_with_costly_runs(script, words, first, last, tmp_path, monkeypatch, capsys):
    """The order of --list is that of a sweep."""
    monkeypatch.setattr(figures, "RECORDS", tmp_path)  # none
    trained = []
    experiment = replace(script.EXPERIMENT, train=lambda run: trained.append(run.settings.run_name()) or 1 / 0)
    assert command.main(experiment, [*words.split(), "--out", str(tmp_path)]) == 0
    runs = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if ": not begun" in line]
    assert all(run.startswith(start) for run, start in zip(runs, first)) and runs[-1] == last
    assert command.main(experiment, [*words.replace("--list", "--sweep").split(), "--out", str(tmp_path)]) == 1
    assert trained == runs


def test_list_says_what_is_done(tmp_path, capsys):
    finished(run_of(tmp_path, seed=3))
    capsys.readouterr()
    assert command.main(TINY, [*flags(tmp_path), "--list", "many"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[2] == "seed=2: not begun" and out[3].startswith("seed=3: done: test ") and out[-1] == (
        "1 of 12 runs are done") and len(out) == 13


def test_a_figure_that_needs_no_training_is_not_swept(tmp_path, capsys):
    e = replace(TINY, figures={"many": replace(TINY.figures["many"], trained=False)})
    assert command.main(e, [*flags(tmp_path), "--sweep", "many"]) == 2
    assert capsys.readouterr().err == "tiny.py: many needs no training; --plot many draws it\n"


# ---------------------------------------------------------------------------------------------- other programs


def program(tmp_path, words, then=""):
    """The path of a script that trains the twelve runs of a figure with a call of main() that nothing guards."""
    path = tmp_path / "own.py"
    path.write_text(f"""
import sys
import threading
from dataclasses import replace
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import lab
import tiny
print("started", file=open({str(tmp_path / "starts")!r}, "a"))
experiment = replace(tiny.TINY, script={str(path)!r})
code = lab.main(experiment, {[*flags(tmp_path / "out"), "--sweep", "many", *words]})
{then}
sys.exit(code)
""")
    return [sys.executable, str(path)]


def all_done(tmp_path):
    assert len(list(tmp_path.rglob("result.json"))) == 12 and not list(tmp_path.rglob("failed.json"))


def test_jobs_of_ones_own_script_start_no_jobs(tmp_path):
    """The workers run it again, and with it its call that asks for two."""
    subprocess.run(program(tmp_path, ["--jobs", "2"]), env=ENV, check=True, timeout=60)
    all_done(tmp_path)
    assert len((tmp_path / "starts").read_text().split()) == 3


def test_jobs_without_a_script_are_refused(tmp_path, capsys):
    experiment = replace(TINY, script="<a cell of a notebook>")
    assert command.main(experiment, [*flags(tmp_path), "--sweep", "many", "--jobs", "2"]) == 2
    told = capsys.readouterr().err
    assert "--jobs starts processes that run <a cell of a notebook>, and there is no such file" in told


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_nobody_has_to_read_what_a_sweep_says(tmp_path, jobs):
    """As after `| head`: both of its pipes are closed at once."""
    process = subprocess.Popen(program(tmp_path, ["--jobs", jobs]), env=ENV, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0
    all_done(tmp_path)


def test_a_closed_terminal_changes_nothing(tmp_path):
    """Of a process that is not told: writing to it is an input/output error."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(program(tmp_path, []), env=ENV, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    tiny.wait_for(lambda: list(tmp_path.rglob("result.json")), process)
    os.close(ours)
    assert process.wait(60) == 0
    all_done(tmp_path)


def test_closed_and_narrow_screens(tmp_path):
    words = " ".join(program(tmp_path, [], "print('and then', chr(177))"))
    subprocess.run(["sh", "-c", f"{words} >&- 2>&-"], env=ENV, check=True, timeout=60)
    all_done(tmp_path)
    script = "import sys, lab.command; s = lab.command.Screen(sys.stdout); print('5 \u00b1 1', file=s, flush=True)"
    done = subprocess.run([sys.executable, "-c", script], env=ENV | {"PYTHONIOENCODING": "ascii"}, cwd=ROOT,
                          capture_output=True, check=True, text=True)
    assert done.stdout == "5 ? 1\n"


def test_a_stream_that_was_closed_says_nothing(tmp_path, monkeypatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert command.main(TINY, [*flags(tmp_path), "--sweep", "many"]) == 0
    all_done(tmp_path)
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 1


def test_command_lines_in_other_threads(tmp_path):
    """Two at once, of a program that lets NumPy raise; its stdout and its choice are its own again afterwards."""
    before, codes = (sys.stdout, sys.stderr, np.geterr()), []

    def work():
        with np.errstate(all="raise"):
            codes.append(command.main(TINY, [*flags(tmp_path), "--sweep", "many"]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0] and (sys.stdout, sys.stderr, np.geterr()) == before
    all_done(tmp_path)
