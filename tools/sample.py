"""Hear what a model says: text from an artifact, shown as it is generated.

    python tools/sample.py runs/latest "The function returns"             go on from this text
    python tools/sample.py runs/latest                                    ask for texts, until Ctrl-D or Ctrl-C
    python tools/sample.py runs/latest "" --samples 3 --seed 7            three documents from their first word on
    python tools/sample.py records/<track>/<record> "The" --temperature 0 the most likely token, every time

ARTIFACT is a final_model.*.ptz, or the folder of a run or record that has one. The same seed gives the same text on the
same machine. A sample ends where the model begins the next document, or after --max-tokens. Text goes to standard
output, and a line on how it came about to standard error.

The model is loaded by the script beside it, in a record, or else by that of the repository. This runs the record's
code as your own: tools/verify.py --rescore looks at records of strangers in a sandbox.

It runs on the CPU, in float32. A script that has a Cache reads each token once. With any other script the model reads
its whole context again for each token, which takes 4 to 10 times as long.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import itertools
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # OpenMP reads this when torch is loaded: threads that wait should leave their core to others.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from artifact import Subject, open_subject
from tokenizer import Tokenizer
from torch import Tensor
from transforms import Transform

# What a text shows for bytes that are no UTF-8, and for operators of a transform with nothing to act on.
REPLACEMENT = "\ufffd"
# A terminal obeys control characters, and a model may write any of them. Only tabs and newlines are let through.
CONTROL_CHARACTERS = {code: REPLACEMENT for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


# --- Sampling ---


class Sampling(NamedTuple):
    """How the next token is drawn: see probabilities."""

    temperature: float
    top_p: float
    min_p: float
    max_tokens: int


# Short, so that they say little of what may follow.
CARD_PROMPTS = ("The", "In the morning", "What is")
CARD_SEED = 1337
CARD_SAMPLING = Sampling(temperature=0.8, top_p=0.95, min_p=0.0, max_tokens=120)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What the next token is drawn from. (V,) -> (V,) float64, with the sum 1

    temperature  divides the logits; at 0 the most likely token gets everything, the first of several
    top_p        keeps the fewest of the most likely tokens that together reach this probability
    min_p        keeps the tokens that are at least this many times as likely as the most likely one

    Both filters look at the probabilities after the temperature. A token must pass both, and the most likely one always
    does. Raises ValueError for logits that are NaN.
    """
    logits = logits.double()
    if logits.isnan().any():
        raise ValueError("the model's logits are NaN: its weights are damaged, train it again")
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).double()

    # Less the largest one, so that a small temperature gives -inf and never inf.
    p = torch.softmax((logits - logits.max()) / sampling.temperature, dim=0)
    kept = p >= sampling.min_p * p.max()
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        more_likely = ordered.cumsum(0) - ordered
        kept[order[more_likely >= sampling.top_p]] = False
    p = p * kept
    return p / p.sum()


def context_start(n_tokens: int, window: int) -> int:
    """Where the context of the next token begins: 0, until the text is longer than the window.

    From then on the context begins half a window later each time that it is full, and not one token later each time,
    so that a cache is rarely made anew.
    """
    half = max(1, window // 2)
    return half * max(0, math.ceil((n_tokens - window) / half))


class Reader:
    """A model that reads a growing text, of which it sees at most `window` tokens."""

    def __init__(self, script: types.ModuleType, model: Any) -> None:
        self.model = model
        self.window: int = model.config.eval_seq_len
        self.make_cache: Callable[[Any], Any] | None = getattr(script, "Cache", None)
        self.cache: Any = None
        self.read: list[int] = []  # what the cache holds

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits of the token behind the text. -> (V,) float32"""
        context = list(ids[context_start(len(ids), self.window) :])
        if self.make_cache is None:
            logits: Tensor = self.model(torch.tensor([context]))
            return logits[0, -1]

        goes_on = len(context) > len(self.read) and context[: len(self.read)] == self.read
        if self.cache is None or not goes_on:
            self.cache = self.make_cache(self.model)
            self.read = []
        new = context[len(self.read) :]
        self.read = context
        logits = self.model(torch.tensor([new]), cache=self.cache)
        return logits[0, -1]


def generate(reader: Reader, prompt: Sequence[int], sampling: Sampling, seed: int) -> Iterator[int]:
    """The tokens behind those of the prompt, up to the next document or sampling.max_tokens of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(sampling.max_tokens):
        p = probabilities(reader.next_logits(ids), sampling)
        token = int(torch.multinomial(p, 1, generator=generator))
        if token == reader.model.config.bos_id:
            return
        ids.append(token)
        yield token


# --- Text ---


def restored(transform: Transform, written: str, is_final: bool) -> str:
    """The source text of a transformed one. Unlike transform.decode it accepts what a model makes up.

    An operator at the end waits for what it acts on, unless the text is final.
    """

    def decode(match: Any) -> str:
        try:
            return transform.decode(match[0])
        except ValueError:
            waits = match.end() == len(written) and not is_final
            return "" if waits else REPLACEMENT

    return transform.operated.sub(decode, written)


class TextStream:
    """Turns tokens into text, one after the other. A character is given out when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.written = ""  # of all tokens so far, before the transform is undone
        self.n_shown = 0

    def add(self, ids: Sequence[int], is_final: bool = False) -> str:
        """The text that these tokens add to that of those before."""
        pieces = b"".join(self.tokenizer.piece_bytes[i] for i in ids)
        self.written += self.utf8.decode(pieces, is_final)
        text = restored(self.tokenizer.transform, self.without_added_blank(), is_final)
        new = text[self.n_shown :]
        self.n_shown = len(text)
        return new

    def without_added_blank(self) -> str:
        """Some tokenizers put a blank in front of every text, and take it away again."""
        if self.tokenizer.settings["remove_extra_whitespaces"]:
            return self.written.lstrip(" ")
        if self.tokenizer.settings["add_dummy_prefix"]:
            return self.written.removeprefix(" ")
        return self.written


def show(text: str) -> None:
    """Print text that a model wrote, at once."""
    if sys.stdout.isatty():
        text = text.translate(CONTROL_CHARACTERS)
    sys.stdout.write(text)
    sys.stdout.flush()


def remark(line: str) -> None:
    """Tell a person something beside the text."""
    print(line, file=sys.stderr, flush=True)


class Speaker:
    """A model with its tokenizer."""

    def __init__(self, reader: Reader, tokenizer: Tokenizer, sampling: Sampling) -> None:
        self.reader = reader
        self.tokenizer = tokenizer
        self.sampling = sampling

    def speak(self, prompt: str, seed: int, repeat_prompt: bool) -> None:
        """Print a sample that goes on from a prompt, and a remark on it."""
        # Bytes of the command line that are no text arrive as half surrogates, which no tokenizer knows.
        prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        prompt_ids = self.tokenizer.encode(prompt).tolist()
        stream = TextStream(self.tokenizer)
        shown_prompt = stream.add(prompt_ids)
        if repeat_prompt:
            show(shown_prompt)

        begin = time.perf_counter()
        n_tokens = 0
        try:
            for token in generate(self.reader, [self.tokenizer.sp.bos_id(), *prompt_ids], self.sampling, seed):
                n_tokens += 1
                show(stream.add([token]))
        finally:
            # After Ctrl-C too.
            show(stream.add([], is_final=True) + "\n")
        seconds = time.perf_counter() - begin

        end = "the document ends" if n_tokens < self.sampling.max_tokens else f"--max-tokens {n_tokens}"
        how = "no cache, the context is read again for each" if self.reader.make_cache is None else "cache"
        remark(f"[seed {seed}: {n_tokens} tokens, {n_tokens / seconds:.0f} per second ({how}), {end}]")


class Sample(NamedTuple):
    """A text that a model wrote, the prompt included."""

    prompt: str
    seed: int
    text: str


def card_samples(subject: Subject) -> list[Sample]:
    """Samples for model cards and records, which nobody has chosen: of CARD_PROMPTS, with seeds from CARD_SEED on."""
    samples = []
    for seed, prompt in enumerate(CARD_PROMPTS, start=CARD_SEED):
        reader = Reader(subject.script_module, subject.model)
        prompt_ids = subject.tokenizer.encode(prompt).tolist()
        new_ids = generate(reader, [subject.config.bos_id, *prompt_ids], CARD_SAMPLING, seed)
        text = TextStream(subject.tokenizer).add([*prompt_ids, *new_ids], is_final=True)
        samples.append(Sample(prompt, seed, text))
    return samples


# --- Command ---


def typed_lines() -> Iterator[str]:
    """Lines that a person types, or that a program writes, until their end."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then has arrow keys and a history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """A type of argument: a number from `low` to `high`."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high or math.isinf(value):
            limits = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    return parse


def count(text: str) -> int:
    """A type of argument: 1, 2, 3 ..."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a model's file, or the folder it is in")
    parser.add_argument("prompt", nargs="?", help='how the text begins; "" leaves it open, without it you are asked')
    parser.add_argument("--temperature", type=number(0), default=0.8, help="0 takes the most likely token (0.8)")
    parser.add_argument("--top-p", type=number(1e-9, 1), default=0.95, help="probability that is kept (0.95)")
    parser.add_argument("--min-p", type=number(0, 1), default=0.0, help="least share of the likeliest token (0)")
    parser.add_argument("--seed", type=int, default=1337, help="of the first sample; the next has the next (1337)")
    parser.add_argument("--samples", type=count, default=1, metavar="N", help="for each prompt (1)")
    parser.add_argument("--max-tokens", type=count, default=200, metavar="N", help="for each sample (200)")
    parser.add_argument("--script", type=Path, help="that loads the model (the record's own, or train_gpt.py)")
    parser.add_argument("--tokenizer", type=Path, help="the .model file (the one that the model was made with)")
    return parser.parse_args(argv)


def load_speaker(args: argparse.Namespace) -> Speaker:
    """Everything that the arguments name, found and read. OSError or ValueError where that fails."""
    # bfloat16, in which GPUs train, takes 1.5 times as long on a CPU.
    subject = open_subject(args.artifact, args.script, args.tokenizer, compute_dtype="float32")
    sampling = Sampling(args.temperature, args.top_p, args.min_p, args.max_tokens)
    return Speaker(Reader(subject.script_module, subject.model), subject.tokenizer, sampling)


def speak_to(prompts: Iterator[str], speaker: Speaker, args: argparse.Namespace) -> None:
    """Answer each prompt with --samples of text, each with a seed of its own."""
    seeds = itertools.count(args.seed)
    for prompt in prompts:
        for seed in itertools.islice(seeds, args.samples):
            if args.samples > 1:
                show(f"--- seed {seed} ---\n")
            # A person who has just typed the prompt still sees it.
            speaker.speak(prompt, seed, repeat_prompt=args.prompt is not None or not sys.stdin.isatty())


def main(argv: Sequence[str] | None = None) -> int:
    """0 at the end, also by Ctrl-C where prompts are typed; 130 after Ctrl-C in a sample that was asked for."""
    args = parse_arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character shows its number.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        speaker = load_speaker(args)
        speak_to(iter([args.prompt]) if args.prompt is not None else typed_lines(), speaker, args)
    except KeyboardInterrupt:
        return 0 if args.prompt is None else 130
    except BrokenPipeError:
        # The reader has seen enough, as in `| head`. What is left would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
