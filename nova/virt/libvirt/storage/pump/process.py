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
"""The parent's half of a worker process: its start, what it says, its end.

What the job is and what its result means is transfer.py's.
"""

import collections
import errno
import functools
import os
import select
import signal
import subprocess
import sys
import threading
import time
import typing as ty
import urllib.parse

from oslo_serialization import jsonutils

from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.pump import nbd

_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                       'worker.py')

# What the worker may see of our environment: where client certificates,
# Kerberos tickets and passwords for SASL lie, and nothing else.
_ENVIRONMENT = ('PATH', 'HOME', 'USER', 'XDG_CONFIG_HOME', 'XDG_RUNTIME_DIR',
                'KRB5CCNAME', 'KRB5_CONFIG', 'KRB5_CLIENT_KTNAME',
                'SASL_CONF_PATH', 'LIBVIRT_AUTH_FILE', 'LIBVIRT_DEBUG',
                'LIBVIRT_LOG_OUTPUTS')

# Seconds between two progress reports of a worker.
_INTERVAL = 0.2
# Seconds between two looks at the cancel condition and at the deadline.
_POLL = 0.04
# Seconds from cancel to SIGKILL.
_GRACE = 0.05

# What to do, by libvirt's error code.
# https://libvirt.org/html/libvirt-virterror.html
_ADVICE_CONNECT = _("check that libvirt listens there and that the "
                    "certificates are valid; that host's libvirt log has the "
                    "reason for a refusal")
_ADVICE = {
    38: _("see libvirt's log on that host, and its free space"),
    39: _("see libvirt's log on that host"),
    49: _("define the storage pool on that host"),
    50: _("refresh the storage pool on that host and look for the volume"),
    55: _("start the storage pool on that host"),
    88: _("let this host's certificate use the storage pool there"),
}

# How libvirt's client says that the daemon has gone, whatever the code is: see
# virnetclient.c and virnetsocket.c in its src/rpc.
_GONE = ('client socket is closed', 'End of file while reading data',
         'Cannot recv data', 'Cannot write data')

# The same by errno, for what an NBD server says or doesn't.
_ADVICE_NBD = {
    errno.ENOSPC: _("make room in the storage pool on that host"),
    errno.ECONNREFUSED: _("check that that host's compute service has "
                          "started qemu-nbd there"),
    errno.ETIMEDOUT: _("check that no firewall is between the hosts, and the "
                       "load of that host"),
}
_ADVICE_NBD_OTHER = _("see the log of nova-compute on that host, which has "
                      "qemu-nbd's own words")

_REASONS = {
    'small': _("what it goes to has fewer bytes than the volume"),
    'short': _("the volume ended before its length; it was truncated"),
    'unmarked': _("blocks have changed of which it was said that they have "
                  "not"),
    'long': _("the volume is longer than its length; it has grown"),
    'stuck': _("libvirt neither moved data nor reported an error"),
    'broken': _("libvirt says that it moved more than it was asked to"),
    'thread': _("no thread could be started"),
    'worker': _("the worker process failed"),
}


def _readable(files, timeout):
    """Return those of the files that can be read, within timeout seconds."""
    if not hasattr(select, 'poll'):
        # eventlet leaves select alone, as its own
        return select.select(files, [], [], timeout)[0]
    # Native select() knows no file descriptors above 1023.
    poll = select.poll()
    for f in files:
        poll.register(f, select.POLLIN)
    ready = {fd for fd, _event in poll.poll(timeout * 1000)}
    return [f for f in files if f.fileno() in ready]


class WorkerProcess:
    """One worker process, from start to end.

    :param job: a Job
    :param watch: a Watch
    :param extension: path of the compiled extension
    :param warm: the job has two passes
    :param table: file descriptor of a file with the table of what stands at
        the destination, and of how many bytes that is; without a destination
        the file gets the source's
    :param changed: without a destination, (offset, length) in bytes of what
        may differ from what the table says already
    :param changes: file descriptor of a file which has such a list when
        ask_again() says so, however long: a pipe may not take it
    :param told: whether that has one for the first pass, too
    :param in_use: without a destination, whether a guest may write to what is
        read
    """

    def __init__(self, job, watch, extension, warm=False, table=None,
                 changed=None, changes=None, told=False, in_use=False):
        self.job = job
        self._files = [fd for fd in (table and table[0], changes)
                       if fd is not None]
        self.watch = watch
        self.transferred = 0
        self._worker = None
        self._request = {
            'extension': extension, 'source': job.source,
            'destination': self._destination(), 'length': job.length,
            'sparse': job.sparse, 'find_holes': job.find_holes,
            'key': job.key, 'interval': _INTERVAL, 'warm': warm}
        if table is not None:
            self._request['table'] = table
        if changed is not None:
            self._request['changed'] = list(changed)
        if changes is not None:
            self._request['changes'] = changes
        if told:
            self._request['told'] = True
        if in_use:
            self._request['in_use'] = True
        self._stdin_lock = threading.Lock()
        self._answer = None
        self._unread = b''
        self._stderr: ty.Deque = collections.deque(maxlen=16)

    def _destination(self):
        destination = self.job.destination
        if not isinstance(destination, nbd.Export):
            return destination
        return {'extension': nbd.extension_path(), **destination._asdict()}

    def error(self, cls, **kwargs):
        """Make an exception that says which volume, where and how far."""
        job = self.job
        where = str(job.source)
        if job.destination:
            where += ' -> ' + str(job.destination)
        e = cls(volume=job.source.name, where=where, length=job.length,
                transferred=self.transferred, **kwargs)
        e.side = kwargs.get('side')
        e.transferred = self.transferred
        e.kind = None
        e.code = e.domain = 0
        return e

    def run(self, bandwidth):
        """Start the worker and wait for its end.

        :param bandwidth: a Bandwidth
        :returns: what the worker found, see worker.py
        :raises: StorageTransferError, StorageTransferStalled,
            StorageTransferCancelled
        """
        self.start()
        try:
            return self.do(bandwidth)
        finally:
            self.end()

    def start(self):
        """Start the worker; end() must follow."""
        self._worker = subprocess.Popen(
            [sys.executable, '-I', _WORKER], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd='/',
            start_new_session=True,
            pass_fds=self._files,
            env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ})
        try:
            self.watch.on_start(self._worker.pid)
        except BaseException:
            self.end()
            raise

    def do(self, bandwidth, last=True):
        """Have the worker do what was asked for; parameters as run().

        :param last: it has nothing to do afterwards
        """
        self.transferred, self._answer = 0, None
        with bandwidth.shared(functools.partial(self._tell, self._worker)):
            try:
                self._follow(self._worker)
            finally:
                if last or 'result' not in (self._answer or {}):
                    # Before the others are told that they have more.
                    self._end(self._worker)
        return self._found(self._worker)

    def ask_again(self, job, watch, changed=False):
        """Have the next do() be a second pass.

        :param job: the same Job, of another length perhaps
        :param changed: whether the file changes has what may have changed
        """
        self.job, self.watch = job, watch
        self._request = {'length': job.length, 'changed': changed}

    def end(self):
        """End the worker, if there is one; as often as wanted."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._end(worker)
            self.watch.on_end(worker.pid)

    def _tell(self, worker, bandwidth):
        """Send the request or, later on, another bandwidth."""
        message = {'bandwidth': bandwidth, **self._request}
        self._request = {}
        with self._stdin_lock:
            if worker.stdin.closed:
                return
            try:
                # Not os.write(): eventlet's tries for ever when nobody reads.
                os.writev(worker.stdin.fileno(),
                          [jsonutils.dump_as_bytes(message), b'\n'])
            except BrokenPipeError:
                pass    # it is dead already: _found() tells

    def _follow(self, worker):
        """Read what the worker says until it has ended or must be."""
        last_progress = time.monotonic()
        open_files = [worker.stdout, worker.stderr]
        while open_files:
            for f in _readable(open_files, _POLL):
                data = os.read(f.fileno(), 65536)
                if not data:
                    open_files.remove(f)
                elif f is worker.stderr:
                    self._stderr.append(data)
                elif self._take(data):
                    last_progress = time.monotonic()
            if self._answer is not None:
                return
            if self.watch.cancelled():
                raise self.error(exception.StorageTransferCancelled)
            if time.monotonic() - last_progress > self.watch.stall_timeout:
                raise self.error(exception.StorageTransferStalled,
                                 seconds=self.watch.stall_timeout)

    def _take(self, data):
        """Handle the worker's lines; return whether there was progress."""
        moved = False
        *lines, self._unread = (self._unread + data).split(b'\n')
        for line in lines:
            try:
                message = jsonutils.loads(line)
            except ValueError:
                # the C library's last words
                self._stderr.append(line)
                continue
            if 'transferred' in message:
                moved |= message['transferred'] > self.transferred
                self.transferred = message['transferred']
                self.watch.progress(self.transferred)
            else:
                self._answer = message
        return moved

    def _end(self, worker):
        """End the worker: its stdin's end asks for it, SIGKILL makes sure."""
        with self._stdin_lock:
            worker.stdin.close()
        deadline = time.monotonic() + _GRACE
        while worker.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if worker.poll() is None:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        worker.stdout.close()
        worker.stderr.close()

    def _found(self, worker):
        answer = self._answer
        if answer is None:
            raise self._died(worker)
        if 'error' in answer:
            raise self._failed(answer['error'])
        self.transferred = self.job.length
        self.watch.progress(self.transferred)
        return answer['result']

    def _died(self, worker):
        if -worker.returncode in (signal.SIGKILL, signal.SIGTERM):
            # by the job tracker, when the server is deleted, or by a person
            return self.error(exception.StorageTransferCancelled)
        said = b''.join(self._stderr)[-500:].decode(errors='replace').strip()
        return self.error(
            exception.StorageTransferError, side='source', operation='run',
            reason=_("try again, or see nova-compute's log: the worker "
                     "process ended with status %(status)d: %(said)s") % {
                         'status': worker.returncode, 'said': said})

    def _advice_to_connect(self, side):
        uri = getattr(self.job, side).uri
        return (_ADVICE_CONNECT if urllib.parse.urlsplit(uri).netloc
                else _("check that libvirt runs on this host"))

    def _advice(self, report):
        if report['reason'] == 'nbd':
            return _ADVICE_NBD.get(report['code'], _ADVICE_NBD_OTHER)
        if report['reason'] == 'libvirt':
            if report['operation'] == 'connect':
                return self._advice_to_connect(report['side'])
            return _ADVICE.get(
                report['code'], _("see libvirt's log on that host"))
        return _("try again, or see nova-compute's log")

    def _failed(self, report):
        self.transferred = report['transferred'] or self.transferred
        if report['reason'] == 'cancelled':
            return self.error(exception.StorageTransferCancelled)
        reason = _REASONS.get(report['reason'], '')
        if report['message']:
            reason = '%s%s' % (reason + ': ' if reason else '',
                               report['message'])
        if report['reason'] == 'libvirt':
            reason += _(" (libvirt error code %(code)d, domain %(domain)d)"
                        ) % report
        # Of a fault, the API's users are shown the beginning.
        reason = '%s: %s' % (self._advice(report), reason)
        gone = self._gone_from(report)
        e = self.error(exception.StorageDestinationGone if gone else
                       exception.StorageTransferError, reason=reason,
                       side=report['side'], operation=report['operation'],
                       **gone)
        e.kind = report['reason']
        e.code, e.domain = report['code'], report['domain']
        return e

    def _gone_from(self, report):
        """Say where a daemon has gone that was being written to; {} if not."""
        if (report['reason'] != 'libvirt' or
                report['side'] != 'destination' or
                report['operation'] == 'connect' or
                not any(text in report['message'] for text in _GONE)):
            return {}
        destination = self.job.destination
        return {'pool': destination.pool, 'host': urllib.parse.urlsplit(
            destination.uri).hostname or _("this host")}
