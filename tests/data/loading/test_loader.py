"""The loader: order, counts, resume, and what stops it."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.energon.state import FlexState

import megatron_vlm.data.loading.encoder as encoder_module
import megatron_vlm.data.loading.loader as loader_module
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.batch import IGNORE_INDEX, Microbatch, Sample, collate
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loading.loader import ValidationLoader, build_train_loader
from megatron_vlm.data.loading.state import from_json, to_json
from megatron_vlm.data.preview.text import describe
from megatron_vlm.data.processing import Processing, build_processing, load_processing
from megatron_vlm.data.templates import SampleError
from megatron_vlm.plan.grouping import LengthGroups, Packing
from tests.data.tiny_data import MICRO_BATCH, asked, content, jpeg, make_samples, take
from tests.media import image_media, image_sizes
from tests.media import pixels as pixels_of


def samples_of(microbatch: Microbatch) -> list[tuple[str, list[int], list[int]]]:
    """Key, tokens and labels of each sample of a packed microbatch."""
    lengths = microbatch.lengths.tolist()
    ids, labels = (t[0].split(lengths) for t in (microbatch.input_ids, microbatch.labels))
    return [(k, i.tolist(), n.tolist()) for k, i, n in zip(microbatch.keys, ids, labels, strict=True)]


PACKING = Packing(buffer_size=20, capacity=120)
GROUPINGS = [None, PACKING, LengthGroups(buffer_size=20, size=MICRO_BATCH, in_a_row=2)]


@pytest.mark.parametrize("grouping", GROUPINGS, ids=["none", "packing", "by length"])
def test_global_batches_do_not_depend_on_the_data_parallel_size(make_loader: Any, grouping: Any) -> None:
    workers, rounds = 4, 6

    def by_round(dp_size: int) -> list[list[tuple[Any, ...]]]:
        """The microbatches in global order: round after round, workers in the order of their ids."""
        ranks = [make_loader(workers, rank, dp_size, grouping=grouping) for rank in range(dp_size)]
        each = workers // dp_size
        taken = [[take(loader, each) for _ in range(rounds)] for loader in ranks]
        for loader in ranks:
            loader.close()
        return [[m for rank in taken for m in rank[i]] for i in range(rounds)]

    alone = by_round(1)
    assert [m[-1] for m in alone[0]] == [0, 1, 2, 3]
    assert by_round(2) == alone
    assert by_round(4) == alone


@pytest.mark.parametrize("grouping", GROUPINGS, ids=["none", "packing", "by length"])
def test_an_epoch_holds_every_sample_once(make_loader: Any, grouping: Any) -> None:
    loader = make_loader(2, max_corrupt_rate=1.0, grouping=grouping)
    expected = {str(s["key"]) for s in make_samples(120) if s.get("jpg") != b"not a picture"}
    keys, counts = Counter[str](), Counter[str]()
    # Then a worker may begin its second epoch, or have samples of it in its buffer.
    reserve = 2 * MICRO_BATCH if grouping is None else 2 * 20
    while sum(keys.values()) < len(expected) - reserve:
        microbatch = next(loader)
        keys.update(microbatch.keys)
        counts.update(microbatch.counts)
    assert max(keys.values()) == 1
    assert set(keys) <= expected and counts["corrupt"] > 0
    assert counts["seen"] == sum(keys.values()) + counts["corrupt"] + counts["dropped"]
    assert loader.counts == {"truncated": 0, "dropped": 0, "corrupt": 0, **counts}


def test_the_seed_changes_the_order(make_loader: Any) -> None:
    first, again, other = (make_loader(1, seed=seed) for seed in (1, 1, 2))
    assert take(first, 3) == take(again, 3) != take(other, 3)


# Microbatches of each worker; an epoch has about 20, and at 17 the shuffle buffer is being emptied.
RESUMES = [(1, 1, None, 0.0, 24), (1, 2, None, 0.0, 17), (2, 1, None, 0.0, 24), (1, 2, None, 1000.0, 24)]
RESUMES += [(*sizes, grouping, 0.0, 24) for sizes in ((1, 2), (2, 1)) for grouping in GROUPINGS[1:]]
RESUMES += [(1, 2, grouping, 1000.0, 24) for grouping in GROUPINGS[1:]]  # a restore has something to repeat


@pytest.mark.parametrize("from_dp, to_dp, grouping, seconds, before", RESUMES, ids=str)
def test_resume_is_exact(
    from_dp: int,
    to_dp: int,
    grouping: Any,
    seconds: float,
    before: int,
    make_loader: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in the second epoch, with damaged pictures, counts, and at another data-parallel size."""
    monkeypatch.setattr(loader_module, "STATE_SECONDS", seconds)
    workers, after = 2, 12
    states: dict[str, Any] = {}
    expected: dict[int, list[Any]] = {}
    for rank in range(from_dp):
        loader = make_loader(workers, rank, from_dp, grouping=grouping)
        take(loader, before * workers // from_dp)
        states.update(json.loads(json.dumps(loader.state_dict())))
        for microbatch in take(loader, after * workers // from_dp):
            expected.setdefault(microbatch[-1], []).append(microbatch)
        loader.close()
    assert any(m[-2].get("corrupt") for taken in expected.values() for m in taken)
    resumed: dict[int, list[Any]] = {}
    for rank in range(to_dp):
        loader = make_loader(workers, rank, to_dp, grouping=grouping)
        loader.load_state_dict(states)
        assert loader.state_dict() == {w: states[str(w)] for w in loader.state_dict()}
        for microbatch in take(loader, after * workers // to_dp):
            resumed.setdefault(microbatch[-1], []).append(microbatch)
    assert resumed == expected


@pytest.mark.parametrize("workers, grouping", [(2, None), (1, PACKING), (4, PACKING)], ids=str)
def test_resume_at_any_microbatch_again_and_again(
    workers: int, grouping: Any, make_loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "STATE_SECONDS", 1000.0)  # a restore has something to repeat
    reference = make_loader(workers, grouping=grouping)
    expected = take(reference, 16)
    states: dict[int, Any] | None = None
    taken: list[Any] = []
    for steps in (3, 1, 2, 5, 5):  # odd numbers stop between the workers
        loader = make_loader(workers, grouping=grouping)
        if states is not None:
            loader.load_state_dict(states)
        loader.peek()  # the workers run ahead of what is taken
        taken += take(loader, steps)
        states = loader.state_dict()
        counts = loader.counts
        loader.close()
    assert taken == expected
    assert counts == reference.counts
    assert states is not None
    assert [state["microbatches"] for state in states.values()] == [16 // workers] * workers


def test_packed_samples_are_the_ones_that_are_encoded(
    make_loader: Any, dataset: PreparedDataset, processing: Processing
) -> None:
    """Whole, in sequences that are nearly full, with the pictures in the order of their places."""
    apart = make_loader(1, micro_batch_size=1)
    samples: dict[str, Microbatch] = {}
    while len(samples) < 114:
        microbatch = next(apart)
        samples.setdefault(microbatch.keys[0], microbatch)
    packed = make_loader(1, micro_batch_size=2, grouping=Packing(buffer_size=100, capacity=400))
    tokens = 0
    for _ in range(5):
        microbatch = next(packed)
        assert microbatch.packed and len(microbatch.input_ids) == 1
        assert microbatch.input_ids.shape[1] == int(microbatch.lengths.sum()) <= 2 * 400
        pixels = []
        for key, ids, labels in samples_of(microbatch):
            alone = samples[key]
            assert (ids, labels) == (alone.input_ids[0].tolist(), alone.labels[0].tolist())
            pixels.append(pixels_of(alone))
        assert torch.equal(pixels_of(microbatch), torch.cat([p for p in pixels if len(p)]))
        tokens += int(microbatch.lengths.sum())
    assert tokens > 0.95 * 5 * 2 * 400


def test_micro_batches_of_like_length(make_loader: Any) -> None:
    """Less padding than in order, and images and text apart but for a few."""

    def look(grouping: Any) -> tuple[float, int]:
        loader = make_loader(2, grouping=grouping, max_corrupt_rate=1.0)
        taken = [next(loader) for _ in range(24)]
        assert {len(m.input_ids) for m in taken} == {MICRO_BATCH}
        positions = sum(m.input_ids.numel() for m in taken)
        mixed = sum(0 < len(pixels_of(m)) < MICRO_BATCH for m in taken)
        return 1 - sum(int(m.lengths.sum()) for m in taken) / positions, mixed

    (before, mixed_before), (after, mixed_after) = (
        look(grouping) for grouping in (None, LengthGroups(buffer_size=60, size=MICRO_BATCH, in_a_row=2))
    )
    assert after < before / 4
    assert mixed_after <= 6 < mixed_before


def test_state_of_something_else_is_refused(
    make_loader: Any, dataset: PreparedDataset, dataset_dir: Path
) -> None:
    loader = make_loader(2)
    take(loader, 3)
    states = loader.state_dict()
    for options, message in [
        ({"data_workers": 4}, "--data-workers 4 differs from 2, .* go on with --data-workers 2"),
        ({"micro_batch_size": 2}, "--micro-batch-size 2 differs from 3"),
        ({"shuffle_buffer_size": 8}, "--shuffle-buffer-size 8 differs from 16"),
        ({"dataset": PreparedDataset.open(str(dataset_dir), "val")}, "the training data changed"),
        (
            {"grouping": PACKING},
            "with neither --packing nor --group-by-length, and this run has --packing "
            "--packing-buffer-size 20 --seq-length 120; go on as it was",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make_loader(**{"data_workers": 2, **options}).load_state_dict(states)
    with pytest.raises(ValueError, match="has 1 of 2 workers"):
        make_loader(2).load_state_dict({0: states[0]})
    with pytest.raises(ValueError, match="within a global batch"):
        make_loader(2).load_state_dict({0: states[1], 1: states[0]})
    identity = {name: value for name, value in states[0]["identity"].items() if name != "grouping"}
    for other, differing in (({"identity": identity}, "grouping"), ({"order": 1}, "order")):
        message = (
            rf"another version of this code \(it differs in {differing}\); go on with that version, or st"
        )
        with pytest.raises(ValueError, match=message):
            make_loader(2).load_state_dict({0: {**states[0], **other}, 1: states[1]})
    with pytest.raises(ValueError, match="can't be shared by 2 data-parallel ranks; try 2"):
        make_loader(3, dp_size=2)


def test_state_is_read_as_data_only() -> None:
    value = FlexState({"x": (1, [2, b"\x00\xff"], None), "y": FlexState()})
    restored = from_json(json.loads(json.dumps(to_json(value))))
    assert restored == value and type(restored) is FlexState and type(restored["x"]) is tuple
    with pytest.raises(TypeError, match="no JSON form"):
        to_json({"a plain dict": "is nothing that energon saves"})
    fields = {"index": 0, "run": 1}
    for crafted in ({"os.system": {"command": "true"}}, {"SliceState": fields}, {"tuple": {"0": 1}}):
        with pytest.raises(ValueError, match="data loader state"):
            from_json(crafted)


def test_too_many_corrupt_samples_stop_the_run(make_loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "MIN_SEEN_FOR_RATE", 40)
    loader = make_loader(1, max_corrupt_rate=0.01)
    with pytest.raises(
        ValueError, match=r"^--data-path .*are corrupt, more than --max-corrupt-rate 0.01 allows"
    ):
        take(loader, 100)
    take(make_loader(1, max_corrupt_rate=0.1), 100)


def test_nothing_usable_stops_the_run(
    make_loader: Any,
    monkeypatch: pytest.MonkeyPatch,
    folders: dict[str, Path],
    models: dict[str, ModelConfig],
) -> None:
    monkeypatch.setattr(encoder_module, "MAX_UNUSABLE_IN_A_ROW", 50)
    short = load_processing(str(folders["llava"]), models["llava"], seq_length=26, overlong="drop")
    loader = make_loader(1, processing=short)
    with pytest.raises(
        ValueError, match=r"50 samples in a row can't be used; the last one: sample \S+ of .* --seq-length 26"
    ):
        next(loader)


def test_an_unforeseen_error_is_not_skipped(make_loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Processing, "tokenize", broken)
    with pytest.raises(
        RuntimeError, match=r"(?s)ValueError: a bug.*tokenizing sample \S+ of \S+.tar \(id \d+\) failed"
    ):
        next(make_loader(1))


def test_overlong_samples(folders: dict[str, Path], models: dict[str, ModelConfig]) -> None:
    whole = load_processing(str(folders["qwen"]), models["qwen"], seq_length=500)
    reference = whole.encode("key", asked("What?", "A cat. " * 9), {"image": [jpeg(1)]})
    assert not reference.truncated
    length = len(reference.input_ids)
    for seq_length in (length, length - 1, length - 20):
        processing = load_processing(str(folders["qwen"]), models["qwen"], seq_length=seq_length)
        sample = processing.encode("key", asked("What?", "A cat. " * 9), {"image": [jpeg(1)]})
        assert sample.truncated == (seq_length < length)
        assert sample.input_ids == reference.input_ids[:seq_length]
        # What is cut off is not predicted either.
        assert sample.labels == reference.labels[: seq_length - 1] + [IGNORE_INDEX]
    dropping = load_processing(str(folders["qwen"]), models["qwen"], seq_length=length - 1, overlong="drop")
    with pytest.raises(SampleError, match=f"^{length} tokens are more than --seq-length {length - 1}$"):
        dropping.encode("key", asked("What?", "A cat. " * 9), {"image": [jpeg(1)]})
    image_end = max(i for i, t in enumerate(reference.input_ids) if t == whole.image_token_id) + 1
    for seq_length, message in ((image_end - 1, "its image does not fit"), (image_end + 1, "nothing of its")):
        processing = load_processing(str(folders["qwen"]), models["qwen"], seq_length=seq_length)
        with pytest.raises(SampleError, match=message):
            processing.encode("key", asked("What?", "A cat. " * 9), {"image": [jpeg(1)]})


def test_collate_pads_on_the_right() -> None:
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    media = image_media(image[None], [[3, 4]])
    samples = [Sample("a", [5, 6], [6, -100], media), Sample("b", [7, 8, 9], [-100, 9, -100])]
    microbatch = collate(samples, pad_token_id=1)
    assert microbatch.input_ids.tolist() == [[5, 6, 1], [7, 8, 9]]
    assert microbatch.labels.tolist() == [[6, -100, -100], [-100, 9, -100]]
    assert torch.equal(pixels_of(microbatch), image[None]) and microbatch.keys == ["a", "b"]
    assert image_sizes(microbatch) == [(3, 4)]
    assert collate(samples[1:], pad_token_id=1).media == {}
    both = pickle.loads(pickle.dumps(collate([samples[0], samples[0]], pad_token_id=1)))
    assert torch.equal(pixels_of(both), torch.stack([image, image]))
    assert image_sizes(both) == [(3, 4), (3, 4)] and both.keys == ["a", "a"]


def test_every_validation_pass_is_the_same(dataset_dir: Path, processing: Processing) -> None:
    """At any data-parallel size, each usable one of the first samples once, and no random number is drawn."""
    val = PreparedDataset.open(str(dataset_dir), "val")
    in_order = make_samples(140)[120:]
    for max_samples, dp_size in [(None, 1), (None, 3), (13, 1), (13, 2), (2, 3)]:
        usable = [str(s["key"]) for s in in_order[:max_samples] if s.get("jpg") != b"not a picture"]
        state, python_state = torch.get_rng_state(), random.getstate()
        passes: list[list[str]] = [[], [], []]
        for rank in range(dp_size):
            loader = ValidationLoader(
                val,
                processing,
                dp_rank=rank,
                dp_size=dp_size,
                micro_batch_size=MICRO_BATCH,
                max_samples=max_samples,
            )
            loader.start()
            for keys in passes:
                microbatches = list(loader)
                assert len(microbatches) <= loader.max_microbatches
                keys += [key for microbatch in microbatches for key in microbatch.keys]
            loader.close()
        assert passes == [usable] * 3
        assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state


def test_building_from_a_run_config(
    folders: dict[str, Path], models: dict[str, ModelConfig], dataset_dir: Path
) -> None:
    flags = ["--tokenizer-load-dir", str(folders["bare"]), "--data-path", str(dataset_dir)]
    flags += [
        "--lang",
        "en",
        "--seq-length",
        "200",
        "--template",
        "v1",
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "8",
    ]
    config = RunConfig.from_flags(flags)
    processing = build_processing(config, models["bare"])
    loader = build_train_loader(config, processing, dp_rank=1, dp_size=2)
    first = loader.peek()
    assert content(next(loader)) == content(first)
    assert first.worker == config.data_workers(2) // 2 and len(first.keys) == 2
    assert "A chat between" in describe(first, processing.tokenizer, processing.image_token_id)
    loader.close()
    # A tokenizer without image processor takes that of the checkpoint's folder.
    only_tokenizer = folders["bare"].parent / "only-tokenizer"
    processing.tokenizer.save_pretrained(only_tokenizer)
    config = RunConfig.from_flags(["--tokenizer-load-dir", str(only_tokenizer), "--data-path", "x"])
    assert build_processing(config, models["bare"], hf_dir=str(folders["bare"])).images.shape == (3, 20, 20)
    with pytest.raises(ValueError, match="no image processor"):
        build_processing(config, models["bare"])
