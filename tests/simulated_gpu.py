"""A GPU made of NumPy and g++: modules `cupy` and `cudnn` that run the project's GPU code on any machine.

    gpu = simulated_gpu.install()    # from now on `import cupy`, `import cudnn` and `import cuda.pathfinder` give these
    ...
    simulated_gpu.check_guards()     # raises if anything was written behind the end of an allocation
    simulated_gpu.uninstall()

Only what the project uses is here, for one thread of Python, and it is stricter than the hardware. Fresh memory is NaN,
and so is the shared memory of a block. Blocks and threads run in an odd order. A kernel's arguments are checked against
its signature, every pointer against the live allocations, and a barrier that not all threads of a block reach is an
error. While a stream captures nothing runs; a graph that is launched runs what was captured, on the same memory, which
must still be there. `launches` lists what was run: kernels, "cudnn fprop", "add", "copy to host", "graph" ...

It has no streams that run beside each other, and no time: only results can be tested with it.
"""

import bisect
import collections
import contextlib
import ctypes
import enum
import functools
import hashlib
import importlib.util
import itertools
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
import weakref
from pathlib import Path

import numpy as np

with contextlib.suppress(ImportError):
    import ml_dtypes  # noqa: F401  (NumPy then knows "bfloat16")

HEADER = Path(__file__).with_name("simulated_gpu.h")
launches = []  # what ran, in order; empty it with launches.clear()


def available():
    """None, or why the simulated GPU cannot be used."""
    return None if shutil.which("g++") else "the simulated GPU needs g++"


# ---------------------------------------------------------------------------------------------- memory

GUARD = np.full(64, 0x3C, np.uint8)  # behind each allocation; 0.01 in float32, so that adding to it changes it
ALIGNMENT = 512
MISSING = "cudaErrorIllegalAddress: an illegal memory access was encountered"

starts, memories = [], {}  # sorted first addresses of live allocations; first address -> weak reference
dead = collections.deque()  # first addresses of allocations that are gone, until the next look at the registry
overwritten = []  # sizes of freed allocations with a broken guard


class Memory:
    """One allocation, alive as long as this object: `size` bytes at `ptr`, all ones at first."""

    def __init__(self, size):
        self.raw = np.empty(size + ALIGNMENT + GUARD.size, np.uint8)
        self.offset = -self.raw.ctypes.data % ALIGNMENT
        self.ptr, self.size = self.raw.ctypes.data + self.offset, size
        self.raw[self.offset:self.offset + size] = 0xFF
        self.guard = self.raw[self.offset + size:][:GUARD.size]
        self.guard[:] = GUARD
        purge()
        bisect.insort(starts, self.ptr)
        memories[self.ptr] = weakref.ref(self)

    def guarded(self):
        return (self.guard == GUARD).all()

    def __del__(self):
        if not sys.is_finalizing():
            if not self.guarded():
                overwritten.append(self.size)
            dead.append(self.ptr)  # the registry may be in use further up the stack: only note it


def purge():
    while dead:
        ptr = dead.popleft()
        del starts[bisect.bisect_left(starts, ptr)], memories[ptr]


def need(ptr, size, what):
    """The live allocation that holds size bytes at ptr; raises if there is none."""
    purge()
    i = bisect.bisect_right(starts, ptr) - 1
    memory = memories[starts[i]]() if i >= 0 else None
    left = 0 if memory is None else memory.ptr + memory.size - ptr
    if left <= 0:
        raise CUDARuntimeError(f"{MISSING}: {what} at {ptr:#x} is in no live allocation")
    if left < size:
        raise CUDARuntimeError(f"{MISSING}: {what} needs {size} bytes, {left} are allocated")
    return memory


def check_guards():
    """Raise if anything was written behind the end of an allocation, living or freed (reported once)."""
    purge()
    broken = [memory for ref in memories.values() if (memory := ref()) is not None and not memory.guarded()]
    sizes = overwritten + [memory.size for memory in broken]
    overwritten.clear()
    for memory in broken:
        memory.guard[:] = GUARD
    if sizes:
        raise RuntimeError(f"written behind the end of allocations of {sizes} bytes")


class MemoryPool:
    """Counts what is allocated through it. Memory it gave out during a capture stays as long as the pool: what a graph
    works on belongs to its pool, not to the arrays of the capture.
    """

    def __init__(self, allocator=None):
        self.allocator = allocator or (lambda size: MemoryPointer(Memory(size), 0))
        self.kept, self.living = [], weakref.WeakSet()

    def malloc(self, size):
        pointer = self.allocator(size)
        self.living.add(pointer.mem)
        if get_current_stream().recorded is not None and self is not default_pool:
            self.kept.append(pointer.mem)
        return pointer

    def total_bytes(self):
        return sum(-(-memory.size // ALIGNMENT) * ALIGNMENT for memory in self.living)

    def free_all_blocks(self):
        pass


class MemoryPointer:
    """What `array.data` is."""

    def __init__(self, mem, offset):
        self.mem, self.ptr = mem, mem.ptr + offset


default_pool = MemoryPool()
allocators = [default_pool.malloc]  # the innermost last


@contextlib.contextmanager
def using_allocator(allocator):
    allocators.append(allocator)
    try:
        yield
    finally:
        allocators.pop()


def allocate(shape, dtype, strides=None):
    """A device array of NaN (all bits are ones)."""
    host = np.empty(shape, dtype)
    memory = allocators[-1](host.nbytes).mem
    return wrap(np.ndarray(host.shape, host.dtype, memory.raw, memory.offset, strides), memory)


def allocate_like(host):
    """allocate() with the shape and type of a NumPy array and its order of axes, if that is dense."""
    return allocate(host.shape, host.dtype, np.empty_like(host, subok=False).strides)


# ---------------------------------------------------------------------------------------------- streams and graphs


class CUDARuntimeError(RuntimeError):
    pass


class Stream:
    """Runs everything at once, in the order of the calls, except between begin_capture() and end_capture()."""

    numbers, living = itertools.count(0, 16), weakref.WeakValueDictionary()

    def __init__(self, non_blocking=False):
        self.ptr, self.recorded = next(self.numbers), None
        self.living[self.ptr] = self

    def __enter__(self):
        entered.append(self)
        self.use()

    def __exit__(self, *error):
        entered.pop()
        entered[-1].use()  # which use() did not change

    def use(self):
        global current
        current = self

    def synchronize(self):
        refuse_capture("a wait for the stream", self)

    def begin_capture(self):
        if self is null_stream:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: the default stream cannot be captured")
        self.recorded = []

    def end_capture(self):
        graph, self.recorded = Graph(self.recorded), None
        return graph


class Graph:
    """What was captured: [(name, function, weak references to the memory that it uses)]"""

    def __init__(self, recorded):
        self.recorded = recorded

    def launch(self, stream=None):
        refuse_capture("the launch of a graph", stream)
        for name, _, used in self.recorded:
            if any(memory() is None for memory in used):
                raise RuntimeError(f"the graph uses memory that was freed after the capture, in {name!r}: hold the "
                                   "array, or capture with an allocator of your own (using_allocator)")
        launches.append("graph")
        for _, run, _ in self.recorded:
            run()


class Event:
    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        refuse_capture("a wait for an event")


def get_elapsed_time(start, end):
    """Milliseconds between two recorded events."""
    return (end.time - start.time) * 1e3


null_stream = current = Stream()  # `current`: what use() or `with` made the current stream
entered = [null_stream]  # with `with`, the innermost last


def get_current_stream():
    return current


def refuse_capture(what, stream=None):
    if (stream or current).recorded is not None:
        raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} is not permitted while the stream is "
                               "capturing")


def submit(name, run, used, stream=None):
    """Run an operation that works on the allocations `used`, or record it if the stream captures."""
    recorded = (stream or current).recorded
    if recorded is None:
        launches.append(name)
        run()
    else:
        recorded.append((name, run, [weakref.ref(memory) for memory in used]))


# ---------------------------------------------------------------------------------------------- arrays

METHODS = "copy mean reshape sum swapaxes transpose view".split()
FUNCTIONS = """add arange broadcast_to concatenate exp expand_dims full log maximum ones ones_like where zeros
    zeros_like""".split()


def walk(tree, visit):
    """The tree of tuples, lists and dicts with its leaves replaced by visit(leaf)."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(walk(x, visit) for x in tree)
    if isinstance(tree, dict):
        return {k: walk(x, visit) for k, x in tree.items()}
    return visit(tree)


def call(name, function, args, kwargs=None, writes=None):
    """function(*args, **kwargs), a function of NumPy, on device arrays; writes: the one that it changes, or None."""
    arrays, tree = [], (args, kwargs or {})

    def collect(x):
        if isinstance(x, np.ndarray) and x.ndim:
            raise TypeError(f"Unsupported type {type(x)}")
        if isinstance(x, ndarray):
            arrays.append(x)

    walk(tree, collect)
    if name == "matmul":
        refuse_capture("cuBLAS")
    inputs, target = walk(tree, lambda x: x.host if isinstance(x, ndarray) else x), None
    if writes is None:  # see what comes out: one of the arrays, a view of one, or something new
        result = quietly(function, inputs)
        for a in arrays:
            if result is a.host:
                return a
            if np.may_share_memory(result, a.host):
                return wrap(result, a.memory, a if a.base is None else a.base)
        writes = allocate_like(np.asarray(result))
        target = writes.host
    used = [writes.memory, *(a.memory for a in arrays)]  # a graph does not hold it: arrays of the device may be freed
    submit(name, functools.partial(quietly, function, inputs, target), used)
    return writes


def quietly(function, inputs, target=None):
    """function(*args, **kwargs), inputs being (args, kwargs), also put into `target` if there is one"""
    args, kwargs = inputs
    with np.errstate(all="ignore"):
        result = function(*args, **kwargs)
    if target is not None:
        target[...] = result
    return result


def wrap(host, memory, base=None):
    """The device array with the memory of a NumPy array."""
    array = object.__new__(ndarray)
    array.host, array.memory, array.base = host, memory, base
    return array


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """cupy.ndarray. It is no numpy.ndarray, as in CuPy: one in its stead anywhere is an error.

    host: a NumPy array on the same memory. memory: the allocation. base: the array of which it is a view, or None.
    """

    __hash__ = None

    def __new__(cls, shape, dtype, memptr, strides=None):
        dense = np.empty(shape, dtype)
        memory = need(memptr.ptr, dense.nbytes if strides is None else 0, "an array")
        raw, offset = memory.raw[:memory.offset + memory.size], memptr.ptr - memory.ptr + memory.offset
        return wrap(np.ndarray(shape, dtype, raw, offset, strides), memory)

    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    nbytes = property(lambda self: self.host.nbytes)
    itemsize = property(lambda self: self.host.itemsize)
    flags = property(lambda self: self.host.flags)
    T = property(lambda self: self.transpose())
    data = property(lambda self: MemoryPointer(self.memory, self.host.ctypes.data - self.memory.ptr))

    def __len__(self):
        return len(self.host)

    def get(self):
        refuse_capture("a copy to the host")
        launches.append("copy to host")
        if not self.flags.c_contiguous:
            with current:  # as CuPy does, to put the array in order first
                pass
        return self.host.copy()

    def set(self, array):
        refuse_capture("a copy to the device")
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"set() of {array.dtype} {array.shape} in an array of {self.dtype} {self.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        launches.append("copy to device")
        self.host[...] = array

    def __bool__(self):
        return bool(self.get())

    def item(self):
        return self.get().item()

    def __float__(self):
        return float(self.get())

    def __int__(self):
        return int(self.get())

    def __repr__(self):
        return repr(self.get())

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy "
                        "array explicitly.")

    def __array_ufunc__(self, ufunc, method, *args, out=(None,), **kwargs):
        if method != "__call__":
            return NotImplemented
        return call(ufunc.__name__, ufunc, args, kwargs | {"out": out[0]}, out[0])

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, ndarray) and i.dtype == bool for i in index):
            refuse_capture("an index by a mask")
        if not any(isinstance(i, (ndarray, np.ndarray, list, type(Ellipsis))) for i in index):
            index += (Ellipsis,)  # a view, also where NumPy gives a number
        return call("getitem", operator.getitem, (self, index))

    def __setitem__(self, index, value):
        call("setitem", operator.setitem, (self, index, value), writes=self)

    def astype(self, dtype, order="K", copy=True):
        return call("astype", np.ndarray.astype, (self, np.dtype(dtype)), dict(order=order, copy=copy))


def method(name):
    def run(self, *args, **kwargs):
        return call(name, getattr(np.ndarray, name), (self, *args), kwargs)

    return run


for _name in METHODS:
    setattr(ndarray, _name, method(_name))


# ---------------------------------------------------------------------------------------------- the module cupy


def asarray(a, dtype=None, order="K", copy=False):
    """A device array of a host array, a number, a list, or another device array."""
    if isinstance(a, ndarray):
        return a.astype(dtype or a.dtype, order, copy)
    refuse_capture("a copy to the device")
    host = np.array(a, dtype, order=order or "K")
    if host.dtype.kind not in "biufV":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    out = allocate_like(host)
    out.host[...] = host
    launches.append("copy to device")
    return out


def ascontiguousarray(a):
    return asarray(a, order="C")


def function(name):
    """cupy.NAME: that of NumPy, on device arrays"""
    value = getattr(np, name)

    def run(*args, out=None, **kwargs):
        return call(name, value, args, kwargs if out is None else kwargs | {"out": out}, out)

    if isinstance(value, np.ufunc):
        run.at = lambda target, *rest: call(f"{name}.at", value.at, (target, *rest), writes=target)
    return run


class Device:
    id, compute_capability = 0, "90"

    def __init__(self, number=0):
        assert number == 0

    def use(self):
        pass


# ---------------------------------------------------------------------------------------------- kernels


class CompileException(Exception):
    pass


FLAGS = "-O2 -fPIC -shared -std=c++17 -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE -w".split()
ENTRIES = """
#define SIMULATED_KERNEL(name) {simulated::Entry<&name>::run, simulated::Entry<&name>::parameters},
static const struct { void (*run)(void **); int (*parameters)(int *); } simulated_kernels[] = {KERNELS{}};
}
extern "C" const char *simulated_launch(int i, void **args, const unsigned *grid, unsigned block) {
    return simulated::run(simulated_kernels[i].run, args, grid, block);
}
extern "C" int simulated_parameters(int i, int *out) { return simulated_kernels[i].parameters(out); }
"""
MOST_THREADS = 256  # of a block: what the kernels are compiled for


class RawModule:
    """CUDA code, compiled with g++ when the first kernel is asked for; kept in a temporary folder for the next time."""

    def __init__(self, *, code, options=()):
        self.code, self.defines = code, [o for o in options if o.startswith("-D")]
        self.kernels = re.findall(r"__global__ (?:__launch_bounds__\(\d+\) )?void (\w+)\(", code)

    @functools.cached_property
    def library(self):
        code = re.sub(r'extern\s+"C"(?=\s+__global__)', "", self.code)  # a kernel may have the name of a C function
        source = (f"{HEADER.read_text()}\nnamespace {{\n#line 1 \"kernels\"\n{code}\n"
                  + ENTRIES.replace("KERNELS", " ".join(f"SIMULATED_KERNEL({name}) " for name in self.kernels)))
        key = hashlib.sha256(repr((source, FLAGS, self.defines)).encode()).hexdigest()[:32]
        folder = Path(tempfile.gettempdir()) / f"simulated_gpu_{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{key}.so"
        if not path.exists():
            fresh = folder / f"{key}.{os.getpid()}"
            done = subprocess.run(["g++", *FLAGS, *self.defines, "-xc++", "-", "-o", str(fresh)], input=source,
                                  capture_output=True, text=True)
            if done.returncode:
                raise CompileException(done.stderr)
            os.replace(fresh, path)  # at once: other processes may be at it too
        library = ctypes.PyDLL(str(path))
        library.simulated_launch.restype = ctypes.c_char_p
        return library

    def get_function(self, name):
        return Kernel(name, self.library, self.kernels.index(name))


class Kernel:
    """function(grid, block, args)"""

    def __init__(self, name, library, index):
        self.name, self.library, self.index = name, library, index
        out = (ctypes.c_int * 4 * 256)()
        count = library.simulated_parameters(index, out)
        self.parameters = [(chr(kind), size, chr(to), to_size) for kind, size, to, to_size in out[:count]]

    def pack(self, number, arg, kind, size, to, to_size):
        """(the bytes of an argument, the allocation that it points into)"""
        def check(ok, message):
            if not ok:
                raise TypeError(f"kernel {self.name}, argument {number}: {message}")

        if kind == "p":
            if arg is None:
                return bytes(8), None
            check(isinstance(arg, ndarray), f"an array of the device or None, not {type(arg).__name__}")
            if to in "if" and arg.itemsize > 1:
                same = arg.itemsize == to_size and (to_size == 2 or (arg.dtype.kind == "f") == (to == "f"))
                check(same, f"points to {dict(f='float', i='int')[to]}{8 * to_size}, not {arg.dtype}")
            return arg.data.ptr.to_bytes(8, "little"), arg.memory
        check(isinstance(arg, np.generic) or isinstance(arg, np.ndarray) and arg.size == 1,
              f"a number or a structure of NumPy, not {type(arg).__name__}")
        given = {"f": "f", "V": "s"}.get(arg.dtype.kind, "i")
        check(arg.nbytes == size and given == kind, f"{size} bytes of kind {kind!r}, not {arg.dtype}")
        return arg.tobytes(), None

    def __call__(self, grid, block, args):
        x, y, threads = *(*grid, 1)[:2], *block
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < threads <= MOST_THREADS):
            raise CUDARuntimeError(f"CUDA_ERROR_INVALID_VALUE: kernel {self.name} on grid {grid}, block {block}")
        if len(args) != len(self.parameters):
            raise TypeError(f"kernel {self.name} takes {len(self.parameters)} arguments, not {len(args)}")
        packed = [self.pack(i, arg, *p) for i, (arg, p) in enumerate(zip(args, self.parameters))]
        storage = [ctypes.create_string_buffer(data, max(16, len(data))) for data, _ in packed]
        pointers = (ctypes.c_void_p * len(storage))(*map(ctypes.addressof, storage))

        def run(keep=storage):
            wrong = self.library.simulated_launch(self.index, pointers, (ctypes.c_uint * 2)(x, y), threads)
            if wrong:
                raise CUDARuntimeError(f"cudaErrorLaunchFailure: kernel {self.name}: {wrong.decode()}")

        submit(self.name, run, [memory for _, memory in packed if memory is not None])


# ---------------------------------------------------------------------------------------------- the module cudnn


class cudnnGraphNotSupportedError(RuntimeError):
    pass


data_type = enum.Enum("data_type", "FLOAT DOUBLE BFLOAT16")
heur_mode = enum.Enum("heur_mode", "A FALLBACK")
numerical_note = enum.Enum("numerical_note", "TENSOR_CORE DOWN_CONVERT_INPUTS NONDETERMINISTIC WINOGRAD "
                           "REDUCED_PRECISION_REDUCTION")
STORED = {data_type.FLOAT: "float32", data_type.DOUBLE: "float64", data_type.BFLOAT16: "bfloat16"}
TF32 = {numerical_note.TENSOR_CORE, numerical_note.DOWN_CONVERT_INPUTS}


class Handle:
    stream = null_stream


def set_stream(handle, stream):
    handle.stream = Stream.living[stream]


def to_tf32(x):
    """float32 numbers with 10 bits of mantissa, rounded to nearest even"""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + (bits >> 13 & 1)) >> 13 << 13
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def convolve(kind, a, b, shape, stride, padding):
    """fprop(image, weight), dgrad(loss, weight) or wgrad(loss, image), as an array of this shape."""
    image, weight, loss = {"fprop": (a.shape, b.shape, shape), "dgrad": (shape, b.shape, a.shape),
                           "wgrad": (b.shape, shape, a.shape)}[kind]
    N, C, H, W = image
    (R, S), (P, Q), (sh, sw), (ph, pw) = weight[2:], loss[2:], stride, padding
    x = np.zeros((N, C, H + 2 * ph, W + 2 * pw), a.dtype)
    if kind != "dgrad":
        x[:, :, ph:ph + H, pw:pw + W] = a if kind == "fprop" else b
    out = x if kind == "dgrad" else np.zeros(shape, a.dtype)
    for r, s in np.ndindex(R, S):
        window = np.s_[:, :, r:r + (P - 1) * sh + 1:sh, s:s + (Q - 1) * sw + 1:sw]
        if kind == "fprop":
            out += np.tensordot(x[window], b[:, :, r, s], (1, 1)).transpose(0, 3, 1, 2)  # (N, P, Q, K) -> (N, K, P, Q)
        elif kind == "dgrad":
            out[window] += np.tensordot(a, b[:, :, r, s], (1, 0)).transpose(0, 3, 1, 2)  # (N, P, Q, C) -> (N, C, P, Q)
        else:
            out[:, :, r, s] = np.tensordot(a, x[window], ((0, 2, 3), (0, 2, 3)))  # (K, C)
    return out[:, :, ph:ph + H, pw:pw + W] if kind == "dgrad" else out


class Tensor:
    """A tensor of a graph; the setters return it."""

    def __init__(self, name, dim=None, stride=None, data_type=None):
        self.name, self.dim, self.stride, self.data_type, self.is_output = name, dim, stride, data_type, False

    def set_output(self, value): self.is_output = value; return self  # noqa: E702
    def set_dim(self, value): self.dim = value; return self  # noqa: E702
    def set_stride(self, value): self.stride = value; return self  # noqa: E702
    def set_data_type(self, value): self.data_type = value; return self  # noqa: E702

    def view(self, ptr):
        """(a NumPy view of the tensor at an address, its allocation, the address behind it)"""
        dtype = np.dtype(STORED[self.data_type])
        if ptr % 16:
            raise RuntimeError(f"tensor {self.name!r}: address {ptr:#x} is not a multiple of 16")
        extent = (sum((n - 1) * s for n, s in zip(self.dim, self.stride)) + 1) * dtype.itemsize
        memory = need(ptr, extent, f"cudnn tensor {self.name!r}")
        strides = [s * dtype.itemsize for s in self.stride]
        view = np.ndarray(self.dim, dtype, memory.raw, ptr - memory.ptr + memory.offset, strides)
        return view, memory, ptr + extent


class pygraph:
    """A convolution. Of its three plans the first cannot be built; in float32 the second computes in TF32."""

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        self.compute = STORED[compute_data_type]
        self.planned, self.notes, self.built = False, set(), set()

    def tensor(self, name, dim, stride, data_type):
        return Tensor(name, dim, stride, data_type)

    def convolution(self, kind, a, b, padding, stride, dilation):
        assert dilation == [1, 1]
        self.kind, self.tensors, self.padding, self.stride = kind, (a, b, Tensor(kind)), padding, stride
        return self.tensors[2]

    def conv_fprop(self, image, weight, **options):
        return self.convolution("fprop", image, weight, **options)

    def conv_dgrad(self, loss, filter, **options):
        return self.convolution("dgrad", loss, filter, **options)

    def conv_wgrad(self, image, loss, **options):
        return self.convolution("wgrad", loss, image, **options)

    def validate(self):
        a, b, out = self.tensors
        if not (out.is_output and out.dim and out.stride and a.data_type == b.data_type == out.data_type):
            raise cudnnGraphNotSupportedError(f"{self.kind}: no engine for the output, or for these types")
        x, w, y = {"fprop": (a, b, out), "dgrad": (out, b, a), "wgrad": (b, out, a)}[self.kind]
        size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.dim[2:], self.padding, w.dim[2:], self.stride)]
        if x.dim[1] != w.dim[1] or y.dim != [x.dim[0], w.dim[0], *size]:
            raise cudnnGraphNotSupportedError(f"{self.kind}: image {x.dim}, filter {w.dim} and output {y.dim} do not "
                                              f"fit, stride {self.stride}, padding {self.padding}")

    def build_operation_graph(self):
        pass

    def create_execution_plans(self, modes):
        self.planned = True

    def deselect_numeric_notes(self, notes):
        self.notes.update(notes)

    def tf32(self, index):
        return index == 1 and self.tensors[0].data_type == data_type.FLOAT

    def get_execution_plan_count(self):
        return 3 if self.planned else 0

    def build_plan_at_index(self, index):
        if index == 0 or self.tf32(index) and self.notes & TF32:
            raise cudnnGraphNotSupportedError(f"plan {index} is not supported")
        self.built.add(index)

    def get_workspace_size_plan_at_index(self, index):
        return 128 * (index + 1)

    def execute_plan_at_index(self, variant_pack, workspace, index, handle):
        if index not in self.built:
            raise RuntimeError(f"cudnn plan {index} is executed but was not built")
        if set(self.tensors) != set(variant_pack):
            raise RuntimeError(f"cudnn: the graph has tensors {[t.name for t in self.tensors]}, "
                               f"the variant pack {[t.name for t in variant_pack]}")
        size = self.get_workspace_size_plan_at_index(index)
        scratch = need(workspace, size, "cudnn workspace")
        views, used, areas = [], [scratch], [(workspace, workspace + size, "workspace", True)]
        for tensor in self.tensors:
            view, memory, end = tensor.view(variant_pack[tensor])
            views.append(view)
            used.append(memory)
            areas.append((variant_pack[tensor], end, tensor.name, tensor.is_output))
        for (low, high, name, written), (low2, high2, name2, written2) in itertools.combinations(areas, 2):
            if (written or written2) and low < high2 and low2 < high:
                raise RuntimeError(f"cudnn: {name!r} and {name2!r} overlap in memory, and one of them is written")
        workspace = scratch.raw[workspace - scratch.ptr + scratch.offset:][:size]

        def run():
            a, b = (x.astype(self.compute) for x in views[:2])
            if self.tf32(index):
                a, b = to_tf32(a), to_tf32(b)
            workspace[...] = 0xFF
            with np.errstate(all="ignore"):
                views[2][...] = convolve(self.kind, a, b, views[2].shape, self.stride, self.padding)

        submit(f"cudnn {self.kind}", run, used, handle.stream)


# ---------------------------------------------------------------------------------------------- the fakes as modules

modules = {}  # the modules, once made
replaced = {}  # what was in sys.modules in their place


def make_modules():
    def module(name, **content):
        modules[name] = types.ModuleType(name)
        modules[name].__path__ = []
        vars(modules[name]).update(content)
        return modules[name]

    runtime = module("cupy.cuda.runtime", getDeviceCount=lambda: 1, memGetInfo=lambda: (60 << 30, 80 << 30),
                     runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13000,
                     getDeviceProperties=lambda device: {"name": b"simulated GPU", "uuid": bytes(16), "pciBusID": 0})
    nccl = module("cupy.cuda.nccl", available=True)
    cuda = module("cupy.cuda", runtime=runtime, nccl=nccl, Stream=Stream, Event=Event, Device=Device, Memory=Memory,
                  MemoryPool=MemoryPool, MemoryPointer=MemoryPointer, using_allocator=using_allocator,
                  get_current_stream=get_current_stream, get_elapsed_time=get_elapsed_time)
    module("cupy", __version__="14.2.0", ndarray=ndarray, asarray=asarray, empty=allocate, cuda=cuda,
           array=functools.partial(asarray, copy=True), ascontiguousarray=ascontiguousarray, RawModule=RawModule,
           get_default_memory_pool=lambda: default_pool, **{name: function(name) for name in FUNCTIONS})
    module("cudnn", __version__="1.28.0", backend_version=lambda: 91300, data_type=data_type, heur_mode=heur_mode,
           numerical_note=numerical_note, create_handle=Handle, set_stream=set_stream, pygraph=pygraph)
    module("cuda", pathfinder=module("cuda.pathfinder", load_nvidia_dynamic_lib=lambda name: None))


def install():
    """Put the fakes in sys.modules; returns cupy."""
    if not modules:
        make_modules()
    if sys.modules.get("cupy") is not modules["cupy"]:
        real = importlib.util.find_spec("cuda") is not None
        for name, module in modules.items():
            if not (real and name.split(".")[0] == "cuda"):
                replaced[name] = sys.modules.get(name)
                sys.modules[name] = module
        import engines.gpu

        engines.gpu.nodes = lambda graph: len(graph.recorded)  # it would ask the driver
    return modules["cupy"]


def uninstall():
    """Put back what install() replaced, and the default stream."""
    entered[1:], allocators[1:] = [], []
    null_stream.use()
    for name, before in replaced.items():
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before
    replaced.clear()
