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

"""What the copy asks of an end, be it a libvirt stream, a file or a test's.

A copy has two threads: the *receiving* one, which it starts, and the *calling*
one, on which run() was called. recv() and recv_hole() of the source are called
on the first, while send() and send_hole() of the destination are called on the
second; all else comes on the second when the first has ended. So no two
functions of one end are ever at work at the same time, and an end needs no
lock unless it shares something with another. stop() alone comes on any thread
at any time.

All may block, apart from last_error() and stop(); a blocked one holds up a
cancel, too, unless stop() ends it.
None may take the GIL for long or raise.

Each returns -1 for a failure of which last_error() knows more. -2, libvirt's
"would block", is no answer of a blocking stream: the copy fails as "stuck",
since waiting for what isn't told would never end.
"""

cdef enum:
    # A domain that libvirt doesn't have: code is an errno, the rest libnbd's.
    NBD_ERRORS = -1

cdef struct error_t:
    int code            # virErrorNumber, 0 if it isn't libvirt's
    int domain          # virErrorDomain
    char message[1024]

# Handed over as a capsule named "nova.pump.end" by who wants to be an end
# without being a virStream.
cdef struct end_t:
    # First argument of each function. It lives as long as the copy does, and
    # is an end of one copy only.
    void *stream

    # Receive what comes next. Partial: returns 1 to nbytes, as many as come at
    # once; the copy asks again. 0: the source has ended, and isn't asked
    # again. -3: a hole comes next, and recv_hole() is called next. flags is
    # always VIR_STREAM_RECV_STOP_AT_HOLE. NULL where nothing can be received:
    # the end is no source.
    int (*recv)(void *stream, char *data, size_t nbytes,
                unsigned int flags) noexcept nogil
    # Receive a hole, after -3 alone. Never partial: length gets all of it, at
    # least one byte, and 0 is returned. flags is always 0. NULL with recv.
    int (*recv_hole)(void *stream, long long *length,
                     unsigned int flags) noexcept nogil
    # The next length bytes, at least one, are known and need not come: 0. The
    # end goes on behind them. NULL where all must come; called by a copy of
    # some blocks alone, never between -3 and recv_hole().
    int (*pass_over)(void *stream, long long length) noexcept nogil
    # Send on. Partial: returns 1 to nbytes; the copy sends the rest with the
    # next call. 0 is "stuck", since a blocking stream takes something. NULL
    # where nothing can be sent: the end is no destination.
    int (*send)(void *stream, const char *data, size_t nbytes) noexcept nogil
    # How many of the bytes that send() took must still stay where they lie,
    # counted back from the last one. Waits until they are no more than most;
    # -1 for a failure, also of an earlier send(). Called after send() and
    # send_hole(); finish() needs none after its return. NULL where send()
    # needs nothing when it has returned.
    long long (*settle)(void *stream, long long most) noexcept nogil
    # Leave length bytes out, at least one. Never partial: 0 for all of them.
    # flags is always 0. NULL with send, or where there can be no hole; not
    # called unless the copy is sparse.
    int (*send_hole)(void *stream, long long length,
                     unsigned int flags) noexcept nogil
    # length bytes, at least one, stand there already: 0. NULL where what
    # stands there can't be kept; called by a copy of changes alone.
    int (*skip)(void *stream, long long length) noexcept nogil
    # All has been received or sent: 0 if that holds. Called once, if nothing
    # has failed, of the source first.
    int (*finish)(void *stream) noexcept nogil
    # Something has failed, here or at the other end, perhaps in finish() or
    # after it. Called once then; what it returns isn't looked at.
    int (*abort)(void *stream) noexcept nogil
    # The copy has failed or was cancelled: what waits shall return -1 soon,
    # also when it is called later. NULL where nothing can be done about it.
    void (*stop)(void *stream) noexcept nogil
    # Tell of the failure for which a function of this end has just returned
    # -1, on the same thread. error comes zeroed. Called at most once for each
    # of them; must not block.
    void (*last_error)(void *stream, error_t *error) noexcept nogil
