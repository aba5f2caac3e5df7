#!/usr/bin/env bash
# Builds a source distribution and from that a wheel, installs it into a virtual environment of its
# own, and uses it outside the tree.
#
#   make build && tools/smoke_wheel.sh
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

(cd "$root" && .venv/bin/python setup.py --quiet sdist --dist-dir "$work")
"$root/.venv/bin/pip" wheel --quiet --no-build-isolation --no-deps \
  --wheel-dir "$work" "$work"/andmask_ext-*.tar.gz
wheel=$(echo "$work"/andmask_ext-*.whl)
case $wheel in *-py3-none-linux_*.whl) ;; *) echo "unexpected name: $wheel"; exit 1 ;; esac
strangers=$(python3 - "$wheel" <<'PYTHON'
import sys, zipfile

for name in zipfile.ZipFile(sys.argv[1]).namelist():
    if not name.startswith(("andmask_ext/", "andmask_ext-")) or "_harness" in name:
        print(name)
PYTHON
)
if [ -n "$strangers" ]; then
  echo "more than the library is in the wheel:" $strangers
  exit 1
fi

torch=$("$root/.venv/bin/python" -c 'import torch; print(torch.__version__.split("+")[0])')
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==$torch" "$wheel"
cd "$work"
venv/bin/python - <<'PYTHON'
import pathlib
import torch
import andmask_ext as am

assert "site-packages" in am.__file__, am.__file__
grads = torch.tensor([[1.0, -2.0, 3.0], [3.0, 4.0, 5.0]])
assert torch.ops.andmask.masked_mean(grads, 1.0).tolist() == [2.0, 0.0, 4.0]
weight = torch.ones(2, requires_grad=True)
am.backward([(weight * k).sum() for k in (1.0, 3.0)], am.AndMask(1.0))
assert weight.grad.tolist() == [2.0, 2.0]
assert am.metrics.vote_histogram(grads).counts.tolist() == [1, 0, 2]
losses = [lambda x: x.square().sum(), lambda x: 3 * x.square().sum()]
assert am.metrics.inconsistency_score(losses, torch.zeros(2), 0.1).bound == "exact"
PYTHON
venv/bin/andmask info
