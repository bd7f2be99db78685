"""What the papers claim, checked against records."""

from .explained import by_core_speed as by_core_speed
from .explained import by_source as by_source
from .flips import robust as robust
from .flips import sensitivity as sensitivity
from .scorecards import write_scorecard as write_scorecard
from .trained import judge_experts as judge_experts
from .verdicts import counts as counts
from .verdicts import evaluate as evaluate
from .verdicts import inconsistencies as inconsistencies
from .verdicts import read_sources as read_sources
