#!/usr/bin/env bash
# Runs tests with the instructions of other processors. torch's own kernels, those of MKL (matrix
# products) and those of oneDNN (convolutions, recurrent layers) choose instructions by the
# processor, and each choice rounds in another order: no test may hang on that.
#
#   tools/check_processors.sh tests/agreement -k attention    # arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# MKL knows one path for processors that are not Intel's; this opens the others.
echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' |
  "${CC:-cc}" -shared -fPIC -x c -o "$work/intel.so" -
intel=LD_PRELOAD=$work/intel.so

tests=("$@")
failed=""
check() {
  echo "== $* =="
  env "$@" "$python" -m pytest -q "${tests[@]}" || failed+="$*"$'\n'
}
check "$intel" ATEN_CPU_CAPABILITY=default MKL_CBWR=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41
check "$intel" ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
check "$intel" ONEDNN_MAX_CPU_ISA=AVX512_CORE
check MKL_CBWR=COMPATIBLE

if [[ $failed ]]; then
  printf 'check_processors: tests failed with\n%s' "$failed" >&2
  exit 1
fi
