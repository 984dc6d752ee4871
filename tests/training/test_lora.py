"""A run with LoRA: saved, resumed at other layouts, and handed back to transformers and PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.config.run import RunConfig
from megatron_vlm.hf.adapters import export_adapter, read_adapter
from megatron_vlm.hf.convert import export_hf
from megatron_vlm.plan.start import Start, with_adapters
from tests.distributed import Pool
from tests.models.test_parity import make_batch
from tests.training.conftest import Trainable
from tests.training.test_evaluate import validations
from tests.training.test_layouts import ITERATIONS, reloaded, run
from tests.workers import Layout, logits_of, train

HALF = ITERATIONS // 2
LORA = ["--lora-rank", "4", "--lora-targets", "all-linear", "vision.q_proj", "--lora-alpha", "16"]
SAVING = ["--save-optim", "--save-interval", str(HALF)]


@pytest.fixture(scope="module")
def whole(
    pool: Pool, trainables: dict[str, Trainable], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], Path]:
    """Losses and run folder of one rank."""
    folder = tmp_path_factory.mktemp("lora")
    losses = run(pool, Layout(), trainables["untied"], folder, "one", *LORA, *SAVING)
    assert losses[-1] < 0.99 * losses[0]
    return losses, folder / "one"


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, pp=2, sequence_parallel=True), Layout(dp=2, distributed_optimizer=True)], ids=str
)
def test_layout(
    pool: Pool,
    trainables: dict[str, Trainable],
    whole: tuple[list[float], Path],
    tmp_path: Path,
    layout: Layout,
) -> None:
    """The start is the same at every layout, and a run goes on at another one."""
    expected, one = whole
    losses = run(pool, layout, trainables["untied"], tmp_path, "whole", *LORA, "--no-save")
    assert losses == pytest.approx(expected, rel=1e-5)
    losses = reloaded(pool, layout, trainables["untied"], one, tmp_path, *LORA)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_handed_back(
    pool: Pool, trainables: dict[str, Trainable], whole: tuple[list[float], Path], tmp_path: Path
) -> None:
    """The adapter on the first model, and the merged model, give the logits of the run."""
    _, one = whole
    checkpoint = one / "checkpoints" / f"iter_{ITERATIONS:07d}"
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    batch = make_batch(model, 1, [1, 1], 60)
    parts = pool.run(2, logits_of, str(checkpoint), batch, Layout(tp=2))
    expected = torch.cat(parts, dim=-1)[..., : model.language.vocab_size]

    export_hf(checkpoint, tmp_path / "merged")
    export_adapter(one, tmp_path / "adapter", force=False)
    base = transformers.LlavaForConditionalGeneration.from_pretrained(trainables["untied"].hf)
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
        before = base(**inputs).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        merged = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
        for net in (adapted, merged):
            found = net(**inputs).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float((before - expected).abs().max()) > 1e-2 * float(expected.abs().max())

    # What PEFT itself writes for this adapter has the same names, shapes and settings.
    adapted.save_pretrained(tmp_path / "again")
    names = [set(_read(tmp_path / folder)) for folder in ("adapter", "again")]
    assert names[0] == names[1]
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    ours = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {key: again[key] for key in ours} == {
        **ours,
        "base_model_name_or_path": str(trainables["untied"].hf),
    }


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_only_adapters_and_projector_change(
    trainables: dict[str, Trainable], whole: tuple[list[float], Path]
) -> None:
    from megatron_vlm.hf.formats.native import NativeReader

    before = NativeReader(trainables["untied"].checkpoint / "release")
    after = NativeReader(whole[1] / "checkpoints" / f"iter_{ITERATIONS:07d}")
    for name in before.names:
        assert torch.equal(before.read(name), after.read(name)) != name.startswith("vision_projection."), name


def test_from_an_adapter(
    pool: Pool, trainables: dict[str, Trainable], whole: tuple[list[float], Path], tmp_path: Path
) -> None:
    """A run that starts from an exported adapter begins with the loss at which the other ended."""
    _, one = whole
    export_adapter(one / "checkpoints" / f"iter_{HALF:07d}", tmp_path / "adapter", force=False)
    checkpoint = str(one / "checkpoints" / f"iter_{HALF:07d}")
    common = [*LORA, "--no-save", "--train-iters", "1"]
    argv = trainables["untied"].flags(tmp_path, "a", *common, "--lora-load-dir", str(tmp_path / "adapter"))
    pool.run(1, train, argv)
    argv = trainables["untied"].flags(tmp_path, "b", *common, "--megatron-load-dir", checkpoint)
    pool.run(1, train, argv)
    first = [json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"] for name in "ab"]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "has LoRA adapters; give --lora-rank 4 --lora-alpha 16"),
        (["--lora-rank", "8"], "has LoRA adapters; give --lora-rank 4"),
        ([*LORA, "--lora-load-dir", "x"], "has adapters already"),
    ],
)
def test_adapters_go_on_as_they_are(whole: tuple[list[float], Path], flags: list[str], message: str) -> None:
    start = Start(whole[1] / "checkpoints" / f"iter_{ITERATIONS:07d}", False, "")
    model = ModelConfig.from_dict(read_manifest(start.checkpoint)["model"])
    with pytest.raises(ValueError, match=message):
        with_adapters(model, RunConfig.from_flags(flags), start)
    changed = RunConfig.from_flags([*LORA, "--lora-dropout", "0.5"])
    assert with_adapters(model, changed, start).lora == changed.lora.adapters


def test_dropout(
    pool: Pool, trainables: dict[str, Trainable], whole: tuple[list[float], Path], tmp_path: Path
) -> None:
    """Copies of an input lose the same elements on every tensor parallel rank, and a resumed run goes on
    with the random numbers of the first."""
    columns = ["--lora-rank", "4", "--lora-targets", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    flags = [*columns, "--lora-dropout", "0.5", *SAVING]
    one, two = (
        run(pool, layout, trainables["untied"], tmp_path, str(layout), *flags)
        for layout in (Layout(), Layout(tp=2))
    )
    assert two == pytest.approx(one, rel=1e-5)
    without = run(pool, Layout(), trainables["untied"], tmp_path, "without", *columns, "--no-save")
    assert max(abs(a - b) for a, b in zip(one, without, strict=True)) > 1e-3

    source = tmp_path / str(Layout())
    assert reloaded(pool, Layout(), trainables["untied"], source, tmp_path, *flags[:-3]) == one


def test_recomputation(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """It drops the same elements again, and reaches adapters in front of which nothing is trained."""
    flags = ["--lora-rank", "4", "--lora-dropout", "0.5", "--train-modules", "lora", "--no-save"]
    flags += ["--lora-targets", "all-linear", "vision.all-linear"]
    layout = Layout(tp=2, sequence_parallel=True)
    none, selective, full = (
        run(pool, replace(layout, recompute=what), trainables["untied"], tmp_path, what, *flags)
        for what in ("none", "selective", "full")
    )
    assert none == selective == full  # the same operations on the same numbers


def test_interleaved(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Adapters in several model chunks of a rank, and in the tower; and back on one rank."""
    flags = [*LORA, *SAVING, "--global-batch-size", "8"]
    expected = run(pool, Layout(), trainables["deep"], tmp_path, "one", *flags)
    layout = Layout(pp=2, vpp=2, dp=2, distributed_optimizer=True, recompute="selective")
    losses = run(pool, layout, trainables["deep"], tmp_path, "many", *flags)
    assert losses == pytest.approx(expected, rel=1e-5)
    back = reloaded(
        pool, Layout(), trainables["deep"], tmp_path / "many", tmp_path / "back", *LORA, *flags[-2:]
    )
    assert back == pytest.approx(expected, rel=1e-5)


def test_evaluation(
    pool: Pool, trainables: dict[str, Trainable], whole: tuple[list[float], Path], tmp_path: Path
) -> None:
    """It drops nothing, and training goes on with the random numbers that it would have without it."""
    dropout = ["--bf16", "--lora-dropout", "0.5", "--dist-optim", "--recompute", "selective", "--no-save"]
    flags = [*LORA, *dropout, "--megatron-load-dir", str(whole[1])]
    runs = {"without": [], "with": ["--eval-interval", "3"]}
    calm, evaluated = (
        run(pool, Layout(dp=2), trainables["untied"], tmp_path, name, *flags, *more)
        for name, more in runs.items()
    )
    assert evaluated == calm
    once = [*flags, *runs["with"], "--train-iters", "1", "--lr", "0", "--lora-dropout"]
    for name, share in (("some", "0.5"), ("none", "0")):
        pool.run(2, train, trainables["untied"].flags(tmp_path, name, *once, share))
    losses = [validations(tmp_path / name)[0]["loss"] for name in ("some", "none")]
    assert losses[0] == losses[1]
    trained = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"] for name in ("some", "none")
    ]
    assert trained[0] != trained[1]


def test_adapters_of_another_kind(
    trainables: dict[str, Trainable], whole: tuple[list[float], Path], tmp_path: Path
) -> None:
    export_adapter(whole[1], tmp_path / "adapter", force=False)
    model = ModelConfig.from_dict(read_manifest(whole[1])["model"])
    assert model.lora is not None
    for change, message in (
        ({"rank": 8}, "r is 4, but --lora-rank is 8"),
        ({"alpha": 8}, "lora_alpha is 16, but --lora-alpha is 8"),
        ({"rslora": True}, "use_rslora is False, but --use-rslora is True"),
        ({"targets": ("q_proj",)}, "belongs to no projection that has adapters here"),
        ({"targets": (*model.lora.targets, "vision.fc1")}, "is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path / "adapter", replace(model, lora=replace(model.lora, **change)))
    with pytest.raises(ValueError, match="no PEFT adapter"):
        read_adapter(trainables["untied"].hf, model)
    with pytest.raises(ValueError, match="has no adapters"):
        export_adapter(trainables["untied"].checkpoint, tmp_path / "none", force=False)
    with pytest.raises(ValueError, match="is there already"):
        export_adapter(whole[1], tmp_path / "adapter", force=False)
