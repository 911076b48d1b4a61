"""The two inner loops of sparse.py, compiled by Numba where that is installed (requirements-numba.txt).

Images (H, C, W, N) come as a vector of all numbers from their first to their last one in memory; steps: how many
numbers the next row of pixels, the next channel and the next pixel lie further on. Which pixels, or output channels, to
do: from `first` to before `last`. Compiled once on a machine, in a few seconds, and kept in __pycache__.
"""

from numba import njit

vectorized = njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # sums may be in any order


@vectorized
def multiply(values, places, starts, x, x_steps, out, out_steps, W, N, first, last):
    """out[i, o, j] = the sum over k from starts[o] to before starts[o + 1] of values[k] times the N numbers of x that
    lie places[k] from pixel (i, j) on.
    """
    for pixel in range(first, last):
        i, j = pixel // W, pixel % W
        at = i * x_steps[0] + j * x_steps[2]
        for o in range(len(starts) - 1):
            begin = i * out_steps[0] + o * out_steps[1] + j * out_steps[2]
            y, k, end = out[begin : begin + N], starts[o], starts[o + 1]
            y[:] = 0
            while k + 4 <= end:  # four at a time: y is read and written a quarter as often
                a, b, c, d = values[k], values[k + 1], values[k + 2], values[k + 3]
                A, B, C, D = at + places[k], at + places[k + 1], at + places[k + 2], at + places[k + 3]
                p, q, r, s = x[A : A + N], x[B : B + N], x[C : C + N], x[D : D + N]
                for n in range(N):
                    y[n] += a * p[n] + b * q[n] + c * r[n] + d * s[n]
                k += 4
            while k < end:
                a, A = values[k], at + places[k]
                p = x[A : A + N]
                for n in range(N):
                    y[n] += a * p[n]
                k += 1


@vectorized
def weight_gradient(places, starts, x, x_steps, g, g_steps, dw, H, W, N, first, last):
    """dw[k] += the sum over pixels (i, j) of g[i, o, j] times the N numbers of x that lie places[k] from that pixel on,
    starts[o] <= k < starts[o + 1].
    """
    for i in range(H):  # the rows of g and x that are at work stay in the cache
        for o in range(first, last):
            for k in range(starts[o], starts[o + 1]):
                total = dw.dtype.type(0)
                for j in range(W):
                    A, B = places[k] + i * x_steps[0] + j * x_steps[2], o * g_steps[1] + i * g_steps[0] + j * g_steps[2]
                    p, q = x[A : A + N], g[B : B + N]
                    for n in range(N):
                        total += p[n] * q[n]
                dw[k] += total
