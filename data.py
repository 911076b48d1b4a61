"""Data sets: find or download, verify, normalise, batch.

    dataset = load("mnist", "data", limit=2048)         # or "synthetic": generated, needs no network and no files
    for x, y in dataset.train_batches(100, seed=0, epoch=0): ...

Images are kept as bytes (N, C, H, W) and become float32 a batch at a time: a quarter of the memory traffic of a
float copy of the data set, and measured faster for it. Every fault of a file is a DataError of one sentence.
"""

import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import nn


class DataError(Exception):
    """A data file that is missing, damaged or not what it should be; the message names it."""


# ---------------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W) of uint8 with labels (N,) of int64; a network sees image * scale + shift (float32).

    scale, shift: arrays that broadcast to (C, H, W).
    """

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    scale: np.ndarray
    shift: np.ndarray

    shape = property(lambda self: self.train_images.shape[1:])

    def to_device(self):
        """The same data set in arrays of nn.xp."""
        arrays = {k: nn.xp.asarray(v) for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **arrays)

    def train_batches(self, batch, seed, epoch, start=0):
        """(x, y) of the training set in an order that depends on (seed, epoch) alone, from batch `start` on.

        The array x is used again for the next batch.
        """
        order = nn.generator(seed, "batches", epoch).permutation(len(self.train_labels))
        return self.batches(self.train_images, self.train_labels, nn.xp.asarray(order), batch, start)

    def test_batches(self, batch):
        return self.batches(self.test_images, self.test_labels, nn.xp.arange(len(self.test_labels)), batch)

    def batches(self, images, labels, order, batch, start=0):
        raw = nn.xp.empty((min(batch, len(order)), *images.shape[1:]), np.uint8)
        out = nn.xp.empty(raw.shape, np.float32)
        for first in range(start * batch, len(order), batch):
            rows = order[first : first + batch]
            x, bytes_ = out[: len(rows)], raw[: len(rows)]
            x[...] = nn.gather(images, rows, out=bytes_)
            x *= self.scale
            x += self.shift
            yield x, labels[rows]

    def standardized(self, mean, std):
        """Normalise by this mean and deviation of image / 255; 0 where the deviation is 0."""
        mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        factor = np.divide(1, std, out=np.zeros_like(std), where=std > 0)
        return replace(self, scale=(factor / 255).astype(np.float32), shift=(-mean * factor).astype(np.float32))

    def standardized_by_pixel(self):
        """Each pixel by its own mean and deviation over the training images, constant pixels to 0 (Figure 8)."""
        x = self.train_images.astype(np.float64)  # of whole numbers: a constant pixel's deviation is exactly 0
        return self.standardized(x.mean(axis=0) / 255, x.std(axis=0) / 255)

    def limited(self, count):
        """Only the first `count` training examples."""
        if count > len(self.train_labels):
            raise DataError(f"{self.name} has {len(self.train_labels):,} training images, so a limit of "
                            f"{count:,} cannot be met")
        return replace(self, train_images=self.train_images[:count], train_labels=self.train_labels[:count])

    def held_out(self, count):
        """The last `count` training examples take the place of the test set: for choosing settings honestly."""
        keep = len(self.train_labels) - count
        if keep < 1:
            raise DataError(f"{self.name} has {len(self.train_labels):,} training images, so {count:,} cannot be "
                            "held out")
        return replace(self, train_images=self.train_images[:keep], train_labels=self.train_labels[:keep],
                       test_images=self.train_images[keep:], test_labels=self.train_labels[keep:])


NAMES = ("mnist", "synthetic")


def load(name, folder):
    """The data set of this name from `folder`; MNIST is downloaded there if it is absent, synthetic generated."""
    if name == "mnist":
        return mnist(folder)
    if name == "synthetic":
        return synthetic(folder)
    raise DataError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")


# ---------------------------------------------------------------------------------------------- MNIST

MNIST_FILES = {  # file: MD5 of its uncompressed contents (gzip bytes differ between mirrors)
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MNIST_COUNTS = {"train": 60_000, "t10k": 10_000}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://systemds.apache.org/assets/datasets/mnist/",
)


def mnist(folder, mirrors=MNIST_MIRRORS):
    """MNIST (LeCun et al.): 60,000 training and 10,000 test digits of 28 x 28, normalised by 0.1307 / 0.3081.

    Its four IDX files, plain or gzip, lie in folder/mnist or in folder; absent ones are downloaded.
    """
    paths = {}
    for name, md5 in MNIST_FILES.items():
        candidates = [Path(folder, *sub, name + end) for sub in (("mnist",), ()) for end in ("", ".gz")]
        present = [path for path in candidates if path.exists()]
        paths[name] = present[0] if present else Path(folder, "mnist", name + ".gz")
        if not present:
            download([mirror + name + ".gz" for mirror in mirrors], paths[name],
                     verify=lambda path: hashlib.md5(read_bytes(path, 2**26)).hexdigest() == md5)
    (train_images, train_labels), (test_images, test_labels) = (
        read_idx_pair(paths[f"{part}-images-idx3-ubyte"], paths[f"{part}-labels-idx1-ubyte"], 10, (count, 28, 28))
        for part, count in MNIST_COUNTS.items()
    )
    one = np.ones(1, np.float32)
    return Dataset("mnist", 10, train_images, train_labels, test_images, test_labels, one, one).standardized(
        [[[0.1307]]], [[[0.3081]]])


def read_bytes(path, limit):
    """The contents of a plain or gzip file, at most `limit` bytes of them."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            return (gzip.GzipFile(fileobj=raw) if packed else raw).read(limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def read_idx(path, ndim):
    """The uint8 array of an IDX file with this number of dimensions.

    The format: 4 bytes 0, 0, 8 (unsigned bytes), ndim; ndim big-endian 32-bit sizes; the entries.
    """
    limit = 2**30
    content = read_bytes(path, limit)
    magic = bytes((0, 0, 8, ndim))
    if content[:4] != magic:
        raise DataError(f"{path} is not an IDX file of {ndim}-dimensional bytes: it begins with "
                        f"{content[:4].hex(' ') or 'nothing'} instead of {magic.hex(' ')}")
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"{path} ends within its header of {header} bytes")
    shape = [int(n) for n in np.frombuffer(content, ">u4", ndim, 4)]
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        kind = "is cut short" if len(content) < expected else "goes on after its data"
        raise DataError(f"{path} {kind}: {'x'.join(map(str, shape))} entries make {expected:,} bytes, "
                        f"it has {'at least ' if len(content) == limit else ''}{len(content):,}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_idx_pair(images_path, labels_path, classes, shape):
    """Images (N, 1, H, W) of uint8, shape = (N, H, W), and labels (N,) of int64 that belong together."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} has {len(images):,} images but {labels_path} has {len(labels):,} labels")
    if images.shape != shape:
        have, want = ("x".join(map(str, s)) for s in (images.shape, shape))
        raise DataError(f"{images_path} holds images of {have} instead of {want}")
    if labels.max() >= classes:
        where = int(np.argmax(labels >= classes))
        raise DataError(f"{labels_path} has label {labels[where]} at position {where}, "
                        f"but labels go from 0 to {classes - 1}")
    return images[:, None], labels.astype(np.int64)


# ---------------------------------------------------------------------------------------------- download


def download(urls, path, verify):
    """Fetch the first of these addresses whose file passes verify(path) and move it to `path`.

    What has arrived is kept as path.part and continued after a cut; nothing unverified is ever called `path`.
    Raises DataError with the reason for every address when none of them gave the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = []
    for url in urls:
        in_vain = 0  # attempts that brought nothing; an attempt that was cut but brought something is free
        while in_vain < 3:
            before = size_of(part)
            try:
                continued = fetch(url, part)
                if verify_quietly(verify, part):
                    sync(part)
                    os.replace(part, path)
                    return
                part.unlink()
                reason = "its contents have the wrong checksum"
                if not continued:  # a whole file from this mirror is wrong, and would be again
                    break
                in_vain += 1
            except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
                reason = str(getattr(error, "reason", error))
                if 400 <= getattr(error, "code", 0) < 500:  # the server knows that it has no such file
                    break
                in_vain += size_of(part) <= before
        failures.append(f"{url}: {reason}")
    raise DataError(f"{path.name} could not be downloaded ({'; '.join(failures)}); "
                    f"put the file into {path.parent} yourself")


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def verify_quietly(verify, path):
    try:
        return verify(path)
    except DataError:
        return False


def fetch(url, part, timeout=20):
    """Download url to `part`, going on where an earlier attempt was cut; True if it did go on.

    Raises OSError when the connection ends before the announced length.
    """
    have = size_of(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the part is as long as the file, or longer: let the checksum decide
            return True
        raise
    with response:
        continued = response.status == 206
        if continued and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError("the server sent another part of the file than was asked for")
        have = have if continued else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if continued else "wb") as file, tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None, leave=False
        ) as bar:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    if total is not None and size_of(part) != total:
        raise OSError(f"the connection was cut after {size_of(part):,} of {total:,} bytes")
    return continued


def sync(path):
    """Flush a file's contents to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------- synthetic

SYNTHETIC_VERSION = 1  # part of the cached file's name: raise it when the drawing changes


def synthetic(folder, side=28, channels=1, train=20_000, test=4_000, seed=0):
    """Digits drawn by Pillow and distorted at random, the same for a seed; generated once, then read from folder.

    Hard enough that the paper's base network (width 5) stays near 90 % and that wider ones visibly gain.
    """
    name = f"synthetic-{side}x{side}x{channels}-{train}-{test}-seed{seed}-v{SYNTHETIC_VERSION}"
    path = Path(folder, f"{name}.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
        if images.shape != (train + test, channels, side, side) or labels.shape != (train + test,):
            raise ValueError
    except Exception:  # absent, cut short or damaged in any way: make it again
        images, labels = draw_digits(train + test, side, channels, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, images=images, labels=labels)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    x = images[:train] / np.float32(255)
    one = np.ones(1, np.float32)
    dataset = Dataset("synthetic", 10, images[:train], labels[:train], images[train:], labels[train:], one, one)
    return dataset.standardized(x.mean(axis=(0, 2, 3), keepdims=True)[0], x.std(axis=(0, 2, 3), keepdims=True)[0])


def draw_digits(count, side, channels, seed):
    """Images (count, channels, side, side) of uint8 and their labels: digits in Pillow's own scalable font with
    random stroke, rotation, shear, scale, shift, colours and noise.
    """
    from PIL import Image, ImageDraw, ImageFont

    rng = nn.generator(seed, "synthetic", side, channels)
    labels = rng.integers(0, 10, count)
    strokes, canvas = 3, 2 * side  # glyphs are drawn once at twice the size, then mapped into each image
    font = ImageFont.load_default(size=1.5 * side)
    glyphs = {}
    for digit in range(10):
        for stroke in range(strokes):
            glyph = Image.new("L", (canvas, canvas))
            ImageDraw.Draw(glyph).text((canvas / 2, canvas / 2), str(digit), fill=255, font=font, anchor="mm",
                                       stroke_width=stroke * side / 28)
            glyphs[digit, stroke] = glyph
    stroke = rng.integers(0, strokes, count)
    angle = np.deg2rad(rng.uniform(-15, 15, count))
    shear, squeeze = rng.uniform(-0.3, 0.3, count), rng.uniform(0.85, 1.15, count)
    scale = rng.uniform(0.8, 1.1, count)
    shift = rng.uniform(-0.055, 0.055, (count, 2)) * side
    # Pillow maps each output pixel to a glyph position: glyph = centre + M (pixel - centre - shift), M = inverse map.
    cos, sin = np.cos(angle) * canvas / side / scale, np.sin(angle) * canvas / side / scale
    a, b, c, d = cos * squeeze, (cos * shear + sin) * squeeze, -sin / squeeze, (cos - sin * shear) / squeeze
    x, y = (side / 2 + shift).T
    coefficients = np.stack([a, b, canvas / 2 - a * x - b * y, c, d, canvas / 2 - c * x - d * y], axis=1).tolist()
    ink = np.empty((count, side, side), np.uint8)
    for i in tqdm(range(count), desc="drawing digits", disable=None, leave=False):
        glyph = glyphs[int(labels[i]), int(stroke[i])]
        ink[i] = glyph.transform((side, side), Image.Transform.AFFINE, coefficients[i], Image.Resampling.BILINEAR)
    images = np.empty((count, channels, side, side), np.uint8)
    for first in range(0, count, 1000):  # in blocks: the float copies stay small
        block = ink[first : first + 1000, None] / np.float32(255)
        n = len(block)
        paper = rng.uniform(0, 0.2 if channels == 1 else 1, (n, channels, 1, 1)).astype(np.float32)
        pen = rng.uniform(0.6, 1, (n, channels, 1, 1)).astype(np.float32)
        if channels > 1:  # any two colours that differ clearly
            pen = (paper + rng.uniform(0.35, 0.65, (n, 1, 1, 1)).astype(np.float32)) % 1
        noise = rng.normal(0, 0.12, (n, channels, side, side)).astype(np.float32)
        images[first : first + n] = np.clip((paper + (pen - paper) * block + noise) * 255, 0, 255)
    return images, labels
