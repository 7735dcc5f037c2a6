"""Costs by formula, against torch's own counter."""

import json

import pytest
from typer.testing import CliRunner

from training.__main__ import app
from training.describe import describe
from training.models import PRESETS, StrideViT, architecture, count_macs_by_torch
from training.variants import REGISTERED


@pytest.mark.parametrize("variant", [*REGISTERED, "lsra-r3", "csra-r1", "csra-r3", "lsra-r1"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [None, (96, 160)])
def test_macs_by_formula_equal_torchs_count(preset: str, variant: str, size: tuple[int, int] | None) -> None:
    # Two blocks: all others cost the same.
    spec = architecture(preset, variant, num_classes=10, img_size=size).model_copy(update={"depth": 2})
    assert describe(spec).macs == count_macs_by_torch(StrideViT(spec))


def test_attention_scores_are_heads_times_queries_times_keys() -> None:
    described = describe(architecture("vit-s16", "csra-r2", num_classes=1000, img_size=384))
    assert (described.tokens, described.kv_tokens) == (576, 144)
    assert described.attention_score_bytes == 6 * 576 * 144 * 4


def test_describe_prints_a_table_or_json_for_all_variants() -> None:
    arguments = ["describe", "--preset", "vit-xs", "--img-size", "64"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0
    assert "…" not in table.stdout
    records = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [record["architecture"]["variant"] for record in records] == list(REGISTERED)
    for record in records:
        assert record["tokens"] == 256
        assert f"{record['params']:,}" in table.stdout
    refused = CliRunner().invoke(app, ["describe", "--preset", "vit-xs", "--img-size", "30"])
    assert refused.exit_code == 1
    assert "30 is not a multiple of the patch size 4" in refused.stderr
