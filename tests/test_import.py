"""Tools and tests import the script, and newcomers read it from top to bottom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import train_gpt as tg

SOURCE = Path(tg.__file__).read_text(encoding="utf-8")
SECTIONS = ["Configuration", "Runtime", "Model", "Optimizer", "Data", "Score", "Training", "Artifact", "Main"]

IMPORT = """
import torch

def state():
    return (
        torch.initial_seed(),
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
    )

torch.manual_seed(5)
before = state()
import train_gpt

assert state() == before
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
"""


def test_import_has_no_side_effects(tmp_path):
    """No output, no file, no CUDA and no process group, torch as it was, and junk in the settings is not noticed."""
    junk = dict.fromkeys(("NUM_LAYERS", "WORLD_SIZE", "RANK", "PRESET", "NUM_LAYER"), "junk")
    env = {"PYTHONPATH": str(Path(tg.__file__).parent), **junk}
    done = subprocess.run([sys.executable, "-B", "-c", IMPORT], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_sections_stand_in_the_order_of_the_design():
    assert re.findall(r"^# \d\. (\w+)", SOURCE, re.MULTILINE) == SECTIONS


def test_no_pickle_and_no_eval_in_the_script():
    """An artifact is data, never code."""
    names = set()
    attributes = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.add(f"{node.value.id}.{node.attr}")
    assert not names & {"pickle", "marshal", "eval", "exec", "__import__"}
    assert not attributes & {"torch.load", "torch.save", "np.load"}
