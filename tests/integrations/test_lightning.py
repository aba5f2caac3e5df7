"""A run under Lightning equals the loop over environments."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import andmask_ext as am

from .common import TAU, assert_same, assert_same_bits, members, needs, train_by_loop

needs("lightning")

import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402

from andmask_ext.integrations.lightning import AgreementCallback  # noqa: E402

pytestmark = [pytest.mark.no_device, pytest.mark.filterwarnings("default")]

SIZE, BATCH, EPOCHS = 40, 8, 2
X = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(SIZE) * 7 % 3
SITES = torch.arange(SIZE) * 5 % 4 % 3
KINDS: dict[str, Any] = {"each": None, "2": 2, "site": lambda batch: batch["site"]}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Examples(TensorDataset):
    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return dict(zip(("x", "y", "site"), super().__getitem__(index), strict=True))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def loader() -> DataLoader[Any]:
    return DataLoader(Examples(X, Y, SITES), batch_size=BATCH)


class Module(L.LightningModule):
    """An ordinary module, which knows nothing of environments."""

    def __init__(self, ours: bool = False, momentum: float = 0.9) -> None:
        super().__init__()
        self.net = network()
        self._ours, self._momentum = ours, momentum
        self.norms: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch["x"]), batch["y"])
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [param.grad for param in self.parameters()]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))
        self.log("grad_norm", self.norms[-1], prog_bar=True)

    def configure_optimizers(self) -> Any:
        options = {"lr": 0.1, "momentum": self._momentum, "weight_decay": 0.01}
        optimizer = (
            am.optim.AndMaskSGD(self.parameters(), **options, tau=TAU)
            if self._ours
            else torch.optim.SGD(self.parameters(), **options)
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def rule_for(ours: bool) -> am.AndMask | None:
    return None if ours else am.AndMask(TAU)


def trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    chosen = {"max_epochs": EPOCHS, "precision": "64-true", "accelerator": "cpu", **quiet}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        chosen["enable_checkpointing"] = False
    return L.Trainer(**{**chosen, **options}, callbacks=list(callbacks))


def by_loop(
    kind: str, accumulate: int = 1, clip: float | None = None
) -> tuple[nn.Module, list[float]]:
    """The network after the same training in a plain loop, and the norms of its gradients."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    batches = list(loader())
    groups = [batches[k : k + accumulate] for k in range(0, len(batches), accumulate)] * EPOCHS

    def loss(batch: dict[str, Tensor], chosen: Tensor) -> Any:
        return lambda: F.cross_entropy(net(batch["x"][chosen]), batch["y"][chosen])

    steps = [
        [loss(batch, chosen) for batch in group for chosen in members(kind, batch["site"])]
        for group in groups
    ]
    return net, train_by_loop(net, steps, optimizer, clip, scheduler)


@pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["whole", "clipped"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_equals_the_loop(kind: str, accumulate: int, clip: float | None, ours: bool) -> None:
    """Ten steps, or six of two batches each, one of which is left over in each epoch."""
    module = Module(ours)
    callback = AgreementCallback(rule_for(ours), KINDS[kind])
    run = trainer(callback, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    run.fit(module, loader())
    net, norms = by_loop(kind, accumulate, clip)
    assert_same(module.net, net)
    assert module.norms == pytest.approx(norms, rel=1e-9)  # those of the votes, before clipping
    assert run.progress_bar_metrics["grad_norm"] == pytest.approx(norms[-1], rel=1e-6)
    assert "training_step" not in module.__dict__
    assert isinstance(callback.agreement, am.Agreement)


@pytest.mark.parametrize("key", ["site", lambda batch: batch["site"].tolist()], ids=["key", "list"])
def test_ids_are_found_in_the_batch(key: Any) -> None:
    module = Module()
    trainer(AgreementCallback(am.AndMask(TAU), key)).fit(module, loader())
    assert_same(module.net, by_loop("site")[0])


def test_a_key_that_is_not_in_the_batch() -> None:
    callback = AgreementCallback(am.AndMask(TAU), "hospital")
    with pytest.raises(ValueError, match=r"environments='hospital'.*but got x, y, site"):
        trainer(callback).fit(Module(), loader())


def test_whole_batches_are_environments() -> None:
    """Also of a model that Agreement refuses: with batch norm."""

    class Normalised(Module):
        def __init__(self) -> None:
            super().__init__(ours=True)
            self.net.insert(1, nn.BatchNorm1d(16, dtype=torch.float64))

    module = Normalised()
    net = copy.deepcopy(module.net)
    callback = AgreementCallback(whole_batches=True)
    run = trainer(callback, accumulate_grad_batches=5, gradient_clip_val=0.1)
    run.fit(module, loader())
    assert callback.agreement is None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    steps = [
        [lambda batch=batch: F.cross_entropy(net(batch["x"]), batch["y"]) for batch in loader()]
    ] * EPOCHS
    train_by_loop(net, steps, optimizer, 0.1, scheduler)
    assert_same(module.net, net)


@pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])
def test_mixed_precision(ours: bool) -> None:
    """To the bit as Agreement with autocast, and near the loop in float32."""

    class Single(Module):
        def configure_optimizers(self) -> Any:
            self.float()
            return super().configure_optimizers()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return super().training_step({**batch, "x": batch["x"].float()}, batch_idx)

    module = Single(ours)
    trainer(AgreementCallback(rule_for(ours)), precision="bf16-mixed").fit(module, loader())
    net = network().float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    agreement = am.Agreement(net, am.AndMask(TAU))
    for batch in list(loader()) * EPOCHS:
        with agreement():
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(batch["x"].float()), batch["y"])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert_same(module.net, net, rtol=1e-5, atol=1e-6)
    exact = by_loop("each")[0].float()
    assert_same(module.net, exact, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, accumulate: int, ours: bool) -> None:
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.05}
    whole = Module(ours)
    trainer(AgreementCallback(rule_for(ours)), **options).fit(whole, loader())
    first = ModelCheckpoint(tmp_path, "first")
    trainer(AgreementCallback(rule_for(ours)), first, max_epochs=1, **options).fit(
        Module(ours), loader()
    )
    resumed = Module(ours)
    run = trainer(AgreementCallback(rule_for(ours)), **options)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert run.global_step == EPOCHS * -(-SIZE // BATCH // accumulate)
    assert_same_bits(resumed, whole)


@pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])
@pytest.mark.parametrize("skipped", [1, 2])
def test_a_batch_without_a_loss(skipped: int, ours: bool) -> None:
    """Lightning skips the backward pass of a batch for which the step returns None."""

    class Skipping(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx == skipped else super().training_step(batch, batch_idx)

    module = Skipping(ours)
    callback = AgreementCallback(rule_for(ours))
    trainer(callback, accumulate_grad_batches=3, max_epochs=1).fit(module, loader())
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    batches = list(loader())
    parts = [
        [b for k, b in enumerate(batches) if k // 3 == step and k != skipped] for step in (0, 1)
    ]
    steps = [
        [
            lambda b=b, k=k: F.cross_entropy(net(b["x"][k]), b["y"][k])
            for b in part
            for k in range(8)
        ]
        for part in parts
    ]
    train_by_loop(net, steps, optimizer, None, scheduler)
    assert_same(module.net, net)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_leaves_the_module_as_it_was(where: str) -> None:
    class Failing(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2 and where == "forward":
                raise OSError("here")
            return super().training_step(batch, batch_idx)

        def backward(self, loss: Tensor, *args: Any) -> None:
            if self.trainer.fit_loop.batch_idx == 2 and where == "backward":
                raise OSError("here")
            loss.backward()

    module, callback = Failing(), AgreementCallback(am.AndMask(TAU))
    with pytest.raises(OSError, match="here"):
        trainer(callback).fit(module, loader())
    assert "training_step" not in module.__dict__
    again = Module()
    trainer(callback).fit(again, loader())  # the callback can be used again, too
    assert_same(again.net, by_loop("each")[0])


def test_metrics_in_the_module_are_no_part_of_the_model() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    class Measured(Module):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(3)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            outputs = self.net(batch["x"])
            self.accuracy(outputs, batch["y"])
            self.log("accuracy", self.accuracy)
            return F.cross_entropy(outputs, batch["y"])

    module = Measured()
    trainer(AgreementCallback(am.AndMask(TAU))).fit(module, loader())
    assert_same(module.net, by_loop("each")[0])


# ---- what is refused ----


def test_manual_optimization_is_told_how() -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"leave the callback out.*self\.manual_backward"):
        trainer(AgreementCallback(am.AndMask(TAU))).fit(module, loader())


def test_rules_in_no_place_or_in_two() -> None:
    with pytest.raises(TypeError, match="but got SGD and no rule"):
        trainer(AgreementCallback()).fit(Module(), loader())
    with pytest.raises(ValueError, match="AndMaskSGD, which has its own"):
        trainer(AgreementCallback(am.AndMask(TAU))).fit(Module(ours=True), loader())
    with pytest.raises(TypeError, match="but got float"):
        AgreementCallback(0.5)  # type: ignore[arg-type]
    for options in ({"rule": am.AndMask(TAU)}, {"environments": 2}, {"batch_dim": 1}):
        with pytest.raises(ValueError, match="whole_batches=True takes no rule"):
            AgreementCallback(whole_batches=True, **options)


# ---- manual optimization, Fabric ----


class Manual(Module):
    def __init__(self, ours: bool, loop: bool) -> None:
        super().__init__(ours)
        self.automatic_optimization = False
        self._loop = loop

    def on_train_start(self) -> None:
        self.agreement = am.Agreement(self, self.optimizers() if self._ours else am.AndMask(TAU))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        if self._loop:
            for k in range(len(batch["x"])):
                with optimizer.environment():
                    self.manual_backward(
                        F.cross_entropy(self.net(batch["x"][[k]]), batch["y"][[k]])
                    )
        else:
            with self.agreement():
                self.manual_backward(F.cross_entropy(self.net(batch["x"]), batch["y"]))
        self.clip_gradients(optimizer, 0.05, "norm")
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@pytest.mark.parametrize(
    ("ours", "loop"), [(True, True), (True, False), (False, False)],
    ids=["environments", "our optimizer", "a rule"],
)  # fmt: skip
def test_manual_optimization(ours: bool, loop: bool) -> None:
    module = Manual(ours, loop)
    trainer().fit(module, loader())
    assert_same(module.net, by_loop("each", clip=0.05)[0])


@pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])
def test_fabric(tmp_path: Path, ours: bool) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="64-true")

    def start() -> Any:
        net = network()
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        plain = torch.optim.SGD(net.parameters(), **options)
        optimizer = am.optim.AndMaskSGD(net.parameters(), **options, tau=TAU) if ours else plain
        model, optimizer = fabric.setup(net, optimizer)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        agreement = am.Agreement(model, optimizer if ours else am.AndMask(TAU))
        return model, optimizer, scheduler, agreement

    model, optimizer, scheduler, agreement = start()
    for step, batch in enumerate(list(loader()) * EPOCHS):
        if step == 5:
            state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            fabric.save(tmp_path / "state", state)
            model, optimizer, scheduler, agreement = start()
            state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            fabric.load(tmp_path / "state", state, weights_only=True)
        with agreement():
            fabric.backward(F.cross_entropy(model(batch["x"]), batch["y"]))
        fabric.clip_gradients(model, optimizer, max_norm=0.05)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert_same(model.module, by_loop("each", clip=0.05)[0])
