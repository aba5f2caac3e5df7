"""The package needs torch alone; extras are asked for where they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.no_device


@pytest.mark.parametrize("missing", ["numpy", "scipy", "pandas", "matplotlib", "tqdm"])
def test_import_without(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import andmask_ext.metrics"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
