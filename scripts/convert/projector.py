"""Put LLaVA's mm_projector.bin into a checkpoint, or write one from a checkpoint.

    python scripts/convert/projector.py import --projector mm_projector.bin --checkpoint llava --save-dir new
    python scripts/convert/projector.py export --checkpoint runs/demo --save-dir projector

``--checkpoint`` is a Hugging Face folder, a Megatron checkpoint, a checkpoint root or a run folder; what
import writes is of the same kind. With ``--sif-path`` the script runs itself inside that container image.
"""

from __future__ import annotations

import os
import sys
from typing import List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.hf import cli


def main(argv: List[str]) -> int:
    """Import or export as ``argv`` says; returns the exit code."""
    parser = cli.Parser("Put LLaVA's mm_projector.bin into a checkpoint, or write one from a checkpoint.")
    parser.add_argument("action", choices=("import", "export"))
    parser.add_argument(
        "--checkpoint", required=True, help="Hugging Face folder, checkpoint, checkpoint root or run folder"
    )
    parser.add_argument(
        "--save-dir",
        required=True,
        help="folder to make: the checkpoint with its new projector, or the export",
    )
    parser.add_argument(
        "--projector", help="import: mm_projector.bin or .safetensors, non_lora_trainables.bin, or a folder"
    )
    parser.add_argument(
        "--bin", action="store_true", help="export: mm_projector.bin (default: mm_projector.safetensors)"
    )
    parser.add_argument(
        "--base",
        help="checkpoint with all weights under one of trained weights only (default: where it was then)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="import: read back what was written, and compare"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    cli.add_container_flags(parser)
    args = parser.parse_args(argv)
    importing = args.action == "import"
    if importing and not args.projector:
        raise ValueError("import needs --projector")
    if importing and args.bin:
        raise ValueError("--bin is for export; import knows a file's kind from its name")
    if not importing and (args.projector or args.verify):
        raise ValueError("--projector and --verify are for import")
    if args.sif_path:
        from megatron_vlm.artifacts.checkpoint import checkpoint_layers, is_checkpoint
        from megatron_vlm.launch.container import reenter

        paths = [args.checkpoint] + ([args.projector] if importing else [])
        if is_checkpoint(args.checkpoint):
            paths += map(str, checkpoint_layers(args.checkpoint, args.base)[:-1])
        return reenter([__file__, *argv], args.sif_path, args.bind, paths, [args.save_dir])

    from megatron_vlm.hf.mm_projector import export_projector, import_projector

    if importing:
        with cli.ProgressBar() as progress:
            done = import_projector(
                args.projector,
                args.checkpoint,
                args.save_dir,
                args.force,
                progress,
                args.base,
                args.verify,
            )
        if done.others:
            print(f"{done.path}: {len(done.others)} other tensors are left out, such as {done.others[0]}")
        print(f"{args.save_dir}: has the {done.kind} projector of {done.path}")
    else:
        print(export_projector(args.checkpoint, args.save_dir, args.bin, args.force, args.base))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
