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

"""QEMU on the hosts: its fault that live migrations of the lab's guests meet.

QEMU loses what an emulated guest stores while its memory is sent. Before 9.0
each look at which pages are dirty clears their marks and leaves the guest's
TLB as it was: what is stored through an entry of it marks no page any more,
until something else empties the TLB. QEMU's commit 03bfc2188f (physmem: Fix
migration dirty bitmap coherency with TCG memory access) mends that, but for
the first look, where no page is newly dirty: 10.0 loses something too, far
more seldom. Only memory that is a multiple of 256 KiB is looked at in that
way; any other is taken page by page, with the TLB. Guests on KVM don't have
this fault, and the lab has no KVM.

So each guest gets 8 KiB more than it asked for. stores.py shows what comes of
it, with and without.
"""

PROGRAM = '/usr/bin/qemu-system-x86_64'
REAL = PROGRAM + '-unmended'
MORE = 8  # KiB, QEMU rounds to this
# libvirt's arguments: "-m MIB" or "-m size=NUMBERk,...", and the same in the
# object pc.ram. exec keeps the process that libvirt knows.
WRAPPER = '''#!/bin/bash
args=()
before=
for word; do
    case $before in -m)
        if [[ $word =~ ^[0-9]+$ ]]; then
            word=$((word * 1024 + %(more)d))k
        elif [[ $word =~ ^size=([0-9]+)k(.*)$ ]]; then
            word=size=$((BASH_REMATCH[1] + %(more)d))k${BASH_REMATCH[2]}
        fi
    esac
    memory='^(.*"id":"pc.ram".*"size":)([0-9]+)(.*)$'
    if [[ $word =~ $memory ]]; then
        word=${BASH_REMATCH[1]}
        word+=$((BASH_REMATCH[2] + %(more)d * 1024))${BASH_REMATCH[3]}
    fi
    args+=("$word")
    before=$word
done
exec %(real)s "${args[@]}"
''' % {'more': MORE, 'real': REAL}


def mend(host) -> None:
    """Have guests of a host outlive live migrations; libvirtd isn't up."""
    # /usr/bin is the host's own, in memory.
    host.run(['mv', PROGRAM, REAL])
    path = host.path(PROGRAM)
    path.write_text(WRAPPER)
    path.chmod(0o755)
