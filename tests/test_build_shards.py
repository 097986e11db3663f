"""Documents to shards: no byte of the text is lost, counted twice or attributed to another split."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import build_shards
import numpy as np
import pytest
import sentencepiece as spm
import shards
from hypothesis import example, given, settings
from hypothesis import strategies as st

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PUBLISHED = SHARED / "tokenizers" / "fineweb_1024_bpe.model"
FINEWEB = SHARED / "web-real" / "fineweb_val_a.jsonl"
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{PUBLISHED} is absent")

SENTENCE = "the cat sat on a mat and then it ran off with 12 caf\u00e9s\n\n    to be: (well) seen again.\n"
WORDS = SENTENCE.split(" ")
DOCUMENTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 40)) + f" number {i}" for i in range(30)]
BUILD = ["--vocab-size", "300", "--name", "toy"]

# SentencePiece decodes a literal U+2581 as a space; UTF-8 has no surrogates
any_text = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))
awkward_text = st.text(
    st.sampled_from(" \n\t\r\0ab1\u00e9\u00bd\u2047\u2581\u2585\u3000\uff21\ufb01\ufeff\U0001f642\u0301")
)


@pytest.fixture(scope="module")
def sp() -> spm.SentencePieceProcessor:
    return build_shards.load_tokenizer(build_shards.train_tokenizer(DOCUMENTS, 300), Path("toy.model"))


@pytest.fixture(scope="module")
def published() -> spm.SentencePieceProcessor:
    return build_shards.load_tokenizer(PUBLISHED.read_bytes(), PUBLISHED)


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


def test_help_names_every_argument() -> None:
    script = Path(build_shards.__file__)
    run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    for name in ("--input", "--val", "--val-docs", "--tokenizer", "--vocab-size", "--name", "--out", "--shard-tokens"):
        assert name in run.stdout


# --- Tokenizer ---


@settings(max_examples=200, deadline=None)
@given(text=any_text)
@example(text=" \n\n   \t\0 ")
@example(text="\u2585\ufeff\U0010ffff")
def test_a_trained_tokenizer_is_lossless(sp: spm.SentencePieceProcessor, text: str) -> None:
    assert sp.decode(sp.encode(text)) == text


def test_a_tokenizer_is_lossless_even_where_the_training_text_has_no_space() -> None:
    """Spelt in bytes, a space would decode to U+2581."""
    model = build_shards.train_tokenizer(["".join(chr(97 + i * i * i % 26) for i in range(999))], 280)
    sp = build_shards.load_tokenizer(model, Path("toy.model"))
    assert sp.decode(sp.encode(" a  b ")) == " a  b "


def test_special_ids_and_byte_pieces(sp: spm.SentencePieceProcessor) -> None:
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert sum(sp.is_byte(i) for i in range(sp.get_piece_size())) == 256


@pytest.mark.parametrize("awkward", ["", "\t", "\0", "\u2581", "\u2585", "\r\n"])
def test_no_length_and_no_character_keeps_a_document_from_the_tokenizer(awkward: str) -> None:
    """One file may hold one long document: the trainer must not skip it."""
    letters = [chr(97 + i * i * i % 7 + i % 3) + " " * (i % 5 == 0) for i in range(10_000)]
    model = build_shards.train_tokenizer(["".join(letters) + 2000 * awkward], 300)
    assert build_shards.load_tokenizer(model, Path("toy.model")).get_piece_size() == 300


def test_a_large_alphabet_leaves_room_for_merges() -> None:
    rare = "".join(map(chr, range(0x4E00, 0x5E00)))
    model = build_shards.train_tokenizer([*DOCUMENTS, rare], 400)
    sp = build_shards.load_tokenizer(model, Path("toy.model"))
    assert sum(len(sp.id_to_piece(i)) > 1 and not sp.is_byte(i) for i in range(4, 400)) > 50
    assert sp.decode(sp.encode(rare)) == rare


def test_the_smallest_vocabulary_spells_text_in_bytes() -> None:
    sp = build_shards.load_tokenizer(build_shards.train_tokenizer(DOCUMENTS, 261), Path("toy.model"))
    assert sp.decode(sp.encode(DOCUMENTS[7])) == DOCUMENTS[7]
    assert len(sp.encode(DOCUMENTS[7])) == len(DOCUMENTS[7].encode())


@given(lengths=st.lists(st.integers(0, 50), max_size=60), limit=st.integers(1, 500))
def test_the_training_sample_is_evenly_spaced_and_bounded(lengths: list[int], limit: int) -> None:
    documents = [chr(256 + i) * n for i, n in enumerate(lengths)]
    sample = build_shards.sample_documents(documents, limit)
    assert len(sample) <= 1 or sum(map(len, sample)) <= limit
    strides = [2**k for k in range(8)]
    assert sample == [] or sample in [documents[::stride] for stride in strides]


# --- Sidecar ---


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(any_text, awkward_text))
def test_source_bytes_of_a_lossless_tokenizer_are_those_of_its_pieces(
    sp: spm.SentencePieceProcessor, text: str
) -> None:
    """Independent count: a token that is not part of a character stands for the bytes of its piece."""
    ids, n_bytes = build_shards.source_bytes(sp, text.encode())
    assert ids == sp.encode(text)
    assert len(n_bytes) == len(ids)
    assert sum(n_bytes) == len(text.encode())
    for i, n in zip(ids, n_bytes, strict=True):
        if not sp.is_byte(i) and "\u2581" not in text:
            assert n == len(sp.id_to_piece(i).replace("\u2581", " ").encode())


@needs_published
@settings(max_examples=200, deadline=None)
@given(text=st.one_of(any_text, awkward_text))
@example(text="  a\n\nb  ")
@example(text="\u00bd\uff21\ufb01")
def test_source_bytes_add_up_even_where_the_tokenizer_folds_text(
    published: spm.SentencePieceProcessor, text: str
) -> None:
    ids, n_bytes = build_shards.source_bytes(published, text.encode())
    assert ids == published.encode(text)
    assert len(n_bytes) == len(ids)
    assert all(n >= 0 for n in n_bytes)
    assert sum(n_bytes) == (len(text.encode()) if ids else 0)


@needs_published
def test_folded_bytes_count_for_a_token_beside_them(published: spm.SentencePieceProcessor) -> None:
    ids, n_bytes = build_shards.source_bytes(published, b"a  \n b  ")
    pieces = [published.id_to_piece(i) for i in ids]
    assert list(zip(pieces, n_bytes, strict=True)) == [("a", 1), ("\u2581b", 7)]


@needs_published
def test_a_run_of_blanks_that_overflows_uint16_names_the_document(published: spm.SentencePieceProcessor) -> None:
    with pytest.raises(ValueError, match=r"begins with 'far .*stands for 70004 bytes.*shorten its runs of blanks"):
        build_shards.encode_val(published, ["near by", "far" + " " * 70_000 + " off"])


# --- Builds ---


def recount(texts: list[str]) -> tuple[int, int, str]:
    """Documents, bytes and text identity, by the definition."""
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
    }
    assert (manifest["format"], manifest["name"], manifest["source"]) == (1, "toy", "a.jsonl")
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


def test_two_builds_are_byte_identical(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    contents = []
    for name in ("one", "two"):
        build(tmp_path / name, *BUILD, "--input", source, "--val-docs", "5")
        files = [file for file in (tmp_path / name).rglob("*") if file.is_file()]
        contents.append({file.relative_to(tmp_path / name): file.read_bytes() for file in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5


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
    assert model == build_shards.train_tokenizer(others, 300)


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
    packed, table = tmp_path / "a.jsonl.zst", tmp_path / "a.parquet"
    halves = plain.read_bytes().partition(b"\n")
    packed.write_bytes(b"".join(zstandard.compress(half) for half in halves))  # several frames, as pzstd writes
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": texts}), table)
    txt = [tmp_path / f"{i}.txt" for i in range(3)]
    for path, text in zip(txt, texts, strict=True):
        path.write_bytes(text.encode())
    for paths in ([plain], [packed], [table], txt):
        assert list(build_shards.read_documents(paths)) == texts


def test_a_literal_space_mark_is_reported_as_lossy(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a \u2581 b", *DOCUMENTS])
    manifest = build(tmp_path, *BUILD, "--input", source, "--val-docs", "1")
    assert manifest["tokenizer"]["lossless"] is False
    assert read_split(tmp_path, "fineweb_val_bytes_*.bin").sum() == len("a \u2581 b".encode())


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


@needs_published
def test_normalized_text_is_reported_as_lossy(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    manifest = build(tmp_path, "--name", "toy", "--input", source, "--val-docs", "5", "--tokenizer", PUBLISHED)
    assert manifest["tokenizer"]["lossless"] is False  # the documents hold newlines
    assert manifest["splits"]["val"]["bytes"] == sum(len(text.encode()) for text in DOCUMENTS[:5])


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
    assert build_shards.module_docstrings(source.encode()) == (
        "Module text of some length.\n\nFirst class, also long enough.\n\nMethod text,\n\nand more:\n    twice.\n\n"
        "Function at the end of the file."
    )
    assert build_shards.module_docstrings(b"print 'python 2'") == ""


def test_the_embedded_corpus_is_split_by_document_without_duplicates() -> None:
    corpus = build_shards.embedded_corpus()
    train, val = list(corpus.train()), list(corpus.val())
    assert len({*train, *val}) == len(train) + len(val)
    n_val, n_train = (sum(len(text.encode()) for text in split) for split in (val, train))
    assert n_train + n_val > 1_000_000
    assert 0.08 <= n_val / (n_train + n_val) < 0.13  # one document, of at most 70 kB, may cross the line
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in [*val, *train]]
    assert hashes == sorted(hashes)
    assert any("Exit the runtime context" in text or "context manager" in text for text in train)


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
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl line 1 holds half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not JSON"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 (byte 3)"),
        ("a.csv", b"text\n", "a.csv has an unknown suffix: use one of .jsonl, .jsonl.zst, .parquet, .txt"),
        ("a.zst", b"", "a.zst has an unknown suffix"),
        ("a.jsonl.zst", b"plain text", "a.jsonl.zst is not zstandard data"),
        ("a.parquet", b"plain text", "a.parquet is not a parquet file"),
        ("a.jsonl", b"", "the train split has no text"),
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


def test_a_parquet_file_without_text_column_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    message = message_of("--name", "toy", "--input", tmp_path / "a.parquet", "--val-docs", "1", "--out", tmp_path)
    assert "a.parquet has no column `text` among ['content']" in message


@pytest.mark.parametrize(("package", "suffix"), [("zstandard", ".jsonl.zst"), ("pyarrow", ".parquet")])
def test_a_missing_package_is_named_with_its_install_command(tmp_path: Path, package: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"x")
    code = f"import sys; sys.modules[{package!r}] = None; import build_shards; build_shards.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--name", "toy", "--input", path, "--val-docs", "1", "--out", tmp_path]
    folder = Path(build_shards.__file__).parent
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert run.returncode == 1
    assert run.stderr.strip() == f"{path} needs the {package} package: pip install {package}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.jsonl", "--val-docs", "1", "--name", "toy"], "absent.jsonl does not exist"),
        (["--tokenizer", "absent.model", "--name", "toy"], "--tokenizer=absent.model does not exist"),
        (["--input", "a.jsonl", "--name", "toy"], "--input needs --val FILE or --val-docs N"),
        (["--input", "a.jsonl", "--val-docs", "-1", "--name", "toy"], "--input needs --val FILE or --val-docs N"),
        (["--val", "a.jsonl"], "--val and --val-docs need --input FILE"),
        (["--input", "a.jsonl", "--val-docs", "1"], "need --name NAME"),
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
    old.write_bytes(build_shards.train_tokenizer(DOCUMENTS, 290))
    new = tmp_path / "toy.model"
    new.write_bytes(build_shards.train_tokenizer(DOCUMENTS, 300))
    arguments = ["--name", "toy", "--input", source, "--val-docs", "1", "--tokenizer", new, "--out", tmp_path]
    assert f"{old} exists and differs from {new}" in message_of(*arguments)
