#!/usr/bin/env bash
# Proves that the library meets no illegal instruction on an older processor: runs the kernel tests
# under QEMU's user emulation of processors without AVX, with AVX2, and with all there is. Needs
# qemu-x86_64 (Debian: qemu-user). The emulated `best_isa` must be used, and the tests must pass.
#
#   make build && tools/check_old_cpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(readlink -f .venv/bin/python)
export OPENBLAS_CORETYPE=Nehalem  # numpy's own library trips over some emulated processors
export PYTHONPATH=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
for cpu in Nehalem Haswell; do
  echo "== $cpu =="
  ANDMASK_HARNESS_DIR=andmask_ext qemu-x86_64 -cpu "$cpu" "$python" - <<'PYTHON'
import sys
sys.path.insert(0, ".")
from tests.native import harness
print("instruction sets:", *harness.load().isas())
PYTHON
  ANDMASK_HARNESS_DIR=andmask_ext qemu-x86_64 -cpu "$cpu" "$python" -m pytest -q \
    -p no:cacheprovider tests/native/test_masked_mean_kernels.py
done
