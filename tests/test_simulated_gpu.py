"""The simulated GPU: it computes what a GPU would, and refuses what a GPU would not forgive.

Its convolutions are compared with those of the CPU in test_engines_gpu.py.
"""

import gc
import math

import numpy as np
import pytest
import simulated_gpu
from simulated_gpu import launches

CODE = r"""
#define THREADS 64
#define KERNEL extern "C" __global__ void
struct Line { int count; float factor; long long stride; };  /* by value */

template <class T> __device__ T block_sum(T x)
{
    __shared__ T part[THREADS];
    part[threadIdx.x] = x;
    __syncthreads();
    #pragma unroll
    for (int k = THREADS / 2; k; k /= 2) {
        if (threadIdx.x < k) part[threadIdx.x] += part[threadIdx.x + k];
        __syncthreads();
    }
    return part[0];
}

extern "C" __global__ __launch_bounds__(THREADS) void
sums(const float* __restrict__ x,  // a matrix, (rows)
     const Line line, double weight, float* y)
{
    float sum = 0;
    for (int i = threadIdx.x; i < line.count; i += blockDim.x) sum += x[blockIdx.x * line.stride + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) y[blockIdx.x] = __fmul_rn(sum, line.factor) * weight;
}
KERNEL order(int* y, int* count) { y[atomicAdd(count, 1)] = blockIdx.x * blockDim.x + threadIdx.x; }
KERNEL add_one(float* x, long long n) { for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] += ONE; }
KERNEL some_leave(int n) { if (threadIdx.x >= n) return; __syncthreads(); }
KERNEL other_barrier() {
    if (threadIdx.x < 3) __syncthreads();
    else
        __syncthreads();
}
KERNEL no_barrier(float* y)
{
    __shared__ float part[THREADS];
    part[threadIdx.x] = 1;
    y[threadIdx.x] = part[(threadIdx.x + 1) % THREADS] + part[(threadIdx.x + THREADS - 1) % THREADS];
}
KERNEL index(int* y)  // also the name of a function of C
{
    __shared__ int at[THREADS];
    int mine = threadIdx.x;
    at[mine] = mine;
    for (int i = 0; i < 10; ++i) {
        __syncthreads();
        int next = at[(mine + 1) % THREADS];
        __syncthreads();
        at[mine] = next;
    }
    y[threadIdx.x] = at[mine];
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
def kernel(cupy):
    return cupy.RawModule(code=CODE, options=("--std=c++17", "-DONE=1")).get_function


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def line(count, factor, stride):
    return np.array((count, factor, stride), np.dtype([("n", "i4"), ("f", "f4"), ("s", "i8")], align=True))


def test_operations_are_those_of_numpy(cupy, rng):
    array = rng.normal(size=(4, 6)).astype(np.float32)
    x = cupy.asarray(array)
    for f in (lambda xp, a: a + 1, lambda xp, a: a.T @ a, lambda xp, a: xp.maximum(a, 0).sum(axis=0),
              lambda xp, a: xp.where(a > 0, a, 0.5), lambda xp, a: a[::2, ::-1], lambda xp, a: a[xp.arange(3), 1],
              lambda xp, a: xp.concatenate([a, a], axis=1), lambda xp, a: a.reshape(2, -1).mean(axis=1, keepdims=True),
              lambda xp, a: xp.add.reduce(a, axis=1), lambda xp, a: a.take(xp.asarray([3, 0]), axis=1),
              lambda xp, a: xp.flatnonzero(a > 0)):
        want, got = f(np, array), f(cupy, x)
        assert isinstance(got, cupy.ndarray) and got.dtype == want.dtype and (got.get() == want).all()
    assert (x.T + x.T).strides == (array.T + array.T).strides  # the order of the axes is kept, as by CuPy
    target = cupy.zeros(3)
    cupy.add.at(target, cupy.asarray([1, 1, 2]), 1.0)
    target[:1] = 5
    target *= 2
    assert target.get().tolist() == [10, 4, 2] and float(target[1]) == 4 and len(target) == 3
    for view in (x.T, x[1], x[0, 1], x.reshape(-1), cupy.broadcast_to(x, (2, 4, 6)), x.astype(np.float32, copy=False)):
        assert view.memory is x.memory and (view is x or view.base is x)
    for copy in (x + 0, x.T.reshape(-1), x.copy(), cupy.ascontiguousarray(x.T)):
        assert copy.memory is not x.memory and copy.base is None


def test_host_and_device_do_not_mix(cupy):
    x, array = cupy.ones(3), np.ones(3)
    for wrong in (lambda: x + array, lambda: array + x, lambda: cupy.add(x, array), lambda: cupy.where(x > 0, array, x),
                  lambda: x.__setitem__(slice(None), array), lambda: array.__setitem__(slice(None), x),
                  lambda: x[array > 0], lambda: np.asarray(x), lambda: np.concatenate([x, array]),
                  lambda: np.add(array, array, out=x), lambda: np.add(x, x, out=array), lambda: cupy.exp(array),
                  lambda: x + [1, 2, 3], lambda: np.vecdot(x, x), lambda: x.sum(where=x > 0)):
        with pytest.raises(TypeError):
            wrong()
    assert not isinstance(x, np.ndarray)
    assert (x + np.float32(1) + np.array(2)).get().tolist() == [4, 4, 4]
    for name in ("vecdot", "setbufsize", "errstate", "nonsense"):
        with pytest.raises(AttributeError, match=name):
            getattr(cupy, name)


def test_memory_is_watched(cupy, kernel):
    """Fresh it is NaN; what is written behind its end is noticed, once."""
    assert np.isnan(cupy.empty((2, 3), np.float32).get()).all()
    x = cupy.empty(5, np.float32)
    simulated_gpu.check_guards()
    kernel("add_one")((1,), (64,), (x, 6))
    with pytest.raises(RuntimeError, match="20"):
        simulated_gpu.check_guards()
    simulated_gpu.check_guards()
    x.memory.raw[x.memory.offset + 20 + 63] = 0
    del x
    with pytest.raises(RuntimeError, match="20"):
        simulated_gpu.check_guards()


def test_kernels_run(cupy, kernel, rng):
    x = rng.integers(-50, 50, (5, 200)).astype(np.float32)
    y = cupy.empty(5, np.float32)
    kernel("sums")((5,), (64,), (cupy.asarray(x), line(150, 2, 200), 0.5, y))
    assert (y.get() == x[:, :150].sum(1)).all() and launches == ["copy to device", "sums", "copy to host"]
    y, count = cupy.empty(640, np.int32), cupy.zeros(1, np.int32)
    kernel("order")((10,), (64,), (y, count))
    blocks, threads = np.divmod(y.get().reshape(10, 64), 64)
    assert (blocks == np.arange(10)[::-1, None]).all() and (np.sort(threads) == np.arange(64)).all()
    assert (abs(np.diff(threads)) > 1).all()
    z = cupy.empty(64, np.float32)
    kernel("no_barrier")((1,), (64,), (z,))
    assert np.isnan(z.get()).any()  # somebody read what was not written yet, and it was NaN


def test_barriers(cupy, kernel):
    for _ in range(2):  # and the next launch is not disturbed
        with pytest.raises(RuntimeError, match=r"some_leave: 54 of 64 threads"):
            kernel("some_leave")((1,), (64,), (np.int32(10),))
        with pytest.raises(RuntimeError, match="other_barrier: .* different barriers"):
            kernel("other_barrier")((1,), (64,), ())
        y = cupy.empty(64, np.int32)
        kernel("index")((2,), (64,), (y,))
        assert (y.get() == (np.arange(64) + 10) % 64).all()
    kernel("some_leave")((1,), (64,), (np.int32(64),))


def test_arguments_are_checked(cupy, kernel):
    x, n = cupy.zeros(4, np.float32), line(1, 1, 1)
    for args, words in (((x, n, 1.0), "4 arguments"), ((x, n, 1.0, np.float32(1)), "'y'"),
                        ((x, n, np.float32(1), x), "'weight'.*8 bytes"), ((x, n, 1, x), "'weight'.*floating"),
                        ((x, np.int64(1), 1.0, x), "'line'"), ((x, x, 1.0, x), "'line'"),
                        ((x.get(), n, 1.0, x), "'x'"), ((cupy.zeros(4), n, 1.0, x), "'x'.*float32"),
                        ((x.view(np.int32), n, 1.0, x), "'x'.*int32")):
        with pytest.raises(TypeError, match=f"sums.*{words}"):
            kernel("sums")((1,), (64,), args)
    with pytest.raises(RuntimeError, match="64 threads"):
        kernel("sums")((1,), (128,), (x, n, 1.0, x))
    with pytest.raises(RuntimeError, match="INVALID_VALUE"):
        kernel("order")((0,), (64,), (None, None))
    with pytest.raises(RuntimeError, match="live allocation"):
        kernel("add_one")((1,), (64,), (12345, 1))
    with pytest.raises(RuntimeError, match="nonsense"):
        kernel("nonsense")
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


def test_nothing_runs_before_the_launch(cupy, kernel):
    x, indices = cupy.zeros(4, np.float32), cupy.asarray([0, 3])

    def work():
        nonlocal x
        x += 1
        x[1:2] = 10
        kernel("add_one")((1,), (64,), (x, np.int64(4)))
        y = cupy.exp(x[::2] / 100).sum() + cupy.full(3, 2, np.float32)
        cupy.add.at(x, indices, 100)
        order = x.argsort()
        return y, x[order], cupy.where(x > 50, x, 0).astype(np.float64), x.reshape(2, 2).T.reshape(4)

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
        wishes = (want, y, np.sort(want), np.where(want > 50, want, 0), want.reshape(2, 2).T.ravel())
        for got, wish in zip((x, *out), wishes, strict=True):
            np.testing.assert_allclose(got.get(), wish, rtol=1e-6)
    assert "add_one" in graph.names and "ufunc add" in graph.names


def test_what_a_capture_refuses(cupy):
    x = cupy.ones((3, 3))
    for wrong in (lambda: x.get(), lambda: float(x[0, 0]), lambda: bool(x[0, 0]), lambda: cupy.asarray(np.ones(3)),
                  lambda: cupy.asarray(1.0), lambda: x @ x, lambda: np.matmul(x, x), lambda: cupy.flatnonzero(x),
                  lambda: x[x > 0], lambda: x.set(np.ones((3, 3))),
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
    assert stream.is_capturing() and stream.end_capture().names == [] and x.get()[0, 0] == 1
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


def planned(cudnn, x=(2, 64, 1, 1), w=(4, 64, 1, 1), y=(2, 4, 1, 1), stride=1, padding=0):
    """The graph of a convolution in float32, in NHWC, and its three tensors"""
    def nhwc(shape):
        return dict(dim=list(shape), stride=[math.prod(shape[1:]), 1, shape[3] * shape[1], shape[1]])

    graph = cudnn.pygraph(io_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT)
    image, weight = (graph.tensor(name=name, **nhwc(shape)) for name, shape in (("x", x), ("w", w)))
    out = graph.conv_fprop(image=image, weight=weight, padding=[padding] * 2, stride=[stride] * 2, dilation=[1, 1])
    out.set_output(True).set_dim(nhwc(y)["dim"]).set_stride(nhwc(y)["stride"])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.deselect_numeric_notes([cudnn.numerical_note.TENSOR_CORE])
    return graph, image, weight, out


def small(cudnn, cupy, rng):
    """A 1x1 convolution: its graph, a plan, the variant pack, and the arrays x, w and y = x w^T"""
    graph, *tensors = planned(cudnn)
    arrays = [cupy.asarray(rng.normal(size=shape), dtype=np.float32) for shape in ((2, 64), (4, 64), (2, 4))]
    plan = graph.get_execution_plan_count() - 1
    graph.build_plan_at_index(plan)
    return graph, plan, dict(zip(tensors, (a.data.ptr for a in arrays))), *arrays


def test_cudnn_in_a_capture(cupy, rng):
    import cudnn

    workspace, handle, stream = cupy.empty(512, np.uint8), cudnn.create_handle(), cupy.cuda.Stream(non_blocking=True)
    graph, plan, pack, x, w, y = small(cudnn, cupy, rng)
    cudnn.set_stream(handle=handle, stream=stream.ptr)
    y.fill(0)
    with stream:
        stream.begin_capture()
        graph.execute_plan_at_index(pack, workspace.data.ptr, plan, handle=handle)
        replay = stream.end_capture()
    assert (y.get() == 0).all() and replay.names == ["cudnn conv_fprop"]
    for _ in range(2):
        x *= 2
        replay.launch()
        np.testing.assert_allclose(y.get(), x.get() @ w.get().T, rtol=1e-4, atol=1e-4)


def test_what_cudnn_refuses(cupy, rng):
    import cudnn

    workspace, handle = cupy.empty(512, np.uint8), cudnn.create_handle()
    graph, plan, pack, x, w, y = small(cudnn, cupy, rng)
    wrong = dict(zip(pack, (x.data.ptr, w.data.ptr, x.data.ptr)))  # the output on an input
    outside = dict(zip(pack, (x.data.ptr, w.data.ptr + 512, y.data.ptr)))
    for args in ((pack, None, plan), (pack, workspace.data.ptr, plan - 1), (pack, workspace.data.ptr + 511, plan),
                 (dict(list(pack.items())[:2]), workspace.data.ptr, plan), (wrong, workspace.data.ptr, plan),
                 (outside, workspace.data.ptr, plan), (pack, x.data.ptr, plan)):
        with pytest.raises(RuntimeError):
            graph.execute_plan_at_index(*args, handle=handle)
    graph.execute_plan_at_index(pack, workspace.data.ptr, plan, handle=handle)
    del y
    with pytest.raises(RuntimeError, match="live allocation"):
        graph.execute_plan_at_index(pack, workspace.data.ptr, plan, handle=handle)
    cudnn.destroy_handle(handle)
    with pytest.raises(RuntimeError, match="handle"):
        graph.execute_plan_at_index(pack, workspace.data.ptr, plan, handle=handle)
    fine = dict(x=(2, 3, 6, 6), w=(4, 3, 3, 3), y=(2, 4, 3, 3), stride=2, padding=1)
    planned(cudnn, **fine)
    for wrong in (dict(x=(2, 5, 6, 6)), dict(y=(2, 4, 6, 6))):
        with pytest.raises(RuntimeError, match="not fit"):
            planned(cudnn, **fine | wrong)
    graph = cudnn.pygraph(io_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT)
    a, b = (graph.tensor(dim=dim) for dim in ([2, 4, 3, 3], [4, 3, 3, 3]))
    out = graph.conv_dgrad(loss=a, filter=b, padding=[1, 1], stride=[2, 2], dilation=[1, 1])
    with pytest.raises(RuntimeError, match="set_output"):
        graph.validate()
    out.set_output(True)
    with pytest.raises(RuntimeError, match="set_dim"):
        graph.validate()
