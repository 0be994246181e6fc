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

"""Nova's own user, for command lines that have compute services fetch images.

The context of an admin without a token is good for databases alone: where an
image has to be fetched for it, Glance refuses.
"""

from keystoneauth1 import exceptions as ks_exceptions
from oslo_log import log as logging

import nova.conf
from nova.conf import service_token
from nova import context as nova_context
from nova import service_auth

LOG = logging.getLogger(__name__)


def admin_context() -> 'nova_context.RequestContext':
    """An admin's context with a token of Nova's own user, if it has one.

    The token goes with what is asked of compute services. It is renewed before
    it expires, and so each request should have a context of its own.

    :returns: one without a token, after a warning, if there is none to be had
    """
    try:
        access = _access()
    except ks_exceptions.ClientException as e:
        return _without_token(e)
    if access is None:
        return _without_token('[service_user] is not configured')
    return nova_context.RequestContext(
        user_id=access.user_id, project_id=access.project_id,
        auth_token=access.auth_token, roles=access.role_names,
        service_catalog=_as_in_requests(access.service_catalog),
        is_admin=True, overwrite=False)


def _access():
    auth = service_auth.get_service_auth_plugin(
        service_token.SERVICE_USER_GROUP)
    return auth and auth.get_access(service_auth.get_service_auth_session(
        nova.conf.glance.glance_group.name))


def _without_token(reason):
    LOG.warning('Check [service_user] in nova.conf: without it hosts can not '
                'fetch images of servers that come to them: %s', reason)
    return nova_context.get_admin_context()


def _as_in_requests(catalog):
    """A catalog as keystonemiddleware gives it to an API."""
    return [{'type': kind, 'name': found[0].service_name,
             'endpoints': [{'region': endpoint.region_name,
                            endpoint.interface + 'URL': endpoint.catalog_url}
                           for endpoint in found]}
            for kind, found in catalog.get_endpoints_data().items()]
