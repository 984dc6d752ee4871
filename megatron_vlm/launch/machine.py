"""Facts of this machine: GPUs, cores, network interfaces, free ports. Asked without torch."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import socket
import subprocess
from typing import List, Mapping, Optional, Tuple

PORT_RANGE = range(9800, 10000)  # searched when the wanted port is busy
_INTERFACE_PREFIXES = ("ib", "hsn", "en", "eth")  # InfiniBand, Slingshot, Ethernet: fastest first


def installed(package: str) -> bool:
    """Return whether this Python has a package; it isn't imported."""
    return importlib.util.find_spec(package) is not None


def visible_gpus(environ: Mapping[str, str]) -> List[str]:
    """Return the ids of the GPUs that may be used: those of CUDA_VISIBLE_DEVICES, else those that
    nvidia-smi lists."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        ids: List[str] = []
        for entry in visible.split(","):
            # CUDA reads up to the first entry that names no device.
            if entry.strip() in ("", "-1", "NoDevFiles"):
                break
            ids.append(entry.strip())
        return ids
    try:
        result = subprocess.run(
            ["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if result.returncode:
        return []
    lines = result.stdout.decode(errors="replace").splitlines()
    return [str(index) for index in range(sum(line.startswith("GPU ") for line in lines))]


def gpu_memory() -> Optional[float]:
    """Return the memory of the smallest GPU of this machine in GiB; None where nvidia-smi tells none."""
    sizes = [line for line in _ask_gpus("memory.total") if line.isdigit()]
    return min(map(int, sizes)) / 1024 if sizes else None  # MiB


def compute_capability() -> Optional[Tuple[int, int]]:
    """Compute capability of this machine's oldest GPU, such as (9, 0); None where nvidia-smi tells none."""
    found = [line.split(".") for line in _ask_gpus("compute_cap") if re.fullmatch(r"\d+\.\d+", line)]
    return min(((int(major), int(minor)) for major, minor in found), default=None)


def torch_cuda() -> Optional[Tuple[int, int]]:
    """Return the CUDA that torch in this Python is built for, such as (12, 8); None without torch, or for
    CPUs."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        try:
            with open(os.path.join(folder, "version.py"), encoding="utf-8") as file:
                found = re.search(r"^cuda\b.*'(\d+)\.(\d+)'", file.read(), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1]), int(found[2])
    return None


def _ask_gpus(what: str) -> List[str]:
    """Return nvidia-smi's answers, one for each GPU; none without it."""
    try:
        result = subprocess.run(
            ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if result.returncode else result.stdout.decode(errors="replace").split()


def main_memory() -> Optional[int]:
    """Return the bytes of this machine's memory; None where it doesn't tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def network_interfaces() -> List[str]:
    """Return the names of this machine's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def fastest_interface(names: List[str]) -> Optional[str]:
    """Return the interface to talk to other nodes with: the first of ``ib*``, ``hsn*``, ``en*``, ``eth*``."""
    for prefix in _INTERFACE_PREFIXES:
        for name in sorted(names):
            if name.startswith(prefix):
                return name
    return None


def knows_host(name: str) -> bool:
    """Return whether a host's name, or an IP, has an address for this machine."""
    try:
        return bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError):
        return False


class PortClaim:
    """A free TCP port, kept from other launchers of this project for as long as this object lives."""

    def __init__(self, port: int, claim: Optional[socket.socket]) -> None:
        self.port = port
        self._claim = claim


def claim_port(wanted: int, *, search: bool, flag: str) -> PortClaim:
    """Claim ``wanted``, or another free port.

    A port counts as busy when a process listens on it, or when another launcher has claimed it for a
    torchrun that does not listen yet.

    Args:
        wanted: tried first.
        search: look for a free port in :data:`PORT_RANGE` when it is busy.
        flag: what the user set it with, for the message.

    Raises:
        ValueError: it is busy and ``search`` is off, or all are busy.
    """
    claim = _try_port(wanted)
    if claim:
        return claim
    # In random order: launchers that start together should not meet again at the next port.
    others = random.sample(PORT_RANGE, len(PORT_RANGE))
    if not search:
        free = next((port for port in others if _try_port(port)), None)
        hint = f"; {free} is free" if free else ""
        raise ValueError(f"{flag} {wanted} is busy on this node{hint}: give the same free port on every node")
    for port in others:
        claim = _try_port(port)
        if claim:
            return claim
    raise ValueError(f"{flag} {wanted} is busy, and so is {PORT_RANGE[0]}-{PORT_RANGE[-1]}; give a free port")


def _try_port(port: int) -> Optional[PortClaim]:
    try:
        claim = _claim_name(port)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As torch's store does: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError:
        return None
    return PortClaim(port, claim)


def _claim_name(port: int) -> Optional[socket.socket]:
    # An abstract socket is a name in the network namespace, as a port is; it leaves no file and
    # goes away with its process. Linux only.
    if not hasattr(os, "sched_getaffinity"):
        return None
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0megatron-vlm/port/{port}")
    except OSError:
        claim.close()
        raise
    return claim
