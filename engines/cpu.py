"""The engine of the CPU: NumPy, and of a masked weight of low density the kept entries alone, see sparse.py.

Where BLAS multiplies, it uses as many threads as it is allowed to, beside convolutions one: see host.OneBlasThread.
"""

import contextlib
import importlib.metadata
import math

import numpy as np

from engines import convolution, host, normalization, output_size, pool_size, sparse
from engines.sparse import gather


def of_kept(array, pattern):
    """What a flat array of a weight's entries holds of the kept ones, all without a pattern; it may hold no others."""
    return array if pattern is None or len(array) == len(pattern.kept) else gather(array, pattern.kept)


class Engine:
    """All functions take and return NumPy arrays."""

    name, xp, moved, narrow = "cpu", np, 0, None
    def __init__(self):
        self.densities = {}  # those that were needed, of sparse.measured or of the run that goes on
        self.blas = contextlib.nullcontext()  # what the products of linear layers are done in

    def state_dict(self, measured=False):
        """What decides how sums are rounded, and is not the same in every process, as far as it was needed; measured:
        even if it was not.
        """
        for kind in sparse.TYPICAL if measured else ():
            self.density(kind)
        return {kind: np.asarray(density) for kind, density in self.densities.items()}

    def load_state_dict(self, state):
        """Compute as the engine that gave this state, and where it does not say as this machine does it best."""
        if unknown := set(state) - set(sparse.TYPICAL):
            raise ValueError(f"there is no kind of product called {min(unknown)!r}")
        self.densities = {kind: float(density) for kind, density in state.items()}

    def density(self, kind):
        """The density of a masked weight below which a product with the kept entries alone is cheaper than this kind"""
        if kind not in self.densities:
            self.densities = sparse.measured(kind) | self.densities
        return self.densities[kind]

    def cheaper(self, kind, pattern, *cost):
        """Whether a product with the kept entries alone is cheaper than a dense one of this kind; cost: see sparse."""
        if pattern is None:
            return False
        ours, dense = sparse.cost(len(pattern.kept), *cost), pattern.size * math.prod(cost[:2])
        return ours < dense and ours < dense * self.density(kind)  # the first whatever the machine

    def to_host(self, array):
        return array

    def synchronize(self):
        """Wait until all is computed."""

    def memory(self):
        """Bytes held on a GPU"""
        return 0

    def versions(self):
        """What a record of a run needs to know of the device."""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return {"numba": importlib.metadata.version("numba")}
        return {}

    def compiled(self, function):
        """The function, or one that does the same faster."""
        return function

    # ---- parameters

    def parameter(self, array):
        """A parameter's array in the order in which it is stored."""
        return np.asarray(array, order="C")

    def pattern(self, mask):
        """The Pattern of a mask of low density, else None."""
        return sparse.Pattern(mask) if mask.mean() < sparse.FEW else None

    def masked(self, g, mask, pattern):
        """The gradient of a masked parameter, zero where masked, or with a pattern of the kept entries alone, (kept,);
        g may be that already.
        """
        if pattern is not None:
            return of_kept(g.reshape(-1), pattern)
        bits = g.view(f"i{g.itemsize}")  # and all of -1 or none of 0: unlike g * mask, inf and NaN become zero too
        np.bitwise_and(bits, -mask.view(np.int8), out=bits)
        return g

    def whole(self, kept, pattern):
        """What `masked` gave for a pattern, in the weight's shape"""
        out = np.zeros(pattern.shape, kept.dtype)
        out.reshape(-1)[pattern.kept] = kept
        return out

    def add(self, x, y):
        """x + y of two gradients of one shape"""
        return normalization.add(x, y) if x.ndim == 4 else np.asarray(x + y)

    # ---- linear layers and loss

    def linear(self, x, w, b, pattern):
        """x (N, in), w (out, in), b (out,) or None -> (x w^T + b (N, out), what the gradients need)"""
        if self.cheaper("linear", pattern, len(x)):
            xT = np.ascontiguousarray(x.T)  # (in, N): one contiguous row for each input
            out = sparse.linear(xT, w, pattern)
        else:
            xT = None
            with self.blas:
                out = x @ w.T
        if b is not None:
            out += b
        return out, xT

    def linear_gradients(self, g, x, w, b, pattern, xT, wanted):
        """dx = g w, dw = g^T x, db = sum of g, of those that are wanted; dw perhaps of the kept entries alone"""
        dx = dw = db = None
        with self.blas:
            if wanted[0] and self.cheaper("linear", pattern, len(x)):
                dx = sparse.linear_input_gradient(np.ascontiguousarray(g.T), w, pattern)
            elif wanted[0]:  # the product in the order in which x is stored, so that what follows runs along memory
                dx = g @ w if x.flags.c_contiguous else (w.T @ g.T).T
            if wanted[1] and self.cheaper("linear gradient", pattern, len(x)):
                xT = np.ascontiguousarray(x.T) if xT is None else xT
                dw = sparse.linear_weight_gradient(np.ascontiguousarray(g.T), xT, pattern)
            elif wanted[1]:
                dw = g.T @ x if x.flags.c_contiguous else np.ascontiguousarray((x.T @ g).T)
        if wanted[2]:
            db = g.sum(axis=0)
        return dx, dw, db

    def cross_entropy(self, logits, labels, gradient):
        """logits (N, K), labels (N,) -> (mean of -log softmax(logits)[label], sums, what the gradient needs)

        sums: of the loss and of correct answers, (2,) of float64.
        """
        N = len(labels)
        columns, correct = np.arange(N), (logits.argmax(axis=1) == labels).sum()
        z = np.array(logits.T, order="C")  # (K, N): reductions over classes then run along memory
        z -= z.max(axis=0)
        with np.errstate(under="ignore"):  # whatever the program does about it elsewhere
            p = np.exp(z)
        total = p.sum(axis=0)
        loss = (np.log(total) - z[labels, columns]).mean()
        return loss, np.array([loss.astype(np.float64) * N, correct]), (p, total, labels, columns)

    def cross_entropy_gradient(self, g, saved):
        """dlogits = g (softmax(logits) - onehot(label)) / N"""
        p, total, labels, columns = saved
        dz = p / total
        dz[labels, columns] -= 1
        dz *= g / len(labels)
        return dz.T

    # ---- images

    def weights(self, w):
        """What the next two functions take for weights w (O, C, kh, kw)"""
        return w

    def conv(self, x, w, stride, padding, pattern=None):
        """x (N, C, H, W), w (O, C, kh, kw) -> (N, O, H', W')"""
        if x.dtype != w.dtype or x.dtype.kind != "f":
            raise ValueError(f"conv2d takes images and weights of one floating type, not {x.dtype} and {w.dtype}; "
                             "convert one with .astype")
        self.blas = host.one_blas_thread  # from now on: linear layers are used beside convolutions
        size = output_size(x.shape, w.shape, stride, padding)
        pixels = math.prod(size)
        if self.cheaper(convolution.kind(w.shape, stride, size), pattern, len(x), pixels, pixels):
            return sparse.forward(x, w, pattern, stride, padding)
        return convolution.forward(x, w, stride, padding)

    def conv_input_gradient(self, g, w, shape, stride, padding, pattern=None):
        """dx of this shape, from g (N, O, H', W')"""
        pixels = math.prod(g.shape[2:])
        calls = math.prod(-(-n // stride) * min(k, stride) for n, k in zip(shape[2:], w.shape[2:]))
        if self.cheaper(convolution.kind(w.shape, stride, shape[2:]), pattern, len(g), pixels, calls):
            return sparse.input_gradient(g, w, pattern, shape, stride, padding)
        return convolution.input_gradient(g, w, shape, stride, padding)

    def conv_weight_gradient(self, g, x, shape, stride, padding, pattern=None):
        """dw of this shape, or of the kept entries alone, from g (N, O, H', W') and x (N, C, H, W)"""
        pixels, kind = math.prod(g.shape[2:]), convolution.kind(shape, stride, g.shape[2:])
        if self.cheaper(f"{kind} gradient", pattern, len(x), pixels, shape[0]):
            return sparse.weight_gradient(g, x, pattern, stride, padding)
        return convolution.weight_gradient(g, x, shape, stride, padding)

    batch_norm = staticmethod(normalization.batch_norm)
    batch_norm_gradients = staticmethod(normalization.batch_norm_gradients)

    def max_pool(self, x, size, stride, padding):
        """(the largest entry of each window of x (N, C, H, W), what the gradient needs)"""
        views, _ = windows(x, size, stride, padding, -np.inf)
        out = views[0].copy("K")
        for view in views[1:]:
            np.maximum(out, view, out=out)
        return out, (x, out)

    def max_pool_gradient(self, g, saved, shape, size, stride, padding):
        """dx = g at the first of the largest entries"""
        x, out = saved
        views, _ = windows(x, size, stride, padding, -np.inf)
        targets, full = windows(np.zeros_like(x), size, stride, padding, 0)
        waiting = np.ones(out.shape, bool)
        for view, target in zip(views, targets):
            here = waiting & (view == out)
            waiting &= ~here
            target += g * here
        return full[:, :, padding : padding + shape[2], padding : padding + shape[3]]

    def mean_pool(self, x):
        """(N, C, H, W) -> the mean over each image (N, C)"""
        return x.sum(axis=(2, 3)) * (1 / (x.shape[2] * x.shape[3]))

    def mean_pool_gradient(self, g, shape, dtype):
        """dx = g / (H W), repeated over each image"""
        return np.broadcast_to((g * (1 / (shape[2] * shape[3])))[:, :, None, None], shape)

    # ---- optimiser

    def velocity(self, data):
        """The velocity of a parameter before the first step"""
        return None

    def velocity_to_host(self, v):
        """(size,), or of the kept entries alone where only they take part"""
        return v.copy()

    def velocity_from_host(self, flat, data, pattern):
        """flat: (size,), of all entries"""
        return np.array(of_kept(flat, pattern), dtype=data.dtype)

    def rate(self, lr, before):
        """What sgd takes for the learning rate lr; before: what this returned the last time."""
        return lr

    def sgd(self, params, velocities, lr, momentum, weight_decay, nesterov):
        """One step by the rule of nn.SGD, in place, of params [(data, gradient or None, mask, pattern)]; returns the
        new velocities, flat and of the entries that take part.
        """
        velocities = list(velocities)
        for i, (data, grad, _, pattern) in enumerate(params):
            if grad is None:
                continue
            w, part = data.reshape(-1), slice(None) if pattern is None else pattern.kept  # (size,), a view
            g = of_kept(grad.reshape(-1), pattern)
            if weight_decay:
                g = g + weight_decay * w[part]
            if momentum:
                v = velocities[i]
                v = velocities[i] = g.copy() if v is None else momentum * v + g
                g = g + momentum * v if nesterov else v
            w[part] -= lr * g
        return velocities

    # ---- batches

    def Batches(self, *arguments):
        return Batches(*arguments)

    def normalized(self, pixels, scale, shift):
        """pixels (N, H, W, C) of uint8 -> pixels scale + shift, (N, C, H, W) of float32, for convolutions"""
        N, H, W, C = pixels.shape
        x = host.empty((N, C, H, W), np.float32, halo=3)  # the border that a 7 x 7 kernel needs
        for y, row in enumerate(host.rows(x)):  # of all images: it stays in the cache
            row[...] = pixels[:, y].transpose(2, 1, 0)  # (N, W, C) -> (C, W, N)
            row *= scale[:, None, None]
            row += shift[:, None, None]
        return x

    def upload(self, labels):
        return np.asarray(labels, np.int64)


def windows(x, size, stride, padding, outside):
    """size^2 views of x (N, C, H, W): the entry (i, j) of every window; and the padded array that they look into."""
    N, C, H, W = x.shape
    if padding:
        full = np.full((H + 2 * padding, C, W + 2 * padding, N), outside, x.dtype).transpose(3, 1, 0, 2)
        full[:, :, padding : padding + H, padding : padding + W] = x
        x = full
    h, w = (stride * (n - 1) + 1 for n in pool_size((N, C, H, W), size, stride, padding))
    return [x[:, :, i : i + h : stride, j : j + w : stride] for i in range(size) for j in range(size)], x


class Batches:
    """Batches of images (n, C, H, W) of uint8 with labels (n,), in any order: image * scale + shift in float32.

    scale, shift: arrays that broadcast to (C, H, W). padding: black pixels around an image for `cropped`.
    """

    def __init__(self, images, labels, scale, shift, padding=0):
        self.images, self.labels, self.scale, self.shift, self.padding = images, labels, scale, shift, padding
        self.raw, self.buffers, self.turn = np.empty((0, *images.shape[1:]), np.uint8), [], 0
        self.begin()

    def begin(self, order=None, draws=None):
        """order: (m,) of the rows to come, None: all; draws (3, m): `cropped`'s arguments for each, None: none.

        prefetch: whether the next batch is worth preparing while one is in use.
        """
        self.order, self.draws = np.arange(len(self.labels)) if order is None else order, draws
        self.prefetch = draws is not None
        if len(self.buffers) != 1 + self.prefetch:  # without prefetching a second one would only take cache
            self.buffers = [np.empty(self.raw.shape, np.float32) for _ in range(1 + self.prefetch)]

    def get(self, part):
        """(x, y) of this slice of the order, valid until the next get, with prefetch until the next but one."""
        rows = self.order[part]
        if len(rows) > len(self.raw):
            self.raw = np.empty((len(rows), *self.raw.shape[1:]), np.uint8)
            self.buffers = [np.empty(self.raw.shape, np.float32) for _ in self.buffers]
        pixels = gather(self.images, rows, out=self.raw[: len(rows)])
        if self.draws is not None:
            pixels = cropped(pixels, self.padding, *self.draws[:, part])
        self.turn = (self.turn + 1) % len(self.buffers)
        x = self.buffers[self.turn][: len(rows)]
        x[...] = pixels
        x *= self.scale
        x += self.shift
        return x, self.labels[rows]


def cropped(images, padding, top, left, mirrored):
    """From each image (N, C, H, W), with `padding` zeros on each side, the H x W pixels that begin at row `top` and
    column `left`, both (N,) in 0..2 padding, read from right to left where `mirrored` (N,) is not 0.
    """
    N, C, H, W = images.shape
    padded = np.zeros((N, C, H + 2 * padding, W + 2 * padding), images.dtype)
    padded[:, :, padding : padding + H, padding : padding + W] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (H, W), (2, 3))  # (N, C, rows, columns, H, W)
    crops = windows[np.arange(N), :, top, left]  # (N, C, H, W)
    return np.where(mirrored[:, None, None, None] != 0, crops[..., ::-1], crops)
