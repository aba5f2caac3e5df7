"""What cannot be done exactly is refused, by name; and nothing has changed then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved
from .exact_loop import RULE, check
from .layers import Function, rand

IDS = torch.tensor([1, 0, 2, 1, 1, 0])


def refused(
    message: str,
    model: nn.Module,
    x: Tensor,
    environments: int | Tensor | None = None,
    loss: Callable[..., Tensor] = curved,
    error: type[Exception] = RuntimeError,
    **options: object,
) -> None:
    model = model.double() if x.dtype != torch.float32 else model
    marker = torch.ones(())
    for param in model.parameters():
        param.grad = marker.expand(param.shape).to(param.dtype).clone()
    before = {n: p.grad for n, p in model.named_parameters()}
    agreement = am.Agreement(model, RULE, **options)
    for _ in range(2):  # and it has learnt nothing from being refused
        with pytest.raises(error, match=message), agreement(environments):
            loss(model, x).backward()
    for name, param in model.named_parameters():
        assert param.grad is before[name]
        assert (param.grad == 1).all()


# ---- environments that mix ----

SHIFTED = {
    "mean": lambda h: h - h.mean(0),
    "standardised": lambda h: (h - h.mean(0)) / (h.std(0) + 1),
    "softmax": lambda h: h.softmax(0),
    "cumulative sum": lambda h: h.cumsum(0),
    "neighbours": lambda h: h + h.roll(1, 0),
    "reversed": lambda h: h.flip(0),
    "swapped": lambda h: torch.cat([h[:1], h[2:3], h[1:2], h[3:]]),
    "pairs": lambda h: h.unflatten(0, (-1, 2)).mean(1).repeat_interleave(2, 0) + h,
    "first example": lambda h: h + h[:1],
    "maximum": lambda h: h - h.max(0).values,
    "attention": lambda h: (h.flatten(1) @ h.flatten(1).t()).softmax(1) @ h.flatten(1),
    "sorted": lambda h: h.sort(0).values,
    "weak": lambda h: h + 1e-3 * h.mean(0),
    "weak, one way": lambda h: torch.cat([h[:1] + 1e-3 * h[1:2], h[1:]]),
    "weak, other way": lambda h: torch.cat([h[:1], h[1:2] + 1e-3 * h[:1], h[2:]]),
}  # fmt: skip


@pytest.mark.parametrize("rows", [(), (3,), (6,)], ids=str)
@pytest.mark.parametrize("mix", SHIFTED)
def test_mixing_is_refused(mix: str, rows: tuple[int, ...]) -> None:
    function = SHIFTED[mix]
    model = Function(
        lambda s, x: s.b(function(s.a(x).tanh()).flatten(1)[:, :6]), a=nn.Linear(6, 6),
        b=nn.Linear(6, 3),
    )  # fmt: skip
    refused("environments mix", model, rand(6, *rows, 6))
    refused("environments mix", model, rand(6, *rows, 6), IDS)


@pytest.mark.parametrize("width", [5, 6])
def test_features_are_no_examples(width: int) -> None:
    """As many features as examples, which change places."""
    for change in (
        lambda h: h[:, :6].t() if width == 6 else h.t().reshape(6, width),
        lambda h: h.t().reshape(6, width),
    ):
        model = Function(
            lambda s, x, f=change: s.b(f(s.a(x).tanh())),
            a=nn.Linear(width, width),
            b=nn.Linear(width, 3),
        )
        refused("Agreement", model, rand(6, width))


def test_mixing_within_an_environment_is_allowed() -> None:
    model = Function(
        lambda s, x: s.b(_centred(s.a(x).tanh())), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
    ).double()
    check(model, curved, rand(6, 4), environments=3)
    refused("environments mix", model, rand(6, 4))


def _centred(h: Tensor) -> Tensor:
    pairs = h.unflatten(0, (-1, 2))
    return (pairs - pairs.mean(1, keepdim=True)).flatten(0, 1)


def test_one_environment_may_mix_as_it_likes() -> None:
    for mix in ("mean", "softmax", "reversed"):
        model = Function(
            lambda s, x, f=SHIFTED[mix]: s.b(f(s.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
        ).double()
        check(model, curved, rand(6, 4), environments=1)
        check(model, curved, rand(1, 4))


@pytest.mark.parametrize("count", [17, 40])
def test_a_swap_of_any_two_of_many_examples_is_refused(count: int) -> None:
    order = torch.arange(count)
    model = Function(lambda s, x: s.b(s.a(x)[order]), a=nn.Linear(2, 2), b=nn.Linear(2, 2)).double()
    x, agreement = rand(count, 2), am.Agreement(model, RULE)
    for i in range(0, count, 3):
        for j in range(i + 1, count, 5):
            order[i], order[j] = j, i
            with pytest.raises(RuntimeError, match="environments mix"), agreement():
                curved(model, x).backward()
            order[i], order[j] = i, j


def test_noise_drawn_within_the_context_is_data() -> None:
    model = Function(
        lambda s, x: s.b(s.a(x).flip(0)), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
    ).double()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="environments mix"), am.Agreement(model, RULE)():
            curved(model, rand(6, 4)).backward()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with am.Agreement(model, RULE)():
        curved(model, rand(6, 4)).backward()
    torch.manual_seed(1)
    x = rand(6, 4)
    am.backward([curved(other, row[None]) for row in x], RULE, other.parameters())
    torch.testing.assert_close(model[0].weight.grad, other[0].weight.grad)


# ---- what the model does not return ----


@pytest.mark.parametrize("width", [3, 4])
def test_a_model_that_returns_only_its_loss(width: int) -> None:
    """The loss is the mean of a tensor. Which of two axes of one size holds the batch is unsaid."""

    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if self.mix:
            hidden = hidden - hidden.mean(0)
        return self.b(hidden.tanh()).sin().mean()

    model = Function(forward, a=nn.Linear(3, 5), b=nn.Linear(5, width)).double()
    model.mix = True
    refused("Agreement", model, rand(4, 3), loss=lambda m, x: m(x))
    model.mix = False
    if width == 4:
        refused("cannot tell where", model, rand(4, 3), loss=lambda m, x: m(x))
    else:
        check(model, lambda m, x: m(x), rand(4, 3))
    check(model, lambda m, x: m(x), rand(4, 3), check_mixing="never")


def test_an_auxiliary_loss_that_is_not_returned() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.b(x)
        if self.mix:
            hidden = hidden - hidden.mean(0)
        self.extra = hidden.square().mean()
        return self.a(x)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        return curved(model, x) + vars(model).pop("extra")  # such a tensor cannot be copied

    model = Function(forward, a=nn.Linear(3, 5), b=nn.Linear(3, 5)).double()
    model.mix = True
    refused("environments mix", model, rand(4, 3), loss=step)
    model.mix = False
    check(model, step, rand(4, 3))


def test_terms_of_parameters_only() -> None:
    """Within the loss they belong to each environment; alone they belong to none."""
    for model in (nn.Linear(3, 2).double(), nn.Linear(4, 4).double()):
        x = rand(4, model.in_features)

        def decayed(model: nn.Module, x: Tensor) -> Tensor:
            return curved(model, x) + sum(p.square().sum() for p in model.parameters())

        check(model, decayed, x)
        model.zero_grad()
        agreement = am.Agreement(model, RULE)
        with pytest.raises(RuntimeError, match="parameters only"), agreement():
            torch.autograd.backward([curved(model, x), model.weight.square().sum()])
        with pytest.raises(RuntimeError, match="parameters only"), agreement():  # noqa: PT012
            curved(model, x)
            model.weight.square().sum().backward()
        assert all(param.grad is None for param in model.parameters())


def test_the_first_input_is_not_the_batch() -> None:
    """The size of the batch is the one that an input shares with the output."""
    for width in (3, 4, 5):
        model = Function(lambda s, t, x: s.a(x) * t.sum(), a=nn.Linear(width, 3)).double()
        for batch in (4, 5, 6):
            check(model, lambda m, x: m(torch.ones(3), x).sin().mean(), rand(batch, width))


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (8, 4), (4, 8)])
@pytest.mark.parametrize("width", [4, 5, 8])
def test_two_batches_of_different_sizes_in_one_loss(sizes: tuple[int, int], width: int) -> None:
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    other = rand(sizes[1], width)

    def both(model: nn.Module, x: Tensor) -> Tensor:
        return curved(model, x) + curved(model, other)

    refused("batches of different sizes", model, rand(sizes[0], width), loss=both)


def test_parts_called_with_other_sizes() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)})

    def flattened(model: nn.Module, x: Tensor) -> Tensor:
        return model["b"](model["a"](x).flatten(0, 1)).sin().mean()

    refused("different sizes", model, rand(4, 2, 4), loss=flattened)


# ---- statistics of the batch ----


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.bottom(x)
        return self.head(hidden)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), r"1 \(BatchNorm1d\)"),
        (nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)), r"0 \(BatchNorm1d\)"),
        (nn.Sequential(nn.Linear(4, 4).requires_grad_(False),
                       nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 2)), r"1 \(BatchNorm"),
        (Frozen(), r"bottom.1 \(BatchNorm1d\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval(),
         r"1 \(BatchNorm1d\)"),
        (Function(lambda s, x: F.batch_norm(s.a(x), None, None, training=True), a=nn.Linear(4, 4)),
         "mix|batch_norm"),
    ],
    ids=["trained", "of the input", "frozen", "without gradients", "no running", "functional"],
)  # fmt: skip
def test_batch_norm_in_training_mode_is_refused_by_the_name_of_its_module(
    model: nn.Module, name: str
) -> None:
    refused(name, model, rand(6, 4), 3)


def test_batch_norm_with_running_statistics_is_exact() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4),
        nn.BatchNorm1d(4),
    ).double()  # fmt: skip
    model(rand(8, 2, 5, 5))
    model.eval()
    state = copy.deepcopy(model.state_dict())
    check(model, curved, rand(6, 2, 5, 5), environments=IDS)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---- other things ----


@pytest.mark.filterwarnings("ignore:Using .torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    compiled = torch.compile(model, backend="aot_eager")
    agreement, x = am.Agreement(model, RULE), torch.randn(6, 4)
    with pytest.raises(RuntimeError, match=r"compiled with torch\.compile"), agreement():
        curved(compiled, x).backward()
    assert all(p.grad is None for p in model.parameters())
    torch._dynamo.reset()


def test_hooks_on_parameters_and_on_what_is_made_of_them() -> None:
    def of(tensor: Tensor) -> Tensor:
        tensor.register_hook(lambda grad: grad * 3)
        return tensor

    for forward in (
        lambda s, x: x @ of(s.w.t()),
        lambda s, x: x @ of(s.w.t().tanh()),
        lambda s, x: x @ of(s.w.view(4, 4)[:3].t()),
        lambda s, x: x @ (s.w.view_as(s.w) * of(s.w * 2)).t(),
    ):
        refused("hook", Function(forward, w=rand(4, 4)), rand(6, 4))
    model = Function(lambda s, x: x @ s.w, w=rand(4, 4))
    model.w.register_hook(lambda grad: grad * 3)
    refused("hook", model, rand(6, 4))


def test_hooks_on_data_are_heeded_once() -> None:
    """Also where the node's formula is called once for each environment."""

    def of(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: grad * 3)
        return tensor

    for forward in (
        lambda s, x: of(s.w @ x.t()).t(),
        lambda s, x: of(torch.maximum(x, s.w[0])),
        lambda s, x: of(of(s.layer(x)).tanh() @ s.w),
    ):
        check(Function(forward, w=rand(4, 4), layer=nn.Linear(4, 4)).double(), curved, rand(6, 4))


def test_module_hooks_are_heeded() -> None:
    layer = nn.Linear(4, 4)
    layer.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2)).double()
    check(model, curved, rand(6, 4))


def test_plain_backward_only() -> None:
    model, x = nn.Linear(4, 2).double(), rand(6, 4)
    agreement = am.Agreement(model, RULE)
    for arguments in ({"create_graph": True}, {"inputs": [model.weight]}):
        with pytest.raises(RuntimeError, match=r"plain loss\.backward"), agreement():
            curved(model, x).backward(**arguments)
    with pytest.raises(RuntimeError, match="scalar loss"), agreement():
        model(x).backward()
    with pytest.raises(RuntimeError, match="requires gradients"), agreement():
        curved(model, x).detach().backward()
    assert model.weight.grad is None


@pytest.mark.parametrize("of", ["data", "constants"])
@pytest.mark.parametrize("bags", [False, True])
def test_sparse_embeddings(of: str, bags: bool) -> None:
    chosen = torch.tensor([[0, 2], [1, 1]])

    def look_up(self: Function, x: Tensor) -> Tensor:
        lines = (x > 0).long() if of == "data" else chosen
        if bags:
            found = F.embedding_bag(lines, self.w, sparse=True, mode="sum")
        else:
            found = F.embedding(lines, self.w, sparse=True).sum(1)
        return found if of == "data" else x @ found

    refused("sparse=True", Function(look_up, w=rand(5, 3)), rand(6, 2), error=TypeError)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bags_scaled_by_frequency(mode: str) -> None:
    """The remedy that the message names is exact."""
    bags = nn.EmbeddingBag(5, 3, mode=mode, scale_grad_by_freq=True).double()
    x = torch.tensor([[0, 0, 3, 3, 3], [1, 2, 2, 0, 4], [4, 4, 4, 4, 0]])
    with pytest.raises(RuntimeError, match="scale_grad_by_freq=False"), am.Agreement(bags, RULE)():
        curved(bags, x).backward()
    assert bags.weight.grad is None
    check(bags, curved, x, environments=1)
    lines = nn.Embedding(5, 3, scale_grad_by_freq=True).double()
    check(Function(lambda s, x: s.lines(x).sum(1), lines=lines), curved, x)


@pytest.mark.parametrize("rule", [RULE, None])
def test_a_parameter_that_cannot_vote_must_stay_frozen(rule: am.AndMask | None) -> None:
    turn = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64), requires_grad=False)
    model = nn.Linear(3, 3)
    model.turn = turn
    optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.8)
    agreement = am.Agreement(model, rule or optimizer)
    for frozen in (True, False, True):
        turn.requires_grad_(not frozen)
        expected = nullcontext() if frozen else pytest.raises(TypeError, match="turn to stay with")
        with expected, agreement():
            (model(torch.randn(4, 3)).to(turn.dtype) @ turn).abs().mean().backward()
        optimizer.step() if frozen and rule is None else optimizer.zero_grad()
