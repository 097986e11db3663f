"""Turn documents into token shards, with a tokenizer trained on them or a given one.

    python data/build_shards.py                                    # English from this Python's own documentation
    python data/build_shards.py --name my_sp1024 --input a.jsonl b.parquet --val-docs 500
    python data/build_shards.py --name my_sp1024 --input a.jsonl.zst --val held_out.jsonl --tokenizer sp1024.model
    python data/build_shards.py --name edu_sp1024 --hub HuggingFaceFW/fineweb-edu --hub-config sample-10BT
    python data/build_shards.py --check data/datasets/my_sp1024    # is it what its manifest says?

Inputs: .jsonl and .jsonl.zst (a JSON object with a string `text` per line), .parquet (column `text`), .txt (one
document per file), or a data set of the Hugging Face Hub. Under --out (default: the folder of this script) it writes

    datasets/NAME/fineweb_{train,val}_%06d.bin   shards (shards.py): per document BOS, then its tokens; no EOS
    datasets/NAME/fineweb_val_bytes_%06d.bin     entry i: source UTF-8 bytes that token i of the val shard stands for
    datasets/NAME/manifest.json                  what was built from what; written last, so a killed build has none
    tokenizers/*.model                           the SentencePiece model

documents.py reads, transforms.py and tokenizer.py turn text into tokens; the output is the same for any --workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
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
from documents import Corpus, embedded_corpus, file_corpus, file_digest, fingerprint, framed, hub_corpus
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

TOOL_VERSION = 2  # rises whenever equal input can give another output
BATCH_CHARS = 1_000_000  # text encoded at a time: some tenths of a second, so that all workers stay busy
POOL_BATCHES = 8  # fewer are encoded sooner than processes start
BYTE260 = Path("byte260")  # the name of the tokenizer of pure bytes, where others have a file
VAL_DOCS = 50_000  # as in the published data sets

# --- Encode ---


class Encoded(NamedTuple):
    """What became of a batch of documents."""

    fates: list[str]  # of each document: the figure of the manifest that counts it
    tokens: Tokens  # of those in `documents`: (1, N), for val (2, N) with the source bytes of each token
    lossless: bool  # each decodes to itself; tried for val only


class Encoder:
    """Encodes a batch of documents of one split; a function that can be sent to another process.

    Blank documents, and those that a normalizing tokenizer leaves without a token, are dropped; so are those whose
    fingerprint is in `held_out`.
    """

    def __init__(self, tokenizer: Tokenizer, split: str, held_out: set[bytes]) -> None:
        self.tokenizer, self.split, self.held_out = tokenizer, split, held_out

    def __call__(self, texts: list[str]) -> Encoded:
        fates, blocks, lossless = [], [np.zeros((2 if self.split == "val" else 1, 0), np.uint16)], True
        for text in texts:
            if not text.strip():
                fates.append("dropped_documents")
            elif self.held_out and fingerprint(text) in self.held_out:
                fates.append("overlap_documents")
            else:
                block = self.val_block(text) if self.split == "val" else self.train_block(text)
                fates.append("documents" if block.size else "dropped_documents")
                blocks.append(block)
                lossless = lossless and (self.split != "val" or self.survives(text, block))
        return Encoded(fates, np.concatenate(blocks, axis=1), lossless)

    def train_block(self, text: str) -> Tokens:
        """BOS and the tokens; empty for a text without tokens. -> (1, N)"""
        ids = self.tokenizer.encode(text)
        return np.concatenate([[self.tokenizer.sp.bos_id()], ids] if ids.size else [ids]).astype(np.uint16)[None]

    def val_block(self, text: str) -> Tokens:
        """As train_block, with a second row: the source bytes of each token, 0 for BOS. -> (2, N)

        Raises ValueError for a token of more than 65535 bytes.
        """
        ids, n_bytes = self.tokenizer.encode_with_bytes(text)
        if n_bytes.max(initial=0) > 0xFFFF:
            raise ValueError(
                f"the val document that begins with {text[:40]!r} has a token that stands for {n_bytes.max()} bytes, "
                "more than the 65535 of uint16: shorten its runs of blanks"
            )
        rows = np.stack([ids, n_bytes.astype(np.uint16)])
        bos = np.array([[self.tokenizer.sp.bos_id()], [0]], np.uint16)
        return np.concatenate([bos, rows], axis=1) if ids.size else rows

    def survives(self, text: str, block: Tokens) -> bool:
        try:
            return self.tokenizer.decode(block[0, 1:]) == text
        except ValueError:  # the tokenizer damaged an operator of the transform
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
            batch, chars = [], 0
    if batch:
        yield batch


ENCODERS: list[Encoder] = []  # of a worker process: the one it was started with


def start_worker(encoder: Encoder) -> None:
    """Keep the encoder, and end with the parent only: a killed export must not leave workers that wait for ever."""

    def follow_parent() -> None:
        parent = parent_process()
        assert parent
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    ENCODERS.append(encoder)


def work(texts: list[str]) -> Encoded:
    return ENCODERS[0](texts)


def encode_in_order(encoder: Encoder, documents: Iterable[str], workers: int) -> Iterator[tuple[list[str], Encoded]]:
    """Batches of the documents with what became of them, in order; in `workers` processes if there is enough to do.

    Each worker has at most two batches waiting, so that memory does not grow with the input.
    """
    todo = batches(documents)
    first = list(islice(todo, POOL_BATCHES))
    todo = chain(first, todo)
    if workers == 1 or len(first) < POOL_BATCHES:
        yield from ((texts, encoder(texts)) for texts in todo)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (encoder,))
    waiting: deque[tuple[list[str], Future[Encoded]]] = deque()
    try:
        for texts in todo:
            waiting.append((texts, pool.submit(work, texts)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        yield from ((texts, future.result()) for texts, future in waiting)
    except BrokenProcessPool:
        raise OSError(f"a worker died, perhaps out of memory: try fewer than --workers={workers}") from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- Write ---


def encode_split(encoder: Encoder, documents: Iterable[str], workers: int, figures: dict[str, Any]) -> Iterator[Tokens]:
    """Encode the documents in order and keep account of them in `figures`. -> (R, N) blocks

    `lossless` ends as True if every val document decodes to itself.
    """
    text_hash = hashlib.sha256()
    for texts, encoded in encode_in_order(encoder, documents, workers):
        for text, fate in zip(texts, encoded.fates, strict=True):
            figures[fate] += 1
            if fate == "documents":
                text_hash.update(framed(text))
                figures["bytes"] += len(text.encode())
        figures["tokens"] += encoded.tokens.shape[1]
        figures["lossless"] &= encoded.lossless
        yield encoded.tokens
    figures["text_sha256"] = text_hash.hexdigest()


def recut(blocks: Iterable[Tokens], size: int) -> Iterator[Tokens]:
    """Join (R, n) blocks along n and cut the result into (R, size) blocks; the last one may be shorter."""
    shard, filled = None, 0
    for block in blocks:
        rest = block
        while rest.shape[1]:
            if shard is None:
                shard, filled = np.empty((len(rest), size), np.uint16), 0
            part = rest[:, : size - filled]
            shard[:, filled : filled + part.shape[1]] = part
            filled, rest = filled + part.shape[1], rest[:, part.shape[1] :]
            if filled == size:
                yield shard
                shard = None
    if shard is not None:
        yield shard[:, :filled]


def build_split(
    folder: Path, documents: Iterable[str], encoder: Encoder, shard_tokens: int, workers: int
) -> dict[str, Any]:
    """Write the shards of one split, for val with their byte sidecars. -> its entry in the manifest, plus `lossless`"""
    counted = ("documents", "tokens", "bytes", "dropped_documents", "overlap_documents")
    figures: dict[str, Any] = dict.fromkeys(counted, 0) | {"lossless": True}
    split = encoder.split
    names = ["fineweb_val_", "fineweb_val_bytes_"] if split == "val" else ["fineweb_train_"]
    files: dict[str, str] = {}
    progress = tqdm(documents, split, unit=" documents", disable=None)
    for index, block in enumerate(recut(encode_split(encoder, progress, workers, figures), shard_tokens)):
        for name, row in zip(names, block, strict=True):
            path = folder / f"{name}{index:06d}.bin"
            write_shard(path, row)
            files[path.name] = file_digest(path)
    if not files:
        raise ValueError(f"the {split} split has no document with text: name other files or a smaller --val-docs")
    return {**figures, "files": files}


# --- Check ---


def check_files(folder: Path, files: dict[str, str]) -> Iterator[str]:
    """What contradicts the sha256 of each file."""
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            yield f"{folder / name} is missing"
        elif file_digest(folder / name) != sha256:
            yield f"{folder / name} is not the file of the manifest: its sha256 differs"


def count_split(folder: Path, names: list[str], tokenizer: Tokenizer | None, lossless: bool) -> dict[str, Any]:
    """The figures of a split as far as its files tell them: documents and tokens, and from a sidecar the bytes.

    For a `lossless` tokenizer also the identity of the text, decoded from the tokens of a split with a sidecar.
    """
    found: dict[str, Any] = {"documents": 0, "tokens": 0, "bytes": 0}
    bos_id = tokenizer.sp.bos_id() if tokenizer else 1
    shards = [read_shard(folder / name) for name in names if "_bytes_" not in name]
    sidecars = [read_shard(folder / name) for name in names if "_bytes_" in name]
    for shard in shards:
        found["tokens"] += shard.size
        found["documents"] += int(np.count_nonzero(shard == bos_id))
        top = int(shard.max(initial=0))
        if tokenizer and top >= len(tokenizer.is_byte):
            raise ValueError(f"{folder} has token {top}, but the tokenizer has {len(tokenizer.is_byte)} pieces")
    if not sidecars:
        del found["bytes"]
        return found
    if [sidecar.size for sidecar in sidecars] != [shard.size for shard in shards]:
        raise ValueError(f"{folder} has byte sidecars that do not fit its shards")
    found["bytes"] = sum(int(sidecar.sum(dtype=np.int64)) for sidecar in sidecars)
    if tokenizer and lossless:
        ids, text_hash = np.concatenate(shards), hashlib.sha256()
        for document in np.split(ids, np.flatnonzero(ids == bos_id))[1:]:
            text_hash.update(framed(tokenizer.decode(document[1:])))
        found["text_sha256"] = text_hash.hexdigest()
    return found


def check(folder: Path) -> list[str]:
    """What in a data set contradicts its manifest: files, hashes, counts, sums. Empty if all is well.

    Reads the manifests of data/download.py too, whose unknown figures are skipped.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return [f"{path} does not exist: the export or the download was not finished, run it again"]
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        splits = {split: dict(manifest["splits"][split]) for split in ("train", "val")}
        listed = {name for figures in splits.values() for name in dict(figures["files"])}
        model, lossless = str(manifest["tokenizer"]["file"]), manifest["tokenizer"]["lossless"] is True
        shelf, sha256 = folder.absolute().parent.parent / "tokenizers", manifest["tokenizer"]["sha256"]
    except (ValueError, KeyError, TypeError):
        return [f"{path} is not a manifest of data/build_shards.py: export the data again"]
    faults = [*check_files(shelf, {model: sha256})]
    faults += [fault for figures in splits.values() for fault in check_files(folder, figures["files"])]
    stray = sorted(file.name for file in folder.glob("fineweb_*.bin") if file.name not in listed)
    faults += [f"{folder / name} is not in the manifest: remove it" for name in stray]
    if faults:  # the sums of other files mean nothing
        return faults
    tokenizer = Tokenizer((shelf / model).read_bytes(), shelf / model) if model.endswith(".model") else None
    for split, figures in splits.items():
        found = count_split(folder, sorted(figures["files"]), tokenizer, lossless)
        for key, value in found.items():
            if figures[key] not in (value, "unknown"):
                faults.append(f"{folder} has in its {split} split {key} {value}, but its manifest says {figures[key]}")
    return faults


# --- Main ---


def given_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer that --tokenizer names, if any; loaded first, since errors should come before the work."""
    if not args.tokenizer:
        return None
    if args.tokenizer == BYTE260:
        given = Tokenizer(byte_model(), Path("byte260.model"))
    else:
        given = Tokenizer(args.tokenizer.read_bytes(), args.tokenizer)
    if args.caseops and given.transform.name != "caseops":
        raise ValueError(f"{args.tokenizer} has no pieces for the operators of --caseops: drop one of the two")
    return given


def place_tokenizer(
    corpus: Corpus, held_out: set[bytes], args: argparse.Namespace, name: str, given: Tokenizer | None
) -> Tokenizer:
    """Copy the given tokenizer to its folder, or train one on the training documents and write it there.

    A data set called X_sp1024 gets X_1024_bpe.model, as the published ones are called.
    """
    folder = args.out / "tokenizers"
    if given:
        model, path = given.model, folder / given.path.name
        if path.exists() and path.read_bytes() != model:
            raise ValueError(f"{path} exists and differs from {given.path}: rename one of them")
    else:
        train = (text for text in islice(corpus.train(), TOKENIZER_DOCS) if fingerprint(text) not in held_out)
        if args.published:
            model = train_published_tokenizer(train, args.vocab_size)
        else:
            model = train_tokenizer(sample_documents(train, TOKENIZER_TEXT_CHARS), args.vocab_size, args.caseops)
        path = folder / f"{re.sub(r'_sp[0-9]+(?=_|$)', '', name)}_{args.vocab_size}_bpe.model"
    folder.mkdir(parents=True, exist_ok=True)
    if not (path.exists() and path.read_bytes() == model):
        write_whole(path, model)
    return Tokenizer(model, path)


def build(corpus: Corpus, args: argparse.Namespace, name: str, given: Tokenizer | None) -> None:
    """Write the tokenizer, the shards and the manifest of one data set, and print a summary."""
    held_out = {fingerprint(text) for text in corpus.val()}
    tokenizer = place_tokenizer(corpus, held_out, args, name, given)

    folder = args.out / "datasets" / name
    folder.mkdir(parents=True, exist_ok=True)
    # a longer export must not leave its tail, nor a killed one its half-written file
    for stale in [folder / "manifest.json", *folder.glob("fineweb_*.bin"), *folder.glob(".*.tmp")]:
        stale.unlink(missing_ok=True)

    train, val = Encoder(tokenizer, "train", held_out), Encoder(tokenizer, "val", set())
    splits = {
        "train": build_split(folder, corpus.train(), train, args.shard_tokens, args.workers),
        "val": build_split(folder, corpus.val(), val, args.shard_tokens, args.workers),
    }
    splits["train"].pop("lossless")  # measured on val only
    lossless = splits["val"].pop("lossless")
    manifest = {
        "format": 1,
        "name": name,
        "source": corpus.source,
        "revision": corpus.revision(),
        "licence": corpus.licence,
        "tool": "data/build_shards.py",
        "tool_version": TOOL_VERSION,
        "sentencepiece_version": spm.__version__,
        "val_docs": sum(splits["val"][key] for key in ("documents", "dropped_documents", "overlap_documents")),
        "tokenizer": {
            "file": tokenizer.path.name,
            "sha256": hashlib.sha256(tokenizer.model).hexdigest(),
            "vocab_size": tokenizer.sp.get_piece_size(),
            "lossless": lossless,
            "transform": tokenizer.transform.name,
            "settings": tokenizer.settings,
        },
        "splits": splits,
    }
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    print_summary(manifest, tokenizer.path, folder)


def print_summary(manifest: dict[str, Any], model: Path, folder: Path) -> None:
    for split, s in manifest["splits"].items():
        ratio = s["bytes"] / s["tokens"]
        print(f"{split}: {s['documents']} documents, {s['tokens']} tokens, {s['bytes']} bytes, {ratio:.3f} bytes/token")
        print(f"  left out: {s['dropped_documents']} without text, {s['overlap_documents']} that val holds")
    tokenizer = manifest["tokenizer"]
    lossless = "lossless" if tokenizer["lossless"] else "NOT lossless"
    print(
        f"tokenizer: {model}, {tokenizer['vocab_size']} pieces, {lossless} on val, transform {tokenizer['transform']}"
    )
    print(f"dataset: {folder}")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", nargs="+", type=Path, default=[], metavar="FILE", help="documents")
    source.add_argument("--hub", metavar="REPO", help="data set on the Hub; its train split is streamed")
    parser.add_argument("--hub-config", metavar="NAME", help="configuration of it, such as sample-10BT")
    parser.add_argument("--hub-revision", metavar="REV", help="branch, tag or commit of it (default: the newest)")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--val", nargs="+", type=Path, default=[], metavar="FILE", help="validation documents")
    held_out.add_argument("--val-docs", type=int, metavar="N", help=f"validate on the first N (default: {VAL_DOCS})")
    parser.add_argument("--max-docs", type=int, metavar="N", help="read the first N documents, validation included")
    parser.add_argument("--licence", default="", metavar="TEXT", help="of the text, with the attribution that it wants")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="reuse this SentencePiece model, or byte260")
    parser.add_argument("--vocab-size", type=int, default=1024, help="pieces of the tokenizer to train")
    parser.add_argument("--caseops", action="store_true", help="write capitals as operators and small letters")
    parser.add_argument("--published", action="store_true", help="train as the published ones were: NFKC, NOT lossless")
    parser.add_argument("--name", help="name of the data set (default: pydoc_sp1024 for the embedded corpus)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="holds datasets/ and tokenizers/")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens of a full shard")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: one per core)")
    parser.add_argument("--check", type=Path, metavar="DIR", help="only verify this data set against its manifest")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for arguments that do not go together."""
    for name, value in (("val-docs", args.val_docs), ("max-docs", args.max_docs), ("workers", args.workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if not (args.input or args.hub) and (args.val or args.val_docs or args.max_docs):
        raise ValueError("--val, --val-docs and --max-docs need --input FILE: the embedded corpus brings its own split")
    if args.hub and args.val:
        raise ValueError("--val needs --input FILE: with --hub, --val-docs N are the first documents of the data set")
    if (args.hub_config or args.hub_revision) and not args.hub:
        raise ValueError("--hub-config and --hub-revision need --hub REPO")
    if (args.input or args.hub or args.tokenizer) and not args.name:
        raise ValueError(
            "--input, --hub and --tokenizer need --name NAME: the data set must not replace the embedded one"
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


def find_corpus(args: argparse.Namespace) -> Corpus:
    val_docs = args.val_docs or VAL_DOCS
    if args.hub:
        return hub_corpus(args.hub, args.hub_config, args.hub_revision, val_docs, args.max_docs, args.licence)
    if args.input:
        return file_corpus(args.input, args.val, val_docs, args.max_docs, args.licence)
    return embedded_corpus()


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        if args.check:
            faults = check(args.check)
            if faults:
                sys.exit("\n".join(faults))
            print(f"{args.check} is what its manifest says")
            return
        check_arguments(args)
        suffix = "_caseops" * args.caseops + "_published" * args.published
        given = given_tokenizer(args)
        build(find_corpus(args), args, args.name or f"pydoc_sp{args.vocab_size}{suffix}", given)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
