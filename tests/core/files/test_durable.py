"""Files are on the disk before they are moved, with the access that new files get."""

import os
import stat

import pytest

from hf_slim.core.files import durable
from hf_slim.core.files.durable import settle, usual_mode
from hf_slim.core.report import write_atomically


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def test_access_follows_the_umask(tmp_path, umask):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (folder / name).write_text(name)
        (folder / name).chmod(0o600)
    (folder / "inner").chmod(0o700)
    settle(folder)
    assert {mode(folder / name) for name in ("a", "inner/b")} == {0o666 & ~umask}
    assert {mode(path) for path in (folder, folder / "inner")} == {0o777 & ~umask}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "inner"]
    write_atomically(tmp_path / "c", lambda path: path.write_text("c"))
    assert mode(tmp_path / "c") == 0o666 & ~umask == usual_mode(tmp_path)


def test_a_link_is_left_alone(tmp_path):
    (tmp_path / "outside").write_text("x")
    (tmp_path / "outside").chmod(0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to("../outside")
    settle(tmp_path / "folder")
    assert mode(tmp_path / "outside") == 0o600


def test_every_file_and_its_folder_reach_the_disk_before_the_move(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(durable.os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}")))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("move"), replace(*paths)))
    write_atomically(tmp_path / "c", lambda path: path.write_text("c"))
    assert events[1:] == ["move", str(tmp_path)]
    assert os.path.dirname(events[0]) == str(tmp_path)
    events.clear()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("a")
    settle(tmp_path / "folder")
    assert events == [str(tmp_path / "folder" / "a"), str(tmp_path / "folder")]
