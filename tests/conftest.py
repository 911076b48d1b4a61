"""What all tests share: the path to the modules, the marker `slow`, and the backends present on this machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nn  # noqa: E402

BACKENDS = ["cpu"]
if nn.use_device("auto") == "gpu":
    BACKENDS.append("gpu")
    nn.use_device("cpu")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long proofs")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long proof, run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long proof: run with --slow"))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each array backend in turn: NumPy, and CuPy where a GPU is usable."""
    nn.use_device(request.param)
    yield request.param
    nn.use_device("cpu")
