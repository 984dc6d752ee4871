"""A Transformer Engine that is installed and can't be used: everything else goes on, and says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.parallel.engine import import_engine

ROOT = Path(__file__).parents[2]
PROGRAM = """
from megatron_vlm import parallel
from megatron_vlm.models.specs import choose_transformer_impl
from megatron.core.extensions.transformer_engine import HAVE_TE
print(HAVE_TE, choose_transformer_impl("cpu"), choose_transformer_impl("cuda", "local"))
try:
    print(choose_transformer_impl("cuda"))
except ValueError as error:
    print(error)
"""


def run(folder: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


# A library of CUDA is missing; its own library was built for another torch, which its package passes over.
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"transformer_engine/__init__.py": "raise RuntimeError('cudnn shared object not found.')\n"},
            "RuntimeError: cudnn shared object not found.",
        ),
        (
            {
                "transformer_engine/__init__.py": "try: from . import pytorch\nexcept ImportError: pass\n",
                "transformer_engine/pytorch/__init__.py": "raise ImportError('undefined symbol: _ZN3c10')\n",
            },
            "ImportError: undefined symbol: _ZN3c10",
        ),
    ],
)
def test_one_that_cannot_be_imported(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    import torch

    assert run(tmp_path, files) == [
        "False local local",
        f"Transformer Engine can't be imported beside torch {torch.__version__} ({reason}); "
        "mend that, or use --transformer-impl local",
    ]


def test_an_empty_folder_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine would search below it, which is the whole disk."""
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setenv("CUDNN_PATH", "/opt/cudnn")
    import_engine()
    assert "CUDA_HOME" not in os.environ and os.environ["CUDNN_PATH"] == "/opt/cudnn"
