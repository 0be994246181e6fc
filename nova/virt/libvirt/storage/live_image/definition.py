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
"""The definition of a guest that goes on from the memory of another one.

What a guest has in its memory fits the devices that it had, at the addresses
that they had. So the definition that was saved along with the memory is taken,
never a new one, and a closed list of things is replaced in it by what the
driver would write for this instance: names, files, limits, consoles. Network
interfaces are left out, and media are out of the drive: the guest is to find
new ones when it goes on.
"""

import copy

from lxml import etree
from oslo_utils import units
from oslo_utils import uuidutils

from nova.i18n import _
from nova.virt.libvirt.storage.live_image import closed
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import refusal

#: The name of the snapshot in a disk.
SNAPSHOT = 'live'

# Elements that are the instance's own or are limits of the host's making.
_REPLACED = ('name', 'uuid', 'title', 'description', 'metadata', 'sysinfo',
             'memtune', 'blkiotune', 'cputune', 'resource', 'perf', 'seclabel',
             'memoryBacking', 'features/tcg', 'os/kernel', 'os/initrd')
# Of disks likewise.
_DISK_REPLACED = ('driver', 'source', 'backingStore', 'iotune')

# What libvirt gives a guest's screen beyond what it is told to, at the most.
_VIDEO_KIB = 256 * units.Ki


class _Values(list):
    """What differs, each with what was saved and what there would be."""

    def compare(self, what, saved, wanted):
        if saved != wanted:
            self.append(_('%(what)s: %(saved)s in the image, %(wanted)s '
                          'here') % {'what': what, 'saved': saved,
                                     'wanted': wanted})


def make(description: memory_file.Description, own: str,
         instance_uuid: str) -> str:
    """Make the definition of a guest.

    :param description: of the memory that it is to go on from
    :param own: the XML that the driver would start the instance with
    :returns: XML, without interfaces and media
    :raises: memory_file.Unfit if the first is none that Nova has written;
        memory_file.Unusable if the two differ in what can't be replaced
    """
    saved, wanted = refusal.parse(description.domain), refusal.parse(own)
    closed.check(saved)
    _compare(description, saved, wanted, instance_uuid)
    saved.attrib.pop('id', None)
    for path in _REPLACED:
        _replace(saved, wanted, path)
    _set_generation_id(saved)
    _replace_cpuset(saved, wanted)
    for element in saved.xpath('devices/interface | devices/emulator'):
        element.getparent().remove(element)
    for disk in saved.iterfind('devices/disk'):
        _replace_disk(disk, _counterpart(disk, wanted))
    _replace_consoles(saved, wanted)
    _replace_randomness(saved, wanted)
    return etree.tostring(saved, encoding='unicode')


def machine_of(description: memory_file.Description) -> tuple[str, str]:
    """Tell the machine that the guest had.

    :returns: architecture and type of machine, e.g. pc-i440fx-7.2
    :raises: memory_file.Unfit if its definition doesn't say it
    """
    kind = refusal.parse(description.domain).find('os/type[@arch][@machine]')
    if kind is None:
        raise memory_file.Unfit(
            _('its definition does not name a type of machine'))
    return kind.get('arch'), kind.get('machine')


def has_config_drive(description: memory_file.Description) -> bool:
    """:returns: whether the guest had a drive for one"""
    return refusal.parse(description.domain).find(
        "devices/disk[@device='cdrom']") is not None


def cpu_of(description: memory_file.Description) -> str | None:
    """:returns: XML of the CPU that the guest had"""
    cpu = refusal.parse(description.domain).find('cpu')
    return None if cpu is None else etree.tostring(cpu, encoding='unicode')


def snapshot(domain: str) -> str:
    """The snapshot that a defined guest is to go on from.

    :param domain: what :func:`make` has returned
    :returns: XML of a domainsnapshot
    """
    definition = refusal.parse(domain)
    root = etree.Element('domainsnapshot')
    etree.SubElement(root, 'name').text = SNAPSHOT
    etree.SubElement(root, 'state').text = 'running'
    etree.SubElement(root, 'creationTime').text = '0'
    etree.SubElement(root, 'memory', snapshot='internal')
    disks = etree.SubElement(root, 'disks')
    for disk in definition.iterfind('devices/disk'):
        etree.SubElement(
            disks, 'disk', name=disk.find('target').get('dev'),
            snapshot='internal' if _is_disk(disk) else 'no')
    root.append(definition)
    return etree.tostring(root, encoding='unicode')


def _is_disk(disk):
    return disk.get('device', 'disk') == 'disk'


def _compare(description, saved, wanted, instance_uuid):
    different = _Values()
    different.compare(_('type of hypervisor'), saved.get('type'),
                      wanted.get('type'))
    different.compare(_('architecture'), saved.find('os/type').get('arch'),
                      wanted.find('os/type').get('arch',
                      saved.find('os/type').get('arch')))
    for what, path in ((_('memory (KiB)'), 'string(memory)'),
                       (_('CPUs'), 'string(vcpu)')):
        different.compare(what, saved.xpath(path), wanted.xpath(path))
    if _video_memory(saved) > _video_memory(wanted) + _VIDEO_KIB:
        different.compare(_('video memory (KiB)'), _video_memory(saved),
                          _video_memory(wanted))
    different.compare(_('memory (MiB)'), description.memory_mb,
                      int(wanted.findtext('memory')) // 1024)
    different.compare(_('disks'), _disks(saved), _disks(wanted))
    if different:
        raise memory_file.Unusable('; '.join(different))
    # What the flavor or the image asks for, and the memory can't have.
    refused = refusal.reasons(instance_uuid, wanted)
    if refused:
        raise memory_file.Unusable('; '.join(refused))


def _video_memory(domain):
    """In KiB, as libvirt counts it."""
    try:
        return sum(map(int, domain.xpath(' | '.join(
            'devices/video/model/@' + name
            for name in ('ram', 'vram', 'vram64', 'vgamem')))))
    except ValueError as e:
        raise memory_file.Unfit(
            _('its video memory can not be read: %s') % e) from e


def _disks(domain):
    return ', '.join(sorted(
        '%s %s (%s)' % (disk.get('device', 'disk'), target.get('dev'),
                        target.get('bus'))
        for disk in domain.iterfind('devices/disk')
        for target in disk.iterfind('target')))


def _replace(saved, wanted, path):
    """Put the other one's elements in the place of these."""
    parent_path, _slash, tag = path.rpartition('/')
    parent = saved.find(parent_path) if parent_path else saved
    if parent is None:
        return
    for old in parent.findall(tag):
        parent.remove(old)
    for new in wanted.findall(path):
        parent.append(copy.deepcopy(new))


def _set_generation_id(saved):
    # libvirt makes another one when the guest goes on; before that, domain
    # and snapshot have the same.
    found = saved.find('genid')
    if found is not None:
        found.text = uuidutils.generate_uuid()


def _replace_cpuset(saved, wanted):
    ours, theirs = saved.find('vcpu'), wanted.find('vcpu')
    ours.attrib.pop('cpuset', None)
    if theirs.get('cpuset'):
        ours.set('cpuset', theirs.get('cpuset'))


def _counterpart(disk, wanted):
    dev = disk.find('target').get('dev')
    return next(other for other in wanted.iterfind('devices/disk')
                if other.find('target').get('dev') == dev)


def _replace_disk(disk, other):
    for tag in _DISK_REPLACED:
        for old in disk.findall(tag):
            disk.remove(old)
    disk.set('type', other.get('type'))
    replaced = [tag for tag in _DISK_REPLACED
                if tag != 'source' or _is_disk(disk)]
    for position, new in enumerate(
            other.find(tag) for tag in replaced
            if other.find(tag) is not None):
        disk.insert(position, copy.deepcopy(new))
    if not _is_disk(disk):
        # An empty drive is none of a volume.
        disk.set('type', 'file')


def _replace_consoles(saved, wanted):
    """Logs, sockets and ports are files and numbers of the host's."""
    logs = wanted.xpath('devices/*/log/@file')
    for log in saved.xpath('devices/*/log'):
        if logs:
            log.set('file', logs[0])
        else:
            log.getparent().remove(log)
    for tag in ('serial', 'console', 'channel'):
        others = wanted.findall('devices/' + tag)
        for device in saved.findall('devices/' + tag):
            _replace_source(device, others)
    graphics = wanted.findall('devices/graphics')
    for old in saved.findall('devices/graphics'):
        new = next((other for other in graphics
                    if other.get('type') == old.get('type')), None)
        if new is None:
            _make_local(old)
        else:
            old.getparent().replace(old, copy.deepcopy(new))


def _replace_source(device, others):
    device.attrib.pop('tty', None)
    for source in device.findall('source'):
        device.remove(source)
    other = next((
        other for other in others
        if other.get('type') == device.get('type') and
        _target_name(other) == _target_name(device)), None)
    source = None if other is None else other.find('source')
    if source is not None:
        device.insert(0, copy.deepcopy(source))


def _target_name(device):
    target = device.find('target')
    return None if target is None else target.get('name')


def _make_local(graphics):
    """The guest has this one though the instance asks for none."""
    kind = graphics.get('type')
    graphics.clear()
    graphics.set('type', kind)
    graphics.set('autoport', 'yes')
    graphics.set('listen', '127.0.0.1')


def _replace_randomness(saved, wanted):
    """The device is the guest's, and source and rate of its bytes are not."""
    ours = wanted.find('devices/rng/backend')
    for rate in saved.findall('devices/rng/rate'):
        rate.getparent().remove(rate)
    for backend in saved.findall('devices/rng/backend'):
        for rate in wanted.findall('devices/rng/rate'):
            backend.addprevious(copy.deepcopy(rate))
        if ours is None:
            new = etree.Element('backend', model='random')
            new.text = '/dev/urandom'
        else:
            new = copy.deepcopy(ours)
        backend.getparent().replace(backend, new)
