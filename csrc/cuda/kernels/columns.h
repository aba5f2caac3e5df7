// Kernel bodies of the rules on stacked gradients that add up over the environments, in the order
// of the CPU kernels, so that results have the same bits.
//
// A thread goes over all environments of its columns. With few columns and many environments that
// leaves much of a GPU idle, but threads cannot share sums that are taken one after the other.
#pragma once

#include "../../math/columns.h"
#include "../../tasks/aggregate.h"
#include "moments.h"
#include "updates.h"

namespace andmask {

constexpr int kColumnThreads = 128;

// The gradients of a task.
struct ColumnGrads {
  const void* grads;  // [environments, columns]; a row is contiguous
  int64_t environments;
  int64_t stride;
  int64_t columns;
  bool packed;  // all rows, of all arrays of the task, may be moved in packs
};

// Calls f(at) for the columns of a thread, `width` at a time: PackedElements, or SpacedElements
// where rows are not aligned or end. All threads of a block get the same kind. `ordered`: a thread
// gets the same columns in both cases, because the order of its additions shows in the result.
template <int width, typename F>
ANDMASK_INLINE void for_columns(const ColumnGrads& task, const ThreadIndex& index, bool ordered,
                                const F& f) {
  constexpr int64_t tile = kColumnThreads * width;
#pragma unroll 1
  for (int64_t begin = index.block * tile; begin < task.columns; begin += index.blocks * tile) {
    if (task.packed && begin + tile <= task.columns) {
      f(PackedElements<width>{begin + index.thread * width});
    } else {
      const int64_t first = begin + index.thread * (ordered ? width : 1);
      const int64_t rest = task.columns - first;
      f(SpacedElements<width>{first, ordered ? 1 : kColumnThreads,
                              static_cast<int>(rest < tile ? rest : tile)});
    }
  }
}

// Calls f(first row, packs, rows) for all rows, `rows_` at a time, with their loads in flight
// together. The last call has only `rows` rows.
template <int rows_, int width, typename T, typename At, typename F>
ANDMASK_INLINE void for_rows(const ColumnGrads& task, const At& at, const F& f) {
  const T* grads = static_cast<const T*>(task.grads);
#pragma unroll 1
  for (int64_t row = 0; row < task.environments; row += rows_, grads += rows_ * task.stride) {
    const int64_t rest = task.environments - row;
    const int rows = rest < rows_ ? static_cast<int>(rest) : rows_;
    Pack<T, width> packs[rows_] = {};
#pragma unroll
    for (int i = 0; i < rows_; ++i) {
      if (i < rows) packs[i] = at.template get<T>(grads + i * task.stride);
    }
    f(row, packs, rows);
  }
}

// ---- rules on moments ----

// The moments that a rule needs beside the sum and the votes, which are always taken.
template <typename Rule>
constexpr unsigned kFurther = Rule::kMoments & (kSquares | kLogs);

// The moments of groups of environments, joined in float64 as on the CPU. Votes need no groups.
template <unsigned further, typename F, int width>
struct JoinedMoments {
  double sum[width] = {};
  double squares[width] = {};
  double logs[width] = {};

  // Joins `rows` environments to `before` others, and lets the next group begin.
  ANDMASK_METHOD void join(MomentsOf<F, width>& group, int64_t before, int64_t rows) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const double more = static_cast<double>(group.sum[i]);
      if constexpr ((further & kSquares) != 0) {
        const double deviations = static_cast<double>(group.squares[i]);
        squares[i] = before == 0 ? deviations
                                 : join_squares(squares[i], sum[i], static_cast<double>(before),
                                                deviations, more, static_cast<double>(rows));
        group.squares[i] = 0;
      }
      if constexpr ((further & kLogs) != 0) {
        const double log = static_cast<double>(group.logs[i]);
        logs[i] = before == 0 ? log : logs[i] + log;
      }
      sum[i] = before == 0 ? more : sum[i] + more;  // 0 + -0 would be 0
    }
  }

  ANDMASK_METHOD Sums<F> sums(int32_t votes, const RuleCall& call, int i) const {
    return {static_cast<F>(sum[i]),     votes,
            call.environments,          call.threshold,
            static_cast<F>(squares[i]), static_cast<F>(logs[i])};
  }
};

// One kernel has all rules that need the same further moments.
template <typename T, unsigned further>
struct MomentRuleBody {
  static constexpr int kThreads = kColumnThreads;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWidth = kPackSize<T>;
  static constexpr int kInFlight = further == 0 ? 8 : 4;  // environments
  using F = accumulate_t<T>;
  using Total = double;

  ColumnGrads task;
  RuleCall call;
  void* out;      // T, or F if there are totals to scale by
  double* parts;  // [blocks]: totals of the factors; null: not wanted

  ANDMASK_METHOD double operator()(const ThreadIndex& index) const {
    double total = 0;
    for_columns<kWidth>(task, index, parts != nullptr, [&](const auto& at) {
      MomentsOf<F, kWidth> moments;  // sums of a group, votes of all
      JoinedMoments<further, F, kWidth> joined;
      static_assert(kJoinedRows % kInFlight == 0);
      for_rows<kInFlight, kWidth, T>(task, at, [&](int64_t row, const auto* packs, int rows) {
        const int64_t first = row / kJoinedRows * kJoinedRows;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (i < rows) add(packs[i], row - first + i, moments);
        }
        const int64_t end = row + rows;
        if (end == first + kJoinedRows || end == task.environments) {
          joined.join(moments, first, end - first);
        }
      });
      Pack<F, kWidth> updates{};
      call.rules.with(call.rule, [&](const auto& rule) {
        if constexpr (kFurther<std::remove_cvref_t<decltype(rule)>> == further) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const Aggregate<F> aggregate = rule(joined.sums(moments.votes[i], call, i));
            // The factor multiplies; it never selects: a value that is not finite shows as NaN.
            updates[i] = aggregate.factor * aggregate.value;
            if (at.has(i)) total += static_cast<double>(aggregate.factor);
          }
        }
      });
      if (parts) return at.put(static_cast<F*>(out), updates);
      Pack<T, kWidth> rounded;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        rounded[i] = Rounder<T>::from(static_cast<double>(updates[i]));
      }
      at.put(static_cast<T*>(out), rounded);
    });
    return total;
  }

  ANDMASK_METHOD void finish(int64_t block, double total) const {
    if (parts) parts[block] = total;
  }

  // Adds one environment after `count` others.
  ANDMASK_INLINE void add(const Pack<T, kWidth>& grads, int64_t count,
                          MomentsOf<F, kWidth>& moments) {
    // These pointers are only compared with null, to tell which moments are kept.
    F* const kept = moments.sum;
    const MomentArrays arrays{kept, kept, 0, (further & kSquares) != 0 ? kept : nullptr,
                              (further & kLogs) != 0 ? kept : nullptr};
    moments.add(grads, arrays, count, F(1));
  }
};

// ---- rules on sums of terms ----

// As on the CPU, this many terms are summed in the type of the gradients, and those sums in
// float64.
constexpr int kTermRows = 4;

// The kept coordinates of a rule that fills the others.
struct KeptTotal {
  double size;   // sum of absolute values
  double count;  // a whole number

  ANDMASK_METHOD KeptTotal& operator+=(const KeptTotal& other) {
    size += other.size;
    count += other.count;
    return *this;
  }
};

template <typename T, typename Rule>
struct TermRuleBody {
  static constexpr int kThreads = kColumnThreads;
  static constexpr int kMinBlocks = 4;
  // Sums in float64 take many registers: more columns of 16 bits would not fit.
  static constexpr int kWidth = kPackSize<T> < 4 ? kPackSize<T> : 4;
  static constexpr int kSums = Rule::kSums;
  using F = accumulate_t<T>;
  using Total = KeptTotal;

  ColumnGrads task;
  Rule rule;
  const void* noise;  // F
  void* out;          // T, or F of a rule that fills
  KeptTotal* parts;   // [blocks], of a rule that fills

  struct Column {
    double sums[kSums] = {};
    F poison = 0;  // 0, or NaN if any gradient is not finite
  };

  // Adds the terms of one column in the first `rows` rows of a group of environments.
  ANDMASK_METHOD void add(const Pack<T, kWidth>* packs, int rows, int i, Column& column) const {
    F total[kSums] = {};
    F zero = 0;
#pragma unroll
    for (int row = 0; row < kTermRows; ++row) {
      if (row >= rows) continue;
      const F grad = widen(packs[row][i]);
      F term[kSums];
      rule.terms(grad, term);
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) total[sum] += term[sum];
      zero += grad * F(0);
    }
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) column.sums[sum] += static_cast<double>(total[sum]);
    column.poison += zero;
  }

  ANDMASK_METHOD KeptTotal operator()(const ThreadIndex& index) const {
    KeptTotal total{};
    for_columns<kWidth>(task, index, parts != nullptr, [&](const auto& at) {
      Column columns[kWidth];
      for_rows<kTermRows, kWidth, T>(task, at, [&](int64_t, const auto* packs, int rows) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) add(packs, rows, i, columns[i]);
      });
      write(at, columns, total);
    });
    return total;
  }

  template <typename At>
  ANDMASK_METHOD void write(const At& at, const Column* columns, KeptTotal& total) const {
    if constexpr (Rule::kFillsMissing) {
      Pack<F, kWidth> results;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const bool keep = rule.kept(columns[i].sums);
        const double bad = static_cast<double>(columns[i].poison);
        const double value = rule(columns[i].sums, 0) + bad;
        const F wide = Rounder<F>::from(value);
        results[i] = keep || bad != 0 ? wide : missing_value(F());
        if (keep && at.has(i)) total += KeptTotal{value < 0 ? -value : value, 1};
      }
      at.put(static_cast<F*>(out), results);
    } else {
      Pack<F, kWidth> random{};
      if constexpr (Rule::kNoise != Noise::none) random = at.get(static_cast<const F*>(noise));
      Pack<T, kWidth> results;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        results[i] = Rounder<T>::from(rule(columns[i].sums, static_cast<double>(random[i])) +
                                      static_cast<double>(columns[i].poison));
      }
      at.put(static_cast<T*>(out), results);
    }
  }

  ANDMASK_METHOD void finish(int64_t block, const KeptTotal& total) const {
    if constexpr (Rule::kFillsMissing) parts[block] = total;
  }
};

// One block adds the totals of all blocks in a fixed order.
struct MeanSizeBody {
  static constexpr int kThreads = 256;
  using Total = KeptTotal;

  const KeptTotal* parts;
  int64_t count;
  double* size;

  ANDMASK_METHOD KeptTotal operator()(const ThreadIndex& index) const {
    KeptTotal sum{};
    for (int64_t i = index.thread; i < count; i += kThreads) sum += parts[i];
    return sum;
  }

  ANDMASK_METHOD void finish(int64_t, const KeptTotal& total) const {
    *size = total.count > 0 ? total.size / total.count : 0;
  }
};

template <typename T>
struct FillBody {
  static constexpr int kThreads = 256;
  using F = accumulate_t<T>;

  const void* wide;   // F; may be `out`
  const void* noise;  // F
  const double* size;
  void* out;  // T
  int64_t columns;

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
    const double by = *size;
    for (int64_t column = index.in_grid(kThreads); column < columns;
         column += index.blocks * kThreads) {
      const F from = static_cast<const F*>(wide)[column];
      const bool empty = bits_of(from) == bits_of(missing_value(F()));
      const double random = static_cast<double>(static_cast<const F*>(noise)[column]);
      static_cast<T*>(out)[column] =
          Rounder<T>::from(empty ? random * by : static_cast<double>(from));
    }
  }
};

}  // namespace andmask
