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
"""What is meant by the errors of libvirt's storage driver, and of LVM."""

import errno
import os

from oslo_concurrency import processutils

from nova.virt.libvirt.storage.pool import kinds

try:
    import libvirt
except ImportError:
    libvirt = None


def is_libvirt_error(error):
    """Whether it comes from libvirt, for retries: of whatever code."""
    return isinstance(error, libvirt.libvirtError)


def says(error, texts):
    """Whether one of several texts is in the message of a libvirtError."""
    message = error.get_error_message() or ''
    return any(text in message for text in texts)


def is_full(error):
    """Whether a pool has no room, as libvirt tells of the system or of LVM."""
    return says(error, kinds.POOL_IS_FULL) or (
        error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR and
        error.get_int1() == errno.ENOSPC)


def is_no_directory(error):
    """Whether a path turned out to be something else than a directory."""
    return is_libvirt_error(error) and (
        error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR) and (
        error.get_int1() == errno.ENOTDIR or
        os.strerror(errno.ENOTDIR) in (error.get_error_message() or ''))


def is_busy(error):
    """Whether volumes of a pool are being made, or copied."""
    # VIR_ERR_INTERNAL_ERROR, which has no meaning of its own.
    return is_libvirt_error(error) and (
        'asynchronous jobs running' in (error.get_error_message() or ''))


def is_in_use(error):
    """Whether somebody has a volume open that is to be deleted."""
    return is_libvirt_error(error) and says(error, kinds.VOLUME_IS_BUSY)


def lvm_is_full(error):
    """Whether a volume group has no room, as LVM itself tells."""
    return isinstance(error, processutils.ProcessExecutionError) and any(
        text in (error.stderr or '') for text in kinds.POOL_IS_FULL)
