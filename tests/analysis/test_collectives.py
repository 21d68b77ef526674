"""Collectives of compiled programs: real ones, and what other compilers write."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.analysis.collectives import (
    Collective,
    Traffic,
    read_collectives,
    sum_up,
)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh, function, *arrays):
    """Compiles for arrays given as (shape, spec) or (shape, spec, dtype)."""
    abstract = [
        jax.ShapeDtypeStruct(
            shape, *(dtype or [jnp.float32]), sharding=NamedSharding(mesh, P(*spec))
        )
        for shape, spec, *dtype in arrays
    ]
    return jax.jit(function).lower(*abstract).compile()


def test_a_mean_over_a_sharded_axis_is_one_sum_over_its_devices(mesh):
    program = compiled(mesh, lambda x: x.mean(0), ((32, 6), ("a",)))
    (found,) = read_collectives(program)
    assert (found.kind, found.arrays, found.bytes) == ("all-reduce", 1, 4 * 6)
    assert (found.devices, found.times) == (4, 1)
    assert found.source.endswith("reduce_sum")
    # A ring sends every number twice, but for one part in four.
    assert found.sent_bytes == 2 * 24 * 3 / 4


def test_sums_that_are_joined_are_counted_one_by_one(mesh):
    program = compiled(
        mesh, lambda x, y: (x.sum(0), y.sum(0)), ((8, 6), ("a",)), ((8, 10), ("a",))
    )
    found = sum_up(read_collectives(program))
    assert found["all-reduce"].arrays == 2
    assert found["all-reduce"].bytes == 4 * 16


def test_a_loop_counts_as_often_as_it_goes_round(mesh):
    def function(x):
        def body(carry, _):
            inner = jax.lax.fori_loop(0, 3, lambda i, c: c + (x * c).sum(), carry)
            return inner, None

        return jax.lax.scan(body, jnp.float32(0), length=5)[0]

    (found,) = read_collectives(compiled(mesh, function, ((32,), ("a",))))
    assert (found.kind, found.times) == ("all-reduce", 15)
    assert sum_up([found]) == {
        "all-reduce": Traffic(
            instructions=15, arrays=15, bytes=15 * 4, sent_bytes=15 * 6.0
        )
    }


def test_a_loop_of_unknown_length_is_refused(mesh):
    def function(x):
        return jax.lax.while_loop(lambda v: v.sum() < 10, lambda v: v * 2, x)

    program = compiled(mesh, function, ((32,), ("a",)))
    with pytest.raises(ValueError, match="a loop of unknown length runs all-reduce"):
        read_collectives(program)


def test_branches_count_as_if_all_were_taken(mesh):
    def function(x, flag):
        return jax.lax.cond(flag, lambda v: v.sum(), lambda v: v.max(), x)

    found = read_collectives(
        compiled(mesh, function, ((32,), ("a",)), ((), (), jnp.bool_))
    )
    assert [one.times for one in found] == [1, 1]


def test_the_kinds_that_shard_map_asks_for(mesh):
    def local(x):
        gathered = jax.lax.all_gather(x, "a", axis=0, tiled=True)  # [32, 8]
        scattered = jax.lax.psum_scatter(x, "a", scatter_dimension=1, tiled=True)
        turned = jax.lax.all_to_all(x, "b", 0, 1, tiled=True)
        passed = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
        return gathered.sum(), scattered, turned, passed

    program = compiled(
        mesh,
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=P("a", "b"),
            out_specs=(P(), P("a", "b"), P("a", "b"), P("a", "b")),
            check_vma=False,
        ),
        ((32, 16), ("a", "b"), jnp.float16),
    )
    found = {one.kind: one for one in read_collectives(program)}
    part = 2 * 8 * 8  # of a device, in bytes
    assert {kind: (one.bytes, one.devices) for kind, one in found.items()} == {
        "all-gather": (4 * part, 4),
        "reduce-scatter": (part, 4),
        "all-to-all": (part, 2),
        "collective-permute": (part, 2),
    }
    assert all(one.arrays == 1 for one in found.values())
    assert found["all-gather"].sent_bytes == 3 * part
    assert found["collective-permute"].sent_bytes == part


def test_a_program_of_one_device_sends_nothing():
    program = jax.jit(lambda x: x.sum()).lower(jnp.zeros(4)).compile()
    assert read_collectives(program) == ()
    assert sum_up(()) == {}


# As compilers for GPUs and TPUs write them: started and awaited, groups in other forms.
GPU = """HloModule step, is_scheduled=true, replica_count=1, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scatter (p: bf16[32,4]) -> bf16[2,4] {
  %p = bf16[32,4]{1,0} parameter(0)
  ROOT %rs = bf16[2,4]{1,0} reduce-scatter(%p), replica_groups={}, to_apply=%add
}

ENTRY %main (x: f32[2,3], y: bf16[32,4]) -> f32[8,3] {
  %x = f32[2,3]{1,0} parameter(0)
  %y = bf16[32,4]{1,0} parameter(1)
  %ag = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%x), dimensions={0}, \
replica_groups=[4,4]<=[2,8]T(1,0)
  %done = f32[8,3]{1,0} all-gather-done(%ag)
  %ar = (f32[2,3]{1,0}, pred[5]{0}) all-reduce-start(%x, %f), \
replica_groups=mesh['u'=2,'v'=8] {'u','v':(2)4}, to_apply=%add, \
metadata={op_name="jit(step)/sum"}
  %cp = (f32[2,3]{1,0}, f32[2,3]{1,0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %rs-start = ((bf16[32,4]{1,0}), bf16[2,4]{1,0}) async-start(%y), calls=%scatter
  ROOT %copy = f32[8,3]{1,0} copy(%done)
}
""".replace("\\\n", "")


def test_started_collectives_and_other_forms_of_groups_are_read():
    found = {one.kind: one for one in read_collectives(GPU)}
    expected = {
        "all-gather": (1, 4 * 24, 4),
        "all-reduce": (2, 4 * 6 + 5, 8),
        "collective-permute": (1, 4 * 6, 2),
        "reduce-scatter": (1, 2 * 128, 16),
    }
    for kind, (arrays, size, devices) in expected.items():
        one = found[kind]
        assert (one.arrays, one.bytes, one.devices) == (arrays, size, devices), kind
    assert found["all-reduce"].source == "jit(step)/sum"


def test_sums_are_by_kind():
    one = Collective(
        kind="all-gather", arrays=2, bytes=10, devices=5, times=3, source=""
    )
    assert sum_up([one, one])["all-gather"] == Traffic(
        instructions=6, arrays=12, bytes=60, sent_bytes=48.0
    )


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        read_collectives("module @jit_f {}")
