"""Hosts on one machine: each with its own name, network, processes and mounts.

A host is a set of Linux namespaces that one process holds. When that process ends, the kernel kills every
other process of the host and takes its network and its mounts away. It dies with the process that made it,
so a test session leaves nothing behind however it ends, and sessions beside it cannot collide: no name,
port, bridge or subnet lies outside of the namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patience import HANG

NODES = ("node1", "node2")
INTERFACE = "ib0"
ADDRESSES = {"login": "10.99.0.254", "node1": "10.99.0.1", "node2": "10.99.0.2"}
TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")
SMALL_DISK = 128  # MiB: the checkpoints of a few runs of the demo
# The process that holds a host. Ignoring SIGCHLD lets the kernel reap what others leave behind.
_INIT = (
    "set -e; {setup}; hostname {name}; ip link set lo up; echo up; "
    "exec env --ignore-signal=CHLD sleep infinity"
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def why_not() -> str | None:
    """Return why this machine cannot have such hosts; None if it can."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)}: not installed"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    )
    return None if tried.returncode == 0 else "no new namespaces here: " + tried.stderr.decode().strip()


@dataclass(frozen=True)
class Host:
    """A running host.

    Attributes:
        name: its host name.
        pid: of its first process, as seen from here.
    """

    name: str
    pid: int

    def command(self, *argv: object, cwd: Path | None = None) -> list[str]:
        """The command that runs ``argv`` on this host."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", "--"]
        return [*enter, "env", f"--chdir={cwd or '/'}", *map(str, argv)]

    def popen(self, *argv: object, cwd: Path | None = None, **options: Any) -> subprocess.Popen[str]:
        """Start ``argv`` on this host."""
        return subprocess.Popen(self.command(*argv, cwd=cwd), text=True, **options)

    def run(
        self, *argv: object, cwd: Path | None = None, timeout: float = HANG, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` on this host; its exit code has to be 0 unless ``check`` is off."""
        command = self.command(*argv, cwd=cwd)
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{argv} on {self.name}: {done.stdout}{done.stderr}"
        return done

    def path(self, path: Path) -> Path:
        """Return what this host sees as ``path``, its own mounts included."""
        return Path(f"/proc/{self.pid}/root") / path.relative_to("/")

    def processes(self) -> dict[int, list[str]]:
        """Command line of every process of this host, by process id as seen from here."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")[:-1]
        return found


@dataclass(frozen=True)
class Site:
    """A login host and two nodes on one network, with one file system.

    Attributes:
        folder: of the whole site, where its small disk is mounted too.
    """

    folder: Path
    login: Host
    nodes: tuple[Host, ...]

    @property
    def small_disk(self) -> Path:
        """A disk of ``SMALL_DISK`` MiB that all hosts share."""
        return self.folder / "small"

    @property
    def hosts(self) -> tuple[Host, ...]:
        return (self.login, *self.nodes)


@contextlib.contextmanager
def start_site(folder: Path) -> Iterator[Site]:
    """Start login and nodes; ends everything that runs on them.

    Args:
        folder: for the files of the site.
    """
    (folder / "small").mkdir(parents=True)
    (folder / "slurm").mkdir()
    lines = [f"{address} {name}" for name, address in ADDRESSES.items()]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    with contextlib.ExitStack() as stack:
        setup = f"mount --bind {folder}/hosts /etc/hosts"
        setup += f"; mount -t tmpfs -o size={SMALL_DISK}m small {folder}/small"
        setup += f"; if [ -d /etc/slurm ]; then mount --bind {folder}/slurm /etc/slurm; fi"
        login = stack.enter_context(_start_host("login", setup))
        _on_network(login, "link", "add", "br0", "type", "bridge")
        _on_network(login, "address", "add", f"{ADDRESSES['login']}/24", "dev", "br0")
        _on_network(login, "link", "set", "br0", "up")
        # Started from the login host's mounts, which they get a copy of.
        inside = ["nsenter", f"--mount=/proc/{login.pid}/ns/mnt", "--"]
        nodes = [stack.enter_context(_start_host(name, "true", inside)) for name in NODES]
        for node in nodes:
            end = ["peer", "name", INTERFACE, "netns", str(node.pid)]
            _on_network(login, "link", "add", node.name, "type", "veth", *end)
            _on_network(login, "link", "set", node.name, "master", "br0", "up")
            _on_network(node, "address", "add", f"{ADDRESSES[node.name]}/24", "dev", INTERFACE)
            _on_network(node, "link", "set", INTERFACE, "up")
        yield Site(folder, login, tuple(nodes))


@contextlib.contextmanager
def _start_host(name: str, setup: str, inside: Sequence[str] = ()) -> Iterator[Host]:
    flags = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    init = _INIT.format(setup=setup, name=name)
    holder = subprocess.Popen(
        [*inside, "unshare", *flags, "sh", "-c", init],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        preexec_fn=_die_with_parent,
        start_new_session=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n", f"{name} did not start"
        (pid,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        yield Host(name, int(pid))
    finally:
        holder.kill()
        holder.wait()


def _on_network(host: Host, *argv: str) -> None:
    # In the network of the host alone, so that process ids mean what they do here.
    subprocess.run(["nsenter", f"--net=/proc/{host.pid}/ns/net", "--", "ip", *argv], check=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
