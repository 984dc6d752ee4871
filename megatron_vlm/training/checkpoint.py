"""Save and load training checkpoints in megatron-core's sharded ``torch_dist`` format.

A checkpoint is written into a hidden folder, flushed, renamed, and only then named in the tracker
file: a run that is killed at any moment leaves the last finished checkpoint as the latest.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker

import megatron_vlm
from megatron_vlm import parallel
from megatron_vlm.artifacts.checkpoint import (
    BASE,
    DATA_STATE,
    FILES,
    HF_FOLDER,
    RUN_CONFIG,
    RUN_STATE,
    checkpoint_layers,
    checkpoint_name,
    finish_folder,
    latest_resumable,
    read_manifest,
    staging_folder,
    start_folder,
    write_manifest,
    write_tracker,
)
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.templates import ChatTemplate
from megatron_vlm.hf.build.tokenizer import drop_appended_end, replace_chat_template
from megatron_vlm.hf.formats.native import LayeredReader, read_metadata
from megatron_vlm.hf.hashes import hash_file, tensors_by_place
from megatron_vlm.models.scaling import scaling_state
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.models.weights import describe, load_sharded, named_parameters, saved_name, sharded_weights
from megatron_vlm.parallel import Layout, sharded_files
from megatron_vlm.parallel.optimizer import MASTER_WEIGHTS, Optimizer
from megatron_vlm.system.files import reading

RNG_FOLDER = "rng"
_WAY_ON = "move the checkpoint's folder away, and the run goes on from the one before it"
_ALWAYS = {"iteration", "consumed_samples", "optimizer_steps"}  # of RunState, whichever version wrote it
_IDENTITY_KINDS = {
    **dict.fromkeys(("data", "grouping"), str),
    **dict.fromkeys(("data_workers", "micro_batch_size", "shuffle_buffer_size"), int),
    "mixture": dict[str, Any],
}
_DATA_KINDS = {
    "identity": dict[str, Any],
    "microbatches": int,
    "counts": dict[str, int],
    "position": str | None,
    "since": int,
}


@dataclass
class RunState:
    """The state of a run: how far it is. Counts are of the whole run, over all data parallel ranks."""

    iteration: int = 0
    consumed_samples: int = 0  # iterations times --global-batch-size: sequences with --packing
    optimizer_steps: int = 0
    skipped: int = 0  # iterations without an update
    not_finite: int = 0  # iterations without an update since a loss or gradient was not finite
    not_finite_in_a_row: int = 0
    spikes: int = 0  # times that the loss jumped
    jumped: bool = False  # and has not been below since
    recent_losses: list[float] = field(default_factory=list)  # what a jump is measured against
    gpu_seconds: float = 0.0  # ranks x time, from the first iteration of each start
    best_loss: float | None = None  # lowest of the evaluations
    best_iteration: int = 0
    improved_loss: float | None = None  # of the last evaluation that counted as an improvement
    evaluations_without_improvement: int = 0  # since then
    evaluated_step: int | None = None  # optimizer_steps at the last evaluation
    held_out: dict[str, Any] | None = None  # what tells the samples of evaluations from others
    evaluation_due: bool = False  # a signal came before or in the evaluation of this iteration
    # What a gradient has reached; None once the run was judged by it (:class:`GradientCheck`).
    parts_reached: list[str] | None = field(default_factory=list)


def save_checkpoint(
    root: Path,
    chunks: Sequence[VisionLanguageModel],
    optimizer: Optimizer | None,
    layout: Layout,
    state: RunState,
    config: RunConfig,
    hf_source: Path,
    data_state: Callable[[], dict[int, Any]] | None,
    base: dict[str, str] | None = None,
    template: ChatTemplate | None = None,
) -> Path:
    """Write ``<root>/iter_<iteration>``; a collective call.

    Args:
        root: folder of the run's checkpoints.
        chunks: this rank's model chunks, unwrapped.
        optimizer: None for a checkpoint with weights only, which can't be resumed from.
        hf_source: folder with the Hugging Face files that the checkpoint carries on.
        data_state: asks the loader for its state; None on ranks that don't load data.
        base: of :func:`find_base`, for a checkpoint of trained weights only; None: all weights.
        template: what samples were rendered with; if it is another than the files' own, it takes its place.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a rank could not write the weights, for want of space for one; on every rank.
    """
    final = root / checkpoint_name(state.iteration)
    if layout.rank == 0:
        start_folder(final, replace=True)
    dist.barrier()
    staging = staging_folder(final)

    weights = sharded_weights(chunks)
    written = dict(weights)
    if base is not None:
        trained = {name for name, parameter in named_parameters(chunks) if parameter.requires_grad}
        written = {name: entry for name, entry in weights.items() if name in trained}
    # save() changes the dictionaries that it is given.
    sharded: dict[str, Any] = _request("model", dict(written))
    if optimizer is not None:
        sharded.update(_request("optimizer", optimizer.sharded_state(weights)))
        sharded.update(_request("scaling", scaling_state(chunks, layout)))
    force_all_tensors_to_non_fp8(written)  # after that: the optimizer looks its weights up by their tensors
    try:
        sharded_files.save(sharded, str(staging))
    except OSError as error:
        if layout.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # the log needs room, too
        dist.barrier()
        last = latest_resumable(root)
        go_on = f": it goes on from {last.name}" if last is not None else ""
        raise ValueError(
            f"{final} could not be saved: {error.strerror}; make room and give the same command again{go_on}"
        ) from None

    files = _hash_own(staging, layout)
    tensors = _gather(describe(written) if layout.tp_rank == layout.dp_rank == 0 else {}, layout)
    data = {}
    if optimizer is not None:
        files.update(_save_rng(staging, layout))
        data = _gather(data_state() if data_state is not None else {}, layout)
    hashes = _gather(files, layout)
    if layout.rank == 0:
        _link_folder(hf_source, staging / HF_FOLDER)
        if template is not None and template.for_folder is not None:
            replace_chat_template(staging / HF_FOLDER, template.for_folder, template.end_token_id)
        if template is not None and template.appended:
            drop_appended_end(staging / HF_FOLDER)
        config.save(str(staging / RUN_CONFIG))
        _write_json(staging / RUN_STATE, asdict(state))
        if optimizer is not None:
            _write_json(staging / DATA_STATE, data)
        written_here = {path.relative_to(staging).as_posix() for path in _files(staging)}
        hashes.update({file: hash_file(staging, file) for file in sorted(written_here - hashes.keys())})
        write_manifest(
            staging,
            {
                "format": "torch_dist",
                "iteration": state.iteration,
                "consumed_samples": state.consumed_samples,
                "has_optimizer": optimizer is not None,
                "model": chunks[0].model_config.to_dict(),
                "layout": {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp},
                "tensors": tensors,
                FILES: hashes,
                **({} if base is None else {BASE: base}),
                "versions": {
                    "megatron_vlm": megatron_vlm.__version__,
                    "torch": torch.__version__,
                    "megatron_core": megatron.core.__version__,
                },
            },
        )
    dist.barrier()
    if layout.rank == 0:
        finish_folder(staging, final)
        write_tracker(root, state.iteration)
    dist.barrier()
    return final


def find_not_finite(
    chunks: Sequence[VisionLanguageModel], optimizer: Optimizer, layout: Layout
) -> str | None:
    """Return the name of a weight that holds NaN or infinite values on some rank, as it is computed with or
    as the optimizer keeps it; None if there is none. A collective call.

    Each rank goes through its own part once, on the device, which takes milliseconds on a GPU.
    """
    names = {id(parameter): name for name, parameter in named_parameters(chunks)}
    found = [(p, p.detach()) for _, p in named_parameters(chunks) if not is_float8tensor(p)]
    found += list(optimizer.master_weights())
    found = [(parameter, tensor) for parameter, tensor in found if tensor.numel()]
    # aminmax passes NaN on and needs no memory; all flags are fetched at once.
    extremes = [torch.stack(torch.aminmax(tensor)) for _, tensor in found]
    finite = torch.stack([extreme.isfinite().all() for extreme in extremes]).tolist() if extremes else []
    broken = next((names[id(p)] for (p, _), fine in zip(found, finite, strict=True) if not fine), None)
    if broken is not None:
        entry = sharded_weights(chunks).get(broken)  # a tied weight has none on the last stage
        broken = broken if entry is None else saved_name(entry)
    return parallel.first_told(broken)


def find_base(
    start: Path, trained: Collection[str], base: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Return the checkpoint that those of a run from ``start`` lie over, if they hold trained weights only.

    Args:
        start: a checkpoint; if all that it holds is trained on, what it lies over itself.
        trained: names of the tensors that are trained.
        base: where the checkpoint under ``start`` is, if it has moved.
    """
    folders = checkpoint_layers(start, base)
    while len(folders) > 1 and set(read_manifest(folders[-1])["tensors"]) <= set(trained):
        folders.pop()
    return {"path": os.path.abspath(folders[-1]), "fingerprint": LayeredReader(folders).fingerprint()}


def load_optimizer(
    folder: Path, chunks: Sequence[VisionLanguageModel], optimizer: Optimizer, state: RunState
) -> None:
    """Load optimizer state; the weights must be loaded before. A collective call.

    Raises:
        ValueError: the checkpoint was written while other parts of the model were trained, or in another
            precision.
    """
    request = optimizer.sharded_state(sharded_weights(chunks), loading=True)
    saved = read_metadata(folder).state_dict_metadata
    in_bf16 = any(name.startswith(MASTER_WEIGHTS) for name in saved)
    if in_bf16 != optimizer.has_master_weights:
        raise ValueError(
            f"{folder}: its optimizer state is of {'--bf16' if in_bf16 else '--fp32'}; go on with that, or "
            "start a new run from its weights"
        )
    for tensors in request.values():
        for entry in tensors.values():
            if entry.key not in saved:
                raise ValueError(
                    f"{folder}: no optimizer state for {entry.key.split('.', 3)[-1]}; it was saved with "
                    "another --stage, --freeze-lm, --train-vision or --train-modules. Use the same, or start "
                    "a new run from its weights"
                )
    loaded = load_sharded(folder, _request("optimizer", request if optimizer.saves else {}))
    with torch.no_grad():
        optimizer.load_sharded_state(loaded.get("optimizer", {}), state.optimizer_steps)


def load_rng(folder: Path, layout: Layout) -> None:
    """Restore the generators, if the checkpoint was saved at this layout and on this kind of device."""
    saved = read_manifest(folder)["layout"]
    if saved != {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}:
        return
    file = _rng_file(folder, layout)
    with reading(file, _WAY_ON):
        states = torch.load(file, weights_only=True)
        if states["device"].shape != torch.cuda.get_rng_state().shape:  # a GPU's can't be one of a CPU's
            return
        torch.set_rng_state(states["torch"])
        if layout.device.type == "cuda":
            torch.cuda.set_rng_state(states["device"])
        get_cuda_rng_tracker().set_states(states["tracker"])
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))


def load_run_state(folder: Path) -> RunState:
    """Read how far the run was when this checkpoint was saved.

    Raises:
        ValueError: the file is damaged.
    """
    saved, kinds = _read_json(folder / RUN_STATE), get_type_hints(RunState)
    with reading(folder / RUN_STATE, _WAY_ON):
        _check_kinds(saved, kinds)
        missing = _ALWAYS - saved.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return RunState(**{"parts_reached": None, **saved})  # older versions did not watch it


def load_data_state(folder: Path) -> dict[str, Any]:
    """Read the states of all data loader workers of the run.

    Raises:
        ValueError: the file is damaged.
    """
    states: dict[str, Any] = _read_json(folder / DATA_STATE)
    with reading(folder / DATA_STATE, _WAY_ON):
        _check_kinds(states, {})
        if not states:
            raise ValueError("it holds no worker")
        for worker, state in states.items():
            int(worker)
            _check_kinds(state, _DATA_KINDS)
            _check_kinds(state.get("identity", {}), _IDENTITY_KINDS)
            _check_kinds(state.get("counts", {}), dict.fromkeys(state.get("counts", {}), int))
    return states


def _request(name: str, entries: dict[Any, Any]) -> dict[str, Any]:
    """Return a part of a sharded state dict.

    On a stage where nothing trains it has to be absent, not empty: what isn't a sharded tensor is saved
    by rank 0 alone and must be the same on every rank.
    """
    return {name: entries} if entries else {}


def _gather(own: Mapping[Any, Any], layout: Layout) -> dict[str, Any]:
    """Return all ranks' dictionaries as one, on rank 0."""
    parts: list[Any] | None = [None] * layout.world_size if layout.rank == 0 else None
    dist.gather_object(own, parts)
    return {key: value for part in parts or [] for key, value in part.items()}


def _rng_file(folder: Path, layout: Layout) -> Path:
    return folder / RNG_FOLDER / f"rank_{layout.rank:05d}.pt"


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files that a checkpoint's manifest has hashes of: all files but those of ``hf/`` that
    hold no weights, which are there to be looked at and changed."""
    for path in folder.rglob("*"):
        of_hf = path.relative_to(folder).parts[0] == HF_FOLDER
        if path.is_file() and (not of_hf or path.suffix == ".safetensors"):
            yield path


def _hash_own(folder: Path, layout: Layout) -> dict[str, Any]:
    """Return the manifest's entries for the tensors' files that this rank has written, while they are in
    the page cache; a collective call."""
    places = parallel.on_first_rank(lambda: tensors_by_place(folder))
    own = [file for file in places if file.startswith(f"__{layout.rank}_")]
    return {file: hash_file(folder, file, places[file]) for file in own}


def _save_rng(folder: Path, layout: Layout) -> dict[str, Any]:
    """Write the generators' states; returns the file's entry in the manifest."""
    file = _rng_file(folder, layout)
    file.parent.mkdir(exist_ok=True)
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
        "python": (version, list(words), gauss),
    }
    written = io.BytesIO()
    torch.save(states, written)  # which tells a full disk as a RuntimeError, if it writes the file itself
    file.write_bytes(written.getvalue())
    name = file.relative_to(folder).as_posix()
    return {name: hash_file(folder, name)}


def _link_folder(source: Path, target: Path) -> None:
    """Carry a folder's small files on: linked where the file system can, since nothing ever changes them."""

    def link(src: str, dst: str) -> None:
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)

    shutil.copytree(source, target, copy_function=link)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {_WAY_ON}") from None


def _check_kinds(values: Any, kinds: Mapping[str, Any]) -> None:
    """Check that values, if given, are of the types that annotations say; floats may be integers.

    Raises:
        TypeError: one is not, or ``values`` is no mapping.
    """
    if not isinstance(values, dict):
        raise TypeError(f"holds a {type(values).__name__}")
    for name in values.keys() & kinds.keys():
        hints = get_args(kinds[name]) if isinstance(kinds[name], UnionType) else (kinds[name],)
        allowed = {get_origin(hint) or hint for hint in hints}
        if type(values[name]) not in allowed | ({int} if float in allowed else set()):
            raise TypeError(f"{name} is {str(values[name])[:40]!r}")
