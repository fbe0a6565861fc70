// Runs CUDA kernels on the CPU, to test them without a GPU: include it in place of CUDA's headers, then the kernels.
//
// Every thread of a block is a fiber. A fiber runs up to its next barrier or warp exchange; which fiber goes on next is
// drawn at random, and so is the order of blocks, so that a missing barrier shows. Shared memory, static and dynamic,
// begins every block as NaNs. A block in which nobody can go on (some thread never reaches the barrier that the rest
// waits at), or whose threads meet at different barriers, ends the process: on a GPU it would hang or read garbage.
// Under -fsanitize=address,undefined every access of a kernel is checked as well; dynamic shared memory has its size.
//
// Serves what csrc/cuda uses: 1-D blocks, blockIdx.x and .y, __shared__, __syncthreads, full-warp shuffles and ballots,
// float4, uint2, and the conversions of bf16 and fp16. Kernels must be in an unnamed namespace.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One section, so that a block can begin with all of it poisoned.
#define __shared__ static __attribute__((section("cuda_shared")))
#define RIME_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(cuda_on_host::dynamic.get())

extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

struct Index {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

// No fiber is left between two steps of it.
inline unsigned atomicMax(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = std::max(before, value);
  return before;
}

inline Index threadIdx{0, 0}, blockIdx{0, 0}, gridDim{0, 0}, blockDim{0, 0};

namespace cuda_on_host {

using Place = std::source_location;
constexpr unsigned kWarp = 32;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

enum class State { kReady, kBarrier, kExchange, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
  Place place;           // of the barrier or exchange it waits at
  unsigned turn = 0;     // parity of its exchanges: a lane may be one ahead of another of its warp, never two
  uint64_t slot[2] = {};  // what it shows its warp, of this exchange and of the one before
};

inline std::vector<Thread> threads;
inline std::vector<unsigned> ready;
inline unsigned size = 0, alive = 0, at_barrier = 0;
inline unsigned at_exchange[32] = {};
inline ucontext_t scheduler;
inline std::unique_ptr<unsigned char[]> dynamic;
inline std::function<void()> body;
inline std::mt19937 random(1);

#if defined(__SANITIZE_ADDRESS__)
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_size = 0;
#endif

[[noreturn]] inline void fail(const char* what, const Place& at) {
  std::fprintf(stderr, "block (%u, %u): %s (%s:%u)\n", blockIdx.x, blockIdx.y, what, at.file_name(),
               static_cast<unsigned>(at.line()));
  std::_Exit(3);
}

// From a fiber back to the scheduler.
inline void leave(State state, const Place& place) {
  const Index self = threadIdx;
  Thread& thread = threads[self.x];
  thread.state = state, thread.place = place;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &fake, scheduler_stack, scheduler_size);
#endif
  swapcontext(&thread.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
  threadIdx = self;
}

inline void fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  body();
  leave(State::kDone, Place::current());
}

inline void enter(unsigned which) {
  threadIdx = {which, 0};
  Thread& thread = threads[which];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, thread.stack.get(), kStack);
#endif
  swapcontext(&scheduler, &thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Lets the threads first..last that wait as `state` go on; they must wait at one place.
inline void release(unsigned first, unsigned last, State state) {
  const Thread* one = nullptr;
  for (unsigned t = first; t < last; ++t) {
    Thread& thread = threads[t];
    if (thread.state != state) continue;
    if (one != nullptr && (one->place.line() != thread.place.line() || one->place.file_name() != thread.place.file_name()))
      fail("threads wait at different places", thread.place);
    one = &thread;
    thread.state = State::kReady;
    ready.push_back(t);
  }
}

inline void begin_block() {
  ready.clear();
  alive = size, at_barrier = 0;
  for (unsigned t = 0; t < size; ++t) {
    Thread& thread = threads[t];
    if (!thread.stack) thread.stack = std::make_unique_for_overwrite<char[]>(kStack);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack.get(), kStack);
#endif
    thread.state = State::kReady, thread.turn = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber, 0);
    ready.push_back(t);
  }
  std::fill(at_exchange, at_exchange + 32, 0u);
}

inline void run_block() {
  begin_block();
  while (alive > 0) {
    if (ready.empty()) {
      const auto waits = [](const Thread& t) { return t.state == State::kExchange || t.state == State::kBarrier; };
      fail("waits forever: not all threads come here", std::find_if(threads.begin(), threads.end(), waits)->place);
    }
    std::swap(ready[random() % ready.size()], ready.back());
    const unsigned which = ready.back(), warp = which / kWarp;
    ready.pop_back();
    enter(which);
    const State state = threads[which].state;
    if (state == State::kDone) --alive;
    if (state == State::kBarrier) ++at_barrier;
    if (state == State::kExchange && ++at_exchange[warp] == kWarp) {
      at_exchange[warp] = 0;
      release(warp * kWarp, (warp + 1) * kWarp, State::kExchange);
    }
    // Threads that returned no longer count, as on a GPU.
    if (at_barrier > 0 && at_barrier == alive) {
      at_barrier = 0;
      release(0, size, State::kBarrier);
    }
  }
}

// Not instrumented: between the variables lie the sanitizer's red zones.
__attribute__((no_sanitize_address)) inline void poison(volatile char* from, volatile const char* to) {
  for (; from < to; ++from) *from = static_cast<char>(0xff);
}

// kernel<<<{x, y}, threads, shared_bytes>>>(...)
template <class Call>
void launch(unsigned x, unsigned y, unsigned n_threads, size_t shared_bytes, Call call) {
  body = call;
  gridDim = {x, y}, blockDim = {n_threads, 1};
  size = n_threads;
  if (threads.size() < size) threads = std::vector<Thread>(size);
  std::vector<unsigned> order(size_t{x} * y);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned block : order) {
    blockIdx = {block % x, block / x};
    dynamic = std::make_unique_for_overwrite<unsigned char[]>(shared_bytes);
    std::memset(dynamic.get(), 0xff, shared_bytes);
    poison(__start_cuda_shared, __stop_cuda_shared);
    run_block();
  }
}

template <class T>
T exchange(T value, unsigned from, const Place& place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned me = threadIdx.x;
  const unsigned turn = threads[me].turn++ & 1u;
  std::memcpy(&threads[me].slot[turn], &value, sizeof(T));
  leave(State::kExchange, place);
  T found;
  std::memcpy(&found, &threads[me / kWarp * kWarp + from % kWarp].slot[turn], sizeof(T));
  return found;
}

}  // namespace cuda_on_host

inline void __syncthreads(std::source_location place = std::source_location::current()) {
  cuda_on_host::leave(cuda_on_host::State::kBarrier, place);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int step, std::source_location place = std::source_location::current()) {
  return cuda_on_host::exchange(value, threadIdx.x ^ static_cast<unsigned>(step), place);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane, std::source_location place = std::source_location::current()) {
  return cuda_on_host::exchange(value, static_cast<unsigned>(lane), place);
}

inline unsigned __ballot_sync(unsigned, bool wanted, std::source_location place = std::source_location::current()) {
  const unsigned me = threadIdx.x, lane = me % cuda_on_host::kWarp;
  unsigned all = 0;
  for (unsigned step = 0; step < cuda_on_host::kWarp; ++step)
    all |= static_cast<unsigned>(cuda_on_host::exchange(wanted, lane ^ step, place)) << (lane ^ step);
  return all;
}

// A store that the L1 passes on.
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

// bf16 and fp16, rounded to nearest, ties to even.
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
