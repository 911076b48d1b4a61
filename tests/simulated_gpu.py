"""A GPU made of NumPy and g++: modules `cupy` and `cudnn` that run the project's GPU code on any machine.

    gpu = simulated_gpu.install()    # from now on `import cupy`, `import cudnn` and `import cuda.pathfinder` give these
    ...
    simulated_gpu.check_guards()     # raises if anything was written behind the end of an allocation
    simulated_gpu.uninstall()

Only what the project uses is here, and it is stricter than the hardware. Fresh memory is NaN, and so is the shared
memory of a block. Blocks and threads run in an odd order. A kernel's arguments are checked against its signature, every
pointer against the live allocations, and a barrier that not all threads of a block reach is an error. While a stream
captures nothing runs; a graph that is launched runs what was captured, on the same memory, which must still be there.
`launches` lists what was run: kernels, "cudnn conv_fprop", "ufunc add", "function where", "copy to host", "graph" ...

It has no streams that run beside each other, and no time: only results can be tested with it.
"""

import bisect
import collections
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
import threading
import time
import types
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np

try:
    import ml_dtypes  # noqa: F401  (NumPy then knows "bfloat16")
except ImportError:
    pass

HEADER = Path(__file__).with_name("simulated_gpu.h")
launches = []  # what ran, in order; empty it with launches.clear()


def available():
    """None, or why the simulated GPU cannot be used."""
    return None if shutil.which("g++") else "the simulated GPU needs g++"


# ---------------------------------------------------------------------------------------------- memory

GUARD = np.full(64, 0x3C, np.uint8)  # behind each allocation; 0.01 in float32, so that adding to it changes it
ALIGNMENT = 512
MISSING = "cudaErrorIllegalAddress: an illegal memory access was encountered"

registry_lock = threading.RLock()
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
        self.raw[self.offset + size:][:GUARD.size] = GUARD
        with registry_lock:
            purge()
            bisect.insort(starts, self.ptr)
            memories[self.ptr] = weakref.ref(self)

    def guarded(self):
        return (self.raw[self.offset + self.size:][:GUARD.size] == GUARD).all()

    def __del__(self):
        if not sys.is_finalizing():
            if not self.guarded():
                overwritten.append(self.size)
            dead.append(self.ptr)  # the registry may be in use further up the stack: only note it


def purge():
    while dead:
        ptr = dead.popleft()
        del starts[bisect.bisect_left(starts, ptr)], memories[ptr]


def find(ptr):
    """The live allocation that holds address ptr, or None."""
    with registry_lock:
        purge()
        i = bisect.bisect_right(starts, ptr) - 1
        memory = memories[starts[i]]() if i >= 0 else None
    return memory if memory is not None and ptr < memory.ptr + memory.size else None


def need(ptr, size, what):
    """The live allocation that holds size bytes at ptr; raises if there is none."""
    memory = find(ptr)
    if memory is None:
        raise CUDARuntimeError(f"{MISSING}: {what} at {ptr:#x} is in no live allocation")
    if ptr + size > memory.ptr + memory.size:
        raise CUDARuntimeError(f"{MISSING}: {what} needs {size} bytes, {memory.ptr + memory.size - ptr} are allocated")
    return memory


def check_guards():
    """Raise if anything was written behind the end of an allocation, living or freed (reported once)."""
    with registry_lock:
        purge()
        living = [memory for ref in memories.values() if (memory := ref()) is not None]
    broken = overwritten[:] + [memory.size for memory in living if not memory.guarded()]
    overwritten.clear()
    for memory in living:
        memory.raw[memory.offset + memory.size:][:GUARD.size] = GUARD
    if broken:
        raise RuntimeError(f"written behind the end of allocations of {broken} bytes")


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
        if capturing() is not None and self is not default_pool:
            self.kept.append(pointer.mem)
        return pointer

    def total_bytes(self):
        return sum(-(-memory.size // ALIGNMENT) * ALIGNMENT for memory in self.living)

    def free_all_blocks(self, stream=None):
        pass


class MemoryPointer:
    """What `array.data` is."""

    def __init__(self, mem, offset):
        self.mem, self.ptr = mem, mem.ptr + offset


class Local(threading.local):
    """Of a thread: the current stream, the streams entered with `with`, and the pools, the innermost last."""

    def __init__(self):
        self.stream, self.streams, self.pools = null_stream, [null_stream], []


default_pool = MemoryPool()


@contextmanager
def using_allocator(allocator=None):
    local.pools.append(allocator or default_pool.malloc)
    try:
        yield
    finally:
        local.pools.pop()


def allocate(shape, dtype, strides=None):
    """A device array of NaN (all bits are ones)."""
    dtype = np.dtype(dtype)
    shape = (operator.index(shape),) if not isinstance(shape, (tuple, list)) else tuple(map(operator.index, shape))
    malloc = local.pools[-1] if local.pools else default_pool.malloc
    memory = malloc(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize).mem
    return wrap(np.ndarray(shape, dtype, memory.raw, memory.offset, strides), memory, None)


def allocate_like(host, dtype=None):
    """allocate() with the shape of a NumPy array and its order of axes, if that is dense."""
    dtype = np.dtype(dtype or host.dtype)
    return allocate(host.shape, dtype, np.empty_like(host, dtype, subok=False).strides)


# ---------------------------------------------------------------------------------------------- streams and graphs


class CUDARuntimeError(RuntimeError):
    pass


class Stream:
    """Runs everything at once, in the order of the calls, except between begin_capture() and end_capture()."""

    counter = itertools.count(1 << 12, 16)
    living = weakref.WeakValueDictionary()

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr, self.recorded = 0 if null else next(self.counter), None
        self.living[self.ptr] = self

    def __enter__(self):
        local.streams.append(self)
        local.stream = self
        return self

    def __exit__(self, *error):
        local.streams.pop()
        local.stream = local.streams[-1]  # which use() did not change

    def use(self):
        local.stream = self
        return self

    def synchronize(self):
        refuse_capture("a wait for the stream", self)

    def is_capturing(self):
        return self.recorded is not None

    def begin_capture(self, mode=None):
        if self.ptr == 0:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: the default stream cannot be captured")
        if self.recorded is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is being captured already")
        self.recorded = []

    def end_capture(self):
        if self.recorded is None:
            raise CUDARuntimeError("cudaErrorIllegalState: no capture was begun")
        graph, self.recorded = Graph(self.recorded), None
        return graph


class Graph:
    """What was captured: `names` of the operations in order."""

    def __init__(self, recorded):
        self.recorded, self.names = recorded, [name for name, _, _ in recorded]

    def launch(self, stream=None):
        if (stream or get_current_stream()).recorded is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: a graph is launched while its stream captures")
        for name, _, used in self.recorded:
            if any(memory() is None for memory in used):
                raise RuntimeError(f"the graph uses memory that was freed after the capture, in {name!r}: hold the "
                                   "array, or capture with an allocator of your own (using_allocator)")
        launches.append("graph")
        for _, run, _ in self.recorded:
            run()


class Event:
    def __init__(self):
        self.time = None

    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        refuse_capture("a wait for an event")


def get_elapsed_time(start, end):
    """Milliseconds between two recorded events."""
    if start.time is None or end.time is None:
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle: an event was not recorded")
    return (end.time - start.time) * 1e3


null_stream = Stream.null = Stream(null=True)
local = Local()


def get_current_stream():
    return local.stream


def capturing(stream=None):
    """The list to which operations on the stream go while it captures, else None."""
    return (stream or get_current_stream()).recorded


def refuse_capture(what, stream=None, error=CUDARuntimeError):
    if capturing(stream) is not None:
        raise error(f"cudaErrorStreamCaptureUnsupported: {what} is not permitted while the stream is capturing")


def submit(name, run, used, stream=None):
    """Run an operation that works on the allocations `used`, or record it if the stream captures."""
    recorded = capturing(stream)
    if recorded is None:
        launches.append(name)
        run()
    else:
        recorded.append((name, run, [weakref.ref(memory) for memory in used]))


# ---------------------------------------------------------------------------------------------- arrays

MATRIX_PRODUCTS = {"matmul", "dot", "vdot", "inner", "einsum", "tensordot", "kron"}  # cuBLAS
SHAPE_FROM_DATA = {"nonzero", "flatnonzero", "argwhere", "unique", "extract", "compress", "delete", "bincount"}
WRITES_FIRST = {"copyto", "put", "putmask", "place", "fill_diagonal", "put_along_axis"}
# The public names of NumPy that CuPy 14.2 has not.
ABSENT = set("""
    ScalarType asmatrix block bmat busday_count busday_offset busdaycalendar bytes_ char character clongdouble
    complex256 core ctypeslib datetime64 datetime_as_string datetime_data dtypes einsum_path emath errstate f2py
    flexible float128 frompyfunc fromregex geomspace get_include getbufsize geterr geterrcall histogram_bin_edges info
    insert is_busday isnat little_endian longdouble ma matrix matvec memmap nanpercentile nanquantile ndenumerate
    nditer nested_iters object_ polyder polydiv polyint rec recarray record sctypeDict setbufsize seterr seterrcall
    show_runtime spacing str_ strings test timedelta64 typecodes unstack vecdot vecmat void""".split())


def number(x):
    """Does an operation take x beside device arrays, as a number?"""
    return isinstance(x, (bool, int, float, complex, np.generic)) or isinstance(x, np.ndarray) and x.ndim == 0


def walk(tree, visit):
    """The tree of tuples, lists and dicts with its leaves replaced by visit(leaf)."""
    if type(tree) in (tuple, list):
        return type(tree)([walk(x, visit) for x in tree])
    if type(tree) is dict:
        return {k: walk(x, visit) for k, x in tree.items()}
    return visit(tree)


def call(name, function, args, kwargs=None, writes=()):
    """function(*args, **kwargs), a function of NumPy, on device arrays; it changes the device arrays `writes`."""
    arrays, short = [], name.split()[-1]

    def collect(x):
        if isinstance(x, np.ndarray) and x.ndim:
            raise TypeError(f"Unsupported type {type(x)}")
        if isinstance(x, ndarray):
            arrays.append(x)

    tree = (tuple(args), kwargs or {})
    walk(tree, collect)
    out = (kwargs or {}).get("out")
    writes = [w for w in (*writes, *(out if isinstance(out, tuple) else (out,))) if w is not None]
    if short in MATRIX_PRODUCTS:
        refuse_capture(short, error=NotImplementedError)
    if short in SHAPE_FROM_DATA or short == "where" and len(args) == 1:
        refuse_capture(f"{short}, whose shape depends on data,")

    def plain(values):
        return walk(tree, lambda x: values[id(x)] if isinstance(x, ndarray) else x)

    def compute(args, kwargs):
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    values = {id(a): a.host for a in arrays}
    recorded = capturing()
    if recorded is None:
        tried, result = values, compute(*plain(values))
    else:  # only to see what comes out: not into the arrays that are written
        tried = values | {id(w): w.host.copy() for w in writes}
        try:
            result = compute(*plain(tried))
        except IndexError:  # indices are not known yet
            zeros = {id(a): np.zeros_like(a.host) for a in arrays
                     if a.dtype.kind in "iu" and not any(a is w for w in writes)}
            result = compute(*plain(tried | zeros))
    owners = {id(tried[id(a)]): a for a in reversed(arrays)}
    fresh = []

    def place(x):
        """A device array for a result: what it was before, a view, or a new one."""
        if id(x) in owners:
            return owners[id(x)]
        if not isinstance(x, (np.ndarray, np.generic)):
            return x
        x = np.asarray(x)
        memory = find(x.ctypes.data) if x.size else None
        if memory is not None:
            source = next((a for a in arrays if a.memory is memory), None)
            return wrap(x, memory, None if source is None else source if source.base is None else source.base)
        target = allocate_like(x)
        fresh.append((target.host, x))
        created.append(target.memory)
        return target

    created = []
    placed = walk(tuple(result) if isinstance(result, tuple) else result, place)
    if not fresh and not writes:
        return placed
    if recorded is None:
        launches.append(name)
        for target, x in fresh:
            target[...] = x
        return placed
    targets, inputs = [target for target, _ in fresh], plain(values)

    def run():  # holds the arrays of NumPy, not those of the device: these may be freed
        again = compute(*inputs)
        again = [x for x in (again if isinstance(again, (tuple, list)) else [again])
                 if isinstance(x, (np.ndarray, np.generic)) and not any(x is v for v in values.values())
                 and find(np.asarray(x).ctypes.data) is None]
        for target, x in zip(targets, again, strict=True) if targets else ():
            target[...] = x

    submit(name, run, [*(a.memory for a in arrays), *created])
    return placed


def wrap(host, memory, base):
    """The device array with the memory of a NumPy array."""
    array = object.__new__(ndarray)
    array.host, array.memory, array.base = host, memory, base
    return array


def is_basic(index):
    return all(isinstance(i, (int, np.integer, slice, type(None), type(Ellipsis))) and not isinstance(i, bool)
               for i in (index if isinstance(index, tuple) else (index,)))


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """cupy.ndarray. It is no numpy.ndarray, as in CuPy: one in its stead anywhere is an error.

    host: a NumPy array on the same memory. memory: the allocation. base: the array of which it is a view, or None.
    """

    __slots__ = ("host", "memory", "base", "__weakref__")
    __hash__ = None

    def __new__(cls, shape, dtype=float, memptr=None, strides=None, order="C"):
        if memptr is None:
            return allocate(shape, dtype, strides or np.empty(shape, dtype, order).strides)
        dense = np.empty(shape, dtype, order)
        memory = need(memptr.ptr, dense.nbytes if strides is None else 0, "an array")
        raw, offset = memory.raw[:memory.offset + memory.size], memptr.ptr - memory.ptr + memory.offset
        return wrap(np.ndarray(shape, dtype, raw, offset, strides or dense.strides), memory, None)

    # Metadata and views.
    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    nbytes = property(lambda self: self.host.nbytes)
    itemsize = property(lambda self: self.host.itemsize)
    flags = property(lambda self: self.host.flags)
    T = property(lambda self: self.transpose())
    data = property(lambda self: MemoryPointer(self.memory, self.ptr - self.memory.ptr))
    ptr = property(lambda self: self.host.ctypes.data)

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    # To the host and from it.
    def get(self, stream=None, order="C"):
        stream = stream or get_current_stream()
        refuse_capture("a copy to the host", stream)
        launches.append("copy to host")
        if not self.flags.c_contiguous:
            with stream:  # as CuPy does, to put the array in order first
                pass
        return self.host.copy(order)

    def set(self, array, stream=None):
        refuse_capture("a copy to the device", stream)
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"set() of {array.dtype} {array.shape} in an array of {self.dtype} {self.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        launches.append("copy to device")
        self.host[...] = array

    def item(self, *index):
        return self.get().item(*index)

    def __bool__(self): return bool(self.get())
    def __int__(self): return int(self.get())
    def __float__(self): return float(self.get())
    def __repr__(self): return repr(self.get())
    def __str__(self): return str(self.get())
    def __format__(self, spec): return format(self.get()[()], spec)

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy "
                        "array explicitly.")

    # Computing.
    def __array_ufunc__(self, ufunc, method, *args, **kwargs):
        if ufunc.__name__ in ABSENT:
            return NotImplemented
        out = kwargs.get("out", ())
        if any(not isinstance(x, ndarray) for x in out):
            raise TypeError("the result of an operation with a device array goes to a device array")
        for x in args[:1] + args[2:] if method == "at" else args if method == "__call__" else args[:1]:
            if not isinstance(x, ndarray) and not number(x):
                raise TypeError(f"Unsupported type {type(x)}")
        name = f"ufunc {ufunc.__name__}"
        return call(name if method == "__call__" else f"{name}.{method}", getattr(ufunc, method), args, kwargs,
                    args[:1] if method == "at" else ())

    def __array_function__(self, function, types, args, kwargs):
        mine = getattr(modules["cupy"], function.__name__, None)
        return NotImplemented if mine is None else mine(*args, **kwargs)

    def __getitem__(self, index):
        if is_basic(index):  # a view, also where NumPy gives a number
            index = index if isinstance(index, tuple) else (index,)
            index = index if Ellipsis in index else (*index, Ellipsis)
        elif any(isinstance(i, ndarray) and i.dtype == bool for i in (index if isinstance(index, tuple) else (index,))):
            refuse_capture("an index by a mask")
        return call("getitem", operator.getitem, (self, index))

    def __setitem__(self, index, value):
        if not isinstance(value, ndarray) and not number(value):
            raise TypeError(f"Unsupported type {type(value)}")
        call("setitem", operator.setitem, (self, index, value), writes=[self])

    def astype(self, dtype, order="K", casting="unsafe", subok=None, copy=True):
        return call("function astype", np.ndarray.astype, (self, np.dtype(dtype), order, casting, False, copy))


def check_keywords(name, given):
    """Raise for what NumPy's reductions and take() accept and CuPy's do not."""
    if name in READING and (wrong := {"where", "initial", "mode"} & given.keys()):
        raise TypeError(f"{name}() got an unexpected keyword argument {min(wrong)!r}")


def method(name):
    def run(self, *args, **kwargs):
        check_keywords(name, kwargs)
        writes = [self] if name in WRITING else ()
        return call(f"function {name}", getattr(np.ndarray, name), (self, *args), kwargs, writes)

    run.__name__ = name
    return run


READING = """all any argmax argmin argpartition argsort choose clip compress conj conjugate copy cumprod cumsum diagonal
    dot flatten max mean min nonzero prod ravel repeat reshape round searchsorted squeeze std sum swapaxes take trace
    transpose var view""".split()
WRITING = "fill partition put sort".split()
for _name in READING + WRITING:
    setattr(ndarray, _name, method(_name))


class Ufunc:
    """A ufunc of NumPy on device arrays and numbers."""

    def __init__(self, ufunc):
        self.ufunc, self.name, self.__name__ = ufunc, f"cupy_{ufunc.__name__}", ufunc.__name__
        self.nin, self.nout, self.nargs, self.types = ufunc.nin, ufunc.nout, ufunc.nargs, ufunc.types

    def apply(self, method, *args, **kwargs):
        if kwargs.get("out") is None:
            kwargs.pop("out", None)
        elif not isinstance(kwargs["out"], tuple):
            kwargs["out"] = (kwargs["out"],)
        args, out = (args[:self.nin], args[self.nin:]) if method == "__call__" else (args, ())
        if out:
            kwargs["out"] = out
        return ndarray.__array_ufunc__(None, self.ufunc, method, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        return self.apply("__call__", *args, **kwargs)

    def __getattr__(self, name):
        if name not in ("at", "reduce", "accumulate", "reduceat", "outer"):
            raise AttributeError(f"a ufunc of CuPy has no attribute {name!r}")
        return functools.partial(self.apply, name)


# ---------------------------------------------------------------------------------------------- the module cupy


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, blocking=False):
    """A device array of a host array (a copy), a number, a list, or another device array."""
    if isinstance(obj, ndarray):
        out = obj.astype(dtype or obj.dtype, order=order or "K", copy=bool(copy))
        return out[(None,) * max(0, ndmin - out.ndim)] if ndmin > out.ndim else out
    refuse_capture("a copy to the device")
    host = np.array(obj, dtype, order=order or "K", ndmin=ndmin, subok=False)
    if host.dtype.kind not in "biufcV":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    out = allocate_like(host)
    out.host[...] = host
    launches.append("copy to device")
    return out


def asarray(a, dtype=None, order=None, blocking=False):
    return array(a, dtype, copy=False, order=order)


def ascontiguousarray(a, dtype=None):
    return array(a, dtype, copy=False, order="C", ndmin=1)


def empty(shape, dtype=float, order="C"):
    return allocate(shape, dtype, np.empty(shape, dtype, order).strides)


def empty_like(prototype, dtype=None):
    if not isinstance(prototype, ndarray):
        raise TypeError(f"Unsupported type {type(prototype)}")
    return allocate_like(prototype.host, dtype)


def from_numpy(name):
    """What `cupy.name` is where this file does not say: NumPy's, on device arrays."""
    value = None if name in ABSENT or name.startswith("__") else getattr(np, name, types)
    if name != "newaxis" and (value is None or isinstance(value, types.ModuleType)):
        raise AttributeError(f"module 'cupy' has no attribute {name!r}")
    if isinstance(value, np.ufunc):
        return Ufunc(value)
    if isinstance(value, type) or not callable(value):
        return value

    def function(*args, **kwargs):
        check_keywords(name, kwargs)
        out = call(f"function {name}", value, args, kwargs, args[:1] if name in WRITES_FIRST else ())
        return array(out) if type(out) is bool and name in ("allclose", "array_equal", "array_equiv") else out

    function.__name__ = name
    return function


class Device:
    id = 0

    def __init__(self, device=None):
        if device not in (None, 0):
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

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
extern "C" const char *simulated_launch(int i, void **args, const unsigned *grid, const unsigned *block) {
    return simulated::run(simulated_kernels[i].run, args, grid, block);
}
extern "C" int simulated_parameters(int i, int *out) { return simulated_kernels[i].parameters(out); }
"""


def compiler(*arguments, source):
    done = subprocess.run(["g++", *arguments], input=source, capture_output=True, text=True)
    if done.returncode:
        raise CompileException(done.stderr)
    return done.stdout


def signatures(code, defines):
    """{kernel: (names of its parameters, most threads of a block)} of CUDA code, after the preprocessor."""
    text = compiler("-E", "-P", "-xc++", *defines, "-", source=code)
    found = {}
    bounds = r"__launch_bounds__\s*\(([^)]*)\)"
    for kernel in re.finditer(rf"__global__((?:[^(){{}};]|{bounds})*?)\b(\w+)\s*\(([^()]*)\)\s*\{{", text):
        before, _, name, parameters = kernel.groups()
        bound = re.search(r"__launch_bounds__\s*\(\s*(\d+)", before)
        parameters = [re.findall(r"\w+", p)[-1] for p in parameters.split(",") if p.strip() not in ("", "void")]
        found[name] = parameters, int(bound[1]) if bound else 1024
    return found


class RawModule:
    """CUDA code, compiled with g++ when the first kernel is asked for; kept in a temporary folder for the next time."""

    def __init__(self, *, code, options=(), backend="nvrtc", **other):
        self.code, self.defines = code, ["-DSIMULATED", *(o for o in options if o.startswith("-D"))]

    @functools.cached_property
    def library(self):
        if "extern __shared__" in self.code:
            raise CompileException("the simulated GPU has no shared memory of dynamic size")
        self.kernels = signatures(self.code, self.defines)
        code = re.sub(r'extern\s+"C"(?=\s+__global__)', "", self.code)  # a kernel may have the name of a C function
        source = (f"{HEADER.read_text()}\nnamespace {{\n#line 1 \"kernels\"\n{code}\n"
                  + ENTRIES.replace("KERNELS", " ".join(f"SIMULATED_KERNEL({name}) " for name in self.kernels)))
        key = hashlib.sha256(repr((source, FLAGS, self.defines)).encode()).hexdigest()[:32]
        folder = Path(tempfile.gettempdir()) / f"simulated_gpu_{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{key}.so"
        if not path.exists():
            fresh = folder / f"{key}.{os.getpid()}.{threading.get_ident()}"
            compiler(*FLAGS, *self.defines, "-xc++", "-", "-o", str(fresh), source=source)
            os.replace(fresh, path)  # at once: other processes may be at it too
        library = ctypes.PyDLL(str(path))  # holds Python's lock: the state of a launch is global
        library.simulated_launch.restype = ctypes.c_char_p
        return library

    def get_function(self, name):
        library = self.library
        if name not in self.kernels:
            raise CUDARuntimeError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
        return Kernel(name, library, list(self.kernels).index(name), *self.kernels[name])


class Kernel:
    """function(grid, block, args)"""

    def __init__(self, name, library, index, parameters, most_threads):
        self.name, self.library, self.index, self.max_threads_per_block = name, library, index, most_threads
        out = (ctypes.c_int * 4 * 256)()
        count = library.simulated_parameters(index, out)
        self.parameters = [(p, chr(kind), size, chr(to), to_size)
                           for p, (kind, size, to, to_size) in zip(parameters, out[:count], strict=True)]

    def check(self, ok, parameter, message):
        if not ok:
            raise TypeError(f"kernel {self.name}, argument {parameter!r}: {message}")

    def pack(self, arg, parameter, kind, size, to, to_size):
        """(the bytes of an argument, the allocation that it points into)"""
        if kind == "p":
            if arg is None:
                return bytes(8), None
            if isinstance(arg, (int, np.integer)):
                return int(arg).to_bytes(8, "little"), need(int(arg), 0, f"{self.name}({parameter})")
            self.check(isinstance(arg, ndarray), parameter, f"an array of the device or None, not {type(arg).__name__}")
            if to in "if" and arg.itemsize > 1:
                same = arg.itemsize == to_size and (to_size == 2 or (arg.dtype.kind == "f") == (to == "f"))
                self.check(same, parameter, f"points to {dict(f='float', i='int')[to]}{8 * to_size}, not {arg.dtype}")
            return arg.ptr.to_bytes(8, "little"), arg.memory
        self.check(not isinstance(arg, ndarray) and arg is not None, parameter, "a value, not a pointer")
        if isinstance(arg, bool):
            arg = np.bool_(arg)
        elif isinstance(arg, int):
            arg = np.int64(arg)
        elif isinstance(arg, float):
            arg = np.float64(arg)
        self.check(isinstance(arg, np.generic) or isinstance(arg, np.ndarray) and arg.size == 1, parameter,
                   f"a number or a structure of NumPy, not {type(arg).__name__}")
        self.check(arg.nbytes == size, parameter, f"{size} bytes, not the {arg.nbytes} of {arg.dtype}")
        given = {"f": "f", "V": "s"}.get(arg.dtype.kind, "i")
        self.check(given == kind or size == 2, parameter,
                   f"{dict(f='a floating-point number', i='an integer', s='a structure')[kind]}, not {arg.dtype}")
        return arg.tobytes(), None

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None, **other):
        grid, block = ([operator.index(n) for n in (*size, 1, 1)[:3]] for size in (grid, block))
        threads = block[0] * block[1] * block[2]
        if not (0 < grid[0] < 2**31 and 0 < grid[1] < 2**16 and 0 < grid[2] < 2**16 and 0 < threads):
            raise CUDARuntimeError(f"CUDA_ERROR_INVALID_VALUE: kernel {self.name} on grid {grid}, block {block}")
        if threads > self.max_threads_per_block:
            raise CUDARuntimeError(f"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: kernel {self.name} takes blocks of "
                                   f"{self.max_threads_per_block} threads, not {block}")
        if len(args) != len(self.parameters):
            raise TypeError(f"kernel {self.name} takes {len(self.parameters)} arguments, not {len(args)}")
        packed = [self.pack(arg, *p) for arg, p in zip(args, self.parameters)]
        storage = [ctypes.create_string_buffer(data, max(16, len(data))) for data, _ in packed]
        pointers = (ctypes.c_void_p * max(1, len(storage)))(*map(ctypes.addressof, storage))
        sizes = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)

        def run(keep=storage):
            wrong = self.library.simulated_launch(self.index, pointers, *sizes)
            if wrong:
                raise CUDARuntimeError(f"cudaErrorLaunchFailure: kernel {self.name}: {wrong.decode()}")

        submit(self.name, run, [memory for _, memory in packed if memory is not None], stream)


# ---------------------------------------------------------------------------------------------- the module cudnn


class cudnnGraphNotSupportedError(RuntimeError):
    pass


data_type = enum.Enum("data_type", "FLOAT DOUBLE HALF BFLOAT16 INT8 INT32 UINT8 INT64 BOOLEAN NOT_SET")
heur_mode = enum.Enum("heur_mode", "A B FALLBACK OPENSOURCE")
numerical_note = enum.Enum("numerical_note", "TENSOR_CORE DOWN_CONVERT_INPUTS REDUCED_PRECISION_REDUCTION FFT "
                           "NONDETERMINISTIC WINOGRAD WINOGRAD_TILE_4x4 WINOGRAD_TILE_6x6 WINOGRAD_TILE_13x13 "
                           "STRICT_NAN_PROP")
STORED = {data_type.FLOAT: np.float32, data_type.DOUBLE: np.float64,
          data_type.BFLOAT16: np.uint16}  # bfloat16 as its bits
TF32 = {numerical_note.TENSOR_CORE, numerical_note.DOWN_CONVERT_INPUTS}


class Handle:
    def __init__(self):
        self.stream, self.valid = null_stream, True


def set_stream(handle, stream):
    if stream not in Stream.living:
        raise RuntimeError(f"set_stream: {stream!r} is the pointer of no living stream")
    handle.stream = Stream.living[stream]


def destroy_handle(handle):
    handle.valid = False


def round_bits(bits, drop):
    """float32 numbers, given as their bits, without the lowest `drop` bits, rounded to nearest even."""
    return (bits + ((1 << drop - 1) - 1 + (bits >> drop & 1)).astype(np.uint32)) >> drop << drop


def to_bfloat16(x):
    """The bits of float32 numbers rounded to bfloat16."""
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), 0x7FC0, round_bits(bits, 16) >> 16).astype(np.uint16)


def to_tf32(x):
    return np.where(np.isfinite(x), round_bits(x.view(np.uint32), 13).view(np.float32), x)


def convolve(kind, a, b, shape, stride, padding):
    """conv_fprop(image, weight), conv_dgrad(loss, weight) or conv_wgrad(image, loss), as an array of this shape."""
    image, weight = (shape, b.shape) if kind == "conv_dgrad" else (a.shape, shape if kind == "conv_wgrad" else b.shape)
    N, C, H, W = image
    loss = shape if kind == "conv_fprop" else a.shape if kind == "conv_dgrad" else b.shape
    (R, S), (P, Q), (sh, sw), (ph, pw) = weight[2:], loss[2:], stride, padding
    x = np.zeros((N, C, H + 2 * ph, W + 2 * pw), a.dtype)
    if kind != "conv_dgrad":
        x[:, :, ph:ph + H, pw:pw + W] = a
    out = np.zeros(shape if kind != "conv_dgrad" else x.shape, a.dtype)
    for r, s in np.ndindex(R, S):
        window = np.s_[:, :, r:r + (P - 1) * sh + 1:sh, s:s + (Q - 1) * sw + 1:sw]
        if kind == "conv_fprop":
            out += np.tensordot(x[window], b[:, :, r, s], (1, 1)).transpose(0, 3, 1, 2)  # (N, P, Q, K) -> (N, K, P, Q)
        elif kind == "conv_dgrad":
            out[window] += np.tensordot(a, b[:, :, r, s], (1, 0)).transpose(0, 3, 1, 2)  # (N, P, Q, C) -> (N, C, P, Q)
        else:
            out[:, :, r, s] = np.tensordot(b, x[window], ((0, 2, 3), (0, 2, 3)))  # (K, C)
    return out[:, :, ph:ph + H, pw:pw + W] if kind == "conv_dgrad" else out


class Tensor:
    """A tensor of a graph; the setters return it."""

    def __init__(self, name, dim, stride, dtype, is_output=None):
        self.name, self.dim, self.stride, self.data_type, self.is_output = name, dim, stride, dtype, is_output

    def set_output(self, value): self.is_output = bool(value); return self  # noqa: E702
    def set_dim(self, value): self.dim = [int(n) for n in value]; return self  # noqa: E702
    def set_stride(self, value): self.stride = [int(n) for n in value]; return self  # noqa: E702
    def set_data_type(self, value): self.data_type = value; return self  # noqa: E702

    def extent(self):
        """Bytes from the first entry to the end of the last."""
        return (sum((n - 1) * s for n, s in zip(self.dim, self.stride)) + 1) * np.dtype(STORED[self.data_type]).itemsize

    def view(self, ptr):
        """(a NumPy view of the tensor at an address, its allocation)"""
        dtype = np.dtype(STORED[self.data_type])
        if type(ptr) is not int:
            raise TypeError(f"tensor {self.name!r}: an address, not {type(ptr).__name__}")
        if ptr % 16:
            raise RuntimeError(f"tensor {self.name!r}: address {ptr:#x} is not a multiple of 16")
        memory = need(ptr, self.extent(), f"cudnn tensor {self.name!r}")
        strides = [s * dtype.itemsize for s in self.stride]
        return np.ndarray(self.dim, dtype, memory.raw, ptr - memory.ptr + memory.offset, strides), memory


class pygraph:
    """A graph of convolutions. Of its three plans the first cannot be built; in float32 the second computes in TF32."""

    def __init__(self, name="", io_data_type=None, intermediate_data_type=None, compute_data_type=None, handle=None,
                 device_property=None, **other):
        self.handle, self.io, self.compute = handle, io_data_type, compute_data_type or io_data_type
        self.operations, self.stage, self.notes, self.built = [], "new", set(), set()

    def tensor(self, dim, stride=None, data_type=None, name="", **other):
        dim = [int(n) for n in dim]
        row_major = [int(np.prod(dim[i + 1:])) for i in range(len(dim))]
        return Tensor(name, dim, [int(n) for n in stride] if stride else row_major, data_type or self.io)

    def convolution(self, kind, a, b, padding, stride, dilation):
        if any(d != 1 for d in dilation):
            raise cudnnGraphNotSupportedError("the simulated cuDNN has no dilation")
        out = Tensor(kind, None, None, self.io, is_output=False)
        self.operations.append((kind, a, b, out, tuple(stride), tuple(padding)))
        return out

    def conv_fprop(self, image, weight, padding=(0, 0), stride=(1, 1), dilation=(1, 1), name="", **other):
        return self.convolution("conv_fprop", image, weight, padding, stride, dilation)

    def conv_dgrad(self, loss, filter, padding=(0, 0), stride=(1, 1), dilation=(1, 1), name="", **other):
        return self.convolution("conv_dgrad", loss, filter, padding, stride, dilation)

    def conv_wgrad(self, image, loss, padding=(0, 0), stride=(1, 1), dilation=(1, 1), name="", **other):
        return self.convolution("conv_wgrad", image, loss, padding, stride, dilation)

    def after(self, stage, *before):
        if self.stage not in before:
            raise RuntimeError(f"cudnn graph: {stage} comes after {' or '.join(before)}, not after {self.stage!r}")
        self.stage = stage

    def validate(self):
        if self.stage != "new":
            raise RuntimeError("cudnn graph: validated twice")
        for kind, a, b, out, stride, padding in self.operations:
            for tensor in (a, b):
                if tensor.is_output is not None:
                    raise cudnnGraphNotSupportedError("the simulated cuDNN has no chains of operations")
            if not out.is_output:
                raise cudnnGraphNotSupportedError(f"{kind}: no engine (set_output(True) is missing)")
            if out.dim is None and kind == "conv_fprop":
                size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(a.dim[2:], padding, b.dim[2:], stride)]
                out.dim = [a.dim[0], b.dim[0], *size]
            if out.dim is None or out.stride is None:
                raise cudnnGraphNotSupportedError(f"{kind}: its output needs set_dim and set_stride")
            for tensor in (a, b, out):
                if not len(tensor.dim) == len(tensor.stride) == 4 or min(*tensor.dim, *tensor.stride) < 1:
                    raise cudnnGraphNotSupportedError(f"{kind}: dim {tensor.dim}, stride {tensor.stride}")
                if tensor.data_type not in STORED:
                    raise cudnnGraphNotSupportedError(f"{kind}: data type {tensor.data_type}")
            if a.data_type != b.data_type:
                raise cudnnGraphNotSupportedError(f"{kind}: inputs of {a.data_type} and {b.data_type}")
            if self.compute not in (data_type.FLOAT, data_type.DOUBLE):
                raise cudnnGraphNotSupportedError(f"{kind}: the type to compute in is {self.compute}")
            x, w, y = {"conv_fprop": (a, b, out), "conv_dgrad": (out, b, a), "conv_wgrad": (a, out, b)}[kind]
            size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.dim[2:], padding, w.dim[2:], stride)]
            if x.dim[1] != w.dim[1] or y.dim != [x.dim[0], w.dim[0], *size]:
                raise cudnnGraphNotSupportedError(f"{kind}: image {x.dim}, filter {w.dim} and output {y.dim} do "
                                                  f"not fit, stride {stride}, padding {padding}")
        self.stage = "validate"

    def build_operation_graph(self):
        self.after("build_operation_graph", "validate")

    def create_execution_plans(self, modes):
        if not modes or not all(isinstance(mode, heur_mode) for mode in modes):
            raise TypeError("create_execution_plans takes a list of heur_mode")
        self.after("create_execution_plans", "build_operation_graph")

    def deselect_numeric_notes(self, notes):
        if not all(isinstance(note, numerical_note) for note in notes):
            raise TypeError("deselect_numeric_notes takes a list of numerical_note")
        self.notes.update(notes)
        return self

    def tf32(self, index):
        return index == 1 and any(a.data_type == data_type.FLOAT for _, a, _, _, _, _ in self.operations)

    def get_execution_plan_count(self):
        return 3 if self.stage == "create_execution_plans" else 0

    def check_index(self, index):
        if not 0 <= index < self.get_execution_plan_count():
            raise IndexError(f"plan {index} of {self.get_execution_plan_count()}")

    def build_plan_at_index(self, index):
        self.check_index(index)
        if index == 0 or self.tf32(index) and self.notes & TF32:
            raise cudnnGraphNotSupportedError(f"plan {index} is not supported")
        self.built.add(index)
        return self

    def get_workspace_size_plan_at_index(self, index):
        self.check_index(index)
        return 128 * (index + 1)

    def execute_plan_at_index(self, variant_pack, workspace, index, handle=None):
        handle = handle or self.handle
        if index not in self.built:
            raise RuntimeError(f"cudnn plan {index} is executed but was not built")
        if handle is None or not handle.valid:
            raise RuntimeError("cudnn: no handle, or one that was destroyed")
        if not workspace:
            raise RuntimeError("cudnn: the workspace is a null pointer")
        size = self.get_workspace_size_plan_at_index(index)
        scratch = need(workspace, size, "cudnn workspace")
        tensors = [t for _, a, b, out, _, _ in self.operations for t in (a, b, out)]
        if set(tensors) != set(variant_pack):
            raise RuntimeError(f"cudnn: the graph has tensors {[t.name for t in tensors]}, "
                               f"the variant pack {[t.name for t in variant_pack]}")
        views, used = {}, [scratch]
        areas = [(workspace, workspace + size, "workspace", True)]
        for tensor in dict.fromkeys(tensors):
            views[tensor], memory = tensor.view(variant_pack[tensor])
            areas.append((variant_pack[tensor], variant_pack[tensor] + tensor.extent(), tensor.name, tensor.is_output))
            used.append(memory)
        for (low, high, name, written), (low2, high2, name2, written2) in itertools.combinations(areas, 2):
            if (written or written2) and low < high2 and low2 < high:
                raise RuntimeError(f"cudnn: {name!r} and {name2!r} overlap in memory, and one of them is written")
        for operation in self.operations:
            run = functools.partial(self.run, operation, [views[t] for t in operation[1:4]], self.tf32(index),
                                    scratch.raw[workspace - scratch.ptr + scratch.offset:][:size])
            submit(f"cudnn {operation[0]}", run, used, handle.stream)

    def run(self, operation, views, tf32, workspace):
        kind, a, b, out, stride, padding = operation
        compute = np.float64 if data_type.DOUBLE in (self.compute, a.data_type) else np.float32
        inputs = []
        for tensor, x in zip((a, b), views):
            x = (x.astype(np.uint32) << 16).view(np.float32) if tensor.data_type == data_type.BFLOAT16 else np.array(x)
            inputs.append((to_tf32(x) if tf32 else x).astype(compute))
        workspace[...] = 0xFF
        with np.errstate(all="ignore"):
            y = convolve(kind, *inputs, tuple(out.dim), stride, padding)
            views[2][...] = to_bfloat16(y.astype(np.float32)) if out.data_type == data_type.BFLOAT16 else y


# ---------------------------------------------------------------------------------------------- the fakes as modules

modules = {}  # the modules, once made
replaced = {}  # what was in sys.modules in their place


def make_modules():
    def module(name, **content):
        modules[name] = types.ModuleType(name)
        modules[name].__path__ = []
        vars(modules[name]).update(content)
        return modules[name]

    runtime = module("cupy.cuda.runtime", CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: 1,
                     memGetInfo=lambda: (60 << 30, 80 << 30), runtimeGetVersion=lambda: 13000,
                     getDeviceProperties=lambda device: {"name": b"simulated GPU"})
    cuda = module("cupy.cuda", runtime=runtime, is_available=lambda: True, Stream=Stream, Event=Event, Device=Device,
                  Memory=Memory, MemoryPool=MemoryPool, MemoryPointer=MemoryPointer, using_allocator=using_allocator,
                  get_current_stream=get_current_stream, get_elapsed_time=get_elapsed_time)
    module("cupy", __version__="14.2.0", ndarray=ndarray, array=array, asarray=asarray, empty=empty, cuda=cuda,
           ascontiguousarray=ascontiguousarray, empty_like=empty_like, RawModule=RawModule,
           get_default_memory_pool=lambda: default_pool, __getattr__=from_numpy)
    module("cudnn", __version__="1.28.0", backend_version=lambda: 91300, data_type=data_type, heur_mode=heur_mode,
           numerical_note=numerical_note, create_handle=Handle, destroy_handle=destroy_handle, set_stream=set_stream,
           pygraph=pygraph)
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
    return modules["cupy"]


def uninstall():
    """Put back what install() replaced, and the default stream."""
    local.__init__()
    for name, before in replaced.items():
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before
    replaced.clear()
