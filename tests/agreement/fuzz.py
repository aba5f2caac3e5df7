"""Many random networks by hand: ``python -m tests.agreement.fuzz --count 5000 --first 0``.

Each seed is a network of :mod:`networks`, in a fifth of which environments mix. What is wrong,
crashes, or mixes and is not refused is printed with its seed; the causes of refusals are counted.
Run one seed again with ``--first SEED --count 1 --verbose``.
"""

from __future__ import annotations

import argparse
import traceback
import warnings
from collections import Counter

from .moves import MIXERS
from .networks import draw, judge
from .outcomes import EXACT

MOST_REFUSED = 0.02


def run(seed: int, verbose: bool = False) -> tuple[str, bool]:
    """Return what became of the network of a seed, and whether its environments mix."""
    mixers = sorted(MIXERS)
    mixer = mixers[seed // 5 % len(mixers)] if seed % 5 == 4 else None
    try:
        result = judge(seed, mixer=mixer)
    except AssertionError as error:
        result = f"WRONG: {str(error).splitlines()[0]}"
    except Exception as error:
        result = f"CRASH: {type(error).__name__}: {str(error).splitlines()[0]}"
        if verbose:
            traceback.print_exc()
    if mixer and result == EXACT:
        result = "WRONG: environments mix and nothing is said"
    bad = result.startswith(("WRONG", "CRASH"))
    if verbose or bad or (result != EXACT and not mixer):
        print(f"seed {seed}: {result}")
        if verbose or bad:
            print("    " + "\n    ".join(draw(seed, mixer=mixer).says))
    return result, mixer is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for seed in range(options.first, options.first + options.count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, mixes = run(seed, options.verbose)
        counts[mixes][result.split(":")[0] if result.startswith("WRONG") else result] += 1
        if seed % 100 == 99:
            print(f"... up to seed {seed}", flush=True)
    for mixes, words in ((False, "clean"), (True, "that mix")):
        print(f"{counts[mixes].total()} networks {words}:")
        for result, count in counts[mixes].most_common():
            print(f"  {count:6d}  {result}")
    bad = sum(n for one in counts.values() for r, n in one.items() if r[:5] in ("WRONG", "CRASH"))
    refused = counts[False].total() - counts[False][EXACT] - bad
    if bad or refused > MOST_REFUSED * max(1, counts[False].total()):
        raise SystemExit(f"{bad} wrong, {refused} clean ones refused")


if __name__ == "__main__":
    main()
