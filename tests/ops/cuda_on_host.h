// Runs CUDA kernels on the CPU, to test them without a GPU: every thread of a block is a fiber, and all fibers run in
// turn, each up to its next barrier or shuffle. Serves what csrc/cuda's kernels use: 1-D blocks, blockIdx.x and .y,
// __shared__, __syncthreads, __shfl_xor_sync with all lanes, float4.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
struct float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x, y;
};
static Index threadIdx, blockIdx, gridDim, blockDim;

namespace cuda_on_host {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10;
static std::jmp_buf scheduler, places[kMaxThreads];
static int arrived = 0, alive = 0;
static unsigned generation = 0;
static float slots[2][kMaxThreads];
static std::function<void()> body;

// The place is saved and left by setjmp and longjmp, which, unlike swapcontext, make no system call.
inline void yield() {
  const Index mine = threadIdx;
  if (_setjmp(places[mine.x]) == 0) _longjmp(scheduler, 1);
  threadIdx = mine;
}

inline void release_if_all_arrived() {
  if (arrived == alive && alive > 0) arrived = 0, ++generation;
}

// Threads that returned no longer count, as on a GPU.
inline void barrier() {
  const unsigned mine = generation;
  ++arrived;
  release_if_all_arrived();
  while (generation == mine) yield();
}

inline void fiber() {
  body();
  --alive;
  release_if_all_arrived();
  _longjmp(scheduler, 1);
}

inline void begin(int thread) {
  static std::unique_ptr<char[]> stacks[kMaxThreads];
  if (!stacks[thread]) stacks[thread] = std::make_unique_for_overwrite<char[]>(kStack);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks[thread].get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber, 0);
  setcontext(&context);
}

inline void run_block(int threads) {
  static bool begun[kMaxThreads], finished[kMaxThreads];
  static int turn, before;  // outlive the jumps
  for (int t = 0; t < threads; ++t) begun[t] = finished[t] = false;
  alive = threads, arrived = 0;
  while (alive > 0) {
    for (turn = 0; turn < threads; ++turn) {
      if (finished[turn]) continue;
      threadIdx = {static_cast<unsigned>(turn), 0};
      before = alive;
      if (_setjmp(scheduler) == 0) {
        if (begun[turn]) _longjmp(places[turn], 1);
        begun[turn] = true;
        begin(turn);
      }
      if (alive < before) finished[turn] = true;
    }
  }
}

// kernel<<<{x, y}, threads>>>(...)
template <class Call>
void launch(unsigned x, unsigned y, int threads, Call call) {
  body = call;
  gridDim = {x, y}, blockDim = {static_cast<unsigned>(threads), 1};
  for (unsigned b = 0; b < y; ++b)
    for (unsigned a = 0; a < x; ++a) {
      blockIdx = {a, b};
      run_block(threads);
    }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::barrier(); }

// Two sets of slots in turn: a lane may be one shuffle ahead of another of its warp, never two.
inline float __shfl_xor_sync(unsigned, float value, int step) {
  static int turns[cuda_on_host::kMaxThreads];
  const unsigned thread = threadIdx.x;
  float* slots = cuda_on_host::slots[turns[thread]++ & 1];
  slots[thread] = value;
  cuda_on_host::yield();
  return slots[thread ^ static_cast<unsigned>(step)];
}
