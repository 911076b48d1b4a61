"""exp_resnet_imagenet.py: the network, its weights, runs on photographs by one process and by several, Table 1."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_conv import check, draw_parameters, estimates, fill, margin, set_dtype, torch  # noqa
from test_distributed import ENV, MPIRUN, with_mpi

import command
import exp_resnet_imagenet as imagenet
import nn
import train

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------- network


def test_the_network_is_pytorchs(torch):  # noqa: F811
    """Loss, every gradient, running estimates and evaluation mode in float64; see test_resnet18_is_pytorchs."""
    from pytorch_models import resnet18  # where PyTorch is installed

    width, N = 4, 3
    net = set_dtype(imagenet.ResNet18(width, 7), np.float64)
    layers = resnet18(width, 7, side=64, inplace=False)  # and here of 75 x 64
    layers = [torch.nn.AdaptiveAvgPool2d(1) if isinstance(m, torch.nn.AvgPool2d) else m for m in layers]
    twin = torch.nn.Sequential(*layers).double()
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        draw_parameters(net, rng)
        fill(torch, twin, net)
        x, labels = rng.standard_normal((N, 3, 75, 64)), rng.integers(0, 7, N)
        if margin(torch, twin, torch.tensor(x)) > 5e-5:
            break
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    loss = torch.nn.functional.cross_entropy(twin(torch.tensor(x)), torch.tensor(labels))
    loss.backward()
    ours = nn.cross_entropy(net(nn.Tensor(x)), labels)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-12)
    check([p.grad for p in net.parameters()], [p.grad.numpy() for p in twin.parameters()], np.float64, 1e-9)
    check(estimates(net), [a.copy() for a in estimates(twin)], np.float64, 1e-12)
    with nn.no_grad():
        check([net.eval()(nn.Tensor(x)).data], [twin.eval()(torch.tensor(x)).detach().numpy()], np.float64, 1e-11)


@pytest.mark.parametrize("width", [3, 64])
def test_weights_are_counted_as_the_network_has_them(width):
    model = imagenet.ResNet18(width, 1000)
    assert imagenet.budget(imagenet.Settings(width=width, base_width=width), 1000) == nn.weight_count(model)
    if width == 64:  # 11,689,512 parameters in the literature, with 1,000 biases and 9,600 of BatchNorm
        assert nn.weight_count(model) == 11_678_912
        assert sum(p.size for p in model.parameters()) == 11_689_512


# ---------------------------------------------------------------------------------------------- runs


def words(tmp_path, **settings):
    settings = dict(data="synthetic", size=32, classes=3, images=16, batch=16, width=4, base_width=2, epochs=2,
                    data_dir=tmp_path / "data", out=tmp_path / "runs") | settings
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def result(folder):
    path, = Path(folder).rglob("result.json")
    return json.loads(path.read_text())


def test_a_run_on_photographs(tmp_path, capsys):
    assert command.main(imagenet.EXPERIMENT, words(tmp_path)) == 0
    found = result(tmp_path / "runs")
    s = imagenet.Settings(width=2, base_width=2)
    assert found["weights"] == imagenet.budget(s, 3) and found["epochs"] == 2 and not found["diverged"]
    assert "synthetic" in str(next((tmp_path / "runs" / "resnet_imagenet").iterdir()))


@with_mpi
def test_processes_train_together_on_photographs(tmp_path):
    """3 ranks, batches of 16 of 48 photographs: the run and its record. What each of them reads is tested elsewhere."""
    command_ = [sys.executable, str(ROOT / "exp_resnet_imagenet.py"), *words(tmp_path, size=64)]
    subprocess.run([MPIRUN, "-n", "3", *command_], env=ENV, check=True, capture_output=True, timeout=120)
    found = result(tmp_path / "runs")
    assert found["config"]["ranks"] == [3] and found["epochs"] == 2 and not found["diverged"]


@pytest.mark.slow
def test_networks_learn_from_photographs(tmp_path):
    """10 classes, 2,000 photographs, 8 epochs: far above chance, and the wider sparse network learns as well."""
    for width in (8, 16):
        more = dict(size=64, classes=10, images=200, batch=32, lr=0.01, width=width, base_width=8, epochs=8)
        assert command.main(imagenet.EXPERIMENT, words(tmp_path, **more, out=tmp_path / str(width))) == 0
        found = result(tmp_path / str(width))
        assert found["weights"] == imagenet.budget(imagenet.Settings(width=8, base_width=8), 10)
        assert found["best_test_acc"] > 0.3


@pytest.mark.parametrize("more, message", [
    (("--classes", 5), "--classes and --images are about --data synthetic"),
    (("--size", 16), "--size must be a number of at least 32, not 16"),
    (("--width", 32), "width 32 cannot keep the weights of the wider base 64"),
    (("--width", 64), "imagenet/train is not there: ImageNet (ILSVRC2012, from image-net.org"),
    (("--data", "imagenet-256"), "imagenet-256 is no finished copy"),
    (("--prepare",), "imagenet"),
])
def test_mistakes_end_in_a_sentence(more, message, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "exp_resnet_imagenet.py"), *map(str, more), "--out",
                           str(tmp_path / "runs"), "--data-dir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------- figures


def test_runs_of_table_1():
    runs = imagenet.table1_runs(imagenet.Settings())
    dense = [r.width for r in runs if r.width == r.base_width]
    sparse = [r.width for r in runs if r.width > r.base_width]
    assert sorted(dense) == [64, 90, 128, 181, 256] and sorted(sparse) == [90, 128, 181, 256]
    assert [imagenet.paper(r) for r in runs if r.width == 128] == ["70.02 %", "70.22 %"]
    assert imagenet.paper(runs[0]) == "68.03 %"
    for other in (dict(limit=5), dict(epochs=9), dict(lr=0.2), dict(schedule="steps"), dict(data="synthetic")):
        assert imagenet.paper(replace(runs[0], **other)) is None


@pytest.mark.parametrize("name, expected", [
    ("table1", ["sparse: 9 weights at every width: 68.00 % at 64, 70.00 % at 128",
                "dense: all weights of its width: 68.00 % at 64, 72.00 % at 128",
                "the paper, dense: 68.03 % at 64, 69.11 % at 90, 70.22 % at 128"]),
    ("fig1", ["dense: all weights of its width: 68.00 % at 64, 72.00 % at 128"]),
    ("fig7", ["base 64: 50 % at 128",
              "the paper's Table 1, base 64: 142 % at 90, 91 % at 128, 91 % at 181, 65 % at 256"]),
])
@pytest.mark.parametrize("dataset", ["imagenet", "synthetic"])
def test_figures_say_what_their_runs_found(name, expected, dataset, tmp_path, capsys):
    s = imagenet.Settings(data=dataset, widths="64,128", out=str(tmp_path))
    for run in imagenet.table1_runs(s):
        folder = train.Run(imagenet.EXPERIMENT, run).folder
        folder.mkdir(parents=True)
        accuracy = {(64, 64): 0.68, (64, 128): 0.70, (128, 128): 0.72}[run.base_width, run.width]
        made_up = {"weights": 9, "connectivity": 1, "diverged": False, "epochs": 150, "seconds": 1.0,
                   "config": {"versions": {}}}
        for part in ("test", "train"):
            made_up |= {f"best_{part}_acc": accuracy, f"final_{part}_acc": accuracy - 0.01}
        (folder / "result.json").write_text(json.dumps(made_up))
    assert command.main(imagenet.EXPERIMENT, ["--plot", name, *s.flags(places=("widths", "out"))]) == 0
    out = capsys.readouterr().out
    for sentence in expected:
        assert sentence in out
    assert ("70.02 %  70.00 % (1)" in out) == (dataset == "imagenet")
    file = f"resnet_imagenet_{name}.png" if dataset == "imagenet" else f"resnet_imagenet_synthetic_{name}.png"
    assert (tmp_path / "resnet_imagenet" / dataset / file).stat().st_size > 10_000
