"""What the artifact's parts are worth: bits per byte against bytes, for the same trained weights.

    python study.py train  --data DIR --tokenizer FILE --work DIR       train both models, keep their float32 weights
    python study.py curves --score DIR [DIR ...] --work DIR             points.jsonl: every way to store them
    python study.py roles  --work DIR                                   roles.jsonl: predicted and measured loss
    python study.py full   --score DIR [DIR ...] --work DIR --data DIR --tokenizer FILE
                                                                        full.jsonl: a model of full size within 16 MB
    python study.py report                                              tables and curves.svg from the two files

DIR holds shards with 1,024 pieces (for `full` with 8,192), FILE their SentencePiece model; the weights stay in --work.
A point is one way to store the same weights: a rule for the steps, a trellis, and a size in bits per weight that is
found by search. It says how long three coders make the result, and how well the stored model scores on the first SCORED
tokens of each validation split (`full`: COMPARED). Brotli needs `pip install brotli`.

Models, quantizer and coder are those of the script of this study (COMMIT below). It comes out of git's history, which
needs a full clone. To use a file instead, set STUDY_SCRIPT=FILE.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent

# The script of the study. It was never the one in the root: only this folder held it.
COMMIT = "11fe8a2f26c664ad5acb41dcce058a032d713680"
SCRIPT_PATH = "records/studies/2026-11-24_ArtifactStudy/train_gpt.py"
SCRIPT_SHA256 = "2d1564aa6fd467e1729281c072598c115fc5943e4b7a29c92905f698cb75f5f7"

SCORED = 30_000  # tokens of each validation split
COMPARED = 8_192  # tokens of the first split, for the divergence
COMMON = "PRESET=smoke MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0 MICRO_BATCH_TOKENS=2048 COMPUTE_DTYPE=float32 "
MODELS = {
    "2.1 M": COMMON + "ITERATIONS=450",
    "0.6 M": COMMON + "MODEL_DIM=128 ITERATIONS=400",
}
# Trained only as far as two busy cores come in half an hour.
FULL = "36 M"
FULL_SETTINGS = (
    "PRESET=record MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0 COMPUTE_DTYPE=float32 TRAIN_SEQ_LEN=1024 "
    "TRAIN_BATCH_TOKENS=2048 MICRO_BATCH_TOKENS=2048 ITERATIONS=70 EMA_DECAY=0.9 ENABLE_LOOPING_AT=0.6 "
    "GPTQ_CALIBRATION_BATCHES=2"
)
BATCHES = 16  # of 2,048 training tokens, for the moments and for the measured loss


def find_script(folder: Path) -> Path:
    """The file that STUDY_SCRIPT names or else, written into `folder`, the script as git remembers it."""
    if "STUDY_SCRIPT" in os.environ:
        return Path(os.environ["STUDY_SCRIPT"]).resolve()

    shown = subprocess.run(["git", "show", f"{COMMIT}:{SCRIPT_PATH}"], cwd=HERE, capture_output=True)
    if shown.returncode != 0:
        sys.exit(f"git does not know commit {COMMIT[:7]}: run `git fetch --unshallow`, or set STUDY_SCRIPT=FILE")
    if hashlib.sha256(shown.stdout).hexdigest() != SCRIPT_SHA256:
        sys.exit(f"{SCRIPT_PATH} of commit {COMMIT[:7]} is not the script with sha256 {SCRIPT_SHA256}")
    path = folder / "train_gpt.py"
    path.write_bytes(shown.stdout)
    return path


def load_script(path: Path) -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    return module


# The folder lives as long as this process: torch.compile and the size of the code look at the file.
SCRIPT_FOLDER = tempfile.TemporaryDirectory()
SCRIPT = find_script(Path(SCRIPT_FOLDER.name))
tg = load_script(SCRIPT)


def weights_path(work: Path, name: str, seed: int) -> Path:
    return work / f"{name.replace(' ', '_')}{f'_seed{seed}' if seed != 1 else ''}.pt"


def settings(name: str, data: Path, seed: int) -> tuple[Any, Any]:
    chosen = {**MODELS, FULL: FULL_SETTINGS}[name]
    env = {**dict(item.split("=") for item in chosen.split()), "DATA_PATH": str(data), "SEED": str(seed)}
    config, hp = tg.from_env(tg.GPTConfig, env), tg.from_env(tg.Hyperparameters, env)
    return dataclasses.replace(config, eval_seq_len=hp.train_seq_len), hp


def make_run(name: str, data: Path, seed: int) -> Any:
    config, hp = settings(name, data, seed)
    loader = tg.Loader(tg.TokenStream(str(data), "fineweb_train_[0-9]*.bin"), hp, config.vocab_size, tg.World())
    model = tg.GPT(config)
    tg.init_weights(model, hp)
    return tg.Trainer(model.loss, model, tg.build_optimizers(model, hp, tg.World()), loader, hp, tg.World())


def train(args: argparse.Namespace) -> None:
    for name in args.models:
        run = make_run(name, args.data, args.seed)
        loss_fn, _ = tg.compile_model(run.model, tg.wants_compile("auto", torch.device("cpu")))
        ledger = tg.Ledger(torch.device("cpu"))
        tg.train(run._replace(loss_fn=loss_fn), lambda: tg.Score(1.0, 1, 1), ledger, print)
        torch.save(
            {"state": run.model.state_dict(), "data": str(args.data), "tokenizer": str(args.tokenizer)},
            weights_path(args.work, name, args.seed),
        )


def load(work: Path, name: str, seed: int) -> tuple[Any, str]:
    """-> a run with the trained model, and the tokenizer's path"""
    saved = torch.load(weights_path(work, name, seed), weights_only=True)
    run = make_run(name, Path(saved["data"]), seed)
    run.model.load_state_dict(saved["state"])
    return run, saved["tokenizer"]


def moments_of(run: Any) -> Any:
    hp = dataclasses.replace(run.hp, gptq_calibration_batches=BATCHES)
    return tg.calibrate(run._replace(hp=hp), run.hp.iterations, tg.Ledger(torch.device("cpu")))


# Rules for the steps: log2 of the step of each row, up to a common constant.


def clips(name: str, w: torch.Tensor) -> torch.Tensor:
    """The published hand-set ones: k standard deviations of the row / (2**(bits - 1) - 1)."""
    k, levels = (14.0, 63) if "tok_emb" in name else (13.0, 31) if ".attn." in name else (11.5, 31)
    return (k / levels * w.std(1)).log2()


RULES: dict[str, Callable[[str, torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]] = {
    "published clips": lambda n, w, m: clips(n, w),
    "published clips, one step per matrix": lambda n, w, m: clips(n, w).mean().expand(len(w)),
    "equal cost, per matrix": lambda n, w, m: -0.5 * (m[1].mean() * tg.factorize(m[0])[1].mean()).log2().expand(len(w)),
    "equal cost, per row": lambda n, w, m: (
        -0.5 * ((0.77 * m[1] + 0.23 * m[1].mean()) * tg.factorize(m[0])[1].mean()).log2()
    ),
}


def quantize(run: Any, moments: Any, rule: str, kind: str, scale: float) -> dict[str, tuple[Any, Any, Any]]:
    """-> by weight: exponents, codes, quantizers; kind: rtn, or the number of states with or without the rate term"""
    layers, coded = tg.coded_layers(run.model), {}
    wanted = {n: RULES[rule](n, m.weight.detach(), moments[n]) for n, m in layers.items()}
    largest = max(float(x.max()) for x in wanted.values())
    for n, m in layers.items():
        w = m.weight.detach()
        finest = 8 * (scale * tg.MAX_CODE / w.abs().amax(1)).log2()
        exponents = torch.minimum((8 * (largest - wanted[n])).round(), finest.floor()).clamp(0, 255).byte().numpy()
        step = tg.row_steps(scale, exponents)
        if kind == "rtn":
            codes = (w / step).round().clamp(-tg.MAX_CODE, tg.MAX_CODE).to(torch.int8)
            coded[n] = exponents, codes.numpy(), np.zeros(codes.shape, np.uint8)
        else:
            states, rate = (int(kind.split()[0]), 0.0 if "no rate" in kind else 1.0)
            order = column_order(n, kind, moments[n][0])
            factor = tg.factorize(moments[n][0][order][:, order])
            pair = tg.quantize_codes(w[:, order], factor, step, states, rate)
            coded[n] = exponents, *(x[:, order.argsort()].contiguous().numpy() for x in pair)
    return coded


def column_order(name: str, kind: str, moments: torch.Tensor) -> torch.Tensor:
    """Largest second moment first, in all matrices or in those whose inputs, hidden units, can be renamed for free. A
    decoder of several states would have to know the order: its bytes are not counted here."""
    if "ordered" in kind and ("MLP" not in kind or "mlp.proj" in name):
        return moments.diagonal().argsort(descending=True)
    return torch.arange(len(moments))


def states_of(kind: str) -> int:
    return 1 if kind == "rtn" else int(kind.split()[0])


def sizes(run: Any, kind: str, scale: float, coded: Any) -> dict[str, int]:
    """Bytes of the artifact by coder; with zlib and brotli the codes take the place of the words."""
    packed = tg.pack_artifact(run.model, states_of(kind), scale, coded)
    length = tg.ARTIFACT_PREFIX.unpack_from(packed)[2]
    unpacker = zlib.decompressobj()
    payload = unpacker.decompress(packed[16 + length :])[: -2 * math.prod(tg.FREQUENCIES)]
    plain = payload + b"".join(codes.tobytes() for _, codes, _ in coded.values())
    found = {"ours": len(packed), "zlib": 16 + length + len(zlib.compress(plain, 9))}
    try:
        import brotli

        found["brotli"] = 16 + length + len(brotli.compress(plain, quality=11, lgwin=24))
    except ImportError:
        pass
    return found


def with_codes(run: Any, scale: float, coded: Any) -> Any:
    """A copy of the model with the weights that the codes stand for."""
    model = copy.deepcopy(run.model)
    layers = tg.coded_layers(model)
    with torch.no_grad():
        for n, (exponents, codes, quantizer) in coded.items():
            step = tg.row_steps(scale, exponents)
            layers[n].weight.copy_(tg.dequantize(torch.from_numpy(codes), torch.from_numpy(quantizer), step))
        for n, p in model.named_parameters():
            if n not in layers:
                q, s = tg.quantize_rows(p.reshape(-1, p.shape[-1]))
                p.copy_((q.float() * s.float()).view(p.shape))
    return model


def splits(run: Any, folders: list[Path], tokenizer: str, scored: int = SCORED) -> dict[str, Any]:
    found = {}
    for folder in folders:
        hp = dataclasses.replace(run.hp, data_path=str(folder), val_max_tokens=scored)
        sp, sha256 = tg.load_tokenizer(tokenizer, run.model.config)
        found[folder.name] = tg.load_val_split(hp, run.model.config, sp, sha256)
    return found


def score(model: Any, run: Any, parts: dict[str, Any]) -> dict[str, float]:
    return {n: tg.evaluate(model.forward, s, run.model.config, run.hp, tg.World()).val_bpb for n, s in parts.items()}


@torch.no_grad()
def divergence(exact: Any, model: Any, split: Any) -> float:
    """Kullback-Leibler divergence of the predictions, in nats per token. Unlike the loss it has no part that is linear
    in the errors, whose sign is chance: it tells apart what the loss of so few tokens does not."""
    ids = torch.from_numpy(split.ids[:COMPARED].astype(np.int64)).view(-1, exact.config.eval_seq_len)
    p, q = (torch.log_softmax(m(ids).double(), -1) for m in (exact, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def points(seed: int) -> Iterator[tuple[str, str, float]]:
    """Rule, kind and bits per weight, from what matters most; of further seeds only what the findings rest on."""
    if seed != 1:
        yield "published clips", "1 state, no rate", 3.25
        for kind, bits in itertools.product(("1 state, no rate", "8 states, no rate"), (3.25, 2.75)):
            yield "equal cost, per row", kind, bits
        return
    for kind in ("1 state, no rate", "8 states", "4 states", "1 state", "rtn"):
        yield "equal cost, per row", kind, 3.25
    for rule in ("published clips", "equal cost, per matrix", "published clips, one step per matrix"):
        yield rule, "1 state, no rate", 3.25
    for kind in ("rtn", "8 states"):
        yield "published clips", kind, 3.25
    for bits in (3.25, 4.0, 2.75):
        yield "equal cost, per row", "8 states, no rate", bits
    for bits in (2.75, 3.25):
        yield "equal cost, per row", "4 states, no rate", bits
    for way in ("ordered", "MLP ordered"):
        for states in ("1 state", "8 states"):
            yield "equal cost, per row", f"{states}, no rate, {way}", 3.25
    for bits in (2.75, 4.0):
        for kind in ("1 state, no rate", "8 states"):
            yield "equal cost, per row", kind, bits
        yield "published clips", "1 state, no rate", bits


def curves(args: argparse.Namespace) -> None:
    path = HERE / "points.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(p["model"], p["rule"], p["kind"], p["bits"]) for p in lines if p.get("seed", 1) == args.seed}
    for name in args.models:
        run, tokenizer = load(args.work, name, args.seed)
        parts = splits(run, args.score, tokenizer)
        base = {"model": name, "seed": args.seed, "parameters": sum(p.numel() for p in run.model.parameters())}

        def write(point: dict[str, Any], base: dict[str, Any] = base) -> None:
            with path.open("a") as file:
                file.write(json.dumps({**base, **point}) + "\n")
            print({**base, **point}, flush=True)

        if (name, "-", "float32", 32.0) not in done:
            write({"rule": "-", "kind": "float32", "bits": 32.0, "bytes": {}, "val_bpb": score(run.model, run, parts)})
            int8 = tg.pack_artifact(run.model)
            (args.work / "int8.ptz").write_bytes(int8)
            loaded = tg.load_artifact(args.work / "int8.ptz")
            loaded.compute_dtype = torch.float32
            write(
                {
                    "rule": "-",
                    "kind": "int8",
                    "bits": 8.0,
                    "bytes": {"zlib": len(int8)},
                    "val_bpb": score(loaded, run, parts),
                }
            )
        moments = moments_of(run)
        for rule, kind, bits in points(args.seed):
            if (name, rule, kind, bits) in done:
                continue
            scale = find_scale(run, moments, rule, kind, bits)
            seconds = time.perf_counter()
            coded = quantize(run, moments, rule, kind, scale)
            seconds = round(time.perf_counter() - seconds, 1)
            n = sum(codes.size for _, codes, _ in coded.values())
            point = {"rule": rule, "kind": kind, "bits": bits, "bytes": sizes(run, kind, scale, coded), "codes": n}
            model = with_codes(run, scale, coded)
            point |= {"quantize_seconds": seconds, "kl": divergence(run.model, model, next(iter(parts.values())))}
            write({**point, "val_bpb": score(model, run, parts)})


def find_scale(run: Any, moments: Any, rule: str, kind: str, bits: float) -> float:
    """The step that makes the whole artifact so many bits per weight, by the fast trellis first."""
    fast, scale = "rtn" if kind == "rtn" else "1 state, no rate", 0.1
    for way in (fast, fast, fast, kind):
        coded = quantize(run, moments, rule, way, scale)
        total = len(tg.pack_artifact(run.model, states_of(way), scale, coded))
        excess = 8 * total / sum(codes.size for _, codes, _ in coded.values()) - bits
        if abs(excess) < 0.01 and way == kind:
            break
        scale *= 2 ** float(np.clip(excess, -2, 2))
    return scale


def full(args: argparse.Namespace) -> None:
    """Store a trained model of full size as a run does, with seconds and memory of every part."""
    if not weights_path(args.work, FULL, args.seed).exists():
        args.models = [FULL]
        train(args)
    run, tokenizer = load(args.work, FULL, args.seed)
    parts, since = splits(run, args.score, tokenizer, COMPARED), time.perf_counter()
    moments = tg.calibrate(run, run.hp.iterations, tg.Ledger(torch.device("cpu")))
    tokens = run.hp.gptq_calibration_batches * run.hp.train_batch_tokens
    base: dict[str, Any] = {"model": FULL, "parameters": sum(p.numel() for p in run.model.parameters())}
    base |= {"threads": torch.get_num_threads(), "calibration_tokens": tokens}
    base |= {"calibrate_seconds": round(time.perf_counter() - since, 1), "calibrate_peak_mib": peak()}
    exact, code = score(run.model, run, parts), SCRIPT.stat().st_size
    packing: list[float] = []
    tg.pack_artifact = timed(tg.pack_artifact, packing)
    for states in args.states:
        packing.clear()
        passes, since = list[Any](), time.perf_counter()

        def log(line: str, passes: list[Any] = passes, start: float = since) -> None:
            fields = dict(item.split(":") for item in line.split()[1:])
            fields = {k: float(v) for k, v in fields.items()}
            passes.append({**fields, "seconds": round(time.perf_counter() - start, 1)})
            print(passes[-1], flush=True)

        packed = tg.fit_artifact(run.model, moments, dataclasses.replace(run.hp, trellis_states=states), log)
        line = base | {"states": states, "bytes_code": code, "bytes_total": code + len(packed), "passes": passes}
        line |= {"fit_seconds": round(time.perf_counter() - since, 1), "fit_peak_mib": peak()}
        line |= {"pack_seconds": packing[:]}
        path = args.work / f"full_{states}.ptz"
        path.write_bytes(packed)
        since = time.perf_counter()
        model = tg.load_artifact(path)
        line |= {"load_seconds": round(time.perf_counter() - since, 1)}
        model.compute_dtype = torch.float32
        line |= {"pre_bpb": exact, "post_bpb": score(model, run, parts)}
        line |= {"kl": divergence(run.model, model, next(iter(parts.values())))}
        print(line, flush=True)
        with (HERE / "full.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        seconds.append(round(time.perf_counter() - start, 1))
        return result

    return call


def peak() -> int:
    return int(tg.peak_memory_mib(torch.device("cpu"))[0])


ROLES = {
    "queries and keys": ("c_q", "c_k"),
    "values": ("c_v",),
    "attention, out": ("attn.proj",),
    "MLP, in": ("mlp.fc",),
    "MLP, out": ("mlp.proj",),
    "embedding": ("tok_emb",),
}


def roles(args: argparse.Namespace) -> None:
    """Loss on training tokens with the matrices of one role quantized, against what the moments predict."""
    with (HERE / "roles.jsonl").open("w") as file:
        for name in args.models:
            run, _ = load(args.work, name, args.seed)
            moments = moments_of(run)
            batches = [pair for i in range(BATCHES) for pair in run.loader.batch(run.hp.iterations + BATCHES + i)]

            @torch.no_grad()
            def loss(model: Any, batches: Any = batches) -> float:
                return float(np.mean([float(model.loss(ids, targets)) for ids, targets in batches]))

            before, layers = loss(run.model), tg.coded_layers(run.model)
            scale = 2 * find_scale(run, moments, "equal cost, per row", "1 state, no rate", 3.25)
            coded = quantize(run, moments, "equal cost, per row", "1 state, no rate", scale)
            for role, parts in ROLES.items():
                mine = {n: c for n, c in coded.items() if any(part in n for part in parts)}
                model = with_codes(run, scale, mine)
                predicted = 0.0
                for n in mine:
                    e = (tg.coded_layers(model)[n].weight - layers[n].weight).detach()
                    predicted += float(0.5 * (moments[n][1] * ((e @ moments[n][0]) * e).sum(1)).sum())
                line = {"model": name, "role": role, "predicted": predicted, "measured": loss(model) - before}
                file.write(json.dumps(line | {"codes": sum(c[1].size for c in mine.values())}) + "\n")
                print(line, flush=True)


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def report(args: argparse.Namespace) -> None:
    everything = read("points.jsonl")
    found = [p for p in everything if p.get("seed", 1) == 1]
    spread(everything)
    for model in dict.fromkeys(p["model"] for p in found):
        mine = [p for p in found if p["model"] == model]
        exact = next(p for p in mine if p["kind"] == "float32")["val_bpb"]
        sets = list(exact)
        print(f"\n{model}, trained: " + ", ".join(f"{s} {exact[s]:.4f}" for s in sets))
        print("\n| steps | codes | bits | ours | brotli | zlib | " + " | ".join(f"tax, {s}" for s in sets) + " | KL |")
        print("|---" * (7 + len(sets)) + "|")
        for p in sorted(mine, key=lambda p: (p["bits"], p["val_bpb"][sets[0]])):
            if p["kind"] != "float32":
                coders = " | ".join(str(p["bytes"].get(c, "-")) for c in ("ours", "brotli", "zlib"))
                tax = " | ".join(f"{p['val_bpb'][s] - exact[s]:+.4f}" for s in sets)
                print(f"| {p['rule']} | {p['kind']} | {p['bits']} | {coders} | {tax} | {p.get('kl', math.nan):.4f} |")
    print("\n| model | role | predicted, nats | measured |\n|---|---|---|---|")
    for r in read("roles.jsonl"):
        print(f"| {r['model']} | {r['role']} | {r['predicted']:.4f} | {r['measured']:.4f} |")
    draw(found)


def spread(found: list[dict[str, Any]]) -> None:
    """Tables of the points that were made with every seed: mean and deviation over the seeds, and the trellis with our
    coder against plain GPTQ with brotli at equal bytes (log-linear between the two sizes of the latter)."""
    by_seed = {(p["model"], p.get("seed", 1), p["rule"], p["kind"], p["bits"]): p for p in found}
    sets, seeds = list(found[0]["val_bpb"]), sorted({key[1] for key in by_seed})
    print(f"\nSeeds {', '.join(map(str, seeds))}, mean and deviation\n")
    print("| model | steps | codes | bits | " + " | ".join(f"tax, {s}" for s in sets) + " | KL |")
    print("|---" * (5 + len(sets)) + "|")
    means: dict[tuple[str, str, float], tuple[float, float, Any]] = {}
    for model in dict.fromkeys(key[0] for key in by_seed):
        for rule, kind, bits in points(seed=2):
            pairs = [[by_seed[model, n, *way] for way in (("-", "float32", 32.0), (rule, kind, bits))] for n in seeds]
            columns = [np.array([b["val_bpb"][s] - a["val_bpb"][s] for a, b in pairs]) for s in sets]
            columns.append(np.array([b["kl"] for _, b in pairs]))
            cells = " | ".join(f"{x.mean():.4f} ± {x.std(ddof=1):.4f}" for x in columns)
            print(f"| {model} | {rule} | {kind} | {bits} | {cells} |")
            if rule != "published clips":
                ours, brotli = (float(np.mean([b["bytes"][coder] for _, b in pairs])) for coder in ("ours", "brotli"))
                means[model, kind, bits] = ours, brotli, np.array([x.mean() for x in columns])
    print("\n| 8 states, ours, against 1 state, brotli | bits | " + " | ".join(f"tax, {s}" for s in sets) + " | KL |")
    print("|---" * (3 + len(sets)) + "|")
    for (model, kind, bits), (ours, _, values) in means.items():
        if kind.startswith("8"):
            (_, few, high), (_, many, low) = (means[model, "1 state, no rate", b] for b in (2.75, 3.25))
            plain = high * (low / high) ** ((ours - few) / (many - few))
            print(f"| {model} | {bits} | {' | '.join(f'{100 * x:+.0f} %' for x in values / plain - 1)} |")


def draw(found: list[dict[str, Any]]) -> None:
    """curves.svg: tax and divergence against bytes, for each way to choose the codes; dotted: coded with brotli."""
    import matplotlib

    matplotlib.use("Agg")
    # With a fixed salt and without a date, the same points give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "study", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(p["model"] for p in found))
    ways = list(dict.fromkeys((p["rule"], p["kind"]) for p in found if "codes" in p))
    figure, grid = plt.subplots(2, len(models), figsize=(11, 8), layout="constrained", squeeze=False)
    for column, model in enumerate(models):
        exact = next(p for p in found if p["model"] == model and p["kind"] == "float32")["val_bpb"]
        first = next(iter(exact))
        for number, way in enumerate(ways):
            mine = [p for p in found if p["model"] == model and (p["rule"], p["kind"]) == way]
            mine.sort(key=lambda p: float(p["bits"]))
            for coder, style in (("ours", "o-"), ("brotli", "x:")):
                x = [p["bytes"][coder] for p in mine if coder in p["bytes"]]
                for row, y in enumerate(([p["val_bpb"][first] - exact[first] for p in mine], [p["kl"] for p in mine])):
                    if len(x) == len(y):
                        label = ": ".join(way) if coder == "ours" and (row, column) == (0, 0) else None
                        color = plt.get_cmap("tab20")(number)
                        grid[row][column].plot(x, y, style, color=color, markersize=5, label=label)
        for row, name in enumerate((f"bpb above the trained weights, {first}", "KL divergence, nats per token")):
            grid[row][column].set(title=model, xlabel="bytes of the artifact", ylabel=name, yscale="log")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(HERE / "curves.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "curves", "roles", "full", "report"])
    parser.add_argument("--data", type=Path, help="shards to train on")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--score", type=Path, nargs="+", help="shards to score on")
    parser.add_argument("--work", type=Path, help="where the trained weights are kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--states", type=int, nargs="+", default=[8, 1], help="of the trellis, for `full`")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    commands = {"train": train, "curves": curves, "roles": roles, "full": full, "report": report}
    commands[args.command](args)


if __name__ == "__main__":
    main()
