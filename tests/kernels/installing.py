"""Puts a package of one module where Python finds it, as an installer would, without one."""

from __future__ import annotations

from pathlib import Path

__all__ = ["EXAMPLE", "install"]

EXAMPLE = Path(__file__).parent / "example_package"


def install(site: Path, name: str, module: str, entry: str, version: str = "1.0") -> None:
    """Writes the module of package ``name`` and its metadata, with ``entry`` as its kernels' entry point."""
    imported = name.replace("-", "_")
    (site / f"{imported}.py").write_text(module)
    info = site / f"{imported}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[attnfuse.kernels]\nexample = {entry}\n")
