#pragma once

#include <cstdint>
#include <vector>

#include "../math/vote_test.h"
#include "device.h"
#include "dtype.h"

namespace andmask {

// The moments of one parameter tensor. `F` is float32, or float64 for float64 gradients.
struct MomentArrays {
  void* sum = nullptr;      // F
  void* votes = nullptr;    // int8, int16 or int32; null where not kept
  int vote_bytes = 0;       // 1, 2 or 4
  void* squares = nullptr;  // F; null where not kept
  void* logs = nullptr;     // F; null where not kept
  void* voters = nullptr;   // signs that are not zero, as wide as votes; null where not kept
};

// Adds environments to the moments of one tensor.
struct AccumulateTask {
  const void* grads = nullptr;      // [rows, columns]; a row is contiguous
  int64_t rows = 1;                 // environments to add
  int64_t stride = 0;               // elements from one row to the next
  const double* weights = nullptr;  // [rows], in host memory; null: 1
  int64_t count = 0;  // environments added before; 0: what the moments hold is ignored
  MomentArrays moments = {};
  Dtype dtype = Dtype::float32;  // of the gradients
  int64_t columns = 0;
};

// Rows, weights and count are the same for all tensors of a call.
void run(const Cpu& cpu, const std::vector<AccumulateTask>& tasks);
void run(const Stream& stream, const std::vector<AccumulateTask>& tasks);

// The update that a rule makes of the moments of one tensor.
struct Update {
  MomentArrays moments = {};
  Dtype sum_dtype = Dtype::float32;   // of a plain gradient where `sum` is one
  const double* arguments = nullptr;  // of the rule, in host memory
  int64_t count = 1;                  // environments
  int64_t columns = 0;
  int rule = 0;                         // index in MomentRules
  VoteTest test = {};                   // of a rule that tests votes
  const int32_t* thresholds = nullptr;  // of the test, on the device, which fills them in
  bool rescale = false;                 // by the inverse of the mean factor
  const double* grad_scale = nullptr;   // a factor of the update, on the device; null: 1
};

// Stores the update, rounded to the type of the sum.
struct ResolveTask {
  Update update = {};
  void* out = nullptr;  // may be the sum
};

// The rule, its arguments, `count` and `rescale` are the same for all tensors of a call.
void run(const Cpu& cpu, const std::vector<ResolveTask>& tasks);
void run(const Stream& stream, const std::vector<ResolveTask>& tasks);

// The thresholds that the test of the updates' rule sets, and what they keep.
struct VoteThresholdsTask {
  std::vector<Update> updates;    // of one test; votes, and voters if zeros abstain
  int32_t* thresholds = nullptr;  // [tensors, environments + 1], or [tensors] without `abstain`
  int64_t* kept = nullptr;        // [tensors]: coordinates
  int64_t* tested = nullptr;      // [tensors]: coordinates that could be kept
};

void run(const Cpu& cpu, const VoteThresholdsTask& task);
void run(const Stream& stream, const VoteThresholdsTask& task);

// Sums the squares of all updates, in float64, where those of float32 cannot overflow.
struct SquaredNormTask {
  std::vector<Update> updates;  // at least one, of one rule
  double* out = nullptr;        // on the device
};

void run(const Cpu& cpu, const SquaredNormTask& task);
void run(const Stream& stream, const SquaredNormTask& task);

}  // namespace andmask
