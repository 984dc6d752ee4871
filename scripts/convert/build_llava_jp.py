"""Join a text model and a vision tower into a Hugging Face LLaVA, its projector new or from a file.

    python scripts/convert/build_llava_jp.py --save-dir llava --text-model text --vision-model tower --lang en

The models are folders, or tags that the Hugging Face cache or hub knows. With ``--sif-path`` the
script runs itself inside that container image.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import List, Tuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.architecture.connectors import CONNECTORS
from megatron_vlm.architecture.families.known import BUILT, FAMILIES, PLAIN
from megatron_vlm.hf import cli


def pinpoints(text: str) -> List[Tuple[int, int]]:
    """Argument type: heights and widths, as ``336x672,672x336``."""
    sizes = []
    for item in text.split(","):
        height, by, width = item.partition("x")
        if not by:
            raise argparse.ArgumentTypeError(f"{item!r} is not HxW; give pixels such as 336x672")
        sizes.append((cli.positive(height), cli.positive(width)))
    return sizes


def model_type(text: str) -> str:
    """Argument type: a kind of LLaVA that is built."""
    if text in FAMILIES and text not in BUILT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is converted and trained, but not built; give {' or '.join(BUILT)}, or begin "
            f"with a {text} of the hub"
        )
    return text


def projector_type(text: str) -> str:
    """Check a kind of projector."""
    if not CONNECTORS.knows(text):
        kinds = ", ".join(CONNECTORS)
        raise argparse.ArgumentTypeError(f"{text!r} is no kind of projector; supported: {kinds}")
    return text


def main(argv: List[str]) -> int:
    """Build as ``argv`` says; returns the exit code."""
    parser = cli.Parser("Join a text model and a vision tower into a LLaVA.")
    parser.add_argument("--save-dir", required=True, help="folder to make")
    parser.add_argument("--text-model", required=True, help="language model, or a LLaVA's")
    parser.add_argument(
        "--vision-model",
        default="openai/clip-vit-large-patch14-336",
        help="CLIP or SigLIP model or tower, or a LLaVA's (default: %(default)s)",
    )
    parser.add_argument(
        "--model-type",
        type=model_type,
        choices=BUILT,
        default=PLAIN,
        help="llava_next cuts images into tiles, as LLaVA-1.6 does (default: %(default)s)",
    )
    parser.add_argument(
        "--image-grid-pinpoints",
        type=pinpoints,
        metavar="HxW,...",
        help="llava_next: sizes in pixels that images are padded to, multiples of the tower's image size "
        "(default: LLaVA-1.6's 1x2, 2x1, 2x2, 3x1 and 1x3 tiles)",
    )
    parser.add_argument(
        "--projector-type",
        type=projector_type,
        help=f"{', '.join(CONNECTORS)} (default: as --projector, or mlp2x_gelu)",
    )
    parser.add_argument("--projector", help="LLaVA's mm_projector.bin, or its folder (default: a new one)")
    parser.add_argument(
        "--vocab-size-padding",
        action="store_true",
        help="round the vocabulary up to a multiple of 128",
    )
    parser.add_argument(
        "--lang", choices=("jp", "en"), default="jp", help="of the chat template (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=(*cli.DTYPES, *cli.DTYPES.values()),
        metavar="{fp32,bf16,fp16}",
        help="of all weights (default: as the text model is stored)",
    )
    parser.add_argument("--verify", action="store_true", help="read back what was written, and compare")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    cli.add_container_flags(parser)
    args = parser.parse_args(argv)
    if abs(args.seed) >= 2**63:
        raise ValueError(f"--seed {args.seed}: has more than 63 bits")
    if args.image_grid_pinpoints and not FAMILIES[args.model_type].built_grids:
        cut = " or ".join(kind for kind in BUILT if FAMILIES[kind].built_grids)
        raise ValueError(f"--image-grid-pinpoints needs --model-type {cut}")
    if args.sif_path:
        from megatron_vlm.launch.container import reenter

        given = (args.text_model, args.vision_model, args.projector)
        models = [path for path in given if path and os.path.exists(path)]
        return reenter([__file__, *argv], args.sif_path, args.bind, models, [args.save_dir])

    from transformers.utils import logging

    from megatron_vlm.architecture.model import ModelConfig
    from megatron_vlm.hf.build.join import build_llava
    from megatron_vlm.hf.tables.model import why_not_exported

    # What matters of its warnings is an error here.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with cli.ProgressBar() as progress:
        build_llava(
            args.save_dir,
            args.text_model,
            args.vision_model,
            projector_type=args.projector_type,
            vocab_size_padding=args.vocab_size_padding,
            lang=args.lang,
            seed=args.seed,
            dtype=cli.DTYPES.get(args.dtype, args.dtype),
            force=args.force,
            progress=progress,
            projector=args.projector,
            verify=args.verify,
            model_type=args.model_type,
            grid_pinpoints=args.image_grid_pinpoints,
        )
    why = why_not_exported(ModelConfig.from_hf_dir(args.save_dir))
    if why:
        print(f"{args.save_dir}: for training only; transformers can't load it: {why}")
    print(f"{args.save_dir}: next, scripts/convert/convert_hf_to_megatron.py --hf-dir {args.save_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
