"""Signs that are not zero, counted by every producer of moments, and rules that need them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext import reference

BATCH = 12
ENVIRONMENTS = {
    "each": None,
    "groups": 4,
    "ragged": torch.tensor([2, 0, 0, 1, 2, 2, 2, 0, 3, 3, 1, 0]),
}


class Tokens(nn.Module):
    """Rows of a table that few examples look up, and layers behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.mixer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.mixer(self.table(tokens)).relu().mean(1)
        return self.head(hidden)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 70), nn.ReLU(), nn.Linear(70, 9), nn.ReLU(), nn.Linear(9, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(BATCH, 6)),
    "cnn": (cnn, lambda: torch.randn(BATCH, 2, 6, 6)),
    "tokens": (Tokens, lambda: torch.randint(0, 40, (BATCH, 5))),
}
models = pytest.mark.parametrize("model", MODELS)
environments = pytest.mark.parametrize("kind", ENVIRONMENTS)


def setting(model: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    build, draw = MODELS[model]
    network = build().double()
    inputs = draw()
    if inputs.is_floating_point():
        inputs = inputs.double()
    for layer in network.modules():  # more units are off than on
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
            nn.init.constant_(layer.bias, -0.3)
    return network, inputs, torch.randint(0, 3, (BATCH,))


def members(kind: str) -> list[Tensor]:
    chosen = ENVIRONMENTS[kind]
    if isinstance(chosen, Tensor):
        return [(chosen == e).nonzero().flatten() for e in range(int(chosen.max()) + 1)]
    return list(torch.arange(BATCH).tensor_split(chosen or BATCH))


def gradients(network: nn.Module, inputs: Tensor, labels: Tensor, kind: str) -> list[Tensor]:
    """The stacked gradients of all environments, one tensor for each parameter."""
    params = list(network.parameters())
    rows = []
    for chosen in members(kind):
        loss = F.cross_entropy(network(inputs[chosen]), labels[chosen])
        rows.append(torch.autograd.grad(loss, params))
    return [torch.stack(grads) for grads in zip(*rows, strict=True)]


@models
@environments
def test_agreement_counts_voters(model: str, kind: str) -> None:
    network, inputs, labels = setting(model)
    rule = am.AndMask(tau=0.5, zeros="abstain")
    agreement = am.Agreement(network, rule, keep_moments=True)
    zeros = 0
    for _ in range(2):  # the second step goes by a plan
        with agreement(ENVIRONMENTS[kind]):
            F.cross_entropy(network(inputs), labels).backward()
        moments = agreement.moments[0]
        for grads, votes, voters, param in zip(
            gradients(network, inputs, labels, kind), moments.votes, moments.voters,
            network.parameters(), strict=True,
        ):  # fmt: skip
            assert votes is not None
            assert voters is not None
            assert voters.dtype == votes.dtype
            assert torch.equal(votes.long(), reference.votes(grads))
            assert torch.equal(voters.long(), reference.voters(grads, "abstain"))
            expected = reference.and_mask(grads, 0.5, zeros="abstain")
            torch.testing.assert_close(param.grad, expected, rtol=1e-9, atol=1e-12)
            zeros += int((voters.long() < len(grads)).sum())
            param.grad = None
    assert zeros > 20, "the models were to have zeros"


RULES = [
    am.AndMask(fdr=0.4),
    am.AndMask(fdr=0.4, zeros="abstain", rescale=True),
    am.AndMask(significance=0.3, zeros="abstain"),
    am.rules.GeometricMean(fdr=0.5, zeros="abstain"),
    am.rules.MaskedAverage(significance=0.2, zeros="abstain"),
    am.rules.SandMask(fdr=0.5, zeros="abstain"),
]
rules = pytest.mark.parametrize("rule", RULES, ids=str)


@rules
@models
@environments
def test_every_producer_gives_the_update_of_stacked_gradients(
    rule: am.rules.Rule, model: str, kind: str
) -> None:
    network, inputs, labels = setting(model)
    params = list(network.parameters())
    stacks = gradients(network, inputs, labels, kind)
    expected = [rule(grads) for grads in stacks]

    def taken() -> list[Tensor]:
        grads = [param.grad for param in params]
        network.zero_grad()
        return grads  # type: ignore[return-value]

    losses = [F.cross_entropy(network(inputs[c]), labels[c]) for c in members(kind)]
    am.backward(losses, rule)
    found = {"am.backward": taken()}
    with am.Agreement(network, rule)(ENVIRONMENTS[kind]):
        F.cross_entropy(network(inputs), labels).backward()
    found["Agreement"] = taken()
    optimizer = am.optim.EnvironmentWrapper(torch.optim.SGD(params, lr=0.0), rule)
    for chosen in members(kind):
        with optimizer.environment():
            F.cross_entropy(network(inputs[chosen]), labels[chosen]).backward()
    optimizer.write_grads()
    found["environment()"] = taken()
    moments = am.Moments(params, rule.moments or ())
    for row in range(len(stacks[0])):
        moments.add([grads[row] for grads in stacks])
    found["Moments"] = rule.update(moments)  # type: ignore[assignment]
    for producer, updates in found.items():
        for update, target in zip(updates, expected, strict=True):
            torch.testing.assert_close(
                update, target, rtol=1e-8, atol=1e-12, msg=lambda m, p=producer: f"{p}: {m}"
            )


def test_voters_are_kept_through_merging_and_saving() -> None:
    grads = torch.randn(300, 50) * (torch.rand(300, 50) < 0.6)
    whole, one, other = (am.Moments([grads[0]], ("votes", "voters")) for _ in range(3))
    whole.add_stacked([grads])
    one.add_stacked([grads[:100]])  # int8; together int16
    other.add_stacked([grads[100:]])
    one.merge(other)
    again = am.Moments([grads[0]], ("votes", "voters"))
    again.load_state_dict(one.state_dict())
    for moments in (one, again):
        for kind in ("votes", "voters"):
            assert torch.equal(getattr(moments, kind)[0], getattr(whole, kind)[0])
    assert whole.voters[0].dtype == torch.int16  # type: ignore[union-attr]
    assert torch.equal(whole.voters[0].long(), grads.ne(0).sum(0))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="expected 'votes' beside 'voters'"):
        am.Moments([grads[0]], ("voters",))
