#pragma once

#include <algorithm>
#include <cstdint>

#include "moments.h"

namespace andmask {

// One spatial dimension of an input over which a window of `taps` slides. The default is no
// dimension.
struct WindowAxis {
  int64_t size = 1;       // of the input
  int64_t stride = 0;     // elements from one place of the input to the next
  int64_t positions = 1;  // of the window
  int64_t taps = 1;       // of the kernel
  int64_t step = 1;       // of the window, in places: the stride of a convolution
  int64_t padding = 0;    // zeros before the first place
  int64_t dilation = 1;
};

constexpr int kWindowAxes = 3;

// Rows of a matrix that is never stored (im2col). An example has a row for every position of the
// window, with the last axis running fastest. A row has a column for every channel and tap. With
// one tap, as in grad_outputs, columns are channels.
struct RowSource {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t example_stride = 0;
  int64_t channels = 1;
  int64_t channel_stride = 1;
  WindowAxis axes[kWindowAxes];

  int64_t rows() const { return axes[0].positions * axes[1].positions * axes[2].positions; }
  int64_t taps() const { return axes[0].taps * axes[1].taps * axes[2].taps; }
};

// The rows of a tensor [examples, rows, columns] in any strides: the operand of a linear layer.
inline RowSource matrix_rows(const void* data, Dtype dtype, int64_t example_stride, int64_t rows,
                             int64_t row_stride, int64_t columns, int64_t column_stride) {
  RowSource source{data, dtype, example_stride, columns, column_stride, {}};
  source.axes[kWindowAxes - 1].size = rows;
  source.axes[kWindowAxes - 1].stride = row_stride;
  source.axes[kWindowAxes - 1].positions = rows;
  return source;
}

// The place of an output, a channel and a tap in each array of moments.
struct OuterLayout {
  int64_t output_stride;
  int64_t channel_stride = 1;
  int64_t tap_strides[kWindowAxes] = {0, 0, 0};
};

struct OuterTask {
  RowSource activations;
  RowSource grad_outputs;  // channels: outputs; positions along each axis as in `activations`
  const int64_t* order = nullptr;    // examples, one environment after the other; null: as they lie
  const int64_t* offsets = nullptr;  // [environments + 1]: where an environment begins in `order`
  int64_t environments = 0;
  const double* weights =
      nullptr;        // [environments]; multiply W_e, but not before it votes. Null: 1
  int64_t count = 0;  // environments added before; 0: what the moments hold is ignored
  MomentArrays moments = {};
  OuterLayout layout = {};
  // The groups of a convolution. Both sources describe the first group; the other groups follow in
  // them, and in the outputs of the moments.
  int64_t groups = 1;
};

// The number of environments does not tell: an empty one makes up for one of two examples.
inline bool has_one_example_each(const OuterTask& task) {
  for (int64_t e = 0; e < task.environments; ++e) {
    if (task.offsets[e] != e) return false;
  }
  return task.offsets[task.environments] == task.environments;
}

// True if each environment is one row, which the sources hold as it is.
inline bool has_single_rows(const OuterTask& task) {
  const auto* const axes = task.activations.axes;
  return task.groups == 1 && has_one_example_each(task) &&
         std::all_of(axes, axes + kWindowAxes, [](const WindowAxis& axis) {
           return axis.positions == 1 && axis.taps == 1 && axis.padding == 0;
         });
}

void run(const Cpu& cpu, const OuterTask& task);
void run(const Stream& stream, const OuterTask& task);

}  // namespace andmask
