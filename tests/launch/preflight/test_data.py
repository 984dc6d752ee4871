"""What the preflight finds in datasets and mixtures, and in a run that goes on with other ones."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megatron_vlm.artifacts.checkpoint import write_tracker
from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch import preflight, report
from megatron_vlm.launch.launch_plan import make_plan
from megatron_vlm.launch.preflight.dataset_files import held_out_problems
from megatron_vlm.plan.data_order import data_identity, held_out_identity
from tests.launch.conftest import write_checkpoint, write_dataset, write_json
from tests.launch.preflight.conftest import BASE, inspect, problem, warning

pytestmark = pytest.mark.usefixtures("here")


def test_an_epoch_shorter_than_a_batch(workplace) -> None:
    base = ["--name", "run", "--save-dir", "runs", "--data-path", "data", "--megatron-load-dir", "ckpt"]
    plan = make_plan(RunConfig.from_flags(base), {"CUDA_VISIBLE_DEVICES": ""}, [])
    (told,) = preflight.inspect(plan).problems
    assert "its train split of 9 samples is less than one iteration of --global-batch-size 128" in told
    plan = make_plan(RunConfig.from_flags([*base, "--epochs", "14"]), {"CUDA_VISIBLE_DEVICES": ""}, [])
    (told,) = preflight.inspect(plan).problems
    assert told.startswith("--epochs 14 of 9 samples is less than one iteration of --global-batch-size 128")
    plan = make_plan(RunConfig.from_flags([*base, "--epochs", "15"]), {"CUDA_VISIBLE_DEVICES": ""}, [])
    assert preflight.inspect(plan).problems == []


def test_no_image_for_what_works_on_images(workplace) -> None:
    """As far as scripts/data/prepare.py has counted them."""

    def count(images: int, folder: Path) -> None:
        write_json(folder / "report.json", {"splits": {"train": {"samples": 9, "images": images}}})

    assert inspect("--stage", "1").problems == []
    count(0, workplace / "data")
    assert problem("--stage", "1") == (
        "--data-path data: no training sample has an image, so that projector would get no gradient; "
        "give data with images, or train the language model, too (--stage 2)"
    )
    assert "projector and vision would get" in problem("--train-modules", "projector|vision")
    for more in (["--stage", "2"], ["--freeze-lm", "--lora-rank", "2"], ["--train-modules", "*norm*"]):
        assert not [text for text in inspect(*more).problems if "image" in text]
    count(3, workplace / "data")
    assert inspect("--stage", "1").problems == []
    count(0, workplace / "data")
    write_dataset(workplace / "more")
    (workplace / "mix.yaml").write_text("datasets:\n  a: {path: data}\n  b: {path: more}\n")
    assert inspect("--stage", "1", "--data-path", "mix.yaml").problems == []
    count(0, workplace / "more")
    assert "mix.yaml: no training sample has an image" in problem("--stage", "1", "--data-path", "mix.yaml")


def test_a_mixture(workplace, tmp_path_factory) -> None:
    """Each dataset is looked at, named on the first screen, and bound; what is wrong says where."""
    write_dataset(workplace / "sets/first", samples=40)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_dataset(elsewhere / "second", samples=60)
    mix = workplace / "sets/mix.yaml"
    mix.write_text(
        "datasets:\n  one: {path: first, weight: 1, subset: [0%, 50%]}\n"
        f"  two: {{path: {elsewhere}/second, weight: 3, template: plain}}\n"
    )
    found = inspect("--data-path", "sets/mix.yaml")
    assert found.problems == [] and found.train_samples == 20 + 60
    shown = report.screen(found.plan, found.facts)
    assert "mixture  one: weight 1, subset [0%, 50%] (25.0 % of the samples)\n" in shown
    assert " two: weight 3, template plain (75.0 % of the samples)\n" in shown
    (workplace / "image.sif/.singularity.d").mkdir(parents=True)
    command = inspect("--data-path", "sets/mix.yaml", "--sif-path", "image.sif").plan.command
    bound = {command[i + 1] for i, word in enumerate(command) if word == "--bind"}
    assert {str(workplace), str(elsewhere / "second")} <= bound

    (elsewhere / "second/0.tar").unlink()
    expected = "--data-path sets/mix.yaml: dataset two: .*second: shard 0.tar is gone since it was prepared"
    assert re.match(expected, problem("--data-path", "sets/mix.yaml"))
    assert "no dataset of --data-path sets/mix.yaml has a val split" in str(
        list(held_out_problems("sets/mix.yaml"))
    )
    mix.write_text("datasets:\n  one: {path: first, weigth: 1}\n")
    assert problem("--data-path", "sets/mix.yaml") == (
        "--data-path sets/mix.yaml: dataset one: unknown key 'weigth'; did you mean weight?"
    )
    mix.write_text("datasets:\n  one: {path: first, subset: [0, 41]}\n")
    assert "dataset one: subset [0, 41] reaches beyond its 40" in problem("--data-path", "sets/mix.yaml")
    assert "none.yaml: no such file" in problem("--data-path", "none.yaml")


def test_a_run_that_goes_on_with_other_data(workplace) -> None:
    """By the loader's state, which tests/data/test_mixture.py holds against a loader's own."""
    folder = workplace / "runs/run/checkpoints/iter_0000010"
    write_checkpoint(folder, iteration=10, has_optimizer=True)
    write_tracker(folder.parent, 10)
    mixture = workplace / "mix.yaml"
    mixture.write_text("datasets:\n  a:\n    path: data\n    weight: 1\n")
    argv = ["--data-path", str(mixture), "--packing", "--train-iters", "20"]
    begun = RunConfig.from_flags([*BASE, *argv])
    begun.save(str(folder / "run_config.json"))
    write_json(folder / "data_state.json", {"0": {"identity": data_identity(begun, 1)}})
    assert inspect(*argv).errors == []
    assert "--seq-length 1024, and this run has" in problem(*argv, "--seq-length", "1100")
    assert "neither --packing" in inspect(*argv, "--no-packing").problems[-1]
    mixture.write_text("datasets:\n  a:\n    path: data\n    weight: 2\n")
    assert "the mixture changed since the checkpoint: dataset a had weight 1, and has weight 2" in problem(
        *argv
    )
    mixture.write_text("datasets:\n  a:\n    path: data\n    weight: 1\n")
    (workplace / "data/.nv-meta/index.uuid").write_text("another")
    assert "the training data changed since the checkpoint" in problem(*argv)
    for identity in (None, 3, [1], {"data_workers": 1, "mixture": [1]}):  # the ranks name the file
        write_json(folder / "data_state.json", {"0": {"identity": identity}})
        assert inspect(*argv).errors == []


def test_held_out_samples_of_a_run_that_goes_on(workplace) -> None:
    folder = workplace / "runs/run/checkpoints/iter_0000010"
    write_checkpoint(folder, iteration=10, has_optimizer=True)
    write_tracker(folder.parent, 10)
    (workplace / "data/.nv-meta/split.yaml").write_text(
        "split_parts:\n  train:\n  - 0.tar\n  val:\n  - 0.tar\nexclude: []\n"
    )
    argv = ["--eval-interval", "5", "--train-iters", "20"]
    RunConfig.from_flags([*BASE, *argv]).save(str(folder / "run_config.json"))
    write_json(folder / "run_state.json", {"held_out": held_out_identity("data")})
    assert inspect(*argv).errors == []
    (workplace / "data/.nv-meta/index.uuid").write_text("another")
    assert "the held-out samples changed since the checkpoint (other shards" in problem(*argv)
    write_json(folder / "run_state.json", {"held_out": None})
    assert inspect(*argv).errors == []


def test_fewer_samples_than_loader_workers(workplace) -> None:
    argv = ["--global-batch-size", "16", "--data-workers"]
    assert inspect(*argv, "8").problems == []
    assert "9 samples in the train split are fewer than --data-workers 16" in problem(*argv, "16")
    mixture = workplace / "mix.yaml"
    mixture.write_text("datasets:\n  a: {path: data, weight: 1, subset: [0, 3]}\n")
    assert "dataset a: 3 samples in the train split are fewer" in problem(
        *argv, "4", "--data-path", "mix.yaml"
    )


@pytest.mark.parametrize("content", [None, bytes(4096), b""])
def test_an_index_that_is_gone_or_damaged(workplace, content: bytes | None) -> None:
    """Training does without it, so that the run isn't refused."""
    index = workplace / "data/.nv-meta/index.sqlite"
    index.write_bytes(content) if content is not None else index.unlink()
    assert "index.sqlite is " in warning() and "training goes without it" in warning()


def test_sequences_too_short_for_every_sample(workplace) -> None:
    def report(tokens: int, images: int, **settings: object) -> None:
        histograms = {"images": {"min": images, "max": 9}, "image tokens": {"min": images * 576}}
        histograms["tokens"] = {"min": tokens, "max": tokens, "total": tokens, "bins": {"4096": 1}}
        settings = {
            "tokenizer_load_dir": str(workplace / "ckpt/hf"),
            "template": "v1",
            "lang": "jp",
            **settings,
        }
        write_json(
            workplace / "data/report.json", {"kept": kept, "histograms": histograms, "settings": settings}
        )

    kept = 9
    drop = [
        "--seq-length",
        "2999",
        "--overlong",
        "drop",
        "--template",
        "v1",
        "--tokenizer-load-dir",
        "ckpt/hf",
    ]
    words = "every sample is longer than --seq-length 2999, and --overlong drop leaves them all out"
    report(tokens=3000, images=1)
    assert inspect("--seq-length", "1024").problems == []
    told = problem(*drop)
    assert words in told and "the shortest has 3,000 tokens" in told
    assert inspect(*drop, "--seq-length", "3000").problems == []
    # Where others may have counted, a run is not refused.
    for settings, more in [
        ({"template": None}, []),
        ({"tokenizer_load_dir": "another"}, []),
        ({"lang": "en"}, []),
        ({}, ["--template", "plain"]),
        ({}, ["--image-orientation", "stored"]),
    ]:
        report(tokens=3000, images=1, **settings)
        found = inspect(*drop, *more)
        assert found.problems == [] and any(words in line for line in found.warnings)
    report(tokens=3000, images=1)
    (workplace / "ckpt/hf/tokenizer.json").touch()
    later = os.stat(workplace / "data/report.json").st_mtime + 5
    os.utime(workplace / "ckpt/hf/tokenizer.json", (later, later))
    assert inspect(*drop).problems == []
    report(tokens=3000, images=2)
    assert "no sample fits into --seq-length 1152: each has 2 images" in problem("--seq-length", "1152")
    assert inspect("--seq-length", "1153").problems == []
    kept = 8  # shards came to it since
    report(tokens=3000, images=2)
    assert inspect("--seq-length", "1152").problems == []


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (["--epochs", "3"], "in place of --epochs: .* packed; by the .* 3 passes take about --train-iters 9"),
        ([], "--train-iters: .* packed; by the lengths that .* one pass takes about --train-iters 3"),
    ],
)
def test_a_packed_length_is_estimated(workplace, length: list[str], words: str) -> None:
    """Nine samples of 600 tokens, of which no two fit into 1,000; and nobody has counted them."""
    argv = [*BASE[:-2], "--packing", "--seq-length", "1000", "--global-batch-size", "3", *length]
    plan = make_plan(RunConfig.from_flags(argv), {"CUDA_VISIBLE_DEVICES": ""}, [])
    (told,) = preflight.inspect(plan).problems
    assert told.endswith("about samples x mean length / --seq-length / --global-batch-size")
    tokens = {"min": 600, "max": 600, "total": 5400, "bins": {"1024": 9}}
    found = {"histograms": {"tokens": tokens}, "settings": {"tokenizer_load_dir": "hf"}}
    write_json(workplace / "data/report.json", found)
    (told,) = preflight.inspect(plan).problems
    assert re.search(words + "$", told)
