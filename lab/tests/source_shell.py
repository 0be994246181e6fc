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
"""Who has a compute service's keys: asks other compute services for anything.

Run by Nova's Python as its user on a host, with nova-compute's arguments. A
line of JSON on stdin has ``instance``, ``migration`` and ``request``; the line
on stdout that answers it has ``answer``, or ``error`` and ``message``.
"""

import json
import sys

from nova.compute import rpcapi
from nova.conductor import rpcapi as conductor
import nova.conf
from nova import config
from nova import context as nova_context
from nova import objects
from nova.objects import base

CONF = nova.conf.CONF


def main():
    config.parse_args(['nova-compute', *sys.argv[1:]])
    objects.register_all()
    # As nova-compute: it has no database.
    base.NovaObject.indirection_api = conductor.ConductorAPI()
    context = nova_context.get_admin_context()
    compute = rpcapi.ComputeAPI()
    print(json.dumps({'answer': CONF.host}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        instance = objects.Instance.get_by_uuid(context, wanted['instance'])
        migration = objects.Migration.get_by_id(context, wanted['migration'])
        # Whoever it was made for
        migration.dest_compute = wanted['to']
        try:
            said = {'answer': compute.take_in_disks(
                context, instance, migration, wanted['request'])}
        except Exception as e:
            said = {'error': type(e).__name__, 'message': str(e)}
        print(json.dumps(said), flush=True)


if __name__ == '__main__':
    main()
