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

"""NBD servers for tests: a real one, and one that fails on demand.

Run as a program it is the latter. Nothing of Nova is imported there. It is a
process, as a copy that runs lets no green thread go on.
"""

import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time

READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, ZERO = range(7)
# Of an export: has flags, can flush, can zero.
FLAGS = 1 | 4 | 64
READ_ONLY = 2

PRIORITY = 'NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM'


class QemuNbd:
    """qemu-nbd, as a compute service starts it.

    :param test: the test case, which ends it
    :param path: of the file
    :param options: more of its options
    """

    def __init__(self, test, path, *options):
        if shutil.which('qemu-nbd') is None:
            test.skipTest('qemu-nbd is not installed')
        listening = socket.socket()
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.bind(('127.0.0.1', 0))
        listening.listen(8)
        self.port = listening.getsockname()[1]
        # The socket is its file descriptor 3, the shell's process its own.
        self.process = subprocess.Popen(
            ['sh', '-c', 'exec 3<&%d; LISTEN_FDS=1 LISTEN_PID=$$ '
             'exec qemu-nbd "$@"' % listening.fileno(), 'qemu-nbd',
             '-f', 'raw', '-e', '1', '--discard', 'unmap', *options, path],
            pass_fds=[listening.fileno()], stderr=subprocess.PIPE)
        listening.close()
        test.addCleanup(self.end)

    @staticmethod
    def tls(folder):
        """Options for TLS with the keys in folder/keys.psk."""
        return ('--object', 'tls-creds-psk,id=t,endpoint=server,dir=%s,'
                'priority=%s' % (folder, PRIORITY), '--tls-creds', 't')

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


class PlayedServer:
    """The server below, in its process.

    :param test: the test case, which ends it
    :param conduct: keywords of Conduct
    """

    def __init__(self, test, **conduct):
        self.process = subprocess.Popen(
            [sys.executable, '-I', os.path.abspath(__file__),
             json.dumps(conduct)], stdout=subprocess.PIPE)  # noqa: N324
        test.addCleanup(self.end)
        self.port = int(self.process.stdout.readline())

    def log(self):
        """Wait for its end.

        :returns: what it was asked for, lists of command, offset and length
        """
        return json.loads(self.process.communicate()[0])    # noqa: N324

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Conduct:
    """What a played server does; without TLS, one client.

    :param size: bytes of its export
    :param flags: of its export
    :param hold: how many requests it leaves without an answer until one more
        has come, or none for a while
    :param errors: errno by the number of the request from 0 on
    :param at: number of the request at which it does something else
    :param act: what that is: 'silent', 'close', 'garbage', 'stranger' (an
        answer to what wasn't asked) or 'long' (an answer to a write with data)
    """

    def __init__(self, size=1 << 40, flags=FLAGS, hold=0, errors=(), at=-1,
                 act=''):
        self.size, self.flags, self.hold = size, flags, hold
        self.errors = dict(errors)
        self.at, self.act = at, act
        self.log = []

    def serve(self, connection):
        self.connection = connection
        self.greet()
        held = []
        while True:
            if held and not select.select([connection], [], [], 0.2)[0]:
                self.answer(held, 0)
            magic, _flags, command, cookie, offset, length = struct.unpack(
                '>IHHQQI', self.take(28))
            assert magic == 0x25609513, magic
            number = len(self.log)
            self.log.append((command, offset, length))
            if command == DISCONNECT:
                return
            if command == WRITE:
                self.drop(length)
            if number == self.at and self.misbehave(cookie):
                return
            held.append((cookie, self.errors.get(number, 0)))
            self.answer(held, self.hold)

    def answer(self, held, hold):
        while len(held) > hold:
            cookie, error = held.pop(0)
            self.connection.sendall(struct.pack('>IIQ', 0x67446698, error,
                                                    cookie))

    def greet(self):
        self.connection.sendall(struct.pack('>8s8sH', b'NBDMAGIC',
                                            b'IHAVEOPT', 3))
        self.take(4)
        while True:
            _magic, option, length = struct.unpack('>8sII', self.take(16))
            self.take(length)
            if option != 7:     # all but GO is beyond it
                self.reply(option, 1 << 31 | 1)
                continue
            self.reply(option, 3, struct.pack('>HQH', 0, self.size,
                                              self.flags))
            self.reply(option, 1)
            return

    def reply(self, option, kind, data=b''):
        self.connection.sendall(struct.pack(
            '>QIII', 0x3e889045565a9, option, kind, len(data)) + data)

    def take(self, length):
        data = b''
        while len(data) < length:
            piece = self.connection.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def drop(self, length):
        buffer = memoryview(bytearray(1 << 18))
        while length:
            length -= self.connection.recv_into(buffer, min(length, 1 << 18))

    def misbehave(self, cookie):
        if self.act == 'silent':
            time.sleep(600)
        elif self.act == 'garbage':
            self.connection.sendall(b'garbage' * 10)
        elif self.act == 'stranger':
            self.connection.sendall(struct.pack('>IIQ', 0x67446698, 0,
                                                cookie + 1000))
        elif self.act == 'long':
            # a chunk of a structured reply, though none was agreed on
            self.connection.sendall(struct.pack(
                '>IHHQI', 0x668e33ef, 1, 1, cookie, 1 << 20) + bytes(1 << 10))
        return self.act == 'close'


def main():
    conduct = Conduct(**json.loads(sys.argv[1]))    # noqa: N324
    listening = socket.socket()
    listening.bind(('127.0.0.1', 0))
    listening.listen()
    print(listening.getsockname()[1], flush=True)
    try:
        conduct.serve(listening.accept()[0])
    except (EOFError, ConnectionError):
        pass
    print(json.dumps(conduct.log))  # noqa: N324


if __name__ == '__main__':
    main()
