"""Automatic differentiation, layers, sparse masks and SGD on NumPy or CuPy arrays.

Everything that the experiments of "Are wider nets better given the same number of parameters?"
(Golubeva, Neyshabur, Gur-Ari, ICLR 2021, arXiv 2010.14495) need of a deep-learning framework, in reading
order: the engine, Tensor, operations, layers, masks (Appendix B of the paper), optimiser.

    model = Sequential(Flatten(), Linear(784, 80), ReLU(), Linear(80, 10))
    sparsify(model, budget=3970, seed=0)              # draws 3,970 of 63,520 weights, the others are zero for good
    optimizer = SGD(model.parameters(), lr=0.1)
    loss = cross_entropy(model(Tensor(images)), labels)
    loss.backward(); optimizer.step(); optimizer.zero_grad()
"""

import math
import warnings
import zlib
from builtins import sum as total
from collections.abc import Mapping
from numbers import Real

import numpy as np

import engines.cpu
from engines import EngineError, Mode, listed, output_size, pool_size, real, whole

__all__ = [
    "Tensor", "use_device", "to_host", "no_grad", "compiled", "generator",
    "exp", "log", "relu", "mean", "reshape", "transpose", "matmul", "linear", "classify", "cross_entropy",
    "conv2d", "batch_norm", "StatisticsError", "max_pool2d", "global_avg_pool",
    "Parameter", "Module", "Layer", "Linear", "ReLU", "Conv2d", "BatchNorm2d", "Flatten", "Sequential", "skip_init",
    "layers", "weight_count", "initialize", "allocate", "sparsify", "whole_units",
    "SGD", "ConstantLR", "MultiStepLR", "CosineLR",
]

# ---------------------------------------------------------------------------------------------- the engine

engine = engines.cpu.Engine()  # what computes; see engines/__init__.py
xp = engine.xp  # its array module: numpy, or cupy after use_device("gpu")


def use_device(device="auto", number=0, **options):
    """Choose what computes: "cpu", "gpu", or "auto" (a GPU if one is usable). Returns "cpu" or "gpu".

    number: of the machine's GPUs. options of a GPU's engine: precision ("fp32", "tf32" or "bf16"), and True or False
    for deterministic, tune (cuDNN's plans) and capture (CUDA graphs): see engines/gpu.py. Call it before anything is
    built: what was built before cannot be used. Raises RuntimeError when a GPU is asked for and cannot be; "auto" warns
    of why it is the CPU if CuPy is installed.
    """
    global engine, xp
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device is 'auto', 'cpu' or 'gpu', not {device!r}")
    if unknown := set(options) - {"precision", "deterministic", "tune", "capture"}:
        raise TypeError(f"use_device knows no option {min(unknown)!r}: a GPU's are precision, deterministic, tune and "
                        "capture")
    engine, xp = engines.cpu.Engine(), np
    if device == "cpu":
        return "cpu"
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
        cupy.cuda.Device(number % count).use()  # of one, each process may see another
        (cupy.zeros(1) + 1).sum()  # importing works without a driver, so launch something small
    except Exception as error:  # no cupy, no driver, no device, no compiler: each has its own type
        if device == "gpu":
            raise RuntimeError(f"a GPU was asked for but cannot be used: {why_no_gpu(error)}") from None
        if getattr(error, "name", None) != "cupy":  # it is installed
            warnings.warn(f"computing on the CPU, since the GPU cannot be used: {why_no_gpu(error)}", stacklevel=2)
        return "cpu"
    if number >= count > 1:
        raise RuntimeError(f"process {number + 1} of this machine finds {count} GPUs: start one for each")
    from engines.gpu import Engine

    engine = Engine(**options)
    xp = engine.xp
    return "gpu"


def why_no_gpu(error):
    """In one line, from what CuPy raised."""
    reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
    if "cudaErrorInsufficientDriver" not in reason:
        return reason
    from cupy.cuda import runtime

    has, needs = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if not has:
        return "there is no NVIDIA driver"
    older = 12000 <= has and has // 1000 < needs // 1000
    return (f"the driver's CUDA is {has // 1000}.{has % 1000 // 10} and CuPy's {needs // 1000}: "
            + ("requirements-gpu-cuda12.txt is for such a driver" if older else "update the driver"))


def to_host(array):
    """The same values, of an array or a Tensor, as a NumPy array."""
    return engine.to_host(array.data if isinstance(array, Tensor) else array)


def compiled(function):
    """A function of arrays that does what this one does; on a GPU, after a few calls, as one CUDA graph.

    Then nothing in it may depend on anything but the contents, addresses and shapes of its arguments and on arrays
    that it changes in place; what it returns is overwritten by the next call.
    """
    return engine.compiled(function)


def generator(seed, *key):
    """A NumPy generator for one purpose, independent of all others: generator(0, "mask", 3).

    key: names and non-negative integers. It runs on the CPU, so a seed means the same on every device.
    """
    words = [int.from_bytes(k.encode(), "big") if isinstance(k, str) and k else whole(k, "a key that is no name")
             for k in key]
    return np.random.default_rng(np.random.SeedSequence(whole(seed, "a seed"), spawn_key=words))


# ---------------------------------------------------------------------------------------------- Tensor


class Recording(Mode):
    recording = True  # False inside no_grad()
    drawing = True  # False inside skip_init()


mode = Recording()
put = object.__setattr__  # sets an attribute and does nothing else
clock = 0  # counts changes of parameters in place


class Tensor:
    """An array and how it was computed.

    data: the array, of a floating dtype, which is kept, not copied, and must not change before backward(); whole
        numbers, lists and Python's numbers become float32. Of a Tensor: its array, not its graph. Raises TypeError for
        what is no number.
    grad: d(loss)/d(data) after backward(), an array of data's shape and dtype, on a GPU in bf16 of weights of
        convolutions in bfloat16; only on leaves that require it.
    parents, vjp: the tensors it was computed from, and the vector-Jacobian product: the function that takes the
        gradient of the loss with respect to data to a tuple of gradients, one for each parent (None: that parent
        needs none); USED_UP after backward().
    takes: how many gradients vjp takes at most, whose sum is the one that is meant.
    time: of the clock, when it was computed or, a parameter, last changed.
    """

    __slots__ = ("data", "grad", "requires_grad", "parents", "vjp", "takes", "time")
    __array_ufunc__ = None  # array + Tensor is Tensor.__radd__, not an array of Tensors

    def __init__(self, data, requires_grad=False, dtype=None):
        if type(data) is not xp.ndarray or data.dtype.kind != "f" or dtype is not None:
            data = floats(data, dtype)
        self.data, self.grad, self.requires_grad = data, None, requires_grad
        self.parents, self.vjp, self.takes, self.time = (), None, 1, clock

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    T = property(lambda self: transpose(self))

    def __repr__(self):
        return f"{type(self).__name__}({self.data!r})"

    def __format__(self, spec):
        return format(self.item(), spec) if spec else str(self)

    def __array__(self, *_, **__):
        raise TypeError("a Tensor is no array, and NumPy would lose its gradient: use nn's operations, or its .data")

    def __eq__(self, other):
        """Whether it is the same Tensor, so that lists of Tensors can be searched."""
        if isinstance(other, Tensor):
            return self is other
        raise TypeError("a Tensor is compared with numbers and arrays by its .data")

    __hash__ = object.__hash__

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def item(self):
        return self.data.item()

    @np.errstate(under="ignore")  # whatever the program does about it elsewhere
    def backward(self, grad=None):
        """Add d(self)/d(leaf) to .grad of every leaf that requires it; grad, of self's shape, is 1 for one number.

        The graph is consumed: what a node kept for its gradient is freed as soon as it was used. Raises ValueError,
        before it changes anything, where part of the graph was used up by an earlier backward(), as by a loss that
        shares it, or where a parameter was changed since, as by a step: its gradient would be wrong.
        """
        if not self.requires_grad:
            raise ValueError("backward() on a tensor that no gradient can reach: nothing it was computed from "
                             "requires one, or it was computed inside no_grad()")
        if grad is None:
            if self.data.size != 1:
                raise ValueError(f"backward() without a gradient needs one number, not shape {self.shape}")
            grad = xp.ones_like(self.data)
        grad = floats(grad, self.data.dtype)
        if grad.shape != self.shape:
            raise ValueError(f"backward() of a tensor of shape {self.shape} takes a gradient of that shape, "
                             f"not {grad.shape}")
        if self.vjp is None:
            return self.accumulate(grad.copy())
        grads = {id(self): [grad]}  # of each node, those whose sum is its gradient
        order = topological_order(self)
        while order:
            node = order.pop()  # off the list, so that its data is freed once no other node needs it
            g = grads.pop(id(node))
            for parent, dp in zip(node.parents, node.vjp(*g)):
                if dp is None or not parent.requires_grad:
                    continue
                if parent.vjp is None:  # a leaf owns its gradient: copy what is a view or went through unchanged
                    parent.accumulate(dp.copy() if dp is g[0] or dp.base is not None else dp)
                    continue
                assert dp.shape == parent.shape, f"gradient of shape {dp.shape} for data of shape {parent.shape}"
                if dp.dtype is not parent.data.dtype:
                    dp = dp.astype(parent.data.dtype, copy=False)
                terms = grads.setdefault(id(parent), [])
                terms.append(dp)
                if len(terms) > parent.takes:
                    terms[:2] = [engine.add(*terms[:2])]
            node.parents, node.vjp = (), USED_UP

    def accumulate(self, g):
        """Add g, an array that nothing else holds, to .grad."""
        assert g.shape == self.shape, f"gradient of shape {g.shape} for data of shape {self.shape}"
        if g.dtype is not self.data.dtype:
            g = g.astype(self.data.dtype, copy=False)
        put(self, "grad", xp.asarray(g) if self.grad is None else engine.add(self.grad, g))

    # Operators and methods; the operations themselves are the functions below.
    def __add__(self, other): return add(self, other)
    def __radd__(self, other): return add(other, self)
    def __sub__(self, other): return sub(self, other)
    def __rsub__(self, other): return sub(other, self)
    def __mul__(self, other): return mul(self, other)
    def __rmul__(self, other): return mul(other, self)
    def __truediv__(self, other): return div(self, other)
    def __rtruediv__(self, other): return div(other, self)
    def __pow__(self, other): return power(self, other)
    def __matmul__(self, other): return matmul(self, other)
    def __rmatmul__(self, other): return matmul(other, self)
    def __neg__(self): return neg(self)
    def __bool__(self): return bool(self.data)
    def __float__(self): return float(self.item())
    def __getitem__(self, index): return getitem(self, index)
    def exp(self): return exp(self)
    def log(self): return log(self)
    def relu(self): return relu(self)
    def sum(self, axis=None, keepdims=False): return sum(self, axis, keepdims)
    def mean(self, axis=None, keepdims=False): return mean(self, axis, keepdims)
    def reshape(self, *shape): return reshape(self, *shape)
    def transpose(self, *axes): return transpose(self, *axes)


USED_UP = "used up"  # the vjp of a node whose gradient was computed


def floating(dtype):
    """dtype as a NumPy dtype; TypeError unless it is a floating one, bfloat16 among them."""
    dtype = np.dtype(object if dtype is None else dtype)  # not float64
    if not is_floating(dtype):
        raise TypeError(f"dtype is a floating type such as numpy.float32, not {dtype}")
    return dtype


def is_floating(dtype):
    return dtype.kind == "f" or dtype.name == "bfloat16"


def is_number(array):
    """Whether an array is of real numbers."""
    return array.dtype.kind in "biu" or is_floating(array.dtype)


def floats(data, dtype=None):
    """data as an array of a floating dtype: this one, its own, or float32; see Tensor."""
    data = data.data if isinstance(data, Tensor) else data
    array = xp.asarray(data)
    if not is_number(array):
        raise TypeError(f"a Tensor holds real numbers, not data of dtype {array.dtype}")
    own = hasattr(data, "dtype") and array.dtype.kind not in "biu"
    return xp.asarray(array, dtype=(array.dtype if own else np.float32) if dtype is None else floating(dtype))


def topological_order(root):
    """The computed tensors that root depends on, each after all that it depends on itself; root is last."""
    order, done, stack = [], set(), [root]
    while stack:
        node = stack[-1]
        waiting = [p for p in node.parents if p.vjp is not None and id(p) not in done]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        if id(node) not in done:
            if node.vjp is USED_UP:
                raise ValueError("backward() needs a part of the graph that an earlier backward() used up: add the "
                                 "losses that share it and call backward() once, or compute it again")
            if clock > node.time and any(p.time > node.time for p in node.parents):
                raise ValueError("backward() after a parameter of the graph was changed, by a step or another mask: "
                                 "compute the loss again")
            done.add(id(node))
            order.append(node)
    return order


def no_grad():
    """Inside it operations keep nothing for a backward pass."""
    return mode.being(recording=False)


def result(data, parents, vjp, takes=1):
    """The Tensor that an operation returns; it remembers parents and vjp only if a gradient can flow."""
    out = Tensor(data)
    if mode.recording and any([p.requires_grad for p in parents]):
        out.requires_grad, out.parents, out.vjp, out.takes = True, parents, vjp, takes
    return out


def unbroadcast(g, shape):
    """Sum g over the axes along which an operand of this shape was repeated."""
    if g.shape == shape:
        return g
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=repeated, keepdims=True) if repeated else g


def tensor(x):
    """x as a Tensor: itself, or an array as a constant."""
    return x if isinstance(x, Tensor) else Tensor(x)


def operands(x, y):
    """Both as Tensors; what is none, a number or an array, takes the other's dtype, so that 0.1 * x stays as precise as
    x, and x no more precise than it was.
    """
    if not isinstance(y, Tensor):
        y = Tensor(y, dtype=x.dtype if isinstance(x, Tensor) else None)
    return x if isinstance(x, Tensor) else Tensor(x, dtype=y.dtype), y


def images(x, what):
    """x as a Tensor; ValueError unless it holds images (N, C, H, W)."""
    x = tensor(x)
    if x.ndim != 4 or not x.size:
        raise ValueError(f"{what} takes images (N, C, H, W), one or more, not {x.shape}")
    return x


# ---------------------------------------------------------------------------------------------- operations
# Each returns a Tensor; g is the gradient of the loss with respect to it. In this module `sum` is the operation
# below, not Python's.


def add(x, y):
    """x + y:  dx = g, dy = g"""
    x, y = operands(x, y)
    return result(x.data + y.data, (x, y), lambda g: (unbroadcast(g, x.shape), unbroadcast(g, y.shape)))


def sub(x, y):
    """x - y:  dx = g, dy = -g"""
    x, y = operands(x, y)
    return result(x.data - y.data, (x, y), lambda g: (
        unbroadcast(g, x.shape), -unbroadcast(g, y.shape) if y.requires_grad else None))


def mul(x, y):
    """x y:  dx = g y, dy = g x"""
    if isinstance(x, Tensor) and isinstance(y, Real):  # nothing has to be brought to a GPU
        y = float(y)  # not a NumPy number, which would bring its dtype
        return result(x.data * y, (x,), lambda g: (g * y,))
    x, y = operands(x, y)

    def vjp(g):
        return (unbroadcast(g * y.data, x.shape) if x.requires_grad else None,
                unbroadcast(g * x.data, y.shape) if y.requires_grad else None)

    return result(x.data * y.data, (x, y), vjp)


def div(x, y):
    """x / y:  dx = g / y, dy = -g x / y^2"""
    x, y = operands(x, y)
    out = x.data / y.data

    def vjp(g):
        dx = g / y.data
        return unbroadcast(dx, x.shape), unbroadcast(-dx * out, y.shape) if y.requires_grad else None

    return result(out, (x, y), vjp)


def neg(x):
    """-x:  dx = -g"""
    x = tensor(x)
    return result(-x.data, (x,), lambda g: (-g,))


def power(x, n):
    """x^n for a number n:  dx = g n x^(n-1)"""
    if not isinstance(n, Real):
        raise TypeError(f"the power of a Tensor is a number, not {type(n).__name__}")
    x, n = tensor(x), n.item() if isinstance(n, np.number) else n
    return result(x.data ** n, (x,), lambda g: (g * n * x.data ** (n - 1 if n else 0),))  # not 0^-1 for n = 0


def exp(x):
    """e^x:  dx = g e^x"""
    x = tensor(x)
    out = xp.exp(x.data)
    return result(out, (x,), lambda g: (g * out,))


def log(x):
    """log x:  dx = g / x"""
    x = tensor(x)
    return result(xp.log(x.data), (x,), lambda g: (g / x.data,))


def relu(x):
    """max(x, 0):  dx = g [x > 0]"""
    x = tensor(x)
    out = xp.maximum(x.data, 0)
    return result(out, (x,), lambda g: (g * (out > 0),))


def sum(x, axis=None, keepdims=False):
    """Sum over axis:  dx = g, repeated along axis"""
    x = tensor(x)
    out = x.data.sum(axis=axis, keepdims=keepdims)

    def vjp(g):
        g = g if axis is None or keepdims else xp.expand_dims(g, axis)
        return (xp.broadcast_to(g, x.shape),)

    return result(out, (x,), vjp)


def mean(x, axis=None, keepdims=False):
    """Mean over axis:  dx = g / n, repeated along axis; ValueError if x has no entries"""
    x = tensor(x)
    if not x.size:
        raise ValueError(f"the mean of a Tensor of shape {x.shape}, without entries, is not defined")
    out = sum(x, axis, keepdims)
    return out * (out.size / x.size)


def reshape(x, *shape):
    """Another shape, the same entries in the same order:  dx = g in x's shape"""
    x = tensor(x)
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    return result(x.data.reshape(shape), (x,), lambda g: (g.reshape(x.shape),))


def transpose(x, *axes):
    """Axes in another order (reversed if none are given):  dx = g with the axes put back"""
    x = tensor(x)
    axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
    axes = axes or tuple(reversed(range(x.ndim)))
    out = x.data.transpose(axes)  # raises ValueError for axes that there are not
    return result(out, (x,), lambda g: (g.transpose(np.argsort([a % x.ndim for a in axes]).tolist()),))


def getitem(x, index):
    """x[index], any NumPy index:  dx = g at index (summed where an entry was taken repeatedly), else 0"""
    x = tensor(x)
    basic = all(isinstance(i, (int, slice, type(None), type(Ellipsis)))
                for i in (index if isinstance(index, tuple) else (index,)))

    def vjp(g):
        dx = xp.zeros_like(x.data)
        if basic:
            dx[index] = g
        else:
            xp.add.at(dx, index, g)
        return (dx,)

    return result(x.data[index], (x,), vjp)


def matmul(x, y):
    """x @ y, batched over leading axes:  dx = g y^T, dy = x^T g"""
    x, y = operands(x, y)
    if x.ndim == 1 and y.ndim == 1:
        if x.shape != y.shape:
            raise ValueError(f"vectors of {x.size} and {y.size} entries have no product")
        return sum(x * y)
    if x.ndim == 1:  # (k,) @ (..., k, n)
        out = matmul(reshape(x, 1, -1), y)  # (..., 1, n)
        return reshape(out, out.shape[:-2] + out.shape[-1:])
    if y.ndim == 1:  # (..., m, k) @ (k,)
        out = matmul(x, reshape(y, -1, 1))  # (..., m, 1)
        return reshape(out, out.shape[:-1])

    if not x.ndim or not y.ndim or x.shape[-1] != y.shape[-2]:
        raise ValueError(f"arrays of shapes {x.shape} and {y.shape} have no matrix product")

    def vjp(g):
        return (unbroadcast(g @ y.data.swapaxes(-1, -2), x.shape) if x.requires_grad else None,
                unbroadcast(x.data.swapaxes(-1, -2) @ g, y.shape) if y.requires_grad else None)

    return result(x.data @ y.data, (x, y), vjp)


def linear(x, w, b=None):
    """y = x w^T + b for x (..., in), w (out, in), b (out,):  dx = g w, dw = g^T x, db = sum of g"""
    x, w, b = tensor(x), tensor(w), None if b is None else tensor(b)
    size = w.data.shape
    if len(size) != 2 or x.data.shape[-1:] != size[1:] or b is not None and b.data.shape != size[:1]:
        raise ValueError(f"linear takes x (..., in), w (out, in) and b (out,) or None, not {x.shape}, {size} and "
                         f"{None if b is None else b.shape}")
    if x.data.dtype != w.data.dtype:
        raise ValueError(f"linear takes x and w of one floating type, not {x.dtype} and {w.dtype}; "
                         "convert one with .astype")
    if x.ndim != 2:  # (..., in) -> (batch, in) -> (..., out)
        return reshape(linear(reshape(x, -1, x.shape[-1]), w, b), x.shape[:-1] + w.shape[:1])
    parents = (x, w) if b is None else (x, w, b)
    pattern, bias = getattr(w, "pattern", None), None if b is None else b.data
    out, saved = engine.linear(x.data, w.data, bias, pattern)

    def vjp(g):
        wanted = x.requires_grad, w.requires_grad, b is not None and b.requires_grad
        return engine.linear_gradients(g, x.data, w.data, bias, pattern, saved, wanted)

    return result(out, parents, vjp)


def classify(logits, labels):
    """(cross_entropy(logits, labels), array (2,): the sum of the loss over the batch, how many answers are right)"""
    logits = tensor(logits)
    if not isinstance(labels, xp.ndarray):
        labels = labels.data if isinstance(labels, Tensor) else np.asarray(labels)
    shape = logits.data.shape
    if len(shape) != 2 or labels.shape != shape[:1] or 0 in shape:
        raise ValueError(f"cross_entropy takes logits (N, classes) and labels (N,), one or more of each, "
                         f"not {shape} and {labels.shape}")
    if labels.dtype != np.int64:
        if labels.dtype.kind not in "iu":
            raise TypeError(f"cross_entropy takes labels that are integers, not of {labels.dtype}")
        labels = labels.astype(np.int64)
    if isinstance(labels, np.ndarray):
        if np.maximum.reduce(labels.view(np.uint64)) >= shape[1]:  # as unsigned numbers negative ones are the largest
            raise ValueError(f"cross_entropy of {shape[1]} classes takes labels from 0 to {shape[1] - 1}, "
                             f"not from {labels.min()} to {labels.max()}")
        labels = labels if xp is np else xp.asarray(labels)
    wanted = mode.recording and logits.requires_grad
    loss, sums, saved = engine.cross_entropy(logits.data, labels, wanted)
    return result(loss, (logits,), lambda g: (engine.cross_entropy_gradient(g, saved),)), sums


def cross_entropy(logits, labels):
    """Mean over the batch of -log softmax(logits)[label]:  dlogits = g (softmax(logits) - onehot(label)) / N

    logits (N, classes), labels (N,) integers. Stable for any finite logits: the largest is subtracted first.
    ValueError for a label of no class, but of an array on a GPU, which would have to be waited for.
    """
    return classify(logits, labels)[0]


# ---------------------------------------------------------------------------------------------- images


def conv2d(x, w, stride=1, padding=0):
    """y[n,o,i,j] = sum over c,k,l of w[o,c,k,l] x[n,c, stride i + k - padding, stride j + l - padding]

    x (N, C, H, W), w (O, C, kh, kw) -> (N, O, H', W'), H' = (H + 2 padding - kh) // stride + 1. Raises ValueError for
    shapes that do not fit. The gradients are convolutions too: see engines/convolution.py.
    """
    x, w = tensor(x), tensor(w)
    stride, padding = whole(stride, "the stride of conv2d", 1), whole(padding, "the padding of conv2d")
    output_size(x.shape, w.shape, stride, padding)  # raises ValueError

    def attempt(work, *arguments):
        try:
            return work(*arguments)
        except EngineError as error:
            raise EngineError(f"{getattr(w, 'name', None) or 'a convolution'}: {error}") from None

    weights, how = attempt(engine.weights, w.data), (stride, padding, getattr(w, "pattern", None))
    out = attempt(engine.conv, x.data, weights, *how)

    def vjp(g):
        return (attempt(engine.conv_input_gradient, g, weights, x.shape, *how) if x.requires_grad else None,
                attempt(engine.conv_weight_gradient, g, x.data, w.shape, *how) if w.requires_grad else None)

    return result(out, (x, w), vjp)


class StatisticsError(ValueError):
    """A batch without a variance; the message is one sentence."""


def batch_norm(x, weight, bias, running_mean, running_var, training, momentum=0.1, eps=1e-5, add=None, relu=False):
    """weight (x - mean) / sqrt(var + eps) + bias by channel of x (N, C, H, W), + add, then max(., 0) if relu is set.

    training: mean and biased variance of the batch; the running estimates (C,) move towards its mean and unbiased
    variance by `momentum`, in place. Otherwise the running estimates are used. As in PyTorch.
    With add (N, C, H, W) and relu, the end of a residual block is one pass over the images instead of three.
    """
    x, weight, bias, add = tensor(x), tensor(weight), tensor(bias), None if add is None else tensor(add)
    C = weight.size
    if x.ndim != 4 or x.shape[1] != C or not x.size or add is not None and add.shape != x.shape:
        raise ValueError(f"batch_norm of {C} channels takes images (N, {C}, H, W), one or more, "
                         f"not {x.shape}" + (f", and as many to add, not {add.shape}" if add is not None else ""))
    if not all(isinstance(a, xp.ndarray) and a.shape == (C,) and is_floating(a.dtype)
               for a in (weight.data, bias.data, running_mean, running_var)):
        raise ValueError("batch_norm takes weight, bias, running_mean and running_var of one shape (C,), the last two "
                         "arrays of a floating type")
    momentum, eps = real(momentum, "momentum"), real(eps, "eps")
    if training and x.size < 2 * C:
        raise StatisticsError(f"batch_norm needs more than one value for each channel to train, not images of "
                              f"{x.shape}: choose a larger batch, and a number of examples and of processes that "
                              "leaves none with a single image")
    out, saved = engine.batch_norm(x.data, weight.data, bias.data, running_mean, running_var, training, momentum, eps,
                                   None if add is None else add.data, relu)
    positive = out if relu else None

    def vjp(g, more=None):  # the second gradient, of a residual block's other branch, takes no pass of its own
        separate = add is not None and add.requires_grad
        return engine.batch_norm_gradients(g, x.data, positive, weight.data, saved, training, separate, more)

    return result(out, (x, weight, bias) if add is None else (x, weight, bias, add), vjp, takes=2)


def max_pool2d(x, size, stride=None, padding=0):
    """Largest entry of windows of size x size:  dx = g there, to the first of equals as in PyTorch"""
    x, size = images(x, "max_pool2d"), whole(size, "the size of max_pool2d", 1)
    stride = size if stride is None else whole(stride, "the stride of max_pool2d", 1)
    padding = whole(padding, "the padding of max_pool2d")
    pool_size(x.shape, size, stride, padding)  # raises ValueError
    out, saved = engine.max_pool(x.data, size, stride, padding)
    return result(out, (x,), lambda g: (engine.max_pool_gradient(g, saved, x.shape, size, stride, padding),))


def global_avg_pool(x):
    """Mean over each image, (N, C, H, W) -> (N, C):  dx = g / (H W), repeated over the image"""
    x = images(x, "global_avg_pool")
    return result(engine.mean_pool(x.data), (x,), lambda g: (engine.mean_pool_gradient(g, x.shape, x.dtype),))


# ---------------------------------------------------------------------------------------------- layers


class Parameter(Tensor):
    """A Tensor that is trained, with an optional mask. Its data are a copy of those given.

    data, grad, mask: may be assigned (p.data = array, p.data += noise); they become copies. Data of another floating
        dtype give the parameter that dtype.
    mask: None, or a boolean array of data's shape; entries where it is False are zero and stay zero, whatever is
        assigned. Only what is written into these arrays in place, as by p.data[0] = 1, passes by unseen; on a GPU in
        bf16 convolutions then go on with the values of before, until a step.
    density: the fraction of entries that are kept, 1 without a mask.
    pattern: what the engine knows of a mask of low density, so that work follows the kept entries; else None.
    held: the gradient as it is held: with a pattern of the kept entries alone, (count,), until grad is looked at or
        assigned or the mask changes, then whole.
    name: its dotted name in the network whose parameters() were listed last, for messages.
    """

    __slots__ = ("mask", "density", "pattern", "held", "name")

    def __init__(self, data, mask=None):
        self.name = None
        super().__init__(data, requires_grad=True)
        put(self, "data", engine.parameter(self.data.copy()))
        self.set_mask(mask)

    def __setattr__(self, name, value):
        if name == "mask":
            return self.set_mask(value)
        if name == "data" and hasattr(self, "density") or name == "grad" and value is not None:
            given, dtype = value, self.dtype
            if name == "data" and hasattr(value, "dtype") and is_floating(value.dtype):
                dtype = value.dtype
            value = floats(value, dtype)
            if value.shape != self.shape:
                raise ValueError(f"{name} of shape {value.shape} is assigned to a parameter of shape {self.shape}")
            if self.mask is not None:
                value = xp.where(self.mask, value, xp.zeros((), value.dtype))
            elif given is not getattr(self, name):  # else p.data += x has changed it in place
                value = value.copy()
            value = engine.parameter(value)
            if name == "data":
                engine.moved += 1
                changed([self])
        put(self, name, value)

    @property
    def grad(self):
        if self.held is not None and self.held.shape != self.shape:
            put(self, "held", engine.whole(self.held, self.pattern))  # for good: what is written into it counts
        return self.held

    @grad.setter
    def grad(self, value):
        put(self, "held", value)

    def __getstate__(self):
        """For copy and pickle: without grad, which `held` stands for"""
        slots = (name for kind in type(self).__mro__ for name in getattr(kind, "__slots__", ()))
        return None, {name: getattr(self, name) for name in slots if name != "grad"}

    def __setstate__(self, state):
        """Of copy and pickle, perhaps of another process, whose clock was another."""
        for name, value in state[1].items():
            put(self, name, value)
        changed([self])

    def set_mask(self, mask):
        """Take this mask (None: dense) and zero the masked entries, of the gradient too; an optimiser follows it at its
        next step.
        """
        if mask is not None:
            given = xp.asarray(mask)
            if given.shape != self.shape:
                raise ValueError(f"a mask of shape {given.shape} does not fit a parameter of shape {self.shape}")
            mask = engine.parameter(given.astype(bool))
            if given.dtype != bool and not (mask == given).all():
                raise ValueError("a mask is an array of booleans, or of 0 and 1")
        grad = self.grad  # whole, as long as it has the mask of before
        put(self, "mask", mask)
        engine.moved += 1
        self.density, self.pattern = 1.0, None
        changed([self])
        if mask is not None:
            self.density, self.pattern = float(mask.mean()), engine.pattern(mask)
            for array in (self.data, grad):
                if array is not None:
                    array[~mask] = 0

    def fill(self, values):
        """Take these values, an array of the host, but for masked entries."""
        self.data[...] = xp.asarray(values.astype(self.dtype))
        self.set_mask(self.mask)

    def accumulate(self, g):
        """Add g to .grad; g may be what the engine gives for a mask of low density."""
        if self.mask is not None:
            g = engine.masked(g, self.mask, self.pattern)
        if engine.narrow is not None and self.held is None and g.ndim == 4 and g.dtype == engine.narrow:
            return put(self, "held", g)  # which SGD takes as it is
        shape = self.shape if self.pattern is None else self.pattern.kept.shape
        assert g.shape == shape, f"gradient of shape {g.shape} for data of shape {shape}"
        held, g = self.held, g.astype(self.data.dtype, copy=False)
        if held is not None and held.shape != shape:  # grad was looked at
            g = engine.whole(g, self.pattern)
        put(self, "held", xp.asarray(g) if held is None else engine.add(held.astype(g.dtype, copy=False), g))

    @property
    def count(self):
        """How many entries are kept."""
        return self.size if self.mask is None else int(self.mask.sum())


def changed(parameters):
    """Note that their data or masks were changed: gradients of what was computed before would be wrong."""
    global clock
    clock += 1
    for p in parameters:
        put(p, "time", clock)


def inside(collection, prefix="", around=()):
    """(dotted name, value) of all that a dict, list or tuple holds, also in others in it; not in one that holds it."""
    around = (*around, id(collection))
    for name, value in collection.items() if isinstance(collection, dict) else enumerate(collection):
        if isinstance(value, (list, tuple, dict)):
            if id(value) not in around:
                yield from inside(value, f"{prefix}{name}.", around)
        else:
            yield f"{prefix}{name}", value


def in_shape(values, positions, p):
    """(values, mask) in the shape of the parameter p, of values at these positions; ValueError if they do not fit."""
    values, positions = np.asarray(values), np.asarray(positions)
    if (positions.dtype.kind not in "iu" or positions.ndim != 1 or values.shape != positions.shape
            or np.any(np.diff(positions, prepend=-1, append=p.size) <= 0)):
        raise ValueError(f"this state does not fit the network: {values.size} entries are kept of a parameter of "
                         f"shape {p.shape}, at positions that are not so many, in order and within it")
    whole, mask = np.zeros(p.size, values.dtype), np.zeros(p.size, bool)
    whole[positions], mask[positions] = values, True
    return whole.reshape(p.shape), mask.reshape(p.shape)


def check_state(state):
    if not isinstance(state, Mapping):
        raise TypeError("a state is a dict of arrays, as state_dict() returns it or np.load reads it, not "
                        f"{type(state).__name__}")


class Module:
    """A network or a part of one. Its attributes are, in the order in which they were set:
    Parameters (trained), Modules (its parts) and arrays (saved with it, not trained), or lists or dicts of those.
    """

    training = True

    def __setattr__(self, name, value):
        if isinstance(value, Tensor) and not isinstance(value, Parameter) and value.requires_grad and not value.parents:
            raise TypeError(f"{name} is a Tensor that wants a gradient: make it a Parameter, to be trained and saved")
        if isinstance(vars(self).get(name), Parameter) and not (value is None or isinstance(value, Parameter)):
            raise TypeError(f"{name} is a Parameter: assign another one, or an array to its data")
        super().__setattr__(name, value)

    def __call__(self, *inputs, **options):
        return self.forward(*inputs, **options)

    def children(self):
        """(name, part) for the parts of this module, in order."""
        return ((name, value) for name, value in inside(vars(self)) if isinstance(value, Module))

    def named_modules(self, prefix="", seen=None):
        """(dotted name, module) for this module and all below it, in order, each once under its first name."""
        seen = set() if seen is None else seen
        if id(self) not in seen:
            seen.add(id(self))
            yield prefix.rstrip("."), self
            for name, child in self.children():
                yield from child.named_modules(f"{prefix}{name}.", seen)

    def named_arrays(self, kind):
        """(dotted name, value) of this kind of attributes here and in all parts, each once under its first name."""
        seen = set()
        for module_name, module in self.named_modules():
            for name, value in inside(vars(module)):
                if isinstance(value, kind) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{module_name}.{name}" if module_name else name, value

    def named_parameters(self):
        """(dotted name, Parameter): its own, then those of its parts, each in the order in which they were set.

        What is used twice, a Module or a Parameter, counts once, here and in all below, state_dict() included.
        """
        return self.named_arrays(Parameter)

    def parameters(self):
        """The Parameters in that order; from then on they know their names."""
        named = list(self.named_parameters())
        for name, p in named:
            p.name = name
        return [p for _, p in named]

    def state_dict(self, kept=False):
        """name -> NumPy array: a copy of every parameter, its mask under "name.mask", and every saved array.

        kept: of a parameter with a pattern the kept entries alone, (count,), and under "name.kept" their positions.
        """
        state = {}
        for name, p in self.named_parameters():
            if kept and p.pattern is not None:
                state[name], state[f"{name}.kept"] = p.data.reshape(-1)[p.pattern.kept], p.pattern.kept
                continue
            state[name] = p.data
            if p.mask is not None:
                state[f"{name}.mask"] = p.mask
        state.update(self.named_arrays(xp.ndarray))
        return {name: np.array(to_host(value)) for name, value in state.items()}

    def load_state_dict(self, state):
        """Take the values and masks of a state_dict() of the same network, of all entries or of the kept ones alone.

        Raises ValueError that names what is missing, what is unexpected and what has another shape; nothing
        is changed then. Masks are taken as they come: a network becomes as sparse as the one that was saved.
        """
        check_state(state)
        parameters = dict(self.named_parameters())
        state = dict(state)
        for name in [name for name in parameters if f"{name}.kept" in state]:
            state[name], state[f"{name}.mask"] = in_shape(state.get(name), state.pop(f"{name}.kept"), parameters[name])
        targets = {name: p.data for name, p in parameters.items()} | dict(self.named_arrays(xp.ndarray))
        masks = {f"{name}.mask": p.data for name, p in parameters.items()}
        known = targets | masks
        wrong = [f"{name} is missing" for name in targets if name not in state]
        wrong += [f"{name} is unexpected" for name in state if name not in known]
        wrong += [f"{name} has shape {np.shape(value)} instead of {known[name].shape}" for name, value in state.items()
                  if name in known and np.shape(value) != known[name].shape]
        wrong += [f"{name} has the type {np.asarray(value).dtype}" for name, value in state.items()
                  if name in known and is_number(known[name]) and not is_number(np.asarray(value))]
        wrong += [f"{name} has entries other than 0 and 1" for name, value in state.items()
                  if name in masks and not np.isin(value, (0, 1)).all()]
        if wrong:
            raise ValueError("this state does not fit the network: " + "; ".join(wrong))
        for name, target in targets.items():
            target[...] = xp.asarray(state[name])
        for name, p in parameters.items():
            p.set_mask(state.get(f"{name}.mask"))
        changed(parameters.values())

    def train(self, training=True):
        """Set training mode (BatchNorm uses the batch's statistics) here and in all parts; returns self."""
        for _, module in self.named_modules():
            module.training = training
        return self

    def eval(self):
        return self.train(False)


class Layer(Module):
    """A module with a weight (out, in, ...) that is counted: it can be drawn again at a lower density. bias (out,)

    rng: a seed or a NumPy generator for the weights (None: others at every start); see also initialize.
    """

    def __init__(self, shape, bias, dtype, rng):
        shape, dtype = [whole(n, f"each size of a {type(self).__name__}", 1) for n in shape], floating(dtype)
        self.weight = Parameter(xp.empty(shape, dtype))
        self.bias = Parameter(xp.zeros(shape[0], dtype)) if bias else None
        if mode.drawing:
            self.reset(np.random.default_rng(rng))

    def reset(self, rng, density=1.0):
        """Draw the weights from U(-b, b), b = 1 / sqrt(fan_in density), the bias likewise (PyTorch's rule with
        the sparse fan-in). All entries are drawn, then those masked are zeroed.
        """
        rng, bound = np.random.default_rng(rng), 1 / math.sqrt(self.weight.data[0].size * density)
        for p in (self.weight, self.bias):
            if p is not None:
                p.fill(rng.uniform(-bound, bound, p.shape))


def skip_init():
    """Inside it layers are made without drawing their weights: to be counted, or drawn by sparsify or initialize."""
    return mode.being(drawing=False)


class Linear(Layer):
    """y = x w^T + b for x (..., in_features); weight (out_features, in_features), bias (out_features,) or None.

    ntk: the NTK parameterisation (Figure 8 of the paper), y = (x w^T + b) / sqrt(in_features) with w from
    N(0, 1/density): learning rate and kernel keep their scale as the width grows.
    """

    def __init__(self, in_features, out_features, bias=True, ntk=False, dtype=np.float32, rng=None):
        self.ntk = ntk
        super().__init__((out_features, in_features), bias, dtype, rng)

    def reset(self, rng, density=1.0):
        rng = np.random.default_rng(rng)
        super().reset(rng, density)
        if self.ntk:
            self.weight.fill(rng.normal(0, density**-0.5, self.weight.shape))

    def forward(self, x):
        y = linear(x, self.weight, self.bias)
        return y * self.weight.shape[-1] ** -0.5 if self.ntk else y


class ReLU(Module):
    """max(x, 0)"""

    def forward(self, x):
        return relu(x)


class Conv2d(Layer):
    """conv2d with a square kernel; weight (out_channels, in_channels, k, k), bias (out_channels,) or None (default)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=False, dtype=np.float32,
                 rng=None):
        self.stride, self.padding = whole(stride, "Conv2d's stride", 1), whole(padding, "Conv2d's padding")
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), bias, dtype, rng)

    def forward(self, x):
        y = conv2d(x, self.weight, self.stride, self.padding)
        return y if self.bias is None else y + reshape(self.bias, -1, 1, 1)  # (O,) -> (O, 1, 1)


class BatchNorm2d(Module):
    """batch_norm over images (N, C, H, W) with weight 1 and bias 0 at first. forward(x, add, relu) does what often
    follows it in the same pass: the addition of `add` and a ReLU.
    """

    def __init__(self, channels, eps=1e-5, momentum=0.1, dtype=np.float32):
        channels, dtype = whole(channels, "BatchNorm2d's number of channels", 1), floating(dtype)
        self.weight, self.bias = Parameter(xp.ones(channels, dtype)), Parameter(xp.zeros(channels, dtype))
        self.running_mean, self.running_var = xp.zeros(channels, dtype), xp.ones(channels, dtype)
        self.eps, self.momentum = real(eps, "eps"), real(momentum, "momentum")

    def forward(self, x, add=None, relu=False):
        return batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, self.training,
                          self.momentum, self.eps, add, relu)


class Flatten(Module):
    """(N, ...) -> (N, everything else)"""

    def forward(self, x):
        x = tensor(x)
        return x if x.ndim == 2 else reshape(x, len(x), math.prod(x.shape[1:]))


class Sequential(Module):
    """Modules applied one after the other; a slice of it is one too, of the same modules."""

    def __init__(self, *modules):
        for module in modules:
            if not isinstance(module, Module):
                raise TypeError(f"Sequential takes Modules, Sequential(Flatten(), Linear(2, 3)), not {module!r}")
        self.modules = list(modules)

    def children(self):  # named "0", "1", ... as in PyTorch
        return ((name.removeprefix("modules."), module) for name, module in super().children())

    def __getitem__(self, index):
        return Sequential(*self.modules[index]) if isinstance(index, slice) else self.modules[index]

    def __len__(self):
        return len(self.modules)

    def forward(self, x):
        for module in self.modules:
            x = module(x)
        return x


# ---------------------------------------------------------------------------------------------- masks


def layers(model):
    """[(name, layer)] of the linear and convolution layers, in order: those whose weights are counted, of layers that
    share one weight the first.
    """
    if not isinstance(model, Module):
        raise TypeError(f"a network is a Module, such as Sequential(Flatten(), Linear(2, 3)), not {str(model):.50}")
    first = {}
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            first.setdefault(id(module.weight), (name, module))
    return list(first.values())


def weight_count(model):
    """Number of kept weights of linear and convolution layers; biases and BatchNorm are not counted."""
    return total(layer.weight.count for _, layer in layers(model))


def initialize(model, seed):
    """Draw the weights of every layer, each from a generator of its own (seed, index of the layer); dense."""
    seed = whole(seed, "a seed")
    for index, (_, layer) in enumerate(layers(model)):
        layer.weight.set_mask(None)
        layer.reset(generator(seed, "weights", index))


def allocate(sizes, budget, how="largest-first"):
    """How many weights each layer keeps so that together they keep exactly `budget`; at least one each.

    sizes: weights of each dense layer. Returns the kept counts in the same order.
    "largest-first" (the paper's Appendix B): take weights from the largest layer until it is as large as the
        next, then from both equally, and so on. So there is a level T with kept = min(size, T); of the layers
        cut to that level the last ones keep one more weight if the budget asks for it.
    "proportional": one density for all layers, rounded by largest remainder.
    Raises ValueError for a budget below one weight a layer or above the dense count.
    """
    sizes, budget = [whole(s, "the size of a layer", 1) for s in listed(sizes, "sizes")], whole(budget, "the budget")
    dense = total(sizes)
    if not 0 < len(sizes) <= budget <= dense:
        raise ValueError(f"cannot keep {budget:,} weights: {len(sizes)} layers need at least one each "
                         f"and have {dense:,} in all")
    if how == "largest-first":
        # The level is reached when the layers not larger than it keep everything and the others share the rest.
        remaining, layers_left = budget, len(sizes)
        for size in sorted(sizes):
            if size * layers_left > remaining:
                break
            remaining, layers_left = remaining - size, layers_left - 1
        if not layers_left:
            return sizes
        level, extra = divmod(remaining, layers_left)
        cut = [i for i, size in enumerate(sizes) if size > level]
        one_more = set(cut[len(cut) - extra:])
        return [min(size, level + (i in one_more)) for i, size in enumerate(sizes)]
    if how == "proportional":
        kept = [size * budget // dense for size in sizes]
        by_remainder = sorted(range(len(sizes)), key=lambda i: -(sizes[i] * budget % dense))
        for i in by_remainder[: budget - total(kept)]:
            kept[i] += 1
        while min(kept) == 0:  # a layer so small that its share rounds to nothing borrows from the largest
            kept[int(np.argmax(kept))] -= 1
            kept[kept.index(0)] += 1
        return kept
    raise ValueError(f"how is 'largest-first' or 'proportional', not {how!r}")


def sparsify(model, budget, seed, how="largest-first", kept=None, io_only=False):
    """Give every layer a random mask so that the model keeps `budget` weights, and draw the weights again (to prune a
    trained network assign its masks: layer.weight.mask = mask).

    how: the allocation among layers (see allocate), or kept: the counts themselves, in the order of layers().
    io_only: remove whole k x k kernels of convolutions (the paper's Appendix C); the number of weights then
        misses the budget by less than one kernel.
    Within a layer the mask is a uniformly random subset; weights have the scale of the sparse fan-in. Both come
    from (seed, index of the layer) alone. Returns the kept counts. Raises ValueError for impossible counts.
    """
    budget, seed = whole(budget, "the budget"), whole(seed, "a seed")
    weights = [layer.weight for _, layer in layers(model)]
    if not weights:
        raise ValueError("sparsify takes a network with a Linear, a Conv2d or another Layer, and this one has none")
    sizes = [w.size for w in weights]
    kept = allocate(sizes, budget, how) if kept is None else [whole(k, "a kept count") for k in listed(kept, "kept")]
    if len(kept) != len(sizes) or total(kept) != budget or any(not 1 <= k <= s for k, s in zip(kept, sizes)):
        raise ValueError(f"kept counts {kept} do not add up to {budget:,} or do not fit layers of {sizes}")
    # What is kept or removed together: one weight, or with io_only one kernel of shape[2:].
    units = [math.prod(w.shape[2:]) if io_only else 1 for w in weights]
    if io_only:
        kept = whole_units(kept, units)
    for index, (_, layer) in enumerate(layers(model)):
        w, unit, mask = layer.weight, units[index], None
        w.set_mask(None)
        layer.reset(generator(seed, "weights", index), density=kept[index] / w.size)
        if kept[index] < w.size:
            mask = np.zeros(w.size // unit, bool)
            mask[generator(seed, "mask", index).choice(len(mask), kept[index] // unit, replace=False)] = True
            mask = np.repeat(mask, unit).reshape(w.shape)  # (units,) -> (out, in, ...)
        w.set_mask(mask)
    return kept


def whole_units(kept, units):
    """Round each count to a multiple of its unit, the total falling short by less than the largest unit."""
    rounded = [max(k // u, 1) * u for k, u in zip(kept, units)]
    if total(units) > total(kept):
        raise ValueError(f"cannot keep {total(kept):,} weights in whole kernels: one in each layer makes "
                         f"{total(units):,}")
    while total(rounded) > total(kept):  # layers that were saved from vanishing borrow from the largest
        largest = int(np.argmax([r if r > u else 0 for r, u in zip(rounded, units)]))
        rounded[largest] -= units[largest]
    order = sorted(range(len(kept)), key=lambda i: -((kept[i] - rounded[i]) / units[i]))
    while order:
        spare = total(kept) - total(rounded)
        order = [i for i in order if units[i] <= spare and rounded[i] < kept[i]]
        if order:
            rounded[order[0]] += units[order.pop(0)]
    return rounded


# ---------------------------------------------------------------------------------------------- optimiser


class SGD:
    """Stochastic gradient descent by PyTorch's rule, in this order for every parameter p with gradient g:

        g = g + weight_decay p
        v = momentum v + g   (v = g at the first step)
        g = g + momentum v  if nesterov,  else  v
        p = p - lr g

    Where a parameter is masked p and g are zero, so v and p stay exactly zero there, also when it gets another mask
    between two steps. Of a parameter of low density only the kept entries take part.
    """

    def __init__(self, params, lr, momentum=0, weight_decay=0, nesterov=False):
        self.rate, self.lr, self.nesterov = None, lr, nesterov
        self.momentum, self.weight_decay = real(momentum, "momentum"), real(weight_decay, "weight_decay")
        if nesterov and momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        if isinstance(params, Tensor):
            raise TypeError("SGD takes Parameters in a list, such as model.parameters(), not one by itself")
        self.params = listed(params, "SGD's first argument, such as model.parameters(),")
        others = {type(p).__name__ for p in self.params if not isinstance(p, Parameter)}
        if others:
            raise TypeError(f"SGD takes Parameters, such as model.parameters(), not {' or '.join(sorted(others))}")
        if not 0 < len(self.params) == len({id(p) for p in self.params}):
            raise ValueError("SGD takes one Parameter or more, each once")
        self.velocity = [self.at_rest(p) for p in self.params]  # as the engine keeps them
        self.masks = [p.mask for p in self.params]  # those that the velocities follow

    def at_rest(self, p):
        """The velocity of a parameter before the first step."""
        return engine.velocity(p.data) if self.momentum else None

    @property
    def lr(self):
        """The learning rate."""
        return self._lr

    @lr.setter
    def lr(self, lr):
        self._lr = real(lr, "lr")
        self.rate = engine.rate(self._lr, self.rate)

    def follow_masks(self):
        """Bring the velocities of parameters that got another mask to the entries that are kept now."""
        for i, p in enumerate(self.params):
            if p.mask is not self.masks[i]:
                if self.velocity[i] is not None:
                    self.take_velocity(i, engine.velocity_to_host(self.velocity[i]), self.masks[i])
                self.masks[i] = p.mask

    def take_velocity(self, i, values, mask):
        """Let the velocity of parameter i be these values, of all its entries or of those alone that `mask` keeps, and
        zero where its own mask is False.
        """
        p, v = self.params[i], np.array(values)
        if v.size < p.size:
            v = np.zeros(p.size, v.dtype)
            v[np.flatnonzero(to_host(mask))] = values
        if p.mask is not None:
            v[~to_host(p.mask).reshape(-1)] = 0
        self.velocity[i] = engine.velocity_from_host(v, p.data, p.pattern)

    @np.errstate(under="ignore")  # of velocities that fade away
    def step(self):
        """Change the parameters that have a gradient by it."""
        self.follow_masks()
        params = [(p.data, p.held, p.mask, p.pattern) for p in self.params]
        self.velocity = engine.sgd(params, self.velocity, self.rate, self.momentum, self.weight_decay, self.nesterov)
        changed([p for p in self.params if p.held is not None])

    def zero_grad(self):
        """Forget the gradients, to which the next backward() would add."""
        for p in self.params:
            put(p, "held", None)

    def state_dict(self):
        """{"velocity.0": array of one axis, ...} of the parameters that have one; where it is of the kept entries
        alone, "velocity.0.mask" tells their mask.
        """
        self.follow_masks()
        state = {}
        for i, (p, v) in enumerate(zip(self.params, self.velocity)):
            if v is not None:
                state[f"velocity.{i}"] = flat = engine.velocity_to_host(v)
                if flat.size < p.size:
                    state[f"velocity.{i}.mask"] = checksum(p.mask)
        return state

    def load_state_dict(self, state):
        """Take a state_dict() of an optimiser of the same network, which has to have its masks by then, on whichever
        device it was. Raises ValueError; nothing is changed then.
        """
        check_state(state)
        parameters = {f"velocity.{i}": p for i, p in enumerate(self.params)}
        wrong = [f"{name} is unexpected" for name in state if str(name).removesuffix(".mask") not in parameters]
        for name, p in parameters.items():
            value, mask = np.asarray(state.get(name, np.zeros(p.size))), state.get(f"{name}.mask")
            if not is_number(value):
                wrong.append(f"{name} has the type {value.dtype}")
            elif value.shape not in ((p.size,), (p.count,)):
                wrong.append(f"{name} has shape {value.shape} instead of ({p.size},)"
                             + f", or ({p.count},) of what its mask keeps: load the network first" * (p.ndim > 1))
            elif value.size < p.size and mask is not None and mask != checksum(p.mask):
                wrong.append(f"{name} belongs to another mask: load the network first")
        if wrong:
            raise ValueError("this state does not fit the optimiser: " + "; ".join(wrong))
        engine.moved += 1
        self.masks = [p.mask for p in self.params]
        self.velocity = [self.at_rest(p) for p in self.params]
        for i, (name, p) in enumerate(parameters.items()):
            if name in state:
                self.take_velocity(i, state[name], p.mask)


def checksum(mask):
    """A number that other masks hardly have."""
    return np.uint32(zlib.crc32(np.packbits(to_host(mask))))


# Schedules: optimizer.lr = schedule(epoch), counted from 0. They keep no state, so a resumed run needs none.


class ConstantLR:
    """lr at every epoch."""

    def __init__(self, lr):
        self.lr = real(lr, "lr")

    def __call__(self, epoch):
        return self.lr


class MultiStepLR:
    """lr, multiplied by gamma at each milestone epoch."""

    def __init__(self, lr, milestones, gamma=0.1):
        self.lr, self.gamma = real(lr, "lr"), real(gamma, "gamma")
        self.milestones = sorted(whole(m, "a milestone") for m in listed(milestones, "milestones"))

    def __call__(self, epoch):
        return self.lr * self.gamma ** len([m for m in self.milestones if epoch >= m])


class CosineLR:
    """From lr at epoch 0 along half a cosine to minimum at the end of `epochs`, and minimum after that."""

    def __init__(self, lr, epochs, minimum=0.0):
        self.lr, self.epochs, self.minimum = real(lr, "lr"), whole(epochs, "epochs", 1), real(minimum, "minimum")

    def __call__(self, epoch):
        return self.minimum + (self.lr - self.minimum) * (1 + math.cos(math.pi * min(epoch / self.epochs, 1))) / 2
