"""The device's ceiling: a large matrix product in BF16 and in FP8, and a copy of its memory."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.gpu.timing import time_steps

# On random numbers: zeros are multiplied faster, since they take less power.
SIZES = {False: (8192, 16384), True: (64,)}
SECONDS = {False: 1.5, True: 0.01}  # of repetitions, so that the clock has come down to what power allows


def products(size: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Products of two square matrices, with sums in fp32 and results in BF16, as a linear layer has them."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    found: dict[str, Callable[[], Tensor]] = {"bf16": lambda: a @ b.t()}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8 = (x.to(torch.float8_e4m3fn) for x in (a, b))
        one = torch.ones((), device=device)
        found["fp8"] = lambda: torch._scaled_mm(
            a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return found


def measure(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """GB/s of a copy, bytes read and written together, and TFLOP/s of the fastest size."""
    source = torch.zeros(2**20 if tiny else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(time_steps(lambda: target.copy_(source), 2, 9, device))
    yield {"copy_gb_per_second": 2 * source.numel() / seconds / 1e9}
    fastest: dict[str, float] = {}
    for size in SIZES[tiny]:
        for name, product in products(size, device).items():
            (once,) = time_steps(product, 3, 1, device)
            seconds = statistics.median(time_steps(product, 0, max(5, int(SECONDS[tiny] / once)), device))
            rate = 2 * size**3 / seconds / 1e12
            fastest[name] = max(rate, fastest.get(name, 0.0))
            yield {f"{name}_tflops_{size}": rate, f"{name}_tflops": fastest[name]}


def main(argv: list[str]) -> None:
    args = gpu.parser(__doc__.splitlines()[0]).parse_args(argv)
    gpu.collect(measure(torch.device("cpu" if args.tiny else "cuda"), args.tiny), args.result)


if __name__ == "__main__":
    main(sys.argv[1:])
