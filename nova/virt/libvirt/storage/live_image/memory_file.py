#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.
"""The memory of a guest as it is kept: one file, described by itself.

The file begins with a header, so that what the memory fits can't come apart
from it: eight bytes of magic, a version and the length of a description in
JSON (both unsigned, 4 bytes, big-endian), and the description. Then, at the
next multiple of 4 KiB, QEMU's migration stream, up to the end.
"""

import dataclasses
import io
import os
import struct

from oslo_serialization import jsonutils
from oslo_utils import units

import nova.conf
from nova.i18n import _
from nova.virt.libvirt.storage.live_image import vm_state
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF

#: What is left to the others in a file system, in bytes.
RESERVE = 256 * units.Mi

MAGIC = b'NOVALIVE'
VERSION = 1
ALIGNMENT = 4096
_HEADER = '>8sII'
# A definition has some KiB.
LONGEST_DESCRIPTION = 1 << 20
_TYPES = {'domain': str, 'capacity': int, 'memory_mb': int, 'vcpus': int,
          'qemu_version': int, 'length': int}

# What a file begins with to which libvirt has saved a guest. Nothing but the
# place of the stream is taken from there: the next five numbers are version,
# length of the rest, whether the guest ran, compression, an offset.
_SAVED = '<16s19I'
_SAVED_MAGIC = b'LibvirtQemudSave'
_SAVED_VERSION = 2
_STREAM_MAGIC = b'QEVM'


class Unusable(Exception):
    """What is no memory of a guest, or one of another version."""


class Unfit(Unusable):
    """What no host can use for an instance."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What a guest must be to go on from a memory.

    :ivar domain: the XML that libvirt has saved along with it
    :ivar capacity: of the root disk, in bytes
    :ivar memory_mb: in MiB
    :ivar vcpus: their number
    :ivar qemu_version: of the QEMU that it ran in, e.g. 7002000
    :ivar length: of the stream, in bytes
    """
    domain: str
    capacity: int
    memory_mb: int
    vcpus: int
    qemu_version: int
    length: int


def check_room(directory: str, needed: int) -> None:
    """Refuse what would fill a file system that guests write to.

    :param directory: where a memory is about to be written
    :param needed: its bytes; RESERVE is left to others
    :raises: Unusable
    """
    needed += RESERVE
    available = libvirt_utils.get_fs_info(directory)['free']
    if needed > available:
        raise Unusable(_(
            'make room in %(directory)s of host %(host)s: %(available)d '
            'bytes are available, and a memory is written there if '
            '%(needed)d are') % {
                'directory': directory, 'host': CONF.host,
                'available': available, 'needed': needed})


def find_stream(path: str) -> vm_state.Stream:
    """Find the stream in a file that libvirt has saved a guest to.

    :raises: Unusable; OSError
    """
    with open(path, 'rb') as f:
        begin = f.read(struct.calcsize(_SAVED))
        if len(begin) < struct.calcsize(_SAVED):
            raise Unusable(_('it is too short'))
        magic, version, length, _running, compression = struct.unpack(
            _SAVED, begin)[:5]
        if magic != _SAVED_MAGIC or version != _SAVED_VERSION:
            raise Unusable(_('libvirt has written another header than '
                             'expected: %r') % begin[:20])
        if compression:
            raise Unusable(_('it is compressed; leave snapshot_image_format '
                             'in qemu.conf at raw'))
        offset = len(begin) + length
        f.seek(offset)
        if f.read(len(_STREAM_MAGIC)) != _STREAM_MAGIC:
            raise Unusable(_('there is no stream of QEMU at byte %d') % offset)
        return vm_state.Stream(
            path, offset, os.fstat(f.fileno()).st_size - offset)


class Reader(io.RawIOBase):
    """A memory as it is kept, to be read from begin to end once.

    The stream is read from where it is.

    :param description: the Description
    :param stream: the Stream
    """

    def __init__(self, description: Description, stream: vm_state.Stream):
        super().__init__()
        text = jsonutils.dump_as_bytes(dataclasses.asdict(description))
        head = struct.pack(_HEADER, MAGIC, VERSION, len(text)) + text
        self._head = head.ljust(-(-len(head) // ALIGNMENT) * ALIGNMENT, b'\0')
        self.length = len(self._head) + stream.length
        self._left = stream.length
        self._file = open(stream.path, 'rb', buffering=0)
        self._file.seek(stream.offset)

    def readable(self):
        return True

    def readinto(self, buffer):
        if self._head:
            count = min(len(buffer), len(self._head))
            buffer[:count] = self._head[:count]
            self._head = self._head[count:]
            return count
        count = self._file.readinto(memoryview(buffer)[:self._left])
        if not count and self._left and len(buffer):
            raise OSError('%s has become shorter' % self._file.name)
        self._left -= count
        return count

    def close(self):
        if not self.closed:
            self._file.close()
        super().close()


def read(path: str) -> tuple[Description, vm_state.Stream]:
    """Read the header of a memory.

    :param path: of a file that was written from a Reader
    :raises: Unusable if it isn't one, or is cut off; OSError
    """
    with open(path, 'rb') as f:
        begin = f.read(struct.calcsize(_HEADER))
        if len(begin) < struct.calcsize(_HEADER) or (
                not begin.startswith(MAGIC)):
            raise Unusable(_('it holds no memory of a guest'))
        _magic, version, length = struct.unpack(_HEADER, begin)
        if version != VERSION:
            raise Unusable(_('it is of version %(version)d, and this '
                             'nova-compute knows version %(known)d') % {
                'version': version, 'known': VERSION})
        if length > LONGEST_DESCRIPTION:
            raise Unusable(_('its description has %d bytes') % length)
        description = _parse(f.read(length))
        offset = -(-f.tell() // ALIGNMENT) * ALIGNMENT
        stream = vm_state.Stream(
            path, offset, os.fstat(f.fileno()).st_size - offset)
    if stream.length != description.length:
        raise Unusable(_('its stream has %(found)d bytes, and should have '
                         '%(expected)d') % {'found': stream.length,
                                            'expected': description.length})
    return description, stream


def _parse(text):
    try:
        found = jsonutils.loads(text)
        if {name: type(value) for name, value in found.items()} == _TYPES:
            return Description(**found)
    except (ValueError, AttributeError):
        pass
    raise Unusable(_('its description can not be read'))
