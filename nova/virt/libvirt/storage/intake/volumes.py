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
"""The volumes that one request is about, in pools of this host.

What libvirt doesn't know of is found by the names in a pool's directory: a
refresh would look into every file of the pool.
"""

import os

import nova.conf
from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.intake import kept
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import sharing
from nova.virt.libvirt.storage.records import keeping
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF

# The mode of a new volume's file: a disk's, or of what nova alone may read.
_MODES = (0o644, 0o600)
# Of one server in one pool, however many tries have left some.
_MOST_VOLUMES = 100


class Volumes:
    """What a source may know of the pools, and have made there.

    :param connection: this host's libvirt
    :param request: the Request, whose arguments name pool and volume
    """

    def __init__(self, connection, request):
        self._connection = connection
        self._request = request

    def _pool(self):
        return storage_pool.StoragePool(
            self._connection, self._request.pool(), CONF.host)

    def look(self) -> dict:
        """Look at the pool.

        :returns: dict with ``type`` and ``free``, in bytes
        :raises: exception.MigrationPreCheckError if it can't take disks,
            exception.StoragePoolNotMounted
        """
        pool = self._pool()
        pool_type = state.check_pool(pool)
        if pool_type not in kinds.FILE_TYPES:
            raise exception.MigrationPreCheckError(reason=_(
                "try again with [libvirt]/storage_migration_transport = "
                "libvirt on this host: the volumes of storage pool %(pool)s "
                "of host %(host)s are no files, as it is of type %(type)s"
                ) % {'pool': pool.name, 'host': CONF.host,
                     'type': pool_type})
        # Else this is the room of what it should be mounted upon.
        pool.check_mounted()
        free = libvirt_utils.get_fs_info(pool.config().target_path)['free']
        return {'type': pool_type, 'free': free}

    def has(self) -> bool:
        """Whether the pool has the server's base image."""
        name = self._request.get('name', str)
        if name != self._request.base():
            raise self._request.refused(
                _("file %.80r is not its base image") % name)
        return name in self._pool().file_names()

    def probe(self) -> None:
        """Make a volume and delete it.

        :raises: exception.StorageVolumeError if it is there already
        """
        name = self._request.check_name('name')
        sharing.take_probe(self._pool(), name, self._request.instance)

    def names(self) -> list[str]:
        """The names in the pool that are the server's."""
        uuid = self._request.instance.uuid
        ours = (uuid + '_', '%s.%s' % (self._request.base(), uuid))
        return sorted(name for name in self._pool().file_names()
                      if name.startswith(ours))

    def create(self) -> None:
        """Make the volume that is on record as coming, empty."""
        length, mode = self._request.length(), self._mode()
        pool = self._pool()
        there = sum(name.startswith(self._request.instance.uuid)
                    for name in pool.file_names())
        if there >= _MOST_VOLUMES:
            # It may give each of them another name on record, and fill it.
            raise self._request.refused(
                _("it has %d volumes there already") % there)
        state.create_volume(
            pool, self._request.volume(), length,
            (os.geteuid(), os.getegid()), mode)

    def _mode(self):
        mode = self._request.get('mode', int)
        if mode not in _MODES:
            raise self._request.refused(_("mode %o") % mode)
        return mode

    def take_up(self) -> int:
        """Have a volume that was kept be the one that is on record as coming.

        :returns: bytes that it has now
        """
        length, room = self._request.length(), self._request.length('room')
        if not 0 < length <= room:
            raise self._request.refused(_(
                "%(length)d bytes of %(room)d") % {
                    'length': length, 'room': room})
        mode = self._mode()
        if not keeping.is_possible(self._connection, self._request.pool()):
            raise self._request.refused(_("it keeps no copies in pool %s") %
                                        self._request.pool())
        self._request.check_unused()
        kept.prepare(self.path(), length, room, mode)
        return room

    def path(self) -> str:
        """The path of the volume's file."""
        return self._pool().volume(self._request.volume()).path

    def delete(self, places) -> list[tuple[str, str]]:
        """Delete volumes.

        :param places: list of (pool, volume), which may be deleted
        :returns: what couldn't be
        """
        return leftovers.delete_volumes(
            self._connection, CONF.host, places, self._request.instance)
