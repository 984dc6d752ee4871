"""docs/extending.md against what there is: every flag, metric, kind and shape is in the files of its list."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron_vlm.architecture.connectors import CONNECTORS
from megatron_vlm.architecture.encoders import ENCODERS
from megatron_vlm.architecture.families.known import FAMILIES, TEXT_FAMILIES
from megatron_vlm.config.flags import flag_name
from megatron_vlm.config.sections import SECTIONS
from megatron_vlm.data.media.kinds import KINDS
from megatron_vlm.data.media.readers import READERS
from megatron_vlm.data.prepare.records.shapes import SHAPES
from megatron_vlm.hf.tables.model import TABLES
from megatron_vlm.models.connectors import BUILD_CONNECTOR
from megatron_vlm.models.encoders import BUILD_ENCODER
from megatron_vlm.models.modalities.table import MODALITIES
from megatron_vlm.observe.metrics import IterationMetrics
from tests.vectors import VECTOR, VectorReader, Vectors

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/extending.md"
# Headings, and what a name in angle brackets there stands for: all that have been added so far.
ADDED = {
    "A flag": {"section": {cls.__module__.rpartition(".")[2] for cls in SECTIONS.values()}},
    "A metric": {},
    "A connector": {"kind": set(CONNECTORS)},
    "An encoder": {"kind": set(ENCODERS)},
    "A family": {},
    "A kind of LLaVA": {"kind": set(FAMILIES)},
    "A modality": {"kind": set(KINDS)},
    "A dataset format": {},
}
# Files that an example shows and that its list can't name: whatever module obeys a flag, or counts.
OBEYS = "megatron_vlm/training/hooks/guards.py"


def part(heading: str) -> str:
    """The text below a heading of the page."""
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(found)


def listed(heading: str) -> list[str]:
    """The files in a part's table, from the checkout's root."""
    rows = re.findall(r"^\| (.+?) \| .+ \|$", part(heading), re.MULTILINE)
    files = []
    for row in rows:
        links, name = re.findall(r"\]\(([^)]+)\)", row), re.search(r"`([^`]+<[^`]+)`", row)
        files += [str((PAGE.parent / link).resolve().relative_to(ROOT)) for link in links]
        if name:
            files.append(name[1])
    assert len(files) >= 3, heading
    return files


def text(file: str) -> str:
    return (ROOT / file).read_text()


def mentions(words: str, below: Iterable[str] = ("megatron_vlm", "scripts")) -> set[str]:
    """The files of code in which a pattern stands."""
    files = (path for folder in below for path in (ROOT / folder).rglob("*.py"))
    return {str(path.relative_to(ROOT)) for path in files if re.search(words, path.read_text())}


def test_every_part_is_looked_at() -> None:
    assert re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE) == list(ADDED)


@pytest.mark.parametrize("heading", ADDED)
def test_listed_files_exist(heading: str) -> None:
    for file in listed(heading):
        name = re.search(r"<(\w+)>", file)
        if name is None:
            assert (ROOT / file).is_file(), file
            continue
        folder, _, pattern = file.rpartition("/")
        found = list((ROOT / folder).glob(pattern.replace(name[0], "*")))
        for value in ADDED[heading][name[1]]:
            own = [path for path in found if path.stem.startswith(value) or f'"{value}"' in path.read_text()]
            assert own, f"{file}: there is none for {value}"


@pytest.mark.parametrize("heading", ADDED)
def test_examples_are_what_stands_in_the_files(heading: str) -> None:
    names = [re.sub(r"<\w+>", r"\\w+", re.escape(file).replace(r"\<", "<")) for file in listed(heading)]
    for block in re.findall(r"```diff\n(.*?)```", part(heading), re.DOTALL):
        for piece in re.split(r"^\+\+\+ b/", block, flags=re.MULTILINE)[1:]:
            file, *lines = piece.splitlines()
            assert file == OBEYS or any(re.fullmatch(name, file) for name in names), file
            there = text(file).splitlines()
            assert lines and {line[1:] for line in lines} <= set(there), file


def test_flags() -> None:
    """Every flag stands in its section and on the page of flags, and something reads it."""
    outside = "".join(
        path.read_text()
        for folder in ("megatron_vlm", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if "config/sections" not in str(path)
    )
    for cls in SECTIONS.values():
        section = f"megatron_vlm/config/sections/{cls.__module__.rpartition('.')[2]}.py"
        for field in dataclasses.fields(cls):
            assert re.search(rf"^    {field.name}: .*flag\(", text(section), re.MULTILINE), field.name
            switches = field.metadata["choices"] if field.metadata["switches"] else [field.name]
            for name in map(flag_name, switches):
                assert f"`{name}`" in text("docs/flags.md"), name
            if not field.metadata["not_yet"]:
                read = f"self.{field.name}" in text(section) or re.search(rf"\b{field.name}\b", outside)
                assert read, f"nothing reads {field.name}"


def test_the_example_of_a_flag_is_all_of_it() -> None:
    """Where ``--spike-threshold`` stands, in code and in the tables that have every flag."""
    code = mentions("spike[_-]threshold")
    assert code == {"megatron_vlm/config/sections/logging.py", OBEYS}
    for file in ("docs/flags.md", "README.md", "tests/config/test_run_config.py"):
        assert file in listed("A flag")
        assert re.search("spike[_-]threshold", text(file)), file


def test_metrics() -> None:
    """Every metric is a field, has a value and a row; the example is all of a count over all starts."""
    files = listed("A metric")
    metrics, meter, state, page = files
    for field in dataclasses.fields(IterationMetrics):
        assert re.search(rf"^    {field.name}: ", text(metrics), re.MULTILINE)
        assert re.search(rf"\b{field.name}=", text(meter))
        assert f"`{field.name}`" in text(page)
    assert mentions(r"\bspikes\b") == {metrics, meter, state, OBEYS}


def test_kinds_of_connectors_and_encoders() -> None:
    """What is listed from folders is all that has a kind, and every kind has a module and a table."""
    assert set(CONNECTORS) == set(BUILD_CONNECTOR) and set(ENCODERS) == set(BUILD_ENCODER)
    assert set(CONNECTORS) | set(ENCODERS) == set(TABLES)
    folders = {
        file.rpartition("/")[0]
        for heading in ("A connector", "An encoder", "A kind of LLaVA")
        for file in listed(heading)
        if "<kind>" in file
    }
    assert folders == {file.rpartition("/")[0] for file in mentions(r"(?m)^KIND\b.*= ")}


@pytest.mark.parametrize(
    "heading, kind", [("A connector", r"projector\.kind"), ("An encoder", r"(?:vision|self)\.family")]
)
def test_what_tells_kinds_apart_is_listed(heading: str, kind: str) -> None:
    asked = mentions(rf"\b{kind}(?: [!=]= |\.endswith)|model_subtype={kind}")
    assert asked <= set(listed(heading))


def test_families() -> None:
    known, tiny, page = listed("A family")[:3]
    for family in TEXT_FAMILIES:
        assert f'"{family}"' in text(known) and f'"{family}"' in text(tiny) and f"`{family}`" in text(page)
    _, tiny, page = listed("A kind of LLaVA")
    for family in FAMILIES:
        assert f'"{family}"' in text(tiny) and f"`{family}`" in text(page)


def test_modalities() -> None:
    """Each kind has a reader and a modality, in the files that the list names; so has the tests' own one."""
    assert set(KINDS) == set(READERS) == set(MODALITIES)
    reader, modality = (file for file in listed("A modality") if "<kind>" in file)
    for kind in KINDS:
        for file, cls in ((reader, READERS[kind]), (modality, MODALITIES[kind])):
            assert ROOT / file.replace("<kind>", kind) == Path(inspect.getfile(cls))
    assert (VectorReader.kind, Vectors.kind) == (VECTOR, VECTOR.name)
    assert not mentions(rf"\b{VECTOR.field}\b|{VECTOR.marker}")


def test_shapes_of_records() -> None:
    records, script, tests, page = listed("A dataset format")
    for shape in SHAPES:
        for file in (records, script, tests):
            assert f'"{shape}"' in text(file), (file, shape)
        assert f"| `{shape}` |" in text(page)
