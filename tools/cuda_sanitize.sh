#!/usr/bin/env bash
# Runs the op tests on a GPU under NVIDIA's compute-sanitizer: memory errors, races in shared memory,
# misused barriers. PYTHON: the interpreter with andmask_ext, built with ANDMASK_CUDA=ON.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

if ! command -v compute-sanitizer >/dev/null; then
  echo "cuda_sanitize: needs compute-sanitizer, which comes with the CUDA toolkit, on PATH" >&2
  exit 1
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "cuda_sanitize: needs a GPU that torch can use, and found none" >&2
  exit 1
fi

tests=(tests/ops tests/test_cuda_device.py)
for tool in memcheck racecheck synccheck; do
  echo "== $tool =="
  # Torch's allocator hides what is read beyond a tensor: every tensor gets memory of its own.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    --target-processes all "$PYTHON" -m pytest -q -k 'cuda and not compile and not captured' "${tests[@]}"
done
