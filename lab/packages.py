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

"""The Debian packages of the lab, here and nowhere else."""

import os
import pathlib
import subprocess

from . import config
from .errors import LabError

HOSTS = (
    'acl', 'e2fsprogs', 'ethtool', 'gnutls-bin', 'iproute2', 'libvirt-clients',
    'libnbd-dev', 'libvirt-daemon', 'libvirt-daemon-system', 'libvirt-dev',
    'mount',
    'ovmf', 'procps', 'qemu-system-x86', 'qemu-utils', 'sudo', 'swtpm',
    'swtpm-tools', 'util-linux')
#: For the scripts of guests, which the tests of all levels read.
GUESTS = ('busybox-static',)
SSH = ('openssh-client', 'openssh-server', 'rsync')
CLOUD = (
    'bindfs', 'conntrack', 'dosfstools', 'dropbear-bin', 'fdisk',
    'g++', 'gcc', 'genisoimage', 'ipset', 'iptables', 'kmod', 'libpcre2-dev',
    'libssl-dev', 'mariadb-server', 'memcached', 'mtools', 'pkg-config',
    'python3-dev', 'python3-venv', 'rabbitmq-server', 'syslinux',
    'syslinux-common', 'syslinux-efi')
#: SASL of libvirt, and the KDC.
SASL = ('krb5-user', 'libsasl2-modules', 'libsasl2-modules-gssapi-mit',
        'sasl2-bin')
KDC = ('krb5-admin-server', 'krb5-kdc')
OVS = ('dnsmasq-base', 'openssh-client', 'openvswitch-switch')
#: Of Ceph as the admin guide has it on a host, and its daemons.
CEPH = (
    'ceph-common', 'ceph-mgr', 'ceph-mon', 'ceph-osd',
    'libvirt-daemon-driver-storage-rbd', 'python3-rados', 'python3-rbd',
    'qemu-block-extra')
STORAGE = ('kmod', 'qemu-system-common')
#: Unpacked for the storage machine, with what they need; never installed.
STORAGE_UNPACKED = (
    'dmeventd', 'keyutils', 'libaio1', 'libdevmapper-event1.02.1', 'libedit2',
    'libevent-core-2.1-7', 'libnfsidmap1', 'libreadline8', 'libtirpc-common',
    'libtirpc3', 'libwrap0', 'lvm2', 'nfs-common', 'nfs-kernel-server',
    'rpcbind', 'thin-provisioning-tools', 'udev')
BENCH = ('libnbd-bin', 'nbdkit', *SSH)

POLICY = pathlib.Path('/usr/sbin/policy-rc.d')
REFUSAL = '#!/bin/sh\n# while the Nova lab installs packages\nexit 101\n'


def wanted(options) -> list[str]:
    """The packages for what `up` was asked for."""
    names = {*HOSTS, *GUESTS, *SASL, *KDC}
    if options.ssh:
        names.update(SSH)
    if 'vm' in options.storage.split(','):
        names.update(STORAGE)
    if 'ceph' in options.storage.split(','):
        names.update(CEPH)
    if options.level == 'cloud':
        names.update(CLOUD)
        if options.network == 'ovs':
            names.update(OVS)
    return sorted(names)


def missing(names) -> list[str]:
    """Those of these packages which are not installed."""
    listed = subprocess.run(
        ['dpkg-query', '-W', '-f', '${Package} ${db:Status-Status}\n',
         *names], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True).stdout.splitlines()
    there = {line.split()[0] for line in listed
             if line.endswith(' installed')}
    return [name for name in names if name not in there]


def install(names) -> None:
    """Install packages; none of their daemons starts by itself.

    :raises: LabError with apt's log
    """
    log = config.CACHE / 'apt.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    forget_policy()
    if not POLICY.exists():
        # invoke-rc.d(8) asks it; 101 is "not allowed".
        POLICY.write_text(REFUSAL)
        POLICY.chmod(0o755)
    try:
        with open(log, 'w') as out:
            for command in (
                    ['apt-get', '-q', 'update'],
                    # One of an earlier command may be at work still.
                    ['apt-get', '-q', '-o', 'DPkg::Lock::Timeout=300',
                     'install', '-y', '--no-install-recommends', *names]):
                done = subprocess.run(
                    command, stdout=out, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'})
                if done.returncode:
                    raise LabError('%s failed' % ' '.join(command[:3]), log)
    finally:
        forget_policy()


def forget_policy() -> None:
    """Remove our policy-rc.d, also one left by a killed command."""
    if POLICY.exists() and POLICY.read_text() == REFUSAL:
        POLICY.unlink()
