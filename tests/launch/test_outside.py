"""Methods, divergences, weightings and environments that live outside of the repository: the package of
`examples/own_package`, copied away, in processes that find it on PYTHONPATH alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd import addressing
from opd.addressing import is_address, load, origin
from opd.config import Strict
from opd.errors import ConfigError, DataError
from opd.launch.checks.loading import config_from
from opd.launch.checks.outside import read_taken, warn_of_changes, write_taken
from opd.launch.settings.config import Config
from opd.maths import formulas
from opd.objective.weightings import find_weighting, weighting
from opd.tracking import read_rows
from opd.trainers import Method, register
from opd.trainers.loop import registry
from opd.types import Sample

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_package"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder that holds a copy of the example's module, and nothing of the repository."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(EXAMPLE / "nudge.py", folder)
    return folder


@pytest.fixture
def module(elsewhere, monkeypatch):
    """The copy can be imported here, and is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.setattr(formulas, "_TABLE", dict(formulas._TABLE))
    yield elsewhere
    registry._registry.pop("nudge", None)
    sys.modules.pop("nudge", None)


def command(*arguments, path=None):
    """`opd ARGUMENTS`, and an environment in which it finds the modules in `path`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    return {"args": [sys.executable, "-m", "opd.launch.cli", *map(str, arguments)], "env": environment}


def opd(*arguments, path=None, cwd=None):
    """`opd ARGUMENTS` in a process of its own: its exit status, output and errors."""
    done = subprocess.run(
        **command(*arguments, path=path), cwd=cwd, capture_output=True, text=True, check=False, timeout=900
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_an_outside_package_is_trained_killed_resumed_evaluated_and_explained(tiny, elsewhere, tmp_path):
    run = tmp_path / "run"
    data = {
        "method": "nudge:Nudge",
        "model": str(tiny),
        "env": "nudge:ShortLookup",
        "out": str(run),
        "rollout": {"max_tokens": 24, "max_length": 256},
        "train": {"steps": 400, "save_every": 1, "tasks_per_step": 4, "lr": 1e-3, "threads": 1},
        "weighting": {"functions": [{"name": "nudge:fade", "kwargs": {"half_life": 2}}]},
        "nudge": {"divergence": "nudge:symmetric_kl"},
        "tracking": {"wandb": "disabled", "console": False, "plot": False},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(data))
    said = tmp_path / "said"
    with said.open("w") as told:
        process = subprocess.Popen(
            **command("train", file, path=elsewhere), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=told
        )
    try:
        until = time.monotonic() + 600
        while not list(run.glob("checkpoints/step-2")):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    trained = max(int(folder.name.removeprefix("step-")) for folder in run.glob("checkpoints/step-*"))
    taken = json.loads((run / "outside.json").read_text())
    assert {name: row["address"] for name, row in taken.items()} == {
        "method": "nudge:Nudge",
        "env.id": "nudge:ShortLookup",
        "nudge.divergence.kind": "nudge:symmetric_kl",
        "weighting.functions.0.name": "nudge:fade",
    }
    assert {row["file"] for row in taken.values()} == {str(elsewhere / "nudge.py")}

    more = ["--steps", trained + 1, "--resume"]
    code, _, err = opd("train", run, *more, cwd=tmp_path)
    assert code == 2
    assert "names the module 'nudge', which cannot be found" in err
    assert f"This run took method = nudge:Nudge from {elsewhere / 'nudge.py'}" in err

    source = elsewhere / "nudge.py"
    before = taken["method"]["sha256"]
    source.write_text(source.read_text() + "# changed\n")
    code, _, err = opd("train", run, *more, path=elsewhere, cwd=tmp_path)
    assert code == 0, err
    row = json.loads((run / "outside.json").read_text())["method"]
    assert f"method: nudge:Nudge ({source}) has changed since this run used it: sha256 {before} then" in err
    assert f"{row['sha256']} now" in err
    assert row["before"] == [before]
    rows = [row for row in read_rows(run / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, trained + 2))
    assert all(row["route/distill"] > 0 and row["train/grad_norm"] > 0 for row in rows)

    code, out, err = opd("eval", run, "--tasks", 3, path=elsewhere, cwd=tmp_path)
    assert code == 0, err
    assert "of 3 solved" in out
    code, out, _ = opd("config", "--explain", "nudge:Nudge", path=elsewhere)
    assert code == 0
    assert "nudge.hint" in out
    code, out, _ = opd("config", run, "--explain", "nudge.divergence.kind", path=elsewhere)
    assert code == 0
    assert "symmetric_kl" in out
    code, out, _ = opd("methods", "nudge:Nudge", path=elsewhere)
    assert code == 0
    assert out.splitlines()[-1].endswith("told where to begin. [nudge:Nudge]")


SCRIPT = """
import sys
import opd
from opd.config import Strict
from opd.losses import CrossEntropy, Losses
from opd.trainers import Method, register, to_sample


@register("mine", Strict)
class Mine(Method):
    losses = staticmethod(lambda config: Losses(ce=CrossEntropy()))

    def annotate(self, group):
        return [to_sample(t, s, ce=1.0, route="ce") for t in group.usable for s in t.segments()]


settings = {
    "method": "mine",
    "model": sys.argv[1],
    "env": "opd/Lookup-v0",
    "out": "run",
    "rollout": {"max_tokens": 24, "max_length": 256},
    "train": {"steps": 1, "tasks_per_step": 2, "threads": 1},
    "tracking": {"wandb": "disabled", "console": False, "plot": False},
}
print(opd.train(settings).steps)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["script", "typed in"])
def test_a_method_that_a_script_defines_trains_and_its_file_is_written_down(tiny, tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    code = ["script.py"] if how == "script" else ["-c", SCRIPT]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *code, str(tiny)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.stdout.split()[-1:] == ["1"], done.stderr
    files = tmp_path / "run" / "outside.json"
    assert files.exists() == (how == "script")
    if how == "script":
        assert json.loads(files.read_text())["method"]["file"] == str(tmp_path / "script.py")


ALL_IN_ONE = """
from opd.config import Strict
from opd.launch.checks.loading import config_from
from opd.launch.checks.outside import read_taken, warn_of_changes, write_taken
from opd.launch.checks.outside import taken_by
from opd.losses import Distill, Divergence, Losses
from opd.maths.formulas import formula, times_log_ratio
from opd.objective.weightings import weighting
from opd.trainers import Method, register
from opd.trainers.parts.forms import DivergenceConfig, DivergenceSetting


@formula()
def far(student, teacher, p, q):
    return times_log_ratio(q, teacher, student), -q


@weighting()
def fade(samples):
    return [[1.0] * len(sample.token_ids) for sample in samples]


class MineConfig(DivergenceConfig):
    divergence: DivergenceSetting = Divergence("far")


@register("mine", MineConfig)
class Mine(Method):
    losses = staticmethod(lambda config: Losses(distill=Distill(divergence=config.divergence)))
    annotate = lambda self, group: []


config = config_from(
    {
        "method": "__main__:Mine",
        "model": "m",
        "env": "opd/Lookup-v0",
        "mine": {"divergence": "__main__:far"},
        "weighting": {"functions": [{"name": "__main__:fade"}]},
    },
    check_machine=False,
)
print(*sorted({taken.origin.file for taken in taken_by(config)}), len(taken_by(config)))
"""


def test_an_address_may_name_what_the_script_that_runs_defines(tmp_path):
    (tmp_path / "script.py").write_text(ALL_IN_ONE)
    command = [sys.executable, "-W", "ignore", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split() == [str(tmp_path / "script.py"), "3"], done.stderr


def test_a_method_of_an_installed_package_is_known_by_its_short_name(module, monkeypatch):
    offered = {"opd.methods": {"nudge": "nudge:Nudge"}, "opd.divergences": {"both": "nudge:symmetric_kl"}}
    offered["opd.weightings"] = {"fade": "nudge:fade"}
    for where in ("opd.trainers.loop.registry", "opd.maths.formulas", "opd.objective.weightings"):
        monkeypatch.setattr(f"{where}.installed", lambda group: offered.get(group, {}))
    data = {"method": "nudge", "model": "m", "env": "opd/Lookup-v0", "nudge": {"divergence": "both"}}
    config = config_from(data | {"weighting": {"functions": [{"name": "fade"}]}}, check_machine=False)
    assert config.spec.address == "nudge:Nudge"
    assert list(registry.methods())[-1] == "nudge"
    assert config.weighting.functions[0].found.factors([], {}) == []
    assert config.dump()["nudge"]["divergence"]["kind"] == "both"


def test_a_package_whose_method_cannot_be_imported_is_left_out_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr("opd.trainers.loop.registry.installed", lambda _: {"lost": "no_such_package:Lost"})
    registry._warned.discard("lost")
    looks = []
    monkeypatch.setattr("opd.trainers.loop.registry.load", lambda *a, **k: looks.append(a) or load(*a, **k))
    assert list(registry.methods()) == list(registry.METHODS)
    registry.methods()
    assert len(looks) == 1
    assert [r.getMessage().count("the method lost of an installed package is left out") for r in caplog.records] == [1]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"method": "nudge:Nudges"}, "method: 'nudge:Nudges': the module 'nudge' defines no 'Nudges'"),
        ({"method": "nudge:fade"}, "method: 'nudge:fade' is a Weighting and no registered method"),
        ({"method": "nudge:NudgeConfig"}, "'nudge:NudgeConfig' is the class NudgeConfig and no registered method"),
        ({"method": "nudges:Nudge"}, "names the module 'nudges', which cannot be found"),
        ({"nudge": {"hints": "x"}}, "nudge.hints is unknown"),
        ({"nudge": {"divergence": "nudge:fade"}}, "divergence.kind: 'nudge:fade' is a Weighting and no divergence"),
        ({"opsd": {}}, "opsd is the section of another method, but method = nudge:Nudge"),
        ({"weighting": {"functions": [{"name": "nudge:symmetric_kl"}]}}, "is a Formula and no weighting"),
        (
            {"method": "grpo", "weighting": {"functions": [{"name": "nudge:fade"}]}},
            "nudge:fade multiplies distill_weight, and method = grpo trains policy_weight alone",
        ),
        ({"weighting": {"functions": [{"name": "nudge:fade", "kwargs": {"a": 1}}]}}, "fade: got an unexpected keyword"),
    ],
)
def test_what_is_wrong_with_a_name_from_outside_is_said_by_its_setting(module, own, message):
    data = {"method": "nudge:Nudge", "model": "m", "env": "opd/Lookup-v0"} | own
    with pytest.raises(ConfigError) as error:
        config_from(data, check_machine=False)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import os; os.nothing", "AttributeError: module 'os' has no attribute 'nothing'"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def f(:", r"SyntaxError: invalid syntax \(.*elsewhere/broken\.py, line 1\)"),
    ],
)
def test_a_module_that_fails_while_it_is_imported_is_told_with_its_own_words(module, source, said):
    (module / "broken.py").write_text(source)
    with pytest.raises(ConfigError, match=f"method: 'broken:Any' cannot be imported: {said}"):
        load("broken:Any", setting="method")


@pytest.mark.parametrize("address", ["no_such_package:Lost", "no.colon", "hint"])
def test_an_entry_point_that_leads_nowhere_takes_no_other_method_along(monkeypatch, caplog, address):
    monkeypatch.setattr("opd.trainers.loop.registry.installed", lambda _: {"hint": address})
    registry._warned.discard("hint")
    assert list(registry.methods()) == list(registry.METHODS)
    assert "the method hint of an installed package is left out" in caplog.text


def test_a_package_may_offer_a_method_by_another_name_than_its_section(module, monkeypatch):
    monkeypatch.setattr("opd.trainers.loop.registry.installed", lambda _: {"push": "nudge:Nudge"})
    monkeypatch.setattr("opd.launch.settings.config.installed", lambda _: {"push": "nudge:Nudge"})
    data = {
        "method": "push",
        "model": "m",
        "env": "opd/Lookup-v0",
        "nudge": {"divergence": {"beta": 0.3, "kind": "jsd"}},
    }
    assert config_from(data, check_machine=False).section.divergence.beta == 0.3


def test_a_method_may_be_called_anything_but_a_key_of_a_runs_file():
    assert set(registry._TAKEN) == set(Config.model_fields)


def test_two_methods_of_one_name_and_a_name_that_is_a_setting_are_refused(module):
    load("nudge:Nudge", setting="method")
    with pytest.raises(ConfigError, match="there is a method 'nudge' already, nudge:Nudge"):
        register("nudge", Strict)(type("Other", (Method,), {}))
    with pytest.raises(ConfigError, match="a method cannot be called 'train'"):
        register("train", Strict)(type("Other", (Method,), {}))
    with pytest.raises(ConfigError, match="Nudge is the method 'nudge' already; register a subclass as 'again'"):
        register("again", Strict)(sys.modules["nudge"].Nudge)
    with pytest.raises(
        ConfigError, match=r"has the settings <class 'dict'>: they must be a subclass of opd.config.Str"
    ):
        register("other", dict)(type("Other", (Method,), {}))
    with pytest.raises(ConfigError, match=r"it must be a subclass of opd.trainers.Method"):
        register("other", Strict)(object)


def stages_and_inputs(method):
    config = config_from({"method": method, "model": "m", "env": "opd/Lookup-v0"}, check_machine=False)
    return config.stages, config.inputs


TRAINS = "annotate = lambda self, group: []; losses = staticmethod(lambda config: Losses())"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("losses = staticmethod(lambda config: Losses())", "the method bad has no annotate"),
        ("annotate = lambda self, group: []", r"the method bad \(bad:Bad\) cannot say its stages: NotImplementedError"),
        (
            "annotate = lambda self, group: []\n    losses = lambda self: 1",
            "losses must return Losses and teacher a TeacherConfig, not int",
        ),
        (
            "annotate = lambda self, group: []\n    losses = staticmethod(lambda config: {})",
            "losses must return Losses and teacher a TeacherConfig, not dict and TeacherConfig",
        ),
        ("stages = classmethod(lambda cls, config: None)", r"bad:Bad\): stages must return one Stage or more.*None"),
        ("stages = classmethod(lambda cls, config: ())", "stages must return one Stage or more.*tuple of 0"),
        ("stages = classmethod(lambda cls, config: (cls,))", "stages must return one Stage or more.*tuple of 1"),
        ("stages = classmethod(lambda cls, config: (n for n in ()))", "stages must return one Stage .*<generator"),
        (f"{TRAINS}\n    inputs = classmethod(lambda cls, config: 1 / 0)", "cannot say its inputs: ZeroDivisionError"),
        (f"{TRAINS}\n    inputs = classmethod(lambda cls, config: {{}})", "inputs must return Inputs, not {}"),
    ],
)
def test_a_class_that_cannot_train_is_refused_with_its_address(tmp_path, monkeypatch, body, message):
    source = "from opd.config import Strict\nfrom opd.losses import Losses\nfrom opd.trainers import Method, register\n"
    (tmp_path / "bad.py").write_text(f"{source}\n\n@register('bad', Strict)\nclass Bad(Method):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(ConfigError, match=message):
            stages_and_inputs("bad:Bad")
    finally:
        registry._registry.pop("bad", None)
        sys.modules.pop("bad", None)


def sample(turns):
    zeros = [0.0] * len(turns)
    names = ("sampler_logprobs", "policy_weight", "distill_weight", "ce_weight", "advantage")
    mask = [0, *[1] * (len(turns) - 1)]
    return Sample(token_ids=[1] * len(turns), completion_mask=mask, turn=turns, **dict.fromkeys(names, zeros))


def test_a_weighting_gives_a_factor_for_each_token_or_is_refused(module):
    fade = find_weighting("nudge:fade")
    assert fade.factors([sample([0, 0, 1, 2])], {"half_life": 1}) == [[1.0, 1.0, 0.5, 0.25]]
    for wrong, message in [
        ([[1.0]], "weighting.functions: .* gave .* factors for samples"),
        ([[1.0, -1.0, 1.0, 1.0]], "the factor -1.0"),
        (None, "failed: TypeError"),
        ([None], "failed: TypeError"),
    ]:
        with pytest.raises(DataError, match=message):
            weighting()(lambda samples, wrong=wrong: wrong).factors([sample([0, 0, 1, 2])], {})

    def careless(samples):
        for one in samples:
            one.distill_weight[1] = one.token_ids[0] = 9
        return [one.distill_weight for one in samples]

    untouched = sample([0, 0])
    assert weighting()(careless).factors([untouched], {}) == [[0.0, 9.0]]
    assert untouched.token_ids == [1, 1]
    assert untouched.distill_weight == [0.0, 0.0]
    with pytest.raises(ConfigError, match="streams = 'ce_weight' is a text"):
        weighting(streams="ce_weight")
    with pytest.raises(ConfigError, match="a weighting of 'reward' is unknown"):
        weighting(streams=("reward",))


def test_the_digest_follows_the_packages_own_imports_and_nothing_else(tmp_path, monkeypatch):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text("from . import parts\nimport os\nfrom mine.deep import thing\n")
    (package / "parts.py").write_text("A = 1\n")
    (package / "deep.py").write_text("thing = 1\n")
    (package / "other.py").write_text("B = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = origin("mine.method:M")
    assert first.file == str(package / "method.py")
    (package / "other.py").write_text("B = 2\n")
    assert origin("mine.method:M") == first
    for name in ("parts.py", "deep.py", "__init__.py"):
        changed = (package / name).read_text() + "C = 3\n"
        last = origin("mine.method:M").sha256
        (package / name).write_text(changed)
        assert origin("mine.method:M").sha256 != last
    assert "mine" not in sys.modules


def test_the_digest_follows_files_that_lie_beside_a_module(tmp_path, monkeypatch):
    (tmp_path / "lone.py").write_text("import json\nfrom beside import W\n")
    (tmp_path / "beside.py").write_text("W = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = origin("lone:M")
    (tmp_path / "beside.py").write_text("W = 7\n")
    assert origin("lone:M") != first


@pytest.mark.parametrize(
    ("text", "holds"), [("a.b:C", True), ("a:b", True), ("opd/Lookup-v0", False), ("a.b", False), (":x", False)]
)
def test_an_address_is_a_module_and_a_name(text, holds):
    assert is_address(text) is holds
    assert addressing.find_module("no.such.module") is None


def test_a_file_of_data_that_changed_is_told_of_at_a_resume(tmp_path, caplog):
    data, table, out = tmp_path / "talks.jsonl", tmp_path / "table.csv", tmp_path / "run"
    out.mkdir()
    for file in (data, table):
        file.write_text("one\n")
    settings = {
        "method": "sft",
        "model": "tiny:lookup",
        "env": {"id": "opd/Lookup-v0", "kwargs": {"names": [{"path": str(table)}], "word": "sft"}},
        "sft": {"source": "file", "file": str(data)},
    }
    config = config_from(settings, check_machine=False)
    write_taken(config, out)
    assert {name: row["file"] for name, row in read_taken(out).items()} == {
        "env.kwargs.names.0.path": str(table),
        "sft.file": str(data),
    }
    warn_of_changes(config, out)
    assert caplog.text == ""
    data.write_text("another\n")
    warn_of_changes(config, out)
    assert f"sft.file: talks.jsonl ({data}) has changed since this run used it" in caplog.text
    assert "table.csv" not in caplog.text
