# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Add driver_info to BlockDeviceMapping

Revision ID: 7c1f4b5a9d20
Revises: ab450ba04102
Create Date: 2026-11-21 07:16:00
"""

from alembic import op
import sqlalchemy as sa

# revision identifiers, used by Alembic.
revision = '7c1f4b5a9d20'
down_revision = 'ab450ba04102'
branch_labels = None
depends_on = None


def upgrade():
    # Archiving copies rows by the main table's columns, so that the shadow
    # table needs the column as well.
    for prefix in ('', 'shadow_'):
        table_name = prefix + 'block_device_mapping'
        with op.batch_alter_table(table_name, schema=None) as batch_op:
            batch_op.add_column(
                sa.Column('driver_info', sa.Text(), nullable=True))
