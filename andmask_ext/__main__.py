"""The command line: ``python -m andmask_ext info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ._library import build_info


def main(arguments: Sequence[str] | None = None) -> int:
    """Print build and run-time information of the native library. Without a command, print help.

    Args:
        arguments: the arguments of the command line; None: those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m andmask_ext",
        description="Gradients that all environments agree on: the AND-mask for PyTorch.",
    )
    parser.add_argument(
        "command",
        choices=["info"],
        nargs="?",
        help="print versions, compiler, instruction set and threads",
    )
    if parser.parse_args(arguments).command is None:
        parser.print_help()
        return 0
    facts = build_info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
