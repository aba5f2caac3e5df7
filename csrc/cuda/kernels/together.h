// What the threads of a block do together: the only code that differs between a GPU and the host
// that stands in for it in tests. On the host the values of all threads come in an array.
#pragma once

#include "thread.h"

#if !defined(__CUDACC__)
#include <vector>
#endif

namespace andmask {

constexpr int kWarp = 32;

#if defined(__CUDACC__)

template <typename T>
__device__ __forceinline__ T from_lane_above(const T& value, int distance) {
  static_assert(sizeof(T) % 4 == 0);
  T other;
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (uint32_t& word : words) word = __shfl_down_sync(0xffffffffu, word, distance);
  memcpy(&other, words, sizeof other);
  return other;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += from_lane_above(value, distance);
  }
  return value;
}

// The sum over all threads of the block, in thread 0; always in the same order.
template <int threads, typename T>
__device__ __forceinline__ T block_sum(const T& value) {
  constexpr int warps = threads / kWarp;
  static_assert(threads % kWarp == 0 && warps <= kWarp);
  __shared__ T sums[warps];
  const T sum = warp_sum(value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return sum;
  return warp_sum(threadIdx.x < warps ? sums[threadIdx.x] : T{});
}

#else

template <typename T>
T warp_sum(T* values) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) values[lane] += values[lane + distance];
  }
  return values[0];
}

template <typename T>
T block_sum(std::vector<T> values) {
  T sums[kWarp] = {};
  for (size_t warp = 0; warp < values.size() / kWarp; ++warp) {
    sums[warp] = warp_sum(values.data() + warp * kWarp);
  }
  return warp_sum(sums);
}

#endif

}  // namespace andmask
