// Lists of parameters' moments: what accumulate_, resolve and the optimizer steps share.
#pragma once

#include <string>
#include <vector>

#include "../tasks/moments.h"
#include "checks.h"
#include "rules.h"

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

// Checks the moments and the rule. Returns an update for each tensor, without the memory of its
// moments: set_moments adds that once they are aligned. `arguments` must live as long as the
// updates. `sum` may also be a list of plain gradients, in 16 bits too.
std::vector<Update> check_updates(const char* op, const MomentLists& lists, int64_t count,
                                  const std::string& rule, const std::vector<double>& arguments,
                                  bool rescale);
void set_moments(std::vector<Update>& updates, const MomentLists& lists);

}  // namespace andmask
