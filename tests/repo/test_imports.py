"""The package needs torch alone; extras are asked for where they are used."""

from __future__ import annotations

import subprocess
import sys

EXTRAS = ["numpy", "scipy", "pandas", "matplotlib", "tqdm"]


def test_import_without_extras() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); import andmask_ext.metrics"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
