"""The first screen: groups as megatron-core makes them, and figures that add up."""

from __future__ import annotations

import itertools
import os
import re
import runpy

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import write_tracker
from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch import machine
from megatron_vlm.launch.container import CHECKOUT
from megatron_vlm.launch.launch_plan import make_plan
from megatron_vlm.launch.preflight import storage
from megatron_vlm.launch.report import Facts, rank_groups, screen
from megatron_vlm.plan.packing_estimate import PackingEstimate
from tests.launch.conftest import write_checkpoint, write_dataset

LAYOUTS = [*itertools.product((1, 2, 3, 8), repeat=3), (8, 8, 16)]


@pytest.mark.parametrize(("tp", "pp", "dp"), LAYOUTS)
def test_groups_are_megatron_cores(tp, pp, dp) -> None:
    reference = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    groups = rank_groups(tp, pp, dp)
    for name, found in groups.items():
        assert [list(group) for group in found] == reference.get_ranks(name.lower())


TEXT = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
TEXT |= {"num_hidden_layers": 16}
MODEL = ModelConfig.from_hf(
    {"model_type": "llava", "text_config": TEXT, "image_token_index": 7, "dtype": "bfloat16"}
)
BASE = ["--name", "run", "--save-dir", "runs", "--data-path", "data", "--megatron-load-dir", "ckpt"]


def shown(*argv: str, model: ModelConfig | None = MODEL, samples: int | None = None) -> str:
    config = RunConfig.from_flags([*BASE, *argv, "--dry-run"])
    return screen(make_plan(config, {"CUDA_VISIBLE_DEVICES": ""}, []), Facts("somewhere", model, samples))


def test_fp8_is_named() -> None:
    assert "; bf16 with FP8 tensorwise\n" in shown("--fp8", "--device", "cuda", "-g", "1")


def test_four_ranks() -> None:
    argv = ["-g", "4", "--tp", "2", "--pp", "2", "--global-batch-size", "6"]
    assert shown(*argv, "--seq-length", "640", samples=15).splitlines()[:9] == [
        "run      runs/run: somewhere",
        "layout   4 processes on CPUs: TP 2 x PP 2 x DP 1; bf16",
        "  TP     0-1  2-3  (2 groups)",
        "  PP     0,2  1,3  (2 groups)",
        "stage 0  ranks 0-1: vision tower, projector, embedding, layer 0",
        "stage 1  ranks 2-3: layers 1-15, output layer",
        "batch    micro batch 1 x DP 1 x 6 accumulated = 6 samples an iteration",
        "length   2 iterations, 12 samples, 0.80 epochs of 15",
        # The tower makes 576 tokens of an image of 336 pixels in patches of 14.
        "tokens   3,840 an iteration at most: 3,456 of images, 384 of text",
    ]


def test_the_length_in_epochs() -> None:
    argv = ["-g", "2", "--global-batch-size", "6", "--epochs", "2.5"]
    assert "length   6 iterations, 36 samples, 2.40 epochs of 15\n" in shown(*argv, samples=15)
    assert "length   2.5 passes over the training split\n" in shown(*argv)


def test_packed_sequences_are_not_samples() -> None:
    argv = ["-g", "4", "--packing", "--global-batch-size", "4", "--seq-length", "1200", "--train-iters", "40"]
    facts = Facts("", MODEL, 1000, PackingEstimate(4.96875, ("hf",)))
    text = screen(make_plan(RunConfig.from_flags([*BASE, *argv]), {"CUDA_VISIBLE_DEVICES": ""}, []), facts)
    assert "accumulated = 4 sequences an iteration\n" in text
    length, *_ = re.findall(r"length.*\n.*\n.*\n", text)
    assert length == (
        "length   40 iterations, 160 sequences:\n"
        "         about 795 samples, 5 in a sequence, 0.80 epochs of 1,000; one takes 50 iterations\n"
        "         estimated from the lengths in report.json, counted with hf\n"
    )
    # Two images of 576 tokens fit into 1,200.
    assert "tokens   4,800 an iteration at most\n" in text and "2 images in a sequence at most\n" in text
    assert "how many samples they hold is not known" in shown(*argv, samples=1000)


def test_512_ranks_take_a_screen_too() -> None:
    argv = ["-g", "8", "--node", "64", "-r", "0", "-m", "h", "--tp", "8", "--pp", "16", "--device", "cuda"]
    text = shown(*argv, "--seq-length", "2048", "--train-iters", "1000")
    lines = text.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 110
    assert lines[1].startswith("layout   512 GPUs, 8 on each of 64 nodes: TP 8 x PP 16 x DP 4")
    assert "  node   ranks 0-7  8-15  16-23  ..  504-511" in lines
    assert "  TP     0-7  8-15  16-23  ..  504-511  (64 groups, each within a node)" in lines
    assert (
        "  DP     0,8,16,24  1,9,17,25  2,10,18,26  ..  487,495,503,511  (128 groups, each over 4 nodes)"
        in lines
    )
    assert any(line.startswith("stage 10 ranks 320-351 on nodes 40-43: layer") for line in lines)


def test_a_long_pipeline_shows_its_ends() -> None:
    text = dict(TEXT, num_hidden_layers=40)
    model = ModelConfig.from_hf({"model_type": "llava", "text_config": text, "image_token_index": 7})
    lines = [line for line in shown("-g", "20", "--pp", "20", model=model).splitlines() if "stage" in line]
    assert [line.split()[1] for line in lines] == ["0", "1", "2", "18", "19"]
    assert lines[-1].endswith("output layer")


def test_what_is_not_known_is_left_out() -> None:
    text = shown("-g", "2", model=None)
    assert "one pass over the training split" in text
    assert "tokens" not in text and "stage" not in text


# LLaVA-1.5-7B's config, in bfloat16; what it leaves out is as transformers has it.
LLAVA_7B = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
LLAVA_7B |= {"image_token_index": 7, "dtype": "bfloat16"}


def test_the_example_in_the_docs_is_what_is_printed(tmp_path, monkeypatch, capsys) -> None:
    page = (CHECKOUT / "docs/launching.md").read_text()
    command, screen = re.search(
        r"```shell\n(python scripts/train/run.py [^`]*--dry-run)\n```\n\n```\n(.*?)```", page, re.S
    ).groups()
    argv = [word.strip("<>") for word in command.replace("\\\n", " ").split()][2:]
    write_checkpoint(tmp_path / "megatron-model/release", LLAVA_7B)
    write_tracker(tmp_path / "megatron-model", "release")
    write_dataset(tmp_path / "conversations", samples=665_298)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 2 << 40)
    monkeypatch.setattr(storage, "local_file_system", lambda path: None)
    monkeypatch.setattr(machine, "claim_port", lambda port, **_: machine.PortClaim(port, None))
    monkeypatch.setattr(os, "environ", {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert runpy.run_path(str(CHECKOUT / "scripts/train/run.py"))["main"](argv) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2  # a command for each node
    assert (
        err.replace("megatron-model/", "<megatron-model>/")
        .replace("runs/", "<runs>/")
        .replace(" in runs", " in <runs>")
        == screen
    )
