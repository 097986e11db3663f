"""The command lines that train on a data set, for the end of data/build_shards.py and data/download.py."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

# Which preset of train_gpt.py fits how many tokens. Each number is a few times what the smaller preset reads.
SMALL_FROM_TOKENS = 5_000_000
LARGE_FROM_TOKENS = 100_000_000
# A vocabulary of this size wants the recipe of PRESET=record, a smaller one that of PRESET=baseline.
RECORD_FROM_PIECES = 4096
# PRESET=smoke needs as many tokens for one step, and takes seconds to score as many as the second number.
SMOKE_STEP_TOKENS = 2048
SMOKE_VAL_TOKENS = 131_072

# Where PRESET=smoke finds the embedded corpus by itself.
SMOKE_DATA = Path("data/datasets/pydoc_sp1024")


def print_commands(manifest: dict[str, Any], folder: Path) -> None:
    """Print the command line that trains on a data set, for the folder that the user is in.

    Settings are arguments, because Windows has no variables in front of a command.
    """
    train_tokens = manifest["splits"]["train"]["tokens"]
    val_tokens = manifest["splits"]["val"]["tokens"]
    if train_tokens <= SMOKE_STEP_TOKENS:
        print(f"{train_tokens} train tokens are too few to train on: add more text")
        return

    script = shortest_path(Path(__file__).parent.parent / "train_gpt.py")
    data_path = shortest_path(folder)
    data_option = "" if Path(data_path) == SMOKE_DATA else f" --data_path={data_path}"

    def command(preset: str, options: str = "") -> str:
        return f"    python {script} --preset={preset}{data_option}{options}"

    # A laptop would take minutes for a large split, several times in a run.
    part_of_val = f" --val_max_tokens={SMOKE_VAL_TOKENS}" if val_tokens > 2 * SMOKE_VAL_TOKENS else ""
    is_small = train_tokens < SMALL_FROM_TOKENS
    print("train on it:" if is_small else "a first try, some minutes on any machine:")
    print(command("smoke", part_of_val))
    if is_small:
        return
    if train_tokens < LARGE_FROM_TOKENS:
        print("a better model, ten minutes on a consumer GPU or an hour on a laptop:")
        print(command("small"))
    else:
        preset = "record" if manifest["tokenizer"]["vocab_size"] >= RECORD_FROM_PIECES else "baseline"
        print("a full training, for data centre GPUs; with --preset=small it fits a consumer GPU:")
        print(command(preset))


def shortest_path(path: Path) -> str:
    """A path as one would type it in the current folder, quoted if need be."""
    written = str(path.absolute())
    # Two disks of Windows have no path from one to the other.
    with contextlib.suppress(ValueError):
        written = min(os.path.relpath(path), written, key=len)
    return f'"{written}"' if re.search(r"[^\w./\\:+-]", written) else written
