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
    for name in (".fil*.123.tmp", ".file.4.tmp", "file.tmp", ".file.lock"):
        (tmp_path / name).touch()
    with files.locked(tmp_path / "fil*"):
        assert sorted(os.listdir(tmp_path)) == [".fil*.lock", ".file.4.tmp", ".file.lock", "file.tmp"]
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".fil*.lock", ".file.lock", "file.tmp"]


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
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**36)
    with pytest.raises(files.FileFault, match="has more than 67,108,864 bytes"):
        files.read_json(tmp_path / "large")


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


def changes(content):
    """Every truncation, flipped bits, bytes that come, go or change places."""
    rng, n = random.Random(1), len(content)
    yield from (content[:end] for end in range(n))
    for bit in [*rng.sample(range(8 * n), 4000), *range(8 * n - 8 * 300, 8 * n)]:  # each of the directory and the seal
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield flipped
    yield from (content + b"\0", content + content, b"\0" + content, content + content[-files.SEAL_LENGTH :])
    for _ in range(300):
        a, b, c = sorted(rng.sample(range(n + 1), 3))
        yield content[:a] + content[b:c] + content[a:b] + content[c:]
        yield content[:a] + content[b:]
        yield content[:a] + rng.randbytes(b - a) + content[b:]


def test_whatever_has_changed_is_refused(sealed_archive):
    for changed in changes(sealed_archive):
        if changed != sealed_archive:
            with pytest.raises(files.FileFault, match="checksum"):
                files.load_arrays(changed)


def zipped(*members):
    """A zip archive of (name, content)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
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


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", [
    lambda trap: npy(np.array([trap], object)), lambda trap: zipped(("a.npy", npy(np.array([trap], object)))),
    pickle.dumps, lambda trap: b"garbage", lambda trap: zipped(("a.npy", header((3,)) + bytes(23)))])
def test_nothing_is_unpickled_and_what_is_no_archive_is_refused_even_if_sealed(tmp_path, content):
    with pytest.raises(files.FileFault, match="is no archive of arrays"):
        files.load_arrays(sealed(content(Trap(tmp_path / "trapped"))))
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
    """The process number of a child that ends with what work() returns."""
    process = os.fork()
    if not process:
        try:
            os._exit(work())
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
    ready, told = os.pipe()

    def work():
        with files.locked(tmp_path / "file"):
            os.write(told, b"x")
            signal.pause()

    process = in_child(work)
    os.read(ready, 1)
    assert not held(tmp_path / "file", wait=False)
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    if file_system is None:
        assert held(tmp_path / "file", wait=False)
    os.waitpid(process, 0)
    assert held(tmp_path / "file", wait=False)


def test_waiting_for_a_lock(tmp_path, file_system):
    def work():
        with files.locked(tmp_path / "file") as mine:
            return 0 if mine and (tmp_path / "released").exists() else 2

    with files.locked(tmp_path / "file"):
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
