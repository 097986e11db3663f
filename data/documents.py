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

VAL_SHARE = 0.08  # of the embedded corpus, in bytes
MIN_DOCSTRING_CHARS = 20  # shorter ones are labels, not prose
HUB_LICENCES = {
    "HuggingFaceFW/fineweb": "ODC-By 1.0, with the terms of use of Common Crawl",
    "HuggingFaceFW/fineweb-edu": "ODC-By 1.0, with the terms of use of Common Crawl",
}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


class Corpus(NamedTuple):
    """Two splits that can be read more than once, and where they come from."""

    train: Callable[[], Iterable[str]]
    val: Callable[[], Iterable[str]]
    source: str
    revision: Callable[[], str]  # what makes the source exact: a commit, a version, hashes of files
    licence: str  # of the text, with what it wants said


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def framed(text: str) -> bytes:
    """What the `text_sha256` of a manifest hashes for each document: 8 bytes with the length of its UTF-8, and that."""
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def fingerprint(text: str) -> bytes:
    """Equal for texts that differ only in blanks and in Unicode composition; to keep val documents out of train."""
    return digest(" ".join(unicodedata.normalize("NFC", text).split()))


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Files ---


def jsonl_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, text) of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(zst_lines(path, file) if path.suffix == ".zst" else file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number} is not UTF-8 (byte {error.start}): convert it first") from None
            except (ValueError, RecursionError):
                raise ValueError(f"{path} line {number} is not JSON: write one object per line") from None
            yield f"{path} line {number}", record.get("text") if isinstance(record, dict) else None


def zst_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path} needs the zstandard package: pip install zstandard") from None
    try:
        yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is not zstandard data ({error}): fetch it again") from None


def parquet_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, text) of each row; reads only the column `text`."""
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
    rows = (text for batch in table.iter_batches(columns=["text"]) for text in batch.column(0).to_pylist())
    yield from ((f"{path} row {row}", text) for row, text in enumerate(rows))


def txt_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """The whole file as one document, its bytes untouched: text mode would rewrite line ends."""
    try:
        yield str(path), path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from None


READERS = {".jsonl": jsonl_texts, ".jsonl.zst": jsonl_texts, ".parquet": parquet_texts, ".txt": txt_texts}


def reader_of(path: Path) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    """The reader for the suffix of an existing file; errors come before the work, not after an hour of it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: check the path")
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise ValueError(f"{path} has an unknown suffix: use one of {', '.join(READERS)}")


def checked_text(where: str, text: Any) -> str:
    """The document, if it is one. Raises ValueError that says where it stands otherwise."""
    if not isinstance(text, str):
        raise ValueError(f"{where} has no string `text`: store the document under that key")
    if re.search("[\ud800-\udfff]", text):  # JSON can spell half a surrogate pair, UTF-8 cannot
        raise ValueError(f"{where} holds half a surrogate pair, which is not Unicode text: remove it")
    return text


def read_documents(paths: list[Path]) -> Iterator[str]:
    """The documents of the files, in order. Raises ValueError, naming file and line, for anything unreadable."""
    for path in paths:
        yield from (checked_text(where, text) for where, text in reader_of(path)(path))


def file_corpus(
    inputs: list[Path], val: list[Path], val_docs: int, max_docs: int | None = None, licence: str = ""
) -> Corpus:
    """Documents of `inputs`, at most `max_docs`; of `val`, or the first `val_docs` of the input, for validation."""
    for path in [*inputs, *val]:
        reader_of(path)
    skip = 0 if val else val_docs
    return Corpus(
        train=lambda: islice(read_documents(inputs), skip, max_docs),
        val=lambda: read_documents(val) if val else islice(read_documents(inputs), skip),
        source=", ".join(path.name for path in [*inputs, *val]),
        revision=lambda: ", ".join(f"sha256:{file_digest(path)}" for path in [*inputs, *val]),
        licence=licence or "unknown",
    )


# --- The Hugging Face Hub ---


def hub_corpus(
    repo: str, config: str | None, revision: str | None, val_docs: int, max_docs: int | None, licence: str = ""
) -> Corpus:
    """The train split of a data set on the Hub, streamed; the first `val_docs` documents are for validation.

    The revision is resolved to a commit once, so that every pass over the documents reads the same.
    """
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError
    except (ImportError, AttributeError):  # without the package, `datasets` may be found as the folder data/datasets
        raise ValueError("--hub needs the datasets package: pip install datasets") from None
    api = HfApi()

    def unreadable(error: Exception) -> OSError:
        return OSError(f"{repo} cannot be read from {api.endpoint}: {' '.join(str(error).split())}")

    def read() -> Iterator[str]:
        try:
            rows = load_dataset(repo, config, split="train", revision=info.sha, streaming=True)
            yield from (checked_text(f"{repo} row {row}", record.get("text")) for row, record in enumerate(rows))
        except HTTPError as error:  # after the attempts of the library itself
            raise unreadable(error) from None

    try:
        info = api.dataset_info(repo, revision=revision)
    except HTTPError as error:
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
        with warnings.catch_warnings(action="ignore"):  # old escapes in the sources of others
            tree = ast.parse(source)
    except SyntaxError:
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = [ast.get_docstring(node) or "" for node in nodes]  # dedented by inspect.cleandoc
    return "\n\n".join(text for text in texts if len(text) >= MIN_DOCSTRING_CHARS)


def embedded_documents() -> list[str]:
    """English prose of the running Python: its language topics and its modules' docstrings, without duplicates.

    The modules are parsed, never imported. The text differs between Python versions; the manifest names the version.
    """
    documents = []
    try:
        from pydoc_data.topics import topics

        documents = [topics[name] for name in sorted(topics)]
    except ImportError:
        print("pydoc_data.topics is not part of this Python: using docstrings alone")
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(stdlib).parts):
            documents.append(module_docstrings(path.read_bytes()))
    return list(dict.fromkeys(text for text in documents if text.strip()))


def embedded_corpus() -> Corpus:
    """Order the documents by sha256 of their text; the first VAL_SHARE of the bytes are the validation split.

    The order is as good as random, the same on every machine, and a document never changes sides alone.
    """
    documents = sorted(embedded_documents(), key=digest)
    if not documents:
        raise ValueError(f"{sysconfig.get_path('stdlib')} holds no Python sources: name your own text with --input")
    ends = list(accumulate(len(text.encode()) for text in documents))
    n_val = 1 + sum(end < VAL_SHARE * ends[-1] for end in ends)
    return Corpus(
        train=lambda: documents[n_val:],
        val=lambda: documents[:n_val],
        source=f"documentation of Python {platform.python_version()}: language topics and docstrings",
        revision=platform.python_version,
        licence="Python documentation: PSF License Agreement (https://docs.python.org/3/license.html)",
    )
