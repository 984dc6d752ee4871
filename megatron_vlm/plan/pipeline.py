"""The language model's layers, dealt to pipeline stages.

A stage is what a rank runs between two exchanges: with ``--vpp`` above 1 a rank holds several, its model
chunks. Stages are numbered in the order of the model; stage ``k`` is chunk ``k // pp`` of pipeline rank
``k % pp``. The first holds vision tower, projector and embedding too, the last one the output layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.train_modules import LANGUAGE, VISION
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.flops import Flops, Work, causal_pairs, training_flops


@dataclass(frozen=True)
class StageCosts:
    """Operations of training on one sample, in one unit."""

    layer: int  # of the language model
    first: int = 0  # tower and projector
    last: int = 0  # output layer


def stage_costs(model: ModelConfig, seq_length: int, trains: Callable[[str], bool]) -> StageCosts:
    """Return the operations of a sample of the largest image and text, ``seq_length`` tokens in all.

    All of the text counts as trained: the output layer runs for trained tokens only.

    Args:
        trains: see :func:`training_flops`.
    """

    def flops(trained_tokens: int) -> Flops:
        work = Work(seq_length, trained_tokens, causal_pairs([seq_length]), model.image_tiles)
        return training_flops(model, work, trains)

    layers, all_parts = flops(0), flops(model.text_tokens(seq_length))
    return StageCosts(
        layer=layers.language // model.language.num_layers,
        first=layers.vision + layers.projector,
        last=all_parts.language - layers.language,
    )


def deal_layers(
    num_layers: int,
    costs: StageCosts,
    pp: int,
    vpp: int = 1,
    first: Optional[int] = None,
    last: Optional[int] = None,
) -> Tuple[int, ...]:
    """Return the number of layers of each stage, so that the slowest stage is as fast as can be.

    Every stage gets one layer; each further one goes where it is done soonest, and of equals to the latest
    stage, which holds the fewest micro batches at a time.

    Args:
        first: layers of the first pipeline rank, over all its chunks; None to balance it too.
        last: layers of the last pipeline rank.

    Returns:
        ``pp * vpp`` counts, each at least 1, in the order of the model.

    Raises:
        ValueError: there are too few layers, or ``first`` and ``last`` leave too few or too many.
    """
    stages = pp * vpp
    if stages > num_layers:
        raise ValueError(
            f"--pp {pp} x --vpp {vpp} makes {stages} stages of {num_layers} layers; use {num_layers} or fewer"
        )
    fixed = {}
    for name, count, rank in (("first", first, 0), ("last", last, pp - 1)):
        if count is None:
            continue
        flag = f"--decoder-{name}-pipeline-num-layers"
        if count % vpp:
            raise ValueError(f"{flag} {count} is no multiple of the {vpp} model chunks of --vpp")
        fixed.update({chunk * pp + rank: count // vpp for chunk in range(vpp)})
    left, free = num_layers - sum(fixed.values()), stages - len(fixed)
    if left < free or (left and not free):
        raise ValueError(
            f"--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers leave {left} of the "
            f"{num_layers} layers for the other {free} stages; each needs at least one"
        )
    counts = [fixed.get(stage, 1) for stage in range(stages)]
    extra = [0] * stages
    extra[0] += costs.first
    extra[-1] += costs.last
    for _ in range(left - free):
        counts[
            min(
                (stage for stage in range(stages) if stage not in fixed),
                key=lambda stage: ((counts[stage] + 1) * costs.layer + extra[stage], -stage),
            )
        ] += 1
    return tuple(counts)


def layers_per_stage(config: RunConfig, model: ModelConfig) -> Tuple[int, ...]:
    """Return how many of the language model's layers each pipeline stage gets, see :func:`deal_layers`.

    Raises:
        ValueError: the model has too few layers for the stages, or the flags leave some without.
    """
    frozen = [LANGUAGE] * config.model.freeze_lm + [VISION] * (not config.model.train_vision)
    costs = stage_costs(model, config.data.seq_length, lambda name: not name.startswith(tuple(frozen)))
    return deal_layers(
        model.language.num_layers,
        costs,
        config.parallel.pp,
        config.parallel.vpp,
        config.parallel.decoder_first_pipeline_num_layers,
        config.parallel.decoder_last_pipeline_num_layers,
    )


def describe_stages(layers: Sequence[int], pp: int) -> List[str]:
    """Return what each pipeline rank holds, a line for each; chunks are separated by ``|``."""
    stages, start = [], 0
    for stage, count in enumerate(layers):
        end = start + count
        parts = ["vision tower, projector, embedding"] if stage == 0 else []
        parts.append(f"layer {start}" if count == 1 else f"layers {start}-{end - 1}")
        parts += ["output layer"] if stage == len(layers) - 1 else []
        stages.append(", ".join(parts))
        start = end
    return [f"pipeline stage {rank}: {' | '.join(stages[rank::pp])}" for rank in range(pp)]
