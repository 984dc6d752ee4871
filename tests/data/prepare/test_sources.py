"""Files are known by their content, cut into units, and every record is read once."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_vlm.data.prepare import sources
from megatron_vlm.data.prepare.records.values import TarPart
from megatron_vlm.data.prepare.sources import find_units, kind_of, read_unit

RECORDS = [{"id": i, "text": "x" * (i % 7)} for i in range(50)]


def read(*paths: Path) -> list[dict[str, Any]]:
    """Records of files, in order, after checking that positions count up in each unit."""
    found = []
    for unit in find_units([str(path) for path in paths]):
        raws = list(read_unit(unit))
        assert [raw.position for raw in raws] == list(range(1, len(raws) + 1))
        assert all(0 <= raw.done <= 1 for raw in raws)
        found += [raw.fields for raw in raws if raw.fields is not None]
    return found


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_table(path: Path, rows: list[dict[str, Any]], rows_in_a_group: int = 7) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=rows_in_a_group)
    return path


def save_to_disk(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a folder as ``datasets.Dataset.save_to_disk`` does: Arrow streams and a file that lists them."""
    folder.mkdir(parents=True)
    half = len(rows) // 2
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (rows[:half], rows[half:]), strict=True):
        table = pyarrow.Table.from_pylist(part)
        with (
            pyarrow.OSFile(str(folder / name), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table, max_chunksize=5)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_every_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    monkeypatch.setattr(sources, "_CHUNK", 64)
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    (tmp_path / "pretty.json").write_text(json.dumps(RECORDS, indent=2))
    (tmp_path / "bom.data").write_bytes(b"\xef\xbb\xbf" + lines.encode())  # no suffix says what it is
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_table(tmp_path / "table.parquet", RECORDS)
    table = pyarrow.Table.from_pylist(RECORDS)
    with (
        pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as file,
        pyarrow.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=9)
    for name in ("pretty.json", "bom.data", "lines.jsonl.gz", "table.parquet", "file.arrow"):
        assert read(tmp_path / name) == RECORDS, name
    assert read(save_to_disk(tmp_path / "saved", RECORDS)) == RECORDS
    assert len(find_units([str(tmp_path / "bom.data")])) > 3
    assert len(find_units([str(tmp_path / "table.parquet")])) > 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=9) | st.integers(), max_size=3)),
    unit=st.integers(1, 90),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
)
@example(records=[{"𐀀": ""}], unit=1, chunk=3, indent=None, ascii=False)  # a chunk: part of a character
def test_nothing_is_lost_where_pieces_meet(
    tmp_path: Path, records: list[Any], unit: int, chunk: int, indent: int | None, ascii: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", unit)
        patch.setattr(sources, "_CHUNK", chunk)
        array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
        array.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii), encoding="utf-8")
        assert read(array) == records
        lines.write_text("".join(json.dumps(r, ensure_ascii=ascii) + "\n" for r in records), encoding="utf-8")
        if records:
            assert read(lines) == records


def test_a_bad_line_is_one_record_and_a_cut_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n\n{"id": 2\n[3]\n\xff\n{"id": 4}')
    raws = [raw for unit in find_units([str(path)]) for raw in read_unit(unit)]
    assert [raw.fields for raw in raws] == [{"id": 1}, None, None, None, None, {"id": 4}]
    assert [raw.problem and raw.problem.reason for raw in raws] == [
        None,
        None,
        "bad JSON",
        "bad record",
        "bad JSON",
        None,
    ]
    text = json.dumps(RECORDS)
    files = {
        "cut.json": text[:200].encode(),
        "wrong.json": text.replace('"id": 7', "id: 7").encode(),
        "cut.parquet": write_table(tmp_path / "a.parquet", RECORDS).read_bytes()[:-100],
        "cut.tar": write_tar(tmp_path / "a.tar", {"0.txt": b"1" * 3000}).read_bytes()[:2000],
        "header.tar": write_tar(tmp_path / "b.tar", {"0.txt": b"1", "1.txt": b"2"}).read_bytes()[:1200],
        "cut.jsonl.gz": gzip.compress(b'{"id": 1}\n' * 999)[:40],
        "latin1.json": '[{"id": "é"}]'.encode("latin-1"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"--input {tmp_path}/{name}: damaged or cut off \(.+\)$"):
            read(tmp_path / name)


def test_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "d/0.jpg": b"zero",
        "d/0.json": b'{"question": "?", "id": 7}',
        "d/0.txt": b"answer",
        "1-noimage.jpg": b"placeholder",
        "1-noimage.txt": b"text",
        "2.json": b'{"messages": [], "images": ["1.png", "0.png"]}',
        "2.0.png": b"first",
        "2.1.png": b"second",
        "3.json": b"{",
        "4.jpg": b"no answer",
    }
    path = write_tar(tmp_path / "a.tar", files)
    raws = list(read_unit(find_units([str(path)])[0]))
    found = [raw.problem.reason if raw.problem else raw.fields for raw in raws]
    assert found == [
        {"question": "?", "id": 7, "response": "answer"},
        {"question": "", "id": "1-noimage", "response": "text"},
        {"messages": [], "images": ["1.png", "0.png"], "id": "2"},
        "bad JSON",
        "no answer",
    ]
    data = path.read_bytes()
    images = [
        [data[i.offset : i.offset + i.size] for i in raw.images or [] if isinstance(i, TarPart)]
        for raw in raws
    ]
    assert images == [[b"zero"], [], [b"second", b"first"], [], []]
    packed = write_tar(tmp_path / "a.tgz", files, "w:gz")
    assert next(read_unit(find_units([str(packed)])[0])).images == [b"zero"]


def test_folders(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a.jsonl", ".hidden/y.jsonl", "b/.z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"id": name}))
    assert read(tmp_path) == [{"id": "a.jsonl"}, {"id": "b/x.jsonl"}]
    write_table(tmp_path / "b/t.parquet", RECORDS)
    assert read(tmp_path) == RECORDS  # the JSON beside tables describes them
    (tmp_path / "b/talk.jsonl").write_text(json.dumps({"question": "", "answer": "4"}))
    with pytest.raises(ValueError, match=r"b/t\.parquet, and JSON .*b/talk\.jsonl; name the files to read$"):
        read(tmp_path)
    (tmp_path / "b/talk.jsonl").unlink()
    save_to_disk(tmp_path / "dict/train", RECORDS)
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train"]}')
    assert read(tmp_path / "dict") == RECORDS
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        ValueError, match=r"splits train, test; name the one to prepare, such as .*dict/train$"
    ):
        read(tmp_path / "dict")


def test_what_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("image,text\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "object.json").write_text(json.dumps({"data": RECORDS}, indent=2))
    for name, message in (
        ("a.csv", "neither JSON, .*; it begins with b'image,te'"),
        ("empty.jsonl", "it is empty"),
        (
            "object.json",
            r"one JSON object over several lines; give the list of .*; its fields are data \(a list of 50\)$",
        ),
        ("none", "no such file or folder"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
    with pytest.raises(ValueError, match=r"no \.json, \.jsonl"):
        (tmp_path / "folder").mkdir()
        read(tmp_path / "folder")
    write_table(tmp_path / "a.parquet", RECORDS)
    assert kind_of(str(tmp_path / "a.parquet")) == "parquet"
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"need pyarrow; pip install 'megatron-vlm\[data\]'$"):
        read(tmp_path / "a.parquet")
