// A CUDA device, which ops construct. Tasks run on its stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "../tensors.h"
#include "stream.h"

namespace andmask {

// For the time of one op, makes the device of its tensors the current one. Kernels go to the stream
// that is current there, and the host does not wait for them.
class Cuda {
 public:
  static constexpr bool kCountsSteps = true;

  Cuda(const char* op, const Tensor& first);
  Cuda(const Cuda&) = delete;

  void check_here(const char* name, int64_t index, const Tensor& tensor) const;

  operator const Stream&() const { return stream_; }

 private:
  const char* const op_;
  const Tensor first_;
#if !defined(ANDMASK_ON_HOST)
  const torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_;
  // The scratch of the op. torch's allocator reuses it on the same stream only, so that it can be
  // freed as soon as the last kernel is queued.
  mutable std::vector<Tensor> memory_;
};

}  // namespace andmask
