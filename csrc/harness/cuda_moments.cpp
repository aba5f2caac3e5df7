// The CUDA kernel bodies of moments and optimizer steps on lists of numpy arrays, thread by thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../tasks/steps.h"
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
  Arrays sum, votes, squares, logs, voters;

  MomentArrays of(size_t index) {
    return {pointer(sum, index),
            pointer(votes, index),
            votes.empty() ? 0 : static_cast<int>(votes[index].itemsize()),
            pointer(squares, index),
            pointer(logs, index),
            pointer(voters, index)};
  }
};

Moments moments_of(const py::dict& lists) {
  const auto get = [&](const char* name) {
    return lists.contains(name) ? lists[name].cast<Arrays>() : Arrays();
  };
  return {get("sum"), get("votes"), get("squares"), get("logs"), get("voters")};
}

// grads: arrays [environments, columns], rows contiguous.
void accumulate(const Arrays& grads, int64_t count, const py::dict& lists, const Numbers& weights) {
  Moments moments = moments_of(lists);
  std::vector<AccumulateTask> tasks;
  for (size_t i = 0; i < grads.size(); ++i) {
    tasks.push_back({.grads = grads[i].data(),
                     .rows = grads[i].shape(0),
                     .stride = grads[i].strides(0) / grads[i].itemsize(),
                     .weights = weights.empty() ? nullptr : weights.data(),
                     .count = count,
                     .moments = moments.of(i),
                     .dtype = parse_dtype(grads[i]),
                     .columns = grads[i].shape(1)});
  }
  run(HostStream(2), tasks);
}

// A rule on lists of moments. It must outlive the tasks, which point to its arguments.
struct Rule {
  int index;
  Numbers arguments;
  VoteTest test;
  int64_t count;
  Moments moments;
  bool rescale;
  std::optional<double> grad_scale;

  Rule(const std::string& name, const Numbers& arguments, int64_t count, const py::dict& lists,
       bool rescale, std::optional<double> grad_scale = {})
      : index(moment_rule(name)),
        arguments(arguments),
        test(parse_test(name, arguments)),
        count(count),
        moments(moments_of(lists)),
        rescale(rescale),
        grad_scale(grad_scale) {}
  Rule(const Rule&) = delete;

  Update update(size_t i) {
    return {.moments = moments.of(i),
            .sum_dtype = parse_dtype(moments.sum[i]),
            .arguments = arguments.data(),
            .count = count,
            .columns = moments.sum[i].shape(0),
            .rule = index,
            .test = test,
            .rescale = rescale,
            .grad_scale = grad_scale ? &*grad_scale : nullptr};
  }
};

void resolve(const std::string& name, const Numbers& arguments, int64_t count,
             const py::dict& lists, bool rescale, Arrays out) {
  Rule rule(name, arguments, count, lists, rescale);
  std::vector<ResolveTask> tasks;
  for (size_t i = 0; i < out.size(); ++i) tasks.push_back({rule.update(i), pointer(out, i)});
  run(HostStream(2), tasks);
}

double squared_norm(const std::string& name, const Numbers& arguments, int64_t count,
                    const py::dict& lists, bool rescale) {
  Rule rule(name, arguments, count, lists, rescale);
  double norm = 0;
  SquaredNormTask task{{}, &norm};
  for (size_t i = 0; i < rule.moments.sum.size(); ++i) task.updates.push_back(rule.update(i));
  run(HostStream(2), task);
  return norm;
}

void sgd(const std::string& name, const Numbers& arguments, int64_t count, const py::dict& lists,
         bool rescale, Arrays params, Arrays buffers, double lr, double momentum, double dampening,
         double weight_decay, bool decoupled, bool nesterov, bool maximize, bool first,
         std::optional<double> grad_scale) {
  Rule rule(name, arguments, count, lists, rescale, grad_scale);
  std::vector<SgdTask> tasks;
  for (size_t i = 0; i < params.size(); ++i) {
    tasks.push_back({.update = rule.update(i),
                     .param = pointer(params, i),
                     .dtype = parse_dtype(params[i]),
                     .momentum_buffer = pointer(buffers, i),
                     .lr = lr,
                     .momentum = momentum,
                     .dampening = dampening,
                     .weight_decay = weight_decay,
                     .decoupled_weight_decay = decoupled,
                     .nesterov = nesterov,
                     .maximize = maximize,
                     .first = first});
  }
  run(HostStream(2), tasks);
}

// With `sign_avgs`: the temporal AND-mask, which takes `tau` and a third beta.
void adam(const std::string& name, const Numbers& arguments, int64_t count, const py::dict& lists,
          bool rescale, Arrays params, Arrays exp_avgs, Arrays exp_avg_sqs, Arrays largest,
          Arrays sign_avgs, Arrays steps, double lr, const Numbers& betas, double eps,
          double weight_decay, bool decoupled, bool maximize, double tau, bool bias_correction,
          std::optional<double> grad_scale) {
  Rule rule(name, arguments, count, lists, rescale, grad_scale);
  std::vector<AdamTask> tasks;
  std::vector<TemporalAdamTask> temporal;
  for (size_t i = 0; i < params.size(); ++i) {
    const AdamTask task{.update = rule.update(i),
                        .param = pointer(params, i),
                        .dtype = parse_dtype(params[i]),
                        .exp_avg = pointer(exp_avgs, i),
                        .exp_avg_sq = pointer(exp_avg_sqs, i),
                        .max_exp_avg_sq = pointer(largest, i),
                        .lr = lr,
                        .beta1 = betas.at(0),
                        .beta2 = betas.at(1),
                        .eps = eps,
                        .weight_decay = weight_decay,
                        .decoupled_weight_decay = decoupled,
                        .maximize = maximize,
                        .step = static_cast<float*>(pointer(steps, i))};
    tasks.push_back(task);
    if (sign_avgs.empty()) continue;
    temporal.push_back({task, pointer(sign_avgs, i), betas.at(2), 1, tau, bias_correction});
  }
  if (sign_avgs.empty()) {
    run(HostStream(2), tasks);
  } else {
    run(HostStream(2), temporal);
  }
}

}  // namespace

ANDMASK_BINDINGS(m) {
  m.def("cuda_accumulate", &accumulate, py::arg("grads"), py::arg("count"), py::arg("moments"),
        py::arg("weights") = Numbers());
  m.def("cuda_resolve", &resolve);
  m.def("cuda_squared_norm", &squared_norm);
  m.def("cuda_sgd", &sgd, py::arg("rule"), py::arg("arguments"), py::arg("count"),
        py::arg("moments"), py::arg("rescale"), py::arg("params"), py::arg("momentum_buffers"),
        py::arg("lr"), py::arg("momentum") = 0.0, py::arg("dampening") = 0.0,
        py::arg("weight_decay") = 0.0, py::arg("decoupled_weight_decay") = false,
        py::arg("nesterov") = false, py::arg("maximize") = false, py::arg("first") = false,
        py::arg("grad_scale") = py::none());
  m.def("cuda_adam", &adam, py::arg("rule"), py::arg("arguments"), py::arg("count"),
        py::arg("moments"), py::arg("rescale"), py::arg("params"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("sign_avgs"), py::arg("steps"),
        py::arg("lr"), py::arg("betas"), py::arg("eps") = 1e-8, py::arg("weight_decay") = 0.0,
        py::arg("decoupled_weight_decay") = false, py::arg("maximize") = false,
        py::arg("tau") = 0.0, py::arg("bias_correction") = true,
        py::arg("grad_scale") = py::none());
}

}  // namespace andmask
