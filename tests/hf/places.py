"""Paths. Three environment variables change them. SPEED: the program. SPEED_CACHE: the cache folder of ./run.sh.
SPEED_MODEL: the exported SmolLM2 that ./run.sh puts there."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEED = os.environ.get("SPEED", str(ROOT / "speed"))
CACHE = Path(
    os.environ.get("SPEED_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speed"
)
SMOLLM2 = Path(os.environ.get("SPEED_MODEL", CACHE / "smollm2-135m-instruct.safetensors"))
