"""Paths stay below their root, and nothing is replaced but what is ours, by what is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pi0.storage import below, moved_aside, new_folder, require_files_below, require_replaceable

OURS = {"marker": ("weights",), "files": ("config.json", "part-*")}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\0b", None, 3, ["a"]])
def test_names_that_lead_elsewhere(name, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a path below"):
        below(tmp_path, name)


def test_links(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("")
    (root / "good").symlink_to("inner")
    (root / "bad").symlink_to("../outside")
    (root / "round").symlink_to("round")
    assert below(root, "good/file") == root / "good" / "file"
    for name in ("bad", "bad/secret", "bad/new"):
        with pytest.raises(ValueError, match=r"bad.* is a link to .*outside"):
            below(root, name)
    with pytest.raises(ValueError, match=r"bad is a link to|cannot be resolved"):
        require_files_below(root)
    (root / "bad").unlink()
    (root / "round").unlink()
    require_files_below(root)
    os.mkfifo(root / "inner" / "pipe")
    with pytest.raises(ValueError, match="inner/pipe is not a regular file"):
        require_files_below(root)
    (root / "round").symlink_to("round")
    (tmp_path / "root_by_link").symlink_to("root")  # the folder itself is the user's choice
    assert below(tmp_path / "root_by_link", "inner")
    with pytest.raises(ValueError, match="cannot be resolved"):
        below(root, "round")


def test_snapshots_of_the_hugging_face_cache(tmp_path: Path) -> None:
    """They are links to the same repository's blobs, which are allowed; to others' they are not."""
    for name in ("models--a--b", "models--c--d"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "0f").write_text("")
        (tmp_path / name / "snapshots" / "rev" / "sub").mkdir(parents=True)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    (snapshot / "config.json").symlink_to("../../blobs/0f")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/0f")
    (snapshot / "other").symlink_to("../../../models--c--d/blobs/0f")
    assert (
        below(snapshot, "config.json") and below(snapshot, "sub/config.json") and below(snapshot / "sub", "config.json")
    )
    with pytest.raises(ValueError, match="is a link to"):
        below(snapshot, "other")


def write(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("old")
    return folder


def test_what_may_be_replaced(tmp_path: Path) -> None:
    require_replaceable(tmp_path / "new", False, **OURS)
    require_replaceable(write(tmp_path / "empty"), True, **OURS)
    require_replaceable(write(tmp_path / "ours", "weights", "part-1"), True, **OURS)
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        require_replaceable(tmp_path / "ours", False, **OURS)
    for names, said in (
        (("config.json",), "it has no weights"),
        (("weights", "thesis.tex"), "other files: thesis.tex"),
    ):
        with pytest.raises(FileExistsError, match=said):
            require_replaceable(write(tmp_path / said.split()[-1], *names), True, **OURS)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="not a folder"):
        require_replaceable(tmp_path / "file", True, **OURS)
    for source in (tmp_path / "ours", tmp_path / "ours" / "part-1", tmp_path):
        with pytest.raises(FileExistsError, match="is, contains or lies in the source"):
            require_replaceable(tmp_path / "ours", True, **OURS, sources=[source])
    with pytest.raises(FileExistsError, match="other files"):  # nothing is ours unless it is said to be
        require_replaceable(tmp_path / "ours", True)


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch) -> None:
    target = write(tmp_path / "target", "weights")
    with pytest.raises(RuntimeError), new_folder(target, True, **OURS) as folder:
        (folder / "weights").write_text("half")
        assert (target / "weights").read_text() == "old"
        raise RuntimeError
    monkeypatch.setattr("pi0.storage.os.replace", failing_into(target))
    with pytest.raises(OSError, match="disk"), new_folder(target, True, **OURS) as folder:
        (folder / "weights").write_text("new")
    monkeypatch.undo()
    assert (target / "weights").read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["target"]
    with new_folder(target, True, **OURS) as folder:
        (folder / "weights").write_text("new")
    assert (target / "weights").read_text() == "new" and [f.name for f in tmp_path.iterdir()] == ["target"]


def failing_into(target: Path):
    """`os.replace` that fails once when something is moved to `target`."""
    import os

    real, failed = os.replace, []

    def replace(source, destination):
        if Path(destination) == target and not failed:
            failed.append(source)
            raise OSError("disk")
        real(source, destination)

    return replace


@pytest.mark.parametrize("there", [True, False])
def test_a_target_that_is_a_link(there: bool, tmp_path: Path) -> None:
    if there:
        write(tmp_path / "disk" / "real", "weights")
    link = tmp_path / "link"
    link.symlink_to("disk/real")
    with new_folder(link, True, **OURS) as folder:
        (folder / "weights").write_text("new")
    assert link.is_symlink() and (tmp_path / "disk" / "real" / "weights").read_text() == "new"


def test_moved_aside_and_back(tmp_path: Path) -> None:
    target = write(tmp_path / "target", "weights")
    with pytest.raises(KeyboardInterrupt), moved_aside(target):
        assert not target.exists()
        raise KeyboardInterrupt
    assert (target / "weights").read_text() == "old"
    with moved_aside(target):
        pass
    assert not list(tmp_path.iterdir())
