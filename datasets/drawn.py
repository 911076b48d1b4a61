"""Data sets that are drawn: digits, and photographs of shapes. They need no network; the same for a seed everywhere.

The names of what is kept on disk end in a version (v1): raise it when the drawing changes.
"""

import collections
import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import nn
from datasets.arrays import normalized
from datasets.dataset import in_threads
from datasets.download import alone
from lab.files import FileFault, load_arrays, save_arrays, write_whole

# ---------------------------------------------------------------------------------------------- digits


def digits(folder, side=28, channels=1, train=20_000, test=4_000):
    """Digits drawn by Pillow and distorted at random; drawn once, then read from folder.

    Hard enough that the paper's base network (width 5) stays near 90 % and that wider ones visibly gain.
    """
    path = Path(folder, f"synthetic-{side}x{side}x{channels}-{train}-{test}-seed0-v1.npz")
    shape = train + test, channels, side, side
    found = kept_digits(path, shape)
    if found is None:
        with alone(path, "draws"):
            found = kept_digits(path, shape)  # another process may have been faster
            if found is None:
                found = draw_digits(train + test, side, channels)
                write_whole(path, save_arrays(dict(zip(("images", "labels"), found))))
    images, labels = found
    x = images[:train] / np.float32(255)
    train, test = (images[:train], labels[:train]), (images[train:], labels[train:])
    return normalized("synthetic", 10, train, test, x.mean(axis=(0, 2, 3)), x.std(axis=(0, 2, 3)))


def kept_digits(path, shape):
    """(images, labels) in this file, None if it is absent, damaged or holds anything but images of this shape."""
    try:
        if path.stat().st_size > math.prod(shape) + 8 * shape[0] + 2**16:  # more than images and labels take
            return None
        arrays = load_arrays(path.read_bytes())
        images, labels = arrays["images"], arrays["labels"]
    except (OSError, FileFault, KeyError):
        return None
    have = [(a.shape, a.dtype) for a in (images, labels)]
    valid = have == [(shape, np.uint8), (shape[:1], np.int64)] and np.isin(labels, range(10)).all()
    return (images, labels) if valid else None


def draw_digits(count, side, channels):
    """Images (count, channels, side, side) of uint8 and their labels: digits in Pillow's own scalable font with
    random stroke, rotation, shear, scale, shift, colours and noise.
    """
    rng = nn.generator(0, "synthetic", side, channels)
    labels = rng.integers(0, 10, count)
    strokes, canvas = 3, 2 * side  # glyphs are drawn once at twice the size, then mapped into each image
    font = ImageFont.load_default(size=1.5 * side)
    glyphs = {}
    for digit in range(10):
        for stroke in range(strokes):
            glyph = Image.new("L", (canvas, canvas))
            ImageDraw.Draw(glyph).text((canvas / 2, canvas / 2), str(digit), fill=255, font=font, anchor="mm",
                                       stroke_width=stroke * side / 28)
            glyphs[digit, stroke] = glyph
    stroke = rng.integers(0, strokes, count)
    angle = np.deg2rad(rng.uniform(-15, 15, count))
    shear, squeeze = rng.uniform(-0.3, 0.3, count), rng.uniform(0.85, 1.15, count)
    scale = rng.uniform(0.8, 1.1, count)
    shift = rng.uniform(-0.055, 0.055, (count, 2)) * side
    # Pillow maps each output pixel to a glyph position: glyph = centre + M (pixel - centre - shift), M = inverse map.
    cos, sin = np.cos(angle) * canvas / side / scale, np.sin(angle) * canvas / side / scale
    a, b, c, d = cos * squeeze, (cos * shear + sin) * squeeze, -sin / squeeze, (cos - sin * shear) / squeeze
    x, y = (side / 2 + shift).T
    coefficients = np.stack([a, b, canvas / 2 - a * x - b * y, c, d, canvas / 2 - c * x - d * y], axis=1).tolist()
    ink = np.empty((count, side, side), np.uint8)
    for i in tqdm(range(count), desc="drawing digits", disable=None, leave=False):
        glyph = glyphs[int(labels[i]), int(stroke[i])]
        ink[i] = glyph.transform((side, side), Image.Transform.AFFINE, coefficients[i], Image.Resampling.BILINEAR)
    images = np.empty((count, channels, side, side), np.uint8)
    for first in range(0, count, 1000):  # in blocks: the float copies stay small
        block = ink[first : first + 1000, None] / np.float32(255)
        n = len(block)
        paper = rng.uniform(0, 0.2 if channels == 1 else 1, (n, channels, 1, 1)).astype(np.float32)
        pen = rng.uniform(0.6, 1, (n, channels, 1, 1)).astype(np.float32)
        if channels > 1:  # any two colours that differ clearly
            pen = (paper + rng.uniform(0.35, 0.65, (n, 1, 1, 1)).astype(np.float32)) % 1
        noise = rng.normal(0, 0.12, (n, channels, side, side)).astype(np.float32)
        images[first : first + n] = np.clip((paper + (pen - paper) * block + noise) * 255, 0, 255)
    return images, labels


# ---------------------------------------------------------------------------------------------- photographs


def photographs(folder, classes=10, images=200, test=50, threads=0):
    """The path of a tree of drawn photographs, `images` to train on and `test` to test on of each class, 64 to 128
    pixels a side; drawn once.

    A class is an outline, a texture and the direction between the texture's colours; the colours themselves, place,
    size, light and what lies behind and beside are as they come, so that no pixel tells the classes apart. A ResNet of
    width 16 at 48 pixels reaches 71 % in 8 epochs, a linear classifier 13 %.
    """
    tree = Path(folder, f"synthetic-photos-{classes}x{images}+{test}-seed0-v1")
    if not tree.is_dir():
        with alone(tree, "draws"):
            if not tree.is_dir():  # else another process was faster
                temporary = tree.with_name(f".{tree.name}.tmp")
                shutil.rmtree(temporary, ignore_errors=True)
                try:
                    draw_tree(temporary, classes, images, test, threads)
                    temporary.rename(tree)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    return tree


def draw_tree(tree, classes, images, test, threads):
    """Fill the folder `tree`, on to the disk."""
    kinds = [Kind(nn.generator(0, "kind", c)) for c in range(classes)]
    todo = [(half, c, i) for c in range(classes) for half, n in (("train", images), ("val", test)) for i in range(n)]
    for half, c in {(half, c) for half, c, _ in todo}:
        (tree / half / f"class_{c:04}").mkdir(parents=True)

    def work(place):
        half, c, i = place
        rng = nn.generator(0, half, c, i)
        image = Image.fromarray(draw_photograph(kinds[c], rng))
        image.save(tree / half / f"class_{c:04}" / f"{i:05}.jpg", quality=int(rng.integers(75, 96)))

    collections.deque(in_threads(work, todo, threads, "drawing photographs"), maxlen=0)
    to_disk()


def to_disk():
    """Flush everything that was written, where the system can: each file by itself would take longer."""
    if hasattr(os, "sync"):
        os.sync()


class Kind:
    """What the objects of a class have in common; every property is random."""

    def __init__(self, rng):
        self.lobes, self.depth = rng.integers(2, 7), rng.uniform(0.1, 0.4)  # of the outline
        self.waves, self.angle, self.checked = rng.uniform(1.5, 5), rng.uniform(0, np.pi), rng.random() < 0.5  # texture
        axis = rng.normal(0, 1, 3)
        self.contrast = 0.3 * axis / np.linalg.norm(axis)  # between the colours of the texture


def draw_photograph(kind, rng):
    """A photograph (H, W, 3) of uint8 of an object of this kind, and of one that is of none."""
    H, W = rng.integers(64, 129, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (*rng.integers(2, 9, 2), 3), np.uint8))
    x = np.asarray(coarse.resize((W, H), Image.Resampling.BICUBIC), np.float32) / 255
    rows, columns = np.ogrid[:H, :W]
    for k in (Kind(rng), kind):  # the other one may be partly covered
        top, left = rng.uniform(0.25, 0.75, 2) * (H, W)
        radius, turn, phase = rng.uniform(0.25, 0.5) * min(H, W), rng.normal(0, 0.3), rng.uniform(0, 2 * np.pi, 2)
        v, u = (rows - top).astype(np.float32) / radius, (columns - left).astype(np.float32) / radius
        outline = 1 + k.depth * np.cos(k.lobes * (np.arctan2(v, u) - turn))
        inside = np.clip((outline - np.hypot(u, v)) * radius / 2, 0, 1)
        cos, sin = np.cos(k.angle + turn) * k.waves * np.pi, np.sin(k.angle + turn) * k.waves * np.pi
        texture = np.sin(cos * u + sin * v + phase[0])
        if k.checked:
            texture *= np.sin(cos * v - sin * u + phase[1])
        colour = rng.uniform(0.25, 0.75, 3).astype(np.float32) + texture[..., None] * k.contrast.astype(np.float32)
        x += inside[..., None] * (colour - x)  # (H, W) -> (H, W, 1)
    light = rng.uniform(0.5, 1.1) + rng.uniform(-0.3, 0.3) * rows / H + rng.uniform(-0.3, 0.3) * columns / W
    x *= light[..., None]
    x += rng.normal(0, 0.06) + 0.05 * rng.standard_normal(x.shape, np.float32)
    return np.clip(255 * x, 0, 255).astype(np.uint8)
