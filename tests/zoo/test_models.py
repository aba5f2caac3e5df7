"""Every model of the zoo: exact, or refused for a cause that has a name.

One Agreement sees batches of 4, 8 and 16 examples, each example an environment, in two groups and
by ids: plans that are kept are tested, too. A dozen models run in `make test`, all of them in
`make test-models`. One alone: ``pytest tests/zoo/test_models.py -k mixtral``.
"""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

import andmask_ext as am

from ..agreement.exact_loop import RULE, check
from ..agreement.outcomes import EXACT, MIXING, REVERSIBLE, outcome
from .adapters import ADAPTERS
from .case import Case, words
from .decoders import DECODERS
from .encoders import ENCODERS, TRANSLATORS
from .others import OTHERS
from .vision import VISION

ZOO: dict[str, Case] = {**ENCODERS, **TRANSLATORS, **DECODERS, **VISION, **OTHERS, **ADAPTERS}

# Refused, at least for some of the batches: the cause, and the models.
REFUSED = [
    # Examples mix: in the loss, in a pseudo-inverse, in the class token of films, in a choice of
    # lags.
    (MIXING, "clip siglip nystromformer timesformer autoformer"),
    (REVERSIBLE, "reformer"),
]

# What fails.
BROKEN = {
    "mixtral-balanced": "a term of the loss is made of statistics of the batch, which is not seen",
}

# Their graphs change with the data: which experts have tokens decides which nodes there are.
CHANGING = words("switch")

# Models that are refused, and others whose checks say nothing.
UNCOUNTED = {*CHANGING, *(name for _, names in REFUSED for name in words(names))}

# What `make test` runs.
FEW = words("bert deberta vit gpt2 mixtral deepseekv3 t5 mamba clip whisper patchtsmixer lora dora")

STEPS = [(4, "each"), (4, "2"), (4, "ids"), (8, "each"), (8, "each"), (8, "ids"), (16, "each"),
         (16, "2"), (8, "2")]  # fmt: skip


def environments(kind: str, size: int) -> int | Tensor | None:
    if kind == "ids":  # environments of different sizes, not in order
        return torch.arange(size).square() % 3
    return None if kind == "each" else int(kind)


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in FEW else [pytest.mark.zoo]


def fails(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xfail(strict=True, reason=BROKEN[name])] if name in BROKEN else []


@pytest.mark.filterwarnings("ignore")  # those of transformers and peft
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name) + fails(name)) for name in ZOO]
)
def test_model(name: str) -> None:
    pytest.importorskip("transformers", reason="optional: pip install transformers peft")
    pytest.importorskip("peft", reason="optional: pip install transformers peft")
    numpy.random.seed(0)
    case = ZOO[name]
    model = case.make()
    agreement = am.Agreement(model, RULE, keep_moments=True)
    causes = set()
    for size, kind in STEPS:
        if kind not in case.kinds:
            continue
        batch = case.tensors(size)
        causes.add(
            outcome(
                lambda batch=batch, size=size, kind=kind: check(
                    model, case.step(list(batch)), *batch.values(),
                    environments=environments(kind, size), agreement=agreement,
                    tolerance=case.tolerance,
                )
            )
        )  # fmt: skip
    assert causes - {EXACT} == {cause for cause, names in REFUSED if name in words(names)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name)) for name in ZOO if name not in UNCOUNTED]
)
def test_a_model_that_is_trained_is_checked_at_first_only(name: str, checks: list[object]) -> None:
    """Gates that are zero at first open when the model is trained."""
    pytest.importorskip("transformers", reason="optional: pip install transformers peft")
    pytest.importorskip("peft", reason="optional: pip install transformers peft")
    numpy.random.seed(0)
    case = ZOO[name]
    model = case.make()
    for size in (8,) if name in FEW else (4, 7, 8):
        if size % 2 and "each" not in case.kinds:
            continue
        agreement, counts = am.Agreement(model, RULE), []
        for _ in range(5):
            batch = case.tensors(size)
            with agreement(None if "each" in case.kinds else 2):
                case.step(list(batch))(model, *batch.values()).backward()
            counts.append(len(checks))
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(torch.randn_like(param), alpha=0.02 * param.requires_grad)
        assert counts[-1] == counts[2], size


def test_the_tables_name_models() -> None:
    refused = {name for _, names in REFUSED for name in words(names)}
    assert {*refused, *BROKEN, *CHANGING, *FEW} <= set(ZOO)
