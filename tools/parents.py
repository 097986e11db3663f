"""Trained models as named tensors, read one at a time: what tools/merge.py takes and makes.

    from parents import open_parent, write_child

    a = open_parent(Path("runs/a"))
    b = open_parent(Path("runs/b"))
    write_child(a, Path("child"), lambda name: (a.read(name) + b.read(name)) / 2, {"method": "mean"})

A parent is an artifact of this project (a file, or the folder of a run or record), or a folder in the layout of Hugging
Face: config.json with one or more .safetensors. Of such a folder only one tensor is in memory at a time, so that large
models can be merged on a small machine. A child is written in the format of its first parent.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from artifact import Subject, open_subject
from record import file_sha256
from torch import Tensor

# Names of dtypes in safetensors files.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a child's folder does not get from its parent: the weights, and what is said of the parent only.
NOT_INHERITED = ("*.safetensors", "*.bin", "*.md", "loss.*", "results_*.json", "merge.json", "__pycache__", ".*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")

ReadTensor = Callable[[str], Tensor]


class TensorInfo(NamedTuple):
    """A tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str  # which file of the parent it is in

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Parent(NamedTuple):
    """A trained model.

    tensors           what it consists of, in the order of its files
    sha256            of every file with weights
    tokenizer_sha256  of its tokenizer; empty if it has none
    read              gives a tensor by its name, in its own dtype
    """

    path: Path
    tensors: dict[str, TensorInfo]
    sha256: dict[str, str]
    tokenizer_sha256: str
    read: ReadTensor
    subject: Subject | None = None  # of an artifact


def open_parent(path: Path, script: Path | None = None) -> Parent:
    """Find and check a parent, without reading the weights of a folder. OSError or ValueError if it is none.

    script   that loads an artifact; by default the one beside it, or else the root's
    """
    if (path / "config.json").is_file():
        return open_folder(path)
    subject = open_subject(path, script, compute_dtype="float32")
    weights = subject.model.state_dict()
    tensors = {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype, subject.artifact.name) for name, tensor in weights.items()
    }
    return Parent(
        path=subject.artifact,
        tensors=tensors,
        sha256={subject.artifact.name: file_sha256(subject.artifact)},
        tokenizer_sha256=file_sha256(subject.tokenizer.path),
        read=lambda name: weights[name],
        subject=subject,
    )


def open_folder(folder: Path) -> Parent:
    """A folder in the layout of Hugging Face."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as missing:
        raise ValueError(f"{folder} needs safetensors ({missing}): pip install safetensors") from None

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors: merge models that are stored in this format")
    tensors = dict[str, TensorInfo]()
    for file in files:
        try:
            # This checks sizes and offsets of the header against the file.
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    part = opened.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise ValueError(f"{file}: {name} is of dtype {part.get_dtype()}, which cannot be merged")
                    if name in tensors:
                        raise ValueError(f"{file} has {name}, which {tensors[name].file} has too")
                    tensors[name] = TensorInfo(tuple(part.get_shape()), DTYPES[part.get_dtype()], file.name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from None

    def read(name: str) -> Tensor:
        with safe_open(folder / tensors[name].file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return Parent(
        path=folder,
        tensors=tensors,
        sha256={file.name: file_sha256(file) for file in files},
        tokenizer_sha256=tokenizer_sha256(folder),
        read=read,
    )


def tokenizer_sha256(folder: Path) -> str:
    """Of all files that make up the tokenizer of a folder; empty if there are none."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        return ""
    return hashlib.sha256("".join(f"{file.name} {file_sha256(file)} " for file in found).encode()).hexdigest()


def require_alike(parents: Iterable[Parent]) -> None:
    """Raise ValueError unless all parents have the same tensors and the same tokenizer."""
    first, *others = parents
    for other in others:
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(
                f"{other.path} has another tokenizer than {first.path}: its tokens mean other text, so that their "
                "weights cannot be mixed"
            )
        unshared = sorted(first.tensors.keys() ^ other.tensors.keys())
        if unshared:
            raise ValueError(
                f"{first.path} and {other.path} do not have the same tensors ({', '.join(unshared[:3])}...): "
                "only models of one architecture can be merged"
            )
        for name, info in first.tensors.items():
            if info.shape != other.tensors[name].shape:
                raise ValueError(
                    f"{name} has the shape {info.shape} in {first.path} and {other.tensors[name].shape} in "
                    f"{other.path}: only models of one architecture can be merged"
                )


# ----------------------------------------------------------------------------------------------------------------------
# The child
# ----------------------------------------------------------------------------------------------------------------------


def write_child(parent: Parent, folder: Path, read: ReadTensor, about: Mapping[str, Any]) -> None:
    """Write a model in the format of `parent` into a new folder, with merge.json beside it.

    read    gives each tensor of the child, in any dtype
    about   what merge.json tells; the child's sha256 are added

    Raises FileExistsError if the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        inside = Path(unfinished) / "child"
        if parent.subject is None:
            shutil.copytree(parent.path, inside, ignore=shutil.ignore_patterns(*NOT_INHERITED))
            write_shards(parent, inside, read)
        else:
            inside.mkdir()
            write_artifact(parent.subject, inside, read)
        weights = sorted([*inside.glob("*.safetensors"), *inside.glob("*.ptz")])
        told = {**about, "child": {file.name: file_sha256(file) for file in weights}}
        (inside / "merge.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        inside.rename(folder)


def write_artifact(subject: Subject, folder: Path, read: ReadTensor) -> None:
    """An artifact with float32 weights, its tokenizer, and the script beside the parent if that has one of its own."""
    # A copy, because the child's weights are read from the parent's model.
    child = copy.deepcopy(subject.model)
    with torch.no_grad():
        for name, tensor in child.state_dict().items():
            tensor.copy_(read(name))
    (folder / "final_model.float32.ptz").write_bytes(subject.script_module.pack_artifact(child, "float32"))
    (folder / "tokenizer.model").write_bytes(subject.tokenizer.model)
    if subject.script.parent == subject.artifact.resolve().parent:
        shutil.copyfile(subject.script, folder / subject.script.name)


def write_shards(parent: Parent, folder: Path, read: ReadTensor) -> None:
    """The same files as the parent's, each tensor with the dtype that it has there."""
    for file in dict.fromkeys(info.file for info in parent.tensors.values()):
        inside = {name: info for name, info in parent.tensors.items() if info.file == file}
        write_safetensors(folder / file, inside, read)


def write_safetensors(path: Path, tensors: Mapping[str, TensorInfo], read: ReadTensor) -> None:
    """Write a .safetensors file tensor by tensor. The library would want all of them in memory.

    The format: the length of the header (uint64), a JSON header with dtype, shape and place of each tensor, and the
    tensors (huggingface.co/docs/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        begin, end = end, end + info.n_bytes
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in tensors.items():
            tensor = read(name).to(info.dtype).contiguous()
            if tuple(tensor.shape) != info.shape:
                raise ValueError(f"{name} of the child has the shape {tuple(tensor.shape)}, not {info.shape}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
