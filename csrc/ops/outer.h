// The ops _accumulate_outer_ and _accumulate_convolution_: checks and layout.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>

#include "../tasks/outer.h"
#include "checks.h"

namespace andmask {

using Weights = std::vector<double>;
using Ints = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

// ---- which examples belong to which environment ----

inline const int64_t* check_indices(const char* op, const char* name, Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Long || tensor.dim() != 1) {
    fail(op, "expected ", name, " of dtype int64 and 1 dim, but got ", dtype_text(tensor),
         " of shape ", shape_text(tensor));
  }
  if (!tensor.is_cpu()) {
    fail(op, "expected ", name, " on the CPU, which reads it, but got it on another device");
  }
  tensor = torch::stable::contiguous(tensor);
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

// Fills in the environments of the task. Without offsets every example is an environment, and
// `default_offsets` holds the offsets.
inline void set_groups(const char* op, int64_t examples, Optional& order, Optional& offsets,
                       Ints& default_offsets, OuterTask& task) {
  check(examples >= 1, op, "expected activations of at least 1 example (dim 0), but got 0");
  if (order) {
    task.order = check_indices(op, "order", *order);
    check(order->size(0) == examples, op, "expected order of ", examples,
          " indices, one for each example, but got ", order->size(0));
    std::vector<bool> seen(examples);
    for (int64_t i = 0; i < examples; ++i) {
      const int64_t index = task.order[i];
      check(index >= 0 && index < examples, op, "expected indices in [0, ", examples,
            ") in order, but got ", index);
      check(!seen[index], op, "expected each example once in order, but got ", index, " twice");
      seen[index] = true;
    }
  }
  if (!offsets) {
    default_offsets.resize(examples + 1);
    std::iota(default_offsets.begin(), default_offsets.end(), 0);
    task.offsets = default_offsets.data();
    task.environments = examples;
    return;
  }
  task.offsets = check_indices(op, "offsets", *offsets);
  task.environments = offsets->size(0) - 1;
  check(task.environments >= 1, op,
        "expected offsets of at least 1 environment (2 indices), but got ", offsets->size(0),
        " indices");
  const int64_t first = task.offsets[0], last = task.offsets[task.environments];
  check(first == 0 && last == examples, op, "expected offsets from 0 to ", examples,
        ", the number of examples, but got ", first, " to ", last);
  for (int64_t e = 0; e < task.environments; ++e) {
    check(task.offsets[e] < task.offsets[e + 1], op,
          "expected offsets that rise (at least 1 example in each environment), but got ",
          task.offsets[e + 1], " after ", task.offsets[e]);
  }
}

// ---- moments ----

// The moments of one weight, for the time of one call. They are written in place if their rows are
// contiguous and their layouts equal, as in slices of larger parameters. Otherwise contiguous
// copies take their place.
class OuterMoments {
 public:
  OuterMoments(Tensor& sum, Optional& votes, Optional& squares, Optional& logs, Optional& voters)
      : sum_(sum), votes_(votes), squares_(squares), logs_(logs), voters_(voters) {}

  void check(const char* op, const Ints& shape, Dtype dtype, int64_t count,
             int64_t environments) const {
    check_count(op, count, environments);
    const auto check_moment = [&](const char* name, const Tensor& moment, ScalarType expected) {
      if (Ints(moment.sizes().begin(), moment.sizes().end()) != shape) {
        fail(op, "expected ", name, " of shape ", shape_text(shape), ", but got ",
             shape_text(moment));
      }
      if (moment.scalar_type() != expected) {
        fail(op, "expected ", name, " of dtype ", dtype_text(expected), ", but got ",
             dtype_text(moment));
      }
      check_writable(op, name, -1, moment);
    };
    check_moment("sum", sum_, wide_type(dtype));
    if (votes_) {
      check_votes(op, -1, *votes_, count + environments);
      check_moment("votes", *votes_, votes_->scalar_type());
    }
    if (squares_) check_moment("squares", *squares_, wide_type(dtype));
    if (logs_) check_moment("logs", *logs_, wide_type(dtype));
    if (voters_) {
      andmask::check(votes_.has_value(), op, "expected votes beside voters, but got None");
      check_moment("voters", *voters_, votes_->scalar_type());
    }
  }

  template <typename Device>
  void check_here(const Device& device) const {
    device.check_here("sum", -1, sum_);
    if (votes_) device.check_here("votes", -1, *votes_);
    if (squares_) device.check_here("squares", -1, *squares_);
    if (logs_) device.check_here("logs", -1, *logs_);
    if (voters_) device.check_here("voters", -1, *voters_);
  }

  void set(OuterTask& task) {
    bool in_place = true;
    for_each([&](const Tensor& moment) {
      in_place = in_place && rows_are_contiguous(moment) && same_layout(moment, sum_);
    });
    if (!in_place) {
      for_each([&](Tensor& moment) {
        const Tensor original = moment;
        moment = torch::stable::contiguous(original);
        if (!original.is_contiguous()) copies_.emplace_back(original, moment);
      });
    }
    const auto pointer = [](const Optional& moment) {
      return moment ? moment->mutable_data_ptr() : nullptr;
    };
    task.moments = {sum_.mutable_data_ptr(),
                    pointer(votes_),
                    votes_ ? static_cast<int>(votes_->element_size()) : 0,
                    pointer(squares_),
                    pointer(logs_),
                    pointer(voters_)};
    OuterLayout& layout = task.layout;
    int64_t stride = 1;
    for (int64_t dim = sum_.dim() - 1; dim >= 2; --dim) {
      layout.tap_strides[kWindowAxes - sum_.dim() + dim] = stride;
      stride *= sum_.size(dim);
    }
    layout.channel_stride = stride;
    layout.output_stride = sum_.size(0) > 1 ? sum_.stride(0) : stride * sum_.size(1);
  }

  void copy_back() {
    for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
  }

 private:
  template <typename F>
  void for_each(const F& f) {
    f(sum_);
    for (Optional* moment : {&votes_, &squares_, &logs_, &voters_}) {
      if (*moment) f(**moment);
    }
  }

  Tensor& sum_;
  Optional& votes_;
  Optional& squares_;
  Optional& logs_;
  Optional& voters_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

// ---- the ops ----

inline Dtype check_operands(const char* op, const Tensor& activations, const Tensor& grad_outputs) {
  const Dtype dtype = check_dtype(op, "activations", activations);
  if (grad_outputs.scalar_type() != activations.scalar_type()) {
    fail(op, "expected grad_outputs of dtype ", dtype_text(activations),
         ", as activations has, but got ", dtype_text(grad_outputs));
  }
  check(grad_outputs.size(0) == activations.size(0), op, "expected grad_outputs of ",
        activations.size(0), " examples (dim 0), as activations has, but got ",
        grad_outputs.size(0));
  return dtype;
}

template <typename Device>
void accumulate_outer(Tensor sum, Optional votes, Optional squares, Optional logs, Optional voters,
                      Tensor activations, Tensor grad_outputs, Optional order, Optional offsets,
                      int64_t count, Weights weights) {
  const char* const op = "andmask::_accumulate_outer_";
  if (activations.dim() != 3) {
    fail(op, "expected activations of shape (examples, rows, inputs), but got ",
         shape_text(activations));
  }
  if (grad_outputs.dim() != 3) {
    fail(op, "expected grad_outputs of shape (examples, rows, outputs), but got ",
         shape_text(grad_outputs));
  }
  const Dtype dtype = check_operands(op, activations, grad_outputs);
  check(grad_outputs.size(1) == activations.size(1), op, "expected grad_outputs of ",
        activations.size(1), " rows (dim 1), as activations has, but got ", grad_outputs.size(1));
  const Device device(op, activations);
  device.check_here("grad_outputs", -1, grad_outputs);
  OuterTask task;
  Ints default_offsets;
  set_groups(op, activations.size(0), order, offsets, default_offsets, task);
  check_weights(op, weights, task.environments);
  OuterMoments moments(sum, votes, squares, logs, voters);
  moments.check_here(device);
  moments.check(op, {grad_outputs.size(2), activations.size(2)}, dtype, count, task.environments);
  if (sum.numel() == 0) return;

  const auto rows = [dtype](const Tensor& tensor) {
    return matrix_rows(tensor.const_data_ptr(), dtype, tensor.stride(0), tensor.size(1),
                       tensor.stride(1), tensor.size(2), tensor.stride(2));
  };
  task.activations = rows(activations);
  task.grad_outputs = rows(grad_outputs);
  task.weights = weights.empty() ? nullptr : weights.data();
  task.count = count;
  moments.set(task);
  run(device, task);
  moments.copy_back();
}

// The axis of a window that belongs to a spatial dimension of a tensor with `dims` dimensions.
inline int64_t axis_of(int64_t dim, int64_t dims) { return kWindowAxes - dims + dim; }

// The window that slides over the activations of a convolution.
inline void set_window(const char* op, const Tensor& sum, const Tensor& activations,
                       const Tensor& grad_outputs, const Ints& stride, const Ints& padding,
                       const Ints& dilation, OuterTask& task) {
  const int64_t dims = activations.dim();
  const auto check_ints = [&](const char* name, const Ints& values, int64_t least) {
    check(static_cast<int64_t>(values.size()) == dims - 2, op, "expected ", name, " of ", dims - 2,
          " ints, one for each spatial dim, but got ", values.size());
    for (int64_t value : values) {
      check(value >= least, op, "expected ", name, " of at least ", least, ", but got ", value);
    }
  };
  check_ints("stride", stride, 1);
  check_ints("padding", padding, 0);
  check_ints("dilation", dilation, 1);
  for (int64_t dim = 2; dim < dims; ++dim) {
    WindowAxis& axis = task.activations.axes[axis_of(dim, dims)];
    axis.size = activations.size(dim);
    axis.stride = activations.stride(dim);
    axis.taps = sum.size(dim);
    axis.step = stride[dim - 2];
    axis.padding = padding[dim - 2];
    axis.dilation = dilation[dim - 2];
    check(axis.taps >= 1, op, "expected sum of at least 1 in dim ", dim, ", but got 0");
    const int64_t room = axis.size + 2 * axis.padding - axis.dilation * (axis.taps - 1) - 1;
    axis.positions = room < 0 ? 0 : room / axis.step + 1;
    check(grad_outputs.size(dim) == axis.positions, op, "expected grad_outputs of size ",
          axis.positions, " in dim ", dim, ", but got ", grad_outputs.size(dim));
    WindowAxis& out = task.grad_outputs.axes[axis_of(dim, dims)];
    out.size = out.positions = axis.positions;
    out.stride = grad_outputs.stride(dim);
  }
}

template <typename Device>
void accumulate_convolution(Tensor sum, Optional votes, Optional squares, Optional logs,
                            Optional voters, Tensor activations, Tensor grad_outputs,
                            Optional order, Optional offsets, int64_t count, Ints stride,
                            Ints padding, Ints dilation, int64_t groups, Weights weights) {
  const char* const op = "andmask::_accumulate_convolution_";
  const int64_t dims = activations.dim();
  if (dims < 3 || dims > 2 + kWindowAxes) {
    fail(op, "expected activations of shape (examples, channels, 1 to 3 spatial dims), but got ",
         shape_text(activations));
  }
  if (grad_outputs.dim() != dims) {
    fail(op, "expected grad_outputs of ", dims, " dims, as activations has, but got ",
         shape_text(grad_outputs));
  }
  if (sum.dim() != dims) {
    fail(op, "expected sum of ", dims, " dims, as activations has, but got ", shape_text(sum));
  }
  const Dtype dtype = check_operands(op, activations, grad_outputs);
  const int64_t channels = activations.size(1), outputs = grad_outputs.size(1);
  check(groups >= 1 && channels % groups == 0 && outputs % groups == 0, op,
        "expected groups that divide ", channels, " channels and ", outputs, " outputs, but got ",
        groups);
  const Device device(op, activations);
  device.check_here("grad_outputs", -1, grad_outputs);
  OuterTask task;
  set_window(op, sum, activations, grad_outputs, stride, padding, dilation, task);
  Ints default_offsets;
  set_groups(op, activations.size(0), order, offsets, default_offsets, task);
  check_weights(op, weights, task.environments);
  Ints shape(sum.sizes().begin(), sum.sizes().end());
  shape[0] = outputs;
  shape[1] = channels / groups;
  OuterMoments moments(sum, votes, squares, logs, voters);
  moments.check_here(device);
  moments.check(op, shape, dtype, count, task.environments);
  if (sum.numel() == 0) return;

  const auto set_source = [&](const Tensor& tensor, RowSource& source) {
    source.data = tensor.const_data_ptr();
    source.dtype = dtype;
    source.example_stride = tensor.stride(0);
    source.channels = tensor.size(1) / groups;
    source.channel_stride = tensor.stride(1);
  };
  set_source(activations, task.activations);
  set_source(grad_outputs, task.grad_outputs);
  task.groups = groups;
  task.weights = weights.empty() ? nullptr : weights.data();
  task.count = count;
  moments.set(task);
  run(device, task);
  moments.copy_back();
}

}  // namespace andmask
