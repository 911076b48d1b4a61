"""The engine of the CPU: convolution, BatchNorm, pools and batches, threads and memory, and a whole ResNet-18."""

import collections
import itertools
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from test_nn import IMAGES, batch_norm, import_torch
from threadpoolctl import threadpool_info, threadpool_limits

import engines.cpu
import nn
from engines import convolution, host

TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture
def torch():
    return import_torch()


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
    "flipped in halo 1": lambda a: in_engine(a[:, :, ::-1, ::-1], 1)[:, :, ::-1, ::-1],
    "crop": lambda a: part_of((*a.shape[:2], a.shape[2] + 2, a.shape[3] + 2), np.s_[:, :, 1:-1, 1:-1], a, 1),
    "every other image": lambda a: part_of(grown(a.shape, 0, 0, 2), np.s_[::2], a, 1),
    "all but one image": lambda a: part_of(grown(a.shape, 0), np.s_[1:], a, 1),
    "every other channel": lambda a: part_of(grown(a.shape, 1, 0, 2), np.s_[:, ::2], a),
    "all but one column": lambda a: part_of(grown(a.shape, 3), np.s_[:, :, :, 1:], a),
    "all but one row": lambda a: part_of(grown(a.shape, 2), np.s_[:, :, 1:], a, 2),
}
# Here a step from row to row is not C steps from channel to channel, so rows of channels do not line up.
GAPS = {
    "all but one channel": lambda a: part_of(grown(a.shape, 1), np.s_[:, 1:], a),
    "first channels, halo 1": lambda a: part_of(grown(a.shape, 1, 2), np.s_[:, :-2], a, 1),
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


def convolve_in_pytorch(x, w, g, stride, padding):
    torch = import_torch()
    x, w = (torch.tensor(a, requires_grad=True) for a in (x, w))
    y = torch.nn.functional.conv2d(x, w, stride=stride, padding=padding)
    y.backward(torch.tensor(g))
    return y.detach().numpy(), x.grad.numpy(), w.grad.numpy()


REFERENCES = pytest.mark.parametrize("reference", [convolve_slowly, convolve_in_pytorch])


def draw(rng, dtype, x, w, stride, padding):
    """Random images x, weights w and output gradient g of these shapes."""
    H, W = ((n + 2 * padding - k) // stride + 1 for n, k in zip(x[2:], w[2:]))
    return [rng.standard_normal(shape).astype(dtype) for shape in (x, w, (x[0], w[0], H, W))]


def check_convolution(rng, dtype, reference, x, w, stride, padding, orders=("C", "C")):
    """nn.conv2d of random arrays of the shapes x and w, stored in these orders (images, output gradient)."""
    x, w, g = draw(rng, dtype, x, w, stride, padding)
    want = reference(*(a.astype(np.float64) for a in (x, w, g)), stride, padding)
    images, gradient = ((ORDERS | GAPS)[order](a) for order, a in zip(orders, (x, g)))
    tensor, weight = nn.Tensor(images, requires_grad=True), nn.Tensor(w.copy(), requires_grad=True)
    out = nn.conv2d(tensor, weight, stride, padding)
    out.backward(gradient)
    check((out.data, tensor.grad, weight.grad), want, dtype)
    for now, before in ((images, x), (weight.data, w), (gradient, g)):
        np.testing.assert_array_equal(now, before)  # nothing was written into


@REFERENCES
@pytest.mark.parametrize("kernel", list(itertools.product(range(1, 6), repeat=2)), ids=lambda k: f"{k[0]}x{k[1]}")
def test_convolution_of_random_shapes(kernel, reference):
    """14 shapes for each kernel: strides to 4, padding to 4 (more than many kernels), float32 and float64 in turn."""
    rng = np.random.default_rng(kernel)
    orders = itertools.product(ORDERS, repeat=2)
    for i, pair in zip(range(14), rng.permutation(list(orders))):
        stride, padding = (1, 2, 1, 3, 2, 4, 1)[i // 2], int(rng.integers(5))
        N, C, out = (int(n) for n in rng.integers(1, 6, 3))
        H, W = (max(1, k - 2 * padding) + int(rng.integers(10)) for k in kernel)
        dtype = (np.float32, np.float64)[i % 2]
        check_convolution(rng, dtype, reference, (N, C, H, W), (out, C, *kernel), stride, padding, pair)


@pytest.mark.parametrize("order", [*ORDERS, *GAPS])
def test_convolution_of_every_memory_order(order):
    rng = np.random.default_rng(1)
    for dtype, (k, stride, padding) in itertools.product(
            TOLERANCE, [(3, 1, 0), (3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (5, 1, 2), (2, 1, 0), (4, 2, 0)]):
        for orders in ((order, "C"), ("halo 1", order)):
            check_convolution(rng, dtype, convolve_slowly, (3, 4, 8, 7), (5, 4, k, k), stride, padding, orders)
    for padding in (0, 1, 2):
        shapes = (3, 24, 10 - 2 * padding, 6 - 2 * padding + 4), (25, 24, 3, 3)
        for orders in ((order, "C"), ("halo 1", order)):
            check_convolution(rng, np.float32, convolve_slowly, *shapes, 1, padding, orders)


@REFERENCES
@pytest.mark.parametrize("padding", range(5))
def test_convolution_in_tiles(padding, reference):
    """Nine shapes for each padding, 45 in all, that take Winograd's way in the forward pass."""
    rng = np.random.default_rng(padding)
    orders = rng.permutation(list(itertools.product(ORDERS, repeat=2)))
    few = convolution.TILES_FROM
    for i, (N, C, out, H, W) in enumerate([
            (1, few, few, 4, 4), (2, few + 1, few, 4, 8), (3, few, few + 7, 8, 4), (5, few + 3, few + 2, 8, 8),
            (1, 2 * few, few, 12, 12), (4, few, 2 * few, 4, 16), (7, few, few, 16, 4), (2, few, few + 1, 8, 32),
            (9, few + 1, few + 1, 12, 8)]):
        H_in, W_in = (max(1, n + 2 - 2 * padding) for n in (H, W))
        H_in, W_in = (n + -(n + 2 * padding - 2) % 4 for n in (H_in, W_in))  # the outputs' sizes are multiples of 4
        w = (out, C, 3, 3)
        assert convolution.use_tiles(w, 1, (H_in + 2 * padding - 2, W_in + 2 * padding - 2))
        dtype = (np.float32, np.float64)[(i + padding) % 2]
        check_convolution(rng, dtype, reference, (N, C, H_in, W_in), w, 1, padding, orders[i])


@REFERENCES
@pytest.mark.parametrize("x, w, stride, padding", [
    ((128, 8, 32, 32), (8, 8, 3, 3), 1, 1),  # several blocks of rows
    ((100, 18, 16, 18), (36, 18, 3, 3), 1, 1),  # rows in pieces
    ((64, 8, 32, 32), (16, 8, 3, 3), 2, 1), ((64, 16, 32, 32), (32, 16, 1, 1), 2, 0),
    ((5, 3, 64, 64), (64, 3, 7, 7), 2, 3),  # the stem of ImageNet's ResNet
    ((400, 24, 12, 8), (25, 24, 3, 3), 1, 1),  # many tiles
    ((200, 48, 12, 8), (50, 48, 3, 3), 1, 1),  # two passes over the rows of tiles, the second shorter
    ((31, 24, 16, 16), (24, 24, 3, 3), 1, 1),
])
def test_convolution_of_real_sizes(x, w, stride, padding, reference):
    check_convolution(np.random.default_rng(2), np.float32, reference, x, w, stride, padding, ("halo 1", "halo 1"))


def test_convolution_of_weights_in_any_order():
    """The three functions of the engine by themselves; weights need not be contiguous."""
    rng = np.random.default_rng(4)
    for shape, stride, padding in (((5, 4, 3, 3), 1, 1), ((5, 4, 3, 2), 2, 1), ((26, 24, 3, 3), 1, 1)):
        x, w, g = draw(rng, np.float64, (2, shape[1], 8, 12), shape, stride, padding)
        want = convolve_slowly(x, w, g, stride, padding)
        for weights in (np.asfortranarray(w), w[:, :, ::-1].copy()[:, :, ::-1], w.repeat(2, 0)[::2]):
            check((convolution.forward(x, weights, stride, padding),
                   convolution.input_gradient(g, weights, x.shape, stride, padding),
                   convolution.weight_gradient(g, x, weights.shape, stride, padding)), want, np.float64)


def test_convolution_by_hand():
    x = np.arange(9.0).reshape(1, 1, 3, 3)
    w = np.array([[[[1.0, 10.0], [100.0, 1000.0]]]])
    np.testing.assert_array_equal(nn.conv2d(nn.Tensor(x), nn.Tensor(w)).data[0, 0], [[4310, 5421], [7643, 8754]])
    np.testing.assert_array_equal(nn.conv2d(nn.Tensor(x), nn.Tensor(w), 2, 1).data[0, 0], [[0, 2100], [6030, 8754]])


def test_only_wanted_gradients_of_a_convolution_are_computed(monkeypatch):
    names = "conv_input_gradient", "conv_weight_gradient"
    for wanted, other in (names, names[::-1]):
        with monkeypatch.context() as patch:
            patch.setattr(nn.engine, other, None)
            tensors = [nn.Tensor(np.ones((1, 1, k, k)), requires_grad=name == wanted) for name, k in zip(names, (3, 2))]
            nn.conv2d(*tensors).sum().backward()
            assert [t.grad is not None for t in tensors] == [t.requires_grad for t in tensors]


@pytest.mark.parametrize("x, w, stride, padding, match", [
    ((2, 3, 8, 8), (4, 2, 3, 3), 1, 1, r"C.*\(2, 3, 8, 8\) and \(4, 2, 3, 3\)"),
    ((2, 24, 8, 8), (24, 48, 3, 3), 1, 1, "C"),
    ((3, 8, 8), (4, 3, 3, 3), 1, 1, r"\(N, C, H, W\)"),
    ((2, 3, 8, 8), (4, 3, 9), 1, 1, r"\(O, C, kh, kw\)"),
    ((2, 3, 4, 8), (4, 3, 5, 3), 1, 0, "5x3 kernel does not fit images of 4x8 with padding 0"),
    ((2, 3, 8, 4), (4, 3, 3, 7), 1, 1, "3x7 kernel does not fit images of 8x4 with padding 1"),
    ((2, 3, 2, 2), (4, 3, 5, 5), 4, 1, "does not fit"),
    ((2, 3, 8, 8), (4, 3, 3, 3), 0, 1, "stride of at least 1.*not 0 and 1"),
    ((2, 3, 8, 8), (4, 3, 3, 3), -1, 1, "stride of at least 1"),
    ((2, 3, 8, 8), (4, 3, 3, 3), 1, -1, "padding of at least 0, not 1 and -1"),
    ((0, 3, 8, 8), (4, 3, 3, 3), 1, 1, r"not \(0, 3, 8, 8\)"),
])
def test_shapes_that_do_not_fit_are_refused(x, w, stride, padding, match):
    with pytest.raises(ValueError, match=match):
        nn.conv2d(nn.Tensor(np.ones(x)), nn.Tensor(np.ones(w)), stride, padding)


def test_other_than_one_floating_type_is_refused():
    x, w = np.ones((2, 3, 4, 4), np.float32), np.ones((4, 3, 3, 3), np.float32)
    for a, b in ((x.astype(np.uint8), w), (x, w.astype(np.float64)), (x.astype(int), w.astype(int))):
        with pytest.raises(ValueError, match=f"one floating type, not {a.dtype} and {b.dtype}"):
            nn.conv2d(nn.Tensor(a), nn.Tensor(b))


def test_batch_norm_refuses_other_numbers_of_channels():
    for shape, add in (((2, 4, 5, 5), None), ((2, 3, 5), None), ((2, 3, 5, 5), (2, 3, 5, 1))):
        for layer in (nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()):
            with pytest.raises(ValueError, match=r"3 channels takes images \(N, 3, H, W\), not"):
                layer(nn.Tensor(np.ones(shape)), add=nn.Tensor(np.ones(add)) if add else None)
    with pytest.raises(ValueError, match="1 channels"):
        nn.BatchNorm2d(1).eval()(nn.Tensor(np.ones((2, 3, 4, 4))))


def test_winograd_multiplies_polynomials():
    """A^T ((G w) * (B^T d)) is the correlation of d with w, for several sizes and points, and convolution.py's own."""
    rng = np.random.default_rng(5)
    for m, r, points in ((4, 3, (0, 1, -1, 2, -2)), (2, 3, (0, 1, -1)), (3, 2, (0, 1, -1)), (1, 3, (1, 2)),
                         (4, 3, None)):
        A, G, B = convolution.winograd(m, r, points) if points else (convolution.A, convolution.G, convolution.B)
        d, w = rng.standard_normal(m + r - 1), rng.standard_normal(r)
        np.testing.assert_allclose(A.T @ ((G @ w) * (B.T @ d)), np.correlate(d, w, "valid"), rtol=1e-12, atol=1e-12)


def test_tiles_lose_little_precision():
    """In float32 Winograd's way has less than ten times the error of the direct one."""
    rng = np.random.default_rng(6)
    x, w, g = draw(rng, np.float32, (8, 64, 16, 16), (64, 64, 3, 3), 1, 1)
    args = x, w, 1, 1
    exact = convolution.forward(x.astype(np.float64), w.astype(np.float64), 1, 1)
    rows = convolution.forward(x[:, :, :, :-1], w, 1, 1)  # an odd width: not in tiles
    assert relative_error(rows[..., :-1], exact[..., : rows.shape[3] - 1]) < 1e-6
    assert relative_error(convolution.forward(*args), exact) < 5e-6
    exact = convolution.weight_gradient(g.astype(np.float64), x.astype(np.float64), w.shape, 1, 1)
    assert relative_error(convolution.weight_gradient(g, x, w.shape, 1, 1), exact) < 5e-6


# ---------------------------------------------------------------------------------------------- operations


def evaluate(operation, arrays, weights):
    """(output, gradients) of sum(output * weights) with respect to the arrays."""
    tensors = [nn.Tensor(a, requires_grad=True) for a in arrays]
    out = operation(*tensors)
    out.backward(weights)
    return out.data, [t.grad for t in tensors]


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
def test_batch_norm_layer_follows_pytorch(torch, shape, dtype):
    """Outputs, gradients and running estimates over five training steps, then in evaluation mode."""
    rng = np.random.default_rng(9)
    ours, theirs = nn.BatchNorm2d(shape[1], dtype=dtype), torch.nn.BatchNorm2d(shape[1]).double()
    assert (ours.eps, ours.momentum) == (theirs.eps, theirs.momentum) == (1e-5, 0.1)
    assert [name for name, _ in ours.named_parameters()] == ["weight", "bias"]
    assert list(ours.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert (ours.weight.data == 1).all() and not ours.bias.data.any()
    for p, q in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        p.data[...] = rng.standard_normal(shape[1])
        q.data = torch.tensor(p.data.astype(np.float64))
    for step in range(7):
        if step == 5:
            ours.eval()
            theirs.eval()
        x, g = ((rng.standard_normal(shape) * (step + 1) + step).astype(dtype) for _ in range(2))
        tensor, twin = nn.Tensor(in_engine(x, 1), requires_grad=True), torch.tensor(x.astype(np.float64))
        twin.requires_grad = True
        out, want = ours(tensor), theirs(twin)
        out.backward(g)
        want.backward(torch.tensor(g.astype(np.float64)))
        check([out.data, tensor.grad, ours.weight.grad, ours.bias.grad, ours.running_mean, ours.running_var],
              [want.detach().numpy(), twin.grad.numpy(), theirs.weight.grad.numpy(), theirs.bias.grad.numpy(),
               theirs.running_mean.numpy(), theirs.running_var.numpy()], dtype)
        for p in (ours.weight, ours.bias, theirs.weight, theirs.bias):
            p.grad = None


def test_running_estimates_by_hand():
    """Channel means 2 and 10, biased variances 1 and 4, unbiased n / (n - 1) = 2 times that; moved by a tenth."""
    layer = nn.BatchNorm2d(2, dtype=np.float64)
    x = nn.Tensor(np.array([[[[1.0, 3.0]], [[8.0, 12.0]]]]))
    out = layer(x)
    np.testing.assert_allclose(layer.running_mean, [0.2, 1.0], rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, [0.9 + 0.1 * 2, 0.9 + 0.1 * 8], rtol=1e-14)
    np.testing.assert_allclose(out.data[0, :, 0], [[-1, 1], [-1, 1]], rtol=1e-5)
    layer.eval()
    out = layer(x)
    np.testing.assert_allclose(layer.running_mean, [0.2, 1.0], rtol=1e-14)  # unchanged
    np.testing.assert_allclose(out.data[0, 0, 0], [0.8 / (1.1 + 1e-5) ** 0.5, 2.8 / (1.1 + 1e-5) ** 0.5], rtol=1e-14)


@pytest.mark.parametrize("training, with_relu", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("wanted", ["x", "add", "both", "add is x"])
def test_fused_batch_norm_is_the_composed_one(training, with_relu, wanted):
    """Also where only one of the images wants a gradient, and where both are the same."""
    rng = np.random.default_rng(10)
    shape = (3, 4, 5, 6)
    values = [rng.standard_normal(s) for s in (shape, shape, shape, 4, 4)]
    results = []
    for fused in (True, False):
        x, add = nn.Tensor(values[0], requires_grad=wanted != "add"), nn.Tensor(values[1], requires_grad=wanted != "x")
        leaves = x, add
        if wanted == "add is x":
            leaf = nn.Tensor(values[0], requires_grad=True)
            x = add = leaf * 2
            leaves = (leaf,)
        layer = nn.BatchNorm2d(4, dtype=np.float64)
        layer.weight.data[...], layer.bias.data[...] = values[3:]
        layer.train(training)
        if fused:
            out = layer(x, add=add, relu=with_relu)
        else:
            out = layer(x) + add
            out = nn.relu(out) if with_relu else out
        out.backward(values[2])
        results.append([out.data, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var,
                        *(t.grad for t in leaves)])
    for ours, composed in zip(*results):
        assert (ours is None) == (composed is None)
        if ours is not None:
            np.testing.assert_allclose(ours, composed, rtol=1e-12, atol=1e-12)


def test_batch_norm_far_from_zero_loses_no_variance():
    """Mean 1000, deviation 0.01 in float32: entries have 160 steps a deviation; the sum of squares would lose all.

    Also where the first row of the images lies elsewhere than the others.
    """
    rng = np.random.default_rng(11)
    x = (1000 + 0.01 * rng.standard_normal((16, 3, 12, 12))).astype(np.float32)
    x[:, 1, 0] += 0.5
    x[:, 2] -= 2000
    exact = x.astype(np.float64)
    n = x.size // 3
    layer = nn.BatchNorm2d(3, momentum=1.0)
    layer.running_mean[...] = layer.running_var[...] = 0
    out = layer(nn.Tensor(in_engine(x, 1)))
    np.testing.assert_allclose(layer.running_mean, exact.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(layer.running_var, exact.var((0, 2, 3)) * n / (n - 1), rtol=1e-5)
    want = (exact - exact.mean((0, 2, 3), keepdims=True)) / np.sqrt(exact.var((0, 2, 3), keepdims=True) + 1e-5)
    assert relative_error(out.data, want) < 1e-2


def test_batch_norm_of_constant_images():
    """A variance of 0: the bias comes out, and no gradient reaches x through the deviation."""
    layer = nn.BatchNorm2d(2)
    layer.bias.data[...] = 3
    x = nn.Tensor(np.full((4, 2, 3, 3), 0.1, np.float32), requires_grad=True)
    out = layer(x)
    np.testing.assert_allclose(out.data, 3, atol=1e-4)
    out.backward(np.ones_like(out.data))
    np.testing.assert_allclose(x.grad, 0, atol=1e-3)


def test_one_value_for_each_channel_has_no_variance():
    layer = nn.BatchNorm2d(3)
    x = nn.Tensor(np.ones((1, 3, 1, 1), np.float32))
    with pytest.raises(ValueError, match=r"more than one value for each channel .* not images of \(1, 3, 1, 1\)"):
        layer(x)
    assert not layer.running_mean.any() and (layer.running_var == 1).all()
    layer.eval()
    np.testing.assert_allclose(layer(x).data, 1, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- pools


def pool_slowly(x, g, size, stride, padding):
    """(y, dx) one window at a time; the gradient of a maximum goes to the first of equals."""
    N, C, H, W = x.shape
    edge = (padding, padding)
    x = np.pad(x, ((0, 0), (0, 0), edge, edge), constant_values=-np.inf)
    y, dx = np.empty_like(g), np.zeros_like(x)
    for n, c, i, j in np.ndindex(g.shape):
        window = np.s_[n, c, stride * i : stride * i + size, stride * j : stride * j + size]
        y[n, c, i, j] = x[window].max()
        share = np.arange(size**2) == x[window].argmax()
        dx[window] += g[n, c, i, j] * share.reshape(size, size)
    return y, dx[:, :, padding : padding + H, padding : padding + W]


def test_max_pools_of_random_shapes():
    """Small whole numbers, so that there are many ties; half the images are all negative, in the others the largest are
    0: a padding of zeros would show in their outputs or take their gradients.
    """
    rng = np.random.default_rng(12)
    for i in range(80):
        size, stride = (int(n) for n in rng.integers(1, 5, 2))
        padding = int(rng.integers(size // 2 + 1))
        N, C = rng.integers(1, 4, 2)
        H, W = (max(1, size - 2 * padding) + int(rng.integers(6)) for _ in range(2))
        x = rng.integers(-4, i % 2, (N, C, H, W)).astype(np.float64)
        g = rng.standard_normal((N, C, *((n + 2 * padding - size) // stride + 1 for n in (H, W))))
        want = pool_slowly(x, g, size, stride, padding)
        tensor = nn.Tensor(list(ORDERS.values())[i % len(ORDERS)](x), requires_grad=True)
        out = nn.max_pool2d(tensor, size, stride, padding)
        out.backward(g)
        check([out.data, tensor.grad], want, np.float64)
        np.testing.assert_array_equal(tensor.data, x)


@pytest.mark.parametrize("settings", [(5,), (0,), (2, 0), (2, -1), (2, 1, -1), (3, 1, 2), (2, 2, 2)], ids=str)
def test_windows_that_do_not_fit_are_refused(settings):
    with pytest.raises(ValueError, match=f"windows of {settings[0]}x{settings[0]}.*images of 4x6"):
        nn.max_pool2d(nn.Tensor(np.ones((1, 1, 4, 6))), *settings)


# ---------------------------------------------------------------------------------------------- layers


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_layer_follows_pytorch(torch, bias, dtype):
    rng = np.random.default_rng(13)
    ours = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias, dtype=dtype, rng=rng)
    theirs = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias).double()
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    for p, q in pairs:
        assert p.dtype == dtype
        q.data = torch.tensor(p.data.astype(np.float64))
    x = rng.standard_normal((4, 3, 9, 8)).astype(dtype)
    out, want = ours(nn.Tensor(x)), theirs(torch.tensor(x.astype(np.float64)))
    (out * out).sum().backward()
    (want * want).sum().backward()
    check([out.data, *(p.grad for p, _ in pairs)], [want.detach().numpy(), *(q.grad.numpy() for _, q in pairs)], dtype)


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("density", [0.5, 0.02])
def test_masked_convolution_weights_stay_exactly_zero(channels, density):
    """Rows and tiles, an ordinary mask and one so sparse that only the kept entries take part in a step."""
    rng = np.random.default_rng(14)
    net = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
    nn.sparsify(net, int(density * 9 * channels**2), seed=0)
    mask, start = net[0].weight.mask, net[0].weight.data.copy()
    optimizer = nn.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(4):
        x = nn.Tensor(rng.standard_normal((2, channels, 8, 8)).astype(np.float32))
        (net(x) * rng.standard_normal((2, channels, 8, 8)).astype(np.float32)).sum().backward()
        assert not net[0].weight.grad[~mask].any() and net[0].weight.grad[mask].all()
        optimizer.step()
        optimizer.zero_grad()
    assert not net[0].weight.data[~mask].any() and (net[0].weight.data != start)[mask].all()


# ---------------------------------------------------------------------------------------------- threads and memory


def all_results(rng):
    """What every operation gives: [(name, array)], from random images of a few shapes."""
    found = []
    for x, w, stride in (
            ((6, 5, 9, 8), (7, 5, 3, 3), 1), ((6, 5, 9, 8), (7, 5, 3, 3), 2), ((3, 5, 8, 8), (7, 5, 1, 1), 2),
            ((5, 24, 4, 4), (25, 24, 3, 3), 1), ((6, 24, 4, 4), (25, 24, 3, 3), 1),
            ((5, 24, 8, 16), (25, 24, 3, 3), 1)):
        x, w, g = draw(rng, np.float32, x, w, stride, w[2] // 2)
        name = f"{x.shape} {w.shape} {stride}"
        found += [(f"forward {name}", convolution.forward(x, w, stride, w.shape[2] // 2)),
                  (f"input gradient {name}", convolution.input_gradient(g, w, x.shape, stride, w.shape[2] // 2)),
                  (f"weight gradient {name}", convolution.weight_gradient(g, x, w.shape, stride, w.shape[2] // 2))]
    shape = (8, 5, 9, 7)
    for operation in (batch_norm(relu=True), batch_norm(training=False)):
        arrays = [rng.standard_normal(s).astype(np.float32) for s in (shape, 5, 5, shape, shape)]
        out, gradients = evaluate(operation, arrays[:-1], arrays[-1])
        found += [("batch_norm", out), *zip(("dx", "dweight", "dbias", "dadd"), gradients)]
    return found


def test_results_hardly_depend_on_the_number_of_threads(use_threads):
    """Weight gradients and BatchNorm's sums are made by each thread for its rows, so their last digits may differ;
    the same number of threads always gives the same bits.
    """
    use_threads(1)
    one = all_results(np.random.default_rng(15))
    for count in (2, 3, 16):  # 16: more than there is work for
        use_threads(count)
        many, again = (all_results(np.random.default_rng(15)) for _ in range(2))
        for (name, a), (_, b), (_, c) in zip(one, many, again, strict=True):
            assert b.tobytes() == c.tobytes(), name
            assert relative_error(b, a) < 2e-6, name
            if name.startswith(("forward", "input")):
                assert a.tobytes() == b.tobytes(), name


@REFERENCES
def test_convolution_by_several_threads(use_threads, reference):
    rng = np.random.default_rng(16)
    for count in (2, 3):
        use_threads(count)
        for N, C, out, H, W, k, stride in (
                (5, 4, 3, 7, 8, 3, 1), (5, 4, 3, 7, 8, 3, 2), (2, 3, 4, 1, 5, 1, 1), (5, 24, 26, 4, 4, 3, 1),
                (6, 24, 26, 4, 4, 3, 1), (1, 24, 24, 4, 4, 3, 1), (3, 26, 24, 12, 8, 3, 1), (6, 25, 24, 4, 16, 3, 1)):
            for dtype, order in itertools.product(TOLERANCE, ("halo 1", "C")):
                check_convolution(rng, dtype, reference, (N, C, H, W), (out, C, k, k), stride, k // 2, (order, order))


def test_parallel_work_covers_everything_once(use_threads):
    for workers, count in itertools.product((1, 2, 3, 7), (1, 2, 3, 10)):
        use_threads(workers)
        parts = host.parallel(lambda first, last: (first, last), count, 1)
        assert len(parts) == min(workers, count)
        assert [i for first, last in parts for i in range(first, last)] == list(range(count))
        assert all(last - first in (count // len(parts), -(-count // len(parts))) for first, last in parts)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_any_thread_reaches_the_caller(use_threads, failing):
    use_threads(3)
    size = np.getbufsize()

    ended, begun = [], threading.Barrier(3)

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


def test_work_that_is_small_is_not_shared(use_threads, monkeypatch):
    use_threads(2)
    monkeypatch.setattr(host, "WORTH", 100)
    assert host.parallel(lambda first, last: (first, last), 10, 99) == [(0, 10)]
    assert host.parallel(lambda first, last: (first, last), 10, 100) == [(0, 5), (5, 10)]


def address(array):
    return array.__array_interface__["data"][0]


def border(array, width):
    """The entries around images of the engine's order, up to this distance: their sum of absolute values."""
    full = host.bordered(array, width, width, width, width)
    assert np.shares_memory(full, array)  # no copy: this is the array's own border
    return np.abs(full).sum(dtype=np.float64) - np.abs(array).sum(dtype=np.float64)


@pytest.mark.parametrize("halo", [0, 1, 2])
def test_memory_is_used_again_when_its_last_view_is_gone(fresh_store, halo):
    first = host.empty((3, 4, 5, 6), np.float32, halo)
    view = first[1:, ::2].transpose(1, 0, 3, 2)[0]
    place = address(first)
    second = host.empty((3, 4, 5, 6), np.float32, halo)
    assert not np.shares_memory(first, second)
    del first
    third = host.empty((3, 4, 5, 6), np.float32, halo)
    assert not np.shares_memory(view, third)  # a view is left
    del view
    other = host.empty((3, 4, 6, 5), np.float64, halo)
    assert address(other) != place
    assert address(host.empty((3, 4, 5, 6), np.float32, halo)) == place


def test_the_border_of_zeros_stays_zero(fresh_store):
    """Through convolutions and BatchNorms that use the same memory again and again, and in every halo."""
    rng = np.random.default_rng(17)
    for repeat in range(4):
        x = nn.Tensor(in_engine(rng.standard_normal((3, 4, 6, 7)).astype(np.float32) + 5, 1 + repeat % 2))
        w = nn.Tensor(rng.standard_normal((4, 4, 3, 3)).astype(np.float32), requires_grad=True)
        layers = [nn.BatchNorm2d(4) for _ in range(3)]
        y = layers[0](nn.conv2d(x, w, 1, 1), relu=True)
        z = layers[1](nn.conv2d(y, w, 1, 1), add=y)
        out = layers[2](z, relu=repeat > 1)
        outputs = y.data, z.data, out.data
        out.backward(rng.standard_normal(out.shape).astype(np.float32))
        assert all(border(a, 1) == 0 for a in outputs)
        assert border(x.data, 1 + repeat % 2) == 0
        for halo in (1, 2):
            fresh = host.empty((3, 4, 6, 7), np.float32, halo)
            fresh[...] = 7
            assert border(fresh, halo) == 0


def test_bordered_is_a_view_where_it_can_be():
    rng = np.random.default_rng(18)
    x = rng.standard_normal((3, 4, 5, 6))
    for order, a in ((name, store(x)) for name, store in (ORDERS | GAPS).items()):
        for top, bottom, left, right in ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (1, 0, 2, 1), (-1, -2, 0, -1),
                                         (-1, 2, 1, -3), (3, 3, 3, 3), (-4, 0, 0, -5)):
            got = host.bordered(a, top, bottom, left, right)
            want = np.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)))
            want = want[:, :, 4 - top : 9 + bottom, 4 - left : 10 + right].transpose(2, 1, 3, 0)
            np.testing.assert_array_equal(got, want)
            assert got.strides[2:] == (3 * 8, 8)
            if order in ("engine", "halo 1", "halo 2"):
                halo = int(order[-1]) if order[-1].isdigit() else 0
                assert np.shares_memory(got, a) == (max(top, bottom, left, right) <= halo)


def test_arrays_that_are_kept_are_never_overwritten():
    """Results, gradients and views of them, while the same operations go on and use memory of the same sizes."""
    rng = np.random.default_rng(19)
    layer, w = nn.BatchNorm2d(4), nn.Tensor(rng.standard_normal((4, 4, 3, 3)).astype(np.float32), requires_grad=True)
    kept = []
    for _ in range(12):
        x = nn.Tensor(rng.standard_normal((3, 4, 8, 8)).astype(np.float32), requires_grad=True)
        y = nn.conv2d(x, w, 1, 1)
        z = layer(y, add=x, relu=True)
        p = nn.max_pool2d(z, 3, 2, 1)
        arrays = [y.data, z.data[:, 1:], z.data[::2].T, np.asarray(p.data), as_strided(z.data, (2, 2), (0, 4))]
        if rng.random() < 0.5:
            p.sum().backward()
            arrays += [x.grad, w.grad, convolution.input_gradient(y.data, w.data, x.shape, 1, 1)[..., 0]]
        kept += [(a, a.copy()) for a in arrays]
        del x, y, z, p, arrays
        if len(kept) > 60:
            del kept[::3]
        for array, copy in kept:
            np.testing.assert_array_equal(array, copy)
    views = [memoryview(a) for a, _ in kept]
    copies = [copy for _, copy in kept]
    del kept, array, copy
    for _ in range(3):
        layer(nn.conv2d(nn.Tensor(rng.standard_normal((3, 4, 8, 8)).astype(np.float32)), w, 1, 1), relu=True)
    for view, copy in zip(views, copies):
        np.testing.assert_array_equal(np.asarray(view), copy)


def test_the_store_of_memory_has_a_limit(fresh_store):
    """Used and stored memory stay below 1.5 times the most that was used, whatever sizes come and go."""
    store = host.Buffer

    def check():
        assert int(np.sum([len(m) for stack in store.STORED.values() for m in stack])) == store.stored
        assert all(store.STORED.values()) and store.used <= store.most
        assert store.used + store.stored <= 1.5 * store.most

    rng, arrays = np.random.default_rng(20), []
    for _ in range(600):
        if len(arrays) > 12 or arrays and rng.random() < 0.4:
            arrays.pop(int(rng.integers(len(arrays))))
        else:
            N, C, H, W = (int(n) for n in rng.integers(2, 7, 4))
            arrays.append(host.empty((N, C, H, W), np.float32, int(rng.integers(3))))
        check()
    assert store.used == sum(a.base.base.nbytes for a in arrays)
    for batch in (4, 3, 4, 1):  # a last batch of another size does not keep memory of its own for good
        for _ in range(3):
            x = nn.Tensor(np.ones((batch, 3, 8, 8), np.float32), requires_grad=True)
            w = nn.Tensor(np.ones((3, 3, 3, 3), np.float32))
            nn.BatchNorm2d(3)(nn.conv2d(x, w, 1, 1), relu=True).sum().backward()
            check()


def test_what_was_used_last_is_stored_longest(fresh_store):
    def stored():
        return list(host.Buffer.STORED)

    first, second = host.scratch((400,), np.uint8), host.scratch((500,), np.uint8)
    del first, second  # 900 bytes were in use
    assert stored() == [400, 500]
    host.scratch((400,), np.uint8)  # used and given back at once
    assert stored() == [500, 400]
    kept = [host.scratch((n,), np.uint8) for n in (300, 100)]  # there is room for both beside the 900
    assert stored() == [500, 400]
    kept.append(host.scratch((100,), np.uint8))
    assert stored() == [400] and len(kept) == 3


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


STEPS = """
import resource
import numpy as np
import nn
from exp_resnet_cifar import ResNet18

rng = np.random.default_rng(0)
net = ResNet18(8, 10)
nn.sparsify(net, 100_000, seed=0)
optimizer = nn.SGD(net.parameters(), lr=0.01, momentum=0.9)
for step in range(12):
    x, labels = rng.standard_normal((16, 3, 32, 32), dtype=np.float32), rng.integers(0, 10, 16)
    nn.cross_entropy(net(nn.Tensor(x)), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    with nn.no_grad():
        net.eval()(nn.Tensor(x))
        net.train()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_training_steps_do_not_grow_memory():
    """The peak after the third step is that after twelve; one kept array of the first stage a step would add 13 %."""
    pytest.importorskip("resource", reason="a module of Unix")
    done = subprocess.run([sys.executable, "-c", STEPS], cwd=Path(nn.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 12 and peaks[-1] <= 1.05 * peaks[2], peaks


# ---------------------------------------------------------------------------------------------- what others notice


def surroundings():
    """What a program may have chosen for itself: threads of BLAS, NumPy's buffer and errors, handlers of signals."""
    blas = [(library["filepath"], library["num_threads"]) for library in threadpool_info() if library["user_api"] == "blas"]
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


def test_training_changes_nothing_for_others(limited):
    before = surroundings()
    train_a_little()
    assert surroundings() == before


@pytest.mark.parametrize("name", ["matmul", "copyto"])
def test_an_error_inside_changes_nothing_for_others(limited, monkeypatch, name):
    before = surroundings()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def interrupted(*arguments, **options):
            assert np.getbufsize() == host.BUFFER and all(n == 1 for _, n in surroundings()[0])
            raise KeyboardInterrupt

        patch.setattr(np, name, interrupted)
        train_a_little()
    assert surroundings() == before


def test_importing_changes_nothing_for_others():
    """Where a program of its own imports nn and convolves, in a process that knows nothing of these tests."""
    code = """if True:
        import signal, sys
        import numpy as np
        from threadpoolctl import threadpool_info
        def state():
            return (threadpool_info(), np.getbufsize(), np.geterr(), [signal.getsignal(s) for s in signal.valid_signals()],
                    sys.excepthook)
        before = state()
        import nn
        assert state() == before, "import"
        nn.conv2d(nn.Tensor(np.ones((2, 3, 8, 8))), nn.Tensor(np.ones((24, 3, 3, 3))), 1, 1)
        assert state() == before, "convolution"
        assert not {"cupy", "scipy", "matplotlib", "datasets", "lab"} & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(nn.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_last_of_several_threads_restores_blas():
    """Two threads are inside at once; whichever leaves last restores what the first had found."""
    with threadpool_limits(2, "blas"):
        before, inside, done = surroundings()[0], threading.Barrier(2), threading.Event()

        def first():
            with host.one_blas_thread:
                inside.wait()
                assert all(n == 1 for _, n in surroundings()[0])
            done.set()

        def last():
            with host.one_blas_thread:
                inside.wait()
                done.wait()
                assert all(n == 1 for _, n in surroundings()[0])

        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(first), pool.submit(last)]:
                future.result()
        assert surroundings()[0] == before


def test_linear_layers_beside_convolutions_use_one_thread(monkeypatch):
    """From an engine's first convolution on, since BLAS's own threads would go on spinning; before it, all of them."""
    class Spy(np.ndarray):
        def __matmul__(self, other):
            seen.append({n for _, n in surroundings()[0]})
            return np.asarray(self) @ np.asarray(other)

    engine, x, seen = engines.cpu.Engine(), np.ones((2, 3)).view(Spy), []
    with threadpool_limits(2, "blas"):
        engine.linear(x, np.ones((4, 3)), None, None)
        engine.conv(np.ones((1, 1, 2, 2)), np.ones((1, 1, 1, 1)), 1, 0)
        engine.linear(x, np.ones((4, 3)), None, None)
    assert seen == [{2}, {1}]


def test_each_item_is_worked_on_once(use_threads):
    for count in (1, 2, 5):
        use_threads(count)
        assert host.each(lambda item: item**2, list(range(40))) == [i**2 for i in range(40)]
        assert host.each(lambda item: item, []) == []
        with pytest.raises(ZeroDivisionError):
            host.each(lambda item: 1 / item, [3, 2, 0, 1])


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
    for epoch in range(2):
        order, draws = rng.permutation(50)[:40], None
        if padding is not None:
            draws = rng.integers(0, [[2 * padding + 1], [2 * padding + 1], [2]], (3, 40))
        batches.begin(order, draws)
        assert batches.prefetch == (padding is not None)
        previous = None
        for part in (slice(0, 8), slice(8, 24), slice(24, 24), slice(24, 36), slice(36, 40)):
            x, y = batches.get(part)
            places = range(40)[part]
            want = np.array([pixels[order[i]] if draws is None else
                             cropped_slowly(pixels[order[i]], padding, *draws[:, i]) for i in places]).reshape(-1, 3, 6, 5)
            np.testing.assert_array_equal(x, want.astype(np.float32) * scale + shift)
            np.testing.assert_array_equal(y, labels[order[part]])
            assert x.dtype == np.float32 and y.dtype == np.int64
            if draws is not None and previous is not None:  # the batch before is still there
                np.testing.assert_array_equal(*previous)
            previous = x, x.copy()
    batches = nn.engine.Batches(pixels, labels, scale, shift)
    np.testing.assert_array_equal(batches.get(slice(45, 50))[1], labels[45:])  # without an order, their own


def test_photographs_are_normalized_in_the_engines_order():
    pixels = np.random.default_rng(23).integers(0, 256, (5, 8, 7, 3)).astype(np.uint8)
    scale, shift = np.float32([0.1, 0.2, 0.3]), np.float32([1, -1, 0])
    x = nn.engine.normalized(pixels, scale, shift)
    np.testing.assert_array_equal(x, pixels.transpose(0, 3, 1, 2) * scale[:, None, None] + shift[:, None, None])
    assert x.dtype == np.float32 and border(x, 3) == 0
    assert nn.engine.upload([3, 1]).dtype == np.int64
