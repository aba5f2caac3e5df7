"""TemporalAndMaskAdam in an ordinary training loop."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from ..models import mlp
from .common import assert_equal, optim, parameters, random_grads, values


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], scale: float = 1.0) -> None:
    for param, stack in zip(params, random_grads(params, 1), strict=True):
        param.grad = stack[0] * scale
    optimizer.step()


def test_a_coordinate_whose_gradient_keeps_turning_stays() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = optim.TemporalAndMaskAdam([param], lr=0.1, betas=(0.5, 0.9, 0.8), tau=0.5)
    for turn in range(40):
        param.grad = torch.tensor([1.0, (-1.0) ** turn, 0.0])
        optimizer.step()
    assert param[0] < -1
    assert param[1:].tolist() == [0.0, 0.0]


def test_zeros_vote_for_neither_sign_and_nan_shows() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = optim.TemporalAndMaskAdam([param], lr=0.1, betas=(0.5, 0.9, 0.0), tau=1.0)
    param.grad = torch.tensor([1.0, 0.0, -0.0, float("nan")])
    optimizer.step()
    assert optimizer.state[param]["sign_avg"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert param[:3].tolist()[1:] == [1.0, 1.0]
    assert param[0] < 1
    assert param[3].isnan()


def test_groups_parameters_without_grad_and_closures() -> None:
    params = parameters()
    groups = [{"params": params[:2], "tau": 0.0}, {"params": params[2:], "tau": 1.0}]
    optimizer = optim.TemporalAndMaskAdam(groups, lr=0.1, tau=0.5)
    before = values(params)

    def closure() -> float:
        optimizer.zero_grad()
        loss = params[0].sum() + params[2].sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == pytest.approx(float(before[0].sum() + before[2].sum()))
    assert not torch.equal(params[0].detach(), before[0])
    assert_equal(params[1:], before[1:])  # no gradient; and tau = 1 after one step of beta3 = .9
    assert params[1] not in optimizer.state
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_have_float32_state(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = optim.TemporalAndMaskAdam(params, tau=0.5)
    step(optimizer, params)
    for param in params:
        assert {t.dtype for t in optimizer.state[param].values()} == {torch.float32}
        assert param.dtype == dtype


def test_the_version_of_parameters_is_counted_up() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.TemporalAndMaskAdam([param], tau=0.5)
    out = (param * param).sum()
    step(optimizer, [param])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(how: str) -> None:
    params = parameters()
    optimizer = optim.TemporalAndMaskAdam(params, tau=0.3)
    step(optimizer, params)
    pair = (params, optimizer)
    others, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for chosen, chosen_optimizer in ((params, optimizer), (others, other)):
        torch.manual_seed(5)
        step(chosen_optimizer, chosen)
    assert_equal(params, others)


def test_with_a_grad_scaler_clipping_and_a_scheduler() -> None:
    model = mlp()
    optimizer = optim.TemporalAndMaskAdam(model.parameters(), tau=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    scaler = GradScaler(torch.get_default_device().type, init_scale=2.0**16)
    before = values(model.parameters())
    for value in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((model(torch.randn(3, 4)) * value).sum()).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if value == 1.0:
            scheduler.step()
            assert not torch.equal(before[0], model[0].weight.detach())
        else:
            assert_equal(list(model.parameters()), before)


def test_a_sparse_gradient_is_refused_by_name() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = optim.TemporalAndMaskAdam(embedding.parameters(), tau=0.5)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        TypeError, match=r"params\[0\].grad: expected a dense gradient .* sparse_coo"
    ):
        optimizer.step()
    assert not optimizer.state


def test_a_state_from_before_significance_brings_its_tau() -> None:
    params = parameters()
    state = optim.TemporalAndMaskAdam(params, tau=0.4).state_dict()
    del state["param_groups"][0]["significance"]
    optimizer = optim.TemporalAndMaskAdam(params, significance=0.05)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["tau"] == 0.4
    assert optimizer.param_groups[0]["significance"] is None
    step(optimizer, params)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"significance": 0.0, "tau": 0.5}, ValueError, "but got both"),
        ({"fdr": 0.1}, ValueError, "fdr: expected tau or significance, but got fdr=0.1"),
        (None, TypeError, "must be a dict"),
    ],
)
def test_groups_that_are_refused(
    group: dict[str, float] | None, error: type[Exception], message: str
) -> None:
    params = parameters()
    optimizer = optim.TemporalAndMaskAdam(params[:1], tau=0.5)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(params[1:] if group is None else {"params": params[1:], **group})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_a_level_that_no_average_reaches_is_said(beta: float) -> None:
    # The average of signs that always agree tends to 1, the threshold to a limit.
    limit = 2 * math.exp(-(1 + beta) / (2 * (1 - beta)))
    for level, moves in ((limit * 1.1, True), (limit * 0.9, False)):
        param = nn.Parameter(torch.zeros(1))
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            optimizer = optim.TemporalAndMaskAdam(
                [param], betas=(0.9, 0.999, beta), significance=level
            )
        assert [moves] == [not given]
        assert moves or "nothing will move" in str(given[0].message)
        for _ in range(int(10 / (1 - beta))):
            param.grad = torch.ones(1)
            optimizer.step()
        assert bool(param.detach().ne(0)) == moves
