"""PEFT's ``adapter_config.json``: which adapters are ``W + scale * B A``, and which become that.

Every key is in :data:`READ`, in :data:`IGNORED`, or in :data:`PLAIN`, which says what it must be. PEFT adds a
way to compute something else with nearly every release, so a key that is in none of them is refused, unless
it is off.

Source: peft ``tuners/lora/config.py``, ``tuners/lora/layer.py`` and ``tuners/tuners_utils.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.architecture.lora import LoRAConfig
from megatron_vlm.system.files import check_readable, read_json

ADAPTER_CONFIG = "adapter_config.json"

_DEFAULTS = {"r": 8, "lora_alpha": 8, "use_rslora": False, "init_lora_weights": True}  # PEFT's own
READ = frozenset(
    ("peft_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", *_DEFAULTS)
)

# What any value of a key leaves as it is, and why.
IGNORED = {
    "auto_mapping": "names the class of the base model",
    "base_model_name_or_path": "names the base model",
    "revision": "of the base model",
    "peft_version": "wrote it",
    "inference_mode": "says whether PEFT trains it",
    "runtime_config": "is not saved",
    "lora_dropout": "acts in training, where --lora-dropout takes its place",
    "fan_in_fan_out": "PEFT takes it as false for a Linear, and all targets here are Linear",
    "layers_pattern": "acts with layers_to_transform",
    "megatron_core": "acts with megatron_config",
    "qalora_group_size": "acts with use_qalora",
    "eva_config": "says how A was first set, which training went on from",
    "corda_config": "acts with init_lora_weights",
    "loftq_config": "acts with init_lora_weights",
    "lora_ga_config": "acts with init_lora_weights",
    "ensure_weight_tying": "acts on embeddings and output layer, which have no adapters here",
}

MERGE = "merge it into its model with PEFT's merge_and_unload, and convert that model"
_ONLY_PEFT = "which no weights can stand for; use it with PEFT"


@dataclass(frozen=True)
class Plain:
    """The value that a key has to have for an adapter to be ``W + scale * B A``.

    Attributes:
        accepts: given the key's value and the whole configuration.
        otherwise: what another value means, and what would work.
    """

    otherwise: str
    accepts: Callable[[Any, dict[str, Any]], bool] = lambda value, config: not value


PLAIN = {
    "task_type": Plain(
        "for it PEFT runs another forward pass; with CAUSAL_LM or null it runs the model's own",
        lambda value, config: value in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"),
    ),
    "bias": Plain(
        f"biases were trained beside A and B; {MERGE}", lambda value, config: value in (None, "none")
    ),
    "lora_bias": Plain(f"B has a bias; {MERGE}"),
    "use_dora": Plain(f"DoRA scales the rows of the sum; {MERGE}"),
    "use_bdlora": Plain(f"A or B is block-diagonal; {MERGE}"),
    "kasa_config": Plain(f"KaSA changes W, too; {MERGE}"),
    "velora_config": Plain(f"VeLoRA keeps a tensor more; {MERGE}"),
    "layer_replication": Plain(f"layers of the model are repeated; {MERGE}"),
    "trainable_token_indices": Plain(f"rows of the embedding were trained; {MERGE}"),
    "target_parameters": Plain(f"adapters stand beside parameters without a module; {MERGE}"),
    "rank_pattern": Plain(
        f"supported: one rank and alpha for all projections; {MERGE}",
        lambda value, config: all(one == config["r"] for one in (value or {}).values()),
    ),
    "alpha_pattern": Plain(
        f"supported: one rank and alpha for all projections; {MERGE}",
        lambda value, config: all(one == config["lora_alpha"] for one in (value or {}).values()),
    ),
    "alora_invocation_tokens": Plain(f"aLoRA acts from these tokens on, {_ONLY_PEFT}"),
    "arrow_config": Plain(f"Arrow chooses an adapter for each token, {_ONLY_PEFT}"),
    "monteclora_config": Plain(f"MonteCLoRA draws its weights, {_ONLY_PEFT}"),
    "use_qalora": Plain(f"QALoRA pools the input of GPTQ's quantized layers, {_ONLY_PEFT}"),
    "megatron_config": Plain(
        "it was made for Megatron's own linear layers; supported: those of transformers"
    ),
}

# Each leaves W as it is, and training went on from what it had set A and B to.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
# Each takes s B A of its start out of W, which PEFT computes again from W when it loads the adapter.
FROM_WEIGHT = ("pissa", "olora")


@dataclass(frozen=True)
class PeftAdapter:
    """The settings in ``adapter_config.json`` of an adapter that can be read.

    Attributes:
        start: one of :data:`FROM_WEIGHT` where W lacks what A and B began as; None: W is the base model's.
        targets: modules with adapters, as PEFT matches them: a regular expression, or endings of names.
        excluded: as ``targets``; these have none.
        saved: endings of names of modules that were trained in full.
    """

    path: Path
    rank: int
    alpha: float
    rslora: bool
    start: str | None
    targets: str | list[str]
    excluded: str | list[str]
    saved: list[str]

    @property
    def scale(self) -> float:
        """The factor of ``B A x``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check_fits(self, lora: LoRAConfig) -> None:
        """Check that a run's adapters can hold this one.

        Raises:
            ValueError: their rank, alpha or scaling is another; the message names the flags.
        """
        times = 1 if self.start is None else 2
        why = "" if self.start is None else f", since {self.start} becomes a plain LoRA of twice the rank"
        for key, flag, found, needed, wanted in (
            ("r", "--lora-rank", self.rank, times * self.rank, lora.rank),
            # What rounding leaves out of a fraction is put into B.
            ("lora_alpha", "--lora-alpha", self.alpha, max(1, round(times * self.alpha)), lora.alpha),
        ):
            if needed != wanted:
                raise ValueError(
                    f"{self.path}: {key} is {found}, but {flag} is {wanted}; give {flag} {needed}{why}"
                )
        if self.rslora != lora.rslora:
            raise ValueError(
                f"{self.path}: use_rslora is {self.rslora}, but --use-rslora is {lora.rslora}; "
                f"{'give it' if self.rslora else 'leave it out'}"
            )

    def has_adapter(self, module: str) -> bool:
        """Return whether PEFT gives a module adapters, by its name in the running model."""
        return _matches(self.targets, module) and not _matches(self.excluded, module)

    def is_saved(self, tensor: str) -> bool:
        """Return whether a tensor of the model is of a module that was trained in full."""
        parts = tensor.split(".")[:-1]
        modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(module.endswith(ending) for module in modules for ending in self.saved)


def _matches(pattern: str | list[str], module: str) -> bool:
    if isinstance(pattern, str):
        if pattern.lower() == "all-linear":
            return True
        return bool(pattern) and re.fullmatch(pattern, module) is not None
    return any(f".{module}".endswith(f".{ending}") for ending in pattern)


def read_peft_config(folder: Path) -> PeftAdapter:
    """Read the ``adapter_config.json`` of a folder.

    Raises:
        ValueError: there is none, or it is of something else; the message names the key.
    """
    path = folder / ADAPTER_CONFIG
    check_readable(path)
    try:
        config = {**_DEFAULTS, **read_json(path)}
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no PEFT adapter ({error!r})") from None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind}; supported: LORA; {MERGE}")
    _check_types(path, config)
    for key, value in config.items():
        if key in READ or key in IGNORED:
            continue
        rule = PLAIN.get(key, _UNKNOWN)
        if not rule.accepts(value, config):
            raise ValueError(f"{path}: {key} is {_short(value)}: {rule.otherwise}")
    layers = config.get("layers_to_transform")
    if layers not in (None, []):
        raise ValueError(
            f"{path}: layers_to_transform is {_short(layers)}: supported: adapters in all layers; {MERGE}"
        )
    return PeftAdapter(
        path=path,
        rank=config["r"],
        alpha=config["lora_alpha"],
        rslora=config["use_rslora"],
        start=_start(path, config["init_lora_weights"]),
        targets=config.get("target_modules") or [],
        excluded=config.get("exclude_modules") or [],
        saved=config.get("modules_to_save") or [],
    )


_UNKNOWN = Plain(
    "a key that isn't known here; save the adapter with an older PEFT, or merge it with this one"
)
_TYPES: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("r", (int,)),
    ("lora_alpha", (int, float)),
    ("use_rslora", (bool,)),
    ("rank_pattern", (dict, type(None))),
    ("alpha_pattern", (dict, type(None))),
    ("target_modules", (str, list, type(None))),
    ("exclude_modules", (str, list, type(None))),
    ("modules_to_save", (list, type(None))),
)


def _check_types(path: Path, config: dict[str, Any]) -> None:
    for key, kinds in _TYPES:
        value = config.get(key)
        wrong = key in config and (
            not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        )
        wrong = wrong or (isinstance(value, list) and not all(isinstance(item, str) for item in value))
        if wrong or (key == "r" and config["r"] <= 0):
            raise ValueError(f"{path}: {key} is {_short(value)}, which is no value of it")
    for key in ("target_modules", "exclude_modules"):
        try:
            re.compile(config[key] if isinstance(config.get(key), str) else "")
        except re.error as error:
            raise ValueError(f"{path}: {key} is no regular expression ({error})") from None


def _start(path: Path, value: Any) -> str | None:
    """Return the start of A and B, where the base weights depend on it."""
    if not isinstance(value, str):
        if value in (None, True, False):
            return None
    elif value.lower() in _PLAIN_STARTS:
        return None
    elif value.lower() in FROM_WEIGHT:
        return value.lower()
    raise ValueError(
        f"{path}: init_lora_weights is {_short(value)}: the base weights were changed, and the adapter "
        "doesn't say how; save it where it was trained with path_initial_model_for_weight_conversion"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
