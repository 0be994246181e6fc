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

"""A local file's way into a volume and out of it; knows no instances.

A volume may belong to root, or be no file at all. So what has been generated
here reaches it as a stream.
"""

import errno
import os

from oslo_concurrency import processutils
from oslo_utils import excutils

import nova.conf
from nova import exception
import nova.privsep.storage

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF

# By libvirt's news: "Fix virStream hole handling" of 10.1.0, "Fix stale
# virStream status" of 12.7.0. 9.0, 11.3 and 12.8 have been seen.
_SINCE = 10_001_000
_MENDED = 12_007_000
#: These versions, for messages.
FAULTY_VERSIONS = '10.1 to 12.6'


def must_fit(connection) -> bool:
    """Whether a write error in an upload, such as a full disk, ends libvirt.

    Or makes it spin for ever.

    :param connection: a libvirt.virConnect to the host of the volume
    """
    return _SINCE <= connection.getLibVersion() < _MENDED


def _next_section(_stream, fd):
    """Tell libvirt what lies at the file's position.

    See virStreamSourceHoleFunc in
    https://libvirt.org/html/libvirt-libvirt-stream.html

    :return: Whether it is data, and for how many bytes.
    """
    position = os.lseek(fd, 0, os.SEEK_CUR)
    end = os.lseek(fd, 0, os.SEEK_END)
    try:
        data = os.lseek(fd, position, os.SEEK_DATA)
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        # There is only a hole, or nothing, up to the end.
        data = end
    if data > position or position >= end:
        section = (False, data - position)
    else:
        section = (True, os.lseek(fd, position, os.SEEK_HOLE) - position)
    os.lseek(fd, position, os.SEEK_SET)
    return section


def _read(_stream, count, fd):
    return os.read(fd, count)


def _skip(_stream, length, fd):
    return os.lseek(fd, length, os.SEEK_CUR)


def upload_file(volume, path, sparse=True):
    """Write a file to a volume from its start.

    Where a full disk would end libvirt the volume's file is written without
    it: what is small enough to be generated lies on this host.

    :param volume: The StorageVolume. Nothing has been written to it: libvirt
        skips the holes of the file, it does not zero them. A hole at the
        file's end leaves the volume as long as the file.
    :param path: Path of the file. Nova can read it.
    :param sparse: False to write the holes as zeroes, which keeps what is
        allocated to the volume.
    :raises: exception.StorageVolumeError, StorageVolumeUploadFailed,
        InsufficientStoragePoolSpace
    """
    if (volume.pool.host == CONF.host and
            must_fit(volume.raw.connect()) and volume.pool.kind().sparse):
        _write_file(volume, path, sparse)
        return
    flags = libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM if sparse else 0
    try:
        with open(path, 'rb', buffering=0) as source, volume.libvirt_errors():
            stream = volume.raw.connect().newStream(0)
            _send(volume, stream, source.fileno(), flags)
    except OSError as e:
        raise exception.StorageVolumeUploadFailed(
            pool=volume.pool.name, volume=volume.name, host=volume.pool.host,
            path=path, reason=e) from e


def _write_file(volume, path, sparse):
    names = {'pool': volume.pool.name, 'volume': volume.name,
             'host': volume.pool.host, 'path': path}
    try:
        nova.privsep.storage.write_over(path, volume.path, sparse)
    except processutils.ProcessExecutionError as e:
        if os.strerror(errno.ENOSPC) in (e.stderr or ''):
            raise exception.InsufficientStoragePoolSpace(
                reason=e, code=errno.ENOSPC, **names) from e
        raise exception.StorageVolumeUploadFailed(reason=e, **names) from e


def _send(volume, stream, fd, flags):
    length = os.fstat(fd).st_size
    volume.raw.upload(stream, 0, length, flags)
    try:
        if flags:
            stream.sparseSendAll(_read, _next_section, _skip, fd)
        else:
            stream.sendAll(_read, fd)
        # Too few bytes are no error to libvirt.
        sent = os.lseek(fd, 0, os.SEEK_CUR)
        if sent != length:
            raise OSError(errno.EIO, '%d of %d bytes were sent' % (
                sent, length))
        stream.finish()
    except Exception:
        with excutils.save_and_reraise_exception():
            stream.abort()


def write_zeroes(volume, begin, end):
    """Overwrite a part of a block device with zeroes, which don't travel.

    libvirt writes what is sent as a hole to a block device as zeroes; into a
    file it would leave a hole, whatever is there.

    :param volume: The StorageVolume.
    :param begin: Byte with which to begin.
    :param end: The byte behind the last one.
    :raises: exception.StorageVolumeError
    """
    if begin >= end:
        return
    with volume.libvirt_errors():
        stream = volume.raw.connect().newStream(0)
        volume.raw.upload(stream, begin, end - begin,
                          libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
        try:
            stream.sendHole(end - begin)
            stream.finish()
        except Exception:
            with excutils.save_and_reraise_exception():
                stream.abort()


def download_file(volume, path):
    """Write a volume's content to a file.

    Only for what is small: the event loop of this process reads a stream's
    packets as they come.

    :param volume: The StorageVolume.
    :param path: Path of the file, which Nova alone can read.
    :raises: exception.StorageVolumeError
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
              'wb') as target, volume.libvirt_errors():
        stream = volume.raw.connect().newStream(0)
        # Length 0 is all of it.
        volume.raw.download(stream, 0, 0, 0)
        try:
            stream.recvAll(_write, target)
            stream.finish()
        except Exception:
            with excutils.save_and_reraise_exception():
                stream.abort()


def _write(_stream, data, target):
    return target.write(data)
