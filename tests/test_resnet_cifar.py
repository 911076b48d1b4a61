"""exp_resnet_cifar.py: settings, network sizes, runs that are cut and go on, figures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_train import contents

import command
import data
import exp_resnet_cifar as resnet
import figures
import loop
import nn
import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Width 4 on a few coloured digits; flips, so that all of the augmentation takes part."""
    small = data.synthetic(tmp_path / "data", side=32, channels=3, train=200, test=50)
    monkeypatch.setattr(data, "synthetic", lambda folder, side, channels: small)
    return resnet.Settings(data="synthetic", width=4, base_width=3, epochs=3, batch=32, flip="yes", limit=150,
                           out=str(tmp_path / "runs"))


def trained(settings):
    run = train.Run(resnet.EXPERIMENT, settings)
    with run.lock():
        run.train(bar=False)
    return run


# ---------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("width, classes", [(1, 10), (8, 10), (12, 100)])
def test_layer_sizes_are_those_of_the_network(width, classes):
    layers = nn.layers(resnet.ResNet18(width, classes))
    assert resnet.layer_sizes(width, classes) == [layer.weight.size for _, layer in layers]


@pytest.mark.parametrize("base, weights", [(8, 175_192), (12, 393_540), (18, 884_502), (40, 4_362_680),
                                           (64, 11_164_352)])
def test_budget_of_every_base(base, weights):
    s = resnet.Settings(width=128, base_width=base)
    assert resnet.budget(s) == weights and resnet.budget(replace(s, width=base, dense=True)) == weights
    assert resnet.budget(replace(s, width=base, base_width=1, dense=True)) == weights


def test_parameters_come_in_forward_order():
    names = [name for name, _ in resnet.ResNet18(2).named_parameters()]
    assert names[:5] == ["conv.weight", "bn.weight", "bn.bias", "blocks.0.conv1.weight", "blocks.0.bn1.weight"]
    block = [name.removeprefix("blocks.2.") for name in names if name.startswith("blocks.2.")]
    assert block == ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias",
                     "shortcut.0.weight", "shortcut.1.weight", "shortcut.1.bias"]
    assert names[-2:] == ["classifier.weight", "classifier.bias"] and len(names) == 62


def test_schedule_moves_with_the_number_of_epochs():
    rates = [resnet.schedule(resnet.Settings())(epoch) for epoch in (0, 49, 50, 119, 120, 199, 200, 299)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4])
    short = [resnet.schedule(resnet.Settings(epochs=30))(epoch) for epoch in (4, 5, 11, 12, 19, 20)]
    np.testing.assert_allclose(short, [0.1, 0.01, 0.01, 0.001, 0.001, 1e-4])
    cosine = [resnet.schedule(resnet.Settings(epochs=30, schedule="cosine"))(epoch) for epoch in (0, 15)]
    np.testing.assert_allclose(cosine, [0.1, 0.05])
    assert resnet.schedule(resnet.Settings(schedule="constant"))(299) == 0.1
    for epochs in (1, 2, 3, 4):  # every rate has an epoch, the first one included
        rates = [resnet.schedule(resnet.Settings(epochs=epochs))(epoch) for epoch in range(epochs)]
        np.testing.assert_allclose(rates, [0.1, 0.01, 0.001, 0.0001][:epochs])


@pytest.mark.parametrize("name, flip, expected", [("cifar10", "auto", True), ("cifar100", "auto", True),
                                                  ("svhn", "auto", False), ("svhn", "yes", True),
                                                  ("cifar10", "no", False), ("synthetic", "auto", False)])
def test_digits_are_not_mirrored_unless_asked(name, flip, expected):
    assert resnet.Settings(data=name, flip=flip).flips is expected


def test_load_takes_every_setting(settings):
    dataset = resnet.load(replace(settings, held_out=40, limit=100, padding=3, flip="no"))
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (100, 40)
    assert (dataset.padding, dataset.flip, dataset.shape) == (3, False, (3, 32, 32))


def test_io_only_keeps_whole_kernels(settings):
    model = resnet.build(replace(settings, io_only=True), resnet.load(settings))
    for _, layer in nn.layers(model):
        if layer.weight.mask is not None and layer.weight.ndim == 4:
            by_kernel = layer.weight.mask.reshape(*layer.weight.shape[:2], -1)
            assert (by_kernel.all(-1) == by_kernel.any(-1)).all()
    assert 0 <= resnet.budget(settings) - nn.weight_count(model) < 9


# ---------------------------------------------------------------------------------------------- runs


def test_a_run_that_is_cut_goes_on_bit_for_bit(settings):
    """Weights, masks, velocity, BatchNorm's estimates, order and crops of the images: all go on where they were."""
    whole = contents(trained(settings))
    other = replace(settings, out=settings.out + "-cut", save_every=0.0)
    run, steps, real = train.Run(resnet.EXPERIMENT, other), [], loop.train_step
    for cut in (2, 6, 9):  # steps after which the process dies; an epoch has five

        def step(*args):
            if len(steps) == cut:
                raise KeyboardInterrupt
            steps.append(1)
            return real(*args)

        loop.train_step = step
        try:
            with pytest.raises(KeyboardInterrupt), run.lock():
                run.train(bar=False)
        finally:
            loop.train_step = real
    with run.lock():
        run.train(bar=False)
    arrays, log, result = contents(run)
    assert {"model.bn.running_var", "model.blocks.0.conv1.weight"} <= set(arrays)
    assert (arrays.keys(), log, result) == (whole[0].keys(), *whole[1:])
    assert [name for name in arrays if arrays[name] != whole[0][name] and name != "settings"] == []


def test_a_sparse_run_learns_and_keeps_its_budget(settings):
    run = trained(replace(settings, width=8, base_width=6, epochs=8, limit=0, lr=0.05, padding=0, flip="no"))
    result = run.result()
    assert result["weights"] == sum(resnet.layer_sizes(6, 10))
    assert result["best_train_acc"] > 0.22  # a tenth by chance
    with np.load(run.folder / "checkpoint.npz") as file:
        for name in file.files:
            if name.endswith(".mask"):
                assert not file[name.removesuffix(".mask")][~file[name]].any(), name


@pytest.mark.parametrize("words, message", [
    (("--bases", "8,x"), "--bases is a list of widths such as 8,12,18, not '8,x'"),
    (("--widths", ""), "--widths is a list"),
    (("--width", 4, "--base-width", 8), "width 4 cannot keep the weights of the wider base 8"),
    (("--device", "cpu", "--precision", "bf16"), "--precision is for GPUs"),
    (("--precision", "int8"), "--precision is one of fp32, tf32, bf16, fp16, not int8"),
    (("--sweep", "fig6", "--width", 8), "figures take --bases and --widths; --width is for a single network"),
    (("--quick", "--base-width=12"), "--base-width is for a single network"),
    (("--list", "fig6", "--bases", 8, "--widths", 4), "none of the --widths 4 is as wide as a base of --bases 8"),
    (("--sweep", "fig10"), "fig10 needs no training; --plot fig10 draws it"),
    (("--plot", "fig6"), "none of the"),
    (("--batch", 1), "--batch must be a number of at least 2"),
])
def test_mistakes_end_in_a_sentence(words, message, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "exp_resnet_cifar.py"), *map(str, words), "--out", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------- figures


def test_runs_of_the_figures(tmp_path):
    s = resnet.Settings(bases="8,12", widths="12,8,18", seeds=2)
    fig6 = resnet.fig6_runs(s)
    assert [(r.base_width, r.width) for r in fig6 if r.seed == 0] == [(8, 8), (8, 12), (8, 18), (12, 12), (12, 18)]
    assert {r.seed for r in fig6} == {0, 1} and len(set(fig6)) == 10
    fig7 = resnet.fig7_runs(s)
    dense = {r.width for r in fig7 if r.width == r.base_width}
    assert set(fig6) < set(fig7) and dense == {8, 12, 18} and len(fig7) == len(set(fig7)) == 12
    fig9 = resnet.fig9_runs(s)
    assert set(fig6) < set(fig9)
    assert sum(r.io_only for r in fig9) == 6 and not any(r.io_only for r in fig9 if r.width == r.base_width)
    names = [train.Run(resnet.EXPERIMENT, r).folder for r in {*fig7, *fig9}]
    assert len(set(names)) == len(names)
    assert len(resnet.fig6_runs(resnet.Settings())) == 3 * (8 + 7 + 6 + 4 + 3)


ACCURACY = {(8, 8): 0.80, (8, 12): 0.83, (8, 18): 0.84, (12, 12): 0.85, (12, 18): 0.86, (18, 18): 0.88}


def made_up(s, run):
    """A result whose accuracies can be told apart."""
    acc = ACCURACY[run.base_width, run.width] - 0.01 * run.io_only + 0.002 * run.seed
    weights = sum(resnet.layer_sizes(run.base_width, 10))
    return {"weights": weights, "connectivity": weights / sum(resnet.layer_sizes(run.width, 10)), "diverged": False,
            "best_test_acc": acc, "final_test_acc": acc - 0.01, "best_train_acc": acc + 0.1, "epochs": 30,
            "final_train_acc": acc + 0.1, "seconds": 1.0, "config": {"versions": {}, "settings": run.identity()}}


@pytest.mark.parametrize("name, expected", [
    ("fig6", ["base 8: 175,192 weights: 80.10 % at width 8, best 84.10 % at width 18"]),
    ("fig14", ["base 8: 175,192 weights: 90.10 % at width 8, best 94.10 % at width 18",
               "ours: best training accuracy", "90.10 % ± 0.14 (2)"]),
    ("fig12", ["base 12: 393,540 weights: 85.10 % at width 12, best 86.10 % at width 18"]),
    ("fig1", ["sparse: 175,192 weights at every width: 80.10 % at 8, 83.10 % at 12, 84.10 % at 18",
              "dense: all weights of its width: 80.10 % at 8, 85.10 % at 12, 88.10 % at 18"]),
    ("fig7", ["base 8: 60 % at 12, 50 % at 18; training accuracy is largest at width 18", "base 12: 33 % at 18"]),
    ("fig9", ["base 8, masks of whole kernels, 175,192 weights: 80.10 % at 8, 82.10 % at 12, 83.10 % at 18"]),
    ("fig10", ["width 8: 175,192 of 175,192 weights", "175,192 of 884,502 weights"]),
])
def test_figures_say_what_their_runs_found(name, expected, tmp_path, capsys):
    s = resnet.Settings(bases="8,12", widths="8,12,18", seeds=2, epochs=30, limit=5000, out=str(tmp_path))
    figure = resnet.EXPERIMENT.figures[name]
    if figure.trained:
        for run in figure.runs(s):
            folder = train.Run(resnet.EXPERIMENT, run).folder
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(made_up(s, run)))
    assert command.main(resnet.EXPERIMENT, ["--plot", name, *s.flags(places=("bases", "widths", "seeds", "out"))]) == 0
    out = capsys.readouterr().out
    for sentence in expected:
        assert sentence in out
    assert (tmp_path / "resnet_cifar" / "cifar10" / f"resnet_cifar_{name}.png").stat().st_size > 10_000


def test_a_figure_says_how_far_its_runs_are_from_the_paper(tmp_path):
    s = resnet.Settings(epochs=30, limit=5000)
    run = replace(s, width=8, base_width=8)
    points = figures.points([run, replace(run, seed=1)], [made_up(s, r) for r in (run, replace(run, seed=1))])
    picture, _ = resnet.family_draw(points, "best")
    assert picture.axes[0].get_title() == (
        "Figure 6. ResNet-18, CIFAR-10, first 5,000 training images\nbest test accuracy over 30 epochs "
        "(the paper: 300), mean of 2 seeds\nbars: standard deviation over seeds")


def test_a_figure_names_another_schedule():
    s = resnet.Settings(epochs=1, width=8, base_width=8, schedule="cosine")
    assert resnet.title(figures.points([s], [made_up(s, s)]), "final") == (
        "test accuracy after 1 epoch (the paper: 300), cosine learning rate, 1 seed")


def test_a_figure_names_every_departure_from_the_protocol():
    s = resnet.Settings(width=12, base_width=8, lr=0.01, how="proportional", io_only=True, held_out=500)
    grouped = figures.points([s], [made_up(s, s)])
    assert resnet.title(grouped, "best", about=("io_only",)) == (
        "best test accuracy over 300 epochs, lr 0.01, how proportional, 1 seed")
    assert "io only True" in resnet.title(grouped, "best")
    assert figures.subject(grouped) == "CIFAR-10, tested on 500 others of them"


def test_dense_is_the_base_of_its_own_width():
    s = resnet.Settings(width=18, base_width=8, dense=True)
    assert s == resnet.Settings(width=18, base_width=18) and replace(s, width=20).base_width == 18


def test_figure_7_says_where_there_is_nothing_to_divide_by(tmp_path):
    s = resnet.Settings(bases="8", widths="8,12", seeds=1)
    runs = resnet.fig7_runs(s)
    results = [made_up(s, r) | {"best_test_acc": 0.5} for r in runs]
    with pytest.raises(train.UsageError, match="at width 12 the dense network gains 0.00 points"):
        resnet.fig7_draw(figures.points(runs, results), "best")


def test_a_figure_of_whole_kernels_alone(tmp_path):
    s = resnet.Settings(bases="8", widths="8,12", seeds=1)
    runs = [r for r in resnet.fig9_runs(s) if r.io_only]
    _, summary = resnet.fig9_draw(figures.points(runs, [made_up(s, r) for r in runs]), "best")
    assert summary == ["base 8, masks of whole kernels, 175,192 weights: 82.00 % at 12"]


def test_values_stated_for_the_papers_code():
    s = resnet.Settings(data="cifar100", base_width=18, width=64)
    assert resnet.paper(s) == "74.27 % *" and resnet.stated_by(s)[0].startswith("*: an independent run")
    for other in (dict(io_only=True), dict(epochs=30), dict(limit=100), dict(lr=0.01)):
        assert resnet.paper(replace(s, **other)) is None
    assert resnet.paper(resnet.Settings(data="cifar10", base_width=18, width=64)) is None
