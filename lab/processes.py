"""Several processes that train one network together, over MPI (mpi4py).

    mpirun -n 8 python exp_resnet_imagenet.py --width 128      each rank takes an eighth of every batch

The batch is that of the whole job, so the number of ranks changes rounding and the batch that BatchNorm sees, and
nothing else: order, crops, masks, learning rate and checkpoints are the same. After the backward pass each rank's
gradients, weighted by its part of the batch, are added up in buckets, by MPI on CPUs and by NCCL on GPUs; so are
BatchNorm's running estimates, so that at any step all ranks hold the same network. Every epoch a checksum proves it.
Started without mpirun, or with one rank, nothing of this is done and mpi4py is not imported.
"""

import functools
import hashlib
import os
import platform
import time
import warnings

import numpy as np

import nn
from engines.host import THREADS

# How many processes the launcher started: MPICH, Intel MPI and Slurm's pmi2; Open MPI; MVAPICH; Slurm's pmix
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
BUCKET = 2**22  # bytes added up at a time: the sum of one bucket runs while the next is put together
POLL_EVERY = 0.01  # seconds between looks at whether the others are there; MPI's own waiting keeps a core busy


class JobError(Exception):
    """The processes of a job cannot work together; the message is one sentence."""


class Alone:
    """A job of one process. With several, Ranks does what the docstrings say; all ranks must call each method."""

    rank, size = 0, 1
    here = 0  # which of the ranks of this machine; it computes on the GPU of that number, if on any

    def sum(self, *values):
        """Each of these numbers or arrays added up over all ranks."""
        return values

    def average(self, model, share):
        """Replace gradients and running estimates by their means over ranks; share: this rank's part of the batch, 0
        if it has no example of it.
        """

    def check_same(self, when, what, *arrays):
        """Raise JobError unless these arrays are the same on all ranks, to the bit."""

    def check_devices(self):
        """Raise JobError unless gradients can be added up over ranks on the devices where they compute."""

    def wait(self):
        """Until all ranks are here."""

    def broadcast(self, value):
        """Rank 0's value, on all ranks."""
        return value

    def abort(self, code):
        """End the processes of all ranks with this exit code."""


class Ranks(Alone):
    """A job of several processes; comm: an mpi4py communicator."""

    def __init__(self, comm):
        from mpi4py import MPI

        self.mpi, self.comm, self.rank, self.size = MPI, comm, comm.rank, comm.size
        self.local = comm.Split_type(MPI.COMM_TYPE_SHARED)  # the ranks of this machine
        self.here = self.local.rank

    def sum(self, *values):
        arrays = [np.asarray(nn.to_host(v) if hasattr(v, "shape") else v, np.float64) for v in values]
        total = np.concatenate([a.reshape(-1) for a in arrays])
        self.comm.Allreduce(self.mpi.IN_PLACE, total)
        parts = np.split(total, np.cumsum([a.size for a in arrays])[:-1])
        return [part.reshape(a.shape) for part, a in zip(parts, arrays)]

    def average(self, model, share):
        gpu = nn.engine.name == "gpu"  # it would have to be waited for to say how many entries a mask has
        start_sum = self.start_nccl if gpu else self.start_mpi
        pieces = []  # (array, which of its entries) of everything to be averaged, flat; masked entries stay at home
        for p in model.parameters():
            if p.held is None:
                p.accumulate(nn.xp.zeros_like(p.data))
            nn.put(p, "held", nn.engine.parameter(p.held.astype(p.dtype, copy=False)))
            every = gpu or p.mask is None or p.held.shape != p.shape  # of those that are held
            pieces.append((flat(p.held), slice(None) if every else p.mask.reshape(-1)))
        pieces += [(array.reshape(-1), slice(None)) for _, array in model.named_arrays(nn.xp.ndarray)]
        pending = []  # the bucket whose sum runs while the next one is put together
        for places, total in buckets(pieces):
            total *= share
            pending.append((places, total, start_sum(total)))
            if len(pending) > 1:
                put_back(*pending.pop(0))
        for bucket in pending:
            put_back(*bucket)

    def start_mpi(self, array):
        """Begin to add up an array over ranks, in place; returns what waits until it is done."""
        return self.comm.Iallreduce(self.mpi.IN_PLACE, array).wait

    def start_nccl(self, array):
        self.nccl.all_reduce(array, array)
        return lambda: None  # what follows on the GPU's stream comes after it

    @functools.cached_property
    def nccl(self):
        from cupyx.distributed import NCCLBackend

        return NCCLBackend(self.size, self.rank, use_mpi=True)

    def check_same(self, when, what, *arrays):
        digest = hashlib.sha256()
        for array in map(nn.to_host, arrays):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        digests = self.comm.allgather(digest.digest())
        if len(set(digests)) > 1:
            other = [d == digests[0] for d in digests].index(False)
            raise JobError(f"{when} rank {other} does not have the {what} of rank 0; all ranks need the same "
                           "versions of this code, of NumPy and of the data, and the same kind of device")

    def check_devices(self):
        card, able = own_gpu() if nn.engine.name == "gpu" else (None, True)
        cards, ables = zip(*self.comm.allgather((card, able)))  # so that all ranks raise the same
        for rank, other in enumerate(cards):
            if (other is None) != (cards[0] is None):
                raise JobError(f"rank 0 computes on a {'CPU' if other else 'GPU'} and rank {rank} on a "
                               f"{'GPU' if other else 'CPU'}: --device gpu says why, --device cpu takes CPUs alone")
            if other in cards[:rank] and other is not None:
                raise JobError(f"ranks {cards.index(other)} and {rank} compute on the same GPU, and each needs its "
                               "own: start no more processes than there are GPUs")
        if not all(ables):
            from engines.gpu_convolution import requirements

            raise JobError(f"ranks on GPUs need NCCL, which rank {ables.index(False)} does not have: on Linux "
                           f"pip install -r {requirements()}, elsewhere start one process")
        try:
            if card:
                self.nccl  # which connects them
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise JobError(f"NCCL cannot connect the GPUs of the ranks: {reason}") from None

    def wait(self):
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(POLL_EVERY)

    def broadcast(self, value):
        self.wait()  # rank 0 may have worked for long
        return self.comm.bcast(value)

    def abort(self, code):
        self.comm.Abort(code)


def own_gpu():
    """(what tells the GPU on which this process computes from all others, whether CuPy has NCCL)"""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NCCL that is not there
        from cupy.cuda import nccl
    # CuPy ends an uuid at a byte of zero, so that it alone may be that of another card
    return (platform.node(), properties["uuid"], properties["pciBusID"]), nccl.available


def flat(array):
    """All entries of an array in the order of memory, (N, C, H, W) or on a GPU (N, H, W, C): a view of one axis."""
    return array.reshape(-1) if array.flags.c_contiguous else array.transpose(0, 2, 3, 1).reshape(-1)


def buckets(pieces):
    """Neighbouring pieces (array, which of its entries) of one type and, but for the last, at least BUCKET bytes:
    ([(array, which, where in the bucket), ...], their entries in one array).
    """
    places, entries, count = [], [], 0
    for array, which in pieces:
        if entries and (count * array.itemsize >= BUCKET or array.dtype != entries[0].dtype):
            yield places, nn.xp.concatenate(entries)
            places, entries, count = [], [], 0
        entries.append(array[which])
        end = count + len(entries[-1])
        places.append((array, which, slice(count, end)))
        count = end
    if entries:
        yield places, nn.xp.concatenate(entries)


def put_back(places, total, wait):
    """Take the sums of a bucket, once they are there, into its arrays."""
    wait()
    for array, which, where in places:
        array[which] = total[where]


@functools.cache
def world():
    """The job that this process belongs to. JobError if a launcher started several that MPI does not connect."""
    sizes = [os.environ.get(name, "") for name in SIZES]
    size = max([int(text) for text in sizes if text.isdecimal()], default=1)
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
    share_cores(ranks.local)
    return ranks


def share_cores(local):
    """Let BLAS, and engines.host with it, use this process's part of the machine, unless the user chose threads.

    local: a communicator of the ranks of this machine.
    """
    from threadpoolctl import threadpool_limits

    if any(os.environ.get(name) for name in THREADS):
        return
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count()))
    bound = len(set().union(*local.allgather(allowed))) > len(allowed)  # the launcher gave each its own
    number = len(allowed) if bound else max(1, len(allowed) // local.size)
    threadpool_limits(number)
    os.environ |= dict.fromkeys(THREADS, str(number))  # for a BLAS that threadpoolctl does not know
