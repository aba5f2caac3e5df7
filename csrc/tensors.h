// Helpers for torch's tensors: names in messages, dtypes, shapes and layouts.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "tasks/dtype.h"

namespace andmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Names an argument in a message: element `index` of the list `name`, or `name` itself for -1.
inline std::string argument(const char* name, int64_t index) {
  return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
}

inline const char* dtype_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }
inline const char* dtype_text(const Tensor& tensor) { return dtype_text(tensor.scalar_type()); }

// The type in which moments of gradients are kept.
inline ScalarType wide_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

// True if the memory has neither holes nor overlaps, in any order of the dimensions: a loop can
// take it as one row.
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

// True if the gradient of each environment is contiguous, however far apart the environments lie.
inline bool rows_are_contiguous(const Tensor& grads) {
  int64_t expected = 1;
  for (int64_t dim = grads.dim() - 1; dim >= 1; --dim) {
    if (grads.size(dim) == 1) continue;
    if (grads.stride(dim) != expected) return false;
    expected *= grads.size(dim);
  }
  return true;
}

// True if both tensors have the same strides; `skip` leading dims of `tensor` do not count.
inline bool same_layout(const Tensor& tensor, const Tensor& reference, int64_t skip = 0) {
  for (int64_t dim = 0; dim < reference.dim(); ++dim) {
    if (reference.size(dim) != 1 && tensor.stride(dim + skip) != reference.stride(dim))
      return false;
  }
  return true;
}

inline bool same_shape(const Tensor& tensor, const Tensor& reference, int64_t skip = 0) {
  if (tensor.dim() != reference.dim() + skip) return false;
  for (int64_t dim = 0; dim < reference.dim(); ++dim) {
    if (tensor.size(dim + skip) != reference.size(dim)) return false;
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

}  // namespace andmask
