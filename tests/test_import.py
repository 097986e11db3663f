"""Tools and tests import the script: importing is free, and an artifact can never be code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(tg.__file__).read_text(encoding="utf-8")


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
