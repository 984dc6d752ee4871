"""A Megatron checkpoint as it is written, in either format: tensors, manifest, and how it appears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import RELEASE, appearing_folder, write_manifest, write_tracker
from megatron_vlm.hf.formats.classic import FORMAT, POST_NORM, ClassicLayout, ClassicWriter
from megatron_vlm.hf.formats.native import NativeWriter, check_before_loading
from megatron_vlm.hf.formats.streaming import tool_versions
from megatron_vlm.hf.tables.table import Row, Table
from megatron_vlm.system.registry import Registry

_POST_NORMS = Registry("megatron_vlm.hf.tables", "HAS_CLASSIC_POST_NORM", optional=True)


@contextmanager
def appearing_checkpoint(root: Path, replace: bool) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``<root>/release``, with its tracker file.

    A root that doesn't exist yet appears with both at once.
    """
    if root.is_dir() and any(root.iterdir()):
        with appearing_folder(root / RELEASE, replace=replace) as output:
            yield output
        write_tracker(root, RELEASE)
        return
    with appearing_folder(root) as staging:
        output = staging / RELEASE
        output.mkdir()
        yield output
        write_tracker(staging, RELEASE)


class CheckpointWriter:
    """The tensors and the manifest of a Megatron checkpoint, in either format.

    Args:
        output: an existing folder.
        table: the tensors, with their cuts.
        dtypes: of each Megatron tensor.
        tp: tensor-parallel size that tensors are cut for.
        classic: Megatron-LM's classic format, for this layout; None: the native format.
        read_hf: reads a Hugging Face tensor, for the norm that upstream's SigLIP has and LLaVA doesn't run.
    """

    def __init__(
        self,
        output: Path,
        model: ModelConfig,
        table: Table,
        dtypes: Mapping[str, torch.dtype],
        tp: int,
        classic: ClassicLayout | None,
        read_hf: Callable[[str], Tensor],
    ) -> None:
        self.path, self._tp, self._classic = output, tp, classic
        self._writer: NativeWriter | ClassicWriter
        if classic is None:
            self._writer = NativeWriter(output)
            return
        carried = [
            pair
            for c in table.carries
            for pair in c.hf
            if ".post_layernorm." in pair[0]
            if model.vision.family in _POST_NORMS
        ]
        extra = {Row(POST_NORM + pair[0].split(".")[-1], (pair,)): read_hf(pair[0]) for pair in carried}
        dtypes = {**dtypes, **{row.native: tensor.dtype for row, tensor in extra.items()}}
        self._writer = ClassicWriter(output, [*table.rows, *extra], dtypes, classic, model)
        for row, tensor in extra.items():
            self._writer.write(row.native, tensor)

    def write(self, row: Row, tensor: Tensor) -> None:
        """Write a whole tensor."""
        if isinstance(self._writer, NativeWriter):
            chunks = row.shard.chunks(tuple(tensor.shape), self._tp)
            self._writer.write(row.native, tensor, chunks)
        else:
            self._writer.write(row.native, tensor)

    def holds(self, row: Row, tensor: Tensor) -> bool:
        """Return whether the files hold the tensor that was written."""
        return self._writer.holds(row.native, tensor)

    def close(self, model: dict[str, Any], pp: int, written: dict[str, Any], carried: dict[str, Any]) -> None:
        """Write what makes the folder a checkpoint.

        Args:
            model: description of the model.
            pp: pipeline-parallel size.
            written: the manifest's entry of each tensor.
            carried: of each tensor beside them, which training doesn't run.
        """
        if isinstance(self._writer, NativeWriter):
            self._writer.close()
        layout: dict[str, Any] = {"tp": self._tp, "pp": pp, "dp": 1}
        if self._classic is None:
            check_before_loading(self.path)
        else:
            layout.update(vpp=self._classic.vpp, layers_per_stage=list(self._classic.layers))
        manifest = {
            "format": "torch_dist" if self._classic is None else FORMAT,
            "iteration": 0,
            "consumed_samples": 0,
            "has_optimizer": False,
            "model": model,
            "layout": layout,
            "tensors": written,
            "carried": carried,
            "versions": tool_versions(),
        }
        write_manifest(self.path, manifest)
