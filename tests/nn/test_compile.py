"""torch.compile and torch.export: whole graphs, no recompilation per layer, gradients, portable programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.formats import FORMATS
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear

FOUR_BITS = IntSpec(group_size=16)
SPECS: dict[str, tuple[str, QuantSpec]] = {
    "int 4": ("int", FOUR_BITS),
    "int 3, zeros": ("int", IntSpec(bits=3, group_size=16, sym=False)),
    "int8": ("int8", FORMATS.get("int8").spec({})),
    "fp8": ("fp8", FORMATS.get("fp8").spec({})),
    "nf4, double quantization": ("nf4", CodebookSpec(group_size=16, double_quant=True)),
}

pytestmark = [
    # torch._inductor imports torch.jit, which warns about itself.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # Dynamo looks at .grad of every input of a block, also of the previous block's output.
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A float layer between two packed ones, with a residual."""

    def __init__(self, format: str, spec: QuantSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.up = QuantLinear(32, 48, format=format, spec=spec)
        self.down = QuantLinear(48, 32, bias=False, format=format, spec=spec)
        for linear in (self.up, self.down):
            linear.requantize("weight", torch.randn(linear.weight.shape, generator=generator) * 0.2)
            linear.kernel_mode = "exact"
        self.up.bias.data.zero_()
        self.norm = nn.LayerNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.norm(self.up(x))))


def blocks(
    generator: torch.Generator, count: int = 2, format: str = "int", spec: QuantSpec = FOUR_BITS
) -> nn.Sequential:
    return nn.Sequential(*[Block(format, spec, generator) for _ in range(count)])


def prepare(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare()


def compiles() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check_whole_graph(model: nn.Sequential, backend: str, generator: torch.Generator) -> None:
    """Outputs and gradients of the compiled model, against eager code."""
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(3, 32, generator=generator, requires_grad=True)
    y = compiled(x)
    inputs = [x, *model[0].norm.parameters()]
    gradients = torch.autograd.grad(y.sum(), inputs)
    # The compiler chose the kernel that eager code chooses.
    assert model[0].up._prepared
    wanted = model(x)
    torch.testing.assert_close(y, wanted)
    for actual, reference in zip(gradients, torch.autograd.grad(wanted.sum(), inputs), strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("format", "spec"), SPECS.values(), ids=SPECS.keys())
def test_whole_graph_with_gradients(
    format: str, spec: QuantSpec, generator: torch.Generator
) -> None:
    """Of a model that was never run: the compiler prepares it."""
    check_whole_graph(blocks(generator, 1, format, spec), "aot_eager", generator)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("prepared", [True, False])
def test_inductor(prepared: bool, generator: torch.Generator) -> None:
    model = blocks(generator)
    if prepared:
        prepare(model)
    check_whole_graph(model, "inductor", generator)


@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic_batch(dynamic: bool | None, generator: torch.Generator) -> None:
    model = blocks(generator)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch._dynamo.utils.counters.clear()
    for batch in (2, 3, 5, 7, 11, 16, 17, 19, 40, 64):
        x = torch.randn(batch, 32, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    # One graph for few tokens and one for many; without `dynamic` also one for the first size.
    assert compiles() <= (2 if dynamic else 3)


def test_layers_of_one_shape_share_their_code(generator: torch.Generator) -> None:
    """Compiling block by block, as Transformers and TRL do, must not compile every block."""
    model = blocks(generator, count=6)
    prepare(model)
    torch._dynamo.utils.counters.clear()
    for block in model:
        block.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32, generator=generator)
    with torch.no_grad():
        y = model(x)
    assert compiles() == 1
    torch._dynamo.reset()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(y, model(x))


def test_new_weights_are_seen_without_recompilation(generator: torch.Generator) -> None:
    packed = QuantLinear(32, 24, bias=False, format="int", spec=IntSpec(group_size=16))
    packed.requantize("weight", torch.randn(24, 32, generator=generator))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32, generator=generator)
    compiled(x)
    torch._dynamo.utils.counters.clear()
    for change in (
        lambda: packed.requantize("weight", torch.randn(24, 32, generator=generator)),
        lambda: packed.load_state_dict(packed.state_dict()),
        lambda: packed.restore(),
    ):
        change()
        packed.prepare()
        torch.testing.assert_close(compiled(x), packed(x))
    assert compiles() == 0
    packed.restore()
    torch.testing.assert_close(compiled(x), packed(x))


def test_autocast(generator: torch.Generator) -> None:
    model = blocks(generator)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = compiled(x), model(x)
        assert model[0].up(x).dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head(tied: bool, generator: torch.Generator) -> None:
    table = QuantEmbedding(40, 32, format="int", spec=IntSpec(group_size=16))
    head = QuantLinear(32, 40, bias=False, format="int", spec=IntSpec(group_size=16))
    head.requantize("weight", torch.randn(40, 32, generator=generator))
    table.requantize("weight", torch.randn(40, 32, generator=generator))
    if tied:
        table.share_packed(head)
    model = nn.Sequential(table, head)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(0, 40, (2, 5), generator=generator)
    torch.testing.assert_close(compiled(ids), model(ids))


@pytest.mark.parametrize("prepared", [True, False])
def test_export(prepared: bool, generator: torch.Generator) -> None:
    """An exported program has the reference operators: it runs without native kernels, on any batch."""
    model = blocks(generator)
    x = torch.randn(3, 32, generator=generator)
    wanted = model(x)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare() if prepared else module.restore()
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {op for op in called if "hfq" in str(op)} == {torch.ops.hfq.linear.default}
    exported = program.module()
    torch.testing.assert_close(exported(x), wanted)
    torch.testing.assert_close(exported(x.repeat(40, 1)), wanted.repeat(40, 1))
    assert not any(
        t.is_floating_point() and t.numel() >= 32 * 48 for t in program.state_dict.values()
    )
