"""Count the parameters of a model by component, from an artifact or from the settings alone.

    python tools/parameters.py runs/latest
    PRESET=tiny python tools/parameters.py
    PRESET=tiny NUM_LAYERS=8 MODEL_DIM=512 python tools/parameters.py

A parameter counts once, however often it is used: a matrix that is both embedding and output, and a layer that is run
several times. Leaderboards for tiny models count like that. What others state for the same model, with the embedding
counted twice, comes below it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from artifact import open_subject
from record import ROOT

sys.path.insert(0, str(ROOT))
import train_gpt as tg

# Names of components, and the parts of a parameter's name that lead to them. The first that fits counts.
COMPONENTS = (
    ("embedding and output matrix", ("tok_emb",)),
    ("gates", ("gate", "smear_gate", "skip_gates")),
    ("attention matrices", ("c_q", "c_k", "c_v", "attn")),
    ("MLP matrices", ("mlp",)),
)
OTHER = "gains and scales"


def component_of(name: str, parameter: torch.Tensor) -> str:
    """Which component a parameter called blocks.0.attn.c_q.weight belongs to."""
    parts = name.split(".")
    for component, marks in COMPONENTS:
        if any(mark in parts for mark in marks) and (parameter.dim() > 1 or component == "gates"):
            return component
    return OTHER


def parameters_by_component(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Numbers of parameters, in the order of COMPONENTS. Each tensor counts once, even if it has several names."""
    counts = dict.fromkeys([*(component for component, _ in COMPONENTS), OTHER], 0)
    seen = set[int]()
    for name, parameter in named_parameters:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        counts[component_of(name, parameter)] += parameter.numel()
    return {component: n for component, n in counts.items() if n}


def counted_twice(config: Any, counts: dict[str, int]) -> int:
    """All parameters, with the output matrix counted apart from the embedding."""
    return sum(counts.values()) + int(config.vocab_size) * int(config.model_dim)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, metavar="ARTIFACT", help="a file, or a folder with one")
    parser.add_argument("--script", type=Path, help="that loads the model (the record's own, or train_gpt.py)")
    args = parser.parse_args(argv)
    try:
        if args.artifact:
            model = open_subject(args.artifact, args.script).model
        else:
            # On the meta device a model has shapes but no weights.
            with torch.device("meta"):
                model = tg.GPT(tg.from_env(tg.GPTConfig, os.environ))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    counts = parameters_by_component(model.named_parameters())
    for component, n in counts.items():
        print(f"{component:<32}{n:>14,}")
    print(f"{'all':<32}{sum(counts.values()):>14,}")
    print(f"{'with the embedding twice':<32}{counted_twice(model.config, counts):>14,}")


if __name__ == "__main__":
    main()
