"""What all tests share: the path to the modules, the marker `proof`, and the backends present on this machine."""

import contextlib
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import simulated_gpu  # noqa: E402

import nn  # noqa: E402


def usable():
    """Whether this machine has a GPU that CuPy can use."""
    found = nn.use_device("auto") == "gpu"
    nn.use_device("cpu")
    return found


def pytest_addoption(parser):
    parser.addoption("--proofs", action="store_true", help="also run the long proofs (tests/proofs)")
    parser.addoption("--device", choices=("auto", "cpu", "gpu"), default="auto",
                     help="test on the CPU alone, or also on a GPU (gpu: fail without one; auto: simulate it then)")


def pytest_configure(config):
    config.addinivalue_line("markers", "proof: a long proof, run with --proofs")
    device = config.getoption("--device")
    config.gpu = None if device == "cpu" else "gpu" if usable() else "simulated gpu"
    if device == "gpu" and config.gpu != "gpu":
        raise pytest.UsageError("--device gpu: there is no GPU that CuPy can use")


def pytest_report_header(config):
    return f"backends: cpu{f', {config.gpu}' if config.gpu else ''}"


def pytest_collection_modifyitems(config, items):
    for item in items:
        if HERE / "proofs" in item.path.parents:
            item.add_marker(pytest.mark.proof)
        if "proof" in item.keywords and not config.getoption("--proofs"):
            item.add_marker(pytest.mark.skip(reason="a long proof: run with --proofs"))


def pytest_generate_tests(metafunc):
    gpus = [metafunc.config.gpu] if metafunc.config.gpu else []
    for name, backends in (("backend", ["cpu", *gpus]), ("gpu", gpus)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, backends, indirect=True)


@pytest.fixture(autouse=True)
def without_cupy(request):
    """A CuPy that finds no GPU is as if it were not installed: else each command would say why it takes the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.gpu != "gpu" and HERE / "proofs" not in request.path.parents:
            patch.setitem(sys.modules, "cupy", None)
        yield


@contextlib.contextmanager
def computing_on(backend, **options):
    """Compute on this backend: cpu, gpu, or gpu as simulated by simulated_gpu.py. Yields its array module."""
    simulated = backend == "simulated gpu"
    if options.get("precision") == "bf16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    if simulated:
        if reason := simulated_gpu.available():
            pytest.skip(f"a GPU cannot be simulated: {reason}")
        simulated_gpu.install()
    try:
        nn.use_device(backend.split()[-1], **options)
        yield nn.xp
        if simulated:
            simulated_gpu.check_guards()
    finally:
        nn.use_device("cpu")
        if simulated:
            simulated_gpu.uninstall()


@pytest.fixture
def backend(request):
    """Each array backend in turn: NumPy, and CuPy on a GPU or on a simulated one."""
    with computing_on(request.param, **({} if request.param == "cpu" else {"precision": "fp32"})):
        yield request.param


@pytest.fixture
def gpu(request):
    """A function that switches to the GPU, or the simulated one, with options of its engine; afterwards to the CPU."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(computing_on(request.param, **options))
