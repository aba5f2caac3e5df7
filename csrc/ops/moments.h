// The ops _accumulate_, _resolve, _resolve_, _squared_norm and _vote_thresholds: checks and layout.
#pragma once

#include <tuple>

#include "moment_lists.h"

namespace andmask {

inline void check_like_grad(const char* op, const char* name, size_t index, const Tensor& moment,
                            const Tensor& grad, int64_t skip, ScalarType wide) {
  if (!same_shape(grad, moment, skip)) {
    fail(op, "expected ", name, "[", index, "] of shape ", shape_text(moment),
         skip ? " after the environments" : "", " in grads[", index, "], but got ",
         shape_text(grad));
  }
  if (moment.scalar_type() != wide) {
    fail(op, "expected ", name, "[", index, "] of dtype ", dtype_text(wide), ", but got ",
         dtype_text(moment));
  }
  check_writable(op, name, index, moment);
}

template <typename Device>
void accumulate(Tensors sum, Tensors votes, Tensors squares, Tensors logs, Tensors voters,
                Tensors grads, int64_t count, std::vector<double> weights, bool stacked) {
  const char* const op = "andmask::_accumulate_";
  const size_t size = grads.size();
  const auto check_size = [&](const char* name, const Tensors& list, bool optional) {
    check(list.size() == size || (optional && list.empty()), op, "expected ", name, " of ", size,
          " tensors, as grads has, but got ", list.size());
  };
  check_size("sum", sum, false);
  check_size("votes", votes, true);
  check_size("squares", squares, true);
  check_size("logs", logs, true);
  check_size("voters", voters, true);
  if (size == 0) return;
  check(!stacked || grads[0].dim() >= 1, op,
        "expected grads[0] of shape [environments, *shape], but got a 0-dim tensor");
  const int64_t rows = stacked ? grads[0].size(0) : 1;
  const int64_t skip = stacked ? 1 : 0;
  check(rows >= 1, op, "expected grads of at least 1 environment (dim 0), but got 0");
  check_count(op, count, rows);
  check_weights(op, weights, rows);
  const Device device(op, grads[0]);
  MomentLists lists{sum, votes, squares, logs, voters};
  check_here(device, {{"grads", grads},
                      {"sum", sum},
                      {"votes", votes},
                      {"squares", squares},
                      {"logs", logs},
                      {"voters", voters}});
  std::vector<AccumulateTask> tasks;
  for (size_t i = 0; i < size; ++i) {
    const Dtype dtype = check_dtype(op, "grads", grads[i], i);
    const ScalarType wide = wide_type(dtype);
    check_like_grad(op, "sum", i, sum[i], grads[i], skip, wide);
    if (stacked && grads[i].size(0) != rows) {
      fail(op, "expected ", rows, " environments (dim 0), as grads[0] has, in grads[", i,
           "], but got ", grads[i].size(0));
    }
    if (!votes.empty()) {
      check_votes(op, i, votes[i], count + rows);
      check_like_grad(op, "votes", i, votes[i], grads[i], skip, votes[i].scalar_type());
    }
    if (!voters.empty()) {
      check_voters(op, lists, i);
      check_like_grad(op, "voters", i, voters[i], grads[i], skip, voters[i].scalar_type());
    }
    if (!squares.empty()) check_like_grad(op, "squares", i, squares[i], grads[i], skip, wide);
    if (!logs.empty()) check_like_grad(op, "logs", i, logs[i], grads[i], skip, wide);
    tasks.push_back({.rows = rows,
                     .weights = weights.empty() ? nullptr : weights.data(),
                     .count = count,
                     .dtype = dtype,
                     .columns = sum[i].numel()});
  }

  Aligned aligned;
  for (size_t i = 0; i < size; ++i) {
    aligned.align(lists.tensors(i), {&grads[i]}, skip);
    tasks[i].grads = grads[i].const_data_ptr();
    tasks[i].stride = stacked ? grads[i].stride(0) : 0;
    tasks[i].moments = moment_arrays(lists, i);
  }
  run(device, tasks);
  aligned.copy_back();
}

// The tasks of resolve, once all tensors are aligned.
inline std::vector<ResolveTask> resolve_tasks(std::vector<Update> updates, const MomentLists& lists,
                                              const Tensors& out) {
  set_moments(updates, lists);
  std::vector<ResolveTask> tasks;
  for (size_t i = 0; i < updates.size(); ++i) {
    tasks.push_back({updates[i], out[i].mutable_data_ptr()});
  }
  return tasks;
}

template <typename Device>
Tensors resolve(Tensors sum, Tensors votes, Tensors squares, Tensors logs, Tensors voters,
                int64_t count, std::string rule, std::vector<double> arguments, bool rescale) {
  const char* const op = "andmask::_resolve";
  MomentLists lists{sum, votes, squares, logs, voters};
  const std::vector<Update> updates = check_updates(op, lists, count, rule, arguments, rescale);
  Tensors out;
  if (sum.empty()) return out;
  const Device device(op, sum[0]);
  check_here(
      device,
      {{"sum", sum}, {"votes", votes}, {"squares", squares}, {"logs", logs}, {"voters", voters}});
  for (const Tensor& total : sum) out.push_back(torch::stable::empty_like(total));
  Tensors written = out;
  Aligned aligned;
  for (size_t i = 0; i < sum.size(); ++i) aligned.align({&written[i]}, lists.tensors(i));
  run(device, resolve_tasks(updates, lists, written));
  aligned.copy_back();
  return out;
}

template <typename Device>
void resolve_in_place(Tensors sum, Tensors votes, Tensors squares, Tensors logs, Tensors voters,
                      int64_t count, std::string rule, std::vector<double> arguments,
                      bool rescale) {
  const char* const op = "andmask::_resolve_";
  MomentLists lists{sum, votes, squares, logs, voters};
  const std::vector<Update> updates = check_updates(op, lists, count, rule, arguments, rescale);
  if (sum.empty()) return;
  const Device device(op, sum[0]);
  check_here(
      device,
      {{"sum", sum}, {"votes", votes}, {"squares", squares}, {"logs", logs}, {"voters", voters}});
  for (size_t i = 0; i < sum.size(); ++i) check_writable(op, "sum", i, sum[i]);
  Aligned aligned;
  for (size_t i = 0; i < sum.size(); ++i) {
    std::vector<Tensor*> read = lists.tensors(i);
    read.erase(read.begin());
    aligned.align({&lists.sum[i]}, read);
  }
  run(device, resolve_tasks(updates, lists, lists.sum));
  aligned.copy_back();
}

// Returns thresholds [tensors, count + 1] by voters, or [tensors, 1] where zeros count, and the
// numbers of coordinates that they keep and that could be kept, [tensors].
template <typename Device>
std::tuple<Tensor, Tensor, Tensor> vote_thresholds(Tensors votes, Tensors voters, int64_t count,
                                                   double level, int64_t criterion, bool abstain) {
  const char* const op = "andmask::_vote_thresholds";
  check(!votes.empty(), op, "expected votes of at least 1 tensor, but got 0");
  check_count(op, count);
  check(criterion >= 0 && criterion < kCriteria, op,
        "expected criterion 0 (tau), 1 (significance) or 2 (fdr), but got ", criterion);
  const VoteTest test{static_cast<Criterion>(criterion), level, abstain};
  check_test(op, test, count);
  check(voters.size() == (abstain ? votes.size() : 0), op, "expected voters of ",
        abstain ? votes.size() : 0, " tensors (they are for zeros that abstain), but got ",
        voters.size());
  const Device device(op, votes[0]);
  check_here(device, {{"votes", votes}, {"voters", voters}});
  MomentLists lists{{}, votes, {}, {}, voters};
  VoteThresholdsTask task;
  for (size_t i = 0; i < votes.size(); ++i) {
    check_votes(op, static_cast<int64_t>(i), votes[i], count);
    std::vector<Tensor*> read = {&lists.votes[i]};
    if (abstain) {
      check_voters(op, lists, i);
      read.push_back(&lists.voters[i]);
    }
    Aligned().align({}, read);
    task.updates.push_back({.moments = {.votes = lists.votes[i].mutable_data_ptr(),
                                        .vote_bytes = static_cast<int>(votes[i].element_size()),
                                        .voters = pointer(lists.voters, i)},
                            .count = count,
                            .columns = votes[i].numel(),
                            .rule = kAndMask,
                            .test = test});
  }
  const int64_t tensors = static_cast<int64_t>(votes.size());
  Tensor thresholds = torch::stable::new_empty(
      votes[0], std::vector<int64_t>{tensors, abstain ? count + 1 : 1}, ScalarType::Int);
  Tensor kept = torch::stable::new_empty(votes[0], std::vector<int64_t>{tensors}, ScalarType::Long);
  Tensor tested =
      torch::stable::new_empty(votes[0], std::vector<int64_t>{tensors}, ScalarType::Long);
  task.thresholds = static_cast<int32_t*>(thresholds.mutable_data_ptr());
  task.kept = static_cast<int64_t*>(kept.mutable_data_ptr());
  task.tested = static_cast<int64_t*>(tested.mutable_data_ptr());
  run(device, task);
  return {thresholds, kept, tested};
}

template <typename Device>
Tensor squared_norm(Tensors sum, Tensors votes, Tensors squares, Tensors logs, Tensors voters,
                    int64_t count, std::string rule, std::vector<double> arguments, bool rescale) {
  const char* const op = "andmask::_squared_norm";
  check(!sum.empty(), op, "expected sum of at least 1 tensor, but got 0");
  MomentLists lists{sum, votes, squares, logs, voters};
  SquaredNormTask task{check_updates(op, lists, count, rule, arguments, rescale)};
  const Device device(op, sum[0]);
  check_here(
      device,
      {{"sum", sum}, {"votes", votes}, {"squares", squares}, {"logs", logs}, {"voters", voters}});
  for (size_t i = 0; i < sum.size(); ++i) Aligned().align({}, lists.tensors(i));
  set_moments(task.updates, lists);
  Tensor out = torch::stable::new_empty(sum[0], std::vector<int64_t>(), ScalarType::Double);
  task.out = static_cast<double*>(out.mutable_data_ptr());
  run(device, task);
  return out;
}

}  // namespace andmask
