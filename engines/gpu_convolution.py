"""Convolutions on a GPU by cuDNN, planned once for each shape.

The plan is the first of cuDNN's heuristics that can be built and run, or with `tune` the fastest. None adds up in a
random order unless `deterministic` is off.
"""

import functools

import cupy

from engines import EngineError

WORKSPACE = 2**30  # bytes of scratch memory that a plan may ask for, or a sixteenth of the GPU's
TRIED = 8  # plans timed for each convolution

# ---------------------------------------------------------------------------------------------- images in memory


def strides_of(shape, channels):
    """Strides in entries of images (N, C, H, W) that lie in memory as (N, H, W, channels)."""
    _, _, H, W = shape
    return H * W * channels, 1, W * channels, channels


def empty(shape, dtype, channels=None):
    """Images (N, C, H, W) with undefined contents, (N, H, W, channels) in memory."""
    N, C, H, W = shape
    channels = channels or C
    memory = cupy.empty(N * H * W * channels, dtype)
    in_bytes = [s * memory.itemsize for s in strides_of(shape, channels)]
    return cupy.ndarray(shape, dtype, memory.data, in_bytes)  # not a view: whoever gets it owns it


def channels_of(x):
    """With how many channels to a pixel x (N, C, H, W) lies in memory as (N, H, W, channels); None if it does not."""
    lines = [(n, stride // x.itemsize) for n, stride in zip(x.shape, x.strides)]  # entries and stride of each axis
    N, C, H, W = lines
    channels = W[1] if W[0] > 1 else H[1] if H[0] > 1 else N[1] // (H[0] * W[0]) if N[0] > 1 else C[0]
    fits = all(n == 1 or stride == want for (n, stride), want in zip(lines, strides_of(x.shape, channels)))
    return channels if fits and channels >= C[0] else None


# ---------------------------------------------------------------------------------------------- graphs and plans


def reason_of(error):
    """An exception in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def requirements():
    """The file of what to install beside this CuPy."""
    return "requirements-gpu.txt" if cupy.cuda.runtime.runtimeGetVersion() >= 13000 else "requirements-gpu-cuda12.txt"


@functools.cache
def cudnn():
    """cuDNN's Python module; EngineError if it cannot be used."""
    try:
        from cuda import pathfinder

        pathfinder.load_nvidia_dynamic_lib("cudart")  # one that came as a Python package is found no other way
        import cudnn
    except Exception as error:  # ImportError, or whatever a library that does not load makes them raise
        raise EngineError(f"convolution on a GPU needs cuDNN ({reason_of(error)}): "
                          f"pip install -r {requirements()}") from None
    return cudnn


def convolution(kind, x, w, y, dtype, stride, padding, strict=False, deterministic=True, **where):
    """The cuDNN graph of a convolution and its three tensors by name.

    kind: "fprop" x, w -> y; "dgrad" y, w -> x; "wgrad" y, x -> w. x, w, y: shapes (N, C, H, W), (O, C, kh, kw),
    (N, O, H', W'). where: the handle or device_property to plan for.
    """
    c = cudnn()
    types = {"float32": c.data_type.FLOAT, "float64": c.data_type.DOUBLE, "bfloat16": c.data_type.BFLOAT16}
    io, wide = types[dtype], types["float64" if dtype == "float64" else "float32"]
    graph = c.pygraph(io_data_type=io, intermediate_data_type=wide, compute_data_type=wide, **where)
    shapes = dict(x=x, w=w, y=y)
    strides = {name: list(strides_of(shape, shape[1])) for name, shape in shapes.items()}
    work, made, roles = {"fprop": (graph.conv_fprop, "y", dict(image="x", weight="w")),
                         "dgrad": (graph.conv_dgrad, "x", dict(loss="y", filter="w")),
                         "wgrad": (graph.conv_wgrad, "w", dict(image="x", loss="y"))}[kind]
    tensors = {name: graph.tensor(name=name, dim=list(shapes[name]), stride=strides[name], data_type=io)
               for name in roles.values()}
    out = work(padding=[padding] * 2, stride=[stride] * 2, dilation=[1, 1],
               **{role: tensors[name] for role, name in roles.items()})
    # without its shape a strided dgrad has the wrong size, in silence
    out.set_output(True).set_dim(list(shapes[made])).set_stride(strides[made]).set_data_type(io)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([c.heur_mode.A, c.heur_mode.FALLBACK])
    note = c.numerical_note
    unwanted = [note.NONDETERMINISTIC] if deterministic else []
    unwanted += [note.TENSOR_CORE, note.DOWN_CONVERT_INPUTS, note.WINOGRAD] if strict else []
    unwanted += [note.REDUCED_PRECISION_REDUCTION] if dtype == "bfloat16" else []
    if unwanted:
        graph.deselect_numeric_notes(unwanted)
    return graph, tensors | {made: out}


def plans(graph, limit=WORKSPACE):
    """Numbers of the graph's plans that can be built and need no more scratch memory, best first by the heuristics."""
    for number in range(graph.get_execution_plan_count()):
        try:
            graph.build_plan_at_index(number)
        except Exception:  # cuDNN proposes plans that turn out not to be supported, or were deselected
            continue
        if graph.get_workspace_size_plan_at_index(number) <= limit:
            yield number


def described(kind, x, w, y, dtype, stride, padding):
    return f"{kind} of images {x}, weights {w}, output {y}, stride {stride}, padding {padding} in {dtype}"


def milliseconds(work, rounds=5):
    """The least time on the GPU of one call of work, after one to warm up."""
    work()
    times = []
    for _ in range(rounds):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end))
    return min(times)


# ---------------------------------------------------------------------------------------------- convolutions


def scratch(nbytes):
    """Memory for a plan: of no pool, for it would hold more of one than it needs. A null pointer is no memory."""
    return cupy.cuda.Memory(max(nbytes, 1))


class Convolutions:
    """cuDNN's convolutions on a stream. strict: plain float32; tune: time plans, take the fastest."""

    def __init__(self, stream, strict=False, deterministic=True, tune=False):
        self.stream, self.strict, self.deterministic, self.tune = stream, strict, deterministic, tune
        self.limit = max(WORKSPACE, cupy.cuda.runtime.memGetInfo()[1] // 16)  # ImageNet in float32 asks for 3 GiB
        self.graphs, self.workspaces = {}, []

    def __call__(self, kind, x, w, y, stride, padding, channels):
        """Run the convolution of this kind on arrays in NHWC; x and w have `channels` channels in memory."""
        arrays = dict(x=x, w=w, y=y)
        shapes = {n: (a.shape[0], a.shape[1] if n == "y" else channels, *a.shape[2:]) for n, a in arrays.items()}
        for name, array in arrays.items():  # cuDNN would take a wrong layout or type in silence
            assert array.dtype == y.dtype and channels_of(array) == shapes[name][1], (name, array.dtype, array.strides)
        key = kind, *shapes.values(), y.dtype.name, stride, padding
        try:
            if key not in self.graphs:
                self.graphs[key] = self.planned(*key, arrays)
                if not self.tune:
                    return  # its plan has just run
            self.execute(*self.graphs[key], arrays)
        except EngineError:
            raise
        except Exception as error:  # RuntimeError and cuDNN's own types, and CuPy's when memory runs out
            raise EngineError(f"cuDNN's {described(*key)} failed: {reason_of(error)}") from None

    def planned(self, kind, x, w, y, dtype, stride, padding, arrays):
        """(graph, tensors, number of the first plan that can be run on the arrays, or with `tune` of the fastest)"""
        strict = self.strict and dtype == "float32"
        graph, tensors = convolution(kind, x, w, y, dtype, stride, padding, strict, self.deterministic,
                                     handle=self.handle)
        ran, reason, kept = [], "", len(self.workspaces)
        for number in plans(graph, self.limit):
            size = graph.get_workspace_size_plan_at_index(number)
            # Too little memory is an error: the plan shall not depend on what is free. Of those timed one is kept.
            memory = scratch(size) if self.tune else self.workspace(size)
            work = functools.partial(self.execute, graph, tensors, number, arrays, memory)
            try:
                ran.append((milliseconds(work) if self.tune else work(), number))
            except Exception as error:  # it can be built, but cuDNN refuses to run it
                del self.workspaces[kept:]
                reason = f", that can be run ({reason_of(error)})"
            if len(ran) == (TRIED if self.tune else 1):
                break
        if not ran:
            raise EngineError(f"cuDNN has no plan for the {described(kind, x, w, y, dtype, stride, padding)}"
                              + (", without tensor cores" if strict else "")
                              + (", deterministically" if self.deterministic else "") + reason)
        return graph, tensors, min(ran)[1]

    def execute(self, graph, tensors, number, arrays, memory=None):
        pointers = {tensors[name]: array.data.ptr for name, array in arrays.items()}
        memory = memory or self.workspace(graph.get_workspace_size_plan_at_index(number))
        graph.execute_plan_at_index(pointers, memory.ptr, number, handle=self.handle)

    @functools.cached_property
    def handle(self):
        handle = cudnn().create_handle()
        cudnn().set_stream(handle=handle, stream=self.stream.ptr)
        return handle

    def workspace(self, nbytes):
        """Scratch memory, shared by all plans. Smaller ones are kept: captured graphs write into them."""
        if not self.workspaces or self.workspaces[-1].size < nbytes:
            self.workspaces.append(scratch(nbytes))
        return self.workspaces[-1]
