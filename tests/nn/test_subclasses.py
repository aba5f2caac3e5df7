"""Subclasses of batch norm with a forward pass of their own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext.nn import convert_batchnorm

from ..agreement.exact_loop import RULE, check
from ..agreement.layers import rand
from ..models import curved

IDS = torch.tensor([1, 0, 2, 1, 1, 0])
ENVIRONMENTS = pytest.mark.parametrize("environments", [None, 3, IDS], ids=["each", "3", "ids"])


class Same(nn.BatchNorm2d):
    """Batch norm by another name."""


class Activated(nn.BatchNorm2d):
    """Batch norm and an activation with a parameter."""

    def __init__(self, channels: int, **options: object) -> None:
        super().__init__(channels, **options)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Copied(nn.BatchNorm2d):
    """What the forward pass of batch norm does, written once more, and an activation."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        own = self.running_mean is None
        kept = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.weight,
            bias=self.bias,
            training=self.training or own,
            momentum=momentum,
            eps=self.eps,
        )
        return F.relu_(x * scale)


class Shifted(nn.BatchNorm2d):
    """Batch norm with a weight that starts at zero."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, 1 + self.weight, self.bias, self.training,
            self.momentum, 1e-3,
        )  # fmt: skip


class Centred(nn.BatchNorm2d):
    """No batch norm any more."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True)


class Halves(nn.BatchNorm2d):
    """Batch norm of each half of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Halves, self).forward(half) for half in x.chunk(2, 3)], 3)


KINDS = pytest.mark.parametrize("kind", [Same, Activated, Copied, Shifted])


def network(kind: type[nn.BatchNorm2d], **options: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), kind(3, **options), nn.Conv2d(3, 2, 2), nn.Flatten(),
        nn.Linear(8, 3),
    ).double()  # fmt: skip


@KINDS
@ENVIRONMENTS
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
def test_equals_the_loop(
    kind: type[nn.BatchNorm2d], environments: int | Tensor | None, options: dict[str, object]
) -> None:
    if kind is Shifted and options:
        options = {"momentum": 0.3}
    plain = network(kind, **options)
    model, agreement = convert_batchnorm(copy.deepcopy(plain)), None
    for training in (True, False, True):
        model.train(training)
        plain.train(training)
        x = rand(6, 2, 5, 5)
        before = copy.deepcopy(model.state_dict())
        agreement = check(
            model, curved, x, environments=environments, agreement=agreement, tolerance=1e-9
        )
        plain.load_state_dict(before)
        ids = torch.arange(6) if environments is None else torch.arange(3).repeat_interleave(2)
        for environment in range(int(ids.max()) + 1):
            plain(x[(environments if isinstance(environments, Tensor) else ids) == environment])
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer)


@KINDS
def test_outside_of_the_context_nothing_changes(kind: type[nn.BatchNorm2d]) -> None:
    plain = network(kind)
    model, x = convert_batchnorm(copy.deepcopy(plain)), rand(6, 2, 5, 5)
    assert torch.equal(model(x), plain(x))
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


def test_a_layer_stays_what_it_was() -> None:
    layer = Activated(3)
    state = layer.state_dict()
    assert convert_batchnorm(layer) is layer
    assert isinstance(layer, Activated)
    assert list(layer.state_dict()) == list(state)
    assert type(convert_batchnorm(Activated(3))) is type(layer)
    assert type(convert_batchnorm(layer)) is type(layer)  # once more: nothing happens


def test_copies_and_pickles() -> None:
    model, x = convert_batchnorm(network(Activated)), rand(6, 2, 5, 5)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(model),
        *[pickle.loads(pickle.dumps(model, protocol)) for protocol in range(2, 6)],
        torch.load(buffer, weights_only=False),
    ]
    for twin in twins:
        assert type(twin[1]) is type(model[1])
        check(twin, curved, x)


@pytest.mark.parametrize(("kind", "calls"), [(Centred, 0), (Halves, 2)])
def test_what_is_no_batch_norm_is_refused(kind: type[nn.BatchNorm2d], calls: int) -> None:
    """The remedies that the message names work."""
    model, x = convert_batchnorm(network(kind)), rand(6, 2, 5, 5)
    with pytest.raises(RuntimeError, match=f"batch_norm once, but it did {calls} times"), \
            am.Agreement(model, RULE)(3):  # fmt: skip
        curved(model, x).backward()
    assert all(param.grad is None for param in model.parameters())
    am.backward((curved(model, part) for part in x.split(2)), RULE, model.parameters())
    if kind is Halves:
        check(model.eval(), curved, x, environments=3)
