#include "sign_outer.h"

#include <algorithm>
#include <vector>

#include "../../math/scalar.h"
#include "kernels/sign_outer.h"
#include "plan.h"

namespace andmask {
namespace {

constexpr int64_t kScratch = int64_t{4} << 20;

int64_t panels_of(int64_t columns) { return (columns + kSignPanel - 1) / kSignPanel; }

int64_t packed_bytes(int64_t environments, int64_t columns) {
  return panels_of(columns) * kSignPanel * ((environments + kSignGroup - 1) / kSignGroup);
}

// Calls body(begin, end) for the shares of `count` that `threads` take.
template <typename Body>
void in_shares(int64_t count, int64_t threads, const ParallelFor& parallel_for, const Body& body) {
  const int64_t shares = std::min(count, threads);
  parallel_for(shares,
               [&](int64_t share) { body(count * share / shares, count * (share + 1) / shares); });
}

// Returns the rows from example `begin` on.
RowSource rows_from(const RowSource& source, int64_t begin) {
  RowSource rows = source;
  rows.data = static_cast<const char*>(source.data) +
              begin * source.example_stride * item_size(source.dtype);
  return rows;
}

// ---- the sums ----

template <typename T>
void scale_rows(const RowSource& source, const double* weights, int64_t begin, int64_t end,
                accumulate_t<T>* scaled) {
  const T* const values = static_cast<const T*>(source.data);
  for (int64_t row = begin; row < end; ++row) {
    const auto weight = static_cast<accumulate_t<T>>(weights[row]);
    const T* const from = values + row * source.example_stride;
    accumulate_t<T>* const to = scaled + row * source.channels;
    for (int64_t i = 0; i < source.channels; ++i) {
      to[i] = widen(from[i * source.channel_stride]) * weight;
    }
  }
}

void scale_rows(const RowSource& source, const double* weights, int64_t begin, int64_t end,
                void* scaled) {
  switch (source.dtype) {
    case Dtype::float16:
      return scale_rows<Half>(source, weights, begin, end, static_cast<float*>(scaled));
    case Dtype::bfloat16:
      return scale_rows<BFloat16>(source, weights, begin, end, static_cast<float*>(scaled));
    case Dtype::float32:
      return scale_rows<float>(source, weights, begin, end, static_cast<float*>(scaled));
    default: return scale_rows<double>(source, weights, begin, end, static_cast<double*>(scaled));
  }
}

// Adds up `rows` examples as one environment. Weights scale the narrower operand.
struct Product {
  const OuterTask& task;
  Isa isa;
  int64_t threads;
  const ParallelFor& parallel_for;

  bool scales_activations() const { return task.activations.channels < task.grad_outputs.channels; }
  const RowSource& scaled_source() const {
    return scales_activations() ? task.activations : task.grad_outputs;
  }
  Dtype wide() const {
    return scaled_source().dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  }
  int64_t row_bytes() const { return scaled_source().channels * item_size(wide()); }

  // `scaled`: memory for the scaled rows.
  void add(int64_t begin, int64_t rows, const double* weights, bool first, void* scaled) const {
    OuterTask product = task;
    const int64_t offsets[] = {0, rows};
    product.order = nullptr;
    product.offsets = offsets;
    product.environments = 1;
    product.weights = nullptr;
    product.count = first ? 0 : 1;
    product.moments.votes = nullptr;
    product.moments.voters = nullptr;
    product.activations = rows_from(task.activations, begin);
    product.grad_outputs = rows_from(task.grad_outputs, begin);
    if (weights) {
      RowSource& source = scales_activations() ? product.activations : product.grad_outputs;
      in_shares(rows, threads, parallel_for, [&](int64_t from, int64_t to) {
        scale_rows(source, weights + begin, from, to, scaled);
      });
      source = matrix_rows(scaled, wide(), source.channels, 1, 0, source.channels, 1);
    }
    accumulate_outer_tiles(product, isa, threads, parallel_for);
  }
};

// ---- the votes ----

struct SignVotes {
  const OuterTask& task;
  const SignOuterKernels& kernels;
  int64_t threads;
  const ParallelFor& parallel_for;

  void add(int64_t begin, int64_t rows, bool first, uint8_t* activations,
           uint8_t* grad_outputs) const {
    const int64_t inputs = task.activations.channels, outputs = task.grad_outputs.channels;
    const int64_t input_panels = panels_of(inputs);
    const auto pack = [&](const RowSource& source, int64_t from, int64_t to, uint8_t* packed) {
      const SignMatrix matrix{rows_from(source, begin).data, rows, source.channels,
                              source.example_stride, source.channel_stride};
      kernels.pack[static_cast<int>(source.dtype)](matrix, from, to, packed);
    };
    const int64_t groups = (rows + kSignGroup - 1) / kSignGroup;
    in_shares(groups, threads, parallel_for, [&](int64_t from, int64_t to) {
      pack(task.activations, from, to, activations);
      pack(task.grad_outputs, from, to, grad_outputs);
    });
    const auto vote = [&](void* votes) {
      const SignOuterTask signs{activations,
                                grad_outputs,
                                rows,
                                inputs,
                                outputs,
                                first,
                                votes,
                                task.moments.vote_bytes,
                                task.layout.output_stride};
      const int64_t blocks = (input_panels + kSignPanels - 1) / kSignPanels;
      in_shares(blocks * panels_of(outputs), threads, parallel_for, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const int64_t panel = i % blocks * kSignPanels;
          kernels.vote(signs, i / blocks, panel, std::min(panel + kSignPanels, input_panels));
        }
      });
    };
    vote(task.moments.votes);
    if (!task.moments.voters) return;
    // The voters are the votes of the sizes: what is negative becomes positive.
    const auto take_sizes = [&](uint8_t* packed, int64_t columns) {
      const int64_t bytes = packed_bytes(rows, columns);
      for (int64_t i = 0; i < bytes; ++i) {
        packed[i] = static_cast<uint8_t>((packed[i] | packed[i] >> 4) & 15);
      }
    };
    take_sizes(activations, inputs);
    take_sizes(grad_outputs, outputs);
    vote(task.moments.voters);
  }
};

}  // namespace

void accumulate_sign_outer(const OuterTask& task, Isa isa, int64_t threads,
                           const ParallelFor& parallel_for) {
  const Product sums{task, isa, threads, parallel_for};
  const SignVotes votes{task, sign_outer_kernels(isa), threads, parallel_for};
  const int64_t inputs = task.activations.channels, outputs = task.grad_outputs.channels;
  // The order of the environments does not matter, except that each must meet its own weight.
  std::vector<double> weights;
  if (task.weights) {
    weights.resize(task.environments);
    for (int64_t e = 0; e < task.environments; ++e) {
      weights[task.order ? task.order[e] : e] = task.weights[e];
    }
  }
  // The loop takes as many environments at a time as the scratch holds.
  const int64_t scaled_bytes = task.weights ? sums.row_bytes() : 0;
  const int64_t bytes = scaled_bytes + (inputs + outputs) / kSignGroup + 1;
  const int64_t blocks = std::max<int64_t>(1, kScratch / bytes / kSignBlock);
  const int64_t most = std::min(task.environments, blocks * kSignBlock);
  const int64_t pieces[] = {packed_bytes(most, inputs), packed_bytes(most, outputs),
                            most * scaled_bytes};
  int64_t total = 0;
  for (int64_t piece : pieces) total += OuterScratch::rounded(piece);
  thread_local OuterScratch scratch;
  scratch.reserve(total);
  auto* const activations = scratch.take<uint8_t>(pieces[0]);
  auto* const grad_outputs = scratch.take<uint8_t>(pieces[1]);
  auto* const scaled = scratch.take<char>(pieces[2]);
  for (int64_t begin = 0; begin < task.environments; begin += most) {
    const int64_t rows = std::min(most, task.environments - begin);
    const bool first = task.count + begin == 0;
    sums.add(begin, rows, task.weights ? weights.data() : nullptr, first, scaled);
    if (task.moments.votes) votes.add(begin, rows, first, activations, grad_outputs);
  }
}

}  // namespace andmask
