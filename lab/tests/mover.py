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
"""A compute service's part in a move of volumes; run as a program in a host.

Nova's own modules and the host's real libvirtd. The database is a JSON file
that both hosts see; there is no guest. Reads requests, one JSON a line: the
step's name first; answers each so. A service is a child of this program: to
kill it is to kill a compute service.
"""

import json
import os
import random
import signal
import sys
import threading
import time

UUID = '5d1c4d11-6f3a-4c5e-9a70-0f6f2c1d8e01'
DISKS, BASES = 'nova-disks-pool', 'nova-base-images-pool'
#: The line that starts a compute service, and what is answered for one that
#: was killed.
START, KILLED = 'start\n', '"killed"\n'


class Database:
    """What outlives a compute service.

    :param path: of the file
    """

    def __init__(self, path):
        self.path = path

    def load(self):
        with open(self.path) as f:
            return json.load(f)

    def update(self, key, value):
        found = self.load()
        found[key] = value
        with open(self.path + '.new', 'w') as f:
            json.dump(found, f)
        os.rename(self.path + '.new', self.path)


class Host:
    """As much of nova.virt.libvirt.host.Host as a move takes."""

    def __init__(self, libvirt):
        from nova.virt.libvirt import host
        self.runs = False
        self._libvirt = libvirt
        self._connection = None
        # As in initialize(): what is logged beside is to be seen, as there.
        libvirt.registerErrorHandler(host.Host._libvirt_error_handler, None)
        self._host = host.Host('qemu:///system')

    def get_connection(self):
        from nova import exception
        from nova.virt.libvirt.storage.pool import pool
        if self._connection is None or not self._connection.isAlive() or (
                pool.has_lost_storage(self._connection)):
            try:
                self._connection = self._libvirt.open('qemu:///system')
            except self._libvirt.libvirtError as error:
                raise exception.HypervisorUnavailable() from error
            self._connection.setKeepAlive(5, 3)
        return self._connection

    def connect_to_peer(self, uri):
        return self._host.connect_to_peer(uri)

    def get_guest(self, instance):
        from nova import exception
        if not self.runs:
            raise exception.InstanceNotFound(instance_id=instance.uuid)
        return Guest()


class Guest:
    """One that runs."""

    def is_active(self):
        return True

    def get_config(self):
        from nova.virt.libvirt import config
        return config.LibvirtConfigGuest()


class Jobs:
    def add_job(self, instance, pid):
        pass

    remove_job = add_job


class Compute:
    """One host's compute service.

    :param name: of this host
    :param database: the Database
    :param peer: address of the destination
    """

    def __init__(self, name, database, peer):
        import libvirt
        from nova import conf
        from nova import context
        from nova import objects
        from nova.virt.libvirt import host
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=self._events, args=(libvirt,),
                         daemon=True).start()
        host.libvirt = libvirt
        objects.register_all()
        self.conf = conf.CONF
        self.conf([], project='nova', default_config_files=[])
        self.conf.set_override('host', name)
        self.conf.set_override('instances_path', '/var/lib/nova/instances')
        # There is no RPC here, by which disks could come over NBD.
        for key, value in (('images_type', 'libvirt-storage'),
                           ('storage_migration_transport', 'libvirt'),
                           ('storage_migration_stall_timeout', 5)):
            self.conf.set_override(key, value, 'libvirt')
        self.conf.set_override('helper_command', 'sudo privsep-helper',
                               'nova_sys_admin')
        self.name, self.database, self.peer = name, database, peer
        self.context = context.get_admin_context()
        self.step = None
        self.die_at(None)
        self.host = Host(libvirt)
        self._stand_in(objects)

    @staticmethod
    def _events(libvirt):
        while True:
            libvirt.virEventRunDefaultImpl()

    def _stand_in(self, objects):
        """The conductor's part."""
        database = self.database
        objects.BlockDeviceMappingList._save_driver_info = staticmethod(
            lambda context, uuid, infos: self._save(infos))
        objects.BlockDeviceMappingList.get_by_instance_uuid = staticmethod(
            lambda context, uuid: self.bdms())
        objects.Instance.save = lambda instance, **more: database.update(
            'offer', instance.migration_context.driver_info)
        objects.Instance.get_by_uuid = staticmethod(
            lambda context, uuid, **more: self.instance)
        objects.Migration.save = lambda migration: None
        objects.Service.get_by_host_and_binary = staticmethod(
            lambda *args: objects.Service())

    def bdms(self):
        from nova import objects
        found = self.database.load()
        return objects.BlockDeviceMappingList(objects=[
            objects.BlockDeviceMapping(
                id=number, uuid=uuid, instance_uuid=UUID, no_device=False,
                source_type='image' if number == 0 else 'blank',
                destination_type='local', guest_format=None,
                boot_index=0 if number == 0 else -1,
                driver_info=found['driver_info'].get(uuid))
            for number, uuid in enumerate(found['mappings'])])

    @property
    def instance(self):
        from nova import objects
        return objects.Instance(
            self.context, id=1, uuid=UUID, image_ref=None, progress=0,
            task_state='resize_migrating',
            flavor=objects.Flavor(root_gb=1, ephemeral_gb=0, swap=0),
            system_metadata={}, migration_context=objects.MigrationContext(
                migration_id=7, driver_info=self.database.load()['offer']))

    @property
    def migration(self):
        from nova import objects
        return objects.Migration(
            self.context, id=7, status='migrating', source_compute='host-a',
            dest_compute='host-b', dest_host=self.peer)

    def disks(self, instance):
        from nova.virt.libvirt.storage.records import metadata
        return metadata.InstanceDisks.from_bdms(instance, self.bdms())

    # -- the steps

    def configure(self, **values):
        """Override options of [libvirt]; None: as before."""
        for key, value in values.items():
            if value is None:
                self.conf.clear_override(key, 'libvirt')
            else:
                self.conf.set_override(key, value, 'libvirt')

    def capacity(self):
        """What the host reports of its pools, in bytes."""
        from nova.virt.libvirt.storage.pool import usage
        return usage.get_local_info(self.host.get_connection(), self.name)

    def delete(self):
        """All volumes of the instance on this host."""
        from nova.virt.libvirt.storage.pool import ownership
        return ownership.delete_volumes(
            self.host.get_connection(), self.instance)

    def adopt(self):
        """Have the volumes of this host on record."""
        from nova.objects import fields
        from nova.virt.libvirt.storage.records import metadata
        disks = self.disks(self.instance)
        for name, length in self.database.load()['disks'].items():
            disks.set(name, metadata.LibvirtDiskMetadata(
                backend=fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
                format=fields.LibvirtDiskFormat.RAW, size=length,
                state=fields.LibvirtDiskState.READY, host=self.name,
                pool=DISKS, volume='%s_%s' % (UUID, name)))
        disks.save(self.context)

    def offer(self):
        from nova.virt.libvirt.storage.move import destination as arrival
        instance = self.instance
        arrival.offer(self.host.get_connection(), instance, self.migration,
                      self.disks(instance))

    def move(self, bandwidth=0, checked=None, log=None, ahead=None):
        """Check and copy.

        :param checked: a file that is made when the checks are over
        :param log: what the guest's console has said
        :param ahead: a file that is made when the disks have been sent ahead;
            it goes on when that is gone
        """
        from nova.virt.libvirt.storage.move import source as migration
        from nova.virt.libvirt.storage.move import state
        self.conf.set_override('storage_migration_bandwidth', bandwidth,
                               'libvirt')
        instance = self.instance
        outgoing = migration.Outgoing(state.Move(
            self.context, state.ThisHost(
                self.host, 'qemu:///system',
                self.conf.libvirt.migration_inbound_addr, Jobs()),
            instance, self.migration, self.disks(instance)))
        outgoing.check()
        with outgoing:
            if checked:
                open(checked, 'w').close()
            if ahead:
                self._send_ahead(outgoing, bandwidth, ahead)
            directory = '/var/lib/nova/instances/%s_resize' % UUID
            os.makedirs(directory, exist_ok=True)
            with open(os.path.join(directory, 'console.log'), 'w') as f:
                f.write(log or '')
            outgoing.run(directory)

    def _send_ahead(self, outgoing, bandwidth, ahead):
        self.configure(storage_migration_precopy=0,
                       storage_migration_precopy_bandwidth=bandwidth)
        self.host.runs = True
        try:
            outgoing.send_ahead()
            open(ahead, 'w').close()
            while os.path.exists(ahead):
                time.sleep(.01)
        finally:
            self.host.runs = False

    def accept(self):
        from nova.virt.libvirt.storage.move import destination as arrival
        instance = self.instance
        # No disk here has a base image.
        arrival.accept(self.context, instance, self.disks(instance),
                       self.host.get_connection(), 'qemu:///system', None)

    def revert(self):
        """What the destination does of it: destroy()."""
        from nova.compute import task_states
        from nova.virt.libvirt.storage.move import destination
        from nova.virt.libvirt.storage.move import source
        instance = self.instance
        instance.task_state = task_states.RESIZE_REVERTING
        disks = self.disks(instance)
        if not destination.give_back(
                self.host.get_connection(), instance, disks,
                source.kept(disks)):
            raise RuntimeError('volumes are left')

    def refuse(self):
        """What a hard reboot on the destination of a revert does first."""
        from nova.virt.libvirt.storage.records import leftovers
        leftovers.refuse_given_back(
            self.host.get_connection(), self.disks(self.instance))

    def rows(self):
        """The table of a move."""
        from nova.virt.libvirt.storage.move import state
        return state.STEPS

    def die_at(self, row, late=False):
        """Be killed when a row of the table has been saved.

        :param row: its name
        :param late: when the next one would be saved
        """
        self._die_at, self._late = row, late

    def _die(self):
        from nova.virt.libvirt.storage.move import state
        row = state.step_of(self.disks(self.instance))
        # Two rows look like others.
        row = {('revert', state.CONFIRM): state.GIVE_BACK,
               ('abandon', state.CONFIRM): state.GIVE_BACK,
               ('abandon', state.OFFER): state.REVERT}.get(
                   (self.step, row), row)
        if row == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _save(self, infos):
        if self._late:
            self._die()
        self.database.update('driver_info', {
            **self.database.load()['driver_info'], **infos})
        if not self._late:
            self._die()

    def abandon(self):
        """On the source, after a revert or a crash."""
        from nova.virt.libvirt.storage.move import source as migration
        instance = self.instance
        migration.abandon(self.context, self.host, instance, self.migration,
                          self.disks(instance))

    def confirm(self):
        from nova.virt.libvirt.storage.move import source as migration
        migration.confirm(self.context, self.host.get_connection(),
                          self.instance)

    def beside(self):
        """What is on record beside the disks."""
        disks = self.disks(self.instance)
        return [disks.leftovers, sorted(disks.extras)]

    def moved(self):
        """Whether the source has come to the end of a move."""
        from nova.virt.libvirt.storage.move import state
        return state.moved_by(self.disks(self.instance)) is not None

    def records(self):
        return {name: [record.state, record.host, record.volume]
                for name, record in self.disks(self.instance).items()}


def serve(compute, answers):
    """Answer requests until there are no more."""
    print(json.dumps(os.getpid()), file=answers, flush=True)
    for line in sys.stdin:
        step, arguments = json.loads(line)
        try:
            compute.step = step
            answer = getattr(compute, step)(**arguments)
        except Exception as error:
            answer = {'error': '%s: %s' % (type(error).__name__, error)}
        print(json.dumps(answer), file=answers, flush=True)


def main():
    """Start a compute service whenever that is asked for.

    It is a child of a process that has imported all of Nova and does nothing
    else: that takes three seconds of a processor, and services are killed a
    lot.
    """
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    name, path, peer = sys.argv[1:]
    import libvirt  # noqa: F401
    from nova import objects
    import nova.virt.libvirt.host
    import nova.virt.libvirt.storage.pool.ownership
    import nova.virt.libvirt.storage.move.source  # noqa: F401
    objects.register_all()
    # What one that was killed has not read is nobody's.
    while line := sys.stdin.readline():
        if line != START:
            continue
        if not (pid := os.fork()):
            random.seed()
            serve(Compute(name, Database(path), peer), answers)
            # No thread of libvirt's is waited for.
            os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            return
        print(KILLED, end='', file=answers, flush=True)


if __name__ == '__main__':
    main()
