"""The most used models under Trainer, Accelerate and Lightning: ten steps equal the loop.

A part of most models computes in float32. There a vote can hang on rounding, and after it two runs
part. So a run is compared step by step, at its own weights: its gradient with that of the loop, and
its next weights with those that torch's optimizer makes of that gradient. Where all is float64 the
loop also trains on its own, and ends with the same weights.

Four set-ups run in `make test`, all of them in `make test-models`. One alone:
``pytest tests/zoo/test_setups.py -k mixtral``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import andmask_ext as am

from ..agreement.exact_loop import OtherProcessor, compare, is_noise, loop
from ..integrations.common import CLOSE, TAU, assert_same, members, needs, train_by_loop
from .case import IN_DOUBLE, Batch, Case, words
from .encoders import SMALL, tagged
from .test_models import ZOO

needs("transformers", "peft", "accelerate", "lightning")

import lightning as L  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from andmask_ext.integrations.accelerate import agreement_step  # noqa: E402
from andmask_ext.integrations.lightning import AgreementCallback  # noqa: E402
from andmask_ext.integrations.transformers import AgreementTrainer  # noqa: E402

# The warnings of others are theirs.
pytestmark = pytest.mark.filterwarnings("default", "error:.*Agreement")

# No example has as many labels as the batch has examples: Agreement, which could not tell them
# apart, would warn.
STEPS, BATCH, CLIP = 10, 4, 0.05
RULE = am.AndMask(TAU)
# Gradients that are zero but for rounding stay small in the update of Adam, too.
OPTIONS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4},
}

# What is trained, with what, by which optimizer (one of ours needs no rule), environments, and
# batches of a step. Those with a star have labels to be ignored, in each example another number.
# Mixtral's loss that balances its experts is not an environment's, and is off by default.
TABLE = """
bert              trainer     AndMaskAdamW  site  1
vit               lightning   SGD           each  2
gpt2*             accelerate  AndMaskAdamW  each  2
lora*             trainer     AdamW         site  2
dora*             accelerate  AndMaskAdamW  2     1
whisper*          trainer     AndMaskAdamW  each  1
clip-images       lightning   AndMaskSGD    site  1
mixtral-eager*    trainer     AdamW         each  1
t5*               trainer     AndMaskSGD    2     2
distilbert        lightning   AdamW         site  1
roberta-tokens*   trainer     SGD           each  2
deberta-v2        accelerate  AdamW         site  1
qwen2*            trainer     AndMaskAdamW  2     1
qwen3*            lightning   AdamW         each  2
gemma*            accelerate  SGD           site  1
phi*              lightning   AndMaskAdamW  2     2
mistral*          accelerate  AdamW         each  1
llama*            lightning   AndMaskSGD    site  2
wav2vec2          accelerate  SGD           2     2
swin              lightning   AndMaskAdamW  each  1
deit              trainer     AdamW         2     1
convnext          accelerate  AndMaskSGD    site  2
segformer-pixels* lightning   SGD           2     1
bart*             trainer     AdamW         site  1
mamba*            accelerate  AndMaskSGD    each  1
"""
SETUPS = {line.split()[0].rstrip("*"): line.split() for line in TABLE.strip().splitlines()}
FEW = words("bert vit gpt2 lora")

MORE = {"roberta-tokens": Case("RobertaForTokenClassification", tagged, SMALL)}


def padded(batch: Batch) -> Batch:
    """Let the loss ignore the last labels of each example, none to three."""
    labels = batch["labels"]
    size, length = labels.shape[:2]
    kept = torch.arange(length) < length - torch.arange(size)[:, None] % 4
    pictures = labels.dim() == 3
    gaps = ~kept.view(size, length, *[1] * (labels.dim() - 2))
    batch = {**batch, "labels": labels.masked_fill(gaps, 255 if pictures else -100)}
    if torch.equal(labels, batch.get("input_ids", labels[:0])):  # the labels are the inputs
        batch["attention_mask"] = kept.long()
    return batch


@dataclass
class Setup:
    """A model, its data, and how it is trained.

    Attributes:
        case: of the zoo.
        framework: trains.
        optimizer: the name of its class.
        kind: of environments.
        accumulate: batches of a step.
        seen: the weights at each step, the gradient before clipping, and after it.
    """

    case: Case
    framework: str
    optimizer: str
    kind: str
    accumulate: int
    seen: list[tuple[Batch, Batch, Batch]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.case.make()
        self.reference = copy.deepcopy(self.model)
        data = self.case.tensors(STEPS * BATCH * self.accumulate)
        data["site"] = torch.arange(len(data["labels"])) * 7 % 3
        self.rows = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]

    @property
    def ours(self) -> bool:
        return self.optimizer.startswith("AndMask")

    @property
    def environments(self) -> Any:
        return {"each": None, "2": 2, "site": "site"}[self.kind]

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=BATCH)  # type: ignore[arg-type]

    def make_optimizer(self) -> Any:
        options = OPTIONS[self.optimizer.removeprefix("AndMask")]
        params = trained(self.model).values()
        if self.ours:
            return getattr(am.optim, self.optimizer)(params, **options, tau=TAU)
        return getattr(torch.optim, self.optimizer)(params, **options)

    def of_torch(self) -> torch.optim.Optimizer:
        """Return torch's optimizer of the reference."""
        name = self.optimizer.removeprefix("AndMask")
        params = trained(self.reference).values()
        made: torch.optim.Optimizer = getattr(torch.optim, name)(params, **OPTIONS[name])
        return made

    def steps(self) -> list[list[Batch]]:
        batches = list(self.loader())
        return [batches[k : k + self.accumulate] for k in range(0, len(batches), self.accumulate)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**{name: value for name, value in batch.items() if name != "site"}).loss
    return loss


# ---- the frameworks ----


def by_trainer(setup: Setup, folder: Path) -> None:
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, num_train_epochs=1,
        max_grad_norm=CLIP, gradient_accumulation_steps=setup.accumulate, use_cpu=True,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", save_strategy="no",
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    AgreementTrainer(
        model=setup.model, args=args, train_dataset=setup.rows,
        data_collator=torch.utils.data.default_collate,
        optimizers=(setup.make_optimizer(), None), rule=None if setup.ours else RULE,
        environments=setup.environments,
    ).train()  # fmt: skip


def by_accelerate(setup: Setup, folder: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=setup.accumulate)
    model, optimizer, loader = accelerator.prepare(
        setup.model, setup.make_optimizer(), setup.loader()
    )
    agreement = am.Agreement(model, optimizer if setup.ours else RULE)
    for batch in loader:
        environments = batch["site"] if setup.kind == "site" else setup.environments
        with accelerator.accumulate(model):
            with agreement_step(accelerator, agreement, environments):
                accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()


class Module(L.LightningModule):
    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.model, self._optimizer = setup.model, setup.make_optimizer()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> Any:
        return self._optimizer


def by_lightning(setup: Setup, folder: Path) -> None:
    L.Trainer(
        max_epochs=1, accelerator="cpu", gradient_clip_val=CLIP, logger=False,
        accumulate_grad_batches=setup.accumulate, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
        callbacks=[AgreementCallback(None if setup.ours else RULE, setup.environments)],
    ).fit(Module(setup), setup.loader())  # fmt: skip


FRAMEWORKS = {"trainer": by_trainer, "accelerate": by_accelerate, "lightning": by_lightning}


@pytest.fixture(autouse=True)
def _alone(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Without the state that an accelerator keeps for the process, and without logs."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    yield
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# ---- the comparison ----


def record(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note weights and gradients when a framework clips, the last thing before the update."""
    clip, named = torch.nn.utils.clip_grad_norm_, trained(setup.model)

    def grads() -> Batch:
        return {n: p.grad.clone() for n, p in named.items() if p.grad is not None}

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        weights = {n: p.detach().clone() for n, p in named.items()}
        before = grads()
        norm = clip(*args, **kwargs)
        setup.seen.append((weights, before, grads()))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noting)


def norm_of(grads: Batch) -> float:
    return float(torch.nn.utils.get_total_norm(grads.values()))


def columns(model: nn.Module, batches: list[Batch], kind: str) -> Batch:
    """Return the loop's gradients ``[environments, *shape]``, those of all batches of a step."""
    found = []
    for batch in batches:
        environments = {"each": None, "2": 2, "site": batch["site"]}[kind]

        def loss(model: nn.Module, *tensors: Tensor, names: Any = tuple(batch)) -> Tensor:
            return loss_of(model, dict(zip(names, tensors, strict=True)))

        found.append(loop(model, loss, list(batch.values()), environments))
    return {name: torch.cat([grads[name] for grads in found]) for name in found[0]}


def compare_steps(setup: Setup) -> None:
    """Compare each gradient of a run with that of the loop, and each update with torch's."""
    model, optimizer = setup.reference, setup.of_torch()
    named = trained(model)
    ends = [*(weights for weights, *_ in setup.seen[1:]), trained(setup.model)]
    unsure, count = 0, 0
    for batches, seen, end in zip(setup.steps(), setup.seen, ends, strict=True):
        weights, grads, clipped = seen
        with torch.no_grad():
            for name, param in named.items():
                param.copy_(weights[name])
        stacks = columns(model, batches, setup.kind)

        @cache
        def on_another(seed: int, batches: list[Batch] = batches) -> Batch:
            with OtherProcessor(seed):
                return columns(model, batches, setup.kind)

        largest = max(0.1, *(float(stack.abs().max()) for stack in stacks.values()))
        for name, stack in stacks.items():
            compare(
                name, stack, grads.get(name), RULE, setup.case.tolerance, largest,
                elsewhere=lambda name=name: (on_another(seed)[name] for seed in range(8)),
            )  # fmt: skip
            unsure += int(is_noise(stack, setup.case.tolerance / 10 * largest).any(0).sum())
            count += stack[0].numel()
        factor = min(1.0, CLIP / norm_of(grads))
        for name, param in named.items():
            param.grad = clipped.get(name)
            if param.grad is not None:
                torch.testing.assert_close(param.grad, factor * grads[name], rtol=1e-4, atol=0)
        optimizer.step()
        for name, param in named.items():
            torch.testing.assert_close(param, end[name], **CLOSE, msg=name)
    assert unsure < count / 8  # of most of them nothing hangs on rounding


def train(setup: Setup) -> list[float]:
    """Train the reference in a plain loop; return the norms of its gradients."""
    model = setup.reference
    steps = [
        [
            lambda batch=batch, k=k: loss_of(model, {n: t[k] for n, t in batch.items()})
            for batch in batches
            for k in members(setup.kind, batch["site"])
        ]
        for batches in setup.steps()
    ]
    return train_by_loop(model, steps, setup.of_torch(), CLIP)


def make(name: str) -> Setup:
    title, framework, optimizer, kind, accumulate = SETUPS[name]
    case = MORE[name] if name in MORE else ZOO[name]
    if title.endswith("*"):
        case = replace(case, batch=lambda size, batch=case.batch: padded(batch(size)))
    return Setup(case, framework, optimizer, kind, int(accumulate))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FEW else [pytest.mark.zoo]) for n in SETUPS]
)
def test_ten_steps_equal_the_loop(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make(name)
    start = copy.deepcopy(setup.reference.state_dict())
    with monkeypatch.context() as patch:
        record(setup, patch)
        FRAMEWORKS[setup.framework](setup, tmp_path)
    norms = [norm_of(grads) for _, grads, _ in setup.seen]
    assert len(norms) == STEPS
    assert min(norms) > CLIP  # so it clips
    compare_steps(setup)
    if setup.case.tolerance == IN_DOUBLE:
        setup.reference.load_state_dict(start)
        assert train(setup) == pytest.approx(norms, rel=1e-7)
        assert_same(setup.model, setup.reference)
