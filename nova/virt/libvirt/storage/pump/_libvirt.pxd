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

# The names of libvirt which the pump uses; declarations only.
# https://libvirt.org/html/libvirt-libvirt-stream.html

cdef extern from "<libvirt/libvirt.h>" nogil:
    ctypedef struct virStream:
        pass
    ctypedef virStream *virStreamPtr
    ctypedef struct virConnect:
        pass
    ctypedef virConnect *virConnectPtr
    ctypedef struct virStorageVol:
        pass
    ctypedef virStorageVol *virStorageVolPtr
    enum:
        VIR_STREAM_RECV_STOP_AT_HOLE

    # Bytes received, 0 at the end, -1 on error, -2 if it would block, -3 at
    # a hole.
    int virStreamRecvFlags(virStreamPtr stream, char *data, size_t nbytes,
                           unsigned int flags)
    int virStreamRecvHole(virStreamPtr stream, long long *length,
                          unsigned int flags)
    # Bytes sent, which may be fewer than asked for; -1 on error, -2 if it
    # would block.
    int virStreamSend(virStreamPtr stream, const char *data, size_t nbytes)
    int virStreamSendHole(virStreamPtr stream, long long length,
                          unsigned int flags)
    int virStreamFinish(virStreamPtr stream)
    int virStreamAbort(virStreamPtr stream)
    # NULL on error; who made it frees it.
    virStreamPtr virStreamNew(virConnectPtr conn, unsigned int flags)
    int virStreamFree(virStreamPtr stream)

    # https://libvirt.org/html/libvirt-libvirt-storage.html
    # Without a length it ends where its stream does.
    int virStorageVolUpload(virStorageVolPtr volume, virStreamPtr stream,
                            unsigned long long offset,
                            unsigned long long length, unsigned int flags)

cdef extern from "<libvirt/virterror.h>" nogil:
    ctypedef struct virError:
        int code
        int domain
        int level
        char *message
    # The calling thread's error, until its next libvirt call.
    virError *virGetLastError()
    void virResetLastError()
