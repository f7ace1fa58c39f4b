"""The commands of `experiments`, called in this process."""

import json

import pytest

import experiments
from experiments import list as list_command
from experiments import run as run_command
from experiments import sweep as sweep_command
from jaxrl_llm import train

PAGE = "tests/train/bandit_page.py"


@pytest.fixture(autouse=True)
def leave_the_cache_alone(monkeypatch):
    for module in (run_command, sweep_command):
        monkeypatch.setattr(module, "enable_compilation_cache", lambda folder: None)


def test_run_and_run_again(tmp_path, capsys):
    arguments = [f"--config={PAGE}:tiny", f"--workdir={tmp_path}", "--config.epochs=1"]
    assert run_command.main(arguments) == 0
    first = capsys.readouterr().out
    assert "train 4/4" in first and json.loads(first[first.index("{") :])["run"]["steps"] == 8
    assert run_command.main(arguments) == 0
    second = capsys.readouterr().out
    assert "is complete; its summary:" in second and second[second.index("{") :] == first[first.index("{") :]
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 1
    assert run_command.main([*arguments, "--config.steps=5"]) == 2
    assert "steps: 4 there, 5 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"--config={PAGE}:huge"], "unknown arm 'huge'; this config has small, tiny, big"),
        ([f"--config={PAGE}", "--config.stepz=3"], "no key 'stepz'; the nearest is 'steps'"),
        (["--config=nothing_of_that_name"], "no page has the slug 'nothing_of_that_name'"),
        (["--config=configs/agentic_search/nothing.py"], "no file"),
        ([f"--config={PAGE}", "--config.steps", "3"], "with an equals sign"),
        ([f"--config={PAGE}", "--processes=2", "--process=1"], "coordinator must be host:port"),
        ([f"--config={PAGE}", "--coordinator=localhost:1", "--processes=2", "--process=2"], "process=2 of processes=2"),
    ],
)
def test_bad_arguments_are_said_and_nothing_is_made(arguments, words, tmp_path, capsys):
    assert run_command.main([*arguments, f"--workdir={tmp_path / 'x'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_coordinator_that_does_not_answer_is_named():
    with pytest.raises(TimeoutError, match="the coordinator localhost:1 did not answer within 0.3 s"):
        train.start_processes("localhost:1", 2, 1, timeout=0.3)


def test_a_run_that_diverges_ends_with_its_reason(tmp_path, capsys):
    with pytest.warns(RuntimeWarning, match="was skipped"):
        code = run_command.main([f"--config={PAGE}", f"--workdir={tmp_path}", "--config.nan_from=4", "--quiet"])
    assert code == 1
    # Two updates an iteration: the fourth of them is the third step's second.
    assert (
        "updates in a row were not finite, the last at step 6 (gradient of params['head'])" in capsys.readouterr().err
    )


def test_sweep_writes_a_table_of_its_own_name(tmp_path, capsys):
    arguments = [
        f"{PAGE}:tiny",
        "--seeds=1",
        f"--out={tmp_path / 'out'}",
        f"--results={tmp_path / 'results'}",
        "--quiet",
    ]
    assert sweep_command.main([*arguments, "--config.steps=3"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "results" / "bandit_page"
    assert sorted(path.name for path in folder.iterdir()) == [f"main-tiny-steps=3.{e}" for e in ("json", "md", "png")]
    assert (folder / "main-tiny-steps=3.md").read_text() in out
    result = json.loads((folder / "main-tiny-steps=3.json").read_text())
    assert result["overrides"] == {"steps": "3"} and result["seeds"] == 1 and "--config.steps=3" in result["command"]
    assert (tmp_path / "out" / "bandit_page" / "main-tiny-steps=3" / "frozen" / "0" / "summary.json").exists()
    assert sweep_command.main([*arguments, "--table=other"]) == 2
    assert "has no table 'other'; it has main" in capsys.readouterr().err
    assert sweep_command.main([*arguments, "--arms=x"]) == 2
    assert sweep_command.main([*arguments, "--config.x=1"]) == 2


def test_list_describes_pages_and_survives_a_broken_one(tmp_path, capsys, monkeypatch):
    files = experiments.find_page(PAGE)
    assert (files.slug, files.family) == ("bandit_page", "train")
    entry = list_command.describe(files, results=tmp_path)
    assert entry["line"].startswith("A softmax bandit") and entry["kind"] == "algorithm"
    assert entry["tables"] == {"main": {"trained > frozen + 0.05": "not run", "frozen > trained": "not run"}}
    (tmp_path / "bandit_page").mkdir()
    table = {"claims": {"trained > frozen + 0.05": {"outcome": "holds"}}}
    (tmp_path / "bandit_page" / "main.json").write_text(json.dumps(table))
    entry = list_command.describe(files, results=tmp_path)
    assert entry["tables"]["main"] == {"trained > frozen + 0.05": "holds", "frozen > trained": "not run"}
    assert list_command.status(entry["tables"]) == "main: 1 held, 1 not run"
    counts = list_command.count_outcomes([entry, entry | {"needs_scale": ["a 7B model"]}])
    assert dict(counts) == {"held": 2, "did not hold": 0, "undecided": 0, "not run": 2, "not reproducible small": 1}

    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    other = experiments.PageFiles("broken", "x", broken, broken)
    assert "cannot be imported: ModuleNotFoundError" in list_command.describe(other)["line"]

    monkeypatch.setattr(list_command, "all_pages", lambda: [files, other])
    assert list_command.main(["--json", "--family=train"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["slug"] for entry in entries] == ["bandit_page"]
    assert {"slug", "kind", "page", "config", "tables"} <= entries[0].keys()
    assert list_command.main([]) == 0
    assert "cannot be imported" in capsys.readouterr().out
    assert list_command.main(["--family=none"]) == 2


def test_readmes_hold_the_outcomes_that_are_there():
    entries = list_command.all_entries()
    for path, text in list_command.tables_to_write(entries).items():
        assert path.read_text() == text, "renew it: python -m experiments.list --write"
    surveys = {entry["slug"] for entry in entries if entry["kind"] == "survey"}
    assert {"technical_survey_rl_llm", "survey_100_days_r1", "rft_mllm_position", "roadmap_o1"} <= surveys


def test_pages_of_the_checkout_have_what_a_page_needs():
    for files in experiments.all_pages():
        page = experiments.load_page(files)
        assert page.__doc__, files
        assert experiments.find_page(files.slug) == files
        assert experiments.find_page(files.config.as_posix()) == files
        assert experiments.find_page(".".join(files.page.with_suffix("").parts)) == files
