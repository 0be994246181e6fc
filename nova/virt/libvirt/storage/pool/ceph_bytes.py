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
"""What is in the images of a Ceph pool; see ceph.py for the images.

Nothing waits for Ceph for longer than it is told to: who reads or makes an
image here has a guest powered off meanwhile.
"""

import contextlib
import hashlib
import itertools
import struct
import typing as ty

import tenacity

from nova import exception
from nova.storage import rbd_utils
from nova import utils

# Bytes that are read at once. As they are counted in the digest, two hosts
# have to agree about them.
_PIECE = 4 << 20
# 56 bits: records hold numbers.
_DIGEST_BYTES = 7
# Seconds for which who has an image open is waited for, and between two tries.
_WATCHED = 45
_INTERVAL = 2


@contextlib.contextmanager
def _opened(image, timeout):
    ceph = image.pool.ceph()
    with ceph.errors(image.name), ceph.connected(timeout) as client:
        found = utils.tpool_wrap(utils.tpool_wrap(rbd_utils.rbd.Image)(
            client.ioctx, image.name, read_only=True))
        with contextlib.closing(found):
            yield found


def create(pool, name: str, size: int, timeout: int) -> None:
    """Make an image, which reads as zeroes.

    :param pool: the StoragePool over the Ceph pool
    :param size: bytes
    :param timeout: seconds that Ceph may keep silent
    :raises: exception.StorageVolumeExists, exception.StorageCephError
    """
    ceph = pool.ceph()
    with ceph.errors(name), ceph.connected(timeout) as client:
        rbd_utils.RbdProxy().create(client.ioctx, name, size)


def free_name(pool, wanted: str, taken: ty.Container[str],
              timeout: int) -> str:
    """A name for a new image, as StoragePool.free_name() finds one.

    :param pool: the StoragePool over the Ceph pool
    :param timeout: seconds that Ceph may keep silent
    :raises: exception.StorageCephError
    """
    ceph = pool.ceph()
    with ceph.errors(), ceph.connected(timeout) as client:
        known = set(rbd_utils.RbdProxy().list(client.ioctx))
    names = itertools.chain(
        [wanted], ('%s.%d' % (wanted, n) for n in itertools.count(1)))
    return next(name for name in names
                if name not in known and name not in taken)


def delete(pool, name: str, timeout: int) -> None:
    """Delete an image without snapshots; one that is gone is fine.

    Who has it open is waited for: the watch of a program that was killed stays
    for half a minute.

    :param pool: the StoragePool over the Ceph pool
    :param timeout: seconds that Ceph may keep silent
    :raises: exception.StorageImageBusy, exception.StorageCephError
    """
    ceph = pool.ceph()
    with contextlib.suppress(exception.StorageVolumeNotFound):
        with ceph.errors(name), ceph.connected(timeout) as client:
            _remove(client.ioctx, name)


@tenacity.retry(
    retry=tenacity.retry_if_exception(
        lambda e: isinstance(e, rbd_utils.rbd.ImageBusy)),
    reraise=True, stop=tenacity.stop_after_delay(_WATCHED),
    wait=tenacity.wait_fixed(_INTERVAL))
def _remove(ioctx, name):
    rbd_utils.RbdProxy().remove(ioctx, name)


def measure(image, timeout: int) -> tuple[int, int]:
    """How large an image is, and how much it may hold beside zeroes.

    :param image: a CephImage
    :param timeout: seconds that Ceph may keep silent
    :returns: size and data, both in bytes
    :raises: exception.StorageVolumeNotFound, exception.StorageCephError
    """
    with _opened(image, timeout) as found:
        return found.size(), sum(
            length for _offset, length in _extents(found))


def _extents(image):
    result = []

    def note(offset, length, exists):
        if exists:
            result.append((offset, length))

    image.diff_iterate(0, image.size(), None, note)
    return result


def digest(image, key: int, timeout: int) -> tuple[int, int]:
    """Read an image for a digest of its content.

    Holes are zeroes, whoever has made them.

    :param image: a CephImage
    :param key: for the digest, a positive number of 64 bits
    :param timeout: seconds that Ceph may keep silent
    :returns: its size in bytes, and the digest, a number
    :raises: exception.StorageVolumeNotFound, exception.StorageCephError
    """
    found = hashlib.blake2b(key=key.to_bytes(8, 'big'),
                            digest_size=_DIGEST_BYTES)
    with _opened(image, timeout) as opened:
        size = opened.size()
        pieces = {number for offset, length in _extents(opened)
                  for number in range(offset // _PIECE,
                                      -(-(offset + length) // _PIECE))}
        for number in sorted(pieces):
            offset = number * _PIECE
            data = opened.read(offset, min(_PIECE, size - offset))
            if data.strip(b'\0'):
                found.update(struct.pack('>Q', offset) + data)
    found.update(struct.pack('>Q', size))
    return size, int.from_bytes(found.digest(), 'big')
