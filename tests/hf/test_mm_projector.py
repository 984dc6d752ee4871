"""mm_projector.bin: what LLaVA writes and reads, against torch's own Sequential."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from megatron_vlm.hf.build.join import build_llava
from megatron_vlm.hf.convert import export_hf, import_hf, reshard
from megatron_vlm.hf.formats.classic import ClassicLayout
from megatron_vlm.hf.mm_projector import export_projector, import_projector, read_projector
from megatron_vlm.hf.verify import check_manifest, verify
from tests.hf.build.test_join import make_text, make_tower
from tests.hf.test_scripts import run
from tests.tiny import save_tiny_llava

INNER, OUTER = 32, 48  # of tests/tiny.py


def build_vision_projector(projector_type: str, inner: int = INNER, outer: int = OUTER) -> nn.Module:
    """Written after LLaVA's ``multimodal_projector/builder.py``."""
    if projector_type == "linear":
        return nn.Linear(inner, outer)
    match = re.match(r"^mlp(\d+)x_gelu$", projector_type)
    assert match
    modules: list[nn.Module] = [nn.Linear(inner, outer)]
    for _ in range(1, int(match[1])):
        modules += [nn.GELU(), nn.Linear(outer, outer)]
    return nn.Sequential(*modules)


def llava_file(path: Path, projector: nn.Module, prefix: str = "model.mm_projector.", **more: Tensor) -> Path:
    """As ``safe_save_model_for_hf_trainer`` writes it."""
    state = {prefix + name: tensor.clone() for name, tensor in projector.state_dict().items()}
    torch.save({**state, **more}, path)
    return path


def projected(checkpoint: Path, features: Tensor) -> Tensor:
    with torch.no_grad():
        return LlavaForConditionalGeneration.from_pretrained(checkpoint).model.multi_modal_projector(features)


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    save_tiny_llava(tmp_path / "llava", "clip-llama")
    return tmp_path / "llava"


def forms(llava: Path, folder: Path, name: str) -> Path:
    """The model in one of the formats that a projector can come from."""
    if name == "native":
        import_hf(llava, folder / name, 2, 1)
    elif name == "classic":
        import_hf(llava, folder / name, 2, 2, classic=ClassicLayout(2, 2, 1, (1, 3)))
    elif name == "hf":
        return llava
    elif name == "bin":
        (folder / name).mkdir()
        (folder / name / "config.json").write_text((llava / "config.json").read_text())
        torch.save(load_file(llava / "model.safetensors"), folder / name / "pytorch_model.bin")
    return folder / name


def test_a_model_that_cuts_images(tmp_path: Path) -> None:
    """A file without image_newline leaves the model's; LLaVA writes widths first."""
    model = save_tiny_llava(tmp_path / "llava", "next-clip-llama")
    import_hf(tmp_path / "llava", tmp_path / "native", 1, 1)
    projector = build_vision_projector("mlp2x_gelu")
    file = llava_file(tmp_path / "mm_projector.bin", projector)
    import_projector(file, tmp_path / "native", tmp_path / "new")
    back = load_file(export_hf(tmp_path / "new", tmp_path / "back") / "model.safetensors")
    assert torch.equal(back["image_newline"], model.model.image_newline)
    assert torch.equal(back["multi_modal_projector.linear_2.bias"], projector.state_dict()["2.bias"])
    out = load_file(export_projector(tmp_path / "new", tmp_path / "out"))
    assert torch.equal(out["model.image_newline"], model.model.image_newline)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_grid_pinpoints"][0] == [40, 20] and config["image_aspect_ratio"] == "anyres"


@pytest.mark.parametrize("form", ["hf", "native"])
def test_image_newline_is_of_the_file(tmp_path: Path, llava: Path, form: str) -> None:
    save_tiny_llava(tmp_path / "next", "next-clip-llama")
    newline = torch.randn(OUTER)
    more = {"model.image_newline": newline}
    file = llava_file(tmp_path / "mm_projector.bin", build_vision_projector("mlp2x_gelu"), **more)
    import_projector(file, forms(tmp_path / "next", tmp_path, form), tmp_path / "new", verify=True)
    back = tmp_path / "new" if form == "hf" else export_hf(tmp_path / "new", tmp_path / "back")
    net = LlavaNextForConditionalGeneration.from_pretrained(back)
    assert torch.equal(net.model.image_newline, newline)
    again = torch.load(export_projector(tmp_path / "new", tmp_path / "out", as_bin=True), weights_only=True)
    expected = torch.load(file, weights_only=True)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    # A model that doesn't cut images has no place for it.
    assert import_projector(file, llava, tmp_path / "plain").others == ("image_newline",)
    torch.save({**expected, "model.image_newline": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"image_newline has shape \[3\], the model's \[48\]"):
        import_projector(file, tmp_path / "next", tmp_path / "x")


@pytest.mark.parametrize("form", ["hf", "bin", "native", "classic"])
def test_import_and_export(tmp_path: Path, llava: Path, form: str) -> None:
    """The function is LLaVA's, every other tensor stays, and what comes out is what went in, bit for bit."""
    torch.manual_seed(3)
    projector = build_vision_projector("mlp2x_gelu")
    file = llava_file(tmp_path / "mm_projector.bin", projector)
    done = import_projector(file, forms(llava, tmp_path, form), tmp_path / "new", verify=True)
    assert (done.kind, done.others) == ("mlp2x_gelu", ())
    check_manifest(tmp_path / "new")
    back = tmp_path / "new"
    if form not in ("hf", "bin"):
        back = export_hf(tmp_path / "new", tmp_path / "back")

    features = torch.randn(7, INNER)
    with torch.no_grad():
        assert torch.equal(projected(back, features), projector(features))
    before, after = (LlavaForConditionalGeneration.from_pretrained(p).state_dict() for p in (llava, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) == ("projector" not in n) for n in before)

    for as_bin in (False, True):
        out = export_projector(tmp_path / "new", tmp_path / f"out{as_bin}", as_bin)
        again = torch.load(out, weights_only=True) if as_bin else load_file(out)
        expected = torch.load(file, weights_only=True)
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_trained_checkpoint_in_another_dtype_keeps_it(tmp_path: Path, llava: Path) -> None:
    """In float32 under a model that was imported in bfloat16, the projector is as exact as its file."""
    import_hf(llava, tmp_path / "native", 1, 1, dtype=torch.bfloat16)
    projector = build_vision_projector("mlp2x_gelu")
    import_projector(
        llava_file(tmp_path / "mm_projector.bin", projector), tmp_path / "native", tmp_path / "new"
    )
    out = load_file(export_projector(tmp_path / "new", tmp_path / "out"))
    assert torch.equal(out["model.mm_projector.2.bias"], projector.state_dict()["2.bias"].bfloat16())


@pytest.mark.parametrize(
    "prefix",
    [
        "mm_projector.",
        "base_model.model.model.mm_projector.",
        "module.base_model.model.model.mm_projector.",
    ],
)
@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear", "mlp1x_gelu", "mlp4x_gelu"])
def test_names_that_trainers_write(tmp_path: Path, prefix: str, kind: str) -> None:
    projector = build_vision_projector(kind)
    extra = {"base_model.model.lm_head.weight": torch.ones(2)}
    found = read_projector(llava_file(tmp_path / "non_lora_trainables.bin", projector, prefix, **extra))
    assert found.kind == kind and found.others == tuple(extra)
    renamed = {
        "mlp2x_gelu": {"0": "linear_1", "2": "linear_2"},
        "mlp1x_gelu": {"0": "linear_1"},
        "mlp4x_gelu": {"0": "0", "2": "2", "4": "4", "6": "6"},
        "linear": {"": "linear_1"},
    }[kind]
    for name, tensor in projector.state_dict().items():
        layer, _, part = name.rpartition(".")
        assert torch.equal(found.tensors[f"{renamed[layer]}.{part}"], tensor)


def test_linear(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path / "llava", "clip-llama-linear")
    projector = build_vision_projector("linear", inner=2 * INNER)  # the features of two layers
    import_projector(
        llava_file(tmp_path / "mm_projector.bin", projector), tmp_path / "llava", tmp_path / "new"
    )
    features = torch.randn(5, 2 * INNER)
    with torch.no_grad():
        assert torch.equal(projected(tmp_path / "new", features), projector(features))
    out = load_file(export_projector(tmp_path / "new", tmp_path / "out"))
    assert {name.removeprefix("model.mm_projector."): t.shape for name, t in out.items()} == {
        name: t.shape for name, t in projector.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear", "mlp1x_gelu"])
def test_build_with_a_projector(tmp_path: Path, kind: str) -> None:
    """A file written before torch 1.6 too, which can't be mapped."""
    text, tower = make_text(tmp_path / "text"), make_tower(tmp_path / "tower")
    projector = build_vision_projector(kind, 24, 32)
    file = tmp_path / "mm_projector.bin"
    torch.save(
        {f"model.mm_projector.{n}": t for n, t in projector.state_dict().items()},
        file,
        _use_new_zipfile_serialization=False,
    )
    built = build_llava(tmp_path / "llava", str(text), str(tower), projector=tmp_path)
    features = torch.randn(5, 24)
    with torch.no_grad():
        # The identity behind a linear one multiplies by one and adds zeros: exact.
        assert torch.equal(projected(built, features), projector(features))
    other = "linear" if kind == "mlp2x_gelu" else "mlp2x_gelu"
    with pytest.raises(ValueError, match=f"--projector .*: of type {kind}, not {other}"):
        build_llava(tmp_path / "other", str(text), str(tower), other, projector=file)


def test_a_projector_that_transformers_cant_hold(tmp_path: Path) -> None:
    """It is built, converted and written as LLaVA's file again; an export of it is refused by name."""
    text, tower = make_text(tmp_path / "text"), make_tower(tmp_path / "tower")
    file = llava_file(tmp_path / "mm_projector.bin", build_vision_projector("mlp3x_gelu", 24, 32))
    build_llava(tmp_path / "llava", str(text), str(tower), projector=file)
    import_hf(tmp_path / "llava", tmp_path / "native", 2, 1, verify=True)
    again = torch.load(
        export_projector(tmp_path / "native", tmp_path / "out", as_bin=True), weights_only=True
    )
    expected = torch.load(file, weights_only=True)
    assert again.keys() == expected.keys() and all(torch.equal(again[n], expected[n]) for n in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_projector_type"] == "mlp3x_gelu"
    other = llava_file(tmp_path / "other.bin", build_vision_projector("mlp3x_gelu", 24, 32))
    import_projector(other, tmp_path / "native", tmp_path / "new", verify=True)
    for refused in (
        lambda: export_hf(tmp_path / "native", tmp_path / "hf"),
        lambda: import_hf(tmp_path / "llava", tmp_path / "random", 1, 1, random_seed=1),
    ):
        with pytest.raises(ValueError, match=r"mlp3x_gelu, which can't be exported .*: it has 3 linear"):
            refused()

    with pytest.raises(ValueError, match="--format classic: the projector is mlp3x_gelu: it has 3"):
        import_hf(tmp_path / "llava", tmp_path / "classic", 1, 1, classic=ClassicLayout(1, 1, 1, (2,)))
    with pytest.raises(ValueError, match="--format classic: the projector is mlp3x_gelu"):
        reshard(tmp_path / "native", tmp_path / "classic", 1, 1, classic=ClassicLayout(1, 1, 1, (2,)))


def test_identity(tmp_path: Path) -> None:
    """transformers' LLaVA holds it as two identities; LLaVA's file would be empty."""
    text, tower = make_text(tmp_path / "text"), make_tower(tmp_path / "tower")
    with pytest.raises(ValueError, match=r"'identity' needs 32 features, .* not 24"):
        build_llava(tmp_path / "llava", str(text), str(tower), "identity")
    tower = make_tower(tmp_path / "wide", hidden_size=32)
    built = build_llava(tmp_path / "llava", str(text), str(tower), "identity")
    features = torch.randn(5, 32)
    assert torch.equal(projected(built, features), features)
    import_hf(built, tmp_path / "native", 1, 1, verify=True)
    assert torch.equal(projected(export_hf(tmp_path / "native", tmp_path / "back"), features), features)
    for checkpoint in (built, tmp_path / "native"):
        with pytest.raises(ValueError, match="identity, which LLaVA's mm_projector files don't hold"):
            export_projector(checkpoint, tmp_path / "out")


def test_the_config_beside_it(tmp_path: Path, llava: Path) -> None:
    out = export_projector(llava, tmp_path / "out")
    assert out == tmp_path / "out" / "mm_projector.safetensors"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    expected = dict(
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=INNER,
        hidden_size=OUTER,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
    )
    assert {key: config[key] for key in expected} == expected
    with pytest.raises(ValueError, match="there already"):
        export_projector(llava, tmp_path / "out")
    export_projector(llava, tmp_path / "out", as_bin=True, force=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "mm_projector.bin"]
    with pytest.raises(ValueError, match=r"llava is no projector's folder; --force doesn't replace it"):
        export_projector(shutil.copytree(llava, tmp_path / "copy"), llava, force=True)


def test_errors(tmp_path: Path, llava: Path) -> None:
    def refused(message: str, state: Any, name: str = "mm_projector.bin") -> None:
        file = tmp_path / name
        if state is not None:
            save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
        with pytest.raises(ValueError, match=message) as error:
            import_projector(file, llava, tmp_path / "new")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()

    good = {
        f"model.mm_projector.{n}": t for n, t in build_vision_projector("mlp2x_gelu").state_dict().items()
    }
    refused("no such file", None, "nowhere.bin")
    (tmp_path / "text.bin").write_text("no weights")
    refused("text.bin: not a file of weights", None, "text.bin")
    (tmp_path / "text.safetensors").write_text("no weights")
    refused("text.safetensors: not a whole safetensors file", None, "text.safetensors")
    refused("holds something else than named tensors", {"a": 1})
    refused("not a file of weights", {"a": Path("/")})  # a class that weights_only doesn't admit
    refused(r"holds no mm_projector; its first tensor is lm_head\.weight", {"lm_head.weight": torch.ones(2)})
    refused("holds no mm_projector; its first tensor is not there", {})
    refused("are the same tensor of a projector", {**good, "mm_projector.0.bias": torch.zeros(OUTER)})
    refused(
        "a projector with the layers 1; supported: linear, mlpNx_gelu",
        {"mm_projector.1.weight": torch.ones(2, 2)},
    )
    refused(r"a projector with 0\.query; supported", {**good, "mm_projector.0.query": torch.ones(2)})
    refused(
        "a projector of type linear, the model's is mlp2x_gelu; build",
        {"mm_projector.weight": torch.ones(2, 2)},
    )
    first = "model.mm_projector.0.weight"
    refused(
        r"mm_projector\.0\.weight has shape \[2, 3\], the model's \[48, 32\]",
        {**good, first: torch.ones(2, 3)},
    )
    refused(
        r"the file lacks the mm_projector\.2\.bias",
        {n: t for n, t in good.items() if not n.endswith("2.bias")},
    )
    refused("holds NaN", {**good, first: torch.full((OUTER, INNER), float("nan"))})
    refused("int64, not floating point", {**good, first: torch.ones(OUTER, INNER, dtype=torch.int64)})
    save_tiny_llava(tmp_path / "vip", "vip-clip-llama")
    with pytest.raises(
        ValueError, match="projector_layernorm_eps is 1e-05; LLaVA's mm_projector has no norm"
    ):
        export_projector(tmp_path / "vip", tmp_path / "none")
    save_tiny_llava(tmp_path / "bent", "siglip-qwen2")
    with pytest.raises(ValueError, match="projector_hidden_act is 'linear'; LLaVA's mm_projector has 'gelu'"):
        export_projector(tmp_path / "bent", tmp_path / "new")


def test_the_script(tmp_path: Path, llava: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    projector = build_vision_projector("mlp2x_gelu")
    llava_file(tmp_path / "mm_projector.bin", projector, more=torch.ones(2))
    flags = ["--checkpoint", "llava", "--save-dir"]
    assert run(monkeypatch, "projector", "import", *flags, "new", "--projector", "mm_projector.bin") == 0
    shown = capsys.readouterr()
    assert "1 other tensors are left out, such as more" in shown.out and "B/s" in shown.err
    assert run(monkeypatch, "projector", "export", "--checkpoint", "new", "--save-dir", "out", "--bin") == 0
    assert capsys.readouterr().out == "out/mm_projector.bin\n"
    again = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert torch.equal(again["model.mm_projector.2.weight"], projector.state_dict()["2.weight"])
    for wrong in (
        ["import", *flags, "x"],
        ["import", *flags, "x", "--projector", "mm_projector.bin", "--bin"],
        ["export", *flags, "x", "--projector", "mm_projector.bin"],
        ["export", "--checkpoint", "nowhere", "--save-dir", "x"],
        ["merge", *flags, "x"],
    ):
        assert run(monkeypatch, "projector", *wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert verify(tmp_path / "llava", llava)
