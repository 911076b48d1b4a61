"""nn.py: every operation against finite differences and PyTorch, then layers, masks and SGD."""

import itertools
import math

import numpy as np
import pytest

import nn

RNG = np.random.default_rng(0)


def normal(*shape, rng=RNG):
    return rng.standard_normal(shape)


# Each case: a name, the operation in our terms, in PyTorch's terms (x: tensors, t: the torch module), its inputs.
CASES = [
    ("add", lambda a, b: a + b, lambda t, a, b: a + b, [(3, 4), (3, 4)]),
    ("add broadcast", lambda a, b: a + b, lambda t, a, b: a + b, [(2, 3, 4), (3, 1)]),
    ("add both broadcast", lambda a, b: a + b, lambda t, a, b: a + b, [(3, 1), (1, 4)]),
    ("add number", lambda a: a + 0.1, lambda t, a: a + 0.1, [(3,)]),
    ("radd number", lambda a: 0.1 + a, lambda t, a: 0.1 + a, [(3,)]),
    ("same twice", lambda a: a + a * a, lambda t, a: a + a * a, [(3, 2)]),
    ("sub", lambda a, b: a - b, lambda t, a, b: a - b, [(4,), (2, 4)]),
    ("sub number", lambda a: a - 0.1, lambda t, a: a - 0.1, [(4,)]),
    ("rsub number", lambda a: 0.1 - a, lambda t, a: 0.1 - a, [(4,)]),
    ("mul", lambda a, b: a * b, lambda t, a, b: a * b, [(3, 4), (4,)]),
    ("mul scalar array", lambda a, b: a * b, lambda t, a, b: a * b, [(3, 4), ()]),
    ("div", lambda a, b: a / (b * b + 1), lambda t, a, b: a / (b * b + 1), [(3, 4), (3, 1)]),
    ("rdiv number", lambda a: 2 / (a * a + 1), lambda t, a: 2 / (a * a + 1), [(3,)]),
    ("power number", lambda a: a**3, lambda t, a: a**3, [(3, 4)]),
    ("power zero", lambda a: a**0 + a, lambda t, a: a**0 + a, [(3, 4)]),
    ("power fraction", lambda a: (a * a + 1) ** -0.5, lambda t, a: (a * a + 1) ** -0.5, [(3, 4)]),
    ("power tensor", lambda a, b: (a * a + 0.5) ** b, lambda t, a, b: (a * a + 0.5) ** b, [(3, 4), (4,)]),
    ("rpower", lambda a: 2**a, lambda t, a: 2**a, [(5,)]),
    ("neg", lambda a: -a, lambda t, a: -a, [(3, 4)]),
    ("exp", lambda a: a.exp(), lambda t, a: a.exp(), [(3, 4)]),
    ("log", lambda a: (a * a + 1).log(), lambda t, a: (a * a + 1).log(), [(3, 4)]),
    ("relu", lambda a: a.relu(), lambda t, a: a.relu(), [(30, 4)]),
    ("sum all", lambda a: a.sum(), lambda t, a: a.sum(), [(3, 4)]),
    ("sum axis", lambda a: a.sum(1), lambda t, a: a.sum(1), [(3, 4, 2)]),
    ("sum negative axis", lambda a: a.sum(-1), lambda t, a: a.sum(-1), [(3, 4, 2)]),
    ("sum axes keep", lambda a: a.sum((0, 2), keepdims=True), lambda t, a: a.sum((0, 2), keepdim=True), [(3, 4, 2)]),
    ("mean all", lambda a: a.mean(), lambda t, a: a.mean(), [(3, 4)]),
    ("mean axes", lambda a: a.mean((0, 2)), lambda t, a: a.mean((0, 2)), [(3, 4, 2)]),
    ("max all", lambda a: a.max(), lambda t, a: a.max(), [(3, 4)]),
    ("max axis", lambda a: a.max(1), lambda t, a: a.amax(1), [(3, 4)]),
    ("max axes keep", lambda a: a.max((0, 1), keepdims=True), lambda t, a: a.amax((0, 1), keepdim=True), [(3, 4, 2)]),
    ("reshape", lambda a: a.reshape(2, -1), lambda t, a: a.reshape(2, -1), [(3, 4)]),
    ("reshape tuple", lambda a: a.reshape((4, 3)), lambda t, a: a.reshape((4, 3)), [(3, 4)]),
    ("transpose", lambda a: a.transpose(), lambda t, a: a.permute(2, 1, 0), [(2, 3, 4)]),
    ("transpose axes", lambda a: a.transpose(1, -1, 0), lambda t, a: a.permute(1, -1, 0), [(2, 3, 4)]),
    ("T", lambda a: a.T, lambda t, a: a.T, [(2, 3)]),
    ("getitem slice", lambda a: a[1:, ::2], lambda t, a: a[1:, ::2], [(3, 5)]),
    ("getitem int, new axis", lambda a: a[1, None], lambda t, a: a[1, None], [(3, 5)]),
    ("getitem repeated", lambda a: a[[0, 2, 0]], lambda t, a: a[[0, 2, 0]], [(3, 5)]),
    ("getitem pairs", lambda a: a[nn.xp.array([0, 2]), nn.xp.array([1, 1])], lambda t, a: a[[0, 2], [1, 1]], [(3, 5)]),
    ("matmul", lambda a, b: a @ b, lambda t, a, b: a @ b, [(3, 4), (4, 5)]),
    ("matmul batched", lambda a, b: a @ b, lambda t, a, b: a @ b, [(2, 1, 3, 4), (5, 4, 2)]),
    ("matmul dot", lambda a, b: a @ b, lambda t, a, b: a @ b, [(4,), (4,)]),
    ("matmul vector left", lambda a, b: a @ b, lambda t, a, b: a @ b, [(4,), (2, 4, 3)]),
    ("matmul vector right", lambda a, b: a @ b, lambda t, a, b: a @ b, [(2, 3, 4), (4,)]),
    ("linear", lambda x, w: nn.linear(x, w), lambda t, x, w: t.nn.functional.linear(x, w), [(6, 4), (3, 4)]),
    ("linear bias", lambda x, w, b: nn.linear(x, w, b), lambda t, x, w, b: t.nn.functional.linear(x, w, b),
     [(6, 4), (3, 4), (3,)]),
    ("linear deep", lambda x, w, b: nn.linear(x, w, b), lambda t, x, w, b: t.nn.functional.linear(x, w, b),
     [(2, 5, 4), (3, 4), (3,)]),
    ("linear of stored-transposed input", lambda x, w, b: nn.linear(x.T, w, b),
     lambda t, x, w, b: t.nn.functional.linear(x.T, w, b), [(4, 6), (3, 4), (3,)]),
    ("cross_entropy", lambda z: nn.cross_entropy(z, nn.xp.asarray([2, 0, 1, 2])),
     lambda t, z: t.nn.functional.cross_entropy(z, t.tensor([2, 0, 1, 2])), [(4, 3)]),
    ("composition", lambda a, b: ((a @ b).relu() * 2 - b.sum(0)).exp().mean(),
     lambda t, a, b: ((a @ b).relu() * 2 - b.sum(0)).exp().mean(), [(3, 4), (4, 2)]),
]
ids = [case[0] for case in CASES]


def evaluate(operation, arrays, weights=None):
    """(output, gradients) of sum(output * weights) with respect to the arrays."""
    tensors = [nn.Tensor(nn.xp.asarray(a), requires_grad=True) for a in arrays]
    out = operation(*tensors)
    if weights is not None:
        out.backward(nn.xp.asarray(weights, dtype=out.dtype))
    return nn.to_host(out.data), [None if t.grad is None else nn.to_host(t.grad) for t in tensors]


@pytest.mark.parametrize("name, operation, theirs, shapes", CASES, ids=ids)
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
@pytest.mark.parametrize("name, operation, theirs, shapes", CASES, ids=ids)
def test_operation_against_pytorch(backend, name, operation, theirs, shapes, dtype, tolerance):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(2)
    arrays = [np.asarray(normal(*s, rng=rng), dtype) for s in shapes]
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    want = theirs(torch, *tensors)
    weights = np.asarray(normal(*want.shape, rng=rng), dtype)
    want.backward(torch.tensor(weights))
    out, gradients = evaluate(operation, arrays, weights)
    assert out.dtype == dtype and out.shape == tuple(want.shape)
    np.testing.assert_allclose(out, want.detach().numpy(), rtol=tolerance, atol=tolerance)
    for ours, tensor in zip(gradients, tensors):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=tolerance, atol=tolerance)


def test_every_operation_has_a_case():
    """A function of the operations section without a case above would go unchecked."""
    operations = {"add", "mul", "div", "neg", "power", "exp", "log", "relu", "sum", "mean", "max", "reshape",
                  "transpose", "getitem", "matmul", "linear", "cross_entropy"}
    helpers = {"product", "classify"}  # on arrays; what cross_entropy is made of
    source = open(nn.__file__).read()
    section = source[source.index("- operations"):source.index("- images")]
    defined = {line.split("(")[0].removeprefix("def ") for line in section.splitlines() if line.startswith("def ")}
    assert defined == operations | helpers
    assert all(any(op in name for name in ids) for op in operations - {"power"}) and "power tensor" in ids


# ---------------------------------------------------------------------------------------------- Tensor


def test_max_shares_the_gradient_among_ties():
    x = nn.Tensor(np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), requires_grad=True)
    x.max(1).sum().backward()
    np.testing.assert_array_equal(x.grad, [[0, 0.5, 0.5], [1, 0, 0]])


def test_power_at_zero_has_the_limit_as_gradient():
    x = nn.Tensor(np.zeros(2), requires_grad=True)
    y = nn.Tensor(np.array([0.0, 2.0]), requires_grad=True)
    (x**y).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0])
    np.testing.assert_array_equal(y.grad, [0, 0])


def test_dtypes_are_kept_and_float32_is_the_default():
    assert nn.Tensor([1, 2]).dtype == np.float32 and nn.Tensor(3.0).dtype == np.float32
    assert nn.Tensor(np.arange(3)).dtype == np.arange(3).dtype
    half = nn.Tensor(np.ones(3))
    assert (half * 0.1).data[0] == 0.1  # not float32's 0.1
    assert (nn.Tensor(np.ones(3, np.float32)) * 0.1).dtype == np.float32
    assert nn.Linear(3, 2).weight.dtype == np.float32 and nn.Linear(3, 2, dtype=np.float64).bias.dtype == np.float64


def test_array_on_the_left_gives_a_tensor():
    x = nn.Tensor(np.ones(3), requires_grad=True)
    for out in (np.ones(3) + x, np.ones(3) * x, np.ones(3) / x, np.eye(3) @ x, np.ones(3) - x):
        assert isinstance(out, nn.Tensor) and out.requires_grad


def test_backward_accumulates_over_graphs_and_uses_each_up():
    x = nn.Tensor(np.array([1.0, 2.0]), requires_grad=True)
    out = (x * x).sum()
    out.backward()
    (3 * x).sum().backward()
    np.testing.assert_array_equal(x.grad, [5, 7])
    with pytest.raises(ValueError, match="used up"):
        out.backward()
    with pytest.raises(ValueError, match="one number"):
        (x * x).backward()
    with pytest.raises(ValueError, match="requires one"):
        nn.Tensor([1.0]).backward()


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
    x = nn.Tensor(np.ones(2), requires_grad=True)
    y = x
    for _ in range(20_000):
        y = y + 1
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1])
    x.grad = None
    y = x
    for _ in range(60):
        y = (y + y) * 0.5
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1])


def test_backward_releases_the_graph():
    x = nn.Tensor(np.ones(3), requires_grad=True)
    middle = x * 2
    out = middle.sum()
    out.backward()
    assert middle.pull is None and middle.parents == () and middle.grad is None and out.parents == ()


def test_no_grad_keeps_nothing():
    x = nn.Tensor(np.ones(3), requires_grad=True)
    with nn.no_grad():
        y = x * 2
    assert not y.requires_grad and y.parents == () and (x * 2).requires_grad


def test_a_wrong_gradient_shape_is_caught():
    x = nn.Tensor(np.ones(3), requires_grad=True)
    broken = nn.result(x.data * 2, (x,), lambda g: (np.ones(4),))
    with pytest.raises(AssertionError, match=r"\(4,\).*\(3,\)"):
        broken.sum().backward()


def test_cross_entropy_is_stable_and_checks_shapes():
    z = nn.Tensor(np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0]], np.float32), requires_grad=True)
    loss = nn.cross_entropy(z, np.array([0, 0]))
    loss.backward()
    assert loss.item() == 1e4
    np.testing.assert_array_equal(z.grad, [[0, 0, 0], [-0.5, 0.5, 0]])
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        nn.cross_entropy(z, np.array([0, 0, 0]))


def test_use_device_says_why_there_is_no_gpu():
    with pytest.raises(ValueError, match="'tpu'"):
        nn.use_device("tpu")
    assert nn.use_device("cpu") == "cpu"
    try:
        nn.use_device("gpu")
    except RuntimeError as error:
        assert "a GPU was asked for" in str(error) and nn.xp is np
    finally:
        nn.use_device("cpu")


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

        def forward(self, x):
            return x

    names = ["stem.weight", "stem.bias", "blocks.0.weight", "blocks.1.1.weight", "blocks.1.1.bias"]
    net = Net()
    assert [name for name, _ in net.named_parameters()] == names
    assert list(net.state_dict()) == names + ["running"]
    assert [name for name, _ in nn.layers(net)] == ["stem", "blocks.0", "blocks.1.1"]
    net.eval()
    assert not net.training and not net.blocks[1][0].training
    net.train()
    assert net.blocks[1][1].training


def test_state_dict_round_trip_with_masks():
    one, two = mlp(12, 9, 5), mlp(12, 9, 5)
    nn.sparsify(one, 30, seed=1)
    state = one.state_dict()
    two.load_state_dict(state)
    x = normal(7, 12).astype(np.float32)
    np.testing.assert_array_equal(one(nn.Tensor(x)).data, two(nn.Tensor(x)).data)
    assert nn.weight_count(two) == 30
    one[1].weight.data += 1
    assert not np.array_equal(state["1.weight"], one[1].weight.data)  # a copy, not a view


def test_load_state_dict_names_every_fault_and_changes_nothing():
    net = mlp(4, 3, 2)
    before = net.state_dict()
    state = dict(before, extra=np.zeros(1))
    state["1.bias"] = np.zeros(7)
    del state["3.weight"]
    with pytest.raises(ValueError) as error:
        net.load_state_dict(state)
    for part in ("3.weight is missing", "extra is unexpected", "1.bias has shape (7,) instead of (3,)"):
        assert part in str(error.value)
    assert all(np.array_equal(before[k], v) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match=r"mask has shape \(2,\)"):
        net.load_state_dict(dict(before, **{"1.weight.mask": np.ones(2, bool)}))


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


def test_allocate_against_the_slow_version():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        sizes = [int(s) for s in rng.integers(1, rng.integers(2, 60), rng.integers(1, 9))]
        if rng.random() < 0.3:  # ties
            sizes = [s - s % 5 + 1 for s in sizes]
        budget = int(rng.integers(len(sizes), sum(sizes) + 1))
        assert nn.allocate(sizes, budget) == allocate_slowly(sizes, budget), (sizes, budget)


def test_allocate_proportionally_keeps_one_density():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        sizes = [int(s) for s in rng.integers(1, 500, rng.integers(1, 9))]
        budget = int(rng.integers(len(sizes), sum(sizes) + 1))
        kept = nn.allocate(sizes, budget, how="proportional")
        assert sum(kept) == budget and all(1 <= k <= s for k, s in zip(kept, sizes))
        shares = [s * budget / sum(sizes) for s in sizes]
        if min(shares) >= 1:  # no layer had to be saved from vanishing
            assert all(abs(k - share) < 1 for k, share in zip(kept, shares)), (sizes, budget)


@pytest.mark.parametrize("how", ["largest-first", "proportional"])
@pytest.mark.parametrize("budget", [0, 1, 61, -5])
def test_allocate_refuses_impossible_budgets(how, budget):
    with pytest.raises(ValueError) as error:
        nn.allocate([50, 10], budget, how)
    assert str(budget) in str(error.value) and "60" in str(error.value)


def test_allocate_refuses_unknown_ways():
    with pytest.raises(ValueError, match="'random'"):
        nn.allocate([5, 5], 5, "random")


@pytest.mark.parametrize("width, budget", list(itertools.product((5, 8, 40, 640), (3970, 6352))))
def test_weight_counts_of_the_mlp(width, budget):
    net = mlp(784, width, 10, bias=False)
    assert nn.weight_count(net) == 794 * width
    if budget <= 794 * width:
        kept = nn.sparsify(net, budget, seed=0)
        assert sum(kept) == nn.weight_count(net) == budget
        assert [layer.weight.count for _, layer in nn.layers(net)] == kept
        assert [np.count_nonzero(layer.weight.data) for _, layer in nn.layers(net)] == kept


def test_masks_are_uniform_and_depend_on_the_seed_alone():
    counts = np.zeros((6, 10))
    for seed in range(2000):
        net = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 3))
        nn.sparsify(net, 30, seed, kept=[21, 9])
        counts += net[0].weight.mask
    # each entry is kept with probability 0.35: 700 +- 21 times
    assert np.abs(counts - 700).max() < 5 * 21.3
    again = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 3))
    nn.sparsify(again, 30, seed, kept=[21, 9])
    for a, b in zip(net.parameters(), again.parameters()):
        assert a.data.tobytes() == b.data.tobytes()
    nn.sparsify(again, 30, seed + 1, kept=[21, 9])
    assert not np.array_equal(net[0].weight.mask, again[0].weight.mask)


def test_a_full_budget_is_the_dense_network():
    one, two = mlp(12, 7, 3), mlp(12, 7, 3)
    nn.sparsify(one, 105, seed=4)
    nn.initialize(two, seed=4)
    assert all(p.mask is None for p in one.parameters())
    assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("kept", [[20, 20], [0, 30], [85, 5], [30]])
def test_sparsify_refuses_counts_that_do_not_fit(kept):
    with pytest.raises(ValueError):
        nn.sparsify(mlp(12, 7, 3), 30, seed=0, kept=kept)


class Kernels(nn.Layer):
    """A layer with weights (out, in, k, k), as a convolution has."""

    def __init__(self, *shape):
        self.weight, self.bias = nn.Parameter(np.ones(shape, np.float32)), None


def test_io_only_removes_whole_kernels():
    rng = np.random.default_rng(0)
    for seed in range(200):
        net = nn.Sequential(Kernels(8, 3, 3, 3), Kernels(16, 8, 3, 3), Kernels(16, 8, 1, 1), nn.Linear(16, 10))
        budget = int(rng.integers(40, 8 * 27 + 16 * 72 + 128 + 160))
        kept = nn.sparsify(net, budget, seed, io_only=True)
        assert 0 <= budget - sum(kept) < 9 and sum(kept) == nn.weight_count(net)
        for layer in net[:2]:
            mask = layer.weight.mask
            if mask is not None:
                kernels = mask.reshape(*mask.shape[:2], -1)
                assert (kernels.all(-1) | ~kernels.any(-1)).all()


def test_whole_kernels_at_the_limit():
    assert sum(nn.whole_units([3, 3, 30], [9, 9, 9])) == 36
    assert nn.whole_units([9, 9], [9, 9]) == [9, 9]
    with pytest.raises(ValueError, match="cannot keep 30 weights in whole kernels: one in each layer makes 90"):
        nn.whole_units([3] * 10, [9] * 10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kept", [900, 300, 40])  # the dense product, the CSR product, kept entries only
@pytest.mark.parametrize("rule", [{}, dict(momentum=0.9, weight_decay=5e-4, nesterov=True)])
def test_masked_weights_stay_exactly_zero(kept, rule, dtype):
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(100, 50, dtype=dtype), nn.ReLU(), nn.Linear(50, 10, dtype=dtype))
    nn.sparsify(net, kept + 100, seed=0, kept=[kept, 100])
    start = net[0].weight.data.copy()
    optimizer = nn.SGD(net.parameters(), lr=0.1, **rule)
    for _ in range(200):
        x, labels = normal(20, 100, rng=rng).astype(dtype), rng.integers(0, 10, 20)
        nn.cross_entropy(net(nn.Tensor(x)), labels).backward()
        assert not net[0].weight.grad[~net[0].weight.mask].any()
        optimizer.step()
        optimizer.zero_grad()
    for layer in (net[0], net[2]):
        assert not layer.weight.data[~layer.weight.mask].any()
        assert layer.weight.data[layer.weight.mask].all()
    reaches_output = net[2].weight.mask.any(axis=0)  # a hidden unit without outgoing weights has no gradient
    trainable = net[0].weight.mask & reaches_output[:, None]
    assert (net[0].weight.data != start)[trainable].mean() > 0.8  # training did happen


@pytest.mark.parametrize("kept", [900, 300, 40])
def test_sparse_products_equal_dense_ones(backend, kept):
    """The three ways of multiplying with a masked weight give what the zeros in a dense one give."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(100, 50, dtype=np.float64))
    nn.sparsify(net, kept, seed=0)
    weight, bias = net[0].weight, net[0].bias
    x, g = nn.xp.asarray(normal(20, 100, rng=rng)), nn.xp.asarray(normal(20, 50, rng=rng))
    results = []
    for w in (weight, nn.Tensor(weight.data.copy(), requires_grad=True)):
        tensor = nn.Tensor(x, requires_grad=True)
        out = nn.linear(tensor, w, bias)
        out.backward(g)
        results.append((out.data, tensor.grad, w.grad))
    if backend != "cpu":  # where SGD leaves masked entries alone
        results[0] = (*results[0][:2], results[0][2] * weight.mask)
    for ours, dense in zip(results[0], (*results[1][:2], results[1][2] * weight.mask)):
        np.testing.assert_allclose(nn.to_host(ours), nn.to_host(dense), rtol=1e-12, atol=1e-12)


def test_a_shared_masked_parameter_adds_up_its_gradients():
    w = nn.Parameter(normal(40, 40), mask=RNG.random((40, 40)) < 0.02)
    x = nn.Tensor(normal(5, 40))
    nn.linear(nn.linear(x, w), w).sum().backward()
    dense = nn.Tensor(w.data.copy(), requires_grad=True)
    nn.linear(nn.linear(x, dense), dense).sum().backward()
    np.testing.assert_allclose(w.grad, dense.grad * w.mask, atol=1e-12)


def test_other_operations_respect_the_mask_too():
    for density in (0.5, 0.01):
        w = nn.Parameter(normal(30, 30), mask=RNG.random((30, 30)) < density)
        optimizer = nn.SGD([w], lr=0.1, momentum=0.9)
        for _ in range(3):
            ((w + 1) * (w + 1)).sum().backward()
            assert not w.grad[~w.mask].any() and w.grad[w.mask].all()
            optimizer.step()
            optimizer.zero_grad()
        assert not w.data[~w.mask].any()


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 2\)"):
        nn.Parameter(np.ones((2, 2)), mask=np.ones(3, bool))


# ---------------------------------------------------------------------------------------------- optimiser

RULES = [
    dict(), dict(weight_decay=0.01), dict(momentum=0.9), dict(momentum=0.9, weight_decay=5e-4),
    dict(momentum=0.9, nesterov=True), dict(momentum=0.5, weight_decay=0.1, nesterov=True),
]


@pytest.mark.parametrize("sparse", [None, 300, 130])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sgd_follows_pytorch(rule, sparse):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
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
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours.data, theirs.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_sgd_by_hand():
    """Two steps of the rule, nesterov with decay, computed here in the same order: equal to the last bit."""
    lr, momentum, decay = np.float32(0.1), 0.9, 0.01
    p = nn.Parameter(np.array([1.0, -2.0], np.float32))
    optimizer = nn.SGD([p], lr=0.1, momentum=momentum, weight_decay=decay, nesterov=True)
    w, v = p.data.copy(), None
    for gradient in ([0.5, 0.25], [1.0, -3.0]):
        p.grad = np.array(gradient, np.float32)
        optimizer.step()
        g = np.array(gradient, np.float32) + np.float32(decay) * w
        v = g if v is None else np.float32(momentum) * v + g
        w = w - lr * (g + np.float32(momentum) * v)
        np.testing.assert_array_equal(p.data, w)


def test_sgd_state_continues_the_trajectory():
    def trained(steps, state=None, weights=None):
        p = nn.Parameter(np.array([1.0, -2.0, 3.0]) if weights is None else weights)
        optimizer = nn.SGD([p], lr=0.1, momentum=0.9)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            p.grad = p.data**3
            optimizer.step()
        return p.data, optimizer.state_dict()

    whole, _ = trained(10)
    half, state = trained(5)
    np.testing.assert_array_equal(trained(5, state, half)[0], whole)
    with pytest.raises(ValueError, match=r"velocity.0 has shape \(2,\) instead of \(3,\)"):
        trained(1, {"velocity.0": np.zeros(2)})


@pytest.mark.parametrize("wrong", [dict(lr=-1), dict(lr=1, momentum=-0.1), dict(lr=1, weight_decay=-1),
                                   dict(lr=1, nesterov=True)])
def test_sgd_refuses_wrong_settings(wrong):
    with pytest.raises(ValueError):
        nn.SGD([], **wrong)


def test_schedules():
    assert [nn.ConstantLR(0.3)(e) for e in (0, 9)] == [0.3, 0.3]
    steps = nn.MultiStepLR(1.0, (2, 4), gamma=0.5)
    assert [steps(e) for e in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    cosine = nn.CosineLR(2.0, 10)
    assert cosine(0) == 2 and cosine(5) == pytest.approx(1) and cosine(10) == pytest.approx(0)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for ours, make in ((nn.MultiStepLR(0.1, (3, 5)), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, (3, 5))),
                       (nn.CosineLR(0.1, 8), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8))):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        schedule = make(optimizer)
        for epoch in range(8):
            assert ours(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            schedule.step()
