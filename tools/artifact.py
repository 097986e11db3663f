"""An artifact that is ready to be used: its model, its tokenizer, and the log-probabilities of any tokens.

    from artifact import Stretch, encode, open_subject, score_stretches

    subject = open_subject(Path("runs/latest"))
    ids = [subject.config.bos_id, *encode(subject, "Some text")]
    [scored] = score_stretches(subject, [Stretch(ids, len(ids) - 1)], "text")
    print(scored.nats.sum())

Opening an artifact runs the record's script without a sandbox. Do so only with what you would run anyway.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from record import ROOT, data_path, file_sha256, script_path
from tqdm import tqdm  # type: ignore[import-untyped]
from worker import load_script

sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from tokenizer import Tokenizer  # noqa: E402

import train_gpt as tg  # noqa: E402

# Tokens of a forward pass, padding included. On two cores, more than 1,024 are not faster.
BATCH_TOKENS = 2048


# ----------------------------------------------------------------------------------------------------------------------
# The artifact and what belongs to it
# ----------------------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """What is scored: a model that was rebuilt from its artifact, and the tokenizer it was trained with."""

    model: Any  # module(ids) -> logits, see the docstring of train_gpt.py
    config: Any  # GPTConfig of the record's script
    tokenizer: Tokenizer
    artifact: Path
    script: Path
    script_module: types.ModuleType  # what the script defines
    run: dict[str, Any]  # run.json beside the artifact, or nothing
    device: torch.device


def open_subject(
    path: Path,
    script: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "cpu",
    compute_dtype: str = "",
) -> Subject:
    """Find and load an artifact, its script and its tokenizer.

    path        an artifact, or the folder of a run or of a record with one artifact in it
    script      the train_gpt.py that rebuilds it; by default the one beside it, or else the root's
    tokenizer   by default the file with the artifact's sha256 that lies beside it, is named by its run.json, or is in
                data/
    compute_dtype   of activations, where the script leaves a choice; by default what the artifact's config names

    Raises OSError or ValueError, naming the file and what to do.
    """
    artifact = find_artifact(path)
    folder = artifact.resolve().parent  # runs/latest is a link
    if script is None:
        script = script_path(folder) if script_path(folder).is_file() else ROOT / "train_gpt.py"
    if not script.is_file():
        raise FileNotFoundError(f"--script {script} does not exist: name a train_gpt.py")
    module = load_script(str(script))
    if not hasattr(module, "load_artifact"):
        raise ValueError(f"{script} has no load_artifact, so its model is not a fixed one: it cannot be scored here")
    options = {}
    if compute_dtype and "compute_dtype" in inspect.signature(module.load_artifact).parameters:
        options["compute_dtype"] = compute_dtype
    model = module.load_artifact(artifact, device, **options)
    config = model.config

    # A record has such a file for each seed; what is read of it is the same in all.
    run = dict[str, Any]()
    for file in (folder / "run.json", *sorted(folder.glob("train_seed*.json"))):
        if not run and file.is_file():
            run = tg.read_json(file)

    if tokenizer is None:
        tokenizer = find_tokenizer(folder, run, config.tokenizer_sha256)
    elif not tokenizer.is_file():
        raise FileNotFoundError(f"--tokenizer {tokenizer} does not exist: name the .model file of the artifact")
    elif config.tokenizer_sha256 and file_sha256(tokenizer) != config.tokenizer_sha256:
        raise ValueError(
            f"--tokenizer {tokenizer} has sha256 {file_sha256(tokenizer)}, but {artifact} was made with "
            f"{config.tokenizer_sha256}: name that one"
        )
    loaded = Tokenizer(tokenizer.read_bytes(), tokenizer)
    if loaded.sp.get_piece_size() != config.vocab_size or loaded.sp.bos_id() != config.bos_id:
        raise ValueError(
            f"{tokenizer} has {loaded.sp.get_piece_size()} pieces and BOS {loaded.sp.bos_id()}, but {artifact} says "
            f"{config.vocab_size} and {config.bos_id}: name the tokenizer that it was made with by --tokenizer"
        )
    return Subject(model, config, loaded, artifact, script, module, run, torch.device(device))


def find_artifact(path: Path) -> Path:
    """The artifact that `path` is, or the only one in this folder. Raises FileNotFoundError or ValueError."""
    found = sorted(path.glob("final_model.*.ptz")) if path.is_dir() else [path]
    if len(found) > 1:
        raise ValueError(f"{path} has {', '.join(file.name for file in found)}: name one of these files")
    if not found:
        raise FileNotFoundError(f"{path} is a folder without final_model.*.ptz: name the file of an artifact")
    if not found[0].is_file():
        raise FileNotFoundError(f"{path} does not exist: name an artifact, or the folder of a run or a record")
    return found[0]


def find_tokenizer(folder: Path, run: Mapping[str, Any], sha256: str) -> Path:
    """The tokenizer with this sha256 near an artifact. Raises FileNotFoundError if there is none."""
    # A run names its files from where it was started, which is most often where its folder runs/<RUN_ID> lies.
    starts = (Path(), folder.parent.parent, ROOT)
    places = [
        data_path(folder) / "tokenizer.model",
        folder / "tokenizer.model",
        *(start / str(run.get("tokenizer_path", "")) for start in starts),
        *(start / str(run.get("data_path", "")) / "tokenizer.model" for start in starts),
        *sorted(Path("data/tokenizers").glob("*.model")),
        *sorted((ROOT / "data" / "tokenizers").glob("*.model")),
        *sorted((ROOT / "data" / "datasets").glob("*/tokenizer.model")),
    ]
    for place in places:
        if place.is_file() and sha256 in ("", file_sha256(place)):
            return place
    raise FileNotFoundError(
        f"{folder} leads to no tokenizer with sha256 {sha256}: name the .model file that the shards were made with "
        "by --tokenizer"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities
# ----------------------------------------------------------------------------------------------------------------------


class Stretch(NamedTuple):
    """Tokens that the model sees at once. The last `n_targets` are scored, each given all that stand before it."""

    ids: Sequence[int]
    n_targets: int


class Scored(NamedTuple):
    nats: np.ndarray  # (n_targets,) float64: -log probability of each target
    is_greedy: bool  # every target has the highest logit


@torch.inference_mode()
def score_stretches(
    subject: Subject, stretches: Sequence[Stretch], name: str, batch_tokens: int = BATCH_TOKENS
) -> list[Scored]:
    """Score every stretch, in the order given.

    Stretches of similar length share a forward pass of at most `batch_tokens` tokens, the longest first. A shorter one
    is padded behind its end, where a causal model does not look, so that padding changes no score beyond rounding.

    name   stands in front of the progress bar
    Raises FloatingPointError for scores that are not finite.
    """
    lengths = np.array([len(stretch.ids) - 1 for stretch in stretches])
    order = np.argsort(-lengths, kind="stable").tolist()
    results = [Scored(np.zeros(0), True)] * len(stretches)

    with tqdm(total=int(lengths.sum()), desc=name, unit=" tokens", unit_scale=True, disable=None) as bar:
        begin = 0
        while begin < len(order):
            width = int(lengths[order[begin]])
            if width < 1:
                # One token alone predicts nothing, and all that follow are as short.
                break
            n_rows = max(1, min(batch_tokens, tg.EVAL_LOGITS // subject.config.vocab_size) // width)
            batch = order[begin : begin + n_rows]
            ids = np.zeros((len(batch), width + 1), np.int64)
            for row, index in enumerate(batch):
                ids[row, : len(stretches[index].ids)] = stretches[index].ids

            inputs = torch.from_numpy(ids[:, :-1]).to(subject.device)
            targets = torch.from_numpy(ids[:, 1:]).to(subject.device)
            logits = subject.model(inputs)
            nats = tg.target_nats(logits, targets).double().cpu().numpy()
            target_logits = logits.gather(2, targets[..., None])[..., 0]
            is_best = (target_logits >= logits.amax(2)).cpu().numpy()

            for row, index in enumerate(batch):
                stop = int(lengths[index])
                start = stop - stretches[index].n_targets
                results[index] = Scored(nats[row, start:stop].copy(), bool(is_best[row, start:stop].all()))
            bar.update(int(lengths[batch].sum()))
            begin += len(batch)

    if not all(np.isfinite(scored.nats).all() for scored in results):
        raise FloatingPointError(f"{subject.artifact} gives scores that are not finite: its weights are useless")
    return results


def encode(subject: Subject, text: str) -> list[int]:
    ids: list[int] = subject.tokenizer.encode(text).tolist()
    return ids
