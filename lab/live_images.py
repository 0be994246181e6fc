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

"""Servers that are saved with their memory, by a cloud's API."""

import contextlib
import os
import re
import time
from concurrent import futures

import libvirt

from . import config
from .cloud.server import ServerError
from .guest import testimony
from .host import both
from .host import Host
from .machine import Machine

RULE = 'os_compute_api:servers:create_image:live'
MEMORY_ID = 'img_live_memory_id'
MICROVERSION = '2.105'
#: What a guest has to do to see whose config drive it has: without udev it
#: keeps the one in its memory.
WHOSE = ('umount /config 2>/dev/null; for i in 1 2 3 4 5; do '
         'mount -t iso9660 -o ro /dev/sr0 /config && break; sleep 1; '
         'done; value uuid /config/openstack/latest/meta_data.json')
_PAUSE = re.compile(r'stood still for ([0-9.]+) s')
_POLICY = config.STATE / 'live-images.yaml'


def enable(cloud) -> list[str]:
    """Let both hosts save memories and go on from them.

    Nobody is allowed to ask for it yet.

    :returns: the hosts that didn't before
    """
    _POLICY.write_text('{}\n')
    _POLICY.chmod(0o644)
    wanted = [('ctl', 'oslo_policy', 'policy_file', str(_POLICY))]
    wanted += [(host.name, 'libvirt', 'live_images', 'true')
               for host in both()]
    todo = [(place, section, key, value)
            for place, section, key, value in wanted
            if cloud.get(place, section, key) != value]
    with futures.ThreadPoolExecutor() as executor:
        list(executor.map(lambda one: cloud.set(*one), todo))
    return [place for place, *_option in todo if place != 'ctl']


def allow(rule: str) -> None:
    """Say who may save a server with its memory.

    :param rule: as in a policy file, "@" for everybody and "!" for nobody
    """
    _POLICY.write_text('"%s": "%s"\n' % (RULE, rule))
    # oslo.policy reads its file again when it has changed.
    now = time.time()
    os.utime(_POLICY, (now, now + 1))


def ask(server, name: str):
    """Ask for an image of a server and its memory.

    :returns: the API's response
    """
    return server.api.post(
        '/servers/%s/action' % server.id, microversion=MICROVERSION,
        json={'createImage': {'name': name, 'memory': True}})


def capture(server, name: str):
    """Save a server with its memory.

    :returns: the image
    :raises: ServerError
    """
    response = ask(server, name)
    if response.status_code != 202:
        raise ServerError('%s is not saved: %s' % (server.id, response.text))
    server.wait('ACTIVE', limit=300)
    images = server.cloud.conn.image
    image = images.find_image(response.json()['image_id'])
    if image is None or image.status != 'active' or not (
            image.properties.get(MEMORY_ID)):
        raise ServerError('%s was not saved: %s' % (
            server.id, image and image.properties or why(server)))
    return image


def pauses(log, offset: int) -> list[float]:
    """For how long guests stood still to be saved.

    :param log: the compute's
    :param offset: from where in it
    :returns: seconds
    """
    text = log.read_bytes()[offset:].decode(errors='replace')
    return [float(found) for found in _PAUSE.findall(text)]


def why(server) -> str:
    """Why the last image of a server could not be made."""
    action = next(server.api.server_actions(server.id))
    answer = server.api.get('/servers/%s/os-instance-actions/%s' % (
        server.id, action.request_id), microversion='2.84').json()
    return '; '.join('%s: %s' % (event['event'], event.get('details'))
                     for event in answer['instanceAction']['events'])


def delete(cloud, image) -> None:
    """Delete an image and its memory."""
    for image_id in (image.id, image.properties[MEMORY_ID]):
        cloud.conn.image.delete_image(image_id, ignore_missing=True)


def goes_on(server) -> None:
    """Know of a server that it doesn't boot: its console says nothing."""
    server.wait('ACTIVE')
    server.stay_awake()


def first_answer(server, host: str, *command, boots: bool,
                 limit: float = 300) -> str:
    """Wait for the first thing that a new server's guest can say.

    Somebody stands at its console from its first moment on, so that neither
    the API is waited for, nor QEMU, which looks once a second whether anybody
    is there. A guest that boots is asked when it listens, one that goes on at
    once.

    :param server: one that was asked for just now
    :param host: where it comes to be
    :param command: see guest/init
    :param boots: False if it goes on from a memory
    :returns: the guest's output
    :raises: ServerError
    """
    log = Machine(host).path(
        '/var/lib/nova/instances/%s/console.log' % server.id)
    # A clone has in its memory what its source was asked.
    number = 'first-%d-%d' % (os.getpid(), next(server._numbers))
    line = '\n%s %s\n' % (number, ' '.join(map(str, command)))
    stream, asked, begun = None, 0., time.monotonic()
    with contextlib.closing(Host(host).connect()) as connection, (
            contextlib.ExitStack()) as stack:
        while (now := time.monotonic()) < begun + limit:
            said = log.read_text(errors='replace') if log.exists() else ''
            if reply := testimony.replies(said).get(number):
                return reply['output']
            if stream is None:
                stream = _console(connection, server, stack)
            elif now > asked + 1 and not (
                    boots and testimony.ready(said) is None):
                stream.send(line.encode())
                asked = now
            if now > begun + 10 and server.get().status == 'ERROR':
                break
            time.sleep(.05)
    raise ServerError('the guest of %s has said nothing in %d s%s' % (
        server.id, now - begun, server._why()))


def _console(connection, server, stack):
    """:returns: a stream to its console; None while there is no guest"""
    try:
        domain = connection.lookupByUUIDString(server.id)
        stream = connection.newStream()
        domain.openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE)
    except libvirt.libvirtError:
        return None

    def close():
        with contextlib.suppress(libvirt.libvirtError):
            stream.abort()
    stack.callback(close)
    return stream
