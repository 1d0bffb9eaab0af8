"""Settings of the process that are replaced for a while, by several threads at once."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any


class HeldSetting:
    """A setting that has a value of ours from the first that enters to the last that leaves.

    What anyone else sets meanwhile stays: the value from before is put back only in place of ours.

    Args:
        read, write: the setting.
        value: ours.
    """

    def __init__(self, read: Callable[[], object], write: Callable[[Any], object], value: object) -> None:
        self.read, self.write, self.value = read, write, value
        self.lock, self.users, self.before = Lock(), 0, None

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.before = self.read()
                self.write(self.value)
            self.users += 1

    def __exit__(self, *_exception: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users and self.read() == self.value:
                self.write(self.before)
