"""tools/leaderboard.py and tools/page.py: what ranks with what, hostile text, and the page in a browser."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import leaderboard as lb
import page
import pytest
import record
from chromium import requests
from hypothesis import given
from hypothesis import strategies as st
from significance import welch

MAIN, ONE_GPU, OPEN, SPEED = "track_10min_16mb", "track_1gpu_10min_16mb", "track_non_record_16mb", "track_speedrun"
HOSTILE = (
    "</script><script>alert(1)</script><!-- | [x](javascript:alert(1)) <img src=x onerror=alert(1)> {{nav}} `*_@you"
)


def result(run: str, val_bpb: float, seconds: float = 599.0) -> record.SeedResult:
    """The result of a run that has a name of its own: no two runs end with the same weights."""
    unique = int(record.sha256(run.encode())[:8], 16) / 2**32
    return record.SeedResult(
        val_loss=val_bpb * math.log(2) * 2.5,
        val_bpb=val_bpb,
        pre_quant_val_loss=(val_bpb - 0.001) * math.log(2) * 2.5 + 1e-9 * unique,
        pre_quant_val_bpb=val_bpb - 0.001,
        steps=4000,
        train_seconds=seconds,
        eval_seconds=200.0,
        bytes_artifact=15_800_000,
        bytes_total=15_900_000,
        artifact_sha256=record.sha256(run.encode()),
        scored_tokens=40,
        scored_bytes=100,
        ledger_seconds={"train": seconds, "evaluate": 200.0},
    )


def log_text(val_bpb: float, seconds: float = 600.0) -> str:
    """Validation loss at steps 0, 1000 ... 4000 and training loss at every 200th."""
    lines = []
    for step in range(0, 4001, 200):
        loss = (val_bpb + 2.5 * math.exp(-step / 500)) * math.log(2) * 2.5
        time = f"train_time:{seconds * step / 4.0:.0f}ms step_avg:1.00ms"
        if step:
            lines.append(f"step:{step}/4000 train_loss:{loss + 0.02 * math.sin(step):.4f} {time}")
        if step % 1000 == 0:
            lines.append(f"step:{step}/4000 val_loss:{loss:.4f} val_bpb:{loss / math.log(2) / 2.5:.4f} {time}")
    return "\n".join(lines) + "\n"


class Records:
    """A folder of records to which a test adds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracks = record.load_tracks()[1]

    def add(
        self, name: str, day: str, bpbs: list[float], track: str = MAIN, seconds: tuple[float, ...] = (), **other: Any
    ) -> Path:
        times = seconds or (599.0,) * len(bpbs)
        seeds = {}
        for i, (val_bpb, train_seconds) in enumerate(zip(bpbs, times, strict=True), 1):
            seeds[str(i)] = result(f"{track} {name} {i}", val_bpb, train_seconds)
        about: dict[str, Any] = {
            "schema_version": 1,
            "name": name,
            "author": "Ada",
            "github_id": "ada",
            "date": day,
            "track": track,
            "rules_version": 1,
            "predictor_class": "A",
            "base": "",
            "blurb": f"What {name} does differently.",
            "licence": "MIT",
            "hardware": "8x cuda:NVIDIA_H100_80GB_HBM3",
            "python": "3.12",
            "torch": "2.9",
            "code_sha256": "c" * 64,
            "bytes_code": 100_000,
            "bytes_artifact": 15_800_000,
            "bytes_total": 15_900_000,
            "model_params": 35_000_000,
            "val_loss": statistics.fmean(r.val_loss for r in seeds.values()),
            "val_loss_std": statistics.stdev(r.val_loss for r in seeds.values()) if len(seeds) > 1 else None,
            "val_bpb": statistics.fmean(bpbs),
            "val_bpb_std": statistics.stdev(bpbs) if len(bpbs) > 1 else None,
            "pre_quant_val_bpb": statistics.fmean(r.pre_quant_val_bpb for r in seeds.values()),
            "train_seconds": statistics.fmean(times),
            "judge_version": 2,
            "val_accounting": "pieces",
            "val_text_sha256": "unknown",
            "val_shards_sha256": "e" * 64,
            "val_tokens": 40_541_164,
            "val_documents": 50_000,
            "val_bytes": 151_080_363,
            "tokenizer_sha256": "f" * 64,
            "tokenizer_lossless": False,
            "train_dataset": "fineweb10B_sp8192",
            "train_tokens": 8_000_000_000,
            "settings": {},
            "seed_results": seeds,
        }
        slug = re.sub(r"[^A-Za-z0-9]+", "-", name)[:30].strip("-")
        folder = self.folder / track / f"{day}_{slug}"
        folder.mkdir(parents=True)
        record.save_submission(folder, record.Submission(**(about | other)))
        for seed, seed_result in seeds.items():
            record.log_path(folder, seed).write_text(log_text(seed_result.val_bpb, seed_result.train_seconds))
        return folder

    def board(self) -> lb.Board:
        return lb.read_board(self.folder, self.tracks)

    def rows(self) -> dict[str, lb.Row]:
        """All rows by the name of the record."""
        return {row.entry.submission.name: row for table in self.board().tables for row in table.rows}


def review(kind: Any, day: str = "2026-02-01", code: str = "c" * 64, **other: Any) -> record.Review:
    return record.Review(date=day, reviewer="Grace", kind=kind, code_sha256=code, **({"seed": "1"} | other))


def add_review(folder: Path, added: record.Review) -> None:
    """A review of what the run of its seed wrote."""
    result = record.load_submission(folder).seed_results.get(added.seed)
    if result is not None and added.kind == "rescored":
        added = dataclasses.replace(added, artifact_sha256=result.artifact_sha256)
    record.add_review(folder, added)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """Nothing in it has the evidence that tools/verify.py wants to see: what that says is up to the test."""
    monkeypatch.setattr(lb, "failed_checks", lambda folder: ())
    return Records(tmp_path / "records")


def test_the_score_of_a_sample_is_shown_with_its_interval(records: Records):
    folder = records.add("Sampled", "2026-01-01", [1.2], judge_version=record.newest_judge_version())
    add_review(folder, review("rescored", val_bpb=1.2, val_bpb_interval=0.00491))
    assert "| rescored ± 0.0049 |" in lb.full_markdown(records.board(), records.folder)
    assert '<span class="badge rescored"' in page.page(records.board(), records.folder)
    add_review(folder, review("rescored", val_bpb=1.2))
    assert "| rescored |" in lb.full_markdown(records.board(), records.folder)


def test_a_state_tells_for_how_many_seeds_it_holds(records: Records):
    """One artifact that was scored again says nothing of two other seeds, and older rules are named."""
    folder = records.add("Seeds", "2026-01-01", [1.2, 1.2, 1.2], judge_version=record.newest_judge_version())
    add_review(folder, review("rescored", val_bpb=1.2))
    assert "| rescored (1 of 3 seeds) |" in lb.full_markdown(records.board(), records.folder)
    for seed in ("2", "3"):
        add_review(folder, review("rescored", val_bpb=1.2, seed=seed))
    assert "| rescored |" in lb.full_markdown(records.board(), records.folder)
    records.add("Older", "2026-01-01", [1.2], judge_version=2)
    assert "| consistent, older rules |" in lb.full_markdown(records.board(), records.folder)


def test_lossy_tokenizers_have_a_table_of_their_own(records: Records):
    for name, lossless in (("Whole", True), ("Digits", False), ("Nobody knows", None)):
        records.add(name, "2026-01-01", [1.2, 1.2], val_accounting="sidecar", tokenizer_lossless=lossless)
    tables = [{row.entry.submission.name for row in table.rows} for table in records.board().tables]
    assert sorted(tables, key=len) == [{"Whole"}, {"Digits", "Nobody knows"}]
    text = lb.full_markdown(records.board(), records.folder)
    assert text.count("lossless tokenizers") == text.count("lossy tokenizers") == 1


def test_a_demonstration_ranks_nowhere(records: Records, monkeypatch: pytest.MonkeyPatch):
    """A text that lies in every Python can be read by every script that is judged."""
    known = record.Text("the documentation of Python", 43, 174_282, 0.0, "d" * 64, demonstration=True)
    monkeypatch.setattr(record, "load_texts", lambda: [known])
    text = {"val_text_sha256": "d" * 64, "val_documents": 43, "val_bytes": 174_282, "val_accounting": "sidecar"}
    records.add("Smoke", "2026-01-01", [0.1, 0.1], tokenizer_lossless=True, **text)
    row = records.rows()["Smoke"]
    assert (row.rank, row.verdict) == (None, "not ranked: a demonstration")
    assert lb.DEMONSTRATION in lb.full_markdown(records.board(), records.folder)
    assert lb.short_markdown(records.board(), records.folder) == "No record yet."


def test_records_of_the_maintainers_are_reference_runs(records: Records):
    """They set the bar, but are never called new records."""
    records.add("Start", "2026-01-01", [1.2000, 1.2004, 1.1996], author=lb.MAINTAINERS)
    records.add("Slight", "2026-01-02", [1.1990, 1.1994, 1.1986])
    records.add("Leap", "2026-01-02", [1.1000, 1.1004, 1.0996])
    records.add("Ours", "2026-01-03", [1.0000, 1.0004, 0.9996], author=lb.MAINTAINERS)
    assert {name: row.verdict for name, row in records.rows().items()} == {
        "Start": "reference run",
        "Slight": "no: better by 0.002 bpb or less",
        "Leap": "yes",
        "Ours": "reference run",
    }
    assert "[Ours (reference run)](" in lb.short_markdown(records.board(), records.folder)
    assert "Ours (reference run)" in page.page(records.board(), records.folder)


def test_page_tells_what_a_record_builds_on(records: Records):
    old = records.add("Old", "2026-01-01", [1.2, 1.2])
    records.add("New", "2026-01-02", [1.1, 1.1], base=f"{MAIN}/{old.name}")
    records.add("Hostile", "2026-01-02", [1.1, 1.1], base=f'{MAIN}/"><script>')
    text = page.page(records.board(), records.folder)
    assert text.count("builds on") == 1
    assert f'<small>builds on <a href="{MAIN}/{old.name}/">{old.name}</a></small>' in text


def test_benchmarks_have_columns_where_the_track_asks_for_them(records: Records):
    track = "track_tiny_100m"
    values = dict(zip(records.tracks[track].benchmarks, (0.81234, 0.7, 0.4), strict=True))
    folder = records.add("Tiny", "2026-01-01", [1.2, 1.2], track, benchmarks=values)
    samples = {"samples": [{"text": "The cat | sat <b>there</b>"}, {"text": "It was"}]}
    of_run = {"protocol": "board", "partial": False, "artifact_sha256": "", "tasks": {"samples": samples}}
    record.benchmarks_path(folder).write_text(json.dumps(of_run))
    records.add("Other", "2026-01-01", [1.2, 1.2])
    text = lb.full_markdown(records.board(), records.folder)
    assert "| wikitext2 bits per byte | blimp accuracy | arc easy accuracy | samples |" in text
    assert "| 0.8123 | 0.7000 | 0.4000 | The cat \\| sat" in text
    assert "<b>" not in text
    assert text.count("blimp accuracy") == 1


# ----------------------------------------------------------------------------------------------------------------------
# What ranks with what
# ----------------------------------------------------------------------------------------------------------------------


def test_the_lowest_mean_ranks_first_and_gains_follow_the_calendar(records: Records):
    """The bar is the best of the days before, not the row below."""
    records.add("Start", "2026-01-01", [1.2000, 1.2004, 1.1996])
    records.add("Leap", "2026-01-03", [1.1000, 1.1004, 1.0996])
    records.add("Late", "2026-01-05", [1.1500, 1.1504, 1.1496])
    records.add("Small", "2026-01-07", [1.0990, 1.0994, 1.0986])
    rows = records.rows()
    assert [(name, row.rank) for name, row in rows.items()] == [("Small", 1), ("Leap", 2), ("Late", 3), ("Start", 4)]
    assert {name: row.verdict for name, row in rows.items()} == {
        "Start": "first",
        "Leap": "yes",
        "Late": "no: an earlier one is as good or better",
        "Small": "no: better by 0.002 bpb or less",
    }
    assert rows["Start"].gain is None
    assert rows["Leap"].gain == pytest.approx(0.1)
    assert rows["Late"].gain == pytest.approx(-0.05)
    assert rows["Small"].gain == pytest.approx(0.001)
    assert rows["Leap"].p == welch([1.2000, 1.2004, 1.1996], [1.1000, 1.1004, 1.0996], 0.002)


def test_a_gain_inside_the_noise_is_no_new_record(records: Records):
    records.add("Start", "2026-01-01", [1.20, 1.22, 1.18])
    records.add("Noise", "2026-01-02", [1.18, 1.20, 1.17])
    row = records.rows()["Noise"]
    assert row.gain is not None
    assert row.gain > 0.002
    assert row.verdict == "no: the gain may be chance (p is not under 0.01)"
    assert row.rank == 1


def test_records_of_one_day_do_not_measure_each_other(records: Records):
    records.add("One", "2026-01-01", [1.2000, 1.2004, 1.1996])
    records.add("Other", "2026-01-01", [1.1000, 1.1004, 1.0996])
    rows = records.rows()
    assert rows["Other"].verdict == "first"
    assert rows["One"].verdict == "no: a better one came on the same day"
    assert rows["One"].gain is rows["Other"].gain is None


def test_too_few_seeds_neither_count_nor_set_the_bar(records: Records):
    records.add("Lucky", "2026-01-01", [1.0])
    records.add("Honest", "2026-01-02", [1.2000, 1.2004, 1.1996])
    rows = records.rows()
    assert rows["Lucky"].verdict == "no: too few seeds, 3 are needed"
    assert rows["Honest"].verdict == "first"


def test_one_seed_shows_no_spread(records: Records):
    """Where a track asks for one seed only, the first may have one; a gain is shown by two on both sides."""
    records.add("Start", "2026-01-01", [1.2], OPEN)
    records.add("Next", "2026-01-02", [1.0, 1.0004], OPEN)
    records.add("Third", "2026-01-03", [0.9, 0.9004], OPEN)
    rows = records.rows()
    assert rows["Start"].verdict == "first"
    assert (rows["Next"].p, rows["Next"].verdict) == (None, "no: with one seed the gain may be chance")
    assert rows["Third"].verdict == "yes"
    assert "n/a" in lb.full_markdown(records.board(), records.folder)


def test_classes_and_texts_have_tables_of_their_own(records: Records):
    seeds = [1.2000, 1.2004, 1.1996]
    records.add("Fixed", "2026-01-01", seeds)
    records.add("Adaptive", "2026-01-02", [1.1, 1.1004, 1.0996], predictor_class="B")
    # Where the track names the text, a hash that nobody else knows does not make it another one.
    records.add("Other hash", "2026-01-03", seeds, val_text_sha256="0" * 64)
    records.add("Other bytes", "2026-01-04", seeds, val_bytes=155_769_746)
    records.add("Source bytes", "2026-01-05", seeds, val_accounting="sidecar")
    records.add("Same text", "2026-01-06", [1.1, 1.1004, 1.0996], val_tokens=1, tokenizer_sha256="0" * 64)
    tables = [sorted(row.entry.submission.name for row in table.rows) for table in records.board().tables]
    assert tables[0] == ["Fixed", "Other hash", "Same text"]
    assert sorted(tables[1:]) == [["Adaptive"], ["Other bytes"], ["Source bytes"]]
    assert records.rows()["Adaptive"].verdict == "first"
    assert records.rows()["Same text"].verdict == "yes"


def test_a_text_that_nobody_knows_ranks_nowhere(records: Records):
    """Otherwise anybody could be the first of a table of their own."""
    records.add("Mine", "2026-01-01", [0.5, 0.5], OPEN, val_text_sha256="0" * 64, val_documents=7, val_bytes=1000)
    row = records.rows()["Mine"]
    assert (row.rank, row.verdict) == (None, "not ranked: an unlisted text")
    assert lb.UNLISTED_TEXT in lb.full_markdown(records.board(), records.folder)


def test_a_copy_of_a_record_does_not_stand(records: Records):
    """By another author, in another folder; a link to a folder is no record at all."""
    folder = records.add("Start", "2026-01-01", [1.2, 1.2004])
    copied = record.load_submission(folder).seed_results
    records.add("Copy", "2026-01-02", [1.2, 1.2004], author="Eve", github_id="eve", seed_results=copied)
    (folder.parent / "2026-01-03_Link").symlink_to(folder)
    rows = records.rows()
    assert list(rows) == ["Start", "Copy"]
    assert (rows["Start"].rank, rows["Copy"].rank) == (1, None)
    assert f"copy: it has the artifact_sha256 of a run in {MAIN}/2026-01-01_Start" in rows["Copy"].entry.reason


def test_a_known_text_is_the_same_for_tokenizers_that_normalise(records: Records):
    """Their bytes differ a little; another export of the same number of documents is another text."""
    seeds = [1.2000, 1.2004, 1.1996]
    for name, n_bytes in (("sp1024", 151_080_363), ("sp8192", 151_078_222), ("Other export", 155_769_746)):
        records.add(name, "2026-01-01", seeds, val_bytes=n_bytes, val_text_sha256="unknown")
    tables = [{row.entry.submission.name for row in table.rows} for table in records.board().tables]
    assert tables == [{"sp1024", "sp8192"}, {"Other export"}]


def test_kinds_of_machines_are_apart_only_where_the_track_says_so(records: Records):
    seeds = [1.2000, 1.2004, 1.1996]
    for i, machine in enumerate(("1x cuda:NVIDIA_H100", "1x cuda:RTX_4090"), 1):
        records.add(f"Single {i}", f"2026-01-0{i}", seeds, ONE_GPU, hardware=machine)
        records.add(f"Open {i}", f"2026-01-0{i}", seeds, OPEN, hardware=machine)
    tables = {(table.key.track_name, table.key.device): len(table.rows) for table in records.board().tables}
    assert tables == {(ONE_GPU, "1x cuda:NVIDIA_H100"): 1, (ONE_GPU, "1x cuda:RTX_4090"): 1, (OPEN, ""): 2}


def test_a_speedrun_ranks_by_time(records: Records):
    records.add("Slow", "2026-01-01", [1.21, 1.22, 1.22], SPEED, seconds=(200.0, 201.0, 199.0))
    records.add("Fast", "2026-01-02", [1.22, 1.22, 1.224], SPEED, seconds=(150.0, 151.0, 149.0))
    rows = records.rows()
    assert (rows["Fast"].rank, rows["Fast"].gain, rows["Fast"].verdict) == (1, pytest.approx(50.0), "yes")
    assert "150.0 ± 1.0" in lb.full_markdown(records.board(), records.folder)


# ----------------------------------------------------------------------------------------------------------------------
# States
# ----------------------------------------------------------------------------------------------------------------------


def test_tables_come_by_importance_and_not_by_number(records: Records):
    """First the order of the tracks, then that of texts.json, last a text that nobody listed."""
    texts = record.load_texts()
    listed = [text for text in texts if text.text_sha256 and not text.demonstration]
    for text in [*listed, texts[-1]]:
        identity = {"val_text_sha256": text.text_sha256, "val_documents": text.documents, "val_bytes": text.bytes}
        for i in range(1 + texts.index(text)):  # the less important, the more records
            records.add(
                f"{text.name[:6]} {i}", "2026-01-01", [1.2 + i / 100], OPEN, val_accounting="sidecar", **identity
            )
    unlisted = {"val_text_sha256": "0" * 64, "val_documents": 7, "val_bytes": 1000}
    for i in range(9):
        records.add(f"Mine {i}", "2026-01-01", [1.2 + i / 100], OPEN, **unlisted)
    records.add("Headline", "2026-01-01", [1.2, 1.2004, 1.1996], MAIN)

    tables = records.board().tables
    assert [table.key.track_name for table in tables] == [MAIN] + [OPEN] * (len(tables) - 1)
    assert [table.key.text.sha256 for table in tables[1:]] == [
        *(t.text_sha256 for t in listed),
        texts[-1].text_sha256,
        "0" * 64,
    ]

    text = lb.full_markdown(records.board(), records.folder)
    for known in [*listed, texts[-1]]:
        assert lb.escape_markdown(known.name) in text
    assert "an unlisted text of 7 documents" in text


def test_the_first_track_has_one_line_while_it_has_no_record(records: Records):
    """In both files and on the page, and no line of that kind once it has one."""
    known = next(text for text in record.load_texts() if text.text_sha256)
    identity = {"val_text_sha256": known.text_sha256, "val_documents": known.documents, "val_bytes": known.bytes}
    records.add("Other", "2026-01-01", [1.2, 1.2], OPEN, **identity)
    title = records.tracks[MAIN].title
    board = records.board()
    assert f"{title}: no record yet" in lb.short_markdown(board, records.folder).splitlines()[0]
    shown = lb.full_markdown(board, records.folder)
    assert shown.startswith(f"## {title}\n")
    assert shown.index(lb.NO_RECORD) < shown.index(records.tracks[OPEN].title)
    html = page.page(board, records.folder)
    assert f'<section id="{MAIN}">' in html

    records.add("Headline", "2026-01-01", [1.2, 1.2004, 1.1996], MAIN)
    board = records.board()
    assert "no record yet" not in lb.short_markdown(board, records.folder)
    assert page.page(board, records.folder).count(f'<section id="{MAIN}">') == 1


def test_gains_are_shown_only_where_there_is_one(records: Records):
    """A record that is worse than an earlier one has no gain, and a gain below the margin no p."""
    records.add("Start", "2026-01-01", [1.2000, 1.2004, 1.1996])
    assert "| gain |" not in lb.full_markdown(records.board(), records.folder)
    records.add("Leap", "2026-01-03", [1.1000, 1.1004, 1.0996])
    records.add("Late", "2026-01-05", [1.1500, 1.1504, 1.1496])
    records.add("Small", "2026-01-07", [1.0990, 1.0994, 1.0986])
    cells = {name: lb.row_cells(row, records.tracks[MAIN]) for name, row in records.rows().items()}
    shown = {name: (row["gain"].text, row["p"].text) for name, row in cells.items()}
    assert shown == {"Start": ("", ""), "Leap": ("+0.1000", "<0.0001"), "Late": ("", ""), "Small": ("+0.0010", "")}


@given(st.text(max_size=300))
def test_a_summary_is_a_short_beginning_of_the_blurb(blurb: str):
    shown = lb.summary(blurb)
    assert len(shown) <= lb.MAX_SUMMARY
    assert lb.clean(blurb).startswith(shown.removesuffix("..."))


def test_a_summary_is_the_first_sentence():
    assert lb.summary("Rows of 2.5 bits. And more.") == "Rows of 2.5 bits."
    clause = "It has one idea that takes quite a few words to say, " * 3
    assert lb.summary(clause) == "It has one idea that takes quite a few words to say..."


def test_a_folder_of_the_published_challenge_is_called_so(records: Records):
    folder = records.folder / MAIN / "2026-03-18_Theirs"
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text('{"author": "a", "name": "n", "val_bpb": 1.2}')
    [(_, reason)] = records.board().unlisted
    assert "published challenge" in reason


def test_a_dispute_holds_until_it_is_settled(records: Records):
    """The order of the entries decides, also within a day."""
    records.add("Start", "2026-01-01", [1.2000, 1.2004, 1.1996])
    bad = records.add("Bad", "2026-01-02", [1.0000, 1.0004, 0.9996])
    records.add("Good", "2026-01-03", [1.1000, 1.1004, 1.0996])
    assert records.rows()["Good"].verdict == "no: an earlier one is as good or better"

    add_review(bad, review("reproduced"))
    add_review(bad, review("disputed", note="scores tokens twice"))
    rows = records.rows()
    assert (rows["Bad"].entry.state, rows["Bad"].rank, rows["Bad"].verdict) == ("disputed", None, "no: disputed")
    assert list(rows) == ["Good", "Start", "Bad"]
    assert rows["Good"].verdict == "yes", "a disputed record sets no bar"
    assert "scores tokens twice" in lb.full_markdown(records.board(), records.folder)

    add_review(bad, review("settled"))
    assert records.rows()["Bad"].entry.state == "reproduced"
    add_review(bad, review("disputed"))
    assert records.rows()["Bad"].entry.state == "disputed"


def test_reviews_of_other_code_do_not_count(records: Records):
    folder = records.add("Start", "2026-01-01", [1.2])
    add_review(folder, review("reproduced", code="0" * 64))
    assert records.rows()["Start"].entry.state == "consistent"
    add_review(folder, review("rescored", val_bpb=1.2))
    assert records.rows()["Start"].entry.state == "rescored"
    add_review(folder, review("reproduced"))
    assert records.rows()["Start"].entry.state == "reproduced"


def test_a_record_that_fails_a_check_is_failing_and_has_no_rank(records: Records, monkeypatch: pytest.MonkeyPatch):
    """Not even one that somebody trained again."""
    large = records.add("Large", "2026-01-01", [1.0, 1.0, 1.0])
    add_review(large, review("reproduced"))
    records.add("Sound", "2026-01-02", [1.2000, 1.2004, 1.1996])
    assert records.rows()["Large"].entry.state == "reproduced"
    monkeypatch.setattr(lb, "failed_checks", lambda folder: ("size: 17 MB",) if folder == large else ())
    rows = records.rows()
    states = {name: (row.entry.state, row.rank, row.verdict) for name, row in rows.items()}
    assert states == {"Sound": ("consistent", 1, "first"), "Large": ("failing", None, "no: fails a check")}
    assert "size: 17 MB" in lb.full_markdown(records.board(), records.folder).replace("\\", "")


def test_a_record_without_evidence_is_failing(tmp_path: Path):
    """By the checks of tools/verify.py themselves."""
    records = Records(tmp_path / "records")
    records.add("Bare", "2026-01-01", [1.0])
    row = records.rows()["Bare"]
    assert (row.entry.state, row.rank) == ("failing", None)
    assert any("README.md is missing" in failure for failure in row.entry.failures)


def test_a_record_that_no_check_can_cope_with_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lb, "static_checks", lambda folder: [].pop())
    assert "IndexError" in lb.failed_checks(tmp_path)[0]


# ----------------------------------------------------------------------------------------------------------------------
# What is at fault
# ----------------------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, **fields: Any) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / "submission.json").unlink(), "submission.json is missing"),
        (lambda f: (f / "submission.json").write_text("{"), "not JSON"),
        (lambda f: (f / "submission.json").write_bytes(b"\xff\xfe"), "UTF-16"),
        (lambda f: (f / "submission.json").write_text("[" * 100_000), "not JSON"),
        (lambda f: (f / "reviews.json").write_text("{}"), "holds no list"),
        (lambda f: rewritten(f, date="soon"), "date"),
        (lambda f: rewritten(f, date="20260101"), "date"),
        (lambda f: rewritten(f, track=OPEN), "track"),
        (lambda f: rewritten(f, seed_results={}), "no seeds"),
        (lambda f: rewritten(f, seed_results={"../x": dataclasses.asdict(result("x", 1.0))}), "no number"),
        (lambda f: rewritten(f, seed_results={"1": dataclasses.asdict(result("x", 1e200))}), "impossible val_bpb"),
        (lambda f: rewritten(f, val_loss=10**400), "401 digits"),
        (lambda f: f.rename(f.with_name("no date")), "YYYY-MM-DD"),
        (lambda f: f.parent.rename(f.parent.with_name("track_unknown")), "no track"),
    ],
)
def test_a_damaged_folder_is_listed_apart(records: Records, harm: Callable[[Path], Any], reason: str):
    harm(records.add("Bad", "2026-01-01", [1.0, 1.0, 1.0]))
    records.add("Good", "2026-01-02", [1.2, 1.2, 1.2])
    board = records.board()
    assert [row.entry.submission.name for table in board.tables for row in table.rows] == ["Good"]
    [(_, why)] = board.unlisted
    assert reason in why
    assert "## Not listed" in lb.full_markdown(board, records.folder)
    assert "Not listed" in page.page(board, records.folder)


def test_logs_that_cannot_be_drawn_are_left_out(records: Records):
    folder = records.add("One", "2026-01-01", [1.2, 1.2])
    record.log_path(folder, "1").write_text("step:1/2 val_loss:1.2.3 train_time:1ms\n")
    record.log_path(folder, "2").write_text("step:1/2 val_loss:nan\nstep:2/2 val_loss:inf\nstep:2/2 train_loss:1.5\n")
    [table] = records.board().tables
    assert [run["train"] for drawn in page.figure_data(table) for run in drawn["runs"]] == [[(2, None, 1.5)]]


def test_a_log_that_cannot_be_read_is_not_drawn(records: Records):
    folder = records.add("A", "2026-01-01", [1.2])
    (folder / "train_seed1.log").write_text("\n" * 200_000)
    [table] = [table for table in records.board().tables if table.rows]
    assert page.figure_data(table) == []


def test_smoothing_keeps_ends_and_straight_lines():
    line = [record.CurvePoint(step, float(step), 1 + step / 100) for step in range(1, 50)]
    assert page.thinned(line, 2) == [(step, seconds, round(loss, 4)) for step, seconds, loss, _ in line]
    many = [record.CurvePoint(step, float(step), 1.0) for step in range(1, 100_000)]
    assert len(page.thinned(many)) <= page.MAX_POINTS + 1
    assert page.thinned(many)[-1][0] == 99_999


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(records: Records, tmp_path: Path) -> Callable[..., int]:
    records.folder.mkdir()
    (tmp_path / "README.md").write_text(f"# Head\n\n{lb.BEGIN}\n{lb.END}\n\ntail\n")
    paths = ["--records", str(records.folder), "--readme", str(tmp_path / "README.md")]
    return lambda *more: lb.main([*paths, *more])


def test_check_names_the_file_that_is_out_of_date(
    records: Records, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records.add("Start", "2026-01-01", [1.2000, 1.2004, 1.1996])
    before = (tmp_path / "README.md").read_text()
    assert command("--check") == 1
    assert (tmp_path / "README.md").read_text() == before
    assert not (records.folder / "README.md").exists()
    assert command() == 0
    assert command("--check") == 0
    written = (tmp_path / "README.md").read_text()
    assert written.startswith("# Head\n")
    assert written.endswith("\n\ntail\n")
    assert f"[Start](records/{MAIN}/2026-01-01_Start)" in written
    assert f"[Start]({MAIN}/2026-01-01_Start)" in (records.folder / "README.md").read_text()

    (tmp_path / "README.md").write_text(written.replace("Start", "Stop"))
    capsys.readouterr()
    assert command("--check") == 1
    assert capsys.readouterr().err.startswith(str(tmp_path / "README.md"))


def test_no_record_at_all(command: Callable[..., int], records: Records, tmp_path: Path):
    assert command() == 0
    assert "No record yet." in (tmp_path / "README.md").read_text()
    out = tmp_path / "page.html"
    assert page.main([str(out), "--records", str(records.folder)]) == 0
    assert "No record yet." in out.read_text()


@pytest.mark.parametrize("text", ["", lb.BEGIN, f"{lb.END}\n{lb.BEGIN}", f"{lb.BEGIN}\n{lb.BEGIN}\n{lb.END}"])
def test_missing_markers_are_named(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
):
    (tmp_path / "README.md").write_text(text)
    assert command() == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "README.md") in error
    assert lb.BEGIN in error
    assert lb.END in error
    assert (tmp_path / "README.md").read_text() == text


def test_the_same_records_give_the_same_bytes(records: Records, tmp_path: Path):
    """Wherever they lie and in whatever order their folders were made."""
    for i in range(4):
        records.add(f"R{i}", f"2026-01-0{i % 2 + 1}", [1.2 + i / 100, 1.2004 + i / 100, 1.1996 + i / 100])
    copy = Records(tmp_path / "elsewhere" / "records")
    for folder in sorted((records.folder / MAIN).iterdir(), reverse=True):
        shutil.copytree(folder, copy.folder / MAIN / folder.name)
    for write in (lb.full_markdown, lb.short_markdown, page.page):
        assert write(records.board(), records.folder) == write(copy.board(), copy.folder)


# ----------------------------------------------------------------------------------------------------------------------
# Hostile text
# ----------------------------------------------------------------------------------------------------------------------


def test_hostile_names_stay_text_in_markdown(records: Records):
    records.add(HOSTILE, "2026-01-01", [1.2, 1.2], OPEN, author=f"a\n\n# b | c {lb.END} \u202e https://x.y \ud800")
    text = lb.full_markdown(records.board(), records.folder)
    # The headings of the first track, which has no record, of this record's track and of its table.
    assert len([line for line in text.splitlines() if line.startswith("#")]) == 3
    [row] = [line for line in text.splitlines() if "2026-01-01" in line]
    [heads] = [line for line in text.splitlines() if line.startswith("| # |")]
    assert len(re.findall(r"(?<!\\)\|", row)) == heads.count("|"), "as many cells as columns"
    assert "<" not in text.replace("p < 0.01", "")
    assert lb.END not in text
    assert re.findall(r"(?<!\\)\]\(([^)]*)", text) == [f"{OPEN}/2026-01-01_script-script-alert-1-script"]
    assert not re.search(r"(?<!\\)[`*_@]", re.sub(r"\]\(track[^)]*", "", row))
    text.encode()


def test_hostile_names_stay_text_in_the_page(records: Records):
    names = {"author": HOSTILE, "blurb": HOSTILE, "github_id": '" onmouseover="alert(1)', "hardware": HOSTILE}
    folder = records.add(HOSTILE, "2026-01-01", [1.2, 1.2], OPEN, **names)
    add_review(folder, review("disputed", note=HOSTILE))
    text = page.page(records.board(), records.folder)
    template = page.TEMPLATE.read_text()
    assert len(re.findall(r"<(?:script|/script|img|!--)", text)) == len(
        re.findall(r"<(?:script|/script|img|!--)", template)
    )
    assert not re.search(r'(?<!&quot;)" onmouseover', text)
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    assert data[f"{OPEN}-1"][0]["name"] == lb.clean(HOSTILE, 80)


@given(st.text(max_size=60))
def test_markdown_escapes_any_text(text: str):
    """Outside of backslash pairs and entities nothing is left that Markdown or HTML would act on."""
    shown = lb.escape_markdown(text)
    rest = re.sub(r"\\[\\`*_{}\[\]#|!~@:$=^.]|&(?:lt|gt|amp);", "", shown)
    assert not re.search(r"[\\`*_{}\[\]#|!~@$=^<>&\n\r]|:(?=[^\s\\])", rest)
    shown.encode()


# ----------------------------------------------------------------------------------------------------------------------
# The page in a browser
# ----------------------------------------------------------------------------------------------------------------------


def column(browser: Any, title: str) -> list[str]:
    return [cell.text for cell in browser.find_elements("css selector", f'tbody td[data-label="{title}"]')]


def point_at(browser: Any, share: float) -> None:
    """Move the pointer to a share of the figure's horizontal axis."""
    actions = pytest.importorskip("selenium.webdriver").ActionChains(browser)
    plot = browser.find_element("css selector", ".plot svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    width = plot.rect["width"]
    x = 50 + share * (width - 60)  # the axis begins 50 right of the figure's edge and ends 10 before the other
    actions.move_to_element_with_offset(plot, round(x - width / 2), 0).perform()


@pytest.mark.slow
def test_page_in_a_browser(records: Records, browser: Any, tmp_path: Path):
    """It sorts, shows the values of the logs, shows hostile text as text, fits a phone and asks nobody for anything."""
    records.add("Start", "2026-01-01", [1.2000, 1.3000, 1.1996], OPEN, seconds=(400.0, 400.0, 400.0))
    records.add("Single", "2026-01-02", [1.1], OPEN, seconds=(200.0,), author="A" * 60, hardware="8x cuda:" + "H" * 80)
    records.add(HOSTILE, "2026-01-03", [1.1500, 1.1504, 1.1496], OPEN, blurb=HOSTILE, author=HOSTILE)
    path = tmp_path / "page.html"
    path.write_text(page.page(records.board(), tmp_path), encoding="utf-8")
    browser.get(path.as_uri())

    names = [cell.split("\n")[0] for cell in column(browser, "record")]
    assert names == ["Single", lb.clean(HOSTILE, 80), "Start"]
    assert len(browser.find_elements("css selector", "script, img")) == 2

    for title, upwards in (("date", ["2026-01-01", "2026-01-02", "2026-01-03"]), ("seeds", ["1", "3", "3"])):
        button = browser.find_element("xpath", f'//th/button[text()="{title}"]')
        button.click()
        assert column(browser, title) == upwards
        button.click()
        assert column(browser, title) == upwards[::-1]
    for _ in range(2):
        browser.find_element("xpath", '//th/button[text()="gain"]').click()
        assert column(browser, "gain")[-1] == "", "what has no value stays last"

    # The figure starts with one run of each record.
    figure = browser.find_element("css selector", "figure")
    browser.execute_script("arguments[0].scrollIntoView({block: 'start', behavior: 'instant'})", figure)
    figure.find_element("css selector", ".legend li:nth-child(2) button").click()
    figure.find_element("xpath", './/span[text()="validation"]').click()
    figure.find_element("xpath", './/span[text()="seconds"]').click()
    point_at(browser, 0.5)  # 200 of 400 s, where the faster run has ended
    rows = browser.find_elements("css selector", ".tip tr")[1:]
    shown = [[cell.text for cell in row.find_elements("css selector", "td")] for row in rows]
    assert sorted(shown) == [
        ["Single", "1", "4,000", "200", "val", f"{1.1 + 2.5 * math.exp(-8):.4f}"],
        ["Start", "1", "2,000", "200", "val", f"{1.2 + 2.5 * math.exp(-4):.4f}"],
    ]

    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390

    assert [url for url in requests(browser) if not url.endswith("/page.html")] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []
