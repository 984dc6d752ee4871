"""Checks of a run before torch is loaded: every check, every problem.

inspection = inspect(plan)
inspection.contradictions, inspection.errors, inspection.warnings, inspection.passed

data.py, model.py         what a run reads
saves.py                  what it writes
software.py, hardware.py  what it runs in and on
dataset_files.py, model_files.py, storage.py  what lies on disk, asked without energon, transformers or torch
inspection.py             what these have found
"""

from __future__ import annotations

from typing import Callable, Sequence, Tuple

from megatron_vlm.launch.launch_plan import LaunchPlan
from megatron_vlm.launch.preflight import data, hardware, model, saves, software
from megatron_vlm.launch.preflight.inspection import Inspection

__all__ = ["Inspection", "inspect"]


def inspect(plan: LaunchPlan, problems: Sequence[str] = (), doubts: Sequence[str] = ()) -> Inspection:
    """Run all checks.

    Args:
        problems, doubts: what was found while the plan was made, see :func:`launch_plan.make_plans`.
    """
    found = Inspection(plan, errors=list(problems), warnings=list(doubts))
    checks: Sequence[Tuple[str, Callable[[Inspection], None]]] = (
        ("interpreter", software.interpreter),
        *([("GPUs", hardware.gpus)] if plan.device == "cuda" else []),
        ("image", software.image),
        ("dataset", data.dataset),
        ("checkpoint", model.checkpoint),
        ("flags and layout", model.flags),
        ("loader workers", data.loader_workers),
        ("tokenizer", model.tokenizer),
        ("image processor", model.image_processor),
        ("image tokens", model.image_tokens),
        ("lengths", data.lengths),
        ("memory", hardware.memory),
        ("cores", hardware.cores),
        ("save folder", saves.save_folder),
        ("disk", saves.disk),
        ("container paths", software.container_paths),
        ("nodes", hardware.nodes),
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
