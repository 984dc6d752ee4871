"""Arguments of other trainers, each with its flag here, or the reason why it has none.

People come with the command lines and config files of LLaVA, transformers' Trainer, TRL, DeepSpeed,
Megatron-LM, LLaMA-Factory, ms-swift, Ovis, VITA and lmms-engine. What they type is refused, with the flag to
type instead: meanings differ in details that an alias would hide. docs/from-other-trainers.md is this table.
"""

from __future__ import annotations

import re
from typing import Any, Dict, Iterable, List, Optional, Tuple

from megatron_vlm.config.other_trainers.argument import Argument, filled
from megatron_vlm.config.other_trainers.models import OF_MODELS
from megatron_vlm.config.other_trainers.runs import OF_RUNS
from megatron_vlm.system.units import count_text

PAGE = "docs/from-other-trainers.md"
ARGUMENTS: Dict[str, Tuple[Argument, ...]] = {**OF_RUNS, **OF_MODELS}
_INTRODUCTION = """\
# From other trainers

```shell
python scripts/train/run.py --help
python -m megatron_vlm.config.other_trainers
```

Arguments of LLaVA, transformers' Trainer, TRL, DeepSpeed, Megatron-LM, LLaMA-Factory, ms-swift, Ovis, VITA
and lmms-engine, and what they are here. `run.py` refuses each of them, with underscores or dashes or as a key
of a `--config` file, with the line that stands here; X is the value. Its own flags may have underscores too,
and a switch takes no value: `--packing True` is `--packing`, and `--packing False` is `--no-packing`.

The second command prints this page."""
_BY_NAME: Dict[str, Argument] = {
    name: argument for group in ARGUMENTS.values() for argument in group for name in argument.names.split()
}


def answer(typed: str, value: Any = None, own: bool = False) -> Optional[str]:
    """Return what is said of an argument: one line that begins with it. None where no other trainer here has
    it.

    Args:
        typed: as it was typed, ``--learning_rate``, or a key of a file, ``learning-rate``.
        value: what was given for it; None: nothing.
        own: a flag here has this name too; only what other trainers alone give for it is answered.
    """
    argument = _BY_NAME.get(typed.lstrip("-").replace("-", "_").lower())
    if argument is None:
        return None
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    text = None if value is None or isinstance(value, (dict, list, tuple)) else str(value)
    said, of_value = argument.answer(text)
    if own and not of_value:
        return None
    return f"{typed} {text}: {said}" if of_value else f"{typed}: {said}"


def markdown() -> str:
    """Return docs/from-other-trainers.md."""
    lines = [_INTRODUCTION]
    for heading, group in ARGUMENTS.items():
        lines += ["", f"## {heading}", "", "| there | here |", "|---|---|"]
        lines += [f"| {_names(argument)} | {_cell(argument)} |" for argument in group]
    return "\n".join(lines) + "\n"


def _names(argument: Argument) -> str:
    return ", ".join(f"`{name}`" for name in argument.names.split())


def _cell(argument: Argument) -> str:
    by_answer: Dict[str, List[str]] = {}
    for value, said in argument.values.items():
        if said != argument.here:
            by_answer.setdefault(said, []).append(f"`{value}`")
    parts = [argument.here, *(f"{' '.join(values)}: {said}" for said, values in by_answer.items())]
    return _marked(" · ".join(filled(part, None) for part in parts))


def _marked(text: str) -> str:
    """Return a text with flags, scripts and placeholders as code."""
    code = re.compile(r"(?<![\w`])(?:scripts/[\w/]+\.py|--[a-z][\w-]*|'[^']*\|[^']*'|<[^>]+>(?:/\w+)?)")
    return code.sub(lambda match: f"`{match[0]}`", text).replace("|", "\\|")


def more(answers: Iterable[str]) -> str:
    """Return the first of several answers, and how many more there are: one line."""
    first, *others = answers
    if not others:
        return first
    words = count_text(len(others), "more argument")
    return f"{first} (and {words}: see {PAGE})"
