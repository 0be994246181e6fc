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

import importlib

from nova import test


class PumpExtensionTestCase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        # Not at import: a tree which isn't built must fail here alone.
        self._pump = importlib.import_module(
            'nova.virt.libvirt.storage.pump._copy')

    def copy(self, source, destination, length, **kwargs):
        kwargs.setdefault('key', 0x1234567890abcdef)
        copy = self._pump.Copy(source, destination, length, **kwargs)
        copy.run()
        return copy

    def fails(self, source, destination, length, **kwargs):
        return self.assertRaises(self._pump.PumpError, self.copy, source,
                                 destination, length, **kwargs)
