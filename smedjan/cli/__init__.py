"""The command line, `smedjan VERB ...`: one short file a verb, each of which parses, calls and returns an Outcome."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 the input is wrong, 1 a defect of ours, 130 interrupted."""
    from smedjan.cli.app import run

    sys.exit(run(sys.argv[1:]))
