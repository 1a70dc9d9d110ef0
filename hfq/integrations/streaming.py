"""`hfq.quantize`: a checkpoint of any size, with the memory of about one block.

skeleton on meta -> everything outside of the blocks is loaded -> calibration text enters the first block
with `target_bits`: the float model forward and backward, block by block, to measure what bits cost
block by block: loaded, calibrated, packed, written, freed; what comes out of it enters the next
the rest is written -> index, config, tokenizer, card -> loaded again in a new process, logits compared
only then do the files move into the output folder
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .._version import __version__
from ..calibration.blocks import run_after_blocks
from ..calibration.report import WeightReport
from ..calibration.run import Calibration, Stream, fingerprint
from ..config import HfqConfig
from ..core.errors import CalibrationError, ConfigError, HfqError
from ..evaluation.divergence import Totals, compare, score
from ..evaluation.size import weight_size
from ..formats import FORMAT_VERSION
from .bit_allocation import apply_allocation, measure, share_out
from .calibrated import calibration_sequences, progress_bar
from .card import CARD, has_foreign_card, model_card
from .checkpoint import read_headers
from .gate import check_reloaded
from .report import HeldOut, Report
from .resume import MEASURED, Resume, TensorFiles, fingerprint_of_files
from .source import FloatCheckpoint, save_tokenizer
from .staging import SaveError, staged
from .transformers import HfqQuantizer

__all__ = ["HELD_OUT", "is_one_file", "quantize", "stored_tensors"]

logger = logging.get_logger(__name__)

# Sequences of the data set, beside those calibrated with, that the quantized model is compared with the float one on.
HELD_OUT = 8

# Weights of up to this size become one file, which is put together in memory.
_SINGLE_FILE_BYTES = 256 << 20

# Transformers asks for it.
_METADATA = {"format": "pt"}

# Where there are none: tokens that the written model must answer to as the one in memory did.
_PROBE_TOKENS = 16


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: HfqConfig,
    *,
    resume: bool = True,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    command: str | None = None,
) -> Report:
    """Quantize a float checkpoint into a folder, with the memory of about one block and the calibration activations.

    A run that was killed goes on at its first unfinished block when the same call is made again, and gives the same
    files bit for bit.

    Args:
        model: folder or Hub name of a float model (safetensors).
        output: folder to write into; its old files stay until all new ones are complete.
        config: what to do. Its `dataset` must be given where the method is calibrated: sampling text from the model
            would need all of it in memory.
        resume: go on with an unfinished run; False deletes what it left.
        dtype: of float weights and activations; "auto": the checkpoint's.
        device: where blocks are worked on.
        command: for the card.

    Returns:
        What was done; also written as ``hfq_report.json``, with a picture of the errors.

    Raises:
        CheckpointError: the model is missing, incomplete, quantized already, or was not reproduced by what was written.
        ConfigError: settings or data cannot be used.
        ResumeError: an unfinished run of other inputs is in the way.
        CalibrationError: activations are NaN or infinite.
        SaveError: the folder cannot be written.
    """
    start = time.perf_counter()
    target = Path(output)
    if target.exists() and Path(model).exists() and target.samefile(model):
        raise ConfigError(f"output {output} is the model itself: give another folder")
    source = FloatCheckpoint(model, config, dtype, torch.device(device))
    if not resume:
        Resume.forget(target)
    run = _Run(source, config, target)
    resumed = run.resume.done
    try:
        run.blocks()
        report = run.finish(
            command, lambda: {"seconds": time.perf_counter() - start, "resumed_blocks": resumed}
        )
    except SaveError:
        raise  # a disk can be cleared: what is done stays
    except HfqError:
        # The same call would fail again, and another one could not go on from here.
        Resume.forget(target)
        raise
    Resume.forget(target)
    return report


class _Run:
    """One call of `quantize`."""

    def __init__(self, source: FloatCheckpoint, config: HfqConfig, output: Path) -> None:
        self.source, self.config, self.output = source, config, output
        self.model, self.quantizer = source.model, source.quantizer
        recipes = self.quantizer.calibrated
        self.calibration = Calibration(self.model, recipes, self.quantizer.make_twin, None)
        self.names = list(self.calibration.blocks)
        self.inside = tuple(f"{name}." for name in self.names)
        self.has_held_out = False
        self.sequences, self.held_out = self._data(bool(recipes))
        inputs = {
            "model": fingerprint_of_files(source.files),
            "settings": json.dumps(config.to_dict(), sort_keys=True),
            "calibration data": fingerprint([*self.sequences, *self.held_out]),
            "dtype": str(source.dtype),
            "device": source.device.type,
            "hfq": f"{__version__}, format {FORMAT_VERSION}",
            "torch": str(torch.__version__),
        }
        self.resume = Resume(output, inputs)
        self.measured = Resume(output, inputs, MEASURED) if config.target_bits else None

    def _data(self, calibrated: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Sequences to calibrate with, and others to compare the quantized with the float model on."""
        if not calibrated:
            vocabulary = self.model.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(self.config.seed)
            return [], [torch.randint(vocabulary, (_PROBE_TOKENS,), generator=generator)]
        if self.config.dataset is None or self.config.dataset == "self":
            raise ConfigError(
                f"method {self.config.method!r} needs calibration text: give dataset=. Text of the model's own would "
                "need all of it in memory; from_pretrained(..., quantization_config=...) does that where it fits"
            )
        chosen, others = calibration_sequences(self.model, self.config)
        self.has_held_out = bool(others)
        return chosen, others[:HELD_OUT] or [chosen[0][:_PROBE_TOKENS]]

    @torch.no_grad()
    def blocks(self) -> None:
        """All blocks that are not done."""
        self.source.load(lambda name: not name.startswith(self.inside))
        if self.measured is not None:
            self._allocate(self.measured)
        streams = self.calibration.start(self.sequences)
        self.followers = self._followers()
        done = self.resume.done
        if done:
            _restore([*streams, *self.followers], self.resume.streams())
            self.calibration.reports = [WeightReport(**report) for report in self.resume.reports]
        for index in range(done):
            self.calibration.skip(index)
        with progress_bar(sum(map(len, self.calibration.recipes.values()))) as progress:
            self.calibration.progress = progress
            for index in range(done, len(self.names)):
                name = self.names[index]
                self.source.load(partial(_begins_with, f"{name}."))
                self.calibration.block(index, streams, self.followers)
                self.resume.finish(
                    index,
                    self._tensors(name),
                    _hidden([*streams, *self.followers]),
                    [asdict(report) for report in self.calibration.reports],
                )
                self.source.free(name)
            wanted = [self._logits(each.batch, each.wanted) for each in self.followers]
            self.calibration.rest(streams)
        self.held_out_result = self._compare(wanted)

    def _allocate(self, measured: Resume) -> None:
        """Choose bits; that is all on disk already where it was finished before."""

        def visit(index: int) -> AbstractContextManager[None]:
            return self.source.visit(self.names[index])

        kept = TensorFiles(measured.folder, "gradients")
        groups = measure(
            self.calibration, self.sequences, self.config, visit, kept, resume=measured
        )
        selection = self.quantizer.selection
        allocation = share_out(self.model, selection, groups, self.config)
        apply_allocation(self.model, self.quantizer, allocation)
        self.config = self.quantizer.quantization_config

    def _followers(self) -> list[Stream]:
        """Streams that the quantized model is compared on."""
        try:
            return self.calibration.start(self.held_out)
        except CalibrationError as error:
            if self.sequences:
                raise
            logger.warning(
                f"hfq: the written model will be loaded, but not compared with the one in memory: {error}"
            )
            return []

    def finish(self, command: str | None, so_far: Callable[[], dict[str, Any]]) -> Report:
        """Everything that is not in a block, the files around the weights, the check of it all.

        Args:
            so_far: figures of the whole call.
        """
        calibration = None
        if self.sequences:
            calibration = self.calibration.report(self.sequences)
            self.quantizer.keep_calibration(calibration)
        size, selection = weight_size(self.model), self.quantizer.selection
        with staged(self.output) as new:
            self._write_weights(new)
            self._write_settings(new)
            if not has_foreign_card(self.output):
                card = model_card(self.model, name=self.output.absolute().name, command=command)
                (new / CARD).write_text(str(card), encoding="utf-8")
            difference = self._check(new)
            report = Report(
                model=str(self.model.config._name_or_path),
                output=str(self.output),
                settings=self.config.to_dict(),
                quantized=sum(len(weights) for weights in selection.recipes.values()),
                kept=selection.kept,
                bytes_before=size.kept_bytes + size.packed_weights * self.source.dtype.itemsize,
                bytes_after=size.total_bytes,
                bits_per_weight=size.bits_per_weight,
                logit_difference=difference,
                calibration=calibration,
                allocation=self.quantizer.allocation,
                held_out=self.held_out_result,
                **so_far(),
            )
            report.write(new)
        return report

    def _check(self, folder: Path) -> float | None:
        if not self.followers:
            return check_reloaded(folder, self.held_out[0].unsqueeze(0), None, self.source.device)
        first = self.followers[0]
        expected = self._logits(first.batch, first.hidden)
        return check_reloaded(folder, first.batch, expected, self.source.device)

    def _logits(self, batch: Tensor, hidden: Tensor) -> Tensor:
        return run_after_blocks(self.model, list(self.calibration.blocks.values()), batch, hidden)

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        return stored_tensors(self.model, self.quantizer, self.inside, prefix)

    def _write_weights(self, folder: Path) -> None:
        """A shard for each block, one for the rest, and the index; a single file where that is small."""
        files = [self.resume.block_file(index) for index in range(len(self.names))]
        rest = _contiguous(self._tensors(""))
        size = sum(file.stat().st_size for file in files) + sum(t.nbytes for t in rest.values())
        if is_one_file(size):
            for file in files:
                rest |= load_file(file)
            save_file(rest, folder / "model.safetensors", metadata=_METADATA)
            return
        count, total = len(files) + 1, 0
        where: dict[str, str] = {}
        for number in range(1, count + 1):
            shard = f"model-{number:05d}-of-{count:05d}.safetensors"
            if number < count:
                _link(files[number - 1], folder / shard)
            else:
                save_file(rest, folder / shard, metadata=_METADATA)
            headers = read_headers([folder / shard])
            where |= dict.fromkeys(headers, shard)
            total += sum(math.prod(each.shape) * each.dtype.itemsize for each in headers.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _write_settings(self, folder: Path) -> None:
        """Everything around the weights, as `save_pretrained` writes it."""
        config = self.model.config
        config.architectures = [type(self.model).__name__]
        config.dtype = self.source.dtype
        config.save_pretrained(folder)
        if self.model.can_generate():
            try:
                generation = GenerationConfig.from_pretrained(self.source.folder)
            except OSError:
                generation = GenerationConfig.from_model_config(config)
            generation.save_pretrained(folder)
        save_tokenizer(self.source.folder, folder)

    def _compare(self, wanted: Sequence[Tensor]) -> HeldOut | None:
        """The quantized model's predictions of the held-out text beside the float model's; None if there is none."""
        if not self.has_held_out:
            return None
        ours, theirs = Totals(), Totals()
        for stream, expected in zip(self.followers, wanted, strict=True):
            targets = stream.batch[:, 1:].flatten()
            logits = self._logits(stream.batch, stream.hidden)[:, :-1].flatten(0, 1)
            reference = expected[:, :-1].flatten(0, 1)
            score(logits, targets, ours)
            score(reference, targets, theirs)
            compare(logits, reference, ours)
        return HeldOut(
            tokens=ours.count,
            perplexity=math.exp(ours.nll / ours.count),
            reference_perplexity=math.exp(theirs.nll / theirs.count),
            kl=ours.kl / ours.count,
            top1_agreement=ours.agreed / ours.count,
        )


def is_one_file(size: int) -> bool:
    """Whether weights of so many bytes are written into a single file."""
    return size <= _SINGLE_FILE_BYTES


def stored_tensors(
    model: PreTrainedModel, quantizer: HfqQuantizer, inside: tuple[str, ...], prefix: str
) -> dict[str, Tensor]:
    """Tensors of a part of the model under the names of the checkpoint; "" stands for all that is in no block.

    Args:
        inside: what names of blocks begin with.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        is_inside = f"{name}.".startswith(f"{prefix}." if prefix else inside)
        if is_inside == bool(prefix):
            module._save_to_state_dict(found, f"{name}." if name else "", False)
    tied = model.all_tied_weights_keys
    return quantizer.names_for_saving(
        model, {name: tensor for name, tensor in found.items() if name not in tied}
    )


def _begins_with(prefix: str, name: str) -> bool:
    return name.startswith(prefix)


def _hidden(streams: Sequence[Stream]) -> dict[str, Tensor]:
    found = {f"hidden.{index}": stream.hidden for index, stream in enumerate(streams)}
    for index, stream in enumerate(streams):
        if stream.wanted is not stream.hidden:
            found[f"wanted.{index}"] = stream.wanted
    return found


def _restore(streams: Sequence[Stream], stored: Mapping[str, Tensor]) -> None:
    for index, stream in enumerate(streams):
        device = stream.hidden.device
        stream.hidden = stored[f"hidden.{index}"].to(device)
        stream.wanted = stored.get(f"wanted.{index}", stored[f"hidden.{index}"]).to(device)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _link(source: Path, destination: Path) -> None:
    """The same file under a second name; a copy where the file system has no links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
