"""Eight H100s that nobody has at hand: in virtual time, in real time, and how far that can be trusted."""

from .ablation import ablation_effects as ablation_effects
from .ablation import ablation_plan as ablation_plan
from .ablation import ablation_profile as ablation_profile
from .ablation import ablation_table as ablation_table
from .ablation import by_point as by_point
from .ablation import run_ablation as run_ablation
from .emulation import beside_simulation as beside_simulation
from .emulation import emulated_load as emulated_load
from .emulation import pace as pace
from .emulation import simulated_beside as simulated_beside
from .replicas import gpus_needed as gpus_needed
from .replicas import replicas_agreement as replicas_agreement
from .replicas import replicas_beside_simulation as replicas_beside_simulation
from .replicas import replicas_finding as replicas_finding
from .replicas import replicas_plan as replicas_plan
from .replicas import run_replicas as run_replicas
from .simulation import full_scale_workloads as full_scale_workloads
from .simulation import simulate_papers as simulate_papers
from .validation import aisimulate as aisimulate
from .validation import calibrated as calibrated
from .validation import errors as errors
from .validation import leave_one_out as leave_one_out
from .validation import mape as mape
from .validation import published as published
