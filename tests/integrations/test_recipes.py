"""The recipes of docs/trainers.md that need no code of this package equal the loop."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import andmask_ext as am

from .common import assert_same, members, needs, train_by_loop

pytestmark = pytest.mark.no_device

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
ROWS = [
    {"x": torch.randn(4, generator=torch.Generator().manual_seed(k)).double(), "y": k % 3,
     "site": k * 5 % 4 % 3}
    for k in range(16)
]  # fmt: skip


def recipe(section: str) -> str:
    """Return the code of a section."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert found
    return "\n".join(found)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def run(section: str, **names: Any) -> dict[str, Any]:
    scope = {"torch": torch, "nn": nn, "F": F, "am": am, **names}
    exec(compile(recipe(section), str(PAGE), "exec"), scope)
    return scope


def test_ignite() -> None:
    needs("ignite")
    model, loader = network(), DataLoader(ROWS, batch_size=8)
    reference = copy.deepcopy(model)
    run("ignite", model=model, loader=loader)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3)

    def loss(batch: dict[str, Tensor], chosen: Tensor) -> Any:
        return lambda: F.cross_entropy(reference(batch["x"][chosen]), batch["y"][chosen])

    steps = [[loss(batch, k) for k in members("site", batch["site"])] for batch in loader] * 2
    train_by_loop(reference, steps, optimizer, 1.0, tau=0.8)
    assert_same(model, reference)


def test_domainbed() -> None:
    """Its own method, written again: the mean gradient, masked, over the share that is kept."""

    class ERM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.hparams = network(), {"tau": 0.6}
            self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-2)

    algorithm = run("DomainBed", ERM=ERM)["ANDMask"]()
    expected = network()
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-2)
    batches = list(DataLoader(ROWS, batch_size=4))
    minibatches = [(batch["x"], batch["y"]) for batch in batches]
    for _ in range(10):
        losses = [F.cross_entropy(expected(x), y) for x, y in minibatches]
        grads = [torch.autograd.grad(loss, list(expected.parameters())) for loss in losses]
        for param, column in zip(expected.parameters(), zip(*grads, strict=True), strict=True):
            stacked = torch.stack(column)
            mask = (stacked.sign().mean(0).abs() >= 0.6).double()
            param.grad = mask * stacked.mean(0) / (1e-10 + mask.mean())
        optimizer.step()
        shown = algorithm.update(minibatches)["loss"]
        assert shown == pytest.approx(torch.stack(losses).mean().item())
        assert_same(algorithm.network, expected)
