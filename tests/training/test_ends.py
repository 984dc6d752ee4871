"""What a run says of the token that ends an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import transformers

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.processing import load_processing
from megatron_vlm.training.ends import describe_ends
from tests.training.conftest import Trainable


def test_every_template_of_a_mixture_and_what_the_folder_adds(
    trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    one = trainables["untied"]
    hf = shutil.copytree(one.hf, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, -1, 99999]}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    tokenizer.add_eos_token = True
    tokenizer.save_pretrained(hf)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        "datasets:\n"
        f"  captions: {{path: {one.data}, weight: 1, template: plain}}\n"
        f"  chats: {{path: {one.text_only}, weight: 1}}\n"
    )
    model = ModelConfig.from_hf_dir(str(hf))
    processing = load_processing(str(hf), model, seq_length=96, template="v1")
    token = processing.tokenizer.convert_ids_to_tokens(7)
    first, captions, appended = describe_ends(str(mixture), processing, hf).splitlines()
    assert (
        first
        == f"answers end with '</s>' (2); an exported model stops at '{token}' (7) too, as its files say"
    )
    assert captions.startswith("dataset captions: answers end with a line break and no end token")
    assert appended.startswith("the tokenizer puts </s> behind every text")
