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
"""What must hold after each round, whatever has happened."""

import contextlib
import os
import re
import time

import psutil

from .. import config
from ..cloud import database
from ..cloud.server import ServerError
from ..guest import testimony
from ..host import Host
from ..machine import Machine
from .servers import Lost
from .servers import MIB
from .servers import OTHER

UUID = re.compile(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}')
SERVICES = {'host-a': ('nova-compute', 'libvirtd'),
            'host-b': ('nova-compute', 'libvirtd'), 'ctl': ('nova-conductor',)}
GRACE = 30  # seconds in which a host deletes what it has been told to
# Seconds in which it learns of it: the broker keeps a message for a compute that
# was killed while its link was cut until it has missed two heartbeats.
HEARTBEATS = 150


class Left(Lost):
    """Something that nobody owns."""


def check(subject) -> None:
    """A server runs, has its data, and lies where its records say.

    :param subject: servers.Subject, recovered
    :raises: Lost
    """
    _check_guests(subject)
    _check_data(subject)
    _check_records(subject)
    _check_only_there(subject)


def _check_guests(subject):
    found, host = subject.guests(), subject.server.host
    if found != [host]:
        raise Lost('%s is on %s, and has guests on %s' % (
            subject.name, host, found))


def _check_data(subject):
    try:
        try:
            said = subject.server.look(limit=180)
        except ServerError:
            if not subject.has_lost_console():
                raise
            subject.server.hard_reboot()
            said = subject.server.look(limit=180)
    except ServerError as error:
        raise Lost('%s does not speak: %s' % (subject.name, error)) from error
    for name, (seed, mib) in subject.expected.items():
        found = said.ranges.get(name)
        if found is None or found['sha256'] != testimony.pattern_sha256(
                seed, mib * MIB):
            raise Lost('%s: its data %s (%s) is %s' % (
                subject.name, name, seed,
                'gone' if found is None else 'other data'))


def _check_records(subject):
    server = subject.server
    host = server.host
    for name, record in database.records(subject.cloud, server.id).items():
        if (record.get('host'), record.get('state')) != (host, 'ready'):
            raise Lost('%s runs on %s; the record of %s says %s' % (
                subject.name, host, name, record))
        if record.get('volume') and not _has(host, record):
            raise Lost('%s: volume %s is not in pool %s of %s' % (
                subject.name, record['volume'], record['pool'], host))


def _has(host, record):
    with contextlib.closing(Host(host).connect()) as connection:
        pool = connection.storagePoolLookupByName(record['pool'])
        return record['volume'] in pool.listVolumes()


def _check_only_there(subject):
    """Nothing of it is on the other host, at the latest after another try."""
    server = subject.server
    other = OTHER[server.host]
    if not _left(server, other):
        return
    server.migrate(other)
    server.confirm()
    left = _left(server, OTHER[other], HEARTBEATS)
    if left:
        raise Left('%s runs on %s; on %s there is still %s' % (
            subject.name, other, OTHER[other], ', '.join(left)))
    extra = [place for place in server.left_on(other)
             if re.search(r'_disk(\.\w+)*\.\d+\b', place)]
    spare = [place for place in extra if not _on_record(subject, place)]
    if spare:
        raise Left('%s: nothing names %s on %s' % (
            subject.name, ', '.join(spare), other))


def _on_record(subject, place):
    return any(record.get('volume') and place.endswith(record['volume'])
               for record in database.records(
                   subject.cloud, subject.server.id).values())


def _left(server, host, grace=GRACE):
    until = time.monotonic() + grace
    while left := server.left_on(host):
        if time.monotonic() > until:
            return left
        time.sleep(1)
    return []


def nobody_s(alive: set[str]) -> dict[str, list[str]]:
    """What lies on the hosts of servers that are no more.

    :param alive: UUIDs of those that are
    :returns: paths by host
    """
    found = {}
    for host in config.HOSTS:
        root = Machine(host).path('/var/lib/nova')
        for folder, folders, files in os.walk(root):
            for name in folders + files:
                match = UUID.search(name)
                if match and match.group() not in alive:
                    found.setdefault(host, []).append(
                        os.path.relpath(os.path.join(folder, name), root))
            folders[:] = [name for name in folders if not UUID.search(name)]
    return found


def memory() -> dict[str, int]:
    """KiB of resident memory by service and machine."""
    found = {}
    for place, names in SERVICES.items():
        for name in names:
            with contextlib.suppress(Exception):
                process = psutil.Process(Machine(place).service(name).pid)
                found['%s on %s' % (name, place)] = sum(
                    one.memory_info().rss for one in
                    [process, *process.children(True)]
                    if 'qemu' not in one.name()) // 1024
    return found
