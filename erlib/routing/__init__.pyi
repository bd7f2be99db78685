"""Who answers: c-BTM's clusterer, other routers, and how they compare."""

from .building import build_clusterer as build_clusterer
from .clusterer import Clusterer as Clusterer
from .comparison import compare_routers as compare_routers
from .evaluate import compare_normalizers as compare_normalizers
from .evaluate import map_2d as map_2d
