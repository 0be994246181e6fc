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
"""Save a running guest with its memory and its root disk, as of one moment.

    1  the network interfaces are taken out of the guest
    2  libvirt saves the memory while the guest runs, and pauses it at the end
    3  a backup job of mode "pull" begins: QEMU keeps the disk as it is at this
       moment for whoever reads it, by NBD
    4  the guest goes on, and has its interfaces back
    5  the disk is read, and the job is ended

Only between 2 and 4 the guest stands still. Its definition and the chain of
its disk stay as they are. Whatever fails, it goes on with its interfaces;
where that can't be seen to now, a mark is left for the next start of
nova-compute, see :mod:`under_way`.

Nothing may read the disk before the guest goes on. At the end of 2 QEMU gives
its images up, as for a migration, and opens them anew when they are used
again. A job that is copying in that moment, as one of mode "push" is, reads
from a file that is closed under it, and from a table that is being loaded.
"""

import functools
import os
import typing as ty
from urllib import parse as urlparse

from lxml import etree
from oslo_log import log as logging
from oslo_utils import fileutils
from oslo_utils import units
import tenacity

from nova.compute import power_state
from nova.compute import utils as compute_utils
from nova.compute import vm_states
import nova.conf
from nova import exception
from nova.i18n import _
import nova.privsep.path
import nova.privsep.qemu
from nova.virt import images
from nova.virt.libvirt.storage.live_image import interfaces as guest_nics
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import refusal
from nova.virt.libvirt.storage.live_image import under_way
from nova.virt.libvirt.storage.live_image import vm_state
from nova.virt.libvirt.storage.live_image import watch as watch_guest

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

#: For how long a guest is tried to be put right, in seconds. libvirt may be
#: on its way up again.
PATIENCE = 60
# From this QEMU on the disks are its own no more since the memory was saved,
# until the guest goes on; from this libvirt on, which was the next one tried,
# a job can begin nevertheless.
_MIN_QEMU_INACTIVE = (10, 0, 0)
_MIN_LIBVIRT_INACTIVE = (12, 8, 0)
# What libvirt says where it can't, such as 11.3 with QEMU 10.0.
_INACTIVE = 'nactive'


class Saved(ty.NamedTuple):
    """A guest that has been saved.

    :ivar disk: path of the root disk's copy, a qcow2 file without backing
    :ivar memory: where its memory is
    :ivar description: of the memory
    :ivar pause: for how long the guest stood still, in seconds
    """
    disk: str
    memory: vm_state.Stream
    description: memory_file.Description
    pause: float


class Capture:
    """A guest that is saved while this context is open.

    Entering saves it; leaving deletes the files.

    :param host: the Host
    :param instance: the instance
    :param interfaces: its Interfaces
    """

    def __init__(self, host, instance, interfaces: guest_nics.Interfaces):
        self._host = host
        self._instance = instance
        self._interfaces = interfaces
        self._step = ''

    def __enter__(self) -> Saved:
        """Save the guest.

        :raises: exception.LiveImageRefused, nothing was done to the guest;
            exception.LiveImageCaptureFailed, it runs on;
            exception.LiveImageGuestNotRight, it may not
        """
        self._check_versions()
        guest = self._guest()
        domain = refusal.parse(guest.get_xml_desc(
            definition=guest.get_xml_desc(dump_inactive=True)))
        refusal.check(self._instance.uuid, domain)
        self._check_room(domain)
        try:
            self._directory = under_way.begin(self._instance.uuid)
        except FileExistsError:
            raise exception.LiveImageRefused(
                instance_uuid=self._instance.uuid,
                reason=_('another one is under way, or was cut off; in that '
                         'case hard reboot the instance, and try again when '
                         'nova-compute has looked after it'))
        try:
            try:
                return self._save(domain)
            except Exception as e:
                LOG.exception('Saving the guest with its memory has failed',
                              instance=self._instance)
                failed = (exception.LiveImageCaptureFailed if self._is_right
                          else exception.LiveImageGuestNotRight)
                raise failed(
                    instance_uuid=self._instance.uuid, step=self._step,
                    reason=self._explain(e)) from e
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, _type, _value, _traceback):
        if self._is_right:
            end(self._instance.uuid)
        under_way.close(self._instance.uuid)

    def _check_versions(self):
        """Refuse what would fail when the guest stands still already."""
        if self._host.has_min_version(
                hv_ver=_MIN_QEMU_INACTIVE) and (
                not self._host.has_min_version(lv_ver=_MIN_LIBVIRT_INACTIVE)):
            raise exception.LiveImageRefused(
                instance_uuid=self._instance.uuid, reason=_(
                    'libvirt and QEMU of host %(host)s can not copy a disk '
                    'right after the memory: QEMU %(qemu)s and newer takes '
                    'libvirt %(libvirt)s') % {
                        'host': CONF.host,
                        'qemu': '.'.join(map(str, _MIN_QEMU_INACTIVE)),
                        'libvirt': '.'.join(map(str, _MIN_LIBVIRT_INACTIVE))})

    def _check_room(self, domain):
        """Refuse what would fill a file system that others write to.

        How much the disk takes up is not known before it is read.
        """
        directory = CONF.libvirt.snapshots_directory
        fileutils.ensure_tree(directory)
        try:
            memory_file.check_room(directory, _memory(domain))
        except memory_file.Unusable as e:
            raise exception.LiveImageRefused(
                instance_uuid=self._instance.uuid, reason=e) from e

    def _guest(self):
        return self._host.get_guest(self._instance)

    def _path(self, name):
        return os.path.join(self._directory, name)

    def _save(self, domain):
        self._is_right = is_right = False
        try:
            try:
                self._step = 'places'
                self._interfaces.remember_places()
                self._step = 'interfaces'
                self._interfaces.take_out()
                pause = self._stop_for_a_moment(domain)
            finally:
                is_right = put_right(
                    self._host, self._instance, self._interfaces)
            if not is_right:
                raise RuntimeError(_('the guest could not be put right'))
            self._step = 'copy'
            self._read_disk(domain)
        finally:
            self._is_right = end_job(
                self._host, self._instance) and is_right
        if not self._is_right:
            raise RuntimeError(_('the job of libvirt could not be ended'))
        self._step = 'description'
        return self._describe(domain, pause)

    def _stop_for_a_moment(self, domain):
        """Memory, and the begin of the job that keeps the disk."""
        self._step = 'memory'
        guest = self._guest()
        with watch_guest.Watch(
                guest, self._host, CONF.libvirt.live_image_timeout,
                self._instance, self._path('memory'),
                _memory(domain)) as watch:
            guest.save_memory_live(
                _memory_snapshot(domain, self._path('memory')))
            self._step = 'disk'
            guest.begin_backup(_backup(
                domain, self._path('scratch'),
                under_way.make_export(self._instance.uuid, _owner(domain))))
            self._step = 'resume'
            guest.resume()
        pause = watch.pause()
        LOG.info('The guest stood still for %.3f s to be saved with its '
                 'memory', pause, instance=self._instance)
        return pause

    def _read_disk(self, domain):
        socket = under_way.take_export(self._instance.uuid)
        # qemu-img would make it for all to read, who know its path.
        os.close(os.open(self._path('disk'),
                         os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with compute_utils.disk_ops_semaphore:
            # A guest that hangs answers no reader.
            nova.privsep.qemu.run_while_it_copies(
                'qemu-img', 'convert', '-t', 'writeback', '-f', 'raw', '-O',
                'qcow2', 'nbd+unix:///%s?socket=%s' % (
                    _root(domain), urlparse.quote(socket, safe='/')),
                self._path('disk'))

    def _describe(self, domain, pause):
        connection = self._host.get_connection()
        # As long as the file is libvirt's own.
        saved = connection.saveImageGetXMLDesc(self._path('memory'), 0)
        nova.privsep.path.chown(self._path('memory'), uid=os.geteuid(),
                                gid=os.getegid())
        memory = memory_file.find_stream(self._path('memory'))
        info = images.qemu_img_info(self._path('disk'), format='qcow2')
        return Saved(
            self._path('disk'), memory, memory_file.Description(
                domain=saved, capacity=info.virtual_size,
                memory_mb=_memory(domain) // units.Mi,
                vcpus=int(domain.findtext('vcpu')),
                qemu_version=connection.getVersion(), length=memory.length),
            pause)

    def _explain(self, error):
        if self._step == 'disk' and _INACTIVE in str(error):
            return _("This libvirt and QEMU can't copy a disk right after the "
                     "memory; libvirt 9.0 with QEMU 7.2 and libvirt 12.8 with "
                     "QEMU 11.1 can, 11.3 with 10.0 can't: %s") % error
        if self._step == 'places':
            return _('nothing was taken from the guest; see to %(directory)s '
                     'of host %(host)s, where the addresses of its interfaces '
                     'are to be kept: %(error)s') % {
                         'directory': self._directory, 'host': CONF.host,
                         'error': error}
        if self._step == 'interfaces' and not isinstance(
                error, guest_nics.StillThere):
            # QEMU takes no request back, and ends it at the guest's reset.
            return _("the guest may lose an interface at its own next reboot, "
                     "unless it is hard rebooted: %s") % error
        return error


def put_right(host, instance, interfaces: guest_nics.Interfaces) -> bool:
    """Let a guest go on that a capture has paused, with all interfaces.

    :returns: False if it should be tried again
    """
    is_right = True
    for step in (functools.partial(_let_go_on, host, instance),
                 functools.partial(_put_back, interfaces)):
        try:
            step()
        except exception.InstanceNotFound:
            return True
        except Exception:
            LOG.exception('The guest could not be put right after it was '
                          'saved; that is tried again later. A hard reboot '
                          'does it as well', instance=instance)
            is_right = False
    return is_right


def end_job(host, instance) -> bool:
    """End the job that keeps the disk of a guest.

    :returns: False if it should be tried again
    """
    try:
        _end_jobs(host, instance)
        # One stands still that has found no room for what it was writing over.
        _let_go_on(host, instance)
        return True
    except exception.InstanceNotFound:
        return True
    except Exception:
        LOG.exception('The job of a capture could not be ended; that is tried '
                      'again later. A hard reboot does it as well',
                      instance=instance)
        return False


def recover(host, instance, interfaces: guest_nics.Interfaces) -> None:
    """Put right what a capture has left that was cut off.

    :param interfaces: the instance's Interfaces
    """
    LOG.warning('Saving the guest with its memory was cut off', instance=(
        instance))
    if end_job(host, instance) and put_right(host, instance, interfaces):
        end(instance.uuid)


def end(instance_uuid: str) -> None:
    """Delete the files of a capture; an error is only logged."""
    try:
        under_way.end(instance_uuid)
    except OSError:
        LOG.exception('Files of the capture are left in %s',
                      under_way.directory(instance_uuid))


def _is_transient(error):
    return isinstance(error, Exception) and not isinstance(
        error, exception.InstanceNotFound)


_with_patience = tenacity.retry(
    retry=tenacity.retry_if_exception(_is_transient), reraise=True,
    stop=tenacity.stop_after_delay(PATIENCE), wait=tenacity.wait_fixed(1))


@_with_patience
def _let_go_on(host, instance):
    guest = host.get_guest(instance)
    if guest.get_power_state(host) == power_state.PAUSED and (
            # Only who is active is saved; so its user has paused it since.
            instance.vm_state != vm_states.PAUSED):
        guest.resume()


@_with_patience
def _put_back(interfaces):
    # Those that are there again are left alone.
    interfaces.put_back()


@_with_patience
def _end_jobs(host, instance):
    """libvirt goes on with a job when the one who asked for it is gone."""
    guest = host.get_guest(instance)
    if not guest.is_active():
        return
    if guest.get_job_info().type != libvirt.VIR_DOMAIN_JOB_NONE:
        guest.abort_job()
        raise RuntimeError(_('a job of libvirt has not ended yet'))


def _memory(domain):
    """The memory of a guest in bytes; libvirt counts it in KiB."""
    return int(domain.findtext('memory')) * units.Ki


def _memory_snapshot(domain, path):
    root = etree.Element('domainsnapshot')
    etree.SubElement(root, 'memory', snapshot='external', file=path)
    disks = etree.SubElement(root, 'disks')
    for disk in domain.iterfind('devices/disk'):
        # With no disk to be seen to by somebody else the guest would go on.
        etree.SubElement(
            disks, 'disk', name=disk.find('target').get('dev'),
            snapshot='manual' if disk.get('device', 'disk') == 'disk'
            else 'no')
    return etree.tostring(root, encoding='unicode')


def _backup(domain, scratch, socket):
    root = etree.Element('domainbackup', mode='pull')
    etree.SubElement(root, 'server', transport='unix', socket=socket)
    disks = etree.SubElement(root, 'disks')
    for disk in domain.iterfind('devices/disk'):
        name = disk.find('target').get('dev')
        if disk.get('device', 'disk') != 'disk':
            etree.SubElement(disks, 'disk', name=name, backup='no')
            continue
        kept = etree.SubElement(disks, 'disk', name=name, backup='yes',
                                type='file')
        etree.SubElement(kept, 'driver', type='qcow2')
        etree.SubElement(kept, 'scratch', file=scratch)
    return etree.tostring(root, encoding='unicode')


def _root(domain):
    """The name under which a disk is exported; there is one disk alone."""
    return next(disk.find('target').get('dev')
                for disk in domain.iterfind('devices/disk')
                if disk.get('device', 'disk') == 'disk')


def _owner(domain):
    """The user that QEMU runs as.

    :returns: user ID; None if libvirt gives it none, so that it runs as
        libvirtd does
    """
    label = domain.findtext("seclabel[@model='dac']/label") or ''
    user = label.partition(':')[0].removeprefix('+')
    return int(user) if user.isdigit() else None
