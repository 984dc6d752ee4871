"""Convert a Hugging Face LLaVA folder to a megatron-core checkpoint, tensor by tensor, without a GPU.

    python scripts/convert/convert_hf_to_megatron.py --hf-dir llava --megatron-dir checkpoint --tp 2 --pp 1

With ``--sif-path`` the script runs itself inside that container image; then Python 3.9 without any
package is enough outside.
"""

from __future__ import annotations

import os
import sys
from typing import List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.hf import cli


def main(argv: List[str]) -> int:
    """Convert as ``argv`` says; returns the exit code."""
    parser = cli.Parser("Convert a Hugging Face LLaVA to a Megatron checkpoint.")
    parser.add_argument("--hf-dir", required=True, help="folder with config.json and weights")
    parser.add_argument("--megatron-dir", required=True, help="checkpoint root to make")
    cli.add_layout_flags(parser)
    cli.add_dtype_flag(parser)
    parser.add_argument("--verify", action="store_true", help="read back what was written, and compare")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    cli.add_container_flags(parser)
    args = parser.parse_args(argv)
    if args.sif_path:
        from megatron_vlm.launch.container import reenter

        return reenter([__file__, *argv], args.sif_path, args.bind, [args.hf_dir], [args.megatron_dir])

    import torch

    from megatron_vlm.architecture.model import ModelConfig
    from megatron_vlm.hf.convert import import_hf
    from megatron_vlm.hf.formats.classic import ClassicLayout

    layers = ModelConfig.from_hf_dir(args.hf_dir, "--hf-dir").language.num_layers
    classic = ClassicLayout.from_flags(args, layers)
    dtype = getattr(torch, cli.DTYPES[args.dtype]) if args.dtype else None
    with cli.ProgressBar() as progress:
        checkpoint = import_hf(
            args.hf_dir,
            args.megatron_dir,
            args.tp,
            args.pp,
            args.force,
            progress,
            verify=args.verify,
            classic=classic,
            dtype=dtype,
        )
    print(f"{checkpoint}: {cli.loads_where(args)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
