"""Where checkpoints are found, and how they appear."""

import json
import os
from pathlib import Path

import pytest

from megatron_vlm.artifacts.checkpoint import (
    BEST,
    CHECKPOINTS,
    TRACKER,
    appearing_folder,
    checkpoint_layers,
    checkpoint_name,
    is_checkpoint,
    keep_last,
    list_checkpoints,
    note_user,
    of_best,
    read_manifest,
    resolve_checkpoint,
    write_manifest,
    write_tracker,
)

MANIFEST = {
    "format": "torch_dist",
    "iteration": 0,
    "has_optimizer": False,
    "model": {},
    "layout": {},
    "tensors": {},
}


def make(root: Path, *iterations: object) -> None:
    for iteration in iterations:
        folder = root / checkpoint_name(iteration)
        folder.mkdir(parents=True)
        write_manifest(folder, {**MANIFEST, "iteration": iteration})


def test_a_root_a_checkpoint_and_a_run_folder_resolve(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    make(root, "release", 5, 100)
    write_tracker(root, 5)
    assert resolve_checkpoint(root) == resolve_checkpoint(tmp_path / "run") == root / "iter_0000005"
    assert resolve_checkpoint(root / "iter_0000100") == root / "iter_0000100"
    assert read_manifest(tmp_path / "run")["iteration"] == 5
    write_tracker(root, "release")
    assert (root / TRACKER).read_text() == "release"
    assert resolve_checkpoint(root) == root / "release"


def test_checkpoints_are_listed_in_order_and_only_finished_ones(tmp_path: Path) -> None:
    make(tmp_path, 100, "release", 20, 12345678)
    (tmp_path / "iter_0000030").mkdir()
    (tmp_path / "other").mkdir()
    names = [folder.name for folder in list_checkpoints(tmp_path)]
    assert names == ["release", "iter_0000020", "iter_0000100", "iter_12345678"]
    assert list_checkpoints(tmp_path / "missing") == []


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        resolve_checkpoint(tmp_path / "missing")
    with pytest.raises(ValueError, match="convert_hf_to_megatron"):
        resolve_checkpoint(tmp_path)
    make(tmp_path, 5, 6)
    with pytest.raises(ValueError, match=r"name the checkpoint itself: .*iter_0000005, .*iter_0000006"):
        resolve_checkpoint(tmp_path)
    write_tracker(tmp_path, 7)
    with pytest.raises(ValueError, match="names iter_0000007, which is not a finished checkpoint"):
        resolve_checkpoint(tmp_path)
    (tmp_path / TRACKER).write_text("../../etc")
    with pytest.raises(ValueError, match="neither an iteration nor 'release'"):
        resolve_checkpoint(tmp_path)


def test_manifests_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensors missing"):
        write_manifest(tmp_path, {k: v for k, v in MANIFEST.items() if k != "tensors"})
    file = tmp_path / "manifest.json"
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "format_version is None; supported: 1"),
        ('{"format_version": 2}', "format_version is 2"),
        ('{"format_version": 1, "format": "torch_dist"}', "iteration, has_optimizer, model, layout, tensors"),
        ("[" * 100_000, "manifest.json: cannot be read"),
        *(
            (json.dumps({"format_version": 1, **MANIFEST, name: None}), f"manifest.json: {name} is not what")
            for name in MANIFEST
        ),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_manifest(tmp_path)


def test_the_last_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "release", 5, 10, 15, 20, 25)
    write_tracker(tmp_path, 10)
    (tmp_path / ".iter_0000001.deleted").mkdir()  # as a kill leaves it
    write_manifest(tmp_path / "iter_0000005", {**MANIFEST, "has_optimizer": True})

    def kept() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir() if path.name != TRACKER)

    deleted = keep_last(tmp_path, 1, also=[tmp_path / "iter_0000015"])
    assert [folder.name for folder in deleted] == ["iter_0000020"]
    names = [f"iter_{iteration:07d}" for iteration in (5, 10, 15, 25)]
    assert kept() == [*names, "release"]

    # A kill while one is removed: what is left of it has no checkpoint's name.
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)
    keep_last(tmp_path, 1)
    assert kept() == [".iter_0000015.deleted", *(n for n in names if "15" not in n), "release"]
    monkeypatch.undo()
    keep_last(tmp_path, 1)
    assert kept() == [*(n for n in names if "15" not in n), "release"]


def test_a_base_is_kept_as_long_as_a_run_lies_over_it(tmp_path: Path) -> None:
    make(tmp_path, 5, 10, 15)
    write_tracker(tmp_path, 15)
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        run.mkdir()
        note_user(tmp_path / "iter_0000005", run)
    for run in runs:
        assert [folder.name for folder in keep_last(tmp_path, 2)] == []
        run.rmdir()
    assert [folder.name for folder in keep_last(tmp_path, 2)] == ["iter_0000005"]
    make(tmp_path, "release")
    note_user(tmp_path / "release", tmp_path)
    assert [path.name for path in (tmp_path / "release").iterdir()] == ["manifest.json"]  # no need
    note_user(tmp_path / "missing", tmp_path)  # as one that can't be written to


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "a" / "final"
    with pytest.raises(KeyError), appearing_folder(final) as folder:
        (folder / "half").touch()
        raise KeyError
    assert os.listdir(tmp_path / "a") == []
    with appearing_folder(final) as folder:
        (folder / "whole").touch()
        assert not final.exists()
    assert os.listdir(final) == ["whole"] and os.listdir(tmp_path / "a") == ["final"]
    with pytest.raises(ValueError, match="is there already"), appearing_folder(final):
        pass
    with pytest.raises(KeyError), appearing_folder(final, replace=True):
        raise KeyError
    assert os.listdir(final) == ["whole"]
    with appearing_folder(final, replace=True) as folder:
        (folder / "new").touch()
    assert os.listdir(final) == ["new"] and os.listdir(tmp_path / "a") == ["final"]


def test_two_writers_of_a_folder(tmp_path: Path) -> None:
    """The second is refused; it would clear away what the first has written, and be renamed half-way."""
    final = tmp_path / "final"
    with appearing_folder(final) as folder:
        (folder / "whole").touch()
        with pytest.raises(ValueError, match="final: another process is writing it"), appearing_folder(final):
            pass
        with appearing_folder(tmp_path / "other"):
            pass
    assert os.listdir(final) == ["whole"] and sorted(os.listdir(tmp_path)) == ["final", "other"]


@pytest.mark.parametrize("call", ["fsync", "rename", "second rename"])
def test_a_signal_while_a_folder_appears(tmp_path: Path, monkeypatch, call: str) -> None:
    """While it is flushed, too, which takes longest: nothing new is left, and what was there is there."""
    final, real, calls = tmp_path / "final", getattr(os, call.split()[-1]), []
    final.mkdir()
    (final / "old").touch()

    def ended(*args):
        calls.append(args)
        if len(calls) == (2 if "second" in call else 1):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, call.split()[-1], ended)
    with pytest.raises(KeyboardInterrupt), appearing_folder(final, replace=True) as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["final"] and os.listdir(final) == ["old"]


def test_a_folder_appears_where_a_link_leads(tmp_path: Path) -> None:
    """So it is written to that file system, and the link stays."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    for name in ("first", "second", "third"):
        with appearing_folder(tmp_path / "link", replace=name != "first") as folder:
            assert folder.parent == tmp_path / "disk"
            (folder / name).touch()
        assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk") == ["real"]
        assert os.listdir(tmp_path / "link") == [name] and len(os.listdir(tmp_path)) == 2


def test_a_mount_point_is_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    refused = pytest.raises(ValueError, match=r"disk is a mount point.*a folder in it")
    with refused, appearing_folder(tmp_path / "disk"):
        pytest.fail("was begun")
    with appearing_folder(tmp_path / "disk" / "new"):
        pass


def test_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".final.incomplete"
    left.mkdir()
    (left / "stale").touch()
    with appearing_folder(tmp_path / "final") as folder:
        assert folder == left and os.listdir(folder) == []


def test_layers_of_a_checkpoint_of_trained_weights(tmp_path: Path) -> None:
    """Each names the one below; --base stands for the lowest, wherever that was."""

    def over(name: str, base: object) -> Path:
        (tmp_path / name).mkdir()
        more = {} if base is None else {"base": {"path": str(base), "fingerprint": "-"}}
        write_manifest(tmp_path / name, {**MANIFEST, **more})
        return tmp_path / name

    full, moved = over("full", None), over("moved", None)
    projector = over("projector", full)
    top = over("top", projector)
    assert checkpoint_layers(full) == checkpoint_layers(full, base=moved) == [full]
    assert checkpoint_layers(top) == [full, projector, top]
    assert checkpoint_layers(top, base=moved) == [moved, projector, top]
    with pytest.raises(ValueError, match="nowhere: no such checkpoint folder"):
        checkpoint_layers(full, base=tmp_path / "nowhere")
    (full / "manifest.json").unlink()
    assert checkpoint_layers(top, base=moved) == [moved, projector, top]
    for path in (top, projector):
        with pytest.raises(ValueError, match=f"no longer at {full}; say with --base"):
            checkpoint_layers(path)
    with pytest.raises(ValueError, match="give the checkpoint under it"):
        checkpoint_layers(top, base=projector)
    write_manifest(top, {**MANIFEST, "base": {}})
    with pytest.raises(ValueError, match="base names no path"):
        checkpoint_layers(top)


def test_a_folder_of_runs_lists_them(tmp_path: Path) -> None:
    """And is no Hugging Face folder, for scripts that take both."""
    for name in ("one", "two"):
        make(tmp_path / name / CHECKPOINTS, 3)
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError) as error:
        resolve_checkpoint(tmp_path)
    expected = f"{tmp_path}: holds several runs or checkpoints; name one of them: "
    assert str(error.value) == f"{expected}{tmp_path / 'one'}, {tmp_path / 'two'}"
    assert is_checkpoint(tmp_path) and not is_checkpoint(tmp_path / "notes")


def test_the_best_checkpoint_of_a_run_is_named_beside_the_last(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(run / CHECKPOINTS, 9)
    write_tracker(run / CHECKPOINTS, 9)
    assert of_best(run) == ""
    make(run / BEST, 3)
    write_tracker(run / BEST, 3)
    assert of_best(run).startswith(
        f"this takes {run / CHECKPOINTS / 'iter_0000009'}, the last checkpoint; the"
    )
    assert f"lowest validation loss is {run / BEST}, which" in of_best(run)
    assert of_best(run / BEST) == of_best(run / CHECKPOINTS) == of_best(run / BEST / "iter_0000003") == ""
