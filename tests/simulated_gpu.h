// CUDA kernels as host C++, for tests/simulated_gpu.py: this file comes before the kernels, ENTRIES after them.
//
// The threads of a block are fibers. One fiber runs thread after thread until a thread comes to a barrier; it keeps
// that one, and another fiber goes on with the rest. So __syncthreads() is a real barrier, and a kernel without one is
// a loop. Blocks run last to first, threads in a scrambled order, and shared memory is all ones (NaN) when a block
// begins.

#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <utility>

#define __global__ static
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((used, section("simulated_shared")))
#define __syncthreads() simulated::wait(__LINE__)

static struct { unsigned x, y; } threadIdx, blockIdx, blockDim, gridDim;

// Blocks run one after the other, so that these need do nothing more.
static inline void __threadfence() {}
template <class T> static inline T __ldcg(const T *p) { return *p; }
static inline unsigned atomicInc(unsigned *p, unsigned most) {
    unsigned before = *p;
    *p = before >= most ? 0 : before + 1;
    return before;
}

static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }

extern "C" __attribute__((weak, visibility("hidden"))) char __start_simulated_shared[], __stop_simulated_shared[];

namespace simulated {

constexpr int MOST_THREADS = 256, STACK = (128 << 10) + 320;  // not a power of two: stacks would share cache lines
constexpr int STEP = 10007;  // prime and more than any number of threads: multiples of it are a permutation of them

struct Fiber {
    ucontext_t first;  // where it begins
    jmp_buf place;     // where it waits
    bool begun;
};

static Fiber fibers[MOST_THREADS];
static char *stacks;
static jmp_buf scheduler;
static void (*kernel)(void **);
static void **arguments;
static int threads, turn, started, ended, waiting, waiting_fibers[MOST_THREADS], current, barrier_line, other_line;

// _setjmp and _longjmp change fibers in some 10 ns; swapcontext would make a system call each time.
static __attribute__((noinline)) void leave() {
    if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

static __attribute__((noinline)) void wait(int line) {
    unsigned mine = threadIdx.x;
    if (waiting && line != barrier_line) other_line = line;
    barrier_line = line;
    waiting_fibers[waiting++] = current;
    leave();
    threadIdx.x = mine;
}

static void work() {
    for (;;) {
        while (started < threads) {
            ++started;
            threadIdx.x = turn = (turn + STEP) % threads;
            kernel(arguments);
            ++ended;
        }
        leave();
    }
}

static __attribute__((noinline)) void enter(int fiber) {
    current = fiber;
    if (_setjmp(scheduler)) return;
    if (fibers[fiber].begun) _longjmp(fibers[fiber].place, 1);
    fibers[fiber].begun = true;
    getcontext(&fibers[fiber].first);
    fibers[fiber].first.uc_stack.ss_sp = stacks + (size_t)fiber * STACK;
    fibers[fiber].first.uc_stack.ss_size = STACK;
    fibers[fiber].first.uc_link = nullptr;
    makecontext(&fibers[fiber].first, work, 0);
    setcontext(&fibers[fiber].first);
}

// Runs one block; returns what went wrong, or null.
static const char *run_block() {
    static char message[200];
    static int ready[MOST_THREADS];
    char *shared = __start_simulated_shared;
    if (shared) memset(shared, 0xFF, __stop_simulated_shared - shared);
    turn = started = ended = waiting = other_line = 0;
    for (int fiber = 0; started < threads; ++fiber) enter(fiber);
    while (waiting) {
        if (ended || other_line) {
            for (Fiber &fiber : fibers) fiber.begun = false;  // give up the waiting ones
            if (ended)
                snprintf(message, sizeof message, "%d of %d threads of block (%u, %u) ended while others wait at the "
                         "barrier in line %d", ended, threads, blockIdx.x, blockIdx.y, barrier_line);
            else
                snprintf(message, sizeof message, "threads of block (%u, %u) wait at different barriers, in lines %d "
                         "and %d", blockIdx.x, blockIdx.y, barrier_line, other_line);
            return message;
        }
        int count = waiting;
        memcpy(ready, waiting_fibers, count * sizeof *ready);
        waiting = 0;
        while (count) enter(ready[--count]);  // each time in the reverse order
    }
    return nullptr;
}

static const char *run(void (*entry)(void **), void **args, const unsigned *grid, unsigned block) {
    if (!stacks)
        stacks = (char *)mmap(nullptr, (size_t)MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    kernel = entry, arguments = args, threads = block;
    gridDim = {grid[0], grid[1]}, blockDim = {block, 1};
    for (unsigned y = grid[1]; y--;)
        for (unsigned x = grid[0]; x--;) {
            blockIdx = {x, y};
            if (const char *wrong = run_block()) return wrong;
        }
    return nullptr;
}

// A parameter as {kind, size, kind of what it points to, size of that}.
template <class T> constexpr int kind() {
    return std::is_pointer_v<T> ? 'p' : std::is_floating_point_v<T> ? 'f' : std::is_integral_v<T> ? 'i' : 's';
}
template <class T> static void describe(int *out) {
    using P = std::remove_cv_t<std::remove_pointer_t<T>>;
    out[0] = kind<T>(), out[1] = sizeof(T), out[2] = kind<P>(), out[3] = 1;
    if constexpr (!std::is_void_v<P>) out[3] = sizeof(P);
}

template <auto F> struct Entry;
template <class... P, void (*F)(P...)> struct Entry<F> {
    template <size_t... I> static void call(void **args, std::index_sequence<I...>) {
        F(*(std::remove_cv_t<P> *)args[I]...);
    }
    static void run(void **args) { call(args, std::index_sequence_for<P...>()); }
    static int parameters(int *out) {
        (void)std::initializer_list<int>{(describe<std::remove_cv_t<P>>(out), out += 4, 0)...};
        return sizeof...(P);
    }
};

}  // namespace simulated
