"""Several processes: what is averaged, what is refused, and what is only said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import andmask_ext as am

from .common import MAKERS, environments, parameters, random_grads

SCRIPT = Path(__file__).with_name("processes_run.py")


@pytest.mark.no_device
def test_two_processes(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(tmp_path / "rendezvous")],
            cwd=Path(am.__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [out for out, _ in outputs] == ["ok\n", "ok\n"], "\n".join(err for _, err in outputs)


def test_one_process_says_nothing(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1
    )
    try:
        params = parameters()
        optimizer = MAKERS["sgd"](params)
        environments(optimizer, params, random_grads(params))
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_moments_take_a_parameter_once_in_an_environment() -> None:
    moments = am.Moments([torch.zeros(2)])
    one = torch.ones(2)
    with pytest.raises(RuntimeError, match="each parameter once in an environment"):
        moments._add_some([0, 0], [one, one], 1.0)
    moments._add_some([0], [one], 1.0)
    with pytest.raises(RuntimeError, match="each parameter once in an environment"):
        moments._add_some([0], [one], 1.0)
