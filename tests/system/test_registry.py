"""Registries find what lies in a folder, and refuse two files of one kind."""

import sys
from pathlib import Path

import pytest

from megatron_vlm.system.registry import Registry, modules_in


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "parts_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "square.py").write_text("KIND = 'square'\nsides = 4\n")
    (folder / "helper.py").write_text("sides = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


def test_a_file_with_a_kind_is_found(package: Path) -> None:
    (package / "triangle.py").write_text("KIND = 'triangle'\nsides = 3\n")
    assert dict(Registry(package.name, "sides")) == {"square": 4, "triangle": 3}
    assert [module.__name__.split(".")[1] for module in modules_in(package.name)] == [
        "helper",
        "square",
        "triangle",
    ]


def test_two_files_of_one_kind_are_refused(package: Path) -> None:
    (package / "box.py").write_text("KIND = 'square'\nsides = 4\n")
    with pytest.raises(ValueError, match=r"\.box and .*\.square are both of kind 'square'"):
        Registry(package.name, "sides")["square"]


def test_a_file_without_what_is_registered_is_an_error(package: Path) -> None:
    (package / "circle.py").write_text("KIND = 'circle'\n")
    with pytest.raises(AttributeError, match="sides"):
        Registry(package.name, "sides")["square"]


def test_a_folder_that_is_added_later_is_listed(package: Path, tmp_path: Path) -> None:
    found = Registry(package.name)
    assert set(found) == {"square"}
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "triangle.py").write_text("KIND = 'triangle'\nsides = 3\n")
    sys.modules[package.name].__path__.append(str(tmp_path / "more"))
    assert found["triangle"].sides == 3


def test_a_kind_for_every_number(package: Path) -> None:
    (package / "polygon.py").write_text("KIND = 'polygonN'\nsides = None\n")
    found = Registry(package.name, "sides")
    assert set(found) == {"polygonN", "square"} and found["polygon12"] is None
    names = ("polygon12", "square", "polygon", "polygonN", "square2")
    assert [found.knows(name) for name in names] == [True, True, False, False, False]
    assert None not in found and 12 not in found
    with pytest.raises(KeyError):
        found["polygon"]


def test_an_attribute_that_few_have(package: Path) -> None:
    (package / "circle.py").write_text("KIND = 'circle'\nradius = 1\n")
    assert dict(Registry(package.name, "radius", optional=True)) == {"circle": 1}
