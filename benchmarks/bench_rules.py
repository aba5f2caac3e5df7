"""Every rule on stacked gradients against its eager formula, sorting, torch.compile, and one read.

    python -m benchmarks.bench_rules --quick
    python -m benchmarks.bench_rules --save before --rules Median TrimmedMean

The yardstick (ratio 1.00) is the floor: `torch.sum` over all of the input, one read pass. Noise is
part of what is timed, on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import andmask_ext as am

from .common import Row, Step, measure, parser, run

SIZES = [(4, 65_536), (4, 1 << 22), (16, 65_536), (16, 1 << 20), (64, 65_536), (64, 1 << 18)]
QUICK = [(4, 1 << 20), (16, 1 << 20), (64, 65_536)]
TAU = 0.6

# ---- eager formulas, as one would write them ----


def agreement(g: Tensor) -> Tensor:
    return g.sign().mean(0).abs()


def and_mask(g: Tensor) -> Tensor:
    return (agreement(g) >= TAU) * g.mean(0)


def geometric_mean(g: Tensor) -> Tensor:
    mean = (g.abs() + 1e-10).log().mean(0).exp()
    return (agreement(g) >= TAU) * g.mean(0).sign() * mean


def sand_mask(g: Tensor) -> Tensor:
    """Write what the authors' code does."""
    mask = torch.tanh(10.0 * g.var(0).pow(-1) * (agreement(g) - 0.5)).clamp(min=0)
    return mask * g.mean(0) / (1e-10 + mask.mean())


def masked_average(g: Tensor) -> Tensor:
    share = agreement(g)
    return torch.where(share >= TAU, 1.0, share) * g.mean(0)


def agreement_sum(g: Tensor) -> Tensor:
    return (g.sign().sum(0).abs() == g.shape[0]) * g.sum(0)


def agreement_random(g: Tensor) -> Tensor:
    total, kept = g.sum(0), g.sign().sum(0).abs() == g.shape[0]
    return torch.where(kept, total, torch.randn_like(total) * total[kept].abs().mean())


def median(g: Tensor) -> Tensor:
    ranked = g.sort(0).values
    last = g.shape[0] - 1
    return (ranked[last // 2] + ranked[last - last // 2]) / 2


def median_of_three(g: Tensor) -> Tensor:
    return torch.stack([part.mean(0) for part in g.tensor_split(3)]).median(0).values


def trimmed_mean(g: Tensor) -> Tensor:
    return g.sort(0).values[1:-1].mean(0)


def winsorized_mean(g: Tensor) -> Tensor:
    low, high = torch.quantile(g, 0.1, 0), torch.quantile(g, 0.9, 0)
    return g.clamp(low, high).mean(0)


def sign_dropout(g: Tensor) -> Tensor:
    positive = (1 + g.sum(0) / g.abs().sum(0)) / 2
    noise = torch.rand_like(positive)
    kept = (positive > noise) * (g > 0) + (positive < noise) * (g < 0)
    return (g * kept).sum(0)


def fed_ilc(g: Tensor) -> Tensor:
    sides = []
    for side in (g, -g):
        count = (side > 0).sum(0)
        logs = torch.where(side > 0, side, 1.0).log().sum(0)
        sides.append(count / g.shape[0] * (logs / count.clamp(min=1)).exp())
    return (agreement(g) >= TAU) * (sides[0] - sides[1])


def gradient_agreement_filtering(g: Tensor) -> Tensor:
    mean, count = g[0], 1
    for one in g[1:]:
        if torch.nn.functional.cosine_similarity(mean, one, dim=0) >= 0:
            mean, count = mean + (one - mean) / (count + 1), count + 1
    return mean if count > 1 else torch.zeros_like(mean)


RULES: dict[am.rules.Rule, Callable[[Tensor], Tensor]] = {
    am.rules.Mean(): lambda g: g.mean(0),
    am.AndMask(TAU): and_mask,
    am.rules.GeometricMean(TAU): geometric_mean,
    am.rules.SandMask(0.5): sand_mask,
    am.rules.MaskedAverage(TAU): masked_average,
    am.rules.AgreementSum(): agreement_sum,
    am.rules.AgreementRandom(): agreement_random,
    am.rules.Median(): median,
    am.rules.MedianOfThree(): median_of_three,
    am.rules.TrimmedMean(1): trimmed_mean,
    am.rules.WinsorizedMean(10.0): winsorized_mean,
    am.rules.SignDropout(): sign_dropout,
    am.rules.FedILC(TAU): fed_ilc,
    am.rules.GradientAgreementFiltering(): gradient_agreement_filtering,
}
COMPILED = (am.rules.GeometricMean, am.rules.SandMask, am.rules.SignDropout, am.rules.FedILC)


def case(rule: am.rules.Rule, environments: int, columns: int, dtype: torch.dtype) -> list[Row]:
    torch.manual_seed(0)
    grads = torch.randn(environments, columns).to(dtype)
    eager = RULES[rule]
    contestants: dict[str, Step] = {
        "andmask": lambda: rule(grads),
        "eager": lambda: eager(grads),
    }
    if isinstance(rule, am.rules.Median):
        contestants["torch.median"] = lambda: grads.median(0)
    if isinstance(rule, COMPILED):
        torch._dynamo.reset()
        compiled = torch.compile(eager, dynamic=False)
        contestants["torch.compile"] = lambda: compiled(grads)
    contestants["read pass: torch.sum"] = lambda: torch.sum(grads)
    return measure(
        f"{type(rule).__name__} {environments} x {columns:,} {str(dtype)[6:]}",
        contestants,
        bytes_moved=grads.numel() * grads.element_size(),
        yardstick="read pass: torch.sum",
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--rules", nargs="+", metavar="NAME", choices=[type(rule).__name__ for rule in RULES]
    )
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    chosen = options.parse_args()
    run(
        chosen,
        [
            partial(case, rule, *size, getattr(torch, chosen.dtype))
            for rule in RULES
            if chosen.rules is None or type(rule).__name__ in chosen.rules
            for size in (QUICK if chosen.quick else SIZES)
        ],
    )


if __name__ == "__main__":
    main()
