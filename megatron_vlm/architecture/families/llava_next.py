"""LLaVA-NeXT, or LLaVA 1.6: images are cut into tiles, and all features of the tiles are kept.

Source: transformers ``LlavaNextConfig``.
"""

from megatron_vlm.architecture.connectors.anyres import read_tiles
from megatron_vlm.architecture.families.family import LLAVA_DEFAULTS, Family

KIND = "llava_next"
FAMILY = Family(
    "LlavaNext",
    {
        **LLAVA_DEFAULTS,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    read_tiles=read_tiles,
    built=True,
    built_grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
)
