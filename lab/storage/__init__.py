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

"""A virtual machine with volume groups and NFS exports, as a libvirt host.

Device mapper and nfsd are the kernel's, and the machine around the lab may
have neither. The virtual machine has Debian's cloud kernel, and for its root
what ctl sees, so that no image is built.
"""

from .vm import EXPORTS
from .vm import prepare
from .vm import StorageVM
from .vm import VOLUME_GROUP

__all__ = ['EXPORTS', 'StorageVM', 'VOLUME_GROUP', 'prepare']
