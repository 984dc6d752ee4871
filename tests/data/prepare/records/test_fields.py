"""What other keys than the text say of a conversation: each is used, or named."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from megatron_vlm.data.prepare import sources
from megatron_vlm.data.prepare.build import Options, prepare
from megatron_vlm.data.prepare.records.shapes import to_conversation
from megatron_vlm.data.prepare.records.values import Rejected
from megatron_vlm.data.prepare.report import to_markdown
from tests.data.prepare.test_sources import write_table
from tests.data.tiny_data import samples_in

NAN = float("nan")


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def texts(record: dict[str, Any]) -> list[str]:
    return [message["content"] for message in to_conversation(record).messages]


UNTRAINED = [False, 0, 0.0, "0", "false", "False", "0.0", " no ", Decimal(0)]
TRAINED = [True, 1, 1.0, "1", "true", "TRUE", "1.0", None, NAN, "", []]


@pytest.mark.parametrize(
    "key", ["loss", "train", "weight", "loss_mask", "trainable", "is_trained", "train_on_turn", "loss_scale"]
)
def test_a_turn_that_another_trainer_would_not_train_is_not_trained(key: str) -> None:
    for value in UNTRAINED + TRAINED:
        found = to_conversation(
            {"messages": [user("q"), answer("BAD", **{key: value}), user("q2"), answer("good")]}
        )
        trained = [item["content"] for item in found.messages[1::2] if item.get("loss", True)]
        assert trained == (["good"] if value in UNTRAINED else ["BAD", "good"]), (key, value)
        assert not found.ignored and not found.notes


def test_masked_says_the_opposite_and_one_no_is_enough() -> None:
    def losses(*said: dict[str, Any]) -> list[bool]:
        turns = [turn for one in said for turn in (user("q"), answer("a", **one))]
        return [m.get("loss", True) for m in to_conversation({"messages": turns}).messages[1::2]]

    assert losses({"masked": True}, {"masked": "1"}, {"masked": 0}) == [False, False, True]
    assert losses({"weight": 1, "train": False}, {"weight": None, "loss": True}) == [False, True]
    pairs = [{"input": "q", "output": "a", "output_with_loss": False}, {"input": "q", "output": "b"}]
    assert [m.get("loss", True) for m in to_conversation({"conversation": pairs}).messages] == [
        True,
        False,
        True,
        True,
    ]
    # A question is never trained; who asks for it is told so.
    asked = to_conversation({"messages": [user("q", train=True), answer("a", train=True)]})
    assert asked.messages == [user("q"), answer("a")]
    assert asked.notes == ("loss asked for a question or a system turn, which is never trained",)
    for said in ({"train": False}, {"weight": 0.5}, {"mask": True}, {"loss_mask": [0, 1]}):
        found = to_conversation({"messages": [user("q", **said), answer("a")]})
        assert (found.messages, found.notes) == ([user("q"), answer("a")], ())


@pytest.mark.parametrize(
    "said, shown",
    [
        ({"weight": 0.5}, "weight 0.5"),
        ({"weight": "0.5"}, "weight '0.5'"),
        ({"weight": 2}, "weight 2"),
        ({"weight": 10**400}, "weight 1000"),
        ({"loss": "maybe"}, "loss 'maybe'"),
        ({"loss_mask": [0, 1, 1]}, "loss_mask \\[0, 1, 1\\]"),
        ({"mask": 1}, "mask 1: call it loss_mask, or masked"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "train_detail"),
    ],
)
def test_what_says_neither_is_refused_and_never_trained_in_full(said: dict[str, Any], shown: str) -> None:
    with pytest.raises(Rejected, match=shown) as error:
        to_conversation({"messages": [user("q"), answer("a", **said)]})
    assert error.value.reason == "unclear loss"


# The end of an assistant's turn in Qwen3's template, as its repository has it.
QWEN3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{%- set content = message.content %}"
    "{%- set reasoning_content = '' %}{%- if message.reasoning_content is string %}"
    "{%- set reasoning_content = message.reasoning_content %}{%- endif %}"
    "{%- if reasoning_content %}"
    "{{- '<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_written_as_qwen3_writes_it(key: str) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE())
    )
    for thought, said in (("because", "42"), ("\nso\n so\n\n", "\n\n42"), ("", "42"), (None, "42")):
        (_, found) = texts({"messages": [user("q"), answer(said, **{key: thought})]})
        message = answer(said, reasoning_content=thought)
        written = tokenizer.apply_chat_template([message], chat_template=QWEN3, tokenize=False)
        assert found == written
    parts = [{"type": "text", "text": "42"}]
    assert texts({"messages": [user("q"), {**answer("", **{key: "so"}), "content": parts}]})[1] == (
        "<think>\nso\n</think>\n\n42"
    )


def test_a_thought_that_is_there_twice_or_belongs_to_no_answer() -> None:
    own = "<think>so</think>42"
    assert texts({"messages": [user("q"), answer(own, reasoning="so")]})[1] == own
    with pytest.raises(Rejected, match="two thoughts"):
        to_conversation({"messages": [user("q"), answer(own, reasoning="thus")]})
    with pytest.raises(Rejected, match="empty answer"):
        to_conversation({"messages": [user("q"), answer("", reasoning="so")]})
    found = to_conversation({"messages": [user("q", reasoning="so"), answer("a")]})
    assert (found.messages[0]["content"], found.ignored) == ("q", {"messages[].reasoning": "so"})
    found = to_conversation({"messages": [user("q"), answer("a", thinking=False, reasoning=True)]})
    assert found.messages[1] == answer("a")
    assert found.ignored == {"messages[].thinking": False, "messages[].reasoning": True}


@pytest.mark.parametrize(
    "turn, reason",
    [
        (answer("see", tool_calls=[{}]), "tool calls"),
        (answer("see", function_call={"name": "f", "arguments": "{}"}), "tool calls"),
        ({"role": "tool", "content": "3"}, "unknown role"),
        ({"role": "observation", "content": "3"}, "unknown role"),
    ],
)
def test_calls_of_tools_are_refused_by_name(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(Rejected) as error:
        to_conversation({"messages": [user("q"), turn, answer("a")]})
    assert error.value.reason == reason and "content" in error.value.detail
    for none in (None, [], "[]", "", {"name": None}):
        assert texts({"messages": [user("q"), answer("a", tool_calls=none)]})


LINES = "What?\nA. x\nB. y"


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"options": ["x", "y"], "answer": "B"}, (LINES, "B")),
        ({"choices": ["x", "y"], "answer": 1}, (LINES, "B")),  # ScienceQA's index
        ({"choices": ["x", "y"], "answer": 0.0}, (LINES, "A")),
        ({"choices": ["x", "y"], "answer": "1"}, (LINES, "B")),
        ({"options": ["x", "y"], "answer": "y"}, (LINES, "y")),
        ({"options": ["x", "y"], "answer": "b"}, (LINES, "B")),
        ({"options": ["x", "y"], "answer": "It is y."}, (LINES, "It is y.")),
        ({"options": "['x', 'y']", "answer": "B"}, (LINES, "B")),  # MMMU
        ({"options": '["x", "y"]', "answer": "B"}, (LINES, "B")),
        ({"options": {"A": "x", "B": "y", "C": None}, "answer": "B"}, (LINES, "B")),
        ({"choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answer": "2"}, ("What?\n1. x\n2. y", "2")),
        ({"options": ["A. x", "B. y"], "answer": "B"}, (LINES, "B")),
        ({"options": ["(A) x", "(B) y"], "answer": "B"}, ("What?\n(A) x\n(B) y", "B")),
        ({"A": "x", "B": "y", "C": NAN, "answer": "B"}, (LINES, "B")),  # MMBench
        ({"options": ["1", "2"], "answer": "2"}, ("What?\nA. 1\nB. 2", "2")),
        ({"options": ["4", "1"], "answer": 1}, ("What?\nA. 4\nB. 1", "B")),
        ({"options": [3, 4], "answer": 4}, ("What?\nA. 3\nB. 4", "4")),
        ({"options": [3, 4], "answer": "4"}, ("What?\nA. 3\nB. 4", "4")),
    ],
)
def test_options_stand_below_the_question(fields: dict[str, Any], expected: tuple[str, str]) -> None:
    found = to_conversation({"question": "What?", **fields})
    assert [message["content"] for message in found.messages] == [*expected]
    assert not found.ignored


def test_options_that_are_there_already_or_that_the_answer_is_none_of() -> None:
    for lettered in (LINES, "What? (A) x (B) y", "What?\n**A.** x\n**B.** y", "What?\nA: x; B: y."):
        for options in (["x", "y"], ["A. x", "B. y"]):
            asked = {"question": lettered, "options": options, "answer": "A"}
            assert texts(asked) == [lettered, "A"]
    # Words of the question are no options that stand there.
    for question, first, second in (("What is 11 + 2?", "1", "2"), ("Is it a cat?", "a", "cat")):
        asked = {"question": question, "options": [first, second], "answer": "B"}
        assert texts(asked) == [f"{question}\nA. {first}\nB. {second}", "B"]
    for said in ("C", 2, -1, "7", ["A", "B"]):
        with pytest.raises(Rejected) as error:
            to_conversation({"question": "What?", "options": ["x", "y"], "answer": said})
        assert error.value.reason == "answer is none of its options"
    with pytest.raises(Rejected, match="an option and the index of another"):
        to_conversation({"question": "What?", "options": [2, 0, 1], "answer": 1})
    # Of a conversation, whose text is written, they are named.
    asked = {"messages": [user("What?"), answer("B")], "options": ["x", "y"]}
    assert to_conversation(asked).ignored == {"options": ["x", "y"]}


def test_names_of_objects_are_filled_in_and_boxes_are_refused() -> None:
    record = {
        "messages": [user("<image>Is the <ref-object> or the <ref-object> larger?"), answer("The sheep.")],
        "images": ["a.png"],
        "objects": {"ref": ["sheep", "dog"], "bbox": []},
    }
    found = to_conversation(record)
    assert found.messages[0]["content"] == "<image>Is the sheep or the dog larger?"
    assert not found.ignored and not found.notes
    with pytest.raises(Rejected, match="2 <ref-object>, 1 names"):
        to_conversation({**record, "objects": {"ref": ["sheep"]}})
    boxed = {**record, "messages": [user("<image>Where is the <ref-object>?"), answer("<bbox>")]}
    with pytest.raises(Rejected) as error:
        to_conversation({**boxed, "objects": {"ref": ["sheep"], "bbox": [[1, 2, 3, 4]]}})
    assert error.value.reason == "box without numbers"
    for objects in (
        [{"caption": "sheep", "bbox": [1, 2, 3, 4]}],
        '{"ref": ["sheep"], "bbox": [[1, 2, 3, 4]]}',
    ):
        with pytest.raises(Rejected, match="write <bbox> out"):
            to_conversation({**boxed, "objects": objects})
    assert texts({**record, "objects": json.dumps(record["objects"])}) == texts(record)
    boxed.pop("objects")
    assert "<bbox> in its text, which stays text" in to_conversation(boxed).notes


@pytest.mark.parametrize(
    "nothing",
    [None, NAN, "", "  ", [], [None], {}, {"bytes": None, "path": None}, [{"bytes": None, "path": ""}]],
)
def test_what_is_no_image(nothing: Any) -> None:
    for key in ("image", "images", "video_frames"):
        found = to_conversation({"messages": [user("q"), answer("a")], key: nothing})
        assert (found.images, found.notes, found.ignored) == ([], (), {})
        json.dumps(found.extra, allow_nan=False)
    assert to_conversation({"messages": [user("q"), answer("a")], "images": nothing, "image": "a.png"}).images


@pytest.mark.parametrize(
    "marker, kind",
    [
        ("<ImageHere>", "<ImageHere>"),
        ("<|image_pad|>", "<|image_pad|>"),
        ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"),
        (
            f"<|vision_start|>{'<|image_pad|>' * 9}<|vision_end|>",
            "<|vision_start|><|image_pad|>...<|vision_end|>",
        ),
        (f"<img>{'<IMG_CONTEXT>' * 9}</img>", "<img><IMG_CONTEXT>...</img>"),
        ("<img>", "<img>"),
        ("<img>a.png</img>", "<img>...</img>"),
        ("<image_placeholder>", "<image_placeholder>"),
        ("[IMG]", "[IMG]"),
        ("<IMG_CONTEXT>", "<IMG_CONTEXT>"),
        ("<|image|>", "<|image|>"),
        ("<image1>", "<imageN>"),
        ("<image_1>", "<image_N>"),
        ("<image 1>", "<image N>"),
        ("<|image_1|>", "<|image_N|>"),
        ("<start_of_image>", "<start_of_image>"),
    ],
)
def test_what_others_write_for_an_image(marker: str, kind: str) -> None:
    record = {"messages": [user(f"See {marker} here."), answer("a")], "images": ["a.png"]}
    found = to_conversation(record)
    assert (found.messages[0]["content"], found.images) == ("See <image> here.", ["a.png"])
    assert found.notes == (f"{kind} taken for <image>",)
    # Without an image, or beside <image>, or in an answer, it is text.
    stays = f"{kind} in its text, which stays text"
    for more in ({"images": None}, {"images": []}):
        found = to_conversation({**record, **more})
        assert (found.messages, found.images, found.notes) == (record["messages"], [], (stays,))
    for talk in ([user(f"<image>{marker}"), answer("a")], [user("<image>"), answer(f"a {marker}")]):
        found = to_conversation({**record, "messages": talk})
        assert (found.messages, found.notes) == (talk, (stays,))
    with pytest.raises(Rejected) as error:
        to_conversation({**record, "images": ["a.png", "b.png"]})
    assert error.value.reason == "markers and images differ"


def test_numbers_say_which_image() -> None:
    def images(text: str, *names: str) -> tuple[str, list[Any]]:
        found = to_conversation({"messages": [user(text), answer("a")], "images": [*names]})
        return found.messages[0]["content"], found.images

    assert images("<image2> or <image1>?", "1", "2") == ("<image> or <image>?", ["2", "1"])
    assert images("<image_1>, <image_0>", "0", "1") == ("<image>, <image>", ["1", "0"])
    assert images("<image 1> is <image 1>?", "1") == ("<image> is <image>?", ["1", "1"])
    for text in ("<image1> <image3>", "<image2>", "<image1> <ImageHere>", "<image1> <image2> <image3>"):
        with pytest.raises(Rejected, match="markers and images differ"):
            images(text, "1", "2")
    numbered = {"image_2": "two", "image_1": {"bytes": b"1", "path": None}, "image_3": None}
    found = to_conversation({"question": "<image 2> or <image 1>?", "answer": "a", **numbered})
    assert (found.images, found.ignored) == (["two", b"1"], {})


def test_every_key_is_used_or_named() -> None:
    record = {
        "id": 7,
        "messages": [user("q", name="Ann"), answer("a", name="Bo", weight=1, refusal=None)],
        "difficulty": "hard",
        "tags": [],
        "score": NAN,
        "images": None,
        "image": None,
    }
    assert to_conversation(record).ignored == {"messages[].name": "Ann", "difficulty": "hard"}
    url = {"type": "image_url", "image_url": "a.png", "cache_control": {"type": "ephemeral"}}
    talk = [{"role": "user", "content": [url, {"type": "text", "text": "q"}]}, answer("a")]
    found = to_conversation({"messages": talk, "image": "b.png"})  # the part's own image is the one shown
    assert found.images == ["a.png"]
    assert found.ignored == {"image": "b.png", "messages[].content[].cache_control": {"type": "ephemeral"}}
    asked = {"query": "q", "response": "a", "answer": "b", "solution": "s", "history": None, "system": "S"}
    assert to_conversation(asked).ignored == {"answer": "b", "solution": "s"}
    several = to_conversation({"question": "q", "answers": ["a", "b"]})
    assert several.notes == ("several answers, of which the first is trained",)


def test_a_record_that_is_nested_too_deeply_costs_only_itself(tmp_path: Path) -> None:
    nested = "[" * 900 + "]" * 900
    talk = json.dumps([user("q"), answer("a")])
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": "deep", "messages": {talk}, "more": {nested}}}\n{{"messages": {talk}}}\n')
    report = prepare(Options(input=(str(path),), save_dir=str(tmp_path / "out"), split=(1.0,)))
    assert report["kept"] == 1
    assert report["dropped"]["bad record"]["examples"] == [f"{path}:1 (id deep): it is nested too deeply"]


def test_the_report_names_what_was_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an example, where it stands and the user's own id, in each of several units."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 400)
    lines = [
        {"sample_id": f"s{i}", "messages": [user(f"q{i}"), answer("a")], "level": "hard\n" if i > 5 else None}
        for i in range(12)
    ]
    lines[3]["messages"][1]["weight"] = 0.5
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"question": "q", "answer": "a", "image": {"bytes": None, "path": None}, "level": "easy"}
    ]  # Arrow's null
    table = write_table(tmp_path / "b.parquet", rows)
    report = prepare(Options(input=(str(path), str(table)), save_dir=str(tmp_path / "out"), split=(1.0,)))
    assert report["ignored"] == {
        "sample_id": {"count": 11, "example": "s0", "where": f"{path}:1 (id s0)"},
        "level": {"count": 7, "example": "hard", "where": f"{path}:7 (id s6)"},
    }
    assert report["dropped"]["unclear loss"]["examples"] == [
        f"{path}:4 (id s3): weight 0.5: a turn is trained in full or not"
    ]
    assert f"- `level` in 7 records, e.g. `hard` in {path}:7 (id s6)" in to_markdown(report)
    assert len(samples_in(tmp_path / "out")) == 12
