"""The folder of a model that the user names by a folder or by a tag of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_vlm.hf.formats.folder import BIN_INDEX, SAFETENSORS_INDEX
from megatron_vlm.system.files import read_json

_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_WEIGHTS = (
    ("model.safetensors", SAFETENSORS_INDEX, "model*.safetensors"),
    ("pytorch_model.bin", BIN_INDEX, "pytorch_model*.bin"),
)


def locate(flag: str, name: str) -> Path:
    """Return the folder of a model: ``name`` itself, its snapshot in the hub's cache, or one that is
    downloaded.

    Args:
        flag: where the user gave it, for messages.
        name: a folder, or a tag such as ``openai/clip-vit-large-patch14-336``.

    Raises:
        ValueError: it is neither a folder nor in the cache, and the hub doesn't give it.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.isfile(name):
        raise ValueError(f"{flag} {name}: a file; give the folder that it is in")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ValueError(f"{flag} {name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if _is_whole(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    except ValueError as error:  # not the form of a tag
        raise ValueError(f"{flag} {name}: no such folder, and no tag of the hub ({error})") from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=_SMALL_FILES))
        for _, _, pattern in _WEIGHTS:
            if not _is_whole(folder):
                snapshot_download(name, allow_patterns=[pattern])
    except Exception as error:  # the hub's errors, and those of whichever library it speaks through
        reason = type(error).__name__
        raise ValueError(
            f"{flag} {name}: no such folder, not in the hub's cache, and the hub doesn't give it ({reason}); "
            f"run `hf download {name}` where there is a network, and set HF_HOME to where it has put it"
        ) from None
    if not _is_whole(folder):
        raise ValueError(
            f"{flag} {name}: its weights are not all in the hub's cache, or not safetensors nor .bin; run "
            f"`hf download {name}` where there is a network"
        )
    return folder


def _is_whole(folder: Path) -> bool:
    """Return whether a snapshot has its config and all files of weights."""
    for single, index, _ in _WEIGHTS:
        if (folder / single).is_file():
            return (folder / "config.json").is_file()
        if (folder / index).is_file():
            try:
                files = set(read_json(folder / index)["weight_map"].values())
            except (ValueError, KeyError, AttributeError):
                return True  # damaged, as its reader will say
            if all((folder / str(file)).is_file() for file in files):
                return (folder / "config.json").is_file()
    return False
