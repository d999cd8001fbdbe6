"""Pickles run code when they are read: the repository holds none, and hf_slim neither reads nor writes any."""

import ast
import io
import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENDINGS = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".npy", ".npz", ".ckpt", ".joblib"}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.save", "numpy.load", "np.load", "numpy.save", "np.save", "pandas.read_pickle"}


def is_pickle(content: bytes) -> bool:
    """Whether bytes are a pickle of protocol 2 or newer, or a zip file that holds one, as `torch.save` writes it."""
    if content[:1] == b"\x80" and content[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return False
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        return any(name.endswith((".pkl", ".pickle")) or is_pickle(archive.read(name)) for name in names)


def pickling(source: str) -> list[str]:
    """The imports and calls in Python source that read or write pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if (node.module or "").partition(".")[0] in MODULES else sorted(names & CALLS)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in CALLS:
            found.append(ast.unparse(node))
    return found


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_pickle_is_in_the_repository():
    files = tracked_files()
    assert len(files) > 200
    assert not [path for path in files if path.suffix.lower() in ENDINGS]
    assert not [path for path in files if is_pickle(path.read_bytes())]


def test_hf_slim_reads_and_writes_no_pickle():
    sources = sorted((ROOT / "hf_slim").rglob("*.py"))
    assert len(sources) > 100
    found = {str(path.relative_to(ROOT)): pickling(path.read_text()) for path in sources}
    assert not {name: uses for name, uses in found.items() if uses}


def zipped(name: str, content: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(name, content)
    return target.getvalue()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_recognised_whatever_its_name(protocol):
    content = pickle.dumps({"weight": [1.0]}, protocol=protocol)
    assert is_pickle(content)
    assert is_pickle(zipped("scores/data.pkl", content))
    assert is_pickle(zipped("scores/data", content))
    assert not is_pickle(zipped("scores/data.json", b"{}"))
    assert not is_pickle(b'{"weight": [1.0]}')


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import pickle", ["pickle"]),
        ("import pickle as json", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("from torch import load", ["torch.load"]),
        ("def read(path):\n    return torch.load(path)", ["torch.load"]),
        ("from safetensors.torch import load_file\nload_file('x')", []),
    ],
)
def test_a_use_of_pickle_is_recognised(source, uses):
    assert pickling(source) == uses
