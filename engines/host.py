"""What the CPU's engine works with: the cores, one pool of threads, BLAS kept to one thread, and memory used again.

Images are (N, C, H, W) to the user; their memory is ordered (H, C, W, N), like PyTorch's channels_last by strides
alone, with a border of zeros kept around it.

Nothing here lasts: the number of BLAS threads and NumPy's buffer size are what they were once a function has returned.
"""

import collections
import contextlib
import contextvars
import functools
import math
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from threadpoolctl import ThreadpoolController

BUFFER = 512  # NumPy copies operands with rows shorter than its buffer (8,192 entries) into it: 3 times as slow
WORTH = 4e7  # multiplications from which two threads are faster than one, for Python lets only one call NumPy at a time

# ---------------------------------------------------------------------------------------------- threads

# What users choose the number of threads of BLAS by
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@functools.cache
def cores():
    """How many threads to use: as many as BLAS was allowed to, by itself one for each core. A BLAS that does not tell
    (Apple's) was allowed what THREADS say.
    """
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    if libraries:
        return max(library.num_threads for library in libraries)
    allowed = [int(text) for text in map(os.environ.get, THREADS) if text and text.isdecimal() and int(text)]
    return min(allowed, default=available())


def available():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def pool():
    """Threads for all cores but the calling thread's."""
    return ThreadPoolExecutor(max(1, cores() - 1), thread_name_prefix="engine")


class OneBlasThread:
    """A context in which BLAS uses one thread; the last one to leave, of all threads, restores what was before.

    BLAS's own threads go on spinning for a while after each product and would take the cores from ours.
    """

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, []

    @functools.cached_property
    def libraries(self):
        """[(function that gets, function that sets the number of threads)] of each BLAS"""
        cores()  # as it was before anything is limited
        # threadpoolctl lets only the thread that was first set the number; here the last to leave does
        return [(library.get_num_threads, getattr(library, "_real_set_num_threads", library.set_num_threads))
                for library in ThreadpoolController().select(user_api="blas").lib_controllers]

    def __enter__(self):
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = [(set_threads, get()) for get, set_threads in self.libraries]
                for set_threads, number in self.before:
                    if number > 1:
                        set_threads(1)

    def __exit__(self, *exception):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                for set_threads, number in self.before:
                    if number > 1:
                        set_threads(number)


one_blas_thread = OneBlasThread()
measuring = threading.Lock()  # held while one thread measures for all of the process


def after_fork():
    """In a forked process: the threads of its parent are not there, and locks may be held for good."""
    global measuring
    measuring = threading.Lock()
    pool.cache_clear()
    one_blas_thread.lock, one_blas_thread.inside = threading.Lock(), 0
    Buffer.LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


def parallel(work, count, cost):
    """[work(first, last)] of as many parts of range(count) as there are cores, of one if the cost is small.

    Where sums are over parts, rounding depends on the number of threads, and on nothing else. BLAS has one thread
    meanwhile, and NumPy a small buffer.
    """
    parts = max(min(cores(), count), 1) if cost >= WORTH else 1
    edges = [count * i // parts for i in range(parts + 1)]
    with one_blas_thread:
        before, others = np.setbufsize(BUFFER), []
        try:  # the context holds NumPy's buffer size and how it treats overflow
            others = [pool().submit(contextvars.copy_context().run, work, *edge) for edge in zip(edges[1:], edges[2:])]
            results = [work(edges[0], edges[1])]
        finally:
            np.setbufsize(before)
            wait(others)  # whatever happened: nothing may write into memory that is used again
    return results + [other.result() for other in others]


def each(work, items):
    """[work(item) for item in items], each by whichever core is free next; BLAS has one thread meanwhile."""
    results, turns = [None] * len(items), iter(range(len(items)))  # of a range, next() is one step for all threads

    def worker():
        try:
            for i in turns:
                results[i] = work(items[i])
        finally:
            collections.deque(turns, 0)  # after an error nobody begins another one

    with one_blas_thread:
        others = [pool().submit(contextvars.copy_context().run, worker) for _ in range(min(cores(), len(items)) - 1)]
        try:
            worker()
        finally:
            wait(others)
    for other in others:
        other.result()
    return results


# ---------------------------------------------------------------------------------------------- memory


class Buffer(np.ndarray):
    """Memory of an array that goes back to a store when the last view of it is gone.

    Fresh memory costs a page fault every 4 KiB, together as much as a pass over the array; a training step
    asks for the same sizes again and again. halo: the width of the border of zeros around the interior.
    """

    STORED = collections.OrderedDict()  # key: [memory], the key that was used last at the end
    LOCK = threading.RLock()  # an array may be collected within its own thread's turn
    SPARE = 2**27, 0.1  # used and stored memory are at most so many bytes, or this part, more than was used at once
    used = most = stored = 0  # bytes
    key, halo = None, 0

    def __del__(self):
        if self.key is not None:
            store = type(self)  # the module's names are gone when Python ends
            with store.LOCK:
                store.used -= self.nbytes
                store.stored += self.nbytes
                store.STORED.setdefault(self.key, []).append(self.base)

    @classmethod
    def take(cls, key, nbytes):
        """Memory from the store, or None; then what was not used for longest leaves the store to make room."""
        with cls.LOCK:
            cls.used += nbytes
            cls.most = max(cls.most, cls.used)
            if key in cls.STORED:
                memory = cls.STORED[key].pop()
                cls.stored -= nbytes
                if cls.STORED[key]:
                    cls.STORED.move_to_end(key)
                else:
                    del cls.STORED[key]
                return memory
            while cls.STORED and cls.used + cls.stored > cls.most + max(cls.SPARE[0], cls.SPARE[1] * cls.most):
                oldest = next(iter(cls.STORED))
                cls.stored -= len(cls.STORED[oldest].pop())
                if not cls.STORED[oldest]:
                    del cls.STORED[oldest]


def scratch(shape, dtype, halo=0):
    """An array of this shape with undefined contents; with a halo, (H, C, W, N) inside a border of zeros."""
    H, *rest = shape
    if halo:
        C, W, N = rest
        shape = H + 2 * halo, C, W + 2 * halo, N
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    key = (shape, np.dtype(dtype), halo) if halo else nbytes
    memory = Buffer.take(key, nbytes)
    if memory is None and hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # pages of 2 MiB, where the system has them
            memory.madvise(mmap.MADV_HUGEPAGE)
    elif memory is None:
        memory = mmap.mmap(-1, max(nbytes, 1))
    buffer = Buffer(shape, dtype, memory)
    buffer.key, buffer.halo = key, halo
    return np.asarray(buffer)  # a plain array whose base is the buffer; it is the base of all its views


# ---------------------------------------------------------------------------------------------- images


def empty(shape, dtype, halo=1):
    """Images (N, C, H, W) in this memory order with undefined contents inside a border of zeros."""
    N, C, H, W = shape
    full = scratch((H, C, W, N), dtype, halo)
    return images(full[halo : halo + H, :, halo : halo + W])


def rows(x):
    """(N, C, H, W) -> (H, C, W, N), a view"""
    return x.transpose(2, 1, 3, 0)


def images(x):
    """(H, C, W, N) -> (N, C, H, W), a view"""
    return x.transpose(3, 1, 0, 2)


def bordered(x, top, bottom, left, right):
    """(N, C, H, W) as (top + H + bottom, C, left + W + right, N) with zeros around it, negative sizes cutting off.

    A view where x lies in a wide enough border of zeros, else a copy. Rows of a channel are contiguous, and a row's
    stride is that of C channels.
    """
    x = rows(x)
    H, C, W, N = x.shape
    full, need = x.base, max(top, bottom, left, right)
    line = N * x.itemsize  # bytes of a pixel of all images
    if need <= 0 and x.strides == (C * x.strides[1], x.strides[1], line, x.itemsize) and (
            x.strides[1] > 0 and x.strides[1] % line == 0):
        return x[-top : H + bottom, :, -left : W + right]
    if full is not None and isinstance(full.base, Buffer) and need <= full.base.halo:
        halo = full.base.halo
        inner = full[halo : halo + H, :, halo : halo + W]
        if inner.__array_interface__ == x.__array_interface__ and full.shape == (H + 2 * halo, C, W + 2 * halo, N):
            return full[halo - top : halo + H + bottom, :, halo - left : halo + W + right]
    out = scratch((top + H + bottom, C, left + W + right, N), x.dtype)
    for edge in (out[:max(top, 0)], out[top + H :], out[:, :, :max(left, 0)], out[:, :, left + W :]):
        edge[...] = 0
    source = x[max(-top, 0) : H + min(bottom, 0), :, max(-left, 0) : W + min(right, 0)]
    target = out[max(top, 0) :, :, max(left, 0) :][: len(source), :, : source.shape[2]]
    parallel(lambda first, last: np.copyto(target[first:last], source[first:last]), len(source), 40 * source.size)
    return out
