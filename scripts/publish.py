"""Publish a profile's last run as the reference: its records beside its figures, and what came out in README."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a Python without erlib finds it there, and is told more

from erlib import config, paths
from erlib.claims import publication, verdicts
from erlib.load import published
from erlib.provenance import MissingRecords
from erlib.report import conclusions, diagrams


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/publish.py", description=__doc__)
    parser.add_argument("profile", nargs="?", default="laptop", help="default: laptop")
    parser.add_argument("--text", action="store_true", help="README only, from the figures as they are")
    args = parser.parse_args()
    try:
        profile = config.load_profile(args.profile)
        if not args.text:
            _publish_records(profile)
        _write_readme(profile)
    except (config.ConfigError, MissingRecords, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _publish_records(profile: config.Profile) -> None:
    tables = publication.tables(verdicts.read_sources(profile), profile)
    tables[published.CLUSTER_MAP] = published.of_frame(diagrams.read_cluster_map(profile))
    tables[published.INPUT_LENGTHS] = published.of_frame(published.input_lengths(profile))
    folder = published.write(profile, tables)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {len(tables)} tables, {size / 1e6:.1f} MB")


def _write_readme(profile: config.Profile) -> None:
    folder, readme = paths.REFERENCE / profile.name, paths.ROOT / "README.md"
    section = conclusions.what_came_out(folder, str(folder.relative_to(paths.ROOT)))
    readme.write_text(conclusions.replaced(readme.read_text(encoding="utf-8"), section), encoding="utf-8")
    print(f"{readme}: what came out, from {folder}")


if __name__ == "__main__":
    sys.exit(main())
