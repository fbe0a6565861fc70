// Kernels with one fault each, which cuda_on_host.h must find: the argument names it. Exit code 0: nothing found.
#include "cuda_on_host.h"

#include <string>

namespace {

constexpr int kThreads = 64;

enum Fault { kNone, kNoBarrier, kUnreached, kTwoPlaces, kLostLane, kUninitialised, kOutside };

// Every thread takes what its neighbour of the other warp put down.
__global__ void exchange_kernel(Fault fault, const float* in, float* out) {
  __shared__ float shared[kThreads];
  RIME_DYNAMIC_SHARED(float, dynamic);
  const unsigned t = threadIdx.x;
  if (fault == kUnreached && t < 32) return;
  if (fault == kLostLane && t == 40) return;
  if (!(fault == kUninitialised && t == 7)) shared[t] = in[t];
  dynamic[t + (fault == kOutside && t == kThreads - 1 ? 1 : 0)] = 0.0f;
  if (fault == kTwoPlaces && t < 32) {
    __syncthreads();
  } else if (fault != kNoBarrier) {
    __syncthreads();
  }
  const float other = shared[(t + 32) % kThreads];
  out[t] = other + __shfl_xor_sync(0xffffffffu, 0.0f, 1);
}

}  // namespace

int main(int, char** arguments) {
  const std::string names[] = {"none", "no_barrier", "unreached", "two_places", "lost_lane", "uninitialised", "outside"};
  const auto fault = static_cast<Fault>(std::find(names, names + 7, arguments[1]) - names);
  std::vector<float> in(kThreads), out(kThreads, -1.0f);
  for (int t = 0; t < kThreads; ++t) in[t] = static_cast<float>(t);
  cuda_on_host::launch(2, 1, kThreads, kThreads * sizeof(float), [&] { exchange_kernel(fault, in.data(), out.data()); });
  for (unsigned t = 0; t < kThreads; ++t)
    if (!(out[t] == in[(t + 32) % kThreads])) return 1;
  return 0;
}
