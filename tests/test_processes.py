"""Several ranks: the same training as one process, sweeps, ranks that fail, are told to stop or die.

Run by mpirun with the name of one of the jobs below, this file is what each rank does.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import simulated_gpu  # noqa: E402
import tiny  # noqa: E402

import exp_mlp_mnist as mlp  # noqa: E402
import exp_resnet_cifar as resnet  # noqa: E402
import lab  # noqa: E402
import nn  # noqa: E402
from datasets import DataError  # noqa: E402
from engines import host, sparse  # noqa: E402
from lab import command, processes, run  # noqa: E402

BESIDE = str(Path(sys.executable).parent)  # where pip puts the mpirun of a wheel
MPIRUN = shutil.which("mpirun", path=os.pathsep.join((BESIDE, os.environ.get("PATH", ""))))
ENV = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1",
           OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe")


def has_mpi():
    words = [sys.executable, "-c", "import mpi4py.MPI"]
    return MPIRUN is not None and subprocess.run(words, capture_output=True).returncode == 0


with_mpi = pytest.mark.skipif(not has_mpi(), reason="no mpirun or no mpi4py: pip install -r requirements-mpi.txt")

# ---------------------------------------------------------------------------------------------- what ranks do


def small_data():
    """From now on the experiments learn from noise that is made in a moment."""
    mlp.load = lambda s: tiny.images(220, 80, side=28).part(s.held_out, s.limit)
    resnet.load = lambda s: tiny.images(220, 80, side=32, channels=3).part(s.held_out, s.limit).augmented(4, True)
    for script in (mlp, resnet):
        script.EXPERIMENT = replace(script.EXPERIMENT, load=script.load)


def rank():
    return processes.world().rank


def job_mlp(*argv):
    return command.main(mlp.EXPERIMENT, argv)


def job_resnet(*argv):
    return command.main(resnet.EXPERIMENT, argv)


def change(module, name, around):
    """From now on module.name does around(what it did, its arguments ...)."""
    real = getattr(module, name)
    setattr(module, name, lambda *args: around(real, *args))


def gpus(count, cards):
    """Simulated GPUs, one in each process, which sees `count`; cards: what tells those of the ranks apart."""
    cupy = simulated_gpu.install()
    cupy.cuda.runtime.getDeviceCount = lambda: count
    cupy.cuda.runtime.getDeviceProperties = lambda device: {"name": b"simulated GPU", "uuid": cards[rank()],
                                                            "pciBusID": 0}
    cupy.cuda.Device = lambda number=0, own=cupy.cuda.Device: own()  # each process has but the one
    return cupy


def job_gpu(*argv):
    """On simulated GPUs, one a rank, with MPI in the place of NCCL."""
    gpus(processes.world().size, "abcd")

    class ThroughTheHost:
        def __init__(self, ranks):
            self.ranks = ranks

        def all_reduce(self, source, target):
            host = source.get()
            self.ranks.comm.Allreduce(self.ranks.mpi.IN_PLACE, host)
            target.set(host)

    processes.Ranks.nccl = property(ThroughTheHost)
    code = job_resnet(*argv)
    simulated_gpu.check_guards()
    return code


def job_wrong_gpus(fault, *argv):
    """Each rank sees one simulated GPU. Those of ranks 1 and 2 may be the same; rank 1 may have none, or no NCCL."""
    cupy = gpus(1, "abb" if fault == "same" else "abc")
    cupy.cuda.nccl.available = not (fault == "no NCCL" and rank() == 1)
    if fault == "none" and rank() == 1:
        cupy.cuda.runtime.getDeviceCount = lambda: 0
    processes.Ranks.nccl = property(lambda ranks: 1 / 0)
    return job_mlp(*argv)


def job_slow(*argv):
    """An MLP whose steps take a while, and a figure of one run; each rank leaves its process number in the folder."""
    out = Path(argv[-1])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank{rank()}").write_text(str(os.getpid()))
    change(nn.SGD, "step", lambda real, self: [time.sleep(0.01), real(self)])
    mlp.EXPERIMENT.figures["one"] = lab.Figure("one", lambda s: [s], None)
    return job_mlp(*argv)


def job_uneven(*argv):
    """Rank 1 draws other weights."""
    def build(real, s):
        model = real(s)
        model[1].weight.data[0, 0] += rank() == 1
        return model

    change(mlp, "build", build)
    return job_mlp(*argv)


def job_other_data(*argv):
    """Rank 1 has fewer examples, or other labels."""
    def load(real, s):
        dataset = real(s)
        if rank() == 1 and s.seed:
            return dataset.part(limit=100)
        if rank() == 1:
            return replace(dataset, train=replace(dataset.train, labels=dataset.train_labels[::-1]))
        return dataset

    change(mlp, "load", load)
    return job_mlp(*argv)


def job_raises(where, *argv):
    """Rank 1 meets an error while data is loaded or in a step; or whoever builds the network of width 20 of a sweep."""
    def call(real, *args):
        if where == "build" and args[0].width == 20 or where != "build" and rank() == 1:
            raise DataError("the disk of rank 1 is empty") if where == "load" else ZeroDivisionError(f"in {where}")
        return real(*args)

    change(nn.SGD if where == "step" else mlp, where, call)
    return job_mlp(*argv)


def job_average(path):
    """Gradients and running estimates of random size, some only where weights are kept; saved beside their mean."""
    ranks, rng = processes.world(), np.random.default_rng(rank())
    processes.BUCKET = 1000  # many buckets, some of one array
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm2d(30), nn.Linear(30, 7), nn.Linear(50, 60))
    mask = np.zeros((60, 50), bool)
    mask[::7, ::9] = True
    model[3].weight.set_mask(mask)
    model[1].running_var = np.ones(30)  # another type in between
    for i, p in enumerate(model.parameters()):
        if i != 2 or ranks.rank != 1:
            p.accumulate(rng.standard_normal(p.shape).astype(p.dtype))
    model[2].weight.grad = np.asfortranarray(model[2].weight.grad)
    for array in (model[1].running_mean, model[1].running_var):
        array += rng.standard_normal(array.shape)
    weight = (ranks.rank + 1) / (ranks.size * (ranks.size + 1) / 2)

    def values():
        grads = [np.zeros(p.shape) if p.grad is None else p.grad.copy() for p in model.parameters()]
        return grads + [a.copy() for _, a in model.named_arrays(np.ndarray)]

    before = values()
    ranks.average(model, weight)
    np.savez(f"{path}{ranks.rank}.npz", *before, *values(), weight=weight)
    array, number = ranks.sum(np.array([1.0, ranks.rank]), 2)
    assert array.tolist() == [ranks.size, sum(range(ranks.size))] and number == 2 * ranks.size


def job_chooses(*argv):
    """Rank 0 finds dense products faster, however few weights are kept, rank 1 those with the kept ones."""
    def linear(real, *args):
        raise ZeroDivisionError("a product with the kept entries alone")

    change(sparse, "measured", lambda real, kind: dict.fromkeys(sparse.TYPICAL, float(rank())))
    change(sparse, "linear", linear)
    return job_mlp(*argv)


def job_cores():
    from threadpoolctl import threadpool_info

    world = processes.world()
    threads = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    sys.stdout.write(f"threads {world.local.size} {threads} {host.cores()}\n")


# ---------------------------------------------------------------------------------------------- the same training


def start(ranks, job, *words, **env):
    line = [MPIRUN, "-n", str(ranks), sys.executable, __file__, job, *map(str, words)]
    return subprocess.Popen(line, env=ENV | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def communicate(process, seconds=120):
    """(output, errors) of a job that ends by itself; one that does not is killed with all its ranks."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"no end after {seconds} s: {process.communicate()}")


def ended(ranks, job, *words, expect=0, **env):
    """The job on so many ranks; (output, errors)."""
    process = start(ranks, job, *words, **env)
    out, errors = communicate(process)
    assert process.returncode == expect, out + errors
    return out, errors


def flags(out, **settings):
    """Command line words; the last is the folder of runs."""
    return [*tiny.flags(out, data="synthetic", **settings)[1:], "--out", f"{out}"]


@pytest.fixture
def alone(monkeypatch):
    """The experiments in this process, on the same data."""
    for module in (mlp, resnet):
        monkeypatch.setattr(module, "load", module.load)
        monkeypatch.setattr(module, "EXPERIMENT", module.EXPERIMENT)
    small_data()


def checkpoint(out):
    """(arrays of the one run in this folder, all columns of its log but seconds)"""
    path, = Path(out).rglob("checkpoint.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    log = np.genfromtxt(path.with_name("log.csv"), delimiter=",", names=True)
    return arrays, np.stack([log[name] for name in run.COLUMNS[:-1]])


def assert_same(one, other, atol):
    names = [{name for name in arrays if not name.startswith("engine.")} for arrays, _ in (one, other)]
    assert names[0] == names[1]
    for name, array in one[0].items():
        if name.startswith(("model.", "optimizer.")):
            np.testing.assert_allclose(other[0][name], array, atol=atol, rtol=0, err_msg=name)
    np.testing.assert_allclose(other[1], one[1], atol=1e-5, rtol=1e-5)


@with_mpi
@pytest.mark.parametrize("ranks", [4, pytest.param(2, marks=pytest.mark.proof)])
def test_ten_steps_are_those_of_one_process(tmp_path, ranks, alone):
    """No BatchNorm, masks of low density, a last batch of 3 examples: fewer than ranks."""
    words = dict(width=300, epochs=2, limit=203, batch=50)
    assert command.main(mlp.EXPERIMENT, flags(tmp_path / "1", **words)) == 0
    ended(ranks, "mlp", *flags(tmp_path / "n", **words))
    one, several = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "n")
    assert one[1].shape == (6, 2) and one[0]["model.1.weight"].size + one[0]["model.3.weight.mask"].sum() == 3970
    assert_same(one, several, atol=1e-6)
    np.testing.assert_array_equal(one[0]["model.1.weight.kept"], several[0]["model.1.weight.kept"])


@with_mpi
def test_all_ranks_compute_as_rank_0_chose(tmp_path):
    ended(2, "chooses", *flags(tmp_path, width=300, epochs=1, limit=100, batch=50))
    arrays, _ = checkpoint(tmp_path)
    assert arrays["engine.linear"] == 0


@with_mpi
@pytest.mark.skipif(simulated_gpu.available() is not None, reason=f"no simulated GPU: {simulated_gpu.available()}")
@pytest.mark.proof
def test_ranks_on_gpus(tmp_path):
    words = dict(width=3, base_width=2, epochs=2, limit=76, batch=16, lr=1e-3)
    ended(2, "resnet", *flags(tmp_path / "cpu", **words))
    ended(2, "gpu", *flags(tmp_path / "gpu", **words), "--device", "gpu", "--precision", "fp32")
    settings, _ = command.parse(resnet.EXPERIMENT, flags(tmp_path, **words))
    loaded = []
    for out in ("cpu", "gpu"):  # of which one wrote kept entries alone, the other all
        arrays, log = checkpoint(tmp_path / out)
        model = resnet.build(settings, 10)
        optimizer = nn.SGD(model.parameters(), settings.lr, settings.momentum, settings.weight_decay)
        for part, of in (("model.", model), ("optimizer.", optimizer)):
            of.load_state_dict({name.removeprefix(part): a for name, a in arrays.items() if name.startswith(part)})
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        loaded.append(({f"{part}.{name}": a for part in states for name, a in states[part].items()}, log))
    assert_same(*loaded, atol=1e-4)


@with_mpi
@pytest.mark.skipif(simulated_gpu.available() is not None, reason=f"no simulated GPU: {simulated_gpu.available()}")
@pytest.mark.parametrize("fault, says", [
    ("same", "ranks 1 and 2 compute on the same GPU, and each needs its own: start no more processes than there are "
     "GPUs"),
    ("none", "rank 0 computes on a GPU and rank 1 on a CPU: --device gpu says why, --device cpu takes CPUs alone"),
    ("no NCCL", "ranks on GPUs need NCCL, which rank 1 does not have: on Linux pip install -r "
     "requirements-gpu.txt, elsewhere start one process"),
    ("not connected", "NCCL cannot connect the GPUs of the ranks: division by zero")])
def test_ranks_whose_gpus_cannot_work_together(tmp_path, fault, says):
    """One sentence before anything is trained"""
    out, errors = ended(3, "wrong_gpus", fault, *flags(tmp_path, width=12, epochs=1, limit=20), expect=2)
    assert re.findall("exp_mlp_mnist.py: (.*)", errors) == [says] and "Traceback" not in errors
    assert not list(tmp_path.rglob("checkpoint.npz"))


def emulated(s, ranks):
    """The network after training in one process that takes the part of each rank in turn."""
    dataset = resnet.load(s)
    model = resnet.build(s, 10)
    optimizer = nn.SGD(model.parameters(), s.lr, s.momentum, s.weight_decay)
    estimates = dict(model.named_arrays(np.ndarray))
    for epoch in range(s.epochs):
        optimizer.lr = resnet.schedule(s)(epoch)
        parts = [dataset.train_batches(s.batch, s.seed, epoch, part=(rank, ranks)) for rank in range(ranks)]
        for batches in zip(*parts):
            whole = sum(len(labels) for _, labels in batches)
            before = {name: array.copy() for name, array in estimates.items()}
            after = {name: np.zeros_like(array) for name, array in estimates.items()}
            grads = [0] * len(optimizer.params)
            for x, labels in batches:
                for name, array in estimates.items():
                    array[...] = before[name]
                nn.cross_entropy(model(nn.Tensor(x.copy())), labels).backward()
                for name, array in estimates.items():
                    after[name] += array * (len(labels) / whole)
                grads = [g + p.grad * (len(labels) / whole) for g, p in zip(grads, optimizer.params)]
                optimizer.zero_grad()
            for name, array in estimates.items():
                array[...] = after[name]
            for g, p in zip(grads, optimizer.params):
                p.grad = g.astype(np.float32)
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict(kept=True)


@with_mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.proof)])
def test_ten_steps_with_batchnorm_use_the_statistics_of_each_rank(tmp_path, ranks, alone):
    words = dict(width=3, base_width=2, epochs=1, limit=156, batch=16, lr=1e-3, schedule="constant")
    ended(ranks, "resnet", *flags(tmp_path, **words))
    arrays, _ = checkpoint(tmp_path)
    settings, _ = command.parse(resnet.EXPERIMENT, flags(tmp_path, **words))
    begun = resnet.build(settings, 10).state_dict(kept=True)
    for name, array in emulated(settings, ranks).items():  # at larger rates rounding grows a thousandfold a step
        moved = np.abs(array * 1.0 - begun[name]).max()
        rounding = 10 * np.spacing(np.abs(array).max()) / 2  # of ten steps
        np.testing.assert_allclose(arrays[f"model.{name}"], array, atol=max(1e-7, rounding, 1e-3 * moved), rtol=0,
                                   err_msg=name)


@with_mpi
def test_means_over_ranks(tmp_path):
    ended(3, "average", tmp_path / "rank")
    files = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(3)]
    n = (len(files[0].files) - 1) // 2
    for i in range(n):
        mean = sum(f[f"arr_{i}"] * f["weight"] for f in files)
        for f in files:
            np.testing.assert_allclose(f[f"arr_{i + n}"], mean, atol=1e-6)
            assert np.array_equal(f[f"arr_{i + n}"], files[0][f"arr_{i + n}"])  # to the bit on all ranks


# ---------------------------------------------------------------------------------------------- cuts and failures


@with_mpi
@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGKILL, None,
                                                                            marks=pytest.mark.proof)])
def test_a_rank_that_is_stopped_or_dies_ends_the_job_and_others_go_on_from_its_checkpoint(tmp_path, alone, sent, code):
    """SIGTERM to rank 1 alone saves on rank 0; after SIGKILL the last checkpoint is good. Then 3 ranks, then 1."""
    words = dict(width=12, epochs=40, limit=200, batch=20, save_every=0)
    assert command.main(mlp.EXPERIMENT, flags(tmp_path / "1", **words)) == 0
    steps, n = [], tmp_path / "n"
    for ranks in (2, 3):
        before = [path.stat().st_mtime_ns for path in n.rglob("log.csv")]
        (n / "rank1").unlink(missing_ok=True)
        process = start(ranks, "slow", *flags(n, **words))
        tiny.wait_for(lambda: (n / "rank1").exists() and
                 [path.stat().st_mtime_ns for path in n.rglob("log.csv")] not in ([], before), process)
        os.kill(int((n / "rank1").read_text()), sent)
        out, errors = communicate(process)
        assert process.returncode == code if code else process.returncode != 0, out + errors
        assert not list(n.rglob("result.json"))
        if code:
            assert len(re.findall("the same command goes on from here", errors + out)) == 1
        arrays, _ = checkpoint(n)
        steps.append(10 * arrays["progress.epoch"] + arrays["progress.step"])
    assert 0 < steps[0] < steps[1] < 400
    assert command.main(mlp.EXPERIMENT, flags(n, **words)) == 0
    assert_same(checkpoint(tmp_path / "1"), checkpoint(n), atol=1e-5)
    path, = n.rglob("config.json")
    assert json.loads(path.read_text())["ranks"] == [2, 3, 1]


@with_mpi
@pytest.mark.parametrize("job, seed, code, says", [
    (["uneven"], 0, 2, "before training rank 1 does not have the network of rank 0; all ranks need the same versions"),
    (["other_data"], 0, 2, "before training rank 1 does not have the data of rank 0"),
    (["other_data"], 1, 2, "before training rank 1 does not have the data of rank 0"),
    (["raises", "load"], 0, 2, "the disk of rank 1 is empty"),
    (["raises", "step"], 0, 1, "ZeroDivisionError: in step")])
def test_a_rank_that_is_wrong_or_fails_ends_the_job_with_its_reason(tmp_path, job, seed, code, says):
    _, errors = ended(2, *job, *flags(tmp_path, width=12, epochs=1, seed=seed), expect=code)
    assert says in errors and ("Traceback" in errors) == (code == 1) and not list(tmp_path.rglob("checkpoint.npz"))
    assert job[0] != "raises" or errors.count(says) == 1


@with_mpi
def test_what_is_wrong_for_all_ranks_is_said_once(tmp_path):
    for words in (["--width", "0"], ["--wdth", "3"]):
        out, errors = ended(2, "mlp", *flags(tmp_path), *words, expect=2)
        assert errors.count("exp_mlp_mnist.py: ") == 1 and "Traceback" not in errors
    out, _ = ended(2, "mlp", "--help")
    assert out.count("figures and sweeps") == 1


@with_mpi
def test_a_run_that_diverges_ends_on_all_ranks(tmp_path):
    out, errors = ended(2, "mlp", *flags(tmp_path, width=12, epochs=3, lr=1e30), expect=1)
    assert (out + errors).count("the loss is no longer finite in epoch 1; recorded as diverged") == 1
    assert json.loads(next(tmp_path.rglob("result.json")).read_text())["diverged"]


# ---------------------------------------------------------------------------------------------- sweeps


@with_mpi
@pytest.mark.parametrize("whom", [[0, 1, 2], pytest.param([1], marks=pytest.mark.proof)])
def test_a_sweep_that_is_told_to_stop_saves_and_ends(tmp_path, whom):
    """Ranks that are told save and wait; the others, if any, go on to the end. Then the sweep is finished."""
    words = ["--sweep=width", *flags(tmp_path, epochs=10, limit=200, batch=20, seeds=1)]
    process = start(3, "slow", *words)
    tiny.wait_for(lambda: len(list(tmp_path.rglob("config.json"))) >= 3, process)
    for rank in whom:
        os.kill(int((tmp_path / f"rank{rank}").read_text()), signal.SIGTERM)
    out, errors = communicate(process)
    assert process.returncode == 143, out + errors
    assert len(re.findall("the same command goes on from here", errors + out)) == len(whom)
    done = len(list(tmp_path.rglob("result.json")))
    assert done == (13 if len(whom) == 1 else 0)
    if not done:
        ended(3, "mlp", *words)
        assert len(list(tmp_path.rglob("result.json"))) == 13


@with_mpi
def test_a_waiting_rank_does_not_end_the_others(tmp_path):
    """Two ranks of three have nothing left to do when all are told to stop: the third one's run is saved."""
    words = ["--sweep=one", *flags(tmp_path, epochs=200, limit=200)]
    process = start(3, "slow", *words)
    tiny.wait_for(lambda: list(tmp_path.rglob("config.json")), process)
    time.sleep(0.5)
    process.terminate()  # mpirun tells all ranks
    out, errors = communicate(process)
    assert process.returncode == 143 and len(list(tmp_path.rglob("checkpoint.npz"))) == 1, out + errors


@with_mpi
@pytest.mark.proof
def test_a_sweep_is_shared_and_a_failed_run_is_recorded(tmp_path):
    words = ["--sweep=width", *flags(tmp_path, epochs=1, limit=100, seeds=1)]
    out, errors = ended(3, "raises", "build", *words, expect=1)
    names = re.findall(r"\[\d+/13\] (\S+): test", out)
    failures = re.findall(r"(\S+): ZeroDivisionError: in build", errors)
    assert len(set(names)) == len(names) == 11 and len(set(failures)) == len(failures) == 2, out + errors
    out, _ = ended(2, "raises", "build", "--list=width", *words[1:])
    assert out.count("failed: ZeroDivisionError: in build") == 2 and out.count("11 of 13 runs are done") == 1
    failed = json.loads(next(tmp_path.rglob("failed.json")).read_text())
    assert "in call" in "".join(failed["traceback"])
    out, _ = ended(2, "mlp", *words)  # what made them fail is mended
    assert len(re.findall(r"\[\d+/13\] (\S+): test", out)) == 2 and not list(tmp_path.rglob("failed.json"))


# ---------------------------------------------------------------------------------------------- without MPI


def test_one_process_needs_no_mpi4py():
    code = "import sys; from lab import processes; processes.world(); assert 'mpi4py' not in sys.modules"
    for size in ({}, {"PMI_SIZE": "1"}):
        subprocess.run([sys.executable, "-c", code], env=ENV | size, cwd=ROOT, check=True)


@pytest.mark.parametrize("stub, says", [
    ("raise ImportError('no module')", "2 processes were started to work together, but mpi4py cannot be used"),
    ("class MPI:\n class COMM_WORLD:\n  size = 1", "2 processes were started, but MPI connects 1 of them")])
def test_processes_that_mpi_does_not_connect_are_refused(tmp_path, stub, says):
    (tmp_path / "mpi4py.py").write_text(stub)
    done = subprocess.run([sys.executable, ROOT / "exp_mlp_mnist.py", "--quick"], capture_output=True, text=True,
                          env=ENV | {"PMI_SIZE": "2", "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


@with_mpi
def test_ranks_share_the_cores_of_a_machine():
    out, _ = ended(2, "cores", **dict.fromkeys(host.THREADS, ""))
    cores = max(1, os.cpu_count() // 2)
    assert out.count(f"threads 2 {{{cores}}} {cores}\n") == 2


if __name__ == "__main__":
    small_data()
    sys.exit(globals()[f"job_{sys.argv[1]}"](*sys.argv[2:]))
