"""PEFT on a packed model, as users write it: nothing is asked of them."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hfq import HfqConfig
from hfq.core.errors import WeightError
from hfq.core.spec import IntSpec
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear
from hfq.nn.packed import PackedModule
from hfq.training.merge import merge_to_float

# PEFT and TRL still use the names that Transformers 5.23 renames.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)

RANDOM = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost these small matrices more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ids(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 64, (3, 9), generator=generator)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint of a small Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> LlamaForCausalLM:
    config = HfqConfig(**{"bits": 4, "group_size": 16, **settings})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)


def with_lora(model: nn.Module, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(**{**RANDOM, "target_modules": "all-linear", **settings})
    )


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name.replace('base_model.model.', '').replace('.base_layer', '')}.{base}.{key}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for base in module.slots
        for key, tensor in module.neutral_tensors(base).items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    error = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()
    assert error <= tolerance, error


def close_gradients(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        close(a[name], b[name], tolerance)


# ---- training


def test_all_linear_finds_the_packed_layers_and_trains(
    checkpoint: Path, ids: Tensor, tmp_path: Path
) -> None:
    base = load(checkpoint)
    before = packed_state(base)
    assert len(before) == 2 * 7 * 2
    model = with_lora(base, init_lora_weights=True)
    wrapped = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(wrapped) == 14
    close(model(ids).logits, load(checkpoint)(ids).logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert same(packed_state(model), before)
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 200_000
    close(PeftModel.from_pretrained(load(checkpoint), tmp_path).eval()(ids).logits, logits)
    low = PeftModel.from_pretrained(load(checkpoint), tmp_path, low_cpu_mem_usage=True).eval()
    close(low(ids).logits, logits)


def test_adapters_of_a_packed_checkpoint(checkpoint: Path, ids: Tensor, tmp_path: Path) -> None:
    """From a packed checkpoint on disk, through every door that PEFT and Transformers have."""
    load(checkpoint).save_pretrained(tmp_path / "base")
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(ids).logits, logits)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(tmp_path / "adapter")
    close(native.eval()(ids).logits, logits)
    native.disable_adapters()
    close(native(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits)


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# Gloo, as NCCL, has no integers of 16 bits.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "prompt", "spqr"])
def test_training_in_several_processes(
    checkpoint: Path, ids: Tensor, process_group: None, kind: str
) -> None:
    settings = {"format": "spqr", "method": "rtn"} if kind == "spqr" else {}
    model = load(checkpoint, **settings)
    scales = model.model.layers[0].self_attn.q_proj.packed_parameters("weight")
    assert any(held.dtype == torch.int16 for held in scales.values())
    if kind == "prompt":
        prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        adapted = get_peft_model(model, prompts)
    else:
        adapted = with_lora(model)
    before = packed_state(model)
    together = nn.parallel.DistributedDataParallel(adapted)
    together(input_ids=ids, labels=ids).loss.backward()
    learnt = [p for p in adapted.parameters() if p.requires_grad]
    assert learnt and all(p.grad is not None for p in learnt)
    assert same(packed_state(model), before)
    # The last word is the user's.
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["x"])
    assert model._ddp_params_and_buffers_to_ignore == ["x"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_training_in_several_processes_on_gpus(
    checkpoint: Path, ids: Tensor, cuda: torch.device
) -> None:
    model = with_lora(load(checkpoint, torch.bfloat16, device_map=0))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        together = nn.parallel.DistributedDataParallel(model, device_ids=[0])
        together(input_ids=ids.to(cuda), labels=ids.to(cuda)).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantized_model(
    checkpoint: Path, ids: Tensor, dtype: torch.dtype
) -> None:
    model = with_lora(load(checkpoint, dtype)).train()
    twin = copy.deepcopy(model)
    merge_to_float(twin)
    # In bfloat16 both are some 5 % off the float32 gradients, in different directions: the kernel of few tokens
    # accumulates in float32, the matrix product of the twin rounds elsewhere.
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    close_gradients(gradients(model, ids), gradients(twin, ids), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(
    checkpoint: Path, ids: Tensor, use_reentrant: bool, dtype: torch.dtype
) -> None:
    """The recomputed activations must be those of the first pass, also where int8 kernels could run."""
    model = with_lora(load(checkpoint, dtype)).train()
    wanted = gradients(model, ids)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert model.base_model.model.is_gradient_checkpointing
    close_gradients(gradients(model, ids), wanted, 1e-6)


def test_autocast(checkpoint: Path, ids: Tensor) -> None:
    model = with_lora(load(checkpoint)).train()
    twin = copy.deepcopy(model)
    merge_to_float(twin)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
        assert q_proj.base_layer(torch.randn(2, 32)).dtype == torch.bfloat16
        actual, wanted = gradients(model, ids), gradients(twin, ids)
    close_gradients(actual, wanted, 0.05)


@pytest.mark.parametrize("use_dora", [False, True])
def test_compiled_training_step(checkpoint: Path, ids: Tensor, use_dora: bool) -> None:
    torch._dynamo.reset()
    model = with_lora(load(checkpoint), use_dora=use_dora).train()
    wanted = gradients(model, ids)
    layer = model.base_model.model.model.layers[0].mlp
    layer.compile(fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        # Dynamo looks at .grad of every input of a block, also of the previous block's output.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        close_gradients(gradients(model, ids), wanted, 1e-4)
    torch._dynamo.reset()


def test_trainer_with_resume(checkpoint: Path, ids: Tensor, tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=3,
            max_steps=steps,
            save_steps=2,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        return Trainer(with_lora(load(checkpoint)), arguments, train_dataset=data)

    first = trainer(2)
    before = packed_state(first.model)
    first.train()
    second = trainer(4)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    assert same(packed_state(second.model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kbit_preparation_changes_no_packed_weight(
    checkpoint: Path, ids: Tensor, dtype: torch.dtype
) -> None:
    """It casts every 16-bit parameter to float32; scales are not among them."""
    base = load(checkpoint, dtype)
    before = packed_state(base)
    wanted = load(checkpoint, dtype)(ids).logits
    prepared = peft.prepare_model_for_kbit_training(base)
    assert same(packed_state(base), before)
    close(prepared.eval()(ids).logits, wanted, 0.02)
    model = with_lora(prepared).train()
    gradients(model, ids)
    assert same(packed_state(model), before)


def test_eva(checkpoint: Path, ids: Tensor) -> None:
    config = LoraConfig(
        r=4,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
        target_modules="all-linear",
    )
    model = get_peft_model(load(checkpoint), config, low_cpu_mem_usage=True)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    peft.initialize_lora_eva_weights(model, [batch] * 4, show_progress_bar=False)
    a = model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight
    torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-4, rtol=0)
    gradients(model, ids)


# ---- several adapters, other targets


def test_several_adapters(checkpoint: Path, ids: Tensor) -> None:
    plain = load(checkpoint).eval()(ids).logits
    model = with_lora(load(checkpoint)).eval()
    torch.manual_seed(3)
    model.add_adapter("b", LoraConfig(**{**RANDOM, "r": 8, "target_modules": "all-linear"}))
    first = model(ids).logits
    model.set_adapter("b")
    second = model(ids).logits
    assert (first - second).norm() > 0.01 * first.norm()
    with model.disable_adapter():
        close(model(ids).logits, plain)
    mixed = model(ids, adapter_names=["default", "b", "__base__"]).logits
    for row, wanted in enumerate((first, second, plain)):
        close(mixed[row], wanted[row])
    model.add_weighted_adapter(["default", "b"], [1.0, 0.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    close(model(ids).logits, first)
    model.delete_adapter("b")
    close(model(ids).logits, first)


def test_adapter_on_packed_embeddings(checkpoint: Path, ids: Tensor, tmp_path: Path) -> None:
    settings = {"quantize_embeddings": True, "quantize_lm_head": True, "bits": 8}
    base = load(checkpoint, **settings)
    assert isinstance(base.model.embed_tokens, QuantEmbedding) and isinstance(
        base.lm_head, QuantLinear
    )
    model = with_lora(base, target_modules=["embed_tokens", "lm_head", "q_proj"])
    before = packed_state(model)
    twin = copy.deepcopy(model)
    merge_to_float(twin)
    close_gradients(gradients(model, ids), gradients(twin, ids), 1e-4)
    assert same(packed_state(model), before)
    logits = model.eval()(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT saves the embedding beside the adapter and says so
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    reloaded = PeftModel.from_pretrained(load(checkpoint, **settings), tmp_path).eval()
    close(reloaded(ids).logits, logits)
    merge_to_float(model)
    close(model.merge_and_unload().eval()(ids).logits, logits)


def test_a_packed_layer_cannot_be_a_module_to_save(checkpoint: Path) -> None:
    """It would train nothing; the error comes before training."""
    with pytest.raises((RuntimeError, WeightError), match=r"require gradients|packed"):
        with_lora(load(checkpoint), target_modules=["v_proj"], modules_to_save=["q_proj"])


def test_float_layers_can_be_modules_to_save(checkpoint: Path, ids: Tensor) -> None:
    model = with_lora(
        load(checkpoint), target_modules=["v_proj"], modules_to_save=["lm_head"]
    ).train()
    assert any("lm_head" in name for name in gradients(model, ids))


# ---- merging


def test_merging_into_the_format_warns_once_and_is_measured(checkpoint: Path, ids: Tensor) -> None:
    model = with_lora(load(checkpoint)).eval()
    logits = model(ids).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        merged = model.merge_and_unload(safe_merge=True).eval()
    ours = [w for w in caught if "merge_to_float" in str(w.message)]
    assert len(ours) == 1
    assert isinstance(merged.model.layers[0].self_attn.q_proj, QuantLinear)
    error = ((merged(ids).logits - logits).norm() / logits.norm()).item()
    assert 1e-3 < error < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_to_float_is_exact_and_saves_a_plain_model(
    checkpoint: Path, ids: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = with_lora(load(checkpoint, dtype)).eval()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.kernel_mode = "exact"
    logits = model(ids).logits
    merge_to_float(model)
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    close(model(ids).logits, logits, 1e-5 if dtype == torch.float32 else 0.02)
    merged = model.merge_and_unload().eval()
    close(merged(ids).logits, logits, 1e-5 if dtype == torch.float32 else 0.05)
    merged.save_pretrained(tmp_path)
    assert not hasattr(LlamaConfig.from_pretrained(tmp_path), "quantization_config")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(plain(ids).logits, merged(ids).logits)


def test_merging_to_float_by_hand_keeps_ties(ids: Tensor) -> None:
    """A model that was packed without from_pretrained."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    spec = IntSpec(group_size=16)
    head = QuantLinear.from_linear(model.lm_head, format="int", spec=spec)
    table = QuantEmbedding.from_embedding(model.model.embed_tokens, format="int", spec=spec)
    table.share_packed(head)
    model.lm_head, model.model.embed_tokens = head, table
    logits = model(ids).logits
    merge_to_float(model)
    close(model(ids).logits, logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_to_float_after_a_merge_is_refused(checkpoint: Path) -> None:
    model = with_lora(load(checkpoint))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    with pytest.raises(WeightError, match="merged"):
        merge_to_float(model)
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_merging_into_transposed_layers(tmp_path: Path, ids: Tensor) -> None:
    """GPT-2's Conv1D: packed as a Linear, float again as a Conv1D; one of its matrices is square."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=HfqConfig(bits=4, group_size=16), dtype=torch.float32
    )
    model = with_lora(base, target_modules=["c_attn", "c_proj", "c_fc"]).eval()
    logits = model(ids).logits
    merge_to_float(model)
    close(model(ids).logits, logits)
    close(model.merge_and_unload().eval()(ids).logits, logits)


def test_an_adapter_with_nan_is_not_merged(checkpoint: Path) -> None:
    model = with_lora(load(checkpoint))
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    q_proj.lora_A["default"].weight.data.fill_(float("nan"))
    before = packed_state(q_proj)
    with pytest.raises(WeightError, match="finite"), contextlib.suppress(UserWarning):
        q_proj.merge()
    assert not q_proj.merged and same(packed_state(q_proj), before)
