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
"""What of an image's file may have changed, by a dirty bitmap.

A bitmap tells of the guest's clusters, and what is copied is the image's file.
There a cluster stands where it stood before unless the guest has written to
it or discarded it, and then it is dirty. All else of the file may have
changed: the image's own tables have. (But what a block job pulls out of the
base image, or a read with libvirt's copy_on_read, isn't dirty for QEMU. Nova
does neither to a disk while it moves.)
"""


def changed_ranges(mapping, dirty, cluster: int, sent: int,
                   length: int) -> list[tuple[int, int]]:
    """Say what of a qcow2 image's file may have changed.

    :param mapping: list of dicts as of ``qemu-img map --output=json``
    :param dirty: the same of a dirty bitmap: what isn't data is dirty
    :param cluster: bytes of a cluster
    :param sent: bytes of the file that were sent before
    :param length: bytes that it has now
    :returns: list of (offset, length) in bytes of the file, in order
    :raises: ValueError if the two aren't of one image
    """
    if _end(mapping) != _end(dirty):
        raise ValueError('%d bytes have a bitmap of %d' % (
            _end(mapping), _end(dirty)))
    found, at = [], 0
    for start, end in sorted(_unchanged(
            mapping, list(_clean(dirty, cluster)))):
        end = min(end, sent)
        if start >= end:
            break
        if start > at:
            found.append((at, start - at))
        at = max(at, end)
    if length > at:
        found.append((at, length - at))
    return found


def _end(parts):
    return sum(part['length'] for part in parts)


def _clean(dirty, cluster):
    """Yield (begin, end) of what the guest has not written to.

    Whoever writes to a part of a cluster that the base image had so far has
    the rest of it copied there.
    """
    at = 0
    for part in dirty:
        if part['data']:
            continue
        begin = part['start'] // cluster * cluster
        if begin > at:
            yield at, begin
        at = -(-(part['start'] + part['length']) // cluster) * cluster
    if _end(dirty) > at:
        yield at, _end(dirty)


def _unchanged(mapping, clean):
    """Yield (begin, end) in the file of data that is clean.

    :param clean: list of (begin, end) in the guest's disk, in order
    """
    first = 0
    for part in mapping:
        if (not part['data'] or part['depth'] or 'offset' not in part or
                part.get('compressed')):
            continue
        begin, end = part['start'], part['start'] + part['length']
        while first < len(clean) and clean[first][1] <= begin:
            first += 1
        moved, number = part['offset'] - begin, first
        while number < len(clean) and clean[number][0] < end:
            yield (max(begin, clean[number][0]) + moved,
                   min(end, clean[number][1]) + moved)
            number += 1
