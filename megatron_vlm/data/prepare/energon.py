"""energon's own prepare command, run on finished shards."""

from __future__ import annotations

import contextlib
import io
import os
import shutil

from megatron_vlm.data.prepare.plan import SPLITS
from megatron_vlm.system.processes import die_with_parent


def energon_prepare(dataset: str, workers: int) -> None:
    """Index a folder's shards and write its ``.nv-meta``, split by the shards' names.

    To be called in a process of its own, for it changes that: what energon forks ends with it.

    Raises:
        RuntimeError: energon gives up.
    """
    import click
    from megatron.energon.tools.prepare import command

    parent = os.getpid()
    os.register_at_fork(after_in_child=lambda: die_with_parent(parent))
    names = [name for name in os.listdir(dataset) if name.endswith(".tar")]
    _clear(dataset)
    arguments = ["--non-interactive", "--force-overwrite", "--no-progress", "--num-workers", str(workers)]
    arguments += ["--sample-type", "CrudeWebdataset"]
    for split in SPLITS:
        if any(name.startswith(f"{split}-") for name in names):
            arguments += ["--split-parts", f"{split}:{split}-.*"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            command.main([*arguments, dataset], standalone_mode=False)
    except (click.ClickException, SystemExit) as error:
        last = (said.getvalue().strip().splitlines() or [str(error)])[-1]
        raise RuntimeError(f"energon prepare failed on {dataset}: {last}") from error


def _clear(dataset: str) -> None:
    """Remove the remains of a killed energon: half a ``.nv-meta``, which it would stumble over, and
    temporary files of any name."""
    for entry in list(os.scandir(dataset)):
        if entry.is_dir():
            shutil.rmtree(entry.path)
        elif not entry.name.endswith((".tar", ".jsonl")):
            os.unlink(entry.path)
