"""From people's files to a folder that training reads: what is in it, restarts, reports."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.dataset import split_samples
from megatron_vlm.data.batch import IGNORE_INDEX
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loading.loader import TrainLoader
from megatron_vlm.data.prepare.build import Options, prepare
from megatron_vlm.data.prepare.lengths import Lengths
from megatron_vlm.data.prepare.shards import Rendering
from megatron_vlm.data.processing import load_processing
from megatron_vlm.plan.grouping import Packing
from megatron_vlm.plan.packing_estimate import estimate_packing
from tests.data.prepare.test_sources import save_to_disk, write_table, write_tar
from tests.data.tiny_data import SCRIPT, llava, picture, samples_in, samples_of
from tests.media import pixels as pixels_of


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files, but for energon's database, whose rows come in any order."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "index.sqlite"
    }


@pytest.fixture(scope="module")
def llava_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 records in LLaVA's JSON, 120 with an image; 9 of them can't be used, each in its own way."""
    root = tmp_path_factory.mktemp("llava")
    (root / "images").mkdir()
    records = []
    for i in range(200):
        name = f"{i}.jpg" if i % 5 < 3 else None
        if name:
            (root / "images" / name).write_bytes(picture(i, "JPEG", 20 + i % 9))
        records.append(llava(i, name))
    (root / "images/1.jpg").write_bytes(b"not a picture")
    (root / "images/2.jpg").write_bytes((root / "images/2.jpg").read_bytes()[:-200])
    (root / "images/5.jpg").unlink()
    records[6]["conversations"][0]["value"] = "<image> <image>"
    records[7]["conversations"][1]["value"] = ""
    records[8]["conversations"].reverse()
    records[9] = records[3]  # the same again
    records[13]["id"] = "10"  # another with the same id: stays
    records[14]["conversations"] = []
    records[18]["image"] = "http://example.org/a.jpg"
    (root / "llava.json").write_text(json.dumps(records, ensure_ascii=False))
    return root


def options(root: Path, out: Path, **more: Any) -> Options:
    given = {"image_root": str(root / "images"), "split": (0.8, 0.1, 0.1), "shard_samples": 40, **more}
    return Options(input=(str(root / "llava.json"),), save_dir=str(out), **given)


@pytest.fixture(scope="module")
def prepared(llava_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "data"
    prepare(options(llava_json, out))
    return out


def test_the_report_says_what_became_of_every_record(llava_json: Path, prepared: Path) -> None:
    report = json.loads((prepared / "report.json").read_text())
    assert {reason: facts["count"] for reason, facts in report["dropped"].items()} == {
        "corrupt image": 2,
        "duplicate id": 1,
        "empty answer": 1,
        "markers and images differ": 1,
        "missing image": 1,
        "no answer": 1,
        "no conversation": 1,
        "remote image": 1,
    }
    assert (report["read"], report["kept"]) == (200, 191)
    path = llava_json / "llava.json"
    assert report["files"] == {str(path): {"read": 200, "kept": 191, "dropped": 9}}
    examples = {reason: facts["examples"] for reason, facts in report["dropped"].items()}
    assert examples["missing image"] == [f"{path}:6 (id 5): 5.jpg"]
    assert examples["duplicate id"] == [f"{path}:10 (id 3)"]
    assert sorted(line.split(": ")[0] for line in examples["corrupt image"]) == [
        f"{path}:2 (id 1)",
        f"{path}:3 (id 2)",
    ]
    assert report["notes"] == {"same id as an earlier sample, other content": 1}
    assert report["shapes"] == {"llava": 194}
    # 193 have sound text and their image's file; two of them turn out to be corrupt.
    assert sum(split["samples"] for split in report["splits"].values()) == 191
    wanted = {"train": 155, "val": 19, "test": 19}
    assert all(0 <= wanted[name] - split["samples"] <= 2 for name, split in report["splits"].items())
    histograms = report["histograms"]
    assert histograms["turns"]["bins"] == {"2": 191}
    assert histograms["images"]["bins"] == {"0": 80 - 4, "1": 120 - 5}
    assert (histograms["longer side"]["min"], histograms["longer side"]["max"]) == (24, 28)
    lines = (prepared / "dropped.jsonl").read_text().splitlines()
    lost = Counter(json.loads(line)["reason"] for line in lines)
    assert lost == {reason: facts["count"] for reason, facts in report["dropped"].items()}
    text = (prepared / "report.md").read_text()
    assert "has an image" not in text
    assert "200 records read, 191 samples kept." in text and f"`{path}:6 (id 5): 5.jpg`" in text


def test_samples_are_what_was_put_in(llava_json: Path, prepared: Path) -> None:
    records = json.loads((llava_json / "llava.json").read_text())
    found = {}
    for shard in sorted(prepared.glob("*.tar")):
        with tarfile.open(shard) as tar:
            names = [member.name for member in tar]
        keys = [name.partition(".")[0] for name in names]
        assert len({*keys}) == sum(a != b for a, b in zip(["", *keys], keys, strict=False))  # contiguous
        found.update(dict.fromkeys(keys, shard.name))
    assert len(found) == 191
    with tarfile.open(prepared / "train-000000.tar") as tar:
        for member in tar:
            key, _, part = member.name.partition(".")
            record, data = records[int(key) - 1], tar.extractfile(member).read()  # type: ignore[union-attr]
            if part == "json":
                value = json.loads(data)
                assert [m["content"] for m in value["messages"]] == [
                    t["value"] for t in record["conversations"]
                ]
                assert value["images"] == (["0.jpg"] if record["image"] else [])
                assert (value["id"], value.get("image")) == (record["id"], record["image"])
            else:
                assert data == (llava_json / "images" / record["image"]).read_bytes()


def test_energon_and_the_launcher_read_it(prepared: Path) -> None:
    report = json.loads((prepared / "report.json").read_text())
    for split in ("train", "val", "test"):
        dataset = PreparedDataset.open(str(prepared), split)
        assert dataset.num_samples == report["splits"][split]["samples"]
        assert split_samples(str(prepared), split) == dataset.num_samples
        assert all(shard.name.startswith(split) for shard in dataset.shards)


def test_training_reads_it(prepared: Path, folders: dict[str, Path], models: dict[str, ModelConfig]) -> None:
    """Every sample of an epoch, once, with the answer trained and the image that went in."""
    dataset = PreparedDataset.open(str(prepared))
    processing = load_processing(str(folders["qwen"]), models["qwen"], seq_length=400)
    order = {"dp_rank": 0, "dp_size": 1, "data_workers": 1, "shuffle_buffer_size": 1}
    loader = TrainLoader(dataset, processing, micro_batch_size=1, **order)
    samples = {sample["key"]: sample for sample in samples_in(prepared)}
    try:
        batches = [next(loader) for _ in range(dataset.num_samples)]
    finally:
        loader.close()
    assert len({batch.keys[0] for batch in batches}) == dataset.num_samples
    assert loader.counts["seen"] == dataset.num_samples
    assert loader.counts["dropped"] == loader.counts["corrupt"] == 0
    for batch in batches:
        sample = samples[batch.keys[0]]
        trained = [label for label in batch.labels[0].tolist() if label != IGNORE_INDEX]
        assert processing.tokenizer.decode(trained).startswith(sample["messages"][-1]["content"])
        assert len(pixels_of(batch)) == len(sample["images"])


def test_the_number_of_workers_changes_nothing(llava_json: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(options(llava_json, tmp_path / "a", workers=3))
    assert contents(tmp_path / "a") == contents(prepared)
    prepare(options(llava_json, tmp_path / "b", seed=1))
    assert contents(tmp_path / "b") != contents(prepared)


@pytest.mark.parametrize("sign", ["shards/*.tar.json", "dataset/.nv-meta"], ids=["shards", "energon"])
def test_killed_and_run_again_it_is_as_if_nothing_had_happened(
    sign: str, llava_json: Path, prepared: Path, tmp_path: Path
) -> None:
    """While shards are written, and while energon's own processes index them."""
    out = tmp_path / "data"
    asked = options(llava_json, out)
    flags = ["--input", asked.input[0], "--image-root", str(asked.image_root), "--save-dir", str(out)]
    flags += ["--split", "0.8,0.1,0.1", "--shard-samples", "40", "--workers", "1"]
    partial = tmp_path / "data.partial"
    code = 0
    while code == 0:  # on a busy machine it may have ended before it was killed
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen([sys.executable, SCRIPT, *flags], stderr=subprocess.DEVNULL)
        while process.poll() is None and not any(partial.glob(sign)):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
    assert code == -signal.SIGKILL
    assert not out.exists()
    (partial / "dataset/.k1ll3d").touch()  # as energon's files are called before they have their names
    finished = [mark.stem for mark in partial.glob("shards/*.tar.json")]
    assert finished
    before = {name: os.stat(partial / "dataset" / name).st_mtime_ns for name in finished}
    with pytest.raises(ValueError, match="begun with another --seed; give the same again, or --force"):
        prepare(options(llava_json, out, seed=7))
    prepare(asked)
    assert {name: os.stat(out / name).st_mtime_ns for name in finished} == before, (
        "a finished shard was redone"
    )
    assert contents(out) == contents(prepared)
    assert not partial.exists()
    with pytest.raises(ValueError, match="already prepared; --force makes it anew"):
        prepare(asked)


def test_every_format_gives_the_same_samples(tmp_path: Path) -> None:
    """The same three samples, once in each format, in one run."""
    data = [picture(0, "PNG"), picture(1), picture(2, "WEBP")]
    (tmp_path / "a.png").write_bytes(data[0])
    (tmp_path / "b.JPEG").write_bytes(data[1])
    (tmp_path / "c").write_bytes(data[2])
    names = ["a.png", "b.JPEG", "c"]
    uris = ["data:image/png;base64," + base64.b64encode(item).decode() for item in data]
    base = [llava(i, names[i]) for i in range(3)]

    def write(name: str, records: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("\n".join(json.dumps(record) for record in records))
        return str(tmp_path / name)

    def named(kind: str, **fields: Any) -> list[dict[str, Any]]:
        return [{"id": f"{kind}-{i}", **{k: v[i] for k, v in fields.items()}} for i in range(3)]

    questions, answers = [f"Question {i}?" for i in range(3)], [f"答え {i}" for i in range(3)]
    parts = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": uri}},
                    {"type": "text", "text": f"\n{q}"},
                ],
            },
            {"role": "assistant", "content": a},
        ]
        for uri, q, a in zip(uris, questions, answers, strict=True)
    ]
    conversations = [record["conversations"] for record in base]
    roles = [
        [{"role": "user", "content": f"<image>\n{q}"}, {"role": "assistant", "content": a}]
        for q, a in zip(questions, answers, strict=True)
    ]
    raw = [{"bytes": item, "path": name} for item, name in zip(data, names, strict=True)]
    inputs = [
        write("llava.jsonl", named("llava", image=names, conversations=conversations)),
        write("roles.jsonl", named("roles", images=[[name] for name in names], conversations=roles)),
        write("openai.jsonl", named("openai", messages=parts)),
        write("alpaca.jsonl", named("alpaca", image=names, instruction=questions, output=answers)),
        write("query.jsonl", named("query", images=uris, query=questions, response=answers)),
        str(
            write_table(
                tmp_path / "bytes.parquet", named("bytes", image=data, question=questions, answer=answers)
            )
        ),
        str(write_table(tmp_path / "raw.parquet", named("raw", image=raw, conversations=conversations), 2)),
        str(save_to_disk(tmp_path / "saved", named("saved", images=[[r] for r in raw], messages=roles))),
        str(
            write_tar(
                tmp_path / "shard.tar",
                {
                    f"tar-{i}.{part}": value
                    for i in range(3)
                    for part, value in (
                        (("png", "jpg", "webp")[i], data[i]),
                        ("txt", answers[i].encode()),
                        ("json", json.dumps({"question": questions[i]}).encode()),
                    )
                },
            )
        ),
    ]
    # Of the folder "saved", relative paths begin elsewhere; its images are bytes.
    report = prepare(Options(input=tuple(inputs), save_dir=str(tmp_path / "out"), split=(1,)))
    assert report["dropped"] == {} and report["kept"] == 3 * len(inputs)
    found = samples_of(tmp_path / "out")
    assert len(found) == 3 * len(inputs)
    for name, sample in found.items():
        i = int(name[-1])
        assert sample["messages"] == roles[i], name
        assert sample["images"] == [("0.png", "0.jpg", "0.webp")[i]]
        assert sample["data"] == [data[i]], name  # to the byte


def test_lengths_in_tokens(tmp_path: Path, folders: dict[str, Path], models: dict[str, ModelConfig]) -> None:
    """Against transformers' own template and tokenizer; each image or frame is 25 tokens of this tower."""
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    records = [llava(i, [None, "1.jpg", "2.jpg", None][i]) for i in range(4)]
    records[2]["conversations"] += [
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "Two dogs. " * 9},
    ]
    records[3] = llava(3, None, video_frames=["0.jpg", "1.jpg", "3.jpg"])
    records[3]["conversations"][0]["value"] = "What moves in <video>?"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    given = {
        "input": (str(tmp_path / "a.jsonl"),),
        "split": (1.0,),
        "tokenizer_load_dir": str(folders["qwen"]),
    }
    histograms = prepare(Options(save_dir=str(tmp_path / "out"), **given))["histograms"]  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen"])
    texts = []
    found = samples_of(tmp_path / "out")
    assert found["3"]["messages"][0]["content"] == "What moves in <image><image><image>?"
    assert found["3"]["data"] == [picture(i) for i in (0, 1, 3)]
    for sample in found.values():
        text = tokenizer.apply_chat_template(sample["messages"], tokenize=False)
        texts.append(len(tokenizer(text)["input_ids"]) - len(sample["images"]))
    assert histograms["text tokens"]["total"] == sum(texts)
    assert (histograms["text tokens"]["min"], histograms["text tokens"]["max"]) == (min(texts), max(texts))
    assert histograms["image tokens"]["bins"] == {"0": 1, "32": 2, "128": 1}
    assert histograms["tokens"]["total"] == sum(texts) + histograms["image tokens"]["total"]
    assert histograms["image tokens"]["total"] == 5 * 25
    assert 0 < histograms["trained tokens"]["total"] < sum(texts)
    refused = Rendering(str(folders["bare"]), "chat", "jp")
    with pytest.raises(ValueError, match="--template chat: the tokenizer folder has no chat template"):
        Lengths(refused)


def test_packed_sequences_hold_as_many_samples_as_the_plan_says(
    tmp_path: Path, folders: dict[str, Path], models: dict[str, ModelConfig], open_loader: Any
) -> None:
    """The estimate from the report's histogram, against what a loader gives."""
    for i in range(9):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    records = []
    for i in range(400):
        records.append(llava(i, f"{i % 9}.jpg" if i % 3 else None))
        records[-1]["conversations"][1]["value"] = "Two dogs. " * (1 + i * i % 17)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    data, hf = str(tmp_path / "out"), str(folders["qwen"])
    prepare(Options(input=(str(tmp_path / "a.jsonl"),), save_dir=data, split=(1.0,), tokenizer_load_dir=hf))
    packing = Packing(buffer_size=50, capacity=256)
    processing = load_processing(hf, models["qwen"], seq_length=256)
    loader = open_loader(PreparedDataset.open(data), processing, 2, micro_batch_size=1, grouping=packing)
    sequences = 120
    for _ in range(sequences):
        next(loader)
    found = estimate_packing(data, packing, "truncate")
    assert found is not None and found.counted_with == (hf,)
    assert found.samples_per_sequence == pytest.approx(loader.counts["seen"] / sequences, rel=0.05)


def test_images_are_made_smaller_where_asked(tmp_path: Path) -> None:
    sizes = [(40, 30), (64, 32), (10, 90), (33, 33)]
    forms = ["PNG", "JPEG", "GIF", "PNG"]
    for i, (size, form) in enumerate(zip(sizes, forms, strict=True)):
        mode = "RGBA" if i == 3 else "L" if form == "GIF" else "RGB"
        Image.fromarray(np.full((size[1], size[0], 3), 40 * i, np.uint8)).convert(mode).save(
            tmp_path / str(i), form
        )
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(llava(i, str(i))) for i in range(4)))
    given = {"input": (str(tmp_path / "a.jsonl"),), "split": (1.0,), "max_side": 40}
    prepare(Options(save_dir=str(tmp_path / "out"), **given))  # type: ignore[arg-type]
    found = samples_of(tmp_path / "out")
    assert [found[str(i)]["images"] for i in range(4)] == [["0.png"], ["0.jpg"], ["0.png"], ["0.png"]]
    images = [Image.open(io.BytesIO(found[str(i)]["data"][0])) for i in range(4)]
    assert [image.size for image in images] == [(40, 30), (40, 20), (4, 40), (33, 33)]
    assert found["0"]["data"] == [(tmp_path / "0").read_bytes()]
    assert found["3"]["data"] == [(tmp_path / "3").read_bytes()]
    # JPEG keeps a flat colour to a level or two.
    assert np.abs(np.asarray(images[1]).astype(int) - 40).max() <= 2
    prepare(Options(save_dir=str(tmp_path / "jpg"), encode="jpg", **given))  # type: ignore[arg-type]
    encoded = samples_of(tmp_path / "jpg")
    assert [encoded[str(i)]["images"] for i in range(4)] == [["0.jpg"]] * 4
    assert all(item["data"][0][:2] == b"\xff\xd8" for item in encoded.values())


def test_force_replaces_a_dataset_when_the_new_one_is_whole(llava_json: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    given = {"save_dir": str(out), "split": (1.0,)}
    (tmp_path / "a.jsonl").write_text(json.dumps(llava(1, None)))
    (tmp_path / "b.jsonl").write_text(json.dumps(llava(2, None)))
    prepare(Options(input=(str(tmp_path / "a.jsonl"),), **given))  # type: ignore[arg-type]
    prepare(Options(input=(str(tmp_path / "b.jsonl"),), force=True, **given))  # type: ignore[arg-type]
    assert list(samples_of(out)) == ["2"]
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl", "data"]
