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

from unittest import mock

import fixtures
from lxml import etree
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova import test
from nova.tests.unit.virt.libvirt.storage.live_image import fake_guest
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt.storage.live_image import interfaces
from nova.virt.libvirt.storage.live_image import under_way
from nova.virt.libvirt import vif

MACS = fake_guest.MACS


class InterfacesTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.guest = fake_guest.Guest()
        self.interfaces = fake_guest.interfaces_of(self.guest)

    def test_all_are_tried(self):
        self.guest.macs, self.guest.defined = [], []
        self.guest.fails['attach'] = OSError('first')
        self.assertRaises(OSError, self.interfaces.put_back)
        self.assertEqual([MACS[1]], self.guest.macs)
        self.interfaces.put_back()
        self.assertEqual(set(MACS), set(self.guest.macs))
        # The one that was there came to no second time.
        self.assertEqual(2, len(self.guest.macs))

    def test_port_that_was_deleted(self):
        self.interfaces.take_out()
        self.guest.ports.remove(MACS[0])
        self.interfaces.put_back()
        self.assertEqual([MACS[1]], self.guest.macs)
        self.assertEqual([MACS[1]], self.guest.defined)

    def _delete_ports_meanwhile(self):
        self.interfaces.take_out()
        attach = self.interfaces.attach

        def and_delete(vif, place):
            attach(vif, place)
            self.guest.ports.remove(vif['address'])

        self.interfaces.attach = and_delete

    def test_port_that_is_deleted_meanwhile(self):
        self._delete_ports_meanwhile()
        self.interfaces.put_back()
        self.assertEqual(([], []), (self.guest.macs, self.guest.defined))

    def test_interface_that_never_left(self):
        """What Nova knows of its port may be wrong for a moment."""
        self.interfaces.get_vifs = lambda: []
        with mock.patch.object(self.interfaces, 'detach') as detach:
            self.interfaces.put_back()
        detach.assert_not_called()

    def test_port_that_is_deleted_and_interface_that_stays(self):
        """The others are taken out, and so is that one the next time."""
        self._delete_ports_meanwhile()
        failed = exception.DeviceDetachFailed(device='nic', reason='slow')
        with mock.patch.object(self.interfaces, 'detach', side_effect=[
                failed, None]) as detach:
            self.assertIs(failed, self.assertRaises(
                exception.DeviceDetachFailed, self.interfaces.put_back))
        self.assertEqual([mock.call({'address': mac}) for mac in MACS],
                         detach.mock_calls)
        self.interfaces.put_back()
        self.assertEqual(([], []), (self.guest.macs, self.guest.defined))

    def test_ports_are_not_known(self):
        """The database may be away; a guest needs its network."""
        self.interfaces.take_out()
        self.interfaces.get_vifs = mock.Mock(side_effect=OSError('down'))
        self.interfaces.put_back()
        self.assertEqual(list(MACS), self.guest.macs)

    def test_one_that_did_not_come_out(self):
        """The driver has unplugged it all the same."""
        self.guest.fails['detach'] = exception.DeviceDetachFailed(
            device='net', reason='time')
        self.assertRaises(exception.DeviceDetachFailed,
                          self.interfaces.take_out)
        self.interfaces.put_back()
        self.assertEqual(list(MACS), self.guest.macs)
        # Nor is it missing when the guest reboots: the driver takes an
        # interface out of the definition first.
        self.assertEqual(set(MACS), set(self.guest.defined))
        self.assertEqual(['detach', 'plug', 'define', 'plug'],
                         self.guest.steps)

    def test_one_that_is_none_of_the_instance(self):
        self.guest.macs.append('52:54:00:00:00:01')
        error = self.assertRaises(interfaces.StillThere,
                                  self.interfaces.take_out)
        self.assertIn('52:54:00:00:00:01', str(error))

    def test_where_they_were(self):
        """A guest may know an interface by its PCI address."""
        self.interfaces.remember_places()
        self.interfaces.take_out()
        self.interfaces.put_back()
        self.assertEqual(
            {mac: {'type': 'pci', 'slot': '0x' + mac[-2:]} for mac in MACS},
            self.guest.places)

    def _attach_at(self, error=None, metadata_error=None):
        driver = mock.create_autospec(
            libvirt_driver.LibvirtDriver, instance=True,
            vif_driver=mock.create_autospec(
                vif.LibvirtGenericVIFDriver, instance=True))
        host, instance, nic = mock.Mock(), mock.Mock(), {'address': MACS[0]}
        config = driver.vif_driver.get_config.return_value = (
            vconfig.LibvirtConfigGuestInterface())
        config.net_type, config.source_dev = 'bridge', 'br'
        config.mac_addr, config.target_dev = MACS[0], 'tap'
        guest = host.get_guest.return_value
        guest.attach_device.side_effect = error
        guest.set_metadata.side_effect = metadata_error
        cache = self.useFixture(fixtures.MockPatch(
            'nova.objects.InstanceInfoCache.get_by_instance_uuid')).mock
        interfaces.of(host, driver, mock.sentinel.context, instance).attach(
            nic, {'type': 'pci', 'slot': '0x08'})
        driver.vif_driver.plug.assert_called_once_with(instance, nic)
        call = guest.attach_device.mock_calls[0]
        self.assertEqual({'persistent': True,
                          'live': guest.is_active.return_value}, call.kwargs)
        found = etree.fromstring(call.args[0].to_xml())
        self.assertEqual((MACS[0], {'type': 'pci', 'slot': '0x08'}), (
            found.find('mac').get('address'),
            dict(found.find('address').attrib)))
        if not error:
            driver.attach_interface.assert_not_called()
            driver.get_instance_driver_metadata.assert_called_once_with(
                instance, cache.return_value.network_info)
            guest.set_metadata.assert_called_once_with(
                driver._get_guest_config_meta.return_value)
        else:
            driver.attach_interface.assert_called_once_with(
                mock.sentinel.context, instance, instance.image_meta, nic)

    def test_attach_at_an_address(self):
        self._attach_at()

    def test_address_that_is_taken(self):
        self._attach_at(error=OSError('in use'))
        self.assertIn('at another address than it had: in use',
                      self.stdlog.logger.output)

    def test_metadata_that_can_not_be_set(self):
        self._attach_at(metadata_error=OSError('no'))

    def test_of_an_instance(self):
        """The driver's methods and signatures."""
        driver = mock.create_autospec(
            libvirt_driver.LibvirtDriver, instance=True,
            vif_driver=mock.create_autospec(
                vif.LibvirtGenericVIFDriver, instance=True))
        host, instance, nic = mock.Mock(), mock.Mock(), mock.sentinel.nic
        instance.uuid = uuids.instance
        self.flags(snapshots_directory=self.useFixture(
            fixtures.TempDir()).path, group='libvirt')
        under_way.begin(uuids.instance)
        self.addCleanup(under_way.close, uuids.instance)
        self.assertEqual({}, interfaces.of(
            host, driver, mock.sentinel.context, instance).places())
        instance.get_network_info.reset_mock()
        found = interfaces.of(host, driver, mock.sentinel.context, instance)
        self.assertEqual(instance.get_network_info.return_value, found.vifs)
        with mock.patch('nova.objects.InstanceInfoCache.'
                        'get_by_instance_uuid') as cache:
            self.assertEqual(cache.return_value.network_info,
                             found.get_vifs())
        cache.assert_called_once_with(mock.sentinel.context, instance.uuid)
        self.assertEqual(host.get_guest.return_value, found.get_guest())
        host.get_guest.assert_called_once_with(instance)
        found.detach(nic)
        driver.detach_interface.assert_called_once_with(
            mock.sentinel.context, instance, nic)
        found.attach(nic, None)
        driver.attach_interface.assert_called_once_with(
            mock.sentinel.context, instance, instance.image_meta, nic)
        found.keep_places({'a': {'type': 'pci'}})
        self.assertEqual({'a': {'type': 'pci'}}, found.places())
        found.plug(nic)
        driver.vif_driver.plug.assert_called_once_with(instance, nic)
        # The guest that runs has it already.
        found.define(nic)
        host.get_guest.return_value.attach_device.assert_called_once_with(
            driver.vif_driver.get_config.return_value, persistent=True)
