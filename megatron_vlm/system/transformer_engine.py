"""The releases of Transformer Engine that fit, told from the installed packages without importing one."""

from __future__ import annotations

import re
from typing import Callable, Mapping, Optional

# megatron-core 0.16.1 asks for these (its extra "dev").
_FIRST, _BEYOND = (2, 9), (2, 12)
# One package from PyPI; NVIDIA's images build all of it as the first.
_PACKAGE = "transformer_engine"
_PARTS = ("transformer_engine_torch", "transformer_engine_cu12", "transformer_engine_cu13")


def engine_problem(version_of: Optional[Callable[[str], str]] = None) -> Optional[str]:
    """Return why the Transformer Engine that is installed can't be used; None if nothing speaks against it.

    Args:
        version_of: ``importlib.metadata.version``.
    """
    import importlib.metadata  # slow, and only jobs on GPUs come here

    installed = version_of or importlib.metadata.version

    def version(package: str) -> Optional[str]:
        try:
            return installed(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    own = version(_PACKAGE)
    if own is None:
        return None  # a checkout on PYTHONPATH, say; importing it will tell
    number = re.match(r"(\d+)\.(\d+)", own)
    if number is None or not _FIRST <= (int(number[1]), int(number[2])) < _BEYOND:
        first, last = f"{_FIRST[0]}.{_FIRST[1]}", f"{_BEYOND[0]}.{_BEYOND[1] - 1}"
        return f"Transformer Engine is {own}, and megatron-core asks for {first} to {last}"
    for part in _PARTS:
        other = version(part)
        if other is not None and other != own:
            return f"{_PACKAGE} is {own} and {part} is {other}; they have to be of one release"
    return None


def check_kernel_switches(environ: Mapping[str, str]) -> None:
    """Check that Transformer Engine's switches for attention kernels are on, as they are by default.

    megatron-core asserts it of every model, of local layers too.

    Raises:
        ValueError: one is set to something else.
    """
    for kernels in ("FLASH", "FUSED", "UNFUSED"):
        name = f"NVTE_{kernels}_ATTN"
        if environ.get(name, "1") != "1":
            raise ValueError(f"{name}={environ[name]} in the environment: megatron-core wants 1; unset it")
