"""FP8 beside BF16 on the handwritten digits of the demo: two runs of its recipe over the same batches.

Nothing here is timed, so what needs nothing of each other runs at once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpu

CHECKOUT = Path(__file__).resolve().parents[2]
PREPARE = "from megatron.energon.cli.main import main; main()"  # not every installation has it as a command
FIELD_MAP = '{"image": "jpg", "context": "json[question]", "answers": "txt"}'
ITERATIONS, COMPARED = 500, 100  # the demo's, and those whose losses are compared
# Losses are means of this many iterations: single batches are noise. On a CPU, with FP8's rounding imitated
# in each linear layer, the curves were 0.6 % apart, and 1.8 % with a bit less of mantissa.
WINDOW = 10
RUN = (
    *("scripts/train/run.py", "-g", "1", "--stage", "2", "--train-vision", "--lang", "en"),
    *("--seq-length", "64", "--micro-batch-size", "48", "--global-batch-size", "48", "--log-interval", "1"),
    *("--adam-beta2", "0.95", "--data-workers", "1"),
)


def run(folder: Path, *command: str) -> str:
    """Run a script of this checkout in ``folder``; returns what it printed.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), environment.get("PYTHONPATH", "")])
    first = command[0] if command[0].startswith("-") else str(CHECKOUT / command[0])
    ended = subprocess.run(
        [sys.executable, first, *command[1:]],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout[-3000:]}")
    return ended.stdout


def together(work: Mapping[str, Callable[[], Any]], failures: list[str]) -> Iterator[tuple[str, Any]]:
    """Do all at once, and give each result as it comes; what failed goes into ``failures``."""
    with ThreadPoolExecutor(len(work) or 1) as pool:
        names = {pool.submit(do): name for name, do in work.items()}
        for future in as_completed(names):
            try:
                yield names[future], future.result()
            except Exception as error:
                failures.append(f"{names[future]}: {type(error).__name__}: {error}")


def make_data(folder: Path) -> None:
    """The demo's dataset."""
    run(folder, "examples/digits/make_dataset.py", "--save-dir", "data")
    run(
        folder,
        *("-c", PREPARE, "prepare", "--non-interactive", "--no-progress", "--num-workers", "2"),
        *("--split-parts", "train:train-.*", "--split-parts", "val:held-out-.*"),
        *("--sample-type", "VQASample", "--field-map", FIELD_MAP, "data"),
    )


def make_model(folder: Path) -> None:
    """The demo's model as a checkpoint."""
    run(folder, "examples/digits/make_models.py", "--save-dir", "models")
    run(
        folder,
        *("scripts/convert/build_llava_jp.py", "--save-dir", "llava", "--lang", "en"),
        *("--text-model", "models/text-model", "--vision-model", "models/vision-model"),
    )
    run(
        folder, "scripts/convert/convert_hf_to_megatron.py", "--hf-dir", "llava", "--megatron-dir", "megatron"
    )


def train(folder: Path, name: str, iterations: int, *flags: str) -> list[float]:
    """Losses of each iteration."""
    run(
        folder,
        *RUN,
        *("--name", name, "--save-dir", "runs", "--data-path", "data", "--tokenizer-load-dir", "llava"),
        *("--megatron-load-dir", "megatron", "--train-iters", str(iterations), *flags),
    )
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def accuracy(folder: Path, name: str) -> float:
    """Share of the held-out digits that transformers answers right with a run's weights."""
    out = f"export-{name}"
    run(
        folder,
        *("scripts/convert/convert_megatron_to_hf.py", "--megatron-dir", f"runs/{name}"),
        *("--hf-dir", out, "--tokenizer-dir", "llava"),
    )
    said = run(folder, "examples/digits/evaluate.py", "--hf-dir", out, "--data-path", "data")
    found = re.search(r"\((\d+) of (\d+) held-out", said)
    assert found is not None, said
    return int(found[1]) / int(found[2])


def apart(a: list[float], b: list[float]) -> float:
    """Return the area between the beginnings of two loss curves beside that below the second."""

    def smooth(curve: list[float]) -> list[float]:
        return [sum(curve[i : i + WINDOW]) for i in range(COMPARED - WINDOW + 1)]

    differences = [abs(x - y) for x, y in zip(smooth(a), smooth(b), strict=True)]
    return sum(differences) / sum(smooth(b))


def measure(folder: Path, tiny: bool) -> Iterator[dict[str, Any]]:
    """Losses and accuracies of both runs. Without a GPU there is a short one in BF16 alone.

    Raises:
        RuntimeError: a part of it failed; all that doesn't need it was found before.
    """
    failures: list[str] = []
    parts = {"data": partial(make_data, folder), "model": partial(make_model, folder)}
    if len(list(together(parts, failures))) == len(parts):
        yield from _compare(folder, tiny, failures)
    if failures:
        raise RuntimeError("\n".join(failures))


def _compare(folder: Path, tiny: bool, failures: list[str]) -> Iterator[dict[str, Any]]:
    arms = ("bf16",) if tiny else ("bf16", "fp8")
    iterations, warmup = (6, 1) if tiny else (ITERATIONS, 50)
    flags = ["--lr", "1e-3", "--lr-warmup-iters", str(warmup), *(["--device", "cpu"] if tiny else [])]
    losses, accuracies = {}, {}
    runs = {arm: partial(train, folder, arm, iterations, f"--{arm}", *flags) for arm in arms}
    for arm, curve in together(runs, failures):
        losses[arm] = curve
        yield {f"{arm}_losses": curve}
    if len(losses) == 2:
        yield {"losses_apart": apart(losses["fp8"], losses["bf16"])}
    for arm, share in together({arm: partial(accuracy, folder, arm) for arm in losses}, failures):
        accuracies[arm] = share
        yield {f"{arm}_accuracy": share}
    if len(accuracies) == 2:
        yield {"accuracy_apart": abs(accuracies["fp8"] - accuracies["bf16"])}


def main(argv: list[str]) -> None:
    args = gpu.parser(__doc__.splitlines()[0]).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        gpu.collect(measure(Path(folder), args.tiny), args.result)


if __name__ == "__main__":
    main(sys.argv[1:])
