"""Your own text: which files are read, how they are cut and split, and what stands on the screen at the end."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import re
import shlex
from pathlib import Path

import build_shards
import documents
import pytest
from commands import print_commands
from hypothesis import given
from hypothesis import strategies as st
from shards import read_shard
from tokenizer import Tokenizer

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
BYTE260 = ["--tokenizer", "byte260"]
SENTENCE = "the cat sat on a mat while its friend ran off to see caf\u00e9s again"


def prose(seed: int, paragraphs: int) -> str:
    """A text of paragraphs of some 300 bytes, with blank lines between them."""
    choose = random.Random(seed)
    words = SENTENCE.split()
    return "\n\n".join(" ".join(choose.choice(words) for _ in range(60)) + f" {seed} {i}." for i in range(paragraphs))


def build(out: Path, *arguments: str | Path) -> dict:
    """Run the tool in this process. -> the manifest of the only data set"""
    build_shards.main([*map(str, arguments), "--out", str(out), "--workers", "1"])
    [manifest] = out.glob("datasets/*/manifest.json")
    return json.loads(manifest.read_text())


def refusal(*arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        build_shards.main([*map(str, arguments)])
    return str(stop.value.code)


def split_texts(out: Path, split: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    [folder] = out.glob("datasets/*")
    manifest = json.loads((folder / "manifest.json").read_text())
    model = out / "tokenizers" / manifest["tokenizer"]["file"]
    tokenizer = Tokenizer(model.read_bytes(), model)
    texts: list[list[int]] = []
    for path in sorted(folder.glob(f"fineweb_{split}_0*.bin")):
        for token in read_shard(path).tolist():
            if token == tokenizer.sp.bos_id():
                texts.append([])
            else:
                texts[-1].append(token)
    return [tokenizer.sp.decode(ids) for ids in texts]


# --- Files ---


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_a_folder_is_read_with_its_subfolders_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {
        "b.md": "two",
        "B.TXT": "one",
        "a/z.txt": "three",
        "a-b/a.txt": "four",
        "c/d/e.jsonl": '{"text": "five"}\n{"text": "six"}\n',
        "notes.pdf": "not text",
        "c/LICENSE": "not read",
        ".hidden.txt": "hidden",
        ".git/x.txt": "hidden",
        "c/.cache/x.txt": "hidden",
    }
    folder = write_tree(tmp_path / "my texts", tree)
    files = documents.find_files([folder])
    names = [path.relative_to(folder).as_posix() for path in files]
    assert names == ["B.TXT", "a/z.txt", "a-b/a.txt", "b.md", "c/d/e.jsonl"]
    assert list(documents.read_documents(files)) == ["one", "three", "four", "two", "five", "six"]
    screen = capsys.readouterr().out
    assert f"{folder}: skipped 2 files not ending in .jsonl" in screen


def test_files_and_folders_go_together(tmp_path: Path) -> None:
    folder = write_tree(tmp_path, {"a/x.txt": "one", "b.md": "two", "c/y.txt": "three"})
    paths = documents.find_files([folder / "c", folder / "b.md", folder / "a"])
    assert list(documents.read_documents(paths)) == ["three", "two", "one"]


@pytest.mark.parametrize("files", [{}, {"a.pdf": "x"}, {".hidden/a.txt": "x"}])
def test_a_folder_without_text_is_an_error_that_names_the_endings(tmp_path: Path, files: dict[str, str]) -> None:
    folder = write_tree(tmp_path / "empty", files)
    folder.mkdir(exist_ok=True)
    message = refusal("--input", folder, "--out", tmp_path / "out")
    endings = ".jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, .md"
    assert message == f"{folder} has no files that end in {endings}: name another folder, or a file"


def test_a_validation_file_inside_of_the_folder_is_not_trained_on(tmp_path: Path) -> None:
    """Alone it is cut into other documents than among many, so that its documents could not be told."""
    files = {f"texts/{i}.txt": prose(i, 20) for i in range(60)}
    folder = write_tree(tmp_path, files) / "texts"
    build(tmp_path / "out", *BYTE260, "--input", folder, "--val", folder / "7.txt")
    assert "".join(split_texts(tmp_path / "out", "val")) == files["texts/7.txt"]
    expected = [files[name] for name in sorted(files) if name != "texts/7.txt"]
    assert split_texts(tmp_path / "out", "train") == expected


def test_the_manifest_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "texts", {f"{i:04d}.txt": f"text {i}\n" for i in range(1000)})
    before = build(tmp_path / "a", *BYTE260, "--input", folder)
    assert before["source"] == "1,000 files, 0000.txt to 0999.txt"
    assert len(json.dumps(before)) < 4000
    (folder / "0500.txt").write_text("another text\n")
    assert build(tmp_path / "b", *BYTE260, "--input", folder)["revision"] != before["revision"]


# --- Cutting ---

PARAGRAPHS = st.text(st.sampled_from("ab \t\r\u00e9\u4e2d\U0001f642\n"), max_size=40)


@given(st.lists(st.tuples(PARAGRAPHS, st.integers(1, 60)), max_size=12), st.integers(8, 40), st.integers(0, 60))
def test_pieces_joined_are_the_text_and_have_the_size_that_was_asked_for(
    parts: list[tuple[str, int]], piece_bytes: int, excess: int
) -> None:
    text = "".join(part * n for part, n in parts).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", piece_bytes)
        patch.setattr(documents, "LONGEST_PIECE_BYTES", piece_bytes + excess)
        pieces = list(documents.cut_text(io.BytesIO(text)))

    assert b"".join(pieces) == text
    for piece in pieces:
        piece.decode()  # no character is torn
        assert len(piece) <= piece_bytes + excess
    for piece, following in itertools.pairwise(pieces):
        ends_at_blank_line = re.search(rb"(^|\n)[ \t\r]*\n$", piece) is not None
        if ends_at_blank_line and len(piece) >= piece_bytes:
            continue
        # What follows did not fit: up to the end of its first line, or as much of it as fits.
        first_line = following.split(b"\n")[0] + b"\n"
        assert len(piece) + len(first_line) > piece_bytes + excess


def test_a_book_is_cut_between_its_paragraphs() -> None:
    text = prose(0, 300)
    paragraphs = text.split("\n\n")
    pieces = [piece.decode() for piece in documents.cut_text(io.BytesIO(text.encode()))]
    assert [p for piece in pieces for p in piece.removesuffix("\n\n").split("\n\n")] == paragraphs
    longest = max(len(p.encode()) for p in paragraphs) + 2
    for piece in pieces[:-1]:
        assert 4000 <= len(piece.encode()) < 4000 + longest


def test_a_paragraph_is_torn_only_if_it_alone_is_far_larger() -> None:
    lines = "".join(f"line {i} of a poem without end\n" for i in range(2000))
    text = "short.\n\n" + 9_000 * "x" + "\n\n" + lines + "\nend.\n"
    pieces = [piece.decode() for piece in documents.cut_text(io.BytesIO(text.encode()))]
    assert pieces[0] == "short.\n\n" + 9_000 * "x" + "\n\n"
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(len(piece) <= 16_000 for piece in pieces)


def test_a_line_without_end_is_cut_between_words() -> None:
    """Such as the file text8, which is one line of 100 MB."""
    words = [f"word{i}" for i in range(20_000)]
    pieces = [piece.decode() for piece in documents.cut_text(io.BytesIO(" ".join(words).encode()))]
    assert [word for piece in pieces for word in piece.split()] == words
    assert max(map(len, pieces)) <= 16_000


def test_a_single_file_is_cut_and_split_without_losing_a_byte(tmp_path: Path) -> None:
    text = "\ufeff" + prose(1, 400).replace("\n", "\r\n")
    book = tmp_path / "input.txt"
    book.write_bytes(text.encode())
    manifest = build(tmp_path / "out", *BYTE260, "--input", book)
    pieces = [*split_texts(tmp_path / "out", "train"), *split_texts(tmp_path / "out", "val")]
    assert sum(len(piece.encode()) for piece in pieces) == len(text.removeprefix("\ufeff").encode())
    places = sorted((text.index(piece), piece) for piece in pieces)
    assert "\ufeff" + "".join(piece for _, piece in places) == text
    mean = len(text.encode()) / len(pieces)
    rule = f"input.txt cut at blank lines into {len(pieces)} documents of {mean:,.0f} bytes on average"
    assert manifest["document_rule"] == rule


def test_only_files_that_are_a_large_part_of_the_input_are_cut(tmp_path: Path) -> None:
    tree = {f"{i:03d}.md": prose(i, 20) for i in range(100)}
    folder = write_tree(tmp_path / "texts", {**tree, "book.txt": prose(1000, 900)})
    files = documents.find_files([folder])
    texts = list(documents.read_documents(files))
    assert texts[:100] == list(tree.values())
    assert "".join(texts[100:]) == prose(1000, 900)
    assert len(texts) > 150
    assert documents.document_rule(files).startswith("each text file is a document; book.txt cut at blank lines into ")


def test_a_byte_that_is_not_utf8_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    text = prose(0, 300).encode()
    path.write_bytes(text + b"caf\xe9 and more\n")
    message = refusal("--input", path, "--out", tmp_path / "out")
    assert f"{path} is not UTF-8 (byte {len(text) + 3}): convert it first, for example with iconv" in message


# --- The split ---


@given(st.lists(st.sampled_from(["", " \n", *[f"document {i} " * (1 + i % 7) for i in range(200)]]), max_size=300))
def test_a_fair_sample_is_held_out(texts: list[str]) -> None:
    kept = [text for text in texts if text.strip()]
    if len(set(kept)) < 2:
        with pytest.raises(ValueError, match=r"the input has \d documents? with text, and one must be held out"):
            documents.choose_val(texts)
        return
    choice = documents.choose_val(texts)
    chosen = [texts[position] for position in choice.positions]
    assert (choice.n_documents, choice.n_bytes) == (len(kept), sum(map(len, kept)))
    assert choice.n_val_bytes == sum(map(len, chosen))
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) < set(kept)
    assert len(chosen) <= max(1, len(kept) / 5)
    # Another order of the documents does not change which texts they are.
    shuffled = random.Random(0).sample(texts, len(texts))
    if len(chosen) > 1:
        assert {shuffled[p] for p in documents.choose_val(shuffled).positions} == set(chosen)


@pytest.mark.parametrize(
    ("n_documents", "size", "share"),
    [(30, 4_000, 0.1), (500, 4_000, 0.1), (5_000, 2_000, 0.02), (3_000, 4_000, 0.02)],
)
def test_how_much_is_held_out(n_documents: int, size: int, share: float) -> None:
    """2 %, but 200 kB of a text that has them to spare, and a tenth of one that has not."""
    texts = (f"{i:08d}" + (size - 8) * "x" for i in range(n_documents))
    choice = documents.choose_val(texts)
    expected = max(share * n_documents * size, min(200_000, 0.1 * n_documents * size))
    at_least = 6 if n_documents == 30 else 10
    assert len(choice.positions) >= at_least
    assert expected <= choice.n_val_bytes <= max(expected + size, at_least * size)
    # Spread over the input, not its begin.
    assert max(choice.positions) > 0.6 * n_documents


def test_a_large_text_gives_no_more_than_2_mb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_VAL_BYTES", 50_000)
    monkeypatch.setattr(documents, "LEAST_VAL_BYTES", 20_000)
    choice = documents.choose_val(f"{i:08d}" + 992 * "x" for i in range(10_000))
    assert 50_000 <= choice.n_val_bytes < 51_000


def test_a_giant_document_is_not_held_out() -> None:
    texts = [f"{i:08d}" + (10_000_000 if i == 3 else 1000) * "x" for i in range(100)]
    for _ in range(3):
        texts = texts[1:] + texts[:1]
        choice = documents.choose_val(texts)
        assert all(len(texts[position]) < 2000 for position in choice.positions)


def test_the_split_of_your_own_text_is_in_the_manifest_and_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [prose(i, 5) for i in range(300)]
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[5], "", texts[17]]))
    manifest = build(tmp_path / "out", *BYTE260, "--input", source)
    val, train = split_texts(tmp_path / "out", "val"), split_texts(tmp_path / "out", "train")
    assert sorted([*val, *train]) == sorted([*texts, *[t for t in (texts[5], texts[17]) if t not in val]])
    assert [text for text in texts if text in val] == val  # in the order of the input
    n_bytes = sum(len(text.encode()) for text in val)
    assert manifest["val_docs"] == len(val)
    assert manifest["val_rule"].startswith(f"{len(val)} of 302 documents, those with the smallest sha256: ")
    assert f"{n_bytes:,} of " in manifest["val_rule"]
    assert f"validation: {manifest['val_rule']}" in capsys.readouterr().out


def test_too_many_val_docs_are_told_with_the_number_that_there_is(tmp_path: Path) -> None:
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)))
    arguments = [*BYTE260, "--input", source, "--out", tmp_path / "out"]
    for n in ("200", "500"):
        message = f"--val-docs={n} leaves no document to train on, because the input has 200: give --val-docs 20"
        assert refusal(*arguments, "--val-docs", n) == message
    assert "the input has 1 document, and one must be held out" in refusal(
        *arguments, "--max-docs", "1", "--val-docs", "5"
    )
    build_shards.main([*map(str, arguments), "--val-docs", "20"])


# --- Names, and what must not be replaced ---


@pytest.mark.parametrize(
    ("path", "options", "name"),
    [
        ("input.txt", [], "input_sp1024"),
        ("my book (2).md", [], "my_book_2_sp1024"),
        ("a.b.jsonl.zst", ["--vocab-size", "512"], "a.b_sp512"),
        ("\u0442\u0435\u043a\u0441\u0442.txt", [], "text_sp1024"),
        ("my notes/", ["--caseops"], "my_notes_sp1024_caseops"),
        ("data.txt/", [], "data.txt_sp1024"),
        ("-rf.txt", BYTE260, "rf_byte260"),
    ],
)
def test_the_data_set_is_named_after_its_input(tmp_path: Path, path: str, options: list[str], name: str) -> None:
    source = tmp_path / path
    if path.endswith("/"):
        source.mkdir()
    else:
        source.touch()
    args = build_shards.parse_arguments([f"--input={source}", *options])
    assert build_shards.default_name(args, None) == name
    build_shards.check_arguments(build_shards.parse_arguments(["--input", "x.txt", "--name", name]))


def test_a_data_set_of_the_hub_is_named_after_its_repository() -> None:
    args = build_shards.parse_arguments(["--hub", "HuggingFaceFW/fineweb-edu"])
    assert build_shards.default_name(args, None) == "fineweb-edu_sp1024"


def test_another_text_does_not_replace_a_data_set(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, seed in (("a.txt", 1), ("b.txt", 2)):
        (tmp_path / name).write_text(prose(seed, 100))
    arguments = ["--name", "toy", "--vocab-size", "320", "--out", out]
    first = build(out, "--input", tmp_path / "a.txt", *arguments[:-2])
    # The same text again is no harm.
    assert build(out, "--input", tmp_path / "a.txt", *arguments[:-2]) == first

    folder = out / "datasets" / "toy"
    message = refusal("--input", tmp_path / "b.txt", *arguments)
    assert message.startswith(f"{folder} was made from a.txt, not from this b.txt: choose another --name, or replace")
    (tmp_path / "a.txt").write_text(prose(3, 100))
    message = refusal("--input", tmp_path / "a.txt", *arguments)
    assert message.startswith(f"{folder} was made from a.txt with other content, not from this a.txt")
    assert json.loads((folder / "manifest.json").read_text()) == first

    second = build(out, "--input", tmp_path / "b.txt", *arguments[:-2], "--overwrite")
    assert second["source"] == "b.txt"
    assert build_shards.check(folder) == []

    (folder / "manifest.json").unlink()
    message = refusal("--input", tmp_path / "b.txt", *arguments)
    assert message.startswith(f"{folder} was made from shards without a manifest, not from this b.txt")


def test_a_tokenizer_in_use_is_not_replaced(tmp_path: Path) -> None:
    """Two names can lead to one tokenizer file, and another split of the same text to another tokenizer."""
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text(prose(1, 100))
    (tmp_path / "b.txt").write_text(prose(2, 200).upper())
    options = ["--vocab-size", "320", "--out", out, "--workers", "1"]
    build_shards.main([*map(str, ["--name", "toy_sp1", "--input", tmp_path / "a.txt", *options])])
    model = out / "tokenizers" / "toy_320_bpe.model"
    before = model.read_bytes()

    other = ["--name", "toy_sp2", "--input", tmp_path / "b.txt", *options]
    message = refusal(*other)
    assert message.startswith(f"{model} is the tokenizer of toy_sp1, and this text gives another one: choose another")
    assert model.read_bytes() == before
    assert not (out / "datasets" / "toy_sp2").exists()
    build_shards.main([*map(str, other), "--overwrite"])
    assert model.read_bytes() != before


# --- What to type next ---


def last_commands(screen: str) -> list[list[str]]:
    """The commands for training on the screen, as a shell would split them."""
    return [shlex.split(line) for line in screen.splitlines() if line.startswith("    python ")]


def test_the_last_line_trains_on_the_data_from_the_folder_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tree(tmp_path / "my work", {"input.txt": prose(1, 300)})
    monkeypatch.chdir(folder)
    build_shards.main(["--input", "input.txt", "--out", ".", *BYTE260, "--workers", "1"])
    [[python, script, *arguments]] = last_commands(capsys.readouterr().out)
    assert python == "python"
    assert Path(script).resolve() == ROOT / "train_gpt.py"
    assert arguments == ["--preset=smoke", f"--data_path={os.path.join('datasets', 'input_byte260')}"]

    monkeypatch.chdir("/")
    build_shards.main(["--input", str(folder / "input.txt"), "--out", str(folder), *BYTE260, "--workers", "1"])
    [[*_, data_path]] = last_commands(capsys.readouterr().out)
    assert Path(data_path.removeprefix("--data_path=")).resolve() == folder / "datasets" / "input_byte260"


@pytest.mark.parametrize(
    ("train_tokens", "val_tokens", "vocab_size", "presets"),
    [
        (400_000, 50_000, 1024, ["smoke"]),
        (5_000_000, 100_000, 1024, ["smoke", "small"]),
        (99_000_000, 800_000, 8192, ["smoke", "small"]),
        (200_000_000, 800_000, 1024, ["smoke", "baseline"]),
        (200_000_000, 800_000, 8192, ["smoke", "record"]),
    ],
)
def test_the_preset_fits_the_size_of_the_data(
    capsys: pytest.CaptureFixture[str], train_tokens: int, val_tokens: int, vocab_size: int, presets: list[str]
) -> None:
    splits = {"train": {"tokens": train_tokens}, "val": {"tokens": val_tokens}}
    manifest = {"splits": splits, "tokenizer": {"vocab_size": vocab_size}}
    print_commands(manifest, ROOT / "data" / "datasets" / "x")
    commands = last_commands(capsys.readouterr().out)
    assert [command[2] for command in commands] == [f"--preset={preset}" for preset in presets]
    for command in commands:
        for argument in command[2:]:
            assert argument.partition("=")[0].removeprefix("--").upper() in tg.SETTINGS
    # A laptop must not score the whole split several times.
    assert any("--val_max_tokens" in argument for argument in commands[0]) == (val_tokens == 800_000)


def test_a_text_that_is_too_small_to_train_on_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the cat\n")
    (tmp_path / "b.txt").write_text("the dog\n")
    build_shards.main(["--input", str(tmp_path), "--out", str(tmp_path / "out"), *BYTE260])
    assert "tokens are too few to train on: add more text" in capsys.readouterr().out.splitlines()[-1]


# --- data/README.md ---


def readme_commands() -> list[list[str]]:
    """The commands of data/README.md, without comments."""
    page = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^ *```bash\n(.*?)```", page, re.S | re.M))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_every_command_of_the_readme_is_one_that_its_script_takes() -> None:
    import download

    scripts = {"data/build_shards.py": build_shards, "data/download.py": download}
    n_checked = 0
    for python, script, *arguments in readme_commands():
        if script == "train_gpt.py":
            names = [argument.partition("=")[0].removeprefix("--").upper() for argument in arguments]
            assert set(names) <= {*tg.SETTINGS, "PRESET"}
        elif python == "python" and script in scripts:
            scripts[script].parse_arguments(arguments)
            n_checked += 1
    assert n_checked >= 10


def test_the_commands_for_own_text_work_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As typed, with small texts of these names. What needs a network or a download is left out."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    choose = random.Random(0)
    words = ["".join(choose.choices("etaoinshrdlu", k=5)) for _ in range(2000)]
    texts = ["\n\n".join(" ".join(choose.choices(words, k=60)) for _ in range(3)) for _ in range(700)]
    write_tree(
        tmp_path,
        {
            "book.txt": "\n\n".join(texts[:60]),
            "notes/a.md": texts[0],
            "notes/more/b.txt": "\n\n".join(texts[:60]),
            "articles.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
            "held_out.jsonl": json.dumps({"text": texts[3]}) + "\n",
        },
    )
    parquet.write_table(pyarrow.table({"text": texts[:9]}), tmp_path / "more.parquet")
    monkeypatch.chdir(tmp_path)

    names = []
    for _, script, *arguments in readme_commands():
        if script == "data/build_shards.py" and "--input" in arguments and "data/docs_selected.jsonl" not in arguments:
            build_shards.main([*arguments, "--out", "data", "--workers", "1"])
            [dataset] = re.findall("^dataset: (.*)$", capsys.readouterr().out, re.M)
            names.append(Path(dataset).name)
    assert names == ["book_sp1024", "notes_sp1024", "everything_sp1024", "articles_sp1024", "other_sp1024"]

    [check] = [arguments for _, _, *arguments in readme_commands() if "--check" in arguments]
    build_shards.main(check)
    assert "is what its manifest says" in capsys.readouterr().out
