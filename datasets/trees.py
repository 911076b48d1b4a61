"""Trees of photographs: which files there are, and what they show.

    classes, halves, flat = index("data/imagenet")      # train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.arrays import reading
from datasets.dataset import DataError
from datasets.download import check_published, find
from lab.files import FileFault, read_arrays, save_arrays, write_whole

SUFFIXES = (".jpeg", ".jpg", ".png")
CACHE, VERSION, LARGEST = "index.npz", 2, 2**28  # bytes of a cache: that of ImageNet takes 46 million


def index(folder):
    """(class names, {"train": (names, labels), "val": (names, labels)}, flat) of a tree of photographs.

    folder/train/<class>/ and folder/val/<class>/ hold .jpeg, .jpg and .png files; classes are numbered in the order
    of their names. Names that begin with a dot are passed over. flat: the validation photographs lie in val/ itself,
    as the official archive has them, and `flat_labels` says what they show. names: (N,) of bytes, sorted by class,
    then name; labels: (N,) of int64.
    The index is kept in folder/index.npz until a folder or a file of labels changes.
    """
    folder = Path(folder)
    classes, signature, flat = survey(folder)
    halves = kept(folder / CACHE, signature, len(classes))
    if halves is None:
        with tqdm(total=len(classes) * (1 if flat else 2), desc=f"reading {folder}", disable=None, leave=False) as bar:
            halves = {"train": scan(folder / "train", classes, bar)}
            if flat:
                images = image_names(folder / "val")
                halves["val"] = encoded(images), flat_labels(folder, images, classes)
            else:
                halves["val"] = scan(folder / "val", classes, bar)
        arrays = {f"{half}_{what}": array for half, pair in halves.items() for what, array in zip(CACHED, pair)}
        with contextlib.suppress(OSError):  # a folder that cannot be written to
            write_whole(folder / CACHE, save_arrays({"signature": signature, **arrays}))
    return classes, {half: (names, labels.astype(np.int64)) for half, (names, labels) in halves.items()}, flat


def survey(folder):
    """(class names, what changes when the tree does, whether val/ is flat); the two halves must fit together."""
    halves = {}
    for half in ("train", "val"):
        if not (folder / half).is_dir():
            raise DataError(f"{folder / half} is not there; it should hold {half}/<class>/<image>.JPEG")
        with os.scandir(folder / half) as entries:
            halves[half] = sorted((entry.name, entry.stat().st_mtime_ns) for entry in entries
                                  if entry.is_dir() and not entry.name.startswith("."))
    train, val = ([name for name, _ in halves[half]] for half in ("train", "val"))
    if not train:
        raise DataError(f"{folder / 'train'} has no class folders; it should hold train/<class>/<image>.JPEG")
    loose = image_names(folder / "val")
    if val and loose:
        raise DataError(f"{folder / 'val'} has both class folders and {len(loose):,} images beside them; "
                        "it should hold one or the other")
    if val and val != train:
        odd = sorted(set(train) ^ set(val))
        raise DataError(f"{folder / 'train'} and {folder / 'val'} should have the same classes, but {odd[0]} is "
                        f"only in {'train' if odd[0] in train else 'val'} ({len(odd):,} such classes)")
    if not val and not loose:
        raise DataError(f"{folder / 'val'} has neither class folders nor images; it should hold "
                        "val/<class>/<image>.JPEG, or the 50,000 images beside their labels' file")
    stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size)
             for path in (folder / "train", folder / "val", *([label_file(folder)] if loose else ()))]
    state = json.dumps([VERSION, halves, [(name.removeprefix(str(folder)), *rest) for name, *rest in stats]])
    return train, hashlib.sha256(state.encode(errors="surrogateescape")).hexdigest(), not val


def image_names(folder):
    """The sorted names of the images in a folder."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)
                      and not entry.name.startswith(".") and not entry.is_dir())


def encoded(names):
    """Names as one array of bytes: a million of them as Python objects would take minutes of the collector's time."""
    return np.array([os.fsencode(name) for name in names])


def scan(folder, classes, bar):
    """(names, labels) of folder/<class>/<image>"""
    names, counts = [], []
    for name in classes:
        images = image_names(folder / name)
        if not images:
            raise DataError(f"{folder / name} holds no images ({', '.join(SUFFIXES)}); each class should have some")
        names.append(encoded(images))
        counts.append(len(images))
        bar.update()
    return np.concatenate(names), np.repeat(np.arange(len(classes), dtype=np.int32), counts)


CACHED = "names", "labels"  # of each half


def kept(path, signature, classes):
    """{half: (names, labels)} of a cached index, or None if it is absent, of another state of the tree, or damaged."""
    try:
        arrays = read_arrays(path, LARGEST)
        halves = {half: tuple(arrays[f"{half}_{what}"] for what in CACHED) for half in ("train", "val")}
        valid = np.array_equal(arrays["signature"], signature)
    except (OSError, FileFault, KeyError):
        return None
    return halves if valid and all(plausible(*pair, classes) for pair in halves.values()) else None


def plausible(names, labels, classes):
    """Whether these arrays of a cached index can be used: as many labels as names, nothing that leaves the folder."""
    if names.dtype.kind != "S" or names.ndim != 1 or not names.size or labels.dtype != np.int32:
        return False
    letters = names.view(np.uint8).reshape(len(names), -1)  # (N, bytes)
    return (labels.shape == names.shape and labels.min() >= 0 and labels.max() < classes
            and not np.isin(letters, (ord("/"), ord("\\"))).any() and not np.isin(letters[:, 0], (0, ord("."))).any())


# ---------------------------------------------------------------------------------------------- labels of a flat val/

DEVKIT, DEVKIT_MD5 = "ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"
SOLUTION, LARGEST_SOLUTION = "LOC_val_solution.csv", 2**25  # bytes, of which it has 6 million


def label_file(folder):
    """The path of the file that says what the photographs in val/ show."""
    path = find(folder, ("",), (DEVKIT, SOLUTION))
    if path is None:
        raise DataError(f"{folder / 'val'} holds images without class folders, whose labels should be in {DEVKIT}, as "
                        f"image-net.org has it, or in Kaggle's {SOLUTION} in {folder}")
    return path


def flat_labels(folder, images, classes):
    """(N,) of int32: the classes of the images in val/, by their sorted names."""
    path = label_file(folder)
    with reading(path, "file of labels"):
        if path.name == DEVKIT:
            names = devkit(path)
            count = len(names)
        else:
            rows = solution(path)
            absent = [name for name in images if Path(name).stem not in rows]
            if absent:
                raise DataError(f"{path} has no row for {folder / 'val' / absent[0]} ({len(absent):,} such images)")
            names, count = [rows[Path(name).stem] for name in images], len(rows)
    if count != len(images):
        raise DataError(f"{path} has labels for {count:,} images, but {folder / 'val'} holds {len(images):,}")
    number = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in names if name not in number]
    if unknown:
        raise DataError(f"{path} names the class {unknown[0]}, which is no folder of {folder / 'train'}")
    return np.array([number[name] for name in names], np.int32)


def devkit(path):
    """The class of each photograph, in order, of the archive of the development kit, which has to be the published
    one: SciPy believes what a .mat file claims. A line of the truth is the number of a synset.
    """
    import scipy.io

    check_published(path, DEVKIT_MD5)
    with tarfile.open(path) as tar:
        truth, meta = (tar.extractfile(f"ILSVRC2012_devkit_t12/data/{name}").read()
                       for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
    table = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    return [synsets[int(line)] for line in truth.split()]


def solution(path):
    """{name of an image: class} of Kaggle's table, whose rows are "<name>,<class> <box> ..."."""
    if path.stat().st_size > LARGEST_SOLUTION:
        raise DataError(f"{path} has more than {LARGEST_SOLUTION:,} bytes, too many for labels")
    rows = {}
    with open(path, newline="") as file:
        for row in (table := csv.DictReader(file)):
            name, answer = row["ImageId"], (row["PredictionString"] or "").split()
            if not answer or name in rows:
                raise DataError(f"{path}, line {table.line_num}: there is "
                                f"{'a second row' if answer else 'no class'} for {name!r}")
            rows[name] = answer[0]
    return rows
