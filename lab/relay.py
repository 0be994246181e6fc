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

"""Pass frames between a network device and a tap device, some time later.

Run as a program: DEVICE TAP MILLISECONDS. In user space, because not every kernel
has netem. The devices must not leave checksums or segmentation to each other.
"""

import collections
import fcntl
import os
import selectors
import socket
import struct
import sys
import time

# linux/if_ether.h, linux/if_tun.h, linux/if_packet.h
ETH_P_ALL, TUNSETIFF, IFF_TAP, IFF_NO_PI = 3, 0x400454ca, 2, 0x1000
PACKET_OUTGOING, SOL_PACKET, PACKET_ADD_MEMBERSHIP, MR_PROMISC = 4, 263, 1, 1
FRAMES = 10000  # held at most each way, as many as netem's usual limit
LARGEST = 65600


def open_device(name):
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW,
                         socket.htons(ETH_P_ALL))
    sock.bind((name, ETH_P_ALL))
    sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, struct.pack(
        'IHH8s', socket.if_nametoindex(name), MR_PROMISC, 0, b''))
    sock.setblocking(False)
    return sock


def open_tap(name):
    fd = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack(
        '16sH', name.encode(), IFF_TAP | IFF_NO_PI))
    return fd


def main(device, tap, milliseconds):
    delay = float(milliseconds) / 1000
    sock, fd = open_device(device), open_tap(tap)
    inward, outward = collections.deque(), collections.deque()
    ways = ((inward, lambda frame: os.write(fd, frame)),
            (outward, sock.send))
    watch = selectors.DefaultSelector()
    watch.register(sock, selectors.EVENT_READ)
    watch.register(fd, selectors.EVENT_READ)
    while True:
        firsts = [queue[0][0] for queue, _send in ways if queue]
        watch.select(max(0, min(firsts) - time.monotonic())
                     if firsts else None)
        due = time.monotonic() + delay
        try:
            while True:
                frame, address = sock.recvfrom(LARGEST)
                if address[2] != PACKET_OUTGOING and len(inward) < FRAMES:
                    inward.append((due, frame))
        except BlockingIOError:
            pass
        try:
            while True:
                frame = os.read(fd, LARGEST)
                if len(outward) < FRAMES:
                    outward.append((due, frame))
        except BlockingIOError:
            pass
        now = time.monotonic()
        for queue, send in ways:
            while queue and queue[0][0] <= now:
                try:
                    send(queue.popleft()[1])
                except OSError:
                    pass  # as any link does with what it can't pass


if __name__ == '__main__':
    main(*sys.argv[1:])
