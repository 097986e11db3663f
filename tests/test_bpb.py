"""The score: its three sums are exact, and nothing but the model, the text and the context moves them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shards import write_shard

import train_gpt as tg

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers" / "fineweb_1024_bpe.model"
BOS = 1
TEXTS = [
    "hello world",
    "na\u00efve caf\u00e9 \u00c5ngstr\u00f6m",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\u6771\u4eac\u90fd \u65e5\u672c\u8a9e",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "\ufb01ne \uff26\uff35\uff2c\uff2c \u2460 \u00bd",
    "  two  spaces \t tab\n\nlines \u00a0 end  ",
    "<s> </s> <unk> <0x41>",
    "x",
    " ",
    "",
    "\x00\x01 \u200b\ufeff",
]


@pytest.fixture(scope="module")
def folding_tokenizer(train_tokenizer, documents) -> spm.SentencePieceProcessor:
    """A tokenizer made as the published ones are: NFKC folding, a space before the text, white space collapsed."""
    return spm.SentencePieceProcessor(model_proto=train_tokenizer(documents, normalization_rule_name="nmt_nfkc"))


@pytest.fixture(scope="module")
def split(data) -> tg.ValSplit:
    """The first 700 tokens of the validation split: no power of two, no multiple of a context."""
    return tg.ValSplit(data.val[:700], data.val_bytes[:700], {"partial": False})


@pytest.fixture(scope="module")
def scored_config(config) -> tg.GPTConfig:
    return dataclasses.replace(config, vocab_size=320, num_layers=2)


@pytest.fixture(scope="module")
def model(scored_config, random_model) -> tg.GPT:
    return random_model(scored_config)


@pytest.fixture(scope="module")
def record_model(record_config, random_model) -> tg.GPT:
    """With all techniques, in 3 layers run as 0 0 1 2: what looks back is what windows and rows could disturb."""
    parts = {"num_layers": 3, "num_loops": 1, "loop_start": 0, "loop_end": 0}
    return random_model(dataclasses.replace(record_config, vocab_size=320, **parts))


@pytest.fixture(scope="module")
def short_documents() -> tg.ValSplit:
    """500 tokens that begin in the middle of a document and end with a BOS; every fifth document is empty."""
    rng = np.random.default_rng(0)
    lengths = [0 if i % 5 == 0 else int(n) for i, n in enumerate(rng.integers(1, 40, 40))]
    documents = [[BOS, *rng.integers(2, 320, n)] for n in lengths]
    tokens = [*rng.integers(2, 320, 7), *(token for document in documents for token in document)]
    ids = np.array([*tokens[:499], BOS], np.uint16)
    return tg.ValSplit(ids, (ids % 5).astype(np.uint16), {"partial": False})


def counted(sp: spm.SentencePieceProcessor, texts: list[str]) -> tuple[int, int]:
    """-> bytes of the pieces of all texts, each after a BOS; bytes of what the tokenizer decodes them to"""
    encoded = [sp.encode(text) for text in texts]
    ids = np.array([i for text in encoded for i in [sp.bos_id(), *text]], np.uint16)
    return int(tg.piece_bytes(sp, ids).sum()), sum(len(sp.decode(text).encode()) for text in encoded)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_piece_bytes_add_up_to_the_normalised_text(folding_tokenizer, text):
    """The denominator of val_bpb is a number of bytes of text, for every script."""
    found, expected = counted(folding_tokenizer, [text])
    assert found == expected


@given(st.lists(st.text(st.characters(exclude_characters="\u2581", codec="utf-8")), max_size=3))
def test_piece_bytes_add_up_to_any_normalised_text(folding_tokenizer, texts):
    """Except the mark U+2581 itself, which SentencePiece cannot tell from a space."""
    found, expected = counted(folding_tokenizer, ["a", *texts])
    assert found == expected


def test_piece_bytes_of_the_published_tokenizer():
    if not PUBLISHED.exists():
        pytest.skip(f"{PUBLISHED} is not on this machine")
    sp = spm.SentencePieceProcessor(model_file=str(PUBLISHED))
    for texts in ([text] for text in TEXTS):
        assert counted(sp, ["a", *texts])[0] == counted(sp, ["a", *texts])[1], texts
    assert counted(sp, ["The first sentence.", "Another one."]) == (31, 31)


def test_piece_bytes_equal_the_sidecar_of_a_lossless_tokenizer(data, lossless_tokenizer):
    """The two accountings differ only where a text starts with a space, which pieces cannot tell from a dummy."""
    sp = spm.SentencePieceProcessor(model_proto=lossless_tokenizer)
    leading = sum(text.startswith(" ") for text in data.val_documents)
    assert int(data.val_bytes.sum()) - int(tg.piece_bytes(sp, data.val).sum()) == leading > 0


def test_tokenizer_with_a_space_inside_a_piece_is_refused(train_tokenizer, documents):
    """Its pieces span words, so that the rule of one space at the start does not hold."""
    model = train_tokenizer(documents, user_defined_symbols=["the\u2581cat"])
    sp = spm.SentencePieceProcessor(model_proto=model)
    assert any("\u2581" in sp.id_to_piece(i)[1:] for i in range(len(sp)))
    with pytest.raises(ValueError, match=r"TOKENIZER_PATH.* piece \d+"):
        tg.piece_bytes(sp, np.array([1, 5], np.uint16))


# ------------------------------------------------ windows and rows ------------------------------------------------


@st.composite
def texts(draw) -> np.ndarray:
    """Tokens of a split: documents of any length, empty ones too; it may begin in the middle of one."""
    lengths = draw(st.lists(st.integers(0, 60), max_size=12))
    documents = [[BOS, *range(2, 2 + n)] for n in lengths]
    tokens = draw(st.lists(st.just(9), min_size=int(not lengths), max_size=5)) + [t for d in documents for t in d]
    return np.array(tokens, np.uint16)


@st.composite
def evaluations(draw, **fixed: object) -> dict[str, object]:
    """Settings of the config that the score must not depend on, but for what a model with a context sees."""
    seq_len = draw(st.integers(1, 50))
    return {
        "eval_seq_len": seq_len,
        "eval_stride": draw(st.integers(0, seq_len)),
        "eval_method": draw(st.sampled_from(["document", "flat"])),
        "document_masks": draw(st.booleans()),
        **fixed,
    }


@settings(max_examples=300)
@given(texts(), evaluations())
def test_windows_score_every_target_exactly_once(config, ids, changes):
    """Whatever the documents, context and stride, BOS and tail included; no window reads more than its context, and
    all but the first of a text have what the stride leaves of it."""
    config = dataclasses.replace(config, **changes)
    windows, seq_len = list(tg.scoring_windows(ids, config)), config.eval_seq_len
    kept = seq_len - (config.eval_stride or seq_len)
    assert [t for _, first, last in windows for t in range(first, last)] == list(range(1, len(ids)))
    for start, first, last in windows:
        assert 0 <= start < first < last <= len(ids)
        assert last - 1 - start <= seq_len  # ids[start : last - 1] are fed
        text_starts = start == 0 or (config.eval_method == "document" and ids[start] == BOS)
        assert text_starts or first - start > kept


@given(texts(), evaluations(eval_method="document"))
def test_window_of_a_document_reads_nothing_before_it(config, ids, changes):
    """Its targets are the document's tokens and the BOS of the next one, which ends it."""
    for start, first, last in tg.scoring_windows(ids, dataclasses.replace(config, **changes)):
        assert start >= max(t for t in range(first) if t == 0 or ids[t] == BOS)
        assert not (ids[start + 1 : last - 1] == BOS).any()


@settings(max_examples=300)
@given(texts(), evaluations())
def test_rows_hold_all_windows_in_order_and_only_documents_kept_apart_share_one(config, ids, changes):
    """A row is as long as the context. A window that continues a document begins its row: what is before it there
    would be taken for its beginning."""
    config = dataclasses.replace(config, **changes)
    windows = list(tg.scoring_windows(ids, config))
    rows = tg.pack_rows(iter(windows), ids, config)
    assert [window for row in rows for window in row] == windows
    for row in rows:
        assert 1 <= sum(last - 1 - start for start, _, last in row) <= config.eval_seq_len
        assert all(config.document_masks and ids[start] == BOS for start, _, _ in row[1:])


def test_short_documents_fill_rows(config):
    """What packing is for: 100 documents of 10 tokens in rows of 64, six in each."""
    ids = np.array([BOS, *range(2, 11)] * 100 + [BOS], np.uint16)
    config = dataclasses.replace(config, eval_seq_len=64, eval_method="document", document_masks=True)
    assert len(tg.pack_rows(tg.scoring_windows(ids, config), ids, config)) == 17
    config = dataclasses.replace(config, document_masks=False)
    assert len(tg.pack_rows(tg.scoring_windows(ids, config), ids, config)) == 100


# ----------------------------------------------------- the score -----------------------------------------------------


@pytest.mark.parametrize(("seq_len", "stride"), [(16, 0), (7, 3), (64, 1), (1000, 0)])
@pytest.mark.parametrize("method", ["document", "flat"])
def test_uniform_model_scores_log2_vocab_bits_per_token(split, scored_config, hp, seq_len, stride, method):
    """A model that knows nothing needs log2(V) bits per token, whatever the evaluation."""
    config = dataclasses.replace(scored_config, eval_seq_len=seq_len, eval_stride=stride, eval_method=method)
    score = tg.evaluate(lambda ids: torch.zeros(*ids.shape, 320), split, config, hp, tg.World())
    assert score.val_loss == pytest.approx(math.log(320), rel=1e-6)
    assert score.val_bpb == pytest.approx(math.log2(320) * 699 / int(split.bytes[1:].sum()), rel=1e-6)


def test_score_is_bits_over_bytes():
    """One nat per token at two tokens and three bytes is 2 / ln 2 bits in 3 bytes."""
    score = tg.Score(nats=2.0, tokens=2, bytes=3)
    assert (score.val_loss, score.val_bpb) == (1.0, pytest.approx(2 / math.log(2) / 3, rel=1e-15))


def last_target(t: int, seq_len: int, stride: int) -> int:
    """Of the window that scores target t of a text, counted from 1, were the text long: first a full context, then
    strides."""
    return seq_len + max(0, math.ceil((t - seq_len) / stride)) * stride


@pytest.mark.parametrize(("seq_len", "stride"), [(16, 0), (16, 5), (33, 1), (800, 0)])
def test_evaluate_equals_a_slow_loop_over_targets(split, scored_config, hp, model, seq_len, stride):
    """One target at a time, without batches, windows or padding: target t is scored by the window it falls into."""
    short = tg.ValSplit(split.ids[:150], split.bytes[:150], split.identity)
    step, ids = stride or seq_len, torch.from_numpy(short.ids.astype(np.int64))
    nats = n_bytes = 0.0
    with torch.no_grad():
        for t in range(1, 150):
            end = last_target(t, seq_len, step)
            context = ids[max(0, end - seq_len) : t]
            nats -= float(torch.log_softmax(model(context[None])[0, -1].double(), 0)[ids[t]])
            n_bytes += int(short.bytes[t])
    config = dataclasses.replace(scored_config, eval_seq_len=seq_len, eval_stride=stride)
    score = tg.evaluate(model, short, config, hp, tg.World())
    assert (score.tokens, score.bytes) == (149, n_bytes)
    assert score.nats == pytest.approx(nats, rel=1e-6)


def nats_document_by_document(model: tg.GPT, ids: torch.Tensor, seq_len: int, stride: int) -> float:
    """In float64, one document and one target at a time: no batches, rows, windows or padding."""
    begins = [t for t in range(len(ids)) if t == 0 or ids[t] == BOS]
    nats = 0.0
    for begin, end in zip(begins, [*begins[1:], len(ids) - 1], strict=True):
        for t in range(begin + 1, end + 1):  # the BOS of the next document included
            context = ids[max(begin, begin + last_target(t - begin, seq_len, stride) - seq_len) : t]
            nats -= float(torch.log_softmax(model(context[None])[0, -1].double(), 0)[ids[t]])
    return nats


@pytest.mark.parametrize(
    ("seq_len", "stride", "masks"), [(16, 16, True), (16, 5, True), (200, 200, True), (16, 5, False)]
)
def test_score_by_documents_equals_a_slow_loop_over_documents(
    short_documents, record_model, hp, seq_len, stride, masks
):
    """The number of the record: every document from its beginning, as if it were the only one."""
    config = dataclasses.replace(record_model.config, eval_seq_len=seq_len, eval_stride=stride, document_masks=masks)
    model = tg.GPT(config).eval()
    model.load_state_dict(record_model.state_dict())
    part = tg.ValSplit(short_documents.ids[:160], short_documents.bytes[:160], {"partial": False})
    with torch.no_grad():
        expected = nats_document_by_document(model, torch.from_numpy(part.ids.astype(np.int64)), seq_len, stride)
    score = tg.evaluate(model, part, config, hp, tg.World())
    assert (score.tokens, score.bytes) == (159, int(part.bytes[1:].sum()))
    assert score.nats == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(("seq_len", "stride"), [(32, 0), (64, 24), (300, 0)])
def test_score_does_not_depend_on_packing(short_documents, record_model, hp, seq_len, stride):
    """Rows are a matter of speed. With the masks off in the settings of the evaluation only, nothing is packed."""
    ids = short_documents.ids
    config = dataclasses.replace(record_model.config, eval_seq_len=seq_len, eval_stride=stride)
    alone = dataclasses.replace(config, document_masks=False)
    n_rows = [len(tg.pack_rows(tg.scoring_windows(ids, c), ids, c)) for c in (config, alone)]
    assert n_rows[0] < 0.8 * n_rows[1]
    scores = [tg.evaluate(record_model, short_documents, c, hp, tg.World()) for c in (config, alone)]
    assert scores[0][1:] == scores[1][1:]
    assert scores[0].nats == pytest.approx(scores[1].nats, rel=2e-6)


def evaluate_on_ranks(monkeypatch, size: int, *args) -> tg.Score:
    """Evaluate on every rank in turn, with the sum of those that ran so far in place of the collective."""
    so_far = torch.zeros(3, dtype=torch.float64)

    def sum_all(self: tg.World, tensors: list[torch.Tensor]) -> None:
        so_far.add_(tensors[0])
        tensors[0].copy_(so_far)

    monkeypatch.setattr(tg.World, "sum_all", sum_all)
    return [tg.evaluate(*args, tg.World(rank, size)) for rank in reversed(range(size))][-1]


@pytest.mark.parametrize(("size", "batch"), [(1, 1), (1, 160), (2, 100), (3, 160), (8, 1), (8, 2000)])
@pytest.mark.parametrize(
    ("method", "seq_len", "stride"), [("flat", 16, 7), ("flat", 200, 100), ("document", 200, 0), ("document", 16, 5)]
)
def test_score_does_not_depend_on_batch_or_ranks(
    monkeypatch, short_documents, record_model, hp, size, batch, method, seq_len, stride
):
    """Bytes and tokens to the last one, nats to rounding; 8 ranks share as few as 3 rows, so some have none."""
    config = dataclasses.replace(record_model.config, eval_method=method, eval_seq_len=seq_len, eval_stride=stride)
    whole = tg.evaluate(record_model, short_documents, config, hp, tg.World())
    hp = dataclasses.replace(hp, val_batch_size=batch)
    score = evaluate_on_ranks(monkeypatch, size, record_model, short_documents, config, hp)
    assert score[1:] == whole[1:] == (499, int(short_documents.bytes[1:].sum()), False)
    assert score.nats == pytest.approx(whole.nats, rel=1e-6)


@settings(max_examples=100)
@given(texts(), evaluations(), st.integers(1, 500), st.integers(1, 4))
def test_score_of_a_model_without_context_depends_on_nothing(scored_config, hp, ids, changes, batch, size):
    """A bigram model must score the same for every method, context, stride, batch and number of ranks."""
    assume(len(ids) > 1)
    part = tg.ValSplit(ids, ids % 7 + 1, {"partial": False})
    table = torch.randn(320, 320, generator=torch.Generator().manual_seed(0))
    log_p, at = torch.log_softmax(table.double(), 1), ids.astype(np.int64)
    config, hp = dataclasses.replace(scored_config, **changes), dataclasses.replace(hp, val_batch_size=batch)
    with pytest.MonkeyPatch.context() as patch:
        score = evaluate_on_ranks(patch, size, lambda ids: table[ids], part, config, hp)
    assert (score.tokens, score.bytes) == (len(ids) - 1, int(part.bytes[1:].sum()))
    assert score.nats == pytest.approx(-float(log_p[at[:-1], at[1:]].sum()), rel=1e-6)


@pytest.mark.parametrize("method", ["document", "flat"])
def test_every_forward_pass_has_one_shape(split, scored_config, hp, method):
    """On a GPU a second shape is a second compilation, inside the time of the evaluation."""
    shapes = set()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(ids.shape))
        return torch.zeros(*ids.shape, 320)

    config = dataclasses.replace(scored_config, eval_seq_len=16, eval_stride=5, eval_method=method)
    tg.evaluate(logits, split, config, dataclasses.replace(hp, val_batch_size=100), tg.World())
    assert len(shapes) == 1


# ------------------------------------------------ loading the split ------------------------------------------------


@pytest.fixture
def loaded(data, hp, scored_config, tmp_path):
    """A copy of the data that a test may break, and a function that loads its validation split."""
    folder = tmp_path / "copy"
    shutil.copytree(data.folder, folder)

    def load(**changes: object) -> tg.ValSplit:
        changed = dataclasses.replace(hp, data_path=str(folder), **changes)
        return tg.load_val_split(changed, scored_config, *tg.load_tokenizer(str(data.tokenizer), scored_config))

    return folder, load


def write_manifest(folder: Path, data, **changes: object) -> None:
    files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("fineweb_val_*.bin")}
    tokenizer = {"sha256": hashlib.sha256(data.tokenizer.read_bytes()).hexdigest(), "lossless": True}
    val = {"files": files, "text_sha256": "a" * 64, "bytes": int(data.val_bytes.sum()), "tokens": len(data.val)}
    manifest = {"splits": {"val": {**val, **changes}}, "tokenizer": tokenizer}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_split_is_loaded_with_the_bytes_of_its_sidecar(loaded, data):
    split = loaded[1]()
    assert np.array_equal(split.ids, data.val)
    assert np.array_equal(split.bytes, data.val_bytes)
    assert split.identity["val_accounting"] == "sidecar"
    assert split.identity["val_bytes"] == sum(len(text.encode()) for text in data.val_documents)
    assert split.identity["val_documents"] == len(data.val_documents)
    assert split.identity["val_tokens"] == len(data.val)
    assert split.identity["partial"] is False


def test_split_without_sidecar_counts_pieces(loaded, data):
    folder, load = loaded
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    split = load()
    assert split.identity["val_accounting"] == "pieces"
    sp = spm.SentencePieceProcessor(model_file=str(data.tokenizer))
    assert np.array_equal(split.bytes, tg.piece_bytes(sp, data.val))


def test_identity_does_not_depend_on_how_the_split_is_cut_into_shards(loaded, data):
    folder, load = loaded
    whole = load().identity
    for kind, values in (("", data.val), ("bytes_", data.val_bytes)):
        write_shard(folder / f"fineweb_val_{kind}000000.bin", values[:333])
        write_shard(folder / f"fineweb_val_{kind}000001.bin", values[333:])
    assert load().identity == whole


def test_part_of_the_split_is_marked_partial(loaded):
    """No record may be made of a quick look."""
    _, load = loaded
    part = load(val_max_tokens=100)
    assert (len(part.ids), len(part.bytes), part.identity["partial"]) == (100, 100, True)
    assert part.identity["val_tokens"] > 100
    assert load(val_max_tokens=10**9).identity["partial"] is False


def test_part_without_text_is_refused(loaded):
    """A BOS alone stands for no bytes, and bits per no byte are not a score."""
    with pytest.raises(ValueError, match="validation tokens"):
        loaded[1](val_max_tokens=1)


def test_sidecar_of_another_length_is_refused(loaded, data):
    folder, load = loaded
    write_shard(folder / "fineweb_val_bytes_000000.bin", data.val_bytes[:-1])
    with pytest.raises(ValueError, match=rf"{len(data.val)} .*{len(data.val) - 1}"):
        load()


def test_val_token_outside_the_vocabulary_is_named_with_file_and_offset(loaded, data):
    folder, load = loaded
    write_shard(folder / "fineweb_val_000000.bin", data.val[:400])
    write_shard(folder / "fineweb_val_000001.bin", [*data.val[400:410], 320, *data.val[411:]])
    with pytest.raises(ValueError, match=r"fineweb_val_000001\.bin .*\b320\b.* 10\b.*VOCAB_SIZE=320"):
        load()


def test_manifest_adds_the_identity_of_the_text(loaded, data):
    folder, load = loaded
    assert load().identity["val_text_sha256"] == "unknown"
    write_manifest(folder, data)
    assert load().identity["val_text_sha256"] == "a" * 64
    assert load().identity["tokenizer_lossless"] is True


def test_files_that_contradict_their_manifest_are_refused(loaded, data):
    """A split mixed from two exports scores a number that no one can repeat."""
    folder, load = loaded
    write_manifest(folder, data)
    changed = data.val.copy()
    changed[5] += 1
    write_shard(folder / "fineweb_val_000000.bin", changed)
    with pytest.raises(ValueError, match=r"fineweb_val_000000\.bin contradicts .*manifest\.json"):
        load()


def test_sidecar_that_contradicts_the_manifest_is_refused(loaded, data):
    """More bytes make a better score: the sidecar is checked like the tokens."""
    folder, load = loaded
    write_manifest(folder, data)
    write_shard(folder / "fineweb_val_bytes_000000.bin", data.val_bytes + 1)
    with pytest.raises(ValueError, match=r"fineweb_val_bytes_000000\.bin contradicts .*manifest\.json"):
        load()


@pytest.mark.parametrize("kind", ["", "bytes_"])
def test_shard_that_the_manifest_does_not_know_is_refused(loaded, data, kind):
    folder, load = loaded
    write_manifest(folder, data)
    for other in ("", "bytes_"):
        write_shard(folder / f"fineweb_val_{other}000001.bin", [1, 2])
    manifest = json.loads((folder / "manifest.json").read_text())
    known = folder / f"fineweb_val_{'' if kind else 'bytes_'}000001.bin"
    manifest["splits"]["val"]["files"][known.name] = hashlib.sha256(known.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"fineweb_val_{kind}000001\.bin contradicts"):
        load()


def test_missing_shard_of_the_manifest_is_refused(loaded, data):
    """Half of the split would be another, easier or harder, split."""
    folder, load = loaded
    for kind, values in (("", data.val), ("bytes_", data.val_bytes)):
        write_shard(folder / f"fineweb_val_{kind}000001.bin", values)
    write_manifest(folder, data)
    for kind in ("", "bytes_"):
        (folder / f"fineweb_val_{kind}000001.bin").unlink()
    with pytest.raises(ValueError, match=r"fineweb_val_(bytes_)?000001\.bin contradicts"):
        load()


def test_missing_sidecar_of_the_manifest_is_refused(loaded, data):
    """Without it the pieces would be counted: another number of bytes under the same identity of the text."""
    folder, load = loaded
    write_manifest(folder, data)
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    with pytest.raises(ValueError, match=r"fineweb_val_bytes_000000\.bin contradicts"):
        load()


def test_manifest_of_another_tokenizer_is_refused(loaded, data):
    folder, load = loaded
    write_manifest(folder, data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "b" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"TOKENIZER_PATH .*manifest\.json.*bbbb"):
        load()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"splits": {"val": 3}}', '{"splits": {"val": {"files": 3}}}']
)
def test_junk_in_place_of_the_manifest_is_refused(loaded, text):
    folder, load = loaded
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        load()


def test_wrong_tokenizers_are_refused_by_name(data, scored_config, tmp_path):
    """A tokenizer that does not belong to the data gives a wrong number of bytes without any other sign."""
    path = str(data.tokenizer)
    for changes, message in (
        ({"vocab_size": 321}, "320 pieces.*VOCAB_SIZE=321"),
        ({"bos_id": 2}, "BOS id 1.*BOS_ID=2"),
        ({"tokenizer_sha256": "c" * 64}, "sha256.*cccc"),
    ):
        with pytest.raises(ValueError, match=message):
            tg.load_tokenizer(path, dataclasses.replace(scored_config, **changes))
    for junk in (b"", b"junk", data.tokenizer.read_bytes()[:100]):
        (tmp_path / "junk.model").write_bytes(junk)
        with pytest.raises(ValueError, match=r"junk\.model' is not a SentencePiece model"):
            tg.load_tokenizer(str(tmp_path / "junk.model"), scored_config)
    with pytest.raises(FileNotFoundError, match=r"none\.model"):
        tg.load_tokenizer(str(tmp_path / "none.model"), scored_config)
