"""The pages: their Python blocks run, their links lead somewhere, their lines are not too long.

The blocks of a page run in order and share a namespace. It starts with the names that the page
takes as given (``model``, ``loader``, ...): `prelude` has those of all pages, `PRELUDES` those of
one. A block that cannot run has ``<!-- not run: reason -->`` on the line before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am
from tools.results import with_zeros, wrapped

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[!.]*/README.md")])
NOT_RUN = 0  # blocks, on all pages
WIDTH = 100

BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^[ \t]*```[ \t]*(?:py|python)\b", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
DECIMAL = re.compile(r"(?<![\w.*)\]}])\.\d+")  # .93 for 0.93
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield the Python blocks: the number of the line before, the source, whether it runs."""
    for block in BLOCK.finditer(text):
        yield text.count("\n", 0, block.start(2)), block[2], block[1] is None


def prelude() -> dict[str, Any]:
    """Return what the blocks of all pages take as given."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    x, y = batches[0]
    names = {"torch": torch, "nn": nn, "F": F, "am": am, "model": model, "x": x, "y": y}
    return names | {
        "loader": batches,
        "environments": batches,
        "grads": torch.randn(8, 5, 3),
        "optimizer": am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5),
        "your_optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }


def train(model: nn.Module, optimizer: Any) -> None:
    """Make a step with four environments."""
    optimizer.zero_grad()
    for _ in range(4):
        with optimizer.environment():
            F.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
    optimizer.step()


def readme(names: dict[str, Any]) -> dict[str, Any]:
    from andmask_ext import plots

    weight = torch.randn(3, 4)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(params["weight"] @ x, y)

    return {"loss": loss, "params": {"weight": weight}, "plots": plots, "train": train}


def optimizers(names: dict[str, Any]) -> dict[str, Any]:
    params = [torch.randn(5, 3), torch.randn(2)]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    return {
        "steps": 2,
        "next_environments": lambda: names["environments"],
        "scaler": torch.amp.GradScaler("cpu"),
        "loss": loss,
        "params": params,
        "gradients_of_environments": [[torch.randn_like(p) for p in params] for _ in range(4)],
    }


def rules(names: dict[str, Any]) -> dict[str, Any]:
    return {"losses": [F.cross_entropy(names["model"](x), y) for x, y in names["environments"]]}


def metrics(names: dict[str, Any]) -> dict[str, Any]:
    class SummaryWriter:
        def add_scalar(self, tag: str, value: Any, step: int) -> None:
            assert isinstance(tag, str)

    model = names["model"]
    return {
        "inputs": torch.randn(32, 6),
        "gradients_of": lambda inputs: {"weight": inputs.unflatten(0, (4, 8)).mean(1)},
        "shortcut_columns": [0, 1],
        "mechanism_columns": [2, 3, 4, 5],
        "agreement": am.Agreement(model, am.AndMask(tau=0.5)),
        "train": train,
        "SummaryWriter": SummaryWriter,
        "train_on": lambda environments: torch.tensor(float(len(environments))),
        "evaluate": lambda solution, environment: solution * environment[0].mean(),
    }


def trainers(names: dict[str, Any]) -> dict[str, Any]:
    """Return tiny models, data in the form of each framework, and what keeps it quiet."""
    import lightning as L
    import transformers

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    rows = [{"x": torch.randn(4), "y": k % 3, "site": k % 2} for k in range(16)]

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class ERM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(4, 3)
            self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
            self.hparams = {"tau": 0.5}

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    return {
        "loader": torch.utils.data.DataLoader(rows, batch_size=8),
        "model": model, "Module": Module, "module": Module(), "ERM": ERM,
        "options": {
            "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
            "enable_checkpointing": False, "enable_model_summary": False,
        },
        "bert": transformers.BertForSequenceClassification(config),
        "texts": [
            {"input_ids": torch.randint(20, (6,)), "labels": k % 2, "site": k % 2}
            for k in range(16)
        ],
        "args": transformers.TrainingArguments(
            output_dir="runs", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no",
        ),
    }  # fmt: skip


PRELUDES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "README.md": readme,
    "docs/metrics.md": metrics,
    "docs/optimizers.md": optimizers,
    "docs/rules.md": rules,
    "docs/trainers.md": trainers,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:lightning")
@each_page
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(page.relative_to(ROOT))
    names: dict[str, Any] = {"__name__": name} | prelude()
    names |= PRELUDES.get(name, lambda names: {})(names)
    for line, source, runs in blocks(page.read_text(encoding="utf-8")):
        if runs:
            # Empty lines in front: a traceback names the line of the page.
            exec(compile("\n" * line + source, str(page), "exec"), names)


def test_no_block_is_missed() -> None:
    not_run = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(list(blocks(text))) == len(FENCE.findall(text)), page
        not_run += sum(not runs for _, _, runs in blocks(text))
    assert not_run == NOT_RUN


def test_theory_claims_something_in_every_block() -> None:
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    claim = re.compile(r"^ *assert ", re.MULTILINE)
    silent = [line for line, source, _ in blocks(text) if not claim.search(source)]
    assert silent == []


def test_blocks() -> None:
    text = "a\n```python\nx = 1\n```\n<!-- not run: no GPU -->\n```python\ny\n```\n```\nz\n```\n"
    assert list(blocks(text)) == [(2, "x = 1\n", True), (6, "y\n", False)]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of headings."""
    headings = HEADING.findall(FENCED.sub("", text))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def broken_links(text: str, page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue  # another place
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        missing = (path and not file.exists()) or ROOT not in (file, *file.parents)
        if not missing and anchor:
            missing = anchor not in anchors(text if file == page else file.read_text("utf-8"))
        if missing:
            broken.append(target)
    return broken


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page.read_text(encoding="utf-8"), page) == []


@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("[a](docs/rules.md#zeros-ties-nan)", False),
        ("[a](#here)", False),
        ("![a picture](docs/figures/votes.png)", False),
        ("[a](https://example.org/nothing.md)", False),
        ("[a](docs/rule.md)", True),
        ("[a](docs/rules.md#nowhere)", True),
        ("[a](#there)", True),
        ("[a](../outside.md)", True),
    ],
)
def test_broken_links(link: str, broken: bool) -> None:
    assert bool(broken_links(f"# Here\n\n{link}\n", ROOT / "page.md")) == broken


def long_lines(text: str) -> list[str]:
    """Return the lines beyond the width that could be wrapped: not of a table or a picture."""
    return [
        line
        for line in text.splitlines()
        if len(line) > WIDTH and not line.lstrip().startswith(("|", "![", "<!--"))
    ]


@each_page
def test_lines_and_decimals(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert long_lines(text) == []
    assert DECIMAL.findall(FENCED.sub("", text)) == []


def test_tool_for_results() -> None:
    assert with_zeros("loss .0032, θ = -.5 (±.02), torch 2.13.0, x.5") == (
        "loss 0.0032, θ = -0.5 (±0.02), torch 2.13.0, x.5"
    )
    text = wrapped("- " + "word " * 19 + "of 1. The rest, from .1 - a little - to .2", indent="  ")
    assert text.splitlines() == [
        "- " + "word " * 18 + "word",
        "  of 1. The rest, from 0.1 - a little - to 0.2",
    ]
