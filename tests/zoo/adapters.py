"""Llama and GPT-2 with the adapters of peft."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from .case import THROUGH_SINGLE, Case, next_tokens
from .decoders import GPT, GROUPED

PROJECTIONS = ["q_proj", "v_proj"]


def adapted(config: str, **options: Any) -> Callable[[Any], nn.Module]:
    """Return what adds an adapter."""

    def change(model: Any) -> nn.Module:
        peft = importlib.import_module("peft")
        changed: nn.Module = peft.get_peft_model(model, getattr(peft, config)(**options))
        return changed

    return change


def llama(config: str, **options: Any) -> Case:
    """A Llama for next tokens; ``options`` are those of the adapter."""
    return Case(
        "LlamaForCausalLM", next_tokens, GROUPED, THROUGH_SINGLE,
        change=adapted(f"{config}Config", task_type="CAUSAL_LM", **options),
    )  # fmt: skip


ADAPTERS = {
    "lora-gpt2": Case(
        "GPT2LMHeadModel", next_tokens, GPT, THROUGH_SINGLE,
        change=adapted("LoraConfig", r=2, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"),
    ),
    "lora": llama("Lora", r=2, target_modules=PROJECTIONS),
    "lora-tables": llama(
        "Lora", r=2, target_modules=[*PROJECTIONS, "embed_tokens"], modules_to_save=["lm_head"]
    ),
    "dora": llama("Lora", r=2, target_modules=PROJECTIONS, use_dora=True),
    "adalora": llama("AdaLora", target_modules=PROJECTIONS, init_r=4, target_r=2, total_step=20),
    "ia3": llama(
        "IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": llama("LoHa", r=2, target_modules=PROJECTIONS),
    "lokr": llama("LoKr", r=2, target_modules=PROJECTIONS),
    "oft": llama("OFT", oft_block_size=4, target_modules=PROJECTIONS),
    "boft": llama("BOFT", boft_block_size=4, target_modules=PROJECTIONS),
    "vera": llama("Vera", r=4, target_modules=["q_proj", "o_proj"]),
    "prompt-tuning": llama("PromptTuning", num_virtual_tokens=3),
    "prefix-tuning": llama("PrefixTuning", num_virtual_tokens=3),
    "p-tuning": llama("PromptEncoder", num_virtual_tokens=3, encoder_hidden_size=8),
    "norm-tuning": llama("LNTuning"),
    "fourier": llama("FourierFT", n_frequency=8, target_modules=PROJECTIONS),
}  # fmt: skip
