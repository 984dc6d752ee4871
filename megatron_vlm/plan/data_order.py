"""The settings that have to stay the same for a data loader's saved place to mean the same samples.

The loader compares it when it goes on, and the launcher before a run is queued.
"""

from __future__ import annotations

import hashlib
from typing import Any, Dict, Mapping, Optional, Union

from megatron_vlm.artifacts.dataset import split_fingerprint, split_parts
from megatron_vlm.artifacts.mixture import MixtureConfig, is_mixture
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.grouping import LengthGroups, Packing

_NO_GROUPING = "neither --packing nor --group-by-length"


def grouping(config: RunConfig, workers: int) -> Optional[Union[Packing, LengthGroups]]:
    """Return how a loader worker groups the samples of its buffer, by the flags; None: as they follow each
    other.

    Args:
        workers: loader workers over all ranks.
    """
    if config.data.packing:
        return Packing(config.data.packing_buffer_size, config.data.seq_length)
    if config.data.group_by_length:
        size = config.training.micro_batch_size
        return LengthGroups(
            config.data.packing_buffer_size, size, config.training.global_batch_size // size // workers
        )
    return None


def mixture_fingerprint(fingerprints: Mapping[str, str]) -> str:
    """Return the fingerprint of a mixture's datasets, by their names; of a lone folder (name: "") its own."""
    if list(fingerprints) == [""]:
        return fingerprints[""]
    return hashlib.sha256(repr(list(fingerprints.items())).encode()).hexdigest()[:16]


def data_identity(config: RunConfig, workers: int) -> Dict[str, Any]:
    """Return what a training loader of this run would save, as far as files tell without energon; what they
    don't tell is left out.

    Raises:
        ValueError: as :meth:`MixtureConfig.load`.
    """
    path = str(config.data.data_path)
    sources = MixtureConfig.load(path).of_split("train") if is_mixture(path) else ()
    folders = {source.name: source.path for source in sources} or {"": path}
    found: Dict[str, Any] = {
        "mixture": {source.name: str(source) for source in sources},
        "data_workers": workers,
        "micro_batch_size": config.training.micro_batch_size,
        "shuffle_buffer_size": config.data.shuffle_buffer_size,
        "grouping": str(grouping(config, workers) or ""),
    }
    fingerprints = {name: split_fingerprint(folder) for name, folder in folders.items()}
    known = {name: one for name, one in fingerprints.items() if one is not None}
    if len(known) == len(fingerprints):
        found["data"] = mixture_fingerprint(known)
    return found


def check_same_data(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare what a loader has saved with what it would save now; what either lacks isn't compared.

    Raises:
        ValueError: the place would be that of other samples.
    """
    both = saved.keys() & own.keys()
    for name in ("data_workers", "micro_batch_size", "shuffle_buffer_size"):
        flag = "--" + name.replace("_", "-")
        if name in both and saved[name] != own[name]:
            raise ValueError(
                f"{flag} {own[name]} differs from {saved[name]}, with which the data loader's "
                f"state was saved; go on with {flag} {saved[name]}, or start a new run"
            )
    if "grouping" in both and saved["grouping"] != own["grouping"]:
        raise ValueError(
            f"the data loader's state was saved with {saved['grouping'] or _NO_GROUPING}, and this run has "
            f"{own['grouping'] or _NO_GROUPING}; go on as it was, or start a new run"
        )
    changed = mixture_change(saved["mixture"], own["mixture"]) if "mixture" in both else ""
    if changed:
        raise ValueError(
            f"the mixture changed since the checkpoint: {changed}; go on with the old one, or start a "
            "new run from the checkpoint's weights"
        )
    if "data" in both and saved["data"] != own["data"]:
        raise ValueError(
            "the training data changed since the checkpoint (other shards, or prepared again); go on "
            "with the old data, or start a new run from the checkpoint's weights"
        )


def held_out_identity(path: str) -> Optional[Dict[str, Any]]:
    """Return what tells the samples of evaluations from others, as training computes it; None where that
    can't be told without YAML.

    Raises:
        ValueError: as :meth:`MixtureConfig.load`.
    """
    sources = MixtureConfig.load(path).of_split("val") if is_mixture(path) else ()
    parts = {source.name: split_parts(source.path) for source in sources}
    if any(part is None for part in parts.values()):
        return None
    having = [source for source in sources if (parts[source.name] or {}).get("val")]
    folders = {source.name: source.path for source in having} if is_mixture(path) else {"": path}
    known = {name: split_fingerprint(folder, "val") for name, folder in folders.items()}
    prints = {name: one for name, one in known.items() if one is not None}
    if not prints or len(prints) < len(known):
        return None
    return {"data": mixture_fingerprint(prints), "mixture": {source.name: str(source) for source in having}}


def check_held_out(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the samples of a run's evaluations: losses of other samples say nothing of its progress.

    Raises:
        ValueError: they changed.
    """
    if before != now:
        changed = mixture_change(before["mixture"], now["mixture"]) or "other shards, or prepared again"
        raise ValueError(
            f"the held-out samples changed since the checkpoint ({changed}), so that losses on them can't be "
            "compared; go on with the old ones, or start a new run from the checkpoint's weights"
        )


def mixture_change(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the first difference between a mixture's words for each dataset, before and now; empty if
    none."""
    if bool(before) != bool(now):
        was, has = (f"of {', '.join(names)}" if names else "a single dataset" for names in (before, now))
        return f"it was {was}, and is {has}"
    for name in [*before, *now]:
        if name not in now:
            return f"dataset {name} ({before[name]}) is gone"
        if name not in before:
            return f"dataset {name} ({now[name]}) is new"
        if before[name] != now[name]:
            return f"dataset {name} had {before[name]}, and has {now[name]}"
    if list(before) != list(now):
        return f"its datasets stood in the order {', '.join(before)}, and now {', '.join(now)}"
    return ""
