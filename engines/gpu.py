"""What computes on a GPU: cuDNN's convolutions, the kernels of gpu.cu, and whole steps as CUDA graphs, on CuPy arrays.

Images are (N, C, H, W) to the user and N x H x W x C in memory, weights of convolutions (O, C, kh, kw) likewise.
Precision is that of images: parameters, statistics, linear layers and what is between load and store are float32.

    fp32  no tensor cores: for checks
    tf32  products of 10-bit mantissas, the default
    bf16  images of bfloat16

All work is in the order of one stream, from one host thread. Nothing is added up in a random order, in convolutions
unless `deterministic` is off.
"""

import contextlib
import ctypes
import functools
import gc
import os
import weakref
from pathlib import Path

import cupy
import numpy as np

from engines import EngineError, output_size, pool_size
from engines.gpu_convolution import Convolutions, channels_of, empty, reason_of, requirements

SOURCE = Path(__file__).with_name("gpu.cu")
TYPES = {"float32": ("float", "float"), "float64": ("double", "double"),
         "bfloat16": ("bfloat16", "float")}  # of images: TYPE and REAL of gpu.cu
PRECISIONS = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}
AMPERE = 80  # the compute capability from which on GPUs have bfloat16
NUMPY = "2.1.2"  # the first beside which CuPy has bfloat16
THREADS, BLOCKS = 256, 1024  # of a launch; more blocks than a GPU runs at once, each thread takes several entries
COUNTERS = 4096  # of blocks that work on one sum; enough for BatchNorm of 100,000 channels
PARTS = 64  # parameters updated by one launch: their table is an argument, of which there are 4 KiB
PART = np.dtype([(name, np.uint64) for name in ("w", "v", "g", "mask", "copy")]
                + [("size", np.uint32), ("C", np.int32), ("channels", np.int32), ("narrow", np.int32)])
ALIGNED = 16  # bytes: where images begin, for cuDNN and for packs

# ---------------------------------------------------------------------------------------------- memory


def dtype_of(name):
    if name == "bfloat16":
        if np.lib.NumpyVersion(np.__version__) < NUMPY:
            raise EngineError(f"bf16 needs NumPy {NUMPY} or later, and this is {np.__version__}: "
                              f"pip install 'numpy>={NUMPY}'")
        try:
            import ml_dtypes
        except ImportError:
            raise EngineError(f"bfloat16 needs ml_dtypes: pip install -r {requirements()}") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def real(dtype):
    """The type in which parameters are kept beside images of this type."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def strides(x):
    """Strides in entries, as kernels take them."""
    return [np.int64(s // x.itemsize) for s in x.strides]


def pack(C, dtype):
    """Neighbouring channels that a thread takes at a time: as many as divide C and fit a load of 16 bytes."""
    return next(v for v in (8, 4, 2, 1) if C % v == 0 and v * dtype.itemsize <= 16)


def split(pixels, packs):
    """(packs of channels to a block, columns of blocks, parts of the pixels) of a kernel that adds up over pixels:
    enough blocks, and enough work for each thread.
    """
    lanes = min(32, 1 << (packs - 1).bit_length())
    columns = -(-packs // lanes)
    return lanes, columns, max(1, min(-(-256 // columns), -(-pixels * lanes // (4 * THREADS))))


@functools.cache
def module(name, pack):
    """The kernels of gpu.cu for images of a type, `pack` channels to a thread; CuPy keeps them on disk."""
    kind, wide = TYPES[name]
    return cupy.RawModule(code=SOURCE.read_text(), options=("-std=c++17", f"-DTYPE={kind}", f"-DREAL={wide}",
                                                            f"-DV={pack}"))


@functools.cache
def kernel(name, dtype, pack=1):
    return module(dtype, pack).get_function(name)


def blocks(count):
    return max(1, min(BLOCKS, -(-int(count) // THREADS)))


def launch(name, dtype, count, *args, pack=1):
    """A kernel of gpu.cu that takes `count` entries, or packs of entries, one after the other."""
    if count >= 2**32:
        raise EngineError(f"a batch of {count:,} entries is too large for the kernels: choose a smaller --batch")
    kernel(name, np.dtype(dtype).name, pack)((blocks(count),), (THREADS,), args)


# ---------------------------------------------------------------------------------------------- engine


class Engine:
    """What nn.py computes with on a GPU; the interface is that of engines/__init__.py.

    precision: one of PRECISIONS. tune: time cuDNN's plans and take the fastest. capture: whether compiled functions
    become CUDA graphs, to the same bits.
    """

    name, xp = "gpu", cupy

    def __init__(self, precision="tf32", deterministic=True, tune=False, capture=True):
        compute = int(cupy.cuda.Device().compute_capability)
        if precision == "bf16" and compute < AMPERE:
            raise EngineError(f"bf16 needs a GPU of compute capability {AMPERE / 10} or later, and this one has "
                              f"{compute / 10}: choose --precision tf32 or fp32")
        self.precision, self.deterministic, self.tune, self.capture = precision, deterministic, tune, capture
        self.dtype = dtype_of(PRECISIONS[precision])
        self.stream = cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        self.stream.__enter__()  # for good: what use() sets, CuPy forgets in get() of an array in NHWC
        self.convolve = Convolutions(self.stream, precision == "fp32", deterministic, tune)
        self.functions, self.pool = weakref.WeakSet(), None  # compiled functions, and where their arrays lie
        self.images_in, self.labels_in, self.moved = None, None, 0
        self.narrow = self.dtype if precision == "bf16" else None  # see engines/__init__.py
        self.counters = cupy.zeros(COUNTERS, np.uint32)  # see is_last in gpu.cu
        self.copies, self.copied = {}, 0  # address of weights: (weights, their copy), true while copied == moved

    def to_host(self, array):
        return array if isinstance(array, np.ndarray) else array.get()

    def synchronize(self):
        self.stream.synchronize()

    def memory(self):
        """Bytes held on the GPU"""
        pools = [cupy.get_default_memory_pool(), *([self.pool] if self.pool else [])]
        return sum(pool.total_bytes() for pool in pools) + sum(w.size for w in self.convolve.workspaces)

    def state_dict(self, measured=False):
        """Nothing that a run has to remember"""
        return {}

    def load_state_dict(self, state):
        """What a run on a CPU chose does not matter here."""

    def versions(self):
        """What a record of a run on this GPU needs."""
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        return {"gpu": properties["name"].decode(), "precision": self.precision, "deterministic": self.deterministic,
                "tuned": self.tune}

    # ---- images

    def kind(self, dtype):
        """The type in which images that come in this type are kept."""
        return np.dtype(dtype) if dtype == np.float64 else self.dtype

    def images(self, x, channels=None):
        """x (N, C, H, W) in this engine's type, (N, H, W, channels) in memory; a copy only if it is not so already."""
        N, C, H, W = x.shape
        dtype, channels = self.kind(x.dtype), channels or C
        if x.dtype == dtype and channels_of(x) == channels and x.data.ptr % ALIGNED == 0:
            return x
        if x.dtype not in (dtype, real(dtype)):
            x = x.astype(real(dtype))
        out = empty(x.shape, dtype, channels)
        count, wide = np.int64(N * H * W * channels), np.int32(x.dtype == real(dtype))
        launch("to_images", dtype, count, x, wide, *strides(x), *map(np.int32, (C, H, W, channels)), count, out)
        return out

    def parameter(self, array):
        """A parameter's array, or its mask, in the memory order that the kernels want."""
        if array.ndim != 4:
            return cupy.ascontiguousarray(array)
        if channels_of(array) == array.shape[1]:
            return array
        out = empty(array.shape, array.dtype)
        out[...] = array
        return out

    def pattern(self, mask):
        """Of no use here: weights are multiplied densely, and sgd reads the mask itself."""
        return None

    def masked(self, g, mask, pattern):
        """g as it is: each pass over it would be a launch, and sgd passes over masked entries anyway."""
        return g

    def padded(self, C):
        """Channels to keep for images of C: with three, cuDNN's plans for bfloat16 need 100 times the memory."""
        return 4 if C == 3 and self.precision == "bf16" else C

    # ---- convolution

    def weights(self, w):
        """What conv and conv_input_gradient take for weights w (O, C, kh, kw): in the type of images"""
        weights, copy = self.known_copies().get(w.data.ptr, (None, None))
        return copy if weights is w else self.images(w, self.padded(w.shape[1]))

    def known_copies(self):
        """Copies of weights in the type of images, which sgd changes with the weights; none after any other change that
        `moved` counts.
        """
        if self.copied != self.moved:
            self.copies, self.copied = {}, self.moved
        return self.copies

    def copy_of(self, w):
        """The copy of these weights that sgd keeps, None where weights are used as they are."""
        if w.ndim != 4 or self.kind(w.dtype) == w.dtype:
            return None
        copies = self.known_copies()
        if w.data.ptr not in copies:
            with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):  # where no graph writes
                copies[w.data.ptr] = w, self.images(w, self.padded(w.shape[1]))
        return copies[w.data.ptr][1]

    def conv(self, x, w, stride, padding, pattern=None):
        """x (N, C, H, W), w (O, C, kh, kw) -> (N, O, H', W')"""
        channels = self.padded(x.shape[1])
        size = output_size(x.shape, w.shape, stride, padding)
        x, w = self.images(x, channels), self.images(w, channels)
        if x.dtype != w.dtype:
            raise ValueError(f"conv2d takes images and weights of one floating type, not {x.dtype} and {w.dtype}; "
                             "convert one with .astype")
        y = empty((len(x), len(w), *size), x.dtype)
        self.convolve("fprop", x, w, y, stride, padding, channels)
        return y

    def conv_input_gradient(self, g, w, shape, stride, padding, pattern=None):
        """The gradient with respect to x of this shape, from g (N, O, H', W')"""
        g = self.images(g)
        dx = empty(shape, g.dtype)
        self.convolve("dgrad", dx, self.images(w), g, stride, padding, shape[1])
        return dx

    def conv_weight_gradient(self, g, x, shape, stride, padding, pattern=None):
        """The gradient with respect to w of this shape, from g (N, O, H', W') and x (N, C, H, W), in their type"""
        channels = self.padded(shape[1])
        g, x = self.images(g), self.images(x, channels)
        dw = empty(shape, g.dtype, channels)
        self.convolve("wgrad", x, dw, g, stride, padding, channels)
        return dw

    # ---- BatchNorm, sums and pooling

    def over_pixels(self, name, images, training, arrays, results, summed=True):
        """A kernel that adds up over the pixels of images (N, C, H, W), the first of which is not None."""
        x = images[0]
        C, M, v = x.shape[1], x.size // x.shape[1], pack(x.shape[1], x.dtype)
        lanes, columns, parts = split(M, C // v)
        parts = parts if summed else 1
        assert columns <= COUNTERS, f"{C} channels"
        sums = cupy.empty((parts, 2, C), real(x.dtype))
        sizes = np.int64(M), np.int32(C), np.int32(lanes), np.int32(training)
        arguments = *images, *sizes, *arrays, sums, self.counters, *results
        kernel(name, x.dtype.name, v)((columns, parts), (THREADS,), arguments)

    def batch_norm(self, x, weight, bias, running_mean, running_var, training, momentum, eps, add, relu):
        """(out, what the gradients need of the statistics)"""
        x, add = self.images(x), None if add is None else self.images(add)
        C = x.shape[1]
        saved = cupy.empty((4, C), real(x.dtype))
        arrays = weight, bias, running_mean, running_var, np.float64(momentum), np.float64(eps)
        self.over_pixels("batch_statistics", [x], training, arrays, [saved], summed=training)
        out, v = empty(x.shape, x.dtype), pack(C, x.dtype)
        count = np.int64(x.size // v)
        launch("normalize", x.dtype, count, x, add, saved, np.int32(relu), np.int32(C), count, out, pack=v)
        return out, saved

    def batch_norm_gradients(self, g, x, out, weight, saved, training, separate, more=None):
        """(dx, dweight, dbias, dadd); out: what batch_norm returned if there was a ReLU, else None; more: None, or a
        second gradient, to be added to g
        """
        g, x, more = self.images(g), self.images(x), None if more is None else self.images(more)
        C, wide = x.shape[1], real(x.dtype)
        dweight, dbias, terms = cupy.empty(C, wide), cupy.empty(C, wide), cupy.empty((3, C), wide)
        self.over_pixels("gradient_statistics", [g, more, x, out], training, [saved], [dweight, dbias, terms])
        dx, v = empty(x.shape, x.dtype), pack(C, x.dtype)
        dadd, count = empty(x.shape, x.dtype) if separate else None, np.int64(x.size // v)
        launch("normalize_gradient", x.dtype, count, g, more, x, out, terms, np.int32(C), count, dx, dadd, pack=v)
        return dx, dweight, dbias, dadd

    def add(self, x, y):
        """x + y of two gradients of one shape"""
        if x.ndim != 4 or x.dtype != self.kind(x.dtype) or y.dtype != x.dtype:
            return x + y
        x, y = self.images(x), self.images(y)
        out, v = empty(x.shape, x.dtype), pack(x.shape[1], x.dtype)
        launch("add_images", x.dtype, x.size // v, x, y, np.int64(x.size // v), out, pack=v)
        return out

    def mean_pool(self, x):
        """(N, C, H, W) -> the mean over each image (N, C), in the type of parameters"""
        x = self.images(x)
        N, C, H, W = x.shape
        out = cupy.empty((N, C), real(x.dtype))
        launch("mean_pool", x.dtype, out.size, x, np.int32(H * W), np.int32(C), np.int64(out.size), out)
        return out

    def mean_pool_gradient(self, g, shape, dtype):
        dx = empty(shape, self.kind(dtype))
        launch("mean_pool_gradient", dx.dtype, dx.size, cupy.ascontiguousarray(g), np.int32(shape[2] * shape[3]),
               np.int32(shape[1]), np.int64(dx.size), dx)
        return dx

    def max_pool(self, x, size, stride, padding):
        """(the largest entry of each window, which of the window's it is)"""
        x = self.images(x)
        N, C, H, W = x.shape
        h, w = pool_size(x.shape, size, stride, padding)
        out, which = empty((N, C, h, w), x.dtype), empty((N, C, h, w), np.uint16)
        launch("max_pool", x.dtype, out.size, x, *map(np.int32, (C, H, W, size, stride, padding, h, w)),
               np.int64(out.size), out, which)
        return out, which

    def max_pool_gradient(self, g, which, shape, size, stride, padding):
        g = self.images(g)
        _, C, H, W = shape
        dx = empty(shape, g.dtype)
        launch("max_pool_gradient", g.dtype, dx.size, g, which,
               *map(np.int32, (C, H, W, size, stride, padding, *which.shape[2:])), np.int64(dx.size), dx)
        return dx

    # ---- linear layers, loss, optimiser

    def product(self, a, b, bias=None):
        """a (M, K) @ b (K, N) + bias (N,): float32 without tensor cores."""
        (M, K), (inner, N), dtype = a.shape, b.shape, a.dtype
        fits = K == inner and (bias is None or bias.shape == (N,))
        if not fits or {x.dtype for x in (b, bias) if x is not None} != {dtype}:
            raise ValueError(f"{a.shape} of {dtype} cannot be multiplied with {b.shape} of {b.dtype}"
                             + ("" if bias is None else f" and added to {bias.shape} of {bias.dtype}"))
        c, rows, columns = cupy.empty((M, N), dtype), -(-M // 64), -(-N // 64)  # of tiles
        if not c.size:
            return c
        parts = max(1, min(128 // (rows * columns), K // 64))  # blocks enough for a GPU, and work for each
        partial = cupy.empty((parts, M, N), dtype) if parts > 1 else None
        arguments = a, b, bias, c, np.int32(M), np.int32(N), np.int32(K), *strides(a), *strides(b)
        arguments += np.int32(parts), partial, self.counters
        kernel("product", dtype.name)((columns * parts, rows), (THREADS,), arguments)
        return c

    def linear(self, x, w, b, pattern):
        """(x w^T + b, None)"""
        return self.product(x, w.T, b), None

    def linear_gradients(self, g, x, w, b, pattern, saved, wanted):
        """(dx, dw, db), None where not wanted"""
        return (self.product(g, w) if wanted[0] else None, self.product(g.T, x) if wanted[1] else None,
                g.sum(axis=0) if wanted[2] else None)

    def cross_entropy(self, logits, labels, gradient):
        """(mean loss, sum of losses and number of correct answers (2,) of float64, dlogits (N, K) or None)"""
        N, K = logits.shape
        logits, labels = cupy.ascontiguousarray(logits), cupy.ascontiguousarray(labels)
        assert labels.dtype == np.int64 and labels.shape == (N,), (labels.dtype, labels.shape)
        loss, sums = cupy.empty((), logits.dtype), cupy.empty(2, np.float64)
        dlogits = cupy.empty(logits.shape, logits.dtype) if gradient else None
        arguments = logits, labels, np.int32(N), np.int32(K), loss, dlogits, sums
        kernel("cross_entropy", logits.dtype.name)((1,), (THREADS,), arguments)
        return loss, sums, dlogits

    def cross_entropy_gradient(self, g, dlogits):
        return dlogits * g

    def velocity(self, data):
        return self.parameter(cupy.zeros_like(data))

    def velocity_to_host(self, v):
        return v.get().reshape(-1)

    def velocity_from_host(self, flat, data, pattern):
        return self.parameter(cupy.asarray(flat.reshape(data.shape), dtype=data.dtype))

    def rate(self, lr, before):
        """The learning rate in memory that stays the same, where captured steps read it."""
        rate = cupy.empty(1, np.float64) if before is None else before
        rate.set(np.array([lr], np.float64))
        return rate

    def sgd(self, params, velocities, rate, momentum, weight_decay, nesterov):
        """One step in place for all parameters (data, grad, mask, pattern) that have a gradient."""
        updated = [(w, v, g, mask) for (w, g, mask, _), v in zip(params, velocities) if g is not None]
        for first in range(0, len(updated), PARTS):
            rows, dtype = updated[first : first + PARTS], updated[0][0].dtype
            table, held = np.zeros(1, np.dtype([("at", PART, PARTS)])), []
            for i, (w, v, g, mask) in enumerate(rows):
                copy, C, channels = self.copy_of(w), 1, 1  # of what lies in memory as weights do
                if copy is not None:
                    C, channels = w.shape[1], self.padded(w.shape[1])
                narrow = copy is not None and g.dtype == copy.dtype and channels_of(g) == channels
                g = g if narrow else self.parameter(g.astype(w.dtype, copy=False))
                assert g.shape == w.shape and w.dtype == dtype == real(dtype), (g.shape, w.shape, w.dtype, dtype)
                assert w.size < 2**32, w.shape
                arrays = w, v, g, mask, copy
                table["at"][0, i] = *(0 if a is None else a.data.ptr for a in arrays), w.size, C, channels, narrow
                held.append(g)  # until the kernel is launched
            grid = min(128, blocks(max(w.size for w, *_ in rows))), len(rows)
            options = np.float64(momentum), np.float64(weight_decay), np.int32(nesterov)
            kernel("sgd", self.kind(dtype).name)(grid, (THREADS,), (table, rate, *options))
        return list(velocities)

    # ---- batches and whole steps

    def Batches(self, images, labels, scale, shift, padding=0):
        return Batches(self, images, labels, scale, shift, padding)

    def normalized(self, pixels, scale, shift):
        """pixels (N, H, W, C) of bytes of the host, scale, shift (C,) -> pixels * scale + shift as images (N, C, H, W),
        for one size of images always at one address: valid until the next call.
        """
        images = cupy.asarray(pixels).transpose(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        factors = (cupy.asarray(a.astype(real(self.dtype))) for a in (scale, shift))
        self.images_in = self.room(self.images_in, images.shape)
        x = self.images_in[: len(images)]
        self.fill(x, None, images, *factors)
        return x

    def upload(self, labels):
        """Labels of the host at one address: valid until the next call."""
        if self.labels_in is None or len(self.labels_in) < len(labels):
            self.labels_in = cupy.empty(len(labels), np.int64)
        out = self.labels_in[: len(labels)]
        out.set(labels.astype(np.int64))
        return out

    def room(self, before, shape):
        """Memory for images of this shape as convolutions want them: that of `before` if they fit, else new."""
        if before is not None and before.shape[1:] == shape[1:] and len(before) >= shape[0]:
            return before
        return empty((max(shape[0], 1), *shape[1:]), self.dtype, self.padded(shape[1]))  # a rank's share may be empty

    def fill(self, x, y, images, scale, shift, labels=None, order=None, draws=None, first=0, padding=0):
        """x (size, C, H, W) and y (size,) from the places from `first` on of the order; see the kernel."""
        size, C, H, W = x.shape
        channels = self.padded(C)
        sizes = map(np.int32, (size, C, H, W, channels, padding))
        count = 0 if draws is None else draws.shape[1]
        launch("batch", x.dtype, size * channels * H * W, images, *strides(images), labels, order, draws,
               np.int64(first), np.int64(count), *sizes, scale, shift, np.int32(scale.size > C), x, y)

    def compiled(self, function):
        """The function as CUDA graphs."""
        return Compiled(self, function) if self.capture else function


class Batches:
    """Batches put together from a data set that lies on the GPU as bytes, by one kernel each.

    images (n, C, H, W) of uint8, labels (n,) of int64, scale, shift that broadcast to (C, H, W): arrays of the host.
    """

    prefetch = False  # a GPU works ahead of Python by itself

    def __init__(self, engine, images, labels, scale, shift, padding=0):
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64), (images.dtype, labels.dtype)
        self.engine, self.padding = engine, padding
        self.images, self.labels = cupy.asarray(images, order="C"), cupy.asarray(labels)
        C, *size = images.shape[1:]
        each = np.broadcast_shapes(np.shape(scale), np.shape(shift), (1, 1, 1))[1:] != (1, 1)  # its own for each pixel
        shape = (C, *size) if each else (C, 1, 1)
        self.factors = [cupy.asarray(np.broadcast_to(a, shape).astype(real(engine.dtype))) for a in (scale, shift)]
        self.order = self.draws = self.x = self.y = None

    def begin(self, order=None, draws=None):
        """Take the rows in this order (m,), cropped and mirrored as drawn (3, m), arrays of the host; without an order
        in their own.
        """
        self.order = None if order is None else cupy.asarray(np.ascontiguousarray(order, np.int64))
        self.draws = None if draws is None else cupy.asarray(np.ascontiguousarray(draws, np.int32))

    def get(self, part):
        """(x (len, C, H, W), y (len,)) of this slice of the order, always at one address: valid until the next get"""
        size = part.stop - part.start
        assert 0 <= part.start <= part.stop <= len(self.labels if self.order is None else self.order), part
        before, self.x = self.x, self.engine.room(self.x, (size, *self.images.shape[1:]))
        if self.x is not before:
            self.y = cupy.empty(len(self.x), np.int64)
        x, y = self.x[:size], self.y[:size]
        self.engine.fill(x, y, self.images, *self.factors, self.labels, self.order, self.draws, part.start,
                         self.padding)
        return x, y


# ---------------------------------------------------------------------------------------------- CUDA graphs


def fresh(nbytes):
    """Memory for captured work. CuPy's own allocator would, on a full GPU, first give back what is free in the pool,
    and graphs that were captured before write there.
    """
    try:
        return cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
    except RuntimeError as error:
        raise EngineError(f"a step needs more memory than the GPU has ({reason_of(error)}): choose a smaller --batch "
                          "or --width") from None


def nodes(graph):
    """How many nodes a captured graph has: CuPy does not tell, the driver does."""
    driver, count = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1"), ctypes.c_size_t()
    if error := driver.cuGraphGetNodes(ctypes.c_void_p(graph.graph), None, ctypes.byref(count)):
        raise EngineError(f"the nodes of a CUDA graph could not be counted (error {error}); --no-graph does without")
    return count.value


class Compiled:
    """function(*arrays), which computes on the GPU alone, as CUDA graphs: one for all calls whose arrays have the same
    address, shape, strides and type.

    The first two of these calls run it, to compile, plan and allocate; the third captures it; then a call is one
    launch. What it returns is valid until the next call of a compiled function: all take their memory from one pool,
    and nothing else does, so that nothing that is used later lies where a graph writes.
    """

    WARM = 2

    def __init__(self, engine, function):
        if not engine.functions:  # those of earlier runs are gone, with all that they held
            cupy.get_default_memory_pool().free_all_blocks()
            engine.pool = cupy.cuda.MemoryPool(fresh)
        self.engine, self.function, self.pool = engine, function, engine.pool
        self.moved = engine.moved
        self.calls = {}  # address, shape ...: how many calls there were, the graph, what it returns
        engine.functions.add(self)

    def __call__(self, *arrays):
        if self.moved != self.engine.moved:  # graphs would go on with the arrays of before
            self.calls, self.moved = {}, self.engine.moved
        key = tuple((a.data.ptr, a.shape, a.strides, a.dtype) for a in arrays)
        count, graph, returned = self.calls.get(key, (0, None, None))
        if graph is None:
            with cupy.cuda.using_allocator(self.pool.malloc):
                if count < self.WARM:
                    self.calls[key] = count + 1, None, None
                    return self.function(*arrays)
                graph, returned = self.captured(arrays)
            self.calls[key] = count, graph, returned
        graph.launch(self.engine.stream)
        return returned

    def captured(self, arrays):
        """(the graph of a call with these arrays, what the function returned)"""
        stream, collecting = self.engine.stream, gc.isenabled()
        if cupy.cuda.get_current_stream() != stream:
            raise EngineError("the engine's stream is not the current one, so that nothing would be captured")
        gc.disable()  # freeing an array of before in the middle of a capture would end it
        try:
            stream.begin_capture()
            try:
                returned = self.function(*arrays)
            except BaseException:
                with contextlib.suppress(Exception):
                    stream.end_capture()
                raise
            graph = stream.end_capture()
            if not nodes(graph):
                raise EngineError("nothing was captured of a step: it computes nothing, or on a stream that is not the "
                                  "engine's; --no-graph does without")
            return graph, returned
        except EngineError:
            raise
        except (RuntimeError, MemoryError) as error:
            raise EngineError(f"a step could not be captured as a CUDA graph ({reason_of(error)}); "
                              "--no-graph does without") from error
        finally:
            if collecting:
                gc.enable()
