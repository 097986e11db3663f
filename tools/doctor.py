"""Say what this machine can do, and what would happen in a run. Trains nothing, and leaves no files.

    PRESET=smoke python tools/doctor.py                   of the run that PRESET=smoke python train_gpt.py would be
    python tools/doctor.py --preset=small --num_layers=6  settings as the script takes them

Every finding begins with a word:
ok        as it should be
note      worth knowing
warning   the run would do, but worse than it could: slower, shorter, or without something
FAIL      the run would stop, or lose its results

Exit status: 0 if there are only the first two, 1 with a warning, 2 with a FAIL.

It looks at one process, so it is started without torchrun. A step of a tiny model is really computed, and compiled if
COMPILE allows it. Then the real model takes a step on random tokens, if it fits into memory and is not hopelessly slow.
With COMPILE=0 all of it takes 10 to 30 seconds on two cores. Compiling adds up to COMPILE_SECONDS.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
if __name__ == "__main__":
    # The script sets this too. What is measured here should be what it gets.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import torch
    import torch.distributed as dist
    from bench import median_seconds, set_up
    from record import known_text

    import train_gpt as tg
except ImportError as error:
    # check_versions tells what to install, instead of a traceback.
    IMPORT_ERROR = str(error)
else:
    IMPORT_ERROR = ""

OLDEST_PYTHON = (3, 11)
COLUMNS = 100
WORDS = ("ok", "note", "warning", "FAIL")  # from harmless to severe
STATUS = {"ok": 0, "note": 0, "warning": 1, "FAIL": 2}

COMPILE_SECONDS = 180  # for a tiny step. The model takes longer
COMPILED_STEP = "--compiled-step"  # the argument with which this program calls itself
TINY_SEQ_LEN = 128
MOST_SECONDS_TO_MEASURE = 4.0  # for a forward and backward pass of a micro-batch, at the speed of matrix products
SETTINGS_SHOWN = 8

# What a run needs besides tensors: files of libraries and what the allocator keeps. Measured with PRESET=smoke.
SPARE_BYTES = 2**27
# Copies of the logits that exist at once while a pass is scored: before and after the softcap, and their softmax.
LOGITS_COPIES = 4
TIGHT = 0.8  # a warning if the estimate is above this part of the memory that is available
LOG_BYTES = 2**20
COMPILED_CODE_BYTES = 2**28
SHARED_MEMORY_BYTES = 2**29  # below it, NCCL fails on several GPUs; containers have 64 MiB by default

DATA_COMMANDS = {
    "smoke": "python data/build_shards.py",
    "small": "python data/download.py --variant sp1024",
    "baseline": "python data/download.py --variant sp1024",
    "record": "python data/download.py --variant sp8192",
    "tiny": "python data/download.py --variant sp8192",
}


class Finding(NamedTuple):
    word: str  # one of WORDS
    text: str  # a command to copy stands on a line of its own


Findings = Iterator[Finding]


class Report:
    """Prints findings as they come, and keeps the words."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.title = ""  # of the group that has just begun

    def examine(self, title: str, findings: Iterable[Finding]) -> None:
        """Print a group, with its title beside the first line.

        An exception in a check is a FAIL of this check, and ends only this one.
        """
        self.title = title
        try:
            for finding in findings:
                self.show(finding)
        except Exception as error:
            self.show(Finding("FAIL", in_one_line(error)))

    def show(self, finding: Finding) -> None:
        self.words.append(finding.word)
        indent = f"{self.title:<10} {finding.word:<8} "
        self.title = ""
        for paragraph in finding.text.splitlines():
            wrapped = textwrap.wrap(
                paragraph,
                COLUMNS,
                initial_indent=indent,
                subsequent_indent=" " * len(indent),
                break_long_words=False,
                break_on_hyphens=False,
            )
            print("\n".join(wrapped), flush=True)
            indent = " " * len(indent)

    def conclude(self) -> int:
        """Print what it comes to. -> exit status"""
        n_warnings = self.words.count("warning")
        n_failures = self.words.count("FAIL")
        warnings = "1 warning" if n_warnings == 1 else f"{n_warnings} warnings"
        if n_failures:
            verdict = f"The run would not succeed: {n_failures} FAIL, {warnings}."
        elif n_warnings:
            verdict = f"The run can start, with {warnings}."
        else:
            verdict = "The run can start."
        print(f"\n{verdict}")
        return max(STATUS[word] for word in self.words)


def in_one_line(error: Exception) -> str:
    """What went wrong, for people: messages of the script as they are, others with the name of their kind."""
    lines = str(error).strip().splitlines() or [""]
    if IMPORT_ERROR or isinstance(error, tg.EXPECTED_ERRORS):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]:.300}"


def in_words(n_bytes: float) -> str:
    """1610612736 -> "1.5 GiB" """
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.1f} GiB"
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"


# --- Software ---


def numbers_of(version: str) -> list[int]:
    """ "2.13.0+cpu" -> [2, 13, 0]"""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def check_versions(requirements: Path = ROOT / "requirements.txt") -> Findings:
    """Python and the packages that requirements.txt names, against the versions it wants."""
    versions = [f"python {platform.python_version()}"]
    missing = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        wanted = line.partition("#")[0].strip()
        if not wanted:
            continue
        name, _, oldest = wanted.partition(">=")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{wanted} is not installed")
            continue
        versions.append(f"{name} {version}")
        if numbers_of(version) < numbers_of(oldest):
            missing.append(f"{name} {version} is older than {wanted}")

    yield Finding("ok", ", ".join(versions))
    if sys.version_info < OLDEST_PYTHON:
        yield Finding("FAIL", f"python {platform.python_version()} is too old: install Python 3.11 or newer")
    if missing:
        yield Finding("FAIL", f"{'; '.join(missing)}:\npython -m pip install -r {requirements.name}")
    elif IMPORT_ERROR:
        yield Finding("FAIL", f"an import fails ({IMPORT_ERROR}):\npython -m pip install -r {requirements.name}")


# --- What would be run ---


@dataclass
class Plan:
    """The settings of the run, and what the checks found out for the checks behind them."""

    env: dict[str, str]
    from_files: dict[str, str]  # settings that the files of the data decide
    config: tg.GPTConfig
    hp: tg.Hyperparameters
    world: tg.World
    compiled: bool = False
    data: tg.Data | None = None  # None if it cannot be opened


def make_plan(arguments: Sequence[str], environment: Mapping[str, str]) -> Plan:
    """Read settings as the script does. Raises ValueError, as the script does, for those that make no sense."""
    env = {**environment, **tg.read_arguments(arguments)}
    checkpoint = tg.find_checkpoint(env)
    if checkpoint:
        env.update(tg.settings_to_go_on(checkpoint, env))
    from_files = tg.settings_from_files(env)
    env.update(from_files)
    config = tg.from_env(tg.GPTConfig, env)
    hp = tg.from_env(tg.Hyperparameters, env)

    # Only the device is asked for. Variables of a launcher would make this process wait for others.
    alone = {name: value for name, value in env.items() if name not in tg.LAUNCHER_VARIABLES}
    world = tg.start_world(alone)
    dtype = tg.pick_dtype(world.device, config.compute_dtype)
    config = replace(
        config,
        eval_seq_len=config.eval_seq_len or hp.train_seq_len,
        compute_dtype=str(dtype).removeprefix("torch."),
    )
    return Plan(env, from_files, config, hp, world)


def check_settings(plan: Plan) -> Findings:
    """What is set, what it changes, and what would not be read."""
    hp = plan.hp
    if hp.eval_artifact:
        yield Finding("note", f"EVAL_ARTIFACT={hp.eval_artifact}: nothing is trained, this model is scored")
    else:
        yield Finding("ok", f"PRESET={hp.preset}: {tg.PRESET_NOTES[hp.preset]}")

    # As the script logs it: the dtype that was chosen is no setting of a person.
    asked = tg.from_env(tg.GPTConfig, plan.env)
    defaults = tg.all_settings({"PRESET": hp.preset})
    changed = tg.changed_settings(asked, hp, plan.env)
    changed.pop("EVAL_ARTIFACT", None)
    for name, value in list(changed.items())[:SETTINGS_SHOWN]:
        source = ", from the manifest of the data" if name in plan.from_files else ""
        was = defaults[name]
        yield Finding("note", f"{name}={show_value(value)} instead of {show_value(was)}: {note_of(name)}{source}")
    if len(changed) > SETTINGS_SHOWN:
        yield Finding("note", f"also changed: {', '.join(list(changed)[SETTINGS_SHOWN:])}")

    same = sorted((tg.SETTINGS & plan.env.keys()) - {*changed, "PRESET", "EVAL_ARTIFACT", *plan.from_files})
    if same:
        yield Finding("note", f"set to what PRESET={hp.preset} has anyway: {', '.join(same)}")
    if unread := tg.unread_variables(plan.env):
        yield Finding("warning", f"not read, the script has no such settings: {', '.join(unread)}")
    # A package that is missing is a ValueError, which names the command that installs it.
    tg.Tracker(hp.track)


def show_value(value: object) -> str:
    """As a person would set it."""
    return str(int(value)) if isinstance(value, bool) else str(value) or "''"


def note_of(name: str) -> str:
    """What --help of the script says about a setting."""
    for cls in (tg.GPTConfig, tg.Hyperparameters):
        field = cls.__dataclass_fields__.get(name.lower())
        if field is not None:
            return str(field.metadata["help"])
    raise ValueError(f"{name} is not a setting")


# --- Machine ---


def cgroup_folders(
    controller: str, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[Path]:
    """The folders of Linux's control groups whose limits hold for this process, of version 2 and of version 1."""
    folders = []
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        # In a container the path may be the host's. Then only `base` exists, which is the container's own.
        place = base / path.lstrip("/")
        for folder in (place, *place.parents):
            if folder.is_relative_to(base) and folder.is_dir():
                folders.append(folder)
    return folders


def numbers_in(path: Path) -> list[float]:
    """The numbers in a file of a control group, inf for "max" and for -1; empty without the file."""
    try:
        words = path.read_text().split()
    except OSError:
        return []
    return [math.inf if word in ("max", "-1") else float(word) for word in words]


def cgroup_cores(folders: Sequence[Path]) -> float:
    """The seconds of CPU per second that the groups allow; inf without a limit."""
    limit = math.inf
    for folder in folders:
        shares = [numbers_in(folder / "cpu.max")]
        shares.append(numbers_in(folder / "cpu.cfs_quota_us") + numbers_in(folder / "cpu.cfs_period_us"))
        for numbers in shares:
            if len(numbers) == 2:
                quota, period = numbers
                limit = min(limit, quota / period)
    return limit


def cgroup_memory(folders: Sequence[Path]) -> float:
    """The bytes that the groups leave to this process; inf without a limit. Cached files count as free."""
    left = math.inf
    for folder in folders:
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            numbers = numbers_in(folder / limit_name) + numbers_in(folder / used_name)
            if len(numbers) != 2:
                continue
            limit, used = numbers
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            left = min(left, limit - used + (int(cached[1]) if cached else 0))
    return left


def usable_cores() -> int:
    """As many cores as this process may keep busy."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(n_cores, cgroup_cores(cgroup_folders("cpu")))))


def available_memory(device: torch.device) -> float:
    """Bytes that are free for tensors: on a GPU those of the GPU, else those that this process may still get."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available_kib = tg.proc_value("/proc/meminfo", "MemAvailable").removesuffix(" kB")
    if available_kib:
        available = 1024.0 * int(available_kib)
    else:
        # Not on Linux. What others use is not known there.
        available = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(available, cgroup_memory(cgroup_folders("memory")))


def check_machine(plan: Plan) -> Findings:
    """Cores, memory, GPUs, the dtype, and variables of a launcher."""
    n_cores = usable_cores()
    n_threads = torch.get_num_threads()
    cores = f"{n_cores} of {os.cpu_count()} cores, {n_threads} threads"
    if plan.world.device.type == "cpu" and n_threads > n_cores:
        yield Finding("warning", f"{cores}: they get in each other's way, set OMP_NUM_THREADS={n_cores}")
    else:
        yield Finding("ok", cores)
    busy = os.getloadavg()[0]
    if busy > n_cores / 2:
        yield Finding("note", f"other programs keep about {busy:.1f} cores busy: times measured here are too long")

    memory = available_memory(torch.device("cpu"))
    group_limit = cgroup_memory(cgroup_folders("memory"))
    by_whom = ", which a limit of the container leaves" if memory == group_limit else ""
    yield Finding("ok", f"{in_words(memory)} of memory available{by_whom}")

    yield from check_gpus(plan.world.device)
    yield Finding("ok", f"COMPUTE_DTYPE: {plan.config.compute_dtype}, {why_dtype(plan)}")
    yield from check_launcher(plan.env)


def check_gpus(device: torch.device) -> Findings:
    if device.type != "cuda":
        has_gpu = Path("/dev/nvidia0").exists()
        if has_gpu and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
            text = f"torch {torch.__version__} does not see the GPU that is here: install its build for CUDA"
            yield Finding("warning", text)
        else:
            yield Finding("ok", f"no GPU of CUDA: the run computes on {device.type}")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        text = f"GPU {number}: {torch.cuda.get_device_name(number)}, {in_words(free)} of {in_words(total)} free"
        yield Finding("ok" if free > total / 2 else "warning", text)


def why_dtype(plan: Plan) -> str:
    asked = tg.from_env(tg.GPTConfig, plan.env).compute_dtype
    if asked != "auto":
        return "as it was asked for"
    if plan.config.compute_dtype == "bfloat16":
        return "which this hardware multiplies faster"
    if plan.world.device.type == "cpu":
        return "because this CPU has no instructions for bfloat16 (AVX-512 BF16)"
    return "because this device has no fast bfloat16"


def check_launcher(env: Mapping[str, str]) -> Findings:
    """Variables of torchrun that are left over from something else."""
    found = [name for name in tg.LAUNCHER_VARIABLES if name in env]
    if not found:
        return
    values = " ".join(f"{name}={env[name]}" for name in found)
    try:
        place = tg.read_launcher(env)
    except ValueError as error:
        yield Finding("FAIL", str(error))
        return
    if place.size > 1:
        yield Finding("FAIL", f"{values}: the run would wait for {place.size} ranks, unset them and use torchrun")
    else:
        yield Finding("note", f"{values}: left over from a launcher, harmless")


# --- Back-ends ---


def tiny_settings(config: tg.GPTConfig, hp: tg.Hyperparameters) -> tuple[tg.GPTConfig, tg.Hyperparameters]:
    """Settings of a model with the same techniques and the same size of heads, that takes no time."""
    head_dim = min(config.head_dim, 128)
    n_heads = min(config.num_heads // config.num_kv_heads, 4)
    config = replace(
        config,
        vocab_size=config.bos_id + 64,
        num_layers=3,
        model_dim=n_heads * head_dim,
        num_heads=n_heads,
        num_kv_heads=1,
        mlp_mult=min(config.mlp_mult, 4),
        rope_dims=min(config.rope_dims, head_dim),
        num_loops=min(config.num_loops, 1),
        loop_start=1,
        loop_end=1,
    )
    return config, replace(hp, train_seq_len=TINY_SEQ_LEN, train_batch_tokens=2 * TINY_SEQ_LEN)


def tiny_step(plan: Plan, compiled: bool) -> float:
    """Forward, backward and optimizer step of a tiny model. -> seconds, of the first step"""
    config, hp = tiny_settings(plan.config, plan.hp)
    device = plan.world.device
    model = tg.GPT(config)
    tg.init_weights(model, hp)
    model.to(device)
    loss_fn = functools.partial(model.loss, compiled=compiled)
    learner = tg.Learner(model, loss_fn, tg.build_optimizers(model, hp, plan.world))
    run = tg.Run(config, hp, plan.world, tg.Ledger(device), log0=lambda line: None, compiled=compiled)

    ids = torch.randint(config.vocab_size, (2, TINY_SEQ_LEN), device=device)
    began = time.perf_counter()
    loss = float(tg.train_step(learner, [(ids, ids)], 1.0, hp.muon_momentum, run).train_loss)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of a tiny model is {loss}: this torch computes wrongly here")
    return time.perf_counter() - began


def check_backends(plan: Plan) -> Findings:
    """What trains: torch as it is, torch.compile, and what carries tensors between processes."""
    seconds = tiny_step(plan, compiled=False)
    yield Finding("ok", f"a step of a tiny model works, {1000 * seconds:.0f} ms")
    yield from check_compile(plan)
    kind = tg.attention_kind(plan.config, plan.world.device, plan.compiled)
    yield Finding("ok", f"attention: {kind}")
    yield from check_process_groups()


def check_compile(plan: Plan) -> Findings:
    """Sets plan.compiled."""
    wish = plan.hp.compile
    if wish == "0":
        yield Finding("ok", "torch.compile: not used, COMPILE=0")
        return
    if wish == "auto" and not tg.has_compiler(plan.world.device):
        yield Finding("note", "torch.compile: not used, there is no C++ compiler with Python's headers")
        return

    result = compiled_step_in_time(plan.env)
    reason = result.get("reason")
    if not reason:
        plan.compiled = True
        yield Finding("ok", f"torch.compile: a step of a tiny model works, compiled in {result['seconds']:.0f} s")
    elif result.get("timed_out"):
        plan.compiled = True
        yield Finding("warning", f"torch.compile: {reason}; COMPILE=0 starts at once")
    elif wish == "1" or result.get("starts"):
        yield Finding("FAIL", f"torch.compile does not work here ({reason}): mend that, or set COMPILE=0")
    else:
        yield Finding("warning", f"torch.compile does not work here ({reason}): slower without it")


def compiled_step_in_time(env: Mapping[str, str], limit: float = COMPILE_SECONDS) -> dict[str, object]:
    """What compiled_step returns, from a process that is ended after `limit` seconds, with its compilers."""
    process = subprocess.Popen(
        [sys.executable, __file__, COMPILED_STEP],
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"reason": f"a step of a tiny model is not compiled after {limit:.0f} s", "timed_out": True}
    finally:
        # Also after Ctrl-C, which a process group of its own does not get.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    for line in out.splitlines()[::-1]:
        if line.startswith("{"):
            return dict(json.loads(line))
    last_words = err.strip().splitlines() or [f"exit status {process.returncode}"]
    return {"reason": last_words[-1][:200], "starts": True}


def compiled_step() -> dict[str, object]:
    """Compile something tiny, as the script does, and then a step of a tiny model, which is more likely to fail.

    -> "seconds", or else "reason" and whether the script "starts", because it only tries the former
    """
    plan = make_plan([], os.environ)
    reason = tg.why_not_compile(plan.world.device)
    if reason:
        return {"reason": reason, "starts": False}
    try:
        return {"seconds": tiny_step(plan, compiled=True)}
    except Exception as error:
        return {"reason": in_one_line(error)[:200], "starts": True}


def check_process_groups() -> Findings:
    """Join a group of one process, as torchrun would have it join one of many."""
    backends = []
    if dist.is_gloo_available():
        backends.append("gloo")
    if torch.cuda.is_available() and dist.is_nccl_available():
        backends.append("nccl")
    if not backends:
        yield Finding("note", "no process groups: this torch runs one process only")
        return

    working = []
    for backend in backends:
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        try:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            dist.all_reduce(torch.ones(1, device=device))
            dist.destroy_process_group()
            working.append(backend)
        except RuntimeError as error:
            yield Finding("warning", f"torchrun will not work, because {backend} does not: {in_one_line(error)}")
    if working:
        yield Finding("ok", f"process groups for torchrun: {', '.join(working)}")


# --- Data ---


def check_data(plan: Plan) -> Findings:
    """Open tokenizer and shards as the script does. Sets plan.data."""
    try:
        config, hp = tg.resolve_settings(plan.env, plan.world.device)
        plan.data = tg.open_data(config, hp, plan.world)
    except FileNotFoundError as error:
        text = str(error)
        if "DATA_PATH" not in plan.env and tg.HOW_TO_GET_DATA in text:
            text = text.replace(f" {tg.HOW_TO_GET_DATA}", f"\n{DATA_COMMANDS[plan.hp.preset]}")
        yield Finding("FAIL", text)
        return
    plan.config = config

    identity = plan.data.val.identity
    lossless = {True: "lossless", False: "lossy", "unknown": "not known to be lossless"}[identity["tokenizer_lossless"]]
    yield Finding("ok", f"tokenizer {hp.tokenizer_path}: {config.vocab_size:,} pieces, {lossless}")
    loader = plan.data.train
    if loader is not None:
        n_steps = loader.epoch_sequences / loader.n_sequences
        n_shards = len(loader.stream.files)
        shards = "1 shard" if n_shards == 1 else f"{n_shards} shards"
        yield Finding("ok", f"train: {len(loader.stream):,} tokens in {shards}, enough for {n_steps:,.0f} new steps")

    partly = ""
    if identity["partial"]:
        partly = f", of which VAL_MAX_TOKENS={hp.val_max_tokens} are scored: a quick look, no record"
    source = "counted from the pieces" if identity["val_accounting"] == "pieces" else "from the sidecar"
    yield Finding("ok", f"val: {identity['val_tokens']:,} tokens, {identity['val_bytes']:,} bytes {source}{partly}")
    known = known_text(identity["val_documents"], identity["val_text_sha256"])
    if known is None:
        sha256 = identity["val_text_sha256"]
        yield Finding("note", f"val text: sha256 {sha256:.8}, not in records/texts.json, so it ranks nowhere")
    else:
        yield Finding("ok", f"val text: {known.name}{', which ranks nowhere' if known.demonstration else ''}")


# --- Memory and time of the model ---


class Sizes(NamedTuple):
    """Numbers of parameters, by the optimizer that trains them, and bytes of the artifact."""

    matrices: int  # Muon
    others: int  # AdamW
    artifact_bytes: int  # at most

    @property
    def parameters(self) -> int:
        return self.matrices + self.others


def sizes_of(config: tg.GPTConfig, hp: tg.Hyperparameters) -> Sizes:
    """Counted on a model without storage, so that one too large for the machine can be counted too."""
    nowhere = torch.device("meta")
    with nowhere:
        model = tg.GPT(config)
    muon, _ = tg.build_optimizers(model, hp, tg.World(device=nowhere))
    matrices = sum(p.numel() for group in muon.param_groups for p in group["params"])
    parameters = sum(p.numel() for p in model.parameters())

    if hp.codec == "trellis_ans":
        n_codes = sum(layer.weight.numel() for layer in tg.coded_layers(model).values())
        artifact_bytes = tg.bytes_limit(model, n_codes, hp)
    else:
        # zlib makes less of it, by how much depends on the weights.
        artifact_bytes = sum(tensor.n_bytes for tensor in tg.tensor_table(model, hp.codec)) + 2**16
    return Sizes(matrices, parameters - matrices, artifact_bytes)


def micro_batch_tokens(plan: Plan) -> int:
    """Tokens of a forward pass. On CUDA at least, because there the run finds out what fits."""
    hp = plan.hp
    wanted = hp.micro_batch_tokens
    if not wanted:
        wanted = tg.CPU_MICRO_BATCH_TOKENS if plan.world.device.type == "cpu" else hp.train_seq_len
    n_sequences = max(1, wanted // hp.train_seq_len)
    return hp.train_seq_len * min(n_sequences, hp.train_batch_tokens // hp.train_seq_len)


def activation_bytes(config: tg.GPTConfig, n_tokens: int, seq_len: int) -> int:
    """What a forward pass keeps for the backward pass, counted tensor by tensor on a model without storage.

    This is an upper bound: a compiled model keeps less, and attention without a dense mask does too.
    """
    sizes = dict[int, int]()
    # While they are held, no other storage gets the same address.
    kept: list[torch.UntypedStorage] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model = tg.GPT(config)
        ids = torch.zeros(n_tokens // seq_len, seq_len, dtype=torch.int64)
        model.loss(ids, ids)
    for p in model.parameters():
        sizes.pop(p.untyped_storage()._cdata, None)
    return sum(sizes.values())


def training_bytes(sizes: Sizes, hp: tg.Hyperparameters, compiled: bool) -> int:
    """Weights, gradients and all that is kept beside them in training, in float32."""
    # Muon holds its momentum, and while it steps the stacked gradients and its updates. AdamW holds two moments.
    of_matrices = 4 * sizes.matrices * (1 + 1 + 3)
    of_others = 4 * sizes.others * (1 + 1 + 2)
    n_copies = bool(hp.ema_decay) + (compiled and hp.warmup_steps > 0)
    return of_matrices + of_others + 4 * sizes.parameters * n_copies


def scoring_bytes(config: tg.GPTConfig, hp: tg.Hyperparameters) -> int:
    """What a forward pass of the evaluation takes for its logits, by far its largest tensors."""
    n_tokens = config.eval_seq_len * tg.rows_per_pass(config, hp.val_batch_size)
    return LOGITS_COPIES * 4 * n_tokens * config.vocab_size


def own_memory() -> int:
    """Bytes that this process holds: Python, torch and what the checks before left."""
    return 1024 * int(tg.proc_value("/proc/self/status", "VmRSS").removesuffix(" kB") or 0)


def peak_memory(plan: Plan, sizes: Sizes) -> dict[str, int]:
    """An estimate of the most memory that the run has at once, by its purpose, in bytes.

    An allocator keeps what it once had, so that the phases of a run add up.
    """
    config = plan.config
    hp = plan.hp
    parts = {"scoring": scoring_bytes(config, hp), "programs": SPARE_BYTES}
    if plan.world.device.type == "cpu":
        parts["programs"] += own_memory()
    if hp.eval_artifact:
        parts["weights"] = 4 * sizes.parameters
    else:
        parts["weights"] = training_bytes(sizes, hp, plan.compiled)
        parts["activations"] = activation_bytes(config, micro_batch_tokens(plan), hp.train_seq_len)
    return parts


# What to do if this part of the memory is the largest, and all of it is too much.
REMEDIES = {
    "weights": "choose a smaller model",
    "activations": "lower MICRO_BATCH_TOKENS or TRAIN_SEQ_LEN",
    "scoring": "lower VAL_BATCH_SIZE or EVAL_SEQ_LEN",
    "programs": "end other programs",
}


def check_model(plan: Plan) -> Findings:
    """Memory and time. Builds the model only if it fits into memory."""
    config = plan.config
    hp = plan.hp
    device = plan.world.device
    sizes = sizes_of(config, hp)
    yield Finding(
        "ok",
        f"{sizes.parameters:,} parameters: {config.num_layers} layers of width {config.model_dim}, "
        f"vocabulary of {config.vocab_size:,}",
    )

    parts = peak_memory(plan, sizes)
    needed = sum(parts.values())
    available = available_memory(device)
    if device.type == "cpu":
        # What this process holds, the run's process will have instead.
        available += own_memory()
    of_what = ", ".join(f"{in_words(n_bytes)} {name}" for name, n_bytes in sorted(parts.items(), key=lambda p: -p[1]))
    memory = f"memory: about {in_words(needed)} at the peak ({of_what}), {in_words(available)} available"
    if needed > available:
        largest = max(parts, key=lambda name: parts[name])
        yield Finding("FAIL", f"{memory}: {REMEDIES[largest]}. The model was not built here")
        return
    yield Finding("warning" if needed > TIGHT * available else "ok", memory)
    if not hp.eval_artifact:
        yield from check_time(plan, sizes)


def check_time(plan: Plan, sizes: Sizes) -> Findings:
    """Ask the script whether it would start at all, and then measure."""
    hp = plan.hp
    warnings: list[str] = []
    run = tg.Run(plan.config, hp, plan.world, tg.Ledger(plan.world.device), log0=warnings.append)
    refused = ""
    try:
        tg.require_fast_device(sizes.parameters, run)
    except ValueError as error:
        refused = str(error)
        yield Finding("FAIL", refused)
    for line in warnings:
        yield Finding("warning", line.removeprefix("warning: "))

    # The rule by which the script decides.
    passes = len(plan.config.layer_order(looping=True)) / plan.config.num_layers
    dtype = tg.pick_dtype(plan.world.device, plan.config.compute_dtype)
    per_token = 6 * sizes.parameters * passes / tg.operations_per_second(plan.world.device, dtype)
    if refused or per_token * micro_batch_tokens(plan) > MOST_SECONDS_TO_MEASURE:
        seconds = per_token * hp.train_batch_tokens
        at_least = duration(seconds)
        yield Finding("note", f"a step takes {at_least} at least, by the speed of matrix products; it was not measured")
        if not refused:
            yield Finding("note", told_steps(hp, seconds, at_most=True))
        return

    timing = measure(plan)
    how = "compiled" if timing.compiled else "not compiled"
    n_micro = f"from one of its {timing.n_micro} micro-batches" if timing.n_micro > 1 else "measured whole"
    yield Finding("ok", f"a step takes {timing.step_seconds:.2f} s, {n_micro}, {how}")
    yield Finding("note", told_steps(hp, timing.step_seconds))
    yield Finding("note", told_total(plan, timing))
    n_gpus = torch.cuda.device_count()
    if n_gpus > 1:
        yield Finding("note", f"this is one of {n_gpus} GPUs: torchrun --nproc_per_node={n_gpus} uses all of them")


class Timing(NamedTuple):
    step_seconds: float
    n_micro: int  # micro-batches of a step
    score_seconds: float  # of a validation; nan without data
    compiled: bool


def measure(plan: Plan) -> Timing:
    """Time the real model on random tokens: a micro-batch, the rest of a step, and scoring some tokens."""
    hp = plan.hp
    device = plan.world.device
    # Two of the largest micro-batches are enough, and a step of a large run has thousands.
    n_sequences = hp.train_batch_tokens // hp.train_seq_len
    n_enough = max(1, 2 * max(tg.CUDA_MICRO_BATCH_TOKENS, hp.micro_batch_tokens) // hp.train_seq_len)
    batch_tokens = hp.train_seq_len * min(n_sequences, n_enough)
    # Compiling the whole model takes a minute or two on a CPU, and makes less of a difference there.
    compiled = plan.compiled and device.type != "cpu"
    env = {**plan.env, "TRAIN_BATCH_TOKENS": str(batch_tokens), "COMPILE": "1" if compiled else "0"}

    with tempfile.TemporaryDirectory() as folder:
        setup = set_up(env, plan.world, Path(folder))
        run, learner, loader = setup
        tg.fit_micro_batch(learner, loader, run)
        ids, targets = loader.batch(0)[0]
        n_micro = math.ceil(n_sequences / loader.micro_sequences)
        step = functools.partial(tg.train_step, learner, [(ids, targets)], 0.0, 0.9, run)
        step_seconds = seconds_of(step, device)
        if n_micro > 1:
            step_seconds += (n_micro - 1) * seconds_of(lambda: learner.loss_fn(ids, targets, True).backward(), device)

        score_seconds = math.nan
        if plan.data is not None:
            val = plan.data.val
            n_tokens = min(len(val.ids), 4096 if device.type == "cpu" else 2**18)
            part = tg.ValSplit(val.ids[:n_tokens], val.bytes[:n_tokens], val.identity)
            logits_fn = functools.partial(learner.model, compiled=run.compiled)
            score = functools.partial(tg.evaluate, logits_fn, part, run.config, hp.val_batch_size, run.world)
            score_seconds = seconds_of(score, device) * len(val.ids) / n_tokens
    return Timing(step_seconds, n_micro, score_seconds, compiled)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """The time of a call, after a first one that allocates and compiles. Of short ones, the median of five."""
    function()
    seconds = median_seconds(function, device, repeats=1)
    return seconds if seconds > 0.5 else median_seconds(function, device, repeats=5)


def steps_in_time(hp: tg.Hyperparameters, step_seconds: float) -> int:
    """Steps of the run: ITERATIONS, or as many as end before the time limit."""
    if not hp.seconds_for_steps:
        return hp.iterations
    return min(hp.iterations, math.floor(hp.seconds_for_steps / step_seconds))


def told_steps(hp: tg.Hyperparameters, step_seconds: float, at_most: bool = False) -> str:
    n_steps = steps_in_time(hp, step_seconds)
    about = "at most" if at_most else "about"
    if not hp.seconds_for_steps:
        return f"no time limit: all ITERATIONS={hp.iterations} steps, {duration(n_steps * step_seconds)}"
    if n_steps == hp.iterations:
        return f"all ITERATIONS={hp.iterations} steps fit into MAX_WALLCLOCK_SECONDS={hp.max_wallclock_seconds:g}"
    return (
        f"{about} {n_steps:,} of ITERATIONS={hp.iterations} steps fit into "
        f"MAX_WALLCLOCK_SECONDS={hp.max_wallclock_seconds:g}"
    )


def told_total(plan: Plan, timing: Timing) -> str:
    """What the whole run takes, phase by phase."""
    hp = plan.hp
    n_steps = steps_in_time(hp, timing.step_seconds)
    phases = {"train": n_steps * timing.step_seconds}
    if hp.codec == "trellis_ans" and hp.max_wallclock_seconds:
        phases["calibrate"] = hp.max_wallclock_seconds - hp.seconds_for_steps
    n_scores = 1  # the end of training
    if hp.val_loss_every:
        n_scores += math.ceil(n_steps / hp.val_loss_every)
    if math.isfinite(timing.score_seconds):
        phases["validate"] = n_scores * timing.score_seconds
        phases["evaluate"] = timing.score_seconds
    parts = ", ".join(f"{duration(seconds)} {name}" for name, seconds in phases.items())
    compiling = "compiling and " if plan.compiled else ""
    return f"in all about {duration(sum(phases.values()))} ({parts}), besides {compiling}quantizing"


def duration(seconds: float) -> str:
    """In the unit that people would say it in."""
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


# --- Files ---


def checkpoint_bytes(sizes: Sizes, hp: tg.Hyperparameters) -> int:
    """What a run must store to go on later: weights, their average, and what the optimizers keep, in float32."""
    of_matrices = 4 * sizes.matrices * (1 + 1)
    of_others = 4 * sizes.others * (1 + 2)
    average = 4 * sizes.parameters if hp.ema_decay else 0
    return of_matrices + of_others + average


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the one above it that exists already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_files(plan: Plan) -> Findings:
    """Whether the run can write its files, and whether there is room for them."""
    hp = plan.hp
    out = Path(hp.out_dir)
    folder = nearest_folder(out)
    if not folder.is_dir():
        yield Finding("FAIL", f"OUT_DIR={out}: {folder} is no folder, name another")
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("FAIL", f"OUT_DIR={out}: {folder} cannot be written, name another")
        return
    if hp.run_id and not hp.resume and hp.run_folder.exists():
        yield Finding("FAIL", f"RUN_ID={hp.run_id} names a run whose files are in {hp.run_folder}: choose another")

    yield from check_room(plan, folder)
    yield from check_other_folders(plan)


def check_room(plan: Plan, folder: Path) -> Findings:
    hp = plan.hp
    free = shutil.disk_usage(folder).free
    told = f"OUT_DIR={hp.out_dir}: {in_words(free)} free"
    if hp.eval_artifact:
        yield Finding("ok" if free > LOG_BYTES else "FAIL", f"{told} for a log")
        return

    sizes = sizes_of(plan.config, hp)
    weights = 4 * sizes.parameters
    artifact = sizes.artifact_bytes
    needed = weights + artifact + LOG_BYTES
    what = f"{in_words(needed)} needed ({in_words(weights)} as trained, at most {in_words(artifact)} artifact)"
    if free < needed:
        yield Finding("FAIL", f"{told}, {what}: make room, or name another folder")
        return
    yield Finding("ok", f"{told}, {what}")

    # Two are kept, and another is being written.
    one = checkpoint_bytes(sizes, hp)
    if hp.checkpoint_every:
        n_checkpoints = tg.CHECKPOINTS_KEPT + 1
        text = f"checkpoints, one every {duration(hp.checkpoint_every)} of training: {in_words(n_checkpoints * one)}"
    else:
        n_checkpoints = 1
        text = f"a checkpoint, if a signal asks for one: {in_words(one)}"
    if free < needed + n_checkpoints * one:
        yield Finding("warning", f"{text}, for which there is no room")
    else:
        yield Finding("ok", text)


def check_other_folders(plan: Plan) -> Findings:
    temporary = Path(tempfile.gettempdir())
    free = shutil.disk_usage(temporary).free
    if plan.compiled and "TORCHINDUCTOR_CACHE_DIR" not in plan.env and free < COMPILED_CODE_BYTES:
        yield Finding("warning", f"{temporary}: {in_words(free)} free, little for compiled code; TMPDIR names another")
    else:
        yield Finding("ok", f"{temporary}: {in_words(free)} free")

    # Ranks of one machine meet there. A single process does not use it.
    shared = Path("/dev/shm")
    if torch.cuda.device_count() > 1 and shared.exists():
        free = shutil.disk_usage(shared).free
        text = f"{shared}: {in_words(free)} free for NCCL"
        if free < SHARED_MEMORY_BYTES:
            yield Finding("warning", f"{text}, which is little: start the container with --shm-size=1g")
        else:
            yield Finding("ok", text)


# --- What the command does ---


def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if list(arguments) == [COMPILED_STEP]:
        print(json.dumps(compiled_step()))
        return 0
    if "TORCHELASTIC_RUN_ID" in os.environ:
        print("error: doctor.py looks at one process, start it without torchrun", file=sys.stderr)
        return 2

    report = Report()
    report.examine("Software", check_versions())
    if IMPORT_ERROR:
        return report.conclude()
    try:
        plan = make_plan(arguments, os.environ)
    except Exception as error:
        report.examine("Settings", [Finding("FAIL", in_one_line(error)), Finding("note", "the rest depends on them")])
        return report.conclude()
    report.examine("Settings", check_settings(plan))
    report.examine("Machine", check_machine(plan))
    report.examine("Back-ends", check_backends(plan))
    report.examine("Data", check_data(plan))
    report.examine("Model", check_model(plan))
    report.examine("Files", check_files(plan))
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
