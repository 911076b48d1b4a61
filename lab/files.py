"""Files that survive crashes and are not trusted: whole writes, sealed arrays, locks.

    write_whole(path, content)            all of it or what was there before, even if the power goes
    save_arrays(arrays), load_arrays()    an .npz that carries the SHA-256 of itself; nothing is unpickled
    with locked(path): ...                one process at a time, on any file system
    with without_downloads(): ...         what is absent is not downloaded
"""

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from engines import Mode


class Downloading(Mode):
    downloading = True  # False inside without_downloads()


mode = Downloading()


def without_downloads():
    """Inside it files that are absent stay absent."""
    return mode.being(downloading=False)


class FileFault(Exception):
    """A file that is not what it should be; the message says how, in one sentence that the file's name begins."""


# ---------------------------------------------------------------------------------------------- whole files


def write_whole(path, content):
    """Write bytes or text so that `path` holds all of it, on the disk, or what it held before.

    Its folder must be there. An OSError names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # where the folder is gone, so is the file
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise


def flush_folder(folder):
    """Make what was renamed in a folder last, where the system (not Windows) and the file system can."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(opened)


def remove_leftovers(folder, names="*"):
    """Remove what killed writers of these files left in a folder; call it where nobody else can be writing."""
    for path in Path(folder).glob(f".{names}.*.tmp"):
        path.unlink(missing_ok=True)


def as_json(value):
    return json.dumps(value, indent=1) + "\n"


LARGEST_JSON = 2**26  # bytes


def read_json(path):
    """The value in a JSON file, None if there is no such file."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > LARGEST_JSON:
                raise FileFault(f"{path} has more than {LARGEST_JSON:,} bytes")
            return json.loads(file.read())
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
    with buffer.getbuffer() as content:
        content[-SEAL_LENGTH:] = SEAL + hashlib.sha256(content[:-SEAL_LENGTH]).hexdigest().encode()
    return buffer.getvalue()


def load_arrays(content):
    """{name: array} of what save_arrays gave. FileFault if one bit of it has changed, or a byte is missing.

    NumPy by itself lets most such changes through: zip's CRC is not compared for every reader, headers not at all.
    """
    content = memoryview(content)
    if content[-SEAL_LENGTH:][: len(SEAL)] != SEAL:
        raise FileFault("its end, with the checksum, is missing")
    if content[-64:] != hashlib.sha256(content[:-SEAL_LENGTH]).hexdigest().encode():
        raise FileFault("its contents do not have the checksum that it carries")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: np.asarray(array) for name, array in archive.items()}  # NumPy gives other members as bytes
    except Exception as error:  # zipfile and NumPy raise whatever they stumble on
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise FileFault(f"it is no archive of arrays ({reason})") from None


# ---------------------------------------------------------------------------------------------- locks

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # file systems without


@contextlib.contextmanager
def locked(path, wait=True):
    """True while this process alone has the lock of a file or whatever else `path` names; waits as long as another one
    has it. Without wait: False then. The folder is made; what killed writers of the file left there is removed.

    The lock is .NAME.lock beside it. The operating system ends it with its process. Where it has none for this file
    system, .NAME.lock.soft tells host and process: that of a process that has ended is taken over on the same host; if
    all of a host has ended, the file has to be removed.
    """
    import filelock  # a tenth of a second, which --help need not take

    path = Path(path)
    name = path.with_name(f".{path.name}.lock")
    lock = filelock.FileLock(name, fallback_to_soft=False)
    try:
        mine = acquired(lock, -1 if wait else 0)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        lock = filelock.SoftFileLock(f"{name}.soft")
        mine = acquired(lock, -1 if wait else 0.1)  # where names cannot be exchanged, a second look takes over
    try:
        if mine:
            remove_leftovers(path.parent, glob.escape(path.name))
        yield mine
    finally:
        if mine:
            lock.release()


def acquired(lock, seconds):
    try:
        lock.acquire(timeout=seconds)
    except TimeoutError:
        return False
    return True
