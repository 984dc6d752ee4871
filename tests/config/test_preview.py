"""The preview's flags, beside those of run.py."""

from __future__ import annotations

import pytest

from megatron_vlm.config.preview import _OF_RUN, PreviewConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections import SECTIONS


def test_a_runs_own_command_line_will_do() -> None:
    argv = ["-g", "2", "--tp", "2", "--data-path", "d", "--template", "v1", "--seq-length", "64", "--fp32"]
    config = PreviewConfig.from_flags(["--samples", "3", *argv[:4], "--ids", *argv[4:], "--keys", "a", "b"])
    assert config.run == RunConfig.from_flags(argv)
    assert (config.preview.samples, config.preview.ids, config.preview.keys) == (3, True, ("a", "b"))


def test_help_shows_the_flags_of_run_that_say_how_a_sample_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        PreviewConfig.from_flags(["--help"], prog="preview.py")
    shown = capsys.readouterr().out
    assert exit.value.code == 0
    for flag in ("--samples", "--html", "--template", "--seq-length", "--tokenizer-load-dir", "--sif-path"):
        assert flag in shown
    assert "--save-interval" not in shown
    assert set(_OF_RUN) <= {name for section in SECTIONS.values() for name in section.__dataclass_fields__}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--samples", "0"], "--samples 0"),
        (["--skip", "-1"], "--skip"),
        (["--keys", "a", "--skip", "2"], "--skip does nothing with --keys"),
        (["--keys", "a", "--shuffle"], "--shuffle does nothing with --keys"),
        (["--html", "none/p.html"], "--html none/p.html: no such folder"),
        (["--html", "."], "--html .: a folder; name the page"),
        (["--split", "dev"], "--split"),
        (["--templat", "v1"], "unknown flag --templat; did you mean --template?"),
        (["--template", "llm_jp", "--lang", "en"], "--template llm_jp is Japanese"),
    ],
)
def test_bad_flags_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PreviewConfig.from_flags(argv)
    assert "\n" not in str(error.value)
