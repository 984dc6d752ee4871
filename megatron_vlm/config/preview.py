"""The flags of ``scripts/data/preview.py``: its own, and any of run.py's.

config = PreviewConfig.from_flags(sys.argv[1:])
"""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple

from megatron_vlm.artifacts.mixture import data_folders, is_mixture
from megatron_vlm.config.checks import not_negative, positive
from megatron_vlm.config.flags import FlagParser, flag
from megatron_vlm.config.headings import GROUPS
from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections import SECTIONS

PREVIEW = "What is shown"
_OF_RUN = (  # those that say how a sample is read; shown in --help with run.py's own words
    *("data_path", "tokenizer_load_dir", "megatron_load_dir", "base", "template", "lang", "stage"),
    *(
        "seq_length",
        "overlong",
        "mask_thinking",
        "image_orientation",
        "image_alpha",
        "image_token_id",
        "pad_token_id",
        "sif_path",
        "bind",
    ),
)


@dataclass(frozen=True)
class PreviewSection:
    """The flags that say which samples are shown, and how."""

    samples: int = flag(PREVIEW, 8, "how many samples")
    skip: int = flag(PREVIEW, 0, "samples to pass over first")
    shuffle: bool = flag(PREVIEW, False, "draw samples from all over the split, by --seed")
    keys: Tuple[str, ...] = flag(
        PREVIEW, (), "the samples of these names, in place of --samples; a log names those that are skipped"
    )
    split: str = flag(PREVIEW, "train", "part of the dataset", choices=("train", "val", "test"))
    ids: bool = flag(PREVIEW, False, "list every token with its id too")
    json: bool = flag(PREVIEW, False, "print one JSON object with texts, ids, labels and image sizes instead")
    html: Optional[str] = flag(PREVIEW, None, "write a page here, with the pictures as the tower gets them")

    def __post_init__(self) -> None:
        positive(self, "samples")
        not_negative(self, "skip")
        if self.keys and (self.skip or self.shuffle):
            raise ValueError(
                f"--{'skip' if self.skip else 'shuffle'} does nothing with --keys; leave one out"
            )
        if self.html is not None and not os.path.isdir(os.path.dirname(self.html) or "."):
            raise ValueError(f"--html {self.html}: no such folder")
        if self.html is not None and os.path.isdir(self.html):
            raise ValueError(f"--html {self.html}: a folder; name the page, such as preview.html")


@dataclass(frozen=True)
class PreviewConfig:
    """The flags of a preview, and the run whose eyes it looks through."""

    preview: PreviewSection
    run: RunConfig

    @classmethod
    def from_flags(cls, argv: Sequence[str], prog: Optional[str] = None) -> PreviewConfig:
        """Read command-line flags. ``--help`` prints the help and raises ``SystemExit(0)``.

        Args:
            argv: the preview's flags and any of run.py's; a run's whole command line will do.

        Raises:
            ValueError: a flag is unknown or malformed, or a rule inside a section is broken.
        """
        if {"-h", "--help"} & set(argv):
            _help(prog).parse_args(["--help"])
        own, rest = FlagParser({"preview": PreviewSection}, (PREVIEW,)).parse_known_args(list(argv))
        return cls(PreviewSection(**vars(own)), RunConfig.from_flags(rest, prog=prog))

    @property
    def paths(self) -> List[str]:
        """Files and folders that are read or written."""
        run = self.run
        data = run.data.data_path
        named = (
            data,
            *(data_folders(data) if data is not None and is_mixture(data) else ()),
            run.model.tokenizer_load_dir,
            run.model.megatron_load_dir,
            run.model.base,
        )
        page = [os.path.dirname(self.preview.html) or "."] if self.preview.html else []
        return [path for path in named if path is not None] + page


def _help(prog: Optional[str]) -> FlagParser:
    fields: List[Any] = []
    for section in SECTIONS.values():
        types = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if field.name in _OF_RUN:
                shared = dataclasses.field(default=field.default, metadata=field.metadata)
                fields.append((field.name, types[field.name], shared))
    return FlagParser(
        {"preview": PreviewSection, "run": dataclasses.make_dataclass("Run", fields)},
        (PREVIEW, *GROUPS),
        prog=prog,
        usage="%(prog)s --data-path PATH --tokenizer-load-dir PATH [flags of this script and of run.py]",
        description="Show exactly what the model will see of a dataset's samples.",
        epilog="All other flags of run.py, --config too, are taken: a run's own command line will do.",
    )
