"""tools/parameters.py: every parameter counts once, in the component that it belongs to."""

from __future__ import annotations

import dataclasses

import parameters
import pytest
import torch

import train_gpt as tg


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_components_are_those_of_closed_forms(preset, monkeypatch, capsys):
    config = tg.from_env(tg.GPTConfig, {"PRESET": preset})
    monkeypatch.setenv("PRESET", preset)
    parameters.main([])
    printed = {}
    for line in capsys.readouterr().out.splitlines():
        name, number = line.rsplit(maxsplit=1)
        printed[name] = int(number.replace(",", ""))

    D, V, L = config.model_dim, config.vocab_size, config.num_layers
    kv_dim = config.num_kv_heads * config.head_dim
    assert printed["embedding and output matrix"] == V * D
    assert printed["attention matrices"] == L * (2 * D * D + 2 * D * kv_dim)
    assert printed["MLP matrices"] == L * 2 * config.mlp_mult * D * D
    with torch.device("meta"):
        n = sum(p.numel() for p in tg.GPT(config).parameters())
    *components, total, twice = printed.values()
    assert sum(components) == total == n
    assert twice == n + V * D


def test_tensor_with_two_names_counts_once():
    shared = torch.zeros(3, 2)
    counts = parameters.parameters_by_component([("tok_emb.weight", shared), ("lm_head.weight", shared)])
    assert counts == {"embedding and output matrix": 6}


def test_tiny_models_keep_the_rules_of_their_track():
    """The preset, and the setting of 5 million parameters that README.md names."""
    small = "NUM_LAYERS=8 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=3 VOCAB_SIZE=1024"
    for env, limit in (("", 100_000_000), (small, 5_500_000)):
        settings = {"PRESET": "tiny", **dict(pair.split("=") for pair in env.split())}
        config = tg.from_env(tg.GPTConfig, settings)
        hp = tg.from_env(tg.Hyperparameters, settings)
        with torch.device("meta"):
            counts = parameters.parameters_by_component(tg.GPT(config).named_parameters())
        # Whether the rules count the output matrix apart, nobody says.
        assert parameters.counted_twice(config, counts) < limit
        assert hp.train_seq_len >= 1028
        assert dataclasses.replace(config, eval_seq_len=hp.train_seq_len).eval_seq_len >= 1028
        assert hp.max_total_bytes > 100_000_000
