"""Measuring: simulated users, resumable sweeps, the record of each request, and what follows from records."""

from .experiments import all_configurations as all_configurations
from .experiments import build_workload as build_workload
from .experiments import experts_sweep as experts_sweep
from .experiments import load_sweep as load_sweep
from .experiments import overhead_sweep as overhead_sweep
from .experiments import overview as overview
from .experiments import preliminary_sweep as preliminary_sweep
from .metrics import accounting as accounting
from .metrics import aggregate as aggregate
from .metrics import answers as answers
from .metrics import at_highest_load as at_highest_load
from .metrics import routing_overhead as routing_overhead
from .metrics import summarise as summarise
from .other_tools import read_results as read_results
from .published import input_lengths as input_lengths
from .published import load_records as load_records
from .published import preliminary_records as preliminary_records
from .records import read_files as read_files
from .sweep import read as read
from .sweep import run as run
