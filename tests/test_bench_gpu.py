"""bench/gpu.py and bench/first_minutes.py: their whole courses on the simulated GPU (long proofs), what they say where
there is no GPU, and that the first minutes report faults.
"""

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_gpu

FOLDER = Path(__file__).resolve().parent.parent / "bench"
sys.path.append(str(FOLDER))

import first_minutes  # noqa: E402
from gpu import PARTS, peak_of  # noqa: E402


def bench(*words, script="gpu.py"):
    return subprocess.run([sys.executable, str(FOLDER / script), *words], text=True, capture_output=True)


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


# ---------------------------------------------------------------------------------------------- first_minutes.py


def test_first_minutes_without_a_gpu(request):
    """end after the first check"""
    if request.config.gpu == "gpu":
        pytest.skip("there is a GPU here")
    done = bench(script="first_minutes.py")
    assert done.returncode == 1 and "\n 1. what is here ... FAILED" in done.stdout, done.stdout + done.stderr
    assert "a GPU was asked for but cannot be used" in done.stdout and "\n 2." not in done.stdout
    assert first_minutes.main(["11"]) == first_minutes.main(["--all"]) == 2


@pytest.mark.proof
def test_first_minutes():
    if reason := simulated_gpu.available():
        pytest.skip(reason)
    done = bench("--simulated", script="first_minutes.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nok: 1, 2, 3, 4, 6, 7, 8, 9, 10; skipped: 5. " in done.stdout and "Next: `pytest" in done.stdout
    assert "nan" not in done.stdout and "Traceback" not in done.stdout + done.stderr


@pytest.fixture
def examined(gpu, request, capsys):
    """examined(numbers) makes these checks in this process: (exit code, what they print)"""
    if request.config.gpu != "simulated gpu":
        pytest.skip("faults are made on the simulated GPU alone")
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    gpu()

    def perform(number, simulated):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            return first_minutes.examine(number, simulated), said.getvalue()

    def run(*numbers):
        code = first_minutes.main(["--simulated", *map(str, numbers)], perform)
        return code, capsys.readouterr().out

    return run


def test_checks_that_are_ok(examined):
    code, said = examined(1, 2, 3)
    assert code == 0 and "ok: 1, 2, 3. " in said and "FAILED" not in said and "simulated GPU" in said


def wrong_product(patch):
    real = sys.modules["engines.gpu"].Engine.product
    patch.setattr("engines.gpu.Engine.product", lambda self, *arrays: real(self, *arrays) * 1.0001)


def no_product(patch):
    def fail(self, *arrays):
        raise RuntimeError("cudaErrorLaunchFailure")

    patch.setattr("engines.gpu.Engine.product", fail)


def used_stream(patch):
    """that is not entered, so that CuPy forgets it"""
    real = sys.modules["engines.gpu"].Engine.__init__

    def begin(self, *arguments, **options):
        real(self, *arguments, **options)
        simulated_gpu.entered.pop()

    patch.setattr("engines.gpu.Engine.__init__", begin)


def empty_graphs(patch):
    patch.setattr(simulated_gpu.Graph, "launch", lambda self, stream: None)


@pytest.mark.parametrize("fault, number, seen", [
    (used_stream, 2, "after a download of a weight in NHWC the current stream is another than the engine's"),
    (wrong_product, 3, r"linear layer in fp32: [\w ]+ is off by 1\.\de-04 of its largest entry"),
    (no_product, 3, "linear layer in bf16: cudaErrorLaunchFailure"),
    (empty_graphs, 6, r"captured and uncaptured: \d+ of \d+ arrays differ, .*weight 0")])
def test_faults_are_reported(examined, monkeypatch, fault, number, seen):
    fault(monkeypatch)
    code, said = examined(number)
    assert code == 1 and f"FAILED: {number}. " in said and re.search(seen, said), said
    meaning = first_minutes.CHECKS[number - 1][2]
    assert meaning in re.sub(r"\s+", " ", said) and f"`python bench/first_minutes.py {number}`" in said


def test_what_the_sanitizer_says(examined, monkeypatch):
    """None of our kernels named, or one; no summary at all, since the program died."""
    clean = {tool: f"========= {'RACECHECK' if tool == 'racecheck' else 'ERROR'} SUMMARY: 0 "
             + ("hazards displayed (0 errors, 0 warnings)" if tool == "racecheck" else "errors")
             for tool in first_minutes.TOOLS}
    said, code = dict(clean), 0
    monkeypatch.setattr(first_minutes, "sanitizer", lambda simulated: "compute-sanitizer")
    monkeypatch.setattr(first_minutes, "process", lambda simulated, *words, before=():
                        (code, said[before[2]]) if before else (0, ""))
    assert examined(5)[0] == 0
    said["racecheck"] = clean["racecheck"].replace("0 hazards", "2 hazards").replace("0 warnings", "2 warnings")
    assert examined(5)[0] == 0
    said["memcheck"] = ("========= Invalid __global__ read of size 4 bytes\n=========     at normalize+0x140\n"
                        "========= ERROR SUMMARY: 1 error")
    result, text = examined(5)
    assert result == 1 and "memcheck names normalize of our kernels:" in text and "Invalid __global__ read" in text
    said, code = dict(clean, memcheck=""), 1
    result, text = examined(5)
    assert result == 1 and "memcheck: no summary, exit code 1" in text and "memcheck names none" in text


def test_a_check_that_dies_or_hangs(monkeypatch):
    monkeypatch.setattr(first_minutes, "PATIENCE", 0.1)
    code, said = first_minutes.process(True, "check", before=["sh", "-c", "echo so far; kill -SEGV $$"])
    assert code < 0 and said == "so far\nit died of SIGSEGV"
    code, said = first_minutes.process(True, "check", before=["sh", "-c", "echo so far; exec sleep 20"])
    assert code != 0 and said == "so far\nno answer in 0.5 s: it hangs"
