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
"""The network interfaces of a guest, out of it and in again.

A guest that goes on from the memory of another one must find interfaces with
addresses of its own. It believes the addresses that it has in its memory, so
none may be there when it is saved.
"""

import dataclasses
import functools
import typing as ty

from lxml import etree
from oslo_log import log as logging

import nova.conf
from nova.i18n import _
from nova import objects
from nova.virt.libvirt.storage.live_image import refusal
from nova.virt.libvirt.storage.live_image import under_way

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


class StillThere(Exception):
    """An interface that the guest hasn't given up."""


@dataclasses.dataclass
class Interfaces:
    """The interfaces that an instance has, whatever its guest has now.

    :ivar get_guest: gives the Guest
    :ivar vifs: the instance's, as in its network_info
    :ivar get_vifs: gives those that it has now: Nova drops one whose port was
        deleted, whatever is done to the instance
    :ivar detach: takes one out of the running guest, and out of the network;
        the driver's, which retries
    :ivar attach: plugs one and puts it into the guest, at the attributes of
        an address, or anywhere if there are none
    :ivar define: puts one into the guest's definition alone
    :ivar plug: plugs one that the guest has
    :ivar keep_places: remembers by MAC address at what address each was
    :ivar places: gives what is remembered
    :ivar attached: MAC addresses of those that this has put into the guest
    """
    get_guest: ty.Callable
    vifs: ty.Sequence
    get_vifs: ty.Callable
    detach: ty.Callable
    attach: ty.Callable
    define: ty.Callable
    plug: ty.Callable
    keep_places: ty.Callable
    places: ty.Callable
    attached: set[str] = dataclasses.field(default_factory=set)

    def remember_places(self) -> None:
        """Remember where all are, before they are taken out.

        :raises: OSError
        """
        self.keep_places(self._places())

    def take_out(self) -> None:
        """Take all out of the guest.

        :raises: what detach raises; StillThere if one is left, as one is
            that is none of the instance's
        """
        for vif in self.vifs:
            self.detach(vif)
        left = self._addresses()
        if left:
            raise StillThere(_('the guest still has interfaces %s') %
                             ', '.join(sorted(left)))

    def put_back(self) -> None:
        """Let the guest have all that it lacks, and none without a port.

        :raises: what went wrong with the last one, when all were tried
        """
        present = self._addresses()
        defined = self._addresses(dump_inactive=True)
        places = self.places()
        error = None
        for vif in self._wanted():
            try:
                if vif['address'] not in present:
                    self.attached.add(vif['address'])
                    self.attach(vif, places.get(vif['address']))
                    present.add(vif['address'])
                    continue
                # Out of the network, perhaps, and never out of the guest.
                self.plug(vif)
                if vif['address'] not in defined:
                    # It went there first, and the guest starts with that when
                    # it is rebooted.
                    self.define(vif)
            except Exception as e:
                LOG.error('Interface %(mac)s could not be put back: '
                          '%(error)s', {'mac': vif['address'], 'error': e})
                error = e
        wanted = self._wanted()
        for vif in self.vifs:
            if vif in wanted or (
                    vif['address'] not in self.attached & present):
                continue
            # Its port was deleted while it was attached, now or the last time.
            try:
                self.detach(vif)
            except Exception as e:
                LOG.error('Interface %(mac)s, whose port was deleted, could '
                          'not be taken out: %(error)s',
                          {'mac': vif['address'], 'error': e})
                error = e
        if error is not None:
            raise error

    def _wanted(self):
        """Those whose ports are still there."""
        try:
            now = {vif['address'] for vif in self.get_vifs()}
        except Exception as e:
            LOG.warning('All interfaces are put back, as it is not known '
                        'which ports were deleted: %s', e)
            return list(self.vifs)
        return [vif for vif in self.vifs if vif['address'] in now]

    def _places(self):
        """A guest may know an interface by its PCI address."""
        domain = refusal.parse(self.get_guest().get_xml_desc())
        return {
            interface.find('mac').get('address'): dict(address.attrib)
            for interface in domain.iterfind('devices/interface')
            for address in interface.iterfind('address')}

    def _addresses(self, dump_inactive=False):
        """Of the guest as it runs, or as it is defined."""
        domain = refusal.parse(self.get_guest().get_xml_desc(
            dump_inactive=dump_inactive))
        return set(domain.xpath('devices/interface/mac/@address'))


def of(host, driver, context, instance) -> Interfaces:
    """The interfaces of an instance.

    :param host: the Host
    :param driver: the LibvirtDriver, of which detach_interface(),
        attach_interface() and vif_driver are used
    """
    return Interfaces(
        get_guest=functools.partial(host.get_guest, instance),
        # The ports stay bound: Neutron isn't asked.
        vifs=instance.get_network_info(),
        get_vifs=functools.partial(_get_vifs, context, instance.uuid),
        detach=functools.partial(driver.detach_interface, context, instance),
        attach=functools.partial(_attach, host, driver, context, instance),
        define=functools.partial(
            _define, host, driver.vif_driver, instance),
        plug=functools.partial(driver.vif_driver.plug, instance),
        keep_places=functools.partial(under_way.keep_places, instance.uuid),
        places=functools.partial(under_way.places, instance.uuid))


def _get_vifs(context, instance_uuid):
    return objects.InstanceInfoCache.get_by_instance_uuid(
        context, instance_uuid).network_info


def _config(vif_driver, instance, vif):
    return vif_driver.get_config(
        instance, vif, instance.image_meta, instance.flavor,
        CONF.libvirt.virt_type)


class _Placed:
    """The configuration of an interface that has an address."""

    def __init__(self, config, place):
        self._config, self._place = config, place

    def to_xml(self):
        interface = self._config.format_dom()
        etree.SubElement(interface, 'address', **self._place)
        return etree.tostring(interface, encoding='unicode')


def _attach(host, driver, context, instance, vif, place):
    """Plug an interface and put it into the guest, where it was if it may.

    What Nova has on record of the guest's devices stays right then.
    """
    if place is None or not _attach_at(host, driver, instance, vif, place):
        driver.attach_interface(context, instance, instance.image_meta, vif)
        return
    try:
        host.get_guest(instance).set_metadata(driver._get_guest_config_meta(
            driver.get_instance_driver_metadata(
                instance, _get_vifs(context, instance.uuid))))
    except Exception as e:
        LOG.warning("The guest's metadata lacks interface %(mac)s: %(error)s",
                    {'mac': vif['address'], 'error': e}, instance=instance)


def _attach_at(host, driver, instance, vif, place):
    guest = host.get_guest(instance)
    driver.vif_driver.plug(instance, vif)
    config = _config(driver.vif_driver, instance, vif)
    try:
        guest.attach_device(_Placed(config, place), persistent=True,
                            live=guest.is_active())
    except Exception as e:
        LOG.warning('Interface %(mac)s is put back at another address than it '
                    'had: %(error)s', {'mac': vif['address'], 'error': e},
                    instance=instance)
        return False
    return True


def _define(host, vif_driver, instance, vif):
    """Have an interface that a guest runs with in its definition, too."""
    host.get_guest(instance).attach_device(
        _config(vif_driver, instance, vif), persistent=True)
