"""Convolution of images on the CPU, in NumPy, at the speed of a tuned library.

With images in host.py's memory order, and with no copy at all,
- "rows": rows y .. y+k of one horizontal shift are a (k C, W N) matrix whatever k, since the strides of a row and of
  a channel line up. A k x k convolution is k matrix products an output row, one for each shift; the weight gradient
  is the product of the same matrices; the input gradient is the same convolution of the output gradient.
- "tiles", for 3 x 3 kernels with many channels: Winograd's F(4x4, 3x3) (Lavin and Gray 2016, arXiv 1509.09308) needs
  36 products of (O, C) matrices for 16 outputs instead of 144. Its transforms are matrix products as well.
A stride only changes the strides of the views.

Milliseconds on two cores at batch 128, before and after. Tiles instead of rows: 58 -> 26 forward at 64 channels of
32 x 32, at 16 nothing. BLAS threads stopped: 40 -> 26. Products small enough to need no packing: 7 -> 5.5 (18
channels), their weight gradient 11 -> 5. Strides without copies: 43 -> 30. Weight gradient by threads over the 36
products instead of over images: 66 -> 26 (512 channels). Memory used again and freed during the backward pass: a step
1,800 -> 1,530 (width 64). Nothing: larger blocks of tiles, threads for small images.
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided

from engines import host, output_size
from engines.host import bordered, empty, parallel, rows, scratch

BLOCK = 2**18  # entries worked on at a time, so that they stay in a core's second-level cache

# ---------------------------------------------------------------------------------------------- rows

SMALL = 10**6  # OpenBLAS multiplies matrices of up to this many products without packing them: twice as fast if narrow


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
    """g (N, O, H', W'), w (O, C, kh, kw) -> dx (N, C, H, W)"""
    C, N = w.shape[1], len(g)
    for top, left, source, out in phases(g, w.shape, dx, stride, padding):
        part = w[:, :, top::stride, left::stride][:, :, ::-1, ::-1]
        (H, _, W, _), (h, c, v, e) = out.shape, out.strides
        cut = pieces(part[..., 0].size * W * N, W, stride)
        add_products([(part[..., q].transpose(1, 2, 0).reshape(C, -1),  # (O, C, k) -> (C, k O)
                       matrices(source, 0, q, part.shape[2], (H, W), cut)) for q in range(part.shape[3])],
                     as_strided(out, (H, cut, C, W // cut * N), (h, W // cut * v, c, e)))


def phases(g, w, dx, stride, padding):
    """The parts of an input gradient dx (N, C, H, W), w the shape of the weights: every stride-th row and column of dx
    is a convolution without stride, of g (N, O, H', W') with every stride-th row and column of the kernel in reverse
    order. Yields (first row and first column of the kernel, g with a border (H'', O, W'', N), part of dx (H, C, W, N)).
    """
    kernel = w[2:]
    if stride > np.min(kernel):  # some meet no entry of the kernel
        parallel(lambda first, last: rows(dx)[first:last].fill(0), dx.shape[2], 40 * dx.size)

    def axis(phase, k, size, size_out):
        """(first row of dx, how many, zeros before and after g's rows) for kernel rows phase, phase + stride, ..."""
        skip = max(0, -(-(padding - phase) // stride))  # rows that lie in the padding
        first = skip * stride + phase - padding
        count = len(range(first, size, stride))
        return first, count, len(range(phase, k, stride)) - 1 - skip, skip + count - size_out

    for top, left in np.ndindex(*np.minimum(kernel, stride)):
        (i, H, *vertical), (j, W, *horizontal) = (
            axis(*a) for a in zip((top, left), kernel, dx.shape[2:], g.shape[2:]))
        if H > 0 and W > 0:
            yield top, left, bordered(g, *vertical, *horizontal), rows(dx)[i::stride, :, j::stride]


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
    parts = 1 if H * W > 16 * count or N % host.cores() else host.cores()
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


def kind(w, stride, size):
    """How a convolution with weights of shape w to images of this size is done: in "tiles" or by "rows"."""
    tiles = stride == 1 and w[2:] == (3, 3) and min(w[:2]) >= TILES_FROM and not any(n % 4 for n in size)
    return "tiles" if tiles else "rows"


def forward(x, w, stride, padding):
    """x (N, C, H, W), w (O, C, kh, kw) -> (N, O, H', W')"""
    size = output_size(x.shape, w.shape, stride, padding)
    y = empty((len(x), len(w), *size), x.dtype, halo=0)
    if kind(w.shape, stride, size) == "tiles":
        tiles_forward(x, kernels_to_tiles(w), padding, y)
    else:
        rows_forward(x, w, stride, padding, y)
    return y


def input_gradient(g, w, shape, stride, padding):
    """The gradient with respect to x of this shape, from g (N, O, H', W')"""
    dx = empty(shape, g.dtype, halo=0)
    if kind(w.shape, stride, shape[2:]) == "tiles":
        # the convolution of g with the kernels turned round and (O, C) exchanged
        tiles_forward(g, kernels_to_tiles(w, turned=True).swapaxes(2, 3), 2 - padding, dx)
    else:
        rows_input_gradient(g, w, stride, padding, dx)
    return dx


def weight_gradient(g, x, shape, stride, padding):
    """The gradient with respect to w of this shape, from g (N, O, H', W') and x (N, C, H, W)"""
    dw = np.empty(shape, g.dtype)
    if kind(shape, stride, g.shape[2:]) == "tiles":
        tiles_weight_gradient(g, x, padding, dw)
    else:
        rows_weight_gradient(g, x, stride, padding, dw)
    return dw


