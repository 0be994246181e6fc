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

"""The table and build/bench.json."""

import dataclasses
import json
import pathlib

import rich.console
import rich.table

from .. import config


def write(rows, path: pathlib.Path = config.ROOT / 'build/bench.json'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(row) for row in rows],
                               indent=1) + '\n')


def show(rows, console: rich.console.Console) -> None:
    table = rich.table.Table(box=None, pad_edge=False)
    for title in ('', 'case', 'metric', 'ours', 'other', "other's", 'ratio',
                  'target'):
        table.add_column(title, justify='right' if title in (
            'ours', "other's", 'ratio', 'target') else 'left')
    for row in rows:
        mark = {None: '', True: '[green]✓[/]', False: '[red]✗[/]'}
        table.add_row(
            mark[row.reached], row.case, row.metric, '%.3g' % row.ours,
            row.other, '%.3g' % row.other_value, '%.2f' % row.ratio,
            '' if row.target is None else '%s %g' % (
                '<=' if row.most else '>=', row.target))
    console.print(table)
