// Units of work, which the threads of the CPU share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace andmask {

// The number of elements of one thread from which on a second thread is worth waking.
constexpr int64_t kGrain = 32768;

// Cuts work on a list of tensors into units of at most `unit` elements, numbered through the list.
// The cut does not depend on the number of threads, so that sums per unit do not either.
class Units {
 public:
  static constexpr int64_t kUnit = 16384;

  explicit Units(std::vector<int64_t> sizes, int64_t unit = kUnit)
      : sizes_(std::move(sizes)), unit_(unit) {
    first_.reserve(sizes_.size() + 1);
    first_.push_back(0);
    for (int64_t size : sizes_) {
      first_.push_back(first_.back() + (size + unit_ - 1) / unit_);
      elements_ += size;
    }
  }

  int64_t count() const { return first_.back(); }
  int64_t tensors() const { return static_cast<int64_t>(sizes_.size()); }

  // The units of tensor `index` are [first(index), first(index + 1)).
  int64_t first(int64_t index) const { return first_[index]; }

  // Calls f(tensor, unit, begin, end); the last two are elements of the tensor.
  template <typename F>
  void parallel(int64_t work_per_element, const F& f) const {
    if (count() == 0) return;
    const int64_t per_unit = std::max<int64_t>(1, elements_ * work_per_element / count());
    const int64_t grain = std::max<int64_t>(1, kGrain / per_unit);
    torch::stable::parallel_for(0, count(), grain, [&](int64_t begin, int64_t end) {
      auto tensor = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t unit = begin; unit < end; ++unit) {
        while (unit >= first_[tensor + 1]) ++tensor;
        const int64_t from = (unit - first_[tensor]) * unit_;
        f(tensor, unit, from, std::min(from + unit_, sizes_[tensor]));
      }
    });
  }

 private:
  std::vector<int64_t> sizes_;
  int64_t unit_;
  std::vector<int64_t> first_;
  int64_t elements_ = 0;
};

}  // namespace andmask
