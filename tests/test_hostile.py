"""Broken and hostile files: archives that lead out or never end, sizes that are only claimed, checkpoints with a bit
flipped, records edited badly, and every reader with thousands of mutated inputs (`--slow`: 20,000 each).
"""

import functools
import gzip
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from test_data import ARCHIVE, CIFAR10, FIRST, WHOLE_BATCH, Trap, check_coloured, files_in, idx, link, tar_gz
from test_photos import flat_tree, jpeg, make_tree, picture, png16, saved, write_devkit, write_solution

import data
import exp_mlp_mnist as mlp
import figures
import files
import photos
import train

ROOT = Path(data.__file__).parent

# ---------------------------------------------------------------------------------------------- archives


def member(name, size=0, kind=tarfile.REGTYPE, raw_size=None, content=b"", pax=None):
    """The bytes of a tar member that claims this size, whatever it has. raw_size: the 12 bytes of the field."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    info.pax_headers = pax or {}
    head = bytearray(info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT, errors="surrogateescape"))
    if raw_size:
        head[-512 + 124 : -512 + 136] = raw_size
        head[-512 + 148 : -512 + 156] = b" " * 8
        head[-512 + 148 : -512 + 155] = b"%06o\0" % sum(head[-512:])
    return bytes(head) + content + bytes(-len(content) % 512)


def base256(number):
    """A size field that holds what octal digits cannot: a huge or negative number."""
    return (b"\x80" if number >= 0 else b"\xff") + (number % 256**11).to_bytes(11, "big")


def archive(*parts, end=bytes(1024)):
    return gzip.compress(b"".join(parts) + end, 1)


def old_sparse(name, blocks):
    """An old GNU sparse member whose map goes on for this many blocks."""
    head = bytearray(member(name, kind=tarfile.GNUTYPE_SPARSE))
    head[482] = 1
    head[148:156] = b" " * 8
    head[148:155] = b"%06o\0" % sum(head)
    return bytes(head) + (bytes(504) + b"\1" + bytes(7)) * blocks + bytes(512)


ALL = b"".join(member(name, len(content), content=content) for name, content in CIFAR10.items())
REST = b"".join(member(name, len(content), content=content) for name, content in list(CIFAR10.items())[1:])
GIB = 2**30
BOMB = gzip.compress(bytes(2**24)) * 64  # a GiB, 1000:1
PAX = functools.partial(member, "PaxHeader", kind=tarfile.XHDTYPE)
LOADED = None
NO_FILE, TWICE, ABSENT = "as a link, device or the like", f"holds {FIRST} more than once", f"does not hold {FIRST}"
HEADERS, ENDS = "holds more than 1,048,576 bytes of headers", "holds a member that would end at byte"
MEMBERS = {  # archive, what is said of it
    "link": (archive(member("evil", kind=tarfile.SYMTYPE), ALL), LOADED),
    "link in place of the folder": (tar_gz([(FIRST.split("/")[0], link(tarfile.SYMTYPE, "../../outside")),
                                            *CIFAR10.items()]), LOADED),
    "link, then through it": (tar_gz([("a", link(tarfile.SYMTYPE, "..")), ("a/evil", b"x"), *CIFAR10.items()]), LOADED),
    "hard link": (tar_gz([("evil", link(tarfile.LNKTYPE)), *CIFAR10.items()]), LOADED),
    "absolute": (tar_gz([("/tmp/evil", b"x"), *CIFAR10.items()]), LOADED),
    "up": (tar_gz([("../evil", b"x"), ("a/../../evil", b"x"), *CIFAR10.items()]), LOADED),
    "backslash": (tar_gz([("..\\evil", b"x"), ("C:\\evil", b"x"), *CIFAR10.items()]), LOADED),
    "device": (tar_gz([("null", link(tarfile.CHRTYPE)), *CIFAR10.items()]), LOADED),
    "block device": (tar_gz([("disk", link(tarfile.BLKTYPE)), *CIFAR10.items()]), LOADED),
    "fifo": (tar_gz([("pipe", link(tarfile.FIFOTYPE)), *CIFAR10.items()]), LOADED),
    "unknown type": (archive(member("volume", kind=b"V"), member("multi", kind=b"M"), ALL), LOADED),
    "empty name": (archive(member(""), ALL), LOADED),
    "line breaks": (archive(member("a\nb\r\x1b[2J"), ALL), LOADED),
    "no UTF-8": (archive(member("a\udcff"), ALL), LOADED),
    "long name": (archive(member("a" * 100_000), ALL), LOADED),
    "renamed to lead out": (archive(member("x", 1, content=b"x", pax={"path": "../evil"}), ALL), LOADED),
    "wanted is a link": (archive(member(FIRST, kind=tarfile.SYMTYPE), REST), NO_FILE),
    "wanted is a hard link": (archive(REST, member(FIRST, kind=tarfile.LNKTYPE)), NO_FILE),
    "wanted is a device": (archive(member(FIRST, kind=tarfile.CHRTYPE), REST), NO_FILE),
    "wanted is a folder": (archive(member(FIRST + "/", kind=tarfile.DIRTYPE), REST), NO_FILE),
    "wanted is sparse": (archive(old_sparse(FIRST, 1), REST), NO_FILE),
    "wanted is sparse, in pax": (archive(member("x", 512, content=b"1\n0\n0\n".ljust(512, b"\0"), pax={
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(len(WHOLE_BATCH)),
        "GNU.sparse.name": FIRST}), REST), NO_FILE),
    "wanted twice": (archive(ALL, member(FIRST, len(WHOLE_BATCH), content=WHOLE_BATCH)), TWICE),
    "another renamed to wanted": (archive(ALL, member("x", 1, content=b"x", pax={"path": FIRST})), TWICE),
    "all renamed to wanted": (archive(member("g", 46, tarfile.XGLTYPE, content=f"46 path={FIRST}\n".encode()), ALL),
                              TWICE),
    "wanted under another name": (archive(member("./" + FIRST, len(WHOLE_BATCH), content=WHOLE_BATCH), REST), ABSENT),
    "wanted with a wrong sum": (archive(REST, ALL[:148] + b"000000\0 " + ALL[156:512]), ABSENT),
    "wanted of a size in pax": (archive(member(FIRST, 5, content=b"x", pax={"size": "4096"}), REST), "with 4,096 by"),
    "huge": (archive(member("x", 8 * GIB - 1), ALL), ENDS),
    "huger": (archive(member("x", raw_size=base256(2**80)), ALL), ENDS),
    "ends before it begins": (archive(member("x", raw_size=base256(-1024)), ALL), ENDS),
    "leads back": (archive(member("y"), member("x", raw_size=base256(-512)), ALL), ENDS),
    "negative in pax": (archive(member("x", 5, content=b"x", pax={"size": "-2048"}), ALL), "holds|is not a whole"),
    "headers of a GiB": (archive(PAX(GIB), ALL), HEADERS),
    "headers of less than nothing": (archive(PAX(raw_size=base256(-512)), ALL), HEADERS),
    "headers of a GiB of nothing": (gzip.compress(PAX(GIB)) + BOMB, HEADERS),
    "name of a GiB": (gzip.compress(member("L", GIB, tarfile.GNUTYPE_LONGNAME)) + BOMB, HEADERS),
    "headers without end": (archive(PAX() * 3000, ALL), "is not a whole tar.gz|bytes of headers"),
    "members without end": (archive(member("x") * 5000, ALL), HEADERS),
    "map without end": (archive(old_sparse("x", 5000), ALL), HEADERS),
    "ends in a GiB of zeros": (archive(ALL) + BOMB,
                               r"holds more than [\d,]+ bytes"),
    "a member of a GiB of zeros": (gzip.compress(member("x", 2**24)) + BOMB, ENDS),
    "followed by something else": (archive(ALL) + b"PK\3\4", "is not a whole tar.gz"),
}


@pytest.fixture
def small_sets(monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_COUNTS", dict.fromkeys(data.CIFAR10_COUNTS, 4))
    monkeypatch.setattr(data, "MNIST_COUNTS", {"train": 20, "t10k": 5})


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_of_an_archive(tmp_path, small_sets, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    content, says = MEMBERS[kind]
    (folder / ARCHIVE).write_bytes(content)
    begin = time.process_time()
    if says is LOADED:
        check_coloured(data.load("cifar10", folder))
        assert files_in(tmp_path) == sorted(f"data/{name}" for name in (ARCHIVE, *CIFAR10))
        assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    else:
        with pytest.raises(data.DataError, match=says) as error:
            data.load("cifar10", folder)
        assert str(error.value).startswith(f"{folder / ARCHIVE} ") and "\n" not in str(error.value)
        assert files_in(tmp_path) == [f"data/{ARCHIVE}"]
    assert time.process_time() - begin < 1 and not Path("/tmp/evil").exists()


# ---------------------------------------------------------------------------------------------- sizes


def header(claim, dtype="<f8", version=1):
    """The beginning of an .npy file that claims a shape."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {claim!r}, }}\n".encode()
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def zipped(*members, kind=zipfile.ZIP_STORED):
    """A zip archive of (name, content)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as file:
        for name, content in members:
            file.writestr(name, content)
    return stream.getvalue()


def sealed(content):
    """A zip archive with its length of comment and seal made right, as whoever wants to deceive would."""
    content = content[:-2] + struct.pack("<H", files.SEAL_LENGTH) + files.SEAL
    return content + files.hashlib.sha256(content[: -len(files.SEAL)]).hexdigest().encode()


def element(kind, content, size=None):
    """An element of a .mat file that claims a size."""
    padding = bytes(-len(content) % 8) if kind != 15 else b""
    return struct.pack("<II", kind, len(content) if size is None else size) + content + padding


def mat_file(*elements):
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"".join(elements)


def mat_array(name, shape, kind=9, stored=2, content=b"", size=None):
    return element(14, element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack(f"<{len(shape)}i", *shape))
                   + element(1, name) + element(stored, content, size))


def table(shape, fields=(b"ILSVRC2012_ID", b"WNID"), width=32):
    return element(14, element(6, struct.pack("<II", 2, 0)) + element(5, struct.pack(f"<{len(shape)}i", *shape))
                   + element(1, b"synsets") + element(5, struct.pack("<i", width))
                   + element(1, b"".join(name.ljust(width, b"\0") for name in fields)))


def absurd_jpeg():
    content = bytearray(jpeg(picture(0, 8, 8)))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 65535, 65535)
    return bytes(content)


IMAGES, TRUE_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
CLAIMS = {  # file: what is in it, its reader, the sentence
    "count": (struct.pack(">4I", 0x803, 2**31, 28, 28), "data.read_idx(path, (60_000, 28, 28))", "holds 2147483648x28"),
    "bomb": (gzip.compress(struct.pack(">4I", 0x803, 60, 28, 28)) + BOMB, "data.read_idx(path, (60, 28, 28))",
             "goes on after"),
    "bomb of another kind": (BOMB, "data.read_idx(path, (60_000, 28, 28))", "begins with 00 00 00 00"),
    "bomb as a download": (BOMB, "data.md5_of_contents(path, 2**22)", "was read"),
    "archive": (gzip.compress(member("x", 100)) + BOMB,
                "data.unpack(path, {'a': 100}, path.parent, 2**26)", "holds more than"),
    "archive of headers": (gzip.compress(PAX(GIB)) + BOMB, "data.unpack(path, {'a': 100}, path.parent, 2**28)",
                           "bytes of headers"),
    "mat of 64 GiB": (mat_file(mat_array(b"X", (32, 32, 3, 2**24), content=b"x", size=2**32 - 1)),
                      "data.read_mat(path, 73_257)", "is cut short"),
    "mat of a large shape": (mat_file(mat_array(b"X", (32, 32, 3, 2**24), content=b"x" * 8)),
                             "data.read_mat(path, 73_257)", "is not a whole .mat file: cannot reshape"),
    "mat of a large variable": (mat_file(element(15, zlib.compress(struct.pack("<II", 14, 2**32 - 1) + bytes(2**20)))),
                                "data.read_mat(path, 73_257)", "claims 4,294,967,295 bytes of 225,"),
    "mat that is longer": (mat_file(element(15, zlib.compress(struct.pack("<II", 14, 64) + bytes(2**26), 1))),
                           "data.read_mat(path, 73_257)", "is not as long as it says"),
    "mat of many": (mat_file(element(15, zlib.compress(struct.pack("<II", 13, 2**20) + bytes(2**20))) * 100),
                    "data.read_mat(path, 1000)", "claims 1,048,576 bytes of 1,048,384"),
    "meta.mat": (mat_file(table((2**31 - 1, 2**20))), "photos.synsets(path)", "the table synsets has 0 entries"),
    "file too large": (None, "data.read_mat(path, 1000)", "has more than 3,145,536"),
    "sealed 64 GiB": (sealed(zipped(("a.npy", header((2**33,))))), "files.read_arrays(path, 2**28)",
                      "68,719,476,736 bytes in the shape"),
    "JPEG": (absurd_jpeg(), "photos.opened(path).__enter__()", "65,535 x 65,535 pixels"),
    "cache too large": (None, "files.read_arrays(path, 2**24)", "larger than 16,777,216"),
    "JSON too large": (None, "files.read_json(path)", "has more than 67,108,864 bytes"),
    "labels too large": (None, "photos.flat_labels(path.parent, [], [])", "more than 33,554,432 bytes"),
}
CHILD = """
import json, pathlib, resource, sys, time
import data, files, photos
folder, before = pathlib.Path(sys.argv[1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
virtual = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + 2**26, resource.getrlimit(resource.RLIMIT_AS)[1]))
for name, (path, read) in json.loads(sys.stdin.read()).items():
    path, begin = folder / path, time.process_time()  # other programs do not count
    try:
        eval(read)
        message = "was read"
    except (data.DataError, files.FileFault, photos.BadFile) as error:
        message = str(error)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([name, message, time.process_time() - begin, used / 1024]), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured as Linux does it")
def test_what_is_only_claimed_takes_neither_memory_nor_time(tmp_path):
    """With 64 MiB beyond what the imports took, so a reader that asks for more says "MemoryError"."""
    todo = {}
    for name, (content, read, _) in CLAIMS.items():
        path = f"{name}/{photos.SOLUTION}"
        (tmp_path / name).mkdir()
        (tmp_path / path).write_bytes(content or b"")
        if content is None:
            os.truncate(tmp_path / path, 64 * GIB)
        todo[name] = path, read
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], cwd=ROOT, input=json.dumps(todo), text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    reports = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert set(reports) == set(CLAIMS)
    for name, (message, seconds, mib) in reports.items():
        assert CLAIMS[name][2] in message, (name, message)
        assert seconds < 1 and mib < 64, (name, seconds, mib)


# ---------------------------------------------------------------------------------------------- sealed arrays


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run of a tiny network on 60 images."""
    folder = tmp_path_factory.mktemp("run")
    digits = data.synthetic(folder, train=60, test=20)
    experiment = replace(mlp.EXPERIMENT, load=lambda s: digits)
    run = train.Run(experiment, mlp.Settings(data="synthetic", width=5, epochs=2, limit=60, out=str(folder)))
    with run.lock():
        run.train(bar=False)
    return run


@pytest.fixture(scope="session")
def checkpoint(run):
    return (run.folder / "checkpoint.npz").read_bytes()


def test_every_truncation_of_a_checkpoint_is_refused(checkpoint):
    for end in range(len(checkpoint)):
        with pytest.raises(files.FileFault):
            files.load_arrays(memoryview(checkpoint)[:end])


def test_flipped_bits_of_a_checkpoint_are_refused(checkpoint):
    rng = random.Random(0)
    last = range(8 * len(checkpoint) - 8 * 300, 8 * len(checkpoint))  # directory and seal: each bit of them
    for bit in [*rng.sample(range(8 * len(checkpoint)), 4000), *last]:
        flipped = bytearray(checkpoint)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(files.FileFault):
            files.load_arrays(flipped)


def test_bytes_of_a_checkpoint_that_come_go_or_change_places_are_refused(checkpoint):
    rng, n = random.Random(1), len(checkpoint)
    changes = [checkpoint + b"\0", checkpoint + checkpoint, b"\0" + checkpoint, checkpoint + checkpoint[-71:]]
    for _ in range(300):
        a, b, c = sorted(rng.sample(range(n + 1), 3))
        changes.append(checkpoint[:a] + checkpoint[b:c] + checkpoint[a:b] + checkpoint[c:])
        changes.append(checkpoint[:a] + checkpoint[b:])
        changes.append(checkpoint[:a] + rng.randbytes(b - a) + checkpoint[b:])
    for changed in changes:
        if changed != checkpoint:
            with pytest.raises(files.FileFault):
                files.load_arrays(changed)
    head = checkpoint[:-2 * files.SEAL_LENGTH].rindex(b"PK\1\2")  # the seal of other contents
    with pytest.raises(files.FileFault, match="do not have the checksum"):
        files.load_arrays(checkpoint[:head] + bytes(4) + checkpoint[head + 4 :])


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def overlapping():
    """Two names for the same place: many of these would be many times the archive's size."""
    content = bytearray(zipped(("a.npy", npy(np.zeros(99))), ("b.npy", npy(np.zeros(99)))))
    second = content.rindex(b"PK\1\2")
    content[second + 42 : second + 46] = bytes(4)
    content[second + 46 : second + 47] = b"a"
    return bytes(content)


def directory_says(at, field):
    """An archive of one array in whose directory this field is changed."""
    content = bytearray(zipped(("a.npy", npy(np.zeros(9)))))
    at += content.rindex(b"PK\1\2")
    content[at : at + len(field)] = field
    return bytes(content)


ONE = npy(np.arange(3.0))
RESEALED = {
    "nothing": (b"PK\5\6" + bytes(18), None),
    "garbage": (b"garbage" * 50, "is no archive of arrays"),
    "cut": (zipped(("a.npy", ONE))[5:], "is no archive of arrays"),
    "no array": (zipped(("a.npy", b"hello")), "is no archive of arrays"),
    "empty member": (zipped(("a.npy", b"")), "is no archive of arrays"),
    "compressed": (zipped(("a.npy", ONE), kind=zipfile.ZIP_DEFLATED), "a.npy is compressed"),
    "compressed bomb": (zipped(("a.npy", bytes(2**24)), kind=zipfile.ZIP_BZIP2), "larger than all of it"),
    "name twice": (b"%s", "two of its members have the same name"),
    "same place": (overlapping(), "same name|Overlapped|is no archive"),
    "said to be compressed": (directory_says(10, b"\x0e\0"), "a.npy is compressed"),
    "unequal sizes": (directory_says(20, struct.pack("<I", 2**31)), "a.npy is compressed"),
    "objects": (zipped(("a.npy", npy(np.array([{}, 1], object), allow_pickle=True))), "a.npy is of object"),
    "table": (zipped(("a.npy", npy(np.zeros(3, [("a", "f8")])))), r"a.npy is of \[\('a', '<f8'\)\]"),
    "table with objects": (zipped(("a.npy", header((1,), [("a", "O")]) + bytes(8))), "a.npy is of"),
    "subarray": (zipped(("a.npy", header((1,), ("<f8", (2,))) + bytes(16))), "is no archive of arrays|a.npy is of"),
    "subarray of 64 GiB": (zipped(("a.npy", header((1,), [("a", "<f8", (2**33,))]))), "a.npy is of|is no archive"),
    "dates": (zipped(("a.npy", npy(np.zeros(3, "M8[s]")))), "a.npy is of datetime64"),
    "raw bytes": (zipped(("a.npy", npy(np.zeros(3, "V8")))), "a.npy is of |V8"),
    "64 GiB": (zipped(("a.npy", header((2**33,)))), "a.npy says 68,719,476,736 bytes in the shape"),
    "2^128 bytes": (zipped(("a.npy", header((2**62, 2**63)))), "a.npy says"),
    "less than nothing": (zipped(("a.npy", header((-1,)) + bytes(8))), "a.npy says -8 bytes"),
    "less than nothing twice": (zipped(("a.npy", header((-1, -2)) + bytes(16))), r"16 bytes in the shape \(-1, -2\)"),
    "texts of no letters": (zipped(("a.npy", header((2**40,), "<U0"))), "is no archive of arrays"),
    "no shape": (zipped(("a.npy", header("x") + bytes(8))), "is no archive of arrays"),
    "more than it says": (zipped(("a.npy", ONE + b"\0")), "a.npy says 24 bytes .* has 25"),
    "less than it says": (zipped(("a.npy", ONE[:-1])), "a.npy says 24 bytes .* has 23"),
    "version 3": (zipped(("a.npy", b"\x93NUMPY\3\0" + ONE[8:])), "unknown version"),
    "brackets": (zipped(("a.npy", header((1,), "(" * 5000))), "is no archive of arrays"),
    "long header": (zipped(("a.npy", header((1,))[:8] + b"\x20\x4e" + b" " * 20_000)),
                    "is no archive of arrays .ValueError: Header"),
    "code": (zipped(("a.npy", header((1,)).replace(b"(1,)", b"f()"))), "is no archive of arrays"),
}
with pytest.warns(UserWarning, match="Duplicate name"):
    RESEALED["name twice"] = zipped(("a.npy", ONE), ("a.npy", ONE)), RESEALED["name twice"][1]


@pytest.mark.parametrize("kind", RESEALED)
@pytest.mark.filterwarnings("ignore")
def test_archives_that_somebody_sealed_anew(kind):
    content, says = RESEALED[kind]
    content = sealed(content)
    if says is None:
        assert files.load_arrays(content) == {}
    else:
        with pytest.raises(files.FileFault, match=says) as error:
            files.load_arrays(content)
        assert "checksum" not in str(error.value) and "\n" not in str(error.value)


def test_a_sealed_pickle_is_not_loaded(tmp_path):
    trap = npy(np.array([Trap(tmp_path / "trapped")], object), allow_pickle=True)
    with pytest.raises(files.FileFault, match="is of object"):
        files.load_arrays(sealed(zipped(("a.npy", trap))))
    with pytest.raises(files.FileFault, match="is no archive of arrays"):
        files.load_arrays(sealed(zipped(("a.npy", pickle.dumps(Trap(tmp_path / "trapped"))))))
    assert not list(tmp_path.iterdir())


def test_arrays_come_back_as_they_were():
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.arange(6).reshape(2, 3)), "c": np.array("é"),
              "d": np.zeros((0, 7)), "e": np.array([b"x", b"yz"]), "f": np.array(True), "g": np.float32(2),
              "h": np.array([2, 1], ">i2")}
    back = files.load_arrays(files.save_arrays(arrays))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype and back[name].flags.writeable


def test_a_large_checkpoint_is_sealed_and_checked_in_a_moment():
    content = files.save_arrays({"x": np.arange(100 * 2**20, dtype=np.uint8)})
    times = []
    for _ in range(3):
        begin = time.process_time()
        files.load_arrays(content)
        times.append(time.process_time() - begin)
    assert min(times) < 1


def test_old_and_damaged_caches_are_made_again(tmp_path, monkeypatch):
    drawn, draw = [], data.draw_digits
    monkeypatch.setattr(data, "draw_digits", lambda *a: drawn.append(0) or draw(*a))
    want = data.synthetic(tmp_path, train=30, test=10)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    arrays = files.load_arrays(whole)
    labels = arrays["labels"].copy()
    labels[3] = 10
    for content in (b"", whole[:-1], whole[:5000] + b"?" + whole[5001:], zipped(("images.npy", npy(arrays["images"]))),
                    *map(files.save_arrays, ({"images": arrays["images"]}, arrays | {"labels": labels},
                                             arrays | {"labels": arrays["labels"].astype(float)},
                                             arrays | {"images": arrays["images"][1:]}))):
        path.write_bytes(content)
        count = len(drawn)
        again = data.synthetic(tmp_path, train=30, test=10)
        assert len(drawn) == count + 1 and path.read_bytes() == whole
        np.testing.assert_array_equal(again.train_images, want.train_images)
    data.synthetic(tmp_path, train=30, test=10)
    assert len(drawn) == 9


def test_no_module_unpickles_or_unpacks_by_itself():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"\bpickle\.|np\.load\(|\.extract(all)?\(|\bloadmat\b|allow_pickle", text), path


# ---------------------------------------------------------------------------------------------- records


def figure_of(run, tmp_path, monkeypatch):
    """An experiment whose one figure shows the run in four seeds, all in its record; (experiment, path, rows)."""
    monkeypatch.setattr(figures, "RECORDS", tmp_path / "results")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figure = figures.Figure("four seeds", lambda s: [replace(s, seed=i) for i in range(4)], mlp.width_draw)
    experiment = replace(run.experiment, figures={"fig": figure})
    runs = figure.runs(run.settings)
    path = figures.record_path(experiment, "fig", run.settings.data)
    path.parent.mkdir()
    path.write_text(figures.record_of(experiment, "fig", run.settings, runs, 4 * [run.result()], None))
    return experiment, path, [i for i, line in enumerate(path.read_text().split("\n"), 1) if line.startswith('{"data"')]


ROWS = {  # what a person may do to a row, what is said
    "word": (lambda row: row.replace('"weights": ', '"weights": "no", "w": '), "weights is 'no' instead of a number"),
    "nan": (lambda row: re.sub('"seconds": [^}]*', '"seconds": NaN', row), "seconds is nan instead of a number"),
    "infinite": (lambda row: re.sub('"seconds": [^}]*', '"seconds": 1e999', row), "seconds is inf instead of a number"),
    "true": (lambda row: re.sub('"epochs": 2', '"epochs": true', row), "epochs is True instead of a number"),
    "absent": (lambda row: row.replace('"best_test_acc"', '"best"'), "best_test_acc is None instead of a number"),
    "diverged": (lambda row: row.replace('"diverged": false', '"diverged": "no"'), "diverged is 'no' instead of true"),
    "name": (lambda row: row.replace('"run"', '"runs"'), "a row names its data and its run"),
    "list": (lambda row: '[1, 2]' + "," * row.endswith(","), "a result is an object, not list"),
    "null": (lambda row: 'null' + "," * row.endswith(","), "a row names its data and its run"),
    "number": (lambda row: '7' + "," * row.endswith(","), "a result is an object, not int"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_is_named_by_its_line_and_the_figure_is_drawn(run, tmp_path, monkeypatch, capsys, kind):
    experiment, path, numbers = figure_of(run, tmp_path, monkeypatch)
    settings, (change, says) = replace(run.settings, out=str(tmp_path / "none")), ROWS[kind]
    lines = path.read_text().split("\n")
    for number in (numbers[1], numbers[3]):
        lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines))
    figures.plot(experiment, "fig", settings, "best", record=False)
    told = capsys.readouterr()
    for line, number in zip(told.err.splitlines(), (numbers[1], numbers[3]), strict=True):
        assert line.startswith(f"left out: {path}, line {number}: {says}")
    assert "2 of 4 runs are done, 2 of them recorded" in told.out


def test_a_record_that_is_no_json_is_named_by_its_line(run, tmp_path, monkeypatch, capsys):
    experiment, path, numbers = figure_of(run, tmp_path, monkeypatch)
    whole = path.read_text()
    path.write_text(whole.replace('"weights": ', '"weights" ', 1))
    figures.plot(experiment, "fig", run.settings, "best", record=False)  # one of the runs is there
    assert capsys.readouterr().err == f"left out: {path}, line {numbers[0]}: Expecting ':' delimiter\n"
    for content in (b"", whole[:-3].encode(), b"\xff\xfe{", whole.encode() + b"}", b"[" * 100_000, b"1" * 5000, b"7",
                    b"[3]", b'{"runs": 7}'):
        path.write_bytes(content)
        figures.plot(experiment, "fig", run.settings, "best", record=False)
        assert capsys.readouterr().err.startswith(f"left out: {path}"), content


def test_bad_files_of_a_run_are_named_and_the_figure_is_drawn(run, tmp_path, monkeypatch, capsys):
    experiment, _, _ = figure_of(run, tmp_path, monkeypatch)
    settings = replace(run.settings, out=str(tmp_path / "runs"))
    bad = train.Run(experiment, settings)
    bad.folder.mkdir(parents=True)
    path, whole = bad.folder / "result.json", (run.folder / "result.json").read_text()
    for content, says in ((whole.replace('"weights": ', '"weights": x'), ", line 2: Expecting value"),
                          (whole.replace('"weights": ', '"weights": null, "w": '), ": weights is None instead of"),
                          (whole[:100], ", line "), ("[]", ": a result is an object"), ("", ", line 1: Expecting")):
        path.write_text(content)
        figures.plot(experiment, "fig", settings, "best", record=False)
        assert capsys.readouterr().err.startswith(f"left out: {path}{says}")
        assert bad.status().startswith(f"{path}{says}")
    path.unlink()
    (bad.folder / "failed.json").write_text('{"error": \n}')
    assert bad.status() == f"{bad.folder / 'failed.json'}, line 2: Expecting value"
    (bad.folder / "failed.json").unlink()
    for content in ("", "epoch\n1", "\0\0", "a\nb\nc\n"):
        (bad.folder / "log.csv").write_text(content)
        assert bad.status().startswith("begun: ")
    (bad.folder / "config.json").write_text("{")
    assert bad.config() is None


@pytest.mark.parametrize("content", ["-Infinity", "[1]", "7", '"no space"', "[[]]", '{"error": []}'])
def test_a_failure_that_is_none_is_no_crash(run, tmp_path, content):
    bad = train.Run(run.experiment, replace(run.settings, out=str(tmp_path)))
    bad.folder.mkdir(parents=True)
    (bad.folder / "failed.json").write_text(content)
    assert isinstance(bad.status(), str)


def test_a_number_too_large_for_any_is_none(run):
    with pytest.raises(files.FileFault, match="here: weights is 1000.* instead of a number"):
        train.check_result(run.result() | {"weights": 10**400}, "here")


# ---------------------------------------------------------------------------------------------- mutated inputs

EXTREMES = [(value % 256**size).to_bytes(size, order) for order in ("little", "big") for size in (1, 2, 4, 8)
            for value in (0, 1, -1, -2, 1 << 8 * size - 1, (1 << 8 * size - 1) - 1)]
WORDS = [b"NaN", b"-Infinity", b"1e999", b"null", b"true", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"-",
         b"0", b"9" * 30, b"9" * 400, b"1." + b"0" * 30, b"\\u0000", b"\xff", b"\xc3", b"\0", b"\xef\xbb\xbf", b"n0"]


def mutated(rng, seeds):
    """One of these contents with one to four changes: bits, bytes and words, cuts, copies, splices, extreme numbers."""
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(content) + 1) if rng.random() < 0.5 else min(len(content), int(rng.expovariate(1 / 60)))
        end = min(len(content), at + int(rng.expovariate(1 / 30)))
        what = rng.randrange(10)
        if what == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del content[at:]
        elif what == 2:
            del content[at:end]
        elif what == 3:
            content[at:at] = rng.randbytes(1 + int(rng.expovariate(1 / 8)))
        elif what == 4:
            content[at:at] = content[at:end] * rng.choice((1, 2, 30))
        elif what == 5:
            other = rng.choice(seeds)
            content[at:] = other[rng.randrange(len(other) + 1) :]
        elif what in (6, 7):
            number = rng.choice(EXTREMES)
            content[at : at + len(number)] = number
        elif what == 8:
            content[at : rng.choice((at, end))] = rng.choice(WORDS)
        else:
            content[at:end] = rng.choice((b"\0", b"\xff", b" ")) * (end - at)
    return bytes(content)


def read_images(folder, monkeypatch):
    pixels = np.arange(48).reshape(3, 4, 4)
    plain, path = idx(pixels), folder / "images"

    def read():
        images = data.read_idx(path, (3, 4, 4))
        assert images.shape == (3, 4, 4) and images.dtype == np.uint8

    return [plain, plain, gzip.compress(plain), gzip.compress(plain, 0)], path, read


def read_labels(folder, monkeypatch):
    plain, path = idx(np.arange(10)), folder / "labels"
    (folder / "images").write_bytes(idx(np.zeros((10, 2, 2))))

    def read():
        images, labels = data.read_idx_pair(folder / "images", path, 10, (10, 2, 2))
        assert images.shape == (10, 1, 2, 2) and labels.shape == (10,) and set(labels) <= set(range(10))

    return [plain, plain, gzip.compress(plain)], path, read


def read_cifar(folder, monkeypatch):
    path = folder / "batch.bin"

    def read():
        images, labels = data.read_records(path, 2, 1, 10)
        assert images.shape == (2, 3, 32, 32) and set(labels) <= set(range(10))

    return [WHOLE_BATCH[: 2 * 3073]], path, read


def read_archive(folder, monkeypatch, whole):
    written, path, sizes = {}, folder / "archive.tar.gz", {"a/x.bin": 700, "a/y.bin": 100}
    monkeypatch.setattr(data, "write_whole", lambda path, content: written.update({path: content}))
    parts = [member("a/", kind=tarfile.DIRTYPE), member("a/x.bin", 700, content=bytes(range(256)) * 2 + bytes(188)),
             member("a/y.bin", 100, content=bytes(100)), member("z", 3, content=b"abc", pax={"path": "ä" * 99})]
    tars = [b"".join(parts) + bytes(1024), old_sparse("s", 2) + b"".join(parts[::-1]) + bytes(1024)]

    def read():
        written.clear()
        data.unpack(path, sizes, folder, 2**16)
        assert {path: len(content) for path, content in written.items()} == {folder / k: n for k, n in sizes.items()}
        assert sorted(found.name for found in folder.iterdir()) == ["a", path.name]

    return [gzip.compress(tar, level) for tar in tars for level in (0, 9)] if whole else tars, path, read


def read_svhn(folder, monkeypatch):
    path, variables = folder / "a.mat", {"X": np.arange(6144).reshape(32, 32, 3, 2).astype(np.uint8), "y": [[10], [2]]}
    seeds = []
    for packed in (False, True):
        stream = io.BytesIO()
        scipy.io.savemat(stream, variables | {"y": np.array(variables["y"], np.uint8)}, do_compression=packed)
        seeds.append(stream.getvalue())
    y_first = seeds[0][:128] + seeds[0][-56:] + seeds[0][128:-56]
    seeds += [seeds[0][:400], y_first, y_first]

    def read():
        images, labels = data.read_mat(path, 2)
        assert images.shape == (2, 3, 32, 32) and images.dtype == np.uint8 and set(labels) <= set(range(10))

    return seeds, path, read


def read_devkit(folder, monkeypatch):
    write_devkit(folder)
    plain, names = (folder / photos.META).read_bytes(), scipy.io.loadmat(folder / photos.META)
    scipy.io.savemat(folder / photos.META, {"synsets": names["synsets"]}, do_compression=True)
    packed = (folder / photos.META).read_bytes()

    def read():
        assert all(1 <= number <= 1000 and isinstance(name, str) for number, name in photos.synsets(path).items())

    path = folder / photos.META
    return [plain, plain, packed], path, read


def read_flat_labels(folder, monkeypatch, name=photos.TRUTH):
    write = {photos.TRUTH: write_devkit, photos.SOLUTION: write_solution}[name]
    write(flat_tree(folder))

    def read():
        labels = photos.flat_labels(folder, [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 6)], ["n0", "n1", "n2"])
        assert labels.shape == (5,) and labels.dtype == np.int32 and set(labels) <= {0, 1, 2}

    return [(folder / name).read_bytes()], folder / name, read


def read_index(folder, monkeypatch, whole):
    want = photos.index(make_tree(folder))
    path = folder / photos.CACHE
    monkeypatch.setattr(photos, "write_whole", lambda *a: None)

    def read():
        classes, halves, flat = photos.index(folder)
        assert classes == want[0] and not flat
        for half, (names, labels) in halves.items():
            assert len(names) == len(labels) and labels.dtype == np.int64 and set(labels) <= {0, 1, 2}
            assert not any(b"/" in name or name.startswith(b".") for name in names.tolist())
            assert not whole or names.tolist() == want[1][half][0].tolist()

    return [path.read_bytes()], path, read


def read_marker(folder, monkeypatch):
    photos.mark(folder, 256, True)

    def read():
        state = photos.marked(folder)
        assert isinstance(state["side"], int) and isinstance(state["finished"], bool)

    return [(folder / photos.MARKER).read_bytes()], folder / photos.MARKER, read


def read_digits(folder, monkeypatch):
    data.synthetic(folder, side=8, train=2, test=1)
    (path,) = folder.iterdir()
    again = np.zeros((3, 1, 8, 8), np.uint8), np.arange(3)
    monkeypatch.setattr(data, "draw_digits", lambda *a: again)
    monkeypatch.setattr(data, "write_whole", lambda *a: None)

    def read():
        digits = data.synthetic(folder, side=8, train=2, test=1)
        assert digits.train_images.shape == (2, 1, 8, 8) and digits.train_images.dtype == np.uint8
        assert set(digits.train_labels) | set(digits.test_labels) <= set(range(10))

    return [path.read_bytes()], path, read


def read_photograph(folder, monkeypatch):
    path = folder / "photograph"
    turned = Image.Exif()
    turned[0x0112] = 6
    seeds = [jpeg(picture(0, 24, 20)), jpeg(picture(1, 20, 24), progressive=True), saved("CMYK", "JPEG"), saved("P"),
             saved("RGBA"), png16(3), jpeg(picture(2, 24, 20), exif=turned)]

    def read():
        with photos.opened(path) as (image, orientation, size):
            part = photos.cut(image, orientation, (8, 8), photos.centre_box(*size, 8))
            assert part.size == (8, 8) and part.mode == "RGB"

    return seeds, path, read


def read_checkpoint(folder, monkeypatch, run, whole):
    path = folder / "checkpoint.npz"
    _, model, optimizer, _ = run.prepare()
    seed = (run.folder / "checkpoint.npz").read_bytes()
    path.write_bytes(seed)
    copy = train.Run(run.experiment, run.settings)
    copy.folder = folder

    def read():
        progress = copy.load_checkpoint(model, optimizer)
        assert not whole or path.read_bytes() == seed
        assert all(array.dtype == np.float32 for name, array in model.state_dict().items() if "weight" in name)
        assert isinstance(progress, train.Progress)

    return [seed], path, read


def read_run_file(folder, monkeypatch, run, name):
    copy, path = train.Run(run.experiment, run.settings), folder / name
    copy.folder = folder
    seeds = {"failed.json": b'{\n "error": "no space",\n "traceback": [\n  "a"\n ]\n}\n'}

    def read():
        copy.config()
        copy.status()
        result = copy.result()
        if result:
            assert all(math.isfinite(result[key]) for key in train.NUMBERS if result[key] is not None)

    return [seeds.get(name) or (run.folder / name).read_bytes()], path, read


def read_record(folder, monkeypatch, run):
    experiment, path, _ = figure_of(run, folder, monkeypatch)
    seed = path.read_bytes()

    def read():
        runs = [replace(run.settings, seed=i, out="none") for i in range(4)]
        results, recorded = figures.collect(experiment, "fig", runs)
        assert all(math.isfinite(result[key]) for result in results if result for key in train.NUMBERS
                   if result[key] is not None)

    return [seed], path, read


def gzipped(content):
    return gzip.compress(content, 1, mtime=0)


# Each reader gives whole contents, the path to write mutated ones to, and what reads that and checks what it finds;
# whole: whether the file itself is mutated, and not what is sealed or compressed afterwards.
READERS = {  # reader, what is made of a mutated content before it is written
    "IDX images": (read_images, bytes),
    "IDX labels": (read_labels, bytes),
    "CIFAR records": (read_cifar, bytes),
    "CIFAR archive": (read_archive, bytes),
    "CIFAR archive within gzip": (read_archive, gzipped),
    "SVHN": (read_svhn, bytes),
    "devkit": (read_devkit, bytes),
    "truth": (read_flat_labels, bytes),
    "Kaggle's table": (functools.partial(read_flat_labels, name=photos.SOLUTION), bytes),
    "index": (read_index, bytes),
    "index sealed anew": (read_index, sealed),
    "marker": (read_marker, bytes),
    "digits": (read_digits, bytes),
    "digits sealed anew": (read_digits, sealed),
    "photograph": (read_photograph, bytes),
    "checkpoint": (read_checkpoint, bytes),
    "checkpoint sealed anew": (read_checkpoint, sealed),
    "result.json": (functools.partial(read_run_file, name="result.json"), bytes),
    "config.json": (functools.partial(read_run_file, name="config.json"), bytes),
    "failed.json": (functools.partial(read_run_file, name="failed.json"), bytes),
    "log.csv": (functools.partial(read_run_file, name="log.csv"), bytes),
    "record": (read_record, bytes),
}
EXPECTED = data.DataError, files.FileFault, train.UsageError, photos.BadFile


@pytest.fixture
def memory():
    """A folder in memory where there is such a thing: a disk takes milliseconds to write a file anew."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", READERS)
@pytest.mark.filterwarnings("ignore")
def test_readers_give_valid_data_or_say_what_is_wrong(run, memory, tmp_path, monkeypatch, capsys, kind, count):
    make, wrap = READERS[kind]
    options = {name: value for name, value in {"run": run, "whole": wrap is bytes}.items()
               if name in inspect.signature(make).parameters}
    seeds, path, read = make(memory, monkeypatch, **options)
    if wrap is sealed:
        seeds = [seed[: -files.SEAL_LENGTH] for seed in seeds]
    path.write_bytes(wrap(seeds[0]))
    read()
    rng, refused, slowest = random.Random(kind), 0, 0
    for number in range(count):
        content = wrap(mutated(rng, seeds))
        path.write_bytes(content)
        begin = time.monotonic()
        try:
            read()
        except EXPECTED as error:
            refused += 1
            assert "\n" not in str(error)
        except Exception:
            (tmp_path / "input").write_bytes(content)
            raise AssertionError(f"input {number}, kept as {tmp_path / 'input'}")
        slowest = max(slowest, time.monotonic() - begin)
        capsys.readouterr()
    assert slowest < 5
    print(f"{kind}: {refused:,} of {count:,} refused, slowest {1000 * slowest:.0f} ms")
