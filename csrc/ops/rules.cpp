#include "rules.h"

#include <sstream>

namespace andmask {
namespace {

template <typename... Moments, typename... Columns>
std::vector<NamedRule> name_rules(RuleList<Moments...>, RuleList<Columns...>) {
  int index = 0;
  std::vector<NamedRule> rules = {
      {Moments::kName, Moments::kArguments, Noise::none, (Moments::kMoments & kVotes) != 0, false,
       index++, -1,
       [](const double* arguments, int64_t) { return Moments::invalid(arguments); }}...};
  index = 0;
  (rules.push_back({Columns::kName, Columns::kArguments, Columns::kNoise, false, Columns::kFills,
                    -1, index++, Columns::invalid}),
   ...);
  return rules;
}

const std::vector<NamedRule>& all_rules() {
  static const std::vector<NamedRule> rules = name_rules(MomentRules(), ColumnRules());
  return rules;
}

}  // namespace

const NamedRule& named_rule(const char* op, const std::string& name) {
  std::string names;
  for (const NamedRule& rule : all_rules()) {
    if (name == rule.name) return rule;
    if (!names.empty()) names += ", ";
    names += rule.name;
  }
  fail(op, "expected rule to be one of ", names, ", but got ", name);
}

std::string rule_table() {
  std::ostringstream lines;
  for (const NamedRule& rule : all_rules()) {
    lines << rule.name << ' ' << rule.arguments << ' ' << (rule.noise != Noise::none) << ' '
          << rule.rescales << ' ' << rule.fills << '\n';
  }
  return lines.str();
}

void check_rule(const char* op, const NamedRule& rule, const std::vector<double>& arguments,
                bool rescale, int64_t environments) {
  check(arguments.size() == static_cast<size_t>(rule.arguments), op, "expected ", rule.arguments,
        " argument(s) of rule ", rule.name, ", but got ", arguments.size());
  if (const char* const invalid = rule.invalid(arguments.data(), environments)) {
    std::ostringstream got;
    for (double argument : arguments) got << argument << " and ";
    fail(op, invalid, " for rule ", rule.name, ", but got ", got.str(), environments,
         " environment(s)");
  }
  check(rule.rescales || !rescale, op, "expected rescale=False, because rule ", rule.name,
        " has no mask to rescale by, but got True");
}

void check_noise(const char* op, const NamedRule& rule, const std::optional<Tensor>& noise,
                 const Tensor& grads) {
  check(noise.has_value() == (rule.noise != Noise::none), op,
        noise ? "expected no noise for rule " : "expected noise for rule ", rule.name, ", but got ",
        noise ? "a tensor" : "None");
  if (!noise) return;
  if (!same_shape(grads, *noise, 1)) {
    fail(op, "expected noise of the shape of one environment of grads ", shape_text(grads),
         ", but got ", shape_text(*noise));
  }
  const ScalarType wide = wide_type(check_dtype(op, "grads", grads));
  if (noise->scalar_type() != wide) {
    fail(op, "expected noise of dtype ", torch::headeronly::toString(wide), " for grads of dtype ",
         torch::headeronly::toString(grads.scalar_type()), ", but got ",
         torch::headeronly::toString(noise->scalar_type()));
  }
}

}  // namespace andmask
