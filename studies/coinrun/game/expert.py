"""The expert: a search through a level, and the policy that follows from it."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from .world import ACTIONS, FRAMES, Array, Game, pose

FULL_SPEED = 0.5  # cells a frame
GREED = 1.5  # weight of progress until the coin is found; then 1
AT_ONCE = 8  # nodes expanded together
UNKNOWN, DEAD, COIN = -3, -1, -2  # in the place of a child


@dataclass(frozen=True)
class Search:
    """What decides the data of a level but its number."""

    mode: str = "hard"
    expansions: int = 700  # nodes to expand, at least; more until the coin is found
    most: int = 3000  # nodes after which the expert gives up
    temperature: float = 2.0  # of the expert's policy, in frames
    states: int = 400  # kept of a level, at most
    seed: int = 0


@dataclass
class Graph:
    """The states that a search found."""

    images: list[Array]
    spent: list[int]  # frames from the start
    origin: list[tuple[int, int]]  # node from which each was found first, and the action
    children: list[list[int]]  # for each action a node, or why there is none
    lasted: list[list[int]]  # for each action its frames, fewer than four where the level ended

    def plan(self, node: int) -> list[int]:
        """Return the actions that lead from the start to a node."""
        actions: list[int] = []
        while node:
            node, action = self.origin[node]
            actions.append(action)
        return actions[::-1]

    def best_plan(self) -> list[int] | None:
        """Return the actions of the fastest way to the coin, or None where none was found."""
        ends = [
            (self.spent[node] + self.lasted[node][action], node, action)
            for node, children in enumerate(self.children)
            for action, child in enumerate(children)
            if child == COIN
        ]
        if not ends:
            return None
        _, node, action = min(ends)
        return [*self.plan(node), action]

    def costs(self) -> Array:
        """Return the frames to the coin by node and first action, infinite where unknown."""
        children, lasted = np.array(self.children), np.array(self.lasted, float)
        ends = np.where(children == COIN, lasted, np.inf)
        left = np.full(len(children), np.inf)
        while True:
            costs: Array = np.where(children >= 0, lasted + left[np.maximum(children, 0)], ends)
            new = costs.min(1)
            if (new == left).all():
                return costs
            left = new


def search(game: Game, options: Search) -> Graph:
    """Explore a level; the game has ``AT_ONCE`` times as many copies as there are actions."""
    count = len(ACTIONS)
    unknown, none = [UNKNOWN] * count, [0] * count
    start = game.env.get_state()[0]
    graph = Graph([game.frames()[0].copy()], [0], [(-1, -1)], [unknown], [none])
    states, xs = {0: start}, [pose(start)[0]]
    known = {_cell(start): 0}
    greed, expanded, found = GREED, 0, False
    queue = [(0.0, 0)]
    while queue and expanded < (options.expansions if found else options.most):
        nodes = [heapq.heappop(queue)[1] for _ in range(min(AT_ONCE, len(queue)))]
        expanded += len(nodes)
        padded = nodes + nodes[:1] * (AT_ONCE - len(nodes))
        game.env.set_state([states[node] for node in padded for _ in range(count)])
        reward, done, lasted = game.act(np.tile(np.arange(count), AT_ONCE))
        after, images = game.env.get_state(), game.frames()
        for first, node in zip(range(0, len(after), count), nodes, strict=False):
            del states[node]
            graph.lasted[node] = lasted[first : first + count].tolist()
            graph.children[node] = children = []
            for action, place in enumerate(range(first, first + count)):
                if done[place]:
                    children.append(COIN if reward[place] > 0 else DEAD)
                    continue
                child = known.setdefault(_cell(after[place]), len(xs))
                children.append(child)
                if child == len(xs):
                    states[child] = after[place]
                    xs.append(pose(after[place])[0])
                    graph.images.append(images[place].copy())
                    graph.spent.append(graph.spent[node] + FRAMES)
                    graph.origin.append((node, action))
                    graph.children.append(unknown)
                    graph.lasted.append(none)
                    heapq.heappush(
                        queue, (graph.spent[child] - greed * xs[child] / FULL_SPEED, child)
                    )
        if not found and any(COIN in graph.children[node] for node in nodes):
            found, greed = True, 1.0
            queue = [(graph.spent[node] - xs[node] / FULL_SPEED, node) for _, node in queue]
            heapq.heapify(queue)
    return graph


def _cell(state: bytes) -> tuple[int, int, int, int]:
    x, y, vx, vy = pose(state)
    return round(2 * x), round(2 * y), round(4 * vx), round(2.5 * vy)


def policy(costs: Array, temperature: float) -> Array:
    """Return the expert's policy, given the frames to the coin by state and first action."""
    weights = np.exp((costs.min(1, keepdims=True) - costs) / temperature)
    shares: Array = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return shares
