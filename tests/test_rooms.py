"""The house: what each room hands out, what notebooks take, and whether what is measured is what is hashed."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from erlib import config, paths, provenance
from erlib.load import points

HANDED_OUT = {
    "claims": "by_core_speed by_source counts evaluate inconsistencies judge_experts read_sources robust "
    "sensitivity write_scorecard",
    "dgx": "build_report",
    "engines": "laptop_system measure_engines recomputed_table1",
    "experts": "answered by_seen_tokens cluster_shares compare judge_answers judged matrix served",
    "load": "accounting aggregate all_configurations answers at_highest_load build_workload experts_sweep "
    "input_lengths load_records load_sweep overhead_sweep overview preliminary_records preliminary_sweep read "
    "read_files read_results routing_overhead run summarise",
    "paper_scale": "Explorer ablation_effects ablation_plan ablation_profile ablation_table aisimulate asked_in "
    "at_the_knee beside_h100 beside_published beside_simulation break_even by_part by_point calibrated client_cost "
    "ceilings decision design_load eight_of_them emulated_load error_table errors from_records "
    "full_scale_workloads goodput gpus_needed host_binding intervals leave_one_out limits mape pace "
    "published quality_and_load replicas_agreement replicas_beside_simulation replicas_finding "
    "replicas_plan reported run_ablation run_replicas served_records side_by_side simulate_left_out "
    "simulate_papers simulated_beside step_table under_load",
    "report": "architecture cluster_colours command controls engine_formats expert_matrix flipped_verdicts frontier "
    "harness_ablation load_figures measured_beside_simulated on_the_same_axes paper1_bucket_throughput "
    "paper1_input_tokens paper1_p99_response_time paper1_session_throughput paper1_tpot paper1_ttft "
    "paper1_user_throughput paper2_input_tokens paper2_preliminary paper2_system_throughput paper2_tpot paper2_ttft "
    "paper2_user_throughput_p99 plan published_points quality_and_load read_cluster_map replicas_emulated "
    "replicas_simulated router_comparison router_sees routing_overhead routing_worth save service_levels "
    "simulation_trust style systems_frontier table1_models two_best write_gallery your_gpu",
    "routing": "Clusterer build_clusterer compare_normalizers compare_routers map_2d",
    "workload": "input_lengths load_corpus mix_table",
}
"""What notebooks and their readers rely on."""
NOT_MEASURED = {
    "erlib.cache", "erlib.paths", "erlib.provenance", "erlib.config", "erlib.machine.leftovers",
    "erlib.machine.hardware", "erlib.machine.runfolder", "erlib.routing.embeddings", "erlib.routing.sklearn_pipeline",
    "erlib.routing.building", "erlib.routing.training", "erlib.routing.pickles", "erlib.machine.progress",
    "erlib.workload.corpus", "erlib.workload.brown",
}  # fmt: skip
"""What measured processes import without a request's time depending on it: settings, where things are, what made a
router. Routers' products are hashed by their content."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("erlib", cache_dir=None, exclude_type_checking_imports=True)


@pytest.mark.parametrize("room", HANDED_OUT)
def test_a_room_hands_out_what_notebooks_rely_on(room: str) -> None:
    module = importlib.import_module(f"erlib.{room}")
    assert sorted(module.__all__) == sorted(HANDED_OUT[room].split())
    for name in module.__all__:
        assert callable(getattr(module, name))


@pytest.mark.parametrize("path", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_import_rooms(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("erlib"):
                assert node.module == "erlib"
                assert {alias.name for alias in node.names} <= {*HANDED_OUT, "config", "paths"}


def test_a_room_imports_only_rooms_below_it() -> None:
    """The contracts stand in pyproject.toml."""
    linter = Path(sys.executable).with_name("lint-imports")
    command = [linter, "--no-cache", "--no-logo", paths.ROOT / "pyproject.toml"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=paths.ROOT)
    assert ran.returncode == 0, ran.stdout


def test_no_module_needs_itself(graph: grimp.ImportGraph) -> None:
    """Not even by way of others: of two that need each other, which comes first depends on who asks."""
    left = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while ready := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in ready:
            del left[module]
    assert left == {}


@pytest.mark.parametrize(
    "start", ["erlib.gateway.__main__", "erlib.gateway.forks", "erlib.serving.stack", "erlib.load.users"]
)
def test_what_measured_processes_import_is_hashed(graph: grimp.ImportGraph, start: str) -> None:
    """A module that is added to the measured path cannot be forgotten."""
    hashed = tuple(f"erlib.{place.removesuffix('.py').replace('/', '.')}" for place in points.MEASURED)
    needed = {start, *graph.find_upstream_modules(start)}
    known = {module for module in needed if module.startswith((*hashed, *NOT_MEASURED)) or module == "erlib"}
    packages = {module.rpartition(".")[0] for module in needed}
    assert needed - known - packages == set()


def test_code_is_known_by_what_it_does(tmp_path: Path) -> None:
    room, file = tmp_path / "room", tmp_path / "file.py"
    room.mkdir()
    file.write_text("def f():\n    return 1\n")
    (room / "a.py").write_text("A = 1\n")
    before = provenance.code_digest(file, room)
    file.write_text('"""Said."""\n\n\ndef f():  # and said again\n    """Once more."""\n    return 1\n')
    (room / "__pycache__").mkdir()
    (room / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"\0")
    assert provenance.code_digest(file, room) == before
    (room / "deep").mkdir()
    (room / "deep" / "b.j2").write_text("new")
    deeper = provenance.code_digest(file, room)
    assert deeper != before
    (room / "deep" / "b.j2").write_text("other")
    assert provenance.code_digest(file, room) not in (before, deeper)


_OF_MANY_KINDS = """
import os as o
from . import a, b as c

@d(1, x=None)
class E(F, metaclass=G):
    h: int = 0x10

    async def i(self, j, /, k=1.5, *l, m, n=b"n", **p) -> "q":
        async with j as r:
            yield f"{r!r:>{k}} and {l[1:None, ...]}" "and" 'more'
        return

def s(t): ...
"""


def test_every_python_knows_code_by_the_same_digest(tmp_path: Path) -> None:
    """Else a new Python would throw away what an old one has measured and trained."""
    file = tmp_path / "file.py"
    file.write_text(_OF_MANY_KINDS)
    of_many_kinds = provenance.code_digest(file)
    assert of_many_kinds == "c28653296a9ff62f"
    seen = {of_many_kinds}
    for old, new in [("return", "return None"), ("1:None", "1:"), ("x=None", "x=0"), ("x=None", "x=[]"), ("/, ", "")]:
        file.write_text(_OF_MANY_KINDS.replace(old, new))
        seen.add(provenance.code_digest(file))
    assert len(seen) == 6


def test_two_files_of_one_name_both_count(tmp_path: Path) -> None:
    one, other = tmp_path / "one" / "same.py", tmp_path / "other" / "same.py"
    for file in (one, other):
        file.parent.mkdir()
        file.write_text("A = 1\n")
    before = provenance.code_digest(one, other)
    one.write_text("A = 2\n")
    changed = provenance.code_digest(one, other)
    one.write_text("A = 1\n")
    other.write_text("A = 3\n")
    assert len({before, changed, provenance.code_digest(one, other)}) == 3


def test_a_change_on_the_measured_path_is_a_point_of_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[object, ...]] = []
    monkeypatch.setattr(provenance, "code_digest", lambda *places: hashed.append(places) or str(len(hashed)))
    points.code_digest.cache_clear()
    try:
        assert points.code_digest("openvino", False) != points.code_digest("emulated", False)
        assert points.code_digest("openvino", True) != points.code_digest("openvino", False)
    finally:
        points.code_digest.cache_clear()
    assert {"serving", "gateway"} <= set(hashed[0])
    assert "cluster" in hashed[2]
    assert "paper_scale/batching.py" in hashed[1]


def test_a_gateway_starts_without_what_it_does_not_need() -> None:
    heavy = ["torch", "sklearn", "pandas", "openvino", "transformers", "ray", "matplotlib"]
    code = f"import sys, erlib.gateway.process; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.ROOT)
    assert ran.stdout.strip() == "[]"


def test_a_load_run_and_its_figures_start_without_what_trains() -> None:
    code = "import sys; from erlib import report, load, paper_scale; report.paper1_ttft, load.run, "
    code += "paper_scale.design_load; "
    code += "print([name for name in ('torch', 'sklearn', 'nltk', 'transformers') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.ROOT)
    assert ran.stdout.strip() == "[]"


def test_a_profile_for_laptops_imports_nothing_of_gpus() -> None:
    code = "import sys; from erlib import report, load, claims; report.paper1_ttft, load.run, claims.evaluate; "
    code += "print([name for name in sys.modules if name.startswith(('erlib.dgx', 'erlib.cluster', 'ray'))])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.ROOT)
    assert ran.stdout.strip() == "[]"
    assert config.load_profile("laptop").serving.backend == "openvino"


def test_tests_share_support_and_nothing_else() -> None:
    tests = paths.ROOT / "tests"
    taken = [
        f"{file.relative_to(tests)}: {node.module}"
        for file in tests.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and re.match(r"(tests\.)?(test_|conftest)|tests\.(?!support)", node.module or "")
    ]
    assert taken == []


def test_each_room_has_tests_of_its_own() -> None:
    rooms = [room.parent.name for room in paths.STYLE.parent.glob("*/__init__.py")]
    assert len(rooms) > 9
    assert [room for room in rooms if not list((paths.ROOT / "tests" / room).glob("test_*.py"))] == []


@pytest.mark.parametrize(
    "path",
    sorted([*paths.FACTS.glob("*.md"), *(paths.ROOT / "docs").glob("*.md"), *paths.ROOT.glob("*.md")]),
    ids=lambda path: path.name,
)
def test_what_the_documents_name_is_there(path: Path) -> None:
    for name in set(re.findall(r"`(erlib(?:\.\w+)+)`", path.read_text(encoding="utf-8"))):
        *modules, last = name.split(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert _has(modules, last), f"{path.name} names {name}"


def _has(modules: list[str], name: str) -> bool:
    """Whether a module, or a class of one, has it."""
    try:
        return hasattr(importlib.import_module(".".join(modules)), name)
    except ModuleNotFoundError:
        owner = importlib.import_module(".".join(modules[:-1]))
        return hasattr(getattr(owner, modules[-1], None), name)
