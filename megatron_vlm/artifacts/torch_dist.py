"""The ``.metadata`` of a ``torch_dist`` checkpoint: a pickle, read without running anything that it names.

Two read it: before a run, where there is no torch, to see whether the files are whole; and whoever loads the
tensors, with torch's own classes, of which it admits those that are data.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import IO, Any, Callable, Dict

from megatron_vlm.system.files import check_readable

METADATA = ".metadata"
_AGAIN = "copy or convert the checkpoint again"

FindClass = Callable[[str, str], Any]  # what a module's name and a class's stand for


class _Inert:
    """Stands for every class: keeps what it is given and runs nothing."""

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def inert(module: str, name: str) -> Any:
    """Return what stands for any class, whatever it is called: an object that keeps its attributes."""
    return dict if name == "OrderedDict" else _Inert


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], find_class: FindClass) -> None:
        super().__init__(file)
        self._find_class = find_class

    def find_class(self, module: str, name: str) -> Any:
        return self._find_class(module, name)


def load_metadata(folder: Path, find_class: FindClass = inert) -> Any:
    """Return what a checkpoint's ``.metadata`` holds.

    torch itself unpickles this file without restraint.

    Args:
        find_class: what each class stands for that the file names; whatever it raises refuses the file.

    Raises:
        ValueError: the file is missing, damaged or refused; one line, which says what works.
    """
    path = folder / METADATA
    check_readable(path)
    try:
        with open(path, "rb") as file:
            return _Unpickler(file, find_class).load()
    except FileNotFoundError:
        if any(folder.glob("mp_rank_*")):
            raise ValueError(
                f"{folder} is of Megatron-LM's format; scripts/convert/reshard.py --megatron-dir {folder} "
                "writes it in the one that training reads"
            ) from None
        raise ValueError(f"{folder}: no {METADATA}; not a torch_dist checkpoint; {_AGAIN}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise _refused(path, error) from None


def check_shards(folder: Path, loaded: Any) -> None:
    """Check that the files of a checkpoint are there and as long as its metadata says.

    Args:
        loaded: the metadata, as :func:`load_metadata` returns it.

    Raises:
        ValueError: one is missing or cut off; the message names the first and counts the others.
    """
    ends: Dict[str, int] = {}
    try:
        for place in (loaded.storage_data or {}).values():
            name, end = os.path.basename(place.relative_path), place.offset + place.length
            ends[name] = max(end, ends.get(name, 0))
    except Exception as error:  # a damaged pickle can hold anything
        raise _refused(folder / METADATA, error) from None
    damaged = []
    for name, end in sorted(ends.items()):
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            cut_off = f"cut off ({size:,} of {end:,} bytes)"
            damaged.append(f"{name} is {'missing' if size < 0 else cut_off}")
    if damaged:
        more = f", and {len(damaged) - 1} more files" if len(damaged) > 1 else ""
        raise ValueError(f"{folder}: {damaged[0]}{more}; {_AGAIN}")


def _refused(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: refused, not the metadata of a checkpoint ({error}); {_AGAIN}")
