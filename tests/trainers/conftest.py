"""Episodes written by hand, as the scheduler would have recorded them."""

import pytest

from opd.types import End, StopReason, Task, Trajectory, TrajectoryGroup, Turn

TASK = Task(index=0, seed=0)


def user(text):
    return [{"role": "user", "content": text}]


def result(text):
    return [{"role": "tool", "content": text}]


@pytest.fixture(scope="session")
def make_episode():
    """`make_episode(chat, *turns, ...)`: each turn is (messages, what the policy says, feedback or None)."""

    def make(chat, *turns, member=0, reward=0.0, success=False, failed=None):
        history, played = [], []
        for number, (messages, text, feedback) in enumerate(turns):
            ids = [*chat.encode(text), chat.end_id]
            if played:
                prompt = chat.extend(history, messages, None, last_id=chat.end_id)
                prompt_ids, forked = prompt.token_ids, prompt.forked
            else:
                prompt_ids, forked = chat.start(messages), False
            played.append(
                Turn(
                    prompt_ids=prompt_ids,
                    completion_ids=ids,
                    logprobs=[-2.0] * len(ids),
                    stop_reason=StopReason.STOP,
                    messages=[*history, *messages] if forked else messages,
                    text=text,
                    reward=reward if number == len(turns) - 1 else 0.0,
                    feedback=feedback,
                    forked=forked,
                )
            )
            history += [*messages, {"role": "assistant", "content": text}]
        end = End.FINISHED if failed is None else End.BROKEN
        return Trajectory(task=TASK, member=member, turns=played, end=end, success=success, failed=failed)

    return make


@pytest.fixture(scope="session")
def make_group(make_episode):
    """`make_group(chat, "RWF")`: one-turn episodes that are right (reward 1), wrong (0), or broken from outside."""

    def make(chat, outcomes, *, rewards=None):
        episodes = []
        for member, outcome in enumerate(outcomes):
            episodes.append(
                make_episode(
                    chat,
                    (user("the task"), f"{outcome} says {'on the ' * member}{member}", None),
                    member=member,
                    reward=(outcome == "R") if rewards is None else rewards[member],
                    success=outcome == "R",
                    failed="it broke" if outcome == "F" else None,
                )
            )
        return TrajectoryGroup(task=TASK, trajectories=episodes)

    return make
