"""nn.py: every operation against finite differences and PyTorch, then layers, masks and SGD."""

import concurrent.futures
import copy
import functools
import itertools
import math
import pickle
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nn

RNG = np.random.default_rng(0)
settings.register_profile("project", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("project")


def normal(*shape, rng=RNG):
    return rng.standard_normal(shape)


def import_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.set_num_threads(1)  # for small arrays several are slower
    return torch


# ---------------------------------------------------------------------------------------------- operations


def batch_norm(training=True, relu=False, **options):
    """nn.batch_norm of (x, weight, bias[, add]) with running estimates that are not 0 and 1."""
    def operation(x, weight, bias, *add):
        mean, var = (nn.xp.asarray(np.linspace(*ends, x.shape[1]).astype(x.dtype)) for ends in ((-0.3, 0.4), (0.5, 2)))
        return nn.batch_norm(x, weight, bias, mean, var, training, relu=relu, add=add[0] if add else None, **options)

    return operation


def batch_norm_in_pytorch(training=True, relu=False, **options):
    def operation(t, x, weight, bias, *add):
        mean, var = (t.tensor(np.linspace(*ends, x.shape[1]), dtype=x.dtype) for ends in ((-0.3, 0.4), (0.5, 2)))
        out = t.nn.functional.batch_norm(x, mean, var, weight, bias, training, **options)
        out = out + add[0] if add else out
        return t.relu(out) if relu else out

    return operation


def conv_case(name, x, w, *settings):
    return name, lambda x, w: nn.conv2d(x, w, *settings), lambda t, x, w: t.conv2d(x, w, None, *settings), [x, w]


def norm_case(name, x, add=False, **options):
    shapes = [x, x[1:2], x[1:2]] + [x] * add
    return name, batch_norm(**options), batch_norm_in_pytorch(**options), shapes


def pool_case(x, *settings):
    return (f"max_pool2d {x} {settings}", lambda x: nn.max_pool2d(x, *settings),
            lambda t, x: t.nn.functional.max_pool2d(x, *settings), [x])


# Each case: a name that begins with the function's, the operation in our terms, in PyTorch's terms (t: the torch
# module; SAME: as ours), the shapes of its inputs.
SAME = None
CASES = [
    ("add broadcast", lambda a, b: a + b, SAME, [(2, 3, 4), (3, 1)]),
    ("radd number", lambda a: 0.1 + a, SAME, [(3,)]),
    ("same twice", lambda a: a + a * a, SAME, [(3, 2)]),
    ("sub", lambda a, b: a - b, SAME, [(4,), (2, 4)]),
    ("rsub number", lambda a: 0.1 - a, SAME, [(4,)]),
    ("mul", lambda a, b: a * b, SAME, [(3, 4), (4,)]),
    ("mul scalar array", lambda a, b: a * b, SAME, [(3, 4), ()]),
    ("div", lambda a, b: a / (b * b + 1), SAME, [(3, 4), (3, 1)]),
    ("power zero", lambda a: (a * 0) ** 0 + a, SAME, [(3, 4)]),
    ("power fraction", lambda a: (a * a + 1) ** -0.5, SAME, [(3, 4)]),
    ("neg", lambda a: -a, SAME, [(3, 4)]),
    ("exp", lambda a: a.exp(), SAME, [(3, 4)]),
    ("log", lambda a: (a * a + 1).log(), SAME, [(3, 4)]),
    ("relu", lambda a: a.relu(), SAME, [(30, 4)]),
    ("sum all", lambda a: a.sum(), SAME, [(3, 4)]),
    ("sum negative axis", lambda a: a.sum(-1), SAME, [(3, 4, 2)]),
    ("sum axes keep", lambda a: a.sum((0, 2), keepdims=True), lambda t, a: a.sum((0, 2), keepdim=True), [(3, 4, 2)]),
    ("mean axes", lambda a: a.mean((0, 2)), SAME, [(3, 4, 2)]),
    ("reshape", lambda a: a.reshape(2, -1).reshape((4, 3)), SAME, [(3, 4)]),
    ("transpose", lambda a: a.transpose(), lambda t, a: a.permute(2, 1, 0), [(2, 3, 4)]),
    ("transpose axes", lambda a: a.transpose(1, -1, 0), lambda t, a: a.permute(1, -1, 0), [(2, 3, 4)]),
    ("getitem slice", lambda a: a[1:, ::2], SAME, [(3, 5)]),
    ("getitem int, new axis", lambda a: a[1, None], SAME, [(3, 5)]),
    ("getitem repeated", lambda a: a[[0, 2, 0]], SAME, [(3, 5)]),
    ("getitem pairs", lambda a: a[nn.xp.array([0, 2]), nn.xp.array([1, 1])], lambda t, a: a[[0, 2], [1, 1]], [(3, 5)]),
    ("matmul", lambda a, b: a @ b, SAME, [(3, 4), (4, 5)]),
    ("matmul batched", lambda a, b: a @ b, SAME, [(2, 1, 3, 4), (5, 4, 2)]),
    ("matmul dot", lambda a, b: a @ b, SAME, [(4,), (4,)]),
    ("matmul vector left", lambda a, b: a @ b, SAME, [(4,), (2, 4, 3)]),
    ("matmul vector right", lambda a, b: a @ b, SAME, [(2, 3, 4), (4,)]),
    ("linear", lambda x, w: nn.linear(x, w), lambda t, x, w: t.nn.functional.linear(x, w), [(6, 4), (3, 4)]),
    ("linear deep", lambda x, w, b: nn.linear(x, w, b), lambda t, x, w, b: t.nn.functional.linear(x, w, b),
     [(2, 5, 4), (3, 4), (3,)]),
    ("linear of stored-transposed input", lambda x, w, b: nn.linear(x.T, w, b),
     lambda t, x, w, b: t.nn.functional.linear(x.T, w, b), [(4, 6), (3, 4), (3,)]),
    ("cross_entropy", lambda z: nn.cross_entropy(z, nn.xp.asarray([2, 0, 1, 2])),
     lambda t, z: t.nn.functional.cross_entropy(z, t.tensor([2, 0, 1, 2])), [(4, 3)]),
    ("composition", lambda a, b: ((a @ b).relu() * 2 - b.sum(0)).exp().mean(), SAME, [(3, 4), (4, 2)]),
]
IMAGES = [
    conv_case("conv2d 3x3", (3, 4, 6, 5), (5, 4, 3, 3), 1, 1),
    conv_case("conv2d 3x3, stride 2", (3, 4, 7, 8), (5, 4, 3, 3), 2, 1),
    conv_case("conv2d 1x1, stride 2", (3, 4, 8, 8), (5, 4, 1, 1), 2),
    conv_case("conv2d 5x2, stride 3, wide padding", (2, 3, 7, 8), (4, 3, 5, 2), 3, 4),
    conv_case("conv2d in tiles", (2, 24, 8, 4), (27, 24, 3, 3), 1, 1),
    *(norm_case(f"batch_norm {training=} {add=} {relu=}", (4, 3, 5, 2), add, training=training, relu=relu)
      for training, add, relu in itertools.product([True, False], repeat=3)),
    norm_case("batch_norm of one image", (1, 4, 2, 3), relu=True),
    norm_case("batch_norm of single pixels", (7, 4, 1, 1), add=True),
    norm_case("batch_norm of two values", (2, 3, 1, 1), eps=0.5),
    norm_case("batch_norm of several blocks", (64, 16, 32, 16), add=True, relu=True),
    norm_case("batch_norm eval of one value", (1, 3, 1, 1), training=False),
    *(pool_case(*settings) for settings in (
        ((3, 4, 6, 8), 2), ((3, 4, 7, 9), 2), ((3, 4, 7, 8), 3, 2, 1), ((3, 4, 8, 8), 3, 2, 1), ((2, 3, 7, 8), 3, 1, 1),
        ((2, 3, 7, 8), 5, 3, 2), ((2, 3, 7, 6), 2, 3))),
    ("global_avg_pool", nn.global_avg_pool, lambda t, x: x.mean((2, 3)), [(3, 5, 4, 6)]),
    ("image operations composed",
     lambda x, w, a, b: nn.global_avg_pool(batch_norm(relu=True)(nn.max_pool2d(nn.conv2d(x, w, 2, 1), 3, 2, 1), a, b)),
     lambda t, x, w, a, b: batch_norm_in_pytorch(relu=True)(
         t, t.nn.functional.max_pool2d(t.conv2d(x, w, None, 2, 1), 3, 2, 1), a, b).mean((2, 3)),
     [(2, 3, 12, 12), (4, 3, 3, 3), (4,), (4,)]),
]
BY_NAME = pytest.mark.parametrize("name, operation, theirs, shapes", CASES + IMAGES,
                                  ids=[case[0] for case in CASES + IMAGES])


def evaluate(operation, arrays, weights=None):
    """(output, gradients) of sum(output * weights) with respect to the arrays."""
    tensors = [nn.Tensor(nn.xp.asarray(a), requires_grad=True) for a in arrays]
    out = operation(*tensors)
    if weights is not None:
        out.backward(nn.xp.asarray(weights, dtype=out.dtype))
    return nn.to_host(out.data), [None if t.grad is None else nn.to_host(t.grad) for t in tensors]


@BY_NAME
def test_gradient_along_a_random_direction(backend, name, operation, theirs, shapes):
    rng = np.random.default_rng(1)
    arrays = [normal(*s, rng=rng) for s in shapes]
    directions = [normal(*s, rng=rng) for s in shapes]
    out, _ = evaluate(operation, arrays)
    weights = normal(*out.shape, rng=rng)
    _, gradients = evaluate(operation, arrays, weights)
    step = 1e-6
    up, _ = evaluate(operation, [a + step * d for a, d in zip(arrays, directions)])
    down, _ = evaluate(operation, [a - step * d for a, d in zip(arrays, directions)])
    numeric = ((up - down) * weights).sum() / (2 * step)
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions))
    assert out.dtype == np.float64 and all(g.dtype == np.float64 for g in gradients)
    assert analytic == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-5), (np.float64, 1e-12)])
@BY_NAME
def test_operation_against_pytorch(backend, name, operation, theirs, shapes, dtype, tolerance):
    """PyTorch computes in float64; errors are relative to the largest entry."""
    torch = import_torch()
    rng = np.random.default_rng(2)
    arrays = [np.asarray(normal(*s, rng=rng), dtype) for s in shapes]
    tensors = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in arrays]
    want = theirs(torch, *tensors) if theirs else operation(*tensors)
    weights = np.asarray(normal(*want.shape, rng=rng), dtype)
    want.backward(torch.tensor(weights.astype(np.float64)))
    out, gradients = evaluate(operation, arrays, weights)
    for got, want in zip([out, *gradients], [want.detach().numpy(), *(t.grad.numpy() for t in tensors)], strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert np.abs(got - want).max() <= tolerance * max(1, np.abs(want).max())


def test_every_operation_has_a_case():
    """A function of these sections without a case above would go unchecked."""
    source = open(nn.__file__).read()
    section = source[source.index("- operations"):source.index("- layers")]
    defined = {line.split("(")[0].removeprefix("def ") for line in section.splitlines() if line.startswith("def ")}
    assert defined - {case[0].split()[0] for case in CASES + IMAGES} == {"classify"}  # what cross_entropy is made of


# ---------------------------------------------------------------------------------------------- Tensor


def test_dtypes_are_kept_and_float32_is_the_default():
    assert nn.Tensor([1, 2]).dtype == np.float32 and nn.Tensor(3.0).dtype == np.float32
    assert nn.Tensor(np.arange(3)).dtype == np.float32 and nn.Tensor(np.ones(3)).dtype == np.float64
    x = nn.Tensor(np.ones(3), requires_grad=True)
    assert (x * 0.1).data[0] == 0.1  # not float32's 0.1
    for out in (np.ones(3) + x, np.ones(3) * x, np.ones(3) / x, np.eye(3) @ x, np.ones(3) - x):  # array on the left
        assert isinstance(out, nn.Tensor) and out.requires_grad
    assert (nn.Tensor(np.ones(3, np.float32)) * 0.1).dtype == np.float32
    assert nn.Linear(3, 2).weight.dtype == np.float32 and nn.Linear(3, 2, dtype=np.float64).bias.dtype == np.float64


def test_backward_accumulates_over_graphs_and_uses_each_up():
    x = nn.Tensor(np.array([1.0, 2.0]), requires_grad=True)
    middle = x * x
    out = middle.sum()
    out.backward()
    (3 * x).sum().backward()
    np.testing.assert_array_equal(x.grad, [5, 7])
    assert middle.vjp is nn.USED_UP and middle.parents == () and middle.grad is None and out.parents == ()
    with nn.no_grad():
        assert (x * 2).parents == () and not (x * 2).requires_grad
    for tensor, match in ((out, "used up"), (x * x, "one number"), (nn.Tensor([1.0]), "requires one")):
        with pytest.raises(ValueError, match=match):
            tensor.backward()
    with pytest.raises(AssertionError, match=r"\(4,\).*\(2,\)"):
        nn.result(x.data * 2, (x,), lambda g: (np.ones(4),)).sum().backward()


def test_leaves_do_not_share_their_gradients():
    x, y = (nn.Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    seed = np.ones(3)
    (x + y).backward(seed)
    x.grad *= 7
    assert (y.grad == 1).all() and (seed == 1).all()
    z = nn.Tensor(np.ones((2, 2)), requires_grad=True)
    z.sum().backward()
    z.grad += 1  # a broadcast view would not be writable


def test_backward_of_a_deep_and_a_wide_graph():
    """20,000 operations in a row would overflow a recursion; a diamond of 60 levels has 2^60 paths."""
    for levels, level in ((20_000, lambda y: y + 1), (60, lambda y: (y + y) * 0.5)):
        x = y = nn.Tensor(np.ones(2), requires_grad=True)
        for _ in range(levels):
            y = level(y)
        y.sum().backward()
        np.testing.assert_array_equal(x.grad, [1, 1])


@pytest.mark.parametrize("relu, added, uses", [*itertools.product((False, True), (False, True), (1, 2, 3, 5))])
def test_several_gradients_of_a_batch_norm(backend, relu, added, uses):
    """It takes the sum of two in its own passes, those of further uses are added before: as if there were one."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in ((4, 3, 5, 2), 3, 3, *[(4, 3, 5, 2)] * added)]
    factors = rng.standard_normal((uses, 4, 3, 5, 2))

    def gradients(factors):
        tensors = [nn.Tensor(nn.xp.asarray(a), requires_grad=True) for a in arrays]
        out = batch_norm(relu=relu)(*tensors)
        functools.reduce(nn.add, [nn.sum(out * nn.xp.asarray(factor)) for factor in factors]).backward()
        return [nn.to_host(t.grad) for t in tensors]

    for several, one in zip(gradients(factors), gradients([factors.sum(0)]), strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-12, atol=1e-12)


def test_classify_counts_and_leaves_logits_alone(backend):
    """Sums of the loss and of correct answers in float64; the first of equal logits counts, as argmax has it."""
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        nn.classify(nn.Tensor(nn.xp.zeros((2, 3))), nn.xp.zeros(3, int))
    for order in "CF":  # in the second, logits are stored as a product with a sparse weight stores them
        z = nn.Tensor(nn.xp.asarray(np.array([[1, 3, 2], [0, 0, 0], [5, 1, 2], [2, 2, 1]], np.float32, order=order)))
        loss, sums = nn.classify(z, nn.xp.asarray(np.array([1, 0, 2, 1])))
        assert sums.dtype == np.float64 and sums.shape == (2,) and nn.to_host(sums)[1] == 2
        assert nn.to_host(sums)[0] == pytest.approx(4 * loss.item(), rel=1e-6)
        np.testing.assert_array_equal(nn.to_host(z.data), [[1, 3, 2], [0, 0, 0], [5, 1, 2], [2, 2, 1]])


def test_a_function_compiled_for_the_cpu_is_itself():
    assert nn.compiled(math.exp) is math.exp


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_large_logits(scale, dtype):
    """Loss and gradient are those of exact arithmetic: differences of logits, or 0."""
    logits = nn.Tensor(np.array([[scale, 0, -scale], [0, 0, 0], [-scale, scale, scale]], dtype), requires_grad=True)
    loss = nn.cross_entropy(logits, np.array([0, 1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx((0 + math.log(3) + 2 * scale + math.log(2)) / 3, rel=1e-6)
    expected = np.array([[0, 0, 0], [1 / 3, -2 / 3, 1 / 3], [-1, 0.5, 0.5]]) / 3
    np.testing.assert_allclose(logits.grad, expected, atol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operation", [
    lambda x: nn.conv2d(x, nn.Tensor(np.ones((24, 24, 3, 3), np.float32)), 1, 1),  # tiles
    lambda x: nn.conv2d(x, nn.Tensor(np.ones((4, 24, 3, 3), np.float32)), 2, 1),  # rows
    lambda x: nn.BatchNorm2d(24)(x), lambda x: nn.BatchNorm2d(24)(x, relu=True),
    lambda x: nn.max_pool2d(x, 2), nn.global_avg_pool, lambda x: nn.cross_entropy(x[:, :, 0, 0], np.zeros(2, int)),
    lambda x: nn.exp(x) * x])
def test_what_is_not_finite_is_not_hidden(value, operation):
    """One such number in the first channel's first entry: something that is not finite comes out, at the largest where
    minus infinity may be below all else.
    """
    x = np.random.default_rng(0).standard_normal((2, 24, 8, 8)).astype(np.float32)
    x[0, 0, 0, 0] = value
    with np.errstate(all="ignore"):
        out = operation(nn.Tensor(x)).data
    if not (value == -np.inf and out.shape == (2, 24, 4, 4)):  # the maximum leaves it out, and may
        assert not np.isfinite(out).all()


def test_use_device_says_why_there_is_no_gpu():
    with pytest.raises(ValueError, match="'tpu'"):
        nn.use_device("tpu")
    try:
        nn.use_device("gpu")
    except RuntimeError as error:
        assert "a GPU was asked for" in str(error) and nn.xp is np
    finally:
        assert nn.use_device("cpu") == "cpu"


# ---------------------------------------------------------------------------------------------- layers


def mlp(*widths, **options):
    parts = [part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b, **options), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *parts[:-1])


def test_parameters_come_in_a_fixed_order_with_stable_names():
    class Net(nn.Module):
        def __init__(self):
            self.stem = nn.Linear(4, 3)
            self.blocks = [nn.Linear(3, 3, bias=False), nn.Sequential(nn.ReLU(), nn.Linear(3, 2))]
            self.running = np.zeros(5)

    names = ["stem.weight", "stem.bias", "blocks.0.weight", "blocks.1.1.weight", "blocks.1.1.bias"]
    net = Net()
    assert list(net.state_dict()) == names + ["running"]
    assert [name for name, _ in nn.layers(net)] == ["stem", "blocks.0", "blocks.1.1"]
    assert not net.eval().training and not net.blocks[1][0].training and net.train().blocks[1][1].training


def test_state_dict_round_trip_with_masks():
    one, two = mlp(12, 9, 5), mlp(12, 9, 5)
    nn.sparsify(one, 30, seed=1)
    state = one.state_dict()
    two.load_state_dict(state)
    x = nn.Tensor(normal(7, 12).astype(np.float32))
    np.testing.assert_array_equal(one(x).data, two(x).data)
    one[1].weight.data += 1
    assert nn.weight_count(two) == 30 and not np.array_equal(state["1.weight"], one[1].weight.data)  # a copy


def test_states_are_kept_by_numpy(tmp_path):
    """As the README has it: np.savez, and what np.load reads."""
    one, two = mlp(4, 3), mlp(4, 3)
    nn.initialize(one, 1)
    optimizers = [nn.SGD(net.parameters(), 0.1, momentum=0.9) for net in (one, two)]
    nn.cross_entropy(one(nn.Tensor(np.ones((2, 4), np.float32))), np.array([0, 1])).backward()
    optimizers[0].step()
    for part, other, path in ((one, two, tmp_path / "net.npz"), (*optimizers, tmp_path / "sgd.npz")):
        np.savez(path, **part.state_dict())
        other.load_state_dict(np.load(path))
        before, after = part.state_dict(), other.state_dict()
        assert before and list(before) == list(after)
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_load_state_dict_names_every_fault_and_changes_nothing():
    net = mlp(4, 3, 2)
    before = net.state_dict()
    state = before | {"extra": np.zeros(1), "1.bias": np.zeros(7), "1.weight.mask": np.ones(2, bool)}
    del state["3.weight"]
    with pytest.raises(ValueError) as error:
        net.load_state_dict(state)
    for part in ("3.weight is missing", "extra is unexpected", "1.bias has shape (7,) instead of (3,)",
                 "1.weight.mask has shape (2,) instead of (3, 4)"):
        assert part in str(error.value)
    assert all(np.array_equal(before[k], v) for k, v in net.state_dict().items())


def test_initial_weights_have_the_scale_of_the_sparse_fan_in():
    net = mlp(400, 300, 10)
    nn.sparsify(net, 6000, seed=0, kept=[4800, 1200])
    for layer, fan_in, density in ((net[1], 400, 0.04), (net[3], 300, 0.4)):
        bound = 1 / math.sqrt(fan_in * density)
        kept = layer.weight.data[layer.weight.mask]
        assert 0.99 * bound < np.abs(kept).max() <= bound * (1 + 1e-6)
        assert kept.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert np.abs(layer.bias.data).max() <= bound
    ntk = nn.Sequential(nn.Linear(400, 300, ntk=True))
    nn.sparsify(ntk, 12_000, seed=0)
    assert ntk[0].weight.data[ntk[0].weight.mask].std() == pytest.approx(0.1**-0.5, rel=0.03)
    x = np.ones((1, 400), np.float32)
    np.testing.assert_allclose(ntk(nn.Tensor(x)).data, (x @ ntk[0].weight.data.T + ntk[0].bias.data) / 20, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- masks


def allocate_slowly(sizes, budget):
    """Appendix B word for word: take single weights from whatever layer is the largest."""
    kept = list(sizes)
    while sum(kept) > budget:
        kept[kept.index(max(kept))] -= 1
    return kept


@settings(max_examples=1000)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.data())
def test_allocation(sizes, data):
    """Largest first as the slow version; in proportion exactly the budget, at least one each and never above size."""
    budget = data.draw(st.integers(len(sizes), sum(sizes)))
    assert nn.allocate(sizes, budget) == allocate_slowly(sizes, budget)
    kept = nn.allocate(sizes, budget, "proportional")
    assert sum(kept) == budget and all(1 <= k <= s for k, s in zip(kept, sizes))
    if min(share := [size * budget / sum(sizes) for size in sizes]) >= 1:
        assert all(abs(k - exact) < 1 for k, exact in zip(kept, share))
    with pytest.raises(ValueError, match="cannot keep"):
        nn.allocate(sizes, data.draw(st.sampled_from([len(sizes) - 1, sum(sizes) + 1])))


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1, 4, 9])), min_size=1, max_size=6), st.data())
def test_whole_kernels(layers, data):
    """Multiples of the kernel, at least one each, never more than asked for and less by under the largest kernel."""
    kept, units = [data.draw(st.integers(1, n * unit)) for n, unit in layers], [unit for _, unit in layers]
    if sum(units) > sum(kept):
        with pytest.raises(ValueError, match="one in each layer makes"):
            nn.whole_units(kept, units)
    else:
        whole = nn.whole_units(kept, units)
        assert all(k % u == 0 and k >= u for k, u in zip(whole, units))
        assert 0 <= sum(kept) - sum(whole) < max(units)


def test_masks_are_uniform_and_depend_on_the_seed_alone():
    def sparse(seed):
        net = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 3))
        nn.sparsify(net, 30, seed, kept=[21, 9])
        return net

    assert [np.count_nonzero(layer.weight.data) for layer in sparse(0)] == [21, 9] and nn.weight_count(sparse(0)) == 30
    counts = np.sum([sparse(seed)[0].weight.mask for seed in range(2000)], 0)
    assert np.abs(counts - 700).max() < 5 * 21.3  # each entry is kept with probability 0.35: 700 +- 21 times
    for a, b in zip(sparse(5).parameters(), sparse(5).parameters()):
        assert a.data.tobytes() == b.data.tobytes()
    assert not np.array_equal(sparse(5)[0].weight.mask, sparse(6)[0].weight.mask)


def test_a_full_budget_is_the_dense_network():
    one, two = mlp(12, 7, 3), mlp(12, 7, 3)
    nn.sparsify(one, 105, seed=4)
    nn.initialize(two, seed=4)
    for a, b in zip(one.parameters(), two.parameters()):
        assert a.mask is None and a.data.tobytes() == b.data.tobytes()


def test_io_only_removes_whole_kernels():
    rng = np.random.default_rng(0)
    for seed in range(100):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 1), nn.Linear(16, 10))
        budget = int(rng.integers(40, 8 * 27 + 16 * 72 + 128 + 160))
        kept = nn.sparsify(net, budget, seed, io_only=True)
        assert 0 <= budget - sum(kept) < 9 and sum(kept) == nn.weight_count(net)
        for mask in (layer.weight.mask for layer in net[:2] if layer.weight.mask is not None):
            assert (mask.all((2, 3)) == mask.any((2, 3))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", [{}, dict(momentum=0.9, weight_decay=5e-4, nesterov=True)])
@pytest.mark.parametrize("make, size, kept, steps", [
    *((lambda dtype: nn.Linear(100, 50, dtype=dtype), (20, 100), kept, 100)
      for kept in (900, 300, 40)),  # the dense product, the CSR product, kept entries only
    *((lambda dtype, C=C: nn.Conv2d(C, C, 3, padding=1, dtype=dtype), (2, C, 8, 8), int(density * 9 * C * C), 4)
      for C in (8, 24) for density in (0.5, 0.02)),  # rows and tiles
], ids=lambda value: "" if callable(value) else str(value))
def test_masked_weights_stay_exactly_zero(make, size, kept, steps, rule, dtype):
    rng = np.random.default_rng(0)
    layer = make(dtype)
    nn.sparsify(nn.Sequential(layer), kept, seed=0)
    weight, start = layer.weight, layer.weight.data.copy()
    optimizer = nn.SGD([p for p in (weight, layer.bias) if p is not None], lr=0.01, **rule)
    for _ in range(steps):
        out = layer(nn.Tensor(normal(*size, rng=rng).astype(dtype)))
        (out * normal(*out.shape, rng=rng).astype(dtype)).sum().backward()
        assert not weight.grad[~weight.mask].any() and weight.grad[weight.mask].all()
        optimizer.step()
        optimizer.zero_grad()
    assert not weight.data[~weight.mask].any() and (weight.data != start)[weight.mask].all()


@pytest.mark.parametrize("kept", [900, 600, 80])
def test_sparse_products_equal_dense_ones(backend, kept):
    """The three ways of multiplying with a masked weight, here one that is used twice, give what its zeros give."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(70, 70, dtype=np.float64))
    nn.sparsify(net, kept, seed=0)
    weight, bias = net[0].weight, net[0].bias
    x, g = nn.xp.asarray(normal(20, 70, rng=rng)), nn.xp.asarray(normal(20, 70, rng=rng))
    results = []
    for w in (weight, nn.Tensor(weight.data.copy(), requires_grad=True)):
        tensor = nn.Tensor(x, requires_grad=True)
        out = nn.linear(nn.linear(tensor, w, bias), w, bias)
        out.backward(g)
        results.append([nn.to_host(a) for a in (out.data, tensor.grad, w.grad * weight.mask)])
        if backend == "cpu" and w is weight:  # on a GPU, SGD leaves masked entries alone
            assert not w.grad[~w.mask].any()
    for ours, dense in zip(*results):
        np.testing.assert_allclose(ours, dense, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------- optimiser

RULES = [
    dict(), dict(weight_decay=0.01), dict(momentum=0.9), dict(momentum=0.9, weight_decay=5e-4),
    dict(momentum=0.9, nesterov=True), dict(momentum=0.5, weight_decay=0.1, nesterov=True),
]


@pytest.mark.parametrize("sparse", [None, 300, 130])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sgd_follows_pytorch(rule, sparse):
    torch = import_torch()
    rng = np.random.default_rng(0)
    net = mlp(100, 50, 10, dtype=np.float64)
    if sparse:
        nn.sparsify(net, sparse, seed=0)
    twin = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10)).double()
    pairs = list(zip(net.parameters(), twin.parameters(), strict=True))
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(torch.tensor(ours.data))
    mine, other = nn.SGD(net.parameters(), lr=0.1, **rule), torch.optim.SGD(twin.parameters(), lr=0.1, **rule)
    for step in range(50):
        mine.lr = other.param_groups[0]["lr"] = 0.1 if step < 30 else 0.01
        x, labels = normal(16, 100, rng=rng), rng.integers(0, 10, 16)
        mine.zero_grad()
        other.zero_grad()
        nn.cross_entropy(net(nn.Tensor(x)), labels).backward()
        torch.nn.functional.cross_entropy(twin(torch.tensor(x)), torch.tensor(labels)).backward()
        for ours, theirs in pairs:
            if ours.mask is not None:
                theirs.grad *= torch.tensor(ours.mask)
        mine.step()
        other.step()
        net.parameters()[-1].grad *= 7  # which the velocity does not share
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours.data, theirs.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_sgd_by_hand():
    """Two steps of the rule in float32, nesterov with decay, in the same order: equal to the last bit."""
    momentum, decay = np.float32(0.9), np.float32(0.01)
    p = nn.Parameter(np.array([1.0, -2.0], np.float32))
    optimizer = nn.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    w, v = p.data.copy(), np.float32(0)
    for gradient in np.float32([[0.5, 0.25], [1.0, -3.0]]):
        p.grad = gradient.copy()
        optimizer.step()
        g = gradient + decay * w
        v = momentum * v + g
        w = w - np.float32(0.1) * (g + momentum * v)
        np.testing.assert_array_equal(p.data, w)


def test_sgd_state_continues_the_trajectory():
    p = nn.Parameter(np.array([1.0, -2.0, 3.0]))
    optimizer = nn.SGD([p], lr=0.1, momentum=0.9)
    trajectory = []
    for _ in range(10):
        trajectory.append((p.data.copy(), optimizer.state_dict()))
        p.grad = p.data**3
        optimizer.step()
    again = nn.Parameter(trajectory[5][0].copy())
    optimizer = nn.SGD([again], lr=0.1, momentum=0.9)
    optimizer.load_state_dict(trajectory[5][1])
    for _ in range(5):
        again.grad = again.data**3
        optimizer.step()
    np.testing.assert_array_equal(again.data, p.data)
    with pytest.raises(ValueError, match=r"velocity.0 has shape \(2,\) instead of \(3,\)"):
        optimizer.load_state_dict({"velocity.0": np.zeros(2)})


def test_sgd_state_of_a_sparse_weight_is_read_in_both_forms(backend):
    """Of all entries, as a GPU writes it, and of the kept ones alone, as a CPU does."""
    mask = np.zeros((20, 30), bool)
    mask[3, 4] = mask[9, 1] = mask[9, 5] = True
    full, kept = np.zeros(600, np.float32), np.array([1, 2, 3], np.float32)
    full[[94, 271, 275]] = kept
    after = []
    for velocity in (full, kept):
        p = nn.Parameter(nn.xp.ones((20, 30), np.float32), nn.xp.asarray(mask))
        optimizer = nn.SGD([p], lr=1.0, momentum=0.5)
        optimizer.load_state_dict({"velocity.0": velocity})
        np.testing.assert_array_equal(optimizer.state_dict()["velocity.0"], kept if backend == "cpu" else full)
        p.accumulate(nn.xp.ones((20, 30), np.float32))
        optimizer.step()
        after.append(nn.to_host(p.data))
    np.testing.assert_array_equal(*after)
    assert after[0][9, 5] == 1 - (0.5 * 3 + 1) and not after[0][~mask].any()


def test_schedules():
    assert [nn.ConstantLR(0.3)(e) for e in (0, 9)] == [0.3, 0.3]
    assert [nn.MultiStepLR(1.0, (2, 4), gamma=0.5)(e) for e in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    cosine = nn.CosineLR(2.0, 8, minimum=1.0)
    assert cosine(8) == cosine(12) == 1
    torch = import_torch()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8, 1.0)
    for epoch in range(9):
        assert cosine(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("mistake, match", [
    (lambda: nn.allocate([5, 5], 5, "random"), "'random'"),
    (lambda: nn.Parameter(np.ones((2, 2)), mask=np.ones(3, bool)), r"\(3,\).*\(2, 2\)"),
    *((lambda kept=kept: nn.sparsify(mlp(12, 7, 3), 30, seed=0, kept=kept), "do not add up to 30 or do not fit")
      for kept in ([20, 20], [0, 30], [85, 5], [30])),
    *((lambda rule=rule: nn.SGD([], **rule), "of at least 0, not -") for rule in (
        dict(lr=-1), dict(lr=1, momentum=-0.1), dict(lr=1, weight_decay=-1))),
    (lambda: nn.SGD([], 1, nesterov=True), "nesterov needs a momentum"),
])
def test_mistakes(mistake, match):
    with pytest.raises(ValueError, match=match):
        mistake()


# ---------------------------------------------------------------------------------------------- in other programs


def test_losses_that_share_a_part():
    """As in PyTorch, a graph is used up once, and one that is not whole is refused before any gradient changes."""
    x = nn.Tensor([3.0], requires_grad=True)
    shared = x * x
    one, two = (shared * 2).sum(), (shared * 5).sum() + (x * 7).sum()
    one.backward()
    with pytest.raises(ValueError, match="add the losses that share it and call backward\\(\\) once"):
        two.backward()
    assert x.grad == 12  # what shares nothing had not been added either
    with nn.no_grad():
        x.backward(np.ones(1))  # of a leaf
    assert x.grad == 13


@pytest.mark.parametrize("change", [
    lambda p: nn.SGD([p], lr=0.1).step(), lambda p: p.set_mask(np.eye(3, dtype=bool)),
    lambda p: nn.SGD([p], lr=0.1, momentum=0.9, nesterov=True).step()])
def test_backward_after_a_change_of_a_parameter_is_refused(backend, change):
    p, x = nn.Parameter(nn.xp.ones((3, 3), np.float32)), nn.Tensor(nn.xp.ones((2, 3), np.float32))
    first, late = nn.linear(x, p).sum(), nn.linear(nn.linear(x, p), p).sum()
    first.backward()
    change(p)
    before = nn.to_host(p.grad).copy()
    with pytest.raises(ValueError, match="after a parameter of the graph was changed"):
        late.backward()
    np.testing.assert_array_equal(nn.to_host(p.grad), before)


@pytest.mark.parametrize("grad", [np.ones((4, 3)), np.ones(1), 2.0, np.ones((3, 1))])
def test_backward_takes_a_gradient_of_its_shape(grad):
    x = nn.Tensor(np.ones(3), requires_grad=True)
    with pytest.raises(ValueError, match=r"shape \(3,\) takes a gradient of that shape, not"):
        (x * 2).backward(grad)
    (x * 2).backward(nn.Tensor(np.ones(3)))
    assert x.grad.tolist() == [2, 2, 2]


SCALARS = [np.float64(0.1), np.float32(0.1), np.int64(3), np.uint8(3), np.array(0.1), np.array(3), 0.1, 3, True,
           np.True_]


@pytest.mark.parametrize("operation", [
    lambda x, s: x * s, lambda x, s: s * x, lambda x, s: x + s, lambda x, s: s + x, lambda x, s: x - s,
    lambda x, s: s - x, lambda x, s: x / s, lambda x, s: s / x,
    lambda x, s: x ** (s.item() if isinstance(s, (np.ndarray, np.bool_)) else s)])
def test_numbers_of_all_kinds_take_the_dtype(backend, operation):
    for dtype in (np.float32, np.float64):
        x = nn.Tensor(nn.xp.asarray(np.array([1.5, 2], dtype)), requires_grad=True)
        for s in SCALARS:
            out = operation(x, s)
            out.backward(nn.xp.ones(2, dtype))
            assert out.dtype == dtype and x.grad.dtype == dtype, repr(s)
            want = operation(np.array([1.5, 2], dtype), np.asarray(s).astype(dtype)[()])
            np.testing.assert_allclose(nn.to_host(out.data), want, rtol=1e-6 if dtype == np.float32 else 1e-15)


def test_whole_numbers_become_float32():
    for dtype in (np.uint8, np.int64, bool):
        assert nn.Tensor(np.zeros(2, dtype)).dtype == np.float32
    assert (nn.Tensor(np.float32([1, 2])) - np.uint8([3, 250])).data.tolist() == [-2, -248]
    assert (1 - nn.Tensor(np.uint8([5]))).data.tolist() == [-4] and nn.Tensor(np.uint8([1, 2])).mean().item() == 1.5
    assert (nn.Tensor(np.float32([0.5])) * np.int64([3])).dtype == np.float32
    x = nn.Tensor(np.float32([1, 2]), requires_grad=True)  # with a Tensor of another type, not a constant
    out = x * nn.Tensor(np.array([0.1, 3]))
    out.sum().backward()
    assert out.dtype == np.float64 and x.grad.dtype == np.float32 and x.grad.tolist() == np.float32([0.1, 3]).tolist()


def test_a_tensor_as_a_python_object():
    x = nn.Tensor([[1.0, 5.0], [3.0, 2.0]], requires_grad=True)
    assert [row.data.tolist() for row in x] == [[1, 5], [3, 2]] and (float(x[0, 1]), bool(x[0, 0] * 0)) == (5, False)
    assert nn.Tensor(x).data is x.data and nn.Tensor(x).vjp is None
    x[x.data > 2].sum().backward()
    assert x.grad.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("mistake, match", [
    *((lambda f=f: f(nn.Tensor(np.ones((2, 3), np.float32))), "or its .data|unexpected keyword") for f in (
        np.asarray, np.mean, np.concatenate, lambda x: np.array([x, x]), lambda x: nn.Tensor([x, x]))),
    (lambda: np.exp(nn.Tensor([1.0])), "does not support ufuncs"),
    (lambda: nn.Tensor(None), "holds real numbers, not data of dtype object"),
    (lambda: nn.Tensor(np.array(["a"])), "holds real numbers"),
    (lambda: nn.Tensor([1.0]) + "a", "holds real numbers"),
    (lambda: nn.Tensor([1.0]) * 2j, "holds real numbers"),
    (lambda: nn.Tensor([1.0]) ** np.ones(1), "power of a Tensor is a number, not ndarray"),
    (lambda: nn.cross_entropy(np.ones((2, 3)), np.array([0.0, 1.0])), "labels that are integers, not of float64"),
    (lambda: nn.cross_entropy(np.ones((2, 3)), np.array([True, False])), "labels that are integers, not of bool"),
    (lambda: nn.SGD([nn.Tensor([1.0])], 0.1), "takes Parameters, such as model.parameters\\(\\), not Tensor"),
    (lambda: nn.SGD([np.ones(3), "weight"], 0.1), "not ndarray or str"),
    (lambda: nn.SGD(nn.Parameter(np.ones(3)), 0.1), "takes Parameters"),
    (lambda: nn.SGD(mlp(3, 2), 0.1), "takes Parameters.*not Flatten or Linear"),
    (lambda: nn.Sequential([nn.ReLU()]), "Sequential takes Modules.*not \\[<"),
    (lambda: nn.Sequential(nn.relu), "Sequential takes Modules.*not <function relu"),
    (lambda: nn.Tensor(np.zeros(2, [("a", "f4")])), "holds real numbers"),
    (lambda: nn.Tensor(np.zeros(2, "V2")), "holds real numbers"),
    (lambda: nn.Tensor([1], dtype=np.int64), "dtype is a floating type such as numpy.float32, not int64"),
    *((lambda layer=layer, sizes=sizes: layer(*sizes, dtype=np.int32), "floating type .*, not int32")
      for layer, sizes in ((nn.Linear, (3, 2)), (nn.Conv2d, (1, 2, 3)), (nn.BatchNorm2d, (2,)))),
    *((lambda other=other: nn.Tensor([1.0]) == other, "compared with numbers and arrays by its .data")
      for other in (1.0, np.ones(1), None)),
    (lambda: list(nn.Tensor(1.0)), "unsized"),
    (lambda: (nn.Tensor([1.0], requires_grad=True) * 2).backward(np.array([1j])), "real numbers"),
    (lambda: nn.Tensor([1.0]) ** 1j, "the power of a Tensor is a number, not complex"),
    *((lambda f=f: f(np.ones(3)), "a network is a Module, such as .*, not \\[1. 1. 1.\\]") for f in (
        nn.weight_count, lambda x: nn.sparsify(x, 3, 0), lambda x: nn.initialize(x, 0))),
    *((lambda f=f: f(None), "a state is a dict of arrays") for f in (
        mlp(3, 2).load_state_dict, nn.SGD(mlp(3, 2).parameters(), 0.1).load_state_dict)),
    (lambda: setattr(nn.Linear(2, 3), "weight", np.ones((3, 2))), "weight is a Parameter: assign another"),
    (lambda: nn.Linear(2, 3, dtype=None), "floating type"),
    (lambda: setattr(nn.Parameter([1.0]), "data", None), "real numbers"),
    (lambda: nn.SGD(None, 0.1), "SGD's first argument, such as .*, is a list, not None"),
    (lambda: nn.MultiStepLR(0.1, 3), "milestones is a list, not 3"),
    (lambda: nn.allocate(5, 3), "sizes is a list, not 5"),
    (lambda: nn.sparsify(mlp(12, 3), 5, 0, kept=5), "kept is a list, not 5"),
    (lambda: nn.use_device("cpu", precison="fp32"), "no option 'precison': a GPU's are precision"),
    (lambda: setattr(mlp(3, 2), "scale", nn.Tensor(np.ones(2), requires_grad=True)), "scale is a Tensor that wants"),
])
def test_wrong_types_are_told_in_one_sentence(mistake, match):
    with pytest.raises(TypeError, match=match):
        mistake()


def four(*shape):
    return nn.Tensor(np.ones(shape, np.float32))


@pytest.mark.parametrize("mistake, match", [
    *((lambda labels=labels, z=z: nn.cross_entropy(four(*z), labels), match) for labels, z, match in (
        ([0, -1], (2, 3), "of 3 classes takes labels from 0 to 2, not from -1 to 0"),
        ([0, 3], (2, 3), "labels from 0 to 2, not from 0 to 3"),
        (np.array([0, 255], np.uint8), (2, 3), "not from 0 to 255"),
        ([[0, 1]], (2, 3), r"logits \(N, classes\) and labels \(N,\), one or more of each, not \(2, 3\) and \(1, 2\)"),
        (np.zeros(0, int), (0, 3), "one or more"), ([0, 0], (2, 0), "one or more"))),
    (lambda: four(0, 3).mean(), r"mean of a Tensor of shape \(0, 3\)"),
    (lambda: four(2, 3) @ four(2, 3), r"shapes \(2, 3\) and \(2, 3\) have no matrix product"),
    (lambda: four(2, 3) @ four(), r"shapes \(2, 3\) and \(\) have no"),
    *((lambda mean=mean, e=e: nn.batch_norm(four(2, 3, 2, 2), four(3), four(3), mean, np.ones(3), True, eps=e), match)
      for mean, e, match in (([0, 0, 0], 1e-5, "arrays of a floating type"), (np.zeros(3), -5, "eps is a number"))),
    (lambda: four(4) @ four(1), "vectors of 4 and 1 entries have no product"),
    (lambda: four(2, 3).transpose(0, 3), "axis 3 is out of bounds"),
    (lambda: nn.linear(four(), four(2, 3)), r"linear takes x \(..., in\), .* not \(\), \(2, 3\) and None"),
    (lambda: nn.linear(four(5, 3), four(2, 3), four(1)), r"not \(5, 3\), \(2, 3\) and \(1,\)"),
    (lambda: nn.linear(np.ones((5, 3)), four(2, 3)), "one floating type, not float64 and float32"),
    (lambda: nn.linear(four(5, 3), four(2, 4)), r"not \(5, 3\), \(2, 4\)"),
    (lambda: nn.conv2d(four(1, 1, 4, 4), four(1, 1, 2, 2), 1.5), "stride of conv2d .*, not 1.5"),
    (lambda: nn.conv2d(four(1, 1, 4, 4), four(1, 1, 2, 2), (1, 1)), r"stride of conv2d .*, not \(1, 1\)"),
    (lambda: nn.max_pool2d(four(1, 4, 4), 2), r"max_pool2d takes images \(N, C, H, W\), one or more, not \(1, 4, 4"),
    (lambda: nn.max_pool2d(four(1, 1, 4, 4), 2, "same"), "stride of max_pool2d is .* at least 1, not 'same'"),
    (lambda: nn.max_pool2d(four(1, 1, 4, 4), (2, 2)), r"size of max_pool2d is .*, not \(2, 2\)"),
    (lambda: nn.conv2d(four(0, 1, 4, 4), four(1, 1, 2, 2)), r"one or more of each, not \(0, 1, 4, 4\)"),
    (lambda: nn.global_avg_pool(four(0, 1, 4, 4)), "one or more"),
    (lambda: nn.global_avg_pool(four(2, 1, 0, 4)), "one or more"),
    (lambda: nn.BatchNorm2d(3).eval()(four(0, 3, 4, 4)), "one or more"),
    (lambda: nn.batch_norm(four(2, 3, 2, 2), four(3), four(1), np.zeros(3), np.ones(3), True), "of one shape"),
    *((lambda make=make: make(), match) for make, match in (
        (lambda: nn.Linear(0, 3), "each size of a Linear is a whole number of at least 1, not 0"),
        (lambda: nn.Linear(3, -1), "not -1"), (lambda: nn.Linear(3, 1.5), "not 1.5"),
        (lambda: nn.Linear("3", 1), "not '3'"),
        (lambda: nn.Conv2d(1, 2, (3, 3)), r"each size of a Conv2d .* not \(3, 3\)"),
        (lambda: nn.Conv2d(1, 2, 3, 0), "Conv2d's stride is a whole number of at least 1, not 0"),
        (lambda: nn.Conv2d(1, 2, 3, padding="same"), "Conv2d's padding"), (lambda: nn.BatchNorm2d(0), "channels"),
        (lambda: nn.BatchNorm2d(2, eps=-1), "eps is a number of at least 0, not -1"),
        (lambda: nn.BatchNorm2d(2, momentum=None), "momentum is a number of at least 0, not None"))),
    (lambda: nn.generator(-1), "seed is a whole number of at least 0, not -1"),
    (lambda: nn.generator(None), "not None"), (lambda: nn.generator(0, "a", 1.5), "no name is a whole number"),
    (lambda: nn.generator(0, ""), "not ''"), (lambda: nn.initialize(mlp(3, 2), "0"), "seed is .* not '0'"),
    (lambda: nn.allocate([5, 5], 5.5), "budget is a whole number of at least 0, not 5.5"),
    (lambda: nn.allocate([5, 5.5], 5), "size of a layer is"), (lambda: nn.allocate([], 0), "0 layers"),
    (lambda: nn.sparsify(mlp(12, 7, 3), "30", 0), "budget is a whole number of at least 0, not '30'"),
    (lambda: nn.sparsify(mlp(12, 7, 3), 30, 0, kept=[20.9, 10]), "kept count is a whole number .*, not 20.9"),
    (lambda: nn.sparsify(mlp(12, 7, 3), 30, -1), "seed"),
    (lambda: nn.sparsify(nn.Sequential(nn.ReLU()), 30, 0), "another Layer, and this one has none"),
    (lambda: nn.Parameter(np.ones(3), mask=[0.5, 1, 0]), "a mask is an array of booleans, or of 0 and 1"),
    (lambda: nn.SGD([], 0.1), "one Parameter or more, each once"),
    (lambda: nn.SGD(2 * mlp(3, 2).parameters(), 0.1), "one Parameter or more, each once"),
    *((lambda lr=lr: nn.SGD(mlp(3, 2).parameters(), lr), "lr is a number of at least 0")
      for lr in (math.nan, math.inf, "0.1", None, 0.1j, np.complex64(1))),
    (lambda: setattr(nn.SGD(mlp(3, 2).parameters(), 0.1), "lr", math.nan), "lr is a number"),
    (lambda: nn.SGD(mlp(3, 2).parameters(), 0.1).load_state_dict({"velocity.2": np.ones(3)}), "velocity.2 is unexp"),
    (lambda: nn.SGD(mlp(3, 2).parameters(), 0.1).load_state_dict({"velocity.0": np.ones(6) * 1j}), "the type complex"),
    *((lambda name=name, value=value: setattr(nn.Parameter(np.ones((2, 3))), name, value), match)
      for name, value, match in (("grad", np.ones(3), r"grad of shape \(3,\) is assigned to a parameter of .*\(2, 3"),
                                 ("data", [1.0], r"data of shape \(1,\)"), ("mask", [True], "a mask of shape"))),
    (lambda: nn.ConstantLR(math.nan), "lr is"), (lambda: nn.MultiStepLR(1.0, [3, -1]), "a milestone is .* not -1"),
    (lambda: nn.MultiStepLR(1.0, [3], gamma=-1), "gamma"), (lambda: nn.CosineLR(1.0, 0), "epochs is a whole .*, not 0"),
])
def test_wrong_values_are_told_in_one_sentence(mistake, match):
    with pytest.raises(ValueError, match=match):
        mistake()


def test_arrays_and_empty_batches_are_right():
    """An array is a constant wherever a Tensor is taken; a batch of no examples goes through what has no mean."""
    x, w, net = normal(4, 3), nn.Parameter(normal(2, 3)), mlp(3, 5, 2, dtype=np.float64)
    for operation in (nn.relu, nn.exp, nn.neg, nn.sum, nn.mean, nn.transpose, net, lambda x: nn.linear(x, w),
                      lambda x: nn.power(x, 2), lambda x: nn.reshape(x, 12), lambda x: nn.getitem(x, 1),
                      lambda x: nn.cross_entropy(x, [0, 1, 2, 0]),
                      lambda x: nn.global_avg_pool(x.reshape(1, 1, 4, 3)),
                      lambda x: nn.max_pool2d(x.reshape(1, 1, 4, 3), 2),
                      lambda x: nn.conv2d(x.reshape(1, 1, 4, 3), np.ones((1, 1, 2, 2)))):
        np.testing.assert_array_equal(operation(x).data, operation(nn.Tensor(x)).data)
    for kept in (None, 300, 40):  # dense, and with products of the kept entries
        net = mlp(100, 50, 10)
        if kept:
            nn.sparsify(net, kept, seed=0)
        out = net(np.zeros((0, 4, 25), np.float32))
        out.sum().backward()
        assert out.shape == (0, 10) and not any(p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("before, after", list(itertools.product([None, 600, 300, 30], [500, 150, 15])))
def test_velocities_follow_another_mask(backend, before, after):
    """Pruned entries stay zero, in p, v and g, and those that both masks keep go on as if nothing had happened."""
    rng = np.random.default_rng(0)
    masks = [None if n is None else rng.permutation(np.arange(1000) < n).reshape(20, 50) for n in (before, after)]
    p = nn.Parameter(nn.xp.asarray(normal(20, 50, rng=rng)))
    optimizer = nn.SGD([p], lr=0.1, momentum=0.9)  # before it is masked
    w, v = nn.to_host(p.data).copy(), np.zeros((20, 50))
    for mask in masks:
        kept = np.ones((20, 50), bool) if mask is None else mask
        p.set_mask(mask)
        w, v = w * kept, v * kept
        for step in range(3):
            p.grad = nn.xp.ones((20, 50))  # assigned, it is masked
            optimizer.step()
            v = 0.9 * v + kept
            w = w - 0.1 * v
            optimizer.zero_grad()
            np.testing.assert_allclose(nn.to_host(p.data), w, rtol=1e-12, atol=1e-12)
        assert not nn.to_host(p.data)[~kept].any()
        state = optimizer.state_dict()["velocity.0"]
        np.testing.assert_allclose(state, v.reshape(-1) if state.size == 1000 else v[mask], rtol=1e-12)


@pytest.mark.parametrize("kept, other_kept", [(80, 120), (80, 5500), (2000, 120)])
def test_an_optimiser_is_loaded_after_its_network(backend, kept, other_kept):
    """Into networks with other masks; before it, where its state is of the kept entries alone, it is refused."""
    def build(kept, seed):
        net = mlp(100, 50, 10)
        nn.sparsify(net, kept, seed)
        return net, nn.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step(net, optimizer):
        x = nn.xp.asarray(np.random.default_rng(3).standard_normal((8, 100)).astype(np.float32))
        nn.cross_entropy(net(nn.Tensor(x)), nn.xp.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()

    saved, other = build(kept, 0), build(other_kept, 1)
    step(*saved)
    step(*other)
    states = [part.state_dict() for part in saved]
    if states[1]["velocity.0"].size < 5000:
        before = other[1].state_dict()
        with pytest.raises(ValueError, match="velocity.0 has shape .* of what its mask keeps: load the network first"):
            other[1].load_state_dict(states[1])
        assert all(np.array_equal(v, before[name]) for name, v in other[1].state_dict().items())
    for part, state in zip(other, states):
        part.load_state_dict(state)
    for pair in (saved, other):
        step(*pair)
    for a, b in zip(saved[0].parameters(), other[0].parameters()):
        np.testing.assert_array_equal(nn.to_host(a.data), nn.to_host(b.data))
        assert a.count == np.count_nonzero(nn.to_host(b.data))


def test_an_optimiser_does_not_take_the_state_of_another_mask_of_the_same_count(backend):
    nets = [mlp(100, 50, 10) for _ in range(2)]
    optimizers = [nn.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    for seed, (net, optimizer) in enumerate(zip(nets, optimizers)):
        nn.sparsify(net, 80, seed)
        for p in net.parameters():
            p.grad = nn.xp.ones_like(p.data)
        optimizer.step()
    state, copied = optimizers[0].state_dict(), nets[0].state_dict()
    if state["velocity.0"].size < 5000:
        with pytest.raises(ValueError, match="velocity.0 belongs to another mask: load the network first"):
            optimizers[1].load_state_dict(state)
    nets[1].load_state_dict(copied)
    optimizers[1].load_state_dict(state)
    for (a, v), (b, u) in zip(*(optimizer.state_dict().items() for optimizer in optimizers)):
        assert a == b
        np.testing.assert_array_equal(v, u)


@pytest.mark.parametrize("kept", [1000, 500, 50, 5])
def test_what_is_assigned_keeps_the_mask(backend, kept):
    """Masked entries stay zero whatever a user assigns; weights and gradients of others are not touched."""
    rng, given, ones = np.random.default_rng(0), nn.xp.ones((20, 50), np.float32), nn.xp.ones((20, 50), np.float32)
    mask = rng.permutation(np.arange(1000) < kept).reshape(20, 50)
    p = nn.Parameter(given, mask)
    optimizer = nn.SGD([p], lr=0.5, momentum=0.5, weight_decay=0.1)
    for step in range(2):
        p.grad = ones
        p.grad += 2
        np.testing.assert_array_equal(nn.to_host(p.grad), 3 * mask)
        optimizer.step()
        assert np.count_nonzero(nn.to_host(p.data)) == p.count == kept
        p.data += 1
        p.data = p.data * 2
        backup = p.data
        p.data = nn.Tensor(ones)
        np.testing.assert_array_equal(nn.to_host(p.data), mask)
        p.data = backup  # which nothing has changed
        assert np.count_nonzero(nn.to_host(p.data)) == kept and np.unique(nn.to_host(p.data)[mask]).item() != 1
        p.data = ones
    p.mask = np.arange(1000).reshape(20, 50) < 3
    assert p.count == 3 and np.count_nonzero(nn.to_host(p.data)) == mask.reshape(-1)[:3].sum()
    assert nn.to_host(given).all() and (nn.to_host(ones) == 1).all()


@pytest.mark.parametrize("kept", [500, 50, 5])
def test_no_gradient_or_velocity_reaches_masked_entries(backend, kept):
    """Not an infinite one, nor one of another mask that an optimiser is loaded with."""
    rng = np.random.default_rng(0)
    masks = [rng.permutation(np.arange(1000) < kept).reshape(20, 50) for _ in range(2)]
    p, q = (nn.Parameter(nn.xp.ones((20, 50), np.float32), mask) for mask in (masks[0], None))
    one, other = (nn.SGD([w], lr=0.1, momentum=0.9) for w in (p, q))
    q.grad = nn.xp.ones_like(q.data)
    other.step()
    one.load_state_dict(other.state_dict())  # of all entries
    p.grad = nn.xp.ones_like(p.data)
    one.step()
    np.testing.assert_array_equal(nn.to_host(p.data) != 0, masks[0])
    x = nn.Tensor(nn.xp.full((2, 50), 1e30, np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        (nn.linear(x, p).sum() * 1e10).backward()
        one.step()
        p.mask = masks[1]
        p.data = nn.xp.ones_like(p.data)
        p.grad = nn.xp.zeros_like(p.data)
        one.step()
    assert not nn.to_host(p.data)[~masks[1]].any()


def test_a_gradient_of_kept_entries_is_whole_when_it_is_looked_at():
    """And counts as it is then: what is written into it, added by the next backward, or left by a new mask."""
    net, x = nn.Sequential(nn.Linear(30, 20, bias=False)), np.ones((4, 30), np.float32)
    nn.sparsify(net, 40, seed=0)
    weight, mask = net[0].weight, net[0].weight.mask

    def backward():
        net(nn.Tensor(x)).sum().backward()

    backward()
    backward()
    assert weight.held.shape == (40,)
    np.testing.assert_array_equal(weight.grad, 8.0 * mask)
    assert weight.grad is weight.grad and weight.held.shape == (20, 30)
    weight.grad[...] *= 2
    backward()
    np.testing.assert_array_equal(weight.grad, 20.0 * mask)
    before = weight.data.copy()
    nn.SGD([weight], 1.0).step()
    np.testing.assert_array_equal(weight.data, before - np.float32(20) * mask)
    nn.SGD([weight], 1.0).zero_grad()
    assert weight.grad is None
    backward()
    half = mask & (np.cumsum(mask).reshape(mask.shape) % 2 == 0)
    weight.mask = half
    np.testing.assert_array_equal(weight.grad, 4.0 * half)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_between_backward_and_step(copied):
    """It has the gradient, of the kept entries alone as the original still has, and takes the same step."""
    net = nn.Sequential(nn.Linear(300, 200, bias=False))
    nn.sparsify(net, 400, seed=0)
    net(nn.Tensor(normal(4, 300).astype(np.float32))).sum().backward()
    weight = net[0].weight
    other = copied(weight)
    assert weight.held.shape == other.held.shape == (400,) and len(pickle.dumps(weight)) < 4 * 60_000 + 60_000 + 9_000
    before = weight.data.copy()
    other.data = other.data  # of its own, also of a shallow copy
    for p in (weight, other):
        nn.SGD([p], 0.1).step()
    np.testing.assert_array_equal(weight.data, other.data)
    assert (weight.data != before).sum() == 400


def test_a_gradient_of_kept_entries_follows_the_dtype_of_data():
    net = nn.Sequential(nn.Linear(30, 20, bias=False, dtype=np.float64))
    nn.sparsify(net, 40, seed=0)
    weight = net[0].weight
    net(nn.Tensor(np.ones((4, 30)))).sum().backward()
    weight.data = weight.data.astype(np.float32)
    net(nn.Tensor(np.ones((4, 30), np.float32))).sum().backward()
    assert weight.held.dtype == np.float32 and weight.held.shape == (40,)
    np.testing.assert_array_equal(weight.grad, 8.0 * weight.mask)


def test_a_state_of_kept_entries_alone(backend):
    """It is smaller on a CPU, and read like one of all entries; what does not fit is refused, with nothing changed."""
    net, other = mlp(30, 40, 4), mlp(30, 40, 4)
    nn.sparsify(net, 100, seed=0)
    state = net.state_dict(kept=True)
    if backend == "cpu":
        assert state["1.weight"].shape == state["1.weight.kept"].shape == (net[1].weight.count,)
        assert "1.weight.mask" not in state
    other.load_state_dict(state)
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], value, err_msg=name)
    before = other.state_dict()
    nn.sparsify(net, 200, seed=1)
    weight = net[1].weight
    positions = np.flatnonzero(nn.to_host(weight.mask))
    state = net.state_dict() | {"1.weight": nn.to_host(weight.data).reshape(-1)[positions], "1.weight.kept": positions}
    del state["1.weight.mask"]
    for wrong in (positions[:-1], positions[::-1], positions + 1200, positions - positions[0] - 1, positions * 0.5):
        with pytest.raises(ValueError, match=r"entries are kept of a parameter of shape \(40, 30\), at positions"):
            other.load_state_dict(state | {"1.weight.kept": wrong})
    with pytest.raises(ValueError, match="1.weight has the type"):
        other.load_state_dict(state | {"1.weight": np.full(len(positions), "a")})
    for name, value in before.items():
        np.testing.assert_array_equal(other.state_dict()[name], value, err_msg=name)
    other.load_state_dict(state)
    np.testing.assert_array_equal(nn.to_host(other[1].weight.data), nn.to_host(weight.data))


def test_networks_can_be_copied():
    """By copy and pickle: to average weights, keep the best, or hand them to a process."""
    net, x = mlp(20, 30, 4), np.ones((3, 20), np.float32)
    nn.sparsify(net, 60, seed=0)
    for p in net.parameters():
        p.time = nn.clock + 1000  # as in a process that has trained for longer
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        out = other(x)
        np.testing.assert_array_equal(out.data, net(x).data)
        nn.Parameter([1.0]).set_mask(None)  # the clock goes on
        out.sum().backward()
        nn.SGD(other.parameters(), 0.1).step()
        assert nn.weight_count(other) == 60 == sum(np.count_nonzero(p.data) for p in other.parameters()[::2])
        assert (other(x).data != net(x).data).any()


@pytest.mark.parametrize("change", [lambda m: m.reset(0), lambda m: nn.initialize(m, 5), lambda m: nn.sparsify(m, 3, 0),
                                    lambda m: m.weight.set_mask(None), lambda m: m.weight.fill(np.ones((2, 3)))])
def test_weights_drawn_between_forward_and_backward_are_noticed(change):
    layer = nn.Linear(3, 2, bias=False, rng=0)
    loss = layer(np.ones((1, 3), np.float32)).sum()
    change(layer)
    with pytest.raises(ValueError, match="after a parameter of the graph was changed"):
        loss.backward()


def test_a_sparse_layer_in_several_threads(monkeypatch):
    """The first use of a mask, at which its rows are put together, by many at once."""
    monkeypatch.setattr(nn.engine, "cheaper", lambda *_: True)
    x, before = np.ones((2, 784), np.float32), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            for seed in range(40):
                layer, start = nn.Linear(784, 300, rng=0), threading.Barrier(6)
                nn.sparsify(layer, 3000, seed)
                outs = list(pool.map(lambda _: (start.wait(), layer(x).data.copy())[1], range(6)))
                for out in outs:
                    np.testing.assert_array_equal(out, layer(x).data)
    finally:
        sys.setswitchinterval(before)


def test_states_that_hold_more_than_weights():
    class Net(nn.Module):
        def __init__(self):
            self.layer, self.attention = nn.Linear(2, 2), nn.ReLU()
            self.attention.mask = np.array([0, -1e9])
            self.names = np.array(["cat", "dog"])

    net = Net()
    net.load_state_dict(net.state_dict())
    for refuse in (net.load_state_dict, nn.SGD(net.layer.parameters(), 0.1).load_state_dict):
        with pytest.raises(ValueError, match="3 is unexpected"):
            refuse({3: np.ones(2)})


def test_numbers_of_arrays_and_text():
    x = nn.Tensor(1.25)
    assert (f"{x:.1f}", f"{x}") == ("1.2", "Tensor(array(1.25, dtype=float32))") and nn.to_host(x) is x.data
    assert nn.SGD(mlp(3, 2).parameters(), np.array(0.5)).lr == 0.5
    assert nn.allocate([np.array(3), 4], np.int64(5)) == [2, 3]
    p = nn.Parameter(np.float32([1, 2]))
    for data, dtype in ((np.array([3, 4]), np.float32), ([3, 4], np.float32), (np.array([3.0, 4]), np.float64)):
        p.data, p.grad = data, [True, False]
        assert (p.data.dtype, p.grad.dtype, p.data.tolist(), p.grad.tolist()) == (dtype, dtype, [3, 4], [1, 0])


def test_a_parameter_is_a_copy_and_may_be_a_number():
    array = np.ones((2, 3), np.float32)
    assert nn.Parameter(array, np.zeros((2, 3))).data.sum() == 0 and array.all()
    p = nn.Parameter(2.0)
    assert p.shape == ()
    (p * p).backward()
    nn.SGD([p], lr=0.5).step()
    assert p.item() == 0


def test_data_assigned_between_forward_and_backward_are_noticed():
    p = nn.Parameter(np.ones(3))
    loss = (p * p).sum()
    p.data = 2 * p.data
    with pytest.raises(ValueError, match="after a parameter of the graph was changed"):
        loss.backward()


def test_tensors_can_be_found_in_lists():
    params = mlp(3, 4, 2).parameters()
    assert [params.index(p) for p in params] == [0, 1, 2, 3] and nn.Tensor([1.0]) not in params
    assert len({params[0]: 1, params[1]: 2}) == 2 and params[0] != params[1]


def test_a_program_that_makes_numpy_raise():
    """Probabilities of a softmax underflow, and that is right."""
    with np.errstate(all="raise"):
        logits = nn.Tensor(np.float32([[0, 200, -150], [90, 90, 3]]), requires_grad=True)
        loss = nn.cross_entropy(logits, [1, 0])
        loss.backward()
        p = nn.Parameter([1.0, 0.0])
        optimizer = nn.SGD([p], lr=1, momentum=0.1)
        for step in range(60):  # a velocity that fades away
            p.grad = [1.0 * (step == 0), 0.0]
            optimizer.step()
    assert loss.item() == np.float32(math.log(2) / 2) and logits.grad[1].tolist()[:2] == [-0.25, 0.25]


def test_a_mask_is_a_copy_and_reset_keeps_it():
    mask = np.eye(3, dtype=bool)
    layer = nn.Linear(3, 3)
    layer.weight.set_mask(mask)
    mask[:] = True
    layer.reset(np.random.default_rng(0))
    assert layer.weight.count == np.count_nonzero(layer.weight.data) == 3
    a, b = (nn.Linear(3, 3, rng=0).weight.data for _ in range(2))  # a seed serves as well as a generator
    np.testing.assert_array_equal(a, b)


def tied():
    class Net(nn.Module):
        def __init__(self):
            self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
            self.again.weight = self.first.weight  # one Parameter in two layers
            self.same = self.first  # one layer by two names
            self.deep = {"a": [[nn.Linear(4, 2)], nn.Parameter(np.ones(3))]}
            self.parent = [self]
            self.parent.append(self.parent)

        def forward(self, x):
            return self.deep["a"][0][0](self.same(self.again(self.first(x))))

    return Net()


def test_what_is_used_twice_counts_once():
    net, torch = tied(), import_torch()
    names = ["first.weight", "first.bias", "again.bias", "deep.a.0.0.weight", "deep.a.0.0.bias"]
    assert sorted(name for name, _ in net.named_parameters()) == sorted(names + ["deep.a.1"])
    assert list(net.state_dict()) == [name for name, _ in net.named_parameters()]
    assert [name for name, _ in nn.layers(net)] == ["first", "deep.a.0.0"] and nn.weight_count(net) == 16 + 8
    nn.initialize(net, 0)
    x = normal(5, 4).astype(np.float32)
    twin = [torch.tensor(p.data.copy(), requires_grad=True) for p in net.parameters() if p.shape != (3,)]
    by_name = dict(zip([n for n, p in net.named_parameters() if p.shape != (3,)], twin))
    w, b, c, v, d = (by_name[name] for name in names)
    f = torch.nn.functional.linear
    torch.nn.functional.cross_entropy(f(f(f(f(torch.tensor(x), w, b), w, c), w, b), v, d),
                                      torch.tensor([0, 1, 0, 1, 1])).backward()
    torch.optim.SGD(twin, lr=0.5).step()
    optimizer = nn.SGD(net.parameters(), lr=0.5)
    nn.cross_entropy(net(nn.Tensor(x)), np.array([0, 1, 0, 1, 1])).backward()
    optimizer.step()
    for name, p in net.named_parameters():
        if name in by_name:
            np.testing.assert_allclose(p.data, by_name[name].detach().numpy(), rtol=1e-5, atol=1e-6)
    nn.sparsify(net, 12.0, seed=np.int64(0))
    assert nn.weight_count(net) == 12 == sum(np.count_nonzero(layer.weight.data) for _, layer in nn.layers(net))


def test_a_sequential_with_more_than_its_modules():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2), nn.ReLU())
            self.head = nn.Linear(2, 1)

    assert list(Net().state_dict()) == ["0.weight", "0.bias", "head.weight", "head.bias"]
    part = Net()[:2]
    assert isinstance(part, nn.Sequential) and part(np.ones((3, 2), np.float32)).shape == (3, 2)


def test_numpy_settings_train_to_the_same_bits():
    """NumPy's float64 for lr, momentum and decay would make steps of a float32 network in float64."""
    after = []
    for kind in (float, np.float64):
        p = nn.Parameter(np.float32([0.1, 0.2, 0.3]))
        optimizer = nn.SGD((q for q in [p]), lr=kind(0.1), momentum=kind(0.9), weight_decay=kind(0.01))
        for _ in range(5):
            p.grad = p.data * np.float32(0.7)
            optimizer.step()
        after.append((p.data, optimizer.velocity[0]))
    assert after[1][1].dtype == np.float32
    np.testing.assert_array_equal(*after)


def test_labels_that_are_no_array_of_the_gpu(gpu):
    """Those of the host are looked at, and all integer types are taken."""
    gpu()
    z = nn.Tensor(nn.xp.asarray(np.eye(3, dtype=np.float32)))
    with pytest.raises(ValueError, match="not from -1 to 1"):
        nn.cross_entropy(z, [0, 1, -1])
    with pytest.raises(TypeError, match="integers"):
        nn.cross_entropy(z, nn.xp.zeros(3))
    same = [nn.cross_entropy(z, labels).item() for labels in ([0, 1, 2], nn.xp.asarray(np.arange(3, dtype=np.uint8)))]
    assert same[0] == same[1]


def test_modes_are_of_a_thread():
    """Evaluation in one thread cuts no graph of another's."""
    inside, end = threading.Event(), threading.Event()

    def evaluate():
        with nn.no_grad(), nn.skip_init():
            inside.set()
            end.wait()

    thread = threading.Thread(target=evaluate)
    thread.start()
    inside.wait()
    out = nn.Linear(2, 1, rng=0)(np.ones((3, 2), np.float32))
    end.set()
    thread.join()
    assert out.requires_grad and out.data.any()


@pytest.mark.parametrize("name, value, match", [
    ("0.weight.mask", np.full((2, 3), 0.5), "entries other than 0 and 1"),
    ("0.bias", np.array([None] * 2), "type object"),
    ("0.bias", np.ones(2) * 1j, "type complex128"), ("0.bias", ["a"] * 2, "type <U1")])
def test_a_state_of_no_numbers_changes_nothing(name, value, match):
    net = nn.Sequential(nn.Linear(3, 2))
    before = net.state_dict()
    with pytest.raises(ValueError, match=match):
        net.load_state_dict(before | {"0.weight": before["0.weight"] * 0, name: value})
    np.testing.assert_array_equal(net[0].weight.data, before["0.weight"])
