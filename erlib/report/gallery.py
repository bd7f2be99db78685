"""One self-contained page per profile: every figure, every claim, every number behind them.

``figures/<profile>/index.html`` embeds all it shows, asks the network for nothing, and can be mailed or served. It is
made of what :func:`erlib.report.canvas.save` has left beside each figure, whatever source that came from.
"""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from erlib import config, paths, provenance
from erlib.claims import scorecards, verdicts
from erlib.machine import processes

SOURCES = ("measured", "emulated", "simulated-hardware", "simulated-harness")
"""In this order, the first two and the last two of one scale each; others follow by name."""
PAPERS = {
    "paper1": "Paper 1: Orchestrating Efficient Language Model Inference",
    "paper2": "Paper 2: Performance Characterization",
    "workbench": "Workbench: what the papers only mention",
}
TEMPLATE = Path(__file__).with_name("gallery.html.j2")
_COLOURS = 128
_WORKERS = 2


@dataclass(frozen=True)
class Picture:
    """One figure as one source drew it; binary parts in base64."""

    source: str
    paper: str
    slug: str
    about: dict[str, Any]
    png: str
    svg_gz: str
    csv: str
    json: str

    @property
    def side(self) -> str:
        """Where it stands beside the other source of its scale, if both have drawn it."""
        return ("left", "right")[SOURCES.index(self.source) % 2] if self.source in SOURCES else ""

    @property
    def anchor(self) -> str:
        return f"{self.paper}-{self.slug}"

    @property
    def name(self) -> str:
        """Of a file that is downloaded."""
        return f"{self.paper}-{self.slug}-{self.source}"

    @property
    def title(self) -> str:
        """The beginning of the caption, up to the first sign that ends a thought."""
        return re.split(r"[:.;]\s|,\s|\s\(", self.about["caption"], maxsplit=1)[0].rstrip(".")

    @property
    def timed(self) -> bool:
        """Whether records went in; what has none (a diagram, a table) is the same whatever the source."""
        return bool(self.about["records"]["points"])

    @property
    def provenance(self) -> list[tuple[str, str]]:
        """What a reader asks first; the json holds the rest."""
        about, requests = self.about, self.about.get("requests", {})
        made = about.get("measured_with", {})
        rows = {
            "Source": about["footer"],
            "Machine": about["host"] if self.timed else "",
            "Made again by": about["command"] or "",
            "Records": f"{about['records']['points']} points" if self.timed else "",
            "Requests": f"{requests['answered']} answered, {requests['failed']} failed" if requests else "",
            "Records from commit": ", ".join(made.get("git_commits", [])),
            "Measured": " to ".join(made.get("started", [])),
            "Drawn": ", ".join(about.get("drawn", {}).values()),
            "Drawn at commit": about["git_commit"],
            "Made of": "; ".join(f"{what} {which}" for what, which in about.get("made_of", {}).items()),
            "Versions": "; ".join(
                ", ".join(f"{name} {number}" for name, number in versions.items())
                for versions in [*made.get("versions", []), about["versions"]]
            ),
            "Points": ", ".join(about["records"]["point_hashes"]),
        }
        return [(name, text) for name, text in rows.items() if text]


def pictures(profile: str) -> list[Picture]:
    """All figures of a profile, by paper, figure and source.

    Raises
    ------
    FileNotFoundError
        If there is none, or one lacks its csv, png or svg.
    """
    root = paths.FIGURES / profile
    drawn = [path for path in root.glob("*/*/*.json") if path.parent.name in PAPERS]
    if not drawn:
        raise FileNotFoundError(f"no figures in {root}: run 08_figures_paper1 and 09_figures_paper2 first")
    with processes.pool(_WORKERS) as pool:
        found = list(pool.map(_picture, drawn))
    return sorted(found, key=lambda p: (list(PAPERS).index(p.paper), p.slug, source_order(p.source)))


def source_order(source: str) -> tuple[int, str]:
    """Sort key of a source."""
    return (SOURCES.index(source) if source in SOURCES else len(SOURCES), source)


def _picture(about: Path) -> Picture:
    return Picture(
        source=about.parent.parent.name,
        paper=about.parent.name,
        slug=about.stem,
        about=json.loads(about.read_text(encoding="utf-8")),
        png=_base64(_small_png(about.with_suffix(".png"))),
        svg_gz=_base64(gzip.compress(about.with_suffix(".svg").read_bytes(), mtime=0)),
        csv=_base64(about.with_suffix(".csv").read_bytes()),
        json=_base64(about.read_bytes()),
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _small_png(path: Path) -> bytes:
    """The picture with a palette: a third of the bytes, no difference that the eye sees."""
    with Image.open(path) as image:
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    small = io.BytesIO()
    opaque.quantize(_COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def write_gallery(profile: config.Profile, scorecard: pd.DataFrame) -> Path:
    """Write ``figures/<profile>/index.html``, the figures alone as ``README.md``, the claims as ``scorecard.html``.

    Parameters
    ----------
    profile : Profile
    scorecard : DataFrame
        What :func:`erlib.claims.verdicts.evaluate` returned.

    Returns
    -------
    Path
        The page with everything.

    Raises
    ------
    FileNotFoundError
        If the profile has no figures.
    """
    directory = paths.FIGURES / profile.name
    shown = pictures(profile.name)
    (directory / "scorecard.html").write_text(_render(profile, scorecard, []), encoding="utf-8")
    index = directory / "index.html"
    index.write_text(_render(profile, scorecard, shown), encoding="utf-8")
    (directory / "README.md").write_text(_as_markdown(profile, shown), encoding="utf-8")
    return index


def _as_markdown(profile: config.Profile, shown: list[Picture]) -> str:
    """The pictures with their captions, for hosts that show a folder's README."""
    lines = [
        f"# Figures of profile {profile.name}",
        f"Made by `./run_all.sh --profile {profile.name}`. Beside each picture lie its numbers (`.csv`) and its "
        "caption, records, versions and command (`.json`). The [scorecard](scorecard.md) has a verdict per claim and "
        "source; `index.html`, which a run writes, has everything on one page.",
    ]
    for paper, title in PAPERS.items():
        if of_paper := [picture for picture in shown if picture.paper == paper]:
            lines.append(f"## {title}")
        for slug, group in itertools.groupby(of_paper, key=lambda picture: picture.slug):
            lines.append(f"### {slug}")
            for picture in group:
                place = f"{picture.source}/{paper}/{slug}.png"
                lines += [
                    f"![{slug}, {picture.source}]({place})",
                    f"**{picture.source}**: {_plain(picture.about['caption'])}",
                ]
    return "\n\n".join(lines) + "\n"


def _plain(caption: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", caption)


def _render(profile: config.Profile, scorecard: pd.DataFrame, shown: list[Picture]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sources = {p.source for p in shown if p.timed} | set(scorecard["source"]) - {verdicts.ARITHMETIC}
    figures: dict[str, dict[str, list[Picture]]] = {}
    for picture in shown:
        figures.setdefault(picture.paper, {}).setdefault(picture.anchor, []).append(picture)
    page = environment.get_template(TEMPLATE.name).render(
        profile=profile,
        commit=provenance.git_commit(),
        sources=sorted(sources, key=source_order),
        arithmetic=verdicts.ARITHMETIC,
        papers=PAPERS,
        figures=figures,
        counts=verdicts.counts(scorecard).to_dict("index"),
        verdicts=scorecards.SIGNS,
        titles=scorecards.TITLES,
        types=scorecards.TYPES,
        claims=_by_claim(scorecard),
        conflicts=verdicts.inconsistencies(scorecard).to_dict("records"),
        beside=_beside(scorecard),
        download=_base64(scorecard.to_csv(index=False).encode()),
    )
    return page.replace("@@SIZE@@", f"{len(page.encode()) / 1e6:.1f} MB")


def _by_claim(scorecard: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry per claim with its rows, one per source."""
    return [
        {**group.iloc[0][["id", "paper", "where", "type", "claim", "criterion", "conflict"]].to_dict(), "rows": rows}
        for _, group in scorecard.groupby("id", sort=False)
        if (rows := group[["source", "verdict", "numbers", "figure"]].to_dict("records"))
    ]


def _beside(scorecard: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Anchor of a figure -> the verdicts on its claims."""
    linked = scorecard[scorecard["figure"] != ""]
    anchors = linked["figure"].map(lambda link: "-".join(Path(link).with_suffix("").parts[1:]))
    return {anchor: rows.to_dict("records") for anchor, rows in linked.groupby(anchors)}
