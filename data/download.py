"""Fetch published token shards from a Hugging Face dataset repository and prove that they are the published bytes.

    python data/download.py --variant sp1024 --train-shards 80   # shards, validation split and tokenizer
    python data/download.py --list                               # the variants and sizes that the repository has
    python data/download.py --variant sp1024 --offline           # no network: verify what is here

A call that was cut, by kill -9 too, is continued by the next one. Under --out (default: the folder of this script) it
writes, in the layout of the repository below its root,

    datasets/NAME/fineweb_{train,val}_%06d.bin   shards (data/shards.py), and byte sidecars where they are published
    datasets/NAME/manifest.json                  what was fetched from where; written last, absent while files change
    tokenizers/*, manifest.json                  the variant's tokenizer, the repository's list of its data sets
    docs_selected.*                              with --with-docs: the documents behind the shards
    .download/                                   half files, and what was hashed when
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import sentencepiece as spm
from documents import file_digest
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # the base of what is raised by the HTTP library below, whichever that is
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get  # hf_hub_download drops a half file when its process ends
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars
from shards import HEADER_BYTES, read_shard, write_whole
from tqdm import tqdm  # type: ignore[import-untyped]

REPO_ID = "willdepueoai/parameter-golf"
LICENCES = {REPO_ID: "FineWeb, ODC-By 1.0"}
DEFAULT_TRAIN_SHARDS = 80  # as in the published script
DOCS = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
SHARD_PATH = re.compile(r"datasets/\w[\w.-]*/fineweb_(?P<split>train|val|val_bytes)_[0-9]{6}\.bin")
OTHER_PATH = re.compile(r"manifest\.json|docs_selected\.[\w.]+|tokenizers/\w[\w.-]*|datasets/\w[\w.-]*/manifest\.json")
ATTEMPTS = 7  # at a request, while the fault may pass
BACKOFF_SECONDS = 0.5  # at most, before the second attempt; doubles from there
LOSSY_PROBES = ("a  b\n", " a", "\uff21\u00bd\ufb01")  # folded blanks, a leading one, NFKC
DEFAULT_BOS = 1  # where the tokenizer is not a SentencePiece model
T = TypeVar("T")


class Source(NamedTuple):
    """Where files come from. `revision` is a commit, so that all of them belong together."""

    repo: str
    root: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo} (folder {self.root!r}, revision {self.revision[:12]})"


class Item(NamedTuple):
    """A published file: its path below the root, the same as here, and what its bytes must be."""

    path: str
    size: int
    digest: str  # "sha256:<hex>", or "git:<hex>", the sha1 of a git blob, for a small file

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def split(self) -> str:
        """train, val or val_bytes for a shard, "" for other files."""
        match = SHARD_PATH.fullmatch(self.path)
        return match["split"] if match else ""

    @property
    def dataset(self) -> str:
        """The name of a shard's data set, "" for other files."""
        return self.path.split("/")[1] if self.split else ""


def human(n_bytes: int) -> str:
    """A size in decimal units."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"


# --- Files here ---


def item_digest(path: Path, kind: str) -> str:
    """The digest of a file as an Item has it; `kind` is sha256 or git."""
    if kind == "sha256":
        return f"sha256:{file_digest(path)}"
    content = path.read_bytes()
    blob = b"blob %d\0" % len(content) + content
    return f"git:{hashlib.sha1(blob, usedforsecurity=False).hexdigest()}"


class Store:
    """The folder that holds the files, with a memory of what was hashed: path -> [size, mtime_ns, digest]."""

    def __init__(self, out: Path, rehash: bool) -> None:
        self.out, self.rehash = out, rehash
        self.work = out / ".download"
        stamps = read_json(self.work / "state.json").items()  # without it everything is hashed again
        self.seen = {path: stamp for path, stamp in stamps if isinstance(stamp, list) and len(stamp) == 3}

    def part(self, item: Item) -> Path:
        """Where the first bytes of `item` lie: named by the content, so that no other content continues them."""
        return self.work / f"{item.digest.replace(':', '-')}.part"

    def holds(self, item: Item) -> bool:
        """Whether the file is here, whole and unchanged. Hashes it unless that was done since it was last written."""
        path = self.out / item.path
        if not path.is_file():
            return False
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, item.digest]
        if self.seen.get(item.path) == stamp and not self.rehash:
            return True
        if stat.st_size != item.size or item_digest(path, item.digest.partition(":")[0]) != item.digest:
            return False
        self.seen[item.path] = stamp
        return True

    def adopt(self, item: Item) -> None:
        """Give the verified part of `item` its final name."""
        part, path = self.part(item), self.out / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        if item.split:
            (path.parent / "manifest.json").unlink(missing_ok=True)
        os.replace(part, path)
        stat = path.stat()
        self.seen[item.path] = [stat.st_size, stat.st_mtime_ns, item.digest]

    def save(self) -> None:
        seen = dict(self.seen)  # a copy: threads write to the original
        write_whole(self.work / "state.json", json.dumps(seen, indent=0).encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# --- The Hub ---


def is_transient(error: Exception) -> bool:
    """Whether another attempt may help: not after a refusal of the server, a fault of this disk or HF_HUB_OFFLINE=1."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    of_network = isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) is None
    return of_network and not isinstance(error, OfflineModeIsEnabled)


def with_retries(what: str, call: Callable[[], T]) -> T:
    """`call()`, again after transient faults, with growing pauses. Raises an OSError of one sentence about `what`."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            remedy = "check --repo and --revision, or set HF_TOKEN"
            raise OSError(f"{what} does not exist or is not public: {remedy}") from error
        except (HTTPError, OSError) as error:
            transient = is_transient(error)
            if transient and attempt + 1 < ATTEMPTS:
                time.sleep(BACKOFF_SECONDS * 2**attempt * random.uniform(0.5, 1))  # not all threads at once
                continue
            fault = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
            remedy = "run the same command again to continue" if transient else "remove the cause and run it again"
            raise OSError(f"{what} could not be fetched ({fault}): {remedy}") from error
    raise AssertionError("the last attempt returns or raises")


def list_files(repo: str, root: str, revision: str) -> tuple[Source, dict[str, Item]]:
    """The commit that `revision` names now, and the files of it that this script knows, by path below the root."""
    api, what = HfApi(), f"the dataset repository {repo} at revision {revision}"
    sha = with_retries(what, lambda: api.dataset_info(repo, revision=revision).sha)
    if not sha:
        raise ValueError(f"{what} has no commit: check HF_ENDPOINT")
    tree = with_retries(what, lambda: [*api.list_repo_tree(repo, recursive=True, revision=sha, repo_type="dataset")])
    prefix = f"{root}/" if root else ""
    files = {}
    for entry in tree:
        path = entry.path.removeprefix(prefix)
        known = SHARD_PATH.fullmatch(path) or OTHER_PATH.fullmatch(path)
        if known and isinstance(entry, RepoFile) and entry.path.startswith(prefix):
            digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
            files[path] = Item(path, entry.size, digest)
    return Source(repo, root, sha), files


class PartFile(io.BufferedWriter):
    """Appends to a half file and moves the progress bar."""

    def __init__(self, path: Path, bar: tqdm) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self.bar = bar

    def write(self, chunk: Any) -> int:
        self.bar.update(len(chunk))
        return super().write(chunk)


def fetch(source: Source, item: Item, part: Path, bar: tqdm) -> None:
    """Make `part` the whole, verified content of `item`, going on where an earlier call was cut."""
    remote = f"{source.root}/{item.path}" if source.root else item.path
    url = hf_hub_url(source.repo, remote, repo_type="dataset", revision=source.revision)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}

    def discard() -> None:
        bar.update(-part.stat().st_size)
        part.unlink()

    def continue_part() -> None:
        with PartFile(part, bar) as file:
            size = file.tell()
            if size < item.size:
                http_get(url, file, resume_size=size, headers=headers)
        size = part.stat().st_size
        if size > item.size:
            discard()
        if size != item.size:
            raise OSError(f"{size} of {item.size} bytes arrived")

    for _ in range(2):  # the first content may be what became of the part of an earlier call
        with_retries(f"{remote} of {source.repo}", continue_part)
        digest = item_digest(part, item.digest.partition(":")[0])
        if digest == item.digest:
            return
        discard()
    raise ValueError(f"{remote} of {source.repo} arrived as {digest}, not {item.digest}: try later or elsewhere")


def bring(store: Store, source: Source, items: list[Item], jobs: int) -> None:
    """Fetch, in parallel, those of `items` that are not here, whole and unchanged.

    After a failure the files under way are finished and no other is begun. Raises OSError before the first byte if the
    disk has no room for the last one.
    """
    pool = ThreadPoolExecutor(jobs)  # not as a context: after Ctrl-C that would wait for the network
    held = tqdm(pool.map(store.holds, items), "verify", len(items), unit=" files", disable=None, leave=False)
    missing = [item for item, is_here in zip(items, held, strict=True) if not is_here]
    total = sum(item.size for item in missing)
    begun = sum(part.stat().st_size for part in map(store.part, missing) if part.exists())
    store.save()
    free = shutil.disk_usage(store.work).free
    if total - begun > free:
        need = f"{len(missing)} files need {human(total - begun)} more"
        remedy = "make room, choose another --out or lower --train-shards"
        raise OSError(f"--out={store.out} has {human(free)} free, but {need}: {remedy}")
    with tqdm(total=total, initial=begun, desc="fetch", unit="B", unit_scale=True, disable=None) as bar:

        def bring_one(item: Item) -> None:
            fetch(source, item, store.part(item), bar)
            store.adopt(item)

        try:
            for future in as_completed([pool.submit(bring_one, item) for item in missing]):
                future.result()  # raises what the thread raised
                store.save()
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            store.save()
    pool.shutdown()


# --- What belongs to a variant ---


def short_name(dataset: str) -> str:
    """fineweb10B_sp1024 -> sp1024"""
    return dataset.partition("_")[2] or dataset


def find_dataset(variant: str, names: set[str], where: str) -> str:
    """The data set that `variant` names, in full or without its first word. Raises ValueError that lists the names."""
    found = names & {variant} or {name for name in names if short_name(name) == variant}
    if len(found) == 1:
        return found.pop()
    fault = "names several data sets of" if found else "is not in"
    known = ", ".join(sorted(found or map(short_name, names))) or "nothing"
    raise ValueError(f"--variant={variant!r} {fault} {where}: choose from what is there, {known}")


def choose_shards(files: dict[str, Item], dataset: str, n_train: int | None, folder: Path) -> list[Item]:
    """The validation split, the first `n_train` train shards (None: as published) and those that are here already.

    The last because training reads every shard in the folder; so one that the repository lacks is an error.
    """
    shards = {item.name: item for path, item in sorted(files.items()) if item.dataset == dataset}
    train = [name for name, item in shards.items() if item.split == "train"]
    if n_train is not None and not 0 <= n_train <= len(train):
        raise ValueError(f"--train-shards={n_train} must be in 0..{len(train)}: {dataset} has no more")
    wanted = train[: DEFAULT_TRAIN_SHARDS if n_train is None else n_train]
    for number, name in enumerate(wanted):
        if name != f"fineweb_train_{number:06d}.bin":
            raise ValueError(f"{dataset} has no fineweb_train_{number:06d}.bin: ask for --train-shards {number}")
    here = {path.name for path in folder.glob("fineweb_*.bin")}
    for name in sorted(here - set(shards)):
        raise ValueError(f"{folder / name} is not of this data set, but training would read it: move it away")
    more = here & set(train) - set(wanted)
    if more:
        print(f"note: training also reads the {len(more)} more train shards in {folder}: move them away to use fewer")
    return [item for name, item in shards.items() if item.split != "train" or name in {*wanted, *more}]


def choose_tokenizer(files: dict[str, Item], dataset: str, named: set[str]) -> list[Item]:
    """The tokenizer's files: those that a manifest names, else those with the vocabulary size of its name."""
    available = {path: Path(path).stem for path in sorted(files) if path.startswith("tokenizers/")}
    stems = {Path(name).stem for name in named} & set(available.values())
    size = re.search(r"_(?:sp|byte)([0-9]+)", dataset)
    if size and not stems:
        stems = {stem for stem in available.values() if re.search(rf"_{size[1]}(_|$)", stem)}
        stems = stems & {f"fineweb_{size[1]}_bpe"} or stems
    if len(stems) != 1:
        raise ValueError(f"{dataset} needs one tokenizer: a manifest must say which of {list(available)} it is")
    return [files[path] for path, stem in available.items() if stem in stems]


def named_tokenizer(catalog: dict[str, Any], dataset: str) -> set[str]:
    """The tokenizer's files by the repository's own manifest; empty where it is silent or has another shape."""

    def entry(kind: str, name: Any) -> dict[str, Any]:
        entries = catalog.get(kind)
        entries = entries if isinstance(entries, list) else []
        return next((entry for entry in entries if isinstance(entry, dict) and entry.get("name") == name), {})

    tokenizer = entry("tokenizers", entry("datasets", dataset).get("tokenizer_name"))
    return {Path(str(tokenizer[key])).name for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)}


def choose_files(args: argparse.Namespace, files: dict[str, Item], dataset: str, named: set[str]) -> list[Item]:
    """All files that the arguments ask for."""
    shards = choose_shards(files, dataset, args.train_shards, args.out / "datasets" / dataset)
    absent = [path for path in DOCS if args.with_docs and path not in files]
    if absent:
        raise ValueError(f"--with-docs needs {' and '.join(absent)}, which the repository lacks: leave it out")
    return shards + choose_tokenizer(files, dataset, named) + [files[path] for path in DOCS if args.with_docs]


# --- Manifest ---


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of one data set in the format of data/README.md; {} where there is none."""
    manifest = read_json(path)
    try:
        files = [dict(manifest["splits"][split]["files"]) for split in ("train", "val")]
        whole = manifest["format"] == 1 and files[1] and all(manifest["tokenizer"][key] for key in ("file", "sha256"))
    except (KeyError, TypeError, ValueError):
        return {}
    return manifest if whole else {}


def tokenizer_path(items: list[Item]) -> str:
    """Of the tokenizer's files the one that encodes, not its .vocab."""
    paths = (item.path for item in items if item.path.startswith("tokenizers/"))
    return min(paths, key=lambda path: path.endswith(".vocab"))


def describe_tokenizer(path: Path) -> tuple[dict[str, Any], int]:
    """The entry of a tokenizer in a manifest, and its BOS.

    A text that does not come back proves it lossy; only the documents, which are not here, could prove the contrary.
    """
    entry: dict[str, Any] = {"file": path.name, "sha256": file_digest(path)}
    if path.suffix != ".model":
        vocab_size = read_json(path).get("vocab_size", "unknown")
        return {**entry, "vocab_size": vocab_size, "lossless": "unknown"}, DEFAULT_BOS
    sp = spm.SentencePieceProcessor(model_proto=path.read_bytes())
    lossy = any(sp.decode(sp.encode(text)) != text for text in LOSSY_PROBES)
    return {**entry, "vocab_size": sp.get_piece_size(), "lossless": False if lossy else "unknown"}, sp.bos_id()


def describe_split(
    folder: Path, files: dict[str, str], bos_id: int | None, published: dict[str, Any]
) -> dict[str, Any]:
    """The entry of a split in a manifest, with what the repository's own one says of the same files.

    Documents are counted where `bos_id` is given. Raises ValueError for a file that is no shard or contradicts it.
    """
    theirs = published.get("files", files)
    for name, sha256 in files.items():
        if theirs.get(name) != sha256:
            raise ValueError(f"{folder / name} contradicts the manifest of its repository: ask its owner to repair it")
    shards = [read_shard(folder / name) for name in files if "_bytes_" not in name]
    entry: dict[str, Any] = dict.fromkeys(("documents", "tokens", "bytes", "text_sha256"), "unknown")
    if bos_id is not None:
        entry["documents"] = sum(int((shard == bos_id).sum()) for shard in shards)
    known = published if theirs.keys() == files.keys() else {}
    return {**entry, **known, "tokens": sum(shard.size for shard in shards), "files": files}


def write_manifest(store: Store, source: Source, dataset: str, items: list[Item], published: dict[str, Any]) -> None:
    """Say what lies in the folder of a data set and where it comes from, in the format of data/README.md."""
    folder = store.out / "datasets" / dataset
    tokenizer, bos_id = describe_tokenizer(store.out / tokenizer_path(items))
    if published and published["tokenizer"]["sha256"] != tokenizer["sha256"]:
        raise ValueError(f"{tokenizer['file']} contradicts the manifest of {dataset}: ask the owner of {source.repo}")
    splits = {}
    for split in ("train", "val"):
        files = {}
        for item in items:
            if item.split.startswith(split):
                kind, _, sha256 = item.digest.partition(":")
                files[item.name] = sha256 if kind == "sha256" else file_digest(folder / item.name)
        theirs = published.get("splits", {}).get(split, {})
        countable = bos_id if split == "val" else None  # train is too long to be read through
        splits[split] = describe_split(folder, files, countable, theirs)
    manifest = {
        "format": 1,
        "name": dataset,
        "source": f"Hugging Face dataset {source.repo}, folder {source.root!r}",
        "revision": source.revision,
        "licence": LICENCES.get(source.repo) or published.get("licence", "unknown"),
        "tool": "data/download.py",
        "tokenizer": {**tokenizer, **published.get("tokenizer", {})},
        "splits": splits,
    }
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


# --- Main ---


def download(args: argparse.Namespace, store: Store) -> tuple[str, list[Item]]:
    """Bring what is asked for to the state of the repository. -> the data set, its files"""
    source, files = list_files(args.repo, args.root, args.revision)
    dataset = find_dataset(args.variant, {item.dataset for item in files.values()} - {""}, str(source))
    named: set[str] = set()
    published: dict[str, Any] = {}
    if "manifest.json" in files and not args.skip_manifest:
        bring(store, source, [files["manifest.json"]], 1)
        named = named_tokenizer(read_json(args.out / "manifest.json"), dataset)
    if own := files.get(f"datasets/{dataset}/manifest.json"):
        with tqdm(disable=True) as bar:
            fetch(source, own, store.part(own), bar)  # stays a part: ours takes its place
        published = read_manifest(store.part(own))
        named = {str(published["tokenizer"]["file"])} if published else named
    items = choose_files(args, files, dataset, named)
    bring(store, source, items, args.jobs)
    write_manifest(store, source, dataset, items, published)
    for part in set(store.work.glob("*.part")) - {store.part(item) for item in files.values()}:
        part.unlink()  # of a file that the repository has replaced
    return dataset, items


def check_offline(args: argparse.Namespace, store: Store) -> tuple[str, list[Item]]:
    """Compare what is here with its manifest, and what that omits with what the Hub said. -> the data set, its files

    Raises ValueError that names each file that is absent or changed.
    """
    finished = {path.parent.name: path for path in args.out.glob("datasets/*/manifest.json")}
    dataset = find_dataset(args.variant, set(finished), f"the finished downloads of {args.out}")
    manifest = read_manifest(finished[dataset])
    if not manifest:
        raise ValueError(f"{finished[dataset]} is not a manifest of format 1: run again without --offline")
    promised = {f"tokenizers/{manifest['tokenizer']['file']}": manifest["tokenizer"]["sha256"]}
    for split in manifest["splits"].values():
        promised |= {f"datasets/{dataset}/{name}": sha256 for name, sha256 in split["files"].items()}
    files = {path: Item(path, size, digest) for path, (size, _, digest) in store.seen.items()}
    for path, sha256 in promised.items():
        file = args.out / path
        files[path] = Item(path, file.stat().st_size if file.exists() else 0, f"sha256:{sha256}")
    items = choose_files(args, files, dataset, {manifest["tokenizer"]["file"]})
    progress = tqdm(items, "verify", unit=" files", disable=None, leave=False)
    bad = [item.path for item in progress if not store.holds(item)]
    with suppress(OSError):  # a folder that cannot be written can still be verified
        store.save()
    if bad:
        names = ", ".join(bad)
        raise ValueError(f"{len(bad)} files in {args.out} are absent or changed: run without --offline to get {names}")
    return dataset, items


def print_list(source: Source, files: dict[str, Item]) -> None:
    """What the repository has, counted from its files: what a manifest promises may not be there."""
    print(source)
    line = "{:<20} {:<32} {:>12} {:>15} {:>13} {:>12}".format
    print(line("variant", "data set", "train shards", "train tokens", "val tokens", "size"))
    for dataset in sorted({item.dataset for item in files.values()} - {""}):
        items = [item for item in files.values() if item.dataset == dataset]
        train, val = ([item.size for item in items if item.split == split] for split in ("train", "val"))
        tokens = [f"{sum(size - HEADER_BYTES for size in sizes) // 2:,}" for sizes in (train, val)]
        print(line(short_name(dataset), dataset, len(train), *tokens, human(sum(item.size for item in items))))
    print("tokenizers:", ", ".join(sorted(path.split("/")[1] for path in files if path.startswith("tokenizers/"))))
    print("documents:", ", ".join(f"{path} ({human(files[path].size)})" for path in DOCS if path in files) or "none")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="sp1024", help="sp1024, byte260 ... or the full name of a data set")
    parser.add_argument("--train-shards", type=int, metavar="N", help=f"default: up to {DEFAULT_TRAIN_SHARDS}")
    parser.add_argument("--with-docs", action="store_true", help="also the documents behind the shards")
    parser.add_argument("--skip-manifest", action="store_true", help="do without the repository's list of data sets")
    parser.add_argument("--list", action="store_true", help="show what the repository has and fetch nothing")
    parser.add_argument("--offline", action="store_true", help="verify what is here, without the network")
    parser.add_argument("--verify", action="store_true", help="hash every file, also if it looks unchanged")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="holds datasets/ and tokenizers/")
    parser.add_argument("--jobs", type=int, default=8, metavar="N", help="files at a time (default: 8)")
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID", REPO_ID)
    parser.add_argument("--repo", default=repo, help=f"default: MATCHED_FINEWEB_REPO_ID, else {REPO_ID}")
    root = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")
    parser.add_argument("--root", default=root, help="default: MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, else datasets")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    args = parser.parse_args(argv)
    args.root = args.root.strip("/")
    return args


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask for and say where the result lies."""
    if args.jobs < 1:
        raise ValueError(f"--jobs={args.jobs} must be 1 or more")
    if args.list and args.offline:
        raise ValueError("--list asks the repository: leave out --offline")
    if args.list:
        print_list(*list_files(args.repo, args.root, args.revision))
        return
    store = Store(args.out, args.verify)
    if args.offline:
        dataset, items = check_offline(args, store)
    else:
        store.work.mkdir(parents=True, exist_ok=True)
        (store.work / ".gitignore").write_text("*\n")
        with ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(store.work / "lock", timeout=0.1))
            except TimeoutError:
                raise OSError(f"another download writes to {args.out}: wait for it or end it") from None
            dataset, items = download(args, store)
    folder = args.out / "datasets" / dataset
    n_train = sum(item.split == "train" for item in items)
    print(f"verified: {len(items)} files, {human(sum(item.size for item in items))}, {n_train} train shards")
    print(f"tokenizer: {args.out / tokenizer_path(items)}")
    print(f"dataset: {folder}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    disable_progress_bars()  # of huggingface_hub: one bar per file would hide ours
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to continue", file=sys.stderr, flush=True)
        os._exit(130)  # sys.exit would wait for the threads, and these for the network


if __name__ == "__main__":
    main()
