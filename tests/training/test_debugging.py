"""Python's debugger opens where an error arose, and only where somebody can answer it."""

from __future__ import annotations

import pytest

from megatron_vlm.training import debugging


@pytest.mark.parametrize(
    ("wanted", "world", "terminal"), [(True, 1, True), (False, 1, True), (True, 2, True), (True, 1, False)]
)
def test_post_mortem(monkeypatch: pytest.MonkeyPatch, wanted: bool, world: int, terminal: bool) -> None:
    opened = []
    monkeypatch.setattr(debugging.pdb, "post_mortem", opened.append)
    monkeypatch.setattr(debugging.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(debugging.sys.stdin, "isatty", lambda: terminal, raising=False)
    with pytest.raises(ZeroDivisionError), debugging.post_mortem(wanted):
        1 / 0  # noqa: B018
    assert len(opened) == (wanted and world == 1 and terminal)
