"""`qbench run`: from arguments to a RunConfig, and from rows to stdout."""

import json
import re
import shlex
from pathlib import Path

import pytest

from qbench.cli.method_options import METHOD_OPTIONS
from qbench.cli.run import run
from qbench.config import RunConfig, read_config

pytestmark = pytest.mark.usefixtures("fake_methods")


@pytest.fixture
def configured(qbench_cli, runner):
    """`configured("--seed 3")` is the RunConfig that reaches the runner."""

    def ask(arguments: str = "") -> RunConfig:
        result = qbench_cli("run", *shlex.split(arguments))
        assert result.exit_code == 0, result.stderr
        return runner.config

    return ask


@pytest.fixture
def refused(qbench_cli, runner):
    """`refused("--wbits x")` is the error; the runner was never reached and nothing was written."""

    def ask(arguments: str) -> str:
        before = sorted(Path.cwd().iterdir())
        result = qbench_cli("run", *shlex.split(arguments))
        assert result.exit_code == 2, result.output
        assert runner.config is None and result.stdout == ""
        assert sorted(Path.cwd().iterdir()) == before
        return result.stderr.splitlines()[-1]

    return ask


def test_nothing_given_is_the_default_run(configured) -> None:
    assert configured() == RunConfig()


def test_authors_command_line(configured) -> None:
    """As in OmniQuant's README, but for their CUDA_VISIBLE_DEVICES and --net."""
    config = configured(
        "--model /models/opt --method omniquant --epochs 20 --output_dir ./log --eval_ppl --wbits 3 --abits 16 "
        "--group_size 128 --lwc --let --nsamples 64 --seqlen 512 --batch_size 2 --seed 5 --calib_dataset c4 "
        "--limit 10 --save_dir ./out --resume ./ckpt"
    )
    assert config == RunConfig(
        model="/models/opt",
        methods=[{"name": "omniquant", "options": {"let": True, "lwc": True, "epochs": 20}}],
        schemes=["W3A16g128"],
        calibration={"dataset": "c4", "n_samples": 64, "seq_len": 512, "seed": 5},
        evals={"limit": 10},
        compute={"batch_size": 2},
        output="./log",
        save_dir="./out",
        resume="./ckpt",
    )


def test_the_other_spellings(configured) -> None:
    config = configured(
        "-m x --dataset a_b.txt --n-samples 3 --seq-len 9 --eval my_text=a_b.txt --eval c4 -o out_dir --dtype bfloat16 "
        "--autocast float16 --device cuda:1 --eval-batch-size 4 --micro-batch 1 --hidden-states disk --threads 2 "
        "--allow-fallback --trust-remote-code --revision r1 --restart --eval-seq-len 7"
    )
    assert config == RunConfig(
        model="x",
        revision="r1",
        trust_remote_code=True,
        calibration={"dataset": "a_b.txt", "n_samples": 3, "seq_len": 9},
        evals={"datasets": ["my_text=a_b.txt", "c4"], "batch_size": 4, "seq_len": 7},
        compute={"model_dtype": "bfloat16", "autocast": "float16", "device": "cuda:1", "micro_batch": 1,
                 "hidden_states": "disk", "threads": 2, "allow_fallback": True},
        output="out_dir",
        restart=True,
    )  # fmt: skip


def test_options_in_snake_case_mean_the_same(configured) -> None:
    options = (
        "--method affinequant --use-matrix --no-let --calib-dataset c4-x --published-form --allow-fallback"
    )
    config = configured(options)
    assert config.methods[0].options == {"published": True, "use_matrix": True, "let": False}
    assert config.calibration.dataset == "c4-x" and config.compute.allow_fallback
    assert configured(re.sub(r"(?<=\w)-(?=\w+\b)(?!x)", "_", options)) == config


@pytest.mark.parametrize(
    "flag", [flag for o in run.params for flag in (*o.opts, *o.secondary_opts) if flag[1] == "-"]
)
def test_every_option_is_known_in_snake_case(qbench_cli, flag: str) -> None:
    option = next(option for option in run.params if flag in (*option.opts, *option.secondary_opts))
    value = [] if option.is_flag else [str(getattr(option.type, "choices", ["1"])[0])]
    result = qbench_cli("run", "--" + flag[2:].replace("-", "_"), *value, "--help")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "scheme"),
    [
        ("--wbits 4", "W4A16"),
        ("--wbits 4 --abits 4", "W4A4"),
        ("--wbits 2 --group-size 64", "W2A16g64"),
        ("--wbits 8 --abits 8 --symmetric", "W8A8-sym"),
        ("--wbits 3 --group-size 0", "W3A16"),
        ("--scheme w4a16-g128", "W4A16g128"),
    ],
)
def test_bits_one_by_one(configured, arguments: str, scheme: str) -> None:
    assert configured(arguments).schemes == [scheme]


def test_several_schemes_and_methods_keep_their_order(configured) -> None:
    config = configured("--method omniquant --method rtn --scheme W4A4 --scheme W3A16")
    assert [m.name for m in config.methods] == ["omniquant", "rtn"]
    assert config.schemes == ["W4A4", "W3A16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--wbits 4 --scheme W4A4", "--wbits and --scheme say the same thing"),
        ("--abits 4", "--abits without --wbits"),
        ("--scheme W4A4 --group-size 128", "--group-size without --wbits"),
        ("--symmetric", "--symmetric without --wbits"),
        ("--wbits 9", "wbits=9 is not supported"),
        ("--wbits 4 --group-size -1", "group_size=-1 is not positive"),
        ("--scheme W4B4", "Cannot read scheme 'W4B4'"),
        ("--method afinequant", "Unknown method 'afinequant'. Did you mean 'affinequant'"),
        ("--nsamples 0", "calibration.n_samples=0"),
        ("--seeds 0", "seeds=0"),
        ("--device gpu", "compute.device='gpu' is refused: choose auto, cpu, cuda or cuda:N."),
        ("--save-dir=", "save_dir='' is refused"),
        ("--save-act-scales=", "save_act_scales='' is refused"),
        ("--batch-size 2 --micro-batch 3", "micro_batch=3 is more than the 2 of a step (--batch-size)."),
        ("--fewshot 3", "fewshot=3 is about tasks: name some with --tasks"),
        ("--limit-items 3", "limit_items=3 is about tasks: name some with --tasks"),
        ("--threads 99999", "compute.threads=99999"),
        ("--resume x --restart", "resume and restart contradict"),
        ("--config absent.yaml", "absent.yaml"),
        ("--method affinequant --set sf", "Cannot read --set 'sf'"),
        ("--method affinequant --set =1", "Cannot read --set '=1'"),
        ("--method affinequant --set .sf=1", "Cannot read --set '.sf=1'"),
        ("--method affinequant --set sf=many", "In the options of method affinequant: sf='many'"),
        ("--method affinequant --sf 2", "sf=2.0 is refused: input should be less than or equal to 1"),
        ("--method affinequant --set fs=1", "--set fs is no option of affinequant. No method has it. Did you"),
        ("--method affinequant --set affinequant.fs=1", "no option 'fs'. Did you mean 'sf'? It has: let"),
        ("--method affinequant --set omniquant.let=1", "'omniquant' is not among the chosen methods (affinequant)"),
        ("--method rtn --let", "--let is no option of rtn. It is an option of omniquant, affinequant."),
        ("--method rtn --method omniquant --sf 0.1", "no option of rtn, omniquant. It is an option of affinequant."),
        ("--method rtn --alpha 0.5", "--alpha is no option of rtn. No method has it."),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_met_is_refused_before_any_work(
    refused, arguments: str, message: str
) -> None:
    error = refused(arguments)
    assert error.startswith("Error: ") and message in error


def test_an_unwritable_output_is_refused_before_any_work(refused) -> None:
    Path("taken").write_text("a file")
    assert "--output='taken/below' cannot be a folder" in refused("--output taken/below")
    assert "--save-dir='taken'" in refused("--save-dir taken")


def test_a_methods_option_reaches_only_the_methods_that_have_it(qbench_cli, runner) -> None:
    arguments = "run --method rtn --method omniquant --method affinequant --epochs 3 --sf 0.5"
    result = qbench_cli(*shlex.split(arguments))
    assert [m.options for m in runner.config.methods] == [{}, {"epochs": 3}, {"epochs": 3, "sf": 0.5}]
    assert "note: --epochs goes to omniquant, affinequant; no such option: rtn" in result.stderr
    assert "note: --sf goes to affinequant; no such option: rtn, omniquant" in result.stderr


def test_options_not_given_are_left_to_the_presets(configured) -> None:
    assert [m.options for m in configured("--method affinequant --method omniquant").methods] == [
        {},
        {},
    ]


def test_seeds(configured) -> None:
    config = configured("--seeds 3 --seed 7")
    assert (config.seeds, config.calibration.seed) == (3, 7) and configured().seeds == 1


def test_set_for_one_method_and_for_all(configured) -> None:
    arguments = (
        "--method omniquant --method affinequant "
        "--set affinequant.epochs=5 --set let=no --set omniquant.epochs=7"
    )
    config = configured(arguments)
    assert [m.options for m in config.methods] == [{"let": False, "epochs": 7}, {"epochs": 5, "let": False}]


def test_set_beats_the_authors_option(configured) -> None:
    config = configured("--method affinequant --epochs 3 --set affinequant.epochs=5")
    assert config.methods[0].options == {"epochs": 5}


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("affinequant.sf=1e-2", {"sf": 0.01}),
        ("affinequant.seed_name=1e-2", {"seed_name": "1e-2"}),
        ("affinequant.use-matrix=true", {"use_matrix": True}),
        ("affinequant.sf=none", {"sf": None}),
        ("omniquant.sites=[attn_in]", {"sites": ["attn_in"]}),
        ("omniquant.query_key=published", {"query_key": "published"}),
    ],
)
def test_values_are_read_by_the_methods_model(configured, setting: str, options: dict) -> None:
    config = configured(f"--method {setting.partition('.')[0]} --set {setting}")
    assert config.methods[0].options == options


def test_published_form(configured) -> None:
    arguments = (
        "--method rtn --method omniquant --method affinequant --published-form "
        "--set affinequant.published=false"
    )
    config = configured(arguments)
    assert [m.options for m in config.methods] == [{}, {"query_key": "published"}, {"published": False}]
    assert not config.quantizer.zero_in_range and config.quantizer.attention_granularity == "published"
    assert configured().quantizer.zero_in_range


def test_a_file_with_options_on_top(configured) -> None:
    Path("run.yaml").write_text(
        "model: from-file\nschemes: [W2A16]\ncalibration: {seed: 9, n_samples: 4}\n"
        "methods:\n- name: affinequant\n  options: {sf: 1e-1}\n- rtn\n"
    )
    config = configured("--config run.yaml --nsamples 8 --epochs 2")
    assert (config.model, config.schemes) == ("from-file", ["W2A16"])
    assert (config.calibration.seed, config.calibration.n_samples) == (9, 8)
    assert [m.options for m in config.methods] == [{"sf": 0.1, "epochs": 2}, {}]
    assert [m.name for m in configured("--config run.yaml --method omniquant").methods] == ["omniquant"]


@pytest.mark.parametrize("content", ["calibration: 3\n", "calibration:\n"], ids=["number", "nothing"])
def test_a_malformed_section_under_an_option_is_an_error_not_a_crash(refused, content: str) -> None:
    Path("run.yaml").write_text(content)
    assert "calibration" in refused("--config run.yaml --seed 3")


def test_the_resolved_configuration_is_printed_and_reads_back(qbench_cli, runner) -> None:
    stderr = qbench_cli(*shlex.split("run --method omniquant --epochs 3 --scheme w3a16")).stderr
    Path("printed.yaml").write_text(stderr[: stderr.index("\n\n")])
    assert read_config("printed.yaml") == runner.config


def test_stdout_is_the_table_and_nothing_else(qbench_cli, runner) -> None:
    result = qbench_cli("run")
    assert result.stdout.splitlines()[0] == "ref-llama-14m"
    assert "28.23 ±4.59 *" in result.stdout and "load" not in result.stdout
    assert "load  tiny-llama" in result.stderr


@pytest.mark.parametrize("form", ["json", "csv", "markdown", "latex"])
def test_other_forms(qbench_cli, runner, form: str) -> None:
    from fake_results import make_run

    from qbench.reports.comparison import compare

    result = qbench_cli("run", "--format", form)
    assert result.stdout == compare(make_run()).render(form).rstrip("\n") + "\n"


def test_json_of_a_run_is_parseable_as_it_comes(qbench_cli, runner) -> None:
    rows = json.loads(qbench_cli("run", "--format", "json").stdout)
    assert rows[0]["method"] == "full-precision" and len(rows) == 9


def test_every_option_of_the_authors_is_a_field_of_the_real_methods() -> None:
    from qbench.methods.abq import ABQ
    from qbench.methods.affinequant import AffineQuant

    assert set(METHOD_OPTIONS) - {"bit_balance"} <= set(AffineQuant.model_fields)
    assert "bit_balance" in ABQ.model_fields
