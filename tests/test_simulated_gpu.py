"""The simulated GPU: it computes what a GPU would, and refuses what a GPU would not forgive."""

import gc
import itertools
import sys

import numpy as np
import pytest
import simulated_gpu
from simulated_gpu import launches

pytestmark = pytest.mark.skipif(simulated_gpu.available() is not None, reason=str(simulated_gpu.available()))

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
KERNEL index(int* y, int n)  // also the name of a function of C
{
    int i = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) y[i] = i;
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
KERNEL turns(int* y)
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
KERNEL halves(const float* x, unsigned short* h, float* y)
{
    h[threadIdx.x] = float_to_half(x[threadIdx.x]);
    y[threadIdx.x] = half_to_float(h[threadIdx.x]);
}
"""


@pytest.fixture
def cupy():
    launches.clear()
    yield simulated_gpu.install()
    simulated_gpu.uninstall()
    gc.collect()
    simulated_gpu.check_guards()


@pytest.fixture
def kernel(cupy):
    return cupy.RawModule(code=CODE, options=("--std=c++17", "-DONE=1")).get_function


def line(count, factor, stride):
    return np.array((count, factor, stride), np.dtype([("n", "i4"), ("f", "f4"), ("s", "i8")], align=True))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---------------------------------------------------------------------------------------------- arrays


def test_modules_come_and_go(cupy):
    import cudnn
    import cupy as imported
    from cuda import pathfinder

    pathfinder.load_nvidia_dynamic_lib("cudart")
    assert imported is cupy and cupy.__name__ == "cupy" and cudnn.__version__ and cupy.cuda.is_available()
    simulated_gpu.uninstall()
    assert sys.modules.get("cupy") is not cupy


def test_operations_are_those_of_numpy(cupy, rng):
    host = rng.normal(size=(4, 6)).astype(np.float32)
    x = cupy.asarray(host)
    for f in (lambda xp, a: a + 1, lambda xp, a: a.T @ a, lambda xp, a: xp.maximum(a, 0).sum(axis=0),
              lambda xp, a: xp.where(a > 0, a, 0.5), lambda xp, a: a[::2, ::-1], lambda xp, a: a[xp.arange(3), 1],
              lambda xp, a: xp.concatenate([a, a], axis=1), lambda xp, a: a.astype(np.float16) * 2,
              lambda xp, a: a.reshape(2, -1).mean(axis=1, keepdims=True), lambda xp, a: xp.frexp(a)[1],
              lambda xp, a: xp.add.reduce(a, axis=1), lambda xp, a: a.take(xp.asarray([3, 0]), axis=1),
              lambda xp, a: xp.lib.stride_tricks.as_strided(a, (2, 2), (24, 4)), lambda xp, a: xp.flatnonzero(a > 0)):
        want, got = f(np, host), f(cupy, x)
        assert isinstance(got, cupy.ndarray) and got.dtype == want.dtype and (got.get() == want).all()
    assert (x.T + x.T).strides == (host.T + host.T).strides  # the order of the axes is kept, as by CuPy
    target = cupy.zeros(3)
    cupy.add.at(target, cupy.asarray([1, 1, 2]), 1.0)
    target[:1] = 5
    target *= 2
    assert target.get().tolist() == [10, 4, 2] and float(target[1]) == 4 and len(target) == 3


def test_views_share_memory_and_copies_do_not(cupy):
    x = cupy.zeros((2, 3), np.float32)
    for view in (x.T, x[1], x[0, 1], x.reshape(-1), cupy.broadcast_to(x, (2, 2, 3)), x.astype(np.float32, copy=False)):
        assert view.memory is x.memory and (view is x or view.base is x)
    assert x[1].data.ptr == x.data.ptr + 12
    assert x.astype(np.float32, copy=False) is x and cupy.asarray(x) is x
    x[0, 1][...] = 7
    assert x.get()[0, 1] == 7
    for copy in (x + 0, x.T.reshape(-1), x.copy(), cupy.ascontiguousarray(x.T)):
        assert copy.memory is not x.memory and copy.base is None


def test_host_and_device_do_not_mix(cupy):
    x, host = cupy.ones(3), np.ones(3)
    for wrong in (lambda: x + host, lambda: host + x, lambda: cupy.add(x, host), lambda: cupy.where(x > 0, host, x),
                  lambda: x.__setitem__(slice(None), host), lambda: host.__setitem__(slice(None), x),
                  lambda: x[host > 0], lambda: np.asarray(x), lambda: np.concatenate([x, host]),
                  lambda: np.add(host, host, out=x), lambda: np.add(x, x, out=host), lambda: cupy.exp(host),
                  lambda: x + [1, 2, 3]):
        with pytest.raises(TypeError):
            wrong()
    assert not isinstance(x, np.ndarray)
    assert (x + np.float32(1) + np.array(2)).get().tolist() == [4, 4, 4]
    assert isinstance(np.sum(x), cupy.ndarray) and isinstance(np.float64(2) * x, cupy.ndarray)


def test_what_cupy_has_not(cupy):
    for name in ("vecdot", "setbufsize", "errstate", "nonsense"):
        with pytest.raises(AttributeError, match=name):
            getattr(cupy, name)
    x = cupy.ones(3)
    with pytest.raises(TypeError):
        np.vecdot(x, x)
    with pytest.raises(TypeError, match="where"):
        x.sum(where=x > 0)


def test_fresh_memory_is_nan(cupy):
    assert np.isnan(cupy.empty((2, 3), np.float32).get()).all() and np.isnan(cupy.empty(2, np.float16).get()).all()
    assert np.isnan(cupy.empty_like(cupy.zeros(4)).get()).all()


def test_guards(cupy):
    x = cupy.empty(5, np.float32)
    simulated_gpu.check_guards()
    x.memory.raw[x.memory.offset + 20] = 0
    with pytest.raises(RuntimeError, match="20"):
        simulated_gpu.check_guards()
    simulated_gpu.check_guards()  # reported once
    x.memory.raw[x.memory.offset + 20 + 63] = 0
    del x
    with pytest.raises(RuntimeError, match="20"):
        simulated_gpu.check_guards()


def test_pool(cupy):
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        x = cupy.empty(1000, np.uint8)
    assert pool.used_bytes() == 1024
    del x
    assert pool.used_bytes() == 0 and pool.total_bytes() == 1024
    memory = cupy.empty(24, np.float32)
    assert cupy.ndarray((2, 3), np.float32, memory.data + 8, (4, 8)).data.ptr == memory.data.ptr + 8


# ---------------------------------------------------------------------------------------------- kernels


def test_block_sums_with_a_structure(cupy, kernel, rng):
    x = rng.integers(-50, 50, (5, 200)).astype(np.float32)
    y = cupy.empty(5, np.float32)
    kernel("sums")((5,), (64,), (cupy.asarray(x), line(150, 2, 200), 0.5, y))
    assert (y.get() == x[:, :150].sum(1)).all()
    assert launches == ["copy to device", "sums", "copy to host"]


def test_grid_order_and_names(cupy, kernel):
    y = cupy.empty(1000, np.int32)
    kernel("index")((3, 6), (64,), (y, np.int32(1000)))
    assert (y.get() == np.arange(1000)).all()
    y, count = cupy.empty(640, np.int32), cupy.zeros(1, np.int32)
    kernel("order")((10,), (64,), (y, count))
    blocks, threads = np.divmod(y.get().reshape(10, 64), 64)
    assert (blocks == np.arange(10)[::-1, None]).all() and (np.sort(threads) == np.arange(64)).all()
    assert (abs(np.diff(threads)) > 1).all()
    with pytest.raises(RuntimeError, match="nonsense"):
        kernel("nonsense")


def test_barriers(cupy, kernel):
    y = cupy.empty(64, np.int32)
    kernel("turns")((2,), (64,), (y,))
    assert (y.get() == (np.arange(64) + 10) % 64).all()
    z = cupy.empty(64, np.float32)
    kernel("no_barrier")((1,), (64,), (z,))
    assert np.isnan(z.get()).any()  # somebody read what was not written yet, and it was NaN


def test_divergence(cupy, kernel):
    for _ in range(2):  # and the next launch is not disturbed
        with pytest.raises(RuntimeError, match=r"some_leave: 54 of 64 threads"):
            kernel("some_leave")((1,), (64,), (np.int32(10),))
        with pytest.raises(RuntimeError, match="other_barrier: .* different barriers"):
            kernel("other_barrier")((1,), (64,), ())
        y = cupy.empty(64, np.int32)
        kernel("turns")((1,), (64,), (y,))
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
    with pytest.raises(Exception, match="nonsense"):
        cupy.RawModule(code='extern "C" __global__ void f() { nonsense(); }').get_function("f")


def test_a_kernel_beyond_the_end_meets_the_guard(cupy, kernel):
    x = cupy.zeros(10, np.float32)
    kernel("add_one")((1,), (64,), (x, 11))
    with pytest.raises(RuntimeError, match="40"):
        simulated_gpu.check_guards()


def test_halves(cupy, kernel, rng):
    x = np.append(rng.normal(size=60) * 10.0 ** rng.integers(-8, 6, 60), [0, np.inf, 65519, 65520]).astype(np.float32)
    h, y = cupy.empty(64, np.float16), cupy.empty(64, np.float32)
    kernel("halves")((1,), (64,), (cupy.asarray(x), h, y))
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    assert (h.get() == want).all() and (y.get() == want.astype(np.float32)).all()


# ---------------------------------------------------------------------------------------------- capture


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
    for wrong in (lambda: x.get(), lambda: x[0, 0].item(), lambda: float(x[0, 0]), lambda: bool(x[0, 0]),
                  lambda: int(x[0, 0]), lambda: cupy.asarray(np.ones(3)), lambda: cupy.asarray(1.0), lambda: x @ x,
                  lambda: cupy.dot(x, x), lambda: np.matmul(x, x), lambda: cupy.flatnonzero(x), lambda: x[x > 0],
                  lambda: cupy.cuda.get_current_stream().synchronize(), lambda: cupy.cuda.Event().synchronize()):
        with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported"):
            captured(cupy, wrong)
    with pytest.raises(RuntimeError, match="default stream"):
        cupy.cuda.get_current_stream().begin_capture()
    with pytest.raises(ValueError, match="broadcast"):
        captured(cupy, lambda: x.__setitem__(0, cupy.ones(2)))


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
    assert float(total) == 6
    x.clear()
    with pytest.raises(RuntimeError, match="freed"):
        graph.launch()


def test_a_capture_is_of_one_stream(cupy):
    x, stream = cupy.zeros(3), cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    x += 1  # on the default stream
    assert stream.is_capturing() and stream.end_capture().names == [] and x.get()[0] == 1


def test_events(cupy):
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    end.record()
    end.synchronize()
    assert 0 <= cupy.cuda.get_elapsed_time(start, end) < 1e3


# ---------------------------------------------------------------------------------------------- cuDNN


def nhwc(N, C, H, W, channels=None):
    """Strides of (N, C, H, W) in the order (N, H, W, channels)."""
    channels = channels or C
    return [H * W * channels, 1, W * channels, channels]


def planned(cudnn, kind, shapes, strides, dtypes, stride, padding, notes=(), compute=None):
    """The graph of a convolution and its three tensors; the last of shapes is the output's."""
    graph = cudnn.pygraph(io_data_type=dtypes[0], intermediate_data_type=cudnn.data_type.FLOAT,
                          compute_data_type=compute or cudnn.data_type.FLOAT, handle=cudnn.create_handle())
    a, b = (graph.tensor(name=f"input {i}", dim=shapes[i], stride=strides[i], data_type=dtypes[i]) for i in (0, 1))
    names = {"conv_fprop": ("image", "weight"), "conv_dgrad": ("loss", "filter"), "conv_wgrad": ("image", "loss")}[kind]
    out = getattr(graph, kind)(**dict(zip(names, (a, b))), padding=[padding] * 2, stride=[stride] * 2, dilation=[1, 1])
    out.set_output(True).set_dim(shapes[2]).set_stride(strides[2]).set_data_type(dtypes[2])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.deselect_numeric_notes(list(notes))
    return graph, a, b, out


def first_plan(graph):
    for i in range(graph.get_execution_plan_count()):
        try:
            graph.build_plan_at_index(i)
        except RuntimeError:
            continue
        return i


def naive(kind, x, w, y, stride, padding):
    """One of the image x, the weight w and the output y from the other two, entry by entry."""
    out = {"conv_fprop": y, "conv_dgrad": x, "conv_wgrad": w}[kind]
    out[...] = 0
    (N, K, P, Q), (_, C, R, S) = y.shape, w.shape
    for n, k, p, q, c, r, s in itertools.product(*map(range, (N, K, P, Q, C, R, S))):
        h, v = p * stride - padding + r, q * stride - padding + s
        if 0 <= h < x.shape[2] and 0 <= v < x.shape[3]:
            if kind == "conv_fprop":
                y[n, k, p, q] += x[n, c, h, v] * w[k, c, r, s]
            elif kind == "conv_dgrad":
                x[n, c, h, v] += y[n, k, p, q] * w[k, c, r, s]
            else:
                w[k, c, r, s] += y[n, k, p, q] * x[n, c, h, v]
    return out


@pytest.mark.parametrize("kind", ["conv_fprop", "conv_dgrad", "conv_wgrad"])
@pytest.mark.parametrize("size, kernel, stride, padding, dtype", [
    (5, 3, 1, 1, "FLOAT"), (6, 3, 2, 1, "FLOAT"), (5, 1, 2, 0, "HALF"), (6, 3, 2, 1, "BFLOAT16"),
    (5, 2, 3, 1, "DOUBLE")])
def test_convolution(cupy, rng, kind, size, kernel, stride, padding, dtype):
    import cudnn

    P = (size + 2 * padding - kernel) // stride + 1
    shapes = {"x": [2, 3, size, size], "w": [4, 3, kernel, kernel], "y": [2, 4, P, P]}
    # Every array in the order (N, H, W, C) with room for 8 channels: what is not the tensor's must not be touched.
    kept = {"FLOAT": np.float32, "HALF": np.float16, "DOUBLE": np.float64, "BFLOAT16": np.uint16}[dtype]
    host = {name: rng.integers(-3, 4, shape).astype(np.float64) for name, shape in shapes.items()}
    order = {"conv_fprop": "xwy", "conv_dgrad": "ywx", "conv_wgrad": "xyw"}[kind]
    memory, strides = {}, {}
    for name, (N, C, H, W) in shapes.items():
        full = np.full((N, H, W, 8), 77, kept)
        values = host[name].astype(np.float32)
        values = values.view(np.uint32) >> 16 if dtype == "BFLOAT16" else values
        full[..., :C] = values.transpose(0, 2, 3, 1)
        memory[name], strides[name] = cupy.asarray(full), nhwc(N, C, H, W, 8)
    kind_of = [getattr(cudnn.data_type, dtype)] * 3
    graph, *tensors = planned(cudnn, kind, [shapes[n] for n in order], [strides[n] for n in order], kind_of, stride,
                              padding, compute=cudnn.data_type.DOUBLE if dtype == "DOUBLE" else None)
    plan, handle = first_plan(graph), cudnn.create_handle()
    assert plan > 0 and graph.get_plan_name_at_index(plan)
    workspace = cupy.zeros(graph.get_workspace_size_plan_at_index(plan), np.uint8)
    launches.clear()
    graph.execute_plan_at_index({t: memory[n].data.ptr for t, n in zip(tensors, order)}, workspace.data.ptr, plan,
                                handle=handle)
    assert launches == [f"cudnn {kind}"] and (workspace.get() == 0xFF).all()
    want = naive(kind, **host, stride=stride, padding=padding)
    full = memory[order[2]].get()
    got = full[..., :want.shape[1]].transpose(0, 3, 1, 2)
    got = (got.astype(np.uint32) << 16).view(np.float32) if dtype == "BFLOAT16" else got
    assert (full[..., want.shape[1]:] == 77).all()
    assert abs(want).max() > 5
    tolerance = 2.0**-9 if dtype == "BFLOAT16" else 0  # sums beyond 256 are rounded
    assert (abs(got - want) <= tolerance * abs(want)).all()


def small(cudnn, cupy, rng, **settings):
    """A 1x1 convolution in float32: its graph, the variant pack, and the arrays x, w and y = x w^T."""
    x, w = (cupy.asarray(rng.normal(size=(n, 64)), dtype=np.float32) for n in (2, 4))
    y = cupy.empty((2, 4), np.float32)
    shapes = [[2, 64, 1, 1], [4, 64, 1, 1], [2, 4, 1, 1]]
    float32 = [cudnn.data_type.FLOAT] * 3
    graph, *tensors = planned(cudnn, "conv_fprop", shapes, [nhwc(*s) for s in shapes], float32, 1, 0, **settings)
    return graph, dict(zip(tensors, (a.data.ptr for a in (x, w, y)))), x, w, y


def test_bfloat16(cupy, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = (rng.normal(size=1000) * 10.0 ** rng.integers(-39, 38, 1000)).astype(np.float32)
    x[:5] = [np.inf, -np.inf, 1 + 2**-8, 3.4e38, np.nan]
    assert (simulated_gpu.to_bfloat16(x) == x.astype(ml_dtypes.bfloat16).view(np.uint16)).all()
    assert (cupy.asarray(x).astype("bfloat16") + 1).dtype == ml_dtypes.bfloat16


def test_tf32_unless_refused(cupy, rng):
    import cudnn

    workspace, errors = cupy.empty(512, np.uint8), []
    for notes in ([], [cudnn.numerical_note.TENSOR_CORE]):
        graph, pack, x, w, y = small(cudnn, cupy, rng, notes=notes)
        graph.execute_plan_at_index(pack, workspace.data.ptr, first_plan(graph), handle=cudnn.create_handle())
        errors.append(abs(y.get() - x.get().astype(float) @ w.get().T).max())
    assert 1e-4 < errors[0] < 2e-2 and errors[1] < 1e-5


def test_cudnn_in_a_capture(cupy, rng):
    import cudnn

    workspace, handle, stream = cupy.empty(512, np.uint8), cudnn.create_handle(), cupy.cuda.Stream(non_blocking=True)
    graph, pack, x, w, y = small(cudnn, cupy, rng, notes=[cudnn.numerical_note.TENSOR_CORE])
    plan = first_plan(graph)
    cudnn.set_stream(handle=handle, stream=stream.ptr)
    with stream:
        stream.begin_capture()
        graph.execute_plan_at_index(pack, workspace.data.ptr, plan, handle=handle)
        replay = stream.end_capture()
    assert np.isnan(y.get()).all() and replay.names == ["cudnn conv_fprop"]
    for _ in range(2):
        x *= 2
        replay.launch()
        np.testing.assert_allclose(y.get(), x.get() @ w.get().T, rtol=1e-4, atol=1e-4)


def test_what_cudnn_refuses(cupy, rng):
    import cudnn

    workspace, handle = cupy.empty(512, np.uint8), cudnn.create_handle()
    graph, pack, x, w, y = small(cudnn, cupy, rng)
    plan = first_plan(graph)
    wrong = dict(zip(pack, (x.data.ptr, w.data.ptr, x.data.ptr)))  # the output on an input
    outside = dict(zip(pack, (x.data.ptr, w.data.ptr + 512, y.data.ptr)))
    for args in ((pack, None, plan), (pack, workspace.data.ptr, 2), (pack, workspace.data.ptr + 511, plan),
                 (dict(list(pack.items())[:2]), workspace.data.ptr, plan), (wrong, workspace.data.ptr, plan),
                 (outside, workspace.data.ptr, plan), (pack, x.data.ptr, plan)):
        with pytest.raises(RuntimeError):
            graph.execute_plan_at_index(*args, handle=handle)
    graph.execute_plan_at_index(pack, workspace.data.ptr, plan, handle=handle)
    pointer = y.data.ptr
    del y
    with pytest.raises(RuntimeError, match="live allocation"):
        graph.execute_plan_at_index(pack | {list(pack)[2]: pointer}, workspace.data.ptr, plan, handle=handle)
    cudnn.destroy_handle(handle)
    with pytest.raises(RuntimeError, match="handle"):
        graph.execute_plan_at_index(pack, workspace.data.ptr, plan, handle=handle)
    float32, fine = [cudnn.data_type.FLOAT] * 3, [[2, 3, 6, 6], [4, 3, 3, 3], [2, 4, 3, 3]]
    planned(cudnn, "conv_fprop", fine, [nhwc(*s) for s in fine], float32, 2, 1)
    for shapes in ([[2, 5, 6, 6], *fine[1:]], [*fine[:2], [2, 4, 6, 6]]):
        with pytest.raises(RuntimeError, match="not fit"):
            planned(cudnn, "conv_fprop", shapes, [nhwc(*s) for s in shapes], float32, 2, 1)
    graph = cudnn.pygraph(io_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT)
    a, b = (graph.tensor(dim=s, stride=nhwc(*s)) for s in (fine[2], fine[1]))
    out = graph.conv_dgrad(loss=a, filter=b, padding=[1, 1], stride=[2, 2], dilation=[1, 1])
    with pytest.raises(RuntimeError, match="set_output"):
        graph.validate()
    out.set_output(True)
    with pytest.raises(RuntimeError, match="set_dim"):
        graph.validate()
