"""Towers, projectors, language models and how they are joined, on megatron-core."""

import megatron_vlm.parallel  # noqa: F401  (decides how megatron-core is imported)
