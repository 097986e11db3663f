"""The benchmark: what it counts, against slow counting and torch's own counter, and that it measures real runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys

import bench
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg


@given(st.lists(st.lists(st.sampled_from([1, 5, 6]), min_size=7, max_size=7), min_size=1, max_size=3), st.booleans())
def test_visible_pairs_are_counted_one_by_one(rows, document_masks):
    config = tg.GPTConfig(document_masks=document_masks)
    expected = 0
    for row in rows:
        for i in range(len(row)):
            for j in range(i + 1):
                expected += not document_masks or config.bos_id not in row[j + 1 : i + 1]
    assert bench.visible_pairs(torch.tensor(rows), config) == expected


def test_operations_of_a_step_are_those_that_torch_counts(config, hp, data):
    """Of matrix products and attention, forward and backward. torch counts attention in full, without a mask."""
    config = dataclasses.replace(config, vocab_size=320)
    world = tg.World()
    loader = tg.Loader(tg.TokenStream(str(data.folder), "fineweb_train_*.bin"), hp, config.vocab_size, world)
    model = tg.GPT(config)
    tg.init_weights(model, hp)
    run = tg.Run(config, hp, world, tg.Ledger(world.device), log0=lambda line: None)
    setup = bench.Setup(run, tg.Learner(model, model.loss, tg.build_optimizers(model, hp, world)), loader)
    batch = loader.batch(0)

    with FlopCounterMode(display=False) as counter:
        for ids, targets in batch:
            model.loss(ids, targets).backward()
    n_tokens = hp.train_batch_tokens
    per_pair = 3 * 4 * config.model_dim * config.num_layers
    hidden_pairs = n_tokens * hp.train_seq_len - n_tokens * (hp.train_seq_len + 1) // 2
    assert bench.step_flops(setup, batch, looping=False) == counter.get_total_flops() - per_pair * hidden_pairs


@pytest.fixture
def small_settings(monkeypatch, tiny_settings) -> None:
    """The settings of the tests' runs in the environment."""
    for name, value in tiny_settings.items():
        if name in tg.SETTINGS | {"PRESET"}:
            monkeypatch.setenv(name, value)


def test_everything_is_measured(small_settings, monkeypatch, tmp_path, capsys):
    """In a table and in a file, which agree; and speeds follow from times."""
    monkeypatch.setenv("CODEC", "trellis_ans")
    monkeypatch.setattr(bench, "EXPORT_CHARS", 50_000)
    monkeypatch.setattr(bench, "TOKENIZER_CHARS", 100_000)
    out = tmp_path / "a.json"
    assert bench.main(["--out", str(out)]) == 0
    results = json.loads(out.read_text())
    numbers = [name for name in results if name.endswith(("_ms", "_s", "_utilisation"))]
    assert {"step_ms", "optimizer_ms", "quantize_s", "encode_s", "decode_s", "export_val_mb_per_s"} <= set(numbers)
    assert all(results[name] > 0 for name in numbers)
    assert results["tokens_per_s"] == pytest.approx(256 / results["step_ms"] * 1000)
    assert results["attention"] == "blocks"
    shown = capsys.readouterr().out
    assert all(any(line.startswith(f"{name} ") for line in shown.splitlines()) for name in results)


def test_two_results_are_compared(tmp_path, capsys):
    for name, milliseconds in (("a", 200.0), ("b", 50.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"preset": "smoke", "step_ms": milliseconds}))
    assert bench.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["step_ms", "200", "50", "0.25x"]


PUBLISHED_STYLE = """
import os, time
assert os.environ["NUM_LAYERS"] == "3" and os.environ["MLP_MULT"] == "2"  # by the environment, and by the preset
for step in range(1, int(os.environ["ITERATIONS"]) + 1):
    place = f"step:{step}/{os.environ['ITERATIONS']}"
    print(f"{place} train_loss:5.0 train_time:{500 + 20 * step}ms step_avg:9ms", flush=True)
time.sleep(60)  # what follows the last step is not waited for
"""


def test_another_script_runs_beside_ours(small_settings, tmp_path):
    script = tmp_path / "published.py"
    script.write_text(PUBLISHED_STYLE)
    results = bench.against(script, steps=6, rounds=1)
    assert results["step_ms_theirs"] == 20
    assert results["ratio_tokens_per_s"] == pytest.approx(20 / results["step_ms_ours"])


def test_script_that_prints_no_steps_is_an_error_that_shows_its_output(small_settings, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no data here')")
    with pytest.raises(ValueError, match=r"did not print step:6/6(?s:.*)no data here"):
        bench.run_script(script, steps=6, folder=tmp_path)


@pytest.mark.slow
def test_steps_are_measured_on_two_processes(tiny_settings, tmp_path):
    out = tmp_path / "sizes.json"
    command = [sys.executable, bench.__file__, "--world-sizes", "1,2", "--out", str(out)]
    subprocess.run(command, env=tiny_settings, check=True, cwd=tmp_path)
    one, two = json.loads(out.read_text())
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["communication_ms"] > one["communication_ms"]


def test_median_waits_for_the_work(monkeypatch):
    """Every time is taken between two waits for the device, so that no work of a GPU is missed."""
    calls: list[str] = []
    monkeypatch.setattr(tg, "synchronize", lambda device: calls.append("wait"))
    bench.median_seconds(functools.partial(calls.append, "work"), torch.device("cpu"), repeats=2)
    assert calls == ["wait", "work", "wait"] * 2
