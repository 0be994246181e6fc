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
"""What a guest writes to its disks while these are sent ahead.

QEMU notes it in a dirty bitmap of each qcow2 image, from the moment on at
which a libvirt checkpoint is made. When it ends it stores the bitmaps in the
images; one that was killed stores none, or leaves one that says so itself.

Whatever goes wrong here costs time: all of the disk is read once more.
"""

import typing as ty

from lxml import etree
from oslo_concurrency import processutils
from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import uuidutils

from nova import exception
from nova.objects import fields
import nova.privsep.qemu
from nova.virt import images
from nova.virt.libvirt import config as guest_config
from nova.virt.libvirt.storage.move import dirty
from nova.virt.libvirt.storage.pump import transfer as pump

try:
    import libvirt
except ImportError:
    libvirt = None

LOG = logging.getLogger(__name__)

# Each move has a name of its own: a bitmap that is left may travel along.
_PREFIX = 'nova-move-'


class Bitmaps:
    """The dirty bitmaps of an instance's disks, for one move.

    :param host: the Host
    :param instance: the instance
    """

    def __init__(self, host, instance):
        self._host = host
        self._instance = instance
        self._name: str | None = None
        self._sent: dict[ty.Any, int] = {}

    def begin(self, items) -> None:
        """Have QEMU note from now on what is written, where it can do that.

        :param items: the disks of which a first pass follows
        """
        try:
            self._begin(items)
        except _errors() as e:
            self._sent = {}
            LOG.info('The disks are read once more as a whole when the server '
                     'is off, as QEMU can not note what is written to them: '
                     '%s', e, instance=self._instance)

    def _begin(self, items):
        guest = self._host.get_guest(self._instance)
        if not guest.is_active():
            return
        disks = _disks(guest)
        noted = {item: device for item in items
                 if (device := _device_of(item, disks)) and
                 _can_note(item) and not _has_job(device, guest)}
        if not noted:
            return
        self._name = _PREFIX + uuidutils.generate_uuid(dashed=False)
        self._sent = {item: item.length for item in noted}
        guest.create_checkpoint(_checkpoint(
            self._name, [device.target_dev for device in noted.values()],
            [device.target_dev for device in disks]))

    def changed(self, item) -> pump.Ranges | None:
        """What of a disk may have changed since begin(); the guest is off.

        Nothing of it stays in the image.

        :returns: (offset, length) in bytes of its file, in order; None if
            that isn't known
        """
        sent = self._sent.pop(item, None)
        if sent is None:
            return None
        try:
            found = self._take(item, sent)
        except (*_errors(), ValueError, KeyError, OSError) as e:
            LOG.warning('All of volume %(volume)s is read once more, as it is '
                        'not known what was written to it: %(error)s',
                        {'volume': item.source.name, 'error': e},
                        instance=self._instance)
            return None
        if found is None:
            LOG.info('All of volume %(volume)s is read once more, as QEMU has '
                     'left no bitmap of what was written to it',
                     {'volume': item.source.name}, instance=self._instance)
        return found

    def _take(self, item, sent):
        path, found = item.source.path, None
        info = _info(item)
        for bitmap in _left_by_moves(info):
            name = bitmap['name']
            try:
                # One that is disabled has missed writes.
                if name == self._name and bitmap['flags'] == ['auto']:
                    found = nova.privsep.qemu.read_dirty_bitmap(path, name)
            finally:
                # One of a move that was cut off, too.
                nova.privsep.qemu.remove_dirty_bitmap(path, name)
        if found is None:
            return None
        item.measure()
        mapping, clusters = map(jsonutils.loads, found)
        return dirty.changed_ranges(mapping, clusters, info.cluster_size, sent,
                                    item.length)

    def end(self) -> None:
        """Have libvirt and QEMU forget it; as often as wanted."""
        items, self._sent = list(self._sent), {}
        name, self._name = self._name, None
        if name is None:
            return
        try:
            guest = self._host.get_guest(self._instance)
            guest.delete_checkpoints(name)
            if guest.is_active():
                return
            # It has ended before anybody has asked what it wrote.
            for item in items:
                _remove_left(item.source.path, _info(item))
        except exception.InstanceNotFound:
            pass
        except _errors() as e:
            LOG.warning('Checkpoint %(name)s of the guest is left until '
                        'nova-compute is started anew, or a bitmap of that '
                        'name in its disks: %(error)s',
                        {'name': name, 'error': e}, instance=self._instance)


def forget(volume, info, instance) -> None:
    """Delete from an image what moves have left that were cut off.

    qemu-img doesn't grow an image with a bitmap that was never closed, which
    a host leaves that crashes.

    :param volume: the StorageVolume of a disk whose guest is off
    :param info: what qemu-img says of it, an imageutils.QemuImgInfo
    :param instance: whose it is
    """
    try:
        _remove_left(volume.path, info)
    except _errors() as e:
        LOG.warning('A bitmap of an earlier move is left in volume '
                    '%(volume)s: %(error)s',
                    {'volume': volume.name, 'error': e}, instance=instance)


def recover(host) -> None:
    """Delete what moves have left that this service was killed in.

    :param host: the Host
    """
    for guest in host.list_guests(only_running=False):
        try:
            names = guest.delete_checkpoints(_PREFIX)
        except _errors() as e:
            LOG.debug('Checkpoints of %(guest)s are not known: %(error)s',
                      {'guest': guest.name, 'error': e})
            continue
        for name in names:
            LOG.info('Deleted checkpoint %(name)s of guest %(guest)s, which a '
                     'move has left that was cut off',
                     {'name': name, 'guest': guest.name})


def _errors():
    return (libvirt.libvirtError, exception.NovaException,
            processutils.ProcessExecutionError)


def _disks(guest):
    return [device for device in guest.get_config().devices
            if isinstance(device, guest_config.LibvirtConfigGuestDisk)]


def _device_of(item, disks):
    volume = item.source
    for device in disks:
        # libvirt takes no checkpoint of a config drive.
        if device.source_device == 'cdrom' or device.readonly:
            continue
        if (device.source_pool, device.source_volume) == (
                volume.pool.name, volume.name) or (
                device.source_path == volume.path):
            return device
    return None


def _has_job(device, guest):
    """Whether QEMU may be filling clusters that the guest doesn't write to."""
    block_device = guest.get_block_device(device.target_dev)
    return block_device.get_job_info() is not None


def _info(item):
    return images.privileged_qemu_img_info(
        item.source.path, format=fields.LibvirtDiskFormat.QCOW2)


def _details(info):
    return (info.format_specific or {}).get('data') or {}


def _left_by_moves(info):
    return [bitmap for bitmap in _details(info).get('bitmaps', ())
            if bitmap['name'].startswith(_PREFIX)]


def _remove_left(path, info):
    for bitmap in _left_by_moves(info):
        nova.privsep.qemu.remove_dirty_bitmap(path, bitmap['name'])


def _can_note(item):
    """Whether an image takes bitmaps, and has its data itself."""
    record = getattr(item, 'record', None)
    if record is None or record.format != fields.LibvirtDiskFormat.QCOW2:
        return False
    details = _details(_info(item))
    return details.get('compat') == '1.1' and not details.get('data-file')


def _checkpoint(name, noted, devices):
    root = etree.Element('domaincheckpoint')
    etree.SubElement(root, 'name').text = name
    disks = etree.SubElement(root, 'disks')
    for device in devices:
        if device in noted:
            etree.SubElement(disks, 'disk', name=device, checkpoint='bitmap',
                             bitmap=name)
        else:
            etree.SubElement(disks, 'disk', name=device, checkpoint='no')
    return etree.tostring(root, encoding='unicode')
