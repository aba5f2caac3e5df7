"""Two processes on gloo. Run as a script: ``processes_run.py RANK FILE``. It prints ``ok``."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import andmask_ext as am

ALONE = "the environments of one process vote by themselves"


def loss_of(model: nn.Module, rank: int, environment: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * environment + rank)
    return model(torch.randn(5, 3, generator=generator)).square().mean()


def fresh() -> tuple[nn.Module, DistributedDataParallel, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return (
        model,
        DistributedDataParallel(model),
        am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5),
    )


def late_grad_is_refused(rank: int) -> None:
    _, wrapped, optimizer = fresh()

    def synchronised() -> None:
        with optimizer.environment():
            loss_of(wrapped, rank, 0).backward()

    with pytest.raises(RuntimeError, match=r"DistributedDataParallel .*no_sync\(\)"):
        synchronised()


def spread_environments_are_averaged(rank: int) -> None:
    """Each environment over all processes, as ``micro_batches=None`` says."""
    model, wrapped, optimizer = fresh()
    for environment in range(3):
        with optimizer.environment(micro_batches=None):
            loss_of(wrapped, rank, environment).backward()
    optimizer.step()
    other, _, alone = fresh()
    for environment in range(3):
        with alone.environment():
            (sum(loss_of(other, r, environment) for r in range(2)) / 2).backward()
    alone.step()
    torch.testing.assert_close(model.weight, other.weight)


def own_environments_vote_alone(rank: int) -> None:
    """Without synchronisation, which is said once."""
    model, wrapped, optimizer = fresh()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            for environment in range(2):
                with optimizer.environment(), wrapped.no_sync():
                    loss_of(wrapped, rank, environment).backward()
            optimizer.step()
        agreement = am.Agreement(model, am.AndMask(0.5))
        for _ in range(2):
            with agreement():
                loss_of(model, rank, 0).backward()
        for _ in range(2):
            losses = [loss_of(model, rank, environment) for environment in range(2)]
            am.backward(losses, am.AndMask(0.5))
    said = [str(one.message) for one in given if ALONE in str(one.message)]
    assert len(said) == 3, said  # of the optimizer, of the Agreement, and of backward
    assert "got 2" in said[0], said


def main(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    own_environments_vote_alone(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spread_environments_are_averaged(rank)
        late_grad_is_refused(rank)
    dist.barrier()
    dist.destroy_process_group()
    print("ok", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
