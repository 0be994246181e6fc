# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

from typing import Any


class NbdError(Exception):
    code: int
    message: str


class Connection:
    def __init__(self, host: str, port: int, name: str, *,
                 username: str = ..., psk_file: str = ...,
                 timeout: float = ...) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def is_open(self) -> bool: ...
    def flush(self, timeout: float = ...) -> None: ...
    def close(self, timeout: float = ...) -> None: ...


class Export:
    def __init__(self, connection: Connection, *,
                 blank: bool = ...) -> None: ...
    _o: Any
