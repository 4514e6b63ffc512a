"""The look-up agent: its database withstands strangers, and its questions have the answers that it expects."""

import json
import resource
import threading
import time

import pytest

from opd.envs.worlds import sql_database
from opd.envs.worlds.sql import LEVELS, SqlEnv, _is_same_answer
from opd.envs.worlds.sql_database import Database, quote, show
from opd.errors import ConfigError, DataError


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def wrong(env):
    return call("answer", value=f"{env.expected}9")


@pytest.fixture
def database():
    made = Database()
    made.create("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT)")
    made.fill("t", [(1, "naïve 漢字"), (2, "b"), (3, None)])
    yield made
    made.close()


# -- the database -------------------------------------------------------------------------------------


def test_a_select_gives_names_and_rows(database):
    result = database.query("SELECT id, name FROM t ORDER BY id")
    assert show(result) == "id | name\n1 | naïve 漢字\n2 | b\n3 | NULL"
    assert show(database.query("SELECT id FROM t WHERE id > 9")) == "id\n[no rows]"


def test_rows_beyond_the_limit_are_cut_with_a_notice(database):
    assert show(database.query("SELECT id FROM t", max_rows=2)) == "id\n1\n2\n[only the first 2 rows are shown]"
    assert not database.query("SELECT id FROM t", max_rows=3).more


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (4, 'x')",
        "UPDATE t SET name = 'x'",
        "DELETE FROM t",
        "WITH x AS (SELECT 1) DELETE FROM t",
        "DROP TABLE t",
        "CREATE TABLE u (a)",
        "CREATE TEMP TABLE u (a)",
        "CREATE VIEW v AS SELECT 1",
        "ALTER TABLE t RENAME TO u",
        "REPLACE INTO t VALUES (1, 'x')",
        "ATTACH 'stolen.db' AS x",
        "DETACH main",
        "VACUUM INTO 'stolen.db'",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(t)",
        "SELECT * FROM pragma_table_info('t')",
        "BEGIN",
        "COMMIT",
        "SAVEPOINT a",
        "ANALYZE",
        "REINDEX t",
        "SELECT load_extension('x')",
        "SELECT readfile('/etc/passwd')",
        "SELECT randomblob(9)",
        "SELECT random()",
        "SELECT zeroblob(9)",
        "SELECT printf('%1000000d', 1)",
        "SELECT date('now')",
        "SELECT CURRENT_TIMESTAMP",
        "SELECT 1; SELECT 2",
        "",
        "-- nothing",
        "this is no SQL",
        "SELECT '\0'",
        "SELECT '\ud83d'",
        "SELECT nothing FROM t",
        "SELECT " + "(" * 900 + "1" + ")" * 900,
        "SELECT 1 -- " + "x" * 5000,
        "SELECT sum(9223372036854775807) FROM t",
    ],
)
def test_everything_but_reading_is_refused_in_words_and_changes_nothing(database, sql, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = database.query("SELECT * FROM t").rows
    with pytest.raises(DataError, match=r"\w"):
        database.query(sql)
    assert database.query("SELECT * FROM t").rows == before
    assert database.query("SELECT count(*) FROM sqlite_master").rows == [(1,)]
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_says_what_is_allowed(database):
    with pytest.raises(DataError, match="not authorized; only SELECT is allowed"):
        database.query("DROP TABLE t")


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"


@pytest.mark.parametrize(
    "sql",
    [
        f"{ENDLESS} SELECT count(*) FROM c",
        f"{ENDLESS} SELECT x FROM c ORDER BY x DESC",
        f"{ENDLESS} SELECT replace('{'a' * 40}', 'a', '{'b' * 40}') || x FROM c ORDER BY 1",
        f"{ENDLESS} SELECT group_concat(x) FROM c",
        "SELECT count(*) FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k, t l, t m, t n, t o",
        "WITH RECURSIVE c(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM c) SELECT max(length(x)) FROM c",
    ],
)
def test_a_runaway_query_ends_soon_and_small(database, sql):
    since, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"the query takes too long|string or blob too big"):
        database.query(sql)
    assert time.monotonic() - since < 20  # a fraction of a second on a quiet machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert database.query("SELECT id FROM t WHERE id = 1").rows == [(1,)]


def test_the_work_of_a_query_is_limited_whatever_the_clock_says(database):
    database.time_limit = 1e9
    with pytest.raises(DataError, match="takes too long"):
        database.query(f"{ENDLESS} SELECT count(*) FROM c")


def test_the_time_of_a_query_is_limited_whatever_its_work(database, monkeypatch):
    monkeypatch.setattr(sql_database, "MOST_STEPS", 10**18)
    database.time_limit = 0.05
    since = time.monotonic()
    with pytest.raises(DataError, match="takes too long"):
        database.query(f"{ENDLESS} SELECT count(*) FROM c")
    assert time.monotonic() - since < 10


def test_bytes_that_are_no_text_are_shown_all_the_same(database):
    assert show(database.query("SELECT CAST(x'ff' AS TEXT) a, x'ff01' b")) == "a | b\n\ufffd | x'ff01'"


def test_a_database_may_be_used_from_another_thread(database):
    found = []
    thread = threading.Thread(target=lambda: found.append(database.query("SELECT count(*) FROM t").rows))
    thread.start()
    thread.join()
    assert found == [[(3,)]]


def test_the_columns_that_a_query_used_are_remembered_by_their_real_names(database):
    database.query("SELECT u.id FROM (SELECT id, name FROM t AS v WHERE v.name = 'b') AS u")
    assert {("t", "id"), ("t", "name")} <= database.read


@pytest.mark.parametrize(("value", "text"), [(3, "3"), ("a", "'a'"), ("d'Or", "'d''Or'")])
def test_values_are_quoted_as_sql_writes_them(value, text):
    assert quote(value) == text


# -- the environment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["train", "eval", "warm"])
def test_the_oracle_is_rewarded_at_its_answer_and_not_before(level, split):
    env = SqlEnv(level=level)
    for index in range(8):
        env.reset(seed=index, options={"split": split, "index": index})
        query, answer = env.oracle()
        text, reward, terminated, truncated, info = env.step(query)
        assert str(env.expected) == text.split("\n")[1]
        assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
        _, reward, terminated, truncated, info = env.step(answer)
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
        assert "feedback" not in info
    env.close()


def test_the_question_is_asked_below_the_tables_by_the_names_of_this_database():
    names = set()
    for seed in range(12):
        env = SqlEnv(level=2)
        _, info = env.reset(seed=seed)
        schema, _, asked = info["messages"][1]["content"].partition("\n\n")
        assert len(schema.split("\n")) == 5
        assert asked.endswith(("?", "? Round to two decimals."))
        listed = env.database.query("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").rows
        assert schema.split("\n") == [sql for (sql,) in listed]
        names |= {line.split()[2] for line in schema.split("\n")}
        env.close()
    assert len(names) > 15


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_has_its_joins_and_conditions(level):
    env = SqlEnv(level=level)
    for seed in range(10):
        _, info = env.reset(seed=seed)
        query = info["privileged"]["solution"]
        assert query.count(" JOIN ") == LEVELS[level].joins
        assert query.count(" AND ") == LEVELS[level].filters - 1
        plan = info["privileged"]["plan"].split("\n")
        assert [line.split()[0] for line in plan[:-1]] == ["start"] + ["join"] * query.count(" JOIN ") + [
            "keep"
        ] * LEVELS[level].filters
    env.close()


def test_levels_are_mixed_evenly_by_index():
    env = SqlEnv(level=[1, 3])
    joins = []
    for index in range(6):
        env.reset(seed=index, options={"split": "eval", "index": index})
        joins.append(len(env.question.joins()))
    assert joins == [0, 2] * 3
    env.close()


def test_the_conditions_of_a_question_matter():
    env = SqlEnv(level=3)
    for seed in range(20):
        env.reset(seed=seed)
        careless, _, _ = env.question.query(env.schema).partition(" WHERE ")
        if env.question.how != "most":
            assert env.database.query(careless).rows[0][0] != env.expected
    env.close()


def test_the_most_is_never_shared_by_two():
    env, seen = SqlEnv(level=3), 0
    for seed in range(200):
        env.reset(seed=seed)
        if env.question.how != "most":
            continue
        seen += 1
        sizes = [size for (size,) in env.database.query(env.question.group_sizes(env.schema)).rows]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes.count(sizes[0]) == 1
    assert seen > 3
    env.close()


def test_no_question_is_in_two_splits():
    asked = {}
    env = SqlEnv(level=[1, 2, 3, 4])
    for split in ("train", "eval", "warm"):
        for seed in range(100):
            _, info = env.reset(seed=seed, options={"split": split, "index": seed})
            asked.setdefault(split, set()).add(info["messages"][1]["content"].partition("\n\n")[2])
    assert all(len(questions) > 60 for questions in asked.values())
    assert not asked["train"] & asked["eval"]
    assert not asked["train"] & asked["warm"]
    assert not asked["eval"] & asked["warm"]
    env.close()


def test_feedback_names_the_columns_that_were_never_used():
    env = SqlEnv(level=2)
    env.reset(seed=1)
    needed = env.question.needed(env.schema)
    *_, info = env.step(wrong(env))
    unused = ", ".join(sorted(f"{table}.{column}" for table, column in needed))
    assert info["feedback"] == f"Wrong answer: no query has used {unused}."
    env.reset(seed=1)
    env.step(env.oracle()[0])
    *_, info = env.step(wrong(env))
    assert info["feedback"] == "Wrong answer: the right columns were read, but not in this way."
    env.close()


def test_a_query_that_fails_is_told_why_and_the_episode_goes_on():
    env = SqlEnv()
    env.reset(seed=0)
    text, reward, terminated, _, info = env.step(call("query", sql="SELECT missing"))
    assert text == info["feedback"] == "Error: no such column: missing"
    assert (reward, terminated) == (0.0, False)
    assert env.step(env.oracle()[1])[1] == 1.0
    env.close()


def test_results_are_cut_to_the_rows_that_were_asked_for():
    env = SqlEnv(max_rows=2)
    env.reset(seed=0)
    text = env.step(call("query", sql=f"SELECT id FROM {env.schema.table('city')}"))[0]
    assert text == "id\n1\n2\n[only the first 2 rows are shown]"
    env.close()


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("12", 12, True),
        (" 12.0 ", 12, True),
        ("1,200", 1200, True),
        ("12.346", 12.35, True),
        ("12.36", 12.35, False),
        ("13", 12, False),
        ("twelve", 12, False),
        ("nan", 12, False),
        ("inf", 12, False),
        ("", 12, False),
        (" lima", "Lima", True),
        ("Lima!", "Lima", False),
    ],
)
def test_answers_are_compared_as_numbers_or_names(given, expected, right):
    assert _is_same_answer(given, expected) == right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 5}, "level = 5 must be one or more of: 1, 2, 3, 4"),
        ({"level": []}, r"level = \[\] must be one or more of"),
        ({"max_rows": 0}, "max_rows = 0 must be 1 or more"),
        ({"time_limit": 0}, r"time_limit = 0 above 0 \(seconds\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SqlEnv(**options)


def test_an_environment_reset_in_one_thread_may_be_stepped_and_closed_in_others():
    env, answers = SqlEnv(), []
    env.reset(seed=0)
    for work in (lambda: answers.append(env.step(env.oracle()[0])[0]), env.close):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert str(env.expected) in answers[0]
