"""Published shards: what has its final name is the published content, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import download
import numpy as np
import pytest
import sentencepiece as spm
from hub import Fault, Hub
from shards import read_shard, write_shard

import train_gpt as tg

SCRIPT = Path(download.__file__)
NAME = "fineweb10B_sp320"
ROOT = "datasets/"
FOLDER = f"datasets/{NAME}/"
SHARDS = ROOT + FOLDER  # in the repository
CHUNK = 10 * 2**20  # huggingface_hub writes that much at a time
BIG_TOKENS = 7_000_000  # a shard of 14 MB: more than one chunk


# A process that has imported the script and forks for every call of it, because the import takes half a second.
# It also shortens the pauses after a fault.
FORK_SERVER = """
import json, os, resource, sys
import download

download.BACKOFF_SECONDS = 0.01
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        for fd, path in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
        os.environ.update(job["env"])
        if job["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        download.main(job["arguments"])
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    """A call that has ended."""

    returncode: int
    stdout: str
    stderr: str


def shard(path: Path, tokens: np.ndarray) -> bytes:
    write_shard(path, tokens)
    return path.read_bytes()


@pytest.fixture(scope="module")
def tokenizer(train_tokenizer, documents) -> bytes:
    """It normalizes text as the published ones do, so it is not lossless."""
    return train_tokenizer(documents)


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer, documents) -> dict[str, bytes]:
    """A small repository in the published layout, with a second variant and files that nobody asks for."""
    folder = tmp_path_factory.mktemp("published")
    sp = spm.SentencePieceProcessor(model_proto=tokenizer)
    tokens = np.array([i for text in documents for i in [sp.bos_id(), *sp.encode(text)]], np.uint16)
    catalog = {
        "datasets": [{"name": NAME, "tokenizer_name": "sp_bpe_320", "stats": {"files_train": 9, "files_val": 1}}],
        "tokenizers": [
            {
                "name": "sp_bpe_320",
                "model_path": "tokenizers/fineweb_320_bpe.model",
                "vocab_path": "tokenizers/fineweb_320_bpe.vocab",
            }
        ],
    }
    files = {
        "README.md": b"# Shards\n",
        ROOT + "manifest.json": json.dumps(catalog).encode(),
        ROOT + "docs_selected.jsonl": b'{"text": "a"}\n',
        ROOT + "docs_selected.source_manifest.json": b'{"docs_sha256": ""}',
        ROOT + "tokenizers/fineweb_320_bpe.model": tokenizer,
        ROOT + "tokenizers/fineweb_320_bpe.vocab": b"<pad>\t0\n",
        ROOT + "tokenizers/fineweb_512_bpe.model": tokenizer + b"\0",
        ROOT + "datasets/fineweb10B_sp512/fineweb_val_000000.bin": shard(folder / "x.bin", tokens[:10]),
        SHARDS + "fineweb_val_000000.bin": shard(folder / "x.bin", tokens[:1000]),
        SHARDS + "notes.txt": b"not a shard",
    }
    for i in range(9):
        files[f"{SHARDS}fineweb_train_{i:06d}.bin"] = shard(folder / "x.bin", tokens[1000 + 500 * i : 1500 + 500 * i])
    return files


@pytest.fixture(scope="module")
def server(published) -> Iterator[Hub]:
    """One for all tests, because a process with huggingface_hub keeps the endpoint that it was started with."""
    with Hub(published) as server:
        yield server


@pytest.fixture
def hub(server, published) -> Hub:
    """The server as if it were new."""
    server.commit(published)
    server.faults.clear()
    server.declared_sizes.clear()
    server.mirrors.clear()
    server.log.clear()
    return server


@pytest.fixture(scope="module")
def environment(tmp_path_factory, server) -> dict[str, str]:
    home = str(tmp_path_factory.mktemp("home"))
    return {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": str(SCRIPT.parent),
        "HOME": home,
        "HF_HOME": home,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_ENDPOINT": server.endpoint,
        "MATCHED_FINEWEB_REPO_ID": server.repo,
    }


@pytest.fixture(scope="module")
def fork_server(tmp_path_factory, environment) -> Iterator[Callable[..., Done]]:
    """A function that runs the script with these arguments, additions to the environment, and a limit on file sizes."""
    folder = tmp_path_factory.mktemp("fork_server")
    process = subprocess.Popen(
        [sys.executable, "-c", FORK_SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def call(arguments: list[str], env: dict[str, str], file_limit: int = 0) -> Done:
        out, err = folder / "out", folder / "err"
        job = {"arguments": arguments, "env": env, "file_limit": file_limit, "out": str(out), "err": str(err)}
        print(json.dumps(job), file=process.stdin, flush=True)
        return Done(int(process.stdout.readline()), out.read_text(), err.read_text())

    yield call
    process.stdin.close()
    process.wait(10)


@pytest.fixture
def run(fork_server, hub, tmp_path) -> Callable[..., Done]:
    """A function that runs the script against the hub of the test, into tmp_path / "data"."""

    def call(*arguments: str, status: int = 0, file_limit: int = 0, **env: str) -> Done:
        done = fork_server(command(tmp_path, *arguments)[2:], env, file_limit)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--variant", "sp320", "--out", str(folder / "data"), *arguments]


@pytest.fixture(scope="module")
def finished(fork_server, server, published, tmp_path_factory) -> Path:
    """A folder with a finished download of 4 train shards."""
    folder = tmp_path_factory.mktemp("finished")
    server.commit(published)
    server.faults.clear()
    done = fork_server(command(folder, "--train-shards", "4")[2:], {})
    assert done.returncode == 0, done.stderr
    return folder / "data"


@pytest.fixture
def data(finished, tmp_path) -> Path:
    """A copy of the finished download that the test may damage."""
    return shutil.copytree(finished, tmp_path / "data")


def assert_published(folder: Path, published: dict[str, bytes], n_train: int) -> None:
    """The data set in `folder` has its `n_train` shards, and no file anywhere has another content than published."""
    for name in ["fineweb_val_000000.bin", *[f"fineweb_train_{i:06d}.bin" for i in range(n_train)]]:
        assert (folder / FOLDER / name).exists()
    assert len(list((folder / FOLDER).glob("fineweb_train_*.bin"))) == n_train
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(".download/") and name != FOLDER + "manifest.json":
            assert path.read_bytes() == published[ROOT + name], name


def big_shard(folder: Path, published: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
    """The repository with one large train shard instead of many. -> path of the shard, files"""
    name = SHARDS + "fineweb_train_000000.bin"
    files = {path: content for path, content in published.items() if "train" not in path}
    files[name] = shard(folder / "big.bin", np.arange(BIG_TOKENS) % 320)
    return name, files


def half_file(folder: Path, name: str, content: bytes) -> Path:
    """Where a download keeps what it has of a file so far."""
    place = name.removeprefix(ROOT).replace("/", "-")
    return folder / "data" / ".download" / f"{place}-sha256-{hashlib.sha256(content).hexdigest()}.part"


# --- Success ---


def test_layout_and_content(run, hub, published, tmp_path) -> None:
    done = run("--train-shards", "4", "--with-docs")
    assert_published(tmp_path / "data", published, 4)
    for name in ("manifest.json", "docs_selected.jsonl", "tokenizers/fineweb_320_bpe.vocab"):
        assert (tmp_path / "data" / name).exists()
    assert not list(tmp_path.rglob("*.part"))
    assert sorted(hub.fetched()) == sorted(set(hub.revisions[hub.sha]) & {ROOT + p for p in files_below(tmp_path)})
    assert f"dataset: {tmp_path / 'data' / FOLDER}".rstrip("/") in done.stdout


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder / "data").as_posix() for path in folder.rglob("*")}


def test_files_of_equal_content_do_not_share_a_half_file(run, hub, published, tmp_path) -> None:
    first, second = (SHARDS + f"fineweb_train_00000{i}.bin" for i in (0, 1))
    files = {**published, second: published[first]}
    hub.commit(files)
    run("--train-shards", "2")
    assert_published(tmp_path / "data", files, 2)


def test_second_run_fetches_nothing_and_more_shards_only_the_new_ones(run, hub, data, published) -> None:
    run("--train-shards", "4")
    assert hub.fetched() == []
    run("--train-shards", "5")
    assert hub.fetched() == [SHARDS + "fineweb_train_000004.bin"]
    assert_published(data, published, 5)


def test_fewer_shards_than_here_are_named(run, hub, data, published) -> None:
    """Training reads all shards of the folder, so the manifest has to speak of all."""
    assert "2 more train shards" in run("--train-shards", "2").stdout
    assert len(json.loads((data / FOLDER / "manifest.json").read_text())["splits"]["train"]["files"]) == 4
    assert hub.fetched() == []


def test_without_a_number_all_shards_come_up_to_the_published_default(run, published, tmp_path) -> None:
    run("--skip-manifest", "--jobs", "1")
    assert_published(tmp_path / "data", published, 9)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_the_manifest_is_one_that_training_accepts(finished, tokenizer, hub) -> None:
    folder = finished / FOLDER
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokenizer"] == {
        "file": "fineweb_320_bpe.model",
        "sha256": hashlib.sha256(tokenizer).hexdigest(),
        "vocab_size": 320,
        "lossless": False,
    }
    assert manifest["revision"] == hub.sha
    assert hub.repo in manifest["source"]
    val = read_shard(folder / "fineweb_val_000000.bin")
    assert manifest["splits"]["val"]["documents"] == np.count_nonzero(val == 1)
    assert manifest["splits"]["val"]["tokens"] == 1000
    assert manifest["splits"]["train"]["tokens"] == 4 * 500
    identity = tg.check_manifest(folder, [folder / "fineweb_val_000000.bin"], manifest["tokenizer"]["sha256"])
    assert identity == {"val_text_sha256": "unknown", "tokenizer_lossless": False}


@pytest.fixture
def mirrored(hub, published) -> Hub:
    """The repository of the challenge, which lacks sp8192, and the mirror that has it."""

    def renamed(path: str) -> str:
        return path.replace("sp320", "sp8192").replace("fineweb_320", "fineweb_8192")

    mirror = {renamed(path): content for path, content in published.items() if not path.endswith("/manifest.json")}
    hub.mirrors[download.MIRRORS["sp8192"]] = hub.commit(mirror)
    hub.mirrors[download.REPO_ID] = hub.commit(published)
    return hub


@pytest.mark.parametrize("variant", ["sp8192", "fineweb10B_sp8192"])
def test_a_variant_that_the_challenge_lacks_comes_from_its_mirror(run, mirrored, tmp_path, variant) -> None:
    done = run("--variant", variant, "--train-shards", "1", MATCHED_FINEWEB_REPO_ID="")
    assert f"has no {variant}. Taking it from kevclark/parameter-golf" in done.stdout
    assert "not signed" in done.stdout
    folder = tmp_path / "data" / "datasets" / "fineweb10B_sp8192"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "kevclark/parameter-golf" in manifest["source"]
    assert manifest["revision"] == mirrored.mirrors["kevclark/parameter-golf"]
    for split in manifest["splits"].values():
        for name, sha256 in split["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256


def test_what_the_challenge_has_does_not_come_from_a_mirror(run, mirrored, published, tmp_path) -> None:
    done = run("--train-shards", "1", MATCHED_FINEWEB_REPO_ID="")
    assert "mirror" not in done.stdout
    assert_published(tmp_path / "data", published, 1)


def test_a_repository_that_is_named_wins_over_the_mirror(run, mirrored, tmp_path) -> None:
    for settings in ({"MATCHED_FINEWEB_REPO_ID": mirrored.repo}, {"MATCHED_FINEWEB_REPO_ID": ""}):
        options = [] if settings["MATCHED_FINEWEB_REPO_ID"] else ["--repo", mirrored.repo]
        error = run("--variant", "sp8192", *options, status=1, **settings).stderr
        assert f"--variant='sp8192' is not in {mirrored.repo}" in error
    assert not (tmp_path / "data" / "datasets").exists()


def test_the_list_names_the_mirrors(run, mirrored) -> None:
    lines = run("--list", MATCHED_FINEWEB_REPO_ID="").stdout.splitlines()
    assert "elsewhere: sp8192, from the unsigned mirror kevclark/parameter-golf, with --variant sp8192" in lines


def test_a_hub_that_cannot_be_reached_leaves_nothing_to_continue(run, hub) -> None:
    hub.faults = {"/api": [Fault(500)] * download.ATTEMPTS}
    *hints, error = run(status=1).stderr.splitlines()
    assert error.endswith("check the network and run the command again")
    assert [hint.endswith("trying again") for hint in hints] == [True]


def test_the_last_line_trains_on_the_shards(run, hub, published, tmp_path) -> None:
    hub.commit({**published, SHARDS + "fineweb_train_000000.bin": shard(tmp_path / "x.bin", np.arange(3000) % 320)})
    *_, line = run("--train-shards", "1").stdout.splitlines()
    assert line.endswith(f"--preset=smoke --data_path={tmp_path / 'data' / FOLDER}".rstrip("/"))


def test_list_shows_what_the_repository_has(run, hub, tmp_path) -> None:
    lines = run("--list").stdout.splitlines()
    assert lines[0].startswith(hub.repo)
    assert [line.split()[:5] for line in lines if line.startswith("sp")] == [
        ["sp320", NAME, "9", "4,500", "1,000"],
        ["sp512", "fineweb10B_sp512", "0", "0", "10"],
    ]
    assert hub.fetched() == []
    assert not (tmp_path / "data").exists()


def test_root_from_the_environment(run, hub, published, tmp_path) -> None:
    """The repository without its folder `datasets`."""
    hub.commit({path.removeprefix(ROOT): content for path, content in published.items()})
    run("--train-shards", "1", MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="")
    assert_published(tmp_path / "data", published, 1)


def test_a_new_revision_replaces_what_changed(run, hub, data, published, tmp_path) -> None:
    first = hub.sha
    changed = {**published, SHARDS + "fineweb_val_000000.bin": shard(tmp_path / "x.bin", np.arange(700) % 320)}
    hub.commit(changed)
    run("--train-shards", "4")
    assert hub.fetched() == [SHARDS + "fineweb_val_000000.bin"]
    assert_published(data, changed, 4)
    run("--train-shards", "4", "--revision", first)
    assert_published(data, published, 4)


# --- Faults ---


def test_transient_faults_are_retried(run, hub, published, tmp_path) -> None:
    hub.faults = {
        "/api": [Fault(500), Fault(503)],
        SHARDS + "fineweb_train_000000.bin": [Fault(500), Fault(502)],
        SHARDS + "fineweb_train_000001.bin": [Fault(429)],
        SHARDS + "fineweb_val_000000.bin": [Fault(cut=100)],
        ROOT + "tokenizers/fineweb_320_bpe.vocab": [Fault(content=b"")],
        ROOT + "tokenizers/fineweb_320_bpe.model": [
            Fault(content=published[ROOT + "tokenizers/fineweb_320_bpe.model"] * 2)
        ],
    }
    run("--train-shards", "2")
    assert not any(hub.faults.values())
    assert_published(tmp_path / "data", published, 2)


def test_cut_files_are_continued(run, hub, published, tmp_path) -> None:
    """Also by a server that sends the whole file instead of the rest."""
    first, files = big_shard(tmp_path, published)
    second = first.replace("000000.bin", "000001.bin")
    files[second] = files[first][:-2] + b"\0\0"
    hub.commit(files)
    hub.faults = {first: [Fault(cut=CHUNK + 1_000_000)], second: [Fault(cut=CHUNK + 9), Fault(no_range=True)]}
    run()
    ranges = {name: [request.range for request in hub.log if request.path == name] for name in (first, second)}
    assert ranges[first] == ["", f"bytes={CHUNK}-"]
    assert ranges[second][:2] == ["", f"bytes={CHUNK}-"]
    assert_published(tmp_path / "data", files, 2)


def test_wrong_content_never_has_the_final_name(run, hub, published, tmp_path) -> None:
    name = SHARDS + "fineweb_train_000001.bin"
    wrong = bytearray(published[name])
    wrong[-1] ^= 1
    hub.faults[name] = [Fault(content=bytes(wrong))] * 2
    error = run("--train-shards", "2", status=1).stderr
    assert error.count("\n") == 1
    assert name in error
    assert hashlib.sha256(wrong).hexdigest() in error
    assert not (tmp_path / "data" / FOLDER / "fineweb_train_000001.bin").exists()
    assert not (tmp_path / "data" / FOLDER / "manifest.json").exists()
    hub.faults[name] = [Fault(content=bytes(wrong))]  # the second content is right
    run("--train-shards", "2")
    assert_published(tmp_path / "data", published, 2)


def test_a_data_set_that_is_not_complete_has_no_manifest(run, hub, data, published) -> None:
    hub.faults[SHARDS + "fineweb_train_000005.bin"] = [Fault(status=403)]
    assert "fineweb_train_000005.bin" in run("--train-shards", "6", "--jobs", "1", status=1).stderr
    assert (data / FOLDER / "fineweb_train_000004.bin").exists()
    assert not (data / FOLDER / "manifest.json").exists()
    assert "choose from what is there, nothing" in run("--offline", status=1).stderr


def test_damaged_files_are_found_and_fetched_again(run, hub, data, published) -> None:
    """Truncated, changed at the same size, removed. --verify also finds one whose size and time still look right."""
    truncated, changed, removed = (data / FOLDER / f"fineweb_train_{i:06d}.bin" for i in range(3))
    truncated.write_bytes(truncated.read_bytes()[:-7])
    changed.write_bytes(changed.read_bytes()[:-1] + b"\xff")
    removed.unlink()
    assert "3 files" in run("--offline", status=1).stderr
    run("--train-shards", "4")
    assert sorted(hub.fetched()) == [SHARDS + path.name for path in (truncated, changed, removed)]
    assert_published(data, published, 4)
    stat = changed.stat()
    changed.write_bytes(changed.read_bytes()[:-1] + b"\xff")
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run("--train-shards", "4", "--verify")
    assert_published(data, published, 4)


def test_without_its_memory_everything_is_hashed_again_and_nothing_fetched(run, hub, data, published) -> None:
    (data / ".download" / "state.json").write_text('{"datasets": 1')
    run("--train-shards", "4")
    assert hub.fetched() == []
    assert_published(data, published, 4)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_continued(run, hub, published, tmp_path, environment, how) -> None:
    name, files = big_shard(tmp_path, published)
    hub.commit(files)
    hub.faults[name] = [Fault(stall=CHUNK + 1_000_000)]
    process = subprocess.Popen(command(tmp_path), env=environment, stderr=subprocess.PIPE, text=True)
    part = half_file(tmp_path, name, files[name])
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= CHUNK):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if how == signal.SIGKILL:
        assert "another download" in run(status=1).stderr
    process.send_signal(how)
    _, error = process.communicate(timeout=10)  # an interrupted one must not wait for the server
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    assert "Traceback" not in error
    assert not (tmp_path / "data" / FOLDER / "manifest.json").exists()
    assert not (tmp_path / "data" / FOLDER / "fineweb_train_000000.bin").exists()
    hub.log.clear()
    run()
    assert [request.range for request in hub.log if request.path == name] == [f"bytes={CHUNK}-"]
    assert_published(tmp_path / "data", files, 1)


def test_a_damaged_half_file_does_not_survive(run, hub, published, tmp_path) -> None:
    name = SHARDS + "fineweb_train_000000.bin"
    part = half_file(tmp_path, name, published[name])
    part.parent.mkdir(parents=True)
    part.write_bytes(b"other bytes")
    stale = part.with_name("sha256-0.part")  # of a file that the repository no longer has
    stale.write_bytes(b"x")
    run("--train-shards", "1")
    assert [request.range for request in hub.log if request.path == name] == ["bytes=11-", ""]
    assert_published(tmp_path / "data", published, 1)
    assert not stale.exists()


# --- Disk ---


def test_a_disk_without_room_is_found_before_the_first_shard(run, hub, tmp_path) -> None:
    hub.declared_sizes[SHARDS + "fineweb_train_000001.bin"] = 10**17
    error = run("--train-shards", "2", status=1).stderr
    assert "100,000,000.0 GB" in error
    assert "--out" in error
    assert not [path for path in hub.fetched() if path.endswith(".bin")]


def test_a_write_that_fails_leaves_no_final_name(run, hub, published, tmp_path) -> None:
    """A limit on the size of files stands in for a full disk."""
    name, files = big_shard(tmp_path, published)
    hub.commit(files)
    assert "File too large" in run(status=1, file_limit=CHUNK // 2).stderr
    assert hub.fetched().count(name) == 1  # no other attempt: waiting does not make room
    assert not (tmp_path / "data" / FOLDER / "fineweb_train_000000.bin").exists()
    run()
    assert_published(tmp_path / "data", files, 1)


def test_a_disk_that_is_full_is_named_with_the_remedy(run, mount, published) -> None:
    folder = mount("size=1m", "data")
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    message = r".*/data.*: no space is left on the disk, make room or choose another --out, and run it again\n"
    assert re.fullmatch(message, run("--train-shards", "2", status=1).stderr)
    filler.unlink()
    run("--train-shards", "2")
    assert_published(folder, published, 2)


# --- Offline ---


def test_offline_verifies_without_the_network(run, hub, data) -> None:
    """Also in a folder copied from another machine, without the memory of this script: the manifest is enough."""
    assert "verified: 7 files" in run("--offline", "--train-shards", "4").stdout
    shutil.rmtree(data / ".download")
    # The manifest does not list the .vocab of the tokenizer.
    assert "verified: 6 files" in run("--offline").stdout
    path = data / FOLDER / "fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    assert "fineweb_val_000000.bin" in run("--offline", status=1).stderr
    assert hub.log == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--variant", "sp1024"], "choose from what is there, sp320"),
        (["--train-shards", "5"], "--train-shards=5 must be in 0..4"),
        (["--with-docs"], "--with-docs needs docs_selected.jsonl"),
        (["--list"], "--list asks the repository"),
        (["--jobs", "0"], "--jobs=0"),
    ],
)
def test_offline_says_what_is_not_here(data, arguments, error, capsys) -> None:
    with pytest.raises(SystemExit, match=error):
        download.main([*command(data.parent)[2:], "--offline", *arguments])


# --- Errors ---


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--variant", "sp1024"], "--variant='sp1024' is not in someone/shards"),
        (["--train-shards", "10"], "--train-shards=10 must be in 0..9"),
        (["--repo", "no/where"], "no/where at revision main does not exist or is not public"),
        (["--revision", "v9"], "at revision v9 does not exist"),
    ],
)
def test_errors_are_one_sentence_with_a_remedy(run, tmp_path, arguments, error) -> None:
    message = run(*arguments, status=1).stderr
    assert error in message
    assert message.count("\n") == 1
    assert not list(tmp_path.rglob("*.bin"))


def test_a_shard_of_another_data_set_is_not_trained_on(run, data) -> None:
    shutil.copy(data / FOLDER / "fineweb_val_000000.bin", data / FOLDER / "fineweb_val_000001.bin")
    assert "fineweb_val_000001.bin is not of this data set" in run(status=1).stderr


def test_a_file_that_is_no_shard_is_named(run, hub, published, tmp_path) -> None:
    hub.commit({**published, SHARDS + "fineweb_train_000000.bin": b"<html>" * 400})
    assert "is not a token shard" in run("--train-shards", "1", status=1).stderr
    assert not (tmp_path / "data" / FOLDER / "manifest.json").exists()


def test_help_can_be_shown(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        download.main(["--help"])
    assert "--train-shards" in capsys.readouterr().out


# --- Names ---


@pytest.mark.parametrize(
    ("variant", "names", "found"),
    [
        ("sp1024", {"fineweb10B_sp1024", "fineweb10B_sp1024_caseops"}, "fineweb10B_sp1024"),
        ("sp1024_caseops", {"fineweb10B_sp1024", "fineweb10B_sp1024_caseops"}, "fineweb10B_sp1024_caseops"),
        ("fineweb10B_sp1024", {"fineweb10B_sp1024", "edu_fineweb10B_sp1024"}, "fineweb10B_sp1024"),
        ("plain", {"plain"}, "plain"),
    ],
)
def test_variants_have_a_short_name_and_a_full_one(variant, names, found) -> None:
    assert download.find_dataset(variant, names, "here") == found


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a_sp1024", "b_sp1024"}, "names several data sets of here: choose from what is there, a_sp1024, b_sp1024"),
        (set(), "is not in here: choose from what is there, nothing"),
    ],
)
def test_a_variant_that_is_not_one_data_set_is_refused(names, message) -> None:
    with pytest.raises(ValueError, match=message):
        download.find_dataset("sp1024", names, "here")


TOKENIZERS = ["fineweb_1024_bpe.model", "fineweb_1024_bpe.vocab", "caseops_1024.model", "fineweb_pure_byte_260.json"]
TOKENIZER_FILES = {f"tokenizers/{name}": download.Item(f"tokenizers/{name}", 1, "git:0") for name in TOKENIZERS}


@pytest.mark.parametrize(
    ("dataset", "named", "stem"),
    [
        ("fineweb10B_sp1024", set(), "fineweb_1024_bpe"),
        ("fineweb10B_byte260", set(), "fineweb_pure_byte_260"),
        ("fineweb10B_sp1024", {"caseops_1024.model"}, "caseops_1024"),
        ("fineweb10B_sp1024", {"absent.model"}, "fineweb_1024_bpe"),
    ],
)
def test_the_tokenizer_is_the_named_one_or_that_of_the_same_size(dataset, named, stem) -> None:
    chosen = download.choose_tokenizer(TOKENIZER_FILES, dataset, named)
    assert {Path(item.path).stem for item in chosen} == {stem}
    assert not download.tokenizer_path(chosen).endswith(".vocab")


@pytest.mark.parametrize("dataset", ["fineweb10B_sp102", "plain"])
def test_a_data_set_whose_tokenizer_is_not_known_is_refused(dataset) -> None:
    with pytest.raises(ValueError, match="a manifest must say"):
        download.choose_tokenizer(TOKENIZER_FILES, dataset, set())


@pytest.mark.parametrize("catalog", [{}, {"datasets": {"sp": 1}}, {"datasets": [3], "tokenizers": None}])
def test_a_catalog_of_another_shape_is_no_evidence(catalog) -> None:
    assert download.named_tokenizer(catalog, "fineweb10B_sp1024") == set()
