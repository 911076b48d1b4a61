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
import struct
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.io

import datasets
import nn
from datasets import arrays, dataset, download, drawn
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
           for i, name in enumerate(arrays.CIFAR["cifar10"][3])}
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


FINE = np.arange(24) * 4 + 3
PACKED, SVHN = tar_gz(CIFAR10), {"train_32x32.mat": mat(slice(0, 20)), "test_32x32.mat": mat(slice(20, 24))}
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
    ten, hundred = arrays.CIFAR.values()
    monkeypatch.setattr(arrays, "CIFAR", {
        "cifar10": (ARCHIVE, md5(PACKED), ten[2], dict.fromkeys(ten[3], 4), *ten[4:]),
        "cifar100": (*hundred[:3], {"train.bin": 20, "test.bin": 4}, *hundred[4:])})
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
GZ, OTHER = gzip.compress(idx(DIGITS[:20])), "is not what was published: its MD5 is "
FOLDER, TERABYTE = None, 2**40  # of nothing


@pytest.mark.parametrize("name, file, content, says", [
    ("mnist", IMAGES, b"", OTHER + "d41d8cd98f00b204e9800998ecf8427e instead of "),
    ("mnist", IMAGES, b"<html>not found</html>", OTHER),
    ("mnist", IMAGES, idx(DIGITS[:20])[:-1], OTHER),
    ("mnist", IMAGES, idx(DIGITS[:20]) + b"\0", OTHER),
    ("mnist", IMAGES, TERABYTE, OTHER),
    ("mnist", IMAGES, FOLDER, "cannot be read: Is a directory"),
    ("mnist", IMAGES + ".gz", gzip.compress(idx(DIGITS[:20]) + bytes(2**24)), OTHER),
    ("mnist", IMAGES + ".gz", gzip.compress(idx(DIGITS[1:21])), OTHER),
    ("mnist", IMAGES + ".gz", GZ[:-20], "is not a whole gzip file: Compressed file ended before"),
    ("mnist", IMAGES + ".gz", GZ[:50] + b"\0\1\2\3" * 30, "is not a whole gzip file: "),
    ("cifar10", BATCH, b"", "has 0 bytes, but 4 records of 3,073 bytes make 12,292"),
    ("cifar10", BATCH, WHOLE[:-1], "has 12,291 bytes, but 4 records of 3,073 bytes make 12,292"),
    ("cifar10", BATCH, WHOLE + b"x", "has 12,293 bytes, but 4 records of 3,073 bytes make 12,292"),
    ("cifar10", BATCH, TERABYTE, "has 1,099,511,627,776 bytes, but "),
    ("cifar10", BATCH, FOLDER, "cannot be read: Is a directory"),
    ("cifar10", BATCH, WHOLE[: 2 * 3073] + b"\x0a" + WHOLE[2 * 3073 + 1 :],
     "has label 10 at position 2, but labels go from 0 to 9"),
    ("cifar100", COARSE, records(range(20), CLASS, FINE + 25), "has label 100 at position 18, but labels go from 0 to"),
    ("cifar10", ARCHIVE, tar_gz(CIFAR10 | {FIRST: bytes(12_292)}), OTHER),
    ("cifar10", ARCHIVE, PACKED[:-3], OTHER),
    ("cifar10", ARCHIVE, TERABYTE, "has more than 268,435,456 bytes"),
    ("cifar10", ARCHIVE, FOLDER, "cannot be read: Is a directory"),
    ("svhn", "train_32x32.mat", mat(slice(1, 21)), OTHER),
    ("svhn", "train_32x32.mat", TERABYTE, "has more than 268,435,456 bytes"),
    ("svhn", "train_32x32.mat", FOLDER, "cannot be read: Is a directory"),
])
def test_files_that_are_wrong_are_named_and_not_parsed(tmp_path, monkeypatch, name, file, content, says):
    monkeypatch.setattr(tarfile, "open", lambda *a: pytest.fail("opened"))
    monkeypatch.setattr(scipy.io, "loadmat", lambda *a, **k: pytest.fail("parsed"))
    others = {} if file == ARCHIVE else SETS[name]
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
