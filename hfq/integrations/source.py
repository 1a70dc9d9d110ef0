"""A float checkpoint that is read block by block into a skeleton on meta."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..calibration.blocks import find_blocks
from ..config import HfqConfig
from ..core.errors import CheckpointError
from ..formats import TensorLayout
from .checkpoint import read_headers
from .conversion import parameter_of_each
from .manifest import check_sources
from .mapped_files import release_pages, return_free_memory
from .transformers import HfqQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FloatCheckpoint", "save_tokenizer"]

logger = logging.get_logger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


class FloatCheckpoint:
    """Files of a float model, and its skeleton with packed modules where no data is needed.

    Args:
        path: a folder, or a repository of the Hub (downloaded as a whole).
        config: how to quantize.
        dtype: of float weights and activations; "auto": the checkpoint's.
        device: where blocks are loaded to.

    Attributes:
        folder: where the files lie.
        files: the safetensors files.
        dtype: of float weights and activations.
        float_bytes: of all float weights in that dtype.
        parameters: names in the files -> parameters of the float model, as they are called before modules are swapped.
        model: the skeleton; ``model.hf_quantizer`` knows what to do with which weight.

    Raises:
        CheckpointError: no complete safetensors checkpoint of a float model.
    """

    def __init__(
        self, path: str | os.PathLike[str], config: HfqConfig, dtype: str, device: torch.device
    ) -> None:
        self.folder = _folder(path)
        self.files = _files(self.folder)
        self.device = device
        # Memory maps are known by their real paths; the Hub's cache is made of links.
        self._real_files = tuple(os.path.realpath(file) for file in self.files)
        settings = _model_config(self.folder)
        settings._name_or_path = str(path)
        self.dtype = _dtype(dtype, settings)
        self.model: PreTrainedModel = self._skeleton(settings)
        self.float_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        headers: dict[str, TensorLayout] = {}
        self._file_of: dict[str, str] = {}
        for file in self.files:
            found = read_headers([file])
            headers |= found
            self._file_of |= dict.fromkeys(found, file)
        self.parameters = parameter_of_each(self.model, headers)
        missing = self.model.state_dict().keys() - set(self.parameters.values())
        missing -= self.model.all_tied_weights_keys.keys()
        if missing:
            raise CheckpointError(
                f"{self.folder} has no tensor for {len(missing)} parameters of {type(self.model).__name__}, such as "
                f"{min(missing)}: the checkpoint is incomplete or of another kind of model"
            )
        check_sources(self.model, headers, self.parameters)
        self.quantizer = HfqQuantizer(config, pre_quantized=False)
        vars(self.model)["hf_quantizer"] = self.quantizer
        vars(settings)["quantization_config"] = config
        with _default_dtype(self.dtype):
            self.quantizer.preprocess_model(
                model=self.model, device_map={"": device}, checkpoint_files=self.files
            )
        # Packed modules are new ones; in training mode they compute with exact activations.
        self.model.eval()  # type: ignore[no-untyped-call]
        self._materialize_buffers(self.model)

    def load(self, wanted: Callable[[str], bool]) -> None:
        """Read the parameters whose names are wanted; weights that need no data are quantized as they arrive."""
        loaded = {
            name.rpartition(".")[0] for name in self._load(self.model, self.quantizer, wanted)
        }
        self.quantizer.finish_loading(self.model, loaded)
        release_pages(self._real_files)

    def free(self, name: str) -> None:
        """Forget the weights of a block; what it consists of stays known."""
        self.model.get_submodule(name).to("meta")
        return_free_memory()

    @contextmanager
    def visit(self, name: str) -> Iterator[None]:
        """Within, the weights of a block are in memory; it may be loaded again afterwards."""
        self.load(lambda each: each.startswith(f"{name}."))
        yield
        _forget(self.model.get_submodule(name))

    def float_model(self) -> PreTrainedModel:
        """The float model with the memory of one block: each is read when it runs, and forgotten afterwards."""
        model = self._skeleton(self.model.config)
        self._materialize_buffers(model)
        blocks = find_blocks(model)
        inside = tuple(f"{name}." for name in blocks)
        self._load(model, None, lambda name: not name.startswith(inside))

        def read(name: str) -> Callable[[nn.Module, Any], None]:
            def hook(module: nn.Module, _: Any) -> None:
                self._load(model, None, lambda each: each.startswith(f"{name}."))

            return hook

        def forget(module: nn.Module, *_: Any) -> None:
            release_pages(self._real_files)
            _forget(module)

        for name, block in blocks.items():
            block.register_forward_pre_hook(read(name))
            block.register_forward_hook(forget)
        return model

    def _skeleton(self, settings: Any) -> PreTrainedModel:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                settings, dtype=self.dtype
            ).eval()
        return model

    def _load(
        self,
        model: PreTrainedModel,
        quantizer: HfqQuantizer | None,
        wanted: Callable[[str], bool],
    ) -> set[str]:
        """Read the parameters whose names are wanted into a skeleton; their names."""
        mapping: list[Any] = get_model_conversion_mapping(model)
        keys = {key for key, name in self.parameters.items() if wanted(name)}
        settings = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            weight_mapping=quantizer.update_weight_conversions(mapping, model)
            if quantizer
            else mapping,
            hf_quantizer=quantizer,
        )
        # Maps of files count towards limits of a process's memory, whether or not they are read.
        files = sorted({self._file_of[key] for key in keys})
        with _open(files) as slices, _without_bars(), _default_dtype(self.dtype):
            found = {key: tensor for key, tensor in slices.items() if key in keys}
            info, _ = convert_and_load_state_dict_in_model(model, found, settings)
        if info.conversion_errors or info.mismatched_keys:
            first: Any = next(iter([*info.conversion_errors.values(), *info.mismatched_keys]))
            raise CheckpointError(f"{self.folder}: a tensor does not fit the model: {first}")
        model.tie_weights()
        return {self.parameters[key] for key in keys}

    def _materialize_buffers(self, model: PreTrainedModel) -> None:
        """Buffers that no file has (rotary tables) get their values from the model's own initialisation."""
        model._move_missing_keys_from_meta_to_device(set(), {"": self.device}, None, None)  # type: ignore[arg-type]
        model.initialize_weights()  # type: ignore[no-untyped-call]


def _forget(block: nn.Module) -> None:
    """Back to meta, but for its buffers: no file has them, so they would be lost."""
    for module in block.modules():
        for base, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[base] = nn.Parameter(empty, parameter.requires_grad)
    return_free_memory()


def save_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of one folder into another; a model without one is left without one."""
    # For some architectures Transformers makes up an empty tokenizer.
    if not any((source / name).is_file() for name in _TOKENIZER_FILES):
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.warning(
            f"hfq: the tokenizer in {source} cannot be loaded and was not copied: {error}"
        )
        return
    tokenizer.save_pretrained(target)


def _folder(path: str | os.PathLike[str]) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(
            snapshot_download(
                str(path),
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md"],
            )
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no folder and cannot be had from the Hub: {error}"
        ) from error


def _files(folder: Path) -> list[str]:
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (folder / _SINGLE).is_file():
        names = [_SINGLE]
    else:
        raise CheckpointError(
            f"expected {_SINGLE} or {_INDEX} in {folder}: hfq reads safetensors only, because other formats can run code"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: download it again")
    return [str(folder / name) for name in names]


def _model_config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot load {folder}: {error}") from error
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise CheckpointError(
            f"{folder} is quantized already (by {method}): start from the float model"
        )
    return config


def _dtype(name: str, config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None) if name == "auto" else getattr(torch, name, None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    return found if isinstance(found, torch.dtype) else torch.float32


@contextmanager
def _open(files: list[str]) -> Iterator[dict[str, Any]]:
    """Every tensor of the files by name, still on disk."""
    handles: list[Any] = [safe_open(file, framework="pt") for file in files]
    yield {key: handle.get_slice(key) for handle in handles for key in handle.keys()}  # noqa: SIM118
    handles.clear()


@contextmanager
def _without_bars() -> Iterator[None]:
    """One bar for each block would say nothing."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
