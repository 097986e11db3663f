"""The README's commands are what CI runs, and what it names exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_command_lines_of_the_readme():
    """A newcomer's first two lines are tested on every change, to the letter."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(lines) == 2
    assert re.findall(r"^run '(python .*)'$", ci, re.M)[:2] == lines


def test_settings_in_the_readme_exist():
    fields = [*dataclasses.fields(tg.GPTConfig), *dataclasses.fields(tg.Hyperparameters)]
    known = {field.name.upper() for field in fields}
    named = set(re.findall(r"\b([A-Z][A-Z0-9_]{3,})=", README)) | set(re.findall(r"`([A-Z]+_[A-Z_]+)`", README))
    assert named
    assert named - {"NUM_LAYER"} <= known, "the README names a setting that the script does not have"


def test_files_in_the_readme_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    scripts = re.findall(r"python (\S+\.py)", README)
    assert links
    assert scripts
    assert [name for name in [*links, *scripts] if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("preset", ["baseline", "record"])
def test_parameter_count_in_the_readme_is_that_of_the_preset(preset):
    with torch.device("meta"):
        model = tg.GPT(tg.from_env(tg.GPTConfig, {"PRESET": preset}))
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in README
