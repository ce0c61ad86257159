import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from qbench.config import CalibrationConfig, RunConfig, read_config, validated
from qbench.errors import ConfigError
from qbench.scheme import Scheme


def test_defaults_are_the_embedded_run() -> None:
    config = RunConfig()
    assert (config.model, config.schemes, [m.name for m in config.methods]) == (
        "tiny-llama",
        ["W4A4"],
        ["affinequant"],
    )
    assert config.calibration == CalibrationConfig(dataset="auto", n_samples=None, seq_len=None, seed=2)
    assert config.quantizer.zero_in_range


def test_schemes_are_canonical_and_parsed() -> None:
    config = RunConfig(schemes=["w4a16-g128", "W4A4", "W4A16g128"])
    assert config.schemes == ["W4A16g128", "W4A4"]
    assert config.parsed_schemes == [Scheme(4, 16, group_size=128), Scheme(4, 4)]


def test_the_same_request_twice_is_one_but_other_options_are_another() -> None:
    twice = RunConfig(
        methods=["rtn", "rtn", {"name": "affinequant"}, {"name": "affinequant", "options": {"sf": 1}}]
    )
    assert [(m.name, m.options) for m in twice.methods] == [
        ("rtn", {}),
        ("affinequant", {}),
        ("affinequant", {"sf": 1}),
    ]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"modl": "x"}, r"unknown key 'modl'\. Did you mean 'model'.*Known: model, revision"),
        ({"calibration": {"n_sample": 3}}, r"'calibration\.n_sample'\. Did you mean 'n_samples'.*Known: dataset, n_s"),
        ({"methods": [{"name": "rtn", "option": {}}]}, r"'methods\.0\.option'\. Did you mean 'options'"),
        ({"calibration": {"n_samples": 0}}, r"calibration\.n_samples=0 is refused: .*greater than or equal to 1"),
        ({"calibration": {"seed": "two"}}, r"calibration\.seed='two' is refused"),
        ({"evals": {"limit": 0}}, r"evals\.limit=0"),
        ({"evals": {"datasets": []}}, r"evals\.datasets=\[\]"),
        ({"compute": {"device": "tpu"}}, r"compute\.device='tpu'"),
        ({"compute": {"device": "cuda:x"}}, r"compute\.device='cuda:x'"),
        ({"compute": {"model_dtype": "fp16"}}, r"compute\.model_dtype='fp16' is refused: .*'float16'"),
        ({"schemes": []}, r"schemes=\[\]"),
        ({"schemes": ["W4A4x"]}, "Cannot read scheme"),
        ({"methods": "rtn"}, r"methods='rtn' is refused"),
        ({"evals": {"seq_len": 0}}, r"evals\.seq_len=0"),
        ({"output": "a", "resume": ""}, r"resume=''"),
        ({"methods": [{"options": {}}]}, r"methods\.0\.name is missing"),
        ({"model": ""}, "model=''"),
        ({"resume": "a", "restart": True}, "resume and restart contradict"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_wrong_request_is_one_sentence_with_the_place(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig(**request_)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"limit.*n_samples|n_samples.*limit"):
        RunConfig(evals={"limit": -1}, calibration={"n_samples": "many"})


def test_values_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().model = "other"  # type: ignore[misc]


def test_canonical_form_is_independent_of_how_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("schemes: [w4a4]\ncalibration:\n  seed: 2\nmethods:\n- name: affinequant\n")
    assert read_config(file).canonical() == RunConfig().canonical()
    assert json.loads(RunConfig().canonical())["evals"]["datasets"] == ["auto"]


def test_hash_changes_with_every_field_but_places() -> None:
    base = RunConfig().hash()
    assert RunConfig(output="elsewhere", save_dir="x", restart=True).hash() == base
    assert RunConfig(resume="x").hash() == base
    changed = [
        RunConfig(model="tiny-opt"),
        RunConfig(revision="abc"),
        RunConfig(methods=["rtn"]),
        RunConfig(methods=[{"name": "affinequant", "options": {"sf": 0.1}}]),
        RunConfig(schemes=["W3A16"]),
        RunConfig(calibration={"seed": 3}),
        RunConfig(evals={"limit": 4}),
        RunConfig(compute={"device": "cpu"}),
        RunConfig(quantizer={"zero_in_range": False}),
    ]
    assert len({base, *(config.hash() for config in changed)}) == len(changed) + 1


def test_order_of_options_does_not_matter() -> None:
    one, two = (
        RunConfig(methods=[{"name": "m", "options": o}]) for o in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    )
    assert one.hash() == two.hash() and one.canonical() == two.canonical()


def test_yaml_output_reads_back(tmp_path: Path) -> None:
    config = RunConfig(
        methods=["rtn", {"name": "affinequant", "options": {"sf": 0.1}}], evals={"datasets": ["a=/b.txt"]}
    )
    file = tmp_path / "again.yaml"
    file.write_text(config.to_yaml())
    assert read_config(file) == config


def test_yaml_numbers_that_yaml_takes_for_strings_become_numbers(tmp_path: Path) -> None:
    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        let_lr: float = 0.1

    file = tmp_path / "run.yaml"
    file.write_text("methods:\n- name: m\n  options: {let_lr: 1e-4}\n")
    options = read_config(file).methods[0].options
    assert options == {"let_lr": "1e-4"}
    assert validated(Options, options, "method m").let_lr == 1e-4
    with pytest.raises(ConfigError, match=r"In method m: unknown key 'let_rl'\. Did you mean 'let_lr'"):
        validated(Options, {"let_rl": 1}, "method m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "not valid YAML: .*line 1"),
        ("- a\n- b\n", "holds a list"),
        ("model: a\nschemes: [W4A4]\nmodel: b\n", "'model' is given twice, line 3"),
        ("calibration:\n  seed: 1\n  seed: 2\n", "'seed' is given twice, line 3"),
        ("model: a\nmethod: rtn\n", "'method'. Did you mean 'methods'"),
    ],
    ids=["syntax", "list", "duplicate", "nested duplicate", "unknown key"],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(file)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_the_default_run_and_a_missing_one_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert read_config(tmp_path / "empty.yaml") == RunConfig()
    with pytest.raises(ConfigError, match=r"absent\.yaml'?: No such file"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        read_config(tmp_path / "binary.yaml")


def test_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("calibration: &c {seed: 7}\nevals: {}\ncompute:\n  <<: {threads: 1}\n  device: cpu\n")
    assert read_config(file).compute.threads == 1


def test_every_field_has_a_help_text() -> None:
    def check(model: type[BaseModel], prefix: str = "") -> None:
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                check(inner, f"{prefix}{name}.")
            else:
                assert field.description, prefix + name

    check(RunConfig)
