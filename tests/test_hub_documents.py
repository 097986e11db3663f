"""Documents of the Hub: the real `datasets` streams them from a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import build_shards
import huggingface_hub.constants
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


# The package takes seconds to import, so one process does several builds. -> for each one what it refused, or ""
BUILDS = """
import json, sys
import build_shards

messages = []
for arguments in json.loads(sys.argv[1]):
    try:
        build_shards.main(arguments)
        messages.append("")
    except SystemExit as stop:
        messages.append(str(stop.code))
print(json.dumps(messages))
"""


def build(endpoint: str, out: Path, *builds: list[str]) -> list[str]:
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(out / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(build_shards.__file__).parent),
    }
    common = ["--name", "toy", "--tokenizer", "byte260", "--out", str(out), "--overwrite"]
    command = [sys.executable, "-c", BUILDS, json.dumps([[*common, *arguments] for arguments in builds])]
    run = subprocess.run(command, env=env, cwd=out, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_documents_are_streamed_in_order_from_one_revision_and_what_is_absent_is_named(tmp_path: Path) -> None:
    with Hub(FILES, REPO) as hub:
        old = hub.sha
        hub.commit({**FILES, "sample/0.jsonl": jsonl(["newer"] * 25)})
        messages = build(
            hub.endpoint,
            tmp_path,
            ["--hub", REPO, "--hub-config", "sample", "--val-docs", "3", "--max-docs", "30", "--hub-revision", old],
            ["--hub", REPO, "--hub-config", "bad"],
            ["--hub", REPO, "--hub-config", "absent"],
            ["--hub", "no/such"],
        )
    assert messages[0] == ""
    manifest = json.loads((tmp_path / "datasets" / "toy" / "manifest.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (f"{REPO} sample", old)
    assert "ODC-By" in manifest["licence"]
    assert REPO in manifest["licence"]
    for split, texts in (("val", DOCUMENTS[:3]), ("train", DOCUMENTS[3:30])):
        raw = [text.encode() for text in texts]
        identity = hashlib.sha256(b"".join(len(r).to_bytes(8, "little") + r for r in raw)).hexdigest()
        assert manifest["splits"][split]["text_sha256"] == identity

    assert f"{REPO} row 0 has no string `text`" in messages[1]
    assert "'absent' not found. Available: ['sample', 'bad']" in messages[2]
    assert "no/such" in messages[3]


def test_an_unreachable_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=None))  # spare the import
    assert f"{REPO} cannot be read from http://127.0.0.1:9" in refusal(tmp_path)


@pytest.mark.parametrize("found", [None, types.ModuleType("datasets")])  # no package, or the folder data/datasets
def test_a_missing_package_is_named_with_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: types.ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", found)
    assert refusal(tmp_path) == "--hub needs the datasets package: pip install datasets"


def refusal(out: Path) -> str:
    with pytest.raises(SystemExit) as stop:
        build_shards.main(["--hub", REPO, "--name", "toy", "--out", str(out)])
    return str(stop.value.code)
