"""Images and inputs that are no files, paths that lead elsewhere, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.prepare import stage
from megatron_vlm.data.prepare.build import Options, prepare
from megatron_vlm.data.prepare.files import open_regular
from megatron_vlm.data.prepare.sources import find_units
from tests.data.prepare.test_sources import write_table
from tests.data.tiny_data import SCRIPT, llava, picture, samples_of


def test_images_that_are_no_files_or_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is dropped with its reason, the same from JSON and from Parquet; nothing waits or reads on."""
    root, out = tmp_path / "images", tmp_path / "out"
    (root / "below").mkdir(parents=True)
    for path in (root / "a.jpg", root / "below/b.jpg", tmp_path / "secret.jpg"):
        path.write_bytes(picture(0))
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "socket.jpg"))
    os.truncate(os.open(root / "huge.jpg", os.O_CREAT | os.O_WRONLY), stage.MOST_IMAGE_BYTES + 1)
    for name, target in {
        "inside.jpg": "a.jpg",
        "outside.jpg": "../secret.jpg",  # whoever has made the folder wants it
        "dangling.jpg": "gone.jpg",
        "circle.jpg": "circle.jpg",
        "device.jpg": "/dev/zero",
    }.items():
        (root / name).symlink_to(target)
    wanted = {
        "a.jpg": "",
        "below/../a.jpg": "",
        str(root / "below/b.jpg"): "",
        f"file://{root}/a.jpg": "",
        "inside.jpg": "",
        "outside.jpg": "",
        "pipe.jpg": "unreadable image",
        "socket.jpg": "unreadable image",
        "huge.jpg": "unreadable image",
        "below": "unreadable image",
        "device.jpg": "unreadable image",
        "circle.jpg": "unreadable image",
        "dangling.jpg": "missing image",
        "a.jpg/b.jpg": "missing image",
        "../secret.jpg": "image outside --image-root",
        "below/../../secret.jpg": "image outside --image-root",
        str(tmp_path / "secret.jpg"): "image outside --image-root",
        "/dev/zero": "image outside --image-root",
        str(root) + "2/a.jpg": "image outside --image-root",
    }
    records = [llava(i, name) for i, name in enumerate(wanted)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for record in records:
        record["id"] = f"table-{record['id']}"
    inputs = str(tmp_path / "a.json"), str(write_table(tmp_path / "b.parquet", records))
    given = {"input": inputs, "save_dir": str(out), "split": (1.0,)}
    report = prepare(Options(image_root=str(root), **given))  # type: ignore[arg-type]
    lost = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    found = {loss["id"]: loss["reason"] for loss in lost}
    expected = {str(i): reason for i, reason in enumerate(wanted.values()) if reason}
    assert found == expected | {f"table-{i}": reason for i, reason in expected.items()}
    kept = samples_of(out)
    assert all(sample["data"] == [picture(0)] for sample in kept.values())
    assert len(kept) == report["kept"] == 12
    details = {loss["id"]: loss["detail"] for loss in lost}
    assert "it is a pipe" in details["6"] and "it is a device" in details["10"]
    assert f"not below {root}; links in it may lead out, and without --image-root a" in details["14"]
    anywhere = prepare(Options(image_root="/", force=True, **given))  # type: ignore[arg-type]
    assert "image outside --image-root" not in anywhere["dropped"]
    with pytest.raises(OSError, match="a pipe"):  # put there after the first pass has looked
        open_regular(str(root / "pipe.jpg"))


def test_without_an_image_root_a_path_may_lead_anywhere(tmp_path: Path) -> None:
    """Annotations beside the folder of images, and paths that other programs have written in full."""
    for folder in ("annotations", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images/a.jpg").write_bytes(picture(0))
    names = ["../images/a.jpg", str(tmp_path / "images/a.jpg"), "/dev/zero", "a.jpg"]
    path = tmp_path / "annotations/a.json"
    path.write_text(json.dumps([llava(i, name) for i, name in enumerate(names)]))
    report = prepare(Options(input=(str(path),), save_dir=str(tmp_path / "out"), split=(1.0,)))
    assert [sample["data"] for sample in samples_of(tmp_path / "out").values()] == [[picture(0)]] * 2
    assert {reason: lost["count"] for reason, lost in report["dropped"].items()} == {
        "missing image": 1,
        "unreadable image": 1,
    }


def test_inputs_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", tmp_path):
        with pytest.raises(ValueError, match=r"pipe\.jsonl: a pipe, and files are read in parts"):
            find_units([str(path)])
    (tmp_path / "pipe.jsonl").unlink()
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(ValueError, match=r"link\.jsonl: a link to nothing"):
        find_units([str(tmp_path)])


def test_links_and_devices_in_a_tar(tmp_path: Path) -> None:
    """tarfile would give the sample without them: a question about a picture, and no picture."""
    kinds = {
        "sym": tarfile.SYMTYPE,
        "hard": tarfile.LNKTYPE,
        "pipe": tarfile.FIFOTYPE,
        "null": tarfile.CHRTYPE,
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in ("whole", *kinds):
            for suffix, data in (("jpg", picture(1)), ("txt", b"A cat."), ("json", b'{"question": "What?"}')):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                if suffix == "jpg" and key in kinds:
                    member.type, member.linkname = kinds[key], "whole.jpg"
                    tar.addfile(member)
                else:
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    prepare(Options(input=(str(tmp_path / "a.tar"),), save_dir=str(tmp_path / "out"), split=(1.0,)))
    assert list(samples_of(tmp_path / "out")) == ["whole"]
    lost = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert {loss["reason"] for loss in lost} == {"link or device in a tar"}
    assert {loss["id"]: loss["detail"] for loss in lost} == {
        "sym": "sym.jpg is a link",
        "hard": "hard.jpg is a link",
        "pipe": "pipe.jpg is a device or a pipe",
        "null": "null.jpg is a device or a pipe",
    }


@pytest.mark.parametrize("when", ["workers begin", "shards are written"])
def test_an_interrupt_is_one_line_and_the_same_command_goes_on(when: str, tmp_path: Path) -> None:
    """As a terminal sends it: to all processes of the command at once."""
    (tmp_path / "a.json").write_text(json.dumps([llava(i, f"{i}.png") for i in range(200)]))
    for i in range(200):
        (tmp_path / f"{i}.png").write_bytes(picture(i, "PNG", 120))
    out, partial = tmp_path / "data", tmp_path / "data.partial"
    flags = ["--input", str(tmp_path / "a.json"), "--save-dir", str(out), "--shard-samples", "20"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags, "--split", "1", "--workers", "2", "--encode", "webp"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    signs: dict[str, Callable[[], Any]] = {
        "workers begin": lambda: len(children.read_text().split()) > 1,
        "shards are written": lambda: any(partial.glob("shards/*.tar.json")),
    }
    while process.poll() is None and not signs[when]():
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    told, error = process.communicate()  # to the end of what its workers write as well: none is left
    assert (process.returncode, told) == (128 + signal.SIGINT, "")
    lines = [line for line in error.replace("\r", "\n").splitlines() if "%|" not in line and line]
    assert lines == ["interrupted; the same command goes on from here"]
    assert not out.exists()
    prepare(
        Options(
            input=(str(tmp_path / "a.json"),),
            save_dir=str(out),
            shard_samples=20,
            split=(1.0,),
            encode="webp",
            workers=2,
        )
    )
    assert len(samples_of(out)) == 200 and not partial.exists()
