"""Real processes that talk through gloo: the result does not depend on their number, and their weights never part."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRIVER = """
# Runs the script as it is and prints, on every rank, a hash of the weights that training left there.
import hashlib, os, sys
import train_gpt as tg

kept, build = [], tg.build_optimizers

def build_and_keep(model, hp, world):
    kept.append((model, world.rank))
    return build(model, hp, world)

tg.build_optimizers = build_and_keep
status = tg.main()
model, rank = kept[0]
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
sys.stdout.write(f"rank:{rank} weights:{hashlib.sha256(weights).hexdigest()}\\n")
sys.stdout.flush()
os._exit(status)  # gloo's threads abort a process that ends while they drop a tensor
"""


@pytest.fixture(scope="module")
def run_on_ranks(tmp_path_factory, run_script):
    """A function that trains on a number of ranks. -> the run; fails unless all ranks end well, with equal weights"""
    driver = tmp_path_factory.mktemp("driver") / "driver.py"
    driver.write_text(DRIVER)

    def run(size: int, **settings: str):
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}") if size > 1 else ()
        done = run_script(*launcher, str(driver), **settings)
        assert done.status == 0, done.err
        hashes = dict(re.findall(r"rank:(\d+) weights:(\w+)", done.out))
        assert sorted(hashes) == [str(rank) for rank in range(size)]
        assert len(set(hashes.values())) == 1
        return done

    return run


@pytest.fixture(scope="module")
def one_rank(run_on_ranks):
    return run_on_ranks(1, ITERATIONS="8")


@pytest.fixture(scope="module")
def one_rank_record(run_on_ranks, record_settings):
    return run_on_ranks(1, **record_settings, ITERATIONS="8")


def final(run) -> list[float]:
    return [float(x) for x in re.findall(r"roundtrip_exact val_loss:(\S+) val_bpb:(\S+)", run.out)[0]]


def assert_same_result(run, reference, size: int) -> None:
    assert len(run.losses) == 8
    assert run.losses == pytest.approx(reference.losses, abs=2e-4)
    assert final(run) == pytest.approx(final(reference), abs=2e-3)
    assert run.results["world_size"] == size
    assert run.results["val_tokens"] == reference.results["val_tokens"]


@pytest.mark.slow
def test_losses_and_score_do_not_depend_on_the_number_of_ranks(one_rank, run_on_ranks):
    """Three ranks have uneven shares of 8 sequences, of every stack of matrices and of the windows to score."""
    assert_same_result(run_on_ranks(3, ITERATIONS="8"), one_rank, 3)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_losses_and_score_of_a_record_do_not_depend_on_the_number_of_ranks(
    one_rank_record, run_on_ranks, record_settings, size
):
    """With all techniques: shuffled sequences, clipped gradients, averaged weights and packed rows, too, are shared
    or the same on every rank."""
    assert_same_result(run_on_ranks(size, **record_settings, ITERATIONS="8"), one_rank_record, size)


def test_ranks_stop_at_the_same_step_by_one_clock(run_on_ranks):
    """With clocks of their own, one rank would wait for ever for another that has stopped."""
    run = run_on_ranks(2, MAX_WALLCLOCK_SECONDS="1.5", ITERATIONS="100000", TRAIN_LOG_EVERY="100", WARMDOWN_ITERS="30")
    assert 0.5 < run.results["train_seconds"] <= 2.0
    assert "stopping_early" in run.out


def test_scoring_on_two_ranks_gives_the_score_of_one(one_rank, run_script):
    """The same artifact, to the last digits of a float64 sum of float32 losses."""
    script = str(ROOT / "train_gpt.py")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run = run_script(*launcher, script, EVAL_ARTIFACT=str(one_rank.artifact))
    assert run.status == 0, run.err
    assert final(run) == pytest.approx(final(one_rank), abs=1e-6)


@pytest.mark.slow
def test_one_layer_model_trains_on_two_ranks(run_on_ranks):
    """A parameter without a gradient must not break the sum over ranks."""
    run_on_ranks(2, NUM_LAYERS="1", ITERATIONS="2")
