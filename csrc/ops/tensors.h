// What the ops know about torch's tensors: dtype, shape, layout.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "../tasks/dtype.h"
#include "checks.h"

namespace andmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// How messages name an argument: `index` in the list `name`; -1: not a list.
inline std::string argument(const char* name, int64_t index) {
  return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
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
       " of dtype float16, bfloat16, float32 or float64, but got ",
       torch::headeronly::toString(tensor.scalar_type()));
}

inline bool is_narrow(Dtype dtype) { return dtype == Dtype::float16 || dtype == Dtype::bfloat16; }

// The type of the moments of gradients.
inline ScalarType wide_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

// Checks the dtype of votes, and that it holds as many as there will be.
inline void check_votes(const char* op, int64_t index, const Tensor& votes, int64_t environments) {
  int64_t capacity = 0;
  switch (votes.scalar_type()) {
    case ScalarType::Char: capacity = std::numeric_limits<int8_t>::max(); break;
    case ScalarType::Short: capacity = std::numeric_limits<int16_t>::max(); break;
    case ScalarType::Int: capacity = std::numeric_limits<int32_t>::max(); break;
    default:
      fail(op, "expected ", argument("votes", index), " of dtype int8, int16 or int32, but got ",
           torch::headeronly::toString(votes.scalar_type()));
  }
  if (environments > capacity) {
    fail(op, "expected ", argument("votes", index), " wide enough for ", environments,
         " environments, but got ", torch::headeronly::toString(votes.scalar_type()));
  }
}

// Memory without holes or overlaps, in any order of the dimensions: it can be gone over as one row.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous() || tensor.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) != 1) dims.emplace_back(tensor.stride(dim), tensor.size(dim));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// What is written to must not be an expanded tensor.
inline void check_writable(const char* op, const char* name, int64_t index, const Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.stride(dim) != 0 || tensor.size(dim) <= 1 || tensor.numel() == 0) continue;
    fail(op, "expected ", argument(name, index),
         " whose elements lie apart, but got an expanded tensor; clone() it");
  }
}

// Whether each environment's gradient lies contiguous in memory, however far apart they are.
inline bool rows_are_contiguous(const Tensor& grads) {
  int64_t expected = 1;
  for (int64_t dim = grads.dim() - 1; dim >= 1; --dim) {
    if (grads.size(dim) == 1) continue;
    if (grads.stride(dim) != expected) return false;
    expected *= grads.size(dim);
  }
  return true;
}

// Whether an element of `one` lies where that of `other` does, `skip` leading dims of `one` aside.
inline bool same_layout(const Tensor& one, const Tensor& other, int64_t skip = 0) {
  for (int64_t dim = 0; dim < other.dim(); ++dim) {
    if (other.size(dim) != 1 && one.stride(dim + skip) != other.stride(dim)) return false;
  }
  return true;
}

inline bool same_shape(const Tensor& one, const Tensor& other, int64_t skip = 0) {
  if (one.dim() != other.dim() + skip) return false;
  for (int64_t dim = 0; dim < other.dim(); ++dim) {
    if (one.size(dim + skip) != other.size(dim)) return false;
  }
  return true;
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  for (size_t dim = 0; dim < shape.size(); ++dim) text << (dim ? ", " : "(") << shape[dim];
  text << (shape.empty() ? "()" : ")");
  return text.str();
}

inline std::string shape_text(const Tensor& tensor) {
  return shape_text(std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end()));
}

// Every tensor must lie where the op runs.
struct NamedList {
  const char* name;
  const Tensors& tensors;
};

template <typename Device>
void check_here(const Device& device, const char* op, std::initializer_list<NamedList> lists) {
  for (const NamedList& list : lists) {
    for (size_t i = 0; i < list.tensors.size(); ++i) {
      device.check_here(op, list.name, static_cast<int64_t>(i), list.tensors[i]);
    }
  }
}

// One weight is for all environments: it becomes one for each.
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

// Environments before, and those that come.
inline void check_count(const char* op, int64_t count, int64_t environments) {
  check(count >= 0 && count <= std::numeric_limits<int32_t>::max() - environments, op,
        "expected count in [0, 2^31 - 1 - environments], but got ", count);
}

}  // namespace andmask
