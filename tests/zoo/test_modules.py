"""Every module of torch's database, alone and after a parameter: all exact.

``torch.testing`` has samples of the arguments of each module. A part runs in `make test`, all of
them in `make test-zoo`. One alone: ``pytest tests/zoo/test_modules.py -k Conv2d``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

from ..agreement.outcomes import EXACT
from .case import words
from .compared import causes_of, compared
from .samples import Batched, Sample, batched

DATABASE = {info.name.removeprefix("nn."): info for info in module_db}

# What draws, and a loss whose arguments the search leaves.
NOT_COMPARED = words("FractionalMaxPool2d FractionalMaxPool3d CTCLoss")

# What `make test` runs.
FEW = list(DATABASE)[::16]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}
SAMPLES = {torch.float64: 5, torch.float32: 2}


def chosen(samples: list[Any], most: int) -> list[Any]:
    return samples[:: -(-len(samples) // most)] if samples else []


def samples_of(name: str, dtype: torch.dtype, training: bool) -> Iterator[Sample]:
    info = DATABASE[name]
    made = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    for inputs in chosen([m for m in made if m.forward_input is not None], SAMPLES[dtype]):
        module = info.module_cls(*inputs.constructor_input.args, **inputs.constructor_input.kwargs)
        for part in module.modules():
            if isinstance(getattr(part, "dropout", None), float):
                part.dropout = 0.0
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.p = 0.0
        arguments = (inputs.forward_input.args, inputs.forward_input.kwargs)
        yield Sample(module.to(dtype).train(training), arguments)


def models_of(sample: Sample) -> list[Batched]:
    """Return the module alone, if it has parameters, and after a parameter."""
    with torch.no_grad():
        sample(sample.function, sample.tensors)  # the lazy ones make their parameters
    if any(tensor.numel() == 0 for tensor in sample.tensors):
        return []
    floats = [n for n, tensor in enumerate(sample.tensors) if tensor.is_floating_point()]
    alone = batched(sample) if any(p.requires_grad for p in sample.function.parameters()) else []
    return alone + batched(sample, scaled=floats[:1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FEW else [pytest.mark.zoo]) for name in DATABASE],
)
def test_module(name: str) -> None:
    outcomes: Counter[str] = Counter()
    for dtype, tolerance in TOLERANCES.items():
        for training in (True, False):
            for sample in samples_of(name, dtype, training):
                for model in models_of(sample):
                    outcomes += compared(model, tolerance)
    print(dict(outcomes))
    assert causes_of(outcomes) == set()
    assert (not outcomes[EXACT]) == (name in NOT_COMPARED), outcomes


def test_the_tables_name_modules() -> None:
    assert {*NOT_COMPARED, *FEW} <= set(DATABASE)
