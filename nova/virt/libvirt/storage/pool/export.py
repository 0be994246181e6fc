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
"""Whether a server lets libvirt and Nova write to what it exports.

libvirt makes a file as the user who is to own it, but writes and resizes it
as root. A server that makes root nobody lets a pool start and volumes be made,
and refuses the first byte.
"""

import contextlib
import errno
import os

from oslo_log import log as logging
from oslo_utils import excutils
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.pool import access
from nova.virt.libvirt.storage.pool import config as storage_config

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# No instance's: those begin with a UUID. One a host, so that none piles up.
_NAME = 'nova-probe.%s'

_FORBIDDEN = tuple(map(os.strerror, (errno.EACCES, errno.EPERM)))
_READ_ONLY = os.strerror(errno.EROFS)


def check(pool) -> None:
    """Make a volume, write to it, and delete it.

    :param pool: a StoragePool whose directory a server exports
    :raises: exception.StoragePoolNotExported if the server doesn't let that
        happen; exception.StoragePoolError, exception.StorageVolumeError
    """
    try:
        volume = _make(pool)
    except exception.InsufficientStoragePoolSpace as e:
        # That is for who wants to make a disk to say.
        LOG.debug('Storage pool %(pool)s was not tried out: %(error)s',
                  {'pool': pool.name, 'error': e})
        return
    except exception.StorageVolumeError as e:
        _refuse(pool, e, _("have user %s own it") % access.user())
        raise
    try:
        _write(volume)
    except exception.InsufficientStoragePoolSpace:
        pass
    except exception.StorageVolumeError as e:
        # Nova's user has made it.
        _refuse(pool, e, _("export it with no_root_squash"))
        raise
    finally:
        with contextlib.suppress(exception.NovaException):
            volume.delete()


def _make(pool):
    config = storage_config.LibvirtConfigStorageVolume()
    config.name = _NAME % CONF.host
    config.capacity, config.allocation = units.Mi, 0
    config.target_format = 'raw'
    try:
        return pool.create(config)
    except exception.StorageVolumeExists:
        pool.volume(config.name).delete()  # of a service that was killed
        return pool.create(config)


def _write(volume):
    with volume.libvirt_errors():
        stream = volume.raw.connect().newStream(0)
        volume.raw.upload(stream, 0, 1, 0)
        try:
            stream.send(b'\0')
            stream.finish()
        except Exception:
            with excutils.save_and_reraise_exception():
                stream.abort()


def _refuse(pool, error, advice):
    reason = error.kwargs['reason']
    if _READ_ONLY in reason:
        advice = _("export it read-write")
    elif not any(text in reason for text in _FORBIDDEN):
        return
    source = pool.config().source
    raise exception.StoragePoolNotExported(
        pool=pool.name, host=pool.host, advice=advice, reason=reason,
        source=source.dir if source else None,
        server=', '.join(name for name, _port in source.hosts)
        if source else None) from error
