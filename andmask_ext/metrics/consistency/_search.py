"""Constrained ascent: move one loss as far as possible while another stays within eps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._problem import Problem, draw_normal
from ._result import Inconsistency, best_pair, result

DENSE_LIMIT = 2000  # the largest number of parameters for scaling by the dense Hessian
FLATTEST = 1e-6  # scaling treats curvatures below this share of the largest alike
BENT, POWER_ROUNDS = 32, 5  # with many parameters: scaled directions, and power iterations
TARGET = 0.999  # a step out of the level set is drawn back to this share of eps
RISING = 1.02  # growth over the second half of the steps that is reported
PATIENCE = 30  # steps without progress after which the search ends
# Exploration ends within some hundred widths of the level set at params. Farther out, along
# directions in which all losses are flat, it would find rounding errors.
RAY_STEPS, ROAMING, STRIDE = 28, 40, 3.0

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Settings:
    """The budget and the options of a search."""

    starts: int
    steps: int
    checks: int
    generator: torch.Generator | None
    progress: Progress | None


class Scale:
    """A linear map to the parameters, such that the kept loss is about equally curved everywhere.

    With many parameters, only the directions of largest curvature are scaled separately.
    """

    def __init__(self, problem: Problem, environment: int, generator: torch.Generator | None):
        many = problem.size > DENSE_LIMIT
        find = _most_bent if many else _all_bent
        curvature, basis = find(problem, environment, generator)
        widths = curvature.abs()
        widths = widths.clamp(min=FLATTEST * float(widths.max())).rsqrt()
        if not bool(widths.isfinite().all()):  # the curvature is zero or not finite
            widths, basis = torch.ones_like(widths), torch.zeros_like(basis).fill_diagonal_(1.0)
        self.rest = float(widths.max()) if many else 0.0
        self.basis = basis.to(problem.point)
        self.widths = widths.to(problem.point)

    def __call__(self, directions: Tensor) -> Tensor:
        """Map scaled directions ``[m, n]`` to steps, and gradients to scaled ones."""
        return self._apply(directions, self.widths, self.rest)

    def inverse(self, directions: Tensor) -> Tensor:
        """Map steps ``[m, n]`` to scaled directions, and scaled gradients to gradients."""
        return self._apply(directions, 1 / self.widths, 1 / self.rest if self.rest else 0.0)

    def _apply(self, directions: Tensor, widths: Tensor, rest: float) -> Tensor:
        scaled = torch.matmul(directions @ self.basis * (widths - rest), self.basis.mT)
        return scaled + rest * directions if rest else scaled


def _all_bent(problem: Problem, environment: int, _: object) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues and eigenvectors of the Hessian, NaN if it is not finite."""
    hessian = problem.hessian(environment)
    if not bool(hessian.isfinite().all()):
        return hessian.new_full((problem.size,), torch.nan), hessian
    curvature, basis = torch.linalg.eigh(hessian)
    return curvature, basis


def _most_bent(
    problem: Problem, environment: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return approximate largest eigenvalues (Ritz values) and eigenvectors of the Hessian."""
    block = draw_normal(problem, BENT, generator)
    for _ in range(POWER_ROUNDS):
        basis = torch.linalg.qr(block.mT)[0]
        block = problem.products(environment, basis.mT.contiguous())
        if not bool(block.isfinite().all()):
            return block.new_full((BENT,), torch.nan), basis
    inner = block @ basis
    curvature, mix = torch.linalg.eigh((inner + inner.mT) / 2)
    return curvature, basis @ mix


@dataclass
class Climb:
    """The paths for one kept environment, one row for each moved environment and start.

    A straight segment joins every accepted point to the one before. On it the kept loss is within
    eps at ``checks`` evenly spaced points.
    """

    problem: Problem
    kept: int
    eps: float
    settings: Settings
    scale: Scale
    points: Tensor = field(init=False)
    level: Tensor = field(init=False)
    level_slope: Tensor = field(init=False)
    height: Tensor = field(init=False)
    height_slope: Tensor = field(init=False)
    best: Tensor = field(init=False)
    best_points: Tensor = field(init=False)
    half_way: Tensor | None = field(init=False, default=None)  # the best after half of the steps

    def __post_init__(self) -> None:
        problem, starts = self.problem, self.settings.starts
        self.targets = [e for e in range(problem.environments) if e != self.kept]
        rows = len(self.targets) * starts
        self.points = problem.point.expand(rows, -1).clone()
        # Most starts push the loss up, every fourth down.
        down = torch.arange(rows, device=problem.point.device) % starts % 4 == 2
        self.push = torch.where(down, -1.0, 1.0).to(problem.point.dtype)
        # Every other start roams first: it goes far in a random direction, and climbs from there.
        self.roams = torch.arange(rows, device=problem.point.device) % starts % 2 == 1
        heading = draw_normal(problem, rows, self.settings.generator).view(-1, starts, problem.size)
        opposite = heading[:, 3::4]
        opposite.copy_(-heading[:, 1::4][:, : opposite.shape[1]])  # roam in opposite directions
        self.compass = self.scale.inverse(heading.flatten(0, 1))
        self.level, self.level_slope, self.height, self.height_slope = self.look(self.points)
        self.best, self.best_points = self.height.abs(), self.points.clone()

    def look(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return change and gradient of the kept loss, then of the moved loss, at the points."""
        start = self.problem.start[self.kept]
        level, level_slope = self.problem.gradients(self.kept, points)
        groups = points.chunk(len(self.targets))
        moved = [self.problem.gradients(e, g) for e, g in zip(self.targets, groups, strict=True)]
        height = torch.cat([value for value, _ in moved])
        return level - start, level_slope, height - start, torch.cat([slope for _, slope in moved])

    def stays(self, ends: Tensor) -> Tensor:
        """Return whether the kept loss is within eps all along the segments to ``ends``."""
        checks = self.settings.checks
        shares = torch.arange(1, checks + 1, device=ends.device, dtype=ends.dtype) / checks
        between = torch.lerp(self.points[:, None], ends[:, None], shares[:, None])
        between[:, -1] = ends
        levels = self.problem.values(self.kept, between.flatten(0, 1)).view(-1, checks)
        return ((levels - self.problem.start[self.kept]).abs() <= self.eps).all(1)

    def move(self, ends: Tensor, roams: Tensor, wanted: Tensor) -> Tensor:
        """Go to those ``ends`` that can be reached inside the level set. Return which.

        Rows that roam also need ``wanted``. Other rows must climb.
        """
        reached = self.stays(ends)
        level, level_slope, height, height_slope = self.look(ends)
        reached &= height.isfinite() & height_slope.isfinite().all(1)
        reached &= level_slope.isfinite().all(1)
        reached &= torch.where(roams, wanted, self.push * height >= self.push * self.height)
        moved = reached[:, None]
        self.points = torch.where(moved, ends, self.points)
        self.level = torch.where(reached, level, self.level)
        self.level_slope = torch.where(moved, level_slope, self.level_slope)
        self.height = torch.where(reached, height, self.height)
        self.height_slope = torch.where(moved, height_slope, self.height_slope)
        better = self.height.abs() > self.best
        self.best = torch.where(better, self.height.abs(), self.best)
        self.best_points = torch.where(better[:, None], self.points, self.best_points)
        return reached

    def rays(self) -> None:
        """Leave the start along random rays: rows that roam go to the edge, others a little."""
        rows = len(self.points)
        directions = draw_normal(self.problem, rows, self.settings.generator)
        directions = self.scale(directions / directions.norm(dim=1, keepdim=True))
        step = torch.full_like(self.level, 1e-3 * math.sqrt(2 * self.eps))
        going = torch.ones_like(step, dtype=torch.bool)
        everywhere = torch.ones_like(self.roams)
        for _ in range(RAY_STEPS):
            ends = torch.where(
                going[:, None], self.points + step[:, None] * directions, self.points
            )
            going &= self.move(ends, everywhere, everywhere) & self.roams
            if not bool(going.any()):
                return
            step = step * 1.5

    def step(self, length: Tensor, roaming: bool) -> Tensor:
        """Take one step up, whose length is in scaled directions. Return which rows moved.

        While ``roaming``, rows that roam follow their compass instead.
        """
        roams = self.roams & roaming
        uphill = self.push[:, None] * self.height_slope
        uphill = self.scale(torch.where(roams[:, None], self.compass, uphill))
        wall = self.scale(self.level_slope)
        lost = uphill.norm(dim=1, keepdim=True) == 0
        if bool(lost.any()):
            noise = draw_normal(self.problem, len(uphill), self.settings.generator)
            uphill = torch.where(lost, noise, uphill)
        # Near the edge of the level set, the direction turns parallel to it.
        tiny = torch.finfo(wall.dtype).tiny
        steep = wall.square().sum(1, keepdim=True).clamp(min=tiny)
        over = (uphill * wall).sum(1, keepdim=True)
        used = self.level[:, None].abs() / (TARGET * self.eps)
        share = torch.where(over * self.level[:, None] > 0, (2 * used - 1).clamp(0, 1), 0.0)
        direction = uphill - share * over / steep * wall
        direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=tiny)
        ends = self.points + self.scale(direction * length[:, None])
        ends = self.draw_back(ends)
        farther = ((ends - self.points) * self.compass).sum(1) >= 0
        return self.move(ends, roams, farther)

    def draw_back(self, ends: Tensor) -> Tensor:
        """Draw ends outside the level set back to its edge by a Newton step."""
        level, slope = self.problem.gradients(self.kept, ends)
        level = level - self.problem.start[self.kept]
        slope = self.scale(slope)
        edge = TARGET * self.eps
        excess = (level - level.clamp(-edge, edge))[:, None]
        share = excess / slope.square().sum(1, keepdim=True)
        drawn = ends - self.scale(share * slope)
        return torch.where((excess != 0) & drawn.isfinite().all(1, keepdim=True), drawn, ends)


def climb(
    problem: Problem, kept: int, eps: float, settings: Settings, done: int
) -> tuple[Climb, bool]:
    """Run the paths of one kept environment. Return them, and whether progress stopped them."""
    total = settings.steps * problem.environments
    paths = Climb(problem, kept, eps, settings, Scale(problem, kept, settings.generator))
    paths.rays()
    first = torch.full_like(paths.level, 0.1 * math.sqrt(2 * eps))
    record, last, length = paths.best.clone(), 0, first
    roaming = min(ROAMING, settings.steps // 4)
    for index in range(settings.steps):
        if index == settings.steps // 2:
            paths.half_way = paths.best.clone()
        if settings.progress is not None and settings.progress(done + index, total):
            return paths, True
        if index == roaming:
            length = first
        gained = paths.step(length, index < roaming)
        length = torch.where(gained, length * 1.5, length * 0.5)
        if index < roaming:
            length = length.clamp(max=STRIDE * math.sqrt(2 * eps))
        progressed = paths.best > record * (1 + 1e-6)
        if bool(progressed.any()):
            record, last = torch.where(progressed, paths.best, record), index
        elif index - max(last, roaming) >= PATIENCE:
            break
    return paths, False


def search(
    problem: Problem, eps: float, settings: Settings, notes: tuple[str, ...] = ()
) -> Inconsistency:
    """Search all pairs. The score is a lower bound, attained at the witness."""
    count = problem.environments
    values = torch.full((count, count), math.nan, dtype=torch.float64, device="cpu")
    witnesses = {}
    half_way = torch.full_like(values, math.inf)
    stop: tuple[str, ...] = ()
    for kept in range(count):
        paths, stopped = climb(problem, kept, eps, settings, kept * settings.steps)
        bests = paths.best.view(count - 1, -1).to("cpu", torch.float64)
        for row, moved in enumerate(paths.targets):
            place = int(bests[row].argmax())
            values[kept, moved] = bests[row, place]
            if paths.half_way is not None:
                half_way[kept, moved] = paths.half_way.view(count - 1, -1)[row].max().cpu()
            witnesses[kept, moved] = paths.best_points[row * settings.starts + place]
        if stopped:
            stop = (f"stopped by progress while losses[{kept}] was kept",)
            break
    pair = best_pair(values)
    if not stop and float(values[pair]) > RISING * float(half_way[pair]):
        stop = (
            f"still rising when the {settings.steps} steps ran out, from {half_way[pair]:.3g} half "
            "way: more steps find more",
        )
    witness = witnesses[pair]
    step = witness - problem.point
    length = step.norm()
    return result(
        problem,
        eps,
        values,
        "search",
        "lower bound",
        witness=witness,
        direction=torch.where(length > 0, step / length, step),
        notes=notes + stop,
    )
