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

"""Which storage pools a host keeps its disks in, and making or adopting them.

Knows the names of disks, and no instance.
"""

import contextlib
import errno
import os

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.i18n import _
import nova.privsep.storage
from nova.virt.libvirt.storage import disk_kinds
from nova.virt.libvirt.storage.pool import access
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import pool as storage_pool

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Of [libvirt]/virt_type, those whose disks can be in pools.
VIRT_TYPES = ('kvm', 'qemu')

# An empty file that says that a directory is, or was, Nova's image cache. Its
# path may change, and older disks are laid over the images that stay there.
CACHE_MARK = '.nova-image-cache'


def pool_name_for(disk_name: str) -> str:
    """The pool in which this host makes a disk.

    :param disk_name: e.g. ``disk`` or ``disk.eph0``
    """
    return CONF.libvirt.storage_pool_mapping.get(
        disk_kinds.of_disk(disk_name).mapped_as,
        CONF.libvirt.storage_disks_pool)


def pool_of(conn, disk_name: str) -> storage_pool.StoragePool:
    """The StoragePool of this host in which it makes a disk."""
    return pool_named(conn, pool_name_for(disk_name))


def pool_named(conn, name: str) -> storage_pool.StoragePool:
    """The StoragePool of that name of this host."""
    return storage_pool.StoragePool(conn, name, CONF.host)


def pool_names() -> list[str]:
    """The pools in which this host is configured to make disks."""
    return sorted({CONF.libvirt.storage_disks_pool,
                   *CONF.libvirt.storage_pool_mapping.values()})


def disks_pool_config() -> 'storage_config.LibvirtConfigStoragePool':
    """The pool for disks as it is made if there is none."""
    return _directory_pool(CONF.libvirt.storage_disks_pool,
                           os.path.join(CONF.instances_path, 'disks'))


def base_images_pool_config() -> 'storage_config.LibvirtConfigStoragePool':
    """The pool over the image cache as it is made if there is none."""
    return _directory_pool(
        CONF.libvirt.storage_base_images_pool, os.path.join(
            CONF.instances_path, CONF.image_cache.subdirectory_name))


def _directory_pool(name, path):
    config = storage_config.LibvirtConfigStoragePool()
    config.type = 'dir'
    config.name = name
    config.target_path = path
    # libvirt makes the directory as root; Nova puts images there and links
    # legacy disks into it.
    config.permissions = storage_pool.permissions(0o755)
    return config


def ensure_pools(conn, host: str) -> None:
    """Make or adopt all pools that this host is configured to use.

    :param conn: a libvirt.virConnect
    :param host: its name, for messages
    :raises: exception.StoragePoolError or one of its subclasses,
        exception.StorageUserForbidden, exception.StoragePrivilegeMissing,
        exception.StorageVirtTypeUnsupported, exception.InvalidConfiguration
    """
    _check_options(host)
    if CONF.libvirt.virt_type not in VIRT_TYPES:
        raise exception.StorageVirtTypeUnsupported(
            host=host, virt_type=CONF.libvirt.virt_type)
    _check_user(host)
    base_images = base_images_pool_config()
    cache = storage_pool.StoragePool.ensure(conn, base_images, host)
    _check_place(cache, base_images)
    cache.check_access(os.W_OK | os.X_OK)
    _mark_cache(base_images.target_path)
    with _unless_it_is_away(pool_named(conn, CONF.libvirt.storage_disks_pool)):
        storage_pool.StoragePool.ensure(conn, disks_pool_config(), host)
    for name in set(CONF.libvirt.storage_pool_mapping.values()):
        pool = storage_pool.StoragePool(conn, name, host)
        if not pool.exists():
            raise exception.StoragePoolNotFound(pool=name, host=host)
        with _unless_it_is_away(pool):
            pool.adopt()
    for name in pool_names():
        _check_images(pool_named(conn, name))


@contextlib.contextmanager
def _unless_it_is_away(pool):
    """Let the service start without Ceph, or a pool that libvirt can't start.

    There are guests to look after whose disks are in others.
    health.Offering keeps the host from the scheduler until it is back.
    """
    was_off = pool.exists() and not pool.is_active()
    try:
        yield
    except exception.StorageCephError as e:
        if e.kwargs['code'] != errno.ETIMEDOUT:
            raise
        LOG.error('%s', e)
    except exception.StoragePoolError as e:
        # The others say what is wrong with it, which waiting doesn't mend.
        if type(e) is not exception.StoragePoolError or (
                not was_off or pool.is_active()):
            raise
        LOG.error('%s', e)


def _check_images(pool):
    """Refuse to put anything but raw disks into Ceph, as for images_type rbd.

    :raises: exception.InvalidConfiguration
    """
    if pool.kind().is_ceph and not CONF.force_raw_images:
        raise exception.InvalidConfiguration(
            _("Set [DEFAULT]/force_raw_images = True, or name a pool that "
              "isn't over Ceph: QEMU takes raw images alone from storage pool "
              "%(pool)s of host %(host)s") % {
                  'pool': pool.name, 'host': pool.host})


def receiving_pool(conn, name: str, host: str) -> storage_pool.StoragePool:
    """A pool of this host that is to take another host's disks in.

    The one for disks is made if there is none, as at the service's start.

    :param conn: a libvirt.virConnect
    :param name: of the pool
    :param host: its name, for messages
    :raises: exception.StoragePoolError if it can't be made
    """
    if (name == CONF.libvirt.storage_disks_pool and
            CONF.libvirt.images_type == 'libvirt-storage'):
        return storage_pool.StoragePool.ensure(
            conn, disks_pool_config(), host)
    return storage_pool.StoragePool(conn, name, host)


def _check_user(host):
    """Refuse now what would fail in the middle of an operation."""
    path = CONF.instances_path
    found = access.obstacle(path, os.R_OK | os.W_OK | os.X_OK)
    if found:
        raise exception.StorageUserForbidden(
            host=host, user=access.user(), **found._asdict())
    try:
        nova.privsep.storage.names_in(path)
    except OSError as e:
        LOG.debug('%(path)s can not be listed: %(error)s',
                  {'path': path, 'error': e})
    except Exception as e:
        raise exception.StoragePrivilegeMissing(
            host=host, user=access.user(), reason=e) from e


def _check_options(host):
    """Refuse what would be ignored, or do harm later.

    :raises: exception.InvalidConfiguration
    """
    if CONF.libvirt.storage_base_images_pool in pool_names():
        # The disks in it aren't looked at for the images that they need.
        raise exception.InvalidConfiguration(
            _("Name another pool as [libvirt]/storage_base_images_pool, or "
              "for disks, on host %(host)s: storage pool %(pool)s can't be "
              "both") % {
                  'host': host, 'pool': CONF.libvirt.storage_base_images_pool})
    known = {kind.mapped_as for kind in disk_kinds.ALL}
    unknown = set(CONF.libvirt.storage_pool_mapping) - known
    if unknown:
        raise exception.InvalidConfiguration(
            _("Use the kinds %(known)s alone in "
              "[libvirt]/storage_pool_mapping on host %(host)s, and not "
              "%(unknown)s") % {
                  'known': ', '.join(sorted(known)), 'host': host,
                  'unknown': ', '.join(sorted(unknown))})


def _mark_cache(path):
    try:
        with open(os.path.join(path, CACHE_MARK), 'a'):
            pass
    except OSError as e:
        LOG.warning('Should the image cache get another path one day, disks '
                    'over the images in %(path)s can be neither moved nor '
                    'saved as images, because it could not be marked: '
                    '%(error)s', {'path': path, 'error': e})


def _check_place(pool, wanted):
    """Refuse an adopted base images pool that isn't over the image cache."""
    path = pool.config().target_path
    if os.path.realpath(path or '') != os.path.realpath(wanted.target_path):
        raise exception.StoragePoolMisplaced(
            pool=pool.name, host=pool.host, path=path,
            expected=wanted.target_path)
