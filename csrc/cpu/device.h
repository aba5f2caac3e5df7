// The CPU: a device that ops construct and tasks run on.
#pragma once

#include <cstdint>

#include "../tensors.h"

namespace andmask {

class Cpu {
 public:
  static constexpr bool kCountsSteps = false;

  Cpu(const char* op, const Tensor&) : op(op) {}

  // The dispatcher sends an op here only if all tensors are on the CPU.
  void check_here(const char*, int64_t, const Tensor&) const {}

  const char* const op;  // for messages
};

}  // namespace andmask
