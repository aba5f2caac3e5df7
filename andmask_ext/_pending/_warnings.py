"""What a pending step can only note."""

from __future__ import annotations

import sys

import torch

from .._notices import warn_once


def warn_of_processes(owner: object) -> None:
    """Warn once if there are other processes, whose environments do not vote with these."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    processes = distributed.get_world_size()
    if processes > 1:
        warn_once(
            owner,
            f"torch.distributed: expected one process, but got {processes}: the environments of "
            "one process vote by themselves, and nothing keeps the replicas equal (synchronising "
            "votes over processes is not built yet); use one process, or average the parameters "
            "over all processes after each step, or spread each environment over all processes "
            "with DistributedDataParallel and environment(micro_batches=None)",
        )


def warn_of_drop(owner: object, environments: int) -> None:
    """Warn that complete environments are dropped, unless an error is being handled."""
    if sys.exc_info()[0] is None:
        warn_once(
            owner,
            f"zero_grad: expected no environments since the last step, but {environments} complete "
            "ones, which no step has used, are dropped; call zero_grad() once per step, before "
            "the first environment (environment() clears .grad by itself)",
        )
