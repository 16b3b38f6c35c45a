"""What has no host is refused with the setting and the reason; what an export holds is what the checkpoint computes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kha_train.config.compose import compose
from kha_train.config.resolve import resolve_decoding
from kha_train.errors import ConfigError, ExportError
from kha_train.export import verification
from kha_train.export.families import family_of
from kha_train.export.links import AS_IT_IS, Link, Part
from kha_train.export.reference import Reference, reference_of
from kha_train.export.shards import INDEX, bytes_of, write_shards
from kha_train.model.decoder import build_decoder

SMALL = ("model=tiny", "model.layers=1", "model.hidden_size=32", "model.head_dim=16", "model.vocab_size=64")


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ("attention=gta", "attention.base.name"),
        ("attention=talking_heads", "attention.base.name"),
        ("attention=diff", "attention.base.name"),
        ("attention=linear", "attention.base.name"),
        ("attention.positions=alibi", "attention.positions"),
        ("attention.positions=learned", "attention.positions"),
        ("attention.positions=none", "attention.positions"),
        ("attention.qk_norm=full_width", "attention.qk_norm"),
        ("moe.score=softmax moe.shared_experts=1", "moe.shared_experts"),
        ("moe.score=softmax moe.expert_groups=2", "moe.expert_groups"),
        ("moe.score=softmax attention.qk_norm=none", "attention.qk_norm"),
        ("moe.experts=1 moe.top_k=1 moe.renormalize=false", "moe.experts"),
        ("attention=mla model.norm_eps=1e-5", "model.norm_eps"),
        ("attention=mla moe.score=softmax", "moe.score"),
    ],
)
def test_what_no_class_of_transformers_computes_is_refused_with_its_setting(overrides: str, field: str) -> None:
    with pytest.raises(ConfigError, match="no model class of transformers") as refused:
        family_of(compose([*SMALL, *overrides.split()]))
    assert refused.value.field == field and refused.value.allowed and refused.value.fix


def numbered(sizes: Sequence[int]) -> tuple[list[Link], dict[str, tuple[int, ...]]]:
    links = [Link((Part(f"t{i}"),), (f"host.{i}",), AS_IT_IS, exact=i % 3 == 0) for i in range(len(sizes))]
    return links, {f"t{i}": (size,) for i, size in enumerate(sizes)}


def test_the_index_names_the_file_of_every_tensor_and_no_file_is_larger_than_asked(tmp_path: Path) -> None:
    links, shapes = numbered([100, 7, 300, 3, 50, 250, 1, 0])
    told: list[int] = []
    total = write_shards(
        tmp_path,
        links,
        shapes,
        lambda part: torch.arange(shapes[part.name][0]).float(),
        torch.bfloat16,
        700,
        told.append,
    )
    index = json.loads((tmp_path / INDEX).read_text())
    assert total == sum(told) == bytes_of(links, shapes, torch.bfloat16) == index["metadata"]["total_size"]
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (
        files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)] and len(files) > 1
    )
    held = Counter[str]()
    for name in files:
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for key in sorted(file.keys()):
                tensor, number = file.get_tensor(key), int(key.rpartition(".")[2])
                assert index["weight_map"][key] == name
                assert tensor.dtype == (torch.float32 if number % 3 == 0 else torch.bfloat16)
                assert torch.equal(tensor.float(), torch.arange(len(tensor)).to(tensor.dtype).float())
                held[key] += tensor.nbytes
        assert (tmp_path / name).stat().st_size < 700 + 1000
    assert held.keys() == index["weight_map"].keys() and held.total() == total


def test_tokens_after_a_near_tie_of_experts_do_not_decide() -> None:
    config = compose([*SMALL, "model.layers=2", "model.seq_len=32"])
    decoder = build_decoder(config, resolve_decoding(config)).eval()
    assert reference_of(decoder).decided_BT.all()
    with torch.no_grad():
        # Two experts that always score the same: they tie wherever one of them is the last one chosen.
        weight = decoder.routers()[1].weight
        weight[1] = weight[0]
    tied = reference_of(decoder)
    held_back = [row for row in tied.decided_BT if not row.all()]
    assert held_back and not any(row[row.int().argmin() :].any() for row in held_back)
    assert tied.decided_BT.any()


@pytest.mark.parametrize(("decided", "told"), [(False, "no token can be compared"), (True, "logits differ from ours")])
def test_an_export_is_refused_where_nothing_can_be_compared_and_where_something_differs(
    decided: bool, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"trainer": "cannot be imported", "class": "Any", "versions": {}, "difference": [[0.0, 1.0]]}
    monkeypatch.setattr(verification, "_ask", lambda request: answer)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    reference = Reference(tokens, torch.ones(1, 2, 8), torch.full((1, 2), decided))
    with pytest.raises(ExportError, match=told):
        verification.verify(tmp_path, reference, verification.Text())


@pytest.mark.parametrize("norm", ["per_head", "full_width"])
def test_a_selection_bias_that_is_not_zero_has_no_place_behind_a_softmax_router(norm: str) -> None:
    softmax = ("moe.score=softmax", "moe.bias_update_rate=0", "model.hidden_size=64")
    config = compose([*SMALL, *softmax, f"attention.qk_norm={norm}"])
    family = family_of(config)
    (link,) = [link for link in family.links(config, family.config(config)) if not link.host]
    assert link.layout.to_host((torch.zeros(config.moe.experts),)) == ()
    with pytest.raises(ConfigError, match="selection bias of experts is not zero, and a class with a softmax router"):
        link.layout.to_host((torch.ones(config.moe.experts),))
