// Every schema of the library, and the ops without tensors.
// Autograd formulas, fake kernels and vmap rules are registered in Python (andmask_ext/_*.py).
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/capability.h"
#include "cpu/device.h"
#include "ops/implement.h"
#include "ops/rules.h"

namespace {

// Lines of "key value", parsed by andmask_ext.build_info().
std::string native_info() {
  return std::string("libtorch_built ") + TORCH_VERSION + "\ncompiler " + ANDMASK_COMPILER +
         "\nisa " + andmask::name(andmask::active_isa()) + "\nisa_available " +
         andmask::name(andmask::best_isa());
}

// Lets the fake kernel of _aggregate raise as the real one does.
void check_aggregate(std::string rule, std::vector<double> arguments, int64_t environments,
                     bool rescale, bool noise) {
  andmask::check_aggregate(rule, arguments, environments, rescale, noise);
}

}  // namespace

STABLE_TORCH_LIBRARY(andmask, m) {
  // At most one of tau, fdr and significance; none is tau = 1. `zeros`: "count" or "abstain".
  m.def(
      "masked_mean(Tensor grads, float? tau=None, bool rescale=False, *, float? fdr=None, "
      "float? significance=None, str zeros=\"count\") -> Tensor");
  m.def(
      "agreement_mask(Tensor grads, float? tau=None, bool rescale=False, *, float? fdr=None, "
      "float? significance=None, str zeros=\"count\") -> Tensor");
  // Moments of a list of parameters. Kinds of moments that are not kept are empty lists.
  // Arguments of a rule that tests votes: its own, of which the first is the level, and perhaps
  // criterion (0 tau, 1 significance, 2 fdr) and whether zeros abstain (0 or 1).
  m.def(
      "_accumulate_(Tensor(a!)[] sum, Tensor(b!)[] votes, Tensor(c!)[] squares, Tensor(d!)[] logs, "
      "Tensor(e!)[] voters, Tensor[] grads, int count, float[] weights=[], bool stacked=False) -> "
      "()");
  // Moments of weight gradients W_e = sum of d a^T over the rows of environment e, from the
  // activations a and the gradients d of the outputs. Environment e has the examples
  // order[offsets[e]:offsets[e + 1]]; None: 0, 1, 2, ...
  m.def(
      "_accumulate_outer_(Tensor(a!) sum, Tensor(b!)? votes, Tensor(c!)? squares, "
      "Tensor(d!)? logs, Tensor(e!)? voters, Tensor activations, Tensor grad_outputs, Tensor? "
      "order, "
      "Tensor? offsets, int count, float[] weights=[]) -> ()");
  m.def(
      "_accumulate_convolution_(Tensor(a!) sum, Tensor(b!)? votes, Tensor(c!)? squares, "
      "Tensor(d!)? logs, Tensor(e!)? voters, Tensor activations, Tensor grad_outputs, Tensor? "
      "order, Tensor? offsets, "
      "int count, int[] stride, int[] padding, int[] dilation, int groups, "
      "float[] weights=[]) -> ()");
  m.def(
      "_resolve(Tensor[] sum, Tensor[] votes, Tensor[] squares, Tensor[] logs, Tensor[] voters, "
      "int count, str rule, float[] arguments, bool rescale=False) -> Tensor[]");
  m.def(  // the same, written over the sums
      "_resolve_(Tensor(a!)[] sum, Tensor[] votes, Tensor[] squares, Tensor[] logs, "
      "Tensor[] voters, int count, str rule, float[] arguments, bool rescale=False) -> ()");
  // The sum of the squares of these updates, of all tensors together: float64 of shape [].
  m.def(
      "_squared_norm(Tensor[] sum, Tensor[] votes, Tensor[] squares, Tensor[] logs, "
      "Tensor[] voters, int count, str rule, float[] arguments, bool rescale=False) -> Tensor");
  // |votes| that keep a coordinate, int32 [tensors, count + 1] by voters or [tensors, 1]; and the
  // numbers of coordinates that they keep and that could be kept, int64 [tensors].
  m.def(
      "_vote_thresholds(Tensor[] votes, Tensor[] voters, int count, float level, int criterion, "
      "bool abstain) -> (Tensor thresholds, Tensor kept, Tensor tested)");
  // One optimizer step on the update that a rule makes of moments, times `grad_scale` (float64 of
  // shape []), in one pass over memory.
  m.def(
      "_sgd_step_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor[] sum, "
      "Tensor[] votes, Tensor[] squares, Tensor[] logs, Tensor[] voters, int count, str rule, "
      "float[] arguments, bool rescale, *, float lr, float momentum, float dampening, "
      "float weight_decay, bool decoupled_weight_decay, bool nesterov, bool maximize, "
      "bool first_step, Tensor? grad_scale=None) -> ()");
  m.def(
      "_adam_step_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor[] sum, Tensor[] votes, "
      "Tensor[] squares, Tensor[] logs, Tensor[] voters, int count, str rule, float[] arguments, "
      "bool rescale, *, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool decoupled_weight_decay, bool maximize, Tensor? grad_scale=None) -> ()");
  m.def(
      "_temporal_adam_step_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] sign_avgs, Tensor(e!)[] steps, Tensor[] grads, *, float? tau=None, "
      "float? significance=None, float lr, "
      "float beta1, float beta2, float beta3, float eps, float weight_decay, "
      "bool decoupled_weight_decay, bool maximize, bool bias_correction) -> ()");
  m.def(
      "_aggregate(Tensor grads, str rule, float[] arguments, bool rescale=False, "
      "Tensor? noise=None) -> Tensor");
  // For k = 0 ... d: the coordinates with |votes| = k, int64, and the sum of the squares of their
  // sums, float64; [d + 1], or [tensors, d + 1] of moments.
  m.def("vote_histogram(Tensor grads) -> (Tensor counts, Tensor squares)");
  m.def(
      "_vote_histograms(Tensor[] sum, Tensor[] votes, int count) -> "
      "(Tensor counts, Tensor squares)");
  m.def(
      "_check_aggregate(str rule, float[] arguments, int environments, bool rescale, bool noise) "
      "-> ()");
  m.def("_rule_table() -> str");
  m.def("_native_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(andmask, CompositeExplicitAutograd, m) {
  m.impl("_native_info", TORCH_BOX(&native_info));
  m.impl("_check_aggregate", TORCH_BOX(&check_aggregate));
  m.impl("_rule_table", TORCH_BOX(&andmask::rule_table));
}

STABLE_TORCH_LIBRARY_IMPL(andmask, CPU, m) { andmask::implement<andmask::Cpu>(m); }
