#include "moments.h"

#include <limits>

#include "load.h"

namespace andmask {
namespace {

constexpr int64_t kBlock = kUpdateBlock;

// ---- accumulate: one simple loop for each moment, over a block that stays in L1 ----

// `counts`: signs that are not zero add one, whichever they are.
template <bool counts, typename F, typename V>
void add_votes(const F* __restrict grads, int64_t columns, bool first, V* __restrict votes) {
  constexpr int64_t kChunk = 64;  // narrowed in a loop of its own: else votes set the vector width
  using Vote = decltype(sign(F()));
  const auto vote = [](F grad) {
    const Vote one = sign(grad);
    return counts && one < 0 ? Vote{1} : one;
  };
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    const int64_t size = columns - begin < kChunk ? columns - begin : kChunk;
    Vote chunk[kChunk];
    if (size == kChunk) {
      for (int64_t i = 0; i < kChunk; ++i) chunk[i] = vote(grads[begin + i]);
      for (int64_t i = 0; i < kChunk; ++i) {
        votes[begin + i] = static_cast<V>((first ? 0 : votes[begin + i]) + chunk[i]);
      }
    } else {
      for (int64_t i = begin; i < columns; ++i) {
        votes[i] = static_cast<V>((first ? 0 : votes[i]) + vote(grads[i]));
      }
    }
  }
}

template <bool counts, typename F>
void add_votes(const F* grads, int64_t columns, bool first, int bytes, void* votes,
               int64_t offset) {
  switch (bytes) {
    case 1: return add_votes<counts>(grads, columns, first, static_cast<int8_t*>(votes) + offset);
    case 2: return add_votes<counts>(grads, columns, first, static_cast<int16_t*>(votes) + offset);
    default: return add_votes<counts>(grads, columns, first, static_cast<int32_t*>(votes) + offset);
  }
}

template <typename F>
void add_squares(const F* __restrict grads, int64_t columns, int64_t count, const F* __restrict sum,
                 F* __restrict squares) {
  if (count == 0) {
    for (int64_t i = 0; i < columns; ++i) squares[i] = 0;
    return;
  }
  const F before = static_cast<F>(count);
  const F share = static_cast<F>(static_cast<double>(count) / static_cast<double>(count + 1));
  for (int64_t i = 0; i < columns; ++i) {
    squares[i] = add_square(squares[i], sum[i], before, share, grads[i]);
  }
}

template <typename F>
void add_sum(const F* __restrict grads, int64_t columns, bool first, F* __restrict sum) {
  if (first) {
    for (int64_t i = 0; i < columns; ++i) sum[i] = grads[i];
  } else {
    for (int64_t i = 0; i < columns; ++i) sum[i] += grads[i];
  }
}

template <typename F>
void add_logs(const F* __restrict grads, int64_t columns, bool first, F* __restrict logs) {
  if (first) {
    for (int64_t i = 0; i < columns; ++i) logs[i] = log_magnitude(grads[i]);
  } else {
    for (int64_t i = 0; i < columns; ++i) logs[i] += log_magnitude(grads[i]);
  }
}

template <typename T>
void accumulate(const AccumulateTask& task, int64_t begin, int64_t end) {
  using F = accumulate_t<T>;
  alignas(64) F scratch[kBlock];
  auto* const sum = static_cast<F*>(task.moments.sum);
  auto* const squares = static_cast<F*>(task.moments.squares);
  auto* const logs = static_cast<F*>(task.moments.logs);
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t columns = end - block < kBlock ? end - block : kBlock;
    for (int64_t row = 0; row < task.rows; ++row) {
      const int64_t count = task.count + row;
      const T* const stored = static_cast<const T*>(task.grads) + row * task.stride + block;
      const F* grads = widened(stored, columns, scratch);
      // Votes come before the weight, which could make a zero of a small gradient.
      const MomentArrays& moments = task.moments;
      if (moments.votes) {
        add_votes<false>(grads, columns, count == 0, moments.vote_bytes, moments.votes, block);
      }
      if (moments.voters) {
        add_votes<true>(grads, columns, count == 0, moments.vote_bytes, moments.voters, block);
      }
      if (task.weights && task.weights[row] != 1) {
        const F weight = static_cast<F>(task.weights[row]);
        for (int64_t i = 0; i < columns; ++i) scratch[i] = grads[i] * weight;
        grads = scratch;
      }
      if (squares) add_squares(grads, columns, count, sum + block, squares + block);
      add_sum(grads, columns, count == 0, sum + block);
      if (logs) add_logs(grads, columns, count == 0, logs + block);
    }
  }
}

// ---- accumulate_all: groups of rows, joined in float64 ----

struct Joined {
  alignas(64) double sum[kJoinedBlock];
  alignas(64) double squares[kJoinedBlock];
  alignas(64) double logs[kJoinedBlock];
  alignas(64) int32_t votes[kJoinedBlock];
  alignas(64) int32_t voters[kJoinedBlock];
};

template <typename From, typename To>
void add_group(const From* __restrict group, int64_t columns, bool first, To* __restrict all) {
  if (first) {
    for (int64_t i = 0; i < columns; ++i) all[i] = static_cast<To>(group[i]);
  } else {
    for (int64_t i = 0; i < columns; ++i) all[i] += static_cast<To>(group[i]);
  }
}

template <typename F>
void add_group_squares(const F* __restrict squares, const F* __restrict sum, int64_t rows,
                       int64_t before, int64_t columns, Joined& all) {
  if (before == 0) return add_group(squares, columns, true, all.squares);
  const double count = static_cast<double>(before);
  const double more = static_cast<double>(rows);
  for (int64_t i = 0; i < columns; ++i) {
    all.squares[i] =
        join_squares(all.squares[i], all.sum[i], count, static_cast<double>(squares[i]),
                     static_cast<double>(sum[i]), more);
  }
}

template <typename F>
void round_all(const double* __restrict all, int64_t columns, void* moments) {
  auto* const __restrict out = static_cast<F*>(moments);
  for (int64_t i = 0; i < columns; ++i) out[i] = static_cast<F>(all[i]);
}

template <typename T>
void accumulate_all(const AccumulateTask& task, int64_t columns) {
  using F = accumulate_t<T>;
  if (task.rows <= kJoinedRows) return accumulate<T>(task, 0, columns);
  Joined all;
  const MomentArrays& moments = task.moments;
  for (int64_t row = 0; row < task.rows; row += kJoinedRows) {
    AccumulateTask group = task;
    group.grads = static_cast<const T*>(task.grads) + row * task.stride;
    group.rows = task.rows - row < kJoinedRows ? task.rows - row : kJoinedRows;
    accumulate<T>(group, 0, columns);
    const bool first = row == 0;
    const auto* const sum = static_cast<const F*>(moments.sum);
    if (moments.squares) {
      add_group_squares(static_cast<const F*>(moments.squares), sum, group.rows, row, columns, all);
    }
    add_group(sum, columns, first, all.sum);
    if (moments.logs) add_group(static_cast<const F*>(moments.logs), columns, first, all.logs);
    if (moments.votes) {
      add_group(static_cast<const int32_t*>(moments.votes), columns, first, all.votes);
    }
    if (moments.voters) {
      add_group(static_cast<const int32_t*>(moments.voters), columns, first, all.voters);
    }
  }
  round_all<F>(all.sum, columns, moments.sum);
  if (moments.squares) round_all<F>(all.squares, columns, moments.squares);
  if (moments.logs) round_all<F>(all.logs, columns, moments.logs);
  if (moments.votes) {
    add_group(all.votes, columns, true, static_cast<int32_t*>(moments.votes));
  }
  if (moments.voters) {
    add_group(all.voters, columns, true, static_cast<int32_t*>(moments.voters));
  }
}

// ---- resolve ----

template <typename F>
struct ResolveScratch {
  alignas(64) F sum[kBlock];
  int32_t votes[kBlock];
  int32_t voters[kBlock];
  int32_t thresholds[kBlock];
};

// Returns the sums of columns [begin, begin + columns), widened if necessary.
template <typename F>
const F* load_sum(const Update& task, int64_t begin, int64_t columns, F* scratch) {
  if constexpr (sizeof(F) == sizeof(float)) {
    if (task.sum_dtype == Dtype::float16) {
      return widened(static_cast<const Half*>(task.moments.sum) + begin, columns, scratch);
    }
    if (task.sum_dtype == Dtype::bfloat16) {
      return widened(static_cast<const BFloat16*>(task.moments.sum) + begin, columns, scratch);
    }
  }
  return static_cast<const F*>(task.moments.sum) + begin;
}

template <typename V>
void widen_votes(const V* __restrict votes, int64_t columns, int32_t* __restrict wide) {
  for (int64_t i = 0; i < columns; ++i) wide[i] = votes[i];
}

// Returns the votes, or the voters, of columns [begin, begin + columns), widened if necessary.
const int32_t* load_votes(const void* votes, int bytes, int64_t begin, int64_t columns,
                          int32_t* scratch) {
  switch (bytes) {
    case 1: widen_votes(static_cast<const int8_t*>(votes) + begin, columns, scratch); break;
    case 2: widen_votes(static_cast<const int16_t*>(votes) + begin, columns, scratch); break;
    default: return static_cast<const int32_t*>(votes) + begin;
  }
  return scratch;
}

// Calls `use(index in the block, aggregate)` for every column, in loops that can be vectorised.
template <bool abstain, typename Rule, typename F, typename Use>
ANDMASK_INLINE void for_columns(const Rule& rule, const Update& task, int64_t begin,
                                int64_t columns, const Use& use) {
  ResolveScratch<F> scratch;
  const F* const sum = load_sum<F>(task, begin, columns, scratch.sum);
  const MomentArrays& moments = task.moments;
  const int32_t* votes = nullptr;
  const int32_t* voters = nullptr;
  const F* squares = nullptr;
  const F* logs = nullptr;
  if constexpr ((Rule::kMoments & kVotes) != 0) {
    votes = load_votes(moments.votes, moments.vote_bytes, begin, columns, scratch.votes);
  }
  if constexpr (abstain) {
    voters = load_votes(moments.voters, moments.vote_bytes, begin, columns, scratch.voters);
    const int32_t most = static_cast<int32_t>(task.count);
    for (int64_t i = 0; i < columns; ++i) {
      scratch.thresholds[i] = task.thresholds[place_of_voters(voters[i], most)];
    }
  }
  if constexpr ((Rule::kMoments & kSquares) != 0) {
    squares = static_cast<const F*>(moments.squares) + begin;
  }
  if constexpr ((Rule::kMoments & kLogs) != 0) {
    logs = static_cast<const F*>(moments.logs) + begin;
  }
  const int32_t threshold = Rule::kTests && !abstain ? *task.thresholds : 0;
  const int32_t all = static_cast<int32_t>(task.count);
  for (int64_t i = 0; i < columns; ++i) {
    Sums<F> sums{sum[i], 0, all, threshold, 0, 0};
    if constexpr ((Rule::kMoments & kVotes) != 0) sums.votes = votes[i];
    if constexpr (abstain) {
      sums.voters = voters[i];
      sums.threshold = scratch.thresholds[i];
    }
    if constexpr ((Rule::kMoments & kSquares) != 0) sums.squares = squares[i];
    if constexpr ((Rule::kMoments & kLogs) != 0) sums.logs = logs[i];
    use(i, rule(sums));
  }
}

template <typename Rule, typename F, typename Use>
ANDMASK_INLINE void for_columns(const Update& task, int64_t begin, int64_t columns,
                                const Use& use) {
  const Rule rule({task.arguments, task.count, task.test});
  if constexpr (Rule::kTests) {
    if (task.test.abstain) return for_columns<true, Rule, F>(rule, task, begin, columns, use);
  }
  for_columns<false, Rule, F>(rule, task, begin, columns, use);
}

// ---- which coordinates a test keeps ----

template <bool abstain, typename V>
int64_t count_kept(const Update& task, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 128;  // a byte can count them in each lane
  const V* const votes = static_cast<const V*>(task.moments.votes);
  const V* const voters = static_cast<const V*>(task.moments.voters);
  int64_t kept = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int64_t size = end - chunk < kChunk ? end - chunk : kChunk;
    if constexpr (abstain) {
      const int32_t most = static_cast<int32_t>(task.count);
      for (int64_t i = 0; i < size; ++i) {
        const int32_t place = place_of_voters(voters[chunk + i], most);
        kept += agrees(votes[chunk + i], task.thresholds[place]);
      }
    } else {
      // In the type of the votes, so that as many as can be fit into a vector.
      if (*task.thresholds > std::numeric_limits<V>::max()) return 0;
      const V threshold = static_cast<V>(*task.thresholds);
      V lanes = 0;
      for (int64_t i = 0; i < size; ++i) {
        const V vote = votes[chunk + i];
        const V magnitude = static_cast<V>(vote < 0 ? -vote : vote);
        lanes = static_cast<V>(lanes - (magnitude >= threshold));
      }
      kept -= lanes;
    }
  }
  return kept;
}

int64_t count_kept(const Update& task, int64_t begin, int64_t end) {
  const auto count = [&](auto vote) {
    using V = decltype(vote);
    return task.test.abstain ? count_kept<true, V>(task, begin, end)
                             : count_kept<false, V>(task, begin, end);
  };
  switch (task.moments.vote_bytes) {
    case 1: return count(int8_t());
    case 2: return count(int16_t());
    default: return count(int32_t());
  }
}

// Adds up term(i) in a fixed order, in sixteen lanes, so that the loop can be vectorised. Each lane
// adds at most 32 terms, which is exact if they are 0 or 1.
template <typename Term>
double add_up(int64_t columns, const Term& term) {
  constexpr int64_t kLanes = 16;
  decltype(term(0)) partial[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) partial[lane] += term(i + lane);
  }
  for (; i < columns; ++i) partial[i % kLanes] += term(i);
  double total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += static_cast<double>(partial[lane]);
  return total;
}

template <typename F, typename Rule>
double total_factor(const Update& task, int64_t begin, int64_t end) {
  alignas(64) F factors[kBlock];
  double total = 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t columns = end - block < kBlock ? end - block : kBlock;
    for_columns<Rule, F>(task, block, columns,
                         [&](int64_t i, const Aggregate<F>& a) { factors[i] = a.factor; });
    total += add_up(columns, [&](int64_t i) { return factors[i]; });
  }
  return total;
}

// The factor multiplies; it never selects: a value that is not finite shows as NaN under a factor
// of 0.
template <typename F, typename Rule>
void resolve(const Update& task, double scale, int64_t begin, int64_t end, void* update) {
  F* const __restrict out = static_cast<F*>(update);
  const F grad_scale = task.grad_scale ? static_cast<F>(*task.grad_scale) : F(1);
  if (scale == 1 && grad_scale == 1) {
    for_columns<Rule, F>(task, begin, end - begin,
                         [&](int64_t i, const Aggregate<F>& a) { out[i] = a.factor * a.value; });
  } else {
    const F wide_scale = static_cast<F>(scale);
    for_columns<Rule, F>(task, begin, end - begin, [&](int64_t i, const Aggregate<F>& a) {
      out[i] = a.factor * a.value * wide_scale * grad_scale;
    });
  }
}

template <typename F>
double squared_norm(const void* update, int64_t columns) {
  const F* const values = static_cast<const F*>(update);
  return add_up(columns, [&](int64_t i) {
    const double value = static_cast<double>(values[i]);
    return value * value;
  });
}

template <typename... Rules>
constexpr MomentKernels table(RuleList<Rules...>) {
  return {
      {accumulate<Half>, accumulate<BFloat16>, accumulate<float>, accumulate<double>},
      {accumulate_all<Half>, accumulate_all<BFloat16>, accumulate_all<float>,
       accumulate_all<double>},
      {{total_factor<float, Rules>...}, {total_factor<double, Rules>...}},
      {{resolve<float, Rules>...}, {resolve<double, Rules>...}},
      {squared_norm<float>, squared_norm<double>},
      count_kept,
  };
}

}  // namespace

namespace ANDMASK_ISA {
extern const MomentKernels moment_kernels = table(MomentRules());
}  // namespace ANDMASK_ISA

}  // namespace andmask
