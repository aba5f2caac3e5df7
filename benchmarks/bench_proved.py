"""Steps after the first: ``Agreement`` on known models whose plan is kept.

python -m benchmarks.bench_proved --quick

Each example is an environment, and each step has other data. A vision transformer of 197 patches,
BERT, Mixtral and DeepSeek-V3, whose experts are one grouped product, and RWKV, in sizes in which a
plain step takes about 50 ms on one thread. They come from transformers, which the extra ``dev``
installs. With one thread, times are CPU time of the thread. A step whose plan is known runs one
backward pass, and a short one before it if parts of the model have no gradient, as in RWKV; a step
that checks for mixing runs several.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import andmask_ext as am

from .common import Row, measure, parser, peak_memory, run
from .measuring import Step

CLASSES, LENGTH, WORDS = 10, 64, 1000
STEPS = 4  # batches that are drawn
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Setting = tuple[nn.Module, Loss, list[tuple[Tensor, Tensor]]]


def vit(examples: int) -> Setting:
    """Make a vision transformer of 14 x 14 patches and a token for the class."""
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=16 // examples, num_attention_heads=4,
        intermediate_size=512, image_size=112, patch_size=8, num_labels=CLASSES,
    )  # fmt: skip
    batches = [
        (torch.randn(examples, 3, 112, 112), torch.randint(CLASSES, (examples,)))
        for _ in range(STEPS)
    ]
    return ViTForImageClassification(config), _classes, batches


def bert(examples: int) -> Setting:
    """Make a BERT that classifies sentences."""
    config = BertConfig(
        vocab_size=WORDS, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, num_labels=CLASSES,
    )  # fmt: skip
    batches = [
        (torch.randint(WORDS, (examples, LENGTH)), torch.randint(CLASSES, (examples,)))
        for _ in range(STEPS)
    ]
    return BertForSequenceClassification(config), _classes, batches


def mixtral(examples: int) -> Setting:
    """Make a language model of which each token takes two of eight experts."""
    config = MixtralConfig(
        vocab_size=WORDS, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=256, num_local_experts=8,
        experts_implementation="grouped_mm", use_cache=False,
    )  # fmt: skip
    return MixtralForCausalLM(config), _words, sentences(examples, LENGTH)


def deepseek(examples: int) -> Setting:
    """Make a language model with compressed attention and a dense and a routed layer."""
    config = DeepseekV3Config(
        vocab_size=WORDS, hidden_size=128, num_hidden_layers=2, first_k_dense_replace=1,
        num_attention_heads=4, num_key_value_heads=4, intermediate_size=512,
        moe_intermediate_size=256, n_routed_experts=8, num_experts_per_tok=2, n_group=4,
        topk_group=2, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, experts_implementation="grouped_mm", use_cache=False,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config), _words, sentences(examples, LENGTH)


def rwkv(examples: int) -> Setting:
    """Make a recurrent language model. The first token has no gradient in some of its nodes."""
    config = RwkvConfig(
        vocab_size=WORDS, context_length=16, hidden_size=256, num_hidden_layers=3, use_cache=False
    )  # fmt: skip
    return RwkvForCausalLM(config), _words, sentences(examples, 16)


def sentences(examples: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Draw sentences, and the next word of each word."""
    words = [torch.randint(WORDS, (examples, length + 1)) for _ in range(STEPS)]
    return [(one[:, :-1], one[:, 1:]) for one in words]


def _classes(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).logits, labels)


def _words(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    scores = model(inputs).logits
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten())


class Passes:
    """Counts the backward passes through the scores of a model, checks for mixing included."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._count = 0

    def of(self, step: Step) -> int:
        """Return the number of passes of a step."""
        self._count = 0
        handle = self._model.register_forward_hook(self._watch)
        step()
        handle.remove()
        return self._count

    def _watch(self, model: nn.Module, inputs: object, output: Any) -> None:
        output.logits.grad_fn.register_prehook(self._see)

    def _see(self, grads: object) -> None:
        self._count += 1


MODELS: dict[str, Callable[[int], Setting]] = {
    "ViT": vit, "BERT": bert, "Mixtral": mixtral, "DeepSeek-V3": deepseek, "RWKV": rwkv,
}  # fmt: skip
BATCHES = {"ViT": (4, 8, 16), "BERT": (8,), "Mixtral": (8,), "DeepSeek-V3": (8,), "RWKV": (8,)}


def case(name: str, examples: int, last: int) -> list[Row]:
    """Measure one model; memory with the last number of threads only."""
    torch.manual_seed(0)
    model, loss, batches = MODELS[name](examples)
    params = list(model.parameters())
    agreement = am.Agreement(model, am.AndMask(tau=0.6))
    ours, plain = itertools.cycle(batches), itertools.cycle(batches)

    def plain_step() -> None:
        for param in params:
            param.grad = None
        loss(model, *next(plain)).backward()

    def our_step() -> None:
        for param in params:
            param.grad = None
        with agreement():
            loss(model, *next(ours)).backward()

    contestants: dict[str, Step] = {"plain": plain_step, "Agreement": our_step}
    title = f"{name}, batch {examples}, {sum(p.numel() for p in params) / 1e6:.2f} M"
    passes = Passes(model)
    first, *later = [passes.of(our_step) for _ in range(1 + STEPS)]
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    rows = measure(title, contestants, bytes_moved=0, yardstick="plain", patience=2.0, clock=clock)
    rows[1].note = f"backward passes: {first} in the first step, then {max(later)}"
    if torch.get_num_threads() == last:
        used = [peak_memory(contestants[row.contestant]) / 2**20 for row in rows]
        for row, megabytes in zip(rows, used, strict=True):
            row.megabytes, row.memory_ratio = megabytes, megabytes / used[0]
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments = options.parse_args()
    last = arguments.threads[-1]
    chosen = [(name, n) for name in arguments.models for n in BATCHES[name]]
    if arguments.quick:
        chosen, arguments.threads = [(name, BATCHES[name][0]) for name in arguments.models], [last]
    run(arguments, [partial(case, name, examples, last) for name, examples in chosen])


if __name__ == "__main__":
    main()
