"""What ``make gpu-check`` runs, each part in a process of its own; see benchmarks/gpu_check.py.

Every part takes ``--result FILE``, where it writes what it has found as JSON, and ``--tiny``: sizes that a
CPU does in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def parser(text: str) -> argparse.ArgumentParser:
    """With what every part takes."""
    found = argparse.ArgumentParser(description=text)
    found.add_argument("--result", type=Path, required=True, help="JSON file to write")
    found.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """The file is there whole or not at all, whenever this process is killed."""
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(staged, path)
