#include "lists.h"

#include <limits>

namespace andmask {
namespace {

template <typename... Rules>
const std::vector<RuleInfo>& infos(RuleList<Rules...>) {
  static const std::vector<RuleInfo> all = {
      {Rules::kName, Rules::kArguments, Rules::kMoments, Rules::invalid}...};
  return all;
}

// A list of moments is empty, or as long as the sums, of their shapes and of the right dtype.
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
    const bool right =
        votes ? dtype == ScalarType::Char || dtype == ScalarType::Short || dtype == ScalarType::Int
              : dtype == (sum[i].scalar_type() == ScalarType::Double ? ScalarType::Double
                                                                     : ScalarType::Float);
    if (!right) {
      fail(op, "expected ", name, "[", i, "] of dtype ",
           votes ? "int8, int16 or int32" : "float32, or float64 where sum is", ", but got ",
           torch::headeronly::toString(dtype));
    }
  }
}

}  // namespace

const RuleInfo& rule_info(int rule) { return infos(MomentRules())[rule]; }

int find_rule(const char* op, const std::string& name, const std::vector<double>& arguments) {
  const auto& all = infos(MomentRules());
  std::string names;
  for (size_t index = 0; index < all.size(); ++index) {
    const RuleInfo& rule = all[index];
    if (name != rule.name) {
      if (index) names += ", ";
      names += rule.name;
      continue;
    }
    check(arguments.size() == static_cast<size_t>(rule.arguments), op, "expected ", rule.arguments,
          " argument(s) of rule ", name, ", but got ", arguments.size());
    const char* const invalid = rule.invalid(arguments.data());
    std::string got;
    for (double argument : arguments) got += " " + std::to_string(argument);
    check(!invalid, op, invalid, " for rule ", name, ", but got", got);
    return static_cast<int>(index);
  }
  fail(op, "expected a rule on moments (", names, "), but got ", name);
}

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
  for (auto& [original, stand_in] : copies_) torch::stable::copy_(original, stand_in);
}

UpdateList update_list(const char* op, const MomentLists& lists, int64_t count,
                       const std::string& rule, const std::vector<double>& arguments,
                       bool rescale) {
  UpdateList updates;
  updates.rule = find_rule(op, rule, arguments);
  updates.rescale = rescale;
  check(count >= 1 && count <= std::numeric_limits<int32_t>::max(), op,
        "expected count in [1, 2^31 - 1], but got ", count);
  const unsigned needs = rule_info(updates.rule).moments;
  check_moment(op, "votes", lists.votes, lists.sum, needs & kVotes, rule);
  check_moment(op, "squares", lists.squares, lists.sum, needs & kSquares, rule);
  check_moment(op, "logs", lists.logs, lists.sum, needs & kLogs, rule);
  updates.tasks.reserve(lists.sum.size());
  for (size_t i = 0; i < lists.sum.size(); ++i) {
    updates.tasks.push_back({{}, check_dtype(op, "sum", lists.sum[i], i), arguments.data(), count});
    updates.sizes.push_back(lists.sum[i].numel());
  }
  return updates;
}

void set_moments(UpdateList& updates, const MomentLists& lists) {
  for (size_t i = 0; i < updates.tasks.size(); ++i) {
    updates.tasks[i].moments = moment_arrays(lists, i);
  }
}

}  // namespace andmask
