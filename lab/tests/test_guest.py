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
"""The guest's words, its pattern and the cloud's configuration files."""

import contextlib
import hashlib
import itertools
import pathlib
import subprocess
import tempfile
import unittest
from unittest import mock

from lab.cloud import config
from lab.cloud import server
from lab.guest import image
from lab.guest import testimony


def words(*objects):
    """Lines of a guest: each with the length of its object."""
    return ''.join('LAB %d %s\n' % (len(line), line) for line in objects)


CONSOLE = 'SeaBIOS (version 1.16.2)\n' + words(
    '{"event":"boot","boot":2,"boot_id":"b2"}',
    '{"event":"testimony","boot":2,"boot_id":"b2","uptime":4}',
    '{"event":"disk","name":"vda","bytes":1024,"magic":"mbr",'
    '"own":true,"label":""}',
    '{"event":"disk","name":"vdb","bytes":512,"magic":"vfat",'
    '"own":false,"label":"ephemeral0"}',
    '{"event":"swap","disk":"vdc","usable":true}',
    '{"event":"other","disk":"vdb","boot":7}',
    '{"event":"range","name":"data","disk":"vdb","sha256":"other\'s"}',
    '{"event":"filesystem","bytes":900,"free":800,"kept":"boots ranges "}',
    '{"event":"range","name":"data","disk":"vda","sha256":"own"}',
    '{"event":"config","device":"sr0","user_data":"aGk="}',
    '{"event":"whole","lines":9}',
    '{"event":"ready","boot":2,"boot_id":"b2","uptime":5}',
    '{"event":"done","id":"c1","command":"sh","ok":false,"output":"bm8K"}',
    '{"event":"testimony","boot":2,"boot_id":"b2","uptime":9}'
) + 'LAB 44 {"event":"disk","name":"vda","bytes":10\n'


class TestTestimony(unittest.TestCase):

    def test_whole_ones_only(self):
        """What is cut off, and what is not complete, is no testimony."""
        (said,) = testimony.testimonies(CONSOLE)
        self.assertEqual((2, 'b2', 4), (said.boot, said.boot_id, said.uptime))
        self.assertEqual('vda', said.own['name'])
        self.assertEqual(512, said.disk_labelled('ephemeral0')['bytes'])
        self.assertIsNone(said.disk_labelled('nothing'))
        self.assertEqual({'vdc': True}, said.swap)
        self.assertEqual(['boots', 'ranges'], said.filesystem['kept'])
        self.assertEqual(b'hi', said.config['user_data'])

    def test_another_guests_ranges_are_apart(self):
        (said,) = testimony.testimonies(CONSOLE)
        self.assertEqual('own', said.ranges['data']['sha256'])
        self.assertEqual(7, said.others['vdb']['boot'])
        self.assertEqual(
            "other's", said.others['vdb']['ranges']['data']['sha256'])

    def test_printed_twice(self):
        """Nova appends to the log what it has read from the console."""
        twice = ''.join(line + '\n' + line + '\n'
                        for line in CONSOLE.splitlines())
        self.assertEqual(testimony.testimonies(CONSOLE),
                         testimony.testimonies(twice))

    def test_no_config_drive(self):
        (said,) = testimony.testimonies(
            words('{"event":"testimony","boot":1,"boot_id":"b","uptime":1}',
                  '{"event":"config","device":null}',
                  '{"event":"whole","lines":2}'))
        self.assertIsNone(said.config['device'])

    def test_a_line_is_lost(self):
        for line in CONSOLE.splitlines(keepends=True)[2:11]:
            self.assertEqual([], testimony.testimonies(
                CONSOLE.replace(line, '')), line)

    def test_a_part_of_a_word_is_lost(self):
        """QEMU drops what a slow reader of the console doesn't take."""
        end = CONSOLE.index('LAB', CONSOLE.index('"whole"'))
        start = CONSOLE.index('{"event":"testimony"')
        for lost, at in itertools.product((1, 3, 26), range(start, end)):
            self.assertEqual([], testimony.testimonies(
                CONSOLE[:at] + CONSOLE[at + lost:]), (lost, CONSOLE[:at]))

    def test_a_part_of_a_reply_is_lost(self):
        self.assertEqual({}, testimony.replies(
            CONSOLE.replace('bm8K', '')))

    def test_parts_of_two_lines(self):
        """Of the length of the first one by chance."""
        self.assertEqual([], list(testimony.events(
            words('{"event":"swap",:"vdc","a":1}'))))

    def test_replies(self):
        reply = testimony.replies(CONSOLE)['c1']
        self.assertEqual((False, 'no\n'), (reply['ok'], reply['output']))


class TornServer(server.Server):
    """A server whose console loses a line of its guest's first words."""

    def __init__(self, console):
        super().__init__(None, 'a-server')
        self.said, self.typed = console, []

    def console(self):
        return self.said

    @contextlib.contextmanager
    def _typed(self, line):
        number, *command = line.split()
        self.typed.append(line)
        if self.typed.count(line) > 1:  # the first reply is lost too
            if command == ['testify']:
                self.said += CONSOLE
            self.said += words('{"event":"done","id":"%s","command":"x",'
                               '"ok":true,"boot":2,"output":""}' % number)
        yield


class TestTornLines(unittest.TestCase):

    READY = words('{"event":"ready","boot":2,"boot_id":"b2","uptime":5}')

    def setUp(self):
        super().setUp()
        patcher = mock.patch.object(server, 'POLL', .01)
        patcher.start()
        self.addCleanup(patcher.stop)

    def torn(self):
        return TornServer(CONSOLE.replace('"event":"disk"', '"ev', 1)
                          + self.READY)

    def test_testimony_is_asked_for_again(self):
        torn = self.torn()
        torn.command = mock.Mock(
            side_effect=lambda *_, **__: setattr(torn, 'said', CONSOLE))
        self.assertEqual('b2', torn.testimony(limit=5).boot_id)
        torn.command.assert_called_once_with('testify', limit=30)

    def test_not_before_it_is_up(self):
        torn = TornServer(words('{"event":"testimony","boot":2,'
                                '"boot_id":"b2","uptime":4}'))
        with self.assertRaises(server.ServerError):
            torn.testimony(limit=.05)
        self.assertEqual([], torn.typed)

    def test_command_is_typed_again(self):
        torn = TornServer(self.READY)
        self.assertEqual('', torn.command('testify', limit=.3))
        self.assertEqual(2, len(torn.typed))
        self.assertEqual(1, len(set(torn.typed)))

    def test_no_reply(self):
        torn = TornServer(self.READY)
        torn._typed = lambda line: contextlib.nullcontext()
        with self.assertRaisesRegex(server.NoReply, 'does not answer'):
            torn.command('testify', limit=.03)


class TestPattern(unittest.TestCase):

    def test_same_as_python(self):
        """The guest's program and hashlib agree, also between blocks."""
        with tempfile.TemporaryDirectory() as folder:
            program = pathlib.Path(folder, 'pattern')
            subprocess.run(['gcc', '-O1', '-Wall', '-Werror', '-o', program,
                            image.HERE / 'pattern.c'], check=True)
            for seed, length in (('a', 0), ('a', 1), ('b', 168), ('c', 169),
                                 ('seed', 65520), ('seed', (1 << 20) + 3)):
                wrote = subprocess.run([program, seed, str(length)],
                                       check=True, capture_output=True).stdout
                self.assertEqual(testimony.pattern(seed, length), wrote)
                self.assertEqual(hashlib.sha256(wrote).hexdigest(),
                                 testimony.pattern_sha256(seed, length))

    def test_ours_are_scripts_of_busybox(self):
        for name in image.OURS:
            done = subprocess.run(['busybox', 'sh', '-n', image.HERE / name],
                                  capture_output=True, text=True)
            self.assertEqual((0, ''), (done.returncode, done.stderr))


class TestConfiguration(unittest.TestCase):

    def test_set_and_get(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, 'set.conf')
            self.assertIsNone(config.get_option(path, 'libvirt', 'Key'))
            self.assertEqual('x', config.get_option(path, 'a', 'b', 'x'))
            config.set_option(path, 'libvirt', 'Key', '100%')
            config.set_option(path, 'DEFAULT', 'debug', 'true')
            config.set_option(path, 'libvirt', 'Key', 'new')
            self.assertEqual('new', config.get_option(path, 'libvirt', 'Key'))
            self.assertEqual('true',
                             config.get_option(path, 'DEFAULT', 'debug'))
            # what is in DEFAULT is not in every other section
            self.assertIsNone(config.get_option(path, 'libvirt', 'debug'))

    def test_secrets_are_random_kept_and_private(self):
        with tempfile.TemporaryDirectory() as folder:
            paths = [pathlib.Path(folder, name) for name in 'ab']
            first, second = map(config.Secrets, paths)
            self.assertNotEqual(first.admin, second.admin)
            self.assertNotEqual(first.admin, first.service)
            self.assertEqual(first.rabbit, config.Secrets(paths[0]).rabbit)
            self.assertEqual(0o600, paths[0].stat().st_mode & 0o777)
