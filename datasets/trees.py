"""Trees of photographs: which files there are, and what they show.

    classes, halves = index("data/imagenet")      # train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG
"""

import csv
import io
import os
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.arrays import reading
from datasets.dataset import DataError
from datasets.download import check_published

SUFFIXES = (".jpeg", ".jpg", ".png")


def index(folder):
    """(class names, {"train": (names, labels), "val": (names, labels)}) of a tree of photographs.

    folder/train/<class>/ and folder/val/<class>/ hold .jpeg, .jpg and .png files; classes are numbered in the order
    of their names. The photographs to test on may lie in val/ itself, as the official archive has them; then
    `flat_labels` says what they show. Names that begin with a dot are passed over. names: (N,) of bytes, paths from
    train or val on, sorted by class, then name (a million Python objects would keep its garbage collector busy);
    labels: (N,) of int64.
    """
    folder, folders = Path(folder), {}
    for half in ("train", "val"):
        if not (folder / half).is_dir():
            raise DataError(f"{folder / half} is not there; it should hold {half}/<class>/<image>.JPEG")
        folders[half] = names_in(folder / half, lambda entry: entry.is_dir())
    classes, val = folders["train"], folders["val"]
    if not classes:
        raise DataError(f"{folder / 'train'} has no class folders; it should hold train/<class>/<image>.JPEG")
    loose = names_in(folder / "val", is_image)
    if val and loose:
        raise DataError(f"{folder / 'val'} has both class folders and {len(loose):,} images beside them; "
                        "it should hold one or the other")
    if val and val != classes:
        odd = sorted(set(classes) ^ set(val))
        raise DataError(f"{folder / 'train'} and {folder / 'val'} should have the same classes, but {odd[0]} is "
                        f"only in {'train' if odd[0] in classes else 'val'} ({len(odd):,} such classes)")
    if not val and not loose:
        raise DataError(f"{folder / 'val'} has neither class folders nor images; it should hold "
                        "val/<class>/<image>.JPEG, or the 50,000 images beside their labels' file")
    with tqdm(total=len(classes) + len(val), desc=f"reading {folder}", disable=None, leave=False) as bar:
        train = scan(folder / "train", classes, bar)
        test = (encoded(loose), flat_labels(folder, loose, classes)) if loose else scan(folder / "val", classes, bar)
    return classes, {"train": train, "val": test}


def scan(folder, classes, bar):
    """(names, labels) of folder/<class>/<image>"""
    names = []
    for name in classes:
        images = names_in(folder / name, is_image)
        if not images:
            raise DataError(f"{folder / name} holds no images ({', '.join(SUFFIXES)}); each class should have some")
        names.append(encoded(f"{name}/{image}" for image in images))
        bar.update()
    return np.concatenate(names), np.repeat(np.arange(len(classes)), list(map(len, names)))


def names_in(folder, wanted):
    """The sorted names of those entries of a folder that are wanted and do not begin with a dot."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and wanted(entry))


def is_image(entry):
    return entry.name.lower().endswith(SUFFIXES) and not entry.is_dir()


def encoded(names):
    return np.array([os.fsencode(name) for name in names])


# ---------------------------------------------------------------------------------------------- labels of a flat val/

DEVKIT, DEVKIT_MD5 = "ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"
UNPACKED = DEVKIT.removesuffix(".tar.gz")
SOLUTION, LARGEST_SOLUTION = "LOC_val_solution.csv", 2**25  # bytes, of which it has 6 million


def flat_labels(folder, images, classes):
    """(N,) of int64: the classes of the images in folder/val, by their sorted names."""
    path = next((folder / name for name in (DEVKIT, SOLUTION) if (folder / name).exists()), None)
    if path is None:
        hint = (f"; the folder {UNPACKED} is not read: only the archive's MD5 can be checked, and SciPy's reader is "
                "not safe on other files") if (folder / UNPACKED).is_dir() else ""
        raise DataError(f"{folder / 'val'} holds images without class folders, whose labels should be in {DEVKIT}, "
                        f"packed as image-net.org has it, or in Kaggle's {SOLUTION} in {folder}{hint}")
    with reading(path, "file of labels"):
        rows = devkit(path) if path.name == DEVKIT else solution(path)
    if len(rows) != len(images):
        raise DataError(f"{path} has labels for {len(rows):,} images, but {folder / 'val'} holds {len(images):,}")
    number, labels = {name: label for label, name in enumerate(classes)}, []
    for image in images:
        name = rows.get(Path(image).stem)
        if name is None:
            raise DataError(f"{path} has no label for {folder / 'val' / image}")
        if name not in number:
            raise DataError(f"{path} names the class {name}, which is no folder of {folder / 'train'}")
        labels.append(number[name])
    return np.array(labels, np.int64)


def devkit(path):
    """{name of an image: class} of the archive of the development kit, which has to be the published one: SciPy
    believes what a .mat file claims. Line i of the truth is the number of image i's synset.
    """
    import scipy.io

    check_published(path, DEVKIT_MD5)
    with tarfile.open(path) as tar:
        truth, meta = (tar.extractfile(f"{UNPACKED}/data/{name}").read()
                       for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
    table = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    return {f"ILSVRC2012_val_{i:08}": synsets[int(line)] for i, line in enumerate(truth.split(), 1)}


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
