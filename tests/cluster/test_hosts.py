"""Two hosts without SLURM: the same command on each, with --node, --rank, --master-addr and --master-port."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.demo import CHECKOUT, RUN, Demo, losses
from tests.cluster.hosts import INTERFACE, Site
from tests.patience import HANG, wait_until

pytestmark = pytest.mark.cluster


def test_the_hosts_are_hosts(site: Site) -> None:
    """Names, addresses and process ids of their own, one network, the same files."""
    first, second = site.nodes
    assert [host.run("hostname").stdout.strip() for host in site.hosts] == ["login", "node1", "node2"]
    assert INTERFACE in first.run("ip", "-brief", "address").stdout
    program = "import socket; s = socket.create_server(('', 9)); print('up', flush=True); s.accept()"
    with first.popen(sys.executable, "-c", program, stdout=subprocess.PIPE) as listening:
        assert listening.stdout is not None
        assert listening.stdout.readline() == "up\n"
        assert "create_server" in str(first.processes())
        assert "create_server" not in str(second.processes())
        connect = "import socket, sys; socket.create_connection((sys.argv[1], 9))"
        assert "refused" in second.run(sys.executable, "-c", connect, "node2", check=False).stderr
        second.run(sys.executable, "-c", connect, "node1")
    first.run("touch", site.small_disk / "file")
    second.run("rm", site.small_disk / "file")


@pytest.mark.usefixtures("site")  # its reasons to skip
def test_a_killed_session_leaves_nothing_behind(tmp_path: Path) -> None:
    """Not even what has left its session, and ignores every signal that can be ignored."""
    sleep = f"sleep {os.getpid()}.987"  # no other session's
    stubborn = f"trap '' HUP INT TERM; echo up; exec {sleep}"

    def sleepers() -> int:
        return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.count(
            sleep + "\n"
        )

    program = f"""
import pathlib, subprocess, time
from tests.cluster.hosts import start_site
with start_site(pathlib.Path({str(tmp_path)!r})) as site:
    options = dict(stdout=subprocess.PIPE, start_new_session=True)
    for host in site.hosts:
        host.popen("setsid", "sh", "-c", {stubborn!r}, **options).stdout.readline()
    print("up", flush=True)
    time.sleep(3600)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=CHECKOUT, stdout=subprocess.PIPE) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == b"up\n"
        assert sleepers() == 3
        session.kill()
    wait_until(lambda: sleepers() == 0, "every process is gone")


def test_two_hosts_train_as_one(site: Site, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    """TP 2 on each of two hosts, PP 2 between them: the same sums in the same order, so the same bits."""
    command = [sys.executable, RUN, *demo.flags(tmp_path, "run"), "--node", "2", "-m", "node1", "-p", "29500"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    started = [host.popen(*command, "--rank", rank, **pipes) for rank, host in enumerate(site.nodes)]
    output = [run.communicate(timeout=HANG)[0] for run in started]
    assert [run.returncode for run in started] == [0, 0], "\n".join(output)
    assert f"GLOO_SOCKET_IFNAME={INTERFACE}" in output[0]
    assert losses(tmp_path / "run") == expected
    assert len(list((tmp_path / "run/logs").glob("*-node[01].log"))) == 2
