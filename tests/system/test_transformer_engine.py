"""Which releases of Transformer Engine are taken."""

from __future__ import annotations

import importlib.metadata

import pytest

from megatron_vlm.system.transformer_engine import check_kernel_switches, engine_problem


def problem(**packages: str) -> str | None:
    def version(package: str) -> str:
        if package not in packages:
            raise importlib.metadata.PackageNotFoundError(package)
        return packages[package]

    return engine_problem(version)


def test_what_megatron_core_asks_for() -> None:
    (asked,) = (
        line
        for line in importlib.metadata.requires("megatron-core") or ()
        if line.startswith("transformer-engine")
    )
    assert "<2.12.0" in asked and ">=2.9.0" in asked


@pytest.mark.parametrize("version", ["2.9.0", "2.9.0+70f53666", "2.11.0", "2.10.0.dev0+abc"])
def test_releases_that_fit(version: str) -> None:
    assert problem(transformer_engine=version) is None


@pytest.mark.parametrize("version", ["1.13.0", "2.8.0", "2.12.0", "3.0", "unknown"])
def test_others(version: str) -> None:
    assert problem(transformer_engine=version) == (
        f"Transformer Engine is {version}, and megatron-core asks for 2.9 to 2.11"
    )


def test_parts_of_one_release() -> None:
    assert problem(transformer_engine="2.11.0", transformer_engine_torch="2.11.0") is None
    assert problem(transformer_engine="2.11.0", transformer_engine_cu13="2.10.0") == (
        "transformer_engine is 2.11.0 and transformer_engine_cu13 is 2.10.0; they have to be of one release"
    )
    assert problem() is None


def test_switches_of_attention_kernels_stay_as_megatron_core_wants_them() -> None:
    check_kernel_switches({"NVTE_FLASH_ATTN": "1"})
    with pytest.raises(ValueError, match=r"NVTE_FUSED_ATTN=0 in the environment: .*; unset it"):
        check_kernel_switches({"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0"})
