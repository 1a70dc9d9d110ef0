"""`HfqQuantizer`: where Transformers' ``from_pretrained`` and ``save_pretrained`` meet packed modules.

On the fly: the skeleton's modules are swapped on meta, each float tensor is quantized and packed when it arrives,
and its float copy dies. Packed checkpoints: the headers are compared with the expected layouts before anything is
read, then the packed tensors go straight into place.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ..algorithms import ALGORITHMS
from ..calibration.blocks import find_blocks
from ..config import HfqConfig, Recipe
from ..core.errors import CheckpointError, ConfigError, HfqError, KernelError
from ..core.weight import QuantizedWeight
from ..formats import TensorLayout, check_tensors
from ..nn.embedding import QuantEmbedding
from ..nn.experts import QuantExperts, pack_experts_, unpack_experts_
from ..nn.linear import QuantLinear
from ..nn.packed import PackedModule
from ..nn.packing import pack_weight
from .checkpoint import read_headers
from .conversion import PackedNames, QuantizeOnArrival, parameter_of_each, spellings
from .mapped_files import release_pages, return_free_memory
from .selection import Selection, select_modules

if TYPE_CHECKING:
    # This module is imported while Transformers is (see `registration`): modeling code is out of reach then.
    from transformers import PreTrainedModel

    from ..calibration.allocation import Allocation
    from ..calibration.report import CalibrationReport

__all__ = ["HfqQuantizer"]

logger = logging.get_logger(__name__)

# Bytes that may lie freed, but not given back to the system, while modules are brought into their kernels' layouts.
_FREED_AT_ONCE = 16 << 20


class HfqQuantizer(HfQuantizer):
    """Transformers' side of hfq; created by ``from_pretrained`` for an `HfqConfig`.

    Attributes:
        selection: what was packed and why the rest was not.
        checkpoint_files: the files that the model was loaded from; in the Hub's cache their paths name the commit.
        calibrated: what is quantized with data, after loading: module -> parameter -> recipe.
        calibration: what a calibrated method did to each weight; None without one.
        allocation: what `target_bits` came to; None without it. `quantization_config` is the outcome then.
    """

    requires_calibration = False
    quantization_config: HfqConfig

    def __init__(self, quantization_config: HfqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.selection = Selection()
        self.calibration: CalibrationReport | None = None
        self.allocation: Allocation | None = None
        self.checkpoint_files: tuple[str, ...] = ()
        self._prefix = ""
        self._recipes: dict[str, Recipe] = {}
        self.calibrated: dict[str, dict[str, Recipe]] = {}
        self._files: tuple[str, ...] = ()
        self._failures: dict[str, HfqError] = {}
        self._transforms: list[Any] | None = None

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, **unused: Any) -> bool:
        return True

    # ---- the skeleton, on meta

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **unused: Any
    ) -> PreTrainedModel:
        _check_whole(model)
        self._prefix = model.base_model_prefix
        self.checkpoint_files = tuple(checkpoint_files or ())
        headers = None if not checkpoint_files else self._headers(checkpoint_files)
        available = None
        if headers is not None:
            available = {name: key for key, name in parameter_of_each(model, headers).items()}
        packed = None
        if self.pre_quantized and available is not None and headers is not None:
            packed = {name for name, key in available.items() if headers[key].dtype == torch.uint8}
        self.selection = select_modules(model, self.quantization_config, available, packed)
        if not self.selection.recipes:
            logger.warning(
                f"hfq: no weight of {type(model).__name__} was quantized: {self.selection.summary()}"
            )
        tied = _tied_modules(model)
        measured = () if self.pre_quantized else self._measured(model)
        for name, recipes in self.selection.recipes.items():
            if not self.pre_quantized and (_needs_data(recipes) or name.startswith(measured)):
                self.calibrated[name] = recipes
            else:
                self._swap(model, name, recipes, has_tensor=name not in tied)
        self._retie(model, tied)
        if packed is not None and headers is not None and available is not None:
            self._check_headers(model, headers, available)
        return model

    def _measured(self, model: PreTrainedModel) -> tuple[str, ...]:
        """What names begin with of weights whose bits are still to be chosen: they arrive as float."""
        if self.quantization_config.target_bits is None:
            return ()
        return tuple(f"{name}." for name in find_blocks(model))

    def _headers(self, files: list[str]) -> dict[str, TensorLayout] | None:
        if not all(file.endswith(".safetensors") for file in files):
            if self.pre_quantized:
                raise CheckpointError(
                    f"expected safetensors files, got {files[0]}: packed checkpoints have no other"
                )
            return None
        # Memory maps are known by their real paths; the Hub's cache is made of links.
        self._files = tuple(os.path.realpath(file) for file in files)
        return read_headers(files)

    def _swap(
        self, model: PreTrainedModel, name: str, recipes: dict[str, Recipe], has_tensor: bool
    ) -> None:
        """Replace one float module of the skeleton by its packed twin.

        `has_tensor`: the checkpoint has a tensor of this name (a tied head has none). On the fly a float
        placeholder then keeps the name known to the loader until the tensor arrives.
        """
        module = model.get_submodule(name)
        placeholder = has_tensor and not self.pre_quantized
        self._recipes.update({f"{name}.{base}": recipe for base, recipe in recipes.items()})
        if "weight" not in recipes:
            plan = {base: (recipe.format, recipe.spec) for base, recipe in recipes.items()}
            pack_experts_(
                module, plan, dtype=torch.get_default_dtype(), keep_placeholders=placeholder
            )
            return
        new = _packed_twin(module, recipes["weight"])
        if placeholder:
            new.hold_place("weight", cast(nn.Parameter, module.weight))
        new._is_hf_initialized = True
        model.set_submodule(name, new)

    def _retie(self, model: PreTrainedModel, tied: dict[str, str]) -> None:
        """Express the ties of packed modules by their packed tensors."""
        if not any(target in self.selection.recipes for target in tied):
            return
        keys = {
            t: s
            for t, s in model.all_tied_weights_keys.items()
            if t.rpartition(".")[0] not in self.selection.recipes
        }
        for target, source in tied.items():
            if target in self.selection.recipes:
                slot = cast(PackedModule, model.get_submodule(target)).slots["weight"]
                keys |= {
                    f"{target}.{slot.attribute(k)}": f"{source}.{slot.attribute(k)}"
                    for k in slot.layout()
                }
        # On the instance: the class speaks for float models.
        vars(model).update(_tied_weights_keys=dict(keys), all_tied_weights_keys=keys)

    def _check_headers(
        self, model: PreTrainedModel, headers: dict[str, TensorLayout], available: dict[str, str]
    ) -> None:
        """Every packed tensor of the model must stand in the checkpoint with its shape and dtype."""
        for name, module in _packed_modules(model):
            for base, slot in module.slots.items():
                stored = available.get(f"{name}.{base}")
                if stored is None:
                    continue  # tied: its owner's tensors are checked
                prefix = stored.removesuffix(base)
                found = {
                    key: headers[prefix + slot.stored_name(key)]
                    for key in slot.layout()
                    if prefix + slot.stored_name(key) in headers
                }
                check_tensors(name, found, slot.layout())

    # ---- tensors on their way in

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **unused: Any
    ) -> bool:
        if self.pre_quantized or param_name not in self._recipes:
            return False
        module, _, base = param_name.rpartition(".")
        parameter = model.get_submodule(module)._parameters.get(base)
        return parameter is not None and parameter.is_floating_point()

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        # A placeholder weighs nothing: the packed tensors beside it are counted.
        return 0.0 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self) -> QuantizeOnArrival:
        return QuantizeOnArrival(self._quantize)

    def _quantize(
        self, model: PreTrainedModel, name: str, weight: Tensor
    ) -> dict[str, nn.Parameter]:
        """Pack the float tensor of parameter `name`; full names of the packed Parameters.

        The loader would wrap an error of ours into a report of its own, so it is raised after loading.
        """
        module_name, _, base = name.rpartition(".")
        module, recipe = cast(PackedModule, model.get_submodule(module_name)), self._recipes[name]
        slot = module.slots[base]
        algorithm = ALGORITHMS.get(recipe.method)

        def encode(rows: Tensor) -> QuantizedWeight:
            return algorithm.quantize(rows, recipe.spec, recipe.options)

        try:
            packed = pack_weight(
                weight.transpose(-2, -1) if slot.transposed else weight, slot, encode
            )
        except HfqError as err:
            self._failures[name] = err
            packed = {
                key: torch.zeros(layout.shape, dtype=layout.dtype, device=weight.device)
                for key, layout in slot.layout().items()
            }
        module.drop_placeholder(base)
        release_pages(self._files)
        return {
            f"{module_name}.{slot.attribute(key)}": nn.Parameter(tensor, requires_grad=False)
            for key, tensor in packed.items()
        }

    def get_weight_conversions(self) -> list[WeightRenaming]:
        return [self._packed_names()] if self.pre_quantized else []

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        # Transformers 5.17 passes no model.
        return [*weight_conversions, *self.get_weight_conversions()]

    def _packed_names(self) -> PackedNames:
        renamed = [name for name, recipes in self.selection.recipes.items() if "weight" in recipes]
        return PackedNames(spellings(renamed, self._prefix))

    # ---- the loaded model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **unused: Any
    ) -> PreTrainedModel:
        self._raise_failures()
        for name, module in _packed_modules(model):
            self._make_ready(name, module)
        # Before anything runs: a head that a kernel has its own layout of is read by the embedding, too.
        self._share_tied(model)
        if self.calibrated:
            self._calibrate(model)
            for name, module in _packed_modules(model):
                if name in self.calibrated:
                    self._make_ready(name, module)
        self._keep_transforms(model)
        if self.quantization_config.dequantize:
            return self._dequantize(model)
        self._prepare_all(model)
        if self.quantization_config.decode_kernels:
            found = _decoding().install(model)
            native = ", ".join(f"{count} {kind}" for kind, count in found.items() if count)
            logger.info(f"hfq: native code for {native or 'no norm, gate or attention'}")
        _saving().attach(model)
        logger.info(f"hfq: {self.selection.summary()}")
        return model

    def _prepare_all(self, model: PreTrainedModel) -> None:
        """Into the layouts of the kernels; what that frees goes back on the way, or both layouts would add up."""
        freed = 0
        for _, module in _packed_modules(model):
            freed += sum(
                p.nbytes for base in module.slots for p in module.packed_parameters(base).values()
            )
            module.prepare()
            if freed > _FREED_AT_ONCE:
                return_free_memory()
                freed = 0
        return_free_memory()

    def finish_loading(self, model: PreTrainedModel, names: Collection[str]) -> None:
        """What has to follow where only some modules were loaded (see `source.FloatCheckpoint`)."""
        self._raise_failures()
        for name, module in _packed_modules(model):
            if name in names:
                self._make_ready(name, module)
        self._share_tied(model)
        for name, module in _packed_modules(model):
            if name in names:
                module.prepare()

    def _make_ready(self, name: str, module: PackedModule) -> None:
        if any(module.placeholder(base) is not None for base in module.slots):
            raise CheckpointError(f"{name}: the checkpoint has no tensor for this weight")
        if not module.is_offloaded:
            module.check_packed(name)
        module.kernel_mode = self.quantization_config.kernel_mode
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)

    def make_twin(self, module: nn.Module, recipe: Recipe) -> PackedModule:
        """The packed module that a calibrated one is replaced with; its codes are still to be set."""
        twin = _filled_twin(module, recipe)
        twin.kernel_mode = self.quantization_config.kernel_mode
        return twin

    def names_for_saving(
        self, model: PreTrainedModel, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Tensors of the model under the names that a checkpoint has them by."""
        self._keep_transforms(model)
        renamed: dict[str, Tensor] = revert_weight_conversion(model, tensors)
        return renamed

    def _calibrate(self, model: PreTrainedModel) -> None:
        """Quantize with data what arrived as float."""
        # Modeling code is out of reach when this module is imported.
        from .calibrated import calibrate_loaded

        model.eval()  # type: ignore[no-untyped-call]
        self.keep_calibration(calibrate_loaded(model, self))

    def keep_calibration(self, report: CalibrationReport) -> None:
        """What a checkpoint tells about its data, and the target that its overrides came from."""
        self.calibration = report
        target = {} if self.allocation is None else {"target_bits": self.allocation.target_bits}
        self.quantization_config.calibration = report.provenance() | target

    def _raise_failures(self) -> None:
        if not self._failures:
            return
        name, first = next(iter(self._failures.items()))
        more = (
            f" ({len(self._failures) - 1} more weights failed)" if len(self._failures) > 1 else ""
        )
        raise type(first)(f"{name}: {first}{more}") from first

    def _keep_transforms(self, model: PreTrainedModel) -> None:
        """Saving must undo renamings, but not the merging of tensors that are packed now."""
        transforms = getattr(model, "_weight_conversions", None) or []
        self._transforms = [t for t in transforms if not isinstance(t, PackedNames)]
        kept = [t for t in self._transforms if not isinstance(t, WeightConverter)]
        vars(model)["_weight_conversions"] = [*kept, self._packed_names()]

    def _share_tied(self, model: PreTrainedModel) -> None:
        """Let tied embeddings read the tensors of their head, in the layout of its kernel."""
        for _, module in _packed_modules(model):
            if not isinstance(module, QuantEmbedding):
                continue
            for _, other in _packed_modules(model):
                if (
                    isinstance(other, QuantLinear)
                    and other.qweight is module.qweight
                    and not other.is_offloaded
                ):
                    module.share_packed(other)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called before saving: back to the stored layout in place, so that saving makes no second copy."""
        for name, module in _packed_modules(model):
            if module.is_sharded_out:
                raise KernelError(
                    f"{name}: the packed model cannot be saved after FSDP2 (fully_shard) has shared it out. It has not changed since: save it "
                    "before, and its adapters (PEFT's save_pretrained) now"
                )
            if not module.is_offloaded:
                module.restore()
        return None, {}

    # ---- back to float

    @torch.no_grad()
    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        """Replace every packed module by a float one of the model's dtype."""
        # save_pretrained() leaves a string in config.dtype, and that is what arrives here.
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in list(_packed_modules(model)):
            if module.is_offloaded:
                raise ConfigError(
                    f"{name} is offloaded: load the model without offloading to dequantize it"
                )
            module.compute_dtype = target or module.compute_dtype
            if isinstance(module, (QuantLinear, QuantEmbedding)):
                model.set_submodule(name, _float_twin(module))
            elif isinstance(module, QuantExperts):
                unpack_experts_(module, module.compute_dtype)
        if "_tied_weights_keys" in model.__dict__:
            del model._tied_weights_keys
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
            model.tie_weights()
        _decoding().remove(model)
        # None: saving falls back to the architecture's own mapping.
        vars(model)["_weight_conversions"] = None if self.pre_quantized else self._transforms
        _saving().detach(model)
        return model


def _saving() -> ModuleType:
    from . import hub

    return hub


def _decoding() -> ModuleType:
    from . import decode

    return decode


def _check_whole(model: PreTrainedModel) -> None:
    """Each process has to load whole weights: groups and tiles of a packed one go across the cuts of a plan for its float form.

    Raises:
        ConfigError: `from_pretrained` is to share them out.
    """
    wanted = getattr(model.config, "distributed_config", None)
    sizes = {
        name: value
        for name in ("tp_size", "ep_size", "pp_size", "fsdp_size", "dp_replicate_size")
        if (value := getattr(wanted, name, None) or 1) > 1
    }
    if sizes:
        found = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ConfigError(
            f"expected each process to load all of a quantized model, got distributed_config with {found}. Load it without; to share the "
            "weights out for training, apply torch.distributed.fsdp.fully_shard (or accelerate with fsdp_version 2) to the loaded model"
        )


def _packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module


def _tied_modules(model: PreTrainedModel) -> dict[str, str]:
    """Module -> the module whose ``weight`` it shares."""
    return {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in model.all_tied_weights_keys.items()
        if target.endswith(".weight") and source.endswith(".weight")
    }


def _packed_twin(module: nn.Module, recipe: Recipe) -> QuantLinear | QuantEmbedding:
    """An uninitialised packed module with the sizes, dtype and device of a float one."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(
            module.num_embeddings,
            module.embedding_dim,
            module.padding_idx,
            format=recipe.format,
            spec=recipe.spec,
            dtype=weight.dtype,
            device=weight.device,
        )
    transposed = isinstance(module, Conv1D)
    out_features, in_features = reversed(weight.shape) if transposed else weight.shape
    return QuantLinear(
        in_features,
        out_features,
        module.bias is not None,
        format=recipe.format,
        spec=recipe.spec,
        dtype=weight.dtype,
        device=weight.device,
        transposed=transposed,
    )


def _needs_data(recipes: Mapping[str, Recipe]) -> bool:
    return any(recipe.calibrated for recipe in recipes.values())


def _filled_twin(module: nn.Module, recipe: Recipe) -> QuantLinear | QuantEmbedding:
    """`_packed_twin` of a module whose weights have arrived: with its bias and its hooks; codes are still to be set."""
    twin = _packed_twin(module, recipe)
    bias = getattr(module, "bias", None)
    if bias is not None:
        twin.bias = nn.Parameter(bias.detach(), requires_grad=False)
    twin._is_hf_initialized = True
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]

        add_hook_to_module(twin, hook)
    return twin.train(module.training)


def _float_twin(module: QuantLinear | QuantEmbedding) -> nn.Module:
    """A trainable float module of the kind that was packed."""
    new: nn.Module = module.to_float()
    if isinstance(module, QuantLinear) and module.slot.transposed:
        linear = new
        new = Conv1D(module.out_features, module.in_features)  # type: ignore[no-untyped-call]
        new.weight = nn.Parameter(cast(Tensor, linear.weight).T.contiguous())
        if module.bias is not None:
            new.bias = cast(nn.Parameter, linear.bias)
    return new.requires_grad_(True)
