"""Pictures in zip and tar archives, read in place: an index of where each begins and ends.

Nothing is unpacked, so that names in an archive never become paths; of entries of one name the last
counts, as for who unpacks. The index is a few arrays, which worker processes get cheaply; files are
opened by each process for itself.
"""

from __future__ import annotations

import functools
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from vavae_jax.common.errors import InputError
from vavae_jax.common.files import named_files
from vavae_jax.data.sources.base import Named, Unreadable, identity_of
from vavae_jax.data.sources.listing import EXTENSIONS, Listing, classes_of, is_hidden

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: magic, lengths of name and extra
_DEFLATED = 8
_MAX_SIZE = 2**30  # of one picture's file; an archive may claim anything
_IN = "//"  # between an archive and what is in it; no name has it
_LINKS = "links and other things that are no plain files"


class _Member(NamedTuple):
  """A picture: `start` is of its bytes in a tar, of its local header in a zip."""

  name: str
  inner: str  # the tar in the tar, with _IN before that in it, ...; "": it is in the file itself
  file: int
  start: int
  stored: int
  size: int
  method: int  # of a zip, and its checksum; -1 of a tar
  crc: int


class Archive(Named):
  """Pictures by their places in one or more files, which were chosen by a name or a pattern."""

  def __init__(
    self,
    chosen: str,
    files: list[Path],
    members: _Members,
    class_names: list[str],
    labels: np.ndarray,
  ):
    found = list(members.values())
    order = sorted(range(len(found)), key=lambda i: (found[i].name, found[i].file))
    self._files = [str(file) for file in files]
    self._filled = [_filled_in(chosen, file) for file in files]
    self.names = [found[i].name for i in order]
    self._inner = [found[i].inner for i in order]
    self.beside = members.listing.note(self.names, class_names)
    columns = np.array([found[i][2:] for i in order], np.int64)
    self._file, self._start, self._stored, self._size, self._method, self._crc = columns.T
    self.class_names, self._labels = class_names, labels[order]

  def encoded(self, index: int) -> tuple[bytes, int]:
    file = _open(self._files[self._file[index]], os.getpid())
    start, stored, size = (int(x[index]) for x in (self._start, self._stored, self._size))
    method = int(self._method[index])
    if max(stored, size) > _MAX_SIZE:
      raise Unreadable(f"The picture {self.name(index)} would have {max(stored, size)} bytes.")
    if method >= 0:  # of a zip
      header = os.pread(file, _LOCAL_HEADER.size, start)
      if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise Unreadable(f"The picture {self.name(index)} is not where the archive says.")
      start += _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)[1:])
    data = os.pread(file, stored, start)
    if method == _DEFLATED:
      try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
      except zlib.error as error:
        raise Unreadable(f"The picture {self.name(index)} is damaged ({error}).") from error
    if len(data) != size:
      raise Unreadable(f"The picture {self.name(index)} is cut off, or not of the size it says.")
    if method >= 0 and zlib.crc32(data) != self._crc[index]:
      raise Unreadable(f"The picture {self.name(index)} is damaged: its checksum differs.")
    return data, int(self._labels[index])

  def name(self, index: int) -> str:
    parts = self._files[self._file[index]], self._inner[index], self.names[index]
    return "/".join(part.replace(_IN, "/") for part in parts if part)

  def keys(self) -> Sequence[str]:
    """Names, after those of archives where there may be others: a pattern's files, and tars in a
    tar whose pictures share names.
    """
    if not any(self._filled) and len(set(self.names)) == len(self.names):
      return self.names
    archives = (self._filled[file] for file in self._file)
    parts = zip(archives, self._inner, self.names, strict=True)
    return [_IN.join(part for part in each if part) for each in parts]

  def sizes(self) -> np.ndarray:
    return self._size

  def identity(self) -> str:
    return identity_of(self._files)


@functools.cache
def _open(path: str, process: int) -> int:
  """A descriptor of this process, which reads by position, so that threads share it."""
  del process
  return os.open(path, os.O_RDONLY)


def _filled_in(chosen: str, file: Path) -> str:
  """What a pattern leaves open in the path of one of its files; "" for a file named as it is."""
  both = zip(file.parts, Path(chosen).parts, strict=True)
  return "/".join(part for part, given in both if part != given)


class _Members(dict[tuple[int, str, str], _Member]):
  """Pictures by file, inner archive and name."""

  def __init__(self) -> None:
    super().__init__()
    self.listing = Listing()

  def add(self, member: _Member) -> None:
    """Takes one, in the place of an earlier one of its name."""
    key = member.file, member.inner, member.name
    if key in self:
      self.listing.ignore("replaced by a later entry of the same name")
    self[key] = member


def open_zip(pattern: str) -> Archive:
  """A zip file, or several by a pattern."""
  files = _files(pattern)
  members = _Members()
  listing = members.listing
  for number, file in enumerate(files):
    try:
      with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
      raise InputError(f"{file} is damaged or not a zip file ({error}).") from error
    for info in infos:
      name = _clean(info.filename.replace("\\", "/"))  # as some programs of Windows write
      if info.filename.endswith("/"):
        listing.folder(name)
        continue
      if stat.S_ISLNK(info.external_attr >> 16):
        listing.ignore(_LINKS)
        continue
      if not listing.takes(name):
        continue
      sizes = info.header_offset, info.compress_size, info.file_size
      if min(sizes) < 0 or max(sizes) > file.stat().st_size * 1100:
        raise InputError(f"{info.filename} of {file} has no possible size: the archive is damaged.")
      if info.flag_bits & 1:
        raise InputError(f"{info.filename} of {file} is encrypted; give an archive without.")
      if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(
          f"{info.filename} of {file} is packed by method {info.compress_type}, which cannot be "
          "read here; store or deflate it."
        )
      members.add(_Member(name, "", number, *sizes, info.compress_type, info.CRC))
  return _labelled(pattern, files, members, [name for *_, name in members])


class _Extent(io.RawIOBase):
  """A part of a file as a file of its own: nothing beyond its end is in it."""

  def __init__(self, file: int, begin: int, size: int):
    self.file, self.begin, self.size = file, begin, size
    self._at = 0

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    self._at = (0, self._at, self.size)[whence] + offset
    return self._at

  def tell(self) -> int:
    return self._at

  def read(self, size: int | None = -1) -> bytes:
    left = max(self.size - self._at, 0)
    wanted = left if size is None or size < 0 else min(size, left)
    data = os.pread(self.file, wanted, self.begin + self._at)
    self._at += len(data)
    return data


def open_tar(pattern: str) -> Archive:
  """A tar file, or several by a pattern, not compressed.

  The class of a picture is in a file of the same name ending in .cls, as WebDataset has it, or else
  its folder, or, where an archive has none, this: ImageNet has a tar a class, in a tar of tars.
  """
  files = _files(pattern)
  members = _Members()
  classes: dict[tuple[int, str, str], int] = {}
  for number, file in enumerate(files):
    try:
      with file.open("rb") as opened:
        whole = _Extent(opened.fileno(), 0, file.stat().st_size)
        for member, label in _tar_members(whole, number, "", members):
          if label is None:
            members.add(member)
          else:
            classes[_record(member)] = label
    except InputError as error:
      raise InputError(f"{file}: {error}") from error
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
      raise InputError(
        f"{file} is damaged or not a plain tar file ({error}); decompress it first, if it "
        "is compressed."
      ) from error
  if not classes or not members:
    foldered = {(number, inner) for number, inner, name in members if "/" in name}
    labelled = [
      name if (number, inner) in foldered else f"{Path(inner or files[number]).stem}/{name}"
      for number, inner, name in members
    ]
    return _labelled(pattern, files, members, labelled)
  records = [_record(member) for member in members.values()]
  ((*_, record), pictures), *_ = Counter(records).most_common(1)
  if pictures > 1:
    raise InputError(f"{pattern}: the record {record} has several pictures; which one is meant?")
  if lacking := [record for record in records if record not in classes]:
    raise InputError(f"{pattern}: {lacking[0][-1]} has no .cls file, and others have.")
  labels = np.array([classes[record] for record in records], np.int32)
  names = [str(i) for i in range(int(labels.max()) + 1)]
  return Archive(pattern, files, members, names, labels)


def _record(member: _Member) -> tuple[int, str, str]:
  """What a WebDataset record's files share: the name until the first dot of its last part."""
  folder, slash, last = member.name.rpartition("/")
  return member.file, member.inner, folder + slash + last.partition(".")[0]


def _tar_members(
  extent: _Extent, file: int, inner: str, earlier: _Members
) -> Iterator[tuple[_Member, int | None]]:
  """(picture, None) of those in a tar and in tars in it; (.cls file, its number).

  A hard link is the `earlier` picture that it names.
  """
  listing = earlier.listing
  with tarfile.open(fileobj=cast(IO[bytes], extent), mode="r:") as archive:
    while (info := archive.next()) is not None:
      archive.members.clear()  # type: ignore[attr-defined]  # it would keep a million of them
      name = _clean(info.name)
      plain = info.isreg() and not info.issparse()
      if info.size < 0 or (plain and info.offset_data + info.size > extent.size):
        raise ValueError(f"{name} reaches beyond its archive")
      start = extent.begin + info.offset_data
      member = _Member(name, inner, file, start, info.size, info.size, -1, -1)
      if info.isdir():
        listing.folder(name)
      elif info.islnk() and (linked := earlier.get((file, inner, _clean(info.linkname)))):
        if listing.takes(name):
          yield linked._replace(name=name), None
      elif not plain:
        listing.ignore(_LINKS)
      elif name.endswith(".tar") and info.size and not is_hidden(name):
        part = _Extent(extent.file, start, info.size)
        try:
          yield from _tar_members(part, file, f"{inner}{_IN if inner else ''}{name}", earlier)
        except tarfile.TarError as error:
          raise ValueError(f"{name} in it is no plain tar: {error}") from error
      elif name.endswith(".cls") and not is_hidden(name):
        yield member, _class_number(extent, info, name)
      elif listing.takes(name):
        yield member, None
    extent.seek(archive.offset)  # where a damaged header ends it for tarfile, too
    while block := extent.read(2**20):
      if block.strip(b"\0"):
        raise ValueError(
          f"from byte {extent.begin + archive.offset} on it is damaged, or another one follows"
        )


def _class_number(extent: _Extent, info: tarfile.TarInfo, name: str) -> int:
  extent.seek(info.offset_data)
  text = extent.read(min(info.size, 20)).strip()
  if not text.isdigit() or int(text) > 10**6:
    raise InputError(f"{name} holds {text!r}; needed is the number of a class, from 0 on.")
  return int(text)


def _clean(name: str) -> str:
  """A name in an archive without what leads nowhere, such as a first "./"."""
  return "/".join(part for part in name.split("/") if part not in ("", "."))


def _labelled(pattern: str, files: list[Path], members: _Members, names: list[str]) -> Archive:
  where = ", ".join(map(str, files[:3]))
  if not members:
    note = members.listing.note([], [])
    raise InputError(
      f"{where}: no pictures are in it; needed are files ending in {', '.join(EXTENSIONS)}."
      f"{f' It has {note}.' if note else ''}"
    )
  return Archive(pattern, files, members, *classes_of(names, where))


def _files(named: str) -> list[Path]:
  if not (files := named_files(named)):
    raise InputError(f"There is no file {named}.")
  return files
