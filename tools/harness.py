"""Run lm-evaluation-harness itself on an artifact or on an exported model, with any of its tasks.

    pip install -r requirements-lmeval.txt
    python tools/harness.py runs/latest --tasks blimp,arc_easy,wikitext
    python tools/harness.py runs/latest --tasks blimp,arc_easy,wikitext --data DIR --limit 10
    python tools/harness.py out/my-model --tasks hellaswag          what tools/export_hf.py wrote, through transformers

Without --data, the harness fetches its data from the Hub. With it, these three tasks read the local files that
tools/evaluate.py reads. All else is the harness's own: prompts, how a prompt and a choice are encoded, windows and
metrics. So its figures are a check on those of tools/evaluate.py, which needs none of its packages.

    from artifact import open_subject
    from harness import ArtifactLM
    lm_eval.simple_evaluate(model=ArtifactLM(open_subject(Path("runs/latest"))), tasks=["hellaswag"])
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    # See tools/evaluate.py.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from artifact import BATCH_TOKENS, Stretch, Subject, encode, open_subject, score_stretches
from benchmarks import load_arc_easy, load_blimp, load_wikitext

# Some tasks of the harness import a package named evaluate. They should not find tools/evaluate.py.
OWN_FOLDER = Path(__file__).resolve().parent
sys.path[:] = [*(folder for folder in sys.path if Path(folder).resolve() != OWN_FOLDER), str(OWN_FOLDER)]

try:
    import datasets
    import lm_eval
    from lm_eval.api.group import Group
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.config.group import GroupConfig
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    remedy = f"tools/harness.py needs lm-evaluation-harness ({missing}): pip install -r requirements-lmeval.txt"
    if __name__ == "__main__":
        sys.exit(f"error: {remedy}")
    raise ImportError(remedy) from None

TASKS = Path(lm_eval.__file__).parent / "tasks"

# The words of a context and a continuation, which are not used, and the ids of both.
Request = tuple[Any, list[int], list[int]]


class ArtifactLM(TemplateLM):
    """An artifact as a model of the harness. It has a BOS before every text and does not generate."""

    def __init__(self, subject: Subject, context: int = 0, batch_tokens: int = BATCH_TOKENS) -> None:
        """context   tokens that the model sees at once; 0 means the context that the artifact names"""
        super().__init__()
        self.subject = subject
        self.context = context or int(subject.config.eval_seq_len)
        self.batch_tokens = batch_tokens

    @property
    def eot_token_id(self) -> int:
        """What the harness puts before a text without a prompt."""
        return int(self.subject.config.bos_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The harness leaves add_special_tokens open for texts that begin with a prompt, which then get a BOS."""
        ids = encode(self.subject, string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        stretches = []
        for _, context, continuation in requests:
            # What is too long loses its beginning, as in the harness's own models.
            ids = [*context, *continuation][-(self.context + 1) :]
            stretches.append(Stretch(ids, min(len(continuation), self.context)))
        scores = score_stretches(self.subject, stretches, "requests", self.batch_tokens)
        return [(-float(scored.nats.sum()), scored.is_greedy) for scored in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = list[Request]()
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            of_text = get_rolling_token_windows(ids, self.prefix_token_id, self.context, context_len=1)
            n_before = len(windows)
            windows += [(None, *make_disjoint_window(window)) for window in of_text]
            counts.append(len(windows) - n_before)

        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("an artifact is only scored here: choose tasks that do not generate")


class ExportedLM(HFLM):
    """A folder of tools/export_hf.py, loaded by transformers as its users load it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=16)
        self.add_bos_token: bool | None = None

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        # The tokenizer puts a BOS in front of a text, and so does the harness in front of a text without a prompt. One
        # is enough: with two, WikiText-2 takes 0.0005 bits per byte more.
        self.add_bos_token = False
        scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        self.add_bos_token = None
        return scores


def official_task(name: str, file: str, split: str, rows: list[dict[str, Any]]) -> ConfigurableTask:
    """A task of the harness as its own file defines it, with these rows in place of its data set."""
    task = load_yaml(TASKS / file)
    for key in ("dataset_path", "dataset_name", "training_split", "tag"):
        task.pop(key, None)
    if split == "test":
        task.pop("validation_split", None)
    # To mypy, the folder data/datasets hides the package.
    table = cast(Any, datasets).Dataset.from_list(rows)
    return ConfigurableTask(config={**task, "task": name, "custom_dataset": lambda **_: {split: table}})


def local_tasks(names: Sequence[str], data: Path) -> list[Any]:
    """The tasks blimp, arc_easy and wikitext with local data (tools/benchmarks.py). ValueError for another name."""
    tasks = list[Any]()
    rows: list[dict[str, Any]]
    for name in names:
        if name == "blimp":
            sets = []
            for paradigm, pairs in sorted(load_blimp(data).sets.items()):
                rows = [{"sentence_good": pair.good, "sentence_bad": pair.bad} for pair in pairs]
                sets.append(official_task(f"blimp_{paradigm}", "blimp/_template_yaml", "train", rows))
            group = Group.from_config(GroupConfig(**{**load_yaml(TASKS / "blimp" / "_blimp.yaml"), "task": []}))
            for of_set in sets:
                group.add(of_set)
            tasks.append(group)
        elif name == "arc_easy":
            rows = []
            for question in load_arc_easy(data).questions:
                labels = [str(i) for i in range(len(question.choices))]
                choices = {"text": question.choices, "label": labels}
                rows.append({"question": question.stem, "choices": choices, "answerKey": labels[question.gold]})
            tasks.append(official_task("arc_easy", "arc/arc_easy.yaml", "test", rows))
        elif name == "wikitext":
            rows = [{"page": page} for page in load_wikitext(data).pages]
            tasks.append(official_task("wikitext", "wikitext/wikitext.yaml", "test", rows))
        else:
            raise ValueError(f"--data has no files for {name!r}: take blimp, arc_easy, wikitext, or leave it out")
    return tasks


def run_harness(
    model: ArtifactLM | ExportedLM, names: Sequence[str], data: Path | None, limit: int | None
) -> dict[str, Any]:
    """The results of lm_eval.simple_evaluate by task. Only `limit` items of each are scored, if it is given."""
    tasks = list(names) if data is None else local_tasks(names, data)
    # Errors of accuracies are computed. Those of perplexities are drawn, with few draws, because nobody reads them.
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, limit=limit, bootstrap_iters=10, log_samples=False)
    return {**found["results"], **found.get("groups", {})}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "artifact", type=Path, metavar="ARTIFACT", help="a file, or the folder of a run, a record or an export"
    )
    parser.add_argument("--tasks", default="blimp,arc_easy,wikitext", help="of the harness (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="local benchmark files, instead of the Hub's")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of every task only")
    parser.add_argument(
        "--script", type=Path, help="the train_gpt.py that wrote the artifact (default: found beside it)"
    )
    parser.add_argument("--tokenizer", type=Path, help="the .model file (default: the one with the artifact's sha256)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures there")
    args = parser.parse_args(argv)
    try:
        if (args.artifact / "config.json").is_file():
            model = ExportedLM(args.artifact)
        else:
            model = ArtifactLM(open_subject(args.artifact, args.script, args.tokenizer))
        results = run_harness(model, args.tasks.split(","), args.data, args.limit)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    for task, figures in results.items():
        if task.startswith("blimp_"):
            continue
        for name, value in figures.items():
            if isinstance(value, float):
                print(f"{task:<12}{name:<28}{value:>14.6f}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
