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

"""The XML of libvirt's storage pools and volumes, both ways.

Like :mod:`nova.virt.libvirt.config`, these classes convert and decide
nothing. https://libvirt.org/formatstorage.html describes the format.

Elements which Nova has no use for (timestamps, extents of a physical volume,
mount options ...) are ignored when parsing. A configuration that was parsed
is therefore good for reading and comparing, and never for defining a pool of
somebody else anew.

Sizes are in bytes everywhere.
"""

from lxml import etree

from nova import exception
from nova.i18n import _
from nova.virt.libvirt import config

# What libvirt accepts as the unit of a size (virScaleInteger in its
# src/util/virutil.c): "K" and "KiB" count in 1024, "KB" in 1000.
_UNITS = {'B': 1, 'BYTE': 1, 'BYTES': 1}
for _n, _letter in enumerate('KMGTPE', 1):
    _UNITS[_letter] = _UNITS[_letter + 'IB'] = 1024 ** _n
    _UNITS[_letter + 'B'] = 1000 ** _n


def _parse_document(xml, root_name):
    """Parse XML that came from a libvirt daemon, perhaps another host's.

    :param xml: the document, str or UTF-8 bytes
    :param root_name: for the error message
    :returns: the root element
    :raises: nova.exception.InvalidInput if it is not well-formed or has a
        document type declaration: libvirt prints none, and without one there
        are no entities to expand and no external ones to fetch
    """
    def refuse(reason):
        raise exception.InvalidInput(
            reason=_("libvirt's <%(root)s> XML was refused: %(reason)s") %
            {'root': root_name, 'reason': reason})

    if isinstance(xml, str):
        try:
            xml = xml.encode('utf-8')
        except UnicodeEncodeError as e:
            refuse(e)
    # Looked for in the text as well, because an internal subset would be
    # worked off before there is a tree to look at.
    if b'<!DOCTYPE' in xml:
        refuse(_('it has a document type declaration'))
    parser = etree.XMLParser(encoding='utf-8', resolve_entities=False,
                             no_network=True, load_dtd=False,
                             huge_tree=False, remove_comments=True,
                             remove_pis=True)
    try:
        return etree.fromstring(xml, parser)
    except etree.XMLSyntaxError as e:
        refuse(e)


def _parse_size(node):
    """:returns: the size which a node gives, in bytes"""
    unit = node.get('unit', 'bytes')
    try:
        return int(node.text) * _UNITS[unit.upper()]
    except (KeyError, TypeError, ValueError):
        raise exception.InvalidInput(
            reason=_("<%(node)s unit='%(unit)s'> of libvirt's XML has no "
                     "size: %(text)s") %
            {'node': node.tag, 'unit': unit, 'text': node.text})


def _parse_int(node, base=10):
    try:
        return int(node.text, base)
    except (TypeError, ValueError):
        raise exception.InvalidInput(
            reason=_("<%(node)s> of libvirt's XML has no number: %(text)s") %
            {'node': node.tag, 'text': node.text})


class LibvirtConfigStorageObject(config.LibvirtConfigObject):
    """Base of the storage objects: a strict reader and writer."""

    def _text_node(self, node_name, value, **kwargs):
        try:
            return super()._text_node(node_name, value, **kwargs)
        except ValueError as e:
            self._refuse(node_name, value, e)

    def _new_node(self, node_name, **kwargs):
        try:
            return super()._new_node(node_name, **kwargs)
        except ValueError as e:
            self._refuse(node_name, kwargs, e)

    @staticmethod
    def _refuse(node_name, value, error):
        # NUL, other control characters, lone surrogates
        raise exception.InvalidInput(
            reason=_("%(value)r can't be the <%(node)s> of a storage pool "
                     "or volume: %(error)s") %
            {'value': value, 'node': node_name, 'error': error})

    def _format_texts(self, parent, *names):
        for name in names:
            if getattr(self, name) is not None:
                parent.append(self._text_node(name, getattr(self, name)))

    def _format_sizes(self, parent, *names):
        for name in names:
            if getattr(self, name) is not None:
                parent.append(self._text_node(name, getattr(self, name),
                                              unit='bytes'))

    def parse_str(self, xmlstr):
        """Fill the object from a document.

        :param xmlstr: what libvirt printed, str or UTF-8 bytes
        :raises: nova.exception.InvalidInput if it can't be parsed, has
            another root element or a document type declaration
        """
        self.parse_dom(_parse_document(xmlstr, self.root_name))

    @classmethod
    def from_xml(cls, xmlstr):
        """:returns: a new object; parameters and errors as parse_str has"""
        obj = cls()
        obj.parse_str(xmlstr)
        return obj


class LibvirtConfigStoragePermissions(LibvirtConfigStorageObject):
    """Who may do what with a pool's directory or a volume's file.

    mode is a number (0o711); owner and group are numeric ids, -1 for "as
    libvirt does it"; label is the security label.
    """

    def __init__(self, **kwargs):
        super().__init__(root_name='permissions', **kwargs)
        self.mode = None
        self.owner = None
        self.group = None
        self.label = None

    def format_dom(self):
        dom = super().format_dom()
        if self.mode is not None:
            dom.append(self._text_node('mode', '%04o' % self.mode))
        self._format_texts(dom, 'owner', 'group', 'label')
        return dom

    def parse_dom(self, xmldoc):
        super().parse_dom(xmldoc)
        for c in xmldoc:
            if c.tag == 'mode':
                self.mode = _parse_int(c, base=8)
            elif c.tag in ('owner', 'group'):
                setattr(self, c.tag, _parse_int(c))
            elif c.tag == 'label':
                self.label = c.text


class LibvirtConfigStorageAuth(LibvirtConfigStorageObject):
    """How libvirt logs in to a pool's server (rbd, iscsi)."""

    def __init__(self, **kwargs):
        super().__init__(root_name='auth', **kwargs)
        self.type = None
        self.username = None
        self.secret_uuid = None
        self.secret_usage = None

    def format_dom(self):
        attrs = {'type': self.type, 'username': self.username}
        dom = self._new_node(self.root_name, **_given(attrs))
        secret = _given({'uuid': self.secret_uuid, 'usage': self.secret_usage})
        if secret:
            dom.append(self._new_node('secret', **secret))
        return dom

    def parse_dom(self, xmldoc):
        super().parse_dom(xmldoc)
        self.type = xmldoc.get('type')
        self.username = xmldoc.get('username')
        secret = xmldoc.find('secret')
        if secret is not None:
            self.secret_uuid = secret.get('uuid')
            self.secret_usage = secret.get('usage')


class LibvirtConfigStoragePoolSource(LibvirtConfigStorageObject):
    """What a pool is made of.

    devices: paths (fs, logical) or names; hosts: (name, port or None); dir:
    what an NFS server exports; name: the volume group or the Ceph pool;
    format: file system or volume manager; protocol_ver: NFS version.
    """

    def __init__(self, **kwargs):
        super().__init__(root_name='source', **kwargs)
        self.hosts = []
        self.devices = []
        self.dir = None
        self.name = None
        self.auth = None
        self.format = None
        self.protocol_ver = None

    def format_dom(self):
        dom = super().format_dom()
        for name, port in self.hosts:
            dom.append(self._new_node(
                'host', **_given({'name': name, 'port': port})))
        for path in self.devices:
            dom.append(self._new_node('device', path=path))
        if self.dir is not None:
            dom.append(self._new_node('dir', path=self.dir))
        self._format_texts(dom, 'name')
        if self.auth is not None:
            dom.append(self.auth.format_dom())
        if self.format is not None:
            dom.append(self._new_node('format', type=self.format))
        if self.protocol_ver is not None:
            dom.append(self._new_node('protocol', ver=self.protocol_ver))
        return dom

    def parse_dom(self, xmldoc):
        super().parse_dom(xmldoc)
        for c in xmldoc:
            if c.tag == 'host':
                self.hosts.append((c.get('name'), c.get('port')))
            elif c.tag == 'device':
                self.devices.append(c.get('path'))
            elif c.tag == 'dir':
                self.dir = c.get('path')
            elif c.tag == 'name':
                self.name = c.text
            elif c.tag == 'auth':
                self.auth = LibvirtConfigStorageAuth()
                self.auth.parse_dom(c)
            elif c.tag == 'format':
                self.format = c.get('type')
            elif c.tag == 'protocol':
                self.protocol_ver = c.get('ver')


class LibvirtConfigStoragePool(LibvirtConfigStorageObject):
    """A storage pool: https://libvirt.org/formatstorage.html#storage-pool-xml

    capacity, allocation and available (bytes) are libvirt's to say: it
    ignores them when a pool is defined, and prints 0 for an inactive one.
    """

    def __init__(self, **kwargs):
        super().__init__(root_name='pool', **kwargs)
        self.type = None
        self.name = None
        self.uuid = None
        self.capacity = None
        self.allocation = None
        self.available = None
        self.source = None
        self.target_path = None
        self.permissions = None

    def format_dom(self):
        dom = self._new_node(self.root_name, **_given({'type': self.type}))
        self._format_texts(dom, 'name', 'uuid')
        self._format_sizes(dom, 'capacity', 'allocation', 'available')
        if self.source is not None:
            dom.append(self.source.format_dom())
        target = self._new_node('target')
        if self.target_path is not None:
            target.append(self._text_node('path', self.target_path))
        if self.permissions is not None:
            target.append(self.permissions.format_dom())
        if len(target):
            dom.append(target)
        return dom

    def parse_dom(self, xmldoc):
        super().parse_dom(xmldoc)
        self.type = xmldoc.get('type')
        for c in xmldoc:
            if c.tag in ('name', 'uuid'):
                setattr(self, c.tag, c.text)
            elif c.tag in ('capacity', 'allocation', 'available'):
                setattr(self, c.tag, _parse_size(c))
            elif c.tag == 'source':
                self.source = LibvirtConfigStoragePoolSource()
                self.source.parse_dom(c)
            elif c.tag == 'target':
                for t in c:
                    if t.tag == 'path':
                        self.target_path = t.text
                    elif t.tag == 'permissions':
                        self.permissions = LibvirtConfigStoragePermissions()
                        self.permissions.parse_dom(t)


class LibvirtConfigStorageEncryption(LibvirtConfigStorageObject):
    """https://libvirt.org/formatstorageencryption.html

    A refresh of the pool makes libvirt forget the secret: it then knows from
    the volume's header that it is encrypted, and not by what.

    cipher: dict of name, size (bits), mode, hash; ivgen: dict of name, hash.
    """

    def __init__(self, **kwargs):
        super().__init__(root_name='encryption', **kwargs)
        self.format = None
        self.secret_type = 'passphrase'
        self.secret_uuid = None
        self.cipher = None
        self.ivgen = None

    def format_dom(self):
        dom = self._new_node(self.root_name, **_given({'format': self.format}))
        if self.secret_uuid is not None:
            dom.append(self._new_node('secret', type=self.secret_type,
                                      uuid=self.secret_uuid))
        for name in ('cipher', 'ivgen'):
            if getattr(self, name) is not None:
                dom.append(self._new_node(name, **getattr(self, name)))
        return dom

    def parse_dom(self, xmldoc):
        super().parse_dom(xmldoc)
        self.format = xmldoc.get('format')
        for c in xmldoc:
            if c.tag == 'secret':
                self.secret_type = c.get('type')
                self.secret_uuid = c.get('uuid')
            elif c.tag in ('cipher', 'ivgen'):
                setattr(self, c.tag, dict(c.attrib))


class LibvirtConfigStorageBackingStore(LibvirtConfigStorageObject):
    """The file or volume which a volume is laid over.

    When it is printed, path and format are what libvirt read in the
    volume's own header. The guest writes the header of a raw disk: see
    LibvirtConfigStorageVolume.
    """

    def __init__(self, **kwargs):
        super().__init__(root_name='backingStore', **kwargs)
        self.path = None
        self.format = None
        self.permissions = None

    def format_dom(self):
        dom = super().format_dom()
        self._format_texts(dom, 'path')
        if self.format is not None:
            dom.append(self._new_node('format', type=self.format))
        if self.permissions is not None:
            dom.append(self.permissions.format_dom())
        return dom

    def parse_dom(self, xmldoc):
        super().parse_dom(xmldoc)
        for c in xmldoc:
            if c.tag == 'path':
                self.path = c.text
            elif c.tag == 'format':
                self.format = c.get('type')
            elif c.tag == 'permissions':
                self.permissions = LibvirtConfigStoragePermissions()
                self.permissions.parse_dom(c)


class LibvirtConfigStorageVolume(LibvirtConfigStorageObject):
    """A volume: https://libvirt.org/formatstorage.html#storage-volume-xml

    At every refresh of a file system pool (a start of the daemon is one)
    libvirt looks into the files: target_format, compat, features,
    backing_store, encryption **and capacity** are then what the first bytes
    of the file say, and those of a raw disk are written by its guest. Of
    such a volume only physical, allocation and the names can be relied on.

    physical (bytes) is the length of the file or device. type is "file",
    "block", "network" ...; key is libvirt's, for a file it is the path.
    features are element names, such as "lazy_refcounts".
    """

    def __init__(self, **kwargs):
        super().__init__(root_name='volume', **kwargs)
        self.type = None
        self.name = None
        self.key = None
        self.capacity = None
        self.allocation = None
        self.physical = None
        self.target_path = None
        self.target_format = None
        self.permissions = None
        self.encryption = None
        self.compat = None
        self.cluster_size = None
        self.features = []
        self.backing_store = None

    def format_dom(self):
        dom = self._new_node(self.root_name, **_given({'type': self.type}))
        self._format_texts(dom, 'name', 'key')
        self._format_sizes(dom, 'capacity', 'allocation', 'physical')
        target = self._format_target()
        if len(target):
            dom.append(target)
        if self.backing_store is not None:
            dom.append(self.backing_store.format_dom())
        return dom

    def _format_target(self):
        target = self._new_node('target')
        if self.target_path is not None:
            target.append(self._text_node('path', self.target_path))
        if self.target_format is not None:
            target.append(self._new_node('format', type=self.target_format))
        if self.permissions is not None:
            target.append(self.permissions.format_dom())
        if self.encryption is not None:
            target.append(self.encryption.format_dom())
        self._format_texts(target, 'compat')
        if self.cluster_size is not None:
            target.append(self._text_node('clusterSize', self.cluster_size,
                                          unit='B'))
        if self.features:
            features = self._new_node('features')
            for name in self.features:
                features.append(self._new_node(name))
            target.append(features)
        return target

    def parse_dom(self, xmldoc):
        super().parse_dom(xmldoc)
        self.type = xmldoc.get('type')
        for c in xmldoc:
            if c.tag in ('name', 'key'):
                setattr(self, c.tag, c.text)
            elif c.tag in ('capacity', 'allocation', 'physical'):
                setattr(self, c.tag, _parse_size(c))
            elif c.tag == 'target':
                self._parse_target(c)
            elif c.tag == 'backingStore':
                self.backing_store = LibvirtConfigStorageBackingStore()
                self.backing_store.parse_dom(c)

    def _parse_target(self, target):
        for c in target:
            if c.tag == 'path':
                self.target_path = c.text
            elif c.tag == 'format':
                self.target_format = c.get('type')
            elif c.tag == 'permissions':
                self.permissions = LibvirtConfigStoragePermissions()
                self.permissions.parse_dom(c)
            elif c.tag == 'encryption':
                self.encryption = LibvirtConfigStorageEncryption()
                self.encryption.parse_dom(c)
            elif c.tag == 'compat':
                self.compat = c.text
            elif c.tag == 'clusterSize':
                self.cluster_size = _parse_size(c)
            elif c.tag == 'features':
                self.features = [f.tag for f in c]


def _given(attrs):
    return {k: str(v) for k, v in attrs.items() if v is not None}
