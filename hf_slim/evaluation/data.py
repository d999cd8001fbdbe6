"""Text for training and held-out evaluation, from anything `datasets` reads or from Python's own library."""

import hashlib
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
NOT_PROSE = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_PARTS = 10  # one document in ten is held out where a source has no split of its own


@dataclass(frozen=True)
class DataConfig(SlimConfig):
    """Where the text comes from and how it is cut."""

    source: str = field(
        default="stdlib",
        metadata={"help": "'stdlib' (Python's own source files), a file or folder, or a name `load_dataset` takes."},
    )
    load: dict[str, Any] = field(default_factory=dict, metadata={"help": "Further arguments of `load_dataset`."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    evaluation_split: str = field(
        default="validation",
        metadata={"help": "The held-out split; if there is none, one document in ten is kept back."},
    )
    block_size: int = field(default=512, metadata={"help": "Tokens per training example."})

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 8:
            raise SlimError(f"`block_size` must be a whole number of at least 8 tokens, got {self.block_size!r}.")


def load_texts(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and held-out documents, each with the column `config.text_column`.

    Raises: SlimError: if the source cannot be read or has no such column.
    """
    if config.source == "stdlib":
        sources = _stdlib_sources()
        splits = _split(list(sources.values()), list(sources), config.text_column)
    else:
        loaded = _load(config)
        if config.train_split not in loaded:
            raise SlimError(f"'{config.source}' has no split '{config.train_split}'. It has {', '.join(loaded)}.")
        for name, split in loaded.items():
            if config.text_column not in split.column_names:
                raise SlimError(
                    f"'{config.source}' ({name}) has no column '{config.text_column}'. It has "
                    f"{', '.join(split.column_names)}: set `data.text_column`."
                )
        train = loaded[config.train_split]
        if config.evaluation_split in loaded:
            splits = train, loaded[config.evaluation_split]
        else:
            texts = list(train[config.text_column])
            splits = _split(texts, texts, config.text_column)
    if not len(splits[0]) or not len(splits[1]):
        raise SlimError(f"'{config.source}' is empty or too small to hold anything out. Give more documents.")
    return splits


def text_blocks(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, n_blocks: int, seed: int, title: str
) -> Dataset:
    """Up to `n_blocks` examples of `block_size` tokens: shuffled documents, joined by the end-of-text token and cut.

    Returns: a dataset with `input_ids` and equal `labels`; stops reading once it has enough.
    Raises: SlimError: if the text is shorter than one block.
    """
    size, buffer, blocks = config.block_size, [], []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    with tqdm(total=n_blocks, desc=title, unit="block") as bar:
        for text in texts.shuffle(seed=seed)[config.text_column]:
            if text:
                buffer += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
            while len(buffer) >= size and len(blocks) < n_blocks:
                blocks.append(buffer[:size])
                buffer = buffer[size:]
                bar.update()
            if len(blocks) == n_blocks:
                break
    if not blocks:
        raise SlimError(
            f"'{config.source}' gives fewer than {size} tokens. Lower `data.block_size` or give more text."
        )
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _stdlib_sources() -> dict[str, str]:
    """Python's own modules: a first line that names the module -> its source, which begins with that line."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not NOT_PROSE & set(p.relative_to(root).parts))
    if not files:
        raise SlimError(f"Python's library at {root} holds no source files. Use another `data.source`.")
    titles = {f"# {path.relative_to(root).as_posix()}": path for path in files}
    return {title: f"{title}\n{path.read_text('utf-8', 'replace')}" for title, path in titles.items()}


def _split(texts: list[str], names: list[str], text_column: str) -> tuple[Dataset, Dataset]:
    """One document in ten held out, chosen by a hash of its name: the same ones everywhere."""
    buckets = [int(hashlib.sha256((name or "").encode()).hexdigest(), 16) % HELD_OUT_PARTS for name in names]
    train = [text for text, bucket in zip(texts, buckets, strict=True) if bucket]
    held_out = [text for text, bucket in zip(texts, buckets, strict=True) if not bucket]
    return Dataset.from_dict({text_column: train}), Dataset.from_dict({text_column: held_out})


def _load(config: DataConfig) -> DatasetDict:
    path = Path(config.source)
    arguments = dict(config.load)
    name = config.source
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise SlimError(f"'{path}' is of a kind that is not known. Use one of {', '.join(BUILDERS)}.")
        name, arguments["data_files"] = BUILDERS[path.suffix], str(path)
    elif not path.exists() and (path.suffix in BUILDERS or path.is_absolute()):
        raise SlimError(f"The data file '{path}' does not exist. Check `data.source`.")
    try:
        loaded = load_dataset(name, **arguments)
    except Exception as error:  # datasets raises many kinds, all of them about the source
        raise SlimError(
            f"'{config.source}' could not be read as a dataset: {error} Give 'stdlib', a file, a folder, or a name "
            "that `datasets.load_dataset` takes."
        ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({config.train_split: loaded})
