"""What the tests share. The engine: $SPEED, by default ./speed of this repository; SmolLM2: where ./run.sh left it."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "hf" / "src"), str(ROOT / "tests" / "hf")]

import random_models  # noqa: E402
import reference  # noqa: E402

from speed_llama import SpeedLlamaForCausalLM  # noqa: E402

SPEED = os.environ.get("SPEED", str(ROOT / "speed"))
CACHE = Path(os.environ.get("SPEED_CACHE") or Path.home() / ".cache" / "speed")
SMOLLM2 = Path(os.environ.get("SPEED_MODEL", CACHE / "smollm2-135m-instruct.safetensors"))

# fp32 rounds by 2^-24 = 6e-8. A row of logits is a sum over some hundred products behind tens of such sums, which
# add up like a random walk: sqrt(5000) * 6e-8 = 4e-6 is what healthy runs show, and five times that is allowed. The
# smallest planted fault moves a row by more than 1e-3.
TOLERANCE = 2e-5

torch.set_num_threads(1)


def difference(got, expected) -> float:
    """Largest relative difference of a row, in the last dimension; infinite if shapes differ or a number is not
    finite."""
    got, expected = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (got, expected))
    if got.shape != expected.shape or got.size == 0 or not (np.isfinite(got).all() and np.isfinite(expected).all()):
        return float("inf")
    return float((np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def run_engine(*arguments) -> bytes:
    done = subprocess.run([SPEED, *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    return done.stdout


def engine_flags(policy="full", k=None, bos=True, keep=None) -> list[str]:
    flags = ["--policy", policy]
    flags += [] if k is None else ["--k", str(k)]
    flags += [] if bos else ["--no-bos"]
    return flags + ([] if keep is None else ["--keep", ",".join(map(str, keep))])


def engine_logits(model: Path, tokens, split, folder: Path, **policy) -> np.ndarray:
    """[N - split, vocabulary] of `./speed logits`."""
    ids, out = folder / "ids.txt", folder / "out.npy"
    ids.write_text(" ".join(map(str, tokens)))
    run_engine("logits", "-m", model, "--tokens-file", ids, "--split", split, "--out", out, *engine_flags(**policy))
    return np.load(out)


def fields(policy="full", k=None, bos=True, keep=None) -> dict:
    """The same policy as this package's fields."""
    return {"policy": policy, "num_key_value_layers": k, "anchor": bos, "kept_layers": keep}


def policies(config) -> list[dict]:
    """Every policy and K that a model can run. config: the exported file's."""
    layers, swiftkv = config["num_hidden_layers"], config["swiftkv"]
    found = []
    if swiftkv:
        found.append({"policy": "swiftkv", "k": swiftkv["num_key_value_layers"]})
        if not swiftkv["original_projections"]:
            return found
        found.append({"policy": "swiftkv", "k": layers})
    found.append({"policy": "full"})
    for k in range(1, layers + 1):
        found += [{"policy": "speed", "k": k}, {"policy": "speed", "k": k, "bos": False}, {"policy": "pop", "k": k}]
    kept = ([0], range(0, layers, 2), range((layers + 1) // 2), [0, layers - 1], range(layers))
    return found + [{"policy": "share", "keep": sorted(set(keep))} for keep in kept]


def random_tokens(seed: int, count: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [random_models.BOS, *map(int, rng.integers(0, random_models.BOS, count - 1))]


class RandomModel:
    """A random checkpoint as a Hugging Face folder and as the engine's file, with both implementations of it."""

    def __init__(self, folder: Path, name: str, seed: int):
        self.folder = random_models.write_checkpoint(folder / name, random_models.SPECS[name], seed)
        self.file = random_models.export(self.folder, folder / f"{name}.safetensors")
        self.reference = reference.load(self.file)
        self.config = self.reference[2]
        self.model = SpeedLlamaForCausalLM.from_pretrained(self.file, dtype=torch.float32)

    def under(self, implementation="sdpa", **policy) -> SpeedLlamaForCausalLM:
        self.model.set_attn_implementation(implementation)
        self.model.set_policy(**fields(**policy))
        self.model.config.decode_marker = None
        return self.model

    def logits(self, tokens, split, implementation="sdpa", **policy) -> np.ndarray:
        """[N - split, vocabulary], by this package."""
        with torch.no_grad():
            out = self.under(implementation, **policy)(torch.tensor([tokens]), decode_start=[split])
        return out.logits[0, split:].numpy()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(name: str) -> RandomModel:
        if name not in made:
            made[name] = RandomModel(folder, name, seed=len(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def wide(random_model):
    """6 layers, 4 query heads on 2 KV heads."""
    return random_model("wide")


@pytest.fixture(scope="session")
def smollm2():
    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} is missing: ./run.sh makes it")
    return SMOLLM2
