"""Traces as others publish them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_workflow.sim.fields import (
    Place,
    a_count,
    a_list,
    a_name,
    a_time,
    an_object,
    json_lines,
    required,
)
from vllm_workflow.sim.types import PrefixPart, Trace, TraceCall, TraceRun, content

_HEXGEN_RUN = "Text2SQLRequest"
_CONTROLLER = "controller"
_MOONCAKE_FIELDS = frozenset({"timestamp", "input_length", "output_length", "hash_ids"})
_CONVERSATION_FIELDS = ("session_id", "conversation_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class HexgenLayout:
    """What a Hexgen file does not say: edges and shared prefixes.

    The defaults are CHESS as published in Hexgen-Flow (arXiv 2505.05286). Token counts are those
    of its prompt templates before the first placeholder, counted with the Tekken tokeniser and
    scaled to Llama 3 by the one difference between two templates that the lengths reveal.
    """

    parallel: frozenset[str] = frozenset({"generate_candidate", "evaluate"})
    """Stages whose consecutive calls run side by side; all other calls run one by one."""
    templates: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "generate_candidate": (9130, 5264),
            "revise": (2863,),
            "extract_keywords": (583,),
            "generate_unit_test": (329,),
            "evaluate": (181,),
        }
    )
    """Stage -> tokens of its template, the same in every run; the k-th call of a round takes
    the k-th number, beyond them the last."""
    controllers: frozenset[str] = frozenset({"information_retriever", "unit_tester"})
    """Stages that share one template of `num_controller_tokens`."""
    num_controller_tokens: int = 210
    num_tail_tokens: int = 50
    """End of a prompt that differs between calls of one stage of one run."""
    num_database_tokens: int = 0
    """Head of the schema that all runs of the file share: they ask about one database. How long
    it is was not published."""


_CHESS = HexgenLayout()


def is_hexgen(value: Any) -> bool:
    """Whether a whole file, parsed, is in the Hexgen format."""
    return isinstance(value, list) and (
        not value or (isinstance(value[0], dict) and _HEXGEN_RUN in value[0])
    )


def read_hexgen(value: Any, source: str, layout: HexgenLayout = _CHESS) -> Trace:
    """Import `[{"Text2SQLRequest": [{"step", "input_length", "output_length"}, …]}, …]`.

    Args:
        value: The file's content, parsed.
        source: Its name, for errors.
        layout: Edges and shared prefixes.

    Raises:
        ConfigError: With file, field, what was there and what was wanted.
    """
    place = Place(source)
    listed = a_list(value, place, of="run", empty=False)
    runs = []
    num_raised = 0
    for i, item in enumerate(listed):
        data = an_object(item, place[i])
        steps = a_list(
            required(data, _HEXGEN_RUN, place[i]), place[i] / _HEXGEN_RUN, of="call", empty=False
        )
        calls = [_step(step, (place[i] / _HEXGEN_RUN)[k]) for k, step in enumerate(steps)]
        num_raised += sum(call[2] == 0 for call in calls)
        runs.append(_hexgen_run(f"run-{i + 1}", calls, layout))
    trace = Trace(runs=tuple(runs), source=Path(source).name)
    return Trace(runs=trace.runs, source=trace.source, notes=_hexgen_notes(trace, num_raised))


def _hexgen_notes(trace: Trace, num_raised: int) -> tuple[str, ...]:
    half = len(trace.runs) // 2
    notes = [
        "Hexgen format: lengths were recorded; edges, shared prefixes and arrivals were not "
        "(edges and templates of CHESS are assumed).",
        "Tool and SQL times are not in it, so every gap is 0.",
    ]
    if trace.num_duplicates:
        notes.append(
            f"{trace.num_duplicates} of {len(trace.runs)} runs repeat an earlier one, so "
            f"{len(trace.runs) - trace.num_duplicates} are distinct."
        )
    if len(trace.runs) == 2 * half and trace.num_duplicates >= half:
        contents = [content(run) for run in trace.runs]
        if contents[:half] == contents[half:]:
            notes.append("The second half of the file repeats the first.")
    rounds = sorted(sum(call.stage == "revise" for call in run.calls) for run in trace.runs)
    if rounds[-1]:
        notes.append(
            f"Revisions per run: {rounds[0]} to {rounds[-1]}. The published traces 1 to 3 were "
            "resampled to a flat 0 to 10; in the recordings seven runs in ten have none."
        )
    return (*notes, *_raised(num_raised))


def _raised(num_raised: int) -> tuple[str, ...]:
    if not num_raised:
        return ()
    return (f"{num_raised} calls without output count as 1 output token.",)


def _step(value: Any, place: Place) -> tuple[str, int, int]:
    """Return stage, prompt tokens, output tokens (0 as recorded)."""
    data = an_object(value, place)
    stage = _stage(a_name(required(data, "step", place), place / "step"))
    num_prompt_tokens = a_count(required(data, "input_length", place), place / "input_length")
    num_output_tokens = a_count(
        required(data, "output_length", place), place / "output_length", minimum=0
    )
    return stage, num_prompt_tokens, num_output_tokens


def _stage(step: str) -> str:
    """`generate_candidate_llama-agent` is the stage `generate_candidate` of one agent."""
    name = step.lower().replace(" ", "_")
    return name.removesuffix("-agent").rsplit("_", 1)[0] if name.endswith("-agent") else name


def _hexgen_run(
    run_id: str, steps: Sequence[tuple[str, int, int]], layout: HexgenLayout
) -> TraceRun:
    shared = _shared_tokens(steps, layout)
    calls: list[TraceCall] = []
    before: tuple[str, ...] = ()
    for stage, group in groupby(steps, key=lambda step: step[0]):
        round_ids: list[str] = []
        for k, (_, num_prompt_tokens, num_output_tokens) in enumerate(group):
            call_id = f"call-{len(calls) + 1}"
            calls.append(
                TraceCall(
                    call_id=call_id,
                    stage=stage,
                    num_prompt_tokens=num_prompt_tokens,
                    num_output_tokens=max(1, num_output_tokens),
                    after=before,
                    prefix=_hexgen_prefix(run_id, stage, k, num_prompt_tokens, shared, layout),
                )
            )
            round_ids.append(call_id)
            if stage not in layout.parallel:
                before, round_ids = (call_id,), []
        before = tuple(round_ids) or before
    return TraceRun(run_id=run_id, workflow="text2sql", calls=tuple(calls))


def _shared_tokens(
    steps: Sequence[tuple[str, int, int]], layout: HexgenLayout
) -> dict[tuple[str, int], int]:
    """Return, per template, the tokens between it and the tail that siblings in a run share."""
    shared: dict[tuple[str, int], int] = {}
    for stage, group in groupby(steps, key=lambda step: step[0]):
        for k, (_, num_prompt_tokens, _) in enumerate(group):
            variant, num_template_tokens = _template(stage, k, layout)
            rest = max(0, num_prompt_tokens - num_template_tokens - layout.num_tail_tokens)
            key = (stage, variant)
            shared[key] = min(rest, shared.get(key, rest))
    return shared


def _template(stage: str, k: int, layout: HexgenLayout) -> tuple[int, int]:
    """Return which template of its stage the k-th call of a round takes, and its tokens."""
    if stage in layout.controllers:
        return 0, layout.num_controller_tokens
    sizes = layout.templates.get(stage, (0,))
    variant = min(k, len(sizes) - 1)
    return variant, sizes[variant]


def _hexgen_prefix(
    run_id: str,
    stage: str,
    k: int,
    num_prompt_tokens: int,
    shared: Mapping[tuple[str, int], int],
    layout: HexgenLayout,
) -> tuple[PrefixPart, ...]:
    variant, num_template_tokens = _template(stage, k, layout)
    if not 0 < num_template_tokens <= num_prompt_tokens:
        return ()  # not this template: a prompt cannot be shorter than its head
    owner = _CONTROLLER if stage in layout.controllers else f"{stage}/{variant + 1}"
    parts = [PrefixPart(part_id=f"template/{owner}", num_tokens=num_template_tokens)]
    num_shared = shared[stage, variant]
    if stage in layout.controllers:
        return tuple(parts)
    num_database_tokens = layout.num_database_tokens
    if 0 < num_database_tokens <= num_shared:
        parts.append(PrefixPart(part_id="database", num_tokens=num_database_tokens))
        num_shared -= num_database_tokens
    if num_shared:
        parts.append(PrefixPart(part_id=f"{run_id}/{owner}", num_tokens=num_shared))
    return tuple(parts)


def is_mooncake(first: Mapping[str, Any]) -> bool:
    """Whether a file that begins with this object is a Mooncake trace."""
    return not _MOONCAKE_FIELDS.isdisjoint(first)


def read_mooncake(text: str, source: str, *, block_size: int = 512) -> Trace:
    """Import lines of `timestamp` (ms), `input_length`, `output_length`, `hash_ids`.

    A line is a run of one call. Lines of one `session_id` or `conversation_id` are the turns
    of one run; `delay` (ms) between them is the gap, and without it the time between their
    timestamps.

    Args:
        text: Of the file.
        source: Its name, for errors.
        block_size: Prompt tokens that one of the `hash_ids` stands for.

    Raises:
        ConfigError: With file, line, field, what was there and what was wanted.
    """
    turns: dict[str, list[_Turn]] = {}
    latest_run = 0.0
    for place, value in json_lines(text, source):
        turn = _turn(an_object(value, place), place, block_size)
        run_id = f"session-{turn.conversation}" if turn.conversation else f"line-{place.line}"
        before = turns.setdefault(run_id, [])
        if (latest := before[-1].time_s if before else latest_run) > turn.time_s:
            (place / "timestamp").fail(
                f"timestamps in order, so at least {latest * 1e3:g}", turn.time_s * 1e3
            )
        if not before:
            latest_run = turn.time_s
        before.append(turn)
    runs = [_conversation(run_id, each) for run_id, each in turns.items()]
    listed = [turn for each in turns.values() for turn in each]
    return Trace(
        runs=tuple(runs),
        source=Path(source).name,
        notes=(*_mooncake_notes(listed), *_raised(sum(t.num_output_tokens == 0 for t in listed))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    conversation: str
    time_s: float
    delay_s: float | None
    num_prompt_tokens: int
    num_output_tokens: int
    prefix: tuple[PrefixPart, ...]


def _turn(data: Mapping[str, Any], place: Place, block_size: int) -> _Turn:
    num_prompt_tokens = a_count(required(data, "input_length", place), place / "input_length")
    names = [name for name in _CONVERSATION_FIELDS if data.get(name) is not None]
    conversation = ""
    if names:
        value = data[names[0]]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        conversation = a_name(
            f"{a_count(value, place / names[0], minimum=0, maximum=2**64)}" if is_number else value,
            place / names[0],
        )
    delay = data.get("delay")
    return _Turn(
        conversation=conversation,
        time_s=_ms(required(data, "timestamp", place), place / "timestamp"),
        delay_s=None if delay is None else _ms(delay, place / "delay"),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=a_count(
            required(data, "output_length", place), place / "output_length", minimum=0
        ),
        prefix=_blocks(data.get("hash_ids", []), place / "hash_ids", num_prompt_tokens, block_size),
    )


def _ms(value: Any, place: Place) -> float:
    return a_time(value, place, unit="milliseconds", scale=1e-3)


def _blocks(
    value: Any, place: Place, num_prompt_tokens: int, block_size: int
) -> tuple[PrefixPart, ...]:
    hashes = a_list(value, place, of="block hashes")
    most = -(-num_prompt_tokens // block_size)
    if len(hashes) > most:
        place.fail(f"at most {most} hashes, blocks of {block_size} tokens", len(hashes))
    parts = []
    for i, item in enumerate(hashes):
        number = a_count(item, place[i], minimum=0, maximum=2**64)
        num_tokens = min(block_size, num_prompt_tokens - i * block_size)
        parts.append(PrefixPart(part_id=f"block/{number}", num_tokens=num_tokens))
    return tuple(parts)


def _conversation(run_id: str, turns: Sequence[_Turn]) -> TraceRun:
    calls: list[TraceCall] = []
    for i, turn in enumerate(turns):
        since_s = turn.time_s - turns[i - 1].time_s if i else 0.0
        delay_s = turn.delay_s if turn.delay_s is not None else since_s
        calls.append(
            TraceCall(
                call_id=f"turn-{i + 1}",
                stage="turn",
                num_prompt_tokens=turn.num_prompt_tokens,
                num_output_tokens=max(1, turn.num_output_tokens),
                after=(f"turn-{i}",) if i else (),
                gap_s=delay_s if i else 0.0,
                prefix=turn.prefix,
            )
        )
    return TraceRun(
        run_id=run_id, workflow="conversation", calls=tuple(calls), arrival_s=turns[0].time_s
    )


def _mooncake_notes(turns: Sequence[_Turn]) -> tuple[str, ...]:
    if all(not turn.conversation for turn in turns):
        return ("Mooncake format: each line is a run of one call.",)
    if all(turn.delay_s is not None for turn in turns):
        return ("Mooncake format: lines of one conversation are the turns of a run.",)
    return (
        "Mooncake format: lines of one conversation are the turns of a run. Where no delay is "
        "recorded, the gap before a turn is the time between timestamps, which includes the "
        "duration of the answer before it.",
    )
