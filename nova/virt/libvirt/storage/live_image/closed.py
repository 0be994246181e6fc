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
"""What may be in a definition that has come with a memory.

It was written on another host. Whoever has broken into that, or got hold of
the password of Nova's user, may have put anything into it: libvirt would give
the guest whatever files and devices of this host it names, and run QEMU with
any arguments. So what Nova doesn't give to guests that can be saved is
refused, whether or not it is known to do harm.

What names something of a host nevertheless, such as the source of a disk, is
replaced by :mod:`definition`; what is that here has no entry of its own.
"""

import collections

from nova.i18n import _
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import refusal

_TOP = frozenset((
    'name', 'uuid', 'genid', 'title', 'description', 'metadata', 'memory',
    'maxMemory', 'currentMemory', 'memoryBacking', 'memtune', 'blkiotune',
    'vcpu', 'vcpus', 'iothreads', 'iothreadids', 'cputune', 'resource',
    'sysinfo', 'os', 'features', 'cpu', 'clock', 'on_poweroff', 'on_reboot',
    'on_crash', 'pm', 'perf', 'devices', 'seclabel'))
_OS = frozenset(('type', 'boot', 'bootmenu', 'bios', 'smbios', 'kernel',
                 'initrd', 'cmdline'))
_MEMORY = frozenset(('locked', 'nosharepages', 'discard', 'allocation'))

_PLACE = frozenset(('alias', 'address'))
_CONSOLE = _PLACE | {'source', 'log', 'target', 'protocol'}
# By kind of device, what is in it. None: nothing of it stays.
_DEVICES = {
    'emulator': None, 'interface': None, 'graphics': None,
    'disk': _PLACE | {'driver', 'source', 'backingStore', 'iotune', 'target',
                      'readonly', 'boot', 'serial', 'wwn', 'vendor',
                      'product', 'geometry', 'blockio'},
    'controller': _PLACE | {'driver', 'model', 'target', 'master'},
    'serial': _CONSOLE, 'console': _CONSOLE, 'channel': _CONSOLE,
    'input': _PLACE | {'driver'},
    'audio': frozenset(('input', 'output')),
    'sound': _PLACE | {'codec', 'audio', 'driver'},
    'video': _PLACE | {'driver', 'model'},
    'memballoon': _PLACE | {'driver', 'stats'},
    'rng': _PLACE | {'driver', 'rate', 'backend'},
    'watchdog': _PLACE, 'iommu': _PLACE | {'driver'}, 'hub': _PLACE,
    'redirdev': _PLACE, 'panic': _PLACE,
}

# By element, its attributes where others cost the host something: a file for
# the guest's memory, or that memory in a core dump.
_ATTRIBUTES = {
    'os': frozenset(),
    'memory': frozenset(('unit',)),
    'currentMemory': frozenset(('unit',)),
    'maxMemory': frozenset(('unit', 'slots')),
    'vcpu': frozenset(('placement', 'cpuset', 'current')),
    # Nova adds memAccess to huge pages alone, with which no guest is saved.
    'cpu/numa/cell': frozenset(('id', 'cpus', 'memory', 'unit')),
    'devices/video/model': frozenset((
        'type', 'ram', 'vram', 'vram64', 'vgamem', 'heads', 'primary')),
}

# Attributes that say where something of the host is. Those of a disk and of
# what has a source are replaced.
_REPLACED = ('disk', 'serial', 'console', 'channel')
_PLACES = ' or '.join('@' + name for name in (
    'path', 'file', 'dev', 'socket', 'rendernode', 'host', 'serverName'))

_RULES = (
    refusal.Rule('self::*[not(self::domain[memory > 0 and vcpu > 0 and '
                 'os/type and devices])]',
                 _('it lacks what every guest has')),
    # By which it is found among the instance's.
    refusal.Rule("devices/disk[count(target) != 1 or not(target/@dev) or "
                 "contains(target/@dev, ' ')]",
                 _('a disk has no name, or more than one')),
    # libvirt takes an attribute whatever its prefix is, and what is written
    # in all of an element where text is expected.
    refusal.Rule('(self::* | *[not(self::metadata)]/descendant-or-self::*)'
                 '[namespace-uri() or @*[namespace-uri()]]',
                 _('it has names that are not of libvirt')),
    refusal.Rule('*[not(self::metadata)]/descendant-or-self::*'
                 '[* and text()[normalize-space()]] | (genid | memory | '
                 'currentMemory | maxMemory | vcpu | iothreads)[*]',
                 _('it has elements in the midst of text')),
    refusal.Rule('devices/*[%s]//*[%s] | devices/*[%s][%s]' % ((
        ' and '.join('not(self::%s)' % kind for kind, parts in
                     _DEVICES.items() if parts is None or kind in _REPLACED),
        _PLACES) * 2),
        _('a device names a place on its host')),
    refusal.Rule("devices/disk/@*[not(contains(' type device model snapshot ',"
                 " concat(' ', name(), ' ')))]",
                 _('a disk has more rights than Nova gives')),
    refusal.Rule("devices/graphics[not(@type='vnc' or @type='spice')]",
                 _('it has a display of its host')),
    refusal.Rule("devices/audio[not(@type='none' or @type='spice')]",
                 _('it has sound of its host')),
    refusal.Rule("devices/redirdev[not(@type='spicevmc')]",
                 _('it has a USB device of elsewhere')),
    # libvirt writes KiB alone, and reads the size from the nodes if there are
    # any: what is compared with the flavor has to be what it gives.
    refusal.Rule("(memory | currentMemory | maxMemory | cpu/numa/cell)"
                 "[@unit and @unit != 'KiB'] | "
                 "cpu/numa[not(sum(cell/@memory) = ../../memory)]",
                 _('its memory is counted otherwise than libvirt does')),
    # The driver asks for one.
    refusal.Rule("iothreads[not(. <= 1)] | iothreadids[iothread[2]] | "
                 "iothreadids/iothread[*] | "
                 "iothreadids/iothread/@*[name() != 'id']",
                 _('it has more threads for disks than Nova gives')),
    # Others take a file, a device or a port, or what QEMU itself writes.
    refusal.Rule('(%s)[not(%s)]' % (
        ' | '.join('devices/' + tag for tag in (
            'serial', 'console', 'channel')),
        ' or '.join("@type='%s'" % kind for kind in (
            'pty', 'unix', 'spicevmc'))),
        _('it has a console that Nova gives to no guest')),
    # Of one that doesn't say its size libvirt and QEMU do. Nova makes one at
    # most, and libvirt one where there is a display.
    refusal.Rule('devices/video[2] | devices/video/model[2]',
                 _('it has more than one screen')),
    refusal.Rule("devices/video/driver[@name='vhostuser']",
                 _('its screen is a process of its host')),
    refusal.Rule("os/smbios[not(@mode='sysinfo' or @mode='emulate')]",
                 _('it is told what its host is')),
    refusal.Rule("*[starts-with(name(), 'on_') and contains(., 'coredump')] | "
                 "devices/watchdog[@action='dump']",
                 _('it leaves its memory on the host when it crashes')),
)


def check(domain) -> None:
    """Check a definition that has come with a memory, as it has come.

    :param domain: an lxml element
    :raises: memory_file.Unfit if there is anything in it that Nova gives to no
        guest which can be saved
    """
    found = [rule.reason for rule in (*refusal.RULES, *_RULES)
             if domain.xpath(rule.xpath)]
    found += [_('it has an element %s') % tag for tag in _unknown(domain)]
    found += [_('it has an attribute %s') % name
              for name in _unknown_attributes(domain)]
    found += [_('it has more than one element %s') % tag
              for tag in _repeated(domain)]
    if domain.getroottree().docinfo.doctype:
        found.append(_('it has a document type'))
    if found:
        raise memory_file.Unfit(
            _('its definition was not written by Nova: %s') %
            '; '.join(found))


def _repeated(domain):
    """Of two elements libvirt reads one or the other, or parts of both."""
    counted = collections.Counter(
        str(element.tag) for element in domain.iterchildren('*'))
    # There is one of each security driver.
    del counted['seclabel']
    return sorted(tag for tag, number in counted.items() if number > 1)


def _unknown(domain):
    """The elements that nothing is known of, as path/tag."""
    parts = [('', domain.iterchildren('*'), _TOP),
             ('os/', domain.iterfind('os/*'), _OS),
             ('memoryBacking/', domain.iterfind('memoryBacking/*'), _MEMORY),
             ('devices/', domain.iterfind('devices/*'), _DEVICES),
             ('devices/video/model/',
              domain.iterfind('devices/video/model/*'), ())]
    for device in domain.iterfind('devices/*'):
        known = _DEVICES.get(device.tag)
        if known is not None:
            parts.append(('%s/' % device.tag, device.iterchildren('*'),
                          known))
    return sorted({where + str(element.tag) for where, elements, known in parts
                   for element in elements if element.tag not in known})


def _unknown_attributes(domain):
    """The attributes that nothing is known of, as path/@name."""
    return sorted({'%s/@%s' % (path, name)
                   for path, known in _ATTRIBUTES.items()
                   for element in domain.iterfind(path)
                   for name in element.keys() if name not in known})
