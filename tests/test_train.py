"""train.py and exp_mlp_mnist.py as they are used: runs, cuts and continuations, sweeps, figures, the command line."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import command
import exp_mlp_mnist as mlp
import figures
import files
import loop
import nn
import train

ROOT = Path(__file__).resolve().parent.parent
ENV = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A data folder in which the synthetic digits are drawn once for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def settings(folder, tmp_path):
    """A run of a second or less."""
    return mlp.Settings(data="synthetic", width=12, epochs=3, limit=600, data_dir=str(folder),
                        out=str(tmp_path / "runs"))


def trained(settings):
    run = train.Run(mlp.EXPERIMENT, settings)
    with run.lock() as mine:
        assert mine
        run.train(bar=False)
    return run


def script(settings, *words, name="exp_mlp_mnist.py"):
    """The command for these settings."""
    flags = [f"--{flag}={getattr(settings, flag.replace('-', '_'))}" for flag in
             ("data", "width", "epochs", "limit", "data-dir", "out", "seed", "save-every", "lr")]
    return [sys.executable, str(ROOT / name), *flags, *map(str, words)]


def shell(*words, expect=0, cwd=None):
    """Run exp_mlp_mnist.py with these words; (output, errors)."""
    done = subprocess.run([sys.executable, str(ROOT / "exp_mlp_mnist.py"), *map(str, words)], env=ENV, cwd=cwd,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


def contents(run):
    """All that a run leaves behind, times aside: (checkpoint arrays as bytes, log rows, result)."""
    with np.load(run.folder / "checkpoint.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["progress.history"] = arrays["progress.history"][:, :-1]  # the last column is seconds
    log = [row[:-1] for row in csv.reader(open(run.folder / "log.csv"))]
    result = run.result()
    del result["seconds"], result["config"]
    return {name: a.tobytes() for name, a in arrays.items()}, log, result


# ---------------------------------------------------------------------------------------------- one run


def test_a_run_leaves_its_whole_record(settings):
    run = trained(settings)
    assert sorted(p.name for p in run.folder.iterdir() if p.name != "lock") == [
        "checkpoint.npz", "config.json", "log.csv", "result.json"]
    result, config = run.result(), files.read_json(run.folder / "config.json")
    assert result["weights"] == 3970 and result["connectivity"] == pytest.approx(3970 / (794 * 12))
    assert [(layer["shape"], layer["kept"]) for layer in result["layers"]] == [([12, 784], 3850), ([10, 12], 120)]
    assert result["epochs"] == 3 and not result["diverged"] and result["config"] == config
    assert config["settings"] == settings.identity() and config["versions"]["numpy"] == np.__version__
    rows = list(csv.DictReader(open(run.folder / "log.csv")))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3] and set(rows[0]) == set(train.COLUMNS)
    accuracies = [float(row["test_acc"]) for row in rows]
    assert result["best_test_acc"] == max(accuracies) and result["final_test_acc"] == accuracies[-1]
    assert 0.2 < accuracies[-1] <= 1


def test_recorded_accuracies_are_those_of_the_saved_network(settings):
    run = trained(settings)
    dataset, model, optimizer, _ = run.prepare()
    run.load_checkpoint(model, optimizer)
    x = dataset.test_images * dataset.scale + dataset.shift
    logits = np.maximum(x.reshape(len(x), -1) @ model[1].weight.data.T + model[1].bias.data, 0)
    logits = logits @ model[3].weight.data.T + model[3].bias.data
    assert run.result()["final_test_acc"] == (logits.argmax(1) == dataset.test_labels).mean()


def test_recorded_training_loss_and_accuracy_are_means_over_the_epoch(settings):
    """With a learning rate of 0 they are those of the initial network on all 600 images, the last batch smaller."""
    run = trained(replace(settings, epochs=1, lr=0.0, batch=70))
    dataset, model, _, _ = run.prepare()
    loss, accuracy = loop.evaluate(model, dataset.train_batches(600, seed=0, epoch=0))
    row = next(csv.DictReader(open(run.folder / "log.csv")))
    assert float(row["train_loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(row["train_acc"]) == run.result()["best_train_acc"] == pytest.approx(accuracy, abs=1e-9)


def test_networks_are_trained_in_training_mode_and_evaluated_in_evaluation_mode(settings):
    modes = []

    class Spy(nn.ReLU):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    def build(s, dataset):
        model = mlp.build(s, dataset)
        model.modules[2] = Spy()
        return model

    run = train.Run(replace(mlp.EXPERIMENT, build=build), replace(settings, epochs=2))
    with run.lock():
        run.train(bar=False)
    assert modes == ([True] * 6 + [False] * 4) * 2  # 600 images by 100, 4,000 by 1,000


def test_same_seed_same_bits_and_other_seeds_differ(settings, tmp_path):
    one = contents(trained(settings))
    two = contents(trained(replace(settings, out=str(tmp_path / "again"))))
    other = contents(trained(replace(settings, seed=1)))
    assert one == two
    assert one[1] != other[1]


def test_a_diverged_run_is_recorded(settings, capsys):
    run = trained(replace(settings, lr=1e6))
    result = run.result()
    assert result["diverged"] and run.done() and result["epochs"] < 3
    assert "the loss is no longer finite in epoch" in capsys.readouterr().out
    assert "diverged in epoch" in run.status()


def test_a_run_cut_at_any_epoch_boundary_goes_on_as_if_uncut(settings, tmp_path):
    whole = contents(trained(settings))
    cut = train.Run(mlp.EXPERIMENT, replace(settings, out=str(tmp_path / "cut"), save_every=0))
    real, saves = cut.save_checkpoint, []

    def save_and_die(*args):
        real(*args)
        saves.append(1)
        raise KeyboardInterrupt

    for _ in range(2):
        cut.save_checkpoint = save_and_die
        with pytest.raises(KeyboardInterrupt), cut.lock():
            cut.train(bar=False)
        assert not cut.done()
    cut.save_checkpoint = real
    with cut.lock():
        cut.train(bar=False)
    assert len(saves) == 2 and contents(cut) == whole


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def cut_and_continued(settings, sent, code, delays):
    """Start the command, kill it after each delay past its first checkpoint, then let it end; returns the run."""
    run = train.Run(mlp.EXPERIMENT, settings)
    for delay in delays:
        process = subprocess.Popen(script(settings), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        before = (run.folder / "checkpoint.npz").stat().st_mtime_ns if (run.folder / "checkpoint.npz").exists() else 0
        wait_for(lambda: process.poll() is not None or (run.folder / "checkpoint.npz").exists()
                 and (run.folder / "checkpoint.npz").stat().st_mtime_ns > before)
        time.sleep(delay)
        process.send_signal(sent)
        process.communicate()
        assert process.returncode == code and not run.done()
    subprocess.run(script(settings), env=ENV, check=True, capture_output=True)
    return run


@pytest.mark.parametrize("sent, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_command_goes_on_bit_for_bit(settings, tmp_path, sent, code):
    settings = replace(settings, epochs=60, limit=2000, save_every=0.01)
    uncut = replace(settings, out=str(tmp_path / "uncut"))
    subprocess.run(script(uncut), env=ENV, check=True, capture_output=True)
    run = cut_and_continued(settings, sent, code, (0.05, 0.21))
    assert contents(run) == contents(train.Run(mlp.EXPERIMENT, uncut))


def test_sigterm_saves_within_the_step(settings):
    """Without any checkpoint before, the one written on SIGTERM lies after a step of an epoch and holds its sums."""
    settings = replace(settings, epochs=1000, limit=20_000)
    run = train.Run(mlp.EXPERIMENT, settings)
    process = subprocess.Popen(script(settings), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (run.folder / "config.json").exists())
    time.sleep(0.3)
    process.terminate()
    assert process.wait(timeout=30) == 143
    dataset, model, optimizer, _ = run.prepare()
    progress = run.load_checkpoint(model, optimizer)
    assert 0 < progress.step <= 200 and progress.seen == 100 * progress.step and len(progress.history) == progress.epoch


def test_running_again_does_nothing(settings):
    run = trained(settings)
    before = {p.name: p.stat().st_mtime_ns for p in run.folder.iterdir() if p.name != "lock"}
    subprocess.run(script(settings), env=ENV, check=True, capture_output=True)
    assert before == {p.name: p.stat().st_mtime_ns for p in run.folder.iterdir() if p.name != "lock"}


def test_a_wrong_checkpoint_is_refused(settings):
    run = trained(settings)
    (run.folder / "result.json").unlink()
    saved = (run.folder / "checkpoint.npz").read_bytes()
    (run.folder / "checkpoint.npz").write_bytes(saved[: len(saved) // 2])
    with pytest.raises(files.FileFault, match="checkpoint.npz cannot be continued: its end, with the checksum, is mi"):
        run.train(bar=False)
    (run.folder / "checkpoint.npz").write_bytes(saved)
    other = train.Run(mlp.EXPERIMENT, replace(settings, lr=0.2))
    other.folder = run.folder
    with pytest.raises(files.FileFault, match="other settings: lr 0.1 instead of 0.2; remove it to begin"):
        other.train(bar=False)
    other = train.Run(replace(mlp.EXPERIMENT, build=lambda s, d: mlp.build(replace(s, width=13), d)), settings)
    with pytest.raises(files.FileFault, match=r"not of this network .* has shape \(12, 784\) instead of \(13, 784\)"):
        other.train(bar=False)
    arrays = files.load_arrays(saved)
    for change, says in (({"format": np.array(1)}, "it is of format 1, this program reads 2"),
                         ({"model.1.bias": arrays["model.1.bias"].astype(np.float64)}, "1.bias is of float64 instead"),
                         ({"progress.extra": np.array(1)}, "unexpected keyword argument 'extra'")):
        (run.folder / "checkpoint.npz").write_bytes(files.save_arrays(arrays | change))
        with pytest.raises(files.FileFault, match=says):
            run.train(bar=False)


def test_write_whole_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_whole(path, "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *args: (_ for _ in ()).throw(OSError("no space")))
            with pytest.raises(OSError, match="no space"):
                files.write_whole(path, "new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"


# ---------------------------------------------------------------------------------------------- settings


def test_every_setting_that_matters_is_in_the_name(settings):
    changes = dict(data="mnist", width=13, base_width=6, dense=True, last=0.5, how="proportional", activation="linear",
                   bias=False, ntk=True, pixelwise=True, epochs=4, seed=1, limit=601, held_out=5, batch=7, lr=0.2)
    assert set(changes) == set(settings.identity())
    folders = [train.Run(mlp.EXPERIMENT, replace(settings, **{k: v})).folder for k, v in changes.items()]
    folders.append(train.Run(mlp.EXPERIMENT, settings).folder)
    assert len(set(folders)) == len(folders)
    for place in (dict(data_dir="x"), dict(jobs=3), dict(device="cpu"), dict(seeds=9), dict(save_every=1)):
        assert train.Run(mlp.EXPERIMENT, replace(settings, **place)).folder == folders[-1]


def test_the_printed_command_leads_to_the_same_run(settings):
    s = replace(settings, activation="linear", bias=False, ntk=True, last=0.5, lr=0.25, dense=False)
    again, _ = command.parse(mlp.EXPERIMENT, s.command("exp_mlp_mnist.py").split()[2:])
    assert again.identity() == s.identity()


def test_figures_have_the_papers_runs():
    s = mlp.Settings()
    cells = {(r.activation, r.width, r.last) for r in mlp.fig5_runs(s)}
    assert len(cells) == len(mlp.fig5_runs(s)) == 134
    assert ("relu", 5, 1.0) in cells and ("relu", 5, 0.9) not in cells
    assert ("linear", 640, 0.6) in cells and ("linear", 640, 0.7) not in cells
    assert len(mlp.fig5_runs(replace(s, seeds=3))) == 3 * 134
    for run in mlp.fig5_runs(s):
        run.check()
        assert sum(run.kept) == 3970
    runs = mlp.fig8_runs(s)
    assert len(runs) == 13 * 10 and {r.seed for r in runs} == set(range(10))
    for run in runs:
        run.check()
        assert run.limit == 2048 and run.batch == 256 and run.epochs == 300 and run.ntk and not run.bias
        assert run.budget == (794 * run.width if run.dense else 6352)
    assert all(run.held_out and run.limit == 2048 for run in mlp.fig8_lr_runs(s))


def test_tuned_learning_rates_are_those_of_the_record():
    runs = mlp.fig8_lr_runs(mlp.Settings())
    results, recorded = figures.collect(mlp.EXPERIMENT, "fig8_lr", [replace(r, out="nowhere") for r in runs])
    assert recorded == len(runs) and all(results)
    assert mlp.tuned(figures.points(runs, results)) == mlp.FIG8_LR


# ---------------------------------------------------------------------------------------------- sweeps


def test_two_sweeps_at_once_train_every_run_once(settings, folder):
    flags = ["--data", "synthetic", "--data-dir", folder, "--out", settings.out, "--limit", 300, "--epochs", 2,
             "--seeds", 2, "--sweep", "width"]
    mlp.load(settings)
    words = [sys.executable, str(ROOT / "exp_mlp_mnist.py"), *map(str, flags)]
    starts = [subprocess.Popen(words + jobs, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
              for jobs in ([], ["--jobs", "2"])]
    outputs = [p.communicate(timeout=120) for p in starts]
    assert [p.returncode for p in starts] == [0, 0], outputs
    names = re.findall(r"\[\d+/26\] (\S+): test", outputs[0][0] + outputs[1][0])
    runs = [train.Run(mlp.EXPERIMENT, s) for s in mlp.width_runs(replace(settings, limit=300, epochs=2, seeds=2))]
    assert sorted(names) == sorted(run.settings.run_name() for run in runs) and len(set(names)) == 26
    assert all(run.done() for run in runs)


def test_a_run_that_is_being_trained_is_refused_and_a_dead_holder_is_not(settings):
    run = train.Run(mlp.EXPERIMENT, settings)
    with run.lock() as mine:
        assert mine
        out, errors = shell(*script(settings)[2:], expect=2)
        assert "another process is training" in errors and len(errors.splitlines()) == 1
    assert (run.folder / "lock").exists()  # left behind, but held by nobody
    trained(settings)


def test_a_run_that_was_finished_while_we_waited_for_its_lock_is_not_trained_again(settings, monkeypatch):
    run = trained(settings)
    answers = [False]  # not done when looked at, done by the time the lock is ours
    monkeypatch.setattr(run, "done", lambda: answers.pop() if answers else True)
    monkeypatch.setattr(run, "train", lambda bar: pytest.fail("trained twice"))
    assert train.sweep([run], bar=False) == 0 and not answers


def test_a_stop_during_the_last_evaluation_of_a_run_ends_the_sweep(settings, monkeypatch):
    runs = [train.Run(mlp.EXPERIMENT, replace(settings, seed=i)) for i in range(2)]
    real, calls = loop.evaluate, []

    def evaluate(*args):
        calls.append(1)
        found = real(*args)
        if len(calls) == settings.epochs:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(SystemExit) as stop:
        train.sweep(runs, bar=False)
    assert stop.value.code == 143 and [run.done() for run in runs] == [True, False]


def test_a_failed_run_does_not_stop_the_sweep(settings, capsys):
    runs = [train.Run(mlp.EXPERIMENT, replace(settings, seed=i)) for i in range(3)]
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "checkpoint.npz").write_bytes(b"nonsense")
    assert train.sweep(runs, bar=False) == 1
    assert [run.done() for run in runs] == [True, False, True]
    assert "checkpoint.npz cannot be continued" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("words, says", [
    (["--width", "0"], "--width must be a number of at least 1, not 0"),
    (["--width", "nine"], "argument --width: invalid int value: 'nine'"),
    (["--width", "4"], "width 4 cannot keep the weights of the wider base 5"),
    (["--lr", "-1"], "--lr must be a number of at least 0, not -1.0"),
    (["--lr", "nan"], "--lr must be a number of at least 0, not nan"),
    (["--data", "imagenot"], "--data is one of mnist, synthetic, not imagenot"),
    (["--last", "1.5"], "--last is a fraction of at most 1, not 1.5"),
    (["--last", "0.5", "--how", "proportional"], "--last fixes what each layer keeps, so --how proportional"),
    (["--last", "0.0001"], "keeps none of the last layer's 800 weights"),
    (["--last", "0.5", "--width", "5"], "leaves 3,945 of 3,970 weights to a first layer of 3,920"),
    (["--sweep", "fig99"], "there is no figure 'fig99'; there are"),
    (["--list", "fig5", "--plot", "fig5"], "only one of --sweep, --list and --plot"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["--data", "mnist", "--data-dir", "/dev/null"], "/dev/null"),
    (["--device", "gpu"], "a GPU was asked for"),
    (["--limit", "20001", "--data", "synthetic"], "has 20,000 training images, so a limit of 20,001"),
])
def test_mistakes_get_one_sentence(words, says, folder, tmp_path):
    if "gpu" in words and nn.use_device("auto") == "gpu":
        pytest.skip("there is a GPU")
    if "--data-dir" not in words:
        words = words + ["--data-dir", folder]
    done = subprocess.run([sys.executable, str(ROOT / "exp_mlp_mnist.py"), *map(str, words), "--out", str(tmp_path)],
                          env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and says in done.stderr, done
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_help_and_dry_run(settings, tmp_path):
    out, _ = shell("--help")
    assert "--last-connectivity" not in out and "--base-width" in out and "fig5" in out
    words = script(settings)[2:]
    out, _ = shell(*words, "--dry-run")
    assert "3,970 weights in all" in out and "MB of disk" in out
    assert not Path(settings.out).exists()


def test_list_plot_and_record(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "RECORDS", tmp_path / "results")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    words = ["--data", "synthetic", "--data-dir", settings.data_dir, "--out", settings.out, "--limit", "300",
             "--epochs", "1", "--seeds", "1"]
    assert command.main(mlp.EXPERIMENT, [*words, "--plot", "width"]) == 2
    assert "none of the 13 runs of width is done" in capsys.readouterr().err
    assert command.main(mlp.EXPERIMENT, [*words, "--sweep", "width"]) == 0
    capsys.readouterr()
    assert command.main(mlp.EXPERIMENT, [*words, "--list", "width"]) == 0
    assert "13 of 13 runs are done" in capsys.readouterr().out
    assert command.main(mlp.EXPERIMENT, [*words, "--plot", "width", "--record"]) == 0
    drawn = capsys.readouterr().out
    picture = tmp_path / "results" / "mlp_mnist_synthetic_width.png"
    assert picture.stat().st_size > 10_000
    record = json.loads(picture.with_suffix(".json").read_text())
    assert len(record["runs"]) == 13 and [v["numpy"] for v in record["versions"]] == [np.__version__]
    # the same table comes from the record when the runs themselves are gone
    elsewhere = [*words[:4], "--out", str(tmp_path / "none"), *words[6:]]
    assert command.main(mlp.EXPERIMENT, [*elsewhere, "--plot", "width"]) == 0
    again = capsys.readouterr().out
    assert "results/mlp_mnist_synthetic_width.json" in again
    assert drawn.split("\n\n")[0] == again.split("\n\n")[0]
    # a part of the runs is completed from the record, and cannot take its place
    part = str(tmp_path / "part")
    trained(replace(settings, width=5, limit=300, epochs=1, out=part))
    words[5] = part
    assert command.main(mlp.EXPERIMENT, [*words, "--plot", "width"]) == 0
    assert "13 of 13 runs are done, 12 of them recorded in results/" in capsys.readouterr().out
    assert command.main(mlp.EXPERIMENT, [*words, "--plot", "width", "--record"]) == 2
    assert "--record needs all 13 runs" in capsys.readouterr().err
    # with other settings the recorded ones are pointed to
    assert record["command"].startswith("python exp_mlp_mnist.py --plot width --data synthetic --epochs 1 --limit 300")
    other = ["--data", "synthetic", "--plot", "width", "--out", str(tmp_path / "none")]
    assert command.main(mlp.EXPERIMENT, other) == 2
    assert record["command"] in capsys.readouterr().err


def test_a_figure_of_diverged_runs_says_so(settings, capsys):
    words = ["--data", "synthetic", "--data-dir", settings.data_dir, "--out", settings.out, "--limit", "2048",
             "--epochs", "2", "--seeds", "1"]
    assert command.main(mlp.EXPERIMENT, [*words, "--lr", "1e30", "--sweep", "width"]) == 0
    assert command.main(mlp.EXPERIMENT, [*words, "--lr", "1e30", "--plot", "width"]) == 2
    assert "all 13 runs of width that are done have diverged" in capsys.readouterr().err
    runs = mlp.fig8_lr_runs(replace(settings, limit=0, seeds=1))
    with_one = [{"diverged": i == 0, "best_test_acc": 0.5, "weights": 1} if i < 2 else None for i in range(len(runs))]
    picture, summary = mlp.fig8_lr_draw(figures.points(runs, with_one), "best")
    assert summary == ["FIG8_LR = {(True, 8): 16.0}"]


def test_partial_figures_say_what_is_missing(settings, capsys):
    for s in mlp.fig5_runs(replace(settings, epochs=1))[:12]:
        trained(s)
    words = ["--data", "synthetic", "--data-dir", settings.data_dir, "--out", settings.out, "--limit", "600",
             "--epochs", "1", "--plot", "fig5"]
    assert command.main(mlp.EXPERIMENT, words) == 0
    out = capsys.readouterr().out
    assert "12 of 134 runs are done" in out and out.count("python exp_mlp_mnist.py") == 12 and "ReLU: best" in out


def test_what_a_figure_computes_is_kept_and_recorded(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "RECORDS", tmp_path / "results")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    computed = []

    def compute(s):
        computed.append(s.data)
        return {"answer": 42}

    def draw(points, metric, numbers):
        picture, _ = mlp.width_draw(points, metric)
        return picture, [f"the answer is {numbers['answer']}"]

    figure = figures.Figure("test", lambda s: [s], draw, compute=compute)
    experiment = replace(mlp.EXPERIMENT, figures={"test": figure}, figures_ignore={})
    trained(settings)
    words = script(settings)[2:] + ["--plot", "test"]
    for extra in ([], ["--record"], ["--out", str(tmp_path / "none")]):  # computed, kept in OUT, from the record
        assert command.main(experiment, words + extra) == 0
        assert "the answer is 42" in capsys.readouterr().out
    assert computed == ["synthetic"]
    assert files.read_json(tmp_path / "results" / "mlp_mnist_synthetic_test.json")["computed"] == {"answer": 42}


def test_figure_8b_from_training_to_picture(settings, monkeypatch, capsys):
    """The whole figure at a small size: theory and measurement agree, and the summary names the minima."""
    assert set(mlp.FIG8_WIDTHS) <= set(mlp.KERNEL_WIDTHS)
    monkeypatch.setattr(mlp, "KERNEL_WIDTHS", mlp.FIG8_WIDTHS)
    monkeypatch.setattr(mlp, "KERNEL_PAIRS", 12)
    words = ["--data", "synthetic", "--data-dir", settings.data_dir, "--out", settings.out, "--epochs", "1",
             "--seeds", "1"]
    assert command.main(mlp.EXPERIMENT, [*words, "--sweep", "fig8b"]) == 0
    assert command.main(mlp.EXPERIMENT, [*words, "--plot", "fig8b"]) == 0
    out = capsys.readouterr().out
    assert "exact (Theorem 1): least at width" in out and "rank correlation" in out
    computed = files.read_json(Path(settings.out, "mlp_mnist", "synthetic", "fig8b,seed=0.json"))
    assert computed["densities"][0] == 1 and computed["densities"][-1] == pytest.approx(2 / (784 * 635))
    exact, measured = (np.array(computed[name])[:, 0] for name in ("exact", "measured independent"))
    spread = np.array(computed["measured independent"])[:, 1] / computed["networks"] ** 0.5
    assert (abs(exact - measured)[:-1] < 4 * spread[:-1]).all()  # the last width: nearly always a kernel of zeros
    networks = np.array(computed["measured"])[:-1]
    assert (abs(exact[:-1] - networks[:, 0]) < 3 * networks[:, 1]).all()
    bias, variance = (np.array(computed[name])[:, 0] for name in ("bias", "variance"))
    np.testing.assert_allclose(bias + variance, exact, rtol=1e-9)
    assert 0.1 < computed["gp_test_acc"] <= 1


def test_points_and_their_statistics():
    s = mlp.Settings()
    runs = [replace(s, width=w, seed=i) for w in (10, 20) for i in range(3)]
    results = [{"diverged": i == 5, "best_test_acc": 0.9 + 0.01 * (i % 3)} for i in range(6)]
    results[1] = None
    ten, twenty = figures.points(runs, results)
    assert ten.values("best_test_acc") == [0.9, 0.92] and len(twenty.results) == 3
    assert ten.mean("best_test_acc") == pytest.approx(0.91) and ten.std("best_test_acc") == pytest.approx(0.01 * 2**0.5)
    assert twenty.mean("best_test_acc") == pytest.approx(0.905)
