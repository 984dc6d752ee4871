"""Compare this trainer with transformers' Trainer under DDP, and write a table: ``make bench``.

Both train the same LLaVA on the same two ranks, in turns, and the table has the medians of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import Workload, save_dataset, save_model

CHECKOUT = Path(__file__).resolve().parents[1]
RANKS = 2
OURS, THEIRS = "Megatron-VLM", "transformers"
LOSSES_AGREE = 1e-4


@dataclass(frozen=True)
class Run:
    """One side of a row."""

    side: str
    layout: str  # "DP 2" or "TP 2"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of the comparison."""

    title: str
    ours: Run
    theirs: Run
    same_data: bool = True  # then the losses have to agree


THEIRS_ANSWERS = Run(THEIRS, "DP 2")
ROWS = [
    Row("from memory, answers trained", Run(OURS, "DP 2"), THEIRS_ANSWERS),
    Row("from memory, answers trained", Run(OURS, "TP 2"), THEIRS_ANSWERS),
    Row(
        "from memory, every token trained",
        Run(OURS, "DP 2", ("--all-trained",)),
        Run(THEIRS, "DP 2", ("--all-trained",)),
    ),
    Row(
        "from files, answers trained",
        Run(OURS, "DP 2", ("--loader",)),
        Run(THEIRS, "DP 2", ("--loader",)),
        same_data=False,  # each side shuffles in its own way
    ),
]


def measure(run: Run, workload: Workload, folder: Path) -> dict[str, Any]:
    """Start the ranks of a run and put their results together.

    Returns:
        ``tokens_per_second`` of all ranks, ``iteration_seconds``, ``peak_mib`` of the largest rank, and the
        ``losses`` of all iterations.
    """
    module = {OURS: "benchmarks.ours", THEIRS: "benchmarks.hugging_face"}[run.side]
    result = folder / "result"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", module, "--folder", str(folder), "--result", str(result)]
    command += ["--workload", json.dumps(asdict(workload)), *run.flags]
    if run.layout == "TP 2":
        command += ["--tp", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONPATH": str(CHECKOUT),
    }
    ended = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"error: {shlex.join(command)} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("result.*.json"))]
    for path in folder.glob("result.*.json"):
        path.unlink()
    timed = slice(workload.warmup, None)
    seconds = [max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)][timed]
    tokens = sum(sum(rank["tokens"][timed]) for rank in ranks)
    return {
        "tokens_per_second": tokens / sum(seconds),
        "iteration_seconds": statistics.median(seconds),
        "peak_mib": max(rank["peak_mib"] for rank in ranks),
        "losses": ranks[0]["losses"],
    }


def compare(workload: Workload, folder: Path, repetitions: int) -> dict[Run, list[dict[str, Any]]]:
    """Compare all runs, in turns, so that a machine that slows down slows both sides."""
    runs = list(dict.fromkeys(run for row in ROWS for run in (row.ours, row.theirs)))
    results: dict[Run, list[dict[str, Any]]] = {run: [] for run in runs}
    for repetition in range(repetitions):
        for run in runs:
            start = time.perf_counter()
            results[run].append(measure(run, workload, folder))
            print(
                f"{repetition + 1}/{repetitions} {run.side} {run.layout} {' '.join(run.flags)}: "
                f"{results[run][-1]['tokens_per_second']:.0f} tokens/s, "
                f"{results[run][-1]['peak_mib']:.0f} MiB ({time.perf_counter() - start:.0f} s in all)",
                flush=True,
            )
    return results


def summarize(results: dict[Run, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One dictionary per row: medians of both sides, ratios, and by how much losses differ.

    Raises:
        ValueError: losses that should agree don't: the two sides train different things.
    """
    rows = []
    for row in ROWS:
        summary: dict[str, Any] = {"row": row.title}
        for name, run in (("ours", row.ours), ("theirs", row.theirs)):
            summary[name] = {
                "side": f"{run.side}, {run.layout}",
                **{
                    what: statistics.median(result[what] for result in results[run])
                    for what in ("tokens_per_second", "iteration_seconds", "peak_mib")
                },
                "all_tokens_per_second": [round(result["tokens_per_second"]) for result in results[run]],
            }
        # Of the turns that ran one after the other, so that a load that comes and goes cancels.
        turns = zip(results[row.ours], results[row.theirs], strict=True)
        summary["speed_ratio"] = statistics.median(
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in turns
        )
        summary["memory_ratio"] = summary["ours"]["peak_mib"] / summary["theirs"]["peak_mib"]
        if row.same_data:
            ours, theirs = results[row.ours][0]["losses"], results[row.theirs][0]["losses"]
            summary["losses"] = {"ours": ours, "theirs": theirs}
            summary["loss_difference"] = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
            if summary["loss_difference"] > LOSSES_AGREE:
                raise ValueError(f"{row.title}: losses {ours} and {theirs} are not the same training")
        rows.append(summary)
    return rows


def machine() -> str:
    """Return the processor's or the GPU's name and how many there are."""
    return f"{torch.cuda.get_device_name()} x {RANKS}" if torch.cuda.is_available() else processor()


def processor() -> str:
    """Return the processor's name and how many cores there are."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(report: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    workload = report["workload"]
    lines = [
        f"# {OURS} and {THEIRS}' Trainer on {report['machine']}",
        "",
        f"{report['date']}, {report['precision']}, {RANKS} processes with {report['threads']} thread each; "
        f"{packages}. Load before the start: {report['load']:.1f}.",
        f"Command: `{report['command']}`. Medians of {report['repetitions']} turns, "
        f"{workload['iterations']} iterations each after {workload['warmup']} that isn't timed.",
        "",
        "| | | tokens/s | ratio | peak MiB per process | ratio | losses differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ours, theirs = row["ours"], row["theirs"]
        difference = f"{row['loss_difference']:.0e}" if "loss_difference" in row else "other order"
        lines += [
            f"| {row['row']} | {ours['side']} | {ours['tokens_per_second']:.0f} | {row['speed_ratio']:.2f} "
            f"| {ours['peak_mib']:.0f} | {row['memory_ratio']:.2f} | {difference} |",
            f"| | {theirs['side']} | {theirs['tokens_per_second']:.0f} | | {theirs['peak_mib']:.0f} | | |",
        ]
    lines += [
        "",
        f"The model: Llama of {workload['num_layers']} layers, hidden {workload['hidden_size']}, vocabulary "
        f"{workload['vocab_size']}, behind a frozen CLIP tower of {workload['vision_layers']} layers, hidden "
        f"{workload['vision_hidden_size']}; sequences of {workload['sequence']}, with one image, and with "
        f"{workload['answer']} trained tokens where answers are trained. Global batch "
        f"{workload['global_batch']}, micro batch {workload['micro_batch']}. Both sides use torch's "
        "scaled-dot-product attention and fused AdamW, and clip gradients. transformers' Trainer has no "
        "tensor parallelism on these processes: the TP 2 row compares with its DP 2.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=CHECKOUT / "benchmarks" / "results")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--workload", type=json.loads, default={}, help="sizes that differ, as JSON")
    args = parser.parse_args()
    workload = Workload(**args.workload)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(workload, folder)
        save_dataset(workload, folder / "data")
        results = compare(workload, folder, args.repetitions)
    packages = ("torch", "megatron-core", "megatron-energon", "transformers", "accelerate")
    report = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.compare", *sys.argv[1:]]),
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "load": load,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "repetitions": args.repetitions,
        "workload": asdict(workload),
        "rows": summarize(results),
    }
    words = "".join(c if c.isalnum() else " " for c in report["machine"].lower()).split()
    path = args.output / f"{'-'.join(words)}-{report['date']}"
    args.output.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))
    print(f"\n{table(report)}\nwritten to {path}.md and .json")


if __name__ == "__main__":
    main()
