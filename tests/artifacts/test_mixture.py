"""Files of mixtures: the YAML that is read, what it means, and every mistake as one line."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.artifacts.mixture import MixtureConfig, Subset, data_folders
from megatron_vlm.system.yaml_subset import read_yaml

GOOD = """
# what we train on
datasets:
  llava-mix:            # images
    path: data/llava mix
    weight: 0.7
    subset: [0%, 50%]
  "ocr.ja": {path: '/d/it''s', weight: 2, template: plain, overlong: drop, val: false}

  text:
    path: "../a, b"
    weight: 1.5
    subset: [100, end]
    mask_thinking: true
"""


def load(tmp_path: Path, text: str) -> MixtureConfig:
    (tmp_path / "mix.yaml").write_text(text, encoding="utf-8")
    return MixtureConfig.load(str(tmp_path / "mix.yaml"))


def test_what_a_file_means(tmp_path: Path) -> None:
    mixture = load(tmp_path, GOOD)
    assert [source.name for source in mixture.sources] == ["llava-mix", "ocr.ja", "text"]
    assert data_folders(mixture.path) == [
        str(tmp_path / "data/llava mix"),
        "/d/it's",
        str(tmp_path / "../a, b"),
    ]
    assert mixture.weighted and [source.weight for source in mixture.sources] == [0.7, 2, 1.5]
    first, second, third = mixture.sources
    assert first.subset.bounds(11) == (0, 5) and third.subset.bounds(140) == (100, 140)
    assert second.options == {"template": "plain", "overlong": "drop"} and third.options == {
        "mask_thinking": True
    }
    assert mixture.of_split("val") == (first, third)
    assert str(first) == "weight 0.7, subset [0%, 50%]"
    once = load(tmp_path, "datasets:\n  a:\n    path: x\n  b: {path: y, epochs: 3}\n")
    assert not once.weighted and [source.passes for source in once.sources] == [1, 3]


def test_it_is_read_as_pyyaml_reads_it() -> None:
    assert read_yaml(GOOD) == yaml.safe_load(GOOD)


SCALARS = st.one_of(
    st.integers(-(10**6), 10**6),
    st.floats(-(10.0**6), 10.0**6),
    st.booleans(),
    st.text("ab c:#-'\"[]{},0123.5%&*!|>@`~?=\\eEnoyftrue\u3042", max_size=9),
)


@given(st.dictionaries(st.text("abé0-: #", min_size=1, max_size=5), SCALARS | st.lists(SCALARS, max_size=3)))
def test_what_pyyaml_writes(content: dict[str, object]) -> None:
    """Whatever is read equals what PyYAML reads; all else is refused, and never read as something else."""
    for style in (None, "'", '"'):
        for flow in (None, True):
            text = yaml.safe_dump(content, default_style=style, default_flow_style=flow, width=10**6)
            try:
                found = read_yaml(text)
            except ValueError as error:
                assert str(error).startswith("line ") and "\n" not in str(error)
            else:
                assert found == yaml.safe_load(text)


@given(st.text("ab: #-'\"[]{},01.%~\n &*yesno", max_size=40))
def test_any_text(text: str) -> None:
    """The same of text that may be no YAML at all."""
    try:
        found = read_yaml(text)
    except ValueError:
        return
    expected = yaml.safe_load(text)

    def filled(value: object) -> object:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return [filled(item) for item in value] if isinstance(value, list) else {} if value is None else value

    assert found == filled(expected)  # a key with nothing below it is null to PyYAML; no schema here takes it


@pytest.mark.parametrize(
    "text, message",
    [
        ("datasets:\n  a: {path: x, wieght: 2}", "dataset a: unknown key 'wieght'; did you mean weight?"),
        ("datasets:\n  a: {path: x, zzz: 2}", "unknown key 'zzz'; there are path, weight, epochs"),
        ("datasets:\n  a: {path: x, weight: 0}", "a: weight 0: must be a number above 0; .* train: false"),
        ("datasets:\n  a: {path: x, weight: -1.5}", "weight -1.5: must be a number above 0"),
        ("datasets:\n  a: {path: x, weight: much}", "weight much: must be a number above 0"),
        ("datasets:\n  a: {path: x, epochs: 0}", "epochs 0: must be a whole number from 1 on"),
        ("datasets:\n  a: {path: x, epochs: 0.5}", r"epochs 0.5: .* subset: \[0%, 50%\]"),
        ("datasets:\n  a: {path: x, weight: 1, epochs: 2}", "dataset a has a weight and epochs"),
        (
            "datasets:\n  a: {path: x, weight: 1}\n  b: {path: y, epochs: 2}",
            "some datasets have weights and some have epochs",
        ),
        ("datasets:\n  a: {path: x, weight: 1}\n  b: {path: y}", "dataset b has no weight, as others have"),
        ("datasets:\n  a: {path: x}\n  a: {path: y}", "line 3: a is there already"),
        ("datasets:\n  a: {path: x}\n  b: {path: ./x}", "datasets a and b are one folder"),
        ("datasets:\n  a: {weight: 1}", "dataset a has no path"),
        ("datasets:\n  a: {path: x, train: false}", "no dataset is left to train on"),
        ("datasets:\n  a: {path: x, train: false, val: false}", "neither trained nor evaluated on"),
        ("datasets:\n  a: {path: x, train: false, epochs: 2}", "epochs does nothing with train: false"),
        ("datasets:\n  a: {path: x, template: vicunna}", "template vicunna: unknown; did you mean vicuna?"),
        ("datasets:\n  a: {path: x, lang: fr}", "lang fr: unknown; choose from jp, en"),
        ("datasets:\n  a: {path: x, subset: [50%, 20%]}", r"subset \[50%, 20%\]: write it as"),
        ("datasets:\n  a: {path: x, subset: [0%, 101%]}", r"write it as \[0%, 50%\]"),
        ("datasets:\n  a: {path: x, subset: [0%, 10]}", r"write it as \[0%, 50%\]"),
        ("datasets:\n  a: {path: x, subset: 10}", r"write it as \[0%, 50%\]"),
        ("datasets:\n  a: {path: x, mask_thinking: 1}", "mask_thinking 1: must be true or false"),
        ("datasets:\n  a: {path: x, image_aspect_ratio: padded}", "padded: unknown; did you mean pad?"),
        ("datasets:\n  a b: {path: x}", "dataset a b: a name has letters"),
        ("datasets:\n  a: {path: x}\nsplits: 3", "unknown key 'splits'"),
        ("__class__: MetadatasetV2\nsplits: 3", "this is energon's own format"),
        ("", "the file has nothing below it"),
        ("datasets:\n- path: x", "line 2: can't read '- path: x'"),
        ("datasets:\n\ta: x", "line 2: can't read a tab; indent by spaces"),
        ("datasets:\n  a: {path: x", "line 2: '}' is missing"),
        ("datasets:\n  a:\n    path: x, y", "line 3: ',' is left over"),
        ("datasets:\n  a:\n    path: x\n   weight: 1", "line 4: it is indented neither"),
        ("datasets:\n  a: {path: x, val: no}", "line 2: no: write false"),
        ("datasets:\n  a: {path: 2024-01-01}", "line 2: 2024-01-01: .* quotes around text"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path, text)
    assert str(raised.value).startswith(f"--data-path {tmp_path}/mix.yaml") and "\n" not in str(raised.value)


def test_subsets_of_a_split_share_nothing_and_miss_nothing(tmp_path: Path) -> None:
    for total in (3, 10, 999, 12345):
        cuts = ["0%", "0.7%", "33.3%", "57%", "100%"]
        parts = []
        for start, end in pairwise(cuts):
            mixture = load(tmp_path, f"datasets:\n  a: {{path: x, subset: [{start}, {end}]}}")
            try:
                parts += range(*mixture.sources[0].subset.bounds(total))
            except ValueError as error:
                assert "is empty" in str(error)
        assert parts == list(range(total))
    with pytest.raises(ValueError, match=r"\[0, 11\] reaches beyond its 10 samples"):
        Subset(0, 11).bounds(10)
