"""How often is metrics.diagnose right? The table of docs/metrics.md: python -m tools.diagnosis.

Hospitals have digits (scikit-learn) with a marker of ten more inputs, which tells the class. Its
meaning differs ("code"), or it is right more or less often ("strength"), or there is none ("none").
Two more kinds have no marker: "contrast", where images are fainter in some hospitals, and
"classes", where classes are more frequent in some. With --mask the job is also trained with the
AND-mask.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import andmask_ext as am

Batch = tuple[Tensor, Tensor]

KINDS = ("code", "strength", "none", "contrast", "classes")
EXPECTED = {"code": "directions", "strength": "strength", "none": "neither"}
TRAINING = 1300  # examples; the other 497 are for testing
STEPS = {"MLP": (0, 30, 100, 200), "CNN": (0, 20, 50)}


def hospitals(
    kind: str, count: int = 5, amplitude: float = 3.0, seed: int = 0
) -> tuple[list[Batch], Batch]:
    """Return a batch of each hospital, and the test batch. Inputs are [examples, 74].

    When tested, the marker of "code" is random, and that of "strength" always says another class.
    """
    rng = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(pixels))
    pixels, labels = pixels[order] / 16, labels[order]
    training = np.arange(len(pixels)) < TRAINING
    where = np.arange(len(pixels)) % count
    codes = np.stack([rng.permutation(10) for _ in range(count)])
    marker = np.zeros((len(pixels), 10))
    if kind == "contrast":
        pixels = pixels * np.linspace(0.6, 1.4, count)[where][:, None]
    if kind == "classes":
        odds = rng.dirichlet(np.ones(10), size=count)
        where = np.array([
            rng.choice(count, p=odds[:, label] / odds[:, label].sum()) for label in labels
        ])  # fmt: skip
    for index, label in enumerate(labels):
        right = 0.95 - 0.2 * where[index] / (count - 1)
        if kind == "code":
            says = codes[where[index]][label] if training[index] else rng.integers(10)
        elif kind == "strength":
            believed = label if rng.random() < right else rng.integers(10)
            says = codes[0][believed if training[index] else (label + 5) % 10]
        else:
            continue
        marker[index, says] = amplitude
    inputs = np.concatenate([pixels, marker], 1)
    inputs = torch.from_numpy(inputs + 0.3 * rng.standard_normal(inputs.shape)).float()
    targets = torch.from_numpy(labels)
    rows = [torch.from_numpy(np.flatnonzero(training & (where == e))) for e in range(count)]
    test = torch.from_numpy(np.flatnonzero(~training))
    return [(inputs[row], targets[row]) for row in rows], (inputs[test], targets[test])


def as_images(inputs: Tensor) -> Tensor:
    """Return images [examples, 1, 8, 10], with the marker in five rows of the last two columns."""
    images = inputs.new_zeros(len(inputs), 1, 8, 10)
    images[:, 0, :, :8] = inputs[:, :64].view(-1, 8, 8)
    images[:, 0, :5, 8:] = inputs[:, 64:].view(-1, 5, 2)
    return images


def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if name == "MLP":
        return nn.Sequential(nn.Linear(74, 64), nn.ReLU(), nn.Linear(64, 10))
    first = nn.Conv2d(1, 16, 3, padding=1)
    second = nn.Conv2d(16, 32, 3, padding=1, stride=2)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(640, 10))


def train_plainly(model: nn.Module, environments: list[Batch], steps: int) -> Iterator[int]:
    """Train with AdamW on all examples. Yield the number of steps, before each and at the end."""
    x, y = (torch.cat(parts) for parts in zip(*environments, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        yield step
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    yield steps


def train_masked(model: nn.Module, environments: list[Batch], steps: int, tau: float) -> None:
    """Train with the AND-mask."""
    optimizer = am.optim.AndMaskAdamW(model.parameters(), lr=1e-3, tau=tau)
    for _ in range(steps):
        for x, y in environments:
            with optimizer.environment():
                F.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return float((model(batch[0]).argmax(1) == batch[1]).double().mean())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, nargs="+", default=list(range(200, 220)))
    options.add_argument("--environments", type=int, nargs="+", default=[3, 5, 8, 16])
    options.add_argument("--amplitudes", type=float, nargs="+", default=[3.0, 1.0])
    options.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options.add_argument("--model", default="MLP", choices=list(STEPS))
    options.add_argument("--mask", type=float, help="also train with this tau")
    options.add_argument("--steps", type=int, help="of training with --mask (200)", default=200)
    chosen = options.parse_args()
    for kind in chosen.kinds:
        for count in chosen.environments:
            marked = kind in ("code", "strength")
            for amplitude in chosen.amplitudes if marked else chosen.amplitudes[:1]:
                _case(chosen, kind, count, amplitude)


def _case(chosen: argparse.Namespace, kind: str, count: int, amplitude: float) -> None:
    marks = STEPS[chosen.model]
    verdicts: dict[int, Counter[str]] = {step: Counter() for step in marks}
    accuracies = []
    for seed in chosen.seeds:
        environments, test = hospitals(kind, count, amplitude, seed)
        if chosen.model == "CNN":
            environments = [(as_images(x), y) for x, y in environments]
            test = (as_images(test[0]), test[1])
        model = network(chosen.model, seed)
        if chosen.mask is not None:
            for _ in train_plainly(model, environments, chosen.steps):
                pass
            masked = network(chosen.model, seed)
            train_masked(masked, environments, chosen.steps, chosen.mask)
            accuracies.append((accuracy(model, test), accuracy(masked, test)))
            continue
        for step in train_plainly(model, environments, marks[-1]):
            if step in marks:
                result = am.metrics.diagnose(model, environments, F.cross_entropy)
                verdicts[step][result.verdict] += 1
    name = f"{chosen.model} {kind} d={count} amplitude={amplitude:g}"
    if accuracies:
        means, spread = np.mean(accuracies, 0), np.std(accuracies, 0)
        print(
            f"{name}: tau={chosen.mask:g}, {chosen.steps} steps, test accuracy "
            f"{means[0]:.3f} ± {spread[0]:.3f} plain, {means[1]:.3f} ± {spread[1]:.3f} masked",
            flush=True,
        )
        return
    for step, counts in verdicts.items():
        said = ", ".join(f"{verdict} {times}" for verdict, times in counts.most_common())
        right = counts[EXPECTED[kind]] if kind in EXPECTED else "-"
        print(f"{name} step {step}: right {right} of {len(chosen.seeds)} ({said})", flush=True)


if __name__ == "__main__":
    main()
