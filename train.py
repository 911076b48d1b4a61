"""Runs, sweeps and figures: everything around a network that does not depend on which experiment it is.

One run fits a network, records every epoch, survives being cut at any moment and goes on bit for bit where it
stopped. A sweep trains all runs of a figure that are not done yet, with as many processes as wanted. A figure is
drawn from what is on disk. An experiment script describes itself with Settings, Figures and an Experiment and
calls main(); its command line follows from that.

    OUT/<experiment>/<data set>/<run>/  config.json  log.csv  checkpoint.npz  result.json (last: the run is done)
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import distributed
import nn

ROOT = Path(__file__).resolve().parent
RECORDS = ROOT / "results"
LOOK_EVERY = 0.5  # seconds between looks at loss and accuracy (on a GPU each look waits for it)


class UsageError(Exception):
    """Something the user asked for that cannot be done; the message is one sentence."""


EXPECTED = UsageError, data.DataError, distributed.JobError  # errors whose message says all that there is to say

# ---------------------------------------------------------------------------------------------- settings


def setting(default, help, choices=None, least=None, place=False):
    """A field of Settings. least: the smallest value allowed. place: it says where or how, not what, is trained,
    so it takes no part in a run's name.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, least=least, place=place))


@dataclass(frozen=True)
class Settings:
    """What every experiment lets one choose; each adds its own. All that changes a result is in the run's name."""

    data: str = setting("mnist", "data set", choices=data.NAMES)
    epochs: int = setting(300, "passes over the training set", least=1)
    seed: int = setting(0, "of masks, initial weights and order of the examples", least=0)
    limit: int = setting(0, "use the first N training examples (0: all)", least=0)
    held_out: int = setting(0, "test on the last N training examples in place of the test set", least=0)
    batch: int = setting(100, "examples a step", least=1)
    lr: float = setting(0.1, "learning rate", least=0)
    data_dir: str = setting("data", "where data sets are found or downloaded to", place=True)
    out: str = setting("runs", "where runs are written", place=True)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "gpu"), place=True)
    jobs: int = setting(1, "processes of a sweep", least=1, place=True)
    save_every: float = setting(30.0, "seconds between checkpoints", least=0, place=True)
    seeds: int = setting(0, "seeds of a sweep (0: as many as its figure shows)", least=0, place=True)

    ALWAYS_NAMED = ("seed",)  # other settings are in a run's name when they differ from their default

    def check(self):
        """Raise UsageError for a value out of range; experiments extend it."""
        for f in fields(self):
            value, least, choices = getattr(self, f.name), f.metadata["least"], f.metadata["choices"]
            if least is not None and value is not None and not (value >= least and math.isfinite(value)):
                raise UsageError(f"--{f.name.replace('_', '-')} must be a number of at least {least}, not {value}")
            if choices and value not in choices:
                raise UsageError(f"--{f.name.replace('_', '-')} is one of {', '.join(choices)}, not {value}")

    def identity(self):
        """The settings that decide what is trained, as a dict."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["place"]}

    def run_name(self):
        """A name for the run that no other settings share: "width=80,seed=0,epochs=100"."""
        shown = {n: getattr(self, n) for n in self.ALWAYS_NAMED}
        shown |= {f.name: getattr(self, f.name) for f in fields(self)
                  if not f.metadata["place"] and getattr(self, f.name) != f.default and f.name != "data"}
        return ",".join(f"{name}={value}" for name, value in shown.items())

    def flags(self, always=(), places=()):
        """The command line words of what differs from its default, of `always`, and of these places if they differ."""
        words = []
        for f in fields(self):
            value, flag = getattr(self, f.name), f.name.replace("_", "-")
            if f.name in always or value != f.default and (not f.metadata["place"] or f.name in places):
                words += ([f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool)
                          else [f"--{flag}", f"{value}"])
        return words

    def command(self, script):
        """The command that trains exactly this."""
        return " ".join(["python", script, *self.flags(always=self.ALWAYS_NAMED)])


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line end in one sentence and exit code 2; of several ranks the first says it."""

    def _print_message(self, message, file=None):
        if distributed.world().rank == 0:
            super()._print_message(message, file)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parse(experiment, argv):
    """The command line as (Settings, namespace of what to do with them)."""
    parser = Parser(prog=experiment.script, description=experiment.description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(experiment.figures)
    todo = parser.add_argument_group(f"figures and sweeps (FIGURE is one of {names})")
    todo.add_argument("--sweep", metavar="FIGURE", help="train every run of a figure that is not done yet")
    todo.add_argument("--list", metavar="FIGURE", help="name the runs of a figure and say which are done")
    todo.add_argument("--plot", metavar="FIGURE", help="draw a figure from what is done and print its table")
    todo.add_argument("--metric", choices=("best", "final"), default="best",
                      help="figures show the best test accuracy over epochs (the paper's protocol) or the final one")
    todo.add_argument("--record", action="store_true", help="with --plot: keep picture and numbers in results/")
    todo.add_argument("--quick", action="store_true", help=f"a small version: {experiment.quick_help}")
    todo.add_argument("--dry-run", action="store_true",
                      help="only say what would be trained, and estimate time, memory and disk")
    for action, (help, _) in experiment.actions.items():
        todo.add_argument(f"--{action}", action="store_true", help=help)
    todo.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # a process of --jobs
    group = parser.add_argument_group("settings")
    types = typing.get_type_hints(experiment.settings)
    for f in fields(experiment.settings):
        kind = types[f.name]
        kind = next((t for t in typing.get_args(kind) if t is not type(None)), kind)  # float | None -> float
        flag, default = f"--{f.name.replace('_', '-')}", f.default
        help = f"{f.metadata['help']} (default: {default})" if kind is not bool else f.metadata["help"]
        if kind is bool:
            action = argparse.BooleanOptionalAction if default else "store_true"
            group.add_argument(flag, action=action, default=default, help=help)
        else:
            group.add_argument(flag, type=kind, default=default, help=help, metavar=kind.__name__[0].upper())
    given = {word.split("=")[0] for word in argv}
    if "--quick" in given:
        parser.set_defaults(**experiment.quick)
    todo = parser.parse_args(argv)
    todo.quick_figure = todo.quick and not given & {"--width", "--sweep", "--list", "--plot"}
    settings = experiment.settings(**{f.name: vars(todo).pop(f.name) for f in fields(experiment.settings)})
    asked = [name for name in (todo.sweep, todo.list, todo.plot) if name]
    if len(asked) > 1:
        raise UsageError("only one of --sweep, --list and --plot can be done at a time")
    if asked and asked[0] not in experiment.figures:
        raise UsageError(f"there is no figure {asked[0]!r}; there are {names}")
    for name, instead in experiment.figures_ignore.items():
        flag = f"--{name.replace('_', '-')}"
        if (asked or todo.quick_figure) and flag in given:
            raise UsageError(f"figures take {instead}; {flag} is for a single network")
    settings.check()
    return settings, todo


# ---------------------------------------------------------------------------------------------- files


def write_whole(path, content):
    """Write bytes or text so that `path` holds all of it or what it held before, even if the power goes."""
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself lasts once the folder is flushed (not on Windows)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def as_json(value):
    return json.dumps(value, indent=1) + "\n"


def read_json(path):
    """The value in a JSON file, None if there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None


@functools.cache
def code_version():
    """A hash of the project's modules and, in a git checkout, the commit."""
    content = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))).hexdigest()[:12]

    def git(*words):
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--", "*.py") else ""
        return f"{content} on commit {git('rev-parse', '--short', 'HEAD')}{changed}"
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return content


def versions():
    """What a record needs to be repeated: versions and machine."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {"python": platform.python_version(), nn.xp.__name__: nn.xp.__version__, "code": code_version(),
            "device": "cpu" if nn.xp is np else "gpu", "processor": processor, "cores": os.cpu_count()}


# ---------------------------------------------------------------------------------------------- one run

COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds")


@dataclass(frozen=True)
class Experiment:
    """What main() needs to know of a script.

    load(settings) -> data.Dataset; build(settings, dataset) -> nn.Module with weights and masks drawn;
    optimizer(settings, parameters) -> nn.SGD; schedule(settings) -> learning rate of an epoch.
    quick: the settings that --quick changes; quick_figure: what it sweeps and draws if no width is given.
    test_batch: images evaluated at a time. figures_ignore: {setting: the flags that figures take in its place}.
    actions: {flag: (help, what it does with the settings)} of what can be done besides training.
    """

    name: str
    script: str
    description: str
    settings: type
    load: typing.Callable
    build: typing.Callable
    optimizer: typing.Callable
    schedule: typing.Callable
    figures: dict
    quick: dict
    quick_help: str
    quick_figure: str
    test_batch: int = 1000
    figures_ignore: dict = field(default_factory=dict)
    actions: dict = field(default_factory=dict)


class Run:
    """One training run and its folder. ranks: the processes that train it together, each calling the same methods."""

    def __init__(self, experiment, settings, ranks=distributed.Alone()):
        self.experiment, self.settings, self.ranks = experiment, settings, ranks
        self.folder = Path(settings.out, experiment.name, settings.data, settings.run_name())

    def result(self):
        """result.json as a dict, None as long as the run is not done."""
        return read_json(self.folder / "result.json")

    def done(self):
        return (self.folder / "result.json").exists()

    def status(self):
        """One line for --list."""
        if result := self.result():
            if result["diverged"]:
                return f"diverged in epoch {result['epochs'] + 1}"
            return f"done: test {percent(result['best_test_acc'])} best, {percent(result['final_test_acc'])} final"
        if failure := read_json(self.folder / "failed.json"):
            return f"failed: {failure['error']}"
        try:
            with open(self.folder / "log.csv") as log:
                return f"begun: {sum(1 for _ in log) - 1} of {self.settings.epochs} epochs"
        except FileNotFoundError:
            return "not begun"

    def record_failure(self, error):
        """Leave failed.json beside what the run has; returns the failure as one line."""
        line = f"{error}" if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # a full disk may be what failed
            self.write("failed.json", as_json({"error": line, "traceback": traceback.format_exception(error)}))
        return line

    @contextlib.contextmanager
    def lock(self):
        """Hold the run's folder while it is trained; yields False if another process holds it.

        The operating system ends the hold when the process ends in whatever way, so a lock cannot be stale.
        """
        with hold(self.folder) if self.ranks.rank == 0 else contextlib.nullcontext() as mine:
            yield self.ranks.broadcast(mine)

    def write(self, name, content):
        """A whole file in the run's folder; of several ranks the first writes it."""
        if self.ranks.rank == 0:
            write_whole(self.folder / name, content)

    def say(self, text, file=None):
        """One line on the screen, beside the progress bar; of several ranks the first says it."""
        if self.ranks.rank == 0:
            tqdm.write(text, file)

    def prepare(self):
        """(dataset, model, optimizer, schedule) as at the first step."""
        s, e = self.settings, self.experiment
        dataset = self.ranks.first_here(lambda: e.load(s)).to_device()
        model = e.build(s, dataset)
        return dataset, model, e.optimizer(s, model.parameters()), e.schedule(s)

    def train(self, bar=True):
        """Train from the last checkpoint, or from the beginning, to the end; returns the result.

        Call it while holding lock(). SIGTERM and SIGINT end it after the step at hand with a checkpoint and
        SystemExit(128 + signal). A loss that is not finite ends the run, recorded as diverged.
        """
        s = self.settings
        dataset, model, optimizer, schedule = self.prepare()
        progress = self.load_checkpoint(model, optimizer)
        if progress is None:
            progress = Progress()
            self.write("config.json", as_json({"settings": s.identity(), "versions": versions(),
                                               "ranks": self.ranks.size}))
        self.ranks.check_same(model, "before training")
        steps = math.ceil(len(dataset.train_labels) / s.batch)
        bar = tqdm(total=s.epochs * steps, initial=progress.epoch * steps + progress.step, unit="step",
                   disable=None if bar and self.ranks.rank == 0 else True, mininterval=0.5)
        finite, self.saved = True, time.monotonic()
        # A loss that overflows is noticed and recorded, so NumPy need not warn of it too.
        with bar, stop_signal() as stopped, np.errstate(over="ignore", invalid="ignore"):
            while finite and progress.epoch < s.epochs:
                finite = self.epoch(dataset, model, optimizer, schedule(progress.epoch), progress, stopped, bar)
                self.ranks.check_same(model, f"after epoch {progress.epoch}")
                if finite and (self.save_is_due() or progress.epoch == s.epochs):
                    self.save_checkpoint(model, optimizer, progress)
        if not finite:
            self.write_log(progress)
            self.say(f"{s.run_name()}: the loss is no longer finite in epoch {progress.epoch + 1}; "
                     "recorded as diverged")
        result = self.write_result(model, progress, diverged=not finite)
        if stopped:  # asked to stop during the last evaluation: the run is done, but what would follow must not begin
            raise SystemExit(128 + stopped[0])
        return result

    def epoch(self, dataset, model, optimizer, lr, progress, stopped, bar):
        """Train to the end of the epoch at hand and evaluate; False if the loss is not finite."""
        s, ranks = self.settings, self.ranks
        begin = looked = time.monotonic()
        optimizer.lr = lr
        model.train()
        left = len(dataset.train_labels) - progress.step * s.batch
        for x, labels in dataset.train_batches(s.batch, s.seed, progress.epoch, progress.step, ranks.part):
            sums = train_step(model, optimizer, x, labels, ranks, len(labels) / min(s.batch, left))
            left -= s.batch
            *sums, stop = ranks.sum(*sums, len(stopped))  # if one rank is told to stop, all do after the same step
            progress.add(*sums)
            bar.update()
            now = time.monotonic()
            if stop or ranks.size > 1 or now - looked > LOOK_EVERY:
                looked = now
                if not progress.finite():
                    return False
                bar.set_description(progress.description(s.epochs), refresh=False)
                if stop or self.save_is_due():
                    progress.seconds += now - begin
                    begin = now
                    self.save_checkpoint(model, optimizer, progress)
                if stop:
                    self.say(f"stopped in epoch {progress.epoch + 1}; the same command goes on from here", sys.stderr)
                    raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])
        if not progress.finite():
            return False
        bar.set_description(progress.description(s.epochs), refresh=False)
        test_loss, test_acc = evaluate(model, dataset.test_batches(self.experiment.test_batch, ranks.part), ranks)
        progress.seconds += time.monotonic() - begin
        progress.end_epoch(lr, test_loss, test_acc)
        return True

    def save_is_due(self):
        return time.monotonic() - self.saved >= self.settings.save_every

    def save_checkpoint(self, model, optimizer, progress):
        """checkpoint.npz with all that a bit-identical continuation needs, then log.csv."""
        if self.ranks.rank:  # all ranks hold the same
            return
        arrays = {f"model.{k}": v for k, v in model.state_dict().items()}
        arrays |= {f"optimizer.{k}": v for k, v in optimizer.state_dict().items()}
        arrays |= {f"progress.{k}": np.asarray(v, np.float64) for k, v in progress.state().items()}
        arrays["settings"] = np.asarray(json.dumps(self.settings.identity()))
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        self.write("checkpoint.npz", buffer.getbuffer())
        self.write_log(progress)
        self.saved = time.monotonic()

    def load_checkpoint(self, model, optimizer):
        """Put the state of checkpoint.npz, as rank 0 finds it, into model and optimizer; the Progress, None without."""
        path = self.folder / "checkpoint.npz"
        content = self.ranks.broadcast(path.read_bytes() if self.ranks.rank == 0 and path.exists() else None)
        if content is None:
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            settings = json.loads(str(arrays.pop("settings")))
            part = {p: {k.removeprefix(f"{p}."): v for k, v in arrays.items() if k.startswith(f"{p}.")}
                    for p in ("model", "optimizer", "progress")}
            model.load_state_dict(part["model"])
            optimizer.load_state_dict(part["optimizer"])
            progress = Progress(**part["progress"])
        except Exception as error:  # NumPy and zipfile raise whatever they stumble on
            raise UsageError(f"{path} is damaged or of another network ({error}); "
                             "remove it to begin this run again") from None
        wrong = [f"{f.name} {settings.get(f.name, f.default)} instead of {getattr(self.settings, f.name)}"
                 for f in fields(self.settings) if not f.metadata["place"]
                 and settings.get(f.name, f.default) != getattr(self.settings, f.name)]
        if wrong:
            raise UsageError(f"{path} belongs to a run with other settings: {', '.join(wrong)}")
        return progress

    def write_log(self, progress):
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([[int(row[0]), *map(repr, map(float, row[1:]))] for row in progress.history])
        self.write("log.csv", rows.getvalue())

    def write_result(self, model, progress, diverged):
        layers = [{"name": name, "shape": list(layer.weight.shape), "size": layer.weight.size,
                   "kept": layer.weight.count}
                  for name, layer in nn.layers(model)]
        weights = nn.weight_count(model)
        column = {name: [float(row[i]) for row in progress.history] for i, name in enumerate(COLUMNS)}
        result = {"weights": weights, "connectivity": weights / sum(layer["size"] for layer in layers),
                  "layers": layers, "diverged": diverged}
        for part in ("test", "train"):
            accuracies = column[f"{part}_acc"]
            result[f"best_{part}_acc"] = max(accuracies, default=None)
            result[f"final_{part}_acc"] = accuracies[-1] if accuracies else None
        result |= {"epochs": len(progress.history), "seconds": sum(column["seconds"]),
                   "config": read_json(self.folder / "config.json")}
        self.write("result.json", as_json(result))
        if self.ranks.rank == 0:
            (self.folder / "failed.json").unlink(missing_ok=True)
        return result


class Progress:
    """How far a run is: rows of the log, and sums over the part of the current epoch that is done."""

    def __init__(self, history=(), epoch=0, step=0, loss_sum=0.0, correct=0, seen=0, seconds=0.0):
        self.history = [list(map(float, row)) for row in history]
        self.epoch, self.step, self.seen = int(epoch), int(step), int(seen)
        self.loss_sum, self.correct, self.seconds = float(loss_sum), int(correct), float(seconds)

    def state(self):
        state = {k: v for k, v in vars(self).items() if k != "history"}
        state = {k: float(v) for k, v in state.items()}
        return state | {"history": np.reshape(self.history, (-1, len(COLUMNS)))}

    def add(self, loss_sum, correct, seen):
        """Count one step; the sums stay on the device."""
        self.step += 1
        self.seen += int(seen)
        self.loss_sum += loss_sum
        self.correct += correct

    def finite(self):
        return math.isfinite(float(self.loss_sum))

    def description(self, epochs):
        return (f"epoch {self.epoch + 1}/{epochs} loss {float(self.loss_sum) / self.seen:.3f} "
                f"train {int(self.correct) / self.seen:.2%}"
                + (f" test {self.history[-1][COLUMNS.index('test_acc')]:.2%}" if self.history else ""))

    def end_epoch(self, lr, test_loss, test_acc):
        self.history.append([self.epoch + 1, lr, float(self.loss_sum) / self.seen, int(self.correct) / self.seen,
                             test_loss, test_acc, self.seconds])
        self.epoch, self.step, self.seen = self.epoch + 1, 0, 0
        self.loss_sum, self.correct, self.seconds = 0.0, 0, 0.0


def train_step(model, optimizer, x, labels, ranks=distributed.Alone(), weight=1.0):
    """One step of SGD on a batch, of which this rank has the part `weight`: x, labels, perhaps none.

    Returns this rank's sums: of the loss, of correct answers, of examples.
    """
    sums = 0.0, 0, 0
    if len(labels):
        logits = model(nn.Tensor(x))
        loss = nn.cross_entropy(logits, labels)
        loss.backward()
        sums = (loss.data.astype(np.float64) * len(labels), (logits.data.argmax(axis=1) == labels).sum(), len(labels))
    ranks.average(model, weight)
    optimizer.step()
    optimizer.zero_grad()
    return sums


def evaluate(model, batches, ranks=distributed.Alone()):
    """(mean loss, accuracy) in evaluation mode, over the batches of all ranks."""
    model.eval()
    loss_sum, correct, seen = 0.0, 0, 0
    with nn.no_grad():
        for x, labels in batches:
            if len(labels):
                logits = model(nn.Tensor(x))
                loss_sum += float(nn.cross_entropy(logits, labels).data) * len(labels)
                correct += int((logits.data.argmax(axis=1) == labels).sum())
                seen += len(labels)
    loss_sum, correct, seen = ranks.sum(loss_sum, correct, seen)
    return loss_sum / seen, correct / seen


@contextlib.contextmanager
def stop_signal():
    """A list that SIGTERM and SIGINT put their number into, so that a step is never cut in the middle."""
    stopped = []
    before = {sig: signal.signal(sig, lambda number, frame: stopped.append(number))
              for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


@contextlib.contextmanager
def hold(folder):
    """True while this process holds the lock of a folder, False if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+b") as file:
        try:
            lock_file(file)
        except OSError:
            yield False
        else:
            yield True


def lock_file(file):
    """Lock an open file for this process without waiting; OSError if another process has it."""
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def estimate(run, steps=20):
    """(layer table, seconds, bytes of memory, bytes of disk) of a run, from a few timed steps."""
    s = run.settings
    dataset, model, optimizer, schedule = run.prepare()
    optimizer.lr = 0  # the estimate must not depend on how training would go
    timed = []
    for x, labels in dataset.train_batches(s.batch, s.seed, 0):
        begin = time.perf_counter()
        Progress().add(*train_step(model, optimizer, x, labels))
        timed.append(time.perf_counter() - begin)
        if len(timed) == steps or len(timed) > 1 and np.sum(timed) > 5:
            break
    begin = time.perf_counter()
    x, labels = next(dataset.test_batches(run.experiment.test_batch))
    evaluate(model, [(x, labels)])
    testing = (time.perf_counter() - begin) * len(dataset.test_labels) / len(labels)
    seconds = s.epochs * (float(np.median(timed)) * math.ceil(len(dataset.train_labels) / s.batch) + testing)
    arrays = [*model.state_dict().values(), *optimizer.state_dict().values()]
    table = [f"  {name:12} {'x'.join(map(str, layer.weight.shape)):>14} keeps {layer.weight.count:,} of "
             f"{layer.weight.size:,}" for name, layer in nn.layers(model)]
    table.append(f"  {nn.weight_count(model):,} weights in all")
    return table, seconds, peak_memory(), sum(a.nbytes for a in arrays) + 100 * s.epochs


def peak_memory():
    """The most memory this process has held, in bytes (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------- sweeps


def sweep(runs, ranks=distributed.Alone(), bar=True):
    """Train the runs that are not done, each under its lock; returns how many failed, on all ranks together.

    Any number of processes may do this for the same runs at once. Whoever is through waits for the others, and
    takes over the run of one that died. The ranks of a job share the runs out among themselves. A run that fails is
    recorded in its folder, the others go on; the next sweep tries it again.
    """
    failed, waiting = 0, (runs[i] for i in ranks.hand_out(len(runs)))
    while waiting:
        busy = []
        for run in waiting:
            if run.done():
                continue
            with run.lock() as mine:
                if not mine:
                    busy.append(run)
                elif not run.done():
                    name = run.settings.run_name()
                    try:
                        result = run.train(bar)
                    except Exception as error:
                        failed += 1
                        print(f"{name}: {run.record_failure(error)}", file=sys.stderr, flush=True)
                        continue
                    count = sum(r.done() for r in runs)
                    print(f"[{count}/{len(runs)}] {name}: "
                          f"test {percent(result['best_test_acc'])} in {result['seconds']:.0f} s", flush=True)
        waiting = busy
        if busy:
            time.sleep(1)
    return int(ranks.sum_when_ready(failed))


def sweep_in_processes(jobs, script, argv):
    """The same command in `jobs` processes that share the cores; returns the worst exit code."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = {k: v for k, v in os.environ.items() if k not in distributed.SIZES}  # a worker is no rank of a job
    env |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
                         threads)
    command = [sys.executable, script, *argv, "--worker"]
    workers = [subprocess.Popen(command, env=env) for _ in range(jobs)]
    with stop_signal() as stopped:
        while any(w.poll() is None for w in workers):
            if stopped:
                for w in workers:
                    w.terminate()  # each writes its checkpoint
                stopped_by = stopped[0]
                [w.wait() for w in workers]
                return 128 + stopped_by
            time.sleep(0.1)
    return max(abs(w.returncode) for w in workers)


# ---------------------------------------------------------------------------------------------- figures


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


def percent(fraction):
    return "-" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.2f} %"


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
    rows = [{"data": s.data, "run": s.run_name(), **{k: r[k] for k in keep}} for s, r in zip(runs, results) if r]
    made = {json.dumps(r["config"]["versions"]): r["config"]["versions"] for r in results if r}
    head = {"figure": name, "shows": experiment.figures[name].help, "versions": list(made.values()),
            "command": plot_command(experiment, name, settings)} | ({"computed": computed} if computed else {})
    return json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"


def record_path(experiment, name):
    return RECORDS / f"{experiment.name}_{name}.json"


def collect(experiment, name, runs):
    """(results in the order of runs, how many come from results/): from OUT, those absent there from the record."""
    results = [Run(experiment, s).result() for s in runs]
    record = read_json(record_path(experiment, name)) or {"runs": []}
    recorded = {(row["data"], row["run"]): row for row in record["runs"]}
    found = [r or recorded.get((s.data, s.run_name())) for s, r in zip(runs, results)]
    return found, sum(f is not r for f, r in zip(found, results))


def computed_for(experiment, name, settings, from_record):
    """What the figure shows beside runs: from the record if any run is, from OUT if it is there, else computed."""
    if from_record:
        return read_json(record_path(experiment, name))["computed"]
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
        recorded = read_json(record_path(experiment, name))
        hint = f", or draw the recorded ones: {recorded['command']}" if recorded else ""
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
    where = record_path(experiment, name).relative_to(ROOT)
    if figure.trained:
        print(f"{len(runs) - missing} of {len(runs)} runs are done"
              + (f", {from_record} of them recorded in {where}" if from_record else "")
              + (f"; --list {name} names the others, --sweep {name} trains them" if missing else ""))
    folder = RECORDS if record else Path(settings.out, experiment.name, settings.data)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{experiment.name}_{name}.png"
    picture.savefig(path, dpi=150)
    if record and figure.trained:
        content = record_of(experiment, name, settings, runs, results, *computed or [None])
        write_whole(record_path(experiment, name), content)
    print(f"drawn to {path}")


# ---------------------------------------------------------------------------------------------- main


def duration(seconds):
    """As in "40 s", "12 minutes", "5.5 hours" or "3.1 days"."""
    for unit, length, below in (("s", 1, 120), ("minutes", 60, 120), ("hours", 3600, 72), ("days", 86400, math.inf)):
        if seconds < below * length:
            return f"{seconds / length:.{1 if length > 60 else 0}f} {unit}"


def dry_run(experiment, runs):
    """Say what would be trained and what it would take; runs that differ in the seed alone take the same."""
    total, most, estimates = 0.0, 0, {}
    for settings in runs:
        run = Run(experiment, settings)
        if run.done():
            print(f"{settings.run_name()}: {run.status()}")
            continue
        network = replace(settings, seed=0)
        if network not in estimates:
            estimates[network] = estimate(run)
        layers, seconds, memory, disk = estimates[network]
        total, most = total + seconds, max(most, memory)
        print(f"{settings.run_name()}: about {duration(seconds)}, {disk / 2**20:.1f} MB of disk")
        if len(runs) == 1:
            print(*layers, sep="\n")
    if estimates:
        print(f"about {duration(total)} in all for one process, which holds {most / 2**20:.0f} MB of memory at most")


def perform(experiment, settings, todo, argv, ranks):
    """Do what the command line asks for; returns the exit code."""
    actions = [act for name, (_, act) in experiment.actions.items() if vars(todo)[name]]
    if ranks.rank and (actions or todo.plot or todo.list or todo.dry_run):  # what one process does
        return 0
    for act in actions:
        act(settings)
    if actions:
        return 0
    if todo.plot:
        plot(experiment, todo.plot, settings, todo.metric, todo.record)
        return 0
    name = experiment.quick_figure if todo.quick_figure else todo.sweep or todo.list
    if name and not experiment.figures[name].trained:
        raise UsageError(f"{name} needs no training; --plot {name} draws it")
    runs = experiment.figures[name].runs(settings) if name else [settings]
    for s in runs:
        s.check()
    if todo.list:
        for s in runs:
            print(f"{s.run_name()}: {Run(experiment, s).status()}")
        print(*experiment.figures[name].notes(settings),
              f"{sum(Run(experiment, s).done() for s in runs)} of {len(runs)} runs are done", sep="\n")
        return 0
    try:
        nn.use_device(settings.device)
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    ranks.use_own_gpu()
    if todo.dry_run:
        dry_run(experiment, runs)
        return 0
    if not name:
        return train_one(Run(experiment, settings, ranks))
    # What has to be downloaded or generated is so once, before several processes ask for it.
    if ranks.size > 1 or settings.jobs > 1 and not todo.worker:
        ranks.first_here(lambda: experiment.load(runs[0]))
    if ranks.size == 1 and settings.jobs > 1 and not todo.worker:
        failed = sweep_in_processes(min(settings.jobs, len(runs)), sys.argv[0], argv)
    else:
        failed = 1 if sweep([Run(experiment, s) for s in runs], ranks, not todo.worker and ranks.size == 1) else 0
    if todo.quick_figure and not failed and not todo.worker and ranks.rank == 0:
        plot(experiment, name, settings, todo.metric, record=False)
    return failed


def train_one(run):
    with run.lock() as mine:
        if not mine:
            raise UsageError(f"another process is training {run.folder}")
        result = run.ranks.broadcast(run.result()) or run.train()
    run.say(f"{run.folder}: {result['weights']:,} weights ({100 * result['connectivity']:.3g} % of dense), "
            f"test accuracy {percent(result['best_test_acc'])} best, {percent(result['final_test_acc'])} final, "
            f"{result['epochs']} epochs in {result['seconds']:.0f} s")
    return 1 if result["diverged"] else 0


def main(experiment, argv=None):
    """The command line of an experiment; returns the exit code. A rank that fails ends the whole job."""
    argv = sys.argv[1:] if argv is None else argv
    ranks, performing = distributed.Alone(), False
    try:
        ranks = distributed.world()
        settings, todo = parse(experiment, argv)
        performing = True
        return perform(experiment, settings, todo, argv, ranks)
    except EXPECTED as error:
        message, code = f"{experiment.script}: {error}", 2
    except OSError as error:
        message, code = f"{experiment.script}: {error.filename or 'a file'}: {error.strerror or error}", 1
    except KeyboardInterrupt:  # outside of training, where nothing is lost
        message, code = "", 130
    except Exception:
        if ranks.size == 1:
            raise
        message, code = traceback.format_exc(), 1
    if performing:
        time.sleep(min(ranks.rank, 1) / 2)  # what all ranks fail of, the first says, and that ends the others
    if message and (performing or ranks.rank == 0):
        print(message, file=sys.stderr, flush=True)
    if performing:
        ranks.abort(code)
    return code
