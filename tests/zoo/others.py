"""Models of pictures with texts, of sound, and of series in time."""

from __future__ import annotations

from typing import Any

import torch

from .case import (
    IN_DOUBLE,
    IN_SINGLE,
    THROUGH_SINGLE,
    Batch,
    Case,
    classes,
    classified,
    pictures,
    tokens,
)  # fmt: skip
from .encoders import BART, SMALL
from .vision import PATCHES

# ---- pictures and texts ----

WORDS = {**SMALL, "max_position_embeddings": 32, "projection_size": 16}
SIGHT = {name: value for name, value in PATCHES.items() if name != "num_labels"}
BOTH: dict[str, Any] = {"text_config": WORDS, "vision_config": SIGHT}


def described(size: int) -> Batch:
    return {"input_ids": tokens(size), "pixel_values": pictures(size)}


def captioned(size: int) -> Batch:
    batch = described(size)
    return {**batch, "labels": batch["input_ids"].clone()}


def answered(size: int) -> Batch:
    return {**described(size), "labels": torch.rand(size, 3)}


def contrasted(batch: Batch) -> dict[str, Any]:
    return {**batch, "return_loss": True}


TOGETHER = {
    "clip": Case("CLIPModel", described, {**BOTH, "projection_dim": 8}, arguments=contrasted),
    "clip-images": Case(
        "CLIPForImageClassification", classified, {**BOTH, "projection_dim": 8, "num_labels": 3}
    ),
    "siglip": Case("SiglipModel", described, BOTH, arguments=contrasted),
    "siglip-images": Case("SiglipForImageClassification", classified, {**BOTH, "num_labels": 3}),
    "blip": Case(
        "BlipForConditionalGeneration", captioned,
        {"text_config": {**WORDS, "encoder_hidden_size": 16, "num_hidden_layers": 1},
         "vision_config": SIGHT, "image_text_hidden_size": 8},
    ),
    "vilt": Case("ViltForQuestionAnswering", answered, {**SMALL, **PATCHES}),
    "git": Case("GitForCausalLM", captioned, {**SMALL, "vision_config": SIGHT}, THROUGH_SINGLE),
}  # fmt: skip

# ---- sound ----

SOUND = {
    **SMALL, "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12, "mask_time_prob": 0.0, "layerdrop": 0.0, "num_labels": 3,
    "classifier_proj_size": 8,
}  # fmt: skip
SPEECH = {
    **BART, "max_source_positions": 60, "max_target_positions": 20, "decoder_start_token_id": 1,
}  # fmt: skip


def heard(name: str, convert: bool = False, **more: Any) -> Case:
    def batch(size: int) -> Batch:
        return {"input_values": torch.randn(size, 600), "labels": classes(size)}

    return Case(f"{name}ForSequenceClassification", batch, {**SOUND, **more}, convert=convert)


def spoken(size: int) -> Batch:
    return {"input_values": torch.randn(size, 600), "labels": classes(size, 4, count=11) + 1}


def spectra(size: int, *shape: int) -> Batch:
    return {"input_features": torch.randn(size, *shape), "labels": tokens(size, 6)}


HEARING = {
    "wav2vec2": heard("Wav2Vec2"),
    "wav2vec2-ctc": Case(
        "Wav2Vec2ForCTC", spoken, {**SOUND, "ctc_loss_reduction": "mean"}, THROUGH_SINGLE
    ),
    "hubert": heard("Hubert"),
    "sew": heard("SEW", squeeze_factor=2),
    "wavlm": heard("WavLM", num_buckets=8, max_bucket_distance=16),
    "unispeech": heard("UniSpeech"),
    "data2vec-audio": heard("Data2VecAudio", conv_pos_kernel_size=3),
    "wav2vec2-conformer": heard(
        "Wav2Vec2Conformer", convert=True, conv_depthwise_kernel_size=3,
        position_embeddings_type="relative",
    ),
    "whisper": Case(
        "WhisperForConditionalGeneration", lambda n: spectra(n, 8, 40),
        {**SPEECH, "max_source_positions": 20, "num_mel_bins": 8},
    ),
    "speech2text": Case(
        "Speech2TextForConditionalGeneration", lambda n: spectra(n, 40, 8),
        {**SPEECH, "input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 8},
    ),
    "ast": Case(
        "ASTForAudioClassification",
        lambda n: {"input_values": torch.randn(n, 24, 16), "labels": classes(n)},
        {**PATCHES, "frequency_stride": 8, "time_stride": 8, "max_length": 24, "num_mel_bins": 16},
    ),
}  # fmt: skip

# ---- series in time ----

HORIZON = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2,
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
PIECES = {
    "num_input_channels": 2, "context_length": 16, "prediction_length": 4, "patch_length": 4,
    "patch_stride": 4, "d_model": 16,
}  # fmt: skip
DECISION = {"state_dim": 3, "act_dim": 2, "hidden_size": 16, "max_ep_len": 20, "n_layer": 2,
            "n_head": 2}  # fmt: skip


def forecast(name: str, tolerance: float = IN_DOUBLE, **more: Any) -> Case:
    past = HORIZON["context_length"] + max(HORIZON["lags_sequence"])

    def batch(size: int) -> Batch:
        return {
            "past_values": torch.rand(size, past) + 1,
            "past_time_features": torch.randn(size, past, 2),
            "past_observed_mask": torch.ones(size, past),
            "future_values": torch.rand(size, 4) + 1,
            "future_time_features": torch.randn(size, 4, 2),
        }

    return Case(f"{name}ForPrediction", batch, {**HORIZON, **more}, tolerance)


def channels(size: int) -> Batch:
    return {"past_values": torch.randn(size, 16, 2), "future_values": torch.randn(size, 4, 2)}


def decisions(size: int) -> Batch:
    return {
        "states": torch.randn(size, 5, 3), "actions": torch.randn(size, 5, 2),
        "rewards": torch.randn(size, 5, 1), "returns_to_go": torch.randn(size, 5, 1),
        "timesteps": torch.arange(5).repeat(size, 1), "attention_mask": torch.ones(size, 5),
    }  # fmt: skip


SERIES = {
    "time-series": forecast("TimeSeriesTransformer"),
    "informer": forecast("Informer"),
    "autoformer": forecast("Autoformer", IN_SINGLE, moving_average=3, label_length=4),
    "patchtst": Case(
        "PatchTSTForPrediction", channels,
        {**PIECES, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}, convert=True,
    ),
    "patchtsmixer": Case("PatchTSMixerForPrediction", channels, {**PIECES, "num_layers": 2},
                         convert=True),
    "decision": Case("DecisionTransformerModel", decisions, DECISION),
}  # fmt: skip

OTHERS = {**TOGETHER, **HEARING, **SERIES}
