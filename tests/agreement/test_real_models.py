"""Whole models: those of transformers (if it is installed), a transformer of torch, a ResNet.

``transformers`` is an optional dependency of the tests; without it these tests are skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from .exact_loop import RULE, check, compare, loop, members_of
from .layers import rand

IDS = torch.tensor([1, 0, 2, 1, 1, 0])
ENVIRONMENTS = pytest.mark.parametrize("environments", [None, 2, IDS], ids=["each", "2", "ids"])


@pytest.fixture
def hf() -> Any:
    """The package transformers, an optional dependency."""
    return pytest.importorskip("transformers", reason="optional: pip install transformers")


def small(config: type, **options: object) -> Any:
    """Return a tiny configuration, without dropout."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 12, "max_position_embeddings": 16, "vocab_size": 31,
             "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return config(**{**sizes, **options})


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean over all tokens: each example's share is its own mean, as all are as long."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# ---- transformers ----


@ENVIRONMENTS
def test_bert(hf: Any, environments: int | Tensor | None) -> None:
    model = hf.BertForSequenceClassification(small(hf.BertConfig)).double()
    labels, agreement = torch.randint(0, 3, (6,)), None

    def step(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    for length in (5, 6, 7, 3, 6):  # also as many tokens as examples, and one more
        ids = torch.randint(3, 31, (6, length))
        mask = (torch.arange(length) < torch.randint(2, length + 1, (6, 1))).long()
        agreement = check(
            model, step, ids, mask, labels, environments=environments, agreement=agreement
        )


def test_bert_with_a_tied_head(hf: Any) -> None:
    model = hf.BertForMaskedLM(small(hf.BertConfig)).double()

    def step(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())

    check(model, step, torch.randint(3, 31, (4, 6)))


def test_bert_with_dropout(hf: Any) -> None:
    """The reference shares the forward pass, and so the masks."""
    config = small(hf.BertConfig, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model = hf.BertForSequenceClassification(config).double().train()
    other, ids = copy.deepcopy(model), torch.randint(3, 31, (6, 5))
    torch.manual_seed(5)
    by_example = other(ids).logits.sin().mean(1)
    losses = [by_example[members].mean() for members in members_of(IDS, 6)]
    am.backward(losses, am.AndMask(0.6), other.parameters())
    torch.manual_seed(5)
    with am.Agreement(model, am.AndMask(0.6))(IDS):
        model(ids).logits.sin().mean().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if not name.endswith("key.bias"):  # zero, but for rounding
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("batch", [2, 4, 5])
def test_vit(hf: Any, batch: int) -> None:
    """Five tokens, of which the head sees one."""
    model = hf.ViTForImageClassification(small(hf.ViTConfig, image_size=8, patch_size=4)).double()

    def step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return model(pixel_values=images, labels=labels).loss

    check(model, step, rand(batch, 3, 8, 8), torch.randint(0, 3, (batch,)))


@ENVIRONMENTS
@pytest.mark.parametrize("tied", [True, False])
def test_llama(hf: Any, environments: int | Tensor | None, tied: bool) -> None:
    """Grouped queries, rotary positions, gated layers. Its norms compute in float32."""
    config = small(hf.LlamaConfig, num_key_value_heads=1, tie_word_embeddings=tied)
    model, agreement = hf.LlamaForCausalLM(config).double(), None

    def step(model: nn.Module, ids: Tensor) -> Tensor:
        return next_token_loss(model(ids, use_cache=False).logits, ids)

    for length in (5, 6, 7):
        ids = torch.randint(0, 31, (6, length))
        agreement = check(
            model, step, ids, environments=environments, agreement=agreement, tolerance=1e-5
        )


def test_llama_with_its_own_loss_and_checkpointing(hf: Any) -> None:
    config = small(hf.LlamaConfig, num_key_value_heads=1, use_cache=False)
    for checkpointing in (False, True):
        model = hf.LlamaForCausalLM(config).double()
        if checkpointing:
            turn_on = "activation_checkpointing_enable"
            getattr(model, turn_on, model.gradient_checkpointing_enable)()
            model.train()
        ids = torch.randint(0, 31, (4, 5))
        check(model, lambda m, ids: m(ids, labels=ids).loss, ids, tolerance=1e-5)


def test_t5(hf: Any) -> None:
    """Relative positions that all layers share."""
    config = hf.T5Config(vocab_size=31, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2,
                         dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
    model = hf.T5ForConditionalGeneration(config).double()

    def step(model: nn.Module, ids: Tensor, target: Tensor) -> Tensor:
        logits = model(input_ids=ids, decoder_input_ids=target, use_cache=False).logits
        return next_token_loss(logits, target)

    target = torch.randint(1, 31, (4, 3))
    check(model, step, torch.randint(1, 31, (4, 5)), target, tolerance=1e-5)


def test_swin(hf: Any) -> None:
    """Windows: rows are reordered within each example."""
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=4, depths=[2, 2],
                           num_heads=[1, 2], window_size=2, drop_path_rate=0.0,
                           num_labels=3)  # fmt: skip
    model = hf.SwinForImageClassification(config).double()

    def step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return classified(lambda x: model(pixel_values=x).logits, images, labels)

    check(model, step, rand(4, 3, 16, 16), torch.randint(0, 3, (4,)))


def test_a_mixture_of_experts(hf: Any) -> None:
    config = small(hf.MixtralConfig, num_key_value_heads=1, num_local_experts=3)
    model = hf.MixtralForCausalLM(config).float()

    def step(model: nn.Module, ids: Tensor) -> Tensor:
        return next_token_loss(model(ids, use_cache=False).logits, ids)

    agreement = None
    for _ in range(3):  # the router picks other rows each time
        ids = torch.randint(0, 31, (4, 4))
        agreement = check(model, step, ids, tolerance=1e-4, agreement=agreement)


# ---- convolutional networks ----


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.norm1 = norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = norm(out)
        self.short = nn.Identity()
        if stride > 1 or into != out:
            self.short = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)), inplace=True)
        hidden = self.norm2(self.conv2(hidden))
        hidden += self.short(x)
        return F.relu(hidden, inplace=True)


def resnet(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), norm(4), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), Block(4, 4, 1, norm), Block(4, 6, 2, norm),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def classified(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


@ENVIRONMENTS
def test_resnet(environments: int | Tensor | None) -> None:
    images, labels = rand(6, 3, 8, 8), torch.randint(0, 3, (6,))
    check(resnet(lambda n: nn.GroupNorm(2, n)), classified, images, labels,
          environments=environments)  # fmt: skip
    model = resnet()
    model(rand(6, 3, 8, 8))
    check(model.eval(), classified, images, labels, environments=environments)
    with pytest.raises(RuntimeError, match=r"4\.norm1 \(BatchNorm2d\).*convert_batchnorm"):
        check(model.train(), classified, images, labels, environments=2)


@pytest.mark.parametrize("environments", [2, torch.tensor([1, 0, 0, 1, 1, 0, 2, 2])])
def test_resnet_with_statistics_per_environment(environments: int | Tensor) -> None:
    """After three steps its buffers are those of the loop, too."""
    reference = resnet().train()
    model = copy.deepcopy(reference)
    converted = am.nn.convert_batchnorm(model)
    model = model if converted is None else converted
    agreement = am.Agreement(model, RULE)
    for _ in range(3):
        images, labels = rand(8, 3, 8, 8), torch.randint(0, 3, (8,))
        grads = loop(reference, classified, [images, labels], environments)
        for members in members_of(environments, 8):
            with torch.no_grad():
                reference(images[members])
        model.zero_grad()
        with agreement(environments):
            classified(model, images, labels).backward()
        for name, param in model.named_parameters():
            compare(name, grads[name], param.grad, RULE, 1e-9)
        for (name, mine), other in zip(model.named_buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(mine, other, msg=name)


# ---- torch ----


class Translator(nn.Module):
    """Embeddings, positions, an encoder, a decoder with a causal mask, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4, padding_idx=0)
        self.positions = nn.Parameter(0.1 * torch.randn(9, 4))
        self.transformer = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True)

    def embed(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.positions[: ids.shape[1]]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        padded = source == 0
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1]).double()
        hidden = self.transformer(
            self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True,
            src_key_padding_mask=padded, memory_key_padding_mask=padded,
        )  # fmt: skip
        return F.linear(hidden, self.table.weight)


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@ENVIRONMENTS
def test_translator(environments: int | Tensor | None) -> None:
    model, agreement = Translator().double(), None
    for lengths in ((6, 4), (5, 6), (7, 6)):
        source, target = (torch.randint(1, 11, (6, length)) for length in lengths)
        source[2, 3:] = 0
        agreement = check(
            model, lambda m, s, t: next_token_loss(m(s, t), t), source, target,
            environments=environments, agreement=agreement,
        )  # fmt: skip
