"""Which of the tokens behind an answer ends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlm.artifacts.end_tokens import end_tokens, find_end_token, with_end_token

ADDED = {"<|im_end|>": False, "<|im_end|>!": False, "\n": False, "  ": False, "<|eot|>": True, "<s>": True}


@pytest.mark.parametrize(
    "suffix, eos, expected",
    [
        ("<|im_end|>\n", "</s>", "<|im_end|>"),  # added by hand, not flagged special
        ("<|im_end|>!\n", "</s>", "<|im_end|>!"),
        ("<|im_end|>\n</s>", "</s>", "</s>"),  # a special one comes before others
        (" </s><|eot|>", "</s>", "</s>"),
        ("<|eot|></s>", "</s>", "<|eot|>"),
        ("\n  ", "</s>", ""),  # runs of spaces are added tokens of some tokenizers
        (" ", None, ""),
        ("</s>", None, ""),
    ],
)
def test_the_token_that_ends_an_answer(suffix: str, eos: str | None, expected: str) -> None:
    assert find_end_token(suffix, ADDED, eos) == expected


def test_an_exported_model_stops_at_what_its_folder_names_and_at_what_was_trained() -> None:
    assert with_end_token([5, 6], 7) == [5, 6, 7]
    assert with_end_token([5, 6], 6) == with_end_token([5, 6], None) == [5, 6]
    assert with_end_token([], 6) == [6]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", json.dumps({"eos_token_id": "</s>"}), '{"eos_token_id": [1, "b"]}', '{"eos_token_id": true}'],
)
def test_a_folder_that_does_not_tell(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/generation_config.json: [^\n]*$"):
        end_tokens(tmp_path)


@pytest.mark.parametrize(("given", "expected"), [(-1, []), ([2, -1], [2]), ([], []), (7, [7])])
def test_minus_one_is_no_token(tmp_path: Path, given: object, expected: list[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert end_tokens(tmp_path, default=5) == expected
