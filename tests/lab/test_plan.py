"""Plans for TPU slices: what they count, and the published step compiled for 16 chips."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from ml_collections import FrozenConfigDict

import configs.base
from configs import quickstart
from launch.engine import circumstances, flops
from launch.lab import programs
from launch.lab.plan import (
  calibration,
  fid,
  hlo,
  operations,
  page,
  planning,
  schedule,
  slices,
  times,
)
from vavae_jax.common.errors import InputError


def test_a_record_names_the_command_without_a_path_of_the_machine(monkeypatch):
  spec = importlib.util.spec_from_loader("launch.lab.plan.__main__", None)
  monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
  monkeypatch.setattr(sys, "argv", ["/home/me/launch/lab/plan/__main__.py", "--all"])
  assert circumstances.circumstances()["command"] == "python -m launch.lab.plan --all"


def test_a_page_that_is_written_does_not_change_the_commit_of_its_numbers(tmp_path, monkeypatch):
  def git(*words):
    subprocess.run(
      ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x", *words], check=True
    )

  for name in ("docs", "launch"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").touch()
  git("init", "-q")
  git("add", ".")
  git("commit", "-qm", "all")
  monkeypatch.setattr(circumstances, "__file__", str(tmp_path / "launch" / "file"))
  clean = circumstances.commit()
  (tmp_path / "docs" / "file").write_text("numbers")
  assert circumstances.commit() == clean
  (tmp_path / "launch" / "file").write_text("code")
  assert circumstances.commit() == f"{clean}-dirty"


def test_products_and_convolutions_are_counted():
  def f(x, kernel, picture, filters):
    def body(carry, _):
      return jnp.tanh(carry @ kernel), None

    y, _ = jax.lax.scan(body, x, length=5)
    z = jax.lax.conv_general_dilated(
      picture, filters, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.sum() + z.sum()

  shapes = ((3, 7), (7, 7), (2, 8, 6, 4), (3, 3, 4, 5))
  traced = jax.make_jaxpr(f)(*(jnp.zeros(shape) for shape in shapes))
  assert flops.count(traced) == 2 * 5 * 3 * 7 * 7 + 2 * (2 * 4 * 3 * 5) * (3 * 3 * 4)


PROGRAM = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %gathered = bf16[8,16]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %more = f32[4]{0} fusion(%gathered), kind=kCustom, calls=%pieces
}

%pieces (p: f32[4]) -> f32[4] {
  %again = bf16[8,16]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %moved = (f32[2]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=3
  %both = ((f32[2]{0}, f32[1]{0}), (f32[16]{0}, f32[8]{0})) all-gather-start(%p, %q), channel_id=4
  %sums = (f32[3]{0}, f32[2]{0}) all-reduce-start(%p, %q), channel_id=5, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %loop = (s32[], bf16[8,16]) while(%t), condition=%condition, body=%body
  ROOT %total = (f32[4]{0}, bf16[6]{0}) all-reduce(%u, %v), channel_id=2, to_apply=%add
}
"""


def test_collectives_count_as_often_as_they_run():
  found = hlo.collectives(hlo.parse(PROGRAM))
  assert found == {
    "all-gather": hlo.Traffic(ops=2, runs=56, bytes=28 * (8 * 16 * 2 + 24 * 4)),
    "all-reduce": hlo.Traffic(ops=2, runs=29, bytes=4 * 4 + 6 * 2 + 28 * 5 * 4),
    "collective-permute": hlo.Traffic(ops=1, runs=28, bytes=28 * 4 * 4),
  }


KERNELS = """
HloModule step

%slice (p0: f32[28,8,16], p1: s32[]) -> f32[8,16] {
  %p0 = f32[28,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %other = f32[28,8,16]{2,1,0:T(8,128)} fusion(%p0), kind=kLoop, calls=%tiles
  %all = f32[28,8,16]{2,1,0} bitcast(%other)
  %one = f32[1,8,16]{2,1,0} dynamic-slice(%all, %p1, %p1, %p1), dynamic_slice_sizes={1,8,16}
  ROOT %flat = f32[8,16]{1,0} bitcast(%one)
}

%tiles (p0: f32[28,8,16]) -> f32[28,8,16] {
  %p0 = f32[28,8,16]{2,1,0} parameter(0)
  ROOT %tiled = f32[28,8,16]{2,1,0:T(8,128)} copy(%p0)
}

%update (p0: bf16[28,4], p1: bf16[1,4], p2: s32[]) -> bf16[28,4] {
  %p0 = bf16[28,4]{1,0} parameter(0)
  %p1 = bf16[1,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %set = bf16[28,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%called (p: f32[8,16]) -> bf16[1,4] {
  %p = f32[8,16]{1,0} parameter(0)
  %least = f32[8]{0} reduce(%p), dimensions={1}, to_apply=%add
  ROOT %new = bf16[1,4]{1,0} custom-call(%p), custom_call_target="f", metadata={op_name="f/g"}
}

%cheap (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %kept = f32[8]{0} slice(%p), slice={[0:8]}
}

%dear (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %copied = f32[8,16]{1,0} copy(%p)
}

%body (t: (s32[], f32[28,8,16], bf16[28,4])) -> (s32[], f32[28,8,16], bf16[28,4]) {
  %t = (s32[], f32[28,8,16]{2,1,0}, bf16[28,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = f32[28,8,16]{2,1,0} get-tuple-element(%t), index=1
  %kept = bf16[28,4]{1,0} get-tuple-element(%t), index=2
  %fusion.1 = f32[8,16]{1,0} fusion(%w, %i), kind=kLoop, calls=%slice, metadata={op_name="a"}
  %new = bf16[1,4]{1,0} call(%fusion.1), to_apply=%called
  %either = f32[8,16]{1,0} conditional(%i, %fusion.1, %fusion.1), true_computation=%cheap, \
false_computation=%dear
  %fusion.2 = bf16[28,4]{1,0} fusion(%kept, %new, %i), kind=kLoop, calls=%update
  ROOT %next = (s32[], f32[28,8,16]{2,1,0}, bf16[28,4]{1,0}) tuple(%i, %w, %fusion.2)
}

%condition (t: (s32[], f32[28,8,16], bf16[28,4])) -> pred[] {
  %limit = s32[] constant(3)
}

ENTRY %main (t: (s32[], f32[28,8,16], bf16[28,4])) -> (s32[], f32[28,8,16], bf16[28,4]) {
  %t = (s32[], f32[28,8,16]{2,1,0}, bf16[28,4]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[28,8,16]{2,1,0}, bf16[28,4]{1,0}) while(%t), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"28"}}
}
"""


def test_operations_move_the_slices_that_they_touch_as_often_as_they_run():
  read, copied, reduced, called, written = operations.of(hlo.parse(KERNELS))
  # The slice is read and written; the scalar index is read.
  one = operations.Operation("fusion.1", "a", "unnamed", 28, 2 * 8 * 16 * 4 + 4)
  assert read == one
  # The larger branch.
  both = 2 * 8 * 16 * 4
  assert copied == operations.Operation("copied", "copy", "layout copies", 28, both)
  assert (reduced.name, reduced.runs, reduced.bytes) == ("least", 28, 8 * 16 * 4 + 8 * 4)
  assert (called.name, called.source, called.bytes) == ("new", "g", 8 * 16 * 4 + 4 * 2)
  assert (written.name, written.runs, written.bytes) == ("fusion.2", 28, 2 * 4 * 2 + 4)
  alike = [dataclasses.replace(one, name=f"gemm.{i}", runs=2) for i in range(3)]
  other = dataclasses.replace(one, name="gemm.9.clone.1", runs=1, bytes=10**6)
  assert operations.joined([*alike, other]) == [
    dataclasses.replace(one, name="gemm", runs=1, bytes=10**6),
    dataclasses.replace(one, name="gemm", runs=6),
  ]


TPU = """
HloModule step

FileNames
1 "/home/me/lightningdit_jax/model.py"
2 "/home/me/lightningdit_jax/positions.py"
3 "/home/me/vavae_jax/teachers/vit.py"
4 "/env/optax/_src/transform.py"

FunctionNames
1 "Attention.__call__"
2 "attend"
3 "rotate"
4 "Mlp.__call__"
5 "update"

FileLocations
1 {file_name_id=1 function_name_id=1 line=280 end_line=280 column=1 end_column=2}
2 {file_name_id=1 function_name_id=2 line=187 end_line=187 column=1 end_column=2}
3 {file_name_id=2 function_name_id=3 line=47 end_line=47 column=1 end_column=2}
4 {file_name_id=3 function_name_id=4 line=9 end_line=9 column=1 end_column=2}
5 {file_name_id=4 function_name_id=5 line=3 end_line=3 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=4 parent_frame_id=1}
5 {file_location_id=5 parent_frame_id=1}

%logits (p0: bf16[3,2,5,72], p1: bf16[3,2,5,72]) -> f32[3,2,5,5] {
  %p0 = bf16[3,2,5,72]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[3,2,5,72]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = f32[3,2,5,5]{3,2,1,0:T(8,128)} convolution(%p0, %p1), \
window={size=3x2 stride=2x1 lhs_dilate=3x2}, dim_labels=01bf_01oi->01bf, \
metadata={op_name="jit(f)/transpose(jvp())/while/body/bkne,bkme->bknm/dot_general" stack_frame_id=2}
}

%set (p0: f32[7,16,100], p1: f32[16,100], p2: s32[]) -> f32[7,16,100] {
  %p0 = f32[7,16,100]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[16,100]{1,0:T(8,128)S(1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %one = f32[1,16,100]{2,1,0:T(8,128)} bitcast(%p1)
  ROOT %d = f32[7,16,100]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %one, %p2, %p2, %p2)
}

%outer (p0: f32[7,16,100], p1: f32[16,100], p2: s32[]) -> f32[7,16,100] {
  %p0 = f32[7,16,100]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[16,100]{1,0:T(8,128)S(1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  ROOT %within = f32[7,16,100]{2,1,0:T(8,128)} fusion(%p0, %p1, %p2), kind=kLoop, calls=%set
}

%condition (t: (s32[], s32[])) -> pred[] {
  %t = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %n = s32[]{:T(128)} get-tuple-element(%t), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (t: (s32[], s32[])) -> (s32[], s32[]) {
  %t = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %q = bf16[3,2,5,72]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %stack = f32[7,16,100]{2,1,0:T(8,128)} get-tuple-element(%t), index=3
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %copy-start.1 = (bf16[3,2,5,72]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[3,2,5,72]{3,2,1,0:T(8,128)\
(2,1)}, u32[]{:S(2)}) copy-start(%q)
  %copy-done.1 = bf16[3,2,5,72]{3,2,1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %fusion.1 = f32[3,2,5,5]{3,2,1,0:T(8,128)} fusion(%q, %copy-done.1), kind=kOutput, \
calls=%logits, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %turned = f32[16,100]{1,0:T(8,128)S(1)} fusion(%fusion.1), kind=kLoop, calls=%x, \
metadata={op_name="jit(f)/jvp()/while/body/slice" stack_frame_id=3}, \
backend_config={"window_config":{"estimated_cycles":"50"}}
  %kept = f32[7,16,100]{2,1,0:T(8,128)} fusion(%stack, %turned, %i), kind=kLoop, calls=%outer, \
metadata={op_name="jit(f)/jvp()/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice" \
stack_frame_id=1}, backend_config={"window_config":{"estimated_cycles":"30"}}
  %kernel.7 = bf16[3,2,5,72]{3,2,1,0:T(8,128)(2,1)} custom-call(%q), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jvp()/while/body/pallas_call" \
stack_frame_id=2}, backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"640",\
"transcendentals":"3","bytes_accessed":"8000"}}}
  ROOT %next = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%i, %i)
}

%x (p: f32[3,2,5,5]) -> f32[16,100] {
  %p = f32[3,2,5,5]{3,2,1,0:T(8,128)} parameter(0)
  ROOT %y = f32[16,100]{1,0:T(8,128)} slice(%p)
}

ENTRY %main (p0: f32[7,16,100]) -> f32[7,16,100] {
  %p0 = f32[7,16,100]{2,1,0:T(8,128)} parameter(0)
  %limit = s32[]{:T(128)} constant(28)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%zero, %limit)
  %loop = (s32[]{:T(128)}, s32[]{:T(128)}) while(%start), condition=%condition, body=%body
  %space = f32[7,16,100]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %moved = f32[7,16,100]{1,2,0:T(8,128)} copy(%p0), metadata={op_name="jit(f)/jvp()/transpose" \
stack_frame_id=1}, backend_config={"window_config":{"estimated_cycles":"9"}}
  %looked = f32[7,16,100]{2,1,0:T(8,128)} add(%p0, %p0), metadata={op_name="jit(f)/add" \
stack_frame_id=4}
  ROOT %new = f32[7,16,100]{2,1,0:T(8,128)} multiply(%p0, %p0), metadata={op_name="jit(f)/mul" \
stack_frame_id=5}
}
"""


@pytest.fixture
def of_tpu():
  return {x.name: x for x in operations.of(hlo.parse(TPU.replace("\\\n", "")))}


def test_operations_of_a_tpu_are_grouped_by_what_made_them(of_tpu):
  assert {name: x.group for name, x in of_tpu.items()} == {
    "fusion.1": "attention",
    "turned": "RoPE",
    "kept": "scan stacks",
    "kernel.7": "attention",
    "copy-start.1": "copies beside other work",
    "moved": "layout copies",
    "looked": "teacher: other elementwise",
    "new": "optimizer",
  }
  assert of_tpu["fusion.1"].source == "attend:187 dot_general, backward"
  assert of_tpu["moved"].source == "Attention.__call__:280 transpose"


def test_a_loop_counts_as_often_as_a_constant_from_outside_says(of_tpu):
  assert {x.runs for x in of_tpu.values() if x.name not in ("moved", "looked", "new")} == {28}


def test_a_product_with_batch_axes_counts_each_batch_once(of_tpu):
  assert of_tpu["fusion.1"].flops == 2 * 3 * 2 * 5 * 5 * 72


def test_bytes_count_tiles_and_slices_and_nothing_in_vmem(of_tpu):
  queries, logits = 3 * 2 * 8 * 128 * 2, 3 * 2 * 8 * 128 * 4  # 5 x 72 lie in tiles of 8 x 128
  layer = 16 * 128 * 4
  assert of_tpu["copy-start.1"].bytes == queries  # to VMEM
  assert of_tpu["fusion.1"].bytes == queries + logits  # the other operand is in VMEM
  assert of_tpu["turned"].bytes == layer  # a slice
  assert of_tpu["kept"].bytes == layer + 4  # of seven layers, in a fusion within one; and the index
  assert of_tpu["looked"].bytes == 3 * 7 * layer


def test_a_kernel_of_pallas_counts_as_it_declares_and_by_its_schedule(of_tpu):
  kernel = of_tpu["kernel.7"]
  assert (kernel.bytes, kernel.flops, kernel.cycles, kernel.pallas) == (8000, 640, None, True)
  scheduled = {"kernel bf16[3, 2, 5, 72]": 5000, "fusion f32[3, 2, 5, 5]": 1}
  found = operations.of(hlo.parse(TPU.replace("\\\n", "")), scheduled)
  cycles = {x.name: x.cycles for x in found}
  assert (cycles["kernel.7"], cycles["fusion.1"]) == (5000, 1000)


def test_step_times_stand_side_by_side(of_tpu):
  chip = times.Chip(flops=1e9, bandwidth=1e9, clock=1e6, links=1e6)
  traffic = {"all-gather": hlo.Traffic(1, 1, 1000), "all-reduce": hlo.Traffic(1, 1, 1000)}
  kernel, product = of_tpu["kernel.7"], of_tpu["fusion.1"]
  found = times.times([kernel, product], traffic, chip, 1e6)
  assert found.compiler == pytest.approx(28 * 1000 / 1e6)
  assert found.kernels == pytest.approx(28 * 8000 / 0.8e9)
  assert found.network == pytest.approx(3000 / 1e6)  # what is reduced goes around twice
  slow = max(product.bytes / 0.8e9, product.flops / 1e9)
  assert found.roofline == pytest.approx(28 * slow + found.kernels)
  assert found.ideal == pytest.approx(1e-3)
  assert found.estimate == pytest.approx(found.compiler + found.kernels + found.network)
  slower = dataclasses.replace(kernel, cycles=9000)
  assert times.times([slower], {}, chip, 0).kernels == pytest.approx(28 * 9000 / 1e6)
  network, part = times.by_source([kernel, product], chip, 1e4)
  assert (network.group, network.seconds) == ("collectives", 1e4)
  assert part.seconds == pytest.approx(found.compiler + found.kernels)
  assert (part.group, part.runs, part.flops) == ("attention", 56, 28 * (640 + product.flops))


def test_schedules_are_of_the_kernels_wherever_they_are_in_a_program(tmp_path):
  def copy(given, to):
    to[...] = given[...]

  def f(x):
    call = pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="copied")
    return jax.lax.scan(lambda y, _: (jax.checkpoint(call)(y) + 1, None), x, length=3)[0]

  (kernel,) = schedule.kernels_of(jax.make_jaxpr(f)(jnp.zeros((8, 128))))
  assert kernel.outvars[0].aval.shape == (8, 128)


BUNDLES = """
= control target key start
LB: loop body
     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: bf16[64,256,3456]] /* the window
shape is whole */ }
   0x1   :  { %s7_s9 = smov 0 }
   0x2 LB: > { %s8_s1 = sadd.s32 1, %s9_s2 /* copy */  ;;  %s9_s2 = sphi %s7_s9, %s13_s4 }
   0x3   : > { %12 = sst [smem:[#allocation24_spill]] %s8_s1 }
   0x4 LB: >> { %s5_s3 = sadd.s32 2, %s6_s3  ;;  %s6_s3 = sphi %s7_s9, %s5_s3 }
   0x5   : >> { %p2_p1 = scmp.ge.s32.totalorder %s5_s3, 16 /* loop exit test */ }
   0x6   : > { %27 = sbr.rel (!%p2_p1) target = $region108 }
   0x7   : >> { %62 = vst [vmem:[%s12_s6] sm:$0xff] %v61_v2 }
   0x8 LB: >> { %s5_s4 = sadd.s32 1, %s6_s4 }
   0x9   : >> { %p2_p2 = scmp.ge.s32.totalorder %s5_s4, 5 /* loop exit test */ }
   0xa PF: > { %s13_s4 = sld [smem:[#allocation24_spill]] }
   0xb   : > { %p19_p3 = scmp.ge.s32.totalorder %s13_s4, 66 /* loop exit test */  ;;  %13 = x }
   0xc   :  {} /* exit bundle: %attention_forward.1 = custom-call(%arrays_0_.1) */
"""


def test_the_cycles_of_a_schedule_are_its_words_as_often_as_their_loops_run(tmp_path):
  cycles = 3 + 64 * (5 + 8 * 3 + 5 * 2)
  assert schedule.cycles_of(BUNDLES) == cycles
  with pytest.raises(ValueError, match="how many rounds"):
    schedule.cycles_of(BUNDLES.replace("loop exit test", "test"))
  (tmp_path / "179-kernel.7-72-final_bundles.txt").write_text(BUNDLES)
  for name in ("71-schedule-analysis_final_bundles", "51-post-ra"):
    (tmp_path / f"179-kernel.7-{name}.txt").write_text("Schedule analysis:")
  assert schedule.read(tmp_path) == {"kernel.7": cycles}
  assert schedule.read(tmp_path) == {}


def test_a_gpu_takes_at_least_what_its_limits_say():
  chip = times.Chip(flops=1e9, bandwidth=1e9)
  found = times.times(operations.of(hlo.parse(KERNELS)), {}, chip, 1e6)
  assert found.compiler == found.network == 0
  assert found.estimate == max(found.roofline, found.ideal) > 0


def test_sampling_is_planned_with_the_batch_of_each_device():
  config = quickstart.diffusion(tiny=True)
  config.sample.batch_size = 6
  eight = jax.sharding.AbstractMesh((4, 2), ("data", "fsdp"))
  program = programs.of(FrozenConfigDict(config), eight, "sample", 1_000)
  assert program.images == len(program.arguments[1]) == 48
  tried = planning.remedies(FrozenConfigDict(config), "sample", 16, tpu=True)
  assert [*tried] == [{"sample.batch_size": 3}]


@pytest.mark.parametrize("tpu", [True, False])
def test_remedies_go_from_the_cheapest_and_divide_the_batch(tpu):
  config = configs.base.diffusion()
  config.batch_size = 128
  tried = list(planning.remedies(FrozenConfigDict(config), "train", 16, tpu))
  assert tried[0] == {"mesh.data": 1, "mesh.fsdp": -1}
  assert [x["accumulate_steps"] for x in tried if "accumulate_steps" in x] == [2, 2]
  policies = [x["model.remat_policy"] for x in tried if "model.remat_policy" in x]
  # TPUs keep less than the others do without being asked.
  assert list(dict.fromkeys(policies)) == (["full"] if tpu else ["dots", "dense", "full"])
  assert tried[-1]["model.remat_policy"] == "full"


@pytest.mark.parametrize("topology", ["v5e", "v9:4x4", "v5e:4by4", "4x4", "h200", "h200:2x2x2"])
def test_a_slice_that_is_none_is_refused(topology):
  with pytest.raises(InputError, match=f"--topology is '{topology}'.*v5e:4x4.*h200:8"):
    slices.make_mesh(topology)


def test_a_program_of_another_task_is_refused(command):
  done = command("launch.lab.plan", "--config=configs/vavae_f16d32.py", "--what=sample")
  assert done.returncode == 2
  assert "--what=sample does not apply to a tokenizer; choose one of train, encode" in done.stderr


def test_an_error_says_what_to_install_without_the_plugin():
  if importlib.util.find_spec("jax_cuda13_plugin"):
    pytest.skip("the plugin is here")
  with pytest.raises(InputError, match=r"pip install -e '\.\[cuda\]'"):
    slices.make_mesh("h200:8")


@pytest.mark.cuda_aot
@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_the_published_step_is_compiled_for_eight_gpus(command, tmp_path, attention):
  done = command(
    *("launch.lab.plan", "--config=configs/lightningdit.py:XL/1", "--topology=h200:8"),
    *("--config.batch_size=256", f"--config.model.attention={attention}"),
    "--config.model.scan_unroll=1",  # 28 blocks in a row take minutes to compile
    f"--output={tmp_path / 'plan.json'}",
    JAX_DISABLE_MOST_OPTIMIZATIONS="0",
  )
  assert done.returncode == 0, done.stderr
  (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
  assert plan["fits"]
  names = {one["name"] for one in plan["operations"]}
  assert ("dot_product_attention_bwd" in names) == (attention == "cudnn")
  # The work of the products, whichever kernel does them; cuDNN computes the logits again.
  assert plan["flops"] == pytest.approx(32 * 0.712e12, rel=0.03)
  # Gradients are summed, in the dtype of the products, and nothing is gathered.
  assert plan["traffic"]["all-reduce"]["bytes"] == pytest.approx(2 * 675e6, rel=0.01)
  assert "all-gather" not in plan["traffic"]


@pytest.mark.cuda_aot
def test_a_gpu_moves_no_more_bytes_than_the_page_of_performance_says(command, tmp_path):
  done = command(
    *("launch.lab.plan", "--config=configs/lightningdit.py:XL/1", "--topology=h200:1"),
    *("--config.batch_size=64", "--config.model.attention=xla", "--config.model.scan_unroll=1"),
    f"--output={tmp_path / 'plan.json'}",
    JAX_DISABLE_MOST_OPTIMIZATIONS="0",
  )
  assert done.returncode == 0, done.stderr
  (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
  # 409 GiB at afb3be1; a fusion that is lost in the blocks costs more than a hundredth.
  assert plan["moved"] < 1.01 * 409 * 2**30


SECONDS = {"compiler": 0.2, "kernels": 0.04, "network": 0.01, "roofline": 0.1, "ideal": 0.05}


def _planned(topology, **changes):
  sources = [{"group": "attention", "seconds": 0.1}, {"group": "products", "seconds": 0.15}]
  return {
    "fits": topology != "v4:2x2x1",
    "settings": {"mesh.fsdp": -1},
    "needed": 2.0 * 2**30,
    "available": 2**34,
    "images_per_second": 4096.0,
    "hours": 1234.5,
    "sources": sources,
    "seconds": None if topology == "v4:2x2x1" else SECONDS,
  } | changes


@pytest.mark.parametrize(
  ("code", "printed", "told"),
  [
    (2, "error: config.x is 1.", "config.x is 1."),
    (
      1,
      "  File\nxla.SomeError: MEMORY: of vmem\nSee https://a.b",
      "xla.SomeError: MEMORY: of vmem",
    ),
    (-9, "", "killed, as is done for want of memory"),
    (-11, "", "the compiler crashed (signal 11)"),
  ],
)
def test_a_plan_that_failed_says_why(code, printed, told, monkeypatch):
  done = subprocess.CompletedProcess([], code, "", printed)
  monkeypatch.setattr(page.subprocess, "run", lambda *_, **__: done)
  row = page._apart("a.py", "train", "v5e:4x4")
  assert row["error"] == told
  assert bool(row.get("again")) == (code in (2, -9))  # for want of something on this machine


def test_the_page_of_plans_continues_a_file_and_keeps_its_rows(monkeypatch, tmp_path):
  made = []

  def apart(spec, what, topology):
    made.append((spec, what, topology))
    row = {"commit": commit}
    if what == "encode":
      return row | {"error": "the compiler crashed (signal 11)"} | again
    if what == "published":
      held = calibration.Held("A run", topology, "https://a.b", 300.0, 200.0, 400.0)
      return row | {"plans": [dataclasses.asdict(held)]}
    if what == "fid50k":
      parts = ("sample", "decode", "features", "fid50k")
      return row | {"plans": [_planned(topology, what=part) for part in parts]}
    return row | {"plans": [_planned(topology, fits=False, seconds=None), _planned(topology)]}

  commit, again = "abc1234", {}

  monkeypatch.setattr(page, "_apart", apart)
  output, markdown = tmp_path / "plans.json", tmp_path / "tpu.md"
  page.make(output, markdown, workers=3)
  assert sorted(made) == sorted(page.wanted())
  assert [row["topology"] for row in json.loads(output.read_text())["rows"]] == [
    topology for _, _, topology in page.wanted()
  ]
  lines = markdown.read_text().splitlines()
  cells = "mesh.fsdp=-1 | 2.0 | 16.0 | 250.0 | 100.0 | 50.0 | 20% | 4,096 | 1,234.50 |"
  for what in ("train", "sample", "fid50k"):
    assert f"| lightningdit_xl_64ep | {what} | v5e:4x4 | {cells}" in lines
  empty = " |" * 7
  cells = f"no setting that was tried fits | 2.0 | 16.0{empty}".replace("|  |", "| |")
  assert f"| lightningdit_xl_64ep | train | v4:2x2x1 | {cells}" in [
    x.replace("  ", " ") for x in lines
  ]
  assert any(
    "| vavae_f16d32 | encode | v4:2x2x4 | the compiler crashed (signal 11) |" in x for x in lines
  )
  assert (
    "| products | 150.0 | 150.0 | 150.0 | 150.0 | 150.0 | 150.0 | 150.0 | 150.0 | 150.0 |" in lines
  )
  assert "| collectives |" + 9 * " 10.0 |" in lines
  assert "| [A run](https://a.b) | v6e:16x16 | 300 TFLOP/s | 200 | 1.50 | 400 | 0.75 |" in lines
  assert [x for x in lines if x.startswith("Compiled with") and ", commit abc1234, " in x]
  content = json.loads(output.read_text())
  # An older file says of all rows with what jax they were made.
  rows = [{name: x for name, x in row.items() if name != "jax"} for row in content["rows"][1:]]
  output.write_text(json.dumps(content | {"rows": rows, "jax": "0.1"}))
  markdown.write_text(markdown.read_text().replace("# TPU slices", "# By hand"))
  made.clear()
  commit = "def5678"
  page.make(output, markdown)
  assert made == [page.wanted()[0]]
  assert markdown.read_text().startswith("# By hand")
  lines = markdown.read_text().splitlines()
  jax = json.loads(output.read_text())["jax"]
  assert [
    x for x in lines if x.startswith(f"Compiled with jax 0.1, {jax}, each row at the commit ")
  ]
  first, other = (f"| lightningdit_xl_64ep | train | {pod} |" for pod in ("v5e:4x4", "v6e:4x4"))
  commits = [x.split(" | ")[-1] for x in lines if x.startswith((first, other, "| [A run]"))]
  assert commits == ["def5678 |", *["abc1234 |"] * 4]
  again = {"again": True}
  encoded = [row for row in json.loads(output.read_text())["rows"] if row["what"] == "encode"]
  content = json.loads(output.read_text())
  for row in content["rows"]:
    row |= again if row["what"] == "encode" else {}
  output.write_text(json.dumps(content))
  made.clear()
  page.make(output, markdown)
  assert len(made) == len(encoded)


def part_of_fid(images, needed, hours):
  seconds = times.Times(1.0, 0.5, 0.25, 0.75, 0.1)
  return planning.Plan(
    *({}, images, "8 x 1", True, needed, 100.0, {}, 10.0, 10.0, 1.0),
    **{"seconds": seconds, "hours": hours, "images_per_second": images / seconds.estimate},
  )


def test_for_a_fid_as_many_images_are_decoded_at_once_as_are_sampled(monkeypatch):
  asked = {}

  def plans(config, topology, what, **options):
    asked[what] = config.get("sample", {}).get("batch_size"), options.get("coded")
    return iter([part_of_fid(images, 1.0, 1.0) for images in (512, 256)])

  monkeypatch.setattr(fid, "plans", plans)
  config = configs.base.diffusion()
  config.sample.batch_size = 48
  fid.plans_of(config, "v6e:2x4", 1_000)
  assert asked == {"sample": (48, None), "decode": (None, 256), "features": (None, 0)}


def test_programs_for_a_fid_run_in_turn():
  found = {"sample": part_of_fid(256, 50.0, 3.0), "decode": part_of_fid(512, 70.0, 1.0)}
  whole = fid.together(found)
  assert (whole.needed, whole.hours, whole.flops) == (70.0, 4.0, 15.0)
  assert whole.seconds == times.Times(1.5, 0.75, 0.375, 1.125, 0.15000000000000002)
  assert whole.images_per_second == pytest.approx(256 / (1.75 * 1.5))
  found["decode"].fits = False
  assert fid.together(found).seconds is None


@pytest.mark.tpu_aot
def test_the_published_step_fits_16_chips_without_moving_activations(command, tmp_path):
  done = command(
    *("launch.lab.plan", "--config=configs/lightningdit_xl_64ep.py", "--topology=v5e:4x4"),
    *("--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.model.use_checkpoint"),
    f"--output={tmp_path / 'plan.json'}",
    JAX_DISABLE_MOST_OPTIMIZATIONS="0",
    # A quarter of the time, and what is asserted of the program is the same.
    JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1.0",
    JAX_MEMORY_FITTING_EFFORT="-1.0",
  )
  assert done.returncode == 0, done.stderr
  (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
  assert plan["fits"]
  assert plan["needed"] < 8 * 2**30 < plan["available"]
  # Nothing but weights gathered, in bfloat16 and twice, and gradients summed.
  assert set(plan["traffic"]) == {"all-gather", "all-reduce"}
  parameters = 675e6
  assert plan["traffic"]["all-gather"]["bytes"] == pytest.approx(2 * 2 * parameters, rel=0.05)
  # The forward pass is computed again, a third of the model's work.
  assert plan["computed"] == pytest.approx(4 / 3 * plan["flops"], rel=0.02)
  assert sum(plan["parts"].values()) == pytest.approx(plan["needed"])
  # All the products of the trace are in the compiled program, where loops hide nothing.
  sources = {part["group"]: part for part in plan["sources"]}
  assert sum(x["flops"] for x in sources.values()) == pytest.approx(plan["computed"], rel=0.05)
  assert {"attention", "products", "optimizer", "scan stacks", "collectives"} <= {*sources}
  seconds = plan["seconds"]
  assert seconds["ideal"] < seconds["roofline"] < seconds["compiler"]
  # The compiler moves bytes at 0.4 of the bandwidth or, of float32, faster; the roofline at 0.8.
  # Products are slower by an order at the least effort, and say nothing.
  names = ("norm and modulation", "biases", "other elementwise", "scan stacks", "optimizer")
  moving = [sum(sources[name][kind] for name in names) for kind in ("seconds", "roofline")]
  assert 2 < moving[0] / moving[1] < 4


@pytest.mark.tpu_aot
@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize(("reduce_dtype", "dtype"), [("compute", "bf16"), ("float32", "f32")])
def test_devices_add_up_gradients_in_the_dtype_of_the_key(described, fsdp, reduce_dtype, dtype):
  config = configs.base.diffusion()
  config.batch_size, config.mesh = 16, {"data": -1, "fsdp": fsdp}
  config.model.update(hidden_size=128, num_heads=2, depth=2, input_size=4, num_classes=5)
  config.model.reduce_dtype = reduce_dtype
  config = FrozenConfigDict(config)
  devices = described("v5e:2x2", config.mesh.data, config.mesh.fsdp)
  traced = programs.traced(programs.of(config, devices, "train", 16), devices)
  with jax.set_mesh(devices):
    program = hlo.parse(traced.lower().compile().as_text())
  all_of = [x for body in program.bodies.values() for x in body.values()]
  found = [x for x in all_of if x.code == "all-reduce"]
  # Those of matrices.
  large = [a for x in found for a in x.arrays if math.prod(a.dims) >= 128 * 256]
  assert len(large) >= 3
  assert {a.dtype for a in large} == {dtype}
  gathered = [x for x in all_of if "all-gather" in x.code]
  assert {a.dtype for x in gathered for a in x.arrays if len(a.dims) > 1} <= {"bf16"}
  assert bool(gathered) == (fsdp > 1)


@pytest.mark.tpu_aot
def test_a_plan_says_that_a_program_does_not_fit(command):
  done = command(
    *("launch.lab.plan", "--config=configs/lightningdit_xl_64ep.py", "--topology=v5e:2x4"),
    JAX_DISABLE_MOST_OPTIMIZATIONS="0",
  )
  assert done.returncode == 0, done.stderr
  assert "DOES NOT FIT" in done.stdout
  assert "--search looks for settings that fit" in done.stdout
