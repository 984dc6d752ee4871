"""The files of a Hugging Face folder against the model: the same verdict as transformers' own loaders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.mixture import MixtureConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.media.images import ImageTransform
from megatron_vlm.data.mixture import Mixture, Source
from megatron_vlm.data.processing import build_processing
from megatron_vlm.launch.preflight import model_files
from tests.data.tiny_data import FOLDERS, hf_folder
from tests.tiny import save_llava


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, tmp_path_factory) -> Path:
    return hf_folder(request.param, tmp_path_factory.mktemp("hf"))


@pytest.fixture
def llava(tmp_path) -> Path:
    return hf_folder("llava", tmp_path)


def config(folder: Path, *argv: str) -> RunConfig:
    return RunConfig.from_flags(["--tokenizer-load-dir", str(folder), "--seq-length", "128", *argv])


def problems(folder: Path, model: ModelConfig | None = None, *argv: str) -> list[str]:
    model = model or ModelConfig.from_hf_dir(str(folder))
    return [
        *model_files.tokenizer_problems(str(folder), model, config(folder, *argv)),
        *model_files.image_problems([str(folder)], model),
        *model_files.image_warnings([str(folder)], model),
    ]


def training_refuses(folder: Path, model: ModelConfig | None = None, *argv: str) -> bool:
    """Return what transformers' own classes say, which training asks."""
    model = model or ModelConfig.from_hf_dir(str(folder))
    try:
        build_processing(config(folder, *argv), model)
    except ValueError:
        return True
    return False


def change(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_folders_that_training_takes_have_no_problems(folder) -> None:
    assert not training_refuses(folder) and problems(folder) == []


def test_another_models_tokenizer(llava) -> None:
    model = ModelConfig.from_hf_dir(str(llava))
    other = dataclasses.replace(model, image_token_id=model.image_token_id - 5)
    (problem,) = problems(llava, other)
    assert f"its <image> is token {model.image_token_id}" in problem and training_refuses(llava, other)
    language = dataclasses.replace(model.language, vocab_size=model.image_token_id)
    smaller = dataclasses.replace(model, language=language)
    (problem,) = problems(llava, smaller)
    assert "embeds only" in problem and training_refuses(llava, smaller)


def test_a_folder_that_does_not_tell_where_generation_stops(llava) -> None:
    assert list(model_files.end_token_problems(str(llava))) == []
    (llava / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    (problem,) = model_files.end_token_problems(str(llava))
    assert "generation_config.json: its eos_token_id is '</s>'" in problem


def test_the_image_token_of_a_flag(llava) -> None:
    (problem,) = problems(llava, None, "--image-token-id", "3")
    assert problem.startswith("--image-token-id 3: ") and training_refuses(
        llava, None, "--image-token-id", "3"
    )


def test_the_padding_token_is_not_the_image_token(llava) -> None:
    token = ModelConfig.from_hf_dir(str(llava)).image_token_id
    argv = ("--pad-token-id", str(token))
    (problem,) = problems(llava, None, *argv)
    assert "is the image token" in problem and training_refuses(llava, None, *argv)
    change(llava / "tokenizer_config.json", pad_token="<image>")
    (problem,) = problems(llava)
    assert "the tokenizer's pad token is the image token" in problem and training_refuses(llava)


def test_no_tokenizer(llava) -> None:
    model = ModelConfig.from_hf_dir(str(llava))
    for path in llava.glob("tokenizer*"):
        path.unlink()
    problem, *_ = problems(llava, model)
    assert "holds no tokenizer" in problem and training_refuses(llava, model)


def test_templates(llava) -> None:
    (llava / "chat_template.jinja").unlink()
    assert problems(llava) == [] and not training_refuses(llava)
    (problem,) = problems(llava, None, "--template", "chat")
    assert "has no chat template" in problem and training_refuses(llava, None, "--template", "chat")
    several = [{"name": "rag", "template": "x"}]  # and none that is used unless named
    change(llava / "tokenizer_config.json", chat_template=several)
    (problem,) = problems(llava, None, "--template", "chat")
    assert "has no chat template" in problem and training_refuses(llava, None, "--template", "chat")
    change(llava / "tokenizer_config.json", chat_template=[*several, {"name": "default", "template": "y"}])
    assert problems(llava, None, "--template", "chat") == []
    change(llava / "tokenizer_config.json", chat_template=None)
    (problem,) = problems(llava, None, "--template", "llama_3")
    assert "--template llama_3: the tokenizer lacks <|start_header_id|>, " in problem
    assert training_refuses(llava, None, "--template", "llama_3")
    assert problems(llava, None, "--template", "llama_2") == []
    assert not training_refuses(llava, None, "--template", "llama_2")
    change(llava / "tokenizer_config.json", eos_token=None)
    (problem,) = problems(llava)
    assert "--template v1" in problem and training_refuses(llava)
    assert problems(llava, None, "--stage", "1") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crop_size": {"height": 24, "width": 24}}, "24 x 24"),
        ({"crop_size": 16}, "16 x 16"),
        ({"crop_size": None}, "224 x 224"),
        ({"do_center_crop": False}, "keeps the shape"),
        ({"do_center_crop": False, "size": {"height": 20, "width": 24}}, "20 x 24"),
        ({"do_center_crop": False, "do_resize": False}, "keeps the shape"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "1 channels"),
    ],
)
def test_an_image_processor_of_another_tower(llava, changes, words) -> None:
    processor = json.loads((llava / "processor_config.json").read_text())
    old = llava / "preprocessor_config.json"  # as releases before 5 write it
    old.write_text(json.dumps(processor.pop("image_processor")))
    (llava / "processor_config.json").write_text(json.dumps(processor))
    assert problems(llava) == [] and not training_refuses(llava)
    change(old, **changes)
    (problem,) = problems(llava)
    assert words in problem
    with pytest.raises(Exception):  # noqa: B017 - whatever transformers makes of it
        ImageTransform.from_dir(str(llava), 20, 3)


def test_an_image_processor_that_pads_to_a_square(llava) -> None:
    """LLaVA's own recipe, ``image_aspect_ratio`` "pad"."""
    processor = json.loads((llava / "processor_config.json").read_text())
    own = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False}
    processor["image_processor"].update(own, size={"shortest_edge": 20})
    (llava / "processor_config.json").write_text(json.dumps(processor))
    assert problems(llava) == []
    ImageTransform.from_dir(str(llava), 20, 3)  # training takes it


def test_a_tokenizer_of_which_json_tells_nothing(llava) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (llava / name).unlink(missing_ok=True)
    (llava / "tokenizer.model").touch()
    assert not any("image token" in problem for problem in problems(llava))


def test_no_image_processor(llava) -> None:
    (llava / "processor_config.json").unlink()
    (problem,) = problems(llava)
    assert "no image processor" in problem and training_refuses(llava)


def test_damaged_json_is_named(llava) -> None:
    (llava / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: cannot be read"):
        problems(llava)


def test_the_processor_counts_other_tokens_than_the_model(llava) -> None:
    change(llava / "processor_config.json", num_additional_image_tokens=0)
    (problem,) = problems(llava)
    assert "would give an image 24 tokens, and the model makes 25" in problem


def test_a_patch_that_is_taken_for_a_class_token(tmp_path) -> None:
    qwen = hf_folder("qwen", tmp_path)
    assert problems(qwen) == []
    change(qwen / "config.json", vision_feature_select_strategy="default")
    problem, *_ = problems(qwen)
    assert "a patch of every image is lost" in problem


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_images_in_tiles(tmp_path, kind) -> None:
    save_llava(tmp_path, tie_word_embeddings=False, kind=kind)
    fits = ("--seq-length", "512")
    assert problems(tmp_path, None, *fits) == [] and not training_refuses(tmp_path, None, *fits)
    model = ModelConfig.from_hf_dir(str(tmp_path))
    change(tmp_path / "config.json", image_grid_pinpoints=[[20, 20], [40, 40]])
    (problem,) = problems(tmp_path, None, *fits)
    assert "image_grid_pinpoints are not those" in problem and training_refuses(tmp_path, None, *fits)
    (warning,) = model_files.sequence_warnings(model, 100)
    assert f"the largest image takes {model.image_tokens} of --seq-length 100 and leaves" in warning
    assert list(model_files.sequence_warnings(model, 192)) == []


def test_onevisions_processor_counts_other_tokens(tmp_path) -> None:
    save_llava(tmp_path, tie_word_embeddings=False, kind="llava_onevision")
    model, file = ModelConfig.from_hf_dir(str(tmp_path)), tmp_path / "processor_config.json"
    file.write_text(json.dumps({"num_image_tokens": 25, "vision_aspect_ratio": "anyres_max_2"}))
    assert list(model_files.image_warnings([str(tmp_path)], model)) == []
    file.write_text(json.dumps({"num_image_tokens": 24, "vision_aspect_ratio": "anyres_max_9"}))
    count, ratio = model_files.image_warnings([str(tmp_path)], model)
    assert "an image 24 tokens, and the model makes 25" in count and "'anyres_max_9', and" in ratio


def test_room_for_text() -> None:
    text = {"model_type": "llama", "max_position_embeddings": 1000}
    model = ModelConfig.from_hf({"model_type": "llava", "text_config": text, "image_token_index": 7})
    assert model.image_tokens == 576
    told = lambda length: list(model_files.sequence_warnings(model, length))  # noqa: E731
    assert told(720) == [] and told(1000) == []
    (warning,) = told(719)
    assert "an image takes 576 of --seq-length 719 and leaves 143 tokens" in warning
    assert warning.endswith("--seq-length 768 leaves 192")
    (warning,) = told(1001)
    assert "longer than the 1000 positions" in warning


def test_tokens_beside_tokenizer_json(llava) -> None:
    """Older folders have some in files of their own."""
    tokenizer = json.loads((llava / "tokenizer.json").read_text())
    image = next(token for token in tokenizer["added_tokens"] if token["content"] == "<image>")
    tokenizer["added_tokens"].remove(image)
    (llava / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    shutil.copy(llava / "tokenizer_config.json", llava / "kept.json")
    change(llava / "tokenizer_config.json", added_tokens_decoder=None)
    assert "no <image>" in problems(llava)[0]
    (llava / "added_tokens.json").write_text(json.dumps({"<image>": image["id"]}))
    assert problems(llava) == []


def test_datasets_of_a_mixture(llava) -> None:
    """Each one's template and images, as training says it too."""
    mix = llava / "mix.yaml"
    mix.write_text(
        "datasets:\n  a: {path: a, template: llama_3}\n  b: {path: b, image_aspect_ratio: anyres}\n"
        "  c: {path: c, template: plain, image_aspect_ratio: pad}\n"
    )
    model, flags = ModelConfig.from_hf_dir(str(llava)), ("--data-path", str(mix))
    (template,) = problems(llava, None, *flags)
    (images,) = model_files.uncut_problems(model, config(llava, *flags))
    assert template.startswith(f"--data-path {mix}: dataset a: --template llama_3: the tokenizer lacks ")
    assert images.startswith(f"--data-path {mix}: dataset b: image_aspect_ratio anyres: the model cuts no")
    processing = build_processing(config(llava, *flags), model)
    a, b, c = (Source(None, source, 0, 1) for source in MixtureConfig.load(str(mix)).sources)
    for source, told in ((a, template), (b, images)):
        with pytest.raises(ValueError) as raised:
            Mixture(str(mix), "train", (source,)).processings(processing)
        assert told.startswith(str(raised.value))
    Mixture(str(mix), "train", (c,)).processings(processing)
    mix.write_text("datasets: 3")  # what is wrong with the file is another check's to say
    assert problems(llava, None, *flags) == []
