// Puts kernels on a stream. Compiled by a host compiler, as in the test harness, the same calls run
// every thread of every block one after the other.
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels/block_ops.h"
#include "stream.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace andmask {

// The number of blocks of a kernel whose threads stride through `items`: enough to fill the device
// several times.
inline int64_t blocks_for(const Stream& stream, int64_t items, int64_t threads) {
  return std::min((items + threads - 1) / threads, stream.multiprocessors * 16);
}

// Every thread of a body with a type Total returns one. One thread of each block calls
// finish(block, total) with the sum.
template <typename Body>
concept Summing = requires { typename Body::Total; };

// A body with a type Shared takes all threads of a block, and memory that they share.
template <typename Body>
concept Cooperating = requires { typename Body::Shared; };

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("andmask: ") + what +
                           " failed: " + cudaGetErrorString(error));
}

// Copies host memory to device memory, for the time of the op. A graph cannot capture this: it
// would read the host memory again at every replay.
template <typename T>
const T* upload(const Stream& stream, const T* from, int64_t count) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(handle, &status), "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone) {
    throw std::runtime_error(
        "andmask: a CUDA graph cannot capture weights that differ, an order, environments of "
        "different sizes, fdr, or zeros that abstain, because they are read from host memory");
  }
  T* const to = stream.scratch<T>(count);
  check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(T),
                             cudaMemcpyHostToDevice, handle),
             "cudaMemcpyAsync");
  return to;
}

// The number of blocks that a multiprocessor must be able to hold at once. Without it ptxas aims at
// more, for which it spills registers or makes loads wait for each other.
template <typename Body>
constexpr int kMinBlocks = [] {
  if constexpr (requires { Body::kMinBlocks; }) {
    return Body::kMinBlocks;
  } else {
    return 1;
  }
}();

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, kMinBlocks<Body>)
    run_body(const __grid_constant__ Body body) {
  const ThreadIndex index{blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x)};
  if constexpr (Summing<Body>) {
    const auto total = block_sum<Body::kThreads>(body(index));
    if (threadIdx.x == 0) body.finish(index.block, total);
  } else if constexpr (Cooperating<Body>) {
    __shared__ typename Body::Shared shared;
    ThreadBlock<typename Body::State, Body::kThreads> threads;
    body(threads, shared, index);
  } else {
    body(index);
  }
}

template <typename Body>
void launch(const Stream& stream, int64_t blocks, const Body& body) {
  if (blocks == 0) return;
  run_body<Body><<<static_cast<unsigned>(blocks), Body::kThreads, 0,
                   static_cast<cudaStream_t>(stream.handle)>>>(body);
  check_cuda(cudaGetLastError(), "a kernel launch");
}

#else

template <typename T>
const T* upload(const Stream& stream, const T* from, int64_t count) {
  T* const to = stream.scratch<T>(count);
  std::copy(from, from + count, to);
  return to;
}

template <typename Body>
void launch(const Stream&, int64_t blocks, const Body& body) {
  for (int64_t block = 0; block < blocks; ++block) {
    if constexpr (Summing<Body>) {
      std::vector<typename Body::Total> totals;
      for (int thread = 0; thread < Body::kThreads; ++thread) {
        totals.push_back(body(ThreadIndex{block, blocks, thread}));
      }
      body.finish(block, block_sum(totals));
    } else if constexpr (Cooperating<Body>) {
      const auto shared = std::make_unique<typename Body::Shared>();
      ThreadBlock<typename Body::State, Body::kThreads> threads;
      body(threads, *shared, ThreadIndex{block, blocks, 0});
    } else {
      for (int thread = 0; thread < Body::kThreads; ++thread)
        body(ThreadIndex{block, blocks, thread});
    }
  }
}

#endif

}  // namespace andmask
