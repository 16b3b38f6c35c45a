"""What a setting is: type, default, range, meaning, effect, where it was set, and its source in the papers.

Each answer has one source: types and defaults are those of the schema, ranges those of `limits.py`, effects those of
`constants.py`, meanings the rows of docs/configuration.md, papers what docstrings, presets and that page name.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kha_train.config.build import REGISTRIES, flatten, plain, to_plain
from kha_train.config.compose import PACKAGE, compose, parts, preset_groups, shipped, unknown_key
from kha_train.config.constants import MAY_BRANCH, ROUNDING, WITHOUT_EFFECT, may_differ
from kha_train.config.limits import LIMITS, OF_TYPE, limit_of
from kha_train.config.origins import Declared, declared, line_of, origins
from kha_train.config.presets import chosen_as
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError, Settings
from kha_train.foreign.documents import Json
from kha_train.variants.registry import engines, sinks

CITATION = re.compile(r"arXiv|\b[A-Z][A-Za-z]+ (?:et al\. |and [A-Z][a-z]+ )?(?:19|20)\d\d\b|\bpaper\b")


@dataclass(frozen=True)
class Explanation:
    """A setting: see the module. A `required` one has no default: a preset must give the value.
    `sources` are sentences that name a paper. `section` is the docstring of the dataclass that declares the field.
    """

    key: str
    value: Json
    type: str
    allowed: str
    default: Json
    required: bool
    declared_at: str
    set_at: str
    written_as: str
    chosen_by: str
    meaning: str
    affects: str
    sources: tuple[str, ...]
    section: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: plain(value) for name, value in asdict(self).items()}


def explain(key: str, overrides: Sequence[str]) -> list[Explanation]:
    """The explanation of the setting `key`, or of every setting of the section `key`, in the configuration that is
    composed of `overrides`. Raises ConfigError for an unknown key, and as `compose`.
    """
    config = compose(overrides)
    flat, placed = flatten(to_plain(config)), origins(config, overrides)
    keys = [name for name in flat if name == key or name.startswith(f"{key}.")]
    if not keys:
        raise _of_another_variant(key, overrides) or unknown_key(key, list(overrides))
    return [_explanation(name, flat, config, placed) for name in keys]


def _of_another_variant(key: str, overrides: Sequence[str]) -> ConfigError | None:
    """The ConfigError for a setting that only another preset of attention has, or None."""
    for preset in preset_groups()["attention"] if key.startswith("attention.") else ():
        values = flatten(to_plain(compose([f"attention={preset}"])))
        if key in values:
            return ConfigError("is a setting of another attention", field=key, fix=Settings(f"attention={preset}"))
    return None


def _explanation(key: str, flat: Mapping[str, Any], config: RunConfig, placed: Mapping[str, Any]) -> Explanation:
    declaration, origin = declared(key, config), placed[key]
    assert declaration is not None, key
    place = line_of(declaration)
    meaning, section = meanings().get(key, ""), inspect.getdoc(declaration.introduced_by) or ""
    texts = (meaning, *origin.comments, section, inspect.getdoc(declaration.owner) or "")
    return Explanation(
        key=key,
        value=flat[key],
        type=type_in_words(declaration.hint),
        allowed=_allowed(key, declaration),
        default=_default(declaration.entry),
        required=declaration.entry.default is declaration.entry.default_factory is MISSING,
        declared_at=place,
        set_at=origin.where or place,
        written_as=origin.written,
        chosen_by=origin.chosen_by,
        meaning=meaning,
        affects=effect_of(key, flat),
        sources=tuple(
            dict.fromkeys(
                sentence for text in (*texts, _module_of(declaration, flat, key)) for sentence in _citing(text)
            )
        ),
        section=" ".join(section.split()),
    )


@cache
def meanings() -> dict[str, str]:
    """The meaning of each setting: the rows of the table "Every field" of docs/configuration.md."""
    page = (shipped("docs") / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \| (.*) \|$", page.partition("## Every field")[2], flags=re.MULTILINE)
    links = re.compile(r"\[([^\]]*)\]\([^)]*\)")
    return {key: links.sub(r"\1", meaning) for cell, meaning in rows for key in re.findall(r"`([^`]+)`", cell)}


def effect_of(key: str, values: Mapping[str, Any]) -> str:
    """What another value of the setting `key` changes, in the configuration `values` (by dotted keys)."""
    if may_differ(key, WITHOUT_EFFECT, values):
        return "no number of the training; a resumed run may change it"
    if may_differ(key, ROUNDING, values):
        return "speed or memory, and the last bits of sums at most; a resumed run may change it"
    if may_differ(key, MAY_BRANCH, values):
        return "results; a resumed run must keep it unless resume.allow_changes names it, a branch may change it"
    return "what the run is; neither a resumed run nor a branch may change it: start a new run"


def type_in_words(hint: object) -> str:
    """A type of the schema as users would say it: `int`, `list of float`, `int or null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "choice"
    if origin is UnionType:
        return " or ".join("null" if one is type(None) else type_in_words(one) for one in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {type_in_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(map(type_in_words, arguments))}"
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return "{" + ", ".join(f"{entry.name}: {type_in_words(hints[entry.name])}" for entry in fields(hint)) + "}"
    assert isinstance(hint, type), hint
    return {"str": "text", "bool": "true or false"}.get(hint.__name__, hint.__name__)


def _allowed(key: str, declaration: Declared) -> str:
    """The allowed values in words; "" for any value of the type."""
    hint = declaration.hint
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    found = {"engine.name": engines, "telemetry.sinks": sinks}.get(key)
    if found is not None:
        return ", ".join(found())
    if declaration.entry.name == "name":
        named = next((registry for cls, registry in REGISTRIES.items() if issubclass(declaration.owner, cls)), None)
        if named is not None:
            return ", ".join(named)
    kinds = [kind for kind in (hint, *get_args(hint)) if kind in OF_TYPE]
    if not kinds or not {key, f"{key.rpartition('.')[0]}.*"} & LIMITS.keys():
        return ""
    limit = limit_of(key, kinds[0])
    high = "" if limit.high is None else f", at most {limit.high:,.10g}"
    return limit.words(limit.low if limit.above else limit.low - 1) + high


def _default(entry: Field[Any]) -> Any:
    if entry.default is not MISSING:
        return plain(entry.default)
    return plain(entry.default_factory()) if entry.default_factory is not MISSING else None


def _module_of(declaration: Declared, flat: Mapping[str, Any], key: str) -> str:
    """The first paragraph of the module that computes a variant, for a setting of the variant; "" for others."""
    for cls, registry in REGISTRIES.items():
        if not issubclass(declaration.owner, cls):
            continue
        name = str(flat.get(f"{key.rpartition('.')[0]}.name"))
        if name in registry:
            path = registry[name].path.partition(":")[0].replace(".", "/")
            module = ast.parse((PACKAGE.parent / f"{path}.py").read_text(encoding="utf-8"))
            return (ast.get_docstring(module) or "").partition("\n\n")[0]
    return ""


def _citing(text: str) -> list[str]:
    """The sentences of `text` that name a paper."""
    return [one for one in re.split(r"(?<=[^.]{3}[.;])\s+", " ".join(text.split())) if CITATION.search(one)]


@dataclass(frozen=True)
class Group:
    """A group of presets: how one is typed, the one that is the default (None: none), and what each file says of
    itself in its first comment.
    """

    typed: str
    default: str | None
    presets: dict[str, str]


def groups() -> dict[str, Group]:
    """Every group of presets, by name."""
    default = {part.path.parent.name: part.path.stem for part in parts([])}
    return {
        name: Group(chosen_as(name), default.get(name), {preset: _head(name, preset) for preset in presets})
        for name, presets in sorted(preset_groups().items())
    }


def _head(group: str, preset: str) -> str:
    text = (shipped("configs") / group / f"{preset}.yaml").read_text(encoding="utf-8")
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
    return re.split(r"(?<=[a-zB)\d])[.:]\s", f"{' '.join(comments)} ")[0]
