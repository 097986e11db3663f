"""A page to try a language model: text that appears as it is generated, beside the model's card.

    python tools/hf/app.py out/my-model     a folder that tools/export_hf.py wrote
    python app.py                           in a Space, where that folder is called model and lies beside app.py

It runs on a CPU and asks nobody on the network for anything. The same seed gives the same text on the same machine. The
model's own code, which is part of its folder, is run: open what you trust.

    pip install "gradio>=6.18" "transformers>=5"
"""

from __future__ import annotations

import argparse
import base64
import itertools
import mimetypes
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Read when the libraries are loaded: threads that wait leave their core to others, and nothing is fetched.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

try:
    import gradio as gr
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LogitsProcessorList,
        MinPLogitsWarper,
        TopPLogitsWarper,
    )
except ImportError as missing:
    sys.exit(f'error: app.py needs gradio and transformers ({missing}): pip install "gradio>=6.18" "transformers>=5"')


# A page that is drawn again for every token takes a good part of the time from the model.
SECONDS_BETWEEN_LOOKS = 0.1


# --- Text ---


@torch.inference_mode()
def next_tokens(
    model: Any, prompt: Sequence[int], temperature: float, top_p: float, min_p: float, seed: int
) -> Iterator[int]:
    """Draw the tokens behind those of the prompt, one by one, until the model ends the document.

    At temperature 0 each is the most likely one.
    """
    generator = torch.Generator().manual_seed(seed)
    filters = LogitsProcessorList([TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)])
    window = model.config.max_position_embeddings
    context = list(prompt)
    unread = context
    cache = None
    while True:
        if len(context) > window:
            # A cache cannot forget, so it is made anew. Half a window goes at once, so that this happens rarely.
            while len(context) > window:
                del context[: window // 2]
            unread = context
            cache = None

        # A model without a cache gives logits alone, and reads its whole context for each token.
        logits, *caches = model(torch.tensor([unread]), past_key_values=cache, use_cache=True).to_tuple()
        logits = logits[:, -1].double()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            p = filters(torch.tensor([context]), logits / temperature).softmax(-1)
            token = int(torch.multinomial(p, 1, generator=generator))
        if token == model.config.eos_token_id:
            return
        yield token

        context.append(token)
        unread = [token] if caches else context
        cache = caches[0] if caches else None


class Speaker:
    """A model with its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

    def speak(
        self, prompt: str, temperature: float, top_p: float, min_p: float, max_tokens: int, seed: int
    ) -> Iterator[tuple[str, str]]:
        """The text so far with a remark on it, several times a second.

        Gradio asks for no more when the reader presses Stop or leaves, and then nothing more is computed.
        """
        ids = self.tokenizer.encode(prompt)
        n_prompt = len(ids)
        begin = time.perf_counter()
        next_look = begin
        tokens = next_tokens(self.model, ids, temperature, top_p, min_p, seed)
        for token in itertools.islice(tokens, max_tokens):
            ids.append(token)
            if time.perf_counter() >= next_look:
                # The first bytes of a character wait for its last one.
                yield self.decode(ids).rstrip("\ufffd"), speed(len(ids) - n_prompt, begin)
                next_look = time.perf_counter() + SECONDS_BETWEEN_LOOKS

        n_tokens = len(ids) - n_prompt
        ending = "the document ends here" if n_tokens < max_tokens else "as many as were asked for"
        yield self.decode(ids), f"{speed(n_tokens, begin)}: {ending}"

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def speed(n_tokens: int, begin: float) -> str:
    return f"{n_tokens} tokens, {n_tokens / (time.perf_counter() - begin):.0f} per second"


# --- Page ---


def model_card(folder: Path) -> str:
    """README.md without its front matter, and with the images of the folder inside."""

    def with_image(match: re.Match[str]) -> str:
        words, name = match.groups()
        if not (folder / name).is_file():
            return match[0]
        kind = mimetypes.guess_type(name)[0]
        data = base64.b64encode((folder / name).read_bytes()).decode()
        return f"![{words}](data:{kind};base64,{data})"

    text = (folder / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    return re.sub(r"!\[(.*?)\]\((.*?)\)", with_image, text)


def make_page(speaker: Speaker, card: str) -> gr.Blocks:
    defaults = speaker.model.generation_config
    with gr.Blocks(title="Try a model", analytics_enabled=False) as page, gr.Row():
        with gr.Column():
            prompt = gr.Textbox("The", label="Prompt", lines=3, info="The model goes on from here.")
            with gr.Row():
                generate = gr.Button("Generate", variant="primary")
                stop = gr.Button("Stop")
            text = gr.Textbox(label="Text", lines=12, max_lines=30, buttons=["copy"])
            remark = gr.Markdown()
            settings = [
                gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature", info="0: the most likely token"),
                gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top-p", info="the probability that is kept"),
                gr.Slider(0, 1, 0, step=0.01, label="Min-p", info="the least share of the most likely token"),
                gr.Slider(1, 1000, defaults.max_new_tokens, step=1, label="Tokens", info="at most"),
                gr.Number(1337, precision=0, minimum=0, label="Seed", info="the same one gives the same text"),
            ]
        with gr.Column():
            gr.Markdown(card)

        going = generate.click(speaker.speak, [prompt, *settings], [text, remark], show_progress="hidden")
        stop.click(None, cancels=[going])
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent / "model"
    parser.add_argument("folder", type=Path, nargs="?", default=default, metavar="DIR", help="the exported model")
    parser.add_argument("--port", type=int, help="by default a free one from 7860 on")
    args = parser.parse_args()
    if not (args.folder / "config.json").is_file():
        sys.exit(f"error: {args.folder} has no config.json: name a folder that tools/export_hf.py wrote")
    try:
        page = make_page(Speaker(args.folder), model_card(args.folder))
        page.launch(server_port=args.port, show_error=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
