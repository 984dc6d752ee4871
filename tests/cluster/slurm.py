"""SLURM on the hosts of a site: munge and the controller on the login host, a node daemon on each node."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.cluster.hosts import ADDRESSES, Host, Site
from tests.patience import wait_until

TOOLS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "salloc",
    "srun",
    "scontrol",
    "scancel",
    "squeue",
    "sinfo",
)
GPUS = 4
# Credentials that expire soon, and short intervals: a requeued job starts again in seconds, not minutes.
# Nothing is given up for being late, since the machine may be busy: a test says itself that a node is down.
CONFIG = """
ClusterName=test
SlurmctldHost=login({login})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdTimeout=1800
MessageTimeout=100
TCPTimeout=100
MailProg=/bin/true
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=5
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr={address} CPUs=8 RealMemory=2000 Gres=gpu:{gpus}"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED")


def why_not() -> str | None:
    """Return why there can be no SLURM here; None if there can."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    return f"{', '.join(missing)}: not installed; see .ci/install-cluster" if missing else None


class Slurm:
    """A running SLURM; ``login`` is where its commands are typed."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.login = site.login
        self.folder = site.folder / "slurm"  # /etc/slurm on every host
        self._daemons: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        """Write the configuration, start the daemons, and wait until both nodes are idle."""
        (self.folder / "state").mkdir()
        for number in range(GPUS):
            # Device nodes that nobody opens: NVIDIA's major number.
            os.mknod(self.folder / f"nvidia{number}", 0o666 | 0o020000, os.makedev(195, number))
        names = ",".join(node.name for node in self.site.nodes)
        devices = f"File={self.folder}/nvidia[0-{GPUS - 1}] Flags=nvidia_gpu_env"
        (self.folder / "gres.conf").write_text(f"NodeName={names} Name=gpu {devices}\n")
        nodes = [NODE.format(name=n.name, address=ADDRESSES[n.name], gpus=GPUS) for n in self.site.nodes]
        config = CONFIG.format(login=ADDRESSES["login"], folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(config)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        # munged looks at who may write where its files are.
        self.folder.parent.chmod(0o755)
        files = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in files.items()]
        self._start(self.login, "munged", "--foreground", "--force", *options)
        wait_until((self.folder / "munge.socket").exists, "munged listens")
        self._start(self.login, "slurmctld", "-D", "-c")
        for node in self.site.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def start_node(self, node: Host) -> None:
        """Start the node daemon, which forgets what ran before."""
        self._start(node, "slurmd", "-D", "-c", "-N", node.name)

    def stop_node(self, node: Host) -> None:
        """Kill the node daemon; what it has started runs on."""
        for pid, words in node.processes().items():
            if words[:1] and words[0].endswith("slurmd"):
                os.kill(pid, 9)
        self._daemons.pop(f"slurmd.{node.name}").wait()

    def give_up_node(self, node: Host) -> None:
        """Tell the controller that a node is down, as it finds out by itself after ``SlurmdTimeout``."""
        self.login.run("scontrol", "update", f"nodename={node.name}", "state=down", "reason=silent")

    def wait_for_nodes(self) -> None:
        """Wait until all nodes are idle."""

        def idle() -> bool:
            shown = self.login.run("sinfo", "--noheader", "--states=idle", "--format=%D", check=False).stdout
            return shown.strip() == str(len(self.site.nodes))

        wait_until(idle, "all nodes are idle", self.logs)

    def submit(self, script: Path) -> str:
        """Hand a batch script to ``sbatch`` on the login host.

        Returns:
            The job's id.
        """
        return self.login.run("sbatch", "--parsable", script, cwd=script.parent).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what ``scontrol show job`` tells."""
        return dict(re.findall(r"(\w+)=(\S*)", self.login.run("scontrol", "show", "job", job).stdout))

    def wait_for(self, job: str, *states: str) -> dict[str, str]:
        """Wait until the job is in one of these states (by default, has ended).

        Returns:
            What ``scontrol show job`` tells then.
        """
        wanted = states or ENDED
        found: dict[str, str] = {}

        def there() -> bool:
            found.update(self.job(job))
            return found["JobState"] in wanted

        wait_until(there, f"job {job} is {' or '.join(wanted)}", lambda: self._seen(found))
        return found

    def wait_while_it_runs(self, job: str, done: Callable[[], bool]) -> None:
        """Wait until the job runs and ``done``; fail when it ends before."""
        self.wait_for(job, "RUNNING")

        def ended_or_done() -> bool:
            return done() or self.job(job)["JobState"] in ENDED

        wait_until(ended_or_done, f"job {job} is there", lambda: self._seen(self.job(job)))
        assert done(), self._seen(self.job(job))

    def _seen(self, job: dict[str, str]) -> str:
        output = Path(job["StdOut"])
        return f"{job}\n{output.read_text() if output.exists() else ''}\n{self.logs()}"

    def jobs(self) -> list[str]:
        """Ids of the jobs that wait or run."""
        return self.login.run("squeue", "--noheader", "--format=%A").stdout.split()

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}:\n" + log.read_text()[-2000:] for log in logs)

    def end_all_jobs(self) -> None:
        """Cancel what a test has left."""
        if self.jobs():
            self.login.run("scancel", "--user=root")
            wait_until(lambda: not self.jobs(), "no job is left", self.logs)

    def _start(self, host: Host, program: str, *argv: str) -> None:
        name = f"{program}.{host.name}"
        with open(self.folder / f"{name}.log", "a") as log:
            self._daemons[name] = host.popen(
                program, *argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def start(site: Site) -> Slurm:
    """Start SLURM on a site; it ends with the site's hosts."""
    slurm = Slurm(site)
    slurm.start()
    return slurm
