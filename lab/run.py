"""One run: a network trained from its last checkpoint on, recorded every epoch, stopped and continued bit for bit.

    OUT/<experiment>/<data set>/<run>/  config.json  log.csv  checkpoint.npz  result.json (last: the run is done)

A script's train(run) holds the loop; perform() calls it, and the generators here do what lies between its steps.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
from tqdm import tqdm

import nn
from engines import EngineError
from lab.files import FileFault, as_json, load_arrays, locked, read_json, remove_leftovers, save_arrays, write_whole
from lab.processes import Alone, JobError
from lab.settings import UsageError

ROOT = Path(__file__).resolve().parent.parent
LOOK_EVERY = 0.5  # seconds between looks at loss and accuracy (on a GPU each look waits for it)
FORMAT = 3  # of checkpoints; in 2, weights and masks were whole
PARTS = "model", "optimizer", "progress", "engine"  # of a checkpoint
COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds")

# errors whose message says all that there is to say
EXPECTED = UsageError, FileFault, JobError, nn.StatisticsError, EngineError


class Diverged(Exception):
    """The loss is no longer finite."""


class Run:
    """One training run and its folder. ranks: the processes that train it together, each calling the same methods."""

    share = 1.0  # of the batch at hand, this rank's part
    counted = 0  # sums of the batch at hand, or of the test so far

    def __init__(self, experiment, settings, ranks=Alone()):
        self.experiment, self.settings, self.ranks = experiment, settings, ranks
        self.folder = Path(settings.out, experiment.name, settings.data, settings.run_name())

    # ------------------------------------------------------------------------------------------ what a script calls

    def epochs(self, model, optimizer, dataset):
        """The numbers of the epochs that are left, counted from 0; after the body of each it is recorded.

        Model and optimizer take the state of the last checkpoint first. FileFault if that was trained on other data.
        """
        self.model, self.optimizer, self.dataset = model, optimizer, dataset
        self.stopped = self.at_the_end.enter_context(stop_signals())  # from before the first write
        nn.engine.load_state_dict({})  # what another run of this process took from its checkpoint
        progress = self.load_checkpoint()
        measured = self.ranks.size > 1 and self.ranks.rank == 0  # for all ranks
        nn.engine.load_state_dict(self.ranks.broadcast(nn.engine.state_dict(measured)))
        if self.ranks.rank == 0:
            remove_leftovers(self.folder)
            self.write_config(anew=progress is None)
        about = np.array([json.dumps(self.settings.identity()), nn.engine.name])
        self.ranks.check_same("before training", "settings", about)
        digest = np.array(dataset.digest)
        self.ranks.check_same("before training", "data", digest, dataset.train_labels, dataset.test_labels)
        self.check_same_network("before training")
        if self.ranks.rank == 0 and dataset.unpublished:
            say_once(f"{dataset.name}: {dataset.unpublished}")
        p = self.progress = progress or Progress()
        self.bar = self.at_the_end.enter_context(self.progress_bar())
        self.saved = time.monotonic()
        while p.epoch < self.settings.epochs:
            self.began, self.tested = time.monotonic() - p.seconds, (0.0, 0.0)
            yield p.epoch
            p.end_epoch(float(optimizer.lr), *self.tested, time.monotonic() - self.began)
            self.check_same_network(f"after epoch {p.epoch}")
            if self.save_is_due() or p.epoch == self.settings.epochs:
                self.save_checkpoint()

    def training_batches(self):
        """(x, labels) of the batches of this epoch that are left, of several ranks the share of this one, perhaps none.

        After each step the sums given to count() are added up, and signals and the clock are looked at: SIGTERM,
        SIGINT and SIGHUP save and end the process. Raises Diverged once the loss is not finite.
        """
        s, p, ranks = self.settings, self.progress, self.ranks
        count, nothing, looked = len(self.dataset.train_labels), nn.xp.zeros(2), time.monotonic()
        for x, labels in self.dataset.train_batches(s.batch, s.seed, p.epoch, p.step, (ranks.rank, ranks.size)):
            self.share, self.counted = len(labels) / min(s.batch, count - p.step * s.batch), nothing
            yield x, labels
            sums, seen, told = ranks.sum(self.counted, len(labels), len(self.stopped))
            p.add(nn.xp.asarray(sums), int(seen))
            self.bar.update()
            now = time.monotonic()
            if told or ranks.size > 1 or now - looked > LOOK_EVERY:
                looked = now
                self.look()
                if told:
                    self.stop()
                if self.save_is_due():
                    self.save_amid_epoch()
        self.look()

    def test_batches(self, batch):
        """(x, labels) of batches of so many examples of the test set, on each rank; the sums given to count() become
        the epoch's test loss and accuracy. Signals end the process as they do in training.
        """
        ranks, seen, self.counted = self.ranks, 0, nn.xp.zeros(2)
        for x, labels in self.dataset.test_batches(batch * ranks.size, (ranks.rank, ranks.size)):
            if any(ranks.sum(len(self.stopped))):
                self.stop()
            if len(labels):
                yield x, labels
                seen += len(labels)
        sums, seen = ranks.sum(nn.to_host(self.counted), seen)
        self.tested = tuple(float(total) / max(int(seen), 1) for total in sums)

    def count(self, sums):
        """Count a batch. sums: (2,) of its summed loss and correct answers, as nn.classify gives them, or 0."""
        self.counted = self.counted + sums

    def average(self, model):
        """Replace gradients and running estimates by their means over the ranks, each weighted by its examples."""
        self.ranks.average(model, self.share)

    # ------------------------------------------------------------------------------------------ training

    def perform(self, bar=True):
        """Train from the last checkpoint, or from the beginning, to the end; returns the result.

        Call it while holding lock(). SIGTERM, SIGINT and SIGHUP end it after the step at hand with a checkpoint and
        SystemExit(128 + signal). A loss that is not finite ends the run, recorded as diverged.
        """
        self.show, diverged = bar, False
        # A loss that overflows is noticed and recorded, so NumPy need not warn of it too.
        with contextlib.ExitStack() as self.at_the_end, np.errstate(over="ignore", invalid="ignore"):
            self.at_the_end.callback(self.let_go)
            try:
                self.experiment.train(self)
            except Diverged:
                self.check_same_network("at the end")
                diverged = True
            result = self.finish(diverged)
        if self.stopped:  # asked to stop after the last step: the run is done, but what would follow must not begin
            raise SystemExit(128 + self.stopped[0])
        return result

    def let_go(self):
        """Of what takes memory, which the next run of a sweep needs."""
        self.model = self.optimizer = self.dataset = None

    def check_same_network(self, when):
        """Raise JobError unless all ranks hold the same network."""
        if self.ranks.size > 1:
            state = [*self.model.state_dict(kept=True).values(), *self.optimizer.state_dict().values()]
            self.ranks.check_same(when, "network", *state)

    def progress_bar(self):
        s, p = self.settings, self.progress
        steps = math.ceil(len(self.dataset.train_labels) / s.batch)  # an epoch
        return tqdm(total=s.epochs * steps, initial=p.epoch * steps + p.step, unit="step", mininterval=0.5,
                    disable=None if self.show and self.ranks.rank == 0 else True)

    def look(self):
        """Bring the numbers on the screen up to date; Diverged if they are not finite."""
        loss, accuracy = self.progress.means()
        if not math.isfinite(loss):
            raise Diverged
        text = f"epoch {self.progress.epoch + 1}/{self.settings.epochs} loss {loss:.3f} train {accuracy:.2%}"
        for row in self.progress.history[-1:]:
            text += f" test {row[COLUMNS.index('test_acc')]:.2%}"
        self.bar.set_description(text, refresh=False)

    def stop(self):
        """Save and end the process, as it was asked to."""
        self.save_amid_epoch()
        self.say(f"stopped in epoch {self.progress.epoch + 1}; the same command goes on from here", sys.stderr)
        self.ranks.wait()  # no rank ends before the first has saved
        raise SystemExit(128 + (self.stopped or [signal.SIGTERM])[0])

    # ------------------------------------------------------------------------------------------ what is written

    def write(self, name, content):
        """A whole file in the run's folder; of several ranks the first writes it."""
        if self.ranks.rank == 0:
            write_whole(self.folder / name, content)

    def say(self, text, file=None):
        """One line on the screen, beside the progress bar; of several ranks the first says it."""
        if self.ranks.rank == 0:
            tqdm.write(text, file)

    def write_config(self, anew):
        """config.json: the settings, the data, and of every start that changed them versions, ranks and device."""
        config = None if anew else self.config()
        if not isinstance(config, dict):
            config = {"settings": self.settings.identity()}
        config["data"] = about_data(self.dataset)
        for name, value in (("versions", versions()), ("ranks", self.ranks.size), ("devices", nn.engine.name)):
            before = as_list(config.get(name))
            config[name] = before if before[-1:] == [value] else [*before, value]
        self.write("config.json", as_json(config))

    def save_is_due(self):
        return time.monotonic() - self.saved >= self.settings.save_every

    def save_amid_epoch(self):
        self.progress.seconds = time.monotonic() - self.began
        self.save_checkpoint()

    def save_checkpoint(self):
        """checkpoint.npz with all that a bit-identical continuation needs, then log.csv."""
        if self.ranks.rank:  # all ranks hold the same
            return
        state = {"model": self.model.state_dict(kept=True), "optimizer": self.optimizer.state_dict(),
                 "progress": self.progress.state_dict(), "engine": nn.engine.state_dict()}
        arrays = {f"{part}.{name}": value for part in state for name, value in state[part].items()}
        arrays |= {"settings": np.asarray(json.dumps(self.settings.identity())), "format": np.asarray(FORMAT),
                   "data": np.asarray(self.dataset.digest)}
        self.write("checkpoint.npz", save_arrays(arrays))
        self.write_log()
        self.saved = time.monotonic()

    def write_log(self):
        rows = [",".join([f"{row[0]:.0f}", *map(repr, row[1:])]) for row in self.progress.history]
        self.write("log.csv", "\n".join([",".join(COLUMNS), *rows, ""]))

    def finish(self, diverged):
        """Write result.json; returns the result."""
        rows = self.progress.history
        if diverged:
            self.say(f"{self.settings.run_name()}: the loss is no longer finite in epoch {self.progress.epoch + 1}; "
                     "recorded as diverged")
        self.write_log()  # a cut may have come between the last checkpoint and its log
        layers = [{"name": name, "shape": list(layer.weight.shape), "size": layer.weight.size,
                   "kept": layer.weight.count}
                  for name, layer in nn.layers(self.model)]
        weights = nn.weight_count(self.model)
        result = {"weights": weights, "connectivity": weights / sum(layer["size"] for layer in layers),
                  "layers": layers, "diverged": diverged}
        for name in ("test_acc", "train_acc"):
            accuracies = [row[COLUMNS.index(name)] for row in rows] or [None]
            result |= {f"best_{name}": max(accuracies), f"final_{name}": accuracies[-1]}
        result |= {"epochs": len(rows), "seconds": sum(row[-1] for row in rows), "config": self.config()}
        if self.ranks.rank == 0:
            (self.folder / "failed.json").unlink(missing_ok=True)
        self.write("result.json", as_json(result))  # last: with it, the run is done
        return result

    def record_failure(self, error):
        """Leave failed.json beside what the run has; returns the failure as one line."""
        line = f"{error}" if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # a full disk may be what failed
            self.write("failed.json", as_json({"error": line, "traceback": traceback.format_exception(error)}))
        return line

    # ------------------------------------------------------------------------------------------ what is read

    @contextlib.contextmanager
    def lock(self):
        """Hold the run's folder while it is trained; yields False if another process holds it."""
        with locked(self.folder / "run", wait=False) if self.ranks.rank == 0 else contextlib.nullcontext() as mine:
            yield self.ranks.broadcast(mine)

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

    def status(self, recorded=None):
        """One line for --list. recorded: the result that is told of a run that was never begun here."""
        try:
            result, failure = self.result(), read_json(self.folder / "failed.json")
        except FileFault as fault:
            return f"{fault}"
        if result:
            return outcome("done", result)
        if failure:
            return f"failed: {failure.get('error') if isinstance(failure, dict) else failure}"
        with contextlib.suppress(FileNotFoundError):
            rows = len((self.folder / "log.csv").read_bytes().splitlines()) - 1
            return f"begun: {rows} of {self.settings.epochs} epochs"
        return outcome("recorded", recorded) if recorded else "not begun"

    def failure(self):
        """What tells the failure on record from any other, None without one."""
        with contextlib.suppress(FileNotFoundError):
            status = (self.folder / "failed.json").stat()
            return status.st_ino, status.st_mtime_ns

    def load_checkpoint(self):
        """Put the state of checkpoint.npz, as rank 0 finds it, into model and optimizer; the Progress, None without."""
        path = self.folder / "checkpoint.npz"
        content = self.ranks.broadcast(path.read_bytes() if self.ranks.rank == 0 and path.exists() else None)
        if content is None:
            return None
        try:
            arrays = load_arrays(content)
            if (version := int(arrays.pop("format"))) not in (2, FORMAT):
                raise FileFault(f"it is of format {version}, this program reads {FORMAT} and 2")
            self.check_same_settings(json.loads(str(arrays.pop("settings"))), "it")
            check_same_data(str(arrays.pop("data", "")), self.dataset, "it")
            part = {p: {k.removeprefix(f"{p}."): v for k, v in arrays.items() if k.startswith(f"{p}.")} for p in PARTS}
            for name, array in self.model.state_dict().items():
                if name in part["model"] and part["model"][name].dtype != array.dtype:
                    raise FileFault(f"{name} is of {part['model'][name].dtype} instead of {array.dtype}")
            self.model.load_state_dict(part["model"])
            self.optimizer.load_state_dict(part["optimizer"])
            nn.engine.load_state_dict(part["engine"])
            return Progress(**part["progress"])
        except Exception as error:  # readers raise whatever they stumble on
            reason = error if isinstance(error, FileFault) else f"it is not of this network ({error})"
            raise FileFault(f"{path} cannot be continued: {reason}; remove it to begin this run again") from None

    def check_same_settings(self, saved, it):
        """FileFault that begins with `it` if the settings in a file are not this run's."""
        if wrong := self.settings.differences(saved):
            raise FileFault(f"{it} belongs to a run with other settings: {', '.join(wrong)}")


# ---------------------------------------------------------------------------------------------- data and results


def about_data(dataset):
    """What config.json says of the data: their digest and, if they are not the published ones, which are not."""
    return {"sha256": dataset.digest} | ({"unpublished": dataset.unpublished} if dataset.unpublished else {})


@functools.cache
def say_once(text):
    tqdm.write(text, sys.stderr)


def check_same_data(digest, dataset, it):
    """FileFault that begins with `it` if data of this digest (nothing: not known) are not those of the data set."""
    if digest and dataset.digest and digest != dataset.digest:
        raise FileFault(f"{it} was trained on other data than the {dataset.name} that is found now: their SHA-256 is "
                        f"{digest[:16]} instead of {dataset.digest[:16]}")


def data_of(result):
    """(digest, what is unpublished) of the data a result is of; "" where it does not say."""
    match result:
        case {"config": {"data": {"sha256": str(digest), **rest}}}:
            return digest, str(rest.get("unpublished", ""))
    return str(result.get("digest", "")), str(result.get("unpublished", ""))  # of a record's row


def as_list(value):
    """What is kept of every start; versions were once of the first alone."""
    return value if isinstance(value, list) else [] if value is None else [value]


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
        self.epoch, self.step, self.seen, self.seconds = int(epoch), int(step), int(seen), float(seconds)
        self.sums = nn.xp.asarray([float(loss_sum), int(correct)])  # on the device

    def state_dict(self):
        loss_sum, correct = nn.to_host(self.sums)
        state = dict(history=np.reshape(self.history, (-1, len(COLUMNS))), epoch=self.epoch, step=self.step,
                     loss_sum=loss_sum, correct=correct, seen=self.seen, seconds=self.seconds)
        return {name: np.asarray(value, np.float64) for name, value in state.items()}

    def add(self, sums, seen):
        """Count one step."""
        self.step += 1
        self.seen += seen
        self.sums += sums

    def means(self):
        """(loss, accuracy) over what was seen of this epoch."""
        return [total / self.seen for total in nn.to_host(self.sums).tolist()]

    def end_epoch(self, lr, test_loss, test_acc, seconds):
        row = [self.epoch + 1, lr, *self.means(), test_loss, test_acc, seconds]
        self.__init__([*self.history, row], self.epoch + 1)


@contextlib.contextmanager
def stop_signals():
    """A list that SIGTERM, SIGINT and SIGHUP (the terminal was closed, and nohup does not hide it) put their number
    into, so that neither a step nor a save is cut in the middle: not by a second Ctrl-C either. Only a main thread gets
    signals.
    """
    stopped, signals = [], [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        signals = []
    before = {sig: signal.signal(sig, lambda number, frame: stopped.append(number)) for sig in signals}
    try:
        yield stopped
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def outcome(word, result):
    """How a run ended, for --list."""
    if result["diverged"]:
        return f"{word}: diverged in epoch {result['epochs'] + 1}"
    return f"{word}: test {percent(result['best_test_acc'])} best, {percent(result['final_test_acc'])} final"


def percent(fraction):
    return "-" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.2f} %"


# ---------------------------------------------------------------------------------------------- versions


@functools.cache
def code_version():
    """A hash of the project's modules and, in a git checkout, the commit."""
    sources = [path for folder in ("", "engines", "datasets", "lab") for path in sorted((ROOT / folder).glob("*.py"))]
    sources.append(ROOT / "engines" / "gpu.cu")
    content = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]

    words = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty= with changes"]
    try:
        commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return content
    return f"{content} on commit {commit}"


def versions():
    """What a record needs to be repeated: versions and machine."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = (re.findall(r"model name\s*: (.+)", about) or [platform.processor()])[0]
    return {"python": platform.python_version(), nn.xp.__name__: nn.xp.__version__, "code": code_version(),
            "device": nn.engine.name, **nn.engine.versions(), "processor": processor, "cores": os.cpu_count()}
