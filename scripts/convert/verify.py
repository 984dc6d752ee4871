"""Compare two checkpoints by content, whatever their formats; or one with the manifest of its conversion.

    python scripts/convert/verify.py llava checkpoint
    python scripts/convert/verify.py checkpoint

A checkpoint is a Hugging Face folder, a Megatron checkpoint, a checkpoint root or a run folder. The exit
code is 0 if they hold the same, 1 if they don't, 2 if that can't be said. With ``--sif-path`` the
script runs itself inside that container image.
"""

from __future__ import annotations

import os
import sys
from typing import List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.hf import cli


def main(argv: List[str]) -> int:
    """Compare as ``argv`` says; returns the exit code."""
    parser = cli.Parser("Compare two checkpoints by content, or one with its own manifest.")
    parser.add_argument("checkpoint", help="Hugging Face folder, checkpoint, checkpoint root or run folder")
    parser.add_argument("other", nargs="?", help="the same; left out: what the manifest says")
    parser.add_argument(
        "--weights-only", action="store_true", help="leave out the small files: config, tokenizer, processor"
    )
    cli.add_hf_config_flag(parser)
    cli.add_container_flags(parser)
    args = parser.parse_args(argv)
    if args.sif_path:
        from megatron_vlm.launch.container import reenter

        paths = [path for path in (args.checkpoint, args.other, args.hf_config) if path]
        return reenter([__file__, *argv], args.sif_path, args.bind, paths)

    from megatron_vlm.hf.verify import check_manifest, verify

    for path in filter(None, (args.checkpoint, args.other)):
        cli.tell_of_best(path)
    if args.other is None:
        print(f"{args.checkpoint}: {check_manifest(args.checkpoint)} tensors are what was written")
        return 0
    with cli.ProgressBar() as progress:
        count = verify(args.checkpoint, args.other, args.weights_only, progress, args.hf_config)
    print(f"equal: {count} tensors" + ("" if args.weights_only else " and all small files"))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
