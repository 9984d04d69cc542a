// A CUDA runtime that runs kernels on the CPU, one block after the other and every thread of a block as a coroutine, so
// that what the kernels compute can be tested without a GPU. It finds wrong arithmetic, indices, barriers (a divergent
// one is an error) and misaligned accesses; not races, since a thread gives way only at barriers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define CUDART_VERSION 13000

using std::isfinite;
using std::max;
using std::min;

struct dim3 {
  unsigned x = 1;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

namespace on_cpu {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::abort();
}

struct Thread {
  enum { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone } state = kReady;
  ucontext_t context;
  uint64_t slot = 0;  // what the thread shows to others in a vote or a shuffle
};

struct Block {
  std::vector<Thread> threads;
  std::function<void()> kernel;
  ucontext_t scheduler;
  unsigned current = 0;
};

inline Block block;
inline unsigned block_index, grid_size;

inline void give_way(decltype(Thread::state) state) {
  Thread& self = block.threads[block.current];
  self.state = state;
  swapcontext(&self.context, &block.scheduler);
}

inline void start() {
  block.kernel();
  block.threads[block.current].slot = 0;
  give_way(Thread::kDone);
}

// Threads that have ended count as arrived.
inline bool release(size_t begin, size_t end, decltype(Thread::state) barrier) {
  bool waiting = false;
  for (size_t t = begin; t < end; t++) {
    const auto state = block.threads[t].state;
    if (state != barrier && state != Thread::kDone) return false;
    waiting |= state == barrier;
  }
  for (size_t t = begin; t < end; t++) {
    if (block.threads[t].state == barrier) block.threads[t].state = Thread::kReady;
  }
  return waiting;
}

inline void run_block(unsigned index, unsigned threads, std::vector<char>& stacks) {
  constexpr size_t kStack = 1 << 15;
  stacks.resize(threads * kStack);
  block_index = index;
  block.threads.assign(threads, {});
  for (unsigned t = 0; t < threads; t++) {
    ucontext_t& context = block.threads[t].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.data() + t * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, start, 0);
  }
  for (;;) {
    bool live = false, moved = false;
    for (unsigned t = 0; t < threads; t++) {
      if (block.threads[t].state == Thread::kReady) {
        block.current = t;
        moved = true;
        swapcontext(&block.scheduler, &block.threads[t].context);
      }
      live |= block.threads[t].state != Thread::kDone;
    }
    if (!live) return;
    for (unsigned t = 0; t < threads; t += 32) {
      moved |= release(t, std::min(t + 32, threads), Thread::kAtWarpBarrier);
    }
    moved |= release(0, threads, Thread::kAtBlockBarrier);
    if (!moved) fail("threads of one block wait at different barriers");
  }
}

// Blocks run backwards in every other launch: nothing may depend on their order.
inline void launch(int64_t blocks, int64_t threads, std::function<void()> kernel) {
  if (blocks < 1 || blocks > INT32_MAX) fail("a launch without blocks, or with too many");
  static bool backwards = false;
  static std::vector<char> stacks;
  backwards = !backwards;
  block.kernel = std::move(kernel);
  grid_size = static_cast<unsigned>(blocks);
  for (int64_t b = 0; b < blocks; b++) {
    run_block(static_cast<unsigned>(backwards ? blocks - 1 - b : b), static_cast<unsigned>(threads), stacks);
  }
}

struct Index {
  unsigned (*value)();
  operator unsigned() const { return value(); }
};
struct Coordinates {
  Index x;
};

template <class T>
T exchange(T value, unsigned from) {
  block.threads[block.current].slot = 0;
  std::memcpy(&block.threads[block.current].slot, &value, sizeof value);
  give_way(Thread::kAtWarpBarrier);
  std::memcpy(&value, &block.threads[from].slot, sizeof value);
  give_way(Thread::kAtWarpBarrier);
  return value;
}

template <class T>
T* check_aligned(T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("a misaligned access");
  return address;
}

}  // namespace on_cpu

inline const on_cpu::Coordinates threadIdx{{[] { return on_cpu::block.current; }}};
inline const on_cpu::Coordinates blockIdx{{[] { return on_cpu::block_index; }}};
inline const on_cpu::Coordinates gridDim{{[] { return on_cpu::grid_size; }}};

inline void __syncthreads() { on_cpu::give_way(on_cpu::Thread::kAtBlockBarrier); }
inline void __syncwarp() { on_cpu::give_way(on_cpu::Thread::kAtWarpBarrier); }

inline int __syncthreads_count(int predicate) {
  on_cpu::block.threads[on_cpu::block.current].slot = predicate != 0;
  __syncthreads();
  int count = 0;
  for (const auto& thread : on_cpu::block.threads) count += static_cast<int>(thread.slot);
  __syncthreads();
  return count;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }

inline uint32_t __ballot_sync(unsigned, int predicate) {
  on_cpu::block.threads[on_cpu::block.current].slot = predicate != 0;
  __syncwarp();
  const unsigned first = on_cpu::block.current / 32 * 32;
  uint32_t lanes = 0;
  for (unsigned lane = 0; lane < 32; lane++) {
    if (on_cpu::block.threads[first + lane].slot) lanes |= 1u << lane;
  }
  __syncwarp();
  return lanes;
}

template <class T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  const unsigned self = on_cpu::block.current;
  return on_cpu::exchange(value, self / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return on_cpu::exchange(value, on_cpu::block.current ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const unsigned self = on_cpu::block.current;
  return on_cpu::exchange(value, self % 32 >= distance ? self - distance : self);
}

template <class T, class U>
T atomicAdd(T* address, U value) {
  const T before = *address;
  *address += static_cast<T>(value);
  return before;
}
inline void atomicOr(uint32_t* address, uint32_t value) { *address |= value; }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(unsigned value) { return value ? __builtin_clz(value) : 32; }
inline int __ffs(int value) { return __builtin_ffs(value); }

template <class T>
T __ldcs(const T* address) {
  return *on_cpu::check_aligned(address);
}
template <class T>
void __stcs(T* address, T value) {
  *on_cpu::check_aligned(address) = value;
}

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInsufficientDriver,
  cudaErrorNoKernelImageForDevice,
  cudaErrorUnsupportedPtxVersion,
};
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}
