"""The config of one training run: what its flags, its JSON file and its checkpoints say.

    config = RunConfig.from_flags(sys.argv[1:])
    validate(config, world_size=8, model=model)  # plan/rules.py
    command = ["python", "-m", "megatron_vlm.training", *config.to_flags()]

Field names and flag names are the same: ``save_dir`` is ``--save-dir``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from megatron_vlm.architecture.fp8 import Fp8Config
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.train_modules import TrainEntry, parse_train_modules
from megatron_vlm.config.checks import nearest_multiples
from megatron_vlm.config.flags import FlagParser, flag_name, negative_flag_name
from megatron_vlm.config.headings import GROUPS
from megatron_vlm.config.sections import (
    SECTIONS,
    CheckpointSection,
    DataSection,
    Fp8Section,
    LaunchSection,
    LoggingSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    SlurmSection,
    TrainingSection,
)
from megatron_vlm.system.files import read_json, write_whole
from megatron_vlm.system.units import count_text

# LLaVA's recipe; a run without a stage starts from stage 2's.
_STAGE_DEFAULTS: Dict[int, Dict[str, Any]] = {
    1: {"freeze_lm": True, "micro_batch_size": 16, "global_batch_size": 256, "lr": 1e-3},
    2: {"freeze_lm": False, "micro_batch_size": 1, "global_batch_size": 128, "lr": 2e-5},
}
# LLaVA's recipe for LoRA, which takes the place of stage 2's.
_LORA_DEFAULTS: Dict[str, Any] = {"freeze_lm": True, "lr": 2e-4}
_MIN_LR = 1e-8
# What --deterministic needs before a process starts that uses a GPU.
DETERMINISTIC_ENVIRONMENT: Dict[str, str] = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",  # Tree, which Megatron-LM also admits, has no reduce-scatter and no all-gather
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
_WARMUP_FRACTION = 0.03
# Several ways to say one thing: a flag for one replaces the file's values for the others.
_ALTERNATIVES: Dict[str, Tuple[str, ...]] = {
    "train_iters": ("train_samples", "epochs"),
    "train_samples": ("train_iters", "epochs"),
    "epochs": ("train_iters", "train_samples"),
    "lr_warmup_iters": ("lr_warmup_fraction",),
    "lr_warmup_fraction": ("lr_warmup_iters",),
    "train_modules": ("freeze_lm", "train_vision"),
}
_ENOUGH_DATA_WORKERS = 4

_EPILOG = """\
--config FILE.json gives any of these flags from a file, e.g. {"tp": 2, "train-iters": 500, "bf16": true};
the config.json of a run folder is such a file too. Flags on the command line win.
Every switch has its opposite: --no-wandb, --no-freeze-lm, ..."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that describes a run, in sections.

    Built by :meth:`from_flags` or :meth:`from_dict`, which fill in the defaults that depend on other
    values. The rules inside a section are checked when it is built, those between sections by
    :func:`megatron_vlm.plan.rules.validate`.
    """

    model: ModelSection
    parallel: ParallelSection
    data: DataSection
    training: TrainingSection
    low_precision: Fp8Section
    lora: LoraSection
    optimizer: OptimizerSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    launch: LaunchSection
    slurm: SlurmSection

    @classmethod
    def from_flags(
        cls, argv: Sequence[str], prog: Optional[str] = None, site: Optional[str] = None
    ) -> RunConfig:
        """Read command-line flags, and the JSON files that ``--config`` and ``--site`` name; flags win.

        ``--help`` prints the help and raises ``SystemExit(0)``.

        Args:
            argv: the flags.
            prog: name of the program in the help.
            site: site file in place of one that ``--site`` names; none is read if it is empty.

        Raises:
            ValueError: a flag is unknown, unavailable or malformed, or a rule inside a section is broken.
        """
        parser = _parser()
        parser.prog = prog or parser.prog
        given = parser.read(argv)
        path = given.pop("config", None)
        if path is not None:
            from_file = parser.read_json(_load_json(path), where=path)
            for name in given:
                for alternative in _ALTERNATIVES.get(name, ()):
                    from_file.pop(alternative, None)
            merged = {**from_file, **given}
            if _recipe(merged) != _recipe(from_file):
                # A saved config holds all values: those that its own recipe set are no choice of anyone's.
                for name, value in _recipe(from_file).items():
                    if from_file.get(name) == value:
                        del from_file[name]
            given = {**from_file, **given}
        site = given.pop("site", site)
        if site:
            given = _over_site(parser.read_site(_load_json(site, "--site"), f"--site {site}"), given)
        return cls._from_values(given)

    def check_typed(self, argv: Sequence[str]) -> None:
        """Check that what ``argv`` says of a job is for one: a site file may say it for nothing.

        Raises:
            ValueError: it is not; without --submit the run would start on the login node.
        """
        typed = _parser().read(argv)
        names = [field.name for field in dataclasses.fields(SlurmSection) if field.name in typed]
        if names and not self.slurm.submit and names != ["submit"]:
            raise ValueError(f"{flag_name(names[0])} does nothing without --submit; give both or neither")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> RunConfig:
        """Build a config from the values of :meth:`to_dict`; keys that are left out take their defaults.

        Args:
            values: ``{section: {field: value}}``; fields may also stand at the top level.
            where: names the source in messages.

        Raises:
            ValueError: a key is unknown (the nearest one is suggested), or as :meth:`from_flags`.
        """
        return cls._from_values(_parser().read_json(values, where))

    @classmethod
    def load(cls, path: str) -> RunConfig:
        """Read a file that :meth:`save` wrote, or that ``--config`` takes."""
        return cls.from_dict(_load_json(path), where=path)

    def save(self, path: str) -> None:
        """Write the config as JSON: whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def to_dict(self) -> Dict[str, Dict[str, Any]]:
        """Return ``{section: {field: value}}`` as plain JSON values."""
        values: Dict[str, Dict[str, Any]] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    def to_flags(self) -> List[str]:
        """Return the shortest argument list from which :meth:`from_flags` builds this config again."""
        values: Dict[str, Any] = {}
        for section in SECTIONS:
            values.update(dataclasses.asdict(getattr(self, section)))
        return _parser().write(values)

    @classmethod
    def _from_values(cls, given: Mapping[str, Any]) -> RunConfig:
        if given.get("lora_rank") is not None:
            _check_lora(given)
        values = {**_recipe(given), **given}
        values.setdefault("min_lr", min(_MIN_LR, values["lr"]))
        values.setdefault(
            "lr_warmup_fraction", None if values.get("lr_warmup_iters") is not None else _WARMUP_FRACTION
        )
        if values.get("fp8") and values.get("precision") is None:
            values["precision"] = "bf16"
        if values.get("train_modules") is not None:
            values.update(_switches_of(values["train_modules"], given))
        elif values.get("stage") == 1 and not values["freeze_lm"]:
            raise ValueError("--no-freeze-lm contradicts --stage 1; --stage 2 trains the language model")
        sections = {}
        for name, section in SECTIONS.items():
            names = [field.name for field in dataclasses.fields(section)]
            sections[name] = section(**{key: values[key] for key in names if key in values})
        return cls(**sections)

    def dp(self, world_size: int) -> int:
        """Return the data-parallel size on ``world_size`` ranks.

        Raises:
            ValueError: ``world_size`` cannot be divided into model copies of tp x pp ranks.
        """
        tp, pp = self.parallel.tp, self.parallel.pp
        if world_size % (tp * pp):
            raise ValueError(
                f"{world_size} ranks are no multiple of --tp {tp} x --pp {pp} = {tp * pp}; "
                f"use {_nearest(world_size, tp * pp)} ranks (--gpus x --node), or another --tp or --pp"
            )
        return world_size // (tp * pp)

    def num_microbatches(self, world_size: int) -> int:
        """Return the number of microbatches per iteration of each data-parallel rank.

        Raises:
            ValueError: micro batch x data-parallel size does not divide the global batch.
        """
        micro, batch = self.training.micro_batch_size, self.training.global_batch_size
        dp = self.dp(world_size)
        if batch % (micro * dp):
            raise ValueError(
                f"--global-batch-size {batch} is no multiple of --micro-batch-size {micro} x "
                f"data-parallel size {dp} = {micro * dp}; "
                f"{nearest_multiples('--global-batch-size', batch, micro * dp)}"
                + _micro_batches_that_work(batch, micro, dp)
            )
        return batch // (micro * dp)

    @property
    def fp8(self) -> Optional[Fp8Config]:
        """The way matrix products in FP8 are done; None without ``--fp8``."""
        return self.low_precision.config if self.training.fp8 else None

    @property
    def sequence_multiple(self) -> int:
        """The number that sequences are padded to a multiple of: tensor parallel ranks cut them into equal
        parts with sequence parallelism, and FP8 multiplies aligned numbers of tokens."""
        parallel, fp8 = self.parallel, self.fp8
        if fp8 is None:
            return parallel.tp if parallel.sequence_parallel else 1
        rows = 1 if self.data.packing else self.training.micro_batch_size
        return fp8.sequence_multiple(rows, parallel.tp, parallel.sequence_parallel)

    def data_workers(self, world_size: int) -> int:
        """Return the number of loader workers of the whole run, N: dp divides N, and N divides global batch /
        micro batch.

        The content of every global batch depends on N but not on dp. So that the default stays the same
        when a run goes on at another data-parallel size, it is the smallest such N from 4 up, or the
        largest if there is none.

        Raises:
            ValueError: the flags ask for a number that breaks these rules; the message lists those that work.
        """
        dp = self.dp(world_size)
        microbatches = dp * self.num_microbatches(world_size)
        works = [n for n in range(dp, microbatches + 1, dp) if microbatches % n == 0]
        wanted, flags = self.data.data_workers, "--data-workers"
        if self.launch.num_workers is not None:
            nodes = self.launch.node or 1
            total = self.launch.num_workers * nodes
            if wanted not in (None, total):
                raise ValueError(
                    f"--num-workers {self.launch.num_workers} on {count_text(nodes, 'node')} is {total} "
                    f"loader workers, but --data-workers is {wanted}; leave one of them out"
                )
            wanted, flags = total, f"--num-workers {self.launch.num_workers} x {count_text(nodes, 'node')} ="
        if wanted is None:
            return next((n for n in works if n >= _ENOUGH_DATA_WORKERS), works[-1])
        if wanted not in works:
            raise ValueError(
                f"{flags} {wanted} does not fit: the data-parallel size {dp} must divide the loader workers, "
                f"and they must divide the {microbatches} micro batches of a global batch; "
                f"use --data-workers {_either(works)}"
            )
        return wanted

    @property
    def train_iterations(self) -> int:
        """Iterations of the whole run.

        Raises:
            ValueError: no flag says how long to train.
        """
        iterations = self.training.iterations
        if iterations is None:
            raise ValueError("neither --train-iters nor --train-samples is given; say how long to train")
        return iterations

    def iterations_over(self, num_samples: Optional[int]) -> Optional[int]:
        """Return the iterations of the whole run; None where they depend on a number of samples that isn't
        known.

        Args:
            num_samples: of one pass over the training split.
        """
        if self.training.iterations is not None or num_samples is None:
            return self.training.iterations
        return self._samples_over(num_samples) // self.training.global_batch_size

    def with_length(self, num_samples: int) -> RunConfig:
        """Return the same run, its length in samples where the flags give it in passes, or not at all: one
        pass.

        Args:
            num_samples: of one pass over the training split.

        Raises:
            ValueError: that is less than a global batch.
        """
        if self.training.iterations is not None:
            return self
        epochs, batch, samples = (
            self.training.epochs,
            self.training.global_batch_size,
            self._samples_over(num_samples),
        )
        if epochs is not None and samples < batch:
            raise ValueError(
                f"--epochs {epochs:g} of {num_samples} samples is less than one iteration of "
                f"--global-batch-size {batch}; raise the former or lower the latter"
            )
        training = dataclasses.replace(self.training, train_samples=samples, epochs=None)
        return dataclasses.replace(self, training=training)

    def _samples_over(self, num_samples: int) -> int:
        # Of the decimal that was typed: as a float, 0.29 of 100 would be 28.999.
        return int(num_samples * Fraction(str(self.training.epochs or 1)))

    @property
    def trained(self) -> Tuple[TrainEntry, ...]:
        """The parts that are trained; what none of them names is frozen. Adapters always are."""
        entries = self.model.trained
        if self.lora.adapters is None or any(entry.name == "lora" for entry in entries):
            return entries
        return (*entries, TrainEntry("lora"))

    def trains(self, model: ModelConfig) -> Callable[[str], bool]:
        """Return a function that says whether a parameter is trained, by the name that checkpoints have for
        it.

        Raises:
            ValueError: the model has no such part, see :meth:`TrainEntry.patterns`.
        """
        patterns = [pattern for entry in self.trained for pattern in entry.patterns(model)]
        return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)

    @property
    def decay_iterations(self) -> int:
        """Iterations after which the learning rate has reached its minimum, the warmup included."""
        return self.optimizer.lr_decay_iters or self.train_iterations

    @property
    def warmup_iterations(self) -> int:
        """Iterations in which the learning rate rises."""
        if self.optimizer.lr_warmup_iters is not None:
            return self.optimizer.lr_warmup_iters
        return int((self.optimizer.lr_warmup_fraction or 0.0) * self.decay_iterations)


def _recipe(given: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the defaults that the stage sets, or LoRA in its place."""
    recipe = _STAGE_DEFAULTS[given.get("stage") or 2]
    return recipe if given.get("lora_rank") is None else {**recipe, **_LORA_DEFAULTS}


def _switches_of(train_modules: str, given: Mapping[str, Any]) -> Dict[str, bool]:
    """Return ``freeze_lm`` and ``train_vision`` as ``--train-modules`` implies them; those given must
    agree."""
    entries = parse_train_modules(train_modules)
    implied = {
        "freeze_lm": not any(entry.may_train("language") for entry in entries),
        "train_vision": any(entry.may_train("vision") for entry in entries),
    }
    for name, value in implied.items():
        if given.get(name, value) != value:
            switch = flag_name(name) if given[name] else negative_flag_name(name)
            raise ValueError(f"{switch} contradicts --train-modules '{train_modules}'; leave one of them out")
    return implied


def _check_lora(given: Mapping[str, Any]) -> None:
    if given.get("stage") == 1:
        raise ValueError("--lora-rank with --stage 1, which trains the projector alone; use --stage 2")
    if given.get("train_modules") is not None:
        return  # the names of the model's parameters will tell
    if given.get("freeze_lm") is False:
        raise ValueError("--no-freeze-lm trains the weights beside which --lora-rank puts adapters; drop one")
    in_tower = any(name.startswith("vision.") for name in given.get("lora_targets", ()))
    if given.get("train_vision") and in_tower:
        raise ValueError("--train-vision trains weights beside which --lora-targets puts adapters; drop one")


@functools.cache  # it takes some 20 ms
def _parser() -> FlagParser:
    parser = FlagParser(
        SECTIONS,
        GROUPS,
        from_others=True,
        usage="%(prog)s [--config FILE.json] [flags]",
        description="Train a LLaVA-type vision-language model with megatron-core.",
        epilog=_EPILOG,
    )
    parser.add_argument("--config", metavar="FILE.json", help="read flags from a file; those given here win")
    parser.add_argument(
        "--site", metavar="FILE.json", help="defaults of this site, see docs/slurm.md (MEGATRON_VLM_SITE)"
    )
    return parser


def _load_json(path: str, name: str = "--config") -> Any:
    try:
        return read_json(path)
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _over_site(site: Dict[str, Any], given: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a run's values laid over its site's: a value takes the other's place, lists add up."""
    values = {**site, **given}
    for name, value in site.items():
        if isinstance(value, tuple):
            values[name] = value + given.get(name, ())
    if values.get("sif_path") is None and "bind" not in given:
        values.pop("bind", None)  # a site's are for runs in a container
    if "gpu_ids" in given and "gpus" not in given:
        values.pop("gpus", None)
    return values


def _nearest(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def _micro_batches_that_work(batch: int, micro: int, dp: int) -> str:
    works = [n for n in range(1, micro + 1) if batch % (n * dp) == 0]
    return f", or --micro-batch-size {works[-1]}" if works else ""


def _either(numbers: Sequence[int]) -> str:
    # A long list helps nobody: the small ones are what a run wants.
    shown = [str(n) for n in numbers[:8]]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + f" or {shown[-1]}"
