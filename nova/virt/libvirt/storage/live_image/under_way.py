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
"""Captures under way, as they outlive nova-compute.

Each has a directory in [libvirt]/snapshots_directory, named after its
instance, with the files that libvirt writes. As long as it is there something
may have to be put right: the guest may stand still, or lack its interfaces.
Hosts may share that directory: each capture says whose it is.
"""

import errno
import os
import shutil
import stat

from oslo_serialization import jsonutils
from oslo_utils import fileutils
from oslo_utils import uuidutils

import nova.conf
import nova.privsep.path

CONF = nova.conf.CONF

_PREFIX = 'live-image-'
_HOST = 'host'
_EXPORT = 'export'
_PLACES = 'places'

# UUIDs of the instances that this process is saving.
_open: set[str] = set()


def directory(instance_uuid: str) -> str:
    """Where the files of a capture are."""
    return os.path.join(CONF.libvirt.snapshots_directory,
                        _PREFIX + instance_uuid)


def begin(instance_uuid: str) -> str:
    """Say that a capture is under way, before anything is done to the guest.

    :returns: the directory for its files
    :raises: FileExistsError if an earlier one was never put right; OSError
    """
    fileutils.ensure_tree(CONF.libvirt.snapshots_directory)
    path = directory(instance_uuid)
    if os.path.isdir(path) and not _is_said_whose(path):
        # Nothing was done yet by the one who has made it.
        shutil.rmtree(path)
    # libvirt and QEMU pass it, and nobody lists it.
    os.mkdir(path, 0o701)
    os.chmod(path, 0o701)
    with open(os.path.join(path, _HOST), 'w') as f:
        f.write(CONF.host)
    _open.add(instance_uuid)
    return path


def close(instance_uuid: str) -> None:
    """Say that this process has done with a capture, ended or not."""
    _open.discard(instance_uuid)


def keep_places(instance_uuid: str, places: dict[str, dict]) -> None:
    """Remember where the interfaces of a guest are that are taken out.

    :param places: MAC address -> attributes of the interface's address
    :raises: OSError
    """
    with open(os.path.join(directory(instance_uuid), _PLACES), 'w') as f:
        f.write(jsonutils.dumps(places))


def places(instance_uuid: str) -> dict[str, dict]:
    """:returns: what keep_places() was given; nothing if it never was"""
    try:
        with open(os.path.join(directory(instance_uuid), _PLACES)) as f:
            return jsonutils.loads(f.read())
    except (OSError, ValueError):
        return {}


def export(instance_uuid: str) -> str:
    """Path of the socket by which QEMU lets the disk be read."""
    return os.path.join(directory(instance_uuid), _EXPORT, 'nbd')


def make_export(instance_uuid: str, owner: int | None) -> str:
    """Make the directory in which QEMU is to make that socket.

    :param owner: user ID that QEMU runs as; None if it may write anywhere
    :returns: path of the socket
    """
    path = export(instance_uuid)
    folder = os.path.dirname(path)
    os.mkdir(folder, 0o755)
    if owner is not None:
        nova.privsep.path.chown(folder, uid=owner)
    return path


def take_export(instance_uuid: str) -> str:
    """Have that socket, which QEMU has made, be Nova's.

    A QEMU that was broken into may have put a link there, to a file that is
    to change hands or to the socket of another guest. So its directory is
    taken from it first.

    :returns: path of the socket
    :raises: OSError if it is anything else than one that is there alone
    """
    path = export(instance_uuid)
    nova.privsep.path.chown(os.path.dirname(path), uid=os.geteuid())
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode) or found.st_nlink != 1:
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), path)
    nova.privsep.path.chown(path, uid=os.geteuid(), gid=os.getegid())
    return path


def end(instance_uuid: str) -> None:
    """Delete the files of a capture: nothing is left to be put right."""
    folder = os.path.dirname(export(instance_uuid))
    if os.path.isdir(folder):
        # QEMU may have left its socket in it.
        nova.privsep.path.chown(folder, uid=os.geteuid())
    shutil.rmtree(directory(instance_uuid))


def instances() -> list[str]:
    """UUIDs of instances whose captures are, or were, under way here."""
    try:
        names = os.listdir(CONF.libvirt.snapshots_directory)
    except FileNotFoundError:
        return []
    found = [name.removeprefix(_PREFIX) for name in names
             if name.startswith(_PREFIX)]
    return sorted(name for name in found if uuidutils.is_uuid_like(name) and
                  _is_ours(directory(name)))


def left() -> list[str]:
    """UUIDs of those whose captures were begun here, and are nobody's now."""
    return [uuid for uuid in instances() if uuid not in _open]


def _is_said_whose(path):
    names = os.listdir(path)
    return bool(names) and (names != [_HOST] or os.path.getsize(
        os.path.join(path, _HOST)) > 0)


def _is_ours(path):
    try:
        with open(os.path.join(path, _HOST)) as f:
            return f.read() == CONF.host
    except OSError:
        return False
