"""Prints, for each algorithm, the largest error against its paper's formula in float64, as a Markdown table.

    python benchmarks/algorithm_errors.py [--batches 500]

The checks are those of `tests/algorithms`: random ragged batches with groups of one, equal rewards, fully masked
sequences and ungraded samples; errors are relative where the reference is above 1.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "algorithms"))

from algorithm_checks import CHECKS, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=500, help="random batches for each algorithm")
    batches = parser.parse_args().batches
    print(f"Largest error over {batches} random batches (float64)\n")
    print("| kind | algorithm | settings | value | gradient |")
    print("|---|---|---|---|---|")
    for check in CHECKS:
        errors = worst(check, range(batches))
        gradient = "" if errors.gradient is None else f"{errors.gradient:.1e}"
        print(f"| {check.kind} | {check.name} | {check.variant} | {errors.value:.1e} | {gradient} |")


if __name__ == "__main__":
    main()
