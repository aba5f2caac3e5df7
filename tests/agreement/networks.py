"""Random small networks that move rows about, and batches for them.

Sizes are small, so that the batch often divides a size of a weight. Indices are made from data:
they differ at each step, and are the same when a checkpointed region is computed again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import andmask_ext as am

from .exact_loop import RULE, check
from .layers import rand
from .moves import MIXERS, MOVES, Layer
from .outcomes import EXACT, MIXING, REENTRANT_INPUT, outcome

SHOWN = "exact once the inputs require gradients"

# ---- layers ----


class Made(nn.Module):
    """A linear layer of rows whose weight is made of its parameters."""

    def __init__(self, width: int, kind: str, seed: int) -> None:
        super().__init__()
        self.kind, self.seed = kind, seed
        self.w = nn.Parameter(rand(width, width) / width**0.5)
        self.scale, self.bias = nn.Parameter(rand(width, 1)), nn.Parameter(rand(width))

    def weight(self) -> Tensor:
        w, generator = self.w, torch.Generator("cpu").manual_seed(self.seed)
        drawn = torch.rand(w.shape, generator=generator, dtype=w.dtype)
        if self.kind == "noise":
            return w + self.scale.sigmoid() * (drawn - 0.5)
        if self.kind == "dropped":
            return w * (drawn > 0.3) * self.scale
        if self.kind == "standardized":
            return (w - w.mean(1, keepdim=True)) / (0.1 + w.std(1, keepdim=True)) * self.scale
        if self.kind == "low rank":
            return w + self.scale @ self.bias[None] / len(w)
        return w.tril() + self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


LAYERS = ("linear", "norm", "weight norm", "spectral norm", "noise", "dropped", "standardized",
          "low rank", "triangle")  # fmt: skip


def layer_of(kind: str, width: int, seed: int) -> nn.Module:
    linear = nn.Linear(width, width)
    if kind == "linear":
        made: nn.Module = linear
    elif kind == "norm":
        made = nn.Sequential(nn.LayerNorm(width), linear)
    elif kind == "weight norm":
        made = parametrizations.weight_norm(linear)
    elif kind == "spectral norm":  # in training mode each call moves its vectors
        made = parametrizations.spectral_norm(linear).eval()
    else:
        made = Made(width, kind, seed)
    return made


@dataclass
class Block:
    """What a network does to its rows in one place."""

    move: str
    region: str = "none"  # or a kind of checkpointing
    around: bool = False  # whether the region holds the move, or its layer only

    def __call__(self, layer: nn.Module, x: Tensor, b: int) -> Tensor:
        def body(rows: Tensor) -> Tensor:
            return layer(rows).tanh()

        def in_region(function: Layer) -> Layer:
            if self.region == "none":
                return function
            return partial(checkpoint, function, use_reentrant=self.region == "reentrant")

        move = MOVES[self.move]
        if self.around:
            return in_region(lambda rows: move(rows, b, body))(x)
        return move(x, b, in_region(body))


class Model(nn.Module):
    """Blocks between two layers; see :class:`Network`."""

    def __init__(self, blocks: list[Block], layers: list[nn.Module], width: int, b: int) -> None:
        super().__init__()
        self.blocks, self.b = blocks, b
        self.into, self.head = nn.Linear(3, width), nn.Linear(width, 3)
        self.own = nn.ModuleList(layers)
        self.residual, self.mixer, self.last = True, "", "tokens"

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x).tanh()
        for number, (block, layer) in enumerate(zip(self.blocks, self.own, strict=True)):
            if self.mixer and number == len(self.blocks) // 2:
                hidden = MIXERS[self.mixer](hidden, self.b)
            done = block(layer, hidden, self.b)
            hidden = hidden + done if self.residual else done + 0.1 * hidden
        return self.head(self.picked(hidden))

    def picked(self, x: Tensor) -> Tensor:
        tokens, batch = x.shape[1 - self.b], torch.arange(x.shape[self.b])
        place = (x.detach().sum(-1) > 0).sum(1 - self.b).clamp(max=tokens - 1)
        if self.last == "mean":
            return x.mean(1 - self.b)
        if self.last == "index":
            return x[batch, place] if self.b == 0 else x[place, batch]
        if self.last == "mask":
            first = x.transpose(0, self.b)
            chosen = F.one_hot(place, tokens).bool()[..., None]
            return first.masked_select(chosen).view(len(first), -1)
        return x


@dataclass
class Network:
    """A network, and how it is trained.

    Attributes:
        model: in float64.
        steps: of each step the size of the batch and of its sequences, and the environments.
        penalty: which term of parameters only the loss has.
        says: what was drawn, in words.
        shown: whether the inputs require gradients, so that autograd sees what moves their rows.
    """

    model: Model
    steps: list[tuple[int, int, int | Tensor | None]]
    penalty: str = "none"
    says: list[str] = field(default_factory=list)
    shown: bool = False

    @property
    def mixes(self) -> bool:
        return self.model.mixer != ""

    def loss(self, model: Any, x: Tensor) -> Tensor:
        out = model(x.detach().requires_grad_() if self.shown else x)
        loss = (out.sin() + 0.3 * out).mean()
        params = [param for param in model.parameters() if param.requires_grad]
        if self.penalty == "squares":
            loss = loss + 0.1 * sum(param.square().sum() for param in params)
        elif self.penalty == "norm":
            loss = loss + 0.1 * torch.cat([param.flatten() for param in params]).norm()
        elif self.penalty == "rows":
            gram = model.head.weight @ model.head.weight.t()
            loss = loss + (gram - torch.eye(3, dtype=gram.dtype)).square().mean()
        return loss

    def compare(self) -> None:
        """Compare each step of one Agreement with the loop."""
        model, b = self.model, self.model.b
        out = 0 if self.model.last != "tokens" else b
        agreement = am.Agreement(
            model, RULE, keep_moments=True, batch_dim=b, output_batch_dim=out if b else None
        )
        for batch, tokens, environments in self.steps:
            x = rand(batch, tokens, 3) if b == 0 else rand(tokens, batch, 3)
            check(
                model, self.loss, x, environments=environments, dims=[b], agreement=agreement,
                tolerance=1e-9,
            )  # fmt: skip


def judge(seed: int, move: str | None = None, mixer: str | None = None) -> str:
    """Return what becomes of a network that is drawn, with what a refusal tells to do about it."""
    result = outcome(draw(seed, move, mixer).compare)
    if result in (MIXING, REENTRANT_INPUT) and not mixer:
        network = draw(seed, move)
        network.shown = True
        assert (remedied := outcome(network.compare)) == EXACT, f"{result}, with inputs: {remedied}"
        return SHOWN
    return result


def environments_of(choose: random.Random, batch: int) -> int | Tensor | None:
    """Return a partition: each example, equal groups, or ids of groups of other sizes."""
    kind = choose.choice(("each", "each", "equal", "ids"))
    if kind == "each":
        return None
    if kind == "equal":
        return choose.choice([d for d in range(2, batch + 1) if batch % d == 0])
    count = choose.randint(2, batch)
    ids = [*range(count), *(choose.randrange(count) for _ in range(batch - count))]
    choose.shuffle(ids)
    return torch.tensor(ids)


def draw(seed: int, move: str | None = None, mixer: str | None = None) -> Network:
    """Draw a network.

    Args:
        seed: of everything that is drawn.
        move: one that it has to have; None: any.
        mixer: how environments mix; None: they do not.
    """
    choose = random.Random(seed)
    torch.manual_seed(seed)
    batch, tokens = choose.choice((2, 3, 4, 6)), choose.choice((2, 3, 4, 6))
    width = choose.choice((batch, 2 * batch, tokens, 3, 4, 5))
    b = choose.choice((0, 0, 1))
    kinds = [choose.choice(LAYERS) for _ in range(choose.randint(1, 3))]
    moves = [choose.choice(sorted(MOVES)) for _ in kinds]
    if move is not None:
        moves[choose.randrange(len(moves))] = move
    blocks = [
        Block(one, choose.choice(("none", "none", "reentrant", "not reentrant")),
              choose.random() < 0.5)
        for one in moves
    ]  # fmt: skip
    layers = [layer_of(kind, width, seed + number) for number, kind in enumerate(kinds)]
    model = Model(blocks, layers, width, b).double()
    model.residual = choose.random() < 0.5
    model.last = choose.choice(("tokens", "mean", "index", "mask"))
    model.mixer = mixer or ""
    if choose.random() < 0.4:
        for param in model.parameters():
            param.requires_grad_(choose.random() < 0.6)
        model.head.bias.requires_grad_()  # torch leaves out regions that no gradient enters
    if mixer:
        model.into.requires_grad_()
        model.head.requires_grad_()
    groups = None if mixer else environments_of(choose, batch)
    steps = [(batch, tokens, groups)] * 3
    if not mixer and choose.random() < 0.5:
        more = choose.choice((batch, 2 * batch))
        steps.insert(2, (more, choose.choice((tokens, 3)), environments_of(choose, more)))
    penalty = choose.choice(("none", "none", "squares", "norm", "rows"))
    says = [f"batch {batch}, tokens {tokens}, width {width}, batch dim {b}, {model.last}",
            *(f"{block} of {kind}" for block, kind in zip(blocks, kinds, strict=True)),
            f"frozen: {[n for n, p in model.named_parameters() if not p.requires_grad]}",
            f"penalty: {penalty}, mixer: {mixer}, environments: {groups}"]  # fmt: skip
    return Network(model, steps, penalty, says)
