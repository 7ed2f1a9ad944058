"""What stays in memory and what is streamed, and how much memory there is."""

from __future__ import annotations

import random

import pytest

from vllm_sirius.offload.available import available_bytes
from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.plan import WeightSizes, plan_memory

pytestmark = pytest.mark.usefixtures("fresh_input")
GB = 10**9


SIZES = WeightSizes(copies=GB, kept=GB // 2, rows=GB, groups=(GB,) * 4, head=(GB // 2,) * 2)


def test_a_large_budget_streams_nothing():
    plan = plan_memory(SIZES, num_buffers=2, budget=int(7.5 * GB))
    assert plan.streamed == []
    assert plan.rows_in_memory
    assert plan.head_in_memory
    assert plan.memory_bytes == int(7.5 * GB)
    assert "nothing is streamed" in str(plan)


def test_rows_are_looked_up_before_a_layer_is_streamed_that_need_not_be():
    """A gigabyte less than all: the rows go to the file, and with two buffers one layer stays."""
    plan = plan_memory(SIZES, num_buffers=2, budget=int(5.5 * GB))
    assert not plan.rows_in_memory
    assert plan.head_in_memory
    assert plan.streamed == [0, 1, 2]
    assert plan.memory_bytes == int(5.5 * GB)
    assert "1 of 4 layers stay in memory, a pass streams 3 (3.00 GB)" in str(plan)


def test_the_head_is_streamed_last():
    plan = plan_memory(SIZES, num_buffers=2, budget=int(4.5 * GB))
    assert (plan.streamed, plan.head_in_memory) == ([0, 1, 2, 3], True)
    plan = plan_memory(SIZES, num_buffers=2, budget=int(3.5 * GB))
    assert (plan.streamed, plan.num_streamed_layers, plan.head_in_memory) == ([0, 1, 2, 3, 4, 5], 4, False)
    assert plan.streamed_bytes == 5 * GB
    assert plan.buffer_bytes == 2 * GB
    assert plan.memory_bytes == int(3.5 * GB)
    assert "a pass streams 4 and the lm_head (5.00 GB)" in str(plan)


def test_a_budget_below_the_least_says_the_least():
    with pytest.raises(OffloadError, match=r"offload_budget_gb=3\.49 is too little .* give at least 3\.5"):
        plan_memory(SIZES, num_buffers=2, budget=int(3.49 * GB))


def test_what_has_neither_rows_nor_a_head_to_stream_keeps_them():
    plan = plan_memory(WeightSizes(GB, GB, 0, (GB,) * 4), num_buffers=2, budget=4 * GB)
    assert plan.streamed == [0, 1, 2, 3]
    assert plan.rows_in_memory
    assert plan.head_in_memory


def test_resident_groups_are_spread_and_fit():
    for _ in range(50):
        count, size = random.randint(1, 60), random.randint(1, GB)
        least = 3 * size + min(2, count) * size
        budget = random.randint(least, least + count * size)
        sizes = WeightSizes(size, 2 * size, 0, (size,) * count)
        plan = plan_memory(sizes, num_buffers=2, budget=budget)
        assert plan.memory_bytes <= budget
        num_resident = sum(plan.resident)
        if num_resident + 1 < count - 1:
            # One more would not have fitted.
            assert plan.memory_bytes + size > budget
        runs = "".join("r" if stays else " " for stays in plan.resident).split()
        if num_resident <= count / 2:
            assert all(len(run) == 1 for run in runs)


MEMINFO = "MemTotal:       24000000 kB\nMemAvailable:   10000000 kB\n"


def machine(tmp_path, membership):
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self" / "cgroup").write_text(membership)
    return proc, cgroups


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_without_control_groups_the_machine_decides(tmp_path):
    assert available_bytes(*machine(tmp_path, "0::/\n")) == 10000000 << 10


def test_the_tightest_group_of_version_2_decides_and_page_cache_is_free(tmp_path):
    proc, cgroups = machine(tmp_path, "0::/outer/inner\n")
    put(cgroups / "outer" / "inner", memory__max="max\n", memory__current="5\n")
    put(
        cgroups / "outer",
        memory__max="4000000000\n",
        memory__current="3000000000\n",
        memory__stat="anon 1\ninactive_file 400000000\nactive_file 100000000\n",
    )
    assert available_bytes(proc, cgroups) == 1_500_000_000


def test_groups_of_version_1_count_their_children(tmp_path):
    proc, cgroups = machine(tmp_path, "5:cpu:/x\n4:memory:/box\n")
    put(
        cgroups / "memory" / "box",
        memory__limit_in_bytes="2000000000\n",
        memory__usage_in_bytes="1900000000\n",
        memory__stat="inactive_file 7\ntotal_inactive_file 300000000\ntotal_active_file 0\n",
    )
    assert available_bytes(proc, cgroups) == 400_000_000


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path):
    proc, cgroups = machine(tmp_path, "0::/\n")
    put(cgroups, memory__max="1000\n", memory__current="3000\n")
    assert available_bytes(proc, cgroups) == 0
