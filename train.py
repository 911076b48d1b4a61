"""Runs and sweeps: how one network is trained, recorded and continued, and many of them.

One run fits a network, records every epoch, survives being cut at any moment and goes on bit for bit where it
stopped. A sweep trains all runs of a figure that are not done yet, with as many processes as wanted.

    OUT/<experiment>/<data set>/<run>/  config.json  log.csv  checkpoint.npz  result.json (last: the run is done)
"""

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
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

import conv
import data
import distributed
import nn
from files import FileFault, as_json, hold, load_arrays, read_json, remove_leftovers, save_arrays, write_whole
from loop import GraphSteps, Steps

ROOT = Path(__file__).resolve().parent
LOOK_EVERY = 0.5  # seconds between looks at loss and accuracy (on a GPU each look waits for it)


class UsageError(Exception):
    """Something the user asked for that cannot be done; the message is one sentence."""


# errors whose message says all that there is to say
EXPECTED = UsageError, FileFault, data.DataError, distributed.JobError, nn.StatisticsError, conv.EngineError

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
    device: str = setting("auto", "where to compute: auto takes a GPU if one is usable", choices=("auto", "cpu", "gpu"),
                          place=True)
    graph: bool = setting(True, "on a GPU, capture training steps as CUDA graphs; without, slower, the same bits",
                          place=True)
    jobs: int = setting(1, "processes of a sweep", least=1, place=True)
    save_every: float = setting(30.0, "seconds between checkpoints", least=0, place=True)
    seeds: int = setting(0, "seeds of a sweep (0: as many as its figure shows)", least=0, place=True)

    ENGINE = ()  # settings that nn.use_device takes for a GPU
    ALWAYS_NAMED = ("seed",)  # other settings are in a run's name when they differ from their default

    def check(self):
        """Raise UsageError for a value out of range; experiments extend it."""
        for f in fields(self):
            value, least, choices = getattr(self, f.name), f.metadata["least"], f.metadata["choices"]
            if least is not None and value is not None and not (value >= least and math.isfinite(value)):
                raise UsageError(f"--{f.name.replace('_', '-')} must be a number of at least {least}, not {value}")
            if choices and value not in choices:
                raise UsageError(f"--{f.name.replace('_', '-')} is one of {', '.join(choices)}, not {value}")

    def use_device(self, number=0):
        """Compute where these settings say, on the GPU of this number if on one; UsageError if that is not possible."""
        try:
            device = nn.use_device(self.device, number, **{name: getattr(self, name) for name in self.ENGINE})
        except RuntimeError as error:
            raise UsageError(str(error)) from None
        if device == "cpu":
            for f in fields(self):
                if f.name in self.ENGINE and getattr(self, f.name) != f.default:
                    raise UsageError(f"--{f.name} is for GPUs, and this would be trained on the CPU")

    def part_of(self, dataset):
        """The data set as --held-out and then --limit leave it."""
        dataset = dataset.held_out(self.held_out) if self.held_out else dataset
        return dataset.limited(self.limit) if self.limit else dataset

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


@functools.cache
def code_version():
    """A hash of the project's modules and, in a git checkout, the commit."""
    sources = [*sorted(ROOT.glob("*.py")), ROOT / "gpu.cu"]
    content = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]

    def git(*words):
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--", "*.py", "*.cu") else ""
        return f"{content} on commit {git('rev-parse', '--short', 'HEAD')}{changed}"
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return content


def versions():
    """What a record needs to be repeated: versions and machine."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    device = {"device": "gpu", **nn.gpu.versions()} if nn.gpu else {"device": "cpu"}
    return {"python": platform.python_version(), nn.xp.__name__: nn.xp.__version__, "code": code_version(), **device,
            "processor": processor, "cores": os.cpu_count()}


# ---------------------------------------------------------------------------------------------- one run

FORMAT = 2  # of checkpoints
COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds")


@dataclass(frozen=True)
class Experiment:
    """What main() needs to know of a script.

    load(settings) -> data.Dataset; build(settings, dataset) -> nn.Module with weights and masks drawn;
    optimizer(settings, parameters) -> nn.SGD; schedule(settings) -> learning rate of an epoch.
    quick: the settings that --quick changes; quick_figure: what it sweeps and draws if no width is given.
    test_batch: images evaluated at a time. together: settings in which networks may differ that a GPU trains as one
    (see together.py; none: one at a time). figures_ignore: {setting: the flags that figures take in its place}.
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
    together: tuple = ()
    figures_ignore: dict = field(default_factory=dict)
    actions: dict = field(default_factory=dict)


class Run:
    """One training run and its folder. ranks: the processes that train it together, each calling the same methods."""

    def __init__(self, experiment, settings, ranks=distributed.Alone()):
        self.experiment, self.settings, self.ranks = experiment, settings, ranks
        self.folder = Path(settings.out, experiment.name, settings.data, settings.run_name())

    def result(self):
        """result.json as a dict, None as long as the run is not done. FileFault if it was not written by this run."""
        path = self.folder / "result.json"
        result = check_result(read_json(path), path)
        match result:
            case {"config": {"settings": dict(saved)}}:
                self.check_same_settings(saved, f"{path}: it")
        return result

    def config(self):
        """config.json, None if it is not there or no longer readable."""
        with contextlib.suppress(FileFault):
            return read_json(self.folder / "config.json")

    def done(self):
        return (self.folder / "result.json").exists()

    def status(self):
        """One line for --list."""
        try:
            result, failure = self.result(), read_json(self.folder / "failed.json")
        except FileFault as fault:
            return f"{fault}"
        if result:
            if result["diverged"]:
                return f"diverged in epoch {result['epochs'] + 1}"
            return f"done: test {percent(result['best_test_acc'])} best, {percent(result['final_test_acc'])} final"
        if failure:
            return f"failed: {failure.get('error') if isinstance(failure, dict) else failure}"
        try:
            with open(self.folder / "log.csv", "rb") as log:
                return f"begun: {sum(1 for _ in log) - 1} of {self.settings.epochs} epochs"
        except FileNotFoundError:
            return "not begun"

    def failure(self):
        """What tells the failure on record from any other, None without one."""
        with contextlib.suppress(FileNotFoundError):
            status = (self.folder / "failed.json").stat()
            return status.st_ino, status.st_mtime_ns

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
        with stop_signal() as stopped:  # from before the first write until after the last one
            progress = self.begin(model, optimizer)
            about = np.array(json.dumps(s.identity())), np.array(nn.xp.__name__)
            self.ranks.check_same("before training", "settings or data", *about, dataset.train_labels,
                                  dataset.test_labels)
            self.check_same_network("before training", model)
            steps = self.steps(dataset, model, optimizer, stopped)
            bar = progress_bar(s, dataset, progress, disable=None if bar and self.ranks.rank == 0 else True)
            finite, self.saved = True, time.monotonic()
            # A loss that overflows is noticed and recorded, so NumPy need not warn of it too.
            with bar, np.errstate(over="ignore", invalid="ignore"):
                while finite and progress.epoch < s.epochs:
                    finite = self.epoch(steps, schedule(progress.epoch), progress, bar)
                    self.check_same_network(f"after epoch {progress.epoch}", model)
                    if finite and (self.save_is_due() or progress.epoch == s.epochs):
                        self.save_checkpoint(model, optimizer, progress)
            result = self.write_result(model, progress, diverged=not finite)
        if stopped:  # asked to stop after the last step: the run is done, but what would follow must not begin
            raise SystemExit(128 + stopped[0])
        return result

    def begin(self, model, optimizer):
        """How far the run is, with that state in model and optimizer; its folder is made ready to go on."""
        if self.ranks.rank == 0:
            remove_leftovers(self.folder)
        progress = self.load_checkpoint(model, optimizer)
        self.write_config(anew=progress is None)
        return progress or Progress()

    def check_same_network(self, when, model):
        """JobError unless weights, masks and estimates are the same on all ranks; also their names, in order."""
        if self.ranks.size > 1:
            state = model.state_dict()
            self.ranks.check_same(when, "network", np.array(list(state)), *state.values())

    def write_config(self, anew):
        """config.json of a run that begins; of one that goes on, with another number of ranks if there is another."""
        config = None if anew else self.config()
        if not (isinstance(config, dict) and isinstance(config.get("ranks"), list)):
            config = {"settings": self.settings.identity(), "versions": versions(), "ranks": []}
        if config["ranks"][-1:] != [self.ranks.size]:
            config["ranks"].append(self.ranks.size)
            self.write("config.json", as_json(config))

    def steps(self, dataset, model, optimizer, stopped=()):
        """What does the steps of this run."""
        kind = GraphSteps if nn.gpu and self.ranks.size == 1 else Steps
        return kind(self.settings, dataset, model, optimizer, self.experiment.test_batch, self.ranks, stopped)

    def epoch(self, steps, lr, progress, bar):
        """Train to the end of the epoch at hand and evaluate; False if the loss is not finite."""
        s, model, optimizer = self.settings, steps.model, steps.optimizer
        begin = looked = time.monotonic()
        optimizer.lr = lr
        for stop in steps.train(progress):
            bar.update()
            now = time.monotonic()
            if stop or self.ranks.size > 1 or now - looked > LOOK_EVERY:
                looked = now
                steps.read(progress)
                if not progress.finite():
                    return False
                bar.set_description(progress.description(s.epochs), refresh=False)
                if stop or self.save_is_due():
                    progress.seconds += now - begin
                    begin = now
                    if stop:
                        self.stop(model, optimizer, progress, steps.stopped)
                    self.save_checkpoint(model, optimizer, progress)
        steps.read(progress)
        if not progress.finite():
            return False
        bar.set_description(progress.description(s.epochs), refresh=False)
        found = steps.evaluate()
        progress.seconds += time.monotonic() - begin
        if not found:
            self.stop(model, optimizer, progress, steps.stopped)
        progress.end_epoch(lr, *found)
        return True

    def stop(self, model, optimizer, progress, stopped):
        """Save and end the process, as it was asked to."""
        self.save_checkpoint(model, optimizer, progress)
        self.say(how_to_go_on(progress), sys.stderr)
        self.ranks.broadcast(None)  # no rank ends before the first has saved
        raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])

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
        arrays["format"] = np.asarray(FORMAT)
        self.write("checkpoint.npz", save_arrays(arrays))
        self.write_log(progress)
        self.saved = time.monotonic()

    def load_checkpoint(self, model, optimizer):
        """Put the state of checkpoint.npz, as rank 0 finds it, into model and optimizer; the Progress, None without."""
        path = self.folder / "checkpoint.npz"
        content = self.ranks.broadcast(path.read_bytes() if self.ranks.rank == 0 and path.exists() else None)
        if content is None:
            return None
        try:
            arrays = load_arrays(content)
            if (version := int(arrays.pop("format"))) != FORMAT:
                raise FileFault(f"it is of format {version}, this program reads {FORMAT}")
            self.check_same_settings(json.loads(str(arrays.pop("settings"))), "it")
            part = {p: {k.removeprefix(f"{p}."): v for k, v in arrays.items() if k.startswith(f"{p}.")}
                    for p in ("model", "optimizer", "progress")}
            wrong = [f"{name} is of {part['model'][name].dtype} instead of {array.dtype}"
                     for name, array in model.state_dict().items()
                     if name in part["model"] and part["model"][name].dtype != array.dtype]
            if wrong:
                raise FileFault("; ".join(wrong))
            model.load_state_dict(part["model"])
            optimizer.load_state_dict(part["optimizer"])
            return Progress(**part["progress"])
        except Exception as error:  # readers raise whatever they stumble on
            reason = error if isinstance(error, FileFault) else f"it is not of this network ({error})"
            raise FileFault(f"{path} cannot be continued: {reason}; remove it to begin this run again") from None

    def check_same_settings(self, saved, it):
        """FileFault that begins with `it` if the settings in a file are not this run's."""
        wrong = [f"{f.name} {saved.get(f.name, f.default)} instead of {getattr(self.settings, f.name)}"
                 for f in fields(self.settings) if not f.metadata["place"]
                 and saved.get(f.name, f.default) != getattr(self.settings, f.name)]
        if wrong:
            raise FileFault(f"{it} belongs to a run with other settings: {', '.join(wrong)}")

    def write_log(self, progress):
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([[int(row[0]), *map(repr, map(float, row[1:]))] for row in progress.history])
        self.write("log.csv", rows.getvalue())

    def write_result(self, model, progress, diverged):
        if diverged:
            self.say(f"{self.settings.run_name()}: the loss is no longer finite in epoch {progress.epoch + 1}; "
                     "recorded as diverged")
        self.write_log(progress)  # a cut may have come between the last checkpoint and its log
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
                   "config": self.config()}
        if self.ranks.rank == 0:
            (self.folder / "failed.json").unlink(missing_ok=True)
        self.write("result.json", as_json(result))  # last: with it, the run is done
        return result


NUMBERS = ("weights", "connectivity", "epochs", "seconds", "best_test_acc", "final_test_acc", "best_train_acc",
           "final_train_acc")


def check_result(result, where):
    """The result of a run if it is one, or None; FileFault that begins with `where` if a number in it is none."""
    if result is None:
        return None
    if not isinstance(result, dict):
        raise FileFault(f"{where}: a result is an object, not {type(result).__name__}")
    if not isinstance(result.get("diverged"), bool):
        raise FileFault(f"{where}: diverged is {result.get('diverged')!r} instead of true or false")
    for name in NUMBERS:
        value = result.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if not number and not (value is None and result["diverged"] and name.endswith("_acc")):
            raise FileFault(f"{where}: {name} is {value!r} instead of a number")
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


@contextlib.contextmanager
def stop_signal():
    """A list that SIGTERM and SIGINT put their number into, so that neither a step nor a save is cut in the middle: not
    by a second Ctrl-C either.
    """
    stopped = []
    before = {sig: signal.signal(sig, lambda number, frame: stopped.append(number))
              for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def how_to_go_on(progress):
    return f"stopped in epoch {progress.epoch + 1}; the same command goes on from here"


def progress_bar(settings, dataset, progress, **options):
    """The bar of a run over all its steps, from where it is."""
    steps = math.ceil(len(dataset.train_labels) / settings.batch)  # an epoch
    return tqdm(total=settings.epochs * steps, initial=progress.epoch * steps + progress.step, unit="step",
                mininterval=0.5, **options)


def percent(fraction):
    return "-" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.2f} %"


# ---------------------------------------------------------------------------------------------- sweeps


def sweep(runs, ranks=distributed.Alone(), bar=True):
    """Train the runs that are not done, each under its lock; returns how many failed, on all ranks together.

    Any number of processes may do this for the same runs at once. Whoever is through waits for the others, and
    takes over the run of one that died. The ranks of a job share the runs out among themselves. A run that fails is
    recorded in its folder, the others go on; it is tried again by the next sweep, not by another process of this one.
    If a rank is told to stop, none begins another run, and all end with SystemExit once theirs are done or saved too.
    """
    if ranks.size == 1:
        return train_those(runs, ranks.hand_out(len(runs)), bar)
    failed = 0
    with stop_signal() as stopped:  # a rank that waits for the others must not end and take them with it
        with contextlib.closing(ranks.hand_out(len(runs))) as numbers:
            try:
                failed = train_those(runs, numbers, bar, stopped)
            except SystemExit as stop:
                stopped.append(stop.code - 128)
        failed, told = ranks.sum_when_ready(failed, len(stopped))
    if told:
        raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])
    return int(failed)


def train_those(runs, numbers, bar, stopped=()):
    """Train the runs of these numbers that are not done, until `stopped` fills; returns how many failed."""
    before = [run.failure() for run in runs]
    failed, waiting = 0, numbers
    while waiting:
        busy = []
        for i in waiting:
            run = runs[i]
            if stopped:
                return failed
            if run.done():
                continue
            with run.lock() as mine:
                if not mine:
                    busy.append(i)
                elif run.failure() not in (None, before[i]):  # of another process, meanwhile
                    failed += 1
                elif not run.done():
                    try:
                        announce(run, run.train(bar), runs)
                    except Exception as error:
                        failed += 1
                        print(f"{run.settings.run_name()}: {run.record_failure(error)}", file=sys.stderr, flush=True)
        waiting = busy
        if busy:
            time.sleep(1)
    return failed


def announce(run, result, runs):
    """Say that a run of a sweep is done."""
    print(f"[{sum(r.done() for r in runs)}/{len(runs)}] {run.settings.run_name()}: "
          f"test {percent(result['best_test_acc'])} in {result['seconds']:.0f} s", flush=True)


def sweep_in_processes(jobs, script, argv):
    """The same command in `jobs` processes that share the cores; returns the worst exit code."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = {k: v for k, v in os.environ.items() if k not in distributed.SIZES}  # a worker is no rank of a job
    env |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
                         threads)
    command = [sys.executable, script, *argv, "--worker"]
    with stop_signal() as stopped:
        workers = [subprocess.Popen(command, env=env) for _ in range(jobs)]
        while None in [w.poll() for w in workers] and not stopped:
            time.sleep(0.1)
        for w in workers if stopped else ():
            w.terminate()  # each writes its checkpoint
        codes = [w.wait() for w in workers]
    if stopped:
        return 128 + stopped[0]
    ended = [code for code in codes if code >= 0]  # none of them before all runs were done or had failed
    for code in codes:
        if code < 0:
            print(f"a process of the sweep was ended by signal {-code}"
                  + ("; the others went on with its run" if ended else ""), file=sys.stderr, flush=True)
    return max(ended) if ended else 128 - min(codes)
