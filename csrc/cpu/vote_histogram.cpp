#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "../errors.h"
#include "../tasks/vote_histogram.h"
#include "device.h"
#include "kernels/masked_mean.h"
#include "kernels/vote_histogram.h"
#include "units.h"

namespace andmask {
namespace {

// Up to this many bins have lanes: with them they stay in L1 or L2.
constexpr int64_t kMostBinsWithLanes = 512;

// The histograms of parts of the tensors. A part is large enough for its bins to be small beside
// it, and no tensor has very many parts, however long it is. Parts are added in their order, so
// that the number of threads does not matter.
class Parts {
 public:
  Parts(const Cpu& cpu, const std::vector<int64_t>& sizes, const std::vector<Histogram>& out)
      : cpu_(cpu),
        out_(out),
        bins_(out[0].bins()),
        lanes_(bins_ <= kMostBinsWithLanes ? kBinLanes : 1),
        units_(sizes, unit(sizes, bins_)),
        squares_(units_.count() * bins_),
        counts_(units_.count() * bins_) {}

  // add(tensor, begin, end, lanes, bins) returns false if there are more votes than environments.
  template <typename Add>
  void run(int64_t work_per_element, const Add& add) {
    std::atomic<bool> enough_memory{true};
    std::atomic<bool> possible{true};
    units_.parallel(
        work_per_element, [&](int64_t tensor, int64_t part, int64_t begin, int64_t end) {
          const std::unique_ptr<VoteBin[]> lanes(new (std::nothrow) VoteBin[bins_ * lanes_]());
          if (!lanes) {
            enough_memory = false;
            return;
          }
          if (!add(tensor, begin, end, lanes_, lanes.get())) possible = false;
          for (int64_t bin = 0; bin < bins_; ++bin) {
            double squares = 0;
            double count = 0;
            for (int64_t lane = 0; lane < lanes_; ++lane) {
              squares += lanes[bin * lanes_ + lane].squares;
              count += lanes[bin * lanes_ + lane].count;
            }
            squares_[part * bins_ + bin] = squares;
            counts_[part * bins_ + bin] = static_cast<int64_t>(count);
          }
        });
    check(enough_memory, cpu_.op, "out of memory for histograms of ", bins_, " bins");
    check(possible, cpu_.op, "expected |votes| of at most count = ", out_[0].environments,
          ", but got larger ones");
    for (int64_t tensor = 0; tensor < units_.tensors(); ++tensor) {
      for (int64_t part = units_.first(tensor); part < units_.first(tensor + 1); ++part) {
        for (int64_t bin = 0; bin < bins_; ++bin) {
          out_[tensor].counts[bin] += counts_[part * bins_ + bin];
          out_[tensor].squares[bin] += squares_[part * bins_ + bin];
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

  const Cpu& cpu_;
  const std::vector<Histogram> out_;
  const int64_t bins_;
  const int64_t lanes_;
  const Units units_;
  std::vector<double> squares_;  // [parts, bins]
  std::vector<int64_t> counts_;
};

}  // namespace

void run(const Cpu& cpu, const std::vector<VoteHistogramTask>& tasks) {
  const VoteHistogramKernels& kernels = vote_histogram_kernels(active_isa());
  std::vector<int64_t> sizes;
  std::vector<Histogram> out;
  for (const VoteHistogramTask& task : tasks) {
    sizes.push_back(task.columns);
    out.push_back(task.out);
  }
  Parts(cpu, sizes, out)
      .run(1, [&](int64_t tensor, int64_t begin, int64_t end, int64_t lanes, VoteBin* bins) {
        const VoteHistogramTask& task = tasks[tensor];
        return kernels.add[task.dtype == Dtype::float64](task.moments, task.out.environments, begin,
                                                         end, lanes, bins);
      });
}

void run(const Cpu& cpu, const StackedHistogramTask& task) {
  const auto reduce = masked_mean_kernels(active_isa()).reduce[static_cast<int>(task.dtype)];
  Parts(cpu, {task.columns}, {task.out})
      .run(task.out.environments,
           [&](int64_t, int64_t begin, int64_t end, int64_t lanes, VoteBin* bins) {
             reduce({.grads = task.grads,
                     .environments = task.out.environments,
                     .stride = task.stride,
                     .output = Output::bins,
                     .out = bins,
                     .bin_lanes = lanes},
                    begin, end);
             return true;
           });
}

}  // namespace andmask
