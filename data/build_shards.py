"""Turn documents into token shards, with a tokenizer that is trained on them or given.

    python data/build_shards.py                                    # English from this Python's own documentation
    python data/build_shards.py --input book.txt                   # your own text: files, or folders of files
    python data/build_shards.py --name my_sp1024 --input a.jsonl b.parquet --val-docs 500
    python data/build_shards.py --name my_sp1024 --input a.jsonl.zst --val held_out.jsonl --tokenizer sp1024.model
    python data/build_shards.py --name edu_sp1024 --hub HuggingFaceFW/fineweb-edu --hub-config sample-10BT
    python data/build_shards.py --check data/datasets/my_sp1024    # does it match its manifest?

The input is .txt or .md (a document per file; large files are cut at blank lines into documents of about 4,000 bytes),
.jsonl, .jsonl.gz or .jsonl.zst (one JSON object per line, with a string `text`), .parquet (column `text`), folders of
these, or a data set of the Hugging Face Hub. Without input, the documents come from the documentation of the running
Python.

About 2 % of your own text is held out for validation, chosen by the sha256 of the documents (documents.py has the exact
rule). Of the documents behind the published shards (docs_selected*) and of a data set of the Hub, it is the first
50,000 documents, as published; --val-docs N holds out the first N.

The script writes to --out, by default the folder that it is in:

    datasets/NAME/fineweb_{train,val}_%06d.bin   shards (shards.py): for each document BOS, then its tokens; no EOS
    datasets/NAME/fineweb_val_bytes_%06d.bin     entry i: source UTF-8 bytes that token i of the val shard gives back
    datasets/NAME/manifest.json                  what was built from what
    tokenizers/*.model                           the SentencePiece model

An earlier export of the same name stays as it is until the new one is complete. It is replaced only by one of the same
text, unless --overwrite allows more. The last lines are the command that trains on the data.

documents.py reads the input, transforms.py and tokenizer.py turn text into tokens. The output does not depend on the
number of --workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
from commands import print_commands, shortest_path
from documents import (
    PUBLISHED_VAL_DOCS,
    Corpus,
    embedded_corpus,
    file_corpus,
    file_digest,
    fingerprint,
    framed,
    hub_corpus,
    suffix_of,
)
from shards import MAX_TOKENS, SHARD_TOKENS, read_shard, write_shard, write_whole
from tokenizer import (
    SPECIAL_PIECES,
    TOKENIZER_DOCS,
    TOKENIZER_TEXT_CHARS,
    Tokenizer,
    Tokens,
    byte_model,
    sample_documents,
    train_published_tokenizer,
    train_tokenizer,
)
from tqdm import tqdm  # type: ignore[import-untyped]

# Goes up whenever equal input can give another output.
TOOL_VERSION = 4
# How the sidecar counts bytes: those that decoding the tokens gives back. Until version 2 a token counted for all bytes
# that it covered, also those that its tokenizer loses.
BYTES_RULE = "decoded"
# A disk with less space than this has no room for an export.
LEAST_FREE_BYTES = 1 << 20
# The folder in that of a data set where its files wait until all of them are there.
UNFINISHED = ".unfinished"
# Encoding a batch of this size takes some tenths of a second, which keeps all workers busy.
BATCH_CHARS = 1_000_000
# Fewer batches than this are encoded sooner than processes start.
POOL_BATCHES = 8
# What --tokenizer gets for the tokenizer of pure bytes, where others have a file.
BYTE260 = Path("byte260")
# Pieces of a tokenizer to train.
VOCAB_SIZE = 1024

# --- Encode ---


@dataclasses.dataclass
class Counts:
    """What became of some documents. The names are those of the manifest."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    dropped_documents: int = 0
    overlap_documents: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            dropped_documents=self.dropped_documents + other.dropped_documents,
            overlap_documents=self.overlap_documents + other.overlap_documents,
        )


class Encoded(NamedTuple):
    """A batch of documents in tokens.

    tokens    all kept documents in a row: (1, N); for val (2, N), the second row holding the source bytes of each token
    kept      the positions in the batch of the kept documents
    counts    what became of the documents of the batch
    lossless  whether every document decodes to itself; not tried for train, where it is always True
    """

    tokens: Tokens
    kept: list[int]
    counts: Counts
    lossless: bool


class Encoder:
    """Encodes batches of documents of one split. It can be sent to another process.

    It leaves out documents without text, or for which a normalizing tokenizer has no token, and those whose fingerprint
    is in `held_out`.
    """

    def __init__(self, tokenizer: Tokenizer, split: str, held_out: set[bytes]) -> None:
        self.tokenizer = tokenizer
        self.split = split
        self.held_out = held_out

    def __call__(self, texts: list[str]) -> Encoded:
        is_val = self.split == "val"
        # The empty block gives the result its rows even if every document of the batch is left out.
        blocks = [np.zeros((2 if is_val else 1, 0), np.uint16)]
        kept: list[int] = []
        counts = Counts()
        lossless = True

        for i, text in enumerate(texts):
            if not text.strip():
                counts.dropped_documents += 1
                continue
            if self.held_out and fingerprint(text) in self.held_out:
                counts.overlap_documents += 1
                continue

            block = self.val_block(text) if is_val else self.train_block(text)
            # A document that leaves no token is lost too, so this comes before it is dropped.
            if is_val and lossless:
                lossless = self.gives_back(text, block)
            if not block.size:
                counts.dropped_documents += 1
                continue

            blocks.append(block)
            kept.append(i)
            counts.documents += 1
            counts.tokens += block.shape[1]
            counts.bytes += len(text.encode())
        return Encoded(np.concatenate(blocks, axis=1), kept, counts, lossless)

    def train_block(self, text: str) -> Tokens:
        """BOS and the tokens of the text. -> (1, N), where N is 0 for a text without tokens"""
        ids = self.tokenizer.encode(text)
        if not ids.size:
            return np.zeros((1, 0), np.uint16)
        return np.concatenate([[self.tokenizer.sp.bos_id()], ids]).astype(np.uint16)[None]

    def val_block(self, text: str) -> Tokens:
        """As train_block, with a second row: the source bytes that each token gives back, 0 for BOS. -> (2, N)"""
        ids, n_bytes = self.tokenizer.encode_with_bytes(text)
        if not ids.size:
            return np.zeros((2, 0), np.uint16)

        # The counts fit uint16, because SentencePiece loads no model with a piece of 8,192 bytes or more.
        bos = np.array([[self.tokenizer.sp.bos_id()], [0]], np.uint16)
        return np.concatenate([bos, np.stack([ids, n_bytes.astype(np.uint16)])], axis=1)

    def gives_back(self, text: str, block: Tokens) -> bool:
        """Whether the tokens of a val block decode to the text, and not only by the luck of an unknown piece."""
        if int(block[1].sum(dtype=np.int64)) != len(text.encode()):
            return False
        try:
            return self.tokenizer.decode(block[0, 1:]) == text
        except ValueError:
            # The tokenizer damaged an operator of the transform.
            return False


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive documents, about BATCH_CHARS characters at a time."""
    batch: list[str] = []
    chars = 0
    for text in documents:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch = []
            chars = 0
    if batch:
        yield batch


# In a worker process, the encoder that it was started with.
ENCODERS: list[Encoder] = []


def start_worker(encoder: Encoder) -> None:
    """Keep the encoder. End when the parent ends: an export that is killed must not leave waiting workers behind."""

    def end_with_parent() -> None:
        parent = parent_process()
        assert parent
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Ctrl-C reaches all processes, but only the parent should answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ENCODERS.append(encoder)


def encode_in_worker(texts: list[str]) -> Encoded:
    return ENCODERS[0](texts)


def encode_in_order(encoder: Encoder, documents: Iterable[str], workers: int) -> Iterator[tuple[list[str], Encoded]]:
    """Each batch of documents with its tokens, in order. Uses `workers` processes if there is enough to do."""
    unread = batches(documents)
    first = list(islice(unread, POOL_BATCHES))
    todo = chain(first, unread)
    if workers == 1 or len(first) < POOL_BATCHES:
        for texts in todo:
            yield texts, encoder(texts)
        return

    try:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (encoder,))
    except OSError as error:
        # The disk of --out is not at fault: the locks of the processes lie in shared memory.
        raise OSError(
            f"worker processes cannot be started ({error.strerror}): make room in /dev/shm, or use --workers=1"
        ) from None
    submitted: deque[tuple[list[str], Future[Encoded]]] = deque()
    try:
        for texts in todo:
            submitted.append((texts, pool.submit(encode_in_worker, texts)))
            # Two batches per worker, no more, so that memory does not grow with the input.
            if len(submitted) > 2 * workers:
                oldest, future = submitted.popleft()
                yield oldest, future.result()
        for texts, future in submitted:
            yield texts, future.result()
    except BrokenProcessPool:
        raise OSError(f"a worker died, perhaps out of memory: try fewer than --workers={workers}") from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- Write ---


class ShardWriter:
    """Cuts the tokens of one split into shards and writes them, for val with their byte sidecars.

    files  the sha256 of each file written so far, by name
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder = folder
        self.prefixes = ["fineweb_val_", "fineweb_val_bytes_"] if split == "val" else ["fineweb_train_"]
        self.shard = np.empty((len(self.prefixes), shard_tokens), np.uint16)
        self.n_filled = 0
        self.n_written = 0
        self.files: dict[str, str] = {}

    def add(self, tokens: Tokens) -> None:
        """Take (R, N) tokens, one row for each kind of file; write the shards that they fill."""
        while tokens.shape[1]:
            n_free = self.shard.shape[1] - self.n_filled
            part = tokens[:, :n_free]
            tokens = tokens[:, n_free:]
            self.shard[:, self.n_filled : self.n_filled + part.shape[1]] = part
            self.n_filled += part.shape[1]
            if self.n_filled == self.shard.shape[1]:
                self.write()

    def finish(self) -> None:
        """Write the last shard, which may be shorter."""
        if self.n_filled:
            self.write()

    def write(self) -> None:
        for prefix, row in zip(self.prefixes, self.shard[:, : self.n_filled], strict=True):
            path = self.folder / f"{prefix}{self.n_written:06d}.bin"
            write_shard(path, row)
            self.files[path.name] = file_digest(path)
        self.n_written += 1
        self.n_filled = 0


class Split(NamedTuple):
    """A split that was written: its entry in the manifest, and whether each of its documents decodes to itself."""

    entry: dict[str, Any]
    lossless: bool


def build_split(folder: Path, documents: Iterable[str], encoder: Encoder, shard_tokens: int, workers: int) -> Split:
    """Encode the documents of one split and write its shards. Raises ValueError if none of them has text."""
    counts = Counts()
    n_given_back = 0
    lossless = True
    text_hash = hashlib.sha256()
    writer = ShardWriter(folder, encoder.split, shard_tokens)

    progress = tqdm(documents, encoder.split, unit=" documents", disable=None)
    for texts, encoded in encode_in_order(encoder, progress, workers):
        counts += encoded.counts
        lossless = lossless and encoded.lossless
        for i in encoded.kept:
            text_hash.update(framed(texts[i]))
        n_given_back += int(encoded.tokens[1:].sum(dtype=np.int64))
        writer.add(encoded.tokens)
    writer.finish()

    if not counts.documents and counts.overlap_documents:
        raise ValueError(
            f"the validation split holds all {counts.overlap_documents} documents of the train split: name other files "
            "or a smaller --val-docs"
        )
    if not counts.documents:
        raise ValueError(
            f"the {encoder.split} split has no document with text: name other files or a smaller --val-docs"
        )
    entry = {**dataclasses.asdict(counts), "text_sha256": text_hash.hexdigest(), "files": writer.files}
    if encoder.split == "val":
        entry["bytes_given_back"] = n_given_back
    return Split(entry, lossless)


# --- Check ---


def check_files(folder: Path, files: dict[str, str]) -> list[str]:
    """What is wrong with files whose sha256 is known."""
    faults = []
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            faults.append(f"{folder / name} is missing")
        elif file_digest(folder / name) != sha256:
            faults.append(f"{folder / name} is not the file of the manifest: its sha256 differs")
    return faults


def count_split(folder: Path, names: list[str], tokenizer: Tokenizer | None, lossless: bool) -> dict[str, Any]:
    """The figures of a split that its files tell, under their names in the manifest.

    These are documents and tokens, and where there are sidecars the bytes that the tokens give back. If the tokenizer
    is lossless, those are the bytes of the text, whose identity follows from the decoded tokens.
    """
    shards = [read_shard(folder / name) for name in names if "_bytes_" not in name]
    sidecars = [read_shard(folder / name) for name in names if "_bytes_" in name]
    bos_id = tokenizer.sp.bos_id() if tokenizer else 1

    found: dict[str, Any] = {"documents": 0, "tokens": 0}
    for shard in shards:
        found["documents"] += int(np.count_nonzero(shard == bos_id))
        found["tokens"] += shard.size
        highest = int(shard.max(initial=0))
        if tokenizer and highest >= len(tokenizer.is_byte):
            raise ValueError(f"{folder} has token {highest}, but the tokenizer has {len(tokenizer.is_byte)} pieces")
    if not sidecars:
        return found

    if [sidecar.size for sidecar in sidecars] != [shard.size for shard in shards]:
        raise ValueError(f"{folder} has byte sidecars that do not fit its shards")
    key = "bytes" if lossless else "bytes_given_back"
    found[key] = sum(int(sidecar.sum(dtype=np.int64)) for sidecar in sidecars)

    if tokenizer and lossless:
        ids = np.concatenate(shards)
        text_hash = hashlib.sha256()
        for document in np.split(ids, np.flatnonzero(ids == bos_id))[1:]:
            text_hash.update(framed(tokenizer.decode(document[1:])))
        found["text_sha256"] = text_hash.hexdigest()
    return found


def check(folder: Path) -> list[str]:
    """What in a data set contradicts its manifest: files, hashes, counts, sums. Empty if all is well.

    It reads the manifests of data/download.py too, and skips the figures that these call unknown.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return [f"{path} does not exist: the export or the download was not finished, run it again"]
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        splits = {split: dict(manifest["splits"][split]) for split in ("train", "val")}
        listed = {name for figures in splits.values() for name in dict(figures["files"])}
        model_name = str(manifest["tokenizer"]["file"])
        model_sha256 = manifest["tokenizer"]["sha256"]
        lossless = manifest["tokenizer"]["lossless"] is True
        hashes = {str(sha256) for figures in splits.values() for sha256 in figures["files"].values()}
        loses_bytes = manifest["tokenizer"]["lossless"] is False and manifest.get("tool") == "data/build_shards.py"
        bytes_rule = manifest.get("bytes_rule")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{path} is not a manifest of data/build_shards.py: export the data again"]
    if any(len(sha256) != 64 for sha256 in hashes):
        return [f"{path} lists files without their sha256: export the data again"]

    if loses_bytes and bytes_rule != BYTES_RULE:
        return [f"{path} is of an older version, which counted bytes that its tokenizer loses: export the data again"]

    model_path = folder.absolute().parent.parent / "tokenizers" / model_name
    faults = check_files(model_path.parent, {model_name: model_sha256})
    for figures in splits.values():
        faults += check_files(folder, figures["files"])
    for name in sorted(file.name for file in folder.glob("fineweb_*.bin")):
        if name not in listed:
            faults.append(f"{folder / name} is not in the manifest: remove it")
    if faults:
        # What other files hold says nothing about this data set.
        return faults

    tokenizer = Tokenizer(model_path.read_bytes(), model_path) if model_name.endswith(".model") else None
    for split, figures in splits.items():
        found = count_split(folder, sorted(figures["files"]), tokenizer, lossless)
        for key, value in found.items():
            # The manifests of older versions and of data/download.py do not have every figure.
            if figures.get(key, "unknown") not in (value, "unknown"):
                faults.append(f"{folder} has in its {split} split {key} {value}, but its manifest says {figures[key]}")
    return faults


# --- Main ---


def given_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer that --tokenizer names, or None if one is to be trained."""
    if not args.tokenizer:
        return None
    if args.tokenizer == BYTE260:
        given = Tokenizer(byte_model(), Path("byte260.model"))
    else:
        given = Tokenizer(args.tokenizer.read_bytes(), args.tokenizer)
    if args.caseops and given.transform.name != "caseops":
        raise ValueError(f"{args.tokenizer} has no pieces for the operators of --caseops: drop one of the two")
    return given


def train_model(corpus: Corpus, held_out: set[bytes], args: argparse.Namespace) -> bytes:
    """Train the tokenizer that the arguments ask for on the train split. -> the SentencePiece model"""
    documents = islice(corpus.train(), TOKENIZER_DOCS)
    train = (text for text in documents if fingerprint(text) not in held_out)
    if args.published:
        return train_published_tokenizer(train, args.vocab_size)
    return train_tokenizer(sample_documents(train, TOKENIZER_TEXT_CHARS), args.vocab_size, args.caseops)


def choose_tokenizer(
    corpus: Corpus, held_out: set[bytes], args: argparse.Namespace, name: str, given: Tokenizer | None
) -> Tokenizer:
    """The given tokenizer, or else a newly trained one, with its path in the folder of tokenizers.

    Raises ValueError if another tokenizer has that path; a trained one may replace it with --overwrite.
    """
    folder = args.out / "tokenizers"
    if given:
        model = given.model
        path = folder / given.path.name
        if path.exists() and path.read_bytes() != model:
            raise ValueError(f"{path} exists and differs from {given.path}: rename one of them")
    else:
        model = train_model(corpus, held_out, args)
        # The tokenizer of my_sp1024 is my_1024_bpe.model, as the published ones are called.
        stem = re.sub(r"_sp[0-9]+(?=_|$)", "", name)
        path = folder / f"{stem}_{args.vocab_size}_bpe.model"
        if path.exists() and path.read_bytes() != model and not args.overwrite:
            users = ", ".join(data_sets_with(path)) or "perhaps of data that is no longer here"
            raise ValueError(
                f"{path} is the tokenizer of {users}, and this text gives another one: choose another --name, or "
                "replace it with --overwrite; models that were trained with it can then no longer be scored"
            )

    return Tokenizer(model, path)


def data_sets_with(tokenizer: Path) -> list[str]:
    """The names of the data sets whose manifest names this tokenizer."""
    names = []
    for path in sorted(tokenizer.parent.parent.glob("datasets/*/manifest.json")):
        if read_manifest(path).get("tokenizer", {}).get("file") == tokenizer.name:
            names.append(path.parent.name)
    return names


def read_manifest(path: Path) -> dict[str, Any]:
    """The JSON object in a manifest, or {} if it cannot be read: what then stands there is no export of ours."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return manifest if isinstance(manifest["tokenizer"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def require_same_text(folder: Path, corpus: Corpus) -> None:
    """Raise ValueError if the folder of a data set holds another text than the corpus."""
    if not any(folder.glob("fineweb_*.bin")):
        return
    manifest = read_manifest(folder / "manifest.json")
    if (manifest.get("source"), manifest.get("revision")) == (corpus.source, corpus.revision()):
        return

    # The files of one name may have changed.
    old = manifest.get("source", "shards without a manifest")
    if old == corpus.source:
        old += " with other content"
    raise ValueError(
        f"{folder} was made from {old}, not from this {corpus.source}: choose another --name, or replace it with "
        "--overwrite; models that were trained on it can then no longer be scored"
    )


def require_space(folder: Path) -> None:
    """Raise OSError if nothing can be written to a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    try:
        # Permissions do not tell whether a disk is full, or mounted read-only.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(LEAST_FREE_BYTES))
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}): choose another --out") from None


def replace_export(unfinished: Path, folder: Path) -> None:
    """Move the files of a complete export to the folder of its data set, in place of those of an earlier one.

    The manifest goes first and comes last, so that the folder never has one for other files.
    """
    # A killed export of an older version has left parts of files.
    for stale in [folder / "manifest.json", *folder.glob("fineweb_*.bin"), *folder.glob(".*.tmp")]:
        stale.unlink(missing_ok=True)
    for file in sorted(unfinished.glob("fineweb_*.bin")):
        os.replace(file, folder / file.name)
    os.replace(unfinished / "manifest.json", folder / "manifest.json")


def build(corpus: Corpus, args: argparse.Namespace, name: str, given: Tokenizer | None) -> None:
    """Write the tokenizer, the shards and the manifest of one data set, and print a summary."""
    folder = args.out / "datasets" / name
    if not args.overwrite:
        require_same_text(folder, corpus)
    held_out = {fingerprint(text) for text in corpus.val()}
    tokenizer = choose_tokenizer(corpus, held_out, args, name, given)

    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        manifest = write_export(unfinished, corpus, held_out, tokenizer, name, args)
        if not (tokenizer.path.exists() and tokenizer.path.read_bytes() == tokenizer.model):
            tokenizer.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(tokenizer.path, tokenizer.model)
        replace_export(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    print_summary(manifest, tokenizer.path, folder)
    print_commands(manifest, folder)


def write_export(
    folder: Path, corpus: Corpus, held_out: set[bytes], tokenizer: Tokenizer, name: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Write the shards and the manifest of the data set `name` to a folder. -> the manifest"""
    train_encoder = Encoder(tokenizer, "train", held_out)
    val_encoder = Encoder(tokenizer, "val", set())
    train = build_split(folder, corpus.train(), train_encoder, args.shard_tokens, args.workers)
    val = build_split(folder, corpus.val(), val_encoder, args.shard_tokens, args.workers)

    manifest = {
        "format": 1,
        "name": name,
        "source": corpus.source,
        "revision": corpus.revision(),
        "licence": corpus.licence,
        "tool": "data/build_shards.py",
        "tool_version": TOOL_VERSION,
        "bytes_rule": BYTES_RULE,
        "sentencepiece_version": spm.__version__,
        "document_rule": corpus.document_rule(),
        "val_rule": corpus.val_rule(),
        "val_docs": val.entry["documents"] + val.entry["dropped_documents"] + val.entry["overlap_documents"],
        "tokenizer": {
            "file": tokenizer.path.name,
            "sha256": hashlib.sha256(tokenizer.model).hexdigest(),
            "vocab_size": tokenizer.sp.get_piece_size(),
            "lossless": val.lossless,
            "transform": tokenizer.transform.name,
            "settings": tokenizer.settings,
        },
        "splits": {"train": train.entry, "val": val.entry},
    }
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def print_summary(manifest: dict[str, Any], model: Path, folder: Path) -> None:
    print(f"text: {manifest['source']}")
    print(f"documents: {manifest['document_rule']}")
    print(f"validation: {manifest['val_rule']}")
    for name, split in manifest["splits"].items():
        ratio = split["bytes"] / split["tokens"]
        print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes, "
            f"{ratio:.3f} bytes/token"
        )
        if split["dropped_documents"] or split["overlap_documents"]:
            print(
                f"  left out: {split['dropped_documents']:,} without text, "
                f"{split['overlap_documents']:,} that val holds"
            )
    tokenizer = manifest["tokenizer"]
    lossless = "lossless" if tokenizer["lossless"] else "NOT lossless"
    print(
        f"tokenizer: {shortest_path(model)}, {tokenizer['vocab_size']} pieces, {lossless} on val, "
        f"transform {tokenizer['transform']}"
    )
    val = manifest["splits"]["val"]
    if val["bytes_given_back"] < val["bytes"]:
        share = val["bytes_given_back"] / val["bytes"]
        print(
            f"  its tokens give back {val['bytes_given_back']} bytes of val ({share:.2%}), and only these are counted"
        )
    print(f"dataset: {shortest_path(folder)}")


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", nargs="+", type=Path, default=[], metavar="PATH", help="files or folders")
    source.add_argument("--hub", metavar="REPO", help="data set on the Hub; its train split is streamed")
    parser.add_argument("--hub-config", metavar="NAME", help="configuration of that data set: sample-10BT ...")
    parser.add_argument("--hub-revision", metavar="REV", help="its branch, tag or commit (default: the newest)")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--val", nargs="+", type=Path, default=[], metavar="PATH", help="validation documents")
    held_out.add_argument(
        "--val-docs",
        type=int,
        metavar="N",
        help="validate on the first N documents (default: some 2 %% of them, chosen by hash; the first "
        f"{PUBLISHED_VAL_DOCS} of docs_selected* and --hub)",
    )
    parser.add_argument("--max-docs", type=int, metavar="N", help="read the first N documents, validation included")
    parser.add_argument("--licence", default="", metavar="TEXT", help="of the text, with the attribution it asks for")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="reuse this SentencePiece model, or byte260")
    parser.add_argument(
        "--vocab-size", type=int, default=VOCAB_SIZE, help="pieces of the tokenizer to train (default: 1024)"
    )
    parser.add_argument("--caseops", action="store_true", help="write capitals as operators and small letters")
    parser.add_argument("--published", action="store_true", help="train as the published ones were: NFKC, NOT lossless")
    parser.add_argument("--name", help="name of the data set (default: that of the input and _sp1024)")
    parser.add_argument("--overwrite", action="store_true", help="replace another text or tokenizer of this name")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="holds datasets/ and tokenizers/")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens of a full shard")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: one per core)")
    parser.add_argument("--check", type=Path, metavar="DIR", help="only compare this data set with its manifest")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for a bad value, or for arguments that do not go together."""
    counts = {"val-docs": args.val_docs, "max-docs": args.max_docs, "workers": args.workers}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if not (args.input or args.hub) and (args.val or args.val_docs or args.max_docs):
        raise ValueError("--val, --val-docs and --max-docs need --input PATH: the embedded corpus brings its own split")
    if args.hub and args.val:
        raise ValueError("--val needs --input PATH: with --hub, --val-docs N are the first documents of the data set")
    if (args.hub_config or args.hub_revision) and not args.hub:
        raise ValueError("--hub-config and --hub-revision need --hub REPO")
    if args.tokenizer and not (args.name or args.input or args.hub):
        raise ValueError(
            "--tokenizer needs --name NAME or --input PATH: the data set must not replace the embedded one"
        )
    if args.name and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", args.name):
        raise ValueError(f"--name={args.name!r} must be a folder name of letters, digits, dots, dashes and underscores")
    if not 1 <= args.shard_tokens <= MAX_TOKENS:
        raise ValueError(f"--shard-tokens={args.shard_tokens} must be in 1..{MAX_TOKENS}")
    if not SPECIAL_PIECES < args.vocab_size <= 0x10000:
        raise ValueError(f"--vocab-size={args.vocab_size} must be in {SPECIAL_PIECES + 1}..65536: shards are uint16")
    if args.published and (args.tokenizer or args.caseops):
        raise ValueError("--published trains its own tokenizer, without --caseops: drop one of them")
    if args.tokenizer and args.tokenizer != BYTE260 and not args.tokenizer.is_file():
        raise FileNotFoundError(f"--tokenizer={args.tokenizer} does not exist or is not a file: check the path")


def default_name(args: argparse.Namespace, given: Tokenizer | None) -> str:
    """A name for the data set: that of the first input, and the kind of tokenizer."""
    name = "pydoc"
    if args.hub:
        name = args.hub.rpartition("/")[2]
    elif args.input:
        first = args.input[0].resolve()
        suffix = suffix_of(first) if first.is_file() else ""
        name = first.name[: len(first.name) - len(suffix)]
        # Shells and other tools should take the name as it is.
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "text"

    if args.tokenizer == BYTE260:
        return f"{name}_byte260"
    name += f"_sp{given.sp.get_piece_size() if given else args.vocab_size}"
    if args.caseops:
        name += "_caseops"
    if args.published:
        name += "_published"
    return name


def find_corpus(args: argparse.Namespace) -> Corpus:
    if args.hub:
        val_docs = args.val_docs or PUBLISHED_VAL_DOCS
        return hub_corpus(args.hub, args.hub_config, args.hub_revision, val_docs, args.max_docs, args.licence)
    if args.input:
        return file_corpus(args.input, args.val, args.val_docs, args.max_docs, args.licence)
    return embedded_corpus()


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        if args.check:
            faults = check(args.check)
            if faults:
                sys.exit("\n".join(faults))
            print(f"{args.check} is what its manifest says")
        else:
            check_arguments(args)
            # What is wrong with the folders or the tokenizer should be known before the work on the documents.
            given = given_tokenizer(args)
            name = args.name or default_name(args, given)
            require_space(args.out / "datasets" / name)
            require_space(args.out / "tokenizers")
            build(find_corpus(args), args, name, given)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"{error.filename or args.out}: no space is left on the disk, make room or choose another --out")
        sys.exit(str(error))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
