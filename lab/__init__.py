"""What keeps order around an experiment: settings and command line, runs and sweeps, processes, figures.

A script states its Settings, a function train(run) and its figures, and hands them to main() as an Experiment:

    for epoch in run.epochs(model, optimizer, dataset):
        for x, labels in run.training_batches():
            run.count(step(x, labels))
        for x, labels in run.test_batches(1000):
            run.count(test(x, labels))
"""

from lab.command import main
from lab.figures import Figure, Point, departures, over_seeds, rates
from lab.run import Run
from lab.settings import Experiment, Settings, UsageError, numbers, setting

__all__ = ["Experiment", "Figure", "Point", "Run", "Settings", "UsageError", "departures", "main", "numbers",
           "over_seeds", "rates", "setting"]
