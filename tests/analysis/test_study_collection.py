"""A page of experiments: every figure is one of the result, and what people wrote around it stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train.analysis.study_collection import BEGIN, END, collected, pictures
from kha_train.cli.main import run
from kha_train.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """`made(name, **changed)`: the file of a result of two arms."""

    def write(name: str, **changed: Any) -> Path:
        def measure(kind: str) -> dict[str, Any]:
            return {"name": kind, "kind": kind, "larger_is_better": False, "tokens": 0.0}

        def arm(reference: str | None, mean: float, seeds: list[int]) -> dict[str, Any]:
            interval = {"mean": mean, "low": mean - 0.25, "high": mean + 0.25, "seeds": 3}
            own = {"means": {"train_loss": mean, "spikes": 4.0}, "intervals": {"train_loss": interval, "spikes": None}}
            rest = {"reference": reference, "rate": 0.002, "rate_at_edge": reference is not None, "diverged": 0}
            return rest | own | {"seeds": seeds, "values": {"train_loss": {"0": 1.0, "1": "inf"}, "spikes": {}}}

        result = {
            "study": name, "scale": "cpu", "question": "Which?", "source": "a paper", "not_shown": "anything else",
            "command": f"kha study run {name} --local", "began": 86400.0, "ended": 2 * 86400.0, "seconds": 61.0,
            "trials": 8, "study_sha256": "ab" * 32, "commits": ["cd" * 20 + " with changes"],
            "data_content_ids": ["ef" * 32], "machines": ["Linux, 2 processors"], "complete": True,
            "measures": [measure("train_loss"), measure("spikes")], "rates": "chosen elsewhere",
            "arms": {"base": arm(None, 2.5, [0, 1]), "mlp": arm("base", 1.5, [1, 2])},
            "comparisons": [{"arm": "mlp", "reference": "base", "measure": "train_loss", "differences": {"1": -1.0},
                             "interval": {"mean": -1.0, "low": -2.0, "high": -0.5}, "better": 1, "worse": 0,
                             "sign_test": 1.0, "sentence": "mlp - base, train_loss: -1 [-2, -0.5] over 3 seeds"}],
            "published": [{"what": "table 9", "arm": "mlp", "value": 1.25, "better_than": "", "ours": "loss 1.5"}],
            "caveats": ["an edge"], "sentence": "3 seeds; it is lower.", "further": "kept for later",
        }  # fmt: skip
        (tmp_path / "results").mkdir(exist_ok=True)
        file = tmp_path / "results" / f"{name}.json"
        file.write_text(json.dumps(result | changed))
        return file

    return write


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "page.md").write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nby hand\n")
    return tmp_path / "page.md"


def test_a_section_has_question_command_origin_figures_and_the_sentence(made: Made, page: Path) -> None:
    text = collected(page, [made("one")])
    for words in (
        "## 3 January 1970: the study `one`, scale cpu (one)\n", "**Question.** Which? (a paper)",
        "3 seeds; it is lower.",
        "**What it does not show**: anything else.", "```sh\n# needs hours\nkha study run one --local\n```",
        "8 trials, whose times add up to 1:01; 2 arms, seeds 0, 1, 2.",
        "On Linux, 2 processors. Code commit `cdcdcdcdcdcd` with changes,",
        "with changes, study's file `abababababab`, data `efefefefefef`.", "[one.json](results/one.json)",
        "| base | - | 0.002 | 0 | 2.5 [2.25, 2.75] | 4 |", "| mlp | base | 0.002 (edge) | 0 | 1.5 [1.25, 1.75] | 4 |",
        "| mlp - base | 1 | **-1 [-2, -0.5]** | - |", "- an edge",
        "| table 9 | mlp | 1.25 | loss 1.5 |",
    ):  # fmt: skip
        assert words in text, words
    assert text.startswith("# Mine\n\n") and text.endswith("\n\nby hand\n") and "\nold\n" not in text
    assert "changed since" not in text, "no study of this name is shipped"


def test_a_table_of_verdicts_leads_to_every_section(made: Made, page: Path) -> None:
    text = collected(page, [made("two"), made("one")])
    table, _, sections = text.partition("\n## ")
    rows = [line for line in table.splitlines() if line.startswith("| [")]
    assert rows == [
        f"| [{name}](#3-january-1970-the-study-{name}-scale-cpu-{name}) | Which? "
        "| 1 of 1 arms differ in train_loss (1 seed): mlp - base -1 |"
        for name in ("one", "two")
    ]
    assert "3 January 1970: the study `one`, scale cpu (one)\n" in sections


def test_rates_are_shown_where_there_was_a_choice(made: Made, page: Path) -> None:
    file = made("one", rate_measure="train_loss")
    assert "at rate" not in collected(page, [file])
    result = json.loads(file.read_text())
    result["arms"]["mlp"]["by_rate"] = {"0.004": {"7": 1.5, "8": 2.5}, "0.0005": {"7": "inf"}}
    file.write_text(json.dumps(result))
    assert (
        "| train_loss at rate | 0.0005 | 0.004 |\n| --- | --- | --- |\n| base | - | - |\n| mlp | inf | 2 |"
        in collected(page, [file])
    )


def test_a_difference_is_bold_only_where_it_is_shown(made: Made, page: Path) -> None:
    both = [{"mean": 0.5, "low": -0.5, "high": 1.5}, None]
    fields = {
        "arm": "mlp",
        "reference": "base",
        "differences": {"1": 1, "2": 0},
        "better": 6,
        "worse": 0,
        "sentence": "",
    }
    compared = [
        fields | {"measure": measure, "interval": interval, "sign_test": 0.031}
        for measure, interval in zip(("train_loss", "spikes"), both, strict=True)
    ]
    text = collected(page, [made("one", comparisons=compared)])
    assert "| mlp - base | 2 | +0.5 [-0.5, +1.5] | **6 better, 0 worse, p 0.031** |" in text


def test_a_mean_that_is_not_finite_says_of_how_many_seeds(made: Made, page: Path) -> None:
    file = made("one")
    result = json.loads(file.read_text())
    result["arms"]["base"] |= {"means": {"train_loss": "inf"}, "intervals": {}}
    file.write_text(json.dumps(result))
    assert "| base | - | 0.002 | 0 | inf (1 of 2 finite) | - |" in collected(page, [file])


def test_results_as_they_were_written_are_called_by_their_directories(made: Made, page: Path) -> None:
    file = made("position").rename(page.parent / "result.json")
    (page.parent / "mine").mkdir()
    file = file.rename(page.parent / "mine" / "result.json")
    assert list(pictures(page, [file])) == [page.parent / "pictures" / "mine.svg"]
    assert "the study `position`, scale cpu (mine)" in collected(page, [file])


def test_results_of_different_versions_of_the_code_are_marked_at_the_top(made: Made, page: Path) -> None:
    both = [made("one", code_sha256=["12" * 32]), made("two", code_sha256=["34" * 32])]
    assert "not of one version of the code**: 2 versions of the code (`121212121212`, `343434343434`)." in collected(
        page, both
    )
    assert "one version of `kha_train/` and `configs/`: `121212121212`." in collected(page, both[:1])
    assert "without a recorded hash (three)." in collected(page, [both[0], made("three")])
    assert "without a recorded hash (four)." in collected(page, [made("four", code_sha256=["12" * 32, None])])


def test_the_newest_is_first_and_a_second_time_changes_nothing(made: Made, page: Path) -> None:
    files = [made("old", ended=86400.0), made("new", ended=9 * 86400.0), made("unknown", ended=None)]
    text = collected(page, files)
    places = [text.index(f"the study `{name}`") for name in ("new", "old", "unknown")]
    assert places == sorted(places)
    page.write_text(text)
    assert collected(page, list(reversed(files))) == text


def test_a_page_that_does_not_exist_is_made_with_its_marks(made: Made, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["study", "collect", str(made("one")), "--page", str(tmp_path / "new.md")])
    text = (tmp_path / "new.md").read_text()
    assert not ended.value.code and text.startswith(f"{BEGIN}\n") and text.endswith(f"{END}\n")
    assert collected(tmp_path / "new.md", [made("one")]) == text


def test_a_study_whose_file_has_changed_says_so(made: Made, page: Path) -> None:
    assert "The study's file has changed since." in collected(page, [made("copy")])


def test_what_cannot_be_collected_is_refused_and_the_page_stays(made: Made, page: Path, tmp_path: Path) -> None:
    for file, error, words in (
        (tmp_path / "none.json", ConfigError, "no such file"),
        (made("half", complete=False), ConfigError, "not complete"),
        (made("odd", arms=[]), DataError, "an object"),
    ):
        with pytest.raises(error, match=words):
            collected(page, [file])
    file = made("one")
    page.write_text(f"{BEGIN}\n")
    with pytest.raises(ConfigError, match="no place for results"):
        collected(page, [file])
    with pytest.raises(SystemExit) as ended:
        run(["study", "collect", str(file), "--page", str(page)])
    assert ended.value.code == 2 and page.read_text() == f"{BEGIN}\n"


def test_the_page_of_experiments_is_what_its_results_make(tmp_path: Path) -> None:
    """After a new result: `kha study collect docs/results/*.json --page docs/experiments.md`."""
    page, files = ROOT / "docs" / "experiments.md", sorted((ROOT / "docs" / "results").glob("*.json"))
    assert files and collected(page, files) == page.read_text()
    for place, svg in pictures(page, files).items():
        assert place.read_text() == svg
    for file in files:
        assert '"/' not in file.read_text(), "a path of one machine"
