"""What the tests of whole runs share."""

import pytest


@pytest.fixture(scope="session")
def tiny(tiny_model):
    """A model that knows the format a little: a tenth of the warm start."""
    return tiny_model(steps=50)


@pytest.fixture
def settings(tiny, tmp_path):
    """`settings(name, **sections)`: a short run of OPSD in the folder `name`, as plain data."""

    def make(name, **sections):
        data = {
            "method": "opsd",
            "out": str(tmp_path / name),
            "model": str(tiny),
            "env": "opd/Lookup-v0",
            "rollout": {"max_tokens": 24, "max_length": 256},
            "train": {"steps": 4, "tasks_per_step": 6, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            "opsd": {"privileged": "plan", "divergence": {"clip": None}},
        }
        for section, values in sections.items():
            own = data.get(section)
            data[section] = own | values if isinstance(own, dict) and isinstance(values, dict) else values
        return data

    return make
