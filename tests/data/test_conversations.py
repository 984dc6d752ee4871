"""Turns read from JSON, the rules for unusual ones, and conversations on their way through the loader."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.data.batch import IGNORE_INDEX, Sample
from megatron_vlm.data.conversations import read_conversation, read_json, trainable_turns
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loading.loader import TrainLoader
from megatron_vlm.data.processing import Processing, load_processing
from megatron_vlm.data.templates import SampleError, Turn
from tests.data.tiny_data import jpeg, make_conversations, prepare, write_shards
from tests.media import pixels as pixels_of

SYSTEM, USER, ANSWER = Turn("system", "Be brief."), Turn("user", "What?"), Turn("assistant", "A cat.")


@pytest.fixture(scope="module")
def processing(folders: dict[str, Path], models: dict[str, ModelConfig]) -> Processing:
    return load_processing(str(folders["qwen"]), models["qwen"], seq_length=400)


def trained_text(sample: Sample, processing: Processing) -> str:
    text: str = processing.tokenizer.decode([label for label in sample.labels if label != IGNORE_INDEX])
    return text


def test_messages_become_turns() -> None:
    sample = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image> or <image>?", "weight": 3},
            {"role": "assistant", "content": "", "loss": False},
        ],
        "images": ["1.png", "0.jpg"],
        "id": 7,
    }
    turns, files = read_conversation(sample, {"0.jpg": b"a", "1.png": b"b", "wav": b"c"})
    assert turns == [SYSTEM, Turn("user", "<image> or <image>?"), Turn("assistant", "", loss=False)]
    assert files == {"image": [b"b", b"a"]}
    assert read_conversation({"messages": []}, {}) == ([], {})


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"messages": {}}, "its messages are no list"),
        ({"messages": ["hello"]}, r"its messages\[0\] is no object"),
        (
            {"messages": [{"role": "tool", "content": ""}]},
            "the role 'tool', not one of system, user, assistant",
        ),
        ({"messages": [{"role": ["user"], "content": ""}]}, r"the role \['user'\]"),
        ({"messages": [{"role": "user", "content": None}]}, r"the content of its messages\[0\] is no text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, r"messages\[0\] holds half of a character"),
        ({"messages": [{"role": "user", "content": "", "loss": 1}]}, "the loss 1, not true or false"),
        ({"messages": [], "images": "0.jpg"}, "its images are no list of file names"),
        ({"messages": [], "images": [0]}, "its images are no list of file names"),
        ({"messages": [], "images": ["0.jpg"]}, "its image 0.jpg is missing"),
    ],
)
def test_malformed_conversations_are_corrupt(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(SampleError, match=message) as error:
        read_conversation(sample, {"1.jpg": b""})
    assert error.value.kind == "corrupt"


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_corrupt(data: bytes) -> None:
    with pytest.raises(SampleError, match="its json can't be read") as error:
        read_json(data)
    assert error.value.kind == "corrupt"


@pytest.mark.parametrize("text, images", [("<image><image>", 1), ("", 1), ("<image>", 0)])
def test_markers_and_images_are_equal_in_number(text: str, images: int) -> None:
    names = [f"{i}.jpg" for i in range(images)]
    sample = {"messages": [{"role": "user", "content": text}], "images": names}
    with pytest.raises(SampleError, match=f"{text.count('<image>')} image markers, but {images} im") as error:
        read_conversation(sample, dict.fromkeys(names, b""))
    assert error.value.kind == "dropped"


def test_what_stands_before_the_first_question_is_left_out() -> None:
    greeting = Turn("assistant", "Hello!")
    assert trainable_turns([greeting, USER, ANSWER]) == [USER, ANSWER]
    assert trainable_turns([SYSTEM, greeting, greeting, USER, ANSWER]) == [SYSTEM, USER, ANSWER]
    # A question without an answer stays where it is.
    assert trainable_turns([USER, ANSWER, USER]) == [USER, ANSWER, USER]


@pytest.mark.parametrize(
    "turns, message",
    [
        ([], "none of its turns is an answer"),
        ([SYSTEM], "none of its turns is an answer"),
        ([USER], "none of its turns is an answer"),
        ([ANSWER], "none of its turns is an answer"),
        ([USER, Turn("assistant", "A cat.", loss=False)], "none of its turns is an answer"),
        ([ANSWER, USER], "none of its turns is an answer"),
        ([USER, SYSTEM, ANSWER], "a system turn stands behind"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "a system turn stands behind"),
        ([USER, Turn("assistant", "An <image>.")], "<image> stands in a turn that isn't the user's"),
        ([Turn("system", "<image>"), USER, ANSWER], "<image> stands in a turn that isn't the user's"),
    ],
)
def test_conversations_that_cannot_be_trained_are_dropped(turns: list[Turn], message: str) -> None:
    with pytest.raises(SampleError, match=message) as error:
        trainable_turns(turns)
    assert error.value.kind == "dropped"


def test_only_answers_with_loss_are_trained(processing: Processing) -> None:
    turns = [SYSTEM, USER, Turn("assistant", "One.", loss=False), USER, Turn("assistant", "Two."), USER]
    sample = processing.encode("key", turns, {})
    assert trained_text(sample, processing) == "Two.<|im_end|>"
    every = [SYSTEM, USER, Turn("assistant", "One."), USER, Turn("assistant", "Two."), USER]
    assert processing.encode("key", every, {}).input_ids == sample.input_ids
    assert trained_text(processing.encode("key", every, {}), processing) == "One.<|im_end|>Two.<|im_end|>"
    assert processing.encode("key", [ANSWER, USER, ANSWER], {}).input_ids == (
        processing.encode("key", [USER, ANSWER], {}).input_ids
    )


def test_images_stand_where_they_are_marked(processing: Processing) -> None:
    """Each in its turn and in its place, pixels in the same order."""
    pictures = [jpeg(i) for i in range(3)]
    turns = [Turn("user", "Is <image> in <image>?"), ANSWER, Turn("user", "And <image>?"), ANSWER]
    sample = processing.encode("key", turns, {"image": pictures})
    text = processing.tokenizer.decode(sample.input_ids)
    image = "<image>" * processing.model.image_tokens
    assert f"Is {image} in {image}?" in text and f"And {image}?" in text
    assert [pixels.tolist() for pixels in pixels_of(sample)] == [
        pixels.tolist() for pixels in processing.images.tiles(processing.images.open(pictures))
    ]


def test_cutting_a_long_conversation(folders: dict[str, Path], models: dict[str, ModelConfig]) -> None:
    """At the end: what is left is encoded as it was, and needs all its images and a trained token."""
    turns = [
        Turn("user", "<image>\nWhat?"),
        ANSWER,
        Turn("user", "And <image>?"),
        Turn("assistant", "Dogs. " * 9),
    ]
    quiet = [turns[0], Turn("assistant", "A cat.", loss=False), *turns[2:]]
    pictures = [jpeg(0), jpeg(1)]

    def encode(seq_length: int, turns: list[Turn]) -> Sample:
        made = load_processing(str(folders["qwen"]), models["qwen"], seq_length=seq_length)
        return made.encode("key", turns, {"image": pictures})

    whole, image = encode(900, turns), models["qwen"].image_token_id
    second_image_ends = max(i for i, token in enumerate(whole.input_ids) if token == image) + 1
    cut = encode(len(whole.input_ids) - 7, turns)
    assert cut.truncated and cut.input_ids == whole.input_ids[:-7]
    assert cut.labels == whole.labels[:-8] + [IGNORE_INDEX]
    # The first answer is trained as long as both images fit ...
    assert encode(second_image_ends, turns).labels[:-1] == whole.labels[: second_image_ends - 1]
    with pytest.raises(SampleError, match="its image does not fit"):
        encode(second_image_ends - 1, turns)
    # ... and if it has no loss, something of the second has to fit too.
    with pytest.raises(SampleError, match="nothing of its answer is left"):
        encode(second_image_ends, quiet)


def test_the_loader_reads_conversations(processing: Processing, tmp_path: Path) -> None:
    samples = make_conversations(40)
    write_shards(tmp_path, samples, 4)
    prepare(prepare_command(str(tmp_path), "1,0,0"))
    loader = TrainLoader(
        PreparedDataset.open(str(tmp_path)),
        processing,
        dp_rank=0,
        dp_size=1,
        data_workers=2,
        micro_batch_size=2,
    )
    keys, counts, images = Counter[str](), Counter[str](), Counter[str]()
    try:
        while len(keys) < 36:
            microbatch = next(loader)
            keys.update(microbatch.keys)
            counts.update(microbatch.counts)
            placeholders = (microbatch.input_ids == processing.image_token_id).sum().item()
            assert placeholders == len(pixels_of(microbatch)) * processing.model.image_tokens
            images.update(pixels=len(pixels_of(microbatch)))
    finally:
        loader.close()
    dropped = [s for s in samples if json.loads(s["json"])["id"] % 10 == 7]
    assert not {str(s["key"]) for s in dropped} & set(keys)
    assert counts["dropped"] >= len(dropped) == 4 and not counts["corrupt"]
    assert images["pixels"] > 0
