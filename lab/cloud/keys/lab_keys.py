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

"""The lab's key manager: secrets in files that all computes see.

Stands where a cloud has Barbican; the secret of a vTPM is kept here. Runs in
Nova's environment, hence beside the lab's own modules.
"""

import json
import os
import uuid

from castellan.common import exception
from castellan.common.objects import passphrase
from castellan.key_manager import key_manager

FOLDER = os.environ.get('LAB_KEYS', '/nonexistent')


class FileKeyManager(key_manager.KeyManager):
    """Passphrases alone."""

    def __init__(self, configuration):
        super().__init__(configuration)

    @staticmethod
    def _path(key_id):
        return os.path.join(FOLDER, str(uuid.UUID(key_id)))

    def store(self, context, managed_object, **_kwargs):
        os.makedirs(FOLDER, mode=0o700, exist_ok=True)
        key_id = str(uuid.uuid4())
        with open(os.open(self._path(key_id),
                          os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600),
                  'w') as f:
            json.dump([managed_object.name,
                       managed_object.get_encoded().hex()], f)
        return key_id

    def get(self, context, managed_object_id, **_kwargs):
        try:
            with open(self._path(managed_object_id)) as f:
                name, secret = json.load(f)
        except FileNotFoundError:
            raise exception.ManagedObjectNotFoundError(uuid=managed_object_id)
        return passphrase.Passphrase(bytes.fromhex(secret), name=name,
                                     id=managed_object_id)

    def delete(self, context, managed_object_id, **_kwargs):
        try:
            os.unlink(self._path(managed_object_id))
        except FileNotFoundError:
            raise exception.ManagedObjectNotFoundError(uuid=managed_object_id)

    def create_key(self, *args, **kwargs):
        raise NotImplementedError

    create_key_pair = copy = list = create_key

    def add_consumer(self, *args, **kwargs):
        raise NotImplementedError

    remove_consumer = add_consumer
