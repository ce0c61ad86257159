import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import qbench
from qbench import provenance
from qbench.errors import DataError


def test_environment_names_versions_and_is_json() -> None:
    found = provenance.environment()
    assert found["qbench"] == qbench.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["pydantic"]
    assert found["cpu"]
    assert json.loads(json.dumps(found)) == found


def test_environment_names_no_person_and_no_machine() -> None:
    import getpass
    import platform

    text = json.dumps(provenance.environment())
    assert str(Path.home()) not in text
    assert platform.node() not in text or len(platform.node()) < 4
    assert f'"{getpass.getuser()}"' not in text


def test_a_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("pydantic", "no-such-package"))
    assert provenance.environment()["packages"]["no-such-package"] is None


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with a package in it; returns the package."""
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    return package


def test_commit_and_dirty_flag(checkout: Path) -> None:
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert provenance.git_commit(checkout) == {"hash": head.stdout.strip(), "dirty": False}
    (checkout.parent / "notes.txt").write_text("beside the package")
    assert provenance.git_commit(checkout) == {"hash": head.stdout.strip(), "dirty": False}
    (checkout / "new.py").write_text("an untracked module changes what runs")
    assert provenance.git_commit(checkout) == {"hash": head.stdout.strip(), "dirty": True}


def test_an_installed_package_does_not_claim_the_commit_of_the_folder_around_it(checkout: Path) -> None:
    installed = checkout.parent / ".venv" / "lib" / "pkg"
    installed.mkdir(parents=True)
    assert provenance.git_commit(installed) is None


def test_no_git_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.git_commit(checkout) is None


def test_contract_depends_on_content_and_not_on_order_or_container() -> None:
    one, fields = provenance.contract({"tokens": "ab", "windows": (64, 1024)})
    two, _ = provenance.contract({"windows": [64, 1024], "tokens": "ab"})
    assert one == two
    assert fields == {"tokens": "ab", "windows": [64, 1024]}
    assert provenance.contract(fields)[0] == one  # the fields of a stored record give its hash again
    assert provenance.contract({"tokens": "ab", "windows": [64, 1023]})[0] != one


def test_contract_refuses_what_would_not_compare() -> None:
    with pytest.raises(ValueError, match="JSON"):
        provenance.contract({"loss": float("nan")})


def test_hashes_are_sha256(tmp_path: Path) -> None:
    assert provenance.sha256_bytes(b"abc").startswith("ba7816bf8f01cfea")
    assert provenance.sha256_json({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()
    (tmp_path / "f").write_bytes(b"abc")
    assert provenance.fingerprint_file(tmp_path / "f") == provenance.sha256_bytes(b"abc")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        provenance.fingerprint_file(tmp_path / "absent")
    with pytest.raises(DataError, match="directory"):
        provenance.fingerprint_file(tmp_path)


def model_folder(folder: Path, weights: bytes = b"weights", config: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(config)
    return folder


def test_a_model_is_its_content_never_its_path(tmp_path: Path) -> None:
    one = provenance.fingerprint_folder(model_folder(tmp_path / "a"))
    other = model_folder(tmp_path / "b" / "c")
    (other / "README.md").write_text("a card")
    assert provenance.fingerprint_folder(other) == one
    assert provenance.fingerprint_folder(model_folder(tmp_path / "d", weights=b"Weights")) != one
    assert provenance.fingerprint_folder(model_folder(tmp_path / "e", config='{"a": 1}')) != one
    two_shards = model_folder(tmp_path / "f")
    (two_shards / "model-2.safetensors").write_bytes(b"more")
    assert provenance.fingerprint_folder(two_shards) != one


def test_the_hub_cache_gives_the_same_fingerprint_without_reading_the_weights(tmp_path: Path) -> None:
    plain = model_folder(tmp_path / "plain")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob = blobs / hashlib.sha256(b"weights").hexdigest()
    blob.write_bytes(b"")  # unread, so its content does not matter
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "config.json").write_text("{}")
    assert provenance.fingerprint_folder(snapshot) == provenance.fingerprint_folder(plain)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No model weights"):
        provenance.fingerprint_folder(tmp_path)


DRAW = {"dataset": "w", "text": "t1", "drawn": "random starts", "n_samples": 8, "seq_len": 16, "bos": "none"}


def contract_of(evaluation: dict | None = None, **changes: object) -> str:
    calibration = {**DRAW, "seed": 2, "tokens": "a", **changes}
    return provenance.contract({"model": "m", "calibration": calibration, "evaluation": evaluation or {}})[0]


def test_seeds_of_one_draw_share_a_contract_and_have_fingerprints_of_their_own() -> None:
    one = {"calibration": {**DRAW, "seed": 0, "tokens": "a"}}
    two = {"calibration": {**DRAW, "seed": 1, "tokens": "b"}}
    assert contract_of(seed=0, tokens="a") == contract_of(seed=1, tokens="b")
    assert provenance.calibration_fingerprint(one) != provenance.calibration_fingerprint(two)
    assert provenance.same_base(one, two) and provenance.differences([one, two]) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"text": "t2"},
        {"n_samples": 9},
        {"seq_len": 17},
        {"bos": "stream start"},
        {"drawn": "whole"},
        {"dataset": "v"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_defines_the_draw_is_in_the_contract(change: dict) -> None:
    assert contract_of() != contract_of(**change)
    name, value = next(iter(change.items()))
    sides = [{"calibration": DRAW}, {"calibration": {**DRAW, **change}}]
    assert provenance.differences(sides) == {f"calibration.{name}": [DRAW[name], value]}
    assert not provenance.same_base(*sides)


def test_a_record_that_does_not_name_its_text_keeps_its_tokens_in_the_hash() -> None:
    old = [{"calibration": {"dataset": "w", "tokens": tokens}} for tokens in "ab"]
    assert provenance.contract(old[0])[0] == provenance.sha256_json(old[0])  # as it was written then
    assert provenance.contract(old[0])[0] != provenance.contract(old[1])[0]
    assert provenance.calibration_fingerprint(old[0]) is None
    assert provenance.calibration_fingerprint({}) is None
    assert provenance.differences(old) == {"calibration.tokens": ["a", "b"]}


def test_evaluations_that_one_side_lacks_are_no_difference_but_other_ones_of_a_name_are() -> None:
    text = {"wiki": {"protocol": "p", "tokens": "x"}}
    one = {"model": "m", "evaluation": text}
    more = {"model": "m", "evaluation": {**text, "piqa": {"protocol": "q"}}}
    other = {"model": "m", "evaluation": {"wiki": {"protocol": "p", "tokens": "y"}}}
    assert provenance.contract(one)[0] != provenance.contract(more)[0]
    assert provenance.same_base(one, more) and provenance.same_base(one, other)
    assert provenance.differences([one, more]) == {}
    assert provenance.differences([one, more, other]) == {"evaluation.wiki.tokens": ["x", "x", "y"]}
    assert provenance.differences([one, {"model": "n", "evaluation": text}]) == {"model": ["m", "n"]}


def test_an_evaluation_is_named_by_its_task_or_by_the_whole_key() -> None:
    fields = {"evaluation": {"wiki": 1, "piqa/acc": 2}}
    found = [
        provenance.evaluation_of(fields, key)
        for key in ("wiki/perplexity", "wiki/kl_mean", "piqa/acc", "c4/x")
    ]
    assert found == [1, 1, 2, None]
    assert provenance.evaluation_of({}, "wiki/perplexity") is None
