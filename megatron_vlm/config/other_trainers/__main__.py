"""Print docs/from-other-trainers.md."""

from megatron_vlm.config.other_trainers import markdown

print(markdown(), end="")
