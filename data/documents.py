"""Documents for data/build_shards.py: from files, the Hugging Face Hub, or this Python's own documentation."""

from __future__ import annotations

import ast
import gzip
import hashlib
import heapq
import importlib
import json
import os
import platform
import re
import sysconfig
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm  # type: ignore[import-untyped]

# The validation split of the embedded corpus holds this share of its bytes.
EMBEDDED_VAL_SHARE = 0.08

# How many documents the published data sets hold out: the first ones. So do we for the documents behind them, which
# data/download.py stores under this name, and for a data set that is streamed.
PUBLISHED_VAL_DOCS = 50_000
PUBLISHED_DOCUMENTS = "docs_selected"

# How much of other text is held out: this share of its bytes, within two limits. Less than the first gives a score that
# means little; more than the second makes a laptop spend its time on scoring.
VAL_SHARE = 0.02
LEAST_VAL_BYTES = 200_000
MOST_VAL_BYTES = 2_000_000
LEAST_VAL_DOCS = 10
# A small text must keep something to train on. It gives this share of its bytes where LEAST_VAL_BYTES would be more.
SMALL_VAL_SHARE = 0.1
# No text gives more of its documents, or this many times the bytes that it should.
LARGEST_VAL_SHARE = 0.2
LARGEST_VAL_EXCESS = 2

# A text file is cut into documents if it holds more than this share of all input, such as a single book, or more bytes
# than this.
CUT_SHARE = 0.02
CUT_BYTES = 1_000_000
# Such a document takes paragraphs until it has this many bytes, and never more than the second number.
PIECE_BYTES = 4_000
LONGEST_PIECE_BYTES = 16_000

# Of more input files than this the manifest has only a summary.
LISTED_FILES = 20
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

    train, val      return the documents of the split, from the first one again at each call
    source          names the files or the data set
    revision        returns what makes the source exact: a commit, a version, or hashes of the files
    licence         of the text, with the attribution that it asks for
    document_rule   returns a sentence about what a document is
    val_rule        returns a sentence about which documents are held out for validation
    """

    train: Callable[[], Iterable[str]]
    val: Callable[[], Iterable[str]]
    source: str
    revision: Callable[[], str]
    licence: str
    document_rule: Callable[[], str]
    val_rule: Callable[[], str]


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


def count(n: int, noun: str, plural: str = "") -> str:
    """1 file, 2 files, 1,000 files"""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {plural or noun + 's'}"


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
    if first_bytes.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[") and suffix_of(path).startswith(".jsonl"):
        raise ValueError(f"{path} holds a JSON array: write one object per line, for example with jq -c '.[]'")


def jsonl_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, text) of each line that is not blank."""
    with path.open("rb") as file:
        if suffix_of(path) == ".jsonl.zst":
            lines = zst_lines(path, file)
        elif suffix_of(path) == ".jsonl.gz":
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


def short_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a text. One of more than LONGEST_PIECE_BYTES comes in parts, which end with a blank if they can."""
    begun = b""
    while line := begun + file.readline(LONGEST_PIECE_BYTES - len(begun)):
        begun = b""
        if len(line) == LONGEST_PIECE_BYTES and not line.endswith(b"\n"):
            end = line.rfind(b" ") + 1 or last_character(line)
            begun = line[end:]
            line = line[:end]
        yield line


def last_character(text: bytes) -> int:
    """Where the last character of a UTF-8 text begins, which may be cut off. At least 1."""
    begin = len(text) - 1
    while begin > 1 and text[begin] & 0xC0 == 0x80:
        begin -= 1
    return begin


def cut_text(file: BinaryIO) -> Iterator[bytes]:
    """Cut a text into documents; joined, they are the text again.

    A document that has PIECE_BYTES ends at the next blank line, so that it holds whole paragraphs. Only if it would
    grow beyond LONGEST_PIECE_BYTES does it end at a line end before that, or within a line that is longer than that.
    """
    piece: list[bytes] = []
    size = 0
    last = b""
    for line in short_lines(file):
        begins_paragraph = bool(line.strip()) and last.endswith(b"\n") and not last.strip()
        if (size >= PIECE_BYTES and begins_paragraph) or size + len(line) > LONGEST_PIECE_BYTES:
            yield b"".join(piece)
            piece = []
            size = 0
        piece.append(line)
        size += len(line)
        last = line
    yield b"".join(piece)


def txt_texts(path: Path, is_cut: bool = False) -> Iterator[tuple[str, Any]]:
    """(place, text) of the whole file, which is one document, or of each document that it is cut into."""
    with path.open("rb") as file:
        # Bytes, because reading text would rewrite the line ends.
        reject_other_formats(path, file.peek(100)[:100])
        begin = 0
        for piece in cut_text(file) if is_cut else [file.read()]:
            # A byte order mark at the begin is not part of the text.
            mark = BYTE_ORDER_MARK if begin == 0 and piece.startswith(BYTE_ORDER_MARK) else b""
            try:
                text = piece[len(mark) :].decode()
            except UnicodeDecodeError as error:
                byte = begin + len(mark) + error.start
                raise ValueError(
                    f"{path} is not UTF-8 (byte {byte}): convert it first, for example with iconv -f WINDOWS-1252 "
                    "-t UTF-8"
                ) from None
            yield f"{path} from byte {begin}", text
            begin += len(piece)


Reader = Callable[[Path], Iterator[tuple[str, Any]]]
READERS: dict[str, Reader] = {
    ".jsonl": jsonl_texts,
    ".jsonl.gz": jsonl_texts,
    ".jsonl.zst": jsonl_texts,
    ".parquet": parquet_texts,
    ".txt": txt_texts,
    ".md": txt_texts,
}


def suffix_of(path: Path) -> str:
    """The suffix that says how to read a file, or "" if no reader knows it."""
    for suffix in READERS:
        if path.name.lower().endswith(suffix):
            return suffix
    return ""


def reader_of(path: Path) -> Reader:
    """The function that reads a file with this suffix.

    Raises FileNotFoundError if there is no such file, and ValueError if no function reads it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: check the path")
    suffix = suffix_of(path)
    if not suffix:
        raise ValueError(f"{path} has an unknown suffix: use one of {', '.join(READERS)}")
    return READERS[suffix]


def folder_files(folder: Path) -> tuple[list[Path], int]:
    """The files in a folder and its subfolders that have a reader, in order of their paths; how many have none.

    Hidden files and folders are passed over. Raises ValueError if no file has a reader.
    """
    files = []
    n_skipped = 0

    def fail(error: OSError) -> None:
        raise error

    for parent, subfolders, names in os.walk(folder, onerror=fail):
        # os.walk goes on with what is left in this list.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if suffix_of(path) and path.is_file():
                files.append(path)
            else:
                n_skipped += 1
    if not files:
        raise ValueError(f"{folder} has no files that end in {', '.join(READERS)}: name another folder, or a file")
    files.sort(key=lambda path: path.relative_to(folder).parts)
    return files, n_skipped


def find_files(paths: list[Path]) -> list[Path]:
    """The files among `paths` and those of the folders among them, in order.

    Says how many files of folders are skipped. Raises FileNotFoundError or ValueError for what cannot be read.
    """
    files = []
    for path in paths:
        if not path.is_dir():
            # A wrong name should be an error now, not after an hour of work on the files before it.
            reader_of(path)
            files.append(path)
            continue
        found, n_skipped = folder_files(path)
        files += found
        if n_skipped:
            print(f"{path}: skipped {count(n_skipped, 'file')} not ending in {', '.join(READERS)}")
    return files


def files_to_cut(paths: list[Path]) -> set[Path]:
    """The text files that are cut into documents: those that are large, or a large part of all files."""
    n_bytes = {path: path.stat().st_size for path in paths if path.is_file()}
    limit = max(PIECE_BYTES, min(CUT_BYTES, CUT_SHARE * sum(n_bytes.values())))
    return {path for path in n_bytes if READERS.get(suffix_of(path)) is txt_texts and n_bytes[path] > limit}


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
    cut = files_to_cut(paths)
    for path in paths:
        read = reader_of(path)
        for place, text in txt_texts(path, is_cut=True) if path in cut else read(path):
            yield checked_text(place, text)


def document_rule(paths: list[Path]) -> str:
    """What a document is in these files. Reads the files that are cut, to count their documents."""
    cut = sorted(files_to_cut(paths))
    n_txt = sum(READERS[suffix_of(path)] is txt_texts for path in paths)
    rules = []
    if n_txt < len(paths):
        rules.append("each JSON line or parquet row is a document")
    if len(cut) < n_txt:
        rules.append("each text file is a document")
    if cut:
        n_pieces = sum(1 for path in cut for _ in txt_texts(path, is_cut=True))
        mean = sum(path.stat().st_size for path in cut) / n_pieces
        what = cut[0].name if len(cut) == 1 else f"{len(cut):,} large text files"
        rules.append(f"{what} cut at blank lines into {count(n_pieces, 'document')} of {mean:,.0f} bytes on average")
    return "; ".join(rules)


# --- The split for validation ---


TOO_FEW = "the input has {}, and one must be held out for validation: name more text, or validation files with --val"


class Choice(NamedTuple):
    """Which documents are held out: their positions in the input. The counts are of documents with text."""

    positions: frozenset[int]
    n_val_bytes: int
    n_documents: int
    n_bytes: int


def choose_val(documents: Iterable[str]) -> Choice:
    """Hold out some documents of a text, a fair sample of it whatever its order.

    They are the documents whose text has the smallest sha256, until they are LEAST_VAL_DOCS and have the bytes that
    VAL_SHARE and its limits ask for. A document that is too large for the rest is passed over, and so is a copy.

    Raises ValueError if there are fewer than two documents.
    """
    # A heap of the smallest hashes, largest first: memory must not grow with the input.
    smallest: list[tuple[int, int, int]] = []
    held: set[int] = set()
    n_documents = 0
    n_bytes = 0
    for position, text in enumerate(documents):
        if not text.strip():
            continue
        key = -int.from_bytes(digest(text))
        size = len(text.encode())
        n_documents += 1
        n_bytes += size
        if key in held:
            continue
        held.add(key)
        heapq.heappush(smallest, (key, position, size))
        if len(smallest) > PUBLISHED_VAL_DOCS:
            largest = heapq.heappop(smallest)
            held.remove(largest[0])

    if len(smallest) < 2:
        raise ValueError(TOO_FEW.format(count(len(smallest), "document with text", "documents with text")))
    wanted = min(max(VAL_SHARE * n_bytes, min(LEAST_VAL_BYTES, SMALL_VAL_SHARE * n_bytes)), MOST_VAL_BYTES)
    most_bytes = LARGEST_VAL_EXCESS * wanted
    most_docs = LARGEST_VAL_SHARE * n_documents

    chosen: set[int] = set()
    n_val_bytes = 0
    for _, position, size in sorted(smallest, reverse=True):
        is_enough = n_val_bytes >= wanted and len(chosen) >= LEAST_VAL_DOCS
        if is_enough or len(chosen) + 1 > most_docs:
            break
        if n_val_bytes + size <= most_bytes:
            chosen.add(position)
            n_val_bytes += size
    if not chosen:
        # Of a few documents even the smallest may be too large a part.
        _, position, n_val_bytes = min(smallest, key=lambda entry: entry[2])
        chosen.add(position)
    return Choice(frozenset(chosen), n_val_bytes, n_documents, n_bytes)


class Splits(NamedTuple):
    """How documents are split: the fields train, val and val_rule of a Corpus."""

    train: Callable[[], Iterable[str]]
    val: Callable[[], Iterable[str]]
    rule: Callable[[], str]


def spread_split(read: Callable[[], Iterator[str]]) -> Splits:
    """Hold out the documents of choose_val, which reads all of them once more."""

    @cache
    def choice() -> Choice:
        return choose_val(tqdm(read(), "choose", unit=" documents", disable=None, leave=False))

    @cache
    def held_out() -> list[str]:
        # They are so few that they need not be read at each call.
        positions = choice().positions
        return [text for position, text in enumerate(read()) if position in positions]

    def read_train() -> Iterator[str]:
        positions = choice().positions
        return (text for position, text in enumerate(read()) if position not in positions)

    def rule() -> str:
        found = choice()
        share = found.n_val_bytes / found.n_bytes
        return (
            f"{len(found.positions):,} of {found.n_documents:,} documents, those with the smallest sha256: "
            f"{found.n_val_bytes:,} of {found.n_bytes:,} bytes ({share:.1%})"
        )

    return Splits(read_train, held_out, rule)


def first_split(read: Callable[[], Iterator[str]], val_docs: int) -> Splits:
    """Hold out the first documents. Reading a split raises ValueError if no document is left to train on."""

    def too_few(n_documents: int) -> ValueError:
        if n_documents < 2:
            return ValueError(TOO_FEW.format(count(n_documents, "document")))
        return ValueError(
            f"--val-docs={val_docs} leaves no document to train on, because the input has {n_documents:,}: "
            f"give --val-docs {max(1, n_documents // 10)}"
        )

    def read_val() -> Iterator[str]:
        n_read = 0
        for text in islice(read(), val_docs):
            n_read += 1
            yield text
        if n_read < val_docs:
            raise too_few(n_read)

    def read_train() -> Iterator[str]:
        is_empty = True
        for text in islice(read(), val_docs, None):
            is_empty = False
            yield text
        if is_empty:
            raise too_few(val_docs)

    def rule() -> str:
        return "the first document" if val_docs == 1 else f"the first {val_docs:,} documents"

    return Splits(read_train, read_val, rule)


def files_source(paths: list[Path]) -> str:
    """The names of input files, or what stands for many."""
    if len(paths) <= LISTED_FILES:
        return ", ".join(path.name for path in paths)
    return f"{len(paths):,} files, {paths[0].name} to {paths[-1].name}"


def files_revision(paths: list[Path]) -> str:
    """The sha256 of each input file, or one over those of many."""
    hashes = [file_digest(path) for path in paths]
    if len(paths) <= LISTED_FILES:
        return ", ".join(f"sha256:{sha256}" for sha256 in hashes)
    return f"sha256 of the {len(paths)} sha256: {hashlib.sha256(''.join(hashes).encode()).hexdigest()}"


def file_corpus(
    inputs: list[Path], val: list[Path], val_docs: int | None, max_docs: int | None = None, licence: str = ""
) -> Corpus:
    """The first `max_docs` documents of files and of folders, or all of them if it is None.

    The validation split is the documents of `val`, which are no longer part of the input. If `val` is empty, it is the
    first `val_docs` documents, or if that is None a fair sample (choose_val); of the documents behind the published
    shards it is the first 50,000, as published.

    Raises FileNotFoundError or ValueError for files that do not exist, have an unknown suffix, or are all in `val`.
    """
    val_files = find_files(val)
    held_out = {path.resolve() for path in val_files}
    files = [path for path in find_files(inputs) if path.resolve() not in held_out]
    if not files:
        raise ValueError(
            "--val names all files of --input, so that no document is left for training: leave --val out to hold out "
            "some documents of --input, or name another file"
        )
    if val_docs is None and any(path.name.startswith(PUBLISHED_DOCUMENTS) for path in files):
        val_docs = PUBLISHED_VAL_DOCS

    def read() -> Iterator[str]:
        return islice(read_documents(files), max_docs)

    if val:
        names = files_source(val_files)
        split = Splits(read, partial(read_documents, val_files), lambda: f"all of {names}")
    elif val_docs is None:
        split = spread_split(read)
    else:
        split = first_split(read, val_docs)

    return Corpus(
        train=split.train,
        val=split.val,
        source=files_source([*files, *val_files]),
        revision=lambda: files_revision([*files, *val_files]),
        licence=licence or "unknown",
        document_rule=partial(document_rule, files),
        val_rule=split.rule,
    )


# --- The Hugging Face Hub ---


def hub_corpus(
    repo: str, config: str | None, revision: str | None, val_docs: int, max_docs: int | None, licence: str = ""
) -> Corpus:
    """The first `max_docs` rows of the train split of a data set on the Hub, streamed, or all of them if it is None.

    The first `val_docs` documents are for validation.

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
    split = first_split(lambda: islice(read(), max_docs), val_docs)
    return Corpus(
        train=split.train,
        val=split.val,
        source=f"{repo} {config}" if config else repo,
        revision=lambda: str(info.sha),
        licence=f"https://huggingface.co/datasets/{repo}: {licence}",
        document_rule=lambda: "each row is a document",
        val_rule=split.rule,
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
    """The documents ordered by the sha256 of their text; the first EMBEDDED_VAL_SHARE of the bytes are for validation.

    This order is as good as random and the same on every machine.
    """
    documents = sorted(embedded_documents(), key=digest)
    if not documents:
        raise ValueError(f"{sysconfig.get_path('stdlib')} holds no Python sources: name your own text with --input")

    # The document that crosses the limit is the last one of the validation split.
    ends = list(accumulate(len(text.encode()) for text in documents))
    n_val = 1 + sum(end < EMBEDDED_VAL_SHARE * ends[-1] for end in ends)
    return Corpus(
        train=lambda: documents[n_val:],
        val=lambda: documents[:n_val],
        source=f"documentation of Python {platform.python_version()}: language topics and docstrings",
        revision=platform.python_version,
        licence="Python documentation: PSF License Agreement (https://docs.python.org/3/license.html)",
        document_rule=lambda: "each help topic and the docstrings of each module are a document",
        val_rule=lambda: f"the documents with the smallest sha256, {EMBEDDED_VAL_SHARE:.0%} of the bytes",
    )
