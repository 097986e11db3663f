"""Documents for data/build_shards.py: from files, the Hugging Face Hub, or this Python's own documentation."""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib
import json
import platform
import re
import sysconfig
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

# The validation split of the embedded corpus holds this share of its bytes.
VAL_SHARE = 0.08
# The begin of some UTF-8 files, which is not part of their text.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A compressed chunk that becomes a few megabytes of text at most, where the text is not made to be small.
ZST_READ_BYTES = 1 << 16
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


class Format(NamedTuple):
    """How a kind of file begins, what it is called, and how to make one that can be read."""

    begin: bytes
    name: str
    remedy: str


FORMATS = (
    Format(b"\x1f\x8b", "gzip data", "rename it to end in .jsonl.gz"),
    Format(b"\x28\xb5\x2f\xfd", "zstandard data", "rename it to end in .jsonl.zst"),
    Format(b"PAR1", "a parquet file", "rename it to end in .parquet"),
    Format(b"PK\x03\x04", "a zip archive", "unpack it first"),
    Format(b"\xff\xfe", "UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
    Format(b"\xfe\xff", "UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
)


def reject_other_formats(path: Path, first_bytes: bytes) -> None:
    """Raise ValueError if a text begins like a file of another kind."""
    for known in FORMATS:
        if first_bytes.startswith(known.begin):
            raise ValueError(f"{path} holds {known.name}, not what its name says: {known.remedy}")
    if b"\0" in first_bytes[:2]:
        raise ValueError(f"{path} looks like UTF-16 text, not UTF-8: convert it with iconv -f UTF-16LE -t UTF-8")
    if first_bytes.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[") and ".jsonl" in path.suffixes:
        raise ValueError(f"{path} holds a JSON array: write one object per line, for example with jq -c '.[]'")


def jsonl_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, text) of each line that is not blank."""
    with path.open("rb") as file:
        if path.suffix == ".zst":
            lines = zst_lines(path, file)
        elif path.suffix == ".gz":
            lines = gz_lines(path, file)
        else:
            lines = file

        is_first = True
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if is_first:
                reject_other_formats(path, line)
                is_first = False
            yield f"{path} line {number}", jsonl_text(f"{path} line {number}", line)


def jsonl_text(place: str, line: bytes) -> Any:
    """What a line has under `text`, or None. Raises ValueError, naming the place, for a line that is not JSON."""
    try:
        # Whole numbers of more than 4,300 digits would be an error, and we need no number.
        row = json.loads(line.decode("utf-8-sig"), parse_int=float)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 (byte {error.start}): convert it first") from None
    except (ValueError, RecursionError):
        if not line.endswith(b"\n"):
            raise ValueError(f"{place} is not JSON and is the last: the file may be cut off, fetch it again") from None
        raise ValueError(f"{place} is not JSON: write one object per line") from None
    return row.get("text") if isinstance(row, dict) else None


def gz_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    if path.stat().st_size == 0:
        # The module takes no bytes for no text.
        raise ValueError(f"{path} is empty, which no gzip file is: fetch it again")
    try:
        yield from gzip.GzipFile(fileobj=file)
    except EOFError:
        raise ValueError(f"{path} is cut off: fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not gzip data ({error}): fetch it again") from None


def zst_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path} needs the zstandard package: pip install zstandard") from None
    try:
        yield from lines_of(zst_chunks(path, file, zstandard.ZstdDecompressor()))
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is not zstandard data ({error}): fetch it again") from None


def zst_chunks(path: Path, file: BinaryIO, decompressor: Any) -> Iterator[bytes]:
    """The content of all frames. Raises ValueError if the file ends inside of one.

    Parallel compressors write many frames. The stream reader of the package takes the end of the file for the end of
    the frame.
    """
    frame = decompressor.decompressobj()
    while compressed := file.read(ZST_READ_BYTES):
        while compressed:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(compressed)
            compressed = frame.unused_data
    if not frame.eof:
        raise ValueError(f"{path} is cut off: fetch it again")


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a text that comes in chunks, each with its line end."""
    begun: list[bytes] = []
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield b"".join([*begun, end, b"\n"])
            begun = []
        begun.append(rest)
    last = b"".join(begun)
    if last:
        yield last


def parquet_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, text) of each row. Reads only the column `text`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs the pyarrow package: pip install pyarrow") from None

    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        check_text_column(path, table.schema_arrow, pyarrow.types)
        for batch in table.iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield f"{path} row {row}", text
                row += 1
    except UnicodeDecodeError:
        raise ValueError(f"{path} has text behind row {row} that is not UTF-8: convert it first") from None
    except (pyarrow.ArrowException, OSError) as error:
        if is_parquet:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is damaged or cut off behind row {row} ({reason}): fetch it again") from None
        raise ValueError(f"{path} is not a parquet file ({error}): fetch it again") from None


def check_text_column(path: Path, schema: Any, types: Any) -> None:
    """Raise ValueError if a parquet file has no column `text`, or if it holds bytes."""
    if "text" not in schema.names:
        raise ValueError(f"{path} has no column `text` among {schema.names}: rename the one that holds it")
    kind = schema.field("text").type
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        raise ValueError(f"{path} has a column `text` of {kind}, not of string: cast it to string first")


def txt_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, text) of the whole file, which is one document."""
    # read_text would rewrite the line ends.
    content = path.read_bytes()
    reject_other_formats(path, content[:100])
    try:
        # A byte order mark at the begin is not part of the text.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from None
    yield str(path), text


READERS = {
    ".jsonl": jsonl_texts,
    ".jsonl.gz": jsonl_texts,
    ".jsonl.zst": jsonl_texts,
    ".parquet": parquet_texts,
    ".txt": txt_texts,
}


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
    Raises FileNotFoundError or ValueError for files that do not exist, have an unknown suffix, or are all in `val`.
    """
    files = [*inputs, *val]
    for path in files:
        # A wrong name should be an error now, not after an hour of work on the files before it.
        reader_of(path)
    if val and {path.resolve() for path in inputs} <= {path.resolve() for path in val}:
        raise ValueError(
            f"--val names all files of --input, so that no document is left for training: leave --val out to hold out "
            f"the first --val-docs={val_docs} documents, or name another file"
        )

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
