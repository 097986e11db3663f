"""Tools and tests import the script, newcomers read it: importing is free, and the file keeps to its budgets."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(tg.__file__).read_text(encoding="utf-8")
SECTIONS = [
    "1. Configuration",
    "2. Model",
    "3. Optimizer",
    "4. Data",
    "5. Evaluation: bits per byte",
    "6. Artifact",
    "7. Training",
    "8. Main",
]


def test_import_has_no_side_effects(tmp_path):
    """No output, no CUDA, no process group, no file, and no reading of settings: junk in them is not noticed."""
    code = (
        "import train_gpt, torch; assert not torch.cuda.is_initialized(); assert not torch.distributed.is_initialized()"
    )
    junk = dict.fromkeys(("NUM_LAYERS", "WORLD_SIZE", "RANK", "PRESET", "NUM_LAYER"), "junk")
    run = subprocess.run(
        [sys.executable, "-B", "-c", code], env={"PYTHONPATH": str(ROOT), **junk}, capture_output=True, cwd=tmp_path
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_import_leaves_the_state_of_torch_alone(tmp_path):
    code = """
import torch
def state():
    return (torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
torch.manual_seed(5)
before = state(), torch.get_rng_state()
import train_gpt
assert state() == before[0] and torch.equal(torch.get_rng_state(), before[1])
"""
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_script_fits_its_budgets_of_lines_and_columns():
    lines = SOURCE.splitlines()
    assert len(lines) <= 1800
    assert [i for i, line in enumerate(lines, 1) if len(line) > 120] == []


def test_functions_fit_on_a_screen():
    functions = [n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert {name: n for name, n in lengths.items() if n > 60} == {}


def test_script_is_ascii():
    assert SOURCE.isascii()


def test_sections_are_those_of_the_contract_in_order():
    assert re.findall(r"^# -- (\d+\. .+?) -+$", SOURCE, re.MULTILINE) == SECTIONS


def test_no_pickle_and_no_eval_in_the_script():
    """An artifact is data, never code."""
    names = {n.id for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.Name)}
    attributes = {
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(ast.parse(SOURCE))
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    assert not names & {"pickle", "marshal", "eval", "exec", "__import__"}
    assert not attributes & {"torch.load", "torch.save", "np.load"}
