"""Text for training and held-out evaluation, from any source of `datasets` or from Python's standard library."""

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from hf_slim.core.config import SlimConfig, require_whole
from hf_slim.core.errors import SlimConfigError, SlimDataError
from hf_slim.progress import progress

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
NOT_PROSE = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
logger = logging.getLogger(__name__)
HELD_OUT_NAME = re.compile(r"(^|[^a-z])(test|validation|valid|val|dev|eval|held_?out)([^a-z]|$)", re.IGNORECASE)
HELD_OUT_PARTS = 10  # one document in ten is held out if a source has no held-out split


@dataclass(frozen=True)
class DataConfig(SlimConfig):
    """The source of the text, and how it is split into examples."""

    source: str = "stdlib"
    """Source of the text: `stdlib` (the source files of Python's standard library), a file (.parquet, .json,
    .jsonl, .csv, .txt, .arrow), a folder, or a name that `datasets.load_dataset` takes. Environment variables, such as
    `$HF_SLIM_DATA`, are filled in."""

    load: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `datasets.load_dataset`, such as `{name: wikitext-2-raw-v1}`. Empty: none."""

    text_column: str | list[str] = "text"
    """Name of the column that holds the text; a list of two names if pairs of texts are classified."""

    label_column: str = "label"
    """Name of the column that holds the class of a text; used by the task `sequence-classification` only."""

    train_split: str = "train"
    """Name of the split that is trained on."""

    evaluation_split: str = "validation"
    """Name of the held-out split. If the source has no such split, its split `test` is used; if it has none either,
    one document in ten is held out, chosen by a hash."""

    block_size: int = 512
    """Tokens in one training example, a whole number of at least 8. For a classifier it is the maximum; longer texts
    are truncated."""

    def __post_init__(self) -> None:
        columns = self.text_columns
        if not 1 <= len(columns) <= 2 or not all(isinstance(column, str) and column for column in columns):
            raise SlimConfigError(f"`text_column` must be a name, or a list of two names, got {self.text_column!r}.")
        require_whole("block_size", self.block_size, least=8)

    @property
    def text_columns(self) -> list[str]:
        """The columns of text: one, or those of a pair."""
        return list(self.text_column) if isinstance(self.text_column, list | tuple) else [self.text_column]


# cache of `load_texts` inside `reading_once`: source and splits -> data sets; None outside
_read_already: ContextVar[dict[DataConfig, tuple[Dataset, Dataset]] | None] = ContextVar("read", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """Context in which `load_texts` reads, splits and hashes every source once, and then returns the same data sets.

    Nested contexts share the data sets of the outermost one. Also a decorator: `@reading_once()`.
    """
    if _read_already.get() is not None:
        yield
        return
    token = _read_already.set({})
    try:
        yield
    finally:
        _read_already.reset(token)


def load_texts(config: DataConfig, columns: list[str] | None = None) -> tuple[Dataset, Dataset]:
    """Training and held-out documents.

    Args:
        columns: Columns that must exist; None: the columns of text.
    Raises: SlimDataError: if the source cannot be read or has no such column.
    """
    columns = columns or config.text_columns
    if config.source == "stdlib" and len(columns) > 1:
        raise SlimDataError(f"'stdlib' has only text, and columns {columns} are needed. Set `data.source`.")
    read = _read_already.get()
    # equal for all settings with the same source and splits
    key = replace(config, text_column=columns[0], label_column="", block_size=DataConfig.block_size)
    splits = read[key] if read is not None and key in read else _read(config, columns[0])
    if read is not None:
        read[key] = splits
    for split in splits:
        _check_columns(split, columns, config)
    if not len(splits[0]) or not len(splits[1]):
        raise SlimDataError(f"'{config.source}' is empty or too small for a held-out split. Give more documents.")
    return splits


def _read(config: DataConfig, name_column: str) -> tuple[Dataset, Dataset]:
    """Training and held-out documents; without a held-out split they are chosen by a hash of column `name_column`."""
    logger.info("Reading the data '%s'.", config.source)
    if config.source == "stdlib":
        sources = _stdlib_sources()
        return _split(Dataset.from_dict({name_column: list(sources.values())}), sources)
    loaded = _load(config)
    if config.train_split not in loaded:
        raise SlimDataError(f"'{config.source}' has no split '{config.train_split}'. It has {', '.join(loaded)}.")
    train, name = loaded[config.train_split], _held_out_split(loaded, config)
    _check_columns(train, [name_column], config)
    if name is not None:
        logger.info("Held out: the split '%s', %d rows.", name, len(loaded[name]))
        return train, loaded[name]
    logger.info("'%s' has no held-out split: one row in ten is held out, chosen by a hash.", config.source)
    return _split(train, train[name_column])


def _held_out_split(splits: DatasetDict, config: DataConfig) -> str | None:
    """Name of the held-out split; None if the source has none.

    Raises: SlimDataError: if a split was named that does not exist, and there are others than the training split.
    """
    if config.evaluation_split in splits:
        return config.evaluation_split
    others = [name for name in splits if name != config.train_split]
    if config.evaluation_split != DataConfig.evaluation_split and others:
        raise SlimDataError(
            f"'{config.source}' has no split '{config.evaluation_split}'. It has {', '.join(splits)}: set "
            "`data.evaluation_split`."
        )
    return "test" if "test" in others else None


def load_held_out(config: DataConfig, columns: list[str] | None = None) -> Dataset:
    """Documents to measure a finished model on.

    A file that is named like a held-out set, such as `test.parquet`, is used whole; for all other sources they are the
    second part of `load_texts`.

    Raises: SlimDataError: as `load_texts`.
    """
    path = Path(_expanded(config.source))
    if not (path.is_file() and HELD_OUT_NAME.search(path.stem)):
        return load_texts(config, columns)[1]
    rows = next(iter(_load(config).values()))
    _check_columns(rows, columns or config.text_columns, config)
    logger.info("Held out: the whole file '%s', %d rows.", config.source, len(rows))
    return rows


def text_blocks(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, n_blocks: int, seed: int, title: str
) -> Dataset:
    """Up to `n_blocks` examples of `block_size` tokens: shuffled documents, joined by the end-of-text token and split.

    Every block begins with the beginning-of-text token if the tokenizer adds one to a text. Models that were trained
    with it predict badly without it.

    Returns: a dataset with `input_ids` and equal `labels`; reads only as many documents as it needs.
    Raises: SlimDataError: if the text is shorter than one block.
    """
    size, buffer, blocks = config.block_size, [], []
    begin = _beginning(tokenizer)
    n_text = size - len(begin)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    with progress(None, title, "block", total=n_blocks) as bar:
        for text in texts.shuffle(seed=seed)[config.text_columns[0]]:
            if text:
                buffer += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
            while len(buffer) >= n_text and len(blocks) < n_blocks:
                blocks.append(begin + buffer[:n_text])
                buffer = buffer[n_text:]
                bar.update()
            if len(blocks) == n_blocks:
                break
    if not blocks:
        raise SlimDataError(
            f"'{config.source}' gives fewer than {size} tokens. Lower `data.block_size` or give more text."
        )
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token as a list, or an empty list for a tokenizer that adds none."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _stdlib_sources() -> dict[str, str]:
    """The modules of Python's standard library: first line with the path of the module -> source with this line."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not NOT_PROSE & set(p.relative_to(root).parts))
    if not files:
        raise SlimDataError(f"Python's library at {root} holds no source files. Use another `data.source`.")
    titles = {f"# {path.relative_to(root).as_posix()}": path for path in files}
    return {title: f"{title}\n{path.read_text('utf-8', 'replace')}" for title, path in titles.items()}


def _split(rows: Dataset, names: Iterable[str | None]) -> tuple[Dataset, Dataset]:
    """Holds out one document in ten, chosen by a hash of its name, so that the choice is the same everywhere.

    Args:
        names: One for each row; may be a column of the data set, which is read in parts while it is iterated over.
    """
    buckets = [int(hashlib.sha256((name or "").encode()).hexdigest(), 16) % HELD_OUT_PARTS for name in names]
    kept = [index for index, bucket in enumerate(buckets) if bucket]
    held_out = [index for index, bucket in enumerate(buckets) if not bucket]
    return rows.select(kept), rows.select(held_out)


def _check_columns(rows: Dataset, columns: list[str], config: DataConfig) -> None:
    for column in columns:
        if column not in rows.column_names:
            setting = "text_column" if column in config.text_columns else "label_column"
            raise SlimDataError(
                f"'{config.source}' has no column '{column}'. It has {', '.join(rows.column_names)}: set "
                f"`data.{setting}`."
            )


def _expanded(source: str) -> str:
    """The source with environment variables and `~` replaced by their values."""
    path = os.path.expanduser(os.path.expandvars(source))
    if unset := re.search(r"\$\{?(\w+)", path):
        raise SlimDataError(
            f"`data.source` is '{source}', and the environment variable {unset[1]} is not set. Set it to the folder "
            "that holds the dataset, or name another: `--set data.source=...`, a file, a folder or a name on the Hub."
        )
    return path


def _load(config: DataConfig) -> DatasetDict:
    name = _expanded(config.source)
    path = Path(name)
    arguments = dict(config.load)
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise SlimDataError(f"'{path}' has an unknown file type. Use one of {', '.join(BUILDERS)}.")
        name, arguments["data_files"] = BUILDERS[path.suffix], str(path)
    elif not path.exists() and (path.suffix in BUILDERS or path.is_absolute()):
        raise SlimDataError(f"The data file '{path}' does not exist. Check `data.source`.")
    try:
        loaded = load_dataset(name, **arguments)
    except Exception as error:  # datasets raises many types of errors, all about the source
        raise SlimDataError(
            f"'{config.source}' could not be read as a dataset: {error} Give 'stdlib', a file, a folder, or a name "
            "that `datasets.load_dataset` takes."
        ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({config.train_split: loaded})
