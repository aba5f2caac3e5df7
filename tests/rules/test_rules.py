"""The rule objects: what they compute, and how they behave as values."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import andmask_ext as am

from .. import strategies
from ..conftest import cuda_kernels
from .rule_table import TABLE, assert_matches_reference, examples

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
kinds = pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
rules = pytest.mark.parametrize("rule", examples(), ids=lambda rule: type(rule).__name__)


def draw_case(
    data: st.DataObject, kind: type[am.rules.Rule], dtype: torch.dtype, **kwargs: object
) -> tuple[am.rules.Rule, Tensor]:
    base = np.float64 if dtype == torch.float64 else np.float32
    environments = strategies.environment_counts.filter(lambda d: d >= TABLE[kind].least)
    values = data.draw(strategies.stacked(base, environments=environments, **kwargs))
    grads = torch.as_tensor(values).to(dtype)
    return data.draw(TABLE[kind].draw(len(grads))), grads


def call(rule: am.rules.Rule, grads: Tensor) -> Tensor:
    torch.manual_seed(7)
    return rule(grads)


def test_every_rule_is_in_the_table() -> None:
    found = {getattr(am.rules, name) for name in am.rules.__all__} - {am.rules.Rule}
    found.remove(am.rules.GradientAgreementFiltering)  # of whole gradients: test_filtering.py
    assert found == set(TABLE) == {type(rule) for rule in examples()}


# ---- values ----


@dtypes
@kinds
@given(data=st.data())
def test_matches_reference(
    kind: type[am.rules.Rule], dtype: torch.dtype, data: st.DataObject
) -> None:
    rule, grads = draw_case(data, kind, dtype)
    assert_matches_reference(rule, grads)


@rules
@dtypes
@pytest.mark.parametrize("environments", [3, 5, 16, 32, 33, 64, 70, 513, 2000])
def test_many_environments(rule: am.rules.Rule, dtype: torch.dtype, environments: int) -> None:
    if rule == am.rules.TrimmedMean(2) and environments < 5:
        rule = am.rules.TrimmedMean(1)
    grads = torch.randn(environments, 77, dtype=torch.float64).to(dtype)
    assert_matches_reference(rule, grads)
    assert_matches_reference(rule, grads + 3)


@rules
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nothing_non_finite_is_hidden(
    rule: am.rules.Rule, dtype: torch.dtype, value: float
) -> None:
    for environments in (5, 40, 600):
        for place in (0, 1, environments - 1):
            grads = torch.randn(environments, 50).to(dtype)
            grads[place, 3::2] = value
            out = call(rule, grads)
            assert not out[3::2].isfinite().any()
            if not isinstance(rule, am.rules.AgreementRandom):  # one statistic for all
                assert out[:3].isfinite().all()


@kinds
@given(data=st.data())
def test_permuting_environments(kind: type[am.rules.Rule], data: st.DataObject) -> None:
    if kind is am.rules.MedianOfThree:
        return  # the groups are by position
    rule, grads = draw_case(data, kind, torch.float64, finite=True)
    order = torch.randperm(len(grads))
    assert_matches_reference(rule, grads[order])
    if kind in (am.rules.Median, am.rules.TrimmedMean, am.rules.WinsorizedMean):
        one, other = rule(grads[order]), rule(grads)
        if cuda_kernels() and len(grads) > 32 and kind is not am.rules.Median:
            # CUDA does not sort so many: what lies between the ends is added as it comes.
            bound = 1e-14 * grads.abs().amax(0)
            assert ((one - other).abs() <= bound).all()
        else:
            assert torch.equal(one, other)


@kinds
@dtypes
@given(data=st.data())
def test_flipping_the_sign(
    kind: type[am.rules.Rule], dtype: torch.dtype, data: st.DataObject
) -> None:
    if not TABLE[kind].odd:
        return  # the noise does not flip
    rule, grads = draw_case(data, kind, dtype)
    # Those sum in the order of the ranks. The order decides what rounds, and what overflows.
    exact = kind not in (am.rules.TrimmedMean, am.rules.WinsorizedMean)
    eps = 0.0 if exact else 100 * torch.finfo(dtype).eps
    size = float(grads.nan_to_num(0, 0, 0).abs().max()) if grads.numel() else 0.0
    assume(exact or size * len(grads) < torch.finfo(torch.float32).max)
    torch.testing.assert_close(
        rule(-grads).nan_to_num(nan=0, posinf=0, neginf=0),
        -rule(grads).nan_to_num(nan=0, posinf=0, neginf=0),
        rtol=eps,
        atol=min(eps * size, torch.finfo(dtype).max),
    )


def test_special_cases() -> None:
    grads = torch.randn(9, 500)
    assert torch.equal(am.rules.TrimmedMean(4)(grads), am.rules.Median()(grads))
    torch.testing.assert_close(am.rules.TrimmedMean(0)(grads), am.rules.Mean()(grads))
    torch.testing.assert_close(am.rules.WinsorizedMean(0.0)(grads), am.rules.Mean()(grads))
    torch.testing.assert_close(am.rules.WinsorizedMean(50.0)(grads), am.rules.Median()(grads))
    torch.testing.assert_close(am.rules.MaskedAverage(0.0)(grads), am.rules.Mean()(grads))
    torch.testing.assert_close(am.rules.AgreementSum()(grads), 9 * am.AndMask(1.0)(grads))
    assert torch.equal(am.rules.Median()(grads), grads.median(0).values)
    assert torch.equal(am.rules.MedianOfThree()(grads[:3]), am.rules.Median()(grads[:3]))
    same = torch.randn(500).expand(6, 500)
    for rule in (
        am.rules.Median(),
        am.rules.TrimmedMean(2),
        am.rules.WinsorizedMean(10.0),
        am.rules.MedianOfThree(),
    ):
        torch.testing.assert_close(rule(same), same[0], rtol=1e-6, atol=0)


def test_winsorized_mean_clips_to_the_percentiles_of_numpy() -> None:
    grads = torch.randn(13, 200, dtype=torch.float64)
    for c in (5.0, 12.5, 25.0, 37.1):
        low, high = np.percentile(grads.cpu().numpy(), [c, 100 - c], axis=0)
        expected = torch.as_tensor(np.clip(grads.cpu().numpy(), low, high).mean(0))
        torch.testing.assert_close(
            am.rules.WinsorizedMean(c)(grads), expected, rtol=1e-12, atol=1e-14
        )


def test_sign_dropout_keeps_either_sign_in_proportion() -> None:
    grads = torch.tensor([3.0, -1.0])[:, None].expand(2, 100_000)
    out = am.rules.SignDropout()(grads)
    assert set(out.unique().tolist()) == {-1.0, 3.0}
    assert (out > 0).double().mean().item() == pytest.approx(0.75, abs=0.01)
    agreeing = am.rules.SignDropout()(torch.ones(4, 1000))
    assert torch.equal(agreeing, torch.full((1000,), 4.0))
    assert not am.rules.SignDropout()(torch.zeros(3, 1000)).any()


def test_agreement_random_fills_with_noise_of_the_kept_size() -> None:
    grads = torch.full((2, 100_000), 2.0)
    grads[1, ::2] = -2.0
    out = am.rules.AgreementRandom()(grads)
    assert (out[1::2] == 4.0).all()
    assert out[::2].std().item() == pytest.approx(4.0, rel=0.02)
    assert not am.rules.AgreementRandom()(torch.tensor([[1.0], [-1.0]])).any()  # none agree


def test_noise_comes_from_the_global_generator() -> None:
    grads = torch.randn(4, 100)
    for rule in (am.rules.SignDropout(), am.rules.AgreementRandom()):
        assert torch.equal(call(rule, grads), call(rule, grads))
        assert not torch.equal(rule(grads), rule(grads))


# ---- layouts ----

LAYOUTS = {
    "environments strided": lambda g: torch.stack([g, torch.ones_like(g)], 1)[:, 0],
    "environments last": lambda g: g.movedim(0, -1).contiguous().movedim(-1, 0),
    "columns strided": lambda g: torch.stack([g, torch.ones_like(g)], -1)[..., 0],
    "offset": lambda g: torch.cat([torch.ones_like(g[:1]), g])[1:],
}


@rules
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("environments", [7, 70])
def test_layouts(rule: am.rules.Rule, layout: str, environments: int) -> None:
    grads = torch.randn(environments, 6, 70)
    laid_out = LAYOUTS[layout](grads)
    before = laid_out.clone()
    assert torch.equal(call(rule, laid_out), call(rule, grads))
    assert torch.equal(laid_out, before)


@rules
@pytest.mark.parametrize("shape", [(5,), (6, 0), (6, 0, 4), (6, 2, 1, 3), (6, 1)])
def test_scalar_and_empty_parameters(rule: am.rules.Rule, shape: tuple[int, ...]) -> None:
    assert_matches_reference(rule, torch.randn(shape))


@rules
def test_expanded(rule: am.rules.Rule) -> None:
    grads = torch.randn(1, 4, 5).expand(6, 4, 5)
    assert torch.equal(call(rule, grads), call(rule, grads.contiguous()))


@rules
def test_bits_do_not_depend_on_threads(rule: am.rules.Rule) -> None:
    for environments, columns in ((6, 70_001), (40, 20_000)):
        for dtype in (torch.float32, torch.bfloat16):
            grads = torch.randn(environments, columns).to(dtype)
            torch.set_num_threads(1)
            one = call(rule, grads)
            torch.set_num_threads(2)
            assert torch.equal(call(rule, grads), one)


# ---- streaming ----


@kinds
@given(data=st.data())
def test_moments_give_what_the_stack_gives(kind: type[am.rules.Rule], data: st.DataObject) -> None:
    """In float64, where the two differ by rounding alone."""
    rule, grads = draw_case(data, kind, torch.float64, finite=True)
    assert (rule.moments is not None) == TABLE[kind].streamable
    moments = am.Moments([grads[0]], rule.moments or ())
    for environment in grads:
        moments.add([environment])
    if rule.moments is None:
        with pytest.raises(TypeError, match=r"needs the gradients of all environments at once"):
            rule.update(moments)
        return
    (update,) = rule.update(moments)
    clean = grads.abs() < 1e150
    keep = clean.all(0) & (grads.sum(0).abs() > 1e-9 * grads.abs().sum(0))
    if kind is am.rules.SandMask:
        return  # as sharp as its variance is small: see test_matches_reference
    torch.testing.assert_close(update[keep], rule(grads)[keep], rtol=1e-9, atol=1e-300)


# ---- values, as Python has them ----


@rules
def test_is_an_immutable_value(rule: am.rules.Rule) -> None:
    assert eval(repr(rule), vars(am.rules)) == rule
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == copy.copy(rule) == rule
    assert len({rule, copy.deepcopy(rule)}) == 1
    assert rule not in {other for other in examples() if type(other) is not type(rule)}
    with pytest.raises(AttributeError):
        rule.tau = 0.5  # type: ignore[attr-defined]
    assert type(rule).__module__ == "andmask_ext.rules"


def test_reprs() -> None:
    assert repr(am.AndMask(tau=0.8, rescale=True)) == "AndMask(tau=0.8, rescale=True)"
    assert repr(am.rules.SandMask(0.5)) == "SandMask(tau=0.5, k=10.0, rescale=True)"
    assert repr(am.rules.Median()) == "Median()"
    assert repr(am.rules.WinsorizedMean(5)) == "WinsorizedMean(c=5.0)"


def test_a_checkpoint_with_rules_loads_without_trust(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"rules": examples()}, path)
    assert torch.load(path, weights_only=True)["rules"] == examples()
    buffer = io.BytesIO(path.read_bytes())
    code = (
        "import sys, torch, andmask_ext;"
        f"print(torch.load({str(path)!r}, weights_only=True)['rules'][1])"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "AndMask(tau=0.6, rescale=True)"
    assert buffer.getvalue()


def test_tau_may_be_an_int_or_a_float64_scalar() -> None:
    assert am.AndMask(1) == am.AndMask(np.float64(1.0)) == am.AndMask(1.0)
    assert type(am.AndMask(np.float64(0.5)).tau) is float


TAUS = [
    am.AndMask,
    am.rules.GeometricMean,
    am.rules.SandMask,
    am.rules.MaskedAverage,
    am.rules.FedILC,
]


@pytest.mark.parametrize("kind", TAUS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("tau", "error", "message"),
    [
        (1.1, ValueError, r"tau: expected a number in \[0, 1\], but got 1.1"),
        (float("nan"), ValueError, "tau: .* but got nan"),
        ("1", TypeError, "tau: .* but got str"),
        (np.float32(0.8), TypeError, "tau: .* Python number .* but got float32"),
    ],
)
def test_tau_is_checked(
    kind: type[am.rules.Rule], tau: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(tau)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: am.AndMask(1.0, "yes"), TypeError, "rescale: expected a bool, but got str"),
        (
            lambda: am.rules.SandMask(0.5, 0.0),
            ValueError,
            "k: expected a positive finite .* got 0.0",
        ),
        (lambda: am.rules.SandMask(0.5, "1"), TypeError, "k: expected .* but got str"),
        (lambda: am.rules.SandMask(0.5, float("inf")), ValueError, "k: expected .* but got inf"),
        (lambda: am.rules.TrimmedMean(1.0), TypeError, "b: expected an int, but got float"),
        (lambda: am.rules.TrimmedMean(True), TypeError, "b: expected an int, but got bool"),
        (
            lambda: am.rules.TrimmedMean(-1),
            ValueError,
            "b: expected at least 0, but got -1",
        ),
        (lambda: am.rules.WinsorizedMean(51), ValueError, r"c: .* \[0, 50\], but got 51"),
        (lambda: am.rules.WinsorizedMean(None), TypeError, "c: expected .* but got NoneType"),
    ],
)
def test_arguments_are_checked(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_mask_of_zeros_is_announced() -> None:
    with pytest.warns(UserWarning, match=r"SandMask\(tau=1.0\) masks everything") as caught:
        rule = am.rules.SandMask(tau=1.0)
    assert caught[0].filename == __file__
    assert not rule(torch.randn(3, 4)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        am.rules.SandMask(0.999)


@rules
def test_grads_are_checked(rule: am.rules.Rule) -> None:
    for grads, error, message in [
        ([1.0], TypeError, "grads: expected a Tensor"),
        (torch.ones(6, 2, dtype=torch.int32), TypeError, "grads: .* but got int32"),
        (torch.tensor(1.0), ValueError, "but got a 0-dim tensor"),
        (torch.ones(0, 3), ValueError, "at least 1 environment"),
    ]:
        with pytest.raises(error, match=message):
            rule(grads)


def test_too_few_environments() -> None:
    with pytest.raises(ValueError, match=r"TrimmedMean\(b=2\) expected more than 4 .* but got 4"):
        am.rules.TrimmedMean(2)(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"MedianOfThree expected at least 3 .* but got 2"):
        am.rules.MedianOfThree()(torch.randn(2, 3))


def test_a_rule_of_ones_own() -> None:
    class Largest(am.rules.Rule):
        def __call__(self, grads: Tensor) -> Tensor:
            return grads.amax(0)

    weight = torch.zeros(2, requires_grad=True)
    losses = [(weight * x).sum() for x in torch.tensor([[1.0, -2.0], [3.0, -4.0]])]
    am.backward(losses, Largest())
    assert weight.grad.tolist() == [3.0, -2.0]
    with pytest.raises(TypeError, match="needs the gradients of all environments at once"):
        Largest().update(am.Moments([weight], ()))
