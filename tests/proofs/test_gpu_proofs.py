"""engines/gpu.py without a GPU: all variants of its kernels compile, and cuDNN has a plan for every convolution.

The kernels are compiled for real where nvcc or CuPy is installed; plans are cuDNN's own, for cards that need not be
there, where CuPy and cuDNN are installed. Run on the GPU or the simulated one: longer runs.
"""

import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import logged_gpu  # noqa: E402
from logged_gpu import H100  # noqa: E402
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

A100 = H100 | dict(
    deviceVer=800, totalGlobalMem=40 * 2**30, multiProcessorCount=108, smClockRateKHz=1410000, memClockRateKHz=1215000,
    l2CacheSize=40 * 2**20, maxSharedMemoryPerBlockOptin=166912, maxSharedMemoryPerSM=167936,
    deviceName="NVIDIA A100-SXM4-40GB")
RTX3090 = A100 | dict(
    deviceVer=860, totalGlobalMem=24 * 2**30, multiProcessorCount=82, smClockRateKHz=1695000, memClockRateKHz=9751000,
    memoryBusWidth=384, l2CacheSize=6 * 2**20, maxSharedMemoryPerBlockOptin=101376, maxCtasPerSM=16,
    maxThreadsPerSM=1536, maxSharedMemoryPerSM=102400, deviceName="NVIDIA GeForce RTX 3090")
RTX4090 = RTX3090 | dict(
    deviceVer=890, multiProcessorCount=128, smClockRateKHz=2520000, memClockRateKHz=10501000, l2CacheSize=72 * 2**20,
    maxCtasPerSM=24, deviceName="NVIDIA GeForce RTX 4090")
T4 = RTX3090 | dict(
    deviceVer=750, totalGlobalMem=15 * 2**30, multiProcessorCount=40, smClockRateKHz=1590000, memClockRateKHz=5001000,
    memoryBusWidth=256, l2CacheSize=4 * 2**20, maxSharedMemoryPerBlockOptin=65536, maxThreadsPerSM=1024,
    maxSharedMemoryPerSM=65536, reservedSharedMemoryPerBlock=0, deviceName="Tesla T4")
CARDS = {"H100": H100, "A100": A100, "RTX 3090": RTX3090, "RTX 4090": RTX4090, "T4": T4}
PLANNED = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "float64": "float64"}


def limit(card):
    """Bytes of scratch memory for a plan, as Convolutions allows"""
    return max(planner().WORKSPACE, CARDS[card]["totalGlobalMem"] // 16)


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


def all_convolutions():
    """(network, {convolution: size}, batches) of the experiments; the small ResNets first"""
    for width in (8, 64, 12, 18, 32, 40, 90, 128):
        yield f"CIFAR {width}", convolutions(resnet.ResNet18(width), 32), (128, 80)
    for width in (64, 90, 128, 181, 256):
        yield f"ImageNet {width}", convolutions(imagenet.ResNet18(width), 224), (256,)
    for kind, base, width in itertools.product(("linear", "nonlinear"), (8, 18), (1.5, 2, 3)):
        s = bottleneck.Settings(kind=kind, base_width=base, width=int(base * width))
        yield f"{kind} bottleneck {width}", convolutions(bottleneck.build(s, 10), 32), (128,)


def plan_all():
    """Print [shape, bytes allowed, first plan, its workspace] of each convolution, or what cuDNN says, as JSON.

    All networks on the H100, and few on other cards; float64 for one.
    """
    logged_gpu.library()  # cuDNN does not load without a driver
    gpu, found = planner(), []
    for network, layers, batches in all_convolutions():
        for card, precision in itertools.product(CARDS, PLANNED):
            if (network != "CIFAR 8" and precision == "float64" or (card, precision) == ("T4", "bf16")
                    or network not in ("CIFAR 8", "CIFAR 64", "ImageNet 64") and card != "H100"):
                continue
            where = {"device_property": gpu.cudnn().create_device_properties(json.dumps(CARDS[card]))}
            for ((C, H, W, *rest), size), N in itertools.product(layers.items(), batches):
                O, k, stride, padding = rest
                channels = 4 if C == 3 and precision == "bf16" else C
                shapes = (N, channels, H, W), (O, channels, k, k), (N, O, *size)
                for kind in ("fprop", "dgrad", "wgrad")[:: 2 if C == 3 else 1]:  # images need no gradient
                    name = gpu.described(kind, *shapes, PLANNED[precision], stride, padding)
                    line = [f"{card}, {precision}: {name}", limit(card)]
                    try:
                        graph, _ = gpu.convolution(kind, *shapes, PLANNED[precision], stride, padding,
                                                   precision == "fp32", True, **where)
                        number = next(gpu.plans(graph, limit(card)), None)
                        line += [number] if number is None else [number, graph.get_workspace_size_plan_at_index(number)]
                    except Exception as fault:
                        line.append(str(fault))
                    found.append(line)
    print(json.dumps(found))


def test_cudnn_has_plans():
    """For every convolution of the experiments, in all directions and precisions, without a GPU or driver; on an H100,
    and some on other cards.
    """
    if reason := logged_gpu.missing():
        pytest.skip(reason)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = [line for line in found if not (len(line) == 4 and 0 <= line[3] <= line[1])]
    assert not wrong, f"{len(wrong)} of {len(found)}: {wrong[:5]}"
    counts = Counter(line[0].split(",")[0] for line in found)
    assert set(counts) == set(CARDS) and counts["H100"] > 3000 and min(counts.values()) > 200, counts
    print(f"convolutions: {dict(counts)}, the largest workspace {max(line[3] for line in found):,} bytes")


if __name__ == "__main__":
    plan_all()
