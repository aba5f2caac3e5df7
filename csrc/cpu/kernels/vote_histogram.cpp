#include "vote_histogram.h"

namespace andmask {
namespace {

template <typename F>
bool add(const MomentArrays& moments, int64_t environments, int64_t begin, int64_t end,
         int64_t lanes, VoteBin* bins) {
  const auto add_votes = [&](const auto* votes) {
    return add_to_bins(static_cast<const F*>(moments.sum) + begin, votes + begin, end - begin,
                       environments, lanes, bins);
  };
  switch (moments.vote_bytes) {
    case 1: return add_votes(static_cast<const int8_t*>(moments.votes));
    case 2: return add_votes(static_cast<const int16_t*>(moments.votes));
    default: return add_votes(static_cast<const int32_t*>(moments.votes));
  }
}

}  // namespace

namespace ANDMASK_ISA {
extern const VoteHistogramKernels vote_histogram_kernels = {{add<float>, add<double>}};
}  // namespace ANDMASK_ISA

}  // namespace andmask
