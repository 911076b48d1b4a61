"""Runs small enough to be made by the hundred, and what they leave behind; for the tests of lab."""

import csv
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import lab
import nn
from datasets.dataset import Arrays, Dataset
from lab import files, setting


def images(train, test, side, channels=1, classes=10):
    """A data set of noise, made in a moment."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (train + test, channels, side, side), np.uint8)
    labels = rng.integers(0, classes, train + test)
    halves = (Arrays(pixels[part], labels[part]).standardized(np.full((channels, 1, 1), 0.5),
                                                              np.full((channels, 1, 1), 0.3))
              for part in (slice(train), slice(train, None)))
    return Dataset("synthetic", classes, *halves)


@dataclass(frozen=True)
class Settings(lab.Settings):
    epochs: int = setting(3, "")
    batch: int = setting(10, "")
    width: int = setting(12, "")


class Estimate(nn.Module):
    """Subtracts a running mean of what passes, so that a wrong one shows in the accuracy."""

    def __init__(self):
        self.running = np.zeros(1, np.float32)

    def forward(self, x):
        if self.training:
            self.running[...] = 0.9 * self.running + 0.1 * x.data.mean()
        return x - nn.Tensor(self.running.copy())


def load(s):
    return images(35, 30, side=6).augmented(1, True)


def build(s):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, s.width), Estimate(), nn.ReLU(), nn.Linear(s.width, 10))
    nn.sparsify(model, 300, s.seed)
    return model


def train(run, build=build, step_seen=lambda optimizer, x, labels: None):
    """Four steps an epoch; masks, running estimates, momentum, crops and flips: all that a continuation has to have."""
    s = run.settings
    dataset, model = load(s), build(s)
    optimizer = nn.SGD(model.parameters(), s.lr, momentum=0.9, weight_decay=1e-3)
    for epoch in run.epochs(model, optimizer, dataset):
        optimizer.lr = s.lr * 0.9**epoch
        model.train()
        for x, labels in run.training_batches():
            step_seen(optimizer, x, labels)
            loss, sums = nn.classify(model(nn.Tensor(x)), labels)
            loss.backward()
            run.average(model)
            optimizer.step()
            optimizer.zero_grad()
            run.count(sums)
        model.eval()
        for x, labels in run.test_batches(10):
            with nn.no_grad():
                run.count(nn.classify(model(nn.Tensor(x)), labels)[1])


TINY = lab.Experiment("tiny", "tiny.py", __doc__, Settings, load, train,
                      {"many": lab.Figure("", lambda s: [replace(s, seed=i) for i in range(12)], None)}, {}, "", "")


def run_of(out, experiment=TINY, **settings):
    return lab.Run(experiment, Settings(out=str(out), **settings))


def finished(run):
    with run.lock() as mine:
        assert mine
        run.perform(bar=False)
    return run


def flags(out, **settings):
    """Command line words; out: the folder of runs."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in (dict(out=out) | settings).items()]


def remains(out):
    """All that runs leave in a folder as {path: content}, byte by byte, times and locks aside."""
    found = {}
    for path in sorted(p for p in Path(out).rglob("*") if p.is_file() and ".lock" not in p.name):
        content = path.read_bytes()
        if path.name == "checkpoint.npz":
            arrays = files.load_arrays(content)
            arrays["progress.history"] = arrays["progress.history"][:, :-1]  # the last column is seconds
            content = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}
        elif path.name == "log.csv":
            content = [row[:-1] for row in csv.reader(content.decode().splitlines())]
            assert [row[0] for row in content[1:]] == [str(i + 1) for i in range(len(content) - 1)], content
        elif path.name == "result.json":
            content = re.sub(rb'"seconds": [^,]*,', b"", content, count=1)
        found[str(path.relative_to(out))] = content
    return found


def assert_same(out, uncut):
    have = remains(out)
    assert have.keys() == uncut.keys(), (sorted(have), sorted(uncut))
    wrong = [name for name in have if have[name] != uncut[name]]
    assert not wrong, wrong


def wait_for(condition, process, seconds=60):
    """Until condition() holds, while this process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
