"""MNIST, CIFAR-10, CIFAR-100 and SVHN: where their files are, what is in them."""

import contextlib
import functools
import gzip
import hashlib
import math
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets import pickles
from datasets.dataset import Arrays, DataError, Dataset, digest_of
from datasets.download import alone, check_published, compare, find, find_all, find_or_download
from lab.files import write_whole


def normalized(name, classes, train, test, mean, std, others=()):
    """The Dataset of two pairs (images, labels), normalised by each channel's mean and deviation of image / 255.
    others: paths of the files whose contents are not those that were published.
    """
    mean, std = np.reshape(mean, (-1, 1, 1)), np.reshape(std, (-1, 1, 1))  # (C,) -> (C, 1, 1)
    halves = (Arrays(*half).standardized(mean, std) for half in (train, test))
    unpublished = few([path.name for path in others])
    if others:
        unpublished += " is not the published one" if len(others) == 1 else " are not the published ones"
    return Dataset(name, classes, *halves, digest_of(*train, *test), unpublished)


def few(names):
    """The first of some names, and how many more there are."""
    more = len(names) - 1
    return str(*names[:1]) + (f" and {more} more file{'s' * (more > 1)}" if more > 0 else "")


@contextlib.contextmanager
def reading(path, kind):
    """Whatever goes wrong while this file is read becomes a DataError that names it and the kind it should be of."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # readers of a format raise what they happen to trip over, not only their own errors
        if reason := getattr(error, "strerror", None):
            raise DataError(f"{path} cannot be read: {reason}") from None
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{path} is not a whole {kind}: {reason}") from None


def check_labels(path, labels, classes):
    if labels.max() >= classes:
        where = int(np.argmax(labels >= classes))
        raise DataError(f"{path} has label {labels[where]} at position {where}, but labels go from 0 to {classes - 1}")


# ---------------------------------------------------------------------------------------------- MNIST

MNIST = {  # file: MD5 of its uncompressed contents (gzip bytes differ between mirrors), shape
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", (60_000, 28, 28)),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", (60_000,)),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", (10_000,)),
}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://systemds.apache.org/assets/datasets/mnist/",
)


def mnist(folder, mirrors=MNIST_MIRRORS):
    """MNIST (LeCun et al.): 60,000 training and 10,000 test digits of 28 x 28, normalised by 0.1307 / 0.3081.

    Its four IDX files, plain or gzip, lie in folder/mnist, in folder or in torchvision's folder/MNIST/raw: in the first
    of them that has all four. Absent ones are downloaded. What is there need not be the original (Fashion-MNIST has the
    same names), so it is checked for its structure.
    """
    places = "mnist", "", "MNIST/raw"  # and, as Kaggle has them, with a dot or in a folder of the same name
    files = [(name, name.replace("-idx", ".idx"), f"{name}/{name}", f"{name}.gz") for name in MNIST]
    arrays, others = [], []
    for path, names, (md5, shape) in zip(find_all(folder, places, files), files, MNIST.values()):

        def verify(path):
            compare(path, read_idx(path, shape)[1], md5)

        path = path or find_or_download(folder, places, names, mirrors, verify, f"{names[0]}, plain or gzip, is not")
        array, have = read_idx(path, shape)
        arrays.append(array)
        others += [path] * (have != md5)
    train, test = ((images[:, None], labels.astype(np.int64)) for images, labels in (arrays[:2], arrays[2:]))
    return normalized("mnist", 10, train, test, 0.1307, 0.3081, others)


def read_idx(path, shape):
    """The uint8 array of this shape in an IDX file, plain or gzip, and the MD5 of its contents: 4 bytes that tell the
    type and the number of dimensions, 4 bytes for each of their sizes, the entries. Of one dimension: labels up to 9.
    """
    header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
    size = len(header) + math.prod(shape)
    with reading(path, "gzip file"), open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        content = (gzip.GzipFile(fileobj=file) if packed else file).read(size + 1)
    kind, have = f"IDX file of {' x '.join(f'{n:,}' for n in shape)} bytes", content[: len(header)]
    if have != header:
        raise DataError(f"{path} is no {kind}: its header is {have.hex() or 'absent'} instead of {header.hex()}")
    if len(content) != size:
        much = "more than" if len(content) > size else f"{len(content):,} of"
        raise DataError(f"{path} is no {kind}: it has {much} {size:,} bytes")
    array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
    if len(shape) == 1:
        check_labels(path, array, 10)
    return array, hashlib.md5(content).hexdigest()


# ---------------------------------------------------------------------------------------------- CIFAR


def read_binary(path, count, labels):
    """Records (N, len(labels) + 3072) of uint8 of a file of the binary version: labels of a byte each, the last of
    which is the finest, then the image, 3 x 32 x 32.
    """
    record = len(labels) + 3 * 32 * 32
    with reading(path, "CIFAR file"), open(path, "rb") as file:
        have, want = os.fstat(file.fileno()).st_size, count * record
        if have != want:
            raise DataError(f"{path} has {have:,} bytes, but {count:,} records of {record:,} bytes make {want:,}")
        return np.fromfile(file, np.uint8, want).reshape(count, record)


def read_pickle(path, count, labels):
    """The same records of a file of the Python version: a dict with lists of N labels, under these keys, and "data",
    an array (N, 3072).
    """
    with reading(path, "CIFAR pickle"), open(path, "rb") as file:
        have, most = os.fstat(file.fileno()).st_size, 2 * count * 3072 + 2**16  # bytes may take two, and names some
        if have > most:
            raise DataError(f"{path} has {have:,} bytes, but a pickle of {count:,} images has less than {most:,}")
        content = pickles.read(file.read())
        if absent := {"data", *labels} - set(content):
            raise ValueError(f"it has no {min(absent)}")
        images, answers = pickles.array(content["data"]), [content[key] for key in labels]
        if images.shape != (count, 3072):
            raise ValueError(f"its images have the shape {images.shape} instead of {(count, 3072)}")
        for key, answer in zip(labels, answers):
            if type(answer) is not list or set(map(type, answer)) != {int} or not 0 <= min(answer) <= max(answer) < 256:
                raise ValueError(f"its {key} are no list of whole numbers from 0 to 255")
            if len(answer) != count:
                raise ValueError(f"it has {len(answer):,} {key} instead of {count:,}")
        return np.ascontiguousarray(np.column_stack([*(np.array(answer, np.uint8) for answer in answers), images]))


class Version(NamedTuple):
    archive: str
    md5: str  # of the archive
    folder: str  # in it
    suffix: str  # of its files' names
    read: Callable  # (path, count, labels) -> records


class Cifar(NamedTuple):
    files: dict  # {name without suffix: (records, SHA-1 of the file of the binary version)}, the test set last
    versions: tuple  # in the order of preference
    labels: tuple  # of a record, the last of which counts: their keys in a pickle
    classes: int
    mean: tuple
    std: tuple


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {
    "cifar10": Cifar(
        {"data_batch_1": (10_000, "aadd24acce27caa71bf4b10992e9e7b2d74c2540"),
         "data_batch_2": (10_000, "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795"),
         "data_batch_3": (10_000, "1dd00a74ab1d17a6e7d73e185b69dbf31242f295"),
         "data_batch_4": (10_000, "aab85764eb3584312d3c7f65fd2fd016e36a258e"),
         "data_batch_5": (10_000, "26e2849e66a845b7f1e4614ae70f4889ae604628"),
         "test_batch": (10_000, "67eb016db431130d61cd03c7ad570b013799c88c")},
        (Version("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin", ".bin",
                 read_binary),
         Version("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py", "", read_pickle)),
        ("labels",), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Cifar(
        {"train": (50_000, "e207cd2e05b73b1393c74c7f5e7bea451d63e08e"),
         "test": (10_000, "8fb6623e830365ff53cf14adec797474f5478006")},
        (Version("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary", ".bin",
                 read_binary),
         Version("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python", "", read_pickle)),
        ("coarse_labels", "fine_labels"), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def cifar(name, folder, mirrors=(CIFAR_URL,)):
    """CIFAR-10 or CIFAR-100 with its fine labels (Krizhevsky 2009): 50,000 training and 10,000 test images of
    3 x 32 x 32.

    The files of its binary version, else of its Python version, lie in the archive's folder, such as
    folder/cifar-10-batches-bin, in folder/name or in folder. If neither version is whole, what it lacks is unpacked
    from the archive, which is downloaded if the folder has that of neither. What is there need not be the original
    (re-encoded copies exist), so it is checked for its structure.
    """
    files, versions, labels, classes, *scale = CIFAR[name]

    def found(version):
        return find_all(folder, (version.folder, name, ""), [(file + version.suffix,) for file in files])

    def whole():
        return next(((version, paths) for version in versions if all(paths := found(version))), None)

    if not whole():
        version = next((each for each in versions if find(folder, ("", name), (each.archive,))), versions[0])
        verify = functools.partial(check_published, md5=version.md5)
        absent = " nor ".join(few([f"{each.folder}/{file}{each.suffix}" for file, path in zip(files, found(each))
                                   if not path]) for each in versions)
        matlab = " (the MATLAB version is not read)" if any(Path(folder).glob("cifar-10*-mat*")) else ""
        packed = find_or_download(folder, ("", name), (version.archive,), mirrors, verify,
                                  f"neither {absent} nor an archive of either{matlab} is")
        with alone(packed, "unpacks"), reading(packed, "tar.gz file"):
            if not whole():  # else another process was faster
                verify(packed)
                with tarfile.open(packed) as tar:
                    for file, path in zip(files, found(version)):
                        if not path:
                            path = Path(folder, version.folder, file + version.suffix)
                            path.parent.mkdir(exist_ok=True)
                            write_whole(path, tar.extractfile(f"{version.folder}/{path.name}").read())
    (version, paths), halves, others = whole(), [], []
    for path, (count, sha1) in zip(paths, files.values()):
        records = version.read(path, count, labels)
        others += [path] * (hashlib.sha1(records).hexdigest() != sha1)
        halves.append(examples(path, records, classes))
    train = [np.concatenate(parts) for parts in zip(*halves[:-1])]
    return normalized(name, classes, train, halves[-1], *scale, others)


def examples(path, records, classes):
    """Images (N, 3, 32, 32) and labels (N,) of records."""
    labels = records[:, -3073].astype(np.int64)
    check_labels(path, labels, classes)
    return np.ascontiguousarray(records[:, -3072:]).reshape(-1, 3, 32, 32), labels  # (N, 3072) -> images


# ---------------------------------------------------------------------------------------------- SVHN

SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
SVHN_MD5 = {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"}


def svhn(folder, mirrors=(SVHN_URL,)):
    """SVHN (Netzer et al. 2011), cropped digits: 73,257 training and 26,032 test images of 3 x 32 x 32.

    Its two .mat files lie in folder/svhn or in folder; absent ones are downloaded.
    """
    halves = []
    for name, md5 in SVHN_MD5.items():
        read = functools.partial(read_svhn, md5=md5)
        halves.append(read(find_or_download(folder, ("svhn", ""), (name,), mirrors, verify=read)))
    return normalized("svhn", 10, *halves, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


def read_svhn(path, md5):
    """Images (N, 3, 32, 32) and labels (N,): X (32, 32, 3, N) of uint8, y (N, 1) with 10 for the digit 0.

    SciPy believes what a file claims, so it reads only one that has the MD5 of the published one.
    """
    import scipy.io

    with reading(path, ".mat file"):
        check_published(path, md5)
        content = scipy.io.loadmat(path, variable_names=["X", "y"])
    images = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1))  # (H, W, C, N) -> (N, C, H, W)
    return images, content["y"].reshape(-1).astype(np.int64) % 10  # (N, 1) -> (N,)
