"""A sweep: all runs of a figure, trained by any number of processes that each take the next run that nobody holds.

It is all the same whether they are the workers of --jobs, the ranks of mpirun, the array jobs of a cluster or the same
command typed twice: a run is held by a lock in its folder, and who is through waits for the others, and takes over
the run of one that died.
"""

import os
import signal
import subprocess
import sys
import time

from engines import host
from lab.processes import SIZES, Alone
from lab.run import percent, stop_signals
from lab.settings import UsageError

WORKER = "SWEEP_WORKER"  # environment variable of a process of --jobs


def sweep(runs, ranks=Alone(), bar=True):
    """Train the runs that are not done, each under its lock; returns how many failed.

    A run that fails is recorded in its folder, the others go on; it is tried again by the next sweep, not by another
    process of this one. ranks: they sum up their failures. If ranks are told to stop, all end with SystemExit.
    """
    if ranks.size == 1:
        return train(runs, bar)
    failed = 0
    with stop_signals() as stopped:  # mpirun would end all ranks with the first: who is told saves its run and waits
        try:
            failed = train(runs, bar, stopped)
        except SystemExit as stop:
            stopped.append(stop.code - 128)
        ranks.wait()
        failed, told = ranks.sum(failed, len(stopped))
    if told:
        raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])
    return int(failed)


def train(runs, bar, stopped=()):
    """Train the runs that are not done and that nobody else trains, until `stopped` fills; returns how many failed."""
    failed, left = 0, [(run, run.failure()) for run in runs]
    while left and not stopped:
        busy = []
        for run, failure in left:
            if stopped or run.done():
                continue
            with run.lock() as mine:
                if not mine:
                    busy.append((run, failure))
                elif run.failure() not in (None, failure):  # of another process, meanwhile
                    failed += 1
                elif not run.done():
                    failed += not succeeded(run, runs, bar)
        left = busy
        if busy:
            time.sleep(1)
    return failed


def succeeded(run, runs, bar):
    """Train a run of a sweep, and say so; whether it came to its end."""
    name = run.settings.run_name()
    try:
        result = run.perform(bar)
    except Exception as error:
        print(f"{name}: {run.record_failure(error)}", file=sys.stderr, flush=True)
        return False
    print(f"[{sum(r.done() for r in runs)}/{len(runs)}] {name}: test {percent(result['best_test_acc'])} "
          f"in {result['seconds']:.0f} s", flush=True)
    return True


def sweep_in_processes(jobs, script, argv):
    """The same command in `jobs` processes that share the cores; returns the worst exit code.

    Which script called main() does not matter: the workers run the experiment's. WORKER keeps one that has a call of
    its own, with other words, from starting workers in its turn.
    """
    if not os.path.isfile(script):
        raise UsageError(f"--jobs starts processes that run {script}, and there is no such file; without it one "
                         "process trains all runs")
    env = {k: v for k, v in os.environ.items() if k not in SIZES}  # a worker is no rank of a job
    env |= dict.fromkeys(host.THREADS, str(max(1, host.cores() // jobs))) | {WORKER: "1"}
    command = [sys.executable, script, *argv]
    with stop_signals() as stopped:
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
