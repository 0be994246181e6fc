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

from collections.abc import Iterable
from typing import Any

DEF_SLOT_SIZE: int
DEF_SLOTS: int


class PumpError(Exception):
    side: str
    operation: str
    reason: str
    code: int
    domain: int
    message: str
    transferred: int


class File:
    def __init__(self, fd: int, length: int, *,
                 sync: bool = ..., direct: bool = ...) -> None: ...


class Update:
    def __init__(self, connection: Any, volume: Any) -> None: ...


class Table:
    def __init__(self, length: int, key: int, *,
                 block_size: int = ...) -> None: ...
    @property
    def block_size(self) -> int: ...
    def grow(self, length: int) -> None: ...
    @property
    def filled(self) -> bool: ...
    @property
    def values(self) -> list[int]: ...
    def dump(self) -> bytes: ...
    def load(self, values: bytes) -> None: ...
    @property
    def changed(self) -> list[tuple[int, int]]: ...


class Copy:
    def __init__(self, source: Any, destination: Any, length: int, *,
                 sparse: bool = ..., bandwidth: int = ..., key: int = ...,
                 find_holes: bool = ...,
                 table: Table | None = ..., only_changes: bool = ...,
                 blocks: Iterable[tuple[int, int]] | None = ...,
                 bridge: int = ...,
                 slot_size: int = ..., slots: int = ...) -> None: ...
    def run(self) -> None: ...
    def cancel(self) -> None: ...
    @property
    def bandwidth(self) -> int: ...
    @bandwidth.setter
    def bandwidth(self, bandwidth: int) -> None: ...
    @property
    def transferred(self) -> int: ...
    @property
    def data(self) -> int: ...
    @property
    def holes(self) -> int: ...
    @property
    def unchanged(self) -> int: ...
    @property
    def checksum(self) -> int: ...


def checksum(parts: Iterable[bytes | int], key: int) -> int: ...
