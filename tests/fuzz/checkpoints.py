"""Runs that something happened to: `hurt(run, number)` does one thing to the files of a run that could be resumed."""

import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path

SHAPES = (
    *(
        "",
        "{",
        "[]",
        "null",
        "3",
        '"a"',
        "{}",
        "[[]]",
        "NaN",
        "\0",
        "[" * 5000,
        '{"a":' * 3000,
        "1e999",
        "9" * 5000,
        "\ufeff{}",
    ),
    *("{}{}", '{"a": 1, "a": 2}', "<html>", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
)
ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "3",
    [],
    [1],
    {},
    {"a": 1},
    [None],
    [["a"]],
)


def hurt(run, number):
    """Do something to the folder of a run; return what, and to which file, in words."""
    rng = random.Random(number)
    steps = sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    kinds = {a_file: 8, a_record: 4, a_header: 3, a_manifest: 2, a_folder: 3, beside: 6, two_steps: 1}
    [kind] = rng.choices(list(kinds), list(kinds.values()))
    return kind(rng, run, steps)


def anew(file, content):
    """Write a file that may share its bytes with that of another run (a hard link)."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    elif file.exists() or file.is_symlink():
        file.unlink()
    file.write_bytes(content)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def a_file(rng, run, steps):
    """One file of a checkpoint, mostly of the newest."""
    step = rng.choice((steps[-1], steps[-1], steps[-1], *steps))
    file = rng.choice(files_of(step))
    return f"{step.name}/{file.relative_to(step)}: {to_file(rng, file, steps, step)}"


def to_file(rng, file, steps=(), step=None):
    old = file.read_bytes()
    at = rng.randrange(len(old) or 1)
    match rng.randrange(13):
        case 0 | 1:
            made = bytearray(old or b"a")
            made[at] ^= 1 << rng.randrange(8)
            anew(file, bytes(made))
            return "a bit flipped"
        case 2 | 3:
            anew(file, old[:at])
            return f"cut to {at}"
        case 4:
            anew(file, b"")
            return "emptied"
        case 5:
            file.unlink()
            return "deleted"
        case 6:
            anew(file, old + old)
            return "doubled"
        case 7:
            anew(file, bytes(len(old)))
            return "zeroed"
        case 8:
            anew(file, rng.choice(SHAPES).encode())
            return "of another shape"
        case 9:
            file.unlink()
            file.mkdir()
            return "a folder"
        case 10:
            file.unlink()
            file.symlink_to(rng.choice((file.name, "/nowhere", "/dev/zero", "/dev/null", "..")))
            return "a link"
        case 11:
            others = (
                [other for other in steps if other != step and (other / file.relative_to(step)).is_file()]
                if step
                else []
            )
            anew(file, (rng.choice(others) / file.relative_to(step)).read_bytes() if others else old[::-1])
            return "that of another step"
        case _:
            file.unlink()
            os.mkfifo(file)
            return "a pipe"


def signed(step):
    """Write the manifest anew, so that what is wrong is not seen from hashes."""
    manifest = json.loads((step / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (step / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    anew(step / "manifest.json", json.dumps(manifest).encode())


def a_record(rng, run, steps):
    """A record of other values, with a manifest that fits."""
    step = steps[-1]
    file = rng.choice([path for path in files_of(step) if path.suffix == ".json" and path.name != "manifest.json"])
    data = json.loads(file.read_text())
    if rng.random() < 0.3 or not isinstance(data, dict) or not data:
        anew(file, rng.choice(SHAPES).encode())
        what = "of another shape"
    else:
        key = rng.choice(list(data))
        what = f"{key} changed"
        if rng.random() < 0.25:
            del data[key]
        else:
            data[key if rng.random() < 0.85 else "more"] = rng.choice([odd for odd in ODD if odd != data[key]])
        anew(file, json.dumps(data).encode())
    signed(step)
    return f"{step.name}/{file.name}: {what}, signed"


def a_header(rng, run, steps):
    """Weights that say of themselves what is not so, with a manifest that fits."""
    step = steps[-1]
    file = rng.choice([path for path in files_of(step) if path.suffix in (".safetensors", ".pt")])
    old = file.read_bytes()
    what = "cut"
    if file.suffix == ".pt":
        made = rng.choice(
            (b"", old[: len(old) // 2], b"\x80\x04cos\nsystem\n(S'touch hurt'\ntR.", bytes(len(old)), b"PK\x05\x06")
        )
    else:
        [size] = struct.unpack("<Q", old[:8])
        header = json.loads(old[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        entry = header[name]
        what = rng.choice(("dtype", "shape", "offsets", "missing", "renamed", "more", "size", "cut"))
        match what:
            case "dtype":
                entry["dtype"] = rng.choice(("F64", "I64", "BOOL", "X", "BF16", 3))
            case "shape":
                entry["shape"] = rng.choice(([], [1], [-1], [*entry["shape"][::-1], 1], [10**18, 10**18], "a"))
            case "offsets":
                entry["data_offsets"] = rng.choice(([0, 0], [0, 10**18], [5, 1], [-4, 0], []))
            case "missing":
                del header[name]
            case "renamed":
                header["other"] = header.pop(name)
            case "more":
                header["other"] = dict(entry)
        text = json.dumps(header).encode()
        length = rng.choice((0, 2**63, 2**40, size + 1)) if what == "size" else len(text)
        made = struct.pack("<Q", length) + text + old[8 + size :]
        made = made[: len(made) // 2] if what == "cut" else made
    anew(file, made)
    signed(step)
    return f"{step.name}/{file.name}: {what} of the header, signed"


def a_manifest(rng, run, steps):
    step = steps[-1]
    manifest = json.loads((step / "manifest.json").read_text())
    files = manifest["files"]
    name = rng.choice(list(files))
    what = rng.choice(("format", "format", "none", "entry", "outside", "absolute", "fewer", "more", "shape"))
    match what:
        case "format":
            manifest["format"] = rng.choice((2, 99, 0, "1", None, [], 1.5))
        case "none":
            del manifest[rng.choice(("format", "files"))]
        case "entry":
            files[name] = rng.choice(ODD)
        case "outside":
            files["../../config.yaml"] = files[name]
        case "absolute":
            files["/etc/passwd"] = files[name]
        case "fewer":
            del files[name]
        case "more":
            files["more"] = files[name]
        case "shape":
            manifest = rng.choice(ODD)
    anew(step / "manifest.json", json.dumps(manifest).encode())
    return f"{step.name}/manifest.json: {what}"


def a_folder(rng, run, steps):
    """Folders of steps that are not what they are called."""
    root, newest = run / "checkpoints", steps[-1]
    number = int(newest.name[5:])
    match rng.randrange(12):
        case 0:
            shutil.rmtree(newest)
            return f"{newest.name}: gone"
        case 1:
            newest.rename(root / f"step-{number + 1}")
            return f"{newest.name}: called step-{number + 1}"
        case 2:
            shutil.rmtree(newest)
            shutil.copytree(steps[0], newest)
            return f"{newest.name}: a copy of {steps[0].name}"
        case 3:
            (root / "step-99").mkdir()
            return "step-99: empty"
        case 4:
            (root / "step-99").write_text("a")
            return "step-99: a file"
        case 5:
            (root / "step-99").symlink_to(rng.choice((newest.name, "/nowhere", "step-99", "/")))
            return "step-99: a link"
        case 6:
            name = rng.choice(
                (
                    "step-",
                    "step-x",
                    "step-0x9",
                    "step--9",
                    "step-9.damaged",
                    "step-\u0663",
                    "step-9 ",
                    "Step-9",
                    "step-09",
                    "step-" + "9" * 60,
                )
            )
            shutil.copytree(newest, root / name)
            return f"{name}: a copy of {newest.name}"
        case 7:
            for name in (".step-99.partial", ".step-98.deleted", f".{newest.name}.partial", f".{newest.name}.deleted"):
                shutil.copytree(steps[0], root / name)
            return "checkpoints: leftovers"
        case 8:
            for name in (".step-99.partial", ".step-98.deleted", f".step-{number + 1}.partial"):
                (root / name).write_text("a")
            return "checkpoints: leftovers that are files"
        case 9:
            shutil.rmtree(root)
            rng.choice((root.mkdir, lambda: root.write_text("a"), lambda: root.symlink_to("/nowhere"), lambda: None))()
            return "checkpoints: gone, or something else"
        case 10:
            for step in steps:
                file = rng.choice(files_of(step))
                anew(file, file.read_bytes()[:-1])
            return "checkpoints: all cut"
        case _:
            (newest / "more").mkdir()
            (newest / "more" / "x.json").write_text("{}")
            return f"{newest.name}: more files"


def beside(rng, run, steps):
    """What stands beside the checkpoints: settings, rows, records of stages, exports, the lock."""
    kept = [
        path for path in files_of(run) if "checkpoints" not in path.relative_to(run).parts and path.suffix != ".png"
    ]
    kept += [run / name for name in ("run.lock", "stopped.json", "outside.json") for _ in range(2)]
    file = rng.choice(kept)
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    name = str(file.relative_to(run))
    if file.suffix == ".jsonl" and rng.random() < 0.6:
        lines = file.read_bytes().splitlines(keepends=True) or [b"a"]
        at = rng.randrange(len(lines) or 1)
        odd = rng.choice(
            (
                b"\n",
                b"{}\n",
                b"[]\n",
                b"null\n",
                b'{"step": "a"}\n',
                b'{"step": null}\n',
                b'{"step": 1e400}\n',
                b'{"step": -1}\n',
            )
        )
        match rng.randrange(8):
            case 0:
                lines[at : at + 1] = []
            case 1:
                lines[at:at] = lines[at : at + 1]
            case 2:
                lines[at:at] = [odd]
            case 3:
                lines = lines[::-1]
            case 4:
                lines = [*lines[:-1], lines[-1][:-5]]
            case 5:
                lines = [*lines, b"\0" * 4096]
            case 6:
                lines = [*lines, rng.choice(lines)[:9] + b"\n"]
            case 7:
                lines = [b"\xff\xfe" + lines[0], *lines[1:]]
        anew(file, b"".join(lines))
        return f"{name}: lines"
    if file.name == "run.lock" and rng.random() < 0.5:
        anew(
            file,
            json.dumps(
                {"host": rng.choice(("elsewhere", 3, None)), "pid": rng.choice((1, -1, "a", 10**30)), "started": "x"}
            ).encode(),
        )
        return f"{name}: of another owner"
    return f"{name}: {to_file(rng, file)}"


def two_steps(rng, run, steps):
    """The newest two are hurt."""
    return "; ".join(
        f"{step.name}/{file.name}: {to_file(rng, file, steps, step)}"
        for step in steps[-2:]
        for file in [rng.choice(files_of(step))]
    )


def linked(run: Path, to: Path) -> Path:
    """A copy of a run whose files share their bytes with it: what replaces a file, as `anew` does, leaves it whole."""
    shutil.copytree(run, to, copy_function=os.link, symlinks=True)
    for path in to.rglob("*"):
        if path.is_file() and path.suffix in (".jsonl", ".lock", ".yaml"):  # these are written in place
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    return to
