"""MNIST, CIFAR-10, CIFAR-100 and SVHN: where their files are, what is in them."""

import contextlib
import functools
import gzip
import hashlib
import math
import os
import tarfile
from pathlib import Path

import numpy as np

from datasets.dataset import Arrays, DataError, Dataset
from datasets.download import check_published, compare, find, find_or_download
from lab.files import locked, write_whole


def normalized(name, classes, train, test, mean, std):
    """The Dataset of two pairs (images, labels), normalised by each channel's mean and deviation of image / 255."""
    mean, std = np.reshape(mean, (-1, 1, 1)), np.reshape(std, (-1, 1, 1))  # (C,) -> (C, 1, 1)
    return Dataset(name, classes, *(Arrays(*half).standardized(mean, std) for half in (train, test)))


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

    Its four IDX files, plain or gzip, lie in folder/mnist or in folder; absent ones are downloaded.
    """
    arrays = []
    for name, (md5, shape) in MNIST.items():
        read = functools.partial(read_idx, md5=md5, shape=shape)
        arrays.append(read(find_or_download(folder, ("mnist", ""), (name, name + ".gz"), mirrors, verify=read)))
    train, test = ((images[:, None], labels.astype(np.int64)) for images, labels in (arrays[:2], arrays[2:]))
    return normalized("mnist", 10, train, test, 0.1307, 0.3081)


def read_idx(path, md5, shape):
    """The uint8 array of this shape in an IDX file, plain or gzip, whose contents have this MD5: 4 bytes that tell the
    type and the number of dimensions, 4 bytes for each of their sizes, the entries.
    """
    header = 4 + 4 * len(shape)
    with reading(path, "gzip file"), open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        content = (gzip.GzipFile(fileobj=file) if packed else file).read(header + math.prod(shape) + 1)
    compare(path, hashlib.md5(content).hexdigest(), md5)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# ---------------------------------------------------------------------------------------------- CIFAR

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {  # archive, its MD5, the folder in it, {file: records} with the test set last, bytes of labels, classes, ...
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin",
                {**{f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, "test_batch.bin": 10_000}, 1, 10,
                (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary",
                 {"train.bin": 50_000, "test.bin": 10_000}, 2, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def cifar(name, folder, mirrors=(CIFAR_URL,)):
    """CIFAR-10 or CIFAR-100 with its fine labels (Krizhevsky 2009): 50,000 training and 10,000 test images of
    3 x 32 x 32.

    The files of its binary version lie in the archive's folder (folder/cifar-10-batches-bin, folder/cifar-100-binary),
    in folder/name or in folder; absent ones are unpacked from the archive, which is downloaded if it is not in the
    folder. What is there need not be the original (re-encoded copies exist), so it is checked for its structure.
    """
    archive, md5, unpacked, counts, label_bytes, classes, *scale = CIFAR[name]

    def absent():
        return [file for file in counts if find(folder, (unpacked, name, ""), (file,)) is None]

    if absent():
        verify = functools.partial(check_published, md5=md5)
        packed = find_or_download(folder, ("", name), (archive,), mirrors, verify)
        with locked(packed), reading(packed, "tar.gz file"):
            if files := absent():  # else another process was faster
                verify(packed)
                with tarfile.open(packed) as tar:
                    for file in files:
                        path = Path(folder, unpacked, file)
                        path.parent.mkdir(exist_ok=True)
                        write_whole(path, tar.extractfile(f"{unpacked}/{file}").read())
    *train, test = (read_records(find(folder, (unpacked, name, ""), (file,)), n, label_bytes, classes)
                    for file, n in counts.items())
    train = [np.concatenate(parts) for parts in zip(*train)]
    return normalized(name, classes, train, test, *scale)


def read_records(path, count, label_bytes, classes):
    """Images (N, 3, 32, 32) and labels (N,) of a file of records: labels of a byte each, the last of which is the
    finest, then 3 x 32 x 32 bytes.
    """
    record = label_bytes + 3 * 32 * 32
    with reading(path, "CIFAR file"), open(path, "rb") as file:
        have, want = os.fstat(file.fileno()).st_size, count * record
        if have != want:
            raise DataError(f"{path} has {have:,} bytes, but {count:,} records of {record:,} bytes make {want:,}")
        records = np.fromfile(file, np.uint8, want).reshape(count, record)
    labels = records[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= classes:
        where = int(np.argmax(labels >= classes))
        raise DataError(f"{path} has label {labels[where]} at position {where}, but labels go from 0 to {classes - 1}")
    return np.ascontiguousarray(records[:, label_bytes:]).reshape(count, 3, 32, 32), labels  # (N, 3072) -> images


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
