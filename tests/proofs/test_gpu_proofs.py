"""engines/gpu.py without a GPU: all variants of its kernels compile, and cuDNN has a plan for every convolution.

The kernels are compiled for real where nvcc or CuPy is installed; plans are cuDNN's own, for an H100 that need not be
there, where CuPy and cuDNN are installed. Run on the GPU or the simulated one: longer runs.
"""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_engines_gpu import PACKS, defines, nvcc, planner  # noqa: E402

import exp_bottleneck as bottleneck  # noqa: E402
import exp_resnet_cifar as resnet  # noqa: E402
import exp_resnet_imagenet as imagenet  # noqa: E402
import nn  # noqa: E402

# ---------------------------------------------------------------------------------------------- kernels compile


def nvrtc(kind, pack, compute):
    compiler = pytest.importorskip("cupy.cuda", reason="neither nvcc nor CuPy is there to compile with").nvrtc
    program = compiler.createProgram((ROOT / "engines" / "gpu.cu").read_text(), "gpu.cu", (), ())
    try:
        compiler.compileProgram(program, (f"--gpu-architecture=sm_{compute}", *defines(kind, pack)))
        assert len(compiler.getCUBIN(program)) > 1000
    except compiler.NVRTCError:
        pytest.fail(compiler.getProgramLog(program))
    except RuntimeError as missing:  # CuPy is there, but not the library
        pytest.skip(f"no compiler: {missing}")
    finally:
        compiler.destroyProgram(program)


@pytest.mark.parametrize("compute", [80, 90])
@pytest.mark.parametrize("kind, pack", [(kind, pack) for kind, packs in PACKS.items() for pack in packs])
def test_kernels_compile(kind, pack, compute, tmp_path):
    if shutil.which("nvcc"):
        nvcc(kind, pack, compute, tmp_path / "gpu.cubin")
    else:
        nvrtc(kind, pack, compute)


# ---------------------------------------------------------------------------------------------- cuDNN has plans

# What cuDNN wants to find in the driver
SYMBOLS = """
    CtxGetCurrent CtxGetLimit CtxPopCurrent CtxPushCurrent DeviceGet DeviceGetCount DriverGetVersion GetErrorName
    GetErrorString KernelGetAttribute KernelGetFunction KernelSetAttribute LaunchCooperativeKernel LaunchKernel
    LaunchKernelEx LibraryGetKernel LibraryLoadData LibraryLoadFromFile LibraryUnload LinkAddData LinkComplete
    LinkCreate LinkDestroy ModuleGetFunction ModuleLoadData ModuleUnload OccupancyMaxPotentialClusterSize StreamGetCtx
    TensorMapEncodeIm2col TensorMapEncodeTiled
""".split()
H100 = dict(deviceVer=900, driverVer=13000, cudaDeviceId=0, totalGlobalMem=85899345920,
            maxGridSize=[2147483647, 65535, 65535], maxBlockSize=[1024, 1024, 64], regsPerBlock=65536,
            multiProcessorCount=132, smClockRateKHz=1980000, memClockRateKHz=2619000, memoryBusWidth=5120,
            l2CacheSize=52428800, warpSize=32, maxSharedMemoryPerBlock=49152, maxSharedMemoryPerBlockOptin=232448,
            reservedSharedMemoryPerBlock=1024, maxRegistersPerSM=65536, pciDeviceId=0, maxCtasPerSM=32,
            maxThreadsPerBlock=1024, maxThreadsPerSM=2048, isTccDriver=0, supportCoopLaunch=1,
            oversizedSharedMemoryPerBlock=0, maxSharedMemoryPerSM=233472, deviceName="NVIDIA H100 80GB HBM3", ENFORCE=1)
LIMIT = H100["totalGlobalMem"] // 16
PLANNED = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "float64": "float64"}


def convolutions(network, side):
    """{(C, H, W, O, k, stride, padding)} of a network for images of this size"""
    found, before = {}, nn.conv2d

    def conv2d(x, w, stride=1, padding=0):
        y = before(x, w, stride, padding)
        found[(*x.shape[1:], len(w), w.shape[2], stride, padding)] = y.shape[2:]
        return y

    nn.conv2d = conv2d
    try:
        with nn.no_grad():
            network.eval()(nn.Tensor(np.zeros((1, 3, side, side), np.float32)))
    finally:
        nn.conv2d = before
    return found


def plan_all():
    """Print [shape, first plan, its workspace] of each convolution, or what cuDNN says instead, as JSON."""
    gpu = planner()
    where = {"device_property": gpu.cudnn().create_device_properties(json.dumps(H100))}
    networks = [(resnet.ResNet18(width), 32, (128, 80)) for width in (8, 12, 18, 32, 40, 64, 90, 128)]
    networks += [(imagenet.ResNet18(width), 224, (256,)) for width in (64, 90, 128, 181, 256)]
    for kind, base, width in itertools.product(("linear", "nonlinear"), (8, 18), (1.5, 2, 3)):
        s = bottleneck.Settings(kind=kind, base_width=base, width=int(base * width))
        networks.append((bottleneck.build(s, 10), 32, (128,)))
    found = []
    for (network, side, batches), precision in itertools.product(networks, PLANNED):
        if precision == "float64" and network is not networks[0][0]:
            continue
        for ((C, H, W, *rest), size), N in itertools.product(convolutions(network, side).items(), batches):
            O, k, stride, padding = rest
            channels = 4 if C == 3 and precision == "bf16" else C
            shapes = (N, channels, H, W), (O, channels, k, k), (N, O, *size)
            for kind in ("fprop", "dgrad", "wgrad")[:: 2 if C == 3 else 1]:  # images need no gradient
                line = [f"{precision} {gpu.described(kind, *shapes, PLANNED[precision], stride, padding)}"]
                try:
                    graph, _ = gpu.convolution(kind, *shapes, PLANNED[precision], stride, padding, precision == "fp32",
                                               True, **where)
                    number = next(gpu.plans(graph, LIMIT), None)
                    line += [number] if number is None else [number, graph.get_workspace_size_plan_at_index(number)]
                except Exception as fault:
                    line.append(str(fault))
                found.append(line)
    print(json.dumps(found))


def test_cudnn_has_plans(tmp_path):
    """For every convolution of the experiments, in all directions and precisions, without a GPU or driver."""
    missing = [name for name in ("cupy", "cudnn") if importlib.util.find_spec(name) is None]
    missing += [] if shutil.which("gcc") else ["gcc"]
    if missing:
        pytest.skip(f"{' and '.join(missing)} would be needed")
    source = "\n".join(f"int cu{name}(void) {{ return 100; }}" for name in SYMBOLS)  # 100: there is no device
    subprocess.run(["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(tmp_path / "libcuda.so.1")], input=source,
                   text=True, check=True)
    paths = {"LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    done = subprocess.run([sys.executable, __file__], env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 500
    wrong = [line for line in found if not (len(line) == 3 and 0 <= line[2] <= LIMIT)]
    assert not wrong, f"{len(wrong)} of {len(found)}: {wrong[:5]}"
    print(f"{len(found)} convolutions, the largest workspace {max(line[2] for line in found):,} bytes")


if __name__ == "__main__":
    plan_all()
