"""A training step inside Lightning, Trainer and Accelerate: plain, and with ``Agreement``.

python -m benchmarks.bench_trainers --quick

The BERT of ``bench_proved``, each example an environment, AdamW, gradients clipped. All contestants
of a framework run under that framework; a time is that from the end of one optimizer step to the
end of the next, so the framework's own work is in it. The first steps, with their checks, are left
out. With one thread, times are CPU time of the thread. The packages are those of the extra
``trainers``.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

import andmask_ext as am
from andmask_ext.integrations.accelerate import agreement_step
from andmask_ext.integrations.lightning import AgreementCallback
from andmask_ext.integrations.transformers import AgreementTrainer

from .bench_proved import bert
from .common import Row, parser, peak_memory, run
from .measuring import rows_of

EXAMPLES, FIRST, STEPS, ROUNDS = 8, 4, 12, 3
RULE = am.AndMask(tau=0.2)
CLIP = 1.0
PLAIN = "torch AdamW, clipped"
# The rule of a contestant, its optimizer, and whether the framework clips.
Way = tuple[am.AndMask | None, Callable[..., Optimizer], bool]
WAYS: dict[str, Way] = {
    PLAIN: (None, torch.optim.AdamW, True),
    "Agreement, rule, clipped": (RULE, torch.optim.AdamW, True),
    "AndMaskAdamW, clipped": (None, partial(am.optim.AndMaskAdamW, tau=0.2), True),
    "AndMaskAdamW, max_norm": (None, partial(am.optim.AndMaskAdamW, tau=0.2, max_norm=CLIP), False),
}


class Rows(Dataset[dict[str, Any]]):
    """The examples of all steps."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return STEPS * EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index % len(self._rows)]


def examples() -> tuple[nn.Module, Rows]:
    """Make a model and its examples."""
    torch.manual_seed(0)
    model, _, batches = bert(EXAMPLES)
    rows = [
        {"input_ids": ids, "labels": label}
        for inputs, labels in batches
        for ids, label in zip(inputs, labels, strict=True)
    ]
    return model, Rows(rows)


def in_lightning(model: nn.Module, rows: Rows, optimizer: Optimizer, way: str) -> None:
    class Module(L.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Optimizer:
            return optimizer

    rule, _, clips = WAYS[way]
    L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
        gradient_clip_val=CLIP if clips else None,
        callbacks=[] if way == PLAIN else [AgreementCallback(rule)],
    ).fit(Module(), DataLoader(rows, batch_size=EXAMPLES))  # fmt: skip


def in_trainer(model: nn.Module, rows: Rows, optimizer: Optimizer, way: str) -> None:
    rule, _, clips = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "model": model, "train_dataset": rows, "optimizers": (optimizer, None),
            "args": transformers.TrainingArguments(
                output_dir=folder, per_device_train_batch_size=EXAMPLES, num_train_epochs=1,
                max_grad_norm=CLIP if clips else 0.0, report_to=[], use_cpu=True,
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
            ),
        }  # fmt: skip
        trainer = (
            transformers.Trainer(**options)
            if way == PLAIN
            else AgreementTrainer(**options, rule=rule)
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def in_accelerate(model: nn.Module, rows: Rows, optimizer: Optimizer, way: str) -> None:
    rule, _, clips = WAYS[way]
    accelerator = Accelerator(cpu=True)
    loader: Any = DataLoader(rows, batch_size=EXAMPLES)
    prepared: Any = accelerator.prepare(optimizer)
    model, loader = accelerator.prepare(model, loader)
    agreement = None if way == PLAIN else am.Agreement(model, rule or prepared)
    for batch in loader:
        if agreement is None:
            accelerator.backward(model(**batch).loss)
        else:
            with agreement_step(accelerator, agreement):
                accelerator.backward(model(**batch).loss)
        if clips:
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
        prepared.step()
        prepared.zero_grad()


FRAMEWORKS = {"Lightning": in_lightning, "Trainer": in_trainer, "Accelerate": in_accelerate}


def case(framework: str, rounds: int, last: int) -> list[Row]:
    """Measure one framework; memory with the last number of threads only."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def steps(way: str) -> list[float]:
        model, rows = examples()
        optimizer = WAYS[way][1](model.parameters(), lr=1e-3)
        ends: list[float] = []
        optimizer.register_step_post_hook(lambda *_: ends.append(clock()))
        FRAMEWORKS[framework](model.train(), rows, optimizer, way)
        return [after - before for before, after in itertools.pairwise(ends)][FIRST:]

    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            times[way] += steps(way)
    found = rows_of(f"BERT in {framework}, batch {EXAMPLES}", times, PLAIN)
    if torch.get_num_threads() == last:
        used = [peak_memory(partial(steps, way)) / 2**20 for way in WAYS]
        for row, megabytes in zip(found, used, strict=True):
            row.megabytes, row.memory_ratio = megabytes, megabytes / used[0]
    return found


def main() -> None:
    options = parser(__doc__).parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="lightning|torch")
    rounds = 1 if options.quick else ROUNDS
    if options.quick:
        options.threads = options.threads[-1:]
    cases = [partial(case, name, rounds, options.threads[-1]) for name in FRAMEWORKS]
    run(options, cases)


if __name__ == "__main__":
    main()
