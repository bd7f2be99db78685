"""Records of what neither paper varied, for the claims that hang on it: answer length, and what all-reduce takes."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa

from erlib import cache
from erlib.config import Profile
from erlib.load import records
from erlib.paper_scale import setups
from erlib.paper_scale.setups import Setup

EXPERIMENTS = {
    "short-answers": (Setup(answers=0.125), ("p1.A", "p1.B", "p1.C", "p1.D")),
    "no-allreduce": (Setup(allreduce=0), ("p1.A", "p1.B", "p1.C", "p1.D")),
    "slow-allreduce": (Setup(allreduce=7), ("p2.A", "p2.B", "p2.C", "p2.D", "p2.E")),
}
"""What a record's ``experiment`` is called, what is changed, and for whom: answers of 150 instead of 1,200 tokens; GPUs
that exchange their parts in no time; and over PCIe 5.0 (64 GB/s in one direction) instead of NVLink (450 GB/s)."""


def simulate_left_out(profile: Profile, directory: Path) -> list[Path]:
    """Simulate what is missing of :data:`EXPERIMENTS`, at the middle one of ``sensitivity.users``.

    Parameters
    ----------
    profile : Profile
    directory : Path
        Records go to ``<directory>/<experiment>/<config>/``, a file per point.

    Returns
    -------
    list of Path
        The files of all points.
    """
    settings = profile.sensitivity
    users = settings.users[len(settings.users) // 2]
    files: list[Path] = []
    for experiment, (setup, configs) in EXPERIMENTS.items():
        usual = replace(setup, sigma=profile.workload.sigma)
        base = [setups.given(profile), asdict(usual), users]
        wanted = {}
        for name, repeat in itertools.product(configs, range(settings.repeats)):
            for mix in setups.mixes(name):
                file = f"{mix}-u{users:04d}-r{repeat}-{cache.digest(*base, name, mix, repeat)}.parquet"
                wanted[name, mix, repeat] = directory / experiment / name / file
        if not all(records.found(path, "left out") for path in wanted.values()):
            for point in setups.points(usual, configs, profile, [users], settings.repeats, experiment):
                path = wanted[tuple(point[name][0].as_py() for name in ("config", "mix", "repeat"))]
                place = records.SCHEMA.get_field_index("point_hash")
                named = pa.repeat(path.stem.rpartition("-")[2], len(point))
                records.write(point.set_column(place, "point_hash", named), path)
        files += wanted.values()
    return files
