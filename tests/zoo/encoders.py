"""Encoders of text, and models that translate."""

from __future__ import annotations

from typing import Any

from . import case
from .case import (
    IN_DOUBLE,
    IN_SINGLE,
    THROUGH_SINGLE,
    VOCABULARY,
    Batch,
    Case,
    classes,
    filled_tokens,
    texts,
    tokens,
    translations,
    whole_texts,
)  # fmt: skip

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DISTANCES = {"share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}


# For those that have names of their own for sizes.
BARE = {name: SMALL[name] for name in ("vocab_size", "pad_token_id", "bos_token_id")}


def classifier(name: str, batch: Any = texts, **options: Any) -> Case:
    return Case(f"{name}ForSequenceClassification", batch, {**SMALL, **options})


def long_texts(size: int) -> Batch:
    return whole_texts(size, 16)


def spans(size: int) -> Batch:
    return {"input_ids": tokens(size), "start_positions": classes(size, count=5),
            "end_positions": classes(size, count=5)}  # fmt: skip


def choices(size: int) -> Batch:
    ids = tokens(3 * size).unflatten(0, (size, 3))
    return {"input_ids": ids, "labels": classes(size)}


def pairs(size: int) -> Batch:
    return {**filled_tokens(size), "next_sentence_label": classes(size, count=2)}


def tagged(size: int) -> Batch:
    return {**texts(size), "labels": classes(size, case.TOKENS, count=2)}


def pages(size: int) -> Batch:
    return {**texts(size), "bbox": classes(size, case.TOKENS, 4, count=60).sort(-1)[0]}


def ended(size: int) -> Batch:
    ids = tokens(size)
    ids[:, -1] = SMALL["eos_token_id"]
    return {"input_ids": ids, "labels": classes(size, count=2)}


FUNNEL = {
    **BARE, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24,
}  # fmt: skip
XLNET = {**BARE, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
MODERN = {**SMALL, "cls_token_id": 3, "sep_token_id": 4, "local_attention": 4}
XLM = {**SMALL, "emb_dim": 16, "n_layers": 2, "n_heads": 2}
CANINE = {
    "downsampling_rate": 4, "local_transformer_stride": 8, "num_hash_buckets": 16,
    "num_hash_functions": 2, "upsampling_kernel_size": 3,
}  # fmt: skip
REFORMER = {
    "attn_layers": ["local"], "attention_head_size": 8, "feed_forward_size": 24,
    "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [8, 8], "local_attn_chunk_length": 4,
    "is_decoder": True, "max_position_embeddings": 16, "num_hidden_layers": 1,
}  # fmt: skip

ENCODERS = {
    "bert": classifier("Bert"),
    "bert-filled": Case("BertForMaskedLM", filled_tokens, SMALL),
    "bert-tokens": Case("BertForTokenClassification", tagged, SMALL),
    "bert-spans": Case("BertForQuestionAnswering", spans, SMALL),
    "bert-choices": Case("BertForMultipleChoice", choices, SMALL),
    "bert-pairs": Case("BertForPreTraining", pairs, SMALL),
    "roberta": classifier("Roberta"),
    "xlm-roberta": classifier("XLMRoberta"),
    "camembert": Case("CamembertForMaskedLM", filled_tokens, SMALL),
    "albert": classifier("Albert", embedding_size=8),
    "deberta": Case(
        "DebertaForSequenceClassification", texts, {**SMALL, **RELATIVE}, THROUGH_SINGLE
    ),
    "deberta-v2": Case(
        "DebertaV2ForSequenceClassification", texts, {**SMALL, **RELATIVE, **DISTANCES},
        THROUGH_SINGLE,
    ),
    "electra": classifier("Electra", embedding_size=8),
    "distilbert": classifier("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "mpnet": classifier("MPNet"),
    "funnel": Case("FunnelForSequenceClassification", texts, FUNNEL, THROUGH_SINGLE),
    "bigbird-sparse": classifier(
        "BigBird", lambda n: whole_texts(n, 64), block_size=4, num_random_blocks=1,
        attention_type="block_sparse", max_position_embeddings=128,
    ),
    "bigbird-full": classifier("BigBird", attention_type="original_full"),
    "longformer": Case(
        "LongformerForSequenceClassification", long_texts, {**SMALL, "attention_window": [4, 4]},
        THROUGH_SINGLE,
    ),
    "canine": Case(  # float64 overflows in its mask
        "CanineForSequenceClassification", long_texts, {**SMALL, **CANINE}, IN_SINGLE
    ),
    "convbert": classifier(
        "ConvBert", num_attention_heads=4, embedding_size=16, head_ratio=2, num_groups=1,
        conv_kernel_size=3,
    ),
    "fnet": classifier("FNet", whole_texts),
    "ibert": classifier("IBert"),
    "layoutlm": classifier("LayoutLM", pages),
    "mobilebert": classifier(
        "MobileBert", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16
    ),
    "nystromformer": classifier(
        "Nystromformer", long_texts, num_landmarks=4, segment_means_seq_len=16
    ),
    "yoso": classifier("Yoso", use_expectation=True),
    "rembert": classifier("RemBert", input_embedding_size=8, output_embedding_size=8),
    "roformer": classifier("RoFormer"),
    "squeezebert": classifier(
        "SqueezeBert", embedding_size=16, q_groups=2, k_groups=2, v_groups=2,
        post_attention_groups=1, intermediate_groups=2, output_groups=2,
    ),
    "xlnet": Case("XLNetForSequenceClassification", texts, XLNET),
    "xlm": Case("XLMForSequenceClassification", texts, XLM, THROUGH_SINGLE),
    "flaubert": Case("FlaubertForSequenceClassification", texts, XLM, THROUGH_SINGLE),
    "modernbert": Case("ModernBertForSequenceClassification", texts, MODERN, THROUGH_SINGLE),
    "reformer": Case(
        "ReformerModelWithLMHead", lambda n: case.next_tokens(n, 16), {**SMALL, **REFORMER}
    ),
    "perceiver": classifier(
        "Perceiver", num_latents=6, d_latents=16, d_model=16, num_blocks=1,
        num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=2,
    ),
}  # fmt: skip

# ---- translation ----

T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
LED = {
    **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
    "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64,
    "attention_window": [4, 4],
}  # fmt: skip
PROPHETNET = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "encoder_ffn_dim": 24, "num_encoder_layers": 2,
    "num_encoder_attention_heads": 2, "decoder_ffn_dim": 24, "num_decoder_layers": 2,
    "num_decoder_attention_heads": 2, "max_position_embeddings": 64, "ngram": 2, "num_buckets": 8,
    "relative_max_distance": 16,
}  # fmt: skip
SWITCH = {
    **T5, "num_decoder_layers": 2, "num_experts": 3, "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    # The losses of the router are statistics of the batch.
    "router_z_loss_coef": 0.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.0,
}  # fmt: skip


def translator(
    name: str, options: dict[str, Any], tolerance: float = IN_DOUBLE, **more: Any
) -> Case:
    return Case(f"{name}ForConditionalGeneration", translations, {**options, **more}, tolerance)


TRANSLATORS = {
    "t5": translator("T5", T5, THROUGH_SINGLE),
    "mt5": translator("MT5", T5, THROUGH_SINGLE),
    "umt5": translator("UMT5", T5, THROUGH_SINGLE),
    "longt5": translator("LongT5", T5, THROUGH_SINGLE, local_radius=3),
    "switch": translator("SwitchTransformers", SWITCH, IN_SINGLE),
    "bart": translator("Bart", BART),
    "bart-classes": Case("BartForSequenceClassification", ended, BART),
    "mbart": translator("MBart", BART),
    "pegasus": translator("Pegasus", BART),
    "marian": Case("MarianMTModel", translations, BART),
    "blenderbot": translator("Blenderbot", BART),
    "m2m100": translator("M2M100", BART),
    "led": translator("LED", LED, IN_SINGLE),
    "prophetnet": translator("ProphetNet", PROPHETNET, IN_SINGLE),
}
