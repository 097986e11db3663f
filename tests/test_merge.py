"""tools/merge.py and tools/parents.py: methods against their definitions, models of both formats, memory."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import artifact
import merge
import parents
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parents import TensorInfo

import train_gpt as tg

safetensors = pytest.importorskip("safetensors", reason="pip install safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

# --- Methods ---


def test_mean_by_hand():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert merge.weighted_mean([a, b], [1, 1]).tolist() == [2.0, 0.0]
    assert merge.weighted_mean([a, b], [3, 1]).tolist() == [1.5, 1.0]
    assert merge.weighted_mean([a], [0.1]).tolist() == a.tolist()


def test_great_circle_by_hand():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    middle = merge.slerp(a, b, 0.5)
    assert middle.tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    third = merge.slerp(a, b, 1 / 3)
    assert third.tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    # Parallel, opposite and empty directions have no one great circle.
    assert merge.slerp(a, 2 * a, 0.5).tolist() == [1.5, 0.0]
    assert merge.slerp(a, -a, 0.25).tolist() == [0.5, 0.0]
    assert merge.slerp(a, 0 * a, 0.25).tolist() == [0.75, 0.0]


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_great_circle_keeps_the_length_and_meets_its_ends(seed, t):
    a, b = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = a / a.norm()
    b = b / b.norm()
    mixed = merge.slerp(a, b, t)
    assert float(mixed.norm()) == pytest.approx(1, abs=1e-5)
    angle = math.acos(float((a * b).sum()))
    assert math.acos(min(1.0, float((a * mixed.double()).sum()))) == pytest.approx(t * angle, abs=2e-3)
    torch.testing.assert_close(merge.slerp(a, b, 0), a.float())
    torch.testing.assert_close(merge.slerp(a, b, 1), b.float())


def test_ties_by_hand():
    base = torch.tensor([10.0, 10.0, 10.0, 10.0])
    a = base + torch.tensor([4.0, -3.0, 0.5, 0.0])
    b = base + torch.tensor([2.0, 5.0, 0.1, 0.0])
    # Two entries of each are kept: (4, -3) and (2, 5). On the first both agree, on the second 5 outweighs -3.
    assert merge.ties(base, [a, b], density=0.5, scale=1.0).tolist() == [13.0, 15.0, 10.0, 10.0]
    assert merge.ties(base, [a, b], density=0.5, scale=0.5).tolist() == [11.5, 12.5, 10.0, 10.0]
    # Without trimming, each weight gets the mean of those that have its sign.
    assert merge.ties(base, [a, b], density=1.0, scale=1.0).tolist() == pytest.approx([13.0, 15.0, 10.3, 10.0])
    assert merge.ties(base, [a], density=1.0, scale=1.0).tolist() == a.tolist()


def test_dare_keeps_the_mean_and_drops_as_many_as_it_should():
    base = torch.zeros(100_000)
    ones = torch.ones(100_000)
    found = merge.dare(base, [ones], density=0.25, scale=1.0, seeds=[0])
    assert set(found.tolist()) == {0.0, 4.0}
    # Four standard deviations.
    assert float(found.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(3 / 100_000))
    torch.testing.assert_close(merge.dare(base, [ones, 3 * ones], 1.0, 1.0, [0, 1]), 2 * ones)
    assert torch.equal(found, merge.dare(base, [ones], density=0.25, scale=1.0, seeds=[0]))
    assert not torch.equal(found, merge.dare(base, [ones], density=0.25, scale=1.0, seeds=[1]))


# --- Artifacts ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data, record_config, random_model) -> list[Path]:
    """Three models of one architecture."""
    folders = []
    config = dataclasses.replace(record_config, vocab_size=320, eval_seq_len=32)
    for seed in range(3):
        folder = tmp_path_factory.mktemp("parent")
        (folder / "final_model.float32.ptz").write_bytes(tg.pack_artifact(random_model(config, seed), "float32"))
        shutil.copyfile(data.tokenizer, folder / "tokenizer.model")
        folders.append(folder)
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(tg.load_artifact(artifact.find_artifact(folder), compute_dtype="float32").state_dict())


def test_soup_of_artifacts_is_their_mean_and_can_be_loaded(runs, tmp_path):
    merge.main(["soup", *map(str, runs), "--out", str(tmp_path / "child")])
    child = weights(tmp_path / "child")
    of_parents = [weights(run) for run in runs]
    for name, tensor in child.items():
        torch.testing.assert_close(tensor, sum(of[name] for of in of_parents) / 3)

    told = json.loads((tmp_path / "child" / "merge.json").read_text())
    assert told["method"] == "soup"
    [sha256] = told["child"].values()
    assert sha256 == parents.file_sha256(tmp_path / "child" / "final_model.float32.ptz")
    for run, parent in zip(runs, told["parents"], strict=True):
        assert parent["sha256"] == {"final_model.float32.ptz": parents.file_sha256(run / "final_model.float32.ptz")}
    # Tools find everything that they need beside the child.
    assert artifact.open_subject(tmp_path / "child").config.vocab_size == 320


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["soup", "0", "1", "--weights", "1", "0"], 0),
        (["slerp", "0", "1", "--t", "0"], 0),
        (["slerp", "0", "1", "--t", "1"], 1),
        (["ties", "1", "--base", "0", "--density", "1"], 1),
        (["dare", "1", "--base", "0", "--density", "1"], 1),
        (["ties", "1", "--base", "0", "--scale", "0"], 0),
    ],
)
def test_ends_of_every_method_are_its_parents(runs, tmp_path, command, expected):
    named = [str(runs[int(word)]) if word.isdigit() and i in (1, 2) else word for i, word in enumerate(command)]
    if "--base" in named:
        named[named.index("--base") + 1] = str(runs[0])
    merge.main([*named, "--out", str(tmp_path / "child")])
    child = weights(tmp_path / "child")
    for name, tensor in weights(runs[expected]).items():
        torch.testing.assert_close(child[name], tensor, atol=1e-6, rtol=1e-6)


def test_same_seed_gives_the_same_child_in_any_order_of_parents(runs, tmp_path):
    shas = []
    for i, order in enumerate(([1, 2], [2, 1], [1, 2])):
        seed = "7" if i < 2 else "8"
        out = tmp_path / str(i)
        merge.main(["dare", *(str(runs[j]) for j in order), "--base", str(runs[0]), "--seed", seed, "--out", str(out)])
        shas.append(json.loads((out / "merge.json").read_text())["child"]["final_model.float32.ptz"])
    assert shas[0] == shas[1] != shas[2]


def test_models_that_do_not_fit_are_refused(
    runs, tmp_path, data, record_config, random_model, train_tokenizer, documents
):
    config = dataclasses.replace(record_config, vocab_size=320, eval_seq_len=32, num_layers=6)
    other = tmp_path / "other"
    other.mkdir()
    (other / "final_model.float32.ptz").write_bytes(tg.pack_artifact(random_model(config), "float32"))
    shutil.copyfile(data.tokenizer, other / "tokenizer.model")
    out = ["--out", str(tmp_path / "child")]
    with pytest.raises(SystemExit, match="do not have the same tensors"):
        merge.main(["soup", str(runs[0]), str(other), *out])

    shutil.copyfile(runs[0] / "final_model.float32.ptz", other / "final_model.float32.ptz")
    (other / "tokenizer.model").write_bytes(train_tokenizer([text[::-1] for text in documents]))
    with pytest.raises(SystemExit, match="has another tokenizer"):
        merge.main(["soup", str(runs[0]), str(other), *out])
    with pytest.raises(SystemExit, match="slerp goes from one model to another, and 3 are named"):
        merge.main(["slerp", *map(str, runs), *out])
    with pytest.raises(SystemExit, match="1 numbers for 2 models"):
        merge.main(["soup", str(runs[0]), str(runs[1]), *out, "--weights", "1"])
    assert not (tmp_path / "child").exists()
    with pytest.raises(SystemExit, match="exists already"):
        merge.main(["soup", str(runs[0]), str(runs[1]), "--out", str(tmp_path)])


def test_inspect_tells_distances(runs, capsys):
    merge.main(["inspect", str(runs[0]), str(runs[1])])
    lines = capsys.readouterr().out.splitlines()
    a, b = weights(runs[0]), weights(runs[1])
    [line] = [line for line in lines if line.startswith("tok_emb.weight")]
    _, shape, length, distance, cosine = line.split()
    p, q = a["tok_emb.weight"].flatten().double(), b["tok_emb.weight"].flatten().double()
    assert shape == "320x32"
    assert float(length) == pytest.approx(float(p.norm()), rel=1e-3)
    assert float(distance) == pytest.approx(float((p - q).norm()), rel=1e-3)
    assert float(cosine) == pytest.approx(float(p @ q / p.norm() / q.norm()), abs=1e-4)


# --- Folders of Hugging Face ---


def write_folder(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A model in two shards."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(5, 3, generator=generator).to(dtype) for i in range(4)}
    tensors["scalar"] = torch.randn((), generator=generator)
    tensors["positions"] = torch.arange(4)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, folder / "model-00002-of-00002.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("[]")
    (folder / "README.md").write_text("Of the parent.")
    return tensors


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    tensors = dict[str, torch.Tensor]()
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_folders_are_merged_shard_by_shard(tmp_path):
    a = write_folder(tmp_path / "a", 0)
    b = write_folder(tmp_path / "b", 1)
    merge.main(["soup", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "child")])
    child = read_folder(tmp_path / "child")
    assert child.keys() == a.keys()
    for name, tensor in child.items():
        assert tensor.dtype == a[name].dtype
        if name == "positions":
            assert torch.equal(tensor, a[name])
        else:
            mean = (a[name].double() + b[name].double()) / 2
            torch.testing.assert_close(tensor, mean.float().to(tensor.dtype))
    assert sorted(file.name for file in (tmp_path / "child").iterdir()) == [
        "config.json",
        "merge.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
    ]


@given(data=st.data())
def test_files_are_those_that_the_library_reads(data, tmp_path_factory):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4))
    dtypes = [data.draw(st.sampled_from(list(parents.DTYPES.values()))) for _ in shapes]
    tensors = {f"t{i}": torch.ones(s).mul(i + 1).to(d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype, "") for name, t in tensors.items()}
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    parents.write_safetensors(path, infos, lambda name: tensors[name])
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def hostile_headers() -> dict[str, dict]:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "lying size": {"a": {**tensor, "shape": [4]}},
        "absurd shape": {"a": {**tensor, "shape": [2**62, 2**62]}},
        "overlap": {"a": tensor, "b": {**tensor, "data_offsets": [4, 12]}},
        "beyond the end": {"a": {**tensor, "data_offsets": [0, 1 << 40], "shape": [1 << 38]}},
        "unknown dtype": {"a": {**tensor, "dtype": "F3"}},
        "negative": {"a": {**tensor, "data_offsets": [-8, 0]}},
    }


@pytest.mark.parametrize("name", hostile_headers())
def test_hostile_files_are_refused(tmp_path, name):
    write_folder(tmp_path / "a", 0)
    text = json.dumps(hostile_headers()[name]).encode()
    for file in (tmp_path / "a").glob("*.safetensors"):
        file.unlink()
    (tmp_path / "a" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        parents.open_parent(tmp_path / "a")


def test_damaged_and_empty_folders_are_refused(tmp_path):
    write_folder(tmp_path / "a", 0)
    file = next((tmp_path / "a").glob("*.safetensors"))
    for content in (b"", b"\xff" * 100, file.read_bytes()[:-1]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            parents.open_parent(tmp_path / "a")
    for path in (tmp_path / "a").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors"):
        parents.open_parent(tmp_path / "a")


@pytest.mark.slow
def test_merging_takes_the_memory_of_a_few_tensors(tmp_path):
    """Two folders of 512 MiB each, in tensors of 16 MiB."""
    tensors = {f"layers.{i}.weight": TensorInfo((4 << 20,), torch.float32, "") for i in range(32)}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        parents.write_safetensors(
            tmp_path / name / "model.safetensors", tensors, lambda name: torch.full((4 << 20,), float(len(name)))
        )
    script = "import resource, sys, merge; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
    script += "merge.main(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    command = ["soup", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "child")]
    path = ":".join(str(Path(merge.__file__).parents[i] / folder) for i, folder in ((0, ""), (1, "data"), (1, "")))
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        env={"PYTHONPATH": path, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    # Pages of mapped files count too, as long as they are mapped: one tensor of each parent.
    assert int(done.stdout.splitlines()[-1]) * 1024 < 200 << 20
