"""Data sets: find or download, verify, normalise, batch.

    dataset = load("cifar10", "data").augmented()         # or "synthetic": generated, needs no network and no files
    for x, y in dataset.train_batches(128, seed=0, epoch=0): ...

Images are kept as bytes (N, C, H, W) and become float32 a batch at a time: a quarter of the memory traffic of a
float copy of the data set, and measured faster for it. Every fault of a file is a DataError of one sentence.
"""

import gzip
import hashlib
import http.client
import math
import os
import struct
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import nn
from files import FileFault, read_arrays, save_arrays, write_whole


class DataError(Exception):
    """A data file that is missing, damaged or not what it should be; the message names it."""


# ---------------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W) of uint8 with labels (N,) of int64; a network sees image * scale + shift (float32).

    scale, shift: arrays that broadcast to (C, H, W).
    padding, flip: how training images vary, see `augmented`.
    """

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    padding: int = 0
    flip: bool = False

    shape = property(lambda self: self.train_images.shape[1:])

    def to_device(self):
        """The same data set in arrays of nn.xp."""
        arrays = {k: nn.xp.asarray(v) for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **arrays)

    def augmented(self, padding=4, flip=True):
        """Training images become random crops of their own size from the image with `padding` black pixels on each
        side, then, with `flip`, mirrored left to right half of the time; test images stay as they are.
        """
        return replace(self, padding=padding, flip=flip)

    def train_batches(self, batch, seed, epoch, start=0, part=(0, 1)):
        """(x, y) of the training set in an order that depends on (seed, epoch) alone, from batch `start` on.

        x (batch, C, H, W) of float32, y (batch,) of int64; the last batch may be smaller. A batch is valid until the
        next one is asked for: its memory is used again. Crops and flips depend on (seed, epoch) alone as well.
        part: (rank, ranks): of each batch only the rank's share, which may be empty.
        """
        order, draws = (None if a is None else nn.xp.asarray(a) for a in self.shuffled(seed, epoch))
        if draws is None:
            return self.batches(self.train_images, self.train_labels, order, batch, start, part)
        batches = self.batches(self.train_images, self.train_labels, order, batch, start, part, draws)
        return ahead(batches) if nn.xp is np else batches  # a GPU works ahead of Python by itself

    def shuffled(self, seed, epoch):
        """The order (N,) of the training images in an epoch, and draws (3, N) of what `cropped` needs for each place in
        it, or None if images stay as they are: arrays of the host, so that a seed means the same on every device.
        """
        count = len(self.train_labels)
        order = nn.generator(seed, "batches", epoch).permutation(count)
        if not self.padding and not self.flip:
            return order, None
        ends = [[2 * self.padding + 1], [2 * self.padding + 1], [1 + self.flip]]
        return order, nn.generator(seed, "augment", epoch).integers(0, ends, (3, count))

    def test_batches(self, batch, part=(0, 1)):
        """(x, y) of the test set in its own order; x, y and part as those of train_batches."""
        order = nn.xp.arange(len(self.test_labels))
        return self.batches(self.test_images, self.test_labels, order, batch, part=part)

    def batches(self, images, labels, order, batch, start=0, part=(0, 1), draws=None):
        """draws: (3, N) of integers, what `cropped` needs for each place in the order; None for images as they are."""
        raw = nn.xp.empty((min(batch, len(order)), *images.shape[1:]), np.uint8)
        # `ahead` fills one array while the other is in use; without it a second one would only take cache
        buffers = [nn.xp.empty(raw.shape, np.float32) for _ in range(1 if draws is None else 2)]
        for number, mine in enumerate(shares(len(order), batch, start, part)):
            rows = order[mine]
            pixels = nn.gather(images, rows, out=raw[: len(rows)])
            if draws is not None:
                pixels = cropped(pixels, self.padding, *draws[:, mine])
            x = buffers[number % len(buffers)][: len(rows)]
            x[...] = pixels
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
        check_limit(self, count)
        return replace(self, train_images=self.train_images[:count], train_labels=self.train_labels[:count])

    def held_out(self, count):
        """The last `count` training examples take the place of the test set: for choosing settings honestly."""
        keep = left_without(self, count)
        return replace(self, train_images=self.train_images[:keep], train_labels=self.train_labels[:keep],
                       test_images=self.train_images[keep:], test_labels=self.train_labels[keep:])


def check_limit(dataset, count):
    """Raise DataError unless a data set has `count` training images."""
    if count > len(dataset.train_labels):
        raise DataError(f"{dataset.name} has {len(dataset.train_labels):,} training images, so a limit of "
                        f"{count:,} cannot be met")


def left_without(dataset, count):
    """How many training images a data set has beside `count` of them; DataError if none."""
    left = len(dataset.train_labels) - count
    if left < 1:
        raise DataError(f"{dataset.name} has {len(dataset.train_labels):,} training images, so {count:,} cannot be "
                        "held out")
    return left


def shares(count, batch, start, part):
    """The slices of range(count) that are this part's, (rank, ranks), of each batch from number `start` on."""
    rank, ranks = part
    for first in range(start * batch, count, batch):
        n = min(batch, count - first)
        yield slice(first + n * rank // ranks, first + n * (rank + 1) // ranks)


def cropped(images, padding, top, left, mirrored):
    """From each image (N, C, H, W), with `padding` zeros on each side, the H x W pixels that begin at row `top` and
    column `left`, both (N,) in 0..2 padding, read from right to left where `mirrored` (N,) is not 0.
    """
    N, C, H, W = images.shape
    padded = nn.xp.zeros((N, C, H + 2 * padding, W + 2 * padding), images.dtype)
    padded[:, :, padding : padding + H, padding : padding + W] = images
    n, c, h, w = padded.strides
    windows = nn.xp.lib.stride_tricks.as_strided(  # sliding_window_view, which in CuPy waits for the GPU
        padded, (N, C, 2 * padding + 1, 2 * padding + 1, H, W), (n, c, h, w, h, w))
    crops = windows[nn.xp.arange(N), :, top, left]  # (N, C, H, W)
    return nn.xp.where(mirrored[:, None, None, None] != 0, crops[..., ::-1], crops)


def ahead(batches):
    """The items of a generator, each prepared by a thread while the one before it is in use.

    The generator runs on when an item is handed out, so it may then overwrite all but that item. Its exceptions are
    raised here; when this generator is closed or forgotten, the thread ends with the item at hand.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        end = object()
        coming = thread.submit(next, batches, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, batches, end)
            yield item


NAMES = ("mnist", "cifar10", "cifar100", "svhn", "synthetic")


def load(name, folder):
    """The data set of this name from `folder`; what is absent is downloaded there, synthetic generated."""
    if name not in NAMES:
        raise DataError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")
    return dict(zip(NAMES, (mnist, cifar10, cifar100, svhn, synthetic)))[name](folder)


def normalized(name, classes, train, test, mean, std):
    """The Dataset of two pairs (images, labels), normalised by each channel's mean and deviation of image / 255."""
    one = np.ones(1, np.float32)
    mean, std = np.reshape(mean, (-1, 1, 1)), np.reshape(std, (-1, 1, 1))  # (C,) -> (C, 1, 1)
    return Dataset(name, classes, *train, *test, one, one).standardized(mean, std)


# ---------------------------------------------------------------------------------------------- files


def find(folder, subfolders, names):
    """The first of these files that exists in one of these subfolders ("": the folder itself), or None."""
    paths = (Path(folder, sub, name) for sub in subfolders for name in names)
    return next((path for path in paths if path.exists()), None)


def find_or_download(folder, subfolders, names, mirrors, verify):
    """The path of the file as `find` finds it; if it is absent, its last name is downloaded to the first subfolder."""
    path = find(folder, subfolders, names)
    if path is None:
        path = Path(folder, subfolders[0], names[-1])
        download([mirror + names[-1] for mirror in mirrors], path, verify)
    return path


def md5_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


@contextmanager
def reading(path, kind):
    """Whatever goes wrong while this file is read becomes a DataError that names it and the kind it should be of."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # readers of a format raise what they happen to trip over, not only their own errors
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{path} is not a whole {kind}: {reason}") from None


def check_size(path, have, want, what):
    """Raise DataError unless a file has the number of bytes that its contents, `what`, make."""
    if have != want:
        kind = f"is cut short at {have:,} bytes" if have < want else "goes on after its data"
        raise DataError(f"{path} {kind}: {what} make {want:,} bytes")


def check_labels(path, labels, first, last):
    """Raise DataError for a label that is not one of the whole numbers from `first` to `last`."""
    wrong = ~np.isin(labels, np.arange(first, last + 1))
    if wrong.any():
        where = int(np.argmax(wrong))
        raise DataError(f"{path} has label {labels[where]} at position {where}, "
                        f"but labels go from {first} to {last}")


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
    paths = {
        name: find_or_download(
            folder, ("mnist", ""), (name, name + ".gz"), mirrors,
            verify=lambda path, md5=md5: md5_of_contents(path) == md5)
        for name, md5 in MNIST_FILES.items()
    }
    train, test = (
        read_idx_pair(paths[f"{part}-images-idx3-ubyte"], paths[f"{part}-labels-idx1-ubyte"], 10, (count, 28, 28))
        for part, count in MNIST_COUNTS.items()
    )
    return normalized("mnist", 10, train, test, 0.1307, 0.3081)


@contextmanager
def unpacked(path):
    """A plain or gzip file, open for reading what it holds; faults while it is read are DataErrors."""
    with reading(path, "gzip file"), open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        yield gzip.GzipFile(fileobj=raw) if packed else raw


def md5_of_contents(path, most=2**26):
    """The MD5 of what a plain or gzip file holds; of the first `most` bytes and some more if it holds more."""
    digest = hashlib.md5()
    with unpacked(path) as file:
        while file.tell() <= most and (block := file.read(2**16)):
            digest.update(block)
    return digest.hexdigest()


def read_idx(path, shape):
    """The uint8 array of an IDX file, which should have this shape; no more is read than it takes.

    The format: 4 bytes 0, 0, 8 (unsigned bytes), number of dimensions; their big-endian 32-bit sizes; the entries.
    """
    magic, header, size = bytes((0, 0, 8, len(shape))), 4 + 4 * len(shape), math.prod(shape)
    want = "x".join(map(str, shape))
    with unpacked(path) as file:
        head = file.read(header)
        if head[:4] != magic:
            raise DataError(f"{path} is not an IDX file of {len(shape)}-dimensional bytes: it begins with "
                            f"{head[:4].hex(' ') or 'nothing'} instead of {magic.hex(' ')}")
        if len(head) < header:
            raise DataError(f"{path} ends within its header of {header} bytes")
        have = "x".join(map(str, np.frombuffer(head, ">u4", offset=4)))
        if have != want:
            raise DataError(f"{path} holds {have} entries instead of {want}")
        content = file.read(size + 1)  # one more, so that a gzip file's checksum is read and compared as well
    check_size(path, header + len(content), header + size, f"{want} entries")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_idx_pair(images_path, labels_path, classes, shape):
    """Images (N, 1, H, W) of uint8, shape = (N, H, W), and labels (N,) of int64 that belong together."""
    images, labels = read_idx(images_path, shape), read_idx(labels_path, shape[:1])
    check_labels(labels_path, labels, 0, classes - 1)
    return images[:, None], labels.astype(np.int64)


# ---------------------------------------------------------------------------------------------- CIFAR, SVHN

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR_MD5 = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
             "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}
CIFAR10_COUNTS = {**{f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, "test_batch.bin": 10_000}
CIFAR100_COUNTS = {"train.bin": 50_000, "test.bin": 10_000}
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
SVHN_FILES = {"train_32x32.mat": (73_257, "e26dedcc434d2e4c54c9b2d4a06d8373"),
              "test_32x32.mat": (26_032, "eb5a983be6a315427106f1b164d9cef3")}


def cifar10(folder, mirrors=(CIFAR_URL,)):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 3 x 32 x 32, 10 classes.

    The six files of its binary version lie in folder/cifar-10-batches-bin, folder/cifar10 or folder; absent ones are
    unpacked from the archive, which is downloaded if it is not in the folder. What is there need not be the original
    (re-encoded copies exist), so it is checked for its structure.
    """
    train, test = read_cifar("cifar10", folder, mirrors, "cifar-10-binary.tar.gz", "cifar-10-batches-bin",
                             CIFAR10_COUNTS, label_bytes=1, classes=10)
    return normalized("cifar10", 10, train, test, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(folder, mirrors=(CIFAR_URL,)):
    """CIFAR-100: as CIFAR-10, with 100 classes (the fine labels); train.bin and test.bin in folder/cifar-100-binary,
    folder/cifar100 or folder.
    """
    train, test = read_cifar("cifar100", folder, mirrors, "cifar-100-binary.tar.gz", "cifar-100-binary",
                             CIFAR100_COUNTS, label_bytes=2, classes=100)
    return normalized("cifar100", 100, train, test, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def read_cifar(name, folder, mirrors, archive, unpacked, counts, label_bytes, classes):
    """(images, labels) of the training and of the test set; counts: {file: records}, the test set's file last."""
    record = label_bytes + 3 * 32 * 32
    places = (unpacked, name, "")
    absent = {f"{unpacked}/{file}": n * record for file, n in counts.items() if not find(folder, places, (file,))}
    if absent:
        packed = find_or_download(folder, ("", name), (archive,), mirrors,
                                  verify=lambda path: md5_of(path) == CIFAR_MD5[archive])
        unpack(packed, absent, folder, most=sum(counts.values()) * record + HEADERS)
    *train, test = (read_records(find(folder, places, (file,)), n, label_bytes, classes) for file, n in counts.items())
    return [np.concatenate(parts) for parts in zip(*train)], test


def read_records(path, count, label_bytes, classes):
    """Images (N, 3, 32, 32) and labels (N,) of a file of records: labels of a byte each, the last of which is the
    finest, then 3 x 32 x 32 bytes.
    """
    record = label_bytes + 3 * 32 * 32
    with reading(path, "CIFAR file"), open(path, "rb") as file:
        check_size(path, os.fstat(file.fileno()).st_size, count * record, f"{count:,} records of {record:,} bytes")
        records = np.fromfile(file, np.uint8, count * record).reshape(count, record)
    labels = records[:, label_bytes - 1].astype(np.int64)
    check_labels(path, labels, 0, classes - 1)
    return np.ascontiguousarray(records[:, label_bytes:]).reshape(count, 3, 32, 32), labels  # (N, 3072) -> images


HEADERS = 2**20  # bytes of headers and the like that an archive may have beside what is wanted of it


class Guarded:
    """A stream as tarfile wants it, whose headers and length are bounded and which goes forward only.

    A header can claim any size, make itself longer and lead back: without this, memory and time are the archive's.
    """

    def __init__(self, stream, path, most):
        self.stream, self.path, self.most, self.headers = stream, path, most, HEADERS

    def tell(self):
        return self.stream.tell()

    def read(self, size):
        if not 0 <= size <= self.headers:  # it can be negative, which would read on to the end
            raise DataError(f"{self.path} holds more than {HEADERS:,} bytes of headers")
        self.headers -= size
        return self.stream.read(size)

    def seek(self, place):
        if not self.tell() - 1 <= place <= self.most:  # tarfile looks at the byte before each header
            raise DataError(f"{self.path} holds a member that would end at byte {place:,} of {self.most:,}")
        return self.stream.seek(place)


def unpack(archive, sizes, folder, most):
    """Write these members of a tar.gz, {name: bytes}, to folder/name; no other member is read or written.

    DataError unless each is there once, as a regular file of that size, and the archive is whole and holds no more
    than `most` bytes.
    """
    contents = {}
    with reading(archive, "tar.gz file"), gzip.open(archive) as stream:
        with tarfile.open(fileobj=Guarded(stream, archive, most), mode="r:") as tar:
            for member in tar:
                if member.name not in sizes:
                    continue
                if member.name in contents:
                    raise DataError(f"{archive} holds {member.name} more than once")
                if not member.isreg() or member.issparse():
                    raise DataError(f"{archive} holds {member.name} as a link, device or the like instead of a "
                                    "regular file")
                size = sizes[member.name]
                if member.size != size:
                    raise DataError(f"{archive} holds {member.name} with {member.size:,} bytes instead of {size:,}")
                stream.seek(member.offset_data)
                contents[member.name] = stream.read(size)
        while stream.read(2**16):  # to the end, where gzip keeps the checksum
            if stream.tell() > most:
                raise DataError(f"{archive} holds more than {most:,} bytes")
    absent = sizes.keys() - contents.keys()
    if absent:
        raise DataError(f"{archive} does not hold {min(absent)}")
    for name, content in contents.items():
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder, name), content)


def svhn(folder, mirrors=(SVHN_URL,)):
    """SVHN (Netzer et al. 2011), cropped digits: 73,257 training and 26,032 test images of 3 x 32 x 32.

    Its two .mat files lie in folder/svhn or in folder; absent ones are downloaded.
    """
    train, test = (
        read_mat(find_or_download(folder, ("svhn", ""), (name,), mirrors,
                                  verify=lambda path, md5=md5: md5_of(path) == md5), count)
        for name, (count, md5) in SVHN_FILES.items()
    )
    return normalized("svhn", 10, train, test, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


def read_mat(path, count):
    """Images (N, 3, 32, 32) and labels (N,) of an SVHN file: X (32, 32, 3, N) of uint8, y (N, 1) with 10 for digit 0.
    """
    want = {"X": (32, 32, 3, count), "y": (count, 1)}
    arrays = [pair for pair in mat_variables(path, 32 * 32 * 3 * count + 8 * count + 2**16) if pair[0] in want]
    have = [(name, getattr(array, "shape", ())) for name, array in arrays]
    if sorted(have) != sorted(want.items()):
        have, need = (" and ".join(f"{name} of {'x'.join(map(str, shape)) or 'no numbers'}" for name, shape in pairs)
                      for pairs in (have, want.items()))
        raise DataError(f"{path} holds {have or 'neither X nor y'} instead of {need}")
    images, labels = map(dict(arrays).get, want)
    if images.dtype != np.uint8:
        raise DataError(f"{path} holds X of {images.dtype} instead of uint8")
    labels = labels.reshape(count)  # (N, 1) -> (N,)
    check_labels(path, labels, 1, 10)
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels.astype(np.int64) % 10  # (H, W, C, N) -> images


MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAT_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
MAT_TEXTS = {1: "latin1", 2: "latin1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}


def mat_variables(path, most):
    """[(name, value)] of a MATLAB file, of level 5 as MATLAB 5 to 7 write it, that takes at most `most` bytes.

    128 bytes of header, then elements, each a type, a size and a content; a variable is an element MATRIX or the zlib
    stream of one. Written out here, as SciPy's reader takes the memory that a file claims.
    """
    with reading(path, ".mat file"), open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise DataError(f"{path} has more than {most:,} bytes, which its variables cannot need")
        content, variables = memoryview(file.read()), []
        if content[124:128] != b"\0\1IM":
            raise ValueError("its header is none of MATLAB 5 to 7")
        for kind, part in mat_elements(content[128:]):
            if kind == MAT_COMPRESSED:
                kind, part = mat_inflated(part, most)
            most -= len(part)
            if kind == MAT_MATRIX:
                variables.append(mat_matrix(part))
    return variables


def mat_inflated(packed, most):
    """(type, content) of the element in this zlib stream; ValueError if it claims more than `most` bytes."""
    kind, size = struct.unpack("<II", zlib.decompressobj().decompress(packed[:1024], 8))
    if size > most:
        raise ValueError(f"a variable claims {size:,} bytes of {most:,} that are left")
    stream = zlib.decompressobj()
    content = stream.decompress(packed, 8 + size + 1)  # one more, so that the checksum is read and compared as well
    if len(content) != 8 + size or not stream.eof:
        raise ValueError("a variable is not as long as it says")
    return kind, memoryview(content)[8:]


def mat_elements(content):
    """[(type, content)] of elements that follow each other; those of up to four bytes have a short header."""
    found, at = [], 0
    while at < len(content):
        kind, size = struct.unpack("<II", content[at : at + 8].tobytes().ljust(8, b"\xff"))
        short = kind >> 16
        begin, size = (at + 4, short) if short else (at + 8, size)
        if begin + size > len(content):
            raise ValueError("an element is cut short")
        kind &= 0xFFFF
        found.append((kind, content[begin : begin + size]))
        at = begin + size if kind == MAT_COMPRESSED else begin + size + -(begin + size) % 8
    return found


def mat_matrix(content):
    """(name, value) of a matrix: its numbers as an array, its text, or of a table, MATLAB's struct, a list of
    {field: value}; None for all else.
    """
    (_, flags), (_, shape), (_, name), *parts = mat_elements(content)
    shape, name, kind = np.frombuffer(shape, "<i4").tolist(), bytes(name).decode("ascii"), flags[0]
    if kind == 2:
        (_, width), (_, fields), *parts = parts
        width = int.from_bytes(width, "little")
        fields = [bytes(fields[i : i + width]).split(b"\0")[0].decode("ascii") for i in range(0, len(fields), width)]
        values = [mat_matrix(part)[1] for _, part in parts]
        if len(values) != math.prod(shape) * len(fields):
            raise ValueError(f"the table {name} has {len(values):,} entries")
        rows = range(0, len(values), len(fields))
        return name, [dict(zip(fields, values[i : i + len(fields)])) for i in rows]
    if kind == 4:
        ((kind, text),) = parts
        return name, bytes(text).decode(MAT_TEXTS[kind])
    if 6 <= kind <= 15:
        ((kind, numbers),) = parts  # complex ones have two
        return name, np.frombuffer(numbers, MAT_NUMBERS[kind]).reshape(shape, order="F")
    return name, None


# ---------------------------------------------------------------------------------------------- download


LARGEST = 2**28  # bytes of a file that is downloaded
PATIENCE = 60  # seconds after which an attempt is given up that has no answer, or in which
SLOWEST = 600_000  # fewer bytes than this have come
PIECE = 2**16  # an attempt that brought as much as this was not in vain


def download(urls, path, verify):
    """Fetch the first of these addresses whose file passes verify(path) and move it to `path`.

    What has arrived is kept as path.part and continued after a cut; nothing unverified is ever called `path`.
    Raises DataError with the reason for every address when none of them gave the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = []
    for url in urls:
        in_vain = 0  # attempts that brought nothing or took too long; one that was cut but brought something is free
        while in_vain < 3:
            before = size_of(part)
            try:
                continued = fetch(url, part)
                if verify_quietly(verify, part):
                    with open(part, "rb") as file:
                        os.fsync(file.fileno())
                    os.replace(part, path)
                    return
                part.unlink()
                reason = "its contents have the wrong checksum"
                if not continued:  # a whole file from this mirror is wrong, and would be again
                    break
                in_vain += 1
            except (OSError, http.client.HTTPException, ValueError) as error:  # urllib's own errors are OSErrors
                reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
                if 400 <= getattr(error, "code", 0) < 500:  # the server knows that it has no such file
                    break
                in_vain += isinstance(error, TimeoutError) or size_of(part) < before + PIECE
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


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and to http where http was asked for."""

    def redirect_request(self, request, file, code, message, headers, url):
        if not url.startswith("https://") and not (url.startswith("http://") and request.type == "http"):
            raise OSError(f"the server redirects to {url}")
        return super().redirect_request(request, file, code, message, headers, url)


def fetch(url, part, timeout=20):
    """Download url to `part`, going on where an earlier attempt was cut; True if it did go on.

    Raises OSError when the connection ends before the announced length, TimeoutError when too little comes.
    """
    have = size_of(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = in_time(lambda: urllib.request.build_opener(Redirects).open(request, timeout=timeout))
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the part is as long as the file, or longer: let the checksum decide
            return True
        raise
    with response:
        continued = response.status == 206
        if continued and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError("the server sent another part of the file than was asked for")
        have = have if continued else 0
        total = None if response.length is None else have + response.length
        if (total or 0) > LARGEST:
            raise OSError(f"the server announces {total:,} bytes, more than {LARGEST:,}")
        with open(part, "ab" if continued else "wb") as file, tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None, leave=False
        ) as bar:
            begin, recent = time.monotonic(), 0
            while file.tell() <= LARGEST and (block := response.read1(PIECE)):  # read() would wait for a whole piece
                file.write(block)
                bar.update(len(block))
                recent += len(block)
                if time.monotonic() - begin > PATIENCE:
                    if recent < SLOWEST:
                        raise TimeoutError(f"only {recent:,} bytes came in {PATIENCE} s")
                    begin, recent = time.monotonic(), 0
    if total is not None and size_of(part) != total:
        raise OSError(f"the connection was cut after {size_of(part):,} of {total:,} bytes")
    return continued


def in_time(call):
    """call(), or TimeoutError after PATIENCE seconds, from when on its thread is left to itself.

    The time limit of a connection is one for each packet: a server that sends its headers a byte at a time keeps it.
    """
    answer = Future()

    def work():
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(PATIENCE)
    except TimeoutError as error:
        raise TimeoutError(f"{error}" or f"no answer came in {PATIENCE} s") from None


# ---------------------------------------------------------------------------------------------- synthetic

SYNTHETIC_VERSION = 1  # part of the cached file's name: raise it when the drawing changes


def synthetic(folder, side=28, channels=1, train=20_000, test=4_000, seed=0):
    """Digits drawn by Pillow and distorted at random, the same for a seed; generated once, then read from folder.

    Hard enough that the paper's base network (width 5) stays near 90 % and that wider ones visibly gain.
    """
    name = f"synthetic-{side}x{side}x{channels}-{train}-{test}-seed{seed}-v{SYNTHETIC_VERSION}"
    path, count = Path(folder, f"{name}.npz"), train + test
    try:
        arrays = read_arrays(path, most=count * (channels * side * side + 8) + 2**16)
        images, labels = arrays["images"], arrays["labels"]
        if [(a.shape, a.dtype) for a in (images, labels)] != [((count, channels, side, side), np.uint8),
                                                              ((count,), np.int64)]:
            raise FileFault("they are not the digits that were asked for")
        check_labels(path, labels, 0, 9)
    except (OSError, FileFault, KeyError, DataError):  # absent, cut short or damaged in any way: make it again
        images, labels = draw_digits(count, side, channels, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save_arrays({"images": images, "labels": labels}))
    x = images[:train] / np.float32(255)
    train, test = (images[:train], labels[:train]), (images[train:], labels[train:])
    return normalized("synthetic", 10, train, test, x.mean(axis=(0, 2, 3)), x.std(axis=(0, 2, 3)))


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
