"""Run megatron-core, which is written for CUDA, on a CPU with gloo.

megatron-core names CUDA directly: it allocates on ``device="cuda"``, calls ``.cuda()``, asserts on
``torch.cuda.*Tensor`` type names and keeps CUDA generators. :func:`install` redirects exactly these
calls to the CPU. A ``TorchFunctionMode`` would catch them too, but costs Python time on every
operation; these replacements cost it only where a tensor is created or moved by name.

On a machine whose device is CUDA nothing here runs.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from megatron_vlm.parallel.engine import import_engine

# The tensor constructors that megatron-core calls with device="cuda" or torch.cuda.current_device().
_CONSTRUCTORS = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "zeros_like",
    "empty_like",
)

_saved: dict[tuple[Any, str], Any] = {}


def import_megatron_core() -> None:
    """Import megatron-core, without its notes on missing optional packages.

    On a machine without CUDA ``torch.compile`` is switched off meanwhile: megatron-core marks small
    functions for compilation as it is imported. On the CPU they run as they are, since compiling them
    would need a C++ compiler on the user's machine, and importing torch's compiler alone takes
    three seconds in every rank.
    """
    compile_ = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _leave_uncompiled
    try:
        with warnings.catch_warnings(), _hidden("wandb", "torch.utils.tensorboard"):
            warnings.simplefilter("ignore")
            import_engine()
            import megatron.core
            import megatron.core.models.gpt.gpt_model
            import megatron.core.optimizer  # noqa: F401
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Let imports of these modules fail.

    megatron-core imports them if they are there, half a second in every rank, and they are not needed: what
    is reported, only the first rank writes, and :mod:`megatron_vlm.observe` does it.
    """
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _leave_uncompiled(model: Any = None, **options: Any) -> Any:
    return (lambda function: function) if model is None else model


def installed() -> bool:
    """Return whether the redirection is active."""
    return bool(_saved)


def install() -> None:
    """Redirect megatron-core's CUDA calls to the CPU, for this process, until :func:`uninstall`.

    Calling it twice is the same as calling it once.
    """
    if installed():
        return
    cpu = torch.device("cpu")

    # `with torch.device(...)` looks the constructors up once, by name: it has to find torch's own, or it has
    # no effect, and transformers, which builds models under torch.device("meta"), takes memory for values.
    _device_constructors()
    for name in _CONSTRUCTORS:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "type", _cuda_type_names(torch.Tensor.type))

    # megatron-core passes the result on as device=..., so a device has to come back, not an index.
    _replace(torch.cuda, "current_device", lambda: cpu)
    _replace(torch.cuda, "set_device", lambda device: None)
    _replace(torch.cuda, "synchronize", lambda device=None: None)
    _replace(torch.cuda, "current_stream", lambda device=None: _Stream())
    _replace(torch.cuda, "default_stream", lambda device=None: _Stream())
    _replace(torch.cuda, "Stream", _Stream)
    _replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    _replace(torch.cuda, "manual_seed", torch.manual_seed)
    _replace(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())

    # For --device cpu on a machine with CUDA, where import_megatron_core() left compilation on. Elsewhere
    # importing torch's compiler to switch it off would take every rank a third of a second.
    if torch.cuda.is_available():
        from torch._dynamo import config as dynamo_config

        _replace(dynamo_config, "disable", True)

    # What it takes from Transformer Engine or apex where they are installed runs on GPUs only.
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    for module in (clip_grads, optimizer):
        _replace(module, "multi_tensor_applier", utils.local_multi_tensor_applier)
        _replace(module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    _replace(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)

    from megatron.core.tensor_parallel import random

    _replace(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    # Its tracker warns when the CPU generator moves while a CUDA generator is forked; here they are one.
    logging.getLogger(random.__name__).addFilter(_not_about_cpu_rng)


def uninstall() -> None:
    """Undo :func:`install`."""
    for (owner, name), original in _saved.items():
        setattr(owner, name, original)
    _saved.clear()
    from megatron.core.tensor_parallel import random

    logging.getLogger(random.__name__).removeFilter(_not_about_cpu_rng)


@contextlib.contextmanager
def one_group_per_set_of_ranks() -> Iterator[None]:
    """Let megatron-core's groups of the same ranks be one group.

    It makes some twenty, most of them alike. Each gloo group keeps three threads, and each of these
    wakes up a hundred times a second: on few cores that costs more than training a small model.
    Sharing is safe, since every rank issues its collectives in the same order.
    """
    from megatron.core import parallel_state

    create, groups = parallel_state.create_group, {tuple(range(dist.get_world_size())): dist.group.WORLD}

    def create_once(ranks: Sequence[int], **options: Any) -> Any:
        key = tuple(ranks)
        if key not in groups:
            groups[key] = create(ranks, **options)
        return groups[key]

    parallel_state.create_group = create_once
    try:
        yield
    finally:
        parallel_state.create_group = create


def _replace(owner: Any, name: str, replacement: Any) -> None:
    _saved[owner, name] = getattr(owner, name)
    setattr(owner, name, replacement)


def _on_cpu(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return constructor(*args, **kwargs)

    construct.__name__ = constructor.__name__
    construct.__doc__ = constructor.__doc__
    return construct


def _cuda_type_names(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_


def _not_about_cpu_rng(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


class _Stream:
    """A stream where there are none: everything is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Return at once: there is nothing to wait for."""

    def synchronize(self) -> None:
        """Return at once: there is nothing to wait for."""
