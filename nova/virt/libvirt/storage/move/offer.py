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
"""What the destination of a move tells the source that it can take.

It goes with the instance's MigrationContext, which both ends have and which
ends with the migration.
"""

import dataclasses

from oslo_serialization import jsonutils

# Where destinations of an older version have left it.
_OLD_KEY = 'libvirt_storage_offer'


@dataclasses.dataclass(frozen=True)
class OfferedPool:
    """What goes to a pool of the destination.

    :ivar kinds: of what goes there, see records.kinds.of()
    :ivar free: bytes; None if libvirt alone knows
    :ivar file_system: a number that pools in one file system share
    :ivar ceph: which Ceph pool it is over, None if it is over none
    """
    kinds: list[str]
    free: int | None
    file_system: int
    ceph: str | None = None


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a destination can take.

    :ivar migration_id: of the Migration that it is made for
    :ivar owner: user and group id of Nova on the destination
    :ivar pools: OfferedPool by the pool's name there
    :ivar preallocates: whether disks get all of their space there at once
    """
    migration_id: int
    owner: list[int]
    pools: dict[str, OfferedPool]
    preallocates: bool = False

    def pool_for(self, kind):
        """Return the name of the pool for a kind of disk, None without."""
        for name, pool in self.pools.items():
            if kind in pool.kinds:
                return name
        return None

    @property
    def streamed_to(self):
        """The names of the pools that take streams; of Ceph none does."""
        return [name for name, pool in self.pools.items() if not pool.ceph]

    @property
    def kinds(self):
        return sorted(kind for pool in self.pools.values()
                      for kind in pool.kinds)


def save(instance, offer):
    """Let the source read an offer."""
    told = dataclasses.asdict(offer)
    for pool in told['pools'].values():
        if pool['ceph'] is None:
            # Sources of an older version don't know it.
            del pool['ceph']
    instance.migration_context.driver_info = jsonutils.dumps(
        told, sort_keys=True)
    instance.save()


def load(instance):
    """Return the Offer that came with an instance, None without."""
    context = instance.migration_context
    text = context.driver_info if context is not None and (
        'driver_info' in context) else None
    if text:
        found = jsonutils.loads(text)
        pools = {name: OfferedPool(**pool)
                 for name, pool in found.pop('pools').items()}
        return Offer(pools=pools, **found)
    return _load_old(instance)


def _load_old(instance):
    value = instance.system_metadata.get(_OLD_KEY)
    if not value:
        return None
    old = jsonutils.loads(value)
    return Offer(migration_id=old['m'], owner=old['o'], pools={
        name: OfferedPool(old['p'][name], free, number)
        for name, free, number in zip(old['p'], old['f'], old['d'])})


def forget_old(instance):
    """Take an offer of the old form off an instance that the caller saves."""
    instance.system_metadata.pop(_OLD_KEY, None)
