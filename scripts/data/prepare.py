"""Make a dataset that training reads, from the files that people have; or check one that is there.

    python scripts/data/prepare.py --input llava.json --image-root images --save-dir data --workers 8
    python scripts/data/prepare.py --check data

Reads LLaVA's and ShareGPT's conversations, OpenAI's messages, Alpaca and question-answer records from JSON,
JSON lines, Parquet, Arrow, Hugging Face datasets on disk and tars of jpg, txt and json. The same command goes
on where it was killed. The exit code is 0, or 2 if something is wrong. With ``--sif-path`` the script runs
itself inside that container image.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import ClassVar, Dict, List, Tuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.config.templates import TEMPLATES
from megatron_vlm.hf import cli


def main(argv: List[str]) -> int:
    """Prepare or check as ``argv`` says; returns the exit code."""
    parser = cli.Parser("Make a dataset that training reads, from the files that people have.")
    parser.add_argument("--input", nargs="+", help="files and folders")
    parser.add_argument("--save-dir", help="folder to make")
    parser.add_argument(
        "--check", metavar="DIR", help="look through a prepared folder and name all that is wrong"
    )
    parser.add_argument(
        "--image-root", help="where relative paths of images begin (default: beside the file)"
    )
    parser.add_argument(
        "--format",
        choices=("llava", "sharegpt", "openai", "alpaca", "query", "caption"),
        help="the records' shape (default: told from each record's fields)",
    )
    parser.add_argument(
        "--split",
        type=_shares,
        default=(0.98, 0.01, 0.01),
        metavar="TRAIN[,VAL[,TEST]]",
        help="shares of the samples (default: 0.98,0.01,0.01)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order and the split (default: 0)")
    parser.add_argument(
        "--workers", type=cli.positive, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    parser.add_argument(
        "--duplicates",
        choices=("content", "id", "keep"),
        default="content",
        help="drop what repeats an id and its content, what repeats an id, or nothing (default: content)",
    )
    parser.add_argument(
        "--shard-samples", type=cli.positive, default=5000, help="most samples of a shard (default: 5000)"
    )
    parser.add_argument(
        "--shard-size", type=cli.size, default="1GB", help="most bytes of a shard (default: 1GB)"
    )
    parser.add_argument(
        "--max-side", type=cli.positive, help="make longer sides of images that long, in pixels"
    )
    parser.add_argument(
        "--encode", choices=("jpg", "png", "webp"), help="encode all images so (default: as they are)"
    )
    parser.add_argument(
        "--quality", type=cli.positive, default=92, help="of images encoded anew (default: 92)"
    )
    parser.add_argument(
        "--tokenizer-load-dir", help="the model's Hugging Face folder, for lengths in tokens in the report"
    )
    parser.add_argument("--template", choices=TEMPLATES, help="as training will be told (default: as there)")
    parser.add_argument("--lang", choices=("jp", "en"), default="jp", help="the same (default: jp)")
    parser.add_argument("--force", action="store_true", help="replace a dataset that is there")
    cli.add_container_flags(parser)
    args = parser.parse_args(argv)
    if bool(args.check) == bool(args.input and args.save_dir):
        parser.error("give --input and --save-dir to prepare, or --check and a prepared folder")
    if args.sif_path:
        from megatron_vlm.launch.container import reenter

        # Its folder: what is unfinished lies beside it.
        paths = [args.check] if args.check else [*args.input, os.path.dirname(os.path.abspath(args.save_dir))]
        paths += [path for path in (args.image_root, args.tokenizer_load_dir) if path]
        return reenter([__file__, *argv], args.sif_path, args.bind, paths)
    if args.check:
        return _check(args.check, args.workers)

    from megatron_vlm.data.prepare.build import Options, prepare
    from megatron_vlm.data.prepare.report import to_markdown

    options = Options(
        input=tuple(args.input),
        save_dir=args.save_dir,
        image_root=args.image_root,
        format=args.format,
        split=args.split,
        seed=args.seed,
        workers=args.workers,
        duplicates=args.duplicates,
        shard_samples=args.shard_samples,
        shard_bytes=args.shard_size,
        max_side=args.max_side,
        encode=args.encode,
        quality=args.quality,
        tokenizer_load_dir=args.tokenizer_load_dir,
        template=args.template,
        lang=args.lang,
        force=args.force,
    )
    with _Bars() as bars:
        try:
            report = prepare(options, bars)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130
    print(to_markdown(report), end="")
    return 0


def _check(path: str, workers: int) -> int:
    from megatron_vlm.data.prepare.check import check

    count = 0
    with _Bars() as bars:
        for problem in check(path, workers, bars):
            print(problem, flush=True)
            count += 1
    print(f"{path}: {count} problem{'s' * (count > 1)}" if count else f"{path}: nothing is wrong")
    return 2 if count else 0


class _Bars:
    """A progress bar for each pass."""

    _UNITS: ClassVar = {"reading": "B", "writing": " samples", "checking": " shards"}

    def __init__(self) -> None:
        self._bars: Dict[str, cli.ProgressBar] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._bars:
            self.__exit__()
            self._bars[what] = cli.ProgressBar(what, self._UNITS[what])
        self._bars[what](done, total)

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: object) -> None:
        for bar in self._bars.values():
            bar.__exit__()


def _shares(text: str) -> Tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give the shares of train, val and test, such as 0.98,0.01,0.01"
        ) from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
