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
"""What the source of a move asks of its destination, whichever way it asks.

Whoever checks, copies or undoes a move speaks to a Peer and knows neither a
connection nor a protocol.
"""

import abc
import dataclasses
import typing as ty

from nova.virt.libvirt.storage.pool import kinds


class PeerPool(abc.ABC):
    """A storage pool of the destination.

    :ivar name: the pool's name
    :ivar host: the name of the host that it is on
    """
    name: str
    host: str

    @abc.abstractmethod
    def check(self) -> str:
        """Check that the pool is there, active, and can take disks this way.

        :returns: its type
        :raises: exception.MigrationPreCheckError
        """

    @abc.abstractmethod
    def available(self, wanted: int) -> int:
        """How many bytes it has room for.

        :param wanted: bytes; if there seem to be less, it is measured anew
        """

    @abc.abstractmethod
    def refresh(self) -> None:
        """Have the destination see what others have put into the pool."""

    @abc.abstractmethod
    def has(self, name: str, refresh: bool = False) -> bool:
        """Whether a volume of that name is there.

        :param refresh: look anew before the answer is no
        """

    @abc.abstractmethod
    def free_name(self, wanted: str, taken: ty.Collection[str] = ()) -> str:
        """A name for a new volume, see StoragePool.free_name()."""

    @abc.abstractmethod
    def is_shared(self, here, instance) -> bool:
        """Whether it is one with a pool of this host.

        :param here: StoragePool of this host
        :param instance: whose prefix the volumes get that are made to find out
        """

    def take_up(self, name: str, lengths: tuple[int, int], mode: int,
                key: int) -> bytes:
        """Have a volume that was kept there be what the bytes go to.

        Only where the Peer keeps copies.

        :param lengths: bytes of the disk, and of the volume: what is there
            beyond the disk reads as zeroes then
        :param mode: permissions of the file
        :param key: for the checksums
        :returns: what the pump.read_table() of all of it gives
        :raises: exception.NovaException; then nothing is known of it
        """
        raise NotImplementedError()

    def read(self, name: str, length: int, key: int,
             changed: ty.Any = None) -> None:
        """Have the destination read what has come so far; doesn't wait.

        Only where the Peer reads ahead.

        :param length: bytes of the volume
        :param key: for the checksums, that of the copy
        :param changed: (offset, length) of what was written to a volume that
            was taken up under the same key
        :raises: exception.NovaException
        """
        raise NotImplementedError()

    def has_read(self, name: str) -> tuple[int, bool]:
        """How far that is.

        :returns: bytes, and whether it is over
        :raises: exception.NovaException if it has failed
        """
        raise NotImplementedError()

    @abc.abstractmethod
    def create(self, name: str, length: int, mode: int) -> None:
        """Make the volume that the bytes go to, as Nova's there.

        :param length: bytes of the file, whatever its format is
        :param mode: permissions of the file
        :raises: exception.StorageVolumeError and subclasses; what has that
            name already is not touched
        """


@dataclasses.dataclass
class Target:
    """A volume of the destination that is open for writing.

    :ivar end: what the pump writes to
    :ivar connected: to be called when the pump has connected
    :ivar length: bytes that are left of it when it is closed; None: all.
        Only where the Peer takes disks ahead.
    :ivar changed: (offset, length) of what was written since the destination
        has read it; None: it hasn't, or all
    """
    end: ty.Any
    connected: ty.Callable[[], ty.Any] = lambda: None
    length: int | None = None
    changed: ty.Any = None


class Peer(abc.ABC):
    """The destination of a move.

    :ivar where: what it is called in messages and in the log
    :ivar may_be_cut: whether what made a move fail may have cut it off
    :ivar takes_ahead: whether a disk may be sent in two passes
    :ivar reads: whether the destination reads a disk before it is closed
    :ivar keeps: whether what was kept there may be written over
    """
    where: str
    may_be_cut = True
    takes_ahead = False
    reads = False
    keeps = False

    def check(self, pools: ty.Iterable[str]) -> None:
        """Check that disks can go to pools of the destination.

        :param pools: their names
        :raises: exception.MigrationPreCheckError
        """
        for name in pools:
            self.pool(name).check()

    @abc.abstractmethod
    def pool(self, name: str) -> PeerPool:
        """The destination's pool of that name; nothing is asked yet."""

    @abc.abstractmethod
    def takes_holes(self) -> bool:
        """Whether what is sent may have holes.

        A new file has them then, and a block device zeroes in their place.
        """

    def is_sparse(self, pool_type: str) -> bool:
        """Whether a copy travels with its holes, and has them there.

        :param pool_type: of the destination's pool
        """
        return kinds.of_type(pool_type).sparse and self.takes_holes()

    def room_ahead(self, length: int, most: int) -> int:
        """How long a volume is made that is sent in two passes.

        :param length: bytes that the disk has now
        :param most: bytes that it may have when its guest is off
        """
        return most

    @abc.abstractmethod
    def target(self, pool_name: str, volume_name: str):
        """Open a volume that was created for writing.

        :returns: a context manager, which gives a Target
        """

    @abc.abstractmethod
    def delete(self, places, instance) -> list[tuple[str, str]]:
        """Delete volumes of a move that has failed.

        :param places: iterable of (pool, volume); one that isn't there is gone
        :returns: those that couldn't be deleted
        """
