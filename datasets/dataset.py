"""A data set: examples to train on, examples to test on, and batches of both.

What the examples are, arrays of small images (`Arrays`) or files of photographs (datasets.photographs), is the business
of the two halves. A half has labels (N,) of int64 on the host, the shape (C, H, W) of an image, and
    split(count)                              two halves of such examples: `count` of them, and the others
    train_batches(slices, seed, epoch)        (x, labels) of these slices of the epoch's order
    test_batches(slices)                      (x, labels) of these slices of its own order
"""

import collections
import functools
import hashlib
import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

import nn
from engines import host, whole
from lab.files import FileFault


class DataError(FileFault):
    """A data file that is missing, damaged or not what it should be; the message names it."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples of `classes` classes: the halves `train` and `test`; name: what messages call it.

    x of a batch is (n, C, H, W) of float32 and labels (n,) of int64, both on the device in use. They stay as they are
    until the next batch is asked for: their memory is used again. The last batch of an epoch may be smaller.
    part: (rank, ranks), for processes that share each batch: only the rank's share of it, which may be empty.
    digest: `digest_of` the whole data set as loaded, whatever files it came in: images and labels of both halves; of
    photographs classes, paths and labels; by default that of two halves of Arrays, else "". unpublished: a clause that
    names the files whose contents are not the published ones, "" if there are none. Parts and other variants of a data
    set keep both.
    """

    name: str
    classes: int
    train: object
    test: object
    digest: str = ""
    unpublished: str = ""

    def __post_init__(self):
        if not self.digest and isinstance(self.train, Arrays) and isinstance(self.test, Arrays):
            arrays = [array for half in (self.train, self.test) for array in (half.images, np.int64(half.labels))]
            object.__setattr__(self, "digest", digest_of(*arrays))

    shape = property(lambda self: self.train.shape)  # (C, H, W)
    train_labels = property(lambda self: self.train.labels)
    test_labels = property(lambda self: self.test.labels)
    # of arrays alone: a network sees image * scale + shift
    train_images = property(lambda self: self.train.images)
    test_images = property(lambda self: self.test.images)
    scale = property(lambda self: self.train.scale)
    shift = property(lambda self: self.train.shift)

    def train_batches(self, batch, seed, epoch, start=0, part=(0, 1)):
        """(x, labels) of the training set from batch number `start` on.

        The order, and how each image varies, depend on (seed, epoch) alone.
        """
        return self.train.train_batches(shares(len(self.train_labels), batch, start, part), seed, epoch)

    def test_batches(self, batch, part=(0, 1)):
        """(x, labels) of the test set in its own order."""
        return self.test.test_batches(shares(len(self.test_labels), batch, 0, part))

    def part(self, held_out=0, limit=0):
        """The last `held_out` training examples take the place of the test set, for choosing settings honestly; of
        those that are left the first `limit` are trained on. 0: no such thing.
        """
        train, test, count = self.train, self.test, len(self.train_labels)
        held_out, limit = whole(held_out, "held_out"), whole(limit, "limit")
        if held_out >= count:
            raise DataError(f"{self.name} has {count:,} training images, so {held_out:,} cannot be held out")
        if held_out:
            train, test = train.split(count - held_out)
        if limit > count - held_out:
            raise DataError(f"{self.name} has {count - held_out:,} training images, so a limit of {limit:,} cannot be "
                            "met")
        return replace(self, train=train.split(limit)[0] if limit else train, test=test)

    def augmented(self, padding=4, flips=True):
        """Training images become random crops of their own size from the image with `padding` black pixels on each
        side, then, with `flips`, mirrored left to right half of the time; test images stay as they are.
        """
        return replace(self, train=replace(self.train, padding=whole(padding, "padding"), flips=flips))

    def averaged(self, side):
        """Images of side x side pixels, each the mean of a block of pixels, rounded; side divides height and width."""
        side, (_, H, W) = whole(side, "side", 1), self.shape
        if H % side or W % side:
            raise DataError(f"{self.name} has images of {H} x {W} pixels, which {side} x {side} blocks do not divide "
                            "evenly")
        return replace(self, train=self.train.averaged(side), test=self.test.averaged(side))

    def standardized_by_pixel(self):
        """Each pixel by its own mean and deviation over the training images, constant pixels to 0 (Figure 8)."""
        x = self.train_images.astype(np.float64)  # of whole numbers: a constant pixel's deviation is exactly 0
        mean, std = x.mean(axis=0) / 255, x.std(axis=0) / 255
        return replace(self, train=self.train.standardized(mean, std), test=self.test.standardized(mean, std))


@dataclass(frozen=True, eq=False)
class Arrays:
    """One half of a data set: images (N, C, H, W) of uint8 with labels (N,) of int64.

    Images stay bytes and become float32 a batch at a time, image * scale + shift: a quarter of the memory traffic of
    a float copy, and measured faster for it. scale, shift: arrays that broadcast to (C, H, W).
    padding, flips: how training images vary, see Dataset.augmented.
    """

    images: np.ndarray
    labels: np.ndarray
    scale: np.ndarray = np.float32(1)
    shift: np.ndarray = np.float32(0)
    padding: int = 0
    flips: bool = False
    free: dict = field(default_factory=dict, init=False, repr=False)  # the engine's Batches that nobody uses

    shape = property(lambda self: self.images.shape[1:])

    def split(self, count):
        return (replace(self, images=self.images[:count], labels=self.labels[:count]),
                replace(self, images=self.images[count:], labels=self.labels[count:]))

    def averaged(self, side):
        N, C, H, W = self.images.shape
        blocks = self.images.reshape(N, C, side, H // side, side, W // side)  # (N, C, row, inside, column, inside)
        size = H // side * (W // side)
        images = (blocks.sum(axis=(3, 5), dtype=np.int64) + size // 2) // size  # (N, C, side, side)
        return replace(self, images=images.astype(np.uint8))

    def standardized(self, mean, std):
        """The same images normalised by this mean and deviation of image / 255, arrays (C, 1, 1) or (C, H, W); 0 where
        the deviation is 0.
        """
        mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        factor = np.divide(1, std, out=np.zeros_like(std), where=std > 0)
        return replace(self, scale=(factor / 255).astype(np.float32), shift=(-mean * factor).astype(np.float32))

    def train_batches(self, slices, seed, epoch):
        """Random numbers are drawn on the host, so that a seed means the same on every device."""
        count = len(self.labels)
        order, draws = nn.generator(seed, "batches", epoch).permutation(count), None
        if self.padding or self.flips:  # draws: first row and column of each crop, and whether it is mirrored
            ends = [[2 * self.padding + 1], [2 * self.padding + 1], [1 + self.flips]]
            draws = nn.generator(seed, "augment", epoch).integers(0, ends, (3, count))
        return self.batches(slices, order, draws)

    def test_batches(self, slices):
        return self.batches(slices)

    def batches(self, slices, order=None, draws=None):
        """The engine puts batches together. Its Batches, which on a GPU hold all images, are used again by the next
        epoch; two loops at once have two of them.
        """
        free = self.free.setdefault(nn.engine, [])
        made = free.pop() if free else nn.engine.Batches(self.images, self.labels, self.scale, self.shift, self.padding)
        try:
            made.begin(order, draws)
            if made.prefetch:
                with ThreadPoolExecutor(1, "prefetch") as thread:
                    yield from prefetched(slices, functools.partial(thread.submit, made.get), Future.result, 1)
            else:
                yield from map(made.get, slices)
        finally:
            free.append(made)


def digest_of(*arrays):
    """64 hex digits: the SHA-256 of the types, shapes and entries of these arrays, the same on every machine."""
    sha = hashlib.sha256()
    for array in map(np.asarray, arrays):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(array)
    return sha.hexdigest()


def shares(count, batch, start, part):
    """The slices of range(count) that are this part's, (rank, ranks), of each batch from number `start` on."""
    (rank, ranks), batch, start = part, whole(batch, "batch", 1), whole(start, "start")
    for first in range(start * batch, count, batch):
        n = min(batch, count - first)
        yield slice(first + n * rank // ranks, first + n * (rank + 1) // ranks)


def prefetched(slices, begin, finish, depth):
    """finish(begin(s)) for each of these slices, where the next `depth` are begun when one is handed out."""
    coming = collections.deque(map(begin, itertools.islice(slices, depth)))
    while coming:
        batch = finish(coming.popleft())
        coming.extend(map(begin, itertools.islice(slices, 1)))
        yield batch


def in_threads(work, items, threads, description):
    """Yields work(item) for each of a sequence of items, in their order, done by threads under a progress bar.

    threads: how many, 0 for as many as this process has cores.
    """
    threads = threads or host.cores()
    pool = ThreadPoolExecutor(threads)
    try:
        results = prefetched(iter(items), functools.partial(pool.submit, work), Future.result, 4 * threads)
        yield from tqdm(results, description, len(items), disable=None, leave=False)
    finally:
        pool.shutdown(cancel_futures=True)
