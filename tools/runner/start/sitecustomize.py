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

"""What an interpreter does first in which Nova's tests run.

It makes them faster and changes nothing that they see. Each test reads the
same policy file twice, 0.2 s in PyYAML's parser, and half of what a small test
takes; and the collector of garbage looks at all the modules again and again, a
sixth of the CPU seconds of the driver's tests.
"""

import copy
import functools
import gc
import os
import sys

gc.set_threshold(50_000, 50, 1000)


def _remember(load):
    """Make a function that parses a text once, and returns a copy of that."""
    known = functools.lru_cache(maxsize=16)(load)

    @functools.wraps(load)
    def safe_load(stream):
        return copy.deepcopy(known(stream)) if isinstance(
            stream, str) else load(stream)

    return safe_load


try:
    import yaml
except ImportError:  # an interpreter that a test starts, of the system's
    pass
else:
    yaml.safe_load = _remember(yaml.safe_load)

# By make sanitize: what it preloads is for the pump alone, which runs in this
# process and in those of its workers.
if 'SANITIZED_PYTHON' in os.environ:
    sys.executable = os.environ['SANITIZED_PYTHON']
    os.environ.pop('LD_PRELOAD', None)
