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
"""Some minutes of `lab/soak` with whole servers; see test_soak."""

import unittest

from lab.endurance import cloud
from lab.endurance import plan
from lab.endurance import report
from lab.tests import cloud_case
from lab.tests import test_soak


class TestSoak(cloud_case.CloudTestCase):
    lab = cloud_case.SERIES
    images_type = 'libvirt-storage'

    def test_soak(self):
        result = cloud.run(self.cloud, test_soak.SEED, plan.Limit(
            None, test_soak.MINUTES), 3, print)
        self.assertEqual('', result.complaint, '\n'.join(
            report.lines(result)))
        self.assertGreater(result.faults, 0)


load_tests = cloud_case.only_in_full


if __name__ == '__main__':
    unittest.main()
