"""Measure how fast the script is on this machine. Prints a table and, with --out, writes it as JSON.

    python tools/bench.py                               PRESET=smoke on a CPU, PRESET=record on a GPU
    PRESET=baseline python tools/bench.py --out a.json  any settings of the script, given as it takes them
    python tools/bench.py --compare a.json b.json       two results side by side
    python tools/bench.py --world-sizes 1,2             training steps on one process and on two
    python tools/bench.py --against other/train_gpt.py  whole runs of another script and of ours, in turn

The first form makes random tokens and weights, needs no data, and takes two to three minutes, a good part of it for the
compiler. It starts with an empty cache of compiled code. Times are medians. What it prints:

step_ms                     one training step; in further columns what it consists of, measured one by one
model_flop_utilisation      floating-point operations of a step, counted from the shapes and from what the mask leaves
                            of attention, against the rate of matrix products of these shapes alone on this machine
compile_cold_s, _warm_s     until the first step is done, less a step; warm in another process with the same cache
quantize_s, quantize_passes the search for the step; encode_s, decode_s: the file's words, and the model out of the file
export_*_mb_per_s           text to shards (data/build_shards.py) in one process

--against runs both scripts with the same settings and data, those of the environment, as users start them, and reads
the times of their steps in what they print. It works with every script that prints the lines of the published one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from build_shards import Encoder  # noqa: E402
from documents import embedded_documents  # noqa: E402
from record import script_settings  # noqa: E402
from shards import write_shard  # noqa: E402
from tokenizer import Tokenizer, train_tokenizer  # noqa: E402

import train_gpt as tg  # noqa: E402

DOCUMENT_TOKENS = 700  # of a random document, on average
EVAL_TOKENS = {"cpu": 8_192, "cuda": 2**20}
REPEATS = 5
EXPORT_CHARS = 1_000_000
TOKENIZER_CHARS = 300_000

Results = dict[str, Any]


class Setup(NamedTuple):
    """A run that is ready for its first step."""

    run: tg.Run
    learner: tg.Learner
    loader: tg.Loader


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """The median time of a call, once the device has done what it was given."""
    seconds = []
    for _ in range(repeats):
        tg.synchronize(device)
        began = time.perf_counter()
        function()
        tg.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# --- Random data and a model ---


def random_tokens(n: int, config: tg.GPTConfig) -> np.ndarray:
    """(n,) uint16, documents of random length."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, n).astype(np.uint16)
    ids[rng.random(n) < 1 / DOCUMENT_TOKENS] = config.bos_id
    ids[0] = config.bos_id
    return ids


def settings(device: torch.device) -> dict[str, str]:
    """The environment, with a preset that suits the machine if it names none."""
    return {"PRESET": "record" if device.type == "cuda" else "smoke", **os.environ}


def set_up(env: Mapping[str, str], world: tg.World, folder: Path) -> Setup:
    """Make shards of random tokens in `folder`, and a model with random weights."""
    config = tg.from_env(tg.GPTConfig, env)
    hp = dataclasses.replace(tg.from_env(tg.Hyperparameters, env), data_path=str(folder))
    dtype = tg.pick_dtype(world.device, config.compute_dtype)
    config = dataclasses.replace(
        config,
        eval_seq_len=config.eval_seq_len or hp.train_seq_len,
        compute_dtype=str(dtype).removeprefix("torch."),
    )

    if world.rank == 0:
        write_shard(folder / "fineweb_train_000000.bin", random_tokens(4 * hp.train_batch_tokens + 1, config))
    world.agree(0.0)  # the other ranks wait for the file
    loader = tg.Loader(tg.TokenStream(str(folder), "fineweb_train_*.bin"), hp, config.vocab_size, world)

    run = tg.Run(config, hp, world, tg.Ledger(world.device), log0=lambda line: None)
    run = dataclasses.replace(run, compiled=tg.wants_compile(run))
    model = tg.GPT(config)
    tg.init_weights(model, hp)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            # Projections begin as 0, which a quantizer and a coder would finish in no time.
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    model.to(world.device)
    loss_fn = functools.partial(model.loss, compiled=run.compiled)
    return Setup(run, tg.Learner(model, loss_fn, tg.build_optimizers(model, hp, world)), loader)


# --- Training steps ---


def measure_compile(setup: Setup) -> float:
    """Seconds from a new model to the end of its first step, less the time of a step."""
    device = setup.run.world.device
    began = time.perf_counter()
    tg.fit_micro_batch(setup.learner, setup.loader, setup.run)
    batch = setup.loader.batch(0)
    tg.train_step(setup.learner, batch, 0.0, 0.9, setup.run)
    tg.synchronize(device)
    first = time.perf_counter() - began

    step = functools.partial(tg.train_step, setup.learner, batch, 0.0, 0.9, setup.run)
    return max(0.0, first - median_seconds(step, device, repeats=2))


def measure_steps(setup: Setup) -> Results:
    """Milliseconds of a step and of its parts, for each order of the layers."""
    run, learner, loader = setup
    device = run.world.device
    batch = loader.batch(0)

    def forward_backward(looping: bool) -> None:
        for ids, targets in batch:
            loss = learner.loss_fn(ids, targets, looping) * (targets.numel() / run.hp.train_batch_tokens)
            loss.backward()

    def optimize() -> None:
        # A learning rate of 0 costs as much as any other, and leaves the weights as they are.
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()

    results: Results = {}
    for looping in (False, True) if run.config.num_loops else (False,):
        suffix = "_looped" if looping else ""
        step = functools.partial(tg.train_step, learner, batch, 0.0, 0.9, run, looping)
        step()
        seconds = median_seconds(step, device)
        results[f"step_ms{suffix}"] = 1000 * seconds
        results[f"tokens_per_s{suffix}"] = run.hp.train_batch_tokens / seconds
        results[f"forward_backward_ms{suffix}"] = 1000 * median_seconds(
            functools.partial(forward_backward, looping), device
        )
        if run.world.size == 1:
            flops = step_flops(setup, batch, looping)
            results[f"model_flop_utilisation{suffix}"] = flops / seconds / matmul_rate(setup, len(batch[0][0]))

    gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
    results["communication_ms"] = 1000 * median_seconds(lambda: run.world.sum_all(gradients), device)
    results["optimizer_ms"] = 1000 * median_seconds(optimize, device)
    learner.model.zero_grad(set_to_none=True)
    results["data_ms"] = 1000 * median_seconds(lambda: loader.batch(1), device)
    memory, _ = tg.peak_memory_mib(device)
    return {**results, "peak_memory_mib": memory, "micro_batch_sequences": len(batch[0][0])}


def visible_pairs(ids: torch.Tensor, config: tg.GPTConfig) -> int:
    """How many pairs of a token and another that it may attend to, itself included, are in a batch (B, T)."""
    document = tg.document_numbers(ids.cpu(), config)
    position = torch.arange(ids.size(1)).expand(len(document), -1)
    is_first = torch.ones_like(document, dtype=torch.bool)
    is_first[:, 1:] = document[:, 1:] != document[:, :-1]
    begins = torch.where(is_first, position, 0).cummax(1).values
    return int((position - begins + 1).sum()) * len(ids) // len(document)


def step_flops(setup: Setup, batch: tg.Batch, looping: bool) -> float:
    """Floating-point operations of matrix products and attention in a step, backward counted twice, no recomputing."""
    config = setup.run.config
    model = setup.learner.model
    weights_of_layer = [0] * config.num_layers
    for name, linear in tg.coded_layers(model).items():
        if name.startswith("blocks."):
            weights_of_layer[int(name.split(".")[1])] += linear.weight.numel()

    flops = 0.0
    for ids, _ in batch:
        attention = 4 * config.model_dim * visible_pairs(ids, config)  # scores, and sums of values
        for layer in config.layer_order(looping):
            flops += 2 * weights_of_layer[layer] * ids.numel() + attention
        flops += 2 * model.tok_emb.weight.numel() * ids.numel()
    return 3 * flops


def matmul_rate(setup: Setup, n_sequences: int) -> float:
    """Floating-point operations per second of the model's matrix products, one after another, forward only."""
    device = setup.run.world.device
    dtype = setup.learner.model.compute_dtype
    n_tokens = n_sequences * setup.run.hp.train_seq_len
    shapes = [tuple(layer.weight.shape) for layer in tg.coded_layers(setup.learner.model).values()]

    flops = 0.0
    seconds = 0.0
    for n_out, n_in in dict.fromkeys(shapes):
        x = torch.randn(n_tokens, n_in, device=device, dtype=dtype)
        w = torch.randn(n_out, n_in, device=device, dtype=dtype)
        product = functools.partial(F.linear, x, w)
        product()
        count = shapes.count((n_out, n_in))
        flops += count * 2 * n_tokens * n_in * n_out
        seconds += count * median_seconds(product, device, repeats=10)
    return flops / seconds


# --- Everything after training ---


def measure_evaluation(setup: Setup) -> Results:
    """Tokens per second that are scored, once what it needs is compiled."""
    run = setup.run
    ids = random_tokens(EVAL_TOKENS.get(run.world.device.type, EVAL_TOKENS["cpu"]), run.config)
    split = tg.ValSplit(ids, np.full(len(ids), 4, np.uint16), {"partial": False})
    logits_fn = functools.partial(setup.learner.model, compiled=run.compiled)
    score = functools.partial(tg.evaluate, logits_fn, split, run.config, run.hp.val_batch_size, run.world)
    score()
    return {"evaluate_tokens_per_s": len(ids) / median_seconds(score, run.world.device, repeats=2)}


def measure_artifact(setup: Setup, folder: Path) -> Results:
    """Seconds to calibrate on one step's tokens, to quantize, to encode and to decode."""
    hp = dataclasses.replace(setup.run.hp, gptq_calibration_batches=1, max_wallclock_seconds=0.0)
    lines: list[str] = []
    run = dataclasses.replace(setup.run, hp=hp, log0=lines.append)
    model = setup.learner.model
    path = folder / "model.ptz"
    results: Results = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        tg.synchronize(run.world.device)
        began = time.perf_counter()
        result = function()
        tg.synchronize(run.world.device)
        results[name] = time.perf_counter() - began
        return result

    moments = timed("calibrate_s", lambda: tg.calibrate(model, setup.loader, 0, run))
    results["calibrate_tokens_per_s"] = hp.train_batch_tokens / results["calibrate_s"]
    packed = timed("quantize_s", lambda: tg.fit_artifact(model, moments, run))
    results["quantize_passes"] = sum(line.startswith("quantize:") for line in lines)

    layers = {name: layer.weight.detach() for name, layer in tg.coded_layers(model).items()}
    same_steps = {name: torch.zeros(len(w), device=w.device) for name, w in layers.items()}
    contents = tg.rounded_contents(model, layers, tg.choose_steps(layers, same_steps, step=0.005))
    timed("encode_s", contents.encode)
    path.write_bytes(packed)
    parts = tg.read_artifact(path)
    timed("decode_s", lambda: tg.build_model(parts))
    return results


def measure_export() -> Results:
    """Millions of bytes of text per second, for training documents and for those whose bytes are counted."""
    sample = sorted(embedded_documents(), key=len)
    documents = sample[len(sample) // 2 :: 2]
    model = train_tokenizer(cut(documents, TOKENIZER_CHARS), 1024)
    texts = cut(documents, EXPORT_CHARS)
    n_bytes = sum(len(text.encode()) for text in texts)
    results: Results = {}
    for split in ("train", "val"):
        encoder = Encoder(Tokenizer(model, Path("bench.model")), split, held_out=set())
        began = time.perf_counter()
        encoder(texts)
        results[f"export_{split}_mb_per_s"] = n_bytes / 1e6 / (time.perf_counter() - began)
    return results


def cut(documents: list[str], n_chars: int) -> list[str]:
    """The first documents with so many characters in all."""
    kept: list[str] = []
    for text in documents:
        kept.append(text)
        n_chars -= len(text)
        if n_chars <= 0:
            break
    return kept


# --- What the command does ---


def measure(parts: str) -> Results:
    """All parts, or only `compile` or `steps`, in this process or on the ranks of a launcher."""
    world = tg.start_world(os.environ)
    env = settings(world.device)
    with tempfile.TemporaryDirectory() as name, shared_folder(world, Path(name)) as folder:
        setup = set_up(env, world, folder)
        run = setup.run
        results: Results = {
            "preset": env["PRESET"],
            **tg.describe_machine(world.device),
            "world_size": world.size,
            "compute_dtype": run.config.compute_dtype,
            "compiled": run.compiled,
            "attention": tg.attention_kind(run.config, world.device, run.compiled),
        }
        compile_seconds = measure_compile(setup)
        if run.compiled:
            results["compile_s"] = compile_seconds
        if parts != "compile":
            results |= measure_steps(setup)
        if parts == "all":
            results |= measure_evaluation(setup)
            results |= measure_artifact(setup, folder)
            results |= measure_export()
    return results


@contextlib.contextmanager
def shared_folder(world: tg.World, own: Path) -> Iterator[Path]:
    """Rank 0's temporary folder, on all ranks of this machine."""
    if world.size == 1:
        yield own
        return
    names = [str(own)]
    torch.distributed.broadcast_object_list(names, src=0)
    yield Path(names[0])
    world.agree(0.0)  # rank 0 removes it when all are done


def in_process(parts: str, cache: Path, ranks: int = 1) -> Results:
    """`measure` in processes of its own."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    out = cache / "results.json"
    command += [__file__, "--parts", parts, "--out", str(out)]
    threads = max(1, torch.get_num_threads() // ranks)
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(out.read_text()))


def bench() -> Results:
    """The default: everything, with an empty cache of compiled code at first."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        results = measure("all")
        if results["compiled"]:
            results["compile_cold_s"] = results.pop("compile_s")
            results["compile_warm_s"] = in_process("compile", Path(cache))["compile_s"]
    return results


def bench_world_sizes(sizes: list[int]) -> list[Results]:
    """Steps on so many processes of this machine. A CPU's threads are divided among them."""
    with tempfile.TemporaryDirectory() as cache:
        return [in_process("steps", Path(cache), ranks) for ranks in sizes]


# --- Against another script ---

STEP_LINE = re.compile(r"step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms")


def run_script(script: Path, steps: int, folder: Path) -> float:
    """Train `steps` steps with a script of the published style. -> ms per step, without the first third"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    env = {
        **settings(device),
        "RUN_ID": f"bench_{time.time_ns()}",
        "OUT_DIR": str(folder),
        "ITERATIONS": str(steps),
        "MAX_WALLCLOCK_SECONDS": "0",
        "VAL_LOSS_EVERY": "0",
        "TRAIN_LOG_EVERY": "1",
    }
    if "artifact_dir" in script_settings(script.read_text(encoding="utf-8")):
        # An earlier script has another folder for its artifact.
        env["ARTIFACT_DIR"] = str(folder)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment_of(env, script),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path.cwd(),
    )
    assert process.stdout is not None
    times: dict[int, int] = {}
    lines = []
    for line in process.stdout:
        lines.append(line)
        match = STEP_LINE.search(line)
        if match:
            times[int(match[1])] = int(match[2])
        if steps in times:
            # What comes after the last step is not asked for.
            process.terminate()
    process.wait()
    if steps not in times:
        raise ValueError(f"{script} did not print step:{steps}/{steps} train_loss:... :\n{''.join(lines[-20:])}")
    first = max(1, steps // 3)
    return (times[steps] - times[first]) / (steps - first)


def environment_of(env: dict[str, str], script: Path) -> dict[str, str]:
    """The settings of a run for a script. Others have no presets, so they get the preset's values one by one."""
    if script.resolve() == Path(tg.__file__).resolve():
        return env
    preset = dict(item.split("=") for item in tg.PRESETS[env["PRESET"]].split())
    return {**preset, **env}


def against(script: Path, steps: int, rounds: int) -> Results:
    """Ours and theirs in turn. -> medians and the ratio of tokens per second"""
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            theirs.append(run_script(script, steps, Path(name)))
            ours.append(run_script(Path(tg.__file__), steps, Path(name)))
    return {
        "script": str(script),
        "step_ms_theirs": statistics.median(theirs),
        "step_ms_ours": statistics.median(ours),
        "all_theirs": theirs,
        "all_ours": ours,
        "ratio_tokens_per_s": statistics.median(theirs) / statistics.median(ours),
    }


# --- Tables ---


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def table(columns: list[Results], compare: bool) -> str:
    """One line for each value. With two columns of numbers also the second as a multiple of the first."""
    names = dict.fromkeys(name for column in columns for name in column)
    lines = []
    for name in names:
        values = [column.get(name, "") for column in columns]
        cells = [f"{shown(value):>26}" for value in values]
        is_number = all(type(value) in (int, float) for value in values)
        if compare and is_number and values[0]:
            cells.append(f"{values[-1] / values[0]:>8.2f}x")
        lines.append(f"{name:<34}{''.join(cells)}")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure how fast the script is on this machine.",
        epilog="Settings are environment variables, as for the script: PRESET=baseline python tools/bench.py",
    )
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="JSON", help="show two results side by side")
    parser.add_argument("--against", type=Path, metavar="SCRIPT", help="run this script and ours in turn")
    parser.add_argument("--steps", type=int, default=15, help="steps of each run with --against (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each with --against (default: %(default)s)")
    parser.add_argument("--world-sizes", metavar="N,N", help="measure steps on so many processes, as in 1,2")
    parser.add_argument("--parts", choices=("all", "steps", "compile"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 2 or args.rounds < 1:
        parser.error("--steps must be at least 2 and --rounds at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.compare:
        columns = [json.loads(path.read_text(encoding="utf-8")) for path in args.compare]
    elif args.against:
        columns = [against(args.against, args.steps, args.rounds)]
    elif args.world_sizes:
        columns = bench_world_sizes([int(size) for size in args.world_sizes.split(",")])
    else:
        columns = [measure(args.parts) if args.parts else bench()]

    if os.environ.get("RANK", "0") == "0":
        print(table(columns, compare=bool(args.compare)))
        if args.out:
            args.out.write_text(json.dumps(columns[0] if len(columns) == 1 else columns, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
