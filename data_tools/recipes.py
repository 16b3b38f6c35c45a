"""How public collections of text lie on disk, so that a local copy becomes shards by one command.

A recipe selects files by name. Where a collection has a validation split of its own, that becomes the validation set;
of the others the hash of each text decides (`encode_files.py`). A test split is left out. Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.corpus import SPLITS
from data_tools.files import Found, TextFile, find_files
from kha_train.errors import ConfigError

_HEADING = re.compile(r" ?= [^=](.*[^=])? = ?\n?")
"""A heading of the first level in WikiText, with which an article begins."""
_LINED = (".raw", ".tokens")
_SHOWN = 5
Group = tuple[tuple[str, ...], list[TextFile]]
"""Files whose texts are divided among these splits."""


@dataclass(frozen=True)
class Recipe:
    """A collection: `train` and `validation` match the ends of the names of its files (no `validation`: it has none).

    `variant` captures the part of a name that tells its overlapping variants apart: only one may be there. With
    `articles` its rows or lines are lines of articles, which are put together.
    """

    train: str
    validation: str = ""
    variant: str = ""
    articles: bool = False


RECIPES = {
    "c4": Recipe(
        r"/c4-[\w-]+\.(tfrecord-)?\d+-of-\d+\.json\.gz", r"/c4-([\w-]+-)?validation\.[^/]+", r".*/([^/]*)/[^/]*"
    ),
    "dclm": Recipe(r"\.(jsonl\.zst|jsonl\.gz|jsonl|parquet)"),
    "fineweb": Recipe(r"\.parquet", variant=r".*/(data|sample/[^/]*)/.*"),
    "pile": Recipe(r"/train/\d+\.jsonl(\.zst|\.gz)?", r"/val\.jsonl(\.zst|\.gz)?"),
    "wikitext": Recipe(
        r"/(train-\d+-of-\d+\.parquet|wiki\.train\.(raw|tokens))",
        r"/(validation-\d+-of-\d+\.parquet|wiki\.valid\.(raw|tokens))",
        r".*/([^/]*)/[^/]*",
        articles=True,
    ),
}
"""By the name of the collection."""


def recipe_named(name: str) -> Recipe:
    """The recipe of a collection. Raises ConfigError for an unknown one."""
    if name not in RECIPES:
        raise ConfigError("unknown collection", field="recipe", value=name, allowed=", ".join(RECIPES))
    return RECIPES[name]


def select(recipe: Recipe | None, roots: Sequence[str | Path], field: str) -> tuple[Found, list[Group]]:
    """What was found in `roots`, and its files by the splits they are divided among: all by both splits without a
    recipe, or where the collection has no validation split.

    Raises as `find_files`, and ConfigError where the roots hold no file of the recipe's layout, or several variants.
    """
    found = find_files(roots, "text", field, lined=_LINED if recipe else ())
    if recipe is None:
        return found, [(SPLITS, found.files)]
    validation = [file for file in found.files if recipe.validation and _ends(recipe.validation, file)]
    train = [file for file in found.files if _ends(recipe.train, file) and file not in validation]
    left_out = [file.name for file in found.files if file not in validation and file not in train]
    by_split = {"train": train, "validation": validation} if recipe.validation else {"train": train}
    for split, files in by_split.items():
        if not files:
            raise ConfigError(
                f"no file of its layout for {split}",
                field="recipe",
                value=[str(root) for root in roots],
                allowed=f"names that match {recipe.validation if split == 'validation' else recipe.train}",
            )
    _check_variants(recipe, [*train, *validation])
    found = found._replace(files=[*train, *validation], unused=left_out)
    if not recipe.validation:
        return found, [(SPLITS, train)]
    return found, [((split,), files) for split, files in by_split.items()]


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Articles from their lines, each with its end of line; a heading of the first level begins one. Empty lines are
    left out, because some copies lack them.
    """
    article: list[str] = []
    for line in lines:
        if not line.strip():
            continue
        if _HEADING.fullmatch(line) and article:
            yield "".join(article)
            article = []
        article.append(line if line.endswith("\n") else f"{line}\n")
    if article:
        yield "".join(article)


def _ends(pattern: str, file: TextFile) -> bool:
    return re.search(f"(?:{pattern})$", f"/{file.name}") is not None


def _check_variants(recipe: Recipe, files: Sequence[TextFile]) -> None:
    """Raises ConfigError when files of several variants, which overlap, would be mixed."""
    captured = (re.fullmatch(recipe.variant, f"/{file.name}") for file in files if recipe.variant)
    variants = sorted({match[1] for match in captured if match})
    if len(variants) > 1:
        raise ConfigError(
            "several variants of one collection, which overlap",
            field="recipe",
            value=variants[:_SHOWN],
            fix="give the directory of one of them",
        )
