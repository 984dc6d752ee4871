"""Samples read from shards: as energon and tarfile read them."""

from __future__ import annotations

import io
import itertools
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

from megatron_vlm.data.shards import ShardReader, members


def readers(path: Path, **options: Any) -> tuple[ShardReader, ShardInfosITarReader]:
    shards = WebdatasetMeta.from_config(EPath(str(path)), split_part="train").shards
    arguments = (EPath(str(path)), shards)
    return ShardReader(*arguments, **options), ShardInfosITarReader(*arguments, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"part_filter": lambda part: part == "json"},
        {"sample_filter": lambda key: not key.endswith("1")},
        {"itar_cache_size": 1},
    ],
    ids=["all", "parts", "samples", "one file at a time"],
)
def test_samples_equal_energons(dataset_dir: Path, options: dict[str, Any]) -> None:
    ours, energons = readers(dataset_dir, **options)
    for index in [*range(len(energons)), 0, len(energons) - 1, 1]:
        assert ours[index] == energons[index]


LONG = f"{'long' * 60}.txt"
NAMES = ["a.txt", f"{'f' * 90}/{'n' * 90}.txt", "é中.txt"]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize(
    "format, name",
    [*itertools.product(FORMATS, NAMES), *((format, LONG) for format in FORMATS[1:])],
    ids=range(11),
)
def test_members_equal_tarfiles(format: int, name: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for number, size in enumerate((0, 1, 511, 512, 5000)):
            info = tarfile.TarInfo(f"{number}{name}")
            info.size, info.mtime = size, 1.5 if number == 3 else 1
            tar.addfile(info, io.BytesIO(bytes([number]) * size))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        data = buffer.getvalue()[: tar.offset]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]  # type: ignore[union-attr]
    assert members(data) == expected and len(expected) == 5


def test_damage_is_one_line(dataset_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset_dir, tmp_path / "copy")
    shard = sorted(copy.glob("*.tar"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match=rf"^{shard.name} is damaged at its sample 0 \("):
        readers(copy)[0][0]
    shard.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=f"^Unexpected end of tar file: {shard.name}$"):
        readers(copy)[0][0]
    shard.write_bytes(whole)
    index = Path(f"{shard}.idx")
    index.write_bytes(index.read_bytes()[:16])
    with pytest.raises(ValueError, match=f"^the index of {shard.name} has no sample 1$"):
        readers(copy)[0][1]
