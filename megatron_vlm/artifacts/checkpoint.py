"""Folders of checkpoints: where each lies, and how one appears, whole or not at all.

    <root>/latest_checkpointed_iteration.txt    "release" (converted from Hugging Face) or an iteration
    <root>/release/   <root>/iter_0000100/      one checkpoint each, with a manifest.json

A run folder keeps its root in ``checkpoints/``. Everything here is plain files and JSON, so that
a launcher can check a checkpoint without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Collection, Dict, Iterator, List, Optional, Union

from megatron_vlm.architecture.families.known import other_model
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.system.files import reading, sync, write_whole
from megatron_vlm.system.locks import locked

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
RELEASE = "release"
CHECKPOINTS = "checkpoints"  # the root's name inside a run folder
RUN_STATE = "run_state.json"  # how far the run is
DATA_STATE = "data_state.json"  # where the data loader's workers are
RUN_CONFIG = "run_config.json"  # what the run that wrote a checkpoint was told
BEST = "best"  # name of the root that holds the checkpoint with the lowest validation loss
BEST_LOSS = "best.json"  # in it: the iteration and the loss
HF_FOLDER = "hf"  # the files of the Hugging Face folder that are not trained weights
FORMAT_VERSION = 1
BASE = "base"  # of a manifest: {"path", "fingerprint"} of what a checkpoint of trained weights only lies over
FILES = "files"  # of a manifest that training wrote: hashes of the checkpoint's files
_MOST_NAMES = 8  # in a message
_USERS = ".users"  # in a base: a file for each run whose checkpoints lie over it, with the run folder's path

PathLike = Union[str, "os.PathLike[str]"]

_ITERATION = re.compile(r"iter_(\d{7,})")
_MANIFEST_KEYS = ("format", "iteration", "has_optimizer", "model", "layout", "tensors")
_MANIFEST_KINDS: Dict[str, type] = {
    **{"format": str, "iteration": int, "has_optimizer": bool},
    **dict.fromkeys(("model", "layout", "tensors", "carried", FILES), dict),
}


def checkpoint_name(iteration: Union[int, str]) -> str:
    """Return the folder name of a checkpoint: ``release``, or ``iter_0000100`` for iteration 100."""
    return RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}"


def list_checkpoints(root: PathLike) -> List[Path]:
    """Return the finished checkpoints under ``root``, oldest first; ``release`` comes before all
    iterations."""
    root = Path(root)
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        match = _ITERATION.fullmatch(folder.name)
        if (match or folder.name == RELEASE) and (folder / MANIFEST).is_file():
            found.append((int(match.group(1)) if match else -1, folder))
    return [folder for _, folder in sorted(found)]


def latest_resumable(root: PathLike, before: Optional[PathLike] = None) -> Optional[Path]:
    """Return the newest checkpoint that holds optimizer state, older than ``before``; None if there is
    none."""
    folders = list_checkpoints(root)
    if before is not None:
        older = [folder.name for folder in folders]
        folders = folders[: older.index(Path(before).name)] if Path(before).name in older else []
    for folder in reversed(folders):
        if read_manifest(folder)["has_optimizer"]:
            return folder
    return None


def keep_last(root: PathLike, count: int, also: Collection[PathLike] = ()) -> List[Path]:
    """Delete all checkpoints of ``root`` but the newest ``count``.

    Kept besides: the one that the tracker names, the newest that a run can resume from, ``release``,
    those over which a run's checkpoints lie (:func:`note_user`), and those in ``also``. Each is renamed
    before it is removed, so that a kill leaves no half checkpoint.

    Returns:
        The folders that are gone.
    """
    root = Path(root)
    for trash in root.glob(".iter_*.deleted"):  # a kill came in between
        shutil.rmtree(trash, ignore_errors=True)
    iterations = [folder for folder in list_checkpoints(root) if folder.name != RELEASE]
    kept = {folder.resolve() for folder in map(Path, also)}
    kept.update(folder.resolve() for folder in iterations[-count:])
    kept.add((root / checkpoint_name(_read_tracker(root))).resolve())
    resumable = latest_resumable(root)
    if resumable is not None:
        kept.add(resumable.resolve())
    deleted = [folder for folder in iterations if folder.resolve() not in kept and not _in_use(folder)]
    for folder in deleted:
        trash = folder.with_name(f".{folder.name}.deleted")
        os.rename(folder, trash)
        sync(root)
        shutil.rmtree(trash, ignore_errors=True)
    return deleted


def note_user(base: PathLike, run: PathLike) -> None:
    """Keep :func:`keep_last` from deleting ``base`` as long as the folder ``run`` is there, whose checkpoints
    lie over it. Where ``base`` can't be written to, nothing does."""
    if Path(base).name == RELEASE:
        return  # it never deletes that
    run = os.path.abspath(run)
    users = Path(base) / _USERS
    with suppress(OSError):
        users.mkdir(exist_ok=True)
        (users / hashlib.sha256(run.encode()).hexdigest()[:16]).write_text(run, encoding="utf-8")


def _in_use(folder: Path) -> bool:
    return any(Path(user.read_text(encoding="utf-8")).is_dir() for user in (folder / _USERS).glob("*"))


def write_best(root: PathLike, iteration: int, loss: float) -> None:
    """Say which checkpoint ``root`` holds as the best one, atomically."""
    write_whole(Path(root) / BEST_LOSS, json.dumps({"iteration": iteration, "loss": loss}) + "\n")


def resolve_checkpoint(path: PathLike, flag: str = "") -> Path:
    """Return the folder of the checkpoint that ``path`` means.

    Args:
        path: a checkpoint folder, a root with a tracker file, or a run folder.
        flag: names it in messages.

    Raises:
        ValueError: ``path`` is none of these, or the checkpoint named by the tracker is not there.
    """
    path = Path(path)
    where = f"{flag} {path}".lstrip()
    if not path.is_dir():
        raise ValueError(f"{where}: no such checkpoint folder")
    if (path / MANIFEST).is_file():
        return path
    for root in (path, path / CHECKPOINTS):
        if (root / TRACKER).is_file():
            folder = root / checkpoint_name(_read_tracker(root))
            if (folder / MANIFEST).is_file():
                return folder
            _refuse_megatron_lms(folder)
            raise ValueError(f"{root / TRACKER} names {folder.name}, which is not a finished checkpoint")
        found = list_checkpoints(root)
        if found:
            names = ", ".join(str(folder) for folder in found)
            raise ValueError(f"{root}: no {TRACKER}; name the checkpoint itself: {names}")
    _refuse_megatron_lms(path)
    several = _roots_in(path)
    if several:
        names = ", ".join(several[:_MOST_NAMES]) + ", ..." * (len(several) > _MOST_NAMES)
        raise ValueError(f"{where}: holds several runs or checkpoints; name one of them: {names}")
    raise ValueError(f"{where}: not a checkpoint of this project{_what_instead(path)}")


def _what_instead(path: Path) -> str:
    """Return what a folder is that is no checkpoint, and what makes one of it."""
    script = "scripts/convert/convert_hf_to_megatron.py"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        return f" (no {MANIFEST}, no {TRACKER}); make one with {script}"
    other = other_model(config, str(path))
    flags = f"--hf-dir {shlex.quote(str(path))} --megatron-dir <checkpoint>"
    return ", but a Hugging Face model; " + (other or f"convert it: {script} {flags}")


def is_checkpoint(path: PathLike) -> bool:
    """Return whether ``path`` is what :func:`resolve_checkpoint` takes, rather than a Hugging Face folder."""
    own = any((Path(path) / name).exists() for name in (MANIFEST, TRACKER, CHECKPOINTS))
    return own or is_megatron_lms(path) or bool(_roots_in(Path(path)))  # refused, with what to do


def _roots_in(path: Path) -> List[str]:
    """Return the run folders and checkpoint roots right below a folder that is no model's."""
    if (path / "config.json").is_file():
        return []
    try:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError:
        return []
    return [str(f) for f in folders if any((f / name).exists() for name in (TRACKER, CHECKPOINTS, MANIFEST))]


def of_best(path: PathLike) -> str:
    """Return a hint where ``path`` is a run folder whose last checkpoint is taken and that has a best one."""
    path = Path(path)
    if (path / MANIFEST).is_file() or (path / TRACKER).is_file() or not (path / BEST / TRACKER).is_file():
        return ""
    last = resolve_checkpoint(path)
    return (
        f"this takes {last}, the last checkpoint; the one with the lowest validation loss is "
        f"{path / BEST}, which takes the place of {path} in the flags"
    )


def megatron_lms_folder(path: PathLike) -> Path:
    """Return the folder of ranks' files that ``path`` means: that folder, or the root above it; of
    Megatron-LM.

    Raises:
        ValueError: it is neither.
    """
    folder = path = Path(path)
    if (path / TRACKER).is_file():
        folder = path / checkpoint_name(_read_tracker(path))
    if not any(folder.glob("mp_rank_*")):
        raise ValueError(
            f"{folder}: no mp_rank_* folders; --hf-config is for checkpoints of Megatron-LM itself"
        )
    return folder


def is_megatron_lms(path: PathLike) -> bool:
    """Return whether ``path`` means a checkpoint that Megatron-LM itself wrote: ranks' files without a
    manifest."""
    try:
        return not (megatron_lms_folder(path) / MANIFEST).exists()
    except ValueError:
        return False


def _refuse_megatron_lms(folder: Path) -> None:
    if any(folder.glob("mp_rank_*")):
        raise ValueError(
            f"{folder} was written by Megatron-LM itself (no {MANIFEST}); scripts/convert/reshard.py with "
            "--hf-config <Hugging Face folder of the model> makes a checkpoint of it"
        )


def checkpoint_layers(path: PathLike, base: Optional[PathLike] = None, flag: str = "") -> List[Path]:
    """Return the folders that make up the checkpoint that ``path`` means, the one with all weights first.

    A checkpoint of trained weights only names the one that it lies over, its base, which may be such a
    checkpoint too. A tensor is that of the last folder that has it.

    Args:
        base: the checkpoint with all weights, in place of the recorded one.
        flag: names ``path`` in messages.

    Raises:
        ValueError: there is no such checkpoint, or a base isn't where it was.
    """
    layers = [resolve_checkpoint(path, flag)]
    if base is not None:
        resolve_checkpoint(base, "--base")  # said even where it isn't needed
    while BASE in read_manifest(layers[0]):
        try:
            recorded = Path(read_manifest(layers[0])[BASE]["path"])
        except (KeyError, TypeError):
            raise ValueError(f"{layers[0] / MANIFEST}: {BASE} names no path; the file is damaged") from None
        inner = (recorded / MANIFEST).is_file() and BASE in read_manifest(recorded)
        if base is not None and not inner:
            recorded = resolve_checkpoint(base)
            if recorded in layers or BASE in read_manifest(recorded):
                raise ValueError(f"--base {base}: holds trained weights only; give the checkpoint under it")
        if not (recorded / MANIFEST).is_file():
            raise ValueError(
                f"{layers[0]} holds trained weights only, and the rest is no longer at {recorded}; say with "
                "--base where it is"
            )
        layers.insert(0, recorded)
    return layers


def _read_tracker(root: Path) -> Union[int, str]:
    text = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return text
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{root / TRACKER}: {text[:80]!r} is neither an iteration nor {RELEASE!r}")
    return int(text)


def write_tracker(root: PathLike, iteration: Union[int, str]) -> None:
    """Make ``iteration`` (or ``"release"``) the latest checkpoint of ``root``, atomically."""
    write_whole(Path(root) / TRACKER, str(iteration))


def read_manifest(path: PathLike) -> Dict[str, Any]:
    """Return the manifest of the checkpoint that ``path`` means (see :func:`resolve_checkpoint`).

    Raises:
        ValueError: there is no checkpoint, or its manifest is damaged or of another version.
    """
    file = resolve_checkpoint(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{file}: format_version is {version!r}; supported: {FORMAT_VERSION}")
    missing = [key for key in _MANIFEST_KEYS if key not in manifest]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing")
    wrong = [key for key, kind in _MANIFEST_KINDS.items() if type(manifest.get(key, kind())) is not kind]
    if wrong:
        raise ValueError(f"{file}: {wrong[0]} is not what a manifest holds; the file is damaged")
    return manifest


def read_model(path: PathLike) -> ModelConfig:
    """Return the model of the checkpoint that ``path`` means.

    Raises:
        ValueError: as :func:`read_manifest`, or the manifest describes no model.
    """
    described = read_manifest(path)["model"]
    with reading(resolve_checkpoint(path) / MANIFEST, "copy or convert the checkpoint again"):
        return ModelConfig.from_dict(described)


def write_manifest(folder: PathLike, manifest: Dict[str, Any]) -> None:
    """Write ``manifest`` into a checkpoint folder, with the format's version in front.

    Raises:
        ValueError: a required key is missing.
    """
    missing = [key for key in _MANIFEST_KEYS if key not in manifest]
    if missing:
        raise ValueError(f"manifest: {', '.join(missing)} missing")
    text = json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=1)
    write_whole(Path(folder) / MANIFEST, text + "\n")


@contextmanager
def appearing_folder(final: PathLike, replace: bool = False) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``final`` when the block ends without an error.

    Until then nothing stands at ``final``; after a kill, only a hidden ``.<name>.incomplete`` may be left,
    which the next writer removes.

    Raises:
        ValueError: ``final`` is there, is not an empty folder, and ``replace`` is off; it is a mount point;
            or another process is writing it.
    """
    final, staging = Path(os.path.realpath(final)), staging_folder(final)
    with ExitStack() as locks:
        with ExitStack() as start:  # of several processes that begin at once, one goes on
            final.parent.mkdir(parents=True, exist_ok=True)
            start.enter_context(locked(final.parent))
            if staging.is_dir():
                with locked(staging, or_say=f"{final}: another process is writing it"):
                    pass
            start_folder(final, replace)
            locks.enter_context(locked(staging))
        try:
            yield staging
            finish_folder(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def start_folder(final: PathLike, replace: bool = False) -> Path:
    """Make the empty folder beside ``final``, the first half of :func:`appearing_folder`."""
    final = Path(final)
    if not replace:
        check_absent(final)
    if os.path.ismount(final):
        raise ValueError(f"{final} is a mount point, whose place no folder can take; give a folder in it")
    staging = staging_folder(final)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def staging_folder(final: PathLike) -> Path:
    """Return the folder that :func:`start_folder` makes and that becomes ``final``; equal on every rank.
    Where a link leads, not where it lies: that may be another file system."""
    final = Path(os.path.realpath(final))
    return final.with_name(f".{final.name}.incomplete")


def finish_folder(staging: PathLike, final: PathLike) -> None:
    """Flush every file to disk, then rename to ``final``: the second half of :func:`appearing_folder`."""
    staging, final = Path(staging), Path(os.path.realpath(final))
    for folder, _, names in os.walk(staging):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    old = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if final.exists():
            os.rename(final, old)
        os.rename(staging, final)
    except BaseException:  # a signal in between
        if old.exists() and not final.exists():
            os.rename(old, final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_absent(path: PathLike) -> None:
    """Check that writing to the folder ``path`` would overwrite nothing.

    Raises:
        ValueError: there is a file, or a folder that is not empty.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if os.path.lexists(path):
        raise ValueError(f"{path} is there already; give another path, or --force to replace it")


def check_replaceable(path: PathLike, marks: Collection[str], what: str) -> None:
    """Check that what ``--force`` would replace, if anything, is of a kind that is made here.

    Args:
        marks: patterns of names; such a folder has at least one of them.
        what: such a folder is.

    Raises:
        ValueError: it is something else.
    """
    path = Path(path)
    if path.is_dir() and (not any(path.iterdir()) or any(any(path.glob(mark)) for mark in marks)):
        return
    if os.path.lexists(path):
        raise ValueError(f"{path} is no {what}; --force doesn't replace it")
