"""What the GPU check is judged by, and its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What is asked of the 7B shape, and of FP8 on the digits.
LEAST_MFU, LEAST_FP8_GAIN, LEAST_LEAD = 0.5, 1.3, 1.3
MOST_LOSS_APART, MOST_ACCURACY_APART = 0.02, 0.01


@dataclass(frozen=True)
class Bar:
    """What is asked, what was found, and whether it is enough; None where it wasn't measured."""

    text: str
    found: str = ""
    met: bool | None = None


def bars(steps: dict[str, Any], tiny: bool = False) -> list[Bar]:
    """What the results are judged by; of tiny sizes no speed."""

    def value(step: str, *keys: str) -> Any:
        at = steps.get(step, {}).get("result")
        for key in keys:
            at = at.get(key) if isinstance(at, dict) else None
        return at

    def ratio(text: str, least: float, over: Any, under: Any, unit: str) -> Bar:
        if tiny or not over or not under:
            return Bar(text)
        scale = 100 if unit == " %" else 1
        return Bar(text, f"{scale * over / under:.{0 if scale == 100 else 2}f}{unit}", over / under >= least)

    ours = value("7B-bf16", "tokens_per_second")
    found = [
        ratio(
            f"7B, BF16: at least {LEAST_MFU:.0%} of the measured matrix product",
            LEAST_MFU,
            value("7B-bf16", "tflops"),
            value("ceiling", "bf16_tflops"),
            " %",
        ),
        ratio(
            f"7B: FP8 at least {LEAST_FP8_GAIN} x BF16",
            LEAST_FP8_GAIN,
            value("7B-fp8", "tokens_per_second"),
            ours,
            " x",
        ),
        ratio(
            f"7B, BF16: at least {LEAST_LEAD} x transformers with SDPA",
            LEAST_LEAD,
            ours,
            value("7B-transformers", "tokens_per_second"),
            " x",
        ),
    ]
    within = value("specs", "within")
    if within is not None:
        judged, allowed = value("specs", "judged"), value("specs", "tolerance")
        text = f"{judged}: logits within {allowed['logits']:.1%}, gradients {allowed['gradients']:.1%}"
        apart = value("specs", judged)
        found.append(Bar(text, f"{apart['logits']:.2%}, {apart['gradients']:.2%}", within))
        text = f"a checkpoint of {value('specs', 'saved with')} layers loads with local ones, to the bit"
        found.append(Bar(text, "", value("specs", "loads with local")))
    else:
        found.append(Bar("Transformer Engine beside local, logits and gradients"))
    for text, key, most in (
        ("digits: FP8's loss curve within 2 % of BF16's, 100 iterations", "losses_apart", MOST_LOSS_APART),
        ("digits: FP8's accuracy within 1 point of BF16's, after 500", "accuracy_apart", MOST_ACCURACY_APART),
    ):
        apart = value("digits", key)
        found.append(Bar(text) if apart is None else Bar(text, f"{apart:.2%}", apart <= most))
    failed = value("parity", "failed")
    passed = value("parity", "passed")
    text = "parity: no test fails"
    found.append(Bar(text) if failed is None else Bar(text, f"{passed} passed", not failed and passed > 0))
    return found


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    steps = report["steps"]
    lines = [
        f"# GPU check on {report['machine']}",
        "",
        f"{report['date']}, commit {report['commit']}; {packages}. Command: `{report['command']}`.",
    ]
    if report["dry_run"]:
        lines += ["", "A dry run on the CPU at tiny sizes: no figure says anything of a GPU."]
    lines += ["", "| bar | found | |", "|---|---|---|"]
    verdict = {True: "met", False: "**not met**", None: "not measured"}
    lines += [f"| {bar['text']} | {bar['found']} | {verdict[bar['met']]} |" for bar in report["bars"]]
    ceiling = steps.get("ceiling", {}).get("result", {})
    if ceiling:
        fp8 = f", {ceiling['fp8_tflops']:.0f} in FP8" if "fp8_tflops" in ceiling else ""
        lines += [
            "",
            f"Measured matrix product: {ceiling['bf16_tflops']:.3g} TFLOP/s in BF16{fp8}; a copy of memory "
            f"{ceiling['copy_gb_per_second']:.0f} GB/s, read and written.",
        ]
    lines += _speed_table(steps, ceiling)
    lines += ["", "| step | | s | |", "|---|---|---|---|"]
    for name, one in steps.items():
        lines.append(f"| {name} | {one['status']} | {one.get('seconds', '')} | {_said(name, one)} |")
    return "\n".join(lines) + "\n"


def _speed_table(steps: dict[str, Any], ceiling: dict[str, Any]) -> list[str]:
    rows = []
    for name, one in steps.items():
        found = one.get("result", {})
        if "tokens_per_second" not in found:
            continue
        peak = ceiling.get("fp8_tflops" if name.endswith("fp8") else "bf16_tflops")
        mfu, without = (
            f"{found[key] / peak:.1%}" if peak else "" for key in ("tflops", "tflops_without_tower")
        )
        cells = [
            name,
            found["layers"],
            f"{found['tokens_per_second']:,.0f}",
            f"{found['tflops']:.3g}",
            mfu,
            without,
            f"{1e3 * found['step_seconds']:.1f}",
            f"{found['peak_gib']:.1f}",
            len(found["waits"]) if "waits" in found else "",
        ]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    if not rows:
        return []
    return [
        "",
        "| | layers | tokens/s | TFLOP/s | MFU | without the tower | ms a step | peak GiB | waits |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "MFU is beside the measured product, of FP8 in its rows, with the tower's operations and without; "
        "waits are the places in a step where the host waits for the GPU.",
    ]


def _said(name: str, one: dict[str, Any]) -> str:
    if "reason" in one:
        return str(one["reason"])
    result = one["result"]
    if name == "parity":
        return f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
    if name == "digits":
        return ", ".join(f"{arm} {share:.1%} right" for arm, share in result["accuracy"].items())
    return ""
