"""Registries find what lies in a folder, and refuse two files of one kind."""

import sys
from pathlib import Path

import pytest

from megatron_vlm.system.registry import modules_in, registry


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
    assert registry(package.name, "sides") == {"square": 4, "triangle": 3}
    assert [module.__name__.split(".")[1] for module in modules_in(package.name)] == [
        "helper",
        "square",
        "triangle",
    ]


def test_two_files_of_one_kind_are_refused(package: Path) -> None:
    (package / "box.py").write_text("KIND = 'square'\nsides = 4\n")
    with pytest.raises(ValueError, match=r"\.box and .*\.square are both of kind 'square'"):
        registry(package.name, "sides")


def test_a_file_without_what_is_registered_is_an_error(package: Path) -> None:
    (package / "circle.py").write_text("KIND = 'circle'\n")
    with pytest.raises(AttributeError, match="sides"):
        registry(package.name, "sides")
    assert registry(package.name, "sides", optional=True) == {"square": 4}
