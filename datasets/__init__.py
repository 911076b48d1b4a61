"""What is learned from: MNIST, CIFAR, SVHN, drawn digits; ImageNet and drawn photographs.

    dataset = datasets.load("cifar10", "data").part(held_out=5000).augmented()
    for x, labels in dataset.train_batches(128, seed=0, epoch=0): ...
    dataset = datasets.load("imagenet-256", "data", size=224, threads=8)

What is absent is downloaded into the folder, or drawn, by one process while others wait and say so. Every fault of a
file is a DataError of one sentence. dataset.digest tells what was learned from, dataset.unpublished which files of it
are not those that were published.
"""

import functools
import os

from datasets import arrays, drawn, photographs
from datasets.dataset import Arrays, DataError, Dataset, digest_of

__all__ = ["Arrays", "DataError", "Dataset", "NAMES", "digest_of", "load"]

LOADERS = {
    "mnist": arrays.mnist, **{name: functools.partial(arrays.cifar, name) for name in arrays.CIFAR},
    "svhn": arrays.svhn, "synthetic": drawn.digits,
    "imagenet": photographs.imagenet, "imagenet-256": photographs.imagenet_256, "photographs": photographs.drawn,
}
NAMES = tuple(LOADERS)


def load(name, folder, **options):
    """The Dataset of this name, one of NAMES, whose files lie in `folder`, which may begin with ~.

    options: side and channels of the synthetic digits; of photographs size (of the images that a network sees), threads
    (decoders, 0 for as many as this process has cores) and unreadable (the share of either half's files that may be);
    classes and images (to train on, of each class) of the drawn photographs.
    """
    if name not in NAMES:
        raise DataError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")
    if not isinstance(folder, (str, os.PathLike)):
        raise DataError(f"the folder of a data set is a path, not {folder!r}")
    return LOADERS[name](os.path.expanduser(folder), **options)
