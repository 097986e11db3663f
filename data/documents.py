"""Documents for data/build_shards.py: from files, the Hugging Face Hub, or this Python's own documentation."""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import json
import platform
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

# The validation split of the embedded corpus holds this share of its bytes.
VAL_SHARE = 0.08
# Shorter docstrings are labels, not prose.
MIN_DOCSTRING_CHARS = 20
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}

HUB_LICENCES = {
    "HuggingFaceFW/fineweb": "ODC-By 1.0, with the terms of use of Common Crawl",
    "HuggingFaceFW/fineweb-edu": "ODC-By 1.0, with the terms of use of Common Crawl",
}


class Corpus(NamedTuple):
    """A train and a validation split, and where they come from.

    train, val  return the documents of the split, from the first one again at each call
    source      names the files or the data set
    revision    returns what makes the source exact: a commit, a version, or hashes of the files
    licence     of the text, with the attribution that it asks for
    """

    train: Callable[[], Iterable[str]]
    val: Callable[[], Iterable[str]]
    source: str
    revision: Callable[[], str]
    licence: str


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def framed(text: str) -> bytes:
    """The bytes of one document that enter `text_sha256`: the length of its UTF-8 in 8 bytes, then its UTF-8."""
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def fingerprint(text: str) -> bytes:
    """The same for two texts that differ only in blanks or in Unicode composition.

    It keeps copies of validation documents out of the train split.
    """
    words = unicodedata.normalize("NFC", text).split()
    return digest(" ".join(words))


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Files ---


def jsonl_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, text) of each line that is not blank."""
    with path.open("rb") as file:
        lines = zst_lines(path, file) if path.suffix == ".zst" else file
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number} is not UTF-8 (byte {error.start}): convert it first") from None
            except (ValueError, RecursionError):
                raise ValueError(f"{path} line {number} is not JSON: write one object per line") from None
            text = row.get("text") if isinstance(row, dict) else None
            yield f"{path} line {number}", text


def zst_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path} needs the zstandard package: pip install zstandard") from None
    try:
        # Parallel compressors write one frame after the other; without the option only the first would be read.
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        yield from io.BufferedReader(stream)
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is not zstandard data ({error}): fetch it again") from None


def parquet_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, text) of each row. Reads only the column `text`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs the pyarrow package: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file ({error}): fetch it again") from None
    if "text" not in table.schema_arrow.names:
        raise ValueError(f"{path} has no column `text` among {table.schema_arrow.names}: rename the one that holds it")

    row = 0
    for batch in table.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            yield f"{path} row {row}", text
            row += 1


def txt_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, text) of the whole file, which is one document."""
    try:
        # read_text would rewrite the line ends.
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from None
    yield str(path), text


READERS = {".jsonl": jsonl_texts, ".jsonl.zst": jsonl_texts, ".parquet": parquet_texts, ".txt": txt_texts}


def reader_of(path: Path) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    """The function that reads a file with this suffix.

    Raises FileNotFoundError if there is no such file, and ValueError if no function reads it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: check the path")
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise ValueError(f"{path} has an unknown suffix: use one of {', '.join(READERS)}")


def checked_text(place: str, text: Any) -> str:
    """Return `text` if it is Unicode text; otherwise raise ValueError, naming its place."""
    if not isinstance(text, str):
        raise ValueError(f"{place} has no string `text`: store the document under that key")
    # JSON can spell half a surrogate pair, UTF-8 cannot.
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{place} holds half a surrogate pair, which is not Unicode text: remove it")
    return text


def read_documents(paths: list[Path]) -> Iterator[str]:
    """The documents of the files, in order. Raises ValueError, naming file and line, for what cannot be read."""
    for path in paths:
        read = reader_of(path)
        for place, text in read(path):
            yield checked_text(place, text)


def file_corpus(
    inputs: list[Path], val: list[Path], val_docs: int, max_docs: int | None = None, licence: str = ""
) -> Corpus:
    """The first `max_docs` documents of `inputs`, or all of them if it is None.

    The validation split is the documents of `val`; if `val` is empty, the first `val_docs` documents of `inputs`.
    """
    files = [*inputs, *val]
    for path in files:
        # A wrong name should be an error now, not after an hour of work on the files before it.
        reader_of(path)

    def read_train() -> Iterator[str]:
        n_held_out = 0 if val else val_docs
        return islice(read_documents(inputs), n_held_out, max_docs)

    def read_val() -> Iterator[str]:
        return read_documents(val) if val else islice(read_documents(inputs), val_docs)

    return Corpus(
        train=read_train,
        val=read_val,
        source=", ".join(path.name for path in files),
        revision=lambda: ", ".join(f"sha256:{file_digest(path)}" for path in files),
        licence=licence or "unknown",
    )


# --- The Hugging Face Hub ---


def hub_corpus(
    repo: str, config: str | None, revision: str | None, val_docs: int, max_docs: int | None, licence: str = ""
) -> Corpus:
    """The train split of a data set on the Hub, streamed; the first `val_docs` documents are for validation.

    `revision` is resolved to a commit here, so that every pass over the documents reads the same ones.
    """
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError
    except (ImportError, AttributeError):
        # The attribute is missing where Python took the folder data/datasets for the package.
        raise ValueError("--hub needs the datasets package: pip install datasets") from None

    api = HfApi()

    def unreadable(error: Exception) -> OSError:
        return OSError(f"{repo} cannot be read from {api.endpoint}: {' '.join(str(error).split())}")

    try:
        info = api.dataset_info(repo, revision=revision)
    except HTTPError as error:
        raise unreadable(error) from None

    def read() -> Iterator[str]:
        try:
            rows = load_dataset(repo, config, split="train", revision=info.sha, streaming=True)
            for number, row in enumerate(rows):
                yield checked_text(f"{repo} row {number}", row.get("text"))
        except HTTPError as error:
            # The library has already tried several times.
            raise unreadable(error) from None

    licence = licence or HUB_LICENCES.get(repo) or getattr(info.card_data, "license", None) or "unknown"
    return Corpus(
        train=lambda: islice(read(), val_docs, max_docs),
        val=lambda: islice(read(), val_docs),
        source=f"{repo} {config}" if config else repo,
        revision=lambda: str(info.sha),
        licence=f"https://huggingface.co/datasets/{repo}: {licence}",
    )


# --- The embedded corpus ---


def module_docstrings(source: bytes) -> str:
    """Docstrings of a module, its classes and functions in the order of the file, joined by blank lines."""
    try:
        # Sources of others may hold escapes that Python now warns about.
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except SyntaxError:
        return ""

    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return "\n\n".join(text for text in texts if len(text) >= MIN_DOCSTRING_CHARS)


def embedded_documents() -> list[str]:
    """English prose of the running Python: its help topics and the docstrings of its modules, without duplicates.

    The modules are parsed, never imported. The text differs between Python versions; the manifest names the version.
    """
    documents = []
    try:
        from pydoc_data.topics import topics
    except ImportError:
        print("pydoc_data.topics is not part of this Python: using docstrings alone")
    else:
        documents = [topics[name] for name in sorted(topics)]

    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(stdlib).parts):
            documents.append(module_docstrings(path.read_bytes()))

    # A dict keeps the first of equal documents, in order.
    return list(dict.fromkeys(text for text in documents if text.strip()))


def embedded_corpus() -> Corpus:
    """The documents ordered by the sha256 of their text; the first VAL_SHARE of the bytes are the validation split.

    This order is as good as random and the same on every machine.
    """
    documents = sorted(embedded_documents(), key=digest)
    if not documents:
        raise ValueError(f"{sysconfig.get_path('stdlib')} holds no Python sources: name your own text with --input")

    # The document that crosses the limit is the last one of the validation split.
    ends = list(accumulate(len(text.encode()) for text in documents))
    n_val = 1 + sum(end < VAL_SHARE * ends[-1] for end in ends)
    return Corpus(
        train=lambda: documents[n_val:],
        val=lambda: documents[:n_val],
        source=f"documentation of Python {platform.python_version()}: language topics and docstrings",
        revision=platform.python_version,
        licence="Python documentation: PSF License Agreement (https://docs.python.org/3/license.html)",
    )
