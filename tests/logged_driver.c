/* A stand-in for CUDA's runtime and driver that computes nothing and logs every call; see logged_gpu.py.

   Memory of a device is memory of this machine, zeros at first. Copies copy, kernels do nothing. What CUDA refuses
   is refused. One line a call, its fields separated by tabs:

       function, number of the stream or - , 1 in a capture (of that stream, or of any if there is none) else 0, details

   LOGGED_GPU_LOG: the file. LOGGED_GPU_DEVICES: how many devices there are, by default one. For one thread.
*/
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define NONE ((cudaStream_t)-1) /* of a call that is not about a stream */
#define VERSION 13000
#define MEMORY (80ul << 30)
#define SHARED 49152 /* bytes of a block, without permission for more */

struct CUfunc_st { char name[200]; };
struct CUgraph_st { int number, nodes; };
struct CUgraphExec_st { int number, nodes; };

static struct { cudaStream_t stream; int number, nodes, broken; } capture; /* stream: NULL outside of captures */
static int device;
static cudaError_t last;

/* ------------------------------------------------------------------------------------------ the log */

static int captured(cudaStream_t stream) { return capture.stream && (stream == NONE || stream == capture.stream); }

static void say(const char *function, cudaStream_t stream, const char *format, ...)
{
    static FILE *file;
    va_list values;
    if (!file) {
        const char *path = getenv("LOGGED_GPU_LOG");
        file = fopen(path ? path : "/dev/null", "a");
        if (!file) abort();
        setvbuf(file, NULL, _IOLBF, 0);
    }
    fprintf(file, "%s\t", function);
    fprintf(file, stream == NONE ? "-" : "%ld", (long)stream);
    fprintf(file, "\t%d\t", captured(stream));
    va_start(values, format);
    vfprintf(file, format, values);
    va_end(values);
    fputc('\n', file);
}

static cudaError_t refuse(const char *function, cudaError_t error)
{
    say("refused", NONE, "%s %d", function, error);
    return last = error;
}

/* Work on a stream: whether it is to be done now. In a capture it becomes a node. */
static int now(cudaStream_t stream) { return captured(stream) ? capture.nodes++, 0 : 1; }

/* A wait for the device, which no capture can have */
static cudaError_t wait_for(const char *function, cudaStream_t stream)
{
    say(function, stream, "");
    if (!capture.stream) return cudaSuccess;
    capture.broken = 1;
    return refuse(function, cudaErrorStreamCaptureUnsupported);
}

/* For Python: a remark; an execution of cuDNN; whether so many bytes of a device lie there. */
void logged_mark(const char *text) { say("mark", NONE, "%s", text); }

void logged_node(const char *name, cudaStream_t stream)
{
    say("node", stream, "%s", name);
    now(stream);
}

/* ------------------------------------------------------------------------------------------ memory */

static struct { char *at; size_t size; enum cudaMemoryType type; int device; } blocks[1 << 17];
static int count;

/* The index of the allocation in which these bytes lie, or -1 */
static int block_of(const void *p, size_t size)
{
    for (int i = count - 1; i >= 0; i--)
        if (blocks[i].at <= (char *)p && (char *)p + size <= blocks[i].at + blocks[i].size) return i;
    return -1;
}

static enum cudaMemoryType type_of(const void *p)
{
    int i = block_of(p, 1);
    return i < 0 ? cudaMemoryTypeUnregistered : blocks[i].type;
}

int logged_holds(const void *p, size_t size) { return block_of(p, size) >= 0; }

static cudaError_t allocate(const char *function, void **p, size_t size, enum cudaMemoryType type)
{
    say(function, NONE, "%zu", size);
    size += !size;
    *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED || count == sizeof blocks / sizeof *blocks) return refuse(function, cudaErrorMemoryAllocation);
    blocks[count].at = *p, blocks[count].size = size, blocks[count].type = type, blocks[count++].device = device;
    return cudaSuccess;
}

static cudaError_t release(const char *function, void *p, enum cudaMemoryType type)
{
    int i = p ? block_of(p, 1) : -1;
    say(function, NONE, "%zu", i < 0 ? 0 : blocks[i].size);
    if (!p) return cudaSuccess;
    if (i < 0 || blocks[i].at != p || blocks[i].type != type) return refuse(function, cudaErrorInvalidValue);
    munmap(p, blocks[i].size);
    blocks[i] = blocks[--count];
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t size) { return allocate("cudaMalloc", p, size, cudaMemoryTypeDevice); }
cudaError_t cudaFree(void *p) { return release("cudaFree", p, cudaMemoryTypeDevice); }
cudaError_t cudaFreeHost(void *p) { return release("cudaFreeHost", p, cudaMemoryTypeHost); }

cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags)
{
    return allocate("cudaHostAlloc", p, size, cudaMemoryTypeHost);
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { *left = MEMORY - (1ul << 30), *total = MEMORY; return 0; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *p)
{
    int i = block_of(p, 1);
    memset(out, 0, sizeof *out);
    out->type = type_of(p);
    out->device = i < 0 ? -2 : blocks[i].device;
    out->devicePointer = out->hostPointer = (void *)p;
    return cudaSuccess;
}

/* Copy or fill, if what lies on a device does so: on this one, and all of it. */
static cudaError_t move(const char *function, void *to, const void *from, int value, size_t size, cudaStream_t stream)
{
    static const char *names[] = {"pageable", "pinned", "device", "managed"};
    int synchronous = stream == NONE;
    say(function, stream, "%s>%s %zu", from ? names[type_of(from)] : "value", names[type_of(to)], size);
    for (int i = 0; size && i < 2; i++) {
        const void *p = i ? from : to;
        enum cudaMemoryType type = p ? type_of(p) : cudaMemoryTypeUnregistered;
        if (type != cudaMemoryTypeUnregistered && block_of(p, size) < 0) return refuse(function, cudaErrorInvalidValue);
    }
    if (synchronous && capture.stream) return wait_for(function, stream);
    if (!synchronous && !now(stream)) return cudaSuccess;
    if (from) memmove(to, from, size);
    else memset(to, value, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind)
{
    return move("cudaMemcpy", to, from, 0, size, NONE);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    return move("cudaMemcpyAsync", to, from, 0, size, stream);
}

cudaError_t cudaMemset(void *to, int value, size_t size) { return move("cudaMemset", to, NULL, value, size, NONE); }

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream)
{
    return move("cudaMemsetAsync", to, NULL, value, size, stream);
}

/* ------------------------------------------------------------------------------------------ devices and errors */

cudaError_t cudaGetDeviceCount(int *n)
{
    const char *devices = getenv("LOGGED_GPU_DEVICES");
    *n = devices ? atoi(devices) : 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *number) { *number = device; return cudaSuccess; }

cudaError_t cudaSetDevice(int number)
{
    int n;
    cudaGetDeviceCount(&n);
    say("cudaSetDevice", NONE, "%d", number);
    if (number < 0 || number >= n) return refuse("cudaSetDevice", cudaErrorInvalidDevice);
    device = number;
    return cudaSuccess;
}

/* An H100, each with a uuid and a place on the bus of its own */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int number)
{
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    memset(p->uuid.bytes, 0x10 + number, sizeof p->uuid.bytes);
    p->pciBusID = number;
    p->major = 9;
    p->totalGlobalMem = MEMORY;
    p->sharedMemPerBlock = SHARED;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->multiProcessorCount = 132;
    p->l2CacheSize = 52428800;
    p->memoryBusWidth = 5120;
    p->concurrentKernels = p->cooperativeLaunch = p->unifiedAddressing = p->memoryPoolsSupported = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int number)
{
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, number);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMemoryPoolsSupported: *value = p.memoryPoolsSupported; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) { *version = VERSION; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = VERSION; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return wait_for("cudaDeviceSynchronize", NONE); }
cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaGetLastError(void) { cudaError_t error = last; last = cudaSuccess; return error; }

const char *cudaGetErrorName(cudaError_t error)
{
    switch (error) {
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: return "cudaError";
    }
}

const char *cudaGetErrorString(cudaError_t error) { return "refused by the logged driver"; }

/* What is here for none of its kind: CUDA's other functions are sent here. */
cudaError_t logged_unknown(void) { return refuse("unknown", cudaErrorNotSupported); }

/* ------------------------------------------------------------------------------------------ streams and events */

static intptr_t streams = 16, events = 1;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    *stream = (cudaStream_t)streams++;
    say("cudaStreamCreate", *stream, "%u", flags);
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority)
{
    return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) { say("cudaStreamDestroy", stream, ""); return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for("cudaStreamSynchronize", stream); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return wait_for("cudaStreamQuery", stream); }
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) { *flags = 1; return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = (cudaEvent_t)events++; return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return wait_for("cudaEventQuery", NONE); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait_for("cudaEventSynchronize", NONE); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    say("cudaEventRecord", stream, "%ld", (long)event);
    now(stream);
    return cudaSuccess;
}

/* Streams that join a capture are not stood in for. */
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    return wait_for("cudaStreamWaitEvent", stream);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end)
{
    *milliseconds = 1;
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------ graphs */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    if ((intptr_t)stream < 16 || capture.stream) return refuse("capture", cudaErrorStreamCaptureUnsupported);
    capture.stream = stream, capture.number++, capture.nodes = capture.broken = 0;
    say("begin", stream, "%d %d", capture.number, mode);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    if (!captured(stream)) return refuse("capture", cudaErrorInvalidValue);
    say("end", stream, "%d %d %s", capture.number, capture.nodes, capture.broken ? "broken" : "whole");
    capture.stream = NULL;
    *graph = NULL;
    if (capture.broken) return refuse("capture", cudaErrorStreamCaptureInvalidated);
    *graph = malloc(sizeof **graph);
    (*graph)->number = capture.number, (*graph)->nodes = capture.nodes;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status = captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode *nodes, size_t *count)
{
    *count = graph->nodes;
    return CUDA_SUCCESS;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags)
{
    *out = malloc(sizeof **out);
    (*out)->number = graph->number, (*out)->nodes = graph->nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags)
{
    return cudaGraphInstantiateWithFlags(out, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream)
{
    say("cudaGraphLaunch", stream, "%d %d", graph->number, graph->nodes);
    now(stream);
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t graph, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return cudaSuccess; }

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph)
{
    say("cudaGraphExecDestroy", NONE, "%d", graph->number);
    free(graph);
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------ kernels */

static cudaError_t launch(const char *name, dim3 grid, dim3 block, size_t shared, cudaStream_t stream)
{
    int fits = grid.x && grid.y && grid.z && grid.x <= 2147483647 && grid.y <= 65535 && grid.z <= 65535;
    fits = fits && block.x && block.y && block.z && block.z <= 64 && (size_t)block.x * block.y * block.z <= 1024;
    say("launch", stream, "%s %u,%u,%u %u,%u,%u", name, grid.x, grid.y, grid.z, block.x, block.y, block.z);
    if (!fits || shared > SHARED) return refuse(name, cudaErrorInvalidValue);
    now(stream);
    return cudaSuccess;
}

/* A kernel that was compiled into one of CuPy's modules: it is called by the module's file. */
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
{
    Dl_info found;
    dladdr(f, &found);
    return launch(strrchr(found.dli_fname, '/') + 1, grid, block, shared, stream);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *f)
{
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024, out->numRegs = 32, out->ptxVersion = out->binaryVersion = 90;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t shared,
                                                                   unsigned flags)
{
    *n = 4;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int block, size_t shared)
{
    *n = 4;
    return cudaSuccess;
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **arguments, void **more)
{
    return (CUresult)launch(f->name, (dim3){gx, gy, gz}, (dim3){bx, by, bz}, shared, stream);
}

CUresult cuModuleLoadData(CUmodule *module, const void *image)
{
    say("cuModuleLoadData", NONE, "");
    *module = malloc(1);
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { say("cuModuleUnload", NONE, ""); free(module); return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name)
{
    *out = malloc(sizeof **out);
    snprintf((*out)->name, sizeof (*out)->name, "%s", name);
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f)
{
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int block, size_t shared)
{
    *n = 4;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxPotentialBlockSize(int *grid, int *block, CUfunction f, CUoccupancyB2DSize size, size_t shared,
                                          int limit)
{
    *grid = 132, *block = 256;
    return CUDA_SUCCESS;
}

/* Plans of cuDNN that are compiled at run time are loaded by these. */
CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *jit, void **jit_values, unsigned n,
                           CUlibraryOption *options, void **values, unsigned m)
{
    say("cuLibraryLoadData", NONE, "");
    *library = malloc(1);
    return CUDA_SUCCESS;
}

CUresult cuLibraryUnload(CUlibrary library) { free(library); return CUDA_SUCCESS; }

CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name)
{
    return cuModuleGetFunction((CUfunction *)kernel, NULL, name);
}

CUresult cuKernelGetFunction(CUfunction *f, CUkernel kernel) { *f = (CUfunction)kernel; return CUDA_SUCCESS; }

CUresult cuKernelGetAttribute(int *value, CUfunction_attribute attribute, CUkernel kernel, CUdevice number)
{
    return cuFuncGetAttribute(value, attribute, (CUfunction)kernel);
}

CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice number)
{
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **name) { *name = cudaGetErrorName(error); return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = cudaGetErrorString(error); return 0; }

/* What cuDNN looks up: for it there is no device, so that it plans by the properties that it is told. */
#define ABSENT(name)                                          \
    CUresult absent_##name(void) __asm__(#name);              \
    CUresult absent_##name(void) { return CUDA_ERROR_NO_DEVICE; }

ABSENT(cuInit) ABSENT(cuDriverGetVersion) ABSENT(cuDeviceGet) ABSENT(cuDeviceGetCount) ABSENT(cuStreamGetCtx)
ABSENT(cuCtxGetCurrent) ABSENT(cuCtxGetLimit) ABSENT(cuCtxPopCurrent) ABSENT(cuCtxPushCurrent)
ABSENT(cuLaunchCooperativeKernel) ABSENT(cuLaunchKernelEx) ABSENT(cuOccupancyMaxPotentialClusterSize)
ABSENT(cuLibraryLoadFromFile) ABSENT(cuLinkAddData) ABSENT(cuLinkComplete) ABSENT(cuLinkCreate) ABSENT(cuLinkDestroy)
ABSENT(cuTensorMapEncodeIm2col) ABSENT(cuTensorMapEncodeTiled)
