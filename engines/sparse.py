"""Convolutions and linear layers on the CPU that touch the kept entries of a masked weight alone.

With images in host.py's memory order, the pixels of all N images at one place of one channel are N numbers in a row.
What a kernel sees at an output pixel is a matrix of such rows, without a copy, so that a convolution is the product of
one sparse matrix with it for each pixel, whatever kernel and stride are. The input gradient is the same with kernels
turned round. The weight gradient gathers, for each output channel, the rows that its kept entries saw, and multiplies
them with the channel's gradient. Numba, where it is installed, compiles both loops (numba_loops.py).

Milliseconds on two cores at batch 128 with 8,700 kept entries of 3 x 3 kernels, product and weight gradient: on a Xeon
with AVX-512 with Numba, without, and dense; on a Zen 4 without and dense:
    128 channels of 32 x 32    46 and 83    151 and 366    76 and 81    Zen 4:  89 and 183    97 and 100
    256 channels of 16 x 16    26 and 30     62 and 106    82 and 93            28 and  59    84 and  77
    512 channels of 8 x 8       7 and  8     20 and  37    67 and 73            11 and  19    68 and  72
    1,024 channels of 4 x 4     2 and  3      3 and  13    82 and 89             4 and  17    81 and  92
"""

import functools
import math
import time

import numpy as np
from numpy.lib.stride_tricks import as_strided

from engines import convolution, host, output_size
from engines.host import bordered, empty, parallel, rows, scratch

FEW = 1 / 4  # below this density gradients, velocities and updates are of the kept entries alone
ENTRY, CALL = 20, 10**5  # what an entry takes besides its N multiplications, and a call from Python, in multiplications
BLOCK = 2**19  # entries gathered at a time
SHORT = 2**15  # multiplications between two calls from Python, which two threads would spend waiting for each other
COST = 8  # a multiplication here takes as long as so many of a dense product, which `parallel` counts in


class Pattern:
    """The kept entries of a weight (O, C, kh, kw) or (out, in).

    kept: their positions in weight.reshape(-1), ascending.
    """

    def __init__(self, mask):
        self.kept, self.shape, self.size, self.matrices = np.flatnonzero(mask), mask.shape, mask.size, {}

    def __getstate__(self):
        """For copy and pickle: what is made again when it is needed stays behind, so that no copy shares it."""
        return {"kept": self.kept, "shape": self.shape, "size": self.size, "matrices": {}}

    @functools.cached_property
    def places(self):
        """The coordinates of each kept entry"""
        return tuple(axis.astype(np.int32) for axis in np.unravel_index(self.kept, self.shape))

    @functools.cached_property
    def edges(self):
        """Where the entries of each output begin among the kept ones, and the end"""
        return np.searchsorted(self.places[0], np.arange(self.shape[0] + 1))

    def matrix(self, w, key, make):
        """The kept entries of w as a matrix in compressed sparse rows. make() gives (which of the kept entries, row and
        column of each, height of the matrix, its width or None: up to the last column); once for each key.
        """
        positions, matrix = self.matrices.get(key, (None, None))
        if matrix is None or matrix.dtype != w.dtype:
            from scipy.sparse import csr_array  # a fifth of a second, which programs without masks need not take

            which, row, column, height, width = make()
            order = np.lexsort((column, row))
            positions, row, column = self.kept[which][order], row[order], column[order].astype(np.int32)
            starts = np.searchsorted(row, np.arange(height + 1)).astype(np.int32)
            shape = height, width or int(column.max(initial=0)) + 1
            matrix = csr_array((np.empty(len(row), w.dtype), column, starts), shape)
        gather(w.reshape(-1), positions, out=matrix.data)
        self.matrices[key] = positions, matrix  # not before it is filled: another thread may want it
        return matrix


def gather(array, rows, out=None):
    """array[rows] written into out; rows must be valid indices"""
    return array.take(rows, axis=0, out=out, mode="clip")  # clip: no bounds check and no hidden copy


# ---------------------------------------------------------------------------------------------- convolution


@functools.cache
def numba_loops():
    """The module of this name if Numba is installed and works here, else None. It takes a second to import."""
    try:
        from engines import numba_loops

        one, steps = np.ones(1, np.float32), (0, 0, 0)
        numba_loops.multiply(one, np.zeros(1, np.int64), np.int32([0, 1]), one, steps, one.copy(), steps, 1, 1, 0, 1)
    except Exception:  # not there, not for this NumPy, a damaged copy of what it compiled, no folder to keep that in
        return None
    return numba_loops


def loops_for(*arrays):
    """Numba's loops if they can be used for arrays of these types, else None"""
    types = {array.dtype for array in arrays}
    return numba_loops() if len(types) == 1 and types < {np.dtype(np.float32), np.dtype(np.float64)} else None


def in_memory(x, stride=1):
    """What Numba's loops take for x (H, C, W, N): a vector of all numbers from its first to its last one in memory, and
    how many of them lie between every stride-th row of pixels, channels, and every stride-th column.
    """
    if x.shape[3] > 1 and x.strides[3] != x.itemsize or min(x.strides) < 0:  # a gradient from elsewhere
        x = np.ascontiguousarray(x)
    row, channel, column = (s // x.itemsize for s in x.strides[:3])
    length = sum((n - 1) * step for n, step in zip(x.shape, (row, channel, column))) + x.shape[3]
    return as_strided(x, (length,), (x.itemsize,)), (stride * row, channel, stride * column)


def steps(x):
    """How many rows of N numbers the next row of pixels, and the next channel, lies further on in x (H, C, W, N)."""
    h, c, v, _ = x.strides
    return h // v, c // v


def multiply(matrix, x, out, stride):
    """out (H, O, W, N) = matrix times what lies from each pixel of x (H', C, W', N) on, of every stride-th row and
    column.
    """
    (H, _, W, N), (h, _, v, e) = out.shape, x.strides
    if loops := loops_for(x, matrix):
        work = functools.partial(loops.multiply, matrix.data, matrix.indices * np.int64(v // e), matrix.indptr,
                                 *in_memory(x, stride), *in_memory(out), W, N)
    else:
        sources = as_strided(x, (H, W, matrix.shape[1], N), (stride * h, stride * v, v, e))

        def work(first, last):
            for pixel in range(first, last):
                i, j = divmod(pixel, W)
                out[i, :, j] = matrix @ sources[i, j]

    parallel(work, H * W, COST * matrix.nnz * H * W * N)


def forward(x, w, pattern, stride, padding):
    """x (N, C, H, W), w (O, C, kh, kw) -> (N, O, H', W')"""
    y = empty((len(x), len(w), *output_size(x.shape, w.shape, stride, padding)), x.dtype, halo=0)
    x = bordered(x, padding, padding, padding, padding)
    row_step, channel_step = steps(x)

    def make():
        o, c, i, j = pattern.places
        return slice(None), o, row_step * i + channel_step * c + j, len(w), None

    multiply(pattern.matrix(w, ("forward", row_step, channel_step), make), x, rows(y), stride)
    return y


def input_gradient(g, w, pattern, shape, stride, padding):
    """The gradient with respect to x of this shape, from g (N, O, H', W')"""
    dx = empty(shape, g.dtype, halo=0)
    for top, left, source, out in convolution.phases(g, w.shape, dx, stride, padding):
        row_step, channel_step = steps(source)

        def make():
            o, c, i, j = pattern.places
            which = np.flatnonzero((i % stride == top) & (j % stride == left))
            i, j = ((n - 1 - k[which]) // stride for n, k in zip(w.shape[2:], (i, j)))  # in reverse order
            return which, c[which], row_step * i + channel_step * o[which] + j, shape[1], None

        multiply(pattern.matrix(w, (top, left, stride, row_step, channel_step), make), source, out, 1)
    return dx


def weight_gradient(g, x, pattern, stride, padding):
    """The gradient with respect to the kept entries, (kept,), from g (N, O, H', W') and x (N, C, H, W)"""
    x, g = bordered(x, padding, padding, padding, padding), rows(g)
    (H, O, W, N), (h, _, v, e), (row_step, channel_step) = g.shape, x.strides, steps(x)
    o, c, i, j = pattern.places
    seen = row_step * i + channel_step * c + j  # the row of x that an entry meets at the first pixel
    dw, cost = np.zeros(len(seen), g.dtype), COST * len(seen) * H * W * N
    if loops := loops_for(x, g):
        work = functools.partial(loops.weight_gradient, seen * np.int64(v // e), pattern.edges, *in_memory(x, stride),
                                 *in_memory(g), dw, H, W, N)
    else:
        windows = as_strided(x, (seen.max(initial=0) + 1, H, W, N), (v, stride * h, stride * v, e))
        size = max(1, len(seen) // O) * W * N  # of what a channel gathers, about, for a row of pixels
        block = max(n for n in range(1, H + 1) if H % n == 0 and (n == 1 or n * size <= BLOCK))
        cost *= block * size > SHORT

        def work(first, last):
            for top in range(0, H, block):
                for channel in range(first, last):
                    which = slice(*pattern.edges[channel : channel + 2])
                    if which.start < which.stop:
                        a = windows[seen[which], top : top + block]  # (kept in this channel, block, W, N)
                        dw[which] += a.reshape(len(a), -1) @ g[top : top + block, channel].reshape(-1)

    parallel(work, O, cost)
    return dw


# ---------------------------------------------------------------------------------------------- linear layers


def product(matrix, xT):
    """matrix xT, for xT (in, N)"""
    loops, (_, N) = loops_for(xT, matrix), xT.shape
    if not loops:
        return (matrix @ xT).astype(xT.dtype, copy=False)  # float16 comes out as float32
    out = np.empty((matrix.shape[0], N), xT.dtype)  # of one pixel
    loops.multiply(matrix.data, matrix.indices * np.int64(N), matrix.indptr, xT.reshape(-1), (0, 0, 0),
                   out.reshape(-1), (0, N, 0), 1, N, 0, 1)
    return out


def linear(xT, w, pattern):
    """x w^T (N, out), stored as (out, N), for x^T (in, N), w (out, in)"""
    def make():
        out, column = pattern.places
        return slice(None), out, column, *w.shape

    return product(pattern.matrix(w, "linear", make), xT).T


def linear_input_gradient(gT, w, pattern):
    """g w (N, in), stored as (in, N), for g^T (out, N)"""
    def make():
        out, column = pattern.places
        return slice(None), column, out, *w.T.shape

    return product(pattern.matrix(w, "transposed", make), gT).T


def linear_weight_gradient(gT, xT, pattern):
    """The kept entries of g^T x, (kept,)"""
    loops, shape = loops_for(gT, xT), (len(pattern.kept), gT.shape[1])
    if loops:
        dw, N = np.zeros(shape[0], gT.dtype), shape[1]
        loops.weight_gradient(pattern.places[1] * np.int64(N), pattern.edges, xT.reshape(-1), (0, 0, 0),
                              gT.reshape(-1), (0, N, 0), dw, 1, 1, N, 0, len(gT))
        return dw
    a, b = (gather(rows, places, out=scratch(shape, gT.dtype)) for rows, places in zip((gT, xT), pattern.places))
    return np.vecdot(a, b)


# ---------------------------------------------------------------------------------------------- which is cheaper

# The density below which the kept entries alone are cheaper, but for what `cost` adds, by the kind of dense product:
# about as it is on a Zen 4 and a Xeon with AVX-512, with one thread and two, and with kernels for AVX2.
TYPICAL = {"rows": 0.13, "tiles": 0.06, "rows gradient": 0.08, "tiles gradient": 0.04, "linear": 0.12,
           "linear gradient": 0.045}
WITH_NUMBA = {"rows": 0.3, "tiles": 0.14, "rows gradient": 0.28, "tiles gradient": 0.14, "linear": 0.17,
              "linear gradient": 0.12}


def cost(kept, N, pixels=1, calls=1):
    """Of a product with so many kept entries for each of so many pixels of N images, in multiplications"""
    return kept * (N + ENTRY) * pixels + CALL * calls


def measured(kind):
    """{kind: the density} for all kinds of convolutions, or of linear layers, whichever this one is of: TYPICAL, unless
    this machine is off by a factor of two or more. What is chosen decides how sums are rounded, and should hardly
    depend on what else the machine has to do. Takes half a second for convolutions, once in a process.
    """
    with host.measuring, host.one_blas_thread:
        return measure_linear() if kind.startswith("linear") else measure_convolutions()


@functools.cache
def measure_convolutions():
    rng, N, C, side = np.random.default_rng(0), 128, 128, 8
    mask = rng.random((C, C, 3, 3)) < 1 / 16
    w, pattern = (mask * rng.standard_normal(mask.shape)).astype(np.float32), Pattern(mask)
    x, y, dw = empty((N, C, side, side), np.float32), empty((N, C, side, side), np.float32), np.empty_like(w)
    x[...], y[...] = rng.standard_normal((2, *x.shape), np.float32)
    product = seconds(lambda: forward(x, w, pattern, 1, 1)) / cost(len(pattern.kept), N, side**2, side**2)
    gradient = seconds(lambda: weight_gradient(y, x, pattern, 1, 1)) / cost(len(pattern.kept), N, side**2, C)
    dense = {"rows": lambda: convolution.rows_forward(x, w, 1, 1, y),
             "tiles": lambda: convolution.tiles_forward(x, convolution.kernels_to_tiles(w), 1, y),
             "rows gradient": lambda: convolution.rows_weight_gradient(y, x, 1, 1, dw),
             "tiles gradient": lambda: convolution.tiles_weight_gradient(y, x, 1, dw)}
    return {kind: near_typical(kind, seconds(work) / (w.size * N * side**2) / (gradient if "grad" in kind else product))
            for kind, work in dense.items()}


@functools.cache
def measure_linear():
    rng, N, size = np.random.default_rng(0), 128, (128, 784)
    mask = rng.random(size) < 1 / 32
    w, pattern = (mask * rng.standard_normal(size)).astype(np.float32), Pattern(mask)
    x, g = rng.standard_normal((N, size[1]), np.float32), rng.standard_normal((N, size[0]), np.float32)

    def gradient():
        return linear_weight_gradient(np.ascontiguousarray(g.T), np.ascontiguousarray(x.T), pattern)

    kept, dense = cost(len(pattern.kept), N), w.size * N
    pairs = {"linear": (lambda: linear(np.ascontiguousarray(x.T), w, pattern), lambda: x @ w.T),
             "linear gradient": (gradient, lambda: g.T @ x)}
    return {kind: near_typical(kind, seconds(whole) / dense / (seconds(sparse) / kept))
            for kind, (sparse, whole) in pairs.items()}


def near_typical(kind, density):
    """The typical density unless this one is off by a factor of two or more: then by two, or by four, the most."""
    typical = (WITH_NUMBA if numba_loops() else TYPICAL)[kind]
    power = int(math.log2(density / typical))  # towards 0
    return typical * 2.0 ** min(max(power, -2), 2)


def seconds(work):
    """The least time of three calls after a first one"""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
