"""What command a config becomes on a machine with given GPUs, ports, interfaces and SLURM variables."""

from __future__ import annotations

import dataclasses
import shlex
import socket

import pytest

from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections.slurm import SlurmSection
from megatron_vlm.launch import machine, slurm, submit
from megatron_vlm.launch.launch_plan import LaunchPlan, make_plan, make_plans, plan_job
from megatron_vlm.launch.slurm import first_host

BASE = ["--name", "run", "--save-dir", "runs", "--data-path", "data", "--megatron-load-dir", "ckpt"]
BASE += ["--train-iters", "10"]


def plan(*argv: str, **environ: str) -> LaunchPlan:
    return make_plan(RunConfig.from_flags([*BASE, *argv]), {"CUDA_VISIBLE_DEVICES": "", **environ})


def environment(command: list[str]) -> dict[str, str]:
    assert command[0] == "env"
    return dict(arg.split("=", 1) for arg in command[1:] if "=" in arg and not arg.startswith("-"))


def after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


@pytest.fixture(autouse=True)
def two_networks(monkeypatch) -> None:
    monkeypatch.setattr(machine, "network_interfaces", lambda: ["lo", "eth0", "ib1", "ib0"])


def test_on_a_cpu_machine_all_means_one_process_per_model_part() -> None:
    result = plan("--tp", "2", "--pp", "2")
    assert (result.device, result.processes, result.world_size) == ("cpu", 4, 4)
    assert after(result.command, "--nproc-per-node") == "4"
    variables = environment(result.command)
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in variables
    assert plan("--tp", "2", "-g", "4").world_size == 4


def test_the_ranks_get_the_same_config_without_what_only_the_launcher_needs() -> None:
    argv = ["--tp", "2", "--stage", "1", "--dry-run", "--environment", "A=b c,d", "--partition", "p"]
    result = plan(*argv)
    at = result.command.index("megatron_vlm.training")
    given = RunConfig.from_flags([*BASE, *argv])
    launch = dataclasses.replace(given.launch, dry_run=False, environment=())
    expected = dataclasses.replace(given, launch=launch, slurm=SlurmSection())
    assert RunConfig.from_flags(result.command[at + 1 :]) == expected
    assert environment(result.command)["A"] == "b c,d"


def test_the_config_of_a_run_can_be_taken_anywhere(tmp_path) -> None:
    """What ranks are told is saved with the run; the next --config of it may be in another job."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}
    first = {**step, "SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NODEID": "1"}
    then = {**step, "SLURM_JOB_ID": "99", "SLURM_STEP_NODELIST": "b[1-2]", "SLURM_NODEID": "0"}
    argv = ["--tp", "2", "--num-workers", "2", "--interface", "ib0", "--gpu-ids", "1,3"]
    command = plan(*argv, **first, CUDA_VISIBLE_DEVICES="0,1,2,3").command
    saved = str(tmp_path / "config.json")
    RunConfig.from_flags(command[command.index("megatron_vlm.training") + 1 :]).save(saved)
    again = slurm.with_cluster_defaults(RunConfig.from_flags(["--config", saved]), then).launch
    assert (again.node, again.rank, again.master_addr, again.slurm_job_id) == (2, 0, "b1", "99")
    assert (again.slurm_output_name, again.gpus, again.gpu_ids, again.num_workers) == ("slurm-99", 2, (), 2)
    submit.make_job(plan_job(RunConfig.from_flags(["--config", saved, "--submit"]), {}), {})


def test_gpus() -> None:
    result = plan("--tp", "2", CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert (result.device, result.processes) == ("cuda", 4)
    variables = environment(result.command)
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["CUDA_DEVICE_MAX_CONNECTIONS"]) == ("4,5,6,7", "1")
    assert environment(plan("-g", "2", CUDA_VISIBLE_DEVICES="4,5,6").command)["CUDA_VISIBLE_DEVICES"] == "4,5"
    picked = plan("--gpu-ids", "6,4", CUDA_VISIBLE_DEVICES="4,5,6")
    assert (environment(picked.command)["CUDA_VISIBLE_DEVICES"], picked.processes) == ("6,4", 2)
    forced = plan("--device", "cpu", "-g", "3", CUDA_VISIBLE_DEVICES="4")
    assert (forced.device, forced.processes) == ("cpu", 3)
    assert environment(forced.command)["CUDA_VISIBLE_DEVICES"] == ""
    assert plan("--device", "cuda", "-g", "8", "--dry-run").device == "cuda"


def test_gpus_are_counted_without_torch(nvidia_smi) -> None:
    lines = ["GPU 0: X (UUID: a)", "  MIG 1g.10gb Device 0: (UUID: b)", "GPU 1: X (UUID: c)"]
    nvidia_smi.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    assert machine.visible_gpus({}) == ["0", "1"]
    assert machine.visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-a,3,-1,2"}) == ["GPU-a", "3"]
    nvidia_smi.write_text("#!/bin/sh\nexit 9\n")
    assert machine.visible_gpus({}) == []
    nvidia_smi.unlink()
    assert machine.visible_gpus({}) == []


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["-g", "3"], {"CUDA_VISIBLE_DEVICES": "0,1"}, ["--gpus 3", "--gpus 2", "--device cpu"]),
        (["--gpu-ids", "1,9"], {"CUDA_VISIBLE_DEVICES": "0,1"}, ["--gpu-ids 9", "0,1"]),
        (["--gpu-ids", "1"], {}, ["--gpu-ids", "no GPU"]),
        (["--device", "cuda"], {}, ["--device cuda", "--device cpu"]),
        (["--backend", "nccl"], {}, ["--backend nccl", "gloo"]),
        (["--interface", "ib7"], {}, ["--interface ib7", "ib0"]),
        (["--node", "2"], {}, ["--rank"]),
        (["--node", "2", "-r", "0"], {}, ["--master-addr"]),
        (["--node", "2", "-r", "2", "-m", "h"], {}, ["--rank 2", "0 to 1"]),
        (["--node", "3", "-r", "0", "-m", "h", "--tp", "2"], {}, ["--node 3", "--gpus"]),
    ],
)
def test_what_the_machine_does_not_have(argv, environ, words) -> None:
    with pytest.raises(ValueError) as error:
        plan(*argv, **environ)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_two_nodes() -> None:
    result = plan("--node", "2", "-r", "1", "-m", "node0", "-p", "9999", "--tp", "2", "--pp", "2")
    command = result.command
    assert [after(command, f) for f in ("--nnodes", "--node-rank", "--nproc-per-node")] == ["2", "1", "2"]
    assert [after(command, f) for f in ("--master-addr", "--master-port")] == ["node0", "9999"]
    assert result.world_size == 4
    assert environment(command)["GLOO_SOCKET_IFNAME"] == "ib0" == environment(command)["NCCL_SOCKET_IFNAME"]
    chosen = plan("--interface", "eth0", "--node", "2", "-r", "1", "-m", "node0", "-g", "1")
    assert environment(chosen.command)["GLOO_SOCKET_IFNAME"] == "eth0"


def test_what_the_user_has_exported_stays() -> None:
    variables = environment(plan(OMP_NUM_THREADS="3", GLOO_SOCKET_IFNAME="eth0", PYTHONPATH="/mine").command)
    assert (variables["OMP_NUM_THREADS"], variables["GLOO_SOCKET_IFNAME"]) == ("3", "eth0")
    assert variables["PYTHONPATH"].endswith(":/mine")


def test_inside_slurm_srun_tells_nodes_rank_and_master() -> None:
    step = {
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_NODEID": "1",
    }
    result = plan("-g", "1", **step)
    launch = result.config.launch
    assert (launch.node, launch.rank, launch.master_addr, launch.slurm_job_id) == (2, 1, "gpu07", "42")
    assert plan("-g", "1", "-m", "other", **step).config.launch.master_addr == "other"
    with pytest.raises(ValueError, match="--ntasks-per-node 1"):
        plan("-g", "1", **{**step, "SLURM_STEP_NUM_TASKS": "8"})
    alone = plan("--node", "1", **step).config.launch
    assert (alone.node, alone.rank, alone.master_addr) == (1, 0, None)


def test_in_a_step_port_address_and_log_come_from_the_job() -> None:
    step = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1"}
    step |= {
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "n[1-2].site.org",
    }
    first = plan("-g", "1", "--master-suffix", "i", **step).config.launch
    assert (first.master_addr, first.slurm_output_name) == ("n1i.site.org", "slurm-42")
    other = plan("-g", "1", **{**step, "SLURM_JOB_ID": "43"}).config.launch
    assert first.master_port != other.master_port and 1024 < first.master_port < 32768
    assert plan("-g", "1", "-p", "9999", **step).config.launch.master_port == 9999
    task = plan("-g", "1", SLURM_JOB_ID="9", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2").config.launch
    assert task.slurm_output_name == "slurm-7_2"


@pytest.mark.parametrize(
    ("argv", "environ", "nodes"),
    [
        ([], {}, 0),
        ([], {"SLURM_JOB_NUM_NODES": "2"}, 2),  # salloc's shell on a login node
        ([], {"SLURM_JOB_NUM_NODES": "1"}, 1),
        (["--node", "1"], {"SLURM_JOB_NUM_NODES": "2"}, 1),
        ([], {"SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1"}, 2),  # a batch script of one's own
        ([], {"SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1"}, 0),
        (["--node", "1"], {"SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1"}, 0),
        (["--node", "2", "--rank", "0"], {"SLURM_JOB_NUM_NODES": "2"}, 0),
        ([], {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_ID": "0"}, 0),
        # salloc's shell in an interactive step on the first node
        ([], {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_ID": "4294967290"}, 2),
    ],
)
def test_where_run_py_starts_itself_on_all_nodes(argv, environ, nodes) -> None:
    assert slurm.nodes_to_start_on(RunConfig.from_flags([*BASE, *argv]), environ) == nodes


def test_the_step_that_run_py_starts() -> None:
    command = slurm.step_command(2, {"SLURM_JOB_CPUS_PER_NODE": "72(x2),36"}, ["python3", "run.py", "a b"])
    assert command[:7] == ["srun", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1"]
    assert command[7:9] == ["--cpus-per-task", "36"] and command[-3:] == ["python3", "run.py", "a b"]
    given = {"SLURM_JOB_CPUS_PER_NODE": "72", "SLURM_CPUS_PER_TASK": "8"}
    assert slurm.cpus_per_node(given) == 8 and slurm.cpus_per_node({}) is None
    # A job with room for a task for each GPU, in which one task of a node takes the place of all.
    assert slurm.cpus_per_node({**given, "SLURM_TASKS_PER_NODE": "8(x2)"}) == 64
    with pytest.raises(ValueError, match="--node 3: this SLURM job has 2"):
        slurm.nodes_to_start_on(RunConfig.from_flags([*BASE, "--node", "3"]), {"SLURM_JOB_NUM_NODES": "2"})


def test_many_nodes_have_one_command() -> None:
    config = RunConfig.from_flags([*BASE, "--node", "64", "-g", "8", "--device", "cuda", "--dry-run"])
    problems: list[str] = []
    (only,) = make_plans(config, {"CUDA_VISIBLE_DEVICES": ""}, problems, problems)
    assert after(only.command, "--nnodes") == "64" and only.world_size == 512
    assert any("nodes 1 to 63" in note for note in only.notes)
    config = RunConfig.from_flags([*BASE, "--node", "8", "-g", "8", "--device", "cuda", "--dry-run"])
    plans = make_plans(config, {"CUDA_VISIBLE_DEVICES": ""}, problems, problems)
    assert [after(plan.command, "--node-rank") for plan in plans] == list("01234567")
    # The note is true.
    pairs = [*zip(plans[0].command, plans[5].command, strict=True)]
    differ = [at for at, (first, sixth) in enumerate(pairs) if first != sixth]
    assert [pairs[at] for at in differ] == [("0", "5")]
    assert [plans[0].command[at - 1] for at in differ] == ["--node-rank"]


def test_what_only_the_nodes_have_is_no_error_on_another_machine() -> None:
    argv = [*BASE, "--node", "2", "-g", "2", "--interface", "ib7", "--preflight-only"]
    problems: list[str] = []
    doubts: list[str] = []
    make_plans(RunConfig.from_flags(argv), {"CUDA_VISIBLE_DEVICES": ""}, problems, doubts)
    assert problems == [] and any("--interface ib7: not on this machine" in doubt for doubt in doubts)
    argv += ["--rank", "1", "-m", "node0"]  # it is one of them
    make_plans(RunConfig.from_flags(argv), {"CUDA_VISIBLE_DEVICES": ""}, problems, [])
    assert any("--interface ib7: not on this machine" in problem for problem in problems)


def test_a_job_that_starts_again_does_not_start_over() -> None:
    first = plan("--restart", SLURM_JOB_ID="7")
    again = plan("--restart", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert "--restart" in first.command and "--restart" not in again.command
    assert "without --restart" in again.notes[-1] and not any("--restart" in note for note in first.notes)


def test_a_step_with_several_tasks_on_its_node() -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n1"}
    step |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "8"}
    with pytest.raises(ValueError, match="use srun --ntasks-per-node 1"):
        plan(**step)
    assert plan("--node", "1", **step).world_size == 1  # several runs, side by side
    assert plan(**step, SLURM_PTY_PORT="4711").world_size == 1  # typed in a shell of srun --pty


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[3-5,9],m", "n3"),
        ("n[01,04]", "n01"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("n7,n[8-9]", "n7"),
    ],
)
def test_first_host(node_list, host) -> None:
    assert first_host(node_list) == host


def test_a_busy_port() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        busy = listener.getsockname()[1]
        result = plan("-p", str(busy))
        port = int(after(result.command, "--master-port"))
        assert port in machine.PORT_RANGE
        assert result.notes == [f"port {busy} is busy, using {port}"]
        with pytest.raises(ValueError, match=rf"--master-port {busy} is busy.* is free.*every node"):
            plan("-p", str(busy), "--node", "2", "-r", "0", "-m", "h", "-g", "1")
        with pytest.raises(ValueError, match=rf"--rdzv-port {busy} is busy"):
            plan("--rdzv-port", str(busy))
        # Only node 0 listens.
        assert after(
            plan("-p", str(busy), "--node", "2", "-r", "1", "-m", "h", "-g", "1").command, "--master-port"
        ) == str(busy)


def test_two_launchers_that_start_together_get_different_ports() -> None:
    first, second = plan(), plan()
    assert after(first.command, "--master-port") != after(second.command, "--master-port")


def test_odd_names_come_back_from_the_quoted_command() -> None:
    name = 'it\'s $HOME `x` "q" -y'
    result = plan("--name", name, "--tp", "2")
    assert after(shlex.split(shlex.join(result.command)), "--name") == name


def test_torchrun_takes_none_of_the_training_flags_for_its_own() -> None:
    from torch.distributed.run import parse_args

    # --node, --rank, --log-interval and others look like torchrun's own flags, or like the start of one.
    command = plan("--log-interval", "5", "--tp", "2", "--rdzv-port", "9904", "--master-addr", "h").command
    torchrun = command[command.index("megatron_vlm.launch.torchrun") + 1 :]
    parsed = parse_args(torchrun)
    assert (parsed.module, parsed.training_script) == (True, "megatron_vlm.training")
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank, parsed.master_port) == ("1", "2", 0, 9904)
    assert parsed.training_script_args == torchrun[torchrun.index("megatron_vlm.training") + 1 :]


def test_what_deterministic_needs_on_gpus_is_in_the_command() -> None:
    variables = environment(plan("--deterministic", CUDA_VISIBLE_DEVICES="0").command)
    assert variables["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert variables["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    assert variables["NCCL_ALGO"] == "Ring"
    for without in (plan(CUDA_VISIBLE_DEVICES="0"), plan("--deterministic")):
        assert "CUBLAS_WORKSPACE_CONFIG" not in environment(without.command)


def test_fp8_needs_gpus() -> None:
    assert "--fp8" in plan("--fp8", CUDA_VISIBLE_DEVICES="0").command
    with pytest.raises(ValueError, match="--fp8 needs GPUs, and this machine has none; use --bf16"):
        plan("--fp8")
    plan("--fp8", "--device", "cpu")  # not the machine's fault; a rule of the flags says so


def test_transformer_engine_needs_gpus() -> None:
    engine = ["--transformer-impl", "transformer_engine"]
    assert after(plan(*engine, CUDA_VISIBLE_DEVICES="0").command, engine[0]) == engine[1]
    with pytest.raises(ValueError, match="--transformer-impl transformer_engine needs GPUs; use local"):
        plan(*engine)
    with pytest.raises(ValueError, match="needs GPUs, not --device cpu; use local"):
        plan(*engine, "--device", "cpu")
