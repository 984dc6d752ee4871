"""The target of a conversion: it may not write over its input, nor over files of another origin."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_vlm.artifacts.checkpoint import (
    MANIFEST,
    RELEASE,
    TRACKER,
    check_absent,
    check_replaceable,
    checkpoint_layers,
    megatron_lms_folder,
)

PathLike = str | os.PathLike[str]


def check_target(target: Path, force: bool) -> None:
    """Check that a Hugging Face folder can be written: nothing is there, or such a folder and ``force``.

    Raises:
        ValueError: something is there.
    """
    if not force:
        check_absent(target)
        return
    check_replaceable(target, ("config.json",), "Hugging Face folder")
    check_replaceable(target, ("*.safetensors", "*.bin"), "Hugging Face folder")


def check_root(root: Path, force: bool) -> None:
    """Check that ``<root>/release`` can be written: nothing is there, or checkpoints and ``force``.

    Raises:
        ValueError: something is there.
    """
    if not force:
        check_absent(root)
        return
    check_replaceable(root, (TRACKER, f"*/{MANIFEST}"), "root of checkpoints")
    check_replaceable(root / RELEASE, (MANIFEST, "mp_rank_*"), "checkpoint")


def check_apart(source: Path, target: Path) -> None:
    """Check that what is written can neither be read as input nor replace it.

    Raises:
        ValueError: one of the two folders is the other, or lies in it.
    """
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{target} and {source} lie in each other; give another output")


def check_apart_from(
    checkpoint: PathLike, base: PathLike | None, hf_config: PathLike | None, target: Path
) -> None:
    """Check :func:`check_apart` of all that a checkpoint is read from.

    Args:
        checkpoint: a checkpoint folder, a root, or a run folder.
        base: as of ``config.checkpoint.checkpoint_layers``.
        hf_config: the Hugging Face folder of the model, for a checkpoint that Megatron-LM itself wrote.
    """
    if hf_config is not None:
        inputs = [megatron_lms_folder(checkpoint), Path(hf_config)]
    else:
        inputs = checkpoint_layers(checkpoint, base)
    for folder in inputs:
        check_apart(folder, target)
