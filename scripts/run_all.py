"""Run the notebooks of a profile in order with papermill, skipping those whose inputs have not changed."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a Python without erlib finds it there, and is told more

from erlib import cache, config, paths
from erlib.config import keys
from erlib.machine import processes


def main() -> int:
    args = _arguments()
    try:
        return _main(args)
    except config.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as end:
        print("\nstopped", file=sys.stderr)
        return _status(end)


def _main(args: argparse.Namespace) -> int:
    if args.profile.endswith((".yaml", ".yml")):
        args.profile = str(Path(args.profile).absolute())  # notebooks run in a directory of their own
    overrides = config.read_overrides(args.set)
    if args.records:
        overrides["records"] = args.records
    profile = config.load_profile(args.profile, overrides)
    chosen = _selection(args.only, args.start)
    if profile.records == "published":
        from erlib.load import published  # and all that it takes to make records: who has them waits for none of it

        published.check(profile, [notebook.stem for notebook in chosen])
    report = None
    if profile.serving.backend == "tensorrt_llm":
        from erlib.dgx import preflight, runbook

        report = preflight.check(profile)  # on the GPUs that there are
        profile, overrides = report.fitted.profile, overrides | report.fitted.overrides
    steps = _steps(profile, {"profile": args.profile, "overrides": overrides})
    steps = [step for step in steps if step.notebook in chosen]
    left_out = report.fitted.left_out if report else {}
    if args.dry_run:
        from erlib.load import readiness
        from erlib.paper_scale import asked_in_vain

        plan = [(step.name, step.what_would_be(args.again, left_out)) for step in steps]
        print(runbook.text(report, plan) if report else "\n".join(f"{name}: {what}" for name, what in plan))
        problems = [] if report else readiness.basics(profile)
        wanted = [step.name for step in steps if step.name not in left_out]
        for problem in [*problems, *asked_in_vain.problems(profile, wanted)]:
            print(f"a run would stop here because: {problem}", file=sys.stderr)
        return 0
    if report:
        print(runbook.opening(report), file=sys.stderr if report.problems else sys.stdout)
        if report.problems:
            print("--dry-run shows the whole plan", file=sys.stderr)
            return 2
    to_run = [step for step in steps if step.name not in left_out]
    if not to_run:
        raise config.ConfigError("; ".join(f"{step.name} is left out: {left_out[step.name]}" for step in steps))
    with _alone(profile):
        if due := [step for step in to_run if step.reason_to_run(args.again)]:
            _check_basics(profile, due)
        return _run(to_run, profile, args.again)


def _check_basics(profile: config.Profile, steps: list[Step]) -> None:
    """ConfigError where a run lacks what any run needs, or a notebook asks for what cannot be."""
    from erlib.load import readiness
    from erlib.paper_scale import asked_in_vain

    if problems := [*readiness.basics(profile), *asked_in_vain.problems(profile, [step.name for step in steps])]:
        raise config.ConfigError("\n".join(problems))


def _run(steps: list[Step], profile: config.Profile, again: bool) -> int:
    """Run what has to run, stop at the first failure, say what happened."""
    rows: list[tuple[Step, str, float]] = []
    status = 0
    for step in steps:
        if status:
            rows.append((step, "not run", 0.0))
            continue
        reason = step.reason_to_run(again)
        print(f"{step.name}: {'running: ' + reason if reason else 'cached: nothing it reads has changed'}", flush=True)
        started = time.monotonic()
        result = "ran" if reason else "cached"
        try:
            if reason:
                step.run()
        except (KeyboardInterrupt, SystemExit) as end:
            print("\nstopped; the same command goes on where this one left off", file=sys.stderr)
            result, status = "stopped", _status(end)
            logging.getLogger("asyncio").disabled = True  # it would tell of tasks that nobody waits for any more
        except Exception as error:
            print(f"\nerror in {step.name}: {_brief(error)}", file=sys.stderr)
            result, status = "failed", 1
        rows.append((step, result, time.monotonic() - started))
    print(f"\n{'notebook':<24} {'result':<8} {'seconds':>8}  log")
    for step, result, seconds in rows:
        print(f"{step.name:<24} {result:<8} {seconds:>8.1f}  {_short(step.log)}")
    print(f"{'total':<24} {'':<8} {sum(seconds for *_, seconds in rows):>8.1f}")
    print(f"figures: {_short(paths.FIGURES / profile.name)}")
    return status


def _status(end: BaseException) -> int:
    """Exit status after the signal that raised `end`, as shells have it: Ctrl-C."""
    return int(end.code or 0) if isinstance(end, SystemExit) else 128 + signal.SIGINT


@contextlib.contextmanager
def _alone(profile: config.Profile) -> Iterator[None]:
    """Refuse to start beside another run of the same profile."""
    run_dir = paths.run_dir(profile.name)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("wb")
    except OSError as error:
        raise config.ConfigError(
            f"{error.filename} cannot be written ({error.strerror}): set ERLIB_HOME to a folder of yours"
        ) from None
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise config.ConfigError(f"another run of profile {profile.name!r} is going on; wait for it") from None
        yield


def _steps(profile: config.Profile, parameters: dict[str, Any]) -> list[Step]:
    steps: list[Step] = []
    for notebook in _notebooks():
        steps.append(Step(notebook, profile, parameters, earlier=list(steps)))
    return steps


def _damage(wrote: dict[str, int]) -> Iterator[str]:
    """What has become of files that a notebook wrote; a reader may edit all but records."""
    for name, size in wrote.items():
        if not os.path.exists(name):
            yield f"{_short(Path(name))} is gone"
        elif name.endswith(".parquet") and os.path.getsize(name) != size:
            yield f"{_short(Path(name))} is not as it was written"


def _corpus(profile: config.Profile) -> str:
    """The user's own corpus by content; one that cannot be read is :func:`erlib.load.readiness.basics`' to tell."""
    path = profile.corpus.path
    return cache.digest(Path(path)) if path and os.path.isfile(path) and os.access(path, os.R_OK) else ""


@dataclass(frozen=True)
class Stamp:
    """What is known of a notebook's last run."""

    reads: dict[str, str]
    """Everything that it depends on, by content."""
    wrote: dict[str, int]
    """Files and their sizes: also those of earlier runs, whose points this one has found."""
    begun: float
    finished: str
    """Empty where it was not."""


class Step:
    """One notebook with what it depends on."""

    def __init__(self, notebook: Path, profile: config.Profile, parameters: dict[str, Any], earlier: list[Step]):
        self.notebook = notebook
        self.name = notebook.stem
        self.profile = profile
        self._parameters = parameters
        self._earlier = earlier
        self._run_dir = paths.run_dir(profile.name)
        self._executed = self._run_dir / "notebooks" / notebook.name
        self._stamp = self._executed.with_suffix(".json")
        self.log = self._run_dir / "logs" / f"{notebook.stem}.log"
        self._inputs = {
            "the notebook": cache.digest(notebook),
            "the profile": profile.digest,
            "erlib": cache.digest(
                *(file for file in sorted(paths.STYLE.parent.rglob("*")) if file.suffix in (".py", ".j2", ".mplstyle"))
            ),
            "engines": cache.digest(
                *sorted(paths.ENGINE_SPECS.glob("*.yaml")), *sorted((paths.ENGINE_SPECS / "triton").rglob("*.py"))
            ),
            "data": cache.digest(*sorted(path for path in paths.FACTS.iterdir() if path.is_file())),
            "the pinned packages": cache.digest(paths.ROOT / "locks" / "workbench.txt"),
            "the corpus": _corpus(profile),
        }

    def reason_to_run(self, again: bool) -> str:
        """Why the notebook has to run; empty if it has not."""
        if again:
            return "asked for with --again"
        before = self._last_run()
        if before is None:
            return "not run before with this profile"
        if not before.finished:
            return "not run to its end"
        changed = [what for what, value in self._reads().items() if before.reads.get(what) != value]
        if changed:
            return f"changed: {', '.join(changed)}"
        return next(_damage(before.wrote), "")

    def what_would_be(self, again: bool, left_out: dict[str, str]) -> str:
        """Whether it would run, and why."""
        if self.name in left_out:
            return f"leave out: {left_out[self.name]}"
        reason = self.reason_to_run(again)
        return f"run: {reason}" if reason else "skip: nothing it reads has changed"

    def _reads(self) -> dict[str, str]:
        """All inputs by content; what earlier notebooks made stands for itself by when they ran."""
        runs = [before.finished if (before := step._last_run()) else "" for step in self._earlier]
        return {**self._inputs, "an earlier notebook's results": cache.digest(runs)}

    def _last_run(self) -> Stamp | None:
        from pydantic import TypeAdapter

        try:
            return TypeAdapter(Stamp).validate_json(self._stamp.read_bytes())
        except (OSError, ValueError):  # never run, cut off while the stamp was written, or not of our making
            return None

    def run(self) -> None:
        """Execute with papermill; the executed copy is kept whether or not it succeeds."""
        from erlib.machine import kernel

        for directory in (self._executed.parent, self.log.parent):
            directory.mkdir(parents=True, exist_ok=True)
        before = self._last_run()
        begun = before.begun if before and not before.finished else time.time()
        self._write(Stamp({}, before.wrote if before else {}, begun, finished=""))
        kernel.execute(self.notebook, self._executed, self._parameters, self.log)
        kept = before.wrote if before else {}
        wrote = {
            str(path): path.stat().st_size
            for root in (paths.FIGURES / self.profile.name, self._run_dir)
            for path in root.rglob("*")
            if path.is_file() and path.suffix != ".log" and (path.stat().st_mtime >= begun or str(path) in kept)
        }
        self._write(Stamp(self._reads(), wrote, begun, finished=str(time.time())))

    def _write(self, stamp: Stamp) -> None:
        self._stamp.write_text(json.dumps(asdict(stamp)), encoding="utf-8")


def _notebooks() -> list[Path]:
    """In their order, but for the scorecard: it shows what all others have found."""
    return sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"), key=lambda path: (path.stem == "10_scorecard", path))


def _selection(only: list[list[str]], start: str | None) -> list[Path]:
    notebooks = _notebooks()
    names = [notebook.stem for notebook in notebooks]

    def find(name: str) -> int:
        stem = Path(name).stem if name.endswith(".ipynb") else name
        matches = [i for i, known in enumerate(names) if known == stem or known.split("_")[0] == stem.zfill(2)]
        if not matches:
            raise config.ConfigError(f"no notebook {name!r}{config.nearest(stem, names)}; they are {', '.join(names)}")
        return matches[0]

    chosen = {find(name) for group in only for name in group} or set(range(len(names)))
    first = find(start) if start else 0
    if first > max(chosen):
        raise config.ConfigError(f"nothing selected: --from {start} leaves out all that --only names")
    return [notebook for i, notebook in enumerate(notebooks) if i in chosen and i >= first]


def _brief(error: Exception) -> str:
    """The exception that a cell raised, without papermill's traceback."""
    name, value = getattr(error, "ename", ""), getattr(error, "evalue", "")
    return f"{name}: {value}" if name else f"{type(error).__name__}: {error}"


def _short(path: Path) -> Path:
    return path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path


def _keys() -> str:
    """Each key of a profile with its meaning, type and default, as wide as the terminal."""
    indent = 37
    wrapper = textwrap.TextWrapper(
        max(60, shutil.get_terminal_size((120, 20)).columns - 1),
        subsequent_indent=" " * indent,
        break_long_words=False,  # what can be copied stays whole
        break_on_hyphens=False,
    )
    return "\n".join(wrapper.fill(f"  {key.name:<{indent - 3}} {key.text}") for key in keys.of(config.Profile))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run_all.sh",
        description="Run a profile's notebooks in order. What is up to date is skipped; what was interrupted resumes.",
        epilog=f"keys for --set, whose values are YAML:\n{_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--profile",
        default="laptop",
        metavar="NAME|FILE.yaml",
        help="laptop (default), smoke, one-gpu, dgx-h100, or a YAML file",
    )
    parser.add_argument(
        "--only", nargs="+", action="append", default=[], metavar="NOTEBOOK", help="leave out all others"
    )
    parser.add_argument("--again", action="store_true", help="run notebooks whose inputs have not changed, too")
    parser.add_argument("--from", dest="start", metavar="NOTEBOOK", help="leave out the notebooks before this one")
    parser.add_argument(
        "--records",
        choices=["own", "published"],
        help="published: draw and judge, with --only 08 09 10, the records beside the reference figures",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change a profile key"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would run, and why, and stop; on GPUs, the whole plan"
    )
    return parser.parse_args()


if __name__ == "__main__":
    processes.end_on_signals()
    sys.exit(main())
