"""What is taken from Transformer Engine and apex where they are found: stubs stand for both."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.models import loss
from megatron_vlm.parallel import fused

ROOT = Path(__file__).parents[2]
CALL = "def {0}(*arguments, **options): raise RuntimeError('no GPU here')\n".format
APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": CALL("FusedAdam") + CALL("FusedSGD"),
    "apex/normalization/__init__.py": "class FusedLayerNorm: ...\nclass FusedRMSNorm: ...\n",
    "apex/multi_tensor_apply.py": CALL("multi_tensor_applier"),
    "amp_C.py": CALL("multi_tensor_l2norm") + CALL("multi_tensor_scale"),
    "fused_weight_gradient_mlp_cuda.py": CALL("wgrad_gemm_accum_fp32"),
}
ENGINE = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": "",
    "transformer_engine/pytorch/optimizers.py": "class FusedAdam: ...\n",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages can be imported while the test runs."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    fused._import.cache_clear()
    yield tmp_path
    fused._import.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith(("apex", "amp_C", "fused_weight", "transformer_engine")):
            del sys.modules[name]


def test_engines_linears_add_up_their_weight_gradients() -> None:
    """As Transformer Engine 2.11 names it; other modules get nothing."""
    engine, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    engine.fuse_wgrad_accumulation = False  # type: ignore[assignment]
    fused.accumulate_weight_gradients(torch.nn.Sequential(torch.nn.ModuleList([engine]), other))
    assert engine.fuse_wgrad_accumulation is True and not hasattr(other, "fuse_wgrad_accumulation")


def test_without_either_it_is_torch() -> None:
    for device in "cpu", "cuda":
        assert fused.adam_source(device) == "torch"
        assert fused.norms(device) == {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        assert fused.weight_gradient_kernels(device) is None


def test_apex_is_used_on_gpus_only(installed: Path) -> None:
    write(installed, APEX)
    assert fused.adam_source("cuda") == "apex"
    norms = {name: norm.__module__ for name, norm in fused.norms("cuda").items()}
    assert norms == {"LayerNorm": "apex.normalization", "RMSNorm": "apex.normalization"}
    assert fused.weight_gradient_kernels("cuda").__name__ == "fused_weight_gradient_mlp_cuda"
    assert fused.adam_source("cpu") == "torch"
    assert fused.norms("cpu")["RMSNorm"] is torch.nn.RMSNorm
    assert fused.weight_gradient_kernels("cpu") is None


def test_transformer_engine_comes_first_as_in_megatron_core(installed: Path) -> None:
    write(installed, {**APEX, **ENGINE})
    assert fused.adam_source("cuda") == "transformer_engine"
    assert fused.adam_source("cpu") == "torch"


def test_the_apex_of_pypi_is_not_taken_for_it(installed: Path) -> None:
    write(installed, {"apex/__init__.py": "", "apex/lib.py": ""})
    assert fused.adam_source("cuda") == "torch"
    assert fused.norms("cuda")["LayerNorm"] is torch.nn.LayerNorm


def test_the_output_layers_gradient_is_added_as_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through apex's kernel, with its contract: contiguous factors, and a product that isn't rounded."""

    def accumulate(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> None:
        assert a.is_contiguous() and b.is_contiguous() and total.is_contiguous()
        assert a.dtype == b.dtype == torch.bfloat16 and total.dtype == torch.float32
        total += b.float().t() @ a.float()

    generator = torch.Generator().manual_seed(0)
    gradient, rows = (torch.randn(7, n, generator=generator).bfloat16() for n in (5, 3))
    exact = gradient.double().t() @ rows.double()
    totals = {}
    for kernels in None, SimpleNamespace(wgrad_gemm_accum_fp32=accumulate):
        monkeypatch.setattr(loss, "weight_gradient_kernels", lambda device, kernels=kernels: kernels)
        totals[kernels is None] = torch.ones(5, 3)
        loss._add_product(totals[kernels is None], gradient, rows)
    assert torch.allclose(totals[False].double(), exact + 1, rtol=0, atol=1e-5)  # fp32 sums of 7
    assert torch.allclose(totals[True].double(), exact + 1, rtol=2**-8, atol=2**-8)  # bf16 product


def test_training_on_the_cpu_of_a_machine_that_has_apex(tmp_path: Path) -> None:
    """megatron-core takes apex's kernels wherever it finds them; on CPU ranks none of them may be called."""
    write(tmp_path, APEX)
    done = subprocess.run(
        [sys.executable, ROOT / "environments/smoke.py"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "one iteration on two CPU ranks, loss" in done.stdout
