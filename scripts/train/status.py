"""The progress of runs, from their folders alone: also while they train, wait in a queue, or were killed.

    python scripts/train/status.py runs/demo
    python scripts/train/status.py runs --json

Needs only the standard library of Python 3.9 or newer, and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import List

# ruff: noqa: E402 - the import below needs the second of these lines.
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.launch.progress import describe, find_runs, progress


def main(argv: List[str]) -> int:
    """Show the runs that ``argv`` names; returns the exit code, 2 if a folder or file is no run's."""
    parser = argparse.ArgumentParser(prog="status.py", description="Show where runs are.", allow_abbrev=False)
    parser.add_argument(
        "folders", nargs="+", metavar="folder", help="a run folder, or a --save-dir of several"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args(argv)
    code = 0
    for folder in args.folders:
        try:
            runs = find_runs(folder)
        except (ValueError, OSError) as error:
            code = tell(error)
            continue
        for run in runs:
            try:
                found = progress(run)
            except (ValueError, OSError) as error:
                code = tell(error)
                continue
            print(json.dumps(found) if args.json else describe(found), flush=True)
    return code


def tell(error: Exception) -> int:
    """Print what is wrong; returns the exit code."""
    what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    print(f"error: {what}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
