"""What is left in the gradient, over the threshold: the mechanism, the shortcut, or neither.

The spirals of :mod:`studies.spirals.data` and a network that has not been trained.
Gradients of all environments are taken four times: on the data as they are, with the shortcut
dimensions permuted over the examples of each environment (what is left to learn is the
*mechanism*), with the mechanism dimensions permuted (the *shortcut*), and with both (*neither*: a
network that is not zero at the start has a gradient without any cause, too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import andmask_ext as am

from ..spirals import Settings as SpiralsSettings
from ..spirals import SpiralsConfig, build_model, draw_spirals
from ..study import Report, Settings

SIGNALS = ("mechanism", "shortcut", "neither")
MASKS = ("and", "xor")
# Thresholds that set themselves in each tensor, beside the range of fixed ones.
ADAPTIVE: dict[str, dict[str, Any]] = {
    "fdr=0.005": {"fdr": 0.005},
    "fdr=0.05": {"fdr": 0.05},
    "significance=0.05": {"significance": 0.05},
}
MECHANISM = 2  # dimensions; the others are the shortcut


@dataclass(frozen=True)
class CorrelationSettings(Settings):
    """What decides a run but its seed.

    Args:
        revolutions: of the spirals.
        released: data as the authors' code draws them: 16 shortcut dimensions of variance 1, and
            mechanism dimensions divided by their standard deviation. Otherwise the paper's: 32
            dimensions of variance .1.
        kaiming: start as the authors' code does: normal weights with variance 2 over the number of
            inputs, biases of .01. Otherwise as :class:`torch.nn.Linear` does.
        environments: number of environments.
        examples: examples in each, all in one batch.
        width: units in each of three hidden layers.
    """

    revolutions: float = 1.0
    released: bool = False
    kaiming: bool = False
    environments: int = 16
    examples: int = 1024
    width: int = 256

    def data_config(self) -> SpiralsConfig:
        """Return what decides the data."""
        released = self.released
        return SpiralsConfig(
            environments=self.environments,
            examples=self.examples,
            shortcut_dims=16 if released else 32,
            shortcut_variance=1.0 if released else 0.1,
            revolutions=self.revolutions,
            standardize=released,
        )


# The first is what the figure and the claims are about; the others show what matters.
CONDITIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "2 revolutions": {"revolutions": 2.0},
    "3 revolutions": {"revolutions": 3.0},
    "Kaiming start": {"kaiming": True},
    "released code": {"revolutions": 3.0, "released": True, "kaiming": True},
}


def build_network(settings: CorrelationSettings, inputs: int, seed: int) -> nn.Module:
    """Build the network, with its random start."""
    with torch.random.fork_rng(devices=()):
        model = build_model(
            SpiralsSettings(shortcut_dims=inputs - MECHANISM, width=settings.width, layers=3), seed
        )
        if not settings.kaiming:
            torch.manual_seed(seed)
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
    return model


def permute(inputs: Tensor, dims: slice, generator: torch.Generator) -> Tensor:
    """Give each example of ``[d, n, f]`` some dimensions of another one of its environment."""
    permuted = inputs.clone()
    for environment in permuted:
        order = torch.randperm(len(environment), generator=generator)
        environment[:, dims] = environment[order, dims]
    return permuted


def environment_gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the gradients ``[d, *shape]`` of all environments, for each parameter."""
    names, params = zip(*model.named_parameters(), strict=True)
    each = [
        torch.autograd.grad(binary_cross_entropy_with_logits(model(x), y), params)
        for x, y in zip(inputs, labels, strict=True)
    ]
    return {
        name: torch.stack(one) for name, one in zip(names, zip(*each, strict=True), strict=True)
    }


def measure(settings: CorrelationSettings, seed: int, report: Report) -> dict[str, Any]:
    """Draw data and network, and measure all correlations at all thresholds.

    ``kept`` and ``noise`` are the shares of coordinates that the AND-mask keeps, and would keep of
    pure noise. ``curves`` has mask -> signals as they are (``plain``) or masked (``masked``) ->
    name of the signal -> correlations. ``adaptive`` has the name of a threshold -> share of
    coordinates kept, and correlation of each signal.
    """
    data = draw_spirals(settings.data_config(), seed)
    inputs, labels = torch.from_numpy(data.train_inputs), torch.from_numpy(data.train_labels)
    model = build_network(settings, inputs.shape[2], seed)
    generator = torch.Generator().manual_seed(seed)
    mechanism, shortcut = slice(MECHANISM), slice(MECHANISM, None)
    without_shortcut = permute(inputs, shortcut, generator)
    shown = (
        inputs,
        without_shortcut,
        permute(inputs, mechanism, generator),
        permute(without_shortcut, mechanism, generator),
    )
    steps = len(shown) + 5
    grads = []
    for one in shown:
        grads.append(environment_gradients(model, one, labels))
        report(len(grads), steps, "")
    whole, *others = grads
    signals = dict(zip(SIGNALS, others, strict=True))
    kept = am.metrics.tau_curve(torch.cat([one.flatten(1) for one in whole.values()], dim=1))
    taus = kept.tau.tolist()
    curves: dict[str, Any] = {mask: {} for mask in MASKS}
    for number, (mask, masked) in enumerate((m, s) for m in MASKS for s in (False, True)):
        found = am.metrics.gradient_correlation(
            whole, signals, taus, mask_signals=masked, xor=mask == "xor"
        )
        curves[mask]["masked" if masked else "plain"] = {
            name: values.tolist() for name, values in found.correlations.items()
        }
        report(len(shown) + number + 1, steps, "")
    adaptive = {name: measure_mask(whole, signals, level) for name, level in ADAPTIVE.items()}
    report(steps, steps, "")
    return {
        "adaptive": adaptive,
        "tau": taus,
        "kept": kept.kept_fraction.tolist(),
        "noise": kept.noise_kept_fraction.tolist(),
        "curves": curves,
    }


def measure_mask(
    whole: Mapping[str, Tensor],
    signals: Mapping[str, Mapping[str, Tensor]],
    level: Mapping[str, Any],
) -> dict[str, float]:
    """Return the share of coordinates that a threshold keeps, and their correlations."""
    masks = {name: am.ops.agreement_mask(grads, **level) for name, grads in whole.items()}
    masked = {name: grads * masks[name] for name, grads in whole.items()}
    found = am.metrics.gradient_correlation(
        masked, {name: dict(one) for name, one in signals.items()}, [0.0], mask_signals=False
    )
    kept = sum(float(mask.sum()) for mask in masks.values())
    return {
        "kept": kept / sum(mask.numel() for mask in masks.values()),
        **{name: values.item() for name, values in found.correlations.items()},
    }


def curve(records: Sequence[Mapping[str, Any]], mask: str, signals: str, name: str) -> Tensor:
    """Return the correlations of all seeds, ``[seeds, thresholds]``, NaN where there is none."""
    rows = [record["curves"][mask][signals][name] for record in records]
    return torch.tensor(
        [[float("nan") if value is None else value for value in row] for row in rows],
        dtype=torch.float64,
    )


def where_enough(values: Tensor) -> Tensor:
    """Drop thresholds at which fewer than half of the seeds have a correlation."""
    return values.where((~values.isnan()).double().mean(0) >= 0.5, torch.nan)
