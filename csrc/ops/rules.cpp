#include "rules.h"

#include <sstream>

#include "../errors.h"

namespace andmask {
namespace {

template <typename... Moments, typename... Columns>
std::vector<RuleInfo> registry(RuleList<Moments...>, RuleList<Columns...>) {
  int index = 0;
  std::vector<RuleInfo> rules = {
      {Moments::kName, Moments::kArguments,
       [](const double* arguments, int64_t) { return Moments::invalid(arguments); }, index++, -1,
       Moments::kMoments, Noise::none, false}...};
  index = 0;
  (rules.push_back({Columns::kName, Columns::kArguments, Columns::invalid, -1, index++, 0,
                    Columns::kNoise, Columns::kFillsMissing}),
   ...);
  return rules;
}

const std::vector<RuleInfo>& all_rules() {
  static const std::vector<RuleInfo> rules = registry(MomentRules(), ColumnRules());
  return rules;
}

}  // namespace

const RuleInfo& find_rule(const char* op, const std::string& name,
                          const std::vector<double>& arguments, int64_t environments,
                          bool on_moments) {
  std::string names;
  for (const RuleInfo& rule : all_rules()) {
    if (on_moments && rule.moment_rule < 0) continue;
    if (name != rule.name) {
      names += (names.empty() ? "" : ", ") + std::string(rule.name);
      continue;
    }
    check(arguments.size() == static_cast<size_t>(rule.arguments), op, "expected ", rule.arguments,
          " argument(s) of rule ", name, ", but got ", arguments.size());
    if (const char* const invalid = rule.invalid(arguments.data(), environments)) {
      std::ostringstream values;
      for (double argument : arguments) values << argument << " and ";
      fail(op, invalid, " for rule ", name, ", but got ", values.str(), environments,
           " environment(s)");
    }
    return rule;
  }
  fail(op, "expected rule to be one of ", names, on_moments ? " (the rules on moments)" : "",
       ", but got ", name);
}

const RuleInfo& check_aggregate(const std::string& name, const std::vector<double>& arguments,
                                int64_t environments, bool rescale, bool noise) {
  const char* const op = "andmask::_aggregate";
  const RuleInfo& rule = find_rule(op, name, arguments, environments, /*on_moments=*/false);
  check(rule.rescales() || !rescale, op, "expected rescale=False, because rule ", name,
        " has no mask to rescale by, but got True");
  check(noise == (rule.noise != Noise::none), op,
        noise ? "expected no noise for rule " : "expected noise for rule ", name, ", but got ",
        noise ? "a tensor" : "None");
  return rule;
}

std::string rule_table() {
  std::ostringstream lines;
  for (const RuleInfo& rule : all_rules()) {
    lines << rule.name << ' ' << rule.arguments << ' ' << (rule.noise != Noise::none) << ' '
          << rule.rescales() << ' ' << rule.fills_missing << '\n';
  }
  return lines.str();
}

}  // namespace andmask
