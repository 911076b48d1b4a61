"""Files that survive crashes and are not trusted: whole writes, sealed arrays, locks.

    write_whole(path, content)            all of it or what was there before, even if the power goes
    save_arrays(arrays), load_arrays()    an .npz that carries the SHA-256 of itself; nothing is unpickled
    with hold(folder) as mine: ...        one process at a time, on any file system
"""

import contextlib
import errno
import glob
import hashlib
import io
import json
import math
import os
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
    """A file open for writing that gets the name `path` only when everything is written and on the disk.

    Its folder must be there. What writers of `path` that were killed left behind is removed; an OSError names `path`.
    """
    mark = f".{path.name}."
    temporary = path.with_name(f"{mark}{this_process()}.tmp")
    try:
        with open(temporary, "wb") as file:
            now = os.fstat(file.fileno()).st_mtime
            for old in path.parent.glob(f"{glob.escape(mark)}*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if not alive(old.name[len(mark) : -len(".tmp")], now - old.stat().st_mtime):
                        old.unlink()
            yield file
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
    content = buffer.getbuffer()
    content[-SEAL_LENGTH:] = SEAL + hashlib.sha256(content[:-SEAL_LENGTH]).hexdigest().encode()
    return content


def load_arrays(content):
    """{name: array} of what save_arrays gave. FileFault if one bit of it has changed, or a byte is missing.

    NumPy by itself lets most such changes through: zip's CRC is not compared for every reader, headers not at all. A
    seal keeps nobody from sealing other contents, so these are not trusted either: what they claim takes no memory.
    """
    content = memoryview(content)
    if len(content) < SEAL_LENGTH or content[-SEAL_LENGTH:][: len(SEAL)] != SEAL:
        raise FileFault("its end, with the checksum, is missing")
    if hashlib.sha256(content[:-SEAL_LENGTH]).hexdigest().encode() != content[-64:]:
        raise FileFault("its contents do not have the checksum that it carries")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if sum(info.file_size for info in members) > len(content):  # of which some may lie in the same place
                raise FileFault("its members say that they are larger than all of it")
            if len({info.filename for info in members}) < len(members):
                raise FileFault("two of its members have the same name")
            return {info.filename.removesuffix(".npy"): read_array(archive, info) for info in members}
    except FileFault:
        raise
    except Exception as error:  # zipfile and NumPy raise whatever they stumble on
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise FileFault(f"it is no archive of arrays ({reason})") from None


def read_arrays(path, most):
    """load_arrays of a file of at most `most` bytes."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise FileFault(f"it is larger than {most:,} bytes")
        return load_arrays(file.read())


def read_array(archive, info):
    """A member of an .npz, as large as its header says; FileFault unless it holds plain numbers or texts that large."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise FileFault(f"{info.filename} is compressed")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in header:
            raise FileFault(f"{info.filename} is of an unknown version {version}")
        shape, fortran, dtype = header[version](file)
        if dtype.kind not in "biufSU":  # objects, which would be unpickled, tables, dates
            raise FileFault(f"{info.filename} is of {dtype}")
        size, have = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if size != have or min(shape, default=0) < 0:
            raise FileFault(f"{info.filename} says {size:,} bytes in the shape {shape} and has {have:,}")
        return np.frombuffer(bytearray(file.read()), dtype).reshape(shape, order="F" if fortran else "C")


# ---------------------------------------------------------------------------------------------- locks

STALE_AFTER = 600  # seconds without a sign of life after which another host's claim is given up
SIGN_EVERY = 60
PATIENCE = 10  # seconds for another process to withdraw its claim, or to say that it was granted; both take it moments


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

    A claim is a file claim.HOST.PROCESS.BORN, empty until it is granted. Each process makes its own first and looks
    for others then: of two, the second to come must see the first, so no two find themselves alone.
    """
    me = folder / f"claim.{this_process()}"
    try:
        open(me, "x").close()
    except FileExistsError:  # another thread of this process
        yield False
        return
    try:
        mine = granted(me)
        if not mine:
            me.unlink(missing_ok=True)
        with showing_life(me) if mine else contextlib.nullcontext():
            yield mine
    finally:
        me.unlink(missing_ok=True)


def granted(me):
    """Whether a claim just made is, or soon becomes, the first of all that there are.

    Those that were there when it was made are looked at until none is left; those made later see it and look at it. Of
    two made at the same moment, the one whose name comes later withdraws.
    """
    now = me.stat().st_mtime  # by the clock of the file server, as that of all other claims
    others = [path for path in me.parent.glob("claim.*") if path != me]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        others = [path for path in others if not gone(path, now)]
        if not others:
            me.write_text("granted")
            return True
        if any(path.name < me.name or is_granted(path) for path in others):
            return False
        time.sleep(0.01)
    return False


def gone(path, now):
    """Whether a claim was withdrawn, or is that of a process that has ended: then it is removed."""
    try:
        if alive(path.name.partition(".")[2], now - path.stat().st_mtime):
            return False
        path.unlink()
    except FileNotFoundError:
        pass
    return True


def is_granted(path):
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


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


def this_process():
    """This process as "HOST.PROCESS.BORN", a name that no other one ever has."""
    return f"{socket.gethostname()}.{os.getpid()}.{born(os.getpid())}"


def alive(owner, silence):
    """Whether the process this_process() called `owner` may be alive: known on this host; on another one it may be if
    it has not been silent, its file not changed, for too many seconds.
    """
    host, process, then = owner.rsplit(".", 2) if owner.count(".") > 1 else ("", "", "")
    if host != socket.gethostname():
        return silence < STALE_AFTER
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return then == f"{born(process)}"


def born(process):
    """When a process was started, in the kernel's ticks: a number that is used again is another process.

    None if it has ended, even if nobody has asked for its exit code yet, and where the system does not tell.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        with open(f"/proc/{process}/stat") as file:
            state = file.read().rpartition(")")[2].split()
            return None if state[0] in "ZX" else int(state[19])
