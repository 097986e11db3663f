"""Merge models that were trained apart into one, without training.

    python tools/merge.py soup runs/a runs/b runs/c --out merged                    their mean
    python tools/merge.py soup runs/a runs/b --weights 0.9 0.1 --out merged
    python tools/merge.py slerp runs/a runs/b --t 0.3 --out merged                  along the sphere
    python tools/merge.py ties runs/a runs/b --base runs/trunk --density 0.2 --out merged
    python tools/merge.py dare runs/a runs/b --base runs/trunk --density 0.5 --seed 1 --out merged
    python tools/merge.py inspect runs/a runs/b                                     how far apart they are

Models are artifacts of this project, or folders in the layout of Hugging Face (tools/parents.py). They need one
architecture and one tokenizer, and they should have a long part of their training in common: models of independent
seeds are in different basins, and their mean is worse than either. The child comes in the format of the first one, an
artifact with float32 weights. merge.json beside it tells how it was made, with the sha256 of all files.

soup    Wortsman et al. 2022 (arXiv 2203.05482): the mean of the weights
slerp   Shoemake 1985: the great circle between two tensors, taken as vectors
ties    Yadav et al. 2023 (arXiv 2306.01708): of each difference to the base, the largest entries; for each weight the
        sign with more mass; the mean of the differences that have this sign
dare    Yu et al. 2023 (arXiv 2311.03099): of each difference to the base, a random part, scaled up by as much
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from parents import Parent, open_parent, require_alike, write_child
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

# Directions closer than this have no great circle that rounding leaves alone.
PARALLEL = 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Methods, each for one tensor
# ----------------------------------------------------------------------------------------------------------------------


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Tensors of one shape -> their mean. The weights count relative to their sum."""
    total = math.fsum(weights)
    mean = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        mean += tensor.double() * (weight / total)
    return mean.float()


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From `a` (t = 0) to `b` (t = 1) along the great circle of their directions. Parallel ones take the straight line.

    The angle is that of the directions; lengths are blended with the same factors.
    """
    p = a.double().flatten()
    q = b.double().flatten()
    lengths = p.norm() * q.norm()
    cosine = float((p @ q / lengths).clamp(-1, 1)) if lengths > 0 else 1.0
    angle = math.acos(cosine)
    if math.sin(angle) < PARALLEL:
        return weighted_mean([a, b], [1 - t, t])
    mixed = math.sin((1 - t) * angle) / math.sin(angle) * p + math.sin(t * angle) / math.sin(angle) * q
    return mixed.view(a.shape).float()


def largest(difference: Tensor, density: float) -> Tensor:
    """The `density` of the entries that are largest by magnitude, at least one; the others become 0."""
    n_kept = max(1, round(density * difference.numel()))
    if n_kept == difference.numel():
        return difference
    order = difference.abs().flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(difference.numel(), dtype=torch.bool)
    kept[order[:n_kept]] = True
    return difference * kept.view(difference.shape)


def ties(base: Tensor, tensors: Sequence[Tensor], density: float, scale: float) -> Tensor:
    """The base plus `scale` times what the trimmed differences to it agree on."""
    differences = torch.stack([largest(tensor.double() - base.double(), density) for tensor in tensors])
    sign = differences.sum(0).sign()
    agrees = (differences.sign() == sign) & (sign != 0)
    mean = (differences * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return (base.double() + scale * mean).float()


def dare(base: Tensor, tensors: Sequence[Tensor], density: float, scale: float, seeds: Sequence[int]) -> Tensor:
    """The base plus `scale` times the mean of differences of which a random `density` is kept and divided by it."""
    total = torch.zeros_like(base, dtype=torch.float64)
    for tensor, seed in zip(tensors, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(base.shape, generator=generator, dtype=torch.float64) < density
        total += (tensor.double() - base.double()) * kept / density
    return (base.double() + scale * total / len(tensors)).float()


def seed_of(name: str, parent: Parent, seed: int) -> int:
    """A seed for one tensor of one parent, whatever the order of tensors and parents."""
    identity = f"{seed} {name} {sorted(parent.sha256.items())}"
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:7], "little")


# ----------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------


def merged(args: argparse.Namespace, parents: Sequence[Parent], base: Parent | None) -> Callable[[str], Tensor]:
    """A function that gives a tensor of the child. What is no floating-point number comes from the first parent."""

    def read(name: str) -> Tensor:
        tensors = [parent.read(name) for parent in parents]
        if not tensors[0].is_floating_point():
            return tensors[0]
        if args.method == "soup":
            return weighted_mean(tensors, args.weights or [1.0] * len(tensors))
        if args.method == "slerp":
            return slerp(tensors[0], tensors[1], args.t)
        assert base is not None
        if args.method == "ties":
            return ties(base.read(name), tensors, args.density, args.scale)
        seeds = [seed_of(name, parent, args.seed) for parent in parents]
        return dare(base.read(name), tensors, args.density, args.scale, seeds)

    return read


def run(args: argparse.Namespace) -> None:
    parents = [open_parent(path, args.script) for path in args.parents]
    base = open_parent(args.base, args.script) if "base" in args else None
    require_alike([*parents, *([base] if base else [])])
    if args.method == "slerp" and len(parents) != 2:
        raise ValueError(f"slerp goes from one model to another, and {len(parents)} are named: name two")
    if args.method == "soup" and args.weights and len(args.weights) != len(parents):
        raise ValueError(f"--weights has {len(args.weights)} numbers for {len(parents)} models: give one for each")

    settings = {key: getattr(args, key) for key in ("weights", "t", "density", "scale", "seed") if key in args}
    about = {
        "method": args.method,
        "settings": settings,
        "parents": [{"path": str(parent.path), "sha256": parent.sha256} for parent in parents],
        "base": None if base is None else {"path": str(base.path), "sha256": base.sha256},
        "tokenizer_sha256": parents[0].tokenizer_sha256,
        "torch": torch.__version__,
    }
    read = merged(args, parents, base)
    with tqdm(total=len(parents[0].tensors), unit=" tensors", disable=None) as bar:

        def read_and_tell(name: str) -> Tensor:
            bar.update()
            return read(name)

        write_child(parents[0], args.out, read_and_tell, about)
    print(f"{args.out}: {args.method} of {len(parents)} models, {len(parents[0].tensors)} tensors")


def inspect(args: argparse.Namespace) -> None:
    """Print the tensors of a model and, beside another one, how far apart both are."""
    parents = [open_parent(path, args.script) for path in args.parents]
    require_alike(parents)
    first = parents[0]
    print(f"{'tensor':<48}{'shape':>18}{'length':>12}", end="")
    print("".join(f"{'distance':>12}{'cosine':>9}" for _ in parents[1:]))
    for name, info in first.tensors.items():
        a = first.read(name).double().flatten()
        line = f"{name:<48}{'x'.join(map(str, info.shape)):>18}{a.norm():>12.4g}"
        for other in parents[1:]:
            b = other.read(name).double().flatten()
            lengths = a.norm() * b.norm()
            cosine = f"{a @ b / lengths:.4f}" if lengths > 0 else "-"
            line += f"{(a - b).norm():>12.4g}{cosine:>9}"
        print(line)
    total = sum(math.prod(info.shape) for info in first.tensors.values())
    print(f"{len(first.tensors)} tensors, {total:,} parameters")


def part(text: str) -> float:
    """A type of argument: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to 1")
    return value


def positive_part(text: str) -> float:
    value = part(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 would keep nothing")
    return value


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="method", required=True, metavar="COMMAND")

    def command(name: str, help: str, makes_child: bool = True) -> argparse.ArgumentParser:
        of_command = commands.add_parser(name, help=help)
        of_command.add_argument("parents", nargs="+", type=Path, metavar="MODEL", help="an artifact or a folder")
        of_command.add_argument("--script", type=Path, help="that loads artifacts (the one beside each, or the root's)")
        if makes_child:
            of_command.add_argument("--out", type=Path, required=True, metavar="DIR", help="to be written")
        return of_command

    soup = command("soup", "the mean of the weights")
    soup.add_argument("--weights", nargs="+", type=part, help="of each model (default: the same)")
    between = command("slerp", "along the sphere from one model to another")
    between.add_argument("--t", type=part, default=0.5, help="0 is the first, 1 the second (0.5)")
    for name, density in (("ties", 0.2), ("dare", 0.5)):
        of_differences = command(name, "of differences to a common base")
        of_differences.add_argument("--base", type=Path, required=True, metavar="MODEL", help="that all descend from")
        of_differences.add_argument("--density", type=positive_part, default=density, help=f"part kept ({density})")
        of_differences.add_argument("--scale", type=float, default=1.0, help="of what is added to the base (1)")
    of_differences.add_argument("--seed", type=int, default=1337, help="of what is kept (1337)")
    command("inspect", "the tensors of a model, and how far others are from it", makes_child=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        if args.method == "inspect":
            inspect(args)
        else:
            run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
