"""The import of Transformer Engine, which can fail in more ways than a package of Python's own."""

from __future__ import annotations

import importlib
import os
import sys

import torch

from megatron_vlm.system.transformer_engine import engine_problem

_PACKAGE = "transformer_engine"
_LIBRARY_FOLDERS = [
    f"{library}_{where}" for library in ("CUDA", "CUDNN", "NVRTC", "CURAND") for where in ("HOME", "PATH")
]
_failure: str | None = None


def import_engine() -> None:
    """Import Transformer Engine, to be called before megatron-core does.

    It loads libraries of CUDA, and its own are built for one release of torch. megatron-core takes an
    ``ImportError`` for an engine that isn't installed, and doesn't survive any other. So one that can't be
    imported is hidden here: everything but its own layers goes on, and :func:`why_not` has the reason.
    """
    global _failure
    for name in _LIBRARY_FOLDERS:
        if os.environ.get(name) == "":
            del os.environ[name]  # it would look for its libraries from the root of the disk on
    try:
        importlib.import_module(f"{_PACKAGE}.pytorch")
    except ModuleNotFoundError as error:
        if error.name == _PACKAGE:
            return  # not installed
        _failure = _told(error)
    except Exception as error:  # OSError, RuntimeError, AssertionError: whatever a library is missed with
        _failure = _told(error)
    if _failure is not None:
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]
        sys.modules[_PACKAGE] = None  # type: ignore[assignment]


def why_not() -> str | None:
    """Return why Transformer Engine, though it is installed, can't be used; None if it can, or isn't
    there."""
    if _failure is not None:
        return f"can't be imported beside torch {torch.__version__} ({_failure})"
    problem = engine_problem() if sys.modules.get(_PACKAGE) is not None else None
    return None if problem is None else f"does not fit: {problem}"


def _told(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"
