// SPDX-License-Identifier: Apache-2.0
// runtime.cpp -- runs the threads of a block as fibers, and answers CUDA's other calls.
//
// A fiber runs until it comes to a barrier or a shuffle, or leaves the kernel. When all
// have, those are let go on that what they wait for is there. Blocks, and threads
// between two waits, run in an order that `emulated_order` picks: where a barrier is
// missing, in one of them a value is read that is not there yet, or is gone.
#include <cuda_runtime.h>
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace
{

constexpr int kLanes = 32;
constexpr std::size_t kStack = 32 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
};

enum class State { kReady, kAtBarrier, kAtShuffle, kLeft };

struct Thread {
    State state;
    Fiber *fiber;
    // Of the shuffle that it waits at; then what it got there.
    unsigned mask;
    int apart;
    uint64_t value;
};

// One block at a time, so all of this is its.
const std::function<void()> *kernel;
std::vector<Thread> threads;
std::vector<unsigned> order;  // of the threads, until the next wait
std::size_t started;          // how many of `order` have begun
std::vector<Fiber *> idle;    // wait for a thread to run
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber *running;
ucontext_t scheduler;

int wanted_order;  // 0 forward, 1 backward, others random
std::mt19937 draw;
int64_t launches;
int asked;  // cudaStreamQuery
cudaError_t last_error = cudaSuccess;
thread_local char one_shared;  // lies among the __shared__ objects
char *shared;                  // where all of them are
std::size_t shared_bytes;

[[noreturn]] void
fail(const char *what, unsigned lane)
{
    std::fprintf(stderr, "block %u, thread %u: %s %u\n", blockIdx.x, threadIdx.x, what,
                 lane);
    std::abort();
}

std::vector<unsigned>
ordered(unsigned count)
{
    std::vector<unsigned> out(count);
    std::iota(out.begin(), out.end(), 0u);
    if (wanted_order == 1)
        std::reverse(out.begin(), out.end());
    else if (wanted_order != 0)
        std::shuffle(out.begin(), out.end(), draw);
    return out;
}

// Back to the scheduler; returns when it enters this fiber again.
void
rest()
{
    swapcontext(&running->context, &scheduler);
}

void
wait_as(State state)
{
    threads[threadIdx.x].state = state;
    rest();
}

// A fiber runs one thread after the other, until one waits, which is then its own.
void
run_threads()
{
    for (;;) {
        while (started < order.size()) {
            threadIdx.x = order[started++];
            threads[threadIdx.x].fiber = running;
            (*kernel)();
            threads[threadIdx.x].state = State::kLeft;
        }
        idle.push_back(running);
        rest();
    }
}

void
add_fiber()
{
    fibers.push_back(std::make_unique<Fiber>());
    Fiber &fiber = *fibers.back();
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, run_threads, 0);
    idle.push_back(&fiber);
}

Fiber *
idle_fiber()
{
    if (idle.empty())
        add_fiber();
    Fiber *fiber = idle.back();
    idle.pop_back();
    return fiber;
}

void
enter(Fiber *fiber)
{
    running = fiber;
    swapcontext(&scheduler, &fiber->context);
}

// The source of a lane's shuffle. All lanes of its mask have to be at this shuffle.
unsigned
source_of(unsigned index)
{
    threadIdx.x = index;
    const Thread &own = threads[index];
    const unsigned first = index / kLanes * kLanes;
    const unsigned source = (index - first) ^ static_cast<unsigned>(own.apart);
    for (unsigned lane = 0; lane < kLanes; lane++) {
        if ((own.mask >> lane & 1) == 0)
            continue;
        if (first + lane >= threads.size() ||
            threads[first + lane].state == State::kLeft)
            fail("a shuffle names a lane that has left:", lane);
        const Thread &other = threads[first + lane];
        if (other.state != State::kAtShuffle || other.mask != own.mask)
            fail("a shuffle names a lane that is elsewhere:", lane);
    }
    if ((own.mask >> (index - first) & 1) == 0)
        fail("a shuffle does not name its own lane:", index - first);
    if (source >= kLanes || (own.mask >> source & 1) == 0)
        fail("a shuffle reads a lane that it does not name:", source);
    return first + source;
}

// Let the shuffles of all warps take place; false where no thread waits at one.
bool
shuffle()
{
    std::vector<std::pair<unsigned, uint64_t>> got;
    for (unsigned i = 0; i < threads.size(); i++)
        if (threads[i].state == State::kAtShuffle)
            got.emplace_back(i, threads[source_of(i)].value);
    for (const auto &[i, value] : got) {
        threads[i].value = value;
        threads[i].state = State::kReady;
    }
    return !got.empty();
}

// A barrier waits for the threads that are left.
bool
pass_barrier()
{
    bool passed = false;
    for (Thread &thread : threads)
        if (thread.state == State::kAtBarrier) {
            thread.state = State::kReady;
            passed = true;
        }
    return passed;
}

// Find the memory of the __shared__ objects: what is thread-local in this library.
int
find_shared(dl_phdr_info *library, std::size_t, void *)
{
    auto *begin = static_cast<char *>(library->dlpi_tls_data);
    for (int i = 0; begin != nullptr && i < library->dlpi_phnum; i++) {
        const auto &part = library->dlpi_phdr[i];
        if (part.p_type == PT_TLS && &one_shared >= begin &&
            &one_shared < begin + part.p_memsz) {
            shared = begin;
            shared_bytes = part.p_memsz;
        }
    }
    return 0;
}

void
run_block()
{
    std::memset(shared, 0xff, shared_bytes);
    threads.assign(blockDim.x, Thread{});
    order = ordered(blockDim.x);
    started = 0;
    while (started < order.size())
        enter(idle_fiber());
    while (shuffle() || pass_barrier()) {
        order = ordered(blockDim.x);
        started = order.size();
        for (const unsigned i : order)
            if (threads[i].state == State::kReady) {
                threadIdx.x = i;
                enter(threads[i].fiber);
            }
    }
}

cudaError_t
noted(cudaError_t error)
{
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

// What the environment asks for, or that the stream is not the one of fake_torch.c.
cudaError_t
state_of(cudaStream_t stream)
{
    const char *wanted = std::getenv("EMULATED_ERROR");
    if (wanted != nullptr)
        return static_cast<cudaError_t>(std::atoi(wanted));
    return reinterpret_cast<uintptr_t>(stream) == 5 ? cudaSuccess
                                                    : cudaErrorInvalidResourceHandle;
}

}  // namespace

cudaError_t
emulated::launch(const cudaLaunchConfig_t &config, const std::function<void()> &body)
{
    const cudaError_t state = state_of(config.stream);
    if (state != cudaSuccess)
        return noted(state);
    if (config.gridDim.x == 0 || config.gridDim.x > INT32_MAX ||
        config.blockDim.x == 0 || config.blockDim.x > 1024)
        return noted(cudaErrorInvalidConfiguration);
    launches++;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    kernel = &body;
    dl_iterate_phdr(find_shared, nullptr);
    for (const unsigned block : ordered(gridDim.x)) {
        blockIdx.x = block;
        run_block();
    }
    return cudaSuccess;
}

cudaError_t
emulated::attributes()
{
    return noted(state_of(reinterpret_cast<cudaStream_t>(5)));
}

uint64_t
emulated::exchange(unsigned mask, uint64_t value, int apart)
{
    Thread &own = threads[threadIdx.x];
    own.mask = mask;
    own.apart = apart;
    own.value = value;
    wait_as(State::kAtShuffle);
    return own.value;
}

void
__syncthreads()
{
    wait_as(State::kAtBarrier);
}

cudaError_t
cudaGetLastError()
{
    return std::exchange(last_error, cudaSuccess);
}

cudaError_t
cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

// Done when it is asked for the third time, and the times after that.
cudaError_t
cudaStreamQuery(cudaStream_t stream)
{
    const cudaError_t state = state_of(stream);
    return noted(state == cudaSuccess && ++asked <= 2 ? cudaErrorNotReady : state);
}

const char *
cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorNoKernelImageForDevice ? "no kernel image"
                                                    : "another error";
}

// The order in which blocks and threads run from now on.
extern "C" void
emulated_order(int wanted)
{
    wanted_order = wanted;
    draw.seed(static_cast<unsigned>(wanted));
}

extern "C" int64_t
emulated_launches()
{
    return launches;
}

// What cudaGetLastError would give next.
extern "C" int
emulated_error_left()
{
    return last_error;
}
