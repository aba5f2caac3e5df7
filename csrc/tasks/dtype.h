#pragma once

#include <cstdint>

namespace andmask {

// Element types in the order of every kernel table.
enum class Dtype { float16, bfloat16, float32, float64 };
constexpr int kDtypes = 4;

inline bool is_narrow(Dtype dtype) { return dtype == Dtype::float16 || dtype == Dtype::bfloat16; }

// The size of an element in bytes.
inline int64_t item_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

}  // namespace andmask
