"""Headers of safetensors files: what is read is what the library reads, and everything else is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_slim import SlimLoadError
from hf_slim.core.files.header import MOST_HEADER_BYTES, parse_header, read_header
from tests.damage import edit_bytes, edit_header, fuzzing, memory_used

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint16, torch.bool, torch.int64, torch.float8_e4m3fn]


def written(path, seed=0):
    """A file with tensors of many dtypes and shapes, empty ones and scalars among them."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(), (0,), (3,), (2, 5), (4, 0, 2), (1, 2, 3, 4)]
    tensors = {
        f"{number}.{'x' * (seed % 7)}": torch.randint(0, 2, shape, generator=draw).to(dtype)
        for number, (shape, dtype) in enumerate((shape, dtype) for shape in shapes for dtype in DTYPES)
    }
    save_file(tensors, path, {"format": "pt", "seed": str(seed)})
    return tensors


@pytest.mark.parametrize("seed", range(7))
def test_it_reads_what_the_library_reads(tmp_path, seed):
    tensors = written(tmp_path / "a.safetensors", seed)
    header = read_header(tmp_path / "a.safetensors")
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.metadata == {"format": "pt", "seed": str(seed)}
    assert header.size_bytes == (tmp_path / "a.safetensors").stat().st_size
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert file.get_slice(name).get_dtype() == header.tensors[name].dtype
    assert all(header.tensors[name].numel == tensor.numel() for name, tensor in tensors.items())


@fuzzing(150, share=0.1)
@given(data=st.data())
def test_whatever_it_accepts_the_library_accepts_and_reads_alike(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.int8)}, path)
    change = data.draw(st.sampled_from([edit_bytes, edit_header]))
    path.write_bytes(change(data.draw, path.read_bytes()))
    try:
        header = read_header(path)
    except SlimLoadError:
        return
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    assert found == {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}


def header(**changes):
    """One tensor of six bytes, with changes to its entry."""
    return json.dumps({"a": {"dtype": "I8", "shape": [2, 3], "data_offsets": [0, 6]} | changes}).encode()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (header(dtype="I7"), "has dtype 'I7'; known are BOOL"),
        (header(dtype=["I8"]), "has dtype"),
        (header(shape=[2, -3]), "a shape is a list of sizes from 0"),
        (header(shape=[2, 3.0]), "a shape is a list of sizes from 0"),
        (header(shape=[True, 6]), "a shape is a list of sizes from 0"),
        (header(shape=[2**40, 2**40]), "a shape is a list of sizes from 0"),
        (header(shape=[1] * 65), "a shape is a list of sizes from 0"),
        (header(shape=[2, 4]), "takes 8 bytes and has 6"),
        (header(dtype="F32"), "takes 24 bytes and has 6"),
        (header(shape=[0], data_offsets=[0, 0]), "its tensors take 0 bytes and the file holds 6"),
        (header(data_offsets=[6, 0]), "it needs a start and an end"),
        (header(data_offsets=[0, 6, 6]), "it needs a start and an end"),
        (header(data_offsets=[1, 7]), "starts at byte 1 of the data and must start at 0"),
        (header(more=1), "must have dtype, shape and data_offsets"),
        (b"[]", "must be a JSON object"),
        (b" " + header(), "must be a JSON object"),
        (b"{", "not readable"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not readable"),
        (b'{"__metadata__": {"a": 1}}', "its metadata must be texts"),
        (b'{"__metadata__": 3}', "its metadata must be texts"),
        (header() + b"\xff", "not readable"),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(raw, says):
    with pytest.raises(SlimLoadError, match=says):
        parse_header(raw, 6, "here")


def test_tensors_may_not_overlap_or_leave_gaps():
    def two(start, end):
        entry = {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}
        return json.dumps({"a": entry, "b": entry | {"data_offsets": [start, end]}}).encode()

    assert parse_header(two(4, 8), 8, "here").tensors.keys() == {"a", "b"}
    for start in (0, 2, 5):
        with pytest.raises(SlimLoadError, match="must start at"):
            parse_header(two(start, start + 4), start + 4, "here")


@pytest.mark.parametrize("length", [7, 10**6, 2**64 - 1, MOST_HEADER_BYTES + 1])
def test_a_length_beyond_the_file_asks_for_no_memory(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with memory_used() as memory:  # noqa: SIM117
        with pytest.raises(SlimLoadError, match=r"a header fits into the file|must be a JSON object|not readable"):
            read_header(path)
    assert memory.peak < 100_000


def test_the_library_refuses_what_has_no_header(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1234567")
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "a.safetensors", "pt").__enter__()
    with pytest.raises(SlimLoadError, match="it has 7 bytes"):
        read_header(tmp_path / "a.safetensors")
