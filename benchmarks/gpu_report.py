"""What gpu.py measured: a table for each part, whether goals are met, pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfq.plot import Bars, bars
from hfq.table import format_bytes, format_table, wrapped

__all__ = ["PICTURES", "REPORTS", "goals", "report_goals"]

# What a part found, as its JSON has it; for `goals` all of them by the part's name.
Results = Mapping[str, Any]


# ---- tables


def _shape(row: Mapping[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def _report_failures(found: Results, what: str) -> None:
    """A line for each row that failed; `what`: its name, with fields of the row."""
    for row in found["rows"]:
        if row["failure"]:
            print(wrapped(f"FAILED: {what.format(**row)}: {row['failure']}"))


def report_kernels(found: Results) -> None:
    """Every product that was right; then which kernels were refused, and why; then what failed.

    "of copy" is GB/s as a share of what copies within the device reach, "x bf16" how many times as fast as bfloat16.
    """
    ceilings = found["ceilings"]
    print(
        f"\ncopies {ceilings['copy_GB_per_second']:.0f} GB/s (read and written), bfloat16 products "
        f"{ceilings['bfloat16_TFLOP_per_second']:.0f} TFLOP/s"
    )
    rows = [
        (
            row["weights"],
            _shape(row),
            str(row["tokens"]),
            f"{row['microseconds']:.1f}",
            f"{row['spread']:.0%}",
            f"{row['eager_microseconds']:.0f}",
            f"{row['GB_per_second']:.0f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['TFLOP_per_second']:.1f}",
            f"{row['ratio_to_bfloat16']:.2f}",
            row["kernel"] + (" (no graph)" if row["no_graph"] else ""),
        )
        for row in found["rows"]
        if not row["failure"]
    ]
    head = ("weights", "KxN", "M", "us", "spread", "eager us", "GB/s", "of copy", "TFLOP/s")
    print(format_table((*head, "x bf16", "kernel"), rows))
    refused = {
        f"{row['weights']}: {row['kernel']}; {name}: {reason}"
        for row in found["rows"]
        for name, reason in row["refused"].items()
    }
    for line in sorted(refused):
        print(wrapped(line))
    _report_failures(found, "{weights}, {shape}, {tokens} tokens, {kernel}")


def report_gradients(found: Results) -> None:
    """dX of every weight that was right, then what failed."""
    rows = [
        (
            row["weights"],
            _shape(row),
            str(row["tokens"]),
            f"{row['microseconds']:.0f}",
            f"{row['bfloat16_microseconds']:.0f}",
            f"{row['ratio_to_bfloat16']:.2f}",
        )
        for row in found["rows"]
        if not row["failure"]
    ]
    print(format_table(("gradients", "KxN", "tokens", "us", "bfloat16 us", "x bf16"), rows))
    _report_failures(found, "gradient, {weights}, {shape}")


def _tasks(models: Mapping[str, Any]) -> list[str]:
    """Of all models, in their order: one may lack what another has."""
    return list(dict.fromkeys(task for one in models.values() for task in one["tokens_per_second"]))


def report_models(found: Results) -> None:
    """Tokens per second and memory of each model, then which were left out, and why."""
    tasks = _tasks(found["models"])
    rows = []
    for name, one in found["models"].items():
        rates = one["tokens_per_second"]
        rows.append(
            (
                name,
                *(f"{rates[task]:.1f}" if task in rates else "-" for task in tasks),
                format_bytes(one["weight_bytes"]),
                format_bytes(one["peak_bytes"]),
                ", ".join(one["kernels"]) or "-",
            )
        )
    print(format_table(("tokens/s", *tasks, "weights", "peak", "kernels"), rows))
    for name, reason in found["left_out"].items():
        print(wrapped(f"left out: {name}: {reason}"))


def report_packing(found: Results) -> None:
    """One weight, from bfloat16 to the kernel's layout; then loading a checkpoint.

    "operators" is how many PyTorch runs for the codes, "waits" how often Python waits for the device on the way.
    """
    rows = [
        (
            row["weights"],
            f"{row['pack_milliseconds']:.2f}",
            f"{row['layout_milliseconds']:.2f}",
            f"{row['GB_per_second']:.1f}",
            f"{row['peak_MiB']:.0f}",
            str(row["operators"]),
            str(row["waits"]),
        )
        for row in found["weights"]
    ]
    head = ("one weight", "codes ms", "layout ms", "GB/s", "peak MiB", "operators", "waits")
    print(format_table(head, rows))
    loaded = found["loading"]
    print(
        f"from_pretrained, {loaded['checkpoint_GB']:.2f} GB: "
        + ", ".join(f"{name} {rate:.2f} GB/s" for name, rate in loaded["GB_per_second"].items())
    )


REPORTS: dict[str, Callable[[Results], None]] = {
    "kernels": report_kernels,
    "gradients": report_gradients,
    "models": report_models,
    "packing": report_packing,
}


# ---- goals


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Attributes:
    least: the smallest value that meets it.
    found: the value measured; None where it was not.
    """

    name: str
    least: float
    found: float | None

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        return "met" if self.found >= self.least else "MISSED"


# Weights, tokens, which number of a row of kernels, at least: goals 1 to 6 of NOTES.md.
_KERNEL_GOALS = (
    ("int4 g128", 1, "share_of_copy", 0.8),
    ("int4 g128", 1, "ratio_to_bfloat16", 3.2),
    ("int4 g128", 16, "ratio_to_bfloat16", 3.0),
    ("int4 g128", 64, "ratio_to_bfloat16", 2.0),
    ("int4 g128", 256, "ratio_to_bfloat16", 1.0),
    ("nf4 g64", 1, "ratio_to_bfloat16", 3.0),
)
# Weights, task, ratio to bfloat16 at least: goal 7.
_MODEL_GOAL = ("int4 g128", "decode, batch 1", 2.5)


def goals(results: Results, shapes: Sequence[tuple[int, int]]) -> list[Goal]:
    """Each goal for the kernels on the worst of `shapes` (K, N); one that was asked for and failed counts as 0."""
    found = [
        Goal(
            name=f"{weights}, M={tokens}, {what.replace('_', ' ')}, worst of {len(shapes)} shapes",
            least=least,
            found=_worst(results.get("kernels"), shapes, weights, tokens, what),
        )
        for weights, tokens, what, least in _KERNEL_GOALS
    ]
    weights, task, least = _MODEL_GOAL
    return [
        *found,
        Goal(
            name=f"Llama-8B shape, {weights}, {task}, ratio to bfloat16 (CUDA graphs)",
            least=least,
            found=_model_ratio(results.get("models"), weights, task),
        ),
    ]


def _worst(
    found: Results | None,
    shapes: Sequence[tuple[int, int]],
    weights: str,
    tokens: int,
    what: str,
) -> float | None:
    """The smallest value; None unless every shape has one."""
    rows = [
        row
        for row in (found or {"rows": []})["rows"]
        if (row["weights"], row["tokens"]) == (weights, tokens) and tuple(row["shape"]) in shapes
    ]
    values = [0.0 if row["failure"] else row[what] for row in rows]
    return min(values) if len(values) == len(shapes) else None


def _model_ratio(found: Results | None, weights: str, task: str) -> float | None:
    models = (found or {"models": {}})["models"]
    if not {weights, "bfloat16"} <= models.keys():
        return None
    return models[weights]["ratio_to_bfloat16"].get(task)


def report_goals(found: Sequence[Goal]) -> None:
    rows = [
        (
            goal.verdict,
            f"{goal.least:.2f}",
            "-" if goal.found is None else f"{goal.found:.2f}",
            goal.name,
        )
        for goal in found
    ]
    print("\n" + format_table(("", "at least", "found", "goal"), rows))


# ---- pictures


def draw_kernels(found: Results) -> str:
    """Shares of the copies' bandwidth with one token, by shape."""
    groups = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in found["rows"]):
        values = [
            (row["weights"], row["share_of_copy"])
            for row in found["rows"]
            if row["tokens"] == 1 and tuple(row["shape"]) == shape and not row["failure"]
        ]
        if values:
            groups.append(Bars(name=f"{shape[0]} x {shape[1]}", values=values))
    label = f"of {found['ceilings']['copy_GB_per_second']:.0f} GB/s that copies reach"
    title = "GPU kernels, one token: weights read, as a share of the memory's bandwidth"
    return bars(title, label, groups, form=".0%", full=1.0)


def draw_ratios(found: Results) -> str:
    """Speed beside bfloat16, by tokens, on the largest shape."""
    largest = max((tuple(row["shape"]) for row in found["rows"]), key=lambda s: s[0] * s[1])
    names = list(dict.fromkeys(row["weights"] for row in found["rows"]))
    groups = []
    for tokens in dict.fromkeys(row["tokens"] for row in found["rows"]):
        values = [
            (row["weights"], row["ratio_to_bfloat16"])
            for row in found["rows"]
            if row["tokens"] == tokens and tuple(row["shape"]) == largest and not row["failure"]
        ]
        if values:
            groups.append(Bars(name=f"{tokens} tokens", values=values))
    title = f"GPU kernels, {largest[0]} x {largest[1]}: speed beside bfloat16 products ({len(names)} formats)"
    return bars(title, "times as fast", groups, form=".2f")


def draw_models(found: Results) -> str:
    """Tokens per second, by task."""
    models = found["models"]
    tasks = _tasks(models)
    groups = [
        Bars(
            name=task,
            values=[
                (name, one["tokens_per_second"][task])
                for name, one in models.items()
                if task in one["tokens_per_second"]
            ],
        )
        for task in tasks
    ]
    return bars("8B parameters on the GPU", "tokens per second, each task to its own scale", groups)


# File -> the part that it shows, and how.
PICTURES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "gpu_kernels": ("kernels", draw_kernels),
    "gpu_ratios": ("kernels", draw_ratios),
    "gpu_models": ("models", draw_models),
}
