"""lm-evaluation-harness as a library, offline: its tasks on data of this disk, its figures, and any model of ours.

The only user of lm_eval and of the `datasets` library, imported inside functions because that takes a second. The
harness makes requests of documents, and figures of the answers. In between, `Asked` has the requests as ids, and any
model answers them: a run in training on many ranks, a checkpoint, an export.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from kha_train.decode.sampling import Sampling
from kha_train.errors import ConfigError
from kha_train.evaluate.bounded import bounded
from kha_train.evaluate.harness_data import Choice, Splits, loader, silent
from kha_train.evaluate.harness_results import TaskResult, results_of
from kha_train.evaluate.paper_tasks import PAPER_TASKS
from kha_train.evaluate.requests import Row, Score, row_of
from kha_train.evaluate.task_files import SHIPPED, TaskFile, read_tasks
from kha_train.evaluate.text_model import Prompt, Text

NEW_TOKENS = 256
"""Most tokens of a generated text where the task says nothing, as in the harness."""
FEWSHOT_SEED = 1234
"""The harness's own."""
BOOTSTRAPS = 1000
"""Resamples for the standard error of figures that are no means."""
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a task that does not fit its data, or the harness, fails with."""


class Asked(NamedTuple):
    """What the tasks ask of a model: rows to score and prompts to continue, in order. `digests` has the SHA-256 of the
    texts of each task."""

    rows: tuple[Row, ...]
    prompts: tuple[Prompt, ...]
    digests: dict[str, str]

    @property
    def content_id(self) -> str:
        """Names everything that is asked."""
        return hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()


class Suite:
    """Tasks of the harness with their data, loaded once.

    Raises ConfigError without the harness, for an unknown task, missing data, a task that would run code without
    `Choice.run_code`, and as `bounded`.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        with _harness(choice) as harness, bounded(choice):
            _forget_modules()
            self._loaded = _load(choice, harness)
            for task in self._loaded["tasks"].values():
                if callable(process := task.get_config("process_docs")):
                    task.set_config("process_docs", _once(process))
            self._set_shots()

    @property
    def names(self) -> list[str]:
        """The tasks and groups that have figures."""
        return [*self._loaded["tasks"], *self._loaded["groups"]]

    @property
    def generates(self) -> bool:
        """Whether a task asks for text."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self._loaded["tasks"].values())

    def ask(self, text: Text) -> Asked:
        """What the tasks ask of a model with this `text`. Raises ConfigError for documents that do not fit a task, and
        for a task whose text does not fit the model."""
        rows: list[Row] = []
        prompts: list[Prompt] = []

        def score(some: Sequence[Row]) -> list[Score]:
            rows.extend(some)
            return [Score(0.0, False)] * len(some)

        def write(some: Sequence[Prompt]) -> list[str]:
            prompts.extend(some)
            return [""] * len(some)

        requests: dict[str, list[Any]] = {}
        digests: dict[str, str] = {}
        with _harness(self.choice), bounded(self.choice):
            for name, task in self._tasks():
                task.build_all_requests(limit=self.choice.limit or None)
                for request in task.instances:
                    requests.setdefault(request.request_type, []).extend([request] * request.repeats)
                texts = [[request.request_type, *request.args] for request in task.instances]
                digests[name] = hashlib.sha256(json.dumps(texts, default=str).encode()).hexdigest()
            model = _language_model(text, score, write)
            for kind, some in requests.items():
                getattr(model, kind)(some)
        return Asked(tuple(rows), tuple(prompts), digests)

    def results(
        self, text: Text, asked: Asked, scores: Sequence[Score], texts: Sequence[str], *, errors: bool = True
    ) -> dict[str, TaskResult]:
        """The results of every task, and of every group, by name: what was chosen first, then the parts of groups.
        `scores` and `texts` answer the rows and prompts of `asked`. Without `errors` no standard error is estimated.
        """
        scored, written = iter(scores), iter(texts)
        rows, prompts = iter(asked.rows), iter(asked.prompts)

        def score(some: Sequence[Row]) -> list[Score]:
            assert all(row == next(rows) for row in some), "the tasks ask something else than before"
            return [next(scored) for _ in some]

        def write(some: Sequence[Prompt]) -> list[str]:
            assert all(prompt == next(prompts) for prompt in some), "the tasks ask something else than before"
            return [next(written) for _ in some]

        with _harness(self.choice) as harness, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            list(self._tasks())
            found = harness.evaluator.evaluate(
                _language_model(text, score, write),
                self._loaded,
                limit=self.choice.limit or None,
                bootstrap_iters=BOOTSTRAPS if errors else 0,
                log_samples=False,
                confirm_run_unsafe_code=self.choice.run_code,
            )
        return results_of(found, asked.digests, self.choice.tasks)

    def _tasks(self) -> Iterator[tuple[str, Any]]:
        """Every task by name, with the random numbers of its examples at their beginning."""
        for name, task in self._loaded["tasks"].items():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            yield name, task

    def _set_shots(self) -> None:
        """The examples before each question. A task that says 0 keeps it, as in the harness."""
        for name, task in self._loaded["tasks"].items():
            said = task.get_config("num_fewshot")
            if self.choice.shots is not None and said != 0:
                said = self.choice.shots
            task.set_config("num_fewshot", said or 0)
            split = task.get_config("fewshot_split") or task.get_config("training_split")
            data = getattr(task, "dataset", None)
            if said and isinstance(data, Splits) and split in data.absent:
                raise ConfigError(
                    f"{name} shows {said} examples, and the split they come from is not there",
                    field=self.choice.field,
                    value=f"{task.DATASET_PATH} {split}",
                    allowed=data.where(split),
                    fix="0 shots, or bring the split",
                )


class _Harness(NamedTuple):
    """The imported modules."""

    evaluator: ModuleType
    tasks: ModuleType


@contextmanager
def _harness(choice: Choice) -> Iterator[_Harness]:
    """The harness, inside the block without a network, quiet, with templates in a sandbox and data from this disk.
    Raises ConfigError when it is not installed, and for whatever a task fails with inside the block."""
    with ExitStack() as held:
        # The harness draws names from the random numbers of everybody.
        held.callback(random.setstate, random.getstate())
        for name in (*_OFFLINE, "DISABLE_MULTIPROC", *(("HF_ALLOW_CODE_EVAL",) if choice.run_code else ())):
            held.enter_context(_environment(name, "1"))
        try:
            import datasets
            import huggingface_hub.constants
            import lm_eval.api.model
            import lm_eval.api.task
            import lm_eval.evaluator
            import lm_eval.tasks
            import lm_eval.utils
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import SandboxedEnvironment
        except ImportError as error:
            raise ConfigError(
                f"needs lm-evaluation-harness ({error.name or error} is not installed)",
                field=choice.field,
                value=",".join(choice.tasks),
                fix="pip install 'kha_train[export]'",
            ) from error
        sandbox = SandboxedEnvironment(undefined=lm_eval.utils.env.undefined, keep_trailing_newline=True)
        sandbox.filters |= lm_eval.utils.env.filters
        scratch = held.enter_context(tempfile.TemporaryDirectory(prefix="kha-eval-"))
        load = loader(choice, scratch, datasets)
        for place, name, value in (
            (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
            (datasets.config, "HF_HUB_OFFLINE", True),
            (datasets, "load_dataset", load),
            (lm_eval.utils, "env", sandbox),
            (lm_eval.api.task, "tqdm", _plain),
            (lm_eval.api.model, "tqdm", _plain),
        ):
            held.enter_context(_replaced(place, name, value))
        held.enter_context(silent(datasets))
        try:
            yield _Harness(lm_eval.evaluator, lm_eval.tasks)
        except (*_FAULTS, TemplateError, datasets.exceptions.DatasetsError) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            raise ConfigError(
                f"the harness failed: {what}", field=choice.field, value=",".join(choice.tasks)
            ) from error


def _forget_modules() -> None:
    """Drop the Python of task files: some of it keeps random numbers, which would go on from `Suite` to `Suite`."""
    for name in [name for name, module in sys.modules.items() if hasattr(module, "__mtime__")]:
        if name.startswith("lm_eval.tasks."):
            del sys.modules[name]


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`process` of a dataset, computed once: the harness calls it at every look, and GPQA shuffles each time."""
    found: dict[int, tuple[Any, Any]] = {}

    def processed(dataset: Any) -> Any:
        if id(dataset) not in found:
            # The dataset is kept, so that no other gets its id.
            found[id(dataset)] = dataset, process(dataset)
        return found[id(dataset)][1]

    return processed


def _load(choice: Choice, harness: _Harness) -> dict[str, Any]:
    """The chosen tasks and groups as the harness keeps them, with their data."""
    shipped = read_tasks(SHIPPED)
    foreign = read_tasks(Path(choice.include)) if choice.include and not choice.run_code else {}
    files: dict[str, TaskFile] = {**shipped, **foreign}
    data = Path(choice.data) if choice.data else None
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in choice.tasks:
        if name in files:
            manager = harness.tasks.TaskManager(include_defaults=False)
            what: Any = files[name].with_data(data)
        else:
            manager, what = _manager(name, choice, harness, [*files]), name
            if not choice.run_code and _runs_code(name, manager):
                raise ConfigError(
                    f"{name} runs code that the model writes", field=choice.field, value=name,
                    fix="if nothing can happen to this machine, allow it with --run-code",
                )  # fmt: skip
        for kind, found in manager.load([what]).items():
            loaded[kind] |= found
    return loaded


def _manager(name: str, choice: Choice, harness: _Harness, others: list[str]) -> Any:
    """The harness's index of a directory that has `name`: the user's own, the folder that should have it, or all.
    Raises ConfigError when it is nowhere."""
    root = Path(str(harness.tasks.__file__)).parent
    own = [Path(choice.include)] if choice.include and choice.run_code else []
    known = [root / one.folder for one in PAPER_TASKS if one.harness == name]
    known = known or [root / name, root / re.split("[_-]", name)[0]]
    for folder in (*own, *known):
        manager = harness.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        if name in manager.all_tasks:
            return manager
    manager = harness.tasks.TaskManager()
    if name not in manager.all_tasks:
        close = get_close_matches(name, [*others, *manager.all_tasks], n=3)
        raise ConfigError(
            "no such task", field=choice.field, value=name, allowed=f"{', '.join(others)}, or a task of the harness",
            fix=f"did you mean {' or '.join(close)}?" if close else None,
        )  # fmt: skip
    return manager


def _runs_code(name: str, manager: Any) -> bool:
    """Whether a task, or a part of a group or a tag, is marked by the harness as running code that a model writes."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    config = entry.cfg or {}
    parts = config["task"] if isinstance(config.get("task"), list) else ()
    names = [part if isinstance(part, str) else part.get("task") or part.get("group") for part in parts]
    # A task names its tags too, and a tag its tasks.
    names += entry.tags if entry.kind.name == "TAG" else ()
    return bool(config.get("unsafe_code")) or any(_runs_code(one, manager) for one in names if one != name)


def _language_model(
    text: Text, score: Callable[[Sequence[Row]], list[Score]], write: Callable[[Sequence[Prompt]], list[str]]
) -> Any:
    """A model of the harness, whose requests `score` and `write` answer."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Model(TemplateLM):  # type: ignore[misc]  # the harness has no types
        """Encodes as `text` does; the harness splits contexts from continuations, and long texts into windows."""

        backend = "causal"
        eot_token_id = property(lambda self: text.end)
        prefix_token_id = property(lambda self: text.prefix)

        def tok_encode(self, string: str, **options: Any) -> list[int]:
            return text.encode(string)

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
            rows = [row_of(context, continuation, text.context) for _, context, continuation in requests]
            return [(one.log_probability, one.greedy) for one in score(rows)]

        def loglikelihood_rolling(self, requests: Any, **options: Any) -> list[float]:
            found = []
            for (string,) in (request.args for request in requests):
                windows = get_rolling_token_windows(text.encode(string), text.prefix, text.context, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                scores = score([row_of(context, scored, text.context) for context, scored in pairs])
                found.append(sum(one.log_probability for one in scores))
            return found

        def generate_until(self, requests: Any, **options: Any) -> list[str]:
            prompts: list[Prompt] = []
            asked: Counter[Prompt] = Counter()
            for context, how in (request.args for request in requests):
                prompt = _prompt(text, context, normalize_gen_kwargs(how, NEW_TOKENS))
                # A task that repeats its questions compares several answers to each.
                prompts.append(prompt._replace(stream=asked[prompt]))
                asked[prompt] += 1
            return write(prompts)

    return Model()


def _prompt(text: Text, context: str, how: Mapping[str, Any]) -> Prompt:
    """The prompt of a request to generate, whose options the harness has put into one form. As in the harness, a long
    context loses its beginning. Raises ConfigError when the new tokens leave no place for it."""
    tokens = how["max_gen_toks"]
    if tokens >= text.context:
        raise ConfigError(
            f"a task asks for {tokens} new tokens, which leave no place for its question",
            field="tasks",
            value=tokens,
            allowed=f"fewer than the {text.context} tokens that the model sees at once",
        )
    temperature = float(how.get("temperature", 1.0)) if how["do_sample"] else 0.0
    ids = text.encode(context)[-(text.context - tokens) :] or [text.prefix]
    sampling = Sampling(tokens, temperature, float(how.get("top_p", 1.0)), top_k=int(how.get("top_k", 0)))
    return Prompt(tuple(ids), sampling, tuple(filter(None, how["until"])))


def _plain(items: Any, *arguments: Any, **options: Any) -> Any:
    """A progress bar that shows nothing."""
    return items


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _replaced(place: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)
