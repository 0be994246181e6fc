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
"""Which guests can't be saved with their memory, and why.

Asks the definition that a guest runs with, and nothing else: what is in a
memory can't be given to another guest when it belongs to the host, is a
secret of this guest alone, or lies outside the disks that are copied.
"""

import typing as ty

from lxml import etree

from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.live_image import memory_file

ROOT_DISK = 'disk'
CONFIG_DRIVE = 'disk.config'


class Rule(ty.NamedTuple):
    """What must not be in a definition.

    :ivar xpath: of what must not be found
    :ivar reason: why
    """
    xpath: str
    reason: str


RULES = (
    Rule("self::*[not(@type='kvm' or @type='qemu')]",
         _('[libvirt]/virt_type is neither kvm nor qemu')),
    Rule('self::*[not(genid)]',
         _('it has no virtual machine generation ID; hard reboot it once on a '
           'host with [libvirt]/live_images')),
    Rule("os[@firmware='efi'] | os/loader[@type='pflash'] | os/nvram",
         _('it boots by UEFI, whose variables lie in a file of their own')),
    Rule("cpu[@mode='host-passthrough' or @mode='maximum']",
         _("it has the CPU of this host as it is; set [libvirt]/cpu_mode to "
           "host-model or custom")),
    Rule('devices/tpm', _('it has a TPM, whose secrets are its own')),
    Rule('launchSecurity', _('its memory is encrypted')),
    Rule('devices/hostdev', _('it has a device of this host (PCI, vGPU)')),
    Rule("devices/interface[@type='hostdev' or @type='direct' or "
         "@type='vdpa' or @type='vhostuser']",
         _('it has an interface that is a device of this host (SR-IOV, '
           'macvtap, vDPA, vhost-user)')),
    Rule('devices/filesystem', _('it has a share of a file system')),
    Rule('devices/memory', _('it has memory modules, such as vPMEM')),
    Rule('memoryBacking/hugepages | memoryBacking/source | '
         'memoryBacking/access',
         _('its memory lies in huge pages or in a file')),
    Rule('numatune', _('its memory is bound to NUMA nodes of this host')),
    Rule('cputune/vcpupin | cputune/vcpusched',
         _('it has dedicated or real-time CPUs')),
    Rule("devices/serial[@type='tcp'] | devices/console[@type='tcp']",
         _('it has serial consoles on ports of this host')),
    Rule("*[namespace-uri()='http://libvirt.org/schemas/domain/qemu/1.0']",
         _('its definition has arguments of QEMU that libvirt does not '
           'know')),
    Rule('devices/disk/encryption | devices/disk/source/encryption',
         _('a disk is encrypted')),
    Rule('devices/disk/shareable', _('a disk is shared with other guests')),
    Rule("devices/disk[@device='lun' or @device='floppy']",
         _('it has a disk that is a SCSI device or a floppy')),
)


def parse(xml: str):
    """Read a definition.

    :returns: an lxml element
    :raises: memory_file.Unfit if it isn't well-formed
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True,
                             remove_blank_text=True, remove_comments=True,
                             remove_pis=True)
    try:
        return etree.fromstring(xml, parser)
    except (etree.XMLSyntaxError, ValueError) as e:
        raise memory_file.Unfit(
            _('its definition can not be read: %s') % e) from e


def disk_name(instance_uuid: str, disk) -> str | None:
    """The name of one of an instance's pool disks, such as ``disk.eph0``.

    :param disk: an element of a definition
    :returns: None if it is something else
    """
    volume = disk.find('source').get('volume', '') if (
        disk.get('type') == 'volume' and disk.find('source') is not None
    ) else ''
    prefix = instance_uuid + '_'
    if not volume.startswith(prefix):
        return None
    # Of two of the same name the later one has a number.
    name = volume.removeprefix(prefix)
    head, _dot, tail = name.rpartition('.')
    return head if tail.isdigit() and head else name


def _is_on_ceph(instance_uuid, disk):
    source = disk.find("source[@protocol='rbd']")
    return source is not None and (
        '/%s_' % instance_uuid in source.get('name', ''))


def reasons(instance_uuid: str, domain) -> list[str]:
    """Why a guest can't be saved with its memory, in the order of RULES.

    :param domain: the definition that it runs with, an lxml element
    """
    found = [rule.reason for rule in RULES if domain.xpath(rule.xpath)]
    root = on_ceph = False
    for disk in domain.iterfind('devices/disk'):
        if _is_on_ceph(instance_uuid, disk):
            on_ceph = True
            continue
        name = disk_name(instance_uuid, disk)
        device = disk.get('device', 'disk')
        if device == 'disk' and name == ROOT_DISK:
            root = True
        elif device == 'cdrom' and (
                name == CONFIG_DRIVE or disk.find('source') is None):
            continue
        elif name == CONFIG_DRIVE:
            found.append(_('its config drive is a writable disk; set '
                           'config_drive_format to iso9660'))
        else:
            found.append(_(
                'it has disk %s besides the root disk: a volume of Cinder, an '
                'ephemeral disk, swap or another medium') %
                disk.find('target').get('dev'))
    if on_ceph:
        found.append(_('a disk is on Ceph, and not a file in a storage pool'))
    elif not root:
        found.append(_('its root disk is not in a storage pool; set '
                       '[libvirt]/images_type to libvirt-storage and hard '
                       'reboot it'))
    return found


def check(instance_uuid: str, domain) -> None:
    """:raises: exception.LiveImageRefused if a guest can't be saved so"""
    found = reasons(instance_uuid, domain)
    if found:
        raise exception.LiveImageRefused(
            instance_uuid=instance_uuid, reason='; '.join(found))
