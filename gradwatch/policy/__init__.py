"""The policy: what may happen to a gradient between `backward()` and `step()`.

    policy.yaml  ->  Policy  ->  select(rule, layout)

A file is read, checked and refused as a whole: every mistake with its line, or a policy.
"""

from gradwatch.policy.accumulate import Accumulate, SampleTarget
from gradwatch.policy.changes import number_changes
from gradwatch.policy.clip import ClipRule
from gradwatch.policy.detect import KINDS, Culprits, Detect
from gradwatch.policy.file import PolicyFile
from gradwatch.policy.forms import Budget, Schedule
from gradwatch.policy.loading import load_policy, parse_policy
from gradwatch.policy.models import Depth, Guard, Policy
from gradwatch.policy.schema import policy_schema
from gradwatch.policy.selection import check_against, layers_of, select
from gradwatch.policy.statistic import StatisticLimit

__all__ = [
    "KINDS",
    "Accumulate",
    "Budget",
    "ClipRule",
    "Culprits",
    "Depth",
    "Detect",
    "Guard",
    "Policy",
    "PolicyFile",
    "SampleTarget",
    "Schedule",
    "StatisticLimit",
    "check_against",
    "layers_of",
    "load_policy",
    "number_changes",
    "parse_policy",
    "policy_schema",
    "select",
]
