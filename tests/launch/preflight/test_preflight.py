"""Every other check of the preflight, seen to find what it is for; a sound run passes all of them."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vlm.artifacts.checkpoint import read_manifest, write_manifest, write_tracker
from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch import machine, preflight
from megatron_vlm.launch.launch_plan import LaunchPlan, make_plan, plan_job
from megatron_vlm.launch.preflight import software, storage
from megatron_vlm.plan.memory import GIB
from tests.launch.conftest import CONFIG, write_checkpoint, write_dataset, write_json
from tests.launch.preflight.conftest import BASE, inspect, problem, warning

pytestmark = pytest.mark.usefixtures("here")


def test_a_sound_run(workplace) -> None:
    found = inspect()
    assert " ".join(line.strip() for line in found.say()) == (
        "ok: interpreter, image, dataset, checkpoint, flags and layout, loader workers, tokenizer, image "
        "processor, image tokens, lengths, memory, cores, save folder, disk, container paths, nodes"
    )
    assert max(map(len, found.say())) <= 100
    assert found.train_samples == 9 and found.facts.start == "from the weights of ckpt"
    assert not (workplace / "runs").exists()


def test_all_problems_are_told(workplace) -> None:
    (workplace / "data/0.tar").unlink()
    (workplace / "ckpt/hf/preprocessor_config.json").unlink()
    found = inspect("--tp", "5", "-g", "5", "--tokenizer-load-dir", "none", "--interface", "ib0")
    words = [
        "--tp 5 does not divide the 6 attention heads",
        "--interface ib0: not on this machine; there are lo, eth0",
        "shard 0.tar is gone",
        "--tokenizer-load-dir none: no such folder",
        "no image processor",
    ]
    told = found.problems
    assert len(told) >= len(words)
    for word in words:
        assert sum(word in line for line in told) == 1, (word, told)


def test_a_missing_checkpoint(workplace) -> None:
    assert "none: no such checkpoint folder" in problem("--megatron-load-dir", "none")


def test_a_checkpoint_that_is_cut_off(workplace) -> None:
    (workplace / "ckpt/.metadata").write_bytes(b"damaged")
    assert "ckpt/.metadata: refused, not the metadata of a checkpoint" in problem()


def test_the_runs_own_checkpoint_comes_first(workplace) -> None:
    own = workplace / "runs/run/checkpoints/iter_0000004"
    write_checkpoint(own, iteration=4, has_optimizer=True)
    write_tracker(own.parent, 4)
    inspect("--save-optim", "--bf16").config.save(str(own / "run_config.json"))
    found = inspect("--save-optim")
    assert found.problems == [] and found.facts.start == "goes on from iter_0000004"
    assert inspect("--save-optim", "--restart").facts.start == "from the weights of ckpt"
    assert "would change the order of the data within the run" in problem("--save-optim", "--seed", "7")
    assert "trains other parts of the model" in problem("--save-optim", "--freeze-lm")
    assert "its optimizer state is of --bf16; go on with that" in problem("--save-optim", "--fp32")
    (workplace / "other").mkdir()
    write_checkpoint(workplace / "other/ckpt", {**CONFIG, "image_token_index": 8})
    told = inspect("--megatron-load-dir", "other/ckpt").problems[0]
    assert "other/ckpt is of another model than" in told and "image_token_id is 8 there and 7 here" in told
    assert "--restart moves runs/run aside" in problem("--restart", "--megatron-load-dir", "runs/run")


def test_a_run_that_cannot_go_on(workplace) -> None:
    own = workplace / "runs/run/checkpoints/iter_0000004"
    write_checkpoint(own, iteration=4)
    assert "has checkpoints but none with optimizer state, so it can't be resumed" in problem()
    assert "--load-optim: ckpt has no optimizer state" in problem("--restart", "--load-optim")


def test_adapters_that_nobody_asks_for(workplace) -> None:
    model = inspect("--lora-rank", "4").model
    assert model is not None and model.lora is not None
    manifest = read_manifest(workplace / "ckpt")
    write_manifest(workplace / "ckpt", {**manifest, "model": model.to_dict()})
    assert "has LoRA adapters; give --lora-rank 4" in problem()
    assert inspect("--lora-rank", "4").problems == []


def test_images(workplace) -> None:
    """As apptainer writes its header; tests/cluster asks a real one."""
    image = workplace / "image.sif"
    launch = b"#!/usr/bin/env run-singularity\n\0"
    header = (
        launch
        + b"SIF_MAGIC\x0001\x0002\0"
        + bytes(16)
        + struct.pack("<8q", 0, 0, 45, 48, 4096, 28080, 32176, 100)
    )
    image.write_bytes(header.ljust(32276, b"x"))
    assert inspect("--sif-path", "image.sif").problems == []
    image.write_bytes(header.ljust(32275, b"x"))
    assert "image.sif: cut off (32,275 of 32,276 bytes)" in problem("--sif-path", "image.sif")
    image.write_text("<html>404</html>")
    assert "image.sif: no container image; build one from" in problem("--sif-path", "image.sif")
    image.write_bytes(b"hsqs" + bytes(100))
    assert inspect("--sif-path", "image.sif").problems == []
    assert "data: a folder that is no sandbox image" in problem("--sif-path", "data")
    assert "--sif-path none: no such image" in problem("--sif-path", "none")


def test_no_tokenizer_anywhere(workplace) -> None:
    for path in (workplace / "ckpt/hf").iterdir():
        path.unlink()
    (workplace / "ckpt/hf").rmdir()
    assert "no tokenizer: give --tokenizer-load-dir" in problem()


def test_a_text_models_folder_in_place_of_a_llava(workplace) -> None:
    (workplace / "text").mkdir()
    (workplace / "text/config.json").write_text('{"model_type": "qwen2"}')
    words = "model_type is 'qwen2', a text model; join it with a tower: scripts/convert/build_llava_jp.py"
    told = problem("--megatron-load-dir", "text")
    assert (
        told.startswith("--megatron-load-dir text: not a checkpoint of this project, but") and words in told
    )
    base = ["--name", "run", "--save-dir", "runs", "--data-path", "data", "--train-iters", "9"]
    config = RunConfig.from_flags([*base, "--init", "--tokenizer-load-dir", "text"])
    (told, *_) = preflight.inspect(make_plan(config, {"CUDA_VISIBLE_DEVICES": ""}, [])).errors
    assert told.startswith(f"--tokenizer-load-dir text: {words} --text-model text ")


def test_random_weights_need_no_checkpoint(workplace) -> None:
    config = RunConfig.from_flags(
        ["--name", "run", "--save-dir", "runs", "--data-path", "data", "--train-iters", "9", "--init"]
        + ["--tokenizer-load-dir", "ckpt/hf"]
    )
    found = preflight.inspect(make_plan(config, {"CUDA_VISIBLE_DEVICES": ""}, []))
    assert found.problems == [] and found.facts.start == "from random weights (--init)"
    assert found.model is not None and found.model.language.num_attention_heads == 6


def test_little_room_for_text() -> None:
    assert "an image takes 576 of --seq-length 600 and leaves 24 tokens" in warning("--seq-length", "600")
    assert "--seq-length 576 has no room for text" in problem("--seq-length", "576")


def test_an_image_processor_of_another_tower(workplace) -> None:
    size = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, "crop_size": 224}
    write_json(workplace / "ckpt/hf/preprocessor_config.json", size)
    assert "makes images of 224 x 224 pixels, and the vision tower takes 336 x 336" in problem()


def test_memory_of_a_gpu() -> None:
    planned = ["--device", "cuda", "-g", "2", "--dry-run", "--gpu-memory"]
    assert inspect(*planned, "80").warnings == []
    told = warning(*planned, "4")
    need = max(stage.with_allowance for stage in inspect(*planned, "4").memory) / GIB
    assert f"is predicted to need {need:.1f} GiB and has 4.0; " in told and need > 4


def test_a_job_has_the_memory_of_its_nodes(monkeypatch) -> None:
    monkeypatch.setattr(machine, "gpu_memory", lambda: 4)
    monkeypatch.setattr(machine, "main_memory", lambda: 1)
    assert "and has 4.0; " in " ".join(preflight.inspect(job_plan("-g", "2", submit=False)).warnings)
    for device in ("cuda", "cpu"):
        found = preflight.inspect(job_plan("-g", "2", "--device", device))
        assert found.gpu_memory is None and "predicted" not in " ".join(found.warnings)


def test_more_processes_than_cores(monkeypatch) -> None:
    config = RunConfig.from_flags([*BASE, "-g", "2"])
    plan = make_plan(config, {"CUDA_VISIBLE_DEVICES": "0,1"}, [])
    monkeypatch.setattr(machine, "gpu_memory", lambda: None)
    for cores, told in ((2, False), (1, True)):
        monkeypatch.setattr(machine, "usable_cores", lambda cores=cores: cores)
        assert ("have 1 CPU core between them" in " ".join(preflight.inspect(plan).warnings)) == told


def job_plan(*argv: str, submit: bool = True) -> LaunchPlan:
    return plan_job(RunConfig.from_flags([*BASE, *argv, "--submit" if submit else "--no-submit"]), {})


def test_memory_of_this_machine(monkeypatch) -> None:
    (stage,) = inspect("-g", "2").memory
    need = stage.total
    monkeypatch.setattr(machine, "main_memory", lambda: 2 * need + 1)
    assert inspect("-g", "2").warnings == []
    monkeypatch.setattr(machine, "main_memory", lambda: 2 * need - 1)
    assert "the 2 processes of this node are predicted to need" in warning("-g", "2")


def test_room_for_checkpoints(monkeypatch) -> None:
    argv = ["--save-optim", "--save-interval", "2", "--fp32"]
    config = inspect(*argv).config
    model = inspect().model
    assert model is not None
    size, small = (storage.checkpoint_bytes(config, model, optimizer) for optimizer in (True, False))

    def free(amount: int) -> None:
        monkeypatch.setattr(storage, "free_bytes", lambda path: amount)

    free(5 * size)
    found = inspect(*argv)
    assert found.warnings == [] and found.disk.startswith("5 checkpoints of ")
    free(5 * size - 1)
    assert "5 checkpoints of" in warning(*argv) and "--keep-checkpoints 3 fits" in warning(*argv)
    assert inspect(*argv, "--keep-checkpoints", "3").warnings == []
    free(4 * size - 1)
    assert "--keep-checkpoints 2 fits" in warning(*argv, "--keep-checkpoints", "3")
    free(2 * size - 1)
    assert "a larger --save-interval makes fewer" in warning(*argv)
    free(size - 1)
    assert "a checkpoint takes" in problem(*argv) and "or leave --save-optim out (" in problem(*argv)
    free(small - 1)
    assert "leave --save-optim out" not in problem(*argv)
    assert inspect(*argv, "--no-save", "--no-save-optim").problems == []
    free(5 * size)  # what the best checkpoint takes is too much
    split = "split_parts:\n  train:\n  - 0.tar\n  val:\n  - 0.tar\nexclude: []\n"
    Path("data/.nv-meta/split.yaml").write_text(split)
    assert "and a best one of" in warning(*argv, "--eval-interval", "2")


def test_a_save_folder_that_cannot_be_written(workplace) -> None:
    (workplace / "file").touch()
    assert "--save-dir file/x: " in problem("--save-dir", "file/x") and "is a file" in problem(
        "--save-dir", "file/x"
    )


@pytest.mark.skipif(os.getuid() != 0, reason="asks as another user, which only root can become")
def test_what_an_ordinary_user_may_not_touch() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_checkpoint(folder / "ckpt")
        write_dataset(folder / "data")
        (folder / "locked").mkdir(mode=0o755)
        (folder / "data/0.tar").chmod(0o600)
        os.chdir(folder)
        told = as_nobody(lambda: inspect("--save-dir", "locked").problems)
    assert f"--save-dir locked: {folder}/locked can't be written to; give a folder of your own" in told
    assert any("--data-path data: shard 0.tar is not readable by you" in problem for problem in told)


def as_nobody(function: Callable[[], list[str]]) -> list[str]:
    """Call a function in a process without root's rights."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.write(writing, json.dumps(function()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def test_links_out_of_the_container(workplace) -> None:
    (workplace / "image.sif/.singularity.d").mkdir(parents=True)
    shard = workplace / "data/0.tar"
    shard.unlink()
    shard.symlink_to("/usr/bin/env")
    plan = inspect("--sif-path", "image.sif").plan

    def told(*binds: str) -> list[str]:
        words = [word for bind in binds for word in ("--bind", bind)]
        command = ["apptainer", "exec", *words, "image.sif", "python3"]
        return preflight.inspect(dataclasses.replace(plan, command=command)).problems

    assert told(str(workplace), "/usr/bin") == []
    (problem,) = told(str(workplace))
    assert "data/0.tar leads to /usr/bin/env, which is not in the container; add --bind /usr/bin" in problem


def test_a_job_in_a_container_outside_the_home_folder(monkeypatch) -> None:
    """Paths that Apptainer doesn't mount by itself, on a login node that lacks a folder of the nodes."""
    monkeypatch.setattr(storage, "_MOUNTED", ())
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        monkeypatch.chdir(name)
        write_checkpoint(Path("ckpt"))
        write_dataset(Path("data"))
        Path("image.sif/.singularity.d").mkdir(parents=True)
        argv = ["--sif-path", "image.sif", "--bind", "/on-the-nodes", "--submit", "-g", "2"]
        config = RunConfig.from_flags([*BASE, *argv])
        assert preflight.inspect(plan_job(config, {})).problems == []


@pytest.mark.skipif(os.getuid() != 0, reason="asks as another user, which only root can become")
def test_a_folder_that_cannot_be_searched(workplace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "locked/ckpt").mkdir(parents=True)
        write_checkpoint(folder / "ckpt")
        write_dataset(folder / "data")
        (folder / "locked").chmod(0o700)
        os.chdir(folder)
        told = as_nobody(lambda: inspect("--megatron-load-dir", "locked/ckpt").problems)
    assert any("locked/ckpt" in problem and "Permission denied" in problem for problem in told)


TWO = ["--node", "2", "-r", "1", "-m", "node0"]


@pytest.fixture
def shared(monkeypatch) -> None:
    monkeypatch.setattr(storage, "local_file_system", lambda path: None)


def test_nodes_that_share_no_folder(monkeypatch) -> None:
    monkeypatch.setattr(storage, "local_file_system", lambda path: "xfs")
    assert "--save-dir runs is on this machine's own file system (xfs), and all 2 nodes" in warning(
        *TWO, "-g", "1"
    )
    assert inspect("-g", "2").warnings == []


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*TWO, "-g", "1", "--interface", "lo"], "--interface lo reaches this machine only; there are eth0"),
        (["--node", "2", "-r", "1", "-m", "localhost", "-g", "1"], "is another machine on every node"),
        ([*TWO, "-g", "1", "--tp", "2"], "tensor-parallel groups reach over nodes"),
    ],
)
def test_nodes_that_do_not_meet(argv, words) -> None:
    assert inspect(*TWO, "-g", "2", "--tp", "2").warnings == []
    assert words in warning(*argv)


@pytest.mark.usefixtures("shared")
def test_a_host_that_nobody_knows() -> None:
    unknown = ["--node", "2", "-r", "1", "-g", "1", "-m", "nod0"]
    assert problem(*unknown) == (
        "--master-addr nod0: this machine knows no such host; give the name of node 0"
    )
    assert "knows no such host" in warning(*unknown, "--preflight-only")
    assert inspect(*unknown, "--dry-run").warnings == []


def test_transformer_engine_has_to_be_installed(monkeypatch) -> None:
    monkeypatch.setattr(machine, "installed", lambda package: package != "transformer_engine")
    with pytest.raises(ValueError, match="does not have it; use local, or give --sif-path"):
        software.check_interpreter(transformer_impl="transformer_engine")
    software.check_interpreter("image.sif", "transformer_engine")
    software.check_interpreter()


def test_transformer_engine_has_to_fit(monkeypatch) -> None:
    monkeypatch.setattr(software, "engine_problem", lambda: "Transformer Engine is 2.5.0")

    def look(*argv: str) -> preflight.Inspection:
        config = RunConfig.from_flags([*BASE, "--submit", "-g", "1", *argv])
        return preflight.inspect(plan_job(config, {}))

    (problem,) = look().problems
    assert problem == "Transformer Engine is 2.5.0; install such a one, or use --transformer-impl local"
    assert look("--transformer-impl", "local").problems == []
    found = look("--setup", "module load pytorch")
    assert found.problems == [] and "or let --setup bring it" in found.warnings[0]
    assert inspect().problems == []  # on CPUs it isn't used


def test_fp8_asks_for_transformer_engine(monkeypatch) -> None:
    monkeypatch.setattr(machine, "installed", lambda package: package != "transformer_engine")
    with pytest.raises(ValueError, match=r"^--fp8: .* has no Transformer Engine; use --bf16, or give --sif"):
        software.check_interpreter(fp8=True)
    software.check_interpreter("image.sif", fp8=True)


def test_fp8_asks_for_a_gpu_that_has_it(nvidia_smi, monkeypatch) -> None:
    nvidia_smi.write_text('#!/bin/sh\n[ "$1" = --query-gpu=compute_cap ] && echo 9.0 && echo 8.0\n')
    assert machine.compute_capability() == (8, 0)
    monkeypatch.setattr(machine, "installed", lambda package: True)
    words = "a GPU here has compute capability 8.0; use --bf16"
    gpu = {"CUDA_VISIBLE_DEVICES": "0"}

    def told(*argv: str) -> list[list[str]]:
        plan = make_plan(RunConfig.from_flags([*BASE, "-g", "1", *argv]), gpu, [])
        found = preflight.inspect(plan)
        return [
            [line for line in lines if "capability" in line] for lines in (found.problems, found.warnings)
        ]

    errors, warnings = told("--fp8")
    assert warnings == [] and len(errors) == 1 and words in errors[0]
    errors, warnings = told("--fp8", "--dry-run")  # may be for another machine
    assert errors == [] and words in warnings[0]
    assert told() == [[], []]
    nvidia_smi.write_text("#!/bin/sh\necho 9.0\n")
    monkeypatch.setattr(machine, "torch_cuda", lambda: (12, 8))
    assert told("--fp8") == [[], []]
    plan = make_plan(RunConfig.from_flags([*BASE, "-g", "1", "--fp8", "--fp8-recipe", "blockwise"]), gpu, [])
    assert any(
        "needs CUDA 12.9, and torch here has 12.8" in line for line in preflight.inspect(plan).problems
    )
    nvidia_smi.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert machine.compute_capability() is None and told("--fp8") == [[], []]


def test_torch_has_to_be_installed(monkeypatch) -> None:
    monkeypatch.setattr(machine, "installed", lambda package: False)
    assert "has no torch; run `make setup`" in problem()
    config = RunConfig.from_flags([*BASE, "--submit", "-g", "1", "--setup", "module load pytorch"])
    found = preflight.inspect(plan_job(config, {}))
    assert found.problems == [] and "or let --setup bring it" in found.warnings[0]


def test_optimizer_state_of_another_precision(workplace) -> None:
    write_checkpoint(workplace / "other", has_optimizer=True)
    RunConfig.from_flags([*BASE, "--bf16"]).save(str(workplace / "other/run_config.json"))
    argv = ["--megatron-load-dir", "other", "--load-optim"]
    assert "its optimizer state is of --bf16; go on with that" in problem(*argv, "--fp32")
    assert inspect(*argv, "--bf16").problems == inspect(*argv[:2], "--fp32").problems == []


def test_switches_that_megatron_core_wants_on(monkeypatch) -> None:
    assert "NVTE_FLASH_ATTN=0 in the environment" in problem("--environment", "NVTE_FLASH_ATTN=0")
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert "NVTE_FUSED_ATTN=0 in the environment: megatron-core wants 1; unset it" in problem()
    assert inspect("--environment", "NVTE_FUSED_ATTN=1").problems == []


def test_gpus_are_looked_at_where_there_are_some() -> None:
    assert "GPU" not in " ".join(inspect("--device", "cpu").say())
