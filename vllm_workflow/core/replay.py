"""Does again what a dispatcher did, from its log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import zip_longest

from vllm_workflow.core.call_events import Polled, Settled, Submitted, Withdrawn
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import (
    Added,
    Apportioned,
    Cleared,
    Event,
    Evicted,
    Marked,
    Removed,
    Reported,
    Restored,
    Started,
    Swapped,
)
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.types import Decision


def replay(
    events: Iterable[Event], policy: PolicyConfig | None = None
) -> Iterator[tuple[Decision | None, Decision | None]]:
    """Yield each recorded decision with the one that the same events lead to now.

    Under the recorded policy the two are equal. Under another one the later of them tell
    how it would have decided on the load that the recorded policy made. None stands for a
    call that one of them had wait.

    Args:
        events: From the log, in its order.
        policy: Decides in place of the recorded ones, from beginning to end.

    Raises:
        ConfigError: The log does not begin with `started`.
    """
    dispatcher: Dispatcher | None = None
    for event in events:
        if isinstance(event, Started):
            dispatcher = Dispatcher(Fleet(), policy or event.policy, tenants=event.tenants)
            continue
        if dispatcher is None:
            raise ConfigError("decision log: the first event is not 'started'")
        match event:
            case Swapped():
                if policy is None:
                    dispatcher.swap(event.policy, now=event.now)
            case Apportioned():
                dispatcher.apportion(event.tenants, now=event.now)
            case Added():
                dispatcher.add(event.instance)
            case Removed():
                dispatcher.remove(event.instance_id)
            case Marked():
                dispatcher.mark(event.instance_id, healthy=event.healthy)
            case Reported():
                dispatcher.report(
                    event.instance_id, num_others=event.num_others, kv_share=event.kv_share
                )
            case Evicted():
                dispatcher.evict(event.instance_id, event.chain_hashes)
            case Cleared():
                dispatcher.clear(event.instance_id)
            case Restored():
                dispatcher.restore_speed(**asdict(event))
            case Submitted():
                decision = dispatcher.submit(
                    event.request,
                    now=event.now,
                    num_prompt_bytes=event.num_prompt_bytes,
                    exclude=event.exclude,
                )
                if event.decision is not None or decision is not None:
                    yield event.decision, decision
            case Polled():
                yield from zip_longest(event.decisions, dispatcher.poll(event.now))
            case Withdrawn():
                dispatcher.withdraw(event.request_id)
            case Settled():
                dispatcher.settle(event.outcome)
