"""The training loop, a step, checkpoints."""

import megatron_vlm.parallel  # noqa: F401  (decides how megatron-core is imported)
