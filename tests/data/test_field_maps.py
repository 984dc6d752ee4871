"""Folders prepared for any class of energon's: fields are what energon reads, or the refusal says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from megatron import energon

from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.field_maps import NOT_TRAINED, SAMPLE_TYPES
from megatron_vlm.data.templates import SampleError, Turn
from tests.data.tiny_data import jpeg, prepare, write_shards

_JSON = {"q": "Which one?", "a": ["red", "blue"], "c": ["a cat", "a dog", "a cow"], "i": 1, "t": "STOP"}
SAMPLES: list[dict[str, Any]] = [
    {
        "key": f"{i}",
        "jpg": jpeg(i),
        "txt": f"Picture {i}.".encode(),
        "json": json.dumps({**_JSON, "i": i % 3}).encode(),
    }
    for i in range(4)
]
FIELD_MAPS = {
    "VQASample": {"image": "jpg", "context": "json[q]", "answers": "json[a]"},
    "VQAOCRSample": {"image": "jpg", "context": "json[q]", "answers": "txt", "text": "json[t]"},
    "CaptioningSample": {"image": "jpg", "caption": "txt"},
    "OCRSample": {"image": "jpg", "text": "json[t]", "words_text": "json[a]"},
    "MultiChoiceVQASample": {
        **{"image": "jpg", "context": "json[q]"},
        **{"choices": "json[c]", "correct_choice_idx": "json[i]"},
    },
    "TextSample": {"text": "txt"},
    "InterleavedSample": {"sequence": "json[a]"},
    "SimilarityInterleavedSample": {"images": "jpg", "texts": "json[a]"},
    "ImageSample": {"image": "jpg"},
    "ImageClassificationSample": {"image": "jpg", "label": "json[i]"},
    "VidQASample": {"video": "jpg", "context": "json[q]"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fields")
    write_shards(root, SAMPLES, shards=1)
    prepare(prepare_command(str(root), "1,0,0"))
    return root


def use(folder: Path, name: str, **changed: Any) -> None:
    module = "megatron.energon" if hasattr(energon, name) else "megatron.energon.flavors.vqa_and_ocr"
    kind = {"__module__": module, "__class__": name}
    config = {"sample_type": kind, "field_map": FIELD_MAPS[name], **changed}
    (folder / ".nv-meta/dataset.yaml").write_text(json.dumps(config))


def expected(name: str, sample: Any) -> tuple[str, str]:
    """Question and answer, of what energon's loader gives."""
    if name == "CaptioningSample":
        return "", sample.caption
    if name == "OCRSample":
        return "What is written in the image?", sample.text
    if name == "MultiChoiceVQASample":
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABC", sample.choices, strict=True))
        return f"{sample.context}\n{listed}", "ABC"[sample.correct_choice_idx]
    answers = sample.answers
    return sample.context, answers if isinstance(answers, str) else answers[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE_TYPES)
def test_fields_are_those_that_energon_reads(name: str, folder: Path) -> None:
    use(folder, name)
    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    loaded = energon.get_train_dataset(
        str(folder),
        worker_config=workers,
        batch_size=None,
        shuffle_buffer_size=None,
        repeat=False,
        max_samples_per_sequence=None,
    )
    theirs = {sample.__key__.rpartition("/")[2]: sample for sample in energon.get_loader(loaded)}
    dataset = PreparedDataset.open(str(folder))
    assert len(theirs) == dataset.num_samples == len(SAMPLES)
    for raw in dataset.pick(range(len(SAMPLES))):
        turns, files = dataset.read(raw)
        sample = theirs[raw.__key__.rpartition("/")[2]]
        question, answer = expected(name, sample)
        assert turns == [Turn("user", question), Turn("assistant", answer)]
        assert files == {"image": [raw.parts["jpg"]]}
    # Older folders name the class of the whole dataset.
    turns, _ = dataset.read(raw)
    old = {"__module__": "megatron.energon", "__class__": name.replace("Sample", "Webdataset")}
    (folder / ".nv-meta/dataset.yaml").write_text(json.dumps({**old, "field_map": FIELD_MAPS[name]}))
    assert PreparedDataset.open(str(folder)).read(raw)[0] == turns


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_other_classes_are_refused_by_name(name: str, folder: Path) -> None:
    use(folder, name)
    with pytest.raises(
        ValueError, match=f"prepared for {name}, which has .* CaptioningSample.*prepare.py"
    ) as e:
        PreparedDataset.open(str(folder))
    assert "\n" not in str(e.value) and "json[question]" not in str(e.value)


def test_every_class_of_energon_is_decided_on() -> None:
    kinds = [kind for kind in vars(energon).values() if isinstance(kind, type)]
    known = {kind.__name__ for kind in kinds if issubclass(kind, energon.Sample)} - {"Sample"}
    assert "CaptioningSample" in known and known <= {*SAMPLE_TYPES, *NOT_TRAINED}


@pytest.mark.parametrize(
    "changed", [{"i": 3}, {"i": -1}, {"i": "b"}, {"c": "abc"}, {"c": None}, {"c": [1, {}, 2]}]
)
def test_choices_that_cannot_be_read(changed: dict[str, Any], folder: Path) -> None:
    use(folder, "MultiChoiceVQASample")
    dataset = PreparedDataset.open(str(folder))
    (raw,) = dataset.pick([0])
    raw.parts["json"] = json.dumps({**_JSON, **changed}).encode()
    with pytest.raises(SampleError) as error:
        dataset.read(raw)
    assert error.value.kind == "corrupt"


@pytest.mark.parametrize(
    ("sample", "kind", "field_map"),
    [
        ({"jpg": b"", "txt": b""}, "CaptioningSample", {"image": "jpg", "caption": "txt"}),
        (
            {"png": b"", "json": b'{"caption": ""}'},
            "CaptioningSample",
            {"image": "png", "caption": "json[caption]"},
        ),
        (
            {"webp": b"", "json": b'{"question": "", "answer": ""}'},
            "VQASample",
            {"image": "webp", "context": "json[question]", "answers": "json[answer]"},
        ),
    ],
)
def test_the_command_names_fields_that_are_there(
    sample: dict[str, Any], kind: str, field_map: dict[str, str], tmp_path: Path
) -> None:
    write_shards(tmp_path, [{"key": "0", **sample}], shards=1)
    command = prepare_command(str(tmp_path), "1,0,0")
    assert f"--sample-type {kind} --field-map '{json.dumps(field_map, separators=(',', ':'))}'" in command
    prepare(command)
    PreparedDataset.open(str(tmp_path))
