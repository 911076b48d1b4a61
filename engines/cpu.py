"""The engine of the CPU: NumPy, and of a masked weight of low density the kept entries alone.

Where BLAS multiplies, it uses as many threads as it is allowed to, beside convolutions one: see host.OneBlasThread.
"""

import contextlib

import numpy as np

from engines import convolution, host, normalization, pool_size

# Below these densities of a masked weight, touching only its kept entries is faster than the dense product.
# Measured with OpenBLAS on one thread, batch 100: a kept weight costs 0.16 ns an example in the CSR product and
# 0.5 ns in its gradient, an entry of a dense product 0.018 and 0.014 ns.
SPARSE_PRODUCT, SPARSE_GRADIENT = 1 / 12, 1 / 36


def gather(array, rows, out=None):
    """array[rows] written into out; rows must be valid indices"""
    return array.take(rows, axis=0, out=out, mode="clip")  # clip: no bounds check and no hidden copy


class Pattern:
    """What is known of the mask of a weight at low density.

    kept: the positions of the kept entries in weight.reshape(-1), ascending, where gradients and updates touch only
    them; else None. matrix(w): the kept weights in compressed sparse rows, for products, of a matrix.
    """

    def __init__(self, mask, density):
        self.positions, self.shape, self.csr = np.flatnonzero(mask), mask.shape, None
        self.kept = self.positions if density < SPARSE_GRADIENT else None

    def matrix(self, w):
        csr = self.csr
        if csr is None:
            from scipy.sparse import csr_array

            rows, columns = np.divmod(self.positions, self.shape[1])
            starts = np.searchsorted(rows, np.arange(self.shape[0] + 1))
            csr = csr_array((np.zeros(len(rows), w.dtype), columns, starts), self.shape)
        gather(w.reshape(-1), self.positions, out=csr.data)
        self.csr = csr  # not before it is filled: another thread may want it
        return csr


def kept(pattern):
    """The positions that take part in gradients and updates: those that are kept, or all"""
    return slice(None) if pattern is None or pattern.kept is None else pattern.kept


class Engine:
    """All functions take and return NumPy arrays."""

    name, xp, moved, narrow = "cpu", np, 0, None

    def __init__(self):
        self.blas = contextlib.nullcontext()  # what the products of linear layers are done in

    def to_host(self, array):
        return array

    def synchronize(self):
        """Wait until all is computed."""

    def memory(self):
        """Bytes held on a GPU"""
        return 0

    def versions(self):
        """What a record of a run needs to know of the device."""
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
        density = mask.mean()
        return Pattern(mask, density) if density < (SPARSE_PRODUCT if mask.ndim == 2 else SPARSE_GRADIENT) else None

    def masked(self, g, mask, pattern, shape):
        """The gradient of a masked parameter of this shape, zero where masked; g may be of the kept entries alone."""
        if pattern is None or pattern.kept is None:
            bits = g.view(f"i{g.itemsize}")  # and all of -1 or none of 0: unlike g * mask, inf and NaN become zero too
            np.bitwise_and(bits, -mask.view(np.int8), out=bits)
            return g
        out = np.zeros(shape, g.dtype)
        out.reshape(-1)[pattern.kept] = g if g.shape == pattern.kept.shape else g.reshape(-1)[pattern.kept]
        return out

    def add(self, x, y):
        """x + y of two gradients of one shape"""
        return normalization.add(x, y) if x.ndim == 4 else np.asarray(x + y)

    # ---- linear layers and loss

    def linear(self, x, w, b, pattern):
        """x (N, in), w (out, in), b (out,) or None -> (x w^T + b (N, out), what the gradients need)"""
        if pattern is None:
            xT = None
            with self.blas:
                out = x @ w.T
        else:
            xT = np.ascontiguousarray(x.T)  # (in, N): one contiguous row for each input
            out = (pattern.matrix(w) @ xT).T  # (N, out), stored as (out, N)
        if b is not None:
            out += b
        return out, xT

    def linear_gradients(self, g, x, w, b, pattern, xT, wanted):
        """dx = g w, dw = g^T x, db = sum of g, of those that are wanted; dw perhaps of the kept entries alone"""
        dx = dw = db = None
        with self.blas:
            if wanted[0]:  # the product in the order in which x is stored, so that what follows runs along memory
                dx = g @ w if x.flags.c_contiguous else (w.T @ g.T).T
            if wanted[1] and (pattern is None or pattern.kept is None):
                dw = g.T @ x
            elif wanted[1]:
                rows, columns = np.divmod(pattern.kept, w.shape[1])
                gT = np.ascontiguousarray(g.T)  # (out, N)
                dw = np.vecdot(gT.take(rows, 0), xT.take(columns, 0))  # (kept,)
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

    def conv(self, x, weights, stride, padding):
        """x (N, C, H, W), weights (O, C, kh, kw) -> (N, O, H', W')"""
        self.blas = host.one_blas_thread  # from now on: linear layers are used beside convolutions
        return convolution.forward(x, weights, stride, padding)

    conv_input_gradient = staticmethod(convolution.input_gradient)
    conv_weight_gradient = staticmethod(convolution.weight_gradient)
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
        return np.array(flat[kept(pattern)], dtype=data.dtype)

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
            w, part = data.reshape(-1), kept(pattern)  # (size,), a view
            g = grad.reshape(-1)[part]
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
