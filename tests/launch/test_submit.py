"""run.py --submit and its batch script; stubs that record their arguments stand for sbatch and srun.

That a real SLURM takes the script is shown in tests/cluster.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections.slurm import SlurmSection
from megatron_vlm.launch import status, submit
from megatron_vlm.launch.container import CHECKOUT
from megatron_vlm.launch.launch_plan import make_plan, plan_job

RUN = str(CHECKOUT / "scripts" / "train" / "run.py")
BASE = ["--name", "run", "--save-dir", "runs", "--data-path", "data", "--megatron-load-dir", "ckpt"]
BASE += ["--train-iters", "10", "-g", "4", "--node", "2"]
SHELLCHECK = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
# Writes its arguments, each ended by a NUL, then does what $DO says.
STUB = '#!/bin/sh\nprintf \'%s\\0\' "$@" >> "$RECORD.${0##*/}"\neval "${DO:-}"\n'
# What shells and sbatch have signs for, and what argv can hold at all: everything but NUL.
ODD = st.text(st.one_of(st.sampled_from(" '\"$`\\\n\t#;&|<>()*?[]{}~!%=,-:日é"), st.characters(
    exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=20)  # fmt: skip


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch) -> Path:
    """A folder on PATH with stubs; what they were called with is in record.<name> beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "python"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    return tmp_path


def recorded(folder: Path, name: str) -> list[str]:
    """Arguments of all calls since the last look."""
    path = folder / f"record.{name}"
    if not path.exists():
        return []
    words = os.fsdecode(path.read_bytes()).split("\0")[:-1]
    path.unlink()
    return words


def job(*argv: str, **environ: str) -> submit.Job:
    return submit.make_job(plan_job(RunConfig.from_flags([*BASE, *argv]), {}), environ)


def run_script(folder: Path, script: str, *args: str, code: int = 0, **environ: str) -> tuple[int, str]:
    """Run a batch script whose step ends with ``code``; returns its exit code and what it says."""
    done = subprocess.run(
        ["bash", "-c", script, "script", *args],
        env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8", **environ,
             "DO": f'[ "${{0##*/}}" != srun ] || exit {code}'},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def directives(script: str) -> list[str]:
    return [line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")]


def run_flags(words: list[str]) -> RunConfig:
    """The run that the step of a batch script starts."""
    return RunConfig.from_flags(words[words.index(RUN) + 1 :])


def shellcheck(script: str) -> None:
    done = subprocess.run([SHELLCHECK, "-"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_asked_of_slurm() -> None:
    script = job(
        *(
            "--account",
            "me",
            "--partition",
            "gpu",
            "--qos",
            "long",
            "--time",
            "4:00:00",
            "--exclude",
            "n[1,3]",
        ),
        *("--constraint", "a100&nvme", "--mail-user", "me@x.org", "--mail-type", "END,FAIL", "--save-optim"),
        *("--dependency", "afterok:5", "--cpus-per-gpu", "12", "--sbatch", "mem=0", "exclusive"),
    ).script
    asked = directives(script)
    assert {"--account=me", "--partition=gpu", "--qos=long", "--time=4:00:00", "--dependency=afterok:5"} <= {
        *asked
    }
    assert {'--exclude="n[1,3]"', '--constraint="a100&nvme"', "--mail-user=me@x.org"} <= {*asked}
    assert {"--mail-type=END,FAIL", "--job-name=run", "--nodes=2", "--ntasks-per-node=1"} <= {*asked}
    assert {"--gres=gpu:4", "--cpus-per-task=48", "--signal=USR1@300", "--requeue"} <= {*asked}
    assert asked[-2:] == ["--mem=0", "--exclusive"] and "--open-mode=append" in asked
    assert "--no-requeue" in directives(job().script), "a failed node would begin anew"
    assert "--gpus-per-node=h100:4" in directives(job("--gpu-request=--gpus-per-node=h100:{gpus}").script)
    on_cpus = directives(job("--device", "cpu", "--cpus-per-gpu", "2").script)
    assert "--cpus-per-task=8" in on_cpus and not any("gpu" in option for option in on_cpus)


def test_the_step_runs_the_flags_as_they_are_now(stubs: Path) -> None:
    (stubs / "site.json").write_text('{"environment": {"A": "b"}, "interface": "ib0", "partition": "p"}')
    argv = ["--site", str(stubs / "site.json"), "--setup", "export FROM_SETUP=1,2"]
    code, said = run_script(stubs, job(*argv).script)
    assert (code, said) == (0, "")
    (stubs / "site.json").unlink()
    words = recorded(stubs, "srun")
    assert words[:2] == ["--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    assert words[words.index(RUN) - 1] == sys.executable
    config = run_flags(words)
    assert (config.launch.environment, config.launch.interface) == (("A=b",), "ib0")
    assert (config.launch.gpus, config.launch.node, config.parallel.device) == (4, 2, "cuda")
    assert config.slurm == SlurmSection()
    _, said = run_script(stubs, job("--setup", "echo 'a  b'; echo $HOME").script, HOME="/h")
    assert said == "a  b\n/h\n"


@pytest.mark.parametrize(
    ("argv", "restarts", "code", "requeued"),
    [
        (["--save-optim"], "", 75, True),
        (["--save-optim"], "9", 75, True),
        (["--save-optim"], "10", 75, False),
        (["--save-optim", "--max-requeues", "0"], "", 75, False),
        (["--save-optim"], "", 0, False),
        (["--save-optim"], "", 3, False),
        (["--save-optim"], "", 137, False),
        ([], "", 75, False),
    ],
)
def test_requeued_when_saved_and_only_then(stubs: Path, argv, restarts, code, requeued) -> None:
    environ = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    ended, said = run_script(stubs, job(*argv).script, code=code, **environ)
    assert ended == code, "the job ends as its run does"
    assert recorded(stubs, "scontrol") == (["requeue", "7"] if requeued else [])
    assert ("saved; requeued, " in said) == requeued


def test_a_chain_goes_on_until_the_run_ends(stubs: Path) -> None:
    (stubs / "runs/run/slurm").mkdir(parents=True)
    script = job("--chain", "3", "--save-optim").script
    shellcheck(script)
    assert run_script(stubs, script, code=75)[0] == 75
    assert run_script(stubs, script, "2", code=0)[0] == 0
    assert recorded(stubs, "srun") and not recorded(stubs, "scontrol")
    code, said = run_script(stubs, script, "3")
    assert (code, "the run has ended before: job 7, exit code 0" in said, recorded(stubs, "srun")) == (
        0,
        True,
        [],
    )
    run_script(stubs, script)
    assert recorded(stubs, "srun"), "the first job of a chain begins"


def test_only_the_first_job_of_a_chain_starts_over(stubs: Path) -> None:
    made = job("--save-optim", "--chain", "2", "--restart")
    for number, starts_over in (("1", True), ("2", False)):
        run_script(stubs, made.script, number, code=75)
        assert run_flags(recorded(stubs, "srun")).checkpoint.restart is starts_over
    shellcheck(made.script)


def test_values_that_are_words_of_the_shell() -> None:
    for word in ("then", "do", "fi", "esac", "{", "!", "[[", "=", "=x"):
        shellcheck(job("--data-path", word).script)


def test_two_scripts_of_one_second(stubs: Path, monkeypatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    monkeypatch.setenv("DO", "echo 42")
    for name in ("now.sh", "now-2.sh", "now-3.sh"):
        made = job("--save-optim")
        assert os.path.basename(made.path) == name
        submit.hand_in(made)


def test_a_run_that_is_in_the_queue_already(stubs: Path, monkeypatch) -> None:
    config = RunConfig.from_flags([*BASE, "--save-dir", str(stubs), "--save-optim"])
    submit.check_queue(config)
    status.note_queued(config.checkpoint.run_dir, "42", ["run.py"], more_jobs=["43"])
    for state, free in (("PENDING", False), ("RUNNING", False), ("COMPLETING", True), ("", True)):
        monkeypatch.setattr(submit, "job_state", lambda job, state=state: f"{state} None" * (job == "43"))
        if free:
            submit.check_queue(config)
            continue
        with pytest.raises(ValueError, match=r"job 43 of this run is .* --dependency afterany:43"):
            submit.check_queue(config)
    slurm = dataclasses.replace(config.slurm, dependency="afterany:43")
    submit.check_queue(dataclasses.replace(config, slurm=slurm))


def test_an_array_is_several_runs(stubs: Path) -> None:
    script = job("--array", "0-3", "--name", "it's", "--seed", "10").script
    shellcheck(script)
    run_script(stubs, script, SLURM_ARRAY_TASK_ID="3")
    config = run_flags(recorded(stubs, "srun"))
    assert (config.checkpoint.name, config.training.seed) == ("it's-3", 13)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=ODD, path=ODD, value=ODD, template=st.booleans())
def test_odd_values_come_back_from_the_batch_script(stubs: Path, name, path, value, template) -> None:
    name = name.replace("/", "").replace("\n", " ").replace("\\", "")
    if name in ("", ".", "..") or "\r" in name:
        name = "x"
    argv = [f"--name={name}", f"--data-path={path}", f"--environment=A={value}", f"--job-name={name}"]
    if template:
        argv.append("--save-optim")
    config = RunConfig.from_flags([*BASE, *argv])
    script = submit.make_job(plan_job(config, {}), {}).script
    assert all(line.startswith(("#!", "#SBATCH ")) for line in script.split("\n\n")[0].split("\n"))
    assert run_script(stubs, script) == (0, "")
    ran = run_flags(recorded(stubs, "srun"))
    assert (ran.checkpoint, ran.data, ran.launch) == (config.checkpoint, config.data, config.launch)
    shellcheck(script)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=ODD, value=ODD)
def test_odd_values_come_back_from_the_printed_command(stubs: Path, path, value) -> None:
    argv = [*BASE, "--node=1", f"--data-path={path}", f"--environment=A={value}", "--device=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(stubs / "bin" / "python"))
        command = make_plan(RunConfig.from_flags(argv), {}).command
    done = subprocess.run(
        ["bash", "-c", shlex.join(command)],
        env={**os.environ, "DO": 'printf "%s\\0" "$A" >> "$RECORD.python"'},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    words = recorded(stubs, "python")
    assert words == [*command[command.index(str(stubs / "bin" / "python")) + 1 :], value]


def test_sbatch_gets_the_script_and_its_id_comes_back(stubs: Path, monkeypatch) -> None:
    monkeypatch.setenv("DO", "echo '42;cluster'")
    made = job("--save-optim", "--name", 'it\'s "$x"')
    assert submit.hand_in(made) == ["42"]
    assert recorded(stubs, "sbatch") == ["--parsable", made.path]
    assert Path(made.path).read_text() == made.script
    assert str(stubs / 'runs/it\'s "$x"/slurm/42.log') in submit.what_now(made, ["42"], "x").replace(
        "'\"'\"'", "'"
    )
    chain = job("--save-optim", "--chain", "3", "--name", "chain")
    assert submit.hand_in(chain) == ["42"] * 3
    later = ["--parsable", "--dependency=afterany:42", chain.path]
    assert recorded(stubs, "sbatch") == ["--parsable", chain.path, *later, "2", *later, "3"]
    assert stat.S_ISREG(os.stat(chain.path).st_mode)


def test_what_sbatch_refuses_is_one_line_and_leaves_nothing(stubs: Path, monkeypatch) -> None:
    monkeypatch.setenv(
        "DO", "echo 'sbatch: error: invalid partition specified: x\nsbatch: error: no' >&2; exit 1"
    )
    before = sorted(stubs.rglob("*"))
    with pytest.raises(ValueError, match=r"^sbatch: invalid partition specified: x; no$"):
        submit.hand_in(job("--partition", "x"))
    recorded(stubs, "sbatch")
    assert sorted(stubs.rglob("*")) == before
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ValueError, match="sbatch on PATH"):
        submit.hand_in(job())
    assert sorted(stubs.rglob("*")) == before


def test_ctrl_c_amid_a_chain_cancels_what_is_queued(stubs: Path, monkeypatch) -> None:
    (stubs / "bin/scancel").write_text(STUB)
    (stubs / "bin/scancel").chmod(0o755)
    real = submit._sbatch

    def interrupted(command: list[str], number: int, previous: str | None) -> str:
        if number == 3:
            raise KeyboardInterrupt
        return real(command, number, previous)

    monkeypatch.setenv("DO", "echo 42")
    monkeypatch.setattr(submit, "_sbatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit.hand_in(job("--save-optim", "--chain", "3"))
    assert recorded(stubs, "scancel") == ["42", "42"]
    assert not (stubs / "runs").exists()


def test_exported_variables_of_sbatch_do_not_win_over_flags() -> None:
    made = job(
        "--partition", "p", "--time", "50:00", SBATCH_PARTITION="q", SBATCH_TIMELIMIT="1", SBATCH_QOS="z"
    )
    assert made.command[:6] == ["env", "-u", "SBATCH_PARTITION", "-u", "SBATCH_TIMELIMIT", "sbatch"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpus", "-1"], "--submit needs --gpus"),
        (["--rank", "0"], "--rank is SLURM's"),
        (["--gpu-ids", "0,1,2,3"], "--gpu-ids"),
        (["--chain", "2"], "--chain needs --save-optim"),
        (["--max-requeues", "1"], "--max-requeues needs --save-optim"),
        (["--partition", "a\n#SBATCH --x"], "line break"),
        (["--sbatch", "mem=0\nrm -rf x"], "line break"),
        (["--sbatch", "nodes=4"], "--sbatch nodes=4: use run.py's --node"),
        (["--sbatch=-t 30"], "--sbatch -t 30: use run.py's --time"),
        (["--account", ""], "--account is empty"),
        (["--name", "a\\b"], "backslash"),
        (["--save-dir", "a\nb"], "line break"),
        (["--gpu-request", "gres"], "--gpu-request"),
        (["--array", "1-2", "--chain", "2"], "--array and --chain"),
        (["--time", "4:00"], "--signal-seconds 300"),
        (["--environment", "A B"], "NAME=value"),
        (["--bind", "/a"], "--bind does nothing without --sif-path"),
        (["--spike-threshold", "3"], "--spike-threshold does nothing without --alert-spike"),
    ],
)
def test_what_does_not_fit_a_job(argv: list[str], words: str) -> None:
    with pytest.raises(ValueError) as error:
        job(*argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def load_run():
    spec = importlib.util.spec_from_file_location("run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_run_py_to_the_queue(stubs: Path, monkeypatch, capsys) -> None:
    run = load_run()
    monkeypatch.setattr(run, "show", lambda plan, found: True)  # there are no data here
    monkeypatch.setenv("DO", "echo 42")
    before = sorted(stubs.rglob("*"))
    assert run.main([*BASE, "--submit", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/bin/bash\n#SBATCH") and shlex.split(shown.splitlines()[-1])[:1] == ["sbatch"]
    assert sorted(stubs.rglob("*")) == before, "a dry run touches no file"
    assert run.main([*BASE, "--submit", "--save-optim"]) == 0
    assert "scancel 42" in capsys.readouterr().out
    queued = status.read_status("runs/run")
    assert (queued["state"], queued["job_id"], queued["more_jobs"]) == ("queued", "42", [])
