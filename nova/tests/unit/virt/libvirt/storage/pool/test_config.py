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

"""The captures/ directory holds XML as libvirt 9.0.0 printed it."""

import os

import ddt
from lxml import etree

from nova import exception
from nova import test
from nova.virt.libvirt.storage.pool import config

CAPTURES = os.path.join(os.path.dirname(__file__), 'captures')

# What Nova has no use for, and ignores on purpose.
IGNORED = {
    'timestamps',  # of a volume's target
    '{http://libvirt.org/schemas/storagepool/fs/1.0}mount_opts',  # of a pool
}

HOSTILE = {
    'spaces': ' two  words ',
    'quotes': '\'single\' "double"',
    'markup': '</name><capacity unit="bytes">1</capacity> & < > &amp;',
    'cdata_end': ']]>',
    'cdata': '<![CDATA[x]]>',
    'comment': '<!-- x -->',
    'instruction': '<?xml version="1.0"?>',
    'non_ascii': 'ü 日本 \N{GRINNING FACE}',
    'newline': 'a\nb\tc\rd',
    'format': '%s {0} $HOME `id`',
    'path': '../../etc/passwd',
}

# What XML 1.0 can't carry.
IMPOSSIBLE = {
    'nul': 'a\0b',
    'control': 'a\x1bb',
    'surrogate': 'a\ud800b',
    'noncharacter': 'a\uffffb',
}


def capture(name):
    with open(os.path.join(CAPTURES, name), encoding='utf-8') as f:
        return f.read()


def captures(prefix):
    return sorted(n for n in os.listdir(CAPTURES)
                  if n.startswith(prefix) and n.endswith('.xml'))


def facts(node):
    """Everything an element says, but for IGNORED and white space."""
    content = [facts(c) for c in node if c.tag not in IGNORED]
    text = node.text or ''
    # libvirt prints empty containers and closes them on a line of their own
    if content or not text.strip():
        text = ''
    attrs = dict(node.attrib)
    return node.tag, tuple(sorted(attrs.items())), text, tuple(
        c for c in content
        # <source> and <features> without content say nothing
        if c[0] not in ('source', 'features') or c[3])


def document(xml):
    return facts(etree.fromstring(xml.encode('utf-8')))


@ddt.ddt
class CapturesTestCase(test.NoDBTestCase):
    """What a real libvirt printed survives parsing and formatting whole."""

    def _round_trip(self, cls, name):
        xml = capture(name)
        obj = cls.from_xml(xml)
        self.assertEqual(document(xml), document(obj.to_xml()))
        # and what was formatted is read back as the same
        again = cls.from_xml(obj.to_xml(pretty_print=False))
        self.assertEqual(obj.to_xml(), again.to_xml())

    @ddt.data(*captures('pool'))
    def test_pool(self, name):
        self._round_trip(config.LibvirtConfigStoragePool, name)

    @ddt.data(*captures('volume'))
    def test_volume(self, name):
        self._round_trip(config.LibvirtConfigStorageVolume, name)

    def test_all_are_here(self):
        types = {config.LibvirtConfigStoragePool.from_xml(capture(n)).type
                 for n in captures('pool')}
        self.assertLessEqual({'dir', 'fs', 'netfs', 'logical', 'rbd'}, types)

    def test_root_names_are_checked(self):
        for cls, name in ((config.LibvirtConfigStoragePool, 'volume-raw.xml'),
                          (config.LibvirtConfigStorageVolume, 'pool-dir.xml')):
            self.assertRaises(exception.InvalidInput, cls.from_xml,
                              capture(name))


class ParsePoolTestCase(test.NoDBTestCase):

    def _parse(self, name):
        return config.LibvirtConfigStoragePool.from_xml(capture(name))

    def test_dir(self):
        pool = self._parse('pool-dir.xml')
        self.assertEqual('dir', pool.type)
        self.assertEqual('nova-disks-pool', pool.name)
        self.assertEqual('6d0b0f5c-52c2-4f5e-9a6a-2a6a0f2e0001', pool.uuid)
        self.assertEqual(270553174016, pool.capacity)
        self.assertEqual(pool.capacity, pool.allocation + pool.available)
        self.assertEqual('/srv/nova/instances/disks', pool.target_path)
        self.assertEqual(0o711, pool.permissions.mode)
        self.assertEqual(0, pool.permissions.owner)
        self.assertEqual(0, pool.permissions.group)

    def test_dir_inactive(self):
        pool = self._parse('pool-dir-inactive.xml')
        self.assertEqual(0, pool.capacity)
        self.assertIsNone(pool.permissions)

    def test_hostile_name(self):
        pool = self._parse('pool-dir-hostile-name.xml')
        self.assertEqual('sp & "q" \'a\' ]]> ü', pool.name)
        self.assertEqual('/srv/nova/instances/x & ü', pool.target_path)
        self.assertEqual('system_u:object_r:virt_image_t:s0',
                         pool.permissions.label)

    def test_fs(self):
        source = self._parse('pool-fs.xml').source
        self.assertEqual(['/dev/vg0/nova'], source.devices)
        self.assertEqual('xfs', source.format)

    def test_netfs(self):
        source = self._parse('pool-netfs.xml').source
        self.assertEqual([('nfs.example.org', None)], source.hosts)
        self.assertEqual('/export/nova', source.dir)
        self.assertEqual('nfs', source.format)
        self.assertEqual('4.1', source.protocol_ver)

    def test_logical(self):
        source = self._parse('pool-logical.xml').source
        self.assertEqual(['/dev/sdb1', '/dev/sdc1'], source.devices)
        self.assertEqual('nova-vg', source.name)
        self.assertEqual('lvm2', source.format)

    def test_rbd(self):
        source = self._parse('pool-rbd.xml').source
        self.assertEqual([('192.0.2.1', '6789'), ('192.0.2.2', '6789')],
                         source.hosts)
        self.assertEqual('vms', source.name)
        self.assertEqual('ceph', source.auth.type)
        self.assertEqual('nova', source.auth.username)
        self.assertEqual('5a5b1c9e-0b5c-4a5b-9d6c-3c1f5f4d1a2b',
                         source.auth.secret_uuid)


class ParseVolumeTestCase(test.NoDBTestCase):

    def _parse(self, name):
        return config.LibvirtConfigStorageVolume.from_xml(capture(name))

    def test_raw(self):
        volume = self._parse('volume-raw.xml')
        self.assertEqual('file', volume.type)
        self.assertEqual('raw', volume.name)
        self.assertEqual('/srv/nova/instances/disks/raw', volume.key)
        self.assertEqual('/srv/nova/instances/disks/raw', volume.target_path)
        self.assertEqual('raw', volume.target_format)
        self.assertEqual(64 << 20, volume.capacity)
        self.assertEqual(0, volume.allocation)
        self.assertEqual(64 << 20, volume.physical)
        self.assertEqual(0o600, volume.permissions.mode)
        self.assertIsNone(volume.backing_store)
        self.assertIsNone(volume.encryption)
        self.assertEqual([], volume.features)

    def test_overlay(self):
        volume = self._parse('volume-qcow2-overlay.xml')
        self.assertEqual('qcow2', volume.target_format)
        self.assertEqual('1.1', volume.compat)
        self.assertEqual(65536, volume.cluster_size)
        self.assertEqual(['lazy_refcounts'], volume.features)
        self.assertEqual(64055, volume.permissions.owner)
        self.assertEqual('/srv/nova/instances/disks/base',
                         volume.backing_store.path)
        self.assertEqual('raw', volume.backing_store.format)

    def test_compat_is_printed_only_if_it_is_not_0_10(self):
        self.assertIsNone(self._parse('volume-qcow2-compat-0.10.xml').compat)

    def test_encrypted(self):
        enc = self._parse('volume-encrypted.xml').encryption
        self.assertEqual('luks', enc.format)
        self.assertEqual('passphrase', enc.secret_type)
        self.assertEqual('f52a81b2-424e-490c-823d-6bd4235bc572',
                         enc.secret_uuid)
        self.assertEqual({'name': 'aes', 'size': '256', 'mode': 'xts',
                          'hash': 'sha256'}, enc.cipher)
        self.assertEqual({'name': 'plain64', 'hash': 'sha256'}, enc.ivgen)

    def test_refresh_forgets_the_secret(self):
        enc = self._parse('volume-encrypted-refreshed.xml').encryption
        self.assertEqual('luks', enc.format)
        self.assertIsNone(enc.secret_uuid)

    def test_guest_written_header(self):
        """A raw volume of 64 MiB, as libvirt sees it after a refresh."""
        volume = self._parse('volume-raw-guest-wrote-qcow2-header.xml')
        self.assertEqual('qcow2', volume.target_format)
        self.assertEqual(1 << 30, volume.capacity)
        self.assertEqual(64 << 20, volume.physical)
        self.assertEqual('/etc/hostname', volume.backing_store.path)

    def test_hostile_name(self):
        volume = self._parse('volume-hostile-name.xml')
        self.assertEqual('h & "q" \'a\' ]]> ü 日本', volume.name)
        self.assertTrue(volume.target_path.endswith('/' + volume.name))


@ddt.ddt
class BuildTestCase(test.NoDBTestCase):
    """What Nova asks for is written as libvirt wants it, and read back."""

    def test_pool(self):
        pool = config.LibvirtConfigStoragePool()
        pool.type = 'dir'
        pool.name = 'nova-disks-pool'
        pool.target_path = '/srv/disks'
        pool.permissions = config.LibvirtConfigStoragePermissions()
        pool.permissions.mode = 0o711
        pool.permissions.owner = -1
        pool.permissions.group = 0
        self.assertEqual(
            "<pool type=\"dir\"><name>nova-disks-pool</name>"
            "<target><path>/srv/disks</path><permissions><mode>0711</mode>"
            "<owner>-1</owner><group>0</group></permissions></target></pool>",
            pool.to_xml(pretty_print=False))

    def test_volume(self):
        volume = config.LibvirtConfigStorageVolume()
        volume.name = 'disk'
        volume.capacity = 1 << 30
        volume.allocation = 0
        volume.target_format = 'qcow2'
        volume.compat = '1.1'
        volume.features = ['lazy_refcounts']
        volume.cluster_size = 65536
        volume.backing_store = config.LibvirtConfigStorageBackingStore()
        volume.backing_store.path = '/srv/_base/abc'
        volume.backing_store.format = 'raw'
        self.assertEqual(
            '<volume><name>disk</name>'
            '<capacity unit="bytes">1073741824</capacity>'
            '<allocation unit="bytes">0</allocation>'
            '<target><format type="qcow2"/><compat>1.1</compat>'
            '<clusterSize unit="B">65536</clusterSize>'
            '<features><lazy_refcounts/></features></target>'
            '<backingStore><path>/srv/_base/abc</path>'
            '<format type="raw"/></backingStore></volume>',
            volume.to_xml(pretty_print=False))

    def test_encryption(self):
        enc = config.LibvirtConfigStorageEncryption()
        enc.format = 'luks'
        enc.secret_uuid = 'f52a81b2-424e-490c-823d-6bd4235bc572'
        enc.cipher = {'name': 'aes', 'size': '256', 'mode': 'xts'}
        self.assertEqual(
            '<encryption format="luks"><secret type="passphrase" '
            'uuid="f52a81b2-424e-490c-823d-6bd4235bc572"/>'
            '<cipher name="aes" size="256" mode="xts"/></encryption>',
            enc.to_xml(pretty_print=False))

    def test_auth_by_usage(self):
        auth = config.LibvirtConfigStorageAuth()
        auth.type = 'ceph'
        auth.username = 'nova'
        auth.secret_usage = 'ceph_nova'
        again = config.LibvirtConfigStorageAuth.from_xml(auth.to_xml())
        self.assertEqual('ceph_nova', again.secret_usage)
        self.assertIsNone(again.secret_uuid)

    def _every_text(self, value):
        """Every place that takes a text, as (setter, getter)."""
        pool = config.LibvirtConfigStoragePool
        volume = config.LibvirtConfigStorageVolume

        def source(**attrs):
            p = pool()
            p.source = config.LibvirtConfigStoragePoolSource()
            for k, v in attrs.items():
                setattr(p.source, k, v)
            return p

        def backing(**attrs):
            v = volume()
            v.backing_store = config.LibvirtConfigStorageBackingStore()
            for k, text in attrs.items():
                setattr(v.backing_store, k, text)
            return v

        for cls, name in ((pool, 'name'), (pool, 'target_path'),
                          (pool, 'type'), (volume, 'name'), (volume, 'key'),
                          (volume, 'target_path'),
                          (volume, 'target_format')):
            obj = cls()
            setattr(obj, name, value)
            yield obj, lambda o, name=name: getattr(o, name)
        for attrs in ({'name': value}, {'dir': value}, {'devices': [value]},
                      {'hosts': [(value, None)]}, {'format': value},
                      {'protocol_ver': value}):
            yield source(**attrs), lambda o, attrs=attrs: getattr(
                o.source, list(attrs)[0])
        for name in ('path', 'format'):
            yield backing(**{name: value}), lambda o, name=name: getattr(
                o.backing_store, name)

    @ddt.data(*HOSTILE)
    def test_hostile_text(self, which):
        for obj, get in self._every_text(HOSTILE[which]):
            again = type(obj).from_xml(obj.to_xml())
            self.assertEqual(get(obj), get(again), obj.to_xml())
            self.assertEqual(obj.to_xml(), again.to_xml())

    @ddt.data(*IMPOSSIBLE)
    def test_impossible_text(self, which):
        for obj, get in self._every_text(IMPOSSIBLE[which]):
            exc = self.assertRaises(exception.InvalidInput, obj.to_xml)
            # the message shows the text, and is itself printable
            self.assertTrue(str(exc).isprintable(), repr(str(exc)))


@ddt.ddt
class RefusalTestCase(test.NoDBTestCase):
    """A daemon at the other end of a connection may be anybody's."""

    CLASSES = (config.LibvirtConfigStoragePool,
               config.LibvirtConfigStorageVolume)

    def _refused(self, template):
        for cls in self.CLASSES:
            root = cls().root_name
            xml = template.replace('ROOT', root)
            for text in (xml, xml.encode('utf-8', 'surrogatepass')):
                exc = self.assertRaises(exception.InvalidInput,
                                        cls.from_xml, text)
                self.assertIn('<%s>' % root, str(exc))

    def test_entity_expansion(self):
        laughs = ''.join('<!ENTITY l%d "%s">' % (n, '&l%d;' % (n - 1) * 10)
                         for n in range(1, 10))
        for where in ('<name>&l9;</name>', '<name x="&l9;"/>'):
            self._refused('<!DOCTYPE ROOT [<!ENTITY l0 "ha">%s]>'
                          '<ROOT>%s</ROOT>' % (laughs, where))

    def test_external_entity(self):
        secret = self.useFixture(test.nova_fixtures.fixtures.TempDir()).join(
            'secret')
        with open(secret, 'w') as f:
            f.write('passphrase')
        self._refused('<!DOCTYPE ROOT [<!ENTITY x SYSTEM "file://%s">]>'
                      '<ROOT><name>&x;</name></ROOT>' % secret)

    def test_external_subset(self):
        self._refused('<!DOCTYPE ROOT SYSTEM "http://127.0.0.1:9/x.dtd">'
                      '<ROOT><name>x</name></ROOT>')

    def test_undeclared_entity(self):
        self._refused('<ROOT><name>&x;</name></ROOT>')

    def test_another_encoding_does_not_hide_the_declaration(self):
        for cls in self.CLASSES:
            root = cls().root_name
            xml = ('<?xml version="1.0" encoding="utf-16"?>'
                   '<!DOCTYPE %s [<!ENTITY x "y">]><%s><name>&x;</name></%s>'
                   % (root, root, root)).encode('utf-16')
            self.assertRaises(exception.InvalidInput, cls.from_xml, xml)

    @ddt.data('', ' ', 'no xml', '<ROOT>', '<ROOT><name>a\0b</name></ROOT>',
              '<ROOT><name>\ud800</name></ROOT>', '<ROOT/><ROOT/>')
    def test_malformed(self, xml):
        self._refused(xml)

    def test_without_the_hardening_it_would_be_read(self):
        """What is refused above is no nonsense, but works in lxml."""
        xml = '<!DOCTYPE pool [<!ENTITY x "y">]><pool><name>&x;</name></pool>'
        self.assertEqual('y', etree.fromstring(xml).findtext('name'))

    @ddt.data('', 'ten', '1.5', '1e3', '0x10')
    def test_no_number(self, text):
        self._assert_size_refused('<capacity unit="bytes">%s</capacity>'
                                  % text)
        self.assertRaises(
            exception.InvalidInput,
            config.LibvirtConfigStoragePermissions.from_xml,
            '<permissions><owner>%s</owner></permissions>' % text)

    def test_mode_is_octal(self):
        self.assertRaises(
            exception.InvalidInput,
            config.LibvirtConfigStoragePermissions.from_xml,
            '<permissions><mode>0799</mode></permissions>')

    def test_unknown_unit(self):
        self._assert_size_refused('<capacity unit="parsec">1</capacity>')

    def _assert_size_refused(self, node):
        for cls in self.CLASSES:
            root = cls().root_name
            exc = self.assertRaises(exception.InvalidInput, cls.from_xml,
                                    '<%s>%s</%s>' % (root, node, root))
            self.assertIn('capacity', str(exc))

    @ddt.data(('1', 1), ('1 bytes', 1), ('1 B', 1), ('1 KB', 1000),
              ('1 K', 1024), ('1 KiB', 1024), ('1 kib', 1024),
              ('3 MB', 3 * 10 ** 6), ('3 M', 3 << 20), ('2 G', 2 << 30),
              ('2 GiB', 2 << 30), ('2 GB', 2 * 10 ** 9), ('1 TiB', 1 << 40),
              ('1 PiB', 1 << 50), ('1 EiB', 1 << 60))
    def test_units(self, data):
        text, expected = data
        number, _, unit = text.partition(' ')
        volume = config.LibvirtConfigStorageVolume.from_xml(
            '<volume><capacity%s>%s</capacity></volume>'
            % (' unit="%s"' % unit if unit else '', number))
        self.assertEqual(expected, volume.capacity)

    def test_unknown_elements_are_ignored(self):
        volume = config.LibvirtConfigStorageVolume.from_xml(
            '<volume type="file" new="1"><?php x ?><!-- x --><name>a</name>'
            '<future><name>b</name></future>'
            '<source><device path="/dev/sdb"><extent start="0" end="1"/>'
            '</device></source>'
            '<target><nocow/><future/><path>/p</path></target></volume>')
        self.assertEqual('a', volume.name)
        self.assertEqual('/p', volume.target_path)
        self.assertEqual(
            '<volume type="file"><name>a</name><target><path>/p</path>'
            '</target></volume>', volume.to_xml(pretty_print=False))
