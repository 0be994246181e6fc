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

"""The network service of a cloud without networks (a WSGI application).

Nova asks its network service for a server's ports and security groups
whenever a server is shown, moved or deleted, also when it was created with
"networks: none". This one says truly that there are none, and refuses to make
any. With ``--network ovs`` a real Neutron stands in its place.
"""

import json

COLLECTIONS = ('ports', 'networks', 'subnets', 'security-groups',
               'security-group-rules', 'floatingips', 'extensions',
               'subnetpools', 'agents', 'segments')


def application(environ, start_response):
    path = environ.get('PATH_INFO', '').strip('/')
    words = path.removesuffix('.json').split('/')
    status, body = '200 OK', None
    if words[-1] in ('', 'v2.0'):
        url = 'http://%s/v2.0/' % environ.get('HTTP_HOST', '')
        body = {'versions': [{
            'id': 'v2.0', 'status': 'CURRENT',
            'links': [{'rel': 'self', 'href': url}]}]}
    elif environ['REQUEST_METHOD'] == 'GET' and len(words) == 2 and (
            words[1] in COLLECTIONS):
        body = {words[1].replace('-', '_'): []}
    else:
        status = '404 Not Found'
        body = {'NeutronError': {
            'type': 'NotFound', 'detail': '',
            'message': 'this cloud has no networks: no %s' % path}}
    text = json.dumps(body).encode()
    start_response(status, [('Content-Type', 'application/json'),
                            ('Content-Length', str(len(text)))])
    return [text]
