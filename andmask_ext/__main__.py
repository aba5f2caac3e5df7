"""The command line: ``python -m andmask_ext COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

# command -> (module and its function(arguments, prog) -> exit status, what it does)
COMMANDS = {
    "info": (
        "andmask_ext.__main__:info",
        "print versions, compiler, instruction set and threads",
    ),
    "spirals": (
        "andmask_ext.studies.spirals.cli:main",
        "the paper's synthetic memorization study: spirals with shortcuts",
    ),
    "correlation": (
        "andmask_ext.studies.correlation:main",
        "what is left in the gradient, of the mechanism and of the shortcut",
    ),
    "linear": (
        "andmask_ext.studies.linear:main",
        "the authors' linear regression, and the linear unit tests",
    ),
    "landscape": (
        "andmask_ext.studies.landscape.cli:main",
        "loss surfaces, where rules lead on them, the patchwork solution",
    ),
    "label-noise": (
        "andmask_ext.studies.label_noise.study:main",
        "random and noisy labels: every example is an environment",
    ),
    "coinrun": (
        "andmask_ext.studies.coinrun:main",
        "behavioural cloning on CoinRun levels, played on unseen ones",
    ),
    "benchmark": (
        "andmask_ext.studies.benchmark.cli:main",
        "time and memory of a training step, beside other libraries",
    ),
    "report": (
        "andmask_ext.studies.report:main",
        "one page of all that studies left in a folder",
    ),
}


def info(arguments: Sequence[str], prog: str) -> int:
    """Print what the native library was built with and what it uses.

    Args:
        arguments: what follows the command; only ``--help``.
        prog: how the command was called.

    Returns:
        The exit status.
    """
    argparse.ArgumentParser(prog=prog, description=COMMANDS["info"][1]).parse_args(arguments)
    from andmask_ext import build_info

    facts = build_info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    A command's module is imported only when it is asked for, and so are the packages it needs.

    Args:
        arguments: the command and what follows it; from the command line when None.

    Returns:
        The exit status: 0, 1 (a package is missing), 2 (wrong arguments) or 130 (interrupted).
    """
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m andmask_ext",
        usage="%(prog)s [-h] COMMAND ...",
        description="Gradients that all environments agree on, and experiments with them.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
        + "\n\n'%(prog)s COMMAND --help' says more about one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    prog = f"{parser.prog} {chosen.command}"
    module, _, function = COMMANDS[chosen.command][0].partition(":")
    try:
        run: Callable[[Sequence[str], str], int] = getattr(import_module(module), function)
    except ImportError as error:
        # andmask_ext.plots says the same in a sentence of its own.
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        package = (getattr(missing, "name", None) or "").partition(".")[0]
        if not isinstance(missing, ModuleNotFoundError) or package in ("", "andmask_ext"):
            raise
        print(
            f"{prog}: needs the package {package!r}: pip install andmask_ext[studies]",
            file=sys.stderr,
        )
        return 1
    return run(chosen.arguments, prog)


if __name__ == "__main__":
    sys.exit(main())
