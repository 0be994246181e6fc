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

import os
from unittest import mock

from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

import nova.conf
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import source

CONF = nova.conf.CONF

CAPTURES = os.path.join(os.path.dirname(__file__), 'captures')


class UpgradeTestCase(test_move.OutgoingTestCase):
    """Records of version 1.0, with keys in system_metadata, go on.

    Captured where compute services of that version had left them.
    """

    def setUp(self):
        super().setUp()
        self.fname = imagecache.get_cache_fname(uuids.image)
        self.lay_over('disk', self.fname, 50)
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda *args: self.load())
        self.stub_out('nova.virt.libvirt.storage.move.destination._adopt_base',
                      lambda *args: None)
        self.stub_out('nova.virt.libvirt.storage.move.guest_files.unpack',
                      lambda *args: None)

    def capture(self, name, at_dest=()):
        """Have an instance as an older compute service has left it."""
        with open(os.path.join(CAPTURES, name + '-1.0.json')) as f:
            text = f.read()
        for key in ('instance', 'image', 'bdm1', 'bdm2', 'bdm3'):
            text = text.replace('{%s}' % key, getattr(uuids, key))
        text = text.replace('{fname}', self.fname).replace(
            '{files_length}', '7').replace(
            '{files_checksum}', str(two_hosts.checksum_of('a tar'))).replace(
            '2135681684', str(two_hosts.checksum_of('image ' + self.fname)))
        found = jsonutils.loads(text)
        for bdm, driver_info in zip(self.bdms, found['driver_info']):
            self.assertIn('"nova_object.version": "1.0"', driver_info)
            bdm.driver_info = driver_info
            bdm.obj_reset_changes()
        self.instance.system_metadata = found['system_metadata']
        there = self.dest.pools[two_hosts.POOL]
        for disk in at_dest:
            there[self.volume_name(disk)] = dict(
                self.source.pools[two_hosts.POOL][self.volume_name(disk)])
        if at_dest:
            there[self.volume_name('files')] = {
                'length': 7, 'allocation': 7, 'content': 'a tar'}
            self.dest.pools[two_hosts.BASES]['%s.%s' % (
                self.fname, uuids.instance)] = dict(
                    self.source.pools[two_hosts.BASES][self.fname])

    def accept(self):
        self.flags(host='dest')
        with mock.patch('os.rename'):
            destination.accept(self.context, self.instance, self.load(),
                               self.dest, 'dest:///', self.cache_base)
        self.flags(host='source')

    def is_new(self):
        """Nothing is of the old form any longer."""
        for bdm in self.bdms:
            if bdm.driver_info is not None:
                self.assertNotIn('"nova_object.version": "1.0"',
                                 bdm.driver_info.replace(
                                     '"LibvirtLeftoverVolume", '
                                     '"nova_object.namespace": '
                                     '"nova.virt.libvirt", '
                                     '"nova_object.version": "1.0"', ''))
        self.assertEqual({}, self.instance.system_metadata)

    def test_ready(self):
        self.capture('ready')
        self.assertEqual(test_move.AT_SOURCE, self.places())
        left = [('other', two_hosts.POOL, self.volume_name('disk.1'))]
        disks = self.load()
        self.assertEqual(left, disks.leftovers)
        disks.save(self.context)
        self.is_new()
        self.assertEqual(left, self.load().leftovers)

    def test_copied_and_accepted_and_confirmed(self):
        self.capture('copied', test_move.COPIED)
        self.accept()
        self.assertEqual(
            dict(test_move.ON_THE_WAY, **{
                name: ('ready', 'dest', name, 'source')
                for name in test_move.COPIED}), self.places())
        self.is_new()
        self.assertEqual(test_move.COPIED, self.ours(self.dest))
        source.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.ours(self.source))

    def test_copied_and_abandoned(self):
        self.capture('copied', test_move.COPIED)
        source.abandon(self.context, self.host, self.instance,
                       self.migration, self.load())
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual([self.fname], sorted(
            self.source.pools[two_hosts.BASES]))
        self.assertEqual({}, self.dest.pools[two_hosts.BASES])
        self.is_new()

    def test_killed_while_it_copied(self):
        self.capture('copying', test_move.COPIED)
        source.abandon(self.context, self.host, self.instance,
                       self.migration, self.load())
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual({}, self.dest.pools[two_hosts.BASES])
        self.is_new()
        self.assertEqual([], self.load().leftovers)

    def test_waits_for_confirm(self):
        self.capture('accepted')
        source.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.ours(self.source))
        self.is_new()
        self.nothing_of_a_move()

    def test_waits_for_revert(self):
        self.capture('accepted')
        # to a flavor without swap, whose mapping is gone
        self.bdms[2].driver_info = None
        source.abandon(self.context, self.host, self.instance,
                       self.migration, self.load())
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.is_new()
        self.nothing_of_a_move()
