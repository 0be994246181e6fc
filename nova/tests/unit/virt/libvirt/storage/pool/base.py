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

"""A host's pools for tests: the proven fake of nova.tests.fixtures."""

import os

from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import pool

# Of pools over Ceph
SECRET = '5a2f4d3e-0d3c-4d5f-9a2a-3b1d7c9e6f10'

VOLUME = ("<volume><name>%s</name><capacity unit='bytes'>%d</capacity>"
          "<allocation unit='bytes'>0</allocation>"
          "<target><format type='%s'/></target></volume>")


class PoolsTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fakelibvirt.LibvirtModuleFixture())
        self.useFixture(nova_fixtures.PrivsepFixture())
        # No test of these has its pools where this machine has anything.
        self.flags(host='here', instances_path='/nowhere/instances')
        self.conn = self.connection()

    @staticmethod
    def connection():
        return fakelibvirt.Connection('qemu:///system')

    def add_pool(self, name, path=None, active=True, conn=None, kind='dir'):
        """:returns: the fake's StoragePool"""
        made = config.LibvirtConfigStoragePool()
        made.type, made.name = kind, name
        if kind != 'rbd':
            made.target_path = path or os.path.join('/nowhere/pools', name)
        made.source = config.LibvirtConfigStoragePoolSource()
        if kind == 'logical':
            made.source.name = 'vg'
        elif kind == 'rbd':
            made.source.name = 'nova'
            made.source.hosts = [('10.0.0.1', '6790'), ('fd00::1', None)]
            made.source.auth = config.LibvirtConfigStorageAuth()
            made.source.auth.type = 'ceph'
            made.source.auth.username = 'compute'
            made.source.auth.secret_uuid = SECRET
        elif kind == 'netfs':
            made.source.hosts = [('server', None)]
            made.source.dir = '/export'
        raw = (conn or self.conn).storagePoolDefineXML(made.to_xml(), 0)
        raw.build(0)
        if active:
            raw.create(0)
        return raw

    def pool(self, name, conn=None):
        """:returns: a StoragePool"""
        return pool.StoragePool(conn or self.conn, name, 'here')

    @staticmethod
    def add_volume(raw_pool, name, capacity=1024, fmt='raw'):
        return raw_pool.createXML(VOLUME % (name, capacity, fmt), 0)
