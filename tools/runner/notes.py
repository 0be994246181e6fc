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

"""Whether release notes are in reno's form.

``reno lint`` reads the whole history, which a tree made of a source
distribution hasn't got: it ends at two notes of Nova's own with one UID.
"""

import re
import sys

import yaml
from reno import config


def faults(path: str) -> list[str]:
    """What reno or Sphinx would stumble over in a note."""
    found = []
    if not re.search(r'-[0-9a-f]{16}\.yaml$', path):
        found.append('its name does not end in 16 hexadecimal digits and '
                     '.yaml: reno new SLUG')
    with open(path) as f:
        try:
            note = yaml.safe_load(f)
        except yaml.YAMLError as error:
            return [*found, str(error)]
    if not isinstance(note, dict) or not note:
        return [*found, 'it has no sections']
    options = config.Config('.')
    known = {section[0] for section in options.sections}
    for section, entries in note.items():
        if section == options.prelude_section_name:
            if not isinstance(entries, str):
                found.append('%s is no text' % section)
        elif section not in known:
            found.append('reno knows no section %s' % section)
        elif not isinstance(entries, list) or not all(
                isinstance(entry, str) for entry in entries):
            found.append('section %s is no list of texts (a colon in an '
                         'entry? begin it with "- |")' % section)
    return found


def main() -> int:
    bad = 0
    for path in sys.argv[1:]:
        for fault in faults(path):
            print('%s: %s' % (path, fault))
            bad = 1
    return bad


if __name__ == '__main__':
    sys.exit(main())
