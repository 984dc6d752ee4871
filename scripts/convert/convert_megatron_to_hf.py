"""Convert a megatron-core checkpoint of a LLaVA to a Hugging Face folder, tensor by tensor, without a GPU.

    python scripts/convert/convert_megatron_to_hf.py --megatron-dir runs/demo --hf-dir llava-trained

``--megatron-dir`` is a checkpoint folder, a checkpoint root or a run folder; of the last two, the
latest checkpoint is taken. With ``--sif-path`` the script runs itself inside that container image.
"""

from __future__ import annotations

import os
import sys
from typing import List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.hf import cli


def main(argv: List[str]) -> int:
    """Convert as ``argv`` says; returns the exit code."""
    parser = cli.Parser("Convert a Megatron checkpoint to a Hugging Face LLaVA.")
    parser.add_argument("--megatron-dir", required=True, help="checkpoint, checkpoint root or run folder")
    parser.add_argument("--hf-dir", required=True, help="folder to make")
    parser.add_argument(
        "--base",
        help="checkpoint with all weights under one of trained weights only (default: where it was then)",
    )
    parser.add_argument(
        "--tokenizer-dir", help="take tokenizer and chat template from here, not from the checkpoint"
    )
    parser.add_argument(
        "--max-shard-size", type=cli.size, metavar="SIZE", help="such as 5GB (default: files as imported)"
    )
    parser.add_argument(
        "--adapter-only",
        action="store_true",
        help="write a run's LoRA adapters and projector as a PEFT adapter, instead of merging them",
    )
    cli.add_dtype_flag(parser)
    cli.add_hf_config_flag(parser)
    parser.add_argument("--verify", action="store_true", help="read back what was written, and compare")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    # The format doesn't depend on the layout, so the two change nothing; the checkpoint knows its own.
    parser.add_argument("--tp", type=cli.positive, help="not needed; checked against the model")
    parser.add_argument("--pp", type=cli.positive, help="not needed; checked against the model")
    cli.add_container_flags(parser)
    args = parser.parse_args(argv)
    if args.sif_path:
        from megatron_vlm.artifacts.checkpoint import checkpoint_layers
        from megatron_vlm.launch.container import reenter

        bases = [] if args.hf_config else checkpoint_layers(args.megatron_dir, args.base)[:-1]
        paths = [args.megatron_dir, *map(str, bases)]
        paths += [path for path in (args.tokenizer_dir, args.hf_config) if path]
        return reenter([__file__, *argv], args.sif_path, args.bind, paths, [args.hf_dir])

    import torch

    from megatron_vlm.architecture.model import ModelConfig
    from megatron_vlm.artifacts.checkpoint import HF_FOLDER
    from megatron_vlm.hf.adapters import export_adapter
    from megatron_vlm.hf.convert import export_hf
    from megatron_vlm.hf.megatron import find_checkpoint

    checkpoint = find_checkpoint(args.megatron_dir, args.hf_config)
    hf_folder = args.hf_config or str(checkpoint / HF_FOLDER)
    ModelConfig.from_hf_dir(hf_folder, "--hf-config" if args.hf_config else "").check_layout(
        args.tp or 1, args.pp or 1
    )
    if not args.hf_config:
        cli.tell_of_best(args.megatron_dir)
    print(f"converting {checkpoint}", flush=True)
    if args.adapter_only:
        if args.tokenizer_dir or args.max_shard_size or args.dtype or args.verify:
            raise ValueError("--adapter-only takes no --tokenizer-dir, --max-shard-size, --dtype or --verify")
        export_adapter(checkpoint, args.hf_dir, args.force, args.base)
        print(f"{args.hf_dir}: loads with peft's PeftModel, beside the model that the run began with")
        return 0
    dtype = getattr(torch, cli.DTYPES[args.dtype]) if args.dtype else None
    with cli.ProgressBar() as progress:
        export_hf(
            checkpoint,
            args.hf_dir,
            args.tokenizer_dir,
            args.max_shard_size,
            args.force,
            progress,
            args.base,
            args.verify,
            dtype,
            args.hf_config,
        )
    print(f"{args.hf_dir}: loads with transformers' AutoModelForImageTextToText")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
