"""What is drawn: from the distribution that transformers' generate draws from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers

from megatron_vlm.config.generation import SamplingSection
from megatron_vlm.inference import sampling as module
from megatron_vlm.inference.sampling import Sampler, draw


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.4, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_probabilities_equal_those_of_generate(flags: dict[str, float], monkeypatch) -> None:
    torch.manual_seed(3)
    net = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.5,
        )
    ).eval()
    prompts = torch.randint(3, 60, (3, 5))
    output = net.generate(
        prompts,
        max_new_tokens=4,
        do_sample=True,
        eos_token_id=None,
        **{"top_k": 0, **flags},  # its default is 50
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    drawn_from: list[torch.Tensor] = []

    def record(probabilities: torch.Tensor, uniform: list[float]) -> torch.Tensor:
        drawn_from.append(probabilities)
        return draw(probabilities, uniform)

    monkeypatch.setattr(module, "draw", record)
    sampler = Sampler(SamplingSection(**flags), range(3))
    for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        sampler.choose(output.sequences[:, : 5 + step], logits.float())
        torch.testing.assert_close(drawn_from[step].float(), scores.softmax(-1))
        assert ((drawn_from[step] == 0) == scores.isinf()).all()


def test_draw_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.0, 0.25, 0.65, 0.0], dtype=torch.float64)
    count = 1000
    uniform = [(i + 0.5) / count for i in range(count)]
    counts = Counter(draw(probabilities.expand(count, -1), uniform).tolist())
    assert counts == {1: 100, 3: 250, 4: 650}


def test_draw_never_takes_what_is_impossible() -> None:
    probabilities = torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3, 0.0]], dtype=torch.float64)
    assert draw(probabilities, [0.0]).item() == 1
    assert draw(probabilities, [1 - 2**-53]).item() == 3  # the largest that random() returns


def test_the_seed_and_the_number_of_a_prompt_decide() -> None:
    logits = torch.zeros(2, 1000)
    tokens = torch.zeros(2, 1, dtype=torch.int64)

    def drawn(seed: int, numbers: list[int]) -> list[list[int]]:
        sampler = Sampler(SamplingSection(temperature=1.0, seed=seed), numbers)
        return [sampler.choose(tokens, logits).tolist() for _ in range(5)]

    assert drawn(1, [0, 1]) == drawn(1, [0, 1])
    assert drawn(1, [0, 1]) != drawn(2, [0, 1])
    first, second = zip(*drawn(1, [0, 1]), strict=True)
    assert first != second
    assert [row[::-1] for row in drawn(1, [1, 0])] == drawn(1, [0, 1])
