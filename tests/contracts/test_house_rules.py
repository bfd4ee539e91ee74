"""The rules of the house that linters do not know."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "mpotrain").rglob("*.py"))
EVERYTHING = [
    *PACKAGE,
    *sorted((ROOT / "launcher").rglob("*.py")),
    *sorted((ROOT / "slurm").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
    *(ROOT / "benchmarks").glob("*.py"),
]
TORCH_FREE = (
    "mpotrain.cli",
    "mpotrain.config",
    "mpotrain.report.sites",
    "mpotrain.report.text",
    "mpotrain.report.grid_text",
    "mpotrain.engine.expert_traffic",
    "mpotrain.engine.megatron.config",
    "mpotrain.engine.megatron.copies",
    "mpotrain.engine.megatron.periods",
    "mpotrain.engine.megatron.feature_cuts",
    "mpotrain.engine.megatron.problems",
    "mpotrain.engine.megatron.holdings",
    "mpotrain.engine.megatron.stages",
    "mpotrain.engine.megatron.memory",
    "mpotrain.engine.megatron.traffic",
    "mpotrain.config_file",
    "mpotrain.sample",
    "mpotrain.models.sites",
    "mpotrain.models.network",
    "mpotrain.models.gpt2_config",
    "mpotrain.models.encoder_config",
    "mpotrain.models.t5_config",
    "mpotrain.nn.sharing_config",
    "mpotrain.data.objective_config",
    "mpotrain.tune.config",
    "mpotrain.tune.tasks",
    "mpotrain.tensor.expert_plan",
    "mpotrain.layered_toml",
    "mpotrain.provenance",
    "mpotrain.run_end",
    "mpotrain.parallel.watchdog",
    "mpotrain.preflight.options",
    "mpotrain.preflight.verdict",
    "mpotrain.preflight.blame",
    "mpotrain.preflight.text",
    "mpotrain.schema",
    "mpotrain.errors",
    "mpotrain.tensor.spec",
    "mpotrain.tensor.plan",
    "mpotrain.parallel.plan",
    "mpotrain.parallel.grid",
    "mpotrain.parallel.environment",
    "mpotrain.checkpoint.manifest",
    "mpotrain.checkpoint.manifest_file",
    "mpotrain.models.activations",
    "mpotrain.engine.memory",
    "mpotrain.train.schedule",
    "mpotrain.train.journal",
    "mpotrain.twins",
)


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_small_and_well_named(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}


def test_functions_fit_on_a_screen() -> None:
    long = []
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.body[0].lineno + 1
                if ast.get_docstring(node):
                    lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
                if lines > 60:
                    long.append(f"{path.name}:{node.name} {lines}")
    assert long == []


def test_light_modules_import_no_torch() -> None:
    code = "import sys\n" + "".join(f"import {name}\n" for name in TORCH_FREE)
    code += "print([m for m in ('torch', 'deepspeed', 'datasets', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_config_module_is_torch_free() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in PACKAGE
        if path.name == "config.py"
    ]
    assert len(names) >= 7
    code = f"import sys, importlib\n[importlib.import_module(n) for n in {names!r}]\n"
    code += "print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_deepspeed_is_imported_by_its_engine_files_alone() -> None:
    for path in PACKAGE:
        text = path.read_text()
        if re.search(r"^\s*(import|from) deepspeed", text, re.M):
            assert path.parent.name == "engine", path
            assert path.name.startswith("deepspeed"), path


def test_package_inits_hold_only_a_docstring() -> None:
    for path in PACKAGE:
        if path.name == "__init__.py" and path.parent.name != "mpotrain":
            body = ast.parse(path.read_text()).body
            assert len(body) == 1, path
            assert isinstance(body[0], ast.Expr), path


def test_nothing_is_unpickled() -> None:
    for path in PACKAGE:
        text = path.read_text()
        assert not re.search(r"weights_only\s*=\s*False", text), path
        assert not re.search(r"^\s*import (pickle|dill|cloudpickle)", text, re.M), path
        assert not re.search(r"shell\s*=\s*True", text), path
        assert not re.search(r"allow_pickle\s*=\s*True", text), path


def test_decision_records_are_numbered_without_gaps() -> None:
    names = sorted(path.name for path in (ROOT / "docs" / "adr").glob("*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))


def test_readme_names_only_files_and_targets_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z-]+)", readme)) <= targets
    for link in re.findall(r"\]\(((?!https?:)[^)#]+)", readme):
        assert (ROOT / link).exists(), link
    for run in re.findall(r"configs/\S+\.toml", readme):
        assert (ROOT / run).exists(), run
