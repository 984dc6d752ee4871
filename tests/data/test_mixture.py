"""Mixtures in worker processes: proportions, each sample as often as the file says, exact resume, errors."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.artifacts.mixture import one_pass
from megatron_vlm.config.preview import PreviewConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.batch import Microbatch
from megatron_vlm.data.loading.loader import TrainLoader, ValidationLoader, build_train_loader
from megatron_vlm.data.mixture import Mixture
from megatron_vlm.data.preview.show import show
from megatron_vlm.data.processing import Processing, build_processing, load_processing
from megatron_vlm.plan.data_order import data_identity
from megatron_vlm.plan.grouping import Packing
from tests.data.tiny_data import content, make_conversations, make_samples, prepare, write_shards

WORKERS = (1, 2, 4)
TEXT = [sample for sample in make_samples(123) if "noimage" in str(sample["key"])]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets: 60, 27 and 18 training samples; the first two also have 12 and 9 for validation."""
    root = tmp_path_factory.mktemp("mixed")
    write_shards(root / "pictures", renamed("p", make_samples(72)), 6)
    write_shards(root / "talks", renamed("t", make_conversations(36)), 4)
    write_shards(root / "text", renamed("x", TEXT), 2)
    prepare(prepare_command(str(root / "pictures"), ratio="5,1,0"))
    prepare(prepare_command(str(root / "talks"), ratio="3,1,0"))
    prepare(prepare_command(str(root / "text"), ratio="1,0,0"))
    return root


def renamed(prefix: str, samples: list[dict[str, bytes | str]]) -> list[dict[str, bytes | str]]:
    return [{**sample, "key": f"{prefix}{sample['key']}"} for sample in samples]


@pytest.fixture(scope="module")
def processing(folders: dict[str, Path], models: dict[str, ModelConfig]) -> Processing:
    return load_processing(str(folders["llava"]), models["llava"], seq_length=1200, template="v1")


def write(data: Path, name: str = "mix", **datasets: str) -> str:
    """A mixture's file; values are what follows the path."""
    lines = [f"  {key}: {{path: {key}{', ' * bool(value)}{value}}}" for key, value in datasets.items()]
    (data / f"{name}.yaml").write_text("\n".join(["datasets:", *lines]))
    return str(data / f"{name}.yaml")


KILLED: dict[str, Any] = {"micro_batch_size": 1, "shuffle_buffer_size": 4, "max_corrupt_rate": 0.9}
KILLED["grouping"] = Packing(buffer_size=8, capacity=300)
EPOCHS = {"pictures": "subset: [0%, 50%]", "talks": "epochs: 2", "text": "epochs: 3"}
WEIGHTS = {"pictures": "weight: 5", "talks": "weight: 3, template: plain", "text": "weight: 2"}


@pytest.fixture
def make_loader(open_loader: Any, processing: Processing) -> Any:
    def make(path: str, data_workers: int, dp_rank: int = 0, dp_size: int = 1, **options: Any) -> TrainLoader:
        given = {"micro_batch_size": 2, "shuffle_buffer_size": 4, "max_corrupt_rate": 0.9, **options}
        data, process = given.pop("dataset", None) or Mixture.open(path), given.pop("processing", processing)
        loader: TrainLoader = open_loader(
            data, process, data_workers, dp_rank=dp_rank, dp_size=dp_size, **given
        )
        return loader

    return make


@pytest.mark.parametrize("workers", WORKERS)
def test_an_epoch_holds_every_sample_as_often_as_the_file_says(
    data: Path, make_loader: Any, workers: int
) -> None:
    path = write(data, **EPOCHS)
    mixture = Mixture.open(path)
    assert mixture.num_samples == one_pass(path) == 30 + 2 * 27 + 3 * 18
    loader = make_loader(path, workers, shuffle_buffer_size=1, micro_batch_size=1)
    shares = {worker: share(mixture, worker, workers) for worker in range(workers)}
    assert sum(shares.values()) == mixture.num_samples
    total, read = Counter[str](), Counter[int]()
    for _ in range(mixture.num_samples):  # more than enough, since some of the samples can't be used
        microbatch = next(loader)
        read[microbatch.worker] += microbatch.counts["seen"]
        if read[microbatch.worker] <= shares[microbatch.worker]:  # else it is of the worker's next epoch
            total.update(microbatch.keys)
    assert all(read[worker] >= shares[worker] for worker in range(workers))
    expected = dict.fromkeys(keys_of("p", make_samples(72)[:30]), 1)
    expected |= dict.fromkeys(keys_of("t", make_conversations(36)[:27]), 2)
    expected |= dict.fromkeys(keys_of("x", TEXT), 3)
    assert total == expected


def keys_of(prefix: str, samples: list[dict[str, bytes | str]]) -> list[str]:
    """Return the keys of the samples that can be used: neither damaged nor with an image too many."""
    return [
        f"{prefix}{sample['key']}"
        for number, sample in enumerate(samples)
        if sample.get("jpg") != b"not a picture" and (prefix != "t" or number % 10 != 7)
    ]


def share(mixture: Mixture, worker: int, workers: int) -> int:
    """Return what energon gives to a worker, asked of the built dataset."""
    from megatron.energon import WorkerConfig

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    offsets, total = 0, 0
    for loaded, source in zip(mixture.load(config), mixture.sources, strict=True):
        built = loaded.dataset.build(worker_rotation_offset=offsets % workers)
        total += built.len_worker(worker) * source.epochs
        offsets += len(loaded.dataset)
    return total


@pytest.mark.parametrize("workers", [1, 4])
def test_weights_are_shares_of_the_samples(data: Path, make_loader: Any, workers: int) -> None:
    path = write(data, **WEIGHTS)
    assert Mixture.open(path).num_samples == one_pass(path) == 60 + 27 + 18
    loader = make_loader(path, workers, shuffle_buffer_size=1, micro_batch_size=1)
    drawn: Counter[int] = Counter()
    for _ in range(400):
        drawn.update(next(loader).sources)
    usable = [
        5 * len(keys_of("p", make_samples(72)[:60])) / 60,
        3 * len(keys_of("t", make_conversations(36)[:27])) / 27,
        2 * len(keys_of("x", TEXT)) / 18,
    ]
    total = sum(drawn.values())
    for number, weight in enumerate(usable):
        p = weight / sum(usable)
        # Draws are independent: 4.5 standard deviations are exceeded once in 150,000 tests, at another seed.
        assert abs(drawn[number] - p * total) < 4.5 * math.sqrt(p * (1 - p) * total)


@pytest.mark.parametrize("datasets", [EPOCHS, WEIGHTS], ids=["epochs", "weights"])
@pytest.mark.parametrize(
    "workers, dp_size, packing", [(1, 1, False), (2, 1, False), (2, 2, True), (4, 2, False)]
)
def test_resume_is_exact(
    data: Path, make_loader: Any, datasets: dict[str, str], workers: int, dp_size: int, packing: bool
) -> None:
    """Into the second epoch, with damaged and dropped samples, from one rank to one or several."""
    path = write(data, **datasets)
    before, after = 44, 30  # microbatches of all workers; an epoch has about 67
    options: dict[str, Any] = {}
    if packing:
        before, after, options = 20, 20, {"grouping": Packing(10, 1200), "micro_batch_size": 1}
    loader = make_loader(path, workers, **options)
    for _ in range(before):
        next(loader)
    states = json.loads(json.dumps(loader.state_dict()))
    expected = [content(next(loader)) for _ in range(after // workers * workers)]
    loader.close()
    assert {source for microbatch in expected for source in microbatch[-3]} == {0, 1, 2}
    assert sum(m[-2].get("corrupt", 0) + m[-2].get("dropped", 0) for m in expected)
    ranks = [make_loader(path, workers, rank, dp_size, **options) for rank in range(dp_size)]
    for rank in ranks:
        rank.load_state_dict(states)
    resumed: list[Any] = []
    while len(resumed) < len(expected):
        for rank in ranks:
            resumed += [content(next(rank)) for _ in range(workers // dp_size)]
    assert resumed == expected


def train_until_killed(
    path: str, processing: Processing, workers: int, dp_size: int, until: int, saved: Path
) -> None:
    """A process that goes on from what was saved, saves every second global batch, and is killed later."""
    loaders = [
        TrainLoader(
            Mixture.open(path), processing, dp_rank=rank, dp_size=dp_size, data_workers=workers, **KILLED
        )
        for rank in range(dp_size)
    ]
    taken: list[list[Any]] = []
    if saved.exists():
        taken, states = pickle.loads(saved.read_bytes())
        for loader in loaders:
            loader.load_state_dict(json.loads(states))
    while True:
        taken.append([content(next(loader)) for loader in loaders for _ in range(workers // dp_size)])
        if len(taken) % 2 == 0:
            states = json.dumps({w: s for loader in loaders for w, s in loader.state_dict().items()})
            saved.with_suffix(".new").write_bytes(pickle.dumps((taken, states)))
            os.replace(saved.with_suffix(".new"), saved)
        if len(taken) >= until:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers, dp_sizes", [(1, [1, 1]), (2, [1, 2, 1]), (4, [2, 4, 1])])
def test_an_epoch_of_processes_that_are_killed(
    data: Path, make_loader: Any, processing: Processing, tmp_path: Path, workers: int, dp_sizes: list[int]
) -> None:
    """With packing, damaged samples and another data-parallel size each time: the global batches are those of
    a run that nothing disturbs, and each sample comes as often as the file says."""
    path, short = write(data, **EPOCHS), replace(processing, seq_length=300)
    mixture, calm = (
        Mixture.open(path),
        make_loader(write(data, **EPOCHS), workers, processing=short, **KILLED),
    )
    shares = [share(mixture, worker, workers) for worker in range(workers)]
    # Samples that wait in a worker's buffer may be of two epochs; between them are some that are left out.
    margin = 2 * KILLED["grouping"].buffer_size
    early, whole, read = Counter[str](), Counter[str](), Counter[int]()
    expected: list[list[Any]] = []
    while any(read[worker] < samples + margin for worker, samples in enumerate(shares)):
        microbatches = [next(calm) for _ in range(workers)]
        expected.append(list(map(content, microbatches)))
        for microbatch in microbatches:
            worker = microbatch.worker
            read[worker] += microbatch.counts["seen"]
            whole.update(microbatch.keys)
            if read[worker] <= shares[worker] - margin:
                early.update(microbatch.keys)
    times = dict.fromkeys(keys_of("p", make_samples(72)[:30]), 1)
    times |= dict.fromkeys(keys_of("t", make_conversations(36)[:27]), 2)
    times |= dict.fromkeys(keys_of("x", TEXT), 3)
    assert early.keys() <= times.keys() == whole.keys()
    assert all(early[key] <= times[key] <= whole[key] for key in times)
    assert calm.counts["corrupt"] and calm.counts["dropped"]

    saved, process = tmp_path / "saved", multiprocessing.get_context("fork").Process
    until = len(expected) // 2 * 2
    for number, dp_size in enumerate(dp_sizes, 1):
        end = until * number // len(dp_sizes) // 2 * 2 + (number < len(dp_sizes))  # one more than is saved
        leg = process(target=train_until_killed, args=(path, short, workers, dp_size, end, saved))
        leg.start()
        leg.join(120)
        assert leg.exitcode == -signal.SIGKILL
        assert pickle.loads(saved.read_bytes())[0] == expected[: end // 2 * 2]


def test_a_changed_mixture_is_refused(data: Path, make_loader: Any) -> None:
    path = write(data, **WEIGHTS)
    loader = make_loader(path, 2)
    next(loader)
    next(loader)
    states = loader.state_dict()
    loader.close()
    (text,) = [data / "text"]
    for datasets, message in [
        ({**WEIGHTS, "text": "weight: 3"}, "dataset text had weight 2, and has weight 3; go on with the old"),
        ({**WEIGHTS, "text": "weight: 2, subset: [0%, 50%]"}, r"and has weight 2, subset \[0%, 50%\]"),
        ({**WEIGHTS, "talks": "weight: 3"}, "dataset talks had weight 3, template plain, and has weight 3"),
        (
            dict(reversed(WEIGHTS.items())),
            "in the order pictures, talks, text, and now text, talks, pictures",
        ),
        ({"pictures": "weight: 5", "talks": WEIGHTS["talks"]}, r"dataset text \(weight 2\) is gone"),
        (EPOCHS, "dataset pictures had weight 5, and has epochs 1, subset"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            make_loader(write(data, **datasets), 2).load_state_dict(states)
        assert "\n" not in str(raised.value)
    uuid = text / ".nv-meta" / "index.uuid"
    before = uuid.read_text()
    uuid.write_text("another")  # as a new prepare leaves it
    try:
        with pytest.raises(ValueError, match="the training data changed since the checkpoint"):
            make_loader(write(data, **WEIGHTS), 2).load_state_dict(states)
    finally:
        uuid.write_text(before)
    with pytest.raises(ValueError, match="--data-workers 4 differs from 2"):
        make_loader(path, 4).load_state_dict(states)
    alone = Mixture.open(str(data / "text"))
    message = "it was of pictures, talks, text, and is a single dataset; go on with the old one"
    with pytest.raises(ValueError, match=message):
        make_loader(path, 2, dataset=alone).load_state_dict(states)
    make_loader(path, 2).load_state_dict(states)


def test_each_dataset_is_encoded_in_its_own_way(data: Path, make_loader: Any, processing: Processing) -> None:
    def rendered(microbatch: Microbatch) -> str:
        ids = microbatch.input_ids[0].tolist()
        return str(processing.tokenizer.decode(ids))

    path = write(data, pictures="overlong: drop", talks="template: plain", text="template: v1, lang: en")
    loader = make_loader(path, 1, micro_batch_size=1)
    texts: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for _ in range(40):
        microbatch = next(loader)
        texts[microbatch.sources[0]].append(rendered(microbatch))
    assert all("ASSISTANT:" in text for text in texts[0] + texts[2])
    assert all("ASSISTANT" not in text and "Question" not in text for text in texts[1]) and texts[1]
    english = "A chat between a curious user"
    assert all(english in text for text in texts[2]) and not any(english in text for text in texts[0])
    cut = processing.varied(overlong="drop")
    assert cut.overlong == "drop" and cut.template is processing.template
    with pytest.raises(ValueError, match=r"dataset talks: .*gemma"):
        make_loader(write(data, pictures="", talks="template: gemma"), 1)


def test_validation_takes_from_every_dataset_that_has_a_val_split(data: Path, processing: Processing) -> None:
    """Each usable one of the first samples once, in proportion, whatever the weights."""
    mixture = Mixture.open(write(data, **WEIGHTS), "val")
    assert mixture.names == ("pictures", "talks") and mixture.num_samples == 12 + 9
    pictures, talks = make_samples(72)[60:], make_conversations(36)[27:]
    for max_samples, dp_size, counts in [
        (None, 1, (12, 9)),
        (None, 3, (12, 9)),
        (7, 2, (4, 3)),
        (1, 3, (0, 1)),
    ]:
        assert mixture.first_samples(max_samples or 21) == counts
        keys: Counter[str] = Counter()
        for rank in range(dp_size):
            loader = ValidationLoader(
                mixture,
                processing,
                dp_rank=rank,
                dp_size=dp_size,
                micro_batch_size=2,
                max_samples=max_samples,
            )
            loader.start()
            passes = [[key for microbatch in loader for key in microbatch.keys] for _ in range(2)]
            loader.close()
            assert passes[0] == passes[1]
            keys.update(passes[0])
        expected = keys_of("p", pictures[: counts[0]])
        expected += [f"t{s['key']}" for s in talks[: counts[1]] if int(str(s["key"])) % 10 != 7]
        assert keys == Counter(expected)
    with pytest.raises(ValueError, match="none of its datasets has a val split"):
        Mixture.open(write(data, text=""), "val")


def test_what_is_wrong_with_a_dataset_says_which(data: Path, make_loader: Any, tmp_path: Path) -> None:
    where = "--data-path .*mix.yaml: dataset"
    with pytest.raises(ValueError, match=f"^{where} none: .*/none: no such folder; give one that "):
        Mixture.open(write(data, text="", none=""))
    with pytest.raises(ValueError, match=rf"^{where} text: subset \[0, 19\] reaches beyond its 18 samples"):
        Mixture.open(write(data, text="subset: [0, 19]"))
    shutil.copytree(data / "text", tmp_path / "text")
    (tmp_path / "text" / "000001.tar").unlink()
    with pytest.raises(ValueError, match=f"^{where} text: .* shard 000001.tar is missing"):
        Mixture.open(write(tmp_path, text=""))
    few = write(data, pictures="weight: 1", text="weight: 1, subset: [0, 3]")
    with pytest.raises(ValueError, match=f"{where} text: 3 samples .* fewer than --data-workers 4"):
        make_loader(few, 4)


def test_the_preview_shows_samples_of_each_dataset(
    data: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(data, pictures="epochs: 1, subset: [30, end]", talks="template: plain", text="epochs: 2")
    flags = ["--data-path", path, "--tokenizer-load-dir", str(folders["llava"]), "--template", "v1", "--json"]
    show(PreviewConfig.from_flags([*flags, "--samples", "2"]))
    shown = json.loads(capsys.readouterr().out)
    views = [(view["key"], view["shard"].partition("/")[0]) for view in shown["views"]]
    keys = [str(sample["key"]) for sample in TEXT[:2]]
    assert views == [
        ("p00030", "pictures"),
        ("p00031-noimage", "pictures"),
        *[("t00000", "talks"), ("t00001", "talks")],
        *[(f"x{key}", "text") for key in keys],
    ]
    assert shown["template"] == "v1, plain"
    assert ["ASSISTANT:" in view["text"] for view in shown["views"]] == [True, True, False, False, True, True]
    show(PreviewConfig.from_flags([*flags, "--keys", f"x{keys[1]}", "p00001"]))
    shown = json.loads(capsys.readouterr().out)
    assert [view["key"] for view in shown["views"]] == [f"x{keys[1]}", "p00001"]
    with pytest.raises(ValueError, match="there is no sample y"):
        show(PreviewConfig.from_flags([*flags, "--keys", "y"]))


@pytest.mark.parametrize("flags", [[], ["--packing", "--train-iters", "3"], ["--group-by-length"]])
def test_the_launcher_knows_what_a_loader_saves(
    data: Path, folders: dict[str, Path], models: dict[str, ModelConfig], flags: list[str]
) -> None:
    for path in (write(data, **EPOCHS), write(data, **WEIGHTS), str(data / "pictures")):
        argv = ["--data-path", path, "--tokenizer-load-dir", str(folders["llava"]), "--seq-length", "120"]
        config = RunConfig.from_flags([*argv, "--global-batch-size", "8", *flags])
        loader = build_train_loader(config, build_processing(config, models["llava"]), 0, 1)
        state = loader.state_dict()
        loader.close()
        assert data_identity(config, len(state)) == state[0]["identity"]
