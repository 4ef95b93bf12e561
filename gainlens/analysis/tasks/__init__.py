"""Tasks whose answers are known, for what a mean loss hardly shows; a new one is a file and a row.

The contextual tasks are those of RULER (Hsieh et al. 2024, arXiv:2404.06654) that need no other
data, written from their published definition.
"""

from gainlens.analysis.tasks.base import Task
from gainlens.analysis.tasks.capitals import CAPITAL_FACTS
from gainlens.analysis.tasks.common_words import COMMON_WORDS
from gainlens.analysis.tasks.elements import ELEMENT_FACTS
from gainlens.analysis.tasks.frequent_words import FREQUENT_WORDS
from gainlens.analysis.tasks.needle import NEEDLE
from gainlens.analysis.tasks.needle_haystack import NEEDLE_HAYSTACK
from gainlens.analysis.tasks.needle_keys import NEEDLE_KEYS
from gainlens.analysis.tasks.variable_tracking import VARIABLE_TRACKING

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        NEEDLE,
        NEEDLE_KEYS,
        NEEDLE_HAYSTACK,
        VARIABLE_TRACKING,
        COMMON_WORDS,
        FREQUENT_WORDS,
        CAPITAL_FACTS,
        ELEMENT_FACTS,
    )
}
