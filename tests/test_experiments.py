"""The four experiments: settings, networks against PyTorch, weights, families of runs, figures, small runs.

Figures are drawn from made-up results; runs are a second or two long.
"""

import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from test_figures import finish, made_up

import exp_bottleneck as bottleneck
import exp_mlp_mnist as mlp
import exp_resnet_cifar as resnet
import exp_resnet_imagenet as imagenet
import kernels
import lab
import nn
from lab import draw_mlp, draw_optimum, draw_resnet, figures, intervals
from lab.files import read_json
from lab.run import Run

ROOT = Path(__file__).resolve().parent.parent
ALL = [mlp, resnet, bottleneck, imagenet]
SCRIPTS = pytest.mark.parametrize("script", ALL, ids=lambda script: script.__name__)


def points(runs, result_of):
    return figures.points(runs, [result_of(run) for run in runs])


# ---------------------------------------------------------------------------------------------- settings


@SCRIPTS
def test_what_changes_a_result_is_in_the_name(script):
    """And nothing else is: each of two values of every other setting names a run of its own."""
    def other(f):
        value = getattr(s, f.name)
        if f.metadata["choices"]:
            return next(choice for choice in f.metadata["choices"] if choice != value)
        return not value if isinstance(value, bool) else 3 if value is None else value + 7 if value else 9

    s = replace(script.Settings(), width=64, base_width=8)
    names = {Run(script.EXPERIMENT, s).folder}
    for f in fields(s):
        if f.name not in ("data_dir", "out", "bases", "widths"):
            folder = Run(script.EXPERIMENT, replace(s, **{f.name: other(f)})).folder
            assert (folder in names) == f.metadata["place"], f.name
            names.add(folder)


@SCRIPTS
def test_the_printed_command_leads_to_the_same_run(script):
    s = replace(script.Settings(), width=18, base_width=8, epochs=7, seed=3, limit=99)
    s = replace(s, bias=False, last=0.5) if script is mlp else replace(s, schedule="constant", how="proportional")
    _, name, *words = s.command(script.EXPERIMENT.command).split()
    again, _ = lab.command.parse(script.EXPERIMENT, words)
    assert name == f"{script.__name__}.py" and again.identity() == s.identity()


def test_dense_is_the_base_of_its_own_width():
    s = resnet.Settings(width=18, base_width=8, dense=True)
    assert s == resnet.Settings(width=18, base_width=18) and replace(s, width=20).base_width == 18


def test_digits_are_not_mirrored_unless_asked():
    assert [name for name in resnet.CLASSES if resnet.Settings(data=name).flips] == ["cifar10", "cifar100"]
    assert resnet.Settings(data="svhn", flip="yes").flips and not resnet.Settings(flip="no").flips


def test_schedule_moves_with_the_number_of_epochs():
    def rates(at, **settings):
        rate = resnet.schedule(resnet.Settings(**settings))
        return [rate(epoch) for epoch in at]

    full = rates((0, 49, 50, 119, 120, 199, 200, 299))
    np.testing.assert_allclose(full, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4])
    np.testing.assert_allclose(rates((4, 5, 11, 12, 19, 20), epochs=30), [0.1, 0.01, 0.01, 0.001, 0.001, 1e-4])
    np.testing.assert_allclose(rates((0, 15), epochs=30, schedule="cosine"), [0.1, 0.05])
    assert rates((299,), schedule="constant") == [0.1]
    for epochs in (1, 2, 3, 4):  # every rate has an epoch, the first one included
        np.testing.assert_allclose(rates(range(epochs), epochs=epochs), [0.1, 0.01, 0.001, 0.0001][:epochs])


@pytest.mark.parametrize("script, words, says", [
    (mlp, "--width 4", "width 4 cannot keep the weights of the wider base 5"),
    (mlp, "--last 1.5", "--last is a fraction of at most 1, not 1.5"),
    (mlp, "--last 0.5 --how proportional", "--how proportional has nothing to decide"),
    (mlp, "--width 640 --last 0.7", "--last 0.7 at width 640 leaves -510 of 3,970 weights to a first layer"),
    (mlp, "--width 640 --last 0", "keeps none of the last layer's 6,400 weights"),
    (resnet, "--bases 8,x", "--bases is a list of widths such as 8,12,18, not '8,x'"),
    (resnet, "--widths=", "--widths is a list"),
    (resnet, "--width 4 --base-width 8", "width 4 cannot keep the weights of the wider base 8"),
    (resnet, "--device cpu --precision bf16", "--precision is for GPUs"),
    (resnet, "--precision int8", "--precision is one of auto, fp32, tf32, bf16, not int8"),
    (resnet, "--widths 8,12", "--widths is about figures: it goes with --sweep, --list or --plot"),
    (mlp, "--width 20 --seeds 3", "--seeds is about figures: it goes with --sweep, --list or --plot"),
    (resnet, "--sweep fig6 --width 8", "figures take --bases and --widths; --width is for a single network"),
    (resnet, "--quick --base-width=12", "--base-width is for a single network"),
    (resnet, "--list fig6 --bases 8 --widths 4", "none of the --widths 4 is as wide as a base of --bases 8"),
    (resnet, "--sweep fig10", "fig10 needs no training; --plot fig10 draws it"),
    (resnet, "--plot fig6 --data svhn", "none of the 84 runs of fig6 is done"),
    (resnet, "--batch 1", "--batch must be a number of at least 2"),
    (bottleneck, "--kind linear --base-width 8 --width 64", "with one channel in each they have 211,611"),
    (bottleneck, "--kind linear --io-only", "masks, which linear bottlenecks have none of"),
    (imagenet, "--classes 5", "--classes and --images are about --data synthetic"),
    (imagenet, "--size 16", "--size must be a number of at least 32, not 16"),
    (imagenet, "--width 32", "width 32 cannot keep the weights of the wider base 64"),
    (imagenet, "--width 64", "imagenet/train is not there"),
    (imagenet, "--data imagenet-256", "imagenet-256 is no finished copy"),
    (imagenet, "--prepare", "imagenet"),
])
def test_mistakes_end_in_a_sentence(script, words, says, tmp_path, capsys):
    words = [*words.split(), "--out", str(tmp_path / "runs"), "--data-dir", str(tmp_path)]
    assert lab.main(script.EXPERIMENT, words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"{script.__name__}.py: ") and says in told and len(told.splitlines()) == 1


@SCRIPTS
def test_scripts_start(script):
    path = ROOT / f"{script.__name__}.py"
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--base-width" in done.stdout
    assert all(figure in done.stdout for figure in script.EXPERIMENT.figures)


# ---------------------------------------------------------------------------------------------- networks


def double(net):
    """The network in float64, its parameters drawn: weights of the usual scale, BatchNorm's far from 1 and 0."""
    rng = np.random.default_rng(0)
    for _, module in net.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, nn.Parameter):
                bound = value.data[0].size ** -0.5 if value.ndim > 1 else 0.3
                value.data = rng.uniform(-bound, bound, value.shape) + (name == "weight" and value.ndim == 1)
            elif isinstance(value, np.ndarray):
                setattr(module, name, value.astype(np.float64))
    return net


@pytest.mark.parametrize("network, shape", [(resnet.ResNet18, (3, 3, 32, 32)), (imagenet.ResNet18, (3, 3, 75, 64))])
def test_networks_are_pytorchs(network, shape):
    """Loss, every gradient, running estimates and evaluation mode in float64."""
    torch = pytest.importorskip("torch")
    from pytorch_models import resnet18  # where PyTorch is installed

    net, rng = double(network(6, 7)), np.random.default_rng(1)
    layers = resnet18(6, 7, side=shape[-1], inplace=False)  # for squares; here of any shape
    twin = torch.nn.Sequential(*(torch.nn.AdaptiveAvgPool2d(1) if isinstance(m, torch.nn.AvgPool2d) else m
                                 for m in layers)).double()
    with torch.no_grad():
        for theirs, ours in zip(twin.parameters(), net.parameters(), strict=True):
            theirs.copy_(torch.tensor(ours.data))
    x, labels = rng.standard_normal(shape), rng.integers(0, 7, len(shape) - 1)
    loss = torch.nn.functional.cross_entropy(twin(torch.tensor(x)), torch.tensor(labels))
    loss.backward()
    ours = nn.cross_entropy(net(nn.Tensor(x)), labels)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-12)
    for p, theirs in zip(net.parameters(), twin.parameters()):
        np.testing.assert_allclose(p.grad, theirs.grad.numpy(), rtol=0, atol=1e-9 * np.abs(theirs.grad.numpy()).max())
    running = [value.numpy() for name, value in twin.named_buffers() if "running" in name]
    estimates = [value for name, value in net.state_dict().items() if "running" in name]
    for mine, theirs in zip(estimates, running, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)
    with nn.no_grad():
        logits = twin.eval()(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(net.eval()(nn.Tensor(x)).data, logits, rtol=1e-9)


def test_the_mlp_is_pytorchs():
    torch = pytest.importorskip("torch")
    from pytorch_models import mlp as in_pytorch

    net, twin = mlp.build(mlp.Settings(width=12)), in_pytorch(12)
    with torch.no_grad():
        for theirs, ours in zip(twin.parameters(), net.parameters(), strict=True):
            theirs.copy_(torch.tensor(ours.data))
    x = np.random.default_rng(0).standard_normal((5, 1, 28, 28)).astype(np.float32)
    theirs = twin(torch.tensor(x).flatten(1)).detach().numpy()
    np.testing.assert_allclose(net(nn.Tensor(x)).data, theirs, rtol=1e-5, atol=1e-6)
    linear = mlp.build(mlp.Settings(width=12, activation="linear"))
    w, b, v, c = (p.data for p in linear.parameters())
    np.testing.assert_allclose(linear(nn.Tensor(x)).data, (x.reshape(5, -1) @ w.T + b) @ v.T + c, rtol=1e-5, atol=1e-6)


def test_parameters_come_in_forward_order():
    names = [name for name, _ in resnet.ResNet18(2).named_parameters()]
    assert names[:5] == ["conv.weight", "bn.weight", "bn.bias", "blocks.0.conv1.weight", "blocks.0.bn1.weight"]
    block = [name.removeprefix("blocks.2.") for name in names if name.startswith("blocks.2.")]
    assert block == ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias",
                     "shortcut.0.weight", "shortcut.1.weight", "shortcut.1.bias"]
    assert names[-2:] == ["classifier.weight", "classifier.bias"] and len(names) == 62
    assert names == [name for name, _ in imagenet.ResNet18(2).named_parameters()]


@pytest.mark.parametrize("width, weights", [(8, 175_192), (12, 393_540), (18, 884_502), (40, 4_362_680),
                                            (64, 11_164_352)])
def test_weights_of_every_base(width, weights):
    with nn.skip_init():
        assert nn.weight_count(resnet.ResNet18(width)) == weights
        assert nn.weight_count(resnet.ResNet18(width, 100)) == weights + 8 * width * 90
        if width == 64:  # 11,689,512 parameters in the literature, with 1,000 biases and 9,600 of BatchNorm
            photographs = imagenet.ResNet18(64)
            assert nn.weight_count(photographs) == 11_678_912
            assert sum(p.size for p in photographs.parameters()) == 11_689_512


@pytest.mark.parametrize("settings, network, classes", [
    (resnet.Settings(width=5, base_width=3), resnet.ResNet18, 10),
    (resnet.Settings(width=4, base_width=4), resnet.ResNet18, 10),
    (resnet.Settings(width=5, base_width=3, how="proportional", data="cifar100"), resnet.ResNet18, 100),
    (imagenet.Settings(width=5, base_width=3), imagenet.ResNet18, 7),
])
def test_networks_keep_the_weights_of_their_base(settings, network, classes):
    model = resnet.build(settings, classes, network)
    assert nn.weight_count(model) == nn.weight_count(network(settings.base_width, classes))
    again, other = (resnet.build(replace(settings, seed=seed), classes, network).state_dict() for seed in (0, 1))
    state = model.state_dict()
    assert all((state[name] == again[name]).all() for name in state)
    assert (state["blocks.0.conv1.weight"] != other["blocks.0.conv1.weight"]).any()


def test_io_only_keeps_whole_kernels():
    s = resnet.Settings(width=4, base_width=3, io_only=True)
    model = resnet.build(s, 10)
    for _, layer in nn.layers(model):
        if layer.weight.mask is not None and layer.weight.ndim == 4:
            by_kernel = layer.weight.mask.reshape(*layer.weight.shape[:2], -1)
            assert (by_kernel.all(-1) == by_kernel.any(-1)).all()
    assert 0 <= nn.weight_count(resnet.ResNet18(3)) - nn.weight_count(model) < 9


def test_mlps_keep_what_is_asked():
    for s in (mlp.Settings(), mlp.Settings(width=5), mlp.Settings(how="proportional"), mlp.Settings(last=0.25)):
        model = mlp.build(s)
        assert nn.weight_count(model) == 3970
        if s.last:
            assert [layer.weight.count for _, layer in nn.layers(model)] == [3970 - 200, 200]
    assert nn.weight_count(mlp.build(mlp.Settings(dense=True))) == 794 * 80
    assert len(mlp.build(mlp.Settings(bias=False)).parameters()) == 2


# ---------------------------------------------------------------------------------------------- bottlenecks


def slow_count(kind, width, f, classes=10):
    """Weights of a bottleneck network, layer by layer as the paper describes it."""
    def middle(d):
        return max(1, int(np.floor(f * d + 0.5)))

    def conv(i, o):
        return 9 * i * middle(min(i, o)) + middle(min(i, o)) * o if kind == "linear" else 9 * i * o

    total, d_in = conv(3, width) if kind == "linear" else 27 * width, width
    for d in (width, 2 * width, 4 * width, 8 * width):
        for _ in range(2):
            inside = d if kind == "linear" else middle(d)
            total += conv(d_in, inside) + conv(inside, d) + (d_in * d if d_in != d else 0)
            d_in = d
    return total + d_in * classes


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@pytest.mark.parametrize("base, width", [(b, w) for b in (8, 12, 40) for w in (8, 12, 18, 40, 64) if w >= b])
def test_bottlenecks_are_as_near_the_budget_as_one_fraction_allows(kind, base, width):
    """No fraction of a fine grid, finer than any change of the count, comes nearer."""
    s = bottleneck.Settings(kind=kind, base_width=base, width=width)
    want = slow_count(kind, base, 1.0)
    assert bottleneck.bounds(s) == (want, slow_count(kind, width, 0.0))
    if slow_count(kind, width, 0.0) > want:
        with pytest.raises(lab.UsageError, match=f"cannot keep the {want:,} weights"):
            bottleneck.fraction(s)
        return
    f = bottleneck.fraction(s)
    ours = slow_count(kind, width, f)
    assert bottleneck.count(kind, width, f, 10) == ours
    grid = np.linspace(0, 1, 2 * 8 * width + 1) - 1e-6
    assert abs(ours - want) <= min(abs(slow_count(kind, width, g) - want) for g in grid)
    assert width > base or f == 1


@pytest.mark.parametrize("kind, width", [("linear", 4), ("linear", 7), ("nonlinear", 7), ("sparse", 7)])
def test_bottlenecks_are_built_as_counted(kind, width):
    s = bottleneck.Settings(kind=kind, base_width=4, width=width)
    first, again, other = (bottleneck.build(replace(s, seed=seed), 10) for seed in (0, 0, 1))
    assert nn.weight_count(first) == (nn.weight_count(resnet.ResNet18(4)) if kind == "sparse"
                                      else slow_count(kind, width, bottleneck.fraction(s)))
    states = [model.state_dict() for model in (first, again, other)]
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
    name = "blocks.0.conv1.0.weight" if kind == "linear" else "blocks.0.conv1.weight"
    assert (states[0][name] != states[2][name]).any()


def test_linear_bottlenecks_have_a_stride_only_once_and_no_bias():
    model = resnet.ResNet18(4, 10, conv=bottleneck.factorised(0.5))
    shapes = {name: p.shape for name, p in model.named_parameters() if name.startswith("blocks.2.conv1")}
    assert shapes == {"blocks.2.conv1.0.weight": (2, 4, 3, 3), "blocks.2.conv1.1.weight": (8, 2, 1, 1)}
    assert [m.stride for m in model.blocks[2].conv1.modules] == [2, 1]
    assert model(nn.Tensor(np.ones((2, 3, 32, 32), np.float32))).shape == (2, 10)


def test_full_rank_can_compute_what_the_plain_network_does():
    """A factorised block with the factors of a plain one's convolutions, by SVD."""
    plain = double(resnet.BasicBlock(6, 6, 1, 6, resnet.conv3x3))
    factored = double(resnet.BasicBlock(6, 6, 1, 6, bottleneck.factorised(1.0)))
    factored.bn1, factored.bn2 = plain.bn1, plain.bn2
    for name in ("conv1", "conv2"):
        w = getattr(plain, name).weight.data  # (o, i, 3, 3)
        u, s, vt = np.linalg.svd(w.reshape(6, -1), full_matrices=False)  # (o, 9 i) = (o, b) (b, b) (b, 9 i)
        first, second = getattr(factored, name).modules
        first.weight.data = vt.reshape(first.weight.shape)
        second.weight.data = (u * s).reshape(second.weight.shape)
    x = nn.Tensor(np.random.default_rng(0).standard_normal((4, 6, 8, 8)))
    np.testing.assert_allclose(factored(x).data, plain(x).data, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- families of runs


def test_runs_of_the_mlps_figures():
    s = mlp.Settings()
    cells = {(r.activation, r.width, r.last) for r in mlp.fig5_runs(s)}
    assert len(cells) == len(mlp.fig5_runs(s)) == 134
    assert ("relu", 5, 1.0) in cells and ("relu", 5, 0.9) not in cells
    assert ("linear", 640, 0.6) in cells and ("linear", 640, 0.7) not in cells
    assert len(mlp.fig5_runs(replace(s, seeds=3))) == 3 * 134
    assert all(sum(run.kept) == 3970 for run in mlp.fig5_runs(s))
    runs = mlp.fig8_runs(s)
    assert len(runs) == 13 * 10 and {r.seed for r in runs} == set(range(10))
    for run in runs + mlp.fig8_lr_runs(s):
        run.check()
        assert run.limit == 2048 and run.batch == 256 and run.epochs == 300 and run.ntk and not run.bias
        assert run.budget == (794 * run.width if run.dense else 6352)
    assert all(run.held_out for run in mlp.fig8_lr_runs(s)) and set(mlp.fig8b_runs(s)) < set(runs)
    assert len(mlp.width_runs(s)) == 65 and set(mlp.FIG8_WIDTHS) <= set(mlp.KERNEL_WIDTHS)


def test_runs_of_the_best_width():
    """Nine widths or more at each of 15 numbers of weights, from dense to one weight a unit, the last layer dense."""
    for runs, seeds in ((mlp.optimum_runs(mlp.Settings()), 10), (mlp.optimum_lr_runs(mlp.Settings()), 2)):
        families = {}
        for run in runs:
            run.check()
            families.setdefault((run.side, run.base_width), set()).add(run.width)
            assert run.budget == (run.side**2 + 10) * run.base_width and run.limit == 2048 and run.ntk
            assert run.dense == (run.width == run.base_width) and run.last == (None if run.dense else 1.0)
        assert {key for key in families} == {(side, base) for side in (28, 14, 7) for base in (2, 4, 8, 16, 32)}
        for (side, base), widths in families.items():
            assert 9 <= len(widths) <= 12 and min(widths) == base
            assert (side**2 + 10) * base // 11 == max(widths)
        assert len({run.run_name() for run in runs}) == len(runs)
        assert len(runs) == seeds * sum(map(len, families.values())) * (1 if seeds == 10 else len(mlp.OPTIMUM_RATES))
    assert all(run.held_out for run in runs)


def test_runs_of_the_resnets_figures():
    s = resnet.Settings(bases="8,12", widths="12,8,18", seeds=2)
    fig6, fig7, fig9 = resnet.fig6_runs(s), resnet.fig7_runs(s), resnet.fig9_runs(s)
    assert [(r.base_width, r.width) for r in fig6 if r.seed == 0] == [(8, 8), (8, 12), (8, 18), (12, 12), (12, 18)]
    assert {r.seed for r in fig6} == {0, 1} and len(set(fig6)) == 10
    dense = {r.width for r in fig7 if r.width == r.base_width}
    assert set(fig6) < set(fig7) and dense == {8, 12, 18} and len(fig7) == len(set(fig7)) == 12
    assert set(fig6) < set(fig9) and sum(r.io_only for r in fig9) == 6
    assert not any(r.io_only for r in fig9 if r.width == r.base_width)
    names = [Run(resnet.EXPERIMENT, r).folder for r in {*fig7, *fig9}]
    assert len(set(names)) == len(names)
    assert len(resnet.fig6_runs(resnet.Settings())) == 3 * (8 + 7 + 6 + 4 + 3)


def test_runs_of_the_bottlenecks():
    s = bottleneck.Settings(bases="8,12", widths="8,12,64", seeds=1)
    runs = bottleneck.fig3_runs(s)
    assert [(r.kind, r.base_width, r.width) for r in runs] == [
        ("sparse", 8, 8), ("sparse", 8, 12), ("sparse", 8, 64), ("linear", 8, 8), ("linear", 8, 12),
        ("nonlinear", 8, 12), ("sparse", 12, 12), ("sparse", 12, 64), ("linear", 12, 12), ("linear", 12, 64),
        ("nonlinear", 12, 64)]
    for run in runs:  # width 64 is too wide for bottlenecks of base 8
        run.check()
    notes = list(bottleneck.notes(s))
    assert len(notes) == 2 and notes[0] == (
        "linear bottlenecks of width 64 are too wide for base 8: with one channel in each they have 211,611 weights, "
        "the base 182,057")
    theirs = resnet.Settings(base_width=8, width=18, epochs=15)
    ours = bottleneck.Settings(kind="sparse", base_width=8, width=18, epochs=15)
    assert Run(bottleneck.EXPERIMENT, ours).folder == Run(resnet.EXPERIMENT, theirs).folder
    assert len({Run(bottleneck.EXPERIMENT, replace(ours, kind=kind)).folder
                for kind in ("sparse", "linear", "nonlinear")}) == 3


def test_runs_of_table_1_and_what_the_paper_states():
    runs = imagenet.table1_runs(imagenet.Settings())
    assert sorted(r.width for r in runs if r.width == r.base_width) == [64, 90, 128, 181, 256]
    assert sorted(r.width for r in runs if r.width > r.base_width) == [90, 128, 181, 256]
    assert [imagenet.paper(r) for r in runs if r.width == 128] == ["70.02 %", "70.22 %"]
    assert imagenet.paper(runs[0]) == "68.03 %"
    for other in (dict(limit=5), dict(epochs=9), dict(lr=0.2), dict(schedule="steps"), dict(data="synthetic")):
        assert imagenet.paper(replace(runs[0], **other)) is None
    s = resnet.Settings(data="cifar100", base_width=18, width=64)
    assert resnet.paper(s) == "74.27 % *" and resnet.notes(s)[0].startswith("*: an independent run")
    for other in (dict(io_only=True), dict(epochs=30), dict(limit=100), dict(lr=0.01), dict(data="cifar10")):
        assert resnet.paper(replace(s, **other)) is None


# ---------------------------------------------------------------------------------------------- figures

ACCURACY = {(8, 8): 0.80, (8, 12): 0.83, (8, 18): 0.84, (12, 12): 0.85, (12, 18): 0.86, (18, 18): 0.88}
ON_IMAGENET = {(64, 64): 0.68, (64, 128): 0.70, (128, 128): 0.72}


def of_cifar(run):
    """A result whose accuracies can be told apart."""
    accuracy = ACCURACY[run.base_width, run.width] - 0.01 * run.io_only + 0.002 * run.seed
    weights = {8: 175_192, 12: 393_540, 18: 884_502}
    return made_up(accuracy, weights[run.base_width], connectivity=weights[run.base_width] / weights[run.width],
                   best_train_acc=accuracy + 0.1)


def plotted(script, name, s, result_of, capsys):
    """What --plot prints of a figure whose runs all have results, and its picture."""
    if script.EXPERIMENT.figures[name].trained:
        for run in script.EXPERIMENT.figures[name].runs(s):
            finish(script.EXPERIMENT, run, result_of(run))
    words = s.flags(places=("bases", "widths", "seeds", "out"))
    assert lab.main(script.EXPERIMENT, ["--plot", name, *words, "--device", "cpu"]) == 0
    picture, = Path(s.out).rglob("*.png")
    assert picture.stat().st_size > 10_000
    return capsys.readouterr().out, picture


@pytest.mark.parametrize("name, expected", [
    ("fig6", ["base 8: 175,192 weights: 80.10 % at 8, 83.10 % at 12, 84.10 % at 18",
              "points above width 8, with 95 % intervals: +3.00 ± 0.61 at 12, +4.00 ± 0.61 at 18"]),
    ("fig14", ["base 8: 175,192 weights: 90.10 % at 8, 93.10 % at 12, 94.10 % at 18",
               "ours: best training accuracy", "90.10 %, s.d. 0.14 (2)"]),
    ("fig12", ["base 12: 393,540 weights: 85.10 % at 12, 86.10 % at 18"]),
    ("fig1", ["sparse: 175,192 weights at every width: 80.10 % at 8, 83.10 % at 12, 84.10 % at 18",
              "dense: all weights of its width: 80.10 % at 8, 85.10 % at 12, 88.10 % at 18"]),
    ("fig7", ["base 8: 60 ± 11 % at 12, 50 ± 7 % at 18; training accuracy is largest at width 18",
              "base 12: 33 ± 18 % at 18"]),
    ("fig9", ["base 8, masks of whole kernels, 175,192 weights: 80.10 % at 8, 82.10 % at 12, 83.10 % at 18",
              "base 12, width 18: whole kernels -1.00 ± 0.61 points from single weights"]),
    ("fig10", ["width 8: 175,192 of 175,192 weights", "175,192 of 884,502 weights", "0 of 21 layers are cut"]),
])
def test_figures_of_resnets(name, expected, tmp_path, capsys):
    s = resnet.Settings(bases="8,12", widths="8,12,18", seeds=2, epochs=30, limit=5000, out=str(tmp_path))
    told, picture = plotted(resnet, name, s, of_cifar, capsys)
    assert all(sentence in told for sentence in expected) and picture.name == f"resnet_cifar_{name}.png"


@pytest.mark.parametrize("script, name, table", [(mlp, "width", "WIDTH_LR"), (resnet, "fig6", "FIG6_LR")])
def test_learning_rates_chosen_for_each_width(script, name, table, tmp_path, monkeypatch, capsys):
    """Wider networks want the higher rate here; the second figure shows both where they differ."""
    rates, s = (0.1, 0.2), script.Settings(seeds=1, out=str(tmp_path))
    monkeypatch.setattr(script, name.upper() + "_RATES", rates)
    monkeypatch.setattr(script, table, {})

    def result_of(run):
        assert run.held_out or name + "_lr" not in seen
        return made_up(0.9 - 0.1 * ((run.lr == 0.2) != (run.width >= 18)), run.seed + 9)

    with pytest.raises(lab.UsageError, match=f"rates of {name}_tuned are not chosen yet; --sweep {name}_lr"):
        script.EXPERIMENT.figures[name + "_tuned"].runs(s)
    seen = [name + "_lr"]
    told, _ = plotted(script, name + "_lr", s, result_of, capsys)
    widths = sorted({run.width for run in script.EXPERIMENT.figures[name + "_lr"].runs(s)})
    assert f"{table} = { {w: 0.2 if w >= 18 else 0.1 for w in widths} }" in told
    monkeypatch.setattr(script, table, {8: 0.1, 18: 0.2})
    runs = script.EXPERIMENT.figures[name + "_tuned"].runs(s)
    assert [(run.width, run.lr, run.held_out) for run in runs] == [(8, 0.1, 0), (18, 0.1, 0), (18, 0.2, 0)]
    seen.clear()
    told, _ = plotted(script, name + "_tuned", replace(s, out=str(tmp_path / "tuned")), result_of, capsys)
    assert "learning rate 0.1 at every width: 90.00 % at 8, 80.00 % at 18" in told
    assert "learning rate chosen for each width: 90.00 % at 8, 90.00 % at 18" in told


def test_figure_10_has_the_counts_of_the_networks_it_is_about(tmp_path):
    """With whole kernels too, and again where another base is asked for after the first was kept."""
    for base in (3, 4):
        s = resnet.Settings(bases=f"{base}", widths="4,5", io_only=True, out=str(tmp_path))
        runs = resnet.fig10_runs(s)
        found = figures.computed_for(resnet.EXPERIMENT, "fig10", s, runs, {})
        assert [network["width"] for network in found] == sorted({base, 4, 5})
        for network, run in zip(found, runs):
            layers = dict(nn.layers(resnet.build(run, 10)))
            assert list(network["layers"]) == list(layers)
            assert network["kept"] == [layer.weight.count for layer in layers.values()]
            assert network["sizes"] == [layer.weight.size for layer in layers.values()]


def test_figure_7_says_where_there_is_nothing_to_divide_by():
    runs = resnet.fig7_runs(resnet.Settings(bases="8", widths="8,12", seeds=1))
    with pytest.raises(lab.UsageError, match="at width 12 the dense network gains 0.00 points"):
        draw_resnet.fig7(points(runs, lambda run: made_up(0.5)), "best")
    with pytest.raises(lab.UsageError, match="needs, for some width above a base"):
        draw_resnet.fig7(points(runs[:1], of_cifar), "best")


def test_whole_kernels_of_one_seed_have_no_interval():
    runs = resnet.fig9_runs(resnet.Settings(bases="8", widths="8,12", seeds=1))
    _, summary = draw_resnet.fig9(points(runs, of_cifar), "best")
    assert summary[-1] == "base 8, width 12: whole kernels -1.00 points from single weights"


def test_a_figure_of_whole_kernels_alone():
    runs = [r for r in resnet.fig9_runs(resnet.Settings(bases="8", widths="8,12", seeds=1)) if r.io_only]
    _, summary = draw_resnet.fig9(points(runs, of_cifar), "best")
    assert summary == ["base 8, masks of whole kernels, 175,192 weights: 82.00 % at 12"]


def test_figure_of_bottlenecks(tmp_path, capsys):
    s = bottleneck.Settings(bases="8,12", widths="8,12,18", seeds=3, epochs=30, out=str(tmp_path))
    order = {run: i // 3 for i, run in enumerate(bottleneck.fig3_runs(s))}

    def result_of(run):
        weights = (slow_count("nonlinear", run.base_width, 1.0) if run.kind == "sparse" else
                   slow_count(run.kind, run.width, bottleneck.fraction(run)))
        dense = run.kind != "sparse" or run.width == run.base_width
        return made_up(0.5 + 0.01 * order[run] + 0.001 * run.seed, weights, connectivity=1.0 if dense else 0.5)

    told, picture = plotted(bottleneck, "fig3", s, result_of, capsys)
    assert "base 8, linear: 182,057 to 183,195 weights: 53.10 % at 8, 54.10 % at 12, 55.10 % at 18" in told
    assert "base 8, nonlinear: 175,192 to 177,372 weights: 50.10 % at 8, 56.10 % at 12, 57.10 % at 18" in told
    assert told.count("base 8, sparse: 175,192 weights: 50.10 % at 8, 51.10 % at 12, 52.10 % at 18") == 1
    assert ("points above the plain network of width 8, of linear bottlenecks, with 95 % intervals: +3.00 ± 0.23 at 8, "
            "+4.00 ± 0.23 at 12, +5.00 ± 0.23 at 18\n") in told
    assert told.count("not distinguishable from the best: width 18\n") == 2  # of linear and of nonlinear ones
    assert "39 of 39 runs are done" in told and picture.name == "resnet_cifar_fig3.png"


@pytest.mark.parametrize("name, expected", [
    ("table1", ["sparse: 9 weights at every width: 68.00 % at 64, 70.00 % at 128",
                "dense: all weights of its width: 68.00 % at 64, 72.00 % at 128",
                "the paper, dense: 68.03 % at 64, 69.11 % at 90, 70.22 % at 128"]),
    ("fig1", ["dense: all weights of its width: 68.00 % at 64, 72.00 % at 128"]),
    ("fig7", ["base 64: 50 % at 128",
              "the paper's Table 1, base 64: 142 % at 90, 91 % at 128, 91 % at 181, 65 % at 256"]),
])
@pytest.mark.parametrize("data", ["imagenet", "synthetic"])
def test_figures_of_imagenet(name, expected, data, tmp_path, capsys):
    s = imagenet.Settings(data=data, widths="64,128", out=str(tmp_path))
    told, picture = plotted(imagenet, name, s, lambda run: made_up(ON_IMAGENET[run.base_width, run.width], 9), capsys)
    assert all(sentence in told for sentence in expected)
    assert ("70.02 %  70.00 % (1)" in told) == (data == "imagenet")
    assert picture.name == {"imagenet": "", "synthetic": "synthetic_"}[data].join(("resnet_imagenet_", f"{name}.png"))


def test_figure_7_shows_the_paper_s_shares_whatever_ours_are():
    runs = imagenet.EXPERIMENT.figures["fig7"].runs(imagenet.Settings(widths="64,128"))
    made = points(runs, lambda run: made_up(ON_IMAGENET[run.base_width, run.width], 9))
    picture, _ = imagenet.EXPERIMENT.figures["fig7"].draw(made, "best")
    low, high = picture.axes[0].get_ylim()
    assert low < 0.5 and high > 1.42 and "bars" not in picture.axes[0].get_title()  # of one seed


def test_tuned_learning_rates_are_those_of_the_record():
    s = mlp.Settings()
    runs = mlp.fig8_lr_runs(s)
    _, rows = figures.read_record(figures.record_path(mlp.EXPERIMENT, "fig8_lr", "mnist"))
    assert figures.tuned(points(runs, lambda run: rows["mnist", run.run_name()])) == mlp.FIG8_LR


def test_tuned_learning_rates_of_each_width_are_those_of_the_record():
    runs = mlp.width_lr_runs(mlp.Settings(epochs=100, seeds=1))
    _, rows = figures.read_record(figures.record_path(mlp.EXPERIMENT, "width_lr", "mnist"))
    assert figures.tuned(points(runs, lambda run: rows["mnist", run.run_name()]), names=("width",)) == mlp.WIDTH_LR


def test_tuned_learning_rates_of_the_best_width_are_those_of_the_record():
    _, rows = figures.read_record(figures.record_path(mlp.EXPERIMENT, "optimum_lr", "mnist"))
    runs = [run for run in mlp.optimum_lr_runs(mlp.Settings()) if ("mnist", run.run_name()) in rows]
    done = points(runs, lambda run: rows["mnist", run.run_name()])
    chosen = figures.tuned(done, names=("side", "base_width", "width"))
    assert chosen == {(*key, width): lr for key, line in mlp.OPTIMUM_LR.items() for width, lr in line.items()}
    assert all(2 * lr == chosen[network] for network, lr in mlp.OPTIMUM_LOWERED.items())


def test_a_learning_rate_with_a_diverged_seed_is_not_chosen():
    runs = mlp.fig8_lr_runs(mlp.Settings(seeds=2))[:4]  # two rates
    results = [made_up(0.9), made_up(0.9, diverged=True), made_up(0.5), made_up(0.5)]
    _, summary = draw_mlp.fig8_lr(figures.points(runs, results), "best")
    assert summary == ["FIG8_LR = {(True, 8): 16.0}"]


def test_the_best_width_of_made_up_errors():
    """What is far from the known minimum is told apart, whatever the seeds; what is as good is not."""
    rng, widths = np.random.default_rng(5), [10, 20, 40, 80, 160]
    level = np.array([6.0, 4.0, 3.0, 3.05, 5.0])
    errors = [m + rng.normal(0, 0.3, 10) for m in level]
    best, (low, high), alike = intervals.best_of(widths, errors, rng)
    assert best in (40, 80) and (low, high) == (40, 80) and alike == [40, 80]
    assert intervals.indistinguishable([5], [[1, 2, 3]]) == [5]
    one, other = np.arange(10) / 10, np.arange(10) / 10 + 0.27  # p = 0.031; of three other widths 0.05 / 3 is asked for
    assert intervals.indistinguishable([1, 2], [one, other]) == [1]
    assert intervals.indistinguishable([1, 2, 3, 4], [one, other, one + 9, one + 9]) == [1, 2]
    precise = [m + rng.normal(0, 1e-3, 3) for m in level]
    assert intervals.best_of(widths, precise, rng) == (40, (40, 40), [40])
    assert intervals.best_of(widths, [np.full(3, m) for m in level], rng) == (40, (40, 40), [40])
    few = [m + rng.normal(0, 1e-3, 2) for m in level]
    assert intervals.best_of(widths, few, rng) == (40, (10, 160), widths)  # nothing is told apart
    for level in ([1, 0, 1, 1], [0, 0, 0, 0.1], [3, 0, 0, 0]):  # a valley, a plateau, another with its best at the left
        true, hits = int(np.argmin(level)), 0
        for _ in range(100):
            _, _, alike = intervals.best_of([0, 1, 2, 3], [m + rng.normal(0, 0.5, 10) for m in level], rng, 40)
            hits += true in alike
        assert hits >= 93


def test_intervals_of_differences_and_shares_hold_the_truth():
    """As often as 95 % says, of seeds drawn from known means with unequal deviations and counts."""
    rng, hits, trials = np.random.default_rng(7), np.zeros(2), 1000
    for _ in range(trials):
        start, part, whole = rng.normal(80, 0.5, 4), rng.normal(83, 0.2, 3), rng.normal(85, 0.4, 5)
        (gain, near), (of_it, about) = intervals.contrast((1, part), (-1, start)), intervals.share(part, whole, start)
        hits += abs(gain - 3) < near, abs(of_it - 0.6) < about
    assert (abs(hits / trials - 0.95) < 0.02).all()
    assert intervals.contrast((2, [1.0, 1.0]), (-1, [0.5, 0.5])) == (1.5, 0.0)
    value, half = intervals.contrast((1, [1.0]), (-1, [0.5, 0.5]))
    assert value == 0.5 and np.isnan(half)


def test_what_a_sparser_last_layer_does():
    """At widths where a dense one takes at most half of the weights: 10 to 160, not 320."""
    change = {10: -0.02, 20: -0.03, 40: -0.04, 80: -0.03, 160: -0.03, 320: 0.5}
    runs = [run for run in mlp.fig5_runs(mlp.Settings(seeds=1)) if run.last in (0.5, 1.0) and run.width in change]
    results = [made_up(0.5 + (change[run.width] / 5 if run.last == 0.5 and run.activation == "relu" else 0))
               for run in runs]
    made = figures.points(runs, results)
    line, = draw_mlp.dense_last(made, "relu", "best_test_acc")
    assert line != draw_mlp.dense_last(made, "linear", "best_test_acc")[0]
    assert line.endswith("with 95 % intervals over widths: -0.60 ± 0.18 at 0.5 (5 widths)")


def test_ways_to_choose_a_width_are_judged_where_there_is_such_a_network():
    """Three cases with error (log2 of width over the best)^2; the last has no network wider than 16."""
    cases = [({"widths": [8, 16, 32, 64], "weights": 100, "side": 2, "base_width": 8}, 32),
             ({"widths": [16, 32, 64, 128], "weights": 400, "side": 2, "base_width": 16}, 64),
             ({"widths": [4, 8, 16], "weights": 100, "side": 4, "base_width": 4}, 8)]
    found = [(b, np.log2(np.array(b["widths"]) / best) ** 2, best, None, [best]) for b, best in cases]
    told = draw_optimum.judged("guess", [16, 32, 32], found)
    assert told == ("best width by guess (no such network in 1 cases): mean error of log2 width 1.00 (a factor of "
                    "2.00; of it -1.00 in one direction), rank correlation 1.00, among those not distinguishable 0 of "
                    "2 times, 1.00 points of error above the least")
    assert draw_optimum.judged("guess", [999] * 3, found) == "best width by guess: there is no such network"
    widths = [3 * b["weights"] ** 0.5 * (b["side"] ** 2) ** 0.25 for b, *_ in found]
    assert draw_optimum.powers_of_weights_and_pixels(found, widths) == pytest.approx([0.5, 0.25])


def test_a_constant_in_hindsight():
    values = [3.0, 5.0, 40.0]
    best = draw_optimum.in_hindsight(values)
    assert best == pytest.approx(5)
    for other in (3, 8, 20):
        assert abs(np.log2(values) - np.log2(best)).sum() <= abs(np.log2(values) - np.log2(other)).sum()


# ---------------------------------------------------------------------------------------------- small runs


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where generated data sets are drawn once."""
    return str(tmp_path_factory.mktemp("data"))


def test_figure_8b_from_training_to_picture(data_dir, tmp_path, monkeypatch, capsys):
    """The whole figure at a small size: theory and measurement agree, and the summary names the minima."""
    load = mlp.load
    monkeypatch.setattr(mlp, "KERNEL_WIDTHS", (8, 32, 128, 635))
    monkeypatch.setattr(mlp, "FIG8_NETWORKS", [(8, True), (32, False), (128, False), (635, False)])
    monkeypatch.setattr(mlp, "KERNEL_PAIRS", 12)
    monkeypatch.setattr(mlp, "load", lambda s: load(replace(s, limit=300)))
    words = ["--data", "synthetic", "--data-dir", data_dir, "--out", str(tmp_path), "--epochs", "1", "--seeds", "1"]
    assert lab.main(mlp.EXPERIMENT, [*words, "--sweep", "fig8b"]) == 0
    assert lab.main(mlp.EXPERIMENT, [*words, "--plot", "fig8b"]) == 0
    told = capsys.readouterr().out
    assert "exact (Theorem 1): least at width" in told and "rank correlation" in told
    computed = read_json(tmp_path / "mlp_mnist" / "synthetic" / "fig8b,seed=0.json")["computed"]
    assert computed["digest"] == load(mlp.Settings(data="synthetic", data_dir=data_dir)).digest[:16]
    assert computed["densities"][0] == 1 and computed["densities"][-1] == pytest.approx(2 / (784 * 635))
    exact, measured = (np.array(computed[name])[:, 0] for name in ("exact", "measured independent"))
    spread = np.array(computed["measured independent"])[:, 1] / computed["networks"] ** 0.5
    assert (abs(exact - measured)[:-1] < 4 * spread[:-1]).all()  # the last width: nearly always a kernel of zeros
    networks = np.array(computed["measured"])[:-1]
    assert (abs(exact[:-1] - networks[:, 0]) < 3 * networks[:, 1]).all()
    bias, variance = (np.array(computed[name])[:, 0] for name in ("bias", "variance"))
    np.testing.assert_allclose(bias + variance, exact, rtol=1e-9)
    assert computed["formula"][1] == kernels.kernel_distance_formula(32, computed["densities"][1], 784)
    assert 0.1 < computed["gp_test_acc"] <= 1


def test_the_best_width_from_training_to_picture(data_dir, tmp_path, monkeypatch, capsys):
    """Both commands at a small size, on images of two sizes: the learning rates, then the figure."""
    load = mlp.load
    for name, value in dict(OPTIMUM_SIDES=(14, 7), OPTIMUM_BASES=(4,), OPTIMUM_PAIRS=6, RESAMPLES=20,
                            OPTIMUM_RATES=(32.0, 64.0), load=lambda s: load(replace(s, limit=300))).items():
        monkeypatch.setattr(mlp, name, value)
    networks = [(side, base, n) for side in (14, 7) for base in (4,) for n in mlp.optimum_widths(side, base)[:3]]
    monkeypatch.setattr(mlp, "OPTIMUM_NETWORKS", networks)
    monkeypatch.setattr(mlp, "optimum_widths", lambda side, base: [n for *key, n in networks if key == [side, base]])
    words = ["--data", "synthetic", "--data-dir", data_dir, "--out", str(tmp_path), "--epochs", "1"]
    assert lab.main(mlp.EXPERIMENT, [*words, "--sweep", "optimum_lr", "--seeds", "1"]) == 0
    assert lab.main(mlp.EXPERIMENT, [*words, "--plot", "optimum_lr", "--seeds", "1"]) == 0
    table = {}
    exec(re.search(r"OPTIMUM_LR = {.*?\n}", capsys.readouterr().out, re.DOTALL)[0], table)
    assert {key: len(rates) for key, rates in table["OPTIMUM_LR"].items()} == {
        (side, base): 3 for side in (14, 7) for base in (4,)}
    monkeypatch.setattr(mlp, "OPTIMUM_LR", table["OPTIMUM_LR"])
    assert lab.main(mlp.EXPERIMENT, [*words, "--sweep", "optimum", "--seeds", "2"]) == 0
    assert lab.main(mlp.EXPERIMENT, [*words, "--plot", "optimum", "--seeds", "2"]) == 0
    told = capsys.readouterr().out
    assert told.count("rank correlation of distance and error over 3 widths") == 2
    assert re.search(r"best width by exact theory: mean error of log2 width \d\.\d\d \(a factor of \d\.\d\d", told)
    assert re.search(r"best width by a fixed connectivity \(in hindsight \d+ %\)", told)
    computed = read_json(tmp_path / "mlp_mnist" / "synthetic" / "optimum,seed=0.json")["computed"]
    for budget in computed["budgets"]:
        s = mlp.fig8_at(mlp.Settings(data="synthetic", data_dir=data_dir, side=budget["side"]), 4, True, 1.0, 4)
        _, x, y, _ = mlp.kernel_pairs(s, 6)
        weights = (budget["side"] ** 2 + 10) * budget["base_width"]
        every = {n: kernels.kernel_distance(x, y, n, (weights - 10 * n) / (n * budget["side"] ** 2), rtol=1e-4).mean()
                 for n in range(budget["widths"][0], budget["widths"][-1] + 1)}
        assert budget["exact"] == min(every, key=every.get) and budget["densities"][0] == 1
        assert budget["distances"] == pytest.approx([every[n] for n in budget["widths"]])
        assert budget["interval"][0] <= budget["exact"] <= budget["interval"][1]


def test_the_best_width_for_a_number_of_weights(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlp, "BEST_WIDTH_PAIRS", 8)
    words = ["--data", "synthetic", "--data-dir", data_dir, "--limit", "300", "--side", "7", "--best-width"]
    assert lab.main(mlp.EXPERIMENT, [*words, "1000"]) == 0
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    width, low, high = map(int, re.match(r"width (\d+) \(95 % interval (\d+) to (\d+), from", first).groups())
    table = np.array([row.replace(",", "").split() for row in rows], float)
    assert low <= width <= high and width in table[:, 0] and len(table) >= 5
    assert table[:, 3].min() == 1 == table[table[:, 0] == width, 3][0]
    np.testing.assert_allclose(table[:, 0] * table[:, 1] * 49, 1000, rtol=0.05)
    for wrong, says in (([*words, "0"], "--best-width takes a number of weights from 1 to 1,000,000,000, not 0"),
                        ([*words, "many"], "argument --best-width: invalid int value: 'many'"),
                        ([*words, "50", "--dry-run"], "--best-width is done alone, without --sweep, --list, --plot "
                                                      "and --dry-run"),
                        ([*words, "50", "--side", "5"], "--side is a whole fraction of 28, such as 14 or 7, not 5")):
        assert lab.main(mlp.EXPERIMENT, wrong) == 2
        assert f"exp_mlp_mnist.py: {says}" in capsys.readouterr().err


SMALL = {
    mlp: "--data synthetic --width 12 --epochs 2 --limit 600",
    resnet: "--data synthetic --width 4 --base-width 3 --epochs 2 --limit 96 --held-out 64 --batch 32 --flip yes",
    bottleneck: "--data synthetic --kind linear --width 4 --base-width 3 --epochs 1 --limit 64 --held-out 64 "
                "--batch 32",
    imagenet: "--data synthetic --size 32 --classes 3 --images 16 --batch 16 --width 4 --base-width 2 --epochs 2",
}


@SCRIPTS
def test_a_small_run(script, data_dir, tmp_path, capsys):
    """Trained, recorded, and found done by the same command; its network has its weights."""
    words = [*SMALL[script].split(), "--data-dir", data_dir, "--out", str(tmp_path), "--device", "cpu"]
    assert lab.main(script.EXPERIMENT, words) == 0
    result, first = read_json(next(tmp_path.rglob("result.json"))), capsys.readouterr().out
    expected = {mlp: 3970, resnet: nn.weight_count(resnet.ResNet18(3)),
                bottleneck: slow_count("linear", 4, bottleneck.fraction(
                    bottleneck.Settings(kind="linear", width=4, base_width=3))),
                imagenet: nn.weight_count(imagenet.ResNet18(2, 3))}
    assert result["weights"] == expected[script] and not result["diverged"] and 0 <= result["best_test_acc"] <= 1
    assert f"{result['weights']:,} weights" in first
    assert lab.main(script.EXPERIMENT, words) == 0 and capsys.readouterr().out == first
    run, = (tmp_path / script.EXPERIMENT.name / "synthetic").iterdir()
    with np.load(run / "checkpoint.npz") as file:
        masks = [name for name in file.files if name.startswith("model.") and name.endswith((".mask", ".kept"))]
        assert not any(file[name.removesuffix(".mask")][~file[name]].any() for name in masks if name.endswith(".mask"))
    assert bool(masks) == (script is not bottleneck)


@pytest.mark.parametrize("script, figure", [(mlp, "width"), (resnet, "fig6"), (imagenet, "table1")])
def test_quick_is_a_small_figure(script, figure, data_dir, tmp_path, capsys):
    """--quick trains its figure and draws it; here with fewer examples."""
    words = {mlp: "--data synthetic --epochs 1 --limit 300", resnet: "--data synthetic --epochs 1 --limit 64 "
             "--held-out 64 --bases 3 --widths 4", imagenet: "--epochs 1 --size 32 --classes 3 --images 16 --bases 2 "
             "--widths 3"}[script].split()
    words += ["--quick", "--jobs", "1", "--data-dir", data_dir, "--out", str(tmp_path), "--device", "cpu"]
    assert lab.main(script.EXPERIMENT, words) == 0
    told = capsys.readouterr().out
    assert re.search(r"(\d+) of \1 runs are done", told)
    assert len(list(tmp_path.rglob(f"*_{figure}.png"))) == 1
