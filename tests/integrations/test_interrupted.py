"""Runs that stop half-way, modules that are copied, and what else frameworks do to a step."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from .common import TAU, assert_same, needs, train_by_loop

needs("lightning", "transformers", "accelerate", "peft")

import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import BaseFinetuning, Callback  # noqa: E402

from andmask_ext.integrations.lightning import AgreementCallback  # noqa: E402
from andmask_ext.integrations.transformers import AgreementTrainer  # noqa: E402

from . import test_trainer as hugging_face  # noqa: E402
from .test_lightning import Module, by_loop, loader, network, rule_for, trainer  # noqa: E402

pytestmark = [pytest.mark.no_device, pytest.mark.filterwarnings("default")]

OURS = pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])


class Stopping(Callback):
    """Stops a run after a batch, in one of the ways in which runs stop."""

    def __init__(self, way: str, batch: int) -> None:
        self.way, self.batch = way, batch

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and self.way == "error":
            raise OSError("here")

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.batch and self.way == "stop":
            trainer.should_stop = True


@OURS
@pytest.mark.parametrize("way", ["error", "stop"])
def test_a_run_that_was_stopped_inside_a_step_leaves_nothing(way: str, ours: bool) -> None:
    """The next run with the same callback, module and optimizer has its own environments only."""
    module, callback = Module(ours), AgreementCallback(rule_for(ours))
    optimizer = module.configure_optimizers()
    module.configure_optimizers = lambda: optimizer
    first = trainer(callback, Stopping(way, 1), accumulate_grad_batches=3, max_epochs=1)
    if way == "error":
        with pytest.raises(OSError, match="here"):
            first.fit(module, loader())
    else:
        first.fit(module, loader())
    trainer(callback, accumulate_grad_batches=3).fit(module, loader())
    assert_same(module.net, by_loop("each", 3)[0])


@OURS
def test_an_epoch_that_a_module_ends(ours: bool) -> None:
    """What it has accumulated is dropped, as Lightning drops plain gradients."""

    class Ending(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 4 else None

        def configure_optimizers(self) -> Any:
            return super().configure_optimizers()[0]  # Lightning would step a scheduler once more

    module = Ending(ours)
    run = trainer(AgreementCallback(rule_for(ours)), accumulate_grad_batches=3)
    run.fit(module, loader())
    assert run.global_step == 2
    net, batches = network(), list(loader())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    steps = [
        [lambda b=b, k=k: F.cross_entropy(net(b["x"][[k]]), b["y"][[k]])
         for b in batches[:3] for k in range(8)]
    ] * 2  # fmt: skip
    train_by_loop(net, steps, optimizer)
    assert_same(module.net, net)


def test_a_module_with_a_training_step_of_its_own_keeps_it() -> None:
    module, calls = Module(), []
    original = module.training_step

    def patched(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        calls.append(batch_idx)
        return original(batch, batch_idx)

    module.training_step = patched
    trainer(AgreementCallback(am.AndMask(TAU))).fit(module, loader())
    assert calls == [*range(5)] * 2
    assert module.training_step is patched


def test_a_module_can_be_copied_and_saved_meanwhile() -> None:
    class Copying(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            module.net[0].weight.data += 1
            batch = {"x": torch.ones(2, 6).double(), "y": torch.zeros(2, dtype=torch.int64)}
            file = io.BytesIO()
            module.trainer = None
            twin = copy.deepcopy(module)
            torch.save(module, file)
            file.seek(0)
            saved = torch.load(file, weights_only=False)
            module.trainer = trainer
            before = [float(F.cross_entropy(m.net(batch["x"]), batch["y"])) for m in (twin, saved)]
            module.net[0].weight.data -= 1
            after = [float(F.cross_entropy(m.net(batch["x"]), batch["y"])) for m in (twin, saved)]
            assert before == after
            assert "training_step" not in module.__dict__

    module = Module()
    trainer(AgreementCallback(am.AndMask(TAU)), Copying()).fit(module, loader())
    assert_same(module.net, by_loop("each")[0])


@OURS
def test_parameters_that_are_trained_later(ours: bool) -> None:
    """A callback adds them to the optimizer when an epoch begins."""

    class Unfreezing(BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.05)

    class Partly(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            """Nothing: some gradients are None."""

        def configure_optimizers(self) -> Any:
            params = [param for param in self.parameters() if param.requires_grad]
            if self._ours:
                return am.optim.AndMaskSGD(params, lr=0.1, tau=TAU)
            return torch.optim.SGD(params, lr=0.1)

    module = Partly(ours)
    trainer(AgreementCallback(rule_for(ours)), Unfreezing()).fit(module, loader())
    net, batches = network(), list(loader())
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    steps = [
        [lambda b=b, k=k: F.cross_entropy(net(b["x"][[k]]), b["y"][[k]]) for k in range(8)]
        for b in batches
    ]
    net[0].requires_grad_(False)
    train_by_loop(net, steps, optimizer)
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.05})
    train_by_loop(net, steps, optimizer)
    assert_same(module.net, net)


def test_a_layer_that_is_added_between_two_runs() -> None:
    module, callback = Module(), AgreementCallback(am.AndMask(TAU))
    trainer(callback, max_epochs=1).fit(module, loader())
    module.net.append(nn.Linear(3, 3, dtype=torch.float64))
    before = copy.deepcopy(module.net[3])
    trainer(callback, max_epochs=1).fit(module, loader())
    assert not torch.equal(module.net[3].weight, before.weight)


@pytest.mark.parametrize("whole", [True, False], ids=["whole batches", "each"])
def test_a_batch_without_a_loss_is_no_environment(whole: bool) -> None:
    class Skipping(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx in (1, 4) else super().training_step(batch, batch_idx)

    module = Skipping(ours=True)
    run = trainer(AgreementCallback(whole_batches=whole), accumulate_grad_batches=5, max_epochs=1)
    run.fit(module, loader())
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    batches = [batch for index, batch in enumerate(loader()) if index not in (1, 4)]
    parts = [slice(None)] if whole else [[k] for k in range(8)]
    steps = [
        [
            lambda b=b, k=k: F.cross_entropy(net(b["x"][k]), b["y"][k])
            for b in batches
            for k in parts
        ]
    ]
    train_by_loop(net, steps, optimizer)
    assert_same(module.net, net)


def test_steps_that_take_an_iterator_are_refused() -> None:
    class Iterating(Module):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

    with pytest.raises(RuntimeError, match="one that takes dataloader_iter"):
        trainer(AgreementCallback(am.AndMask(TAU))).fit(Iterating(), loader())


def test_a_compiled_module_is_refused_by_name() -> None:
    module = torch.compile(Module(), backend="eager")
    with pytest.raises(RuntimeError, match=r"one of torch\.compile, which Agreement cannot read"):
        trainer(AgreementCallback(am.AndMask(TAU))).fit(module, loader())


@pytest.mark.parametrize("wrap", ["lightning", "fabric"])
def test_the_norm_of_an_optimizer_inside_a_wrapper(wrap: str) -> None:
    net = network()
    optimizer = am.optim.AndMaskSGD(net.parameters(), lr=0.1, tau=TAU, max_norm=0.05)
    if wrap == "lightning":
        from lightning.pytorch.core.optimizer import LightningOptimizer

        wrapped: Any = LightningOptimizer(optimizer)
    else:
        fabric = L.Fabric(accelerator="cpu", devices=1, precision="64-true")
        _, wrapped = fabric.setup(net, optimizer)
    for k in range(2):
        with wrapped.environment():
            net(torch.full((1, 6), k + 1.0).double()).sum().backward()
    optimizer.step()
    assert wrapped.grad_norm is optimizer.grad_norm
    assert float(wrapped.grad_norm) > 0.05
    wrapped.max_norm = 2.0
    assert optimizer.max_norm == wrapped.max_norm == 2.0
    with pytest.raises(ValueError, match="max_norm: expected a number above 0"):
        wrapped.max_norm = 0


@OURS
def test_a_trainer_that_was_interrupted_inside_a_step(tmp_path: Path, ours: bool) -> None:
    import transformers

    class Interrupting(transformers.TrainerCallback):
        armed = True

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            if self.armed:
                self.armed = False
                raise KeyboardInterrupt

    model = hugging_face.classifier()
    reference, rows = copy.deepcopy(model), hugging_face.examples()
    run = AgreementTrainer(
        model=model,
        args=hugging_face.arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.05),
        train_dataset=rows,
        optimizers=hugging_face.optimizers(model, ours),
        rule=hugging_face.rule_for(ours),
        callbacks=[Interrupting()],
    )
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    hugging_face.by_loop(reference, rows, "each", 2, 0.05)
    assert_same(model, reference)
