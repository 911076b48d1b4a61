"""The inner loop of a run: its training steps and its evaluation, each from Python or, on a GPU, as CUDA graphs."""

import time

import numpy as np

import data
import distributed
import nn


def train_step(model, optimizer, x, labels, ranks=distributed.Alone(), share=1.0):
    """One step of SGD on a batch, of which this rank has this share: x, labels, perhaps none.

    Returns this rank's sums: of the loss, of correct answers, of examples. For many networks at once, each with its own
    batch, the first two are arrays.
    """
    sums = 0.0, 0, 0
    if len(labels):
        loss, *sums = nn.classify(model(nn.Tensor(x)), labels)
        loss.backward(nn.xp.ones_like(loss.data) if loss.ndim else optimizer.loss_scale)
        sums = *sums, labels.shape[-1]
    ranks.average(model, share)
    optimizer.step()
    optimizer.zero_grad()
    return sums


def evaluate(model, batches, ranks=distributed.Alone(), stopped=()):
    """(mean loss, accuracy) in evaluation mode, over the batches of all ranks; None if `stopped` fills meanwhile."""
    model.eval()
    loss_sum, correct, seen = 0.0, 0, 0
    with nn.no_grad():
        for x, labels in batches:
            if any(ranks.sum(len(stopped))):
                return None
            if len(labels):
                _, *sums = nn.classify(model(nn.Tensor(x)), labels)
                loss_sum, correct, seen = loss_sum + float(sums[0]), correct + int(sums[1]), seen + len(labels)
    loss_sum, correct, seen = ranks.sum(loss_sum, correct, seen)
    return loss_sum / max(seen, 1), correct / max(seen, 1)


class Steps:
    """The steps of a run, each from Python. stopped: fills when the run is told to stop. slow: how many steps are at
    first slower than the others.
    """

    slow = 0

    def __init__(self, settings, dataset, model, optimizer, test_batch, ranks=distributed.Alone(), stopped=()):
        self.settings, self.dataset, self.model, self.optimizer = settings, dataset, model, optimizer
        self.test_batch, self.ranks, self.stopped = test_batch, ranks, stopped

    def train(self, progress):
        """Do what is left of the epoch; yields after each step whether a rank was told to stop: then all do."""
        s, ranks, dataset = self.settings, self.ranks, self.dataset
        self.model.train()
        left = len(dataset.train_labels) - progress.step * s.batch
        for x, labels in dataset.train_batches(s.batch, s.seed, progress.epoch, progress.step, ranks.part):
            sums = train_step(self.model, self.optimizer, x, labels, ranks, len(labels) / min(s.batch, left))
            left -= s.batch
            *sums, stop = ranks.sum(*sums, len(self.stopped))
            progress.add(*sums)
            yield stop

    def read(self, progress):
        """Bring the sums of `progress` up to date."""

    def evaluate(self):
        """(mean loss, accuracy) on the test set; None if told to stop."""
        batches = self.dataset.test_batches(self.test_batch * self.ranks.size, self.ranks.part)
        return evaluate(self.model, batches, self.ranks, self.stopped)

    def time_of_evaluation(self):
        """The seconds it takes, from those of a batch."""
        begin = time.perf_counter()
        x, labels = next(self.dataset.test_batches(self.test_batch))
        evaluate(self.model, [(x, labels)])
        return (time.perf_counter() - begin) * len(self.dataset.test_labels) / max(1, len(labels))

    def memory(self):
        """Bytes held on a GPU"""
        return 0


class GraphSteps(Steps):
    """The same on a GPU with no Python inside a step: each is one CUDA graph that takes its batch from a data set on
    the GPU and adds to sums there, which are read now and then. members: Settings of many networks trained as one (see
    together.py), of which each has its own order; sums are arrays then.
    """

    def __init__(self, *arguments, members=None):
        super().__init__(*arguments)
        self.slow = nn.gpu.warm + 1  # compiled, planned and captured by then
        self.members, groups, d = members, members and len(members), self.dataset
        self.pool, self.replays, self.coming = nn.gpu.pool(), {}, {}
        # loss and correct answers, of the epoch and of the test
        self.sums = {training: nn.xp.zeros((2, groups) if groups else 2) for training in (True, False)}
        self.resident = isinstance(d, data.Dataset)
        if self.resident:
            self.feeds = {True: nn.gpu.feed(d.train_images, d.train_labels, d.scale, d.shift, d.padding, groups),
                          False: nn.gpu.feed(d.test_images, d.test_labels, d.scale, d.shift, groups=groups)}
        else:
            self.feeds = dict.fromkeys((True, False), nn.gpu.inbox(max(self.settings.batch, self.test_batch), d.shape))

    def replay(self, training, size):
        """The captured step, or evaluation, of a batch of this size."""
        feed, sums, model, optimizer = self.feeds[training], self.sums[training], self.model, self.optimizer

        def work():  # without self, which will hold it: a ring would keep the memory until Python looks for rings
            x, labels = feed.batch(size)
            if training:
                loss_sum, correct, _ = train_step(model, optimizer, x, labels)
            else:
                with nn.no_grad():
                    _, loss_sum, correct = nn.classify(model(nn.Tensor(x)), labels)
            for total, more in zip(sums, (loss_sum, correct)):
                total += more

        if (training, size) not in self.replays:
            self.replays[training, size] = nn.gpu.replay(work, self.pool, self.settings.graph)
        return self.replays[training, size]

    def shuffled(self, epoch):
        """The order, and what is drawn for each place in it, of an epoch; of all members beside each other."""
        if self.members is None:
            return self.dataset.shuffled(self.settings.seed, epoch)
        orders, draws = zip(*(self.dataset.shuffled(member.seed, epoch) for member in self.members))
        return np.stack(orders), None if draws[0] is None else np.stack(draws)

    def batches(self, training, batch, epoch=0, start=0):
        """Do what is left of an epoch or of the test set; yields the size of each batch after it."""
        d, seed = self.dataset, self.settings.seed
        if self.resident:
            count = len(d.train_labels if training else d.test_labels)
            order = (self.coming.pop(epoch, None) or self.shuffled(epoch)) if training else (None, None)
            self.feeds[training].begin(*order, start * batch)
            for first in range(start * batch, count, batch):
                size = min(batch, count - first)
                self.replay(training, size)()
                yield size
        else:
            for x, labels in d.train_batches(batch, seed, epoch, start) if training else d.test_batches(batch):
                if len(labels):  # not all of its photographs are unreadable
                    self.feeds[training].put(x, labels)
                    self.replay(training, len(labels))()
                yield len(labels)

    def train(self, progress):
        self.model.train()
        self.sums[True].set(np.array([progress.loss_sum, progress.correct], np.float64))
        for size in self.batches(True, self.settings.batch, progress.epoch, progress.step):
            progress.step += 1
            progress.seen += size
            yield len(self.stopped)
        if self.resident and progress.epoch + 1 < self.settings.epochs:  # while the GPU is at the steps
            self.coming[progress.epoch + 1] = self.shuffled(progress.epoch + 1)

    def read(self, progress):
        progress.loss_sum, progress.correct = self.sums[True].get().tolist()

    def evaluate(self):
        self.model.eval()
        self.sums[False].fill(0)
        seen = 0
        for size in self.batches(False, self.test_batch):
            seen += size
            if self.stopped:
                return None
        return (self.sums[False].get() / max(seen, 1)).tolist()

    def time_of_evaluation(self):
        if not self.resident:  # far more is decoded than computed, by as many threads as there are
            return super().time_of_evaluation()
        for _ in range(2):
            begin = time.perf_counter()
            self.evaluate()
        return time.perf_counter() - begin

    def memory(self):
        return self.pool.total_bytes() + nn.xp.get_default_memory_pool().total_bytes()
