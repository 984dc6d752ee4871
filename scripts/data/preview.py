"""Show exactly what the model will see of a dataset: text, trained tokens, image placeholders, pictures.

    python scripts/data/preview.py --data-path data --tokenizer-load-dir hf --template v1 --html preview.html

Takes the flags of run.py, so that a run's own command line can be given, and encodes as training does. With
``--sif-path`` the script runs itself inside that container image.
"""

from __future__ import annotations

import io
import os
import sys
from typing import List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.config.preview import PreviewConfig
from megatron_vlm.hf import cli
from megatron_vlm.launch.container import reenter


def main(argv: List[str]) -> int:
    """Show what ``argv`` asks for; returns the exit code."""
    config = PreviewConfig.from_flags(argv, prog="preview.py")
    launch = config.run.launch
    if launch.sif_path:
        return reenter([__file__, *argv], launch.sif_path, launch.bind, config.paths)

    from megatron_vlm.data.preview.show import show

    return show(config)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a locale can't write is no reason to stop
    sys.exit(cli.run(main))
