"""PyTorch files are read as PyTorch reads them, and never obeyed."""

from __future__ import annotations

import argparse
import copy
import datetime
import pickle
import re
import tracemalloc
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import PurePosixPath

import ml_dtypes
import numpy as np
import pytest

from tests import cases
from vavae_jax.common.errors import InputError
from vavae_jax.weights.state_dicts import read_state_dict
from vavae_jax.weights.torch_files import read_torch_file
from vavae_jax.weights.torch_pickles import StandIn
from vavae_jax.weights.torch_writer import write_torch_file

FORMATS = cases.FOLDER / "formats"
LAYOUTS = ("torch_zip.pt", "torch_legacy.pt")


def expected() -> dict:
  """What formats/torch_files.json describes."""
  base = np.arange(24, dtype=np.float32).reshape(4, 6)
  return {
    "float32": base,
    "transposed": base.T,
    "window": base[1:3, ::2],
    "expanded": np.ones((2, 3), np.float32),
    "bfloat16": np.array([1.5, -2, 3.140625], ml_dtypes.bfloat16),
    "float16": np.array([[0.5, 65504]], np.float16),
    "float64": np.array([1 / 3]),
    "int64": np.arange(2, 7),
    "int32": np.array([-1, 2], np.int32),
    "uint8": np.array([0, 255], np.uint8),
    "bool": np.array([True, False]),
    "complex64": np.array([1 + 2j], np.complex64),
    "scalar": np.array(2.5, np.float32),
    "empty": np.empty((0, 3), np.float32),
    "parameter": np.array([1, 2], np.float32),
  }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors(layout):
  content = read_torch_file(FORMATS / layout)
  for name, array in expected().items():
    assert content[name].dtype == array.dtype, name
    np.testing.assert_array_equal(content[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nested_values(layout):
  content = read_torch_file(FORMATS / layout)
  *plain, (zeros,) = content["nested"]["list"]
  assert plain == [1, 2.5, "text", None]
  np.testing.assert_array_equal(zeros, np.zeros(2, np.float32), strict=True)
  assert list(content["norm"])[-1] == "num_batches_tracked"
  np.testing.assert_array_equal(content["norm"]["running_var"], np.ones(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_share_memory_and_are_read_only(layout):
  content = read_torch_file(FORMATS / layout)
  assert np.shares_memory(content["float32"], content["transposed"])
  with pytest.raises(ValueError, match="read-only"):
    content["float32"][0, 0] = 1


def test_hostile_pickle_is_refused_by_name():
  with pytest.raises(InputError, match=r"asks for posix\.system"):
    read_torch_file(FORMATS / "hostile_pickle.pt")


def test_truncated_file_is_named_so():
  with pytest.raises(InputError, match=r"truncated\.pt is truncated"):
    read_torch_file(FORMATS / "truncated.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_truncation_is_an_input_error(layout, tmp_path):
  whole = (FORMATS / layout).read_bytes()
  path = tmp_path / "cut.pt"
  for size in range(0, len(whole), 37):
    path.write_bytes(whole[:size])
    with pytest.raises(InputError):
      read_torch_file(path)


def test_flipped_bit_is_found(tmp_path):
  whole = bytearray((FORMATS / "torch_zip.pt").read_bytes())
  values = np.arange(24, dtype="<f4").tobytes()
  whole[whole.index(values) + 10] ^= 1
  (tmp_path / "flipped.pt").write_bytes(whole)
  with pytest.raises(InputError, match="damaged"):
    read_torch_file(tmp_path / "flipped.pt")


def fragment(value) -> bytes:
  """The opcodes that put a plain value on the unpickler's stack."""
  return pickle.dumps(value, 0)[:-1]


def tensor(count, offset, shape, stride) -> bytes:
  """The opcodes of a float32 tensor whose storage has the key "0"."""
  storage = b"(" + fragment("storage") + b"ctorch\nFloatStorage\n" + fragment("0")
  storage += fragment("cpu") + fragment(count) + b"tQ"
  view = fragment(offset) + fragment(shape) + fragment(stride) + fragment(False)
  return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + fragment({}) + b"tR"


def write(path, opcodes: bytes, storage: bytes = b"", compression=zipfile.ZIP_STORED):
  """A file in the zip layout; `opcodes` make its content."""
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("name/data.pkl", opcodes + b".")
    archive.writestr("name/data/0", storage)
  return path


SIX = np.arange(6, dtype="<f4").tobytes()


@pytest.mark.parametrize(
  ("offset", "shape", "stride"),
  [
    (0, (7,), (1,)),
    (3, (2, 2), (2, 1)),
    (6, (), ()),
    (-1, (2,), (1,)),
    (5, (3,), (-1,)),
    (0, (5,), (2**62,)),  # four such steps, in bytes, are 0 modulo 2**64
    (0, (2, 3), (1,)),
    (0, (2.0,), (1,)),
    ("0", (2,), (1,)),
  ],
)
def test_view_must_lie_inside_its_storage(tmp_path, offset, shape, stride):
  content = b"(" + fragment("w") + tensor(6, offset, shape, stride) + b"d"
  with pytest.raises(InputError, match=r"needs \d+ elements|makes no sense"):
    read_torch_file(write(tmp_path / "bad.pt", content, SIX))


def test_last_element_of_a_storage_is_inside(tmp_path):
  content = b"(" + fragment("w") + tensor(6, 2, (2, 2), (2, 1)) + b"d"
  array = read_torch_file(write(tmp_path / "good.pt", content, SIX))["w"]
  np.testing.assert_array_equal(array, [[2, 3], [4, 5]])


def test_a_tensor_alone_is_read(tmp_path):
  path = write(tmp_path / "cells.pt", tensor(6, 0, (2, 3), (3, 1)), SIX)
  np.testing.assert_array_equal(read_torch_file(path)["0"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("count", [5, 7, -6])
def test_storage_must_have_the_announced_size(tmp_path, count):
  content = b"(" + fragment("w") + tensor(count, 0, (2,), (1,)) + b"d"
  with pytest.raises(InputError, match=r"has 24 bytes|not understood"):
    read_torch_file(write(tmp_path / "bad.pt", content, SIX))


def named(name: str) -> bytes:
  """The opcodes of a dictionary that holds what a name stands for."""
  module, attribute = name.split()
  return f"}}X\x01\0\0\0ac{module}\n{attribute}\ns".encode()


@pytest.mark.parametrize(
  "name",
  ["builtins eval", "subprocess Popen", "posix system", "os execvp", "torch hub.os.system"],
)
def test_what_only_an_attack_asks_for_is_refused(tmp_path, name):
  with pytest.raises(InputError, match=f"asks for {name.replace(' ', '.')}"):
    read_torch_file(write(tmp_path / "bad.pt", named(name)))


@pytest.mark.parametrize(
  "name",
  ["os PathLike", "posix stat_result", "os.path join", "sys flags", "builtins getattr", "x evals"],
)
def test_what_does_no_harm_is_inert_whatever_its_module(tmp_path, name):
  content = read_torch_file(write(tmp_path / "file.pt", named(name)))
  assert repr(content["a"]) == name.replace(" ", ".")


@pytest.mark.parametrize(
  "name", ["torch load", "torch.storage _load_from_bytes", "torch.nn.modules.linear Linear"]
)
def test_any_other_object_is_no_dictionary(tmp_path, name):
  module, attribute = name.split()
  opcodes = f"c{module}\n{attribute}\n".encode()
  with pytest.raises(InputError, match=f"holds a {module}.{attribute}, a dictionary is needed"):
    read_torch_file(write(tmp_path / "bad.pt", opcodes))


class EasyDict(dict):
  """As that of the package, a dictionary with attributes."""


class Tensorlike:
  """Calls what a pickle could do harm by, if anything here called it."""

  def __reduce__(self):
    return print, ("called",), {"a": 1}, iter([1]), iter([("k", 2)])


BESIDE = {
  "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95)),
  "scalar": np.float64(0.5),
  "array": np.arange(3),
  "generator": np.random.default_rng(0),
  "counts": defaultdict(list, {"a": [1]}),
  "set": {1, 2},
  "frozen": frozenset((1, "a")),
  "easy": EasyDict(lr=1),
  "path": PurePosixPath("/tmp"),
  "when": datetime.date(2024, 1, 1),
  "deque": deque([1, 2]),
  "keys": {(1, 2): 3, PurePosixPath("a"): 4},
  "called": Tensorlike(),
  "class": argparse.ArgumentParser,
  "bytes": b"12",
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("name", BESIDE)
def test_what_is_beside_the_weights_is_inert(name, protocol, tmp_path, capsys):
  program = pickle.dumps({"beside": BESIDE[name], "kept": [1, "a"]}, protocol)[:-1]
  with_tensor = program + fragment("w") + tensor(6, 0, (6,), (1,)) + b"s"
  content = read_torch_file(write(tmp_path / "file.pt", with_tensor, SIX))
  np.testing.assert_array_equal(content["w"], np.arange(6))
  assert content["kept"] == [1, "a"]
  assert type(content["beside"]) in (StandIn, dict, bytes)
  assert capsys.readouterr().out == ""


def test_a_stand_in_has_its_name_and_a_dictionary_s_entries(tmp_path):
  program = pickle.dumps({"easy": EasyDict(lr=1), "args": argparse.Namespace(lr=1)}, 2)[:-1]
  content = read_torch_file(write(tmp_path / "file.pt", program))
  assert repr(content["args"]) == "argparse.Namespace"
  assert content["easy"] == {"lr": 1}


def test_a_tensor_of_a_dtype_that_numpy_lacks_stands_aside(tmp_path):
  program = b"}" + fragment("q") + tensor(6, 0, (6,), (1,)).replace(b"Float", b"QInt8") + b"s"
  content = read_torch_file(write(tmp_path / "file.pt", program, SIX[:6]))
  assert repr(content["q"]) == "torch.QInt8Storage"


def later_tensor(dtype: str) -> bytes:
  """The opcodes of two elements of a dtype that has no storage of its own, in 24 bytes."""
  program = tensor(24, 1, (2,), (1,)).replace(b"_v2", b"_v3")
  program = program.replace(b"torch\nFloat", b"torch.storage\nUntyped")
  return program.removesuffix(b"tR") + b"ctorch\n" + dtype.encode() + b"\ntR"


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"])
def test_tensors_of_later_dtypes_have_their_numbers(dtype, tmp_path):
  expected = np.arange(24 // np.dtype(dtype).itemsize).astype(dtype)
  path = write(
    tmp_path / "file.pt", b"}" + fragment("x") + later_tensor(dtype) + b"s", expected.tobytes()
  )
  np.testing.assert_array_equal(read_torch_file(path)["x"], expected[1:3], strict=True)


@pytest.mark.parametrize(
  ("opcodes", "kind"),
  [
    (later_tensor("complex32"), "torch.complex32"),
    (b"ctorch._utils\n_rebuild_sparse_tensor\n)R", "torch._utils._rebuild_sparse_tensor"),
    (
      b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass\n"
      b"ctorch.distributed.tensor\nDTensor\n)}tR",
      "torch.distributed.tensor.DTensor",
    ),
    # A conjugate view, whose numbers are not those that are stored.
    (
      tensor(6, 0, (6,), (1,)).removesuffix(b"tR") + fragment({"conj": True}) + b"tR",
      "torch.Tensor with ['conj']",
    ),
  ],
)
def test_tensors_that_are_no_arrays_are_named_where_weights_are_wanted(opcodes, kind, tmp_path):
  path = write(tmp_path / "file.pt", b"(" + fragment("x") + opcodes + b"d", SIX)
  assert repr(read_torch_file(path)["x"]) == kind
  with pytest.raises(InputError, match=re.escape(f"these are none: x ({kind})")):
    read_state_dict(path)


def legacy(path, opcodes: bytes, keys: list[str], storages: bytes):
  """A file in the older layout."""
  head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
  parts = [pickle.dumps(part, 2) for part in head]
  path.write_bytes(b"".join([*parts, opcodes, b".", pickle.dumps(keys, 2), storages]))
  return path


def test_the_older_layout_has_quantized_storages_and_modules_beside_weights(tmp_path):
  first = tensor(6, 0, (6,), (1,)).replace(b"Float", b"QInt8").replace(fragment("0"), fragment("a"))
  module = b"(" + fragment("module") + b"cmine\nNet\n" + fragment("net.py") + fragment("") + b"tQ"
  items = [fragment("q"), first, fragment("w"), tensor(6, 0, (6,), (1,)), fragment("m"), module]
  storages = [(6).to_bytes(8, "little") + data for data in (SIX, bytes(6))]
  path = legacy(tmp_path / "x.pt", b"(" + b"".join(items) + b"d", ["0", "a"], b"".join(storages))
  content = read_torch_file(path)
  np.testing.assert_array_equal(content["w"], np.arange(6))
  assert [repr(content[name]) for name in "qm"] == ["torch.QInt8Storage", "mine.Net"]


def test_a_storage_that_is_not_known_is_named_in_the_older_layout(tmp_path):
  opcodes = b"(" + fragment("w") + tensor(6, 0, (6,), (1,)).replace(b"Float", b"Foo") + b"d"
  with pytest.raises(InputError, match=r"older layout has torch\.FooStorage"):
    read_torch_file(legacy(tmp_path / "x.pt", opcodes, ["0"], (6).to_bytes(8, "little") + SIX))


def test_a_file_saved_without_sums_is_read(tmp_path):
  path = write(tmp_path / "x.pt", b"(" + fragment("w") + tensor(6, 0, (6,), (1,)) + b"d", SIX)
  with zipfile.ZipFile(path) as archive:
    sums = [info.CRC.to_bytes(4, "little") for info in archive.infolist()]
  whole = path.read_bytes()
  for crc in sums:
    whole = whole.replace(crc, bytes(4))
  path.write_bytes(whole)
  np.testing.assert_array_equal(read_torch_file(path)["w"], np.arange(6))


@pytest.mark.parametrize("opcodes", ["(K\x01{}l", "(K\x01{}t", "}}X\x01\0\0\0mK\x01{}\x86s"])
def test_weights_are_found_in_lists(opcodes, tmp_path):
  weights = (b"(" + fragment("w") + tensor(6, 0, (6,), (1,)) + b"d").decode("latin1")
  path = write(tmp_path / "x.pt", opcodes.format(weights).encode("latin1"), SIX)
  np.testing.assert_array_equal(read_state_dict(path)["w"], np.arange(6))


def test_entries_that_overlap_are_refused(tmp_path):
  """One entry of many names: each would be read anew."""
  path = write(tmp_path / "file.pt", b"}", bytes(10**5))
  with zipfile.ZipFile(path, "a") as archive:
    for i in range(20):
      info = copy.copy(archive.getinfo("name/data/0"))
      info.filename = f"name/data/{i + 1}"
      archive.filelist.append(info)
    archive._didModify = True
  with pytest.raises(InputError, match="they overlap"):
    read_torch_file(path)


def test_tensors_that_share_a_storage_are_bounded_together(tmp_path):
  """Each may repeat its numbers a little, a thousand of them would fill all memory."""
  items = [fragment(f"w{i}") + tensor(6, 0, (2**20,), (0,)) for i in range(3)]
  with pytest.raises(InputError, match="its tensors together have more than 16 times"):
    read_torch_file(write(tmp_path / "file.pt", b"(" + b"".join(items) + b"d", SIX))


def test_attributes_of_known_names_cannot_be_set(tmp_path):
  # BUILD with (None, {name: value}) sets attributes of the object below it on the stack.
  state = fragment((None, {"__doc__": "altered"}))
  for name in ("torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict"):
    with pytest.raises(InputError, match="a dictionary is needed"):
      read_torch_file(write(tmp_path / "bad.pt", b"c" + name.encode() + b"\n" + state + b"b"))
  assert OrderedDict.__doc__ != "altered"


def test_compressed_archive_is_refused(tmp_path):
  path = write(tmp_path / "bomb.pt", b"}", bytes(10**6), zipfile.ZIP_DEFLATED)
  with pytest.raises(InputError, match="compressed"):
    read_torch_file(path)


def test_legacy_file_cannot_announce_more_than_it_has(tmp_path):
  content = b"(" + fragment("w") + tensor(10**6, 0, (2,), (1,)) + b"d"
  path = legacy(tmp_path / "short.pt", content, [], b"")
  with pytest.raises(InputError, match="shorter than the tensors that it announces"):
    read_torch_file(path)


def test_text_that_is_no_text_is_damage(tmp_path):
  with pytest.raises(InputError, match="damaged"):
    read_torch_file(write(tmp_path / "bad.pt", b"X\x01\0\0\0\xff"))


def test_memo_index_takes_no_memory(tmp_path):
  index = (2**24).to_bytes(4, "little")
  path = write(tmp_path / "memo.pt", b"\x80\x02}r" + index)
  tracemalloc.start()
  assert read_torch_file(path) == {}
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 10**7


def test_what_is_no_state_dict_is_named(tmp_path):
  with pytest.raises(InputError, match="holds a list"):
    read_torch_file(write(tmp_path / "list.pt", b"]"))
  with pytest.raises(InputError, match="There is no file"):
    read_torch_file(tmp_path / "absent.pt")
  with pytest.raises(InputError, match=r"no single data\.pkl"):
    read_torch_file(cases.FOLDER / "efficientnet_lite0.npz")
  with pytest.raises(InputError, match="not a PyTorch weight file"):
    read_torch_file(cases.FOLDER / "efficientnet_lite0.json")
  (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
  with pytest.raises(InputError, match="not a PyTorch weight file"):
    read_torch_file(tmp_path / "plain.pkl")


def written() -> dict:
  """A dictionary of dictionaries, as training checkpoints are."""
  return {"state_dict": expected(), "ema": {"transposed": expected()["transposed"]}, "empty": {}}


def test_what_is_written_is_read_back(tmp_path):
  write_torch_file(tmp_path / "file.pt", written())
  content = read_torch_file(tmp_path / "file.pt")
  assert content.keys() == written().keys()
  for part, tensors in written().items():
    assert content[part].keys() == tensors.keys()
    for name, array in tensors.items():
      np.testing.assert_array_equal(content[part][name], array, err_msg=name, strict=True)


def test_the_same_tensors_make_the_same_bytes_at_aligned_places(tmp_path):
  for name in ("a.pt", "b.pt"):
    write_torch_file(tmp_path / name, written())
  assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
  with zipfile.ZipFile(tmp_path / "a.pt") as archive:
    for info in archive.infolist():
      assert info.compress_type == zipfile.ZIP_STORED
      data = info.header_offset + 30 + len(info.filename) + len(info.extra)
      assert data % 64 == 0, info.filename


def test_what_pytorch_has_no_dtype_for_is_refused_and_leaves_nothing(tmp_path):
  with pytest.raises(InputError, match="dtype uint32 are not written"):
    write_torch_file(tmp_path / "file.pt", {"x": np.zeros(2, np.uint32)})
  assert not list(tmp_path.iterdir())


@pytest.mark.torch
@pytest.mark.parametrize("mmap", [False, True])
def test_pytorch_reads_what_is_written(tmp_path, mmap):
  import torch

  write_torch_file(tmp_path / "file.pt", written())
  content = torch.load(tmp_path / "file.pt", weights_only=True, mmap=mmap)
  for name, array in expected().items():
    tensor = content["state_dict"][name]
    assert tuple(tensor.shape) == array.shape, name
    assert str(tensor.dtype).removeprefix("torch.") == str(array.dtype), name
    if array.dtype == ml_dtypes.bfloat16:
      tensor, array = tensor.float(), array.astype(np.float32)
    np.testing.assert_array_equal(tensor.numpy(), array, err_msg=name)


@pytest.mark.torch
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ours_reads_what_pytorch_does(layout):
  import torch

  theirs = torch.load(FORMATS / layout, weights_only=True)
  ours = read_torch_file(FORMATS / layout)
  for name in expected():
    tensor = theirs[name].detach()
    array = ours[name]
    if array.dtype == ml_dtypes.bfloat16:
      tensor, array = tensor.float(), array.astype(np.float32)
    np.testing.assert_array_equal(array, tensor.numpy(), err_msg=name)


def with_tensor(tmp_path, shape: tuple[int, ...], stride: tuple[int, ...]):
  """A file whose one tensor, of one stored element, has this shape and these strides."""
  write_torch_file(tmp_path / "one.pt", {"x": np.zeros((1, 1), np.float32)})
  with zipfile.ZipFile(tmp_path / "one.pt") as archive:
    entries = {info.filename: archive.read(info) for info in archive.infolist()}

  def pair(numbers):
    words = (pickle.LONG1 + b"\x08" + n.to_bytes(8, "little") for n in numbers)
    return pickle.MARK + b"".join(words) + pickle.TUPLE

  program = entries["archive/data.pkl"]
  assert program.count(pair((1, 1))) == 2
  for numbers in (shape, stride):
    program = program.replace(pair((1, 1)), pair(numbers), 1)
  entries["archive/data.pkl"] = program
  with zipfile.ZipFile(tmp_path / "changed.pt", "w") as archive:
    for name, data in entries.items():
      archive.writestr(name, data)
  return tmp_path / "changed.pt"


def test_a_tensor_that_repeats_one_number_without_end_is_refused(tmp_path):
  path = with_tensor(tmp_path, (10**6, 10**6), (0, 0))
  with pytest.raises(InputError, match="repeats a storage of 4 bytes"):
    read_torch_file(path)
  assert read_torch_file(with_tensor(tmp_path, (2, 3), (0, 0)))["x"].shape == (2, 3)


def test_a_pickle_cannot_set_attributes_of_a_dictionary(tmp_path):
  """PyTorch sets a state dict's `_metadata` in this way, which is left out."""
  made = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
  state = fragment({"items": 1})
  content = read_torch_file(write(tmp_path / "file.pt", made + state + b"b"))
  assert dict(content.items()) == {}


NEST = b"K\x01\x85" + b"2\x86" * 40  # a tuple of itself twice, forty levels deep
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ"


@pytest.mark.parametrize(
  "program",
  [
    b"}" + NEST + b"K\x01s",
    b"}(" + NEST + b"K\x01u",
    b"(" + NEST + b"K\x01d",
    b"\x80\x04\x8f(" + NEST + b"\x90",
    b"ccollections\nOrderedDict\n((" + NEST + b"K\x01ttR",
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00" + NEST + NEST + b"\x89}tR",
    b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + NEST + b"X\x03\0\0\0cpuK\x06tQ",
    b"(X\x07\0\0\0storage" + NEST + b"X\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ",
  ],
)
def test_a_few_bytes_that_would_take_for_ever_are_refused_or_inert(program, tmp_path):
  """Hashing or printing what doubles with each byte takes hours and all memory."""
  path = tmp_path / "weights.pt"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", program + b".")
    archive.writestr("x/data/0", bytes(24))
  try:
    result = repr(list(read_torch_file(path)))
  except InputError as error:
    result = str(error)
  assert len(result) < 2_000
