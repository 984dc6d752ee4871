"""Converted, loaded by the trainer, stepped with learning rate 0, saved, converted back: bit for bit.

In the native format, and in Megatron-LM's before and after.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.chat_templates import SYSTEM_PROMPTS
from megatron_vlm.hf.convert import export_hf, import_hf, reshard
from megatron_vlm.hf.formats.classic import ClassicLayout
from megatron_vlm.hf.verify import verify
from megatron_vlm.plan.pipeline import StageCosts, deal_layers
from tests.distributed import Pool
from tests.tiny import save_llava
from tests.training.conftest import Trainable
from tests.training.test_layouts import layout_flags
from tests.training.test_run import metrics
from tests.workers import Layout, train

# WORLD=32 runs every layout; the pool has 4 processes otherwise.
WORLD = int(os.environ.get("WORLD", "4"))
SIZES = [(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4) if tp * pp <= WORLD]
STILL = ["--stage", "2", "--train-vision", "--lr", "0", "--min-lr", "0", "--train-iters", "1"]


@pytest.fixture(scope="module")
def wide(trainables: dict[str, Trainable], tmp_path_factory: pytest.TempPathFactory) -> Trainable:
    """Eight heads and groups, four layers: it can be cut for TP 8 x PP 4."""
    folder = tmp_path_factory.mktemp("wide") / "hf"
    save_llava(folder, tie_word_embeddings=True, num_layers=4)
    config = transformers.LlavaConfig.from_pretrained(folder)
    config.vision_config.num_attention_heads = config.text_config.num_attention_heads = 8
    config.text_config.num_key_value_heads, config.text_config.head_dim = 8, 4
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return replace(trainables["tied"], hf=folder)


def with_another_template(hf: Path, folder: Path) -> Path:
    """Return the same tokenizer, in another folder, with a chat template of its own."""
    shutil.copytree(hf, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    template = folder / "chat_template.jinja"
    template.write_text("Look: " + template.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def check_template(before: Path, after: Path) -> None:
    """transformers asks as LLaVA's conv_vicuna_v1 does, and knows where answers end."""
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    old, new = (transformers.AutoProcessor.from_pretrained(folder) for folder in (before, after))
    text = new.apply_chat_template(question, add_generation_prompt=True)
    assert text == f"{SYSTEM_PROMPTS['v1']['en']} USER: <image>\nWhat? ASSISTANT:"
    assert text != old.apply_chat_template(question, add_generation_prompt=True)
    assert new.tokenizer.chat_template == new.chat_template
    ends = transformers.GenerationConfig.from_pretrained(after).eos_token_id
    assert new.tokenizer.eos_token_id in ([ends] if isinstance(ends, int) else ends)


@pytest.mark.parametrize("tp, pp", SIZES)
@pytest.mark.parametrize("precision", ["--fp32", "--bf16"])
def test_a_step_of_nothing(
    wide: Trainable, pool: Pool, tmp_path: Path, tp: int, pp: int, precision: str
) -> None:
    dtype = None if precision == "--fp32" else torch.bfloat16
    stages = ClassicLayout(tp, pp, 1, tuple(deal_layers(4, StageCosts(layer=1), pp, 1)))
    hf = export_hf(import_hf(wide.hf, tmp_path / "first", 1, 1, dtype=dtype), tmp_path / "hf")
    classic = import_hf(hf, tmp_path / "classic", tp, pp, classic=stages)
    native = reshard(classic, tmp_path / "native", tp, pp)
    start = replace(wide, checkpoint=native)
    # In bfloat16 with a built-in template or another tokenizer folder's own, which the export then carries.
    template = ["--template", "v1"] if precision == "--bf16" and pp > 1 else []
    other = None
    if precision == "--bf16" and pp == 1:
        other = with_another_template(wide.hf, tmp_path / "other")
        start = replace(start, hf=other)
    flags = start.flags(tmp_path, "run", *layout_flags(Layout(tp, pp)), *STILL, precision, *template)
    pool.run(tp * pp, train, flags)
    (line,) = metrics(tmp_path / "run")
    assert line["lr"] == 0 and line["grad_norm"] > 0

    back = export_hf(tmp_path / "run", tmp_path / "back")
    cut = reshard(tmp_path / "run", tmp_path / "cut", tp, pp, classic=stages)
    from_classic = export_hf(cut, tmp_path / "from-classic")
    assert verify(back, from_classic) and verify(tmp_path / "run", back)
    assert verify(hf, back, weights_only=precision == "--bf16")
    if template:
        check_template(hf, back)
    if other is not None:
        expected, found = (transformers.AutoProcessor.from_pretrained(folder) for folder in (other, back))
        assert found.chat_template == found.tokenizer.chat_template == expected.chat_template
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, back))
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # not by our own code
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    "model, dtype, tp, pp",
    [
        ("untied", "float32", 1, 2),
        ("tied", "bfloat16", 2, 2),
        ("experts", "float16", 2, 1),
        ("llava_next", "bfloat16", 2, 1),
        ("llava_onevision", "bfloat16", 2, 2),
    ],
)
def test_other_models(
    trainables: dict[str, Trainable], pool: Pool, tmp_path: Path, model: str, dtype: str, tp: int, pp: int
) -> None:
    """The same, with what transformers wrote as it is and the precision that its dtype asks for."""
    hf = tmp_path / "hf"
    shutil.copytree(trainables[model].hf, hf)
    net = transformers.AutoModelForImageTextToText.from_pretrained(hf, dtype=getattr(torch, dtype))
    net.save_pretrained(hf)
    layers = ModelConfig.from_hf_dir(str(hf)).language.num_layers
    stages = ClassicLayout(tp, pp, 1, (1, layers - 1) if pp == 2 else (layers,))
    classic = import_hf(hf, tmp_path / "classic", tp, pp, classic=stages)
    start = replace(trainables[model], checkpoint=reshard(classic, tmp_path / "native", tp, pp), hf=hf)
    flags = start.flags(tmp_path, "run", *layout_flags(Layout(tp, pp)), *STILL)
    flags.remove("--fp32")
    pool.run(tp * pp, train, flags)
    assert metrics(tmp_path / "run")[0]["lr"] == 0

    # float16 is trained in a wider one, and stored so.
    again = reshard(tmp_path / "run", tmp_path / "again", tp, pp, classic=stages, dtype=net.dtype)
    for file in classic.glob("mp_rank_*/*.pt"):
        assert file.read_bytes() == (again / file.relative_to(classic)).read_bytes(), file
    for source, target in ((tmp_path / "run", "back"), (again, "from-classic")):
        back = export_hf(source, tmp_path / target)
        for file in hf.iterdir():
            assert file.read_bytes() == (back / file.name).read_bytes(), file.name
