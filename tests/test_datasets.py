"""datasets: files whole and broken, downloads from servers that misbehave, drawn digits; parts, orders, crops, and
batches that a thread prepares. Photographs: test_photographs.py.
"""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io

import datasets
import nn
from datasets import arrays, dataset, download, drawn, pickles
from datasets.dataset import Arrays, DataError, Dataset
from lab import files

ROOT = Path(datasets.__file__).parent.parent


def md5(content):
    return hashlib.md5(content).hexdigest()


def idx(array):
    """The IDX file of a uint8 array."""
    array = np.asarray(array, np.uint8)
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


RNG = np.random.default_rng(0)
DIGITS, ANSWERS = RNG.integers(0, 256, (25, 28, 28)), np.arange(25) % 10
MNIST = {"train-images-idx3-ubyte": DIGITS[:20], "train-labels-idx1-ubyte": ANSWERS[:20],
         "t10k-images-idx3-ubyte": DIGITS[20:], "t10k-labels-idx1-ubyte": ANSWERS[20:]}
COLOURED = RNG.integers(0, 256, (24, 3, 32, 32)).astype(np.uint8)
CLASS = (np.arange(24) * 7) % 10


def records(rows, *labels):
    """A CIFAR file of these rows of COLOURED, each image behind its bytes of labels."""
    return b"".join(bytes(int(label[i]) for label in labels) + COLOURED[i].tobytes() for i in rows)


CIFAR10 = {f"cifar-10-batches-bin/{name}": records(range(4 * i, 4 * i + 4), CLASS)
           for i, name in enumerate(f"{file}.bin" for file in arrays.CIFAR["cifar10"].files)}
FIRST, ARCHIVE = "cifar-10-batches-bin/data_batch_1.bin", "cifar-10-binary.tar.gz"
WHOLE = CIFAR10[FIRST]


def tar_gz(contents):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def mat(rows):
    """An SVHN file of these rows of COLOURED."""
    stream = io.BytesIO()
    labels = np.where(CLASS == 0, 10, CLASS)[rows, None].astype(np.uint8)
    scipy.io.savemat(stream, {"X": COLOURED[rows].transpose(2, 3, 1, 0), "y": labels}, do_compression=True)
    return stream.getvalue()


def python2(entry):
    """The pickle of a dict {bytes: bytes, list or array of bytes (N, K)} as Python 2 wrote it in protocol 2."""
    out, count = [b"\x80\x02}q\x01("], 1

    def put(*codes):
        """These opcodes, whose value is remembered."""
        nonlocal count
        count += 1
        out.extend([*codes, b"q" + bytes([count]) if count < 256 else b"r" + struct.pack("<I", count)])

    def string(value):
        put((b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value)

    def number(n):
        return b"K" + bytes([n]) if 0 <= n < 256 else b"J" + struct.pack("<i", n)

    for key, value in entry.items():
        string(key)
        if isinstance(value, bytes):
            string(value)
        elif isinstance(value, list):
            put(b"]")
            out.extend([b"(", *map(number, value), b"e"])
        else:
            for code in (b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"K\0\x85", b"U\1b", b"\x87",
                         b"R"):
                put(code)
            put(b"(K\1", *map(number, value.shape), b"\x86")
            for code in (b"cnumpy\ndtype\n", b"U\2u1", b"K\0K\1\x87", b"R", b"(K\3U\1|"):
                put(code)
            put(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t")
            out.append(b"b\x89")
            string(value.tobytes())
            put(b"t")
            out.append(b"b")
    return b"".join([*out, b"u."])


def entry(rows, **labels):
    """What a pickled CIFAR batch of these rows of COLOURED holds."""
    lists = {key.encode(): [int(label[i]) for i in rows] for key, label in labels.items()}
    return {b"batch_label": b"a batch", **lists, b"data": COLOURED[list(rows)].reshape(len(rows), -1)}


def python(dump=python2):
    """CIFAR10 in its Python version."""
    return {f"cifar-10-batches-py/{name}": dump(entry(range(4 * i, 4 * i + 4), labels=CLASS))
            for i, name in enumerate(arrays.CIFAR["cifar10"].files)}


def python3(protocol):
    return functools.partial(pickle.dumps, protocol=protocol)


FINE = np.arange(24) * 4 + 3
PACKED, SVHN = tar_gz(CIFAR10), {"train_32x32.mat": mat(slice(0, 20)), "test_32x32.mat": mat(slice(20, 24))}
PYTHON, PYTHON_ARCHIVE = python(), "cifar-10-python.tar.gz"
PACKED_PYTHON = tar_gz(PYTHON)
SETS = {
    "mnist": {name: idx(a) for name, a in MNIST.items()},
    "cifar10": CIFAR10,
    "cifar100": {"cifar-100-binary/train.bin": records(range(20), CLASS, FINE),
                 "cifar-100-binary/test.bin": records(range(20, 24), CLASS, FINE)},
    "svhn": SVHN,
}


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    """Some twenty training and four or five test images are what was published."""
    monkeypatch.setattr(arrays, "MNIST", {name: (md5(idx(a)), a.shape) for name, a in MNIST.items()})
    published, packed = {}, iter((PACKED, PACKED_PYTHON))
    for name, known in arrays.CIFAR.items():
        contents = {Path(file).stem: content for file, content in SETS[name].items()}
        files = {file: (len(contents[file]) // 3073, hashlib.sha1(contents[file]).hexdigest()) for file in known.files}
        versions = tuple(version._replace(md5=md5(next(packed, b""))) for version in known.versions)
        published[name] = known._replace(files=files, versions=versions)
    monkeypatch.setattr(arrays, "CIFAR", published)
    monkeypatch.setattr(arrays, "SVHN_MD5", {name: md5(content) for name, content in SVHN.items()})


def write_all(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def files_in(folder):
    """All files but locks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                  if not path.is_dir() and not path.name.endswith(".lock"))


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name, sub", [
    ("mnist", ""), ("mnist", "mnist"), ("mnist packed", ""), ("mnist packed", "mnist"), ("cifar10", ""),
    ("cifar10", "cifar10"), ("cifar10", "cifar-10-batches-bin"), ("cifar100", "cifar-100-binary"), ("cifar100", ""),
    ("svhn", ""), ("svhn", "svhn")])
def test_files_are_found_in_each_place(tmp_path, name, sub):
    name, *packed = name.split()
    write_all(tmp_path / sub, {Path(file).name + ".gz" * len(packed): gzip.compress(content) if packed else content
                               for file, content in SETS[name].items()})
    found = datasets.load(name, tmp_path)
    images, labels, mean, std = {
        "mnist": (DIGITS[:, None], ANSWERS, (0.1307,), (0.3081,)),
        "cifar10": (COLOURED, CLASS, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": (COLOURED, FINE, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "svhn": (COLOURED, CLASS, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))}[name]  # calls the digit 0 10
    assert found.train_images.dtype == np.uint8 and found.shape == images.shape[1:]
    assert found.name == name and found.classes == (100 if name == "cifar100" else 10)
    assert found.train_labels.dtype == found.test_labels.dtype == np.int64
    np.testing.assert_array_equal(found.train_images, images[:20])
    np.testing.assert_array_equal(np.concatenate([found.train_labels, found.test_labels]), labels)
    x, answers = next(found.test_batches(4))
    assert x.dtype == np.float32 and answers.tolist() == labels[20:24].tolist()
    for c in range(len(mean)):
        np.testing.assert_allclose(x[:, c], (images[20:24, c] / 255 - mean[c]) / std[c], atol=1e-5)


IMAGES, BATCH, COARSE = "train-images-idx3-ubyte", "cifar-10-batches-bin/data_batch_3.bin", "cifar-100-binary/train.bin"
LABELS, PICKLE = "t10k-labels-idx1-ubyte", "cifar-10-batches-py/data_batch_3"
GZ, OTHER = gzip.compress(idx(DIGITS[:20])), "is not what was published: its MD5 is "
HEADER, TEN = idx(DIGITS[:20])[:16].hex(), "is no IDX file of 5 bytes: "
NO_PICKLE = "is not a whole CIFAR pickle: "
NO_LIST = NO_PICKLE + "its labels are no list of whole numbers from 0 to 255"
NO_IDX = "is no IDX file of 20 x 28 x 28 bytes: "
FOLDER, TERABYTE = None, 2**40  # of nothing
THIRD = entry(range(8, 12), labels=CLASS)


@pytest.mark.parametrize("name, file, content, says", [
    ("mnist", IMAGES, b"", f"{NO_IDX}its header is absent instead of {HEADER}"),
    ("mnist", IMAGES, b"<html>not found</html>", f"{NO_IDX}its header is 3c68746d6c3e6e6f7420666f756e643c instead of "),
    ("mnist", IMAGES, b"\0\0\x09" + idx(DIGITS[:20])[3:], f"{NO_IDX}its header is 00000903"),
    ("mnist", IMAGES, idx(DIGITS[:19]), f"{NO_IDX}its header is 00000803000000130000001c0000001c instead"),
    ("mnist", IMAGES, idx(DIGITS[:20].transpose(1, 0, 2)), f"{NO_IDX}its header is 000008030000001c00000014"),
    ("mnist", IMAGES, idx(DIGITS[:20].reshape(20, 784)), f"{NO_IDX}its header is 00000802"),
    ("mnist", IMAGES, idx(DIGITS[:20])[:-1], f"{NO_IDX}it has 15,695 of 15,696 bytes"),
    ("mnist", IMAGES, idx(DIGITS[:20]) + b"\0", f"{NO_IDX}it has more than 15,696 bytes"),
    ("mnist", IMAGES, TERABYTE, f"{NO_IDX}its header is 00000000"),
    ("mnist", LABELS, idx([0, 9, 10, 3, 11]), "has label 10 at position 2, but labels go from 0 to 9"),
    ("mnist", LABELS, idx([0, 9]), f"{TEN}its header is 0000080100000002 instead of 0000080100000005"),
    ("mnist", IMAGES + ".gz", gzip.compress(idx(DIGITS[:20]) + bytes(2**24)), f"{NO_IDX}it has more than 15,696 bytes"),
    ("mnist", IMAGES + ".gz", GZ[:-20], "is not a whole gzip file: Compressed file ended before"),
    ("mnist", IMAGES + ".gz", GZ[:50] + b"\0\1\2\3" * 30, "is not a whole gzip file: "),
    ("cifar10", BATCH, b"", "has 0 bytes, but 4 records of 3,073 bytes make 12,292"),
    ("cifar10", BATCH, WHOLE[:-1], "has 12,291 bytes, but 4 records of 3,073 bytes make 12,292"),
    ("cifar10", BATCH, WHOLE + b"x", "has 12,293 bytes, but 4 records of 3,073 bytes make 12,292"),
    ("cifar10", BATCH, TERABYTE, "has 1,099,511,627,776 bytes, but "),
    ("cifar10", BATCH, WHOLE[: 2 * 3073] + b"\x0a" + WHOLE[2 * 3073 + 1 :],
     "has label 10 at position 2, but labels go from 0 to 9"),
    ("cifar100", COARSE, records(range(20), CLASS, FINE + 25), "has label 100 at position 18, but labels go from 0 to"),
    ("cifar10", ARCHIVE, tar_gz(CIFAR10 | {FIRST: bytes(12_292)}), OTHER),
    ("cifar10", ARCHIVE, PACKED[:-3], OTHER),
    ("cifar10", ARCHIVE, TERABYTE, "has more than 268,435,456 bytes"),
    ("cifar10", ARCHIVE, FOLDER, "cannot be read: Is a directory"),
    ("svhn", "train_32x32.mat", mat(slice(1, 21)), OTHER),
    ("svhn", "train_32x32.mat", TERABYTE, "has more than 268,435,456 bytes"),
    ("cifar10", PICKLE, b"", NO_PICKLE + "pickle exhausted before seeing STOP"),
    ("cifar10", PICKLE, TERABYTE, "has 1,099,511,627,776 bytes, but a pickle of 4 images has less than 90,112"),
    ("cifar10", PICKLE, python2(THIRD)[:-1], NO_PICKLE + "pickle exhausted before seeing STOP"),
    ("cifar10", PICKLE, python2(THIRD)[:5000], NO_PICKLE + "expected 12288 bytes in a string4, but only "),
    ("cifar10", PICKLE, python2(THIRD | {b"labels": [3, 4, 10, 5]}), "has label 10 at position 2, but labels go from "),
    ("cifar10", PICKLE, python2(THIRD | {b"labels": [3, 4, 256, 5]}), NO_LIST),
    ("cifar10", PICKLE, python2(THIRD | {b"labels": [3, 4, -1, 5]}), NO_LIST),
    ("cifar10", PICKLE, python2(THIRD | {b"labels": []}), NO_LIST),
    ("cifar10", PICKLE, python2(THIRD | {b"labels": [3, 4, 5]}), NO_PICKLE + "it has 3 labels instead of 4"),
    ("cifar10", PICKLE, python2(THIRD | {b"labels": b"abcd"}), NO_LIST),
    ("cifar10", PICKLE, pickle.dumps(THIRD | {b"labels": [True, False, 1, 2]}), NO_LIST),
    ("cifar10", PICKLE, python2({b"data": THIRD[b"data"]}), NO_PICKLE + "it has no labels"),
    ("cifar10", PICKLE, python2({b"labels": [1, 2, 3, 4]}), NO_PICKLE + "it has no data"),
    ("cifar10", PICKLE, python2(THIRD | {b"data": b"x" * 12_288}), NO_PICKLE + "it has no NumPy array of bytes where"),
    ("cifar10", PICKLE, python2(THIRD | {b"data": THIRD[b"data"][1:]}),
     NO_PICKLE + "its images have the shape (3, 3072) instead of (4, 3072)"),
    ("cifar10", PICKLE, pickle.dumps(THIRD, 0), NO_PICKLE + "it has the opcode "),
])
def test_files_that_are_wrong_are_named_and_not_parsed(tmp_path, monkeypatch, name, file, content, says):
    monkeypatch.setattr(tarfile, "open", lambda *a: pytest.fail("opened"))
    monkeypatch.setattr(scipy.io, "loadmat", lambda *a, **k: pytest.fail("parsed"))
    others = {} if file == ARCHIVE else PYTHON if file == PICKLE else SETS[name]
    write_all(tmp_path, {other: whole for other, whole in others.items() if other != file.removesuffix(".gz")})
    path = tmp_path / file
    if content is FOLDER:
        path.mkdir(parents=True)
    else:
        path.write_bytes(b"" if content is TERABYTE else content)
        os.truncate(path, content if content is TERABYTE else len(content))
    before = files_in(tmp_path)
    with pytest.raises(DataError) as error:
        datasets.load(name, tmp_path)
    assert str(error.value).startswith(f"{path} {says}") and "\n" not in str(error.value)
    assert says != OTHER or str(error.value).endswith("; remove it, or put the published file in its place")
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("sub", ["", "cifar10"])
def test_an_archive_in_the_folder_is_unpacked_once(tmp_path, monkeypatch, sub):
    def full(file):
        raise OSError(28, "No space left on device")

    own = records([7, 6, 5, 4], CLASS)  # a file that is there already is left as it is
    packed = {str(Path(sub, ARCHIVE)): PACKED, "cifar-10-batches-bin/data_batch_2.bin": own}
    write_all(tmp_path, packed)
    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left"):
        patch.setattr(os, "fsync", full)
        datasets.load("cifar10", tmp_path)
    assert files_in(tmp_path) == sorted(packed)
    cifar = datasets.load("cifar10", tmp_path)
    np.testing.assert_array_equal(cifar.train_images[[0, 4, 5, 6, 7, 8]], COLOURED[[0, 7, 6, 5, 4, 8]])
    assert files_in(tmp_path) == sorted([*CIFAR10, str(Path(sub, ARCHIVE))])
    (tmp_path / sub / ARCHIVE).unlink()
    datasets.load("cifar10", tmp_path)


LAYOUTS = {
    "CIFAR-10 by Python 2": ("cifar10", PYTHON),
    **{f"CIFAR-10 by Python 3, protocol {i}": ("cifar10", python(python3(i))) for i in (2, 3, 4, 5)},
    "CIFAR-10 with keys of text": ("cifar10", python(lambda e: pickle.dumps({k.decode(): v for k, v in e.items()}))),
    "CIFAR-10 in Fortran's order": ("cifar10", python(lambda e: pickle.dumps(
        e | {b"data": np.asfortranarray(e[b"data"])}))),
    "CIFAR-10, archive": ("cifar10", {PYTHON_ARCHIVE: PACKED_PYTHON}),
    "CIFAR-10, archive and some of its files": ("cifar10", {
        PYTHON_ARCHIVE: PACKED_PYTHON, **dict(list(PYTHON.items())[:3]), FIRST: bytes(12_292)}),
    "CIFAR-10, Python whole, binary not": ("cifar10", PYTHON | {FIRST: bytes(12_292)}),
    "CIFAR-10, binary whole, Python damaged": ("cifar10", CIFAR10 | dict.fromkeys(PYTHON, b"?")),
    "CIFAR-10, Python, in the folder": ("cifar10", {Path(file).name: content for file, content in PYTHON.items()}),
    "CIFAR-100 by Python 2": ("cifar100", {
        f"cifar-100-python/{file}": python2(entry(rows, fine_labels=FINE, coarse_labels=CLASS))
        for file, rows in (("train", range(20)), ("test", range(20, 24)))}),
    "MNIST, torchvision": ("mnist", {f"MNIST/raw/{file}": content for file, content in SETS["mnist"].items()}),
    "MNIST, torchvision, gzip": ("mnist", {f"MNIST/raw/{file}.gz": gzip.compress(content)
                                           for file, content in SETS["mnist"].items()}),
    "MNIST, Kaggle": ("mnist", {file.replace("-idx", ".idx"): content for file, content in SETS["mnist"].items()}),
    "MNIST, Kaggle, folders": ("mnist", {f"mnist/{file}/{file}": content for file, content in SETS["mnist"].items()}),
    "MNIST, some of it twice": ("mnist", {f"MNIST/raw/{file}": content for file, content in SETS["mnist"].items()} | {
        f"mnist/{IMAGES}": idx(DIGITS[:20] ^ 1)}),
    "CIFAR-10 in a folder of its name": ("cifar10", {f"cifar10/{Path(file).name}": content
                                                     for file, content in CIFAR10.items()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_data_set(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(pickle, "loads", lambda *a: pytest.fail("unpickled"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    name, contents = LAYOUTS[layout]
    write_all(tmp_path / "published", SETS[name])
    write_all(tmp_path / "home" / "data", contents)
    want, have = datasets.load(name, tmp_path / "published"), datasets.load(name, "~/data")
    for half in ("train_images", "train_labels", "test_images", "test_labels"):
        one, other = getattr(want, half), getattr(have, half)
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert have.digest == want.digest and have.unpublished == want.unpublished == ""
    for variant in (have.part(3), have.part(limit=5), have.augmented(), have.standardized_by_pixel()):
        assert variant.digest == have.digest
    assert replace(have, unpublished="x is not").part(3).augmented().standardized_by_pixel().unpublished == "x is not"


def test_digests_are_of_all_that_is_learned_from(tmp_path):
    """These values stand in records: they stay as they are."""
    of_cifar, seen = "ca4c6d9de8a7b7ca70e682506c5f1edcc4ebeb02e1cf0afa2cafc4a48f837a68", set()

    def load(name, contents):
        folder = tmp_path / str(len(seen))
        write_all(folder, contents)
        found = datasets.load(name, folder)
        seen.add(found.digest)
        return found

    assert load("cifar10", CIFAR10).digest == of_cifar
    for at in (0, 5, 3073, 12_291):  # a label, a pixel, a label, the last pixel
        for file in (FIRST, BATCH, "cifar-10-batches-bin/test_batch.bin"):
            content = bytearray(CIFAR10[file])
            content[at] ^= 1
            assert load("cifar10", CIFAR10 | {file: content}).unpublished == (
                f"{Path(file).name} is not the published one")
    swapped = dict(zip(SETS["cifar10"], list(CIFAR10.values())[::-1]))  # the halves, too
    assert load("cifar10", swapped).unpublished == (
        f"{Path(FIRST).name} and 5 more files are not the published ones")
    assert load("mnist", SETS["mnist"]).unpublished == load("svhn", SVHN).unpublished == ""
    hundred = SETS["cifar100"]
    assert load("cifar100", hundred).unpublished == ""
    assert len(seen) == 16  # SVHN has what CIFAR-10 has here
    coarse = load("cifar100", hundred | {COARSE: records(range(20), CLASS + 1, FINE)})
    assert len(seen) == 16 and "train.bin is not the published one" in coarse.unpublished  # nothing learns from them


def test_digest_is_of_types_shapes_and_entries():
    x, y = np.arange(12).reshape(3, 4), np.array([7, 8], np.uint8)
    want = hashlib.sha256(b"<i8(3, 4)" + struct.pack("<12q", *range(12)) + b"|u1(2,)\7\x08").hexdigest()
    for same in (x, x.astype(">i8"), np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
        assert dataset.digest_of(same, y) == want
    others = [(x.reshape(4, 3), y), (x.astype("i4"), y), (y, x), (x,)]
    assert len({want, *(dataset.digest_of(*other) for other in others)}) == 5


def test_look_alikes_of_mnist_are_named(tmp_path):
    write_all(tmp_path, SETS["mnist"] | {IMAGES: idx(DIGITS[1:21])})
    found = datasets.load("mnist", tmp_path)
    assert found.unpublished == f"{Path(IMAGES).name} is not the published one"
    np.testing.assert_array_equal(found.train_images[:, 0], DIGITS[1:21])
    write_all(tmp_path, {LABELS: idx(ANSWERS[1:6])})
    assert datasets.load("mnist", tmp_path).unpublished == (
        f"{Path(IMAGES).name} and 1 more file are not the published ones")


class Calls:
    """Pickles as a call of this function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def nested(depth):
    """Opcodes of a tuple with twice two to the `depth` ends, which takes as long to hash."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


NAMED = "it names '{}', which no array of bytes needs"
HOSTILE = {
    "os.system": (pickle.dumps(Calls(os.system, "touch owned"), 2), NAMED.format("posix.system")),
    "os.system, protocol 4": (pickle.dumps(Calls(os.system, "touch owned"), 4), NAMED.format("posix.system")),
    "eval": (pickle.dumps(Calls(eval, "open('owned', 'w')"), 2), NAMED.format("__builtin__.eval")),
    "in data": (pickle.dumps(THIRD | {b"data": Calls(os.system, "touch owned")}, 2), NAMED.format("posix.system")),
    "nested": (pickle.dumps({b"labels": [[{b"a": (1, Calls(eval, "1"))}]]}, 2), NAMED.format("__builtin__.eval")),
    "as a key": (pickle.dumps({Calls(eval, "1"): 1}, 4), NAMED.format("builtins.eval")),
    "NumPy's own": (pickle.dumps(Calls(np.load, "owned"), 2), NAMED.format("numpy.load")),
    "NumPy's scalar": (pickle.dumps(THIRD | {b"labels": [np.int64(1)] * 4}, 4),
                       NAMED.format("numpy._core.multiarray.scalar")),
    "objects": (pickle.dumps(THIRD | {b"data": THIRD[b"data"].astype(object)}, 2), "it has no NumPy array of bytes"),
    "floats": (pickle.dumps(THIRD | {b"data": np.zeros((4, 768), "f4")}, 5), "it has no NumPy array of bytes"),
    "signed": (pickle.dumps(THIRD | {b"data": THIRD[b"data"].astype("i1")}, 4), "it has no NumPy array of bytes"),
    "another kind of array": (python2(THIRD).replace(b"cnumpy\nndarray", b"cnumpy\ndtype"), "it has no NumPy array"),
    "old style instance": (b"(iposix\nsystem\n.", "it has the opcode INST"),
    "persistent": (b"\x80\2U\1aQ.", "it has the opcode BINPERSID"),
    "extension": (b"\x80\2\x82\1.", "it has the opcode EXT1"),
    "a new object": (b"\x80\2cnumpy\nndarray\nU\1a\x85\x81.", "it has the opcode NEWOBJ"),
    "memo of 4 billion": (b"\x80\2}r\xff\xff\xff\xff.", "it has no data"),
    "claims 2**60 bytes": (b"\x80\5\x96" + struct.pack("<Q", 2**60) + b".", "expected 1152921504606846976 bytes"),
    "shape of 2**33": (python2(THIRD).replace(struct.pack("<i", 3072), struct.pack("<i", 2**31 - 1)), "cannot reshape"),
    "hash for ever": (b"\x80\2}" + nested(90) + b"K\1s.", "it has a key that is no short string"),
    "compare for ever": (b"\x80\2}U\4data" + nested(90) + b"sU\6labels" + nested(90) + b"s.",
                         "it has no NumPy array of"),
    "long keys": (b"\x80\2}B" + struct.pack("<i", 1000) + bytes(1000) + b"K\1s.",
                  "it has a key that is no short string"),
    "a state for a string": (b"\x80\2U\1aNb.", "it has a str where a Call should be"),
    "a call of a string": (b"\x80\2U\1a)R.", "it has a str where a Call should be"),
    "no mark": (b"\x80\2}t.", "pop from empty list"),
    "no operand": (b"\x80\2b.", "pop from empty list"),
    "no such memo": (b"\x80\2h\7.", "7"),
    "an odd number of items": (b"\x80\2}(U\1au.", "zip() argument 2 is shorter"),
    "a list": (pickle.dumps([1, 2], 2), "it has a list where a dict should be"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_and_nothing_is_called(tmp_path, monkeypatch, kind):
    content, says = HOSTILE[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(np, "load", lambda *a: pytest.fail("called"))
    write_all(tmp_path, PYTHON | {PICKLE: content})
    begin = time.monotonic()
    with pytest.raises(DataError) as error:
        datasets.load("cifar10", tmp_path)
    assert str(error.value).startswith(f"{tmp_path / PICKLE} is not a whole CIFAR pickle: {says}")
    assert "\n" not in str(error.value) and not Path("owned").exists() and time.monotonic() - begin < 2


def test_pickled_bytes_are_not_encoded_again_and_again():
    """Each of 50,000 calls of three bytes would make 4 MB."""
    text = b"X" + struct.pack("<I", 2**22) + bytes(2**22)
    call = b"c_codecs\nencode\nq\0" + text + b"X\6\0\0\0latin1\x86q\1"
    begin = time.process_time()
    assert pickles.read(b"\x80\2}q\2" + call + b"h\0h\1R" * 50_000 + b"h\2.") == {}
    assert time.process_time() - begin < 2


# ---------------------------------------------------------------------------------------------- what is not there

NEITHER = ("neither cifar-10-batches-bin/data_batch_1.bin and 5 more files nor cifar-10-batches-py/data_batch_1 and 5 "
           "more files nor an archive of either is in {0} (or cifar10/ in it), ")


@pytest.mark.parametrize("name, contents, says", [
    ("cifar10", None, NEITHER + "which does not exist; cifar-10-binary.tar.gz could not be downloaded ("),
    ("cifar10", {}, NEITHER + "which is empty; cifar-10-binary.tar.gz could"),
    ("cifar10", {"a": b"", "mnist/x": b"", ".b": b""}, NEITHER + "where a, mnist/ can be seen; "),
    ("cifar10", {"a/b": b"", "b": b"", "c": b"", "cifar-10.zip": b"", "d": b""},
     NEITHER + "where cifar-10.zip, a/, b and 2 more can be seen; "),
    ("cifar10", {"cifar-10-batches-mat/data_batch_1.mat": b""}, NEITHER.replace(
        "either is", "either (the MATLAB version is not read) is") + "where cifar-10-batches-mat/ can be seen; "),
    ("cifar10", {file: content for file, content in CIFAR10.items() if file != BATCH},
     "neither cifar-10-batches-bin/data_batch_3.bin nor cifar-10-batches-py/data_batch_1 and 5 more files nor an "),
    ("cifar10", {file: content for file, content in (PYTHON | {FIRST: CIFAR10[FIRST]}).items() if file != PICKLE},
     "neither cifar-10-batches-bin/data_batch_2.bin and 4 more files nor cifar-10-batches-py/data_batch_3 nor an "),
    ("cifar10", CIFAR10 | {BATCH: FOLDER}, "neither cifar-10-batches-bin/data_batch_3.bin nor "),
    ("cifar100", {"train/apple/1.png": b"", "test/apple/2.png": b""},
     "neither cifar-100-binary/train.bin and 1 more file nor cifar-100-python/train and 1 more file nor an archive of "
     "either is in {0} (or cifar100/ in it), where test/, train/ can be seen; "),
    ("mnist", {"mnist/" + file: content for file, content in SETS["mnist"].items() if file != LABELS},
     LABELS + ", plain or gzip, is not in {0} (or mnist/, MNIST/raw/ in it), where mnist/ can be seen; " + LABELS),
    ("mnist", {IMAGES: FOLDER}, IMAGES + ", plain or gzip, is not in {0} (or mnist/, MNIST/raw/ in it), where train-"),
    ("svhn", {}, "train_32x32.mat is not in {0} (or svhn/ in it), which is empty; train_32x32.mat could"),
])
def test_what_is_absent_is_named_with_what_is_there(tmp_path, monkeypatch, name, contents, says):
    folder = tmp_path / "data"
    if contents is not None:
        folder.mkdir()
        write_all(folder, {file: content for file, content in contents.items() if content is not FOLDER})
        for file in (file for file, content in contents.items() if content is FOLDER):
            (folder / file).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        datasets.load(name, "data", mirrors=("nowhere://",))
    assert str(error.value).startswith(says.format(folder)) and "\n" not in str(error.value)
    assert "could not be downloaded (nowhere://" in str(error.value) and "; put the file into data" in str(error.value)


# ---------------------------------------------------------------------------------------------- download

CONTENT = gzip.compress(np.random.default_rng(1).bytes(300_000))


class Server(http.server.ThreadingHTTPServer):
    """Serves a file of `files`, else CONTENT; the first part of the path names how: /good/x, /cut/x, ..."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.files = [], {}
        self.ended, self.gate, self.began = (threading.Event() for _ in range(3))
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, manner, name="file.gz"):
        return f"http://127.0.0.1:{self.server_port}/{manner}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        with contextlib.suppress(ConnectionError):  # of a client that gave up
            self.answer()

    def answer(self):
        _, manner, name = self.path.split("/")
        self.server.requests.append(manner)
        self.server.began.set()
        refused = {"missing": 404, "forbidden": 403, "unavailable": 503}
        if manner in refused:
            return self.send_error(refused[manner])
        redirects = {"moved": f"/good/{name}", "file": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/x",
                     "loop": self.path}
        if manner in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[manner])
            return self.end_headers()
        if manner == "silent":
            return self.server.ended.wait()
        if manner == "gated":
            self.server.gate.wait(10)
        content = self.server.files.get(name, CONTENT)
        content = {"html": b"<html>please log in</html>", "empty": b"",
                   "flipped": content[:-20] + bytes(8) + content[-12:]}.get(manner, content)
        self.send_response(200)
        if manner not in ("endless", "unsaid"):
            self.send_header("Content-Length", str(len(content) - (9 if manner == "shorter" else 0)))
        self.end_headers()
        if manner in ("stall", "cut"):
            self.wfile.write(content[:50_000])
        if manner == "stall":
            self.server.ended.wait()
        for _ in range(1000 if manner in ("trickle", "endless") else 0):  # seconds, in which it should be given up
            if self.server.ended.wait(0.01):
                return
            self.wfile.write(bytes(1 if manner == "trickle" else 2**16))
        if manner not in ("stall", "cut"):
            self.wfile.write(content)


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = Server()
    yield server
    server.ended.set()
    server.gate.set()
    server.shutdown()
    server.server_close()


verify = functools.partial(download.check_published, md5=md5(CONTENT))


@pytest.mark.parametrize("manners", [["good"], ["missing", "good"], ["flipped", "good"], ["html", "good"],
                                     ["cut", "good"], ["moved"], ["unsaid"]])
def test_a_download_ends_with_the_verified_file(tmp_path, server, capsys, manners):
    (tmp_path / "file.gz.part").write_bytes(b"of an earlier download that was killed")
    download.download([server.url(m) for m in manners], tmp_path / "file.gz", verify)
    assert (tmp_path / "file.gz").read_bytes() == CONTENT and files_in(tmp_path) == ["file.gz"]
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("downloading")] == [
        f"downloading file.gz from {server.url(m)}" for m in manners]


FAULTS = {  # manner: what is said of it, requests
    "forbidden": ("403 Client Error: Forbidden", 1),
    "missing": ("404 Client Error", 1),
    "unavailable": ("503 Server Error", 3),
    "html": ("its contents have the wrong checksum", 1),
    "empty": ("its contents have the wrong checksum", 1),
    "flipped": ("its contents have the wrong checksum", 1),
    "shorter": ("its contents have the wrong checksum", 1),
    "cut": ("IncompleteRead", 3),
    "file": ("No connection adapters were found for 'file:///etc/passwd'", 3),
    "ftp": ("No connection adapters were found", 3),
    "loop": ("Exceeded 30 redirects", None),
    "silent": ("timed out", 3),
    "stall": ("timed out", 3),
    "trickle": ("only [0-9]+ bytes came in 0.4 s", 3),
    "endless": ("more than 1,000,000 bytes came", 3),
}


@pytest.mark.parametrize("manner", FAULTS)
def test_a_server_that_fails_is_given_up_for_the_next(tmp_path, server, monkeypatch, manner):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "PATIENCE", 0.4)
    monkeypatch.setattr(download, "SLOWEST", 1000)
    monkeypatch.setattr(download, "LARGEST", 1_000_000)
    path, (says, requests) = tmp_path / "file.gz", FAULTS[manner]
    with pytest.raises(DataError, match=f"file.gz could not be downloaded .*{says}.*; put the file into") as error:
        download.download([server.url(manner)], path, verify)
    assert "\n" not in str(error.value) and files_in(tmp_path) == [] and requests in (None, len(server.requests))
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    download.download([server.url(manner), server.url("good")], path, verify)
    assert path.read_bytes() == CONTENT and files_in(tmp_path) == ["file.gz"]


def test_the_sentence_names_every_address_with_its_reason(tmp_path, server):
    urls = [server.url("missing"), server.url("flipped"), "http://127.0.0.1:9/x"]
    pattern = ".*".join(f"{url}: .*{reason}" for url, reason in zip(urls, ("404", "wrong checksum", "refused")))
    with pytest.raises(DataError, match=rf"{pattern}.*; put the file into {tmp_path} yourself$"):
        download.download(urls, tmp_path / "file.gz", verify)


@pytest.mark.parametrize("manner, lines", [("silent", 3), ("stall", 3), ("trickle", 3), ("endless", 0), ("good", 0)])
def test_a_wait_is_said(tmp_path, server, monkeypatch, capsys, manner, lines):
    for name, value in (("TIMEOUT", 0.9), ("PATIENCE", 0.8), ("NOTICE", 0.2), ("TICK", 0.02), ("ATTEMPTS", 1),
                        ("LARGEST", 3_000_000)):
        monkeypatch.setattr(download, name, value)
    with contextlib.suppress(DataError):
        download.download([server.url(manner)], tmp_path / "file.gz", verify)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("still")]
    assert len(said) == lines and set(said) <= {
        f"still waiting for {server.url(manner)} (hardly anything came for {s} s; attempt 1 of 1 is given up after 0.8 "
        "s at the latest)" for s in (0, 1)}


def test_who_waits_for_another_process_says_so_once(tmp_path, capsys):
    held, begun = threading.Event(), threading.Event()

    def hold():
        with download.alone(tmp_path / "file", "draws"):
            begun.set()
            held.wait(10)

    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(hold)
        assert begun.wait(10)
        threading.Timer(1.4, held.set).start()
        with download.alone(tmp_path / "file", "draws"):
            assert held.is_set()
        one.result(10)
    assert capsys.readouterr().err == f"waiting for another process that draws {tmp_path / 'file'}\n"


def test_interrupted_downloads_leave_nothing(tmp_path, server, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.download([server.url("stall")], tmp_path / "file.gz", verify)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("asked, target, refused", [("https://a/x", "http://a/x", True), ("https://a/x", "/y", False),
                                                    ("https://a/x", "HTTP://b", True), ("http://a", "http://b", False)])
def test_redirects_do_not_lead_from_https_to_http(asked, target, refused):
    response = type("Response", (), {"url": asked, "headers": {"location": target}})
    with pytest.raises(OSError, match=f"redirects to {target}") if refused else contextlib.nullcontext():
        download.stay_safe(response, timeout=3)


def test_absent_files_are_downloaded_once(tmp_path, server):
    server.files = {"train-images-idx3-ubyte.gz": gzip.compress(idx(DIGITS[1:21])), ARCHIVE: PACKED} | SVHN
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz could not be downloaded .*wrong checksum"):
        arrays.mnist(tmp_path, mirrors=(server.url("good", ""),))
    server.files |= {f"{name}.gz": gzip.compress(content) for name, content in SETS["mnist"].items()}
    for name, manner in (("mnist", "good"), ("cifar10", "moved"), ("svhn", "unsaid")):
        datasets.load(name, tmp_path, mirrors=(server.url("missing", ""), server.url(manner, "")))
        server.requests.clear()
        assert len(datasets.load(name, tmp_path).train_labels) == 20 and not server.requests
    assert files_in(tmp_path) == sorted([ARCHIVE, *CIFAR10, *(f"mnist/{name}.gz" for name in MNIST),
                                         *(f"svhn/{name}" for name in SVHN)])


def both_at_once(monkeypatch, module, name, work, release=lambda: None):
    """work() in two threads, the second of which finds nothing there either; both results."""
    original, calls = getattr(module, name), threading.Semaphore(0)

    def looked(*arguments):
        found = original(*arguments)
        calls.release()
        return found

    monkeypatch.setattr(module, name, looked)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(work) for _ in range(2)]
        assert calls.acquire(timeout=10) and calls.acquire(timeout=10)  # nothing there, both have seen
        release()
        return [one.result(10) for one in waiting]


def test_of_two_that_want_a_file_one_downloads_it(tmp_path, server, monkeypatch, capsys):
    def work():
        return download.find_or_download(tmp_path, ("a", ""), ("file.gz",), (server.url("gated", ""),), verify)

    def release():  # what is waited for was said before anything came
        assert server.began.wait(10) and f"file.gz from {server.url('gated')}" in capsys.readouterr().err
        server.gate.set()

    paths = both_at_once(monkeypatch, download, "find", work, release)
    assert paths == 2 * [tmp_path / "a" / "file.gz"] and server.requests == ["gated"]


# ---------------------------------------------------------------------------------------------- drawn digits


@pytest.fixture
def drawings(monkeypatch):
    """Grows by one each time that digits are drawn."""
    seen, draw = [], drawn.draw_digits
    monkeypatch.setattr(drawn, "draw_digits", lambda *a: seen.append(0) or draw(*a))
    return seen


def test_drawn_digits(tmp_path, drawings):
    one, same = (drawn.digits(tmp_path / folder, train=300, test=50) for folder in "ab")
    assert files_in(tmp_path / "a") == ["synthetic-28x28x1-300-50-seed0-v1.npz"]  # as it was always called
    assert one.name == "synthetic" and one.shape == (1, 28, 28) and set(one.train_labels) == set(range(10))
    kept = drawn.digits(tmp_path / "a", train=300, test=50)
    assert one.train_images.tobytes() == same.train_images.tobytes() == kept.train_images.tobytes()
    assert len(one.test_labels) == 50 and len(drawings) == 2
    coloured = drawn.digits(tmp_path, side=32, channels=3, train=40, test=10)
    assert coloured.shape == (3, 32, 32) and coloured.train_images.std() > 20
    x, _ = next(coloured.train_batches(40, seed=0, epoch=0))
    np.testing.assert_allclose(x.mean(axis=(0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(x.std(axis=(0, 2, 3)), 1, atol=1e-3)


def test_damaged_digits_are_drawn_again(tmp_path, drawings):
    want = drawn.digits(tmp_path, train=30, test=10)
    path = tmp_path / files_in(tmp_path)[0]
    whole = path.read_bytes()
    kept = files.load_arrays(whole)
    wrong = kept["labels"].copy()
    wrong[3] = 10
    changes = ({"images": kept["images"]}, kept | {"labels": wrong}, kept | {"labels": wrong - 11},
               kept | {"labels": kept["labels"].astype(float)}, kept | {"images": kept["images"][1:]})
    for number, content in enumerate((b"", whole[:-1], whole[:5000] + b"?" + whole[5001:],
                                      *map(files.save_arrays, changes)), start=2):
        path.write_bytes(content)
        again = drawn.digits(tmp_path, train=30, test=10)
        assert len(drawings) == number and path.read_bytes() == whole
        np.testing.assert_array_equal(again.train_images, want.train_images)


def test_of_two_that_want_digits_one_draws_them(tmp_path, drawings, monkeypatch):
    both_at_once(monkeypatch, drawn, "kept_digits", functools.partial(drawn.digits, tmp_path, train=20, test=5))
    assert drawings == [0]


# ---------------------------------------------------------------------------------------------- parts and orders


def marked(count):
    """A data set whose image i holds the pixels' positions in channel 0 and i + 1 everywhere in channel 1."""
    images = np.empty((count, 2, 3, 4), np.uint8)
    images[:, 0] = np.arange(1, 13).reshape(3, 4)
    images[:, 1] = (np.arange(count) % 250 + 1)[:, None, None]
    scale, shift = np.full((2, 1, 1), 0.5, np.float32), np.float32([[[-1]], [[-2]]])
    train = Arrays(images, np.arange(count) % 250, scale, shift)
    return Dataset("marked", 250, train, Arrays(images[:50], np.arange(min(count, 50)), scale, shift))


def test_a_data_set_of_ones_own_knows_its_data():
    a, b = marked(80), marked(80)
    assert len(a.digest) == 64 and a.digest == b.digest == a.part(10).augmented().digest != marked(81).digest
    b.train.images[3, 0, 1, 2] ^= 1
    assert Dataset("marked", 250, b.train, b.test).digest != a.digest
    assert Dataset("mine", 250, a.train, a.test, "of my own").digest == "of my own"
    lists = [Arrays(half.images.tolist(), half.labels.astype(np.uint8).tolist()) for half in (a.train, a.test)]
    half = Arrays(a.train.images, a.train.labels.astype(np.uint8))
    assert Dataset("marked", 250, half, a.test).digest == a.digest and len(Dataset("lists", 250, *lists).digest) == 64


@pytest.mark.parametrize("arguments, says", [
    (("cifar", "data"), "no data set is called 'cifar'; there are mnist"),
    ((["mnist"], "data"), "no data set is called"),
    ((None, "data"), "no data set is called None"), (("mnist", None), "the folder of a data set is a path, not None"),
    (("mnist", 3), "is a path, not 3")])
def test_what_is_no_data_set(arguments, says):
    with pytest.raises(DataError, match=says):
        datasets.load(*arguments)


def kept(batches):
    """Batches as pairs of NumPy arrays of their own."""
    return [(nn.to_host(x).copy(), nn.to_host(y).copy()) for x, y in batches]


def collect(batches):
    """All batches as two NumPy arrays."""
    return [np.concatenate(group) for group in zip(*kept(batches))]


def test_unknown_names():
    names = "mnist, cifar10, cifar100, svhn, synthetic, imagenet, imagenet-256, photographs"
    with pytest.raises(files.FileFault, match=f"^no data set is called 'imagenot'; there are {names}$"):
        datasets.load("imagenot", "data")


def test_parts():
    whole = marked(80).augmented()
    part = whole.part(held_out=20, limit=50)
    np.testing.assert_array_equal(part.train_labels, np.arange(50))
    np.testing.assert_array_equal(part.test_labels, np.arange(60, 80))
    np.testing.assert_array_equal(part.test_images, whole.train_images[60:])
    np.testing.assert_array_equal(whole.part().train_labels, whole.train_labels)
    np.testing.assert_array_equal(whole.part(limit=80).test_images, whole.test_images)
    np.testing.assert_array_equal(collect(part.test_batches(7))[0], part.test_images * part.scale + part.shift)
    x, labels = collect(part.train_batches(7, 0, 0))
    assert sorted(labels) == list(range(50)) and (x[:, 1] == -2).any()  # the padding, after normalisation
    for mistake, says in ((lambda: whole.part(-1), "held_out is a whole number of at least 0, not -1"),
                          (lambda: whole.part(0, 2.5), "limit is a whole number"),
                          (lambda: whole.augmented(-1), "padding is a whole number of at least 0, not -1"),
                          *((lambda batch=batch: next(whole.train_batches(batch, 0, 0)), "batch is a whole number")
                            for batch in (0, -1, None)),
                          (lambda: next(whole.train_batches(9, 0, 0, start=-1)), "start is a whole number")):
        with pytest.raises(ValueError, match=says):
            mistake()
    with pytest.raises(DataError, match="marked has 80 training images, so 80 cannot be held out"):
        whole.part(held_out=80)
    with pytest.raises(DataError, match="marked has 60 training images, so a limit of 61 cannot be met"):
        whole.part(held_out=20, limit=61)


def test_standardized_by_pixel():
    images, labels = np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4)).astype(np.uint8), np.zeros(50, np.int64)
    images[:, 0, 1, 2] = 200  # a constant pixel
    found = Dataset("random", 10, Arrays(images[:41], labels[:41]), Arrays(images[41:], labels[41:]))
    mean, std = images[:41].mean(axis=0), images[:41].std(axis=0)
    want = np.divide(images - mean, std, out=np.zeros(images.shape), where=std > 0)
    found = found.standardized_by_pixel()
    np.testing.assert_allclose(collect(found.test_batches(4))[0], want[41:], atol=1e-5)
    x, _ = collect(found.train_batches(50, 0, 0))
    np.testing.assert_allclose(x, want[:41][nn.generator(0, "batches", 0).permutation(41)], atol=1e-5)
    np.testing.assert_array_equal(x[:, 0, 1, 2], 0)


@pytest.mark.parametrize("side", [1, 2, 3, 6, 12])
def test_averaged(side):
    """Each pixel the mean of a block, rounded; the data are the same, and what divides nothing is refused."""
    images = np.random.default_rng(1).integers(0, 256, (7, 2, 12, 24)).astype(np.uint8)
    images[0] = 255
    whole = Dataset("random", 10, Arrays(images[:5], np.zeros(5, np.int64)), Arrays(images[5:], np.zeros(2, np.int64)))
    found = whole.averaged(side)
    for n, channel, i, j in np.ndindex(5, 2, side, side):
        block = images[n, channel, i * 12 // side : (i + 1) * 12 // side, j * 24 // side : (j + 1) * 24 // side]
        assert abs(found.train_images[n, channel, i, j] - block.mean()) <= 0.5
    assert found.shape == (2, side, side) and found.test_images.shape == (2, 2, side, side)
    assert found.train_images.dtype == np.uint8 and found.digest == whole.digest
    with pytest.raises(DataError, match="random has images of 12 x 24 pixels, which 5 x 5 blocks do not divide"):
        whole.averaged(5)


def test_orders_are_those_of_recorded_runs():
    """A checkpoint goes on in the order in which it was begun: these numbers stay as they are."""
    order = [7, 19, 6, 2, 0, 14, 17, 1, 12, 10, 8, 3, 5, 13, 11, 9, 16, 4, 15, 18]
    crops = [0, 0, 10, 6, 7, 0, 3, 0, 0, 7, 0, 0, 11, 0, 0, 0, 0, 10, 0, 2]  # which pixel comes to row and column 1
    _, labels = collect(marked(20).train_batches(8, seed=3, epoch=5))
    assert labels.tolist() == order
    x, labels = collect(marked(20).augmented(padding=2).train_batches(8, seed=3, epoch=5))
    assert labels.tolist() == order
    assert ((x[:, 0, 1, 1] + 1) / 0.5).tolist() == crops


def test_batches_depend_on_seed_and_epoch_and_may_start_anywhere(backend):
    for found in (marked(70), marked(70).augmented(padding=1)):
        whole = collect(found.train_batches(16, 3, 5))
        assert (whole[0][:, 1] == (whole[1] + 1)[:, None, None] * 0.5 - 2).mean() > 0.5  # each with its own label
        for start in (0, 1, 4):
            for one, two in zip(collect(found.train_batches(16, 3, 5, start)), whole):
                np.testing.assert_array_equal(one, two[16 * start :])
        assert list(found.train_batches(16, 3, 5, start=5)) == []
        for seed, epoch in ((3, 5), (3, 6), (4, 5)):
            x, labels = collect(found.train_batches(16, seed, epoch))
            same = (seed, epoch) == (3, 5)
            assert (labels == whole[1]).all() == same and sorted(labels) == list(range(70))
            assert found.train.padding == 0 or (x[:, 0] == whole[0][:, 0]).all() == same  # pixels of every image
    assert [len(labels) for _, labels in found.test_batches(20)] == [20, 20, 10]


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_together_see_the_batches_of_one(backend, ranks):
    found = marked(26).augmented(padding=1)
    for make in (functools.partial(found.train_batches, 6, 0, 1, 1), functools.partial(found.test_batches, 6)):
        whole, *shares = kept(make()), *(kept(make(part=(rank, ranks))) for rank in range(ranks))
        for (x, labels), *parts in zip(whole, *shares, strict=True):
            assert [len(y) for _, y in parts] == [len(y) for y in np.split(labels, [len(labels) * r // ranks
                                                                                   for r in range(1, ranks)])]
            np.testing.assert_array_equal(x, np.concatenate([p[0] for p in parts]))
            np.testing.assert_array_equal(labels, np.concatenate([p[1] for p in parts]))


def test_augmented_batches_draw_every_crop_and_flip_equally_often(backend):
    x, labels = collect(marked(3600).augmented(padding=1).train_batches(128, seed=0, epoch=0))
    pixels = ((x - [[[-1]], [[-2]]]) / 0.5).astype(np.uint8)  # padding is black before normalisation: pixel 0
    own = (labels + 1)[:, None, None]
    assert ((pixels[:, 1] == own) | (pixels[:, 1] == 0)).all()  # the label is that of the image
    framed = np.pad(np.arange(1, 13, dtype=np.uint8).reshape(3, 4), 1)
    views = {framed[top : top + 3, left : left + 4][:, ::step].tobytes(): (top, left, step)
             for top in range(3) for left in range(3) for step in (1, -1)}
    counts = dict.fromkeys(views.values(), 0)
    for image in pixels:
        counts[views[image[0].tobytes()]] += 1
    assert len(counts) == 18 and 140 < min(counts.values()) and max(counts.values()) < 260  # 200: four deviations


@pytest.mark.parametrize("padding, flips, views", [(0, True, 2), (1, False, 9), (2, True, 50), (0, False, 1)])
def test_padding_and_flips_are_each_optional(padding, flips, views):
    x, _ = collect(marked(2000).augmented(padding, flips).train_batches(128, seed=0, epoch=0))
    assert len({image[0].tobytes() for image in x}) == views


# ---------------------------------------------------------------------------------------------- prefetched batches


def prefetching():
    """The threads that prepare batches."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not prefetching()


def test_prefetching_begins_so_many_and_no_more():
    begun = []
    for depth in (1, 3):
        begun.clear()
        items = dataset.prefetched(iter(range(5)), lambda s: begun.append(s) or s, lambda s: -s, depth)
        for i, item in enumerate(items):
            assert item == -i and begun == list(range(min(i + 1 + depth, 5)))
    assert list(dataset.prefetched(iter(()), None, None, 2)) == []


@pytest.fixture
def changed(monkeypatch):
    """A function that gives the engine's Batches another `get`, made from theirs, or another `prefetch`."""
    make = nn.engine.Batches

    class Wrapped:
        def __init__(self, batches, get, prefetch):
            self.begin, self.get, self.prefetch = batches.begin, functools.partial(get, batches.get), prefetch

    return lambda get=lambda original, part: original(part), prefetch=True: monkeypatch.setattr(
        nn.engine, "Batches", lambda *a: Wrapped(make(*a), get, prefetch))


def test_prefetched_batches_are_those_that_are_not(changed):
    """And each stays as it is while the next is prepared."""
    gate, prefetched = threading.Semaphore(0), []
    changed(get=lambda original, part: (original(part), gate.release())[0])
    for i, (x, labels) in enumerate(marked(160).augmented(padding=1).train_batches(8, 0, 0)):
        first = x.copy()
        if i < 19:
            assert gate.acquire(timeout=10) and (i or gate.acquire(timeout=10))  # the next one is there
        np.testing.assert_array_equal(x, first)
        prefetched.append((first, labels))
    changed(prefetch=False)
    for pair, want in zip(marked(160).augmented(padding=1).train_batches(8, 0, 0), prefetched, strict=True):
        assert all(map(np.array_equal, pair, want))


def test_two_loops_at_once_share_nothing_and_later_ones_use_their_memory_again(backend, monkeypatch):
    """On a GPU the engine's Batches hold the data set, and captured steps read their addresses."""
    made, original = [], nn.engine.Batches
    monkeypatch.setattr(nn.engine, "Batches", lambda *a: made.append(original(*a)) or made[-1])
    found = marked(60).augmented(padding=1)
    want = [collect(found.train_batches(8, 0, epoch)) for epoch in range(2)]
    collect(found.test_batches(8))
    next(found.train_batches(8, 0, 0))  # and is forgotten
    assert len(made) == 2
    pairs = [kept(pair) for pair in zip(found.train_batches(8, 0, 0), found.train_batches(8, 0, 1))]
    for have, (x, labels) in zip(zip(*pairs), want):
        np.testing.assert_array_equal(np.concatenate([a for a, _ in have]), x)
        np.testing.assert_array_equal(np.concatenate([b for _, b in have]), labels)
    assert len(made) == 3


@pytest.mark.parametrize("raised", [ValueError("bad batch"), SystemExit(3), KeyboardInterrupt()])
def test_what_the_thread_raises_reaches_the_loop_in_its_place(changed, raised):
    def failing(original, part):
        if part.start == 16:
            raise raised
        return original(part)

    changed(get=failing)
    got = []
    with pytest.raises(type(raised)) as error:
        for _, labels in marked(60).augmented().train_batches(8, 0, 0):
            got.append(labels)
    assert len(got) == 2 and error.value is raised


@pytest.mark.parametrize("end", ["exhausted", "left", "failed", "closed", "forgotten", "never begun", "not augmented"])
def test_the_thread_ends_with_the_loop(end):
    found = marked(80) if end == "not augmented" else marked(80).augmented()
    batches = found.train_batches(8, 0, 0)
    if end in ("left", "failed"):
        with contextlib.suppress(ZeroDivisionError):
            for _ in found.train_batches(8, 0, 0):
                assert len(prefetching()) == 1
                if end == "left":
                    break
                1 / 0
    elif end != "never begun":
        next(batches)
        assert len(prefetching()) == (end != "not augmented")
    if end == "exhausted":
        assert len(list(batches)) == 9
    elif end == "closed":
        batches.close()
    else:
        del batches
    assert not prefetching()


def test_a_loop_left_open_lets_the_interpreter_exit():
    script = ("import numpy as np; from datasets.dataset import *; a = Arrays(np.zeros((99, 1, 8, 8), np.uint8),\n"
              "np.zeros(99, int)); batches = Dataset('z', 1, a, a).augmented().train_batches(9, 0, 0)\n"
              "for _ in batches: raise SystemExit(5)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert done.returncode == 5 and not done.stderr
