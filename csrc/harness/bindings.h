// Helpers that the files of the test harness share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/kernels/dispatch.h"
#include "../math/columns.h"
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

// Throws where there is no rule on moments of that name.
int moment_rule(const std::string& name);

void bind_aggregate(pybind11::module_& m);
void bind_cuda_aggregate(pybind11::module_& m);
void bind_cuda_masked_mean(pybind11::module_& m);
void bind_cuda_moments(pybind11::module_& m);
void bind_elementary(pybind11::module_& m);
void bind_moments(pybind11::module_& m);
void bind_outer(pybind11::module_& m);
void bind_sign_outer(pybind11::module_& m);
void bind_vote_histogram(pybind11::module_& m);

}  // namespace andmask
