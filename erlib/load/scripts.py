"""What the users of a point say: one script each, drawn from its workload."""

from __future__ import annotations

from erlib.config import Profile
from erlib.load import users
from erlib.load.experiments import Series
from erlib.load.points import Point
from erlib.workload import prompts


def scripts_of(profile: Profile, series: Series, point: Point, n_targets: int) -> list[users.Script]:
    """One script per user of a point; users without a router share `n_targets` servers evenly."""
    drawn = prompts.draw(series.workload, point.users, point.mix, profile.seed, point.repeat)
    comes_s = prompts.moments_s(point.users, series.window_s, profile.seed, point.repeat)
    return [
        users.Script(
            user=user,
            prompt=prompt.prompt,
            cluster=prompt.cluster,
            text=prompt.text,
            max_tokens=prompt.max_tokens,
            end_id=prompt.end_id,
            target=user % n_targets,
            follow_up=prompt.follow_up if series.continues else None,
            comes_s=comes_s[user] * series.system.slow_motion,
        )
        for user, prompt in enumerate(drawn)
    ]
