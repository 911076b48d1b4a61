"""Files that are found in a folder, or downloaded there: whole, verified, by one process at a time."""

import contextlib
import hashlib
import os
import sys
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path

from tqdm import tqdm

from datasets.dataset import DataError
from lab import files
from lab.files import locked

LARGEST = 2**28  # bytes of a file that is downloaded or verified
TIMEOUT = 20  # seconds for a connection, and between two packets
PATIENCE, SLOWEST = 60, 600_000  # an attempt that brings less than so many bytes in so many seconds is given up
ATTEMPTS = 3  # for each address, unless what it has is wrong
NOTICE, TICK = 10, 0.25  # seconds without progress until a line says so, and between two looks


def find(folder, subfolders, names):
    """The first of these files that exists in one of these subfolders ("": the folder itself), or None."""
    paths = (Path(folder, sub, name) for sub in subfolders for name in names)
    return next((path for path in paths if path.is_file()), None)


def find_all(folder, subfolders, files):
    """The path of each of these files, each a tuple of names, in the first subfolder that has them all; where there is
    none, of each as `find` finds it.
    """
    for places in (*((sub,) for sub in subfolders), subfolders):
        paths = [find(folder, places, names) for names in files]
        if all(paths):
            break
    return paths


def find_or_download(folder, subfolders, names, mirrors, verify, absent=""):
    """The path of the file as `find` finds it; if it is absent, its last name is downloaded to the first subfolder.

    absent: how the sentence begins that says that it is not in the folder, up to "in".
    """
    path = find(folder, subfolders, names)
    if path is None:
        path, there = Path(folder, subfolders[0], names[-1]), seen(folder, names[-1])
        with alone(path, "downloads"):
            if not path.exists():  # else another process was faster
                try:
                    download([mirror + names[-1] for mirror in mirrors], path, verify)
                except DataError as error:
                    others = ", ".join(f"{sub}/" for sub in subfolders if sub)
                    raise DataError(f"{absent or names[0] + ' is not'} in {Path(folder).absolute()} (or {others} in "
                                    f"it), {there}; {error}") from None
    return path


def seen(folder, name):
    """What is in a folder, as a clause: some of it, what begins like `name` first."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.name + "/" * entry.is_dir() for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        return f"which cannot be read ({error.strerror})" if os.path.exists(folder) else "which does not exist"
    found.sort(key=lambda entry: (entry[:5] != name[:5], entry))
    more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
    return f"where {', '.join(found[:3])}{more} can be seen" if found else "which is empty"


@contextlib.contextmanager
def alone(path, does):
    """`locked`; a line on stderr says what another process does with the file once that has been waited for."""
    line = f"waiting for another process that {does} {path}"
    timer = threading.Timer(1, tqdm.write, (line,), {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        with locked(path):
            timer.cancel()
            yield
    finally:
        timer.cancel()


def check_published(path, md5):
    """Raise DataError unless a file has this MD5."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > LARGEST:
            raise DataError(f"{path} has more than {LARGEST:,} bytes")
        compare(path, hashlib.file_digest(file, "md5").hexdigest(), md5)


def compare(path, have, want):
    """Raise DataError unless the MD5 of what is in a file is the one that is wanted."""
    if have != want:
        raise DataError(f"{path} is not what was published: its MD5 is {have} instead of {want}; remove it, or put the "
                        "published file in its place")


def download(urls, path, verify):
    """Fetch the first of these addresses whose file passes verify(path), which else raises DataError, to `path`.

    Nothing unverified is ever called `path`. A line on stderr says which address is waited for. Raises DataError with
    the reason of every address when none gave the file.
    """
    if not files.mode.downloading:
        raise DataError(f"{path.name} is not downloaded only to be compared")
    part, failures = path.with_name(path.name + ".part"), []
    try:
        for url in urls:
            tqdm.write(f"downloading {path.name} from {url}", file=sys.stderr)
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    fetch(url, part, attempt)
                    verify(part)
                    os.replace(part, path)
                    return
                except DataError:
                    reason = "its contents have the wrong checksum"
                    break
                except Exception as error:  # requests lets many through
                    reason = " ".join(str(error).split()) or type(error).__name__
                    response = getattr(error, "response", None)
                    if response is not None and 400 <= response.status_code < 500:  # it knows that it has no such file
                        break
            failures.append(f"{url}: {reason}")
    finally:
        part.unlink(missing_ok=True)
    raise DataError(f"{path.name} could not be downloaded ({'; '.join(failures)}); "
                    f"put the file into {path.parent} yourself")


def fetch(url, part, attempt):
    """Write what is at this address to the file `part`, on to the disk; TimeoutError if it comes too slowly. Lines on
    stderr say so when nothing comes, or not a block of 64 KiB.

    The download has a thread of its own: the time limit of a connection is one for each packet, which a server that
    sends a byte at a time keeps.
    """
    import pooch  # with requests: a fifth of a second, which only downloads need take

    answer, before, size = Future(), 0, 0

    def work():
        try:
            fetcher = pooch.HTTPDownloader(bar, 2**16, timeout=TIMEOUT, hooks={"response": stay_safe})
            answer.set_result(fetcher(url, file, None))
        except BaseException as error:
            answer.set_exception(error)

    bar = tqdm(total=1, unit="B", unit_scale=True, desc=part.stem, disable=None, leave=False)
    with bar, open(part, "wb") as file:
        threading.Thread(target=work, daemon=True).start()  # given up, it ends because the file is closed
        checked = heard = said = time.monotonic()
        while not wait([answer], TICK).done:
            now, last, size = time.monotonic(), size, os.fstat(file.fileno()).st_size
            if size > LARGEST:
                raise OSError(f"more than {LARGEST:,} bytes came")
            if size > last:
                heard = now
            if now - checked >= PATIENCE:
                if size - before < SLOWEST:
                    raise TimeoutError(f"only {size - before:,} bytes came in {PATIENCE} s")
                checked, before = now, size
            if now - max(heard, said) >= NOTICE:
                said = now
                tqdm.write(f"still waiting for {url} (hardly anything came for {now - heard:.0f} s; attempt {attempt} "
                           f"of {ATTEMPTS} is given up after {PATIENCE} s at the latest)", file=sys.stderr)
        answer.result()
        file.flush()
        os.fsync(file.fileno())


def stay_safe(response, **_):
    """Refuse to be redirected from https to http."""
    target = response.headers.get("location", "")
    if response.url.startswith("https:") and target.lower().startswith("http:"):
        raise OSError(f"the server redirects to {target}")
