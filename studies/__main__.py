"""The command line: ``python -m studies COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

# command -> (module and its function(arguments, prog) -> exit status, what it does)
COMMANDS = {
    "spirals": (
        "studies.spirals.cli:main",
        "the paper's synthetic memorization study: spirals with shortcuts",
    ),
    "correlation": (
        "studies.correlation:main",
        "what is left in the gradient, of the mechanism and of the shortcut",
    ),
    "linear": (
        "studies.linear:main",
        "the authors' linear regression, and the linear unit tests",
    ),
    "landscape": (
        "studies.landscape.cli:main",
        "loss surfaces, where rules lead on them, the patchwork solution",
    ),
    "label-noise": (
        "studies.label_noise.study:main",
        "random and noisy labels: every example is an environment",
    ),
    "threshold": (
        "studies.threshold:main",
        "a threshold that sets itself: false discovery rate and significance beside tau",
    ),
    "coinrun": (
        "studies.coinrun:main",
        "behavioural cloning on CoinRun levels, played on unseen ones",
    ),
    "report": (
        "studies.report:main",
        "one page of all that studies left in a folder",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: 0, 1 (a package is missing), 2 (wrong arguments) or 130 (interrupted).

    A command's module is imported only when it is asked for, and so are the packages it needs.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m studies",
        usage="%(prog)s [-h] COMMAND ...",
        description="The experiments of the paper, with gradients that all environments agree on.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
        + "\n\n'%(prog)s COMMAND --help' says more about one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help()
        return 0
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
        remedy = (
            f"the package {package!r}: run `pip install --no-build-isolation '.[studies]'` "
            "in the clone"
        )
        if {"-h", "--help"} & set(chosen.arguments):
            print(f"{prog}: {COMMANDS[chosen.command][1]}")
            print(f"To show its options, it needs {remedy}")
            return 0
        print(f"{prog}: needs {remedy}", file=sys.stderr)
        return 1
    return run(chosen.arguments, prog)


if __name__ == "__main__":
    sys.exit(main())
