"""What energon prepare has written, read without energon and without YAML."""

from __future__ import annotations

import json

import pytest
import yaml
from braceexpand import braceexpand

from megatron_vlm.artifacts.dataset import prepare_command, shard_counts, split_parts, split_samples


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / ".nv-meta").mkdir()
    counts = {f"part {i}/{i:03d}.tar": 10 + i for i in range(4)}
    (tmp_path / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": counts}))
    return tmp_path


def write(dataset, split: dict, name: str = "split.yaml") -> None:
    # As energon prepare writes it.
    text = yaml.dump(split, default_flow_style=False) if name.endswith("yaml") else json.dumps(split)
    (dataset / ".nv-meta" / name).write_text(text)


SPLIT = {
    "exclude": ["part 1/001.tar"],
    "split_parts": {
        "train": ["part 0/000.tar", "part 1/001.tar", "part 2/002.tar"],
        "val": ["part 3/003.tar"],
        "test": [],
    },
}


@pytest.mark.parametrize("name", ["split.yaml", "split.json"])
def test_a_split(dataset, name) -> None:
    write(dataset, SPLIT, name)
    assert split_parts(str(dataset)) == {
        "train": ["part 0/000.tar", "part 2/002.tar"],
        "val": ["part 3/003.tar"],
        "test": [],
    }
    assert [split_samples(str(dataset), part) for part in ("train", "val", "test")] == [22, 13, 0]


@pytest.mark.parametrize(
    "text",
    [
        "split_parts:\n  train: [a.tar, b.tar]\n",
        "split_parts:\n  train:\n  - '{a..c}.tar'\n",
        "split_parts:\n  train:\n  - '{0,{1,2}}.tar}'\n",
        "split_parts: &x\n  train:\n  - a.tar\n",
        "- a.tar\n",
        "exclude: []\n",
        "split_parts:\n  train:\n  - a.tar #the first\n",
        "split_parts:\n  train:\n  - a: b.tar\n",
        "",
    ],
)
def test_what_cannot_be_told_is_not_guessed(dataset, text) -> None:
    assert split_parts(str(dataset)) is None  # there is none
    (dataset / ".nv-meta/split.yaml").write_text(text)
    assert split_parts(str(dataset)) is None and split_samples(str(dataset)) is None


@pytest.mark.parametrize(
    "pattern",
    ["{000..011}.tar", "{8..11}.tar", "{098..101}/x.tar", "{a,b}/{1..3}.tar", "plain.tar", "{3..1}.tar"]
    + ["{0..0}.tar", "{00..1}.tar", "{,x}.tar", "train-{000000..000007}.tar", "a b{1,2}#c[d].tar"],
)
def test_brace_expressions_are_expanded_as_energon_does(dataset, pattern) -> None:
    write(dataset, {"split_parts": {"train": [pattern]}, "exclude": []})
    parts = split_parts(str(dataset))
    assert parts is not None and parts["train"] == list(braceexpand(pattern))


def test_damaged_counts(dataset) -> None:
    assert sum(shard_counts(str(dataset)).values()) == 46
    (dataset / ".nv-meta/.info.json").write_text("[]")
    with pytest.raises(ValueError, match=r"\.info\.json: damaged; run again: energon prepare"):
        shard_counts(str(dataset))


def test_a_folder_is_prepared_again_by_what_made_it(dataset) -> None:
    assert prepare_command(str(dataset)).startswith("energon prepare ")
    (dataset / ".nv-meta/prepare.json").write_text("{}")
    assert prepare_command(str(dataset)).startswith("python scripts/data/prepare.py --force ")
