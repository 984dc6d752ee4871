"""A site file under a run's flags, and time limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections.slurm import time_limit

SITE = {
    "partition": "gpu",
    "gpus": 4,
    "gpu-request": "--gpus-per-node={gpus}",
    "setup": ["module load a,b"],
    "bind": ["/scratch"],
    "environment": {"HF_HOME": "/scratch/hf", "A": "x,y=z"},
}


def from_site(folder: Path, site: object, *argv: str) -> RunConfig:
    path = folder / "site.json"
    path.write_text(json.dumps(site))
    return RunConfig.from_flags([*argv, "--site", str(path)])


def test_a_sites_defaults_and_what_wins_over_them(tmp_path: Path) -> None:
    config = from_site(tmp_path, SITE, "--sif-path", "x.sif")
    assert (config.slurm.partition, config.launch.gpus) == ("gpu", 4)
    assert config.launch.environment == ("HF_HOME=/scratch/hf", "A=x,y=z")
    assert (config.slurm.setup, config.launch.bind) == (("module load a,b",), ("/scratch",))
    assert RunConfig.from_flags(config.to_flags()) == config
    given = from_site(
        tmp_path, SITE, "--partition", "big", "--setup", "x", "--bind", "/y", "--sif-path", "x.sif"
    )
    assert (given.slurm.partition, given.slurm.setup) == ("big", ("module load a,b", "x"))
    assert given.launch.bind == ("/scratch", "/y")
    assert from_site(tmp_path, SITE).launch.bind == (), "a site's binds are for runs in a container"
    assert from_site(tmp_path, SITE, "--gpu-ids", "0,2").launch.gpus == -1
    (tmp_path / "run.json").write_text('{"partition": "from-config"}')
    assert from_site(tmp_path, SITE, "--config", str(tmp_path / "run.json")).slurm.partition == "from-config"
    site = str(tmp_path / "site.json")
    assert RunConfig.from_flags([], site=site).slurm.partition == "gpu"
    assert RunConfig.from_flags([], site="").slurm.partition is None


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ({"partitoin": "x"}, "unknown key partitoin; did you mean partition?"),
        ({"tp": 2}, "tp is a run's, not a site's"),
        ({"gpus": "many"}, "--gpus"),
        ({"setup": "module load x"}, "expected a list"),
        ({"environment": {"A B": "c"}}, "NAME=value"),
        ([], "expected a JSON object"),
    ],
)
def test_a_site_file_with_a_mistake(tmp_path: Path, site: object, words: str) -> None:
    with pytest.raises(ValueError) as error:
        from_site(tmp_path, site)
    assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"--site none\.json: No such file"):
        RunConfig.from_flags(["--site", "none.json"])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),  # as man sbatch has them
        ("4:30", 270),
        ("1:00:05", 3605),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-2:30:01", 95401),
        ("UNLIMITED", None),
        ("0", None),
        ("-1", None),
    ],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert time_limit(text) == seconds


@pytest.mark.parametrize("text", ["4h", "soon", "1.5", "1:2:3:4"])  # sbatch: Invalid --time specification
def test_what_is_no_time_limit(text: str) -> None:
    with pytest.raises(ValueError, match=r"--time .*: write minutes"):
        time_limit(text)


def test_what_describes_a_job_needs_submit(tmp_path: Path) -> None:
    typed = ["--partition", "big", "--time", "30"]
    with pytest.raises(ValueError, match="--partition does nothing without --submit"):
        RunConfig.from_flags(typed).check_typed(typed)
    RunConfig.from_flags([*typed, "--submit"]).check_typed([*typed, "--submit"])
    from_site(tmp_path, SITE).check_typed([])  # what a site says is for all runs


def test_a_value_that_begins_with_a_dash() -> None:
    with pytest.raises(ValueError, match="written --sbatch=-"):
        RunConfig.from_flags(["--sbatch", "--exclusive"])
