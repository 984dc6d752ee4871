"""The conversion scripts: what they print, their exit codes, and the container."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.artifacts.checkpoint import BEST, CHECKPOINTS, write_manifest
from megatron_vlm.hf import cli
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.hf.verify import verify
from tests.tiny import save_tiny_llava

SCRIPTS = Path(__file__).parents[2] / "scripts" / "convert"


def run(monkeypatch, script: str, *flags: object) -> int:
    """A script's exit code, run in this process."""
    spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    try:
        return cli.run(module.main)
    except SystemExit as exit:  # argparse
        return int(exit.code or 0)


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    save_tiny_llava(tmp_path / "llava", "clip-llama")
    return tmp_path / "llava"


def test_there_and_back_from_anywhere(llava: Path, tmp_path: Path) -> None:
    """As a user runs them: another process, another folder, the package not on the path."""
    for command in (
        "convert_hf_to_megatron.py --hf-dir llava --megatron-dir checkpoint --tp 2 --pp 1",
        "convert_megatron_to_hf.py --megatron-dir checkpoint --hf-dir back --tp 2 --max-shard-size 50KB",
    ):
        script, *flags = command.split()
        done = subprocess.run(
            [sys.executable, "-I", SCRIPTS / script, *flags], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "100%" in done.stderr and "B/s" in done.stderr
    assert verify(llava, tmp_path / "back")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tp", "3"], "--tp 3 does not divide"),
        (["--pp", "99"], "--pp 99: the language model has only"),
        (["--tp", "0"], "argument --tp: '0' is not a positive integer"),
        (["--verfy"], "unknown flag --verfy; did you mean --verify?"),
        (["--tp"], "argument --tp: expected one argument"),
        (["--hf-dir", "nowhere"], "nowhere: no config.json"),
        (["--megatron-dir", "taken"], "--force"),
        (["--sif-path", "nowhere.sif"], "nowhere.sif: no such image"),
    ],
)
def test_import_errors(
    llava: Path, tmp_path: Path, monkeypatch, capsys, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    code = run(
        monkeypatch, "convert_hf_to_megatron", "--hf-dir", llava, "--megatron-dir", "checkpoint", *flags
    )
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "checkpoint").exists()


def test_export_errors(tmp_path: Path, llava: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    script = "convert_megatron_to_hf"
    for flags, message in (
        (["--megatron-dir", "nowhere"], "nowhere: no such checkpoint"),
        (["--megatron-dir", "llava"], "llava: not a checkpoint"),
        (["--megatron-dir", "llava", "--max-shard-size", "5"], "'5' is not a size"),
    ):
        assert run(monkeypatch, script, "--hf-dir", "back", *flags) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert run(monkeypatch, "convert_hf_to_megatron", "--hf-dir", llava, "--megatron-dir", "checkpoint") == 0
    capsys.readouterr()
    assert run(monkeypatch, script, "--hf-dir", "back", "--megatron-dir", "checkpoint", "--tp", 3) == 2
    assert capsys.readouterr().err.startswith("error: --tp 3 does not divide")
    assert not (tmp_path / "back").exists()


def test_a_flag_that_is_misspelt_and_required(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "convert_hf_to_megatron", "--hf-dr", "x", "--megatron-dir", "y") == 2
    assert capsys.readouterr().err == "error: unknown flag --hf-dr; did you mean --hf-dir?\n"
    assert run(monkeypatch, "convert_hf_to_megatron", "--megatron-dir", "y") == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --hf-dir\n"


@pytest.mark.parametrize(
    "config, message",
    [
        (b"\xff\xfe", "llava/config.json: cannot be read ('utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_config_that_is_no_json(
    llava: Path, tmp_path: Path, monkeypatch, capsys, config: bytes, message: str
) -> None:
    (llava / "config.json").write_bytes(config)
    flags = ["--hf-dir", llava, "--megatron-dir", tmp_path / "checkpoint"]
    assert run(monkeypatch, "convert_hf_to_megatron", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_pipe_among_the_small_files(llava: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    flags = ["--hf-dir", llava, "--megatron-dir", tmp_path / "checkpoint"]
    os.mkfifo(llava / "pipe")
    assert run(monkeypatch, "convert_hf_to_megatron", *flags) == 2
    message = f"error: {llava}/pipe: a pipe, a device or a link to nothing; move it away\n"
    assert capsys.readouterr().err.endswith(message)
    assert not (tmp_path / "checkpoint").exists()


def test_builder_errors(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--save-dir", "llava", "--text-model", "./nowhere", "--vision-model", "./nowhere"]
    assert run(monkeypatch, "build_llava_jp", *flags) == 2
    assert capsys.readouterr().err == "error: --text-model ./nowhere: no such folder\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image-grid-pinpoints", "336x672"], "--image-grid-pinpoints needs --model-type llava_next"),
        (["--model-type", "llava_next", "--image-grid-pinpoints", "336"], "'336' is not HxW; give pixels"),
        (["--model-type", "llava_onevision"], "'llava_onevision' is converted and trained, but not built"),
        (["--seed", str(2**63)], "--seed 9223372036854775808: has more than 63 bits"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--lang", "fr"], "argument --lang: invalid choice: 'fr'"),
    ],
)
def test_builder_flags(tmp_path: Path, monkeypatch, capsys, flags: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "build_llava_jp", "--save-dir", "llava", "--text-model", "./nowhere", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_all_reenter_the_container(tmp_path: Path, monkeypatch) -> None:
    """They hand over their own flags, and what has to be bound, before anything needs torch."""
    seen = []
    monkeypatch.setattr(
        "megatron_vlm.launch.container.reenter", lambda *arguments: seen.append(arguments) or 7
    )
    text, base, trained = tmp_path / "text", tmp_path / "base", tmp_path / "trained"
    for folder in (text, base, trained):
        folder.mkdir()
    manifest = {"format": "torch_dist", "iteration": 0, "has_optimizer": False}
    manifest.update({key: {} for key in ("model", "layout", "tensors")})
    write_manifest(base, manifest)
    write_manifest(trained, {**manifest, "base": {"path": str(base)}})  # trained weights only
    container = ["--sif-path", "image.sif", "--bind", "/data:/data", "/scratch:/s:ro"]
    cases = {
        "convert_hf_to_megatron": (["--hf-dir", "a", "--megatron-dir", "b"], ["a"], ["b"]),
        "convert_megatron_to_hf": (
            ["--megatron-dir", str(trained), "--hf-dir", "b", "--tokenizer-dir", "c"],
            [str(trained), str(base), "c"],
            ["b"],
        ),
        "reshard": (["--megatron-dir", str(trained), "--save-dir", "b"], [str(trained), str(base)], ["b"]),
        "verify": (["a", "b", "--hf-config", "c"], ["a", "b", "c"], []),
        "build_llava_jp": (
            [
                "--save-dir",
                "a",
                "--text-model",
                str(text),
                "--vision-model",
                "org/tag",
                "--projector",
                str(base),
            ],
            [str(text), str(base)],
            ["a"],
        ),
        "projector": (
            ["import", "--projector", "p", "--checkpoint", str(trained), "--save-dir", "a"],
            [str(trained), "p", str(base)],
            ["a"],
        ),
    }
    for script, (flags, paths, outputs) in cases.items():
        assert run(monkeypatch, script, *flags, *container) == 7
        argv, sif, binds, found, *made = seen.pop()
        assert argv == [str(SCRIPTS / f"{script}.py"), *flags, *container]
        assert sif == "image.sif"
        assert made == ([outputs] if outputs else [])
        assert (binds, found) == (["/data:/data", "/scratch:/s:ro"], paths)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("200mb", 2 * 10**8)])
def test_sizes(text: str, size: int) -> None:
    assert cli.size(text) == size


def test_which_checkpoint_of_a_run_is_taken(llava: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run_folder = tmp_path / "run"
    for root in (CHECKPOINTS, BEST):
        import_hf(llava, run_folder / root, tp=1, pp=1)
    release = run_folder / CHECKPOINTS / "release"
    for script, *flags in (
        ("verify", run_folder),
        ("verify", llava, run_folder),
        ("convert_megatron_to_hf", "--megatron-dir", run_folder, "--hf-dir", tmp_path / "hf"),
        ("reshard", "--megatron-dir", run_folder, "--save-dir", tmp_path / "resharded"),
    ):
        assert run(monkeypatch, str(script), *flags) == 0
        told = f"note: this takes {release}, the last checkpoint; the one with the lowest validation loss is"
        assert told in capsys.readouterr().err, script
