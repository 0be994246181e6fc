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
import copy
import random

import ddt
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units
from oslo_versionedobjects import fixture as ovo_fixture

from nova import context
from nova import exception
from nova import objects
from nova import test
from nova.virt import driver
from nova.virt.libvirt.storage.records import metadata

# Of all fields and their types.
HASHES = {
    'LibvirtDiskExpected': '1.0-c8285c5326d9018c774d63e69e3200f5',
    'LibvirtDiskMetadata': '1.2-d298f0125892eeb3fc286951165d6251',
    'LibvirtLeftoverVolume': '1.0-6e0cebde64c2cbf57dfeed55e7f2414a'}


def record(**kwargs):
    return metadata.LibvirtDiskMetadata(**{
        'backend': 'qcow2', 'format': 'qcow2', 'size': units.Gi,
        'state': 'ready', 'host': 'host-a', **kwargs})


def volume(name, **kwargs):
    return record(backend='libvirt-storage', pool='nova-disks-pool',
                  volume='%s_%s' % (uuids.instance, name), **kwargs)


class RecordsTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.context = context.get_admin_context()
        self.instance = objects.Instance(uuid=uuids.instance)
        self.saves = []
        self.stub_out(
            'nova.objects.BlockDeviceMappingList._save_driver_info',
            lambda cls, ctxt, instance, infos: self.saves.append(infos))

    def bdm(self, name, **kwargs):
        bdm = objects.BlockDeviceMapping(**{
            'context': self.context, 'id': 1, 'uuid': getattr(uuids, name),
            'instance_uuid': uuids.instance, 'source_type': 'blank',
            'destination_type': 'local', 'boot_index': -1, 'no_device': False,
            'guest_format': None, 'device_name': '/dev/%s' % name,
            'driver_info': None, 'volume_size': 1, 'device_type': 'disk',
            'disk_bus': 'virtio', 'delete_on_termination': True,
            'volume_id': None, 'image_id': None, 'encrypted': False,
            'encryption_secret_uuid': None, 'encryption_format': None,
            'encryption_options': None, **kwargs})
        bdm.obj_reset_changes()
        return bdm

    def all_bdms(self):
        return [
            self.bdm('vda', source_type='image', boot_index=0,
                     image_id=uuids.image),
            self.bdm('vdb'),
            self.bdm('vdc', guest_format='ext4'),
            self.bdm('vdd', guest_format='swap'),
            self.bdm('vde', source_type='volume', destination_type='volume',
                     volume_id=uuids.volume),
            self.bdm('vdf', no_device=True)]

    def disks(self, bdms=None):
        self.bdms = self.all_bdms() if bdms is None else bdms
        return metadata.InstanceDisks.from_bdms(self.instance, self.bdms)

    def reloaded(self):
        return metadata.InstanceDisks.from_bdms(self.instance, self.bdms)


@ddt.ddt
class TestRecord(test.NoDBTestCase):

    def test_version(self):
        # A change of the fields takes a new version: older computes must not
        # guess what they read.
        checker = ovo_fixture.ObjectVersionChecker({
            cls.obj_name(): [cls] for cls in (
                metadata.LibvirtDiskMetadata, metadata.LibvirtDiskExpected,
                metadata.LibvirtLeftoverVolume)})
        self.assertEqual(HASHES, checker.get_hashes())

    def test_is_no_object_of_the_rpc_api(self):
        self.assertNotEqual(
            objects.Instance.OBJ_PROJECT_NAMESPACE,
            metadata.LibvirtDiskMetadata.OBJ_PROJECT_NAMESPACE)

    @ddt.data('1.0', '1.1')
    def test_older_form(self, version):
        given = volume('disk', previous=volume('disk', host='host-b'))
        primitive = jsonutils.loads(metadata.dumps(given, uuids.bdm))
        missing = ['next'] + ([] if version == '1.1' else [
            'expected', 'migration_id', 'extras', 'leftovers'])
        for of in (primitive,
                   primitive['nova_object.data']['previous']):
            of['nova_object.version'] = version
            for name in missing:
                del of['nova_object.data'][name]
        found = metadata.loads(
            jsonutils.dumps(primitive), uuids.instance, uuids.bdm)
        self.assertIsNone(found.next)
        self.assertEqual(metadata.dumps(given, uuids.bdm),
                         metadata.dumps(found, uuids.bdm))

    @ddt.data(
        record(), record(backend='lvm', format='raw'),
        record(state='building', size=0), volume('disk'),
        volume('disk.1', previous=volume('disk', host='host-b')),
        volume('disk', next=volume('disk', host='host-b', state='building')),
        record(unmapped={'disk.config': volume('disk.config', format='raw'),
                         'disk.swap': record(backend='flat', format='raw')}))
    def test_round_trip(self, given):
        text = metadata.dumps(given, uuids.bdm)
        found = metadata.loads(text, uuids.instance, uuids.bdm)
        self.assertEqual(text, metadata.dumps(found, uuids.bdm))
        self.assertEqual(set(), found.obj_what_changed())

    def test_text_is_the_same_whatever_was_changed_before(self):
        one, other = record(), record(state='building')
        other.state = 'ready'
        one.obj_reset_changes()
        self.assertEqual(metadata.dumps(one, uuids.bdm),
                         metadata.dumps(other, uuids.bdm))


@ddt.ddt
class TestBroken(RecordsTestCase):
    """Whatever is wrong: one error that says whose record it is."""

    def primitive(self, given=None):
        return jsonutils.loads(metadata.dumps(given or record(), uuids.vda))

    def refused(self, text):
        bdms = self.all_bdms()
        bdms[0].driver_info = text
        disks = self.disks(bdms)
        for call in (disks.items, lambda: disks.get('disk'),
                     lambda: disks.get('disk.swap'), disks.building,
                     lambda: disks.set('disk.swap', record())):
            e = self.assertRaises(exception.InvalidDiskMetadata, call)
        for part in (uuids.instance, uuids.vda, 'upgrade this host', 'NULL'):
            self.assertIn(part, str(e))
        disks.save(self.context)
        self.assertEqual([], self.saves)
        self.assertEqual(text, bdms[0].driver_info)
        return str(e)

    @ddt.data('', ' ', '{', 'null', '[]', '7', '"text"', '{}', '[' * 5000)
    def test_no_record(self, text):
        if not text:
            self.assertIsNone(self.disks().get('disk'))
            return
        self.refused(text)

    def test_truncated(self):
        text = jsonutils.dumps(self.primitive())
        for length in range(1, len(text) - 1, 7):
            self.refused(text[:length])

    @ddt.data('previous', 'next', 'unmapped', 'extras', 'leftovers', None)
    def test_volume_of_another_instance(self, where):
        """A host that was broken into may have written it."""
        theirs = record(backend='libvirt-storage-rbd', format='raw',
                        pool='nova-disks-pool',
                        volume='%s_disk' % uuids.other)
        given = volume('disk')
        if where in ('previous', 'next'):
            setattr(given, where, theirs)
        elif where in ('unmapped', 'extras'):
            setattr(given, where, {'disk.swap': theirs})
        elif where == 'leftovers':
            given.leftovers = [metadata.LibvirtLeftoverVolume(
                host='host-b', pool=theirs.pool, volume=theirs.volume)]
        else:
            given = theirs
        self.assertIn('%s_disk is none of the instance' % uuids.other,
                      self.refused(jsonutils.dumps(self.primitive(given))))

    @ddt.data('flat', 'qcow2', 'lvm', 'rbd')
    def test_volume_of_another_instance_whatever_its_backend(self, backend):
        theirs = record(backend=backend, format='raw', pool='nova-disks-pool',
                        volume='%s_disk' % uuids.other)
        hidden = volume('disk', previous=volume('disk', previous=theirs))
        for given in (theirs, volume('disk', previous=theirs), hidden):
            self.assertIn('%s_disk is none of the instance' % uuids.other,
                          self.refused(jsonutils.dumps(self.primitive(given))))

    @ddt.data(':id=admin', '@snap', '/x', ' ', '\n')
    def test_name_that_means_something_to_others(self, end):
        given = volume('disk' + end)
        self.assertIn('is none of the instance',
                      self.refused(jsonutils.dumps(self.primitive(given))))

    def test_base_image_that_comes_along(self):
        given = volume('disk')
        given.extras = {'base': record(
            backend='libvirt-storage', format='raw', state='building',
            pool='nova-base-images-pool',
            volume='0123abcd.%s' % uuids.instance)}
        bdms = self.all_bdms()
        bdms[0].driver_info = metadata.dumps(given, uuids.vda)
        self.assertEqual({'base'}, set(self.disks(bdms).extras))

    def test_large(self):
        self.assertIn('1048576', self.refused(' ' * units.Mi))

    @ddt.data('1.3', '1.99', '2.0', '0.9', 'x', '', None, 7, [1])
    def test_version(self, version):
        primitive = self.primitive()
        primitive['nova_object.version'] = version
        message = self.refused(jsonutils.dumps(primitive))
        if version in ('1.3', '2.0'):
            self.assertIn('its version %s is unknown here, where 1.2' %
                          version, message)

    @ddt.data('Instance', 'Other', None)
    def test_name(self, name):
        primitive = self.primitive()
        primitive['nova_object.name'] = name
        self.refused(jsonutils.dumps(primitive))

    def test_namespace(self):
        primitive = self.primitive()
        primitive['nova_object.namespace'] = 'nova'
        self.refused(jsonutils.dumps(primitive))

    @ddt.data(
        ('backend', 'zfs'), ('backend', None), ('backend', 7),
        ('format', 'qed'), ('format', None), ('state', 'almost'),
        ('size', -1), ('size', 'many'), ('size', None), ('size', 1e400),
        ('host', None), ('host', {}), ('pool', 'alone'), ('volume', 'alone'),
        ('previous', {}), ('previous', 'x'), ('unmapped', []),
        ('next', {}), ('next', 'x'), ('next', []),
        ('unmapped', {'disk.config': None}), ('unmapped', {'disk.config': 7}),
        ('backend', 'libvirt-storage'))
    @ddt.unpack
    def test_field(self, field, value):
        primitive = self.primitive()
        primitive['nova_object.data'][field] = value
        self.refused(jsonutils.dumps(primitive))

    @ddt.data('backend', 'format', 'size', 'state', 'host')
    def test_missing_field(self, field):
        primitive = self.primitive()
        del primitive['nova_object.data'][field]
        self.refused(jsonutils.dumps(primitive))

    @ddt.data(dict(previous=record()), dict(next=record()),
              dict(migration_id=7), dict(extras={'base': record()}))
    def test_next_is_a_place_and_no_more(self, more):
        given = record(next=record(host='host-b', **more))
        self.refused(metadata.dumps(given, uuids.vda))

    def test_next_names_a_volume(self):
        for backend in metadata.POOL_BACKENDS:
            given = record(next=record(backend=backend))
            self.assertIn('it names no volume', self.refused(
                metadata.dumps(given, uuids.vda)))

    def test_which_disks_are_in_pools(self):
        for backend, expected in (
                ('rbd', (False, False)), ('libvirt-storage', (True, False)),
                ('libvirt-storage-rbd', (True, True))):
            found = record(backend=backend)
            self.assertEqual(expected, (found.is_in_pool, found.is_on_ceph))

    def test_record_of_another_mapping(self):
        text = metadata.dumps(record(), uuids.vdb)
        self.assertIn(uuids.vdb, self.refused(text))

    @ddt.data('backend', 'mapping')
    def test_error_quotes_little_of_the_record(self, field):
        primitive = self.primitive()
        primitive['nova_object.data'].update({field: 'x y' * 5000})
        primitive.update({field: 'x y' * 5000})
        self.assertLess(len(self.refused(jsonutils.dumps(primitive))), 800)

    def test_broken_record_of_one_disk_stops_all(self):
        bdms = self.all_bdms()
        bdms[0].driver_info = metadata.dumps(record(), uuids.vda)
        bdms[3].driver_info = '{'
        e = self.assertRaises(exception.InvalidDiskMetadata,
                              self.disks(bdms).get, 'disk')
        self.assertIn(uuids.vdd, str(e))

    def test_destroyed_disks_are_forgotten_though_broken(self):
        bdms = self.all_bdms()
        bdms[0].driver_info = '{'
        disks = self.disks(bdms)
        disks.clear()
        disks.save(self.context)
        self.assertEqual([{uuids.vda: None}], self.saves)

    @ddt.data(*range(20))
    def test_fuzz(self, seed):
        """Ten thousand damaged records: a whole record, or the error."""
        dice = random.Random(seed)
        whole = self.primitive(volume(
            'disk', previous=record(),
            unmapped={'disk.config': record(backend='flat', format='raw')}))
        values = (None, '', 'x', -1, 0, 2 ** 70, 1.5, True, [], {}, [[]],
                  {'nova_object.name': 'LibvirtDiskMetadata'})
        for _n in range(500):
            damaged = copy.deepcopy(whole)
            for _m in range(dice.randint(1, 3)):
                place = damaged
                while True:
                    key = dice.choice(sorted(place))
                    if isinstance(place[key], dict) and place[key] and (
                            dice.random() < .7):
                        place = place[key]
                        continue
                    break
                if dice.random() < .3:
                    del place[key]
                else:
                    place[key] = copy.deepcopy(dice.choice(values))
                if not damaged or not place:
                    break
            text = jsonutils.dumps(damaged)
            if dice.random() < .3 and text:
                at = dice.randrange(len(text))
                text = text[:at] + chr(dice.randrange(1, 0x300)) + text[at:]
            try:
                found = metadata.loads(text, uuids.instance, uuids.vda)
            except exception.InvalidDiskMetadata as error:
                self.assertIn(uuids.vda, str(error))
            else:
                self.assertEqual([], list(found.faults()))
                metadata.loads(metadata.dumps(found, uuids.vda),
                               uuids.instance, uuids.vda)


class TestInstanceDisks(RecordsTestCase):

    def test_names(self):
        disks = self.disks()
        for name in ('disk', 'disk.eph0', 'disk.eph1', 'disk.swap'):
            disks.set(name, record())
        disks.save(self.context)
        self.assertEqual(
            [{uuids.vda, uuids.vdb, uuids.vdc, uuids.vdd}],
            [set(infos) for infos in self.saves])

    def test_from_block_device_info(self):
        bdms = objects.BlockDeviceMappingList(objects=self.all_bdms()[:4])
        self.instance.root_device_name = '/dev/vda'
        info = driver.get_block_device_info(self.instance, bdms)
        disks = metadata.InstanceDisks.from_block_device_info(
            self.instance, info)
        for name in ('disk', 'disk.eph0', 'disk.eph1', 'disk.swap'):
            disks.set(name, record())
        disks.save(self.context)
        self.assertEqual({b.uuid for b in bdms}, set(self.saves[0]))

    def test_all_in_one_save_and_none_without_a_change(self):
        disks = self.disks()
        disks.save(self.context)
        disks.get('disk')
        disks.save(self.context)
        self.assertEqual([], self.saves)
        for name in ('disk', 'disk.eph0', 'disk.config'):
            disks.set(name, record())
        disks.save(self.context)
        disks.save(self.context)
        self.assertEqual(1, len(self.saves))

    def test_more_is_left_than_a_record_can_hold(self):
        """Or nobody could read what is on record of the disks."""
        disks = self.disks()
        disks.set('disk', record())
        disks.leftovers = [
            ('a-host', 'a-pool', '%s_disk.eph%d' % (uuids.instance, number))
            for number in range(300)]
        disks.save(self.context)
        found = self.reloaded()
        self.assertIsNotNone(found.get('disk'))
        self.assertEqual(disks.leftovers, found.leftovers)
        self.assertLess(50, len(found.leftovers))
        self.assertIn('is not deleted before the instance is',
                      self.stdlog.logger.output)
        # That is said once.
        self.saves.clear()
        disks.save(self.context)
        self.assertEqual([], self.saves)

    def test_disks_without_a_mapping(self):
        disks = self.disks()
        disks.set('disk', record())
        disks.set('disk.config', record(backend='flat', format='raw'))
        disks.set('disk.local', record(size=7))
        disks.save(self.context)
        self.assertEqual([{uuids.vda}], [set(i) for i in self.saves])
        again = self.reloaded()
        self.assertEqual(['disk', 'disk.config', 'disk.local'],
                         [name for name, _record in again.items()])
        self.assertEqual(7, again.get('disk.local').size)
        self.assertIsNone(again.get('disk').unmapped)
        again.clear('disk.local')
        again.save(self.context)
        self.assertIsNone(self.reloaded().get('disk.local'))

    def test_volume_backed(self):
        disks = self.disks([self.bdm(
            'vda', source_type='volume', destination_type='volume',
            boot_index=0, volume_id=uuids.volume)])
        disks.set('disk.config', record(backend='flat', format='raw'))
        disks.save(self.context)
        again = self.reloaded()
        self.assertIsNone(again.get('disk'))
        self.assertEqual('raw', again.get('disk.config').format)
        again.clear()
        again.save(self.context)
        self.assertEqual({uuids.vda: None}, self.saves[-1])

    def test_mark(self):
        disks = self.disks()
        disks.set('disk', record(state='building'))
        disks.set('disk.swap', record(state='building'))
        disks.save(self.context)
        disks = self.reloaded()
        self.assertEqual(['disk', 'disk.swap'], disks.building())
        self.assertEqual(['disk.swap'], disks.mark('ready', ['disk.swap']))
        disks.save(self.context)
        self.assertEqual([{uuids.vdd}], [set(i) for i in self.saves[1:]])
        self.assertEqual(['disk'], self.reloaded().building())
        self.assertEqual([], disks.mark('ready', ['disk.swap']))

    def test_failed_save_is_tried_again(self):
        disks = self.disks()
        disks.set('disk', record())

        def fail(*args):
            raise exception.BDMNotFound(id=1)

        self.stub_out(
            'nova.objects.BlockDeviceMappingList._save_driver_info',
            fail)
        self.assertRaises(exception.BDMNotFound, disks.save, self.context)
        self.assertRaises(exception.BDMNotFound, disks.save, self.context)

    def test_fits_the_column(self):
        disks = self.disks()
        disks.set('disk', volume('disk', previous=volume('disk')))
        for number in range(12):
            disks.set('disk.x%d' % number, volume(
                'disk.x', host='h' * 255,
                previous=volume('disk.x', host='h' * 255)))
        disks.save(self.context)
        self.assertEqual(13, len(self.reloaded().items()))
