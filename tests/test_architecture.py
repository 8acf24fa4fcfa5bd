"""The rules that keep the parts apart."""

import ast
import os
from pathlib import Path

import pytest

import danon_lightning

PACKAGE = Path(danon_lightning.__file__).parent
REPOSITORY = PACKAGE.parent

# What each part of the package may import from the rest of it.
ALLOWED = {
    "attention": set(),
    "data": set(),
    "testing": set(),
    "benchmark": {"arguments", "attention", "data", "models", "strategies", "testing"},
    "optim": set(),
    "strategies": {"optim"},
    "callbacks": set(),
    "configs": set(),
    "planner": {"arguments", "strategies", "train"},
    "models": {"attention", "optim"},
    "arguments": set(),
    "command_line": set(),
    "train": {"command_line"},  # the rest is named by the configs
    "__init__": {"strategies"},
}


def parts() -> list[str]:
    return sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})


def imports_of(part: str) -> set[tuple[str, str]]:
    root = PACKAGE / part
    files = root.rglob("*.py") if root.is_dir() else [PACKAGE / f"{part}.py"]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {(str(file), name) for name in names if name.startswith("danon_lightning.")}
    return found


@pytest.mark.parametrize("part", parts())
def test_dependencies_point_one_way(part):
    assert part in ALLOWED, f"say in {Path(__file__).name} what {part} may import"
    wrong = {(file, name) for file, name in imports_of(part) if name.split(".")[1] not in ALLOWED[part] | {part}}
    assert not wrong


@pytest.mark.parametrize("name", ["strategies", "callbacks", "configs"])
def test_the_top_level_shows_the_folders_of_the_package(name):
    link = REPOSITORY / name
    if not link.exists():
        pytest.skip("not a checkout of the repository")
    assert os.path.realpath(link) == os.path.realpath(PACKAGE / name)


PUBLIC = {
    "danon_lightning": ["DanonHybridStrategy", "__version__"],
    "danon_lightning.callbacks": [
        "AttentionMonitor",
        "CommunicationMonitor",
        "Finding",
        "GradientMonitor",
        "HealthReport",
        "MeasuresAttention",
        "NaNDebugger",
        "NonFiniteError",
        "NumericLimits",
        "PerformanceMonitor",
        "PipelineTimeline",
        "ReportsFindings",
        "RunSummary",
        "TextSampler",
        "draw_timeline",
    ],
    "danon_lightning.models": [
        "BitsPerByte",
        "DALALightning",
        "FullAttentionLightning",
        "InfiniteLightning",
        "LanguageModel",
        "MSRALightning",
        "OptimizerConfig",
        "SequenceClassifier",
        "SuperHybridLightning",
        "UCSALightning",
    ],
    "danon_lightning.optim": ["OneBitAdam"],
    "danon_lightning.planner": [
        "Cluster",
        "Layout",
        "Memory",
        "Plan",
        "Profile",
        "measure",
        "nearest_feasible",
        "plan",
        "plan_profile",
    ],
    "danon_lightning.strategies": [
        "AsyncSync",
        "AutoCompression",
        "Bf16Compressor",
        "Compressor",
        "Context",
        "DanonHybridStrategy",
        "ErrorFeedback",
        "Fp16Compressor",
        "GradientCommunicator",
        "Int4Compressor",
        "Int8Compressor",
        "LinearCompressor",
        "Mesh",
        "PeriodicSync",
        "PipelinedStrategy",
        "PowerSGDCompressor",
        "RandomKCompressor",
        "SignCompressor",
        "TopKCompressor",
        "available_compressors",
    ],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_frozen(module):
    """A name that users import is changed on purpose, here too."""
    imported = __import__(module, fromlist=["__all__"])
    assert sorted(imported.__all__) == sorted(PUBLIC[module])
    assert all(hasattr(imported, name) for name in imported.__all__)
