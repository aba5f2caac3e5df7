// Test harness: the torch-free kernels on numpy arrays, for every instruction set of this machine.
// Built for editable installs only; wheels leave it out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernels/masked_mean.h"
#include "../math/agreement.h"
#include "bindings.h"

namespace py = pybind11;

namespace andmask {
namespace {

const std::vector<Isa> kIsas = {Isa::baseline, Isa::v3, Isa::v4};

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (isa <= best_isa()) names.push_back(name(isa));
  }
  return names;
}

}  // namespace

Isa parse_isa(const std::string& wanted) {
  for (Isa isa : kIsas) {
    if (wanted == name(isa) && isa <= best_isa()) return isa;
  }
  throw std::invalid_argument("isa: this machine has no " + wanted);
}

Dtype parse_dtype(const py::array& array) {
  if (py::isinstance<py::array_t<uint16_t>>(array)) return Dtype::bfloat16;
  if (py::isinstance<py::array_t<float>>(array)) return Dtype::float32;
  if (py::isinstance<py::array_t<double>>(array)) return Dtype::float64;
  if (array.dtype().kind() == 'f' && array.itemsize() == 2) return Dtype::float16;
  throw std::invalid_argument("grads: expected float16, float32, float64, or bfloat16 as uint16");
}

Output parse_output(const std::string& name) {
  return name == "masked_mean"        ? Output::masked_mean
         : name == "masked_mean_wide" ? Output::masked_mean_wide
                                      : Output::mask;
}

int moment_rule(const std::string& name) {
  const int rule = find_rule(name, MomentRules());
  if (rule < 0) throw std::invalid_argument("rule: there is no " + name);
  return rule;
}

VoteTest parse_test(const std::string& rule, const std::vector<double>& arguments) {
  const int index = moment_rule(rule);
  if (!tests_votes(index, MomentRules())) return {};
  const size_t own = rule == SandMask::kName ? SandMask::kArguments : Voting::kArguments;
  if (arguments.size() < own + 2) return {Criterion::tau, arguments.at(0), false};
  return {static_cast<Criterion>(static_cast<int>(arguments[own])), arguments[0],
          arguments[own + 1] != 0};
}

namespace {

py::array wide_like(const py::array& grads, int64_t columns) {
  return parse_dtype(grads) == Dtype::float64 ? py::array(py::array_t<double>(columns))
                                              : py::array(py::array_t<float>(columns));
}

// Takes columns [0, splits[0]), [splits[0], splits[1]), ... in separate calls, as threads do.
py::tuple masked_mean(const std::string& isa, const py::array& grads, int32_t threshold,
                      const std::string& output, const std::vector<int64_t>& splits) {
  if (grads.ndim() != 2) throw std::invalid_argument("grads: expected 2 dims");
  const int64_t columns = grads.shape(1);
  if (columns > 1 && grads.strides(1) != grads.itemsize()) {
    throw std::invalid_argument("grads: expected contiguous rows");
  }
  const bool rounded = output == "masked_mean";
  py::array out =
      rounded ? py::array(grads.dtype(), std::vector<int64_t>{columns}) : wide_like(grads, columns);
  const MaskedMeanTask task{.grads = grads.data(),
                            .environments = grads.shape(0),
                            .stride = grads.strides(0) / grads.itemsize(),
                            .threshold = threshold,
                            .output = parse_output(output),
                            .out = out.mutable_data()};
  const auto reduce =
      masked_mean_kernels(parse_isa(isa)).reduce[static_cast<int>(parse_dtype(grads))];
  int64_t kept = 0;
  int64_t begin = 0;
  for (int64_t end : splits) {
    kept += reduce(task, begin, end);
    begin = end;
  }
  kept += reduce(task, begin, columns);
  return py::make_tuple(out, kept);
}

// `like` gives the element type of the result.
py::array scale(const std::string& isa, const py::array& unscaled, double factor,
                const py::array& like) {
  py::array out(like.dtype(), std::vector<int64_t>{unscaled.shape(0)});
  masked_mean_kernels(parse_isa(isa))
      .scale[static_cast<int>(parse_dtype(like))](unscaled.data(), factor, out.mutable_data(), 0,
                                                  unscaled.shape(0));
  return out;
}

}  // namespace

ANDMASK_BINDINGS(m) {
  m.def("isas", &isas);
  m.def("masked_mean", &masked_mean, py::arg("isa"), py::arg("grads"), py::arg("threshold"),
        py::arg("output") = "masked_mean", py::arg("splits") = std::vector<int64_t>{});
  m.def("scale", &scale);
  m.def("sign_test_tail",
        [](int64_t votes, int64_t voters) { return SignTest(voters).tail(votes); });
  m.def("vote_threshold",
        [](double tau, int64_t environments) { return vote_threshold(tau, environments); });
  m.def("inverse_density", [](double kept, double count) { return inverse_density(kept, count); });
}

}  // namespace andmask

PYBIND11_MODULE(_harness, m) {
  for (const auto add : andmask::Bindings::all()) add(m);
}
