"""What loads of PEFT computes what ``PeftModel.from_pretrained`` does; the rest is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_vlm.architecture.lora import LANGUAGE_TARGETS, LoRAConfig
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.adapters import find_adapters, merged, read_adapter
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.hf.formats.native import LayeredReader
from megatron_vlm.hf.peft_config import IGNORED, PLAIN, READ
from megatron_vlm.hf.tables.model import build_table
from megatron_vlm.hf.tables.table import detect_prefixes
from tests.tiny import save_tiny_llava

LANGUAGE = rf".*language_model\..*\.({'|'.join(LANGUAGE_TARGETS)})"
RANK, ALPHA = 4, 8


@dataclasses.dataclass(frozen=True)
class Base:
    """A model in both formats, and tokens to run it with."""

    hf: Path
    release: Path
    loaded: transformers.LlavaForConditionalGeneration

    def net(self) -> transformers.LlavaForConditionalGeneration:
        return copy.deepcopy(self.loaded)

    def logits(self, net: torch.nn.Module) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(1, 3, 20, 20, generator=generator)
        image = [self.loaded.config.image_token_id] * ((20 // 4) ** 2)
        tokens = torch.tensor([[1, 5, 9, *image, 30, 44, 77, 100]])
        with torch.no_grad():
            return net(input_ids=tokens, pixel_values=images).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_llava(folder / "hf", "clip-llama")
    release = import_hf(folder / "hf", folder / "megatron", tp=1, pp=1)
    net = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "hf").eval()
    return Base(folder / "hf", release, net)


def save_adapter(base: Base, folder: Path, convert: bool = False, **options: Any) -> None:
    """Save an adapter that PEFT made, after a change of all its tensors as training makes it."""
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": LANGUAGE, **options}
    torch.manual_seed(0)
    net = peft.get_peft_model(base.net(), peft.LoraConfig(**options))
    started = folder.with_name(folder.name + "-start")
    if convert:
        net.peft_config["default"].init_lora_weights = True
        net.save_pretrained(started)
        net.peft_config["default"].init_lora_weights = options["init_lora_weights"]
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    more = {"path_initial_model_for_weight_conversion": str(started)} if convert else {}
    net.save_pretrained(folder, **more)


def logits_here(base: Base, folder: Path, lora: LoRAConfig) -> torch.Tensor:
    """Logits of transformers' own model with what is read of an adapter merged into its weights."""
    model = dataclasses.replace(ModelConfig.from_hf_dir(str(base.hf)), lora=lora)
    tensors = read_adapter(folder, model, LayeredReader([base.release]))
    reader = type("Reader", (), {"read": staticmethod(tensors.pop)})()
    net = base.net()
    table = build_table(model, model.language.vocab_size, detect_prefixes(net.state_dict()))
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, adapter in find_adapters(table, lora).items():
            parameters[name].copy_(merged(parameters[name].data, adapter, lora, reader))
        for row in table.rows:
            if row.native in tensors:
                parts = row.op.to_hf(tensors.pop(row.native))
                for (name, _), part in zip(row.hf, parts, strict=True):
                    parameters[name].copy_(part)
    assert not tensors
    return base.logits(net)


LISTED = ("q_proj", "v_proj", "vision.q_proj", "vision.v_proj")
LOADED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "random-b": (dict(init_lora_weights=False), {}),
    "gaussian": (dict(init_lora_weights="gaussian"), {}),
    "eva": (dict(init_lora_weights="eva"), {}),
    "orthogonal": (dict(init_lora_weights="orthogonal"), {}),
    "mica": (dict(init_lora_weights="mica"), {}),
    "pissa": (dict(init_lora_weights="pissa"), dict(rank=8, alpha=16)),
    "olora": (dict(init_lora_weights="olora"), dict(rank=8, alpha=16)),
    "olora-rslora": (
        dict(init_lora_weights="olora", use_rslora=True),
        dict(rank=8, alpha=16, rslora=True),
    ),
    "pissa-converted": (dict(init_lora_weights="pissa", convert=True), dict(rank=8, alpha=16)),
    "olora-rslora-converted": (
        dict(init_lora_weights="olora", use_rslora=True, convert=True),
        dict(rank=8, alpha=11, rslora=True),  # 8 times the root of 2
    ),
    "rslora": (dict(use_rslora=True), dict(rslora=True)),
    "projector": (dict(modules_to_save=["multi_modal_projector"]), {}),
    "part-of-projector": (dict(modules_to_save=["linear_2"]), {}),
    "conv1d": (dict(fan_in_fan_out=True), {}),
    "task": (dict(task_type="CAUSAL_LM"), {}),
    "features": (dict(task_type="FEATURE_EXTRACTION"), {}),
    "dropout": (dict(lora_dropout=0.5), {}),
    "patterns": (dict(rank_pattern={"q_proj": RANK}, alpha_pattern={"v_proj": ALPHA}), {}),
    # The tower's last layer has adapters, but doesn't run.
    "list": (dict(target_modules=["q_proj", "v_proj"]), dict(targets=LISTED)),
    "excluded": (
        dict(target_modules=["q_proj", "v_proj"], exclude_modules=".*vision_tower.*"),
        dict(targets=LISTED[:2]),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LOADED)
def test_what_loads_computes_what_peft_does(base: Base, tmp_path: Path, case: str) -> None:
    options, lora = LOADED[case]
    save_adapter(base, tmp_path / "adapter", **options)
    with torch.no_grad():
        expected = base.logits(peft.PeftModel.from_pretrained(base.net(), tmp_path / "adapter").eval())
    wanted = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": LANGUAGE_TARGETS, **lora}
    found = logits_here(base, tmp_path / "adapter", LoRAConfig(**wanted))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((expected - base.logits(base.net())).abs().max()) > 1e-2


def older(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as a model of transformers before 4.52 has them."""
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("base_model.model.model.", "base_model.model.")
        name = name.replace("base_model.model.language_model.", "base_model.model.language_model.model.")
        found[name.replace(".vision_tower.", ".vision_tower.vision_model.")] = tensor
    return found


def with_tower(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as a model of transformers 4.52 to 4.57 has them."""
    return {name.replace(".vision_tower.", ".vision_tower.vision_model."): t for name, t in tensors.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rename", [older, with_tower])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_names_of_older_releases(
    base: Base,
    tmp_path: Path,
    rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    pickled: bool,
) -> None:
    folder = tmp_path / "adapter"
    targets = ["q_proj", "v_proj"]
    save_adapter(base, folder, target_modules=targets, modules_to_save=["multi_modal_projector"])
    with torch.no_grad():
        expected = base.logits(peft.PeftModel.from_pretrained(base.net(), folder).eval())
    file = folder / "adapter_model.safetensors"
    tensors = rename(load_file(file))
    assert not set(tensors) & set(load_file(file)) or rename is with_tower
    file.unlink()
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, file)
    found = logits_here(base, folder, LoRAConfig(RANK, ALPHA, 0.0, LISTED))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_table_knows_all_keys_of_peft() -> None:
    """A key that a release of PEFT adds has to be looked at: does it change what an adapter computes?"""
    tables = (READ, IGNORED.keys(), PLAIN.keys())
    known = [key for table in tables for key in table]
    assert len(known) == len(set(known))
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == set(known)


@pytest.fixture(scope="module")
def plain(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    save_adapter(base, folder)
    return folder


def read_with(base: Base, plain: Path, folder: Path, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    shutil.copytree(plain, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    lora = LoRAConfig(RANK, ALPHA, 0.0, LANGUAGE_TARGETS)
    return read_adapter(folder, dataclasses.replace(ModelConfig.from_hf_dir(str(base.hf)), lora=lora))


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("peft_type", "LOHA", "merge_and_unload"),
        ("task_type", "SEQ_CLS", "with CAUSAL_LM or null"),
        ("bias", "all", "merge_and_unload"),
        ("bias", "lora_only", "merge_and_unload"),
        ("lora_bias", True, "merge_and_unload"),
        ("use_dora", True, "merge_and_unload"),
        ("use_bdlora", {"nblocks": 2}, "merge_and_unload"),
        ("kasa_config", {"beta": 0.1}, "merge_and_unload"),
        ("velora_config", {"num_groups": 4}, "merge_and_unload"),
        ("layer_replication", [[0, 2], [1, 4]], "merge_and_unload"),
        ("trainable_token_indices", [5], "merge_and_unload"),
        ("target_parameters", ["experts.down_proj"], "merge_and_unload"),
        ("rank_pattern", {"q_proj": 2}, "merge_and_unload"),
        ("rank_pattern", {"q_proj": [2]}, "merge_and_unload"),
        ("alpha_pattern", {"q_proj": 2}, "merge_and_unload"),
        ("layers_to_transform", [0], "merge_and_unload"),
        ("layers_to_transform", 0, "merge_and_unload"),
        ("alora_invocation_tokens", [7, 8], "use it with PEFT"),
        ("arrow_config", {"top_k": 2}, "use it with PEFT"),
        ("monteclora_config", {"num_samples": 8}, "use it with PEFT"),
        ("use_qalora", True, "use it with PEFT"),
        ("megatron_config", {"tp": 2}, "supported: those of transformers"),
        ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "new", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", 3, "path_initial_model_for_weight_conversion"),
        ("modules_to_save", ["embed_tokens"], "supported: multi_modal_projector"),
        ("modules_to_save", ["lm_head", "multi_modal_projector"], "supported: multi_modal_projector"),
        ("a_key_of_tomorrow", "on", "isn't known here"),
        ("r", "4", "no value"),
        ("r", 0, "no value"),
        ("r", True, "no value"),
        ("lora_alpha", None, "no value"),
        ("use_rslora", "yes", "no value"),
        ("rank_pattern", [1], "no value"),
        ("target_modules", {"q_proj": 1}, "no value"),
        ("target_modules", "(", "no regular expression"),
        ("modules_to_save", [1], "no value"),
    ],
)
def test_what_is_refused(base: Base, plain: Path, tmp_path: Path, key: str, value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key} [^\n]*{re.escape(why)}[^\n]*$"):
        read_with(base, plain, tmp_path / "adapter", {key: value})


def test_what_is_off_is_plain(base: Base, plain: Path, tmp_path: Path) -> None:
    off = {**dict.fromkeys(PLAIN), "merge_weights": False, "enable_lora": None, "use_dora": False}
    expected = read_with(base, plain, tmp_path / "one", {})
    found = read_with(base, plain, tmp_path / "two", {**off, "target_parameters": [], "rank_pattern": {}})
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


def test_the_tensors_are_those_that_peft_would_use(base: Base, plain: Path, tmp_path: Path) -> None:
    """PEFT passes over tensors that the configuration doesn't ask for, and leaves out those that lack."""
    targets = r".*language_model\..*\.(k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    with pytest.raises(ValueError, match=r"q_proj\.weight has adapters, but is not of target_modules"):
        read_with(base, plain, tmp_path / "targets", {"target_modules": targets})
    with pytest.raises(ValueError, match=r"q_proj\.weight has adapters, but is not of target_modules"):
        read_with(base, plain, tmp_path / "excluded", {"exclude_modules": ["self_attn.q_proj"]})
    with pytest.raises(ValueError, match=r"multi_modal_projector.linear_1.bias is missing"):
        read_with(base, plain, tmp_path / "saved", {"modules_to_save": ["multi_modal_projector"]})


def test_a_start_of_twice_the_rank_is_asked_for(base: Base, plain: Path, tmp_path: Path) -> None:
    why = (
        "r is 4, but --lora-rank is 4; give --lora-rank 8, since pissa becomes a plain LoRA of twice the rank"
    )
    with pytest.raises(ValueError, match=re.escape(why)):
        read_with(base, plain, tmp_path / "adapter", {"init_lora_weights": "pissa"})


def test_a_pickle_holds_tensors_only(base: Base, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "source")
    (tmp_path / "source" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors and no adapter_model\.bin"):
        read_with(base, tmp_path / "source", tmp_path / "none", {})
    torch.save({"a": Path("x")}, tmp_path / "source" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: not a file of weights"):
        read_with(base, tmp_path / "source", tmp_path / "pickle", {})


def test_a_rank_computes_its_own_start_only(base: Base, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter", init_lora_weights="olora")
    lora = LoRAConfig(2 * RANK, 2 * ALPHA, 0.0, LANGUAGE_TARGETS)
    model = dataclasses.replace(ModelConfig.from_hf_dir(str(base.hf)), lora=lora)
    whole = read_adapter(tmp_path / "adapter", model, LayeredReader([base.release]))
    wanted = {name for name in whole if ".layers.2." in name}
    part = read_adapter(tmp_path / "adapter", model, LayeredReader([base.release]), wanted)
    assert part.keys() == wanted
    assert all(torch.equal(part[name], whole[name]) for name in wanted)
