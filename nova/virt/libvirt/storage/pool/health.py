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

"""Whether the pools are well that an instance needs."""

import typing as ty

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.virt.libvirt.storage.pool import setup

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# services.disabled_reason has 255 characters, with the driver's "AUTO: ".
_REASON_LENGTH = 240


def ready_for(get_connection, disks) -> None:
    """Start the pools that an instance's disks are in, if they are off.

    Ceph is asked for the disks: what then waited for it, with the guest off,
    would wait for as long as it is away.

    To be called while the guest still runs.

    :param get_connection: gives the connection to this host's libvirt; not
        asked for disks that are in no pool
    :param disks: the instance's InstanceDisks
    :raises: exception.StoragePoolError if one of them can't be started,
        exception.StorageCephError if Ceph is away,
        exception.StoragePoolIsAnother if it can't have the disks,
        exception.InvalidDiskMetadata
    """
    here = [record if record.host == CONF.host else record.previous
            for _name, record in disks.items()]
    volumes: dict[str, list] = {}
    for record in here:
        if (record is not None and record.pool and
                record.host == CONF.host):
            volumes.setdefault(record.pool, []).append(record)
    if not volumes:
        return
    connection = get_connection()
    for name in sorted(volumes):
        pool = setup.pool_named(connection, name)
        for record in volumes[name]:
            if pool.kind().is_ceph != record.is_on_ceph:
                raise exception.StoragePoolIsAnother(
                    pool=name, host=CONF.host, volume=record.volume,
                    type=pool.config().type)
        _start(pool, sorted(record.volume for record in volumes[name]))


def _start(pool, needed=()):
    """Start a pool if it is off, and Ceph answers if it is over Ceph."""
    images = pool.ceph()
    if images is not None:
        # First: libvirt would wait for it, too, and not say why.
        images.check(needed)
    pool.start()


def why_no_new_instance(connection) -> str | None:
    """Why this host can't make the disks that every instance has.

    :param connection: to this host's libvirt
    :returns: None if it can
    """
    for name in sorted({setup.pool_name_for('disk'),
                        setup.pool_name_for('disk.config')}):
        pool = setup.pool_named(connection, name)
        try:
            if pool.exists() and pool.kind().is_ceph:
                # It may be off since Ceph was away when the host came up.
                _start(pool)
            elif not pool.is_active():
                raise exception.StoragePoolInactive(pool=name, host=CONF.host)
            pool.check_mounted()
        except exception.StoragePoolError as e:
            return e.format_message()
    return None


class Offering:
    """Keeps a host from the scheduler for as long as its pools are off.

    :param set_enabled: called with whether the compute service is to be
        enabled, and why it isn't; leaves alone what an operator has disabled
    """

    def __init__(self, set_enabled: ty.Callable[[bool, str], None]):
        self._set_enabled = set_enabled
        self._reason: str | None = None

    def check(self, connection) -> None:
        """Look at the pools; to be called with each report of the host.

        :param connection: to this host's libvirt
        """
        before, self._reason = self._reason, None
        if CONF.libvirt.images_type == 'libvirt-storage':
            self._reason = why_no_new_instance(connection)
        if self._reason:
            if self._reason != before:
                LOG.error('No new instance can be made on this host, and none '
                          'is sent here: %s', self._reason)
            # Each time: what has enabled it since doesn't know of this.
            self._set_enabled(False, self._reason[:_REASON_LENGTH])
        elif before:
            LOG.info('New instances can be made on this host again')
            self._set_enabled(True, '')
