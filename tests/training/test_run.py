"""What a user types and sees: resume, errors, and the way to Megatron and back."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import FILES, read_manifest, write_manifest
from megatron_vlm.config.run import RunConfig
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.formats.native import NativeReader
from megatron_vlm.hf.verify import verify
from megatron_vlm.launch.preflight import storage
from tests.distributed import CONTEXT, Pool
from tests.patience import HANG
from tests.training.conftest import Trainable
from tests.workers import train

CHECKOUT = Path(__file__).parents[2]


def script(name: str, *argv: object) -> subprocess.CompletedProcess[str]:
    """Run one of the project's scripts as a user would."""
    command = [sys.executable, str(CHECKOUT / "scripts" / name), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG)


def failure(pool: Pool, world: int, argv: list[str]) -> str:
    """The ValueError with which every rank ends."""
    errors = pool.run(world, user_error, argv)
    assert len(set(errors)) == 1
    return errors[0]


def user_error(argv: list[str]) -> str:
    try:
        train(argv)
    except ValueError as error:
        return str(error)
    return "none"


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_through_training_and_back_bit_for_bit(trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """HF -> Megatron -> one step with learning rate 0 by run.py at TP 2 -> HF: every byte as it was.

    Other models, dtypes and layouts are in test_round_trip.py.
    """
    hf = tmp_path / "hf"
    shutil.copytree(trainables["tied"].hf, hf)
    net = transformers.AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.bfloat16)
    net.save_pretrained(hf)
    converted = script(
        "convert/convert_hf_to_megatron.py",
        "--tp",
        2,
        "--pp",
        1,
        "--hf-dir",
        hf,
        "--megatron-dir",
        tmp_path / "megatron",
    )
    assert converted.returncode == 0, converted.stderr

    trainable = replace(trainables["tied"], checkpoint=tmp_path / "megatron", hf=hf)
    flags = trainable.flags(tmp_path, "run", "-g", "2", "--tp", "2", "--train-vision", "--train-iters", "1")
    flags[flags.index("--fp32")] = "--save-optim"  # the precision comes from the weights
    flags[flags.index("--lr") + 1] = "0"
    trained = script("train/run.py", *flags)
    assert trained.returncode == 0, trained.stderr
    assert metrics(tmp_path / "run")[0]["lr"] == 0.0
    # Rank 0's own log is what run.py printed on stdout, but for the command; no other rank speaks there.
    (log,) = (tmp_path / "run" / "logs").glob("*-rank0.log")
    # Then comes the summary.
    printed, _, summary = trained.stdout.partition("\n")[2].partition("done ")
    assert log.read_text() == printed and "GPU" not in trained.stdout + trained.stderr
    done, weights, convert, generate, took = summary.splitlines()
    assert done.strip().startswith(
        f"{tmp_path / 'run'}: 1 iteration, last loss {metrics(tmp_path / 'run')[0]['loss']:.4f}"
    )
    assert weights == f"weights  {tmp_path / 'run/checkpoints/iter_0000001'}"
    assert "scripts/inference/generate.py --megatron-dir" in generate and took.startswith("time     0:")

    command = [*shlex.split(convert)[1:], "--tp", "2", "--pp", "1", "--hf-dir", str(tmp_path / "back")]
    exported = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert exported.returncode == 0, exported.stderr
    assert verify(hf, tmp_path / "back") > 0
    for file in hf.iterdir():
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes(), file.name


def test_a_run_and_its_second_start(trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Weights-only checkpoints can't be resumed: exit code 2 and the choices. A finished run ends at once."""
    one = trainables["untied"]
    weights_only = one.flags(tmp_path, "weights", "--train-iters", "2")
    first = script("train/run.py", *weights_only)
    assert first.returncode == 0, first.stderr
    assert "iteration 2/2 (100.0%) | loss " in first.stdout
    assert "\nanswers end with '</s>' (2)\n" in first.stdout
    log = next((tmp_path / "weights" / "logs").iterdir()).read_text()
    assert log.startswith(
        f"starting {tmp_path / 'weights'} from the weights of {one.checkpoint / 'release'}\n"
    )

    second = script("train/run.py", *weights_only)
    assert second.returncode == 2
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    for choice in ("another --name", "iter_0000002", "--restart", "--save-optim"):
        assert choice in line
    assert "Traceback" not in second.stderr


def test_resume_restart_and_finish(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    one, run = trainables["untied"], tmp_path / "run"
    flags = one.flags(tmp_path, "run", "--save-optim", "--save-interval", "2")
    pool.run(1, train, [*flags, "--train-iters", "3"])
    # As after a kill: an iteration logged beyond the last checkpoint, and half a line.
    shutil.rmtree(run / "checkpoints" / "iter_0000003")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')
    pool.run(1, train, [*flags, "--train-iters", "5"])
    assert [line["iteration"] for line in metrics(run)] == [1, 2, 3, 4, 5]
    superseded = (run / "metrics.superseded.jsonl").read_text().splitlines()
    assert [line[:14] for line in superseded] == ['{"iteration": ', '{"iteration": ']

    before = (run / "metrics.jsonl").read_bytes()
    pool.run(1, train, [*flags, "--train-iters", "5"])
    assert (run / "metrics.jsonl").read_bytes() == before

    pool.run(1, train, [*flags, "--train-iters", "1", "--restart"])
    assert len(metrics(run)) == 1
    assert (run / "earlier" / "1" / "metrics.jsonl").read_bytes() == before
    assert not RunConfig.load(str(run / "config.json")).checkpoint.restart  # which --config may take


@pytest.mark.parametrize(("then", "now"), [("--bf16", "--fp32"), ("--fp32", "--bf16")])
def test_optimizer_state_stays_in_its_precision(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path, then: str, now: str
) -> None:
    """In the other one it would lose its master weights, or have none. Of a run that goes on, flags tell."""
    one = trainables["untied"]
    flags = one.flags(tmp_path, "run", "--save-optim", "--dist-optim", "--train-iters")
    flags.remove("--fp32")
    pool.run(1, train, [*flags, "1", then])
    message = f"its optimizer state is of {then}; go on with that, or start a new run from its weights"
    other = ["--name", "other", "--data-path", str(one.text_only)]
    load = ["--load-optim", "--megatron-load-dir", str(tmp_path / "run")]
    assert message in failure(pool, 2, [*flags, "2", now, *other, *load])


@pytest.mark.parametrize(
    ("world", "argv"),
    [
        (1, ["--bf16", "--save-optim"]),
        (2, ["--tp", "2", "--save-optim", "--train-vision"]),
        (2, ["--stage", "1", "--dist-optim", "--bf16", "--save-optim", "--save-trained-only"]),
        (2, ["--pp", "2", "--lora-rank", "4"]),
    ],
)
def test_a_checkpoint_is_as_large_as_the_launcher_predicts(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path, world: int, argv: list[str]
) -> None:
    """Against the tensors that torch's own metadata counts."""
    one = trainables["tied" if world == 1 else "untied"]
    flags = one.flags(tmp_path, "run", "--train-iters", "1", *argv)
    pool.run(world, train, flags)
    folder = tmp_path / "run/checkpoints/iter_0000001"
    assert list(storage.shard_problems(folder)) == []
    reader = NativeReader(folder)
    size = sum(math.prod(reader.shape(name)) * reader.dtype(name).itemsize for name in reader.names)
    model = ModelConfig.from_dict(read_manifest(folder)["model"])
    assert storage.checkpoint_bytes(RunConfig.from_flags(flags), model, "--save-optim" in argv) == size


def test_one_epoch_is_the_default(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    pool.run(1, train, trainables["untied"].flags(tmp_path, "run", "--no-save", "--freeze-lm"))
    assert len(metrics(tmp_path / "run")) == 120 // 4


def test_epochs_and_going_on_with_more_of_them(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """Passes over the 120 samples of the training split; the schedule is as long as the run."""
    flags = trainables["untied"].flags(tmp_path, "run", "--save-optim", "--freeze-lm", "--min-lr", "1e-4")
    for epochs, samples in (("0.05", 6), ("0.15", 18)):
        pool.run(1, train, [*flags, "--epochs", epochs])
        run = RunConfig.load(str(tmp_path / "run" / "config.json"))
        assert (run.training.train_samples, run.training.iterations) == (samples, samples // 4)
        rows = metrics(tmp_path / "run")
        assert [row["iteration"] for row in rows] == [*range(1, samples // 4 + 1)]
        assert rows[-1]["consumed_samples"] == samples // 4 * 4
        # Megatron-LM's cosine over all of the run, which begins at the peak.
        done, peak, low = rows[-1]["iteration"] - 1, 2e-3, 1e-4
        decayed = (1 + math.cos(math.pi * done / (samples // 4))) / 2
        assert rows[-1]["lr"] == pytest.approx(low + (peak - low) * decayed)


@pytest.mark.parametrize("world", [1, 2])
def test_not_finite(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path, world: int) -> None:
    """A loss that is not finite stops every rank before the update, naming iteration and samples."""
    net = transformers.LlavaForConditionalGeneration.from_pretrained(trainables["untied"].hf)
    with torch.no_grad():
        net.lm_head.weight.mul_(3e38)
    shutil.copytree(trainables["untied"].hf, tmp_path / "hf")
    net.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    broken = Trainable(tmp_path / "megatron", tmp_path / "hf", trainables["untied"].data, tmp_path)
    message = failure(pool, world, broken.flags(tmp_path, "run", "--train-iters", "3"))
    assert "iteration 1: the loss is not finite" in message
    named = message.partition("samples: ")[2].partition(". Look")[0].split(", ")
    assert len(named) == 4  # the whole global batch
    assert not (tmp_path / "run" / "checkpoints").exists()


def train_with_small_files(argv: list[str]) -> str:
    """Train as on a full disk, on the last rank: torch's writer gets an error in the middle of a file."""
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        return user_error(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("layout", [["--tp", "2"], ["--pp", "2"]], ids=" ".join)
def test_no_space_for_a_checkpoint(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path, layout: list[str]
) -> None:
    """Every rank ends with the same line, and what was written in vain is gone."""
    flags = trainables["untied"].flags(tmp_path, "run", "--save-optim", "--save-interval", "2", *layout)
    pool.run(2, train, [*flags, "--train-iters", "2"])
    messages = pool.run(2, train_with_small_files, [*flags, "--train-iters", "4"])
    checkpoints = tmp_path / "run/checkpoints"
    why = (
        f"{os.strerror(errno.EFBIG)}; make room and give the same command again: it goes on from iter_0000002"
    )
    assert messages == [f"{checkpoints}/iter_0000004 could not be saved: {why}"] * 2
    assert {path.name for path in checkpoints.iterdir() if path.is_dir()} == {"iter_0000002"}
    pool.run(2, train, [*flags, "--train-iters", "4"])


def test_another_model(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    flags = trainables["untied"].flags(tmp_path, "run", "--train-iters", "1")
    message = failure(pool, 1, [*flags, "--tokenizer-load-dir", str(trainables["tied"].hf)])
    assert "another model" in message and "tie_word_embeddings is True there and False here" in message


def test_an_end_token_that_would_not_be_learnt(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """Nor one that an export couldn't name: both end the run before anything is trained."""
    one = trainables["untied"]
    hf = shutil.copytree(one.hf, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    end = transformers.AddedToken("<|im_end|>", single_word=True)
    tokenizer.add_tokens(["<|im_start|>", end])
    tokenizer.save_pretrained(hf)
    flags = one.flags(tmp_path, "run", "--train-iters", "1", "--tokenizer-load-dir", str(hf))
    refused = script("train/run.py", *flags, "--template", "chatml")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    (message,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert message.startswith("error: --template chatml: an answer should end with '<|im_end|>' (422), but")
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/metrics.jsonl").exists()
    checkpoint = shutil.copytree(one.checkpoint, tmp_path / "checkpoint")
    (folder,) = checkpoint.glob("*/hf")
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    message = failure(pool, 1, [*flags, "--megatron-load-dir", str(checkpoint)])
    assert "generation_config.json: its eos_token_id is '</s>'" in message


def test_other_parts_trained(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Optimizer state of stage 1 has nothing for the language model."""
    flags = trainables["untied"].flags(tmp_path, "run", "--train-iters", "1", "--save-optim")
    pool.run(1, train, [*flags, "--freeze-lm"])
    message = failure(pool, 2, [*flags, "--train-iters", "2"])
    assert "--no-freeze-lm trains other parts of the model than --freeze-lm" in message
    another = trainables["untied"].flags(tmp_path, "another", "--train-iters", "2", "--load-optim")
    message = failure(pool, 2, [*another, "--megatron-load-dir", str(tmp_path / "run")])
    assert "no optimizer state for language_model." in message and "--freeze-lm" in message


def test_a_pattern_that_matches_nothing(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """No rank has the whole model, yet all agree; a layer of the last stage alone is a match."""
    flags = trainables["untied"].flags(tmp_path, "run", "--pp", "2", "--train-iters", "1", "--no-save")
    message = failure(pool, 2, [*flags, "--train-modules", "projector|*.layers.1.mlp.fc1.*"])
    assert "*.layers.1.mlp.fc1.* matches no parameter" in message
    assert "language_model.decoder.layers.1.mlp.linear_fc1.weight" in message
    pool.run(2, train, [*flags, "--train-modules", "language_model.decoder.layers.1.mlp.linear_fc1.weight"])


def test_overlap_with_a_parameter_without_gradient(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """megatron-core gives the bias of a frozen weight none, and no bucket without it would be reduced."""
    flags = trainables["untied"].flags(tmp_path, "run", "--train-iters", "2", "--no-save")
    biases = [*flags, "--train-modules", "projector|vision_model.*linear_qkv.bias"]
    message = failure(pool, 2, biases)
    assert "gets no gradient" in message and message.endswith("add --no-overlap-grad-reduce")
    assert "no gradient has reached" in failure(pool, 2, [*biases, "--no-overlap-grad-reduce"])


def hold_lock(folder: Path, locked: Any) -> None:
    from megatron_vlm.training import run_folder

    with run_folder.lock(folder):
        locked.set()
        time.sleep(HANG)


def test_a_locked_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process is kept out, until the one that holds the folder ends, however it does."""
    from megatron_vlm.training import run_folder

    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.0)
    locked = CONTEXT.Event()
    holder = CONTEXT.Process(target=hold_lock, args=(tmp_path, locked), daemon=True)
    holder.start()
    assert locked.wait(HANG)
    with pytest.raises(ValueError, match="another process is training here"):
        run_folder.lock(tmp_path)
    holder.kill()
    holder.join()
    run_folder.lock(tmp_path).close()


def test_random_weights_are_made_once_and_alike_at_every_layout(
    trainables: dict[str, Trainable], pool: Pool, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"  # its weights aren't needed
    shutil.copytree(trainables["untied"].hf, hf, ignore=shutil.ignore_patterns("*.safetensors"))
    flags = trainables["untied"].flags(tmp_path, "one", "--init", "--save-optim", "--train-iters")
    flags = [*flags[2:], "1"]  # without --megatron-load-dir
    flags[flags.index("--tokenizer-load-dir") + 1] = str(hf)
    pool.run(1, train, flags)
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "one/init/release").glob("*.distcp")}
    assert weights
    pool.run(1, train, [*flags[:-1], "2"])
    assert weights == {path: path.stat().st_mtime_ns for path in weights}
    assert [line["iteration"] for line in metrics(tmp_path / "one")] == [1, 2]
    pool.run(2, train, [*flags[:-1], "2", "--name", "two", "--tp", "2"])
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # as in test_layouts.py
    back = export_hf(tmp_path / "one", tmp_path / "back")
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info

    contradiction = script("train/run.py", *flags, "--megatron-load-dir", trainables["untied"].checkpoint)
    assert (contradiction.returncode, contradiction.stdout) == (2, "")
    assert contradiction.stderr == (
        "error: --init and --megatron-load-dir both say which weights to start from; give one\n"
    )


def test_a_run_with_the_debug_flags(trainables: dict[str, Trainable], tmp_path: Path) -> None:
    flags = trainables["tied"].flags(tmp_path, "run", "--train-iters", "2", "--num-workers", "2", "--debug")
    flags += ["-g", "4", "--tp", "2", "--dist-optim", "--deterministic", "--transformer-impl", "local"]
    ended = script("train/run.py", *flags)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("debug: ")]
    assert lines[0] == "debug: iteration 1"
    assert re.search(r"^debug:   first sample: .*trained\):.*⟦.*⟧", ended.stdout, re.MULTILINE | re.DOTALL)
    assert re.search(r"microbatch 0: input_ids \[2, \d+\], \d+ trained tokens, pixel_values \[", lines[2])
    norms = [list(map(float, re.findall(r" (\S+)(?:,|$)", line))) for line in lines if "norms" in line]
    assert len(norms) == 2 and all(len(of_modules) == 3 and of_modules[0] == 0.0 for of_modules in norms)
    for of_modules, line in zip(norms, metrics(tmp_path / "run"), strict=True):
        # megatron-core's own norm, of all parameters at once; the console shows six digits.
        assert sum(norm**2 for norm in of_modules) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-5)


def test_a_zeroed_file_of_a_checkpoint_is_named(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """On every rank, the one that would not read it, too; without hashes, as an earlier version saved it."""
    more = ["--save-optim", "--dist-optim", "--train-iters"]
    flags = trainables["untied"].flags(tmp_path, "run", *more)
    pool.run(2, train, [*flags, "2"])
    file = tmp_path / "run/checkpoints/iter_0000002/__0_0.distcp"
    manifest = read_manifest(file.parent)
    write_manifest(file.parent, {key: value for key, value in manifest.items() if key != FILES})
    file.write_bytes(bytes(file.stat().st_size))
    message = failure(pool, 2, [*flags, "4"])
    assert message.startswith(f"{file}: ") and "cannot be read" in message and "\n" not in message
