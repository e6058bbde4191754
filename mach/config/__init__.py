"""The configuration of a run: strict sections read from TOML, overridden by ``--set section.key=value``.

Every key but ``data.train`` may be left out. In a new run the recipe (`mach.training.recipe`) then chooses some by the
data, and all others have the defaults given here. An unknown key or a value of the wrong type is refused with one line
that names it. The resolved configuration is written into the run directory.
"""

from mach.config.keys import (
    DOCUMENTS,
    IDENTITY,
    MAX_PILOTS,
    Aggregate,
    Config,
    DataConfig,
    DecodingConfig,
    Effort,
    Format,
    HashingConfig,
    LaunchConfig,
    NetworkConfig,
    RerankingConfig,
    TextConfig,
    TrainingConfig,
)
from mach.config.retired import RETIRED
from mach.config.section import Section
from mach.config.toml import (
    completed,
    differing_keys,
    fingerprint,
    load_config,
    load_run_config,
    parse_config,
    to_toml,
)

__all__ = [
    "DOCUMENTS",
    "IDENTITY",
    "MAX_PILOTS",
    "RETIRED",
    "Aggregate",
    "Config",
    "DataConfig",
    "DecodingConfig",
    "Effort",
    "Format",
    "HashingConfig",
    "LaunchConfig",
    "NetworkConfig",
    "RerankingConfig",
    "Section",
    "TextConfig",
    "TrainingConfig",
    "completed",
    "differing_keys",
    "fingerprint",
    "load_config",
    "load_run_config",
    "parse_config",
    "to_toml",
]
