"""How long `smedjan --help` takes on a machine that does nothing else: the median of some starts, at most 0.3 s.

    python bench/startup.py [--runs 11]

The exit code is 1 where it takes longer. `tests/test_layers.py` holds what is imported, on any machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

MOST_S = 0.3


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], capture_output=True, check=True)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    found = {
        name: [seconds(*command) for _ in range(runs)]
        for name, command in {"python": ("-c", "pass"), "smedjan --help": ("-m", "smedjan", "--help")}.items()
    }
    for name, taken in found.items():
        print(f"{name:15} {median(taken):.3f} s, {min(taken):.3f} to {max(taken):.3f} s in {runs} runs")
    return int(median(found["smedjan --help"]) > MOST_S)


if __name__ == "__main__":
    sys.exit(main())
