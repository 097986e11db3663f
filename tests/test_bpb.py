"""The score: its three sums are exact, and nothing but the model, the text and the context moves them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
VOCAB_SIZE = 320
BATCH = 256  # VAL_BATCH_SIZE where a test does not vary it
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
    return dataclasses.replace(config, vocab_size=VOCAB_SIZE, num_layers=2)


@pytest.fixture(scope="module")
def model(scored_config, random_model) -> tg.GPT:
    return random_model(scored_config)


@pytest.fixture(scope="module")
def record_model(record_config, random_model) -> tg.GPT:
    """With all techniques, in 3 layers run as 0 0 1 2: whatever looks back could be disturbed by windows and rows."""
    changes = {"num_layers": 3, "num_loops": 1, "loop_start": 0, "loop_end": 0}
    return random_model(dataclasses.replace(record_config, vocab_size=VOCAB_SIZE, **changes))


@pytest.fixture(scope="module")
def short_documents() -> tg.ValSplit:
    """500 tokens that begin in the middle of a document and end with a BOS; every fifth document is empty."""
    rng = np.random.default_rng(0)
    tokens = list(rng.integers(2, VOCAB_SIZE, 7))
    for i, length in enumerate(rng.integers(1, 40, 40)):
        tokens.append(BOS)
        if i % 5:
            tokens += list(rng.integers(2, VOCAB_SIZE, length))
    ids = np.array([*tokens[:499], BOS], np.uint16)
    return tg.ValSplit(ids, (ids % 5).astype(np.uint16), {"partial": False})


def score_of(logits_fn: tg.LogitsFn, split: tg.ValSplit, config: tg.GPTConfig, batch: int = BATCH) -> tg.Score:
    return tg.evaluate(logits_fn, split, config, batch, tg.World())


# -- bytes ---------------------------------------------------------------------------------------------------------


def counted(sp: spm.SentencePieceProcessor, texts: list[str]) -> tuple[int, int]:
    """-> bytes of the pieces of all texts, each after a BOS; bytes of what the tokenizer decodes them to"""
    ids = []
    n_bytes = 0
    for text in texts:
        encoded = sp.encode(text)
        ids += [sp.bos_id(), *encoded]
        n_bytes += len(sp.decode(encoded).encode())
    return int(tg.piece_bytes(sp, np.array(ids, np.uint16)).sum()), n_bytes


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_piece_bytes_add_up_to_the_normalised_text(folding_tokenizer, text):
    """The denominator of val_bpb is a number of bytes of text, for every script."""
    found, expected = counted(folding_tokenizer, [text])
    assert found == expected


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(exclude_characters="\u2581", codec="utf-8")), max_size=3))
def test_piece_bytes_add_up_to_any_normalised_text(folding_tokenizer, texts):
    """Except the mark U+2581 itself, which SentencePiece cannot tell from a space."""
    found, expected = counted(folding_tokenizer, ["a", *texts])
    assert found == expected


def test_piece_bytes_of_the_published_tokenizer():
    if not PUBLISHED.exists():
        pytest.skip(f"{PUBLISHED} is not on this machine")
    sp = spm.SentencePieceProcessor(model_file=str(PUBLISHED))
    for text in TEXTS:
        found, expected = counted(sp, ["a", text])
        assert found == expected, text
    assert counted(sp, ["The first sentence.", "Another one."]) == (31, 31)


def test_piece_bytes_equal_the_sidecar_of_a_lossless_tokenizer(data, lossless_tokenizer):
    """The two accountings differ only where a text starts with a space, which pieces cannot tell from a dummy."""
    sp = spm.SentencePieceProcessor(model_proto=lossless_tokenizer)
    n_leading_spaces = sum(text.startswith(" ") for text in data.val_documents)
    assert n_leading_spaces > 0
    assert int(data.val_bytes.sum()) - int(tg.piece_bytes(sp, data.val).sum()) == n_leading_spaces


def test_tokenizer_with_a_space_inside_a_piece_is_refused(train_tokenizer, documents):
    """Its pieces span words, so that the rule of one space at the start does not hold."""
    sp = spm.SentencePieceProcessor(model_proto=train_tokenizer(documents, user_defined_symbols=["the\u2581cat"]))
    assert any("\u2581" in sp.id_to_piece(i)[1:] for i in range(len(sp)))
    with pytest.raises(ValueError, match=r"TOKENIZER_PATH.* piece \d+"):
        tg.piece_bytes(sp, np.array([1, 5], np.uint16))


# -- windows and rows ----------------------------------------------------------------------------------------------


@st.composite
def token_arrays(draw) -> np.ndarray:
    """Tokens of a split: documents of any length, empty ones too. It may begin in the middle of a document."""
    lengths = draw(st.lists(st.integers(0, 60), max_size=12))
    n_before = draw(st.integers(0 if lengths else 1, 5))
    tokens = [9] * n_before
    for length in lengths:
        tokens += [BOS, *range(2, 2 + length)]
    return np.array(tokens, np.uint16)


@st.composite
def evaluations(draw, **fixed: Any) -> dict[str, Any]:
    """Settings of the evaluation, as fields of the config."""
    seq_len = draw(st.integers(1, 50))
    return {
        "eval_seq_len": seq_len,
        "eval_stride": draw(st.integers(0, seq_len)),
        "eval_method": draw(st.sampled_from(["document", "flat"])),
        "document_masks": draw(st.booleans()),
        **fixed,
    }


@settings(max_examples=200)
@given(token_arrays(), evaluations())
def test_windows_score_every_target_exactly_once(config, ids, changes):
    """For any documents, context and stride, BOS and tail included.

    No window reads more than its context, and all but the first of a text have what the stride leaves of it.
    """
    config = dataclasses.replace(config, **changes)
    windows = list(tg.scoring_windows(ids, config))
    targets = [t for window in windows for t in range(window.first, window.stop)]
    assert targets == list(range(1, len(ids)))

    context = config.eval_seq_len - (config.eval_stride or config.eval_seq_len)
    for window in windows:
        assert 0 <= window.start < window.first < window.stop <= len(ids)
        assert window.n_inputs == len(ids[window.start : window.stop - 1]) <= config.eval_seq_len
        begins_text = window.start == 0 or (config.eval_method == "document" and ids[window.start] == BOS)
        assert begins_text or window.first - window.start > context


@given(token_arrays(), evaluations(eval_method="document"))
def test_window_of_a_document_reads_nothing_before_it(config, ids, changes):
    """Its targets are the document's tokens and the BOS of the next one, which ends it."""
    for start, first, stop in tg.scoring_windows(ids, dataclasses.replace(config, **changes)):
        document_start = max(t for t in range(first) if t == 0 or ids[t] == BOS)
        assert start >= document_start
        assert not (ids[start + 1 : stop - 1] == BOS).any()


@settings(max_examples=200)
@given(token_arrays(), evaluations())
def test_rows_hold_all_windows_in_order_and_only_documents_kept_apart_share_one(config, ids, changes):
    """A window that continues a document begins its row: it would take what stands before it there for its context."""
    config = dataclasses.replace(config, **changes)
    windows = list(tg.scoring_windows(ids, config))
    rows = tg.pack_rows(iter(windows), ids, config)
    assert [window for row in rows for window in row] == windows
    for row in rows:
        assert 1 <= sum(window.n_inputs for window in row) <= config.eval_seq_len
        for window in row[1:]:
            assert config.document_masks
            assert ids[window.start] == BOS


def test_short_documents_fill_rows(config):
    """What packing is for: 100 documents of 10 tokens in rows of 64, six in each."""
    ids = np.array([BOS, *range(2, 11)] * 100 + [BOS], np.uint16)
    for masks, n_rows in ((True, 17), (False, 100)):
        config = dataclasses.replace(config, eval_seq_len=64, eval_method="document", document_masks=masks)
        assert len(tg.pack_rows(tg.scoring_windows(ids, config), ids, config)) == n_rows


@settings(max_examples=200)
@given(token_arrays(), evaluations(), st.integers(1, 5))
def test_batches_hold_every_target_once_behind_its_context(config, ids, changes, n_rows):
    """Read back from the filled rows: each window's targets, and before each of them the tokens it may look at."""
    config = dataclasses.replace(config, **changes)
    rows = tg.pack_rows(tg.scoring_windows(ids, config), ids, config)
    positions = []
    for begin in range(0, len(rows), n_rows):
        batch = tg.fill_rows(rows[begin : begin + n_rows], ids, n_rows, config.eval_seq_len)
        assert all(part.shape == (n_rows, config.eval_seq_len) for part in batch)
        assert all(part.dtype == torch.int64 for part in batch)
        cells = batch.positions >= 0
        positions += batch.positions[cells].tolist()
        assert batch.targets[cells].tolist() == ids[batch.positions[cells].numpy()].tolist()

        for row, inputs, where in zip(rows[begin : begin + n_rows], batch.inputs, batch.positions, strict=False):
            column = 0
            for window in row:
                end = column + window.n_inputs
                assert inputs[column:end].tolist() == ids[window.start : window.stop - 1].tolist()
                n_context = window.first - 1 - window.start
                assert where[column:end].tolist() == [-1] * n_context + list(range(window.first, window.stop))
                column = end
            assert not inputs[column:].any()
    assert positions == list(range(1, len(ids)))


# -- the score -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seq_len", "stride"), [(16, 0), (7, 3), (1000, 0)])
@pytest.mark.parametrize("method", ["document", "flat"])
def test_uniform_model_scores_log2_vocab_bits_per_token(split, scored_config, seq_len, stride, method):
    """A model that knows nothing needs log2(V) bits per token, whatever the evaluation."""
    config = dataclasses.replace(scored_config, eval_seq_len=seq_len, eval_stride=stride, eval_method=method)
    score = score_of(lambda ids: torch.zeros(*ids.shape, VOCAB_SIZE), split, config)
    assert score.val_loss == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)
    assert score.val_bpb == pytest.approx(math.log2(VOCAB_SIZE) * 699 / int(split.bytes[1:].sum()), rel=1e-6)


def test_score_is_bits_over_bytes():
    """One nat per token at two tokens and three bytes is 2 / ln 2 bits in 3 bytes."""
    score = tg.Score(nats=2.0, tokens=2, bytes=3)
    assert score.val_loss == 1.0
    assert score.val_bpb == pytest.approx(2 / math.log(2) / 3, rel=1e-15)
    assert score.line(4) == "val_loss:1.0000 val_bpb:0.9618"
    assert score._replace(partial=True).line(2) == "val_loss:1.00 val_bpb:0.96 partial:2_targets"


def last_target(t: int, seq_len: int, stride: int) -> int:
    """The last target that the window of target `t` could have. Targets of a text count from 1.

    The first window has a full context of them, each further one a stride.
    """
    return seq_len + max(0, math.ceil((t - seq_len) / stride)) * stride


def nats_one_by_one(model: tg.GPT, ids: np.ndarray, starts: list[int], seq_len: int, stride: int) -> float:
    """In float64, one text and one target at a time: no batches, rows, windows or padding."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for start, last in zip(starts, [*starts[1:], len(ids) - 1], strict=True):
            for t in range(start + 1, last + 1):
                end = start + last_target(t - start, seq_len, stride)
                context = tokens[max(start, end - seq_len) : t]
                nats -= float(torch.log_softmax(model(context[None])[0, -1].double(), 0)[tokens[t]])
    return nats


@pytest.mark.parametrize(("seq_len", "stride"), [(16, 0), (16, 5), (33, 1), (800, 0)])
def test_flat_score_equals_a_slow_loop_over_targets(split, scored_config, model, seq_len, stride):
    part = tg.ValSplit(split.ids[:150], split.bytes[:150], split.identity)
    config = dataclasses.replace(scored_config, eval_seq_len=seq_len, eval_stride=stride)
    score = score_of(model, part, config)
    assert (score.tokens, score.bytes) == (149, int(part.bytes[1:].sum()))
    assert score.nats == pytest.approx(nats_one_by_one(model, part.ids, [0], seq_len, stride or seq_len), rel=1e-6)


@pytest.mark.parametrize(
    ("seq_len", "stride", "masks"), [(16, 16, True), (16, 5, True), (200, 200, True), (16, 5, False)]
)
def test_score_by_documents_equals_a_slow_loop_over_documents(short_documents, record_model, seq_len, stride, masks):
    """Every document counts from its beginning, as if it were the only one, and with the BOS behind it."""
    config = dataclasses.replace(record_model.config, eval_seq_len=seq_len, eval_stride=stride, document_masks=masks)
    model = tg.GPT(config).eval()
    model.load_state_dict(record_model.state_dict())
    part = tg.ValSplit(short_documents.ids[:160], short_documents.bytes[:160], {"partial": False})
    starts = [t for t in range(160) if t == 0 or part.ids[t] == BOS]
    score = score_of(model, part, config)
    assert (score.tokens, score.bytes) == (159, int(part.bytes[1:].sum()))
    assert score.nats == pytest.approx(nats_one_by_one(model, part.ids, starts, seq_len, stride), rel=2e-6)


@pytest.mark.parametrize(("seq_len", "stride"), [(32, 0), (64, 24), (300, 0)])
def test_score_does_not_depend_on_packing(short_documents, record_model, seq_len, stride):
    """Rows are a matter of speed. With the masks off in the settings of the evaluation only, nothing is packed."""
    ids = short_documents.ids
    packed = dataclasses.replace(record_model.config, eval_seq_len=seq_len, eval_stride=stride)
    alone = dataclasses.replace(packed, document_masks=False)
    n_packed, n_alone = (len(tg.pack_rows(tg.scoring_windows(ids, c), ids, c)) for c in (packed, alone))
    assert n_packed < 0.8 * n_alone

    score = score_of(record_model, short_documents, packed)
    expected = score_of(record_model, short_documents, alone)
    assert score[1:] == expected[1:]
    assert score.nats == pytest.approx(expected.nats, rel=2e-6)


def evaluate_on_ranks(
    size: int, logits_fn: tg.LogitsFn, split: tg.ValSplit, config: tg.GPTConfig, batch: int
) -> tg.Score:
    """Evaluate on every rank in turn, with the sum of those that ran so far in place of the collective."""
    so_far = torch.zeros(3, dtype=torch.float64)

    def sum_all(self: tg.World, tensors: list[torch.Tensor]) -> None:
        so_far.add_(tensors[0])
        tensors[0].copy_(so_far)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.World, "sum_all", sum_all)
        for rank in reversed(range(size)):
            score = tg.evaluate(logits_fn, split, config, batch, tg.World(rank, size))
    return score


@pytest.mark.parametrize(("size", "batch"), [(1, 1), (3, 160), (8, 2000)])
@pytest.mark.parametrize(
    ("method", "seq_len", "stride"), [("flat", 16, 7), ("flat", 200, 100), ("document", 200, 0), ("document", 16, 5)]
)
def test_score_does_not_depend_on_batch_or_ranks(short_documents, record_model, size, batch, method, seq_len, stride):
    """Bytes and tokens to the last one, nats to rounding; 8 ranks share as few as 3 rows, so some have none."""
    config = dataclasses.replace(record_model.config, eval_method=method, eval_seq_len=seq_len, eval_stride=stride)
    whole = score_of(record_model, short_documents, config)
    score = evaluate_on_ranks(size, record_model, short_documents, config, batch)
    assert score[1:] == whole[1:] == (499, int(short_documents.bytes[1:].sum()), False)
    assert score.nats == pytest.approx(whole.nats, rel=1e-6)


@settings(max_examples=60)
@given(token_arrays(), evaluations(), st.integers(1, 500), st.integers(1, 4))
def test_score_of_a_model_without_context_depends_on_nothing(scored_config, ids, changes, batch, size):
    """A bigram model must score the same for every method, context, stride, batch and number of ranks."""
    assume(len(ids) > 1)
    part = tg.ValSplit(ids, ids % 7 + 1, {"partial": False})
    table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(scored_config, **changes)
    score = evaluate_on_ranks(size, lambda ids: table[ids], part, config, batch)

    log_p = torch.log_softmax(table.double(), 1)
    tokens = ids.astype(np.int64)
    assert (score.tokens, score.bytes) == (len(ids) - 1, int(part.bytes[1:].sum()))
    assert score.nats == pytest.approx(-float(log_p[tokens[:-1], tokens[1:]].sum()), rel=1e-6)


@pytest.mark.parametrize("method", ["document", "flat"])
def test_every_forward_pass_has_one_shape(split, scored_config, method):
    """On a GPU a second shape is a second compilation, inside the time of the evaluation."""
    shapes = set()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(ids.shape))
        return torch.zeros(*ids.shape, VOCAB_SIZE)

    config = dataclasses.replace(scored_config, eval_seq_len=16, eval_stride=5, eval_method=method)
    score_of(logits, split, config, batch=100)
    assert len(shapes) == 1


@given(st.integers(1, 65_536), st.integers(1, 2**15), st.integers(0, 2**20))
def test_forward_pass_holds_a_bounded_number_of_logits(config, vocab_size, seq_len, max_tokens):
    """The number of rows must not depend on the machine, or scores would not repeat. One row is always taken."""
    config = dataclasses.replace(config, vocab_size=vocab_size, eval_seq_len=seq_len, bos_id=0)
    n_rows = tg.rows_per_pass(config, max_tokens)
    tokens = n_rows * seq_len
    assert n_rows == 1 or (tokens <= max_tokens and tokens * vocab_size <= tg.EVAL_LOGITS)
    more_tokens = tokens + seq_len
    assert more_tokens > max_tokens or more_tokens * vocab_size > tg.EVAL_LOGITS


# -- loading the split ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(data, tmp_path) -> Path:
    """A copy of the data that a test may break."""
    copy = tmp_path / "copy"
    shutil.copytree(data.folder, copy)
    return copy


@pytest.fixture
def load(data, folder) -> Callable[..., tg.ValSplit]:
    """A function that loads the validation split of `folder`."""
    sp, sha256 = tg.load_tokenizer(str(data.tokenizer), VOCAB_SIZE, BOS)
    return lambda max_tokens=0: tg.load_val_split(str(folder), sp, sha256, max_tokens)


@pytest.fixture
def write_manifest(data, folder, val_manifest) -> Callable[..., None]:
    """A function that writes the manifest of the files as they are, after a `change` to what it says."""

    def write(change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
        manifest = val_manifest(folder, data.tokenizer)
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return write


def test_split_is_loaded_with_the_bytes_of_its_sidecar(load, data):
    split = load()
    assert np.array_equal(split.ids, data.val)
    assert np.array_equal(split.bytes, data.val_bytes)
    assert split.identity["val_accounting"] == "sidecar"
    assert split.identity["val_bytes"] == sum(len(text.encode()) for text in data.val_documents)
    assert split.identity["val_documents"] == len(data.val_documents)
    assert split.identity["val_tokens"] == len(data.val)
    assert split.identity["partial"] is False


def test_split_without_sidecar_counts_pieces(load, folder, data):
    """Published shards have neither sidecar nor manifest."""
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    (folder / "manifest.json").unlink()
    split = load()
    assert split.identity["val_accounting"] == "pieces"
    assert split.identity["val_text_sha256"] == split.identity["tokenizer_lossless"] == "unknown"
    sp = spm.SentencePieceProcessor(model_file=str(data.tokenizer))
    assert np.array_equal(split.bytes, tg.piece_bytes(sp, data.val))


def test_identity_does_not_depend_on_how_the_split_is_cut_into_shards(load, folder, data, write_manifest):
    whole = load().identity
    for kind, values in (("", data.val), ("bytes_", data.val_bytes)):
        write_shard(folder / f"fineweb_val_{kind}000000.bin", values[:333])
        write_shard(folder / f"fineweb_val_{kind}000001.bin", values[333:])
    write_manifest()
    assert load().identity == whole


def test_part_of_the_split_is_marked_partial(load):
    """No record may be made of a quick look."""
    part = load(100)
    assert len(part.ids) == len(part.bytes) == 100
    assert part.identity["partial"] is True
    assert part.identity["val_tokens"] > 100
    assert load(10**9).identity["partial"] is False


def test_part_without_text_is_refused(load):
    """A BOS alone stands for no bytes, and bits per no byte are not a score."""
    with pytest.raises(ValueError, match="validation tokens"):
        load(1)


def test_sidecar_of_another_length_is_refused(load, folder, data):
    write_shard(folder / "fineweb_val_bytes_000000.bin", data.val_bytes[:-1])
    with pytest.raises(ValueError, match=rf"{len(data.val)} .*{len(data.val) - 1}"):
        load()


def test_val_token_outside_the_vocabulary_is_named_with_file_and_offset(load, folder, data):
    write_shard(folder / "fineweb_val_000000.bin", data.val[:400])
    write_shard(folder / "fineweb_val_000001.bin", [*data.val[400:410], 320, *data.val[411:]])
    with pytest.raises(ValueError, match=r"fineweb_val_000001\.bin .*\b320\b.* 10\b.*VOCAB_SIZE=320"):
        load()


def test_last_token_of_a_large_shard_is_refused_before_the_others_are_copied(load, folder):
    """640 MiB for a shard of 256 MiB."""
    path = folder / "fineweb_val_000001.bin"
    n_tokens = 2**26
    write_shard(path, [0])
    with path.open("r+b") as file:
        file.seek(8)
        file.write(n_tokens.to_bytes(4, "little"))
        file.seek(1024 + 2 * n_tokens - 2)
        file.write(b"\xff\xff")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"fineweb_val_000001\.bin .*65535 at offset {n_tokens - 1},"):
            load()
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_manifest_adds_the_identity_of_the_text(load):
    assert load().identity["val_text_sha256"] == "a" * 64
    assert load().identity["tokenizer_lossless"] is True


def test_sidecar_without_manifest_is_an_unfinished_export(load, folder):
    """The manifest is written last: whatever else is there may be a part of the text."""
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json.*not finished.*run data/build_shards\.py again"):
        load()


def older_and_lossy(manifest: dict[str, Any]) -> None:
    manifest["tokenizer"]["lossless"] = False
    del manifest["bytes_rule"]


def test_lossy_sidecar_of_the_older_rule_is_refused(load, write_manifest):
    """It counts bytes that the tokenizer loses. Where nothing is lost, both rules count the same."""
    write_manifest(older_and_lossy)
    with pytest.raises(ValueError, match=r"older data/build_shards\.py.*export the data again"):
        load()
    write_manifest(lambda manifest: manifest.pop("bytes_rule"))
    assert load().identity["tokenizer_lossless"] is True
    write_manifest(lambda manifest: manifest["tokenizer"].update(lossless=False))
    assert load().identity["tokenizer_lossless"] is False


@pytest.mark.parametrize("kind", ["", "bytes_"], ids=["tokens", "sidecar"])
@pytest.mark.parametrize(
    ("shard", "sha256"), [("000000", "b" * 64), ("000000", None), ("000001", "b" * 64)], ids=["other", "new", "missing"]
)
def test_shards_that_contradict_their_manifest_are_refused(load, write_manifest, kind, shard, sha256):
    """A split mixed from two exports scores a number that no one can repeat, and more bytes make a better score."""
    name = f"fineweb_val_{kind}{shard}.bin"

    def change(manifest: dict[str, Any]) -> None:
        files = manifest["splits"]["val"]["files"]
        if sha256 is None:
            del files[name]
        else:
            files[name] = sha256

    write_manifest(change)
    with pytest.raises(ValueError, match=rf"{name} contradicts .*manifest\.json"):
        load()


def test_missing_sidecar_of_the_manifest_is_refused(load, folder, write_manifest):
    """Without it the pieces would be counted: another number of bytes under the same identity of the text."""
    write_manifest()
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    with pytest.raises(ValueError, match=r"fineweb_val_bytes_000000\.bin contradicts"):
        load()


def test_manifest_of_another_tokenizer_is_refused(load, write_manifest):
    write_manifest(lambda manifest: manifest["tokenizer"].update(sha256="b" * 64))
    with pytest.raises(ValueError, match=r"TOKENIZER_PATH .*manifest\.json.*bbbb"):
        load()


@pytest.mark.parametrize("text", ["", "null", '{"splits": {"val": {"files": 3}}}'])
def test_junk_in_place_of_the_manifest_is_refused(load, folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        load()


@pytest.mark.parametrize(
    ("vocab_size", "bos_id", "known_sha256", "message"),
    [
        (321, 1, "", "320 pieces.*VOCAB_SIZE=321"),
        (320, 2, "", "BOS id 1.*BOS_ID=2"),
        (320, 1, "c" * 64, "sha256.*cccc"),
    ],
)
def test_tokenizer_of_other_data_is_refused(data, vocab_size, bos_id, known_sha256, message):
    """It would give a wrong number of bytes without any other sign."""
    with pytest.raises(ValueError, match=message):
        tg.load_tokenizer(str(data.tokenizer), vocab_size, bos_id, known_sha256)


def test_file_that_is_no_tokenizer_is_refused_by_name(data, tmp_path):
    path = tmp_path / "junk.model"
    with pytest.raises(FileNotFoundError, match=r"junk\.model"):
        tg.load_tokenizer(str(path), VOCAB_SIZE, BOS)
    for junk in (b"", b"junk", data.tokenizer.read_bytes()[:100]):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match=r"junk\.model' is not a SentencePiece model"):
            tg.load_tokenizer(str(path), VOCAB_SIZE, BOS)


@pytest.mark.parametrize(
    "manifest",
    [
        "[" * 100_000,
        '{"splits": {"val": {"text_sha256": "a", "files": []}}, "tokenizer": {"sha256": "b", "lossless": true}}',
        '{"splits": {"val": {"text_sha256": "x\\nx:0", "files": {}}}, "tokenizer": {"sha256": "b", "lossless": 1}}',
        '{"splits": {"val": {"text_sha256": "unknown", "files": {}}}, "tokenizer": {"sha256": "b", "lossless": "x"}}',
    ],
    ids=["nested", "a list", "two lines", "no truth value"],
)
def test_hostile_manifest_is_refused(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        tg.check_manifest(tmp_path, [], "b")


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("manifest.json", "fineweb_val_000000.bin"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        tg.check_manifest(tmp_path, [], "b")
    with pytest.raises(ValueError, match=r"fineweb_val_000000\.bin is not a regular file"):
        tg.Shard(tmp_path / "fineweb_val_000000.bin")
