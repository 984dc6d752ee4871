"""Prompts equal those of transformers' processors, and those that training saw; what is wrong is said."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import RUN_CONFIG
from megatron_vlm.artifacts.end_tokens import end_tokens
from megatron_vlm.config.generation import GenerationConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.inference.questions import Questions
from tests.data.tiny_data import asked, jpeg
from tests.tiny import save_llava


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as far as text and images go, and two pictures beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_llava(folder / "hf", tie_word_embeddings=False)
    for name, seed in (("a.jpg", 1), ("b.jpg", 2)):
        (folder / name).write_bytes(jpeg(seed))
    return folder


def ask(checkpoint: Path, *flags: str) -> Questions:
    config = GenerationConfig.from_flags(["--megatron-dir", str(checkpoint), "--max-new-tokens", "8", *flags])
    return Questions(config, checkpoint, ModelConfig.from_hf_dir(str(checkpoint / "hf")))


def test_a_prompt_equals_the_processors(checkpoint: Path) -> None:
    image, text = checkpoint / "a.jpg", "What is in this picture?"
    (prompt,) = ask(checkpoint, "--image", str(image), "--prompt", text).encode([0])
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": text}]
    expected = transformers.AutoProcessor.from_pretrained(checkpoint / "hf").apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert prompt.input_ids == expected["input_ids"][0].tolist()
    torch.testing.assert_close(
        prompt.media["image"].tensors["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6
    )


def test_a_prompt_with_images_in_tiles_equals_the_processors(tmp_path: Path) -> None:
    save_llava(tmp_path / "hf", tie_word_embeddings=False, kind="llava_next")
    files, text = [tmp_path / "a.jpg", tmp_path / "b.jpg"], "Which of them is a cat?"
    for seed, (file, size) in enumerate(zip(files, [(90, 31), (20, 55)], strict=True)):
        file.write_bytes(jpeg(seed, *size))
    (prompt,) = ask(tmp_path, "--image", *map(str, files), "--prompt", text).encode([0])
    content = [{"type": "image", "image": Image.open(file)} for file in files]
    expected = transformers.AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil").apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert prompt.input_ids == expected["input_ids"][0].tolist()
    assert torch.equal(prompt.media["image"].sizes, expected["image_sizes"])
    pixels = expected["pixel_values"].flatten(0, 1)
    pixels = pixels[pixels.flatten(1).any(1)]  # without the tiles that fill up
    torch.testing.assert_close(prompt.media["image"].tensors["pixel_values"], pixels, rtol=0, atol=2e-6)


@pytest.mark.parametrize("template", ["chat", "v1", "plain", "llama_2", "mistral", "llm_jp"])
def test_a_prompt_is_how_a_training_sample_begins(checkpoint: Path, template: str) -> None:
    flags = ["--image", str(checkpoint / "a.jpg"), "--prompt", "What is this?", "--template", template]
    questions = ask(checkpoint, *flags, "--lang", "jp" if template == "llm_jp" else "en")
    sample = questions.processing.encode("key", asked("What is this?", "It is 7."), {"image": [jpeg(1)]})
    first_trained = next(i for i, label in enumerate(sample.labels) if label >= 0) + 1
    (prompt,) = questions.encode([0])
    assert prompt.input_ids == sample.input_ids[: len(prompt.input_ids)]
    # The space before an answer is a token of its own or begins the answer's first, as the template has it.
    assert first_trained - 1 <= len(prompt.input_ids) <= first_trained


def test_what_training_was_told_is_the_default(checkpoint: Path, tmp_path: Path) -> None:
    trained = tmp_path / "iter_0000001"
    shutil.copytree(checkpoint, trained)
    RunConfig.from_flags(["--template", "v1", "--lang", "en", "--tokenizer-load-dir", "gone"]).save(
        str(trained / RUN_CONFIG)
    )
    said = ["--prompt", "Hello"]
    ids = ask(trained, *said).input_ids
    assert ids == ask(checkpoint, *said, "--template", "v1", "--lang", "en").input_ids
    assert ids != ask(checkpoint, *said).input_ids
    assert ask(trained, *said, "--template", "chat").input_ids == ask(checkpoint, *said).input_ids


def test_images_are_read_as_in_training(checkpoint: Path, tmp_path: Path) -> None:
    """As transformers loads a path, or as before there was a choice where the run's config has none."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(io.BytesIO(jpeg(1, 60, 40)))
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    said = ["--image", str(tmp_path / "turned.jpg"), "--prompt", "Hello"]
    processor = transformers.AutoProcessor.from_pretrained(checkpoint / "hf", backend="pil")

    def pixels(folder: Path, *flags: str) -> torch.Tensor:
        return ask(folder, *said, *flags).encode([0])[0].media["image"].tensors["pixel_values"]

    def expected(image: Any) -> torch.Tensor:
        return processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]

    turned, stored = expected(str(tmp_path / "turned.jpg")), expected(Image.open(tmp_path / "turned.jpg"))
    assert not torch.allclose(turned, stored, rtol=0, atol=1e-2)
    trained = tmp_path / "iter_0000001"
    shutil.copytree(checkpoint, trained)
    for folder, flags, right in (
        (checkpoint, [], turned),
        (checkpoint, ["--image-orientation", "stored"], stored),
        (trained, [], stored),
        (trained, ["--image-orientation", "exif"], turned),
    ):
        values = RunConfig.from_flags([]).to_dict()
        del values["data"]["image_orientation"], values["data"]["image_alpha"]
        (trained / RUN_CONFIG).write_text(json.dumps(values))
        torch.testing.assert_close(pixels(folder, *flags), right, rtol=0, atol=1e-5)


def test_a_templates_own_end_token_ends_an_answer(checkpoint: Path, tmp_path: Path) -> None:
    """Also where the folder's files name another."""
    trained = tmp_path / "iter_0000001"
    shutil.copytree(checkpoint, trained)
    (trained / "hf" / "generation_config.json").write_text('{"eos_token_id": 7}')
    questions = ask(trained, "--prompt", "Hello", "--template", "v1")
    assert questions.end_tokens == [7, questions.processing.tokenizer.eos_token_id]


def test_an_end_token_that_is_not_special_is_not_printed(checkpoint: Path, tmp_path: Path) -> None:
    trained = tmp_path / "iter_0000001"
    shutil.copytree(checkpoint, trained)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save_pretrained(trained / "hf")
    questions = ask(trained, "--prompt", "Hello", "--template", "chatml")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert questions.end_tokens == [2, end]
    said = tokenizer.encode("A cat.", add_special_tokens=False)
    assert questions.decode([*said, end]) == questions.decode(said) == "A cat."


def test_raw_prompts_get_nothing_but_the_start_token(checkpoint: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint / "hf")
    (ids,) = ask(checkpoint, "--raw-prompt", "--prompt", "The answer is").input_ids
    assert ids == tokenizer("The answer is")["input_ids"]
    image = str(checkpoint / "a.jpg")
    (ids,) = ask(checkpoint, "--raw-prompt", "--prompt", "<image>\nA cat", "--image", image).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 25  # 20 / 4 squared


def test_an_image_without_a_question_is_to_be_described(checkpoint: Path) -> None:
    questions = ask(checkpoint, "--image", str(checkpoint / "a.jpg"), "--lang", "en")
    assert "image" in questions.decode(questions.input_ids[0])


def test_input_file(checkpoint: Path) -> None:
    lines = [
        {"prompt": "What is this?", "image": "a.jpg", "id": 7},
        {"prompt": "Hello", "question_id": "q", "meta": {"answer": "Ho", "tokens": 3}},
        {"prompt": "<image> or <image>?", "image": ["a.jpg", str(checkpoint / "b.jpg")]},
    ]
    file = checkpoint / "in.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    questions = ask(checkpoint, "--input", str(file))
    assert [question.fields for question in questions.questions] == lines
    images = [prompt.media.get("image") for prompt in questions.encode(range(3))]
    assert [media and (media.items, media.rows) for media in images] == [(1, 1), None, (2, 2)]
    assert [prompt.number for prompt in questions.encode([1, 2])] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected an object such as"),
        ('{"id": 3}', "line 2: expected an object such as"),
        (
            '{"question": "Hi"}',
            "line 2: nothing reads 'question'; a question has prompt and image, and id, question",
        ),
        (
            '{"prompt": "Hi", "images": ["a.jpg"], "system": "x"}',
            "line 2: nothing reads 'images', 'system'; ",
        ),
        ('{"prompt": "Hi", "temperature": 1}', "line 2: nothing reads 'temperature'"),
        # It would be lost: the model's own stands there.
        ('{"prompt": "Hi", "answer": "Ho"}', "line 2: nothing reads 'answer'"),
        ('{"prompt": 3}', "line 2: prompt is 3; expected a text"),
        ('{"prompt": "Hi", "image": 3}', "line 2: image is 3; expected a file"),
        ('{"prompt": "Hi", "image": "no.jpg"}', "no.jpg: no such file"),
        (
            '{"prompt": "<image> <image>", "image": "a.jpg"}',
            "line 2: its text has 2 image markers, but 1 images",
        ),
        ('{"prompt": "<image>"}', "line 2: its text has 1 image markers, but 0 images"),
    ],
)
def test_bad_lines(checkpoint: Path, line: str, message: str) -> None:
    file = checkpoint / "bad.jsonl"
    file.write_text('{"prompt": "Hi"}\n' + line)
    with pytest.raises(ValueError, match=message):
        ask(checkpoint, "--input", str(file))


def test_an_image_that_cannot_be_decoded(checkpoint: Path) -> None:
    (checkpoint / "broken.jpg").write_bytes(jpeg(1)[:100])
    with pytest.raises(ValueError, match=r"broken.jpg: its image"):
        ask(checkpoint, "--image", str(checkpoint / "broken.jpg")).encode([0])


def test_a_request_longer_than_the_model(checkpoint: Path) -> None:
    length = len(ask(checkpoint, "--prompt", "Hi").input_ids[0])
    positions = ModelConfig.from_hf_dir(str(checkpoint / "hf")).language.max_position_embeddings
    fits = str(positions - length)
    assert ask(checkpoint, "--prompt", "Hi", "--max-new-tokens", fits)
    config = GenerationConfig.from_flags(["--megatron-dir", str(checkpoint), "--prompt", "Hi"])
    model = ModelConfig.from_hf_dir(str(checkpoint / "hf"))
    assert Questions(config, checkpoint, model).max_new_tokens == min(256, int(fits))
    with pytest.raises(ValueError, match=f"more than the model's {positions} positions; use .* {fits}$"):
        ask(checkpoint, "--prompt", "Hi", "--max-new-tokens", str(positions))
    with pytest.raises(ValueError, match="ask something shorter"):
        ask(checkpoint, "--prompt", "Hi " * positions)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [4, 5]}, "config.json": {"eos_token_id": 6}}, [4, 5]),
        ({"generation_config.json": {}, "config.json": {"text_config": {"eos_token_id": 6}}}, [6]),
        ({"config.json": {"eos_token_id": 3, "text_config": {}}}, [3]),
        ({"config.json": {}}, [2]),
    ],
)
def test_end_tokens(tmp_path: Path, files: dict[str, dict], expected: list[int]) -> None:
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert end_tokens(tmp_path, 2) == expected
