"""Convolution and BatchNorm of images on the CPU, in NumPy, at the speed of a tuned library.

Images are (N, C, H, W) to the user; their memory is ordered (H, C, W, N), like PyTorch's channels_last by strides
alone, with a border of zeros kept around it. Then, with no copy at all,
- "rows": rows y .. y+k of one horizontal shift are a (k C, W N) matrix whatever k, since the strides of a row and of
  a channel line up. A k x k convolution is k matrix products an output row, one for each shift; the weight gradient
  is the product of the same matrices; the input gradient is the same convolution of the output gradient.
- "tiles", for 3 x 3 kernels with many channels: Winograd's F(4x4, 3x3) (Lavin and Gray 2016, arXiv 1509.09308) needs
  36 products of (O, C) matrices for 16 outputs instead of 144. Its transforms are matrix products as well.
A stride only changes the strides of the views.

Milliseconds on two cores at batch 128, before and after. Tiles instead of rows: 58 -> 26 forward at 64 channels of
32 x 32, at 16 nothing. BLAS threads stopped: 40 -> 26. Products small enough to need no packing: 7 -> 5.5 (18
channels), their weight gradient 11 -> 5. Strides without copies: 43 -> 30. Weight gradient by threads over the 36
products instead of over images: 66 -> 26 (512 channels). NumPy's buffer (below): BatchNorm of small images 3 times as
fast. Memory used again and freed during the backward pass: a step 1,800 -> 1,530 (width 64). Nothing: larger blocks of
tiles, threads for small images, BatchNorm by channels.
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
from numpy.lib.stride_tricks import as_strided
from threadpoolctl import ThreadpoolController

# ---------------------------------------------------------------------------------------------- threads and memory

BUFFER = 512  # NumPy copies operands with rows shorter than its buffer (8,192 entries) into it: 3 times as slow
WORTH = 4e7  # multiplications from which two threads are faster than one, for Python lets only one call NumPy at a time


@functools.cache
def threads():
    """(how many threads to use, a pool of all but the calling one); from then on BLAS itself uses one.

    As many as BLAS was allowed (OPENBLAS_NUM_THREADS). Its own threads go on spinning for a while after each product
    and would take the cores from ours.
    """
    blas = ThreadpoolController().select(user_api="blas")
    count = max([library["num_threads"] for library in blas.info()], default=os.cpu_count())
    blas.limit(limits=1)
    return count, ThreadPoolExecutor(max(1, count - 1), thread_name_prefix="conv")


def parallel(work, count, cost):
    """[work(first, last)] of as many parts of range(count) as there are threads, of one if the cost is small.

    Where sums are over parts, rounding depends on the number of threads, and on nothing else.
    """
    workers, pool = threads()
    parts = min(workers, count) if cost >= WORTH else 1
    edges = [count * i // parts for i in range(parts + 1)]
    before, others = np.setbufsize(BUFFER), []
    try:  # the context holds NumPy's buffer size and how it treats overflow
        others = [pool.submit(contextvars.copy_context().run, work, *edge) for edge in zip(edges[1:], edges[2:])]
        results = [work(edges[0], edges[1])]
    finally:
        np.setbufsize(before)
        wait(others)  # whatever happened: nothing may write into memory that is used again
    return results + [other.result() for other in others]


def copy(source, target):
    """target[...] = source, shared among threads; returns target."""
    parallel(lambda first, last: np.copyto(target[first:last], source[first:last]), len(source), 40 * source.size)
    return target


class Buffer(np.ndarray):
    """Memory of an array that goes back to a store when the last view of it is gone.

    Fresh memory costs a page fault every 4 KiB, together as much as a pass over the array; a training step
    asks for the same sizes again and again. halo: the width of the border of zeros around the interior.
    """

    STORED = collections.OrderedDict()  # key: [memory], the key that was used last at the end
    LOCK = threading.RLock()  # an array may be collected within its own thread's turn
    SPARE = 0.5  # used and stored memory together are at most this much more than was ever used at once
    used = most = stored = 0  # bytes
    key, halo = None, 0

    def __del__(self):
        if self.key is not None:
            with self.LOCK:
                Buffer.used -= self.nbytes
                Buffer.stored += self.nbytes
                self.STORED.setdefault(self.key, []).append(self.base)

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
            while cls.STORED and cls.used + cls.stored > (1 + cls.SPARE) * cls.most:
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


def empty(shape, dtype, halo=1):
    """An array (N, C, H, W) in the engine's order with undefined contents inside a border of zeros."""
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
    if need <= 0 and x.strides == (C * x.strides[1], x.strides[1], N * x.itemsize, x.itemsize):
        return x[-top : H + bottom, :, -left : W + right]
    if full is not None and isinstance(full.base, Buffer) and need <= full.base.halo:
        halo = full.base.halo
        inner = full[halo : halo + H, :, halo : halo + W]
        if inner.__array_interface__ == x.__array_interface__ and full.shape == (H + 2 * halo, C, W + 2 * halo, N):
            return full[halo - top : halo + H + bottom, :, halo - left : halo + W + right]
    out = scratch((top + H + bottom, C, left + W + right, N), x.dtype)
    for edge in (out[:max(top, 0)], out[top + H :], out[:, :, :max(left, 0)], out[:, :, left + W :]):
        edge[...] = 0
    inner = x[max(-top, 0) : H + min(bottom, 0), :, max(-left, 0) : W + min(right, 0)]
    copy(inner, out[max(top, 0) :, :, max(left, 0) :][: len(inner), :, : inner.shape[2]])
    return out


# ---------------------------------------------------------------------------------------------- rows

SMALL = 10**6  # OpenBLAS multiplies matrices of up to this many products without packing them: twice as fast if narrow
BLOCK = 2**18  # entries worked on at a time, so that they stay in a core's second-level cache


def pieces(products, W, stride):
    """Into how many pieces to cut rows of W columns: so that `products` a row become SMALL ones, single columns where
    every stride-th one counts.
    """
    small = (cut for cut in range(1, W + 1) if W % cut == 0 and products <= SMALL * cut)
    return W if stride > 1 else next(small, 1)


def matrices(x, row, column, k, size, cut, stride=1):
    """Rows y .. y + k of x (H', C, W', N) for y = row, row + stride, ..., every stride-th column from `column` on, as
    matrices (k C, W / cut N): a view (H, cut, k C, W N / cut), size = H, W.
    """
    (H, W), (_, C, _, N), (h, c, w, e) = size, x.shape, x.strides
    assert (k == 1 or h == C * c) and (stride == 1 or cut == W), "rows of channels, or columns, do not line up"
    return as_strided(x[row:, :, column:], (H, cut, k * C, W // cut * N), (stride * h, W // cut * stride * w, c, e))


def add_products(pairs, out):
    """out (H, cut, O, n) = sum over pairs of a (O, K) @ b (H, cut, K, n), a block of rows at a time."""
    H = len(out)
    block = max(1, BLOCK // out[0].size)

    def work(first, last):
        product = scratch((block, *out.shape[1:]), out.dtype)
        for y in range(first, last, block):
            part = slice(y, min(y + block, last))
            (a, b), *more = pairs
            np.matmul(a, b[part], out=out[part])
            for a, b in more:
                out[part] += np.matmul(a, b[part], out=product[: part.stop - y])

    parallel(work, H, np.sum([a.size for a, _ in pairs]) * out[:, :, 0].size)


def rows_forward(x, w, stride, padding, y):
    """x (N, C, H, W), w (O, C, kh, kw) -> y (N, O, H', W'): for each column of the kernel one product with all rows"""
    (O, C, kh, kw), size, N = w.shape, y.shape[2:], len(x)
    cut = pieces(O * C * kh * size[1] * N, size[1], stride)
    x = bordered(x, padding, padding, padding, padding)
    add_products([(w[..., i].transpose(0, 2, 1).reshape(O, -1),  # (O, C, kh) -> (O, kh C)
                   matrices(x, 0, i, kh, size, cut, stride)) for i in range(kw)], matrices(rows(y), 0, 0, 1, size, cut))


def rows_weight_gradient(g, x, stride, padding, dw):
    """g (N, O, H', W'), x (N, C, H, W) -> dw (O, C, kh, kw)"""
    (O, C, kh, kw), size, N = dw.shape, g.shape[2:], len(x)
    cut = pieces(O * C * kh * size[1] * N, size[1], stride)
    x, g = bordered(x, padding, padding, padding, padding), bordered(g, 0, 0, 0, 0)
    a = matrices(g, 0, 0, 1, size, cut)  # (H', cut, O, n)
    block = max(1, BLOCK // a[0].size)
    for i in range(kw):
        b = matrices(x, 0, i, kh, size, cut, stride).swapaxes(2, 3)  # (H', cut, n, kh C)

        def work(first, last):
            return np.sum([np.matmul(a[y : min(y + block, last)], b[y : min(y + block, last)]).sum((0, 1))
                           for y in range(first, last, block)], axis=0)

        total = np.sum(parallel(work, len(a), dw[..., i].size * a[:, :, 0].size), axis=0)
        dw[..., i] = total.reshape(O, kh, C).transpose(0, 2, 1)  # (O, kh C) -> (O, C, kh)


def rows_input_gradient(g, w, stride, padding, dx):
    """g (N, O, H', W'), w (O, C, kh, kw) -> dx (N, C, H, W)

    Every stride-th row and column of dx is a convolution without stride, of g with every stride-th row and column of
    the kernel in reverse order.
    """
    C, kernel, N = w.shape[1], w.shape[2:], len(g)
    if stride > np.min(kernel):  # some meet no entry of the kernel
        parallel(lambda first, last: rows(dx)[first:last].fill(0), dx.shape[2], 40 * dx.size)

    def axis(phase, k, size, size_out):
        """(first row of dx, how many, zeros before and after g's rows) for kernel rows phase, phase + stride, ..."""
        skip = max(0, -(-(padding - phase) // stride))  # rows that lie in the padding
        first = skip * stride + phase - padding
        count = len(range(first, size, stride))
        return first, count, len(range(phase, k, stride)) - 1 - skip, skip + count - size_out

    for top, left in np.ndindex(*np.minimum(kernel, stride)):
        part = w[:, :, top::stride, left::stride][:, :, ::-1, ::-1]
        (i, H, *vertical), (j, W, *horizontal) = (
            axis(*a) for a in zip((top, left), kernel, dx.shape[2:], g.shape[2:]))
        if H < 1 or W < 1:
            continue
        source = bordered(g, *vertical, *horizontal)
        cut = pieces(part[..., 0].size * W * N, W, stride)
        out = rows(dx)[i::stride, :, j::stride]
        h, c, v, e = out.strides
        add_products([(part[..., q].transpose(1, 2, 0).reshape(C, -1),  # (O, C, k) -> (C, k O)
                       matrices(source, 0, q, part.shape[2], (H, W), cut)) for q in range(part.shape[3])],
                     as_strided(out, (H, cut, C, W // cut * N), (h, W // cut * v, c, e)))


# ---------------------------------------------------------------------------------------------- tiles


def winograd(m, r, points):
    """A (n, m), G (n, r), B (n, n), n = m + r - 1, with  sum_k d[i+k] w[k] = (A^T ((G w) * (B^T d)))[i].

    A and G evaluate polynomials at n - 1 points and infinity, B^T is the transposed inverse of such an evaluation
    (Toom-Cook multiplication, transposed).
    """
    def evaluate(k):
        return np.array([[p**j for j in range(k)] for p in points] + [[0] * (k - 1) + [1]], np.float64)

    return evaluate(m), evaluate(r), np.linalg.inv(evaluate(m + r - 1))  # B^T = (V^-1)^T


A, G, B = winograd(4, 3, (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2))  # rounding errors 2.2 times smaller than of 0, 1, -1, 2, -2
G2 = np.kron(G, G)  # (36, 9)
TILES_FROM = 24  # channels on both sides from which the transforms are cheaper than the products they save


def kernels_to_tiles(w, turned=False):
    """G w G^T: (O, C, 3, 3) -> (6, 6, O, C); with w turned by 180 degrees if asked for."""
    U, w9 = scratch((36, w.shape[0] * w.shape[1]), w.dtype), w.reshape(-1, 9).T  # (9, O C)
    G_ = (G2[:, ::-1] if turned else G2).astype(w.dtype)
    parallel(lambda first, last: np.matmul(G_[first:last], w9, out=U[first:last]), 36, 324 * U.shape[1])
    return U.reshape(6, 6, *w.shape[:2])


def kernels_from_tiles(U, w):
    """w = G^T U G: (6, 6, O, C) or (36, O, C) -> (O, C, 3, 3)"""
    w, U, GT = w.reshape(-1, 9), U.reshape(36, -1), G2.T.astype(w.dtype)

    def work(first, last):
        w[first:last] = (GT @ U[:, first:last]).T  # (9, O C) -> (O C, 9)

    parallel(work, len(w), 324 * len(w))


def tiled(x, size, t, count, parts=1):
    """Blocks of `count` tiles side by side, every fourth row and column one, each of t rows and columns of x
    (H', C, W', N): a view (strip of columns, row, part of the images, C, t, columns, N / parts); size: of the output.
    """
    (H, W), (h, c, v, e), n = size, x.strides, x.shape[3] // parts
    return as_strided(x, (W // (4 * count), H // 4, parts, x.shape[1], t, 4 * (count - 1) + t, n),
                      (4 * count * v, 4 * h, n * e, c, h, v, e))


def transform(T, V):
    """The function that takes d (C, t, columns, N), as `tiled` gives it, and writes T d T^T into V (6, 6, C, tile, N).

    T (6, t) is B^T for the six rows and columns that a tile of four outputs needs, A for four rows and columns.
    """
    _, _, C, count, n = V.shape
    t = T.shape[1]
    half = scratch((C, 6, 4 * (count - 1) + t, n), V.dtype)
    c, i, v, e = half.strides
    flat, columns = half.reshape(C, 6, -1), as_strided(half, (6, C, count, t, n), (i, c, 4 * v, v, e))
    target = V.transpose(0, 2, 3, 1, 4)  # (6, C, tile, 6, N)

    def apply(d):
        np.matmul(T, d.reshape(C, t, -1), out=flat)
        np.matmul(T, columns, out=target)

    return apply


def tiles_forward(x, U, padding, y):
    """x (N, C, H, W), U = G w G^T (6, 6, O, C) -> y (N, O, H', W'): A^T [sum over c of U (B^T x B)] A for each tile

    A few tiles at a time, so that all stays in the cache, from top to bottom, where neighbours share two input rows.
    """
    (O, C), (H, W), N, dtype = U.shape[2:], y.shape[2:], len(x), x.dtype
    BT, AT = B.T.astype(dtype), A.T.astype(dtype)
    count = tiles_at_a_time(max(C, O), W, N)
    # Few tiles are cut into `parts` of the images, so that there is work for every thread.
    parts = 1 if H * W > 16 * count or N % threads()[0] else threads()[0]
    sources = tiled(bordered(x, padding, padding, padding, padding), (H, W), 6, count, parts)
    targets = tiled(rows(y), (H, W), 4, count, parts)  # (strip, row, part, O, 4, 4 tile, n)
    targets = targets.reshape(*targets.shape[:5], count, 4, -1)
    blocks, n = list(np.ndindex(sources.shape[:3])), N // parts

    def work(first, last):
        V, M = scratch((6, 6, C, count, n), dtype), scratch((6, 6, O, count, n), dtype)
        half = scratch((6, O, 4, count, n), dtype)
        to_tiles, V, M = transform(BT, V), V.reshape(6, 6, C, -1), M.reshape(6, 6, O, -1)
        columns, flat, lines = M.transpose(1, 2, 0, 3), half.reshape(6, O, 4, -1), half.transpose(1, 2, 3, 0, 4)
        for block in blocks[first:last]:
            to_tiles(sources[block])
            np.matmul(U, V, out=M)
            np.matmul(AT, columns, out=flat)  # (6, O, 6, tile n) -> (6, O, 4, tile n)
            np.matmul(AT, lines, out=targets[block])  # (O, 4, tile, 6, n) -> (O, 4, tile, 4, n)

    parallel(work, len(blocks), 36 * O * C * H * W // 16 * N)


def tiles_at_a_time(channels, W, N):
    """How many tiles side by side are transformed together: few enough for the cache."""
    return next(n for n in (4, 2, 1) if n == 1 or W % (4 * n) == 0 and 36 * n * channels * N <= 2 * BLOCK)


def tiles_weight_gradient(g, x, padding, dw):
    """dw = G^T [sum over tiles of (A g A^T) (B^T x B)^T] G,  g (N, O, H', W'), x (N, C, H, W), dw (O, C, 3, 3)"""
    x, g = bordered(x, padding, padding, padding, padding), rows(g)
    O, C = dw.shape[:2]
    sums = sums_by_tiles if 36 * O * C <= BLOCK // 4 and len(g) > 4 else sums_by_products
    kernels_from_tiles(sums(x, g, 36 * O * C * g[:, 0].size // 16), dw)


def sums_by_tiles(x, g, cost):
    """The sum over tiles (6, 6, O, C), small enough that each thread has one in its cache for a part of the tiles."""
    (H, O, W, N), C, dtype = g.shape, x.shape[1], x.dtype
    count = tiles_at_a_time(max(C, O), W, N)
    xs, gs = tiled(x, (H, W), 6, count), tiled(g, (H, W), 4, count)
    blocks = list(np.ndindex(xs.shape[:3]))

    def work(first, last):
        V, M = scratch((6, 6, C, count, N), dtype), scratch((6, 6, O, count, N), dtype)
        x_to_tiles, g_to_tiles = transform(B.T.astype(dtype), V), transform(A.astype(dtype), M)
        V, M = V.reshape(6, 6, C, -1).swapaxes(2, 3), M.reshape(6, 6, O, -1)
        total, product = np.zeros((6, 6, O, C), dtype), scratch((6, 6, O, C), dtype)
        for block in blocks[first:last]:
            x_to_tiles(xs[block])
            g_to_tiles(gs[block])
            total += np.matmul(M, V, out=product)
        return total

    return np.sum(parallel(work, len(blocks), cost), axis=0)


def sums_by_products(x, g, cost):
    """The same where it is large, or tiles are few: a few rows of tiles at a time, threads share the channels to
    transform, then the 36 products, whose sums stay where they are.
    """
    (H, O, W, N), C, dtype = g.shape, x.shape[1], x.dtype
    count = max(1, min(H // 4, 2**21 // (36 * max(C, O) * W // 4 * N)))  # rows of tiles
    V, M = scratch((6, 6, C, count, W // 4, N), dtype), scratch((6, 6, O, count, W // 4, N), dtype)
    total, product = np.zeros((36, O, C), dtype), scratch((36, O, C), dtype)
    sources = (B.T.astype(dtype), tiled(x, (H, W), 6, W // 4), V), (A.astype(dtype), tiled(g, (H, W), 4, W // 4), M)
    for top in range(0, H // 4, count):
        now = min(count, H // 4 - top)

        def to_tiles(first, last):
            for T, source, out in sources:
                channels = slice(out.shape[2] * first // 36, out.shape[2] * last // 36)
                for k in range(now):
                    transform(T, out[:, :, channels, k])(source[0, top + k, 0, channels])

        def multiply(first, last):
            v, m = (a.reshape(36, a.shape[2], -1)[first:last, :, : now * W // 4 * N] for a in (V, M))
            total[first:last] += np.matmul(m, v.swapaxes(1, 2), out=product[first:last])

        parallel(to_tiles, 36, cost)
        parallel(multiply, 36, cost)
    return total


# ---------------------------------------------------------------------------------------------- convolution


class EngineError(RuntimeError):
    """A convolution that this machine cannot do; the message is one sentence."""


def output_size(x, w, stride, padding):
    """(H, W) of the convolution of arrays of shapes x and w; raises ValueError for what does not fit together."""
    if len(x) != 4 or len(w) != 4 or x[1] != w[1] or x[0] < 1:
        raise ValueError(f"conv2d takes images (N, C, H, W) and weights (O, C, kh, kw) of one C, not {x} and {w}")
    if stride < 1 or padding < 0:
        raise ValueError(f"conv2d takes a stride of at least 1 and a padding of at least 0, not {stride} and {padding}")
    size = tuple((n + 2 * padding - k) // stride + 1 for n, k in zip(x[2:], w[2:]))
    if min(size) < 1:
        raise ValueError(f"a {w[2]}x{w[3]} kernel does not fit images of {x[2]}x{x[3]} with padding {padding}")
    return size


def use_tiles(w, stride, size):
    """Whether a convolution to images of this size is done in tiles."""
    return stride == 1 and w[2:] == (3, 3) and min(w[:2]) >= TILES_FROM and not any(n % 4 for n in size)


def weights(w):
    """What forward and input_gradient take for weights w (O, C, kh, kw)"""
    return w


def forward(x, w, stride, padding):
    """x (N, C, H, W), w (O, C, kh, kw) -> (N, O, H', W')"""
    if x.dtype != w.dtype or x.dtype.kind != "f":
        raise ValueError(f"conv2d takes images and weights of one floating type, not {x.dtype} and {w.dtype}")
    size = output_size(x.shape, w.shape, stride, padding)
    y = empty((len(x), len(w), *size), x.dtype, halo=0)
    if use_tiles(w.shape, stride, size):
        tiles_forward(x, kernels_to_tiles(w), padding, y)
    else:
        rows_forward(x, w, stride, padding, y)
    return y


def input_gradient(g, w, shape, stride, padding):
    """The gradient with respect to x of this shape, from g (N, O, H', W')"""
    dx = empty(shape, g.dtype, halo=0)
    if use_tiles(w.shape, stride, shape[2:]):
        # the convolution of g with the kernels turned round and (O, C) exchanged
        tiles_forward(g, kernels_to_tiles(w, turned=True).swapaxes(2, 3), 2 - padding, dx)
    else:
        rows_input_gradient(g, w, stride, padding, dx)
    return dx


def weight_gradient(g, x, shape, stride, padding):
    """The gradient with respect to w of this shape, from g (N, O, H', W') and x (N, C, H, W)"""
    dw = np.empty(shape, g.dtype)
    if use_tiles(shape, stride, g.shape[2:]):
        tiles_weight_gradient(g, x, padding, dw)
    else:
        rows_weight_gradient(g, x, stride, padding, dw)
    return dw


# ---------------------------------------------------------------------------------------------- BatchNorm


def by_rows(work, *arrays):
    """work(block of the same few rows of each array (H, C, W, N), ..., temporary array of its shape) over all rows;
    returns the list of what it gave.
    """
    H, C, W, N = arrays[0].shape
    block = max(1, BLOCK // 2 // (C * W * N))

    def part(first, last):
        temporary = scratch((min(block, last - first), C, W, N), arrays[0].dtype)
        return [work(*(a[y : min(y + block, last)] for a in arrays), temporary[: min(block, last - y)])
                for y in range(first, last, block)]

    return [value for values in parallel(part, H, 40 * arrays[0].size) for value in values]


def per_channel(values, dtype):
    """(C,) -> (C, 1, 1), to be broadcast over rows (H, C, W, N)"""
    return np.asarray(values, dtype)[:, None, None]


def channel_sum(x):
    """Sum of x (H, C, W, N) for each channel."""
    return x.reshape(*x.shape[:2], -1).sum(-1).sum(0, dtype=np.float64)


def channel_dot(x, y):
    """Sum of x y, both (H, C, W, N), for each channel."""
    return np.vecdot(x.reshape(*x.shape[:2], -1), y.reshape(*y.shape[:2], -1)).sum(0, dtype=np.float64)


def statistics(x):
    """Mean and biased variance (C,) of x (N, C, H, W), in float64."""
    x = rows(x)
    near = x[0].mean((1, 2))  # the variance is summed around a value close to the mean, so that nothing cancels

    def sums(x, temporary):
        x = np.subtract(x, per_channel(near, x.dtype), out=temporary)
        return channel_sum(x), channel_dot(x, x)

    first, second = np.sum(by_rows(sums, x), axis=0) / (x.size // len(near))
    return near + first, second - first**2


def normalize(x, scale, shift, add, relu):
    """scale x + shift, for each channel, + add, then max(., 0) if relu: everything in one pass over (N, C, H, W)."""
    out = empty(x.shape, x.dtype)
    scale, shift = per_channel(scale, x.dtype), per_channel(shift, x.dtype)

    def work(x, out, *rest):
        *add, y = rest
        np.multiply(x, scale, out=y)
        y += shift
        for a in add:
            y += a
        if relu:
            np.maximum(y, 0, out=out)
        else:
            out[...] = y

    by_rows(work, rows(x), rows(out), *([] if add is None else [rows(add)]))
    return out


def add(x, y):
    """x + y of two gradients (N, C, H, W)"""
    out = empty(x.shape, x.dtype, halo=0)
    by_rows(lambda x, y, out, temporary: np.add(x, y, out=out), rows(x), rows(y), rows(out))
    return out


def batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, add, relu):
    """nn.batch_norm on arrays: (out, (mean, deviation) that it was normalised by)."""
    if training:
        n = x.size // len(running_mean)
        mean, var = statistics(x)
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (var * (n / (n - 1)) - running_var)
    else:
        mean, var = running_mean.astype(np.float64), running_var.astype(np.float64)
    deviation = (var + eps) ** 0.5
    scale = weight / deviation
    return normalize(x, scale, bias - mean * scale, add, relu), (mean, deviation)


def batch_norm_backward(g, x, out, weight, saved, training, separate):
    """Gradients of BatchNorm [+ add] [+ ReLU]: (dx, dweight, dbias, dadd); saved: (mean, deviation).

    With xhat = (x - mean) / deviation and g the gradient behind the ReLU (0 where out = 0; out None: no ReLU):
    dweight = sum g xhat, dbias = sum g, dx = weight / deviation (g - dbias / n - xhat dweight / n), dadd = g;
    with constant statistics (training False) dx = weight / deviation g.
    separate: dadd is wanted, an array of its own.
    """
    mean, deviation = saved
    dx = empty(x.shape, x.dtype)
    masked = dx if not separate else empty(x.shape, x.dtype, halo=0) if out is not None else g
    middle = per_channel(mean, x.dtype)

    def sums(g, x, masked, *rest):
        *out, temporary = rest
        for o in out:
            temporary[...] = o > 0
            g = np.multiply(g, temporary, out=masked)
        return channel_sum(g), channel_dot(g, np.subtract(x, middle, out=temporary))

    arrays = [rows(a) for a in (g, x, masked)]
    dbias, dot = np.sum(by_rows(sums, *arrays, *([] if out is None else [rows(out)])), axis=0)
    dweight = dot / deviation
    if out is None:
        masked = g
    slope = weight / deviation
    n = x.size // len(mean) if training else np.inf
    a, b = per_channel(slope, x.dtype), per_channel(-slope * dweight / (n * deviation), x.dtype)
    c = per_channel(slope * (mean * dweight / deviation - dbias) / n, x.dtype)

    def work(g, x, dx, temporary):
        np.multiply(x, b, out=temporary)
        temporary += c
        np.multiply(g, a, out=dx)
        dx += temporary

    by_rows(work, rows(masked), rows(x), rows(dx))
    return dx, dweight.astype(weight.dtype), dbias.astype(weight.dtype), masked if separate else None
