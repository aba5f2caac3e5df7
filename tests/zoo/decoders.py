"""Models that predict the next token: with attention, with experts, with a state."""

from __future__ import annotations

from typing import Any

from torch import nn

from .case import IN_SINGLE, THROUGH_SINGLE, VOCABULARY, Case, next_tokens, texts
from .encoders import SMALL

GROUPED = {**SMALL, "num_key_value_heads": 1}
GPT = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def decoder(name: str, options: dict[str, Any], **more: Any) -> Case:
    return Case(f"{name}ForCausalLM", next_tokens, {**options, **more}, THROUGH_SINGLE)


def mixture(name: str, options: dict[str, Any], **more: Any) -> dict[str, Case]:
    """One that multiplies groups of rows, which takes no float64, and one expert by expert."""
    model, options = f"{name}ForCausalLM", {**options, **more}
    eager = {**options, "experts_implementation": "eager"}
    return {
        name.lower(): Case(model, next_tokens, options, IN_SINGLE),
        f"{name.lower()}-eager": Case(model, next_tokens, eager, THROUGH_SINGLE),
    }


ATTENTION = {
    "gpt2": Case("GPT2LMHeadModel", next_tokens, GPT, THROUGH_SINGLE),
    "gpt2-classes": Case("GPT2ForSequenceClassification", texts, GPT),
    "gpt": Case("OpenAIGPTLMHeadModel", next_tokens, GPT, THROUGH_SINGLE),
    "gpt-neo": decoder(
        "GPTNeo", SMALL, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=2,
        window_size=4,
    ),
    "gpt-neox": decoder("GPTNeoX", SMALL),
    "gpt-j": decoder("GPTJ", GPT, rotary_dim=4),
    "gpt-bigcode": decoder("GPTBigCode", GPT),
    "codegen": decoder("CodeGen", GPT, n_head=4, rotary_dim=4),
    "ctrl": Case("CTRLLMHeadModel", next_tokens, {**GPT, "dff": 24}, THROUGH_SINGLE),
    "opt": decoder("OPT", SMALL, ffn_dim=24, word_embed_proj_dim=16),
    "bloom": decoder("Bloom", SMALL, n_layer=2, n_head=2),
    **{
        name.lower(): decoder(name, GROUPED)
        for name in (
            "Llama Mistral Qwen2 Phi Phi3 StableLm Starcoder2 Olmo Olmo2 Granite Cohere SmolLM3"
        ).split()
    },
    "llama-classes": Case("LlamaForSequenceClassification", texts, GROUPED, THROUGH_SINGLE),
    "qwen3": decoder("Qwen3", GROUPED, head_dim=8),
    "gemma": decoder("Gemma", GROUPED, head_dim=8),
    "gemma2": decoder("Gemma2", GROUPED, head_dim=8),
    "gemma3": decoder("Gemma3", GROUPED, head_dim=8, sliding_window=4),
    "falcon": decoder("Falcon", SMALL),
    "mpt": decoder("Mpt", SMALL, d_model=16, n_layers=2, n_heads=2, max_seq_len=64),
    "persimmon": decoder("Persimmon", SMALL),
}  # fmt: skip

# ---- experts ----

EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 3, "num_experts_per_tok": 2}
DEEPSEEK = {
    "num_key_value_heads": 2, "moe_intermediate_size": 12, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
    "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip
JAMBA = {
    "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2,
    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
}  # fmt: skip

MIXTURES = {
    **mixture("Mixtral", GROUPED, **LOCAL),
    "mixtral-balanced": Case(
        "MixtralForCausalLM", next_tokens, {**GROUPED, **LOCAL, "output_router_logits": True},
        IN_SINGLE,
    ),
    **mixture(
        "Qwen2Moe", GROUPED, moe_intermediate_size=12, shared_expert_intermediate_size=12, **EXPERTS
    ),
    **mixture("Olmoe", GROUPED, **EXPERTS),
    **mixture("DeepseekV3", SMALL, **DEEPSEEK),
    **mixture("GptOss", GROUPED, head_dim=8, sliding_window=4, **LOCAL),
    **mixture("Jamba", GROUPED, **JAMBA, **EXPERTS),
}  # fmt: skip

# ---- states ----

RWKV = {"attention_hidden_size": 16, "context_length": 32}
BAMBA = {
    "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_chunk_size": 4,
}  # fmt: skip

GRIFFIN = {"head_dim": 8, "lru_width": 16, "attention_window_size": 8, "num_hidden_layers": 3}


def forgetful(model: Any) -> nn.Module:
    """Let it drop the states of each pass, which the loop's copy of the model cannot hold."""

    def forget(module: Any, *_: object) -> None:
        module.recurrent_states = None

    for module in model.modules():
        if hasattr(module, "recurrent_states"):
            module.register_forward_hook(forget)
    return model


STATES = {
    "mamba": decoder("Mamba", SMALL, state_size=4),
    "mamba2": decoder(
        "Mamba2", SMALL, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4
    ),
    "rwkv": decoder("Rwkv", SMALL, **RWKV),
    "recurrent-gemma": Case(
        "RecurrentGemmaForCausalLM", next_tokens, {**GROUPED, **GRIFFIN}, THROUGH_SINGLE,
        change=forgetful, arguments=lambda batch: {**batch, "use_cache": False},
    ),
    "bamba": decoder("Bamba", GROUPED, **BAMBA),
}  # fmt: skip

DECODERS = {**ATTENTION, **MIXTURES, **STATES}
