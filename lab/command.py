"""The command line of the experiments: --help is made from their Settings and Figures.

    sys.exit(lab.main(EXPERIMENT))
"""

import argparse
import contextlib
import errno
import math
import os
import shlex
import sys
import time
import traceback
import typing
import warnings
from dataclasses import fields, replace

import numpy as np

import nn
from engines import listed
from lab.figures import plot, recorded_runs
from lab.files import FileFault, without_downloads
from lab.processes import Alone, world
from lab.run import EXPECTED, Run, check_same_data, data_of, percent
from lab.settings import Experiment, UsageError, flag
from lab.sweep import WORKER, sweep, sweep_in_processes


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line end in one sentence and exit code 2; of several ranks the first says it."""

    def _print_message(self, message, file=None):
        if world().rank == 0:
            super()._print_message(message, file)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parse(experiment, argv):
    """The command line as (Settings, namespace of what to do with them)."""
    parser = Parser(prog=experiment.command, description=experiment.description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(experiment.figures)
    todo = parser.add_argument_group("figures and sweeps", "\n".join(
        ["FIGURE is one of", *(f"  {name:12} {figure.help}" for name, figure in experiment.figures.items())]))
    todo.add_argument("--sweep", metavar="FIGURE", help="train every run of a figure that is not in --out yet, even if "
                      "results/ has its numbers")
    todo.add_argument("--list", metavar="FIGURE", help="name the runs of a figure and say which are done")
    todo.add_argument("--plot", metavar="FIGURE", help="draw a figure from what is done and print its table")
    todo.add_argument("--metric", choices=("best", "final"), default="best",
                      help="figures show the best test accuracy over epochs (the paper's protocol) or the final one")
    todo.add_argument("--record", action="store_true", help="with --plot: keep picture and numbers in results/")
    todo.add_argument("--quick", action="store_true", help=f"a small version: {experiment.quick_help}")
    todo.add_argument("--dry-run", action="store_true",
                      help="only say what would be trained, and estimate time, memory and disk")
    for action, (help, number, _) in experiment.actions.items():
        how = dict(type=int, metavar=number) if number else dict(action="store_true", default=None)
        todo.add_argument(f"--{action}", help=help, **how)
    group = parser.add_argument_group("settings")
    types = typing.get_type_hints(experiment.settings)
    for f in fields(experiment.settings):
        kind = (*typing.get_args(types[f.name]), types[f.name])[0]  # float | None -> float
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction if f.default else "store_true", help=f.metadata["help"])
        else:
            metavar = "|".join(f.metadata["choices"] or [kind.__name__[0].upper()])
            how = dict(type=kind, metavar=metavar, help=f"{f.metadata['help']} (default: {f.default})")
            if kind is str and f.metadata["place"]:
                how["type"] = os.path.expanduser  # --out=~/runs, which shells leave as it is
        group.add_argument(flag(f.name), default=f.default, **how)
    given = {word.split("=")[0] for word in argv}
    if "--quick" in given:
        parser.set_defaults(**experiment.quick)
    todo = parser.parse_args(argv)
    todo.quick_figure = todo.quick and not given & {"--width", "--sweep", "--list", "--plot"}
    settings = experiment.settings(**{f.name: vars(todo).pop(f.name) for f in fields(experiment.settings)})
    asked = [name for name in (todo.sweep, todo.list, todo.plot) if name]
    if len(asked) > 1:
        raise UsageError("only one of --sweep, --list and --plot can be done at a time")
    for action in experiment.actions:
        if flag(action) in given and (asked or todo.dry_run):
            raise UsageError(f"{flag(action)} is done alone, without --sweep, --list, --plot and --dry-run")
    if asked and asked[0] not in experiment.figures:
        raise UsageError(f"there is no figure {asked[0]!r}; there are {names}")
    for name, instead in experiment.figures_choose.items():
        if (asked or todo.quick_figure) and flag(name) in given:
            raise UsageError(f"figures take {instead}; {flag(name)} is for a single network")
    settings.check()
    for word in ("--bases", "--widths", "--seeds", "--jobs", "--metric", "--record"):
        if word in given and not (asked or todo.quick_figure):
            raise UsageError(f"{word} is about figures: it goes with --sweep, --list or --plot")
    return settings, todo


# ---------------------------------------------------------------------------------------------- what a run would take


class DryRun(Run):
    """A run that times a few steps and leaves nothing behind. memory: of the GPU on one, else of this process."""

    STEPS, ENOUGH = 20, 5  # that are timed, and seconds after which fewer do
    SLOW = {"cpu": 1, "gpu": 3}  # steps that are slower: measured, compiled, planned and captured by then

    def epochs(self, model, optimizer, dataset):
        self.optimizer, self.dataset = optimizer, dataset
        yield 0
        self.table = [f"  {name:12} {'x'.join(map(str, layer.weight.shape)):>14} keeps {layer.weight.count:,} of "
                      f"{layer.weight.size:,}" for name, layer in nn.layers(model)]
        self.table.append(f"  {nn.weight_count(model):,} weights in all")
        arrays = [*model.state_dict(kept=True).values(), *optimizer.state_dict().values()]
        self.disk = sum(a.nbytes for a in arrays) + 100 * self.settings.epochs
        self.memory = nn.engine.memory() or peak_memory()
        self.seconds = self.settings.epochs * (self.training + self.testing)

    def training_batches(self):
        s, dataset = self.settings, self.dataset
        self.optimizer.lr = 0  # the estimate must not depend on how training would go
        step = yield from self.timed(dataset.train_batches(s.batch, s.seed, 0))
        self.training = step * math.ceil(len(dataset.train_labels) / s.batch)

    def test_batches(self, batch):
        step = yield from self.timed(self.dataset.test_batches(batch))
        self.testing = step * len(self.dataset.test_labels) / min(batch, len(self.dataset.test_labels))

    def timed(self, batches):
        """Some of the batches; returns the least time of what is done with one, or of making it where that is more:
        what else runs on the machine does not count.
        """
        times, slow = [], self.SLOW[nn.engine.name]
        begin = time.perf_counter()
        for batch in batches:
            yield batch
            nn.engine.synchronize()
            times.append(-begin + (begin := time.perf_counter()))
            counted = times[slow:]
            if len(counted) == self.STEPS or len(counted) > 1 and np.sum(counted) > self.ENOUGH:
                break
        return min(times[slow:] or times[-1:])


def peak_memory():
    """The most memory this process has held, in bytes (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def duration(seconds):
    """As in "40 s", "12 minutes", "5.5 hours" or "3.1 days"."""
    for unit, length, below in (("s", 1, 120), ("minutes", 60, 120), ("hours", 3600, 72), ("days", 86400, math.inf)):
        if seconds < below * length:
            return f"{seconds / length:.{1 if length > 60 else 0}f} {unit}"


def dry_run(experiment, runs):
    """Say what would be trained and what it would take; runs that differ in seed and learning rate take the same."""
    total, most, estimates = 0.0, 0, {}
    for settings in runs:
        run = DryRun(experiment, settings)
        if run.done():
            print(f"{settings.run_name()}: {run.status()}")
            continue
        network = replace(settings, seed=0, lr=0.0)
        if network not in estimates:
            with np.errstate(over="ignore", invalid="ignore"):
                experiment.train(run)
            run.optimizer = run.dataset = None  # the next one needs the memory
            estimates[network] = run
        run = estimates[network]
        total, most = total + run.seconds, max(most, run.memory)
        print(f"{settings.run_name()}: about {duration(run.seconds)}, {run.disk / 2**20:.1f} MB of disk")
        if len(runs) == 1:
            print(*run.table, sep="\n")
    if estimates:
        print(f"about {duration(total)} in all for one process, which holds {most / 2**20:.0f} MB of "
              f"{'the GPU' if nn.engine.name == 'gpu' else 'memory'} at most")


# ---------------------------------------------------------------------------------------------- what is done


def perform(experiment, settings, todo, argv, ranks):
    """Do what the command line asks for; returns the exit code."""
    actions = [(act, [given] if number else []) for name, (_, number, act) in experiment.actions.items()
               if (given := vars(todo)[name.replace("-", "_")]) is not None]
    if ranks.rank and (actions or todo.plot or todo.list or todo.dry_run):  # what one process does
        return 0
    for act, number in actions:
        act(settings, *number)
    if actions:
        return 0
    name = experiment.quick_figure if todo.quick_figure else todo.sweep or todo.list or todo.plot
    figure = experiment.figures.get(name)
    with plain_warnings(f"{experiment.command}: ", heard=ranks.here == 0 and WORKER not in os.environ):
        settings = settings.on_device(ranks.here, 1 if figure else ranks.size, training=not (todo.list or todo.plot))
    if todo.plot:
        plot(experiment, name, settings, todo.metric, todo.record)
        return 0
    if figure and not figure.trained:
        raise UsageError(f"{name} needs no training; --plot {name} draws it")
    chosen = sorted(figure.runs(settings), key=lambda s: s.cost, reverse=True) if figure else [settings]
    for s in chosen:
        s.check()
    if todo.dry_run:
        dry_run(experiment, chosen)
        return 0
    runs = [Run(experiment, s, Alone() if figure else ranks) for s in chosen]
    if not figure:
        ranks.check_devices()
        return train_one(*runs)
    if todo.list:
        _, rows = recorded_runs(experiment, name, settings.data)
        recorded = [rows.get((s.data, s.run_name())) for s in chosen]
        status = {run.settings.run_name(): run.status(row) for run, row in zip(runs, recorded)}
        others = sum(text.startswith("recorded: ") for text in status.values())
        print(*[f"{run}: {text}" for run, text in status.items()], *figure.notes(settings),
              f"{sum(run.done() for run in runs)} of {len(runs)} runs are done"
              + (f", {others} recorded in results/" if others else ""), sep="\n")
        return 0
    worker = WORKER in os.environ
    if not worker and ranks.rank == 0:
        compare_data(experiment, runs)
    ranks.wait()  # before the others begin
    if ranks.size == 1 and settings.jobs > 1 and not worker:
        code = sweep_in_processes(min(settings.jobs, len(runs)), experiment.script, argv)
    else:
        code = 1 if sweep(runs, ranks, not worker and ranks.size == 1) else 0
    if todo.quick_figure and not code and not worker and ranks.rank == 0:
        plot(experiment, name, settings, todo.metric, record=False)
    return code


@contextlib.contextmanager
def plain_warnings(begin, heard):
    """Warnings are lines of stderr that begin so, if they are to be heard, without a place in the code."""
    def show(message, *where):
        if heard:
            print(begin + " ".join(str(message).split()), file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def compare_data(experiment, runs):
    """FileFault if runs that are done were trained on other data than those that are found now; no more than a word if
    these are not here: nothing is downloaded to be compared.
    """
    digests = {run: data_of(run.result())[0] for run in runs if run.done()}
    if any(digests.values()):
        try:
            with without_downloads():
                dataset = experiment.load(runs[0].settings)
        except FileFault as fault:
            reason = str(fault).split("; ")[0]
            runs[0].say(f"the data were not compared with those it was trained on: {reason}", sys.stderr)
            return
        for run, digest in digests.items():
            check_same_data(digest, dataset, f"{run.folder / 'result.json'}: it")


def train_one(run):
    with run.lock() as mine:
        if not mine:
            raise UsageError(f"another process is training {run.folder}")
        result = run.ranks.broadcast(run.result())
        if run.ranks.rank == 0:
            compare_data(run.experiment, [run])
        result = result or run.perform()
    run.say(f"{run.folder}: {result['weights']:,} weights ({100 * result['connectivity']:.3g} % of dense), "
            f"test accuracy {percent(result['best_test_acc'])} best, {percent(result['final_test_acc'])} final, "
            f"{result['epochs']} epoch{'s' * (result['epochs'] != 1)} in {result['seconds']:.0f} s"
            + (f"; diverged: the loss was no longer finite in epoch {result['epochs'] + 1}"
               if result["diverged"] else ""))
    return 1 if result["diverged"] else 0


class Screen:
    """stdout or stderr. Once nobody can read it (a closed terminal, | head) writing to it does nothing: no work depends
    on who is looking. What its encoding has no character for becomes a question mark.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None where the shell closed it

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return self.attempt(self.stream.write, text.encode(encoding, "replace").decode(encoding))

    def flush(self):
        return self.attempt(self.stream.flush)

    def isatty(self):
        return bool(self.attempt(self.stream.isatty))

    def attempt(self, work, *arguments):
        try:
            return work(*arguments)
        except ValueError:  # it was closed
            pass
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # for good; Python flushes it once more when it ends
                with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def screens():
    """stdout and stderr are Screens; of several threads that are inside, the first one's."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, Screen):
        yield
        return
    sys.stdout, sys.stderr = map(Screen, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def main(experiment, argv=None):
    """The command line of an experiment; returns the exit code. A rank that fails ends the whole job.

    argv: a list of words, or all of them in one text; by default the program's own. A run that is told to stop by a
    signal saves and raises SystemExit, so that the program does not go on.
    """
    if not isinstance(experiment, Experiment):
        raise TypeError(f"main takes a script's EXPERIMENT, not {experiment!r:.60}")
    if isinstance(argv, str):
        argv = shlex.split(argv)  # ValueError for a quotation without an end
    argv = sys.argv[1:] if argv is None else [str(word) for word in listed(argv, "argv")]
    with screens(), np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):  # NumPy's own
        return command(experiment, argv)


def command(experiment, argv):
    ranks, performing, script = Alone(), False, experiment.command
    try:
        ranks = world()
        try:
            settings, todo = parse(experiment, argv)
        except SystemExit as end:  # argparse has said what there is to say
            return end.code
        performing = True
        return perform(experiment, settings, todo, argv, ranks)
    except EXPECTED as error:
        message, code = f"{script}: {error}", 2
    except OSError as error:
        mendable = isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError))  # a wrong setting
        message, code = f"{script}: {error.filename or 'a file'}: {error.strerror or error}", 2 if mendable else 1
    except MemoryError as error:
        message, code = f"{script}: there is not enough memory for this ({error}); --dry-run estimates it", 1
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
        time.sleep(0.2 if ranks.size > 1 else 0)  # what mpirun has not passed on by then may be lost
    if performing:
        ranks.abort(code)
    return code
