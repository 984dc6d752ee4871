"""The first screen of a run: what it starts from, who does what, how much of everything. Plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.dataset import REPORT
from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch.launch_plan import LaunchPlan
from megatron_vlm.plan.flops import Work, causal_pairs, training_flops
from megatron_vlm.plan.memory import FRAGMENTATION, GIB, OUTSIDE, StageMemory
from megatron_vlm.plan.packing_estimate import PackingEstimate
from megatron_vlm.plan.pipeline import describe_stages, layers_per_stage
from megatron_vlm.system.units import count_text

_WIDTH = 100  # of the lists of groups
_MOST_STAGES = 16  # with a line each
_INDENT = " " * 9


@dataclass(frozen=True)
class Facts:
    """The facts that the files of a run tell, as far as they are there.

    Attributes:
        start: one line: where the run begins.
        model: the architecture, with the adapters that the flags ask for.
        train_samples: of the training split.
        packing: how many samples share a sequence with ``--packing``; None where that isn't known.
        mixture: a line for each of its datasets; empty where ``--data-path`` is a folder.
        memory: estimate for each pipeline rank.
        gpu_memory: of one GPU, in GiB.
        disk: one line: checkpoints to come, and the room for them.
    """

    start: str
    model: Optional[ModelConfig] = None
    train_samples: Optional[int] = None
    packing: Optional[PackingEstimate] = None
    mixture: Sequence[str] = ()
    memory: Tuple[StageMemory, ...] = ()
    gpu_memory: Optional[float] = None
    disk: str = ""


def screen(plan: LaunchPlan, facts: Facts) -> str:
    """Return the plan as text: about a screen, whatever the number of ranks."""
    config, world_size = plan.config, plan.world_size
    lines = [_line("run", f"{config.checkpoint.run_dir}: {facts.start}")]
    lines += _layout(plan, facts.model)
    if facts.model is not None:
        lines += _stages(plan, facts.model)
    lines += _batch(config, world_size, facts)
    if facts.model is not None:
        lines += _work(config, facts.model)
    if facts.memory:
        lines += _memory(facts, plan.device == "cuda")
    if facts.disk:
        lines.append(_line("disk", facts.disk))
    return "\n".join(lines)


def rank_groups(tp: int, pp: int, dp: int) -> Dict[str, List[range]]:
    """Return the ranks that work together in tensor, data and pipeline parallelism.

    Tensor-parallel ranks are neighbours, then data-parallel ones, then pipeline stages, as megatron-core
    numbers them (``RankGenerator`` with the order ``tp-cp-ep-dp-pp``).

    Returns:
        For ``TP``, ``DP`` and ``PP`` all groups, in megatron-core's order.
    """
    stage, world = tp * dp, tp * dp * pp
    return {
        "TP": [range(first, first + tp) for first in range(0, world, tp)],
        "DP": [
            range(start + part, start + stage, tp) for start in range(0, world, stage) for part in range(tp)
        ],
        "PP": [range(first, world, stage) for first in range(stage)],
    }


def _layout(plan: LaunchPlan, model: Optional[ModelConfig]) -> List[str]:
    config, world_size = plan.config, plan.world_size
    tp, pp, vpp = config.parallel.tp, config.parallel.pp, config.parallel.vpp
    dp, nodes = config.dp(world_size), config.launch.node or 1
    what = (
        count_text(world_size, "GPU")
        if plan.device == "cuda"
        else count_text(world_size, "process") + " on CPUs"
    )
    where = f", {plan.processes} on each of {nodes} nodes" if nodes > 1 else ""
    stages = f"PP {pp}" + (f" (VPP {vpp})" if vpp > 1 else "")
    how = ", ".join(filter(None, (_precision(config, model), _options(config))))
    lines = [_line("layout", f"{what}{where}: TP {tp} x {stages} x DP {dp}" + (f"; {how}" if how else ""))]
    if nodes > 1:
        on_node = [range(start, start + plan.processes) for start in range(0, world_size, plan.processes)]
        lines.append(_line("  node", f"ranks {_some(on_node)}"))
    for name, groups in rank_groups(tp, pp, dp).items():
        if len(groups[0]) == 1:
            continue
        over = {len({rank // plan.processes for rank in group}) for group in groups}
        spans = (
            "" if nodes == 1 else ", each within a node" if over == {1} else f", each over {max(over)} nodes"
        )
        lines.append(_line(f"  {name}", f"{_some(groups)}  ({count_text(len(groups), 'group')}{spans})"))
    return lines


def _precision(config: RunConfig, model: Optional[ModelConfig]) -> str:
    stored = model.precision if model is not None else ""
    fp8 = f" with FP8 {config.fp8.recipe}" if config.fp8 is not None else ""
    return (config.training.precision or stored) + fp8


def _options(config: RunConfig) -> str:
    """Return what else cuts or moves memory, by the names of the flags."""
    parallel = config.parallel
    given = [
        "sequence-parallel" * parallel.sequence_parallel,
        "dist-optim" * parallel.dist_optim,
        f"recompute {parallel.recompute}" * (parallel.recompute != "none"),
    ]
    return ", ".join(filter(None, given))


def _stages(plan: LaunchPlan, model: ModelConfig) -> List[str]:
    """Return which ranks run each pipeline stage, and what it holds."""
    config = plan.config
    pp, size = config.parallel.pp, plan.world_size // config.parallel.pp
    lines = []
    for number, text in enumerate(describe_stages(layers_per_stage(config, model), pp)):
        ranks = range(number * size, (number + 1) * size)
        nodes = range(ranks[0] // plan.processes, ranks[-1] // plan.processes + 1)
        where = f" on {_named('node', nodes)}" if (config.launch.node or 1) > 1 else ""
        holds = text.partition(": ")[2]
        lines.append(_line(f"stage {number}", f"{_named('rank', ranks)}{where}: {holds}"))
    return _shortened(lines)


def _batch(config: RunConfig, world_size: int, facts: Facts) -> List[str]:
    batch, dp = config.training.global_batch_size, config.dp(world_size)
    accumulated = config.num_microbatches(world_size)
    lines = [
        _line(
            "batch",
            f"micro batch {config.training.micro_batch_size} x DP {dp} x {accumulated} accumulated = "
            f"{count_text(batch, _unit(config))} an iteration",
        )
    ]
    lines += [_line("" if number else "mixture", text) for number, text in enumerate(facts.mixture)]
    samples, epochs = facts.train_samples, config.training.epochs
    iterations = config.iterations_over(samples)
    if iterations is None:
        passes = "one pass" if epochs is None else f"{epochs:g} passes"
        return [*lines, _line("length", f"{passes} over the training split")]
    text = f"{count_text(iterations, 'iteration')}, {count_text(iterations * batch, _unit(config))}"
    if config.data.packing:
        return [*lines, _line("length", text + ":"), *_packed_length(iterations * batch, batch, facts)]
    if samples:
        text += f", {iterations * batch / samples:,.2f} epochs of {samples:,}"
    return [*lines, _line("length", text)]


def _unit(config: RunConfig) -> str:
    """Return the unit of batch sizes."""
    return "sequence" if config.data.packing else "sample"


def _packed_length(sequences: int, batch: int, facts: Facts) -> List[str]:
    """Return how many samples are in packed sequences, and how many passes over the data that is."""
    if facts.packing is None:
        return [
            f"{_INDENT}how many samples they hold is not known: scripts/data/prepare.py with",
            f"{_INDENT}--tokenizer-load-dir counts their tokens",
        ]
    each = facts.packing.samples_per_sequence
    text = f"about {count_text(round(sequences * each), 'sample')}, {each:.2g} in a sequence"
    if facts.train_samples:
        passes = sequences * each / facts.train_samples
        one = facts.packing.iterations(facts.train_samples, batch)
        text += f", {passes:,.2f} epochs of {facts.train_samples:,}; one takes {count_text(one, 'iteration')}"
    folders = " and ".join(facts.packing.counted_with)
    return [_INDENT + text, f"{_INDENT}estimated from the lengths in {REPORT}, counted with {folders}"]


def _work(config: RunConfig, model: ModelConfig) -> List[str]:
    """Return the tokens and operations of an iteration, at most."""
    batch, length, image = config.training.global_batch_size, config.data.seq_length, model.image_tokens
    images = max(1, length // image) if config.data.packing else 1
    text = length if config.data.packing else model.text_tokens(length)
    work = Work(
        batch * length, batch * text, causal_pairs([length]) * batch, batch * images * model.image_tiles
    )
    flops = training_flops(model, work, config.trains(model))
    parts = [
        ("vision tower", flops.vision),
        ("projector", flops.projector),
        ("language model", flops.language),
    ]
    shares = ", ".join(f"{name} {_percent(part, flops.total)}" for name, part in parts)
    takes = f"{_image(model)} takes {image:,} of --seq-length {length:,} ({_percent(image, length)})"
    tokens = f"{batch * length:,} an iteration at most"
    if config.data.packing:
        takes += f": {count_text(images, 'image')} in a sequence at most"
        every = "sequence one long sample, and had it as many images as that"
    else:
        tokens += f": {batch * (length - text):,} of images, {batch * text:,} of text"
        takes += f" and leaves {text:,} for text"
        every = "sample an image and text, as long as --seq-length"
    return [
        _line("tokens", tokens),
        _INDENT + takes,
        _line("FLOPs", f"{flops.total:.2e} an iteration at most: {shares}"),
        f"{_INDENT}at most: were every {every}",
    ]


def _image(model: ModelConfig) -> str:
    return "an image" if model.anyres is None else f"the largest image, of {model.image_tiles} tiles,"


def _memory(facts: Facts, on_gpus: bool) -> List[str]:
    """Return the estimate of plan/memory.py; of a long pipeline the ends and the largest."""
    stages = facts.memory
    if len(stages) > 4:
        largest = max(stages, key=lambda stage: stage.total)
        stages = tuple(stage for stage in stages if stage in (stages[0], largest, stages[-1]))
    size = f" of {facts.gpu_memory:.1f} GiB" if facts.gpu_memory else ""
    where = f"GPU{size}" if on_gpus else "process"
    unit, name = (GIB, "GiB") if max(stage.total for stage in stages) >= GIB else (1 << 20, "MiB")
    columns = ("stage", "weights", "gradients", "optimizer", "activations", "total", "with allowance")
    rows: List[Sequence[str]] = [columns if on_gpus else columns[:-1]]
    for stage in stages:
        sizes = [stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.total]
        sizes += [stage.with_allowance] * on_gpus
        rows.append([str(stage.rank), *(f"{size / unit:,.2f}" for size in sizes)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    lines = [_line("memory", f"{name} on each {where}, predicted for samples as long as --seq-length")]
    lines += [_INDENT + row for row in table]
    if on_gpus:
        allowance = (
            f"{OUTSIDE / GIB:.0f} GiB for CUDA and NCCL and {FRAGMENTATION * 100:.0f} % between tensors"
        )
        lines.append(f"{_INDENT}the allowance, {allowance}, is an assumption")
    return lines


def _line(name: str, text: str) -> str:
    return f"{name:<{len(_INDENT) - 1}} {text}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.{1 if part * 100 < whole else 0}f} %" if whole else "0 %"


def _span(numbers: range) -> str:
    """Return ranks as ``3``, ``0-7``, ``0,8``, or ``0,8,..,56``."""
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers.step == 1:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(numbers) <= 4:
        return ",".join(map(str, numbers))
    return f"{numbers[0]},{numbers[1]},..,{numbers[-1]}"


def _named(noun: str, numbers: range) -> str:
    return f"{noun if len(numbers) == 1 else noun + 's'} {_span(numbers)}"


def _some(groups: Sequence[range]) -> str:
    """Return all groups where they fit into a line, else the first three and the last."""
    every = "  ".join(map(_span, groups))
    if len(every) <= _WIDTH or len(groups) <= 4:
        return every
    return "  ".join([*map(_span, groups[:3]), "..", _span(groups[-1])])


def _shortened(lines: List[str]) -> List[str]:
    if len(lines) <= _MOST_STAGES:
        return lines
    return [*lines[:3], _line(f"  .. {len(lines) - 5}", "more"), *lines[-2:]]
