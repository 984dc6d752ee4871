"""What can be found wrong with a run before torch is loaded: every check, every problem.

inspection = inspect(plan)
inspection.contradictions, inspection.errors, inspection.warnings, inspection.passed
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

from megatron_vlm.config.checkpoint import (
    CHECKPOINTS,
    DATA_STATE,
    HF_FOLDER,
    checkpoint_layers,
    read_manifest,
)
from megatron_vlm.config.data_order import check_same_data, data_identity
from megatron_vlm.config.dataset import shard_counts
from megatron_vlm.config.engine import engine_problem
from megatron_vlm.config.fp8 import unsupported
from megatron_vlm.config.memory import GIB, StageMemory, estimate, suggestions
from megatron_vlm.config.mixture import MixtureConfig, data_folders, is_mixture, one_pass
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.packing import Packing
from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.start import (
    Start,
    check_restart,
    check_same_model,
    check_same_run,
    own_checkpoint,
    with_adapters,
)
from megatron_vlm.config.token_lengths import PackingEstimate, estimate_packing
from megatron_vlm.config.units import size_text
from megatron_vlm.launch import machine, model_files, storage
from megatron_vlm.launch.container import check_image
from megatron_vlm.launch.dataset_files import (
    dataset_problems,
    held_out_problems,
    image_problems,
    length_problems,
)
from megatron_vlm.launch.plan import NODE_0, LaunchPlan
from megatron_vlm.launch.report import Facts


@dataclass
class Inspection:
    """What a look at a run has found.

    Attributes:
        plan: of this node.
        contradictions: flags that contradict each other or the model: no plan is made from them.
        errors: why it would fail; each says what would work.
        warnings: what it would do and perhaps was not meant to.
        passed: names of the checks that found nothing.
        layers: folders of the checkpoint it starts from, the one with all weights first; empty if there
            is none to be read.
        resumes: the last of them is the run's own.
        model: the architecture, with the adapters that the flags ask for.
        train_samples: of one pass over the training data.
        mixture: a line for each of its datasets.
        memory: estimate for each pipeline rank.
        gpu_memory: of one GPU, in GiB.
        disk: one line: checkpoints to come, and the room for them.
    """

    plan: LaunchPlan
    contradictions: List[str] = field(default_factory=list)
    errors: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    passed: List[str] = field(default_factory=list)
    layers: List[Path] = field(default_factory=list)
    resumes: bool = False
    model: Optional[ModelConfig] = None
    train_samples: Optional[int] = None
    mixture: List[str] = field(default_factory=list)
    memory: Sequence[StageMemory] = ()
    gpu_memory: Optional[float] = None
    disk: str = ""

    @property
    def config(self) -> RunConfig:
        """The run that is looked at."""
        return self.plan.config

    @property
    def problems(self) -> List[str]:
        """What keeps the run from starting."""
        return [*self.contradictions, *self.errors]

    @property
    def facts(self) -> Facts:
        """For the first screen."""
        if self.layers:
            folder = self.layers[-1]
            start = f"goes on from {folder.name}" if self.resumes else f"from the weights of {folder}"
        elif self.config.model.init:
            start = "from random weights (--init)"
        else:
            start = f"from {self.config.model.megatron_load_dir}"
        return Facts(
            start,
            self.model,
            self.train_samples,
            self._packing,
            self.mixture,
            tuple(self.memory),
            self.gpu_memory,
            self.disk,
        )

    @property
    def _packing(self) -> Optional[PackingEstimate]:
        """How many samples share a sequence, as each loader worker packs them."""
        config, path = self.config, self.config.data.data_path
        if not config.data.packing or path is None or self.contradictions or self.train_samples is None:
            return None
        workers = config.data_workers(self.plan.world_size)
        packing = Packing(config.data.packing_buffer_size, config.data.seq_length)
        share = packing.buffer_within(self.train_samples // workers)
        return estimate_packing(path, dataclasses.replace(packing, buffer_size=share), config.data.overlong)

    @property
    def hf_folders(self) -> List[str]:
        """Where tokenizer and image processor are looked for, in this order."""
        own = [str(self.layers[-1] / HF_FOLDER)] if self.layers else []
        folders = [folder for folder in (self.config.model.tokenizer_load_dir, *own) if folder]
        return [folder for folder in folders if os.path.isdir(folder)]

    def say(self) -> List[str]:
        """All of it, a line each."""
        return [
            *(f"error: {problem}" for problem in self.problems),
            *(f"warning: {warning}" for warning in self.warnings),
            f"ok: {', '.join(self.passed)}",
        ]


def inspect(plan: LaunchPlan, problems: Sequence[str] = (), doubts: Sequence[str] = ()) -> Inspection:
    """Run all checks.

    Args:
        problems, doubts: what was found while the plan was made, see :func:`plan.make_plans`.
    """
    found = Inspection(plan, errors=list(problems), warnings=list(doubts))
    checks: Sequence[Tuple[str, Callable[[Inspection], None]]] = (
        ("interpreter", _interpreter),
        ("GPUs", _gpus),
        ("image", _image),
        ("dataset", _dataset),
        ("checkpoint", _checkpoint),
        ("flags and layout", _flags),
        ("tokenizer", _tokenizer),
        ("image processor", _image_processor),
        ("image tokens", _image_tokens),
        ("memory", _memory),
        ("cores", _cores),
        ("save folder", _save_folder),
        ("disk", _disk),
        ("container paths", _container_paths),
        ("nodes", _nodes),
    )
    for name, check in checks:
        before = len(found.problems) + len(found.warnings)
        try:
            check(found)
        except ValueError as error:
            found.errors.append(str(error))
        except OSError as error:  # a folder above it can't be searched, a disk doesn't answer
            found.errors.append(f"{error.filename}: {error.strerror}")
        if len(found.problems) + len(found.warnings) == before:
            found.passed.append(name)
    return found


def _interpreter(found: Inspection) -> None:
    try:
        config = found.config
        check_interpreter(config.launch.sif_path, config.parallel.transformer_impl, config.training.fp8)
        _check_engine(found)
    except ValueError as error:
        if not (found.config.slurm.submit and found.config.slurm.setup):
            raise
        found.warnings.append(f"{error}, or let --setup bring it")


def _check_engine(found: Inspection) -> None:
    config = found.config
    if found.plan.device != "cuda" or config.launch.sif_path or config.parallel.transformer_impl == "local":
        return
    problem = engine_problem()
    if problem is not None:
        raise ValueError(f"{problem}; install such a one, or use --transformer-impl local")


def _gpus(found: Inspection) -> None:
    """A job, or a plan for another machine, may find other GPUs than this machine has."""
    fp8 = found.config.fp8
    capability = machine.compute_capability() if fp8 is not None and found.plan.device == "cuda" else None
    if fp8 is None or capability is None or found.config.slurm.submit:
        return
    cuda = machine.torch_cuda() if found.config.launch.sif_path is None else None
    problem = unsupported(fp8.recipe, capability, cuda)
    if problem is not None:
        (found.warnings if found.config.launch.only_looks else found.errors).append(problem)


def _image(found: Inspection) -> None:
    if found.config.launch.sif_path is not None:
        check_image(found.config.launch.sif_path)
        found.errors += storage.image_problems(found.config.launch.sif_path)


def _dataset(found: Inspection) -> None:
    path = found.config.data.data_path
    if path is None:
        return  # a rule of the flags
    problems = list(dataset_problems(path))
    found.errors += problems
    if problems:
        return
    found.train_samples = one_pass(path)
    if is_mixture(path):
        found.mixture = MixtureConfig.load(path).lines()
    batch, iterations = (
        found.config.training.global_batch_size,
        found.config.iterations_over(found.train_samples),
    )
    if found.train_samples is not None and iterations == 0 and found.config.training.epochs is None:
        found.errors.append(
            f"--data-path {path}: its train split of {found.train_samples} samples is less than one "
            f"iteration of --global-batch-size {batch}; lower that, or give --train-iters"
        )
    found.errors += image_problems(path, found.config.trained)
    if found.config.training.eval_interval is not None:
        found.errors += held_out_problems(path)
    if found.train_samples is not None and found.config.training.epochs is not None:
        found.config.with_length(found.train_samples)


def _checkpoint(found: Inspection) -> None:
    config, folder = found.config, found.config.model.tokenizer_load_dir
    if folder is not None and not os.path.isdir(folder):
        found.errors.append(
            f"--tokenizer-load-dir {folder}: no such folder; give a Hugging Face model folder"
        )
    where = config.checkpoint
    begun = where.save_dir and where.name and not where.restart
    start = own_checkpoint(Path(where.run_dir)) if begun else None
    if start is not None or not config.model.init:
        source = start.checkpoint if start is not None else config.model.megatron_load_dir
        if source is None:
            return  # a rule of the flags
        found.layers = checkpoint_layers(
            source, config.model.base, "--megatron-load-dir" if start is None else ""
        )
        found.resumes = start is not None
        manifest = read_manifest(found.layers[-1])
        model = ModelConfig.of_checkpoint(found.layers[-1])
        found.model = dataclasses.replace(model, lora=config.lora.adapters)
        for layer in found.layers:
            found.errors += storage.shard_problems(layer)
        if where.load_optim and start is None and not manifest["has_optimizer"]:
            found.errors.append(f"--load-optim: {source} has no optimizer state; leave the flag out")
        _fits_start(found, start or Start(found.layers[-1], where.load_optim, ""), model)
    elif folder is not None and os.path.isdir(folder):
        model = ModelConfig.from_hf_dir(folder, "--tokenizer-load-dir")
        found.model = dataclasses.replace(model, lora=config.lora.adapters)


def _fits_start(found: Inspection, start: Start, model: ModelConfig) -> None:
    """The rules that training checks before it loads anything large."""
    rules: List[Callable[[], object]] = [
        lambda: check_same_model(found.config, start, model),
        lambda: with_adapters(model, found.config, start),
    ]
    if start.resumes:
        rules.append(lambda: check_same_run(found.config, start))
        rules.append(lambda: _same_data(found, start))
    if found.config.checkpoint.restart:
        rules.append(lambda: check_restart(found.config, Path(found.config.checkpoint.run_dir)))
    for rule in rules:
        try:
            rule()
        except ValueError as error:
            found.errors.append(str(error))


def _same_data(found: Inspection, start: Start) -> None:
    """The data loader's rules, where the run goes on in the middle of its data."""
    config = found.config
    try:
        with open(start.checkpoint / DATA_STATE, encoding="utf-8") as file:
            saved = next(iter(json.load(file).values()))["identity"]
        workers = config.data.data_workers or (config.launch.num_workers or 0) * (config.launch.node or 1)
        workers = workers or int(saved["data_workers"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return  # an older run's, or damaged: the ranks say which
    if config.data.data_path is not None:
        check_same_data(saved, data_identity(config, workers))


def _flags(found: Inspection) -> None:
    found.contradictions += found.config.problems(found.plan.world_size, found.model)


def _tokenizer(found: Inspection) -> None:
    if found.model is not None and found.hf_folders:
        found.errors += model_files.tokenizer_problems(found.hf_folders[0], found.model, found.config)
        found.errors += model_files.end_token_problems(
            found.hf_folders[-1]
        )  # the checkpoint's, if it is there
    elif found.model is not None and found.config.model.tokenizer_load_dir is None:
        found.errors.append("no tokenizer: give --tokenizer-load-dir, the Hugging Face folder of the model")


def _image_processor(found: Inspection) -> None:
    if found.model is not None and found.hf_folders:
        found.errors += model_files.image_problems(found.hf_folders, found.model)
        found.errors += model_files.uncut_problems(found.model, found.config)


def _image_tokens(found: Inspection) -> None:
    if found.model is not None:
        path, data = found.config.data.data_path, found.config.data
        if path is not None and found.train_samples is not None:
            least = found.model.min_image_tokens
            found.errors += length_problems(path, data.seq_length, data.overlong, least)
        found.warnings += model_files.image_warnings(found.hf_folders, found.model)
        found.warnings += model_files.sequence_warnings(found.model, found.config.data.seq_length)


def _memory(found: Inspection) -> None:
    plan, model, job = found.plan, found.model, found.config.slurm.submit
    if plan.device == "cuda":
        # A job's GPUs are those of its nodes, whatever the machine has that it is submitted from.
        found.gpu_memory = found.config.launch.gpu_memory or (None if job else machine.gpu_memory())
    if model is None or found.contradictions:
        return
    found.memory = estimate(found.config, model, plan.world_size, plan.device)
    if plan.device == "cpu" and not job:
        _main_memory(found)
    elif found.gpu_memory is not None:
        limit = int(found.gpu_memory * GIB)
        largest = max(found.memory, key=lambda stage: stage.with_allowance)
        changes = suggestions(found.config, model, plan.world_size, limit, plan.device)
        if changes:
            found.warnings.append(
                f"a GPU of pipeline stage {largest.rank} is predicted to need "
                f"{largest.with_allowance / GIB:.1f} GiB and has {found.gpu_memory:.1f}; "
                + " or ".join(changes)
            )


def _main_memory(found: Inspection) -> None:
    """Of the ranks of node 0, which hold the first stages."""
    size = found.plan.world_size // found.config.parallel.pp
    need = sum(found.memory[rank // size].total for rank in range(found.plan.processes))
    have = machine.main_memory()
    if have is not None and need > have and not found.config.launch.only_looks:
        found.warnings.append(
            f"the {found.plan.processes} processes of this node are predicted to need "
            f"{size_text(need)} of memory, and it has {size_text(have)}; use fewer, or more nodes"
        )


def _cores(found: Inspection) -> None:
    """A SLURM job that asks for none has one on many sites."""
    config, processes, cores = found.config, found.plan.processes, machine.usable_cores()
    if found.plan.device == "cpu" or config.launch.only_looks or config.slurm.submit or cores >= processes:
        return
    found.warnings.append(
        f"the {processes} processes of this node have {cores} CPU core{'s' * (cores > 1)} between them, and "
        "loader workers need some besides; a SLURM job asks for more by --cpus-per-gpu, such as 8"
    )


def _save_folder(found: Inspection) -> None:
    where = found.config.checkpoint
    if not where.save_dir or not where.name:
        return  # a rule of the flags
    for path in (where.run_dir, *(os.path.join(where.run_dir, name) for name in (CHECKPOINTS, "logs"))):
        folder = storage.nearest_folder(path)
        if not os.path.isdir(folder):
            raise ValueError(f"--save-dir {where.save_dir}: {folder} is a file; give a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(
                f"--save-dir {where.save_dir}: {folder} can't be written to; give a folder of your own"
            )


def _disk(found: Inspection) -> None:
    """Room for the checkpoints to come, as far as the file system tells: it doesn't tell of quotas."""
    config, model, where = found.config, found.model, found.config.checkpoint
    if model is None or found.contradictions or not where.save_dir or not where.save:
        return
    iterations = config.iterations_over(found.train_samples)
    done = int(read_manifest(found.layers[-1])["iteration"]) if found.resumes else 0
    saves = storage.number_of_saves(iterations, where.save_interval, done)
    size = storage.checkpoint_bytes(config, model, where.save_optim)
    free = storage.free_bytes(where.save_dir)
    if free is None or not saves:
        return
    # A new one is whole before an old one is deleted.
    at_once = saves if where.keep_checkpoints is None else min(saves, where.keep_checkpoints + 1)
    best = storage.checkpoint_bytes(config, model, False) if config.training.eval_interval else 0
    total = at_once * size + best
    what = (
        f"{at_once} checkpoints of {size_text(size)}" if at_once > 1 else f"a checkpoint of {size_text(size)}"
    )
    what += f" and a best one of {size_text(best)}" if best else ""
    found.disk = f"{what}, {size_text(total)} in all; {size_text(free)} free in {where.save_dir}"
    if size > free:
        smaller = storage.checkpoint_bytes(config, model, False)
        instead = f", or leave --save-optim out ({size_text(smaller)} each)" if smaller <= free else ""
        raise ValueError(
            f"--save-dir {where.save_dir}: a checkpoint takes {size_text(size)}, and {size_text(free)} are "
            f"free there; make room or give another folder{instead}"
        )
    if total > free:
        fits = (free - best) // size - 1
        keep = f"--keep-checkpoints {fits} fits" if fits > 0 else "a larger --save-interval makes fewer"
        found.warnings.append(
            f"--save-dir {where.save_dir}: {what} take {size_text(total)}, and {size_text(free)} are free "
            f"there; {keep}"
        )


def _container_paths(found: Inspection) -> None:
    """What is bound is the folders that flags name, and a link in them may lead elsewhere."""
    config = found.config
    if config.launch.sif_path is None:
        return
    folders = {"--megatron-load-dir": [str(layer) for layer in found.layers]}
    folders["--megatron-load-dir"] += [str(layer / HF_FOLDER) for layer in found.layers]
    folders["--tokenizer-load-dir"] = list(filter(None, [config.model.tokenizer_load_dir]))
    data = config.data.data_path
    folders["--data-path"] = [data] if data is not None and is_mixture(data) else []
    for folder in data_folders(data) if data is not None else ():
        if os.path.isfile(os.path.join(folder, ".nv-meta", ".info.json")):
            inner = {".", ".nv-meta", *(os.path.dirname(name) or "." for name in shard_counts(folder))}
            folders["--data-path"] += [os.path.normpath(os.path.join(folder, name)) for name in sorted(inner)]
    for flag, paths in folders.items():
        links = [link for path in paths for link in storage.links_in(path)]
        lost = storage.unseen([*paths, *links], found.plan.command, os.path.expanduser("~"))
        if lost:
            path, target = lost[0]
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            folder = target if os.path.isdir(target) else os.path.dirname(target)
            found.errors.append(
                f"{flag}: {path}{more} leads to {target}, which is not in the container; add --bind {folder}"
            )


def _nodes(found: Inspection) -> None:
    """What several machines have to agree on."""
    launch, parallel, per_node = found.config.launch, found.config.parallel, found.plan.processes
    nodes = launch.node or 1
    if nodes == 1:
        return
    if launch.interface == "lo":
        others = ", ".join(name for name in machine.network_interfaces() if name != "lo")
        found.warnings.append(f"--interface lo reaches this machine only; there are {others}")
    if launch.master_addr in ("localhost", "127.0.0.1", "::1"):
        found.warnings.append(
            f"--master-addr {launch.master_addr} is another machine on every node; give node 0's host name"
        )
    address = launch.master_addr
    if launch.dry_run or address in (None, NODE_0):
        return
    if not machine.knows_host(str(address)):
        told = found.warnings if launch.preflight_only else found.errors  # this may be none of the nodes
        told.append(f"--master-addr {address}: this machine knows no such host; give the name of node 0")
    if per_node % parallel.tp:
        divisors = [n for n in range(1, parallel.tp) if parallel.tp % n == 0 and per_node % n == 0]
        found.warnings.append(
            f"--tp {parallel.tp} with {per_node} ranks on a node: tensor-parallel groups reach over nodes, "
            f"and wait for the network in every layer; use --tp {divisors[-1]} and more --pp"
        )
    where = found.config.checkpoint.save_dir
    kind = storage.local_file_system(where) if where else None
    if kind is not None:
        found.warnings.append(
            f"--save-dir {where} is on this machine's own file system ({kind}), and all {nodes} nodes write "
            "parts of a checkpoint there; give a folder that they share"
        )


def check_interpreter(
    sif_path: Optional[str] = None, transformer_impl: Optional[str] = None, fp8: bool = False
) -> None:
    """Check that this Python, which the ranks will run under, has what they need.

    Inside a container it isn't asked.

    Raises:
        ValueError: it has not.
    """
    if sif_path is None and not _installed("torch"):
        raise ValueError(
            f"{sys.executable} has no torch; run `make setup` and `source .venv/bin/activate`, "
            "or give --sif-path"
        )
    if sif_path is not None or _installed("transformer_engine"):
        return
    if fp8:
        raise ValueError(f"--fp8: {sys.executable} has no Transformer Engine; use --bf16, or give --sif-path")
    if transformer_impl == "transformer_engine":
        raise ValueError(
            f"--transformer-impl transformer_engine: {sys.executable} does not have it; "
            "use local, or give --sif-path"
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
