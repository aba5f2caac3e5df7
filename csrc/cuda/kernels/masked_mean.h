// Kernel bodies of masked_mean and agreement_mask. Sums are taken in the order of math/agreement.h,
// so that results have the bits of the CPU's.
#pragma once

#include "../../math/agreement.h"
#include "../../tasks/masked_mean.h"
#include "thread.h"

#include <type_traits>

namespace andmask {

// The number of rows whose loads a thread has in flight at once, 16 bytes each.
constexpr int kRowsInFlight = 8;
static_assert(kRowsInFlight % kSumRows == 0);

// The sum and the votes of one group of environments in `width` columns.
template <typename T, int width>
struct GroupSum {
  accumulate_t<T> sum[width] = {};
  int32_t votes[width] = {};

  template <int rows>
  ANDMASK_METHOD void add(const Pack<T, width>* packs) {
    static_assert(rows <= kSumRows);
#pragma unroll
    for (int column = 0; column < width; ++column) {
      accumulate_t<T> part = 0;
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        const accumulate_t<T> grad = widen(packs[row][column]);
        part += grad;
        votes[column] += static_cast<int32_t>(sign(grad));
      }
      sum[column] += part;
    }
  }

  template <int rows>
  ANDMASK_METHOD void load_and_add(const T* grads, int64_t stride) {
    Pack<T, width> packs[rows];
#pragma unroll
    for (int row = 0; row < rows; ++row) packs[row] = load<width>(grads + row * stride);
    if constexpr (rows <= kSumRows) {
      add<rows>(packs);
    } else {
#pragma unroll
      for (int row = 0; row < rows; row += kSumRows) add<kSumRows>(packs + row);
    }
  }

  ANDMASK_METHOD void add_rows(const T* grads, int64_t stride, int64_t rows) {
    for (; rows >= kRowsInFlight; rows -= kRowsInFlight, grads += kRowsInFlight * stride) {
      load_and_add<kRowsInFlight>(grads, stride);
    }
    if (rows >= kSumRows) {
      load_and_add<kSumRows>(grads, stride);
      rows -= kSumRows;
      grads += kSumRows * stride;
    }
    switch (rows) {
      case 3: return load_and_add<3>(grads, stride);
      case 2: return load_and_add<2>(grads, stride);
      case 1: return load_and_add<1>(grads, stride);
      default: return;
    }
  }
};

ANDMASK_INLINE int64_t sum_groups(int64_t environments) {
  return (environments + kSumGroup - 1) / kSumGroup;
}

ANDMASK_INLINE int64_t group_rows(int64_t environments, int64_t group) {
  const int64_t rest = environments - group * kSumGroup;
  return rest < kSumGroup ? rest : kSumGroup;
}

// Calls f(column, width) for the items of a thread: packs of `width` columns, and then single ones.
template <int width, typename F>
ANDMASK_INLINE void for_packs(const ThreadIndex& index, int threads, int64_t columns, const F& f) {
  const int64_t packs = columns / width;
  const int64_t items = packs + columns % width;
  for (int64_t item = index.in_grid(threads); item < items; item += index.blocks * threads) {
    if (item < packs) {
      f(item * width, std::integral_constant<int, width>());
    } else {
      f(packs * width + (item - packs), std::integral_constant<int, 1>());
    }
  }
}

ANDMASK_INLINE int64_t pack_items(int64_t columns, int width) {
  return columns / width + columns % width;
}

// Writes the output of the task, and returns the number of columns that are kept.
template <typename T, int width>
ANDMASK_INLINE int32_t write_columns(const MaskedMeanTask& task, int64_t column, const double* sums,
                                     const int32_t* votes) {
  using F = accumulate_t<T>;
  const double count = static_cast<double>(task.environments);
  const double inverse = 1.0 / count;
  int32_t kept = 0;
  bool keep[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    keep[i] = agrees(votes[i], task.threshold);
    kept += keep[i];
  }
  if (task.output == Output::masked_mean) {
    Pack<T, width> out;
#pragma unroll
    for (int i = 0; i < width; ++i) out[i] = masked_mean_of<T>(sums[i], count, inverse, keep[i]);
    store(static_cast<T*>(task.out) + column, out);
  } else {
    Pack<F, width> out;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      out[i] = task.output == Output::mask ? (keep[i] ? F(1) : F(0))
                                           : masked_mean_of<F>(sums[i], count, inverse, keep[i]);
    }
    store(static_cast<F*>(task.out) + column, out);
  }
  return kept;
}

// A thread takes all environments of its columns.
template <typename T, int width_>
struct MaskedMeanBody {
  static constexpr int kThreads = 128;
  using Total = double;

  MaskedMeanTask task;
  double* kept;  // [blocks]; null: not wanted

  ANDMASK_METHOD double operator()(const ThreadIndex& index) const {
    double total = 0;
    for_packs<width_>(index, kThreads, task.columns, [&](int64_t column, auto size) {
      constexpr int width = size();
      double sums[width] = {};
      int32_t votes[width] = {};
      for (int64_t group = 0; group < sum_groups(task.environments); ++group) {
        GroupSum<T, width> part;
        part.add_rows(static_cast<const T*>(task.grads) + group * kSumGroup * task.stride + column,
                      task.stride, group_rows(task.environments, group));
#pragma unroll
        for (int i = 0; i < width; ++i) {
          sums[i] = group == 0 ? static_cast<double>(part.sum[i])
                               : sums[i] + static_cast<double>(part.sum[i]);
          votes[i] += part.votes[i];
        }
      }
      total += write_columns<T, width>(task, column, sums, votes);
    });
    return total;
  }

  ANDMASK_METHOD void finish(int64_t block, double total) const {
    if (kept) kept[block] = total;
  }
};

// If there are few columns, threads share the groups of environments too. Each group stores its sum
// and votes, which JoinGroupsBody adds in their order.
template <typename T, int width_>
struct GroupSumsBody {
  static constexpr int kThreads = 128;

  MaskedMeanTask task;
  int64_t blocks_per_group;
  accumulate_t<T>* sums;  // [groups, columns]
  int8_t* votes;          // [groups, columns]

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
    const int64_t group = index.block / blocks_per_group;
    const ThreadIndex inner{index.block % blocks_per_group, blocks_per_group, index.thread};
    for_packs<width_>(inner, kThreads, task.columns, [&](int64_t column, auto size) {
      constexpr int width = size();
      GroupSum<T, width> part;
      part.add_rows(static_cast<const T*>(task.grads) + group * kSumGroup * task.stride + column,
                    task.stride, group_rows(task.environments, group));
      // Columns need not be a whole number of packs: rows of the scratch are not aligned.
#pragma unroll
      for (int i = 0; i < width; ++i) {
        sums[group * task.columns + column + i] = part.sum[i];
        votes[group * task.columns + column + i] = static_cast<int8_t>(part.votes[i]);
      }
    });
  }
};

template <typename T>
struct JoinGroupsBody {
  static constexpr int kThreads = 128;
  using Total = double;

  MaskedMeanTask task;
  const accumulate_t<T>* sums;
  const int8_t* votes;
  double* kept;

  ANDMASK_METHOD double operator()(const ThreadIndex& index) const {
    double total = 0;
    for (int64_t column = index.in_grid(kThreads); column < task.columns;
         column += index.blocks * kThreads) {
      double sum = static_cast<double>(sums[column]);
      int32_t vote = votes[column];
      for (int64_t group = 1; group < sum_groups(task.environments); ++group) {
        sum += static_cast<double>(sums[group * task.columns + column]);
        vote += votes[group * task.columns + column];
      }
      total += write_columns<T, 1>(task, column, &sum, &vote);
    }
    return total;
  }

  ANDMASK_METHOD void finish(int64_t block, double total) const {
    if (kept) kept[block] = total;
  }
};

// out = wide * factor, rounded.
template <typename T, int width_>
struct ScaleBody {
  static constexpr int kThreads = 256;

  const void* wide;  // accumulate_t<T>
  const double* factor;
  void* out;  // T
  int64_t columns;

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
    using F = accumulate_t<T>;
    const double by = *factor;
    for_packs<width_>(index, kThreads, columns, [&](int64_t column, auto size) {
      constexpr int width = size();
      const auto from = load<width>(static_cast<const F*>(wide) + column);
      Pack<T, width> to;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        to[i] = Rounder<T>::from(static_cast<double>(from[i]) * by);
      }
      store(static_cast<T*>(out) + column, to);
    });
  }
};

}  // namespace andmask
