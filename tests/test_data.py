"""data.py: files and archives whole and broken, downloads from a server that misbehaves, generated digits, batches,
random crops and flips, the thread that prepares them.
"""

import contextlib
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io

import data
import nn


def idx(array):
    """The IDX file of a uint8 array."""
    array = np.asarray(array, np.uint8)
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 28, 28))
LABELS = np.arange(20) % 10
FILES = {"train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(LABELS),
         "t10k-images-idx3-ubyte": idx(IMAGES[:5]), "t10k-labels-idx1-ubyte": idx(LABELS[:5])}


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    """Twenty training and four or five test images count as the whole of a data set here."""
    monkeypatch.setattr(data, "MNIST_COUNTS", {"train": 20, "t10k": 5})
    monkeypatch.setattr(data, "CIFAR10_COUNTS", dict.fromkeys(data.CIFAR10_COUNTS, 4))
    monkeypatch.setattr(data, "CIFAR100_COUNTS", {"train.bin": 20, "test.bin": 4})
    monkeypatch.setattr(data, "SVHN_FILES", {"train_32x32.mat": (20, "?"), "test_32x32.mat": (4, "?")})


def write_files(folder, packed=False, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        content = changes.get(name.replace("-", "_"), content)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sub", ["", "mnist"])
def test_mnist_plain_and_gzip(tmp_path, packed, sub):
    write_files(tmp_path / sub, packed)
    dataset = data.load("mnist", tmp_path)
    np.testing.assert_array_equal(dataset.train_images[:, 0], IMAGES)
    np.testing.assert_array_equal(dataset.test_labels, LABELS[:5])
    assert dataset.train_labels.dtype == np.int64
    x, labels = next(dataset.test_batches(5))
    assert x.shape == (5, 1, 28, 28) and x.dtype == np.float32
    np.testing.assert_allclose(x[:, 0], (IMAGES[:5] / 255 - 0.1307) / 0.3081, atol=1e-6)


WHOLE = FILES["train-images-idx3-ubyte"]
BROKEN = {
    "empty": (b"", "begins with nothing"),
    "magic": (b"\x00\x00\x0d\x03" + WHOLE[4:], "begins with 00 00 0d 03 instead of 00 00 08 03"),
    "labels for images": (FILES["train-labels-idx1-ubyte"], "begins with 00 00 08 01"),
    "html": (b"<html>not found</html>", "begins with 3c 68 74 6d"),
    "header": (WHOLE[:9], "ends within its header of 16 bytes"),
    "truncated": (WHOLE[:-1], "is cut short at 15,695 bytes: 20x28x28 entries make 15,696 bytes"),
    "too long": (WHOLE + b"\0", "goes on after its data"),
    "huge claim": (b"\x00\x00\x08\x03" + struct.pack(">3I", 2**31, 28, 28),
                   "holds 2147483648x28x28 entries instead of 20x28x28"),
    "no images": (idx(np.zeros((0, 28, 28))), "holds 0x28x28 entries instead of 20x28x28"),
    "other size": (idx(np.zeros((20, 14, 14))), "holds 20x14x14 entries instead of 20x28x28"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_images_are_named(tmp_path, fault, packed):
    content, message = BROKEN[fault]
    write_files(tmp_path, packed, train_images_idx3_ubyte=content)
    with pytest.raises(data.DataError, match=re.escape(message)) as error:
        data.load("mnist", tmp_path)
    assert "train-images-idx3-ubyte" in str(error.value) and "\n" not in str(error.value)


def test_broken_labels_and_gzip_are_named(tmp_path):
    write_files(tmp_path, train_labels_idx1_ubyte=idx(np.where(LABELS == 7, 11, LABELS)))
    with pytest.raises(data.DataError, match="train-labels-idx1-ubyte has label 11 at position 7"):
        data.load("mnist", tmp_path)
    write_files(tmp_path, train_labels_idx1_ubyte=idx(LABELS[:-1]))
    with pytest.raises(data.DataError, match="train-labels-idx1-ubyte holds 19 entries instead of 20"):
        data.load("mnist", tmp_path)
    write_files(tmp_path / "cut", packed=True)
    path = tmp_path / "cut" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(data.DataError, match="t10k-images-idx3-ubyte.gz is not a whole gzip file"):
        data.load("mnist", tmp_path / "cut")
    path.write_bytes(path.read_bytes()[:50] + b"\0\1\2\3" * 30)
    with pytest.raises(data.DataError, match="t10k-images-idx3-ubyte.gz is not a whole gzip file"):
        data.load("mnist", tmp_path / "cut")


def test_unknown_data_set_and_impossible_parts(tmp_path):
    with pytest.raises(data.DataError, match="'imagenot'"):
        data.load("imagenot", tmp_path)
    write_files(tmp_path)
    dataset = data.load("mnist", tmp_path)
    assert len(dataset.limited(7).train_labels) == 7
    held = dataset.held_out(6)
    np.testing.assert_array_equal(held.test_images, dataset.train_images[14:])
    assert len(held.train_labels) == 14
    with pytest.raises(data.DataError, match="20 training images, so a limit of 21"):
        dataset.limited(21)
    with pytest.raises(data.DataError, match="20 cannot be held out"):
        dataset.held_out(20)


# ---------------------------------------------------------------------------------------------- CIFAR, SVHN

COLOURED = np.random.default_rng(2).integers(0, 256, (24, 3, 32, 32)).astype(np.uint8)
CLASS = (np.arange(24) * 7) % 10


def records(rows, *labels):
    """A CIFAR file of these rows of COLOURED, each image behind its bytes of labels."""
    return b"".join(bytes(int(label[i]) for label in labels) + COLOURED[i].tobytes() for i in rows)


CIFAR10 = {f"cifar-10-batches-bin/{name}": records(range(4 * i, 4 * i + 4), CLASS)
           for i, name in enumerate(data.CIFAR10_COUNTS)}
FIRST = "cifar-10-batches-bin/data_batch_1.bin"
ARCHIVE = "cifar-10-binary.tar.gz"


def write_all(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tar_gz(files, level=1):
    """A tar.gz of {name: content}; content may also be the TarInfo of a member without any."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), level)


def check_coloured(dataset, labels=CLASS):
    assert dataset.train_images.dtype == np.uint8 and dataset.train_images.flags.c_contiguous
    np.testing.assert_array_equal(dataset.train_images, COLOURED[:20])
    np.testing.assert_array_equal(dataset.test_images, COLOURED[20:])
    np.testing.assert_array_equal(dataset.train_labels, labels[:20])
    np.testing.assert_array_equal(dataset.test_labels, labels[20:])
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int64


@pytest.mark.parametrize("sub", ["cifar-10-batches-bin", "cifar10", ""])
def test_cifar10_files_in_each_place(tmp_path, sub):
    write_all(tmp_path / sub, {Path(name).name: content for name, content in CIFAR10.items()})
    dataset = data.load("cifar10", tmp_path)
    check_coloured(dataset)
    x, labels = next(dataset.test_batches(3))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    for c in range(3):
        np.testing.assert_allclose(x[:, c], (COLOURED[20:23, c] / 255 - mean[c]) / std[c], atol=1e-5)


def test_cifar100_has_its_fine_labels(tmp_path):
    fine = np.arange(24) * 4 + 3
    files = {"train.bin": records(range(20), CLASS, fine), "test.bin": records(range(20, 24), CLASS, fine)}
    write_all(tmp_path / "cifar-100-binary", files)
    dataset = data.load("cifar100", tmp_path)
    check_coloured(dataset, fine)
    assert dataset.classes == 100
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(records(range(20), CLASS, fine + 25))
    with pytest.raises(data.DataError, match="train.bin has label 100 at position 18, but labels go from 0 to 99"):
        data.load("cifar100", tmp_path)


WHOLE_BATCH = CIFAR10[FIRST]
BROKEN_RECORDS = {
    "empty": (b"", "is cut short at 0 bytes: 4 records of 3,073 bytes make 12,292 bytes"),
    "cut": (WHOLE_BATCH[:-1], "is cut short at 12,291 bytes: 4 records of 3,073 bytes make 12,292 bytes"),
    "long": (WHOLE_BATCH + b"x", "goes on after its data: 4 records of 3,073 bytes make 12,292 bytes"),
    "label": (WHOLE_BATCH[: 2 * 3073] + b"\x0a" + WHOLE_BATCH[2 * 3073 + 1 :],
              "has label 10 at position 2, but labels go from 0 to 9"),
}


@pytest.mark.parametrize("fault", BROKEN_RECORDS)
@pytest.mark.parametrize("file", ["data_batch_3.bin", "test_batch.bin"])
def test_broken_records_are_named(tmp_path, fault, file):
    content, message = BROKEN_RECORDS[fault]
    write_all(tmp_path, CIFAR10 | {f"cifar-10-batches-bin/{file}": content})
    with pytest.raises(data.DataError, match=re.escape(message)) as error:
        data.load("cifar10", tmp_path)
    assert str(error.value) == f"{tmp_path / 'cifar-10-batches-bin' / file} {message}"


def test_a_folder_in_place_of_a_file_and_too_large_a_file(tmp_path, monkeypatch):
    write_all(tmp_path, CIFAR10)
    path = tmp_path / FIRST
    with open(path, "wb") as file:
        file.truncate(2**40)  # a sparse terabyte: its size is looked at before any of it is read
    with pytest.raises(data.DataError, match="data_batch_1.bin goes on after its data: .* make 12,292 bytes"):
        data.load("cifar10", tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(data.DataError, match="data_batch_1.bin cannot be read: Is a directory"):
        data.load("cifar10", tmp_path)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("sub", ["", "cifar10"])
def test_an_archive_in_the_folder_is_unpacked_once(tmp_path, sub):
    (tmp_path / sub).mkdir(exist_ok=True)
    archive = tmp_path / sub / ARCHIVE
    archive.write_bytes(tar_gz([("cifar-10-batches-bin/readme.html", b"hello"), *CIFAR10.items()]))
    own = records([7, 6, 5, 4], CLASS)  # a file that is there already is left as it is
    write_all(tmp_path, {"cifar-10-batches-bin/data_batch_2.bin": own})
    dataset = data.load("cifar10", tmp_path)
    np.testing.assert_array_equal(dataset.train_images[[0, 4, 5, 6, 7, 8]], COLOURED[[0, 7, 6, 5, 4, 8]])
    assert files_in(tmp_path) == sorted([*CIFAR10, str(archive.relative_to(tmp_path))])
    archive.unlink()
    data.load("cifar10", tmp_path)


def link(kind, target="/etc/passwd"):
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, target
    return member


def changed(content):
    return [(name, content if name == FIRST else whole) for name, whole in CIFAR10.items()]


SPARSE = tarfile.TarInfo()
SPARSE.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0",
                      "GNU.sparse.size": str(len(WHOLE_BATCH)), "GNU.sparse.name": FIRST}
STORED = tar_gz(CIFAR10.items(), level=0)
FLIPPED = bytearray(STORED)
FLIPPED[STORED.index(COLOURED[3].tobytes()) + 50] ^= 1
NO_FILE = f"holds {FIRST} as a link, device or the like instead of a regular file"
HOSTILE = {
    "symbolic link": (tar_gz(changed(link(tarfile.SYMTYPE))), NO_FILE),
    "hard link": (tar_gz(changed(link(tarfile.LNKTYPE))), NO_FILE),
    "device": (tar_gz(changed(link(tarfile.CHRTYPE))), NO_FILE),
    "fifo": (tar_gz(changed(link(tarfile.FIFOTYPE))), NO_FILE),
    "folder": (tar_gz(changed(link(tarfile.DIRTYPE))), NO_FILE),
    "sparse": (tar_gz(changed(SPARSE)), NO_FILE),
    "twice": (tar_gz([*CIFAR10.items(), (FIRST, WHOLE_BATCH)]), f"holds {FIRST} more than once"),
    "absent": (tar_gz(list(CIFAR10.items())[1:]), f"does not hold {FIRST}"),
    "outside": (tar_gz([("../" + FIRST, WHOLE_BATCH), ("/" + FIRST, WHOLE_BATCH), *list(CIFAR10.items())[1:]]),
                f"does not hold {FIRST}"),
    "small": (tar_gz(changed(WHOLE_BATCH[:-1])), f"holds {FIRST} with 12,291 bytes instead of 12,292"),
    "large": (tar_gz(changed(bytes(2**24))), f"holds {FIRST} with 16,777,216 bytes instead of 12,292"),
    "no gzip": (b"<html>not found</html>", "is not a whole tar.gz file: Not a gzipped file"),
    "empty": (b"", "is not a whole tar.gz file: empty file"),
    "no tar": (gzip.compress(bytes(range(256)) * 8), "is not a whole tar.gz file"),
    "cut": (STORED[: len(STORED) // 2], "is not a whole tar.gz file"),
    "cut at the end": (STORED[:-3], "is not a whole tar.gz file"),
    "flipped bit": (bytes(FLIPPED), "is not a whole tar.gz file: CRC check failed"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_broken_and_hostile_archives_are_named_and_leave_nothing(tmp_path, fault):
    content, message = HOSTILE[fault]
    folder = tmp_path / "data"
    write_all(folder, {ARCHIVE: content})
    with pytest.raises(data.DataError, match=re.escape(message)) as error:
        data.load("cifar10", folder)
    assert str(error.value).startswith(f"{folder / ARCHIVE} {message}") and "\n" not in str(error.value)
    assert files_in(tmp_path) == [f"data/{ARCHIVE}"]


def test_members_that_are_not_wanted_are_not_written(tmp_path):
    folder, outside = tmp_path / "data", tmp_path / "outside"
    outside.mkdir()
    hostile = [("../evil", b"x"), (str(outside / "evil"), b"x"), ("dev", link(tarfile.BLKTYPE)),
               ("cifar-10-batches-bin", link(tarfile.SYMTYPE, "../outside")),
               ("link", link(tarfile.SYMTYPE, str(outside))), ("link/evil", b"x")]
    write_all(folder, {ARCHIVE: tar_gz([*hostile, *CIFAR10.items(), *hostile])})
    check_coloured(data.load("cifar10", folder))
    assert files_in(tmp_path) == sorted(f"data/{name}" for name in (ARCHIVE, *CIFAR10))


def test_unpacking_that_fails_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    write_all(tmp_path, {ARCHIVE: tar_gz(CIFAR10.items())})

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        data.load("cifar10", tmp_path)
    assert files_in(tmp_path) == [ARCHIVE]


def mat(images=COLOURED, labels=np.where(CLASS == 0, 10, CLASS)[:, None], rows=slice(0, 20), y_first=False, **others):
    """An SVHN file of these rows; others: further variables, None to leave one out."""
    stream = io.BytesIO()
    variables = {"X": images[rows].transpose(2, 3, 1, 0), "y": labels[rows], **others}
    names = sorted((name for name in variables if variables[name] is not None), reverse=y_first)
    scipy.io.savemat(stream, {name: variables[name] for name in names}, do_compression=True)
    return stream.getvalue()


@pytest.mark.parametrize("sub", ["svhn", ""])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_svhn(tmp_path, sub, dtype):
    labels = np.where(CLASS == 0, 10, CLASS)[:, None].astype(dtype)
    assert (labels == 10).sum() == 3
    write_all(tmp_path / sub, {"train_32x32.mat": mat(labels=labels),
                               "test_32x32.mat": mat(labels=labels, rows=slice(20, 24), extra=np.eye(3))})
    dataset = data.load("svhn", tmp_path)
    check_coloured(dataset)
    x, _ = next(dataset.test_batches(4))
    np.testing.assert_allclose(x[:, 2], (COLOURED[20:, 2] / 255 - 0.4728) / 0.1970, atol=1e-5)


MAT = mat()
PACKED = struct.unpack_from("<I", MAT, 132)[0]  # bytes of X
NEED = " instead of X of 32x32x3x20 and y of 20x1"
BROKEN_MAT = {
    "empty": (b"", "is not a whole .mat file"),
    "html": (b"<html>not found</html>" * 20, "is not a whole .mat file"),
    "HDF5": (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400), "is not a whole .mat file"),
    "cut": (MAT[: len(MAT) // 2], "is not a whole .mat file: an element is cut short"),
    "X without its end": (MAT[:132] + struct.pack("<I", PACKED - 2) + MAT[136 : 134 + PACKED] + MAT[136 + PACKED :],
                          "is not a whole .mat file: a variable is not as long as it says"),
    "cut in y": (MAT[:-3], "is not a whole .mat file"),
    "y first, cut in X": (mat(y_first=True)[:-3], "is not a whole .mat file"),
    "header only": (MAT[:128], "holds neither X nor y" + NEED),
    "flipped": (MAT[:5000] + bytes(64) + MAT[5064:], "is not a whole .mat file"),
    "no labels": (mat(y=None), "holds X of 32x32x3x20" + NEED),
    "one less": (mat(rows=slice(0, 19)), "holds X of 32x32x3x19 and y of 19x1" + NEED),
    "labels fewer": (mat(y=np.ones((19, 1))), "holds X of 32x32x3x20 and y of 19x1" + NEED),
    "labels in a row": (mat(y=np.ones((1, 20))), "holds X of 32x32x3x20 and y of 1x20" + NEED),
    "images first": (mat(X=COLOURED[:20]), "holds X of 20x3x32x32 and y of 20x1" + NEED),
    "X twice": (MAT + mat(y=None)[128:], "holds X of 32x32x3x20 and y of 20x1 and X of 32x32x3x20" + NEED),
    "float images": (mat(images=COLOURED / 255), "is not a whole .mat file: a variable claims 491,576 bytes of"),
    "text": (mat(y=np.array([["a"]] * 20, object)), "holds X of 32x32x3x20 and y of no numbers" + NEED),
    "label 0": (mat(labels=CLASS[:, None].astype(np.uint8)), "has label 0 at position 0, but labels go from 1 to 10"),
    "label 11": (mat(labels=np.arange(24)[:, None] % 12 + 0.0 + (np.arange(24) == 0)[:, None]), "has label 11"),
    "fraction": (mat(labels=np.full((24, 1), 2.5)), "has label 2.5 at position 0, but labels go from 1 to 10"),
    "not a number": (mat(labels=np.full((24, 1), np.nan)), "has label nan at position 0"),
}


@pytest.mark.parametrize("fault", BROKEN_MAT)
def test_broken_mat_files_are_named(tmp_path, fault):
    content, message = BROKEN_MAT[fault]
    write_all(tmp_path, {"train_32x32.mat": content, "test_32x32.mat": mat(rows=slice(20, 24))})
    with pytest.raises(data.DataError, match=re.escape(message)) as error:
        data.load("svhn", tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'train_32x32.mat'} {message}")
    assert "\n" not in str(error.value)


class Trap:
    """Creates the file `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path):
    content = pickle.dumps({"X": Trap(tmp_path / "trapped"), "y": 0})
    pickle.loads(content)
    (tmp_path / "trapped").unlink()  # the trap works
    write_all(tmp_path, {"train_32x32.mat": content, "test_32x32.mat": content})
    with pytest.raises(data.DataError, match="train_32x32.mat is not a whole .mat file"):
        data.load("svhn", tmp_path)
    assert not (tmp_path / "trapped").exists()


# ---------------------------------------------------------------------------------------------- download

CONTENT = gzip.compress(np.random.default_rng(1).bytes(300_000))


class Server(http.server.ThreadingHTTPServer):
    """Serves a file of `files`, else CONTENT; the first part of the path names how: /good/x, /cut/x, ..."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.files, self.ended = [], {}, threading.Event()
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
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.requests.append((manner, start))
        refused = {"missing": 404, "forbidden": 403, "unavailable": 503}
        if manner in refused:
            return self.send_error(refused[manner])
        redirects = {"moved": f"/good/{name}", "ftp": "ftp://127.0.0.1/x", "file": "file:///etc/passwd",
                     "loop": self.path, "elsewhere": f"http://localhost:{self.server.server_port}/html/{name}",
                     "nonsense": "http://[", "no_port": "http://127.0.0.1:x/", "data": "data:,hello"}
        if manner in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[manner])
            return self.end_headers()
        if manner == "silent":
            return self.server.ended.wait()
        if manner == "garbage":
            return self.wfile.write(b"this is no HTTP\r\n\r\n")
        content = self.server.files.get(name, CONTENT)
        if manner == "flipped":
            content = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
        if manner == "html":
            content = b"<html>please log in</html>"
        if manner == "empty":
            content = b""
        if manner == "norange":
            start = 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        length = {"longer": len(content) - start + 9, "shorter": len(content) - start - 9, "absurd": 2**60,
                  "negative": -5, "wordy": "many"}.get(manner, len(content) - start)
        if manner not in ("endless", "unsaid"):
            self.send_header("Content-Length", str(length))
        if manner == "slow_headers":
            self.flush_headers()
            while not self.server.ended.wait(0.05):
                self.wfile.write(b"X-Wait: 1\r\n")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop = start + 100_000 if manner in ("cut", "norange" if len(self.server.requests) == 1 else "") else None
        if manner == "stall":
            self.wfile.write(content[start : start + 50])
            self.server.ended.wait()
        elif manner == "trickle":
            for i in range(start, len(content)):
                if self.server.ended.wait(0.02):
                    break
                self.wfile.write(content[i : i + 1])
        elif manner == "endless":
            with contextlib.suppress(OSError):  # of whoever has had enough
                while not self.server.ended.is_set():
                    self.wfile.write(bytes(2**16))
        else:
            self.wfile.write(content[start:stop])


@pytest.fixture
def server():
    server = Server()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def whole(path):
    return data.md5_of_contents(path) == hashlib.md5(gzip.decompress(CONTENT)).hexdigest()


@pytest.mark.parametrize("manners", [["good"], ["missing", "good"], ["flipped", "good"], ["html", "good"],
                                     ["garbage", "good"], ["cut"], ["norange"]])
def test_download_ends_with_the_verified_file(tmp_path, server, manners):
    path = tmp_path / "new" / "file.gz"
    data.download([server.url(m) for m in manners], path, whole)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.gz"]
    if manners == ["cut"]:  # 300,000 bytes in pieces of 100,000, each going on where the last was cut
        assert [start for _, start in server.requests] == [0, 100_000, 200_000, 300_000]


FAULTS = {  # manner: what is said of it, requests
    "forbidden": ("Forbidden", 1),
    "missing": ("Not Found", 1),
    "unavailable": ("Service Unavailable", 3),
    "html": ("wrong checksum", 1),
    "empty": ("wrong checksum", 1),
    "flipped": ("wrong checksum", 1),
    "shorter": ("wrong checksum", 1),
    "ftp": ("the server redirects to ftp://127.0.0.1/x", 3),
    "file": ("Redirection to url 'file:///etc/passwd' is not allowed", 3),
    "data": ("Redirection to url 'data:,hello' is not allowed", 3),
    "elsewhere": ("wrong checksum", 2),
    "loop": ("infinite loop", None),
    "nonsense": ("Invalid IPv6 URL", 3),
    "no_port": ("nonnumeric port", 3),
    "absurd": ("the server announces 1,152,921,504,606,846,976 bytes, more than 1,000,000", 3),
    "endless": ("wrong checksum", 1),
    "garbage": ("BadStatusLine|this is no HTTP", 3),
    "silent": ("timed out|no answer came", 3),
    "stall": ("timed out", 3),
    "slow_headers": ("no answer came in 0.4 s", 3),
    "trickle": ("bytes came in 0.4 s", 3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_given_up_for_the_next(tmp_path, server, monkeypatch, fault):
    fetch = data.fetch
    monkeypatch.setattr(data, "fetch", lambda url, part: fetch(url, part, timeout=0.3))
    monkeypatch.setattr(data, "PATIENCE", 0.4)
    monkeypatch.setattr(data, "LARGEST", 1_000_000)
    path, begin, (says, requests) = tmp_path / "file.gz", time.monotonic(), FAULTS[fault]
    with pytest.raises(data.DataError, match=says) as error:
        data.download([server.url(fault)], path, whole)
    assert time.monotonic() - begin < 10 and not path.exists() and "\n" not in str(error.value)
    assert requests in (None, len(server.requests))
    assert data.size_of(tmp_path / "file.gz.part") < 2_000_000
    data.download([server.url(fault), server.url("good")], path, whole)
    assert path.read_bytes() == CONTENT and [p.name for p in tmp_path.iterdir()] == ["file.gz"]


def test_a_server_that_stalls_is_given_up_however_much_it_brought(tmp_path, server, monkeypatch):
    fetch = data.fetch
    monkeypatch.setattr(data, "fetch", lambda url, part: fetch(url, part, timeout=0.2))
    monkeypatch.setattr(data, "PIECE", 10)
    with pytest.raises(data.DataError, match="timed out"):
        data.download([server.url("stall")], tmp_path / "file.gz", whole)
    assert [start for _, start in server.requests] == [0, 50, 100]


@pytest.mark.parametrize("manner", ["moved", "longer", "unsaid", "negative", "wordy"])
def test_a_server_that_is_odd_is_borne_with(tmp_path, server, manner):
    data.download([server.url(manner)], tmp_path / "file.gz", whole)
    assert (tmp_path / "file.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("asked, url, followed", [
    ("https://a/x", "https://b/x", True), ("http://a/x", "https://b/x", True), ("http://a/x", "http://b/x", True),
    ("https://a/x", "http://a/x", False), ("https://a/x", "ftp://a/x", False), ("http://a/x", "//a/x", False)])
def test_redirects_do_not_lead_from_https_to_http(asked, url, followed):
    request = urllib.request.Request(asked, headers={"Range": "bytes=5-"})
    if followed:
        again = data.Redirects().redirect_request(request, None, 302, "Found", {}, url)
        assert again.full_url == url and again.headers == request.headers
    else:
        with pytest.raises(OSError, match=f"redirects to {url}"):
            data.Redirects().redirect_request(request, None, 302, "Found", {}, url)


def test_a_slow_server_is_borne_with_as_long_as_enough_comes(tmp_path, server, monkeypatch):
    monkeypatch.setattr(data, "PATIENCE", 0.1)
    monkeypatch.setattr(data, "SLOWEST", 3)
    server.files["file.gz"] = gzip.compress(bytes(200))
    path = tmp_path / "file.gz"
    data.download([server.url("trickle")], path, lambda path: path.read_bytes() == server.files["file.gz"])
    assert server.requests == [("trickle", 0)]


def test_pieces_too_small_to_get_anywhere_end_it(tmp_path, server, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 100_001)
    with pytest.raises(data.DataError, match="the connection was cut after 300,000 of"):
        data.download([server.url("cut")], tmp_path / "file.gz", whole)
    assert (tmp_path / "file.gz.part").read_bytes() == CONTENT[:300_000]


def test_download_goes_on_with_an_earlier_part_or_drops_a_wrong_one(tmp_path, server):
    path, part = tmp_path / "file.gz", tmp_path / "file.gz.part"
    part.write_bytes(CONTENT[:5000])
    data.download([server.url("good")], path, whole)
    assert path.read_bytes() == CONTENT and server.requests == [("good", 5000)]
    for wrong in (b"x" * 7000, CONTENT + b"x", b"x" * len(CONTENT)):
        path.unlink()
        part.write_bytes(wrong)
        data.download([server.url("good")], path, whole)
        assert path.read_bytes() == CONTENT and not part.exists()


def test_download_says_why_each_address_failed(tmp_path, server):
    path = tmp_path / "file.gz"
    with pytest.raises(data.DataError) as error:
        data.download([server.url("missing"), server.url("flipped"), "http://127.0.0.1:9/x"], path, whole)
    for reason in ("Not Found", "wrong checksum", "refused"):
        assert reason in str(error.value), error.value
    assert not path.exists() and not (tmp_path / "file.gz.part").exists()


def test_absent_mnist_is_downloaded_from_the_next_mirror(tmp_path, monkeypatch):
    fetched = []

    def fetch(url, part):
        fetched.append(url)
        if "bad.example" in url:
            raise OSError("no route")
        part.write_bytes(gzip.compress(FILES[url.rsplit("/", 1)[1].removesuffix(".gz")]))

    monkeypatch.setattr(data, "fetch", fetch)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()}
    monkeypatch.setattr(data, "MNIST_FILES", sums)
    dataset = data.mnist(tmp_path, mirrors=("http://bad.example/", "http://good.example/"))
    assert len(dataset.train_labels) == 20 and sum("good.example" in url for url in fetched) == 4
    fetched.clear()
    data.mnist(tmp_path)
    assert not fetched


def test_absent_cifar_is_downloaded_and_unpacked(tmp_path, server, monkeypatch):
    server.files = {ARCHIVE: STORED, "cifar-100-binary.tar.gz": tar_gz(
        {f"cifar-100-binary/{name}.bin": records(rows, CLASS, CLASS)
         for name, rows in (("train", range(20)), ("test", range(20, 24)))}.items())}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in server.files.items()}
    monkeypatch.setattr(data, "CIFAR_MD5", sums)
    with pytest.raises(data.DataError, match=f"{ARCHIVE} could not be downloaded .*wrong checksum"):
        data.cifar10(tmp_path, mirrors=(server.url("flipped", ""),))
    assert files_in(tmp_path) == []
    check_coloured(data.cifar10(tmp_path, mirrors=(server.url("missing", ""), server.url("cut", ""))))
    check_coloured(data.cifar100(tmp_path, mirrors=(server.url("good", ""),)))
    server.requests.clear()
    check_coloured(data.cifar10(tmp_path, mirrors=(server.url("good", ""),)))
    assert not server.requests


def test_absent_svhn_is_downloaded(tmp_path, server, monkeypatch):
    server.files = {"train_32x32.mat": MAT, "test_32x32.mat": mat(rows=slice(20, 24))}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in server.files.items()}
    monkeypatch.setattr(data, "SVHN_FILES", {name: (20 if "train" in name else 4, md5) for name, md5 in sums.items()})
    with pytest.raises(data.DataError, match="train_32x32.mat could not be downloaded .*wrong checksum"):
        data.svhn(tmp_path, mirrors=(server.url("flipped", ""),))
    check_coloured(data.svhn(tmp_path, mirrors=(server.url("good", ""),)))
    assert files_in(tmp_path) == ["svhn/test_32x32.mat", "svhn/train_32x32.mat"]
    server.requests.clear()
    check_coloured(data.svhn(tmp_path, mirrors=(server.url("good", ""),)))
    assert not server.requests


# ---------------------------------------------------------------------------------------------- synthetic, batches


def test_synthetic_is_the_same_for_a_seed_and_cached(tmp_path):
    one = data.synthetic(tmp_path, train=300, test=50)
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    two = data.synthetic(tmp_path, train=300, test=50)
    assert path.stat().st_mtime_ns == stamp
    other = data.synthetic(tmp_path, train=300, test=50, seed=1)
    assert one.train_images.tobytes() == two.train_images.tobytes() != other.train_images.tobytes()
    assert one.train_images.shape == (300, 1, 28, 28) and set(one.train_labels) == set(range(10))
    path.write_bytes(path.read_bytes()[:-5000])
    again = data.synthetic(tmp_path, train=300, test=50)
    assert again.test_images.tobytes() == one.test_images.tobytes()


def test_synthetic_at_other_sizes(tmp_path):
    dataset = data.synthetic(tmp_path, side=32, channels=3, train=40, test=10)
    assert dataset.shape == (3, 32, 32) and dataset.train_images.std() > 20
    x, _ = next(dataset.train_batches(40, seed=0, epoch=0))
    np.testing.assert_allclose(x.mean(axis=(0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(x.std(axis=(0, 2, 3)), 1, atol=1e-3)


def numbered(count):
    """A data set whose image i has the value i everywhere and label i."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, 2, 2)).copy()
    one = np.ones(1, np.float32)
    return data.Dataset("numbered", count, images, np.arange(count), images, np.arange(count), one, 0 * one)


def test_batches_cover_an_epoch_once_and_depend_on_seed_and_epoch(backend):
    dataset = numbered(25).to_device()

    def order(seed, epoch, start=0):
        rows = []
        for x, labels in dataset.train_batches(10, seed, epoch, start):
            x, labels = nn.to_host(x), nn.to_host(labels)
            assert (x[:, 0, 0, 0] == labels).all()
            rows += labels.tolist()
        return rows

    assert sorted(order(0, 0)) == list(range(25))
    assert order(0, 0) == order(0, 0) != order(0, 1) != order(1, 1)
    assert order(0, 3, start=2) == order(0, 3)[20:]
    assert [len(labels) for _, labels in dataset.test_batches(10)] == [10, 10, 5]


def test_standardized_by_pixel():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 1, 4, 4)).astype(np.uint8)
    images[:, 0, 1, 2] = 200  # a constant pixel
    one, labels = np.ones(1, np.float32), np.zeros(50, int)
    dataset = data.Dataset("random", 10, images, labels, images[:9], labels[:9], one, one).standardized_by_pixel()
    x, _ = next(dataset.train_batches(50, 0, 0))
    want = np.ones((1, 4, 4))
    want[0, 1, 2] = 0
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), want, atol=1e-5)
    np.testing.assert_array_equal(x[:, 0, 1, 2], 0)


# ---------------------------------------------------------------------------------------------- augmentation


def slow_crop(image, padding, top, left, mirrored):
    """One image (C, H, W), a pixel at a time."""
    C, H, W = image.shape
    out = np.zeros_like(image)
    for c in range(C):
        for i in range(H):
            for j in range(W):
                row, column = i + top - padding, (W - 1 - j if mirrored else j) + left - padding
                if 0 <= row < H and 0 <= column < W:
                    out[c, i, j] = image[c, row, column]
    return out


@pytest.mark.parametrize("padding", [0, 1, 4, 6])
def test_every_crop_equals_the_slow_version(backend, padding):
    n = 2 * padding + 1
    draws = np.stack(np.meshgrid(np.arange(n), np.arange(n), [0, 1], indexing="ij")).reshape(3, -1)
    images = np.random.default_rng(0).integers(1, 256, (draws.shape[1], 2, 4, 5)).astype(np.uint8)
    out = data.cropped(nn.xp.asarray(images), padding, *nn.xp.asarray(draws))
    assert out.dtype == np.uint8
    want = [slow_crop(image, padding, *draw) for image, draw in zip(images, draws.T)]
    np.testing.assert_array_equal(nn.to_host(out), want)


def test_crop_of_real_size_with_padding_4_equals_padding_and_slicing():
    rng = np.random.default_rng(3)
    draws = rng.integers(0, [[9], [9], [2]], (3, 24))
    padded = np.pad(COLOURED, ((0, 0), (0, 0), (4, 4), (4, 4)))
    want = [p[:, t : t + 32, le : le + 32][..., :: -1 if m else 1] for p, t, le, m in zip(padded, *draws)]
    np.testing.assert_array_equal(data.cropped(COLOURED, 4, *draws), want)


def marked(count):
    """A data set whose image i holds the pixels' positions in channel 0 and i + 1 everywhere in channel 1."""
    images = np.empty((count, 2, 3, 4), np.uint8)
    images[:, 0] = np.arange(1, 13).reshape(3, 4)
    images[:, 1] = (np.arange(count) % 250 + 1)[:, None, None]
    scale, shift = np.full((2, 1, 1), 0.5, np.float32), np.float32([[[-1]], [[-2]]])
    return data.Dataset("marked", 250, images, np.arange(count) % 250, images[:50], np.arange(50), scale, shift)


def collect(batches):
    """All batches as two NumPy arrays."""
    parts = [(nn.to_host(x).copy(), nn.to_host(y).copy()) for x, y in batches]
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def test_augmented_batches_draw_every_crop_and_flip_equally_often(backend):
    dataset = marked(3600).augmented(padding=1).to_device()
    x, labels = collect(dataset.train_batches(128, seed=0, epoch=0))
    pixels = ((x - [[[-1]], [[-2]]]) / 0.5).astype(np.uint8)  # padding is black before normalisation: pixel 0
    own = (labels + 1)[:, None, None]
    assert ((pixels[:, 1] == own) | (pixels[:, 1] == 0)).all()  # the label is that of the image
    position = np.arange(1, 13, dtype=np.uint8).reshape(1, 3, 4)
    views = {slow_crop(position, 1, top, left, mirrored).tobytes(): (top, left, mirrored)
             for top in range(3) for left in range(3) for mirrored in range(2)}
    assert len(views) == 18
    counts = dict.fromkeys(views.values(), 0)
    for image in pixels:
        counts[views[image[0].tobytes()]] += 1
    assert 140 < min(counts.values()) and max(counts.values()) < 260, counts  # 200 each, four deviations


@pytest.mark.parametrize("padding, flip, views", [(0, True, 2), (1, False, 9), (2, True, 50)])
def test_padding_and_flip_are_each_optional(padding, flip, views):
    x, _ = collect(marked(2000).augmented(padding, flip).train_batches(128, seed=0, epoch=0))
    assert len({image[0].tobytes() for image in x}) == views


def test_augmented_batches_depend_on_seed_and_epoch_and_may_start_anywhere(backend):
    dataset = marked(70).augmented(padding=1).to_device()
    whole_epoch = collect(dataset.train_batches(16, 3, 5))
    for start in (0, 1, 4):
        for one, two in zip(collect(dataset.train_batches(16, 3, 5, start)), whole_epoch):
            np.testing.assert_array_equal(one, two[16 * start :])
    assert list(dataset.train_batches(16, 3, 5, start=5)) == []
    for seed, epoch in ((3, 6), (4, 5)):
        x, labels = collect(dataset.train_batches(16, seed, epoch))
        assert (np.sort(labels) == np.arange(70)).all()
        assert (x[:, 0] != whole_epoch[0][:, 0]).any()  # channel 0 is that of every image: other crops
    plain = collect(marked(70).to_device().train_batches(16, 3, 5))
    np.testing.assert_array_equal(plain[1], whole_epoch[1])  # the order is that without augmentation


def test_augmentation_stays_with_the_parts_and_leaves_test_images_alone():
    dataset = marked(80)
    for part in (dataset.augmented().limited(60).held_out(20), dataset.limited(60).held_out(20).augmented()):
        assert (part.padding, part.flip, len(part.train_labels)) == (4, True, 40)
        np.testing.assert_array_equal(collect(part.test_batches(7))[0], part.test_images * part.scale + part.shift)
        x, labels = collect(part.train_batches(7, 0, 0))
        assert sorted(labels) == list(range(40)) and (x[:, 1] == -2).any()


def test_augmented_synthetic_colour_digits(tmp_path):
    dataset = data.synthetic(tmp_path, side=32, channels=3, train=40, test=10).augmented()
    x, labels = collect(dataset.train_batches(16, 0, 0))
    plain, same = collect(dataset.augmented(padding=0, flip=False).train_batches(16, 0, 0))
    assert x.shape == plain.shape == (40, 3, 32, 32) and x.dtype == np.float32
    assert (labels == same).all() and (x != plain).any(axis=(1, 2, 3)).sum() > 35
    assert (x[:, :, :, 0] == dataset.shift[:, :, 0]).all(axis=(1, 2)).sum() > 5  # a column of black pixels


# ---------------------------------------------------------------------------------------------- one batch ahead


def workers():
    """The threads of `ahead` that are running."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not workers()


def test_batches_are_the_same_whatever_the_timing(monkeypatch):
    dataset = marked(170).augmented(padding=1)
    threads = set()
    cropped = data.cropped

    def late(*args):
        threads.add(threading.current_thread())
        time.sleep(pauses.uniform(0, 0.004))
        return cropped(*args)

    with monkeypatch.context() as patch:
        patch.setattr(data, "ahead", iter)
        want = [(x.copy(), y.copy()) for x, y in dataset.train_batches(8, 0, 0)]
    monkeypatch.setattr(data, "cropped", late)
    for producer, consumer in ((0.004, 0), (0, 0.004), (0.004, 0.004)):
        pauses = np.random.default_rng(1)
        got = []
        for x, y in dataset.train_batches(8, 0, 0):
            first = x.copy()
            time.sleep(pauses.uniform(0, consumer))
            np.testing.assert_array_equal(x, first)  # it stays as it is while it is in use
            got.append((first, y))
        for (x, y), (want_x, want_y) in zip(got, want, strict=True):
            np.testing.assert_array_equal(x, want_x)
            np.testing.assert_array_equal(y, want_y)
    assert threading.main_thread() not in threads and len(threads) == 3


def test_ahead_is_one_item_ahead_and_no_more():
    begun = []

    def items():
        for i in range(5):
            begun.append(i)
            yield i

    for i in data.ahead(items()):
        deadline = time.monotonic() + 5
        while len(begun) < min(i + 2, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert begun == list(range(min(i + 2, 5)))
    assert list(data.ahead(iter(()))) == []


@pytest.mark.parametrize("raised", [ValueError("bad batch"), SystemExit(3), KeyboardInterrupt()])
def test_what_the_thread_raises_reaches_the_consumer_in_its_place(raised):
    def items():
        yield 0
        yield 1
        raise raised

    got = []
    with pytest.raises(type(raised)) as error:
        for i in data.ahead(items()):
            got.append(i)
    assert got == [0, 1] and error.value is raised


@pytest.mark.parametrize("end", [None, SystemExit(130), ValueError()])
def test_the_thread_ends_with_the_loop(end):
    try:
        for _ in marked(80).augmented().train_batches(8, 0, 0):
            assert len(workers()) == 1
            if end is None:
                break
            raise end
    except type(end or ValueError()):
        pass
    assert not workers()


def test_the_thread_ends_with_the_generator():
    def batches():
        return marked(80).augmented().train_batches(8, 0, 0)

    unused = batches()
    assert not workers()
    closed = batches()
    next(closed)
    assert len(workers()) == 1
    closed.close()
    assert not workers()
    forgotten = batches()
    next(forgotten)
    del forgotten, unused
    assert not workers()
    assert len(list(batches())) == 10 and not workers()


def test_a_loop_left_open_lets_the_interpreter_exit(tmp_path):
    script = ("import numpy as np, data; one = np.ones(1, np.float32); x = np.zeros((99, 1, 8, 8), np.uint8)\n"
              "y = np.zeros(99, int); d = data.Dataset('z', 1, x, y, x, y, one, one).augmented()\n"
              "batches = d.train_batches(9, 0, 0)\n"
              "for _ in batches: raise SystemExit(5)")
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(data.__file__).parent, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 5 and not done.stderr


def test_no_thread_without_augmentation_or_on_a_gpu(monkeypatch):
    want = collect(marked(80).augmented().train_batches(8, 0, 0))
    batches = marked(80).train_batches(8, 0, 0)
    next(batches)
    assert not workers()
    monkeypatch.setattr(nn, "xp", types.SimpleNamespace(**vars(np)))  # any module but NumPy itself
    batches = marked(80).augmented().train_batches(8, 0, 0)
    x, y = next(batches)
    assert not workers()
    np.testing.assert_array_equal(x, want[0][:8])
    for one, two in zip(collect(batches), want):
        np.testing.assert_array_equal(one, two[8:])
