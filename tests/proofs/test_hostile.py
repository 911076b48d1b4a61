"""Broken and hostile files: sizes that are only claimed, and every reader with 20,000 mutated inputs: valid data or a
sentence, in little time.
"""

import gzip
import inspect
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from test_datasets import THIRD, WHOLE, idx, md5, python2  # noqa: E402
from test_files import header, sealed, zipped  # noqa: E402
from test_photographs import (  # noqa: E402
    absurd_jpeg, flat_tree, jpeg, picture, png16, saved, write_solution)

import lab  # noqa: E402
import nn  # noqa: E402
from datasets import arrays, drawn, photographs, trees  # noqa: E402
from lab import figures, files  # noqa: E402
from lab.run import NUMBERS, Progress  # noqa: E402

EXPECTED = files.FileFault, lab.UsageError, photographs.BadFile
COUNT = int(os.environ.get("HOSTILE_INPUTS", 20_000))  # for each reader

# ---------------------------------------------------------------------------------------------- sizes

GIB = 2**30
BOMB = gzip.compress(bytes(2**24)) * 64  # a GiB, 1000:1


MNIST, PICKLE = "arrays.read_idx(path, (60_000, 28, 28))", "arrays.read_pickle(path, 10_000, ['labels'])"
IDX_BOMB = gzip.compress(struct.pack(">4I", 0x803, 60_000, 28, 28)) + BOMB
LENGTHS = b"\x80\5}" + b"".join(code + b"\xff" * 7 + b"\x7f" for code in (b"\x96", b"\x8e", b"\x8d", b"\x95"))
CLAIMS = {  # file: what is in it (None: 64 GiB of zeros), its reader, the sentence
    "bomb": (BOMB, MNIST, "its header is 00000000"),
    "bomb behind a header": (IDX_BOMB, MNIST, "it has more than 47,040,016 bytes"),
    "plain MNIST": (None, MNIST, "its header is 00000000"),
    "pickle": (None, PICKLE, "but a pickle of 10,000 images has less than 61,505,536"),
    "pickle of a number in the memo": (b"\x80\2}r\xff\xff\xff\xff.", PICKLE, "it has no data"),
    "pickle of long strings": (LENGTHS, PICKLE, "is not a whole CIFAR pickle: expected 9223372036854775807 bytes"),
    "pickle of many marks": (b"\x80\2" + b"(" * 500_000 + b"t" * 500_000 + b".", PICKLE,
                             "it has more than 524,288 opcodes"),
    "pickle of many names": (b"\x80\2}" + b"(U\1a]u" * 500_000 + b".", PICKLE, "it has more than 524,288 opcodes"),
    "archive": (None, "download.check_published(path, '0')", "has more than 268,435,456 bytes"),
    "records": (None, "arrays.read_binary(path, 10_000, ['labels'])", "but 10,000 records of"),
    "devkit": (None, "trees.devkit(path)", "has more than 268,435,456 bytes"),
    "labels too large": (None, "trees.flat_labels(path.parent, [], [])", "more than 33,554,432 bytes"),
    "JPEG": (absurd_jpeg(65535, 65535), "photographs.opened(path).__enter__()", "exceeds limit"),
    "sealed 64 GiB": (sealed(zipped(("a.npy", header((2**33,))))), "files.load_arrays(path.read_bytes())",
                      "is no archive of arrays"),
    "digits": (None, "drawn.kept_digits(path, (3, 1, 8, 8))", "None"),
    "marker": (None, "photographs.marked(path.parent)", "has more than 67,108,864 bytes"),
    "JSON too large": (None, "files.read_json(path)", "has more than 67,108,864 bytes"),
}
CHILD = """
import json, pathlib, resource, sys, time
from datasets import arrays, download, drawn, photographs, trees
from lab import files
folder, before = pathlib.Path(sys.argv[1]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
virtual = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + 2**27, resource.getrlimit(resource.RLIMIT_AS)[1]))
for name, (path, read) in json.loads(sys.stdin.read()).items():
    path, begin = folder / path, time.process_time()  # other programs do not count
    try:
        message = str(eval(read))
    except (files.FileFault, photographs.BadFile) as error:
        message = str(error)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([name, message, time.process_time() - begin, used / 1024]), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured as Linux does it")
def test_what_is_only_claimed_takes_neither_memory_nor_time(tmp_path):
    """With 128 MiB beyond what the imports took; MNIST's images alone are 45, a CIFAR pickle is up to 59."""
    todo = {}
    for name, (content, read, _) in CLAIMS.items():
        path = f"{name}/{photographs.MARKER if name == 'marker' else trees.SOLUTION}"
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
        assert seconds < 2 and mib < 128, (name, seconds, mib)


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


# Each of these gives whole contents, the path to write mutated ones to, and what reads that and checks what it finds.
# whole: whether the file itself is mutated, not what is sealed afterwards. What has to have a published MD5 (archives,
# SVHN, the devkit) is not parsed before that: test_datasets.py.


def read_images(folder, monkeypatch, whole):
    pixels, path = np.arange(48, dtype=np.uint8).reshape(3, 4, 4), folder / "images.gz"

    def check():
        array, have = arrays.read_idx(path, (3, 4, 4))
        assert array.shape == (3, 4, 4) and array.dtype == np.uint8
        assert (have == md5(idx(pixels))) == np.array_equal(array, pixels)

    return [gzip.compress(idx(pixels)), gzip.compress(idx(pixels), 0), idx(pixels)], path, check


def read_labels(folder, monkeypatch, whole):
    path = folder / "labels"

    def check():
        array, _ = arrays.read_idx(path, (20,))
        assert array.shape == (20,) and array.dtype == np.uint8 and set(array.tolist()) <= set(range(10))

    return [idx(np.arange(20) % 10), gzip.compress(idx(np.arange(20) % 10))], path, check


def read_cifar(folder, monkeypatch, whole):
    path = folder / "batch.bin"

    def check():
        images, labels = arrays.examples(path, arrays.read_binary(path, 2, ["labels"]), 10)
        assert images.shape == (2, 3, 32, 32) and set(labels) <= set(range(10))

    return [WHOLE[: 2 * 3073]], path, check


def read_pickle(folder, monkeypatch, whole):
    path, batch = folder / "batch", {b"labels": [1, 2], b"filenames": [7], b"data": THIRD[b"data"][:2]}

    def check():
        images, labels = arrays.examples(path, arrays.read_pickle(path, 2, ["labels"]), 10)
        assert images.shape == (2, 3, 32, 32) and images.dtype == np.uint8 and set(labels) <= set(range(10))

    return [python2(batch), *(pickle.dumps(batch, protocol) for protocol in (2, 4, 5))], path, check


NAMES = [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 6)]  # of flat_tree


def read_table(folder, monkeypatch, whole):
    write_solution(flat_tree(folder))

    def check():
        labels = trees.flat_labels(folder, NAMES, ["n0", "n1", "n2"])
        assert labels.shape == (5,) and labels.dtype == np.int64 and set(labels) <= {0, 1, 2}

    return [(folder / trees.SOLUTION).read_bytes()], folder / trees.SOLUTION, check


def read_marker(folder, monkeypatch, whole):
    photographs.mark(folder, 256, True)
    path = folder / photographs.MARKER

    def check():
        side, finished = photographs.marked(folder)
        assert side is None and not finished or isinstance(side, int) and isinstance(finished, bool)

    return [path.read_bytes()], path, check


def read_digits(folder, monkeypatch, whole):
    drawn.digits(folder, side=8, train=2, test=1)
    (path,) = folder.glob("*.npz")
    again = np.zeros((3, 1, 8, 8), np.uint8), np.arange(3)
    monkeypatch.setattr(drawn, "draw_digits", lambda *a: again)
    monkeypatch.setattr(drawn, "write_whole", lambda *a: None)

    def check():
        digits = drawn.digits(folder, side=8, train=2, test=1)
        assert digits.train_images.shape == (2, 1, 8, 8) and digits.train_images.dtype == np.uint8
        assert set(digits.train_labels) | set(digits.test_labels) <= set(range(10))

    return [path.read_bytes()], path, check


def read_photograph(folder, monkeypatch, whole):
    path = folder / "photograph"
    seeds = [jpeg(picture(0, 24, 20)), jpeg(picture(1, 20, 24), progressive=True), saved("CMYK", "JPEG"), saved("P"),
             saved("RGBA"), png16()]

    def check():
        with photographs.opened(path) as image:
            part = photographs.cut(image, (8, 8), photographs.centre_box(*image.size, 8))
            assert part.size == (8, 8) and part.mode == "RGB"

    return seeds, path, check


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny.finished(tiny.run_of(tmp_path_factory.mktemp("runs"), epochs=2))


def read_checkpoint(folder, monkeypatch, whole, run):
    copy, path = tiny.run_of("out", epochs=2), folder / "checkpoint.npz"
    seed = (run.folder / path.name).read_bytes()
    copy.folder, copy.model, copy.dataset = folder, tiny.build(run.settings), tiny.load(run.settings)
    copy.optimizer = nn.SGD(copy.model.parameters(), run.settings.lr, momentum=0.9, weight_decay=1e-3)
    kinds = {name: (array.shape, array.dtype) for name, array in copy.model.state_dict().items()}

    def check():
        progress = copy.load_checkpoint()
        assert not whole or path.read_bytes() == seed
        assert {name: (array.shape, array.dtype) for name, array in copy.model.state_dict().items()} == kinds
        assert isinstance(progress, Progress)

    return [seed], path, check


def read_run_file(folder, monkeypatch, whole, run, name):
    copy, path = tiny.run_of("out", epochs=2), folder / name
    copy.folder = folder
    failed = b'{\n "error": "no space",\n "traceback": [\n  "a"\n ]\n}\n'

    def check():
        copy.config()
        assert isinstance(copy.status(), str)
        result = copy.result()
        if result:
            assert all(math.isfinite(result[key]) for key in NUMBERS if result[key] is not None)

    return [failed if name == "failed.json" else (run.folder / name).read_bytes()], path, check


def read_record(folder, monkeypatch, whole, run):
    path = folder / "record.json"
    runs = [replace(run.settings, seed=i) for i in range(4)]
    seed = figures.record_of(tiny.TINY, "many", run.settings, runs, 4 * [run.result()], {}).encode()

    def check():
        record, rows = figures.read_record(path)
        assert isinstance(record, dict)
        for (data, name), row in rows.items():
            assert isinstance(data, str) and isinstance(name, str)
            assert all(math.isfinite(row[key]) for key in NUMBERS if row[key] is not None)

    return [seed], path, check


READERS = {
    "IDX images": read_images,
    "IDX labels": read_labels,
    "CIFAR records": read_cifar,
    "CIFAR pickles": read_pickle,
    "Kaggle's table": read_table,
    "marker": read_marker,
    "digits": read_digits,
    "digits sealed anew": read_digits,
    "photograph": read_photograph,
    "checkpoint": read_checkpoint,
    "checkpoint sealed anew": read_checkpoint,
    **{name: partial(read_run_file, name=name) for name in ("result.json", "config.json", "failed.json", "log.csv")},
    "record": read_record,
}


@pytest.fixture
def memory():
    """A folder in memory where there is such a thing: a disk takes milliseconds to write a file anew."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.filterwarnings("ignore")
def test_readers_give_valid_data_or_say_what_is_wrong(run, memory, tmp_path, monkeypatch, capsys, kind):
    whole, make = not kind.endswith("sealed anew"), READERS[kind]
    of_run = {"run": run} if "run" in inspect.signature(make).parameters else {}
    seeds, path, read = make(memory, monkeypatch, whole, **of_run)
    if not whole:
        seeds = [seed[: -files.SEAL_LENGTH] for seed in seeds]
    wrap = bytes if whole else sealed
    path.write_bytes(wrap(seeds[0]))
    read()
    rng, refused, slowest = random.Random(kind), 0, 0
    for number in range(COUNT):
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
    print(f"{kind}: {refused:,} of {COUNT:,} refused, slowest {1000 * slowest:.0f} ms")
