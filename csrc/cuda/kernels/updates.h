// The update that a rule makes of moments, for `resolve` and the optimizer steps.
#pragma once

#include "../../math/rules.h"
#include "../../tasks/moments.h"
#include "density.h"
#include "kernel_table.h"

namespace andmask {

// All rules, each made by the host with the same arguments. A kernel uses one of them.
template <typename Rules>
struct RuleBox;

template <>
struct RuleBox<RuleList<>> {
  explicit RuleBox(const RuleSetup&) {}
};

template <typename First, typename... Rest>
struct RuleBox<RuleList<First, Rest...>> {
  First first;
  RuleBox<RuleList<Rest...>> rest;

  explicit RuleBox(const RuleSetup& setup) : first(setup), rest(setup) {}

  template <typename Use>
  ANDMASK_METHOD void with(int rule, const Use& use) const {
    if (rule == 0) {
      use(first);
    } else if constexpr (sizeof...(Rest) > 0) {
      rest.with(rule - 1, use);
    }
  }
};

// No rule has more arguments.
constexpr int kMostArguments = 2;

template <typename... Rules>
int rule_arguments(int rule, RuleList<Rules...>) {
  static_assert(((Rules::kArguments <= kMostArguments) && ...));
  const int counts[] = {Rules::kArguments...};
  return counts[rule];
}

// `threshold`: |votes| that keep a coordinate of a tensor without a table of its own.
struct RuleCall {
  RuleBox<MomentRules> rules;
  int rule;
  int32_t environments;
  int32_t threshold;
  bool abstain;

  RuleCall(const RuleSetup& setup, int rule_, int32_t threshold_)
      : rules(setup),
        rule(rule_),
        environments(static_cast<int32_t>(setup.environments)),
        threshold(threshold_),
        abstain(setup.test.abstain) {}
};

// The moments of one tensor. The sum may be a plain gradient, in 16 bits too.
struct UpdateSource {
  MomentArrays moments;
  Dtype sum_dtype;
  const int32_t* thresholds = nullptr;  // of its test: [environments + 1] by voters, or [1]
};

// Reads the votes of `width` coordinates, those who voted, and how many votes keep them.
template <int width, typename At>
ANDMASK_INLINE void get_tested_votes(const At& at, const UpdateSource& source, const RuleCall& call,
                                     int32_t* votes, int32_t* voters, int32_t* thresholds) {
  const MomentArrays& moments = source.moments;
#pragma unroll
  for (int i = 0; i < width; ++i) voters[i] = call.environments;
  if (call.abstain) get_votes<width>(at, moments.voters, moments.vote_bytes, voters);
  get_votes<width>(at, moments.votes, moments.vote_bytes, votes);
  const int32_t all = source.thresholds && !call.abstain ? *source.thresholds : call.threshold;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    thresholds[i] = call.abstain ? source.thresholds[voters[i]] : all;
  }
}

template <typename F, int width, typename At>
ANDMASK_INLINE void get_sum(const At& at, const UpdateSource& source, F* sum) {
  const auto copy = [&](const auto* from) {
    const auto pack = at.get(from);
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] = widen(pack[i]);
  };
  if constexpr (sizeof(F) == sizeof(double)) {
    copy(static_cast<const double*>(source.moments.sum));
  } else if (source.sum_dtype == Dtype::float32) {
    copy(static_cast<const float*>(source.moments.sum));
  } else if (source.sum_dtype == Dtype::bfloat16) {
    copy(static_cast<const BFloat16*>(source.moments.sum));
  } else {
    copy(static_cast<const Half*>(source.moments.sum));
  }
}

// Applies a rule to `width` coordinates.
template <typename F, int width, typename At>
ANDMASK_INLINE void aggregate(const At& at, const UpdateSource& source, const RuleCall& call,
                              Aggregate<F>* aggregates) {
  call.rules.with(call.rule, [&](const auto& rule) {
    constexpr unsigned moments = std::remove_reference_t<decltype(rule)>::kMoments;
    F sum[width];
    [[maybe_unused]] int32_t votes[width];
    [[maybe_unused]] int32_t voters[width];
    [[maybe_unused]] int32_t thresholds[width];
    [[maybe_unused]] Pack<F, width> squares;
    [[maybe_unused]] Pack<F, width> logs;
    if constexpr ((moments & kSquares) != 0) {
      squares = at.template get<F>(static_cast<const F*>(source.moments.squares));
    }
    if constexpr ((moments & kLogs) != 0) {
      logs = at.template get<F>(static_cast<const F*>(source.moments.logs));
    }
    // The loads that are widened come last: widening waits for them.
    get_sum<F, width>(at, source, sum);
    if constexpr ((moments & kVotes) != 0) {
      get_tested_votes<width>(at, source, call, votes, voters, thresholds);
    }
#pragma unroll
    for (int i = 0; i < width; ++i) {
      Sums<F> sums{sum[i], 0, 0, 0, 0, 0};
      if constexpr ((moments & kVotes) != 0) {
        sums.votes = votes[i];
        sums.voters = voters[i];
        sums.threshold = thresholds[i];
      }
      if constexpr ((moments & kSquares) != 0) sums.squares = squares[i];
      if constexpr ((moments & kLogs) != 0) sums.logs = logs[i];
      aggregates[i] = rule(sums);
    }
  });
}

// The factor multiplies; it never selects: a value that is not finite shows as NaN under a factor
// of 0.
template <typename F, int width, typename At>
ANDMASK_INLINE void get_updates(const At& at, const UpdateSource& source, const RuleCall& call,
                                F scale, F* updates) {
  Aggregate<F> aggregates[width];
  aggregate<F, width>(at, source, call, aggregates);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    updates[i] = aggregates[i].factor * aggregates[i].value;
    if (scale != 1) updates[i] *= scale;
  }
}

// The factor of one tensor by `rescale`. `scales`: [tensors]; null: 1.
template <typename F>
ANDMASK_INLINE F scale_of(const double* scales, int64_t number) {
  return scales ? static_cast<F>(scales[number]) : F(1);
}

// ---- sums over tensors, without asking the host ----

struct SumItem {
  UpdateSource source;
  int64_t size;
  int64_t number;  // of the tensor among the tasks
  bool packed;
};

// A thread's share of a sum over a chunk. get(at, item, terms) computes `width` terms.
template <int width, typename Get>
ANDMASK_INLINE double sum_of_chunk(const KernelTable<SumItem>& table, const ThreadIndex& index,
                                   const Get& get) {
  const int64_t chunk = table.first_chunk[0] + index.block;
  const int64_t entry = table.item_of(chunk);
  const SumItem& item = table.items[entry];
  double total = 0;
  for_tiles<width>(item, chunk - table.first_chunk[entry], index.thread,
                   [&](const Tile<width>& tile) {
                     tile.template at</*ordered=*/true>([&](const auto& at) {
                       double terms[width];
                       get(at, item, terms);
#pragma unroll
                       for (int i = 0; i < width; ++i) {
                         if (at.has(i)) total += terms[i];
                       }
                     });
                   });
  return total;
}

// parts[chunk] = the sum of the rule's factors in a chunk.
template <typename F>
struct FactorBody {
  static constexpr int kThreads = kTableThreads;
  static constexpr int kWidth = kPackSize<F>;
  using Total = double;

  KernelTable<SumItem> table;
  RuleCall call;
  double* parts;  // [chunks of the group]

  ANDMASK_METHOD double operator()(const ThreadIndex& index) const {
    return sum_of_chunk<kWidth>(table, index,
                                [&](const auto& at, const SumItem& item, double* terms) {
                                  Aggregate<F> aggregates[kWidth];
                                  aggregate<F, kWidth>(at, item.source, call, aggregates);
#pragma unroll
                                  for (int i = 0; i < kWidth; ++i)
                                    terms[i] = static_cast<double>(aggregates[i].factor);
                                });
  }

  ANDMASK_METHOD void finish(int64_t block, double total) const {
    parts[table.first_chunk[0] + block] = total;
  }
};

// parts[chunk] = the sum of the squares of a chunk of updates.
template <typename F>
struct SquaredNormBody {
  static constexpr int kThreads = kTableThreads;
  static constexpr int kWidth = kPackSize<F>;
  using Total = double;

  KernelTable<SumItem> table;
  RuleCall call;
  const double* scales;  // [tensors]; null: 1
  double* parts;         // [chunks of the group]

  ANDMASK_METHOD double operator()(const ThreadIndex& index) const {
    return sum_of_chunk<kWidth>(
        table, index, [&](const auto& at, const SumItem& item, double* terms) {
          F updates[kWidth];
          get_updates<F, kWidth>(at, item.source, call, scale_of<F>(scales, item.number), updates);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const double wide = static_cast<double>(updates[i]);
            terms[i] = wide * wide;
          }
        });
  }

  ANDMASK_METHOD void finish(int64_t block, double total) const {
    parts[table.first_chunk[0] + block] = total;
  }
};

// One block for each tensor adds the parts of its chunks.
template <typename Item>
struct TableDensityBody {
  static constexpr int kThreads = 256;
  using Total = double;

  KernelTable<Item> table;
  const double* parts;
  double* scales;  // [tasks]

  ANDMASK_METHOD double operator()(const ThreadIndex& index) const {
    return sum_of_parts(parts + table.first_chunk[index.block],
                        table.first_chunk[index.block + 1] - table.first_chunk[index.block],
                        index.thread, kThreads);
  }

  ANDMASK_METHOD void finish(int64_t block, double total) const {
    scales[table.items[block].number] =
        inverse_density(total, static_cast<double>(table.items[block].size));
  }
};

}  // namespace andmask
