"""Documents of the Hub: the real `datasets` streams them from a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import build_shards
import pytest
from hub import Hub

pytest.importorskip("datasets")

DOCUMENTS = [f"The cat, number {i}, sat on the mat." for i in range(40)]
CARD = """---
configs:
- config_name: sample
  data_files: sample/*.jsonl
- config_name: bad
  data_files: bad/*.jsonl
---
"""
REPO = "HuggingFaceFW/fineweb"


def jsonl(documents: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(documents)).encode()


FILES = {
    "README.md": CARD.encode(),
    "sample/0.jsonl": jsonl(DOCUMENTS[:25]),
    "sample/1.jsonl": jsonl(DOCUMENTS[25:]),
    "bad/0.jsonl": jsonl(DOCUMENTS, "content"),
}


def build(endpoint: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(out / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, build_shards.__file__, "--name", "toy", "--tokenizer", "byte260", "--out", str(out)]
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, check=False, timeout=60)


def test_documents_are_streamed_in_order_from_one_revision(tmp_path: Path) -> None:
    with Hub(FILES, REPO) as hub:
        old = hub.sha
        hub.commit({**FILES, "sample/0.jsonl": jsonl(["newer"] * 25)})
        arguments = ["--hub", REPO, "--hub-config", "sample", "--val-docs", "3", "--max-docs", "30"]
        run = build(hub.endpoint, tmp_path, *arguments, "--hub-revision", old)
    assert run.returncode == 0, run.stderr
    manifest = json.loads((tmp_path / "datasets" / "toy" / "manifest.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (f"{REPO} sample", old)
    assert "ODC-By" in manifest["licence"]
    assert REPO in manifest["licence"]
    for split, texts in (("val", DOCUMENTS[:3]), ("train", DOCUMENTS[3:30])):
        raw = [text.encode() for text in texts]
        identity = hashlib.sha256(b"".join(len(r).to_bytes(8, "little") + r for r in raw)).hexdigest()
        assert manifest["splits"][split]["text_sha256"] == identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hub", REPO, "--hub-config", "bad"], f"{REPO} row 0 has no string `text`"),
        (["--hub", REPO, "--hub-config", "absent"], "'absent' not found. Available: ['sample', 'bad']"),
        (["--hub", "no/such"], "no/such"),
    ],
)
def test_what_the_hub_does_not_have_is_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    with Hub(FILES, REPO) as hub:
        run = build(hub.endpoint, tmp_path, *arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_an_unreachable_hub_is_named(tmp_path: Path) -> None:
    run = build("http://127.0.0.1:9", tmp_path, "--hub", REPO)
    assert run.returncode == 1
    assert f"{REPO} cannot be read from http://127.0.0.1:9" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("found", ["None", "type(sys)('datasets')"])  # nothing, or the folder data/datasets
def test_a_missing_package_is_named_with_its_install_command(tmp_path: Path, found: str) -> None:
    code = f"import sys; sys.modules['datasets'] = {found}; import build_shards; build_shards.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--hub", REPO, "--name", "toy", "--out", tmp_path]
    folder = Path(build_shards.__file__).parent
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert run.returncode == 1
    assert run.stderr.strip() == "--hub needs the datasets package: pip install datasets"
