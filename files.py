"""Files that survive crashes and are not trusted: whole writes, sealed arrays, locks.

    write_whole(path, content)            all of it or what was there before, even if the power goes
    save_arrays(arrays), load_arrays()    an .npz that carries the SHA-256 of itself; nothing is unpickled
    with hold(folder) as mine: ...        one process at a time, on any file system
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import random
import socket
import threading
import time
import zipfile

import numpy as np


class FileFault(Exception):
    """A file that is not what it should be; the message says how, in one sentence that the file's name begins."""


# ---------------------------------------------------------------------------------------------- whole files


@contextlib.contextmanager
def whole_or_not(path):
    """A file open for writing that gets the name `path` only when everything is written and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # where the folder is gone, so is the file
            temporary.unlink()
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself lasts once the folder is flushed (not on Windows)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path, content):
    """Write bytes or text so that `path` holds all of it or what it held before."""
    with whole_or_not(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder):
    """Remove what writers that were killed left behind; call it where nobody else can be writing."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def as_json(value):
    return json.dumps(value, indent=1) + "\n"


def read_json(path):
    """The value in a JSON file, None if there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise FileFault(f"{path}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # no text at all, or a thousand brackets
        raise FileFault(f"{path} is not JSON: {error}") from None


# ---------------------------------------------------------------------------------------------- sealed arrays

SEAL = b"sha256:"  # the comment at the end of the archive: this and the digest, in hexadecimal, of all before it
SEAL_LENGTH = len(SEAL) + 64


def save_arrays(arrays):
    """The bytes of an uncompressed .npz of these named arrays, sealed."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = bytes(SEAL_LENGTH)
    content = buffer.getbuffer()
    content[-SEAL_LENGTH:] = SEAL + hashlib.sha256(content[:-SEAL_LENGTH]).hexdigest().encode()
    return content


def load_arrays(content):
    """{name: array} of what save_arrays gave. FileFault if one bit of it has changed, or a byte is missing.

    NumPy by itself lets most such changes through: zip's CRC is not compared for every reader, headers not at all. No
    memory is taken beyond the size of the content.
    """
    content = memoryview(content)
    if len(content) < SEAL_LENGTH or content[-SEAL_LENGTH:][: len(SEAL)] != SEAL:
        raise FileFault("its end, with the checksum, is missing")
    if hashlib.sha256(content[:-SEAL_LENGTH]).hexdigest().encode() != content[-64:]:
        raise FileFault("its contents do not have the checksum that it carries")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename.removesuffix(".npy"): read_array(archive, info) for info in archive.infolist()}


def read_array(archive, info):
    """A member of an .npz, as large as its header says; FileFault if that is not the size it has, or needs pickles."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise FileFault(f"{info.filename} is compressed")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in header:
            raise FileFault(f"{info.filename} is of an unknown version {version}")
        shape, fortran, dtype = header[version](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size != info.file_size - file.tell():
            raise FileFault(f"{info.filename} says {size:,} bytes of {dtype} and has {info.file_size - file.tell():,}")
        return np.frombuffer(bytearray(file.read()), dtype).reshape(shape, order="F" if fortran else "C")


# ---------------------------------------------------------------------------------------------- locks

STALE_AFTER = 600  # seconds without a sign of life after which another host's claim is given up
SIGN_EVERY = 60


@contextlib.contextmanager
def hold(folder):
    """True while this process holds the lock of a folder, False if another process has it.

    The operating system ends the hold when the process ends in whatever way. Where it has no locks for this file
    system, a claim is a file that tells host and process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+b") as file:
        try:
            lock_file(file)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                yield False
                return
            with claim(folder) as mine:
                yield mine
        else:
            yield True


def lock_file(file):
    """Lock an open file for this process without waiting; OSError if another process has it."""
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def claim(folder):
    """True while this process alone has a claim on the folder, False if another one has.

    A claim is a file claim.HOST.PROCESS.BORN. Each process makes its own first and looks for others then: of two, the
    second to come must see the first. If they see each other, both withdraw and try again.
    """
    me = folder / f"claim.{socket.gethostname()}.{os.getpid()}.{born(os.getpid())}"
    for _ in range(5):
        try:
            with open(me, "x"):
                pass
        except FileExistsError:  # another thread of this process
            break
        try:
            others = [path for path in folder.glob("claim.*") if path != me]
            if any(map(alive, others)):
                continue
            for path in others:
                path.unlink(missing_ok=True)
            with showing_life(me):
                yield True
            return
        finally:
            me.unlink(missing_ok=True)
            time.sleep(random.uniform(0, 0.1))
    yield False


@contextlib.contextmanager
def showing_life(path):
    """Touch a file every now and then, from a thread."""
    ended = threading.Event()

    def touch():
        while not ended.wait(SIGN_EVERY):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def alive(path):
    """Whether the process of a claim may be alive: known on this host, of others a recent sign is taken for it."""
    _, _, owner = path.name.partition(".")
    host, process, then = owner.rsplit(".", 2) if owner.count(".") > 1 else ("", "", "")
    try:
        if host != socket.gethostname():
            return time.time() - path.stat().st_mtime < STALE_AFTER
        os.kill(int(process), 0)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return False
    except PermissionError:  # a process of another user
        return True
    return then == f"{born(process)}"


def born(process):
    """When a process was started, in the kernel's ticks: a number that is used again is another process. Or None."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        with open(f"/proc/{process}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
