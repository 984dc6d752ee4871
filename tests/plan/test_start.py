"""A run against the folders that its flags name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.start import Start, check_same_model
from tests.tiny import FAMILIES, MODELS, tiny_config

OF_EACH_KIND = {options.get("kind", "llava"): options for options in FAMILIES.values()}


@pytest.mark.parametrize("kind", MODELS)
def test_a_tokenizer_folder_of_another_llava(tmp_path: Path, kind: str) -> None:
    own = OF_EACH_KIND[kind]
    tied = own.get("tie_word_embeddings", False)
    for name, options in (("own", own), ("other", {**own, "tie_word_embeddings": not tied})):
        tiny_config(**options).save_pretrained(tmp_path / name)
    model, start = ModelConfig.from_hf_dir(str(tmp_path / "own")), Start(tmp_path / "checkpoint", False, "")

    def check(folder: str) -> None:
        flags = ["--tokenizer-load-dir", str(tmp_path / folder), "--train-iters", "1"]
        check_same_model(RunConfig.from_flags(flags), start, model)

    check("own")
    with pytest.raises(
        ValueError, match=r"--tokenizer-load-dir .*other is of another model than .*checkpoint"
    ):
        check("other")
    # A tokenizer's own folder, and the text model's, say nothing of the whole.
    (tmp_path / "bare").mkdir()
    tiny_config(**own).text_config.save_pretrained(tmp_path / "text")
    check("bare")
    check("text")
