"""Registries that are filled by listing a folder: a new file is found without being named elsewhere."""

from __future__ import annotations

import importlib
import pkgutil
import re
from types import ModuleType
from typing import Any, Dict, Iterator, Mapping, Tuple


def modules_in(package: str) -> Iterator[ModuleType]:
    """Yield every module that lies in a package's folder, imported, in the order of their names.

    Args:
        package: its dotted name.
    """
    folder = importlib.import_module(package).__path__
    for name in sorted(module.name for module in pkgutil.iter_modules(folder)):
        yield importlib.import_module(f"{package}.{name}")


class Registry(Mapping[str, Any]):
    """Lists by their kinds what the modules of a package define, when it is first asked for.

    Modules without ``key`` are helpers of the others and are left out. A kind with an N in it, such as
    ``mlpNx_gelu``, stands for every name that has a number there.

    Args:
        package: its dotted name.
        attribute: the name of what is registered, in every module that has a kind; empty for the module.
        key: the name of a module's kind, a string.
        optional: modules that have a kind and not the attribute are left out, too.
    """

    def __init__(self, package: str, attribute: str = "", key: str = "KIND", optional: bool = False) -> None:
        self.package = package
        self.attribute = attribute
        self.key = key
        self.optional = optional
        self._listed: Tuple[Tuple[str, ...], Dict[str, Any]] = ((), {})

    def __getitem__(self, name: str) -> Any:
        """Return what is registered for a kind, or for a name that is of one.

        Raises:
            KeyError: there is no such kind.
        """
        found = self._found()
        # A file may have anything in the place of a name; of what is no text there is no kind.
        return found[name if not isinstance(name, str) or name in found else re.sub(r"\d+", "N", name)]

    def knows(self, name: str) -> bool:
        """Tell whether a name is of a kind: with a number where the kind has an N."""
        return name in self and "N" not in name

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def _found(self) -> Dict[str, Any]:
        """List the folder, again if the package's path has been extended.

        Raises:
            ValueError: two modules have the same kind.
        """
        path = tuple(importlib.import_module(self.package).__path__)
        if self._listed[0] != path:
            modules: Dict[str, ModuleType] = {}
            for module in modules_in(self.package):
                kind = getattr(module, self.key, None)
                if kind is None or (self.optional and not hasattr(module, self.attribute)):
                    continue
                if kind in modules:
                    other = modules[kind].__name__
                    raise ValueError(f"{other} and {module.__name__} are both of kind {kind!r}")
                modules[kind] = module
            found = {k: getattr(m, self.attribute) if self.attribute else m for k, m in modules.items()}
            self._listed = path, found
        return self._listed[1]
