"""Controls of a question in a notebook: what is changed is answered at once."""

from __future__ import annotations

import html
import io
from dataclasses import replace
from typing import Any, get_args

from matplotlib.figure import Figure

from erlib.config import ConfigError, Dtype, Mix
from erlib.paper_scale import decisions, gpus, questions
from erlib.paper_scale.exploring import Answer, Explorer
from erlib.paper_scale.questions import Question
from erlib.report.own import what_if

_RATE, _USERS = "requests/s", "users"
_EVERY = "all"


def controls(explorer: Explorer, question: Question) -> Any:
    """Widgets for every part of a question, with the answer below; frontier on demand.

    Parameters
    ----------
    explorer : Explorer
    question : Question
        What they begin with; a trace of its own stays.

    Returns
    -------
    ipywidgets.Widget or None
        None, and a line that says so, without ipywidgets.
    """
    try:
        import ipywidgets  # noqa: PLC0415  (a notebook runs without it, too)
    except ImportError:
        print("controls: there is no ipywidgets; set what_if.* of the profile and run the notebook again")
        return None
    return _Controls(explorer, question, ipywidgets).box


class _Controls:
    def __init__(self, explorer: Explorer, question: Question, widgets: Any):
        self._explorer, self._question = explorer, question
        look: dict[str, Any] = {"continuous_update": False, "style": {"description_width": "11em"}}
        chosen: dict[str, Any] = {"style": look["style"]}
        users = question.users is not None
        self.parts: dict[str, Any] = {
            "model": widgets.Dropdown(
                options=sorted({question.model, *gpus.models()}),
                value=question.model,
                description="model",
                **chosen,
            ),
            "gpu": widgets.Combobox(options=list(gpus.GPUS), value=question.gpu, description="GPU, or table", **look),
            "gpu_gb": widgets.FloatText(value=question.gpu_gb or 0, description="GB each (0: known)", **look),
            "gpus": widgets.IntSlider(question.gpus, 1, questions.CLUSTERS, description="GPUs", **look),
            "formats": widgets.Dropdown(
                options=[_EVERY, *get_args(Dtype)],
                value=question.formats[0] if len(question.formats) == 1 else _EVERY,
                description="weights",
                **chosen,
            ),
            "experts": widgets.IntSlider(
                question.experts or 0, 0, questions.CLUSTERS, description="experts (0: one each)", **look
            ),
            "load": widgets.Dropdown(
                options=[_RATE, _USERS], value=_USERS if users else _RATE, description="load", **chosen
            ),
            "much": widgets.FloatLogSlider(
                float(question.users or question.rate_per_s), min=-1, max=3.5, description="how much", **look
            ),
            "lengths": widgets.Dropdown(
                options={"paper 1: 335 and 1,200 tokens": "p1", "paper 2: MLPerf's": "p2"},
                value="p2" if question.trace is not None else question.lengths,
                description="lengths",
                disabled=question.trace is not None,
                **chosen,
            ),
            "spread": widgets.Dropdown(options=get_args(Mix), value=question.spread, description="mix", **chosen),
            "ttft_s": widgets.FloatLogSlider(question.ttft_s, min=-2, max=2, description="p99 TTFT [s]", **look),
            "tpot_s": widgets.FloatLogSlider(question.tpot_s, min=-3, max=1, description="p99 TPOT [s]", **look),
            "gpu_hour": widgets.FloatText(value=question.gpu_hour, description="a GPU's hour", **look),
        }
        self.said, self.picture = widgets.HTML(), widgets.Image(format="png", layout={"max_width": "100%"})
        self.more = widgets.Button(description="frontier")
        self.frontier = widgets.Image(format="png", layout={"max_width": "100%", "display": "none"})
        for part in self.parts.values():
            part.observe(self._changed, "value")
        self.more.on_click(self._draw_frontier)
        grid = widgets.GridBox(list(self.parts.values()), layout={"grid_template_columns": "repeat(3, 33%)"})
        self.box = widgets.VBox([grid, self.picture, self.said, self.more, self.frontier])
        self._changed()

    def asked(self) -> Question:
        """What the controls say."""
        value: dict[str, Any] = {name: part.value for name, part in self.parts.items()}
        load, much, formats, lengths = (value.pop(name) for name in ("load", "much", "formats", "lengths"))
        return replace(
            self._question,
            **{**value, "gpu_gb": value["gpu_gb"] or None, "experts": value["experts"] or None},
            formats=() if formats == _EVERY else (formats,),
            lengths=lengths if self._question.trace is None else self._question.lengths,
            requests_per_s=much if load == _RATE else None,
            users=max(1, round(much)) if load == _USERS else None,
        )

    def _changed(self, _: object = None) -> None:
        self.frontier.layout.display = "none"
        try:
            answer = self._explorer.answer(self.asked())
        except ConfigError as error:
            self.said.value = f"<b>{html.escape(str(error))}</b>"
            self.picture.layout.display = "none"
            return
        self.picture.value = _png(what_if.two_best(answer))
        self.picture.layout.display = ""
        self.said.value = _html(answer)

    def _draw_frontier(self, _: object = None) -> None:
        asked = self.asked()
        try:
            table = self._explorer.frontier(asked)
        except ConfigError as error:
            self.said.value = f"<b>{html.escape(str(error))}</b>"
            return
        self.frontier.value = _png(what_if.frontier(table, asked))
        self.frontier.layout.display = ""


def _html(answer: Answer) -> str:
    sentences = "".join(f"<li>{html.escape(its)}</li>" for its in decisions.decision(answer))
    small = " ".join(map(html.escape, decisions.limits(answer)))
    return f"<ul>{sentences}</ul>{decisions.side_by_side(answer).to_html()}<p><small>{small}</small></p>"


def _png(fig: Figure) -> bytes:
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=110)
    return drawn.getvalue()
