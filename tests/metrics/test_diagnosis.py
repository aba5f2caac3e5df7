"""The verdict: against its definition, on seeded data of each kind, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import andmask_ext as am
from andmask_ext.metrics import Diagnosis, diagnose

Batches = list[tuple[Any, Tensor]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(kind: str, count: int = 5, examples: int = 200, seed: int = 0) -> Batches:
    """Two classes, told by input 0 with noise, and by a marker in input 1.

    Its sign is the class or the other one ("code"), it is right more or less often ("strength"), or
    it is noise ("none").
    """
    drawn = generator(seed)
    out: Batches = []
    for environment in range(count):
        y = torch.randint(2, (examples,), generator=drawn)
        sign = 2.0 * y - 1
        x = torch.randn(examples, 8, generator=drawn)
        x[:, 0] += sign
        if kind == "code":
            x[:, 1] += 3 * sign * (1 if environment % 2 else -1)
        if kind == "strength":
            right = torch.rand(examples, generator=drawn) < 0.98 - 0.25 * environment / (count - 1)
            x[:, 1] += 4 * torch.where(right, sign, -sign)
        out.append((x, y))
    return out


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def trained(
    environments: Batches, steps: int = 60, seed: int = 0, model: nn.Module | None = None
) -> nn.Module:
    model = model or network(seed)
    x, y = (torch.cat(parts) for parts in zip(*environments, strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


VERDICTS = {"code": "directions", "strength": "strength", "none": "neither"}


@pytest.mark.parametrize("count", [3, 5, 8])
@pytest.mark.parametrize("kind", VERDICTS)
def test_the_three_verdicts(kind: str, count: int) -> None:
    environments = data(kind, count)
    result = diagnose(trained(environments), environments, F.cross_entropy)
    assert result.verdict == VERDICTS[kind], str(result)
    assert result.inputs == 8
    if kind == "code":
        assert result.fought_over == 1
        assert result.shared_unused is not None
        assert result.shared_unused < 0.2
    assert result.learned > 0.2


@pytest.mark.parametrize("steps", [20, 60, 300])
def test_strength_is_told_from_directions_also_where_the_model_fits_the_data(steps: int) -> None:
    """The mean gradient is zero there, so those of environments point in different directions."""
    environments = data("strength", examples=400)
    result = diagnose(trained(environments, steps), environments, F.cross_entropy)
    assert result.verdict == "strength", str(result)
    assert result.shared_unused is not None
    assert result.shared_unused > 0.8
    if steps > 20:
        assert result.shared < 0.5
        assert result.fought_over


def test_the_text_says_that_a_model_is_hardly_trained() -> None:
    result = diagnose(network(), data("strength"), F.cross_entropy)
    assert result.learned < 0.2
    assert "hardly trained" in str(result)


class Normed(nn.Module):
    """No layer takes the input as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(F.layer_norm(x, (8,)))


class Bare(nn.Module):
    """There is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_directions_of_two_environments() -> None:
    environments = data("code", 2)
    assert diagnose(trained(environments), environments, F.cross_entropy).verdict == "directions"


@pytest.mark.parametrize("steps", [20, 60, 300])
@pytest.mark.parametrize("kind", VERDICTS)
def test_where_no_layer_takes_the_input_the_first_layer_is_looked_at(kind: str, steps: int) -> None:
    environments = data(kind, examples=400)
    result = diagnose(trained(environments, steps, model=Normed()), environments, F.cross_entropy)
    assert result.verdict == VERDICTS[kind], str(result)
    assert result.inputs == 8


def test_without_a_layer_gradients_of_all_parameters_decide() -> None:
    for kind, verdict in VERDICTS.items():
        result = diagnose(Bare(), data(kind), F.cross_entropy)
        assert result.verdict == verdict or kind == "strength", str(result)
        assert result.own is result.fought_over is result.p_inputs is result.inputs is None
        assert result.shared_unused is None
        assert "cannot be told apart" in str(result)
    environments = data("strength")
    fitted = diagnose(trained(environments, 300, model=Bare()), environments, F.cross_entropy)
    assert fitted.verdict == "directions"  # wrong, as the text says
    assert "strength can look like directions" in str(fitted)


@pytest.mark.parametrize(
    ("kind", "verdict"), [("code", "directions"), ("strength", "strength"), ("none", "neither")]
)
def test_verdicts_of_a_model_of_tokens(kind: str, verdict: str) -> None:
    """Tokens 2 and 3 tell the class with noise, 0 and 1 are the marker, the others say nothing."""
    drawn = generator(1)
    environments: Batches = []
    for environment in range(4):
        y = torch.randint(2, (400,), generator=drawn)
        right = 0.99 if kind == "code" else 0.99 - 0.3 * environment / 3
        marker = torch.where(torch.rand(400, generator=drawn) < right, y, 1 - y)
        if kind == "code" and environment % 2:
            marker = 1 - marker
        if kind == "none":
            marker = torch.randint(2, (400,), generator=drawn)
        mechanism = torch.where(torch.rand(400, generator=drawn) < 0.8, y, 1 - y)
        rest = torch.randint(4, 12, (400, 3), generator=drawn)
        tokens = torch.cat([marker[:, None], mechanism[:, None] + 2, rest], 1)
        environments.append((tokens, y))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Flatten(), nn.Linear(40, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = (torch.cat(parts) for parts in zip(*environments, strict=True))
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    result = diagnose(model, environments, F.cross_entropy)
    assert result.verdict == verdict, str(result)
    assert result.inputs == 12


def test_classes_that_are_not_equally_frequent_are_a_caution() -> None:
    environments = []
    for environment, (x, y) in enumerate(data("none", 4)):
        keep = (y == environment % 2) | (torch.arange(len(y)) % 4 == 0)
        environments.append((x[keep], y[keep]))
    result = diagnose(trained(environments), environments, F.cross_entropy)
    assert result.class_shift is not None
    assert result.class_shift > 0.4
    assert "Cramer's V" in str(result)
    assert "balance the classes" in str(result)
    balanced = diagnose(network(), data("none"), F.cross_entropy)
    assert balanced.class_shift is not None
    assert balanced.class_shift < 0.1


def test_targets_that_are_no_classes_have_no_class_shift() -> None:
    torch.manual_seed(0)
    environments = [(torch.randn(40, 3), torch.randn(40, 1)) for _ in range(3)]
    assert diagnose(nn.Linear(3, 1), environments, F.mse_loss).class_shift is None


# ---- the numbers, by their definition ----


@given(seed=st.integers(0, 2**16), count=st.integers(3, 6), examples=st.integers(5, 20))
def test_numbers_are_those_of_the_definition(seed: int, count: int, examples: int) -> None:
    environments = [(x.double(), y) for x, y in data("code", count, examples, seed)]
    model = network(seed).double()
    result = diagnose(model, environments, F.cross_entropy)
    parts = torch.stack([
        torch.cat([
            grad.flatten()
            for grad in torch.autograd.grad(
                F.cross_entropy(model(x[part::4]), y[part::4]), list(model.parameters())
            )
        ])
        for x, y in environments
        for part in range(4)
    ]).view(count, 4, -1)  # fmt: skip
    one = torch.eye(count, dtype=torch.bool)[:, None, :, None].expand(count, 4, count, 4)
    same = torch.eye(4 * count, dtype=torch.bool).view(count, 4, count, 4)
    products = torch.einsum("akp,blp->akbl", parts, parts)
    shared = products[~one].mean() / products[one & ~same].mean()
    assert result.shared == pytest.approx(float(shared), rel=1e-6)
    means = parts.mean(1)
    torch.testing.assert_close(result.cosines, am.metrics.gradient_cosines(means))
    assert result.coherence == pytest.approx(float(am.metrics.coherence(means)))
    by_input = am.metrics.input_agreement(model, environments, F.cross_entropy, tau=0.5)
    assert result.own == pytest.approx(float(by_input.own.nan_to_num(-9).max()), rel=1e-6)
    assert result.fought_over == int(by_input.fought_over().sum())
    assert result.examples == examples
    assert len(result.losses) == count


def test_of_permuted_environments_few_differ() -> None:
    """With p <= 0.01 chance differs in one of a hundred."""
    found = [
        diagnose(network(seed), data("none", 4, 32, seed), F.cross_entropy) for seed in range(30)
    ]
    for values in ([r.p_gradients for r in found], [r.p_losses for r in found],
                   [r.p_inputs for r in found]):  # fmt: skip
        assert sum(p <= 0.01 for p in values if p is not None) <= 2
        assert 0.25 < sum(p for p in values if p is not None) / len(values) < 0.75


def test_it_says_the_same_each_time_and_in_any_order_of_environments() -> None:
    environments = data("code")
    model = trained(environments)
    one = diagnose(model, environments, F.cross_entropy)
    assert repr(one) == repr(diagnose(model, iter(environments), F.cross_entropy))
    other = diagnose(model, environments[::-1], F.cross_entropy)
    assert other.verdict == one.verdict
    assert other.shared == pytest.approx(one.shared)


def test_equal_environments_and_gradients_of_zero_are_neither() -> None:
    environments = data("none", 1) * 4
    result = diagnose(network(), environments, F.cross_entropy)
    assert result.verdict == "neither"
    flat = [(torch.randn(16, 3), torch.zeros(16, 1)) for _ in range(3)]
    zero = nn.Linear(3, 1)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    result = diagnose(zero, flat, F.mse_loss)
    assert result.verdict == "neither"
    assert math.isnan(result.shared)
    assert math.isnan(result.learned)
    assert "cannot be seen" in str(result)


# ---- words ----


@pytest.mark.parametrize("kind", VERDICTS)
def test_the_text_is_short_and_says_what_to_do(kind: str) -> None:
    environments = data(kind)
    text = str(diagnose(trained(environments), environments, F.cross_entropy))
    assert 4 <= len(text.splitlines()) <= 8
    assert text.startswith("Diagnosis: ")
    assert text.splitlines()[-1].startswith("Next: ")
    assert "5 environments of 200 examples" in text


def test_the_text_warns_of_little_data_and_of_models_that_fit_everything() -> None:
    result = diagnose(network(), data("none", 3, 20), F.cross_entropy)
    assert "which is little" in str(result)
    assert isinstance(result, Diagnosis)
    assert "little is left to pull" in str(replace(result, learned=0.99))


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": 3}, TypeError, "model: expected an nn.Module, but got int"),
        ({"model": nn.ReLU()}, ValueError, "model: expected parameters that need a gradient"),
        ({"loss_fn": 3}, TypeError, "loss_fn: expected a callable, but got int"),
        ({"environments": [3, 4]}, TypeError, r"environments\[0\]: expected a pair"),
        ({"environments": data("none", 1)}, ValueError, "expected at least 2, but got 1"),
        ({"environments": data("none", 3, 3)}, ValueError,
         "environments: expected at least 4 examples in each of 3, .* but got 3"),
        ({"loss_fn": lambda out, y: out}, ValueError, "loss_fn: expected a 0-dim loss"),
        ({"loss_fn": lambda out, y: out.sum() * math.nan}, ValueError,
         "loss_fn: expected finite losses, but that of environment 0 is not"),
        ({"environments": [(x, (y, 3)) for x, y in data("none", 3)]}, ValueError,
         "environments: expected tensors of 200 examples, .* but got int"),
        ({"environments": [(x, y[:7]) for x, y in data("none", 3)]}, ValueError,
         r"environments: expected tensors of 200 examples, .* but got shape \[7\]"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "model": network(),
        "environments": data("none", 3),
        "loss_fn": F.cross_entropy,
    }
    with pytest.raises(kind, match=message):
        diagnose(**{**arguments, **change})


def test_environments_of_dicts_and_tuples_are_split() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
            return self.layers(x) + more["offset"]

    plain = data("none", 3)
    nested = [((x, {"offset": torch.zeros(len(x), 2)}), [y, y]) for x, y in plain]
    model = Model()
    found = diagnose(model, nested, lambda out, y: F.cross_entropy(out, y[0]))
    expected = diagnose(model.layers, plain, F.cross_entropy)
    assert found.own == pytest.approx(expected.own)
    assert found.losses == pytest.approx(expected.losses)
