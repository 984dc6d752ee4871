"""The tables of docs/memory.md: layouts that fit 80 GB, and the estimate beside what is allocated.

python -m benchmarks.memory              layouts predicted to fit; a few seconds
python -m benchmarks.memory --measure    training steps on this machine's CPU; some minutes, 5 GiB
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.memory import GIB, StageMemory, estimate

CATEGORIES = ("weights", "gradients", "optimizer", "activations")
# What torch reports of an H100 or A100 of 80 GB.
LIMIT = 79 * GIB


def llava(text: dict[str, Any], vision: dict[str, Any] | None = None, **options: Any) -> ModelConfig:
    """Return a LLaVA of these sizes; the image token is the last of the vocabulary."""
    return ModelConfig.from_hf(
        {
            "model_type": "llava",
            "text_config": {"model_type": "llama", **text},
            "vision_config": vision,  # None is CLIP ViT-L/14 at 336 pixels
            "image_token_index": text["vocab_size"] - 1,
            **options,
        }
    )


def _llama(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int) -> ModelConfig:
    sizes = dict(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, vocab_size=vocabulary)
    return llava(dict(sizes, num_attention_heads=heads, num_key_value_heads=groups), dtype="bfloat16")


# The vocabularies of the language models, and the image token, padded to a multiple of 64.
MODELS = {
    "Vicuna 7B": _llama(4096, 11008, 32, 32, 32, 32064),
    "Vicuna 13B": _llama(5120, 13824, 40, 40, 40, 32064),
    "Llama 2 70B": _llama(8192, 28672, 80, 64, 8, 32064),
    "Llama 3 70B": _llama(8192, 28672, 80, 64, 8, 128320),
}
REGIMES = {"stage 1": ["--stage", "1"], "stage 2": ["--stage", "2"], "LoRA": ["--lora-rank", "128"]}
SEQUENCES = (2048, 4096)


@dataclass(frozen=True)
class Case:
    """A run on a CPU whose allocations are measured."""

    name: str
    flags: str
    ranks: int
    model: ModelConfig

    @property
    def config(self) -> RunConfig:
        return RunConfig.from_flags(self.flags.split())

    @property
    def adapted(self) -> ModelConfig:
        """The model with the adapters that the flags ask for."""
        return replace(self.model, lora=self.config.lora.adapters)

    def predicted(self) -> list[StageMemory]:
        return estimate(self.config, self.model, self.ranks, "cpu")


_TOWER = dict(
    model_type="clip_vision_model",
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=112,
    patch_size=14,
)
# Narrow, so that activations are most of it and cost few operations; and wide, so that weights are.
_NARROW = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4)
_WIDE = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8)
NARROW = llava(dict(_NARROW, vocab_size=2048, max_position_embeddings=4096), _TOWER)
GROUPED = llava(dict(_NARROW, vocab_size=2048, num_key_value_heads=2), _TOWER)
WIDE = llava(dict(_WIDE, vocab_size=8192), _TOWER)
EXPERTS = llava(
    dict(_NARROW, model_type="mixtral", num_local_experts=4, vocab_size=2048, num_key_value_heads=4), _TOWER
)
CASES = [
    Case("TP 1", "--micro-batch-size 11 --global-batch-size 11", 1, NARROW),
    Case("TP 1, large", "--micro-batch-size 42 --global-batch-size 42", 1, NARROW),
    Case(
        "TP 1, selective, tower trained",
        "--micro-batch-size 20 --global-batch-size 20 --recompute selective --train-vision",
        1,
        GROUPED,
    ),
    Case(
        "TP 1, full, wide, bf16",
        "--micro-batch-size 1 --global-batch-size 2 --seq-length 384 --recompute full --bf16",
        1,
        WIDE,
    ),
    Case("stage 1", "--stage 1 --micro-batch-size 16 --global-batch-size 16", 1, NARROW),
    Case(
        "LoRA, dropout",
        "--lora-rank 16 --lora-dropout 0.05 --micro-batch-size 8 --global-batch-size 16",
        1,
        GROUPED,
    ),
    Case(
        "TP 2, SP",
        "--tp 2 --sequence-parallel --micro-batch-size 22 --global-batch-size 22",
        2,
        NARROW,
    ),
    Case(
        "experts, TP 2, SP",
        "--tp 2 --sequence-parallel --micro-batch-size 10 --global-batch-size 10 --seq-length 1024",
        2,
        EXPERTS,
    ),
    Case(
        "PP 2",
        "--pp 2 --decoder-first-pipeline-num-layers 3 --micro-batch-size 16 --global-batch-size 32",
        2,
        NARROW,
    ),
    Case(
        "DP 2, distributed optimizer, wide",
        "--dist-optim --micro-batch-size 1 --global-batch-size 2 --seq-length 256",
        2,
        WIDE,
    ),
]


def fitting(model: ModelConfig, regime: list[str], sequence: int) -> tuple[int, RunConfig, list[StageMemory]]:
    """Return the layout of fewest GPUs, in nodes of 8, that fits; of equals the one that costs the least
    time.

    Full recomputation counts as dearer than tensor parallelism within a node, pipeline stages as dearer
    than both.
    """
    for gpus in (8, 16, 32, 64, 128):
        for pp, full, tp, selective in product((1, 2, 4, 8), (False, True), (1, 2, 4, 8), (False, True)):
            if full and selective:
                continue
            recompute = "full" if full else "selective" if selective else "none"
            flags = [*regime, "--bf16", "--dist-optim", "--seq-length", str(sequence)]
            flags += ["--recompute", recompute, "--tp", str(tp), "--pp", str(pp)]
            flags += ["--sequence-parallel"] * (tp > 1)
            best = _largest_micro_batch(RunConfig.from_flags(flags), model, gpus)
            if best is not None:
                return (gpus, *best)
    raise ValueError(f"no layout of 128 GPUs fits {sequence} tokens")


def _largest_micro_batch(
    config: RunConfig, model: ModelConfig, gpus: int
) -> tuple[RunConfig, list[StageMemory]] | None:
    """Up to the one that the stage of training asks for; None if not even one sample fits."""
    best, micro = None, 1
    while micro <= config.training.micro_batch_size:
        smaller = replace(config, training=replace(config.training, micro_batch_size=micro))
        try:
            model.check_layout(config.parallel.tp, config.parallel.pp)
            stages = estimate(smaller, model, gpus, "cuda")
        except ValueError:  # the layout does not divide the ranks
            break
        if max(stage.with_allowance for stage in stages) > LIMIT:
            break
        best, micro = (smaller, stages), 2 * micro
    return best


def layouts_table() -> list[str]:
    """Lines of Markdown: a layout that fits for each model, sequence length and regime."""
    lines = [
        "| model | tokens | trained | GPUs | TP x PP x DP | micro batch | recompute "
        "| weights | gradients | optimizer | activations | with allowance |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, model), sequence, (regime, flags) in product(MODELS.items(), SEQUENCES, REGIMES.items()):
        gpus, config, stages = fitting(model, flags, sequence)
        worst = max(stages, key=lambda stage: stage.with_allowance)
        layout = f"{config.parallel.tp} x {config.parallel.pp} x {config.dp(gpus)}"
        cells = [name, sequence, regime, gpus, layout, config.training.micro_batch_size]
        cells.append(config.parallel.recompute)
        sizes = [getattr(worst, category) for category in CATEGORIES] + [worst.with_allowance]
        lines.append("| " + " | ".join([*map(str, cells), *(f"{size / GIB:.1f}" for size in sizes)]) + " |")
    return lines


def predicted_cells(case: Case) -> list[str]:
    """MiB of each category on the rank of each stage, as the table of checks has them."""
    return [" | ".join(_mib(getattr(stage, c)) for c in CATEGORIES) for stage in case.predicted()]


def checks_table() -> Iterator[str]:
    """Lines of Markdown, as they are measured: a row for each pipeline stage of each case."""
    yield "| run | ranks, stage | | weights | gradients | optimizer | activations | total |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in CASES:
        measured = {one["rank"]: one for one in run(case)}  # of tensor and data parallel ranks the last
        for stage, predicted in zip(case.predicted(), predicted_cells(case), strict=True):
            found = measured[stage.rank]
            total = sum(found[category] for category in CATEGORIES)
            cells = " | ".join(_mib(found[category]) for category in CATEGORIES)
            place = f"{case.name} | {case.ranks}, {stage.rank}"
            yield f"| {place} | predicted | {predicted} | {_mib(stage.total)} |"
            yield f"| | | measured | {cells} | {_mib(total)} |"


def run(case: Case) -> list[dict[str, int]]:
    """Measure a case in processes of its own, a rank each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(case.ranks):
        variables = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks))
        variables.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "benchmarks.memory", "--case", case.name]
        ranks.append(
            subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
        )
    answers = []
    for process in ranks:
        output = process.communicate()[0]
        if process.returncode:
            sys.exit(f"error: {case.name} ended with {process.returncode}")
        values = map(int, output.splitlines()[-1].split())
        answers.append(dict(zip(("rank", *CATEGORIES), values, strict=True)))
    return answers


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="the estimate beside real allocations")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        from benchmarks.allocations import measure
        from megatron_vlm import parallel

        case = next(case for case in CASES if case.name == args.case)
        found = asdict(measure(case.flags.split(), case.adapted))
        parallel.finalize()
        print(*(found[key] for key in ("rank", *CATEGORIES)))
        return
    for line in checks_table() if args.measure else layouts_table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
