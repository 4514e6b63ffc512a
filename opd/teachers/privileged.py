"""The words that put privileged context before a teacher; they stand nowhere else.

Warm starts, methods and tests all build teacher prompts here, so that a method shows a small model, to the
letter, what the model was taught to read. Each function takes the text of the first user
message and returns the text that the teacher reads in its place. The student's prompt never passes here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from opd.types import Message

# OPSD (arXiv 2601.18734): the problem, a reference solution, a sentence of transition; our wording.
SOLUTION = (
    "{prompt}\n\nHere is a reference solution to this problem:\n{solution}\n"
    "Now solve the problem yourself, step by step."
)
# SDPO (arXiv 2601.20802): a successful attempt of the same group, or the environment's feedback.
DEMONSTRATION = "{prompt}\n\nHere is a successful attempt:\n{episode}\nNow solve the problem yourself."
FEEDBACK = "{prompt}\n\nAn earlier attempt failed with this feedback:\n{feedback}\nNow solve the problem yourself."
# SD-Zero (arXiv 2604.12002): the own attempt and a cue that tells its outcome.
ATTEMPT = "{prompt}\n\nHere is an earlier attempt:\n{episode}\n{cue}"
CUE_RIGHT = "Let me rephrase the above solution."
CUE_WRONG = "Wait, this response is not correct, let me start over."
# Skill-SD (arXiv 2604.10674): a skill distilled from earlier episodes.
SKILL = "{prompt}\n\nA skill from earlier episodes that may help:\n{skill}"
SKILL_OF_LIKE_TASK = "From a like task: {task}\n{skill}"


_FIELD = re.compile(r"\{([a-z_]+)\}")
_THINKING = re.compile(r"\A.*</think>\s*", re.DOTALL)


def fill(template: str, **parts: str) -> str:
    """Put each part in the place of its `{name}`; braces inside a part stay as they are.

    Raises ValueError when the template lacks a part or names one that is not given: a teacher that
    silently loses the question or the solution still trains, on nothing.
    """
    names = set(_FIELD.findall(template))
    if names != set(parts):
        raise ValueError(f"the template needs {sorted(names)} but was given {sorted(parts)}: {template!r}")
    return _FIELD.sub(lambda found: parts[found.group(1)], template)


def with_solution(prompt: str, solution: str, *, template: str = SOLUTION) -> str:
    return fill(template, prompt=prompt, solution=solution)


def with_demonstration(prompt: str, episode: str, *, template: str = DEMONSTRATION) -> str:
    return fill(template, prompt=prompt, episode=episode)


def with_feedback(prompt: str, feedback: str, *, template: str = FEEDBACK) -> str:
    return fill(template, prompt=prompt, feedback=feedback)


def with_attempt(prompt: str, episode: str, *, cue: str, template: str = ATTEMPT) -> str:
    return fill(template, prompt=prompt, episode=episode, cue=cue)


def with_skill(prompt: str, skill: str, *, template: str = SKILL) -> str:
    return fill(template, prompt=prompt, skill=skill)


def of_like_task(skill: str, task: str) -> str:
    """Head a skill that was made from another task's episodes with that task."""
    return fill(SKILL_OF_LIKE_TASK, skill=skill, task=task)


def episode_text(messages: Iterable[Message]) -> str:
    """Write an episode as text, a line a message, from the assistant's first message on."""
    lines: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            lines.append(str(message["content"]))
        elif lines:
            lines.append(f"> {message['content']}")
    return "\n".join(lines)


def in_first_user_message(messages: list[Message], rewrite: Callable[[str], str]) -> list[Message]:
    """Rewrite the text of the first user message; the messages given stay untouched.

    Raises ValueError when there is none: privileged text would go nowhere.
    """
    for number, message in enumerate(messages):
        if message["role"] == "user":
            return [
                *messages[:number],
                {**message, "content": rewrite(message["content"])},
                *messages[number + 1 :],
            ]
    raise ValueError("no user message to put privileged text into")


def in_last_message(messages: list[Message], rewrite: Callable[[str], str]) -> list[Message]:
    """Rewrite the text of the last message, whoever speaks; the messages given stay untouched.

    The student answers this message next. Where an environment said nothing, a user's message is added.
    """
    *before, last = messages or [{"role": "user", "content": ""}]
    return [*before, {**last, "content": rewrite(last["content"])}]


def without_thinking(text: str) -> str:
    """Cut a completion up to its last `</think>`; a template may have opened the thinking in the prompt."""
    return _THINKING.sub("", text)
