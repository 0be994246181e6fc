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
"""Look into Nova's database, and damage it."""

import json

from . import services


def query(cloud, sql: str, name: str = 'nova') -> list[list[str | None]]:
    """Run a statement as the database's administrator.

    :param cloud: the Cloud
    :param name: of the database
    :returns: rows of text; NULL is None
    """
    done = cloud.control.run(
        ['mariadb', '--no-defaults', '-uroot', '-S', services.SOCKET, '-N',
         '-B', '--raw', name],
        input=sql, env={'MYSQL_PWD': cloud.keys.database})
    return [[None if value == 'NULL' else value for value in line.split('\t')]
            for line in done.stdout.splitlines()]


def mappings(cloud, server_id: str) -> dict[str, str | None]:
    """The driver_info of a server's block device mappings, by device.

    Of one that no host has built, none has a device.
    """
    return {device.removeprefix('/dev/'): info for device, info in query(
        cloud, "SELECT device_name, driver_info FROM block_device_mapping "
        "WHERE deleted = 0 AND device_name IS NOT NULL AND "
        "instance_uuid = '%s'" % server_id)}


def records(cloud, server_id: str) -> dict[str, dict]:
    """What is on record of a server's local disks, by device.

    A disk without a mapping is there by its name, for example disk.config.
    """
    found = {}
    for device, info in mappings(cloud, server_id).items():
        if info:
            found[device] = json.loads(info)['nova_object.data']
            for name, record in (found[device].pop('unmapped') or {}).items():
                found[name] = record['nova_object.data']
    return found


def system_metadata(cloud, server_id: str) -> dict[str, str]:
    """What an instance's system_metadata holds."""
    return dict(query(
        cloud, "SELECT `key`, value FROM instance_system_metadata WHERE "
        "deleted = 0 AND instance_uuid = '%s'" % server_id))


def set_driver_info(cloud, server_id: str, device: str, text: str | None):
    """Overwrite a record."""
    value = 'NULL' if text is None else "x'%s'" % text.encode().hex()
    query(cloud, "UPDATE block_device_mapping SET driver_info = %s WHERE "
          "deleted = 0 AND instance_uuid = '%s' AND device_name = '/dev/%s'"
          % (value, server_id, device))
