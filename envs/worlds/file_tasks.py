"""Makes tasks on a small tree of text files: a seeded tree, what to do with it in words, how, and what must come out.

Each task is made by a function of its own, which draws from the tree that it is given. The commands are one way of
many; only the files and the answer at the end count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Tree = dict[str, str]
"""Relative path -> text."""

FOLDERS = ("archive", "data", "docs", "logs", "mail", "notes", "plans", "work")
SUBFOLDERS = ("draft", "new", "old", "team")
NAMES = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle",
    "ladder", "market", "needle", "orange", "pepper", "quartz", "river", "saddle", "temple", "valley", "window",
)  # fmt: skip
EXTENSIONS = ("csv", "log", "md", "txt")
WORDS = (
    "amber", "blue", "cold", "dark", "early", "final", "green", "happy", "iron", "late", "mild", "new", "open",
    "plain", "quick", "red", "silver", "tall", "urgent", "warm",
)  # fmt: skip
RARE = ("cobalt", "falcon", "ginger", "hazel", "lotus", "marble", "nectar", "opal", "saffron", "tulip", "violet")
TARGETS = ("done", "found", "keep", "out", "picked", "sorted")
"""Folders that are not there yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTask:
    """Says what to do, how, and how it must end."""

    prompt: str
    plan: str
    commands: tuple[str, ...]
    given: Tree
    """The files at the beginning."""
    answer: str | None = None
    """What to answer; None where no answer is asked for."""
    result: Tree | None = None
    """The files at the end; None where they do not matter."""


Make = Callable[[np.random.Generator, Tree], FileTask]


def draw_tree(rng: np.random.Generator) -> Tree:
    """Draw ten to fourteen files in three folders and their subfolders; no two of the same name, none empty.

    There are at least two files of each ending, and at least one of each in the first level of some folder.
    """
    folders = [str(name) for name in rng.permutation(FOLDERS)[:3]]
    places = [*folders, *(f"{folder}/{pick(rng, SUBFOLDERS)}" for folder in folders)]
    names = rng.permutation(NAMES)[: int(rng.integers(10, 15))]
    tree: Tree = {}
    for number, name in enumerate(names):
        extension = EXTENSIONS[number % len(EXTENSIONS)]
        place = pick(rng, folders if number < len(EXTENSIONS) else places)
        tree[f"{place}/{name}.{extension}"] = "".join(_line(rng) for _ in range(int(rng.integers(3, 9))))
    return tree


def _line(rng: np.random.Generator) -> str:
    return " ".join(pick(rng, WORDS) for _ in range(int(rng.integers(3, 7)))) + "\n"


def pick(rng: np.random.Generator, choices: tuple[T, ...] | list[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


# Looking and single changes


def count_files(rng: np.random.Generator, tree: Tree) -> FileTask:
    extension, folder = pick(rng, EXTENSIONS), pick(rng, _folders(tree))
    count = sum(path.startswith(f"{folder}/") and path.endswith(f".{extension}") for path in tree)
    asked = (
        f"How many .{extension} files are in {folder} and its subfolders?",
        f"Count the files under {folder}, at any depth, whose names end in .{extension}.",
        f"Find out how many files in {folder}, subfolders included, have the ending .{extension}.",
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan=f"find by ending in {folder}, count",
        commands=(f"find {folder} -type f -name '*.{extension}' | wc -l",),
        given=tree,
        answer=str(count),
    )


def count_lines(rng: np.random.Generator, tree: Tree) -> FileTask:
    path = pick(rng, sorted(tree))
    word = pick(rng, _words(tree[path]))
    asked = (
        f'How many lines of {path} contain the word "{word}"?',
        f'In {path}, count the lines with the word "{word}".',
        f'On how many lines of {path} does the word "{word}" stand?',
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan=f"search {path} for the word, count lines",
        commands=(f"grep -cw {word} {path}",),
        given=tree,
        answer=str(len(_lines_with(word, tree[path]))),
    )


def find_word(rng: np.random.Generator, tree: Tree) -> FileTask:
    tree, path, word = _plant_word(rng, tree)
    asked = (
        f'Which file contains the word "{word}"? Answer with its path.',
        f'One file has the word "{word}" in it. What is its path?',
        f'Find the file in which "{word}" stands and give its path.',
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan="search all files for the word, list the file",
        commands=(f"grep -rlw {word} .",),
        given=tree,
        answer=path,
    )


def move_file(rng: np.random.Generator, tree: Tree) -> FileTask:
    path = pick(rng, sorted(tree))
    folder = pick(rng, [folder for folder in _folders(tree) if folder != _parent(path)])
    asked = (
        f"Move {path} into the folder {folder}.",
        f"The file {path} belongs in {folder}; put it there.",
        f"Take {path} out of its folder and into {folder}, under the same name.",
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan=f"move the file to {folder}/",
        commands=(f"mv {path} {folder}/",),
        given=tree,
        result=_rename_paths(tree, {path: f"{folder}/{_name(path)}"}),
    )


def delete_files(rng: np.random.Generator, tree: Tree) -> FileTask:
    extension = pick(rng, EXTENSIONS)
    asked = (
        f"Delete every .{extension} file, in whatever folder it is.",
        f"Remove all files whose names end in .{extension}.",
        f"No .{extension} file is needed any more, at any depth. Delete them.",
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan="find by ending in all folders, delete",
        commands=(f"find . -type f -name '*.{extension}' -delete",),
        given=tree,
        result={path: text for path, text in tree.items() if not path.endswith(f".{extension}")},
    )


def replace_word(rng: np.random.Generator, tree: Tree) -> FileTask:
    path = pick(rng, sorted(tree))
    old, new = pick(rng, _words(tree[path])), pick(rng, RARE)
    asked = (
        f'In {path}, replace the word "{old}" with "{new}" everywhere.',
        f'Change each "{old}" in {path} to "{new}".',
        f'Edit {path}: wherever it says "{old}", it must say "{new}".',
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan="substitute the word in that file, every time",
        commands=(_substitute(old, new, path),),
        given=tree,
        result=tree | {path: _replace_word(tree[path], old, new)},
    )


# Many files at a time


def count_in_all(rng: np.random.Generator, tree: Tree) -> FileTask:
    extension = pick(rng, EXTENSIONS)
    word = pick(rng, _words("".join(text for path, text in tree.items() if path.endswith(f".{extension}"))))
    count = sum(len(_lines_with(word, text)) for path, text in tree.items() if path.endswith(f".{extension}"))
    asked = (
        f'How many lines contain the word "{word}" in all .{extension} files together?',
        f'Over all .{extension} files, count the lines that have "{word}" in them.',
        f'Look through every .{extension} file, at any depth: on how many lines does "{word}" stand?',
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan="search the files of that ending without their names, count lines",
        commands=(f"grep -rhw --include='*.{extension}' {word} . | wc -l",),
        given=tree,
        answer=str(count),
    )


def move_matching(rng: np.random.Generator, tree: Tree) -> FileTask:
    word, target = pick(rng, _words("".join(tree.values()))), pick(rng, TARGETS)
    found = [path for path, text in tree.items() if _lines_with(word, text)]
    asked = (
        f'Make a folder {target} and move every file that contains the word "{word}" into it.',
        f'All files with the word "{word}" in them belong in a new folder, {target}. Move them there.',
        f'Collect the files in which "{word}" stands in a folder named {target}; they must leave their old places.',
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan=f"make {target}, search all files for the word, move what is found",
        commands=(f"mkdir {target}", f"grep -rlw {word} . | xargs mv -t {target}"),
        given=tree,
        result=_rename_paths(tree, {path: f"{target}/{_name(path)}" for path in found}),
    )


def list_paths(rng: np.random.Generator, tree: Tree) -> FileTask:
    extension, target = pick(rng, EXTENSIONS), f"{pick(rng, TARGETS)}.list"
    paths = sorted(path for path in tree if path.endswith(f".{extension}"))
    asked = (
        f"Write the paths of all .{extension} files to {target}, sorted, one a line, without a leading ./",
        f"Make a file {target} that lists the path of every .{extension} file (such as docs/a.{extension}), sorted.",
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan="find by ending in all folders, sort the paths, write them",
        commands=(f"find * -type f -name '*.{extension}' | LC_ALL=C sort > {target}",),
        given=tree,
        result=tree | {target: "".join(f"{path}\n" for path in paths)},
    )


def rename_files(rng: np.random.Generator, tree: Tree) -> FileTask:
    folder = pick(rng, sorted({_parent(path) for path in tree if path.count("/") == 1}))
    old = pick(rng, sorted({_extension(path) for path in tree if _parent(path) == folder}))
    new = pick(rng, [extension for extension in (*EXTENSIONS, "bak", "text") if extension != old])
    changed = [path for path in tree if _parent(path) == folder and _extension(path) == old]
    asked = (
        f"In {folder} itself, not in its subfolders, change the ending of every .{old} file to .{new}.",
        f"Rename each .{old} file that is directly in {folder} so that it ends in .{new}.",
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan=f"go through the files of that ending in {folder}, rename each",
        commands=(f'for file in {folder}/*.{old}; do mv "$file" "${{file%.{old}}}.{new}"; done',),
        given=tree,
        result=_rename_paths(tree, {path: path.removesuffix(old) + new for path in changed}),
    )


def replace_in_all(rng: np.random.Generator, tree: Tree) -> FileTask:
    extension = pick(rng, EXTENSIONS)
    paths = [path for path in tree if path.endswith(f".{extension}")]
    old, new = pick(rng, _words("".join(tree[path] for path in paths))), pick(rng, RARE)
    asked = (
        f'In every .{extension} file, replace the word "{old}" with "{new}".',
        f'Change "{old}" to "{new}" wherever it stands in a .{extension} file, and in no other file.',
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan="find by ending in all folders, substitute the word in each",
        commands=(_substitute(old, new, f"$(find . -type f -name '*.{extension}')"),),
        given=tree,
        result=tree | {path: _replace_word(tree[path], old, new) for path in paths},
    )


# Several steps


def edit_and_move(rng: np.random.Generator, tree: Tree) -> FileTask:
    tree, path, word = _plant_word(rng, tree)
    old = pick(rng, _words(tree[path].replace(word, "")))
    new = pick(rng, [rare for rare in RARE if rare != word])
    target = pick(rng, TARGETS)
    asked = (
        f'Find the file that contains the word "{word}", replace "{old}" with "{new}" in it, '
        f"and move it into a new folder {target}.",
        f'One file has "{word}" in it. It belongs in a new folder, {target}, with each "{old}" changed to "{new}".',
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan=f"search all files for the word, substitute in what is found, make {target}, move it there",
        commands=(f"file=$(grep -rlw {word} .); {_substitute(old, new, '$file')}; mkdir {target}; mv $file {target}/",),
        given=tree,
        result=_rename_paths(tree | {path: _replace_word(tree[path], old, new)}, {path: f"{target}/{_name(path)}"}),
    )


def merge_files(rng: np.random.Generator, tree: Tree) -> FileTask:
    extension, target = pick(rng, EXTENSIONS), f"{pick(rng, TARGETS)}.all"
    paths = sorted(path for path in tree if path.endswith(f".{extension}"))
    word = pick(rng, _words("".join(tree[path] for path in paths)))
    kept = [line for path in paths for line in _lines_with(word, tree[path])]
    asked = (
        f'Write the lines that contain the word "{word}" of all .{extension} files, file after file in the order of '
        f"their paths, to {target}; then delete the .{extension} files.",
        f"Replace all .{extension} files by one file, {target}. It holds, in the order of the sorted paths, those of "
        f'their lines in which "{word}" stands.',
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan="find by ending, sort, keep the lines with the word, delete the files",
        commands=(
            f"find * -type f -name '*.{extension}' | LC_ALL=C sort | xargs grep -hw {word} > {target}",
            f"find . -type f -name '*.{extension}' -delete",
        ),
        given=tree,
        result={path: text for path, text in tree.items() if path not in paths} | {target: "".join(kept)},
    )


def copy_longest(rng: np.random.Generator, tree: Tree) -> FileTask:
    path, folder = pick(rng, sorted(tree)), pick(rng, _folders(tree))
    longer = max(text.count("\n") for text in tree.values()) - tree[path].count("\n") + int(rng.integers(1, 4))
    tree = tree | {path: tree[path] + "".join(_line(rng) for _ in range(longer))}
    target = f"{pick(rng, TARGETS)}.copy"
    longest = "find * -type f | xargs wc -l | grep -v ' total$' | sort -rn | head -1"
    asked = (
        f"Copy the file with the most lines to {folder}/{target}, and answer how many lines it has.",
        f"Which file is the longest, in lines? Make a copy of it at {folder}/{target} and answer the number of lines.",
    )
    return FileTask(
        prompt=pick(rng, asked),
        plan=f"count the lines of all files, sort, copy the first to {folder}/{target}",
        commands=(
            longest,
            f"cp $({longest} | awk '{{print $2}}') {folder}/{target}",
        ),
        given=tree,
        answer=str(tree[path].count("\n")),
        result=tree | {f"{folder}/{target}": tree[path]},
    )


LEVELS: Mapping[int, tuple[Make, ...]] = {
    1: (count_files, count_lines, find_word, move_file, delete_files, replace_word),
    2: (count_in_all, move_matching, list_paths, rename_files, replace_in_all),
    3: (edit_and_move, merge_files, copy_longest),
}
"""Level of difficulty -> its tasks: one command, many files at a time, several steps."""


def _plant_word(rng: np.random.Generator, tree: Tree) -> tuple[Tree, str, str]:
    """Put a rare word into the middle of one line of one file. Returns the tree, the path and the word."""
    path, word = pick(rng, sorted(tree)), pick(rng, RARE)
    lines = tree[path].splitlines(keepends=True)
    number = int(rng.integers(len(lines)))
    first, space, rest = lines[number].partition(" ")
    lines[number] = f"{first} {word}{space}{rest}"
    return tree | {path: "".join(lines)}, path, word


def _folders(tree: Tree) -> list[str]:
    return sorted({path.split("/")[0] for path in tree})


def _words(text: str) -> list[str]:
    return sorted(set(text.split()))


def _lines_with(word: str, text: str) -> list[str]:
    return [line for line in text.splitlines(keepends=True) if word in line.split()]


def _replace_word(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, text)


def _substitute(old: str, new: str, files: str) -> str:
    return rf"sed -i 's/\b{old}\b/{new}/g' {files}"


def _rename_paths(tree: Tree, names: Mapping[str, str]) -> Tree:
    return {names.get(path, path): text for path, text in tree.items()}


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _extension(path: str) -> str:
    return path.rpartition(".")[2]
