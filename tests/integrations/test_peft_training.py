"""Adapters on a packed model are trained as on a float one: same gradients, and no packed weight changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hfq.training.merge import merge_to_float

from .peft_models import close, close_gradients, gradients, load, packed_state, same, with_lora

# PEFT and TRL still use the names that Transformers 5.23 renames.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)


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
