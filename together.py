"""Many small networks trained as one: on a GPU, where one alone would leave most of it idle.

Networks of one shape become one whose parameters have a leading axis (networks, ...): a launch then does for all what
it would do for each. Every network keeps its seed, masks, order of examples, learning rate and run folder, so each
comes out as if it were trained alone, up to rounding, and can be continued alone or in other company.
"""

import contextlib
import sys
import time
from dataclasses import fields, replace

import numpy as np
from tqdm import tqdm

import nn
from loop import GraphSteps
from train import EXPECTED, LOOK_EVERY, announce, how_to_go_on, progress_bar, stop_signal


def stack(models, whole):
    """Make `whole`, a network of the shape of all these, into all of them, and return it: its parameters become
    (networks, ...), it takes (networks, batch, ...) and gives (networks, batch, ...).
    """
    if any(True for _ in whole.named_arrays(nn.xp.ndarray)):
        raise ValueError("networks with arrays besides their parameters cannot be trained as one")
    for p, *parts in zip(*(m.parameters() for m in (whole, *models)), strict=True):
        masked = any(q.mask is not None for q in parts)
        masks = [nn.xp.ones(q.shape, bool) if q.mask is None else q.mask for q in parts] if masked else None
        p.data = nn.xp.stack([q.data for q in parts])
        p.set_mask(masks and nn.xp.stack(masks))
    for _, module in whole.named_modules():
        if isinstance(module, nn.Flatten):
            module.kept = 2
    return whole


class Progresses:
    """The progress of networks trained as one: sums are arrays, one entry for each."""

    def __init__(self, parts):
        self.parts, (first, *_) = parts, parts
        self.epoch, self.step, self.seen = first.epoch, first.step, first.seen
        self.loss_sum, self.correct = [p.loss_sum for p in parts], [p.correct for p in parts]

    def settle(self, seconds):
        """Bring the parts up to date, which took this time together."""
        for p, loss_sum, correct in zip(self.parts, self.loss_sum, self.correct):
            p.step, p.seen, p.loss_sum, p.correct = self.step, self.seen, loss_sum, int(correct)
            p.seconds += seconds / len(self.parts)

    def end_epoch(self, rates, losses, accuracies):
        for p, *found in zip(self.parts, rates, losses, accuracies):
            p.end_epoch(*map(float, found))
        self.__init__(self.parts)


class Group:
    """Runs of one shape that have come equally far, each with its lock held. sweep: all runs that are asked for."""

    def __init__(self, runs, dataset, states, stopped, sweep):
        self.runs, self.states, self.stopped, self.sweep = runs, states, stopped, sweep
        models, optimizers, progress = zip(*states)
        experiment, s = runs[0].experiment, runs[0].settings
        whole = stack(models, experiment.build(s, dataset))
        self.optimizer = experiment.optimizer(s, whole.parameters())
        self.progress = Progresses(progress)
        self.optimizer.lr = self.rates()
        saved = [optimizer.state_dict() for optimizer in optimizers]
        self.optimizer.load_state_dict({k: np.stack([state[k] for state in saved]).reshape(-1) for k in saved[0]})
        self.steps = GraphSteps(s, dataset, whole, self.optimizer, experiment.test_batch, runs[0].ranks, stopped,
                                members=[run.settings for run in runs])
        self.unfinished = list(range(len(runs)))

    def rates(self):
        """The learning rate of each network in the epoch at hand."""
        return np.array([run.experiment.schedule(run.settings)(self.progress.epoch) for run in self.runs])

    def state(self, i):
        """(model, optimizer, progress) of run i, brought up to date."""
        model, optimizer, progress = self.states[i]
        for p, q in zip(model.parameters(), self.steps.model.parameters()):
            p.data[...] = q.data[i]
        optimizer.load_state_dict({k: v.reshape(len(self.runs), -1)[i]
                                   for k, v in self.optimizer.state_dict().items()})
        return model, optimizer, progress

    def save(self):
        for i in self.unfinished:
            self.runs[i].save_checkpoint(*self.state(i))

    def finish(self, i, diverged=False):
        model, _, progress = self.state(i)
        self.unfinished.remove(i)
        announce(self.runs[i], self.runs[i].write_result(model, progress, diverged), self.sweep)

    def look(self, since):
        """Read sums and clock; a network whose loss is not finite is recorded as diverged. Returns the time."""
        self.steps.read(self.progress)
        now = time.monotonic()
        self.progress.settle(now - since)
        for i in list(self.unfinished):
            if not self.progress.parts[i].finite():
                self.finish(i, diverged=True)
        return now

    def stop(self):
        self.save()
        tqdm.write(how_to_go_on(self.progress), sys.stderr)
        raise SystemExit(128 + self.stopped[0])

    def train(self):
        """Train to the end; SystemExit, with everything saved, if told to stop."""
        s, progress = self.runs[0].settings, self.progress
        bar = progress_bar(s, self.steps.dataset, progress, disable=None, desc=f"{len(self.runs)} networks")
        looked = saved = time.monotonic()
        with bar, np.errstate(over="ignore", invalid="ignore"):
            while self.unfinished and progress.epoch < s.epochs:
                self.optimizer.lr = self.rates()
                for stop in self.steps.train(progress):
                    bar.update()
                    due = time.monotonic() - saved >= s.save_every
                    if stop or due or time.monotonic() - looked > LOOK_EVERY:
                        looked = self.look(looked)
                        if stop:
                            self.stop()
                        if due:
                            self.save()
                            saved = time.monotonic()
                looked = self.look(looked)
                found = self.steps.evaluate()
                if not found:
                    self.stop()
                looked = self.look(looked)
                progress.end_epoch(self.rates(), *found)
            self.save()
            for i in list(self.unfinished):
                self.finish(i)


def company(run):
    """What runs have to have in common to be trained as one."""
    free = {f.name: f.default for f in fields(run.settings) if f.name in run.experiment.together}
    return replace(run.settings, **free)


def train_groups(runs):
    """Train those of the runs that are not done, as one where they are of one shape and have come equally far.

    What is left undone then - runs that another process holds, groups that failed - is for train.sweep().
    """
    groups = {}
    for run in runs:
        groups.setdefault(company(run), []).append(run)
    with stop_signal() as stopped:
        for group in groups.values():
            with contextlib.ExitStack() as locks:
                mine = [run for run in group if not run.done() and locks.enter_context(run.lock()) and not run.done()]
                if len(mine) > 1 and not stopped:
                    try:
                        train_group(mine, stopped, runs)
                    except Exception as error:  # one by one it will be recorded for the run to which it belongs
                        print(f"{len(mine)} networks could not be trained as one ({error}); going on one by one",
                              file=sys.stderr, flush=True)
    if stopped:
        raise SystemExit(128 + stopped[0])


def train_group(runs, stopped, sweep):
    first = runs[0]
    dataset = first.experiment.load(first.settings).to_device()
    equally_far = {}
    for run in runs:
        model = run.experiment.build(run.settings, dataset)
        optimizer = run.experiment.optimizer(run.settings, model.parameters())
        try:
            progress = run.begin(model, optimizer)
        except EXPECTED:  # a damaged checkpoint, which sweep() will record
            continue
        equally_far.setdefault((progress.epoch, progress.step), []).append((run, (model, optimizer, progress)))
    for members in equally_far.values():
        if not stopped:
            some, states = zip(*members)
            Group(list(some), dataset, list(states), stopped, sweep).train()
