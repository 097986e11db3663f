"""Turn documents into token shards, with a tokenizer trained on them or a given one.

    python data/build_shards.py                                    # English from this Python's own documentation
    python data/build_shards.py --name my_sp1024 --input a.jsonl b.parquet --val-docs 500
    python data/build_shards.py --name my_sp1024 --input a.jsonl.zst --val held_out.jsonl --tokenizer sp1024.model

Inputs: .jsonl and .jsonl.zst (a JSON object with a string `text` per line), .parquet (column `text`), .txt (one
document per file). Under --out (default: the folder of this script) it writes

    datasets/NAME/fineweb_{train,val}_%06d.bin   shards (data/shards.py): per document BOS, then its tokens; no EOS
    datasets/NAME/fineweb_val_bytes_%06d.bin     entry i: source UTF-8 bytes that token i of the val shard stands for
    datasets/NAME/manifest.json                  what was built from what; written last, so a killed build has none
    tokenizers/*.model                           the SentencePiece model
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import sentencepiece as spm
from shards import MAX_TOKENS, SHARD_TOKENS, write_shard, write_whole
from tqdm import tqdm  # type: ignore[import-untyped]

SPACE_MARK = "\u2581"  # SentencePiece's spelling of a space
TRAINER_MARKS = SPACE_MARK + "\u2585"  # the second stands for the unknown: its trainer skips a text that holds it
CHAR_COVERAGE = 0.9995  # of the training text; what is rarer is not worth a piece
SPECIAL_PIECES = 4 + 256  # pad, bos, eos, unk and the byte pieces of a trained tokenizer
TOKENIZER_TEXT_CHARS = 32_000_000  # more text moves the merges of a small vocabulary little
BATCH_CHARS = 4_000_000  # text encoded at a time: enough for all threads, small beside a shard
VAL_SHARE = 0.08  # of the embedded corpus, in bytes
MIN_DOCSTRING_CHARS = 20  # shorter ones are labels, not prose
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
Tokens: TypeAlias = npt.NDArray[np.uint16]


class Corpus(NamedTuple):
    """Two splits that can be read more than once, and a line that says where they come from."""

    train: Callable[[], Iterable[str]]
    val: Callable[[], Iterable[str]]
    source: str


# --- Documents ---


def jsonl_texts(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, text) of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(zst_lines(path, file) if path.suffix == ".zst" else file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
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


def read_documents(paths: list[Path]) -> Iterator[str]:
    """The documents of the files, in order. Raises ValueError, naming file and line, for anything unreadable."""
    for path in paths:
        for where, text in reader_of(path)(path):
            if not isinstance(text, str):
                raise ValueError(f"{where} has no string `text`: store the document under that key")
            if re.search("[\ud800-\udfff]", text):  # JSON can spell half a surrogate pair, UTF-8 cannot
                raise ValueError(f"{where} holds half a surrogate pair, which is not Unicode text: remove it")
            yield text


def file_corpus(inputs: list[Path], val: list[Path], val_docs: int) -> Corpus:
    """Training documents from `inputs`; validation documents from `val`, or the first `val_docs` of the input."""
    for path in [*inputs, *val]:
        reader_of(path)
    source = ", ".join(path.name for path in [*inputs, *val])
    if val:
        return Corpus(lambda: read_documents(inputs), lambda: read_documents(val), source)

    def part(start: int, stop: int | None) -> Iterator[str]:
        return islice(read_documents(inputs), start, stop)

    return Corpus(lambda: part(val_docs, None), lambda: part(0, val_docs), source)


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
    source = f"documentation of Python {platform.python_version()}: language topics and docstrings"
    return Corpus(lambda: documents[n_val:], lambda: documents[:n_val], source)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# --- Tokenizer ---


def sample_documents(documents: Iterable[str], max_chars: int) -> list[str]:
    """Every k-th document, for the smallest power of two k that keeps the sample within `max_chars` characters."""
    sample: list[str] = []
    stride, chars = 1, 0
    for i, text in enumerate(documents):
        if i % stride:
            continue
        sample.append(text)
        chars += len(text)
        while chars > max_chars and len(sample) > 1:
            sample, stride = sample[::2], 2 * stride
            chars = sum(map(len, sample))
    return sample


def common_characters(documents: list[str], limit: int) -> str:
    """The most frequent characters, at most `limit`, up to CHAR_COVERAGE of the text."""
    counts = Counter(char for text in documents for char in text if char not in TRAINER_MARKS)
    wanted, covered, alphabet = CHAR_COVERAGE * counts.total(), 0, ""
    for char, count in counts.most_common(limit):
        if covered < wanted:
            alphabet, covered = alphabet + char, covered + count
    return alphabet


def train_tokenizer(documents: list[str], vocab_size: int) -> bytes:
    """Train a lossless byte-fallback BPE. -> the SentencePiece model, the same bytes for the same documents

    Identity normalization and byte fallback keep every character; the one exception is a literal U+2581, which
    SentencePiece decodes as a space. Characters get at most half of the pieces beyond the fixed ones, the rarer ones
    are spelt in bytes: the training text is cut where they stand, since the trainer's own character_coverage does not
    go below 0.98. Raises ValueError when the text has too few distinct merges for `vocab_size`.
    """
    alphabet = common_characters(documents, max(1, (vocab_size - SPECIAL_PIECES) // 2))
    if not alphabet:
        raise ValueError("the train split has no text for a tokenizer: name other files or a smaller --val-docs")
    rare = re.compile(f"[^{re.escape(alphabet)}]+")
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(part for text in documents for part in rare.split(text) if part),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            required_chars=SPACE_MARK,  # spelt in bytes it would not decode to a space
            character_coverage=1.0,
            max_sentence_length=1 << 30,  # the default skips documents above 4192 bytes
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,  # a fixed order of additions
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise ValueError(f"--vocab-size={vocab_size} does not fit the training text: {reason}") from None
    return model.getvalue()


def load_tokenizer(model: bytes, path: Path) -> spm.SentencePieceProcessor:
    """The processor of a serialized model. Raises ValueError, naming `path`, for what cannot label uint16 shards."""
    try:
        sp = spm.SentencePieceProcessor(model_proto=model or b"\0")  # an empty file must fail, not load nothing
    except RuntimeError:
        raise ValueError(f"{path} is not a SentencePiece model: pass the .model file of one") from None
    if not hasattr(sp, "EncodeAsOffsetMapping"):
        raise ValueError(f"sentencepiece {spm.__version__} is too old: pip install 'sentencepiece>=0.2.2'")
    if sp.bos_id() < 0:
        raise ValueError(f"{path} has no BOS piece, which must open each document: train it with bos_id=1")
    if sp.get_piece_size() > 0x10000:
        raise ValueError(f"{path} has {sp.get_piece_size()} pieces, but shards are uint16: use at most 65536")
    return sp


# --- Tokens ---


def source_bytes(sp: spm.SentencePieceProcessor, raw: bytes) -> tuple[list[int], list[int]]:
    """Token ids of the UTF-8 text `raw`, and how many of its bytes each token stands for; these add up to len(raw).

    Token i runs from its begin to that of token i + 1; the first one starts at 0 and the last one ends with the text.
    So bytes that a tokenizer folds or drops count for a token beside them, and a character that is spelt in several
    byte tokens counts for the last of these.
    """
    mapping = sp.encode(raw, out_type="offset_mapping")  # of bytes: the offsets are bytes, not characters
    begins = [begin for begin, _ in mapping["offsets"]]
    bounds = [0, *begins[1:], len(raw)]
    n_bytes = [end - begin for begin, end in pairwise(bounds)] if begins else []
    assert not begins or (min(n_bytes) >= 0 and sum(n_bytes) == len(raw)), "token bytes must add up to the text"
    return mapping["ids"], n_bytes


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive documents, about BATCH_CHARS characters at a time."""
    batch: list[str] = []
    chars = 0
    for text in documents:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encode_train(sp: spm.SentencePieceProcessor, texts: list[str]) -> list[Tokens]:
    """BOS and the tokens of each text; (1, 0) for one without tokens. -> (1, N) each"""
    encoded = sp.encode(texts, out_type="numpy", num_threads=os.cpu_count() or 1)
    return [np.concatenate([[sp.bos_id()], ids] if ids.size else [ids]).astype(np.uint16)[None] for ids in encoded]


def encode_val(sp: spm.SentencePieceProcessor, texts: list[str]) -> list[Tokens]:
    """As encode_train, with a second row: the source bytes of each token, 0 for BOS. -> (2, N) each

    Raises ValueError for a token of more than 65535 bytes.
    """
    blocks = []
    for text in texts:
        ids, n_bytes = source_bytes(sp, text.encode())
        if max(n_bytes, default=0) > 0xFFFF:
            raise ValueError(
                f"the val document that begins with {text[:40]!r} has a token that stands for {max(n_bytes)} bytes, "
                "more than the 65535 of uint16: shorten its runs of blanks"
            )
        rows = [[sp.bos_id(), *ids], [0, *n_bytes]] if ids else [[], []]
        blocks.append(np.array(rows, dtype=np.uint16))
    return blocks


def encode_split(
    sp: spm.SentencePieceProcessor, split: str, documents: Iterable[str], held_out: set[bytes], figures: dict[str, Any]
) -> Iterator[Tokens]:
    """Encode the documents in order, one block each, and keep account of them in `figures`.

    Blank documents, and those that a normalizing tokenizer leaves without a token, are dropped; so are those whose
    digest is in `held_out`. `lossless` ends as True if every val document decodes to itself.
    """
    text_hash = hashlib.sha256()
    for batch in batches(documents):
        written = [text for text in batch if text.strip()]
        texts = [text for text in written if digest(text) not in held_out]
        figures["overlap_documents"] += len(written) - len(texts)
        figures["dropped_documents"] += len(batch) - len(written)
        blocks = encode_val(sp, texts) if split == "val" else encode_train(sp, texts)
        for text, block in zip(texts, blocks, strict=True):
            if split == "val":
                figures["lossless"] &= sp.decode(block[0, 1:].tolist()) == text
            if not block.size:
                figures["dropped_documents"] += 1
                continue
            raw = text.encode()
            text_hash.update(len(raw).to_bytes(8, "little") + raw)
            figures["documents"] += 1
            figures["tokens"] += block.shape[1]
            figures["bytes"] += len(raw)
            yield block
    figures["text_sha256"] = text_hash.hexdigest()


def recut(blocks: Iterable[Tokens], size: int) -> Iterator[Tokens]:
    """Join (R, n) blocks along n and cut the result into (R, size) blocks; the last one may be shorter."""
    pending: list[Tokens] = []
    n_pending = 0
    for block in blocks:
        pending.append(block)
        n_pending += block.shape[1]
        if n_pending < size:
            continue
        joined = np.concatenate(pending, axis=1)
        whole = n_pending - n_pending % size
        yield from (joined[:, start : start + size] for start in range(0, whole, size))
        pending, n_pending = [joined[:, whole:].copy()], n_pending - whole
    if n_pending:
        yield np.concatenate(pending, axis=1)


def build_split(
    folder: Path,
    split: str,
    documents: Iterable[str],
    sp: spm.SentencePieceProcessor,
    shard_tokens: int,
    held_out: set[bytes],
) -> dict[str, Any]:
    """Write the shards of one split, for val with their byte sidecars. -> its entry in the manifest, plus `lossless`"""
    counted = ("documents", "tokens", "bytes", "dropped_documents", "overlap_documents")
    figures: dict[str, Any] = dict.fromkeys(counted, 0) | {"lossless": True}
    names = ["fineweb_val_", "fineweb_val_bytes_"] if split == "val" else ["fineweb_train_"]
    files: dict[str, str] = {}
    progress = tqdm(documents, split, unit=" documents", disable=None)
    for index, block in enumerate(recut(encode_split(sp, split, progress, held_out, figures), shard_tokens)):
        for name, row in zip(names, block, strict=True):
            path = folder / f"{name}{index:06d}.bin"
            write_shard(path, row)
            with path.open("rb") as file:
                files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if not files:
        raise ValueError(f"the {split} split has no document with text: name other files or a smaller --val-docs")
    return {**figures, "files": files}


# --- Main ---


def place_tokenizer(
    corpus: Corpus, held_out: set[bytes], reuse: Path | None, vocab_size: int, name: str, folder: Path
) -> tuple[Path, bytes]:
    """Copy the tokenizer `reuse` into `folder`, or train one on the training documents. -> its path and content

    A data set called X_sp1024 gets X_1024_bpe.model, as the published ones are called.
    """
    if reuse:
        model, path = reuse.read_bytes(), folder / reuse.name
        load_tokenizer(model, reuse)  # check it before it is copied
        if path.exists() and path.read_bytes() != model:
            raise ValueError(f"{path} exists and differs from {reuse}: rename one of them")
    else:
        train = (text for text in corpus.train() if digest(text) not in held_out)
        model = train_tokenizer(sample_documents(train, TOKENIZER_TEXT_CHARS), vocab_size)
        path = folder / f"{re.sub(r'_sp[0-9]+$', '', name)}_{vocab_size}_bpe.model"
    folder.mkdir(parents=True, exist_ok=True)
    if not (path.exists() and path.read_bytes() == model):
        write_whole(path, model)
    return path, model


def build(corpus: Corpus, name: str, out: Path, tokenizer: Path | None, vocab_size: int, shard_tokens: int) -> None:
    """Write the tokenizer, the shards and the manifest of one data set, and print a summary."""
    held_out = {digest(text) for text in corpus.val()}
    model_path, model = place_tokenizer(corpus, held_out, tokenizer, vocab_size, name, out / "tokenizers")
    sp = load_tokenizer(model, model_path)

    folder = out / "datasets" / name
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / "manifest.json", *folder.glob("fineweb_*.bin")]:  # a longer export must not leave its tail
        stale.unlink(missing_ok=True)

    splits = {
        "train": build_split(folder, "train", corpus.train(), sp, shard_tokens, held_out),
        "val": build_split(folder, "val", corpus.val(), sp, shard_tokens, set()),
    }
    lossless = [s.pop("lossless") for s in splits.values()][1]  # measured on val only
    manifest = {
        "format": 1,
        "name": name,
        "source": corpus.source,
        "tool": "data/build_shards.py",
        "tokenizer": {
            "file": model_path.name,
            "sha256": hashlib.sha256(model).hexdigest(),
            "vocab_size": sp.get_piece_size(),
            "lossless": lossless,
        },
        "splits": splits,
    }
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    for split, s in splits.items():
        ratio = s["bytes"] / s["tokens"]
        print(f"{split}: {s['documents']} documents, {s['tokens']} tokens, {s['bytes']} bytes, {ratio:.3f} bytes/token")
        print(f"  left out: {s['dropped_documents']} without text, {s['overlap_documents']} that val holds")
    print(f"tokenizer: {model_path}, {sp.get_piece_size()} pieces, {'' if lossless else 'NOT '}lossless on val")
    print(f"dataset: {folder}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, default=[], metavar="FILE", help="training documents")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--val", nargs="+", type=Path, default=[], metavar="FILE", help="validation documents")
    held_out.add_argument("--val-docs", type=int, default=0, metavar="N", help="validate on the first N of the input")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="reuse this SentencePiece model")
    parser.add_argument("--vocab-size", type=int, default=1024, help="pieces of the tokenizer to train")
    parser.add_argument("--name", help="name of the data set (default: pydoc_sp1024 for the embedded corpus)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="holds datasets/ and tokenizers/")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens of a full shard")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for arguments that do not go together."""
    if args.input and not args.val and args.val_docs <= 0:
        raise ValueError("--input needs --val FILE or --val-docs N with N > 0: a score needs text not trained on")
    if not args.input and (args.val or args.val_docs):
        raise ValueError("--val and --val-docs need --input FILE: the embedded corpus brings its own split")
    if (args.input or args.tokenizer) and not args.name:
        raise ValueError("--input and --tokenizer need --name NAME: the data set must not replace the embedded one")
    if args.name and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", args.name):
        raise ValueError(f"--name={args.name!r} must be a folder name of letters, digits, dots, dashes and underscores")
    if not 1 <= args.shard_tokens <= MAX_TOKENS:
        raise ValueError(f"--shard-tokens={args.shard_tokens} must be in 1..{MAX_TOKENS}")
    if not SPECIAL_PIECES < args.vocab_size <= 0x10000:
        raise ValueError(f"--vocab-size={args.vocab_size} must be in {SPECIAL_PIECES + 1}..65536: shards are uint16")
    if args.tokenizer and not args.tokenizer.is_file():
        raise FileNotFoundError(f"--tokenizer={args.tokenizer} does not exist or is not a file: check the path")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        check_arguments(args)
        corpus = file_corpus(args.input, args.val, args.val_docs) if args.input else embedded_corpus()
        name = args.name or f"pydoc_sp{args.vocab_size}"
        build(corpus, name, args.out, args.tokenizer, args.vocab_size, args.shard_tokens)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
