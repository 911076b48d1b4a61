"""Runs on a GPU: captured or not, cut and continued, from one device to the other, of every experiment."""

import contextlib
import csv
import io
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from test_distributed import digits

import command
import exp_bottleneck
import exp_mlp_mnist
import exp_resnet_cifar
import exp_resnet_imagenet
import loop
import nn
import train

SMALL = dict(data="synthetic", epochs=2, limit=68, held_out=40, batch=16, lr=0.01, device="gpu", save_every=1e9)
RESNET = exp_resnet_cifar.Settings(width=3, base_width=2, **SMALL)  # four batches of 16 and one of 4 an epoch
MLP = exp_mlp_mnist.Settings(width=12, **SMALL)
BOTTLENECK = exp_bottleneck.Settings(kind="linear", width=3, base_width=2, **SMALL)
PHOTOS = exp_resnet_imagenet.Settings(width=3, base_width=2, size=32, **SMALL)


@pytest.fixture
def trained(tmp_path, tmp_path_factory):
    """A function that trains these settings in a folder of this name, as far as a run there is not done."""
    def train_it(settings, name, experiment=exp_resnet_cifar.EXPERIMENT):
        drawn = str(tmp_path_factory.getbasetemp() / "drawn")
        if experiment is exp_mlp_mnist.EXPERIMENT:
            experiment = replace(experiment, load=lambda s: s.part_of(digits()))
        elif experiment is not exp_resnet_imagenet.EXPERIMENT:
            experiment = replace(experiment, load=lambda s: s.part_of(digits(side=32, channels=3)).augmented(4, True))
        run = train.Run(experiment, replace(settings, out=str(tmp_path / name), data_dir=drawn))
        with run.lock() as mine:
            assert mine
            run.train(bar=False)
        return run

    return train_it


def log(run):
    """(epochs, columns) of the log, without the seconds"""
    with open(run.folder / "log.csv") as file:
        return np.array([[float(v) for k, v in row.items() if k != "seconds"] for row in csv.DictReader(file)])


def state(run):
    """Everything in the checkpoint but the seconds, as bytes."""
    with np.load(run.folder / "checkpoint.npz") as file:
        return {k: file[k].tobytes() for k in file.files if k.startswith(("model.", "optimizer."))}


def interrupted(monkeypatch, steps):
    """SIGTERM to this process after so many steps, counted over all epochs."""
    real = loop.GraphSteps.train

    def steps_until(self, progress):
        nonlocal steps
        for _ in real(self, progress):
            steps -= 1
            if steps == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield len(self.stopped)

    monkeypatch.setattr(loop.GraphSteps, "train", steps_until)


def test_captured_and_uncaptured_steps_give_the_same_bits(gpu, trained, monkeypatch):
    gpu()
    captured = trained(RESNET, "captured")
    monkeypatch.setattr(nn.gpu.stream, "begin_capture", lambda: 1 / 0)
    uncaptured = trained(replace(RESNET, graph=False), "uncaptured")
    assert (log(captured) == log(uncaptured)).all() and state(captured) == state(uncaptured)


@pytest.mark.parametrize("precision, steps", [
    pytest.param("tf32", 2, marks=pytest.mark.slow), pytest.param("tf32", 5, marks=pytest.mark.slow), ("fp16", 8)])
def test_stopped_and_continued_to_the_same_bits(gpu, trained, monkeypatch, precision, steps):
    """Within the first epoch, at its end, in the second; fp16 has the scale of the loss to remember."""
    gpu(precision=precision)
    settings = replace(RESNET, precision=precision)
    whole = trained(settings, "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupted(patch, steps)
        trained(settings, "cut")
    assert stop.value.code == 128 + signal.SIGTERM
    cut = trained(settings, "cut")
    assert (log(cut) == log(whole)).all() and state(cut) == state(whole)
    with np.load(cut.folder / "checkpoint.npz") as file:
        assert ("optimizer.scaling" in file.files) == (precision == "fp16")
        for name in file.files:
            if name.endswith(".mask"):
                assert not file[name.removesuffix(".mask")][~file[name]].any(), name


@pytest.mark.parametrize("experiment, settings", [
    (exp_mlp_mnist.EXPERIMENT, MLP), (exp_bottleneck.EXPERIMENT, BOTTLENECK), (exp_resnet_imagenet.EXPERIMENT, PHOTOS),
    pytest.param(exp_resnet_cifar.EXPERIMENT, RESNET, marks=pytest.mark.slow)])
def test_as_on_the_cpu(gpu, trained, experiment, settings):
    settings = replace(settings, epochs=1, **({} if settings is MLP else {"precision": "fp32", "lr": 1e-3}))
    alone = trained(settings, "cpu", experiment)
    gpu(**{} if settings is MLP else {"precision": "fp32"})
    run = trained(settings, "gpu", experiment)
    np.testing.assert_allclose(log(run), log(alone), rtol=2e-3)
    assert run.result()["layers"] == alone.result()["layers"]
    versions = run.config()["versions"]
    assert versions["device"] == "gpu" and versions["gpu"] and versions["deterministic"] is True


@pytest.mark.parametrize("first, then", [("cpu", "gpu"), pytest.param("gpu", "cpu", marks=pytest.mark.slow)])
def test_a_run_goes_on_on_the_other_device(gpu, trained, monkeypatch, first, then):
    """Weights, masks, velocities and running estimates mean the same there."""
    settings = replace(RESNET, width=8, precision="fp32", lr=1e-3, epochs=2)
    devices = {"cpu": lambda: nn.use_device("cpu"), "gpu": lambda: gpu(precision="fp32")}
    whole = trained(settings, "whole")
    with monkeypatch.context() as patch:
        def epoch(self, steps, lr, progress, bar):
            if progress.epoch == 1:
                raise KeyboardInterrupt
            return real(self, steps, lr, progress, bar)

        real = train.Run.epoch
        patch.setattr(train.Run, "epoch", epoch)
        patch.setattr(train.Run, "save_is_due", lambda self: True)
        devices[first]()
        with pytest.raises(KeyboardInterrupt):
            trained(settings, "moved")
    devices[then]()
    moved = trained(settings, "moved")
    assert len(log(moved)) == 2
    np.testing.assert_allclose(log(moved), log(whole), rtol=2e-3)


def test_a_loss_that_is_not_finite_ends_the_run(gpu, trained):
    gpu()
    result = trained(replace(MLP, lr=1e30), "diverged", exp_mlp_mnist.EXPERIMENT).result()
    assert result["diverged"] and result["epochs"] == 0


@pytest.fixture
def perform(gpu, tmp_path, tmp_path_factory):
    """A function that runs a command line on the GPU: its exit code, what it printed, what it complained of."""
    def run(experiment, *words):
        gpu()  # from here the command line finds a GPU
        places = "--data-dir", tmp_path_factory.getbasetemp() / "drawn", "--out", tmp_path
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command.main(experiment, [str(w) for w in (*words, *places)])
            except SystemExit as exit:
                code = exit.code
        return code, out.getvalue(), err.getvalue()

    return run


def test_photographs_come_from_the_host(perform, tmp_path):
    """Batches of a data set that does not lie on the GPU, in half precision, with a smaller batch at the end."""
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    code, out, err = perform(exp_resnet_imagenet.EXPERIMENT, "--data", "synthetic", "--width", 2, "--base-width", 2,
                             "--size", 32, "--limit", 44, "--held-out", 30, "--epochs", 2, "--batch", 16, "--precision",
                             "bf16")
    assert code == 0, err
    (result,) = tmp_path.rglob("result.json")
    found = json.loads(result.read_text())
    assert "precision=bf16" in result.parent.name and found["epochs"] == 2
    assert found["config"]["versions"]["precision"] == "bf16"


def test_photographs_that_cannot_be_read(gpu):
    """A test batch of which nothing is left counts for nothing."""
    gpu(precision="fp32")
    s = replace(PHOTOS, batch=4)
    rng = np.random.default_rng(0)
    x, labels = nn.xp.asarray(rng.standard_normal((4, 3, 32, 32)).astype(np.float32)), nn.xp.asarray(np.arange(4))

    class Photographs:
        shape = 3, 32, 32
        test_batches = staticmethod(lambda batch: iter([(x, labels), (x[:0], labels[:0]), (x[:2], labels[:2])]))

    model = exp_resnet_imagenet.ResNet18(2)
    nn.initialize(model, 0)
    steps = loop.GraphSteps(s, Photographs(), model, nn.SGD(model.parameters(), 0.1), 4)
    found = [steps.evaluate() for _ in range(4)]
    want = loop.evaluate(model, Photographs.test_batches(4))
    assert found[0] == found[-1] == pytest.approx(want, rel=1e-5)


def test_an_estimate_leaves_out_what_is_done_once(perform, monkeypatch):
    """Compiling, planning and capturing take long, and do not come again."""
    real, clock = loop.train_step, [0.0]

    def step(*args):
        clock[0] += 100.0  # from Python: not a replay
        return real(*args)

    monkeypatch.setattr(loop, "train_step", step)
    now = command.time.perf_counter
    monkeypatch.setattr(command.time, "perf_counter", lambda: now() + clock[0])
    code, out, _ = perform(exp_mlp_mnist.EXPERIMENT, "--dry-run", "--width", 20, "--data", "synthetic", "--limit", 600,
                           "--held-out", 100, "--epochs", 1)
    found = out.splitlines()[0]
    assert code == 0 and " s, " in found and float(found.split("about ")[1].split(" s")[0]) < 60
    assert "MB of the card at most" in out


def test_dry_run_and_figures_on_a_gpu(perform, tmp_path):
    words = "--data", "synthetic", "--limit", 100, "--held-out", 100, "--epochs", 1
    code, out, _ = perform(exp_mlp_mnist.EXPERIMENT, "--dry-run", "--width", 20, *words)
    assert code == 0 and "3,970 weights in all" in out and "of disk" in out
    code, out, _ = perform(exp_mlp_mnist.EXPERIMENT, "--quick", "--jobs", 1, "--seeds", 1, *words)
    assert code == 0 and "best" in out and list(tmp_path.rglob("*.png"))


def test_what_is_for_gpus_only(perform):
    code, _, err = perform(exp_resnet_cifar.EXPERIMENT, "--device", "cpu", "--tune", "--data", "synthetic")
    assert code == 2 and "--tune is for GPUs, and this would be trained on the CPU" in err
