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
"""The memory of a guest in Glance, and in a cache of this host.

A memory is loaded by QEMU, which takes it for its own: who could write one
would get a try at the QEMU of every host, and who could read one has the
secrets of its server. So its image belongs to the service user of Nova, and
never to a user. The image of the disk is the user's, as that of any snapshot.
What binds the two together is written to the image of the memory, where no
user can change it.
"""

import os
import time
import typing as ty
import uuid

from oslo_concurrency import lockutils
from oslo_log import log as logging
from oslo_utils import fileutils
from oslo_utils import timeutils
from oslo_utils import uuidutils

import nova.conf
from nova.conf import service_token
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import service_auth
from nova.virt.libvirt.storage.live_image import memory_file

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

#: Of the disk's image: names that of the memory.
MEMORY_ID = 'img_live_memory_id'
_DISK_ID = 'nova_live_disk_id'
_DISK_HASH = 'nova_live_disk_hash'
_PROJECT = 'nova_live_project_id'

# What the name of a memory ends with, and how long Glance lets one be.
_SUFFIX = ' (memory)'
_LONGEST_NAME = 255

# What the name of a file that is being fetched ends with.
_PART = '.part'


def service_context() -> nova_context.RequestContext:
    """A context in which Nova is itself, without any user.

    :raises: memory_file.Unusable if Nova has no user of its own
    """
    auth = service_auth.get_service_auth_plugin(
        service_token.SERVICE_USER_GROUP)
    if auth is None:
        raise memory_file.Unusable(_(
            'the memory has to belong to Nova; configure [service_user]'))
    # Who has no token is asked whether it may see an image, unless it is an
    # admin. Glance itself asks the user behind the plugin.
    return nova_context.RequestContext(
        user_auth_plugin=auth, is_admin=True, overwrite=False)


def _own_project():
    auth = service_auth.get_service_auth_plugin(
        service_token.SERVICE_USER_GROUP)
    return auth.get_project_id(service_auth.get_service_auth_session(
        nova.conf.glance.glance_group.name))


def _own_roles():
    auth = service_auth.get_service_auth_plugin(
        service_token.SERVICE_USER_GROUP)
    return auth.get_access(service_auth.get_service_auth_session(
        nova.conf.glance.glance_group.name)).role_names


class Forgotten(ty.NamedTuple):
    """A memory that nothing can go on from.

    :ivar memory: id of its image
    :ivar disk: id of the image of its disk
    :ivar reason: why nothing can
    """
    memory: str
    disk: str
    reason: str


class Store:
    """The memories that Glance keeps for Nova.

    :param image_api: Nova's image API
    :param cache: directory of the memories that this host has fetched
    """

    def __init__(self, image_api, cache: str):
        self._image_api = image_api
        self._cache = cache

    @staticmethod
    def check_user() -> None:
        """Find out whether a memory could belong to Nova.

        :raises: memory_file.Unusable if it couldn't
        """
        service_context()

    def publish(self, context, image_id: str, metadata: dict,
                saved) -> None:
        """Give a saved guest to Glance: its disk as an image of the user's.

        That image can be booted from when its disk is there, and knows its
        memory last.

        :param context: the user's
        :param image_id: of the user's image, which is queued
        :param metadata: of that image
        :param saved: a capture.Saved
        :raises: memory_file.Unusable, what the image API raises, OSError; the
            user's image is its caller's to delete
        """
        with open(saved.disk, 'rb') as disk:
            self._image_api.update(context, image_id, metadata, disk)
        with memory_file.Reader(saved.description, saved.memory) as reader:
            memory_id = self.upload(
                self._image_api.get(context, image_id),
                metadata['name'],
                metadata['properties']['owner_id'], reader)
        try:
            self._image_api.update(
                context, image_id, {'properties': {MEMORY_ID: memory_id}},
                purge_props=False)
        except BaseException:
            self.delete(memory_id)
            raise

    def upload(self, disk: dict, name: str, project_id: str,
               reader: memory_file.Reader) -> str:
        """Give a memory to Glance.

        :param disk: the image of the disk, as Glance has it when it is whole
        :param name: of the image of the disk
        :param project_id: whose server it is
        :param reader: of the memory
        :returns: id of the new image
        :raises: memory_file.Unusable; what the image API raises, and the
            image is gone again
        """
        context = service_context()
        image = self._image_api.create(context, {
            'name': name[:_LONGEST_NAME - len(_SUFFIX)] + _SUFFIX,
            'visibility': 'private', 'disk_format': 'raw',
            'container_format': 'bare', 'properties': {
                _DISK_ID: disk['id'], _PROJECT: project_id,
                _DISK_HASH: _hash_of(disk)}})
        try:
            self._image_api.update(context, image['id'], {}, data=reader,
                                   purge_props=False)
        except BaseException:
            self.delete(image['id'])
            raise
        return image['id']

    def delete(self, memory_id: str) -> bool:
        """Delete a memory.

        :returns: False if there was an error, which is logged
        """
        try:
            self._image_api.delete(service_context(), memory_id)
        except exception.ImageNotFound:
            pass
        except Exception:
            LOG.exception('Image %s with the memory of a server is left over',
                          memory_id)
            return False
        return True

    def check(self, disk: dict, memory_id: str, project_id: str) -> None:
        """Check that a memory may be given to a server.

        :param disk: the image of the server's disk, as Glance has it now
        :param memory_id: what that names as its memory
        :param project_id: whose server it is
        :raises: memory_file.Unfit; memory_file.Unusable if Nova has no user of
            its own on this host
        """
        context = service_context()
        _check_id(memory_id)
        try:
            memory = self._image_api.get(context, memory_id)
        except (exception.ImageNotFound, exception.ImageNotAuthorized):
            raise memory_file.Unfit(
                _('image %s with its memory is gone') % memory_id)
        if memory.get('owner') != _own_project():
            raise memory_file.Unfit(
                _('image %s belongs to a user') % memory_id)
        if memory.get('status') != 'active':
            raise memory_file.Unfit(_('image %(image)s is %(status)s') % {
                'image': memory_id, 'status': memory.get('status')})
        properties = memory['properties']
        if properties.get(_DISK_ID) != disk['id'] or (
                properties.get(_DISK_HASH, '') != _hash_of(disk)):
            raise memory_file.Unfit(
                _('image %(image)s belongs to another disk than that of '
                  'image %(disk)s') % {'image': memory_id,
                                       'disk': disk['id']})
        if not project_id or properties.get(_PROJECT) != project_id:
            raise memory_file.Unfit(
                _('its memory belongs to another project'))

    def forgotten(self, age: int) -> list[Forgotten]:
        """Find the memories that no image of a disk names.

        A user deletes the image of a disk, and can't delete that of its
        memory; nor can a compute service that is killed between the two.

        :param age: seconds since the last change of a memory, which may be on
            its way to Glance, and be named when it is there
        :raises: memory_file.Unusable if Nova has no user of its own, or one
            that doesn't see the disks; what the image API raises
        """
        context = service_context()
        if 'admin' not in _own_roles():
            # An image that Glance doesn't show is taken for one that is gone.
            raise memory_file.Unusable(_(
                'give the user of [service_user] the role admin in its '
                'project: without it the images of users can not be told '
                'from images that are gone'))
        project, found = _own_project(), []
        for memory in self._image_api.get_all(
                context, filters={'owner': project}):
            disk_id = memory['properties'].get(_DISK_ID)
            if disk_id and memory['owner'] == project and (
                    timeutils.is_older_than(memory['updated_at'], age)):
                reason = self._why_forgotten(context, memory['id'], disk_id)
                if reason:
                    found.append(Forgotten(memory['id'], disk_id, reason))
        return found

    def _why_forgotten(self, context, memory_id, disk_id):
        try:
            disk = self._image_api.get(context, disk_id)
        except exception.ImageNotFound:
            return _('the image of its disk is gone')
        if disk['properties'].get(MEMORY_ID) != memory_id:
            return _('the image of its disk does not name it')
        return None

    def fetch(self, memory_id: str) -> str:
        """Have a memory in the cache of this host.

        :returns: path of the file, which nobody but Nova reads
        :raises: memory_file.Unfit; memory_file.Unusable if there is no room
            for it; what the image API raises
        """
        _check_id(memory_id)
        path = os.path.join(self._cache, memory_id)
        with _locked(memory_id):
            if not os.path.exists(path):
                self._download(memory_id, path)
            # It has been of use now.
            os.utime(path)
        return path

    def _download(self, memory_id, path):
        fileutils.ensure_tree(self._cache, mode=0o700)
        memory_file.check_room(self._cache, self._image_api.get(
            service_context(), memory_id)['size'])
        part = path + _PART
        try:
            # Glance's client compares the checksum.
            self._image_api.download(
                service_context(), memory_id, dest_path=part)
            os.rename(part, path)
        finally:
            fileutils.delete_if_exists(part)

    def sweep(self) -> None:
        """Delete from the cache what has been of no use for a while."""
        limit = (time.time() -
                 CONF.image_cache.remove_unused_original_minimum_age_seconds)
        try:
            names = os.listdir(self._cache)
        except FileNotFoundError:
            return
        for name in names:
            path = os.path.join(self._cache, name)
            if not _is_older(path, limit):
                continue
            with _locked(name.removesuffix(_PART)):
                # It may have been of use since.
                if _is_older(path, limit):
                    LOG.info('Removing memory %s, which was of no use for a '
                             'while', path)
                    fileutils.delete_if_exists(path)


def _locked(memory_id):
    """Keep others from a memory in the cache, which hosts may share.

    As base images are locked.
    """
    return lockutils.lock(
        memory_id, lock_file_prefix='nova-', external=True,
        lock_path=os.path.join(CONF.instances_path, 'locks'))


def _is_older(path, limit):
    try:
        return os.stat(path).st_mtime < limit
    except FileNotFoundError:
        # Its download has ended, or another host was faster.
        return False


def _check_id(memory_id):
    # A user has written it. The image API takes what has a slash for the URL
    # of another service, and would go there with the token of Nova's user.
    # Written otherwise than Glance does, one memory would be many files here.
    if not uuidutils.is_uuid_like(memory_id) or (
            str(uuid.UUID(memory_id)) != memory_id):
        raise memory_file.Unfit(
            _('%.80r is no ID of an image') % memory_id)


def _hash_of(disk):
    return disk['properties'].get('os_hash_value') or disk.get(
        'checksum') or ''
