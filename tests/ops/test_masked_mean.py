"""torch.ops.andmask.masked_mean and agreement_mask: values, properties, layouts, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import andmask_ext as am
from andmask_ext import reference

from .. import strategies

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
rescales = pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescale"])


def draw_grads(data: st.DataObject, dtype: torch.dtype, device: str, **kwargs: object) -> Tensor:
    kind = np.float64 if dtype == torch.float64 else np.float32
    return torch.as_tensor(data.draw(strategies.stacked(kind, **kwargs))).to(device, dtype)


def accumulation_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def assert_matches_reference(out: Tensor, grads: Tensor, tau: float, rescale: bool) -> None:
    assert out.dtype == grads.dtype
    assert out.shape == grads.shape[1:]
    assert out.device == grads.device
    expected = reference.masked_mean(grads, tau, rescale)
    factor = 1 / (1e-10 + reference.agreement_mask(grads, tau).mean()) if rescale else 1.0
    size = grads.double().abs().mean(0)
    hidden = ~grads.isfinite().all(0)
    assert not out[hidden].isfinite().any(), "a non-finite value was hidden"
    eps, info = accumulation_eps(grads.dtype), torch.finfo(grads.dtype)
    wide = torch.finfo(torch.float64 if grads.dtype == torch.float64 else torch.float32)
    # Out of range of the sum, or of the result: infinity (NaN under the mask) is right.
    overflows = ~(size * len(grads) < wide.max * 0.99) & (len(grads) > 1)
    overflows |= expected.abs() > info.max * 0.999
    overflows |= ~(size * factor < wide.max * 0.99)
    assert (~out.isfinite() | (out.double() - expected).abs().le(expected.abs() / 100))[
        ~hidden & overflows
    ].all(), "neither infinite nor right where a sum or the result leaves its range"
    check = ~hidden & ~overflows
    error = (out.double() - expected).abs()[check]
    rounding = 20 * eps + len(grads) / 4 * torch.finfo(torch.float64).eps
    tiny = max(info.smallest_normal * info.eps, wide.smallest_normal * wide.eps * float(factor))
    bound = (rounding * size * factor + info.eps * expected.abs())[check] + 2 * tiny
    assert (error <= bound).all(), (error - bound).max()


@dtypes
@rescales
@given(data=st.data())
def test_matches_reference(
    device: str, dtype: torch.dtype, rescale: bool, data: st.DataObject
) -> None:
    grads = draw_grads(data, dtype, device)
    tau = data.draw(st.one_of(strategies.taus, strategies.tie_taus(len(grads))))
    assert_matches_reference(
        torch.ops.andmask.masked_mean(grads, tau, rescale), grads, tau, rescale
    )
    mask = torch.ops.andmask.agreement_mask(grads, tau)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(mask, reference.agreement_mask(grads, tau).to(wide))
    scaled = torch.ops.andmask.agreement_mask(grads, tau, True)
    torch.testing.assert_close(scaled, reference.agreement_mask(grads, tau, True).to(wide))


# ---- properties ----


@given(data=st.data(), tau=strategies.taus)
def test_permuting_environments_keeps_the_mask_and_the_mean(
    device: str, data: st.DataObject, tau: float
) -> None:
    grads = draw_grads(data, torch.float32, device, finite=True)
    order = torch.as_tensor(np.random.default_rng(0).permutation(len(grads)))
    a, b = am.ops.masked_mean(grads, tau), am.ops.masked_mean(grads[order], tau)
    assert torch.equal(am.ops.agreement_mask(grads, tau), am.ops.agreement_mask(grads[order], tau))
    assert ((a - b).abs() <= 3e-6 * grads.abs().mean(0) + 1e-44).all()


@dtypes
@given(data=st.data(), tau=strategies.taus)
def test_flipping_the_sign_flips_the_result(
    device: str, dtype: torch.dtype, data: st.DataObject, tau: float
) -> None:
    grads = draw_grads(data, dtype, device)
    torch.testing.assert_close(
        am.ops.masked_mean(-grads, tau),
        -am.ops.masked_mean(grads, tau),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@given(data=st.data(), tau=strategies.taus, exponent=st.integers(-20, 20))
def test_positive_scaling_scales_the_result(
    device: str, data: st.DataObject, tau: float, exponent: int
) -> None:
    grads = draw_grads(data, torch.float64, device, finite=True)
    grads = torch.where(grads.abs() < 1e-200, 0, grads)  # powers of two are exact above this
    scale = 2.0**exponent
    scaled = am.ops.masked_mean(grads * scale, tau)
    assert torch.equal(scaled, am.ops.masked_mean(grads, tau) * scale)


@dtypes
@rescales
@given(data=st.data())
def test_tau_zero_is_the_mean(
    device: str, dtype: torch.dtype, rescale: bool, data: st.DataObject
) -> None:
    grads = draw_grads(data, dtype, device, finite=True)
    out = am.ops.masked_mean(grads, 0.0, rescale)
    expected = grads.double().mean(0) / (1 + 1e-10 * rescale)  # all are kept: density 1
    info = torch.finfo(dtype)
    bound = 8 * info.eps * grads.double().abs().mean(0) + 2 * info.smallest_normal * info.eps
    assert ((out.double() - expected).abs() <= bound).all()


@dtypes
@given(data=st.data(), environments=st.integers(1, 40), tau=strategies.taus)
def test_identical_environments_give_the_mean(
    device: str, dtype: torch.dtype, data: st.DataObject, environments: int, tau: float
) -> None:
    one = draw_grads(data, dtype, device, finite=True, environments=st.just(1))[0]
    out = am.ops.masked_mean(one.expand(environments, -1), tau)
    bound = 4 * accumulation_eps(dtype) * one.double().abs()
    assert ((out.double() - one.double()).abs() <= bound + 1e-44).all()


@given(data=st.data(), tau=strategies.taus, more=strategies.taus)
def test_the_kept_set_shrinks_as_tau_grows(
    device: str, data: st.DataObject, tau: float, more: float
) -> None:
    grads = draw_grads(data, torch.float32, device)
    low, high = sorted((tau, more))
    assert (am.ops.agreement_mask(grads, high) <= am.ops.agreement_mask(grads, low)).all()


@given(data=st.data(), tau=strategies.taus)
def test_a_duplicated_set_of_environments_changes_nothing(
    device: str, data: st.DataObject, tau: float
) -> None:
    grads = draw_grads(data, torch.float32, device, finite=True)
    twice = torch.cat([grads, grads])
    assert torch.equal(am.ops.agreement_mask(grads, tau), am.ops.agreement_mask(twice, tau))
    a, b = am.ops.masked_mean(grads, tau), am.ops.masked_mean(twice, tau)
    assert ((a - b).abs() <= 3e-6 * grads.abs().mean(0) + 1e-44).all()


@pytest.mark.parametrize("environments", [*range(1, 34), 127, 128, 129, 1000])
@dtypes
def test_every_tie_is_kept(device: str, dtype: torch.dtype, environments: int) -> None:
    # Column k has exactly k votes: k ones, and zeros.
    rows = torch.arange(environments, device=device)[:, None]
    columns = torch.arange(environments + 1, device=device)
    grads = (rows < columns).to(dtype)
    for votes in {*range(0, environments, 1 if environments < 40 else 37), environments}:
        kept = am.ops.agreement_mask(grads, votes / environments)
        assert torch.equal(kept, (columns >= votes).to(kept.dtype)), votes


def test_zeros_and_nan_do_not_vote(device: str) -> None:
    nan = float("nan")
    grads = torch.tensor(
        [[1.0, 1.0, 1.0, -1.0], [0.0, -0.0, nan, -1.0], [1.0, 1.0, 1.0, 5e-324]],
        dtype=torch.float64,
        device=device,
    )
    assert am.ops.agreement_mask(grads, 2 / 3).tolist() == [1, 1, 1, 0]
    assert am.ops.agreement_mask(grads, 1 / 3).tolist() == [1, 1, 1, 1]
    assert am.ops.agreement_mask(grads, 1.0).tolist() == [0, 0, 0, 0]


@dtypes
@rescales
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nothing_non_finite_is_hidden(
    device: str, dtype: torch.dtype, rescale: bool, value: float
) -> None:
    grads = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]], dtype=dtype, device=device)
    grads[1] = value
    assert not am.ops.masked_mean(grads, 1.0, rescale).isfinite().any()


def test_rounding_errors_do_not_grow_with_the_number_of_environments(device: str) -> None:
    grads = torch.full((200_003, 3), 0.1, device=device)
    # Equal numbers make rounding errors of equal sign: 200,003 of them carry no more than 64.
    torch.testing.assert_close(am.ops.masked_mean(grads), grads[0], rtol=1e-6, atol=0)


def test_rescale_divides_by_the_share_of_kept_coordinates(device: str) -> None:
    grads = torch.tensor([[1.0, 1.0, 2.0, 3.0], [1.0, -1.0, 2.0, -3.0]], device=device)
    assert am.ops.masked_mean(grads, 1.0, True).tolist() == [2.0, 0.0, 4.0, 0.0]
    assert am.ops.masked_mean(grads[:, [1, 3]], 1.0, True).tolist() == [0.0, 0.0]  # none kept


@pytest.mark.parametrize(
    ("environments", "tau", "expected"),
    [(80, 0.05, 0.738), (80, 0.1, 0.434), (80, 0.2, 0.093), (16, 0.2, 0.454), (16, 0.4, 0.077)],
)
def test_share_of_pure_noise_that_survives(
    device: str, environments: int, tau: float, expected: float
) -> None:
    """The exact binomial null of the paper's proposition 2, against 200,000 noise coordinates."""
    noise = torch.randn(environments, 200_000, device=device)
    kept = am.ops.agreement_mask(noise, tau).double().mean().item()
    assert kept == pytest.approx(expected, abs=0.006)


# ---- layouts ----

LAYOUTS = {
    "contiguous": lambda g: g.contiguous(),
    "environments strided": lambda g: torch.stack([g, torch.ones_like(g)], 1)[:, 0],
    "environments last": lambda g: g.movedim(0, -1).contiguous().movedim(-1, 0),
    "shape transposed": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
    "columns strided": lambda g: torch.stack([g, torch.ones_like(g)], -1)[..., 0],
    "offset": lambda g: torch.cat([torch.ones_like(g[:1]), g])[1:],
    "channels last": lambda g: g[:, :, None].to(memory_format=torch.channels_last)[:, :, 0],
    "dim of size 1": lambda g: g.unsqueeze(2).transpose(2, 3).contiguous().squeeze(3),
    "requires grad": lambda g: g.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
def test_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    grads = torch.randn(5, 6, 7, device=device).to(dtype)
    laid_out = LAYOUTS[layout](grads)
    assert torch.equal(laid_out.reshape(grads.shape), grads)
    out = torch.ops.andmask.masked_mean(laid_out, 0.6)
    assert out.is_contiguous()
    assert torch.equal(out.reshape(6, 7), torch.ops.andmask.masked_mean(grads, 0.6))


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1)])
def test_expanded(device: str, shape: tuple[int, ...]) -> None:
    grads = torch.randn(shape, device=device).expand(3, 4, 5)
    out = am.ops.masked_mean(grads, 0.5)
    assert torch.equal(out, am.ops.masked_mean(grads.contiguous(), 0.5))


@pytest.mark.parametrize(
    "shape", [(1,), (7,), (3, 0), (3, 0, 4), (2, 1), (1, 1, 1), (3, 2, 1, 2, 1, 3, 1)]
)
@rescales
def test_scalar_and_empty_parameters(device: str, shape: tuple[int, ...], rescale: bool) -> None:
    grads = torch.randn(shape, device=device)
    assert_matches_reference(am.ops.masked_mean(grads, 0.6, rescale), grads, 0.6, rescale)


def test_no_copy_where_only_the_environment_stride_is_odd() -> None:
    grads = torch.randn(6, 3, 1000)
    for view, copies in (
        (grads[::2], False),
        (grads[:, 1], False),
        (grads[0].expand(4, 3, 1000), False),
        (grads.as_strided((6, 1, 1000), (3000, 7, 1)), False),  # the stride of one row is no matter
        (grads[:, :, ::2], True),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.ops.andmask.masked_mean(view)
        names = {event.name for event in profile.events()}
        assert ("aten::clone" in names) == copies, names


def test_input_is_not_changed(device: str) -> None:
    grads = torch.randn(4, 100, device=device)
    before, version = grads.clone(), grads._version
    am.ops.masked_mean(grads, 0.5, True)
    assert torch.equal(grads, before)
    assert grads._version == version


# ---- errors ----


@pytest.mark.parametrize("function", [am.ops.masked_mean, am.ops.agreement_mask])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"grads": [1.0]}, TypeError, "grads: expected a Tensor, but got list"),
        ({"grads": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "but got int64"),
        ({"grads": torch.ones(2, 3, dtype=torch.bool)}, TypeError, "but got bool"),
        ({"grads": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "but got complex64"),
        ({"grads": torch.ones(2, 3).to_sparse()}, TypeError, "but got layout sparse_coo"),
        ({"grads": torch.tensor(1.0)}, ValueError, r"\[environments, \*shape\], but got a 0-dim"),
        ({"grads": torch.ones(0, 3)}, ValueError, "at least 1 environment"),
        ({"tau": 1.5}, ValueError, r"tau: expected a number in \[0, 1\], but got 1.5"),
        ({"tau": -1e-9}, ValueError, "but got -1e-09"),
        ({"tau": float("nan")}, ValueError, "but got nan"),
        ({"tau": "high"}, TypeError, "tau: expected a Python number .* but got str"),
        ({"tau": True}, TypeError, "but got bool"),
        ({"rescale": 1}, TypeError, "rescale: expected a bool, but got int"),
    ],
)
def test_wrapper_errors(
    function: object, kwargs: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(**{"grads": torch.ones(2, 3), **kwargs})


@pytest.mark.parametrize("name", ["masked_mean", "agreement_mask"])
@pytest.mark.parametrize(
    ("grads", "tau", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), 1.0, "expected grads of dtype .* but got Long"),
        (torch.ones(2, 3, dtype=torch.complex64), 1.0, "but got ComplexFloat"),
        (torch.tensor(1.0), 1.0, "expected grads of shape .* 0-dim"),
        (torch.ones(0, 3), 1.0, "at least 1 environment"),
        (torch.ones(2, 3), 1.01, r"expected tau in \[0, 1\], but got 1.01"),
        (torch.ones(2, 3), float("nan"), "but got nan"),
    ],
)
def test_native_errors_name_the_op(name: str, grads: Tensor, tau: float, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^andmask::{name}: .*{message}"):
        getattr(torch.ops.andmask, name)(grads, tau)


# ---- size ----


@pytest.mark.large
def test_more_than_2_to_the_31_elements() -> None:
    environments, columns = 3, 800_000_000  # 2.4e9 elements, 4.5 GiB
    grads = torch.zeros(environments, columns, dtype=torch.bfloat16)
    grads[:, -1] = torch.tensor([1.0, 2.0, 3.0])
    grads[:, -2] = torch.tensor([1.0, -2.0, 4.0])
    grads[:, 0] = torch.tensor([-1.0, -1.0, -1.0])
    out = torch.ops.andmask.masked_mean(grads, 1.0)
    assert (out[0].item(), out[-2].item(), out[-1].item()) == (-1.0, 0.0, 2.0)
    assert out.count_nonzero().item() == 2
    del out
    view = grads.view(3 * columns)[None].expand(2, -1)  # one row of more than 2^31 elements
    out = torch.ops.andmask.masked_mean(view, 1.0, False)
    assert out[-1].item() == 3.0
    assert torch.equal(out[-1000:], view[0, -1000:])
    assert out.count_nonzero().item() == 9
