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
  const bool votes = std::string(name) == "votes" || std::string(name) == "voters";
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

void check_voters(const char* op, const MomentLists& lists, size_t i) {
  check(lists.votes.size() == lists.voters.size(), op,
        "expected votes beside voters, but got none");
  if (lists.voters[i].scalar_type() != lists.votes[i].scalar_type()) {
    fail(op, "expected voters[", i, "] of dtype ", dtype_text(lists.votes[i].scalar_type()),
         ", as votes[", i, "] has, but got ", dtype_text(lists.voters[i].scalar_type()));
  }
}

MomentArrays moment_arrays(const MomentLists& lists, int64_t index) {
  return {pointer(lists.sum, index),
          pointer(lists.votes, index),
          lists.votes.empty() ? 0 : static_cast<int>(lists.votes[index].element_size()),
          pointer(lists.squares, index),
          pointer(lists.logs, index),
          pointer(lists.voters, index)};
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
  const VoteTest test = test_of(op, info, arguments, count);
  check_moment(op, "votes", lists.votes, lists.sum, info.moments & kVotes, rule);
  check_moment(op, "squares", lists.squares, lists.sum, info.moments & kSquares, rule);
  check_moment(op, "logs", lists.logs, lists.sum, info.moments & kLogs, rule);
  check_moment(op, "voters", lists.voters, lists.sum, test.abstain, rule + " whose zeros abstain");
  for (size_t i = 0; i < lists.voters.size(); ++i) check_voters(op, lists, i);
  std::vector<Update> updates;
  for (size_t i = 0; i < lists.sum.size(); ++i) {
    updates.push_back({.sum_dtype = check_dtype(op, "sum", lists.sum[i], i),
                       .arguments = arguments.data(),
                       .count = count,
                       .columns = lists.sum[i].numel(),
                       .rule = info.moment_rule,
                       .test = test,
                       .rescale = rescale});
  }
  return updates;
}

void set_moments(std::vector<Update>& updates, const MomentLists& lists) {
  for (size_t i = 0; i < updates.size(); ++i) updates[i].moments = moment_arrays(lists, i);
}

}  // namespace andmask
