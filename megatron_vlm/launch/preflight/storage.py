"""Checks of disks: checkpoint files, room for those to come, and whether a container sees them."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parameters import stage_parameters
from megatron_vlm.artifacts.torch_dist import check_shards, load_metadata
from megatron_vlm.config.run import RunConfig

# Of one machine alone.
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "squashfs")
_MOST_LINKS = 40  # followed on one path, as Linux does
# Apptainer mounts these by itself, unless it is told not to or a site has switched it off.
_MOUNTED = ("/tmp", "/var/tmp", "/dev", "/proc", "/sys")


def shard_problems(folder: Path) -> Iterator[str]:
    """Yield files of a ``torch_dist`` checkpoint that are missing or cut off, by its ``.metadata``."""
    try:
        check_shards(folder, load_metadata(folder))
    except ValueError as error:
        yield str(error)


def image_problems(path: str) -> Iterator[str]:
    """Yield why a file or folder is no container image, or not a whole one; what isn't there is not looked
    at.

    Source: the header of https://github.com/apptainer/sif, after which come squashfs and ext3 images of old
    releases.
    """
    if os.path.isdir(path):
        if not any(os.path.lexists(os.path.join(path, name)) for name in (".singularity.d", "bin/sh")):
            yield f"--sif-path {path}: a folder that is no sandbox image; give an image file"
        return
    try:
        with open(path, "rb") as file:
            head = file.read(2048)
        size = os.path.getsize(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            yield f"--sif-path {path}: {error.strerror}"
        return
    if head[32:42] == b"SIF_MAGIC\0":
        start, length = struct.unpack("<qq", head[112:128])  # of all data objects
        if size < start + length:
            yield f"--sif-path {path}: cut off ({size:,} of {start + length:,} bytes); copy or build it again"
    elif b"hsqs" not in head[:64] and head[1080:1082] != b"\x53\xef":
        yield f"--sif-path {path}: no container image; build one from environments/recipe_latest.def"


def checkpoint_bytes(config: RunConfig, model: ModelConfig, with_optimizer: bool) -> int:
    """Return the size of a checkpoint that the run writes: its tensors."""
    trains = config.trains(model)
    padding = config.model.make_vocab_size_divisible_by * config.parallel.tp  # is saved too
    parameters = stage_parameters(model, 1, [model.language.num_layers], padding)[0]
    in_bf16 = (config.training.precision or model.precision) == "bf16"
    size = 0
    for parameter in parameters:
        trained = trains(parameter.name)
        if trained or not config.checkpoint.save_trained_only:
            size += parameter.size * (2 if in_bf16 else 4)
        if trained and with_optimizer:  # two moments, and a master weight where the weights are bfloat16
            size += parameter.size * (12 if in_bf16 else 8)
    return size


def number_of_saves(iterations: Optional[int], interval: int, done: int = 0) -> int:
    """Return the number of checkpoints that a run writes from iteration ``done`` on: each interval's, and
    the last one's."""
    if iterations is None:
        return 1
    if done >= iterations:
        return 0
    return iterations // interval - done // interval + bool(iterations % interval)


def free_bytes(path: str) -> Optional[int]:
    """Return the room for an ordinary user on the file system that ``path`` is or will be on.

    A quota isn't asked.
    """
    try:
        status = os.statvfs(nearest_folder(path))
    except OSError:
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None  # of an object store, say


def nearest_folder(path: str) -> str:
    """Return ``path``, or the closest of its parents that exists."""
    path = os.path.abspath(path)
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def local_file_system(path: str, mounts: str = "/proc/mounts") -> Optional[str]:
    """Return the type of the file system that ``path`` is or will be on, if other machines can't see it.

    Returns:
        None where it is shared, or that can't be told.
    """
    folder = os.path.realpath(nearest_folder(path))
    try:
        with open(mounts, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.split() for line in file]
    except OSError:
        return None
    best, kind = "", ""
    for _, point, file_system, *_ in lines:
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        inside = folder == point or folder.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two mounts at one place the later one is seen
            best, kind = point, file_system
    return kind if kind in _LOCAL else None


def unseen(paths: Iterable[str], command: Sequence[str], home: Optional[str] = None) -> List[Tuple[str, str]]:
    """Return the paths that exist here and don't in the container, since a link leads out of what is bound.

    Args:
        paths: absolute.
        command: that starts the container, its ``--bind`` options among it.
        home: the user's folder, which is mounted by default.

    Returns:
        For each of them, where the container looks for it.
    """
    mounted = {point: point for point in (*_MOUNTED, *filter(None, [home])) if os.path.isdir(point)}
    if any(word.startswith(("--contain", "--no-home", "--no-mount")) for word in command):
        mounted.clear()
    for flag, specs in zip(command, command[1:]):
        for spec in specs.split(",") if flag in ("--bind", "-B") else ():
            source, target = (spec.split(":") + [spec])[:2] if ":" in spec else (spec, spec)
            mounted[os.path.normpath(target)] = source
    found = []
    for path in paths:
        there = _resolve(os.path.abspath(path), mounted)
        if there is not None and os.path.exists(path):
            found.append((path, there))
    return found


def _resolve(path: str, mounted: Dict[str, str]) -> Optional[str]:
    """Follow ``path`` inside the container; returns the place that isn't there, None if all are."""
    for _ in range(_MOST_LINKS):
        parts = path.split("/")[1:]
        for depth in range(1, len(parts) + 1):
            inside = "/" + "/".join(parts[:depth])
            if inside in mounted or any(point.startswith(inside + "/") for point in mounted):
                continue  # a mount point, or a folder made for one
            point = max((p for p in mounted if inside.startswith(p.rstrip("/") + "/")), key=len, default=None)
            if point is None:
                return path
            outside = mounted[point] + inside[len(point) :]
            if os.path.islink(outside):
                target = os.path.join(os.path.dirname(inside), os.readlink(outside), *parts[depth:])
                path = os.path.normpath(target)
                break
        else:
            return None
    return path


def links_in(folder: str) -> List[str]:
    """Return the symbolic links among a folder's entries; none where it can't be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_symlink()]
    except OSError:
        return []
