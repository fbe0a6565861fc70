// Enough of CUDA to compile a kernel for the host and run it: every thread of a block is a coroutine, and a barrier or a
// warp's exchange lets the others run until all have come. A block in which nobody can go on, because some thread never
// reaches the barrier the rest waits at, ends the process: on a GPU it would hang or read garbage.
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
#define __launch_bounds__(...)
#define __shared__ static
#define RIME_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(on_host::dynamic)

struct Index {
  unsigned x;
};

namespace on_host {

constexpr unsigned kWarp = 32;

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  long barriers = 0, exchanges = 0;  // how many it has arrived at
  uint64_t slot[2] = {};             // what it shows its warp, of this exchange and of the one before
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline void* dynamic = nullptr;
inline std::function<void()> body;

inline void yield() { swapcontext(&threads[current].context, &scheduler); }

inline void run_body() {
  body();
  threads[current].done = true;
  swapcontext(&threads[current].context, &scheduler);
}

// Waits until every thread of first..last has arrived as often as this one. Threads that have returned never do.
inline void wait(long Thread::* count, unsigned first, unsigned last) {
  const long mine = ++(threads[current].*count);
  const auto late = [&] {
    return std::any_of(threads.begin() + first, threads.begin() + last,
                       [&](const Thread& t) { return t.*count < mine; });
  };
  while (late()) yield();
}

template <class T>
T exchange(T value, unsigned from) {
  Thread& self = threads[current];
  const unsigned warp = current / kWarp * kWarp;
  const long turn = self.exchanges & 1;
  self.slot[turn] = 0;
  std::memcpy(&self.slot[turn], &value, sizeof(T));
  wait(&Thread::exchanges, warp, warp + kWarp);
  T found;
  std::memcpy(&found, &threads[warp + from % kWarp].slot[turn], sizeof(T));
  return found;
}

}  // namespace on_host

inline Index threadIdx{0}, blockIdx{0};

inline void __syncthreads() {
  on_host::wait(&on_host::Thread::barriers, 0, static_cast<unsigned>(on_host::threads.size()));
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return on_host::exchange(value, on_host::current % on_host::kWarp ^ static_cast<unsigned>(step));
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return on_host::exchange(value, static_cast<unsigned>(lane));
}

inline unsigned __ballot_sync(unsigned, bool wanted) {
  unsigned all = 0;
  const uint64_t own = wanted ? 1 : 0;
  const unsigned lane = on_host::current % on_host::kWarp;
  all |= static_cast<unsigned>(own) << lane;
  for (unsigned step = 1; step < on_host::kWarp; ++step)
    all |= static_cast<unsigned>(on_host::exchange(own, lane ^ step)) << (lane ^ step);
  return all;
}

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

namespace on_host {

// kernel<<<blocks, size, shared_bytes>>>(...), the blocks one after the other.
template <class Kernel>
void launch(unsigned blocks, unsigned size, size_t shared_bytes, Kernel kernel) {
  std::vector<double> memory(shared_bytes / sizeof(double) + 1);
  body = kernel;
  for (unsigned block = 0; block < blocks; ++block) {
    std::fill(memory.begin(), memory.end(), NAN);  // shared memory begins as anything
    dynamic = memory.data();
    threads = std::vector<Thread>(size);
    for (Thread& thread : threads) {
      thread.stack.resize(64 << 10);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, run_body, 0);
    }
    for (bool left = true; left;) {
      left = false;
      long moved = 0;
      for (current = 0; current < size; ++current) {
        Thread& thread = threads[current];
        if (thread.done) continue;
        const long before = thread.barriers + thread.exchanges;
        threadIdx.x = current;
        blockIdx.x = block;
        swapcontext(&scheduler, &thread.context);
        moved += thread.barriers + thread.exchanges - before + thread.done;
        left = left || !thread.done;
      }
      if (left && moved == 0) {
        std::fprintf(stderr, "block %u waits forever: its threads are at different barriers\n", block);
        std::_Exit(3);
      }
    }
  }
}

}  // namespace on_host
