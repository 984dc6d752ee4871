"""A connector and an encoder that the library doesn't have, as docs/extending.md says to add them.

Each is three files, in the folders below, which stand for those of the library, and a test.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDERS = {
    "connectors": "megatron_vlm.architecture.connectors",
    "encoders": "megatron_vlm.architecture.encoders",
    "connector_modules": "megatron_vlm.models.connectors",
    "encoder_modules": "megatron_vlm.models.encoders",
    "tables": "megatron_vlm.hf.tables",
}


@contextmanager
def added() -> Iterator[None]:
    """The files lie in the library's folders, as it were."""
    before = set(sys.modules)
    for folder, package in FOLDERS.items():
        importlib.import_module(package).__path__.append(str(Path(__file__).parent / folder))
    try:
        yield
    finally:
        for folder, package in FOLDERS.items():
            importlib.import_module(package).__path__.remove(str(Path(__file__).parent / folder))
        for name in set(sys.modules) - before:
            if name.rpartition(".")[2] in ("bottleneck", "registers"):
                del sys.modules[name]
