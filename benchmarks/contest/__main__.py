"""The command line: ``python -m benchmarks.contest``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python -m benchmarks.contest"))
