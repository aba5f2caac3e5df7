"""What a device reaches at most: copies of memory, and multiply-adds. Measured, not looked up."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

LOOP = r"""
#include <chrono>
#include <thread>
#include <vector>
typedef float Vector __attribute__((vector_size(64)));
static float work(long turns) {
  Vector sums[16], factor, term;
  for (int i = 0; i < 16; ++i) factor[i] = .999f, term[i] = .001f * i;
  for (auto& sum : sums) sum = term;
  for (long turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 16
    for (auto& sum : sums) sum = sum * factor + term;
  }
  float total = 0;
  for (auto& sum : sums) total += sum[0];
  return total;
}
extern "C" double multiply_adds(int threads) {
  const long turns = 20000000;
  double best = 0;
  for (int round = 0; round < 3; ++round) {
    std::vector<float> results(threads);
    std::vector<std::thread> all;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < threads; ++i) all.emplace_back([&, i] { results[i] = work(turns); });
    for (auto& one : all) one.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    const double rate = 16.0 * 16 * turns * threads / took.count();
    if (rate > best) best = rate;
  }
  return best;
}
"""


def copied_bytes(device: torch.device, size: int) -> float:
    """Return the bytes that ``copy_`` of ``size`` bytes reads and writes in a second."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timer = Timer(
        "target.copy_(source)",
        globals={"target": target, "source": source},
        num_threads=torch.get_num_threads(),
    )
    timer.timeit(2)
    return 2 * size / min(timer.timeit(3).median for _ in range(5))


def multiply_adds(device: torch.device) -> float:
    """Return the float32 multiply-adds of a second; of a GPU those of ``torch.mm``."""
    if device.type == "cpu":
        return _of_cpu(torch.get_num_threads())
    size = 8192
    a, b = torch.randn(2, size, size, device=device)
    timer = Timer("torch.mm(a, b)", globals={"torch": torch, "a": a, "b": b})
    timer.timeit(2)
    return size**3 / min(timer.timeit(3).median for _ in range(3))


def _of_cpu(threads: int) -> float:
    """Return the rate of a loop of nothing but independent multiply-adds in registers."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(LOOP)
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        options += ["-std=c++17", "-Wno-psabi", "-o", str(library), str(source)]
        subprocess.run([*compiler, *options], check=True)
        function = ctypes.CDLL(str(library)).multiply_adds
        function.restype = ctypes.c_double
        return float(function(threads))


if __name__ == "__main__":
    cpu = torch.device("cpu")
    print(f"copy           {copied_bytes(cpu, 1 << 28) / 1e9:8.1f} GB/s")
    print(f"multiply-adds  {multiply_adds(cpu) / 1e9:8.1f} G/s")
