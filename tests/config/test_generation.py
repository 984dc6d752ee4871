"""The rules between generate.py's flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.artifacts.checkpoint import write_manifest
from megatron_vlm.config.generation import GenerationConfig

ASKED = ["--megatron-dir", "runs/demo", "--prompt", "Hi"]


def test_defaults() -> None:
    config = GenerationConfig.from_flags(
        [*ASKED, "--image", "a.jpg", "b.jpg", "--tp", "2", "--device", "cpu"]
    )
    assert config.prompts.image == ("a.jpg", "b.jpg")
    assert config.sampling.temperature == 0 and config.sampling.max_new_tokens is None
    assert (config.parallel.tp, config.parallel.pp, config.parallel.device) == (2, 1, "cpu")
    assert (config.launch.gpus, config.launch.node) == (2, 1)


def test_what_has_to_be_there(tmp_path: Path) -> None:
    """A checkpoint of trained weights only, with the one under it where it was, gone, and named."""
    base, trained = tmp_path / "base", tmp_path / "trained"
    manifest = {"format": "torch_dist", "iteration": 0, "has_optimizer": False}
    manifest.update({key: {} for key in ("model", "layout", "tensors")})
    for folder, more in ((base, {}), (trained, {"base": {"path": str(base)}})):
        folder.mkdir()
        write_manifest(folder, {**manifest, **more})
    asked = ["--megatron-dir", str(trained), "--image", "a.jpg", "b.jpg"]
    config = GenerationConfig.from_flags(asked)
    assert config.paths == (str(trained), str(base), "a.jpg", "b.jpg")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="say with --base where it is"):
        _ = config.paths
    config = GenerationConfig.from_flags([*asked, "--base", str(moved)])
    assert config.paths == (str(trained), str(moved), "a.jpg", "b.jpg")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--megatron-dir", "m"], "nothing is asked"),
        ([*ASKED, "--input", "in.jsonl"], "--prompt and --input both"),
        (["--input", "in.jsonl", "--image", "a.jpg"], "--image and --input both"),
        (["--raw-prompt", "--image", "a.jpg"], "--raw-prompt needs --prompt"),
        ([*ASKED, "--top-k", "5"], "--top-k limits what is drawn"),
        ([*ASKED, "--top-p", "0.5"], "--top-p limits what is drawn"),
        ([*ASKED, "--top-p", "1.5", "--temperature", "1"], "--top-p 1.5: must be between"),
        ([*ASKED, "--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
        ([*ASKED, "--max-new-tokens", "0"], "--max-new-tokens 0: must be above 0"),
        ([*ASKED, "--repetition-penalty", "0"], "--repetition-penalty 0.0: must be above 0"),
        ([*ASKED, "--batch-size", "0"], "--batch-size 0: must be above 0"),
        ([*ASKED, "--tp", "0"], "--tp 0: must be above 0"),
        ([*ASKED, "--promt", "Hi"], "did you mean --prompt"),
        ([*ASKED, "--force"], "--force replaces an --output, and none is given"),
        (
            [*ASKED, "--raw_prompt", "True"],
            "--raw_prompt True: a switch takes no value; give --raw-prompt alone",
        ),
    ],
)
def test_errors(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig.from_flags(argv)


def test_a_checkpoint_has_to_be_named() -> None:
    with pytest.raises(ValueError, match="--megatron-dir is missing"):
        _ = GenerationConfig.from_flags(["--prompt", "Hi"]).checkpoint


def test_files(tmp_path) -> None:
    image = tmp_path / "a.jpg"
    flags = ["--megatron-dir", "m", "--prompt", "Hi", "--image", str(image)]
    with pytest.raises(ValueError, match=r"--image .*a.jpg: no such file"):
        GenerationConfig.from_flags(flags).check_files()
    image.touch()
    GenerationConfig.from_flags(flags).check_files()
    with pytest.raises(ValueError, match=r"--output no/where.jsonl: no such folder"):
        GenerationConfig.from_flags([*flags, "--output", "no/where.jsonl"]).check_files()
    output = tmp_path / "out.jsonl"
    written = [*flags, "--output", str(output)]
    GenerationConfig.from_flags(written).check_files()
    for path, words in (
        (output, "is there already; give another file, or --force to replace it"),
        (
            tmp_path / "out.jsonl.incomplete",
            "out.jsonl.incomplete holds answers of a run that did not end; give",
        ),
    ):
        path.touch()
        with pytest.raises(ValueError, match=rf"--output {output}: .*{words}"):
            GenerationConfig.from_flags(written).check_files()
        GenerationConfig.from_flags([*written, "--force"]).check_files()
        path.unlink()
    with pytest.raises(ValueError, match=r"--input no.jsonl: no such file"):
        GenerationConfig.from_flags(["--megatron-dir", "m", "--input", "no.jsonl"]).check_files()
