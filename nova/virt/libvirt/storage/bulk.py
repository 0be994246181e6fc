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

"""Move the legacy disks of many instances into storage pools, one by one.

For a command line. Keeps nothing of its own: what is left to do is what the
records of disks say, so that a run can end at any moment, and the next one
goes on. The disks themselves are moved by the compute services.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
import typing as ty

from nova.compute import task_states
from nova.compute import vm_states
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
from nova.virt.libvirt.storage.move import readiness
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage import report

POLL = 2  # seconds
# Seconds without any change after which an instance isn't waited for.
STALLED = 900
# Seconds between two lines about one instance.
TOLD_EVERY = 10
# So many destinations are tried for an instance.
TRIES = 5
# Seconds for which a look at the compute nodes of a cell is good.
NODES_AGE = 300

# What a run may have asked for itself before it was ended.
OURS = (task_states.MIGRATING, task_states.REBOOTING_HARD,
        task_states.REBOOT_PENDING_HARD, task_states.REBOOT_STARTED_HARD)
MOVABLE = {*metadata.FILE_BACKENDS, fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
           report.NO_RECORD}


class NotMoved(Exception):
    """An instance keeps its legacy disks; the text says why."""


class Later(NotMoved):
    """Its disks can't be moved now, or not by the means that are allowed."""


@dataclasses.dataclass(frozen=True)
class Means:
    """What may be done to an instance to move its disks.

    :ivar live: migrate it live to a host that keeps disks in pools
    :ivar hard_reboot: reboot it on its host, where it can't move live
    """
    live: bool = False
    hard_reboot: bool = False


@dataclasses.dataclass
class Result:
    """Numbers of instances.

    :ivar moved: have all of their disks in pools now
    :ivar failed: keep legacy disks after an error
    :ivar later: keep them because of their state or of the means allowed
    :ivar stay: have disks on a backend from which there is no way to a pool
    :ivar unreached: were not looked at, because as many as asked for had moved
    """
    moved: int = 0
    failed: int = 0
    later: int = 0
    stay: int = 0
    unreached: int = 0

    def status(self, limited: bool) -> int:
        """The exit status, like that of Nova's online data migrations.

        :param limited: whether the number of instances was
        :returns: 0: none is left; 1: some have moved, the next run goes on;
            2: errors that need somebody; 3: what is left can't be moved now,
            or not by these means
        """
        if self.failed and not (limited and self.moved):
            return 2
        if self.moved and (self.unreached or self.failed):
            return 1
        return 3 if self.later or self.unreached else 0


class Mover:
    """Moves the disks of instances into pools.

    :param get_context: gives an admin's context, with which compute services
        can fetch images
    :param compute_api: nova.compute.api.API
    :param means: what may be done to instances
    :param tell: called with each line of the report
    """

    def __init__(self, get_context: ty.Callable[
                     [], 'nova_context.RequestContext'], compute_api,
                 means: Means, tell: ty.Callable[[str], None] = print):
        self._get_context = get_context
        self._api = compute_api
        self._means = means
        self._tell = tell
        self._nodes: dict[str, tuple[float, list]] = {}
        # Hosts on which a hard reboot has moved nothing.
        self._in_vain: set[str] = set()
        # Hosts on which legacy disks have come as such.
        self._kept_legacy: set[str] = set()

    def run(self, host: str | None = None, limit: int | None = None,
            dry_run: bool = False) -> Result:
        """Move the disks of all instances that have legacy ones.

        :param host: only instances of this compute service
        :param limit: end when so many instances have moved
        :param dry_run: only tell what would be done
        :raises: exception.CellTimeout if a cell's database doesn't answer
        """
        disks = report.disks(self._get_context(), host)
        found = [list(lines) for _uuid, lines in itertools.groupby(
            disks, lambda line: line.instance_uuid)]
        legacy = [lines for lines in found
                  if not all(line.in_pool for line in lines)]
        result = Result()
        for number, lines in enumerate(legacy, 1):
            if limit is not None and result.moved >= limit:
                result.unreached = len(legacy) - number + 1
                break
            prefix = '%d/%d %s on %s: ' % (
                number, len(legacy), lines[0].instance_uuid, lines[0].host)
            if not {line.backend for line in lines} <= {
                    *MOVABLE, report.BROKEN}:
                result.stay += 1
                self._tell(prefix + _('stays on %s') % ', '.join(sorted(
                    {line.backend for line in lines} - MOVABLE)))
                continue
            try:
                if dry_run:
                    said = self._plan(lines)
                    result.later += 1
                else:
                    said = self._move(lines, prefix)
                    result.moved += 1
            except Later as e:
                said = str(e)
                result.later += 1
            except (NotMoved, exception.NovaException) as e:
                said = str(e)
                result.failed += 1
            self._tell(prefix + said)
        return result

    def _plan(self, lines) -> str:
        """What would be done to an instance."""
        with self._instance(lines) as (cell, instance):
            if instance.task_state:
                raise Later(_('is busy: %s') % instance.task_state)
            names = ', '.join(line.disk or '?' for line in lines
                              if not line.in_pool)
            return _('%(way)s would move: %(disks)s') % {
                'way': ' or else '.join(self._ways(cell, instance)),
                'disks': names}

    def _move(self, lines, prefix) -> str:
        """Move one instance's disks by the first way that works.

        :returns: what was done
        :raises: NotMoved
        """
        start = time.monotonic()
        with self._instance(lines) as (cell, instance):
            if instance.task_state in OURS:
                self._tell(prefix + _('is busy: %s') % instance.task_state)
                self._wait(cell, instance, prefix)
                if not self._left(cell, instance):
                    return _('moved meanwhile')
            elif instance.task_state:
                raise Later(_('is busy: %s; run the command again later') %
                            instance.task_state)
            source = instance.host
            ways = self._ways(cell, instance)
            refusals = []
            for way, act in ways.items():
                if instance.host != source and (
                        act.func == self._live_migrate):
                    # Once is enough; what is left is a hard reboot there.
                    continue
                self._tell(prefix + way)
                try:
                    act(prefix)
                except NotMoved as e:
                    refusals.append('%s: %s' % (way, e))
                    if instance.task_state or (
                            instance.vm_state == vm_states.ERROR):
                        break
                else:
                    return _('moved by %(way)s in %(time)d s, is on %(host)s'
                             ) % {'way': way, 'host': instance.host,
                                  'time': time.monotonic() - start}
            raise NotMoved('; '.join(refusals))

    @contextlib.contextmanager
    def _instance(self, lines):
        """Look an instance up in its cell."""
        uuid = lines[0].instance_uuid
        if lines[0].backend == report.BROKEN:
            raise NotMoved(_('its record of disks can not be read; look at '
                             'driver_info of its block device mappings'))
        # Of a long run the first one's token would have expired.
        context = self._get_context()
        try:
            mapping = objects.InstanceMapping.get_by_instance_uuid(
                context, uuid)
            with nova_context.target_cell(
                    context, mapping.cell_mapping) as cell:
                yield cell, objects.Instance.get_by_uuid(
                    cell, uuid, expected_attrs=[
                        'flavor', 'metadata', 'system_metadata',
                        'pci_requests', 'numa_topology', 'info_cache'])
        except (exception.InstanceNotFound,
                exception.InstanceMappingNotFound):
            raise Later(_('has been deleted meanwhile'))

    # What can be done

    def _ways(self, cell, instance) -> dict[str, functools.partial]:
        """What to try, by its name, in this order.

        :raises: Later with what is in the way
        """
        found: dict[str, functools.partial] = {}
        reasons = []
        if not self._means.live:
            reasons.append(_('--live is not given'))
        elif instance.vm_state not in (vm_states.ACTIVE, vm_states.PAUSED):
            reasons.append(_('it is %s and can not be migrated live') %
                           instance.vm_state)
        else:
            for host in self._destinations(cell, instance):
                name = (_('live migration to %s') % host if host else
                        _('live migration'))
                found[name] = functools.partial(
                    self._live_migrate, cell, instance, host)
            if not found:
                reasons.append(_('no other host of its cell is ready to take '
                                 'disks into storage pools'))
                if self._kept_legacy:
                    reasons.append(_('legacy disks have come as such to %s') %
                                   ', '.join(sorted(self._kept_legacy)))
        why_not = self._no_reboot(cell, instance)
        if why_not:
            reasons.append(why_not)
        else:
            found[_('hard reboot')] = functools.partial(
                self._hard_reboot, cell, instance)
        if not found:
            raise Later('; '.join(reasons))
        return found

    def _no_reboot(self, cell, instance) -> str:
        """Why an instance isn't rebooted; '' if it may be."""
        if not any(node.host == instance.host and
                   readiness.STAT in (node.stats or {})
                   for node in self._nodes_of(cell)):
            return _('host %s keeps no disks in storage pools; set '
                     '[libvirt]/images_type = libvirt-storage there'
                     ) % instance.host
        if instance.vm_state == vm_states.STOPPED:
            return _('its disks move when it is started')
        if instance.vm_state != vm_states.ACTIVE:
            return _('its disks move at its next hard reboot, but it is %s'
                     ) % instance.vm_state
        if not self._means.hard_reboot:
            return _('--hard-reboot is not given')
        if instance.locked:
            return _('it is locked, and so is not rebooted; unlock it')
        if instance.host in self._in_vain:
            return _('a hard reboot on %s has moved nothing before'
                     ) % instance.host
        return ''

    def _nodes_of(self, cell):
        """The compute nodes of a cell, as they were lately."""
        key = cell.cell_uuid
        when, nodes = self._nodes.get(key, (float('-inf'), []))
        if time.monotonic() > when + NODES_AGE:
            nodes = list(objects.ComputeNodeList.get_all(cell))
            self._nodes[key] = time.monotonic(), nodes
        return nodes

    def _destinations(self, cell, instance) -> list[str | None]:
        """Hosts to which an instance may be sent, those with most room first.

        :returns: [None] where any host does, which the scheduler then chooses
        """
        others = [node for node in self._nodes_of(cell)
                  if node.host != instance.host]
        ready = [node for node in others if (node.stats or {}).get(
            readiness.STAT) == readiness.READY and
            node.host not in self._kept_legacy]
        if ready and len(ready) == len(others):
            return [None]
        ready.sort(key=lambda node: -(node.free_disk_gb or 0))
        return [node.host for node in ready[:TRIES]]

    # Doing it

    def _live_migrate(self, cell, instance, host, prefix):
        source = instance.host
        try:
            with self._asked(cell, instance, prefix):
                self._api.live_migrate(
                    cell, instance, block_migration=None,
                    disk_over_commit=None, host_name=host,
                    force=False if host else None, async_=True)
        except NotMoved:
            if instance.host != source:
                # So would others, whose disks would be copied for nothing.
                self._kept_legacy.add(instance.host)
            raise

    def _hard_reboot(self, cell, instance, prefix):
        try:
            with self._asked(cell, instance, prefix):
                self._api.reboot(cell, instance, 'HARD')
        except NotMoved:
            # What was in the way of one will be in the way of others, which
            # would be rebooted for nothing.
            self._in_vain.add(instance.host)
            raise

    @contextlib.contextmanager
    def _asked(self, cell, instance, prefix):
        """Ask for something in here, then wait for what it comes to.

        :raises: NotMoved unless all disks are in pools afterwards
        """
        before = self._faults(cell, instance)
        try:
            yield
        except exception.NovaException as e:
            raise NotMoved(_('refused: %s') % e)
        self._wait(cell, instance, prefix)
        if not self._left(cell, instance):
            return
        told = [fault.message for number, fault in sorted(
            self._faults(cell, instance).items()) if number not in before]
        raise NotMoved(': '.join(dict.fromkeys(filter(None, told))) or _(
            'its disks are where they were; the log of nova-compute on %s '
            'says why') % instance.host)

    @staticmethod
    def _faults(cell, instance) -> dict:
        return {fault.id: fault for fault in
                objects.InstanceFaultList.get_by_instance_uuids(
                    cell, [instance.uuid])}

    @staticmethod
    def _left(cell, instance) -> bool:
        """Whether an instance has legacy disks."""
        return not all(
            line.in_pool for line in report.disks_of(cell, instance))

    def _wait(self, cell, instance, prefix):
        """Wait until nothing is under way with an instance.

        :raises: NotMoved if nothing changes any more
        """
        seen = None
        changed = told = time.monotonic()
        while True:
            instance.refresh()
            if not instance.task_state:
                return
            progress = self._progress(cell, instance)
            now = time.monotonic()
            if (instance.task_state, progress) != seen:
                seen, changed = (instance.task_state, progress), now
            elif now > changed + STALLED:
                raise NotMoved(_(
                    'nothing has changed for %(time)d s (%(task)s); look at '
                    'the log of nova-compute on %(host)s') % {
                        'time': STALLED, 'task': instance.task_state,
                        'host': instance.host})
            if progress and now > told + TOLD_EVERY:
                told = now
                self._tell(prefix + _(
                    '%(remaining)d of %(total)d MiB of disks and memory '
                    'remain') % {'remaining': progress[0] >> 20,
                                 'total': progress[1] >> 20})
            time.sleep(POLL)

    @staticmethod
    def _progress(cell, instance) -> tuple[int, int] | None:
        """Bytes that remain and bytes in all of a live migration."""
        for migration in objects.MigrationList.get_in_progress_by_instance(
                cell, instance.uuid, fields.MigrationType.LIVE_MIGRATION):
            sums = [(migration.disk_remaining or 0) +
                    (migration.memory_remaining or 0),
                    (migration.disk_total or 0) +
                    (migration.memory_total or 0)]
            return (sums[0], sums[1]) if sums[1] else None
        return None
