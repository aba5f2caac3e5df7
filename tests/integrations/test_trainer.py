"""A run under Hugging Face Trainer equals the loop over environments."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import andmask_ext as am

from .common import TAU, assert_same, assert_same_bits, members, needs, train_by_loop

needs("transformers", "accelerate", "peft")

import transformers  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

from andmask_ext.integrations.transformers import AgreementMixin, AgreementTrainer  # noqa: E402

pytestmark = [pytest.mark.no_device, pytest.mark.filterwarnings("default")]

WORDS, TOKENS, BATCH, STEPS = 40, 8, 4, 10
SIZE = BATCH * STEPS
KINDS: dict[str, Any] = {"each": None, "2": 2, "site": "site"}
SMALL = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _quiet(capsys: pytest.CaptureFixture[str]) -> Any:
    transformers.utils.logging.set_verbosity_error()
    yield
    capsys.readouterr()  # the log of the trainer


def classifier() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SMALL, **NO_DROPOUT, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=2, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double()


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=TOKENS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    model.loss_function = next_tokens
    return model


def next_tokens(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any) -> Tensor:
    """The loss of transformers, which would cast to float32. Rounding then turns votes."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def adapted() -> nn.Module:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    torch.manual_seed(0)
    model = peft.get_peft_model(language_model(), config)
    for name, param in model.named_parameters():
        if "lora_B" in name:  # zero at first
            nn.init.normal_(param, std=0.1)
    return model


def examples(texts: bool = False) -> list[dict[str, Any]]:
    """Examples of different lengths: of a class, or with a label for each token."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(SIZE):
        ids = torch.randint(3, WORDS, (TOKENS,), generator=generator)
        mask = (torch.arange(TOKENS) < 3 + index * 5 % (TOKENS - 2)).long()
        labels = torch.where(mask > 0, ids, -100) if texts else index * 3 % 2
        found.append(
            {"input_ids": ids, "attention_mask": mask, "labels": labels, "site": index * 7 % 3}
        )
    return found


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    chosen = {
        "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": 0.05,
        "max_grad_norm": 0.0, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**chosen, **options})


def optimizers(model: nn.Module, ours: bool) -> tuple[Any, Any]:
    params = [param for param in model.parameters() if param.requires_grad]
    options = {"lr": 0.05, "momentum": 0.9}
    if ours:
        return am.optim.AndMaskSGD(params, **options, tau=TAU), None
    return torch.optim.SGD(params, **options), None


def rule_for(ours: bool) -> am.AndMask | None:
    return None if ours else am.AndMask(TAU)


def batch_of(rows: list[dict[str, Any]], chosen: Tensor) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask", "labels")
    stacked = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}
    return {name: value[chosen] for name, value in stacked.items()}


def by_loop(
    model: nn.Module, rows: list[dict[str, Any]], kind: str, accumulate: int, clip: float | None
) -> list[float]:
    """Train a model in a plain loop. Return the norms of its gradients."""
    model.train()
    batches = [rows[k : k + BATCH] for k in range(0, len(rows), BATCH)]
    optimizer = optimizers(model, ours=False)[0]
    count = -(-len(batches) // accumulate)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, count)
    steps = []
    for group in (batches[k : k + accumulate] for k in range(0, len(batches), accumulate)):
        sites = [torch.tensor([row["site"] for row in batch]) for batch in group]
        steps.append(
            [
                lambda batch=batch, chosen=chosen: model(**batch_of(batch, chosen)).loss
                for batch, site in zip(group, sites, strict=True)
                for chosen in members(kind, site)
            ]
        )
    return train_by_loop(model, steps, optimizer, clip, scheduler)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


MODELS = {"classifier": classifier, "language model": language_model, "adapted": adapted}


@pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (4, 0.05)], ids=["1", "4 clipped"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_run_equals_the_loop(
    tmp_path: Path, name: str, kind: str, accumulate: int, clip: float | None, ours: bool
) -> None:
    """Ten steps, or three of four batches each, the last one of two."""
    model = MODELS[name]()
    reference, rows = copy.deepcopy(model), examples(texts=name != "classifier")
    trainer = AgreementTrainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=clip or 0),
        train_dataset=rows,
        eval_dataset=rows[:4],
        optimizers=optimizers(model, ours),
        rule=rule_for(ours),
        environments=KINDS[kind],
    )
    trainer.train()
    norms = by_loop(reference, rows, kind, accumulate, clip)
    assert_same(model, reference)
    if clip is not None:
        assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert trainer.evaluate()["eval_loss"] > 0  # also with the column of sites


def test_the_log_has_the_mean_loss_of_a_step(tmp_path: Path) -> None:
    rows = examples(texts=True)
    losses = {}
    for accumulate in (1, 2):
        model = language_model()
        trainer = AgreementTrainer(
            model=model, rule=am.AndMask(1.0), train_dataset=rows,
            args=arguments(
                tmp_path, gradient_accumulation_steps=accumulate, learning_rate=0.0
            ),
        )  # fmt: skip
        trainer.train()
        losses[accumulate] = logged(trainer, "loss")
    ones, twos = losses[1], losses[2]
    assert twos == pytest.approx([sum(ones[k : k + 2]) / 2 for k in range(0, 10, 2)], rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_function_of_the_user(tmp_path: Path, accumulate: int) -> None:
    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        assert num_items_in_batch is None  # so it is a mean
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    model = classifier()
    reference = copy.deepcopy(model)
    trainer = AgreementTrainer(
        model=model, rule=am.AndMask(TAU), compute_loss_func=compute_loss,
        args=arguments(tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=0.05),
        train_dataset=examples(), optimizers=optimizers(model, ours=False),
    )  # fmt: skip
    trainer.train()
    by_loop(reference, examples(), "each", accumulate, 0.05)
    assert_same(model, reference)
    expected = torch.nn.functional.cross_entropy(
        classifier()(**{k: v for k, v in batch_of(examples()[:BATCH], torch.arange(BATCH)).items()
                        if k != "labels"}).logits,
        torch.tensor([row["labels"] for row in examples()[:BATCH]]),
    )  # fmt: skip
    if accumulate == 1:
        assert logged(trainer, "loss")[0] == pytest.approx(float(expected), rel=1e-3)


def test_smoothed_labels_of_different_number_are_said(tmp_path: Path) -> None:
    """The trainer's loss divides by the labels of the batch; one of the user's is exact."""

    def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        losses = nn.functional.cross_entropy(
            outputs["logits"].flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="none"
        )
        return (losses.view_as(labels).sum(1) / (labels != -100).sum(1)).mean()

    def train(texts: bool, **options: Any) -> tuple[nn.Module, list[str]]:
        model = language_model() if texts else classifier()
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            AgreementTrainer(
                model=model, args=arguments(tmp_path, label_smoothing_factor=0.1),
                train_dataset=examples(texts), optimizers=optimizers(model, ours=False),
                rule=am.AndMask(TAU), **options,
            ).train()  # fmt: skip
        return model, [str(w.message) for w in given if "label_smoothing" in str(w.message)]

    def loss(row: dict[str, Any]) -> Any:
        batch = batch_of([row], torch.tensor([0]))
        labels = batch.pop("labels")
        return lambda: smoothed(reference(**batch), labels)

    (message,) = train(texts=True)[1]
    assert "AgreementTrainer: label_smoothing_factor expects examples with equally" in message
    assert train(texts=False)[1] == []
    model, messages = train(texts=True, compute_loss_func=smoothed)
    assert messages == []
    reference, rows = language_model().train(), examples(texts=True)
    optimizer = optimizers(reference, ours=False)[0]
    steps = [[loss(row) for row in rows[k : k + BATCH]] for k in range(0, SIZE, BATCH)]
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    train_by_loop(reference, steps, optimizer, None, scheduler)
    assert_same(model, reference)


@pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])
def test_mixed_precision(tmp_path: Path, ours: bool) -> None:
    """As Agreement with autocast, and near the loop in float32."""
    model = classifier().float()
    mine, exact = copy.deepcopy(model), copy.deepcopy(model)
    rows = examples()
    trainer = AgreementTrainer(
        model=model, args=arguments(tmp_path, bf16=True, max_grad_norm=0.05), train_dataset=rows,
        optimizers=optimizers(model, ours), rule=rule_for(ours),
    )  # fmt: skip
    trainer.train()

    mine.train()
    optimizer = optimizers(mine, ours=False)[0]
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    agreement = am.Agreement(mine, am.AndMask(TAU))
    for k in range(0, SIZE, BATCH):
        with agreement():
            with torch.autocast("cpu", torch.bfloat16):
                loss = mine(**batch_of(rows[k : k + BATCH], torch.arange(BATCH))).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.05)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_same(model, mine, rtol=1e-5, atol=1e-6)
    norms = by_loop(exact, rows, "each", 1, 0.05)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=0.2)


@pytest.mark.parametrize("ours", [True, False], ids=["our optimizer", "a rule"])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, ours: bool) -> None:
    def run(resume: str | None) -> nn.Module:
        model = classifier()
        trainer = AgreementTrainer(
            model=model,
            args=arguments(tmp_path, save_strategy="steps", save_steps=2, max_grad_norm=0.05,
                           gradient_accumulation_steps=2),
            train_dataset=examples(), optimizers=optimizers(model, ours), rule=rule_for(ours),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = run(None)
    assert_same_bits(run(str(tmp_path / "checkpoint-2")), whole)


def test_an_optimizer_that_the_trainer_makes(tmp_path: Path) -> None:
    """With its groups of weights that decay and weights that do not."""
    model = classifier()
    trainer = AgreementTrainer(
        model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=examples(),
        optimizer_cls_and_kwargs=(am.optim.AndMaskAdamW, {"lr": 0.05, "tau": TAU}),
    )  # fmt: skip
    trainer.train()
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == [0.1, 0.0]
    assert trainer.agreement is not None
    assert len(trainer.agreement.moments) == 2


def test_whole_batches_are_environments(tmp_path: Path) -> None:
    model = classifier()
    reference, rows = copy.deepcopy(model), examples()
    trainer = AgreementTrainer(
        model=model, args=arguments(tmp_path, gradient_accumulation_steps=5, max_grad_norm=0.05),
        train_dataset=rows, optimizers=optimizers(model, ours=True), whole_batches=True,
    )  # fmt: skip
    trainer.train()
    optimizer = optimizers(reference, ours=False)[0]
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, 2)
    reference.train()
    steps = [
        [
            lambda k=k: reference(**batch_of(rows[k : k + BATCH], torch.arange(BATCH))).loss
            for k in range(first, first + 5 * BATCH, BATCH)
        ]
        for first in (0, 5 * BATCH)
    ]
    norms = train_by_loop(reference, steps, optimizer, 0.05, scheduler)
    assert_same(model, reference)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-3)


def test_a_subclass_of_another_trainer(tmp_path: Path) -> None:
    class Translator(AgreementMixin, transformers.Seq2SeqTrainer):
        pass

    config = transformers.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).double()
    reference, rows = copy.deepcopy(model), examples(texts=True)
    trainer = Translator(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(**{
            **arguments(tmp_path, gradient_accumulation_steps=2).to_dict(), "report_to": [],
        }),
        train_dataset=rows, optimizers=optimizers(model, ours=False), rule=am.AndMask(TAU),
    )  # fmt: skip
    trainer.train()
    by_loop(reference, rows, "each", 2, None)
    assert_same(model, reference, rtol=1e-4, atol=1e-6)  # a part of the model computes in float32


def test_rules_in_no_place_or_in_two(tmp_path: Path) -> None:
    def train(ours: bool, compiled: bool = False, **options: Any) -> None:
        model = classifier()
        args = arguments(tmp_path, torch_compile=compiled)
        AgreementTrainer(
            model=model, args=args, train_dataset=examples(),
            optimizers=optimizers(model, ours), **options,
        ).train()  # fmt: skip

    with pytest.raises(TypeError, match=r"AgreementTrainer: expected an optimizer .* but got SGD"):
        train(ours=False)
    with pytest.raises(RuntimeError, match="leave out torch_compile=True"):
        train(ours=True, compiled=True)
    with pytest.raises(ValueError, match="AndMaskSGD, which has its own; leave out rule="):
        train(ours=True, rule=am.AndMask(TAU))
    with pytest.raises(ValueError, match=r"environments='hospital' expects .* but got input_ids"):
        train(ours=True, environments="hospital")
