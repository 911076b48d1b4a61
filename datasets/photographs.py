"""Photographs, of ImageNet or drawn, as a data set: decode, crop, batch; the resized copy.

    dataset = datasets.load("imagenet", "data")       # data/imagenet/train/<class>/*.JPEG and val/, see trees.index
    prepare("data/imagenet", "data/imagenet-256")     # once: the paper's copy, smallest side 256

Photographs of any size are decoded in threads while the batches before them are in use (Table 1: crops of 224 x 224
from 0.2 to 1 of the area, flips; test: smallest side 256, the centre). They stay bytes until a batch is normalised.

Microseconds for a training crop of an ImageNet photograph (481 x 405 on average) on one core: decode 1,770, resize 700,
copy 45, flip 30, normalise 200. Reading a file in one block saved 80; four bytes a pixel, as Pillow keeps them, from
libjpeg 90; decoding at 1/2, 1/4, 1/8 where that leaves MARGIN pixels for one that is wanted nothing at size 224, 840 at
64 (off by 0.4 / 255). Not worth it: a MARGIN of 1 (off by 1 to 2.4), libjpeg's fast modes, flips by reversed views.
"""

import collections
import contextlib
import functools
import math
import os
import shutil
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import nn
from datasets import trees
from datasets.dataset import DataError, Dataset, digest_of, in_threads, prefetched
from datasets.download import alone
from datasets.drawn import photographs, to_disk
from engines import host
from lab.files import as_json, read_json, write_whole

warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # broken EXIF data, which a photograph does not need

MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))  # of ImageNet's channels / 255
SCALE, SHIFT = (1 / (255 * STD)).astype(np.float32), (-MEAN / STD).astype(np.float32)
PREFETCH = 2  # batches that are decoded while one is in use
MARGIN = 2  # pixels that decoding at a lower resolution must leave in each direction for one that is wanted

# ---------------------------------------------------------------------------------------------- one photograph


class BadFile(Exception):
    """A file that is no photograph that can be read; the message is the reason."""


@contextlib.contextmanager
def opened(path):
    """The image in a file, nothing decoded yet. Whatever goes wrong with it until the end of the block is a BadFile."""
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise BadFile("it is empty")
            image = Image.open(file, formats=("JPEG", "PNG"))
            width, height = image.size
            if width * height > Image.MAX_IMAGE_PIXELS:  # of which Pillow itself lets twice as many pass
                raise BadFile(f"its header claims {width:,} x {height:,} pixels")
            yield image
    except (BadFile, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadFile("it is neither a JPEG nor a PNG image") from None
    except Exception as error:  # Pillow raises what it stumbles on
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
        raise BadFile(reason) from None


def cut(image, size, box):
    """The part `box` (left, top, right, bottom) of a photograph as an RGB image of this size (w, h)."""
    (width, height), (left, top, right, bottom) = image.size, box
    room = min((right - left) / size[0], (bottom - top) / size[1]) / MARGIN
    scale = next((scale for scale in (8, 4, 2) if scale <= room), 1)
    if scale > 1 and image.draft(None, (width // scale, height // scale)):
        box = [edge / scale for edge in box]
    if image.format == "JPEG":
        image.decodermaxblock = 2**22  # the whole file at once
        if image.mode == "RGB":
            image.tile = [tile[:3] + (("RGBX", *tile[3][1:]),) for tile in image.tile]  # as Pillow keeps pixels
    image.load()
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.resize(size, Image.Resampling.BILINEAR, box)


def random_box(draws, width, height):
    """(left, top, right, bottom) of a random part of the image: its area a share from 0.2 to 1, its width / height from
    3/4 to 4/3 (uniform in the logarithm). As torchvision's RandomResizedCrop, with 22 numbers from 0 to 1.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for a, r in zip(draws[2:12], draws[12:22]):
        area = width * height * (0.2 + 0.8 * a)
        aspect = math.exp(low + r * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[0] * (width - w + 1)), int(draws[1] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # after ten attempts: the centre
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_box(width, height, size):
    """The part of the image that is the centre of size x size pixels once the smallest side is size * 256 / 224."""
    w, h = resized(width, height, round(size * 256 / 224))
    left, top = round((w - size) / 2), round((h - size) / 2)
    return left * width / w, top * height / h, (left + size) * width / w, (top + size) * height / h


def resized(width, height, side):
    """(width, height) with the smaller one `side`"""
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


# ---------------------------------------------------------------------------------------------- the data set


class Files:
    """The photographs of one half of a tree, and which of them turned out to be bad.

    folder: of the half. names, labels: (N,), see trees.index. More than int(unreadable * N) bad files are a DataError.
    """

    def __init__(self, folder, names, labels, unreadable):
        self.folder, self.names, self.labels = folder, names, labels
        self.unreadable, self.bad, self.lock = unreadable, {}, threading.Lock()

    def path(self, i):
        return self.folder / os.fsdecode(self.names[i])

    @contextlib.contextmanager
    def attempt(self, i):
        """The block reads photograph i; a BadFile in it is noted, told once, and ends no more than the block."""
        try:
            yield
        except BadFile as error:
            with self.lock:
                if i not in self.bad:
                    self.bad[i] = str(error)
                    tqdm.write(f"{self.path(i)} is left out: {error}", file=sys.stderr)
                if len(self.bad) > int(self.unreadable * len(self.names)):
                    first, reason = next(iter(self.bad.items()))
                    raise DataError(f"{len(self.bad):,} of the {len(self.names):,} images in {self.folder} cannot be "
                                    f"read, more than the {self.unreadable:.2%} that may be left out; the first was "
                                    f"{self.path(first)}: {reason}") from None

    def read(self, i, choose, out, mirrored=False):
        """Photograph i in out (H, W, 3) of uint8, True; or False if it is bad. choose(width, height) -> box."""
        with self.attempt(i):
            if i in self.bad:
                raise BadFile(self.bad[i])
            with opened(self.path(i)) as image:
                image = cut(image, out.shape[1::-1], choose(*image.size))
            out[...] = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
            return True
        return False


@dataclass(frozen=True, eq=False)
class Photographs:
    """One half of a data set, see datasets.dataset: the photographs number index (N,) of these Files.

    size: of the square images that a network sees. threads: decoders, 0 for as many as this process has cores.
    """

    files: Files
    index: np.ndarray
    size: int
    threads: int

    shape = property(lambda self: (3, self.size, self.size))
    labels = functools.cached_property(lambda self: self.files.labels[self.index])

    def split(self, count):
        """The first `count` in a fixed random order of which every piece has about as many of each class."""
        draws = nn.generator(0, "in turn").random(len(self.files.names))[self.index]
        by_class = np.lexsort((draws, self.labels))
        counts = np.bincount(self.labels)
        turn = np.empty(len(by_class))  # where in its class an example stands, from 0 to 1
        turn[by_class] = np.arange(len(by_class)) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen = self.index[np.argsort((turn + draws) / counts[self.labels])]
        return replace(self, index=chosen[:count]), replace(self, index=np.sort(chosen[count:]))

    def train_batches(self, slices, seed, epoch):
        """Random crops, half of them mirrored; a crop depends on (seed, epoch, photograph). In place of a bad file
        comes the next of the index, with its own label.
        """
        count = len(self.index)
        order = nn.generator(seed, "batches", epoch).permutation(count)

        def fill(place, out):
            for other in range(order[place], order[place] + count):
                i = int(self.index[other % count])
                draws = nn.generator(seed, "crop", epoch, i).random(23).tolist()
                if self.files.read(i, functools.partial(random_box, draws), out, mirrored=draws[22] < 0.5):
                    return self.files.labels[i]
            raise DataError(f"none of the {count:,} images used of {self.files.folder} can be read")

        return self.batches(slices, fill)

    def test_batches(self, slices):
        """The centres; bad files are left out."""
        choose = functools.partial(centre_box, size=self.size)

        def fill(place, out):
            i = int(self.index[place])
            return self.files.labels[i] if self.files.read(i, choose, out) else -1

        return self.batches(slices, fill)

    def batches(self, slices, fill):
        """fill(place, out) puts an image into out (size, size, 3) and returns its label, -1 for none.

        The decoders are a pool of their own: convolutions would wait in one queue with hundreds of photographs.
        """
        pool = ThreadPoolExecutor(self.threads or host.cores(), "photographs")

        def begin(part):
            places = range(part.start, part.stop)
            pixels = host.scratch((len(places), *self.shape[1:], 3), np.uint8)
            return pixels, [pool.submit(fill, place, out) for place, out in zip(places, pixels)]

        def finish(begun):
            pixels, futures = begun
            labels = np.array([future.result() for future in futures], np.int64)
            found = labels >= 0
            x = nn.engine.normalized(pixels if found.all() else pixels[found], SCALE, SHIFT)
            return x, nn.engine.upload(labels[found])

        try:
            yield from prefetched(slices, begin, finish, PREFETCH)
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------- the data sets


def imagenet(folder, **options):
    """ImageNet in folder/imagenet; see of_tree for the options."""
    tree = Path(folder, "imagenet")
    if not (tree / "train").is_dir():
        raise DataError(f"{tree / 'train'} is not there: ImageNet (ILSVRC2012, from image-net.org, which asks for an "
                        f"account) should lie in {tree} as train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG "
                        f"with {trees.DEVKIT} beside it")
    return of_tree("imagenet", tree, **options)


def imagenet_256(folder, **options):
    """The copy that `prepare` makes of it, folder/imagenet-256."""
    tree = Path(folder, "imagenet-256")
    _, finished = marked(tree)
    if not finished:
        raise DataError(f"{tree} is no finished copy of {Path(folder, 'imagenet')}; --prepare makes it or goes on "
                        "with it")
    return of_tree("imagenet-256", tree, **options)


def drawn(folder, classes=10, images=200, threads=0, **options):
    """Drawn photographs, `images` to train on and 50 to test on of each class."""
    tree = photographs(folder, classes, images, threads=threads)
    return of_tree("photographs", tree, threads=threads, **options)


def of_tree(name, tree, size=224, threads=0, unreadable=0.01):
    """The Dataset of any tree that trees.index can read; name: what messages call it.

    size: of the images that a network sees. threads: decoders, 0 for as many as this process has cores. unreadable: the
    share of either half's files that may be.
    """
    size = nn.whole(size, "size", 1)
    classes, halves = files_of(tree, unreadable)
    digest = digest_of(trees.encoded(classes), *(array for half in halves for array in (half.names, half.labels)))
    return Dataset(name, len(classes), *(Photographs(half, np.arange(len(half.names)), size, threads)
                                         for half in halves), digest)


def files_of(tree, unreadable):
    """(class names, (Files to train on, Files to test on))"""
    classes, halves = trees.index(tree)
    return classes, [Files(Path(tree, half), *halves[half], unreadable) for half in ("train", "val")]


# ---------------------------------------------------------------------------------------------- the resized copy

MARKER = "prepared.json"


def marked(folder):
    """(smallest side, whether it is finished) of the copy in this folder; (None, False) where none was begun."""
    try:
        state = read_json(Path(folder, MARKER))
        return (int(state["side"]), state["finished"] is True) if state is not None else (None, False)
    except Exception as error:
        raise DataError(f"{Path(folder, MARKER)} cannot be read ({error}); remove it and prepare again") from None


def mark(folder, side, finished):
    write_whole(Path(folder, MARKER), as_json({"side": side, "finished": finished}))


def prepare(source, target, side=256, threads=0, unreadable=0.01):
    """Copy a tree of photographs with smallest side `side` (bilinear, JPEG of quality 95).

    Photographs that are not larger are copied as they are. The copy has class folders in both halves, so it needs no
    file of labels. Bad files are named and left out, up to the share `unreadable` of each half. A second call goes on
    where the first was cut: files that are there and whole are kept. Returns {"resized", "copied", "kept", "bad": n}.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if target.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{target} lies in {source}; the copy should have a folder of its own")
    with alone(target, "makes"):
        before, _ = marked(target)
        if before not in (None, side):
            raise DataError(f"{target} holds a copy of smallest side {before}; one of {side} needs another folder")
        classes, halves = files_of(source, unreadable)
        target.mkdir(exist_ok=True)
        mark(target, side, finished=False)

        def work(half, i):
            path = target / half.folder.name / classes[half.labels[i]] / half.path(i).name
            if whole(path):
                return "kept"
            with half.attempt(i):
                return shrink(half.path(i), path, side)
            return "bad"

        counts = collections.Counter()
        for half in halves:
            folder = target / half.folder.name
            for name in classes:
                (folder / name).mkdir(parents=True, exist_ok=True)
            numbers = range(len(half.names))
            counts.update(in_threads(functools.partial(work, half), numbers, threads, f"writing {folder}"))
        to_disk()
        mark(target, side, finished=True)
    return {result: counts[result] for result in ("resized", "copied", "kept", "bad")}


def whole(path):
    """Whether a file has the end of a JPEG or PNG: a file that lost its contents in a power cut does not."""
    try:
        with open(path, "rb") as file:
            file.seek(-12, os.SEEK_END)
            return file.read().endswith((b"\xff\xd9", b"IEND\xaeB`\x82"))
    except OSError:
        return False


def shrink(source, path, side):
    """Write `source` with smallest side `side` to `path`, by way of a temporary file; "resized" or "copied"."""
    with opened(source) as image:
        size = image.size
        smaller = min(size) > side
        small = cut(image, resized(*size, side) if smaller else size, (0, 0, *size))  # whether it can be decoded
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if smaller:
            small.save(temporary, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=95)
        else:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return "resized" if smaller else "copied"
