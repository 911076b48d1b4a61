"""bench.py's part for GPUs: its whole course on the simulated GPU, and what it says where there is no GPU."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_gpu
from bench import resnet_operations
from bench_gpu import PARTS, peak_of

import conv
import exp_resnet_cifar
import exp_resnet_imagenet
import nn

BENCH = Path(__file__).with_name("bench.py")


def bench(*words):
    return subprocess.run([sys.executable, str(BENCH), *words], text=True, capture_output=True)


def test_without_a_gpu_it_ends_with_one_sentence(request):
    if request.config.gpu == "gpu":
        pytest.skip("there is a GPU here")
    done = bench("gpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"bench.py gpu: a GPU was asked for but cannot be used: .+\n", done.stderr)
    assert bench("gpu", "--widths").returncode == 2


def test_what_counts_as_the_peak():
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == dict(bf16=989, tf32=495, fp32=67)
    assert peak_of("NVIDIA H100 PCIe")["bf16"] == 756 and peak_of("NVIDIA A100-SXM4-80GB")["bf16"] == 312
    assert peak_of("simulated GPU") == {}


@pytest.mark.parametrize("side, classes", [(32, 10), (64, 12), (224, 1000)])
def test_operations_are_those_of_the_network(side, classes):
    """Counted from the shapes that each layer meets, for an image of this size."""
    net = (exp_resnet_cifar if side == 32 else exp_resnet_imagenet).ResNet18(3, classes)

    def count(layer, size):
        w = layer.weight
        out, _ = conv.output_size((1, w.shape[1], size, size), w.shape, layer.stride, layer.padding)
        return w.size * out**2, out

    total, size = count(net.conv, side)
    size = size if side == 32 else (size - 1) // 2 + 1
    for block in net.blocks:
        shortcut = [count(layer, size)[0] for layer in block.shortcut if isinstance(layer, nn.Conv2d)]
        first, size = count(block.conv1, size)
        second, size = count(block.conv2, size)
        total += sum(shortcut) + first + second
    assert resnet_operations(3, side, classes) == 6 * (total + net.classifier.weight.size)


def numbers(line):
    return [float(word) for word in re.findall(r"(?<=\s)-?\d+(?:\.\d+)?(?=\s|$)", line)]


@pytest.fixture(scope="module")
def simulated():
    if reason := simulated_gpu.available():
        pytest.skip(reason)
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")


@pytest.mark.slow
def test_the_whole_course(simulated):
    done = bench("gpu", "--simulated")
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout and "nan" not in done.stdout and "inf" not in done.stdout, done.stdout
    assert done.stdout.startswith("simulated GPU, dense peak unknown") and "PyTorch 2" in done.stdout
    rows = [line for line in done.stdout.splitlines() if re.match(r"(CIFAR|64 px) .* (bf16|tf32)( masked)? +\d", line)]
    assert len(rows) == 4
    for line in rows:
        assert line.split().count("-") == (2 if "masked" not in line else 6)  # parts of the unknown peak, compiled
        times = numbers(line.split("32" if "tf32" in line else "bf16")[1])
        assert all(map(math.isfinite, times)) and min(times[:3]) > 0
    assert re.search(r"a step as one CUDA graph [\d.]+ ms, launched from Python [\d.]+ ms, [\d.]+ times", done.stdout)
    rows = [line for line in done.stdout.splitlines() if re.match(r"width +(5|20) ", line)]
    assert [len(numbers(line)) for line in rows] == [7, 7]
    assert all(min(numbers(line)) > 0 for line in rows)


@pytest.mark.slow
def test_layer_by_layer(simulated):
    done = bench("gpu", "--simulated", "--layers")
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout and "nan" not in done.stdout
    for name in ("batch", *PARTS):
        assert re.search(rf"^{name} .* \d", done.stdout, re.M), name
    assert re.search(r"^forward +3 -> 2, 32 x 32, 3 x 3 +1 ", done.stdout, re.M)
    assert re.search(r"^weight_gradient +3 -> 2, 64 x 64, 7 x 7 / 2 +1 ", done.stdout, re.M)
    assert re.search(r"^batch_norm +2 x 32 x 32, add, ReLU +2 ", done.stdout, re.M)
    for what in ("together", "a whole step"):
        found = [numbers(line) for line in re.findall(rf"^{what} .*", done.stdout, re.M)]
        assert [len(line) for line in found] == [2, 2] and min(min(line) for line in found) > 0
