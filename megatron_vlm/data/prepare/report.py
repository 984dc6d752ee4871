"""The report of what was read, kept and dropped, and of the samples' sizes: as JSON, and for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vlm.data.prepare.histogram import Histogram, bin_label
from megatron_vlm.data.prepare.plan import SPLITS
from megatron_vlm.data.prepare.rejections import DUPLICATE, UNTRAINED, Rejections
from megatron_vlm.data.prepare.shards import ShardFacts
from megatron_vlm.system.units import count_text

_BAR = 40
_MOST_FILES = 20


def make_report(
    settings: Mapping[str, Any],
    read: Mapping[str, int],
    notes: Mapping[str, int],
    shapes: Mapping[str, int],
    ignored: Mapping[str, Mapping[str, Any]],
    rejections: Rejections,
    shards: Sequence[ShardFacts],
) -> dict[str, Any]:
    """Return the report of a finished dataset.

    Args:
        settings: all that it depends on.
        read: records of each file.
        notes, shapes: how many samples have each.
        ignored: fields of which nothing is trained, as records/ignored.py merges them.

    Returns:
        ``read`` is the sum of ``kept`` and of the counts in ``dropped``, for each of ``files`` too;
        ``untrained`` are among ``kept``.
    """
    dropped = rejections.state()
    untrained = dropped.pop(UNTRAINED, None)
    histograms: dict[str, Histogram] = {}
    for shard in shards:
        for name, state in shard.histograms.items():
            histograms.setdefault(name, Histogram()).merge(Histogram(state))
    return {
        "settings": {name: value for name, value in settings.items() if name != "files"},
        "files": {path: _file(count, rejections.by_file[path]) for path, count in read.items()},
        "read": sum(read.values()),
        "kept": sum(shard.samples for shard in shards),
        "dropped": dropped,
        "untrained": {UNTRAINED: untrained} if untrained else {},
        "notes": dict(sorted(notes.items())),
        "shapes": dict(sorted(shapes.items())),
        "ignored": dict(ignored),
        "splits": {split: _split(split, shards) for split in SPLITS},
        "histograms": {name: histogram.state() for name, histogram in histograms.items()},
    }


def _file(read: int, dropped: int) -> dict[str, int]:
    return {"read": read, "kept": read - dropped, "dropped": dropped}


def _split(split: str, shards: Sequence[ShardFacts]) -> dict[str, int]:
    own = [shard for shard in shards if shard.name.startswith(f"{split}-")]
    return {
        "samples": sum(shard.samples for shard in own),
        "images": sum(shard.images for shard in own),
        "shards": len(own),
        "bytes": sum(shard.bytes for shard in own),
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = ["# Prepared dataset", "", f"{report['read']} records read, {report['kept']} samples kept.", ""]
    lines += [f"{line}." for line in without_images(report)] + [""] * len(without_images(report))
    lines += ["| split | samples | images | shards | MB |", "|---|---|---|---|---|"]
    for split, facts in report["splits"].items():
        row = (facts["samples"], facts["images"], facts["shards"], f"{facts['bytes'] / 1e6:.1f}")
        lines.append(f"| {split} | " + " | ".join(map(str, row)) + " |")
    lines += _files(report["files"])
    lost = {**report["dropped"], **report["untrained"]}
    if lost:
        lines += ["", "## Dropped", "", "All of them are in dropped.jsonl."]
        for reason, facts in lost.items():
            lines += ["", f"{facts['count']} x {reason}:", ""]
            lines += [f"- `{example.replace('`', '')}`" for example in facts["examples"]]
            if facts["count"] > len(facts["examples"]):
                lines.append(f"- and {facts['count'] - len(facts['examples'])} more")
    if report["notes"]:
        lines += ["", "## Worth a look", ""]
        lines += [f"- {count} x {note}" for note, count in report["notes"].items()]
    if report["ignored"]:
        lines += ["", "## Fields that nothing is trained on", ""]
        lines += [_ignored(name, facts) for name, facts in report["ignored"].items()]
    for name, state in report["histograms"].items():
        lines += ["", f"## {name[0].upper()}{name[1:]}", "", *_histogram(state)]
    return "\n".join(lines) + "\n"


def _ignored(name: str, facts: Mapping[str, Any]) -> str:
    count = count_text(facts["count"], "record")
    example = facts["example"].replace("`", "")
    return f"- `{name}` in {count}, e.g. `{example}` in {facts['where']}"


def _files(files: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a table of the files that lost most where there are many; one file's counts are the whole's."""
    if len(files) < 2:
        return []
    shown = sorted(files.items(), key=lambda item: -item[1]["dropped"])[:_MOST_FILES]
    lines = ["", "| file | read | kept | dropped |", "|---|---|---|---|"]
    lines += [f"| {path} | " + " | ".join(map(str, facts.values())) + " |" for path, facts in shown]
    return lines + ([f"| and {len(files) - len(shown)} more |"] if len(files) > len(shown) else [])


def summary(report: Mapping[str, Any]) -> str:
    """Say in a line what became of the records."""
    read, kept = report["read"], report["kept"]
    dropped = ""
    if read > kept:
        reason, facts = next(iter(report["dropped"].items()))  # the most frequent one
        dropped = f", {read - kept} dropped ({(read - kept) / read:.1%}; {facts['count']} of them: {reason})"
    untrained = sum(facts["count"] for facts in report["untrained"].values())
    left_out = f", {untrained} of them left out by training" if untrained else ""
    return f"{kept} of {read} records kept{left_out}{dropped}"


def without_images(report: Mapping[str, Any]) -> list[str]:
    """Return a line where no sample that is trained on has an image; else none."""
    if report["splits"]["train"]["images"]:
        return []
    return [
        "No sample of the train split has an image: a run trains on text alone, and --stage 1, which trains "
        "what leads from images to the language model, has nothing to train"
    ]


def share_lost(report: Mapping[str, Any]) -> float:
    """Return the share of records that training won't see though they were meant for it; repeated ones
    weren't."""
    lost = {**report["dropped"], **report["untrained"]}
    return sum(facts["count"] for reason, facts in lost.items() if reason != DUPLICATE) / report["read"]


def _histogram(state: Mapping[str, Any]) -> list[str]:
    count = state["count"]
    lines = [
        f"{count} values from {state['min']} to {state['max']}, mean {state['total'] / count:.1f}",
        "",
        "```",
    ]
    most = max(state["bins"].values())
    for top, number in state["bins"].items():
        bar = "#" * max(1, round(_BAR * number / most))
        lines.append(f"{bin_label(int(top)):>17} {number:>9} {number / count:>6.1%} {bar}")
    return [*lines, "```"]
