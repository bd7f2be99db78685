"""What a run may vary (profiles) and what a system is (configurations), validated before any work starts."""

from erlib.config.choices import Mix, Passable, Relay
from erlib.config.learned import CorpusSettings, ExpertSettings
from erlib.config.load import at_paper_scale, load_profile, read_overrides
from erlib.config.profile import PreliminarySettings, Profile, Scale, SweepSettings, WorkloadSettings
from erlib.config.reading import ConfigError, nearest, read_yaml
from erlib.config.served import EngineSettings, ServingSettings, VllmSettings
from erlib.config.system import (
    KV_BLOCK_TOKENS,
    Configuration,
    Dtype,
    Flow,
    LaptopSystem,
    Paper,
    PaperSystem,
    Routing,
    RunnerKind,
    Version,
    config_ids,
    load_configuration,
    paper_of,
)

__all__ = [
    "KV_BLOCK_TOKENS",
    "ConfigError",
    "Configuration",
    "CorpusSettings",
    "Dtype",
    "EngineSettings",
    "ExpertSettings",
    "Flow",
    "LaptopSystem",
    "Mix",
    "Paper",
    "PaperSystem",
    "Passable",
    "PreliminarySettings",
    "Profile",
    "Relay",
    "Routing",
    "RunnerKind",
    "Scale",
    "ServingSettings",
    "SweepSettings",
    "Version",
    "VllmSettings",
    "WorkloadSettings",
    "at_paper_scale",
    "config_ids",
    "load_configuration",
    "load_profile",
    "nearest",
    "paper_of",
    "read_overrides",
    "read_yaml",
]
