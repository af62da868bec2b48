"""saeforge's own format, `sae.safetensors` and `sae.json`."""

from __future__ import annotations

from pathlib import Path

from saeforge import sae as native
from saeforge.formats.base import Format
from saeforge.sae import META_FILE, SAE, WEIGHTS_FILE


class Native(Format):
    """saeforge's own format: any SAE, with all that is known of its origin."""

    title = "saeforge"
    files = (META_FILE, WEIGHTS_FILE)
    writes = True

    def recognises(self, path: Path) -> bool:
        """By `sae.json`, in the folder or in `sae/`."""
        return (path / META_FILE).is_file() or (path / "sae" / META_FILE).is_file()

    def read(self, path: Path) -> SAE:
        """See `saeforge.sae.load`."""
        return native.load(path)

    def write(self, sae: SAE, folder: Path) -> None:
        """See `SAE.save`."""
        sae.save(folder)
