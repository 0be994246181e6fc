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
"""What a disk's own header may say; knows nothing of pools, records or moves.

A disk that Nova hasn't made itself, or not on this host, is looked at here
before anything interprets it, whatever way it came: by a move, by a transition
or as a base image. Its format is given, never guessed.
"""

import struct

from oslo_log import log as logging
from oslo_utils.imageutils import format_inspector
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
import nova.privsep.storage
from nova.virt import images

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Longer than what the inspector and we read of a header of qcow2.
_HEADER_LENGTH = 4096

# Bytes of QEMU's memory for what an image's dirty bitmaps say. Of a disk of
# 1 TiB one takes 2 MiB.
_MOST_NOTED = 256 * units.Mi

# By which libvirt tells a ploop image.
_PLOOP = b'WithouFreSpacExt'


def look_at_qcow2(path, size=0):
    """Refuse a qcow2 file that would make QEMU open another file, or fail.

    A backing file is the caller's to judge: image_cache.checked_base().
    The header is read first, by us: qemu-img opens what it names.

    :param path: of the file on this host
    :param size: bytes of virtual size that it may have at most, 0 for any
    :returns: what qemu-img says of it, an imageutils.QemuImgInfo
    :raises: UnsafeDiskContent
    """
    header = nova.privsep.storage.read_start(path, _HEADER_LENGTH)
    for name, fault in _header_faults(header):
        _refuse(path, name, fault)
    info = images.privileged_qemu_img_info(
        path, format=fields.LibvirtDiskFormat.QCOW2)
    # As QEMU understands it. That should never differ.
    data = (info.format_specific or {}).get('data') or {}
    if data.get('data-file'):
        _refuse(path, 'data_file', _('its data is in another file'))
    if info.snapshots:
        _refuse(path, 'snapshots', _('it has internal snapshots'))
    if info.encrypted:
        _refuse(path, 'encryption', _('it is encrypted'))
    if data.get('corrupt'):
        _refuse(path, 'corrupt', _('it is marked as corrupt'))
    noted = sum(info.virtual_size // bitmap['granularity']
                for bitmap in data.get('bitmaps', ())) // 8
    if noted > _MOST_NOTED:
        _refuse(path, 'bitmaps', _('its dirty bitmaps take %d bytes of '
                                   'memory') % noted)
    if size and info.virtual_size > size:
        _refuse(path, 'size', _('its virtual size is %(is)d bytes, and '
                                'the record says %(wanted)d') % {
                                    'is': info.virtual_size, 'wanted': size})
    return info


def look_at_raw(path, length, size):
    """Refuse a raw file of which a guest would see more than it has.

    :param path: of the file on this host, or the name of an image of Ceph
    :param length: bytes that it has
    :param size: bytes that it may have at most, 0 for any
    :raises: UnsafeDiskContent
    """
    if size and length > size:
        _refuse(path, 'size', _('it has %(is)d bytes, and %(wanted)d are on '
                                'record') % {'is': length, 'wanted': size})


def _header_faults(header):
    inspector = format_inspector.get_inspector(
        fields.LibvirtDiskFormat.QCOW2)()
    inspector.eat_chunk(header)
    inspector.finish()
    try:
        inspector.safety_check()
        failed = {}
    except format_inspector.SafetyCheckFailed as e:
        failed = dict(e.failures)
    except format_inspector.ImageFormatError:
        yield 'header', _('it has no whole header of qcow2')
        return
    version, = struct.unpack_from('>I', header, 4)
    crypt, = struct.unpack_from('>I', header, 32)
    snapshots, = struct.unpack_from('>I', header, 60)
    failed.pop('backing_file', None)
    if version == 2:
        # It has no features: what the inspector reads there is something
        # else.
        failed.pop('data_file', None)
    for name, failure in failed.items():
        yield name, str(failure)
    if crypt:
        yield 'encryption', _('it is encrypted')
    if snapshots:
        yield 'snapshots', _('it has internal snapshots')


def is_ploop(path):
    """Whether libvirt takes a raw disk for ploop, hence for a directory.

    libvirt itself isn't asked: it would open what a header names.

    :param path: of the file on this host
    :returns: whether its first bytes are ploop's; False if root can't read it
    """
    try:
        return nova.privsep.storage.read_start(
            path, len(_PLOOP)) == _PLOOP
    except (OSError, ValueError) as e:
        LOG.debug('%(path)s is not looked at: %(error)s',
                  {'path': path, 'error': e})
        return False


def _refuse(path, check, fault):
    LOG.warning('Disk %(path)s failed check %(check)s: %(fault)s',
                {'path': path, 'check': check, 'fault': fault})
    raise exception.UnsafeDiskContent(path=path, reason=fault)


def look_at_base(path):
    """Refuse a base image that is no image by itself.

    :param path: of the file, in the image cache or on its way there
    :raises: UnsafeDiskContent
    """
    if CONF.workarounds.disable_deep_image_inspection:
        return
    try:
        images.get_image_format(path).safety_check()
    except (format_inspector.SafetyCheckFailed,
            format_inspector.ImageFormatError) as e:
        _refuse(path, 'base image', str(e))
