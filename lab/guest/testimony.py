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

"""Read what the test guest says on its serial console."""

import base64
import dataclasses
import hashlib
import json
import re

#: What the guest says: the length of a JSON object in bytes, and the object.
LINE = re.compile(r'LAB (\d+) (\{.*\})')


def pattern(seed: str, length: int) -> bytes:
    """The bytes that "fill NAME MIB SEED" writes in the guest.

    :param length: in bytes
    """
    return hashlib.shake_128(seed.encode()).digest(length)


def pattern_sha256(seed: str, length: int) -> str:
    """Checksum of the pattern, to be compared with the guest's."""
    return hashlib.sha256(pattern(seed, length)).hexdigest()


def events(console: str):
    """All of the guest's words in a console log, oldest first.

    A line that is not whole is left out, as the first of a truncated log may
    be; and qemu drops what a slow reader of the console doesn't take.
    """
    for line in console.split('\n'):
        said = LINE.search(line)
        if said and int(said[1]) == len(said[2].encode()):
            try:
                yield json.loads(said[2])
            except ValueError:  # parts of two lines, by chance of that length
                continue


@dataclasses.dataclass
class Testimony:
    """One look of the guest at itself.

    :ivar boot: how many times the system on this disk has been started
    :ivar boot_id: differs at each start of the kernel
    :ivar disks: by name: bytes, magic (what its first sectors look like),
        head (16 bytes, hexadecimal), label, own, read_only
    :ivar ranges: by name, on the guest's own disk: bytes, sha256, place
    :ivar others: by disk name: another guest's root disk, its boot counter
        and its ranges
    :ivar swap: by disk name: whether the kernel took it for swap
    :ivar filesystem: bytes, free, kept (names of files) of its own data
    :ivar config: device, format, uuid, name, files (one checksum of all),
        user_data; device is None when there is no config drive
    :ivar interfaces: by name: mac, address (IPv4, '' as long as it has none)
    :ivar written: how often "keep-writing" has written
    """

    boot: int
    boot_id: str
    uptime: int
    disks: dict = dataclasses.field(default_factory=dict)
    ranges: dict = dataclasses.field(default_factory=dict)
    others: dict = dataclasses.field(default_factory=dict)
    swap: dict = dataclasses.field(default_factory=dict)
    filesystem: dict = dataclasses.field(default_factory=dict)
    config: dict = dataclasses.field(default_factory=dict)
    interfaces: dict = dataclasses.field(default_factory=dict)
    written: int = 0

    @property
    def own(self) -> dict:
        """The disk it was started from."""
        return next(disk for disk in self.disks.values() if disk['own'])

    def disk_labelled(self, label: str) -> dict | None:
        return next((disk for disk in self.disks.values()
                     if disk['label'] == label), None)

    def _take(self, event):
        kind = event['event']
        if kind == 'disk':
            self.disks[event['name']] = event
        elif kind == 'swap':
            self.swap[event['disk']] = event['usable']
        elif kind == 'other':
            self.others[event['disk']] = {'boot': event['boot'], 'ranges': {}}
        elif kind == 'range':
            home = self.others.get(event['disk'])
            (home['ranges'] if home else self.ranges)[event['name']] = event
        elif kind == 'interface':
            self.interfaces[event['name']] = event
        elif kind == 'filesystem':
            event['kept'] = event.get('kept', '').split()
            self.filesystem = event
        elif kind == 'config':
            if event['device'] is not None:
                event['user_data'] = base64.b64decode(event['user_data'])
            self.config = event
        elif kind == 'written':
            self.written = event['count']


def testimonies(console: str) -> list[Testimony]:
    """All whole testimonies in a console log, oldest first."""
    whole, current, seen = [], None, set()
    for event in events(console):
        if event['event'] == 'testimony':
            current = Testimony(
                event['boot'], event['boot_id'], event['uptime'])
            seen = set()
        elif current is not None and event['event'] == 'whole':
            if event['lines'] == 1 + len(seen):
                whole.append(current)
            current = None
        elif current is not None:
            # Nova may print a line twice.
            seen.add(json.dumps(event))
            current._take(event)
    return whole


def ready(console: str) -> str | None:
    """The boot_id of the newest system that has said that it is up."""
    found = [event['boot_id'] for event in events(console)
             if event['event'] == 'ready']
    return found[-1] if found else None


def replies(console: str) -> dict:
    """What became of the commands, by their id: ok, output (text)."""
    found = {}
    for event in events(console):
        if event['event'] == 'done':
            output = base64.b64decode(event['output'])
            event['output'] = output.decode(errors='replace')
            found[event['id']] = event
    return found
