"""Every script on damaged and crafted inputs: one line, exit code 2, nothing written, nothing run."""

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.formats.classic import ClassicLayout
from megatron_vlm.hf.formats.native import NativeReader, NativeWriter, read_metadata
from megatron_vlm.hf.tables.ops import REPLICATED
from megatron_vlm.hf.tables.table import PREFIXES
from tests.hf.test_convert import make
from tests.hf.test_scripts import run

KEY = "language_model.model.layers.1.self_attn.k_proj.weight"
NORM = "language_model.decoder.final_layernorm.weight"
EMBEDDING = "language_model.embedding.word_embeddings.weight"
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


class Exploit:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch exploited",))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The same model in all forms, each converted without a complaint."""
    root = tmp_path_factory.mktemp("whole")
    make(root / "single", "clip-llama")
    import_hf(root / "single", root / "native", 2, 1)
    import_hf(root / "single", root / "classic", 2, 1, classic=ClassicLayout(2, 1, 1, (4,)))
    export_hf(root / "native", root / "hf", max_shard_bytes=100_000)
    shutil.copytree(root / "hf", root / "bin")
    index = json.loads((root / "bin" / INDEX).read_text())
    for file in set(index["weight_map"].values()):
        torch.save(load_file(root / "bin" / file), root / "bin" / f"{file}.bin")
        (root / "bin" / file).unlink()
    index["weight_map"] = {name: f"{file}.bin" for name, file in index["weight_map"].items()}
    (root / "bin" / INDEX).unlink()
    (root / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return root


@contextmanager
def no_reader_waits(folder: Path) -> Iterator[None]:
    """Who opens a pipe in the folder finds it empty at once, so that a test fails where it would hang."""
    pipes, over = [path for path in folder.rglob("*") if path.is_fifo()], threading.Event()

    def let_go() -> None:
        while pipes and not over.wait(0.02):
            for path in pipes:
                with suppress(OSError):  # no one has opened it
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    thread = threading.Thread(target=let_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def refused(monkeypatch, capsys, source: Path, name: str, message: str) -> None:
    """Every script that takes such an input says so."""
    there = source.parent / "there"
    if source.name in ("hf", "bin"):
        calls = [["convert_hf_to_megatron", "--hf-dir", source, "--megatron-dir", there]]
    else:
        calls = [
            ["convert_megatron_to_hf", "--megatron-dir", source, "--hf-dir", there],
            ["reshard", "--megatron-dir", source, "--save-dir", there],
            ["reshard", "--megatron-dir", source, "--save-dir", there, "--format", "classic"],
        ]
    single = source.parent / "single"
    if "config" not in name:  # verify.py says where two folders differ, not whether they make sense
        calls += [["verify", source, single], ["verify", single, source]]
    for call in calls:
        capsys.readouterr()
        with no_reader_waits(source):
            code = run(monkeypatch, *call)
        lines = [line for line in capsys.readouterr().err.splitlines() if line and "B/s]" not in line]
        assert code == 2, (call, code, lines)
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], (call, lines)
    assert not there.exists() and not list(source.parent.glob(".there*"))
    assert not Path("exploited").exists()


@pytest.fixture
def damaged(whole: Path, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole, tmp_path / "models"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*"))[1]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def index(change: Callable[[dict[str, str]], object], name: str = INDEX) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content["weight_map"])
        (folder / name).write_text(json.dumps(content))

    return damage


def moved(folder: Path, name: str) -> None:
    """A shard that lies elsewhere, as the index says."""
    file = shard(folder)
    elsewhere = folder / name
    elsewhere.parent.mkdir(exist_ok=True)
    file.rename(elsewhere)
    index(lambda m: m.update({k: name for k, f in m.items() if f == file.name}))(folder)


def config(part: str, key: str, value: object, inside: str = "") -> Damage:
    def damage(folder: Path) -> None:
        path = folder / inside / "config.json"
        content = json.loads(path.read_text())
        content[part][key] = value
        path.write_text(json.dumps(content))

    return damage


HF: dict[str, tuple[Damage, str]] = {
    "cut shard": (lambda f: cut(shard(f)), "not a whole safetensors file"),
    "missing shard": (lambda f: shard(f).unlink(), "which the index names, is not there"),
    "shard of another": (lambda f: shutil.copy(sorted(f.glob("model-*"))[0], shard(f)), " is in model-0000"),
    "index without a tensor": (index(lambda m: m.pop(KEY)), "which the index does not list"),
    "index with another": (index(lambda m: m.update(x=m[KEY])), "the index promises x in"),
    "index that is none": (lambda f: (f / INDEX).write_text("[1"), "not an index of weights"),
    "index of numbers": (index(lambda m: m.update({KEY: 3})), "not "),
    "parent folder": (lambda f: moved(f, "../model.safetensors"), "not a file in this folder"),
    "absolute path": (lambda f: moved(f, str(f.parent / "x.safetensors")), "not a file in this folder"),
    "subfolder": (lambda f: moved(f, "sub/x.safetensors"), "not a file in this folder"),
    "config": (config("text_config", "hidden_size", 64), "config.json implies"),
    "pipe for the index": (lambda f: pipe(f / INDEX), "a pipe, a device or a link to nothing"),
    "pipe for a shard": (lambda f: pipe(shard(f)), "a pipe, a device or a link to nothing"),
    "pipe for the config": (lambda f: pipe(f / "config.json"), "config.json: a pipe, a device or a link"),
    "config without sense": (config("text_config", "num_attention_heads", -4), "num_attention_heads"),
}
BIN: dict[str, tuple[Damage, str]] = {
    "cut": (lambda f: cut(shard(f)), "not a file of weights"),
    "exploit": (lambda f: torch.save({KEY: Exploit()}, shard(f)), "not a file of weights"),
    "old exploit": (lambda f: shard(f).write_bytes(pickle.dumps({KEY: Exploit()})), "not a file of weights"),
    "no tensors": (lambda f: torch.save({KEY: 1}, shard(f)), "something else than named tensors"),
    "a list": (lambda f: torch.save([torch.ones(1)], shard(f)), "something else than named tensors"),
    "parent folder": (
        index(lambda m: m.update({KEY: "../x.bin"}), "pytorch_model.bin.index.json"),
        "not a file in this folder",
    ),
}


def metadata(change: Callable[..., object]) -> Damage:
    def damage(root: Path) -> None:
        content = read_metadata(root / "release")
        change(content)
        (root / "release" / ".metadata").write_bytes(pickle.dumps(content))

    return damage


def paths(prefix: str) -> Damage:
    return metadata(
        lambda m: [setattr(i, "relative_path", prefix + i.relative_path) for i in m.storage_data.values()]
    )


def overlapping(content: Metadata) -> None:
    """Say that the second half of the embedding begins within the first; as many elements as before."""
    chunk = content.state_dict_metadata[EMBEDDING].chunks[1]
    stored = content.storage_data[MetadataIndex(EMBEDDING, chunk.offsets)]
    chunk.offsets = torch.Size([64, 0])
    content.storage_data[MetadataIndex(EMBEDDING, chunk.offsets)] = stored


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(root: Path) -> None:
        reader = NativeReader(root / "release")
        found = {name: reader.read(name) for name in reader.names}
        change(found)
        writer = NativeWriter(root / "release")
        for name, tensor in found.items():
            writer.write(name, tensor, REPLICATED.chunks(tuple(tensor.shape), 1))
        writer.close()

    return damage


def manifest(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def text(name: str, content: str) -> Damage:
    return lambda root: (root / name).write_text(content)


NATIVE: dict[str, tuple[Damage, str]] = {
    "cut": (lambda r: cut(r / "release" / "__0_0.distcp"), "cannot be read"),
    "pipe for data": (lambda r: pipe(r / "release" / "__0_0.distcp"), "a pipe, a device or a link"),
    "pipe for metadata": (lambda r: pipe(r / "release" / ".metadata"), "a pipe, a device or a link"),
    "pipe for weights.json": (lambda r: pipe(r / "release/hf/weights.json"), "a pipe, a device or a"),
    "pipe for carried": (lambda r: pipe(r / "release/hf/carried.safetensors"), "a pipe, a device or a"),
    "pipe for the config": (lambda r: pipe(r / "release/hf/config.json"), "config.json: a pipe, a device"),
    "missing": (lambda r: (r / "release" / "__0_0.distcp").unlink(), "cannot be read"),
    "exploit": (lambda r: (r / "release" / ".metadata").write_bytes(pickle.dumps(Exploit())), "refused"),
    "hidden exploit": (metadata(lambda m: setattr(m, "planner_data", Exploit())), "refused"),
    "parent folder": (paths("../"), "not a file of the checkpoint"),
    "absolute path": (paths("/tmp/"), "not a file of the checkpoint"),
    "other dtype": (
        metadata(lambda m: setattr(m.state_dict_metadata[NORM].properties, "dtype", torch.float64)),
        "that is promised",
    ),
    "overlapping chunks": (
        metadata(lambda m: setattr(m.state_dict_metadata[NORM].chunks[0], "offsets", torch.Size([5]))),
        "don't cover the tensor",
    ),
    "chunks that leave a hole": (metadata(lambda m: overlapping(m)), "don't cover the tensor"),
    "NaN": (tensors(lambda t: t[NORM].fill_(float("nan"))), f"{NORM} holds NaN"),
    "missing tensor": (tensors(lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "another tensor": (tensors(lambda t: t.update({NORM + "x": t[NORM]})), f"{NORM}x has no row"),
    "misshapen tensor": (tensors(lambda t: t.update({NORM: t[NORM][1:].clone()})), f"{NORM} has shape [47]"),
    "weights.json of numbers": (
        text(
            "release/hf/weights.json",
            json.dumps(
                {
                    "files": {"x": {"metadata": {}, "tensors": [[[1], "F32", []]]}},
                    "prefixes": dict.fromkeys(PREFIXES, "x"),
                }
            ),
        ),
        "weights.json does not fit",
    ),
    "manifest": (text("release/manifest.json", "{"), "manifest.json: cannot be read"),
    "manifest of a list": (
        lambda r: manifest(r / "release/manifest.json", tensors=[]),
        "manifest.json: tensors is not what a manifest holds",
    ),
    "weights.json without prefixes": (
        text("release/hf/weights.json", '{"files": {}, "prefixes": {}}'),
        "weights.json: cannot be read",
    ),
    "weights.json of brackets": (
        text("release/hf/weights.json", "[" * 100_000),
        "weights.json: cannot be read",
    ),
    "tracker": (text("latest_checkpointed_iteration.txt", "../../x"), "is neither an iteration nor"),
    "weights.json": (
        text("release/hf/weights.json", '{"files": {"../x": 3}}'),
        "weights.json: cannot be read",
    ),
    "config": (config("text_config", "intermediate_size", 72, "release/hf"), "config.json implies"),
    "carried": (lambda r: cut(r / "release/hf/carried.safetensors"), "carried.safetensors"),
}


def rank_file(change: Callable[[dict], object]) -> Damage:
    def damage(root: Path) -> None:
        file = root / "release/mp_rank_01/model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        change(content)
        torch.save(content, file)

    return damage


CLASSIC: dict[str, tuple[Damage, str]] = {
    "cut": (lambda r: cut(r / "release/mp_rank_01/model_optim_rng.pt"), "not a file of weights"),
    "missing": (lambda r: (r / "release/mp_rank_01/model_optim_rng.pt").unlink(), "missing"),
    "exploit": (rank_file(lambda c: c.update(args=Exploit())), "not a file of weights"),
    "no tensor": (rank_file(lambda c: c["model"].update({NORM: [1]})), "is no tensor"),
    "NaN": (rank_file(lambda c: c["model"][NORM].fill_(float("nan"))), NORM),
    "missing tensor": (rank_file(lambda c: c["model"].pop(NORM)), f"{NORM} is missing"),
    "another tensor": (rank_file(lambda c: c["model"].update({NORM + "x": torch.ones(1)})), f"{NORM}x is"),
    "pipe": (lambda r: pipe(r / "release/mp_rank_01/model_optim_rng.pt"), "missing; the other ranks"),
    "misshapen": (rank_file(lambda c: c["model"].update({NORM: torch.ones(47)})), f"{NORM} has other shapes"),
    "args": (rank_file(lambda c: setattr(c["args"], "kv_channels", 3)), "was trained with kv_channels 3"),
    "config": (config("text_config", "intermediate_size", 72, "release/hf"), "config.json implies"),
}
CASES = [
    (form, name)
    for form, damages in (("hf", HF), ("bin", BIN), ("native", NATIVE), ("classic", CLASSIC))
    for name in damages
]


@pytest.mark.parametrize("form, name", CASES)
def test_damage_is_one_line(damaged: Path, monkeypatch, capsys, form: str, name: str) -> None:
    damage, message = {"hf": HF, "bin": BIN, "native": NATIVE, "classic": CLASSIC}[form][name]
    damage(damaged / form)
    refused(monkeypatch, capsys, damaged / form, name, message)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change what the shard with :data:`KEY` holds, and the index with it."""

    def damage(folder: Path) -> None:
        name = INDEX if (folder / INDEX).exists() else "pytorch_model.bin.index.json"
        content = json.loads((folder / name).read_text())
        file = content["weight_map"][KEY]
        safe = file.endswith(".safetensors")
        held = load_file(folder / file) if safe else torch.load(folder / file, weights_only=True)
        change(held)
        save_file(held, folder / file, {"format": "pt"}) if safe else torch.save(held, folder / file)
        others = {key: where for key, where in content["weight_map"].items() if where != file}
        content["weight_map"] = {**others, **dict.fromkeys(held, file)}
        (folder / name).write_text(json.dumps(content))

    return damage


# What convert says, and verify.
TENSORS: dict[str, tuple[Damage, str, str]] = {
    "NaN": (weights(lambda t: t[KEY][3].fill_(float("nan"))), "holds NaN or infinite", "has other values"),
    "infinite": (weights(lambda t: t[KEY][3].fill_(float("-inf"))), "holds NaN or", "has other values"),
    "missing": (weights(lambda t: t.pop(KEY)), "is missing", "is in "),
    "extra": (weights(lambda t: t.update({KEY + "x": t[KEY].clone()})), "x is no part", "x is in "),
    "misshapen": (weights(lambda t: t.update({KEY: t[KEY][1:].clone()})), "has shape [23, 48]", "[23, 48]"),
    "integers": (weights(lambda t: t.update({KEY: t[KEY].long()})), "is int64, not", "int64"),
}


@pytest.mark.parametrize("form", ["hf", "bin"])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_wrong_is_named(damaged: Path, monkeypatch, capsys, form: str, name: str) -> None:
    damage, converting, verifying = TENSORS[name]
    damage(damaged / form)
    source, there = damaged / form, damaged / "there"
    flags = ["--hf-dir", source, "--megatron-dir", there]
    for call, code, said in (
        (["convert_hf_to_megatron", *flags], 2, ("error: ", converting)),
        (["convert_hf_to_megatron", *flags, "--format", "classic", "--verify"], 2, ("error: ", converting)),
        (["verify", source, damaged / "single"], 1, ("different: ", verifying)),
        (["verify", damaged / "native", source], 1, ("different: ", verifying)),
    ):
        capsys.readouterr()
        assert run(monkeypatch, *call) == code
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line and "B/s]" not in line]
        assert line.startswith(said[0]) and KEY in line and said[1] in line
    assert not there.exists() and not list(damaged.glob(".there*"))


def test_verify_on_a_config_that_lies(damaged: Path, monkeypatch, capsys) -> None:
    """Two folders can be compared nonetheless, and differ; a checkpoint can't be read by it."""
    config("text_config", "intermediate_size", 72)(damaged / "hf")
    assert run(monkeypatch, "verify", damaged / "hf", damaged / "single") == 1
    assert "different: config.json differs between" in capsys.readouterr().err
    assert run(monkeypatch, "verify", damaged / "hf", damaged / "single", "--weights-only") == 0
    config("text_config", "intermediate_size", 72, "release/hf")(damaged / "native")
    capsys.readouterr()
    assert run(monkeypatch, "verify", damaged / "native", damaged / "single") == 2
    assert "config.json implies" in capsys.readouterr().err


def test_undamaged_is_equal(damaged: Path, monkeypatch) -> None:
    """What is refused above is refused for its damage."""
    for form in ("hf", "bin", "native", "classic"):
        assert run(monkeypatch, "verify", damaged / form, damaged / "single") == 0
    link = damaged / "linked"  # as the cache of the hub lays out its folders
    shutil.copytree(damaged / "hf", link)
    file = shard(link)
    file.unlink()
    file.symlink_to(shard(damaged / "hf"))
    assert run(monkeypatch, "verify", link, damaged / "single") == 0


def test_nothing_is_overwritten_and_no_disk_is_filled(damaged: Path, monkeypatch, capsys) -> None:
    taken, usage = damaged / "taken", shutil.disk_usage(damaged)
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    calls = [
        ["convert_hf_to_megatron", "--hf-dir", damaged / "hf", "--megatron-dir"],
        ["convert_megatron_to_hf", "--megatron-dir", damaged / "native", "--hf-dir"],
        ["reshard", "--megatron-dir", damaged / "native", "--save-dir"],
    ]
    for call in calls:
        assert run(monkeypatch, *call, taken) == 2
        assert "is there already; give another path, or --force" in capsys.readouterr().err
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
            assert run(monkeypatch, *call, damaged / "there") == 2
        assert "but its file system has 1.0 MiB left" in capsys.readouterr().err
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"] and not (damaged / "there").exists()


def test_force_replaces_conversions_only(damaged: Path, monkeypatch, capsys) -> None:
    """Not a file, nor a folder of something else, though it is called as one of ours or has a config.json."""
    mine = damaged / "mine"
    (mine / "release").mkdir(parents=True)
    (mine / "release" / "notes.txt").write_text("x")
    (mine / "config.json").write_text("{}")
    shutil.copytree(mine, damaged / "root")
    (damaged / "root" / "latest_checkpointed_iteration.txt").write_text("release")
    (damaged / "file").write_text("x")
    calls = [
        ["convert_hf_to_megatron", "--hf-dir", damaged / "hf", "--megatron-dir"],
        ["reshard", "--megatron-dir", damaged / "native", "--save-dir"],
        ["convert_megatron_to_hf", "--megatron-dir", damaged / "native", "--hf-dir"],
        ["convert_megatron_to_hf", "--megatron-dir", damaged / "native", "--adapter-only", "--hf-dir"],
        ["projector", "export", "--checkpoint", damaged / "hf", "--save-dir"],
        ["projector", "import", "--projector", damaged / "p", "--checkpoint", damaged / "hf", "--save-dir"],
    ]
    assert run(monkeypatch, *calls[4], damaged / "p") == 0
    before = sorted(damaged.rglob("*"))
    for call in calls:
        for place in ("mine", "root", "file"):
            capsys.readouterr()
            assert run(monkeypatch, *call, damaged / place, "--force") == 2, (call, place)
            said = "has no adapters" if "--adapter-only" in call else "--force doesn't replace it"
            assert said in capsys.readouterr().err
    assert sorted(damaged.rglob("*")) == before
    for call, place in ((calls[0], "native"), (calls[2], "single"), (calls[4], "p")):
        assert run(monkeypatch, *call, damaged / place, "--force") == 0
    assert run(monkeypatch, "verify", damaged / "native", damaged / "single") == 0


def test_what_is_read_is_not_replaced(damaged: Path, monkeypatch, capsys) -> None:
    """Nor what lies under a checkpoint of trained weights only, nor Megatron-LM's --hf-config."""
    trained = damaged / "trained"
    shutil.copytree(damaged / "native" / "release", trained)
    manifest(trained / "manifest.json", base={"path": str(damaged / "native" / "release")})
    foreign = damaged / "classic" / "release"
    (foreign / "manifest.json").unlink()
    for flags in (
        ["reshard", "--megatron-dir", trained, "--save-dir", damaged / "native"],
        ["convert_megatron_to_hf", "--megatron-dir", trained, "--hf-dir", damaged / "native"],
        *(
            [
                "convert_megatron_to_hf",
                "--megatron-dir",
                foreign,
                "--hf-config",
                damaged / "hf",
                "--hf-dir",
                there,
            ]
            for there in (damaged / "hf", damaged / "hf" / "there")
        ),
    ):
        assert run(monkeypatch, *flags, "--force") == 2
        assert "lie in each other; give another output" in capsys.readouterr().err
    for form in ("hf", "native"):
        assert run(monkeypatch, "verify", damaged / form, damaged / "single") == 0
