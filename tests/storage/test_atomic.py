"""A file or folder is replaced completely, or not at all."""

from pathlib import Path

import pytest

from pipeline.storage import atomic


@pytest.mark.parametrize("durable", [False, True])
def test_files_and_folders_are_replaced(tmp_path: Path, durable: bool) -> None:
    file, folder = tmp_path / "made/file", tmp_path / "folder"
    for content in (b"old", b"new"):
        atomic.write_file(file, content, durable=durable)
        with atomic.replacing(folder, durable=durable) as partial:
            partial.mkdir()
            (partial / content.decode()).write_bytes(content)
    assert file.read_bytes() == b"new"
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "made"]


def test_error_leaves_target_unchanged(tmp_path: Path) -> None:
    atomic.write_file(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), atomic.replacing(tmp_path / "file") as partial:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_folder_is_restored_if_replacement_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/old").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.delattr(Path, "replace")
        with pytest.raises(AttributeError), atomic.replacing(tmp_path / "folder") as partial:
            partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder/old").read_bytes() == b"old"


def test_folder_that_has_appeared_is_kept(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "folder", keep=True) as partial:
        for place in (partial, tmp_path / "folder"):
            place.mkdir()
            (place / "file").write_text(place.name)
    assert (tmp_path / "folder/file").read_text() == "folder"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), atomic.replacing(tmp_path / "file", keep=True) as partial:
        partial.mkdir()


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".a.1.partial", ".b.22.partial", "a"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".b.1.partial").mkdir()
    atomic.remove_leftovers(tmp_path, "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.1.partial", "a"]
    atomic.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
