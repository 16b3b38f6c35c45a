"""No secret is in anything that a run writes, prints or submits: canaries in every source, searched for in every
sink.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kha_train.cli.main import COMMANDS, build, run
from kha_train.config.compose import compose, expand, shipped
from kha_train.errors import ConfigError
from kha_train.operate.slurm import JobOptions, parse_sbatch, sbatch_command
from kha_train.operate.sweep import plan_sweep
from kha_train.record import Record, Redactor
from kha_train.record.redact import REDACTED
from kha_train.record.streams import RedactedStream

CANARY = "canary-4f1e9a7c"
WRAPPED = st.text("\"'\\ /@:;,&%$\n\tab\u00fc", max_size=6)
"""Characters that change the form of a secret once it is quoted."""

NAMES_OF_VARIABLES = [
    "DB_PASS", "SSHPASS", "KRB5_PASS", "LDAP_PW", "OPENAI_KEY", "GPG_KEY", "B2_APPLICATION_KEY", "REDISCLI_AUTH",
    "NPM_CONFIG__AUTH", "GITHUB_PAT",
]  # fmt: skip
"""Names that betray a secret in an environment, though no configuration key of this kind does."""

WAYS_INTO_A_TEXT = {
    "as it is": str,
    "JSON": json.dumps,
    "JSON in UTF-8": lambda text: json.dumps(text, ensure_ascii=False),
    "JSON inside JSON": lambda text: json.dumps(json.dumps({"a": text})),
    "a representation": repr,
    "a representation in a list": lambda text: str([text, (text,)]),
    "a shell": lambda text: shlex.join([f"run.name={text}"]),
    "a URL": lambda text: urllib.parse.quote(text, safe=""),
    "a URL's path": urllib.parse.quote,
    "a form": lambda text: urllib.parse.urlencode({"a": text}),
    "lower-case escapes": lambda text: re.sub("%..", lambda hit: hit[0].lower(), urllib.parse.quote(text, safe="")),
    "a page": html.escape,
}


@pytest.mark.parametrize("way", WAYS_INTO_A_TEXT)
@settings(max_examples=60, deadline=None)
@given(before=WRAPPED, after=WRAPPED)
@example(before='a"', after="\\b")
@example(before="it's ", after="/@:")
def test_a_known_secret_is_found_however_it_is_quoted(way: str, before: str, after: str) -> None:
    secret = f"{before}{CANARY}{after}"
    shown = Redactor({"SERVICE_TOKEN": secret}).text(f"failed with {WAYS_INTO_A_TEXT[way](secret.strip())} at step 3")
    assert CANARY not in shown
    assert shown.startswith("failed with ") and shown.endswith(" at step 3")


@pytest.mark.parametrize(
    "name, value",
    [
        ("AZURE_STORAGE_ACCOUNT_KEY", f"{CANARY}=="),
        ("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=https;AccountName=me;AccountKey={CANARY}=="),
        ("MY_CONN_STR", f"Server=db;Password={CANARY}"),
        ("PGPASSWORD", CANARY),
        ("MYSQL_PWD", CANARY),
        ("DATABASE_URL", f"postgres://me:{CANARY}@db:5432/runs"),
        ("HTTPS_PROXY", f"http://me:{CANARY}@proxy:3128"),
        ("all_proxy", f"socks5://me:{CANARY}@proxy:3128"),
        ("ANY_NAME", f"https://me:{CANARY}@host/x@y"),
        ("PIP_INDEX_URL", f"https://{CANARY}@pypi.example.org/simple"),
        ("DSN", f"user=me password={CANARY} host=db"),
        *((name, CANARY) for name in NAMES_OF_VARIABLES),
        ("SLACK_WEBHOOK_URL", f"https://hooks.example.org/services/{CANARY}"),
    ],
)
def test_the_secret_part_of_a_variable_is_found_wherever_it_stands_alone(name: str, value: str) -> None:
    redactor = Redactor({name: value})
    if name != "SLACK_WEBHOOK_URL":
        assert CANARY not in redactor.text(f"403 for {CANARY}== of the account")
    assert CANARY not in Redactor({}).text(f"export {name}={value}") + str(Redactor({}).clean({name: value}))
    assert CANARY not in redactor.text(f"cannot connect to {value}")


@pytest.mark.parametrize(
    "name, value",
    [
        ("GPG_KEY", "/keys/of/training"),
        ("API_PASS", "12345678.5"),
        ("SORT_KEY", "attention"),
        ("PREFERRED_AUTH", "publickey"),
        ("DB_PASS", "short"),
        ("KV_HEADS", "attention-heads"),
        ("key_norm", "rms-attention"),
    ],
)
def test_a_variable_that_names_a_path_a_number_or_a_word_is_no_secret(name: str, value: str) -> None:
    text = f"{name}={value} went on with {value}"
    assert Redactor({name: value}).text(text) == text


def test_a_password_of_a_url_is_found_decoded_and_in_the_header_made_of_it() -> None:
    redactor = Redactor({"HTTP_PROXY": f"http://me:p%40ss{CANARY}@proxy"})
    header = base64.b64encode(f"me:p@ss{CANARY}".encode()).decode()
    assert redactor.text(f"sent {header}, password p@ss{CANARY}") == f"sent {REDACTED}, password {REDACTED}"


def test_what_urls_of_the_environment_name_besides_passwords_is_no_secret() -> None:
    environ = {"REMOTE": "ssh://git@example.org/x", "DATA": "abfss://tokens@account.dfs.core.windows.net/x"}
    environ |= {"PWD": "/work/training", "OLDPWD": "/work/training", "KEYMAP": "training", "PORT": "http://h:8080/a@b"}
    text = "git fetch tokens of the account to /work/training, a@b, abfss://tokens@account.dfs.core.windows.net/x"
    assert Redactor(environ).text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {CANARY}",
        f"authorization: basic {CANARY}",
        f"{{'Authorization': 'Bearer {CANARY}'}}",
        f"curl -H 'Proxy-Authorization: Basic {CANARY}' https://h",
        f"sent Bearer {CANARY}, refused",
        f"Basic {base64.b64encode(b'me:canary').decode()}{CANARY}",
        f"AccountName=me;AccountKey={CANARY}==;EndpointSuffix=core",
        f"account_key={CANARY}",
        f"https://u:{CANARY}/with/slash@h",
        f"https://u:pw/{CANARY}@h/x",
        f"postgres://u:pa@{CANARY}@h",
        f"redis://:{CANARY}@h/0",
        f'{{"url": "https://u:{CANARY}@h", "n": 1}}',
        f'password="a\\"{CANARY}"',
        f"password='a, {CANARY}'",
        f"password=a,{CANARY}",
        f"password=a;{CANARY}",
        f'"password": ["{CANARY}"]',
        f'"password": ["a]", {{"b": "{CANARY}"}}], "n": 1',
        f"passwords=[a, {CANARY}",
        json.dumps(json.dumps({"password": ["a]", CANARY]})),
        f"curl -u user:{CANARY} https://h",
        f"curl --user 'me:a b {CANARY}' https://h",
        f'curl -s -uuser:"{CANARY}" https://h',
        json.dumps(f'curl -u "me:{CANARY}" https://h'),
        f'Authorization: Digest username="me", nonce="a", response="{CANARY}"',
        f'curl -H \'Authorization: Digest username="me", response="{CANARY}"\' https://h',
        json.dumps(f'Authorization: Digest username="me", response="{CANARY}"'),
        json.dumps(json.dumps({"Authorization": f'Digest username="me", response="{CANARY}"'})),
        f"https:/u:{CANARY}@h/x",
        f"https:\\/\\/u:{CANARY}@h\\/x",
        f"https:\\/\\/u:p\\/{CANARY}@h",
        f"PGPASSWORD={CANARY} psql",
        f"X-Api-Key: {CANARY}",
        f"API key: {CANARY}",
        f"secret_2={CANARY}",
        f"?sig={CANARY}&page=2",
        json.dumps({"said": json.dumps({"api_key": CANARY})}),
        f"os.environ['HF_TOKEN'] = '{CANARY}'",
        f"jdbc:postgresql://h/db?user=u&password={CANARY}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY.replace('-', '')}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_secret_is_hidden_by_the_form_it_stands_in(text: str) -> None:
    shown = Redactor({}).text(text)
    assert CANARY not in shown and CANARY.replace("-", "") not in shown and REDACTED in shown


SHOWN = [
    f"s3://k:{CANARY}@b/x", f"https://u:p/{CANARY}@h", f"postgres://u:p@{CANARY}@h", f"api_key={CANARY}",
    f"Authorization: Bearer {CANARY}", f"Authorization: Basic {CANARY}", f"AccountKey={CANARY}", f"password: {CANARY}",
    f"--token {CANARY}", f"token='{CANARY}'", f'secret="{CANARY}"', f"data.train=s3://k:{CANARY}@b/x",
    f"Bearer {CANARY}", f"HF_TOKEN={CANARY}", f"aws_secret_access_key = {CANARY}", f"{{'token': '{CANARY}'}}",
    f"?token={CANARY}",
]  # fmt: skip
INSIDE = {
    **{name: way for name, way in WAYS_INTO_A_TEXT.items() if name not in ("a URL's path", "a page", "a form")},
    "an error": lambda text: f"ValueError: cannot open {text}: no (such) file",
    "a call": lambda text: f"call({text})",
    "a tag": lambda text: f"<td>{text}</td>",
    "a list of settings": lambda text: f"a=1,{text},b=2",
    "a line": lambda text: f"x\n{text}\ny",
    "a query": lambda text: f"https://h/x?next={urllib.parse.quote(text, safe='')}&n=1",
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("text", SHOWN)
def test_a_form_is_seen_inside_every_other(text: str, inside: str) -> None:
    assert CANARY not in Redactor({}).text(INSIDE[inside](text))


@pytest.mark.parametrize(
    "text",
    [
        "key/value heads: 8, kv_heads=2, key_norm=rms, key: 5, keys=[1,2], query_key=a",
        "eos_token_id=2 pad_token: <pad> bos_token='<s>' special_tokens_map: x max_tokens=5",
        "basic block of 12 layers, Basic training; the digest 4f1e9a7c99 differs",
        "http://localhost:8080/x@2x and https://example.org/a@b, git@github.com:x/y.git",
        "abfss://data@account.dfs.core.windows.net/x",
        "-v /host/a:/data:ro curl -u and C:/a@b, see https:\\/\\/h:8080\\/x@2x",
        "docker run -u me:group image",
        '{"tokens": 8192, "tokenizer": "/a/b", "key_heads": 4}',
        "PWD=/work OLDPWD=/old",
    ],
)
def test_the_words_of_language_models_stay(text: str) -> None:
    assert Redactor({}).text(text) == text


@pytest.mark.parametrize(
    "unit",
    ["a", "a://", "http://u:", "password=", "x'", '"', "Bearer ", "a=b@", "\\", "key: ", "%3A", "a:\\/", 'password=["']
    + ['password=[\\"', "password=[", "curl (-u", "curl -u a:'", 'authorization: x="', "authorization: a"],
)
def test_a_long_text_costs_time_in_proportion(unit: str) -> None:
    """Each of these would take minutes if a rule started again at every character."""
    assert len(Redactor({"X_TOKEN": CANARY}).text(unit * (200_000 // len(unit)))) > 0


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab:/@'\"=,; \\-"), max_size=40))
def test_hiding_twice_changes_nothing_more(text: str) -> None:
    once = Redactor({}).text(text)
    assert Redactor({}).text(once) == once


def test_json_stays_json_where_a_secret_is_hidden_in_it() -> None:
    tree = {"api_key": CANARY, "a": [f"https://u:{CANARY}@h", {"token": f"x\n{CANARY}"}], "tokens": 5}
    tree["passwords"] = [CANARY, [CANARY]]
    shown = Redactor({}).text(json.dumps(tree))
    assert CANARY not in shown and json.loads(shown)["tokens"] == 5


def test_a_stream_hides_what_comes_in_pieces_and_keeps_everything_else(capsys: pytest.CaptureFixture[str]) -> None:
    stream = RedactedStream(sys.stdout, Redactor({"X_TOKEN": CANARY}).text)
    print("step 1", CANARY[:7], sep=" ", end="", file=stream)
    stream.write(f"{CANARY[7:]} went\nnext")
    assert capsys.readouterr().out == f"step 1 {REDACTED} went\n"
    stream.flush()
    assert capsys.readouterr().out == "next"
    assert stream.isatty() is sys.stdout.isatty() and not hasattr(stream, "buffer")
    with pytest.raises(TypeError):
        stream.write(b"bytes")  # type: ignore[arg-type]


def _leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not hasattr(command, "commands"):
        yield words
    for name, child in getattr(command, "commands", {}).items():
        yield from _leaves(child, (*words, name))


LEAVES = sorted(_leaves(typer.main.get_command(build(list(COMMANDS)))))


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_no_command_shows_the_password_of_a_url_that_is_given_as_a_path(
    words: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        with pytest.raises(SystemExit) as ended:
            run([*words, *[f"https://u:{CANARY}@h/x"] * number])
        said = capfd.readouterr()
        assert ended.value.code and CANARY not in said.out + said.err and CANARY[:7] not in said.out + said.err


def test_what_a_stream_cannot_encode_is_written_as_escapes_and_a_full_disk_stays_an_error() -> None:
    behind = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    stream = RedactedStream(behind, Redactor({}).text)
    print("run grüße \ud800", file=stream, flush=True)
    stream.write("ü")
    stream.flush()
    assert behind.buffer.getvalue() == b"run gr\\xfc\\xdfe \\ud800\n\\xfc"
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), "ascii")
    with pytest.raises(OSError, match="No space"):
        print("grüße", file=RedactedStream(full, str), flush=True)
    full.detach()


CREDENTIALS = [
    f"data.train=s3://key:{CANARY}@bucket/x",
    f"data.validation=https://u:{CANARY}/slash@h/x",
    f"+data.sources=[{{name: a, path: 's3://k:{CANARY}@b/x', weight: 1.0}}]",
    f"data.train='https://h/x?X-Amz-Signature={CANARY}'",
    f"run.init_from=s3://k:{CANARY}@b/x",
    f"run.name='postgres://u:{CANARY}@h'",
    f"telemetry.wandb.tags=['https://u:{CANARY}@h']",
]


@pytest.mark.parametrize("override", CREDENTIALS)
def test_security_a_url_with_credentials_is_refused_by_every_command_before_anything_is_written(
    override: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["train"], ["plan"], ["sweep", "--local", "--name=s"], ["sweep", "--print"], ["sweep", "--name=s"]):
        grid = ["seed=0,1"] if command[0] == "sweep" else []
        with pytest.raises(SystemExit) as ended:
            run([*command, override, *grid])
        said = capfd.readouterr()
        assert ended.value.code == 2 and CANARY not in said.out + said.err, command
        assert "holds a password or a query" in said.err and "profile" in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "override",
    [f"data.train=[s3://k:{CANARY}@b", f"run.name=a'{CANARY}", f"run.dir={{{CANARY}", f"run.name={CANARY} ,,"],
)
def test_an_override_that_does_not_parse_is_named_and_its_value_is_not_repeated(override: str) -> None:
    key = override.partition("=")[0]
    for read in (compose, expand):
        with pytest.raises(ConfigError) as refused:
            read(["run.seed=1", override, f"telemetry.wandb.group={CANARY}"])
        assert CANARY not in str(refused.value) and f"{key}=..." in str(refused.value)


@pytest.mark.parametrize("name", ["grüße", "läuft gut", "Ä.b/c-d"])
def test_the_override_that_is_suggested_for_one_that_does_not_parse_composes_as_it_stands(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([f"run.name={name}"])
    suggested = re.search(r'in quotes: ("run.name=.*"); lists', str(refused.value))
    assert suggested and compose(shlex.split(suggested[1])).run.name == name


@pytest.mark.parametrize(
    "grid",
    [
        [f"run.name={CANARY}"],
        [f"telemetry.wandb.group='api_key={CANARY}'"],
        [f"telemetry.wandb.tags=['Bearer {CANARY}x']"],
    ],
)
def test_a_sweep_with_a_secret_in_a_setting_is_refused(
    grid: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with pytest.raises(ConfigError, match="holds a secret") as refused:
        plan_sweep(tmp_path / "s", [*grid, "seed=0,1"])
    assert CANARY not in str(refused.value)
    with pytest.raises(ConfigError, match="holds a secret"):
        plan_sweep(tmp_path / CANARY, ["seed=0,1"])


@pytest.mark.slow
def test_hydras_own_multirun_writes_no_secret(tmp_path: Path) -> None:
    command = [sys.executable, str(shipped("launch") / "hydra_train.py"), "-m", "hydra/launcher=kha_slurm"]
    settings = [f"data.train='s3://key:{CANARY}@bucket/x'", "run.seed=0,1"]
    told = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 120}
    done = subprocess.run([*command, *settings], check=False, **told)
    assert done.returncode == 2 and "data.train" in done.stderr and CANARY not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [f"comment={CANARY}", f"comment=AccountKey={CANARY}x"])
def test_security_no_secret_reaches_the_scheduler(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", CANARY)
    with pytest.raises(ConfigError, match="holds a secret") as refused:
        sbatch_command(tmp_path / "s", tmp_path / "p.json", 1, JobOptions(sbatch=parse_sbatch([option])))
    assert CANARY not in str(refused.value)
    with pytest.raises(ConfigError, match="holds a secret"):
        sbatch_command(tmp_path / CANARY, tmp_path / "p.json", 1, JobOptions())


SOURCES = st.sampled_from(
    [
        CANARY,
        f"s3://k:{CANARY}@b/x",
        f"https://u:p/{CANARY}@h",
        f"api_key={CANARY}",
        f'{{"password": "a\\"{CANARY}"}}',
        f"Authorization: Bearer {CANARY}",
        f"DefaultEndpointsProtocol=https;AccountKey={CANARY}==",
    ]
)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(SOURCES, min_size=1, max_size=3), key=st.sampled_from(["note", "api_key", "error", CANARY]))
def test_security_whatever_text_the_record_gets_no_file_of_it_has_the_secret(
    texts: list[str], key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Names, paths, configuration values and messages of other libraries' exceptions all arrive as text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVICE_TOKEN", CANARY)
        patch.setattr("sys.orig_argv", ["python", "-m", "kha_train", *texts, "--api-key", CANARY])
        run_dir = tmp_path_factory.mktemp("run")
        record = Record.open(run_dir)
        tree: Any = {key: texts, "path": Path("/data") / CANARY, "nested": [{"why": text} for text in texts]}
        record.begin_attempt(0, facts=tree)
        record.step({"step": 1, "tokens": 8192, **{f"note/{n}": text for n, text in enumerate(texts)}})
        record.event("failed", 1, **{key: texts})
        record.rewind_to(0, " ".join(texts))
        record.update_run(result=tree)
        record.close()
    for path in run_dir.rglob("*"):
        assert path.is_dir() or CANARY not in path.read_text(), path


@pytest.mark.slow
def test_security_no_file_and_no_line_of_a_run_has_a_canary_of_its_environment_settings_or_failure(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with the secret in its name, tags and environment; then one that fails with an exception that contains it,
    with debugging on.
    """
    quoted = f'q"{CANARY}\\z'
    monkeypatch.setenv("SERVICE_TOKEN", quoted)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{CANARY}@proxy:1")
    settings = [*small, "model.layers=1", "run.steps=2", "profile.first_step=1", "profile.last_step=2"]
    settings += [f"run.dir={tmp_path}/run", f"run.name='{CANARY}'", "checkpoint.every_steps=1"]
    settings += ["telemetry.console=lines", f"telemetry.wandb.tags=['api_key={CANARY}']"]
    with pytest.raises(SystemExit) as ended:
        run(["train", *settings])
    assert not ended.value.code

    def broken(*given: object) -> None:
        raise OSError(f"the store answered 401 to Authorization: Bearer {quoted}, {{'token': {quoted!r}}}")

    monkeypatch.setattr("kha_train.train.run.train_step", broken)
    monkeypatch.setenv("KHA_DEBUG", "1")
    with pytest.raises(OSError) as defect:
        run(["train", *settings, "run.steps=3", "resume.allow_changes=[run.steps]"])
    sys.excepthook(defect.type, defect.value, defect.tb)
    with pytest.raises(SystemExit):
        run(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    said = capfd.readouterr()
    assert "Traceback" in said.err and CANARY not in said.out + said.err
    looked_at = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "run.json", "events.jsonl", "rank-00000.json", "trainer.json", "steps-1-2.txt"} <= {
        path.name for path in looked_at
    }
    assert [path for path in looked_at if CANARY.encode() in path.read_bytes()] == []
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["run"]["name"] == REDACTED
