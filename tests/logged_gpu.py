"""CuPy's own wheel and cuDNN's planning on a driver that computes nothing and logs every call: logged_driver.c.

    logged_gpu.install(log)         # before `import cupy`; then import it and compute
    logged_gpu.mark("epoch 1")      # a remark in the log
    logged_gpu.events(log)          # all that was called, as a list of Events

Streams, captures, memory, the order of calls and their arguments are those of a real GPU. Numbers and time are not, for
kernels do nothing. cuDNN plans for an H100, and what it executes is one node. LOGGED_GPU_DEVICES: how many devices
there are.
"""

import ctypes
import functools
import glob
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

SOURCE = Path(__file__).with_name("logged_driver.c")
H100 = dict(deviceVer=900, driverVer=13000, cudaDeviceId=0, totalGlobalMem=85899345920,
            maxGridSize=[2147483647, 65535, 65535], maxBlockSize=[1024, 1024, 64], regsPerBlock=65536,
            multiProcessorCount=132, smClockRateKHz=1980000, memClockRateKHz=2619000, memoryBusWidth=5120,
            l2CacheSize=52428800, warpSize=32, maxSharedMemoryPerBlock=49152, maxSharedMemoryPerBlockOptin=232448,
            reservedSharedMemoryPerBlock=1024, maxRegistersPerSM=65536, pciDeviceId=0, maxCtasPerSM=32,
            maxThreadsPerBlock=1024, maxThreadsPerSM=2048, isTccDriver=0, supportCoopLaunch=1,
            oversizedSharedMemoryPerBlock=0, maxSharedMemoryPerSM=233472, deviceName="NVIDIA H100 80GB HBM3", ENFORCE=1)
HOST_DEFINES = """
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __host__
#define __device__
#define __device_builtin__
#define __cudart_builtin__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
"""  # the header crt/host_defines.h for a C compiler: it comes with nvcc, which the wheels do not bring


def missing():
    """What there would have to be, in words; "" if it can be installed."""
    names = [name for name in ("cupy", "cudnn") if importlib.util.find_spec(name) is None]
    names += [program for program in ("gcc", "nm") if not shutil.which(program)]
    names += [] if headers() else ["CUDA's headers"]
    names += [] if (sys.platform, platform.machine()) == ("linux", "x86_64") else ["Linux on x86_64"]
    return f"{' and '.join(names)} would be needed" if names else ""


# ---------------------------------------------------------------------------------------------- the driver


def packages(pattern):
    """Files of installed packages"""
    return [path for place in sys.path for path in glob.glob(os.path.join(place or ".", pattern))]


def headers():
    return [os.path.dirname(path) for path in packages("nvidia/*/include/cuda_runtime_api.h")]


@functools.cache
def library():
    """The driver, compiled if it is not yet. Once it is loaded, whoever looks for libcuda.so.1 finds it."""
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", *(f"-I{path}" for path in headers()[:1])]
    key = hashlib.sha256(repr((SOURCE.read_text(), HOST_DEFINES, flags)).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"logged_gpu_{os.getuid()}"
    (folder / "crt").mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{key}.so"
    if not path.exists():
        (folder / "crt" / "host_defines.h").write_text(HOST_DEFINES)
        fresh = folder / f"{key}.{os.getpid()}"
        subprocess.run(["gcc", *flags, f"-I{folder}", "-o", str(fresh), str(SOURCE)], check=True)
        os.replace(fresh, path)  # at once: other processes may be at it too
    found = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    for function in (found.logged_node, found.logged_holds):
        function.argtypes = ctypes.c_void_p, ctypes.c_void_p
    found.logged_node.argtypes = ctypes.c_char_p, ctypes.c_void_p
    return found


def redirect(path):
    """Let the CUDA runtime inside one of CuPy's modules begin each function with a jump into the driver."""
    ctypes.CDLL(path)  # where it lies once loaded, it stays
    places = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
    base = int(places[0][0].split("-")[0], 16)
    for first, last in (map(lambda word: int(word, 16), place[0].split("-")) for place in places if "x" in place[1]):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 7):
            raise OSError("code cannot be made writable")
    for line in subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout.splitlines():
        address, kind, name = line.rpartition(" ")[0][:16], line[17:18], line[19:]
        if kind in "tT" and name.startswith("cuda"):
            function = getattr(library(), name, library().logged_unknown)
            target = ctypes.cast(function, ctypes.c_void_p).value
            jump = b"\x48\xb8" + target.to_bytes(8, "little") + b"\xff\xe0"  # mov rax, target; jmp rax
            ctypes.memmove(base + int(address, 16), jump, len(jump))


def mark(text):
    library().logged_mark(text.encode())


# ---------------------------------------------------------------------------------------------- cuDNN and NCCL


def stand_in_for_cudnn():
    """From now on cuDNN plans for an H100 that is not there, and executes by logging a node."""
    from cuda import pathfinder

    pathfinder.load_nvidia_dynamic_lib("cudart")
    import cudnn

    properties = cudnn.create_device_properties(json.dumps(H100))

    class Graph(cudnn.pygraph):
        def __init__(self, *args, handle=None, **options):
            super().__init__(*args, **({"device_property": properties} if handle else {}) | options)

        def execute_plan_at_index(self, pack, workspace, index, handle):
            for tensor, address in pack.items():
                extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.get_dim(), tensor.get_stride()))
                assert address % 16 == 0 and library().logged_holds(address, extent), (tensor.get_name(), address)
            needed = self.get_workspace_size_plan_at_index(index)
            assert library().logged_holds(workspace, needed), "the scratch memory is too small"
            library().logged_node(self.nodes[0].node_type.name.encode(), handle.stream)

    cudnn.pygraph = Graph
    cudnn.create_handle = lambda: cudnn.Handle(None, 0, 0)


class ThroughTheHost:
    """cupyx.distributed.NCCLBackend, by MPI"""

    def __init__(self, size, rank, use_mpi):
        from mpi4py import MPI

        assert use_mpi and (MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank) == (size, rank)
        self.mpi = MPI

    def all_reduce(self, source, target):
        import cupy

        mark(f"all_reduce {source.nbytes}")
        library().logged_node(b"all_reduce", cupy.cuda.get_current_stream().ptr)
        total = source.get()
        self.mpi.COMM_WORLD.Allreduce(self.mpi.IN_PLACE, total)
        target.set(total)
        mark("all_reduce done")


def install(log):
    """Before `import cupy`: from now on there is a GPU, and all that it is told is logged in this file."""
    assert "cupy" not in sys.modules, "CuPy was imported before"
    os.environ["LOGGED_GPU_LOG"] = str(log)
    for module in ("cupy_backends/cuda/api/runtime", "cupy/cuda/cub"):
        for path in packages(f"{module}.*.so")[:1]:
            redirect(path)
    stand_in_for_cudnn()
    import cupyx.distributed

    cupyx.distributed.NCCLBackend = ThroughTheHost


# ---------------------------------------------------------------------------------------------- the log


class Event(typing.NamedTuple):
    """One line of the log. stream: None of a call that has none. captured: in a capture, of that stream or of any."""

    call: str
    stream: int | None
    captured: bool
    words: tuple

    @property
    def name(self):
        """Of a launch or an execution: what was run; else the call"""
        return self.words[0] if self.call in ("launch", "node") else self.call


def events(log):
    found = []
    for line in Path(log).read_text().splitlines():
        call, stream, captured, words = line.split("\t")
        found.append(Event(call, None if stream == "-" else int(stream), captured == "1", tuple(words.split())))
    return found
