"""Export an artifact for Hugging Face: a folder that transformers loads, with a model card.

    python tools/export_hf.py runs/latest out/my-model
    python tools/export_hf.py runs/latest out/my-model --name my-model --licence mit --results lmeval.json board.json

    AutoModelForCausalLM.from_pretrained("out/my-model", trust_remote_code=True)
    AutoTokenizer.from_pretrained("out/my-model", trust_remote_code=True)

The folder holds

    config.json, generation_config.json, model.safetensors
    golf_script.py            the lines of the record's own script that define its model (tools/hf_script.py)
    modeling_golf.py          what transformers asks of a model, around them (tools/hf/modeling_golf.py)
    tokenizer.json            the tokenizer with SentencePiece's ids for every text (tools/hf_tokenizer.py), or Python
                              code that calls SentencePiece, where this format cannot say what a tokenizer does
    tokenizer_config.json, tokenizer.model
    README.md, loss.svg       the model card (tools/hf_card.py), with the curves of the training log
    results_*.json            the benchmarks named by --results, which tools/evaluate.py wrote

The tokenizer puts a BOS in front of a text, as in training, and generation ends where the model begins the next
document. The weights are those that the artifact stands for, in float32. dtype=torch.bfloat16 loads them, and computes,
in half of the memory.

What was written is loaded again by transformers and compared with the artifact: ids and decoded text, logits, and
generation in a batch with that of single texts. If anything differs, the folder is not kept and the exit status is 1.

It needs transformers (pip install "transformers>=5"). The model is loaded by the record's script, which runs without
a sandbox: export what you would run anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Threads that wait should sleep: see train_gpt.py.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Nothing is fetched, and the code of folders that are only checked should not pile up in the user's cache.
    os.environ["HF_HUB_OFFLINE"] = "1"
    modules = tempfile.TemporaryDirectory(prefix="export_hf_")
    os.environ["HF_MODULES_CACHE"] = modules.name

import torch
from artifact import Subject, open_subject
from hf_script import model_source
from record import ROOT, file_sha256

try:
    import transformers
    from hf_card import CardFacts, write_card
    from hf_tokenizer import convert, unknown_rule
    from safetensors.torch import save
except ImportError as missing:
    remedy = f'tools/export_hf.py needs transformers ({missing}): pip install "transformers>=5"'
    if __name__ == "__main__":
        sys.exit(f"error: {remedy}")
    raise ImportError(remedy) from None

TEMPLATES = Path(__file__).resolve().parent / "hf"
MODEL_TYPE = "parameter_golf"

# How far logits of the exported model may be from those of the artifact, and those of a batch from those of single
# texts. Both compute the same in float32, but matrix products of another shape are rounded differently.
LOGITS_TOLERANCE = 1e-3

# Texts on which converted tokenizers are known to fail: blanks of all kinds, line ends, characters that normalization
# rewrites, scripts and symbols without pieces, names of special pieces, SentencePiece's own mark for a blank.
EDGE_TEXTS = (
    "",
    " ",
    "   ",
    " a ",
    "  two  blanks  and   three ",
    "a\nb\n\n c\r\n",
    "\tx\t\t",
    "\u2581 \u2581\u2581a",
    "\ue004 \ue004s\ue004\ue004s",
    "<s> </s> <pad> <unk> <0x41> <|endoftext|>",
    "\u00e9 e\u0301 \u00df \u1e9e \u0130",
    "e\u0302\u0301 \u1112\u1161\u11ab \u304b\u3099 \uff76\uff9e",
    "\ufb01 \u00bd \u2460 \uff21\uff22 \u2126",
    "\u00a0a\u00a0\u3000b\u2028c\u200b\u200d\ufeff",
    "1234567890 12,345.67",
    "\u6771\u4eac \U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 \ud55c\uad6d",
    "\0\x01\x7f \ufffd \U0010ffff",
)
RANDOM_TEXTS = 500
PROMPTS = ("The", "The function returns the number of", "It was a long time before anybody")
NEW_TOKENS = 16


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def script_text(subject: Subject) -> str:
    """golf_script.py: the model of the record's script, under names that modeling_golf.py knows."""
    model = type(subject.model).__name__
    config = type(subject.config).__name__
    has_cache = hasattr(subject.script_module, "Cache")
    roots = [model, config, *(["Cache"] if has_cache else [])]
    source = subject.script.read_text(encoding="utf-8")
    return (
        f'"""The model of the script with sha256 {file_sha256(subject.script)}: its lines, without training."""\n\n'
        f"{model_source(source, roots)}\n\n"
        f"MODEL_CLASS = {model}\nCONFIG_CLASS = {config}\nCACHE_CLASS = {'Cache' if has_cache else None}\n"
    )


def special_ids(subject: Subject) -> dict[str, int]:
    """A document ends where the next one begins, so the BOS is the EOS as well."""
    bos_id = int(subject.config.bos_id)
    pad_id = subject.tokenizer.sp.pad_id()
    return {"bos_token_id": bos_id, "eos_token_id": bos_id, "pad_token_id": pad_id if pad_id >= 0 else bos_id}


def model_config(subject: Subject) -> dict[str, Any]:
    """config.json. Only script_config is read by the model; the other names are for transformers and its tools."""
    config = subject.config
    fields = {name: getattr(config, name) for name in type(config).__dataclass_fields__}
    return {
        "architectures": ["GolfForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_golf.GolfConfig",
            "AutoModelForCausalLM": "modeling_golf.GolfForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.eval_seq_len,
        **special_ids(subject),
        "tie_word_embeddings": False,
        "script_config": fields,
    }


def tokenizer_config(subject: Subject) -> dict[str, Any]:
    names = {key.removesuffix("_id"): subject.tokenizer.sp.id_to_piece(i) for key, i in special_ids(subject).items()}
    if unknown_rule(subject.tokenizer):
        kind = {
            "tokenizer_class": "GolfTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_golf.GolfTokenizer", None]},
            "transform": subject.tokenizer.transform.name,
        }
    else:
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        **kind,
        **names,
        "unk_token": subject.tokenizer.sp.id_to_piece(subject.tokenizer.sp.unk_id()),
        "model_max_length": subject.config.eval_seq_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # As in SentencePiece, a text cannot hold a special token: "<s>" are three characters.
        "split_special_tokens": True,
    }


def generation_config(subject: Subject) -> dict[str, Any]:
    """What generate() does unless it is told otherwise: the same as tools/sample.py."""
    return {
        **special_ids(subject),
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
        "max_new_tokens": 200,
        "use_cache": hasattr(subject.script_module, "Cache"),
    }


def write_files(subject: Subject, folder: Path) -> None:
    """Everything but the card."""
    (folder / "golf_script.py").write_text(script_text(subject), encoding="utf-8")
    shutil.copyfile(TEMPLATES / "modeling_golf.py", folder / "modeling_golf.py")
    write_json(folder / "config.json", model_config(subject))
    write_json(folder / "generation_config.json", generation_config(subject))
    weights = {f"model.{name}": tensor.contiguous() for name, tensor in subject.model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))

    if unknown_rule(subject.tokenizer):
        shutil.copyfile(TEMPLATES / "tokenization_golf.py", folder / "tokenization_golf.py")
        shutil.copyfile(ROOT / "data" / "transforms.py", folder / "golf_transforms.py")
    else:
        convert(subject.tokenizer).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(subject))
    (folder / "tokenizer.model").write_bytes(subject.tokenizer.model)


# ----------------------------------------------------------------------------------------------------------------------
# Check
# ----------------------------------------------------------------------------------------------------------------------


def random_texts(subject: Subject) -> Iterator[str]:
    """Texts of up to 60 characters, half of them common ones and half from EDGE_TEXTS."""
    unusual = sorted(set("".join(EDGE_TEXTS)))
    if subject.tokenizer.settings["rewrites_characters"]:
        # Where tokenizers are known to differ: see hf_tokenizer.py.
        unusual = [c for c in unusual if not unicodedata.category(c).startswith("M")]
    alphabet = ["the ", " of", *"abcdefghijklmnopqrstuvwxyzABCDE      \n\t.,'0123456789", *unusual]
    rng = random.Random(0)
    for _ in range(RANDOM_TEXTS):
        yield "".join(rng.choices(alphabet, k=rng.randrange(60)))


def check_tokenizer(tokenizer: Any, subject: Subject) -> None:
    """Compare ids and decoded text with SentencePiece. Raises ValueError, naming the first text that differs."""
    sp = subject.tokenizer.sp
    pieces = [sp.id_to_piece(i).replace("\u2581", " ") for i in range(sp.get_piece_size())]
    for text in [*EDGE_TEXTS, *pieces, *random_texts(subject)]:
        expected = subject.tokenizer.encode(text)
        found = tokenizer.encode(text, add_special_tokens=False)
        if found != expected.tolist():
            raise ValueError(f"the exported tokenizer gives {text!r} the ids {found}, but SentencePiece {expected}")
        if tokenizer.encode(text) != [subject.config.bos_id, *found]:
            raise ValueError(f"the exported tokenizer puts no BOS in front of {text!r}")
        if subject.tokenizer.is_unknown[expected].any():
            # A converted tokenizer gives back the name of an unknown piece.
            continue
        decoded = tokenizer.decode(found, skip_special_tokens=True)
        if decoded != subject.tokenizer.decode(expected):
            raise ValueError(f"the exported tokenizer decodes {found} to {decoded!r}, but SentencePiece to {text!r}")


@torch.inference_mode()
def check_model(model: Any, tokenizer: Any, subject: Subject) -> float:
    """Compare logits and generated tokens. -> the largest difference of a logit between model and artifact

    Raises ValueError, naming what differs.
    """
    batch = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    singles = [torch.tensor([tokenizer.encode(prompt)]) for prompt in PROMPTS]
    # No text begins in the middle of a document, but any ids must give the logits of the artifact.
    rng = torch.Generator().manual_seed(0)
    length = min(64, subject.config.eval_seq_len)
    anything = torch.randint(0, subject.config.vocab_size, (2, length), generator=rng)

    difference = 0.0
    for ids in [*singles, anything]:
        difference = max(difference, float((model(ids).logits - subject.model(ids)).abs().max()))
    if not difference <= LOGITS_TOLERANCE:
        raise ValueError(f"the exported model's logits differ from the artifact's by {difference:g}")

    padded = model(**batch).logits
    settings = {"do_sample": False, "temperature": None, "top_p": None, "max_new_tokens": NEW_TOKENS}
    generated = model.generate(**batch, **settings)[:, -NEW_TOKENS:].tolist()
    for prompt, ids, in_batch, tokens in zip(PROMPTS, singles, padded, generated, strict=True):
        apart = float((in_batch[-ids.size(1) :] - subject.model(ids)[0]).abs().max())
        if not apart <= LOGITS_TOLERANCE:
            raise ValueError(f"in a batch with padding, the logits of {prompt!r} differ by {apart:g}")
        for use_cache in (True, False):
            alone = model.generate(ids, **settings, use_cache=use_cache)[0, ids.size(1) :].tolist()
            if alone != tokens[: len(alone)]:
                raise ValueError(f"{prompt!r} goes on with {tokens} in a batch, but with {alone} alone")
    return difference


def check(folder: Path, subject: Subject) -> float:
    """Load what was written as its users will, and compare it with the artifact (see check_model)."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    check_tokenizer(tokenizer, subject)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return check_model(model.eval(), tokenizer, subject)


# ----------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------


def export(subject: Subject, folder: Path, facts: CardFacts) -> float:
    """Write the folder, which must not exist, once everything in it was checked. -> see check_model"""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        # Of a folder's name, transformers makes the name of a module.
        inside = Path(unfinished) / "export"
        inside.mkdir()
        write_files(subject, inside)
        write_card(subject, facts, inside)
        difference = check(inside, subject)
        inside.rename(folder)
    return difference


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a file, or the folder of a run or a record")
    parser.add_argument("folder", type=Path, metavar="DIR", help="to be written; must not exist")
    parser.add_argument("--name", default="", help="of the model (default: that of the folder)")
    parser.add_argument("--licence", default="", help="such as mit or apache-2.0 (default: the record's)")
    parser.add_argument("--results", type=Path, nargs="*", default=[], metavar="FILE.json", help="of tools/evaluate.py")
    parser.add_argument("--script", type=Path, help="that loads the model (the record's own, or train_gpt.py)")
    parser.add_argument("--tokenizer", type=Path, help="the .model file (the one that the model was made with)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        # Folders hold float32, in which every machine computes the same.
        subject = open_subject(args.artifact, args.script, args.tokenizer, compute_dtype="float32")
        facts = CardFacts(args.name or args.folder.resolve().name, args.licence, args.results)
        difference = export(subject, args.folder, facts)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    n_bytes = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{args.folder}: {n_bytes:,} bytes. Checked: ids and text of the tokenizer, logits (within {difference:.1g})")


if __name__ == "__main__":
    main()
