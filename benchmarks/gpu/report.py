"""The bars that the GPU check is judged by, and its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DONE, FAILED, NOT_RUN = "done", "failed", "not run"  # of a step
# What is asked of the 7B shape, and of FP8 on the digits.
LEAST_MFU, LEAST_FP8_GAIN, LEAST_LEAD = 0.5, 1.3, 1.3
MOST_LOSS_APART, MOST_ACCURACY_APART = 0.02, 0.01


@dataclass(frozen=True)
class Bar:
    """One bar: what is asked, what was found, and whether it is enough; None where it wasn't measured."""

    text: str
    found: str = ""
    met: bool | None = None


def bars(steps: dict[str, Any], tiny: bool = False) -> list[Bar]:
    """Return the bars that the results are judged by; of tiny sizes no speed."""

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
    judged = value("specs", "judged")
    if judged is None:
        found.append(Bar("Transformer Engine beside local, logits and gradients"))
    else:
        allowed, apart = value("specs", "tolerance"), value("specs", judged)
        text = f"{judged}: logits within {allowed['logits']:.1%}, gradients {allowed['gradients']:.1%}"
        figures = f"{apart['logits']:.2%}, {apart['gradients']:.2%}"
        found.append(Bar(text, figures, value("specs", "within")))
    saved = value("specs", "saved with") or "Transformer Engine"
    text = f"a checkpoint of {saved} layers loads with local ones, to the bit"
    found.append(Bar(text, "", value("specs", "loads with local")))
    for text, key, most in (
        ("digits: FP8's loss curve within 2 % of BF16's, 100 iterations", "losses_apart", MOST_LOSS_APART),
        ("digits: FP8's accuracy within 1 point of BF16's, after 500", "accuracy_apart", MOST_ACCURACY_APART),
    ):
        apart = value("digits", key)
        found.append(Bar(text) if apart is None else Bar(text, f"{apart:.2%}", apart <= most))
    passed, failed = (value("parity", outcome) for outcome in ("passed", "failed"))
    ended = steps.get("parity", {}).get("status") == DONE
    met = False if failed else (ended and passed > 0) or None
    text = "parity: no test fails"
    found.append(Bar(text) if failed is None else Bar(text, f"{passed} passed, {failed} failed", met))
    return found


def table(report: dict[str, Any]) -> str:
    """Return the report in Markdown."""
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
    measured = [
        f"{ceiling[f'{kind}_tflops']:.4g} TFLOP/s in {kind.upper()}"
        for kind in ("bf16", "fp8")
        if f"{kind}_tflops" in ceiling
    ]
    if measured:
        lines += [
            "",
            f"Measured matrix product: {', '.join(measured)}; a copy of memory "
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
    """Return a step's findings that no other table has, and why it has found no more."""
    result = one.get("result", {})
    found = []
    if name == "parity" and result:
        found = [f"{result[what]} {what}" for what in ("passed", "failed", "skipped")] + [*result["failures"]]
    if name == "digits":
        arms = [arm for arm in ("bf16", "fp8") if f"{arm}_accuracy" in result]
        found = [f"{arm} {result[f'{arm}_accuracy']:.1%} right" for arm in arms]
    said = ", ".join(found)
    return "; ".join(filter(None, (said, one.get("reason", "")))).replace("|", "\\|")
