#include <stdexcept>

#include "launch.h"
#include "launchers.h"
namespace andmask {
static void no() { throw std::runtime_error("pending"); }
void launch_aggregate(const Stream&, const AggregateTask&) { no(); }
void launch_accumulate(const Stream&, const AccumulateList&) { no(); }
void launch_accumulate_outer(const Stream&, const OuterTask&) { no(); }
void launch_resolve(const Stream&, const UpdateList&, const std::vector<void*>&) { no(); }
void launch_sgd(const Stream&, const UpdateList&, const std::vector<SgdTask>&,
                const std::vector<Dtype>&) { no(); }
void launch_adam(const Stream&, const UpdateList&, const std::vector<AdamTask>&,
                 const std::vector<Dtype>&) { no(); }
void launch_temporal_adam(const Stream&, const UpdateList&, const std::vector<TemporalAdamTask>&,
                          const std::vector<Dtype>&) { no(); }
}  // namespace andmask
