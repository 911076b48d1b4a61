"""Networks trained as one are the networks trained one by one, whatever happens on the way."""

import csv
import signal
from dataclasses import replace

import numpy as np
import pytest
from test_distributed import digits
from test_gpu_runs import interrupted

import exp_mlp_mnist as mlp
import exp_resnet_cifar
import files
import nn
import together
import train

MLP = replace(mlp.EXPERIMENT, load=lambda s: (lambda d: d.standardized_by_pixel() if s.pixelwise else d)(digits()))


@pytest.fixture
def settings():
    return mlp.Settings(width=12, data="synthetic", epochs=3, batch=100, save_every=1e9)  # 220 images, 80 to test


def networks(s):
    """Runs that differ in all that networks trained as one may differ in."""
    return [replace(s, seed=1), replace(s, last=0.5), replace(s, dense=True), replace(s, base_width=8, lr=0.2),
            replace(s, how="proportional", seed=2)]


def runs_in(folder, networks, experiment=MLP):
    return [train.Run(experiment, replace(s, out=str(folder))) for s in networks]


def logs(runs):
    """What each run wrote of its epochs, without the seconds: (runs, epochs, columns)"""
    found = []
    for run in runs:
        with open(run.folder / "log.csv") as log:
            found.append([[float(v) for k, v in row.items() if k != "seconds"] for row in csv.DictReader(log)])
    return np.array(found)


def weights(run):
    """Every array of the last checkpoint, as bytes."""
    with np.load(run.folder / "checkpoint.npz") as file:
        return {name: file[name].tobytes() for name in file.files if name.startswith(("model.", "optimizer."))}


def one_by_one(folder, networks, experiment=MLP):
    runs = runs_in(folder, networks, experiment)
    assert train.sweep(runs, bar=False) == 0
    return runs


def as_one(folder, networks, experiment=MLP):
    runs = runs_in(folder, networks, experiment)
    together.train_groups(runs)
    return runs


@pytest.fixture
def groups(monkeypatch):
    """The sizes of the groups that are trained, as a list that fills."""
    sizes, real = [], together.Group.__init__

    def init(self, runs, *rest):
        sizes.append(len(runs))
        real(self, runs, *rest)

    monkeypatch.setattr(together.Group, "__init__", init)
    return sizes


def with_momentum(experiment):
    """The same experiment with momentum and a learning rate that falls."""
    return replace(experiment, optimizer=lambda s, params: nn.SGD(params, s.lr, 0.9, 1e-3),
                   schedule=lambda s: nn.MultiStepLR(s.lr, [1, 2]))


@pytest.mark.parametrize("change", [pytest.param(lambda e: e, marks=pytest.mark.slow), with_momentum])
def test_as_one_by_one(gpu, settings, groups, tmp_path, change):
    experiment, all_ = change(MLP), networks(settings) + [replace(settings, width=7)]
    alone = one_by_one(tmp_path / "cpu", all_, experiment)
    gpu()
    single = one_by_one(tmp_path / "single", all_, experiment)
    runs = as_one(tmp_path / "as one", all_, experiment)
    assert groups == [5]  # what is of another width is left to the sweep
    assert [run.done() for run in runs] == [True] * 5 + [False]
    for other in (alone, single):
        np.testing.assert_allclose(logs(runs[:5]), logs(other[:5]), rtol=2e-4, atol=1e-6)
    for run, other in zip(runs[:5], single):
        result, want = run.result(), other.result()
        assert {k: result[k] for k in ("weights", "layers", "epochs")} == {k: want[k] for k in
                                                                          ("weights", "layers", "epochs")}
        assert result["seconds"] > 0
        with np.load(run.folder / "checkpoint.npz") as file, np.load(other.folder / "checkpoint.npz") as theirs:
            assert file.files == theirs.files
            for name in file.files:
                if name.endswith(".mask"):
                    assert (file[name] == theirs[name]).all()
                    assert not file[name.removesuffix(".mask")][~file[name]].any()


def test_pixelwise_and_ntk(gpu, settings, tmp_path):
    s = mlp.fig8_at(settings, 32, False)
    s = replace(s, batch=100, lr=8.0)
    all_ = [s, replace(s, seed=1), replace(s, lr=16.0)]
    alone = one_by_one(tmp_path / "cpu", all_)
    gpu()
    np.testing.assert_allclose(logs(as_one(tmp_path / "as one", all_)), logs(alone), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [  # in an epoch, at its end, in the next
    pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_stopped_and_continued(gpu, settings, groups, tmp_path, monkeypatch, steps):
    gpu()
    all_ = networks(settings)
    whole = as_one(tmp_path / "whole", all_, with_momentum(MLP))
    with monkeypatch.context() as patch:
        interrupted(patch, steps)
        with pytest.raises(SystemExit) as stop:
            as_one(tmp_path / "cut", all_, with_momentum(MLP))
        assert stop.value.code == 128 + signal.SIGTERM
    cut = runs_in(tmp_path / "cut", all_)
    assert not any(run.done() for run in cut) and all((run.folder / "checkpoint.npz").exists() for run in cut)
    cut = as_one(tmp_path / "cut", all_, with_momentum(MLP))
    assert groups == [5, 5, 5]
    assert (logs(cut) == logs(whole)).all() and [weights(run) for run in cut] == [weights(run) for run in whole]


def test_killed_between_two_checkpoints(gpu, settings, groups, tmp_path, monkeypatch):
    """Runs that have come differently far go on in groups of their own."""
    gpu()
    all_ = networks(replace(settings, save_every=0.0))
    whole = as_one(tmp_path / "whole", all_)
    saves, real = iter(range(100)), train.Run.save_checkpoint

    def die(self, *state):
        if next(saves) == 7:  # amid the second time that the group is saved
            raise KeyboardInterrupt
        real(self, *state)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            as_one(tmp_path / "cut", all_)
    cut = as_one(tmp_path / "cut", all_)
    assert sorted(groups[2:]) == [2, 3]
    np.testing.assert_allclose(logs(cut), logs(whole), rtol=2e-4, atol=1e-6)


def test_a_diverging_network_disturbs_no_other(gpu, settings, tmp_path, capfd):
    gpu()
    all_ = [settings, replace(settings, seed=1, lr=1e30), replace(settings, seed=2)]
    runs = as_one(tmp_path / "runs", all_)
    diverged = runs[1].result()
    assert diverged["diverged"] and diverged["epochs"] == 0 and diverged["best_test_acc"] is None
    assert "no longer finite in epoch 1" in "".join(capfd.readouterr())
    others = as_one(tmp_path / "others", all_[::2])
    np.testing.assert_allclose(logs(runs[::2]), logs(others), rtol=1e-6)


def test_what_another_process_trains_is_left_to_it(gpu, settings, groups, tmp_path):
    gpu()
    all_ = networks(settings)
    with files.hold(runs_in(tmp_path, all_)[2].folder) as mine:
        assert mine
        runs = as_one(tmp_path, all_)
    assert groups == [4] and [run.done() for run in runs] == [True, True, False, True, True]
    as_one(tmp_path, all_)  # a single one is no group
    assert groups == [4] and not runs[2].done()
    assert train.sweep(runs, bar=False) == 0 and runs[2].done()


def test_a_group_that_fails_is_trained_one_by_one(gpu, settings, tmp_path, monkeypatch, capfd):
    gpu()
    all_ = networks(settings)[:2]
    monkeypatch.setattr(together.Group, "train", lambda self: 1 / 0)
    runs = as_one(tmp_path, all_)
    assert "2 networks could not be trained as one (division by zero)" in capfd.readouterr().err
    assert train.sweep(runs, bar=False) == 0 and all(run.done() for run in runs)


def test_a_damaged_checkpoint_is_left_to_the_sweep(gpu, settings, groups, tmp_path):
    gpu()
    all_ = networks(settings)[:3]
    damaged = runs_in(tmp_path, all_)[1]
    damaged.folder.mkdir(parents=True)
    (damaged.folder / "checkpoint.npz").write_bytes(b"no archive")
    runs = as_one(tmp_path, all_)
    assert groups == [2] and [run.done() for run in runs] == [True, False, True]
    assert train.sweep(runs, bar=False) == 1 and "cannot be continued" in damaged.status()


def test_networks_with_running_estimates_cannot_be_stacked(backend):
    models = [exp_resnet_cifar.ResNet18(2) for _ in range(3)]
    with pytest.raises(ValueError, match="cannot be trained as one"):
        together.stack(models[1:], models[0])


def test_stacked_networks_compute_what_each_does(backend):
    """Outputs, losses, correct answers and gradients; then a step of SGD at the learning rate of each."""
    rng, dtype = np.random.default_rng(0), np.float64

    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 7, dtype=dtype), nn.ReLU(),
                             nn.Linear(7, 4, bias=False, dtype=dtype))

    models = [build() for _ in range(3)]
    for seed, model in enumerate(models[:2]):
        nn.sparsify(model, 40, seed)
    whole = together.stack(models, build())
    x, y = nn.xp.asarray(rng.standard_normal((3, 5, 1, 3, 4))), nn.xp.asarray(rng.integers(0, 4, (3, 5)))
    loss, loss_sum, correct = nn.classify(whole(nn.Tensor(x)), y)
    loss.backward(nn.xp.ones_like(loss.data))
    rates = np.array([0.1, 1.0, 0.3])
    optimizer = nn.SGD(whole.parameters(), rates, momentum=0.9)
    optimizer.step()
    for i, model in enumerate(models):
        own, own_sum, own_correct = nn.classify(model(nn.Tensor(x[i])), y[i])
        own.backward()
        for sums in ((loss.data[i], own.data), (loss_sum[i], own_sum), (correct[i], own_correct)):
            assert float(sums[0]) == pytest.approx(float(sums[1]), rel=1e-12)
        nn.SGD(model.parameters(), rates[i], momentum=0.9).step()
        for p, q in zip(whole.parameters(), model.parameters(), strict=True):
            np.testing.assert_allclose(nn.to_host(p.data[i]), nn.to_host(q.data), rtol=1e-12, atol=1e-15)
