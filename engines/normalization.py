"""BatchNorm of images on the CPU: a few rows at a time, so that they stay in a core's second-level cache.

NumPy's small buffer (host.BUFFER) makes it 3 times as fast for small images. Threads by channels instead of rows:
nothing.
"""

import numpy as np

from engines.host import empty, parallel, rows, scratch

BLOCK = 2**17  # entries worked on at a time

def by_rows(work, *arrays):
    """work(block of the same few rows of each array (H, C, W, N), ..., temporary array of its shape) over all rows;
    returns the list of what it gave.
    """
    H, C, W, N = arrays[0].shape
    block = max(1, BLOCK // (C * W * N))

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
    out = empty(x.shape, x.dtype, halo=int(relu))  # what is convolved next comes out of a ReLU
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


def batch_norm_gradients(g, x, out, weight, saved, training, separate, more=None):
    """Gradients of BatchNorm [+ add] [+ ReLU]: (dx, dweight, dbias, dadd); saved: (mean, deviation).

    With xhat = (x - mean) / deviation and g the gradient, g + more unless more is None, behind the ReLU (0 where
    out = 0; out None: no ReLU):
    dweight = sum g xhat, dbias = sum g, dx = weight / deviation (g - dbias / n - xhat dweight / n), dadd = g;
    with constant statistics (training False) dx = weight / deviation g.
    separate: dadd is wanted, an array of its own.
    """
    mean, deviation = saved
    dx = empty(x.shape, x.dtype)
    plain = out is None and more is None
    masked = dx if not separate else g if plain else empty(x.shape, x.dtype, halo=0)
    middle, others = per_channel(mean, x.dtype), [a for a in (more, out) if a is not None]

    def sums(g, x, masked, *rest):
        *others, temporary = rest
        if more is not None:
            g = np.add(g, others[0], out=masked)
        if out is not None:
            temporary[...] = others[-1] > 0
            g = np.multiply(g, temporary, out=masked)
        return channel_sum(g), channel_dot(g, np.subtract(x, middle, out=temporary))

    dbias, dot = np.sum(by_rows(sums, *(rows(a) for a in (g, x, masked, *others))), axis=0)
    dweight = dot / deviation
    if plain:
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
