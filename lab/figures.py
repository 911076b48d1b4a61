"""Figures: drawn from the runs that are on disk or recorded, with their tables "paper / ours / command".

    figure = Figure("accuracy over width", runs, draw, paper)      # runs(settings), draw(points, metric): see below
    plot(experiment, "fig6", settings, "best", record=False)

A record in results/ holds a figure's numbers, one line a run, and what made them. It may hold a part of the runs and
grow: recording a figure again keeps the rows of runs that are not on this disk. What is drawn for the figures of the
experiments is in draw_mlp.py and draw_resnet.py, made of the parts at the end here.
"""

import collections
import json
import math
import os
import sys
import textwrap
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from lab.files import FileFault, as_json, read_json, write_whole
from lab.intervals import contrast, indistinguishable, share
from lab.run import Run, as_list, check_result, data_of, percent
from lab.settings import Settings, UsageError

RECORDS = Path(__file__).resolve().parent.parent / "results"


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, or one of our own.

    runs(settings) -> the Settings of every run it shows; draw(points, metric) -> (matplotlib Figure, [lines that
    sum it up]); paper(settings) -> what the paper says of these settings (None: nothing); compute(settings) -> what
    it shows beside runs, as JSON that draw gets as a third argument: kept in OUT and in the record. trained: whether
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
    missing: int = 0  # runs that are not done

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
    return [Point(group[0][0], tuple(r for _, r in group if r), sum(not r for _, r in group))
            for group in groups.values()]


def over_seeds(settings, runs, default):
    """Every run with the seeds from settings.seed on; as many as --seeds says, else `default`."""
    return [replace(run, seed=settings.seed + i) for run in runs for i in range(settings.seeds or default)]


def rates(settings, name, chosen):
    """[(width, learning rate)] of a figure that shows each width at the rate of all and, where it is another, at that
    chosen for it. chosen: {width: rate}, what --plot NAME_lr prints; UsageError while it is empty.
    """
    if not chosen:
        raise UsageError(f"the learning rates of {name}_tuned are not chosen yet; --sweep {name}_lr and then --plot "
                         f"{name}_lr find those that belong into {name.upper()}_LR of this script")
    return [(width, lr) for width, rate in chosen.items() for lr in dict.fromkeys((settings.lr, rate))]


def departures(settings, ignore=()):
    """["lr 0.01", ...]: what differs from the paper's protocol, which is the defaults of the settings' class.

    Which data set, seed and network of a figure it is (width, base_width, dense, kind) is no part of the protocol.
    """
    ignore = {"data", "seed", "width", "base_width", "dense", "kind", *ignore}
    changed = {f.name: getattr(settings, f.name) for f in fields(settings)
               if not f.metadata["place"] and f.name not in ignore and getattr(settings, f.name) != f.default}
    return [f"{name.replace('_', ' ')} {value}" for name, value in changed.items()
            if (name, value) != ("precision", "tf32")]  # what auto is on a GPU


# ---------------------------------------------------------------------------------------------- tables and records


def table(figure, points, metric, script):
    """Lines "paper / ours (mean, deviation, seeds) / command" of the points that are done or that the paper states."""
    name, what = f"{metric}_{figure.quantity}", KINDS[figure.quantity]
    yield f"{'paper':>12}  {f'ours: {metric} {what} accuracy':30}  command of the first seed"
    for p in points:
        count, diverged = len(p.finished), len(p.results) - len(p.finished)
        spread = f", s.d. {100 * p.std(name):.2f}" if count > 1 else ""
        ours = f"{percent(p.mean(name))}{spread} ({count})" if p.results else "missing"
        ours += f", {diverged} diverged" if diverged else ""
        stated = figure.paper(p.settings)
        if p.results or stated:
            yield f"{stated or '-':>12}  {ours:30}  {p.settings.command(script)}"


def file_name(experiment, name, data):
    """What a figure's files are called: "resnet_cifar_fig6", with the data set if it is not the experiment's own."""
    return "_".join([experiment.name, *([data] if data != experiment.settings.data else []), name])


def record_path(experiment, name, data):
    return RECORDS / f"{file_name(experiment, name, data)}.json"


def readable(read):
    """read(), None with a word on the screen if what it reads is not what it should be."""
    try:
        return read()
    except FileFault as fault:
        print(f"left out: {fault}", file=sys.stderr)


def read_record(path):
    """A record as (all but its rows, {(data set, run): row}); both empty if there is none. Bad rows are left out."""
    record, rows = read_json(path), {}
    if record is None:
        return {}, {}
    if not isinstance(record, dict) or not isinstance(record.get("runs"), list):
        raise FileFault(f"{path}: a record has a list of runs")
    for number, row in enumerate(record.pop("runs"), 1):
        readable(lambda: rows.update({row_key(row, path, number): row}))
    return record, rows


def recorded_runs(experiment, name, data):
    """(head of the figure's record, {(data set, run): row} of all records of the experiment, since figures share runs).
    Without a record of its own the head is the command for it alone, if one of a figure with the same runs is there.
    Faulty records are left out with a word.
    """
    heads, rows, own = {}, {}, record_path(experiment, name, data)
    for path in sorted(RECORDS.glob(f"{experiment.name}_*.json"), key=lambda path: path != own):
        heads[path], more = readable(lambda: read_record(path)) or ({}, {})
        rows = more | rows
    if heads.get(own):
        return heads[own], rows
    for other, figure in experiment.figures.items():
        command = heads.get(record_path(experiment, other, data), {}).get("command")
        if figure.runs is experiment.figures[name].runs and isinstance(command, str):
            return {"command": command.replace(f"--plot {other}", f"--plot {name}")}, rows
    return {}, rows


def row_key(row, path, number):
    """(data set, run) of a row; FileFault that names it by its run, or by its number, if it is none."""
    run = row.get("run") if isinstance(row, dict) else None
    where = f"{path}, run {run if isinstance(run, str) else number}"
    if row is None or not isinstance(check_result(row, where).get("data"), str) or not isinstance(run, str):
        raise FileFault(f"{where}: a row names its data and its run")
    return row["data"], run


def row_of(settings, result):
    """A run's line in a record: its result, or the line that was there."""
    if "run" in result:
        return result
    keep = ("weights", "connectivity", "diverged", "best_test_acc", "final_test_acc", "best_train_acc",
            "final_train_acc", "epochs", "seconds")
    ranks = config_of(result).get("ranks", [1])  # that trained it
    digest, unpublished = data_of(result)
    return ({"data": settings.data, "run": settings.run_name()} | {k: result[k] for k in keep}
            | ({"ranks": ranks} if ranks != [1] else {}) | ({"digest": digest[:16]} if digest else {})
            | ({"unpublished": unpublished} if unpublished else {}))


def config_of(result):
    config = result.get("config")
    return config if isinstance(config, dict) else {}


def record_of(experiment, name, settings, runs, results, before, computed=None):
    """The small record of a figure as text: what was trained and came out, a line for each run that is done.

    results: in the order of runs, rows of the record before among them; before: the head of that, whose versions stay
    if rows do; computed: what the figure shows besides.
    """
    done = [(s, r) for s, r in zip(runs, results) if r]
    versions = before.get("versions", []) if any("run" in r for _, r in done) else []
    for made in (made for _, r in done for made in as_list(config_of(r).get("versions"))):
        versions = versions if made in versions else [*versions, made]
    head = {"figure": name, "shows": experiment.figures[name].help, "versions": versions,
            "command": plot_command(experiment, name, settings)}
    head |= {"missing": len(runs) - len(done)} if len(done) < len(runs) else {}
    head |= {"computed": computed} if computed else {}
    rows = ",\n".join(json.dumps(row_of(s, r)) for s, r in done)
    return json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n' + rows + "\n]}\n"


def plot_command(experiment, name, settings):
    return " ".join(["python", experiment.command, "--plot", name,
                     *settings.flags(places=("seeds", "bases", "widths"))])


def computed_for(experiment, name, settings, runs, recorded):
    """What the figure shows beside runs: as recorded with them, else as kept in OUT for these runs, else computed."""
    if "computed" in recorded:
        return recorded["computed"]
    path = Path(settings.out, experiment.name, settings.data, f"{name},seed={settings.seed}.json")
    about = [run.run_name() for run in runs]
    match readable(lambda: read_json(path)):
        case {"runs": kept_for, "computed": computed} if kept_for == about:
            return computed
    computed = experiment.figures[name].compute(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_json({"runs": about, "computed": computed}))
    return computed


def about_data_of(results):
    """Lines that say of results on data that are not the published ones, or not all on the same, that they are."""
    digests, unpublished = zip(*map(data_of, results), strict=True)
    lines = [f"the data: {which}" for which in dict.fromkeys(unpublished) if which]
    counts = collections.Counter(digest[:16] for digest in digests if digest)
    if len(counts) > 1:
        lines.append("not all results are of the same data: "
                     + ", ".join(f"{count} of SHA-256 {digest}" for digest, count in counts.items()))
    return lines


def plot(experiment, name, settings, metric, record):
    """Draw a figure from what is done and what is recorded, print its table, and say what is missing.

    record: into results/, with a record of the numbers; else into OUT.
    """
    figure, runs = experiment.figures[name], experiment.figures[name].runs(settings)
    where = record_path(experiment, name, settings.data)
    head, rows = read_record(where) if record else recorded_runs(experiment, name, settings.data)
    on_disk = [readable(Run(experiment, s).result) for s in runs]
    in_record = [rows.pop((s.data, s.run_name()), None) for s in runs]
    results = [r or row for r, row in zip(on_disk, in_record)]
    missing, recorded = results.count(None), on_disk.count(None) - results.count(None)
    if figure.trained and missing == len(runs):
        hint = f", or draw the recorded ones: {head['command']}" if "command" in head else ""
        if hint and getattr(settings, "precision", None) == "tf32" and "--precision" not in hint:
            hint += " --device cpu"  # where they were trained
        raise UsageError(f"none of the {len(runs)} runs of {name} is done; train them with --sweep {name}{hint}")
    if figure.trained and all(r["diverged"] for r in results if r):
        raise UsageError(f"all {len(runs) - missing} runs of {name} that are done have diverged; "
                         "there is nothing to draw")
    grouped = points(runs, results)
    computed = [computed_for(experiment, name, settings, runs, head if recorded else {})] if figure.compute else []
    picture, summary = figure.draw(grouped, metric, *computed)
    summary = [*summary, *(about_data_of([*filter(None, results), *computed]) if figure.trained else [])]
    if figure.trained:
        print(*table(figure, grouped, metric, experiment.command), *figure.notes(settings), "", sep="\n")
    print(f"{name}: {figure.help}", *summary, sep="\n")
    if figure.trained:
        print(f"{len(runs) - missing} of {len(runs)} runs are done"
              + (f", {recorded} of them recorded in {RECORDS.name}/" if recorded else "")
              + (f"; --list {name} names the others, --sweep {name} trains them" if missing else ""))
    folder = RECORDS if record else Path(settings.out, experiment.name, settings.data)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(experiment, name, settings.data)}.png"
    picture.savefig(path, dpi=150)
    if record and figure.trained:
        if rows:
            print(f"{len(rows)} runs that the record had of other settings are not of this figure and leave it")
        write_whole(where, record_of(experiment, name, settings, runs, results, head, *computed))
    print(f"drawn to {path}")


# ---------------------------------------------------------------------------------------------- words on pictures

TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "imagenet": "ImageNet",
          "imagenet-256": "ImageNet resized to 256", "synthetic": "Synthetic images"}
KINDS = {"test_acc": "test", "train_acc": "training"}  # of accuracy


def subject(points):
    """What a figure is about: "MNIST, first 2,048 training images"."""
    s = points[0].settings
    return (TITLES[s.data] + (f", first {s.limit:,} training images" if s.limit else "")
            + (f", tested on {s.held_out:,} " + ("others of them" if s.limit else "held-out training images")
               if s.held_out else ""))


def title(points, metric, what="test", about=(), bars=True):
    """What a figure's numbers are, how far its runs are from the paper's protocol, and how many are missing.

    about: settings that the figure is about. bars: whether it shows the deviation over seeds, if there are several.
    """
    s, paper = points[-1].settings, type(points[-1].settings)
    words = [{"best": f"best {what} accuracy over ", "final": f"{what} accuracy after "}[metric]
             + (f"{s.epochs} epochs" if s.epochs > 1 else "1 epoch")
             + (f" (the paper: {paper.epochs})" if s.epochs != paper.epochs else "")]
    words += departures(s, ("epochs", "limit", "held_out", *about))
    seeds = sorted({len(p.finished) for p in points if p.finished})
    words.append(f"mean of {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds" if seeds[-1] > 1
                 else "1 seed")
    last = ["bars: standard deviation over seeds"] if bars and seeds[-1] > 1 else []
    if missing := sum(p.missing for p in points):
        last.append(f"{missing} of {missing + sum(len(p.results) for p in points)} runs missing")
    if any(data_of(result)[1] for p in points for result in p.results):
        last.append("the data are not the published files")
    return "\n".join([*textwrap.wrap(", ".join(words), 96), *([", ".join(last)] if last else [])])


def weights_of(line):
    """"175,192 weights", or from the fewest to the most"""
    weights = {p.finished[0]["weights"] for p in line}
    return " to ".join(f"{n:,}" for n in sorted({min(weights), max(weights)})) + " weights"


# ---------------------------------------------------------------------------------------------- lines over width


def panels(columns=1, size=(7, 4.4), **options):
    """(matplotlib figure, its panel or panels side by side)"""
    figure = empty_figure(size)
    return figure, figure.subplots(1, columns, **options)


def mosaic(rows, size, **options):
    """(matplotlib figure, {name: panel}) for rows of names; a name that stands side by side is one panel."""
    figure = empty_figure(size)
    return figure, figure.subplot_mosaic(rows, **options)


def empty_figure(size):
    backend = os.environ.pop("MPLBACKEND", None)  # of a notebook, unknown outside; here pictures only become files
    try:
        from matplotlib.figure import Figure  # here: training takes no pictures
    finally:
        os.environ |= {"MPLBACKEND": backend} if backend is not None else {}

    return Figure(figsize=size, layout="constrained")


def describe(ax, ylabel, heading):
    ax.set_ylabel(ylabel)
    ax.legend(fontsize=8)
    ax.set_title(heading, fontsize=9)


def axes_over_width(ax, widths, unit="channels of the first stage"):
    ax.set_xscale("log")
    ax.set_xticks(sorted(widths), sorted(widths), fontsize=8)
    ax.minorticks_off()
    ax.set_xlabel(f"width ({unit})")
    ax.grid(alpha=0.3)


def widths_of(points):
    """Of those that are done."""
    return {p.settings.width for p in points if p.finished}


def families(points):
    """{base: its points that are done, by width}; where dense networks have a flag of their own, without them."""
    found = {}
    for p in sorted(points, key=lambda p: (p.settings.base_width, p.settings.width)):
        if p.finished and (not p.settings.dense or p.settings.width == p.settings.base_width):
            found.setdefault(p.settings.base_width, []).append(p)
    return found


def sparse_and_dense(points):
    """Lines for plot_lines: each base's sparse networks, and all dense ones."""
    dense = [p for p in points if p.finished and is_dense(p)]
    sparse = [line for line in families(points).values() if line[-1].settings.width > line[-1].settings.base_width]
    lines = [(line, f"C{i}o-", f"sparse: {weights_of(line)} at every width") for i, line in enumerate(sparse)]
    dense.sort(key=lambda p: p.settings.width)
    return lines + ([(dense, "C7s--", "dense: all weights of its width")] if dense else [])


def plot_lines(ax, lines, quantity, x=lambda point: point.settings.width):
    """Lines (points, style, label) of accuracies in per cent, with their deviations over seeds.

    Returns for each "label: 65.55 % at 8, ...", whatever x is: at these widths; with the gains over the first.
    """
    summary = []
    for line, style, label in lines:
        y, error = (100 * np.array([statistic(p, quantity) for p in line]) for statistic in (Point.mean, Point.std))
        summary.append(f"{label}: " + ", ".join(f"{v:.2f} % at {p.settings.width}" for p, v in zip(line, y)))
        summary += gains(line, quantity, line[0], f"width {line[0].settings.width}")
        summary += as_good_as_the_best(line, quantity)
        places, far = np.array([x(p) for p in line]), starved(y)
        ax.errorbar(places, np.where(far, np.nan, y), error, fmt=style, capsize=3, label=label)
        off_the_scale(ax, places[far], y[far], color=style[:2])
    return summary


def difference(point, other, quantity):
    """"+3.42 ± 0.51": points (1/100) by which an accuracy is above another, with the 95 % interval if seeds tell one"""
    value, half = contrast((100, point.values(quantity)), (-100, other.values(quantity)))
    return f"{value:+.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else "")


def gains(line, quantity, start, called):
    """A line of text: what the points of a line gain over `start`, called so; none if there are no intervals."""
    told = [f"{difference(p, start, quantity)} at {p.settings.width}" for p in line if p is not start]
    if not any("±" in text for text in told):
        return []
    return [f"  points above {called}, with 95 % intervals: {', '.join(told)}"]


def as_good_as_the_best(line, quantity):
    """A line of text: which widths cannot be told from the best of a line, of three or more that have three seeds."""
    seeded = [p for p in line if len(p.finished) > 2]
    if len(seeded) < 3:
        return []
    alike = indistinguishable(seeded, [[-v for v in p.values(quantity)] for p in seeded])
    told = [f"width {p.settings.width}" + (f" (connectivity {100 * p.mean('connectivity'):.3g} %)"
                                           if p.mean("connectivity") < 1 else "") for p in alike]
    left_out = [p.settings.width for p in line if p not in seeded]
    return [f"  not distinguishable from the best: {', '.join(told)}"
            + (f"; too few seeds to say at {', '.join(map(str, left_out))}" if left_out else "")]


def is_dense(point):
    """Whether this network, not a bottleneck, keeps all its weights: those without the flag are their own base."""
    return point.settings.dense or point.settings.width == point.settings.base_width


def shares(points, quantity):
    """({base: {width: (share, half of its 95 % interval)}}, lines about those that have none): of what a dense network
    of this width gains over the base, the share that a sparse one with the base's weights gains.
    """
    dense = {p.settings.width: p.values(quantity) for p in points if p.finished and is_dense(p)}
    found, lines = {}, []
    for base, line in families(points).items():
        found[base] = {}
        for p in line:
            width = p.settings.width
            if width == base or not {width, base} <= set(dense):
                continue
            gain, half = contrast((1, dense[width]), (-1, dense[base]))
            about = f"base {base}: at width {width} the dense network gains {100 * gain:.2f}"
            if gain > 0.001:
                found[base][width] = share(p.values(quantity), dense[width], dense[base])
            else:
                lines.append(f"{about} points, too little to have parts")
            if half > gain > 0.001:
                lines.append(f"{about} ± {100 * half:.2f} points, not told from 0: a share of it says little")
    return found, lines


def told_shares(of_width):
    """"60 ± 12 % at 12, ..." of the shares of a base."""
    return ", ".join(f"{100 * value:.0f}{f' ± {100 * half:.0f}' if math.isfinite(half) else ''} % at {width}"
                     for width, (value, half) in of_width.items())


def starved(y):
    """Which networks of a line, by width, have too few weights for it: wider than the best and 15 points below it."""
    return (y < y.max() - 15) & (np.arange(len(y)) > y.argmax())


def off_the_scale(ax, x, y, color, edge=0):
    """An arrow to each starved network, which would flatten the picture of the others, at its lower or upper edge."""
    for place, value in zip(x, y):
        ax.annotate(f"{value:.0f} %", (place, edge), (0, 18 - 36 * edge), xycoords=ax.get_xaxis_transform(),
                    textcoords="offset points", ha="center", va="center", color=color,
                    bbox=dict(facecolor="white", edgecolor="none", pad=0),
                    arrowprops=dict(arrowstyle="->", color=color))


def accuracy_over_width(points, lines, metric, heading, quantity="test_acc", about=(), **axes):
    """(figure, its summary) of one panel with these lines."""
    figure, ax = panels()
    summary = plot_lines(ax, lines, f"{metric}_{quantity}")
    axes_over_width(ax, widths_of(points), **axes)
    what = KINDS[quantity]
    describe(ax, f"{metric} {what} accuracy, %", f"{heading}\n{title(points, metric, what, about)}")
    return figure, summary


# ---------------------------------------------------------------------------------------------- learning rates


def tuned(points, metric="best", names=("dense", "width")):
    """{these settings of a network: the learning rate of the highest mean accuracy on held-out images, with no seed
    diverged}
    """
    best = {}
    for p in (p for p in points if len(p.finished) == len(p.results)):
        key, accuracy = tuple(getattr(p.settings, name) for name in names), p.mean(f"{metric}_test_acc")
        if math.isfinite(accuracy) and accuracy > best.get(key, (-1, None))[0]:
            best[key] = accuracy, p.settings.lr
    return {key if len(names) > 1 else key[0]: lr for key, (_, lr) in best.items()}


def learning_rates(points, metric, heading, table, names, about=()):
    """(figure, its summary): accuracy on held-out images over the learning rate, a line a width, the chosen rate
    marked; dense networks in a panel of their own. table: what the script calls the rates that it takes from here,
    names: the settings that are its keys. about: see title.
    """
    kinds = sorted({p.settings.dense for p in points}, reverse=True)
    figure, axes = panels(len(kinds), (1 + 5 * len(kinds), 4.4), sharey=True, squeeze=False)
    widths, rates = (sorted({getattr(p.settings, name) for p in points}) for name in ("width", "lr"))
    top = max((100 * p.mean(f"{metric}_test_acc") for p in points if p.finished), default=100)
    for ax, dense in zip(axes[0], kinds):
        those = [p for p in points if p.settings.dense == dense]
        done = [p for p in those if p.finished]
        for i, width in enumerate(widths):
            line = {p.settings.lr: 100 * p.mean(f"{metric}_test_acc") for p in those
                    if p.settings.width == width and p.results}
            rate = tuned([p for p in those if p.settings.width == width], metric, ("width",)).get(width)
            if rate is None:
                continue
            ax.plot(list(line), list(line.values()), f"C{i}o-", label=f"width {width}")
            ax.plot(rate, line[rate], f"C{i}*", markersize=14)
            if line[rate] < top - 9:
                off_the_scale(ax, [rate], [line[rate]], color=f"C{i}")
        ax.set_xscale("log", base=2)
        ax.set_xticks(rates, [f"{r:g}" for r in rates])
        ax.set(title="dense" if dense else f"sparse, {weights_of(done)}" if done else "sparse", xlabel="learning rate",
               ylim=(top - 9, top + 1))
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8, loc="lower center", ncols=2)
    axes[0, 0].set_ylabel("accuracy on held-out training images, %")
    words = title(points, metric, "held-out", about=("lr", "held_out", *about), bars=False)
    figure.suptitle(f"{heading}; stars: chosen\n{words}", fontsize=10)
    return figure, [f"{table} = {tuned(points, metric, names)}"]


def one_rate_and_tuned(points, metric, heading, **axes):
    """Accuracy over width at one learning rate, and at that chosen for each width."""
    one, chosen = points[0].settings.lr, {}
    done = [p for p in points if p.finished]
    for p in sorted(done, key=lambda p: p.settings.lr != one):
        chosen[p.settings.width] = p  # of two the one with another rate
    lines = [([p for p in done if p.settings.lr == one], "C0o-", f"learning rate {one:g} at every width"),
             ([chosen[width] for width in sorted(chosen)], "C1s--", "learning rate chosen for each width")]
    return accuracy_over_width(points, [line for line in lines if line[0]], metric, heading, about=("lr",), **axes)
