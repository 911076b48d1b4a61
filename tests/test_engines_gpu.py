"""engines/gpu.py, gpu_convolution.py and gpu.cu: the kernels compile, every result is that of the CPU; and whole runs.

What has the fixture `engine` runs on a GPU, or on a simulated one. Every convolution's plan: proofs/test_gpu_proofs.py.
"""

import gc
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from simulated_gpu import launches

import exp_bottleneck as bottleneck
import exp_mlp_mnist as mlp
import exp_resnet_cifar as resnet
import exp_resnet_imagenet as imagenet
import lab
import nn
from datasets.dataset import Arrays
from engines import EngineError, cpu, output_size, pool_size

ROOT = Path(__file__).resolve().parent.parent
CPU = cpu.Engine()
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
# Of results, relative to the largest entry: by their type, and of convolutions by precision. Measured of convolutions
# on the simulated GPU: 2.2e-7, 7e-16, 6e-4, 3.3e-3; of the numbers themselves, half a unit in the last place at most:
# 6e-8, 1.1e-16, 4.9e-4, 3.9e-3.
TOLERANCE = {"fp32": 1e-6, "float32": 2e-6, "float64": 5e-15, "tf32": 1e-3, "bf16": 4e-3, "bfloat16": 4e-3}


@pytest.fixture
def engine(gpu):
    """engine(precision=...) switches to the GPU and returns its engine"""
    def switch(**options):
        gpu(**options)
        return nn.engine

    return switch


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def module():
    """engines/gpu.py, which can be imported once there is a CuPy, a real or a simulated one."""
    return importlib.import_module("engines.gpu")


def planner():
    """engines/gpu_convolution.py, likewise"""
    return importlib.import_module("engines.gpu_convolution")


def host(array):
    """As float64 on the host"""
    return nn.to_host(array).astype(np.float64)


def error(got, want):
    """Largest difference over the largest wanted entry."""
    got = got if isinstance(got, np.ndarray) else host(got)
    assert got.shape == want.shape, f"{got.shape} instead of {want.shape}"
    assert np.isfinite(got).all()
    return np.abs(got - want).max(initial=0) / (np.abs(want).max(initial=0) or 1)


def same_bits(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def rounded(array, engine, dtype=np.float32):
    """(on the GPU in this type, the same values in float64: images and weights (4 axes) as the engine keeps them)"""
    array = np.asarray(array)
    if array.dtype.kind != "f":
        return nn.xp.asarray(array), array
    array = array.astype(dtype)
    return nn.xp.asarray(array), array.astype(engine.kind(dtype) if array.ndim == 4 else dtype).astype(np.float64)


def is_simulated(request):
    return request.config.gpu == "simulated gpu"


# ---------------------------------------------------------------------------------------------- kernels compile

PACKS = {"float": (1, 2, 4), "double": (1, 2), "bfloat16": (1, 2, 4, 8)}


def defines(kind, pack):
    return f"-DTYPE={kind}", f"-DREAL={'double' if kind == 'double' else 'float'}", f"-DV={pack}", "-std=c++17"


def nvcc(kind, pack, compute, out):
    """What the compiler says of the kernels' use of registers and memory"""
    command = ["nvcc", f"-arch=sm_{compute}", "-cubin", "--resource-usage", *defines(kind, pack), "-o", str(out),
               str(ROOT / "engines" / "gpu.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc to compile with")
def test_kernels_compile_and_fit(tmp_path):
    """No registers are spilled, nothing lies in local memory, and a block's shared memory needs no permission."""
    text = nvcc("bfloat16", 8, 90, tmp_path / "gpu.cubin")
    names = re.findall(r"Function properties for (\w+)", text)
    local = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert sorted(names) == sorted(re.findall(r"__global__ .*?void (?:__launch_bounds__\(\d+\) )?(\w+)\(",
                                              (ROOT / "engines" / "gpu.cu").read_text()))
    assert len(local) == len(names) > 10
    assert all(set(row) == {"0"} for row in local), list(zip(names, local))
    assert max(int(size) for size in re.findall(r"(\d+) bytes smem", text)) <= 48 * 1024


def test_packs_are_those_that_compile(engine):
    engine(precision="bf16")
    for name, packs in {name: set(PACKS[kind]) for name, (kind, _) in module().TYPES.items()}.items():
        chosen = {C: module().pack(C, module().dtype_of(name)) for C in range(1, 70)}
        assert set(chosen.values()) == packs and all(C % v == 0 for C, v in chosen.items())


# ---------------------------------------------------------------------------------------------- images


def lying_as(xp, array, axes=(0, 1, 2, 3), index=Ellipsis, shape=None):
    """On the GPU, the axes in this order in memory; or as a part, by `index`, of a larger array."""
    axes, shape = list(axes), shape or array.shape
    whole = xp.full([shape[a] for a in axes], 7, array.dtype).transpose(np.argsort(axes).tolist())
    part = whole[index]
    part[...] = xp.asarray(array)
    return part


NHWC = 0, 2, 3, 1
LAYOUTS = {
    "NCHW": lambda xp, a: xp.asarray(a),
    "NHWC": lambda xp, a: lying_as(xp, a, NHWC),
    "CPU's order": lambda xp, a: lying_as(xp, a, (2, 1, 3, 0)),
    "all but one image": lambda xp, a: lying_as(xp, a, NHWC, np.s_[1:], (a.shape[0] + 1, *a.shape[1:])),
    "some channels": lambda xp, a: lying_as(xp, a, NHWC, np.s_[:, 1:-1], (a.shape[0], a.shape[1] + 2, *a.shape[2:])),
    "some columns": lambda xp, a: lying_as(xp, a, NHWC, np.s_[..., 1::2], (*a.shape[:3], 2 * a.shape[3])),
    "upside down": lambda xp, a: lying_as(xp, a[:, :, ::-1], NHWC)[:, :, ::-1],
}


def problem(rng, shape, O, k, stride, padding):
    """x, w, g of a convolution"""
    w = O, shape[1], k, k
    return [rng.standard_normal(s) for s in (shape, w, (shape[0], O, *output_size(shape, w, stride, padding)))]


def convolved(engine, x, w, g, stride, padding):
    weights = engine.weights(w)
    return {"y": engine.conv(x, weights, stride, padding),
            "dx": engine.conv_input_gradient(g, weights, x.shape, stride, padding),
            "dw": engine.conv_weight_gradient(g, x, w.shape, stride, padding)}


def batch_norm(engine, x, add, g, more, weight, bias, mean, var, open_where=None):
    """All that forward and backward pass give, in every mode; open_where: such results, to say which ReLUs are open"""
    found = {}
    for training, relu, added in itertools.product((True, False), repeat=3):
        running = mean.copy(), var.copy()
        out, saved = engine.batch_norm(x, weight, bias, *running, training, 0.1, 1e-5, add if added else None, relu)
        mode = f"{training=}, {relu=}, {added=}"
        positive = None if not relu else out if open_where is None else host(open_where[f"y, {mode}"])
        second = more if training else None  # another gradient
        gradients = engine.batch_norm_gradients(g, x, positive, weight, saved, training, added, second)
        assert (gradients[3] is None) == (not added)
        arrays = dict(y=out, mean=running[0], variance=running[1])
        arrays |= zip(("dx", "dweight", "dbias", "dadd"), gradients[: 3 + added])
        found |= {f"{name}, {mode}": array for name, array in arrays.items()}
    return found


def normal(rng, shapes):
    return [rng.standard_normal(shape) for shape in shapes]


def statistics(rng, shape, centre=0.0):
    """x, add, two g, weight, bias, mean, variance; g such that their sums, also those with x, do not cancel"""
    C, x = shape[1], rng.standard_normal(shape)
    return [x + centre, rng.standard_normal(shape), *(x + 1 + rng.standard_normal(shape) for _ in range(2)),
            rng.uniform(0.5, 2, C), rng.standard_normal(C), rng.standard_normal(C) + centre, rng.uniform(0.5, 2, C)]


def mean_pool(engine, x, g):
    return {"mean": engine.mean_pool(x), "dx": engine.mean_pool_gradient(g.T, x.shape, x.dtype)}


def max_pool(engine, x, g, size):
    out, which = engine.max_pool(x, *size)
    return {"y": out, "dx": engine.max_pool_gradient(g, which, x.shape, *size)}


def windows(rng, size):
    """x with many equals in a window, all less than the zeros that one might put around them in some, and g"""
    x = rng.integers(-2, 2, (3, 5, 9, 8)) - 9.0 * (np.arange(3) == 0)[:, None, None, None]
    return x, rng.integers(-8, 9, (3, 5, *pool_size(x.shape, *size))).astype(float)


def linear(engine, x, w, b, g, part=np.s_[:]):
    x, w = x[part], w[part]
    out, saved = engine.linear(x, w, b, None)
    gradients = engine.linear_gradients(g, x, w, b, None, saved, (True, True, True))
    alone, _ = engine.linear(x, w, None, None)
    return {"out": out, "no bias": alone} | dict(zip(("dx2", "dw", "db"), gradients))


def cross_entropy(engine, labels, three, *logits):
    found = {}
    for i, z in enumerate(logits):
        loss, sums, saved = engine.cross_entropy(z.T, labels, True)
        found |= {f"loss {i}": loss, f"sums {i}, losses": sums[:1], f"sums {i}, correct": sums[1:],
                  f"dlogits {i}": engine.cross_entropy_gradient(three, saved)}
    return found


def answers(rng, N, K):
    """Labels, a factor, logits (K, N): some, some with ties, some that would overflow"""
    logits = rng.standard_normal((K, N)), rng.integers(-1, 2, (K, N)).astype(float), rng.standard_normal((K, N)) * 1e4
    return rng.integers(0, K, N), 3.0, *logits


def operations():
    """{name: (a function of a generator that makes arrays, what an engine computes with them as {name: array})}"""
    table = {}
    for shape, O, k, stride, padding in [
            ((3, 1, 7, 6), 5, 3, 1, 1), ((2, 3, 9, 8), 8, 7, 2, 3), ((3, 5, 6, 5), 3, 1, 2, 0),
            ((2, 8, 8, 8), 18, 3, 2, 1), ((1, 18, 5, 7), 8, 3, 1, 0), ((2, 5, 6, 7), 1, 3, 1, 2),
            ((1, 1, 5, 3), 1, 1, 1, 0), ((2, 8, 7, 6), 5, 3, 2, 0)]:
        moves = dict(stride=stride, padding=padding)
        table[f"conv {shape} to {O}"] = partial(problem, shape=shape, O=O, k=k, **moves), partial(convolved, **moves)
    for shape in ((5, 1, 4, 3), (4, 3, 5, 5), (2, 8, 6, 6), (3, 18, 1, 7), (2, 33, 3, 3), (2, 300, 4, 1),
                  (1, 16, 1, 6)):
        table[f"batch_norm {shape}"] = partial(statistics, shape=shape), batch_norm
    for C in (1, 3, 8):
        table[f"mean_pool of {C}"] = partial(normal, shapes=[(3, C, 4, 5), (C, 3)]), mean_pool
    for size in ((3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1), (1, 1, 0), (5, 2, 2), (3, 5, 0)):
        table[f"max_pool {size}"] = partial(windows, size=size), partial(max_pool, size=size)
    for M, N, K in ((1, 1, 1), (63, 64, 65), (64, 64, 64), (65, 63, 17), (130, 70, 33), (5, 10, 784), (3, 129, 16),
                    (100, 1, 15)):
        table[f"linear {M}, {N}, {K}"] = partial(normal, shapes=[(M, K), (N, K), (N,), (M, N)]), linear
    part = np.s_[::2, 1::3]  # strides in both directions
    table["linear of parts"] = partial(normal, shapes=[(20, 90), (14, 90), (7,), (10, 7)]), partial(linear, part=part)
    for N, K in ((300, 10), (1, 1), (7, 100), (257, 3)):
        table[f"cross_entropy {N}, {K}"] = partial(answers, N=N, K=K), cross_entropy
    return table


OPERATIONS = operations()


@pytest.mark.parametrize("precision, dtype", [("fp32", np.float32), ("fp32", np.float64), ("tf32", np.float32),
                                              ("bf16", np.float32), ("bf16", np.float64)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_the_cpu(engine, rng, precision, dtype, name):
    """which computes in float64"""
    gpu, (make, work) = engine(precision=precision), OPERATIONS[name]
    arrays, wanted = zip(*(rounded(a, gpu, np.dtype(dtype)) for a in make(rng)))
    got, want = work(gpu, *arrays), work(CPU, *wanted)
    assert list(got) == list(want)
    for what, ours in got.items():
        if ours.ndim == 4:
            channels = gpu.padded(ours.shape[1]) if what == "dw" else ours.shape[1]
            assert planner().channels_of(ours) == channels and ours.base is None, what
        kept = np.dtype(gpu.kind(dtype) if ours.ndim == 4 else dtype)
        assert ours.dtype == (np.float64 if what.startswith("sums") else kept), what
        of_convolution = name.startswith("conv") and dtype == np.float32
        assert error(ours, np.asarray(want[what])) < TOLERANCE[precision if of_convolution else kept.name], what


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_lie_in_any_way(engine, rng, layout, precision):
    """in float32 or in the engine's own type"""
    gpu, lying = engine(precision=precision), LAYOUTS[layout]
    for C, O, H in ((3, 5, 5), (8, 4, 6), (1, 1, 3)):
        arrays, wanted = zip(*(rounded(a, gpu) for a in problem(rng, (2, C, H, H), O, 3, 2, 1)))
        want = convolved(CPU, *wanted, 2, 1)
        for dtype in dict.fromkeys((np.dtype(np.float32), gpu.dtype)):
            x, w, g = (lying(nn.xp, nn.to_host(a).astype(dtype)) for a in arrays)
            for name, ours in convolved(gpu, x, w, g, 2, 1).items():
                assert error(ours, want[name]) < TOLERANCE[precision]
            assert error(gpu.mean_pool(x), wanted[0].mean((2, 3))) < 1e-6
            assert (host(gpu.images(x)) == wanted[0]).all()


def test_a_gradient_of_one_number(engine):
    """as the sum of images has: all its strides are 0"""
    engine(precision="fp32")
    x = nn.Tensor(nn.xp.ones((2, 3, 4, 4), np.float32), requires_grad=True)
    w = nn.Parameter(nn.xp.ones((5, 3, 3, 3), np.float32))
    nn.sum(nn.conv2d(x, w, padding=1)).backward()
    assert host(x.grad)[0, 0].tolist() == [[20, 30, 30, 20], [30, 45, 45, 30], [30, 45, 45, 30], [20, 30, 30, 20]]
    assert host(w.grad)[0, 0].tolist() == [[18, 24, 18], [24, 32, 24], [18, 24, 18]]


@PRECISIONS
def test_images_are_copied_only_if_they_have_to_be(engine, precision):
    gpu = engine(precision=precision)
    x = gpu.images(nn.xp.ones((2, 5, 3, 4), np.float32))
    assert x.dtype == gpu.dtype and gpu.images(x) is x and planner().channels_of(x) == 5
    assert gpu.images(nn.xp.ones((2, 5, 3, 4))).dtype == np.float64
    assert (host(gpu.images(nn.xp.ones((2, 5, 3, 4), np.uint8))) == 1).all()
    y = gpu.images(nn.xp.ones((2, 3, 3, 4), np.float32), gpu.padded(3))
    whole = nn.xp.ndarray((2, 3, 4, gpu.padded(3)), gpu.dtype, y.data)  # (N, H, W, channels)
    assert (host(whole)[..., :3] == 1).all() and (host(whole)[..., 3:] == 0).all()
    assert whole.shape[3] == (4 if precision == "bf16" else 3)
    for shape in ((4, 3, 2, 2), (4, 3)):
        p = gpu.parameter(nn.xp.ones(shape, np.float32).T)
        assert p.shape == shape[::-1] and (p.flags.c_contiguous or planner().channels_of(p) == p.shape[1])
        assert gpu.parameter(p) is p


def test_rounding_to_bfloat16(engine, rng):
    """As that of NumPy: to nearest, ties to even, and to infinity; every number of 16 bits comes back as it was."""
    gpu = engine(precision="bf16")
    with np.errstate(all="ignore"):
        bits = np.arange(2**16, dtype=np.uint16).view(gpu.dtype).astype(np.float32).view(np.uint32)
        steps = 0, 1, 2**32 - 1, 2**15  # to neighbours, and to the middle between two
        near = np.concatenate([*(bits + np.uint32(step) for step in steps), rng.integers(0, 2**32, 2**16, np.uint32)])
        near = near.view(np.float32)
        want = near.astype(gpu.dtype)
    got = nn.to_host(gpu.images(nn.xp.asarray(near)[None, None, None]))[0, 0, 0]
    nan = np.isnan(near)
    assert (got.view(np.uint16) == want.view(np.uint16))[~nan].all() and np.isnan(got[nan].astype(np.float32)).all()
    back = gpu.mean_pool(nn.xp.asarray(want).reshape(-1, 1, 1, 1))
    np.testing.assert_array_equal(nn.to_host(back)[:, 0], want.astype(np.float32))


# ---------------------------------------------------------------------------------------------- BatchNorm


@pytest.mark.parametrize("C", [1, 18, 64])
def test_batch_norm_of_many_pixels_far_from_zero(engine, rng, C):
    """Nothing cancels in the variance, and the parts into which the pixels are cut are put together."""
    gpu, shape = engine(precision="fp32"), (12, C, 24, 25)
    assert module().split(12 * 24 * 25, C // module().pack(C, np.dtype(np.float32)))[2] > 1
    for centre, bound in ((0, TOLERANCE["fp32"]), (1000, 1e-4)):  # measured: 4e-7; 2e-5, half a unit of 1000 is 3e-5
        arrays, wanted = zip(*(rounded(a, gpu) for a in statistics(rng, shape, centre)))
        got = batch_norm(gpu, *arrays)
        want = batch_norm(CPU, *wanted, open_where=got)  # where rounding decides between 0 and more, as it did
        for name, ours in got.items():
            assert error(ours, want[name]) < bound, (name, centre)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_a_number_stays(engine, precision):
    """in ReLU, whose gradient is 0 there, as on the CPU, in pooling and in the loss"""
    gpu = engine(precision=precision)
    values = np.array([math.nan, -1, -0.0, 0, 2, math.inf, -math.inf], np.float32)
    x = nn.xp.asarray(np.stack([values, -values])[None, :, :, None])  # (1, 2, 7, 1)
    one, zero = nn.xp.ones(2, np.float32), nn.xp.zeros(2, np.float32)
    out, saved = gpu.batch_norm(x, one, zero, zero, one, False, 0.1, 0, None, True)
    np.testing.assert_array_equal(host(out)[0, :, :, 0], np.maximum([values, -values], 0))
    g = nn.xp.ones(x.shape, np.float32)
    dadd = gpu.batch_norm_gradients(g, gpu.images(g), out, one, saved, False, True)[3]
    np.testing.assert_array_equal(host(dadd)[0, :, :, 0], np.stack([values > 0, -values > 0]))
    np.testing.assert_array_equal(host(gpu.max_pool(x, 1, 1, 0)[0]), host(x))
    for column in ([math.nan, 1, 2], [2, math.nan, 1], [1, 2, math.nan]):
        column = nn.xp.asarray(np.array(column * 3, np.float32).reshape(1, 1, 3, 3))
        assert np.isnan(host(gpu.max_pool(column, 3, 1, 0)[0])).all()
    labels = nn.xp.zeros(2, np.int64)
    loss, _, saved = gpu.cross_entropy(x[0, :, :, 0], labels, False)
    assert np.isnan(float(loss)) and saved is None
    assert gpu.product(nn.xp.ones((0, 3)), nn.xp.ones((3, 2))).shape == (0, 2)
    with pytest.raises(AssertionError, match="int32"):
        gpu.cross_entropy(x[0, :, :, 0], labels.astype(np.int32), False)
    for label in (-1, 3, 2**32):  # no class: nothing outside is read
        loss, sums, _ = gpu.cross_entropy(nn.xp.zeros((1, 3), np.float32), nn.xp.asarray([label]), False)
        assert np.isnan(float(loss)) and nn.to_host(sums)[1] == 0


@PRECISIONS
def test_add(engine, rng, precision):
    gpu = engine(precision=precision)
    for C in (1, 2, 6, 8):
        (x, x64), (y, y64) = (rounded(rng.standard_normal((3, C, 5, 2)), gpu, np.dtype(np.float32)) for _ in range(2))
        total = gpu.add(gpu.images(x), lying_as(nn.xp, nn.to_host(gpu.images(y)), (2, 1, 3, 0)))
        assert planner().channels_of(total) == C
        assert same_bits(nn.to_host(total), (x64 + y64).astype(np.float32).astype(gpu.dtype))
    for shape, dtype in (((3,), np.float32), ((2, 3, 1, 1), np.float64)):
        total = gpu.add(nn.xp.ones(shape, dtype), nn.xp.ones(shape, dtype))
        assert total.dtype == dtype and (host(total) == 2).all()


def test_products_that_do_not_fit(engine):
    """are errors, not a look at whatever lies behind the array"""
    gpu = engine()
    one = nn.xp.ones
    for a, b, bias in ((one((4, 9)), one((8, 5)), None), (one((4, 9)), one((9, 5), np.float32), None),
                       (one((4, 9)), one((9, 5)), one(4))):
        with pytest.raises(ValueError, match="cannot be multiplied"):
            gpu.product(a, b, bias)


# ---------------------------------------------------------------------------------------------- SGD


def parameters(rng, count=70):
    """(values, masks) of more parameters than one launch takes"""
    shapes = [(5,), (4, 3), (2, 3, 3, 3), (6, 1, 1, 1), (1,), (40, 30)]
    values = [rng.standard_normal(shapes[i % len(shapes)]) for i in range(count)]
    masks = [rng.random(v.shape) < 0.5 if i % 3 else None for i, v in enumerate(values)]
    for mask in masks[1::3] + masks[2::3]:
        mask.flat[-1] = True
    return values, masks


def trained(values, masks, grads, rates, dtype=np.float64, **options):
    """(values, optimiser) after steps with these gradients and rates, where nn computes"""
    params = [nn.Parameter(nn.xp.asarray(v.astype(dtype)), mask) for v, mask in zip(values, masks)]
    optimizer = nn.SGD(params, lr=1.0, **options)
    for optimizer.lr, gs in zip(rates, grads):
        for p, g in zip(params, gs):
            if g is not None:
                p.accumulate(nn.xp.asarray(g.astype(dtype)))
        optimizer.step()
        optimizer.zero_grad()
    return [nn.to_host(p.data) for p in params], optimizer


@pytest.mark.parametrize("options", [
    {}, dict(weight_decay=0.01), dict(momentum=0.9), dict(momentum=0.9, nesterov=True),
    dict(momentum=0.9, weight_decay=0.01, nesterov=True)], ids=lambda options: " ".join(options))
def test_sgd(engine, rng, options):
    """70 parameters, some masked, some without a gradient in one step."""
    values, masks = parameters(rng)
    grads = [[rng.standard_normal(v.shape) if i % 10 or step else None for i, v in enumerate(values)]
             for step in range(3)]
    rates = 0.1, 0.05, 0.2
    want, optimizer = trained(values, masks, grads, rates, **options)
    there = optimizer.state_dict()
    engine(precision="fp32")
    for dtype, bound in ((np.float64, 5e-15), (np.float32, 2e-6)):  # of values up to 5; measured: 2e-15, 8e-7
        got, optimizer = trained(values, masks, grads, rates, dtype, **options)
        for i, (ours, theirs, mask) in enumerate(zip(got, want, masks)):
            assert ours.dtype == dtype and np.abs(ours - theirs).max() < bound, i
            assert mask is None or (ours[~mask] == 0).all() and not np.signbit(ours[~mask]).any()
        state = optimizer.state_dict()
        assert list(state) == list(there) and bool(state) == ("momentum" in options)
        for name, velocity in state.items():
            assert velocity.ndim == 1 and np.abs(velocity - there[name]).max() < bound, name
        again = nn.SGD(optimizer.params, lr=1.0, **options)
        again.load_state_dict(state)
        assert all(same_bits(v, state[name]) for name, v in again.state_dict().items())


@PRECISIONS
def test_types_of_gradients(engine, precision):
    """In bf16 one gradient of a convolution's weights is as cuDNN gave it, a sum of two float32, as all others are."""
    gpu, times = engine(precision=precision), 3
    x = nn.Tensor(nn.xp.ones((1, 3, 4, 4), np.float32), requires_grad=True)
    layer, last = nn.Conv2d(3, 2, 3), nn.Linear(2, 2)
    for time in range(times):
        nn.sum(last(nn.global_avg_pool(layer(x)))).backward()
        assert layer.weight.grad.dtype == (gpu.dtype if time == 0 else np.float32)
        assert x.grad.dtype == last.weight.grad.dtype == np.float32
        once = host(layer.weight.grad) if time == 0 else once
    assert (host(layer.weight.grad) == (times * once).astype(np.float32)).all() and once.any()


@pytest.mark.parametrize("capture", [True, False])
def test_copies_of_weights(engine, request, rng, capture):
    """In bf16 sgd changes the weights and what convolutions take of them; any other change is noticed."""
    gpu = engine(precision="bf16", capture=capture)
    values, x = rng.standard_normal((6, 3, 3, 3)).astype(np.float32), nn.xp.ones((2, 3, 4, 4), np.float32)
    layer = nn.Conv2d(3, 6, 3)
    p = layer.weight
    optimizer = nn.SGD([p], lr=0.1, momentum=0.9)

    @nn.compiled
    def step(x):
        nn.sum(layer(nn.Tensor(x))).backward()
        assert p.grad.dtype == gpu.dtype
        optimizer.step()
        optimizer.zero_grad()

    def check():
        copy = gpu.weights(p.data)
        assert same_bits(nn.to_host(copy), nn.to_host(p.data).astype(gpu.dtype))
        whole = nn.xp.ndarray((6, 3, 3, 4), gpu.dtype, copy.data)  # (O, kh, kw, channels)
        assert (host(whole)[..., 3] == 0).all()
        return copy

    state = layer.state_dict()
    for change in (lambda: None, lambda: setattr(p, "data", nn.xp.asarray(values)), lambda: p.fill(2 * values),
                   lambda: p.set_mask(nn.xp.asarray(values > 0)), lambda: layer.load_state_dict(state)):
        change()
        before = nn.to_host(check())
        for _ in range(4):
            step(x)
            launches.clear()
            assert check() is check()
            if is_simulated(request):
                assert set(launches) == {"copy to host"}
        assert (nn.to_host(check()) != before).any()


# ---------------------------------------------------------------------------------------------- whole steps

BATCH = 16


def network():
    """A sparse ResNet-18 of width 4 with the weights of width 2, and its optimiser"""
    model, budget = resnet.ResNet18(4), nn.weight_count(resnet.ResNet18(2))
    nn.sparsify(model, budget, 0)
    return model, nn.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def photographs(seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((BATCH, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, BATCH)


def gradients(seed):
    """(loss, {name: gradient of the kept weights}) where nn computes"""
    model, _ = network()
    x, labels = map(nn.xp.asarray, photographs(seed))
    loss, _ = nn.classify(model(nn.Tensor(x)), labels)
    loss.backward()
    found = {}
    for name, p in model.named_parameters():
        assert p.grad.dtype == (nn.engine.kind(p.dtype) if nn.engine.name == "gpu" and p.ndim == 4 else np.float32)
        found[name] = host(p.grad) * (1 if p.mask is None else nn.to_host(p.mask))
    return float(loss.data), found


# Rounding decides which ReLUs are open, on one CPU others than on the next: the middle one of three sets of images.
SEEDS = 3, 4, 5
# Relative error of the gradient as one vector, with and without ReLU, and of the loss. Measured at most for seven sets
# of images: 1.9e-6, 1.2e-6, 1e-7 (fp32; 8e-3 where one ReLU differs); 0.12, 9e-4, 8e-5; 0.36, 0.010, 1e-3. On the CPU
# noise of 2e-3 in the images alone makes 0.14 and 1.2e-3.
GRADIENTS = {"fp32": (4e-6, 3e-6, 1e-6), "tf32": (0.15, 1.5e-3, 2e-4), "bf16": (0.4, 0.015, 2e-3)}


def gradient_errors(wanted):
    """Errors, relative to gradients(seed) wanted for SEEDS, of the gradient as one vector and of the loss: medians"""
    errors = []
    for seed, (loss, want) in zip(SEEDS, wanted):
        found, got = gradients(seed)
        assert list(got) == list(want)
        wrong, size = (math.sqrt(sum(np.sum(d**2) for d in ds))
                       for ds in ([got[name] - g for name, g in want.items()], want.values()))
        errors.append((wrong / size, abs(found / loss - 1)))
    return np.median(errors, axis=0)


@PRECISIONS
@pytest.mark.parametrize("relu", [True, False], ids=["ReLU", "linear"])
def test_gradients_of_a_network(engine, monkeypatch, precision, relu):
    if not relu:
        forward = nn.BatchNorm2d.forward
        monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x, add=None, relu=False: forward(self, x, add))
    wanted = [gradients(seed) for seed in SEEDS]
    engine(precision=precision)
    *bounds, bound_loss = GRADIENTS[precision]
    of_gradient, of_loss = gradient_errors(wanted)
    assert of_gradient < bounds[0 if relu else 1] and of_loss < bound_loss


def steps(seed=1, count=5):
    """(model, optimizer, loss and correct answers of each step) where nn computes"""
    model, optimizer = network()
    x, labels = map(nn.xp.asarray, photographs(seed))

    @nn.compiled
    def step(x, labels):
        loss, sums = nn.classify(model(nn.Tensor(x)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return sums

    return model, optimizer, [nn.to_host(step(x, labels)).tolist() for _ in range(count)]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.proof)])
def test_masked_weights_stay_zero_and_steps_repeat(engine, precision):
    """with graphs and without, to the same bits; and the losses are the CPU's, until a ReLU differs"""
    cpu = [steps(seed, 3)[2] for seed in SEEDS]
    runs = []
    for capture in (True, False):
        engine(precision=precision, capture=capture)
        model, optimizer, sums = steps()
        runs.append((sums, model.state_dict() | optimizer.state_dict()))
    (before, state), (sums, again) = runs
    assert before == sums and all(same_bits(a, again[name]) for name, a in state.items())
    errors = [np.abs(np.array(steps(seed, 3)[2])[:, 0] / np.array(want)[:, 0] - 1) for seed, want in zip(SEEDS, cpu)]
    bound = {"fp32": 1e-6, "bf16": 0.04}[precision]  # of the first three losses, from 42 to 32; measured: 9e-8, 0.013
    assert np.median(errors, axis=0).max() < bound
    masks = {name: a for name, a in state.items() if name.endswith(".mask")}
    assert masks and nn.weight_count(model) == nn.weight_count(resnet.ResNet18(2))
    for name, mask in masks.items():
        weights = state[name.removesuffix(".mask")]
        assert (weights[~mask] == 0).all() and (weights[mask] != 0).any()
    for p, v in zip(model.parameters(), optimizer.velocity):
        assert p.mask is None or (nn.to_host(v)[~nn.to_host(p.mask)] == 0).all()


# ---------------------------------------------------------------------------------------------- batches


def drawn(rng, channels, each, padding, flips):
    """(images, labels, scale, shift, padding), (order, draws) of 23 images of 7 x 6"""
    factors = [rng.uniform(0.1, 1, (channels, 7, 6) if each else (channels, 1, 1)).astype(np.float32) for _ in range(2)]
    images, labels = rng.integers(0, 256, (23, channels, 7, 6), np.uint8), rng.integers(0, 10, 23)
    draws = rng.integers(0, [[2 * padding + 1], [2 * padding + 1], [1 + flips]], (3, 23))
    return (images, labels, *factors, padding), (rng.permutation(23), draws if padding or flips else None)


@PRECISIONS
@pytest.mark.parametrize("channels, each, padding, flips", [
    (3, False, 0, False), (3, False, 2, True), (3, True, 1, True), (1, False, 4, False), (1, True, 0, True)])
def test_batches_are_those_of_the_cpu(engine, rng, precision, channels, each, padding, flips):
    """to the last bit, in any order and in that of the data set, always at one address"""
    gpu, addresses = engine(precision=precision), set()
    data, order = drawn(rng, channels, each, padding, flips)
    ours, theirs = gpu.Batches(*data), CPU.Batches(*data)
    for args in (order, (order[0][::-1], order[1]), (), (order[0][:9], None)):
        ours.begin(*args), theirs.begin(*args)
        for part in (slice(0, 8), slice(8, 9), slice(1, 9), slice(4, 4)):
            (x, labels), (want, want_labels) = ours.get(part), theirs.get(part)
            assert same_bits(nn.to_host(x), want.astype(gpu.dtype)) and same_bits(nn.to_host(labels), want_labels)
            if len(x):
                assert gpu.images(x, gpu.padded(channels)) is x  # as convolutions want it
                addresses.add((x.data.ptr, labels.data.ptr))
    assert len(addresses) == 1 and not ours.prefetch
    fresh = gpu.Batches(*data)
    assert [len(a) for a in fresh.get(slice(0, 0))] == [0, 0]  # a rank's share of the first batch may be empty
    with pytest.raises(AssertionError):
        ours.get(slice(4, 12))  # the last order has 9 places


@PRECISIONS
def test_photographs_are_those_of_the_cpu(engine, rng, precision):
    gpu, addresses = engine(precision=precision), set()
    scale, shift = (rng.uniform(0.1, 1, 3).astype(np.float32) for _ in range(2))
    for size in (8, 3, 8):
        pixels, labels = rng.integers(0, 256, (size, 5, 4, 3), np.uint8), rng.integers(0, 10, size).astype(np.int32)
        x, y = gpu.normalized(pixels, scale, shift), gpu.upload(labels)
        assert same_bits(nn.to_host(x), CPU.normalized(pixels, scale, shift).astype(gpu.dtype))
        assert y.dtype == np.int64 and nn.to_host(y).tolist() == labels.tolist()
        assert gpu.images(x, gpu.padded(3)) is x
        addresses.add((x.data.ptr, y.data.ptr))
    assert len(addresses) == 1


# ---------------------------------------------------------------------------------------------- CUDA graphs


def worker(gpu, rng, size):
    """(function of x, its x, what it adds up): a convolution, a mean and products, with arrays that do not last"""
    x, w = (nn.xp.asarray(rng.standard_normal(s).astype(np.float32)) for s in ((size, 3, 6, 6), (4, 3, 3, 3)))
    total = nn.xp.zeros((size, 4), np.float32)

    def work(x):
        mean = gpu.mean_pool(gpu.conv(x, gpu.weights(w), 1, 1))  # arrays that are gone when this ends
        nn.xp.add(total, gpu.product(gpu.product(mean, mean.T), mean), out=total)
        return mean * 2

    return work, x, total


def test_compiled(engine, request):
    """The same bits as without; the third call captures; from then on a call is one launch."""
    results = {}
    for capture in (True, False):
        gpu, rng = engine(precision="tf32", capture=capture), np.random.default_rng(4)
        functions = [(gpu.compiled(work), x, total) for work, x, total in (worker(gpu, rng, n) for n in (5, 8, 2))]
        weight = gpu.parameter(nn.xp.ones((2, 3, 3, 3), np.float32))
        returned = []
        for call in range(6):
            for function, x, _ in functions if call % 2 else functions[::-1]:  # they share the memory of what they make
                launches.clear()
                out = function(x)
                if is_simulated(request):
                    assert (launches == ["graph"]) == (capture and call >= 2)
                returned.append(nn.to_host(out))
                weight.get()  # an array in NHWC: after it CuPy forgets what was only used, not entered
                junk = nn.xp.full((64, 64), math.nan, np.float32)  # may not land where a graph works
                del junk
        assert nn.xp.cuda.get_current_stream() == gpu.stream
        results[capture] = [nn.to_host(total) for *_, total in functions] + returned
    for captured, plain in zip(results[True], results[False], strict=True):
        assert same_bits(captured, plain) and (captured != 0).all()


def test_a_graph_is_of_one_address_shape_and_type(engine):
    gpu, calls = engine(), []

    def work(x):
        calls.append(x.shape)
        return x * 2

    function, x, single = gpu.compiled(work), nn.xp.arange(6.0), nn.xp.arange(6, dtype=np.float32)
    for _ in range(4):
        for y in (x, x[:3], x[3:], x[::2], single, x.view(np.int64)):
            assert nn.to_host(function(y)).tolist() == nn.to_host(y * 2).tolist()
    assert len(calls) == 6 * 3
    x += 1
    assert nn.to_host(function(x)).tolist() == [2, 4, 6, 8, 10, 12] and len(calls) == 18


@pytest.mark.parametrize("capture", [True, False])
def test_captured_steps_notice_other_masks_data_and_states(engine, capture):
    """What is assigned lies elsewhere in memory, where a graph would not look."""
    engine(precision="fp32", capture=capture)
    p = nn.Parameter(nn.xp.ones((4, 5), np.float32))
    optimizer = nn.SGD([p], lr=0.5, momentum=0.5)
    state, x = optimizer.state_dict(), nn.xp.ones((2, 5), np.float32)

    @nn.compiled
    def step(x):
        nn.linear(x, p).sum().backward()  # of every weight 2
        optimizer.step()
        optimizer.zero_grad()

    def after(n):
        for _ in range(n):
            step(x)
        return nn.to_host(p.data)

    assert (after(4) == 1 - (1 + 1.5 + 1.75 + 1.875)).all()
    p.data = nn.xp.ones((4, 5), np.float32)
    optimizer.load_state_dict(state)
    assert (after(4) == 1 - (1 + 1.5 + 1.75 + 1.875)).all()
    p.data, p.mask = nn.xp.ones((4, 5), np.float32), np.eye(4, 5, dtype=bool)
    optimizer.load_state_dict(state)
    assert (after(4) == np.eye(4, 5) * (1 - (1 + 1.5 + 1.75 + 1.875))).all()


def test_a_capture_that_fails_leaves_the_stream_usable(engine):
    gpu = engine()
    total, calls = nn.xp.zeros(3, np.float32), []

    def work():
        nonlocal total
        calls.append(gc.isenabled())
        total += 1
        if len(calls) == 3:
            raise ZeroDivisionError("in the middle")
        if len(calls) == 4:
            float(total[0])  # a wait for the GPU, which a capture cannot have

    function = gpu.compiled(work)
    function(), function()
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        function()
    assert nn.to_host(total).tolist() == [2, 2, 2] and gc.isenabled()
    with pytest.raises(EngineError, match="could not be captured as a CUDA graph .*--no-graph does without"):
        function()
    assert nn.to_host(total).tolist() == [2, 2, 2] and gc.isenabled()
    function(), function()
    assert nn.to_host(total).tolist() == [4, 4, 4] and calls == [True, True, False, False, False]


def test_a_capture_of_nothing_is_an_error(engine):
    """as it would be if another stream were the current one: replays would do nothing, in silence"""
    gpu, total = engine(), nn.xp.zeros(3, np.float32)

    def work():
        nonlocal total
        total += 1

    function = gpu.compiled(work)
    function(), function()
    with nn.xp.cuda.Stream(non_blocking=True), pytest.raises(EngineError, match="stream"):
        function()
    function()
    assert nn.to_host(total).tolist() == [3, 3, 3]

    def elsewhere():
        with nn.xp.cuda.Stream(non_blocking=True):
            work()

    for nothing in (elsewhere, lambda: None):
        function = gpu.compiled(nothing)
        function(), function()
        with pytest.raises(EngineError, match="nothing was captured .*--no-graph does without"):
            function()


def test_memory_of_graphs(engine, monkeypatch):
    """It is never given back while a graph lives, but with the last of them; where there is no more, that is said."""
    gpu, before = engine(), nn.engine.memory()
    first, x = gpu.compiled(lambda x: (x + 1).sum()), nn.xp.zeros(100_000)
    for _ in range(3):
        first(x)
    pool = gpu.pool
    assert gpu.memory() >= before + 2 * x.nbytes and pool.total_bytes() >= x.nbytes
    second = gpu.compiled(lambda x: (x + 2).sum())
    assert gpu.pool is pool
    monkeypatch.setattr(nn.xp.cuda, "Memory", fail)
    with pytest.raises(EngineError, match="more memory than the GPU has .*CUDNN_STATUS.*: choose a smaller --batch"):
        second(nn.xp.zeros(10_000_000))
    monkeypatch.undo()
    assert float(first(x)) == 100_000
    del first, second
    gc.collect()
    third = gpu.compiled(lambda x: x + 1)
    assert gpu.pool is not pool and third


# ---------------------------------------------------------------------------------------------- whole runs

SMALL = dict(data="synthetic", epochs=4, limit=20, batch=20, lr=1e-3, device="gpu", save_every=1e9)
RUNS = {  # in batches of less, with fewer pixels, BatchNorm makes rounding much larger
    "mlp": (mlp, mlp.Settings(width=12, **SMALL)),
    "resnet": (resnet, resnet.Settings(width=3, base_width=2, precision="fp32", **SMALL)),
    "bottleneck": (bottleneck, bottleneck.Settings(kind="linear", width=3, base_width=2, precision="fp32", **SMALL)),
    "photographs": (imagenet, imagenet.Settings(width=3, base_width=2, size=64, precision="fp32", **SMALL)),
}


class Photographs(Arrays):
    """Images that come from the host a batch at a time"""

    def batches(self, slices, padding=0, order=None, draws=None):
        for part in slices:
            rows = np.arange(len(self.labels))[part] if order is None else order[part]
            pixels = self.images[rows].transpose(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
            yield nn.engine.normalized(pixels, self.scale.reshape(-1), self.shift.reshape(-1)), \
                nn.engine.upload(self.labels[rows])


@pytest.fixture
def perform(tmp_path, monkeypatch):
    """perform(kind, name, **settings) trains one of RUNS in a folder of this name, as far as it is not done there."""
    data = tiny.images(20, 12, 28)
    monkeypatch.setattr(mlp, "load", lambda s: data)
    for script in (resnet, bottleneck):
        monkeypatch.setattr(script, "load", lambda s: tiny.images(20, 12, 16, 3).augmented(2, True))

    def photographs(s):
        found = tiny.images(20, 12, s.size, 3)
        halves = [Photographs(a.images, a.labels, a.scale, a.shift) for a in (found.train, found.test)]
        return replace(found, train=halves[0], test=halves[1])

    monkeypatch.setattr(imagenet, "load", photographs)

    def run(kind, name, **settings):
        script, s = RUNS[kind]
        return tiny.finished(lab.Run(script.EXPERIMENT, replace(s, out=str(tmp_path / name), **settings)))

    return run


def stopped_after(monkeypatch, steps):
    """SIGTERM to this process when so many batches were counted."""
    real = lab.Run.count

    def count(self, sums):
        nonlocal steps
        steps -= 1
        real(self, sums)
        if steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(lab.Run, "count", count)


def test_runs_end_with_the_same_bits(engine, perform, tmp_path, monkeypatch):
    """with graphs and without; and stopped in the second epoch and continued. The last batch is a smaller one."""
    engine()
    settings = dict(precision="tf32", batch=8, lr=0.01)
    run = perform("resnet", "whole", **settings)
    whole = tiny.remains(run.folder)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stopped_after(patch, 5)
        perform("resnet", "cut", **settings)
    assert stop.value.code == 128 + signal.SIGTERM
    for name in ("cut", "uncaptured"):
        if name == "uncaptured":
            engine(capture=False)
        run = perform("resnet", name, **settings)
        left = tiny.remains(run.folder)
        assert all(left[file] == whole[file] for file in ("log.csv", "checkpoint.npz"))
    versions = run.config()["versions"][-1]
    assert versions["device"] == "gpu" and versions["gpu"] and versions["deterministic"] is True


def log(run):
    """(epochs, columns) of the log, without the seconds"""
    return np.loadtxt(run.folder / "log.csv", delimiter=",", skiprows=1, ndmin=2)[:, :-1]


@pytest.mark.parametrize("kind", ["mlp", "resnet", pytest.param("bottleneck", marks=pytest.mark.proof),
                                  pytest.param("photographs", marks=pytest.mark.proof)])
def test_runs_are_those_of_the_cpu(engine, perform, kind):
    alone = perform(kind, "cpu")
    engine(precision="fp32")
    run = perform(kind, "gpu")
    np.testing.assert_allclose(log(run), log(alone), rtol=1e-4)  # measured: 2e-7
    assert run.result()["layers"] == alone.result()["layers"]


@pytest.mark.parametrize("first, then", [("cpu", "gpu"), ("gpu", "cpu")])
def test_a_run_goes_on_on_the_other_device(engine, perform, monkeypatch, first, then):
    """Weights, masks, velocities and running estimates mean the same there."""
    whole = perform("resnet", "whole", width=8)
    engine(precision="fp32")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        nn.use_device(first)
        stopped_after(patch, 4)
        perform("resnet", "moved", width=8)
    nn.use_device(then)
    if then == "gpu":
        engine(precision="fp32")
    moved = perform("resnet", "moved", width=8)
    assert moved.config()["devices"] == [first, then]
    np.testing.assert_allclose(log(moved), log(whole), rtol=1e-4)


def test_command_lines(engine, perform, tmp_path, capsys):
    """A dry run, photographs in bf16, and what is for GPUs only."""
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    engine()  # from here the command line finds a GPU
    places = f"--out={tmp_path}", "--data=synthetic"
    assert lab.main(mlp.EXPERIMENT, [*places, "--dry-run", "--width=20", "--epochs=1", "--batch=2"]) == 0
    said = capsys.readouterr().out
    assert "3,970 weights in all" in said and "MB of the GPU at most" in said
    assert lab.main(imagenet.EXPERIMENT, [*places, "--width=2", "--base-width=2", "--size=32", "--limit=20",
                                          "--epochs=2", "--batch=8", "--precision=bf16"]) == 0
    (result,) = tmp_path.rglob("result.json")
    found = json.loads(result.read_text())
    assert "precision=bf16" in result.parent.name and found["epochs"] == 2
    assert found["config"]["versions"][0]["precision"] == "bf16"
    assert lab.main(resnet.EXPERIMENT, [*places, "--device=cpu", "--tune"]) == 2
    assert "--tune is for GPUs, and this would be trained on the CPU" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- plans and their errors


@pytest.fixture
def images():
    return np.ones((2, 3, 8, 8), np.float32)


def fail(*arguments, **options):
    raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED\nand more")


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("fault, precision, why", [
    ("no plan", "fp32", "float32, without tensor cores, deterministically"), ("not built", "tf32", "float32, determ"),
    ("not run", "bf16", r"bfloat16, deterministically, that can be run \(CUDNN_STATUS_EXECUTION_FAILED\)"),
    ("no memory", "tf32", "failed: CUDNN_STATUS")])
def test_a_convolution_that_cannot_be(engine, monkeypatch, direction, fault, precision, why):
    """The layer, its shapes and the direction are named, in one sentence."""
    gpu = engine(precision=precision)
    w = nn.Parameter(nn.xp.ones((6, 4, 3, 3), np.float32))
    w.name = "block.conv1.weight"
    x = nn.Tensor(nn.xp.ones((2, 4, 8, 8), np.float32), requires_grad=direction == "dgrad")
    w.requires_grad = direction == "wgrad"
    out = nn.sum(nn.conv2d(x, w, 2, 1)) if direction != "fprop" else None
    where, name, does = {"no plan": (planner(), "plans", lambda graph, limit: iter(())),
                         "not built": (planner().cudnn().pygraph, "build_plan_at_index", fail),
                         "not run": (planner().cudnn().pygraph, "execute_plan_at_index", fail),
                         "no memory": (gpu.convolve, "workspace", fail)}[fault]
    monkeypatch.setattr(where, name, does)
    with pytest.raises(EngineError) as caught:
        nn.conv2d(x, w, 2, 1) if out is None else out.backward()
    assert re.fullmatch(rf"block.conv1.weight: cuDNN('s| has no plan for the) {direction} of images \(2, 4, 8, 8\), "
                        rf"weights \(6, 4, 3, 3\), output \(2, 6, 4, 4\), stride 2, padding 1 in .*{why}.*",
                        str(caught.value))


@pytest.mark.parametrize("cuda, file", [(13020, "requirements-gpu.txt"), (12090, "requirements-gpu-cuda12.txt")])
def test_without_cudnn(engine, images, monkeypatch, cuda, file):
    gpu = engine()
    planner().cudnn.cache_clear()
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.setattr(nn.xp.cuda.runtime, "runtimeGetVersion", lambda: cuda)
    w = nn.xp.ones((2, 3, 3, 3), np.float32)
    with pytest.raises(EngineError) as caught:
        nn.conv2d(nn.Tensor(nn.xp.asarray(images)), nn.Tensor(w))
    assert re.fullmatch(r"a convolution: convolution on a GPU needs cuDNN \(.*cudnn.*\): "
                        rf"pip install -r {file}", str(caught.value)) and (ROOT / file).exists()
    monkeypatch.undo()
    assert gpu.conv(nn.xp.asarray(images), w, 1, 0).shape == (2, 2, 6, 6)  # nothing of the failure is kept


def test_bfloat16_that_is_not_there(engine, monkeypatch):
    """on the card, in NumPy, or since ml_dtypes is not installed"""
    runtime = engine().xp.cuda
    for where, name, does, says in (
            (runtime.Device, "compute_capability", "75", "bf16 needs a GPU of compute capability 8.0 or later, and "
             "this one has 7.5: choose --precision tf32 or fp32"),
            (np, "__version__", "2.1.1", "bf16 needs NumPy 2.1.2 or later, and this is 2.1.1: "
             "pip install 'numpy>=2.1.2'"),
            (sys.modules, "ml_dtypes", None, "bfloat16 needs ml_dtypes: pip install -r requirements-gpu.txt")):
        with monkeypatch.context() as patch:
            patch.setattr(np, "__version__", "2.1.2")
            patch.setitem(where, name, does) if where is sys.modules else patch.setattr(where, name, does)
            with pytest.raises(EngineError) as caught:
                module().Engine(precision="bf16")
            assert str(caught.value) == says
            for precision in ("tf32", "fp32"):
                assert engine(precision=precision).dtype == np.float32


def because(error, cause):
    error.__cause__ = cause
    return error


INSUFFICIENT = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
FAULTS = pytest.mark.parametrize("fault, driver, says", [
    (RuntimeError(INSUFFICIENT), 12040, "the driver's CUDA is 12.4 and CuPy's 13: requirements-gpu-cuda12.txt is for "
     "such a driver"),
    (RuntimeError(INSUFFICIENT), 11080, "the driver's CUDA is 11.8 and CuPy's 13: update the driver"),
    (RuntimeError(INSUFFICIENT), 0, "there is no NVIDIA driver"),
    (RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected\nand more"), 13000,
     "cudaErrorNoDevice: no CUDA-capable device is detected"), (ImportError(), 13000, "ImportError"),
    (because(ImportError("\n=====\nFailed to import CuPy."), ImportError("libcudart.so.13: cannot open shared object")),
     13000, "libcudart.so.13: cannot open shared object")])


def broken(engine, monkeypatch, fault, driver):
    """From now on CuPy cannot use the GPU; driver: the CUDA version of the driver."""
    def count():
        raise fault

    runtime = engine().xp.cuda.runtime
    monkeypatch.setattr(runtime, "getDeviceCount", count)
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: driver)
    monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: 13000)


@FAULTS
def test_a_gpu_that_cannot_be_used(engine, monkeypatch, recwarn, fault, driver, says):
    """auto warns of why it takes the CPU; whoever asks for a GPU gets an error."""
    broken(engine, monkeypatch, fault, driver)
    assert nn.use_device("auto") == "cpu" and nn.xp is np
    assert [str(w.message) for w in recwarn] == [f"computing on the CPU, since the GPU cannot be used: {says}"]
    with pytest.raises(RuntimeError) as caught:
        nn.use_device("gpu")
    assert str(caught.value) == f"a GPU was asked for but cannot be used: {says}"


@FAULTS
def test_a_command_says_why_it_takes_the_cpu(engine, monkeypatch, capsys, tmp_path, fault, driver, says):
    """in one line; processes of a sweep leave that to the first"""
    broken(engine, monkeypatch, fault, driver)
    words = [f"--out={tmp_path}", "--data=synthetic", "--dry-run", "--width=20", "--epochs=1", "--limit=100"]
    for worker in (False, True):
        if worker:
            monkeypatch.setenv(lab.sweep.WORKER, "1")
        assert lab.main(mlp.EXPERIMENT, words) == 0
        line = f"exp_mlp_mnist.py: computing on the CPU, since the GPU cannot be used: {says}\n"
        assert capsys.readouterr().err == ("" if worker else line)


def test_nothing_is_said_where_cupy_is_not_installed(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert nn.use_device("auto") == "cpu" and not recwarn.list


def chosen(gpu):
    """Numbers of the plans that the engine holds"""
    return [number for _, _, number in gpu.convolve.graphs.values()]


@pytest.mark.parametrize("fastest", ["last", "first"])
def test_tuning_takes_the_fastest_plan(engine, images, monkeypatch, fastest):
    """once for each shape; without tuning nothing is timed"""
    gpu, clock = engine(precision="tf32", tune=True), itertools.count(0, -1 if fastest == "last" else 1)
    measure, ran = planner().milliseconds, []

    def milliseconds(work):
        assert 0 <= measure(work) < 1000
        ran.append(next(clock))
        return ran[-1]

    monkeypatch.setattr(planner(), "milliseconds", milliseconds)
    x, w = nn.xp.asarray(images), nn.xp.ones((2, 3, 3, 3), np.float32)
    for _ in range(2):
        assert (host(gpu.conv(x, w, 1, 0)) == 27).all()
    (graph, _, number), = gpu.convolve.graphs.values()
    able = list(itertools.islice(planner().plans(graph), planner().TRIED))
    assert len(able) == len(ran) > 1 and number == able[-1 if fastest == "last" else 0]
    assert sum(w.size for w in gpu.convolve.workspaces) <= graph.get_workspace_size_plan_at_index(number)
    plain = engine(precision="tf32")
    plain.conv(x, w, 1, 0)
    assert chosen(plain) == able[:1] and len(ran) == len(able)


@pytest.mark.parametrize("tune", [False, True])
def test_a_plan_that_cannot_be_run_is_not_taken(engine, images, monkeypatch, tune):
    """and if none can be run there is none"""
    gpu, tried = engine(precision="tf32", tune=tune), []
    pygraph = planner().cudnn().pygraph
    before = pygraph.execute_plan_at_index
    x, w = nn.xp.asarray(images), nn.xp.ones((2, 3, 3, 3), np.float32)

    def execute(self, pack, workspace, index, **options):
        tried.append(index)
        if index == tried[0] or not able:
            raise RuntimeError(f"CUDNN_STATUS_{len(tried)}")
        return before(self, pack, workspace, index, **options)

    monkeypatch.setattr(pygraph, "execute_plan_at_index", execute)
    able = True
    for _ in range(2):
        assert (host(gpu.conv(x, w, 1, 0)) == 27).all() and chosen(gpu) and chosen(gpu) != tried[:1]
    assert tried.count(tried[0]) == 1
    able = False
    with pytest.raises(EngineError) as caught:
        gpu.conv(x, w, 1, 1)
    assert re.fullmatch(r"cuDNN has no plan for the fprop of images .*float32, deterministically, that can be run "
                        rf"\(CUDNN_STATUS_{len(tried)}\)", str(caught.value))


def test_more_entries_than_kernels_count(engine):
    engine()
    with pytest.raises(EngineError, match="4,294,967,296 entries is too large"):
        module().launch("add_images", np.float32, 2**32)


@pytest.mark.parametrize("precision, deterministic, dtype, unwanted", [
    ("fp32", True, np.float32, {"NONDETERMINISTIC", "TENSOR_CORE", "DOWN_CONVERT_INPUTS", "WINOGRAD"}),
    ("bf16", True, np.float32, {"NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION"}),
    ("bf16", False, np.float32, {"REDUCED_PRECISION_REDUCTION"}),
    ("tf32", True, np.float32, {"NONDETERMINISTIC"}), ("tf32", False, np.float32, None),
    ("fp32", True, np.float64, {"NONDETERMINISTIC"})])
def test_plans_that_are_not_wanted(engine, images, monkeypatch, precision, deterministic, dtype, unwanted):
    """are deselected: those that add up in any order unless they may; where float32 is meant literally tensor cores and
    Winograd's products of sums; in bfloat16 sums in less than float32
    """
    gpu, told = engine(precision=precision, deterministic=deterministic), []
    monkeypatch.setattr(planner().cudnn().pygraph, "deselect_numeric_notes",
                        lambda self, notes: told.append({note.name for note in notes}))
    convolved(gpu, nn.xp.asarray(images.astype(dtype)), nn.xp.ones((2, 3, 3, 3), dtype),
              nn.xp.ones((2, 2, 6, 6), dtype), 1, 0)
    assert told == ([unwanted] * 3 if unwanted else []) and len(gpu.convolve.graphs) == 3


def test_a_plan_that_needs_too_much_memory_is_not_taken(engine, images, monkeypatch):
    pygraph = planner().cudnn().pygraph
    before, taken = pygraph.get_workspace_size_plan_at_index, []
    for more in (0, 1):
        gpu = engine(precision="tf32")
        assert gpu.convolve.limit >= planner().WORKSPACE
        gpu.convolve.limit, least = 2**20, taken[0] if taken else -1
        monkeypatch.setattr(pygraph, "get_workspace_size_plan_at_index",
                            lambda self, i: 2**20 + more if i == least else before(self, i))
        gpu.conv(nn.xp.asarray(images), nn.xp.ones((2, 3, 3, 3), np.float32), 1, 0)
        taken += chosen(gpu)
    assert taken[1] > taken[0]


def test_a_graph_outlives_larger_scratch_memory(engine, rng):
    gpu = engine(precision="fp32")
    assert gpu.convolve.workspace(0).size > 0  # cuDNN wants no null pointer
    small = gpu.convolve.workspace(1000)
    assert gpu.convolve.workspace(10) is small is gpu.convolve.workspace(1000)
    work, x, total = worker(gpu, rng, 2)
    function = gpu.compiled(work)
    for _ in range(3):
        function(x)
    before, large = host(total), gpu.convolve.workspace(10**6)
    del small
    gc.collect()
    function(x)
    assert error(total, before * 4 / 3) < 1e-6 and large.size == 10**6 and gpu.convolve.workspace(1500) is large


def test_layout_and_type_are_checked(engine, images):
    """cuDNN would take any memory for what it was told, in silence."""
    gpu = engine(precision="bf16")
    x = gpu.images(nn.xp.asarray(images))  # three channels to a pixel, not the four that are wanted
    w, y = gpu.weights(nn.xp.ones((2, 3, 3, 3), np.float32)), planner().empty((2, 2, 6, 6), gpu.dtype)
    with pytest.raises(AssertionError, match="x"):
        gpu.convolve("fprop", x, w, y, 1, 0, 4)
    with pytest.raises(AssertionError, match="w"):
        gpu.convolve("fprop", gpu.images(x, 4), nn.xp.ones((2, 3, 3, 3), np.float32), y, 1, 0, 4)
    with pytest.raises(ValueError, match="one floating type"):
        gpu.conv(nn.xp.ones((2, 3, 8, 8)), w, 1, 0)
