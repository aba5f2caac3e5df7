// Errors. A message names op, argument, what was expected and what came.
#pragma once

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

}  // namespace andmask
