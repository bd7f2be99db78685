"""Traces in other tools' formats: what is read, what is refused, and what they read of ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import environments, peers
from erlib.config import ConfigError
from erlib.workload import traces
from erlib.workload.traces import Trace
from tests.support import synthetic

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
OWN = "arrival_s,input_tokens,output_tokens\n"
ASKED = '{"timestamp": 1, "prompt_tokens": 5, "generated_tokens": 2'

WRITTEN = {
    "own": OWN + "10,5,2\n10.5,6,3\n12,7,1\n",
    "azure": AZURE
    + "2023-11-16 18:59:59.6805900,5,2\r\n2023-11-16 19:00:00.1805900,6,3\r\n2023-11-16 19:00:01.6805900,7,1\r\n",
    "mooncake": '{"timestamp": 2500, "input_length": 5, "output_length": 2, "hash_ids": [0]}\n'
    '{"timestamp": 3000, "input_length": 6, "output_length": 3, "hash_ids": [0, 1]}\n'
    '{"timestamp": 4500, "input_length": 7, "output_length": 1, "hash_ids": []}\n',
    "burstgpt": "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "19440110.0,a-b,43,GPT-4,5,2,7,Conversation log\n19440110.5,,2,ChatGPT,6,3,9,API log\n"
    "19440112.0,,1,ChatGPT,7,1,8,API log\n",
    "splitwise": "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,5,2\n0.5,6,3\n2.0,7,1\n",
    "semantic-router": '{"timestamp":0.451,"prompt_tokens":5,"generated_tokens":2,"selected_model":"llama8b"}\n'
    '{"timestamp":0.951,"prompt_tokens":6,"generated_tokens":3,"selected_model":"llama70b","complexity":"low"}\n\n'
    '{"timestamp":2.451,"prompt_tokens":7,"generated_tokens":1,"selected_model":"llama8b","category":"prose"}\n',
}
"""The same three requests. Columns and their units as the tools themselves have them: Azure/AzurePublicDataset
b469a113 (data/AzureLLMInferenceTrace_conv.csv: seven decimals, lines end in CR LF), kvcache-ai/Mooncake 3b5a5941
(FAST25-release/traces, ms, ties), HPMLL/BurstGPT e92f533b (README's schema, the eight columns of BurstGPT_3),
microsoft/vidur 7d475133 (data/processed_traces/splitwise_conv.csv), vllm-project/semantic-router 3d48f8c9
(src/fleet-sim/examples/trace_samples, fleet_sim/workload/trace.py, fleet_sim/api/trace_ingest.py)."""


def given(tmp_path: Path, content: str, name: str = "anything.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("kind", traces.FORMATS)
def test_every_format_is_known_by_its_columns(tmp_path: Path, kind: str) -> None:
    found = traces.read(given(tmp_path, WRITTEN[kind]))
    assert found.format == kind
    assert found.arrival_s.tolist() == pytest.approx([0, 0.5, 2], abs=1e-9)
    assert found.input_tokens.tolist() == [5, 6, 7]
    assert found.output_tokens.tolist() == [2, 3, 1]
    assert found.requests_per_s == pytest.approx(1.0)
    if kind == "semantic-router":
        assert found.experts == ("llama70b", "llama8b")
        assert found.cluster is not None
        assert found.cluster.tolist() == [1, 0, 1]
    else:
        assert found.cluster is None


def test_columns_that_other_tools_write_instead(tmp_path: Path) -> None:
    """vidur's ``arrived_at`` is Splitwise's ``timestamp``; fleet-sim's uploads are CSV or JSON lines, with ``model``
    for ``selected_model`` (trace_ingest.compute_trace_stats); Azure's files of 2024 have a time zone in their dates.
    """
    later = "2024-05-12 00:00:00.500000+00:00"
    for content, kind in (
        ("timestamp,num_prefill_tokens,num_decode_tokens\n1.0,5,2\n1.5,6,3\n", "splitwise"),
        ("timestamp,prompt_tokens,generated_tokens,model\n1,5,2,b\n1.5,6,3,a\n", "semantic-router"),
        (f"{AZURE}2024-05-12 02:00:00+02:00,5,2\n{later},6,3\n", "azure"),
        ("Timestamp,Model,Request tokens,Response tokens,Log Type\n5,GPT-4,5,2,x\n5.5,GPT-4,6,3,x\n", "burstgpt"),
    ):  # fmt: skip
        found = traces.read(given(tmp_path, content))
        assert (found.format, found.arrival_s.tolist(), len(found)) == (kind, [0, 0.5], 2)


def test_clusters_of_an_own_trace(tmp_path: Path) -> None:
    header = "arrival_s,input_tokens,output_tokens,cluster\n"
    found = traces.read(given(tmp_path, f"\ufeff{header}0,5,2,3\n0,6,3,10\n"))
    assert found.cluster is not None
    assert found.cluster.tolist() == [3, 10]
    assert len(found.experts) == 11
    with pytest.raises(ConfigError, match="line 2: cluster is -1: clusters are numbered from 0"):
        traces.read(given(tmp_path, f"{header}0,5,2,-1\n"))
    with pytest.raises(ConfigError, match="line 3: cluster must be a whole number, not 'code'"):
        traces.read(given(tmp_path, f"{header}0,5,2,0\n0,5,2,code\n"))


def test_empty_cells_at_the_ends_of_lines_are_passed_over(tmp_path: Path) -> None:
    for header in (OWN, f"{OWN[:-1]},\n", f"{OWN[:-1]},,\n"):
        assert traces.read(given(tmp_path, f"{header}0,5,2,,\n1,6,3,\n")).output_tokens.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("names", "clusters", "experts"),
    [
        (["expert-2", "expert-0"], [2, 0], ("expert-0", "expert-1", "expert-2")),
        (["expert-02", "expert-01", "expert-08"], [1, 0, 2], ("expert-01", "expert-02", "expert-08")),
        (["expert-1", "expert-01"], [1, 0], ("expert-01", "expert-1")),
        (["expert-\u0663", "expert-1"], [1, 0], ("expert-1", "expert-\u0663")),
    ],
)
def test_experts_are_ours_by_number_and_others_by_name(
    tmp_path: Path, names: list[str], clusters: list[int], experts: tuple[str, ...]
) -> None:
    lines = [f'{ASKED}, "selected_model": "{name}"}}\n' for name in names]
    found = traces.read(given(tmp_path, "".join(lines)))
    assert found.cluster is not None
    assert (found.cluster.tolist(), found.experts) == (clusters, experts)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no request"),
        (OWN, "holds no request"),
        ("\n\n", "holds no request"),
        (f"{OWN}-1,5,2\n", r"line 2: arrival_s is negative \('-1'\)"),
        (f"{OWN}0,5,2\n,6,3\n", "line 3: no arrival_s"),
        (f"{OWN}0,5,2\n1,6\n", "line 3: no output_tokens"),
        (f"{OWN}0,5,2\n\n1,0,3\n", "line 4: input_tokens is 0: a request has at least one token"),
        (f"{OWN}0,5,-2\n", "line 2: output_tokens is -2: leave such requests out"),
        (f"{OWN}0,5,2.5\n", "line 2: output_tokens must be a whole number, not '2.5'"),
        (f"{OWN}0,5,nan\n", "line 2: output_tokens must be a whole number, not 'nan'"),
        (f"{OWN}0,1e30,2\n", "line 2: input_tokens must be a whole number"),
        (f"{OWN}inf,5,2\n", "line 2: arrival_s must be a number, not 'inf'"),
        (f"{OWN}0,5,2\n2,5,2\n1,5,2\n", "line 4: arrival_s is before that of the line above: sort the lines by it"),
        (f'{OWN}0,5,2\n"0,5,2' + "x" * 200_000, "not CSV"),
        ("when,in,out\n0,5,2\n", "line 1: columns when, in, out are of no known trace; known are own: arrival_s, "),
        (f"{AZURE}17.5,5,2\n", r"line 2: TIMESTAMP must be a date such as 2023-11-16 18:15:46.6805900, not '17.5'"),
        ("Timestamp,Request tokens,Response tokens\n5,5,0\n", "Response tokens is 0: BurstGPT keeps failed requests"),
        ('{"timestamp": 0, "input_length": 5}\n', "line 1: columns timestamp, input_length are of no known trace"),
        ('{"timestamp": 0, "input_length": 5, "output_length": null}\n', "line 1: no output_length"),
        ('{"timestamp": 0, "input_length": true, "output_length": 2}\n', "input_length must be a whole number"),
        ('{"timestamp": [0], "input_length": 5, "output_length": 2}\n', "timestamp must be a number"),
        (WRITTEN["mooncake"] + "{\n", "line 4: not a JSON object"),
        ("[1]\n", "line 1: not a JSON object"),
        (WRITTEN["semantic-router"] + '{"timestamp":9,"prompt_tokens":5,"generated_tokens":2}', "no selected_model"),
        (f"{OWN}0,1,234,56\n", "line 2: 4 cells, but 3 columns: put what has a comma in quotation marks"),
        (f"{OWN}0,5,2\n\n1,1,234,56\n", "line 4: 4 cells"),
        (f"{OWN}0,5\n", "line 2: no output_tokens"),
        ("arrival_s,input_tokens,output_tokens,cluster\n0,5,2\n", "line 2: no cluster"),
        ("arrival_s,input_tokens,output_tokens,input_tokens\n0,5,2,6\n", "line 1: two columns are called 'input_tok"),
        (f'{OWN[:-1]},note\n0,5,2,"a\n1,6,3,b\n', "line 3: not CSV"),
        (WRITTEN["mooncake"] + '{"timestamp": 1, "timestamp": 9}\n', "line 4: 'timestamp' stands twice in one object"),
        (f"{ASKED}}}\n{ASKED}}}\n{ASKED}, \"model\": \"a\"}}\n", r"line 1: no model, which .* have \(line 3\)"),
        (f'{ASKED}, "model": "a"}}\n{ASKED}, "model": "a", "selected_model": "b"}}\n', "line 1: no selected_model"),
        ('{"arrival_s": 0, "input_tokens": 5, "output_tokens": 2}\n'
         '{"arrival_s": 1, "input_tokens": 5, "output_tokens": 2, "cluster": 1}\n', "line 1: no cluster, which other"),
        ('{"timestamp": 1' + "0" * 400 + ', "input_length": 5, "output_length": 2}\n', "timestamp must be a number"),
    ],
)  # fmt: skip
def test_bad_input_names_the_line(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        traces.read(given(tmp_path, content))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_what_is_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no trace .*missing\.csv"):
        traces.read(tmp_path / "missing.csv")
    with pytest.raises(ConfigError, match="there is no trace"):
        traces.read(tmp_path)
    (tmp_path / "binary").write_bytes(OWN.encode("utf-16"))
    with pytest.raises(ConfigError, match="binary is not a text in UTF-8"):
        traces.read(tmp_path / "binary")


def test_the_beginning_of_a_trace_and_another_rate(tmp_path: Path) -> None:
    whole = traces.read(given(tmp_path, WRITTEN["semantic-router"]))
    start = whole.first(2)
    assert (len(start), start.input_tokens.tolist()) == (2, [5, 6])
    assert start.cluster is not None
    assert start.cluster.tolist() == [1, 0]
    faster = whole.at_rate(4.0)
    assert faster.requests_per_s == pytest.approx(4.0)
    assert faster.arrival_s == pytest.approx(whole.arrival_s / 4)
    with pytest.raises(ConfigError, match="more than 0 per second, not -1"):
        whole.at_rate(-1)
    with pytest.raises(ConfigError, match="at least one request, not 0"):
        whole.first(0)
    with pytest.raises(ConfigError, match="come at once"):
        whole.first(1).at_rate(4.0)


def test_ours_is_written_as_the_semantic_router_takes_it(tmp_path: Path) -> None:
    """``_load_semantic_router`` of fleet_sim/workload/trace.py takes ``float(timestamp)``, ``int(prompt_tokens)``,
    ``int(generated_tokens)``, ``selected_model`` and ``category``; vllm-sr-sim 0.1 replays what is written here.
    """
    rows = list(synthetic.point("p2", "load", "p2.E", 8, 0))
    records = pd.DataFrame(rows)
    ours = traces.of_records(records)
    path = tmp_path / "ours.jsonl"
    traces.write(ours, path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert set(lines[0]) == {"timestamp", "prompt_tokens", "generated_tokens", "selected_model", "category"}
    first = records.sort_values("t_send_ns").iloc[0]
    assert lines[0]["timestamp"] == 0
    assert lines[0]["selected_model"] == f"expert-{first['expert']}"
    again = traces.read(path)
    assert again.format == "semantic-router"
    for name in ("arrival_s", "input_tokens", "output_tokens", "cluster"):
        assert np.array_equal(getattr(again, name), getattr(ours, name)), name


def test_a_trace_without_decisions_is_written_without(tmp_path: Path) -> None:
    plain = traces.read(given(tmp_path, WRITTEN["azure"]))
    traces.write(plain, tmp_path / "plain.jsonl")
    again = traces.read(tmp_path / "plain.jsonl")
    assert again.cluster is None
    assert again.arrival_s.tolist() == plain.arrival_s.tolist()


def test_records_of_several_points_are_no_trace() -> None:
    records = pd.DataFrame(list(synthetic.point("p2", "load", "p2.E", 4, 0)))
    other = records.assign(point_hash="other")
    with pytest.raises(ConfigError, match="of one point, but these records are of 2"):
        traces.of_records(pd.concat([records, other]))
    with pytest.raises(ConfigError, match="at least one answered request"):
        traces.of_records(records.assign(status="timeout"))
    failed = records.assign(status=["timeout"] + ["ok"] * (len(records) - 1))
    assert len(traces.of_records(failed)) == len(records) - 1


def test_a_trace_knows_its_name(tmp_path: Path) -> None:
    found = traces.read(given(tmp_path, WRITTEN["azure"], "AzureLLMInferenceTrace_conv.csv"))
    assert isinstance(found, Trace)
    assert found.name == "AzureLLMInferenceTrace_conv.csv"


READ = """
import json, sys
from fleet_sim.workload.trace import TraceWorkload
requests = TraceWorkload(sys.argv[1], fmt="semantic_router").generate()
print(json.dumps([[at, its.l_in, its.l_out, its.model_id, its.category] for at, its in requests]))
"""


@pytest.mark.slow
def test_the_semantic_routers_simulator_reads_ours(tmp_path: Path) -> None:
    python = environments.from_pypi("vllm-sr-sim", peers.PEERS["vllm-sr-sim"])
    ours = traces.of_records(pd.DataFrame(list(synthetic.point("p2", "load", "p2.E", 8, 0))))
    traces.write(ours, tmp_path / "ours.jsonl")
    ran = subprocess.run([python, "-c", READ, tmp_path / "ours.jsonl"], capture_output=True, text=True, check=True)
    assert ours.cluster is not None
    assert json.loads(ran.stdout) == [
        [at, inputs, outputs, f"expert-{cluster}", f"cluster-{cluster}"]
        for at, inputs, outputs, cluster in zip(
            *(its.tolist() for its in (ours.arrival_s, ours.input_tokens, ours.output_tokens, ours.cluster)),
            strict=True,
        )
    ]
