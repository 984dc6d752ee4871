"""The values that a run's flags leave to its checkpoint and its data."""

from __future__ import annotations

from dataclasses import replace

from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.image_rule import LOADED
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.mixture import Mixture
from megatron_vlm.plan.rules import validate
from megatron_vlm.plan.start import Start, saved_config


def resolve(config: RunConfig, start: Start, model: ModelConfig, world_size: int) -> RunConfig:
    """Fill in the values that the flags leave to checkpoint and data: length, precision, loader workers and
    how images are read; a collective call.

    Raises:
        ValueError: the flags don't fit the model, the data or the number of ranks.
    """
    path = str(config.data.data_path)  # a look at each shard, which is much for all ranks at once
    samples = parallel.on_first_rank(lambda: Mixture.open(path, "train").num_samples)
    config = config.with_length(samples)
    workers, rule = config.data.data_workers, LOADED
    if start.with_position:
        saved = saved_config(start.checkpoint).data
        rule = saved.image_rule()
        if workers is None and config.launch.num_workers is None:
            # The order of the data depends on it, so a run that goes on at another layout keeps it.
            config = replace(config, data=replace(config.data, data_workers=saved.data_workers))
    config = replace(config, data=config.data.with_image_rule(rule))
    validate(config, world_size, model)
    # float16 weights don't fit bfloat16, which has fewer digits.
    precision = config.training.precision or model.precision
    return replace(
        config,
        checkpoint=replace(config.checkpoint, restart=False),  # not again, when this one goes on
        data=replace(config.data, data_workers=config.data_workers(world_size)),
        training=replace(config.training, precision=precision),
    )
