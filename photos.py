"""Trees of photographs such as ImageNet's: index, decode, crop, batch; the resized copy; generated photographs.

    dataset = load("imagenet", "data")            # data/imagenet/train/<class>/*.JPEG and val/, see `index`
    for x, y in dataset.train_batches(256, seed=0, epoch=0): ...
    prepare("data/imagenet", "data/imagenet-256")                   # once: the paper's copy, smallest side 256
    dataset = load("synthetic", "data", size=64)                    # generated, needs no files

Photographs of any size are decoded in threads while the batches before them are in use (Table 1: crops of 224 x 224
from 0.2 to 1 of the area, flips; test: smallest side 256, the centre). They stay bytes until a batch is normalised.

Microseconds for a training crop of an ImageNet photograph (481 x 405 on average) on one core: decode 1,770, resize 700,
copy 45, flip 30, normalise 200 (in another order 190, and 110 for the copy). Reading a file in one block:
-80; four bytes a pixel, as Pillow keeps them, from libjpeg: -90. Decoding at 1/2, 1/4, 1/8 where that leaves MARGIN
pixels for one that is wanted: nothing at 224, 2,390 -> 1,550 at 64 (off by 0.4 / 255), 21 ms -> 13 for 2,000 x 1,500
pixels; a MARGIN of 1: 10 ms, but off by 1 to 2.4. Nothing: resize(reducing_gap=), libjpeg's fast modes (-30, off by
1.1), flips by reversed views (+75).
"""

import csv
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import conv
import data
import nn
from data import DataError
from files import FileFault, read_arrays, save_arrays, write_whole

PIXELS = 100_000_000  # a header that claims more is not believed
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, less strict, which warns before it refuses
warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken EXIF data, which a photograph does not need

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels / 255
SUFFIXES = (".jpeg", ".jpg", ".png")
AHEAD = 2  # batches that are decoded ahead of the one in use
MARGIN = 2  # pixels that decoding at a lower resolution must leave in each direction for one that is wanted


# ---------------------------------------------------------------------------------------------- index

CACHE, VERSION, LARGEST = "index.npz", 2, 2**28  # bytes of a cache: that of ImageNet takes 46 million


def index(folder):
    """(class names, {"train": (names, labels), "val": (names, labels)}, flat) of a tree of photographs.

    folder/train/<class>/ and folder/val/<class>/ hold .jpeg, .jpg and .png files; classes are numbered in the order
    of their names. Names that begin with a dot are passed over. flat: the validation photographs lie in val/ itself,
    as the official archive has them, and `flat_labels` says what they show. names: (N,) of bytes, sorted by class,
    then name; labels: (N,) of int64.
    The index is kept in folder/index.npz until a folder or a file of labels changes.
    """
    folder = Path(folder)
    classes, signature, flat = survey(folder)
    names = [f"{part}_{what}" for part in ("train", "val") for what in ("names", "labels")]
    try:
        cached = read_arrays(folder / CACHE, LARGEST)
        arrays = [cached[name] for name in names]
        valid = (np.array_equal(cached["signature"], signature)
                 and all(plausible(*pair, len(classes)) for pair in (arrays[:2], arrays[2:])))
    except (OSError, FileFault, KeyError):  # absent, or damaged in any way
        valid = False
    if not valid:
        with tqdm(total=len(classes) * (1 if flat else 2), desc=f"reading {folder}", disable=None, leave=False) as bar:
            arrays = [*scan(folder / "train", classes, bar)]
            if flat:
                images = image_names(folder / "val")
                arrays += [encoded(images), flat_labels(folder, images, classes)]
            else:
                arrays += scan(folder / "val", classes, bar)
        with suppress(OSError):  # a folder that cannot be written to
            write_whole(folder / CACHE, save_arrays({"signature": signature, **dict(zip(names, arrays))}))
    arrays[1], arrays[3] = arrays[1].astype(np.int64), arrays[3].astype(np.int64)
    return classes, {"train": tuple(arrays[:2]), "val": tuple(arrays[2:])}, flat


def survey(folder):
    """(class names, what changes when the tree does, whether val/ is flat); the two halves must fit together."""
    halves = {}
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise DataError(f"{folder / part} is not there; it should hold {part}/<class>/<image>.JPEG")
        with os.scandir(folder / part) as entries:
            halves[part] = sorted((entry.name, entry.stat().st_mtime_ns) for entry in entries
                                  if entry.is_dir() and not entry.name.startswith("."))
    train, val = ([name for name, _ in halves[part]] for part in ("train", "val"))
    if not train:
        raise DataError(f"{folder / 'train'} has no class folders; it should hold train/<class>/<image>.JPEG")
    loose = image_names(folder / "val")
    if val and loose:
        raise DataError(f"{folder / 'val'} has both class folders and {len(loose):,} images beside them; "
                        "it should hold one or the other")
    if val and val != train:
        odd = sorted(set(train) ^ set(val))
        raise DataError(f"{folder / 'train'} and {folder / 'val'} should have the same classes, but {odd[0]} is "
                        f"only in {'train' if odd[0] in train else 'val'} ({len(odd):,} such classes)")
    if not val and not loose:
        raise DataError(f"{folder / 'val'} has neither class folders nor images; it should hold "
                        "val/<class>/<image>.JPEG, or the 50,000 images beside their labels' file")
    stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size)
             for path in (folder / "train", folder / "val", *(label_files(folder) if loose else ()))]
    state = json.dumps([VERSION, halves, [(name.removeprefix(str(folder)), *rest) for name, *rest in stats]])
    return train, hashlib.sha256(state.encode(errors="surrogateescape")).hexdigest(), not val


def image_names(folder):
    """The sorted names of the images in a folder."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)
                      and not entry.name.startswith(".") and not entry.is_dir())


def encoded(names):
    """Names as one array of bytes: a million of them as Python objects would take minutes of the collector's time."""
    return np.array([os.fsencode(name) for name in names])


def scan(folder, classes, bar):
    """(names, labels) of folder/<class>/<image>"""
    names, counts = [], []
    for name in classes:
        images = image_names(folder / name)
        if not images:
            raise DataError(f"{folder / name} holds no images ({', '.join(SUFFIXES)}); each class should have some")
        names.append(encoded(images))
        counts.append(len(images))
        bar.update()
    return np.concatenate(names), np.repeat(np.arange(len(classes), dtype=np.int32), counts)


def plausible(names, labels, classes):
    """Whether these arrays of a cached index can be used: as many labels as names, nothing that leaves the folder."""
    if names.dtype.kind != "S" or names.ndim != 1 or not names.size or labels.dtype != np.int32:
        return False
    letters = names.view(np.uint8).reshape(len(names), -1)  # (N, bytes)
    return (labels.shape == names.shape and labels.min() >= 0 and labels.max() < classes
            and not (letters == ord("/")).any() and not (letters == ord("\\")).any()
            and not np.isin(letters[:, 0], (0, ord("."))).any())


# ---------------------------------------------------------------------------------------------- labels of a flat val/

TRUTH, META, SOLUTION = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"
LABELS = 2**25  # bytes of a file of labels, of which the largest has 6 million


def label_files(folder):
    """The paths of TRUTH and META, or of SOLUTION alone."""
    for place in (folder, folder / "data", folder / "ILSVRC2012_devkit_t12" / "data"):
        if (place / TRUTH).exists():
            if not (place / META).exists():
                raise DataError(f"{place / META} is not there; {TRUTH} needs it beside it, from the same devkit")
            return [place / TRUTH, place / META]
    if (folder / SOLUTION).exists():
        return [folder / SOLUTION]
    raise DataError(f"{folder / 'val'} holds images without class folders, whose labels should be in {TRUTH} with "
                    f"{META} (from ILSVRC2012_devkit_t12) or in {SOLUTION} in {folder}")


def flat_labels(folder, images, classes):
    """(N,) of int32: the classes of the images in val/, by their sorted names.

    TRUTH: a line for each, the number that META, a table of synsets, gives to the class (1 to 1,000: others are no
    leaves). SOLUTION, Kaggle's: "<name>,<class> <box> ...".
    """
    path, *meta = label_files(folder)
    with data.reading(path, "file of labels"):
        if path.stat().st_size > LABELS:
            raise DataError(f"{path} has more than {LABELS:,} bytes, too many for labels")
        if meta:
            of_id = synsets(meta[0])
            names = [of_id.get(int(line), f"number {int(line)}") for line in path.read_text().split()]
        else:
            rows = {}
            with open(path, newline="") as file:
                for row in (table := csv.DictReader(file)):
                    name, answer = row["ImageId"], (row["PredictionString"] or "").split()
                    if not answer or name in rows:
                        raise DataError(f"{path}, line {table.line_num}: there is "
                                        f"{'a second row' if answer else 'no class'} for {name!r}")
                    rows[name] = answer[0]
            absent = [name for name in images if Path(name).stem not in rows]
            if absent:
                raise DataError(f"{path} has no row for {folder / 'val' / absent[0]} ({len(absent):,} such images)")
            names = list(rows.values())
    if len(names) != len(images):
        raise DataError(f"{path} has labels for {len(names):,} images, but {folder / 'val'} holds {len(images):,}")
    if not meta:
        names = [rows[Path(name).stem] for name in images]
    number = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in names if name not in number]
    if unknown:
        raise DataError(f"{path} names the class {unknown[0]}, which is no folder of {folder / 'train'}")
    return np.array([number[name] for name in names], np.int32)


def synsets(path):
    """{ILSVRC2012_ID: WNID} of the devkit's meta.mat, leaves only."""
    with data.reading(path, "meta.mat of the devkit"):
        table = dict(data.mat_variables(path, LABELS))["synsets"]
        names = {row["ILSVRC2012_ID"].item(): row["WNID"] for row in table}
        return {int(number): str(name) for number, name in names.items() if 1 <= number <= 1000}


# ---------------------------------------------------------------------------------------------- one photograph


class BadFile(Exception):
    """A file that is no photograph that can be read; the message is the reason."""


@contextmanager
def opened(path):
    """(image, EXIF orientation, (width, height) of the upright photograph), nothing decoded yet.

    Whatever goes wrong with it until the end of the block is a BadFile.
    """
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise BadFile("it is empty")
            image = Image.open(file, formats=("JPEG", "PNG"))
            width, height = image.size
            if width * height > PIXELS:
                raise BadFile(f"its header claims {width:,} x {height:,} pixels, more than {PIXELS:,}")
            orientation = 1
            if "exif" in image.info:
                with suppress(Exception):  # broken EXIF data says nothing about the photograph
                    orientation = image.getexif().get(0x0112, 1)
            yield image, orientation, (height, width) if orientation in range(5, 9) else (width, height)
    except (BadFile, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadFile("it is neither a JPEG nor a PNG image") from None
    except Exception as error:  # Pillow raises what it stumbles on
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
        raise BadFile(reason) from None


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def cut(image, orientation, size, box):
    """The part `box` (left, top, right, bottom) of the upright photograph as an RGB image of this size (w, h)."""
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
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    return image.resize(size, Image.Resampling.BILINEAR, box)


def random_box(draws, width, height, scale=(0.2, 1), ratio=(3 / 4, 4 / 3)):
    """(left, top, right, bottom) of a random part of the image: its area a share between `scale`, its width / height
    between `ratio` (uniform in the logarithm). As torchvision's RandomResizedCrop, with 22 numbers from 0 to 1.
    """
    low, high = map(math.log, ratio)
    for a, r in zip(draws[2:12], draws[12:22]):
        area = width * height * (scale[0] + a * (scale[1] - scale[0]))
        aspect = math.exp(low + r * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[0] * (width - w + 1)), int(draws[1] * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1]))  # after ten attempts: the centre, as much as the ratio allows
    h = min(height, round(width / ratio[0]))
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


class Files:
    """The photographs of one half of a tree, and which of them turned out to be bad.

    folder: of the half. names, labels: (N,). classes: names of the folders that they lie in, None for a flat half.
    More than int(tolerated * N) bad files are a DataError.
    """

    def __init__(self, folder, classes, names, labels, tolerated):
        self.folder, self.classes, self.names, self.labels = Path(folder), classes, names, labels
        self.tolerated, self.bad, self.lock = tolerated, {}, threading.Lock()

    def path(self, i):
        place = self.folder if self.classes is None else self.folder / self.classes[self.labels[i]]
        return place / os.fsdecode(self.names[i])

    @contextmanager
    def attempt(self, i):
        """The block reads photograph i; a BadFile in it is noted, told once, and ends no more than the block."""
        try:
            yield
        except BadFile as error:
            with self.lock:
                if i not in self.bad:
                    self.bad[i] = str(error)
                    tqdm.write(f"{self.path(i)} is left out: {error}", file=sys.stderr)
                if len(self.bad) > int(self.tolerated * len(self.names)):
                    first, reason = next(iter(self.bad.items()))
                    raise DataError(f"{len(self.bad):,} of the {len(self.names):,} images in {self.folder} cannot be "
                                    f"read, more than the {self.tolerated:.2%} that may be left out; the first was "
                                    f"{self.path(first)}: {reason}") from None

    def read(self, i, choose, out, mirrored=False):
        """Photograph i in out (H, W, 3) of uint8, True; or False if it is bad. choose(width, height) -> box."""
        with self.attempt(i):
            if i in self.bad:
                raise BadFile(self.bad[i])
            with opened(self.path(i)) as (image, orientation, size):
                image = cut(image, orientation, out.shape[1::-1], choose(*size))
            out[...] = image.transpose(TURNS[2]) if mirrored else image
            return True
        return False


# ---------------------------------------------------------------------------------------------- the data set


@dataclass(frozen=True)
class Photos:
    """Photographs as a data set: what train.py uses of data.Dataset.

    train, test: Files, of which the places train_index and test_index (N,) count, with labels (N,) of int64.
    size: of the square images that a network sees. threads: decoders.
    """

    name: str
    classes: int
    train: Files
    train_index: np.ndarray
    test: Files
    test_index: np.ndarray
    size: int
    threads: int

    shape = property(lambda self: (3, self.size, self.size))
    train_labels = functools.cached_property(lambda self: self.train.labels[self.train_index])
    test_labels = functools.cached_property(lambda self: self.test.labels[self.test_index])

    def to_device(self):
        """Itself: photographs go to the device a batch at a time."""
        return self

    def train_batches(self, batch, seed, epoch, start=0, part=(0, 1)):
        """(x, y) of random crops of the training set, in an order that depends on (seed, epoch) alone, from batch
        `start` on; a crop depends on (seed, epoch, photograph).

        x (batch, 3, size, size) of float32, y (batch,) of int64, of which this is part = (rank, ranks): the rows
        batch rank / ranks to batch (rank + 1) / ranks, which may be none. The last batch may be smaller. A batch is
        valid until the next one is asked for. In place of a bad file comes the next of the index, with its own label.
        """
        count = len(self.train_index)
        order = nn.generator(seed, "batches", epoch).permutation(count)

        def fill(place, out):
            for other in range(place, place + count):
                i = int(self.train_index[other % count])
                draws = nn.generator(seed, "crop", epoch, i).random(23).tolist()
                if self.train.read(i, functools.partial(random_box, draws), out, mirrored=draws[22] < 0.5):
                    return self.train.labels[i]
            raise DataError(f"none of the {count:,} images used of {self.train.folder} can be read")

        return self.batches(order, batch, start, part, fill)

    def test_batches(self, batch, part=(0, 1)):
        """(x, y) of the centres of the test set in its own order, as those of train_batches; bad files are left out."""

        def fill(place, out):
            i = int(self.test_index[place])
            found = self.test.read(i, functools.partial(centre_box, size=self.size), out)
            return self.test.labels[i] if found else -1

        return self.batches(np.arange(len(self.test_index)), batch, 0, part, fill)

    def batches(self, order, batch, start, part, fill):
        """fill(place, out) puts an image into out (size, size, 3) and returns its label, -1 for none."""
        shares = iter(data.shares(len(order), batch, start, part))
        most = -(-min(batch, len(order)) // part[1])  # rounded up
        memory = [np.empty((most, self.size, self.size, 3), np.uint8) for _ in range(AHEAD)]
        coming = deque()
        pool = ThreadPoolExecutor(self.threads or conv.threads()[0], thread_name_prefix="photos")

        def begin(pixels):
            for share in itertools.islice(shares, 1):
                places = order[share].tolist()
                coming.append((pixels, [pool.submit(fill, place, out) for place, out in zip(places, pixels)]))

        try:
            for pixels in memory:
                begin(pixels)
            while coming:
                pixels, futures = coming.popleft()
                labels = np.array([future.result() for future in futures], np.int64)
                found = pixels[: len(labels)]
                x = normalised(found if (labels >= 0).all() else found[labels >= 0])
                begin(pixels)
                yield x, nn.xp.asarray(labels[labels >= 0])
        finally:
            pool.shutdown(cancel_futures=True)

    def limited(self, count):
        """Only `count` training examples: the first of a fixed random order that takes the classes in turn."""
        data.check_limit(self, count)
        return replace(self, train_index=self.in_turn()[:count])

    def held_out(self, count):
        """The last `count` training examples of the order of `limited` take the place of the test set."""
        keep = data.left_without(self, count)
        chosen = self.in_turn()
        return replace(self, train_index=chosen[:keep], test=self.train, test_index=np.sort(chosen[keep:]))

    def in_turn(self):
        """train_index in an order of which every piece has about as many examples of each class."""
        draws = nn.generator(0, "in turn").random(len(self.train.names))[self.train_index]
        by_class = np.lexsort((draws, self.train_labels))
        counts = np.bincount(self.train_labels)
        turn = np.empty(len(by_class))  # where in its class an example stands, from 0 to 1
        turn[by_class] = np.arange(len(by_class)) - np.repeat(np.cumsum(counts) - counts, counts)
        turn = (turn + draws) / counts[self.train_labels]
        return self.train_index[np.argsort(turn)]


def normalised(pixels):
    """(N, H, W, 3) of uint8 on the host -> (N, 3, H, W) of float32 of nn.xp, in the order that convolutions want."""
    scale, shift = (1 / (255 * np.array(STD))).astype(np.float32), (-np.array(MEAN) / STD).astype(np.float32)
    if nn.xp is not np:
        x = nn.xp.asarray(pixels) * nn.xp.asarray(scale)
        x += nn.xp.asarray(shift)
        return x.transpose(0, 3, 1, 2)
    N, H, W, C = pixels.shape
    x = conv.empty((N, C, H, W), np.float32, halo=3)  # the border that a 7 x 7 kernel needs
    for y, row in enumerate(conv.rows(x)):  # of all images: it stays in the cache
        row[...] = pixels[:, y].transpose(2, 1, 0)  # (N, W, C) -> (C, W, N)
        row *= scale[:, None, None]
        row += shift[:, None, None]
    return x


NAMES = ("imagenet", "imagenet-256", "synthetic")


def load(name, folder, size=224, threads=0, tolerated=0.01):
    """The data set of this name: the trees folder/imagenet and folder/imagenet-256 (see `prepare`), or `synthetic`.

    size: of the images that a network sees. threads: decoders, 0 for as many as this process has cores. tolerated: the
    share of either half's files that may be unreadable.
    """
    if name not in NAMES:
        raise DataError(f"no data set of photographs is called {name!r}; there are {', '.join(NAMES)}")
    tree = synthetic(folder, threads=threads) if name == "synthetic" else Path(folder, name)
    if name == "imagenet" and not (tree / "train").is_dir():
        raise DataError(f"{tree / 'train'} is not there: ImageNet (ILSVRC2012, from image-net.org, which asks for an "
                        f"account) should lie in {tree} as train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG "
                        f"with the devkit beside it")
    state = marked(tree)
    if name == "imagenet-256" and state is None or state and not state["finished"]:
        raise DataError(f"{tree} is no finished copy of {Path(folder, 'imagenet')}; --prepare makes it or goes on "
                        "with it")
    return of_tree(name, tree, size, threads, tolerated)


def of_tree(name, tree, size=224, threads=0, tolerated=0.01):
    """The Photos of any tree that `index` can read; name: what messages call it."""
    classes, (train, test) = files_of(tree, tolerated)
    everything = np.arange(len(train.names)), np.arange(len(test.names))
    return Photos(name, len(classes), train, everything[0], test, everything[1], size, threads)


def files_of(tree, tolerated):
    """(class names, (Files to train on, Files to test on))"""
    classes, halves, flat = index(tree)
    return classes, (Files(Path(tree, "train"), classes, *halves["train"], tolerated),
                     Files(Path(tree, "val"), None if flat else classes, *halves["val"], tolerated))


# ---------------------------------------------------------------------------------------------- the resized copy

MARKER = "prepared.json"


def marked(folder):
    """{"side": of the copy in this folder, "finished": whether it is}, or None where no copy was begun."""
    try:
        state = json.loads(Path(folder, MARKER).read_text())
        return {"side": int(state["side"]), "finished": state["finished"] is True}
    except FileNotFoundError:
        return None
    except Exception as error:
        raise DataError(f"{Path(folder, MARKER)} cannot be read ({error}); remove it and prepare again") from None


def mark(folder, side, finished):
    write_whole(Path(folder, MARKER), json.dumps({"side": side, "finished": finished}))


def prepare(folder, target, side=256, threads=0, tolerated=0.01):
    """Copy a tree of photographs with smallest side `side` (bilinear, JPEG of quality 95), upright.

    Photographs that are not larger are copied as they are. The copy has class folders in both halves, so it needs no
    file of labels. Bad files are named and left out, up to the tolerated share of each half. A second call goes on
    where the first was cut: files that are there and whole are kept. Returns {"resized", "copied", "kept", "bad": n}.
    """
    folder, target = Path(folder), Path(target)
    if target.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{target} lies in {folder}; the copy should have a folder of its own")
    before = marked(target)
    if before and before["side"] != side:
        raise DataError(f"{target} holds a copy of smallest side {before['side']}; one of {side} needs another folder")
    classes, halves = files_of(folder, tolerated)
    for half in halves:
        for name in classes:
            (target / half.folder.name / name).mkdir(parents=True, exist_ok=True)
    mark(target, side, finished=False)
    train = len(halves[0].names)
    counts = dict.fromkeys(("resized", "copied", "kept", "bad"), 0)

    def count(result):
        counts[result] += 1

    def work(number):
        half, i = (halves[0], number) if number < train else (halves[1], number - train)
        path = target / half.folder.name / classes[half.labels[i]] / half.path(i).name
        if whole(path):
            return "kept"
        with half.attempt(i):
            return shrink(half.path(i), path, side)
        return "bad"

    total = train + len(halves[1].names)
    in_threads(work, total, threads, f"writing {target}", count)
    to_disk()  # all files at once: waiting for each would take longer than everything else
    mark(target, side, finished=True)
    return counts


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
    with opened(source) as (image, orientation, size):
        smaller = min(size) > side
        target = resized(*size, side) if smaller else size
        upright = cut(image, orientation, target, (0, 0, *size))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if smaller or orientation != 1:
            upright.save(temporary, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=95)
        else:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return "resized" if smaller else "copied"


def to_disk():
    """Flush everything that was written, where the system can."""
    if hasattr(os, "sync"):
        os.sync()


def in_threads(work, count, threads, description, done=lambda result: None):
    """done(work(i)) for i in range(count) in threads, under a progress bar; the first exception ends them all."""
    numbers, lock = iter(range(count)), threading.Lock()  # next() of a range's iterator is one step for all threads
    with tqdm(total=count, desc=description, disable=None, leave=False) as bar:

        def worker():
            for i in numbers:
                result = work(i)
                with lock:
                    done(result)
                    bar.update()

        threads = threads or conv.threads()[0]
        with ThreadPoolExecutor(threads) as pool:
            try:
                for worked in as_completed([pool.submit(worker) for _ in range(threads)]):
                    worked.result()
            finally:
                deque(numbers, maxlen=0)  # nothing is left for the others


# ---------------------------------------------------------------------------------------------- synthetic

SYNTHETIC_VERSION = 1  # part of the folder's name: raise it when the drawing changes


def synthetic(folder, classes=10, images=200, test=50, seed=0, threads=0):
    """The path of a tree of drawn photographs, `images` to train on and `test` to test on of each class, 64 to 128
    pixels a side, the same for a seed; drawn once.

    A class is an outline, a texture and the direction between the texture's colours; the colours themselves, place,
    size, light and what lies behind and beside are as they come, so that no pixel tells the classes apart. A ResNet of
    width 16 at 48 pixels reaches 71 % in 8 epochs, a linear classifier 13 %.
    """
    tree = Path(folder, f"synthetic-photos-{classes}x{images}+{test}-seed{seed}-v{SYNTHETIC_VERSION}")
    if tree.is_dir():
        return tree
    temporary = tree.with_name(f".{tree.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    kinds = [Kind(nn.generator(seed, "kind", c)) for c in range(classes)]
    halves = [("train", images), ("val", test)]
    for half, _ in halves:
        for c in range(classes):
            (temporary / half / f"class_{c:04}").mkdir(parents=True)

    def work(number):
        c, i = divmod(number, images + test)
        half, i = ("train", i) if i < images else ("val", i - images)
        rng = nn.generator(seed, half, c, i)
        Image.fromarray(draw(kinds[c], rng)).save(temporary / half / f"class_{c:04}" / f"{i:05}.jpg",
                                                  quality=int(rng.integers(75, 96)))

    try:
        in_threads(work, classes * (images + test), threads, "drawing photographs")
        to_disk()
        with suppress(OSError):  # another process was faster
            temporary.rename(tree)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tree


class Kind:
    """What the objects of a class have in common; every property is random."""

    def __init__(self, rng):
        self.lobes, self.depth = rng.integers(2, 7), rng.uniform(0.1, 0.4)  # of the outline
        self.waves, self.angle, self.checked = rng.uniform(1.5, 5), rng.uniform(0, np.pi), rng.random() < 0.5  # texture
        axis = rng.normal(0, 1, 3)
        self.contrast = 0.3 * axis / np.linalg.norm(axis)  # between the colours of the texture


def draw(kind, rng):
    """A photograph (H, W, 3) of uint8 of an object of this kind, and of one that is of none."""
    H, W = rng.integers(64, 129, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (*rng.integers(2, 9, 2), 3), np.uint8))
    x = np.asarray(coarse.resize((W, H), Image.Resampling.BICUBIC), np.float32) / 255
    rows, columns = np.ogrid[:H, :W]
    for k in (Kind(rng), kind):  # the other one may be partly covered
        top, left = rng.uniform(0.25, 0.75, 2) * (H, W)
        radius, turn, phase = rng.uniform(0.25, 0.5) * min(H, W), rng.normal(0, 0.3), rng.uniform(0, 2 * np.pi, 2)
        v, u = (rows - top).astype(np.float32) / radius, (columns - left).astype(np.float32) / radius
        outline = 1 + k.depth * np.cos(k.lobes * (np.arctan2(v, u) - turn))
        inside = np.clip((outline - np.hypot(u, v)) * radius / 2, 0, 1)
        cos, sin = np.cos(k.angle + turn) * k.waves * np.pi, np.sin(k.angle + turn) * k.waves * np.pi
        texture = np.sin(cos * u + sin * v + phase[0])
        if k.checked:
            texture *= np.sin(cos * v - sin * u + phase[1])
        colour = rng.uniform(0.25, 0.75, 3).astype(np.float32) + texture[..., None] * k.contrast.astype(np.float32)
        x += inside[..., None] * (colour - x)  # (H, W) -> (H, W, 1)
    light = rng.uniform(0.5, 1.1) + rng.uniform(-0.3, 0.3) * rows / H + rng.uniform(-0.3, 0.3) * columns / W
    x *= light[..., None]
    x += rng.normal(0, 0.06) + 0.05 * rng.standard_normal(x.shape, np.float32)
    return np.clip(255 * x, 0, 255).astype(np.uint8)
