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

"""Fill a new cloud by its public API: users, endpoints, images, flavors."""

import keystoneauth1.identity.v3
import keystoneauth1.session
import openstack
import requests

from . import config
from . import netns

MICROVERSION = '2.96'
# id, name, RAM (MiB), root (GiB), ephemeral (GiB), swap (MiB)
FLAVORS = (
    ('1', 'lab.small', 128, 1, 0, 0),
    ('2', 'lab.medium', 160, 2, 0, 0),
    ('3', 'lab.large', 192, 3, 0, 0),
    ('11', 'lab.small.disks', 128, 1, 1, 64),
    ('12', 'lab.medium.disks', 160, 2, 1, 64),
    ('13', 'lab.large.disks', 192, 3, 2, 128),
    ('20', 'lab.zero', 128, 0, 0, 0))
IMAGES = (('guest', 'qcow2', 'guest.qcow2'), ('guest-raw', 'raw', 'guest.raw'))


def connect(layout, keys, namespace,
            project='admin') -> openstack.connection.Connection:
    """The admin's connection, usable from any namespace and many threads.

    :param project: in which the admin is
    """
    http = requests.Session()
    http.mount('http://', netns.Adapter(namespace, pool_maxsize=20))
    session = keystoneauth1.session.Session(
        auth=keystoneauth1.identity.v3.Password(
            auth_url=layout.url('keystone', '/v3'), username='admin',
            password=keys.admin, project_name=project,
            user_domain_name='Default', project_domain_name='Default'),
        session=http)
    return openstack.connection.Connection(
        session=session, region_name=config.REGION, identity_api_version='3',
        compute_default_microversion=MICROVERSION)


def environment(layout, keys) -> dict:
    """What the command line clients read."""
    return {
        'OS_AUTH_URL': layout.url('keystone', '/v3'),
        'OS_USERNAME': 'admin', 'OS_PASSWORD': keys.admin,
        'OS_PROJECT_NAME': 'admin', 'OS_USER_DOMAIN_NAME': 'Default',
        'OS_PROJECT_DOMAIN_NAME': 'Default',
        'OS_REGION_NAME': config.REGION, 'OS_IDENTITY_API_VERSION': '3',
        'OS_COMPUTE_API_VERSION': MICROVERSION}


def identity(conn, layout, keys) -> None:
    """Users with the roles admin and service, services and endpoints."""
    ident = conn.identity
    project = ident.create_project(name='service', domain_id='default')
    roles = {role.name: role for role in ident.roles()}
    if 'service' not in roles:
        roles['service'] = ident.create_role(name='service')
    for user, kind, url in (
            ('nova', 'compute', layout.url('nova-api', '/v2.1')),
            ('placement', 'placement', layout.url('placement')),
            ('glance', 'image', layout.url('glance')),
            ('neutron', 'network', layout.url('network'))):
        made = ident.create_user(
            name=user, password=keys.service, domain_id='default')
        for role in ('admin', 'service'):
            ident.assign_project_role_to_user(project, made, roles[role])
        service = ident.create_service(name=user, type=kind)
        for interface in ('public', 'internal'):
            ident.create_endpoint(
                service_id=service.id, interface=interface,
                region_id=config.REGION, url=url)


def images(conn, folder) -> None:
    """The test guest in raw and qcow2, and small for a rescue."""
    for name, kind, file in IMAGES:
        conn.image.create_image(
            name=name, disk_format=kind, container_format='bare',
            visibility='public', filename=str(folder / file),
            disable_vendor_agent=True, wait=True, timeout=60)


def flavors(conn) -> None:
    for number, name, ram, root, ephemeral, swap in FLAVORS:
        conn.compute.create_flavor(
            id=number, name=name, ram=ram, vcpus=1, disk=root,
            ephemeral=ephemeral, swap=swap)
    # A limit would stop a long run of scenarios.
    conn.set_compute_quotas(
        'admin', instances=-1, cores=-1, ram=-1)
