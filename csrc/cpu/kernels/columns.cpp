#include "columns.h"

#include "load.h"
#include "ranked.h"

namespace andmask {
namespace {

// ---- rules on sums of terms ----

// Columns of a block. All its arrays together fit into L1, and on the stack of any thread.
constexpr int64_t kBlock = 256;
// Rows that are read together. Their terms are summed in the type of the gradients, and those sums
// in float64.
constexpr int64_t kRows = 4;

template <int rows, typename Rule, typename F>
void add_terms(const Rule& rule, const F* __restrict grads, int64_t stride, int64_t columns,
               double (*__restrict sums)[kBlock], F* __restrict poison) {
  for (int64_t column = 0; column < columns; ++column) {
    F total[Rule::kSums] = {};
    F zero = 0;
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      const F grad = grads[row * stride + column];
      F term[Rule::kSums];
      rule.terms(grad, term);
#pragma GCC unroll 4
      for (int sum = 0; sum < Rule::kSums; ++sum) total[sum] += term[sum];
      zero += grad * F(0);
    }
#pragma GCC unroll 4
    for (int sum = 0; sum < Rule::kSums; ++sum) {
      sums[sum][column] += static_cast<double>(total[sum]);
    }
    poison[column] += zero;
  }
}

template <typename Rule, typename F>
void add_terms(int64_t rows, const Rule& rule, const F* grads, int64_t stride, int64_t columns,
               double (*sums)[kBlock], F* poison) {
  switch (rows) {
    case 1: return add_terms<1>(rule, grads, stride, columns, sums, poison);
    case 2: return add_terms<2>(rule, grads, stride, columns, sums, poison);
    case 3: return add_terms<3>(rule, grads, stride, columns, sums, poison);
    default: return add_terms<kRows>(rule, grads, stride, columns, sums, poison);
  }
}

template <typename T, typename Rule>
void sum_terms(const ColumnTask& task, const Rule& rule, int64_t first, int64_t columns,
               double (*sums)[kBlock], accumulate_t<T>* poison) {
  using F = accumulate_t<T>;
  constexpr bool widen = sizeof(T) != sizeof(F);
  alignas(64) F wide[widen ? kRows * kBlock : 1];
  for (int64_t column = 0; column < columns; ++column) {
    for (int sum = 0; sum < Rule::kSums; ++sum) sums[sum][column] = 0;
    poison[column] = 0;
  }
  for (int64_t row = 0; row < task.environments; row += kRows) {
    const int64_t rows = task.environments - row < kRows ? task.environments - row : kRows;
    const T* const grads = static_cast<const T*>(task.grads) + row * task.stride + first;
    if constexpr (widen) {
      for (int64_t i = 0; i < rows; ++i) {
        widen_columns(grads + i * task.stride, columns, wide + i * kBlock);
      }
      add_terms(rows, rule, wide, kBlock, columns, sums, poison);
    } else {
      add_terms(rows, rule, grads, task.stride, columns, sums, poison);
    }
  }
}

// Adds up in a fixed order, in eight partial sums, so that the loop can be vectorised.
ANDMASK_INLINE double add_up(const double* values, int64_t columns) {
  double partial[8] = {};
  int64_t column = 0;
  for (; column + 8 <= columns; column += 8) {
    for (int lane = 0; lane < 8; ++lane) partial[lane] += values[column + lane];
  }
  for (; column < columns; ++column) partial[0] += values[column];
  double total = 0;
  for (int lane = 0; lane < 8; ++lane) total += partial[lane];
  return total;
}

template <typename T, typename Rule>
void sum_rule(const ColumnTask& task, int64_t begin, int64_t end, Kept* kept) {
  using F = accumulate_t<T>;
  const Rule rule(task.arguments, task.environments);
  alignas(64) double sums[Rule::kSums][kBlock];
  alignas(64) F poison[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t columns = end - first < kBlock ? end - first : kBlock;
    sum_terms<T>(task, rule, first, columns, sums, poison);
    const F* const __restrict noise = static_cast<const F*>(task.noise) + first;
    if constexpr (Rule::kFillsMissing) {
      F* const __restrict out = static_cast<F*>(task.out) + first;
      for (int64_t column = 0; column < columns; ++column) {
        const double column_sums[] = {sums[0][column], sums[1][column]};
        const bool keep = rule.kept(column_sums);
        const double bad = static_cast<double>(poison[column]);
        const double value = rule(column_sums, 0) + bad;
        const F wide = Rounder<F>::from(value);
        out[column] = keep || bad != 0 ? wide : missing_value(F());
        sums[0][column] = keep ? (value < 0 ? -value : value) : 0;
        sums[1][column] = keep ? 1 : 0;
      }
      kept->size += add_up(sums[0], columns);
      kept->count += add_up(sums[1], columns);
    } else {
      T* const __restrict out = static_cast<T*>(task.out) + first;
      for (int64_t column = 0; column < columns; ++column) {
        double column_sums[Rule::kSums];
#pragma GCC unroll 4
        for (int sum = 0; sum < Rule::kSums; ++sum) column_sums[sum] = sums[sum][column];
        double random = 0;
        if constexpr (Rule::kNoise != Noise::none) random = static_cast<double>(noise[column]);
        out[column] =
            Rounder<T>::from(rule(column_sums, random) + static_cast<double>(poison[column]));
      }
    }
  }
}

template <typename T>
void fill(const void* wide, const void* noise, double size, void* out, int64_t begin, int64_t end) {
  using F = accumulate_t<T>;
  const auto* const from = static_cast<const F*>(wide);
  const auto* const random = static_cast<const F*>(noise);
  for (int64_t column = begin; column < end; ++column) {
    const bool empty = bits_of(from[column]) == bits_of(missing_value(F()));
    const double value =
        empty ? static_cast<double>(random[column]) * size : static_cast<double>(from[column]);
    static_cast<T*>(out)[column] = Rounder<T>::from(value);
  }
}

// ---- the table ----

template <typename T, typename Rule>
bool aggregate(const ColumnTask& task, int64_t begin, int64_t end, Kept* kept) {
  if constexpr (!Rule::kRanked) {
    sum_rule<T, Rule>(task, begin, end, kept);
    return true;
  } else if (task.environments > kRun) {
    return rank_many_runs<T>(task, begin, end);
  } else {
    rank_one_run<T>(task, begin, end);
    return true;
  }
}

template <typename... Rules>
constexpr ColumnKernels table(RuleList<Rules...>) {
  return {
      {{aggregate<Half, Rules>...},
       {aggregate<BFloat16, Rules>...},
       {aggregate<float, Rules>...},
       {aggregate<double, Rules>...}},
      {fill<Half>, fill<BFloat16>, fill<float>, fill<double>},
  };
}

}  // namespace

namespace ANDMASK_ISA {
extern const ColumnKernels column_kernels = table(ColumnRules());
}  // namespace ANDMASK_ISA

}  // namespace andmask
