"""opd: train LLM agents by on-policy self-distillation.

`opd.load_config(file)`, `opd.Config` and `opd.train(config)` are the Python door to what `opd train FILE.yaml` does.
They are resolved when first used, so that `import opd` stays cheap and the core imports nothing above itself.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "load_config", "train"]


def __getattr__(name: str) -> Any:
    if name == "Config":
        from opd.launch.settings.config import Config

        return Config
    if name == "load_config":
        from opd.launch.checks.loading import load_config

        return load_config
    if name == "train":
        from opd.launch.train import train

        return train
    raise AttributeError(f"module 'opd' has no attribute {name!r}")
