// Kernels of the column rules on numpy arrays, for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/ranking.h"
#include "bindings.h"

namespace py = pybind11;

namespace andmask {
namespace {

struct RankedFacts {
  bool fills_missing;
  Ranking (*rank)(const double* arguments, int64_t environments);
};

template <typename... Rules>
RankedFacts facts_of(int rule, RuleList<Rules...>) {
  const RankedFacts facts[] = {{Rules::kFillsMissing, make_ranking<Rules>}...};
  return facts[rule];
}

// Takes columns [0, splits[0]), [splits[0], splits[1]), ... in separate calls, as threads do.
py::array aggregate(const std::string& isa, const py::array& grads, const std::string& name,
                    const std::vector<double>& arguments, const std::optional<py::array>& noise,
                    const std::vector<int64_t>& splits) {
  if (grads.ndim() != 2) throw std::invalid_argument("grads: expected 2 dims");
  const int index = find_rule(name, ColumnRules());
  if (index < 0) throw std::invalid_argument("rule: there is no " + name);
  const RankedFacts rule = facts_of(index, ColumnRules());
  const int dtype = static_cast<int>(parse_dtype(grads));
  const int64_t columns = grads.shape(1);
  const std::vector<int64_t> shape = {columns};
  py::array out(grads.dtype(), shape);
  const bool is_double = parse_dtype(grads) == Dtype::float64;
  py::array wide =
      is_double ? py::array(py::array_t<double>(columns)) : py::array(py::array_t<float>(columns));
  ColumnTask task{};
  task.grads = grads.data();
  task.environments = grads.shape(0);
  task.stride = grads.strides(0) / grads.itemsize();
  task.arguments = arguments.data();
  task.noise = noise ? noise->data() : nullptr;
  task.out = rule.fills_missing ? wide.mutable_data() : out.mutable_data();
  const Ranking ranking = rule.rank(arguments.data(), task.environments);
  ranking.describe(task);
  const ColumnKernels& kernels = column_kernels(parse_isa(isa));
  Kept kept{};
  std::vector<int64_t> ends = splits;
  ends.push_back(columns);
  int64_t begin = 0;
  for (int64_t end : ends) {
    if (!kernels.aggregate[dtype][index](task, begin, end, &kept)) throw std::bad_alloc();
    begin = end;
  }
  if (rule.fills_missing) {
    kernels.fill[dtype](wide.data(), task.noise, kept.count > 0 ? kept.size / kept.count : 0,
                        out.mutable_data(), 0, columns);
  }
  return out;
}

}  // namespace

ANDMASK_BINDINGS(m) {
  m.def("aggregate", &aggregate, py::arg("isa"), py::arg("grads"), py::arg("rule"),
        py::arg("arguments") = std::vector<double>{}, py::arg("noise") = py::none(),
        py::arg("splits") = std::vector<int64_t>{});
}

}  // namespace andmask
