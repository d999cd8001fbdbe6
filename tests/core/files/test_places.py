"""Names of files that strangers give."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_slim import SlimLoadError
from hf_slim.core.files.json_file import read_object, shown
from hf_slim.core.files.places import file_in, is_plain_name
from tests.damage import NAMES, fuzzing


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model" / "inner").mkdir(parents=True)
    for name in ("model/a.json", "model/inner/b.json", "outside.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path / "model"


def test_a_file_of_the_folder_is_found(folder):
    assert file_in(folder, "a.json") == folder / "a.json"
    assert file_in(folder, "inner/b.json", folders=True) == folder / "inner" / "b.json"


@pytest.mark.parametrize("name", [*NAMES, "../outside.json", "inner/b.json", "inner\\b.json", None, 3, ["a.json"]])
def test_a_name_with_a_path_is_refused(folder, name):
    with pytest.raises(SlimLoadError, match=r"Allowed is the name of a file inside this folder, without a path"):
        file_in(folder, name)


@pytest.mark.parametrize("name", ["inner/../../outside.json", "/etc/hostname", "inner//b.json", "./a.json", "a.json/"])
def test_folders_in_front_do_not_lead_outside(folder, name):
    with pytest.raises(SlimLoadError, match="a file inside this folder"):
        file_in(folder, name, folders=True)


@fuzzing(200, share=0.1)
@given(name=st.text() | st.text("./\\ab:", max_size=8))
def test_a_plain_name_stays_in_its_folder(name):
    if is_plain_name(name):
        assert os.path.normpath(os.path.join("/folder", name)) == f"/folder/{name}"
        assert os.path.dirname(os.path.join("/folder", name)) == "/folder"


def test_links_may_stay_inside_and_not_lead_outside(folder):
    (folder / "same.json").symlink_to("a.json")
    (folder / "out.json").symlink_to("../outside.json")
    (folder / "round.json").symlink_to("round.json")
    (folder / "gone.json").symlink_to("nothing.json")
    assert file_in(folder, "same.json") == folder / "same.json"
    with pytest.raises(SlimLoadError, match=r"is a link to .*outside\.json', outside of the folder"):
        file_in(folder, "out.json")
    for name in ("round.json", "gone.json", "missing.json"):
        with pytest.raises(SlimLoadError, match="is missing in"):
            file_in(folder, name)


def test_the_cache_of_the_hub_holds_links_to_its_blobs(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    for place in (snapshot, repository / "blobs", tmp_path / "models--c--d" / "blobs"):
        place.mkdir(parents=True)
        (place / "5678").write_text("{}")
    (snapshot / "a.json").symlink_to("../../blobs/5678")
    (snapshot / "b.json").symlink_to("../../../models--c--d/blobs/5678")
    assert file_in(snapshot, "a.json") == snapshot / "a.json"
    with pytest.raises(SlimLoadError, match="outside of the folder"):
        file_in(snapshot, "b.json")


def test_devices_pipes_and_folders_are_not_opened(folder):
    os.mkfifo(folder / "pipe.json")  # whoever opens it waits for a writer
    (folder / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "inner"):
        with pytest.raises(SlimLoadError, match="is no regular file"):
            file_in(folder, name)
        with pytest.raises(SlimLoadError, match="is no regular file"):
            read_object(folder / name, 100)
    with pytest.raises(SlimLoadError, match="outside of the folder"):
        file_in(folder, "zero.json")
    with pytest.raises(SlimLoadError, match="is no regular file"):
        read_object(folder / "zero.json", 100)


def test_json_must_be_one_object_of_a_bounded_size(folder):
    path = folder / "a.json"
    for text, says in (
        ("[1]", "must hold a JSON object"), ("{", "not readable"), ('{"a": 1, "a": 1}', "occurs twice"),
        ("[" * 100_000, "not readable"), ('{"a": ' + "1" * 5000 + "}", "not readable"), ("", "not readable"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(SlimLoadError, match=says):
            read_object(path, 10**6)
    path.write_text('{"a": [1, {"b": null}]}')
    assert read_object(path, 100) == {"a": [1, {"b": None}]}
    with pytest.raises(SlimLoadError, match="has 23 bytes; such a file has at most 22"):
        read_object(path, 22)


def test_messages_stay_short_and_printable():
    for value in ("x" * 10**6, [[[1] * 1000] * 1000], {"\ud800": "\x1b[2J"}, 10**4000):
        text = shown(value)
        assert len(text) < 400
        assert text.isprintable()
        text.encode("utf-8")
