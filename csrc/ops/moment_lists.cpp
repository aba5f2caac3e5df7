#include "moment_lists.h"

namespace andmask {
namespace {

// Checks that a list of moments is empty, or has the length and the shapes of the sums and a dtype
// that fits.
void check_moment(const char* op, const char* name, const Tensors& moment, const Tensors& sum,
                  bool needed, const std::string& rule) {
  if (moment.empty() && !needed) return;
  check(moment.size() == sum.size(), op, "expected ", name, " of ", sum.size(),
        " tensors, as sum has", needed ? " (rule " + rule + " needs them)" : std::string(),
        ", but got ", moment.size());
  const bool votes = std::string(name) == "votes";
  for (size_t i = 0; i < sum.size(); ++i) {
    if (!same_shape(moment[i], sum[i])) {
      fail(op, "expected ", name, "[", i, "] of shape ", shape_text(sum[i]), ", as sum[", i,
           "] has, but got ", shape_text(moment[i]));
    }
    const ScalarType dtype = moment[i].scalar_type();
    const bool fits =
        votes ? dtype == ScalarType::Char || dtype == ScalarType::Short || dtype == ScalarType::Int
              : dtype == (sum[i].scalar_type() == ScalarType::Double ? ScalarType::Double
                                                                     : ScalarType::Float);
    if (!fits) {
      fail(op, "expected ", name, "[", i, "] of dtype ",
           votes ? "int8, int16 or int32" : "float32, or float64 where sum is", ", but got ",
           dtype_text(dtype));
    }
  }
}

}  // namespace

MomentArrays moment_arrays(const MomentLists& lists, int64_t index) {
  const auto pointer = [index](const Tensors& list) {
    return list.empty() ? nullptr : list[index].mutable_data_ptr();
  };
  return {pointer(lists.sum), pointer(lists.votes),
          lists.votes.empty() ? 0 : static_cast<int>(lists.votes[index].element_size()),
          pointer(lists.squares), pointer(lists.logs)};
}

void Aligned::align(const std::vector<Tensor*>& written, const std::vector<Tensor*>& read,
                    int64_t skip) {
  const Tensor& first = written.empty() ? *read.front() : *written.front();
  bool aligned = is_dense(first);
  for (const Tensor* tensor : written) aligned = aligned && same_layout(*tensor, first);
  for (const Tensor* tensor : read) aligned = aligned && same_layout(*tensor, first, skip);
  if (aligned) return;
  for (Tensor* tensor : read) *tensor = torch::stable::contiguous(*tensor);
  for (Tensor* tensor : written) {
    if (tensor->is_contiguous()) continue;
    const Tensor original = *tensor;
    *tensor = torch::stable::contiguous(original);
    copies_.emplace_back(original, *tensor);
  }
}

void Aligned::copy_back() {
  for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
}

std::vector<Update> check_updates(const char* op, const MomentLists& lists, int64_t count,
                                  const std::string& rule, const std::vector<double>& arguments,
                                  bool rescale) {
  check_count(op, count);
  const RuleInfo& info = find_rule(op, rule, arguments, count, /*on_moments=*/true);
  check_moment(op, "votes", lists.votes, lists.sum, info.moments & kVotes, rule);
  check_moment(op, "squares", lists.squares, lists.sum, info.moments & kSquares, rule);
  check_moment(op, "logs", lists.logs, lists.sum, info.moments & kLogs, rule);
  std::vector<Update> updates;
  for (size_t i = 0; i < lists.sum.size(); ++i) {
    updates.push_back({.sum_dtype = check_dtype(op, "sum", lists.sum[i], i),
                       .arguments = arguments.data(),
                       .count = count,
                       .columns = lists.sum[i].numel(),
                       .rule = info.moment_rule,
                       .rescale = rescale});
  }
  return updates;
}

void set_moments(std::vector<Update>& updates, const MomentLists& lists) {
  for (size_t i = 0; i < updates.size(); ++i) updates[i].moments = moment_arrays(lists, i);
}

}  // namespace andmask
