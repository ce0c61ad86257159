"""`a+b`: which compositions there are, that each part does in it what it does alone, and how options are addressed."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from qbench.cli import main
from qbench.config import RunConfig, validated
from qbench.engine.checkpoint import Checkpoint
from qbench.errors import ConfigError
from qbench.methods import METHODS
from qbench.runner import run
from tests.tiny_runs import differences, make_lane, reconstruct_lanes, spec_of

FAST = {"epochs": 2}


def quantized(model, ids, method, scheme="W3A16g16", checkpoint=None, **options):
    (result,) = reconstruct_lanes(model, ids, [make_lane(model, method, scheme, checkpoint, **options)])
    assert result.error is None
    return result


REFUSED = {
    "gptq+gptq": "names gptq twice",
    "rtn+gptq": "has a second rounding rule, rtn, before gptq",
    "gptq+rtn": "has a second rounding rule, gptq, before rtn",
    "gptq+omniquant": "ends with omniquant, which is no rounding rule. .* one rounding rule last: rtn, gptq",
    "smoothquant+omniquant": "ends with omniquant, which is no rounding rule",
    "omniquant+smoothquant+gptq": "Put the learned part right before the rounding rule",
    "omnquant+gptq": "Unknown method 'omnquant'. Did you mean 'omniquant'",
    "affinequant+": "has an empty part. Join names by",
    "+gptq": "has an empty part",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[name]):
        METHODS.load(name)


def test_a_composition_is_one_class_with_the_options_of_its_parts() -> None:
    composed = METHODS.load("affinequant+gptq")
    assert composed is METHODS.load("affinequant+gptq") and composed.name == "affinequant+gptq"
    parts = [METHODS.load(name) for name in ("affinequant", "gptq")]
    assert list(composed.model_fields) == [field for part in parts for field in part.model_fields]
    assert composed.published_form == parts[0].published_form | parts[1].published_form
    assert all(part.paper in composed.paper for part in parts)
    assert "affinequant: LLaMA, W4A4" in composed.presets()
    assert METHODS.origin("affinequant+gptq") == "built in" and "affinequant+gptq" not in METHODS.names()


def test_presets_and_refusals_are_those_of_the_parts(tiny_llama) -> None:
    lane = make_lane(tiny_llama, "affinequant+gptq", "W3A16g16", act_order=True)
    alone = make_lane(tiny_llama, "affinequant", "W3A16g16").planner
    assert {k: getattr(lane.planner, k) for k in type(alone).model_fields} == alone.model_dump()
    assert lane.planner.static_groups is True
    bad = make_lane(tiny_llama, "smoothquant+gptq", "W3A16g16", act_order=True, static_groups=False)
    with pytest.raises(ConfigError, match="Leave static_groups out"):
        bad.planner.check(bad.scheme, spec_of(tiny_llama))


def test_a_part_tells_what_was_asked_for_from_its_defaults(build_tiny) -> None:
    model = build_tiny(
        "qwen3"
    )  # has no query_key site, which OmniQuant's default set drops and a request does not
    lane = make_lane(model, "omniquant+gptq", "W4A4")
    lane.planner.check(lane.scheme, spec_of(model))
    asked = make_lane(model, "omniquant+gptq", "W4A4", sites=("attn_in", "query_key"))
    with pytest.raises(ConfigError, match="query_key"):
        asked.planner.check(asked.scheme, spec_of(model))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rounding_to_nearest_as_a_part_changes_nothing(build_tiny, tokens, family) -> None:
    model = build_tiny(family)
    composed = quantized(model, tokens, "smoothquant+rtn", "W4A4")
    assert not differences(composed, quantized(model, tokens, "smoothquant", "W4A4"))


@pytest.mark.parametrize("method", ["omniquant", "affinequant"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_learned_part_learns_what_it_learns_alone_and_gptq_keeps_to_its_ranges(
    build_tiny, tokens, family, method
) -> None:
    model, ids = build_tiny(family), tokens[:4]
    alone, composed = (
        quantized(model, ids, name, "W3A8", **FAST).state(0) for name in (method, f"{method}+gptq")
    )
    assert alone.learned.keys() == composed.learned.keys()
    assert all(torch.equal(alone.learned[name], composed.learned[name]) for name in alone.learned)
    for role, linear in composed.linears.items():
        assert torch.equal(linear.scale, alone.linears[role].scale), role
        assert torch.equal(linear.zero_point, alone.linears[role].zero_point), role
    assert not torch.equal(composed.linears["q"].codes, alone.linears["q"].codes)


@pytest.mark.parametrize("method", ["smoothquant+gptq", "omniquant+gptq", "affinequant+gptq"])
def test_gptq_under_a_transform_has_a_smaller_output_error_than_rounding_to_nearest(
    build_tiny, tokens, method
) -> None:
    for family in ("llama", "opt"):
        model = build_tiny(family)
        options = {} if method.startswith("smooth") else FAST
        for record in quantized(model, tokens, method, "W3A16", **options).records:
            for role in spec_of(model).linears:
                assert record.extras[f"output_error.{role}"] < record.extras[f"output_error_nearest.{role}"]


def test_transforms_of_an_earlier_part_stay_as_they_were_found_while_a_later_part_learns(
    tiny_llama, tokens
) -> None:
    smooth = quantized(tiny_llama, tokens, "smoothquant", "W4A4").state(0)
    both = quantized(tiny_llama, tokens, "smoothquant+omniquant+gptq", "W4A4", **FAST).state(0)
    assert torch.equal(both.learned["attn_in.scale"], smooth.learned["attn_in.scale"])
    learned = both.learned["attn_in+.scale"]  # OmniQuant's, behind SmoothQuant's at the same site
    assert learned.std() > 0
    assert [t.site for t in both.transforms].count("attn_in") == 2


def test_a_later_part_starts_from_the_block_that_the_earlier_ones_leave(tiny_llama, tokens) -> None:
    """With SmoothQuant's whole scale applied first, the balance that OmniQuant starts from is the geometric rest."""
    options = {"smoothquant.alpha": 0.5, "omniquant.alpha": 0.5, "epochs": 1, "let_lr": 1e-12}
    options |= {"omniquant.sites": ("attn_in",)}
    both = quantized(tiny_llama, tokens, "smoothquant+omniquant+gptq", "W4A4", **options).state(0)
    first, second = both.learned["attn_in.scale"].reshape(-1), both.learned["attn_in+.scale"].reshape(-1)
    alone = quantized(
        tiny_llama, tokens, "omniquant", "W4A4", sites=("attn_in",), alpha=0.5, epochs=1, let_lr=1e-12
    ).state(0)
    # s = (a/w)^½ of the transformed block is that of the original, divided by SmoothQuant's scale
    assert torch.allclose(second, alone.learned["attn_in.scale"].reshape(-1) / first, rtol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "smoothquant+gptq", "affinequant+gptq"])
def test_a_resumed_run_gives_the_same_codes_bit_for_bit(tiny_opt, tokens, tmp_path, method) -> None:
    options = FAST if "affine" in method else {}
    whole = quantized(tiny_opt, tokens, method, **options)
    quantized(tiny_opt, tokens, method, checkpoint=Checkpoint(tmp_path, "key"), **options)
    Checkpoint(tmp_path, "key").truncate(1)
    resumed = quantized(tiny_opt, tokens, method, checkpoint=Checkpoint(tmp_path, "key"), **options)
    assert not differences(resumed, whole)


def test_lanes_of_compositions_give_what_each_gives_alone(tiny_llama, tokens) -> None:
    asked = [("gptq", "W3A16", {}), ("smoothquant+gptq", "W4A4", {}), ("omniquant+gptq", "W3A16g16", FAST)]
    lanes = [make_lane(tiny_llama, method, scheme, **options) for method, scheme, options in asked]
    for lane, together in zip(lanes, reconstruct_lanes(tiny_llama, tokens, lanes), strict=True):
        assert not differences(together, reconstruct_lanes(tiny_llama, tokens, [lane])[0]), lane.name


# ------------------------------------------------------------------------------------------ options


def test_options_are_prefixed_only_where_two_parts_have_them() -> None:
    composed = METHODS.load("smoothquant+omniquant+gptq")
    fields = list(composed.model_fields)
    assert {"smoothquant.alpha", "omniquant.alpha", "smoothquant.sites", "omniquant.sites"} <= {*fields}
    assert {"epochs", "act_order"} <= {*fields} and "alpha" not in fields
    made = validated(composed, {"gptq.act_order": True, "smoothquant.alpha": "0.3"}, "method")
    assert made.act_order is True and getattr(made, "smoothquant.alpha") == 0.3
    assert composed(**made.model_dump(mode="json")) == made
    with pytest.raises(ConfigError, match="given twice"):
        validated(composed, {"gptq.act_order": True, "act_order": True}, "method")
    with pytest.raises(ConfigError, match="unknown key 'alpha'"):
        validated(composed, {"alpha": 0.5}, "method")
    with pytest.raises(ConfigError, match="less than or equal to 1"):
        validated(composed, {"omniquant.alpha": 2}, "method")


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """Options of each method as they reach the runner, or the error."""
    monkeypatch.chdir(tmp_path)

    def ask(*arguments: str) -> dict | str:
        seen = []

        def stop(config: RunConfig, listener: object) -> None:
            seen.append({request.name: request.options for request in config.methods})
            raise ConfigError("reached")

        monkeypatch.setattr("qbench.runner.run", stop)
        result = CliRunner().invoke(main, ["run", *arguments])
        assert result.exit_code == 2, result.output
        return seen[0] if seen else result.stderr.splitlines()[-1]

    return ask


def test_the_command_line_addresses_options_of_parts(configured) -> None:
    method = ["--method", "affinequant+gptq"]
    for written in ("act_order=true", "gptq.act_order=true", "affinequant+gptq.act_order=true"):
        assert configured(*method, "--set", written) == {"affinequant+gptq": {"act_order": True}}
    both = [*method, "--method", "gptq", "--set", "gptq.damping_fraction=0.05", "--epochs", "3"]
    assert configured(*both) == {
        "affinequant+gptq": {"damping_fraction": 0.05, "epochs": 3},
        "gptq": {"damping_fraction": 0.05},
    }
    assert "Did you mean 'act_order'" in configured(*method, "--set", "gptq.actorder=true")
    assert "Method gptq has no option 'epochs'" in configured(*method, "--set", "gptq.epochs=3")
    assert "'rtn' is not among the chosen methods" in configured(*method, "--set", "rtn.epochs=3")


def test_an_option_of_two_parts_must_say_whose_it_is(configured) -> None:
    method = ["--method", "smoothquant+omniquant+gptq"]
    message = configured(*method, "--alpha", "0.3")
    assert "--set omniquant.alpha=VALUE or --set smoothquant.alpha=VALUE" in message
    assert configured(*method, "--set", "smoothquant.alpha=0.3") == {
        "smoothquant+omniquant+gptq": {"smoothquant.alpha": 0.3}
    }


def test_a_file_may_prefix_options_too(configured, tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(
        "methods: [{name: smoothquant+gptq, options: {gptq.act_order: true}}]\n"
    )
    assert configured("--config", "run.yaml") == {"smoothquant+gptq": {"act_order": True}}


def test_the_catalogue_shows_a_composition() -> None:
    result = CliRunner().invoke(main, ["methods", "affinequant+gptq"])
    assert result.exit_code == 0
    for text in ("affinequant, rounded by gptq.", "use_ln_matrix", "act_order", "affinequant: LLaMA, W4A4"):
        assert text in result.stdout


def test_a_run_records_the_composition_and_a_second_run_resumes_it(tmp_path) -> None:
    config = RunConfig.model_validate(
        {
            "methods": [{"name": "smoothquant+gptq", "options": {"true_sequential": True}}],
            "schemes": ["W4A16g64"],
            "calibration": {"n_samples": 2, "seq_len": 64},
            "evals": {"limit": 1, "seq_len": 64},
            "output": str(tmp_path / "results"),
            "save_dir": str(tmp_path / "models"),
        }
    )
    _, row = run(config)
    assert row.method == "smoothquant+gptq" and row.options["true_sequential"] is True
    assert row.options["damping_fraction"] == 0.01 and row.options["alpha"] == 0.8
    assert [t.site for t in row.transforms] == ["attn_in", "mlp_in"]
    assert row.blocks[0].extras["output_error.q"] < row.blocks[0].extras["output_error_nearest.q"]
    (saved,) = (tmp_path / "models").iterdir()
    assert "gptq" in saved.name.lower() and (saved / "config.json").is_file()
    _, again = run(config)
    assert again.metrics == row.metrics and again.blocks == row.blocks
