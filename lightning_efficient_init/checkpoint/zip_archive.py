"""Where the members of a zip archive are: directory and local headers, nothing else is read.

How a zip is laid out: each member is a *local header* (30 bytes, then its name, then an *extra field*) followed by
its data; after the last member comes the *central directory*, one record for each member, which states the position
of the local header; at the very end a record says where the directory is. The data's position stands nowhere. It
follows from the local header's own name and extra lengths, and these differ from the directory's: torch pads the
local extra field so that data is aligned to 64 bytes, and a member that needs 64-bit sizes carries an extra zip64
field there.

Members are stored, never deflated, in every file that torch writes. Deflated ones would give wrong positions
silently, so they are refused, as is anything on which a local header and the directory disagree: readers that
believe one and readers that believe the other would see different files.

Decided against: the standard library's ``zipfile`` (tolerates leading and trailing junk, looks at no local header
until a member is opened, and is slower); ``torch.PyTorchFileReader`` (not public, and says what is wrong in terms of
C++).

The format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, SAVE_AGAIN, explain, shorten
from lightning_efficient_init.errors import CorruptCheckpointError, UnsupportedCheckpointError

MAGIC: Final = b"PK\x03\x04"

_LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL: Final = struct.Struct("<4s4xHH8xIIHHH8xI")  # without versions, times, CRC and attributes
_END: Final = struct.Struct("<4sHHHHIIH")
_END64_LOCATOR: Final = struct.Struct("<4sIQI")
_END64: Final = struct.Struct("<4sQHHIIQQQQ")
_LENGTHS: Final = struct.Struct("<HH")  # of the name and of the extra field, at the end of a local header
_NAME_LEN: Final = _LOCAL.size - _LENGTHS.size
_MAX_COMMENT: Final = 0xFFFF
_USE_ZIP64: Final = 0xFFFFFFFF
_ENCRYPTED: Final = 0x1
_SIZES_FOLLOW: Final = 0x8
_NEAR_BYTES: Final = 4096
_MAX_AHEAD_BYTES: Final = 1 << 20


@dataclass(slots=True)  # not frozen: there may be 100,000 of them, made five times faster like this
class Member:
    """One member as the central directory describes it; a value, which nobody changes.

    Attributes:
        name: Its name, as bytes.
        header_offset: Position of its local header.
        num_bytes: Size of its data, unpacked.
        refusal: Why its data cannot be read in place ("compressed"), or None.
    """

    name: bytes
    header_offset: int
    num_bytes: int
    refusal: str | None = None


class ZipArchive:
    """The members of a zip archive, by name.

    Attributes:
        file: The open file.
        members: Name to member.
    """

    def __init__(self, file: CheckpointFile) -> None:
        self.file = file
        self._headers = _Readahead(file)
        self._sound_start = b"none yet"
        self._directory_offset, num_bytes, num_members = self._find_directory()
        self.members = self._read_directory(num_bytes, num_members)

    def data_offset(self, member: Member) -> int:
        """Gives the position of a member's data, from its local header.

        Raises:
            UnsupportedCheckpointError: It is compressed or encrypted.
            CorruptCheckpointError: The header is damaged, contradicts the directory, or the data reaches into it.
        """
        if member.refusal is not None:
            raise self._refused(member, member.refusal)
        name_end = _LOCAL.size + len(member.name)
        data, at = self._headers.read(member.header_offset, name_end)
        if not (data.startswith(self._sound_start, at) and data.startswith(member.name, at + _LOCAL.size)):
            self._check_header(member, data[at : at + name_end])
        name_len, extra_len = _LENGTHS.unpack_from(data, at + _NAME_LEN)
        offset: int = member.header_offset + name_end + extra_len
        if name_len != len(member.name):
            raise self._corrupt(f"one name of {_shown(member)}", "another length in its local header")
        if offset + member.num_bytes > self._directory_offset:
            raise self._corrupt(
                f"{member.num_bytes} bytes of {_shown(member)} at {offset}",
                f"the central directory at {self._directory_offset}",
            )
        return offset

    def _check_header(self, member: Member, header: bytes) -> None:
        """Compares a local header with the directory, and notes a start that is sound whatever the member's size."""
        magic, _, flags, method, _, _, _, packed, unpacked, _, extra_len = _LOCAL.unpack_from(header)
        if magic != MAGIC or method != 0 or flags & _ENCRYPTED or header[_LOCAL.size :] != member.name:
            raise self._corrupt(f"a local header of {_shown(member)} at {member.header_offset}", "another one, or none")
        if flags & _SIZES_FOLLOW and packed == unpacked == 0:
            self._sound_start = header[:_NAME_LEN]
        else:
            self._check_local_sizes(member, flags, (unpacked, packed), member.header_offset + len(header), extra_len)

    def read(self, member: Member) -> bytes:
        """Reads a member's data; raises as `data_offset` does."""
        return self.file.read(self.data_offset(member), member.num_bytes, _shown(member))

    def _check_local_sizes(
        self, member: Member, flags: int, sizes: tuple[int, int], extra_offset: int, extra_len: int
    ) -> None:
        """Sizes in the local header are either those of the directory, or left open for a descriptor after the data."""
        if _USE_ZIP64 in sizes:
            extra = self.file.read(extra_offset, extra_len, "the header of a zip member")
            unpacked, packed = self._widen(extra, sizes)
            sizes = unpacked, packed
            if flags & _SIZES_FOLLOW and sizes == (0, 0):
                return
        if sizes != (member.num_bytes, member.num_bytes):
            raise self._corrupt(f"{member.num_bytes} bytes of {_shown(member)}", f"{sizes[0]} in its local header")

    def _find_directory(self) -> tuple[int, int, int]:
        """Gives the central directory's position, size and number of members."""
        tail_offset = max(0, self.file.num_bytes - _END.size - _MAX_COMMENT)
        tail = self.file.read(tail_offset, self.file.num_bytes - tail_offset, "the end of the zip archive")
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < _END.size:
            raise self._corrupt("a zip directory at the end of the file", "none: the file is truncated")
        _, disk, first_disk, on_disk, num_members, num_bytes, offset, comment_len = _END.unpack_from(tail, at)
        end = tail_offset + at
        if end + _END.size + comment_len != self.file.num_bytes:
            raise self._corrupt("a zip directory at the end of the file", "other bytes after it")
        narrow = (disk, first_disk, on_disk, num_members, num_bytes, offset)
        end, wide = self._read_end64(end) or (end, narrow)
        limits = (0xFFFF,) * 4 + (_USE_ZIP64,) * 2
        if any(a not in (b, limit) for a, b, limit in zip(narrow, wide, limits, strict=True)):
            raise self._corrupt("one end of the zip directory", "two that disagree")
        disk, first_disk, on_disk, num_members, num_bytes, offset = wide
        if disk or first_disk or on_disk != num_members or offset + num_bytes != end:
            raise self._corrupt(f"a zip directory that ends at {end}", f"{num_bytes} bytes of it at {offset}")
        return offset, num_bytes, num_members

    def _read_end64(self, end: int) -> tuple[int, tuple[int, ...]] | None:
        """Gives position and fields of the 64-bit end record, which torch writes before the other one at ``end``."""
        start = end - _END64_LOCATOR.size
        if start < 0:
            return None
        magic, _, offset, _ = _END64_LOCATOR.unpack(self.file.read(start, _END64_LOCATOR.size))
        if magic != b"PK\x06\x07":
            return None
        record = self.file.read(offset, _END64.size, "the zip64 record")
        magic, size, _, _, *fields = _END64.unpack(record)
        if magic != b"PK\x06\x06" or offset + 12 + size != start:
            raise self._corrupt("a zip64 record before its locator", "none")
        return offset, tuple(fields)

    def _read_directory(self, num_bytes: int, num_members: int) -> dict[bytes, Member]:
        directory = self.file.read(self._directory_offset, num_bytes, "the zip directory")
        members: dict[bytes, Member] = {}
        at, unpack, size, limit = 0, _CENTRAL.unpack_from, _CENTRAL.size, self._directory_offset
        while at < num_bytes:
            if at + size > num_bytes:
                raise self._corrupt("whole records in the zip directory", "part of one")
            magic, flags, method, packed, unpacked, name_len, extra_len, comment_len, offset = unpack(directory, at)
            name_end = at + size + name_len
            name = directory[at + size : name_end]
            at = name_end + extra_len + comment_len
            if magic != b"PK\x01\x02" or at > num_bytes:
                raise self._corrupt("whole records in the zip directory", "a damaged one")
            if _USE_ZIP64 in (unpacked, packed, offset):
                extra = directory[name_end : name_end + extra_len]
                unpacked, packed, offset = self._widen(extra, (unpacked, packed, offset))
            member = Member(name, offset, unpacked, _refusal_of(method, flags))
            if (packed != unpacked and member.refusal is None) or offset + packed > limit:
                raise self._corrupt(
                    f"{_shown(member)} before the zip directory at {limit}",
                    f"{packed} stored bytes of {unpacked} at {offset}",
                )
            if members.setdefault(name, member) is not member:
                raise self._corrupt("one member of each name", f"two of the name {_shown(member)}")
        if len(members) != num_members:
            raise self._corrupt(f"{num_members} members in the zip directory", len(members))
        return members

    def _widen(self, extra: bytes, fields: tuple[int, ...]) -> tuple[int, ...]:
        """Replaces the fields that are 0xFFFFFFFF by the 64-bit ones of the zip64 extra field."""
        at = 0
        while at + 4 <= len(extra):
            kind, size = struct.unpack_from("<HH", extra, at)
            if kind == 1:
                wide = iter(struct.unpack_from(f"<{size // 8}Q", extra.ljust(at + 4 + size, b"\0"), at + 4))
                return tuple(next(wide, field) if field == _USE_ZIP64 else field for field in fields)
            at += 4 + size
        return fields

    def _corrupt(self, expected: object, found: object) -> CorruptCheckpointError:
        return CorruptCheckpointError(explain(self.file.path, expected=expected, found=found, todo=DOWNLOAD_AGAIN))

    def _refused(self, member: Member, found: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(
            explain(
                self.file.path,
                expected=f"{_shown(member)} stored as it is",
                found=f"it {found}",
                todo=f"Tensors cannot be read in place. {SAVE_AGAIN}",
            )
        )


class _Readahead:
    """Small parts of a file, read in order: one by one where they lie far apart, and many at once where they do not.

    The local headers of small tensors are less than a page apart. To read the tensors along with them takes less time
    than to ask the system for each header alone, above all on a network.
    """

    def __init__(self, file: CheckpointFile) -> None:
        self._file = file
        self._offset = 0
        self._data = b""

    def read(self, offset: int, num_bytes: int) -> tuple[bytes, int]:
        """Gives some bytes of the file, and where in them the ``num_bytes`` at ``offset`` are.

        Raises as `CheckpointFile.read` does.
        """
        start = offset - self._offset
        if start < 0 or start + num_bytes > len(self._data):
            is_near = 0 <= start <= len(self._data) + _NEAR_BYTES
            ahead = min(max(_NEAR_BYTES, 2 * len(self._data)), _MAX_AHEAD_BYTES) if is_near else 0
            ahead = max(num_bytes, min(ahead, self._file.num_bytes - offset))
            self._offset, self._data = offset, self._file.read(offset, ahead, "the header of a zip member")
            start = 0
        return self._data, start


def _refusal_of(method: int, flags: int) -> str | None:
    if flags & _ENCRYPTED:
        return "encrypted"
    return f"compressed (zip method {method})" if method != 0 else None


def _shown(member: Member) -> str:
    return f"member {shorten(member.name.decode('utf-8', 'replace'))!r}"
