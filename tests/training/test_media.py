"""A made-up kind of media, rows of numbers, beside images: from shards to a checkpoint, by what
``tests/vectors.py`` describes alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.batch import IGNORE_INDEX, Microbatch
from megatron_vlm.data.loading.loader import build_train_loader
from megatron_vlm.data.processing import Processing, build_processing
from megatron_vlm.data.templates import SampleError
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.formats.native import NativeReader
from tests.data.tiny_data import asked, content, jpeg, prepare, write_shards
from tests.distributed import Pool
from tests.tiny import save_llava
from tests.training.conftest import Trainable
from tests.training.test_evaluate import forget
from tests.training.test_layouts import layout_flags
from tests.training.test_run import metrics
from tests.vectors import TOKEN, TOKEN_ID, WIDTH, begin, registered, train_with_vectors
from tests.workers import Layout

ALL = ["--train-modules", "all"]
PACKING = ["--packing", "--packing-buffer-size", "20", "--seq-length", "200"]


def rows(number: int, item: int) -> list[list[float]]:
    """The rows of an item of a sample: one to three, which no two items share."""
    drawn = np.random.default_rng([number, item]).normal(size=(1 + (number + item) % 3, WIDTH))
    return drawn.round(3).tolist()


def make_records(count: int) -> list[dict[str, bytes | str]]:
    """Conversations without media, with images, with vectors, and with both; one vector is damaged."""
    samples: list[dict[str, bytes | str]] = []
    for number in range(count):
        images = ["0.jpg"] * (number % 4 in (1, 3))
        vectors = ["0.nums", "1.nums"][: number % 4 // 2 * (1 + number % 5 // 3)]
        markers = ["<image>"] * len(images) + ["<numbers>"] * len(vectors)
        question = " and ".join(reversed(markers)) + f" What of {number}?"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"Answer {number}."},
        ]
        sample: dict[str, bytes | str] = {"key": f"{number:05d}", **{name: jpeg(number) for name in images}}
        for item, name in enumerate(vectors):
            sample[name] = b"[" if number == 22 else json.dumps(rows(number, item)).encode()
        record = {"id": number, "messages": messages, "images": images, "vectors": vectors}
        samples.append({**sample, "json": json.dumps(record).encode()})
    return samples


@pytest.fixture(scope="module")
def vectors(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Trainable:
    """A LLaVA that takes vectors too, and samples with images and vectors."""
    root = tmp_path_factory.mktemp("vectors")
    save_llava(root / "hf", tie_word_embeddings=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "hf")
    tokenizer.add_tokens([tokenizers.AddedToken(TOKEN, special=True, normalized=False)])
    tokenizer.save_pretrained(root / "hf")
    import_hf(root / "hf", root / "images", tp=1, pp=1)
    write_shards(root / "data", make_records(120), 6)
    prepare(prepare_command(str(root / "data"), "1,0,0"))
    data = root / "data"
    pool.run(
        1, begin, Trainable(root / "images", root / "hf", data, data).flags(root, "begin"), root / "start"
    )
    return Trainable(root / "start" / "iter_0000000", root / "hf", data, data)


@pytest.fixture
def processing(vectors: Trainable, tmp_path: Path) -> Iterator[Processing]:
    config = RunConfig.from_flags(vectors.flags(tmp_path, "unused"))
    with registered():
        yield build_processing(config, ModelConfig.from_hf_dir(str(vectors.hf)))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def train(
    pool: Pool, vectors: Trainable, folder: Path, layout: Layout, name: str, *flags: str, iterations: int = 8
) -> list[float]:
    argv = vectors.flags(folder, name, *ALL, *layout_flags(layout), "--train-iters", str(iterations), *flags)
    pool.run(layout.world, train_with_vectors, argv)
    return losses(folder / name)


def read(vectors: Trainable, processing: Processing, count: int, *flags: str) -> list[Microbatch]:
    """The first micro batches of a run on one rank."""
    config = RunConfig.from_flags(vectors.flags(Path("unused"), "read", *flags))
    loader = build_train_loader(config, processing, 0, 1)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.parametrize("flags", [[], PACKING], ids=["padded", "packed"])
def test_rows_come_in_the_order_of_their_places(
    vectors: Trainable, processing: Processing, flags: list[str]
) -> None:
    found = 0
    for microbatch in read(vectors, processing, 20, *flags):
        numbers = [int(key.rpartition("/")[2]) for key in microbatch.keys]
        items = [
            rows(number, item)
            for number in numbers
            for item in range(number % 4 // 2 * (1 + number % 5 // 3))
        ]
        assert 22 not in numbers
        media = microbatch.media.get("vector")
        assert (media is None) == (not items)
        assert ("image" in microbatch.media) == any(number % 4 in (1, 3) for number in numbers)
        if media is not None:
            assert media.sizes.tolist() == [[len(item)] for item in items]
            assert media.tensors["values"].tolist() == [row for item in items for row in item]
            found += media.items
        assert int((microbatch.input_ids == TOKEN_ID).sum()) == sum(map(len, items))
    assert found > 10


def test_the_loader_goes_on_amid_an_epoch(vectors: Trainable, processing: Processing, tmp_path: Path) -> None:
    config = RunConfig.from_flags(vectors.flags(tmp_path, "read"))
    loader = build_train_loader(config, processing, 0, 1)
    for _ in range(7):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [content(next(loader)) for _ in range(8)]
    loader.close()
    again = build_train_loader(config, processing, 0, 1)
    again.load_state_dict({int(worker): own for worker, own in state.items()})
    assert [content(next(again)) for _ in range(8)] == expected
    again.close()


def test_what_can_not_be_used(processing: Processing) -> None:
    """As with images: more places than items, a place outside a question, a file that can't be read."""
    for text, files, message in (
        (
            "<numbers> and <numbers>?",
            [rows(1, 0)],
            "its text has 2 vector markers, but 1 vec",
        ),
        ("What?", [rows(1, 0)], "its text has 0 vector markers, but 1 vec"),
    ):
        encoded: Any = {"vector": [json.dumps(item).encode() for item in files]}
        with pytest.raises(SampleError, match=message):
            processing.encode("key", asked(text, "A cat."), encoded)
    with pytest.raises(SampleError, match="<numbers> stands in a turn that isn't the user's"):
        processing.encode("key", asked("What?", "<numbers>"), {})
    with pytest.raises(SampleError, match="its vector can't be read") as error:
        processing.encode("key", asked("<numbers>?", "A cat."), {"vector": [b"["]})
    assert error.value.kind == "corrupt"
    with pytest.raises(SampleError, match="does not fit"):
        rows_of_many = [json.dumps(rows(1, 0) * 60).encode()]
        processing.encode("key", asked("What of <numbers>?", "A cat."), {"vector": rows_of_many})


def reference_loss(vectors: Trainable, processing: Processing, microbatches: list[Microbatch]) -> float:
    """By transformers' language model, with rows times a matrix put where their placeholders are."""
    net = transformers.LlavaForConditionalGeneration.from_pretrained(vectors.hf).eval()
    reader = NativeReader(vectors.checkpoint)
    weight, bias = (reader.read(f"vector_projection.{name}").double() for name in ("weight", "bias"))
    processor = transformers.AutoImageProcessor.from_pretrained(vectors.hf, use_fast=False)
    total, trained = 0.0, 0
    for microbatch in microbatches:
        ids, labels = microbatch.input_ids, microbatch.labels
        embedded = net.get_input_embeddings()(ids).detach()
        if "vector" in microbatch.media:
            values = microbatch.media["vector"].tensors["values"]
            embedded[ids == TOKEN_ID] = (values @ weight.T + bias).float()
        if "image" in microbatch.media:
            pixels = processor(
                list(microbatch.media["image"].tensors["pixels"]),
                do_resize=False,
                do_center_crop=False,
                return_tensors="pt",
            )["pixel_values"]
            with torch.no_grad():
                features = net.model.get_image_features(pixel_values=pixels).pooler_output
            embedded[ids == processing.image_token_id] = torch.cat(list(features))
        with torch.no_grad():
            logits = net.lm_head(net.model.language_model(inputs_embeds=embedded).last_hidden_state)
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).double(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        trained += int((labels != IGNORE_INDEX).sum())
    return total / trained


def test_the_first_loss_is_that_of_transformers(
    pool: Pool, vectors: Trainable, processing: Processing, tmp_path: Path
) -> None:
    microbatches = read(vectors, processing, 8, "--global-batch-size", "16")
    kinds = {frozenset(microbatch.media) for microbatch in microbatches}
    assert frozenset(("image", "vector")) in kinds
    layout = Layout(tp=2, pp=2, sequence_parallel=True)
    (found,) = train(pool, vectors, tmp_path, layout, "run", "--global-batch-size", "16", iterations=1)
    assert found == pytest.approx(reference_loss(vectors, processing, microbatches), rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        (Layout(tp=2, pp=2), []),
        (Layout(tp=2, pp=2, sequence_parallel=True), PACKING),
        # Ranks of one sample each: most of their micro batches lack a kind that the other rank's have.
        (Layout(tp=2, dp=2, distributed_optimizer=True), ["--micro-batch-size", "1"]),
    ],
    ids=["padded", "packed", "one by one"],
)
def test_every_layout_trains_alike(
    pool: Pool, vectors: Trainable, tmp_path: Path, layout: Layout, flags: list[str]
) -> None:
    expected = train(pool, vectors, tmp_path, Layout(), "one", *flags, "--no-save")
    found = train(pool, vectors, tmp_path, layout, "many", *flags, "--no-save")
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(expected[-3:]) < 0.9 * sum(expected[:3])
    assert [line["images"] for line in metrics(tmp_path / "many")] == [
        line["images"] for line in metrics(tmp_path / "one")
    ]


def test_a_run_goes_on_bit_for_bit_and_its_checkpoint_names_the_connector(
    pool: Pool, vectors: Trainable, tmp_path: Path
) -> None:
    layout = Layout(tp=2, pp=2)
    flags = ["--save-optim", "--save-interval", "4"]
    calm = train(pool, vectors, tmp_path, layout, "calm", *flags)
    shutil.copytree(tmp_path / "calm", tmp_path / "run")
    forget(tmp_path / "run", 8)
    assert train(pool, vectors, tmp_path, layout, "run", *flags) == calm
    last = tmp_path / "run/checkpoints/iter_0000008"
    name = "vector_projection.weight"
    assert read_manifest(last)["tensors"][name]["shape"] == [32, WIDTH]
    before, after = (
        NativeReader(folder).read("vector_projection.weight") for folder in (vectors.checkpoint, last)
    )
    assert not torch.equal(before, after)
    # No model of transformers can hold it: that is said by its name.
    with pytest.raises(ValueError, match="vector_projection"):
        export_hf(last, tmp_path / "hf")
