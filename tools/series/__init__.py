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

"""A series of commits on somebody else's source, kept as our lines alone.

The repository holds one patch a commit for the hunks in files that the base
owns, and the files that the series adds at their own paths. The tree is a git
repository with the base as one commit and the series on top of it. This
package turns either into the other.
"""


class SeriesError(Exception):
    """What is wrong, where, and how to mend it; shown without a traceback."""
