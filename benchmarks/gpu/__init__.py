"""The steps of ``make gpu-check``, each part in a process of its own; see benchmarks/gpu_check.py.

Every part takes ``--result FILE``, where it writes what it has found as JSON, and ``--tiny``: sizes that a
CPU does in seconds. It finds one thing after the other, and the file has all of them so far: where a part
fails, or is killed, what it had measured is there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def parser(text: str) -> argparse.ArgumentParser:
    """With what every part takes."""
    found = argparse.ArgumentParser(description=text)
    found.add_argument("--result", type=Path, required=True, help="JSON file to write")
    found.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    return found


def collect(findings: Iterable[dict[str, Any]], path: Path | None = None) -> dict[str, Any]:
    """Collect all findings in one object, which ``path`` has as soon as each is there."""
    found: dict[str, Any] = {}
    for finding in findings:
        found |= finding
        if path is not None:
            write(path, found)
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """The file is there whole or not at all, whenever this process is killed."""
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(staged, path)
