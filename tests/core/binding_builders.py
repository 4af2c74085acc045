"""Dispatchers whose calls wait for a seat."""

from tests.builders import dispatcher, outcome
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.types import Decision

LATE = PolicyConfig(late_binding=True, ordering="deadline")


def brain(*instances: Instance, config: PolicyConfig = LATE) -> Dispatcher:
    return dispatcher(*instances, config=config)


def end(each: Dispatcher, decision: Decision) -> None:
    each.settle(outcome(decision.request_id, decision.chosen.instance_id))


RELEGATING = PolicyConfig(late_binding=True, relegate=True)
