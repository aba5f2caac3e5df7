// Checks shared by the ops. A message names op, argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace andmask {

// Raises RuntimeError in Python. (STD_TORCH_CHECK would put the C++ file name before the message.)
template <typename... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// For parts that cost nothing. They are computed in any case: for others, `if (...) fail(...)`.
template <typename... Parts>
inline void check(bool holds, const char* op, const Parts&... parts) {
  if (!holds) fail(op, parts...);
}

inline void check_grads(const char* op, const torch::stable::Tensor& grads) {
  check(grads.dim() >= 1, op,
        "expected grads of shape [environments, *shape], but got a 0-dim tensor");
  check(grads.size(0) >= 1, op, "expected grads of at least 1 environment (dim 0), but got 0");
  check(grads.size(0) <= std::numeric_limits<int32_t>::max(), op,
        "expected grads of at most 2^31 - 1 environments (dim 0), but got ", grads.size(0));
}

inline void check_tau(const char* op, double tau) {
  check(tau >= 0 && tau <= 1, op, "expected tau in [0, 1], but got ", tau);
}

}  // namespace andmask
