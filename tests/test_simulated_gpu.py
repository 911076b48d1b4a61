"""The simulated GPU refuses what a GPU would not forgive. That it computes what it should: test_engines_gpu.py."""

import gc

import numpy as np
import pytest
import simulated_gpu
from simulated_gpu import launches

CODE = r"""
struct Line { int count; float factor; };  // by value

extern "C" __global__ __launch_bounds__(256) void sums(const float* x, const Line line, double weight, float* y)
{
    __shared__ float part[64];
    const int t = threadIdx.x;
    part[t] = 0;
    for (int i = t; i < line.count; i += blockDim.x) part[t] += x[blockIdx.x * line.count + i];
    __syncthreads();
    for (int half = 32; half; half /= 2) {
        if (t < half) part[t] += part[t + half];
        __syncthreads();
    }
    if (t == 0) y[blockIdx.x] = __fmul_rn(part[0], line.factor) * weight;
}
extern "C" __global__ void order(int* y, int* count) { y[(*count)++] = blockIdx.x * blockDim.x + threadIdx.x; }
extern "C" __global__ void add_one(float* x, long long n) { for (int i = threadIdx.x; i < n; i += blockDim.x) x[i]++; }
extern "C" __global__ void some_leave(int n) { if (threadIdx.x >= n) return; __syncthreads(); }
extern "C" __global__ void other_barrier()
{
    if (threadIdx.x < 3) __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void no_barrier(float* y)
{
    __shared__ float part[64];
    part[threadIdx.x] = 1;
    y[threadIdx.x] = part[(threadIdx.x + 1) % 64] + part[(threadIdx.x + 63) % 64];
}
"""


@pytest.fixture
def cupy():
    if reason := simulated_gpu.available():
        pytest.skip(reason)
    launches.clear()
    yield simulated_gpu.install()
    simulated_gpu.uninstall()
    gc.collect()
    simulated_gpu.check_guards()


@pytest.fixture
def run(cupy):
    """run(kernel, *arguments, blocks=1)"""
    module = cupy.RawModule(code=CODE)
    return lambda name, *args, blocks=1, threads=64: module.get_function(name)((blocks,), (threads,), args)


def line(count, factor):
    return np.array((count, factor), np.dtype([("count", "i4"), ("factor", "f4")]))


def test_host_and_device_do_not_mix(cupy):
    x, array = cupy.ones(3), np.ones(3)
    for wrong in (lambda: x + array, lambda: array + x, lambda: cupy.add(x, array), lambda: cupy.where(x > 0, array, x),
                  lambda: x.__setitem__(slice(None), array), lambda: array.__setitem__(slice(None), x),
                  lambda: x[array > 0], lambda: np.asarray(x), lambda: np.concatenate([x, array]),
                  lambda: np.add(array, array, out=x), lambda: np.add(x, x, out=array), lambda: cupy.exp(array)):
        with pytest.raises(TypeError):
            wrong()
    assert not isinstance(x, np.ndarray)
    assert (x + np.float32(1) + np.array(2)).get().tolist() == [4, 4, 4]


def test_memory_is_watched(cupy, run):
    """Fresh it is NaN; what is written behind its end is noticed, once."""
    assert np.isnan(cupy.empty((2, 3), np.float32).get()).all()
    x = cupy.empty(5, np.float32)
    simulated_gpu.check_guards()
    run("add_one", x, np.int64(6))
    with pytest.raises(RuntimeError, match="20"):
        simulated_gpu.check_guards()
    simulated_gpu.check_guards()
    x.memory.guard[-1] = 0
    del x
    with pytest.raises(RuntimeError, match="20"):
        simulated_gpu.check_guards()


def test_kernels_run_in_an_odd_order(cupy, run):
    x = np.random.default_rng(0).integers(-50, 50, (5, 150)).astype(np.float32)
    y = cupy.empty(5, np.float32)
    run("sums", cupy.asarray(x), line(150, 2), np.float64(0.5), y, blocks=5)
    assert (y.get() == x.sum(1)).all() and launches == ["copy to device", "sums", "copy to host"]
    y, count = cupy.empty(640, np.int32), cupy.zeros(1, np.int32)
    run("order", y, count, blocks=10)
    blocks, threads = np.divmod(y.get().reshape(10, 64), 64)
    assert (blocks == np.arange(10)[::-1, None]).all() and (np.sort(threads) == np.arange(64)).all()
    assert (abs(np.diff(threads)) > 1).all()
    z = cupy.empty(64, np.float32)
    run("no_barrier", z)
    assert np.isnan(z.get()).any()  # somebody read what was not written yet, and it was NaN


def test_barriers(cupy, run):
    for _ in range(2):  # and the next launch is not disturbed
        with pytest.raises(RuntimeError, match="some_leave: 54 of 64 threads"):
            run("some_leave", np.int32(10))
        with pytest.raises(RuntimeError, match="other_barrier: .* different barriers"):
            run("other_barrier")
        run("some_leave", np.int32(64))


def test_arguments_are_checked(cupy, run):
    x, n, one = cupy.zeros(4, np.float32), line(1, 1), np.float64(1)
    for args, words in (((x, n, one), "4 arguments"), ((x, n, one, np.float32(1)), "argument 3"),
                        ((x, n, np.float32(1), x), "argument 2: 8 bytes"), ((x, n, np.int64(1), x), "2: .*kind 'f'"),
                        ((x, np.int64(1), one, x), "argument 1"), ((x, x, one, x), "argument 1"), ((x, n, 1, x), "2"),
                        ((x.get(), n, one, x), "argument 0"), ((cupy.zeros(4), n, one, x), "argument 0: .*float32"),
                        ((cupy.zeros(4, np.int32), n, one, x), "argument 0: .*int32")):
        with pytest.raises(TypeError, match=f"sums.*{words}"):
            run("sums", *args)
    for blocks, threads in ((0, 64), (1, 0), (1, 257)):
        with pytest.raises(RuntimeError, match="INVALID_VALUE"):
            run("some_leave", np.int32(1), blocks=blocks, threads=threads)
    with pytest.raises(Exception, match="nonsense"):
        cupy.RawModule(code='extern "C" __global__ void f() { nonsense(); }').get_function("f")


def captured(cupy, work):
    """The graph of work(), and what work returned."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            out = work()
        finally:
            graph = stream.end_capture()
    return graph, out


def test_nothing_runs_before_the_launch(cupy, run):
    x, indices = cupy.zeros(4, np.float32), cupy.asarray([0, 3])

    def work():
        nonlocal x
        x += 1
        x[1:2] = 10
        run("add_one", x, np.int64(4))
        y = cupy.exp(x[::2] / 100).sum() + cupy.full(3, 2, np.float32)
        cupy.add.at(x, indices, 100)
        return y, cupy.where(x > 50, x, 0).astype(np.float64), x.reshape(2, 2).T.reshape(4)

    pool = cupy.cuda.MemoryPool()  # keeps what the graph needs between two operations
    launches.clear()
    with cupy.cuda.using_allocator(pool.malloc):
        graph, out = captured(cupy, work)
    assert launches == [] and (x.get() == 0).all() and all(np.isnan(o.get()).all() for o in out)
    want = np.zeros(4, np.float32)
    for _ in range(3):
        launches.clear()
        graph.launch()
        assert launches == ["graph"]
        want += 1
        want[1] = 10
        want += 1
        y = np.exp(want[::2] / 100).sum() + np.full(3, 2, np.float32)
        want[[0, 3]] += 100
        wishes = (want, y, np.where(want > 50, want, 0), want.reshape(2, 2).T.ravel())
        for got, wish in zip((x, *out), wishes, strict=True):
            np.testing.assert_allclose(got.get(), wish, rtol=1e-6)


def test_what_a_capture_refuses(cupy):
    x = cupy.ones((3, 3))
    graph, _ = captured(cupy, lambda: None)
    for wrong in (lambda: x.get(), lambda: float(x[0, 0]), lambda: bool(x[0, 0]), lambda: cupy.asarray(np.ones(3)),
                  lambda: x @ x, lambda: x[x > 0], lambda: x.set(np.ones((3, 3))), lambda: graph.launch(),
                  lambda: cupy.cuda.get_current_stream().synchronize(), lambda: cupy.cuda.Event().synchronize()):
        with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported"):
            captured(cupy, wrong)
    with pytest.raises(RuntimeError, match="default stream"):
        cupy.cuda.get_current_stream().begin_capture()


def test_a_graph_needs_its_memory(cupy):
    x = [cupy.ones(3)]

    def work():
        return (x[0] + 1).sum()

    graph, total = captured(cupy, work)  # the array x + 1 is gone
    with pytest.raises(RuntimeError, match="freed"):
        graph.launch()
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        graph, total = captured(cupy, work)
    graph.launch()
    assert float(total) == 6 and pool.total_bytes() == 1024
    x.clear()
    with pytest.raises(RuntimeError, match="freed"):
        graph.launch()


def test_streams_are_those_of_cupy(cupy):
    """A stream that is used, not entered, is forgotten when a `with` ends, and get() of NHWC has one inside."""
    x, stream, null = cupy.zeros((2, 3)), cupy.cuda.Stream(non_blocking=True), cupy.cuda.get_current_stream()
    stream.begin_capture()
    x += 1  # on the default stream
    assert stream.end_capture().recorded == [] and x.get()[0, 0] == 1
    stream.use()
    x.get()
    assert cupy.cuda.get_current_stream() is stream
    x.T.get()
    assert cupy.cuda.get_current_stream() is null
    with stream:
        x.T.get()
        assert cupy.cuda.get_current_stream() is stream
    assert cupy.cuda.get_current_stream() is null
    with pytest.raises(RuntimeError, match="non-contiguous"):
        x[:, ::2].set(np.ones((2, 2)))


def planned(cudnn, x, w, y, stride=1, padding=0):
    """The graph of a convolution in float32, in NHWC, and its three tensors by name"""
    from engines.gpu_convolution import convolution

    graph, tensors = convolution("fprop", x, w, y, "float32", stride, padding, handle=cudnn.create_handle())
    graph.build_plan_at_index(2)
    return graph, tensors


def test_what_cudnn_refuses(cupy):
    import cudnn

    graph, tensors = planned(cudnn, (2, 64, 1, 1), (4, 64, 1, 1), (2, 4, 1, 1))
    x, w, y = (cupy.ones(shape, np.float32) for shape in ((2, 64), (4, 64), (2, 4)))
    workspace, handle, stream = cupy.empty(512, np.uint8), cudnn.create_handle(), cupy.cuda.Stream(non_blocking=True)
    scratch = workspace.data.ptr
    pack = {tensors["x"]: x.data.ptr, tensors["w"]: w.data.ptr, tensors["y"]: y.data.ptr}
    for args, words in (((pack, 0, 2), "no live"), ((pack, scratch, 1), "not built"),
                        ((pack, scratch + 511, 2), "needs 384 bytes"), ((pack, x.data.ptr, 2), "overlap"),
                        (({tensors["x"]: x.data.ptr}, scratch, 2), "variant pack"),
                        ((pack | {tensors["y"]: x.data.ptr}, scratch, 2), "overlap"),
                        ((pack | {tensors["w"]: w.data.ptr + 512}, scratch, 2), "needs 1024 bytes"),
                        ((pack | {tensors["w"]: w.data.ptr + 4}, scratch, 2), "multiple of 16")):
        with pytest.raises(RuntimeError, match=words):
            graph.execute_plan_at_index(*args, handle=handle)
    cudnn.set_stream(handle=handle, stream=stream.ptr)
    stream.begin_capture()
    graph.execute_plan_at_index(pack, scratch, 2, handle=handle)
    replay = stream.end_capture()
    assert (y.get() == 1).all()  # nothing has run
    replay.launch()
    assert (y.get() == 64).all()
    del y
    with pytest.raises(RuntimeError, match="live allocation"):
        graph.execute_plan_at_index(pack, scratch, 2, handle=handle)
    fine = dict(x=(2, 3, 6, 6), w=(4, 3, 3, 3), y=(2, 4, 3, 3), stride=2, padding=1)
    planned(cudnn, **fine)
    for wrong in (dict(x=(2, 5, 6, 6)), dict(y=(2, 4, 6, 6))):
        with pytest.raises(RuntimeError, match="not fit"):
            planned(cudnn, **fine | wrong)
