"""Acceptance figures of the engines: size on disk, perplexity against FP16, tokens/s at batch 1, 8, 32.

Usage: python benchmarks/engines.py [profile]
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import pandas as pd

from erlib import config
from erlib.engines import quality

profile = config.load_profile(sys.argv[1] if len(sys.argv) > 1 else "laptop")
table = quality.measure_engines(profile).drop(columns=["label", "parameters", "key"])
pd.set_option("display.width", 200, "display.max_columns", None, "display.precision", 3)
print(table.to_string(index=False))

size = table.drop_duplicates("name").pivot(index="layers", columns="dtype", values="weights_bytes")
ordered = (size["fp16"] > size["fp8"]) & ((size["fp8"] / size["int8"] - 1).abs() < 0.01) & (size["int8"] > size["int4"])
print("\nFP16 > FP8 ~ INT8 > INT4 on disk:", ordered[size.notna().all(axis=1)].to_dict())
print("Every engine computes in float32: tokens/s are this machine's, not the formats'.")
