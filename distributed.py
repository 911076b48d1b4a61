"""Many processes as one job, over MPI (mpi4py): data parallel training, and sweeps that share out their runs.

    mpirun -n 8 python exp_resnet_imagenet.py --width 128      one run: each rank takes an eighth of every batch
    mpirun -n 8 python exp_resnet_cifar.py --sweep fig6        many runs: each rank trains one at a time

The batch is that of the whole job, so the number of ranks changes rounding and the batch that BatchNorm sees, and
nothing else: order, crops, masks, learning rate and checkpoints are the same. After the backward pass each rank's
gradients, weighted by its part of the batch, are added up in buckets, by MPI on CPUs and by NCCL on GPUs; so are
BatchNorm's running estimates, so that at any step all ranks hold the same network. Every epoch a checksum proves it.
Started without mpirun, or with one rank, nothing of this is done and mpi4py is not imported.
"""

import functools
import hashlib
import os
import threading
import time

import numpy as np

import nn

# How many processes the launcher started: MPICH, Intel MPI and Slurm's pmi2; Open MPI; MVAPICH; Slurm's pmix
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
BUCKET = 2**22  # bytes added up at a time: the sum of one bucket runs while the next is put together
LOOK_EVERY = 0.01  # seconds between looks at whether something has arrived; MPI's own waiting keeps a core busy


class JobError(Exception):
    """The processes of a job cannot work together; the message is one sentence."""


class Alone:
    """A job of one process. With several, Ranks does what the docstrings say."""

    rank, size = 0, 1
    part = property(lambda self: (self.rank, self.size))  # what data sets take to find this rank's examples

    def use_own_gpu(self):
        """Compute on one of this machine's GPUs, if on any; its ranks take them in turn."""

    def sum(self, *values):
        """Each of these numbers added up over all ranks."""
        return values

    def sum_when_ready(self, value):
        """The same for one number, where ranks may wait long for each other."""
        return value

    def average(self, model, weight):
        """Replace gradients and running estimates by their means over ranks; `weight`: this rank's part of a batch."""

    def check_same(self, model, when):
        """Raise JobError unless all ranks hold the same weights, masks and estimates, to the bit."""

    def broadcast(self, value):
        """Rank 0's value, on all ranks."""
        return value

    def first_here(self, work):
        """work() on rank 0 before the others, so that what it downloads or generates is there for them."""
        return work()

    def hand_out(self, count):
        """The numbers below count, in order, each to one rank: to whichever asks next."""
        yield from range(count)

    def abort(self, code):
        """End the processes of all ranks with this exit code."""


class Ranks(Alone):
    """A job of several processes; comm: an mpi4py communicator."""

    def __init__(self, comm):
        from mpi4py import MPI

        self.mpi, self.comm, self.rank, self.size = MPI, comm, comm.rank, comm.size
        self.local = comm.Split_type(MPI.COMM_TYPE_SHARED)  # the ranks of this machine

    def use_own_gpu(self):
        if nn.xp is not np:
            cuda = nn.xp.cuda
            cuda.Device(self.local.rank % cuda.runtime.getDeviceCount()).use()

    def sum(self, *values):
        total = np.array([float(v) for v in values])
        self.comm.Allreduce(self.mpi.IN_PLACE, total)
        return tuple(total.tolist())

    def sum_when_ready(self, value):
        self.pause(self.comm.Ibarrier())
        return self.sum(value)[0]

    def average(self, model, weight):
        pieces = []  # (array, its entries that count) of everything to be averaged, flat
        for p in model.parameters():
            p.grad = nn.xp.zeros_like(p.data) if p.grad is None else nn.xp.ascontiguousarray(p.grad)
            pieces.append((p.grad.reshape(-1), slice(None) if p.kept is None else p.kept))
        pieces += [(array.reshape(-1), slice(None)) for _, array in model.named_arrays(nn.xp.ndarray)]
        pending = None
        for bucket in buckets(pieces):
            total = nn.xp.concatenate([array[part] for array, part in bucket])
            total *= weight
            pending, before = (bucket, total, self.start_sum(total)), pending
            put_back(before)
        put_back(pending)

    def start_sum(self, array):
        """Begin to add up `array` over ranks, in place; what it returns has wait()."""
        if nn.xp is np:
            return self.comm.Iallreduce(self.mpi.IN_PLACE, array)
        self.nccl.all_reduce(array, array)  # in the order of the stream: nothing to wait for
        return None

    @functools.cached_property
    def nccl(self):
        from cupyx.distributed import NCCLBackend

        return NCCLBackend(self.size, self.rank, use_mpi=True)

    def check_same(self, model, when):
        digest = hashlib.sha256()
        for name, array in model.state_dict().items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        digests = self.comm.allgather(digest.digest())
        other = [rank for rank, d in enumerate(digests) if d != digests[0]]
        if other:
            raise JobError(f"{when} the network of rank {other[0]} is not that of rank 0; all ranks need the same "
                           "versions of this code, of NumPy and of the data")

    def broadcast(self, value):
        self.pause(self.comm.Ibarrier())  # rank 0 may have worked for long
        return self.comm.bcast(value)

    def first_here(self, work):
        if self.rank == 0:
            value = work()
        self.broadcast(None)
        return value if self.rank == 0 else work()

    def pause(self, request):
        """Wait for a request without keeping a core busy."""
        while not request.Test():
            time.sleep(LOOK_EVERY)

    def hand_out(self, count):
        comm, numbers, turn = self.comm.Dup(), iter(range(count)), threading.Lock()

        def take():
            with turn:
                return next(numbers, None)

        def answer():  # on rank 0, beside its own runs, until each of the others was told that nothing is left
            left = self.size - 1
            while left:
                status = self.mpi.Status()
                while not comm.Iprobe(status=status):
                    time.sleep(LOOK_EVERY)
                comm.recv(source=status.source)
                number = take()
                comm.send(number, status.source)
                left -= number is None

        if self.rank == 0:
            clerk = threading.Thread(target=answer, daemon=True)
            clerk.start()
            while (number := take()) is not None:
                yield number
            clerk.join()
        else:
            while True:
                comm.send(None, 0)
                while not comm.Iprobe(source=0):
                    time.sleep(LOOK_EVERY)
                if (number := comm.recv(source=0)) is None:
                    return
                yield number

    def abort(self, code):
        self.comm.Abort(code)


def buckets(pieces):
    """Lists of neighbouring (array, part) of one type and at least BUCKET bytes, except the last of a type."""
    bucket, filled = [], 0
    for array, part in pieces:
        if bucket and (filled >= BUCKET or array.dtype != bucket[0][0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append((array, part))
        filled += array[part].nbytes if isinstance(part, slice) else len(part) * array.itemsize
    if bucket:
        yield bucket


def put_back(pending):
    """Take the sums of a bucket into its arrays."""
    if pending is None:
        return
    bucket, total, request = pending
    if request is not None:
        request.wait()
    first = 0
    for array, part in bucket:
        n = len(array) if isinstance(part, slice) else len(part)
        array[part] = total[first : first + n]
        first += n


@functools.cache
def world():
    """The job that this process belongs to. JobError if a launcher started several that MPI does not connect."""
    size = max((int(os.environ.get(name, 1)) for name in SIZES))
    if size == 1:
        return Alone()
    try:
        from mpi4py import MPI
    except Exception as error:  # ImportError without mpi4py, RuntimeError without an MPI library
        raise JobError(f"{size} processes were started to work together, but mpi4py cannot be used "
                       f"({str(error).splitlines()[0]}): pip install -r requirements-mpi.txt") from None
    if MPI.COMM_WORLD.size != size:
        raise JobError(f"{size} processes were started, but MPI connects {MPI.COMM_WORLD.size} of them: start them "
                       "with the mpirun of the MPI library that mpi4py uses, or with srun --mpi=pmi2 or --mpi=pmix")
    ranks = Ranks(MPI.COMM_WORLD)
    share_cores(ranks.local.size)
    return ranks


def share_cores(processes):
    """Let BLAS, and conv.py with it, use this process's part of the machine's cores, unless the user said how many."""
    from threadpoolctl import threadpool_limits

    if not any(os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threadpool_limits(max(1, min(cores, os.cpu_count() // processes)))
