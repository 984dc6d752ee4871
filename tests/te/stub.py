"""Transformer Engine's own Python on a machine without CUDA: torch stands in for its C++ library.

Its wheels can be unpacked anywhere, but importing them loads libraries of CUDA. :func:`install` puts a module
in the place of ``transformer_engine_torch``, of which the few functions that a linear, a norm and unfused
attention need are torch's, and every other one raises. What modules are called, hold and hand out is the
engine's own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

import torch

_ABSENT = ("triton", "onnx", "onnxscript", "nvdlfw_inspect", "einops")


class _Names(type):
    """Any attribute is a name, as of an enum."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Kind(type):
    def __getattr__(cls, name: str) -> Any:
        return _thing(name)


class _Thing(metaclass=_Kind):
    """Stands for anything of a package whose functions nothing here calls; decorators leave what they get."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        return _thing(name)


class _Anything(ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        return _thing(name)


def _thing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Thing,), {}) if name[0].isupper() else _Thing()


class _Absent(MetaPathFinder, Loader):
    """Finds a :class:`_Anything` for each package of :data:`_ABSENT` and its parts."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in _ABSENT:
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


class _Extension(ModuleType):
    """``transformer_engine_torch``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        for own in vars(type(self)):
            if not own.startswith("_"):
                setattr(self, own, getattr(self, own))  # for "from transformer_engine_torch import *"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = _Names(name, (), {})
        else:

            def value(*args: Any, **options: Any) -> Any:
                raise NotImplementedError(f"transformer_engine_torch.{name}")

        setattr(self, name, value)
        return value

    @staticmethod
    def get_cudnn_version() -> int:
        return 91200

    @staticmethod
    def get_cublasLt_version() -> int:
        return 130000

    @staticmethod
    def get_num_cublas_streams() -> int:
        return 4

    @staticmethod
    def layernorm_fwd(x: Any, weight: Any, bias: Any, eps: float, *_: Any) -> Any:
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def layernorm_bwd(dy: Any, x: Any, mu: Any, rsigma: Any, weight: Any, *_: Any) -> Any:
        mask = [True, True, True]
        bias = torch.zeros_like(weight)
        return torch.ops.aten.native_layer_norm_backward(
            dy, x, x.shape[-1:], mu.view(-1, 1), rsigma.view(-1, 1), weight, bias, mask
        )

    @staticmethod
    def rmsnorm_fwd(x: Any, weight: Any, eps: float, *_: Any) -> Any:
        rsigma = (x.float().square().mean(-1) + eps).rsqrt()
        return (x.float() * rsigma.unsqueeze(-1) * weight.float()).to(x.dtype), None, rsigma

    @staticmethod
    def rmsnorm_bwd(dy: Any, x: Any, rsigma: Any, weight: Any, *_: Any) -> Any:
        scaled = x.float() * rsigma.unsqueeze(-1)
        wdy = dy.float() * weight.float()
        dx = (wdy - scaled * (wdy * scaled).mean(-1, keepdim=True)) * rsigma.unsqueeze(-1)
        return dx.to(x.dtype), (dy.float() * scaled).sum(0).to(weight.dtype)

    @staticmethod
    def generic_gemm(*args: Any, **options: Any) -> Any:
        a, a_turned, b, b_turned, out, _, _, bias, _, _, _, grad = args[:12]
        accumulate = args[14]
        shape = b.shape
        a, b = a.flatten(0, -2), b.flatten(0, -2)
        # Column-major as in cuBLAS: layout "TN" is b @ a.T of row-major tensors.
        result = (b.t() if b_turned else b) @ (a.t() if a_turned else a)
        if not b_turned:
            result = result.view(*shape[:-1], -1)
        bias_grad = None
        if bias is not None and grad:
            bias_grad = b.sum(0)
        elif bias is not None:
            result = result + bias
        if out is not None:
            result = out.add_(result) if accumulate else out.copy_(result)
        return result, bias_grad, None, None

    @staticmethod
    def fused_rope_forward(t: Any, freqs: Any, _: Any, kind: str, __: Any, ends: Any, *___: Any) -> Any:
        return _turn(t, freqs, kind, ends)

    @staticmethod
    def fused_rope_backward(t: Any, freqs: Any, _: Any, kind: str, __: Any, ends: Any, *___: Any) -> Any:
        return _turn(t, -freqs, kind, ends)

    @staticmethod
    def convert_thd_to_bshd(t: Any, ends: Any, batch: int, longest: int) -> Any:
        padded = t.new_zeros(batch, longest, *t.shape[1:])
        for row, sample in zip(padded, t.split(ends.diff().tolist()), strict=True):
            row[: len(sample)] = sample
        return padded

    @staticmethod
    def convert_bshd_to_thd(t: Any, ends: Any, _: Any) -> Any:
        return torch.cat([row[:length] for row, length in zip(t, ends.diff().tolist(), strict=True)])


def _turn(t: torch.Tensor, freqs: torch.Tensor, kind: str, ends: torch.Tensor | None) -> torch.Tensor:
    """Rotary embedding of ``sbhd``, or of each sample of ``thd``."""
    if kind.endswith("THD"):
        assert ends is not None
        angles = torch.cat([freqs[:length, 0] for length in ends.diff().tolist()])
    else:
        angles = freqs[: len(t)]
    first, second = t.chunk(2, dim=-1)
    return (t * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(t.dtype)


def install() -> str:
    """Make ``transformer_engine`` importable from wherever ``sys.path`` has its Python; for a whole process.

    Returns:
        Its release.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it looks for no libraries then
    sys.meta_path.append(_Absent())
    sys.modules["transformer_engine_torch"] = _Extension("transformer_engine_torch")
    found = importlib.util.find_spec("transformer_engine")
    assert found is not None and found.submodule_search_locations, "no transformer_engine on sys.path"
    # Its package imports the library on its own, which this skips.
    engine: Any = ModuleType("transformer_engine")
    engine.__path__ = list(found.submodule_search_locations)
    engine.__spec__ = found
    engine.__version__ = importlib.metadata.version("transformer_engine")
    sys.modules["transformer_engine"] = engine
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    engine.common = common
    engine.pytorch = importlib.import_module("transformer_engine.pytorch")
    _let_it_run_on_cpus()
    return str(engine.__version__)


def _let_it_run_on_cpus() -> None:
    """Let the engine's modules run on CPUs: they refuse to be made without a GPU, and ask what kind it is."""
    from transformer_engine.pytorch import utils as engine_utils
    from transformer_engine.pytorch.attention.dot_product_attention import utils
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module import base

    make = base.TransformerEngineBaseModule.__init__

    def make_anyway(module: Any) -> None:
        available = torch.cuda.is_available
        torch.cuda.is_available = lambda: True
        try:
            make(module)
        finally:
            torch.cuda.is_available = available

    base.TransformerEngineBaseModule.__init__ = make_anyway  # type: ignore[method-assign]
    engine_utils._get_device_compute_capability = lambda device: (9, 0)
    move = torch.Tensor.to
    torch.Tensor.to = lambda tensor, *args, **options: move(  # type: ignore[assignment, method-assign]
        tensor, *args, **{**options, **({"device": "cpu"} if options.get("device") == "cuda" else {})}
    )
    torch.cuda.is_current_stream_capturing = lambda: False
    # True for the engine, and not for torch, which would look for a GPU then.
    asks = "transformer_engine"
    torch.Tensor.is_cuda = property(  # type: ignore[assignment, misc]
        lambda tensor: asks in sys._getframe(1).f_code.co_filename
    )
    gemm.get_cublas_workspace = lambda *_: torch.empty(1)
    # Neither flash nor cuDNN's attention: torch's products and softmax.
    utils.get_attention_backend = lambda *_: (False, None, False, None, True, [])
