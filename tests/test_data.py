"""data.py: MNIST files whole and broken, downloads from a server that misbehaves, generated digits, batches."""

import gzip
import hashlib
import http.server
import re
import struct
import threading

import numpy as np
import pytest

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
def small_mnist(monkeypatch):
    """Twenty training and five test images count as the whole of MNIST here."""
    monkeypatch.setattr(data, "MNIST_COUNTS", {"train": 20, "t10k": 5})


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
    "truncated": (WHOLE[:-1], "is cut short: 20x28x28 entries make 15,696 bytes, it has 15,695"),
    "too long": (WHOLE + b"\0", "goes on after its data"),
    "huge claim": (b"\x00\x00\x08\x03" + struct.pack(">3I", 2**31, 2**31, 2**31), "is cut short"),
    "no images": (idx(np.zeros((0, 28, 28))), "has 20 labels"),
    "other size": (idx(np.zeros((20, 14, 14))), "holds images of 20x14x14 instead of 20x28x28"),
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
    with pytest.raises(data.DataError, match="has 20 images but .* has 19 labels"):
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


# ---------------------------------------------------------------------------------------------- download

CONTENT = gzip.compress(np.random.default_rng(1).bytes(300_000))


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; the first part of the path names how: /good/x, /cut/x, ..."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, manner):
        return f"http://127.0.0.1:{self.server_port}/{manner}/file.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        manner = self.path.split("/")[1]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.requests.append((manner, start))
        if manner == "missing":
            return self.send_error(404)
        if manner == "garbage":
            return self.wfile.write(b"this is no HTTP\r\n\r\n")
        content = CONTENT
        if manner == "flipped":
            content = CONTENT[:1000] + bytes([CONTENT[1000] ^ 1]) + CONTENT[1001:]
        if manner == "html":
            content = b"<html>please log in</html>"
        if manner == "norange":
            start = 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop = start + 100_000 if manner in ("cut", "norange" if len(self.server.requests) == 1 else "") else None
        self.wfile.write(content[start:stop])


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def whole(path):
    return hashlib.md5(data.read_bytes(path, 2**30)).digest() == hashlib.md5(gzip.decompress(CONTENT)).digest()


@pytest.mark.parametrize("manners", [["good"], ["missing", "good"], ["flipped", "good"], ["html", "good"],
                                     ["garbage", "good"], ["cut"], ["norange"]])
def test_download_ends_with_the_verified_file(tmp_path, server, manners):
    path = tmp_path / "new" / "file.gz"
    data.download([server.url(m) for m in manners], path, whole)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.gz"]
    if manners == ["cut"]:  # 300,000 bytes in pieces of 100,000, each going on where the last was cut
        assert [start for _, start in server.requests] == [0, 100_000, 200_000, 300_000]


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
