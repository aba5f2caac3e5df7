#include <algorithm>

#include "kernels/columns.h"
#include "kernels/density.h"
#include "kernels/masked_mean.h"
#include "kernels/ranked.h"
#include "launch.h"
#include "types.h"

namespace andmask {
namespace {

// Calls f(Type<Rule>()) for the rule of this index.
template <typename... Rules, typename F>
void with_rule(RuleList<Rules...>, int wanted, const F& f) {
  int index = 0;
  ((index++ == wanted ? f(Type<Rules>()) : void()), ...);
}

template <typename T>
ColumnGrads column_grads(const AggregateTask& task) {
  using F = accumulate_t<T>;
  constexpr int64_t width = kPackSize<T>;
  const bool packed =
      (task.environments == 1 || task.stride % width == 0) &&
      aligned_for(task.grads, width, sizeof(T)) && aligned_for(task.out, width, sizeof(T)) &&
      aligned_for(task.wide, width, sizeof(F)) && aligned_for(task.noise, width, sizeof(F));
  return {task.grads, task.environments, task.stride, task.columns, packed};
}

// The number of blocks of a kernel with totals. It is the same on all devices, because the order in
// which totals are added is part of the result.
int64_t blocks_with_totals(int64_t columns, int64_t columns_per_block) {
  constexpr int64_t kMostBlocks = 2048;
  return std::min((columns + columns_per_block - 1) / columns_per_block, kMostBlocks);
}

template <typename T, unsigned further>
void moment_rule(const Stream& stream, const AggregateTask& task, const RuleCall& call) {
  using Body = MomentRuleBody<T, further>;
  const int64_t blocks = blocks_with_totals(task.columns, Body::kThreads * Body::kWidth);
  double* const parts = task.rescale ? stream.scratch<double>(blocks) : nullptr;
  void* const first_out = task.rescale ? task.wide : task.out;
  launch(stream, blocks, Body{column_grads<T>(task), call, first_out, parts});
  if (!task.rescale) return;
  double* const factor = stream.scratch<double>(1);
  launch(stream, 1, DensityBody{parts, blocks, static_cast<double>(task.columns), factor});
  // This pass goes element by element: it is short beside the one over all environments.
  using Scale = ScaleBody<T, 1>;
  launch(stream, blocks_for(stream, task.columns, Scale::kThreads),
         Scale{task.wide, factor, task.out, task.columns});
}

template <typename T, typename Rule>
void term_rule(const Stream& stream, const AggregateTask& task) {
  using Body = TermRuleBody<T, Rule>;
  const int64_t blocks = blocks_with_totals(task.columns, Body::kThreads * Body::kWidth);
  KeptTotal* const parts = Rule::kFillsMissing ? stream.scratch<KeptTotal>(blocks) : nullptr;
  launch(stream, blocks,
         Body{column_grads<T>(task), Rule(task.arguments, task.environments), task.noise,
              Rule::kFillsMissing ? task.wide : task.out, parts});
  if constexpr (Rule::kFillsMissing) {
    using Fill = FillBody<T>;
    double* const size = stream.scratch<double>(1);
    launch(stream, 1, MeanSizeBody{parts, blocks, size});
    launch(stream, blocks_for(stream, task.columns, Fill::kThreads),
           Fill{task.wide, task.noise, size, task.out, task.columns});
  }
}

template <typename T, int size, typename Rule>
void sort(const Stream& stream, const AggregateTask& task, const Rule& rule) {
  using Body = SortBody<T, size>;
  using F = accumulate_t<T>;
  Body body{column_grads<T>(task), {}, static_cast<F>(rule.total()), task.out};
  for (int64_t rank = 0; rank < task.environments; ++rank) {
    body.weights[rank] = static_cast<F>(rule.weight(rank));
  }
  launch(stream, blocks_for(stream, task.columns, Body::kThreads), body);
}

template <typename Rule>
RankWeights rank_weights(const Rule& rule, int64_t environments) {
  int64_t first = 0;
  int64_t last = environments - 1;
  while (rule.weight(first) == 0) ++first;
  while (rule.weight(last) == 0) --last;
  RankWeights ranks{first, last, {}, rule.total()};
  const int64_t count = last - first + 1;
  ranks.more[0] = rule.weight(first) - 1;
  if (count > 3) ranks.more[1] = rule.weight(first + 1) - 1;
  if (count > 2) ranks.more[2] = rule.weight(last - 1) - 1;
  if (count > 1) ranks.more[count > 2 ? 3 : 1] = rule.weight(last) - 1;
  return ranks;
}

template <typename T, typename Rule>
void ranked_rule(const Stream& stream, const AggregateTask& task, const Rule& rule) {
  using Select = SelectBody<T>;
  static_assert(kSorted == 32);
  if (task.environments <= 4) return sort<T, 4>(stream, task, rule);
  if (task.environments <= 8) return sort<T, 8>(stream, task, rule);
  if (task.environments <= 16) return sort<T, 16>(stream, task, rule);
  if (task.environments <= 32) return sort<T, 32>(stream, task, rule);
  launch(stream, blocks_for(stream, task.columns, Select::kThreads),
         Select{column_grads<T>(task), rank_weights(rule, task.environments), task.out});
}

}  // namespace

void run(const Stream& stream, const AggregateTask& task) {
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_rule(MomentRules(), task.moment_rule, [&](auto rule) {
      using Rule = typename decltype(rule)::type;
      double arguments[kMostArguments] = {};
      std::copy_n(task.arguments, Rule::kArguments, arguments);
      const int64_t threshold = Rule::kTests ? vote_threshold(arguments[0], task.environments) : 0;
      moment_rule<T, kFurther<Rule>>(stream, task,
                                     RuleCall({arguments, task.environments}, task.moment_rule,
                                              static_cast<int32_t>(threshold)));
    });
    with_rule(ColumnRules(), task.column_rule, [&](auto rule) {
      using Rule = typename decltype(rule)::type;
      if constexpr (Rule::kRanked) {
        ranked_rule<T>(stream, task, Rule(task.arguments, task.environments));
      } else {
        term_rule<T, Rule>(stream, task);
      }
    });
  });
}

}  // namespace andmask
