# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Volumes that a copy writes over."""

import importlib

from nova.tests.unit.virt.libvirt.storage.pump import base
from nova.tests.unit.virt.libvirt.storage.pump import ends
from nova.tests.unit.virt.libvirt.storage.pump import test_table


class UpdateTestCase(base.PumpExtensionTestCase):
    """libvirt's own errors, from a driver that has no uploads."""

    def setUp(self):
        super().setUp()
        try:
            self.libvirt = importlib.import_module('libvirt')
        except ImportError:
            self.skipTest("libvirt's bindings are missing")
        self.libvirt.registerErrorHandler(lambda context, error: None, None)
        self.conn = self.libvirt.open('test:///default')
        self.addCleanup(self.conn.close)
        pool = self.conn.storagePoolLookupByName('default-pool')
        self.volume = pool.createXML(
            '<volume><name>v</name><capacity>128</capacity></volume>', 0)
        # All connections to it in a process are one as long as any is open.
        self.addCleanup(self.volume.delete)
        self.table = self._pump.Table(128, test_table.KEY, block_size=32)
        self.copy(ends.StubStream([128]), None, 128, table=self.table)

    def update(self, *parts, **kwargs):
        return (ends.StubStream(parts),
                self._pump.Update(self.conn, self.volume), 128), dict(
                    kwargs, table=self.table, only_changes=True)

    def test_error(self):
        args, kwargs = self.update(b'A' * 128, sparse=False)
        e = self.fails(*args, **kwargs)
        self.assertEqual(
            ('destination', 'send', 'libvirt',
             self.libvirt.VIR_ERR_NO_SUPPORT),
            (e.side, e.operation, e.reason, e.code))

    def test_nothing_has_changed(self):
        args, kwargs = self.update(128, sparse=False)
        self.assertEqual(128, self.copy(*args, **kwargs).unchanged)

    def test_no_hole_can_be_left(self):
        args, kwargs = self.update(128, sparse=True)
        self.assertRaises(TypeError, self._pump.Copy, *args, **kwargs)

    def test_something_else(self):
        for args in ((self.volume, self.volume), (self.conn, self.conn),
                     (self.conn, None)):
            self.assertRaises((ValueError, AttributeError),
                              self._pump.Update, *args)
