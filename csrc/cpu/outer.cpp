// Moments of weight gradients: W_e = sum over the rows r of environment e of d_r a_r^T is counted
// and added up, and never held for more than one environment.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <memory>
#include <optional>

#include "kernels/moments.h"
#include "tensors.h"

namespace andmask {
namespace {

using Weights = std::vector<double>;
using Ints = std::vector<int64_t>;
using Moment = std::optional<Tensor>;

ScalarType wide_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

// Which examples belong to which environment: environment e has examples
// order[offsets[e]] ... order[offsets[e + 1] - 1].
struct Groups {
  Ints order, offsets;

  int64_t environments() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

Ints read_indices(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Long || tensor.dim() != 1) {
    fail(op, "expected ", name, " of dtype int64 and 1 dim, but got ",
         torch::headeronly::toString(tensor.scalar_type()), " of shape ", shape_text(tensor));
  }
  const auto* data = static_cast<const int64_t*>(tensor.const_data_ptr());
  Ints values(tensor.size(0));
  const int64_t stride = values.size() > 1 ? tensor.stride(0) : 1;
  for (size_t i = 0; i < values.size(); ++i) values[i] = data[static_cast<int64_t>(i) * stride];
  return values;
}

Groups read_groups(const char* op, int64_t examples, const Moment& order, const Moment& offsets) {
  Groups groups;
  if (order) {
    groups.order = read_indices(op, "order", *order);
    check(static_cast<int64_t>(groups.order.size()) == examples, op, "expected order of ", examples,
          " indices, one for each example, but got ", groups.order.size());
    for (int64_t index : groups.order) {
      check(index >= 0 && index < examples, op, "expected indices in [0, ", examples,
            ") in order, but got ", index);
    }
  } else {
    for (int64_t i = 0; i < examples; ++i) groups.order.push_back(i);
  }
  if (offsets) {
    groups.offsets = read_indices(op, "offsets", *offsets);
    check(groups.offsets.size() >= 2, op,
          "expected offsets of at least 2 indices (1 environment), but got ",
          groups.offsets.size());
    check(groups.offsets.front() == 0 && groups.offsets.back() == examples, op,
          "expected offsets from 0 to ", examples, ", the number of examples, but got ",
          groups.offsets.front(), " to ", groups.offsets.back());
    for (int64_t e = 0; e < groups.environments(); ++e) {
      check(groups.offsets[e] < groups.offsets[e + 1], op,
            "expected offsets that rise (no environment without examples), but got ",
            groups.offsets[e], " before ", groups.offsets[e + 1]);
    }
  } else {
    check(examples >= 1, op, "expected activations of at least 1 example (dim 0), but got 0");
    for (int64_t i = 0; i <= examples; ++i) groups.offsets.push_back(i);
  }
  return groups;
}

void check_weights(const char* op, const Weights& weights, int64_t environments) {
  check(weights.empty() || weights.size() == static_cast<size_t>(environments), op, "expected ",
        environments, " weights, one for each environment, but got ", weights.size());
  for (double weight : weights) {
    check(weight > 0 && weight <= std::numeric_limits<double>::max(), op,
          "expected positive finite weights, but got ", weight);
  }
}

// The moments of one weight: matrices [O, columns], each with a row stride of its own.
struct MomentMatrices {
  MomentArrays arrays;
  int64_t rows, columns;
  int64_t sum_stride, votes_stride, squares_stride, logs_stride;

  // From row `row`, column `column` on; `bytes` is that of a sum.
  MomentArrays at(int64_t row, int64_t column, int64_t bytes) const {
    const auto move = [&](void* base, int64_t stride, int64_t size) -> void* {
      return base ? static_cast<char*>(base) + (row * stride + column) * size : nullptr;
    };
    return {move(arrays.sum, sum_stride, bytes),
            move(arrays.votes, votes_stride, arrays.vote_bytes), arrays.vote_bytes,
            move(arrays.squares, squares_stride, bytes), move(arrays.logs, logs_stride, bytes)};
  }

  bool contiguous() const {
    const auto flat = [&](void* base, int64_t stride) { return !base || stride == columns; };
    return flat(arrays.sum, sum_stride) && flat(arrays.votes, votes_stride) &&
           flat(arrays.squares, squares_stride) && flat(arrays.logs, logs_stride);
  }
};

int64_t vote_capacity(const char* op, const Tensor& votes) {
  switch (votes.scalar_type()) {
    case ScalarType::Char: return std::numeric_limits<int8_t>::max();
    case ScalarType::Short: return std::numeric_limits<int16_t>::max();
    case ScalarType::Int: return std::numeric_limits<int32_t>::max();
    default: break;
  }
  fail(op, "expected votes of dtype int8, int16 or int32, but got ",
       torch::headeronly::toString(votes.scalar_type()));
}

// `rows`: how many dimensions of the weight are rows: 1 of [O, I], whose rows may lie apart.
void check_moment(const char* op, const char* name, const Tensor& moment, const Ints& shape,
                  ScalarType dtype, bool rows_may_lie_apart) {
  bool same = moment.dim() == static_cast<int64_t>(shape.size());
  for (int64_t dim = 0; same && dim < moment.dim(); ++dim) same = moment.size(dim) == shape[dim];
  if (!same) {
    std::ostringstream text;
    for (size_t dim = 0; dim < shape.size(); ++dim) text << (dim ? ", " : "(") << shape[dim];
    fail(op, "expected ", name, " of shape ", text.str(), "), but got ", shape_text(moment));
  }
  if (moment.scalar_type() != dtype) {
    fail(op, "expected ", name, " of dtype ", torch::headeronly::toString(dtype), ", but got ",
         torch::headeronly::toString(moment.scalar_type()));
  }
  if (moment.is_contiguous()) return;
  const bool rows_fit = rows_may_lie_apart && (moment.size(1) == 1 || moment.stride(1) == 1) &&
                        (moment.size(0) == 1 || moment.stride(0) >= moment.size(1));
  if (!rows_fit) {
    std::ostringstream text;
    for (int64_t dim = 0; dim < moment.dim(); ++dim) {
      text << (dim ? ", " : "(") << moment.stride(dim);
    }
    fail(op, "expected ", name,
         rows_may_lie_apart ? " with contiguous rows that lie apart" : " that is contiguous",
         ", but got strides ", text.str(), ")");
  }
}

// Checks the moments of a weight of `shape`, whose first dimension are the rows.
MomentMatrices check_moments(const char* op, const Tensor& sum, const Moment& votes,
                             const Moment& squares, const Moment& logs, const Ints& shape,
                             Dtype dtype, int64_t count, int64_t environments) {
  const bool apart = shape.size() == 2;
  const ScalarType wide = wide_type(dtype);
  check_moment(op, "sum", sum, shape, wide, apart);
  check(count >= 0 && count <= std::numeric_limits<int32_t>::max() - environments, op,
        "expected count in [0, 2^31 - 1 - environments], but got ", count);
  if (votes) {
    const int64_t capacity = vote_capacity(op, *votes);
    check_moment(op, "votes", *votes, shape, votes->scalar_type(), apart);
    if (count + environments > capacity) {
      fail(op, "expected votes wide enough for ", count + environments, " environments, but got ",
           torch::headeronly::toString(votes->scalar_type()));
    }
  }
  if (squares) check_moment(op, "squares", *squares, shape, wide, apart);
  if (logs) check_moment(op, "logs", *logs, shape, wide, apart);
  MomentMatrices matrices{};
  matrices.rows = shape[0];
  matrices.columns = 1;
  for (size_t dim = 1; dim < shape.size(); ++dim) matrices.columns *= shape[dim];
  const auto stride = [&](const Tensor& moment) {
    return apart && moment.size(0) > 1 ? moment.stride(0) : matrices.columns;
  };
  matrices.arrays.sum = sum.mutable_data_ptr();
  matrices.sum_stride = stride(sum);
  if (votes) {
    matrices.arrays.votes = votes->mutable_data_ptr();
    matrices.arrays.vote_bytes = static_cast<int>(votes->element_size());
    matrices.votes_stride = stride(*votes);
  }
  if (squares) {
    matrices.arrays.squares = squares->mutable_data_ptr();
    matrices.squares_stride = stride(*squares);
  }
  if (logs) {
    matrices.arrays.logs = logs->mutable_data_ptr();
    matrices.logs_stride = stride(*logs);
  }
  return matrices;
}

// ---- the library's GEMM ----

// A tensor over memory of ours: without autograd, whatever the arguments of the op carry.
Tensor matrix(const void* data, ScalarType dtype, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {row_stride, column_stride};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// out = beta * out + left right. What is multiplied by a beta of 0 is ignored.
void multiply(const Tensor& left, const Tensor& right, double beta, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, 1));
}

// Memory that stays with the thread: mapping it anew for every call would cost more than the work.
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    capacity = bytes;
  }
  return memory.get();
}

// Adds one environment's rows [first, first + rows) of W, which lie in `weight`, to the moments.
void add_environment(const MomentMatrices& moments, Dtype wide, const void* weight, int64_t first,
                     int64_t rows, int64_t count, const double* factor) {
  const int64_t bytes = wide == Dtype::float64 ? 8 : 4;
  const auto kernel = moment_kernels(active_isa()).accumulate[static_cast<int>(wide)];
  const int64_t columns = moments.columns;
  const bool flat = moments.contiguous();
  torch::stable::parallel_for(0, rows * columns, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = flat ? 0 : begin / columns;
      const int64_t stop = flat ? end : std::min(end, (row + 1) * columns);
      const int64_t start = row * columns;
      const char* const grads = static_cast<const char*>(weight) + start * bytes;
      kernel({grads, 1, 0, factor, count, moments.at(first + row, 0, bytes)}, begin - start,
             stop - start);
      begin = stop;
    }
  });
}

// Elements of one environment's W, and of the rows gathered for it, that are held at a time.
constexpr int64_t kWeightChunk = int64_t{1} << 18;
constexpr int64_t kRowChunk = int64_t{1} << 21;

// A matrix of rows, some to each example: rows of an environment are gathered and widened.
struct Rows {
  const Tensor& tensor;  // [B, n, columns]
  Dtype dtype;

  int64_t columns() const { return tensor.size(2); }

  const char* example(int64_t index) const {
    return static_cast<const char*>(tensor.const_data_ptr()) +
           index * tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
  }

  Tensor view(int64_t index, int64_t first, int64_t rows) const {
    const int64_t offset = first * tensor.stride(1) * static_cast<int64_t>(tensor.element_size());
    return matrix(example(index) + offset, tensor.scalar_type(), rows, columns(), tensor.stride(1),
                  tensor.stride(2));
  }

  // Copies rows [begin, end) of the concatenated examples to contiguous memory of the wide type.
  void gather(const Ints& order, int64_t first_example, int64_t begin, int64_t end,
              void* out) const {
    const int64_t n = tensor.size(1);
    const ScalarType wide = wide_type(dtype);
    const int64_t bytes = wide == ScalarType::Double ? 8 : 4;
    char* target = static_cast<char*>(out);
    for (int64_t row = begin; row < end;) {
      const int64_t example = row / n;
      const int64_t stop = std::min(end, (example + 1) * n);
      Tensor copy = matrix(target, wide, stop - row, columns(), columns(), 1);
      torch::stable::copy_(copy,
                           view(order[first_example + example], row - example * n, stop - row));
      target += (stop - row) * columns() * bytes;
      row = stop;
    }
  }
};

// One environment after the other: W by the library's GEMM, in chunks of rows that stay in cache.
void accumulate_by_chunks(const Rows& activations, const Rows& grad_outputs, const Groups& groups,
                          const MomentMatrices& moments, int64_t count, const Weights& weights) {
  const ScalarType wide = wide_type(activations.dtype);
  const Dtype wide_dtype = wide == ScalarType::Double ? Dtype::float64 : Dtype::float32;
  const int64_t bytes = wide == ScalarType::Double ? 8 : 4;
  const int64_t in = activations.columns(), out = grad_outputs.columns();
  const int64_t n = activations.tensor.size(1);
  const int64_t chunk = std::min(out, std::max<int64_t>(1, kWeightChunk / in));
  const int64_t most_rows = std::max<int64_t>(1, kRowChunk / (in + out));
  int64_t needed = 0;
  for (int64_t e = 0; e < groups.environments(); ++e) {
    needed = std::max(needed, (groups.offsets[e + 1] - groups.offsets[e]) * n);
  }
  needed = std::min(needed, most_rows);
  char* const memory = static_cast<char*>(scratch((chunk * in + needed * (in + out)) * bytes));
  char* const left = memory + chunk * in * bytes;
  char* const right = left + needed * out * bytes;
  for (int64_t e = 0; e < groups.environments(); ++e) {
    const int64_t begin = groups.offsets[e];
    const int64_t rows = (groups.offsets[e + 1] - begin) * n;
    const double* const factor = weights.empty() ? nullptr : &weights[e];
    for (int64_t first = 0; first < out; first += chunk) {
      const int64_t height = std::min(chunk, out - first);
      const Tensor weight = matrix(memory, wide, height, in, in, 1);
      for (int64_t row = 0; row < rows; row += needed) {
        const int64_t size = std::min(needed, rows - row);
        if (first == 0 || rows > needed) {
          grad_outputs.gather(groups.order, begin, row, row + size, left);
          activations.gather(groups.order, begin, row, row + size, right);
        }
        multiply(matrix(left + first * bytes, wide, height, size, 1, out),
                 matrix(right, wide, size, in, in, 1), row ? 1 : 0, weight);
      }
      if (rows == 0) std::fill(memory, memory + height * in * bytes, 0);
      add_environment(moments, wide_dtype, memory, first, height, count + e, factor);
    }
  }
}

Dtype check_operands(const char* op, const Tensor& activations, const Tensor& grad_outputs) {
  const Dtype dtype = check_dtype(op, "activations", activations);
  if (grad_outputs.scalar_type() != activations.scalar_type()) {
    fail(op, "expected grad_outputs of dtype ",
         torch::headeronly::toString(activations.scalar_type()), ", as activations has, but got ",
         torch::headeronly::toString(grad_outputs.scalar_type()));
  }
  check(grad_outputs.size(0) == activations.size(0), op, "expected grad_outputs of ",
        activations.size(0), " examples (dim 0), as activations has, but got ",
        grad_outputs.size(0));
  return dtype;
}

void accumulate_outer_cpu(Tensor sum, Moment votes, Moment squares, Moment logs, Tensor activations,
                          Tensor grad_outputs, Moment order, Moment offsets, int64_t count,
                          Weights weights) {
  const char* const op = "andmask::accumulate_outer_";
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
  const Groups groups = read_groups(op, activations.size(0), order, offsets);
  check_weights(op, weights, groups.environments());
  const MomentMatrices moments =
      check_moments(op, sum, votes, squares, logs, {grad_outputs.size(2), activations.size(2)},
                    dtype, count, groups.environments());
  if (moments.rows * moments.columns == 0) return;
  accumulate_by_chunks({activations, dtype}, {grad_outputs, dtype}, groups, moments, count,
                       weights);
}

// ---- convolutions ----

struct Convolution {
  int64_t dims, groups, channels, kernel_size, out_size;
  Ints in, out, kernel, stride, padding, dilation;
};

Convolution check_convolution(const char* op, const Tensor& sum, const Tensor& activations,
                              const Tensor& grad_outputs, const Ints& stride, const Ints& padding,
                              const Ints& dilation, int64_t groups) {
  Convolution conv{};
  conv.dims = activations.dim() - 2;
  if (conv.dims < 1 || conv.dims > 3) {
    fail(op, "expected activations of shape (examples, channels, 1 to 3 spatial dims), but got ",
         shape_text(activations));
  }
  if (grad_outputs.dim() != activations.dim()) {
    fail(op, "expected grad_outputs of ", activations.dim(), " dims, as activations has, but got ",
         shape_text(grad_outputs));
  }
  if (sum.dim() != activations.dim()) {
    fail(op, "expected sum of ", activations.dim(), " dims, as activations has, but got ",
         shape_text(sum));
  }
  const auto check_ints = [&](const char* name, const Ints& values, int64_t least) {
    check(static_cast<int64_t>(values.size()) == conv.dims, op, "expected ", name, " of ",
          conv.dims, " ints, one for each spatial dim, but got ", values.size());
    for (int64_t value : values) {
      check(value >= least, op, "expected ", name, " of at least ", least, ", but got ", value);
    }
  };
  check_ints("stride", stride, 1);
  check_ints("padding", padding, 0);
  check_ints("dilation", dilation, 1);
  check(groups >= 1 && activations.size(1) % groups == 0 && grad_outputs.size(1) % groups == 0, op,
        "expected groups that divide ", activations.size(1), " channels and ", grad_outputs.size(1),
        " outputs, but got ", groups);
  conv.groups = groups;
  conv.channels = activations.size(1) / groups;
  conv.kernel_size = conv.out_size = 1;
  for (int64_t dim = 0; dim < conv.dims; ++dim) {
    const int64_t in = activations.size(dim + 2), kernel = sum.size(dim + 2);
    check(kernel >= 1, op, "expected sum with a kernel of at least 1, but got ", kernel);
    const int64_t span = in + 2 * padding[dim] - dilation[dim] * (kernel - 1) - 1;
    const int64_t out = span >= 0 ? span / stride[dim] + 1 : 0;
    check(grad_outputs.size(dim + 2) == out, op, "expected grad_outputs of size ", out, " in dim ",
          dim + 2, ", but got ", grad_outputs.size(dim + 2));
    conv.in.push_back(in);
    conv.out.push_back(out);
    conv.kernel.push_back(kernel);
    conv.kernel_size *= kernel;
    conv.out_size *= out;
  }
  conv.stride = stride;
  conv.padding = padding;
  conv.dilation = dilation;
  return conv;
}

// columns[position, channel, kernel offset] of one example and group; `image` is contiguous.
template <typename F>
void unfold(const Convolution& conv, const F* image, F* columns) {
  int64_t plane = 1;
  for (int64_t size : conv.in) plane *= size;
  for (int64_t position = 0; position < conv.out_size; ++position) {
    for (int64_t channel = 0; channel < conv.channels; ++channel) {
      for (int64_t offset = 0; offset < conv.kernel_size; ++offset) {
        int64_t rest = position, step = offset, at = 0, scale = 1;
        bool inside = true;
        for (int64_t dim = conv.dims - 1; dim >= 0; --dim) {
          const int64_t x = rest % conv.out[dim] * conv.stride[dim] - conv.padding[dim] +
                            step % conv.kernel[dim] * conv.dilation[dim];
          inside = inside && x >= 0 && x < conv.in[dim];
          at += x * scale;
          scale *= conv.in[dim];
          rest /= conv.out[dim];
          step /= conv.kernel[dim];
        }
        *columns++ = inside ? image[channel * plane + at] : F(0);
      }
    }
  }
}

template <typename F>
void accumulate_unfolded(const Convolution& conv, const Tensor& activations,
                         const Tensor& grad_outputs, const Groups& groups,
                         const MomentMatrices& moments, int64_t count, const Weights& weights) {
  const bool is_double = sizeof(F) == sizeof(double);
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  const int64_t height = moments.rows / conv.groups;
  std::vector<F> columns(conv.out_size * moments.columns), weight(height * moments.columns);
  for (int64_t e = 0; e < groups.environments(); ++e) {
    for (int64_t g = 0; g < conv.groups; ++g) {
      std::fill(weight.begin(), weight.end(), F(0));
      for (int64_t i = groups.offsets[e]; i < groups.offsets[e + 1] && conv.out_size; ++i) {
        const auto example = [&](const Tensor& tensor, int64_t channels) {
          const Tensor one = torch::stable::select(tensor, 0, groups.order[i]);
          Tensor part = torch::stable::narrow(const_cast<Tensor&>(one), 0, g * channels, channels);
          return torch::stable::contiguous(torch::stable::to(part, wide));
        };
        const Tensor image = example(activations, conv.channels);
        const Tensor grad = example(grad_outputs, height);
        unfold(conv, static_cast<const F*>(image.const_data_ptr()), columns.data());
        multiply(matrix(grad.const_data_ptr(), wide, height, conv.out_size, conv.out_size, 1),
                 matrix(columns.data(), wide, conv.out_size, moments.columns, moments.columns, 1),
                 1, matrix(weight.data(), wide, height, moments.columns, moments.columns, 1));
      }
      add_environment(moments, is_double ? Dtype::float64 : Dtype::float32, weight.data(),
                      g * height, height, count + e, weights.empty() ? nullptr : &weights[e]);
    }
  }
}

void accumulate_convolution_cpu(Tensor sum, Moment votes, Moment squares, Moment logs,
                                Tensor activations, Tensor grad_outputs, Moment order,
                                Moment offsets, int64_t count, Ints stride, Ints padding,
                                Ints dilation, int64_t groups, Weights weights) {
  const char* const op = "andmask::accumulate_convolution_";
  const Convolution conv =
      check_convolution(op, sum, activations, grad_outputs, stride, padding, dilation, groups);
  const Dtype dtype = check_operands(op, activations, grad_outputs);
  const Groups environments = read_groups(op, activations.size(0), order, offsets);
  check_weights(op, weights, environments.environments());
  Ints shape = {grad_outputs.size(1), conv.channels};
  for (int64_t size : conv.kernel) shape.push_back(size);
  const MomentMatrices moments = check_moments(op, sum, votes, squares, logs, shape, dtype, count,
                                               environments.environments());
  if (moments.rows * moments.columns == 0) return;
  const auto run =
      dtype == Dtype::float64 ? accumulate_unfolded<double> : accumulate_unfolded<float>;
  run(conv, activations, grad_outputs, environments, moments, count, weights);
}

}  // namespace
}  // namespace andmask

STABLE_TORCH_LIBRARY_IMPL(andmask, CPU, m) {
  m.impl("accumulate_outer_", TORCH_BOX(&andmask::accumulate_outer_cpu));
  m.impl("accumulate_convolution_", TORCH_BOX(&andmask::accumulate_convolution_cpu));
}
