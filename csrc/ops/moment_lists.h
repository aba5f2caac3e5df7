// The moments of a list of parameters, for accumulate_, resolve and the optimizer steps.
#pragma once

#include <string>
#include <vector>

#include "../tasks/moments.h"
#include "checks.h"
#include "rules.h"

namespace andmask {

// Kinds of moments that are not kept are empty lists.
struct MomentLists {
  Tensors sum, votes, squares, logs, voters;

  // The moments of one parameter that are kept.
  std::vector<Tensor*> tensors(int64_t index) {
    std::vector<Tensor*> kept;
    for (Tensors* list : {&sum, &votes, &squares, &logs, &voters}) {
      if (!list->empty()) kept.push_back(&(*list)[index]);
    }
    return kept;
  }
};

inline void* pointer(const Tensors& list, size_t index) {
  return list.empty() ? nullptr : list[index].mutable_data_ptr();
}

// Checks that voters[i] has the type of votes[i].
void check_voters(const char* op, const MomentLists& lists, size_t i);

MomentArrays moment_arrays(const MomentLists& lists, int64_t index);

// Gives several tensors one layout, so that a loop can take their memory as rows. Where layouts
// differ, contiguous copies take the place of the tensors, and those that are written to are copied
// back at the end.
class Aligned {
 public:
  // The first `skip` dimensions of the tensors that are only read do not count.
  void align(const std::vector<Tensor*>& written, const std::vector<Tensor*>& read,
             int64_t skip = 0);
  void copy_back();

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;  // original, copy
};

// Checks the moments and the rule. Returns an update for each tensor, without the memory of its
// moments: set_moments adds that once they are aligned. `arguments` must live as long as the
// updates. `sum` may also be a list of plain gradients, in 16 bits too.
std::vector<Update> check_updates(const char* op, const MomentLists& lists, int64_t count,
                                  const std::string& rule, const std::vector<double>& arguments,
                                  bool rescale);
void set_moments(std::vector<Update>& updates, const MomentLists& lists);

}  // namespace andmask
