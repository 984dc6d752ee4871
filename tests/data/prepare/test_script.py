"""scripts/data/prepare.py: its flags, its last line, its exit code, and what it says of mistakes."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.prepare import build
from megatron_vlm.data.prepare.build import Options, prepare
from megatron_vlm.data.prepare.pictures import ENCODINGS
from megatron_vlm.data.prepare.plan import DUPLICATES
from megatron_vlm.data.prepare.records.shapes import SHAPES
from tests.data.tiny_data import SCRIPT, llava


def test_the_script_offers_what_the_package_knows() -> None:
    """The script repeats the names, for it hands itself to a container where nothing is installed."""
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True).stdout
    for flag, names in (("--format", SHAPES), ("--duplicates", DUPLICATES), ("--encode", ENCODINGS)):
        assert f"{flag} {{{','.join(names)}}}" in shown
    defaults = Options(input=(), save_dir="")
    assert f"(default: {','.join(map(str, defaults.split))})" in " ".join(shown.split())
    assert f"(default: {defaults.shard_samples})" in shown and f"(default: {defaults.quality})" in shown
    assert subprocess.run([sys.executable, "-S", SCRIPT, "--help"], capture_output=True).returncode == 0


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    (tmp_path / "many.json").write_text(json.dumps([llava(i, None) for i in range(99)]))

    def options(out: Path, **more: Any) -> Options:
        return Options(input=(str(tmp_path / "many.json"),), save_dir=str(out), **more)

    for more, message in (
        ({"split": (0.0, 1.0)}, "--split: give the shares"),
        ({"split": (1.1, -0.1)}, "--split: give the shares"),
        ({"split": (float("nan"),)}, "--split: give the shares"),
        ({"split": (0.7, 0.1, 0.1, 0.1)}, "--split: give the shares"),
        ({"split": (0.9, 0.2)}, r"--split 0\.9,0\.2: .* add up to 1\.1; give some that add up to 1"),
        ({"split": (0.9,)}, r"--split 0\.9: .* add up to 0\.9"),
        ({"shard_samples": 10_000}, "--shard-samples 10000: give 1 to 9999"),
        ({"quality": 0}, "--quality 0: give 1 to 100"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"encode": "gif"}, "--encode gif: unknown; choose from jpg, png, webp"),
        ({"image_root": str(tmp_path / "none")}, "--image-root .*: no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            options(out, **more)
    with pytest.raises(ValueError, match=r"the folder to make it in is not there; mkdir -p /.*none$"):
        prepare(options(tmp_path / "none/data"))
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="it is there, and no prepared dataset"):
        prepare(options(out, force=True))
    assert (out / "mine.txt").read_text() == "keep"
    shutil.rmtree(out)
    with pytest.raises(
        ValueError, match=r"nothing that can be used in .*; 99 records read; 99 dropped: no conv"
    ):
        prepare(options(out, format="openai"))
    (tmp_path / "few.json").write_text(json.dumps([llava(1, None), llava(2, "gone.jpg")]))
    with pytest.raises(ValueError, match=r"--split 1; 2 records read; 1 dropped: missing image$"):
        prepare(Options(input=(str(tmp_path / "few.json"),), save_dir=str(out)))
    assert not os.path.exists(f"{out}.partial")  # or it would refuse the --split that it names
    main = runpy.run_path(str(SCRIPT))["main"]
    making = ["--input", "a.json", "--save-dir", str(out)]
    for flags, message in (
        ([*making, "--split", "a"], "'a': give the shares of train, val and test, such as"),
        ([*making, "--max-dropped", "1.5"], r"'1\.5': give a part of the records, 0 to 1"),
        ([*making, "--template", "v1"], "--template does nothing without --tokenizer-load-dir"),
        ([*making, "--quality", "80"], "--quality does nothing without --encode or --max-side"),
        (["--check", ".", "--max-side", "80"], "--max-side does nothing with --check; leave it out"),
        (["--check", ".", "--save-dir", str(out)], "--save-dir does nothing with --check"),
        (["--input", "a.json"], "give --input and --save-dir to prepare, or --check and a prepared folder"),
    ):
        with pytest.raises(ValueError, match=message):
            main(flags)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: usage(10_000))
    with pytest.raises(ValueError, match=r"9\.8 KiB are free there, about .*iB are needed"):
        prepare(options(out, force=True))
    monkeypatch.undo()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build, "write_json", full)
    with pytest.raises(ValueError, match="no space is left there; make room and run the same command again"):
        prepare(options(out, force=True))
    assert not out.exists()


def test_an_object_that_holds_the_records_is_told_by_its_fields(tmp_path: Path) -> None:
    """In one line, where it could be a record."""
    (tmp_path / "a.json").write_text(json.dumps({"data": [llava(i, None) for i in range(9)], "version": 1}))
    with pytest.raises(ValueError) as error:
        prepare(Options(input=(str(tmp_path / "a.json"),), save_dir=str(tmp_path / "out")))
    assert str(error.value) == (
        f"nothing that can be used in {tmp_path}/a.json; 1 records read; 1 dropped: no conversation; "
        f"the first is {tmp_path}/a.json:1: its fields are data (a list of 9), version"
    )


def test_what_was_lost_of_each_file_and_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 where more is lost than --max-dropped allows; what is there twice isn't lost."""
    for name, records in {
        "whole": [llava(i, None) for i in range(12)],
        "half": [llava(20 + i, "gone.jpg" if i % 2 else None) for i in range(4)],
        "twice": [llava(i, None) for i in range(8)],
        "nothing": [],
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    main, out = runpy.run_path(str(SCRIPT))["main"], tmp_path / "out"

    def run(*names: str, more: Sequence[str] = ()) -> tuple[int, str, str]:
        files = [str(tmp_path / f"{name}.json") for name in names]
        code = main(["--input", *files, "--save-dir", str(out), "--split", "1", "--workers", "1", *more])
        told = capsys.readouterr()
        return code, told.out, told.err

    code, told, error = run("whole", "half", "twice", "nothing")
    assert "No sample of the train split has an image" in told
    assert "No sample of the train split has an image" in (out / "report.md").read_text()
    assert code == 0 and "error" not in error
    assert told.endswith(
        f"\n{out}: 14 of 24 records kept, 10 dropped (41.7%; 8 of them: duplicate id); report.md says more\n"
    )
    report = json.loads((out / "report.json").read_text())
    counts = {os.path.basename(path): list(facts.values()) for path, facts in report["files"].items()}
    assert counts == {
        "whole.json": [12, 12, 0],
        "half.json": [4, 2, 2],
        "twice.json": [8, 0, 8],
        "nothing.json": [0, 0, 0],
    }
    assert f"| {tmp_path}/half.json | 4 | 2 | 2 |" in (out / "report.md").read_text()
    code, told, error = run("whole", "half", more=["--force", "--max-dropped", "0.12"])
    assert code == 1 and "2 dropped (12.5%; 2 of them: missing image)" in told.splitlines()[-1]
    assert "error: more than --max-dropped 0.12 of the records are lost; the dataset is there" in error
    assert PreparedDataset.open(str(out)).num_samples == 14
    code, told, _ = run("whole", "half", more=["--force", "--max-dropped", "0.125"])
    assert code == 0 and "2 dropped (12.5%; 2 of them: missing image)" in told.splitlines()[-1]
    with pytest.raises(ValueError, match="nothing that can be used"):
        run("nothing", more=["--force"])
