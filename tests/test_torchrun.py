"""Real processes that talk through gloo: the result does not depend on their number, and their weights never part."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import train_gpt as tg

DRIVER = """
# Runs the script as it is and prints, on every rank, a hash of the weights that training left there.
import hashlib, os, sys
import train_gpt as tg

models = []
build_optimizers = tg.build_optimizers

def note_model(model, hp, world):
    models.append(model)
    return build_optimizers(model, hp, world)

tg.build_optimizers = note_model
status = tg.main()
[model] = models
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
rank = os.environ.get("RANK", "0")
sys.stdout.write(f"rank:{rank} weights:{hashlib.sha256(weights).hexdigest()}\\n")
sys.stdout.flush()
os._exit(status)  # gloo's threads abort a process that ends while they drop a tensor
"""


@pytest.fixture(scope="module")
def train_on_ranks(tmp_path_factory, tiny_settings, fork) -> Callable:
    """A function that trains on a number of ranks. -> the run, once it is certain that all ranks hold equal weights"""
    driver = tmp_path_factory.mktemp("driver") / "driver.py"
    driver.write_text(DRIVER)

    def run(size: int, **settings: str | None):
        env = {name: value for name, value in {**tiny_settings, **settings}.items() if value is not None}
        done = fork(str(driver), tmp_path_factory.mktemp("run"), env, size)
        assert done.status == 0, done.err
        hashes = dict(re.findall(r"rank:(\d+) weights:(\w+)", done.out))
        assert sorted(hashes) == [str(rank) for rank in range(size)]
        assert len(set(hashes.values())) == 1
        return done

    return run


@pytest.fixture(scope="module")
def one_rank(train_on_ranks):
    return train_on_ranks(1, ITERATIONS="8")


def final_score(run) -> list[float]:
    [score] = re.findall(r"roundtrip_exact val_loss:(\S+) val_bpb:(\S+)", run.out)
    return [float(x) for x in score]


def assert_same_result(run, reference, size: int) -> None:
    assert len(run.losses) == 8
    assert run.losses == pytest.approx(reference.losses, abs=2e-4)
    assert final_score(run) == pytest.approx(final_score(reference), abs=2e-3)
    assert run.results["world_size"] == size
    assert run.results["scored_tokens"] == reference.results["scored_tokens"]
    assert run.results["scored_bytes"] == reference.results["scored_bytes"]


def test_losses_and_score_do_not_depend_on_the_number_of_ranks(one_rank, train_on_ranks):
    """Three ranks have uneven shares of 8 sequences, of every stack of matrices and of the windows to score."""
    assert_same_result(train_on_ranks(3, ITERATIONS="8"), one_rank, 3)


def test_losses_and_score_with_all_techniques_do_not_depend_on_the_number_of_ranks(train_on_ranks, record_settings):
    """Shuffled sequences, clipped gradients, averaged weights, calibration and packed rows, too, are shared or the
    same on every rank."""
    settings = {**record_settings, "ITERATIONS": "8", "GPTQ_CALIBRATION_BATCHES": "4"}
    assert_same_result(train_on_ranks(3, **settings), train_on_ranks(1, **settings), 3)


def test_ranks_stop_at_the_same_step_by_one_clock(train_on_ranks):
    """With clocks of their own, one rank would wait for ever for another that has stopped."""
    run = train_on_ranks(2, MAX_WALLCLOCK_SECONDS="1", ITERATIONS="100000", TRAIN_LOG_EVERY="100")
    assert 0.5 < run.results["train_seconds"] <= 1.5
    assert "stopping_early" in run.out


def test_ranks_share_the_name_of_the_run(train_on_ranks):
    """Their clocks may show another second."""
    run = train_on_ranks(2, RUN_ID=None, ITERATIONS="2")
    [folder] = [path for path in (run.folder / "runs").iterdir() if path.name != "latest"]
    assert folder.name.endswith("_baseline_seed1337")


def test_one_layer_model_trains_on_two_ranks(train_on_ranks):
    """A parameter without a gradient must not break the sum over ranks."""
    train_on_ranks(2, NUM_LAYERS="1", ITERATIONS="2")


def test_scoring_under_torchrun_gives_the_score_of_one_rank(one_rank, run_script):
    """The same artifact on two ranks, to the last digits of a float64 sum of float32 losses."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run = run_script(*launcher, tg.__file__, EVAL_ARTIFACT=str(one_rank.artifact))
    assert run.status == 0, run.err
    assert final_score(run) == pytest.approx(final_score(one_rank), abs=1e-6)
