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
"""What a move takes along, one class a kind.

Each knows where it is on record, what it is called on the destination, and
whether bytes are copied.
"""

from nova.objects import fields
from nova.virt.libvirt.storage.move import base_image
from nova.virt.libvirt.storage.move import guest_files
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils


class Item:
    """One volume on its way.

    :ivar name: of the disk, or of what else it is
    :ivar pool: the destination's PeerPool
    :ivar source: its StorageVolume, None if it isn't copied
    :ivar target: the volume's name there, once chosen
    :ivar sparse: whether the destination may leave holes
    :ivar length: bytes of the source (physical, not virtual)
    :ivar allocation: bytes which that takes up
    :ivar keeps_base: whether it goes as an overlay over the base image
    :ivar growth: bytes that come in addition when it is flattened
    :ivar done: bytes copied
    :ivar ahead: the Ahead if it was copied while the guest was running
    :ivar ahead_length: bytes that it had then
    :ivar ahead_done: bytes of them that were copied
    :ivar result: the pump's Result
    """
    # The permissions of the volume there.
    mode = 0o644
    # Whether it may get another name when there is a file in the way.
    may_be_renamed = True
    # Whether its bytes go to the peer as they are, so that they may go ahead.
    is_streamed = True

    def __init__(self, name, pool, source=None):
        self.name = name
        self.pool = pool
        self.source = source
        self.target = None
        self.sparse, self.keeps_base = True, False
        self.length = self.allocation = self.growth = self.done = 0
        self.ahead = None
        self.ahead_length = self.ahead_done = 0
        self.result = None
        if source:
            self.measure()

    def measure(self):
        """Take the sizes of what is copied, as they are now."""
        self.length, allocation = self.source.file_bytes()
        self.allocation = min(allocation, self.length)

    def set_done(self, done):
        self.done = done

    def send(self, transfer):
        """Copy it.

        :param transfer: the copy.Transfer; the result is noted here
        """
        transfer.copy_all_of(self)

    def finds_holes(self):
        """Whether nothing but its zeroes tells what was never written."""
        return not self.source.pool.kind().sparse

    def place_here(self):
        """Return the name of its pool on this host, None if it has none."""
        return None

    def reserved(self):
        """Return the bytes it takes where all of a disk is allocated."""
        return self.allocation if self.sparse else self.length

    def flattenable(self):
        """Whether it may be an overlay."""
        return False

    def on_record(self, disks):
        return disks.extras[self.name]

    def put(self, disks, record):
        disks.set_extra(self.name, record)

    def new_record(self):
        """Return the record to which pool, host and state are added."""
        return metadata.LibvirtDiskMetadata(
            backend=fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
            format=fields.LibvirtDiskFormat.RAW, size=self.length)


class RemadeDisk(Item):
    """A disk that is made anew on the destination.

    :ivar record: the disk's record on this host
    """

    def __init__(self, name, pool, record, source=None):
        # Some measure by it.
        self.record = record
        super().__init__(name, pool, source)

    def place_here(self):
        return self.record.pool

    def reserved(self):
        return max(self.record.size or 0, self.length)

    def on_record(self, disks):
        return disks.get(self.name)

    def put(self, disks, record):
        disks.set(self.name, record)

    def new_record(self):
        record = self.record.obj_clone()
        record.previous = self.record.obj_clone()
        record.previous.previous = None
        kind = kinds.of_type(self.pool.check())
        record.backend = (fields.LibvirtDiskBackend.LIBVIRT_STORAGE_RBD
                          if kind.is_ceph else
                          fields.LibvirtDiskBackend.LIBVIRT_STORAGE)
        if kind.is_ceph or not self.source and not kind.has_overlays:
            record.format = fields.LibvirtDiskFormat.RAW
        return record


class Disk(RemadeDisk):
    """A disk that is copied."""

    def flattenable(self):
        return self.record.format == fields.LibvirtDiskFormat.QCOW2

    def new_record(self):
        record = super().new_record()
        if record.format == fields.LibvirtDiskFormat.RAW and record.size:
            # One that is or was a logical volume is rounded up, and its guest
            # sees that.
            record.size = max(record.size, self.length)
        return record


class GuestFiles(Item):
    """The guest's files, packed into a volume for the way."""
    NAME = guest_files.NAME
    mode = 0o600

    @staticmethod
    def is_here(context, instance):
        return False

    @staticmethod
    def take(instance, volume):
        guest_files.unpack(instance, volume,
                           libvirt_utils.get_instance_path(instance))


class BaseImage(Item):
    """The base image, for the destination's image cache."""
    NAME = base_image.NAME
    may_be_renamed = False

    def __init__(self, name, pool, source, target):
        super().__init__(name, pool, source)
        self.target = target

    @staticmethod
    def is_here(context, instance):
        # An earlier call has put it there, or somebody was faster.
        return base_image.is_cached(instance) or (
            base_image.is_refused(context, instance))

    take = staticmethod(base_image.take)


# What comes beside the disks, in the order in which it is taken over: NAME as
# on record; is_here(), whether there is nothing left to take; take(), of an
# instance and of its volume here, which is known to be what was sent.
EXTRAS = (BaseImage, GuestFiles)
