"""A model of train_gpt.py for transformers: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

The network itself is in golf_script.py, whose lines are those of the script that trained it. This file only speaks the
language of transformers: configuration, padding on the left, generation with a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .golf_script import CACHE_CLASS, CONFIG_CLASS, MODEL_CLASS

# What the cache is called in an output: the second name until transformers 5.23.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class GolfConfig(PretrainedConfig):
    """What the weights mean.

    script_config   the fields of the script's own configuration. The other settings tell the same by the names that
                    transformers and its tools look for.
    """

    model_type = "parameter_golf"

    def __init__(self, script_config: dict[str, Any] | None = None, **settings: Any) -> None:
        self.script_config = script_config or {}
        super().__init__(**settings)


class GolfCache:
    """What a model has read of a batch.

    Rows with equally much padding in front share a cache of the script, which never sees the padding. So each row is
    read as if it were alone.
    """

    is_compileable = False

    def __init__(self, ids: Tensor, n_padding: Tensor) -> None:
        self.ids = ids  # (B, T) int64, all tokens so far
        self.n_padding = n_padding  # (B,) int64, how many of them come before the text
        self.n_read = 0  # tokens of a row that the caches below have seen, or would have seen without padding
        self.by_padding = dict[int, Any]()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.ids.size(1)

    def extend(self, ids: Tensor) -> None:
        """Take in tokens (B, T) that go on with the rows."""
        self.ids = torch.cat((self.ids, ids), dim=1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, (B,) int64. If that changes the batch, all of it will be read again."""
        if beam_idx.tolist() == list(range(len(self.ids))):
            return
        self.ids = self.ids[beam_idx]
        self.n_padding = self.n_padding[beam_idx]
        self.n_read = 0
        self.by_padding.clear()


class GolfForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = GolfConfig
    base_model_prefix = "model"
    # The cache only goes forward, so that what an assistant has guessed could not be taken back.
    _is_stateful = True

    def __init__(self, config: GolfConfig) -> None:
        super().__init__(config)
        fields = dict(config.script_config)
        if "compute_dtype" in fields:
            # The script computes in the dtype in which transformers was asked to load the model.
            fields["compute_dtype"] = "bfloat16" if config.dtype == torch.bfloat16 else "float32"
        self.model = MODEL_CLASS(CONFIG_CLASS(**fields))
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() makes no cache of its own, but goes on with the one that forward() returns.
        return False

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave the weights as they are: they come from the file."""

    def get_input_embeddings(self) -> Any:
        return getattr(self.model, "tok_emb", None)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: GolfCache | None = None,
        cache: GolfCache | None = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        """Arguments of forward() for the next step of generate(): the tokens that the cache has not seen."""
        past = past_key_values if cache is None else cache
        if past is not None:
            input_ids = input_ids[:, past.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past,
            "use_cache": use_cache,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: GolfCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) float32 of what follows each of `input_ids` (B, T) int64.

        attention_mask    (B, T), 0 for padding in front of a text; with a cache, T counts its tokens too. Padding
                          behind a text changes nothing, since no token sees what comes later.
        past_key_values   from the call before; `input_ids` go on with its texts
        labels            (B, T) int64, -100 for none. They are shifted here, as everywhere in transformers.
        logits_to_keep    how many of the last positions to give logits of; 0 means all

        Where there is padding in front of a text, its logits are 0.
        """
        past = past_key_values if past_key_values is not None else kwargs.pop("cache", None)
        if past is None:
            past = GolfCache(input_ids, count_padding(input_ids, attention_mask))
        else:
            past.extend(input_ids)
        keeps_cache = bool(use_cache) and CACHE_CLASS is not None

        logits = self.read(past, keeps_cache)[:, -input_ids.size(1) :]
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.size(-1), **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: past if keeps_cache else None})

    def read(self, past: GolfCache, keeps_cache: bool) -> Tensor:
        """Logits of the tokens that the caches in `past` have not seen yet. -> (B, T, V)"""
        n_new = past.ids.size(1) - past.n_read
        amounts = past.n_padding.unique().tolist()
        if amounts == [0] and not keeps_cache:
            # The usual case, also while training.
            return self.model(past.ids)

        logits = torch.zeros((len(past.ids), n_new, self.config.vocab_size), device=past.ids.device)
        for n_padding in amounts:
            rows = (past.n_padding == n_padding).nonzero()[:, 0]
            new = past.ids[rows, max(n_padding, past.n_read) :]
            if not new.size(1):
                continue
            if keeps_cache and n_padding not in past.by_padding:
                past.by_padding[n_padding] = CACHE_CLASS(self.model, n_rows=len(rows))
            cache = {"cache": past.by_padding[n_padding]} if keeps_cache else {}
            logits[rows, n_new - new.size(1) :] = self.model(new, **cache)
        if keeps_cache:
            past.n_read = past.ids.size(1)
        return logits


def count_padding(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """How many tokens of each row (B, T) come before the first that the mask (B, T) lets through. -> (B,) int64"""
    if attention_mask is None:
        return torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    n_padding = (attention_mask.cumsum(1) == 0).sum(1)
    # A row of nothing but padding is read like a text.
    return n_padding.where(n_padding < ids.size(1), 0)
