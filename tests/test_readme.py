"""What README.md and CONTRIBUTING.md tell people to type exists, and CI runs the first two lines."""

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
PAGES = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}

FIRST_RUN = (
    "python -m pip install -r requirements.txt && python data/build_shards.py && PRESET=smoke python train_gpt.py"
)
TESTS = "python -m pip install -r requirements-dev.txt && python -m pytest -n auto --dist loadfile"

# Variables that other programs read.
FOREIGN_VARIABLES = {"OMP_NUM_THREADS"}


def bash_lines(page: str) -> list[str]:
    """The lines of all ```bash blocks, those inside a list too."""
    blocks = re.findall(r"^ *```bash\n(.*?)```", page, re.S | re.M)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def commands() -> list[str]:
    """Every command of both pages: a line may chain several."""
    lines = [line for page in PAGES.values() for line in bash_lines(page)]
    return [command.strip() for line in lines for command in re.split(r"&&|;", line)]


def scripts_of(command: str) -> list[str]:
    return re.findall(r"(?:python|nproc_per_node=8) (\S+\.py)", command)


@pytest.mark.parametrize("line", [FIRST_RUN, TESTS])
def test_first_two_lines_are_in_the_readme_to_the_letter(line):
    assert line in bash_lines(README)


def test_ci_runs_the_first_two_lines_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^run '(python .*)'$", ci, re.M)[:2] == [FIRST_RUN, TESTS]


def test_files_in_the_commands_exist():
    scripts = [script for command in commands() for script in scripts_of(command)]
    requirements = [name for command in commands() for name in re.findall(r"-r (\S+)", command)]
    tests = [name for command in commands() for name in re.findall(r"tests/\S+", command)]
    folders = [name for command in commands() for name in re.findall(r"records/\S+/\S+", command) if "*" not in name]
    assert len(scripts) > 10
    assert requirements
    assert folders
    named = [*scripts, *requirements, *tests, *folders]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_options_in_the_commands_exist():
    """Each --option stands in the source of the script that it is given to."""
    checked = 0
    for command in commands():
        for script in scripts_of(command):
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in re.findall(r"(?<= )--[a-z][a-z_-]*", command.split(script, 1)[1]):
                if script == "train_gpt.py":
                    assert option.removeprefix("--").upper() in tg.SETTINGS
                    continue
                assert f'"{option}"' in source, f"{script} has no {option}: {command}"
                checked += 1
    assert checked > 10


def test_settings_on_the_pages_exist():
    fields = [*dataclasses.fields(tg.GPTConfig), *dataclasses.fields(tg.Hyperparameters)]
    known = {field.name.upper() for field in fields} | FOREIGN_VARIABLES
    for name, page in PAGES.items():
        named = set(re.findall(r"\b([A-Z][A-Z0-9_]{3,})=", page)) | set(re.findall(r"`([A-Z]+_[A-Z_]+)`", page))
        assert named
        assert named <= known, f"{name} names a setting that the script does not have"
        assert set(re.findall(r"\bPRESET=(\w+)", page)) <= set(tg.PRESETS)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    headings = re.findall(r"^#+ (.*)$", PAGES[page], re.M)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page])
    assert links
    assert [link for link in links if link not in anchors and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_parameter_count_in_the_readme_is_that_of_the_preset(preset):
    with torch.device("meta"):
        model = tg.GPT(tg.from_env(tg.GPTConfig, {"PRESET": preset}))
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in README


def copy_repository(folder: Path) -> None:
    """Script, tools and pages, without records and data."""
    for name in ("train_gpt.py", "README.md"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("tools", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("datasets", "tokenizers", "docs*"))


@pytest.mark.slow
def test_lines_of_the_readme_that_use_a_model(tmp_path, trained):
    """To the letter, with a tiny model."""
    pytest.importorskip("transformers", reason='pip install "transformers>=5"')
    block = re.search(r"## Use it\n.*?```bash\n(.*?)```", README, re.S)
    assert block is not None
    copy_repository(tmp_path)
    shutil.copytree(trained.folder / "runs", tmp_path / "runs", symlinks=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    lines = block[1].splitlines()
    assert len(lines) == 5
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if "transformers.pipeline" in line or "sample.py" in line:
            assert "The function" in done.stdout
    card = (tmp_path / "out" / "my-model" / "README.md").read_text(encoding="utf-8")
    assert f"{trained.results['val_bpb']:.4f}" in card


@pytest.mark.slow
def test_submission_lines_of_the_readme_make_a_record(tmp_path, tiny_settings):
    """All but git's, to the letter, in a copy of the repository with a tiny model."""
    block = re.search(r"These lines make one:\n\n```bash\n(.*?)```", README, re.S)
    assert block is not None
    *lines, git = block[1].splitlines()
    assert git.startswith("git add ")

    copy_repository(tmp_path)
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


def test_tests_that_the_pages_name_exist():
    study = (ROOT / "records" / "studies" / "2026-11-27_Survival" / "README.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README + study))
    assert len(named) > 30
    assert [name for name in sorted(named) if f"def {name}(" not in tests] == []
