// The registry of rules, by name: those on moments (math/rules.h) and those on whole columns
// (math/columns.h).
#pragma once

#include <string>
#include <vector>

#include "../math/columns.h"

namespace andmask {

struct RuleInfo {
  const char* name;
  int arguments;
  const char* (*invalid)(const double* arguments, int64_t environments);
  int moment_rule;   // index in MomentRules, or -1
  int column_rule;   // index in ColumnRules, or -1
  unsigned moments;  // that a rule on moments needs
  Noise noise;
  bool fills_missing;
  bool tests;  // votes, by one of VoteTest

  bool rescales() const { return (moments & kVotes) != 0; }  // by its mask
};

// Returns the rule of this name and checks its arguments. `on_moments`: the op takes only the rules
// on moments.
const RuleInfo& find_rule(const char* op, const std::string& name,
                          const std::vector<double>& arguments, int64_t environments,
                          bool on_moments);

// Returns the test of a rule: [tau, ...], or [level, ..., criterion, abstain]. Checks all that
// find_rule does not.
VoteTest test_of(const char* op, const RuleInfo& rule, const std::vector<double>& arguments,
                 int64_t environments);
void check_test(const char* op, const VoteTest& test, int64_t environments);

// Returns the rule of a call of _aggregate and checks all arguments that are no tensors. `noise`:
// it is given.
const RuleInfo& check_aggregate(const std::string& name, const std::vector<double>& arguments,
                                int64_t environments, bool rescale, bool noise);

// Lines "name arguments noise rescales per_tensor", for autograd and the vmap rule.
std::string rule_table();

}  // namespace andmask
