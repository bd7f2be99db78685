"""Write README's "What came out" anew, from the figures and the scorecard of a profile's last run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from erlib import paths
from erlib.report import conclusions


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/publish.py", description=__doc__)
    parser.add_argument("profile", nargs="?", default="laptop", help="whose figures are the reference (laptop)")
    folder = paths.FIGURES / parser.parse_args().profile
    readme = paths.ROOT / "README.md"
    section = conclusions.what_came_out(folder, str(folder.relative_to(paths.ROOT)))
    readme.write_text(conclusions.replaced(readme.read_text(encoding="utf-8"), section), encoding="utf-8")
    print(f"README.md: {section.count(chr(10))} lines of what came out, from {folder}")


if __name__ == "__main__":
    main()
