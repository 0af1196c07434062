"""A bucket in memory: what ``gs://`` paths read and write when it is installed."""

import sys
from typing import Any, cast

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class FakeBucket(MemoryFileSystem):
    """fsspec's file system in memory under the scheme of Google Cloud Storage."""

    protocol = ("gs", "gcs")
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the parent, but not the same
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        for scheme in cls.protocol:
            path = path.removeprefix(f"{scheme}://")
        return "/" + path.strip("/") if path.strip("/") else ""

    def rename(self, path1: str, path2: str, **_: Any) -> None:
        """Copy, then delete, as a bucket does."""
        self.copy(path1, path2)
        self.rm(path1)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``gs://`` mean an empty bucket in memory."""
    monkeypatch.setattr(FakeBucket, "store", {})
    monkeypatch.setattr(FakeBucket, "pseudo_dirs", [""])
    cached: Any = type(backend.fsspec_backend)._get_filesystem
    cached.cache_clear()
    for scheme in FakeBucket.protocol:
        monkeypatch.setitem(registered(), scheme, FakeBucket)


def registered() -> dict[str, Any]:
    """File systems that fsspec has loaded, by scheme."""
    return cast(Any, sys.modules["fsspec.registry"])._registry  # fsspec.registry itself is a read-only view of it
