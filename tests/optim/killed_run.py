"""Small training runs, one per optimizer, saved at each step; tests kill and resume them.

Prints a line per step. Run as a script: ``killed_run.py CHECKPOINT STEPS``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import andmask_ext as am

optim = am.optim
OPTIMIZERS = {
    "sgd": lambda p: optim.AndMaskSGD(p, lr=0.05, momentum=0.9, nesterov=True, tau=0.5),
    "adam": lambda p: optim.AndMaskAdam(p, lr=0.05, amsgrad=True, rule=am.rules.MaskedAverage(0.6)),
    "adamw": lambda p: optim.AndMaskAdamW(p, lr=0.05, tau=0.5, rescale=True),
    "temporal": lambda p: optim.TemporalAndMaskAdam(p, lr=0.05, tau=0.3),
    "wrapper": lambda p: optim.EnvironmentWrapper(torch.optim.Adagrad(p), am.AndMask(0.5)),
}


def batch(step: int, environment: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + environment))


class Run:
    """One model in bfloat16 and its optimizer."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.temporal = name == "temporal"
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).bfloat16()
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.7)

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def loss(self, step: int, environment: int) -> torch.Tensor:
        x = batch(step, environment).bfloat16()
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean()

    def step(self, step: int) -> None:
        if self.temporal:
            self.optimizer.zero_grad()
            self.loss(step, 0).backward()
        else:
            for environment in range(3):
                with self.optimizer.environment():
                    self.loss(step, environment).backward()
        self.optimizer.step()
        self.scheduler.step()


def main(path: Path, steps: int) -> None:
    runs = {name: Run(name) for name in OPTIMIZERS}
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for name, run in runs.items():
            for part, value in run.parts().items():
                value.load_state_dict(saved[name][part])
        first = saved["step"]
    for step in range(first, steps):
        saved = {"step": step + 1}
        for name, run in runs.items():
            run.step(step)
            saved[name] = {part: value.state_dict() for part, value in run.parts().items()}
        torch.save(saved, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)  # never half a checkpoint
        print("step", step + 1, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
