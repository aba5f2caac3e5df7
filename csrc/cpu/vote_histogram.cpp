#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "../errors.h"
#include "device.h"
#include "kernels/masked_mean.h"
#include "kernels/vote_histogram.h"
#include "units.h"

namespace andmask {
namespace {

// Bins that are worth lanes: so many stay in L1 or L2 with them.
constexpr int64_t kMostBinsWithLanes = 512;

// The histograms of parts of the tensors, and what becomes of them. A part is large enough for its
// bins to be small beside it, and no tensor has very many, however long it is. Parts are added in
// their order: how many threads there are does not matter.
class Parts {
 public:
  Parts(const std::vector<int64_t>& sizes, const Histograms& out)
      : out_(out),
        lanes_(out.bins() <= kMostBinsWithLanes ? kBinLanes : 1),
        units_(sizes, unit(sizes, out.bins())),
        squares_(units_.count() * out.bins()),
        counts_(units_.count() * out.bins()) {}

  // add(tensor, begin, end, lanes, bins) returns whether all votes were possible.
  template <typename Add>
  void run(const char* op, int64_t work_per_element, const Add& add) {
    std::atomic<bool> enough_memory{true};
    std::atomic<bool> possible{true};
    const int64_t bins = out_.bins();
    units_.parallel(
        work_per_element, [&](int64_t tensor, int64_t part, int64_t begin, int64_t end) {
          const std::unique_ptr<VoteBin[]> found(new (std::nothrow) VoteBin[bins * lanes_]());
          if (!found) {
            enough_memory = false;
            return;
          }
          if (!add(tensor, begin, end, lanes_, found.get())) possible = false;
          for (int64_t bin = 0; bin < bins; ++bin) {
            double squares = 0;
            double count = 0;
            for (int64_t lane = 0; lane < lanes_; ++lane) {
              squares += found[bin * lanes_ + lane].squares;
              count += found[bin * lanes_ + lane].count;
            }
            squares_[part * bins + bin] = squares;
            counts_[part * bins + bin] = static_cast<int64_t>(count);
          }
        });
    check(enough_memory, op, "out of memory for histograms of ", bins, " bins");
    check(possible, op, "expected |votes| of at most count = ", out_.environments,
          ", but got larger ones");
    for (int64_t tensor = 0; tensor < units_.tensors(); ++tensor) {
      int64_t* const counts = out_.counts + tensor * bins;
      double* const squares = out_.squares + tensor * bins;
      for (int64_t part = units_.first(tensor); part < units_.first(tensor + 1); ++part) {
        for (int64_t bin = 0; bin < bins; ++bin) {
          counts[bin] += counts_[part * bins + bin];
          squares[bin] += squares_[part * bins + bin];
        }
      }
    }
  }

 private:
  static int64_t unit(const std::vector<int64_t>& sizes, int64_t bins) {
    constexpr int64_t kMostParts = 64;  // of one tensor
    const int64_t longest = *std::max_element(sizes.begin(), sizes.end());
    const int64_t size = std::max(32 * bins, (longest + kMostParts - 1) / kMostParts);
    return (size + Units::kUnit - 1) / Units::kUnit * Units::kUnit;
  }

  const Histograms out_;
  const int64_t lanes_;
  const Units units_;
  std::vector<double> squares_;  // [parts, bins]
  std::vector<int64_t> counts_;
};

}  // namespace

void Cpu::vote_histograms(const VoteHistogramList& list) const {
  const VoteHistogramKernels& kernels = vote_histogram_kernels(active_isa());
  Parts(list.sizes, list.out)
      .run(op, 1, [&](int64_t tensor, int64_t begin, int64_t end, int64_t lanes, VoteBin* bins) {
        const VoteHistogramTask& task = list.tasks[tensor];
        return kernels.add[task.dtype == Dtype::float64](task.moments, list.out.environments, begin,
                                                         end, lanes, bins);
      });
}

void Cpu::vote_histogram(const StackedHistogramTask& task) const {
  const auto reduce = masked_mean_kernels(active_isa()).reduce[static_cast<int>(task.dtype)];
  Parts({task.columns}, task.out)
      .run(op, task.out.environments,
           [&](int64_t, int64_t begin, int64_t end, int64_t lanes, VoteBin* bins) {
             reduce({task.grads, task.out.environments, task.stride, 0, Output::bins, bins, lanes},
                    begin, end);
             return true;
           });
}

}  // namespace andmask
