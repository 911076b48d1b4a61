"""datasets.photographs, datasets.trees: the index, labels, crops beside references, order under threads
and ranks, bad files, the resized copy, drawn photographs.
"""

import contextlib
import functools
import io
import itertools
import os
import re
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.stats
from PIL import Image
from test_datasets import collect, kept, md5, tar_gz

import datasets
import nn
from datasets import drawn, photographs, trees
from datasets.dataset import DataError, in_threads
from engines import host
from lab import files

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def picture(seed, width, height):
    """A photograph of sorts: smooth random colours and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noise = np.tile(rng.integers(-14, 15, (61, 67, 3)), (height // 61 + 1, width // 67 + 1, 1))[:height, :width]
    return Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@functools.cache
def content(seed):
    return jpeg(picture(seed, 40 + seed % 7, 48 - seed % 5))


def make_tree(folder, train=(4, 3, 5), val=(2, 2, 1)):
    """train[c] and val[c] small photographs of class c; all differ."""
    number = itertools.count()
    for half, counts in (("train", train), ("val", val)):
        for c, count in enumerate(counts):
            for i in range(count):
                write(folder / half / f"n{c}" / f"{half}_{c}{i}.JPEG", content(next(number)))
    return folder


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree")


def opened(tree, size=16, **options):
    return photographs.of_tree("photographs", tree, size=size, threads=options.pop("threads", 2), **options)


def as_bytes(x):
    """(N, 3, H, W) as a network sees it -> (N, H, W, 3) from 0 to 255"""
    return (x.transpose(0, 2, 3, 1) * STD + MEAN) * 255


def live_threads():
    return [thread.name for thread in threading.enumerate()
            if thread.name.startswith(("photographs", "ThreadPoolExecutor"))]


# ---------------------------------------------------------------------------------------------- index


def test_classes_are_folders_in_the_order_of_their_names(tmp_path):
    for name in ("b/1.JPEG", "b/0.jpg", "a/x.Png", "a/.hidden.JPEG", "a/notes.txt", "é/ü.jpeg", ".git/1.JPEG"):
        write(tmp_path / "train" / name, content(0))
    for name in ("a", "b", "é"):
        write(tmp_path / "val" / name / "v.PNG", content(1))
    write(tmp_path / "train" / "stray.JPEG", content(0))
    classes, halves = trees.index(tmp_path)
    assert classes == ["a", "b", "é"]
    names, labels = halves["train"]
    assert [os.fsdecode(name) for name in names] == ["a/x.Png", "b/0.jpg", "b/1.JPEG", "é/ü.jpeg"]
    assert names.dtype.kind == "S"  # no object for each file
    assert labels.tolist() == [0, 1, 1, 2] and labels.dtype == np.int64
    dataset = opened(tmp_path)
    assert dataset.classes == 3 and dataset.name == "photographs"
    assert dataset.test_labels.tolist() == [0, 1, 2] and dataset.train_labels.dtype == np.int64
    assert [dataset.train.files.path(i).exists() for i in range(4)] == 4 * [True]
    assert dataset.shape == (3, 16, 16)


def moved(tree, folder, then=lambda folder: None):
    """A folder of a tree out of the way."""
    (tree / folder).rename(tree / "elsewhere")
    then(tree / folder)


@pytest.mark.parametrize("fault, message", [
    (lambda t: moved(t, "train"), "train is not there; it should hold train/<class>/<image>.JPEG"),
    (lambda t: moved(t, "val"), "val is not there; it should hold val/<class>/<image>.JPEG"),
    (lambda t: moved(t, "train", Path.mkdir), "train has no class folders; it should hold train/<class>/<image>.JPEG"),
    (lambda t: moved(t, "val", Path.mkdir), "val has neither class folders nor images"),
    (lambda t: write(t / "val" / "n7" / "1.JPEG", content(0)), "should have the same classes, but n7 is only in val"),
    (lambda t: moved(t, "val/n1"), "should have the same classes, but n1 is only in train"),
    (lambda t: moved(t, "train/n1", Path.mkdir), "train/n1 holds no images"),
    (lambda t: moved(t, "val/n2", Path.mkdir), "val/n2 holds no images"),
    (lambda t: write(t / "val" / "x.JPEG", content(0)), "val has both class folders and 1 images beside them"),
])
def test_trees_that_do_not_fit_are_refused_in_a_sentence(tree, fault, message):
    opened(tree)
    fault(tree)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        opened(tree)
    assert "\n" not in str(error.value) and str(tree) in str(error.value)


def test_digest_is_of_the_index(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    first = opened(tree)
    assert re.fullmatch("[0-9a-f]{64}", first.digest) and first.unpublished == ""
    assert first.part(held_out=2, limit=3).digest == first.digest
    seen = {first.digest}
    write(tree / "train" / "n0" / "train_00.JPEG", content(3))  # what a file shows is not told
    (tree / "train" / "n0" / "notes.txt").write_text("")
    assert opened(tree.rename(tmp_path / "imagenet")).digest == datasets.load("imagenet", "~").digest == first.digest
    for fault in (lambda t: (t / "train/n0/train_00.JPEG").rename(t / "train/n0/train_0.JPEG"),
                  lambda t: (t / "train/n0/train_01.JPEG").rename(t / "train/n1/train_01.JPEG"),
                  lambda t: (t / "val/n2/val_20.JPEG").rename(t / "val/n2/val_2.JPEG"),
                  lambda t: (t / "val/n0/val_00.JPEG").unlink(),
                  lambda t: [(t / half / "n2").rename(t / half / "n3") for half in ("train", "val")]):
        fault(tmp_path / "imagenet")
        seen.add(opened(tmp_path / "imagenet").digest)
    assert len(seen) == 6
    write_solution(flat_tree(tmp_path / "flat"))
    flat = opened(tmp_path / "flat").digest
    write_solution(tmp_path / "flat", rows=[(i, name if i > 1 else "n1") for i, name in ROWS])  # another label
    assert len({flat, opened(tmp_path / "flat").digest, *seen}) == 8


# ---------------------------------------------------------------------------------------------- a flat val/


def flat_tree(folder):
    """Five validation photographs of classes n2 n0 n1 n0 n2 without class folders."""
    make_tree(folder, val=())
    for i in range(5):
        write(folder / "val" / f"ILSVRC2012_val_{i + 1:08}.JPEG", content(20 + i))
    return folder


FLAT_LABELS = [2, 0, 1, 0, 2]


def devkit(truth=(7, 1, 1000, 1, 7), ids=(1, 7, 1000, 1001, 1002), wnids=("n0", "n2", "n1", "n8", "n9")):
    """An archive like that of the development kit."""
    meta = io.BytesIO()
    table = np.zeros((len(ids), 1), [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for row, number, wnid in zip(table[:, 0], ids, wnids):
        row["ILSVRC2012_ID"], row["WNID"], row["words"] = np.float64(number), wnid, "a thing"
    scipy.io.savemat(meta, {"synsets": table})
    contents = {"ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
                "meta.mat": meta.getvalue(), "readme.txt": b""}
    return tar_gz({f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in contents.items()})


@pytest.fixture
def published(monkeypatch):
    """A function that writes a development kit into a folder as if it were the published one."""
    def write_devkit(folder, content):
        monkeypatch.setattr(trees, "DEVKIT_MD5", md5(content))
        write(folder / trees.DEVKIT, content)

    return write_devkit


ROWS = ((4, "n0"), (1, "n2"), (2, "n0"), (3, "n1"), (5, "n2"))


def write_solution(folder, rows=ROWS, head="ImageId,PredictionString"):
    lines = [f"ILSVRC2012_val_{i:08},{name} 85 1 499 272 {name} 1 2 3 4 \n" for i, name in rows]
    (folder / trees.SOLUTION).write_text(f"{head}\n" + "".join(lines))


def test_flat_val_with_the_devkit(tmp_path, published):
    published(flat_tree(tmp_path), devkit())
    found = opened(tmp_path)
    assert [found.test.files.path(i).exists() for i in range(5)] == 5 * [True]
    assert collect(found.test_batches(3))[1].tolist() == found.test_labels.tolist() == FLAT_LABELS


def test_flat_val_with_kaggles_table(tmp_path):
    write_solution(flat_tree(tmp_path))
    assert opened(tmp_path).test_labels.tolist() == FLAT_LABELS
    write(tmp_path / "train" / "n1" / "another.jpg", content(0))
    write_solution(tmp_path, rows=[(i + 1, "n1") for i in range(5)])
    again = opened(tmp_path)  # nothing is remembered
    assert again.test_labels.tolist() == 5 * [1] and len(again.train_labels) == 13


def refused(match, **changes):
    """A row for a development kit, whole but for these changes."""
    return lambda f, published: published(f, devkit(**changes)), match


@pytest.mark.parametrize("fault, message", [
    (lambda f, _: None, f"in {trees.DEVKIT}, packed as image-net.org has it, or in Kaggle's {trees.SOLUTION} in "),
    (lambda f, _: (f / "ILSVRC2012_devkit_t12/data").mkdir(parents=True), "the folder ILSVRC2012_devkit_t12 is not "
     "read: only the archive's MD5 can be checked, and SciPy's reader is not safe on other files"),
    (lambda f, _: write_solution(f, rows=[(1, "n0"), (2, "n0"), (3, "n0"), (5, "n0"), (6, "n0")]),
     f"{trees.SOLUTION} has no label for {{val}}/ILSVRC2012_val_00000004.JPEG"),
    (lambda f, _: write_solution(f, rows=[(i, "n0") for i in range(1, 8)]), "labels for 7 images, but {val} holds 5"),
    (lambda f, _: write_solution(f, rows=[(i, "n5") for i in range(1, 6)]), "names the class n5, which is no folder"),
    (lambda f, _: write_solution(f, head="Id,Label"), "is not a whole file of labels: 'ImageId'"),
    (lambda f, _: write_solution(f, rows=[*ROWS, ROWS[1]]),
     f"{trees.SOLUTION}, line 7: there is a second row for 'ILSVRC2012_val_00000001'"),
    (lambda f, _: (f / trees.SOLUTION).write_text("ImageId,PredictionString\na,n0\n\"b\nc\"\n"),
     f"{trees.SOLUTION}, line 4: there is no class for 'b\\nc'"),
    (lambda f, _: (f / trees.SOLUTION).write_text("ImageId,PredictionString\na, \n"), "line 2: there is no class for"),
    (lambda f, _: (write_solution(f), os.truncate(f / trees.SOLUTION, 2**40)), "more than 33,554,432 bytes, too many"),
    (lambda f, _: write(f / trees.DEVKIT, devkit()), f"{trees.DEVKIT} is not what was published: its MD5 is "),
    refused("labels for 4 images, but {val} holds 5", truth=(7, 1, 1, 7)),
    refused("names the class n9, which is no folder of", wnids=("n0", "n2", "n9", "n8", "n2")),
    refused("is not a whole file of labels: 1003", truth=(7, 1, 1000, 1, 1003)),
])
def test_labels_that_do_not_fit_are_refused_in_a_sentence(tmp_path, published, fault, message):
    fault(flat_tree(tmp_path), published)
    with pytest.raises(DataError, match=re.escape(message.format(val=tmp_path / "val"))) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- crops


def reference(image, size):
    """Smallest side to size * 256 / 224, then the centre; (size, size, 3) from 0 to 255."""
    (width, height), side = image.size, round(size * 256 / 224)
    w, h = (int(side * width / height), side) if height <= width else (side, int(side * height / width))
    left, top = int(round((w - size) / 2.0)), int(round((h - size) / 2.0))
    small = image.convert("RGB").resize((w, h), Image.Resampling.BILINEAR)
    return np.asarray(small.crop((left, top, left + size, top + size)), np.float64)


SIDES = [(500, 375), (333, 500), (256, 256), (301, 227), (90, 70), (1101, 1403), (64, 700)]


def centre(path, size):
    with photographs.opened(path) as image:
        box = photographs.centre_box(*image.size, size)
        return np.asarray(photographs.cut(image, (size, size), box), np.float64)


@pytest.mark.parametrize("size", [224, 64])
@pytest.mark.parametrize("width, height", SIDES)
def test_test_images_are_resized_then_cropped(tmp_path, width, height, size):
    write(tmp_path / "a.jpg", jpeg(picture(1, width, height)))
    difference = centre(tmp_path / "a.jpg", size) - reference(Image.open(tmp_path / "a.jpg"), size)
    assert np.abs(difference).mean() < 0.6 and np.abs(difference.mean()) < 0.2 and np.abs(difference).max() < 12


def test_batches_are_normalised(tree, backend):
    dataset = opened(tree, size=24)
    batches = list(map(nn.to_host, next(dataset.test_batches(5))))
    assert batches[0].dtype == np.float32 and batches[0].shape == (5, 3, 24, 24) and batches[1].dtype == np.int64
    for i, image in enumerate(as_bytes(batches[0])):
        np.testing.assert_allclose(image, centre(dataset.test.files.path(i), 24), atol=1e-3)
    assert batches[1].tolist() == [0, 0, 1, 1, 2]


def test_batches_need_no_copy_to_be_convolved(tree):
    x, _ = next(opened(tree).test_batches(5))
    framed = host.bordered(x, 3, 3, 3, 3)
    assert np.shares_memory(framed, x) and not framed[:3].any() and not framed[:, :, -3:].any()


def torchvisions_box(rng, width, height):
    """RandomResizedCrop.get_params, in NumPy: left, top, width, height"""
    for _ in range(10):
        area = width * height * rng.uniform(0.2, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = int(round(np.sqrt(area * aspect))), int(round(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h
    w, h = width, height
    if width / height < 3 / 4:
        h = int(round(width / (3 / 4)))
    elif width / height > 4 / 3:
        w = int(round(height * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("width, height", [(500, 375), (300, 300), (200, 640), (900, 100), (3, 2)])
def test_random_boxes_are_those_of_torchvision(width, height):
    rng, count = np.random.default_rng(5), 1500
    boxes = np.array([photographs.random_box(rng.random(23).tolist(), width, height) for _ in range(count)])
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    assert boxes.min() >= 0 and right.max() <= width and bottom.max() <= height and min(w.min(), h.min()) > 0
    have = np.stack([left, top, w, h], 1)
    want = np.array([torchvisions_box(rng, width, height) for _ in range(count)])
    for statistic in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3],
                      lambda b: b[:, 0] + b[:, 2] / 2, lambda b: b[:, 1] + b[:, 3] / 2):
        assert scipy.stats.ks_2samp(statistic(have), statistic(want)).pvalue > 1e-3
    if min(width, height) >= 200:  # both directions are drawn on their own
        assert abs(np.corrcoef(left / (width - w + 1), top / (height - h + 1))[0, 1]) < 0.1


def test_training_images_are_flipped_crops(tree):
    """Each is the part of its photograph that random_box says, mirrored half of the time."""
    dataset, flips = opened(tree, size=20), []
    for epoch in range(4):
        x, labels = collect(dataset.train_batches(5, seed=3, epoch=epoch))
        order = nn.generator(3, "batches", epoch).permutation(12)
        assert labels.tolist() == dataset.train_labels[order].tolist()
        for image, i in zip(as_bytes(x), order):
            draws = nn.generator(3, "crop", epoch, int(i)).random(23).tolist()
            photograph = Image.open(dataset.train.files.path(i))
            box = photographs.random_box(draws, *photograph.size)
            want = np.asarray(photograph.resize((20, 20), Image.Resampling.BILINEAR, box), np.float64)
            errors = [np.abs(image - want).max(), np.abs(image - want[:, ::-1]).max()]
            assert min(errors) < 0.1 and max(errors) > 5
            flips.append(int(np.argmin(errors)))
    assert 12 < sum(flips) < 36


# ---------------------------------------------------------------------------------------------- order and threads


def test_batches_depend_on_seed_and_epoch_alone(tree):
    dataset = opened(tree)
    first, *others = (collect(dataset.train_batches(12, *key))[0] for key in ((0, 0), (0, 1), (1, 0)))
    for other in others:
        assert np.abs(np.sort(first.ravel()) - np.sort(other.ravel())).max() > 0.01  # not only in another order
    for threads in (1, 4):
        np.testing.assert_array_equal(collect(opened(tree, threads=threads).train_batches(12, 0, 0))[0], first)
    for start in range(3):
        np.testing.assert_array_equal(collect(dataset.train_batches(5, 0, 0, start))[0], first[5 * start :])
    assert list(dataset.train_batches(5, 0, 0, start=3)) == []


def test_ranks_together_see_the_batches_of_one(tree):
    dataset, make = opened(tree), lambda part: dataset.train_batches(5, 0, 1, part=part)
    whole, *shares = kept(make((0, 1))), *(kept(make((rank, 7))) for rank in range(7))
    for (x, labels), *parts in zip(whole, *shares, strict=True):
        np.testing.assert_array_equal(x, np.concatenate([p[0] for p in parts]))
        np.testing.assert_array_equal(labels, np.concatenate([p[1] for p in parts]))


def test_parts_take_the_classes_in_turn(tmp_path):
    dataset = opened(make_tree(tmp_path, train=(30, 20, 10), val=(1, 1, 1)))
    few = dataset.part(limit=12)
    assert np.bincount(few.train_labels).tolist() == [6, 4, 2] and len(set(few.train.index)) == 12
    assert few.train.index[:6].tolist() == [34, 26, 54, 9, 40, 27]  # as in runs on disk
    assert few.test.index.tolist() == [0, 1, 2]
    held = dataset.part(held_out=6)
    assert held.test.index.tolist() == [4, 5, 7, 30, 35, 55]
    assert np.bincount(held.test_labels).tolist() == [3, 2, 1] and len(held.train_labels) == 54
    assert sorted([*held.train.index, *held.test.index]) == list(range(60))
    assert collect(held.test_batches(4))[1].tolist() == held.test_labels.tolist()
    part = dataset.part(held_out=6, limit=5)
    x, labels = collect(part.train_batches(2, 0, 0))
    assert len(x) == 5 and sorted(labels) == sorted(part.train_labels)
    assert part.test.index.tolist() == held.test.index.tolist()
    with pytest.raises(DataError, match="photographs has 60 training images, so a limit of 61 cannot be met"):
        dataset.part(limit=61)
    with pytest.raises(DataError, match="photographs has 60 training images, so 60 cannot be held out"):
        dataset.part(held_out=60)


@pytest.mark.parametrize("end", ["exhausted", "closed", "forgotten", "never begun", "failed"])
def test_no_thread_is_left(tree, monkeypatch, end):
    batches = opened(tree, threads=3).train_batches(2, 0, 0)
    if end == "failed":
        monkeypatch.setattr(photographs.Files, "read", lambda *a, **k: 1 / 0)
    if end != "never begun":
        with pytest.raises(ZeroDivisionError) if end == "failed" else contextlib.nullcontext():
            next(batches)
            assert live_threads()
    if end == "exhausted":
        list(batches)
    elif end == "closed":
        batches.close()
    del batches
    assert not live_threads()


# ---------------------------------------------------------------------------------------------- odd files

COLOUR = (200, 90, 40)


def png16():
    """A grey PNG of 16 bits."""
    file = io.BytesIO()
    Image.fromarray(np.full((30, 20), 200 * 257, np.uint16)).save(file, "PNG")
    return file.getvalue()


def saved(mode, kind="PNG", **options):
    image = Image.new("RGB", (20, 30), COLOUR)
    if mode == "RGBA":
        image.putalpha(7)
    file = io.BytesIO()
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


GREY = (117, 117, 117)
ODD = {
    "CMYK": (saved("CMYK", "JPEG", quality=95), COLOUR),
    "grey JPEG": (saved("L", "JPEG"), GREY),
    "grey PNG": (saved("L"), GREY),
    "grey and alpha": (saved("LA"), GREY),
    "palette": (saved("P"), COLOUR),
    "transparent palette": (saved("P", transparency=bytes(range(256))), COLOUR),
    "RGBA": (saved("RGBA"), COLOUR),
    "one bit": (saved("1"), None),
    "16 bits": (png16(), (200, 200, 200)),
    "progressive": (saved("RGB", "JPEG", progressive=True, quality=95), COLOUR),
    "broken EXIF": (saved("RGB", "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), COLOUR),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("error", "ignore:::PIL.TiffImagePlugin")
def test_odd_files_are_converted(tree, kind, capsys):
    path, (content, colour) = tree / "val" / "n0" / "val_00.JPEG", ODD[kind]
    path.write_bytes(content)
    dataset = opened(tree)
    image = as_bytes(next(dataset.test_batches(5))[0])[0]
    assert not dataset.test.files.bad and not capsys.readouterr().err
    if colour is not None:
        assert np.abs(image - colour).max() < 4


def absurd_jpeg(width, height):
    """A small JPEG whose header claims another size."""
    content = bytearray(jpeg(picture(0, 32, 32)))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


BAD = {
    "absent": (None, "No such file or directory"),
    "empty": (b"", "it is empty"),
    "text": (b"<html>404 not found</html>", "it is neither a JPEG nor a PNG image"),
    "GIF": (saved("P", "GIF"), "it is neither a JPEG nor a PNG image"),
    "cut": (jpeg(picture(0, 200, 200))[:5000], "truncated"),
    "cut PNG": (saved("RGB")[:60], ""),
    "header alone": (content(0)[:300], ""),
    "absurd JPEG": (absurd_jpeg(65535, 65535), "Image size (4294836225 pixels) exceeds limit"),
    "large JPEG": (absurd_jpeg(9_500, 9_500), "its header claims 9,500 x 9,500 pixels"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_told_once_and_passed_over(tree, kind, capsys):
    (content, reason), dataset = BAD[kind], opened(tree, size=20, unreadable=0.2)
    for path in ("train/n0/train_03.JPEG", "val/n1/val_10.JPEG"):
        (tree / path).unlink() if content is None else (tree / path).write_bytes(content)
    for _ in range(2):
        x, labels = collect(dataset.train_batches(5, 0, 1))
        order = nn.generator(0, "batches", 1).permutation(12)
        assert len(x) == 12 and labels.tolist() == [1 if i == 3 else dataset.train_labels[i] for i in order]
        draws = nn.generator(0, "crop", 1, 4).random(23).tolist()  # of the file after it
        photograph = Image.open(dataset.train.files.path(4))
        want = photograph.resize((20, 20), Image.Resampling.BILINEAR, photographs.random_box(draws, *photograph.size))
        for place in np.flatnonzero((order == 3) | (order == 4)):
            image = as_bytes(x)[place]
            assert min(np.abs(image - want).max(), np.abs(image[:, ::-1] - want).max()) < 0.1
        x, labels = collect(dataset.test_batches(2))
        assert labels.tolist() == [0, 0, 1, 2] and len(x) == 4
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 2
    for line, path in zip(sorted(lines), ("train/n0/train_03.JPEG", "val/n1/val_10.JPEG")):
        assert line.startswith(f"{tree / path} is left out: ") and reason in line
    few = dataset.part(limit=6)  # they are known there too
    collect(few.train_batches(3, 0, 0))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("threads", [1, 4])
def test_too_many_bad_files_end_it(tree, threads, capsys):
    for name in ("n0/train_00", "n1/train_11", "n2/train_22"):
        (tree / "train" / f"{name}.JPEG").write_bytes(b"?")
    dataset = opened(tree, unreadable=0.25, threads=threads)  # 3 of 12
    assert len(collect(dataset.train_batches(5, 0, 0))[0]) == 12
    dataset = opened(tree, unreadable=0.24, threads=threads)
    with pytest.raises(DataError) as error:
        for epoch in range(2):
            collect(dataset.train_batches(5, 0, epoch))
    first = next(iter(dataset.train.files.bad))
    assert str(error.value) == (
        f"3 of the 12 images in {tree / 'train'} cannot be read, more than the 24.00% that may be left out; the first "
        f"was {dataset.train.files.path(first)}: it is neither a JPEG nor a PNG image")
    with pytest.raises(DataError, match="3 of the 12 images"):  # it does not help to ask again
        collect(dataset.train_batches(5, 0, 0))
    assert not live_threads()


def test_none_readable(tree, capsys):
    for path in tree.rglob("*.JPEG"):
        path.write_bytes(b"?")
    with pytest.raises(DataError, match="none of the 12 images used"):
        next(opened(tree, unreadable=1).train_batches(5, 0, 0))
    batches = list(opened(tree, unreadable=1).test_batches(5))
    assert [(x.shape, labels.shape) for x, labels in batches] == [((0, 3, 16, 16), (0,))]


# ---------------------------------------------------------------------------------------------- the resized copy


@pytest.fixture
def large(tmp_path):
    """Photographs to shrink to 32: wide, high, small, a PNG."""
    tree, png = tmp_path / "imagenet", io.BytesIO()
    picture(5, 40, 50).save(png, "PNG")
    contents = {"a/wide.JPEG": jpeg(picture(0, 100, 64)), "a/high.jpg": jpeg(picture(1, 48, 90)),
                "a/small.JPEG": jpeg(picture(2, 31, 60)), "b/x.png": png.getvalue()}
    for half, (name, body) in itertools.product(("train", "val"), contents.items()):
        write(tree / half / name, body)
    return tree


def sizes(folder):
    return {path.name: Image.open(path).size for path in sorted(folder.rglob("*")) if path.is_file()}


SMALLER = {"wide.JPEG": (50, 32), "high.jpg": (32, 60), "small.JPEG": (31, 60), "x.png": (32, 40)}


def test_resized_copy(large, tmp_path):
    target = tmp_path / "imagenet-256"
    assert photographs.prepare(large, target, side=32, threads=2) == {"resized": 6, "copied": 2, "kept": 0, "bad": 0}
    for half in ("train", "val"):
        assert sizes(target / half) == SMALLER
        assert (target / half / "a/small.JPEG").read_bytes() == (large / half / "a/small.JPEG").read_bytes()
        for name in ("a/wide.JPEG", "b/x.png"):
            copy, source = Image.open(target / half / name), Image.open(large / half / name)
            assert copy.format == ("PNG" if name.endswith("png") else "JPEG")
            want = source.convert("RGB").resize(copy.size, Image.Resampling.BILINEAR)
            assert np.abs(np.asarray(copy, float) - np.asarray(want, float)).mean() < 8  # half resolution of colour
            assert np.abs(np.asarray(copy.convert("L"), float) - np.asarray(want.convert("L"), float)).mean() < 2
    assert not [path for path in target.rglob("*.tmp")]
    dataset = datasets.load("imagenet-256", tmp_path, size=28, threads=1)
    assert dataset.classes == 2 and len(dataset.train_labels) == 4
    assert photographs.prepare(large, target, side=32) == {"resized": 0, "copied": 0, "kept": 8, "bad": 0}


def test_copy_that_was_cut_goes_on(large, tmp_path, monkeypatch):
    target, shrink, done = tmp_path / "imagenet-256", photographs.shrink, []

    def cut_short(source, path, side):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path)
        return shrink(source, path, side)

    monkeypatch.setattr(photographs, "shrink", cut_short)
    with pytest.raises(KeyboardInterrupt):
        photographs.prepare(large, target, side=32, threads=1)
    monkeypatch.undo()
    with pytest.raises(DataError, match="imagenet-256 is no finished copy of .*--prepare makes it or goes on with it"):
        datasets.load("imagenet-256", tmp_path)
    for path, damage in zip(done, (b"", done[1].read_bytes()[:-20] + bytes(20), None)):  # as after a power cut
        if damage is not None:
            path.write_bytes(damage)
    untouched = done[2].stat().st_mtime_ns
    assert photographs.prepare(large, target, side=32, threads=2)["kept"] == 1
    assert done[2].stat().st_mtime_ns == untouched and sizes(target / "train") == sizes(target / "val") == SMALLER
    datasets.load("imagenet-256", tmp_path)


@pytest.mark.parametrize("name", ["wide.JPEG", "small.JPEG"])
def test_files_of_a_copy_are_whole_or_not(large, tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "replace", lambda source, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        photographs.shrink(large / "val" / "a" / name, tmp_path / "copy.jpg", 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imagenet"]


def test_copy_leaves_bad_files_out(large, tmp_path, capsys):
    (large / "val" / "a" / "wide.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match="1 of the 4 images in .*val cannot be read, more than the 1.00%"):
        photographs.prepare(large, tmp_path / "copy", side=32)
    capsys.readouterr()
    counts = photographs.prepare(large, tmp_path / "copy", side=32, unreadable=0.25)
    assert counts["bad"] == 1 and counts["kept"] + counts["resized"] + counts["copied"] == 7
    assert capsys.readouterr().err.count("wide.JPEG is left out: it is empty") == 1
    assert len(photographs.of_tree("copy", tmp_path / "copy").test_labels) == 3


def test_copy_of_a_flat_tree_has_class_folders(tmp_path):
    write_solution(flat_tree(tmp_path / "flat"))
    photographs.prepare(tmp_path / "flat", tmp_path / "copy", side=32)
    dataset = photographs.of_tree("copy", tmp_path / "copy")
    assert dataset.test_labels.tolist() == sorted(FLAT_LABELS)
    assert dataset.test.files.path(4).name == "ILSVRC2012_val_00000005.JPEG"


def test_copies_that_cannot_be_made(large, tmp_path):
    with pytest.raises(DataError, match="lies in .*; the copy should have a folder of its own"):
        photographs.prepare(large, large / "small")
    photographs.prepare(large, tmp_path / "copy", side=32)
    with pytest.raises(DataError, match="holds a copy of smallest side 32; one of 40 needs another folder"):
        photographs.prepare(large, tmp_path / "copy", side=40)
    (tmp_path / "copy" / photographs.MARKER).write_text("{")
    with pytest.raises(DataError, match="prepared.json cannot be read .*; remove it and prepare again"):
        photographs.marked(tmp_path / "copy")


# ---------------------------------------------------------------------------------------------- load, drawn photographs


def test_load_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError, match="imagenet/train is not there: ImageNet .* account"):
        datasets.load("imagenet", tmp_path)
    with pytest.raises(DataError, match="imagenet-256 is no finished copy.*--prepare"):
        datasets.load("imagenet-256", tmp_path)
    make_tree(tmp_path / "imagenet")
    found = datasets.load("imagenet", tmp_path, size=32, threads=1, unreadable=0.5)
    assert found.name == "imagenet" and found.shape == (3, 32, 32) and found.train.files.unreadable == 0.5
    make_tree(tmp_path / "imagenet-256")  # not by prepare
    with pytest.raises(DataError, match="imagenet-256 is no finished copy"):
        datasets.load("imagenet-256", tmp_path)


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_drawn_photographs(tmp_path, monkeypatch):
    tree = drawn.photographs(tmp_path / "a", classes=3, images=5, test=2, threads=2)
    assert tree == tmp_path / "a" / "synthetic-photos-3x5+2-seed0-v1"  # as it was always called
    found = everything(tree)
    assert len(set(found.values())) == 21 and found == everything(drawn.photographs(tmp_path / "b", 3, 5, 2, threads=1))
    sides = [Image.open(io.BytesIO(body)).size for body in found.values()]
    assert all(64 <= side <= 128 for pair in sides for side in pair) and any(w != h for w, h in sides)
    load = functools.partial(datasets.load, "photographs", tmp_path, classes=2, images=2, size=32, unreadable=0.1)
    dataset = load()
    assert dataset.name == "photographs" and dataset.classes == 2 and len(dataset.test_labels) == 100
    assert collect(dataset.train_batches(3, 0, 0))[0].shape == (4, 3, 32, 32)
    monkeypatch.setattr(drawn, "draw_photograph", lambda *a: pytest.fail("drawn twice"))
    assert load().train_labels.tolist() == dataset.train_labels.tolist()


def test_drawn_photographs_are_whole_or_not(tmp_path, monkeypatch):
    draw, drawings = drawn.draw_photograph, []

    def cut_short(*arguments):
        drawings.append(0)
        return draw(*arguments) if len(drawings) < 5 else 1 / 0

    (tmp_path / ".synthetic-photos-3x5+2-seed0-v1.tmp" / "train").mkdir(parents=True)  # of one that was killed
    monkeypatch.setattr(drawn, "draw_photograph", cut_short)
    with pytest.raises(ZeroDivisionError):
        drawn.photographs(tmp_path, 3, 5, 2, threads=2)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"] and not live_threads()


def test_of_two_that_want_photographs_one_draws_them(tmp_path, monkeypatch):
    drawings, draw, looked = [], drawn.draw_tree, threading.Barrier(2, timeout=10)
    monkeypatch.setattr(drawn, "alone", lambda path, _: (looked.wait(), files.locked(path))[1])  # neither has found it
    monkeypatch.setattr(drawn, "draw_tree", lambda *a: drawings.append(0) or draw(*a))
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda i: drawn.photographs(tmp_path, 2, 2, 1, threads=1), range(2))
    assert one == other and drawings == [0]


def test_results_of_threads_come_in_order_until_one_fails():
    done = []
    results = in_threads(lambda i: done.append(i) or 1 / (50 - i), range(1000), 2, "")
    with pytest.raises(ZeroDivisionError):
        for i, result in enumerate(results):
            assert result == 1 / (50 - i)
    assert i == 49 and max(done) < 60
