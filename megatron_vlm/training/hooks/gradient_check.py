"""The check that gradients reach what is trained, and that nothing else changes.

An unfrozen part that never updates leaves no mark in a loss curve, so the first iterations of every start are
watched. It costs two passes over the frozen weights and a small reduction per iteration, until all is well.
After the first updates of a run it is judged by them: one that has trained nothing is not worth its time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.architecture.train_modules import LANGUAGE
from megatron_vlm.models.modalities.table import MODALITIES
from megatron_vlm.parallel import Layout
from megatron_vlm.system.units import count_text
from megatron_vlm.training.batch import GlobalBatch
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.context import RunContext
from megatron_vlm.training.freezing import MODULES, Regime
from megatron_vlm.training.hooks import Hook
from megatron_vlm.training.step import StepResult

# A tensor may rightly have no gradient for a while: LoRA's first factor until the second has moved, and
# a warmup that begins at zero keeps that still for an iteration.
_PATIENCE = 10
_LONGEST = 100  # iterations to wait for an image
_JUDGED = 20  # updates after which a run is judged


class GradientCheck(Hook):
    """A hook that watches a run until a gradient has reached every trained tensor.

    Args:
        regime: what is trained; its weights are loaded.
        state: of the run; remembers which parts a gradient has reached.
        say: prints, on one rank.
    """

    def __init__(self, regime: Regime, layout: Layout, state: RunState, say: Callable[[str], None]) -> None:
        self.regime = regime
        self.layout = layout
        self.state = state
        self.say = say
        self.parts = list(dict.fromkeys(map(_part, regime.trained)))
        self.waiting = list(regime.trained)  # tensors that no gradient has reached; the same on every rank
        self.frozen = [(name, parameter) for name, parameter in regime.own if name not in regime.trained]
        self.bits: list[Tensor] | None = _bits(self.frozen)
        self.updates = self.iterations = 0  # of this start; the second with trained tokens
        self.with_media = dict.fromkeys(MODALITIES, 0)  # of these, the ones with such media, by kind
        self.came: set[str] = set()  # kinds of which there was any, with trained tokens or without

    def after_step(self, batch: GlobalBatch, result: StepResult) -> None:
        """Look at the gradients that an update has left; a collective call while there is something to watch.

        Raises:
            ValueError: none has reached a module that is trained, in an iteration with images if they are
                what it works on; or none has reached an entry of ``--train-modules`` in ten of them; or as
                :meth:`judge`.
            RuntimeError: the step has changed frozen parameters.
        """
        if not result.updated:
            return
        if self.bits is not None:
            self._check_frozen(self.bits)
            self.bits = None
        self.updates += 1
        if self.waiting and result.trained_tokens:  # without any there is no gradient to see
            self._watch(batch)
        if self.updates == _JUDGED:
            self.judge()

    def judge(self) -> None:
        """Judge the run by its first updates: the 20th calls this, and the end of a run that has fewer.

        Raises:
            ValueError: no gradient has reached anything that is trained.
        """
        reached = self.state.parts_reached
        if reached is None or not self.updates:
            return
        self.state.parts_reached = None
        still = [part for part in self.parts if part not in reached]
        if not reached:
            raise ValueError(
                f"nothing of what is trained ({', '.join(still)}) has had a gradient in "
                f"{count_text(self.updates, 'update')}: {self._why_still()}, so the run was stopped"
            )
        if still:
            self.say(
                f"warning: no gradient has reached the {' and the '.join(still)} in "
                f"{count_text(self.updates, 'update')}: {self._why_still()}"
            )

    def _why_still(self) -> str:
        if not self.iterations:
            return "no sample has had a token that is trained; look at --template, --seq-length and the data"
        kinds = {kind for kind in map(_kind, self.waiting) if kind is not None}
        some = " or ".join(_one(kind) for kind in MODALITIES if kind in kinds)
        if kinds & self.came:
            return (
                f"no sample with {some} has had a token that is trained; a larger --seq-length cuts less off"
            )
        return f"no sample has had {some}"

    def _watch(self, global_batch: GlobalBatch) -> None:
        reached, seen = self._look(global_batch)
        self.waiting = [name for name in self.waiting if name not in reached]
        if self.state.parts_reached is not None:
            parts = {*self.state.parts_reached, *map(_part, reached)}
            self.state.parts_reached = [part for part in self.parts if part in parts]
        self.iterations += 1
        for kind in seen:
            self.with_media[kind] += 1
        for module, prefix in MODULES.items():
            names = [name for name in self.regime.trained if name.startswith(prefix)]
            if names and set(names) <= set(self.waiting) and (prefix == LANGUAGE or _kind(prefix) in seen):
                raise ValueError(
                    f"iteration {self.iterations} of this start: --train-modules trains the {module}, but no "
                    "gradient has reached it, so it would never change; leave it out, or mend the model"
                )
        self._give_up_on([name for name in self.waiting if self._chances(name) >= _PATIENCE])
        if self.waiting and self.iterations == _LONGEST:
            kinds = {kind for kind in map(_kind, self.waiting) if kind is not None}
            had = " and ".join(
                f"no more than {count} with {_one(kind)}"
                for kind, count in self.with_media.items()
                if kind in kinds
            )
            self.say(
                f"note: the first {_LONGEST} iterations had {had}; whether gradients reach what works on "
                "such media is not checked any longer"
            )
            self.waiting = []

    def _look(self, global_batch: GlobalBatch) -> tuple[set[str], set[str]]:
        """Return the tensors that a gradient has reached on any rank, and the kinds of media that any
        learned from."""
        kinds, own = list(MODALITIES), len(self.waiting)
        size = own + 2 * len(kinds)
        found = torch.zeros(size, dtype=torch.int32, device=self.layout.device)
        places = {name: place for place, name in enumerate(self.waiting)}
        for name, parameter in self.regime.own:
            if name in places:
                found[places[name]] += parameter.main_grad.any()  # type: ignore[attr-defined]
        for batch in global_batch.microbatches:
            for kind, media in batch.media.items():  # the answer of their sample may have been cut off
                place = own + 2 * kinds.index(kind)
                found[place] += 1
                found[place + 1] += batch.loss_mask.any(dim=1)[media.positions[0]].any()
        # Over all ranks: another shard or data-parallel rank may have the part that isn't zero.
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        flags = [flag > 0 for flag in found.tolist()]
        self.came |= {kind for kind, flag in zip(kinds, flags[own::2], strict=True) if flag}
        seen = {kind for kind, flag in zip(kinds, flags[own + 1 :: 2], strict=True) if flag}
        return {name for name, flag in zip(self.waiting, flags[:own], strict=True) if flag}, seen

    def _chances(self, name: str) -> int:
        """Return the number of iterations in which a gradient could have reached a parameter."""
        kind = _kind(name)
        return self.iterations if kind is None else self.with_media[kind]

    def _give_up_on(self, names: list[str]) -> None:
        if not names:
            return
        self.waiting = [name for name in self.waiting if name not in names]
        for number, entry in enumerate(self.regime.entries):
            of_entry = {name for name, trained in self.regime.trained.items() if trained == number}
            if of_entry <= set(names):
                raise ValueError(
                    f"--train-modules: no gradient has reached {entry.name} in {_PATIENCE} iterations, so it "
                    f"would never change ({_first(names)}); leave it out, or name more"
                )
        self.say(
            f"warning: no gradient has reached these in {_PATIENCE} iterations, so they don't change: "
            f"{_first(names)}"
        )

    def _check_frozen(self, before: list[Tensor]) -> None:
        after = _bits(self.frozen)
        changed = [
            name
            for (name, parameter), old, new in zip(self.frozen, before, after, strict=True)
            if not torch.equal(old, new) or hasattr(parameter, "main_grad")
        ]
        everyones: list[list[str]] = [[] for _ in range(self.layout.world_size)]
        dist.all_gather_object(everyones, changed)
        names = sorted({name for part in everyones for name in part})
        if names:
            raise RuntimeError(f"the first step has changed frozen parameters: {_first(names)}")


class LastVerdict(Hook):
    """A hook that judges a run at its end, before its last checkpoint takes the place of another."""

    def __init__(self, check: GradientCheck, run: RunContext) -> None:
        self.check = check
        self.run = run

    def after_iteration(self) -> None:
        """Judge a run that has fewer updates than a verdict needs, once it is finished."""
        if self.run.finished:
            self.check.judge()


def _bits(parameters: list[tuple[str, torch.nn.Parameter]]) -> list[Tensor]:
    """Return the sum of each parameter's bits, which is exact and needs no copy."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return [parameter.detach().view(kinds[parameter.element_size()]).sum() for _, parameter in parameters]


def _kind(name: str) -> str | None:
    """Return the kind of media that a parameter or a prefix is for; None for the language model."""
    module = name.partition(".")[0]
    return next((kind for kind, modality in MODALITIES.items() if module in modality.modules), None)


def _one(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _part(name: str) -> str:
    """Return the part that a parameter is of, in the words of messages."""
    module = next((module for module, prefix in MODULES.items() if name.startswith(prefix)), name)
    return f"LoRA adapters of the {module}" if ".adapters." in name else module


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
