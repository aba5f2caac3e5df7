// Helpers that the files of the test harness share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../cpu/kernels/dispatch.h"
#include "../math/columns.h"
#include "../math/sign_test.h"
#include "../tasks/masked_mean.h"

namespace andmask {

// Throws if this machine has no instruction set of that name.
Isa parse_isa(const std::string& wanted);

// numpy has no bfloat16: its bits are given as uint16.
Dtype parse_dtype(const pybind11::array& array);

Output parse_output(const std::string& name);

// The index of a rule in a list of rules, or -1.
template <typename... Rules>
int find_rule(const std::string& wanted, RuleList<Rules...>) {
  const std::string names[] = {Rules::kName...};
  for (int index = 0; index < RuleList<Rules...>::kSize; ++index) {
    if (names[index] == wanted) return index;
  }
  return -1;
}

// Throws if there is no rule on moments of that name.
int moment_rule(const std::string& name);

// The test that the arguments of a rule ask for, as ops read them.
VoteTest parse_test(const std::string& rule, const std::vector<double>& arguments);

// The functions of the module, which every file registers: ANDMASK_BINDINGS(m) { m.def(...); }
class Bindings {
 public:
  using Add = void (*)(pybind11::module_& m);

  explicit Bindings(Add add) { all().push_back(add); }

  static std::vector<Add>& all() {
    static std::vector<Add> bindings;
    return bindings;
  }
};

#define ANDMASK_BINDINGS(m)                       \
  static void add_bindings(pybind11::module_& m); \
  static const Bindings bindings(add_bindings);   \
  static void add_bindings(pybind11::module_& m)

}  // namespace andmask
