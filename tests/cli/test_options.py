"""Options in the style of other programs: `--steps 100` is refused, and `run.steps=100` is suggested."""

from __future__ import annotations

import pytest

from kha_train.cli.main import run

TYPED = {
    "--steps 100": "run.steps=100",
    "--steps=100": "run.steps=100",
    "--run.steps 100": "run.steps=100",
    "--run.steps=100": "run.steps=100",
    "--max-steps 100": "run.steps=100",
    "--learning_rate 1e-3": "optim.lr=1e-3",
    "-lr 1e-3": "optim.lr=1e-3",
    "--attention kha_mlp": "attention=kha_mlp",
    "--output-dir=/some/where": "run.dir=/some/where",
    "--tie_embeddings": "model.tie_embeddings=VALUE",
    "--gradient-accumulation-steps 4": "data.global_batch_size / (engine.micro_batch_size x ranks)",
    "--config my.yaml": "KEY=VALUE",
}


@pytest.mark.parametrize("command", ["train", "plan", "sweep"])
@pytest.mark.parametrize("typed", TYPED)
def test_an_option_that_is_a_setting_is_refused_with_the_override(
    command: str, typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run([command, "attention=gqa", *typed.split()])
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert line.startswith(f"configuration error: {typed.split()[0].partition('=')[0]}: no such option")
    assert TYPED[typed] in line.partition("fix: ")[2]


@pytest.mark.parametrize("arguments", [["train", "--nonsense"], ["sweep", "--local=3"], ["plan", "-q"]])
def test_an_option_that_is_none_of_ours_is_left_to_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 2 and "Error" in capsys.readouterr().err


def test_the_value_of_an_option_of_the_command_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["sweep", "attention=gqa,mha", "--name", "--steps", "--print"])
    assert ended.value.code == 2 and "--name = '--steps'" in capsys.readouterr().err
