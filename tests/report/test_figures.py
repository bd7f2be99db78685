"""Every figure is written with its numbers and its provenance; two drawings of the same records are the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from erlib import config, paths, report
from erlib.engines import table1
from erlib.load import metrics
from erlib.paper_scale import replicas
from erlib.provenance import MissingRecords
from erlib.report import canvas, diagrams, drawing, figures, input_tokens, over_users, paper1, paper2
from erlib.report.over_users import Panel
from erlib.report.own import engines as engine_figures
from erlib.report.own import hot_experts, overhead, routers
from erlib.routing import comparison
from tests.support import synthetic

matplotlib.use("agg")

CLUSTERS = pd.DataFrame({"x": np.arange(40.0), "y": np.arange(40.0) % 7, "cluster": np.arange(40) % 8})
ENGINES = pd.DataFrame(
    {"dtype": dtype, "layers": layers, "kv_cache": kv, "bits_per_weight": bits, "perplexity_ratio": ratio}
    | {"perplexity": 20 * ratio if layers == 30 else None, "tokens_per_s_at_1": 90.0, "tokens_per_s_at_8": 280.0}
    for dtype, bits, ratio in (("fp16", 16.0, 1.0), ("int8", 8.0, 1.004), ("int4", 5.0, 1.14))
    for layers in (30, 8, 2)
    for kv in ("f16", "u8")
)
LENGTHS = pd.DataFrame({"input_tokens": [2, 6, 9, 40], "paper_input_tokens": [48, 152, 222, 1021]})

ITEMS: dict[tuple[str, str], Callable[[pd.DataFrame, config.Profile], object]] = {
    ("paper1", "fig01_architecture"): lambda _, cfg: diagrams.architecture(CLUSTERS, cfg, "paper1"),
    ("paper1", "table1_models"): lambda _, cfg: diagrams.table1_models(table1.recomputed_table1("p1"), cfg, "paper1"),
    ("paper1", "fig02_ttft_base"): lambda runs, cfg: paper1.paper1_ttft(runs, cfg, "base"),
    ("paper1", "fig03_ttft_continuation"): lambda runs, cfg: paper1.paper1_ttft(runs, cfg, "continuation"),
    ("paper1", "fig04_tpot_base"): lambda runs, cfg: paper1.paper1_tpot(runs, cfg, "base"),
    ("paper1", "fig05_tpot_continuation"): lambda runs, cfg: paper1.paper1_tpot(runs, cfg, "continuation"),
    ("paper1", "fig06_user_throughput"): paper1.paper1_user_throughput,
    ("paper1", "fig07_p99_response_time"): paper1.paper1_p99_response_time,
    ("paper1", "fig08_session_throughput"): paper1.paper1_session_throughput,
    ("paper1", "fig09_bucket_throughput"): paper1.paper1_bucket_throughput,
    ("paper2", "fig01_architecture"): lambda _, cfg: diagrams.architecture(CLUSTERS, cfg, "paper2"),
    ("paper2", "table1_models"): lambda _, cfg: diagrams.table1_models(table1.recomputed_table1("p2"), cfg, "paper2"),
    ("paper2", "fig02_input_tokens"): lambda _, cfg: input_tokens.paper2_input_tokens(LENGTHS, cfg),
    ("paper2", "fig03_preliminary"): paper2.paper2_preliminary,
    ("paper2", "fig04_ttft"): paper2.paper2_ttft,
    ("paper2", "fig05_tpot"): paper2.paper2_tpot,
    ("paper2", "fig06_user_throughput_p99"): paper2.paper2_user_throughput_p99,
    ("paper2", "fig07_system_throughput"): paper2.paper2_system_throughput,
    ("workbench", "routing_overhead"): overhead.routing_overhead,
    ("workbench", "paper1_input_tokens"): lambda _, cfg: input_tokens.paper1_input_tokens(LENGTHS, cfg),
}
NO_RECORDS = ("fig01_architecture", "table1_models", "fig02_input_tokens", "paper1_input_tokens")
TIMED = [item for item in ITEMS if item[1] not in NO_RECORDS]


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    levels = {"paper1.users": [1, 8, 32], "paper2.users": [1, 8, 32]}
    return config.load_profile("laptop", {**levels, "scale.users": 31.25, "scale.input_tokens": 24})


@pytest.fixture(scope="module")
def records(profile: config.Profile) -> pd.DataFrame:
    load = [row for paper in ("p1", "p2") for row in synthetic.load_rows(profile, paper)]
    return synthetic.frame([*load, *synthetic.preliminary_rows(profile), *synthetic.overhead_rows(profile)])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    canvas.style()
    return tmp_path / "laptop" / "measured"


@pytest.mark.parametrize(("paper", "slug"), ITEMS)
def test_every_item_is_written_with_its_provenance(
    paper: str, slug: str, records: pd.DataFrame, profile: config.Profile, home: Path
) -> None:
    ITEMS[paper, slug](records, profile)
    files = {path.suffix: path for path in (home / paper).iterdir()}
    assert set(files) == {".png", ".svg", ".csv", ".json"} and {path.stem for path in files.values()} == {slug}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    assert not pd.read_csv(files[".csv"]).empty
    about = json.loads(files[".json"].read_text())
    assert about["source"] == "measured" and about["profile"] == "laptop"
    assert re.fullmatch(r"./run_all.sh --profile laptop .*  # draws it in 0\d_\w+", about["command"])
    assert "--set 'paper1.users=[1, 8, 32]'" in about["command"]  # the overrides in force belong to the command
    assert len(about["caption"]) > 100 and ("aper" in about["reference"])
    assert about["git_commit"] and about["versions"]["matplotlib"] == matplotlib.__version__
    assert not plt.get_fignums()  # a notebook would show an open figure a second time
    if (paper, slug) in TIMED:
        assert set(about["records"]["point_hashes"]) <= set(records["point_hash"])
        assert about["records"]["points"] == len(about["records"]["point_hashes"]) > 0
        assert about["host"] == "2 x Synthetic CPU, 24 GB" and "measured on 2 x Synthetic CPU" in about["footer"]
        assert "stored, not computed" in about["footer"]
        assert about["requests"]["failed"] == 0 and about["requests"]["answered"] > 0
    else:
        assert "measured on" not in about["footer"]  # arithmetic and diagrams do not pose as measurements


def test_all_the_papers_figures_and_tables_are_there() -> None:
    numbered = {(paper, slug.split("_")[0]) for paper, slug in ITEMS}
    assert {("paper1", f"fig0{n}") for n in range(1, 10)} | {("paper2", f"fig0{n}") for n in range(1, 8)} <= numbered
    assert {("paper1", "table1"), ("paper2", "table1")} <= numbered


def test_the_plotted_numbers_are_the_metrics(records: pd.DataFrame, profile: config.Profile, home: Path) -> None:
    paper1.paper1_session_throughput(records, profile)
    plotted = pd.read_csv(home / "paper1" / "fig08_session_throughput.csv").set_index(["config", "users", "turn"])
    chosen = records[(records["config"] == "p1.C") & (records["users"] == 32) & (records["turn"] == "continuation")]
    runs = [metrics.session_throughput(metrics.answers(run)) for _, run in chosen.groupby("repeat")]
    row = plotted.loc["p1.C", 32, "continuation"]
    assert row["mean"] == pytest.approx(np.mean(runs)) and row["sd"] == pytest.approx(np.std(runs, ddof=1))


def test_the_drawn_line_is_the_csv(records: pd.DataFrame, profile: config.Profile, home: Path) -> None:
    fig = paper2.paper2_ttft(records, profile)
    plotted = pd.read_csv(home / "paper2" / "fig04_ttft.csv")
    line = next(line for line in fig.axes[0].lines if line.get_label().startswith("D "))
    mine = plotted[(plotted["config"] == "p2.D") & (plotted["panel"] == "median over users")]
    assert line.get_xdata().tolist() == mine["users"].tolist()
    assert line.get_ydata().tolist() == pytest.approx(mine["mean"].tolist())


def test_a_level_without_answers_leaves_a_gap(records: pd.DataFrame, profile: config.Profile, home: Path) -> None:
    lost = (records["config"] == "p1.A") & (records["users"] == 8) | (records["config"] == "p1.B")
    fig = paper1.paper1_p99_response_time(records.assign(status=records["status"].mask(lost, "LOST")), profile)
    drawn = {line.get_label()[0]: line.get_ydata() for line in fig.axes[0].lines}
    assert np.isnan(drawn["A"]).tolist() == [False, True, False]
    assert np.isnan(drawn["B"]).all() and not np.isnan(drawn["C"]).any()
    assert [text.get_text()[0] for text in fig.legends[0].get_texts()] == ["A", "B", "C", "D", "R"]


def test_the_drawn_bars_are_the_csv(records: pd.DataFrame, profile: config.Profile, home: Path) -> None:
    for draw, slug in (
        (paper1.paper1_user_throughput, "fig06_user_throughput"),
        (paper1.paper1_p99_response_time, "fig07_p99_response_time"),
    ):
        fig = draw(records, profile)
        plotted = pd.read_csv(home / "paper1" / f"{slug}.csv")
        mine = plotted[(plotted["config"] == "p1.A") & (plotted["turn"] == "base")]
        (segments,) = (bars.get_segments() for bars in fig.axes[0].collections[:1])
        above = [segment[1][1] for segment in segments] - mine["mean"]
        assert above.tolist() == pytest.approx(mine["sd"].fillna(0).tolist())  # a spread of one user is none
        assert min(segment[0][1] for segment in segments) >= 0


def test_panels_with_and_without_bars_are_both_in_the_csv(records: pd.DataFrame, profile: config.Profile) -> None:
    summary = metrics.summarise(records[records["paper"] == "p1"])
    both = [Panel("user_tokens_per_s_mean", "", bars="user_tokens_per_s_sd"), Panel("response_p99_s", "")]
    assert set(over_users.means(summary, both)["metric"]) == {panel.metric for panel in both}


def test_bars_of_user_throughput_are_the_spread_over_users(
    records: pd.DataFrame, profile: config.Profile, home: Path
) -> None:
    paper1.paper1_user_throughput(records, profile)
    plotted = pd.read_csv(home / "paper1" / "fig06_user_throughput.csv").set_index(["config", "users", "turn"])
    assert plotted.index.is_unique
    summary = metrics.summarise(records[(records["config"] == "p1.B") & (records["users"] == 32)])
    base = summary[summary["turn"] == "base"]
    assert plotted.loc[("p1.B", 32, "base"), "sd"] == pytest.approx(base["user_tokens_per_s_sd"].mean())


def test_the_best_batch_size_is_the_fastest_at_most_users(
    records: pd.DataFrame, profile: config.Profile, home: Path
) -> None:
    paper2.paper2_preliminary(records, profile)
    table = pd.read_csv(home / "paper2" / "fig03_preliminary.csv")
    top = table[table["users"] == table["users"].max()]
    for _, group in top.groupby(["dtype", "tensor_parallel"]):
        assert group.loc[group["best"], "mean"].tolist() == [group["mean"].min()]


def _few_at_full_scale() -> tuple[config.Profile, pd.DataFrame]:
    few: dict[str, object] = {"workload.p1_output_tokens": 20, "paper1.configs": ["p1.A"], "paper2.configs": ["p2.D"]}
    few |= {f"{name}.users": [1, 20] for name in ("paper1", "paper2", "preliminary")}
    few |= {f"{name}.repeats": 1 for name in ("paper1", "paper2", "preliminary")}
    full = config.load_profile("dgx-h100", few)
    rows = [row for paper in ("p1", "p2") for row in synthetic.load_rows(full, paper)]
    return full, synthetic.frame([*rows, *synthetic.preliminary_rows(full)]).assign(source="simulated-hardware")


def test_simulated_sources_have_every_figure_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    full, runs = _few_at_full_scale()
    drawn: list[tuple[str, str]] = []
    monkeypatch.setattr(
        drawing, "save", lambda fig, profile, source, paper, slug, *_, **__: drawn.append((paper, slug))
    )
    figures.load_figures(runs, full, metrics.summarise(runs))
    every = sorted(item for item in TIMED if item[0] != "workbench")  # of requests alone
    assert sorted(drawn) == every
    drawn.clear()
    harness = runs.assign(source="simulated-harness")  # which changes nothing of the search
    figures.load_figures(harness, full, metrics.summarise(harness))
    assert sorted(drawn) == [item for item in every if item != ("paper2", "fig03_preliminary")]
    without_search = runs[runs["experiment"] == "load"]
    with pytest.raises(MissingRecords, match="run 07_paper_scale first"):
        figures.load_figures(without_search, full, metrics.summarise(without_search))


@pytest.mark.parametrize(("times", "shared"), [(2, True), (20, False)])
def test_sources_on_one_scale_are_drawn_on_the_same_axes(
    records: pd.DataFrame, profile: config.Profile, home: Path, times: int, shared: bool
) -> None:
    slow = records.assign(source="simulated-harness")
    for column in ("t_first_ns", "t_last_ns"):
        slow[column] = slow["t_send_ns"] + times * (slow[column] - slow["t_send_ns"])
    slow["token_ns"] = [
        (sent + times * (np.asarray(stamps) - sent)).astype(np.int64)
        for sent, stamps in zip(slow["t_send_ns"], slow["token_ns"], strict=True)
    ]
    alone = [paper1.paper1_p99_response_time(runs, profile) for runs in (records, slow)]
    tops = [fig.axes[0].get_ylim()[1] for fig in alone]
    assert bool(tops[0] >= tops[1] / 3) is shared
    with drawing.on_the_same_axes():
        together = [paper1.paper1_p99_response_time(runs, profile) for runs in (records, slow)]
        other = paper1.paper1_session_throughput(records, profile)
        before = [ax.get_ylim() for ax in other.axes]
        picture = home / "paper1" / "fig07_p99_response_time.png"
        drawn_alone = picture.read_bytes()
    limits = [[ax.get_ylim() for ax in fig.axes] for fig in together]
    assert (limits[0] == limits[1]) is shared
    assert limits[1][0][1] == tops[1]
    said = ["scale of its own" in [text.get_text() for text in fig.axes[0].texts] for fig in together]
    assert said == [not shared] * 2
    assert [ax.get_ylim() for ax in other.axes] == before
    assert picture.read_bytes() != drawn_alone
    assert (home.parent / "simulated-harness" / "paper1" / "fig07_p99_response_time.json").exists()


def _contrast(colour: Any) -> tuple[float, float]:
    """With white, and on a dark page, whose pictures are inverted and their hues turned back (CSS filters)."""
    luminance = np.array([0.2126, 0.7152, 0.0722])
    turned = np.array([[-0.574, 1.43, 0.144], [0.426, 0.43, 0.144], [0.426, 1.43, -0.856]])  # by 180 degrees
    found = []
    for seen in (lambda rgb: rgb, lambda rgb: np.clip(turned @ (0.9 - 0.8 * rgb), 0, 1)):
        two = [seen(np.array(matplotlib.colors.to_rgb(each))) for each in (colour, "white")]
        linear = [np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) for rgb in two]
        low, high = sorted(float(luminance @ rgb) for rgb in linear)
        found.append((high + 0.05) / (low + 0.05))
    return found[0], found[1]


def test_engines_are_drawn_with_their_values(profile: config.Profile, home: Path) -> None:
    fig = engine_figures.engine_formats(ENGINES, profile)
    said = [[text.get_text() for text in ax.texts] for ax in fig.axes]
    assert said[:2] == [["16.0", "8.0", "5.0"], ["0.0", "0.4", "14.0"]]
    assert [tick.get_text() for tick in fig.axes[2].get_xticklabels()] == [
        f"{dtype}, {layers}" for dtype in ("FP16", "INT8", "INT4") for layers in (8, 2)
    ]
    assert len(pd.read_csv(home / "workbench" / "engines.csv")) == len(ENGINES)


def test_every_colour_can_be_seen_on_white_and_on_a_dark_page() -> None:
    canvas.style()
    colours = [look[0] for look in (*canvas.LOOKS.values(), *canvas._SPARE_LOOKS, *canvas.DTYPE_LOOKS.values())]
    colours += [canvas.GREY, *matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]]
    for n in (2, 8, 9, 24):
        colours += canvas.cluster_colours(n)
    assert {colour: _contrast(colour) for colour in colours if min(_contrast(colour)) < 2} == {}


def test_the_preliminary_experiment_is_told_in_its_sources_own_words(
    records: pd.DataFrame, profile: config.Profile, home: Path
) -> None:
    def told(runs: pd.DataFrame, profile: config.Profile, directory: Path) -> tuple[str, list[str]]:
        panel = paper2.paper2_preliminary(runs, profile).axes[1]
        about = json.loads((directory / "paper2" / "fig03_preliminary.json").read_text())
        return about["caption"], [text.get_text() for text in panel.get_legend().get_texts()]

    full, runs = _few_at_full_scale()
    caption, labels = told(runs, full, home.parents[1] / "dgx-h100" / "simulated-hardware")
    assert "on eight GPUs" in caption and "cores" not in caption
    assert [label.partition(",")[0] for label in labels] == ["FP16", "FP8", "INT4"]
    assert not any("here" in label for label in labels)
    caption, labels = told(records, profile, home)
    assert "all cores" in caption and "GPUs" not in caption
    assert all("(here " in label for label in labels)


def test_system_throughput_shows_the_levels_that_stand_for_the_papers(
    records: pd.DataFrame, profile: config.Profile, home: Path
) -> None:
    fig = paper2.paper2_system_throughput(records, profile)
    assert [ax.get_title(loc="left") for ax in fig.axes] == [
        f"Throughput,\n{level}" for level in ("8 users (papers: 250)", "32 users (papers: 1000)")
    ]
    plotted = pd.read_csv(home / "paper2" / "fig07_system_throughput.csv")
    assert set(plotted["users"]) == {8, 32}  # 200 and 600 users are both nearest to 8 of 1, 8 and 32


@pytest.mark.parametrize("name", ["fig04_ttft", "fig01_architecture"])
def test_pictures_are_reproducible_byte_by_byte(
    name: str, records: pd.DataFrame, profile: config.Profile, home: Path
) -> None:
    def draw() -> dict[str, bytes]:
        ITEMS["paper2", name](records, profile)
        return {path.suffix: path.read_bytes() for path in (home / "paper2").iterdir()}

    first, second = draw(), draw()
    assert first == second
    assert b"<dc:date>" not in first[".svg"]


def test_missing_records_name_the_notebook(records: pd.DataFrame, profile: config.Profile) -> None:
    gap = records[~((records["config"] == "p1.C") & (records["users"] == 8))]
    with pytest.raises(MissingRecords, match=r"p1\.C, uniform mix, 8 users: run 05_load_sweep first"):
        paper1.paper1_ttft(gap, profile, "base")
    nothing = records[records["experiment"] == "load"]
    with pytest.raises(MissingRecords, match="04_preliminary_sweep"):
        paper2.paper2_preliminary(nothing, profile)
    with pytest.raises(MissingRecords, match="06_routing_overhead"):
        overhead.routing_overhead(nothing, profile)
    with pytest.raises(MissingRecords, match="01_clusterer"):
        diagrams.read_cluster_map(profile)


def test_a_mix_that_the_profile_does_not_measure_is_an_error(records: pd.DataFrame) -> None:
    only_normal = config.load_profile("laptop", {"paper2.mixes": ["normal"]})
    with pytest.raises(config.ConfigError, match=r"add it to paper2\.mixes"):
        paper2.paper2_user_throughput_p99(records, only_normal)


def test_sources_are_never_mixed(records: pd.DataFrame, profile: config.Profile) -> None:
    both = pd.concat([records, records.assign(source="simulated")])
    with pytest.raises(ValueError, match="measured and simulated"):
        paper1.paper1_tpot(both, profile, "base")


def test_failures_are_told_in_the_caption(profile: config.Profile, records: pd.DataFrame, home: Path) -> None:
    failed = records["status"].mask(
        (records["config"] == "p1.A") & (records["users"] == 8) & (records["user"] == 3), "LOST"
    )
    paper1.paper1_p99_response_time(records.assign(status=failed), profile)
    about = json.loads((home / "paper1" / "fig07_p99_response_time.json").read_text())
    assert about["requests"]["failed"] == 4  # two turns, two repeats
    assert f"4 of {about['requests']['answered'] + 4} requests failed" in about["caption"]


def test_one_repeat_and_one_level_can_be_drawn(home: Path) -> None:
    profile = config.load_profile("smoke", {"paper1.users": [2]})
    runs = synthetic.frame([*synthetic.load_rows(profile, "p1"), *synthetic.preliminary_rows(profile)])
    for item, draw in ITEMS.items():
        if (item[0] == "paper1" and item in TIMED) or item[1] == "fig03_preliminary":
            draw(runs, profile)
    assert len(list((home.parents[1] / "smoke/measured/paper1").glob("*.png"))) == 8


def test_every_configuration_has_its_own_look() -> None:
    for paper in ("p1", "p2"):
        looks = [canvas.look(name) for name in config.config_ids() if name.startswith(paper)]
        assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("bad", [CLUSTERS.iloc[:0], CLUSTERS[["x", "y"]]])
def test_a_broken_cluster_map_is_an_error(bad: pd.DataFrame, profile: config.Profile) -> None:
    with pytest.raises(ValueError, match="run 01_clusterer"):
        diagrams.architecture(bad, profile, "paper1")


def test_the_readers_own_matplotlib_settings_change_nothing() -> None:
    """As a ``matplotlibrc`` would make them."""
    own = {"text.usetex": True, "font.size": 40, "axes.facecolor": "black", "lines.linestyle": ":", "savefig.dpi": 10}
    own |= {"svg.fonttype": "none", "image.cmap": "jet", "axes.xmargin": 0.4, "path.sketch": (5, 50, 2)}
    canvas.style()
    expected = dict(matplotlib.rcParams)
    with matplotlib.rc_context(own):
        canvas.style()
        assert dict(matplotlib.rcParams) == expected


def test_save_takes_any_figure(home: Path) -> None:
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    data = pd.DataFrame({"a": [1.5, 2.5]})
    png = canvas.save(
        fig, config.load_profile("laptop"), "measured", "workbench", "own", data, "A caption.", "none", note="a note"
    )
    plt.close(fig)
    assert png == home / "workbench" / "own.png" and png.exists()
    pd.testing.assert_frame_equal(pd.read_csv(png.with_suffix(".csv")), data)
    about = json.loads(png.with_suffix(".json").read_text())
    assert about["caption"] == "A caption." and about["footer"].endswith("profile laptop · a note")


@pytest.mark.parametrize("paper", ["paper1", "paper2"])
def test_the_notebook_draws_every_item_of_its_paper(paper: str) -> None:
    (path,) = paths.NOTEBOOKS.glob(f"*_figures_{paper}.ipynb")
    source = "\n".join(cell["source"] for cell in nbformat.read(path, 4)["cells"] if cell["cell_type"] == "code")
    assert source.count("report.architecture(") == source.count("report.table1_models(") == 1
    timed = [name for name in report.__all__ if name.startswith(paper) and name != "paper1_input_tokens"]
    assert timed and all(f"report.{name}(" in source for name in timed)


def test_replicas_are_drawn_from_the_simulations_table(home: Path) -> None:
    profile = config.load_profile("smoke")
    table = replicas.run_replicas(profile, configs=["p2.E"], users=[30, 60], most_added=1)
    hot_experts.replicas_simulated(table, profile)
    folder = home.parents[1] / "smoke" / "simulated-hardware" / "workbench"
    assert len(pd.read_csv(folder / "replicas.csv")) == len(table)
    about = json.loads((folder / "replicas.json").read_text())
    assert about["source"] == "simulated-hardware" and "draws it in 06" in about["command"]
    assert "measured" not in about["footer"]


def test_a_router_that_is_not_there_has_a_row_and_its_reason_in_the_caption(
    profile: config.Profile, home: Path
) -> None:
    measured = [
        "documents",
        "nmi",
        "purity",
        "smallest",
        "largest",
        "conversations_growth",
        "conversations_growth_short",
    ]
    measured += [*comparison.KEPT, *(f"p{p}_ms_{words}" for p in (50, 99) for words in comparison.LATENCY_WORDS)]
    table = pd.DataFrame([dict.fromkeys(measured, 0.1 + i / 8) for i in range(len(comparison.NAMES))])
    table.insert(0, "router", list(comparison.NAMES))
    table.insert(1, "reason", ["", "", "no wheel", "", "", ""])
    table.loc[table["reason"] != "", measured] = np.nan
    fig = routers.router_comparison(table, profile)
    rows = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert len(rows) == len(comparison.NAMES) and "nearest examples" in rows[2]
    assert [text.get_text() for text in fig.axes[0].texts] == ["not there"]
    about = json.loads((home / "workbench" / "router_comparison.json").read_text())
    assert "no wheel" in about["caption"] and about["footer"].startswith("measured on")
    assert "draws it in 06_routing_overhead" in about["command"]
    assert not plt.get_fignums()
