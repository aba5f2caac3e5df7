"""What a run is made of, and the parameterisations to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .. import study
from .data import SpiralsConfig

# What sets the threshold of a vote: one of the first three.
THRESHOLD = ("tau", "fdr", "significance", "zeros")
# The methods, and the settings that only some of them have.
METHODS: dict[str, tuple[str, ...]] = {
    "mean": ("pooled",),
    "dropout": ("pooled", "dropout"),
    "l1": ("pooled", "l1"),
    "l2": ("pooled", "l2"),
    "batch-norm": ("pooled",),
    "dann": ("reversal", "l2"),
    "irm": ("penalty", "anneal", "l2"),
    "and-mask": (*THRESHOLD, "rescale", "l2"),
    "geometric-mean": (*THRESHOLD, "rescale", "l2"),
    "sand-mask": (*THRESHOLD, "rescale", "sharpness", "l2"),
    "masked-average": (*THRESHOLD, "l2"),
    "median": ("l2",),
    "sign-dropout": ("l2",),
    "agreement-filtering": ("cos_distance", "halve", "l2"),
}
OF_SOME = {name for names in METHODS.values() for name in names}
OPTIMIZERS = ("adam", "sgd")
ZEROS = ("count", "abstain")
SETTLE = 40


@dataclass(frozen=True)
class Settings(study.Settings):
    """Everything that decides one run but its seed; the defaults are the paper's.

    Args:
        method: one of ``METHODS``, which also says which of the others it ignores.
        tau: share of net votes that a coordinate needs, where neither of the next two is given.
        fdr: false discovery rate that sets this share in each tensor at each step.
        significance: level of the sign test that sets it once for all.
        zeros: whether an exact zero counts as an environment (``count``) or not (``abstain``).
        together: all environments in one backward pass (``am.Agreement``), in place of one each.
            It is faster; sums differ in their rounding, and runs by what becomes of that.
        rescale: divide each masked gradient by its share of kept coordinates.
        sharpness: ``k`` of the SAND-mask.
        cos_distance: limit of the cosine distance in gradient agreement filtering.
        halve: there, average each gradient half and half with all before it.
        dropout: share of hidden units that are left out.
        l1: penalty on the sum of absolute weights, a part of the loss.
        l2: penalty that the optimizer adds to the (masked) gradient.
        reversal: by how much the gradient is multiplied, beside -1, on its way from DANN's
            environment classifier to the features.
        penalty: weight of IRM's penalty.
        anneal: epochs in which that weight is 1.
        pooled: mix the environments, and draw ``batch`` examples for a step from all of them.
        environments: number of training environments.
        examples: examples in each.
        test_examples: size of the test set.
        shortcut_dims: number of shortcut dimensions.
        shortcut_variance: variance of the entries of a shortcut vector.
        revolutions: turns of the spirals.
        standardize: divide the mechanism dimensions by their standard deviation.
        width: units in a hidden layer.
        layers: number of hidden layers.
        batch: examples from each environment in one step.
        epochs: passes over the data.
        optimizer: ``adam``, or ``sgd`` with momentum .9.
        lr: first learning rate.
        beta2: memory of Adam's second moment; ``sgd`` has none.
        decay: shares of the epochs after which the learning rate falls to a tenth.
        fit: share of right answers on the training data, in one epoch, at which the learning rate
            falls to a tenth and training ends ``SETTLE`` epochs later; None for never.

    Reference:
        Parascandolo et al., ICLR 2021, section 4.1 and its appendix.
    """

    method: str = "and-mask"
    tau: float = 0.8
    fdr: float | None = None
    significance: float | None = None
    zeros: str = "count"
    together: bool = False
    rescale: bool = True
    sharpness: float = 10.0
    cos_distance: float = 1.0
    halve: bool = False
    dropout: float = 0.5
    l1: float = 1e-5
    l2: float = 1e-4
    reversal: float = 1.0
    penalty: float = 100.0
    anneal: int = 1
    pooled: bool = False
    environments: int = 32
    examples: int = 1280
    test_examples: int = 2000
    shortcut_dims: int = 32
    shortcut_variance: float = 0.1
    revolutions: float = 3.0
    standardize: bool = False
    width: int = 256
    layers: int = 3
    batch: int = 128
    epochs: int = 94
    optimizer: str = "adam"
    lr: float = 1e-2
    beta2: float = 0.999
    decay: tuple[float, ...] = (0.5, 0.75)
    fit: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.optimizer not in OPTIMIZERS:
            expected = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer: expected one of {expected}, got {self.optimizer!r}")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau: expected a number in [0, 1], got {self.tau}")
        if self.fdr is not None and self.significance is not None:
            raise ValueError(
                f"fdr, significance: expected one of them, got {self.fdr} and {self.significance}"
            )
        for name in ("fdr", "significance"):
            if (level := getattr(self, name)) is not None and not 0 < level < 1:
                raise ValueError(f"{name}: expected a number in (0, 1), got {level}")
        if self.zeros not in ZEROS:
            raise ValueError(f"zeros: expected one of {', '.join(ZEROS)}, got {self.zeros!r}")
        for name in ("width", "layers", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        most, of = self.examples, "an environment"
        if self.pooled:
            most, of = most * self.environments, "all environments"
        if self.batch > most:
            raise ValueError(
                f"batch: expected at most the {most} examples of {of}, got {self.batch}"
            )
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: expected a finite number > 0, got {self.lr}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2: expected a number in [0, 1), got {self.beta2}")
        for name in ("l1", "l2", "reversal", "penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}: expected a finite number >= 0, got {getattr(self, name)}"
                )
        if not 0 < self.sharpness < float("inf"):
            raise ValueError(f"sharpness: expected a finite number > 0, got {self.sharpness}")
        if not 0 <= self.cos_distance <= 2:
            raise ValueError(f"cos_distance: expected a number in [0, 2], got {self.cos_distance}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), got {self.dropout}")
        if self.anneal < 0:
            raise ValueError(f"anneal: expected at least 0, got {self.anneal}")
        if self.pooled and "pooled" not in METHODS[self.method]:
            raise ValueError(
                f"pooled: expected a method that does without environments, got {self.method!r}"
            )
        if self.fit is not None and not 0 < self.fit <= 1:
            raise ValueError(f"fit: expected a share in (0, 1], got {self.fit}")
        if not all(0 <= share <= 1 for share in self.decay):
            raise ValueError(f"decay: expected shares of the epochs in [0, 1], got {self.decay}")
        self.data_config()

    @property
    def threshold(self) -> dict[str, Any]:
        """What sets the threshold, as arguments of a rule."""
        given: dict[str, Any] = {
            name: level
            for name in ("fdr", "significance")
            if (level := getattr(self, name)) is not None
        } or {"tau": self.tau}
        return given if self.zeros == "count" else {**given, "zeros": self.zeros}

    def data_config(self) -> SpiralsConfig:
        """Return the part that decides the data."""
        names = [f.name for f in fields(SpiralsConfig)]
        return SpiralsConfig(**{name: getattr(self, name) for name in names})

    def learning_rate(self, epoch: float, train_accuracy: Sequence[float] = ()) -> float | None:
        """Return the learning rate at an epoch and the fraction of it; None at training's end."""
        passed = sum(epoch >= share * self.epochs for share in self.decay)
        fitted = next(
            (e for e, share in enumerate(train_accuracy, start=1) if self.fits(share)), None
        )
        if epoch >= self.epochs or (fitted is not None and epoch >= fitted + SETTLE):
            return None
        return self.lr / float(10 ** (passed + (fitted is not None)))

    def fits(self, train_accuracy: float) -> bool:
        """Tell whether a training accuracy is what ``fit`` asks for."""
        return self.fit is not None and train_accuracy >= self.fit

    def identity(self) -> dict[str, Any]:
        """Return what decides the outcome, without what the method or the optimizer ignores."""
        ignored = OF_SOME - set(METHODS[self.method])
        if self.optimizer == "sgd":
            ignored.add("beta2")
        if self.fdr is not None or self.significance is not None:
            ignored.add("tau")
        # What older records had no name for is left out where it is what they had.
        ignored |= {
            name
            for name in ("fdr", "significance", "zeros", "together")
            if getattr(self, name) == getattr(Settings, name)
        }
        identity = {name: value for name, value in asdict(self).items() if name not in ignored}
        if self.method == "irm":
            identity["l2_divided"] = True  # records of another way are not taken for this one
        return identity


PAPER = Settings()
# The command in the authors' README.
RELEASED = replace(
    PAPER,
    tau=1.0,
    environments=16,
    examples=1024,
    shortcut_dims=16,
    shortcut_variance=1.0,
    standardize=True,
    batch=256,
    epochs=150,
    decay=(0.75,),
    l2=1e-3,
)
# The same data and network, with an optimizer and a schedule that do better.
TUNED = replace(RELEASED, beta2=0.99, l2=2e-3, epochs=600, decay=(), fit=0.99)
SETTINGS = {"paper": PAPER, "released": RELEASED, "tuned": TUNED}
# What --quick changes in any of them: enough to see the effect in a minute.
QUICK: dict[str, Any] = {"revolutions": 1.0, "width": 96, "epochs": 16}
