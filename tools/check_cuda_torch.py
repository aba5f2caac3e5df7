"""Proves that the CUDA library loads where torch has CUDA, without a GPU, and its ops are known.

python tools/check_cuda_torch.py        # in an environment with a CUDA torch and andmask_ext
"""

from __future__ import annotations

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import andmask_ext as am

OPS = [
    "masked_mean", "agreement_mask", "_aggregate", "_accumulate_", "_accumulate_outer_",
    "_accumulate_convolution_", "_resolve", "_resolve_", "_squared_norm", "_sgd_step_",
    "_adam_step_", "_temporal_adam_step_",
]  # fmt: skip


def main() -> None:
    info = am.build_info()
    print(
        f"torch {info['torch']}, library built with {info['libtorch_built']}, CUDA {info['cuda']}"
    )
    if torch.version.cuda is None:
        sys.exit("expected a torch with CUDA")
    missing = [
        op
        for op in OPS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"andmask::{op}", "CUDA")
    ]
    if missing or "not " in str(info["cuda"]):
        sys.exit(f"no CUDA kernels of {', '.join(missing) or 'any op'}: {info['cuda']}")
    print(f"CUDA kernels of {len(OPS)} ops are registered; a GPU is "
          f"{'there' if torch.cuda.is_available() else 'not there'}")  # fmt: skip

    ops = torch.ops.andmask
    with FakeTensorMode():  # tensors "on cuda" without a GPU
        grads = torch.empty(4, 5, 6, device="cuda", dtype=torch.bfloat16)
        for found in (
            ops.masked_mean(grads, 0.5, True),
            ops._aggregate(grads, "median", []),
            ops._resolve([grads.float()], *[[]] * 4, 2, "mean", [])[0],
        ):
            assert found.device == grads.device, found.device
        assert ops.agreement_mask(grads).dtype == torch.float32
        total = torch.empty(5, 6, device="cuda")
        ops._accumulate_([total], [total.to(torch.int8)], [], [], [], [total], 0)
        graph = make_fx(lambda grads: ops.masked_mean(grads, 0.5) * 2)(grads)
        assert any("andmask" in str(node.target) for node in graph.graph.nodes)
    print("fake tensors on cuda: right devices, shapes and dtypes; traced")

    grads = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.masked_mean.default, (grads, 0.5, True))
    torch.library.opcheck(ops.agreement_mask.default, (grads.detach(), 0.5))
    torch.library.opcheck(ops._aggregate.default, (grads.detach(), "median", []))
    print("opcheck: passed" + (", on the CPU" if not torch.cuda.is_available() else ""))
    if torch.cuda.is_available():
        torch.library.opcheck(ops.masked_mean.default, (grads.detach().cuda(), 0.5, True))


if __name__ == "__main__":
    main()
