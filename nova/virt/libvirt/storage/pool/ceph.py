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

"""The images of a Ceph pool, which librbd is asked about.

libvirt is a bookkeeper of rbd pools: it opens every image to learn of a new
one, calls each failure "No such file or directory", and leaves out what it
couldn't open, so that a disk behind a sick placement group looks as if there
were none. So the XML of a storage pool says which Ceph pool that is, where its
monitors are and who logs in; and the images are librbd's, by the driver that
``images_type = rbd`` has. That there is no such image, librbd alone says.
"""

import base64
import contextlib
import functools
import os
import tempfile
import typing as ty

from oslo_log import log as logging
from oslo_utils import fileutils

import nova.conf
from nova import exception
from nova.i18n import _
from nova.storage import rbd_utils
from nova import utils

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

_PORT = '6789'
_DEFAULT_CONF = '/etc/ceph/ceph.conf'

# Seconds for which check() waits for an answer about one image; all else waits
# for as long as Ceph takes.
_ANSWER_TIMEOUT = 20


class Connection(ty.NamedTuple):
    """A connection to a cluster, and to one of its pools."""
    cluster: ty.Any
    ioctx: ty.Any


class CephPool:
    """The Ceph pool that a storage pool of this host is over.

    :param conn: this host's libvirt, which keeps the secret
    :param pool: the StoragePool
    :param config: its LibvirtConfigStoragePool
    :cvar has_asked_for_secrets: whether any has asked libvirt for its secret
    """

    has_asked_for_secrets = False

    def __init__(self, conn, pool, config):
        self._conn = conn
        self._pool = pool
        self._source = config.source

    @property
    def name(self) -> str:
        """The Ceph pool's name."""
        return self._source.name

    @property
    def user(self) -> str | None:
        """Who logs in to Ceph, without ``client.``."""
        return self._source.auth.username if self._source.auth else None

    @property
    def monitors(self) -> list[tuple[str, str]]:
        """Address and port of each monitor, as for the XML of a guest."""
        return [(host, port or _PORT) for host, port in self._source.hosts]

    @functools.cached_property
    def secret_uuid(self) -> str | None:
        """UUID of libvirt's secret with the key; None without authentication.

        :raises: exception.StorageCephError if there is no such secret
        """
        auth = self._source.auth
        if auth is None:
            return None
        if auth.secret_uuid:
            return auth.secret_uuid
        with self._secret_errors():
            return self._conn.secretLookupByUsage(
                libvirt.VIR_SECRET_USAGE_TYPE_CEPH,
                auth.secret_usage).UUIDString()

    def key(self) -> str | None:
        """The key to log in with; None if libvirt keeps it to itself.

        :raises: exception.StorageCephError if there is no such secret
        """
        if self.secret_uuid is None:
            return None
        with self._secret_errors():
            secret = self._conn.secretLookupByUUIDString(self.secret_uuid)
        try:
            return base64.b64encode(secret.value()).decode()
        except libvirt.libvirtError as e:
            # Defined with private='yes', it is for QEMU alone.
            LOG.debug('The keyring of Ceph is used for storage pool %(pool)s, '
                      'as its secret can not be read: %(error)s',
                      {'pool': self._pool.name, 'error': e})
            return None

    @contextlib.contextmanager
    def _secret_errors(self):
        CephPool.has_asked_for_secrets = True
        try:
            yield
        except libvirt.libvirtError as e:
            raise self._error(_('its secret: %s') % e.get_error_message(),
                              e.get_error_code()) from e

    # librbd and the programs of Ceph

    @functools.cached_property
    def driver(self) -> rbd_utils.RBDDriver:
        """The RBDDriver of this pool, told what the pool's XML says.

        :raises: exception.StorageCephError
        """
        path = self._write_conf()
        with self.errors():
            return rbd_utils.RBDDriver(
                pool=self.name, user=self.user, ceph_conf=path)

    def _write_conf(self):
        """Have a configuration for Ceph, with what the pool's XML says.

        It goes behind what the host's own says, which is thus overruled: the
        programs of Ceph take no key but from a file.
        """
        directory = os.path.join(CONF.state_path, 'ceph')
        path = os.path.join(directory, '%s.conf' % self._pool.name)
        wanted = self._conf()
        try:
            with open(path) as f:
                if f.read() == wanted:
                    return path
        except OSError:
            pass
        try:
            fileutils.ensure_tree(directory, 0o700)
            # Nobody else's to read from its first byte on.
            handle, made = tempfile.mkstemp(dir=directory)
            with fileutils.remove_path_on_error(made), (
                    os.fdopen(handle, 'w')) as f:
                f.write(wanted)
                f.flush()
                os.replace(made, path)
        except OSError as e:
            raise self._error(e, e.errno) from e
        return path

    def _conf(self):
        lines = [_read(CONF.libvirt.images_rbd_ceph_conf or _DEFAULT_CONF),
                 '[global]',
                 # The timeout that rados.connect() is given it ignores, and
                 # waits five minutes.
                 'client_mount_timeout = %d' %
                 CONF.libvirt.rbd_connect_timeout]
        if self.monitors:
            lines.append('mon_host = %s' % ','.join(
                '%s:%s' % (bracketed(host), port)
                for host, port in self.monitors))
        key = self.key()
        if key is not None:
            lines += ['[client.%s]' % (self.user or 'admin'),
                      'key = %s' % key]
        return '\n'.join([*lines, ''])

    @contextlib.contextmanager
    def errors(self, volume: str | None = None):
        """Turn the errors of librbd and librados into Nova's.

        :param volume: the image that is acted upon
        """
        try:
            yield
        except exception.NovaException:
            raise
        except RuntimeError as e:
            # RBDDriver's, of the Python modules
            raise self._error(e) from e
        except Exception as e:
            names = {'pool': self._pool.name, 'host': self._pool.host,
                     'volume': volume, 'reason': e,
                     'code': getattr(e, 'errno', None)}
            if volume and isinstance(e, rbd_utils.rbd.ImageNotFound):
                raise exception.StorageVolumeNotFound(**names) from e
            if volume and isinstance(e, rbd_utils.rbd.ImageExists):
                raise exception.StorageVolumeExists(**names) from e
            if isinstance(e, (rbd_utils.rbd.ImageBusy,
                              rbd_utils.rbd.ImageHasSnapshots)):
                raise exception.StorageImageBusy(**names) from e
            if isinstance(e, (rbd_utils.rbd.Error, rbd_utils.rados.Error)):
                raise self._error(e, names['code']) from e
            raise

    def _error(self, reason, code=None):
        return exception.StorageCephError(
            pool=self._pool.name, host=self._pool.host, reason=reason,
            code=code)

    # The images

    @functools.cached_property
    def cluster(self) -> str:
        """What no two clusters have in common.

        :raises: exception.StorageCephError
        """
        with self.errors():
            return self.driver.get_fsid()

    @functools.cached_property
    def identity(self) -> str:
        """What no two Ceph pools have in common, whatever hosts call them.

        :raises: exception.StorageCephError
        """
        return '%s/%s' % (self.cluster, self.name)

    def check(self, names: ty.Iterable[str] = ()) -> None:
        """Check that Ceph answers, for images too: it may be half away.

        An image that isn't there is none of this check's business.

        :param names: of images that somebody is going to need
        :raises: exception.StorageCephError, after some seconds
        """
        with self.errors(), self.connected(_ANSWER_TIMEOUT) as client:
            open_image = utils.tpool_wrap(rbd_utils.rbd.Image)
            for name in names:
                with contextlib.suppress(rbd_utils.rbd.ImageNotFound):
                    open_image(client.ioctx, name, read_only=True).close()

    @contextlib.contextmanager
    def connected(self, timeout: int):
        """A connection by which no operation waits for longer than that.

        To be used within errors().

        :param timeout: seconds for one operation on one object
        :returns: a context manager, which gives a Connection
        """
        driver = self.driver
        with contextlib.ExitStack() as stack:
            cluster = utils.tpool_wrap(rbd_utils.rados.Rados(
                rados_id=driver.rbd_user, conffile=driver.ceph_conf,
                conf={'rados_osd_op_timeout': str(timeout)}))
            stack.callback(cluster.shutdown)
            cluster.connect(timeout=driver.rbd_connect_timeout)
            ioctx = cluster.open_ioctx(self.name)
            stack.callback(ioctx.close)
            yield Connection(cluster, ioctx)

    def names(self) -> set[str]:
        """Names of all images, by one call.

        :raises: exception.StorageCephError
        """
        with self.errors(), rbd_utils.RADOSClient(self.driver) as client:
            return set(rbd_utils.RbdProxy().list(client.ioctx))

    def get(self, name: str) -> 'CephImage':
        """The image of that name.

        :raises: exception.StorageVolumeNotFound, exception.StorageCephError
        """
        image = CephImage(self._pool, self, name)
        image.size()
        return image

    def images(self) -> list['CephImage']:
        """All images.

        :raises: exception.StorageCephError
        """
        return [CephImage(self._pool, self, name)
                for name in sorted(self.names())]

    def sizes(self) -> tuple[int, int]:
        """Bytes of the cluster, and those that are left for this pool.

        libvirt tells the room of all devices, and forgets about replicas.

        :raises: exception.StorageCephError
        """
        try:
            with self.errors():
                info = self.driver.get_pool_info()
        except (exception.StorageError, exception.NotFound) as e:
            raise self._error(e) from e
        return info['total'], info['free']


class CephImage:
    """An image of a Ceph pool, with the face of a StorageVolume.

    :ivar pool: the StoragePool
    :ivar name: the image's name
    """

    def __init__(self, pool, ceph: CephPool, name: str):
        self.pool = pool
        self.name = name
        self._ceph = ceph

    @property
    def path(self) -> str:
        """What qemu-img calls it."""
        parts = ['rbd:%s/%s' % (self._ceph.name, self.name)]
        if self._ceph.user:
            parts.append('id=%s' % self._ceph.user)
        parts.append('conf=%s' % self._ceph.driver.ceph_conf)
        return ':'.join(parts)

    @property
    def key(self) -> str:
        return '%s/%s' % (self._ceph.name, self.name)

    def size(self) -> int:
        """The size in bytes.

        :raises: exception.StorageVolumeNotFound, exception.StorageCephError
        """
        with self._ceph.errors(self.name):
            return self._ceph.driver.size(self.name)

    physical = size

    def file_bytes(self) -> tuple[int, int]:
        """Size and allocation; what is allocated, Ceph doesn't count."""
        size = self.size()
        return size, size

    def resize(self, capacity: int, allocate: bool = False) -> None:
        """Give the image another size in bytes; nothing is allocated.

        :raises: exception.StorageVolumeNotFound, exception.StorageCephError
        """
        with self._ceph.errors(self.name):
            self._ceph.driver.resize(self.name, capacity)

    def delete(self) -> None:
        """Delete the image; one that is gone is fine.

        Whoever has it open is waited for, as [libvirt]/
        rbd_destroy_volume_retries says.

        :raises: exception.StorageImageBusy, exception.StorageCephError
        """
        try:
            with self._ceph.errors(self.name):
                self._ceph.driver.destroy_volume(self.name)
                is_left = self._ceph.driver.exists(self.name)
        except exception.StorageVolumeNotFound:
            LOG.debug('Image %(image)s of storage pool %(pool)s is gone '
                      'already', {'image': self.name, 'pool': self.pool.name})
            return
        if is_left:
            # The driver gives up without a word.
            raise exception.StorageImageBusy(
                pool=self.pool.name, volume=self.name, host=self.pool.host,
                reason=_('it has watchers, snapshots or clones'), code=None)


def _read(path: str) -> str:
    try:
        with open(path) as f:
            return f.read()
    except OSError as e:
        LOG.debug('Ceph has no configuration of its own here: %s', e)
        return ''


def bracketed(host: str) -> str:
    """An address as it stands before a port."""
    return '[%s]' % host if ':' in host and host[0] != '[' else host
