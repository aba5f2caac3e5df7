#!/usr/bin/env bash
# Proves that one binary serves several releases of torch: builds a wheel with the torch in .venv,
# installs it beside another torch, and runs the tests of the installed package there.
#
#   make build && tools/check_torch.sh torch==2.14.1
set -euo pipefail

other=${1:?usage: tools/check_torch.sh torch==VERSION}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$root/.venv/bin/pip" wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" "$root"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "$other" numpy hypothesis pytest "$work"/andmask_ext-*.whl

# Outside the source tree, so that `import andmask_ext` finds the wheel. The kernel harness is not
# in a wheel; the kernels are tested through the ops.
mkdir -p "$work/tests/repo"
cp -r "$root"/tests/{__init__,conftest,models,strategies,test_backward,test_moments}.py \
  "$root"/tests/{rules,ops,optim} "$work/tests"
cp "$root"/tests/repo/{__init__,test_docstrings}.py "$work/tests/repo"
cp "$root/pyproject.toml" "$work"
cd "$work"
venv/bin/python - <<'PYTHON'
import andmask_ext
info = andmask_ext.build_info()
print(f"library built with torch {info['libtorch_built']}, running under torch {info['torch']}")
PYTHON
venv/bin/python -m pytest -q -o filterwarnings=default tests  # other releases warn of other things
