"""What environments agree on by input, against the definition."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import andmask_ext as am
from andmask_ext.metrics import InputAgreement, input_agreement

F64 = torch.float64
Batches = list[tuple[Any, Tensor]]


def batches(count: int, shape: tuple[int, ...], examples: int = 8, zeros: float = 0.3) -> Batches:
    """Environments of random inputs, many of them zero, and three classes."""
    out: Batches = []
    for _ in range(count):
        x = torch.randn(examples, *shape, dtype=F64)
        out.append((x * (torch.rand_like(x) >= zeros), torch.randint(3, (examples,))))
    return out


def gradients(model: nn.Module, weight: Tensor, environments: Batches, every: int) -> Tensor:
    """Gradients of parts of environments, by autograd: [environments, parts, *shape]."""
    rows = []
    for x, y in environments:
        losses = F.cross_entropy(model(x), y, reduction="none") / len(y)
        rows += [
            torch.autograd.grad(losses[part::every].sum(), weight, retain_graph=True)[0]
            for part in range(every)
        ]
    return torch.stack(rows).unflatten(0, (len(environments), every))


def expected(parts: Tensor, tau: float) -> dict[str, Tensor]:
    """The definition, of gradients [environments, parts, inputs, coordinates]; all exist."""
    d, k = parts.shape[:2]
    whole = parts.sum(1)
    products = torch.einsum("akic,blic->iakbl", parts, parts)
    one = torch.eye(d, dtype=torch.bool)[:, None, :, None].expand(d, k, d, k)
    same = torch.eye(d * k, dtype=torch.bool).view(d, k, d, k)
    energy, within, between = (products[:, mask].mean(1) for mask in (same, one & ~same, ~one))
    absent = (whole == 0).all(0).all(1)
    values = {
        "share": [am.metrics.kept_fraction(whole[:, i], tau) for i in range(whole.shape[1])],
        "noise": [am.metrics.noise_kept_fraction(whole[:, i], tau) for i in range(whole.shape[1])],
        "sign_agreement": am.metrics.sign_agreement(whole).mean(1),
        "common": between / energy,
        "own": (within - between) / energy,
    }
    return {
        name: torch.where(absent, torch.nan, torch.as_tensor(value, dtype=F64))
        for name, value in values.items()
    }


def check(result: InputAgreement, parts: Tensor, tau: float, shape: tuple[int, ...]) -> None:
    for name, value in expected(parts, tau).items():
        found = getattr(result, name)
        assert found.shape == shape
        assert found.dtype == F64
        torch.testing.assert_close(found.flatten(), value, equal_nan=True, msg=name)


@given(
    seed=st.integers(0, 2**16),
    count=st.integers(2, 6),
    tau=st.sampled_from([0.0, 0.4, 0.5, 0.8, 1.0]),
    shape=st.sampled_from([(5,), (2, 3), (1, 2, 2)]),
)
def test_features_are_columns_of_the_weight(
    seed: int, count: int, tau: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(seed)
    size = torch.Size(shape).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    environments = batches(count, shape)
    for x, _ in environments:
        x.flatten(1)[:, 0] = 0  # no environment has this one
    result = input_agreement(model, environments, F.cross_entropy, tau=tau)
    parts = gradients(model, model[1].weight, environments, 4).mT
    check(result, parts, tau, shape)
    assert result.share.flatten()[0].isnan()
    assert result.kind == ("features" if len(shape) == 1 else "pixels")


def test_features_of_sequences_share_their_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Flatten(), nn.Linear(21, 3)).double()
    environments = batches(4, (3, 5))
    result = input_agreement(model, environments, F.cross_entropy, tau=0.5)
    check(result, gradients(model, model[0].weight, environments, 4).mT, 0.5, (5,))


def test_the_mean_over_inputs_is_the_kept_fraction_of_the_weight() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    environments = batches(5, (6,), zeros=0.0)
    result = input_agreement(model, environments, F.cross_entropy, tau=0.6)
    grads = gradients(model, model[0].weight, environments, 1)[:, 0]
    torch.testing.assert_close(result.share.mean(), am.metrics.kept_fraction(grads, 0.6))
    torch.testing.assert_close(result.noise.mean(), am.metrics.noise_kept_fraction(grads, 0.6))


@given(seed=st.integers(0, 2**16), tau=st.sampled_from([0.5, 1.0]))
def test_tokens_are_rows_of_the_embedding(seed: int, tau: float) -> None:
    torch.manual_seed(seed)
    embedding = nn.Embedding(9, 4, padding_idx=1)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 3)).double()
    environments: Batches = [
        (torch.randint(0, 7, (8, 3)), torch.randint(3, (8,))) for _ in range(4)
    ]  # nobody has tokens 7 and 8
    result = input_agreement(model, environments, F.cross_entropy, tau=tau)
    check(result, gradients(model, embedding.weight, environments, 4), tau, (9,))
    assert result.share[[1, 7, 8]].isnan().all()
    assert result.kind == "tokens"


CONVOLUTIONS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (nn.Conv1d, {"in_channels": 4, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}),
    (nn.Conv1d, {"in_channels": 1, "kernel_size": 2, "stride": 3}),
    (nn.Conv2d, {"in_channels": 2, "kernel_size": (3, 2), "dilation": (1, 2), "stride": (2, 1)}),
    (nn.Conv2d, {"in_channels": 2, "kernel_size": (3, 4), "padding": "same"}),
    (nn.Conv2d, {"in_channels": 1, "kernel_size": 2, "padding": (0, 2), "stride": 3}),
    (nn.Conv3d, {"in_channels": 2, "kernel_size": 2, "padding": 1, "stride": 2}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("kind", "options"), CONVOLUTIONS)
def test_pixels_have_weights_of_their_own(
    kind: Callable[..., Any], options: dict[str, Any]
) -> None:
    torch.manual_seed(2)
    layer = kind(out_channels=4, **options).double()
    size = (options["in_channels"], 5, 6, 4)[: 1 + len(layer.kernel_size)]
    environments = batches(4, size)
    head = nn.Linear(layer(environments[0][0]).flatten(1).shape[1], 3).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), head)
    result = input_agreement(model, environments, F.cross_entropy, tau=0.5)
    assert result.share.shape == size
    deltas = []
    for x, y in environments:
        output = layer(x).detach().requires_grad_()
        deltas.append(torch.autograd.grad(F.cross_entropy(model[1:](output), y), output)[0])
    for place in itertools.product(*map(range, size)):
        one = torch.zeros(1, *size, dtype=F64)
        one[(0, *place)] = 1
        # The weights that a pixel meets at each place: all outputs pull at them.
        met = weight_gradient(layer, one, torch.ones_like(deltas[0][:1])) != 0
        if not met.any():
            assert result.share[place].isnan()
            continue
        parts = torch.stack([
            weight_gradient(layer, (x * one)[part::4], delta[part::4])[met]
            for (x, _), delta in zip(environments, deltas, strict=True)
            for part in range(4)
        ]).view(4, 4, 1, -1)  # fmt: skip
        for name, value in expected(parts, 0.5).items():
            found = getattr(result, name)[place].view(1)
            torch.testing.assert_close(found, value, equal_nan=True, msg=f"{name} {place}")


def weight_gradient(layer: Any, x: Tensor, delta: Tensor) -> Tensor:
    weight = layer.weight.detach().requires_grad_()
    return torch.autograd.grad((layer._conv_forward(x, weight, None) * delta).sum(), weight)[0]


# ---- which layer, and what stays as it is ----


class Scaled(nn.Module):
    """Normalises element by element, and takes a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(6, 3), nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.first(((x - 0.5) / 2).flatten(1))
        return self.second(self.drop(hidden + y))


def test_the_layer_is_found_behind_scaling_and_beside_other_inputs() -> None:
    environments = [((x, x.flip(1)), y) for x, y in batches(3, (6,))]
    result = input_agreement(Scaled(), environments, F.cross_entropy, tau=0.5)
    assert result.layer == "first"


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)
    ).double()
    model[2].eval()
    environments = batches(3, (6,))
    F.cross_entropy(model(environments[0][0]), environments[0][1]).backward()
    model[0].bias.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    for drop in (False, True):
        model[2].train(drop)
        modes[3] = drop
        input_agreement(model, environments, F.cross_entropy, tau=0.5)
        am.metrics.diagnose(model, environments, F.cross_entropy)
        assert torch.equal(torch.get_rng_state(), random)
        assert [module.training for module in model.modules()] == modes
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        for param, grad in zip(model.parameters(), grads, strict=True):
            assert (param.grad is None) == (grad is None)
            assert grad is None or torch.equal(param.grad, grad)
        assert not any(module._forward_hooks for module in model.modules())
    assert not model[0].bias.requires_grad


def test_it_works_without_grad_mode_and_with_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    environments = batches(3, (6,))
    whole = input_agreement(model, environments, F.cross_entropy, tau=0.5)
    with torch.no_grad():
        again = input_agreement(model, iter(environments), F.cross_entropy, tau=0.5)
    frozen = input_agreement(model.requires_grad_(False), environments, F.cross_entropy, tau=0.5)
    for other in (again, frozen):
        assert torch.equal(other.own, whole.own)


def test_few_examples_and_one_environment_have_no_own_share() -> None:
    model = nn.Linear(6, 3).double()
    for environments in (batches(3, (6,), examples=3), batches(1, (6,), examples=8)):
        result = input_agreement(model, environments, F.cross_entropy, tau=0.5)
        assert result.own.isnan().all()
        assert result.common.isnan().all()
        assert not result.share.isnan().any()
        assert not result.fought_over().any()


def test_a_marker_of_differing_meaning_is_fought_over() -> None:
    torch.manual_seed(3)
    environments = []
    for sign in (1, -1, 1, -1):
        x = torch.randn(64, 5)
        environments.append((x, x[:, :1] + sign * x[:, 1:2]))
    result = input_agreement(nn.Linear(5, 1), environments, F.mse_loss, tau=1.0)
    assert result.fought_over().tolist() == [False, True, False, False, False]
    assert float(result.common[0]) > 0.5
    assert "1 fought over" in repr(result)
    assert torch.equal(result.below_noise, result.share < result.noise)


class Mixed(nn.Module):
    def __init__(self, of: str) -> None:
        super().__init__()
        self.of, self.one, self.two = of, nn.Linear(6, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.of == "norm":
            return self.two(self.one(F.layer_norm(x, (6,))))
        if self.of == "both":
            return self.two(x) + self.two(self.one(x))
        if self.of == "order":
            return self.two(self.one(x.flip(1)))
        return self.two(x + self.one(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Mixed("norm"), "model: expected one of nn.Linear, .* 'one', takes something else"),
        (Mixed("order"), "model: expected one of nn.Linear, .* 'one', takes something else"),
        (Mixed("both"), "model: expected one layer that takes the input, but got 'two', 'one'"),
        (nn.Sequential(nn.Tanh()), "model: expected one of nn.Linear, .* but none does$"),
        (nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 1, 2, padding=1,
         padding_mode="circular"), nn.Flatten()).double(), "'1' to be padded by zeros"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        input_agreement(model, batches(2, (6,)), F.cross_entropy, tau=0.5)


def test_a_residual_layer_is_not_the_layer_of_the_input() -> None:
    result = input_agreement(Mixed("residual"), batches(2, (6,)), F.cross_entropy, tau=0.5)
    assert result.layer == "one"


def test_a_named_layer_is_taken_as_it_is() -> None:
    environments = batches(3, (6,))
    found = input_agreement(Mixed("norm"), environments, F.cross_entropy, tau=0.5, layer="one")
    assert found.share.shape == (6,)
    with pytest.raises(ValueError, match=r"model: expected one call of 'two' .* but got 2"):
        input_agreement(Mixed("both"), environments, F.cross_entropy, tau=0.5, layer="two")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": 3}, TypeError, "model: expected an nn.Module, but got int"),
        ({"loss_fn": 3}, TypeError, "loss_fn: expected a callable, but got int"),
        ({"environments": []}, ValueError, "environments: expected at least 1, but got none"),
        ({"environments": [3]}, TypeError, r"environments\[0\]: expected a pair"),
        ({"environments": [("a", "b")]}, TypeError, "inputs: expected a Tensor, .* got str"),
        ({"environments": [(torch.zeros(0, 6, dtype=F64), torch.zeros(0).long())]}, ValueError,
         r"inputs: expected \[examples >= 1, \*shape\], but got shape \[0, 6\]"),
        ({"loss_fn": lambda out, y: out}, ValueError, r"loss_fn: expected a 0-dim .* \[8, 3\]"),
        ({"loss_fn": lambda out, y: torch.zeros((), requires_grad=True)}, ValueError,
         "loss_fn: expected a loss that depends on ''"),
        ({"tau": 2}, ValueError, r"tau: expected a number in \[0, 1\]"),
        ({"layer": "absent"}, ValueError, "layer: expected the name of a module, but got 'absent'"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "model": nn.Linear(6, 3).double(),
        "environments": batches(2, (6,)),
        "loss_fn": F.cross_entropy,
        "tau": 0.5,
    }
    with pytest.raises(kind, match=message):
        input_agreement(**{**arguments, **change})


def test_layers_of_other_kinds_and_other_sizes_are_refused() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(6, 3)).double()
    with pytest.raises(TypeError, match=r"layer: expected nn.Linear, .* but '0' is ReLU"):
        input_agreement(model, batches(2, (6,)), F.cross_entropy, tau=0.5, layer="0")
    pooled = nn.Sequential(nn.Conv1d(1, 3, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten()).double()
    environments = batches(1, (1, 6)) + batches(1, (1, 7))
    with pytest.raises(ValueError, match=r"shape \[1, 6\] in each, but got \[1, 7\] in environmen"):
        input_agreement(pooled, environments, F.cross_entropy, tau=0.5)
