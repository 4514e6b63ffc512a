"""Holds what tests of adapters share: a real model that plays, and a model that says what it is told."""

import pytest


@pytest.fixture(scope="session")
def one_episode(play):
    """`one_episode(make_env, ...)` plays a whole episode of a real model on the real engine and scheduler."""

    def run(make_env, **options):
        [group] = play(make_env, tasks=1, **{"max_length": 4096, "step_timeout": 120.0, **options})
        [trajectory] = group.trajectories
        assert trajectory.failed is None
        assert trajectory.completion_tokens > 0
        return trajectory

    return run


@pytest.fixture(scope="session")
def spoken_episode(play, make_tokenizer, scripted_engine):
    """`spoken_episode(make_env, texts)` plays one on the same scheduler, with completions that say these texts."""

    def run(make_env, texts, **options):
        tokenizer = make_tokenizer()
        turns = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
        settings = {"max_tokens": 512, "max_length": 4096, "step_timeout": 120.0, "max_turns": len(texts), **options}
        [group] = play(make_env, tasks=1, engine=scripted_engine([turns]), **settings)
        [trajectory] = group.trajectories
        return trajectory

    return run
