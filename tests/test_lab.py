"""Settings, one run and how it goes on, and the command line."""

import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import TINY, finished, flags, remains, run_of

import datasets
import exp_mlp_mnist as mlp
import exp_resnet_cifar as resnet
import lab
import lab.run
import nn
from engines import sparse
from lab import command, files, setting
from lab.settings import flag

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("exp_*.py"))
ENV = dict(os.environ, OPENBLAS_NUM_THREADS="1")

# ---------------------------------------------------------------------------------------------- settings


def test_every_setting_that_matters_is_in_the_name():
    s = mlp.Settings(data="synthetic", width=12, epochs=3, limit=600)
    changes = dict(data="mnist", width=13, base_width=6, dense=True, last=0.5, how="proportional", activation="linear",
                   bias=False, ntk=True, pixelwise=True, epochs=4, seed=1, limit=601, held_out=5, batch=7, lr=0.2,
                   side=7)
    assert set(changes) == set(s.identity())
    folders = [lab.Run(mlp.EXPERIMENT, replace(s, **{k: v})).folder for k, v in changes.items()]
    folders.append(lab.Run(mlp.EXPERIMENT, s).folder)
    assert len(set(folders)) == len(folders)
    for place in (dict(data_dir="x"), dict(jobs=3), dict(device="cpu"), dict(seeds=9), dict(save_every=1)):
        assert lab.Run(mlp.EXPERIMENT, replace(s, **place)).folder == folders[-1]
    assert s.run_name() == "width=12,seed=0,epochs=3,limit=600"


def test_the_printed_command_leads_to_the_same_run():
    s = mlp.Settings(data="synthetic", activation="linear", bias=False, ntk=True, last=0.5, lr=0.25, out="elsewhere")
    again, _ = command.parse(mlp.EXPERIMENT, s.command("exp_mlp_mnist.py").split()[2:])
    assert again == replace(s, out="runs")


@pytest.mark.parametrize("found, given, named", [("gpu", "auto", "tf32"), ("gpu", "bf16", "bf16"),
                                                 ("cpu", "auto", "auto")])
def test_the_precision_of_a_gpu_is_in_the_name(monkeypatch, found, given, named):
    used = []
    monkeypatch.setattr(nn, "use_device", lambda *names, **options: used.append((names, options)) or found)
    s = resnet.Settings(precision=given, graph=False).on_device(1)
    assert s.precision == named and ("precision" in s.run_name()) == (named != "auto")
    assert used == [(("auto", 1), dict(precision="tf32" if given == "auto" else given, deterministic=True, tune=False,
                                       capture=False))]
    for processes in (1, 2):  # several average their gradients between captures
        resnet.Settings().on_device(processes=processes)
        assert used[-1][1]["capture"] == (processes == 1)
    if found == "cpu":
        with pytest.raises(lab.UsageError, match="--precision is for GPUs, and this would be trained on the CPU"):
            resnet.Settings(precision="bf16").on_device()
        assert resnet.Settings(precision="bf16").on_device(training=False).precision == "bf16"  # to plot what one did


def test_differences_between_settings_and_those_in_a_file():
    s = resnet.Settings(lr=0.2)
    saved = s.identity()
    assert s.differences(saved) == s.differences(saved | {"precision": "tf32"}) == []  # once written for a CPU
    assert replace(s, precision="tf32").differences(saved) == ["precision auto instead of tf32"]
    assert s.differences(saved | {"precision": "bf16"}) == ["precision bf16 instead of auto"]
    assert s.differences({}) == ["lr 0.1 instead of 0.2"]


def test_lists_of_numbers():
    assert lab.numbers("widths", " 12,8,12") == (8, 12)
    for text in ("", "8,", "8;12", "0", "-8", "x"):
        with pytest.raises(lab.UsageError, match="--widths is a list of widths such as 8,12,18, not"):
            lab.numbers("widths", text)


# ---------------------------------------------------------------------------------------------- one run


def test_a_run_leaves_its_whole_record(tmp_path):
    run = finished(run_of(tmp_path, save_every=1000))
    assert sorted(os.listdir(run.folder)) == [".run.lock", "checkpoint.npz", "config.json", "log.csv", "result.json"]
    result, config = run.result(), run.config()
    assert result["weights"] == 300 and result["connectivity"] == pytest.approx(300 / (36 * 12 + 120))
    assert [(layer["shape"], layer["kept"]) for layer in result["layers"]] == [([12, 36], 180), ([10, 12], 120)]
    assert result["epochs"] == 3 and not result["diverged"] and result["config"] == config
    assert config["settings"] == run.settings.identity() and config["versions"][0]["numpy"] == np.__version__
    assert config["data"] == {"sha256": tiny.load(run.settings).digest} and len(config["versions"]) == 1
    assert config["ranks"] == [1] and config["devices"] == ["cpu"]
    rows = list(csv.DictReader(open(run.folder / "log.csv")))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3] and set(rows[0]) == set(lab.run.COLUMNS)
    np.testing.assert_allclose([float(row["lr"]) for row in rows], [0.1, 0.09, 0.081])
    accuracies = [float(row["test_acc"]) for row in rows]
    assert result["best_test_acc"] == max(accuracies) and result["final_test_acc"] == accuracies[-1]
    assert result["seconds"] == pytest.approx(sum(float(row["seconds"]) for row in rows))
    assert run.status() == f"done: test {max(accuracies):.2%} best, {accuracies[-1]:.2%} final".replace("%", " %")


def test_recorded_numbers_are_those_of_the_network(tmp_path):
    """With a learning rate of 0: means over the epoch's 35 images, the last batch smaller, and over all 30 others."""
    def train(run):
        dataset, model = tiny.images(35, 30, side=6), nn.Sequential(nn.Flatten(), nn.Linear(36, 10))
        nn.initialize(model, 0)
        for epoch in run.epochs(model, nn.SGD(model.parameters(), 0), dataset):
            for x, labels in run.training_batches():
                run.count(nn.classify(model(nn.Tensor(x)), labels)[1])
            for x, labels in run.test_batches(8):
                run.count(nn.classify(model(nn.Tensor(x)), labels)[1])
        for part in ("train", "test"):
            x = getattr(dataset, f"{part}_images") * dataset.scale + dataset.shift
            labels = getattr(dataset, f"{part}_labels")
            logits = model(nn.Tensor(x)).data
            expected[f"{part}_loss"] = nn.cross_entropy(nn.Tensor(logits), labels).item()
            expected[f"{part}_acc"] = (logits.argmax(1) == labels).mean()

    expected = {}
    run = finished(run_of(tmp_path, replace(TINY, train=train), epochs=2))
    for row in csv.DictReader(open(run.folder / "log.csv")):
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-6), name
    assert run.result()["best_train_acc"] == expected["train_acc"]


@pytest.mark.parametrize("save_every", [0, 1000])
def test_a_diverged_run_is_recorded(tmp_path, capsys, recwarn, save_every):
    run = finished(run_of(tmp_path, lr=1e30, save_every=save_every))
    result = run.result()
    assert result["diverged"] and run.done() and result["epochs"] == 0 and result["best_test_acc"] is None
    assert "the loss is no longer finite in epoch 1; recorded as diverged" in capsys.readouterr().out
    assert run.status() == "done: diverged in epoch 1" and not recwarn.list
    assert command.main(TINY, flags(tmp_path, lr=1e30)) == 1
    assert "diverged: the loss was no longer finite in epoch 1" in capsys.readouterr().out


def test_a_run_cut_at_any_checkpoint_goes_on_as_if_uncut(tmp_path, monkeypatch):
    whole, cut, saves = finished(run_of(tmp_path / "whole", save_every=0)), run_of(tmp_path / "cut", save_every=0), []
    real = lab.Run.save_checkpoint
    monkeypatch.setattr(lab.run, "LOOK_EVERY", -1)  # a checkpoint after each step

    def save_and_die(self):
        real(self)
        saves.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lab.Run, "save_checkpoint", save_and_die)
        while len(saves) < 15:
            with pytest.raises(KeyboardInterrupt):
                finished(cut)
            assert not cut.done()
    tiny.assert_same(finished(cut).folder, remains(whole.folder))


def in_format_2(arrays):
    """The arrays of a checkpoint of the network below, weights and masks whole."""
    shapes = {"model.0.weight": (12, 1, 3, 3), "model.2.weight": (16, 12, 3, 3), "model.5.weight": (10, 64)}
    arrays["format"] = np.asarray(2)
    assert "model.2.weight.kept" in arrays
    for name in [name.removesuffix(".kept") for name in arrays if name.endswith(".kept")]:
        kept, mask = arrays.pop(f"{name}.kept"), np.zeros(np.prod(shapes[name]), bool)
        mask[kept] = True
        whole = np.zeros(mask.size, np.float32)
        whole[kept] = arrays[name]
        arrays |= {name: whole.reshape(shapes[name]), f"{name}.mask": mask.reshape(shapes[name])}
    return arrays


def test_a_run_goes_on_with_the_products_that_it_began_with(tmp_path, monkeypatch):
    """Those of the kept entries alone, in a process that would have chosen dense ones; the next run has its own."""
    monkeypatch.setattr(sparse, "CALL", 0)
    monkeypatch.setattr(lab.run, "LOOK_EVERY", -1)  # a checkpoint after each step
    real, saves = lab.Run.save_checkpoint, []

    def build(s):
        model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(),
                              nn.Linear(64, 10))
        nn.sparsify(model, 300, s.seed)
        return model

    def perform(name, density, end=999):
        def save_and_die(self):
            real(self)
            saves.append(1)
            if len(saves) == end:
                raise KeyboardInterrupt

        monkeypatch.setattr(sparse, "measured", lambda kind: dict.fromkeys(sparse.TYPICAL, density))
        with monkeypatch.context() as patch:
            patch.setattr(lab.Run, "save_checkpoint", save_and_die)
            experiment = replace(TINY, train=lambda run: tiny.train(run, build))
            return finished(run_of(tmp_path / name, experiment, save_every=0))

    whole = perform("whole", density=1.0)
    saves.clear()
    with pytest.raises(KeyboardInterrupt):
        perform("cut", density=1.0, end=6)
    shutil.copytree(tmp_path / "cut", tmp_path / "older")
    tiny.assert_same(perform("cut", density=0.0).folder, remains(whole.folder))
    path, = (tmp_path / "older").rglob("checkpoint.npz")
    path.write_bytes(files.save_arrays(in_format_2(files.load_arrays(path.read_bytes()))))
    tiny.assert_same(perform("older", density=0.0).folder, remains(whole.folder))
    with pytest.raises(AssertionError):
        tiny.assert_same(perform("anew", density=0.0).folder, remains(whole.folder))


def test_a_command_that_is_told_to_stop_goes_on_bit_for_bit(tmp_path):
    words = [sys.executable, str(ROOT / "exp_mlp_mnist.py"), "--data=synthetic", f"--data-dir={tmp_path}", "--width=12",
             "--epochs=60", "--limit=2000", "--save-every=0.05"]

    def saved():
        return [path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("checkpoint.npz")]

    subprocess.run([*words, f"--out={tmp_path / 'uncut'}"], env=ENV, check=True, capture_output=True)
    for sent, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = saved()
        process = subprocess.Popen([*words, f"--out={tmp_path / 'cut'}"], env=ENV, text=True, stderr=subprocess.PIPE)
        tiny.wait_for(lambda: saved() != before, process)
        process.send_signal(sent)
        errors = process.communicate()[1]
        assert process.returncode == code and "Traceback" not in errors, errors
        assert ("the same command goes on from here" in errors) == (code > 0)
        assert not list((tmp_path / "cut").rglob("result.json"))
    subprocess.run([*words, f"--out={tmp_path / 'cut'}"], env=ENV, check=True, capture_output=True)
    tiny.assert_same(tmp_path / "cut", remains(tmp_path / "uncut"))


def test_what_a_run_changes_around_it_is_put_back(tmp_path):
    def state():
        return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), np.geterr()

    before, inside = state(), []

    def seen(*args):
        inside.append(state())
        if len(inside) == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        finished(run_of(tmp_path, replace(TINY, train=lambda run: tiny.train(run, step_seen=seen))))
    assert state() == before and all(new != old for new, old in zip(inside[0][:2], before[:2]))
    assert inside[0][2]["over"] == "ignore"
    thread = threading.Thread(target=lambda: finished(run_of(tmp_path / "thread")))  # which cannot handle signals
    thread.start()
    thread.join()
    assert run_of(tmp_path / "thread").done() and state() == before


def test_running_again_does_nothing(tmp_path):
    run = finished(run_of(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in run.folder.glob("[!.]*")}
    assert command.main(TINY, flags(tmp_path)) == 0
    assert before == {p: p.stat().st_mtime_ns for p in run.folder.glob("[!.]*")}


def test_a_wrong_checkpoint_is_refused(tmp_path):
    run = finished(run_of(tmp_path))
    path = run.folder / "checkpoint.npz"
    (run.folder / "result.json").unlink()
    saved = path.read_bytes()
    arrays = files.load_arrays(saved)

    def refused(run, content, says):
        path.write_bytes(content)
        with pytest.raises(files.FileFault, match=f"checkpoint.npz cannot be continued: .*{says}"):
            run.perform(bar=False)

    refused(run, saved[: len(saved) // 2], "its end, with the checksum, is missing; remove it to begin this run again")
    other = run_of(tmp_path, lr=0.2)
    other.folder = run.folder
    refused(other, saved, "it belongs to a run with other settings: lr 0.1 instead of 0.2; remove it to begin")
    wider = replace(TINY, train=lambda run: tiny.train(run, build=lambda s: tiny.build(replace(s, width=13))))
    refused(run_of(tmp_path, wider), saved, r"not of this network .* has shape \(12, 36\) instead of \(13, 36\)")
    for change, says in (({"format": np.array(1)}, "it is of format 1, this program reads 3 and 2"),
                         ({"model.1.bias": arrays["model.1.bias"].astype(np.float64)}, "1.bias is of float64 instead"),
                         ({"progress.extra": np.array(1)}, "unexpected keyword argument 'extra'"),
                         ({"settings": np.array("[1]")}, "not of this network")):
        refused(run, files.save_arrays(arrays | change), says)
    path.write_bytes(saved)
    finished(run)


def test_a_result_that_is_none_is_refused(tmp_path):
    run = finished(run_of(tmp_path))
    path, whole = run.folder / "result.json", run.result()
    for change, says in ((dict(weights="no"), "weights is 'no' instead of a number"),
                         (dict(seconds=float("nan")), "seconds is nan instead of a number"),
                         (dict(epochs=True), "epochs is True instead of a number"),
                         (dict(best_test_acc=None), "best_test_acc is None instead of a number"),
                         (dict(weights=10**400), "weights is 1000.* instead of a number"),
                         (dict(diverged="no"), "diverged is 'no' instead of true or false"),
                         (dict(config={"settings": {"lr": 5}}), "it belongs to a run with other settings: lr 5")):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(files.FileFault, match=f"^{path}: {says}"):
            run.result()
        assert run.status().startswith(f"{path}: ")
    path.write_text("[]")
    assert run.status() == f"{path}: a result is an object, not list"


@pytest.mark.parametrize("name, content, status", [
    ("failed.json", '{"error": "no space"}', "failed: no space"), ("failed.json", "-Infinity", "failed: -inf"),
    ("failed.json", "[[]]", "failed: [[]]"), ("failed.json", '{"error": \n}', "FAILED, line 2: Expecting value"),
    ("log.csv", "a\nb\nc\n", "begun: 2 of 3 epochs"), ("log.csv", "\0\0", "begun: 0 of 3 epochs"),
    ("config.json", "{", "not begun")])
def test_whatever_lies_in_a_folder_has_a_status(tmp_path, name, content, status):
    run = run_of(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / name).write_text(content)
    assert run.status() == status.replace("FAILED", f"{run.folder / 'failed.json'}") and run.config() is None


def test_the_starts_of_a_run_are_in_its_config(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    run.folder.mkdir(parents=True)
    old = {"settings": run.settings.identity(), "versions": {"numpy": "1"}, "ranks": [2]}  # of a run that goes on
    finished(run)
    (run.folder / "config.json").write_text(json.dumps(old))
    finished(run)
    now = lab.run.versions()
    assert run.config() == old | {"versions": [{"numpy": "1"}, now], "ranks": [2, 1], "devices": ["cpu"],
                                  "data": {"sha256": tiny.load(run.settings).digest}}
    monkeypatch.setattr(lab.run, "versions", lambda: {"code": "changed"})
    finished(run)
    assert run.config()["versions"] == [{"numpy": "1"}, now, {"code": "changed"}]
    (run.folder / "checkpoint.npz").unlink()  # it begins anew
    finished(run)
    assert run.config()["versions"] == [{"code": "changed"}] and run.config()["ranks"] == [1]


def test_a_run_goes_on_and_is_done_with_the_data_that_it_began_with(tmp_path, capsys):
    """What was kept before there were digests is taken as it is."""
    def others(s):
        return tiny.images(35, 31, side=6).augmented(1, True)

    def on_others(run):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "load", others)
            tiny.train(run)

    experiment, run = replace(TINY, load=others, train=on_others), finished(run_of(tmp_path))
    old, new = (load(run.settings).digest[:16] for load in (tiny.load, others))
    says = f"was trained on other data than the synthetic that is found now: their SHA-256 is {old} instead of {new}"
    assert command.main(experiment, flags(tmp_path)) == 2
    assert capsys.readouterr().err == f"tiny.py: {run.folder / 'result.json'}: it {says}\n"
    assert command.main(experiment, [*flags(tmp_path), "--sweep", "many"]) == 2  # seed 0 is one of its runs
    assert says in capsys.readouterr().err and len(list(tmp_path.rglob("result.json"))) == 1
    one = replace(experiment, figures={"one": lab.Figure("", lambda s: [s], None)})
    assert command.main(one, [*flags(tmp_path), "--sweep", "one"]) == 2 and says in capsys.readouterr().err  # all done
    (run.folder / "result.json").unlink()
    assert command.main(experiment, flags(tmp_path)) == 2
    assert f"checkpoint.npz cannot be continued: it {says}; remove it to begin" in capsys.readouterr().err

    arrays = files.load_arrays((run.folder / "checkpoint.npz").read_bytes())
    assert str(arrays.pop("data")) == tiny.load(run.settings).digest
    (run.folder / "checkpoint.npz").write_bytes(files.save_arrays(arrays))
    assert command.main(experiment, flags(tmp_path)) == 0
    result = run.result()
    assert result["config"]["data"] == {"sha256": others(run.settings).digest}
    assert command.main(experiment, flags(tmp_path)) == 0
    del result["config"]["data"]
    (run.folder / "result.json").write_text(json.dumps(result))
    capsys.readouterr()
    assert command.main(TINY, flags(tmp_path)) == 0 and not capsys.readouterr().err


def test_a_result_whose_data_are_not_here_is_shown(tmp_path, capsys):
    """And nothing is downloaded for it."""
    finished(run_of(tmp_path))
    capsys.readouterr()
    gone = replace(TINY, load=lambda s: datasets.load("mnist", tmp_path))
    assert command.main(gone, flags(tmp_path)) == 0
    told = capsys.readouterr()
    assert re.fullmatch("the data were not compared with those it was trained on: train-images-idx3-ubyte, .* is not "
                        "in .*\n", told.err) and "downloading" not in told.err
    assert "test accuracy" in told.out


def test_data_that_are_not_the_published_ones_are_named(tmp_path, capsys):
    """Once for all runs of a process, and in what each leaves."""
    experiment = replace(TINY, train=train_unpublished)
    for seed in (0, 1):
        finished(run_of(tmp_path, experiment, seed=seed))
        assert run_of(tmp_path, seed=seed).result()["config"]["data"]["unpublished"] == "train.bin is not the original"
    assert capsys.readouterr().err == "synthetic: train.bin is not the original\n"


def train_unpublished(run):
    with pytest.MonkeyPatch.context() as patch:
        dataset = replace(tiny.load(run.settings), unpublished="train.bin is not the original")
        patch.setattr(tiny, "load", lambda s: dataset)
        tiny.train(run)


def test_the_hash_of_the_code_covers_all_that_computes(monkeypatch, tmp_path):
    for name in ("a.py", "engines/b.py", "engines/gpu.cu", "datasets/c.py", "lab/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(lab.run, "ROOT", tmp_path)
    seen = {lab.run.code_version.__wrapped__()}
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        path.write_text("changed")
        seen.add(lab.run.code_version.__wrapped__())
    assert len(seen) == 6


# ---------------------------------------------------------------------------------------------- command line


def outcome(script, words, capsys):
    """(exit code, what is said on stderr) of a command; in this process, for speed."""
    code = command.main(importlib.import_module(script.removesuffix(".py")).EXPERIMENT, words)
    return code, capsys.readouterr().err


def test_main_as_a_function(tmp_path, capsys):
    """Words of any kind, or a text; help and mistakes of words are exit codes too."""
    assert command.main(TINY, "--help") == 0 and "--width" in capsys.readouterr().out
    assert command.main(TINY, ["--width", 15, "--epochs", 1, "--out", tmp_path, "--dry-run"]) == 0
    assert command.main(TINY, f"--width 15 --epochs 1 --out '{tmp_path}' --dry-run") == 0
    assert capsys.readouterr().out.count("width=15") == 2
    assert command.main(TINY, "--out ''") == 2 and "--out is the path of a folder, and this" in capsys.readouterr().err
    with pytest.raises(TypeError, match="main takes a script's EXPERIMENT, not <module 'lab.command'"):
        command.main(command)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words, says", [
    (["--wdth", "8"], "unrecognized arguments: --wdth 8"), (["eight"], "unrecognized arguments: eight"),
    (["--width", "0"], "--width must be a number of at least 1, not 0"),
    (["--width", "nine"], "argument --width: invalid int value: 'nine'"),
    (["--width", "2", "--base-width", "3"], "the wider base 3"), (["--lr", "-1"], "--lr must be a number of at least"),
    (["--epochs", "1e3"], "invalid int value: '1e3'"), (["--epochs"], "expected one argument"),
    (["--lr", "inf"], "--lr must be a number of at least 0, not inf"), (["--lr", "nan"], "at least 0, not nan"),
    (["--data", "mnits"], "--data is one of"),
    (["--sweep", "fig99"], "there is no figure 'fig99'"), (["--device", "tpu"], "--device is one of"),
    (["--metric", "worst"], "invalid choice: 'worst'"),
    (["--list", "fig99", "--plot", "fig99"], "only one of --sweep, --list and --plot"),
    (["--data", "synthetic", "--out", os.devnull], "Not a directory"),
    (["--data", "synthetic", "--data-dir", os.devnull + "/data"], "Not a directory"),
])
def test_wrong_settings_end_in_one_sentence(script, words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, errors = outcome(script, words, capsys)
    assert code == 2 and says in errors and len(errors.splitlines()) == 1 and errors.startswith(f"{script}: "), errors


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_that_is_not_there(script, capsys):
    if nn.use_device("auto") == "gpu":
        nn.use_device("cpu")
        pytest.skip("a GPU is usable here")
    code, errors = outcome(script, ["--device", "gpu", "--data", "synthetic"], capsys)
    assert code == 2 and len(errors.splitlines()) == 1 and "a GPU was asked for but cannot be used" in errors


def test_a_setting_of_single_networks_is_refused_for_figures(capsys):
    for words in (["--plot", "fig6", "--width=8"], ["--quick", "--base-width", "8"]):
        assert command.main(resnet.EXPERIMENT, words) == 2
        assert "figures take --bases and --widths; --" in capsys.readouterr().err


def test_more_memory_than_there_is(tmp_path, capsys):
    assert command.main(TINY, flags(tmp_path, width=10**12, epochs=1)) == 1
    error, = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("tiny.py: there is not enough memory for this (Unable to allocate")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_nothing_large(script):
    """So it answers at once: SciPy, matplotlib, CuPy, mpi4py and locks are imported where they are used."""
    code = (f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
            f"try: runpy.run_path('{ROOT / script}', run_name='__main__')\n"
            "finally: print(*sorted(sys.modules), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "--width" in done.stdout and f"python {script}" in done.stdout
    assert not {"scipy", "matplotlib", "cupy", "mpi4py", "filelock", "pooch", "requests"} & set(done.stderr.split())


def test_quick_and_flags_of_all_kinds():
    @dataclass(frozen=True)
    class Settings(tiny.Settings):
        share: float | None = setting(None, "")
        bias: bool = setting(True, "")
        deep: bool = setting(False, "")

    e = replace(TINY, settings=Settings, quick=dict(epochs=1, deep=True), quick_figure="many",
                actions={"tidy-up": ("", None, None)})
    s, todo = command.parse(e, ["--quick", "--no-bias", "--share", "0.5", "--seed=3"])
    assert (s.epochs, s.deep, s.bias, s.share, s.seed) == (1, True, False, 0.5, 3) and todo.quick_figure
    s, todo = command.parse(e, ["--quick", "--width", "8", "--epochs", "2", "--tidy-up"])
    assert (s.epochs, s.width) == (2, 8) and not todo.quick_figure and todo.tidy_up
    assert flag("base_width") == "--base-width"


def test_an_action_is_done_instead(tmp_path):
    done = []
    e = replace(TINY, actions={"tidy-up": ("", None, lambda s: done.append(s.seed)),
                               "count": ("", "N", lambda s, n: done.append(n))})
    assert command.main(e, [*flags(tmp_path, seed=3), "--tidy-up"]) == 0
    assert command.main(e, [*flags(tmp_path), "--count", "0"]) == 0
    assert done == [3, 0] and not list(tmp_path.iterdir())


def test_dry_run(tmp_path, capsys):
    finished(run_of(tmp_path, seed=1))
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert command.main(TINY, [*flags(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("seed=0: about ") and out[0].endswith(" MB of disk")
    assert out[1].split() == "1 12x36 keeps 180 of 432".split() and out[3] == "  300 weights in all"
    assert out[-1].startswith("about ") and out[-1].endswith(" MB of memory at most")
    steps = []
    e = replace(TINY, train=lambda run: tiny.train(run, step_seen=lambda optimizer, *batch: steps.append(optimizer.lr)))
    assert command.main(e, [*flags(tmp_path), "--sweep", "many", "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 13 and out[1].startswith("seed=1: done: test ")
    assert len({line.partition(": about ")[2] for line in out[:1] + out[2:-1]}) == 1
    assert steps == [0] * 4  # runs that differ in the seed alone take the same; nothing is learned
    assert before == sorted(tmp_path.rglob("*"))


def test_the_time_of_a_dry_run(tmp_path, monkeypatch):
    """Epochs of 4 steps and 3 batches to test, at the least time of each but for the first."""
    clock = iter([0, 0.1, 0.3, 0.6, 1, 10, 10.5, 11, 12])
    run = command.DryRun(TINY, tiny.Settings(out=str(tmp_path)))
    monkeypatch.setattr(command, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    TINY.train(run)
    assert run.seconds == pytest.approx(3 * (4 * 0.2 + 3 * 0.5)) and run.disk > 300 * 4 and run.memory > 2**20


@pytest.mark.parametrize("seconds, says", [(1.4, "1 s"), (119, "119 s"), (121, "2 minutes"), (7201, "2.0 hours"),
                                           (86400 * 4, "4.0 days")])
def test_durations(seconds, says):
    assert command.duration(seconds) == says
