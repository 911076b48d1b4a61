"""Figures: drawn from the runs that are on disk or recorded, with their tables "paper / ours / command".

    figure = Figure("accuracy over width", runs, draw, paper)      # runs(settings), draw(points, metric): see below
    plot(experiment, "fig6", settings, "best", record=False)
"""

import itertools
import json
import math
import sys
import typing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from files import FileFault, as_json, read_json, write_whole
from train import ROOT, Run, Settings, UsageError, check_result, percent

RECORDS = ROOT / "results"


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, or one of our own.

    runs(settings) -> the Settings of every run it shows; draw(points, metric) -> (matplotlib Figure, [lines that
    sum it up]); paper(settings) -> what the paper says of these settings (None: nothing); compute(settings) -> what
    it shows beside runs, as a dict that draw gets as a third argument: kept in OUT and in the record. trained: whether
    it shows what comes out of the runs; otherwise it only needs their settings and can be drawn at once. quantity: what
    its table lists. notes(settings) -> lines that belong to the list of its runs and to its table.
    """

    help: str
    runs: typing.Callable
    draw: typing.Callable
    paper: typing.Callable = lambda settings: None
    compute: typing.Callable | None = None
    trained: bool = True
    quantity: str = "test_acc"
    notes: typing.Callable = lambda settings: []


@dataclass(frozen=True)
class Point:
    """Runs that differ only in their seed. settings: those of the first; results: of the runs that are done."""

    settings: Settings
    results: tuple

    @property
    def finished(self):
        """The results of the runs that reached the end: those that did not diverge."""
        return [r for r in self.results if not r["diverged"]]

    def values(self, name):
        """This quantity of every run that reached the end."""
        return [r[name] for r in self.finished]

    def mean(self, name):
        return float(np.mean(self.values(name))) if self.values(name) else math.nan

    def std(self, name):
        """Standard deviation over seeds, 0 for a single one."""
        return float(np.std(self.values(name), ddof=1)) if len(self.values(name)) > 1 else 0.0


def points(runs, results):
    """Group (settings, result or None) by everything but the seed."""
    groups = {}
    for settings, result in zip(runs, results):
        groups.setdefault(replace(settings, seed=0), []).append((settings, result))
    return [Point(group[0][0], tuple(r for _, r in group if r)) for group in groups.values()]


def over_seeds(settings, runs, default):
    """Every run with the seeds from settings.seed on; as many as --seeds says, else `default`."""
    return [replace(run, seed=settings.seed + i) for run in runs for i in range(settings.seeds or default)]


TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "imagenet": "ImageNet",
          "imagenet-256": "ImageNet resized to 256", "synthetic": "Synthetic images"}


def subject(points):
    """What a figure is about: "MNIST, first 2,048 training images"."""
    s = points[0].settings
    return (TITLES[s.data] + (f", first {s.limit:,} training images" if s.limit else "")
            + (f", tested on {s.held_out:,} others of them" if s.held_out else ""))


def shown(points, metric, what="test", note=""):
    """What a figure's numbers are: "best test accuracy over 100 epochs, mean of 3 seeds"; note: after "epochs"."""
    s, seeds = points[0].settings, {len(p.finished) for p in points if p.finished}
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    epochs = f"{s.epochs} epochs" if s.epochs > 1 else "1 epoch"
    name = {"best": f"best {what} accuracy over", "final": f"{what} accuracy after"}[metric]
    return f"{name} {epochs}{note}, {'mean of ' + count + ' seeds' if max(seeds) > 1 else '1 seed'}"


def table(figure, points, metric, script):
    """Lines "paper / ours (mean, deviation, seeds) / command" of the points that are done or that the paper states."""
    name = f"{metric}_{figure.quantity}"
    what = {"test_acc": "test", "train_acc": "training"}[figure.quantity]
    yield f"{'paper':>12}  {f'ours: {metric} {what} accuracy':30}  command of the first seed"
    for p in points:
        count, diverged = len(p.finished), len(p.results) - len(p.finished)
        spread = f" ± {100 * p.std(name):.2f}" if count > 1 else ""
        ours = f"{percent(p.mean(name))}{spread} ({count})"
        ours = (ours if p.results else "missing") + (f", {diverged} diverged" if diverged else "")
        stated = figure.paper(p.settings)
        if p.results or stated:
            yield f"{stated or '-':>12}  {ours:30}  {p.settings.command(script)}"


def plot_command(experiment, name, settings):
    return " ".join(["python", experiment.script, "--plot", name, *settings.flags(places=("seeds", "bases", "widths"))])


def record_of(experiment, name, settings, runs, results, computed):
    """The small record of a figure: what was trained and what came out, one line a run; what was computed besides."""
    keep = ("weights", "connectivity", "diverged", "best_test_acc", "final_test_acc", "best_train_acc",
            "final_train_acc", "epochs", "seconds")
    configs = [r["config"] if r and isinstance(r.get("config"), dict) else {} for r in results]
    rows = [{"data": s.data, "run": s.run_name(), **{k: r[k] for k in keep},
             **({"ranks": ranks} if (ranks := config.get("ranks", [1])) != [1] else {})}  # that trained it
            for s, r, config in zip(runs, results, configs) if r]
    made = {json.dumps(config["versions"]): config["versions"] for config in configs if "versions" in config}
    head = {"figure": name, "shows": experiment.figures[name].help, "versions": list(made.values()),
            "command": plot_command(experiment, name, settings)} | ({"computed": computed} if computed else {})
    return json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"


def file_name(experiment, name, data):
    """What a figure's files are called: "resnet_cifar_fig6", with the data set if it is not the experiment's own."""
    return "_".join([experiment.name, *([data] if data != experiment.settings.data else []), name])


def record_path(experiment, name, data):
    return RECORDS / f"{file_name(experiment, name, data)}.json"


def collect(experiment, name, runs):
    """(results in the order of runs, how many come from results/): from OUT, those absent there from the record."""
    results = [readable(Run(experiment, s).result) for s in runs]
    recorded = readable(lambda: recorded_rows(record_path(experiment, name, runs[0].data))) or {}
    found = [r or recorded.get((s.data, s.run_name())) for s, r in zip(runs, results)]
    return found, sum(f is not r for f, r in zip(found, results))


def readable(read):
    """read(), None with a word on the screen if what it reads is no longer what was written."""
    try:
        return read()
    except FileFault as fault:
        print(f"left out: {fault}", file=sys.stderr)


def recorded_rows(path):
    """{(data set, run): its result} of a record in results/; FileFault names the line of a row that is none."""
    record = read_json(path)
    if record is None:
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("runs"), list):
        raise FileFault(f"{path}: a record has a list of runs")
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    lines = itertools.dropwhile(lambda line: not line[1].strip().startswith(b'"runs"'), lines)
    numbers = (number for number, line in itertools.islice(lines, 1, None) if line.strip())  # of the rows, a line each
    rows = {}
    for row, number in zip(record["runs"], itertools.chain(numbers, itertools.repeat("?"))):
        readable(lambda: rows.update({row_key(row, f"{path}, line {number}"): row}))
    return rows


def row_key(row, where):
    check_result(row, where)
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("data", "run")):
        raise FileFault(f"{where}: a row names its data and its run")
    return row["data"], row["run"]


def computed_for(experiment, name, settings, from_record):
    """What the figure shows beside runs: from the record if any run is, from OUT if it is there, else computed."""
    recorded = read_json(record_path(experiment, name, settings.data)) if from_record else {}
    if "computed" in recorded:
        return recorded["computed"]
    path = Path(settings.out, experiment.name, settings.data, f"{name},seed={settings.seed}.json")
    computed = read_json(path)
    if computed is None:
        computed = experiment.figures[name].compute(settings)
        write_whole(path, as_json(computed))
    return computed


def plot(experiment, name, settings, metric, record):
    """Draw a figure from what is done, print its table, and say what is missing."""
    figure = experiment.figures[name]
    runs = figure.runs(settings)
    results, from_record = collect(experiment, name, runs)
    missing = sum(r is None for r in results)
    if figure.trained and missing == len(runs):
        recorded = readable(lambda: read_json(record_path(experiment, name, settings.data)))
        hint = (f", or draw the recorded ones: {recorded['command']}"
                if isinstance(recorded, dict) and "command" in recorded else "")
        raise UsageError(f"none of the {len(runs)} runs of {name} is done; train them with --sweep {name}{hint}")
    if figure.trained and record and (missing or from_record):
        raise UsageError(f"--record needs all {len(runs)} runs of {name} in {settings.out}, but "
                         f"{missing + from_record} are not there; train them with --sweep {name}")
    if figure.trained and all(r["diverged"] for r in results if r):
        raise UsageError(f"all {len(runs) - missing} runs of {name} that are done have diverged; "
                         "there is nothing to draw")
    grouped = points(runs, results)
    computed = [computed_for(experiment, name, settings, from_record)] if figure.compute else []
    picture, summary = figure.draw(grouped, metric, *computed)
    if figure.trained:
        print(*table(figure, grouped, metric, experiment.script), *figure.notes(settings), "", sep="\n")
    print(f"{name}: {figure.help}", *summary, sep="\n")
    where = record_path(experiment, name, settings.data).relative_to(ROOT)
    if figure.trained:
        print(f"{len(runs) - missing} of {len(runs)} runs are done"
              + (f", {from_record} of them recorded in {where}" if from_record else "")
              + (f"; --list {name} names the others, --sweep {name} trains them" if missing else ""))
    folder = RECORDS if record else Path(settings.out, experiment.name, settings.data)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(experiment, name, settings.data)}.png"
    picture.savefig(path, dpi=150)
    if record and figure.trained:
        content = record_of(experiment, name, settings, runs, results, *computed or [None])
        write_whole(record_path(experiment, name, settings.data), content)
    print(f"drawn to {path}")
