"""Adapters on a packed model are trained as on a float one: same gradients, and no packed weight changes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from hfq.nn.linear import QuantLinear
from hfq.training.merge import merge_to_float

from .peft_models import (
    ADAPTED,
    close,
    close_gradients,
    gradients,
    load,
    packed_state,
    same,
    with_lora,
)

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
    assert losses[-1] < 0.98 * losses[0]
    assert same(packed_state(model), before)
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 200_000
    close(PeftModel.from_pretrained(load(checkpoint), tmp_path).eval()(ids).logits, logits)
    low = PeftModel.from_pretrained(load(checkpoint), tmp_path, low_cpu_mem_usage=True).eval()
    close(low(ids).logits, logits)


def test_training_in_several_processes(checkpoint: Path, ids: Tensor, tmp_path: Path) -> None:
    """Two learn from one sequence each, and both get the mean of the gradients. Gloo, as NCCL, has no integers of 16 bits.

    Each holds the whole model, or half of each tensor, packed ones as well.
    """
    torch.save(ids, tmp_path / "ids.pt")
    script = Path(__file__).with_name("train_together.py")
    # As pytest's filters say: there may be no native kernels, and PEFT uses names that Transformers renames.
    ignored = ["ignore:hfq runs without its:RuntimeWarning", "ignore::FutureWarning"]
    filters = [word for each in ("error", *ignored) for word in ("-W", each)]
    command = [sys.executable, *filters, str(script)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([*command, str(rank), str(checkpoint), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for kind, make in ADAPTED.items():
        model = make(checkpoint)
        assert any(parameter.dtype == torch.int16 for parameter in model.parameters())
        alone = [gradients(model, row[None]) for row in ids[:2]]
        mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}-{rank}.pt")
            close_gradients({f"module.{name}": each for name, each in mean.items()}, found, 1e-5)
            if not (tmp_path / f"{kind}-sharded-{rank}.pt").exists():
                assert kind == "prompt" or Version(torch.__version__).release < (2, 12)
                continue
            sharded = torch.load(tmp_path / f"{kind}-sharded-{rank}.pt")
            close_gradients(mean, sharded["gradients"], 1e-5)
            close(sharded["logits"]["logits"], model(ids[rank : rank + 1]).logits)
            assert rank == 1 or same(sharded["state"], model.state_dict())


def test_the_last_word_on_what_processes_share_is_the_users(checkpoint: Path) -> None:
    model = load(checkpoint)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["x"])
    assert model._ddp_params_and_buffers_to_ignore == ["x"]


@pytest.fixture
def nccl(cuda: torch.device) -> Iterator[torch.device]:
    """A group of one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield cuda
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_training_in_several_processes_on_gpus(
    checkpoint: Path, ids: Tensor, nccl: torch.device
) -> None:
    model = with_lora(load(checkpoint, torch.bfloat16)).to(nccl)
    together = nn.parallel.DistributedDataParallel(model, device_ids=[0])
    together(input_ids=ids.to(nccl), labels=ids.to(nccl)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.gpu
@pytest.mark.usefixtures("fsdp2")
@pytest.mark.filterwarnings("ignore")
def test_sharded_weights_on_gpus(checkpoint: Path, ids: Tensor, nccl: torch.device) -> None:
    model, ids = with_lora(load(checkpoint, torch.bfloat16)).to(nccl), ids.to(nccl)
    wanted, logits = gradients(model, ids), model(ids).logits
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    for _ in range(3):
        close(model(ids).logits, logits, 0.02)
        found = gradients(model, ids)
    close_gradients({name: each.full_tensor() for name, each in found.items()}, wanted, 0.05)


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
    """Each packed layer gives what a float one gives, and its gradient.

    Gradients of the model as a whole tell less: attention's are differences of nearly equal terms, and half a rounding of a float
    Linear's output moves them by up to 80 %.
    """
    model = with_lora(load(checkpoint)).train()
    products: list[tuple[Tensor, Tensor]] = []

    def forward(layer: QuantLinear, inputs: tuple[Tensor], y: Tensor) -> None:
        assert y.dtype == torch.bfloat16
        products.append((y, layer.to_float().double()(inputs[0].bfloat16().double())))

    def backward(layer: QuantLinear, grads: tuple[Tensor | None], outputs: tuple[Tensor]) -> None:
        if grads[0] is not None:
            products.append((grads[0], outputs[0].double() @ layer.dequantize().double()))

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(forward)
            module.register_full_backward_hook(backward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learnt = gradients(model, ids)
    assert learnt.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(products) == 14 + 11  # q, k and v of the first layer read what needs no gradient
    for found, exact in products:
        # The weight and the result are rounded to 8 bits, by at most 2^-8; together by 0.7 of that (root mean square).
        close(found, exact, 2**-8)


@pytest.mark.parametrize("use_dora", [False, True])
def test_compiled_training_step(checkpoint: Path, ids: Tensor, use_dora: bool) -> None:
    torch._dynamo.reset()
    model = with_lora(load(checkpoint), use_dora=use_dora).train()
    wanted = gradients(model, ids)
    layer = model.base_model.model.model.layers[0].mlp
    backend = CompileCounterWithBackend("aot_eager")
    layer.compile(fullgraph=True, backend=backend)
    with warnings.catch_warnings():
        # Dynamo looks at .grad of every input of a block, also of the previous block's output.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        close_gradients(gradients(model, ids), wanted, 1e-4)
    assert backend.frame_count == 1
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
