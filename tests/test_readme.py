"""The README's commands are what CI runs, and what it names exists."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
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


def test_a_submission_is_the_five_lines_of_the_readme(tmp_path, tiny_settings):
    """The first four to the letter, in a copy of the repository, with a tiny model; the fifth is git's."""
    block = re.search(r"A submission is five lines:\n\n```text\n(.*?)```", README, re.S)
    *lines, git = block[1].splitlines()
    assert git.startswith("git add ")
    copied = (ROOT / "train_gpt.py", ROOT / "README.md")
    for path in copied:
        shutil.copyfile(path, tmp_path / path.name)
    for name in ("tools", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("datasets", "tokenizers", "docs*"))
    (tmp_path / "records").mkdir()
    for path in (ROOT / "records").glob("*.*"):
        shutil.copyfile(path, tmp_path / "records" / path.name)
    settings = {name: value for name, value in tiny_settings.items() if name not in ("RUN_ID", "PYTHONPATH")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    who = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Me"}
    env = {**settings, **who, "PATH": path, "HOME": str(tmp_path)}
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "MyIdea" in (tmp_path / "README.md").read_text(encoding="utf-8")
