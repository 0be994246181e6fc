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
"""What an instance has on its host beside its disks, on its way to another.

The state of its emulated TPM, the variables of its UEFI firmware and the end
of its console log are files. They travel packed into one volume, as the peer's
storage API is all that there is of the peer. What the source has stays in its
directory of the instance until confirm or revert.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import tarfile

from oslo_log import log as logging
from oslo_utils import fileutils
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
import nova.privsep.path
import nova.privsep.storage
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage.pool import access
from nova.virt.libvirt.storage.pool import stream as upload
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# As a disk's name, among what is copied.
NAME = 'files'

# Where libvirt keeps the variables of its guests' firmware:
# qemuDomainNVRAMPathFormat() in its qemu_domain.c
NVRAM_DIR = '/var/lib/libvirt/qemu/nvram'

# As much as the API shows of it, see MAX_CONSOLE_BYTES of the driver.
_MAX_CONSOLE = 100 * units.Ki
# The variables of a guest on ARM take 64 MiB, those of others less than 4.
_MAX_FILE = 128 * units.Mi
# What a peer can have this host keep in memory, and in its instances_path.
_MAX_PACK = 256 * units.Mi
_MAX_FILES = 1000

_CONSOLE = 'console.log'
_NVRAM = 'nvram'
_TPM = 'swtpm'
_PACK = 'files.tar'


def are_needed(instance):
    """Whether an instance would lose something without them."""
    return os.path.exists(os.path.join(libvirt_utils.VTPM_DIR, instance.uuid))


def has_nvram(host, instance):
    """Whether its firmware keeps variables in a file of this host.

    :param host: the Host of this compute
    """
    try:
        return bool(host.get_guest(instance).get_config().os_nvram)
    except exception.InstanceNotFound:
        return False


def check_access(instance):
    """Check that the state of a server's TPM isn't overlooked.

    :raises: MigrationPreCheckError
    """
    found = access.obstacle(libvirt_utils.VTPM_DIR, os.X_OK)
    if found and instance.uuid in nova.privsep.storage.names_in(
            libvirt_utils.VTPM_DIR):
        raise exception.MigrationPreCheckError(reason=_(
            "run 'setfacl -m u:%(user)s:x %(obstacle)s' on host %(host)s: it "
            "is %(mode)s, so that nova-compute can't look for the state of "
            "the server's TPM in %(directory)s") % {
                'obstacle': found.path, 'user': access.user(),
                'mode': found.mode, 'host': CONF.host,
                'directory': libvirt_utils.VTPM_DIR})


def has_tpm(instance):
    """Whether the state of a TPM has come and was not taken over yet."""
    return os.path.exists(_saved_tpm(instance))


def _saved_tpm(instance):
    return os.path.join(
        libvirt_utils.get_instance_path(instance), _TPM, instance.uuid)


def restore_tpm(instance):
    """Put the state of a TPM back that was saved for a move, now given up."""
    if has_tpm(instance):
        libvirt_utils.restore_vtpm_dir(_saved_tpm(instance))


def pack(host, instance, directory, same_host):
    """Put the files into one; the guest is off.

    :param host: the Host of this compute
    :param directory: the instance's directory; what may be needed for a
        revert is saved in it
    :param same_host: whether the files stay on this host
    :returns: path of a tar file in directory, None if there is nothing
    :raises: UnsafeDiskContent if a file is longer than any of these can be
    """
    _save_tpm(instance, directory)
    nvram = _save_nvram(host, instance, directory)
    path = os.path.join(directory, _PACK)
    with _new_file(path) as f, tarfile.open(fileobj=f, mode='w') as tar:
        top = os.path.join(directory, _TPM, instance.uuid)
        for folder, _folders, names in os.walk(top):
            for name in names:
                file = os.path.join(folder, name)
                # A lock is of no use elsewhere.
                if not name.startswith('.'):
                    _add(tar, os.path.relpath(file, directory), file)
        if nvram and not same_host:
            _add(tar, os.path.join(_NVRAM, os.path.basename(nvram)), nvram)
        _add_console(tar, os.path.join(directory, _CONSOLE))
        names = tar.getnames()
    if not names:
        os.unlink(path)
        return None
    LOG.info('Moving these files along with the disks: %s',
             ', '.join(names), instance=instance)
    return path


@contextlib.contextmanager
def _new_file(path):
    """Write a file that only this user may read.

    :raises: OSError with the path, which that of a write doesn't have
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
                  'wb') as f:
            yield f
    except OSError as e:
        if e.filename is not None:
            raise
        raise OSError(e.errno, e.strerror, path) from e


def _add(tar, name, path):
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), 'rb') as f:
        member = tarfile.TarInfo(name)
        member.size = os.fstat(f.fileno()).st_size
        if member.size > _MAX_FILE:
            raise _too_long(path)
        tar.addfile(member, f)


def _too_long(path):
    return exception.UnsafeDiskContent(path=path, reason=_(
        'it has more than %d bytes, which no state of a TPM and no variables '
        'of firmware take up') % _MAX_FILE)


def _save_tpm(instance, directory):
    """Move the state of the TPM into the instance's directory.

    swtpm may have been broken into: what it has put there beside files would
    lead root, and whoever restores it, elsewhere.
    """
    state = os.path.join(libvirt_utils.VTPM_DIR, instance.uuid)
    if not os.path.exists(state):
        return
    saved = os.path.join(directory, _TPM)
    fileutils.ensure_tree(saved)
    nova.privsep.path.move_tree(state, saved)
    nova.privsep.storage.take_tree(saved, os.geteuid(), os.getegid())
    for folder, folders, names in os.walk(saved):
        for path in (os.path.join(folder, name) for name in folders + names):
            kind = os.lstat(path).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                LOG.warning("%(path)s (%(kind)s) is deleted: it is none of "
                            "the files of a TPM's state",
                            {'path': path, 'kind': stat.filemode(kind)},
                            instance=instance)
                os.unlink(path)


def _add_console(tar, path):
    if not os.path.exists(path):
        return
    data, _remaining = nova.privsep.path.last_bytes(path, _MAX_CONSOLE)
    if data:
        member = tarfile.TarInfo(_CONSOLE)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _save_nvram(host, instance, directory):
    """Copy the firmware's variables into the instance's directory.

    :returns: path of the copy, None if there are none
    """
    try:
        source = host.get_guest(instance).get_config().os_nvram
    except exception.InstanceNotFound:
        return None
    if not source:
        return None
    fileutils.ensure_tree(os.path.join(directory, _NVRAM), mode=0o700)
    target = os.path.join(directory, _NVRAM, os.path.basename(source))
    try:
        if not nova.privsep.storage.copy_as(
                source, target, os.geteuid(), os.getegid(), _MAX_FILE):
            return None  # the guest has never been started
    except OSError as e:
        if e.errno == errno.EFBIG:
            raise _too_long(source) from e
        raise
    return target


def restore_nvram(instance, directory):
    """Put the firmware's variables where libvirt looks for them.

    On the destination those that have come; on the source, at a revert, those
    that were saved.

    :param directory: the instance's directory
    :raises: UnsafeDiskContent
    """
    saved = os.path.join(directory, _NVRAM)
    if not os.path.isdir(saved):
        return
    wanted = re.compile(re.escape(instance.name) + r'_VARS\.(fd|qcow2)')
    for name in os.listdir(saved):
        if not wanted.fullmatch(name):
            LOG.warning("File %(name)s is not restored: it doesn't have the "
                        "name of firmware variables", {'name': name},
                        instance=instance)
            continue
        path = os.path.join(saved, name)
        if name.endswith('.qcow2'):
            _look_at_qcow2(path)
        nova.privsep.storage.copy_as_its_directory(
            path, os.path.join(NVRAM_DIR, name), _MAX_FILE)
    shutil.rmtree(saved)


def _look_at_qcow2(path):
    # libvirt has QEMU open whatever the header names.
    if content.look_at_qcow2(path).backing_file:
        raise exception.UnsafeDiskContent(path=path, reason=_(
            'it depends on another file, which no variables of firmware do'))


def unpack(instance, volume, directory):
    """Take the files out of a volume which is known to be what was sent.

    Done twice it comes to the same.

    :param volume: the StorageVolume
    :param directory: the instance's directory on this host; the state of a
        TPM is left in it, for LibvirtDriver._finish_migration_vtpm()
    :raises: UnsafeDiskContent if it holds what is none of these files, or
        more than they can be
    """
    if volume.physical() > _MAX_PACK:
        raise exception.UnsafeDiskContent(path=volume.path, reason=_(
            "it has come along with the disks, and has more than %s bytes") %
            _MAX_PACK)
    fileutils.ensure_tree(directory)
    path = os.path.join(directory, _PACK)
    upload.download_file(volume, path)
    with tarfile.open(path, mode='r:') as tar:
        for number, member in enumerate(tar):
            if number == _MAX_FILES:
                raise exception.UnsafeDiskContent(path=volume.path, reason=_(
                    "it has come along with the disks, and has more than %s "
                    "files") % _MAX_FILES)
            _extract(instance, tar, member, directory)
    os.unlink(path)
    restore_nvram(instance, directory)


def _extract(instance, tar, member, directory):
    tpm = r'%s/%s/([A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][\w.-]*' % (
        _TPM, re.escape(instance.uuid))
    nvram = r'%s/[\w-][\w.-]*' % _NVRAM
    if (not member.isreg() or member.issparse() or
            member.size > _MAX_FILE or
            not re.fullmatch('%s|%s|%s' % (tpm, nvram, re.escape(_CONSOLE)),
                             member.name, re.ASCII)):
        raise exception.UnsafeDiskContent(path=member.name, reason=_(
            "it has come along with the disks of instance %s, and isn't one "
            "of the files that may") % instance.uuid)
    target = os.path.join(directory, member.name)
    if member.name == _CONSOLE and os.path.exists(target):
        return  # from an earlier try, and libvirt's by now
    fileutils.ensure_tree(os.path.dirname(target), mode=0o700)
    with _new_file(target) as f:
        shutil.copyfileobj(tar.extractfile(member), f)
