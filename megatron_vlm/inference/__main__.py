"""One rank of ``scripts/inference/generate.py``, which starts it and reads the same flags."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial

from megatron_vlm import rank
from megatron_vlm.artifacts.checkpoint import read_model, resolve_checkpoint
from megatron_vlm.artifacts.image_rule import LOADED
from megatron_vlm.config.generation import GenerationConfig


def main(argv: list[str]) -> int:
    """Run this rank; returns the exit code, 2 for a user error."""
    rank.begin()
    try:
        config = GenerationConfig.from_flags(argv, prog="python -m megatron_vlm.inference")
    except ValueError as error:
        return rank.user_error(error, rank.is_first())
    return rank.run(partial(_answer, config), config.machine.device)


def _answer(config: GenerationConfig) -> None:
    from megatron_vlm import parallel
    from megatron_vlm.inference.generator import Prompt, load_generator
    from megatron_vlm.inference.output import Answers
    from megatron_vlm.inference.questions import Questions

    layout = parallel.initialize(config.machine.tp, config.machine.pp, device=config.machine.device)
    checkpoint = resolve_checkpoint(config.checkpoint)
    model = read_model(checkpoint)
    held: list[Questions] = []  # on rank 0, which alone reads files and knows text

    def prepare() -> tuple[int, list[int], int]:
        held.append(Questions(config, checkpoint, model))
        rule = held[0].processing.images.rule
        if any(question.images for question in held[0].questions) and rule != LOADED:
            print(f"image files are read with {rule}", file=sys.stderr)
        return len(held[0]), held[0].end_tokens, held[0].max_new_tokens

    def encode(numbers: range) -> list[Prompt]:
        return held[0].encode(numbers)

    count, end_tokens, max_new_tokens = parallel.on_first_rank(prepare)
    sampling = replace(config.sampling, max_new_tokens=max_new_tokens)
    source = config.source
    generator = load_generator(checkpoint, model, layout, source.precision, end_tokens, source.base)
    answers = Answers(config.prompts, held[0]) if held else None
    started, tokens = time.perf_counter(), 0
    for start in range(0, count, config.prompts.batch_size):
        numbers = range(start, min(start + config.prompts.batch_size, count))
        prompts = parallel.on_first_rank(partial(encode, numbers))
        made = generator.generate(prompts, sampling, answers.show if answers else None)
        tokens += sum(map(len, made))
        if answers is not None:
            answers.write(numbers, made)
    if answers is not None:
        answers.close()
        seconds = time.perf_counter() - started
        print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    rank.leave(main(sys.argv[1:]))
