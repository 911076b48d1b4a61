"""Proofs of the CPU's engine that take long: thousands of shapes, and a whole ResNet-18 beside PyTorch's."""

import itertools

import numpy as np
import pytest
from test_engines_cpu import DTYPES, ORDERS, check, check_convolution
from test_nn import import_torch

import nn
from exp_resnet_cifar import ResNet18


def test_convolution_of_many_random_shapes():
    rng = np.random.default_rng(3)
    for i in range(10_000):
        N, C, out, kh, kw, stride = (int(n) for n in rng.integers(1, 8, 6))
        padding = int(rng.integers(8))
        H, W = (max(1, k - 2 * padding) + int(rng.integers(14)) for k in (kh, kw))
        check_convolution(rng, (np.float32, np.float64)[i % 2], (N, C, H, W), (out, C, kh, kw), stride, padding,
                          rng.choice(list(ORDERS), 3))


# ---------------------------------------------------------------------------------------------- ResNet-18


def layer_sizes(width, classes=10):
    """Weights of each convolution and linear layer of ResNet-18, in forward order."""
    sizes, before = [27 * width], width
    for i in range(4):
        after = width << i
        sizes += [9 * before * after, 9 * after**2] + [before * after] * (i > 0) + [9 * after**2] * 2
        before = after
    return [*sizes, before * classes]


def set_dtype(net, dtype):
    """Make all parameters and running estimates of a network this type."""
    for _, module in net.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, nn.Parameter):
                value.data = value.data.astype(dtype)
            elif isinstance(value, np.ndarray):
                setattr(module, name, value.astype(dtype))
    return net


def draw_parameters(net, rng):
    """Weights of the usual scale; BatchNorm's weights near 1 and its biases near +-2: most inputs of the ReLUs are
    then far from 0, and yet most channels have some on either side. All are numbers of float32.
    """
    before = None
    for p in net.parameters():
        if p.ndim > 1:
            bound = p.data[0].size ** -0.5
            values = rng.uniform(-bound, bound, p.shape)
        elif before == p.shape or before[1:] == before[-1:]:  # the bias of BatchNorm or of the classifier
            values = rng.choice([-2, 2], p.shape) + rng.normal(0, 0.2, p.shape)
        else:
            values = rng.uniform(0.7, 1.3, p.shape)
        p.data[...] = values.astype(np.float32)
        before = p.shape


@pytest.fixture
def torch():
    return import_torch()


def twin_of(torch, net, width):
    """The same network in PyTorch in float64, its parameters in the same order; the inputs of its ReLUs are kept."""
    from pytorch_models import resnet18  # where PyTorch is installed

    twin = resnet18(width, inplace=False).double()
    with torch.no_grad():
        for theirs, ours in zip(twin.parameters(), net.parameters(), strict=True):
            assert tuple(theirs.shape) == ours.shape
            theirs.copy_(torch.tensor(ours.data))
    return twin


def estimates(net):
    """The running estimates of our or PyTorch's network, in order."""
    named = net.state_dict().items() if isinstance(net, nn.Module) else net.named_buffers()
    return [np.asarray(value) for name, value in named if name.endswith(("running_mean", "running_var"))]


def margin(torch, twin, x):
    """The smallest |input| of any ReLU of a PyTorch network in training mode."""
    smallest = []
    hooks = [module.register_forward_hook(lambda _, inputs, __: smallest.append(inputs[0].abs().min().item()))
             for module in twin.modules() if isinstance(module, torch.nn.ReLU)]
    with torch.no_grad():
        twin(x)
    for hook in hooks:
        hook.remove()
    assert len(smallest) == 17
    return min(smallest)


@pytest.mark.parametrize("width, N", [(8, 4), (24, 2), (26, 2), (64, 1)])
def test_resnet18_is_pytorchs(torch, width, N):
    """Loss, every gradient, running estimates and evaluation mode, in float64 and float32, with PyTorch in float64.

    Where rounding moves the input of a ReLU across 0, gradients change by per cents, in PyTorch's float32 as well.
    So of the seeds 0, 1, ... the first one counts for which no input of a ReLU of the float64 twin is nearer to 0 than
    5e-5; float32 has errors of 8e-6 there. With that, every machine takes the same seed.
    """
    net = set_dtype(ResNet18(width, 10), np.float64)
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        draw_parameters(net, rng)
        twin = twin_of(torch, net, width)
        x, labels = rng.standard_normal((N, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, N)
        images = torch.tensor(x.astype(np.float64))
        if margin(torch, twin, images) > 5e-5:
            break
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    loss = torch.nn.functional.cross_entropy(twin(images), torch.tensor(labels))
    loss.backward()
    gradients, running = [p.grad.numpy() for p in twin.parameters()], [a.copy() for a in estimates(twin)]
    logits = twin.eval()(images).detach().numpy()
    initial = [a.copy() for a in net.state_dict().values()]
    for dtype, tolerance, gradient_tolerance in ((np.float64, 1e-12, 1e-9), (np.float32, 2e-5, 1e-3)):
        set_dtype(net, dtype).train()
        net.load_state_dict(dict(zip(net.state_dict(), initial)))
        for p in net.parameters():
            p.grad = None
        ours = nn.cross_entropy(net(nn.Tensor(x.astype(dtype))), labels)
        ours.backward()
        assert ours.dtype == dtype and ours.item() == pytest.approx(loss.item(), rel=tolerance)
        check([p.grad for p in net.parameters()], gradients, dtype, gradient_tolerance)
        check(estimates(net), running, dtype, tolerance)
        with nn.no_grad():
            check([net.eval()(nn.Tensor(x.astype(dtype))).data], [logits], dtype, tolerance * 10)


@DTYPES
def test_resnet18_trains_like_pytorch(torch, dtype):
    """Twenty steps of SGD with momentum, weight decay and masks: width 12 at the weights of width 8, the same batch in
    every step, so that the loss falls from 6 to below 0.01. In float64 the parameters stay together to 1e-8.

    float32 is compared with float64; with these biases of BatchNorm (see draw_parameters) few ReLUs flip, and the
    losses of PyTorch's float32 and of ours stay within 1e-5 of float64's, parameters within 1e-5 or, after a flip,
    3e-3.
    """
    rng = np.random.default_rng(2)
    net = set_dtype(ResNet18(12, 10), np.float64)
    nn.sparsify(net, 175_192, seed=2)
    draw_parameters(net, rng)
    for p in net.parameters():
        p.set_mask(p.mask)
    x, labels = rng.standard_normal((4, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, 4)
    twin = twin_of(torch, net, 12)
    set_dtype(net, dtype)
    rule = dict(lr=0.01, momentum=0.9, weight_decay=5e-4)
    mine, other = nn.SGD(net.parameters(), **rule), torch.optim.SGD(twin.parameters(), **rule)
    losses = []
    for _ in range(20):
        mine.zero_grad()
        other.zero_grad()
        ours = nn.cross_entropy(net(nn.Tensor(x.astype(dtype))), labels)
        loss = torch.nn.functional.cross_entropy(twin(torch.tensor(x.astype(np.float64))), torch.tensor(labels))
        ours.backward()
        loss.backward()
        for p, theirs in zip(net.parameters(), twin.parameters()):
            if p.mask is not None:
                theirs.grad *= torch.tensor(p.mask)
        mine.step()
        other.step()
        losses.append(loss.item())
        assert ours.item() == pytest.approx(loss.item(), abs=1e-10 if dtype == np.float64 else 1e-3)
    assert losses[0] > 2 and losses[-1] < 0.02
    tolerance = 1e-8 if dtype == np.float64 else 2e-2
    check([p.data for p in net.parameters()], [p.detach().numpy() for p in twin.parameters()], dtype, tolerance)
    check(estimates(net), estimates(twin), dtype, tolerance)
    for p in net.parameters():
        assert p.mask is None or not p.data[~p.mask].any()
    assert nn.weight_count(net) == 175_192


# ---------------------------------------------------------------------------------------------- its weights and masks

COUNTS = {8: 175_192, 12: 393_540, 18: 884_502, 40: 4_362_680, 64: 11_164_352}  # with 10 classes


@pytest.mark.parametrize("width", [8, 12, 18, 40, 64])
def test_weight_counts_of_resnet18(width):
    for classes in (10, 100):
        net = ResNet18(width, classes)
        assert [layer.weight.size for _, layer in nn.layers(net)] == layer_sizes(width, classes)
        assert nn.weight_count(net) == COUNTS[width] + 8 * width * (classes - 10)
        assert len(net.parameters()) == 21 + 2 * 20 + 1


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("base", COUNTS)
def test_allocation_of_the_papers_widths(base, classes):
    """What Appendix B says leaves one answer: layers up to a level are whole, the others cut to it or one below."""
    budget = int(np.sum(layer_sizes(base, classes)))
    for width in (8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 52, 56, 64, 90, 128, 181, 256, 512):
        sizes = layer_sizes(width, classes)
        if width < base:
            with pytest.raises(ValueError, match=f"cannot keep {budget:,} weights"):
                nn.allocate(sizes, budget)
            continue
        kept = nn.allocate(sizes, budget)
        level, cut = max(kept), [k for k, size in zip(kept, sizes) if k < size]
        assert int(np.sum(kept)) == budget and all(k <= size for k, size in zip(kept, sizes))
        assert all(level - 1 <= k for k in cut) and cut == sorted(cut)  # the last ones keep one more


@pytest.mark.parametrize("width, budget", [(12, 175_192), (16, 175_192), (18, 393_540), (10, 5000), (8, 175_192)])
def test_masks_of_resnet18(width, budget):
    """Of single weights and of whole kernels: the counts, the scale of the weights, and the same for the same seed."""
    net, wanted = ResNet18(width, 10), nn.allocate(layer_sizes(width), budget)
    for io_only, _ in itertools.product((False, True), range(2)):
        kept = nn.sparsify(net, budget, seed=4, io_only=io_only)
        assert nn.weight_count(net) == int(np.sum(kept)) and 0 <= budget - int(np.sum(kept)) < (9 if io_only else 1)
        for (name, layer), count, want in zip(nn.layers(net), kept, wanted, strict=True):
            w = layer.weight
            assert w.count == count == np.count_nonzero(w.data) and abs(count - want) < (9 if io_only else 1), name
            if w.mask is not None:
                kernels = w.mask.reshape(*w.shape[:2], -1)  # (O, C, k, k) -> (O, C, k k)
                assert not io_only or (kernels.all(-1) == kernels.any(-1)).all()
                bound = (w[0].size * count / w.size) ** -0.5
                assert 0.95 * bound < np.abs(w.data).max() <= bound * (1 + 1e-6)
