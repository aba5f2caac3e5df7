"""What a configuration of transformers is tested with: its model, tiny, and batches for it.

A batch is a dict of tensors whose first dimension is the batch. Its share of the loss must be the
same for each example: all sequences of a batch have as many labels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import andmask_ext as am

Batch = dict[str, Tensor]

words = str.split

VOCABULARY, TOKENS, CLASSES = 50, 10, 3

# The relative tolerances of what computes in float64, of what casts a part of it to float32, as
# most losses of next tokens do, and of what takes no float64 at all.
IN_DOUBLE, THROUGH_SINGLE, IN_SINGLE = 1e-9, 1e-5, 2e-4


@dataclass(frozen=True)
class Case:
    """A model of transformers.

    Attributes:
        model: the name of its class.
        batch: of so many examples.
        options: of its configuration.
        tolerance: relative; with `IN_SINGLE` parameters are float32.
        convert: whether to convert its batch norms.
        kinds: of environments; "each" is missing where the loop cannot do it either.
        arguments: of the model, from the tensors of a batch.
        change: what to do with the model when it is made.
    """

    model: str
    batch: Callable[[int], Batch]
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = IN_DOUBLE
    convert: bool = False
    kinds: tuple[str, ...] = ("each", "2", "ids")
    arguments: Callable[[Batch], dict[str, Any]] = dict
    change: Callable[[Any], nn.Module] = lambda model: model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and batches."""
        return torch.float32 if self.tolerance == IN_SINGLE else torch.float64

    def make(self) -> nn.Module:
        """Return the model in training mode, without dropout."""
        made = getattr(importlib.import_module("transformers"), self.model)
        config = made.config_class(**self.options)
        without_dropout(config)
        model = self.change(made(config)).to(self.dtype).train()
        draw(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):  # of a rate that no option sets
                module.p = 0.0
        if self.convert:
            am.nn.convert_batchnorm(model)
        return model

    def step(self, names: list[str]) -> Callable[..., Tensor]:
        """Return a function from the model and the tensors of a batch to the loss."""

        def loss(model: nn.Module, *tensors: Tensor) -> Tensor:
            torch.manual_seed(0)
            out = model(**self.arguments(dict(zip(names, tensors, strict=True))))
            if getattr(out, "loss", None) is not None:
                return out.loss
            first = out.get("reconstruction", out[0]) if isinstance(out, dict) else out[0]
            return first.flatten(1).tanh().mean()

        return loss

    def tensors(self, size: int) -> Batch:
        """Return a batch in the dtype of the model."""
        batch = self.batch(size)
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.items()}


def without_dropout(config: Any) -> None:
    """Set every rate of dropout to zero, also in the configurations of parts."""
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif "drop" in name and isinstance(value, (list, tuple)):
            setattr(config, name, type(value)(0.0 for _ in value))
        elif hasattr(value, "to_dict"):
            without_dropout(value)


def draw(model: nn.Module) -> None:
    """Draw small matrices anew, larger: the gradients of all parameters shall be far from zero."""
    for param in model.parameters():
        if param.dim() > 1 and param.numel() > 1 and param.detach().std() < 0.1:
            nn.init.normal_(param, std=0.2)


# ---- batches ----


def tokens(size: int, length: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (size, length))


def classes(size: int, *shape: int, count: int = CLASSES) -> Tensor:
    return torch.randint(0, count, (size, *shape))


def padded(size: int, length: int = TOKENS) -> Tensor:
    """A mask that leaves out the last tokens of every third example."""
    mask = torch.ones(size, length, dtype=torch.int64)
    mask[1::3, -3:] = 0
    return mask


def texts(size: int, length: int = TOKENS) -> Batch:
    return {"input_ids": tokens(size, length), "attention_mask": padded(size, length),
            "labels": classes(size, count=2)}  # fmt: skip


def whole_texts(size: int, length: int = TOKENS) -> Batch:
    return {"input_ids": tokens(size, length), "labels": classes(size, count=2)}


def next_tokens(size: int, length: int = TOKENS) -> Batch:
    ids = tokens(size, length)
    return {"input_ids": ids, "labels": ids.clone()}


def filled_tokens(size: int) -> Batch:
    return {**next_tokens(size), "attention_mask": padded(size)}


def translations(size: int) -> Batch:
    return {"input_ids": tokens(size), "attention_mask": padded(size), "labels": tokens(size, 7)}


def pictures(size: int, side: int = 32) -> Tensor:
    return torch.randn(size, 3, side, side)


def classified(size: int, side: int = 32) -> Batch:
    return {"pixel_values": pictures(size, side), "labels": classes(size)}


def segmented(size: int, side: int = 64) -> Batch:
    return {"pixel_values": pictures(size, side), "labels": classes(size, side, side)}


def unlabelled(size: int, side: int = 32) -> Batch:
    return {"pixel_values": pictures(size, side)}
