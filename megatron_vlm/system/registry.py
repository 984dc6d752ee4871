"""Registries that are filled by listing a folder: a new file is found without being named elsewhere."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any, Dict, Iterator


def modules_in(package: str) -> Iterator[ModuleType]:
    """Yield every module that lies in a package's folder, imported, in the order of their names.

    Args:
        package: its dotted name.
    """
    folder = importlib.import_module(package).__path__
    for name in sorted(module.name for module in pkgutil.iter_modules(folder)):
        yield importlib.import_module(f"{package}.{name}")


def registry(package: str, attribute: str, key: str = "KIND", optional: bool = False) -> Dict[str, Any]:
    """Return what the modules of a package define under one name, by their kinds.

    Modules without ``key`` are helpers of the others and are left out.

    Args:
        package: its dotted name.
        attribute: the name of what is registered, in every module that has a kind.
        key: the name of a module's kind, a string.
        optional: modules that have a kind and not the attribute are left out too.

    Raises:
        ValueError: two modules have the same kind.
    """
    found: Dict[str, ModuleType] = {}
    for module in modules_in(package):
        kind = getattr(module, key, None)
        if kind is None:
            continue
        if kind in found:
            raise ValueError(f"{found[kind].__name__} and {module.__name__} are both of kind {kind!r}")
        found[kind] = module
    return {
        kind: getattr(module, attribute)
        for kind, module in found.items()
        if not optional or hasattr(module, attribute)
    }
