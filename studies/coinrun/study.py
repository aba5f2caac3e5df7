"""The study: search, final runs, play, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ..records import RunFiles
from ..study import Outcome, Report, Run, Study
from ..summary import Picture, Summary
from .data import VARIABLE, States, find_python, game_command, game_version, load, make
from .figures import draw_curves, draw_search, draw_sheet
from .network import CHANNELS_OF_A_GROUP
from .player import always, follow, greedy, play, sampled, uniform
from .results import (
    Done,
    best_trial,
    claims,
    constant_policy,
    length_of_training,
    loss_table,
    of,
    return_table,
    returns,
    search_table,
)
from .settings import FULL, METHODS, QUICK, REFERENCES, TRIAL_SEED, Size, trials
from .training import CoinRunSettings, at_its_best, load_model, some, train

SHEET_LEVELS = 3
OPTIONS = {
    "levels": "training levels",
    "states": "states of each training level, at most",
    "trials": "trials of each method's search",
    "epochs": "epochs of a trial; an epoch is a step on each training level",
    "final_epochs": "epochs of the final runs",
    "batch": "states of a step",
    "width": "channels of the network's first stage, a multiple of 8",
}


class CoinRun(Study[CoinRunSettings]):
    """Behavioural cloning on CoinRun levels, played on unseen ones."""

    name = "coinrun"
    title = "CoinRun: cloning an expert from 64 levels, and playing unseen ones"
    about = (
        "Behavioural cloning on real CoinRun levels. An expert by search solves them in an "
        "environment with procgen2; clones are trained on one level a step, by Adam and by the "
        "temporal AND-mask; settings come from an equal random search on validation levels; the "
        "clones then play levels that none of them has seen."
    )
    reference = "Parascandolo et al., ICLR 2021, section 4.3 and appendix B.6"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the study's options."""
        game = parser.add_argument_group("the game")
        game.add_argument(
            "--game-python",
            metavar="PATH",
            help=f"a Python with procgen2 (default: {VARIABLE}, or this Python if it has it)",
        )
        group = parser.add_argument_group("how much")
        for option, about in OPTIONS.items():
            default = (_get(FULL, option), _get(QUICK, option))
            group.add_argument(
                f"--{option.replace('_', '-')}",
                type=int,
                metavar="N",
                help=f"{about} (default: {default[0]}; --quick: {default[1]})",
            )

    def plan(self, options: argparse.Namespace) -> Sequence[Run[CoinRunSettings]]:
        """Return the trials of both methods, and the policies that learn nothing."""
        size = _size(options)
        common: dict[str, Any] = {
            "data": size.data.key,
            "file": size.data.file(options.output),
            "command": tuple(_command(options.game_python)),
        }
        runs = [
            Run(
                f"{method} trial {number}",
                CoinRunSettings(
                    "trial",
                    method,
                    epochs=size.epochs,
                    batch=size.batch,
                    width=size.width,
                    measure_every=size.epochs,
                    **common,
                    **values,
                ),
                TRIAL_SEED,
            )
            for number in range(size.trials)
            for method in METHODS
            for values in [trials(method, size.trials)[number]]
        ]
        return runs + [
            Run(policy, CoinRunSettings("reference", policy, **common), options.seeds[0])
            for policy in REFERENCES
        ]

    def prepare(self, options: argparse.Namespace) -> bool:
        """Make the data, unless they are there."""
        data = _size(options).data
        file = data.file(options.output)
        if not file.exists():
            make(data, file, _command(options.game_python))
        return True

    def follow_up(
        self, finished: Sequence[Done], options: argparse.Namespace
    ) -> Sequence[Run[CoinRunSettings]]:
        """Return the final runs: the best trial of each method, longer, with other seeds."""
        size = _size(options)
        return [
            Run(
                method,
                replace(
                    best_trial(finished, method).run.settings,
                    role="final",
                    epochs=size.final_epochs,
                    measure_every=max(1, size.final_epochs // 10),
                ),
                seed,
            )
            for seed in options.seeds
            for method in METHODS
        ]

    def execute(
        self, settings: CoinRunSettings, seed: int, files: RunFiles, report: Report
    ) -> Outcome:
        """Train a clone; let final ones, and the policies that learn nothing, play."""
        levels = {split: load(settings.file, split).levels for split in ("train", "test")}
        if settings.role == "reference":
            policy = uniform(seed) if settings.method == "random" else always(settings.method)
            parts = {split: (numbers, policy) for split, numbers in levels.items()}
            played = play(settings.command, parts, settings.limit)
            return Outcome(returns(played))
        model, history = train(settings, seed, files, report)
        final = {name: values[-1] for name, values in history.items() if name != "epoch"}
        results: dict[str, Any] = {"history": history, "levels": len(levels["train"])}
        if settings.role == "trial":
            return Outcome(results | {"final": final})
        parts = {split: (numbers, greedy(model)) for split, numbers in levels.items()}
        parts["test_sampled"] = (levels["test"], sampled(model, seed))
        played = play(settings.command, parts, settings.limit)
        final |= at_its_best(history)
        outcome = returns(played)
        return Outcome(results | outcome | {"final": final | outcome["final"]}, model.state_dict())

    def present(
        self, finished: Sequence[Done], folder: Path, options: argparse.Namespace
    ) -> Summary:
        """Compare loss on unseen levels, and returns."""
        size = _size(options)
        file = size.data.file(options.output)
        states, unseen = load(file, "train"), load(file, "test")
        final = {method: of(finished, "final", method) for method in METHODS}
        measured = some(states, len(load(file, "validation").frames))  # as in training
        constant = constant_policy(states, (measured, unseen))
        return Summary(
            claims=claims(finished, final, states, unseen, constant),
            tables=[
                loss_table(final, constant),
                return_table(finished, final, states, unseen),
                search_table(finished),
            ],
            pictures=[
                Picture(
                    draw_curves(final, constant, folder / "coinrun-curves.png"),
                    "Loss and accuracy on states of training levels (dashed) and of unseen levels "
                    "(solid); thin lines are seeds.",
                ),
                Picture(
                    draw_search(finished, final, unseen, folder / "coinrun-search.png"),
                    "Left: loss of every trial on validation levels; diamonds are the given first "
                    "trials, rings the chosen ones. Right: share of unseen levels in which the "
                    "coin was reached; points are seeds.",
                ),
                self._sheet(final, folder, unseen),
            ],
            notes=[
                "Sized for two cores: a ResNet-18 of a quarter of its width, "
                f"{len(states.frames)} states of {len(states.levels)} training levels, "
                f"{len(unseen.frames)} of {len(unseen.levels)} unseen ones, a search of "
                f"{size.trials} trials for each method.",
                "Settings were chosen by the loss on validation levels alone; unseen levels were "
                "met by final runs only.",
                length_of_training(final, len(states.frames)),
                "A difference between both methods counts where means differ by more than both "
                "standard deviations over seeds together; these do not show how much other levels "
                "would change.",
                f"Played with procgen2 {game_version(_command(options.game_python))}, as installed "
                "when this was written.",
            ],
        )

    def _sheet(self, final: Mapping[str, Sequence[Done]], folder: Path, states: States) -> Picture:
        levels = states.levels[:SHEET_LEVELS]
        settings = final["adam"][0].run.settings
        parts = {"expert": (levels, follow(states.plans))}
        for method, name in METHODS.items():
            one = final[method][0]
            model = load_model(one.run.settings, one.files.read_weights())
            parts[name] = (levels, greedy(model))
        shown = play(settings.command, parts, settings.limit, keep=True)
        path = draw_sheet(shown, levels, folder / "coinrun-play.png")
        return Picture(
            path,
            f"The first {len(levels)} unseen levels, played by the expert and by the clones of the "
            "first seed: frames at even distances from the start to the end, below them the number "
            "of decisions so far; at the left how it ended, and the return.",
        )


def _command(given: str | None) -> list[str]:
    return game_command(find_python(given))


def _get(size: Size, option: str) -> int:
    if option == "levels":
        return size.data.train.count
    if option == "states":
        return size.data.train.states
    number: int = getattr(size, option)
    return number


def _size(options: argparse.Namespace) -> Size:
    size = QUICK if options.quick else FULL
    given: dict[str, int] = {}
    for option in OPTIONS:
        number = getattr(options, option)
        if number is None:
            continue
        if number < 1:
            name = option.replace("_", "-")
            raise ValueError(f"{name}: expected at least 1, got {number}")
        given[option] = number
    if given.get("width", 8) % CHANNELS_OF_A_GROUP:
        raise ValueError(
            f"width: expected a multiple of {CHANNELS_OF_A_GROUP}, got {given['width']}"
        )
    levels, states = given.pop("levels", None), given.pop("states", None)
    train = size.data.train
    train = replace(train, count=levels or train.count, states=states or train.states)
    if train.first + train.count > size.data.validation.first:
        raise ValueError(f"levels: expected at most {size.data.validation.first}, got {levels}")
    return replace(size, data=replace(size.data, train=train), **given)
