"""The engine of the CPU: convolution, BatchNorm, pools and batches, threads and memory, and a whole ResNet-18."""

import collections
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_nn import IMAGES, conv_case, evaluate, import_torch
from threadpoolctl import threadpool_info, threadpool_limits

import engines.cpu
import nn
from engines import convolution, host, output_size, sparse

TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture
def use_threads(monkeypatch):
    """use_threads(n): from then on, even the smallest work is shared by n threads."""
    pools = []

    def use(count):
        pools.append(ThreadPoolExecutor(count))
        monkeypatch.setattr(host, "cores", lambda: count)
        monkeypatch.setattr(host, "pool", lambda: pools[-1])
        monkeypatch.setattr(host, "WORTH", 0)

    yield use
    for pool in pools:
        pool.shutdown()


@pytest.fixture
def fresh_store(monkeypatch):
    """A store of memory that holds nothing yet."""
    monkeypatch.setattr(host.Buffer, "STORED", collections.OrderedDict())
    for name in ("stored", "used", "most"):
        monkeypatch.setattr(host.Buffer, name, 0)


def relative_error(got, want):
    """Largest difference over the largest wanted entry."""
    assert got.shape == want.shape, f"{got.shape} instead of {want.shape}"
    assert np.isfinite(got).all()
    return np.abs(np.asarray(got, np.float64) - want).max(initial=0) / (np.abs(want).max(initial=0) or 1)


def check(got, want, dtype, tolerance=None):
    """Each array of `got` has this type and is near that of `want`, which is float64."""
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) < (tolerance or TOLERANCE[dtype])


def in_engine(array, halo=0):
    """A copy in the engine's order."""
    out = host.empty(array.shape, array.dtype, halo)
    out[...] = array
    return out


def part_of(shape, index, array, halo=0):
    """The same values as a view, by `index`, of a larger array in the engine's order, whose other entries are not 0."""
    out = host.empty(shape, array.dtype, halo)
    out[...] = 7
    out[index] = array
    return out[index]


def stored_as(axes, array):
    """A copy whose axes lie in this order in memory."""
    return np.ascontiguousarray(array.transpose(axes)).transpose(np.argsort(axes))


def grown(shape, axis, by=1, times=1):
    return tuple(n * times + by if i == axis else n for i, n in enumerate(shape))


# The same images in another memory order.
ORDERS = {
    "C": lambda a: a.copy(),
    "engine": in_engine,
    "halo 1": lambda a: in_engine(a, 1),
    "halo 2": lambda a: in_engine(a, 2),
    "channels last": lambda a: stored_as((0, 2, 3, 1), a),
    "reversed axes": lambda a: stored_as((3, 2, 1, 0), a),
    "flipped": lambda a: a[:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1],
    "crop": lambda a: part_of((*a.shape[:2], a.shape[2] + 2, a.shape[3] + 2), np.s_[:, :, 1:-1, 1:-1], a, 1),
    "every other image": lambda a: part_of(grown(a.shape, 0, 0, 2), np.s_[::2], a, 1),
    "all but one image": lambda a: part_of(grown(a.shape, 0), np.s_[1:], a, 1),
    "every other channel": lambda a: part_of(grown(a.shape, 1, 0, 2), np.s_[:, ::2], a),
    "all but one column": lambda a: part_of(grown(a.shape, 3), np.s_[:, :, :, 1:], a),
    # Here a step from row to row is not C steps from channel to channel, so rows of channels do not line up.
    "all but one channel": lambda a: part_of(grown(a.shape, 1), np.s_[:, 1:], a),
    "every other row": lambda a: part_of(grown(a.shape, 2, 0, 2), np.s_[:, :, ::2], a, 1),
    "rows upwards": lambda a: in_engine(a[:, :, ::-1])[:, :, ::-1],
    "channels backwards": lambda a: in_engine(a[:, ::-1])[:, ::-1],
}


# ---------------------------------------------------------------------------------------------- convolution


def convolve_slowly(x, w, g, stride, padding):
    """(y, dx, dw) by the definition, one output pixel at a time."""
    (_, _, H, W), (kh, kw) = x.shape, w.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    y, dx, dw = np.empty_like(g), np.zeros_like(x), np.zeros_like(w)
    for i, j in np.ndindex(g.shape[2:]):
        window = np.s_[:, :, stride * i : stride * i + kh, stride * j : stride * j + kw]
        y[:, :, i, j] = np.tensordot(x[window], w, ((1, 2, 3), (1, 2, 3)))
        dx[window] += np.tensordot(g[:, :, i, j], w, 1)
        dw += np.tensordot(g[:, :, i, j], x[window], (0, 0))
    return y, dx[:, :, padding : padding + H, padding : padding + W], dw


def check_convolution(rng, dtype, x, w, stride, padding, orders):
    """nn.conv2d of random arrays of the shapes x and w; orders: of images, weights and output gradient in memory."""
    H, W = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x[2:], w[2:]))
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in (x, w, (x[0], w[0], H, W))]
    want = convolve_slowly(*(a.astype(np.float64) for a in arrays), stride, padding)
    stored = [ORDERS[order](a) for order, a in zip(orders, arrays)]
    out, gradients = evaluate(lambda x, w: nn.conv2d(x, w, stride, padding), stored[:2], stored[2])
    check([out, *gradients], want, dtype)
    for now, before in zip(stored, arrays):
        np.testing.assert_array_equal(now, before)  # nothing was written into


@pytest.mark.parametrize("kernel", list(itertools.product(range(1, 6), repeat=2)), ids=lambda k: f"{k[0]}x{k[1]}")
def test_convolution_of_random_shapes(kernel):
    """28 shapes for each kernel: strides to 4, padding to 4 (more than many kernels), float32 and float64 in turn."""
    rng = np.random.default_rng(kernel)
    for i in range(28):
        stride, padding = (1, 2, 1, 3, 2, 4, 1)[i // 4], int(rng.integers(5))
        N, C, out = (int(n) for n in rng.integers(1, 6, 3))
        H, W = (max(1, k - 2 * padding) + int(rng.integers(10)) for k in kernel)
        check_convolution(rng, (np.float32, np.float64)[i % 2], (N, C, H, W), (out, C, *kernel), stride, padding,
                          rng.choice(list(ORDERS), 3))


@pytest.mark.parametrize("padding", range(5))
def test_convolution_in_tiles(padding):
    """Nine shapes for each padding, in both types, that take Winograd's way in the forward pass."""
    rng = np.random.default_rng(padding)
    few = convolution.TILES_FROM
    for (N, C, out, H, W), dtype in itertools.product([
            (1, few, few, 4, 4), (2, few + 1, few, 4, 8), (3, few, few + 7, 8, 4), (5, few + 3, few + 2, 8, 8),
            (1, 2 * few, few, 12, 12), (4, few, 2 * few, 4, 16), (7, few, few, 16, 4), (2, few, few + 1, 8, 32),
            (9, few + 1, few + 1, 12, 8)], TOLERANCE):
        H, W = (max(1, n + 2 - 2 * padding) for n in (H, W))
        H, W = (n + -(n + 2 * padding - 2) % 4 for n in (H, W))  # the outputs' sizes are multiples of 4
        w = (out, C, 3, 3)
        assert convolution.kind(w, 1, (H + 2 * padding - 2, W + 2 * padding - 2)) == "tiles"
        check_convolution(rng, dtype, (N, C, H, W), w, 1, padding, rng.choice(list(ORDERS), 3))


@pytest.mark.parametrize("x, w, stride, padding", [
    ((128, 8, 32, 32), (8, 8, 3, 3), 1, 1),  # several blocks of rows
    ((100, 18, 16, 18), (36, 18, 3, 3), 1, 1),  # rows in pieces
    ((64, 8, 32, 32), (16, 8, 3, 3), 2, 1), ((64, 16, 32, 32), (32, 16, 1, 1), 2, 0),
    ((5, 3, 64, 64), (64, 3, 7, 7), 2, 3),  # the stem of ImageNet's ResNet
    ((400, 24, 12, 8), (25, 24, 3, 3), 1, 1),  # many tiles
    ((200, 48, 12, 8), (50, 48, 3, 3), 1, 1),  # two passes over the rows of tiles, the second shorter
])
def test_convolution_of_real_sizes(x, w, stride, padding):
    check_convolution(np.random.default_rng(2), np.float32, x, w, stride, padding, ("halo 1", "C", "halo 1"))


@pytest.mark.parametrize("wanted, other", [("input", "weight"), ("weight", "input")])
def test_only_wanted_gradients_of_a_convolution_are_computed(monkeypatch, wanted, other):
    monkeypatch.setattr(nn.engine, f"conv_{other}_gradient", None)
    x, w = nn.Tensor(np.ones((1, 1, 3, 3)), wanted == "input"), nn.Tensor(np.ones((1, 1, 2, 2)), wanted == "weight")
    nn.conv2d(x, w).sum().backward()
    assert (x.grad is None, w.grad is None) == (wanted != "input", wanted != "weight")


def test_tiles_lose_little_precision():
    """In float32 Winograd's way has less than ten times the error of the direct one."""
    rng = np.random.default_rng(6)
    x, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((8, 64, 16, 16), (64, 64, 3, 3), (8, 64, 16, 16)))
    exact = convolution.forward(x.astype(np.float64), w.astype(np.float64), 1, 1)
    rows = convolution.forward(x[:, :, :, :-1], w, 1, 1)  # an odd width: not in tiles
    assert relative_error(rows[..., :-1], exact[..., : rows.shape[3] - 1]) < 1e-6
    assert relative_error(convolution.forward(x, w, 1, 1), exact) < 5e-6
    exact = convolution.weight_gradient(g.astype(np.float64), x.astype(np.float64), w.shape, 1, 1)
    assert relative_error(convolution.weight_gradient(g, x, w.shape, 1, 1), exact) < 5e-6


def images(*shape, dtype=np.float32):
    return nn.Tensor(np.ones(shape, dtype))


@pytest.mark.parametrize("operation, match", [
    *((lambda x=x, w=w, settings=settings: nn.conv2d(images(*x), images(*w), *settings), match)
      for x, w, settings, match in (
        ((2, 3, 8, 8), (4, 2, 3, 3), (1, 1), r"C.*\(2, 3, 8, 8\) and \(4, 2, 3, 3\)"),
        ((3, 8, 8), (4, 3, 3, 3), (1, 1), r"\(N, C, H, W\)"),
        ((2, 3, 8, 8), (4, 3, 9), (1, 1), r"\(O, C, kh, kw\)"),
        ((2, 3, 4, 8), (4, 3, 5, 3), (1, 0), "5x3 kernel does not fit images of 4x8 with padding 0"),
        ((2, 3, 8, 4), (4, 3, 3, 7), (1, 1), "3x7 kernel does not fit images of 8x4 with padding 1"),
        ((2, 3, 2, 2), (4, 3, 5, 5), (4, 1), "does not fit"),
        ((2, 3, 8, 8), (4, 3, 3, 3), (0, 1), "the stride of conv2d .*, not 0"),
        ((2, 3, 8, 8), (4, 3, 3, 3), (1, -1), "the padding of conv2d .*, not -1"),
        ((0, 3, 8, 8), (4, 3, 3, 3), (1, 1), r"not \(0, 3, 8, 8\)"))),
    (lambda: nn.conv2d(images(2, 3, 4, 4), images(4, 3, 3, 3, dtype="float64")), "type, not float32 and float64"),
    *((lambda training=training, x=x, add=add: nn.BatchNorm2d(3).train(training)(images(*x), add=add and images(*add)),
       r"3 channels takes images \(N, 3, H, W\), one or more, not")
      for training in (True, False)
      for x, add in (((2, 4, 5, 5), None), ((2, 3, 5), None), ((2, 3, 5, 5), (2, 3, 5, 1)))),
    (lambda: nn.BatchNorm2d(1).eval()(images(2, 3, 4, 4)), "1 channels"),
    (lambda: nn.BatchNorm2d(3)(images(1, 3, 1, 1)), r"more than one value for each .* not images of \(1, 3, 1, 1\)"),
    *((lambda settings=settings: nn.max_pool2d(images(1, 1, 4, 6), *settings),
       f"windows of {settings[0]}x{settings[0]}.*images of 4x6")
      for settings in ((5,), (3, 1, 2), (2, 2, 2))),
    *((lambda settings=settings: nn.max_pool2d(images(1, 1, 4, 6), *settings), match)
      for settings, match in (((0,), "the size of max_pool2d is .* not 0"), ((2, 0), "the stride .* not 0"),
                              ((2, -1), "the stride .* not -1"), ((2, 1, -1), "the padding .* not -1"))),
])
def test_what_does_not_fit_is_refused(operation, match):
    with pytest.raises(ValueError, match=match):
        operation()


# ---------------------------------------------------------------------------------------------- kept entries alone


@pytest.fixture(params=["NumPy", "Numba"])
def loops(request, monkeypatch):
    """The loops over kept entries in NumPy and SciPy, and compiled."""
    if request.param == "NumPy":
        monkeypatch.setattr(sparse, "numba_loops", lambda: None)
    elif sparse.numba_loops() is None:
        pytest.skip("no Numba: pip install -r requirements-numba.txt")


@pytest.fixture(params=["dense", "sparse"])
def way(request, monkeypatch):
    """Masked weights of low density are multiplied densely, and with their kept entries alone, whatever it costs."""
    always = request.param == "sparse"
    monkeypatch.setattr(nn.engine, "cheaper", lambda kind, pattern, *cost: always and pattern is not None)
    return request.param


def some_mask(rng, shape, kind):
    mask = np.zeros(shape, bool)
    if kind == "one":
        mask.reshape(-1)[rng.integers(mask.size)] = True
    elif kind == "all":
        mask[...] = True
    elif kind == "whole kernels":
        mask[rng.random(shape[:2]) < 0.3] = True
    elif kind == "empty rows and columns":
        mask[::2, : shape[1] // 2 + 1] = rng.random(mask[::2, : shape[1] // 2 + 1].shape) < 0.5
    else:
        mask[...] = rng.random(shape) < 0.2
    return mask


@pytest.mark.parametrize("kind", ["few", "one", "none", "all", "whole kernels", "empty rows and columns"])
def test_convolution_with_the_kept_entries_alone(kind, loops, use_threads):
    """36 shapes for each kind of mask: kernels to 7 x 7, strides to 3, padding to 4; both types, any memory order."""
    use_threads(3)
    rng = np.random.default_rng(12)
    for i, (k, stride) in enumerate(itertools.product([(1, 1), (3, 3), (2, 3), (5, 5), (7, 7), (4, 1)], [1, 2, 3] * 2)):
        dtype, padding = (np.float32, np.float64)[i % 2], int(rng.integers(5))
        N, C, O = (int(n) for n in rng.integers(1, 6, 3))
        H, W = (max(1, n - 2 * padding) + int(rng.integers(10)) for n in k)
        mask = some_mask(rng, (O, C, *k), kind) if kind != "none" else np.zeros((O, C, *k), bool)
        x, w = rng.standard_normal((N, C, H, W)), rng.standard_normal(mask.shape) * mask
        g = rng.standard_normal((N, O, *output_size(x.shape, w.shape, stride, padding)))
        x, w, g = (a.astype(dtype) for a in (x, w, g))
        y, dx, dw = convolve_slowly(*(a.astype(np.float64) for a in (x, w, g)), stride, padding)
        pattern = sparse.Pattern(mask)
        images, gradient = (ORDERS[order](a) for order, a in zip(rng.choice(list(ORDERS), 2), (x, g)))
        for _ in range(2):  # the second time with the matrices of the first
            got = (sparse.forward(images, w, pattern, stride, padding),
                   sparse.input_gradient(gradient, w, pattern, x.shape, stride, padding),
                   sparse.weight_gradient(gradient, images, pattern, stride, padding))
            check(got, (y, dx, dw[mask]), dtype)
        np.testing.assert_array_equal(images, x)


@pytest.mark.parametrize("fault", [OSError, EOFError, RuntimeError])
def test_without_a_numba_that_works_there_are_no_compiled_loops(monkeypatch, fault):
    """As where its library is missing, or what it keeps was cut off"""
    class Broken:
        def multiply(*arguments):
            raise fault

    monkeypatch.setitem(sys.modules, "engines.numba_loops", Broken)
    monkeypatch.setattr(engines, "numba_loops", Broken, raising=False)
    assert sparse.numba_loops.__wrapped__() is None


def test_compiled_loops_are_for_one_type_of_this_machine():
    single, double, half = (np.ones(1, dtype) for dtype in (np.float32, np.float64, np.float16))
    assert sparse.loops_for(single, double) is sparse.loops_for(half, half) is None
    assert sparse.loops_for(single.astype(single.dtype.newbyteorder())) is None
    assert sparse.loops_for(single, single) is sparse.loops_for(double) is sparse.numba_loops()


@DTYPES
@pytest.mark.parametrize("kind", ["few", "one", "none", "all", "empty rows and columns"])
def test_linear_layer_with_the_kept_entries_alone(kind, dtype, loops):
    rng = np.random.default_rng(13)
    mask = some_mask(rng, (30, 40), kind) if kind != "none" else np.zeros((30, 40), bool)
    x, w, g = rng.standard_normal((7, 40)), rng.standard_normal((30, 40)) * mask, rng.standard_normal((7, 30))
    pattern, (xT, w_, gT) = sparse.Pattern(mask), (np.ascontiguousarray(a.astype(dtype)) for a in (x.T, w, g.T))
    check([sparse.linear(xT, w_, pattern), sparse.linear_input_gradient(gT, w_, pattern),
           sparse.linear_weight_gradient(gT, xT, pattern)],
          [x @ w.T, g @ w, (g.T @ x)[mask]], dtype)


@pytest.mark.parametrize("io_only", [False, True])
def test_a_sparse_resnet_follows_pytorch(way, loops, io_only):
    """Five steps in float64: convolutions of every kind, a linear layer, momentum and weight decay."""
    torch = import_torch()
    from pytorch_models import resnet18

    from exp_resnet_cifar import ResNet18

    rng, net, twin = np.random.default_rng(14), ResNet18(8), resnet18(8).double()
    nn.sparsify(net, 9_000, seed=0, io_only=io_only)
    for module in (m for _, m in net.named_modules()):
        for name, value in vars(module).items():
            if isinstance(value, nn.Parameter):
                value.data = value.data.astype(np.float64)
            elif isinstance(value, np.ndarray):
                setattr(module, name, value.astype(np.float64))
    pairs = list(zip(net.parameters(), twin.parameters(), strict=True))
    assert {p.pattern is not None for p, _ in pairs} == {True, False}
    for ours, theirs in pairs:
        theirs.data = torch.tensor(ours.data)
    mine = nn.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    other = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(5):
        x, labels = rng.standard_normal((6, 3, 32, 32)), rng.integers(0, 10, 6)
        mine.zero_grad(), other.zero_grad()
        nn.cross_entropy(net(nn.Tensor(x)), labels).backward()
        torch.nn.functional.cross_entropy(twin(torch.tensor(x)), torch.tensor(labels)).backward()
        for ours, theirs in pairs:
            if ours.mask is not None:
                theirs.grad *= torch.tensor(ours.mask)
        mine.step(), other.step()
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours.data, theirs.detach().numpy(), rtol=0, atol=1e-9, err_msg=ours.name)
        assert ours.mask is None or not ours.data[~ours.mask].any()
        assert ours.pattern is None or ours.held.shape == (ours.count,) == mine.velocity[
            [p is ours for p in mine.params].index(True)].shape


def test_what_is_measured_is_near_what_is_typical(monkeypatch):
    """So that a moment at which the machine has other things to do decides little; once in a process."""
    typical = sparse.WITH_NUMBA if sparse.numba_loops() else sparse.TYPICAL
    for kind in sparse.TYPICAL:
        assert sparse.measured(kind) is sparse.measured(kind)
        assert sparse.measured(kind)[kind] / typical[kind] in (1 / 4, 1 / 2, 1, 2, 4)
    assert sparse.measured("rows").keys() | sparse.measured("linear").keys() == sparse.TYPICAL.keys()
    for measured, near in ((0.055, 1), (0.19, 1), (0.21, 2), (0.39, 2), (6.4, 4), (0.049, 1 / 2), (0.001, 1 / 4)):
        monkeypatch.setitem(typical, "rows", 0.1)
        assert sparse.near_typical("rows", measured) == pytest.approx(0.1 * near)


def test_kept_entries_alone_where_that_is_cheaper(monkeypatch):
    """By what is measured, for convolutions and linear layers each when it is first needed; not for what is small."""
    engine, rng, asked = engines.cpu.Engine(), np.random.default_rng(15), []

    def measured(kind):
        asked.append(kind)
        return {k: 0.1 for k in sparse.TYPICAL if k.startswith("linear") == kind.startswith("linear")}

    monkeypatch.setattr(sparse, "measured", measured)
    patterns = [sparse.Pattern(rng.random((64, 64, 3, 3)) < density) for density in (0.2, 0.02)]
    assert not engine.cheaper("rows", None, 128, 256, 256) and not engine.cheaper("rows", patterns[1], 1, 1, 1)
    assert engine.state_dict() == {} and not asked
    assert [engine.cheaper("rows", pattern, 128, 256, 256) for pattern in patterns] == [False, True]
    assert set(engine.state_dict()) == {"rows", "tiles", "rows gradient", "tiles gradient"} and asked == ["rows"]
    other = engines.cpu.Engine()
    other.load_state_dict({kind: density * 3 for kind, density in engine.state_dict().items()})
    assert [other.cheaper("rows", pattern, 128, 256, 256) for pattern in patterns] == [True, True]
    assert not other.cheaper("linear", patterns[1], 1, 1, 1) and asked == ["rows"]
    assert set(other.state_dict(measured=True)) == set(sparse.TYPICAL) and asked == ["rows", "linear"]
    assert other.densities["tiles"] == pytest.approx(0.3) and other.densities["linear"] == 0.1
    other.load_state_dict({})
    assert other.state_dict() == {}
    with pytest.raises(ValueError, match="no kind of product called 'columns'"):
        other.load_state_dict({"columns": np.asarray(0.1)})


@pytest.mark.parametrize("C, k, stride, size, asked", [
    (8, 3, 1, 6, [("rows", 2, 36, 36), ("rows", 2, 36, 36), ("rows gradient", 2, 36, 12)]),
    (24, 3, 1, 8, [("tiles", 2, 64, 64), ("tiles", 2, 64, 64), ("tiles gradient", 2, 64, 36)]),
    (8, 3, 2, 8, [("rows", 2, 16, 16), ("rows", 2, 16, 64), ("rows gradient", 2, 16, 12)]),
    (8, 1, 2, 8, [("rows", 2, 16, 16), ("rows", 2, 16, 16), ("rows gradient", 2, 16, 12)])])
def test_what_a_convolution_is_compared_with(monkeypatch, C, k, stride, size, asked):
    """Forward, input gradient, weight gradient: the kind of dense product, images, pixels of the output, calls."""
    found = []
    monkeypatch.setattr(nn.engine, "cheaper", lambda kind, pattern, *cost: found.append((kind, *cost)))
    layer = nn.Conv2d(C, C * 3 // 2, k, stride, padding=k // 2)
    nn.sparsify(nn.Sequential(layer), layer.weight.size // 10, seed=0)
    x = nn.Tensor(np.ones((2, C, size, size), np.float32), requires_grad=True)
    layer(x).sum().backward()
    assert found == asked


@pytest.mark.parametrize("order", [
    lambda a: in_engine(a[:, ::-1, ::-1])[:, ::-1, ::-1],  # channels and rows backwards
    lambda a: stored_as((2, 1, 0, 3), np.pad(a, ((0, 0), (0, 0), (0, 0), (0, 3))))[..., :-3],
    lambda a: padded_rows(a)])
def test_kept_entries_alone_of_images_in_an_unusual_order(order, loops):
    rng = np.random.default_rng(16)
    mask = some_mask(rng, (4, 5, 1, 1), "few")
    x, g = rng.standard_normal((3, 5, 6, 6)), rng.standard_normal((3, 4, 6, 6))
    w, pattern, images = rng.standard_normal(mask.shape) * mask, sparse.Pattern(mask), order(x)
    np.testing.assert_array_equal(images, x)
    y, dx, dw = convolve_slowly(x, w, g, 1, 0)
    check([sparse.forward(images, w, pattern, 1, 0), sparse.input_gradient(g, w, pattern, x.shape, 1, 0),
           sparse.weight_gradient(g, images, pattern, 1, 0)], (y, dx, dw[mask]), np.float64)


def padded_rows(a):
    """In the engine's order, with numbers that belong to no channel behind the rows of each."""
    N, C, H, W = a.shape
    full = np.full((H, C, W * N + 2), 7.0)
    full[..., :-2] = host.rows(a).reshape(H, C, W * N)
    return host.images(np.lib.stride_tricks.as_strided(full, (H, C, W, N), (*full.strides[:2], N * 8, 8)))


@pytest.mark.parametrize("lower, upper", [("forward", "conv"), ("input_gradient", "conv_input_gradient"),
                                          ("weight_gradient", "conv_weight_gradient")])
def test_an_engine_convolves_with_kept_entries_alone(way, monkeypatch, lower, upper):
    """Each direction takes the way that was chosen."""
    called, real = [], getattr(sparse, lower)
    monkeypatch.setattr(sparse, lower, lambda *args: called.append(lower) or real(*args))
    layer = nn.Conv2d(8, 8, 3, padding=1)
    nn.sparsify(nn.Sequential(layer), 50, seed=0)
    layer(nn.Tensor(np.ones((2, 8, 6, 6), np.float32), requires_grad=True)).sum().backward()
    assert called == [lower] * (way == "sparse")


# ---------------------------------------------------------------------------------------------- operations


@DTYPES
@pytest.mark.parametrize("name, operation, theirs, shapes", IMAGES, ids=[case[0] for case in IMAGES])
def test_operation_in_every_memory_order(name, operation, theirs, shapes, dtype):
    """Images, what is added and the output's gradient in each order; nothing is written into."""
    rng = np.random.default_rng(8)
    arrays = [rng.standard_normal(s).astype(dtype) for s in shapes]
    weights = rng.standard_normal(operation(*map(nn.Tensor, arrays)).shape).astype(dtype)
    want = None
    for order in [*ORDERS] if np.prod(shapes[0]) < 10_000 else ["C", "halo 1"]:
        stored = [ORDERS[order](a) if a.ndim == 4 else a for a in (*arrays, weights)]
        out, gradients = evaluate(operation, stored[:-1], stored[-1])
        want = want or [a.astype(np.float64) for a in (out, *gradients)]  # test_nn.py compares these with PyTorch
        check([out, *gradients], want, dtype)
        for now, before in zip(stored, (*arrays, weights)):
            np.testing.assert_array_equal(now, before)


# ---------------------------------------------------------------------------------------------- BatchNorm


@DTYPES
@pytest.mark.parametrize("shape", [(8, 3, 5, 4), (1, 3, 4, 5), (6, 2, 1, 1), (3, 4, 1, 6), (32, 8, 16, 16)], ids=str)
def test_batch_norm_layer_follows_pytorch(shape, dtype):
    """Outputs, gradients and running estimates over five training steps, then in evaluation mode."""
    torch, rng = import_torch(), np.random.default_rng(9)
    ours, theirs = nn.BatchNorm2d(shape[1], dtype=dtype), torch.nn.BatchNorm2d(shape[1]).double()
    assert list(ours.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert (ours.weight.data == 1).all() and not ours.bias.data.any()
    for p, q in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        p.data[...] = rng.standard_normal(shape[1])
        q.data = torch.tensor(p.data.astype(np.float64))
    for step in range(7):
        ours.train(step < 5)
        theirs.train(step < 5)
        x, g = ((rng.standard_normal(shape) * (step + 1) + step).astype(dtype) for _ in range(2))
        images, twin = nn.Tensor(in_engine(x, 1), requires_grad=True), torch.tensor(x.astype(np.float64))
        twin.requires_grad = True
        out, want = ours(images), theirs(twin)
        ours.weight.grad = ours.bias.grad = theirs.weight.grad = theirs.bias.grad = None
        out.backward(g)
        want.backward(torch.tensor(g.astype(np.float64)))
        check([out.data, images.grad, ours.weight.grad, ours.bias.grad, ours.running_mean, ours.running_var],
              [t.detach().numpy() for t in (want, twin.grad, theirs.weight.grad, theirs.bias.grad, theirs.running_mean,
                                            theirs.running_var)], dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", ["x", "add", "add is x"])
def test_fused_batch_norm_is_the_composed_one(wanted, training):
    """Where only one of the images wants a gradient, and where both are the same."""
    rng = np.random.default_rng(10)
    a, b, g = (rng.standard_normal((3, 4, 5, 6)) for _ in range(3))
    results = []
    for fused in (True, False):
        x, add = nn.Tensor(a, requires_grad=wanted != "add"), nn.Tensor(b, requires_grad=wanted != "x")
        image = x * 2 if wanted == "add is x" else x
        other = image if wanted == "add is x" else add
        layer = nn.BatchNorm2d(4, dtype=np.float64).train(training)
        out = layer(image, add=other, relu=True) if fused else nn.relu(layer(image) + other)
        out.backward(g)
        gradients = [t.grad for t in (x, add) if t.grad is not None]
        results.append([out.data, layer.weight.grad, layer.bias.grad, *gradients])
    for ours, composed in zip(*results, strict=True):
        np.testing.assert_allclose(ours, composed, rtol=1e-12, atol=1e-12)


def test_batch_norm_far_from_zero_loses_no_variance():
    """Mean 1000, deviation 0.01 in float32: entries have 160 steps a deviation; the sum of squares would lose all.

    Also where the first row of the images lies elsewhere than the others.
    """
    x = (1000 + 0.01 * np.random.default_rng(11).standard_normal((16, 3, 12, 12))).astype(np.float32)
    x[:, 1, 0] += 0.5
    x[:, 2] -= 2000
    exact = x.astype(np.float64)
    mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3))
    layer = nn.BatchNorm2d(3, momentum=1.0)
    out = layer(nn.Tensor(in_engine(x, 1)))
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-7)
    np.testing.assert_allclose(layer.running_var, var * 2304 / 2303, rtol=1e-5)
    want = (exact - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None]
    assert relative_error(out.data, want) < 1e-2


def test_batch_norm_of_constant_images():
    """A variance of 0: the bias comes out, and no gradient reaches x through the deviation."""
    layer, x = nn.BatchNorm2d(2), nn.Tensor(np.full((4, 2, 3, 3), 0.1, np.float32), requires_grad=True)
    layer.bias.data[...] = 3
    out = layer(x)
    out.backward(np.ones_like(out.data))
    np.testing.assert_allclose(out.data, 3, atol=1e-4)
    np.testing.assert_allclose(x.grad, 0, atol=1e-3)


# ---------------------------------------------------------------------------------------------- pools


def test_max_pools_of_random_shapes():
    """Small whole numbers, so that there are many ties; half the images are all negative, in the others the largest are
    0: a padding of zeros would show in their outputs or take their gradients.
    """
    torch, rng = import_torch(), np.random.default_rng(12)
    for i in range(80):
        size, stride = (int(n) for n in rng.integers(1, 5, 2))
        padding = int(rng.integers(size // 2 + 1))
        N, C = rng.integers(1, 4, 2)
        H, W = (max(1, size - 2 * padding) + int(rng.integers(6)) for _ in range(2))
        x = rng.integers(-4, i % 2, (N, C, H, W)).astype(np.float64)
        twin = torch.tensor(x, requires_grad=True)
        want = torch.nn.functional.max_pool2d(twin, size, stride, padding)
        g = rng.standard_normal(want.shape)
        want.backward(torch.tensor(g))
        stored = list(ORDERS.values())[i % len(ORDERS)](x)
        out, gradients = evaluate(lambda x: nn.max_pool2d(x, size, stride, padding), [stored], g)
        check([out, *gradients], [want.detach().numpy(), twin.grad.numpy()], np.float64)
        np.testing.assert_array_equal(stored, x)


# ---------------------------------------------------------------------------------------------- layers


def test_convolution_layer():
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=True)
    x = nn.Tensor(np.random.default_rng(13).standard_normal((4, 3, 9, 8)).astype(np.float32))
    out = layer(x)
    out.sum().backward()
    np.testing.assert_array_equal(out.data, nn.conv2d(x, layer.weight, 2, 1).data + layer.bias.data[:, None, None])
    np.testing.assert_array_equal(layer.bias.grad, [4 * 5 * 4] * 5)


# ---------------------------------------------------------------------------------------------- threads and memory


THREADED = [*IMAGES, *(conv_case("conv2d", x, w, stride, w[2] // 2) for x, w, stride in (
    ((6, 5, 9, 8), (7, 5, 3, 3), 1), ((2, 3, 1, 5), (4, 3, 1, 1), 1), ((5, 24, 4, 4), (25, 24, 3, 3), 1),
    ((1, 24, 4, 4), (24, 24, 3, 3), 1), ((6, 25, 4, 16), (24, 25, 3, 3), 1), ((5, 24, 8, 16), (25, 24, 3, 3), 1)))]


@pytest.mark.parametrize("name, operation, theirs, shapes", THREADED, ids=[f"{case[0]} {case[3]}" for case in THREADED])
def test_results_hardly_depend_on_the_number_of_threads(use_threads, name, operation, theirs, shapes):
    """Sums may be made in another order by another number of threads, so last digits may differ; the same number always
    gives the same bits.
    """
    rng = np.random.default_rng(15)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    weights = rng.standard_normal(operation(*map(nn.Tensor, arrays)).shape).astype(np.float32)

    def results(count):
        use_threads(count)
        out, gradients = evaluate(operation, arrays, weights)
        return [out, *gradients]

    one = results(1)
    for count in (2, 3, 16):  # 16: more than there is work for
        for a, b, c in zip(one, results(count), results(count), strict=True):
            assert b.tobytes() == c.tobytes() and relative_error(b, a) < 5e-6  # measured: 1.5e-6


def test_parallel_work_covers_everything_once(use_threads, monkeypatch):
    for workers, count in itertools.product((1, 2, 3, 7), (1, 2, 3, 10)):
        use_threads(workers)
        parts = host.parallel(lambda first, last: (first, last), count, 1)
        assert len(parts) == min(workers, count)
        assert [i for first, last in parts for i in range(first, last)] == list(range(count))
        assert all(last - first in (count // len(parts), -(-count // len(parts))) for first, last in parts)
        assert host.each(lambda item: item**2, list(range(count))) == [i**2 for i in range(count)]
    monkeypatch.setattr(host, "WORTH", 100)
    assert [len(host.parallel(lambda *part: part, 10, cost)) for cost in (99, 100)] == [1, 7]  # small is not shared
    with pytest.raises(ZeroDivisionError):
        host.each(lambda item: 1 / item, [3, 2, 0, 1])
    assert host.each(lambda item: item, []) == []


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_any_thread_reaches_the_caller(use_threads, failing):
    use_threads(3)
    size, ended, begun = np.getbufsize(), [], threading.Barrier(3)

    def work(first, last):
        begun.wait()
        if first == failing:
            raise ArithmeticError(f"part {first}")
        np.sort(np.random.default_rng(0).random(10**6))
        ended.append(first)
        return first

    with pytest.raises(ArithmeticError, match=f"part {failing}"):
        host.parallel(work, 3, 1)
    assert sorted(ended) == [part for part in range(3) if part != failing]  # nobody works on in the background
    assert host.parallel(lambda first, last: first, 3, 1) == [0, 1, 2]  # the threads are still there
    assert np.getbufsize() == size != host.BUFFER


def address(array):
    return array.__array_interface__["data"][0]


def border(array, width):
    """The entries around images of the engine's order, up to this distance: their sum of absolute values."""
    full = host.bordered(array, width, width, width, width)
    assert np.shares_memory(full, array)  # no copy: this is the array's own border
    return np.abs(full).sum(dtype=np.float64) - np.abs(array).sum(dtype=np.float64)


@pytest.mark.parametrize("halo", [0, 1, 2])
def test_memory_is_used_again_when_its_last_view_is_gone(fresh_store, halo):
    shape = 3, 4, 5, 6
    first = host.empty(shape, np.float32, halo)
    view, place = first[1:, ::2].transpose(1, 0, 3, 2)[0], address(first)
    del first
    other = host.empty(shape, np.float32, halo)
    assert not np.shares_memory(view, other)  # a view is left
    del view
    assert address(host.empty((3, 4, 6, 5), np.float64, halo)) != place
    assert address(host.empty(shape, np.float32, halo)) == place


def test_the_border_of_zeros_stays_zero(fresh_store):
    """Through convolutions and BatchNorms that use the same memory again and again, and in every halo."""
    rng = np.random.default_rng(17)
    layers = [nn.BatchNorm2d(4) for _ in range(3)]
    for halo in (1, 2, 1, 2):
        x = nn.Tensor(in_engine(rng.standard_normal((3, 4, 6, 7)).astype(np.float32) + 5, halo))
        w = nn.Tensor(rng.standard_normal((4, 4, 3, 3)).astype(np.float32), requires_grad=True)
        y = layers[0](nn.conv2d(x, w, 1, 1), relu=True)
        z = layers[1](nn.conv2d(y, w, 1, 1), add=y, relu=True)
        out = layers[2](nn.conv2d(z, w, 1, 1), relu=True)
        outputs = y.data, z.data, out.data
        out.backward(rng.standard_normal(out.shape).astype(np.float32))
        sevens = in_engine(np.full(x.shape, 7.0), halo)
        for array, width in (*((a, 1) for a in outputs), (x.data, halo), (sevens, halo)):
            assert border(array, width) == 0


def test_arrays_that_are_kept_are_never_overwritten():
    """Results, gradients and views of them, while the same operations go on and use memory of the same sizes."""
    rng = np.random.default_rng(19)
    layer, w = nn.BatchNorm2d(4), nn.Tensor(rng.standard_normal((4, 4, 3, 3)).astype(np.float32), requires_grad=True)
    kept = []
    for i in range(12):
        x = nn.Tensor(rng.standard_normal((3, 4, 8, 8)).astype(np.float32), requires_grad=True)
        y = nn.conv2d(x, w, 1, 1)
        z = layer(y, add=x, relu=True)
        p = nn.max_pool2d(z, 3, 2, 1)
        arrays = [y.data, z.data[:, 1:], z.data[::2].T, memoryview(p.data)]
        if i % 2:
            p.sum().backward()
            arrays += [x.grad, w.grad]
        kept = kept[i % 3 :] + [(a, np.array(a)) for a in arrays]
        del x, y, z, p, arrays
        for array, copy in kept:
            np.testing.assert_array_equal(np.asarray(array), copy)


@pytest.mark.parametrize("spare", [(2000, 0.1), (0, 0.5)])
def test_the_store_of_memory_has_a_limit(fresh_store, monkeypatch, spare):
    """Used and stored memory stay below the most that was used and what is spared, whatever sizes come and go."""
    store = host.Buffer
    monkeypatch.setattr(store, "SPARE", spare)

    def check():
        assert int(np.sum([len(m) for stack in store.STORED.values() for m in stack])) == store.stored
        assert all(store.STORED.values()) and store.used <= store.most
        assert store.used + store.stored <= max(store.most + spare[0], (1 + spare[1]) * store.most)

    rng, arrays = np.random.default_rng(20), []
    for _ in range(600):
        if len(arrays) > 12 or arrays and rng.random() < 0.4:
            arrays.pop(int(rng.integers(len(arrays))))
        else:
            N, C, H, W = (int(n) for n in rng.integers(2, 7, 4))
            arrays.append(host.empty((N, C, H, W), np.float32, int(rng.integers(3))))
        check()
    assert store.used == sum(a.base.base.nbytes for a in arrays)


def test_memory_without_large_pages(fresh_store, monkeypatch):
    """Some systems refuse the advice to use them."""

    class Refusing(host.mmap.mmap):
        def madvise(self, advice):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(host.mmap, "mmap", Refusing)
    assert host.empty((2, 3, 4, 5), np.float32, 1).shape == (2, 3, 4, 5)


def test_threads_treat_overflow_as_their_caller_does(use_threads, recwarn):
    use_threads(2)
    with np.errstate(all="raise"):
        with pytest.raises(FloatingPointError):
            host.parallel(lambda first, last: np.float32([1e38]) * np.float32([10 ** first]) * 100, 2, 1e12)
    with np.errstate(all="ignore"):
        host.parallel(lambda first, last: np.float32([1e38]) * np.float32([100]), 2, 1e12)
    assert not recwarn.list


STEPS = """if True:
    import resource
    import numpy as np
    import nn
    from exp_resnet_cifar import ResNet18
    rng, net = np.random.default_rng(0), ResNet18(8, 10)
    nn.sparsify(net, 100_000, seed=0)
    optimizer = nn.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for step in range(12):
        x, labels = rng.standard_normal((16, 3, 32, 32), dtype=np.float32), rng.integers(0, 10, 16)
        nn.cross_entropy(net.train()(nn.Tensor(x)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        with nn.no_grad():
            net.eval()(nn.Tensor(x))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""


def output_of(code):
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(nn.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_steps_do_not_grow_memory():
    """The peak after the third step is that after twelve; one kept array of the first stage a step would add 13 %."""
    pytest.importorskip("resource", reason="a module of Unix")
    peaks = [int(line) for line in output_of(STEPS).split()]
    assert len(peaks) == 12 and peaks[-1] <= 1.05 * peaks[2], peaks


# ---------------------------------------------------------------------------------------------- what others notice


def surroundings():
    """What a program may have chosen for itself: threads of BLAS, NumPy's buffer and errors, handlers of signals."""
    blas = [(info["filepath"], info["num_threads"]) for info in threadpool_info() if info["user_api"] == "blas"]
    return blas, np.getbufsize(), np.geterr(), [signal.getsignal(s) for s in signal.valid_signals()]


@pytest.fixture(params=[1, 2])
def limited(request):
    """With BLAS at one thread, and at two."""
    with threadpool_limits(request.param, "blas"):
        yield


def train_a_little():
    net = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, padding=1))
    x = nn.Tensor(np.ones((2, 3, 8, 8), np.float32), requires_grad=True)
    out = nn.linear(nn.global_avg_pool(nn.max_pool2d(net(x), 2)), net[0].weight.reshape(27, 24))
    out.sum().backward()
    nn.SGD(net.parameters(), 0.1).step()


@pytest.mark.parametrize("failing", [None, "matmul", "copyto"])
def test_training_and_an_error_inside_change_nothing_for_others(limited, monkeypatch, failing):
    def interrupted(*arguments, **options):
        assert np.getbufsize() == host.BUFFER and all(get() == 1 for get, _ in host.one_blas_thread.libraries)
        raise KeyboardInterrupt

    before = surroundings()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if failing else contextlib.nullcontext():
        if failing:
            patch.setattr(np, failing, interrupted)
        train_a_little()
    assert surroundings() == before


def test_importing_changes_nothing_for_others():
    """Where a program of its own imports nn and convolves, in a process that knows nothing of these tests."""
    output_of("""if True:
        import signal, sys
        import numpy as np
        from threadpoolctl import threadpool_info
        def state():
            handlers = [signal.getsignal(s) for s in signal.valid_signals()]
            return threadpool_info(), np.getbufsize(), np.geterr(), handlers, sys.excepthook
        before = state()
        import nn
        assert state() == before, "import"
        nn.conv2d(nn.Tensor(np.ones((2, 3, 8, 8))), nn.Tensor(np.ones((24, 3, 3, 3))), 1, 1)
        assert state() == before, "convolution"
        assert not {"cupy", "scipy", "matplotlib", "datasets", "lab"} & set(sys.modules)""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    """Without them it would wait for its parent's for ever."""
    output_of("""if True:
        import os, threading
        import numpy as np
        import nn
        x, w = nn.Tensor(np.ones((64, 16, 32, 32), np.float32)), nn.Tensor(np.ones((32, 16, 3, 3), np.float32))
        nn.conv2d(x, w)
        child = os.fork()
        if not child:
            nn.conv2d(x, w)
            os._exit(7)
        threading.Timer(20, os.kill, (child, 9)).start()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        os._exit(0)""")


KNOWN_BLAS = pytest.mark.skipif(not surroundings()[0], reason="threadpoolctl does not know NumPy's BLAS")


def test_a_blas_that_does_not_tell_how_many_threads_it_has(monkeypatch):
    monkeypatch.setattr(host, "ThreadpoolController", lambda: types.SimpleNamespace(
        select=lambda user_api: types.SimpleNamespace(lib_controllers=[])))
    for name in host.THREADS:
        monkeypatch.delenv(name, raising=False)
    assert host.cores.__wrapped__() == host.available() >= 1
    monkeypatch.setenv("VECLIB_MAXIMUM_THREADS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert host.cores.__wrapped__() == 3
    guard = host.OneBlasThread()
    with guard:
        assert guard.libraries == []


@KNOWN_BLAS
def test_the_last_of_several_threads_restores_blas():
    """Two threads are inside at once; whichever leaves last restores what the first had found."""
    with threadpool_limits(2, "blas"), ThreadPoolExecutor(2) as pool:
        before, inside, gone = surroundings()[0], threading.Barrier(2), threading.Event()

        def enter(last):
            try:
                with host.one_blas_thread:
                    inside.wait()
                    if last:
                        gone.wait()
                    return [get() for get, _ in host.one_blas_thread.libraries]  # those that were there before
            finally:
                gone.set()

        for future in [pool.submit(enter, last) for last in (False, True)]:
            assert set(future.result()) == {1}
        assert surroundings()[0] == before


@KNOWN_BLAS
def test_linear_layers_beside_convolutions_use_one_thread(monkeypatch):
    """From an engine's first convolution on, since BLAS's own threads would go on spinning; before it, all of them."""
    class Spy(np.ndarray):
        def __matmul__(self, other):
            seen.append({n for _, n in surroundings()[0]})
            return np.asarray(self) @ np.asarray(other)

    engine, x, seen = engines.cpu.Engine(), np.ones((2, 3)).view(Spy), []
    vars(host.one_blas_thread).pop("libraries", None)  # SciPy's BLAS may have been loaded since they were listed
    with threadpool_limits(2, "blas"):
        engine.linear(x, np.ones((4, 3)), None, None)
        engine.conv(np.ones((1, 1, 2, 2)), np.ones((1, 1, 1, 1)), 1, 0)
        engine.linear(x, np.ones((4, 3)), None, None)
    assert seen == [{2}, {1}]


# ---------------------------------------------------------------------------------------------- batches


def cropped_slowly(image, padding, top, left, mirrored):
    _, H, W = image.shape
    image = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))[:, top : top + H, left : left + W]
    return image[:, :, ::-1] if mirrored else image


@pytest.mark.parametrize("padding", [None, 0, 3])
def test_batches_by_hand(padding):
    """In any order, crops and flips as drawn, in slices of several sizes, one of them empty; two epochs."""
    rng = np.random.default_rng(22)
    pixels, labels = rng.integers(0, 256, (50, 3, 6, 5)).astype(np.uint8), rng.integers(0, 10, 50)
    scale, shift = np.float32([0.1, 0.2, 0.3])[:, None, None], rng.standard_normal((3, 6, 5)).astype(np.float32)
    batches = nn.engine.Batches(pixels, labels, scale, shift, padding or 0)
    np.testing.assert_array_equal(batches.get(slice(45, 50))[1], labels[45:])  # without an order, their own
    for _ in range(2):
        order, draws, previous = rng.permutation(50)[:40], None, np.zeros((2, 0))
        images = pixels[order]
        if padding is not None:
            draws = rng.integers(0, [[2 * padding + 1], [2 * padding + 1], [2]], (3, 40))
            images = np.array([cropped_slowly(image, padding, *draw) for image, draw in zip(images, draws.T)])
        batches.begin(order, draws)
        assert batches.prefetch == (padding is not None)
        for part in (slice(0, 8), slice(8, 24), slice(24, 24), slice(24, 36), slice(36, 40)):
            x, y = batches.get(part)
            np.testing.assert_array_equal(x, images[part].astype(np.float32) * scale + shift)
            np.testing.assert_array_equal(y, labels[order[part]])
            assert x.dtype == np.float32 and y.dtype == np.int64
            if draws is not None:  # the batch before is still there
                np.testing.assert_array_equal(*previous)
            previous = x, x.copy()


def test_photographs_are_normalized_in_the_engines_order():
    pixels = np.random.default_rng(23).integers(0, 256, (5, 8, 7, 3)).astype(np.uint8)
    scale, shift = np.float32([0.1, 0.2, 0.3]), np.float32([1, -1, 0])
    x = nn.engine.normalized(pixels, scale, shift)
    np.testing.assert_array_equal(x, pixels.transpose(0, 3, 1, 2) * scale[:, None, None] + shift[:, None, None])
    assert x.dtype == np.float32 and border(x, 3) == 0
    assert nn.engine.upload([3, 1]).dtype == np.int64
