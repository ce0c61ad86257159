"""Zero-shot and few-shot tasks through the installed lm-eval, on a model in memory.

A task is one of lm-eval's by name, a YAML definition or a jsonl file of the user's, or the embedded one. Whatever it
is, lm-eval builds its prompts and judges its answers; `evals.lm_eval_model` only runs the model. Tasks are prepared
once and score any number of models; the hash of every prompt and answer enters the protocol contract.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qbench.errors import ConfigError, DataError, first_line, suggest
from qbench.evals.continuations import questions
from qbench.results import Metric

PAPER6 = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
SETS = {"paper6": PAPER6, "hendrycksTest": ("mmlu",)}  # hendrycksTest: the papers' name for MMLU
EMBEDDED_SPEC, EMBEDDED_TASK = "stdlib", "stdlib_choice"  # as asked for, as shown (stdlib is also a text)
# Folders of lm-eval's task library that hold tasks not named after their folder: reading all of it takes 10 s.
FOLDERS = {"arc_easy": "arc", "arc_challenge": "arc", "boolq": "super_glue"}
FEWSHOT_SEED = 1234  # lm-eval's own default

MULTIPLE_CHOICE = {"query", "choices", "gold"}
PARTIAL = {"context_options", "continuation", "gold"}


@dataclass(frozen=True)
class TaskSet:
    """Prepared tasks.

    Attributes:
        fingerprints: Task to SHA-256 of its prompts and answers.
        origins: Task to where its questions came from, in the words of its protocol.
        encoded: Tokenizer to the token ids of each pair, so that the next model need not tokenize again.
    """

    loaded: dict[str, Any]  # lm-eval's TaskDict
    fingerprints: dict[str, str]
    origins: dict[str, str]
    limit: int | None
    encoded: dict[Any, dict[tuple[str, str], tuple[list[int], list[int]]]] = field(
        default_factory=dict, compare=False
    )

    def contract_fields(self) -> dict[str, Any]:
        """What two rows must share to be ranked together, by task."""
        return {
            name: {"protocol": self._protocol(name), "prompts": digest}
            for name, digest in self.fingerprints.items()
        }

    def texts(self) -> dict[str, list[str]]:
        """Task to what a model reads of each item: its prompt with the first of the answers."""
        found = {}
        for name in self.fingerprints:
            group = self.loaded.get("groups", {}).get(name)
            members = [task.task_name for task in group.get_all_tasks()] if group else [name]
            first: dict[tuple[str, int], str] = {}
            for member in members:
                for instance in self.loaded["tasks"][member].instances:
                    parts = [part for part in instance.arguments if isinstance(part, str)]
                    first.setdefault((member, instance.doc_id), "".join(parts))
            found[name] = list(first.values())
        return found

    def score(
        self,
        model: Any,
        tokenizer: Any,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Metric]:
        """Run all tasks on a model.

        Args:
            model: A causal language model of transformers, ready to run on `device`.
            tokenizer: Its tokenizer.
            device: Where inputs go.
            progress: Called with (requests done, requests in all).

        Returns:
            TASK/METRIC to measurement with the outcome of every item, task by task.
        """
        from lm_eval.evaluator import evaluate

        from qbench.evals.lm_eval_model import InMemoryLM

        with _quiet():
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(FEWSHOT_SEED)  # every model is shown the same examples
            found = evaluate(
                InMemoryLM(model, tokenizer, device, self.encoded.setdefault(tokenizer, {}), progress),
                self.loaded,
                limit=self.limit,
                bootstrap_iters=1000,  # only for metrics that are no means
            )
        return self._metrics(found)

    def _metrics(self, found: Mapping[str, Any]) -> dict[str, Metric]:
        metrics = {}
        grouped = {
            task.task_name: name
            for name, group in self.loaded.get("groups", {}).items()
            if group.has_aggregation
            for task in group.get_all_tasks()
        }
        for name in self.fingerprints:
            members = [task for task, group in grouped.items() if group == name] or [name]
            counts = [found["n-samples"][task] for task in members]
            for key, value in found["results"][name].items():
                metric, comma, filter_name = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                samples = [
                    s for task in members for s in found["samples"][task] if s["filter"] == filter_name
                ]
                label = metric if filter_name == "none" else f"{metric}:{filter_name}"
                metrics[f"{name}/{label}"] = Metric(
                    value=float(value),
                    stderr=_number(found["results"][name].get(f"{metric}_stderr,{filter_name}")),
                    n=sum(c["effective"] for c in counts),
                    n_total=sum(c["original"] for c in counts),
                    higher_is_better=bool(found["higher_is_better"].get(members[0], {}).get(metric, True)),
                    protocol=self._protocol(name),
                    chance=_chance(samples) if metric in ("acc", "acc_norm") else None,
                    **_items(samples, metric, float(value)),
                )
        return metrics

    def _protocol(self, name: str) -> str:
        task = self.loaded["tasks"].get(name) or self.loaded["groups"][name].get_all_tasks()[0]
        origin = f", {self.origins[name]}" if name in self.origins else ""
        shots = task.get_config("num_fewshot") or 0
        limit = "" if self.limit is None else f", first {self.limit}"
        return f"{name} (lm-eval {_lm_eval_version()}{origin}, {shots}-shot{limit})"


def load_tasks(specs: Sequence[str], limit: int | None = None, fewshot: int | None = None) -> TaskSet:
    """Prepare tasks.

    Args:
        specs: Each a name of lm-eval's, `paper6`, `stdlib`, a folder or file of local tasks, or NAME=PATH; several may
            be joined by commas.
        limit: Score only the first items of each task.
        fewshot: Worked examples in each prompt; default: what the task says, else none.

    Raises:
        ConfigError: If lm-eval is missing, or a name is unknown.
        DataError: If a task's questions cannot be read or reached.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-eval ({error}): pip install lm-eval, or leave --tasks out."
        ) from None
    built: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    asked: list[str] = []
    origins: dict[str, str] = {}
    with _quiet():
        for spec in dict.fromkeys(part.strip() for text in specs for part in _split(text)):
            for source in _sources(spec):
                part = source.load()
                clash = set(part["tasks"]) & set(built["tasks"])
                if clash:
                    raise ConfigError(f"Task {min(clash)!r} is asked for twice by --tasks; name it once.")
                for kind in built:
                    built[kind] |= part.get(kind, {})
                names = _shown(part)
                asked += names
                origins |= dict.fromkeys(names, source.origin) if source.origin else {}
        fingerprints = _prepare(built, asked, limit, fewshot)
    return TaskSet(built, fingerprints, origins, limit)


def _split(text: str) -> list[str]:
    """Parts between commas, unless the whole is a path that exists."""
    return [text] if Path(text).exists() else [part for part in text.split(",") if part.strip()]


def _shown(part: Mapping[str, Any]) -> list[str]:
    """Groups with a score of their own, and the tasks that are in none of them; without groups, the tasks."""
    groups = {name: group for name, group in part.get("groups", {}).items() if group.has_aggregation}
    inner = {
        child.name for group in groups.values() for child in group.get_all_groups() if child is not group
    }
    top = [name for name in groups if name not in inner]
    covered = {task.task_name for name in top for task in groups[name].get_all_tasks()}
    return top + [name for name in part["tasks"] if name not in covered]


# ------------------------------------------------------------------------------------- where tasks come from


@dataclass(frozen=True)
class _Source:
    """Something that lm-eval can load, and the word for it in a protocol (none for lm-eval's own)."""

    wanted: Sequence[str | dict[str, Any]]
    origin: str | None = None
    folder: Path | None = None  # of YAML definitions

    def load(self) -> dict[str, Any]:
        """Build the tasks with lm-eval."""
        try:
            if self.folder is None:
                return _manager(self.wanted).load(list(self.wanted))
            with contextlib.chdir(self.folder):  # data files may be named relative to their definition
                return _tasks_in(self.folder).load(list(self.wanted))
        except (ConfigError, DataError):
            raise
        except Exception as error:  # hub, datasets, jinja and pyarrow each have their own
            names = ", ".join(str(w["task"] if isinstance(w, dict) else w) for w in self.wanted)
            raise DataError(
                f"Cannot prepare task {names}: {first_line(error)}. Where the hub cannot be reached, give "
                f"local files: --tasks NAME=PATH (docs/evaluation.md), or use --tasks {EMBEDDED_SPEC}."
            ) from error


def _sources(spec: str) -> Iterator[_Source]:
    name, equals, target = ("", "", spec) if Path(spec).exists() else spec.rpartition("=")
    if equals and not (name and target):
        raise ConfigError(
            f"--tasks {spec!r} has nothing on one side of '='; write NAME=PATH, as in paper6=tasks."
        )
    if equals and not Path(target).expanduser().exists():
        raise DataError(f"--tasks {spec!r}: there is no file or folder {target!r}.")
    path = Path(target).expanduser()
    if not equals and target == EMBEDDED_SPEC:
        version = ".".join(map(str, sys.version_info[:2]))
        yield _Source([_local_task(EMBEDDED_TASK, questions())], f"standard library of Python {version}")
    elif path.is_file() and path.suffix == ".jsonl":
        yield _Source([_local_task(name or _task_name(path), _read(path))], path.name)
    elif path.is_file() and path.suffix in (".yaml", ".yml"):
        yield _Source([str(path.resolve())], path.name, path.resolve().parent)
    elif path.is_dir():
        yield from _in_folder(path, SETS.get(name, (name,)) if name else None)
    elif path.exists():
        raise DataError(f"--tasks {spec!r}: a local task is a .jsonl or .yaml file, or a folder of these.")
    else:
        yield _Source(SETS.get(target, (target,)))


def _in_folder(folder: Path, wanted: Sequence[str] | None) -> Iterator[_Source]:
    """Local tasks in a folder, all or those wanted: definitions, else the plain files of questions."""
    manager = _tasks_in(folder)
    defined = set(manager.all_tasks)
    files = {_task_name(path): path for path in sorted(folder.glob("*.jsonl"))}
    available = list(manager.all_subtasks) or sorted(files)  # beside definitions, files are their data
    if not available:
        raise DataError(f"Folder {str(folder)!r} holds no tasks: .jsonl or .yaml files (docs/evaluation.md).")
    for name in available if wanted is None else wanted:
        if name in defined:
            yield _Source([name], folder.name, folder.resolve())
        elif name in files:
            yield _Source([_local_task(name, _read(files[name]))], files[name].name)
        else:
            raise DataError(
                f"Folder {str(folder)!r} has no task {name!r}.{suggest(name, available)} "
                f"It has: {', '.join(available)}."
            )


def _task_name(path: Path) -> str:
    """`arc_easy` for `arc_easy_test.mc.jsonl`: what precedes the first dot, without the split."""
    return re.sub(r"_(val|validation|test)$", "", path.name.partition(".")[0])


def _tasks_in(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder.resolve()), include_defaults=False)


def _manager(wanted: Sequence[str | dict[str, Any]]) -> Any:
    """A manager that knows the wanted names, having read as little of lm-eval's library as possible."""
    import lm_eval.tasks

    names = [name for name in wanted if isinstance(name, str)]
    library = Path(lm_eval.tasks.__file__).parent
    folders = {library / FOLDERS.get(name, name) for name in names}
    manager = lm_eval.tasks.TaskManager(
        include_path=[str(folder) for folder in sorted(folders) if folder.is_dir()], include_defaults=False
    )
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            known = [*SETS, EMBEDDED_SPEC, *manager.all_tasks]
            raise ConfigError(
                f"Unknown task {name!r}.{suggest(name, known)} Give a name of lm-eval's (lm-eval ls tasks), paper6, "
                f"{EMBEDDED_SPEC}, or local files as NAME=PATH."
            )
    return manager


def _read(path: Path) -> list[dict[str, Any]]:
    """Questions of a jsonl file in one of the two layouts that need no definition."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {str(path)!r} as UTF-8 text: {error}.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"Line {number} of {str(path)!r} is not JSON: {error}.") from None
        keys = PARTIAL if isinstance(row, dict) and "context_options" in row else MULTIPLE_CHOICE
        choices = row.get("context_options", row.get("choices")) if isinstance(row, dict) else None
        if (
            not isinstance(row, dict)
            or not keys <= set(row)
            or not isinstance(choices, list)
            or not all(isinstance(choice, str) and choice for choice in choices)
            or not isinstance(row["gold"], int)
            or not 0 <= row["gold"] < len(choices)
        ):
            raise DataError(
                f"Line {number} of {str(path)!r} is no question: an object with {', '.join(sorted(MULTIPLE_CHOICE))} "
                f"or {', '.join(sorted(PARTIAL))} is needed, gold being the place of the right choice from 0."
            )
        rows.append({key: row[key] for key in sorted(keys)})
    if not rows or len({frozenset(row) for row in rows}) > 1:
        raise DataError(f"{str(path)!r} is empty or mixes two layouts; one file is one task.")
    return rows


def _local_task(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's configuration of a task over questions in memory.

    A blank that begins every choice becomes the delimiter, as in lm-eval's own tasks: `acc_norm` divides by the
    characters of a choice without it. There is no acc_norm where all questions have the same choices (yes, no), or
    where the choices of a question are equally long.
    """
    partial = "context_options" in rows[0]
    choices = "context_options" if partial else "choices"
    delimiter = " " if partial else ""
    every = [choice for row in rows for choice in row[choices]]
    if not partial and all(len(choice) > 1 and choice[0] == " " for choice in every):
        delimiter = " "  # of two blanks (piqa has such a choice) the second is the choice's own
        rows = [row | {"choices": [choice[1:] for choice in row["choices"]]} for row in rows]
    normed = (
        not partial
        and len({tuple(row["choices"]) for row in rows}) > 1
        and any(len(set(map(len, row["choices"]))) > 1 for row in rows)
    )

    def dataset(**_: Any) -> dict[str, Any]:
        import datasets

        return {"test": datasets.Dataset.from_list(rows)}

    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        # For partial scoring lm-eval has the answer's index as text and the shared continuation as target.
        "doc_to_text": "gold" if partial else "query",
        "doc_to_target": "continuation" if partial else "gold",
        "doc_to_choice": choices,
        "target_delimiter": delimiter,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (("acc", "acc_norm") if normed else ("acc",))
        ],
    }


# ------------------------------------------------------------------------------------------ prompts and items


def _prepare(
    built: Mapping[str, Any], asked: Sequence[str], limit: int | None, fewshot: int | None
) -> dict[str, str]:
    """Set the number of examples as lm-eval's own entry point does, and hash every prompt and answer."""
    digests = {}
    for name, task in built["tasks"].items():
        default = task.get_config("num_fewshot")
        if fewshot is not None and default == 0 != fewshot:
            raise ConfigError(
                f"Task {name!r} says num_fewshot: 0, which lm-eval lets nobody override; leave --fewshot out."
            )
        task.set_config("num_fewshot", fewshot if fewshot is not None else default or 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
        task.build_all_requests(limit=limit)
        digest = hashlib.sha256(f"{task.VERSION}".encode())
        for instance in task.instances:
            request = [instance.request_type, instance.arguments, instance.doc]
            digest.update(json.dumps(request, sort_keys=True, default=str).encode())
        digests[name] = digest.hexdigest()
    fingerprints = {}
    for name in asked:
        members = (
            sorted(t.task_name for t in built["groups"][name].get_all_tasks())
            if name in built["groups"]
            else []
        )
        joined = json.dumps([(member, digests[member]) for member in members])
        fingerprints[name] = hashlib.sha256(joined.encode()).hexdigest() if members else digests[name]
    return fingerprints


def _items(samples: Sequence[Mapping[str, Any]], metric: str, value: float) -> dict[str, Any]:
    """Per-item outcomes, where the value is their mean."""
    items = [_number(sample.get(metric)) for sample in samples]
    numbers = [item for item in items if item is not None]
    if not numbers or len(numbers) != len(items):
        return {}
    if not math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-6, abs_tol=1e-9):
        return {}
    return {"items": numbers, "items_name": "correct" if set(numbers) <= {0.0, 1.0} else metric}


def _chance(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Accuracy of a guess: the mean of one over the number of choices."""
    counts = [len(sample["arguments"]) for sample in samples]
    return math.fsum(1 / count for count in counts) / len(counts) if counts and min(counts) > 1 else None


def _number(value: Any) -> float | None:
    """A number of lm-eval's; it writes "N/A" where there is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _lm_eval_version() -> str:
    return importlib.metadata.version("lm-eval")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log and progress bars: qbench shows its own."""
    import lm_eval.api.task as task_module

    bar, levels = task_module.tqdm, {}
    # transformers warns of prompts beyond the model's limit, which lm-eval cuts
    for name in ("lm_eval", "lm-eval", "transformers.tokenization_utils_base"):
        levels[name] = logging.getLogger(name).level
        logging.getLogger(name).setLevel(logging.ERROR)
    task_module.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        task_module.tqdm = bar
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
