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
"""libvirt's modular daemons answer as libvirtd does."""

import contextlib
import os
import unittest
from unittest import mock

import lab
from lab import guide
from lab import modular
from lab.tests import cloud_case
from lab.tests import test_conformance

load_tests = cloud_case.only_in_full


def skip_unless_built():
    if not modular.are_built():
        raise unittest.SkipTest(
            'libvirt\'s modular daemons are not compiled; LAB_HOST_ROOT=%s '
            'LAB_MODULAR=1 lab/lab prepare does it, in some minutes' %
            modular.RELEASE)


class TestConformance(test_conformance.ConformanceTest):
    """Through virtproxyd, where somebody has compiled them."""

    @classmethod
    def setUpClass(cls):
        skip_unless_built()
        cls.enterClassContext(mock.patch.dict(
            os.environ, LAB_HOST_ROOT=modular.RELEASE, LAB_MODULAR='1'))
        super().setUpClass()

    def test_lab_has_them(self):
        with lab.Hosts() as hosts:
            for host in hosts:
                self.assertEqual(modular.FRONT, host.front)
                self.assertEqual(
                    set(), set(modular.DAEMONS[:-1]) - {
                        service.name for service in host.services()
                        if service.alive()})

    def test_virtstoraged_is_restarted(self):
        """Who was connected stays without it; nova-compute connects anew."""
        import libvirt

        def is_there():
            with contextlib.closing(host.connect()) as new:
                with contextlib.suppress(libvirt.libvirtError):
                    return new.getStoragePoolCapabilities()

        with lab.Hosts() as (host, _other):
            with contextlib.closing(host.connect()) as connection:
                connection.getStoragePoolCapabilities()
                host.kill('virtstoraged')
                host.restart('virtstoraged')
                host.wait(is_there, 30, 'answering', 'virtstoraged')
                with self.assertRaisesRegex(libvirt.libvirtError,
                                            'client socket is closed'):
                    connection.getStoragePoolCapabilities()
                connection.getLibVersion()

    def test_certificates_are_renewed(self):
        """As the guide says; storage can be reached without virtqemud."""
        with lab.Hosts() as (host, other):
            other.certificates.issue(other)
            guide.run(other, 'renew')
            for driver in ('qemu', 'storage'):
                host.run(['virsh', '-c', '%s+tls://%s/system' % (
                    driver, other.name), 'pool-list'], timeout=30)
