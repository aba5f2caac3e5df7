"""A study that takes a moment: what tests of the frame run."""

import argparse
import os
import signal
import sys
from dataclasses import dataclass

import torch

from studies.study import Finished, Outcome, Run, Settings, Study
from studies.summary import Claim, Summary, Table


@dataclass(frozen=True)
class ToySettings(Settings):
    lr: float = 0.5
    epochs: int = 4
    stop: tuple[int, int] = (0, 0)  # a signal, and the epoch in which it comes

    def identity(self):
        return {"lr": self.lr, "epochs": self.epochs}


class Toy(Study[ToySettings]):
    """Descend on a parabola with noise."""

    name = "toy"
    title = "a parabola"
    about = "Descend on a parabola."
    reference = "none"
    packages = ("torch",)
    seeds = (0, 1)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--lr", type=float, nargs="+", default=[0.5])
        parser.add_argument("--epochs", type=int, default=4)
        parser.add_argument("--again", action="store_true")
        parser.add_argument("--only-prepare", action="store_true")
        parser.add_argument("--stop", type=int, nargs=2, default=(0, 0))

    def plan(self, options):
        if options.epochs < 1:
            raise ValueError(f"epochs: expected at least 1, got {options.epochs}")
        return [
            Run(f"lr={lr:g}", ToySettings(lr, options.epochs, tuple(options.stop)), seed)
            for lr in options.lr
            for seed in options.seeds
        ]

    def prepare(self, options):
        if options.lr == [13.0]:
            raise ValueError("lr: expected no 13, got 13")
        return not options.only_prepare

    def follow_up(self, finished: list[Finished[ToySettings]], options):
        best = min(finished, key=lambda one: one.record["final"]["loss"])
        return [Run("best", best.run.settings, 99)] if options.again else []

    def execute(self, settings, seed, files, report):
        if settings.lr == 7.0:
            raise RuntimeError("lr of 7")
        torch.manual_seed(seed)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.5)
        history: dict[str, list[float]] = {"loss": []}
        parts = {"model": model, "optimizer": optimizer}
        for epoch in files.epochs(settings.epochs, seed, history, parts):
            if settings.stop[0] and epoch == settings.stop[1]:
                os.kill(os.getpid(), settings.stop[0])
            optimizer.zero_grad()
            loss = (model(torch.randn(8, 1)) ** 2).mean()
            loss.backward()
            optimizer.step()
            history["loss"].append(loss.item())
            report(epoch + 1, settings.epochs, f"loss {loss.item():.3g}")
        return Outcome({"final": {"loss": history["loss"][-1]}, "history": history})

    def present(self, finished, folder, options):
        rows = [(one.run.label, one.run.seed, one.record["final"]["loss"]) for one in finished]
        return Summary(
            claims=[Claim("losses are numbers", True, f"{len(rows)} of them")],
            tables=[Table("losses", ("run", "seed", "loss"), rows)],
        )


main = Toy().main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    from studies import records

    records.CHECKPOINT_SECONDS, records.CHECKPOINT_SHARE = 0.0, float("inf")
    sys.exit(main(sys.argv[1:]))
