"""bench/gpu.py: its whole course on the simulated GPU (a long proof), and what it says where there is no GPU."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_gpu

FOLDER = Path(__file__).resolve().parent.parent / "bench"
sys.path.append(str(FOLDER))

from gpu import PARTS, peak_of  # noqa: E402


def bench(*words):
    return subprocess.run([sys.executable, str(FOLDER / "gpu.py"), *words], text=True, capture_output=True)


def test_without_a_gpu_it_ends_with_one_sentence(request):
    if request.config.gpu == "gpu":
        pytest.skip("there is a GPU here")
    done = bench()
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"bench/gpu.py: a GPU was asked for but cannot be used: .+\n", done.stderr)
    assert bench("--widths").returncode == 2


def test_what_counts_as_the_peak():
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == dict(bf16=989, tf32=495, fp32=67)
    assert peak_of("NVIDIA H100 PCIe")["bf16"] == 756 and peak_of("NVIDIA A100-SXM4-80GB")["bf16"] == 312
    assert peak_of("simulated GPU") == {}


def numbers(line):
    return [float(word) for word in re.findall(r"(?<=\s)-?\d+(?:\.\d+)?(?=\s|$)", line)]


@pytest.fixture(scope="module")
def simulated():
    if reason := simulated_gpu.available():
        pytest.skip(reason)
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")


@pytest.mark.proof
def test_the_whole_course(simulated):
    done = bench("--simulated")
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout and "nan" not in done.stdout and "inf" not in done.stdout, done.stdout
    assert done.stdout.startswith("simulated GPU, dense peak unknown") and "PyTorch 2" in done.stdout
    rows = re.findall(r"^((?:CIFAR|64 px) .* (?:bf16|tf32)(?: masked)?|MLP .* batch  10)  +(\d.*)$", done.stdout, re.M)
    assert [bool(re.search("masked", name)) for name, _ in rows] == [False, False, False, True, False]
    for name, cells in rows:
        assert cells.split().count("-") == 2, name  # parts of the unknown peak
        assert len(numbers(" " + cells)) == 12 and min(numbers(" " + cells)[:8]) > 0, name


@pytest.mark.proof
def test_layer_by_layer(simulated):
    done = bench("--simulated", "--layers")
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout and "nan" not in done.stdout
    for name in PARTS:
        assert re.search(rf"^{name} .* \d", done.stdout, re.M), name
    assert re.search(r"^conv +3 -> 2, 32 x 32, 3 x 3 +1 ", done.stdout, re.M)
    assert re.search(r"^conv_weight_gradient +3 -> 2, 64 x 64, 7 x 7 / 2 +1 ", done.stdout, re.M)
    assert re.search(r"^batch_norm +2 x 32 x 32, add, ReLU +2 ", done.stdout, re.M)
    assert len(re.findall(r"^(?:together|a whole step) +\d+$", done.stdout, re.M)) == 4
