"""Rows of a table become single-turn tasks; splits stay disjoint; settings that do not fit are named."""

import json
import logging

import pytest

from opd.envs.dataset_env import DatasetEnv
from opd.envs.tables import checked_prompt, load_dataset
from opd.errors import ConfigError, DataError, EnvError


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(i):
    return {"question": f"What is {i} + {i}, é?", "answer": str(2 * i), "proof": f"twice {i} is {2 * i}"}


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "sums.jsonl", [row(i) for i in range(100)])


def make(path, **kwargs):
    defaults = {"prompt_column": "question", "rewards": ["number_match"], "privileged_columns": {"solution": "proof"}}
    return DatasetEnv(path, **{**defaults, **kwargs})


def prompts(env, split):
    number = env.metadata["tasks"][split]
    return [env.reset(seed=0, options={"split": split, "index": i})[0] for i in range(number)]


def test_a_row_is_a_task(table):
    env = make(table, system="Be brief.")
    obs, info = env.reset(seed=0, options={"split": "train", "index": 0})
    i = int(obs.split()[2])
    assert obs == row(i)["question"]
    assert info["privileged"] == {"solution": row(i)["proof"]}
    assert info["messages"][0] == {"role": "system", "content": "Be brief."}
    _, reward, terminated, truncated, info = env.step(f"It is {2 * i}.")
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert "feedback" not in info


def test_a_wrong_answer_gets_feedback(table):
    env = make(table)
    env.reset(seed=0)
    _, reward, _, _, info = env.step("It is -1.")
    assert (reward, info["success"]) == (0.0, False)
    assert info["feedback"] == "The answer scored 0; 1 is needed (number_match: 0)."


def test_without_an_eval_split_a_share_of_the_prompts_is_held_out(table, caplog):
    with caplog.at_level(logging.WARNING):
        env = make(table, held_out=0.2)
    assert caplog.text == ""  # nothing is lost
    train, held = prompts(env, "train"), prompts(env, "eval")
    assert len(train) + len(held) == 100
    assert not set(train) & set(held)
    assert 10 <= len(held) <= 30


def test_what_is_held_out_depends_on_the_prompt_alone(table, tmp_path):
    turned = write(tmp_path / "turned.jsonl", [row(i) | {"proof": "other"} for i in reversed(range(100))])
    assert set(prompts(make(table), "eval")) == set(prompts(make(turned), "eval"))


def test_a_prompt_that_stands_twice_is_in_one_split_only(tmp_path):
    doubled = write(tmp_path / "doubled.jsonl", [row(i % 50) for i in range(100)])
    env = make(doubled)
    assert not set(prompts(env, "train")) & set(prompts(env, "eval"))
    assert len(prompts(env, "train")) % 2 == 0


def test_rows_of_eval_are_dropped_from_train_and_counted(tmp_path, caplog):
    files = {
        "train": write(tmp_path / "train.jsonl", [row(i) for i in range(10)]),
        "eval": write(tmp_path / "eval.jsonl", [row(i) for i in range(8, 12)]),
    }
    with caplog.at_level(logging.WARNING):
        env = make(files)
    assert env.metadata["tasks"] == {"eval": 4, "train": 8}
    assert "the train split: dropped 2 rows whose prompt is in another split too" in caplog.text


def test_an_index_addresses_a_row_and_a_seed_draws_one(table):
    env = make(table)
    by_index = prompts(env, "train")
    assert by_index == prompts(make(table), "train")
    drawn = [env.reset(seed=seed)[0] for seed in range(30)]
    assert drawn == [make(table).reset(seed=seed)[0] for seed in range(30)]
    assert len(set(drawn)) > 15
    assert set(drawn) <= set(by_index)


@pytest.mark.parametrize("index", [-1, 100])
def test_an_index_outside_the_split_is_refused(table, index):
    env = make(table)
    with pytest.raises(EnvError, match=f"index {index} is outside the train split, which has \\d+ rows"):
        env.reset(seed=0, options={"split": "train", "index": index})


def test_the_metadata_of_one_environment_is_not_anothers(table, tmp_path):
    small = make(write(tmp_path / "small.jsonl", [row(i) for i in range(40)]))
    assert sum(small.metadata["tasks"].values()) == 40
    assert sum(make(table).metadata["tasks"].values()) == 100
    assert "tasks" not in DatasetEnv.metadata


def test_a_prompt_of_messages_stays_messages(tmp_path):
    chat = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "1+1?"}]
    path = write(tmp_path / "chat.jsonl", [{"prompt": [*chat, {"role": "user", "content": str(i)}]} for i in range(30)])
    seen = []

    def spy(prompts, completions):
        seen.append((prompts, completions))
        return [1.0]

    env = DatasetEnv(path, rewards=[spy])
    _, info = env.reset(seed=0)
    assert info["messages"][:2] == chat
    env.step("2")
    assert seen == [([info["messages"]], [[{"role": "assistant", "content": "2"}]])]


@pytest.mark.parametrize(("conversational", "form"), [(False, str), (True, list)])
def test_reward_functions_get_the_form_of_the_prompts_or_messages_if_asked(table, conversational, form):
    def check_form(prompts, completions):
        return [float(isinstance(prompts[0], form) and isinstance(completions[0], form))]

    env = make(table, rewards=[check_form], conversational=conversational)
    env.reset(seed=0)
    assert env.step("hello")[1] == 1.0


def test_a_reward_of_trl_scores_string_prompts_when_conversational(table):
    env = make(table, rewards={"trl.rewards:think_format_reward": 0.5, "number_match": 1.0}, conversational=True)
    obs, _ = env.reset(seed=0)
    right = 2 * int(obs.split()[2])
    _, reward, *_, info = env.step(f"<think>easy</think> {right}")
    assert (reward, info["success"]) == (1.5, True)
    env.reset(seed=0)
    _, reward, *_, info = env.step("<think>easy</think> none")
    assert (reward, info["success"]) == (0.5, False)
    assert info["feedback"] == (
        "The answer scored 0.5; 1 is needed (trl.rewards:think_format_reward: 1, number_match: 0)."
    )


def test_a_column_never_takes_the_place_of_what_the_model_wrote(tmp_path):
    rows = [{"prompt": str(i), "completions": "old", "prompts": "old", "completion_ids": [1]} for i in range(50)]

    def echo(prompts, completions, **columns):
        rest = {"trainer_state", "log_extra", "log_metric"}  # which are no columns
        return [float(completions == ["new"] and prompts[0].isdigit() and set(columns) == rest)]

    env = DatasetEnv(write(tmp_path / "old.jsonl", rows), rewards=echo)
    env.reset(seed=0)
    assert env.step("new")[1] == 1.0


def test_weights_that_only_nearly_add_up_still_succeed(table):
    env = make(table, rewards={(lambda completions: [1.0]): 1.0 - 1e-12})
    env.reset(seed=0)
    assert env.step("x")[4]["success"] is True


def test_the_threshold_decides_success(table):
    def half(completions):
        return [0.5]

    for threshold, success in ((0.5, True), (0.51, False)):
        env = make(table, rewards=[half], success_threshold=threshold)
        env.reset(seed=0)
        assert env.step("x")[4]["success"] is success


def test_the_answer_may_stand_in_a_column_of_another_name(tmp_path):
    path = write(tmp_path / "named.jsonl", [{"prompt": str(i), "target": i} for i in range(50)])
    env = DatasetEnv(path, rewards=["number_match"], answer_column="target")
    obs, _ = env.reset(seed=0)
    assert env.step(obs)[1] == 1.0
    with pytest.raises(ConfigError, match=r"reward number_match needs the column 'answer'\. There are: target"):
        DatasetEnv(path, rewards=["number_match"])


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        (
            {"prompt_column": "questions"},
            r"prompt_column: .*sums.jsonl has no column 'questions'. Its columns: question, answer, proof. "
            r'Did you mean "question"\?',
        ),
        ({"privileged_columns": {"solution": "prof"}}, r"privileged_columns.solution: .*Did you mean \"proof\"\?"),
        ({"answer_column": "anwser"}, r"answer_column: .*Did you mean \"answer\"\?"),
        ({"rewards": ["exact_mtch"]}, r"Did you mean \"exact_match\"\?"),
        ({"held_out": 0.0}, "held_out = 0.0 must be a share between 0 and 1"),
        ({"splits": {"train": "train"}}, "name and splits are for data sets; for files write path"),
    ],
)
def test_settings_that_do_not_fit_the_table_are_named(table, kwargs, reason):
    with pytest.raises(ConfigError, match=reason):
        make(table, **kwargs)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere.jsonl", "there is no file 'nowhere.jsonl'"),
        ("./nowhere", "there is no file or folder './nowhere'"),
        ("tasks.tsv", "'tasks.tsv' cannot be read as a file of rows; allowed endings: .jsonl"),
        ("data/tasks.jsonl.gz", "cannot be read as a file of rows; allowed endings: .jsonl"),
        ({"train": "x.txt"}, "'x.txt' cannot be read as a file of rows; allowed endings: .jsonl"),
        ({"eval": "x.jsonl"}, "path names no train split"),
        ({"train": "x.jsonl", "test": "y.jsonl"}, "there is no split 'test'; allowed: train, eval, warm"),
    ],
)
def test_a_table_that_does_not_exist_is_named(path, reason):
    with pytest.raises(ConfigError, match=reason):
        make(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"question": "a"}\n{"question": \n', "line 2: not JSON"),
        ('{"question": "a"}\n\n[1]\n', "line 3: a row must be a JSON object, not list"),
        ("\n", "has no rows"),
        ('{"question": "é"}', "line 1, byte 15: 0xe9 is not UTF-8"),
        ('\n{"question": " ", "proof": "x", "answer": 1}', "line 2, question: there is nothing in this column"),
    ],
)
def test_a_damaged_file_is_told_by_line(tmp_path, text, reason):
    path = tmp_path / "damaged.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=reason):
        make(str(path))


def test_a_split_without_rows_is_refused(tmp_path):
    path = write(tmp_path / "one.jsonl", [row(1)])
    with pytest.raises(DataError, match=r"the eval split has no rows: .*one\.jsonl has 1, of which held_out = 0\.1"):
        make(path)
    both = {"train": write(tmp_path / "a.jsonl", [row(i) for i in range(5)]), "eval": str(tmp_path / "a.jsonl")}
    with pytest.raises(DataError, match=r"the train split has no rows: all 5 of .*a\.jsonl stand in another split too"):
        make(both)


def test_of_few_rows_one_is_held_out_and_the_same_one_when_others_join(tmp_path):
    for count in range(2, 12):
        env = make(write(tmp_path / f"{count}.jsonl", [row(i) for i in range(count)]), held_out=1e-9)
        assert env.metadata["tasks"] == {"eval": 1, "train": count - 1}
        assert not set(prompts(env, "train")) & set(prompts(env, "eval"))
    assert len({tuple(prompts(make(str(tmp_path / f"{n}.jsonl"), held_out=1e-9), "eval")) for n in (9, 10, 11)}) < 3


@pytest.mark.parametrize("alike", [True, False])
def test_a_table_whose_rows_share_one_prompt_is_split_by_row_and_says_so(tmp_path, caplog, alike):
    rows = [row(0) | {"question": "Begin.", "answer": "1" if alike else str(i)} for i in range(200)]
    kwargs = {"rewards": ["exact_match"], "privileged_columns": {}}
    with caplog.at_level(logging.WARNING):
        env = make(write(tmp_path / "same.jsonl", rows), **kwargs)
    tasks = env.metadata["tasks"]
    assert tasks["train"] + tasks["eval"] == 200
    assert 10 <= tasks["eval"] <= 30
    assert "200 rows have one prompt between them, so splits are kept apart by row, and share prompts" in caplog.text
    answers = {split: [row["answer"] for row in env._rows[split]] for split in tasks}
    if not alike:
        assert not set(answers["train"]) & set(answers["eval"])
        turned = make(write(tmp_path / "turned.jsonl", rows[::-1]), **kwargs)
        assert {row["answer"] for row in turned._rows["eval"]} == set(answers["eval"])
    assert len({id(row) for split in tasks for row in env._rows[split]}) == 200


def test_tables_of_one_prompt_that_are_given_for_each_split_keep_their_rows(tmp_path, caplog):
    files = {
        split: write(tmp_path / f"{split}.jsonl", [row(0) | {"question": "Begin.", "answer": str(i)} for i in numbers])
        for split, numbers in {"train": range(20), "eval": range(18, 25)}.items()
    }
    env = make(files)
    assert env.metadata["tasks"] == {"eval": 7, "train": 18}
    assert "share prompts" in caplog.text
    assert "dropped 2 rows" in caplog.text


@pytest.mark.parametrize("prompt", [None, 3, [], ["text"], [{"role": "user"}]])
def test_a_prompt_that_is_no_text_is_refused_by_row(tmp_path, prompt):
    files = {
        "train": write(tmp_path / "train.jsonl", [{"question": prompt, "answer": "1", "proof": ""}]),
        "eval": write(tmp_path / "eval.jsonl", [row(1)]),
    }
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 1, question: a prompt must be a string or a list of messages"
    ):
        make(files)


@pytest.mark.parametrize(
    ("part", "medium"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "image_url"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "input_audio"),
        ({"type": "video"}, "video"),
    ],
)
def test_a_prompt_with_an_image_or_sound_is_refused_by_its_place(part, medium):
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]},
    ]
    with pytest.raises(DataError, match=rf"the prompt's messages\[1\] holds '{medium}'"):
        checked_prompt(asked, where="question, train 0")


@pytest.mark.parametrize("partial", [row(2) | {"proof": None}, row(2) | {"proof": " "}, {"question": "2?"}])
def test_a_row_without_privileged_text_is_refused(tmp_path, partial):
    files = {
        "train": write(tmp_path / "train.jsonl", [row(3), partial]),
        "eval": write(tmp_path / "eval.jsonl", [row(1)]),
    }
    with pytest.raises(DataError, match=r"train\.jsonl, line 2, proof: there is nothing in this column"):
        make(files)


def test_an_answer_that_is_asked_for_and_missing_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1?", "target": "1"}, {"prompt": "2?", "target": None}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, target: there is nothing in this column"):
        DatasetEnv(path, rewards=["exact_match"], answer_column="target")


def test_nulls_that_arrow_fills_into_messages_are_no_keys_of_theirs(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    calling = [{"role": "user", "content": "x", "name": None}, {"role": "tool", "content": "y", "name": "look"}]
    rows = [{"prompt": [{"role": "user", "content": str(i)}, *calling]} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    _, info = DatasetEnv(str(tmp_path / "a.parquet"), rewards=[lambda completions: [1.0]]).reset(seed=0)
    assert [list(message) for message in info["messages"]] == [["role", "content"]] * 2 + [["role", "content", "name"]]


def test_cells_of_csv_reach_rewards_as_text_or_as_their_columns_type(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\ufeffprompt,answer,age\n" + "".join(f"{n}?,00{n},\n" for n in range(20)) + "NA,None,3\n")
    seen = []

    def spy(completions, answer, age):
        seen.append((answer[0], age[0]))
        return [1.0]

    for columns in (None, {"age": "int"}):
        env = DatasetEnv(str(path), rewards=[spy], columns=columns)
        for split, count in env.metadata["tasks"].items():
            for index in range(count):
                env.reset(seed=0, options={"split": split, "index": index})
                env.step("x")
    assert set(seen[:21]) == {*((f"00{n}", "") for n in range(20)), ("None", "3")}
    assert set(seen[21:]) == {*((f"00{n}", None) for n in range(20)), ("None", 3)}


def test_a_folder_of_csv_is_read_as_a_file_is(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.csv").write_text("\ufeffprompt,answer\nNone,007\nNA,008\n")
    tables = load_dataset(str(tmp_path / "tables"), None)
    assert list(tables["train"].rows) == [{"prompt": "None", "answer": "007"}, {"prompt": "NA", "answer": "008"}]


def test_a_file_that_is_written_again_is_read_again(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(i) for i in range(20)])
    assert sum(make(path).metadata["tasks"].values()) == 20
    write(tmp_path / "a.jsonl", [row(i) for i in range(30)])
    assert sum(make(path).metadata["tasks"].values()) == 30


def test_other_formats_and_saved_data_sets_give_the_same_tasks(table, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([row(i) for i in range(100)])
    rows.to_csv(tmp_path / "sums.csv")
    rows.to_parquet(tmp_path / "sums.parquet")
    rows.save_to_disk(tmp_path / "saved")
    expected = prompts(make(table), "train")
    for path in ("sums.csv", "sums.parquet", "saved"):
        assert prompts(make(str(tmp_path / path)), "train") == expected


def test_the_splits_of_a_data_set_are_mapped_to_ours(tmp_path):
    import datasets

    parts = {"main": [row(i) for i in range(9)], "test": [row(i) for i in range(20, 24)]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    env = make(path, splits={"train": "main", "eval": "test"})
    assert env.metadata["tasks"] == {"eval": 4, "train": 9}
    with pytest.raises(ConfigError, match=r"has no split 'train'\. Its splits: main, test"):
        make(path)


def test_environments_of_one_table_share_its_rows(table):
    assert make(table)._rows is make(table)._rows
