"""andmask_ext.backward against the d plain backward passes it contains, and the authors' loop.

python benchmarks/bench_backward.py --quick
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Row, measure, parser, peak_memory, run
from torch import Tensor, nn

import andmask_ext as am

RULE = am.AndMask(tau=0.6, rescale=True)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def contestants(width: int, environments: int, batch: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = mlp(width)
    params = list(model.parameters())
    data = [
        (torch.randn(batch, width), torch.randint(0, 10, (batch,))) for _ in range(environments)
    ]

    def losses() -> list[Tensor]:
        return [F.cross_entropy(model(x), y) for x, y in data]

    def ours() -> None:
        model.zero_grad()
        am.backward(losses(), RULE, params)

    def plain() -> None:
        model.zero_grad()
        for loss in losses():
            loss.backward()

    def authors() -> None:
        model.zero_grad()
        columns = [torch.autograd.grad(loss, params) for loss in losses()]
        for param, grads in zip(params, zip(*columns, strict=True), strict=True):
            stacked = torch.stack(grads)
            mask = (stacked.sign().mean(0).abs() >= RULE.tau).to(stacked.dtype)
            param.grad = mask * stacked.mean(0) / (1e-10 + mask.mean())

    return {"andmask": ours, "authors' loop": authors, "d plain backward passes": plain}


def case(width: int, environments: int, batch: int) -> list[Row]:
    functions = contestants(width, environments, batch)
    parameters = sum(p.numel() for p in mlp(width).parameters())
    rows = measure(
        f"MLP {width}, {environments} x {batch}",
        functions,
        bytes_moved=4 * parameters * environments,
        yardstick="d plain backward passes",
    )
    for name, function in functions.items():
        print(f"  extra memory, {name}: {peak_memory(function) / 2**20:.1f} MiB")
    return rows


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    sizes = [(256, 32, 128), (1024, 8, 16), (1024, 8, 128), (1024, 64, 16)]
    if options.quick:
        sizes = sizes[:2]
    run(options, [lambda size=size: case(*size) for size in sizes])


if __name__ == "__main__":
    main()
