"""Write a checkpoint in another format, or cut for another layout, without Hugging Face in between.

    python scripts/convert/reshard.py --megatron-dir runs/demo --save-dir classic --format classic --tp 2
    python scripts/convert/reshard.py --megatron-dir classic --save-dir checkpoint

``--megatron-dir`` is of either format: a checkpoint, a checkpoint root or a run folder; of the last two, the
latest checkpoint is taken. With ``--sif-path`` the script runs itself inside that container image.
"""

from __future__ import annotations

import os
import sys
from typing import List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.artifacts.checkpoint import read_model
from megatron_vlm.hf import cli


def main(argv: List[str]) -> int:
    """Convert as ``argv`` says; returns the exit code."""
    parser = cli.Parser("Write a Megatron checkpoint in another format or for another layout.")
    parser.add_argument("--megatron-dir", required=True, help="checkpoint, checkpoint root or run folder")
    parser.add_argument("--save-dir", required=True, help="checkpoint root to make")
    parser.add_argument(
        "--base",
        help="checkpoint with all weights under one of trained weights only (default: where it was then)",
    )
    cli.add_layout_flags(parser)
    cli.add_dtype_flag(parser)
    cli.add_hf_config_flag(parser)
    parser.add_argument("--verify", action="store_true", help="read back what was written, and compare")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    cli.add_container_flags(parser)
    args = parser.parse_args(argv)
    if args.sif_path:
        from megatron_vlm.artifacts.checkpoint import checkpoint_layers
        from megatron_vlm.launch.container import reenter

        inputs = [] if args.hf_config else checkpoint_layers(args.megatron_dir, args.base)[:-1]
        paths = [args.megatron_dir, *map(str, inputs)]
        paths += [args.hf_config] if args.hf_config else []
        return reenter([__file__, *argv], args.sif_path, args.bind, paths, [args.save_dir])

    import torch

    from megatron_vlm.architecture.model import ModelConfig
    from megatron_vlm.hf.convert import reshard
    from megatron_vlm.hf.formats.classic import ClassicLayout

    if args.hf_config:
        model = ModelConfig.from_hf_dir(args.hf_config, "--hf-config")
    else:
        model = read_model(args.megatron_dir)
        cli.tell_of_best(args.megatron_dir)
    classic = ClassicLayout.from_flags(args, model.language.num_layers)
    dtype = getattr(torch, cli.DTYPES[args.dtype]) if args.dtype else None
    with cli.ProgressBar() as progress:
        checkpoint = reshard(
            args.megatron_dir,
            args.save_dir,
            args.tp,
            args.pp,
            args.force,
            progress,
            args.base,
            args.verify,
            classic,
            dtype=dtype,
            hf_config=args.hf_config,
        )
    print(f"{checkpoint}: {cli.loads_where(args)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
