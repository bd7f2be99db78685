"""What answers, on a laptop: arithmetic of a configuration, its engine, what its format costs."""

from .laptop import laptop_system as laptop_system
from .quality import measure_engines as measure_engines
from .table1 import recomputed_table1 as recomputed_table1
