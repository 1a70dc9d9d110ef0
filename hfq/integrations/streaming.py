"""`hfq.quantize`: a checkpoint of any size, with the memory of about one block.

skeleton on meta -> everything outside of the blocks is loaded -> calibration text enters the first block
with `target_bits`: the float model forward and backward, block by block, to measure what bits cost
block by block: loaded, calibrated, packed, written, freed; what comes out of it enters the next
the rest is written -> index, config, tokenizer, card -> loaded again in a new process, logits compared
only then do the files move into the output folder
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .._version import __version__
from ..calibration.blocks import run_after_blocks
from ..calibration.ranks import ProcessError, Ranks, process_group
from ..calibration.report import WeightReport
from ..calibration.run import Calibration, Stream, weight_names
from ..calibration.sequences import fingerprint
from ..config import HfqConfig
from ..core.errors import CalibrationError, ConfigError, HfqError
from ..evaluation.divergence import Totals, compare, score
from ..evaluation.size import weight_size
from ..evaluation.speed import Speed
from ..formats import FORMAT_VERSION
from .batching import batches
from .bit_allocation import apply_allocation, measure, share_out
from .calibrated import HELD_OUT, calibration_sequences, of_its_own
from .card import CARD, has_foreign_card, model_card
from .checkpoint import read_headers
from .gate import check_reloaded
from .live import live_table
from .manifest import manifest
from .own_text import own_sequences
from .report import HeldOut, Report
from .resume import FOLDER, MEASURED, Resume, TensorFiles, fingerprint_of_files
from .source import FloatCheckpoint, save_tokenizer
from .staging import SaveError, staged
from .transformers import HfqQuantizer

__all__ = ["is_one_file", "quantize", "stored_tensors"]

logger = logging.get_logger(__name__)

# Weights of up to this size become one file, which is put together in memory.
_SINGLE_FILE_BYTES = 256 << 20

# Transformers asks for it.
_METADATA = {"format": "pt"}

# What a card calls it: data sets may be private.
_HELD_OUT_TEXT = "calibration text that was held out"

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
    files bit for bit, but for the times in report and card.

    Where torch.distributed has been initialised all processes of the group make the same call: each runs its share of
    the sequences and chooses codes for its share of the weights, and the first one writes. Sums are rounded in another
    order than in one process, which turns some codes over.

    Args:
        model: folder or Hub name of a float model (safetensors).
        output: folder to write into; its old files stay until all new ones are complete.
        config: what to do. Without a `dataset` the model samples its own text; where the float model does not fit into
            memory that text is short, and a warning says what it costs.
        resume: go on with an unfinished run; False deletes what it left.
        dtype: of float weights and activations; "auto": the checkpoint's.
        device: where blocks are worked on.
        command: for the card.

    Returns:
        What was done; also written as ``hfq_report.json``, with a picture of the errors. ``hfq_manifest.json`` tells what
        became of each tensor.

    Raises:
        CheckpointError: the model is missing, incomplete, has tensors without a use, is quantized already, or was not
            reproduced by what was written.
        ConfigError: settings or data cannot be used.
        ResumeError: an unfinished run of other inputs is in the way.
        CalibrationError: activations are NaN or infinite.
        ProcessError: another process of the group ended, or never came.
        SaveError: the folder cannot be written.
        MemoryError: a block does not fit; what was done before it stays.
    """
    with process_group() as ranks:
        return _quantize(
            _Run(ranks, model, output, config, resume, dtype, torch.device(device)), command
        )


def _quantize(run: _Run, command: str | None) -> Report:
    try:
        run.blocks()
        report = run.finish(command)
    except (SaveError, ProcessError):
        raise  # a disk can be cleared, a process started again: what is done stays
    except HfqError:
        # The same call would fail again, and another one could not go on from here.
        run.forget()
        raise
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise MemoryError(
            f"not enough memory: {error}. Blocks that are done stay: the same call goes on with the next one when there is "
            "more memory; fewer tokens (num_samples, seqlen) need less; hfq plan tells how much"
        ) from error
    run.forget()
    return report


def _out_of_memory(error: RuntimeError) -> bool:
    """PyTorch has a class for it on accelerators only, which native operators pass on as words; safetensors maps files with
    the system's.
    """
    words = ("can't allocate memory", "Cannot allocate memory", " out of memory.")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


class _Run:
    """One call of `quantize`."""

    def __init__(
        self,
        ranks: Ranks,
        model: str | os.PathLike[str],
        output: str | os.PathLike[str],
        config: HfqConfig,
        resume: bool,
        dtype: str,
        device: torch.device,
    ) -> None:
        self.start = time.perf_counter()
        # A copy: what calibration leaves in it belongs to this run, and must not make the next one another.
        config = copy.copy(config)
        config.calibration = None
        self.ranks, self.config, self.output = ranks, config, Path(output)
        with ranks.together():
            if self.output.exists() and Path(model).exists() and self.output.samefile(model):
                raise ConfigError(f"output {output} is the model itself: give another folder")
            self.source = FloatCheckpoint(model, config, dtype, device)
            if not resume:
                self.forget()
        self.model, self.quantizer = self.source.model, self.source.quantizer
        recipes = self.quantizer.calibrated
        self.calibration = Calibration(
            self.model, recipes, self.quantizer.make_twin, None, ranks=ranks
        )
        self.names = list(self.calibration.blocks)
        self.inside = tuple(f"{name}." for name in self.names)
        # Read by one process, so that all have the same.
        self.sequences, self.held_out, self.has_held_out = ranks.from_first(
            lambda: self._data(bool(recipes))
        )
        with ranks.together():
            fingerprint = self._fingerprint()
            own = self._batches(device)
        self._agree(fingerprint)
        tokens = self._least(own)
        self.measured: Resume | None = None
        if config.target_bits is not None:
            self.measured = Resume(self.output, fingerprint, tokens, ranks, MEASURED)
            # One run, although it goes on from two places.
            tokens = self.measured.batches
        self.resume = Resume(self.output, fingerprint, tokens, ranks)
        self.resumed = self.resume.done

    def _fingerprint(self) -> dict[str, str]:
        return {
            "model": fingerprint_of_files(self.source.files),
            "settings": json.dumps(self.config.to_dict(), sort_keys=True),
            "calibration data": fingerprint([*self.sequences, *self.held_out]),
            "dtype": str(self.source.dtype),
            "device": self.source.device.type,
            "hfq": f"{__version__}, format {FORMAT_VERSION}",
            "torch": str(torch.__version__),
            "number of processes": str(self.ranks.size),
        }

    def _batches(self, device: torch.device) -> dict[str, int]:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.size))
        head = bool(self.calibration.outside)
        return batches(self.model, device, head=head, processes=processes)

    def _least(self, own: Mapping[str, int]) -> dict[str, int]:
        everybody = self.ranks.gather(own)
        return {kind: min(each[kind] for each in everybody) for kind in own}

    def _agree(self, fingerprint: Mapping[str, str]) -> None:
        """Whether all processes were called alike."""
        for rank, other in enumerate(self.ranks.gather(fingerprint)):
            changed = [name for name, value in fingerprint.items() if other[name] != value]
            if changed:
                raise ConfigError(
                    f"the processes of a group quantize one model together, but in process {rank} {', '.join(changed)} was "
                    f"another than in process {self.ranks.rank}: make the same call in all of them"
                )

    def forget(self) -> None:
        """Delete what the run needed to go on."""
        if self.ranks.first:
            Resume.forget(self.output)

    def _data(self, calibrated: bool) -> tuple[list[Tensor], list[Tensor], bool]:
        """Sequences to calibrate with; others for the quantized and the float model; whether these are held out."""
        if not calibrated:
            vocabulary = self.model.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(self.config.seed)
            return [], [torch.randint(vocabulary, (_PROBE_TOKENS,), generator=generator)], False
        if of_its_own(self.config):
            kept = self.output / FOLDER / "own_text.safetensors"
            chosen = own_sequences(self.source, self.config, kept)
            return chosen, [chosen[0][:_PROBE_TOKENS]], False
        chosen, others = calibration_sequences(self.model, self.config)
        return chosen, others[:HELD_OUT] or [chosen[0][:_PROBE_TOKENS]], bool(others)

    @torch.no_grad()
    def blocks(self) -> None:
        """All blocks that are not done."""
        with self.ranks.together():
            self.source.load(lambda name: not name.startswith(self.inside))
        if self.measured is not None:
            self._allocate(self.measured)
        streams = self.calibration.start(self.sequences, self.resume.batches["calibration"])
        self.followers = self._followers()
        done = self.resume.done
        if done:
            _restore([*streams, *self.followers], self.resume.streams())
            self.calibration.reports = [WeightReport(**report) for report in self.resume.reports]
        for index in range(done):
            self.calibration.skip(index)
        names = weight_names(self.calibration.recipes)
        with live_table(names, enabled=self.ranks.first) as progress:
            self.calibration.progress = progress
            for index in range(done, len(self.names)):
                name = self.names[index]
                with self.ranks.together():
                    self.source.load(partial(_begins_with, f"{name}."))
                self.calibration.block(index, streams, self.followers)
                self.resume.finish(
                    index,
                    self._tensors(name),
                    _hidden([*streams, *self.followers]),
                    [asdict(report) for report in self.calibration.reports],
                )
                self.source.free(name)
            floats = {name: self.model.get_submodule(name) for name in self.calibration.outside}
            self.calibration.rest(streams)
        with self.ranks.together():
            totals = self._compare(floats)
        self.held_out_result = self._held_out(totals)

    def _allocate(self, measured: Resume) -> None:
        """Choose bits; that is all on disk already where it was finished before."""

        def visit(index: int) -> AbstractContextManager[None]:
            return self.source.visit(self.names[index])

        kept = TensorFiles(measured.folder, f"gradients-{self.ranks.rank:05d}")
        tokens = measured.batches["calibration"]
        groups = measure(
            self.calibration, self.sequences, self.config, visit, kept, tokens, resume=measured
        )
        with self.ranks.together():
            selection = self.quantizer.selection
            allocation = share_out(self.model, selection, groups, self.config)
            apply_allocation(self.model, self.quantizer, allocation)
        self.config = self.quantizer.quantization_config

    def _followers(self) -> list[Stream]:
        """Streams that the quantized model is compared on; the first one is a sequence that the written model runs, too."""
        tokens = self.resume.batches["held out"]
        try:
            return [
                stream
                for part in (self.held_out[:1], self.held_out[1:])
                for stream in self.calibration.start(part, tokens)
            ]
        except CalibrationError as error:
            if self.sequences:
                raise
            logger.warning(
                f"hfq: the written model will be loaded, but not compared with the one in memory: {error}"
            )
            return []

    def finish(self, command: str | None) -> Report:
        """Everything that is not in a block, the files around the weights, the check of it all; by the first process."""
        return self.ranks.from_first(lambda: self._finish(command))

    def _finish(self, command: str | None) -> Report:
        calibration = None
        if self.sequences:
            calibration = self.calibration.report(self.sequences)
            self.quantizer.keep_calibration(calibration)
        size, selection = weight_size(self.model), self.quantizer.selection
        with staged(self.output) as new:
            self._write_weights(new)
            self._write_settings(new)
            manifest(
                self.model,
                self.source.files,
                self.source.parameters,
                self.quantizer.names_for_saving,
                sorted(new.glob("*.safetensors")),
            ).write(new)
            difference, speed = self._check(new)
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
                seconds=time.perf_counter() - self.start,
                processes=self.ranks.size,
                resumed_blocks=self.resumed,
                batch_tokens=self.resume.batches["calibration"] if self.sequences else None,
                calibration=calibration,
                allocation=self.quantizer.allocation,
                held_out=self.held_out_result,
                speed=speed,
            )
            report.write(new)
            self._write_card(new, report, command)
        return report

    def _write_card(self, folder: Path, report: Report, command: str | None) -> None:
        if has_foreign_card(self.output):
            return
        card = model_card(
            self.model,
            name=self.output.absolute().name,
            results=report.results(),
            dataset=_HELD_OUT_TEXT if report.held_out else None,
            command=command,
        )
        (folder / CARD).write_text(str(card), encoding="utf-8")

    def _check(self, folder: Path) -> tuple[float | None, Speed | None]:
        ids, expected = self.held_out[0].unsqueeze(0), None
        if self.followers:
            first = self.followers[0]
            ids, expected = first.batch, self._logits(first.batch, first.hidden)
        return check_reloaded(folder, ids, expected, self.source.device, self.config.kernel_mode)

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

    def _compare(self, floats: Mapping[str, nn.Module]) -> tuple[Totals, Totals]:
        """Sums of the quantized and of the float model over this process's share of the held-out text.

        Args:
            floats: what stood outside of the blocks before it was quantized.
        """
        ours, theirs = Totals(), Totals()
        for stream in self.followers if self.has_held_out else ():
            # One by one: logits of a whole batch would be the largest tensors of all.
            sequences = (
                torch.split(each, 1) for each in (stream.batch, stream.wanted, stream.hidden)
            )
            for tokens, wanted, hidden in zip(*sequences, strict=True):
                with _instead(self.model, floats):
                    reference = self._logits(tokens, wanted)[0, :-1]
                logits = self._logits(tokens, hidden)[0, :-1]
                score(logits, tokens[0, 1:], ours)
                score(reference, tokens[0, 1:], theirs)
                compare(logits, reference, ours)
        return ours, theirs

    def _held_out(self, totals: tuple[Totals, Totals]) -> HeldOut | None:
        """The quantized model's predictions of the held-out text beside the float model's; None if there is none."""
        if not self.has_held_out:
            return None
        shares = self.ranks.gather(totals)
        ours = sum((share[0] for share in shares), Totals())
        theirs = sum((share[1] for share in shares), Totals())
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


@contextmanager
def _instead(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, the model has these modules."""
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    yield
    for name, module in before.items():
        model.set_submodule(name, module)


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
