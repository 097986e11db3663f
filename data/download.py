"""Fetch published token shards from a Hugging Face dataset repository and prove that they are the published bytes.

    python data/download.py --variant sp1024 --train-shards 80   # shards, validation split and tokenizer
    python data/download.py --variant sp8192                     # from a mirror, because the challenge has none
    python data/download.py --list                               # the variants and sizes that the repository has
    python data/download.py --variant sp1024 --offline           # no network: verify what is here

A download that was interrupted, even by kill -9, is continued when the same command runs again. The script writes to
--out, by default the folder that it is in, with the layout that the repository has below its root:

    datasets/NAME/fineweb_{train,val}_%06d.bin   shards (data/shards.py), and byte sidecars where they are published
    datasets/NAME/manifest.json                  what was fetched from where; written last, absent while files change
    tokenizers/*                                 the tokenizer of the variant
    manifest.json                                the repository's list of its data sets
    docs_selected.*                              with --with-docs: the documents behind the shards
    .download/                                   half files, and a note of which files were hashed when
"""

from __future__ import annotations

import argparse
import errno
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
from commands import print_commands
from documents import file_digest
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # the base class of what the HTTP library raises, whichever library that is
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get  # hf_hub_download would drop a half file when its process ends
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars
from shards import HEADER_BYTES, read_shard, write_whole
from tqdm import tqdm  # type: ignore[import-untyped]

REPO_ID = "willdepueoai/parameter-golf"
# Where variants are that the repository of the challenge lacks. Members of the community made them; the authors of the
# challenge have neither signed nor checked them.
MIRRORS = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
LICENCES = dict.fromkeys([REPO_ID, *MIRRORS.values()], "FineWeb, ODC-By 1.0")
DEFAULT_TRAIN_SHARDS = 80  # as in the published script
DOCS = ("docs_selected.jsonl", "docs_selected.source_manifest.json")

# The files of a repository that this script knows.
SHARD_PATH = re.compile(r"datasets/\w[\w.-]*/fineweb_(?P<split>train|val|val_bytes)_[0-9]{6}\.bin")
OTHER_PATH = re.compile(r"manifest\.json|docs_selected\.[\w.]+|tokenizers/\w[\w.-]*")

# A request is repeated while its fault may pass. The pauses double, starting from at most BACKOFF_SECONDS.
ATTEMPTS = 7
BACKOFF_SECONDS = 0.5

# A tokenizer is lossy if one of these does not come back: it folds blanks, drops a leading one, or applies NFKC.
LOSSY_PROBES = ("a  b\n", " a", "\uff21\u00bd\ufb01")
# The BOS of a tokenizer that is not a SentencePiece model.
DEFAULT_BOS = 1
T = TypeVar("T")


class Source(NamedTuple):
    """Where files come from. The revision is a commit, so that all files belong together."""

    repo: str
    root: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo} (folder {self.root!r}, revision {self.revision[:12]})"


class Item(NamedTuple):
    """A published file and what its bytes must be.

    path    below the root of the repository, and below --out
    digest  "sha256:<hex>", or for a small file "git:<hex>", which is the sha1 of a git blob
    """

    path: str
    size: int
    digest: str

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def digest_kind(self) -> str:
        return self.digest.partition(":")[0]

    @property
    def split(self) -> str:
        """train, val or val_bytes for a shard, "" for other files."""
        match = SHARD_PATH.fullmatch(self.path)
        return match["split"] if match else ""

    @property
    def dataset(self) -> str:
        """The data set that a shard belongs to, "" for other files."""
        return self.path.split("/")[1] if self.split else ""


def human(n_bytes: int) -> str:
    """The size in MB or GB, in decimal units."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"


# --- Local files ---


def item_digest(path: Path, kind: str) -> str:
    """The digest of a file as an Item states it. The kind is sha256 or git."""
    if kind == "sha256":
        return f"sha256:{file_digest(path)}"
    content = path.read_bytes()
    blob = b"blob %d\0" % len(content) + content
    return f"git:{hashlib.sha1(blob, usedforsecurity=False).hexdigest()}"


class Store:
    """The folder that holds the files.

    stamps  path -> [size, mtime_ns, digest] of the file when it was last hashed; kept in a file between calls
    """

    def __init__(self, out: Path, rehash: bool) -> None:
        self.out = out
        self.rehash = rehash
        self.work = out / ".download"
        # If the file is lost or damaged, everything is hashed again.
        stamps = read_json(self.work / "state.json")
        self.stamps = {path: stamp for path, stamp in stamps.items() if isinstance(stamp, list) and len(stamp) == 3}

    def part(self, item: Item) -> Path:
        """The half file of an item, named after place and content.

        The content, so that no other content is appended to it; the place, because two files may have equal content.
        """
        return self.work / f"{item.path.replace('/', '-')}-{item.digest.replace(':', '-')}.part"

    def holds(self, item: Item) -> bool:
        """Whether the file is here, whole and unchanged. Hashes it, unless that was done since it was last written."""
        path = self.out / item.path
        if not path.is_file():
            return False

        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, item.digest]
        if self.stamps.get(item.path) == stamp and not self.rehash:
            return True
        if stat.st_size != item.size or item_digest(path, item.digest_kind) != item.digest:
            return False
        self.stamps[item.path] = stamp
        return True

    def adopt(self, item: Item) -> None:
        """Give the finished and verified half file of an item its final name."""
        part = self.part(item)
        path = self.out / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("rb") as file:
            # Without this, a power cut may leave the name without the content.
            os.fsync(file.fileno())
        if item.split:
            # The manifest does not describe the new shard.
            (path.parent / "manifest.json").unlink(missing_ok=True)
        os.replace(part, path)

        stat = path.stat()
        self.stamps[item.path] = [stat.st_size, stat.st_mtime_ns, item.digest]

    def save(self) -> None:
        # Threads may add to the original while it is written.
        stamps = dict(self.stamps)
        write_whole(self.work / "state.json", json.dumps(stamps, indent=0).encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or {} if there is no such file or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# --- The Hub ---


def is_transient(error: Exception) -> bool:
    """Whether another attempt may help: not if the server refuses, the disk is at fault or HF_HUB_OFFLINE=1."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # Errors of the disk have a number; those of the HTTP library have none.
    return isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) is None


def with_retries(what: str, call: Callable[[], T], remedy: str) -> T:
    """Return `call()`, repeating it after faults that may pass.

    Raises OSError, in one sentence about `what`, which ends with `remedy` if another try may help.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise OSError(
                f"{what} does not exist or is not public: check --repo and --revision, or set HF_TOKEN"
            ) from error
        except (HTTPError, OSError) as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
            if not is_transient(error):
                raise OSError(f"{what} could not be fetched ({reason}): remove the cause and run it again") from error
            if attempt == ATTEMPTS:
                raise OSError(f"{what} could not be fetched ({reason}): {remedy}") from error
            if attempt == 1:
                tqdm.write(f"{what} could not be fetched ({reason}): trying again", file=sys.stderr)
            # The pause is partly random, so that the threads do not all come back at the same moment.
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1))
    raise AssertionError("the last attempt returns or raises")


def list_files(repo: str, root: str, revision: str) -> tuple[Source, dict[str, Item]]:
    """The commit that `revision` names now, and those of its files that this script knows, by path below the root."""
    api = HfApi()
    what = f"the dataset repository {repo} at revision {revision}"
    # Nothing is here yet that could be continued.
    remedy = "check the network and run the command again"
    sha = with_retries(what, lambda: api.dataset_info(repo, revision=revision).sha, remedy)
    if not sha:
        raise ValueError(f"{what} has no commit: check HF_ENDPOINT")
    tree = with_retries(
        what, lambda: [*api.list_repo_tree(repo, recursive=True, revision=sha, repo_type="dataset")], remedy
    )

    prefix = f"{root}/" if root else ""
    files = {}
    for entry in tree:
        if not (isinstance(entry, RepoFile) and entry.path.startswith(prefix)):
            continue
        path = entry.path.removeprefix(prefix)
        if SHARD_PATH.fullmatch(path) or OTHER_PATH.fullmatch(path):
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
    """Fetch the item into the half file `part` and verify it, going on from what the half file already holds."""
    remote = f"{source.root}/{item.path}" if source.root else item.path
    url = hf_hub_url(source.repo, remote, repo_type="dataset", revision=source.revision)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}

    def discard_part() -> None:
        bar.update(-part.stat().st_size)
        part.unlink()

    def continue_part() -> None:
        with PartFile(part, bar) as file:
            n_present = file.tell()
            if n_present < item.size:
                http_get(url, file, resume_size=n_present, headers=headers)

        n_present = part.stat().st_size
        if n_present > item.size:
            discard_part()
        if n_present != item.size:
            raise OSError(f"{n_present} of {item.size} bytes arrived")

    # The half file of an earlier call may have been damaged since, so wrong content gets a second chance.
    for _ in range(2):
        with_retries(f"{remote} of {source.repo}", continue_part, "run the same command again to continue")
        digest = item_digest(part, item.digest_kind)
        if digest == item.digest:
            return
        discard_part()
    raise ValueError(f"{remote} of {source.repo} arrived as {digest}, not {item.digest}: try later or elsewhere")


def bring(store: Store, source: Source, items: list[Item], jobs: int) -> None:
    """Fetch, in parallel, those of `items` that are not here, whole and unchanged.

    If one fails, those under way are finished and no other is begun. Raises OSError before anything is fetched if the
    disk has no room for all of it.
    """
    # Not in a `with` statement, which would wait for the network after Ctrl-C.
    pool = ThreadPoolExecutor(jobs)
    checks = tqdm(pool.map(store.holds, items), "verify", len(items), unit=" files", disable=None, leave=False)
    missing = [item for item, is_here in zip(items, checks, strict=True) if not is_here]
    store.save()

    n_bytes = sum(item.size for item in missing)
    parts = [store.part(item) for item in missing]
    n_present = sum(part.stat().st_size for part in parts if part.exists())
    n_free = shutil.disk_usage(store.work).free
    if n_bytes - n_present > n_free:
        raise OSError(
            f"--out={store.out} has {human(n_free)} free, but {len(missing)} files need {human(n_bytes - n_present)} "
            "more: make room, choose another --out or lower --train-shards"
        )

    with tqdm(total=n_bytes, initial=n_present, desc="fetch", unit="B", unit_scale=True, disable=None) as bar:

        def bring_one(item: Item) -> None:
            fetch(source, item, store.part(item), bar)
            store.adopt(item)

        try:
            for future in as_completed([pool.submit(bring_one, item) for item in missing]):
                # This raises what the thread raised.
                future.result()
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


def find_dataset(variant: str, names: set[str], place: str) -> str:
    """The data set that `variant` names, in full or by its short name. Raises ValueError that lists the names."""
    if variant in names:
        return variant
    found = {name for name in names if short_name(name) == variant}
    if not found:
        known = ", ".join(sorted(map(short_name, names))) or "nothing"
        raise ValueError(f"--variant={variant!r} is not in {place}: choose from what is there, {known}")
    if len(found) > 1:
        raise ValueError(
            f"--variant={variant!r} names several data sets of {place}: choose from what is there, "
            f"{', '.join(sorted(found))}"
        )
    return found.pop()


def choose_shards(files: dict[str, Item], dataset: str, n_train: int | None, folder: Path) -> list[Item]:
    """The validation split and the first `n_train` train shards; if it is None, as many as the published script takes.

    Training reads every shard in `folder`. So train shards that are already there are chosen too, and a shard there
    that the repository does not have is an error.
    """
    shards = {item.name: item for _, item in sorted(files.items()) if item.dataset == dataset}
    train = [name for name, item in shards.items() if item.split == "train"]
    if n_train is None:
        n_train = min(DEFAULT_TRAIN_SHARDS, len(train))
    if not 0 <= n_train <= len(train):
        raise ValueError(f"--train-shards={n_train} must be in 0..{len(train)}: {dataset} has no more")

    chosen = train[:n_train]
    for number, name in enumerate(chosen):
        if name != f"fineweb_train_{number:06d}.bin":
            raise ValueError(f"{dataset} has no fineweb_train_{number:06d}.bin: ask for --train-shards {number}")

    present = {path.name for path in folder.glob("fineweb_*.bin")}
    foreign = sorted(present - set(shards))
    if foreign:
        raise ValueError(f"{folder / foreign[0]} is not of this data set, but training would read it: move it away")
    extra = present & (set(train) - set(chosen))
    if extra:
        print(f"note: training also reads the {len(extra)} more train shards in {folder}: move them away to use fewer")

    return [item for name, item in shards.items() if item.split != "train" or name in chosen or name in extra]


def choose_tokenizer(files: dict[str, Item], dataset: str, named: set[str]) -> list[Item]:
    """The files of the tokenizer: those in `named`, or else those with the vocabulary size that the data set names.

    A tokenizer may have several files that differ in their suffix only.
    """
    stem_of = {path: Path(path).stem for path in sorted(files) if path.startswith("tokenizers/")}
    stems = {Path(name).stem for name in named} & set(stem_of.values())
    size = re.search(r"_(?:sp|byte)([0-9]+)", dataset)
    if size and not stems:
        stems = {stem for stem in stem_of.values() if re.search(rf"_{size[1]}(_|$)", stem)}
        usual_name = f"fineweb_{size[1]}_bpe"
        if usual_name in stems:
            stems = {usual_name}
    if len(stems) != 1:
        raise ValueError(f"{dataset} needs one tokenizer: a manifest must say which of {list(stem_of)} it is")
    return [files[path] for path, stem in stem_of.items() if stem in stems]


def named_tokenizer(catalog: dict[str, Any], dataset: str) -> set[str]:
    """The files of the tokenizer according to the repository's list of its data sets.

    Empty if the list does not say, or has another shape than the published one.
    """

    def find_entry(kind: str, name: Any) -> dict[str, Any]:
        entries = catalog.get(kind)
        if isinstance(entries, list):
            for entry in entries:
                if isinstance(entry, dict) and entry.get("name") == name:
                    return entry
        return {}

    tokenizer = find_entry("tokenizers", find_entry("datasets", dataset).get("tokenizer_name"))
    return {Path(str(tokenizer[key])).name for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)}


def choose_files(args: argparse.Namespace, files: dict[str, Item], dataset: str, named: set[str]) -> list[Item]:
    """All files that the arguments ask for."""
    shards = choose_shards(files, dataset, args.train_shards, args.out / "datasets" / dataset)
    tokenizer = choose_tokenizer(files, dataset, named)
    if not args.with_docs:
        return shards + tokenizer

    absent = [path for path in DOCS if path not in files]
    if absent:
        raise ValueError(f"--with-docs needs {' and '.join(absent)}, which the repository lacks: leave it out")
    return shards + tokenizer + [files[path] for path in DOCS]


# --- Manifest ---


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of one data set, in the format of data/README.md. Raises ValueError if it is not one."""
    manifest = read_json(path)
    try:
        files = {split: dict(manifest["splits"][split]["files"]) for split in ("train", "val")}
        tokenizer = manifest["tokenizer"]
        is_complete = manifest["format"] == 1 and files["val"] and tokenizer["file"] and tokenizer["sha256"]
    except (KeyError, TypeError, ValueError):
        is_complete = False
    if not is_complete:
        raise ValueError(f"{path} is not a manifest of format 1: run again without --offline")
    return manifest


def tokenizer_path(items: list[Item]) -> str:
    """The file of the tokenizer that encodes, which is not its .vocab."""
    paths = [item.path for item in items if item.path.startswith("tokenizers/")]
    return min(paths, key=lambda path: path.endswith(".vocab"))


def describe_tokenizer(path: Path) -> tuple[dict[str, Any], int]:
    """The entry of a tokenizer in a manifest, and its BOS.

    A text that does not come back proves that it is lossy. That it is lossless could be proved on the documents only,
    and these are not here.
    """
    entry: dict[str, Any] = {"file": path.name, "sha256": file_digest(path)}
    if path.suffix != ".model":
        vocab_size = read_json(path).get("vocab_size", "unknown")
        return {**entry, "vocab_size": vocab_size, "lossless": "unknown"}, DEFAULT_BOS

    sp = spm.SentencePieceProcessor(model_proto=path.read_bytes())
    is_lossy = any(sp.decode(sp.encode(text)) != text for text in LOSSY_PROBES)
    return {**entry, "vocab_size": sp.get_piece_size(), "lossless": False if is_lossy else "unknown"}, sp.bos_id()


def describe_split(folder: Path, files: dict[str, str], bos_id: int | None) -> dict[str, Any]:
    """The entry of a split in a manifest. Documents are counted if `bos_id` is given.

    Raises ValueError for a file that is not a shard.
    """
    shards = [read_shard(folder / name) for name in files if "_bytes_" not in name]
    return {
        "documents": "unknown" if bos_id is None else sum(int((shard == bos_id).sum()) for shard in shards),
        "tokens": sum(shard.size for shard in shards),
        "bytes": "unknown",
        "text_sha256": "unknown",
        "files": files,
    }


def write_manifest(store: Store, source: Source, dataset: str, items: list[Item]) -> None:
    """Write what lies in the folder of a data set and where it comes from, in the format of data/README.md."""
    folder = store.out / "datasets" / dataset
    tokenizer, bos_id = describe_tokenizer(store.out / tokenizer_path(items))

    files: dict[str, dict[str, str]] = {"train": {}, "val": {}}
    for item in items:
        if item.split:
            if item.digest_kind == "sha256":
                sha256 = item.digest.removeprefix("sha256:")
            else:
                sha256 = file_digest(folder / item.name)
            files[item.split.removesuffix("_bytes")][item.name] = sha256

    manifest = {
        "format": 1,
        "name": dataset,
        "source": f"Hugging Face dataset {source.repo}, folder {source.root!r}",
        "revision": source.revision,
        "licence": LICENCES.get(source.repo, "unknown"),
        "tool": "data/download.py",
        "tokenizer": tokenizer,
        "splits": {
            # Counting documents means reading all tokens, and the train split has too many for that.
            "train": describe_split(folder, files["train"], None),
            "val": describe_split(folder, files["val"], bos_id),
        },
    }
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


# --- Main ---


def dataset_names(files: dict[str, Item]) -> set[str]:
    return {item.dataset for item in files.values()} - {""}


def find_source(args: argparse.Namespace) -> tuple[Source, dict[str, Item]]:
    """Where the variant is, and the files that are there.

    That is the repository which the user names. Without one it is that of the challenge, or a known mirror if that
    lacks the variant.
    """
    source, files = list_files(args.repo or REPO_ID, args.root, args.revision)
    mirror = MIRRORS.get(short_name(args.variant))
    if args.repo or not mirror or short_name(args.variant) in map(short_name, dataset_names(files)):
        return source, files

    print(
        f"{source.repo}, the repository of the challenge, has no {args.variant}. Taking it from {mirror}, "
        "a mirror by a member of the community, which the authors of the challenge have not signed."
    )
    return list_files(mirror, args.root, args.revision)


def download(args: argparse.Namespace, store: Store) -> tuple[str, list[Item]]:
    """Bring what the arguments ask for to the state of the repository. -> the data set, its files"""
    source, files = find_source(args)
    dataset = find_dataset(args.variant, dataset_names(files), str(source))

    named: set[str] = set()
    if "manifest.json" in files and not args.skip_manifest:
        bring(store, source, [files["manifest.json"]], 1)
        named = named_tokenizer(read_json(args.out / "manifest.json"), dataset)

    items = choose_files(args, files, dataset, named)
    bring(store, source, items, args.jobs)
    write_manifest(store, source, dataset, items)

    # Half files of content that the repository has replaced will never be continued.
    for part in set(store.work.glob("*.part")) - {store.part(item) for item in files.values()}:
        part.unlink()
    return dataset, items


def check_offline(args: argparse.Namespace, store: Store) -> tuple[str, list[Item]]:
    """Compare what is here with the manifest of the data set. -> the data set, its files

    Files that the manifest does not list, such as the documents, are compared with the digests that the Hub stated
    when they were fetched. Raises ValueError that names each file that is absent or changed.
    """
    finished = {path.parent.name: path for path in args.out.glob("datasets/*/manifest.json")}
    dataset = find_dataset(args.variant, set(finished), f"the finished downloads of {args.out}")
    manifest = read_manifest(finished[dataset])

    listed = {f"tokenizers/{manifest['tokenizer']['file']}": manifest["tokenizer"]["sha256"]}
    for split in manifest["splits"].values():
        for name, sha256 in split["files"].items():
            listed[f"datasets/{dataset}/{name}"] = sha256

    files = {path: Item(path, size, digest) for path, (size, _, digest) in store.stamps.items()}
    for path, sha256 in listed.items():
        file = args.out / path
        # The manifest has no sizes, so the digest alone decides.
        size = file.stat().st_size if file.exists() else 0
        files[path] = Item(path, size, f"sha256:{sha256}")

    items = choose_files(args, files, dataset, {manifest["tokenizer"]["file"]})
    progress = tqdm(items, "verify", unit=" files", disable=None, leave=False)
    bad = [item.path for item in progress if not store.holds(item)]
    # A folder that cannot be written can still be verified.
    with suppress(OSError):
        store.save()
    if bad:
        raise ValueError(
            f"{len(bad)} files in {args.out} are absent or changed: run without --offline to get {', '.join(bad)}"
        )
    return dataset, items


def print_list(source: Source, files: dict[str, Item]) -> None:
    """Print what the repository has. It is counted from the files, since a manifest may promise others."""
    print(source)
    line = "{:<20} {:<32} {:>12} {:>15} {:>13} {:>12}".format
    print(line("variant", "data set", "train shards", "train tokens", "val tokens", "size"))
    for dataset in sorted(dataset_names(files)):
        items = [item for item in files.values() if item.dataset == dataset]
        train = [item for item in items if item.split == "train"]
        val = [item for item in items if item.split == "val"]
        train_tokens = f"{count_tokens(train):,}"
        val_tokens = f"{count_tokens(val):,}"
        size = human(sum(item.size for item in items))
        print(line(short_name(dataset), dataset, len(train), train_tokens, val_tokens, size))

    tokenizers = sorted(path.split("/")[1] for path in files if path.startswith("tokenizers/"))
    print("tokenizers:", ", ".join(tokenizers))
    documents = [f"{path} ({human(files[path].size)})" for path in DOCS if path in files]
    print("documents:", ", ".join(documents) or "none")


def count_tokens(shards: list[Item]) -> int:
    return sum(shard.size - HEADER_BYTES for shard in shards) // 2


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="sp1024", help="sp1024, byte260 ... or the full name of a data set")
    parser.add_argument("--train-shards", type=int, metavar="N", help=f"default: up to {DEFAULT_TRAIN_SHARDS}")
    parser.add_argument("--with-docs", action="store_true", help="also fetch the documents behind the shards")
    parser.add_argument("--skip-manifest", action="store_true", help="do without the repository's list of data sets")
    parser.add_argument("--list", action="store_true", help="show what the repository has and fetch nothing")
    parser.add_argument("--offline", action="store_true", help="verify what is here, without the network")
    parser.add_argument("--verify", action="store_true", help="hash every file, also if it looks unchanged")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="holds datasets/ and tokenizers/")
    parser.add_argument("--jobs", type=int, default=8, metavar="N", help="files fetched at a time (default: 8)")
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID")
    mirrors = ", ".join(f"for {variant} {mirror}" for variant, mirror in MIRRORS.items())
    parser.add_argument(
        "--repo", default=repo, help=f"default: MATCHED_FINEWEB_REPO_ID, else {REPO_ID}, but {mirrors} (unsigned)"
    )
    root = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")
    parser.add_argument("--root", default=root, help="default: MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, else datasets")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    args = parser.parse_args(argv)
    args.root = args.root.strip("/")
    return args


def download_locked(args: argparse.Namespace, store: Store) -> tuple[str, list[Item]]:
    """As download, while no other process does the same in this folder."""
    store.work.mkdir(parents=True, exist_ok=True)
    (store.work / ".gitignore").write_text("*\n")
    lock = WeakFileLock(store.work / "lock", timeout=0.1)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except TimeoutError:
            raise OSError(f"another download writes to {args.out}: wait for it or end it") from None
        return download(args, store)


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask for and print where the result lies."""
    if args.jobs < 1:
        raise ValueError(f"--jobs={args.jobs} must be 1 or more")
    if args.list and args.offline:
        raise ValueError("--list asks the repository: leave out --offline")
    if args.list:
        source, files = list_files(args.repo or REPO_ID, args.root, args.revision)
        print_list(source, files)
        if not args.repo:
            for variant, mirror in MIRRORS.items():
                print(f"elsewhere: {variant}, from the unsigned mirror {mirror}, with --variant {variant}")
        return

    store = Store(args.out, args.verify)
    dataset, items = check_offline(args, store) if args.offline else download_locked(args, store)

    n_train = sum(item.split == "train" for item in items)
    print(f"verified: {len(items)} files, {human(sum(item.size for item in items))}, {n_train} train shards")
    print(f"tokenizer: {args.out / tokenizer_path(items)}")
    folder = args.out / "datasets" / dataset
    print(f"dataset: {folder}")
    manifest = read_manifest(folder / "manifest.json")
    if n_train and isinstance(manifest["tokenizer"]["vocab_size"], int):
        print_commands(manifest, folder)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    # huggingface_hub shows one bar per file, which would hide ours.
    disable_progress_bars()
    try:
        run(args)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = error.filename or args.out
            sys.exit(f"{place}: no space is left on the disk, make room or choose another --out, and run it again")
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to continue", file=sys.stderr, flush=True)
        # sys.exit would wait for the threads, and they wait for the network.
        os._exit(130)


if __name__ == "__main__":
    main()
