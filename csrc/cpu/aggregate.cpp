#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <sstream>

#include "kernels/columns.h"
#include "kernels/masked_mean.h"
#include "kernels/steps.h"
#include "ranking.h"
#include "resolver.h"

namespace andmask {
namespace {

constexpr const char* kOp = "andmask::aggregate";

// Columns of a moment rule at once: all their sums fit on the stack of any thread.
constexpr int64_t kMomentBlock = 256;

// ---- the rules by name ----

struct NamedRule {
  const char* name;
  int arguments;
  Noise noise;
  bool rescales;  // has a mask to rescale by
  bool fills;
  int moment;  // index in MomentRules, or -1
  int column;  // index in ColumnRules, or -1
  const char* (*invalid)(const double* arguments, int64_t environments);
  Ranking (*rank)(const double* arguments, int64_t environments);  // of a column rule
};

template <typename... Moments, typename... Columns>
std::vector<NamedRule> name_rules(RuleList<Moments...>, RuleList<Columns...>) {
  int index = 0;
  std::vector<NamedRule> rules = {
      {Moments::kName, Moments::kArguments, Noise::none, (Moments::kMoments & kVotes) != 0, false,
       index++, -1, [](const double* arguments, int64_t) { return Moments::invalid(arguments); },
       nullptr}...};
  index = 0;
  (rules.push_back({Columns::kName, Columns::kArguments, Columns::kNoise, false, Columns::kFills,
                    -1, index++, Columns::invalid, make_ranking<Columns>}),
   ...);
  return rules;
}

const std::vector<NamedRule>& all_rules() {
  static const std::vector<NamedRule> rules = name_rules(MomentRules(), ColumnRules());
  return rules;
}

const NamedRule& find(const std::string& name) {
  std::string names;
  for (const NamedRule& rule : all_rules()) {
    if (name == rule.name) return rule;
    if (!names.empty()) names += ", ";
    names += rule.name;
  }
  fail(kOp, "expected rule to be one of ", names, ", but got ", name);
}

// Lines "name arguments noise rescales per_tensor", for the fake kernel and the vmap rule.
std::string rule_table() {
  std::ostringstream lines;
  for (const NamedRule& rule : all_rules()) {
    lines << rule.name << ' ' << rule.arguments << ' ' << (rule.noise != Noise::none) << ' '
          << rule.rescales << ' ' << rule.fills << '\n';
  }
  return lines.str();
}

// ---- checks ----

void check_rule(const NamedRule& rule, const std::vector<double>& arguments, bool rescale,
                int64_t environments) {
  check(arguments.size() == static_cast<size_t>(rule.arguments), kOp, "expected ", rule.arguments,
        " argument(s) of rule ", rule.name, ", but got ", arguments.size());
  if (const char* const invalid = rule.invalid(arguments.data(), environments)) {
    std::ostringstream got;
    for (double argument : arguments) got << argument << " and ";
    fail(kOp, invalid, " for rule ", rule.name, ", but got ", got.str(), environments,
         " environment(s)");
  }
  check(rule.rescales || !rescale, kOp, "expected rescale=False, because rule ", rule.name,
        " has no mask to rescale by, but got True");
}

void check_noise(const NamedRule& rule, const std::optional<Tensor>& noise, const Tensor& grads,
                 ScalarType wide) {
  check(noise.has_value() == (rule.noise != Noise::none), kOp,
        noise ? "expected no noise for rule " : "expected noise for rule ", rule.name, ", but got ",
        noise ? "a tensor" : "None");
  if (!noise) return;
  if (!same_shape(grads, *noise, 1)) {
    fail(kOp, "expected noise of the shape of one environment of grads ", shape_text(grads),
         ", but got ", shape_text(*noise));
  }
  if (noise->scalar_type() != wide) {
    fail(kOp, "expected noise of dtype ", torch::headeronly::toString(wide), " for grads of dtype ",
         torch::headeronly::toString(grads.scalar_type()), ", but got ",
         torch::headeronly::toString(noise->scalar_type()));
  }
}

// ---- the two kinds of rules ----

struct Call {
  const NamedRule& rule;
  const std::vector<double>& arguments;
  const void* grads;
  int64_t environments, stride, columns;
  Dtype dtype;
  void* wide;  // where the first pass writes, if there is a second
  void* out;

  bool is_double() const { return dtype == Dtype::float64; }
};

void scale(const Call& call, const Units& units, double factor) {
  const auto kernel = masked_mean_kernels(active_isa()).scale[static_cast<int>(call.dtype)];
  units.parallel(1, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    kernel(call.wide, factor, call.out, begin, end);
  });
}

// The environments of a block of columns join their moments, and those become the update.
template <typename F>
void run_moments(const Call& call, bool rescale) {
  constexpr int64_t kTypes = static_cast<int64_t>(sizeof(F) == sizeof(double));
  const MomentKernels& kernels = moment_kernels(active_isa());
  const auto accumulate = kernels.accumulate[static_cast<int>(call.dtype)];
  const auto resolve = kernels.resolve[kTypes][call.rule.moment];
  const auto total_factor = kernels.total_factor[kTypes][call.rule.moment];
  const auto store = step_kernels(active_isa()).store[static_cast<int>(call.dtype)];
  const unsigned moments = rule_info(call.rule.moment).moments;
  const int64_t element = call.dtype == Dtype::float32 ? 4 : call.is_double() ? 8 : 2;
  const Units units({call.columns});
  std::vector<double> totals(units.count());
  units.parallel(call.environments, [&](int64_t, int64_t unit, int64_t begin, int64_t end) {
    alignas(64) F sum[kMomentBlock];
    alignas(64) F squares[kMomentBlock];
    alignas(64) F logs[kMomentBlock];
    alignas(64) F update[kMomentBlock];
    alignas(64) int32_t votes[kMomentBlock];
    const MomentArrays arrays{sum, moments & kVotes ? votes : nullptr, sizeof(int32_t),
                              moments & kSquares ? squares : nullptr,
                              moments & kLogs ? logs : nullptr};
    const ResolveTask task{arrays, call.is_double() ? Dtype::float64 : Dtype::float32,
                           call.arguments.data(), call.environments};
    for (int64_t first = begin; first < end; first += kMomentBlock) {
      const int64_t columns = std::min(kMomentBlock, end - first);
      const void* const grads = static_cast<const char*>(call.grads) + first * element;
      accumulate({grads, call.environments, call.stride, nullptr, 0, arrays}, 0, columns);
      if (rescale) {
        totals[unit] += total_factor(task, 0, columns);
        resolve(task, 1, 0, columns, static_cast<F*>(call.wide) + first);
      } else {
        resolve(task, 1, 0, columns, update);
        store(update, call.out, first, first + columns);
      }
    }
  });
  if (!rescale) return;
  double total = 0;
  for (double unit : totals) total += unit;
  scale(call, units, inverse_density(total, static_cast<double>(call.columns)));
}

void run_columns(const Call& call, const void* noise) {
  ColumnTask task{};
  task.grads = call.grads;
  task.environments = call.environments;
  task.stride = call.stride;
  task.arguments = call.arguments.data();
  task.noise = noise;
  task.out = call.rule.fills ? call.wide : call.out;
  const Ranking ranking = call.rule.rank(call.arguments.data(), call.environments);
  ranking.describe(task);
  const ColumnKernels& kernels = column_kernels(active_isa());
  const auto aggregate = kernels.aggregate[static_cast<int>(call.dtype)][call.rule.column];
  const Units units({call.columns});
  std::vector<Kept> kept(units.count());
  std::atomic<bool> enough_memory{true};
  units.parallel(call.environments, [&](int64_t, int64_t unit, int64_t begin, int64_t end) {
    if (!aggregate(task, begin, end, &kept[unit])) enough_memory = false;
  });
  check(enough_memory, kOp, "out of memory for columns of ", call.environments, " environments");
  if (!call.rule.fills) return;
  Kept all{};
  for (const Kept& unit : kept) {
    all.size += unit.size;
    all.count += unit.count;
  }
  const double size = all.count > 0 ? all.size / all.count : 0;
  const auto fill = kernels.fill[static_cast<int>(call.dtype)];
  units.parallel(1, [&](int64_t, int64_t, int64_t begin, int64_t end) {
    fill(call.wide, noise, size, call.out, begin, end);
  });
}

Tensor aggregate_cpu(const Tensor& grads, std::string name, std::vector<double> arguments,
                     bool rescale, std::optional<Tensor> noise) {
  check_grads(kOp, grads);
  const Dtype dtype = check_dtype(kOp, "grads", grads);
  const ScalarType wide_type = dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  const NamedRule& rule = find(name);
  check_rule(rule, arguments, rescale, grads.size(0));
  check_noise(rule, noise, grads, wide_type);

  const auto shape = grads.sizes();
  const torch::headeronly::IntHeaderOnlyArrayRef out_shape(shape.data() + 1, shape.size() - 1);
  const Tensor out = torch::stable::new_empty(grads, out_shape);
  if (out.numel() == 0) return out;
  // A statistic of the tensor takes a second pass; till then 16-bit results wait in float32.
  const bool narrow = dtype == Dtype::float16 || dtype == Dtype::bfloat16;
  const bool two_passes = rescale || rule.fills;
  const Tensor wide =
      narrow && two_passes ? torch::stable::new_empty(grads, out_shape, wide_type) : out;
  const Tensor rows = rows_are_contiguous(grads) ? grads : torch::stable::contiguous(grads);
  const Tensor noise_row = noise ? torch::stable::contiguous(*noise) : grads;
  const Call call{
      rule,        arguments, rows.const_data_ptr(),   rows.size(0),          rows.stride(0),
      out.numel(), dtype,     wide.mutable_data_ptr(), out.mutable_data_ptr()};
  if (rule.moment < 0) {
    run_columns(call, noise ? noise_row.const_data_ptr() : nullptr);
  } else if (dtype == Dtype::float64) {
    run_moments<double>(call, rescale);
  } else {
    run_moments<float>(call, rescale);
  }
  return out;
}

}  // namespace
}  // namespace andmask

STABLE_TORCH_LIBRARY_IMPL(andmask, CPU, m) {
  m.impl("aggregate", TORCH_BOX(&andmask::aggregate_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(andmask, CompositeExplicitAutograd, m) {
  m.impl("_rule_table", TORCH_BOX(&andmask::rule_table));
}
