"""Holds text and tool environments for `opd`. Importing it registers ours with gymnasium as `opd/<Name>-v0`.

The entry points are strings, so neither torch nor datasets is imported until an environment needs it.
"""

import gymnasium

from opd.envs.checker import Finding, check
from opd.envs.factory import list_envs, make, validate_id
from opd.envs.spaces import TextSpace
from opd.envs.text_env import Reply, Start, TextEnv, task_split
from opd.envs.tool_env import ToolEnv, ToolError, tool
from opd.tool_calls import MalformedCall, ToolCall, format_call, parse_tool_calls

__all__ = [
    "Finding",
    "MalformedCall",
    "Reply",
    "Start",
    "TextEnv",
    "TextSpace",
    "ToolCall",
    "ToolEnv",
    "ToolError",
    "check",
    "format_call",
    "list_envs",
    "make",
    "parse_tool_calls",
    "task_split",
    "tool",
    "validate_id",
]

gymnasium.register("opd/Arithmetic-v0", entry_point="opd.envs.worlds.arithmetic:ArithmeticEnv")
gymnasium.register("opd/Countdown-v0", entry_point="opd.envs.worlds.countdown:CountdownEnv")
gymnasium.register("opd/CountdownExpression-v0", entry_point="opd.envs.worlds.countdown:CountdownExpressionEnv")
gymnasium.register("opd/Dataset-v0", entry_point="opd.envs.dataset_env:DatasetEnv")
gymnasium.register("opd/Files-v0", entry_point="opd.envs.worlds.files:FilesEnv")
gymnasium.register("opd/Lookup-v0", entry_point="opd.envs.worlds.lookup:LookupEnv")
gymnasium.register("opd/Sokoban-v0", entry_point="opd.envs.worlds.sokoban:SokobanEnv")
gymnasium.register("opd/SokobanPush-v0", entry_point="opd.envs.worlds.sokoban:SokobanPushEnv")
gymnasium.register("opd/Sql-v0", entry_point="opd.envs.worlds.sql:SqlEnv")
