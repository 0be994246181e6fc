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
"""What an instance's disks have, as far as a test knows."""

import os

from nova.tests.fixtures import libvirt_storage

# What a disk has where no guest has written: nothing, a hole, the image
BLANK = {b'', b'\0' * 6, b'......'}


class Store:
    """What a host has disks in."""

    def names(self):
        raise NotImplementedError

    def open(self, name):
        raise NotImplementedError

    def name_of(self, source):
        """:param source: name or path that a guest's definition has"""
        return os.path.basename(source)


class Directory(Store):
    """What a storage pool of files has.

    :param path: of its directory
    """

    def __init__(self, path):
        self.path = path
        self._file_system = libvirt_storage.RealFileSystem()

    def names(self):
        return os.listdir(self.path)

    def open(self, name):
        return self._file_system.open(os.path.join(self.path, name))

    def __str__(self):
        return self.path


class Disk:
    """What a disk may have, as far as the test knows.

    :param name: of the disk
    :param stores: by host, the Store that it is in there
    :ivar now: set of bytes
    :ivar before: set of what it had before moves that are not over
    :ivar is_doomed: whether something was to destroy it
    :ivar store: what it is in, None if that isn't certain
    """

    def __init__(self, name, stores):
        self.name, self.stores = name, stores
        self.now, self.before, self.store = set(), set(), None
        self.is_doomed = False

    @property
    def either(self):
        return self.now | self.before

    def written(self, content):
        self.now, self.is_doomed = {content}, False

    def moved(self):
        self.before |= self.now
        self.store = None

    def confirmed(self):
        self.before = set()

    def reverted(self):
        self.now |= self.before
        self.store = None

    def may_be_blank(self):
        """It may have been made anew."""
        self.now |= BLANK
        self.store = None

    def is_blank(self):
        self.is_doomed = False
        self.now, self.before, self.store = set(BLANK), set(), None
