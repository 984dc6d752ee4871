"""The sinks of metrics: ``metrics.jsonl`` always, TensorBoard and Weights & Biases where the flags ask for
them.

A metric's name is the same everywhere; the viewers show those of training, which have no ``/`` in their
name, as ``train/<name>``.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_vlm.config.sections import LoggingSection
from megatron_vlm.observe.metrics import METRICS, VALIDATION, MetricsLog

TENSORBOARD = "tensorboard"
WANDB = "wandb"
_HELD_OUT = "validation/"
_WANDB_ID = "id"
_WANDB_PROJECT = "megatron-vlm"
_WANDB_SECONDS = 60.0  # for its server to answer, at the start and at the end


class Sink(Protocol):
    """One place that metrics go to."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Take the metrics of an iteration; several calls for one iteration are fine."""

    def alert(self, iteration: int, title: str, text: str) -> None:
        """Draw a user's attention to something."""

    def close(self, failed: bool) -> None:
        """Write out the metrics that are left."""


class Sinks:
    """The sinks of a run, as one. Empty until :meth:`open`, which only rank 0 calls, so that the other
    ranks may log as well and nothing comes of it.

    A sink that fails once the run is under way is left out from then on, and says so once.
    ``metrics.jsonl`` is no such sink: where it can't be written no checkpoint can.
    """

    def __init__(self) -> None:
        self.files: dict[str, MetricsLog] = {}
        self.sinks: dict[str, Sink] = {}

    def open(
        self, run: Path, flags: LoggingSection, name: str, config: Mapping[str, Any], last_iteration: int
    ) -> None:
        """Open the sinks that the flags ask for.

        Args:
            run: the run folder.
            name: of the run.
            config: the resolved config, for the viewers to show.
            last_iteration: the run goes on after this one.

        Raises:
            ValueError: a package is missing, or Weights & Biases has no login or can't be reached.
        """
        if flags.tensorboard:
            self.sinks["TensorBoard"] = TensorBoard(run, config, last_iteration)
        if flags.wandb:
            self.sinks["Weights & Biases"] = WeightsAndBiases(run, flags, name, config)
        for name in (METRICS, VALIDATION):
            self.files[name] = MetricsLog(run, last_iteration, name)

    def log(self, iteration: int, values: Mapping[str, float | None]) -> None:
        """Hand metrics to every sink.

        Args:
            iteration: the one that they belong to.
            values: by name; ``<group>/<name>`` for what isn't a metric of training. None is what isn't
                known: ``null`` in the file, left out elsewhere. Those of the group ``validation`` come by
                themselves, and have a file of their own.
        """
        held_out = all(name.startswith(_HELD_OUT) for name in values)
        file = self.files.get(VALIDATION if held_out else METRICS)
        if file is not None:
            file.write(iteration, {name.removeprefix(_HELD_OUT): value for name, value in values.items()})
        known = {name: value for name, value in values.items() if value is not None}
        self._call("log", iteration, known)

    def alert(self, iteration: int, title: str, text: str) -> None:
        """Draw a user's attention to something; Weights & Biases sends mails and messages of it."""
        self._call("alert", iteration, title, text)

    def close(self, failed: bool = False) -> None:
        """Write out what is left.

        Args:
            failed: the run ends with an error.
        """
        self._call("close", failed)
        self.sinks.clear()
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _call(self, method: str, *args: Any) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                getattr(sink, method)(*args)
            except Exception as error:
                # Whatever it is, it is not worth hours of training.
                del self.sinks[name]
                print(f"warning: {name} failed and is left out from now on: {_one_line(error)}", flush=True)


class TensorBoard:
    """Event files in ``<run>/tensorboard``.

    What an earlier start logged beyond ``last_iteration`` is marked as superseded: TensorBoard drops it.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], last_iteration: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"--tensorboard: {error}; install tensorboard, or leave it out") from None
        self.writer = SummaryWriter(str(run / TENSORBOARD), purge_step=last_iteration + 1, flush_secs=30)
        text = "".join(f"    {line}\n" for line in json.dumps(config, indent=2).splitlines())
        self.writer.add_text("config", text, last_iteration)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in _in_groups(values).items():
            self.writer.add_scalar(name, value, iteration)

    def alert(self, iteration: int, title: str, text: str) -> None:
        self.writer.add_text("alerts", f"{title}: {text}", iteration)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One run on Weights & Biases, or offline under ``<run>/wandb``, however often it is resumed.

    Its own step only ever grows, and what is logged at an earlier one is dropped; a run that goes on
    from its last checkpoint repeats iterations. So metrics are shown over ``iteration`` instead.
    """

    def __init__(self, run: Path, flags: LoggingSection, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"--wandb: {error}; install wandb, or leave it out") from None
        id_file = run / WANDB / _WANDB_ID
        id_file.parent.mkdir(exist_ok=True)
        self.wandb: Any = wandb
        mode: Any = flags.wandb_mode
        try:
            self.run = wandb.init(
                dir=str(run),
                id=id_file.read_text().strip() if id_file.exists() else None,
                resume="allow",
                name=flags.wandb_name or name,
                project=flags.wandb_project or os.environ.get("WANDB_PROJECT", _WANDB_PROJECT),
                entity=flags.wandb_entity,
                mode=mode,
                config=dict(config),
                allow_val_change=True,
                settings=wandb.Settings(
                    quiet=True,
                    login_timeout=_WANDB_SECONDS,
                    init_timeout=_WANDB_SECONDS,
                    finish_timeout=_WANDB_SECONDS,
                ),
            )
        except Exception as error:
            raise ValueError(
                f"--wandb: {_one_line(error)}; log in with `wandb login` or WANDB_API_KEY and check the "
                "network, or give --wandb-mode offline and upload later with "
                f"`wandb sync {run / WANDB}/offline-run-*`"
            ) from None
        id_file.write_text(self.run.id + "\n")
        self.run.define_metric("iteration", hidden=True)
        self.run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        self.run.log({"iteration": iteration, **_in_groups(values)})

    def alert(self, iteration: int, title: str, text: str) -> None:
        self.run.alert(title=title, text=text, level="WARN")

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
        # Its background process writes on, until run.py ends whatever a run leaves behind: wait, not forever.
        writing = threading.Thread(target=self.wandb.teardown, daemon=True)
        writing.start()
        writing.join(_WANDB_SECONDS)


def _in_groups(values: Mapping[str, float]) -> dict[str, float]:
    return {name if "/" in name else f"train/{name}": value for name, value in values.items()}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
