"""What was read, kept and dropped, and how long and how large the samples are: as JSON, and to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vlm.data.prepare.histogram import Histogram, bin_label
from megatron_vlm.data.prepare.losses import UNTRAINED, Losses
from megatron_vlm.data.prepare.plan import SPLITS
from megatron_vlm.data.prepare.shards import ShardFacts

_BAR = 40


def make_report(
    settings: Mapping[str, Any],
    read: int,
    notes: Mapping[str, int],
    shapes: Mapping[str, int],
    losses: Losses,
    shards: Sequence[ShardFacts],
) -> dict[str, Any]:
    """The report of a finished dataset.

    Args:
        settings: all that it depends on.
        read: records.
        notes, shapes: how many samples have each.

    Returns:
        ``read`` is the sum of ``kept`` and of the counts in ``dropped``; ``untrained`` are among ``kept``.
    """
    dropped = losses.state()
    untrained = dropped.pop(UNTRAINED, None)
    histograms: dict[str, Histogram] = {}
    for shard in shards:
        for name, state in shard.histograms.items():
            histograms.setdefault(name, Histogram()).merge(Histogram(state))
    return {
        "settings": {name: value for name, value in settings.items() if name != "files"},
        "files": [path for path, _, _ in settings["files"]],
        "read": read,
        "kept": sum(shard.samples for shard in shards),
        "dropped": dropped,
        "untrained": {UNTRAINED: untrained} if untrained else {},
        "notes": dict(sorted(notes.items())),
        "shapes": dict(sorted(shapes.items())),
        "splits": {split: _split(split, shards) for split in SPLITS},
        "histograms": {name: histogram.state() for name, histogram in histograms.items()},
    }


def _split(split: str, shards: Sequence[ShardFacts]) -> dict[str, int]:
    own = [shard for shard in shards if shard.name.startswith(f"{split}-")]
    return {
        "samples": sum(shard.samples for shard in own),
        "images": sum(shard.images for shard in own),
        "shards": len(own),
        "bytes": sum(shard.bytes for shard in own),
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report for a reader."""
    lines = ["# Prepared dataset", "", f"{report['read']} records read, {report['kept']} samples kept.", ""]
    lines += ["| split | samples | images | shards | MB |", "|---|---|---|---|---|"]
    for split, facts in report["splits"].items():
        row = (facts["samples"], facts["images"], facts["shards"], f"{facts['bytes'] / 1e6:.1f}")
        lines.append(f"| {split} | " + " | ".join(map(str, row)) + " |")
    lost = {**report["dropped"], **report["untrained"]}
    if lost:
        lines += ["", "## Dropped", "", "All of them are in dropped.jsonl."]
        for reason, facts in lost.items():
            lines += ["", f"{facts['count']} x {reason}:", ""]
            lines += [f"- `{example.replace('`', '')}`" for example in facts["examples"]]
            if facts["count"] > len(facts["examples"]):
                lines.append(f"- and {facts['count'] - len(facts['examples'])} more")
    if report["notes"]:
        lines += ["", "## Kept, and worth a look", ""]
        lines += [f"- {count} x {note}" for note, count in report["notes"].items()]
    for name, state in report["histograms"].items():
        lines += ["", f"## {name[0].upper()}{name[1:]}", "", *_histogram(state)]
    return "\n".join(lines) + "\n"


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
