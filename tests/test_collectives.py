"""The reader of compiled programs that the memory and communication benchmarks rest on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import hadamax as hx
from benchmarks.collectives import Collective, collectives, matching, of_kernels, totals
from benchmarks.hlo import Shape, matmul_flops, parse

# A loop of 5 trips without known_trip_count, started forms, a tuple, and a reduce-scatter as the TPU compiler fuses it.
HAND = """\
HloModule hand, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: f32[6,8]) -> f32[2,8] {
  %input = f32[6,8]{1,0:T(8,128)} parameter(0)
  %zero = f32[] constant(0)
  %padded = f32[8,8]{1,0:T(8,128)} pad(%input, %zero), padding=0_2x0_0
  %reduced = f32[8,8]{1,0:T(8,128)} all-reduce(%padded), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %place = u32[] partition-id()
  ROOT %own = f32[2,8]{1,0:T(8,128)} dynamic-slice(%reduced, %place, %place), dynamic_slice_sizes={2,8}
}

%body (loop: (s32[], /*index=1*/bf16[4,16])) -> (s32[], bf16[4,16]) {
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[4,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%loop), index=0
  %w = bf16[4,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%loop), index=1
  %two = s32[] constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %gather = (bf16[4,16]{1,0}, bf16[8,16]{1,0}, u32[], u32[]) all-gather-start(%w), replica_groups=[4,2]<=[8]
  %whole = bf16[8,16]{1,0} all-gather-done(%gather)
  %y = bf16[4,8]{1,0} dot(%w, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %out = (s32[], bf16[4,16]) tuple(%next, %w)
}

%condition (state: (s32[], bf16[4,16])) -> pred[] {
  %state = (s32[], bf16[4,16]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(10)
  ROOT %go = pred[] compare(%at, %end), direction=LT
}

ENTRY %main (a: bf16[4,16], b: f32[6,8]) -> f32[2,8] {
  %a = bf16[4,16]{1,0} parameter(0)
  %b = f32[6,8]{1,0} parameter(1)
  %start = s32[] constant(0)
  %first = (s32[], bf16[4,16]) tuple(%start, %a)
  %while.1 = (s32[], bf16[4,16]) while(%first), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %both = (bf16[4,16], f32[6,8]) all-reduce(%a, %b), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %sent = (f32[6,8], f32[6,8], u32[], u32[]) collective-permute-start(%b), source_target_pairs={{0,1},{1,0}}
  %received = f32[6,8] collective-permute-done(%sent)
  ROOT %own.1 = f32[2,8]{1,0} fusion(%received), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
MESH = {"fsdp": 4, "tensor": 2}


def test_bytes_and_counts_of_a_program_are_those_that_a_hand_counts():
    assert totals(collectives(HAND)) == {
        "all-gather": {"count": 5, "bytes": 5 * 8 * 16 * 2},
        "all-reduce": {"count": 1, "bytes": 4 * 16 * 2 + 6 * 8 * 4},
        "collective-permute": {"count": 1, "bytes": 6 * 8 * 4},
        "reduce-scatter": {"count": 1, "bytes": 6 * 8 * 4},
    }


def test_one_channel_is_one_gather_however_many_fusions_it_is_spread_over():
    start = next(line for line in HAND.splitlines() if "%gather" in line)
    part = start.replace("%gather", "%part").replace("replica_groups", "channel_id=7, replica_groups")
    spread = HAND.replace(start, f"{start.replace('replica_groups', 'channel_id=7, replica_groups')}\n{part}")
    assert totals(collectives(spread)) == totals(collectives(HAND))
    begun = spread.replace("  %first =", part.replace("%part", "%begun").replace("%w", "%a") + "\n  %first =")
    assert totals(collectives(begun))["all-gather"]["count"] == 1  # begun before the loop that goes on with it


def test_the_mesh_axes_that_a_collective_crosses_are_read_from_its_groups():
    axes = {one.kind: one.axes(MESH) for one in collectives(HAND)}
    assert axes == {
        "all-gather": {"tensor"},
        "all-reduce": {"fsdp", "tensor"},
        "collective-permute": {"fsdp", "tensor"},  # not read: taken for all
        "reduce-scatter": {"fsdp"},
    }


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("{{0,2,4,6},{1,3,5,7}}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[1,8]<=[8]", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_are_read_in_every_form_that_xla_writes(groups, expected):
    text = f"""ENTRY %main (x: f32[2]) -> f32[2] {{
  %x = f32[2]{{0}} parameter(0)
  ROOT %r = f32[2]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add
}}"""
    np.testing.assert_array_equal(collectives(text)[0].groups, expected)


def test_flops_count_a_loop_body_as_often_as_it_runs():
    assert matmul_flops(parse(HAND)) == 5 * 2 * 4 * 16 * 8
    assert matmul_flops(parse(HAND), loops=False) == 2 * 4 * 16 * 8


def test_a_loop_whose_trips_the_text_does_not_tell_is_named_and_counts_once():
    program = parse(HAND.replace("compare(%at, %end)", "compare(%at, %at)"))
    assert program.unknown == ["while.1"]
    assert totals(collectives(program))["all-gather"]["count"] == 1


def test_products_that_the_tpu_compiler_writes_as_convolutions_count_only_real_positions():
    # a batched product [3, 5, 7] x [3, 7, 11] whose batch axis is a dilated spatial one: 3 of the 3 x 3 pairs meet
    window = "window={size=3 stride=2 pad=2_2 lhs_dilate=3}, "
    text = f"""ENTRY %main (x: f32[3,5,7], y: f32[3,7,11]) -> f32[3,5,11] {{
  %x = f32[3,5,7]{{2,1,0}} parameter(0)
  %y = f32[3,7,11]{{2,1,0}} parameter(1)
  ROOT %c = f32[3,5,11]{{2,1,0}} convolution(%x, %y), {window}dim_labels=0bf_0io->0bf
}}"""
    assert matmul_flops(parse(text)) == 2 * 3 * 5 * 7 * 11
    plain = text.replace(window, "").replace("0bf_0io->0bf", "bf_io->bf")
    plain = plain.replace("[3,5,7]", "[5,7]").replace("[3,7,11]", "[7,11]").replace("[3,5,11]", "[5,11]")
    assert matmul_flops(parse(plain)) == 2 * 5 * 7 * 11


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module @jit_f {}")


def gradient(of_weights: bool) -> str:
    """A layer loop under fsdp 8 whose weight gradient is dense: 5 layers of 24 x 40 and back."""
    mesh = hx.make_mesh(fsdp=8)

    def loss(w, x):
        def layer(x, w):
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp")))
            return jnp.tanh(x @ w["up"]) @ w["down"], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0])

    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    w = {"up": array((5, 24, 40), P(None, "fsdp")), "down": array((5, 40, 24), P(None, "fsdp"))}
    x = array((1024, 24), P("fsdp"))  # with few rows XLA would rather gather these
    return str(jax.jit(jax.grad(loss, argnums=0 if of_weights else 1)).lower(w, x).compile().as_text())


def test_a_dense_gradient_and_the_gathers_of_weights_are_told_apart_in_a_compiled_program():
    kernels = of_kernels(collectives(gradient(True)), [(24, 40), (40, 24)], layers=5, shards=(1,))
    assert sum(one.bytes for one in kernels.reductions) == 5 * 2 * 24 * 40 * 4  # each layer's two, once
    assert sum(one.runs for one in kernels.gathers) >= 5 * 2
    assert kernels.rings == kernels.stacked == []
    frozen = of_kernels(collectives(gradient(False)), [(24, 40), (40, 24)], layers=5)
    assert frozen.reductions == [] and frozen.gathers


def test_pieces_of_kernels_that_go_round_in_permutes_stand_apart():
    kernels = of_kernels(collectives(HAND), [(6, 8)], layers=5)
    assert [one.name for one in kernels.rings] == ["sent"]
    assert [one.name for one in kernels.reductions] == ["both", "reduced"]


def test_parts_and_stacks_of_a_kernel_match_and_other_sizes_do_not():
    def one(*dims):
        return Collective("all-reduce", (Shape("f32", dims),), 1, None, "", "")

    assert matching([one(24, 40), one(1, 40, 24), one(24, 41), one(5, 24, 40)], [(24, 40)]) == [
        one(24, 40),
        one(1, 40, 24),
    ]
    assert matching([one(6, 40), one(6, 20), one(8, 40)], [(24, 40)], shards=(1, 2, 4)) == [one(6, 40), one(6, 20)]
    assert matching([one(5, 24, 40), one(24, 40)], [(24, 40)], stack=5) == [one(5, 24, 40)]
