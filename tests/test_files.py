"""Files are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dosmatgen_ase import files
from dosmatgen_ase.files import write_atomic, write_npz


def test_a_kill_before_the_replacement_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    path = tmp_path / "x"
    write_atomic(path, b"old")
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", kill)
        with pytest.raises(Killed):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")  # what the kill left behind does not stand in the way
    assert path.read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_file_of_the_user_beside_stays(tmp_path: Path) -> None:
    """Downloads are called x.part; and a link in place of what is written beside leads nowhere."""
    (tmp_path / "x.part").write_bytes(b"half a download")
    (tmp_path / "notes").write_bytes(b"mine")
    (tmp_path / ".x.part").symlink_to(tmp_path / "notes")
    write_atomic(tmp_path / "x", b"new")
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"x": b"new", "x.part": b"half a download", "notes": b"mine"}


def test_a_replaced_file_keeps_who_may_read_it(tmp_path: Path) -> None:
    """In the moment of its replacement, too."""
    new = tmp_path / "new"
    new.touch()
    for mode in (0o600, 0o664):
        (tmp_path / "x").touch()
        (tmp_path / "x").chmod(mode)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "x")
        for write in (lambda path: write_atomic(path, b"a"), lambda path: write_npz(path, a=np.arange(3))):
            write(tmp_path / "link")
            assert (tmp_path / "x").stat().st_mode & 0o777 == mode
    write_atomic(tmp_path / "y", b"a")
    assert (tmp_path / "y").stat().st_mode == new.stat().st_mode


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="choose a folder that exists"):
        write_atomic(tmp_path / "absent" / "x", b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose a folder that exists"):
        write_atomic(tmp_path / "file" / "x", b"")


def test_arrays_come_back_and_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on" / "the" / "way.npz"
    write_npz(path, a=np.arange(3), b=np.array(["x"]))
    with np.load(path, allow_pickle=False) as stored:
        assert stored["a"].tolist() == [0, 1, 2]
        assert stored["b"].tolist() == ["x"]
    with pytest.raises(ValueError, match="allow_pickle"):
        write_npz(path, a=np.array([None]))
    assert [p.name for p in path.parent.iterdir()] == ["way.npz"]
