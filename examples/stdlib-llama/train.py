#!/usr/bin/env python3
"""Train stdlib-llama: a 5.8M-parameter Llama on the Python standard library.

One command reproduces the whole directory, on CPU and without any network access::

    python train.py

The steps are: collect the ``.py`` files of a Python installation, set a few whole modules aside as
held-out text, train a byte-level BPE tokenizer and a ``LlamaForCausalLM`` on the rest, and write
model, tokenizer, held-out text, training log and loss curve next to this script.

The order of the batches and the learning rate are pure functions of the step number, so a run that
was cut resumes exactly where its last checkpoint stood when the same command is given again.
``--tokens`` may be lowered on the way as long as the learning rate has not begun to decay: that is
the point of the warmup-stable-decay schedule.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"

# Whole modules that neither the tokenizer nor the model ever sees. Their unit tests are dropped
# from the training text as well, because doctests and expected outputs quote the module at length.
HELD_OUT = (
    "bisect", "calendar", "cmd", "csv", "graphlib", "heapq", "queue",
    "sched", "shelve", "shlex", "statistics", "string", "textwrap",
)  # fmt: skip

# Third-party packages, applications that ship beside the library, and generated data.
EXCLUDED_DIRECTORIES = frozenset(
    {"__pycache__", "site-packages", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
)
EXCLUDED_FILES = frozenset({"html/entities.py", "stringprep.py"})
# gencodec.py writes the 256-entry tables of encodings/; sysconfig data describes one machine.
GENERATED_MARKERS = ("gencodec.py", "# system configuration generated and used by")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the trained weights, apart from the text itself."""

    tokens: int
    batch: int
    seq_len: int = 512
    peak_lr: float = 2e-3
    warmup_steps: int = 98
    decay: float = 0.4
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 20261121

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return self.tokens // (self.batch * self.seq_len)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear warmup, constant, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        stable = 1 - self.decay
        into_decay = max(0.0, (step / self.steps - stable) / self.decay)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * into_decay))


# --------------------------------------------------------------------------------------------------
# Text


def library_files(source: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(relative path, text)`` of the hand-written modules below ``source``, sorted."""
    seen: set[bytes] = set()
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        name = relative.as_posix()
        if EXCLUDED_DIRECTORIES.intersection(relative.parts) or name in EXCLUDED_FILES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # Lib/test holds files that are wrong on purpose
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if not text.strip() or digest in seen or any(m in text[:500] for m in GENERATED_MARKERS):
            continue
        seen.add(digest)
        yield name, text


def split_text(source: Path) -> tuple[list[str], str]:
    """Return the training documents and the held-out text (one string, modules in order)."""
    held_out_files = {f"{module}.py" for module in HELD_OUT}
    held_out_tests = {f"test_{module}" for module in HELD_OUT}
    documents, held_out = [], []
    for name, text in library_files(source):
        if name in held_out_files:
            held_out.append(text)
        elif held_out_tests.isdisjoint(name.removesuffix(".py").split("/")):
            documents.append(text)
    if len(held_out) != len(HELD_OUT):
        raise SystemExit(f"{source} holds {len(held_out)} of the {len(HELD_OUT)} held-out modules")
    return documents, "".join(held_out)


def train_tokenizer(documents: list[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every string has an encoding, and decoding is lossless."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Concatenate all documents into one stream, each one opened by the end-of-text token."""
    stream: list[int] = []
    for ids in tokenizer(documents)["input_ids"]:
        stream.append(tokenizer.bos_token_id)
        stream.extend(ids)
    return torch.tensor(stream)


def batch_at(step: int, stream: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the ``[batch, seq_len + 1]`` token windows of a step.

    Each epoch visits the non-overlapping windows once, in a new order and shifted by a new offset,
    so that a window's boundaries never fall on the same tokens twice.
    """
    windows = (len(stream) - 1) // recipe.seq_len - 1
    per_epoch = windows // recipe.batch
    epoch, index = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(recipe.seed + epoch)
    offset = int(torch.randint(recipe.seq_len, (), generator=generator))
    order = torch.randperm(windows, generator=generator)
    chosen = order[index * recipe.batch : (index + 1) * recipe.batch]
    starts = offset + chosen * recipe.seq_len
    return stream[starts[:, None] + torch.arange(recipe.seq_len + 1)]


# --------------------------------------------------------------------------------------------------
# Model


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Initialise the model; every Linear reads 256 or 768 features, a multiple of 256."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=recipe.seq_len,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def build_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only: decaying a norm's gain has no purpose."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), fused=True)


def next_token_loss(
    model: LlamaForCausalLM, windows: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy of every token of each window given the tokens before it in that window."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor, seq_len: int) -> float:
    """Mean NLL over the predicted tokens of non-overlapping windows of ``seq_len`` tokens.

    The first token of a window has no context and is not predicted; a shorter last window counts.
    """
    model.eval()
    total = 0.0
    predicted = 0
    full = len(ids) // seq_len * seq_len
    batches = [*ids[:full].view(-1, seq_len).split(16), ids[full:][None]]
    for windows in batches:
        if windows.shape[1] > 1:
            total += next_token_loss(model, windows, reduction="sum").item()
            predicted += windows[:, 1:].numel()
    model.train()
    return total / predicted


# --------------------------------------------------------------------------------------------------
# Training


@dataclass
class LogEntry:
    """One evaluation; ``train_loss`` is the mean since the entry before."""

    step: int
    tokens: int
    train_loss: float | None
    heldout_loss: float
    lr: float
    seconds: float


def save_atomically(state: object, path: Path) -> None:
    """Write a checkpoint so that a cut never leaves half a file under its name."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    held_out_ids: torch.Tensor,
    recipe: Recipe,
    checkpoint: Path,
    evaluate_every: int,
) -> list[LogEntry]:
    """Run the recipe, or what a checkpoint left of it, and return the log."""
    optimizer = build_optimizer(model, recipe)
    log: list[LogEntry] = []
    first_step, seconds_before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = [LogEntry(**entry) for entry in state["log"]]
        first_step, seconds_before = log[-1].step, log[-1].seconds
        print(f"resuming after step {first_step}", flush=True)

    compiled_loss = torch.compile(next_token_loss)
    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    started = time.monotonic()
    losses: list[torch.Tensor] = []

    def evaluate(step: int) -> None:
        with autocast():
            heldout_loss = held_out_loss(model, held_out_ids, recipe.seq_len)
        entry = LogEntry(
            step=step,
            tokens=step * recipe.batch * recipe.seq_len,
            train_loss=torch.stack(losses).mean().item() if losses else None,
            heldout_loss=heldout_loss,
            lr=recipe.lr_at(step),
            seconds=seconds_before + time.monotonic() - started,
        )
        losses.clear()
        log.append(entry)
        print(json.dumps(asdict(entry)), flush=True)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "log": [asdict(e) for e in log],
        }
        save_atomically(state, checkpoint)

    if not log:
        evaluate(0)
    for step in range(first_step, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        with autocast():
            loss = compiled_loss(model, batch_at(step, stream, recipe))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % evaluate_every == 0 or step + 1 == recipe.steps:
            evaluate(step + 1)
    return log


# --------------------------------------------------------------------------------------------------
# Output


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the model in bfloat16 and its tokenizer, replacing each file in one step."""
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=output))
    try:
        half = LlamaForCausalLM(model.config).bfloat16()
        half.load_state_dict(model.state_dict())
        half.generation_config = GenerationConfig(
            bos_token_id=model.config.bos_token_id,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
        )
        half.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for file in staging.iterdir():
            file.replace(output / file.name)
    finally:
        shutil.rmtree(staging)


def measure_export(output: Path, held_out: str, seq_len: int) -> dict[str, float]:
    """Read the exported files back and measure them on the held-out text, in float32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = torch.tensor(tokenizer(held_out)["input_ids"])
    loss = held_out_loss(model, ids, seq_len)
    tokens_per_byte = len(ids) / len(held_out.encode())
    return {
        "heldout_bytes": len(held_out.encode()),
        "heldout_tokens": len(ids),
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * tokens_per_byte / math.log(2),
    }


def write_log(recipe: Recipe, log: list[LogEntry], result: dict[str, float], output: Path) -> None:
    """Write ``training_log.json``: the recipe, one entry per evaluation, the exported model."""
    content = {
        "recipe": asdict(recipe),
        "exported_model": result,
        "log": [asdict(entry) for entry in log],
    }
    (output / "training_log.json").write_text(json.dumps(content, indent=1) + "\n")


def plot_log(log: list[LogEntry], output: Path) -> None:
    """Draw ``loss_curve.png``."""
    from matplotlib.figure import Figure  # optional: the model does not depend on its picture

    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    training = [(e.tokens / 1e6, e.train_loss) for e in log if e.train_loss is not None]
    held_out = [(e.tokens / 1e6, e.heldout_loss) for e in log[1:]]  # log[0] is the untrained model
    axes.plot(*zip(*training, strict=True), label="training", color="#9aa5b1")
    axes.plot(*zip(*held_out, strict=True), label="held out", color="#d9480f")
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(output / "loss_curve.png")


def parse_arguments() -> argparse.Namespace:
    """Define and read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="standard library to train on (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=HERE, help="where the model goes")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "stdlib-llama",
        help="where the checkpoint is kept (default: %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=20_480_000, help="training tokens")
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens per step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--evaluate-every", type=int, default=250, help="steps from evaluation to evaluation"
    )
    parser.add_argument(
        "--export-only", action="store_true", help="export the checkpoint as it is, do not train"
    )
    return parser.parse_args()


def main() -> None:
    """Reproduce the directory."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(tokens=arguments.tokens, batch=arguments.batch)
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)

    documents, held_out = split_text(arguments.source)
    (arguments.output / "heldout.txt").write_text(held_out, encoding="utf-8")
    tokenizer = train_tokenizer(documents)
    model = build_model(tokenizer, recipe)
    checkpoint = arguments.work / "checkpoint.pt"
    if arguments.export_only:
        model.load_state_dict(torch.load(checkpoint)["model"])
        export(model, tokenizer, arguments.output)
        return

    stream = encode_documents(tokenizer, documents)
    held_out_ids = torch.tensor(tokenizer(held_out)["input_ids"])
    print(
        f"{len(documents)} files, {sum(map(len, documents)):,} characters, {len(stream):,} tokens; "
        f"held out {len(held_out.encode()):,} bytes, {len(held_out_ids):,} tokens; "
        f"{model.num_parameters():,} parameters, {recipe.steps} steps",
        flush=True,
    )
    log = train(model, stream, held_out_ids, recipe, checkpoint, arguments.evaluate_every)

    export(model, tokenizer, arguments.output)
    result = measure_export(arguments.output, held_out, recipe.seq_len)
    print(json.dumps(result), flush=True)
    write_log(recipe, log, result, arguments.output)
    plot_log(log, arguments.output)


if __name__ == "__main__":
    main()
