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
       Moments::kMoments, Noise::none, false, Moments::kTests}...};
  index = 0;
  (rules.push_back({Columns::kName, Columns::kArguments, Columns::invalid, -1, index++, 0,
                    Columns::kNoise, Columns::kFillsMissing, false}),
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
    const size_t more = arguments.size() - static_cast<size_t>(rule.arguments);
    check(more == 0 || (rule.tests && more == 2), op, "expected ", rule.arguments,
          " argument(s) of rule ", name, ", but got ", arguments.size(),
          rule.tests ? " (2 more may say its test)" : "");
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

VoteTest test_of(const char* op, const RuleInfo& rule, const std::vector<double>& arguments,
                 int64_t environments) {
  if (!rule.tests) return {};
  VoteTest test{Criterion::tau, arguments[0], false};
  if (arguments.size() == static_cast<size_t>(rule.arguments)) return test;
  const double criterion = arguments[rule.arguments];
  const double abstain = arguments[rule.arguments + 1];
  check((criterion == 0 || criterion == 1 || criterion == 2) && (abstain == 0 || abstain == 1), op,
        "expected a test of rule ", rule.name, " by criterion 0 (tau), 1 (significance) or 2 (fdr)",
        " and abstain 0 or 1, but got ", criterion, " and ", abstain);
  test.criterion = static_cast<Criterion>(static_cast<int>(criterion));
  test.abstain = abstain == 1;
  check_test(op, test, environments);
  return test;
}

void check_test(const char* op, const VoteTest& test, int64_t environments) {
  if (test.criterion == Criterion::tau) {
    check(test.level >= 0 && test.level <= 1, op, "expected tau in [0, 1], but got ", test.level);
    return;
  }
  const bool fdr = test.criterion == Criterion::fdr;
  check(test.level > 0 && test.level < 1, op, "expected ", fdr ? "fdr" : "significance",
        " in (0, 1), but got ", test.level);
  check(!(fdr && test.abstain) || environments <= kMostPairs, op, "expected at most ", kMostPairs,
        " environments for fdr with zeros that abstain, but got ", environments,
        "; let zeros count, or take significance");
}

const RuleInfo& check_aggregate(const std::string& name, const std::vector<double>& arguments,
                                int64_t environments, bool rescale, bool noise) {
  const char* const op = "andmask::_aggregate";
  const RuleInfo& rule = find_rule(op, name, arguments, environments, /*on_moments=*/false);
  test_of(op, rule, arguments, environments);
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
