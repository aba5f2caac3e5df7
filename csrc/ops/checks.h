// Checks that several ops share.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

#include "../errors.h"
#include "../tensors.h"

namespace andmask {

inline void check_grads(const char* op, const Tensor& grads) {
  check(grads.dim() >= 1, op,
        "expected grads of shape [environments, *shape], but got a 0-dim tensor");
  check(grads.size(0) >= 1, op, "expected grads of at least 1 environment (dim 0), but got 0");
  check(grads.size(0) <= std::numeric_limits<int32_t>::max(), op,
        "expected grads of at most 2^31 - 1 environments (dim 0), but got ", grads.size(0));
}

inline void check_tau(const char* op, double tau) {
  check(tau >= 0 && tau <= 1, op, "expected tau in [0, 1], but got ", tau);
}

inline Dtype check_dtype(const char* op, const char* name, const Tensor& tensor,
                         int64_t index = -1) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    default: break;
  }
  fail(op, "expected ", argument(name, index),
       " of dtype float16, bfloat16, float32 or float64, but got ", dtype_text(tensor));
}

// Checks that votes have an integer type that is wide enough for the votes of `environments`.
inline void check_votes(const char* op, int64_t index, const Tensor& votes, int64_t environments) {
  int64_t capacity = 0;
  switch (votes.scalar_type()) {
    case ScalarType::Char: capacity = std::numeric_limits<int8_t>::max(); break;
    case ScalarType::Short: capacity = std::numeric_limits<int16_t>::max(); break;
    case ScalarType::Int: capacity = std::numeric_limits<int32_t>::max(); break;
    default:
      fail(op, "expected ", argument("votes", index), " of dtype int8, int16 or int32, but got ",
           dtype_text(votes));
  }
  if (environments > capacity) {
    fail(op, "expected ", argument("votes", index), " wide enough for ", environments,
         " environments, but got ", dtype_text(votes));
  }
}

// An op must not write to an expanded tensor.
inline void check_writable(const char* op, const char* name, int64_t index, const Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.stride(dim) != 0 || tensor.size(dim) <= 1 || tensor.numel() == 0) continue;
    fail(op, "expected ", argument(name, index),
         " whose elements lie apart, but got an expanded tensor; clone() it");
  }
}

struct NamedList {
  const char* name;
  const Tensors& tensors;
};

// Checks that every tensor lies on the device.
template <typename Device>
void check_here(const Device& device, std::initializer_list<NamedList> lists) {
  for (const NamedList& list : lists) {
    for (size_t i = 0; i < list.tensors.size(); ++i) {
      device.check_here(list.name, static_cast<int64_t>(i), list.tensors[i]);
    }
  }
}

// A single weight stands for all environments: it is repeated for each of them.
inline void check_weights(const char* op, std::vector<double>& weights, int64_t environments) {
  if (weights.size() == 1) weights.resize(environments, weights[0]);
  check(weights.empty() || weights.size() == static_cast<size_t>(environments), op, "expected ",
        environments, " weights, one for each environment, or one for all, but got ",
        weights.size());
  for (double weight : weights) {
    check(weight > 0 && weight <= std::numeric_limits<double>::max(), op,
          "expected positive finite weights, but got ", weight);
  }
}

// Checks the number of environments before a call that adds `environments` more.
inline void check_count(const char* op, int64_t count, int64_t environments) {
  check(count >= 0 && count <= std::numeric_limits<int32_t>::max() - environments, op,
        "expected count in [0, 2^31 - 1 - environments], but got ", count);
}

// Checks the number of environments that moments hold.
inline void check_count(const char* op, int64_t count) {
  check(count >= 1 && count <= std::numeric_limits<int32_t>::max(), op,
        "expected count in [1, 2^31 - 1], but got ", count);
}

}  // namespace andmask
