"""Experts that are experts: one trained per cluster, and what it is worth to be routed to the right one."""

from .arms import answered as answered
from .arms import judged as judged
from .judge import judge_answers as judge_answers
from .texts import cluster_shares as cluster_shares
from .worth import by_seen_tokens as by_seen_tokens
from .worth import compare as compare
from .worth import matrix as matrix
from .worth import served as served
