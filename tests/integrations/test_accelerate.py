"""Training with Accelerate equals the loop over environments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import andmask_ext as am

from .common import TAU, assert_same, assert_same_bits, members, needs, train_by_loop

needs("accelerate")

from accelerate import Accelerator  # noqa: E402

from andmask_ext.integrations.accelerate import agreement_step  # noqa: E402

pytestmark = [pytest.mark.no_device, pytest.mark.filterwarnings("default")]

SIZE, BATCH, CLIP = 40, 8, 0.05
X = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(SIZE) * 7 % 3
SITES = torch.arange(SIZE) * 5 % 4 % 3
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
OURS = pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """An accelerator keeps its settings for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


class Run:
    """The objects of a run, prepared by an accelerator."""

    def __init__(
        self, ours: bool, accumulate: int = 1, dtype: torch.dtype = torch.float64, **options: Any
    ) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
        net = network(dtype)
        optimizer = (
            am.optim.AndMaskSGD(net.parameters(), **OPTIONS, tau=TAU)
            if ours
            else torch.optim.SGD(net.parameters(), **OPTIONS)
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        loader = DataLoader(TensorDataset(X.to(dtype), Y, SITES), batch_size=BATCH)
        prepared = self.accelerator.prepare(net, optimizer, scheduler, loader)
        self.net, self.optimizer, self.scheduler, self.loader = prepared
        self.agreement = am.Agreement(self.net, self.optimizer if ours else am.AndMask(TAU))
        self.norms: list[float] = []

    def epoch(self, kind: str = "each") -> None:
        accelerator = self.accelerator
        for x, y, sites in self.loader:
            environments = {"each": None, "2": 2, "site": sites}[kind]
            with accelerator.accumulate(self.net):
                with agreement_step(accelerator, self.agreement, environments):
                    accelerator.backward(F.cross_entropy(self.net(x), y))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.net.parameters(), CLIP)
                    self.norms.append(float(norm))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


def by_loop(kind: str, accumulate: int, epochs: int) -> tuple[nn.Module, list[float]]:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    batches = list(DataLoader(TensorDataset(X, Y, SITES), batch_size=BATCH))

    def loss(x: Tensor, y: Tensor, chosen: Tensor) -> Any:
        return lambda: F.cross_entropy(net(x[chosen]), y[chosen])

    steps = [
        [loss(x, y, k) for x, y, s in batches[i : i + accumulate] for k in members(kind, s)]
        for i in range(0, len(batches), accumulate)
    ] * epochs
    return net, train_by_loop(net, steps, optimizer, CLIP, scheduler)


@OURS
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["each", "2", "site"])
def test_a_run_equals_the_loop(kind: str, accumulate: int, ours: bool) -> None:
    run = Run(ours, accumulate)
    for _ in range(2):
        run.epoch(kind)
    net, norms = by_loop(kind, accumulate, 2)
    assert_same(run.net, net)
    assert run.norms == pytest.approx(norms, rel=1e-9)


@OURS
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, ours: bool) -> None:
    whole = Run(ours, accumulate=2)
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch()
    resumed = Run(ours, accumulate=2)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.epoch()
    assert_same_bits(resumed.net, whole.net)


@OURS
def test_mixed_precision(ours: bool) -> None:
    """As Agreement with autocast."""
    run = Run(ours, dtype=torch.float32, mixed_precision="bf16")
    run.epoch()
    net = network(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    agreement = am.Agreement(net, am.AndMask(TAU))
    for x, y in DataLoader(TensorDataset(X.float(), Y), batch_size=BATCH):
        with agreement():
            with torch.autocast("cpu", torch.bfloat16):
                outputs = net(x)
            F.cross_entropy(outputs.float(), y).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_same(run.net, net, rtol=1e-5, atol=1e-6)


@OURS
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_scaler(accumulate: int, ours: bool) -> None:
    """As with `mixed_precision="fp16"`, which an accelerator allows on a GPU only."""
    run = Run(ours, accumulate)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run.accelerator.scaler, run.accelerator.native_amp = scaler, True
    run.accelerator.state._mixed_precision = "fp16"
    run.optimizer = type(run.optimizer)(run.optimizer.optimizer, scaler=scaler)
    run.accelerator._optimizers = [run.optimizer]
    run.epoch()
    net, norms = by_loop("each", accumulate, 1)
    assert_same(run.net, net)
    assert run.norms == pytest.approx(norms, rel=1e-9)


@OURS
def test_what_the_loss_is_divided_by_is_said_if_the_context_is_not_told(ours: bool) -> None:
    run = Run(ours, accumulate=2)

    def epoch() -> None:
        for x, y, _ in run.loader:
            with run.accelerator.accumulate(run.net):
                with run.agreement(write_grads=run.accelerator.sync_gradients):
                    run.accelerator.backward(F.cross_entropy(run.net(x), y))
                run.optimizer.step()
                run.optimizer.zero_grad()

    with pytest.warns(UserWarning, match="divided or multiplied by a number; leave it out, or"):
        epoch()


def test_the_environments_of_an_optimizer_are_inside_its_wrapper() -> None:
    """`optimizer.optimizer.environment()`: the wrapper hands on a fixed list of methods."""
    run = Run(ours=True)
    for x, y, _ in run.loader:
        for k in range(BATCH):
            with run.optimizer.optimizer.environment():
                run.accelerator.backward(F.cross_entropy(run.net(x[[k]]), y[[k]]))
        run.accelerator.clip_grad_norm_(run.net.parameters(), CLIP)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
    assert_same(run.net, by_loop("each", 1, 1)[0])


def test_other_arguments() -> None:
    run = Run(ours=False)
    with pytest.raises(TypeError, match=r"accelerator: expected accelerate\.Accelerator, but got"):
        agreement_step(run.agreement, run.accelerator)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"agreement: expected andmask_ext\.Agreement, but got And"):
        agreement_step(run.accelerator, am.AndMask(TAU))  # type: ignore[arg-type]
