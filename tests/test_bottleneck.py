"""exp_bottleneck.py: numbers of weights, what factorised convolutions compute, gradients, the figure."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import command
import data
import exp_bottleneck as bottleneck
import exp_resnet_cifar as resnet
import nn
import train

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = [(kind, base, width) for kind in ("linear", "nonlinear") for base in (8, 12, 18, 40)
            for width in (8, 12, 18, 32, 40, 64) if width >= base]


def slow_count(s, f):
    """Weights of a network, layer by layer as the paper describes it."""
    total, d_in = 0, s.width

    def middle(d):
        return max(1, int(np.floor(f * d + 0.5)))

    def conv(i, o):
        return 9 * i * middle(min(i, o)) + middle(min(i, o)) * o if s.kind == "linear" else 9 * i * o

    total += conv(3, s.width) if s.kind == "linear" else 27 * s.width
    for d in (s.width, 2 * s.width, 4 * s.width, 8 * s.width):
        for _ in range(2):
            inside = d if s.kind == "linear" else middle(d)
            total += conv(d_in, inside) + conv(inside, d) + (d_in * d if d_in != d else 0)
            d_in = d
    return total + d_in * resnet.CLASSES[s.data]


@pytest.mark.parametrize("kind, base, width", FAMILIES)
def test_counts_are_as_near_the_budget_as_one_fraction_allows(kind, base, width):
    """No fraction of a fine grid, finer than any change of the count, comes nearer."""
    s = bottleneck.Settings(kind=kind, base_width=base, width=width)
    want = slow_count(replace(s, width=base), 1.0)
    assert bottleneck.budget(s) == want
    if slow_count(s, 0.0) > want:
        with pytest.raises(train.UsageError, match=f"cannot keep the {want:,} weights"):
            bottleneck.fraction(s)
        return
    f = bottleneck.fraction(s)
    assert bottleneck.count(s, f) == slow_count(s, f)
    best = min(abs(slow_count(s, g) - want) for g in np.linspace(0, 1, 2 * 8 * width + 1)[1:] - 1e-6)
    assert abs(slow_count(s, f) - want) <= best
    if width == base:
        assert f == 1 and slow_count(s, f) == want


def test_the_plain_network_is_the_narrowest_nonlinear_one():
    s = bottleneck.Settings(kind="nonlinear", base_width=8, width=8)
    assert bottleneck.budget(s) == 175_192 == sum(resnet.layer_sizes(8, 10))


@pytest.mark.parametrize("kind, width", [("linear", 4), ("linear", 7), ("nonlinear", 7), ("sparse", 7)])
def test_networks_have_their_counts(kind, width):
    s = bottleneck.Settings(kind=kind, base_width=4, width=width, data="synthetic")
    dataset = data.Dataset("synthetic", 10, *[np.zeros(1)] * 6)
    model = bottleneck.build(s, dataset)
    expected = sum(resnet.layer_sizes(4, 10)) if kind == "sparse" else bottleneck.count(s, bottleneck.fraction(s))
    assert nn.weight_count(model) == expected
    first, second = (bottleneck.build(replace(s, seed=seed), dataset).state_dict() for seed in (0, 0))
    other = bottleneck.build(replace(s, seed=1), dataset).state_dict()
    assert all((first[name] == second[name]).all() for name in first)
    assert (first["blocks.0.conv1.0.weight" if kind == "linear" else "blocks.0.conv1.weight"]
            != other["blocks.0.conv1.0.weight" if kind == "linear" else "blocks.0.conv1.weight"]).any()


def test_linear_bottlenecks_have_a_stride_only_once_and_no_bias():
    model = resnet.ResNet18(4, 10, conv=bottleneck.factorised(0.5))
    shapes = {name: p.shape for name, p in model.named_parameters() if name.startswith("blocks.2.conv1")}
    assert shapes == {"blocks.2.conv1.0.weight": (2, 4, 3, 3), "blocks.2.conv1.1.weight": (8, 2, 1, 1)}
    assert [m.stride for m in model.blocks[2].conv1.modules] == [2, 1]
    assert model(nn.Tensor(np.ones((2, 3, 32, 32), np.float32))).shape == (2, 10)


def in_float64(model):
    for _, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, nn.Parameter):
                setattr(module, name, nn.Parameter(value.data.astype(np.float64)))
            elif isinstance(value, np.ndarray):
                setattr(module, name, value.astype(np.float64))
    return model


def plain_and_factorised():
    """A plain block of 6 channels and a factorised one of full rank that computes the same, by SVD."""
    rng = np.random.default_rng(0)
    plain = in_float64(resnet.BasicBlock(6, 6, 1, 6, resnet.conv3x3))
    factored = in_float64(resnet.BasicBlock(6, 6, 1, 6, bottleneck.factorised(1.0)))
    for name in ("conv1", "conv2"):
        w = getattr(plain, name).weight.data  # (o, i, 3, 3)
        u, s, vt = np.linalg.svd(w.reshape(6, -1), full_matrices=False)  # (o, 9 i) = (o, b) (b, b) (b, 9 i)
        first, second = getattr(factored, name).modules
        first.weight.data[...] = vt.reshape(first.weight.shape)
        second.weight.data[...] = (u * s).reshape(second.weight.shape)
    return plain, factored, nn.Tensor(rng.standard_normal((4, 6, 8, 8)))


def test_full_rank_has_the_same_function_but_another_trajectory():
    """Equal outputs at first; after one step of SGD they differ by far more than rounding."""
    plain, factored, x = plain_and_factorised()
    np.testing.assert_allclose(factored(x).data, plain(x).data, rtol=0, atol=1e-12)
    target, outputs = np.random.default_rng(1).standard_normal(x.shape), []
    for model in (plain, factored):
        optimizer = nn.SGD(model.parameters(), lr=0.1)
        difference = model(x) - nn.Tensor(target)
        (difference * difference).mean().backward()
        optimizer.step()
        with nn.no_grad():
            outputs.append(model(x).data)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-4


@pytest.mark.parametrize("middle, conv", [(6, bottleneck.factorised(0.5)), (2, resnet.conv3x3)])
def test_gradients_through_the_blocks(middle, conv):
    """Along a random direction of all parameters, against a central difference in float64."""
    rng = np.random.default_rng(0)
    block = in_float64(resnet.BasicBlock(4, 6, 2, middle, conv))
    nn.initialize(block, seed=0)  # the same on every run: at some weights a ReLU's kink lies within the difference
    x, weights = nn.Tensor(rng.standard_normal((3, 4, 8, 8))), nn.Tensor(rng.standard_normal((3, 6, 4, 4)))
    parameters = block.parameters()
    start = [p.data.copy() for p in parameters]
    directions = [rng.standard_normal(p.shape) for p in parameters]

    def loss(step):
        for p, s, d in zip(parameters, start, directions):
            p.data[...] = s + step * d
        return (block(x) * weights).sum()

    loss(0.0).backward()
    expected = sum((p.grad * d).sum() for p, d in zip(parameters, directions))
    measured = (loss(1e-6).item() - loss(-1e-6).item()) / 2e-6
    assert measured == pytest.approx(expected, rel=1e-6)


def test_sparse_runs_are_those_of_the_other_script():
    ours = bottleneck.Settings(kind="sparse", base_width=8, width=18, epochs=15)
    theirs = resnet.Settings(base_width=8, width=18, epochs=15)
    assert train.Run(bottleneck.EXPERIMENT, ours).folder == train.Run(resnet.EXPERIMENT, theirs).folder
    names = {train.Run(bottleneck.EXPERIMENT, replace(ours, kind=kind)).folder
             for kind in ("sparse", "linear", "nonlinear")}
    assert len(names) == 3


def test_runs_of_the_figure():
    runs = bottleneck.fig3_runs(bottleneck.Settings(bases="8,12", widths="8,12,64", seeds=1))
    found = {(r.kind, r.base_width, r.width) for r in runs}
    assert found == {("sparse", 8, 8), ("sparse", 8, 12), ("sparse", 8, 64), ("linear", 8, 8), ("linear", 8, 12),
                     ("nonlinear", 8, 12), ("sparse", 12, 12), ("sparse", 12, 64), ("linear", 12, 12),
                     ("linear", 12, 64), ("nonlinear", 12, 64)}  # width 64 is too wide for bottlenecks of base 8
    for run in runs:
        run.check()
    notes = list(bottleneck.too_wide(bottleneck.Settings(bases="8,12", widths="8,12,64")))
    assert len(notes) == 2 and notes[0] == (
        "linear bottlenecks of width 64 are too wide for base 8: with one channel in each they have 211,611 weights, "
        "the base 182,057")


@pytest.mark.parametrize("words, message", [
    (("--kind", "linear", "--base-width", 8, "--width", 64), "with one channel in each they have 211,611"),
    (("--kind", "linear", "--io-only"), "masks, which linear bottlenecks have none of"),
])
def test_mistakes_end_in_a_sentence(words, message, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "exp_bottleneck.py"), *map(str, words), "--out", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_figure_says_what_its_runs_found(tmp_path, capsys):
    s = bottleneck.Settings(bases="8,12", widths="8,12,18", seeds=1, epochs=30, out=str(tmp_path))
    for i, run in enumerate(bottleneck.fig3_runs(s)):
        weights = (sum(resnet.layer_sizes(run.base_width, 10)) if run.kind == "sparse"
                   else bottleneck.count(run, bottleneck.fraction(run)))
        result = {f"{which}_{what}_acc": 0.5 + 0.01 * i for which in ("best", "final") for what in ("test", "train")}
        folder = train.Run(bottleneck.EXPERIMENT, run).folder
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(
            {**result, "weights": weights, "connectivity": 1, "diverged": False, "epochs": 30, "seconds": 1.0}))
    words = s.flags(places=("bases", "widths", "seeds", "out"))
    assert command.main(bottleneck.EXPERIMENT, ["--plot", "fig3", *words]) == 0
    out = capsys.readouterr().out
    assert "base 8, linear: 182,057 to 183,195 weights: 53.00 % at 8, 54.00 % at 12, 55.00 % at 18" in out
    assert "base 8, nonlinear: 175,192 to 177,372 weights: 50.00 % at 8, 56.00 % at 12, 57.00 % at 18" in out
    assert "base 8, sparse: 175,192 weights: 50.00 % at 8, 51.00 % at 12, 52.00 % at 18" in out
    assert "13 of 13 runs are done" in out
    assert (tmp_path / "resnet_cifar" / "cifar10" / "resnet_cifar_fig3.png").stat().st_size > 20_000
