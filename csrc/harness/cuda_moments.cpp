// The CUDA kernel bodies of moments and optimizer steps on lists of numpy arrays, thread by thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cuda/launchers.h"
#include "../math/rules.h"
#include "bindings.h"
#include "host_stream.h"

namespace py = pybind11;

namespace andmask {
namespace {

using Arrays = std::vector<py::array>;
using Numbers = std::vector<double>;

void* pointer(Arrays& list, size_t index) {
  return list.empty() ? nullptr : list[index].mutable_data();
}

// Lists of moments; those that are not kept are empty.
struct Moments {
  Arrays sum, votes, squares, logs;

  MomentArrays of(size_t index) {
    return {pointer(sum, index), pointer(votes, index),
            votes.empty() ? 0 : static_cast<int>(votes[index].itemsize()), pointer(squares, index),
            pointer(logs, index)};
  }
};

Moments moments_of(const py::dict& lists) {
  const auto get = [&](const char* name) {
    return lists.contains(name) ? lists[name].cast<Arrays>() : Arrays();
  };
  return {get("sum"), get("votes"), get("squares"), get("logs")};
}

// grads: arrays [environments, columns], rows contiguous.
void accumulate(const Arrays& grads, int64_t count, const py::dict& lists, const Numbers& weights) {
  Moments moments = moments_of(lists);
  AccumulateList list;
  for (size_t i = 0; i < grads.size(); ++i) {
    list.tasks.push_back({grads[i].data(), grads[i].shape(0),
                          grads[i].strides(0) / grads[i].itemsize(),
                          weights.empty() ? nullptr : weights.data(), count, moments.of(i)});
    list.dtypes.push_back(parse_dtype(grads[i]));
    list.sizes.push_back(grads[i].shape(1));
  }
  launch_accumulate(HostStream(2), list);
}

template <typename... Rules>
int rule_index(const std::string& wanted, RuleList<Rules...>) {
  const std::vector<std::string> names = {Rules::kName...};
  for (size_t index = 0; index < names.size(); ++index) {
    if (names[index] == wanted) return static_cast<int>(index);
  }
  throw std::invalid_argument("rule: there is no " + wanted);
}

// A rule on lists of moments.
struct Updates {
  Moments moments;
  Numbers arguments;
  UpdateList list;

  Updates(const std::string& rule, const Numbers& given, int64_t count, const py::dict& lists,
          bool rescale)
      : moments(moments_of(lists)), arguments(given) {
    list.rule = rule_index(rule, MomentRules());
    list.rescale = rescale;
    for (size_t i = 0; i < moments.sum.size(); ++i) {
      list.tasks.push_back({moments.of(i), parse_dtype(moments.sum[i]), arguments.data(), count});
      list.sizes.push_back(moments.sum[i].shape(0));
    }
  }
  Updates(const Updates&) = delete;
};

std::vector<Dtype> dtypes_of(const Arrays& arrays) {
  std::vector<Dtype> dtypes;
  for (const py::array& array : arrays) dtypes.push_back(parse_dtype(array));
  return dtypes;
}

void resolve(const std::string& rule, const Numbers& arguments, int64_t count,
             const py::dict& lists, bool rescale, Arrays out) {
  const Updates updates(rule, arguments, count, lists, rescale);
  std::vector<void*> pointers;
  for (size_t i = 0; i < out.size(); ++i) pointers.push_back(pointer(out, i));
  launch_resolve(HostStream(2), updates.list, pointers);
}

void sgd(const std::string& rule, const Numbers& arguments, int64_t count, const py::dict& lists,
         bool rescale, Arrays params, Arrays buffers, double lr, double momentum, double dampening,
         double weight_decay, bool decoupled, bool nesterov, bool maximize, bool first) {
  const Updates updates(rule, arguments, count, lists, rescale);
  std::vector<SgdTask> tasks;
  for (size_t i = 0; i < params.size(); ++i) {
    tasks.push_back({pointer(params, i), pointer(buffers, i), lr, momentum, dampening, weight_decay,
                     decoupled, nesterov, maximize, first});
  }
  launch_sgd(HostStream(2), updates.list, tasks, dtypes_of(params));
}

// With `sign_avgs`: the temporal AND-mask, and `tau` and a third beta count.
void adam(const std::string& rule, const Numbers& arguments, int64_t count, const py::dict& lists,
          bool rescale, Arrays params, Arrays exp_avgs, Arrays exp_avg_sqs, Arrays largest,
          Arrays sign_avgs, Arrays steps, double lr, const Numbers& betas, double eps,
          double weight_decay, bool decoupled, bool maximize, double tau, bool bias_correction) {
  const Updates updates(rule, arguments, count, lists, rescale);
  std::vector<AdamTask> tasks;
  std::vector<TemporalAdamTask> temporal;
  for (size_t i = 0; i < params.size(); ++i) {
    AdamTask task{};
    task.param = pointer(params, i);
    task.exp_avg = pointer(exp_avgs, i);
    task.exp_avg_sq = pointer(exp_avg_sqs, i);
    task.max_exp_avg_sq = pointer(largest, i);
    task.lr = lr;
    task.beta1 = betas.at(0);
    task.beta2 = betas.at(1);
    task.eps = eps;
    task.weight_decay = weight_decay;
    task.decoupled_weight_decay = decoupled;
    task.maximize = maximize;
    task.step = static_cast<float*>(pointer(steps, i));
    tasks.push_back(task);
    if (sign_avgs.empty()) continue;
    temporal.push_back({task, pointer(sign_avgs, i), betas.at(2), 0, tau, bias_correction});
  }
  if (sign_avgs.empty()) {
    launch_adam(HostStream(2), updates.list, tasks, dtypes_of(params));
  } else {
    launch_temporal_adam(HostStream(2), updates.list, temporal, dtypes_of(params));
  }
}

}  // namespace

void bind_cuda_moments(py::module_& m) {
  m.def("cuda_accumulate", &accumulate, py::arg("grads"), py::arg("count"), py::arg("moments"),
        py::arg("weights") = Numbers());
  m.def("cuda_resolve", &resolve);
  m.def("cuda_sgd", &sgd, py::arg("rule"), py::arg("arguments"), py::arg("count"),
        py::arg("moments"), py::arg("rescale"), py::arg("params"), py::arg("momentum_buffers"),
        py::arg("lr"), py::arg("momentum") = 0.0, py::arg("dampening") = 0.0,
        py::arg("weight_decay") = 0.0, py::arg("decoupled_weight_decay") = false,
        py::arg("nesterov") = false, py::arg("maximize") = false, py::arg("first") = false);
  m.def("cuda_adam", &adam, py::arg("rule"), py::arg("arguments"), py::arg("count"),
        py::arg("moments"), py::arg("rescale"), py::arg("params"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("sign_avgs"), py::arg("steps"),
        py::arg("lr"), py::arg("betas"), py::arg("eps") = 1e-8, py::arg("weight_decay") = 0.0,
        py::arg("decoupled_weight_decay") = false, py::arg("maximize") = false,
        py::arg("tau") = 0.0, py::arg("bias_correction") = true);
}

}  // namespace andmask
