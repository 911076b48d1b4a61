"""The kernel of wide ReLU networks at initialisation, dense and sparse (Theorem 1 of the paper).

f(x) = (nd)^(-1/2) v^T relu(u x), every weight N(0, 1/p) with probability p (the density), else 0. As the width n
grows its kernel Theta(x,y) = (1/nd) sum_k relu(u_k x) relu(u_k y) tends to Kp_1/d, where

    Kp_l(x,y) = E [relu(w x) relu(w y)]^l  over one sparse row w of u;  K_l is Kp_l at p = 1.

Theorem 1 gives the mean squared distance of Theta from the dense limit K_1/d in terms of Kp_1 and Kp_2, which the
paper writes as sums over 2^d masks and approximates (Eq. 4). Here they are also computed exactly in O(d).

    bias2, variance = kernel_distance(x, y, width=635, density=8 / 635, split=True)      # x, y: (..., 784)

All functions take and return NumPy arrays, or CuPy arrays when given those.
"""

import math
import sys
import warnings
from functools import cache
from typing import NamedTuple

import numpy as np

from engines import host, listed, real, whole

__all__ = [
    "relu_moment", "infinite_kernel", "sparse_moments", "series_moments", "kernel_distance", "kernel_distance_formula",
    "optimal_width", "optimal_density", "measured_kernel", "gp_predict", "Prediction",
]

BLOCK = 1 << 17  # entries of a work array: a few of them in float64 stay in a core's cache


def array_module(*arrays):
    """cupy if one of the arrays is a CuPy array, else numpy; cupy is never imported for it."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy and any(isinstance(a, cupy.ndarray) for a in arrays) else np


def to_host(array):
    return np.asarray(array.get() if hasattr(array, "get") else array)


def in_threads(work, items):
    """[work(i) for i in items], one thread a core: NumPy releases Python's lock inside large operations.

    The BLAS gets one thread meanwhile, since its own threads, waiting, take the cores from ours (2.5 times the time).
    """
    return host.each(work, items) if len(items) > 1 else [work(i) for i in items]


def check_density(density):
    """The density as a Python float, in whose precision everything is then computed."""
    return real(density, "density", positive=True, most=1)


def check_real(what, *arrays):
    """Raise TypeError unless arrays are of real numbers; what: how the sentence begins, "X and Y are matrices"."""
    if not {a.dtype.kind for a in arrays} <= set("biuf"):
        raise TypeError(f"{what} of real numbers, not of {' and '.join(str(a.dtype) for a in arrays)}")


def check_finite(what, *arrays):
    if not all(array_module(a).isfinite(a).all() for a in arrays):
        raise ValueError(f"{what} of finite numbers, without NaN and infinity")


def check_rng(rng, who):
    if not hasattr(rng, "standard_normal"):
        raise ValueError(f"{who} needs rng, a NumPy generator such as numpy.random.default_rng(0)")


def matrices(X, Y):
    """X (N, d) and Y (M, d) (X itself if None) as floating-point arrays of one module and dtype."""
    xp = array_module(X, Y)
    X = xp.asarray(X)
    Y = X if Y is None else xp.asarray(Y)
    if X.ndim != 2 or Y.ndim != 2 or X.shape[1] != Y.shape[1] or not X.shape[1]:
        raise ValueError(f"X and Y are matrices with the same number of columns, not {X.shape} and {Y.shape}")
    check_real("X and Y are matrices", X, Y)
    check_finite("X and Y are matrices", X, Y)
    dtype = np.result_type(X.dtype, Y.dtype, np.float32)
    return xp, X.astype(dtype, copy=False), Y.astype(dtype, copy=False)


def pairs(x, y):
    """x and y (..., d) as float64 arrays of one module, the leading axes of which broadcast."""
    xp = array_module(x, y)
    x, y = xp.asarray(x), xp.asarray(y)
    if not x.ndim or not y.ndim or x.shape[-1] != y.shape[-1] or not x.shape[-1]:
        raise ValueError(f"x and y are arrays (..., d) of the same d, not {x.shape} and {y.shape}")
    check_real("x and y are arrays", x, y)
    x, y = x.astype(np.float64, copy=False), y.astype(np.float64, copy=False)
    check_finite("x and y are arrays", x, y)
    if any(n != m and 1 not in (n, m) for n, m in zip(x.shape[-2::-1], y.shape[-2::-1])):
        raise ValueError(f"x and y are pairs (..., d) whose leading axes broadcast, not {x.shape} and {y.shape}; for "
                         "all pairs of rows take x[:, None] and y")
    return xp, x, y


def scaled(x):
    """(z, e), x = z 2^e, of x (..., d), e (...): the largest entry of each vector of z lies between 1/2 and 1, so that
    no product of a few entries over- or underflows.
    """
    xp = array_module(x)
    e = xp.frexp(abs(x).max(-1))[1]
    return xp.ldexp(x, -e[..., None]), e


# ---------------------------------------------------------------------------------------------- dense: K_l


@cache
def cap_polynomial(order, dtype):
    """Coefficients, highest first, of P_l(w) = h_l(t) / w^(l + 1/2) on 0 <= w = 1 - cos t <= 1, with

        h_1 = sin t - t cos t,    h_2 = t (1 + 2 cos^2 t) - 3 sin t cos t,

    which are J_l at the angle pi - t: they vanish like t^3 and t^5, so the formulas lose all digits at small t and
    the polynomial loses none. P_l is analytic up to w = 2 (t = pi): Chebyshev interpolation gains 5.8 a degree.
    """
    def ratio(w):
        t = 2 * np.arcsin(np.sqrt(w / 2))
        if order == 1:
            series = [(-1) ** (k + 1) * 2 * k * t ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(1, 20)]
        else:
            series = [(-1) ** k * (k - 1) * (2 * t) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(2, 20)]
        return sum(reversed(series)) / w ** (order + 0.5)

    degree = 6 if dtype == np.float32 else 14
    fit = np.polynomial.Chebyshev.interpolate(ratio, degree, domain=[0, 1]).convert(kind=np.polynomial.Polynomial)
    return tuple(dtype(c) for c in fit.coef[::-1])


def cap(w, order):
    """h_l(t) for an array of w = 1 - cos t in [0, 1]."""
    first, *rest = cap_polynomial(order, w.dtype.type)
    out = w * first
    for c in rest[:-1]:
        out += c
        out *= w
    out += rest[-1]
    out *= w**order
    out *= w**0.5
    return out


def product_error(a, b):
    """(a b rounded, what rounding lost), exactly (Dekker 1971): each factor is split into two halves of 26 bits."""
    (A, B), product = (z * 134217729.0 - (z * 134217729.0 - z) for z in (a, b)), a * b
    return product, (a - A) * (b - B) - (((product - A * B) - (a - A) * B) - A * (b - B))


def relu_moment(xx, yy, xy, order):
    """K_l = E [relu(w x) relu(w y)]^l, l = order = 1 or 2, over w ~ N(0, I), from |x|^2, |y|^2 and x.y.

    K_l = |x|^l |y|^l J_l(t) / 2 pi, cos t = x.y / |x||y|, J_1 = sin t + (pi - t) cos t,
    J_2 = 3 sin t cos t + (pi - t)(1 + 2 cos^2 t)   (Cho and Saul 2009, l = 1, 2).
    xx, yy, xy: arrays that broadcast. Computed in float64, to a relative error below 1e-12 at every angle: sin^2 t is
    taken from xx yy - xy^2 without rounding of the products. A cosine beyond 1 counts as 1, a zero vector gives 0.
    ValueError for negative xx or yy, or NaN.
    """
    if order not in (1, 2):
        raise ValueError(f"order is 1 or 2, not {order!r}")
    order, xp = int(order), array_module(xx, yy, xy)
    if any(np.iscomplexobj(a) for a in (xx, yy, xy)):
        raise TypeError("xx, yy and xy are real numbers, not complex ones")
    dtype = np.result_type(*(getattr(a, "dtype", np.float64) for a in (xx, yy, xy)), np.float32)
    xx, yy, xy = (xp.asarray(a, dtype=np.float64) for a in (xx, yy, xy))
    if not ((xx >= 0).all() and (yy >= 0).all()) or xp.isnan(xy).any():
        raise ValueError("xx and yy are squared lengths, not negative, and xy products, without NaN")
    a, b = xp.frexp(xx)[1] // 2, xp.frexp(yy)[1] // 2  # powers of two, so that no product over- or underflows
    xx, yy, xy = xp.ldexp(xx, -2 * a), xp.ldexp(yy, -2 * b), xp.ldexp(xy, -a - b)
    (square, lost), (dot, dot_lost) = product_error(xx, yy), product_error(xy, xy)
    sin2 = xp.maximum((square - dot) + (lost - dot_lost), 0)  # |x|^2 |y|^2 sin^2 t
    norm = xp.sqrt(square)
    bottom = norm * (norm + abs(xy))
    w = xp.minimum(sin2 / xp.where(bottom > 0, bottom, 1), 1)  # 1 - |cos t|
    out = angular_moment(w, xy >= 0, order) * norm**order
    return xp.ldexp(out, order * (a + b)).astype(dtype, copy=False)


def angular_moment(w, acute, order):
    """J_l / 2 pi from w = 1 - |cos t|: h_l(pi - t) if obtuse, else pi cos t + h_1(t), pi (1 + 2 cos^2 t) - h_2(t)."""
    small = cap(w, order)
    big = np.pi * (1 - w) + small if order == 1 else np.pi * (1 + 2 * (1 - w) ** 2) - small
    return array_module(w).where(acute, big, small) / (2 * np.pi)


@np.errstate(under="ignore")
def infinite_kernel(X, Y=None):
    """K_1/d for all pairs of the rows of X (N, d) and Y (M, d) (X itself if None): (N, M), the dense limit of Theta.

    float32 or float64 as the inputs are; in blocks, so beyond the result it needs the memory of few rows; for Y = None
    only one triangle is computed. 2 pi K_1 / |x||y| = pi relu(cos t) + h_1, a polynomial in 1 - |cos t| (see cap).
    """
    xp, A, B = matrices(X, Y)
    d = A.shape[1]
    (A, a), (B, b) = scaled(A), scaled(B)
    length = [xp.sqrt((Z * Z).sum(1, keepdims=True)) for Z in (A, B)]
    A, B = (Z / xp.where(n > 0, n, 1) for Z, n in zip((A, B), length))
    scale = [(xp.ldexp(n, e[:, None]) / math.sqrt(2 * math.pi * d)).astype(A.dtype) for n, e in zip(length, (a, b))]
    out = xp.empty((len(A), len(B)), A.dtype)
    side = 1024

    def block(corner):
        i, j = (slice(k, k + side) for k in corner)
        tile = A[i] @ B[j].T
        step = max(1, BLOCK // 2 // tile.shape[1]) if xp is np else side
        for k in range(0, len(tile), step):
            cos = tile[k : k + step]
            kernel = cap(xp.maximum(1 - abs(cos), 0), 1)
            xp.maximum(cos, 0, out=cos)
            cos *= cos.dtype.type(np.pi)
            cos += kernel
            cos *= scale[0][i][k : k + step]
            cos *= scale[1][j].T
        out[i, j] = tile
        if Y is None and corner[0] != corner[1]:
            out[j, i] = tile.T

    corners = [(i, j) for i in range(0, len(A), side) for j in range(0, len(B), side) if Y is not None or j >= i]
    in_threads(block, corners) if xp is np else [block(c) for c in corners]
    return out


# ---------------------------------------------------------------------------------------------- sparse: Kp_l


def sparse_moments(x, y, density, method="exact", rtol=1e-6, masks=10_000, rng=None):
    """(Kp_1, Kp_2) for pairs x, y (..., d), which broadcast: two arrays of the leading shape, float64.

    method "exact": to the relative tolerance rtol; warns (RuntimeWarning) when the finest nodes do not reach it, which
        nearly opposite vectors do (from about 150 degrees). Up to 14 coordinates are done by "enumerate".
    "series": K_l and its first correction, of relative order 1/(pd)^2; see series_moments for all pairs.
    "enumerate": the sum over all masks; ValueError when x and y are non-zero in more than 20 coordinates together.
    "sample": the mean over this number of masks drawn from rng, a NumPy generator, the same masks for all pairs;
        returns (Kp_1, Kp_2, their standard errors).
    """
    density, rtol, (xp, x, y) = check_density(density), real(rtol, "rtol", positive=True), pairs(x, y)
    (x, a), (y, b) = scaled(x), scaled(y)
    with np.errstate(under="ignore"):  # of exponentials that do not count, whatever the program does about it elsewhere
        moments = unit_moments(*xp.broadcast_arrays(x, y), density, method, rtol, masks, rng)
        powers = a + b, 2 * (a + b), a + b, 2 * (a + b)  # of two, of Kp_1 and Kp_2 and of their standard errors
        return tuple(xp.ldexp(z, e) for z, e in zip(moments, powers))


def unit_moments(x, y, density, method, rtol, masks, rng):
    """What sparse_moments returns, of vectors whose entries are at most 1."""
    xp = array_module(x)
    xx, yy, xy = (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)
    if method == "exact" and density == 1:
        return relu_moment(xx, yy, xy, 1), relu_moment(xx, yy, xy, 2)
    if method == "series":
        x, y = (z / xp.sqrt(xp.where(zz > 0, zz, 1))[..., None] for z, zz in ((x, xx), (y, yy)))
        sums = (x * y).sum(-1), (x**4 + y**4).sum(-1), (x * x * y * y).sum(-1), (x * y * (x * x + y * y)).sum(-1)
        first, second = series_unit(*sums, density)
        return xp.sqrt(xx * yy) * first, xx * yy * second
    if method == "sample":
        check_rng(rng, "method 'sample'")
        return sample_moments(x, y, density, whole(masks, "masks", 2), rng)
    if method not in ("exact", "enumerate"):
        raise ValueError(f"method is 'exact', 'series', 'enumerate' or 'sample', not {method!r}")

    def pair(index):
        a, b = x[index], y[index]
        support = (a != 0) | (b != 0)
        a, b = a[support], b[support]
        if method == "enumerate" or len(a) <= 14:  # few masks: their sum is quicker
            return *enumerate_pair(to_host(a), to_host(b), density), 0.0
        return exact_pair(a, b, density, rtol)

    table = np.array(in_threads(pair, list(np.ndindex(x.shape[:-1])))).reshape(*x.shape[:-1], 3)
    error = table[..., 2]
    if (error > rtol).any():
        warnings.warn(f"{(error > rtol).sum()} of {error.size} pairs did not reach the relative tolerance {rtol:g}: "
                      f"the largest estimated error is {error.max():.1g}", RuntimeWarning, stacklevel=3)
    return xp.asarray(table[..., 0]), xp.asarray(table[..., 1])


def enumerate_pair(x, y, p):
    """The sum over all 2^d masks, x, y (d,): given the mask w x and w y are normal, so it is K_l of what is kept."""
    if len(x) > 20:
        raise ValueError(f"the sum over all masks of {len(x)} non-zero coordinates is too long: 20 is the limit")
    weight, sums = np.ones(1), np.zeros((3, 1))
    for a, b in zip(x, y):
        weight = np.concatenate([weight * (1 - p), weight * p])
        sums = np.concatenate([sums, sums + np.array([[a * a], [b * b], [a * b]]) / p], axis=1)
    return weight @ relu_moment(*sums, 1), weight @ relu_moment(*sums, 2)


def sample_moments(x, y, p, masks, rng):
    xp, shape, d = array_module(x), x.shape[:-1], x.shape[-1]
    products = [(z / p).reshape(-1, d) for z in (x * x, y * y, x * y)]  # (pairs, d)
    total = xp.zeros((4, len(products[0])))
    block = max(1, 16 * BLOCK // max(d, len(products[0])))
    for start in range(0, masks, block):
        mask = xp.asarray(rng.random((min(block, masks - start), d)) < p, dtype=np.float64)
        sums = [mask @ z.T for z in products]  # (masks, pairs)
        first, second = relu_moment(*sums, 1), relu_moment(*sums, 2)
        total += xp.stack([z.sum(0) for z in (first, second, first * first, second * second)])
    mean, square = total[:2] / masks, total[2:] / masks
    error = xp.sqrt(xp.maximum(square - mean * mean, 0) / max(masks - 1, 1))
    return tuple(z.reshape(shape) for z in (*mean, *error))


def series_unit(cos, fourth, x2y2, mixed, p):
    """(Kp_1, Kp_2) of unit vectors: K_l plus half the trace of its Hessian times the covariance of its arguments.

    cos = x.y, fourth = sum x_i^4 + y_i^4, x2y2 = sum x_i^2 y_i^2, mixed = sum x_i^3 y_i + x_i y_i^3. Given the mask,
    the arguments |x|^2, |y|^2, x.y of K_l have the mean of the dense law and covariances (1-p)/p times these sums; the
    next term holds their third cumulants, of relative order 1/(pd)^2. The Hessian for unit vectors, with S = sin t:
        K_1: xx,xx (2 cos^2 - 1)/8 pi S    xx,yy 1/8 pi S      xx,xy -cos/4 pi S    xy,xy 1/2 pi S
        K_2: xx,xx -cos S/2 pi             xx,yy (pi-t)/2 pi   xx,xy S/pi           xy,xy 4 (pi-t)/2 pi
    """
    xp = array_module(cos)
    sin = xp.sqrt(xp.maximum(1 - cos * cos, 0))
    w = xp.maximum(1 - abs(cos), 0)
    spread = (2 * cos * cos - 1) * fourth + 6 * x2y2 - 4 * cos * mixed  # vanishes like S^2: dropped where S is rounding
    first = xp.where(sin > 1e-7, spread / xp.maximum(sin, 1e-7), 0) / (16 * np.pi)
    second = (6 * xp.arctan2(sin, -cos) * x2y2 + sin * (4 * mixed - cos * fourth)) / (4 * np.pi)
    scale = (1 - p) / p
    return angular_moment(w, cos >= 0, 1) + scale * first, angular_moment(w, cos >= 0, 2) + scale * second


@np.errstate(under="ignore")
def series_moments(X, Y, density):
    """(Kp_1, Kp_2) by "series" for all pairs of the rows of X (N, d) and Y (M, d): two float64 arrays (N, M).

    The sums over coordinates are three matrix products, [X^3 X] [Y Y^3]^T one of them; in blocks.
    """
    density, (xp, X, Y) = check_density(density), matrices(X, Y)
    first, second = xp.empty((2, len(X), len(Y)))
    units = []
    for Z in (X, Y):
        Z, e = scaled(Z.astype(np.float64))
        length = xp.sqrt((Z * Z).sum(1))
        Z /= xp.where(length > 0, length, 1)[:, None]
        units.append((Z, Z * Z, Z**3, (Z**4).sum(1), xp.ldexp(length, e)))
    (A, A2, A3, A4, a), (B, B2, B3, B4, b) = units
    side = 512

    def block(corner):
        i, j = (slice(k, k + side) for k in corner)
        sums = A[i] @ B[j].T, A4[i, None] + B4[j], A2[i] @ B2[j].T, A3[i] @ B[j].T + A[i] @ B3[j].T
        scale = a[i, None] * b[j]
        for k in range(0, len(scale), 64):
            k1, k2 = series_unit(*(z[k : k + 64] for z in sums), density)
            first[i, j][k : k + 64] = scale[k : k + 64] * k1
            second[i, j][k : k + 64] = scale[k : k + 64] ** 2 * k2

    corners = [(i, j) for i in range(0, len(X), side) for j in range(0, len(Y), side)]
    in_threads(block, corners) if xp is np else [block(c) for c in corners]
    return first, second


# ---------------------------------------------------------------------------------------------- sparse, exactly
#
# docs/theory.md derives what follows (section 4) and says how large its errors are (section 5).
# Given the mask, w x cos a + w y sin a has variance Q_a = sum over kept i of q_i, p q_i = (x_i cos a + y_i sin a)^2;
#     F(a) = E Q_a log Q_a,    G(a) = E Q_a^2 log Q_a,    and for |x| = |y| = 1 with C = sum x_i y_i / p over the mask
#     4 Kp_1 = 2/pi + x.y + 1/pi^2 int [(F(a) + F(-a))/2 - cos^2 a F(0) - sin^2 a F(pi/2)] / (sin a cos a)^2 da
#     4 Kp_2 = E (w x)^2 (w y)^2 + 4/pi E C (Q_0 + Q_pi/2) + 2/pi^2 int [(G(a) - G(-a)) / 2 sin 2a - cos^2 a g_0 -
#              sin^2 a g_1] / (sin a cos a)^2 da,   g_0, g_1 the limits of the quotient at 0 and pi/2,
# over 0 < a < pi/2. Both are linear in the law of Q, and two parts of it are taken out with their known values: the
# dense law, and masks that keep one coordinate or only parallel ones (equal x_i : y_i).
# F and G at one angle are integrals of the Laplace transform M(m) = E exp(-m Q) over m^-2 dm and m^-3 dm, less that of
# a reference law: the trapezoidal rule in log m, two nodes an octave; below the first node the Taylor series.

TERMS = 14
STEP, REACH, REACH_2 = 0.5, 10.0, 7.0  # nodes v of the coarsest rule, the largest |v| for F and for G
FINEST = STEP / 16


def exact_pair(x, y, p, rtol):
    """(Kp_1, Kp_2, estimated relative error) for x, y (d,) that are not both zero in any coordinate."""
    xp = array_module(x)
    x_length, y_length = (math.sqrt(float(z @ z)) for z in (x, y))
    if x_length == 0 or y_length == 0:
        return 0.0, 0.0, 0.0
    x, y = x / x_length, y / y_length
    scale, d = x_length * y_length, len(x)
    near, far = float((x - y) @ (x - y)) / 2, float((x + y) @ (x + y)) / 2  # 1 - cos t, 1 + cos t without cancellation
    if min(near, far) < 1e-26:  # parallel: Kp_l = E (w x)^2l / 2, opposite: 0
        return (near < far) * scale / 2, (near < far) * scale**2 * 1.5 * (1 + (1 - p) / p * float((x**4).sum())), 0.0
    cos, acute, u = (far - near) / 2, near <= far, x - y if near <= far else x + y
    one = (1 - p) ** (d - 1)  # P(all other coordinates are masked)
    fourth = (1 - p) * hit(d - 2, p) / p  # over masks of two coordinates or more E Q^2 = 1 + fourth sum q_i^2
    smallest = float((u**4).sum()) / float(u @ u) ** 2  # sum q_i^2 / (sum q_i)^2 at the angle where sum q_i is smallest
    mean2 = 1 + fourth * smallest
    dense = [float(angular_moment(np.array(min(near, far)), acute, order)) for order in (1, 2)]
    both, x2y2, mixed = xp.maximum(x * y, 0), float((x * x) @ (y * y)), float((x * y) @ (x * x + y * y))
    first = hit(d - 1, p) * dense[0] + one / 2 * float(both.sum())
    second = (mean2 * dense[1] + 1.5 * one / p * float(both @ both) + (2 * (1 - mean2) * cos + fourth * mixed) / math.pi
              + ((1 - mean2) * (1 + 2 * cos**2) + 3 * fourth * x2y2) / 4)
    c_1, s_1, weight, weight_2 = parallel_masks(to_host(x), to_host(y), p)
    first += weight @ (np.maximum(c_1 * s_1, 0) / 2 - c_1 * s_1 / 4 - 1 / (4 * np.pi))
    second += weight_2 @ (1.5 * np.maximum(c_1 * s_1, 0) ** 2 - 0.75 * (c_1 * s_1) ** 2 - c_1 * s_1 / np.pi)

    W = -float(beyond_one(xp.full((d, 1), -1.0), p)[0])  # P(a mask keeps two coordinates or more)
    if W < 1e-250:
        return one / 2 * float(both.sum()) * scale, 1.5 * one / p * float(both @ both) * scale**2, 0.0
    leverage = float(((x + y) ** 2 / (4 * far) + (x - y) ** 2 / (4 * near)).max())  # largest q_i / sum q at any angle
    unit = max(hit(d - 1, p) / W, leverage / p)  # the scale of Q / E Q, the same at every angle

    def profiles(v):
        """What is left of F and G at the angles a and -a, tan a = e^v: two arrays (2, len(v))."""
        c, s = 1 / np.sqrt(1 + np.exp(2 * v)), 1 / np.sqrt(1 + np.exp(-2 * v))
        c, s = np.concatenate([c, c]), np.concatenate([s, -s])
        F, G = np.empty((2, len(c)))
        columns = max(16, BLOCK // 2 // d) if xp is np else len(c)
        for k in range(0, len(c), columns):
            part = slice(k, k + columns)
            q = (x[:, None] * xp.asarray(c[part]) + y[:, None] * xp.asarray(s[part])) ** 2  # (d, columns)
            mean = xp.maximum(q.sum(0), 1e-300)
            q /= mean
            f, g = laplace(q, p, W, unit)
            excess = fourth * ((q * q).sum(0) - smallest)
            F[part], G[part] = to_host(mean * f), to_host(mean**2 * (g + excess * xp.log(mean)))
        Q = (c * c_1[:, None] + s * s_1[:, None]) ** 2  # (classes of parallel coordinates, angles)
        kink = Q * np.log(np.maximum(Q, 1e-300))
        return (F - weight @ kink).reshape(2, -1), (G - weight_2 @ (Q * kink)).reshape(2, -1)

    def integrals(v, F, G, step):
        c, s = 1 / np.sqrt(1 + np.exp(2 * v)), 1 / np.sqrt(1 + np.exp(-2 * v))
        tail = 1 / math.expm1(step)  # sum of exp(-k step), k >= 1: the nodes beyond the last
        f = ((F[0] + F[1]) / 2 - c * c * ends[0][0, 0] - s * s * ends[0][0, 1]) / (c * s)
        inner = abs(v) <= REACH_2 + step / 2
        c, s, g = c[inner], s[inner], ((G[0] - G[1]) / (4 * c * s))[inner]
        k = max(1, round(STEP / step)) * np.arange(3)
        g = (g - c * c * limit((s / c)[k] ** 2, g[k]) - s * s * limit((c / s)[-1 - k] ** 2, g[-1 - k])) / (c * s)
        sums = np.array([f.sum() + (f[0] + f[-1]) * tail, g.sum() + (g[0] + g[-1]) * tail]) * step
        return np.array([first, second]) + sums / (np.pi**2 * np.array([4, 2]))

    ends = profiles(np.array([-np.inf, np.inf]))
    step, v = STEP, np.arange(-REACH, REACH + STEP / 2, STEP)
    F, G = profiles(v)
    value = integrals(v, F, G, step)
    change = abs(value - integrals(v[::2], F[:, ::2], G[:, ::2], 2 * step)) / abs(value) + 1e-16
    error = math.inf
    while error > rtol and step > FINEST:
        step /= 2
        old, new = (v, F, G), v[:-1] + step
        v, F, G = (np.empty((*z.shape[:-1], len(v) + len(new))) for z in old)
        for whole, even, odd in zip((v, F, G), old, (new, *profiles(new))):
            whole[..., ::2], whole[..., 1::2] = even, odd
        before, value = value, integrals(v, F, G, step)
        earlier, change = change, abs(value - before) / abs(value) + 1e-16
        error = np.maximum(change * np.clip(12 * (change / earlier) ** 2, 1 / 12, 1), earlier / 50).max()
    # Where vectors are nearly opposite, Kp_l is the small rest of much larger terms.
    rounding = max(1e-12 * hit(d - 1, p) / abs(value[0]), 5e-10 * mean2 / abs(value[1]))
    return value[0] * scale, value[1] * scale**2, max(error, rounding)


def limit(t, g):
    """The value at 0 of the parabola through three points (t, g)."""
    return sum(g[i] * t[i - 1] * t[i - 2] / ((t[i - 1] - t[i]) * (t[i - 2] - t[i])) for i in range(3))


def parallel_masks(x, y, p):
    """Masks of two or more coordinates, all of one ratio x_i : y_i, for every ratio that occurs more than once.

    Returns four arrays: its direction (cos, sin), E Q and E Q^2 over these masks, Q = sum (x_i^2 + y_i^2)/p.
    """
    key = np.round(np.arctan2(y, x) % np.pi * 1e10) % round(np.pi * 1e10)  # equal up to rounding of x / |x|
    _, index, label, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    size = x * x + y * y
    total, square = (np.bincount(label, weights=z)[count > 1] for z in (size, size * size))
    index, count = index[count > 1], count[count > 1]
    alone = (1 - p) ** (len(x) - count)  # P(all coordinates of other ratios are masked)
    length = np.sqrt(size[index])
    return (x[index] / length, y[index] / length, alone * hit(count - 1, p) * total,
            alone * (total**2 + (1 - p) * hit(count - 2, p) / p * square))


def hit(n, p):
    """P(a mask keeps any of n given coordinates)."""
    return -np.expm1(n * math.log1p(-p))


def laplace(q, p, W, unit):
    """E Q log Q and E Q^2 log Q, Q = sum over the mask of q_i / p, over masks of two coordinates or more.

    q: (d, columns), each column sums to 1. The reference law has R = W exp(-m a)(1 + m^2 b / 2), where W is the
    probability of these masks, a and b the mean and variance of Q / unit given one of them.
    """
    xp, d = array_module(q), len(q)
    q = q / (p * unit)

    # Taylor coefficients of E exp(-m Q): those of log(1 - p + p exp(-z)) times sums of powers of q_i, then of exp.
    factor = [(-1) ** k * p / math.factorial(k) for k in range(TERMS)]
    log_factor, log_M, M, power = [0.0], [0.0], [1.0], 1.0
    moment = [W]
    for k in range(1, TERMS):
        less = sum(j * log_factor[j] * factor[k - j] for j in range(1, k)) / k
        more = sum(j * log_M[j] * M[k - j] for j in range(1, k)) / k
        power = power * q
        total = power.sum(0)
        log_factor.append(factor[k] - less)
        log_M.append(log_factor[k] * total)
        M.append(more + log_M[k])
        moment.append(more + (hit(d - 1, p) * factor[k] - less) * total)  # without one coordinate: one factor[k] total
    a = -moment[1] / W
    b = xp.maximum(2 * moment[2] / W - a * a, 0)
    gap = [moment[k] - W * (-a) ** (k - 2) * (a * a / (k * (k - 1)) + b / 2) / math.factorial(k - 2)
           for k in range(3, TERMS)]  # Taylor coefficients of M - R, from m^3 on
    spacing, integral, integral_2 = math.log(2) / 2, 0, 0  # of M - R over m^-2 dm and m^-3 dm
    for m in (0.25, 0.25 * math.sqrt(2)):
        for k, coefficient in enumerate(gap, 3):  # the nodes below m, in geometric progression
            integral = integral + spacing * coefficient * m ** (k - 1) / (2 ** (k - 1) - 1)
            integral_2 = integral_2 + spacing * coefficient * m ** (k - 2) / (2 ** (k - 2) - 1)
        g = xp.expm1(-m * q)
        work, largest = xp.empty_like(g), math.inf
        while largest > 1e-12 * W * m:
            difference = beyond_one(g, p) - W * (xp.expm1(-m * a) + m * m / 2 * b * xp.exp(-m * a))
            integral += spacing / m * difference
            integral_2 += spacing / m**2 * difference
            largest = float(abs(difference).max())
            g *= xp.add(g, 2, out=work)  # e^-2q - 1 = g (g + 2)
            m *= 2
    log = xp.log(a)
    first = W * (a * log + b / (2 * a)) + integral
    second = W * (a * a * log + b / 2 * (2 * log + 3)) - 2 * integral_2
    return unit * (first - math.log(unit) * moment[1]), unit**2 * (second + 2 * math.log(unit) * moment[2])


def beyond_one(g, p):
    """E [exp(-m Q) - 1] over masks of two coordinates or more, for g_i = exp(-m q_i) - 1: g (d, columns) -> (columns,).

    That is prod(1 + p g_i) - 1 - (1-p)^(d-1) sum p g_i. The product without its terms of order 0 and 1 is built up in a
    tree from the (sum, rest) of halves, so that nothing is lost where p or m is small.
    """
    xp, d = array_module(g), len(g)
    n = (d + 1) // 2
    total, rest = xp.zeros((2, n, *g.shape[1:])) if d % 2 else xp.empty((2, n, *g.shape[1:]))
    xp.add(g[: d - n], g[n:], out=total[: d - n])
    xp.multiply(g[: d - n], g[n:], out=rest[: d - n])
    if d % 2:
        total[-1] = g[n - 1]
    total *= p
    rest *= p * p
    while n > 1:
        half = (n + 1) // 2
        low, high = slice(0, n - half), slice(half, n)
        product = total[low] + rest[low]
        product *= total[high] + rest[high]
        product += rest[high]
        rest[low] += product
        total[low] += total[high]
        n = half
    return rest[0] + hit(d - 1, p) * total[0]


# ---------------------------------------------------------------------------------------------- Theorem 1


@np.errstate(under="ignore")
def kernel_distance(x, y, width, density, method="exact", split=False, **options):
    """E (Theta(x,y) - K_1(x,y)/d)^2 over random networks (Theorem 1), for pairs x, y (..., d): an array (...).

        [Kp_1 - K_1]^2 / d^2  +  [Kp_2 - Kp_1^2] / (d^2 width)

    split: return the two terms, squared bias and variance, instead of their sum. method, options: see sparse_moments.
    """
    width, (xp, x, y) = real(width, "width", positive=True), pairs(x, y)
    d, (x, a), (y, b) = x.shape[-1], scaled(x), scaled(y)
    first, second = sparse_moments(x, y, density, method, **options)[:2]
    dense = relu_moment((x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1), 1)
    bias, variance = ((first - dense) / d) ** 2, (second - first**2) / (d * d * width)
    bias, variance = (xp.ldexp(z, 2 * (a + b)) for z in (bias, variance))
    return (bias, variance) if split else bias + variance


def kernel_distance_formula(width, density, d):
    """The paper's approximation of Theorem 1 for pd >> 1 (Eq. 4): (1/4d) [(p^(-1/2) - 1)^2 / 4 + (d/n)(1 - 1/pi^2)].

    Numbers, or arrays that broadcast.
    """
    given, xp = (width, density, d), array_module(width, density, d)
    width, density, d = (xp.asarray(z) for z in given)
    if {z.dtype.kind for z in (width, density, d)} <= set("biuf"):
        width, density, d = (z.astype(np.float64) for z in (width, density, d))
        if (width > 0).all() and (d > 0).all() and (density > 0).all() and (density <= 1).all():
            return (((density**-0.5 - 1) ** 2 / 4 + d / width * (1 - 1 / np.pi**2)) / (4 * d))[()]
    raise ValueError("width and d are positive numbers and density is above 0 and at most 1, "
                     f"not {given[0]}, {given[2]} and {given[1]}")


def optimal_density(weights_per_input, d):
    """The density p at which Eq. 4 is smallest at fixed n p = weights_per_input: the paper's p*, close to sqrt(np/4d).

    With r = p^(-1/2), c = 4 (d / n p)(1 - 1/pi^2), Eq. 4 is stationary where r^4 - r^3 = c: one root r > 1.
    """
    weights_per_input, d = real(weights_per_input, "weights_per_input", positive=True), real(d, "d", positive=True)
    roots = np.roots([1, -1, 0, 0, -4 * d / weights_per_input * (1 - 1 / np.pi**2)])
    return float(roots[abs(roots.imag) < 1e-9 * abs(roots)].real.max() ** -2)


def optimal_width(x, y, weights, method="exact", widths=None, resamples=0, rng=None, **options):
    """(width, distance): the integer width n at which the mean kernel_distance over the pairs x, y (..., d) is smallest
    when the first layer keeps a fixed number of weights, so that the density is p = weights / (n d).

    weights: that number, or a function of the width that returns it (a mask's rule may share a budget among layers).
    widths: (least, greatest); by default from density 1 to one weight a unit. The result can be an end of them: for
        vectors of independent normal entries the distance falls up to the last. method, options: see sparse_moments.
    resamples: find it this many times more, each time of as many pairs, drawn from these with replacement by rng, and
    return (width, distance, (low, high)): between low and high lie 95 % of the widths found.
    Thirteen widths in geometric progression bracket the minimum, and the least value of a smooth curve through all that
    is known (Akima's, of the logarithms) says where to look next, until both neighbours of the best width are known.
    That is right when the distance has one valley between the neighbours of the best of the thirteen. Resamples are
    judged by these curves, which find their widths to a few per cent.
    """
    from scipy.interpolate import Akima1DInterpolator

    _, x, y = pairs(x, y)
    d = x.shape[-1]
    if not (x.size and y.size):
        raise ValueError("optimal_width takes one pair x, y or more, and here is none")
    weights = weights if callable(weights) else real(weights, "weights", positive=True)
    count = weights if callable(weights) else lambda width: weights
    if widths is None:
        if callable(weights):
            raise ValueError("with weights a function of the width, optimal_width needs widths=(least, greatest)")
        widths = math.ceil(weights / d), max(int(weights), 1)
    widths = [whole(n, "each of widths", 1) for n in listed(widths, "widths")]
    if len(widths) != 2 or widths[0] > widths[1]:
        raise ValueError(f"widths is (least, greatest), two positive integers in this order, not {tuple(widths)}")
    if whole(resamples, "resamples"):
        check_rng(rng, "an interval by resampling")
    if method == "sample":
        options = {**options, "rng": rng}

    def distances(width):
        """Of each pair"""
        kept = real(count(width), f"the weights of a first layer of width {width}", positive=True)
        if kept > width * d * (1 + 1e-9):
            raise ValueError(f"a first layer of width {width} and {d} inputs cannot keep {kept:,} weights: its widths "
                             f"begin at {math.ceil(kept / d):,}")
        return to_host(kernel_distance(x, y, width, min(kept / (width * d), 1.0), method, **options)).reshape(-1)

    def curve(at, values, candidates):
        """Between values (widths,) or (widths, pairs) at these widths; of one, that value everywhere"""
        if len(at) == 1:
            return np.repeat(values, len(candidates), axis=0)
        logarithm = np.log(np.clip(values, 1e-300, 1e300))
        return np.exp(Akima1DInterpolator(np.log(at), logarithm, method="makima")(np.log(candidates)))

    def some(low, high):
        """Up to 2,000 integers from low to high, in geometric progression"""
        return np.unique(np.geomspace(low, high, 2000).round().astype(np.int64))

    known = {n: distances(n) for n in sorted({round(n) for n in np.geomspace(*widths, 13)})}
    while True:
        mean = {n: float(known[n].mean()) for n in sorted(known)}
        best, at = min(mean, key=mean.get), list(mean)
        i = at.index(best)
        between = some(at[max(i - 1, 0)], at[min(i + 1, len(at) - 1)])
        lowest = int(between[curve(at, list(mean.values()), between).argmin()])
        unknown = [n for n in (lowest, best - 1, best + 1)
                   if n not in known and widths[0] <= n <= widths[1]]
        if not unknown:
            break
        known[unknown[0]] = distances(unknown[0])
    if not resamples:
        return best, mean[best]
    candidates = some(*widths)
    table = curve(at, [known[n] for n in at], candidates)  # (candidates, pairs)
    drawn = rng.integers(table.shape[1], size=(resamples, table.shape[1]))
    found = sorted(int(candidates[table[:, pairs_drawn].mean(1).argmin()]) for pairs_drawn in drawn)
    outside = int(0.025 * resamples)  # at each end
    return best, mean[best], (found[outside], found[-1 - outside])


# ---------------------------------------------------------------------------------------------- networks and regression


@np.errstate(under="ignore")
def measured_kernel(X, Y, width, density, rng):
    """Theta(x,y) = (1/nd) sum_k relu(u_k x) relu(u_k y) of one random network, for all pairs of the rows of X (N, d)
    and Y (M, d) (X itself if None): (N, M).

    u is (width, d), its entries N(0, 1/density) with probability density, else 0, drawn from rng, a NumPy generator.
    """
    density, width, (xp, X, Y) = check_density(density), whole(width, "width", 1), matrices(X, Y)
    check_rng(rng, "measured_kernel")
    d = X.shape[1]
    u = np.zeros((width, d))
    kept = rng.random((width, d)) < density
    u[kept] = rng.standard_normal(int(kept.sum())) / math.sqrt(density)
    u = xp.asarray(u, dtype=X.dtype)
    hidden = xp.maximum(X @ u.T, 0)  # (N, width)
    return hidden @ (hidden if X is Y else xp.maximum(Y @ u.T, 0)).T / (width * d)


class Prediction(NamedTuple):
    labels: np.ndarray  # (M,) predicted classes of the test inputs
    scores: np.ndarray  # (M, classes) the regression's values
    noise: float  # chosen, in units of the mean of the kernel's diagonal
    held_out_accuracy: float  # with that noise


def gp_predict(kernel, labels, cross, noises=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), held_out=0.2, rng=None):
    """Gaussian-process regression: scores = cross (kernel + noise mean(diag kernel) I)^-1 onehot(labels).

    kernel: (N, N) between training inputs; labels: (N,) integers from 0; cross: (M, N) between test and training.
    noises: the one with the best accuracy (then the least squared error) on held-out training inputs is used with all.
    held_out: their fraction. rng: a NumPy generator that picks them; None takes the last.
    By SciPy's Cholesky factorisation on the CPU; ValueError when a matrix is not positive definite.
    """
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    kernel, labels, cross = (to_host(z) for z in (kernel, labels, cross))
    check_real("kernel and cross are matrices", kernel, cross)
    kernel, held_out = kernel.astype(np.result_type(kernel, np.float32), copy=False), real(held_out, "held_out")
    if rng is not None:
        check_rng(rng, "gp_predict")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise ValueError(f"labels are integers from 0, of shape (N,), not {labels.dtype} of shape {labels.shape}"
                         + (f" from {labels.min()}" if labels.size and labels.dtype.kind in "biuf" else ""))
    labels = labels.astype(np.int64)
    N, noises = len(labels), [real(noise, "each of noises") for noise in listed(noises, "noises")]
    if not noises:
        raise ValueError("noises is a list of one number or more, and this one is empty")
    if kernel.shape != (N, N) or cross.ndim != 2 or cross.shape[1] != N:
        raise ValueError(f"{N} labels need a kernel of shape ({N}, {N}) and cross of shape (M, {N}), "
                         f"not {kernel.shape} and {cross.shape}")
    if not 0 < round(held_out * N) < N:
        raise ValueError(f"held_out is a fraction that leaves some of the {N} examples on both sides, not {held_out!r}")
    check_finite("kernel and cross are matrices", kernel, cross)
    if abs(kernel - kernel.T).max() > 1e-3 * abs(kernel).max():
        raise ValueError("the kernel between training inputs is a symmetric matrix, and this one is not")
    target = np.eye(labels.max() + 1, dtype=kernel.dtype)[labels]  # (N, classes)
    unit = float(np.mean(np.diag(kernel)))

    def solve(rows, noise):
        matrix = kernel[np.ix_(rows, rows)]
        matrix[np.diag_indices(len(rows))] += noise * unit
        try:
            return cho_solve(cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False), target[rows])
        except LinAlgError:
            raise ValueError(f"the kernel of {len(rows)} inputs with noise {noise:g} is not positive definite: "
                             "take a greater noise, or float64") from None

    order = np.arange(N) if rng is None else rng.permutation(N)
    fit, held = np.split(order, [N - round(held_out * N)])
    trials = []
    for noise in noises:
        scores = kernel[np.ix_(held, fit)] @ solve(fit, noise)
        trials.append((np.mean(scores.argmax(1) == labels[held]), -np.mean((scores - target[held]) ** 2), noise))
    accuracy, _, noise = max(trials)
    scores = cross @ solve(np.arange(N), noise)
    return Prediction(scores.argmax(1), scores, noise, float(accuracy))
