"""Hugging Face folders and one prepared dataset, shared by the tests of the data pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from megatron_vlm.config.dataset import prepare_command
from megatron_vlm.config.model import ModelConfig
from tests.data.tiny_data import FOLDERS, make_samples, prepare, write_shards


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face LLaVA folders (without weights) as transformers writes them, by name."""
    root = tmp_path_factory.mktemp("hf")
    for name, (make_tokenizer, make_images, chat_template, tower, extra) in FOLDERS.items():
        tokenizer = make_tokenizer()
        strategy = "default" if extra else "full"
        tower_class = transformers.CLIPVisionConfig if extra else transformers.SiglipVisionConfig
        config = transformers.LlavaConfig(
            vision_config=tower_class(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **tower),
            text_config=transformers.LlamaConfig(vocab_size=512, hidden_size=32, num_attention_heads=4),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_select_strategy=strategy,
        )
        processor = transformers.LlavaProcessor(
            make_images(),
            tokenizer,
            patch_size=tower["patch_size"],
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=extra,
            chat_template=chat_template,
        )
        config.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: root / name for name in FOLDERS}


@pytest.fixture(scope="session")
def models(folders: dict[str, Path]) -> dict[str, ModelConfig]:
    return {name: ModelConfig.from_hf_dir(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training and 20 validation samples in 7 shards, prepared as documented."""
    root = tmp_path_factory.mktemp("data set")  # with a space, as paths may have
    write_shards(root, make_samples(140), 7)
    prepare(prepare_command(str(root), ratio="6,1,0"))
    return root
