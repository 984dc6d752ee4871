"""Make a dataset that training reads, from the files that people have; or check one that is there.

    python scripts/data/prepare.py --input llava.json --image-root images --save-dir data --workers 8
    python scripts/data/prepare.py --check data

Reads LLaVA's and ShareGPT's conversations, OpenAI's messages, Alpaca and question-answer records from JSON,
JSON lines, Parquet, Arrow, Hugging Face datasets on disk and tars of jpg, txt and json. The same command goes
on where it was killed. The exit code is 0; 1 where the dataset is there but more records than --max-dropped
allows were lost; 2 where something is wrong and it isn't; 130 after Ctrl-C. With ``--sif-path`` the script
runs itself inside that container image.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import ClassVar, Dict, List, Tuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.artifacts.templates import TEMPLATES
from megatron_vlm.hf import cli
from megatron_vlm.system.units import count_text


def main(argv: List[str]) -> int:
    """Prepare or check as ``argv`` says; returns the exit code."""
    parser = cli.Parser("Make a dataset that training reads, from the files that people have.")
    parser.add_argument("--input", nargs="+", help="files and folders")
    parser.add_argument("--save-dir", help="folder to make")
    parser.add_argument(
        "--check", metavar="DIR", help="look through a prepared folder and name all that is wrong"
    )
    parser.add_argument(
        "--image-root",
        help="folder that holds the images: relative paths begin there, and none may lead out "
        "(default: relative paths begin at the folder of the file that names them)",
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
        "--quality", type=cli.positive, help="of images that --max-side or --encode encodes (default: 92)"
    )
    parser.add_argument(
        "--tokenizer-load-dir", help="the model's Hugging Face folder, for lengths in tokens in the report"
    )
    parser.add_argument("--template", choices=TEMPLATES, help="as training will be told (default: as there)")
    parser.add_argument("--lang", choices=("jp", "en"), help="the same (default: jp)")
    parser.add_argument(
        "--max-dropped",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="exit code 1 if more than this part of the records, repeated ones aside, is lost (default: 0.1)",
    )
    parser.add_argument("--force", action="store_true", help="replace a dataset that is there")
    cli.add_container_flags(parser)
    args = parser.parse_args(argv)
    if bool(args.check) == bool(args.input and args.save_dir):
        parser.error("give --input and --save-dir to prepare, or --check and a prepared folder")
    _check_idle(parser, args)
    if args.sif_path:
        from megatron_vlm.launch.container import reenter

        # Its folder: what is unfinished lies beside it.
        paths = [args.check] if args.check else [*args.input, os.path.dirname(os.path.abspath(args.save_dir))]
        paths += [path for path in (args.image_root, args.tokenizer_load_dir) if path]
        return reenter([__file__, *argv], args.sif_path, args.bind, paths)
    if args.check:
        return _check(args.check, args.workers)

    from megatron_vlm.data.prepare.build import Options, prepare
    from megatron_vlm.data.prepare.report import share_lost, summary, to_markdown

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
        quality=args.quality or 92,
        tokenizer_load_dir=args.tokenizer_load_dir,
        template=args.template,
        lang=args.lang or "jp",
        force=args.force,
    )
    try:
        with _Bars() as bars:
            report = prepare(options, bars)
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 128 + number
    print(to_markdown(report))
    print(f"{args.save_dir}: {summary(report)}; report.md says more", flush=True)
    if share_lost(report) <= args.max_dropped:
        return 0
    print(
        f"error: more than --max-dropped {args.max_dropped:g} of the records are lost; the dataset is there "
        "all the same, and --force makes it anew",
        file=sys.stderr,
    )
    return 1


def _check_idle(parser: cli.Parser, args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing."""
    if args.check:
        others = parser.parse_args(["--check", args.check])
        kept = ("workers", "sif_path", "bind")
        idle = [
            name for name, value in vars(args).items() if value != getattr(others, name) and name not in kept
        ]
        if idle:
            parser.error(f"--{idle[0].replace('_', '-')} does nothing with --check; leave it out")
    if args.tokenizer_load_dir is None and (args.template or args.lang):
        flag = "--template" if args.template else "--lang"
        parser.error(f"{flag} does nothing without --tokenizer-load-dir, by which the report counts tokens")
    if args.quality and not args.encode and not args.max_side:
        parser.error("--quality does nothing without --encode or --max-side; images stay as they are")


def _check(path: str, workers: int) -> int:
    from megatron_vlm.data.prepare.check import check

    count = 0
    with _Bars() as bars:
        for problem in check(path, workers, bars):
            print(problem, flush=True)
            count += 1
    print(f"{path}: {count_text(count, 'problem')}" if count else f"{path}: nothing is wrong")
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


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a part of the records, 0 to 1")
    return share


def _shares(text: str) -> Tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give the shares of train, val and test, such as 0.98,0.01,0.01"
        ) from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
