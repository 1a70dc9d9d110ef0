"""The first minutes of kernels/cuda/wide_kernel.h and wgmma_kernel.h on a GPU: a process for each rung, and each rung has one mechanism more.

    python tests/kernels/wgmma_ladder.py [RUNG ...]
    python tests/kernels/wgmma_ladder.py --emulated FOLDER [RUNG ...]    # no GPU; FOLDER keeps the compiled emulator

A rung that hangs is ended after a minute and names the barrier; one that is wrong names the layout. The exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from fragments_weights import Kind, Shape, Weight, random_weight
from torch import Tensor

Product = Callable[[Tensor], Tensor]
SECONDS = 60
INT4: Kind = (4, None)
# Columns; the last stage is not full. Where few rows are cut by columns, a block has some seven chunks of it: rungs named full use stages many times.
LONG = 27 * 128 + 72


@dataclass(frozen=True)
class Rung:
    """Attributes:
    shape: N, K, group_size (0: a group per row).
    new: what no rung before it has.
    wanted: HFQ_CUDA_WGMMA; "pairs" for pairs, which have more than 64 tokens.
    wide: HFQ_CUDA_WIDE, and HFQ_CUDA_DIGITS.
    beside: on two streams at once, and beside a third one: blocks find few multiprocessors, and start late.
    """

    shape: Shape
    tokens: int
    new: str
    kind: Kind = INT4
    calls: int = 20
    wanted: str = "1"
    wide: tuple[str, str] = ("0", "0")
    beside: bool = False


WIDE, DIGITS = ("1", "0"), ("1", "1")
RUNGS = {
    "identity_wide": Rung((256, 768, 128), 16, "wide_kernel.h", wide=WIDE),
    "wide": Rung((14336, 4096, 128), 16, "all multiprocessors", calls=300, wide=WIDE),
    "wide_cluster": Rung((4096, 14336, 128), 16, "sums pushed to another block", wide=WIDE),
    "wide_few": Rung((1024, 4096, 128), 1, "blocks that have no token", wide=WIDE),
    "wide_full": Rung((4096, 14336, 64), 9, "races", (4, "zeros"), calls=300, wide=WIDE),
    "identity_digits": Rung(
        (256, 768, 64), 1, "wide_digits.h: look-ups, order of columns", (4, "nf4"), wide=DIGITS
    ),
    "digits": Rung((14336, 4096, 64), 1, "all multiprocessors", (4, "nf4"), calls=300, wide=DIGITS),
    "digits_cluster": Rung((4096, 14336, 64), 1, "clusters", (4, "nf4"), wide=DIGITS),
    "identity": Rung((256, 128, 0), 16, "descriptor, order of columns, fragments; one stage"),
    "identity_rows": Rung((40, 136, 0), 9, "rows and tokens that do not exist, a tail of columns"),
    "ring": Rung((256, 768, 128), 16, "several stages, none used twice: barriers of full stages"),
    "again": Rung((256, LONG, 128), 16, "barriers of empty stages, parities"),
    "groups32": Rung((256, LONG, 32), 16, "scales after each unit"),
    "t32": Rung((256, LONG, 128), 32, "32 tokens", (8, None)),
    "t64": Rung((256, LONG, 64), 64, "setmaxnreg"),
    "zeros16": Rung((256, LONG, 64), 16, "sums of activations", (4, "zeros")),
    "zeros64": Rung((256, LONG, 64), 64, "the same with setmaxnreg", (4, "zeros")),
    "nf4": Rung((256, LONG, 64), 64, "a table, and the barrier until it is filled", (4, "nf4")),
    "int2": Rung((256, LONG, 64), 64, "2 bits", (2, None)),
    "int3": Rung((256, LONG, 64), 64, "3 bits", (3, "zeros")),
    "int8": Rung((256, LONG, 64), 64, "8 bits", (8, "zeros")),
    "e4m3": Rung((256, LONG, 64), 64, "E4M3", (8, "e4m3")),
    "identity_staged": Rung((300, 136, 0), 30, "several tiles"),
    "staged32": Rung((256, LONG, 128), 32, "stage after stage"),
    "staged_zeros": Rung((256, LONG, 64), 31, "zero points", (4, "zeros")),
    "staged_sums": Rung((256, LONG, 128), 64, "sums of x with the stage", (4, "zeros")),
    "staged64": Rung((256, LONG, 128), 63, "setmaxnreg"),
    "staged_full": Rung((4096, 14336, 128), 64, "128 rows, ranges: partial sums, flags", calls=300),
    "staged_ranges": Rung((14336, 4096, 128), 64, "ranges that begin in tiles", calls=300),
    "staged_beside": Rung((14336, 4096, 128), 64, "blocks that start late", beside=True),
    "identity_shared": Rung(
        (300, 136, 0), 50, "wgmma_shared.h: copies to two blocks", wanted="shared"
    ),
    "shared": Rung((256, LONG, 128), 64, "barriers that both blocks arrive at", wanted="shared"),
    "shared_zeros": Rung((130, LONG, 64), 40, "zero points", (4, "zeros"), wanted="shared"),
    "shared_full": Rung(
        (4096, 14336, 128), 64, "ranges: partial sums, flags", calls=300, wanted="shared"
    ),
    "shared_ranges": Rung(
        (28672, 8192, 128), 64, "512 rows, setmaxnreg", calls=100, wanted="shared"
    ),
    "identity_pair128": Rung((300, 136, 0), 70, "wgmma_pair.h: weights in bulk", wanted="pairs"),
    "pair128": Rung((256, LONG, 32), 128, "scales after each unit", wanted="pairs"),
    "pair128_full": Rung((4096, 14336, 128), 128, "ranges", calls=300, wanted="pairs"),
    "identity_pair": Rung((300, 136, 0), 200, "256 tokens", wanted="pairs"),
    "pair_shared": Rung(
        (1024, 4096, 128),
        600,
        "tiles of several pairs: partial sums, flags",
        wanted="pairs",
    ),
    "pair": Rung((256, LONG, 128), 256, "stages of x and of weights", wanted="pairs"),
    "pair_zeros": Rung((130, LONG, 32), 256, "weights by float32", (4, "zeros"), wanted="pairs"),
    "pair_nf4": Rung((256, LONG, 64), 256, "a table", (4, "nf4"), wanted="pairs"),
    "pair_full": Rung((4096, 14336, 128), 256, "all multiprocessors", calls=300, wanted="pairs"),
    "pair_ranges": Rung(
        (14336, 4096, 128), 256, "ranges that begin in tiles", calls=300, wanted="pairs"
    ),
    "pair_rounds": Rung(
        (28672, 4096, 128), 1000, "several tiles of a pair", calls=100, wanted="pairs"
    ),
    "pair_beside": Rung(
        (14336, 4096, 128), 256, "waits for blocks that start late", wanted="pairs", beside=True
    ),
    "full": Rung((4096, 14336, 128), 64, "all multiprocessors; races", (4, "zeros"), calls=300),
    "full16": Rung((14336, 4096, 128), 16, "the same", (4, "zeros"), calls=300),
}


def product_of(weight: Weight, folder: Path | None) -> tuple[Product, torch.device]:
    """On the GPU, or on the emulated one that `folder` has."""
    if folder is not None:
        from cuda_emulator import build

        emulator = build(folder)

        def emulated(x: Tensor) -> Tensor:
            y: Tensor = emulator.linear(x, weight.operands, None, weight.sizes, 132, capability=90)
            return y

        return emulated, torch.device("cpu")
    from hfq.kernels import cuda_ops, native

    assert cuda_ops.fragments_weight is not None  # defines torch.ops.hfq.cuda_*
    assert native.load().cuda, native.load().cuda_reason
    cuda = torch.device("cuda")
    operands = [None if tensor is None else tensor.to(cuda) for tensor in weight.operands]

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.hfq.cuda_linear(x, *operands, None, *weight.sizes)
        return y

    return product, cuda


def check_identity(rung: Rung, weight: Weight, product: Product, device: torch.device) -> bool:
    """Tokens that are one at one column: each output has to be that column of W."""
    exact = (weight.values * weight.scales).bfloat16().double()
    near, columns = 0.01 * exact.abs().max(), rung.shape[1]
    wrong = 0
    for first in range(0, columns, rung.tokens):
        own = [(first + m) % columns for m in range(rung.tokens)]
        x = torch.eye(columns)[own].to(device, torch.bfloat16)
        for m, (column, y) in enumerate(zip(own, product(x).cpu().double(), strict=True)):
            if (y - exact[:, column]).abs().max() <= near:  # NaN is not
                continue
            wrong += 1
            if wrong <= 24:
                print(f"  token {m}, column {column}: {what_it_is(y, exact, own, m, near)}")
    return not wrong


def what_it_is(y: Tensor, exact: Tensor, own: list[int], m: int, near: Tensor) -> str:
    """An output in words that name the layout at fault."""
    if not y.any():
        return "zeros: x was not there (address, fence, copy)"
    if (y.sort().values - exact[:, own[m]].sort().values).abs().max() <= near:
        return "the rows in another order: fragments of W or of the sums"
    differences = (exact - y[:, None]).abs().amax(0)
    column = int(differences.argmin())
    if not differences[column] <= near:
        return "no column of W"
    if column in own:
        return f"what token {own.index(column)} should have: fragments of the sums, or the stride"
    return f"column {column}: order of words, or the swizzle"


def check_products(rung: Rung, weight: Weight, product: Product, device: torch.device) -> bool:
    """Three inputs in turn: the first answers are right, and the later ones are the same."""
    generator = torch.Generator().manual_seed(1)
    shape = (rung.tokens, rung.shape[1])
    inputs = [torch.randn(shape, generator=generator).bfloat16().to(device) for _ in range(3)]
    answers = [product(x) for x in inputs]
    right = True
    for x, y in zip(inputs, answers, strict=True):
        try:
            rounded, digits = rung.wanted == "pairs", rung.wide == DIGITS
            weight.check(y.cpu(), x.cpu(), rounded=rounded, digits=digits)
        except AssertionError as error:
            right = False
            print(f"  error beyond what roundings allow: {str(error).splitlines()[0]}")
    calls = rung.calls if device.type == "cuda" else 1
    others = sum(not torch.equal(product(inputs[i % 3]), answers[i % 3]) for i in range(calls))
    if rung.beside and device.type == "cuda":
        calls *= 20
        others += differ_beside(inputs, answers, product, calls)
    if others:
        print(f"  {others} of {calls} calls differ from the first: a race")
    return right and not others


def differ_beside(inputs: list[Tensor], answers: list[Tensor], product: Product, calls: int) -> int:
    """How many products differ that two streams do at once, while a third one multiplies large matrices."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    others = 0
    for first in range(0, calls, 10):
        found = []
        for i in range(first, first + 10):
            for stream in streams[:2]:
                with torch.cuda.stream(stream):
                    found.append((i % 3, product(inputs[i % 3])))
            with torch.cuda.stream(streams[2]):
                matrix @ matrix
        torch.cuda.synchronize()
        others += sum(not torch.equal(y, answers[i]) for i, y in found)
    return others


def climb(name: str, folder: Path | None) -> bool:
    rung = RUNGS[name]
    os.environ["HFQ_CUDA_WGMMA"] = rung.wanted
    os.environ["HFQ_CUDA_WIDE"], os.environ["HFQ_CUDA_DIGITS"] = rung.wide
    weight = random_weight(torch.Generator().manual_seed(0), rung.shape, rung.kind)
    product, device = product_of(weight, folder)
    check = check_identity if name.startswith("identity") else check_products
    return check(rung, weight, product, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help=f"of {', '.join(RUNGS)}")
    parser.add_argument("--emulated", type=Path, metavar="FOLDER")
    parser.add_argument("--here", action="store_true", help="one rung, in this process")
    args = parser.parse_args()
    unknown = [name for name in args.rungs if name not in RUNGS]
    if unknown:
        parser.error(f"unknown rungs {', '.join(unknown)}; there are {', '.join(RUNGS)}")
    if args.here:
        return 0 if climb(args.rungs[0], args.emulated) else 1
    emulated = [] if args.emulated is None else ["--emulated", str(args.emulated)]
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    failed = []
    for name in args.rungs or RUNGS:
        start = time.perf_counter()
        command = [sys.executable, __file__, "--here", *emulated, name]
        try:
            limit = None if emulated else SECONDS
            done = subprocess.run(command, timeout=limit, check=False).returncode
            said = "right" if done == 0 else f"FAILED ({done})"
        except subprocess.TimeoutExpired:
            said = f"HANGS: no answer in {SECONDS} s"
        if said != "right":
            failed.append(name)
        seconds = time.perf_counter() - start
        print(f"{name}: {said}, {seconds:.1f} s; new: {RUNGS[name].new}", flush=True)
    print(f"{len(failed)} failed: {' '.join(failed)}" if failed else "all right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
