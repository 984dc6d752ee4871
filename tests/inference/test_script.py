"""scripts/inference/generate.py as a user starts it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from megatron_vlm.hf import cli
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.launch.container import CHECKOUT
from tests.data.tiny_data import jpeg
from tests.patience import HANG
from tests.tiny import save_llava

SCRIPT = CHECKOUT / "scripts" / "inference" / "generate.py"
TOKENS = 10


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its checkpoint as a run folder has it, two pictures, and questions about them."""
    root = tmp_path_factory.mktemp("workplace")
    save_llava(root / "hf", tie_word_embeddings=False)
    import_hf(root / "hf", root / "run" / "checkpoints", tp=1, pp=1)
    for name, seed in (("a.jpg", 1), ("b.jpg", 2)):
        (root / name).write_bytes(jpeg(seed))
    questions = [
        {"prompt": "What is in this picture?", "image": "a.jpg", "id": 7},
        {"prompt": "Who are you, and what is the answer?"},
        {"prompt": "Describe the image.", "image": ["b.jpg"]},
    ]
    (root / "in.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return root


@pytest.fixture(scope="module")
def expected(workplace: Path) -> list[str]:
    """Return what transformers answers."""
    processor = transformers.AutoProcessor.from_pretrained(workplace / "hf")
    net = transformers.LlavaForConditionalGeneration.from_pretrained(workplace / "hf").eval()
    answers = []
    for line in (workplace / "in.jsonl").read_text().splitlines():
        question = json.loads(line)
        images = question.get("image", [])
        images = [images] if isinstance(images, str) else images
        content = [{"type": "image", "image": Image.open(workplace / image)} for image in images]
        content = [*content, {"type": "text", "text": question["prompt"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = net.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(new, skip_special_tokens=True).strip())
    assert len(set(answers)) == 3
    return answers


def start(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", str(SCRIPT), *flags, "--max-new-tokens", str(TOKENS)]
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=HANG, check=False
    )


def test_one_question_on_one_rank(workplace: Path, expected: list[str]) -> None:
    flags = ["--megatron-dir", "run", "--image", "a.jpg", "--prompt", "What is in this picture?"]
    done = start(*flags, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected[0] + "\n"
    assert "tokens/s" in done.stderr and done.stderr.count("\n") == 1


def test_many_questions_on_two_ranks(workplace: Path, expected: list[str]) -> None:
    flags = ["--megatron-dir", "run/checkpoints", "--input", "in.jsonl", "--output", "out.jsonl"]
    done = start(*flags, "--tp", "2", "--batch-size", "2", cwd=workplace)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (workplace / "out.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == expected
    assert [row.get("id") for row in rows] == [7, None, None]
    assert all(1 <= row["tokens"] <= TOKENS and row["finish"] in ("end", "length") for row in rows)
    assert not (workplace / "out.jsonl.incomplete").exists()


def test_an_error_of_a_rank_is_one_line_and_exit_code_2(workplace: Path) -> None:
    flags = ["--megatron-dir", "run", "--prompt", "<image> <image>", "--image", "a.jpg"]
    done = start(*flags, "--pp", "2", cwd=workplace)
    assert done.returncode == 2
    assert done.stderr == "error: --prompt: its text has 2 image markers, but 1 images belong to it\n"
    assert done.stdout == ""


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    """The script's exit code, run in this process; what would be bound, where it enters a container."""
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "reenter", lambda argv, sif, binds, paths: [*binds, *paths])
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
    return cli.run(module.main)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "Hi"], "--megatron-dir is missing"),
        (["--megatron-dir", "nowhere", "--prompt", "Hi"], "nowhere: no such checkpoint folder"),
        (["--megatron-dir", "hf", "--prompt", "Hi"], "hf: not a checkpoint of this project"),
        (["--megatron-dir", "run", "--prompt", "Hi", "--image", "no.jpg"], "--image no.jpg: no such file"),
        (["--megatron-dir", "run", "--prompt", "Hi", "--tp", "3"], "--tp 3 does not divide"),
        (["--megatron-dir", "run", "--input", "no.jsonl"], "--input no.jsonl: no such file"),
        (
            ["--megatron-dir", "run", "--input", "in.jsonl", "--output", "in.jsonl"],
            "--output in.jsonl: is there already; give another file, or --force to replace it",
        ),
        (
            ["--megatron-dir", "run", "--prompt", "Hi", "--tp", "2", "--device", "cuda"],
            "this machine has no GPU",
        ),
    ],
)
def test_what_is_wrong_is_said_before_any_rank_starts(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_the_container_gets_the_folders(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    flags = ["--megatron-dir", "run", "--input", "in.jsonl", "--output", str(workplace / "new.jsonl")]
    binds = run(monkeypatch, *flags, "--sif-path", "image.sif", "--bind", "/data:/data")
    assert binds == ["/data:/data", "run", ".", str(workplace)]
