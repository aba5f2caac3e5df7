// Moments in, updates out: what `resolve` and the optimizer steps share.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "kernels/moments.h"
#include "tensors.h"

namespace andmask {

// The moments of a list of parameters. Those that are not kept are empty lists.
struct MomentLists {
  Tensors sum, votes, squares, logs;

  // Those of one parameter.
  std::vector<Tensor*> tensors(int64_t index) {
    std::vector<Tensor*> found;
    for (Tensors* list : {&sum, &votes, &squares, &logs}) {
      if (!list->empty()) found.push_back(&(*list)[index]);
    }
    return found;
  }
};

// What the library knows of a moment rule, by name.
struct RuleInfo {
  const char* name;
  int arguments;
  unsigned moments;
  const char* (*invalid)(const double* arguments);
};

// Index in MomentRules; checks name and arguments.
int find_rule(const char* op, const std::string& name, const std::vector<double>& arguments);
const RuleInfo& rule_info(int rule);

MomentArrays moment_arrays(const MomentLists& lists, int64_t index);

// Goes over the memory of several tensors as over one row. Where their layouts differ, contiguous
// copies stand in for them, and those that are written to are copied back at the end.
class Aligned {
 public:
  // The first `skip` dimensions of those that are only read are left aside.
  void align(const std::vector<Tensor*>& written, const std::vector<Tensor*>& read,
             int64_t skip = 0);
  void copy_back();

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;  // original, stand-in
};

// Updates of a list of parameters, block by block.
class Resolver {
 public:
  // `sum` may also be a list of plain gradients, in 16 bits too.
  Resolver(const char* op, const MomentLists& lists, int64_t count, const std::string& rule,
           const std::vector<double>& arguments, bool rescale);

  Dtype dtype(int64_t index) const { return dtypes_[index]; }

  // consume(index, begin, end, update): `update` holds columns [begin, end) in the wide type and is
  // in L1. The moments must be aligned.
  template <typename Consume>
  void run(const Consume& consume) const {
    const std::vector<ResolveTask> tasks = this->tasks();
    const std::vector<double> scales = this->scales(tasks);
    units_.parallel(1, [&](int64_t index, int64_t, int64_t begin, int64_t end) {
      alignas(64) unsigned char update[kUpdateBlock * sizeof(double)];
      const ResolveTask& task = tasks[index];
      const auto resolve = kernels_.resolve[width(task.sum_dtype)][rule_];
      for (int64_t block = begin; block < end; block += kUpdateBlock) {
        const int64_t stop = std::min(block + kUpdateBlock, end);
        resolve(task, scales[index], block, stop, update);
        consume(index, block, stop, static_cast<const void*>(update));
      }
    });
  }

 private:
  static int width(Dtype dtype) {
    return static_cast<int>(dtype == Dtype::float64 ? Width::float64 : Width::float32);
  }

  std::vector<ResolveTask> tasks() const;
  std::vector<double> scales(const std::vector<ResolveTask>& tasks) const;

  const MomentLists& lists_;
  const int64_t count_;
  const int rule_;
  const std::vector<double>& arguments_;
  const bool rescale_;
  std::vector<Dtype> dtypes_;
  Units units_;
  const MomentKernels& kernels_;
};

}  // namespace andmask
