"""Documents to shards: no byte of the text is lost, counted twice or attributed to another split."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_shards
import documents
import numpy as np
import pytest
import sentencepiece as spm
import shards
import tokenizer
from tokenizer import train_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PUBLISHED = SHARED / "tokenizers" / "fineweb_1024_bpe.model"
FINEWEB = SHARED / "web-real" / "fineweb_val_a.jsonl"
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{PUBLISHED} is absent")

SENTENCE = "the cat sat on a mat and then it ran off with 12 caf\u00e9s\n\n    to be: (well) seen again.\n"
WORDS = SENTENCE.split(" ")
DOCUMENTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 40)) + f" number {i}" for i in range(30)]
LINE = b'{"text": "one line"}\n'
BUILD = ["--vocab-size", "300", "--name", "toy"]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def build(out: Path, *arguments: str | Path) -> dict:
    """Run the tool in this process. -> the manifest"""
    build_shards.main([*map(str, arguments), "--out", str(out)])
    return json.loads((out / "datasets" / "toy" / "manifest.json").read_text())


def read_split(out: Path, pattern: str) -> np.ndarray:
    """All tokens of the split in the order of the shards."""
    files = sorted((out / "datasets" / "toy").glob(pattern))
    return np.concatenate([shards.read_shard(file) for file in files])


def test_help_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        build_shards.main(["--help"])
    assert "--shard-tokens" in capsys.readouterr().out


# --- Builds ---


def recount(texts: list[str]) -> tuple[int, int, str]:
    """Documents, bytes and text identity as README.md defines them."""
    raw = [text.encode() for text in texts]
    identity = hashlib.sha256(b"".join(len(r).to_bytes(8, "little") + r for r in raw)).hexdigest()
    return len(raw), sum(map(len, raw)), identity


def test_manifest_equals_a_recount_from_files_and_documents(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "", " \n", DOCUMENTS[2]])
    manifest = build(tmp_path, *BUILD, "--input", source, "--val-docs", "5", "--shard-tokens", "100")
    folder = tmp_path / "datasets" / "toy"
    model = tmp_path / "tokenizers" / manifest["tokenizer"]["file"]
    sp = spm.SentencePieceProcessor(model_file=str(model))
    assert manifest["tokenizer"] == {
        "file": "toy_300_bpe.model",
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "vocab_size": 300,
        "lossless": True,
        "transform": "escape",
        "settings": tokenizer.model_settings(model.read_bytes()),
    }
    assert (manifest["format"], manifest["name"], manifest["source"]) == (1, "toy", "a.jsonl")
    assert manifest["revision"] == f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()}"
    assert (manifest["licence"], manifest["val_docs"]) == ("unknown", 5)
    for split, texts, dropped, overlap in (("train", DOCUMENTS[5:], 2, 1), ("val", DOCUMENTS[:5], 0, 0)):
        s = manifest["splits"][split]
        tokens = read_split(tmp_path, f"fineweb_{split}_0*.bin")
        assert tokens.tolist() == [i for text in texts for i in [1, *sp.encode(text)]]
        assert (s["documents"], s["bytes"], s["text_sha256"]) == recount(texts)
        assert s["tokens"] == tokens.size
        assert (s["dropped_documents"], s["overlap_documents"]) == (dropped, overlap)
        files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob(f"fineweb_{split}_*.bin")}
        assert s["files"] == files
        sizes = [shards.read_shard(f).size for f in sorted(folder.glob(f"fineweb_{split}_0*.bin"))]
        assert len(sizes) > 2
        assert set(sizes[:-1]) == {100}
        assert 0 < sizes[-1] <= 100


def test_sidecar_lies_beside_the_tokens_and_adds_up_per_document(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    build(tmp_path, *BUILD, "--input", source, "--val-docs", "5", "--shard-tokens", "77")
    tokens = read_split(tmp_path, "fineweb_val_0*.bin")
    n_bytes = read_split(tmp_path, "fineweb_val_bytes_*.bin").astype(np.int64)
    starts = np.flatnonzero(tokens == 1)
    assert (n_bytes[starts] == 0).all()
    assert np.add.reduceat(n_bytes, starts).tolist() == [len(text.encode()) for text in DOCUMENTS[:5]]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do two builds with the same number."""
    monkeypatch.setattr(build_shards, "BATCH_CHARS", 200)  # one or two documents
    started = []
    pool = build_shards.ProcessPoolExecutor

    def start_pool(workers: int, *arguments: Any) -> build_shards.ProcessPoolExecutor:
        started.append(workers)
        return pool(workers, *arguments)

    monkeypatch.setattr(build_shards, "ProcessPoolExecutor", start_pool)
    source = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "", DOCUMENTS[2], *map(str.upper, DOCUMENTS)])
    contents = []
    for i, workers in enumerate(("1", "1", "3")):
        out = tmp_path / str(i)
        build(out, *BUILD, "--input", source, "--val-docs", "29", "--shard-tokens", "200", "--workers", workers)
        contents.append(read_folder(out))
    assert started == [3, 3]  # a pool for each split
    assert all(content == contents[0] for content in contents)
    assert len(contents[0]) > 20


class Dying(build_shards.Encoder):
    """Ends its process without a word, as the system ends one that takes too much memory."""

    def __call__(self, texts: list[str]) -> build_shards.Encoded:
        os._exit(9)


def test_a_worker_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_shards, "BATCH_CHARS", 1)
    encoder = Dying(tokenizer.Tokenizer(tokenizer.byte_model(), Path("byte260.model")), "train", set())
    with pytest.raises(OSError, match=r"a worker died.*try fewer than --workers=2"):
        list(build_shards.encode_in_order(encoder, DOCUMENTS, 2))


class Failing(build_shards.Encoder):
    """Finds something wrong with a document."""

    def __call__(self, texts: list[str]) -> build_shards.Encoded:
        raise ValueError(f"a fault in {texts[0]!r}")


def test_a_fault_in_a_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_shards, "BATCH_CHARS", 1)
    encoder = Failing(tokenizer.Tokenizer(tokenizer.byte_model(), Path("byte260.model")), "train", set())
    with pytest.raises(ValueError, match="a fault in 'first'"):
        list(build_shards.encode_in_order(encoder, ["first", *DOCUMENTS], 2))


@pytest.mark.parametrize("fault", ["a document", "the disk"])
def test_a_failed_export_leaves_the_earlier_one_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Its shards, its manifest and its tokenizer, and nothing beside them."""
    build(tmp_path, *BUILD, "--input", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), "--val-docs", "5")
    before = read_folder(tmp_path / "datasets"), read_folder(tmp_path / "tokenizers")
    # Other text, so that another tokenizer would be trained.
    source = write_jsonl(tmp_path / "b.jsonl", [*map(str.upper, DOCUMENTS)])
    if fault == "a document":
        with source.open("a") as file:
            file.write('{"text": 7}\n')
        monkeypatch.setattr(build_shards, "train_model", lambda *_: train_tokenizer(DOCUMENTS, 299))
        message = "b.jsonl line 31 has no string `text`"
    else:
        write = build_shards.write_shard

        def write_or_fail(path: Path, tokens: np.ndarray) -> None:
            if "val_bytes" in path.name:
                raise OSError(28, "No space left on device", str(path))
            write(path, tokens)

        monkeypatch.setattr(build_shards, "write_shard", write_or_fail)
        message = "fineweb_val_bytes_000000.bin: no space is left on the disk, make room or choose another --out"
    assert message in message_of(*BUILD, "--input", source, "--val-docs", "5", "--out", tmp_path, "--overwrite")
    assert (read_folder(tmp_path / "datasets"), read_folder(tmp_path / "tokenizers")) == before
    assert build_shards.check(tmp_path / "datasets" / "toy") == []


def test_a_failed_export_leaves_no_folder(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["the cat", "the cat"])
    arguments = ["--name", "toy", "--tokenizer", "byte260", "--input", source, "--val-docs", "1", "--out", tmp_path]
    assert "the validation split holds all 1 documents of the train split" in message_of(*arguments)
    assert not (tmp_path / "datasets" / "toy").exists()
    assert not (tmp_path / "tokenizers").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write")
def test_an_output_folder_that_cannot_be_written_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_shards, "find_corpus", lambda _: pytest.fail("documents were read in vain"))
    message = message_of("--name", "toy", "--out", "/proc/self")
    assert re.fullmatch(r"/proc/self cannot be written \(.*\): choose another --out", message)


def test_a_full_disk_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest file that this process may write stands in for the room on the disk."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(build_shards, "find_corpus", lambda _: pytest.fail("documents were read in vain"))
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        message = message_of(*BUILD, "--input", source, "--val-docs", "5", "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert re.fullmatch(rf"{tmp_path} cannot be written \(.*\): choose another --out", message)


def test_a_validation_document_never_reaches_train_or_the_tokenizer(tmp_path: Path) -> None:
    """With val text removed from train, the tokenizer is the one that the other documents give."""
    train = write_jsonl(tmp_path / "train.jsonl", DOCUMENTS)
    val = write_jsonl(tmp_path / "val.jsonl", DOCUMENTS[3:6])
    manifest = build(tmp_path, *BUILD, "--input", train, "--val", val)
    others = DOCUMENTS[:3] + DOCUMENTS[6:]
    s = manifest["splits"]["train"]
    assert s["overlap_documents"] == 3
    assert (s["documents"], s["bytes"], s["text_sha256"]) == recount(others)
    model = (tmp_path / "tokenizers" / "toy_300_bpe.model").read_bytes()
    assert model == train_tokenizer(others, 300)


def test_shards_of_a_longer_export_do_not_survive(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    build(tmp_path, *BUILD, "--input", source, "--val-docs", "5", "--shard-tokens", "50")
    manifest = build(tmp_path, *BUILD, "--input", source, "--val-docs", "5")
    listed = {name for s in manifest["splits"].values() for name in s["files"]}
    assert {file.name for file in (tmp_path / "datasets" / "toy").iterdir()} == {*listed, "manifest.json"}
    assert len(listed) == 3


def test_every_suffix_gives_the_same_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    texts = ["two\r\nlines", "caf\u00e9 \u2028 \U0001f642", ""]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    marked, packed, zipped, table = (tmp_path / f"a.{end}" for end in ("bom.jsonl", "jsonl.zst", "jsonl.gz", "parquet"))
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    halves = plain.read_bytes().partition(b"\n")
    # Several frames with a table of their places, which is what pzstd and others write.
    packed.write_bytes(SKIPPABLE_FRAME + b"".join(zstandard.compress(half) for half in halves))
    zipped.write_bytes(b"".join(gzip.compress(half) for half in halves))
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": texts}), table)
    txt = [tmp_path / f"{i}.txt" for i in range(3)]
    for path, text in zip(txt, texts, strict=True):
        path.write_bytes(text.encode())
    txt[1].write_bytes(b"\xef\xbb\xbf" + txt[1].read_bytes())  # a byte order mark is no text
    for paths in ([plain], [marked], [packed], [zipped], [table], txt):
        assert list(documents.read_documents(paths)) == texts


SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"


def packed_lines(kind: str) -> tuple[bytes, list[int]]:
    """A compressed file of 300 documents, and the lengths at which it is whole."""
    lines = [json.dumps({"text": f"document {i} of some words"}).encode() + b"\n" for i in range(300)]
    parts = [b"".join(lines[i : i + 100]) for i in range(0, 300, 100)]
    if kind == "gz":
        packed = [gzip.compress(part) for part in parts]
    elif kind == "zst frames":
        packed = [pytest.importorskip("zstandard").compress(part) for part in parts]
    else:
        compressor = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
        packed = [compressor.compress(part) + compressor.flush(1) for part in parts] + [compressor.flush()]
        return b"".join(packed), [sum(map(len, packed))]
    return b"".join(packed), np.cumsum([len(part) for part in packed]).tolist()


@pytest.mark.parametrize("kind", ["gz", "zst frames", "zst blocks"])
def test_a_compressed_file_that_is_cut_off_is_named(tmp_path: Path, kind: str) -> None:
    """At any place but the end of a frame, where what is left is a whole file."""
    content, whole = packed_lines(kind)
    path = tmp_path / ("a.jsonl.gz" if kind == "gz" else "a.jsonl.zst")
    for size in [1, 5, len(content) - 1, *range(13, len(content), 29)]:
        if size in whole:
            continue
        path.write_bytes(content[:size])
        # What is left may be too short to be known as gzip data.
        fault = "is not gzip data" if size < 2 and kind == "gz" else "is cut off"
        with pytest.raises(ValueError, match=rf"{path.name} {fault}.*: fetch it again"):
            list(documents.read_documents([path]))
    path.write_bytes(content)
    assert len(list(documents.read_documents([path]))) == 300


def test_a_parquet_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"document {i}" for i in range(300)]}), path, use_dictionary=False)
    content = path.read_bytes()
    for damaged in (content[:-9], content[:200], content[:40] + bytes(300) + content[340:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet is damaged or cut off behind row \d+"):
            list(documents.read_documents([path]))


def test_parquet_text_that_is_no_text_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [b"some", b"bytes"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet has a column `text` of binary.*cast it to string"):
        list(documents.read_documents([path]))

    buffers = pyarrow.array(["good", "bad?"]).buffers()
    broken = pyarrow.py_buffer(buffers[2].to_pybytes().replace(b"?", b"\xff"))
    column = pyarrow.StringArray.from_buffers(2, buffers[1], broken)
    parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(ValueError, match=r"a\.parquet has text behind row 0 that is not UTF-8: convert it first"):
        list(documents.read_documents([path]))


def test_a_number_of_any_length_is_no_fault_of_a_line(tmp_path: Path) -> None:
    """Python would refuse to read one of more than 4,300 digits."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": ' + 5000 * b"7" + b', "text": "some text"}\n')
    assert list(documents.read_documents([path])) == ["some text"]


AWKWARD = [
    "a \u2581 b\u2581",
    "\0\0",
    " Lone\ue004s \ue001\ue002NASA's iPhone\r\n",
    "\u3000 \ufb01\u00bd e\u0301  ",
    "\u200b",
]


@pytest.mark.parametrize(
    ("arguments", "transform", "lossless"),
    [
        (["--vocab-size", "300"], "escape", True),
        (["--vocab-size", "310", "--caseops"], "caseops", True),
        (["--tokenizer", "byte260"], "none", True),
        (["--vocab-size", "300", "--published"], "none", False),
    ],
)
def test_the_sidecar_adds_up_to_what_comes_back_of_the_documents(
    tmp_path: Path, arguments: list[str], transform: str, lossless: bool
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*AWKWARD, *DOCUMENTS])
    manifest = build(tmp_path, "--name", "toy", *arguments, "--input", source, "--val-docs", "7")
    assert (manifest["tokenizer"]["transform"], manifest["tokenizer"]["lossless"]) == (transform, lossless)
    s = manifest["splits"]["val"]
    texts = [text for text in [*AWKWARD, *DOCUMENTS[:2]] if lossless or text != "\u200b"]  # NFKC leaves nothing of it
    assert (s["documents"], s["bytes"], s["text_sha256"]) == recount(texts)
    assert s["dropped_documents"] == 7 - len(texts)
    tokens, n_bytes = (read_split(tmp_path, f"fineweb_val_{kind}*.bin") for kind in ("0", "bytes_"))
    starts = np.flatnonzero(tokens == 1)
    counted = np.add.reduceat(n_bytes.astype(np.int64), starts).tolist()
    sizes = [len(text.encode()) for text in texts]
    if lossless:
        assert counted == sizes
    else:
        assert all(n <= size for n, size in zip(counted, sizes, strict=True))
        # Of each run of blanks in the documents one space comes back.
        assert counted[-2:] == [len(" ".join(text.split()).encode()) for text in DOCUMENTS[:2]]
    assert s["bytes_given_back"] == sum(counted)
    assert build_shards.check(tmp_path / "datasets" / "toy") == []


def test_byte260_gives_the_published_ids(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*AWKWARD, *DOCUMENTS])
    manifest = build(tmp_path, "--name", "toy", "--tokenizer", "byte260", "--input", source, "--val-docs", "5")
    assert (manifest["tokenizer"]["file"], manifest["tokenizer"]["vocab_size"]) == ("byte260.model", 260)
    for split, texts in (("val", AWKWARD), ("train", DOCUMENTS)):
        expected = [i for text in texts for i in [1, *(4 + byte for byte in text.encode())]]
        assert read_split(tmp_path, f"fineweb_{split}_0*.bin").tolist() == expected
    assert (read_split(tmp_path, "fineweb_val_bytes_*.bin") == (read_split(tmp_path, "fineweb_val_0*.bin") != 1)).all()


def test_a_copy_of_a_validation_document_in_other_spelling_is_dropped_from_train(tmp_path: Path) -> None:
    """Blanks and Unicode composition do not make another document; case and punctuation do."""
    val = ["The caf\u00e9\n\nis here.", DOCUMENTS[0]]
    copies = ["  The cafe\u0301 is\there.\n", "The caf\u00e9 is here.", DOCUMENTS[0]]
    others = ["the caf\u00e9 is here.", "The caf\u00e9 is here", *DOCUMENTS[1:]]
    source = write_jsonl(tmp_path / "a.jsonl", [*val, *copies, *others])
    manifest = build(tmp_path, *BUILD, "--input", source, "--val-docs", "2")
    s = manifest["splits"]["train"]
    assert s["overlap_documents"] == 3
    assert (s["documents"], s["bytes"], s["text_sha256"]) == recount(others)
    assert manifest["splits"]["val"]["documents"] == 2


def test_of_the_published_documents_the_first_are_held_out_and_max_docs_cuts_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert documents.PUBLISHED_VAL_DOCS == 50_000
    monkeypatch.setattr(documents, "PUBLISHED_VAL_DOCS", 7)
    source = write_jsonl(tmp_path / "docs_selected.jsonl", DOCUMENTS)
    manifest = build(tmp_path, "--name", "toy", "--tokenizer", "byte260", "--input", source, "--max-docs", "10")
    assert (manifest["val_docs"], manifest["val_rule"]) == (7, "the first 7 documents")
    for split, texts in (("val", DOCUMENTS[:7]), ("train", DOCUMENTS[7:10])):
        s = manifest["splits"][split]
        assert (s["documents"], s["bytes"], s["text_sha256"]) == recount(texts)


def test_a_line_of_5_mb_is_one_document(tmp_path: Path) -> None:
    text = "the cat sat on a mat and then it ran off " * 125_000
    source = write_jsonl(tmp_path / "a.jsonl", [text, "held out"])
    val = write_jsonl(tmp_path / "val.jsonl", ["held out"])
    model = tmp_path / "some.model"
    model.write_bytes(train_tokenizer(DOCUMENTS, 300))
    manifest = build(tmp_path, "--name", "toy", "--tokenizer", model, "--input", source, "--val", val)
    assert manifest["splits"]["train"]["documents"] == 1
    assert manifest["splits"]["train"]["bytes"] == len(text) > 5_000_000


def test_a_killed_export_leaves_the_earlier_one_and_no_workers_and_is_done_again(tmp_path: Path) -> None:
    """kill -9 while shards are being written."""
    source = write_jsonl(tmp_path / "a.jsonl", [text * 400 for text in DOCUMENTS for _ in range(20)])
    settings = ["--name", "toy", "--tokenizer", "byte260", "--val-docs", "5"]
    arguments = [*settings, "--shard-tokens", "20000", "--workers", "2", "--out", tmp_path]
    folder = tmp_path / "datasets" / "toy"
    build_shards.main([*map(str, arguments), "--input", str(write_jsonl(tmp_path / "b.jsonl", DOCUMENTS))])
    assert (folder / "manifest.json").exists()
    command = [sys.executable, build_shards.__file__, *arguments, "--input", source, "--overwrite"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / ".unfinished" / "fineweb_train_000003.bin").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = children_of(process.pid)
    assert len(workers) >= 2 or not Path("/proc").exists()
    process.kill()
    process.wait()
    assert build_shards.check(folder) == []
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (folder / ".fineweb_train_000004.bin.123.tmp").write_bytes(b"half")
    manifest = build(tmp_path, *settings, "--input", tmp_path / "b.jsonl")  # the text that is there
    assert build_shards.check(folder) == []
    listed = {name for s in manifest["splits"].values() for name in s["files"]}
    assert {file.name for file in folder.iterdir()} == {*listed, "manifest.json"}


def children_of(pid: int) -> list[int]:
    """Processes that this one started (Linux; elsewhere none are seen)."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_published
def test_the_published_tokenizer_gives_the_published_tokens(tmp_path: Path) -> None:
    """600 documents of the FineWeb validation split, as tokenized by the publishers of the shards."""
    train = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    manifest = build(tmp_path, "--name", "toy", "--input", train, "--val", FINEWEB, "--tokenizer", PUBLISHED)
    expected = np.fromfile(FINEWEB.with_name("fineweb_val_a_sp1024.u16.bin"), dtype="<u2")
    assert np.array_equal(read_split(tmp_path, "fineweb_val_0*.bin"), expected)
    texts = [json.loads(line)["text"] for line in FINEWEB.open("rb")]
    s = manifest["splits"]["val"]
    assert (s["documents"], s["bytes"], s["text_sha256"]) == recount(texts)
    assert read_split(tmp_path, "fineweb_val_bytes_*.bin").sum() == s["bytes"]
    copy = tmp_path / "tokenizers" / PUBLISHED.name
    assert copy.read_bytes() == PUBLISHED.read_bytes()


def wide_tokenizer(folder: Path) -> Path:
    """A tokenizer that folds blanks, so that one of its tokens can stand for any number of bytes."""
    path = folder / "folding.model"
    path.write_bytes(tokenizer.train_published_tokenizer(DOCUMENTS, 300))
    return path


def test_a_validation_document_without_a_token_is_not_lossless(tmp_path: Path) -> None:
    """It is dropped, and yet it shows that the tokenizer loses text."""
    plain = ["the cat sat on a mat", "and then it ran off"]
    manifests = []
    for val_text in (plain, [*plain, "\u200b"]):
        source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
        val = write_jsonl(tmp_path / "val.jsonl", val_text)
        manifests.append(build(tmp_path, *BUILD, "--published", "--input", source, "--val", val, "--overwrite"))
    assert [manifest["tokenizer"]["lossless"] for manifest in manifests] == [True, False]
    assert [manifest["splits"]["val"]["documents"] for manifest in manifests] == [2, 2]


# --- Check ---


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    build(out, *BUILD, "--input", write_jsonl(out / "a.jsonl", DOCUMENTS), "--val-docs", "5", "--shard-tokens", "200")
    return out


def edit_manifest(folder: Path, edit: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite_shard(folder: Path, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change a shard together with its sha256, so that only what it holds is wrong."""
    shards.write_shard(folder / name, edit(np.array(shards.read_shard(folder / name))))
    sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    split = name.split("_")[1]
    edit_manifest(folder, lambda manifest: manifest["splits"][split]["files"].update({name: sha256}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (
        lambda d: (d / "fineweb_train_000000.bin").write_bytes((d / "fineweb_val_000000.bin").read_bytes()),
        "fineweb_train_000000.bin is not the file of the manifest",
    ),
    "lost shard": (lambda d: (d / "fineweb_val_000001.bin").unlink(), "fineweb_val_000001.bin is missing"),
    "lost sidecar": (lambda d: (d / "fineweb_val_bytes_000000.bin").unlink(), "val_bytes_000000.bin is missing"),
    "stray shard": (
        lambda d: shards.write_shard(d / "fineweb_train_000099.bin", [1]),
        "fineweb_train_000099.bin is not in the manifest",
    ),
    "lost manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json does not exist"),
    "no manifest": (lambda d: (d / "manifest.json").write_text("[]"), "is not a manifest of data/build_shards.py"),
    "other tokenizer": (
        lambda d: (d.parents[1] / "tokenizers" / "toy_300_bpe.model").write_bytes(b"x"),
        "toy_300_bpe.model is not the file of the manifest",
    ),
    "documents": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["train"].update(documents=24)),
        "in its train split documents 25, but its manifest says 24",
    ),
    "bytes": (
        lambda d: edit_manifest(d, lambda m: m["splits"]["val"].update(bytes=1)),
        "but its manifest says 1",
    ),
    "other text": (
        lambda d: rewrite_shard(
            d, "fineweb_val_000000.bin", lambda ids: np.where(np.arange(ids.size) == 5, 4 + ord("~"), ids)
        ),
        "in its val split text_sha256",
    ),
    "other sums": (
        lambda d: rewrite_shard(d, "fineweb_val_bytes_000000.bin", lambda n: n + (np.arange(n.size) == 3)),
        "in its val split bytes",
    ),
    "short sidecar": (
        lambda d: rewrite_shard(d, "fineweb_val_bytes_000000.bin", lambda n: n[:-1]),
        "has byte sidecars that do not fit its shards",
    ),
    "lost tokens": (
        lambda d: rewrite_shard(d, "fineweb_train_000001.bin", lambda ids: ids[:-1]),
        "in its train split tokens",
    ),
    "unknown token": (
        lambda d: rewrite_shard(
            d, "fineweb_train_000001.bin", lambda ids: np.where(np.arange(ids.size) == 5, 300, ids)
        ),
        "has token 300, but the tokenizer has 300 pieces",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_finds_every_damage(tmp_path: Path, built: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "datasets" / "toy"
    build_shards.main(["--check", str(folder)])
    assert "is what its manifest says" in capsys.readouterr().out
    harm, message = DAMAGES[damage]
    harm(folder)
    assert message in message_of("--check", folder)


def test_check_skips_what_a_downloaded_manifest_does_not_know(tmp_path: Path, built: Path) -> None:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "datasets" / "toy"

    def forget(manifest: dict) -> None:
        manifest["tokenizer"]["lossless"] = "unknown"
        for split in manifest["splits"].values():
            split.update(documents="unknown", bytes="unknown", text_sha256="unknown")

    edit_manifest(folder, forget)
    assert build_shards.check(folder) == []


# --- Embedded corpus ---


def test_docstrings_come_in_the_order_of_the_file() -> None:
    source = '''"""Module text of some length."""
class A:
    """First class, also long enough."""
    def f(self):
        """Method text,

        and more:
            twice.
        """
def g():
    """Short."""
async def h():
    """Function at the end of the file."""
'''
    assert documents.module_docstrings(source.encode()) == (
        "Module text of some length.\n\nFirst class, also long enough.\n\nMethod text,\n\nand more:\n    twice.\n\n"
        "Function at the end of the file."
    )
    assert documents.module_docstrings(b"print 'python 2'") == ""


def test_the_embedded_corpus_is_split_by_document_without_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a part of the standard library, because parsing all of it takes seconds."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for package in ("asyncio", "email", "test/support"):
        shutil.copytree(stdlib / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tmp_path / "email", tmp_path / "copy")
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda _: str(tmp_path))

    corpus = documents.embedded_corpus()
    train, val = list(corpus.train()), list(corpus.val())
    assert len({*train, *val}) == len(train) + len(val)
    n_val, n_train = (sum(len(text.encode()) for text in split) for split in (val, train))
    longest = max(len(text.encode()) for text in val)
    assert 0.08 <= n_val / (n_train + n_val) < 0.08 + longest / (n_train + n_val)
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in [*val, *train]]
    assert hashes == sorted(hashes)
    modules = [path for path in tmp_path.rglob("*.py") if "test" not in path.relative_to(tmp_path).parts]
    expected = {documents.module_docstrings(path.read_bytes()) for path in modules} - {""}
    assert {*train, *val} >= expected
    assert len(expected) > 20
    assert any("context manager" in text for text in {*train, *val} - expected)  # a help topic


# --- Bad input ---


def message_of(*arguments: str | Path) -> str:
    """What the tool says when it refuses; one line."""
    with pytest.raises(SystemExit) as stop:
        build_shards.main([str(a) for a in arguments])
    message = str(stop.value.code)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n\n{"text": ', "a.jsonl line 3 is not JSON"),
        ("a.jsonl", b'{"text": "ok"}\n{"txt": "b"}\n', "a.jsonl line 2 has no string `text`"),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl line 1 has no string `text`"),
        ("a.jsonl", b'"text"\n', "a.jsonl line 1 has no string `text`"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl line 1 is not UTF-8 (byte 10)"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl line 1 holds half a surrogate pair"),
        ("a.jsonl", b'{"a": ' * 100_000 + b"\n", "a.jsonl line 1 is not JSON: write one object per line"),
        (
            "a.jsonl",
            b'{"text": "ok"}\n{"text": "c',
            "a.jsonl line 2 is not JSON and is the last: the file may be cut off",
        ),
        ("a.jsonl", b'\xef\xbb\xbf [\n{"text": "ok"}]', "a.jsonl holds a JSON array: write one object per line"),
        ("a.jsonl", b'[{"text": "ok"}]', "a.jsonl holds a JSON array: write one object per line"),
        (
            "a.jsonl",
            gzip.compress(LINE, mtime=0),
            "a.jsonl holds gzip data, not what its name says: rename it to end in",
        ),
        ("a.jsonl", b"\x28\xb5\x2f\xfd\n", "a.jsonl holds zstandard data, not what its name says: rename it to end in"),
        ("a.jsonl", b"PAR1\n", "a.jsonl holds a parquet file, not what its name says: rename it to end in .parquet"),
        ("a.jsonl", LINE.decode().encode("utf-16"), "a.jsonl holds UTF-16 text, not what its name says: convert it"),
        ("a.jsonl", LINE.decode().encode("utf-16-le"), "a.jsonl looks like UTF-16 text, not UTF-8: convert it"),
        ("a.jsonl.gz", gzip.compress(LINE.decode().encode("utf-16"), mtime=0), "a.jsonl.gz holds UTF-16 text"),
        ("a.jsonl.gz", LINE, "a.jsonl.gz is not gzip data"),
        ("a.jsonl.gz", b"", "a.jsonl.gz is empty, which no gzip file is: fetch it again"),
        ("a.jsonl.zst", gzip.compress(LINE, mtime=0), "a.jsonl.zst is not zstandard data"),
        ("a.jsonl.zst", b"", "a.jsonl.zst is cut off: fetch it again"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 (byte 3)"),
        ("a.txt", "caf\xe9".encode("utf-16"), "a.txt holds UTF-16 text"),
        ("a.txt", gzip.compress(LINE, mtime=0), "a.txt holds gzip data"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is damaged or cut off behind row 0"),
        (
            "a.csv",
            b"text\n",
            "a.csv has an unknown suffix: use one of .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, .md",
        ),
        ("a.zst", b"", "a.zst has an unknown suffix"),
        ("a.jsonl.zst", b"plain text", "a.jsonl.zst is not zstandard data"),
        ("a.parquet", b"plain text", "a.parquet is not a parquet file"),
        ("a.jsonl", b"", "the input has 0 documents, and one must be held out for validation: name more text"),
        ("a.jsonl", LINE + b'{"text": ""}\n', "the train split has no text"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    for module, suffix in (("zstandard", ".jsonl.zst"), ("pyarrow", ".parquet")):
        if name.endswith(suffix):
            pytest.importorskip(module)
    path = tmp_path / name
    path.write_bytes(content)
    arguments = ["--name", "toy", "--input", path, "--val-docs", "1", "--out", tmp_path]
    assert message in message_of(*arguments)
    assert not (tmp_path / "datasets").exists()


def test_validation_files_that_are_all_of_the_input_are_named(tmp_path: Path) -> None:
    a, b = (write_jsonl(tmp_path / name, DOCUMENTS) for name in ("a.jsonl", "b.jsonl"))
    arguments = ["--name", "toy", "--tokenizer", "byte260", "--out", tmp_path]
    (tmp_path / "link.jsonl").symlink_to(a)
    message = message_of("--input", a, tmp_path / "link.jsonl", "--val", a, *arguments)
    assert "--val names all files of --input, so that no document is left" in message
    assert "leave --val out" in message
    # A copy is told by its documents.
    message = message_of("--input", a, "--val", b, *arguments)
    assert "the validation split holds all 30 documents of the train split" in message


def test_a_parquet_file_without_text_column_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    message = message_of("--name", "toy", "--input", tmp_path / "a.parquet", "--val-docs", "1", "--out", tmp_path)
    assert "a.parquet has no column `text` among ['content']" in message


@pytest.mark.parametrize(("package", "suffix"), [("zstandard", ".jsonl.zst"), ("pyarrow", ".parquet")])
def test_a_missing_package_is_named_with_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    message = message_of("--name", "toy", "--input", path, "--val-docs", "1", "--out", tmp_path)
    assert message == f"{path} needs the {package} package: pip install {package}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.jsonl", "--val-docs", "1", "--name", "toy"], "absent.jsonl does not exist"),
        (["--tokenizer", "absent.model", "--name", "toy"], "--tokenizer=absent.model does not exist"),
        (["--input", "a.jsonl", "--val-docs", "-1", "--name", "toy"], "--val-docs=-1 must be at least 1"),
        (["--workers", "0"], "--workers=0 must be at least 1"),
        (["--max-docs", "0"], "--max-docs=0 must be at least 1"),
        (["--val", "a.jsonl"], "--val, --val-docs and --max-docs need --input PATH"),
        (["--hub", "a/b", "--name", "toy", "--val", "a.jsonl"], "--val needs --input PATH: with --hub"),
        (["--hub-config", "sample"], "--hub-config and --hub-revision need --hub REPO"),
        (["--tokenizer", "byte260"], "--tokenizer needs --name NAME or --input PATH"),
        (["--published", "--caseops"], "--published trains its own tokenizer"),
        (["--tokenizer", "byte260", "--name", "toy", "--caseops"], "has no pieces for the operators of --caseops"),
        (["--name", "../up"], "--name='../up' must be a folder name"),
        (["--shard-tokens", "0"], "--shard-tokens=0 must be in 1..2147483647"),
        (["--vocab-size", "200"], "--vocab-size=200 must be in 261..65536"),
        (["--vocab-size", "65537"], "--vocab-size=65537 must be in 261..65536"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in message_of(*arguments, "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_does_not_fit_the_text_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    arguments = ["--name", "toy", "--input", source, "--val-docs", "1", "--vocab-size", "5000", "--out", tmp_path]
    assert "--vocab-size=5000 does not fit the training text: Vocabulary size too high" in message_of(*arguments)


@pytest.mark.parametrize("content", [b"", b"plain text", bytes(100)])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    source, bad = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / "bad.model"
    bad.write_bytes(content)
    arguments = ["--name", "toy", "--input", source, "--val-docs", "1", "--tokenizer", bad, "--out", tmp_path]
    assert "bad.model is not a SentencePiece model" in message_of(*arguments)


def test_another_tokenizer_of_the_same_name_is_not_replaced(tmp_path: Path) -> None:
    """Other data sets were built with it."""
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    old = tmp_path / "tokenizers" / "toy.model"
    old.parent.mkdir()
    old.write_bytes(train_tokenizer(DOCUMENTS, 290))
    new = tmp_path / "toy.model"
    new.write_bytes(train_tokenizer(DOCUMENTS, 300))
    arguments = ["--name", "toy", "--input", source, "--val-docs", "1", "--tokenizer", new, "--out", tmp_path]
    assert f"{old} exists and differs from {new}" in message_of(*arguments)
