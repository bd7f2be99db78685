"""What the papers claim, checked against records."""

from .flips import robust as robust
from .flips import sensitivity as sensitivity
from .verdicts import counts as counts
from .verdicts import evaluate as evaluate
from .verdicts import inconsistencies as inconsistencies
from .verdicts import read_sources as read_sources
from .verdicts import write_scorecard as write_scorecard
