"""Times, waits and kernels of a step on the device."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


def time_steps(step: Callable[[], object], warmup: int, iterations: int, device: torch.device) -> list[float]:
    """Seconds of each of so many steps, from the end of one to the end of the next, after the ``warmup``."""
    for _ in range(warmup):
        step()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(iterations):
            step()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def find_waits(step: Callable[[], object]) -> list[str]:
    """Return the places where the host waits for the GPU in a step, as ``file:line xN``; needs CUDA."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{'/'.join(w.filename.split('/')[-3:])}:{w.lineno}"
        for w in caught
        if "synchronizing CUDA operation" in str(w.message)
    )
    return [f"{place} x{count}" for place, count in places.most_common()]


def find_kernels(step: Callable[[], object], most: int = 15) -> list[dict[str, Any]]:
    """Return the kernels that take most of a step: name, share of the device's time, calls; needs CUDA."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.device_time_total
            calls[event.name] += 1
    total = sum(times.values())
    return [
        {"kernel": name[:120], "share": spent / total, "calls": calls[name]}
        for name, spent in times.most_common(most)
    ]
