"""The emulated GPU itself: instructions as they are documented, and mistakes of kernels that it has to see. See cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cuda_emulator import SelfCheck
from torch import Tensor


@pytest.fixture
def races(self_check: SelfCheck) -> Iterator[None]:
    """Looks for them."""
    self_check.watch_races(True)
    yield
    self_check.watch_races(False)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("barrier_for_some", "threads wait for others"),
        ("reads_too_far", "read outside of global memory"),
        ("writes_what_is_read_only", "write outside of global memory"),
        ("misaligned", "misaligned access to global memory"),
        ("writes_behind_shared_memory", "write behind the end of shared memory"),
        ("wgmma_no_proxy_fence", "no fence.proxy.async covers"),
        ("wgmma_of_stores_no_proxy_fence", "no fence.proxy.async covers"),
        ("wgmma_no_fence", "without wgmma.fence"),
        ("wgmma_memory_changes", "shared memory changes while wgmma reads it"),
        ("wgmma_registers_change", "registers change while wgmma reads them"),
        ("wgmma_other_descriptor", "warps of a group start different instructions"),
        ("wgmma_not_aligned", "does not begin with its pattern"),
        ("early_write", "before it was waited for"),
        ("early_read", "before it was waited for"),
        ("early_constant", "a load of constants reads what the kernel in front writes"),
        ("bulk_ring_no_fence", "no fence.proxy.async covers"),
        ("bulk_ring_not_aligned", "misaligned copy_bulk"),
        ("shared_ring_no_fence", "barrier that is not known to the cluster"),
        ("shared_ring_no_barrier", "barrier that is not known to the cluster"),
        ("copy_to_block_that_ends", "ends while copies to it are on the way"),
        ("sum_of_cluster_no_barrier", "a barrier that"),
        ("sum_of_cluster_no_fence", "barrier that is not known to the cluster"),
        ("sum_of_cluster_that_ends", "ends while copies to it are on the way"),
        ("flag_of_later_block", "a wait for what no block before this one does"),
        ("flag_that_nobody_raises", "a wait for what no block before this one does"),
        ("flag_not_lowered", "a flag that nobody lowers"),
        ("flag_copy_no_proxy_fence", "without fence.proxy.async.global"),
        ("flag_copy_early_fence", "without fence.proxy.async.global"),
    ],
)
def test_mistakes_are_seen(self_check: SelfCheck, kernel: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        self_check.run(kernel, torch.zeros(128, dtype=torch.int32))


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("neighbour_without_barrier", "thread .* reads shared memory, thread .* writes it"),
        ("neighbours_shuffle", "thread .* reads shared memory, thread .* writes it"),
        ("neighbours_one_barrier", "thread .* shared memory, thread .* it"),
        ("copies", "thread .* reads shared memory, cp.async of thread .* writes it"),
        ("wgmma_no_barrier", "wgmma of thread .* reads shared memory, .*thread .* writes it"),
        ("wgmma_memory_changes", "thread .* shared memory, wgmma of thread .* reads it"),
        ("ring_no_wait", "thread .* reads shared memory, cp.async of thread .* writes it"),
        ("ring_filled_too_early", "cp.async of thread .* writes shared memory"),
        ("bulk_ring_no_wait", "a copy in bulk writes shared memory, thread .* reads it"),
        ("shared_ring_no_wait", "shared memory"),
        ("shared_ring_filled_too_early", "a copy in bulk writes shared memory"),
        ("sum_of_cluster_no_wait", "thread .* reads shared memory, a copy in bulk writes it"),
        (
            "sum_of_cluster_to_one_place",
            "block .* writes global memory, thread .* of block .* writes",
        ),
        *(
            (f"flag_{mistake}", "thread .* reads global memory, a thread of another cluster writes")
            for mistake in (
                "without_wait",
                "for_one_thread",
                "of_one_thread",
                "before_the_last_write",
            )
        ),
    ],
)
def test_races_are_seen(self_check: SelfCheck, races: None, kernel: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=f"a race: .*{words}.* nothing orders them"):
        self_check.run(kernel, torch.zeros(256, dtype=torch.int32))


def test_reads_by_any_pointer_are_seen(self_check: SelfCheck, races: None) -> None:
    with pytest.raises(RuntimeError, match="read of memory that is no GPU's"):
        self_check.run("reads_too_far_by_itself", torch.zeros(128, dtype=torch.int32))


def test_blocks_that_may_end_too_early_are_seen(self_check: SelfCheck, races: None) -> None:
    with pytest.raises(RuntimeError, match="may end before others are done with it"):
        self_check.run("shared_ring_that_ends", torch.zeros(128, dtype=torch.int32))


def test_waits_that_may_come_too_late_are_seen(self_check: SelfCheck, races: None) -> None:
    with pytest.raises(RuntimeError, match="so late that its phase is over"):
        self_check.run("turns_that_are_missed", torch.zeros(128, dtype=torch.int32))


@pytest.mark.parametrize(
    "kernel",
    [
        *("neighbours", "wgmma", "ring", "bulk_ring", "shared_ring", "sum_of_cluster"),
        *("matrices", "early", "turns", "flag", "flag_copy"),
    ],
)
def test_what_barriers_order_is_no_race(self_check: SelfCheck, races: None, kernel: str) -> None:
    x = torch.zeros(256, dtype=torch.int32)
    self_check.run(kernel, x)


def test_missing_barriers_are_seen(self_check: SelfCheck) -> None:
    x = torch.arange(128, dtype=torch.int32)
    y = self_check.run("neighbour_without_barrier", x)
    assert not torch.equal(y[:32], x[:32].roll(-1))


def test_copies_are_there_when_they_were_waited_for(self_check: SelfCheck) -> None:
    x = torch.arange(128, dtype=torch.int32)
    before, first, second, after = self_check.run("copies", x).view(32, 4).unbind(1)
    assert (before == -1).all() and (second == -1).all()
    assert torch.equal(first, x[::4]) and torch.equal(after, x[::4])


def test_kernels_that_start_early_wait(self_check: SelfCheck) -> None:
    x = torch.arange(128, dtype=torch.int32)
    assert torch.equal(self_check.run("early", x)[:32], x[:32])


def test_blocks_wait_for_flags_of_those_before(self_check: SelfCheck) -> None:
    expected = torch.arange(5, 37, dtype=torch.int32)
    y = self_check.run("flag", torch.zeros(128, dtype=torch.int32))
    assert torch.equal(y[2:34], expected.roll(-1))
    y = self_check.run("flag_copy", torch.zeros(128, dtype=torch.int32))
    assert torch.equal(y[2:34], expected)


def test_matrices_and_shuffles(self_check: SelfCheck, generator: torch.Generator) -> None:
    x = torch.randint(1 << 30, (128,), generator=generator, dtype=torch.int32)
    lanes = self_check.run("matrices", x).view(8, 4, 4)  # g, t, matrix
    assert torch.equal(lanes, x.view(4, 8, 4).permute(1, 2, 0))
    shuffled = self_check.run("shuffle", x).view(32, 4)[:, 0]
    assert torch.equal(shuffled, x[torch.arange(32) ^ 5])
    x[:32] = torch.arange(32) * 4
    x[11], x[19] = 1003, 7
    first, value = self_check.run("shuffle_from_first", x).view(32, 4)[:, :2].unbind(1)
    assert (first == 11).all() and (value == 1003).all()
    with pytest.raises(RuntimeError, match="no lane is the first one"):
        self_check.run("shuffle_from_first", torch.zeros_like(x))


def test_products_of_bytes(self_check: SelfCheck, generator: torch.Generator) -> None:
    """mma.m16n8k32: register r of lane 4g + t has row g + 8 (r % 2) of A from k = 16 (r // 2) + 4t on; B has columns g."""
    x = torch.randint(-(1 << 31), (1 << 31) - 1, (128,), generator=generator, dtype=torch.int32)
    lanes = x.view(torch.int8).view(8, 4, 2, 2, 4)  # g, t, k / 16, row / 8, byte
    a = lanes.permute(3, 0, 2, 1, 4).reshape(16, 32)
    registers = x.view(torch.int8).view(8, 4, 4, 4)[:, :, 1:3]  # g, t, k / 16, byte
    b = registers.permute(2, 1, 3, 0).reshape(32, 8)
    d = (a.int() @ b.int()).view(2, 8, 4, 2).permute(1, 2, 0, 3)  # g, t, row / 8, column % 2
    assert torch.equal(self_check.run("product_of_bytes", x), d.flatten())


# ---- wgmma, barriers in shared memory, clusters


def test_wgmma_is_what_is_documented(self_check: SelfCheck, generator: torch.Generator) -> None:
    columns = torch.randn(16, 16, generator=generator).bfloat16()
    y = self_check.run("wgmma", columns.view(torch.int32).view(-1)).view(torch.float32)
    for warp, lane in itertools.product(range(4), range(32)):
        row, column = lane // 4 + warp % 2 * 8, warp // 2 * 8 + 2 * (lane % 4)
        assert y[32 * warp + lane] == columns[column, row], (warp, lane)
    stored = self_check.run("wgmma_of_stores", columns.view(torch.int32).view(-1))
    assert torch.equal(stored.view(torch.float32), y)
    early = self_check.run("wgmma_no_wait", columns.view(torch.int32).view(-1))
    assert early.view(torch.float32).isnan().all()


def _wrong(self_check: SelfCheck, kernel: str, x: Tensor, y: Tensor) -> bool:
    """Whether the kernel fails, or gives anything but `y`."""
    try:
        return not torch.equal(self_check.run(kernel, x)[: len(y)], y)
    except RuntimeError:
        return True


def test_a_missing_barrier_is_seen(self_check: SelfCheck, generator: torch.Generator) -> None:
    x = torch.randn(256, generator=generator).bfloat16().view(torch.int32)
    assert _wrong(self_check, "wgmma_no_barrier", x, self_check.run("wgmma", x))


def test_barriers_in_shared_memory(self_check: SelfCheck, generator: torch.Generator) -> None:
    x = torch.randint(1 << 10, (128,), generator=generator, dtype=torch.int32)
    expected = torch.zeros(32, dtype=torch.int32)
    for i, j in itertools.product(range(7), range(3)):
        expected = 3 * expected + x[(torch.arange(32) + 32 * j + i) % 128]
    assert torch.equal(self_check.run("ring", x)[:32], expected)
    assert _wrong(self_check, "ring_no_wait", x, expected)
    assert _wrong(self_check, "ring_filled_too_early", x, expected)
    with pytest.raises(RuntimeError, match="threads wait for others"):
        self_check.run("ring_too_many_expected", x)


def test_copies_in_bulk(self_check: SelfCheck, generator: torch.Generator) -> None:
    x = torch.randint(1 << 10, (128,), generator=generator, dtype=torch.int32)
    expected = torch.zeros(32, dtype=torch.int32)
    for i in range(7):
        for j in range(1 if i % 2 else 2):
            expected = 3 * expected + x[4 * i + 32 * j :][:32]
    assert torch.equal(self_check.run("bulk_ring", x)[:32], expected)
    for mistake in ("nothing_expected", "no_wait", "filled_too_early"):
        assert _wrong(self_check, f"bulk_ring_{mistake}", x, expected), mistake


def test_copies_to_blocks_of_a_cluster(self_check: SelfCheck, generator: torch.Generator) -> None:
    x = torch.randint(1 << 10, (128,), generator=generator, dtype=torch.int32)
    expected = torch.zeros(32, dtype=torch.int32)
    for i, j in itertools.product(range(7), range(2)):
        expected = 3 * expected + x[4 * i + 32 * j :][:32]
    assert torch.equal(self_check.run("shared_ring", x)[:64].view(2, 32), expected.expand(2, 32))
    assert _wrong(self_check, "shared_ring_no_wait", x, expected.repeat(2))


def test_blocks_of_a_cluster_push_to_each_other(self_check: SelfCheck) -> None:
    x = torch.arange(128, dtype=torch.int32)
    y = self_check.run("sum_of_cluster", x).view(torch.float32)[:32]
    assert torch.equal(y, 15.0 * x[:32] + 0 * 8 + 1 * 4 + 2 * 2 + 3)
