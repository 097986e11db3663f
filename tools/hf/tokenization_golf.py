"""A SentencePiece tokenizer with a transform of data/transforms.py, for transformers.

For tokenizers that tokenizer.json has no steps for. It needs the package sentencepiece and trust_remote_code=True.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece as spm
from transformers import PreTrainedTokenizer

from .golf_transforms import TRANSFORMS


class GolfTokenizer(PreTrainedTokenizer):
    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, transform: str = "none", **settings: Any) -> None:
        self.vocab_file = vocab_file
        self.sp = spm.SentencePieceProcessor(model_file=vocab_file)
        self.transform = transform
        self.rewrite = TRANSFORMS[transform]
        super().__init__(transform=transform, **settings)

    @property
    def vocab_size(self) -> int:
        return self.sp.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text: str, **ignored: Any) -> list[str]:
        return self.sp.encode(self.rewrite.encode(text), out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        written = self.sp.decode([self.sp.piece_to_id(token) for token in tokens])
        return self.rewrite.operated.sub(self.undone, written)

    def undone(self, match: re.Match[str]) -> str:
        """The text that an operator stands for, or nothing for one that a model has put at a wrong place."""
        try:
            return self.rewrite.decode(match[0])
        except ValueError:
            return ""

    def build_inputs_with_special_tokens(self, ids: list[int], second: list[int] | None = None) -> list[int]:
        return [self.bos_token_id, *ids, *(second or [])]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = "tokenizer.model" if filename_prefix is None else f"{filename_prefix}-tokenizer.model"
        target = Path(save_directory, name)
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
