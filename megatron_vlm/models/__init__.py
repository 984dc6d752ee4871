"""Towers, projectors, language models and how they are joined, on megatron-core."""
