"""Whole writes, sealed arrays, JSON and locks."""

import errno
import fcntl
import io
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest

from lab import files

# ---------------------------------------------------------------------------------------------- whole files


def test_write_whole_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_whole(path, "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *args: (_ for _ in ()).throw(OSError("no space")))
            with pytest.raises(OSError, match="no space") as error:
                files.write_whole(path, "new")
        assert error.value.filename == str(path)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_flush_folders_will_do(tmp_path, monkeypatch, number):
    real = os.fsync

    def fsync(opened):
        if os.path.isdir(f"/proc/self/fd/{opened}"):
            raise OSError(number, "not for folders")
        real(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_what_killed_writers_left_can_be_removed(tmp_path):
    for name in (".file.123.tmp", ".fil*.5.tmp", ".filed.4.tmp", "file.tmp", ".file.lock"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path, "fil*")
    assert len(os.listdir(tmp_path)) == 4
    files.remove_leftovers(tmp_path, "file")
    assert sorted(os.listdir(tmp_path)) == [".file.lock", ".filed.4.tmp", "file.tmp"]
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".file.lock", "file.tmp"]
    (tmp_path / ".file.1.tmp").touch()
    with files.locked(tmp_path / "file"):
        assert sorted(os.listdir(tmp_path)) == [".file.lock", "file.tmp"]


@pytest.mark.parametrize("content, says", [
    (b'{\n "a": \n}', ", line 3: Expecting value"), (b"", ", line 1: Expecting value"), (b"\xff\xfe{", " is not JSON"),
    (b"[" * 100_000, " is not JSON"), (b"1" * 5000, " is not JSON")])
def test_json_that_is_none_is_named(tmp_path, content, says):
    path = tmp_path / "x.json"
    assert files.read_json(path) is None
    path.write_bytes(content)
    with pytest.raises(files.FileFault, match=f"^{path}{says}"):
        files.read_json(path)
    path.write_text(files.as_json({"a": [1, None]}))
    assert files.read_json(path) == {"a": [1, None]}


def test_sizes_are_looked_at_before_memory_is_taken(tmp_path):
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 2**36)
    with pytest.raises(files.FileFault, match="has more than 67,108,864 bytes"):
        files.read_json(path)
    with pytest.raises(files.FileFault, match="it is larger than 1,000 bytes"):
        files.read_arrays(path, 1000)


# ---------------------------------------------------------------------------------------------- sealed arrays


@pytest.fixture(scope="module")
def sealed_archive():
    rng = np.random.default_rng(0)
    return bytes(files.save_arrays({"weight": rng.random((20, 30)), "mask": rng.random((20, 30)) < 0.5,
                                    "settings": np.array('{"width": 5}'), "format": np.array(2)}))


def test_arrays_come_back_as_they_were():
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.arange(6).reshape(2, 3)), "c": np.array("é"),
              "d": np.zeros((0, 7)), "e": np.array([b"x", b"yz"]), "f": np.array(True), "g": np.float32(2),
              "h": np.array([2, 1], ">i2")}
    back = files.load_arrays(files.save_arrays(arrays))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype and back[name].flags.writeable


def test_every_truncation_is_refused(sealed_archive):
    for end in range(len(sealed_archive)):
        with pytest.raises(files.FileFault):
            files.load_arrays(memoryview(sealed_archive)[:end])


def test_flipped_bits_are_refused(sealed_archive):
    rng, bits = random.Random(0), 8 * len(sealed_archive)
    for bit in [*rng.sample(range(bits), 4000), *range(bits - 8 * 300, bits)]:  # each of the directory and the seal
        flipped = bytearray(sealed_archive)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(files.FileFault):
            files.load_arrays(flipped)


def test_bytes_that_come_go_or_change_places_are_refused(sealed_archive):
    content, rng, n = sealed_archive, random.Random(1), len(sealed_archive)
    changes = [content + b"\0", content + content, b"\0" + content, content + content[-files.SEAL_LENGTH :]]
    for _ in range(300):
        a, b, c = sorted(rng.sample(range(n + 1), 3))
        changes += [content[:a] + content[b:c] + content[a:b] + content[c:], content[:a] + content[b:],
                    content[:a] + rng.randbytes(b - a) + content[b:]]
    for changed in changes:
        if changed != content:
            with pytest.raises(files.FileFault):
                files.load_arrays(changed)


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


def header(claim, dtype="<f8"):
    """The beginning of an .npy file that claims a shape."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {claim!r}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


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


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


ONE = npy(np.arange(3.0))
RESEALED = {  # contents that somebody sealed anew, what is said of them
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
    if says is None:
        assert files.load_arrays(sealed(content)) == {}
    else:
        with pytest.raises(files.FileFault, match=says) as error:
            files.load_arrays(sealed(content))
        assert "checksum" not in str(error.value) and "\n" not in str(error.value)


def test_a_sealed_pickle_is_not_loaded(tmp_path):
    trap = npy(np.array([Trap(tmp_path / "trapped")], object), allow_pickle=True)
    with pytest.raises(files.FileFault, match="is of object"):
        files.load_arrays(sealed(zipped(("a.npy", trap))))
    with pytest.raises(files.FileFault, match="is no archive of arrays"):
        files.load_arrays(sealed(zipped(("a.npy", pickle.dumps(Trap(tmp_path / "trapped"))))))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- locks


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def file_system(request, monkeypatch):
    """With file locks, and without in the ways in which file systems say so."""
    if request.param:
        def flock(opened, how):
            raise OSError(request.param, "no locks here")

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def held(path, **options):
    with files.locked(path, **options) as mine:
        return mine


def in_child(work):
    """The process number of a child that does work()."""
    process = os.fork()
    if not process:
        try:
            work()
        finally:
            os._exit(1)
    return process


@pytest.mark.filterwarnings("error")
def test_one_at_a_time(tmp_path, file_system):
    path = tmp_path / "a" / "b" / "file"
    with files.locked(path, wait=False) as mine:
        assert mine and not held(path, wait=False) and held(tmp_path / "a" / "b" / "other", wait=False)
        found = []
        thread = threading.Thread(target=lambda: found.append(held(path, wait=False)))
        thread.start()
        thread.join()
        assert found == [False]
    assert held(path, wait=False) and held(path) and not path.exists()
    with pytest.raises(ZeroDivisionError), files.locked(path):
        raise ZeroDivisionError
    assert held(path, wait=False)


def test_a_lock_ends_with_its_process(tmp_path, file_system):
    """However it ends, and even if nobody has asked for its exit code yet where the system has locks."""
    path, ready = tmp_path / "file", tmp_path / "ready"

    def work():
        with files.locked(path):
            ready.touch()
            signal.pause()

    process = in_child(work)
    while not ready.exists():
        time.sleep(0.01)
    assert not held(path, wait=False)
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    if file_system is None:
        assert held(path, wait=False)
    os.waitpid(process, 0)
    assert held(path, wait=False)


def test_waiting_for_a_lock(tmp_path, file_system):
    path = tmp_path / "file"

    def work():
        with files.locked(path) as mine:
            os._exit(0 if mine and (tmp_path / "released").exists() else 2)

    with files.locked(path):
        process = in_child(work)
        time.sleep(0.1)
        (tmp_path / "released").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


@pytest.mark.parametrize("file_system", [errno.ENOLCK], indirect=True)
def test_claims_of_other_hosts_are_believed_and_numbers_that_are_used_again_are_not(tmp_path, file_system):
    path, soft = tmp_path / "file", tmp_path / ".file.lock.soft"
    with files.locked(path):
        number, host, born = soft.read_text().splitlines()
    for content, free in ((f"{number}\nfar.away\n{born}\n", False), (f"{number}\n{host}\n{born}\n", False),
                          (f"{number}\n{host}\n{int(born) - 5}\n", True)):
        soft.write_text(content)
        assert held(path, wait=False) == free
        soft.unlink(missing_ok=True)


def test_errors_that_are_about_something_else_are_no_missing_locks(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), files.locked(tmp_path / "file" / "x"):
        pass
    os.chmod(tmp_path, 0o500)
    if os.geteuid():
        with pytest.raises(PermissionError), files.locked(tmp_path / "x"):
            pass
    os.chmod(tmp_path, 0o700)


def test_locks_take_no_time_to_import():
    code = "import sys; from lab import files; assert 'filelock' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=files.Path(files.__file__).parent.parent)
