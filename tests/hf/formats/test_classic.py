"""Megatron-LM's classic format: upstream's own model loads it, and conversions from and to it are exact."""

import argparse
import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata
from transformers import LlavaForConditionalGeneration

from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.hf.convert import export_hf, import_hf, reshard
from megatron_vlm.hf.formats.classic import BESIDE, LOCAL, TE, ClassicLayout
from megatron_vlm.hf.formats.native import NativeReader, open_weights
from megatron_vlm.hf.verify import check_manifest, verify
from megatron_vlm.launch.preflight.storage import shard_problems
from tests.distributed import Pool
from tests.hf.test_convert import make
from tests.hf.test_scripts import run
from tests.hf.upstream import load_classic_and_save, save_as_megatron_lm
from tests.tiny import build, save_tiny_llava, tiny_config

FILE = "mp_rank_00/model_optim_rng.pt"
RECORDED = Path(__file__).parents[2] / "te/keys.json"  # by tests/te/record.py


def even(tp: int = 1, pp: int = 1, vpp: int = 1, spec: str = TE, num_layers: int = 4) -> ClassicLayout:
    return ClassicLayout(tp, pp, vpp, (num_layers // (pp * vpp),) * (pp * vpp), spec)


def to_classic(source: Path, root: Path, layout: ClassicLayout) -> Path:
    return import_hf(source, root, layout.tp, layout.pp, verify=True, classic=layout)


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return make(tmp_path / "llava", "clip-llama")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Eight heads everywhere, so that it can be cut for TP 8; four layers; bfloat16; 203 words."""
    import transformers

    config = tiny_config(
        text="qwen2",
        text_extra=dict(
            hidden_size=64, intermediate_size=80, num_attention_heads=16, num_key_value_heads=8, head_dim=4
        ),
    )
    config.vision_config.num_attention_heads = 8
    config.vision_config.intermediate_size = 56
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("wide") / "hf"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tp, pp, spec", [(8, 4, TE), (4, 2, LOCAL)])
def test_experts(tmp_path: Path, tp: int, pp: int, spec: str) -> None:
    """HF -> classic -> HF, HF -> native -> HF, and from either to the other."""
    sizes = dict(num_attention_heads=16, num_key_value_heads=8, head_dim=4, intermediate_size=72)
    config = tiny_config(text="mixtral", text_extra=dict(sizes, hidden_size=64))
    config.vision_config.num_attention_heads = 8
    config.vision_config.intermediate_size = 56
    torch.manual_seed(0)
    build(config).bfloat16().save_pretrained(tmp_path / "hf")
    classic = to_classic(tmp_path / "hf", tmp_path / "classic", even(tp, pp, spec=spec))
    native = import_hf(tmp_path / "hf", tmp_path / "native", tp, pp, verify=True)
    assert verify(tmp_path / "hf", export_hf(classic, tmp_path / "from-classic"))
    assert verify(tmp_path / "hf", export_hf(native, tmp_path / "from-native"))
    assert verify(classic, native)
    assert verify(native, reshard(classic, tmp_path / "again", 2, 1))


def test_experts_as_grouped_products_name_them(tmp_path: Path) -> None:
    """``TEGroupedMLP`` of Megatron-LM counts its weights instead of its experts."""
    source = make(tmp_path / "hf", "clip-mixtral")
    folder = to_classic(source, tmp_path / "classic", even(2, 1))

    def rename(content: dict[str, Any]) -> None:
        pattern = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)")
        model = {pattern.sub(r"experts.\2\1", name): tensor for name, tensor in content["model"].items()}
        assert "language_model.decoder.layers.3.mlp.experts.linear_fc2.weight4" in model
        content["model"] = model

    for rank in range(2):
        change(folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", rename)
    assert verify(source, folder)


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_layout(wide: Path, tmp_path: Path, tp: int, pp: int) -> None:
    """HF -> classic -> HF, HF -> native -> HF, and from each of the two to the other."""
    classic = to_classic(wide, tmp_path / "classic", even(tp, pp))
    assert len(list(classic.glob("mp_rank_*"))) == tp * pp
    native = import_hf(wide, tmp_path / "native", tp, pp)
    assert verify(wide, export_hf(classic, tmp_path / "from-classic"))
    assert verify(wide, export_hf(native, tmp_path / "from-native"))
    again = reshard(native, tmp_path / "classic-2", tp, pp, classic=even(tp, pp), verify=True)
    for file in classic.glob("mp_rank_*/*.pt"):
        assert file.read_bytes() == (again / file.relative_to(classic)).read_bytes()
    assert verify(native, reshard(classic, tmp_path / "native-2", tp, pp))


def test_resharding(wide: Path, tmp_path: Path) -> None:
    """From one layout to another directly is what conversion for the other gives, padding and all."""
    direct = to_classic(wide, tmp_path / "direct", even(4, 2))
    first = to_classic(wide, tmp_path / "first", ClassicLayout(1, 2, 1, (1, 3), LOCAL))
    second = reshard(first, tmp_path / "second", 4, 2, classic=even(4, 2))
    for file in direct.glob("mp_rank_*/*.pt"):
        assert file.read_bytes() == (second / file.relative_to(direct)).read_bytes()
    manifest = read_manifest(second)
    assert check_manifest(second) == len(manifest["tensors"]) + len(manifest["carried"])


@pytest.mark.parametrize("to_format", ["native", "classic"])
def test_resharding_to_another_dtype(llava: Path, tmp_path: Path, to_format: str) -> None:
    """As conversion from Hugging Face to that dtype: weights, those that aren't trained, and config."""
    layout = even(2, 1) if to_format == "classic" else None
    import_hf(llava, tmp_path / "a", 1, 1)
    expected = import_hf(llava, tmp_path / "b", 2, 1, dtype=torch.bfloat16, classic=layout)
    found = reshard(tmp_path / "a", tmp_path / "c", 2, 1, dtype=torch.bfloat16, classic=layout, verify=True)
    assert verify(expected, found)
    assert read_manifest(found) == read_manifest(expected)
    for name in ("carried.safetensors", "weights.json", "config.json"):
        assert (found / "hf" / name).read_bytes() == (expected / "hf" / name).read_bytes()


UPSTREAM = [
    ("clip-llama", dict(tp=2, pp=2, vpp=1)),
    ("siglip-qwen2", dict(tp=2, pp=2, vpp=2)),
    ("clip-qwen3-tied", dict(tp=1, pp=2, vpp=1, first=3)),
    ("clip-qwen2-tied", dict(tp=4, pp=1, vpp=1)),
    ("clip-mixtral", dict(tp=2, pp=2, vpp=1)),
    ("next-clip-llama", dict(tp=2, pp=2, vpp=1)),
    ("onevision-siglip-qwen2", dict(tp=1, pp=2, vpp=2)),
]


@pytest.mark.parametrize("family, cut", UPSTREAM)
def test_upstreams_model_loads_it(tmp_path: Path, pool: Pool, family: str, cut: dict[str, Any]) -> None:
    """Strictly, on each rank; and what megatron-core then saves holds each tensor in its place."""
    source = tmp_path / "hf"
    save_tiny_llava(source, family)
    layout = even(cut["tp"], cut["pp"], cut["vpp"], LOCAL)
    if "first" in cut:
        layout = ClassicLayout(1, 2, 1, (cut["first"], 4 - cut["first"]), LOCAL)
    classic = to_classic(source, tmp_path / "classic", layout)
    native = NativeReader(import_hf(source, tmp_path / "native", layout.tp, layout.pp))
    words = native.shape("language_model.embedding.word_embeddings.weight")[0]
    saved = tmp_path / "saved"
    saved.mkdir()
    for kept in pool.run(layout.tp * layout.pp, load_classic_and_save, classic, source, saved, cut, words):
        assert not kept
    upstream = NativeReader(saved)
    found = set()
    for name in upstream.names:
        whole = upstream.read(name)
        name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        fused, own = ".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."
        if "mixtral" in family and name.startswith("language_model."):  # saved so, though nothing is fused
            fused, own = own, fused
        name = name.replace(own, fused)
        if name.startswith("vision_model.ln_post."):
            continue  # SigLIP's, which LLaVA doesn't run
        if ".decoder.layers." not in name:  # layers are stacked there
            expected = {name: whole}
        else:
            expected = {name.replace(".layers.", f".layers.{i}."): layer for i, layer in enumerate(whole)}
        if ".mlp.experts.experts." in name:  # and so are experts
            expected = {
                key.replace("experts.experts.", f"experts.local_experts.{i}."): expert
                for key, layer in expected.items()
                for i, expert in enumerate(layer)
            }
        for own, tensor in expected.items():
            assert torch.equal(native.read(own), tensor), own
            found.add(own)
    # Upstream has no place for these.
    beside = {n for n in native.names if n.startswith("vision_projection.") and ".encoder." not in n}
    assert found == set(native.names) - beside
    for file in classic.glob("mp_rank_*/*.pt"):
        stands = torch.load(file, weights_only=False).get(BESIDE, {})
        assert all(torch.equal(native.read(name), tensor) for name, tensor in stands.items())
        assert set(stands) == (set() if file.parent.name.endswith(("_001", "_002")) else beside)
    assert verify(source, export_hf(classic, tmp_path / "back"))
    assert verify(native.path, reshard(classic, tmp_path / "native-2", layout.tp, layout.pp))


# Families; rows of the embedding, which need not be padded as here; and layouts, one with unequal stages.
TRAINED = [
    ("clip-llama", 256, dict(tp=2, pp=2, vpp=1)),
    ("clip-qwen3-tied", 203, dict(tp=1, pp=2, vpp=1, first=3)),
    ("siglip-qwen2", 320, dict(tp=2, pp=2, vpp=2)),
]


@pytest.mark.parametrize("family, words, cut", TRAINED)
def test_what_megatron_lm_trained(
    tmp_path: Path, pool: Pool, monkeypatch, capsys, family: str, words: int, cut: dict[str, Any]
) -> None:
    """Its own files, saved from upstream's model with all that its trainer writes beside the weights."""
    source, root = make(tmp_path / "hf", family), tmp_path / "trained"
    folder = root / "iter_0000007"
    folder.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    pool.run(cut["tp"] * cut["pp"], save_as_megatron_lm, folder, source, cut, words)
    like = ["--hf-config", source]

    assert (
        run(monkeypatch, "convert_megatron_to_hf", "--megatron-dir", root, "--hf-dir", tmp_path / "a", *like)
        == 0
    )
    reshard_to = ["--save-dir", tmp_path / "b", "--tp", 2, "--verify"]
    assert run(monkeypatch, "reshard", "--megatron-dir", folder, *reshard_to, *like) == 0
    assert run(monkeypatch, "verify", root, tmp_path / "a", *like) == 0
    assert run(monkeypatch, "verify", tmp_path / "b", folder, *like) == 0
    assert verify(export_hf(tmp_path / "b", tmp_path / "c"), tmp_path / "a")
    assert check_manifest(tmp_path / "b")
    # transformers reads what upstream computed with: all that is trained is new, the rest as it was.
    net, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    files = sorted(folder.glob("mp_rank_00*/*.pt"))
    states = [torch.load(file, weights_only=False) for file in files]
    first, last = states[0], states[-1]
    chunk = "model" if cut["vpp"] == 1 else "model0"
    projector = first[chunk]["vision_projection.encoder.linear_fc2.bias"]
    assert torch.equal(net.model.multi_modal_projector.linear_2.bias, projector)
    norm = last["model" if cut["vpp"] == 1 else "model1"][NORM]
    assert torch.equal(net.model.language_model.norm.weight, norm)
    before = load_file(source / "model.safetensors")
    carried = [name for name in before if "encoder.layers.2." in name and "tied" not in family]
    after = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in carried)

    capsys.readouterr()
    for flags in (["convert_megatron_to_hf", "--hf-dir"], ["reshard", "--save-dir"]):
        assert run(monkeypatch, flags[0], "--megatron-dir", root, flags[1], tmp_path / "x") == 2
        assert "written by Megatron-LM itself" in capsys.readouterr().err
    assert run(monkeypatch, "verify", folder, source) == 2
    assert "written by Megatron-LM itself" in capsys.readouterr().err


def test_megatron_lms_checkpoint_of_another_model(llava: Path, tmp_path: Path, pool: Pool) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    pool.run(1, save_as_megatron_lm, folder, llava, dict(tp=1, pp=1, vpp=1), 256)
    config = json.loads((llava / "config.json").read_text())

    def convert(**changes: object) -> None:
        text = {**config["text_config"], **changes}
        (llava / "config.json").write_text(json.dumps({**config, "text_config": text}))
        export_hf(folder, tmp_path / "back", hf_config=llava)

    with pytest.raises(ValueError, match=r"was trained with num_attention_heads 4; config.json implies 8"):
        convert(num_attention_heads=8, num_key_value_heads=4, head_dim=6)
    with pytest.raises(ValueError, match=r"fc1.weight has shape \[136, 48\]; .*config.json implies \[144"):
        convert(intermediate_size=72)
    with pytest.raises(ValueError, match=r"word_embeddings.weight has 256 rows; the vocabulary has 300"):
        convert(vocab_size=300)
    with pytest.raises(ValueError, match="no mp_rank_"):
        export_hf(llava, tmp_path / "back", hf_config=llava)
    (llava / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        convert()
    assert not (tmp_path / "back").exists()


def test_megatron_lms_checkpoint_of_a_model_with_tiles(tmp_path: Path, pool: Pool) -> None:
    """It has no image_newline, and was trained without one."""
    source, folder = make(tmp_path / "hf", "next-clip-llama"), tmp_path / "trained"
    folder.mkdir()
    pool.run(1, save_as_megatron_lm, folder, source, dict(tp=1, pp=1, vpp=1), 256)
    with pytest.raises(ValueError, match=r"image_newline is missing; Megatron-LM's LLaVAModel has none, so"):
        export_hf(folder, tmp_path / "back", hf_config=source)
    assert not (tmp_path / "back").exists()


def test_a_projector_that_upstream_lacks(tmp_path: Path) -> None:
    """ViP-LLaVA's norm and its width, of several layers' features: kept, for the way back."""
    source = make(tmp_path / "hf", "vip-clip-llama")
    classic = to_classic(source, tmp_path / "classic", even(2, 2))
    assert verify(source, export_hf(classic, tmp_path / "back"))
    assert verify(classic, reshard(classic, tmp_path / "native", 1, 2))


def test_training_says_how_to_reshard(llava: Path, tmp_path: Path) -> None:
    folder = to_classic(llava, tmp_path / "classic", even())
    with pytest.raises(ValueError, match=r"scripts/convert/reshard\.py --megatron-dir .*/release writes it"):
        open_weights(folder)
    (problem,) = shard_problems(folder)
    assert f"scripts/convert/reshard.py --megatron-dir {folder} writes it" in problem


@pytest.mark.parametrize("family", ["clip-llama", "siglip-qwen2", "clip-mixtral"])
def test_the_engines_names(tmp_path: Path, family: str) -> None:
    """The stages' files together hold what upstream's model of two layers with Transformer Engine takes."""
    save_tiny_llava(tmp_path / "hf", family)
    classic = to_classic(tmp_path / "hf", tmp_path / "classic", even(2, 2))
    recorded = json.loads(RECORDED.read_text())["families"][family]["upstream"]["tensors"]
    for tp_rank in range(2):
        files = [classic / f"mp_rank_{tp_rank:02d}_{stage:03d}/model_optim_rng.pt" for stage in range(2)]
        first, last = (torch.load(file, weights_only=False)["model"] for file in files)
        layers = {name for name in recorded if ".decoder.layers." in name and name.startswith("language")}
        assert layers == {name for name in first if name in last}
        held = {**first, **last}
        assert held.keys() == recorded.keys()
        for name, (_, shape) in recorded.items():
            if "embedding" not in name and "output_layer" not in name:  # the vocabulary's padding
                assert list(held[name].shape) == shape


def test_both_specs_names(llava: Path, tmp_path: Path) -> None:
    for spec, norm in (
        (TE, "self_attention.linear_qkv.layer_norm_weight"),
        (LOCAL, "input_layernorm.weight"),
    ):
        folder = to_classic(llava, tmp_path / spec, even(spec=spec))
        model = torch.load(folder / FILE, weights_only=False)["model"]
        assert f"language_model.decoder.layers.3.{norm}" in model
        assert f"vision_model.decoder.layers.1.{norm}" in model
        assert verify(llava, folder)


def test_a_tied_head_is_repeated_by_the_last_stage_only(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", "clip-qwen2-tied")
    one = to_classic(source, tmp_path / "one", even())
    assert "language_model.output_layer.weight" not in torch.load(one / FILE, weights_only=False)["model"]
    two = to_classic(source, tmp_path / "two", even(2, 2))
    files = [two / f"mp_rank_01_00{i}/model_optim_rng.pt" for i in range(2)]
    first, last = (torch.load(file, weights_only=False)["model"] for file in files)
    head = last["language_model.output_layer.weight"]
    assert torch.equal(first["language_model.embedding.word_embeddings.weight"], head)
    assert verify(source, two)
    change(files[1], lambda content: content["model"]["language_model.output_layer.weight"].add_(1))
    with pytest.raises(ValueError, match=r"output_layer\.weight differs from .*, but the config ties them"):
        export_hf(two, tmp_path / "back")


def change(file: Path, function) -> None:
    """Rewrite a rank's file."""
    content = torch.load(file, weights_only=False)
    function(content)
    torch.save(content, file)


NORM = "language_model.decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda c: c["model"].pop(NORM), rf"{NORM} is missing"),
        (lambda c: c["model"].update({NORM: torch.ones(47)}), rf"{NORM} has shape \[47\]; hf/config"),
        (lambda c: c["model"].update({"language_model.x": torch.ones(1)}), r"language_model\.x has no row"),
        (lambda c: c["model"].update({NORM: 1}), rf"{NORM} is no tensor; not a file of weights"),
        (lambda c: c["model"][NORM].fill_(float("nan")), rf"{NORM} holds NaN"),
        (lambda c: c.pop("model"), r"holds no model"),
    ],
)
def test_damaged_files(llava: Path, tmp_path: Path, function, message: str) -> None:
    folder = to_classic(llava, tmp_path / "classic", even())
    change(folder / FILE, function)
    with pytest.raises(ValueError, match=message):
        export_hf(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_files_that_do_not_fit_each_other(llava: Path, tmp_path: Path) -> None:
    folder = to_classic(llava, tmp_path / "classic", even(2, 2))
    last = folder / "mp_rank_01_001/model_optim_rng.pt"
    change(last, lambda content: content["model"][NORM].add_(1))
    with pytest.raises(ValueError, match=f"{NORM} differs between tensor-parallel ranks"):
        export_hf(folder, tmp_path / "back")
    os.truncate(last, last.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"mp_rank_01_001/model_optim_rng\.pt: not a file of weights"):
        export_hf(folder, tmp_path / "back")
    last.unlink()
    with pytest.raises(ValueError, match=r"mp_rank_01_001/model_optim_rng\.pt: missing"):
        export_hf(folder, tmp_path / "back")
    (folder / "mp_rank_00_000_000").mkdir()
    with pytest.raises(ValueError, match=r"supported: mp_rank_TT\[_PPP\]"):
        export_hf(folder, tmp_path / "back")


class Exploit:
    def __reduce__(self):
        return (os.system, ("touch exploited",))


def test_what_is_no_weight_is_not_executed(llava: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = to_classic(llava, tmp_path / "classic", even())
    genuine = copy.deepcopy(torch.load(folder / FILE, weights_only=False))

    # Megatron-LM's own files hold its enums, torch dtypes and random states in args and beside them.
    from megatron.core.transformer.enums import AttnBackend

    args = argparse.Namespace(attention_backend=AttnBackend.auto, params_dtype=torch.bfloat16)
    torch.save(
        {**genuine, "args": args, "rng_state": [{"random_rng_state": (3, (1, 2), None)}]}, folder / FILE
    )
    assert verify(llava, folder)

    for hidden in ({"args": Exploit()}, {"rng_state": [Metadata]}):
        torch.save({**genuine, **hidden}, folder / FILE)
        with pytest.raises(ValueError, match=r"model_optim_rng\.pt: not a file of weights"):
            export_hf(folder, tmp_path / "back")
    assert not Path("exploited").exists()


def test_the_scripts(llava: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    classic = ["--format", "classic", "--tp", 2, "--pp", 2]
    hf = ["--hf-dir", llava]
    assert run(monkeypatch, "convert_hf_to_megatron", *hf, "--megatron-dir", "a", *classic, "--vpp", 2) == 0
    assert (tmp_path / "a/latest_checkpointed_iteration.txt").read_text() == "release"
    assert "model1" in torch.load(
        tmp_path / "a/release/mp_rank_01_001/model_optim_rng.pt", weights_only=False
    )
    assert run(monkeypatch, "reshard", "--megatron-dir", "a", "--save-dir", "b", "--tp", 2, "--verify") == 0
    stages = ["--layers-per-stage", "1,3", "--names", "local"]
    assert run(monkeypatch, "reshard", "--megatron-dir", "b", "--save-dir", "c", *classic, *stages) == 0
    assert read_manifest("c")["layout"]["layers_per_stage"] == [1, 3]
    assert run(monkeypatch, "convert_megatron_to_hf", "--megatron-dir", "c", "--hf-dir", "d") == 0
    for one, other in ((llava, "d"), ("a", "b"), ("c", "a")):
        assert run(monkeypatch, "verify", one, other) == 0
    capsys.readouterr()
    for flags, message in (
        (["--vpp", 2], "--vpp is of --format classic"),
        ([*classic, "--vpp", 3], "--pp 2 x --vpp 3: the language model has only 4 layers"),
        ([*classic, "--layers-per-stage", "1,2"], "--layers-per-stage 1,2: 3 layers; the model has 4"),
        ([*classic, "--layers-per-stage", "4"], "--layers-per-stage 4: give 2 numbers"),
        ([*classic, "--layers-per-stage", "a"], "argument --layers-per-stage: 'a' is not a positive integer"),
    ):
        assert run(monkeypatch, "convert_hf_to_megatron", *hf, "--megatron-dir", "x", *flags) == 2
        assert re.fullmatch(rf"error: {re.escape(message)}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "x").exists()
