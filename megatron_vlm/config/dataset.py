"""How a folder of shards becomes a dataset: what messages tell users to run."""

from __future__ import annotations

import json
import shlex

FIELD_MAP = {"image": "jpg", "context": "json[question]", "answers": "txt"}


def prepare_command(path: str, ratio: str = "9,1,0") -> str:
    """The command that prepares a folder of shards without asking, quoted for a shell.

    Args:
        ratio: shards for training, validation and test.
    """
    command = ["energon", "prepare", "--non-interactive", "--force-overwrite", "--split-ratio", ratio]
    command += ["--sample-type", "VQASample", "--field-map", json.dumps(FIELD_MAP, separators=(",", ":"))]
    return shlex.join([*command, path])
