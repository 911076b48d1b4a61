"""Training on a GPU: cuDNN's convolutions, the kernels of gpu.cu, and whole steps as CUDA graphs, on CuPy arrays.

Images are (N, C, H, W) to the user and N x H x W x C in memory, weights of convolutions (O, C, kh, kw) likewise.
Precision is that of images: parameters, statistics, linear layers and what is between load and store are float32.

    fp32  no tensor cores: for checks                    bf16  images of bfloat16
    tf32  products of 10-bit mantissas, the default      fp16  images of float16, the loss scaled so that none underflow

The functions of an Engine are those of conv.py. All work is in the order of one stream, from one host thread. cuDNN
plans each shape once: the first of its heuristics that can be built, or with `tune` the fastest. Nothing is added up in
a random order unless `deterministic` is off.
"""

import contextlib
import functools
import gc
import itertools
import math
from pathlib import Path

import cupy
import numpy as np

import conv

SOURCE = Path(__file__).with_name("gpu.cu")
TYPES = {"float32": ("float", "float"), "float64": ("double", "double"), "float16": ("float16", "float"),
         "bfloat16": ("bfloat16", "float")}  # of images: TYPE and REAL of gpu.cu
PRECISIONS = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
THREADS, BLOCKS = 256, 1024  # of a launch; more blocks than a card runs at once, each thread takes several entries
CHANNELS = 8  # of a block of batch_statistics and gradient_statistics
PARTS = 64  # parameters updated by one launch: their table is an argument, of which there are 4 KiB
PART = np.dtype([("w", np.uint64), ("v", np.uint64), ("g", np.uint64), ("mask", np.uint64), ("size", np.int64)])
ALIGNED = 16  # bytes: where images begin, for cuDNN and for packs
WORKSPACE = 2**30  # bytes of scratch memory that a plan may ask for, or a sixteenth of the card's
TRIED = 8  # plans timed for each convolution
SCALE = 65536.0  # of the loss in fp16, at first

# ---------------------------------------------------------------------------------------------- memory


def dtype_of(name):
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise conv.EngineError("bfloat16 needs ml_dtypes: pip install -r requirements-gpu.txt") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def real(dtype):
    """The type in which parameters are kept beside images of this type."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def strides_of(shape, channels):
    """Strides in entries of images (N, C, H, W) that lie in memory as (N, H, W, channels)."""
    _, _, H, W = shape
    return H * W * channels, 1, W * channels, channels


def empty(shape, dtype, channels=None):
    """Images (N, C, H, W) with undefined contents, (N, H, W, channels) in memory."""
    N, C, H, W = shape
    channels = channels or C
    memory = cupy.empty(N * H * W * channels, dtype)
    strides = [s * memory.itemsize for s in strides_of(shape, channels)]
    return cupy.ndarray(shape, dtype, memory.data, strides)  # not a view: whoever gets it owns it


def channels_of(x):
    """With how many channels to a pixel x (N, C, H, W) lies in memory as (N, H, W, channels); None if it does not."""
    lines = [(n, stride // x.itemsize) for n, stride in zip(x.shape, x.strides)]  # entries and stride of each axis
    N, C, H, W = lines
    channels = W[1] if W[0] > 1 else H[1] if H[0] > 1 else N[1] // (H[0] * W[0]) if N[0] > 1 else C[0]
    fits = all(n == 1 or stride == want for (n, stride), want in zip(lines, strides_of(x.shape, channels)))
    return channels if fits and channels >= C[0] else None


def pack(C, dtype):
    """Neighbouring channels that a thread takes at a time: as many as divide C and fit a load of 16 bytes."""
    return next(v for v in (8, 4, 2, 1) if C % v == 0 and v * dtype.itemsize <= 16)


@functools.cache
def compiled(name, pack):
    """The kernels of gpu.cu for images of a type, `pack` channels to a thread; CuPy keeps them on disk."""
    kind, wide = TYPES[name]
    return cupy.RawModule(code=SOURCE.read_text(), options=("-std=c++17", f"-DTYPE={kind}", f"-DREAL={wide}",
                                                            f"-DV={pack}"))


@functools.cache
def kernel(name, dtype, pack=1):
    return compiled(dtype, pack).get_function(name)


def blocks(count):
    return max(1, min(BLOCKS, -(-int(count) // THREADS)))


def launch(name, dtype, count, *args, pack=1, groups=1):
    """A kernel of gpu.cu that takes `count` entries, or packs of entries, one after the other."""
    if count >= 2**32:
        raise conv.EngineError(f"a batch of {count:,} entries is too large for the kernels: choose a smaller --batch")
    kernel(name, np.dtype(dtype).name, pack)((blocks(count), groups), (THREADS,), args)


# ---------------------------------------------------------------------------------------------- cuDNN


def reason_of(error):
    """An exception in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@functools.cache
def cudnn():
    """cuDNN's Python module; EngineError if it cannot be used."""
    try:
        from cuda import pathfinder

        pathfinder.load_nvidia_dynamic_lib("cudart")  # one that came as a Python package is found no other way
        import cudnn
    except Exception as error:  # ImportError, or whatever a library that does not load makes them raise
        raise conv.EngineError(f"convolution on a GPU needs cuDNN ({reason_of(error)}): "
                               "pip install -r requirements-gpu.txt") from None
    return cudnn


def convolution(kind, x, w, y, dtype, stride, padding, strict=False, deterministic=True, **where):
    """The cuDNN graph of a convolution and its three tensors by name.

    kind: "fprop" x, w -> y; "dgrad" y, w -> x; "wgrad" y, x -> w. x, w, y: shapes (N, C, H, W), (O, C, kh, kw),
    (N, O, H', W'). where: the handle or device_property to plan for.
    """
    c = cudnn()
    types = {"float32": c.data_type.FLOAT, "float64": c.data_type.DOUBLE, "float16": c.data_type.HALF,
             "bfloat16": c.data_type.BFLOAT16}
    io, wide = types[dtype], types["float64" if dtype == "float64" else "float32"]
    graph = c.pygraph(io_data_type=io, intermediate_data_type=wide, compute_data_type=wide, **where)
    shapes = dict(x=x, w=w, y=y)

    def tensor(name):
        return graph.tensor(name=name, dim=list(shapes[name]), stride=list(strides_of(shapes[name], shapes[name][1])),
                            data_type=io)

    made = {"fprop": "y", "dgrad": "x", "wgrad": "w"}[kind]
    tensors = {name: tensor(name) for name in shapes if name != made}
    options = dict(padding=[padding] * 2, stride=[stride] * 2, dilation=[1, 1])
    if kind == "fprop":
        out = graph.conv_fprop(image=tensors["x"], weight=tensors["w"], **options)
    elif kind == "dgrad":
        out = graph.conv_dgrad(loss=tensors["y"], filter=tensors["w"], **options)
    else:
        out = graph.conv_wgrad(image=tensors["x"], loss=tensors["y"], **options)
    shape = shapes[made]  # without it a strided dgrad has the wrong size, in silence
    out.set_output(True).set_dim(list(shape)).set_stride(list(strides_of(shape, shape[1]))).set_data_type(io)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([c.heur_mode.A, c.heur_mode.FALLBACK])
    unwanted = [c.numerical_note.NONDETERMINISTIC] if deterministic else []
    unwanted += [c.numerical_note.TENSOR_CORE, c.numerical_note.DOWN_CONVERT_INPUTS] if strict else []
    if unwanted:
        graph.deselect_numeric_notes(unwanted)
    return graph, tensors | {made: out}


def plans(graph, limit=WORKSPACE):
    """Numbers of the graph's plans that can be built and need no more scratch memory, best first by the heuristics."""
    for number in range(graph.get_execution_plan_count()):
        try:
            graph.build_plan_at_index(number)
        except Exception:  # cuDNN proposes plans that turn out not to be supported, or were deselected
            continue
        if graph.get_workspace_size_plan_at_index(number) <= limit:
            yield number


def described(kind, x, w, y, dtype, stride, padding):
    return f"{kind} of images {x}, weights {w}, output {y}, stride {stride}, padding {padding} in {dtype}"


def milliseconds(work, rounds=5):
    """The least time on the GPU of one call of work, after one to warm up."""
    work()
    times = []
    for _ in range(rounds):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end))
    return min(times)


# ---------------------------------------------------------------------------------------------- engine


class Engine:
    """What nn.py computes with on a GPU. precision: of PRECISIONS; tune: time cuDNN's plans, take the fastest."""

    def __init__(self, precision="tf32", deterministic=True, tune=False):
        self.strict, self.half = precision == "fp32", precision in ("bf16", "fp16")
        self.precision, self.deterministic, self.tune = precision, deterministic, tune
        self.dtype = dtype_of(PRECISIONS[precision])
        self.stream = cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        self.stream.use()
        self.limit = max(WORKSPACE, cupy.cuda.runtime.memGetInfo()[1] // 16)  # ImageNet in float32 asks for 3 GiB
        self.graphs, self.workspaces = {}, []

    warm = property(lambda self: Replay.WARM)  # how often captured work is done before it is captured

    # ---- images

    def kind(self, dtype):
        """The type in which images that come in this type are kept."""
        return np.dtype(dtype) if dtype == np.float64 else self.dtype

    def images(self, x, channels=None, out=None):
        """x (N, C, H, W) in this engine's type, (N, H, W, channels) in memory; in `out`, or a copy only if it is not so
        already.
        """
        N, C, H, W = x.shape
        dtype, channels = self.kind(x.dtype), channels or C
        if out is None and x.dtype == dtype and channels_of(x) == channels and x.data.ptr % ALIGNED == 0:
            return x
        if x.dtype not in (dtype, real(dtype)):
            x = x.astype(real(dtype))
        out = empty(x.shape, dtype, channels) if out is None else out
        strides = [np.int64(s // x.itemsize) for s in x.strides]
        count, wide = np.int64(N * H * W * channels), np.int32(x.dtype == real(dtype))
        launch("to_images", dtype, count, x, wide, *strides, *map(np.int32, (C, H, W, channels)), count, out)
        return out

    def parameter(self, array):
        """A parameter's array in the memory order that the kernels want."""
        if array.ndim != 4:
            return cupy.ascontiguousarray(array)
        return array if channels_of(array) == array.shape[1] else self.copied(array)

    def flat(self, array):
        """All entries of a parameter's array in memory order, a view of one axis"""
        return cupy.ndarray(array.size, array.dtype, array.data)

    def copied(self, array):
        """(O, C, kh, kw) of any type in NHWC"""
        out = empty(array.shape, array.dtype)
        out[...] = array
        return out

    def padded(self, C):
        """Channels to keep for images of C: with three, cuDNN's plans for half precision need 100 times the memory."""
        return 4 if self.half and C == 3 else C

    # ---- convolution

    def weights(self, w):
        """What forward and input_gradient take for weights w (O, C, kh, kw): in the type of images"""
        return self.images(w, self.padded(w.shape[1]))

    def forward(self, x, w, stride, padding):
        """x (N, C, H, W), w (O, C, kh, kw) -> (N, O, H', W')"""
        size = conv.output_size(x.shape, w.shape, stride, padding)
        channels = self.padded(x.shape[1])
        x, w = self.images(x, channels), self.images(w, channels)
        if x.dtype != w.dtype:
            raise ValueError(f"conv2d takes images and weights of one floating type, not {x.dtype} and {w.dtype}")
        y = empty((len(x), len(w), *size), x.dtype)
        self.convolve("fprop", x, w, y, stride, padding, channels)
        return y

    def input_gradient(self, g, w, shape, stride, padding):
        """The gradient with respect to x of this shape, from g (N, O, H', W')"""
        g = self.images(g)
        dx = empty(shape, g.dtype)
        self.convolve("dgrad", dx, self.images(w), g, stride, padding, shape[1])
        return dx

    def weight_gradient(self, g, x, shape, stride, padding):
        """The gradient with respect to w of this shape, from g (N, O, H', W') and x (N, C, H, W)"""
        C, channels = shape[1], self.padded(shape[1])
        g, x = self.images(g), self.images(x, channels)
        dw = empty(shape, g.dtype, channels)
        self.convolve("wgrad", x, dw, g, stride, padding, channels)
        if channels == C and dw.dtype == real(dw.dtype):
            return dw
        out = empty(shape, real(dw.dtype))
        launch("from_images", dw.dtype, out.size, dw, np.int32(C), np.int32(channels), np.int64(out.size), out)
        return out

    def convolve(self, kind, x, w, y, stride, padding, channels):
        """Run the convolution of this kind on arrays in NHWC; x and w have `channels` channels in memory."""
        arrays = dict(x=x, w=w, y=y)
        shapes = {n: (a.shape[0], a.shape[1] if n == "y" else channels, *a.shape[2:]) for n, a in arrays.items()}
        for name, array in arrays.items():  # cuDNN would take a wrong layout or type in silence
            assert array.dtype == y.dtype and channels_of(array) == shapes[name][1], (name, array.dtype, array.strides)
        key = kind, *shapes.values(), y.dtype.name, stride, padding
        try:
            if key not in self.graphs:
                self.graphs[key] = self.planned(*key, arrays)
            self.execute(*self.graphs[key], arrays)
        except conv.EngineError:
            raise
        except Exception as error:  # RuntimeError and cuDNN's own types, and CuPy's when memory runs out
            raise conv.EngineError(f"cuDNN's {described(*key)} failed: {reason_of(error)}") from None

    def planned(self, kind, x, w, y, dtype, stride, padding, arrays):
        """(graph, tensors, number of its plan)"""
        graph, tensors = convolution(kind, x, w, y, dtype, stride, padding, self.strict and dtype == "float32",
                                     self.deterministic, handle=self.handle)
        timed = []
        for number in itertools.islice(plans(graph, self.limit), TRIED if self.tune else 1):
            if self.tune:
                # memory of its own: what captured steps take theirs from should not grow for trials
                memory = cupy.cuda.MemoryPool().malloc(max(graph.get_workspace_size_plan_at_index(number), 1))
                try:
                    timed.append((milliseconds(lambda: self.execute(graph, tensors, number, arrays, memory)), number))
                except Exception:  # it can be built, but not run
                    continue
            else:
                timed.append((0, number))
        if not timed:
            raise conv.EngineError(f"cuDNN has no plan for the {described(kind, x, w, y, dtype, stride, padding)}"
                                   + (", without tensor cores" if self.strict else "")
                                   + (", deterministically" if self.deterministic else ""))
        return graph, tensors, min(timed)[1]

    def execute(self, graph, tensors, number, arrays, memory=None):
        cudnn().set_stream(handle=self.handle, stream=cupy.cuda.get_current_stream().ptr)
        pointers = {tensors[name]: array.data.ptr for name, array in arrays.items()}
        if memory is None:
            memory = self.workspace(graph.get_workspace_size_plan_at_index(number)).data
        graph.execute_plan_at_index(pointers, memory.ptr, number, handle=self.handle)

    @functools.cached_property
    def handle(self):
        return cudnn().create_handle()

    def workspace(self, nbytes):
        """Scratch memory, shared by all plans. Smaller ones are kept: captured graphs write into them."""
        if not self.workspaces or self.workspaces[-1].nbytes < nbytes:
            self.workspaces.append(cupy.empty(max(nbytes, 1), np.uint8))
        return self.workspaces[-1]

    # ---- BatchNorm, sums and pooling

    def sums(self, name, M, C, dtype, *arrays):
        """(parts, 2, C): what the kernel of this name adds up over parts of the M pixels; and how many parts."""
        v = pack(C, dtype)
        lanes = min(32, 1 << (C // v - 1).bit_length())
        tiles = -(-C // v // lanes)
        parts = max(1, min(-(-256 // tiles), -(-M * lanes // (4 * THREADS))))  # enough blocks, and work for each thread
        out = cupy.empty((parts, 2, C), real(dtype))
        sizes = np.int64(M), np.int32(C), np.int32(lanes)
        kernel(name, dtype.name, v)((tiles, parts), (THREADS,), (*arrays, *sizes, out))
        return out, np.int32(parts)

    def batch_norm(self, x, weight, bias, running_mean, running_var, training, momentum, eps, add, relu):
        """As conv.batch_norm: (out, what the backward pass needs of the statistics)."""
        x, add = self.images(x), None if add is None else self.images(add)
        C, M = x.shape[1], x.size // x.shape[1]
        sums, parts = self.sums("channel_sums", M, C, x.dtype, x) if training else (None, np.int32(0))
        saved = cupy.empty((4, C), real(x.dtype))
        arguments = (sums, parts, x, np.int64(M), np.int32(C), weight, bias, running_mean, running_var,
                     np.float64(momentum), np.float64(eps), saved)
        kernel("batch_statistics", x.dtype.name)((-(-C // CHANNELS),), (THREADS,), arguments)
        out, v = empty(x.shape, x.dtype), pack(C, x.dtype)
        count = np.int64(x.size // v)
        launch("normalize", x.dtype, count, x, add, saved, np.int32(relu), np.int32(C), count, out, pack=v)
        return out, saved

    def batch_norm_backward(self, g, x, out, weight, saved, training, separate):
        """As conv.batch_norm_backward: (dx, dweight, dbias, dadd)."""
        g, x = self.images(g), self.images(x)
        C, M = x.shape[1], x.size // x.shape[1]
        sums, parts = self.sums("gradient_sums", M, C, x.dtype, g, x, out, saved)  # saved begins with the mean
        wide = real(x.dtype)
        dweight, dbias, terms = cupy.empty(C, wide), cupy.empty(C, wide), cupy.empty((3, C), wide)
        arguments = sums, parts, np.int64(M), np.int32(C), saved, np.int32(training), dweight, dbias, terms
        kernel("gradient_statistics", x.dtype.name)((-(-C // CHANNELS),), (THREADS,), arguments)
        dx, v = empty(x.shape, x.dtype), pack(C, x.dtype)
        dadd, count = empty(x.shape, x.dtype) if separate else None, np.int64(x.size // v)
        launch("normalize_gradient", x.dtype, count, g, x, out, terms, np.int32(C), count, dx, dadd, pack=v)
        return dx, dweight, dbias, dadd

    def add(self, x, y):
        """x + y of two gradients of one shape"""
        if x.dtype != self.kind(x.dtype) or y.dtype != x.dtype:
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
        h, w = ((n + 2 * padding - size) // stride + 1 for n in (H, W))
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
        """a (.., M, K) @ b (.., K, N) + bias (.., N), with at most one leading axis: float32 without tensor cores."""
        groups = [len(array) for array in (a, b) if array.ndim == 3]
        (M, K), (rows, N), dtype = a.shape[-2:], b.shape[-2:], a.dtype
        fits = K == rows and len({*groups}) < 2 and (bias is None or bias.shape == (*groups[:1], N))
        if not fits or {x.dtype for x in (a, b, bias) if x is not None} != {dtype}:
            raise ValueError(f"{a.shape} of {dtype} cannot be multiplied with {b.shape} of {b.dtype}"
                             + ("" if bias is None else f" and added to {bias.shape} of {bias.dtype}"))
        c = cupy.empty((*groups[:1], M, N), dtype)

        def strides(x):
            return [np.int64(s // x.itemsize) for s in ((0,) * (3 - x.ndim) + x.strides)]

        kernel("product", dtype.name)((-(-N // 64), -(-M // 64), (groups or [1])[0]), (THREADS,),
                                      (a, b, bias, c, np.int32(M), np.int32(N), np.int32(K), *strides(a), *strides(b)))
        return c

    def cross_entropy(self, logits, labels, gradient=True):
        """(mean loss (..), its gradient (.., N, K) or None, (.., 2) of float64: sum of losses, correct answers)"""
        *groups, N, K = logits.shape
        logits, labels = cupy.ascontiguousarray(logits), cupy.ascontiguousarray(labels)
        assert labels.dtype == np.int64 and labels.shape == (*groups, N), (labels.dtype, labels.shape)
        loss, sums = cupy.empty(tuple(groups), logits.dtype), cupy.empty((*groups, 2), np.float64)
        dlogits = cupy.empty(logits.shape, logits.dtype) if gradient else None
        kernel("cross_entropy", logits.dtype.name)((math.prod(groups),), (THREADS,),
                                                   (logits, labels, np.int32(N), np.int32(K), loss, dlogits, sums))
        return loss, dlogits, sums

    def scaling(self):
        """The state of the loss's scale in fp16, (scale, good steps and overflow as bits of integers); else None."""
        return cupy.asarray(np.array([SCALE, 0, 0], np.float32)) if self.precision == "fp16" else None

    def sgd(self, params, velocity, rate, momentum, weight_decay, nesterov, scaling):
        """One step for all parameters that have a gradient; rate: array (groups,) of learning rates."""
        moved = [(p, v, self.parameter(p.grad)) for p, v in zip(params, velocity) if p.grad is not None]
        tables = []
        for first in range(0, len(moved), PARTS):
            rows = moved[first : first + PARTS]
            table = np.zeros(1, np.dtype([("at", PART, PARTS)]))
            for i, (p, v, g) in enumerate(rows):
                assert g.shape == p.shape and g.dtype == p.dtype, (g.shape, g.dtype, p.shape, p.dtype)
                pointers = [0 if a is None else a.data.ptr for a in (p.data, v, g, p.mask)]
                table["at"][0, i] = (*pointers, p.size)
            grid = min(128, blocks(max(p.size for p, _, _ in rows))), len(rows)
            tables.append((table, grid, rows[0][0].dtype.name))
        if scaling is not None:
            for table, grid, dtype in tables:
                kernel("check_finite", dtype)(grid, (THREADS,), (table, scaling))
        for table, grid, dtype in tables:
            kernel("sgd", dtype)(grid, (THREADS,), (table, rate, np.int32(rate.size), np.float64(momentum),
                                                    np.float64(weight_decay), np.int32(nesterov), scaling))
        if tables and scaling is not None:
            kernel("rescale", dtype)((1,), (1,), (scaling,))

    # ---- whole runs

    def feed(self, *arguments, **options):
        return Feed(self, *arguments, **options)

    def inbox(self, *arguments):
        return Inbox(self, *arguments)

    def replay(self, work, pool, capture=True):
        return Replay(self, work, pool, capture)

    def pool(self):
        return Pool()

    def versions(self):
        """What a record of a run on this GPU needs."""
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        return {"gpu": properties["name"].decode(), "precision": self.precision, "deterministic": self.deterministic,
                "tuned": self.tune}


# ---------------------------------------------------------------------------------------------- batches


class Feed:
    """Batches put together on the GPU from a data set that lies there as bytes, by one kernel each.

    images (n, C, H, W) of uint8, labels (n,), scale and shift (C, H, W) as in data.Dataset. groups: networks that take
    batches at once, each in its own order.
    """

    def __init__(self, engine, images, labels, scale, shift, padding=0, groups=None):
        self.engine, self.padding, self.groups = engine, padding, groups
        self.images, self.labels = cupy.ascontiguousarray(images), cupy.ascontiguousarray(labels)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64), (images.dtype, labels.dtype)
        dtype = real(engine.dtype)
        shape = images.shape[1:]
        self.scale, self.shift = (cupy.ascontiguousarray(cupy.broadcast_to(a, shape).astype(dtype))
                                  for a in (scale, shift))
        self.cursor = cupy.zeros(1, np.int64)
        self.order = self.draws = None

    def begin(self, order=None, draws=None, first=0):
        """Start at place `first` of this order (.., count) with these draws (.., 3, count), arrays of the host; without
        an order in that of the data set.
        """
        for name, array in (("order", order), ("draws", draws)):
            assert array is not None or getattr(self, name) is None, f"a feed that had an {name} goes on with one"
            if array is not None:
                array = np.ascontiguousarray(array, np.int64 if name == "order" else np.int32)
                if getattr(self, name) is None:  # later epochs go to the same memory: captured graphs read it
                    setattr(self, name, cupy.empty(array.shape, array.dtype))
                getattr(self, name).set(array)
        self.cursor.set(np.array([first]))

    def batch(self, size):
        """(x, labels) of the next `size` places, and on to those behind them: x (.., size, C, H, W)."""
        C, H, W = self.images.shape[1:]
        dtype, groups = self.engine.dtype, self.groups or 1
        channels = self.engine.padded(C)
        if self.groups is None:
            x, y = empty((size, C, H, W), dtype, channels), cupy.empty(size, np.int64)
        else:
            assert C == channels == 1, "several networks at a time take images of one channel"
            x, y = cupy.empty((groups, size, C, H, W), dtype), cupy.empty((groups, size), np.int64)
        count = self.order.shape[-1] if self.order is not None else 0
        launch("batch", dtype, size * channels * H * W, self.images, self.labels, self.order, self.draws, self.cursor,
               np.int64(count), *map(np.int32, (size, C, H, W, channels, self.padding)), self.scale, self.shift, x, y,
               groups=groups)
        kernel("advance", dtype.name)((1,), (1,), (self.cursor, np.int64(size)))
        return x, y


class Inbox:
    """Batches that come from elsewhere, put where captured steps find them."""

    def __init__(self, engine, size, shape):
        self.engine, (C, H, W) = engine, shape
        self.x = empty((size, C, H, W), engine.dtype, engine.padded(C))
        self.labels = cupy.empty(size, np.int64)

    def put(self, x, labels):
        self.engine.images(x, self.engine.padded(x.shape[1]), self.x[: len(x)])
        self.labels[: len(labels)] = labels

    def batch(self, size):
        return self.x[:size], self.labels[:size]


# ---------------------------------------------------------------------------------------------- CUDA graphs


class Pool:
    """Memory for captured work. released: how often CuPy, on a full card, gave back what was free in it: graphs that
    were captured before write there, and have to be captured anew.
    """

    def __init__(self):
        self.pool, self.released = cupy.cuda.MemoryPool(), 0
        self.total_bytes = self.pool.total_bytes

    def malloc(self, size):
        total, free = self.pool.total_bytes(), self.pool.free_bytes()
        pointer = self.pool.malloc(size)
        if self.pool.total_bytes() != total and self.pool.free_bytes() < free:
            self.released += 1
        return pointer


class Replay:
    """work(), which computes on the GPU alone and needs no argument, as a CUDA graph.

    The first two calls run it, to compile, plan and allocate; the third captures it; then a call is one launch. Memory
    comes from a pool, which several may share that run one after the other, so that nothing else can be put where a
    graph writes. With capture=False every call runs it, to the same bits.
    """

    WARM = 2

    def __init__(self, engine, work, pool, capture=True):
        self.engine, self.work, self.pool, self.capture = engine, work, pool, capture
        self.calls, self.graph, self.released = 0, None, 0

    def __call__(self):
        if self.graph is not None and self.released != self.pool.released:
            self.calls, self.graph = 0, None
        if self.graph is None:
            with cupy.cuda.using_allocator(self.pool.malloc):
                if self.calls < self.WARM or not self.capture:
                    self.calls += 1
                    self.work()
                    return
                self.graph = self.captured()
                self.released = self.pool.released
        self.graph.launch(self.engine.stream)

    def captured(self):
        stream, collecting = self.engine.stream, gc.isenabled()
        gc.disable()  # freeing an array of before in the middle of a capture would end it
        try:
            stream.begin_capture()
            try:
                self.work()
            except BaseException:
                with contextlib.suppress(Exception):
                    stream.end_capture()
                raise
            return stream.end_capture()
        except (RuntimeError, MemoryError) as error:
            raise conv.EngineError(f"a step could not be captured as a CUDA graph ({reason_of(error)}); "
                                   "--no-graph does without") from error
        finally:
            if collecting:
                gc.enable()
