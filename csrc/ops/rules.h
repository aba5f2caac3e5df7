// The rules of aggregate, by name.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../math/columns.h"
#include "tensors.h"

namespace andmask {

struct NamedRule {
  const char* name;
  int arguments;
  Noise noise;
  bool rescales;  // has a mask to rescale by
  bool fills;
  int moment;  // index in MomentRules, or -1
  int column;  // index in ColumnRules, or -1
  const char* (*invalid)(const double* arguments, int64_t environments);
};

// Raises where there is none of that name.
const NamedRule& named_rule(const char* op, const std::string& name);

void check_rule(const char* op, const NamedRule& rule, const std::vector<double>& arguments,
                bool rescale, int64_t environments);

void check_noise(const char* op, const NamedRule& rule, const std::optional<Tensor>& noise,
                 const Tensor& grads);

// Lines "name arguments noise rescales per_tensor", for the fake kernel and the vmap rule.
std::string rule_table();

}  // namespace andmask
