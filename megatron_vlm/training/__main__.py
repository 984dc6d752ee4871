"""One rank of a training run: ``torchrun ... -m megatron_vlm.training <flags>``.

Reads the same flags as ``scripts/train/run.py``, which starts it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
import warnings

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


def main(argv: list[str]) -> int:
    """Run this rank; returns the exit code, 2 for a user error."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, without a traceback from every rank
    _leave_nothing_behind()
    _quiet_megatron_core()
    from megatron_vlm.config.run import RunConfig

    first = os.environ.get("RANK", "0") == "0"
    try:
        config = RunConfig.from_flags(argv, prog="python -m megatron_vlm.training")
        config.validate(int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        return _user_error(error, first)

    from megatron_vlm import parallel
    from megatron_vlm.parallel.deterministic import use_deterministic_algorithms
    from megatron_vlm.training import trainer
    from megatron_vlm.training.debugging import post_mortem

    code = 1
    try:
        if config.training.deterministic:
            use_deterministic_algorithms(parallel.choose_device(config.parallel.device)[0])
        layout = parallel.initialize(
            config.parallel.tp,
            config.parallel.pp,
            config.training.seed,
            config.parallel.device,
            config.parallel.backend,
            # With --init the first rank makes a whole model while the others wait. Longer than the watchdog
            # waits, too: a rank that hangs has to tell where, before one that waits for it gives up.
            max(
                config.parallel.distributed_timeout_minutes,
                120.0 if config.model.init else 0.0,
                config.logging.watchdog_minutes + 5.0,
            ),
            config.parallel.vpp,
        )
        with post_mortem(config.training.debug):
            trainer.run(config, layout)
        code = 0
    except ValueError as error:
        code = _user_error(error, parallel.first_to_arrive("error"))
    except OSError as error:  # no space left, read-only, no permission
        where = f"{error.filename}: " if error.filename else ""
        reason = ValueError(f"{where}{error.strerror or error}")
        code = _user_error(reason, parallel.first_to_arrive("error"))
    except Exception as error:  # told in full here, since what follows may end the process at once
        if isinstance(error, RuntimeError) and "Connection closed by peer" in str(error):
            # Another rank failed and has said why; a traceback of this one would bury that.
            print(f"rank {os.environ.get('RANK', '0')}: another rank is gone", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
    if code and parallel.choose_device(config.parallel.device)[0] == "cuda":
        # Leaving NCCL's groups waits for the other ranks, which may be waiting for this one.
        sys.stderr.flush()
        os._exit(code)
    parallel.finalize()
    return code


def _user_error(error: ValueError, speaks: bool) -> int:
    if speaks:  # an error that all ranks meet is told once
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def _quiet_megatron_core() -> None:
    """Its warnings are about optional packages and its own deprecated calls: nothing a user can mend."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.core|torch\.jit")


def _leave_nothing_behind() -> None:
    """A rank whose torchrun is killed, and what a killed rank has forked (loader workers, writers of a
    checkpoint), must not go on beside the run that takes its place."""
    if sys.platform != "linux":
        return
    os.register_at_fork(after_in_child=_die_with_parent)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()
        if os.environ.get("MEGATRON_VLM_TORCHRUN_PID", str(os.getppid())) != str(os.getppid()):
            sys.exit(1)  # it died before this could be asked for


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
