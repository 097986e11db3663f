"""A SentencePiece tokenizer as the tokenizer.json of Hugging Face, with the same ids for every text.

    from hf_tokenizer import convert

    convert(Tokenizer(model, path)).save("tokenizer.json")

The converters that come with transformers lose how SentencePiece treats blanks, and some of them its map of characters,
so that they encode most texts to other ids. Here each rule of the model becomes one step of the library `tokenizers`:

    SentencePiece                             tokenizers
    escapes of U+2581 (data/transforms.py)    two Replace
    map of characters, such as NFKC           NFKC, then Precompiled with the bytes of that map
    remove_extra_whitespaces                  two Replace, of the plain blank only
    add_dummy_prefix                          Prepend
    escape_whitespaces                        Replace of the blank by U+2581
    BPE, which joins by the score of a piece  BPE, with a merge for each way to cut a piece in two

Precompiled alone would lose marks: it looks at a letter with all its marks at once, and takes the first rule that fits
the begin. So "e", circumflex, acute became "ê" (Vietnamese as macOS writes it in file names), and Korean in that form
stayed in parts. Behind NFKC, which all maps of SentencePiece are made from, this hardly happens any more. What is left
are stacks of marks that no language has: a letter that has a mark already, or a ligature, and then one more mark.

A tokenizer with another rule, such as operators for capitals, is exported as Python code instead, which needs the
package sentencepiece (tools/hf/tokenization_golf.py).

Control pieces in a text, such as a literal "<s>", are plain text to SentencePiece. For that, the tokenizer has to be
loaded with split_special_tokens=True, which tools/export_hf.py writes into tokenizer_config.json.
"""

from __future__ import annotations

from typing import Any

from model_file import (
    CHARACTER_MAP,
    TYPE_BYTE,
    TYPE_CONTROL,
    TYPE_NORMAL,
    TYPE_UNKNOWN,
    TYPE_UNUSED,
    TYPE_USER_DEFINED,
    Model,
    parse_model,
)
from tokenizer import Tokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer
from transforms import ESCAPE, SPACE_MARK

# An escaped U+2581 behind an even number of escapes, which stand for themselves in pairs.
ESCAPED_MARK = Regex(f"(?<!{ESCAPE})(?:{ESCAPE}{ESCAPE})*\\K{ESCAPE}s")
# Blanks to take away in front of a decoded text. No text has more.
ALL_BLANKS = 1 << 30


def convert(tokenizer: Tokenizer) -> FastTokenizer:
    """The same tokenizer for the library `tokenizers`, which puts a BOS in front of a text if asked for special tokens.

    Raises ValueError, naming the file, for a tokenizer with a rule that this library has no step for.
    """
    model = parse_model(tokenizer.model)
    rule = unknown_rule(tokenizer)
    if rule:
        raise ValueError(f"{tokenizer.path} has {rule}, which tokenizer.json has no step for")

    fast = FastTokenizer(bpe(tokenizer, model))
    steps = normalizer_steps(tokenizer, model)
    if steps:
        fast.normalizer = normalizers.Sequence(steps)
    fast.decoder = decoders.Sequence(decoder_steps(tokenizer))

    specials = [piece.text for piece in model.pieces if piece.type in (TYPE_CONTROL, TYPE_UNKNOWN)]
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    bos_id = tokenizer.sp.bos_id()
    bos = tokenizer.sp.id_to_piece(bos_id)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
    )
    return fast


def unknown_rule(tokenizer: Tokenizer) -> str:
    """What tokenizer.json cannot say of a tokenizer, in words; empty if it can say everything."""
    model_type = tokenizer.settings["model_type"]
    kinds = {piece.type for piece in parse_model(tokenizer.model).pieces}
    if tokenizer.transform.name == "caseops":
        return "operators for capitals (caseops)"
    if model_type != "bpe":
        return f"the type {model_type}"
    if TYPE_USER_DEFINED in kinds:
        return "user-defined pieces"
    if TYPE_UNUSED in kinds:
        return "unused pieces"
    return ""


def bpe(tokenizer: Tokenizer, model: Model) -> models.BPE:
    """Vocabulary and merges.

    SentencePiece joins the two neighbours whose piece has the highest score, the leftmost ones among equals. So every
    way to cut a piece into two others is a merge, and merges are in the order of the scores.
    """
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    normal = {piece.text for piece in model.pieces if piece.type == TYPE_NORMAL}
    merges = list[tuple[str, str]]()
    for piece in sorted(model.pieces, key=lambda piece: -piece.score):
        if piece.type != TYPE_NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left = piece.text[:cut]
            right = piece.text[cut:]
            if left in normal and right in normal:
                merges.append((left, right))

    [unknown] = [piece.text for piece in model.pieces if piece.type == TYPE_UNKNOWN]
    has_bytes = any(piece.type == TYPE_BYTE for piece in model.pieces)
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)


def normalizer_steps(tokenizer: Tokenizer, model: Model) -> list[Any]:
    """What happens to a text before BPE, in the order of SentencePiece."""
    settings = tokenizer.settings
    steps = list[Any]()
    if tokenizer.transform.name == "escape":
        steps.append(normalizers.Replace(ESCAPE, 2 * ESCAPE))
        steps.append(normalizers.Replace(SPACE_MARK, f"{ESCAPE}s"))

    [character_map] = model.normalizer.get(CHARACTER_MAP, [b""])
    if character_map:
        steps.append(normalizers.NFKC())
        steps.append(normalizers.Precompiled(character_map))
    if settings["remove_extra_whitespaces"]:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Replace(Regex(r"\A | \z"), ""))
    if settings["add_dummy_prefix"]:
        steps.append(normalizers.Prepend(" "))
    if settings["escape_whitespaces"]:
        steps.append(normalizers.Replace(" ", SPACE_MARK))
    return steps


def decoder_steps(tokenizer: Tokenizer) -> list[Any]:
    settings = tokenizer.settings
    steps: list[Any] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if settings["remove_extra_whitespaces"]:
        steps.append(decoders.Strip(" ", ALL_BLANKS, 0))
    elif settings["add_dummy_prefix"]:
        steps.append(decoders.Strip(" ", 1, 0))
    if tokenizer.transform.name == "escape":
        steps.append(decoders.Replace(ESCAPED_MARK, SPACE_MARK))
        steps.append(decoders.Replace(2 * ESCAPE, ESCAPE))
    return steps
